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

RUN_S = 0.03
"""Seconds that one run of the kernel should take."""
FORWARD_ROWS = 8192
"""Rows of a forward pass; of 1,024 to 65,536 no other number is faster by a tenth."""
EXPECTED_FLOPS = 2e11
"""Of a core; it sets the size of the runs only."""


def best_seconds(
    ways: dict[str, Callable[[], object]], budget_s: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Each one's best run, by turns: what else the machine does then hits all of them alike."""
    best = dict.fromkeys(ways, math.inf)
    for work in ways.values():
        work()
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        for name, work in ways.items():
            start = clock()
            work()
            best[name] = min(best[name], clock() - start)
    return best


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
    parser.add_argument("--seconds", type=float, default=20.0, help="spent in all, about")
    options = parser.parse_args()
    layers = [int(n) for n in options.layers.split("-") if int(n)]
    dim = options.embedding_dim
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
    flops = flops_per_pair(layers, dim)
    expected = EXPECTED_FLOPS / flops
    # Short runs, the best of many: on a machine that others use, a few of them go undisturbed.
    fit = int(RUN_S * options.threads * expected / options.items)
    n_users = min(options.users, max(64, fit))
    users = [scorer.side("user", *rows(256)) for _ in range(math.ceil(n_users / 256))]
    rng = np.random.default_rng(0)
    n_seen = min(SEEN_PER_USER, options.items // 2)
    picked = rng.integers(0, options.items, (len(users) * 256, n_seen), dtype=np.int32)
    offsets = np.arange(len(picked) + 1, dtype=np.int64) * n_seen

    def of_first(n: int) -> Jagged:
        return Jagged(offsets[: n + 1], picked[:n].ravel())

    assert scorer.layers is not None

    def best_of(n: int) -> Best:
        return Best.none(n, 10, torch.device("cpu"))

    def ranked(engine: Engine, n: int, n_items: int) -> Callable[[], None]:
        """Masked top-10 of n users, their preparation included."""
        packed = engine.allocate(n_items, items)
        engine.fill(packed, 0, items)

        def work() -> None:
            prepared = engine.users(users[: math.ceil(n / 256)])
            engine.update(prepared, packed, 0, of_first(n), best_of(n))

        return work

    start = time.perf_counter()
    compiled = KernelEngine(scorer.layers, options.threads)
    compiled.update(
        compiled.users(users[:1]), compiled.allocate(1, items), 0, of_first(1), best_of(1)
    )
    compile_s = time.perf_counter() - start
    # torch takes whole blocks of users; where layers are wide, fewer items keep a run short.
    some = min(options.items, max(1024, int(RUN_S * expected / 256)))
    pairs = rows(FORWARD_ROWS)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    work_of = {
        "pairs_per_s": (ranked(compiled, n_users, options.items), n_users * options.items),
        "torch_pairs_per_s": (ranked(TorchEngine(scorer), 256, some), 256 * some),
        "naive_pairs_per_s": (torch.inference_mode()(lambda: arch(*pairs)), FORWARD_ROWS),
        "limit_pairs_per_s": (lambda: torch.mm(a, b), 2 * 1024**3 / flops),
    }
    # One thread's processor time is its time on a machine of its own, near enough.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    best = best_seconds({k: work for k, (work, _) in work_of.items()}, options.seconds, clock)
    figures = {name: n / best[name] for name, (_, n) in work_of.items()}
    limit = figures["limit_pairs_per_s"]
    for name, value in figures.items():
        print(f"{name:20} {value / 1e6:10.3f} M   {value / limit:6.1%} of the limit")
    print(f"by {clock.__name__}, the best runs of {options.seconds:g} s")
    print(f"sgemm {limit * flops / 1e9:.1f} GFLOP/s; {flops:,} FLOP a pair")
    print(f"compiling or loading the kernel: {compile_s:.2f} s, not counted")
    print(json.dumps({k: round(v) for k, v in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
