"""The cost of reading next to that of a training step: 30-20-10, 8,192 rows a step, one process.

Batches of the generated notebook world, with 4 fresh negatives for each positive and the item's
genres gathered, are read alone; the same step is trained alone, on batches made before; and both
together, as training does it: on one core, and with the next batch made on a core to spare. Once
with the rows in memory, once streamed from disk.

    python benchmarks/reading.py
    python benchmarks/reading.py --files DIR    # in the AI Stages layout
"""

import argparse
import itertools
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from synthetic import PRESETS, write

from deepfm_dist.build import shard_for_training
from deepfm_dist.config import Config, config_from
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.pipeline import TrainPipeline
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World

WARM_STEPS, MADE_BEFORE = 30, 40


def settings(files: Path, folder: Path) -> dict[str, object]:
    """The configuration: the notebook's model on the notebook's shape."""
    return {
        "run": {"name": "reading", "prepared_root": str(folder)},
        "data": {
            "root": str(files),
            "interactions": {
                "file": "train_ratings.csv",
                "user": "user",
                "item": "item",
                "time": "time",
            },
            "features": [
                {"name": "user", "entity": "user"},
                {"name": "item", "entity": "item"},
                {"name": "genre", "entity": "item", "file": "genres.tsv"},
            ],
            "split": {"method": "per_user", "valid": 0.01, "test": 0},
        },
        "model": {"embedding_dim": 10, "over_arch_layer_sizes": [30, 20, 10]},
        "trainer": {"batch_size": 8192},
    }


def rows_per_s(batches: Iterator[Batch], steps: int, train: TrainPipeline | None) -> float:
    """Rows a second over some steps, after some that do not count."""
    rows = 0
    begun = 0.0
    for step in range(WARM_STEPS + steps):
        if step == WARM_STEPS:
            begun = time.perf_counter()
        if train is None:
            rows = len(next(batches).labels)
        else:
            train.train_step(batches)
    return (rows or 8192) * steps / (time.perf_counter() - begun)


def run(files: Path, folder: Path, steps: int) -> dict[str, int]:
    """All measurements."""
    config = config_from(settings(files, folder))
    prepare(config.data, config.data_root, config.prepared_dir, config.run.seed)
    figures = {}
    with process_group("cpu", config.run.timeout_s, config.run.threads) as world:
        dataset = PreparedDataset(config.prepared_dir)
        for prefix, memory_bytes in (("", None), ("streamed_", 0)):
            source = PreparedDataset(config.prepared_dir, memory_bytes)
            batches = TrainingBatches(source, config.trainer.batch_size, 0, 1, config.run.seed)
            stream = batches.steps(1, 10**9)
            figures[f"{prefix}reading_rows_per_s"] = rows_per_s(stream, steps, None)
            if not prefix:
                made = itertools.cycle([batches.batch(s) for s in range(1, MADE_BEFORE + 1)])
                train = trainer(config, dataset, world)
                figures["training_rows_per_s"] = rows_per_s(made, steps, train)
            for figure, threads in (("both_rows_per_s", 0), ("both_ahead_rows_per_s", 1)):
                batches.threads = threads
                train = trainer(config, dataset, world)
                stream = batches.steps(1, 10**9)
                figures[f"{prefix}{figure}"] = rows_per_s(stream, steps, train)
    return {name: round(value) for name, value in figures.items()}


def trainer(config: Config, dataset: PreparedDataset, world: World) -> TrainPipeline:
    """A fresh model in a pipeline."""
    sharded, optimizer = shard_for_training(config, dataset.manifest, world)
    sharded.train()
    return TrainPipeline(sharded, optimizer, world)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=Path, help="input files (default: generated)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each measurement")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"numba {version('numba')}, pyarrow {version('pyarrow')}")
    print(f"command: {shlex.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as name:
        files = arguments.files
        if files is None:
            files = Path(name) / "files"
            write(PRESETS["notebook"], files)
        figures = run(files, Path(name) / "prepared", arguments.steps)
    alone = figures["training_rows_per_s"]
    for prefix in ("", "streamed_"):
        kind = "streamed: " if prefix else "in memory: "
        share = alone / figures[f"{prefix}reading_rows_per_s"]
        together = alone / figures[f"{prefix}both_rows_per_s"] - 1
        waits = alone / figures[f"{prefix}both_ahead_rows_per_s"] - 1
        print(f"{kind}reading takes {share:.1%} of a training step's time")
        print(f"{kind}on one core, where each empties the other's caches, {together:.1%}")
        print(f"{kind}made ahead on another core, it makes a step {waits:.1%} longer")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
