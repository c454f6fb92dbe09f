"""Turns input files into a prepared dataset.

A single process does so without torch, which takes longer to load than many datasets to prepare.
"""

from functools import partial
from pathlib import Path
from typing import Any

from deepfm_dist.config import Config
from deepfm_dist.data import encode
from deepfm_dist.data.crew import Crew
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.launcher import read_launch
from deepfm_dist.training.checks import warn_of_labels

_DAY_S = 24 * 3600.0
"""How long a rank waits for another that reads larger files; torchrun notices dead ones."""


def prepare(config: Config) -> Manifest:
    """Prepares the data on all ranks, or finds them up to date. All ranks.

    Returns:
        The dataset's manifest.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used, or runs need the dataset that is there.
        InUse: another process trains on the dataset that is there.
    """
    given = config.data, config.input_root, config.prepared_dir, config.data_seed
    replacing = partial(_before_replacing, config)
    if read_launch().world_size == 1:
        manifest = encode.prepare(*given, before_replacing=replacing)
        warn_of_labels(manifest)
        return manifest
    import torch

    from deepfm_dist.distributed.process_group import process_group

    with process_group("cpu", _DAY_S, config.run.threads) as world:

        def total(array: Any) -> Any:
            return world.sum(torch.from_numpy(array.copy())).numpy()

        crew = Crew(world.rank, world.world_size, world.all_gather_object, total)
        manifest = encode.prepare(*given, crew, replacing)
        if world.is_first:
            warn_of_labels(manifest)
        return manifest


def prepare_locked(config: Config) -> Manifest:
    """Prepares the data in this process alone, which holds the run's lock. Rank 0.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used, or runs need the dataset that is there.
    """
    from deepfm_dist.runs.folder import before_replacing

    return encode.prepare(
        config.data,
        config.input_root,
        config.prepared_dir,
        config.data_seed,
        before_replacing=partial(before_replacing, config),
    )


def _before_replacing(config: Config, old: Manifest, new: Manifest) -> Path | None:
    from deepfm_dist.runs.folder import before_replacing, run_lock  # torch: slow to import

    with run_lock(config):
        return before_replacing(config, old, new)
