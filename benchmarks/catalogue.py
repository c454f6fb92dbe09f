"""Top-K over the whole catalogue: pairs per second of the ways to do it, and the machine's limit.

    python benchmarks/catalogue.py --layers 30-20-10 --embedding-dim 10 --threads 1

Users, items and weights are random; seen items are masked, the best 10 kept. End to end begins with
the looked-up rows of users and items and ends with rankings in the host's memory. The naive way is
the model's forward pass over (user, item) rows, without a top-K; RecBole's is the full sort of its
evaluation, in the environment that benchmarks/rivals/build.sh makes. The limit is what the
machine's sgemm would need for the products that each pair takes. On a GPU the kernel runs in each
precision. The last line is a JSON object.
"""

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding
from torch import Tensor

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.ranking.catalogue import CatalogueScorer, Side
from deepfm_dist.ranking.engines.numba import NumbaEngine
from deepfm_dist.ranking.engines.torch import TorchEngine
from deepfm_dist.ranking.types import USER_BLOCK, Best, Engine

SEEN_PER_USER = 164
"""As in the AI Stages movie data: 5.2 M interactions of 31,360 users."""

RUN_S = 0.03
"""Seconds that one run of the kernel should take."""
FORWARD_ROWS = 8192
"""Rows of a forward pass; of 1,024 to 65,536 no other number is faster by a tenth."""
EXPECTED_FLOPS = 2e11
"""Of one core, roughly; it sets only the size of the runs."""


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


def recbole(options: argparse.Namespace, seen: int) -> float | None:
    """Pairs per second of RecBole's full sort; None where it is not installed."""
    python = options.rivals.absolute() / "bin" / "python"
    script = Path(__file__).parent.absolute() / "rivals" / "full_sort.py"
    if not python.exists():
        print(f"{options.rivals}: no environment; benchmarks/rivals/build.sh makes it")
        return None
    command = [str(python), str(script), "--layers", options.layers, "--seen", str(seen)]
    command += ["--dim", str(options.embedding_dim), "--items", str(options.items)]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        print(f"RecBole does not run: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["pairs_per_s"])


def synchronized() -> float:
    """Seconds, after the GPU has finished its work."""
    torch.cuda.synchronize()
    return time.perf_counter()


def engines_of(
    layers: Sequence[tuple[Tensor, Tensor]], device: torch.device, threads: int
) -> dict[str, Engine]:
    """The kernels of a device, by the names of their figures."""
    if device.type == "cpu":
        return {"pairs_per_s": NumbaEngine(layers, threads)}
    from deepfm_dist.ranking.engines.triton import TritonEngine

    return {
        "pairs_per_s": TritonEngine(layers, "fp32", device),
        "tf32_pairs_per_s": TritonEngine(layers, "tf32", device),
        "bf16_pairs_per_s": TritonEngine(layers, "bf16", device),
    }


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
    parser.add_argument("--rivals", type=Path, default=Path(".venv-rivals"), metavar="FOLDER")
    options = parser.parse_args()
    layers = [int(n) for n in options.layers.split("-") if int(n)]
    dim = options.embedding_dim
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{platform.machine()}, {binding.get_host_cpu_name()}, {options.threads} threads")
    if device.type == "cuda":
        print(torch.cuda.get_device_name())
    print(f"torch {torch.__version__}, numba {numba.__version__}, numpy {np.__version__}")
    print(shlex.join(["python", *sys.argv]))

    arch = InteractionArch(0, dim, over_arch=OverArch(3 * dim, layers)).eval().to(device)
    scorer = CatalogueScorer(arch, [False, True, True], 3)  # user, item, genre

    def rows(n: int) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.randn(n, 3, dim) * 0.3, torch.randn(n, 3), torch.empty(n, 0)
        return found[0].to(device), found[1].to(device), found[2].to(device)

    # A multiple of the blocks that the kernel packs, as the ranker's look-ups are.
    item_rows = rows(-(-options.items // 1024) * 1024)
    flops = flops_per_pair(layers, dim)
    expected = EXPECTED_FLOPS / flops
    n_users = options.users
    if device.type == "cpu":
        # Short runs, the best of many: on a machine that others use, a few of them go undisturbed.
        fit = int(RUN_S * options.threads * expected / options.items)
        n_users = min(n_users, max(64, fit))
    user_rows = [rows(USER_BLOCK) for _ in range(math.ceil(n_users / USER_BLOCK))]
    users = [scorer.side("user", *some) for some in user_rows]
    rng = np.random.default_rng(0)
    n_seen = min(SEEN_PER_USER, options.items // 2)
    picked = rng.integers(0, options.items, (len(users) * USER_BLOCK, n_seen), dtype=np.int32)
    offsets = np.arange(len(picked) + 1, dtype=np.int64) * n_seen

    def of_first(n: int) -> Jagged:
        return Jagged(offsets[: n + 1], picked[:n].ravel())

    assert scorer.layers is not None
    items = scorer.side("item", *item_rows)

    def packed(engine: Engine, side: Side, n: int) -> Any:
        found = engine.allocate(n, side)
        engine.fill(found, 0, side)
        return found

    def ranked(engine: Engine, n: int, n_items: int) -> Callable[[], None]:
        """Masked top-10 of n users, their preparation included."""
        of_items = packed(engine, items, n_items)

        def work() -> None:
            prepared = engine.users(users[: math.ceil(n / USER_BLOCK)])
            engine.update(prepared, of_items, 0, of_first(n), Best.none(n, 10, device))

        return work

    def from_rows(engine: Engine) -> None:
        sides = [scorer.side("user", *some) for some in user_rows]
        side = scorer.side("item", *item_rows)
        best = Best.none(n_users, 10, device)
        found = packed(engine, side, options.items)
        engine.update(engine.users(sides), found, 0, of_first(n_users), best)
        best.positions.cpu(), best.scores.cpu()

    engines = engines_of(scorer.layers, device, options.threads)
    start = time.perf_counter()
    for engine in engines.values():
        ranked(engine, 1, 1)()
    compile_s = time.perf_counter() - start
    # torch takes whole blocks of users; where layers are wide, fewer items keep a run short.
    some = min(options.items, max(1024, int(RUN_S * expected / USER_BLOCK)))
    factors, first, dense = rows(FORWARD_ROWS)
    pairs = torch.cat([factors, first[:, :, None]], 2)
    a, b = torch.randn(1024, 1024, device=device), torch.randn(1024, 1024, device=device)
    n_pairs = n_users * options.items
    work_of: dict[str, tuple[Callable[[], object], float]] = {
        name: (ranked(engine, n_users, options.items), n_pairs) for name, engine in engines.items()
    }
    work_of |= {
        "end_to_end_" + name: (partial(from_rows, engine), n_pairs)
        for name, engine in engines.items()
    }
    work_of |= {
        "torch_pairs_per_s": (ranked(TorchEngine(scorer), USER_BLOCK, some), USER_BLOCK * some),
        "naive_pairs_per_s": (torch.inference_mode()(lambda: arch(pairs, dense)), FORWARD_ROWS),
        "limit_pairs_per_s": (lambda: torch.mm(a, b), 2 * 1024**3 / flops),
    }
    # One thread's processor time is close to its time on an idle machine.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if device.type == "cuda":
        clock = synchronized
    best = best_seconds({k: work for k, (work, _) in work_of.items()}, options.seconds, clock)
    figures = {name: n / best[name] for name, (_, n) in work_of.items()}
    if (of_recbole := recbole(options, n_seen)) is not None:
        figures["recbole_pairs_per_s"] = of_recbole
    limit = figures["limit_pairs_per_s"]
    for name, value in figures.items():
        print(f"{name:28} {value / 1e6:10.3f} M   {value / limit:6.1%} of the limit")
    print(f"by {clock.__name__}, the best runs of {options.seconds:g} s")
    print(f"sgemm {limit * flops / 1e9:.1f} GFLOP/s; {flops:,} FLOP a pair")
    print(f"compiling or loading the kernel: {compile_s:.2f} s, not counted")
    if device.type == "cuda":
        print(f"{n_pairs:,} pairs: {json.dumps({k: best[k] for k in work_of})} s")
    print(json.dumps({k: round(v) for k, v in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
