"""The backward pass of row-wise Adagrad on CPU: FBGEMM's kernel and the one that stands in for it.

Three tables of the notebook's sizes, uniform ids, one thread; CPU seconds, the least of 8 rounds.

    python benchmarks/row_updates.py --batch-size 8192 --dim 10
"""

import argparse
import json
import platform
import shlex
import sys
import time
from importlib.metadata import version

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from machine import cpu_model

from deepfm_dist.distributed import kernels

ROWS = (31_360, 6_807, 19)


def backward_s(batch_size: int, width: int, rounds: int = 8, steps: int = 20) -> float:
    """CPU seconds of a backward pass."""
    tables = [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS]
    module = SplitTableBatchedEmbeddingBagsCodegen(
        tables, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.05
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(0, n, (batch_size,), generator=generator) for n in ROWS])
    offsets = torch.arange(len(ids) + 1)
    gradient = torch.randn(batch_size, len(ROWS) * width, generator=generator) / batch_size
    best = float("inf")
    for _ in range(rounds):
        spent = 0.0
        for _ in range(steps):
            out = module(ids, offsets)
            begun = time.process_time()
            out.backward(gradient)
            spent += time.process_time() - begun
        best = min(best, spent / steps)
    return best


def main() -> None:
    """Runs the benchmark; its last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch-size", type=int, default=8192, help="rows of a batch")
    parser.add_argument("--dim", type=int, default=10, help="factors of a row")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width = -(-(arguments.dim + 1) // 4) * 4
    print(f"machine: {cpu_model()}, 1 thread")
    packages = ("torch", "fbgemm-gpu-cpu", "numba")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"command: {shlex.join(['python', *sys.argv])}")
    fbgemm_s = backward_s(arguments.batch_size, width)
    kernels.register()
    ours_s = backward_s(arguments.batch_size, width)
    print(f"FBGEMM: {fbgemm_s * 1e3:.3f} ms, ours: {ours_s * 1e3:.3f} ms")
    report = {"fbgemm_s": fbgemm_s, "ours_s": ours_s, "speedup": fbgemm_s / ours_s}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
