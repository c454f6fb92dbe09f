"""Output during a run: progress bars, metrics.jsonl, TensorBoard. Rank 0 only."""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from deepfm_dist.errors import DeepFMError
from deepfm_dist.events import Event, TrainEvent
from deepfm_dist.messages import brief, plural
from deepfm_dist.storage import is_of_storage, is_remote, write_errors_to_user

log = logging.getLogger(__name__)


@contextmanager
def progress(
    total: int, description: str, unit: str, is_first: bool, done: int = 0
) -> Iterator[Any]:
    """A progress bar on stderr, with log lines above it.

    Args:
        total: number of units.
        description: label of the bar.
        unit: the unit of the count, such as ``step``.
        is_first: whether this is rank 0; other ranks show nothing, nor does rank 0 if stderr is
            neither a terminal nor a notebook, or logging is quiet.
        done: units already done.

    Yields:
        The bar; ``update(n)`` moves it.
    """
    quiet = logging.getLogger("deepfm_dist").level > logging.INFO
    notebook = _in_notebook()
    shown = is_first and (sys.stderr.isatty() or notebook) and not quiet
    scale = total >= 1_000_000
    bar = tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=scale,
        initial=done,
        disable=not shown,
        leave=False,
        # Notebooks have no cursor to move up from the line of a bar within another.
        position=0 if notebook else None,
    )
    # It replaces the root logger's handlers and restores them afterwards. That is not thread-safe,
    # so it is done only by the one thread that shows a bar.
    with logging_redirect_tqdm() if shown else nullcontext(), bar:
        yield bar


@contextmanager
def warn_if_unwritable(consequence: str) -> Iterator[None]:
    """Warns if files that accompany a command's result cannot be written; the result is not lost.

    Args:
        consequence: the consequence of the failure, and what to do; ends the warning.
    """
    try:
        yield
    except DeepFMError as error:
        log.warning("%s; %s", str(error).partition("; ")[0], consequence)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel shows what this process writes."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


Logger = Callable[[str, Mapping[str, Any]], None]
"""Called with the name and values of each event; its ``close``, if any, is called at the end."""


class TensorBoard:
    """Writes every number of an event that has a step as a scalar.

    Args:
        folder: the folder of TensorBoard's files.
        from_step: later steps in earlier files are no longer shown.

    Raises:
        DeepFMError: it cannot be written.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder = folder
        with write_errors_to_user(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=from_step + 1)
        self._flushes = not is_remote(folder)  # one upload per event would delay training

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        """Writes ``event/name`` at ``step``."""
        if "step" not in values:
            return
        with write_errors_to_user(self._folder):
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, values["step"])
            if self._flushes:
                self._writer.flush()

    def close(self) -> None:
        """Flushes pending events and ends the writer's thread."""
        self._writer.close()


class MetricsLog:
    """Writes a run's events to ``metrics.jsonl``, one per line, and to the other loggers.

    An object store cannot append. There the full file is uploaded, by `flush` and with every event
    other than training figures.

    Args:
        folder: the folder of the run; created if missing.
        is_first: whether this rank writes.
        from_step: events of later steps are dropped, since a resumed run writes them again; None:
            keep all.
        loggers: further loggers of the events.

    Raises:
        DeepFMError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        is_first: bool,
        from_step: int | None = None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._is_first, self._loggers = is_first, [*loggers]
        self._uploads, self._text = is_remote(folder), b""
        if not is_first:
            return
        with write_errors_to_user(folder):
            if not self._uploads:
                folder.mkdir(parents=True, exist_ok=True)
            stored = self.path.read_bytes() if self.path.exists() else None
            lines = (stored or b"").splitlines(True)
            kept = [line for line in lines if _step_of(line) is not None]
            if dropped := len([line for line in lines if line.strip()]) - len(kept):
                log.warning("%s: dropped %s", self.path, plural(dropped, "damaged line"))
            if from_step is not None:
                kept = [line for line in kept if from_step and (_step_of(line) or 0) <= from_step]
            self._text = b"".join(kept)
            if stored != self._text:
                self.path.write_bytes(self._text)

    def write(self, event: Event) -> None:
        """Appends one event; NaN, which JSON does not know, becomes null.

        Raises:
            DeepFMError: the disk is full, for example.
        """
        if not self._is_first:
            return
        line = event.line().encode()
        if self._uploads:
            self._text += line
            if not isinstance(event, TrainEvent):
                self.flush()
        else:
            with write_errors_to_user(self.path), self.path.open("ab") as file:
                file.write(line)
        for logger in [*self._loggers]:
            try:
                logger(event.event, event.values())
            except DeepFMError:
                raise
            except Exception as error:  # custom code or a network error
                name = getattr(logger, "__name__", type(logger).__name__)
                log.warning(
                    "run.loggers: %s failed and is not called again: %s", name, brief(error)
                )
                self._loggers.remove(logger)

    def flush(self) -> None:
        """Flushes to disk, so that a resumed run reads every line."""
        if self._is_first and self._uploads:
            with _storage_errors_to_warnings(f"{self.path}: not written, later"):
                self.path.write_bytes(self._text)

    def close(self) -> None:
        """Flushes and closes the loggers."""
        for logger in self._loggers:
            if close := getattr(logger, "close", None):
                with _storage_errors_to_warnings(
                    f"{self.path.parent}: {type(logger).__name__}: not written"
                ):
                    close()


@contextmanager
def _storage_errors_to_warnings(what: str) -> Iterator[None]:
    """Turns a file system's failure into a warning: nothing else depends on these files."""
    try:
        yield
    except Exception as error:
        if not is_of_storage(error):
            raise
        log.warning("%s: %s", what, brief(error))


def _step_of(line: bytes) -> int | None:
    """The step of an event's line, 0 if it has none; None for a damaged line."""
    try:
        event = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    step = event.get("step")
    return step if isinstance(step, int) else 0
