"""Training speed, including reading and negatives, next to plain PyTorch, TorchRec and rivals.

    benchmarks/rivals/build.sh
    python benchmarks/training.py --batch-size 8192 --layers 30-20-10 --threads 1
    python benchmarks/training.py --batch-size 65536 --device cuda --ranks 1,2,4,8 --only ours,steps

Data of the notebook's shape (31,360 users, 6,807 items, 5.15 million interactions, the items' first
genres) are generated once. Every contestant has factors of 10 and the same layers, no dropout.

- ours: ``python -m deepfm_dist.train``, or torchrun for several ranks, as its own log says;
- bare: stock TorchRec, steps over batches that are ready: no reading, no negatives;
- host: what a step of 8 rows costs the host: ours, ours in TorchRec's pipeline, and TorchRec's own;
- steps: windows of steps in one process, ours and TorchRec's pipeline on the same model: rows/s,
  host and device milliseconds of a step, and the share of the time in which the device works;
- plain: one embedding table, fused Adam, negatives and order drawn by numpy for an epoch at a time;
  ours and plain take turns, and medians are reported;
- rivals: each with its own loader, on rows whose negatives are drawn already.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from machine import cpu_model
from synthetic import NOTEBOOK, write
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from deepfm_dist.events import TrainEvent, read_events

HERE = Path(__file__).parent
DIM, NEGATIVES = 10, 4
FIELDS = ("user", "item", "genre")
RIVALS = ("recbole", "fuxictr", "torch-rechub", "deepctr-torch")
Rows = tuple[np.ndarray, np.ndarray]


class Fields(nn.Module):
    """Everything above the lookup: rows ``[B, F, W]`` of D factors and a weight -> logits."""

    def __init__(self, layers: list[int]) -> None:
        """Makes the layers."""
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        sizes = [len(FIELDS) * DIM, *layers]
        mlp: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            mlp += [nn.Linear(a, b), nn.ReLU(True)]
        self.mlp = nn.Sequential(*mlp, nn.Linear(sizes[-1], 1))

    def forward(self, rows: Tensor) -> Tensor:
        """Returns the logits."""
        factors = rows[:, :, :DIM]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        deep: Tensor = self.mlp(factors.flatten(1)).squeeze(1)
        return self.bias + rows[:, :, DIM].sum(1) + pairs + deep


class Data:
    """The prepared positives, and labelled rows of an epoch drawn from them."""

    def __init__(self, folder: Path) -> None:
        """Reads what `deepfm_dist.prepare` wrote."""
        train = pq.read_table(folder / "train")
        self.user, self.item = train["user"].to_numpy(), train["item"].to_numpy()
        genre = pq.read_table(folder / "entities/item.parquet")["genre"]
        self.genre = np.zeros(len(genre), np.int64)
        self.genre[np.asarray(pc.list_value_length(genre)) > 0] = pc.list_flatten(genre).to_numpy()
        tables = json.loads((folder / "manifest.json").read_text())["tables"]
        self.sizes = [tables[name]["rows"] for name in FIELDS]
        n_users, n_items, _ = self.sizes
        self.seen = np.zeros(n_users * n_items, bool)
        self.seen[self.user.astype(np.int64) * n_items + self.item] = True

    @property
    def rows_per_epoch(self) -> int:
        """Positives and negatives."""
        return len(self.user) * (1 + NEGATIVES)

    def epoch(self, rng: np.random.Generator) -> Rows:
        """Fields ``[n, 3]`` and labels ``[n]``, freshly drawn negatives, in a random order."""
        user = np.repeat(self.user, 1 + NEGATIVES).astype(np.int64)
        item = np.repeat(self.item, 1 + NEGATIVES).astype(np.int64)
        label = np.zeros(len(user), np.float32)
        label[:: 1 + NEGATIVES] = 1
        left = np.flatnonzero(label == 0)
        while len(left):
            item[left] = rng.integers(1, self.sizes[1], len(left))
            left = left[self.seen[user[left] * self.sizes[1] + item[left]]]
        order = rng.permutation(len(user))
        fields = np.stack([user, item, self.genre[item]], 1)[order]
        return fields, label[order]


def prepare(folder: Path) -> Path:
    """Generates and prepares the data once; returns the configuration."""
    config = folder / "training.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "run": {
            "name": "speed",
            "prepared_root": str(folder / "prepared"),
        },
        "data": {
            "root": str(folder / "data"),
            "interactions": {"file": "train_ratings.csv", "user": "user", "item": "item"},
            "features": [
                {"name": "user", "entity": "user"},
                {"name": "item", "entity": "item"},
                {"name": "genre", "entity": "item", "file": "genres.tsv", "keep": "first"},
            ],
            "split": {"valid": 0, "test": 0},
            "negatives": {"per_positive": NEGATIVES},
        },
        "model": {"embedding_dim": DIM},
        "trainer": {"epochs": 100, "loss": "bce"},
    }
    config.write_text(yaml.safe_dump(tree))
    if not (folder / "data" / "years.tsv").exists():
        write(NOTEBOOK, folder / "data")
    command = [sys.executable, "-m", "deepfm_dist.prepare", "--quiet", "--config", str(config)]
    subprocess.run(command, check=True)
    return config


def ours(config: Path, args: argparse.Namespace, ranks: int) -> float:
    """Median speed of the windows of the log after the first, rows/s."""
    with tempfile.TemporaryDirectory() as runs:  # a run of other settings is never overwritten
        return _trained(config, Path(runs), args, ranks)


def _trained(config: Path, runs: Path, args: argparse.Namespace, ranks: int) -> float:
    window = max(5, args.steps // 5)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [
        *launcher,
        *("-m", "deepfm_dist.train", "--quiet", "--config", str(config)),
        f"run.runs_root={runs}",
        f"trainer.batch_size={args.batch_size}",
        f"trainer.max_steps={6 * window}",
        f"trainer.log_every_steps={window}",
        f"model.over_arch_layer_sizes={args.layers}",
        f"run.device={args.device}",
        f"run.threads={args.threads}",
        # On CPU the others have no core to spare either.
        *(["trainer.reading_threads=0"] if args.device == "cpu" else []),
        *args.settings,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    events = read_events(runs / "speed/metrics.jsonl")
    speeds = [e.rows_per_s or 0.0 for e in events if isinstance(e, TrainEvent)]
    return statistics.median(speeds[1:])


def timed(step: Callable[[int], object], n: int) -> float:
    """Seconds of n calls, after a tenth of them to warm up."""
    for k in range(max(3, n // 10)):
        step(k)
    begun = time.perf_counter()
    for k in range(n):
        step(k)
    return time.perf_counter() - begun


def plain(data: Data, drawn: Rows, drawing_s: float, args: argparse.Namespace) -> float:
    """Rows/s of a loop over drawn rows, the drawing's share added."""
    torch.manual_seed(0)
    fields, labels = (torch.from_numpy(column) for column in drawn)
    offsets = torch.tensor([0, *data.sizes[:-1]]).cumsum(0)
    table = nn.Embedding(sum(data.sizes), DIM + 1)
    nn.init.normal_(table.weight, std=0.01)
    above = Fields(args.layers)
    parameters = [*table.parameters(), *above.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    size = args.batch_size
    n = min(args.steps, len(labels) // size)

    def step(k: int) -> None:
        rows = slice(k * size, (k + 1) * size)
        optimizer.zero_grad()
        logits = above(table(fields[rows] + offsets))
        F.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
        optimizer.step()

    seconds = timed(step, n)
    return n * size / (seconds + drawing_s * n * size / data.rows_per_epoch)


def against_plain(
    first: float, config: Path, data: Data, drawn: Rows, drawing_s: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Ours and plain PyTorch in turns: a machine that others use changes its speed in seconds.

    Args:
        first: rows/s of ours in the first round.
        config: the configuration of ours.
        data: the data.
        drawn: rows of an epoch.
        drawing_s: seconds that drawing them took.
        args: the command line.

    Returns:
        Medians of the rows/s of both, and each round's ratio.
    """
    speeds = [(first, plain(data, drawn, drawing_s, args))]
    for _ in range(args.rounds - 1):
        speeds.append((ours(config, args, 1), plain(data, drawn, drawing_s, args)))
    medians = [round(statistics.median(each)) for each in zip(*speeds, strict=True)]
    return {
        "rows_per_s": medians[0],
        "plain_rows_per_s": medians[1],
        "against_plain": sorted(round(a / b, 3) for a, b in speeds),
    }


@dataclass
class Ready(Pipelineable):
    """A batch for TorchRec's own parts."""

    sparse: KeyedJaggedTensor
    labels: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Ready":
        """The same on another device."""
        return Ready(
            self.sparse.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Ready":
        """The same in pinned memory."""
        return Ready(self.sparse.pin_memory(), self.labels.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory until ``stream`` has used it."""
        self.sparse.record_stream(stream)
        self.labels.record_stream(stream)


@contextmanager
def torchrec_parts(
    data: Data, drawn: Rows, size: int, args: argparse.Namespace
) -> Iterator[tuple[nn.Module, Any, list[Ready]]]:
    """TorchRec's own parts at one rank: a sharded model, its optimizer, and ready batches."""
    import torch.distributed as dist
    from torch.distributed.optim import _apply_optimizer_in_backward
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
    from torchrec.optim.optimizers import in_backward_optimizer_filter

    width = -(-(DIM + 1) // 4) * 4

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            tables = [
                EmbeddingBagConfig(
                    name=name, num_embeddings=n, embedding_dim=width, feature_names=[name]
                )
                for name, n in zip(FIELDS, data.sizes, strict=True)
            ]
            self.ebc = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
            self.above = Fields(args.layers)

        def forward(self, batch: Ready) -> Tensor:
            rows = KeyedTensor.regroup([self.ebc(batch.sparse)], [list(FIELDS)])[0]
            logits: Tensor = self.above(rows.view(-1, len(FIELDS), width))
            return logits

    device = torch.device(args.device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    model = Model()
    _apply_optimizer_in_backward(RowWiseAdagrad, model.ebc.parameters(), {"lr": 0.05})
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(
        model.ebc,
        {name: table_wise(rank=0, compute_kernel="fused") for name in FIELDS},
        sharder=sharder,
        local_size=1,
        world_size=1,
        device_type=args.device,
    )
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan({"ebc": plan}),
        sharders=[sharder],
    )
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    optimizer = CombinedOptimizer(
        [
            sharded.fused_optimizer,
            KeyedOptimizerWrapper(dense, lambda p: torch.optim.Adam(p, lr=1e-3)),
        ]
    )
    n = min(args.steps, len(drawn[1]) // size)
    lengths = torch.ones(len(FIELDS) * size, dtype=torch.int32)
    batches = []
    for k in range(n):
        fields, labels = (column[k * size : (k + 1) * size] for column in drawn)
        values = torch.from_numpy(np.ascontiguousarray(fields.T, np.int32).ravel())
        sparse = KeyedJaggedTensor(list(FIELDS), values, lengths=lengths)
        batches.append(Ready(sparse, torch.from_numpy(labels)))
    try:
        yield sharded, optimizer, batches
    finally:
        dist.destroy_process_group()


def bare(data: Data, drawn: Rows, args: argparse.Namespace) -> float:
    """Rows/s of TorchRec's own parts on ready batches, one rank."""
    with torchrec_parts(data, drawn, args.batch_size, args) as (sharded, optimizer, batches):
        batches = [batch.to(torch.device(args.device)) for batch in batches]

        def step(k: int) -> None:
            batch = batches[k]
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(sharded(batch), batch.labels).backward()
            optimizer.step()

        return len(batches) * args.batch_size / timed(step, len(batches))


class Operations(TorchDispatchMode):
    """Counts what is called on tensors, views aside."""

    def __init__(self) -> None:
        """Begins at 0."""
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts one in."""
        self.count += not (func.is_view or str(func).startswith(("profiler.", "prim.")))
        return func(*args, **(kwargs or {}))


def cost_of(step: Callable[[], object], steps: int = 200) -> dict[str, float]:
    """Host milliseconds of a step, the least over ten windows, and its operations."""
    for _ in range(10):
        step()
    with Operations() as operations:
        step()
    windows = []
    for _ in range(10):
        begun = time.process_time()
        for _ in range(steps // 10):
            step()
        windows.append(time.process_time() - begun)
    return {"host_ms": round(min(windows) / (steps // 10) * 1e3, 3), "operations": operations.count}


def host_costs(
    config: Path, data: Data, drawn: Rows, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """What a step of 8 rows costs the host at one rank: ours, and TorchRec's pipeline.

    Batches are ready, so that neither reading nor arithmetic counts.
    """
    size, costs = 8, {}
    settings, prepared = configured(config, args, size)
    for name, overlapped in (("ours", None), ("ours_in_torchrec_pipeline", True)):
        with our_steps(settings, prepared, args.device, 8, overlapped) as step:
            costs[name] = cost_of(step)
    with torchrec_steps(data, drawn, size, args) as step:
        costs["torchrec_pipeline"] = cost_of(step)
    return costs


def configured(config: Path, args: argparse.Namespace, size: int) -> tuple[Any, Path]:
    """Our settings with a batch size, and the prepared data."""
    from deepfm_dist.config import load_config

    overrides = [f"model.over_arch_layer_sizes={args.layers}", f"trainer.batch_size={size}"]
    settings = load_config(str(config), [*overrides, *args.settings])
    return settings, settings.prepared_dir


@contextmanager
def our_steps(
    settings: Any,
    prepared: Path,
    device: str,
    ready: int | None = None,
    overlapped: bool | None = None,
) -> Iterator[Callable[[], object]]:
    """Our training at one rank: what takes a step.

    Args:
        settings: the configuration.
        prepared: the prepared data.
        device: cpu or cuda.
        ready: batches that are made before, and come again and again; None: all are made while
            training, as in a run.
        overlapped: whether they pass TorchRec's pipeline; None: as in a run.
    """
    from deepfm_dist.build import shard_for_training, training_batches
    from deepfm_dist.data.dataset import PreparedDataset
    from deepfm_dist.distributed.pipeline import train_pipeline
    from deepfm_dist.distributed.process_group import process_group

    dataset = PreparedDataset(prepared)
    with process_group(device) as world:
        sharded, optimizer = shard_for_training(settings, dataset.manifest, world)
        sharded.train()
        batches = training_batches(settings, dataset, world)
        pipeline = train_pipeline(sharded, optimizer, world, overlapped=overlapped)
        if ready is None:
            stream: Iterator[Any] = batches.steps(1, sys.maxsize)
        else:
            stream = itertools.cycle(list(batches.steps(1, ready)))
        yield partial(pipeline.train_step, stream)
        pipeline.detach()


@contextmanager
def torchrec_steps(
    data: Data, drawn: Rows, size: int, args: argparse.Namespace
) -> Iterator[Callable[[], object]]:
    """TorchRec's own pipeline on the same model and ready batches: what takes a step."""
    from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

    with torchrec_parts(data, drawn, size, args) as (model, optimizer, batches):

        def forward(batch: Ready) -> tuple[Tensor, Tensor]:
            logits = model(batch)
            return F.binary_cross_entropy_with_logits(logits, batch.labels), logits

        device = torch.device(args.device)
        if device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        pipeline = TrainPipelineSparseDist(model, optimizer, device, custom_model_fwd=forward)
        yield partial(pipeline.progress, itertools.cycle(batches))


def step_figures(
    step: Callable[[], object], rows: int, device: str, steps: int, windows: int = 5
) -> dict[str, float]:
    """Speed of steps, and where their time goes.

    Args:
        step: takes one.
        rows: number of rows in a step.
        device: cpu or cuda.
        steps: number of steps in a window.
        windows: number of windows, whose median counts, after one to warm up.

    Returns:
        ``rows_per_s``; ``ms`` of a step; ``host_ms`` that the host needs to queue it, and
        ``device_ms`` that the device needs for it, neither waiting for the other; and ``busy``, the
        share of the time in which the device works. On a CPU the host is the device.
    """
    found = []
    for _ in range(1 + windows):
        begun, host_begun = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            step()
        host_s = time.thread_time() - host_begun
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - begun, host_s))
    took_s, host_s = (statistics.median(times) for times in zip(*found[1:], strict=True))
    ms = 1e3 * took_s / steps
    device_ms = host_ms = 1e3 * host_s / steps
    if device == "cuda":
        device_ms, host_ms = queued_ms(step)
    return {
        "rows_per_s": round(rows * steps / took_s),
        "ms": round(ms, 3),
        "host_ms": round(host_ms, 3),
        "device_ms": round(device_ms, 3),
        "busy": round(min(1.0, device_ms / ms), 3),
    }


def queued_ms(step: Callable[[], object], steps: int = 8, times: int = 5) -> tuple[float, float]:
    """Milliseconds of a step on the GPU, and on the host that queues it.

    The GPU sleeps while the host queues some steps, few enough for the queue; then it has them all.
    """
    on_device, on_host = [], []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        begin.record()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        on_host.append(1e3 * (time.perf_counter() - begun) / steps)
        end.record()
        torch.cuda.synchronize()
        on_device.append(begin.elapsed_time(end) / steps)
    return statistics.median(on_device), statistics.median(on_host)


def steps_compared(
    config: Path, data: Data, drawn: Rows, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """`step_figures` of our training, batches included, and of TorchRec's pipeline without them."""
    size, steps = args.batch_size, max(1, args.steps // 5)
    settings, prepared = configured(config, args, size)
    with our_steps(settings, prepared, args.device) as step:
        found = {"ours": step_figures(step, size, args.device, steps)}
    with torchrec_steps(data, drawn, size, args) as step:
        found["torchrec_pipeline"] = step_figures(step, size, args.device, steps)
    return found


def rival(name: str, python: Path, drawn: Rows, args: argparse.Namespace) -> float | None:
    """Rows/s of one rival in its own environment; None where it cannot run."""
    limit = min(args.rival_rows, len(drawn[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npz"
        columns = {name: drawn[0][:limit, k] for k, name in enumerate(FIELDS)}
        np.savez(path, **columns, label=drawn[1][:limit])
        command = [str(python), str(HERE / "rivals" / "train.py"), name, "--rows", str(path)]
        command += ["--limit", str(limit), "--batch-size", str(args.batch_size)]
        command += ["--layers", "-".join(map(str, args.layers)), "--threads", str(args.threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    found = re.search(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or found is None:
        print(f"{name}: does not run: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return float(json.loads(found[0])["rows_per_s"])


def table_share_of_bandwidth(rows_per_s: float) -> float:
    """Share of a GPU's copy bandwidth that reading and updating the tables' rows takes."""
    data = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(data)
    target.copy_(data)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        target.copy_(data)
    torch.cuda.synchronize()
    peak = 20 * 2 * data.numel() / (time.perf_counter() - begun)
    width = -(-(DIM + 1) // 4) * 4
    # Read in forward; read and written in backward, with the row's accumulator.
    return rows_per_s * len(FIELDS) * (3 * width * 4 + 2 * 4) / peak


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=8192, help="rows a step, of all ranks")
    parser.add_argument("--layers", default="30-20-10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", default="1", help="numbers of ranks for ours: 1,2,4")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of ours and plain PyTorch, if both run"
    )
    parser.add_argument("--steps", type=int, help="timed steps (default: about two million rows)")
    parser.add_argument("--rival-rows", type=int, help="rows that a rival's timed pass has")
    parser.add_argument("--rivals", type=Path, default=Path(".venv-rivals"), metavar="FOLDER")
    parser.add_argument("--only", help="ours, bare, plain, host, steps, rivals; several by commas")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "deepfm_dist_training"
    )
    parser.add_argument("settings", nargs="*", help="section.field=value for ours")
    args = parser.parse_intermixed_args()
    args.layers = [int(size) for size in args.layers.split("-")]
    large = sum(args.layers) > 200
    args.steps = args.steps or max(20, (150_000 if large else 2_000_000) // args.batch_size)
    args.rival_rows = args.rival_rows or (100_000 if large else 500_000)
    args.only = (args.only or "ours,bare,plain,host,steps,rivals").split(",")
    return args


def main() -> None:
    """Runs the contestants and prints the report; its last line is one JSON object."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    config = prepare(args.folder)
    print(f"machine: {cpu_model()}, {args.threads} thread(s)")
    if args.device == "cuda":
        print(f"GPU: {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    packages = ("torch", "torchrec", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    print(f"versions: python {platform.python_version()}, {versions}")
    print(f"command: {shlex.join(['python', *sys.argv])}", flush=True)
    report: dict[str, Any] = {}
    ours_alone = float("nan")
    if "ours" in args.only:
        for ranks in map(int, args.ranks.split(",")):
            speed = ours(config, args, ranks)
            report["rows_per_s" if ranks == 1 else f"rows_per_s_{ranks}_ranks"] = round(speed)
            print(f"ours, {ranks} rank(s): {speed:,.0f} rows/s", flush=True)
            ours_alone = speed if ranks == 1 else ours_alone
            if ranks > 1 and "rows_per_s" in report:
                report[f"speedup_{ranks}_ranks"] = round(speed / ours_alone, 3)
                print(f"  {speed / ours_alone:.2f} times one rank's")
            if args.device == "cuda":
                share = table_share_of_bandwidth(speed / ranks)
                report[f"table_share_of_bandwidth_{ranks}_ranks"] = share
                print(f"  tables: {share:.1%} of a GPU's copy bandwidth")
    if {"bare", "plain", "host", "steps", "rivals"} & set(args.only):
        data = Data(args.folder / "prepared" / "speed")
        begun = time.perf_counter()
        drawn = data.epoch(np.random.default_rng(1))
        drawing_s = time.perf_counter() - begun
    if "bare" in args.only:
        report["bare_rows_per_s"] = round(bare(data, drawn, args))
        print(f"bare TorchRec step: {report['bare_rows_per_s']:,} rows/s", flush=True)
    if "host" in args.only:
        report["host"] = host_costs(config, data, drawn, args)
        for name, cost in report["host"].items():
            print(f"host, 8 rows, {name}: {cost['host_ms']} ms, {cost['operations']} operations")
    if "steps" in args.only:
        report["steps"] = steps_compared(config, data, drawn, args)
        for name, figures in report["steps"].items():
            print(f"steps, {name}: {', '.join(f'{k} {v:,}' for k, v in figures.items())}")
    if "plain" in args.only and "rows_per_s" in report:
        report |= against_plain(ours_alone, config, data, drawn, drawing_s, args)
        ratios = report["against_plain"]
        print(
            f"ours and plain PyTorch in turns, medians of {len(ratios)}: "
            f"{report['rows_per_s']:,} and {report['plain_rows_per_s']:,} rows/s; ratio "
            f"{statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}",
            flush=True,
        )
    elif "plain" in args.only:
        report["plain_rows_per_s"] = round(plain(data, drawn, drawing_s, args))
        print(f"plain PyTorch: {report['plain_rows_per_s']:,} rows/s", flush=True)
    python = args.rivals.absolute() / "bin" / "python"
    if "rivals" in args.only and not python.exists():
        print(f"{args.rivals}: no environment; benchmarks/rivals/build.sh makes it")
    elif "rivals" in args.only:
        speeds = {name: rival(name, python, drawn, args) for name in RIVALS}
        for name, found in speeds.items():
            if found is not None:
                print(f"{name}: {found:,.0f} rows/s", flush=True)
        report["rivals"] = {k: v and round(v) for k, v in speeds.items()}
        report["rival_rows_per_s"] = round(max(v for v in speeds.values() if v is not None))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
