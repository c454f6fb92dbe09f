"""What a run says: lines for people, JSON Lines for machines. Rank 0 only."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from deepfm_dist.errors import DeepFMError


@contextmanager
def progress(total: int, description: str, unit: str, is_first: bool) -> Iterator[Any]:
    """A progress bar on stderr, log lines above it.

    Args:
        total: units to go.
        description: what goes on.
        unit: what is counted.
        is_first: whether this is rank 0; the others show nothing, nor does rank 0 where stderr is
            no terminal or the log is quiet.

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
        disable=not shown,
        leave=False,
    )
    with logging_redirect_tqdm(), bar:
        yield bar


class MetricsLog:
    """Appends events to ``metrics.jsonl``.

    Args:
        folder: of the run; made if missing.
        is_first: whether this rank writes.
        fresh: whether to start the file anew.

    Raises:
        DeepFMError: the folder cannot be written.
    """

    def __init__(self, folder: Path, is_first: bool, fresh: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        self._is_first = is_first
        if not is_first:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("w" if fresh else "a"):
                pass
        except OSError as error:
            raise DeepFMError(
                f"{folder}: cannot be written: {error.strerror}; set run.runs_root to a folder "
                f"of yours"
            ) from None

    def write(self, event: str, **values: Any) -> None:
        """Appends one event as a line of JSON."""
        if self._is_first:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event} | values) + "\n")
