"""What a run says: lines for people, JSON Lines for machines. Rank 0 only."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from deepfm_dist.errors import DeepFMError
from deepfm_dist.storage import brief, is_of_storage, is_remote, writing

log = logging.getLogger(__name__)


@contextmanager
def progress(
    total: int, description: str, unit: str, is_first: bool, done: int = 0
) -> Iterator[Any]:
    """A progress bar on stderr, log lines above it.

    Args:
        total: units to go.
        description: what goes on.
        unit: what is counted.
        is_first: whether this is rank 0; the others show nothing, nor does rank 0 where stderr is
            no terminal or the log is quiet.
        done: units done before.

    Yields:
        The bar; ``update(n)`` moves it.
    """
    quiet = logging.getLogger("deepfm_dist").level > logging.INFO
    shown = is_first and sys.stderr.isatty() and not quiet
    scale = total >= 1_000_000
    bar = tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=scale,
        initial=done,
        disable=not shown,
        leave=False,
    )
    with logging_redirect_tqdm(), bar:
        yield bar


Logger = Callable[[str, Mapping[str, Any]], None]
"""Hears of an event: its name and its values; where it has a ``close``, also of the end."""


class TensorBoard:
    """Writes every number of an event that has a step as a scalar.

    Args:
        folder: of TensorBoard's files.
        from_step: what earlier files have of later steps is shown no more.

    Raises:
        DeepFMError: it cannot be written.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder = folder
        with writing(folder):
            self._writer: Any = SummaryWriter(str(folder), purge_step=from_step + 1)
        self._flushes = not is_remote(folder)  # an upload each would hold training up

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        """Writes ``event/name`` at ``step``."""
        if "step" not in values:
            return
        with writing(self._folder):
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, values["step"])
            if self._flushes:
                self._writer.flush()

    def close(self) -> None:
        """Writes what is not written yet, and ends the writer's thread."""
        self._writer.close()


class MetricsLog:
    """Events of a run: a line of JSON each in ``metrics.jsonl``, and what else is to hear of them.

    An object store cannot append. There the file is written anew, and not for each line of training
    figures: only with other events and by `flush`.

    Args:
        folder: of the run; made if missing.
        is_first: whether this rank writes.
        from_step: events of later steps are dropped: a resumed run writes them anew; None: none is.
        loggers: what else hears of events.

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
        self._uploads, self._text = is_remote(folder), ""
        if not is_first:
            return
        with writing(folder):
            if not self._uploads:
                folder.mkdir(parents=True, exist_ok=True)
            found = self.path.read_text() if self.path.exists() else None
            kept = [line for line in (found or "").splitlines(True) if _is_whole(line)]
            if from_step is not None:
                kept = [x for x in kept if from_step and json.loads(x).get("step", 0) <= from_step]
            self._text = "".join(kept)
            if found != self._text:
                self.path.write_text(self._text)

    def write(self, event: str, **values: Any) -> None:
        """Appends one event; NaN, which JSON does not know, becomes null.

        Raises:
            DeepFMError: the disk is full, say.
        """
        if not self._is_first:
            return
        line = json.dumps({"event": event} | _without_nan(values)) + "\n"
        if self._uploads:
            self._text += line
            if event != "train":
                self.flush()
        else:
            with writing(self.path), self.path.open("a") as file:
                file.write(line)
        for logger in [*self._loggers]:
            try:
                logger(event, values)
            except DeepFMError:
                raise
            except Exception as error:  # somebody else's code, or the network's fault
                name = getattr(logger, "__name__", type(logger).__name__)
                log.warning("run.loggers: %s failed and is not told more: %s", name, brief(error))
                self._loggers.remove(logger)

    def flush(self) -> None:
        """Makes what was written last: a run that goes on from here finds it."""
        if self._is_first and self._uploads:
            with _warned(f"{self.path}: not written, later"):
                self.path.write_text(self._text)

    def close(self) -> None:
        """Nothing comes any more: loggers write what they hold."""
        for logger in self._loggers:
            if close := getattr(logger, "close", None):
                with _warned(f"{self.path.parent}: {type(logger).__name__}: not written"):
                    close()


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """A file system's failure becomes a warning: nothing else depends on these files."""
    try:
        yield
    except Exception as error:
        if not is_of_storage(error):
            raise
        log.warning("%s: %s", what, brief(error))


def _is_whole(line: str) -> bool:
    """Whether a line is an event: one that a kill or a full disk cut short is none."""
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
