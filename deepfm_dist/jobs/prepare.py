"""Turns input files into a prepared dataset.

It does not import torch, which takes longer than preparing many datasets.
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
from deepfm_dist.data.remote import copy_path, local_copy
from deepfm_dist.storage import delete_tree, folder_of, is_remote
from deepfm_dist.training.checks import warn_of_labels


def prepare(
    config: Config,
    threads: int | None = None,
    build: Callable[[Job, str], Manifest] | None = None,
    destination: Path | None = None,
) -> Manifest:
    """Prepares the data in this process, or finds them up to date.

    Args:
        config: what to prepare.
        threads: number of threads; default: one per core.
        build: replaces threads; see `deepfm_dist.data.preparation.local.prepare`.
        destination: where the dataset goes, if not below ``run.prepared_root``.

    Returns:
        The dataset's manifest.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used, or runs need the existing dataset.
        InUse: another process trains on the existing dataset, or writes it.
    """
    manifest = _prepare(config, partial(_before_replacing, config), threads, build, destination)
    warn_of_labels(manifest)
    return manifest


def dry_run(config: Config) -> DryRun:
    """Previews the first rows; writes nothing into the dataset's folder.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used.
    """
    given = config.data, config.input_root, config.data_seed
    return preparation_dry_run(*given, earlier=_earlier(config))


def prepare_locked(config: Config) -> Manifest:
    """Prepares the data while this process holds the run's lock. Rank 0.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used, or runs need the existing dataset.
        InUse: another process writes the dataset.
    """
    from deepfm_dist.runs.folder import before_replacing

    return _prepare(config, partial(before_replacing, config))


def _prepare(
    config: Config,
    before_replacing: encode.BeforeReplacing,
    threads: int | None = None,
    build: Callable[[Job, str], Manifest] | None = None,
    destination: Path | None = None,
) -> Manifest:
    folder, cache = config.prepared_dir, config.run.cache_root
    if destination is None and is_remote(folder):
        copy = copy_path(folder, cache)
        if Manifest.is_given(folder):
            local_copy(folder, cache)
        elif Manifest.is_given(copy):  # an earlier dataset's
            delete_tree(copy)
        folder, destination = copy, folder
    return encode.prepare(
        config.data,
        config.input_root,
        folder,
        config.data_seed,
        threads=threads,
        # A copy can be downloaded again.
        before_replacing=before_replacing if destination is None else lambda old, new: None,
        build=build,
        earlier=_earlier(config),
        destination=destination,
    )


def _earlier(config: Config) -> Path | None:
    """Local folder of the dataset ``data.vocabulary_from``."""
    if config.data.vocabulary_from is None:
        return None
    return local_copy(folder_of(config.data.vocabulary_from), config.run.cache_root)


def _before_replacing(config: Config, old: Manifest | None, new: Manifest) -> Path | None:
    from deepfm_dist.runs.folder import before_replacing, run_lock  # torch: slow to import

    with run_lock(config):
        return before_replacing(config, old, new)
