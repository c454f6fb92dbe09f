"""A run's folder: its lock, and moving runs and checkpoints aside."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

from deepfm_dist.config import Config, load_config
from deepfm_dist.data.compatibility import changes_between
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.sharding import DistributedModelParallel, placed_tables
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import CheckpointError, ConfigError, DataError
from deepfm_dist.lock import Lock
from deepfm_dist.storage import (
    ANOTHER_ROOT,
    is_remote,
    move_tree,
    write_errors_to_user,
)

log = logging.getLogger(__name__)
PLAN = "plan.json"
STUDY = "tune"
"""Folder of a study, below that of the run whose settings it varies."""
_WITHOUT_RESULTS = ("checkpoints", "config.yaml", "metrics.jsonl", PLAN, "tensorboard", STUDY)


def run_lock(
    config: Config, cure: str = "choose another run.name", elsewhere: str = ANOTHER_ROOT
) -> Lock:
    """The lock to hold while writing checkpoints into the run's folder; see `Lock`."""
    return Lock(config.run_dir, str(config.run_dir), cure, elsewhere)


def before_replacing(config: Config, old: Manifest | None, new: Manifest) -> Path | None:
    """Protects the dataset that runs were trained on. Rank 0.

    Args:
        config: the configuration of the command that prepares.
        old: the manifest of the dataset about to be replaced; None if it cannot be read.
        new: its replacement.

    Returns:
        Where to move the old dataset if a run needs it; None if no run does.

    Raises:
        DataError: runs need it.
    """
    unchanged = old is not None and old.hashes == new.hashes
    runs = [] if unchanged else _runs_on(config, old.hashes if old else {})
    own = runs == [config.run_dir]
    if own and config.checkpoint.resume == "never":
        return set_aside(config, with_dataset=True)
    if runs and old is None:  # which no command of this version can use
        aside = _numbered_name(config.prepared_dir, _free_number(config))
        text = "%s: moved the earlier dataset, which %s was trained on, to %s"
        log.warning(text, config.prepared_dir, _named(runs), aside)
        return aside
    if runs and old is not None:
        cure = (
            f"checkpoint.resume=never, which moves {config.run_dir} and its dataset aside"
            if own
            else "data.name=NAME, for a dataset of its own"
        )
        raise DataError(
            f"{config.prepared_dir}: {changes_between(old, new)}, and {_named(runs)} would lose "
            f"the dataset of the checkpoints there; set another run.name, or {cure}"
        )
    return None


def _named(runs: Sequence[Path]) -> str:
    return ", ".join(map(str, runs[:3])) + ", ..." * (len(runs) > 3)


def set_aside(config: Config, with_dataset: bool = False) -> Path:
    """Renames a run to the next free name: ``runs/NAME.1``, ``runs/NAME.2``, ... Rank 0.

    Its ``config.yaml`` gets the new name, so that ``--run runs/NAME.1`` finds all of it. A study
    that `tune` keeps in the folder stays.

    Args:
        config: the configuration of the new run.
        with_dataset: whether the caller will move the dataset to the matching name; otherwise both
            runs share it.

    Returns:
        The folder of its dataset.
    """
    run_dir, number = config.run_dir, _free_number(config)
    aside, dataset = _numbered_name(run_dir, number), config.prepared_dir
    if with_dataset:
        dataset = _numbered_name(dataset, number)
    if run_dir.exists():
        move_tree(run_dir, aside)
        if (aside / STUDY).exists():
            move_tree(aside / STUDY, run_dir / STUDY)
        data_name = config.data.name or config.run.name
        moved = _numbered_name(Path(data_name), number).as_posix() if with_dataset else None
        _rename_in_config(aside, config, moved)
    for outputs in _folders(config)[1:]:
        if outputs.exists():
            move_tree(outputs, _numbered_name(outputs, number))
    log.info("%s: moved the earlier run to %s", run_dir, aside)
    return dataset


def set_steps_aside(config: Config, steps: Sequence[int]) -> None:
    """Moves checkpoints later than the one a run continues from to a separate run."""
    run_dir = config.run_dir
    aside = name_aside(config)
    for step in steps:
        move_tree(
            checkpoint.checkpoint_path(run_dir, step), checkpoint.checkpoint_path(aside, step)
        )
    for name in ("metrics.jsonl", "config.yaml"):
        if (run_dir / name).is_file():
            (aside / name).write_bytes((run_dir / name).read_bytes())
    _rename_in_config(aside, config)
    text = "%s: moved checkpoints of steps %s to %s"
    log.info(text, run_dir, ", ".join(map(str, steps)), aside)


def _rename_in_config(aside: Path, config: Config, data_name: str | None = None) -> None:
    """Gives a run's ``config.yaml`` the name of the folder next to ``config``'s that it is in now.

    Its dataset keeps its name unless ``data_name`` is given.
    """
    file, run_name = aside / "config.yaml", Path(config.run.name).with_name(aside.name).as_posix()
    with suppress(ConfigError):  # of another version, say
        own = load_config(str(file)).with_run_name_on_same_data(run_name)
        if data_name is not None:
            own = own.model_copy(update={"data": own.data.model_copy(update={"name": data_name})})
        file.write_text(own.to_yaml())


def name_aside(config: Config) -> Path:
    """The folder that a run is moved to when another takes its place."""
    return _numbered_name(config.run_dir, _free_number(config))


def _free_number(config: Config) -> int:
    folders = _folders(config)
    if not is_remote(config.prepared_dir):  # one behind a URL is never moved
        folders.append(config.prepared_dir)
    return next(n for n in count(1) if not any(_numbered_name(f, n).exists() for f in folders))


def _numbered_name(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}.{number}")


def _folders(config: Config) -> list[Path]:
    """The run's folder and, if that is behind a URL, the local one for other commands' output.

    A separate local run of that name is not included.
    """
    local = config.output_dir
    is_run = (local / "config.yaml").exists() or (local / "checkpoints").exists()
    return [config.run_dir] + [local] * (local != config.run_dir and not is_run)


def has_results(config: Config) -> bool:
    """Whether the folder holds results, not just what a run leaves before its first checkpoint."""
    for folder in _folders(config):
        with suppress(FileNotFoundError, NotADirectoryError):
            for path in folder.iterdir():
                if path.name not in _WITHOUT_RESULTS and not path.name.startswith("."):
                    return True
    return False


def _runs_on(config: Config, hashes: Mapping[str, str | None]) -> list[Path]:
    """Runs whose latest checkpoint was trained on the dataset with these hashes.

    Checks this run and, on a local disk, its neighbours.
    """
    root, own = config.run_dir.parent, config.run_dir
    others = [] if is_remote(root) else [f.parent for f in root.glob("*/config.yaml")]
    runs = []
    for folder in [own, *sorted(path for path in others if path != own)]:
        with suppress(CheckpointError, ConfigError, OSError):
            if folder != own:
                theirs = load_config(str(folder / "config.yaml"))
                if theirs.prepared_dir.resolve() != config.prepared_dir.resolve():
                    continue
            if not checkpoint.complete_steps(folder):
                continue
            state = checkpoint.read_checkpoint(folder).state
            if all(state.get(name) in (hash_, None) for name, hash_ in hashes.items()):
                runs.append(folder)
    return runs


def write_plan(folder: Path, sharded: DistributedModelParallel, world: World) -> None:
    """Writes ``plan.json`` into the run's folder: the ranks, and a line per table. Rank 0."""
    tables = [asdict(line) for line in placed_tables(sharded)]
    plan = {"ranks": world.world_size, "device": world.device.type, "tables": tables}
    with write_errors_to_user(folder):
        (folder / PLAN).write_text(json.dumps(plan, indent=2) + "\n")
