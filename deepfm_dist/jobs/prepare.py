"""Turns input files into a prepared dataset.

It does so without torch, which takes longer to load than many datasets to prepare.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from deepfm_dist.config import Config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation import local as encode
from deepfm_dist.data.preparation.dry_run import DryRun
from deepfm_dist.data.preparation.dry_run import dry_run as preparation_dry_run
from deepfm_dist.data.preparation.job import Job
from deepfm_dist.training.checks import warn_of_labels


def prepare(
    config: Config,
    threads: int | None = None,
    build: Callable[[Job, str], Manifest] | None = None,
) -> Manifest:
    """Prepares the data in this process, or finds them up to date.

    Args:
        config: what to prepare.
        threads: that share the work; default: as many as there are cores.
        build: does the work instead of threads; see `deepfm_dist.data.preparation.local.prepare`.

    Returns:
        The dataset's manifest.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used, or runs need the dataset that is there.
        InUse: another process trains on the dataset that is there.
    """
    given = config.data, config.input_root, config.prepared_dir, config.data_seed
    manifest = encode.prepare(*given, threads, partial(_before_replacing, config), build)
    warn_of_labels(manifest)
    return manifest


def dry_run(config: Config) -> DryRun:
    """What the configuration makes of the first rows; writes nothing.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used.
    """
    return preparation_dry_run(config.data, config.input_root, config.data_seed)


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
