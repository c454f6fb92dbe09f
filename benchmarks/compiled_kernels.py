"""The catalogue kernel compiled for GPUs that may be absent: registers, spills, shared memory.

    python benchmarks/compiled_kernels.py sm_90 fp32 30-20-10
    python benchmarks/compiled_kernels.py sm_80 bf16 400-400-400 --mode candidates --top-k 100

Triton and its ptxas come with requirements/dev.txt; neither asks for a driver. A line of JSON for
each kernel. Several kernels: ``--many`` and lines of arguments on the standard input.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from deepfm_dist.ranking.engines.triton_kernel import TileConfig, rank_pairs

SHARED_KB = {80: 163, 90: 227, 100: 227}
"""Shared memory of a program at most, by compute capability; CUDA C++ programming guide."""
TENSOR_MEMORY_COLUMNS = 512
"""Tensor memory of sm_100. A kernel that needs more is compiled into a trap, which Triton refuses
to launch; the engine then takes smaller tiles."""
_SIZES = ("n_users", "n_items", "columns", "columns_per_split", "offset", "k")
_POSITIONS = ("candidates", "seen", "seen_begins", "seen_ends")


def compiled(
    arch: int, precision: str, sizes: list[int], mode: str, top_k: int, dim: int
) -> dict[str, Any]:
    """Compiles one variant as `TritonEngine` would launch it: with smaller tiles where it must.

    Args:
        arch: compute capability times 10.
        precision: fp32, tf32 or bf16.
        sizes: hidden layers.
        mode: top_k, scores or candidates.
        top_k: items per user.
        dim: padded numbers of a factor vector.

    Returns:
        Pairs of a tile, registers and spilled bytes of a thread, shared memory in KiB, columns of
        tensor memory, and how many instructions of tensor cores the code holds and of any kind.
    """
    tiles: TileConfig | None = TileConfig.of(sizes, precision)
    while tiles is not None:
        report = _compiled(arch, precision, tiles, mode, top_k, dim)
        fits = report["shared_kib"] <= SHARED_KB[arch]
        if fits and report["tensor_memory_columns"] <= TENSOR_MEMORY_COLUMNS:
            return report
        tiles = tiles.leaner
    raise RuntimeError(f"no tile of {sizes} fits sm_{arch} in {precision}")


def _compiled(
    arch: int, precision: str, tiles: TileConfig, mode: str, top_k: int, dim: int
) -> dict[str, Any]:
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    constants = tiles.options(True, dim, 1 if mode == "scores" else top_k)
    warps = constants.pop("num_warps")
    constants |= {
        "PRECISION": "tf32" if precision == "tf32" else "tf32x3",
        "OF_CANDIDATES": mode == "candidates",
        "KEEP_SCORES": mode == "scores",
    }
    used = {"top_k": _POSITIONS[1:], "candidates": _POSITIONS[:1], "scores": ()}[mode]
    types = dict.fromkeys((*used, "keys"), "*i64") | dict.fromkeys(_SIZES, "i32")
    types["weights"] = "*bf16" if kind is torch.bfloat16 else "*fp32"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in rank_pairs.arg_names
    }
    # What the launcher finds out of its arguments: memory is aligned, columns come in tiles.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(rank_pairs.arg_names)
        if signature[name].startswith("*") or name == "columns_per_split"
    }
    begun = time.perf_counter()
    kernel = compile(
        ASTSource(rank_pairs, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps},
    )
    took = time.perf_counter() - begun
    ptx = kernel.asm["ptx"]
    registers, spilled, instructions = _resources(arch, ptx)
    return {
        "seconds": round(took, 1),
        "pairs": tiles.pairs,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_kib": round(kernel.metadata.shared / 1024, 1),
        "tensor_memory_columns": getattr(kernel.metadata, "tmem_size", None) or 0,
        "tensor_core_instructions": sum(
            ptx.count(name) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
        ),
        "instructions": instructions,
        "compiled_again_for_another": [
            parameter.name
            for parameter in rank_pairs.params
            if parameter.name in _SIZES and not parameter.do_not_specialize
        ],
    }


def _resources(arch: int, ptx: str) -> tuple[int, int, int]:
    """Registers of a thread, bytes of its stack that hold what did not fit, and instructions."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        output = subprocess.run(
            [tool, "-v", f"--gpu-name={target[1]}", source, "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        code = subprocess.run(
            [tools / "cuobjdump", "-sass", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    instructions = len(re.findall(r"/\*[0-9a-f]{4,}\*/ +[^ ]", code))
    registers, stack = re.search(r"Used (\d+) reg", output), re.search(r"(\d+) bytes stack", output)
    assert registers is not None and stack is not None
    return int(registers[1]), int(stack[1]), instructions


def main(argv: list[str] | None = None) -> None:
    """Compiles what the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arch", nargs="?", choices=[f"sm_{arch}" for arch in SHARED_KB])
    parser.add_argument("precision", nargs="?", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("layers", nargs="?", help="hidden layers, such as 30-20-10, or none")
    parser.add_argument("--mode", choices=["top_k", "scores", "candidates"], default="top_k")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--dim", type=int, default=16, help="numbers of a factor vector")
    parser.add_argument("--many", action="store_true", help="read lines of arguments")
    options = parser.parse_args(argv)
    if options.many:
        for line in sys.stdin:
            main(shlex.split(line))
        return
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")
    if options.layers is None:
        parser.error("name an architecture, a precision and layers; sm_90 fp32 30-20-10")
    found = compiled(
        int(options.arch.removeprefix("sm_")),
        options.precision,
        [int(units) for units in options.layers.split("-") if options.layers != "none"],
        options.mode,
        options.top_k,
        options.dim,
    )
    print(json.dumps({"kernel": vars(options)} | found), flush=True)


if __name__ == "__main__":
    main()
