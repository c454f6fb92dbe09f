"""Runs that are saved and resumed."""

from pathlib import Path

import numpy as np

from deepfm_dist.config import Config
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from tests.steps import Run


def saved_tables(
    folder: Path, config: Config, run_dir: Path
) -> list[tuple[str, slice, np.ndarray]]:
    """Trains three steps and saves; this rank's pieces of the tables."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, 3)
        run.save(run_dir, 3)
        return [(t, rows, piece.numpy().copy()) for t, rows, _, piece in local_shards(run.sharded)]


def trained_through(
    folder: Path, config: Config, run_dir: Path, device: str = "cpu"
) -> list[float]:
    """Forty steps; the checkpoints of steps 10 and 20 are written while training goes on."""
    with process_group(device, deterministic=config.run.deterministic) as world:
        run = Run(folder, config, world)
        checkpoints = checkpoint.Checkpoints(run_dir, world, keep_last=2)
        losses: list[float] = []
        for step in (10, 20):
            losses += run.losses(step - 9, step)
            state = {"config": {"data": {}, "model": {}}, "vocabulary_hash": "", "trainer": {}}
            checkpoints.save(step, run.sharded, run.optimizer, state)
        losses += run.losses(21, 40)
        checkpoints.wait()
        return losses


def resumed(folder: Path, config: Config, run_dir: Path, device: str = "cpu") -> list[float]:
    with process_group(device, deterministic=config.run.deterministic) as world:
        run = Run(folder, config, world)
        checkpoint.load(checkpoint.find_checkpoint(run_dir), world, run.sharded, run.optimizer)
        return run.losses(21, 40)
