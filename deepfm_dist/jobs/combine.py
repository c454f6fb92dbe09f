"""Combines trained FMs and the closed-form ranker EASE in one wider FM."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deepfm_dist.config import Config, config_from, with_settings
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.interop.combine import ease_tables
from deepfm_dist.jobs.new_run import save_new_run
from deepfm_dist.jobs.widen import add_model, empty_model, put_ease, shard_to_widen
from deepfm_dist.runs.folder import run_lock
from deepfm_dist.runs.trained import RunOnDisk, find_run

_ELSEWHERE = "name a folder that can be written: --to /FOLDER/NAME"


@dataclass(frozen=True)
class EaseColumns:
    """EASE as further columns of the factors.

    Attributes:
        weight: the weight of its scores next to the models' logits.
        columns: number of columns.
        l2: L2 regularisation.
        field_weight: each value of an item's field counts as this many users with all of its items.
    """

    weight: float
    columns: int = 256
    l2: float = 500.0
    field_weight: float = 0.0


@dataclass(frozen=True)
class Combined:
    """The combined run.

    Attributes:
        config: its settings.
        checkpoint: the folder of its weights.
    """

    config: Config
    checkpoint: Path


@dataclass(frozen=True)
class _Source:
    """A run to combine, and the settings that it was trained with."""

    run: RunOnDisk
    config: Config


def combine(
    config: Config,
    run_names: Sequence[str],
    new_name: str,
    ease: EaseColumns | None = None,
    overrides: Sequence[str] = (),
) -> Combined | None:
    """Makes a run whose logits are the mean of others', plus EASE's weighted scores. All ranks.

    Args:
        config: the settings.
        run_names: names of the runs to combine.
        new_name: name of the new run; or its folder, as ``./NAME``, ``/FOLDER/NAME`` or a URL.
        ease: EASE's part, or None.
        overrides: the overrides of the command line.

    Returns:
        The new run on rank 0; None elsewhere.

    Raises:
        CheckpointError: a run has no checkpoint or a different vocabulary, or the new one exists.
        ConfigError: the models cannot be combined.
        InUse: another process writes the new run.
    """
    sources = _sources(config, run_names, overrides)
    dataset, like = sources[0].run.dataset, sources[0].config
    width = sum(source.config.model.embedding_dim for source in sources)
    width += 0 if ease is None else ease.columns
    target = like.with_run_name_on_same_data(like.run.name).with_columns(width)
    # Steps after a training loop would replace the combined weights.
    loop = {"model.linear": "none", "trainer.refit_best": False}
    target = with_settings(target, loop | _place(new_name), f"--to {new_name}")
    with (
        process_group(*config.run.process_group) as world,
        world.hold_on_rank0(run_lock(target, "choose another --to", _ELSEWHERE)),
    ):
        if checkpoint.complete_steps(target.run_dir):
            raise CheckpointError(f"{target.run_dir}: has checkpoints already; choose another --to")
        sharded, optimizer = empty_model(target, dataset.manifest, world)
        column = 0
        for source in sources:
            model, _ = shard_to_widen(source.config, source.run.dataset.manifest, world)
            checkpoint.load(source.run.checkpoint, world, model)
            column = add_model(model, sharded, column, 1 / len(sources))
        if ease is not None:
            fit = partial(
                ease_tables, dataset, ease.columns, ease.l2, ease.weight, ease.field_weight
            )
            put_ease(sharded, world, column, fit)
        step = max(source.run.state["step"] for source in sources)
        path = save_new_run(target, dataset.manifest, world, sharded, optimizer, step)
        return Combined(target, path) if world.is_first else None


def _place(new_run: str) -> dict[str, str]:
    """The settings for ``--to``: a name, or also a folder."""
    if not new_run.startswith(("/", "./", "../")) and "://" not in new_run:
        return {"run.name": new_run}
    root, _, name = new_run.rstrip("/").rpartition("/")
    return {"run.name": name, "run.runs_root": root or "/"}


def _sources(config: Config, names: Sequence[str], overrides: Sequence[str]) -> list[_Source]:
    """Finds runs by name.

    Raises:
        CheckpointError: a run has no checkpoint, or their vocabularies differ.
        ConfigError: their models cannot be combined.
    """
    sources = []
    for name in names:
        run = find_run(config.with_run_name(name), overrides)
        trained = config_from(run.state["config"], origin=str(run.checkpoint))
        where = {"run": run.config.run, "data": run.config.data}
        sources.append(_Source(run, trained.model_copy(update=where)))
    first = sources[0]
    vocabulary = first.run.dataset.manifest.vocabulary_hash
    for source in sources:
        if source.run.state["vocabulary_hash"] != vocabulary:
            raise CheckpointError(
                f"{source.run.checkpoint}: of vocabulary {source.run.state['vocabulary_hash']}, "
                f"not {vocabulary} as {first.run.checkpoint}; combined models share one: train "
                f"them with the same data.seed"
            )
        _check_can_be_widened(source.config, first.config)
    return sources


def _check_can_be_widened(config: Config, like: Config) -> None:
    """Refuses a model that cannot be appended as columns to another one's factors.

    Raises:
        ConfigError: the model has a deep part or no pairwise one, or its fields or their settings
            differ from those of ``like``.
    """
    model = config.model
    if model.deep or not model.fm:
        raise ConfigError(
            f"combine: {config.run.name} has model.deep={model.deep}, model.fm={model.fm}: more "
            f"columns are for a pairwise part alone, a deep part would read them too; train with "
            f"model.deep=false"
        )
    for name in ("first_order", "fm_pairs"):
        ours, others = getattr(model, name), getattr(like.model, name)
        if ours != others:
            raise ConfigError(
                f"combine: {config.run.name} has model.{name}={ours}, {like.run.name} {others}; "
                f"train both with the same"
            )
    for name in ("features", "history"):
        if getattr(config.data, name) != getattr(like.data, name):
            raise ConfigError(
                f"combine: {config.run.name} and {like.run.name} have other data.{name}; train "
                f"both with the same"
            )
