"""Some steps of training without the loop around them, for tests of what a step does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepfm_dist.build import shard_for_training, training_batches
from deepfm_dist.config import Config, load_config
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint, sharding
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.world import World

SMALL = ("model.over_arch_layer_sizes=[30, 20, 10]", "model.embedding_dim=10")
COPIES = ", ".join(f"{table}: {{kind: replicated}}" for table in ("user", "item", "genre"))
COPIES = f"sharding.tables={{{COPIES}}}"


def on_two_machines(work: Callable[..., Any], *args: Any) -> Any:
    """Calls ``work`` on one of four ranks, two of a machine, which may cut tables as on CUDA."""
    sharding._WITHIN_MACHINES = ("cpu",)
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}
    return work(*args)


def config_of(*overrides: str) -> Config:
    return load_config("sample", ["model.init_std=0.05", *overrides])


class Run:
    """A model being trained on one rank."""

    def __init__(self, folder: Path, config: Config, world: World) -> None:
        self.dataset = PreparedDataset(folder)
        self.config, self.process_group = config, world
        self.sharded, self.optimizer = shard_for_training(config, self.dataset.manifest, world)
        self.batches = training_batches(config, self.dataset, world)

    def losses(
        self, first: int, last: int, change: Callable[[Batch], Batch] = lambda b: b
    ) -> list[float]:
        parts = self.config.trainer.accumulate_steps
        pipeline = train_pipeline(
            self.sharded,
            self.optimizer,
            self.process_group,
            parts,
            self.config.optimizer,
        )
        stream = (p for b in self.batches.steps(first, last) for p in change(b).split(parts))
        losses = [pipeline.train_step(stream).loss for _ in range(first, last + 1)]
        pipeline.detach()
        return losses

    def save(self, run_dir: Path, step: int) -> None:
        checkpoints = checkpoint.Checkpoints(run_dir, self.process_group, keep_last=9)
        state = {
            "vocabulary_hash": self.dataset.manifest.vocabulary_hash,
            "config": self.config.model_dump(mode="json"),
            "trainer": {},
        }
        checkpoints.save(step, self.sharded, self.optimizer, state)
        checkpoints.wait()


def difference(a: list[float], b: list[float]) -> float:
    return float(np.abs(np.subtract(a, b)).max())
