"""What to run first on a GPU: the claims about CUDA, checked within ten minutes.

    python benchmarks/first_light.py
    python benchmarks/first_light.py --only kernel_is_right,catalogue_speed
    python benchmarks/first_light.py --device cpu          # a rehearsal of this script, on a CPU

From the root of a checkout, with requirements/dev.txt installed. The checks run in an order that
proves most first, each in its own process with a time limit, so that a failure stops no other. Each
prints what was found next to what is expected; the last line is JSON, with everything. Exit code 1
if a check failed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_S = 600
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam")


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        run: finds out, on a device; raises where the claim does not hold.
        limit_s: seconds after which it is given up.
        expected: what should be found.
        gpus: how many it needs.
    """

    run: Callable[[str], Any]
    limit_s: int
    expected: str
    gpus: int = 1


CHECKS: dict[str, Check] = {}


def check(
    limit_s: int, expected: str, gpus: int = 1
) -> Callable[[Callable[[str], Any]], Callable[[str], Any]]:
    """Adds a function to `CHECKS`, under its name."""

    def add(run: Callable[[str], Any]) -> Callable[[str], Any]:
        CHECKS[run.__name__] = Check(run, limit_s, expected, gpus)
        return run

    return add


@check(60, "doctor finds no problem; pinned copies at least 20 GB/s on PCIe 4 or 5")
def machine(device: str) -> dict[str, Any]:
    """The installation, and how fast the GPU is reached."""
    import torch

    from deepfm_dist.doctor import examine

    report = examine(device)
    problems = [problem["what"] for problem in report["problems"] if problem["fatal"]]
    assert problems == [], problems
    found: dict[str, Any] = {"devices": report["devices"], "torch": torch.__version__}
    if device == "cuda":
        source = torch.empty(1 << 28, dtype=torch.uint8)
        target = torch.empty_like(source, device=device)
        for name, memory in (("pageable", source), ("pinned", source.pin_memory())):
            ms = milliseconds(lambda memory=memory: target.copy_(memory, non_blocking=True), device)
            found[f"{name}_gb_per_s"] = round(source.numel() / ms / 1e6, 1)
        one = torch.zeros((), device=device)
        found["read_back_us"] = round(1e3 * milliseconds(one.item, device), 1)
    return found


@check(90, "every parameter and buffer on the device")
def placement(device: str) -> int:
    """The placement of a sharded model at one rank."""
    from deepfm_dist.build import shard_for_training
    from deepfm_dist.data.dataset import PreparedDataset
    from deepfm_dist.distributed.process_group import process_group

    folder, config = sample("model.batch_norm=true")
    with process_group(device) as world:
        sharded, _ = shard_for_training(config, PreparedDataset(folder).manifest, world)
        tensors = [*sharded.named_parameters(), *sharded.named_buffers()]
        elsewhere = [name for name, tensor in tensors if tensor.device.type != device]
    assert elsewhere == [], elsewhere
    return len(tensors)


@check(150, "losses of 20 steps differ from the CPU's by at most 1e-4, with each optimizer")
def losses_equal_the_cpus(device: str) -> dict[str, float]:
    """Training against the path that the test suite proves."""
    apart = {}
    for name in OPTIMIZERS:
        setting = f"optimizer.tables.name={name}"
        here, there = losses("cpu", 20, setting), losses(device, 20, setting)
        apart[name] = difference(here, there)
    assert max(apart.values()) <= 1e-4, apart
    return apart


@check(150, "errors at most 1e-5 in fp32, 5e-3 in tf32, 2e-2 in bf16; top K as by a full sort")
def kernel_is_right(device: str) -> dict[str, float]:
    """The catalogue kernel against float64."""
    import torch

    from deepfm_dist.ranking.engines.triton import TritonEngine
    from tests.kernel_cases import Case, Ranking, error_of

    most = {"fp32": 1e-5, "tf32": 5e-3, "bf16": 2e-2}
    worst: dict[str, float] = dict.fromkeys(most, 0.0)
    large: list[list[int]] = [[], [30], [3, 17, 1, 8], [400, 400, 400], [300, 200, 100, 50]]
    n_users, n_items = (70, 3000) if device == "cuda" else (3, 40)
    for sizes in ([30, 20, 10], *(large if device == "cuda" else [])):
        for precision in most:
            case = Case.of(n_users, n_items, 20, sizes, seed=7)
            engine = TritonEngine(case.layers, precision, torch.device(device))
            ranking = Ranking(case.to(device), n_users, n_items, engine)
            error = float(error_of(ranking.scores(), case.expected(n_users, n_items)))
            worst[precision] = max(worst[precision], error)
            assert error <= most[precision], (sizes, precision, error)
            ranking.check(min(10, n_items))
    return worst


@check(
    150,
    "213 million pairs on an H200: 30-20-10 in 35 to 60 ms in fp32, 8 to 30 ms in bf16; "
    "400-400-400 in 210 to 400 ms in bf16 (counted from the compiled code)",
)
def catalogue_speed(device: str) -> dict[str, float]:
    """Milliseconds of 31,360 users past 6,807 items, K = 10."""
    import numpy as np
    import torch

    from deepfm_dist.data.jagged import Jagged
    from deepfm_dist.model.pairs import Side
    from deepfm_dist.ranking.engines.triton import TritonEngine
    from deepfm_dist.ranking.types import Best
    from tests.kernel_cases import Case

    n_users, n_items = (31_360, 6_807) if device == "cuda" else (8, 130)
    found = {}
    for sizes, precision in (
        ([30, 20, 10], "fp32"),
        ([30, 20, 10], "bf16"),
        ([400, 400, 400], "bf16"),
        ([400, 400, 400], "tf32"),
    ):
        if device == "cpu" and len(found) == 1:
            break
        case = Case.of(8, n_items, 10, sizes, seed=1).to(device)
        repeats = n_users // 8
        users = Side(*(t[:8].repeat(repeats, *[1] * (t.dim() - 1)) for t in case.users.tensors))
        engine = TritonEngine(case.layers, precision, torch.device(device))  # type: ignore[arg-type]
        items = engine.allocate(n_items, case.items)
        engine.fill(items, 0, case.items)
        prepared = engine.users([users])
        offsets = np.arange(n_users + 1, dtype=np.int64) * 4
        seen = Jagged(offsets, np.tile(np.arange(4, dtype=np.int32), n_users))

        def rank(engine: Any, prepared: Any, items: Any, seen: Any) -> None:
            best = Best.none(n_users, 10, torch.device(device))
            engine.update(prepared, items, 0, seen, best)

        name = f"{'-'.join(map(str, sizes))} {precision}"
        work = partial(rank, engine, prepared, items, seen)
        found[name] = round(milliseconds(work, device, times=5), 1)
    return found


@check(90, "none")
def synchronisations_of_a_step(device: str) -> dict[str, int]:
    """Where the host waits for the GPU, by line."""
    import warnings

    import torch

    from deepfm_dist.distributed.pipeline import train_pipeline
    from deepfm_dist.distributed.process_group import process_group
    from tests.steps import Run

    lines: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        lines["/".join(Path(filename).parts[-2:]) + f":{lineno}"] += 1

    folder, config = sample()
    with process_group(device) as world:
        run = Run(folder, config, world)
        pipeline = train_pipeline(run.sharded, run.optimizer, world)
        stream = iter(run.batches.steps(1, 9))
        for _ in range(5):
            pipeline.train_step(stream)
        if device == "cuda":
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                torch.cuda.set_sync_debug_mode("warn")
                pipeline.train_step(stream)
                torch.cuda.set_sync_debug_mode("default")
        pipeline.detach()
    assert not lines, dict(lines.most_common())
    return {}


@check(180, "two runs equal bit for bit, and a resumed one")
def deterministic_resume(device: str) -> str:
    """What run.deterministic promises."""
    from tests.distributed.checkpoints import resumed, trained_through
    from tests.ranks import run_alone
    from tests.steps import SMALL, config_of

    folder, _ = sample()
    tables = "optimizer.tables={name: rowwise_adagrad, lr: 0.003}"
    config = config_of(*SMALL, tables, "run.deterministic=true")
    home = Path(tempfile.mkdtemp())
    first, again = (
        run_alone(trained_through, folder, config, home / name, device, spawn=True)
        for name in ("first", "again")
    )
    assert first == again, "the second run differs"
    on = run_alone(resumed, folder, config, home / "first", device, spawn=True)
    assert on == first[20:], "the resumed run differs"
    return "equal"


@check(120, "losses within 1e-4 of those with tables on the GPU")
def cached_tables(device: str) -> dict[str, float]:
    """Tables in the machine's memory, part of whose rows the GPU holds."""
    cached = "sharding.tables={user: {cached: 0.1}, item: {cached: 0.5}}"
    if device == "cpu":
        return {}  # refused there
    apart = {}
    for name in ("rowwise_adagrad", "lazy_adam"):
        tables = f"optimizer.tables={{name: {name}, lr: 0.003}}"
        apart[name] = difference(losses(device, 20, tables), losses(device, 20, tables, cached))
    assert max(apart.values()) <= 1e-4, apart
    return apart


@check(90, "no GPU memory on top of a table of 2 GiB; a second copy at the pinned rate")
def checkpoint_memory(device: str) -> dict[str, float]:
    """What the copy for a checkpoint takes."""
    import torch

    from deepfm_dist.distributed.checkpoint import Staging
    from deepfm_dist.distributed.optimizers import table_optimizer
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.distributed.settings import OptimizerConfig, ShardingConfig
    from deepfm_dist.distributed.sharding import shard
    from deepfm_dist.model.deepfm import Table, build_deepfm

    rows = 1 << 25 if device == "cuda" else 1 << 12
    meta = torch.device("meta")
    with process_group(device) as world:
        tables = table_optimizer(OptimizerConfig(), world.device)
        model = build_deepfm({"user": Table(rows, ("user",))}, ["user"], 0, 15, device=meta)
        tables.attach(model.embedding_arch.ebc.parameters())
        sharded, _ = shard(model, world, ShardingConfig(), tables)
        staging, state = Staging(world.device), sharded.state_dict()
        took, before = [], 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):
            begun = time.perf_counter()
            staging.copy({"model": state})
            took.append(round(time.perf_counter() - begun, 3))
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    extra = max(0, peak - before) / 2**30
    assert extra < 0.1, f"{extra:.2f} GiB"
    gib = rows * 16 * 4 / 2**30
    return {"table_gib": gib, "extra_gpu_gib": extra, "first_s": took[0], "second_s": took[1]}


@check(240, "65,536 rows a step, 30-20-10, on an H200: goal 30 M rows/s, GPU busy at least 60 %")
def training_speed(device: str) -> dict[str, Any]:
    """Rows a second, and the share of the time in which the GPU works."""
    import training

    found: dict[str, Any] = {}
    for size in (65_536, 8_192) if device == "cuda" else (64,):
        with training.our_steps(*speed_run(device, size), device) as step:
            steps = 200 if device == "cuda" else 3
            found[f"{size}"] = training.step_figures(step, size, device, steps)
    return found


@check(180, "two GPUs give the losses of one within 1e-5", gpus=2)
def two_ranks_give_the_losses_of_one(device: str) -> dict[str, float]:
    """NCCL, and the same model at another world size."""
    import first_light  # this file, under a name that other processes find it by

    from tests.ranks import run_ranks
    from tests.steps import COPIES

    [alone] = run_ranks(first_light.losses, 1, device, 20, spawn=True)
    found = {}
    plans = {kind: f"sharding.kind={kind}" for kind in ("table_wise", "row_wise")}
    for kind, plan in (plans | {"replicated": COPIES}).items():
        both = run_ranks(first_light.losses, 2, device, 20, plan, spawn=True)
        found[kind] = difference(alone, both[0])
    assert max(found.values()) <= 1e-5, found
    return found


@check(180, "65,536 rows on each of two GPUs: goal 1.8 times the rows/s of one", gpus=2)
def scaling(device: str) -> dict[str, float]:
    """Rows a second of one rank and of two, each with as many rows in a step."""
    import first_light

    from tests.ranks import run_ranks

    speed_run(device, 1)  # makes the data, once for all ranks
    found = {f"{n}": run_ranks(first_light.speed, n, device, n, spawn=True)[0] for n in (1, 2)}
    return found | {"times": round(found["2"] / found["1"], 2)}


def speed(device: str, ranks: int) -> float:
    """Rows a second of all ranks."""
    import training

    size, steps = (ranks * 65_536, 200) if device == "cuda" else (ranks * 64, 3)
    with training.our_steps(*speed_run(device, size), device) as step:
        return round(1e3 * size / milliseconds(step, device, steps))


def speed_run(device: str, rows: int) -> tuple[Any, Path]:
    """Settings of 30-20-10 with some rows a step, and the data: on CPU those of the sample."""
    import training

    from deepfm_dist.config import load_config

    file = "sample"
    if device == "cuda":
        file = str(training.prepare(Path(os.environ["FIRST_LIGHT_HOME"]) / "speed"))
    overrides = [f"trainer.batch_size={rows}", "model.over_arch_layer_sizes=[30,20,10]"]
    config = load_config(file, overrides)
    return config, config.prepared_dir if device == "cuda" else sample()[0]


def milliseconds(work: Callable[[], Any], device: str, times: int = 20) -> float:
    """Milliseconds of a call, after three to warm up."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3 if device == "cuda" else 1):
        work()
    wait()
    begun = time.perf_counter()
    for _ in range(times if device == "cuda" else 1):
        work()
    wait()
    return 1e3 * (time.perf_counter() - begun) / (times if device == "cuda" else 1)


def sample(*overrides: str) -> tuple[Path, Any]:
    """The bundled sample, prepared, and its configuration."""
    from deepfm_dist.config import load_config
    from deepfm_dist.data.preparation.local import prepare

    config = load_config("sample", list(overrides))
    folder = Path(os.environ["FIRST_LIGHT_HOME"]) / "sample"
    prepare(config.data, config.data_root, folder, config.run.seed)
    return folder, config


def losses(device: str, steps: int, *overrides: str) -> list[float]:
    """Losses of the first steps on the sample."""
    from deepfm_dist.distributed.process_group import process_group
    from tests.steps import Run

    folder, config = sample(*overrides)
    with process_group(device) as world:
        return Run(folder, config, world).losses(1, steps)


def difference(a: list[float], b: list[float]) -> float:
    """The largest difference."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Runs the checks, or as one of their processes a single one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", help=f"names of checks: {', '.join(CHECKS)}")
    parser.add_argument("--as-one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.as_one:
        print(json.dumps(_outcome(options.as_one, options.device)))
        return 0
    names = options.only.split(",") if options.only else [*CHECKS]
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"unknown check {unknown[0]}; available: {', '.join(CHECKS)}")
    gpus, report = _gpus() if options.device == "cuda" else 2, {}
    if gpus == 0:
        parser.error("torch sees no GPU; --device cpu rehearses the checks")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        for name in names:
            left_s = TOTAL_S - (time.monotonic() - begun)
            if CHECKS[name].gpus > gpus:
                outcome: dict[str, Any] = {"skipped": f"{gpus} GPUs"}
            elif left_s < 10:
                outcome = {"skipped": f"{TOTAL_S} seconds are over"}
            else:
                limit_s = min(CHECKS[name].limit_s, left_s)
                print(f"{name}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
                outcome = _run(name, options.device, limit_s, home)
            report[name] = outcome | {"expected": CHECKS[name].expected}
            kind = next(iter(outcome))
            print(f"{kind:<8}{name}: {outcome[kind]}\n        expected: {CHECKS[name].expected}")
            sys.stdout.flush()
    print(json.dumps({"device": options.device, "checks": report}))
    return int(any("failed" in outcome for outcome in report.values()))


def _gpus() -> int:
    """How many there are, without using one in this process."""
    program = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return int(done.stdout or 0)


def _run(name: str, device: str, limit_s: float, home: str) -> dict[str, Any]:
    """Runs a check in its own process: its result or failure, and its seconds."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "FIRST_LIGHT_HOME": home,
    }
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__)), "--as-one", name, "--device", device]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=limit_s,
            capture_output=True,
            text=True,
        )
        lines = done.stdout.strip().splitlines()
        outcome: dict[str, Any] = (
            json.loads(lines[-1])
            if done.returncode == 0 and lines
            else {"failed": f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"}
        )
    except subprocess.TimeoutExpired:
        outcome = {"failed": f"not done in {limit_s:.0f} seconds"}
    return outcome | {"seconds": round(time.monotonic() - begun, 1)}


def _outcome(name: str, device: str) -> dict[str, Any]:
    try:
        return {"found": CHECKS[name].run(device)}
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        frames = itertools.islice(reversed(traceback.extract_tb(error.__traceback__)), 3)
        where = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
        return {"failed": f"{text[-600:]} ({where})"}


if __name__ == "__main__":
    sys.exit(main())
