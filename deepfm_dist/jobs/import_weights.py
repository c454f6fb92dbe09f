"""Imports a notebook's DeepFM as a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import fill_tables
from deepfm_dist.errors import CheckpointError
from deepfm_dist.interop.notebook import from_notebook, read_weights
from deepfm_dist.jobs.new_run import save_new_run
from deepfm_dist.jobs.prepare import prepare_locked
from deepfm_dist.runs.folder import run_lock
from deepfm_dist.runs.trained import open_dataset


@dataclass(frozen=True)
class Imported:
    """Imported weights.

    Attributes:
        checkpoint: the folder that holds them.
        n_tables: number of embedding tables.
    """

    checkpoint: Path
    n_tables: int


def import_weights(
    config: Config, file: Path, id_files: Mapping[str, Path], fields: str | None = None
) -> Imported | None:
    """Prepares the data if necessary, and saves a notebook's weights as a checkpoint. All ranks.

    Args:
        config: the configuration of the new run.
        file: state dict written by ``torch.save``.
        id_files: by field, a file of its ids in the notebook's order.
        fields: names in the notebook's order, comma-separated; None: as in ``data.features``.

    Returns:
        The checkpoint on rank 0; None elsewhere.

    Raises:
        CheckpointError: the file cannot be read, or the run has checkpoints already.
        ConfigError: the settings differ from the notebook's model.
        DataError: the data cannot be prepared, or its ids do not match the weights.
        InUse: another process writes the run.
    """
    weights = read_weights(file)
    with (
        process_group(*config.run.process_group) as world,
        world.hold_on_rank0(run_lock(config)),
    ):
        world.run_on_rank0("prepare", lambda: prepare_locked(config))
        dataset = open_dataset(config, world)
        values, state = from_notebook(config.model, dataset, weights, id_files, fields)
        if any((config.run_dir / "checkpoints").glob("step_*")):
            raise CheckpointError(
                f"{config.run_dir}: already has checkpoints; give the import another run.name"
            )
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        fill_tables(sharded, values)
        deepfm_of(sharded).interaction_arch.load_state_dict(state)
        path = save_new_run(config, dataset.manifest, world, sharded, optimizer)
        return Imported(path, len(values)) if world.is_first else None
