"""A run's folder: what training goes on from, and what a finished run is read back as."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import shard_for_inference, weight_transfer
from deepfm_dist.config import Config, config_from, load_config, settings_of
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest, hash_of
from deepfm_dist.data.match import changed_settings, check_match, check_start, shared_fields
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import World
from deepfm_dist.distributed.sharding import DistributedModelParallel, placed_tables
from deepfm_dist.errors import CheckpointError, ConfigError, DataError
from deepfm_dist.launcher import read_launch
from deepfm_dist.lock import Lock
from deepfm_dist.storage import (
    folder_of,
    is_remote,
    move_tree,
    storage_errors_to_user,
    write_errors_to_user,
)
from deepfm_dist.training.state import LoopState

log = logging.getLogger(__name__)
_OF_TRAINING = ("data", "model")  # sections whose settings a checkpoint knows
_OF_STEPS = ("loss", "batch_size", "candidates", "targets_per_user", "accumulate_steps")
_OF_ANY_MODEL = ("dropout", "init_std", "over_arch_init")  # they change no weight's meaning
_OF_THE_PLACE = ("data.root", "data.name")  # where data lie
_OF_A_COMMAND = (*_OF_THE_PLACE, "data.memory_bytes", "data.files")  # and how one deals with them
_OF_LENGTH = ("epochs", "max_steps", "log_every_steps", "reading_threads", "profile_steps")
PLAN = "plan.json"
STUDY = "tune"
"""Folder of a study, below that of the run whose settings it varies."""
_WITHOUT_RESULTS = ("checkpoints", "config.yaml", "metrics.jsonl", PLAN, "tensorboard", STUDY)


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        path: the checkpoint to read, or None.
        state: of the loop.
        continues: whether the checkpoint is this run's own.
        is_over: whether nothing is left to train.
    """

    path: Path | None
    state: LoopState
    continues: bool = False
    is_over: bool = False


def run_lock(config: Config) -> Lock:
    """The lock of whoever writes checkpoints into the run's folder."""
    return Lock(config.run_dir, str(config.run_dir), "choose another run.name")


def check_settings(config: Config) -> None:
    """Compares the settings with those of the run that the folder holds, if any. Rank 0.

    It comes before the data are prepared, which would replace those of that run.

    Raises:
        ConfigError: the run was trained with other settings.
        CheckpointError: the checkpoint that was asked for does not exist.
    """
    with write_errors_to_user(config.run_dir):
        _checkpoint_to_continue(config)


def before_replacing(config: Config, old: Manifest, new: Manifest) -> Path | None:
    """Keeps runs from losing the dataset that they were trained on. Rank 0.

    Args:
        config: of the command that prepares.
        old: the manifest of the dataset that is about to be replaced.
        new: the one that takes its place.

    Returns:
        Where to move the old dataset, after the run that needs it; None: no run needs it.

    Raises:
        DataError: runs need it.
    """
    runs = [] if old.hashes == new.hashes else _runs_on(config, old)
    own = runs == [config.run_dir]
    if own and config.checkpoint.resume == "never":
        return set_aside(config, with_dataset=True)
    if runs:
        names = ", ".join(map(str, runs[:3])) + ", ..." * (len(runs) > 3)
        cure = (
            f"checkpoint.resume=never, which moves {config.run_dir} and its dataset aside"
            if own
            else "data.name=NAME, for a dataset of its own"
        )
        raise DataError(
            f"{config.prepared_dir}: its input files or settings have changed, and {names} would "
            f"lose the dataset of the checkpoints there; set another run.name, or {cure}"
        )
    return None


def begin(config: Config, manifest: Manifest, last_step: int) -> Start:
    """Decides where a run begins; changes nothing. Rank 0.

    Raises:
        CheckpointError: ``checkpoint.start_from`` has none, or one of data that this run's data
            does not extend.
        ConfigError: it is of another model, or this run itself; or the folder holds a run of other
            settings or data.
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
        path, state = _checkpoint_to_continue(config, manifest), LoopState()
        if path is not None:
            state = _loop_state(path)
            if state.step < last_step:
                state.resume(config.monitor)  # what ended it once may be no reason now
            is_over = state.is_over(config.trainer.patience, last_step)
            if is_over:
                log.warning("%s", _finished(config, path, state.step, last_step))
            else:
                log.info("%s: training goes on after step %s", path, f"{state.step:,}")
            return Start(path, state, continues=True, is_over=is_over)
        if elsewhere is not None:
            path = checkpoint.find_checkpoint(folder_of(elsewhere), "auto")
            _check_start(config, manifest, checkpoint.read_state(path))
            if not config.checkpoint.start_weights_only:
                state.earlier_steps = checkpoint.steps_in(checkpoint.read_state(path))
            log.info("%s: training starts from its weights", path)
        return Start(path, state)


def _check_start(config: Config, manifest: Manifest, state: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose weights would mean something else to this run's model."""
    option = f"checkpoint.start_from={config.checkpoint.start_from}"
    saved = _settings_in(state)
    for name, old, new in changed_settings(saved["model"], config.model.model_dump(mode="json")):
        if name not in _OF_ANY_MODEL:
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
            ("start afresh", manifest.features),
            ("are left out", trained.features),
        ):
            names = [f.name for f in fields if f.name not in shared]
            log.info("%s: fields that %s: %s", option, text, ", ".join(names) or "none")


def read_start(
    path: Path,
    config: Config,
    manifest: Manifest,
    world: World,
    sharded: DistributedModelParallel,
    optimizer: CombinedOptimizer,
) -> None:
    """Reads the weights of another run, and the optimizer's state if wanted. All ranks.

    Args:
        path: the checkpoint that `begin` has found.
        config: the settings.
        manifest: of the data.
        world: the ranks.
        sharded: the model.
        optimizer: its optimizer.
    """
    trained = config_from(checkpoint.read_state(path)["config"], origin=str(path)).data
    transfer = weight_transfer(trained, manifest, config.model)
    wanted = None if config.checkpoint.start_weights_only else optimizer
    checkpoint.load(path, world, sharded, wanted, transfer)


def make_ready(config: Config, start: Start) -> None:
    """Makes the run's folder ready for training. Rank 0.

    A run that this one does not continue is moved aside, and so are checkpoints of later steps than
    the one that it continues from. Incomplete ones are deleted.

    Raises:
        DeepFMError: the folder cannot be written.
    """
    run_dir = config.run_dir
    with write_errors_to_user(run_dir):
        steps = checkpoint.complete_steps(run_dir)
        if not start.continues and (steps or _has_results(config)):
            set_aside(config)
        elif later := [step for step in steps if step > start.state.step]:
            _set_steps_aside(config, later)
        if not is_remote(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.keep_checkpoints(run_dir, checkpoint.complete_steps(run_dir))
        (run_dir / "config.yaml").write_text(config.to_yaml())


def set_aside(config: Config, with_dataset: bool = False) -> Path:
    """Moves a run to the next free name: ``runs/NAME.1``, ``runs/NAME.2``, ... Rank 0.

    Its ``config.yaml`` gets the new name, so that ``--run runs/NAME.1`` finds all of it. A study
    that `tune` keeps in the folder stays.

    Args:
        config: of the run that takes its place.
        with_dataset: whether its dataset is to move likewise, which is left to the caller; else
            both runs share it.

    Returns:
        The folder of its dataset.
    """
    run_dir, output_dir, number = config.run_dir, config.output_dir, _free_number(config)
    aside, dataset = _numbered(run_dir, number), config.prepared_dir
    if with_dataset:
        dataset = _numbered(dataset, number)
    if run_dir.exists():
        move_tree(run_dir, aside)
        if (aside / STUDY).exists():
            move_tree(aside / STUDY, run_dir / STUDY)
        _rename_in_config(aside / "config.yaml", aside, dataset)
    if output_dir != run_dir and output_dir.exists():
        move_tree(output_dir, _numbered(output_dir, number))
    log.info("%s: the earlier run is %s from now on", run_dir, aside)
    return dataset


def _set_steps_aside(config: Config, steps: Sequence[int]) -> None:
    """Makes a run of its own of later checkpoints than the one a run continues from."""
    run_dir = config.run_dir
    aside = _numbered(run_dir, _free_number(config))
    for step in steps:
        move_tree(
            checkpoint.checkpoint_path(run_dir, step), checkpoint.checkpoint_path(aside, step)
        )
    for name in ("metrics.jsonl", "config.yaml"):
        if (run_dir / name).is_file():
            (aside / name).write_bytes((run_dir / name).read_bytes())
    _rename_in_config(aside / "config.yaml", aside, config.prepared_dir)
    text = "%s: checkpoints of steps %s are in %s from now on"
    log.info(text, run_dir, ", ".join(map(str, steps)), aside)


def _rename_in_config(file: Path, run_dir: Path, dataset: Path) -> None:
    with suppress(ConfigError):  # of another version, say
        config = load_config(str(file)).called(run_dir.name)
        data = config.data.model_copy(update={"name": dataset.name})
        file.write_text(config.model_copy(update={"data": data}).to_yaml())


def _free_number(config: Config) -> int:
    folders = (config.run_dir, config.output_dir, config.prepared_dir)
    return next(n for n in count(1) if not any(_numbered(f, n).exists() for f in folders))


def _numbered(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def _has_results(config: Config) -> bool:
    """Whether the folder holds more than a run leaves that ended before its first checkpoint."""
    for folder in {config.run_dir, config.output_dir}:
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in folder.iterdir():
                if path.name not in _WITHOUT_RESULTS and not path.name.startswith("."):
                    return True
    return False


def _runs_on(config: Config, manifest: Manifest) -> list[Path]:
    """Runs whose latest checkpoint was trained on the dataset that ``prepared_dir`` holds.

    Looked for are this run and, on a local disk, its neighbours.
    """
    root, own = config.run_dir.parent, config.run_dir
    others = [] if is_remote(root) else [f.parent for f in root.glob("*/config.yaml")]
    found = []
    for folder in [own, *sorted(path for path in others if path != own)]:
        with suppress(CheckpointError, ConfigError, OSError):
            if folder != own:
                theirs = load_config(str(folder / "config.yaml"))
                if theirs.prepared_dir.resolve() != config.prepared_dir.resolve():
                    continue
            steps = checkpoint.complete_steps(folder)
            if not steps:
                continue
            state = checkpoint.read_state(checkpoint.checkpoint_path(folder, steps[-1]))
            if all(state.get(name) in (hash_, None) for name, hash_ in manifest.hashes.items()):
                found.append(folder)
    return found


def _finished(config: Config, path: Path, step: int, last_step: int) -> str:
    """What a command says that has nothing left to train."""
    asked = f" (asked for: {last_step:,})" if last_step < step else ""
    text = (
        f"Run already finished: {config.run_dir}, step {step:,}{asked}. To continue it, raise "
        f"trainer.epochs or trainer.max_steps; to train again, set another run.name, or "
        f"checkpoint.resume=never, which moves this run aside"
    )
    saved = _settings_in(checkpoint.read_state(path))["trainer"]
    changed = [
        f"trainer.{name}={new} (was {old})"
        for name, old, new in changed_settings(saved, config.model_dump(mode="json")["trainer"])
        if name not in _OF_LENGTH
    ]
    return f"{text}. Changed without effect: {', '.join(changed)}" if changed else text


def _loop_state(path: Path) -> LoopState:
    try:
        return LoopState(**checkpoint.read_state(path)["trainer"])
    except TypeError as error:
        raise CheckpointError(
            f"{path / checkpoint.MARKER}: of another version of deepfm_dist ({error}); train again "
            f"with checkpoint.resume=never"
        ) from None


def write_plan(folder: Path, sharded: DistributedModelParallel, world: World) -> None:
    """Writes ``plan.json`` into the run's folder: the ranks, and a line per table. Rank 0."""
    tables = [asdict(line) for line in placed_tables(sharded)]
    plan = {"ranks": world.world_size, "device": world.device.type, "tables": tables}
    with write_errors_to_user(folder):
        (folder / PLAN).write_text(json.dumps(plan, indent=2) + "\n")


def _checkpoint_to_continue(config: Config, manifest: Manifest | None = None) -> Path | None:
    """The checkpoint from which the run continues.

    What a launcher has started again goes on from the latest: ``checkpoint.use=STEP`` and
    ``checkpoint.resume=never`` were for the first start, and would undo what was trained since.

    Args:
        config: the settings.
        manifest: of the data; None before they are prepared, when only settings are compared.

    Returns:
        None where there is none, or where the run is to begin again.

    Raises:
        ConfigError: it is of other settings or data.
        CheckpointError: the checkpoint that was asked for is not there.
    """
    resume, use = config.checkpoint.resume, config.checkpoint.use
    again = read_launch().restarted
    if (resume == "never" and not again) or not checkpoint.complete_steps(config.run_dir):
        return None
    which = "latest" if use == "auto" or again else use
    path = checkpoint.find_checkpoint(config.run_dir, which)
    differing = _differing(config, checkpoint.read_state(path), manifest)
    if not differing:
        return path
    if resume == "never":  # the first start ended before it moved the other run aside
        return None
    aside = _numbered(config.run_dir, _free_number(config))
    raise ConfigError(
        f"{config.run_dir}: holds a run that was trained with other settings or data: "
        f"{'; '.join(differing)}; set another run.name, or checkpoint.resume=never, which moves "
        f"that run to {aside}"
    )


def _differing(config: Config, state: Mapping[str, Any], manifest: Manifest | None) -> list[str]:
    """What keeps a run from continuing from a checkpoint, each with both values."""
    train_bytes = None if manifest is None else manifest.splits["train"].size_bytes
    differing = [
        f"{name}={_brief(new)} (was {_brief(old)})"
        for name, old, new in changed_settings(_settings_in(state), config.model_dump(mode="json"))
        if _fixes_a_run(name, old, new, train_bytes)
    ]
    hashes = {} if manifest is None else manifest.hashes
    differing += [
        f"the {name.removesuffix('_hash')} is {new} (was {old})"
        for name, new in hashes.items()
        if (old := state.get(name)) != new and None not in (old, new)
    ]
    return differing


def _settings_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings. Those it was made without have their defaults: they change nothing.

    Settings that are no more are left among them, for whoever reads them to name.
    """
    saved: dict[str, Any] = state["config"]
    with suppress(ConfigError):
        saved = config_from(saved).model_dump(mode="json")
    return saved


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:40]}...{text[-15:]}"


def _fixes_a_run(name: str, old: Any, new: Any, train_bytes: int | None) -> bool:
    """Whether another value trains something else, not longer, elsewhere, or to other reports."""
    if name == "data.memory_bytes":  # rows that are streamed come in another order
        if train_bytes is None:
            return False
        return old is None or (train_bytes <= old) != (train_bytes <= new)
    if name == "checkpoint.start_from":
        return new is not None
    if name.startswith("trainer."):
        return name.removeprefix("trainer.") in _OF_STEPS
    if name == "run.seed":
        return True
    return name.startswith(("data.", "model.", "optimizer.")) and name not in _OF_THE_PLACE


def open_dataset(config: Config, world: World) -> PreparedDataset:
    """The prepared dataset, once it is known to be the same on all ranks. All ranks.

    Raises:
        DataError: there is none, or another one on another machine.
    """
    dataset = PreparedDataset(config.prepared_dir, config.data.memory_bytes)
    check_everywhere(dataset, world)
    return dataset


def check_everywhere(dataset: PreparedDataset, world: World) -> None:
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


@dataclass(frozen=True)
class RunOnDisk:
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
    def identity(self) -> dict[str, int | str | None]:
        """What tells the checkpoint from any other, also from one of the same step, and the data.

        An export holds the values of users and items, which the dataset may have got anew.
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
        config: the settings in force: the run's own for data and model, the command's otherwise.
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

    def output(self, section: str, name: str, about: Collection[str], given: str | None) -> Path:
        """The parquet file that a command writes; a CSV of the same name may go with it.

        By default it is ``NAME.parquet`` in the run's folder for the run's own settings. Others are
        added to the name (``NAME-k20-users.parquet``), so that a small or a special result does not
        take the place of the full one.

        Args:
            section: of the command's settings.
            name: of the default file.
            about: settings of the section that decide what the result is of.
            given: what ``--output`` says.

        Raises:
            ConfigError: ``--output`` names no parquet file.
        """
        if given is not None:
            if Path(given).suffix != ".parquet":
                better = Path(given).with_suffix(".parquet")
                raise ConfigError(f"--output {given}: the result is parquet; use --output {better}")
            return Path(given)
        asked, own = self.config.model_dump(mode="json")[section], self.settings.get(section, {})
        changed = [option for option in about if asked[option] != own.get(option)]
        parts = [name, *(option + _in_a_name(asked[option]) for option in changed)]
        return self.config.output_dir / f"{'-'.join(parts)}.parquet"


def open_trained(
    config: Config, overrides: Sequence[str], world: World, same_rows: bool = False
) -> LoadedModel:
    """Loads a run's checkpoint. All ranks.

    Args:
        config: the command's configuration: where the run and the prepared data are.
        overrides: of the command line.
        world: the ranks.
        same_rows: as `find_run` takes it.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of other data.
        ConfigError: an override asks for other data or another model than were trained.
    """
    found = find_run(config, overrides, same_rows)
    check_everywhere(found.dataset, world)
    sharded = shard_for_inference(found.config, found.dataset.manifest, world)
    checkpoint.load(found.checkpoint, world, sharded)
    log.info("%s, step %s", found.checkpoint, f"{found.state['step']:,}")
    return LoadedModel(
        found.config,
        found.dataset,
        sharded,
        found.checkpoint,
        found.state["step"],
        _settings_in(found.state),
    )


def find_run(config: Config, overrides: Sequence[str], same_rows: bool = False) -> RunOnDisk:
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
    with storage_errors_to_user(config.run_dir):
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
    return RunOnDisk(config, dataset, path, state)


def _in_a_name(value: Any) -> str:
    return str(value) if isinstance(value, int | float) else ""


def _at(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree
