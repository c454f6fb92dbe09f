"""Opens trained runs from their folders."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deepfm_dist.build import shard_for_inference, weight_transfer
from deepfm_dist.config import Config, config_from
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.compatibility import check_match, check_start
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import hash_of, is_input
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.data.remote import local_copy
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.sharding import (
    DistributedModelParallel,
    fill_marked_rows,
    mark_rows,
)
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.lock import Lock
from deepfm_dist.section import DEFAULTS
from deepfm_dist.storage import (
    folder_of,
    is_remote,
    option_of,
    path_or_url,
    storage_errors_to_user,
)
from deepfm_dist.training.activity import fit_to_activity
from deepfm_dist.typed_yaml import settings_of, value_at

log = logging.getLogger(__name__)
DATA_LOCATION = ("data.root", "data.name")
_TRAINED_SECTIONS = ("data", "model")  # sections whose settings come from the checkpoint
_COMMAND_SETTINGS = (*DATA_LOCATION, "data.memory_bytes", "data.on_device", "data.files")
"""Data settings that a command may change: where files are, and how they are read."""


@dataclass(frozen=True)
class RunOnDisk:
    """A trained run on disk.

    Attributes:
        config: the effective settings: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        checkpoint: the latest complete one.
        state: contents of its marker.
    """

    config: Config
    dataset: PreparedDataset
    checkpoint: Path
    state: dict[str, Any]

    @property
    def identity(self) -> dict[str, int | str | None]:
        """Identifies the checkpoint, even among those of the same step, and its data.

        The data is included because an export holds values of users and items, which may change in
        the dataset.
        """
        return {
            "step": self.state["step"],
            "checkpoint": checkpoint.digest_of(self.state),
            **self.dataset.manifest.hashes,
        }


@dataclass(frozen=True)
class LoadedModel:
    """A run's model, ready for inference.

    Attributes:
        config: the effective settings: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        sharded: the task, in eval mode.
        checkpoint: where the weights were read from.
        step: optimizer steps taken by then.
        settings: the run's own, of every section.
    """

    config: Config
    dataset: PreparedDataset
    sharded: DistributedModelParallel
    checkpoint: Path
    step: int
    settings: Mapping[str, Any]

    def negative_rate(self, world: World) -> NegativeRate | None:
        """The correction of pairs' log-odds; see `negative_rate`. All ranks."""

        def score(batch: Batch) -> Tensor:
            logits: Tensor = self.sharded(batch)[1]
            return logits

        return negative_rate(self.dataset, self.settings, score, world)

    def output(self, name: str, about: Collection[str], given: str | None) -> Path:
        """The parquet file that a command writes; a CSV of the same name may go with it.

        By default it is ``NAME.parquet`` in the run's folder. Settings that differ from the run's
        own are added to the name (``NAME-k20-users.parquet``), so that a partial result does not
        overwrite the full one.

        Args:
            name: the name of the default file.
            about: settings, by dotted name, that affect the result.
            given: the value of ``--output``.

        Raises:
            ConfigError: as `parquet_output`.
        """
        if given is not None:
            return parquet_output(given, self.config)
        asked, parts = self.config.model_dump(mode="json"), [name]
        for section, _, option in (setting.partition(".") for setting in about):
            value = asked[section][option]
            if value != self.settings.get(section, {}).get(option):
                parts.append(option + _in_a_name(value))
        return self.config.output_dir / f"{'-'.join(parts)}.parquet"


def parquet_output(given: str, config: Config, *sources: str) -> Path:
    """The file that ``--output`` names.

    Args:
        given: its value.
        config: the configuration of the run, whose input files must not be overwritten.
        sources: other files that the command reads.

    Raises:
        ConfigError: it is not a parquet file, or is one of the inputs.
    """
    path = Path(option_of("--output", given))
    if not path.name or path.is_dir():
        raise ConfigError(
            f"--output {given}: a folder; name a parquet file, such as {path / 'scores.parquet'}"
        )
    if path.suffix != ".parquet":
        better = path.with_suffix(".parquet")
        raise ConfigError(f"--output {given}: results are parquet; use --output {better}")
    is_source = any(path.exists() and path.samefile(s) for s in sources if "://" not in s)
    if is_source or is_input(path, config.data, config.input_root):
        raise ConfigError(f"--output {given}: an input of this run; choose another file")
    return path


def parts_output(given: str) -> Path:
    """The folder that ``--output-parts`` names, on a disk or behind a URL.

    Raises:
        ConfigError: it cannot be opened, or has no name.
    """
    folder = folder_of(option_of("--output-parts", given, path_or_url).rstrip("/") or "/")
    if not folder.name:
        raise ConfigError(f"--output-parts {given}: name a folder, such as {folder / 'scores'}")
    return folder


def output_lock(target: Path, in_parts: bool) -> Lock:
    """The lock to hold while writing a result."""
    option = "--output-parts" if in_parts else "--output"
    elsewhere = f"give {option} a writable place"
    return Lock(target, str(target), f"choose another {option}", elsewhere)


def open_trained(
    config: Config,
    overrides: Sequence[str],
    world: World,
    same_rows: bool = False,
    finished: Collection[str] = (checkpoint.REFIT, checkpoint.SELECTED),
) -> LoadedModel:
    """Loads a run's checkpoint. All ranks.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: the overrides of the command line.
        world: the ranks.
        same_rows: see `find_run`.
        finished: see `find_run`.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    run = find_run(config, overrides, same_rows, finished, world)
    check_same_dataset(run.dataset, world)
    sharded = shard_for_inference(run.config, run.dataset.manifest, world)
    checkpoint.load(run.checkpoint, world, sharded)
    log.info("loaded %s, step %s", run.checkpoint, f"{run.state['step']:,}")
    return LoadedModel(
        run.config,
        run.dataset,
        sharded,
        run.checkpoint,
        run.state["step"],
        settings_in(run.state),
    )


def open_weights(
    run_dir: Path, onto: RunOnDisk, world: World, finished: Collection[str]
) -> LoadedModel:
    """Loads a run's weights for the dataset of another one, which extends its own. All ranks.

    Ids that the run does not know get the weights of its unknown id, as if it had scored them. In
    users' histories they are ignored.

    Args:
        run_dir: folder of the run with the weights.
        onto: the other run.
        world: the ranks.
        finished: see `find_run`.

    Raises:
        CheckpointError: there is no complete checkpoint, or the dataset does not extend its own.
    """
    saved = checkpoint.read_checkpoint(run_dir, "auto", finished)
    path, state = saved.path, saved.state
    settings, manifest = settings_in(state), onto.dataset.manifest
    trained = config_from(state["config"], origin=str(path)).data
    check_start(str(path), state, trained, manifest)
    merged = onto.config.model_dump(mode="json") | {"model": settings["model"]}
    config = config_from(merged, origin=str(path))
    sharded = shard_for_inference(config, manifest, world)
    mark_rows(sharded)
    transfer = weight_transfer(trained, manifest, config.model)
    reused = onto.dataset.reused_rows(state["vocabulary_hash"])
    checkpoint.load(path, world, sharded, transfer=transfer, fresh_rows=reused)
    histories = {f.table_name for f in manifest.categorical if f.history is not None}
    fill_marked_rows(sharded, world, histories)
    log.info("loaded %s, step %s", path, f"{state['step']:,}")
    return LoadedModel(config, onto.dataset, sharded, path, step=state["step"], settings=settings)


def find_run(
    config: Config,
    overrides: Sequence[str],
    same_rows: bool = False,
    finished: Collection[str] = (checkpoint.REFIT, checkpoint.SELECTED),
    world: World | None = None,
) -> RunOnDisk:
    """Finds a run's latest checkpoint and its dataset.

    The settings of data and model come from the checkpoint, except where files are, how they are
    laid out and how much memory they may take.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: the overrides of the command line.
        same_rows: whether to refuse a dataset whose rows differ from those trained on; otherwise
            only warn.
        finished: which parts of a finished run may be used.
        world: the ranks, if all of them call this.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged or of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    with storage_errors_to_user(config.run_dir):
        saved = checkpoint.read_checkpoint(config.run_dir, config.checkpoint.use, finished)
    path, state = saved.path, saved.state
    trained_with = settings_in(state)
    asked_for = state.get("trained_config", trained_with)  # without the closed form's columns
    merged = config.model_dump(mode="json")
    for name in (name for override in overrides for name in settings_of(override, Config)):
        if name.partition(".")[0] in _TRAINED_SECTIONS and not name.startswith(_COMMAND_SETTINGS):
            wanted, trained = value_at(merged, name), value_at(asked_for, name)
            if wanted != trained:
                raise ConfigError(
                    f"{name}={wanted}: {path} was trained with {trained}; train with the new "
                    f"value first, or leave the override out"
                )
    kept = {name: value_at(merged, name) for name in _COMMAND_SETTINGS}
    with storage_errors_to_user(config.prepared_dir):
        is_prepared = config.prepared_dir.is_dir()
    if kept["data.name"] is None and not is_prepared:  # as of a combined run
        kept["data.name"] = trained_with["data"]["name"]
    merged |= {section: trained_with[section] for section in _TRAINED_SECTIONS}
    merged["data"] |= {name.removeprefix("data."): value for name, value in kept.items()}
    config = config_from(merged, origin=str(path))
    dataset = _dataset(config, world)
    check_match(path, state, config.data, dataset.folder, dataset.manifest, same_rows)
    return RunOnDisk(config, dataset, path, state)


def open_dataset(config: Config, world: World) -> PreparedDataset:
    """The prepared dataset, once it is known to be the same on all ranks. All ranks.

    Raises:
        DataError: the run has no dataset, or another machine's differs.
    """
    dataset = _dataset(config, world)
    check_same_dataset(dataset, world)
    return dataset


def _dataset(config: Config, world: World | None) -> PreparedDataset:
    """The prepared dataset, or its copy on this machine. All ranks, if there is a ``world``."""
    fetch = partial(local_copy, config.prepared_dir, config.run.cache_root)
    if is_remote(config.prepared_dir) and world is not None:  # machines may differ in speed
        world.run_on_each_machine(f"copy {config.prepared_dir}", fetch)
    return PreparedDataset(fetch(), config.data.memory_bytes)


def check_same_dataset(dataset: PreparedDataset, world: World) -> None:
    """Makes sure that all ranks have opened the same dataset. All ranks.

    Raises:
        DataError: the folder holds another one on another machine, or has been replaced meanwhile.
    """
    marks = world.all_gather_object(hash_of(dataset.manifest.model_dump(mode="json")))
    other = next((rank for rank, mark in enumerate(marks) if mark != marks[0]), None)
    if other is not None:
        raise DataError(
            f"{dataset.folder}: rank {other} finds another dataset there ({marks[other]}) than "
            f"rank 0 ({marks[0]}); set run.prepared_root to a folder that all machines share, or "
            f"copy rank 0's dataset to the others"
        )


def ranking_loss(settings: Mapping[str, Any]) -> str | None:
    """The loss if scores only rank a user's items; None: scores are log-odds."""
    loss = settings.get("trainer", {}).get("loss")
    return loss if loss in ("bpr", "softmax") else None


def negative_rate(
    dataset: PreparedDataset,
    settings: Mapping[str, Any],
    score: Callable[[Batch], Tensor],
    world: World,
) -> NegativeRate | None:
    """What a run's scores are corrected by to be pairs' log-odds. All ranks.

    Args:
        dataset: the dataset of the run, as it was in training.
        settings: the settings of the run.
        score: a batch's logits.
        world: the ranks.

    Returns:
        None: training drew no negatives, or scores are not log-odds.
    """
    if ranking_loss(settings) is not None:
        return None
    rate = NegativeRate.from_dataset(dataset)
    return rate and fit_to_activity(rate, dataset, score, world, settings["run"]["seed"])


def settings_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings; those that it was made without have their defaults.

    If one no longer exists, all are returned as they were saved.
    """
    saved: dict[str, Any] = state["config"]
    with suppress(ConfigError):
        saved = config_from(saved).model_dump(mode="json", context=DEFAULTS)
    return saved


def _in_a_name(value: Any) -> str:
    if isinstance(value, str) and value.isalpha():
        return f"-{value}"
    return str(value) if isinstance(value, int | float) else ""
