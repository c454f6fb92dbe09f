"""A run's folder: what training goes on from, and what a finished run is read back as."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from deepfm_dist.build import shard_for_inference
from deepfm_dist.config import Config, config_from
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.match import check_match
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.sharding import DistributedModelParallel, placed_tables
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.launcher import read_launch
from deepfm_dist.storage import folder_of, is_remote, told_in_one_line, writing
from deepfm_dist.training.trainer import LoopState, Schedule

log = logging.getLogger(__name__)
_OF_TRAINING = ("data", "model")  # sections whose settings a checkpoint knows
_OF_STEPS = ("loss", "batch_size", "candidates", "targets_per_user", "accumulate_steps")
_OF_ANY_MODEL = ("dropout", "init_std")  # settings of ``model`` that change no weight's meaning
_OF_THE_PLACE = ("data.root", "data.name")  # where data lie
_OF_A_COMMAND = (*_OF_THE_PLACE, "data.memory_bytes", "data.files")  # and how one deals with them
PLAN = "plan.json"


def begin(
    config: Config, manifest: Manifest, schedule: Schedule, last_step: int
) -> tuple[Path | None, LoopState]:
    """Makes the run folder ready: to go on from a checkpoint, or to begin anew. Rank 0.

    Returns:
        the checkpoint to read, or None, and the state of the loop.

    Raises:
        CheckpointError: ``checkpoint.start_from`` has none, or one of data that this run's data
            does not extend.
        ConfigError: it is of another model, or this run itself.
        DeepFMError: the run folder cannot be written.
    """
    elsewhere = config.checkpoint.start_from
    start = None if elsewhere is None else folder_of(elsewhere).resolve()
    if start is not None and config.run_dir.resolve() in (start, start.parent.parent):
        raise ConfigError(
            f"checkpoint.start_from={elsewhere}: this run's own folder, whose checkpoints make "
            f"room for those of a run that begins anew; give the run another run.name"
        )
    with writing(config.run_dir):
        path, state = _checkpoint_to_continue(config, manifest), LoopState()
        if path is not None:
            state = _loop_state(path)
            if state.step < last_step:
                state.go_on(schedule)  # what ended it once may be no reason now
            is_over = state.is_over(schedule, last_step)
            if is_over and config.checkpoint.resume == "auto" and not read_launch().restarted:
                log.info("%s: the run is over; it is trained anew", path)
                path, state = None, LoopState()
            else:
                log.info("%s: training goes on after step %s", path, f"{state.step:,}")
        if path is None and elsewhere is not None:
            path = checkpoint.find_checkpoint(folder_of(elsewhere), "auto")
            known = {manifest.vocabulary_hash, *manifest.grown_from}
            if (trained_on := checkpoint.read_state(path)["vocabulary_hash"]) not in known:
                raise CheckpointError(
                    f"checkpoint.start_from={elsewhere}: trained on vocabulary {trained_on}, which "
                    f"this run's data does not extend; prepare it with data.vocabulary_from"
                )
            saved = _settings_in(checkpoint.read_state(path))["model"]
            for name, old, new in _differences(saved, config.model.model_dump(mode="json")):
                if name not in _OF_ANY_MODEL:
                    raise ConfigError(
                        f"checkpoint.start_from={elsewhere}: its model has {name}={old}, not "
                        f"{new}; set model.{name}={str(old).replace(' ', '')}"
                    )
            state.earlier_steps = checkpoint.steps_in(checkpoint.read_state(path))
            log.info("%s: training starts from its weights", path)
        if not is_remote(config.run_dir):
            config.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.keep_checkpoints(
            config.run_dir,
            [s for s in checkpoint.complete_steps(config.run_dir) if s <= state.step],
        )
        (config.run_dir / "config.yaml").write_text(config.to_yaml())
        return path, state


def _loop_state(path: Path) -> LoopState:
    try:
        return LoopState(**checkpoint.read_state(path)["trainer"])
    except TypeError as error:
        raise CheckpointError(
            f"{path / checkpoint.MARKER}: of another version of deepfm_dist ({error}); train anew "
            f"with checkpoint.resume=never"
        ) from None


def write_plan(folder: Path, sharded: DistributedModelParallel, world: World) -> None:
    """Writes ``plan.json`` into the run's folder: the ranks, and a line per table. Rank 0."""
    tables = [asdict(line) for line in placed_tables(sharded)]
    plan = {"ranks": world.world_size, "device": world.device.type, "tables": tables}
    with writing(folder):
        (folder / PLAN).write_text(json.dumps(plan, indent=2) + "\n")


def _checkpoint_to_continue(config: Config, manifest: Manifest) -> Path | None:
    """The checkpoint from which a run of these settings can go on.

    What a launcher has started again goes on from the latest: ``checkpoint.use=STEP`` and
    ``checkpoint.resume=never`` were for the first start, and would undo what was trained since.

    Returns:
        None where there is none, or where the run is to begin anew.

    Raises:
        ConfigError: ``checkpoint.resume=always``, but the checkpoint is of other settings or data.
        CheckpointError: the checkpoint that was asked for is not there.
    """
    resume, use = config.checkpoint.resume, config.checkpoint.use
    again = read_launch().restarted
    if (resume == "never" and not again) or not checkpoint.complete_steps(config.run_dir):
        return None
    which = "latest" if use == "auto" or again else use
    path = checkpoint.find_checkpoint(config.run_dir, which)
    state = checkpoint.read_state(path)
    differing = [
        f"{name}={new}, not {old}"
        for name, old, new in _differences(_settings_in(state), config.model_dump(mode="json"))
        if _fixes_a_run(name, old, new, manifest.splits["train"].size_bytes)
    ]
    differing += [
        f"the {name.removesuffix('_hash')} is {new}, not {old}"
        for name, new in manifest.hashes.items()
        if (old := state.get(name)) != new and None not in (old, new)
    ]
    if not differing:
        return path
    if resume == "always":
        raise ConfigError(
            f"checkpoint.resume=always: {path} was trained with other settings: "
            f"{'; '.join(differing)}; take its settings, or begin anew with checkpoint.resume=never"
        )
    log.info("%s is of other settings (%s): training begins anew", path, "; ".join(differing))
    return None


def _settings_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings. Those it was made without have their defaults: they change nothing.

    Settings that are no more are left among them, for whoever reads them to name.
    """
    saved: dict[str, Any] = state["config"]
    with suppress(ConfigError):
        saved = config_from(saved).model_dump(mode="json")
    return saved


def _fixes_a_run(name: str, old: Any, new: Any, train_bytes: int) -> bool:
    """Whether another value trains something else, not longer, elsewhere, or to other reports."""
    if name == "data.memory_bytes":  # rows that are streamed come in another order
        return old is None or (train_bytes <= old) != (train_bytes <= new)
    if name.startswith("trainer."):
        return name.removeprefix("trainer.") in _OF_STEPS
    if name == "run.seed":
        return True
    return name.startswith(("data.", "model.", "optimizer.")) and name not in _OF_THE_PLACE


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Settings whose values differ: dotted name, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


@dataclass(frozen=True)
class Finished:
    """What a run has left on disk.

    Attributes:
        config: the settings in force: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        checkpoint: the latest complete one.
        state: what its marker says.
    """

    config: Config
    dataset: PreparedDataset
    checkpoint: Path
    state: dict[str, Any]

    @property
    def identity(self) -> dict[str, int | str]:
        """What tells the checkpoint from any other, also from one of the same step."""
        return {
            "step": self.state["step"],
            "checkpoint": checkpoint.digest_of(self.state),
            "vocabulary_hash": self.state["vocabulary_hash"],
        }


@dataclass(frozen=True)
class Trained:
    """A run's model, ready for inference.

    Attributes:
        config: the settings in force: the run's own for data and model, the command's otherwise.
        dataset: the prepared dataset it was trained on.
        sharded: the task, in eval mode.
        checkpoint: where the weights were read from.
        step: optimizer steps taken by then.
    """

    config: Config
    dataset: PreparedDataset
    sharded: DistributedModelParallel
    checkpoint: Path
    step: int


def open_trained(
    config: Config, overrides: Sequence[str], world: World, same_rows: bool = False
) -> Trained:
    """Loads a run's checkpoint. All ranks.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: of the command line.
        world: the ranks.
        same_rows: as `find_finished` takes it.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    found = find_finished(config, overrides, same_rows)
    sharded = shard_for_inference(found.config, found.dataset.manifest, world)
    checkpoint.load(found.checkpoint, world, sharded)
    log.info("%s, step %s", found.checkpoint, f"{found.state['step']:,}")
    return Trained(found.config, found.dataset, sharded, found.checkpoint, found.state["step"])


def find_finished(config: Config, overrides: Sequence[str], same_rows: bool = False) -> Finished:
    """Finds a run's latest checkpoint and its dataset.

    A checkpoint knows its data and model, and these settings are taken from it, but for where files
    lie, how they are laid out and how much memory they may take.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: of the command line.
        same_rows: whether a dataset with other rows than were trained on is refused; else a
            warning says so.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged or of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    with told_in_one_line(config.run_dir):
        path = checkpoint.find_checkpoint(config.run_dir, config.checkpoint.use)
        state = checkpoint.read_state(path)
    trained_with = _settings_in(state)
    merged = config.model_dump(mode="json")
    for name in (name for override in overrides for name in settings_of(override)):
        if name.partition(".")[0] in _OF_TRAINING and not name.startswith(_OF_A_COMMAND):
            wanted, trained = _at(merged, name), _at(trained_with, name)
            if wanted != trained:
                raise ConfigError(
                    f"{name}={wanted}: {path} was trained with {trained}; train with the new "
                    f"value first, or leave the override out"
                )
    kept = {name: _at(merged, name) for name in _OF_A_COMMAND}
    merged |= {section: trained_with[section] for section in _OF_TRAINING}
    merged["data"] |= {name.removeprefix("data."): value for name, value in kept.items()}
    config = config_from(merged, origin=str(path))
    dataset = PreparedDataset(config.prepared_dir, config.data.memory_bytes)
    check_match(path, state, config.data, dataset.folder, dataset.manifest, same_rows)
    return Finished(config, dataset, path, state)


def settings_of(override: str) -> list[str]:
    """Names of the settings that ``section.field=value`` or ``section={field: value}`` sets."""
    name, _, text = override.partition("=")
    value = None if "." in name else yaml.safe_load(text)
    return [f"{name}.{field}" for field in value] if isinstance(value, dict) else [name]


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
