"""Saves computed weights as a new run."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.config import Config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.checkpoint import Checkpoints, checkpoint_path, make_state
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.storage import write_errors_to_user
from deepfm_dist.training.state import LoopState


def save_new_run(
    config: Config,
    manifest: Manifest,
    world: World,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    step: int = 0,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Saves a model as the only checkpoint of a run; training can resume from it. All ranks.

    Args:
        config: the configuration of the run.
        manifest: the manifest of its data.
        world: the ranks.
        sharded: the model.
        optimizer: the optimizer in its initial state.
        step: the step of the checkpoint.
        more: entries that replace those of a new run in the checkpoint's marker.

    Returns:
        The checkpoint's folder.

    Raises:
        DeepFMError: the run's folder cannot be written.
    """
    make_state(optimizer)
    marker = {
        **manifest.marks,
        "config": config.model_dump(mode="json"),
        "trainer": asdict(LoopState(step=step)),
        **more,
    }
    checkpoints = Checkpoints(config.run_dir, world, config.checkpoint.keep_last)
    checkpoints.save(step, sharded, optimizer, marker)
    checkpoints.close()
    if world.is_first:
        with write_errors_to_user(config.run_dir):
            (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return checkpoint_path(config.run_dir, step)
