"""Decides where a run starts or resumes, and prepares its folder."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import weight_transfer
from deepfm_dist.config import Config, config_from
from deepfm_dist.data.compatibility import changed_settings, check_start, shared_fields
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.checkpoint import Saved
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.launcher import read_launch
from deepfm_dist.recipe import Choice, choices_in
from deepfm_dist.runs.folder import has_results, name_aside, set_aside, set_steps_aside
from deepfm_dist.runs.trained import DATA_LOCATION, settings_in
from deepfm_dist.section import AUTO
from deepfm_dist.storage import (
    folder_of,
    is_remote,
    write_errors_to_user,
)
from deepfm_dist.training.state import LoopState

log = logging.getLogger(__name__)
_STEP_SETTINGS = ("loss", "batch_size", "candidates", "targets_per_user", "accumulate_steps")
_INITIAL_SETTINGS = ("dropout", "init_std", "init_at_mean", "over_arch_init", "linear")
"""Model settings that do not change what trained weights mean."""
_LENGTH_SETTINGS = ("epochs", "max_steps", "log_every_steps", "reading_threads", "profile_steps")


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        saved: the checkpoint to read, or None.
        state: the state of the loop.
        continues: whether the checkpoint is this run's own.
        is_over: whether nothing is left to train.
        chosen: what was chosen from the data when the run started, if it resumes.
    """

    saved: Saved | None
    state: LoopState
    continues: bool = False
    is_over: bool = False
    chosen: tuple[Choice, ...] = ()


def inherited_settings(config: Config) -> tuple[dict[str, Any] | None, tuple[Choice, ...]]:
    """The settings that a run takes over from an earlier one; None if there is none. Rank 0.

    A run that resumes takes all of them. One that starts from another run's weights takes the
    model, the loss that this was chosen for, and the tables' optimizer. What a run that resumes had
    chosen from the data comes second.

    Call it before the data are prepared, which would replace those of the run in the folder.

    Raises:
        ConfigError: the run was trained with other settings, or is a part of another one.
        CheckpointError: the checkpoint that was asked for does not exist.
    """
    with write_errors_to_user(config.run_dir):
        _refuse_part(config.run_dir)
        own = _checkpoint_to_continue(config)
    if own is not None:
        return settings_in(own.state), choices_in(own.state)
    if config.checkpoint.start_from is None:
        return None, ()
    settings = settings_in(_other_run(config.checkpoint.start_from).state)
    tables = {"name": settings["optimizer"]["tables"]["name"]}
    optimizer = {} if config.checkpoint.start_weights_only else {"optimizer": {"tables": tables}}
    model = {name: settings["model"][name] for name in settings["model"] if name != "linear"}
    return {"model": model, "trainer": {"loss": settings["trainer"]["loss"]}, **optimizer}, ()


def _other_run(start_from: str) -> Saved:
    """The checkpoint that ``checkpoint.start_from`` names."""
    return checkpoint.read_checkpoint(folder_of(start_from), "auto", ())


def _refuse_part(run_dir: Path) -> None:
    """Refuses to train a folder that is part of another run.

    Raises:
        ConfigError: it is.
    """
    if checkpoint.complete_steps(run_dir) and "part" in checkpoint.read_checkpoint(run_dir).state:
        raise ConfigError(
            f"{run_dir}: part of the run {run_dir.parent} and not trained separately; train that "
            f"run, or another one from its weights: run.name=NAME "
            f"checkpoint.start_from={run_dir.parent}"
        )


def begin(config: Config, manifest: Manifest, last_step: int, is_complete: bool = True) -> Start:
    """Decides where a run starts; changes nothing. Rank 0.

    Args:
        config: the settings.
        manifest: the manifest of the data.
        last_step: the last step of the loop.
        is_complete: whether everything after the training loop is done, if the loop is over.

    Raises:
        CheckpointError: ``checkpoint.start_from`` has no checkpoint, or one of data that this run's
            data does not extend.
        ConfigError: ``checkpoint.start_from`` is a different model or this run itself; or the
            folder holds a run with other settings or data.
        DeepFMError: the run folder cannot be read.
    """
    elsewhere = config.checkpoint.start_from
    start = None if elsewhere is None else folder_of(elsewhere).resolve()
    if start is not None and config.run_dir.resolve() in (start, start.parent.parent):
        raise ConfigError(
            f"checkpoint.start_from={elsewhere}: this run's own folder; give the run another "
            f"run.name"
        )
    with write_errors_to_user(config.run_dir):
        own = _checkpoint_to_continue(config, manifest)
        if own is not None:
            return _resume(config, own, last_step, is_complete)
        if elsewhere is None:
            return Start(None, LoopState())
        other, state = _other_run(elsewhere), LoopState()
        _check_start(config, manifest, other)
        if not config.checkpoint.start_weights_only:
            state.earlier_steps = checkpoint.steps_in(other.state)
        log.info("%s: training starts from its weights", other.path)
        return Start(other, state)


def _resume(config: Config, own: Saved, last_step: int, is_complete: bool) -> Start:
    """Where a run resumes from its own checkpoint."""
    state = _loop_state(own)
    if state.step < last_step:
        state.resume(config.monitor)  # the reason it ended may no longer apply
    is_over = state.is_over(config.trainer.patience, last_step)
    if is_over and is_complete:
        log.warning("%s", _finished(config, own, state.step, last_step))
    elif is_over:
        log.info("%s: resuming after the training loop", own.path)
    else:
        log.info("%s: resuming training after step %s", own.path, f"{state.step:,}")
    return Start(own, state, continues=True, is_over=is_over, chosen=choices_in(own.state))


def _check_start(config: Config, manifest: Manifest, other: Saved) -> None:
    """Refuses a checkpoint whose weights would mean something different in this run's model."""
    state = other.state
    option = f"checkpoint.start_from={config.checkpoint.start_from}"
    saved = settings_in(state)
    loop = state.get("trained_config", saved)
    if loop["model"]["embedding_dim"] != saved["model"]["embedding_dim"]:
        raise ConfigError(
            f"{option}: it holds what is added when training is over, which would be in "
            f"the model twice; set checkpoint.start_from={other.path.parents[2]}"
        )
    for name, old, new in changed_settings(saved["model"], config.model.model_dump(mode="json")):
        if name not in _INITIAL_SETTINGS:
            raise ConfigError(
                f"{option}: its model has {name}={old}, not {new}; set "
                f"model.{name}={str(old).replace(' ', '')}"
            )
    for part in () if config.checkpoint.start_weights_only else ("tables", "dense"):
        old, new = saved["optimizer"][part]["name"], getattr(config.optimizer, part).name
        if old != new:
            raise ConfigError(
                f"{option}: it was trained with optimizer.{part}.name={old}, whose state {new} "
                f"cannot take over; set optimizer.{part}.name={old}, or "
                f"checkpoint.start_weights_only=true"
            )
    trained = config_from(state["config"], origin=option).data
    check_start(option, state, trained, manifest)
    if weight_transfer(trained, manifest, config.model).moves:
        shared = {one.name for one, _ in shared_fields(trained, manifest.data)}
        for text, fields in (
            ("are new", manifest.features),
            ("are left out", trained.features),
        ):
            names = [f.name for f in fields if f.name not in shared]
            log.info("%s: fields that %s: %s", option, text, ", ".join(names) or "none")


def read_start(
    saved: Saved,
    config: Config,
    dataset: PreparedDataset,
    world: World,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
) -> None:
    """Loads the weights of another run, and its optimizer state if configured. All ranks.

    Args:
        saved: the checkpoint that `begin` found.
        config: the settings.
        dataset: the data.
        world: the ranks.
        sharded: the model.
        optimizer: its optimizer.
    """
    trained = config_from(saved.state["config"], origin=str(saved.path)).data
    transfer = weight_transfer(trained, dataset.manifest, config.model)
    wanted = None if config.checkpoint.start_weights_only else optimizer
    reused = dataset.reused_rows(saved.state["vocabulary_hash"])
    checkpoint.load(saved.path, world, sharded, wanted, transfer, reused)


def make_ready(config: Config, start: Start) -> None:
    """Makes the run's folder ready for training. Rank 0.

    A run that this one does not resume is moved aside, and so are checkpoints later than the one it
    resumes from. Incomplete checkpoints are deleted.

    Raises:
        DeepFMError: the folder cannot be written.
    """
    run_dir = config.run_dir
    with write_errors_to_user(run_dir):
        steps = checkpoint.complete_steps(run_dir)
        if not start.continues and (steps or has_results(config)):
            set_aside(config)
        elif later := [step for step in steps if step > start.state.step]:
            set_steps_aside(config, later)
        if not is_remote(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.keep_checkpoints(run_dir, checkpoint.complete_steps(run_dir))
        for part in (checkpoint.SELECTED, checkpoint.REFIT):  # of a shorter run
            checkpoint.keep_checkpoints(run_dir / part, ())
        (run_dir / "config.yaml").write_text(config.to_yaml())


def _finished(config: Config, own: Saved, step: int, last_step: int) -> str:
    """The message if nothing is left to train."""
    asked = f" (asked for: {last_step:,})" if last_step != step else ""
    cure = "raise trainer.epochs or trainer.max_steps"
    if step < last_step:  # early stopping ended it
        cure = f"raise trainer.patience={config.trainer.patience}, or set trainer.patience=null"
    text = (
        f"Run already finished: {config.run_dir}, step {step:,}{asked}. To continue it, {cure}; "
        f"to train again, set another run.name, or checkpoint.resume=never, which moves this run "
        f"aside"
    )
    saved = settings_in(own.state)["trainer"]
    changed = [
        f"trainer.{name}={new} (was {old})"
        for name, old, new in changed_settings(saved, config.model_dump(mode="json")["trainer"])
        if name not in _LENGTH_SETTINGS
    ]
    return f"{text}. Changed without effect: {', '.join(changed)}" if changed else text


def _loop_state(saved: Saved) -> LoopState:
    try:
        return LoopState(**saved.state["trainer"])
    except TypeError as error:
        raise CheckpointError(
            f"{saved.path / checkpoint.MARKER}: of another version of deepfm_dist ({error}); "
            f"train again with checkpoint.resume=never"
        ) from None


def _checkpoint_to_continue(config: Config, manifest: Manifest | None = None) -> Saved | None:
    """The checkpoint from which the run resumes.

    A process restarted by a launcher resumes from the latest: ``checkpoint.use=STEP`` and
    ``checkpoint.resume=never`` applied to the first start, and would undo what was trained since.

    Args:
        config: the settings.
        manifest: the manifest of the data; None before they are prepared, when only settings are
            compared.

    Returns:
        The latest complete checkpoint; None if there is none, or if the run starts over.

    Raises:
        ConfigError: its settings or data differ.
        CheckpointError: the requested checkpoint does not exist.
    """
    resume, use = config.checkpoint.resume, config.checkpoint.use
    again = read_launch().restarted
    if (resume == "never" and not again) or not checkpoint.complete_steps(config.run_dir):
        return None
    of_loop = use not in ("auto", checkpoint.SELECTED, checkpoint.REFIT)
    which = use if of_loop and not again else "latest"
    saved = checkpoint.read_checkpoint(config.run_dir, which)
    differing = _differing(config, saved.state, manifest)
    if not differing:
        return saved
    if resume == "never":  # the first attempt ended before it moved the other run aside
        return None
    aside = name_aside(config)
    raise ConfigError(
        f"{config.run_dir}: holds a run that was trained with other settings or data: "
        f"{'; '.join(differing)}; set another run.name, or checkpoint.resume=never, which moves "
        f"that run to {aside}"
    )


def _differing(config: Config, state: Mapping[str, Any], manifest: Manifest | None) -> list[str]:
    """The differences that keep a run from resuming, each with both values."""
    train_bytes = None if manifest is None else manifest.splits["train"].size_bytes
    differing = [
        f"{name}={_brief(new)} (was {_brief(old)})"
        for name, old, new in changed_settings(settings_in(state), config.model_dump(mode="json"))
        if _fixes_a_run(name, old, new, train_bytes)
    ]
    hashes = {} if manifest is None else manifest.hashes
    differing += [
        f"the {name.removesuffix('_hash')} is {new} (was {old})"
        for name, new in hashes.items()
        if (old := state.get(name)) != new and None not in (old, new)
    ]
    return differing


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:40]}...{text[-15:]}"


def _fixes_a_run(name: str, old: Any, new: Any, train_bytes: int | None) -> bool:
    """Whether changing a setting trains a different model, not just longer or elsewhere."""
    if AUTO in (old, new):  # left to the recipe, which takes the run's own
        return False
    if name == "data.memory_bytes":  # rows that are streamed come in another order
        if train_bytes is None:
            return False
        return old is None or (train_bytes <= old) != (train_bytes <= new)
    if name.startswith("optimizer.") and name.endswith(".decay_steps"):  # as long as training
        return False
    if name == "data.on_device":  # the batches are the same
        return False
    if name == "checkpoint.start_from":
        return new is not None
    if name.startswith("trainer."):
        return name.removeprefix("trainer.") in _STEP_SETTINGS
    if name == "run.seed":
        return True
    return name.startswith(("data.", "model.", "optimizer.")) and name not in DATA_LOCATION
