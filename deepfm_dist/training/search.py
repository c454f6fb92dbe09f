"""A hyperparameter search by optuna, kept on disk."""

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepfm_dist.errors import ConfigError, InUse
from deepfm_dist.lock import Lock
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed
from deepfm_dist.storage import write_errors_to_user
from deepfm_dist.training.settings import SpanConfig, TuneConfig

log = logging.getLogger(__name__)
_CHOOSING_S = 60.0
"""Seconds to wait while other processes choose what to try."""


@dataclass(frozen=True)
class Trial:
    """Settings to try.

    Attributes:
        name: the name of the trial.
        values: the values, by setting.
        outcome: complete, pruned, failed, or None while it is open.
        best: best value of the watched figure; None if it was never finite.
    """

    name: str
    values: dict[str, Any]
    outcome: str | None = None
    best: float | None = None


class Search:
    """A study: the settings tried, their results, and what to try next. Rank 0.

    What a trial tries depends on the seed and the earlier trials, so a resumed search tries the
    same settings as an uninterrupted one. Several processes may search in one
    study: each holds a lock on the trial that it trains. An open trial whose lock is free has lost
        its process; the next process that asks takes it over, under the same name.

    Args:
        folder: the folder of the study's file; an existing study is resumed.
        config: what to vary, and whether a trial ends when its best figure so far is worse than the
            median of the earlier trials' at the same epoch; the first four trials, and the first
            epoch of each, are left alone.
        lower_is_better: whether a smaller monitored figure is better.
        seed: the seed of the suggestions.
        of: the other settings that trials share, as JSON values; trials that differ in them cannot
            be compared.

    Raises:
        ConfigError: the library is not installed, or the existing study is of another search.
        DeepFMError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: TuneConfig,
        lower_is_better: bool,
        seed: int,
        of: Any = None,
    ) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "tune needs the library optuna, which is not installed; pip install optuna"
            )
        import optuna
        from optuna.storages import JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path = folder / "study.log"
        with write_errors_to_user(folder):
            folder.mkdir(parents=True, exist_ok=True)
            journal = _journal(self.path)
        self._optuna, self._space, self._seed = optuna, config.space, seed
        self._lower = lower_is_better
        space = config.model_dump(mode="json")["space"]
        asked = json.dumps({"space": space, "lower": lower_is_better, "seed": seed, "of": of})
        with self._alone():
            self._study = optuna.create_study(
                storage=JournalStorage(journal),
                study_name="tune",
                direction="minimize" if lower_is_better else "maximize",
                load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
                if config.prune
                else optuna.pruners.NopPruner(),
            )
            if self._study.user_attrs.get("asked", asked) != asked:
                raise ConfigError(
                    f"{self.path}: the study of another search (space, figure, seed, or settings "
                    f"of data, model or training differ); choose another run.name, or remove the "
                    f"folder"
                )
            self._study.set_user_attr("asked", asked)
        if journal.skipped:
            text = "%s: skipped %s; the trials recorded there are lost"
            log.warning(text, self.path, plural(len(journal.skipped), "damaged line"))
        self._open: Any = None
        self._lock: Lock | None = None  # of the open trial
        self._reported: set[int] = set()  # epochs of the open trial that were reported

    def next(self, trials: int) -> Trial | None:
        """The next trial; None when that many trials are over or open in other processes.

        Trials that lost their process come first.
        """
        state = self._optuna.trial.TrialState
        with self._alone():
            for old in self._study.get_trials(states=(state.RUNNING,)):
                name = _name(old)
                lock = self._lock_of(name)
                try:
                    lock.acquire()
                except InUse:
                    continue
                lock.release()  # no other worker looks before the trial is recorded
                waiting = {_name(t) for t in self._study.get_trials(states=(state.WAITING,))}
                if name and name not in waiting:
                    self._study.enqueue_trial(old.params, {"name": name})
                self._study.tell(old.number, state=state.FAIL)
            known = {_name(t) for t in self._study.get_trials(deepcopy=False) if _name(t)}
            waits = bool(self._study.get_trials(deepcopy=False, states=(state.WAITING,)))
            if not waits and len(known) >= trials:
                return None
            self._study.sampler = self._optuna.samplers.TPESampler(
                seed=derive_seed(self._seed, "tune", len(known) - waits) % 2**32
            )
            self._open = self._study.ask()
            name = _name(self._open) or f"trial_{len(known):03}"
            self._open.set_user_attr("name", name)
            self._lock = self._lock_of(name)
            self._lock.acquire()
            drawn = {setting: self._drawn(setting) for setting in self._space}
        self._reported = set()
        for earlier in self._study.get_trials(deepcopy=False):  # of the same, before it was cut off
            if _name(earlier) == name and earlier.number != self._open.number:
                for epoch, figure in earlier.intermediate_values.items():
                    self._report(figure, epoch)
        return Trial(name, drawn)

    def _alone(self) -> AbstractContextManager[object]:
        """Keeps other processes from choosing a trial meanwhile."""
        return Lock(self.path, str(self.path), "choose another run.name").waiting(_CHOOSING_S)

    def _lock_of(self, name: str) -> Lock:
        return Lock(self.path.with_name(f"{name}.worker"), name, "choose another run.name")

    def close(self) -> None:
        """Leaves the open trial, if any, to the next process that searches."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def n_elsewhere(self) -> int:
        """Number of trials open in other processes."""
        state = self._optuna.trial.TrialState
        open_ones = self._study.get_trials(deepcopy=False, states=(state.RUNNING, state.WAITING))
        return len({_name(trial) for trial in open_ones})

    def report(self, epoch: int, figure: float) -> bool:
        """Reports the monitored figure after ``epoch`` epochs.

        Returns:
            Whether to prune the trial.
        """
        if np.isfinite(figure):
            self._report(figure, epoch)
        return bool(self._open.should_prune())

    def _report(self, figure: float, epoch: int) -> None:
        """A resumed trial reports some validations twice, with the same figures."""
        if epoch not in self._reported:
            self._reported.add(epoch)
            self._open.report(figure, epoch)

    def over(self, outcome: str, best: float | None) -> None:
        """Ends the open trial: complete, pruned or failed."""
        state = self._optuna.trial.TrialState
        if outcome == "complete" and best is not None and np.isfinite(best):
            self._study.tell(self._open, best)
        else:
            self._study.tell(self._open, state=state.PRUNED if outcome == "pruned" else state.FAIL)
        self.close()

    def best(self) -> Trial | None:
        """The complete trial with the best figure; None if no trial is complete."""
        complete = [t for t in self.past() if t.outcome == "complete" and t.best is not None]
        sign = -1 if self._lower else 1
        return max(complete, key=lambda t: sign * (t.best or 0.0), default=None)

    def past(self) -> list[Trial]:
        """All finished trials, in the order of their names."""
        latest = {_name(t): t for t in self._study.get_trials(deepcopy=False) if _name(t)}
        outcomes = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            Trial(
                name,
                {setting: _decode(value) for setting, value in t.params.items()},
                outcomes[t.state.name],
                self._best_of(t),
            )
            for name, t in sorted(latest.items())
            if t.state.name in outcomes
        ]

    def _best_of(self, trial: Any) -> float | None:
        if trial.values:
            return float(trial.value)
        pick = min if self._lower else max
        return pick(trial.intermediate_values.values(), default=None)

    def _drawn(self, setting: str) -> Any:
        span = self._space[setting]
        if not isinstance(span, SpanConfig):
            return _decode(self._open.suggest_categorical(setting, [json.dumps(v) for v in span]))
        whole = isinstance(span.low, int) and isinstance(span.high, int)
        suggest = self._open.suggest_int if whole else self._open.suggest_float
        return suggest(setting, span.low, span.high, log=span.log)


def _journal(path: Path) -> Any:
    """Optuna's journal in a file; tolerates lines that a crash or a full disk cut short."""
    from optuna.storages.journal import BaseJournalBackend, JournalFileSymlinkLock

    guard = JournalFileSymlinkLock(str(path.resolve()))

    class Journal(BaseJournalBackend):
        def __init__(self) -> None:
            path.open("ab").close()
            self.skipped: set[int] = set()  # offsets of damaged lines
            self._offsets = {0: 0}  # by number of the event

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            number = max(n for n in self._offsets if n <= log_number_from)
            offset = self._offsets[number]
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return  # another process is writing it, or died while writing it
                    event = _parse(line)
                    if event is None:
                        self.skipped |= {offset} if line.strip() else set()
                    elif number >= log_number_from:
                        yield event
                    offset += len(line)
                    number += event is not None
                    self._offsets[number] = offset

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            guard.acquire()
            try:
                with path.open("r+b") as file:
                    end = file.seek(0, os.SEEK_END)
                    file.seek(max(0, end - 1))
                    cut = end > 0 and file.read(1) != b"\n"  # else both lines would be lost
                    file.seek(end)
                    text = "".join(json.dumps(entry) + "\n" for entry in logs)
                    file.write(b"\n" * cut + text.encode())
                    file.flush()
                    os.fsync(file.fileno())
            finally:
                guard.release()

    return Journal()


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "op_code" in event else None


def _name(trial: Any) -> str:
    return str(trial.user_attrs.get("name", ""))


def _decode(value: Any) -> Any:
    """Choices are kept as JSON, since some are lists."""
    return json.loads(value) if isinstance(value, str) else value
