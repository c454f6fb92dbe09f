"""The nightly job: trains on a day's log, compares with the model in use, promotes the better one.

All nights of ``run.name=mine`` are in one folder::

    runs/mine/2026-11-30/           the run of a day
    runs/mine/current               the name of the run in use
    runs/mine/nights/2026-11-30.json   what a night did so far
    runs/mine/nights.csv            a line per night

Every step can be repeated: training resumes or is already finished; figures are measured again; the
pointer is replaced atomically. Rerunning the command completes an interrupted night.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from torch.distributed import PrefixStore

from deepfm_dist.config import Config, with_settings
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.remote import copy_path, local_copy
from deepfm_dist.data.schema import label_of, names_of
from deepfm_dist.data.sources import EmptyFile, find_files, find_lists
from deepfm_dist.data.sources.days import names_day, on_day
from deepfm_dist.distributed.checkpoint import complete_steps, read_checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.jobs.evaluate import evaluate_on, measure_weights
from deepfm_dist.jobs.train import train_on
from deepfm_dist.lock import Lock
from deepfm_dist.runs.trained import settings_in
from deepfm_dist.storage import (
    CURRENT,
    atomic_write,
    delete_tree,
    folder_of,
    follow_pointer,
    is_remote,
    write_errors_to_user,
)
from deepfm_dist.training.state import is_lower_better

log = logging.getLogger(__name__)
_NIGHTS = "nights"
_ORPHAN_S = 15.0
"""Seconds to wait for the lock of a killed night: its other ranks take some time to exit."""


@dataclass(frozen=True)
class Night:
    """The record of a night.

    Attributes:
        day: day of the new log, as ``YYYY-MM-DD``.
        previous: day of the previous model in use; None if there was none.
        metric: the deciding figure.
        figure: the figure of the new model, on the day's held-out rows.
        previous_figure: the figure of the previous model, on the same rows.
        promoted: whether the new model was promoted.
        report: the new model's report.
    """

    day: str
    previous: str | None = None
    metric: str | None = None
    figure: float | None = None
    previous_figure: float | None = None
    promoted: bool | None = None
    report: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether the night is complete."""
        return self.promoted is not None


class Nights:
    """The folder of all nights of a configuration. Rank 0.

    Args:
        config: the configuration; ``run.name`` is the name of the folder.
    """

    def __init__(self, config: Config) -> None:
        self._config, self.folder = config, config.run_dir

    @property
    def pointer(self) -> Path:
        """The file that names the run in use."""
        return self.folder / CURRENT

    @property
    def current(self) -> str | None:
        """The day of the model in use."""
        with write_errors_to_user(self.folder):
            return follow_pointer(self.pointer).name if self.pointer.is_file() else None

    def read(self, day: str) -> Night | None:
        """The record of a night; None if it has not started."""
        path = self.record(day)
        with write_errors_to_user(path):
            return _read(path) if path.is_file() else None

    def write(self, night: Night) -> None:
        """Records a night, and lists all nights in ``nights.csv``."""
        path = self.record(night.day)
        with write_errors_to_user(path):
            with atomic_write(path) as file:
                file.write_text(json.dumps(asdict(night), indent=2) + "\n")
            text = io.StringIO()
            lines = csv.DictWriter(text, [*asdict(night)])
            lines.writeheader()
            lines.writerows(asdict(one) for one in self._all())
            with atomic_write(self.folder / f"{_NIGHTS}.csv") as file:
                file.write_text(text.getvalue())

    def promote(self, day: str) -> None:
        """Puts a day's model in use, atomically."""
        with write_errors_to_user(self.pointer), atomic_write(self.pointer) as file:
            file.write_text(f"{day}\n")

    def delete_old(self, keep: int) -> list[str]:
        """Deletes runs and datasets of old nights.

        The model in use and its predecessor are always kept.

        Args:
            keep: number of latest nights.

        Returns:
            The days whose runs and datasets were deleted.
        """
        previous = {night.day: night.previous for night in self._all()}
        days, current = sorted(previous, reverse=True), self.current
        needed = {*days[:keep], current, previous.get(current) if current else None}
        deleted = []
        for day in (day for day in days if day not in needed):
            run, dataset = self.folder / day, prepared_dir(self._config, day)
            if run.exists() or dataset.exists():
                delete_tree(run)
                delete_tree(dataset)
                if is_remote(dataset):
                    delete_tree(copy_path(dataset, self._config.run.cache_root))
                deleted.append(day)
        return deleted

    def record(self, day: str) -> Path:
        """The file that records a night."""
        return self.folder / _NIGHTS / f"{day}.json"

    def _all(self) -> Iterator[Night]:
        for path in sorted((self.folder / _NIGHTS).iterdir(), key=lambda path: path.name):
            if path.suffix == ".json" and path.name[:1] != ".":
                yield _read(path)


def _read(path: Path) -> Night:
    """Reads a record.

    Raises:
        DataError: the file is damaged or of another version.
    """
    try:
        return Night(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not the record of a night ({error}); delete it") from None


def nightly(config: Config, day: date) -> Night | None:
    """Trains on a day's log, compares with the model in use, promotes the better one. All ranks.

    Args:
        config: the settings, with places for the day in the names of files.
        day: the day of the new log.

    Returns:
        The record on rank 0; None elsewhere, or if a signal stopped it: rerun the same command to
        continue.

    Raises:
        ConfigError: no file name contains the day, held-out rows could overlap training rows of the
            model in use, a later day was trained, or the run in use is missing.
        DataError: the day's log is missing or has no rows.
        InUse: another process is running a night.
        DeepFMError: training or evaluation failed.
    """
    check_settings(config)
    nights = Nights(config)
    lock = Lock(config.run_dir / _NIGHTS, str(config.run_dir), "choose another run.name")
    with process_group(*config.run.process_group) as world, world.hold_on_rank0(lock, _ORPHAN_S):
        begin = partial(_begin, config, nights, f"{day}")
        begun = world.broadcast(world.run_on_rank0("begin", begin))
        assert begun is not None
        night = begun
        if not begun.is_over:
            # All ranks use rank 0's settings, since files may appear in the meantime.
            made = world.run_on_rank0(
                "settings", lambda: settings_of_day(config, day, begun.previous)
            )
            config_of_day = world.broadcast(made)
            assert config_of_day is not None
            if train_on(config_of_day, _with_name(world, "train")).stopped:
                return None
            night = _decide(config, config_of_day, begun, world)
        return world.run_on_rank0("end", lambda: _end(config, nights, night))


def check_settings(config: Config) -> None:
    """Checks for errors that would recur every night.

    Raises:
        ConfigError: no file name contains the day, or held-out rows could overlap training rows of
            the model in use.
    """
    split, file = config.data.split, config.data.interactions.file
    held_out = names_of(split.test_file) if split.test_file else ()
    if not any(map(names_day, (*names_of(file), *held_out))):
        raise ConfigError(
            f"data.interactions.file={','.join(names_of(file))}: is the same file every night; "
            f"put the day in its name, such as data.interactions.file=clicks/{{day-1..day}}.csv"
        )
    newest = split.method == "temporal" or config.data.interactions.split is not None
    if not (newest or any(map(names_day, held_out))):
        raise ConfigError(
            f"data.split.method={split.method}: holds out rows of days that the model in use was "
            f"trained on; set data.split.method=temporal, or data.split.test_file to a file of the "
            f"day"
        )


def prepared_dir(config: Config, day: str) -> Path:
    """The prepared dataset of a day."""
    return folder_of(config.run.prepared_root) / (config.data.name or config.run.name) / day


def settings_of_day(config: Config, day: date, previous: str | None) -> Config:
    """The configuration of a day's run.

    Args:
        config: the settings of all nights.
        day: the day.
        previous: the day of the model in use; None for the first.

    Raises:
        CheckpointError: the run of the model in use has no complete checkpoint.
        DataError: the day's log is missing or empty.
    """
    _check_log(config, day)
    settings: dict[str, Any] = {
        "run.name": f"{config.run.name}/{day}",
        "data": _filled_in(config.model_dump(mode="json")["data"], config, day),
        "data.name": f"{config.data.name or config.run.name}/{day}",
    }
    if previous is not None:
        settings["data.vocabulary_from"] = str(prepared_dir(config, previous))
        run = config.run_dir / previous
        if _starts_from_regression(run):
            log.info(
                "%s starts from a logistic regression and ends with models of folds, which a warm "
                "start would do without: this night's model is trained from scratch",
                run,
            )
        else:
            settings["checkpoint.start_from"] = str(run)
    return with_settings(config, settings)


def _starts_from_regression(run: Path) -> bool:
    """Whether a run's first-order weights start from a logistic regression (few click rows)."""
    settings = settings_in(read_checkpoint(run, "auto", ()).state)
    return bool(settings["model"].get("linear") == "logistic")


def _check_log(config: Config, day: date) -> None:
    """Checks that the newest log has rows: otherwise earlier days would be trained again.

    Raises:
        DataError: it is missing or has none.
    """
    interactions = config.data.interactions
    texts = [text for text in names_of(interactions.file) if names_day(text)]
    days = [named for text in texts for named in on_day(text, day)]
    if not days:
        return
    newest = max(file_day for _, file_day in days)
    names = tuple(name for name, file_day in days if file_day == newest)
    columns = interactions.user, interactions.item, interactions.label
    layouts = {on_day(name, day)[0][0]: layout for name, layout in config.data.files.items()}
    for file in find_files(config.input_root, names):
        layout = layouts.get(file.name) or layouts.get(file.pattern)
        with suppress(EmptyFile):
            find_lists(file.path, [*filter(None, columns)][:1], layout, file.pattern)
            return
    raise DataError(
        f"{label_of(names)}: no rows, so there is nothing new to train on; run the night again "
        f"once the log of {newest} is complete"
    )


def _filled_in(tree: Any, config: Config, day: date) -> Any:
    """Settings with the day placeholders in file names filled in.

    Missing logs of earlier days are skipped: the first nights have none.
    """
    if isinstance(tree, dict):
        return {
            key: _names(value, config, day)
            if key in ("file", "valid_file", "test_file") and value is not None
            else {on_day(name, day)[0][0]: layout for name, layout in value.items()}
            if key == "files"
            else _filled_in(value, config, day)
            for key, value in tree.items()
        }
    return [_filled_in(value, config, day) for value in tree] if isinstance(tree, list) else tree


def _names(files: Any, config: Config, day: date) -> Any:
    texts = [files] if isinstance(files, str) else files
    if not any(map(names_day, texts)):
        return files
    names = []
    for text in texts:
        for name, file_day in on_day(text, day):
            try:
                if file_day < day and names_day(text):
                    find_files(config.input_root, name)
            except DataError as error:
                log.warning("%s: left out: %s", name, error)
            else:
                names.append(name)
    return names


def _with_name(world: World, name: str) -> World:
    """The same ranks with a separate store prefix, so that jobs do not see each other's keys."""
    return replace(world, store=PrefixStore(name, world.store))


def _begin(config: Config, nights: Nights, day: str) -> Night:
    """The existing record of the night, or a new one. Rank 0."""
    night, current = nights.read(day), nights.current
    if current is not None:
        _check_is_day(nights, current)
        if current > day or (night is None and current == day):
            raise ConfigError(
                f"--day {day}: the model in use was trained on {current}; give a later --day"
            )
    if night is None:
        if current is not None and (missing := _missing(config, current)):
            raise ConfigError(
                f"{nights.pointer}: names {current}, but {missing} is not complete or not there; "
                f"write the day of another run into it, or delete it to train a first model"
            )
        night = Night(day, previous=current)
        nights.write(night)
    elif night.is_over:
        log.warning("%s: this night is already complete", nights.folder / day)
    elif night.previous is not None and (missing := _missing(config, night.previous)):
        raise ConfigError(
            f"{nights.record(day)}: this night starts from {night.previous}, but {missing} is not "
            f"complete or not there; delete this file and {nights.folder / day} to begin it again"
        )
    return night


def _check_is_day(nights: Nights, name: str) -> None:
    """Checks the name of the run in use, which may have been edited by hand.

    Raises:
        ConfigError: it is not a day.
    """
    try:
        date.fromisoformat(name)
    except ValueError:
        raise ConfigError(
            f"{nights.pointer}: names {name}, but nights are named by their day; write the day of "
            f"one into it, such as 2026-11-30"
        ) from None


def _missing(config: Config, day: str) -> Path | None:
    """The missing run or dataset of an earlier night, if any."""
    run, dataset = config.run_dir / day, prepared_dir(config, day)
    if not complete_steps(run):
        return run
    return dataset if Manifest.find(dataset) is None else None


def _decide(config: Config, config_of_day: Config, night: Night, world: World) -> Night:
    """Measures both models on the day's held-out rows. All ranks.

    Returns:
        The night with figures and decision on rank 0; unchanged elsewhere.

    Raises:
        ConfigError: ``nightly.metric`` is not measured.
    """
    before: Mapping[str, float] | None = None
    if night.previous is not None:
        weights = config.run_dir / night.previous
        before = measure_weights(config_of_day, weights, _with_name(world, "before"))
    evaluation = evaluate_on(config_of_day, (), _with_name(world, "evaluate"))

    def decide() -> Night:
        assert evaluation is not None
        if night.previous is not None:
            _warn_of_known_rows(config, night.day, night.previous)
        default = "log_loss" if evaluation.comparison is None else f"ndcg@{max(config.evaluate.k)}"
        metric = config.nightly.metric or default
        figure = _figure(metric, evaluation.figures)
        previous = None if before is None else _figure(metric, before)
        return replace(
            night,
            metric=metric,
            figure=figure,
            previous_figure=previous,
            promoted=is_no_worse(figure, previous, config.nightly.tolerance, metric),
            report=str(evaluation.report),
        )

    return world.run_on_rank0("decide", decide) or night


def _figure(metric: str, figures: Mapping[str, float]) -> float:
    if metric not in figures:
        known = ", ".join(figures)
        raise ConfigError(f"nightly.metric={metric}: is not measured; choose from {known}")
    return float(figures[metric])


def is_no_worse(figure: float, previous: float | None, tolerance: float, metric: str) -> bool:
    """Whether a model is promoted.

    Args:
        figure: the figure of the new model.
        previous: the figure of the model in use, if any.
        tolerance: share of the previous figure by which the new one may be worse.
        metric: its name, which determines whether lower is better.
    """
    if not math.isfinite(figure):
        return False
    if previous is None or not math.isfinite(previous):
        return True
    loss = figure - previous if is_lower_better(metric) else previous - figure
    return loss <= tolerance * abs(previous)


def _warn_of_known_rows(config: Config, day: str, previous: str) -> None:
    """Warns about held-out rows that the model in use may have been trained on. Rank 0."""
    if config.data.split.method != "temporal" or config.data.interactions.split is not None:
        return
    before = _dataset(config, previous)
    latest = max(float(times.max()) for times in map(partial(_times, before), SPLITS) if len(times))
    times = _times(_dataset(config, day), config.evaluate.split)
    known = int((times <= latest).sum())
    if known:
        log.warning(
            "%s of %s held-out rows are no newer than the rows of %s, which the model in use may "
            "have been trained on, so that its figures are too good; lower data.split.valid and "
            "data.split.test, or name fewer earlier days in data.interactions.file",
            f"{known:,}",
            f"{len(times):,}",
            previous,
        )


def _dataset(config: Config, day: str) -> PreparedDataset:
    """The dataset of a day, or its local copy."""
    return PreparedDataset(local_copy(prepared_dir(config, day), config.run.cache_root))


def _times(dataset: PreparedDataset, split: str) -> npt.NDArray[np.float64]:
    """Times of a split's rows, in the units of the input."""
    table = pq.read_table(dataset.folder / split, columns=["time"])
    return table["time"].to_numpy() / dataset.manifest.time_scale


def _end(config: Config, nights: Nights, night: Night) -> Night:
    """Records and carries out the decision. Rank 0."""
    nights.write(night)
    if night.promoted and (nights.current or "") < night.day:
        nights.promote(night.day)
    for day in nights.delete_old(config.nightly.keep_days):
        log.info("%s: deleted the run and its dataset", nights.folder / day)
    return night
