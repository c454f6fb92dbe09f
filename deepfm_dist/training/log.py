"""What a run says: lines for people, JSON Lines for machines. Rank 0 only."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from deepfm_dist.errors import DeepFMError

__all__ = ["MetricsLog", "logging_redirect_tqdm", "progress"]

log = logging.getLogger(__name__)


def progress(total: int, description: str, unit: str, is_first: bool, initial: int = 0) -> Any:
    """A progress bar on stderr; silent on other ranks and where stderr is no terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        disable=not (is_first and sys.stderr.isatty()),
        leave=False,
    )


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
