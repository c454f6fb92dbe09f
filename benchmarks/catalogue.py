"""Top-K over the whole catalogue: pairs per second of the ways to do it, and the machine's limit.

    python benchmarks/catalogue.py --layers 30-20-10 --embedding-dim 10 --threads 1

Users, items and weights are random; seen items are masked, the best 10 kept. The naive way is the
model's forward pass over (user, item) rows, without a top-K. The limit is what the machine's
sgemm would need for the products that each pair takes. The last line is a JSON object.
"""

import argparse
import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.ranking import kernel
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engine import Best, Engine, KernelEngine, TorchEngine

SEEN_PER_USER = 164
"""As in the AI Stages movie data: 5.2 M interactions of 31,360 users."""


def seconds(work: Callable[[], object], budget_s: float) -> float:
    """The best of as many runs as fit into a budget, at least two after a first."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < budget_s:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def sgemm_flops(sizes: list[tuple[int, int, int]], budget_s: float) -> float:
    """The most floating point operations per second of torch's sgemm over some shapes."""
    found = 0.0
    for m, k, n in sizes:
        a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        took = seconds(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), budget_s / len(sizes))
        found = max(found, 2 * m * k * n / took)
    return found


def flops_per_pair(layers: list[int], dim: int) -> int:
    """Products and sums of the hidden layers above the first, the output and the pairwise part."""
    deep = sum(a * b for a, b in itertools.pairwise(layers)) + layers[-1] if layers else 0
    return 2 * (deep + dim)


def main() -> int:
    """Measures, prints a table and a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layers", default="30-20-10", help="hidden layers, or 0 for none")
    parser.add_argument("--embedding-dim", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--users", type=int, default=31_360)
    parser.add_argument("--items", type=int, default=6_807)
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each way, about")
    options = parser.parse_args()
    layers = [int(n) for n in options.layers.split("-") if int(n)]
    dim, budget_s = options.embedding_dim, options.seconds
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {kernel.binding.get_host_cpu_name()}, {options.threads} threads")
    print(f"torch {torch.__version__}, numba {numba.__version__}, numpy {np.__version__}")
    print(shlex.join(["python", *sys.argv]))

    arch = InteractionArch(0, dim, over_arch=OverArch(3 * dim, layers)).eval()
    scorer = CatalogueScorer(arch, [False, True, True], 3)  # user, item, genre

    def rows(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(n, 3, dim) * 0.3, torch.randn(n, 3), torch.empty(n, 0)

    # A multiple of the blocks that the kernel packs, as the ranker's look-ups are.
    height = -(-options.items // 1024) * 1024
    items = scorer.side("item", *rows(height))
    limit = sgemm_flops([(4096, 512, 512), (2048, 2048, 2048)], budget_s)
    limit_pairs = limit / flops_per_pair(layers, dim)

    # Wide layers: fewer users than asked for, so that a run takes about half the budget.
    fit = int(budget_s / 2 * limit_pairs / options.items)
    n_users = min(options.users, max(256, fit))
    users = [scorer.side("user", *rows(256)) for _ in range(math.ceil(n_users / 256))]
    rng = np.random.default_rng(0)
    n_seen = min(SEEN_PER_USER, options.items // 2)
    picked = rng.integers(0, options.items, (n_users, n_seen), dtype=np.int32)
    offsets = np.arange(n_users + 1, dtype=np.int64) * n_seen

    def of_first(n: int) -> Jagged:
        return Jagged(offsets[: n + 1], picked[:n].ravel())

    assert scorer.layers is not None

    def best_of(n: int) -> Best:
        return Best.none(n, 10, torch.device("cpu"))

    def ranked_per_s(engine: Engine, n: int, n_items: int) -> float:
        """Pairs per second of the masked top-10 of n users, their preparation included."""
        packed = engine.allocate(n_items, items)
        engine.fill(packed, 0, items)

        def work() -> None:
            prepared = engine.users(users[: math.ceil(n / 256)])
            engine.update(prepared, packed, 0, of_first(n), best_of(n))

        return n * n_items / seconds(work, budget_s)

    start = time.perf_counter()
    compiled = KernelEngine(scorer.layers, options.threads)
    compiled.update(
        compiled.users(users[:1]), compiled.allocate(1, items), 0, of_first(1), best_of(1)
    )
    compile_s = time.perf_counter() - start
    # torch takes whole blocks of users; where layers are wide, fewer items keep a run short.
    some = min(options.items, max(1024, int(budget_s / 4 * limit_pairs / 256)))
    figures = {
        "pairs_per_s": ranked_per_s(compiled, n_users, options.items),
        "torch_pairs_per_s": ranked_per_s(TorchEngine(scorer), min(256, n_users), some),
    }
    height = 65_536 if sum(layers) < 300 else 8_192
    pairs = rows(height)
    with torch.inference_mode():
        figures["naive_pairs_per_s"] = height / seconds(lambda: arch(*pairs), budget_s)
    figures["limit_pairs_per_s"] = limit_pairs
    for name, value in figures.items():
        print(f"{name:20} {value / 1e6:10.3f} M   {value / limit_pairs:6.1%} of the limit")
    print(f"sgemm {limit / 1e9:.1f} GFLOP/s; {flops_per_pair(layers, dim):,} FLOP a pair")
    print(f"compiling or loading the kernel: {compile_s:.2f} s, not counted")
    print(json.dumps({k: round(v) for k, v in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
