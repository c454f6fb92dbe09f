"""Follows a pointer file: the service answers with the model of the run that it names."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from deepfm_dist.messages import brief
from deepfm_dist.serving.live import Recommender
from deepfm_dist.serving.replacement import Status
from deepfm_dist.serving.workers import Generations
from deepfm_dist.storage import follow_pointer

POLL_S = 2.0
"""Seconds between checks of the pointer."""
RETRY_S = 60.0
"""Seconds until a failed load is retried."""
log = logging.getLogger(__name__)


class PointerFollower:
    """Serves the model that a pointer names, and switches when it changes.

    The workers of the model in use answer until those of the new one do. A model that cannot be
    loaded is logged once, and retried every `RETRY_S`.

    Args:
        generations: load and serve models.
        load: loads the model of a run's folder, or of the command's settings for None.
        pointer: the file that names the run in use; None: the first model stays.
        folder: the folder of the service, for its status.
    """

    def __init__(
        self,
        generations: Generations,
        load: Callable[[Path | None], Recommender],
        pointer: Path | None,
        folder: Path,
    ) -> None:
        self._generations, self._load, self._pointer = generations, load, pointer
        self._folder, self._status = folder, Status()
        self._served: Path | None = None
        self._failed: Path | None = None
        self._retry_at = 0.0

    def load_first(self) -> None:
        """Loads the first model; until then, workers without one answer.

        Raises:
            Exception: loading failed.
        """
        self._generations.start_without_model()
        self._served = follow_pointer(self._pointer) if self._pointer else None
        self._replace(self._served)

    def follow(self) -> NoReturn:
        """Checks the pointer and the workers in an endless loop."""
        while True:
            self._generations.wait(POLL_S)
            try:
                named = follow_pointer(self._pointer) if self._pointer else None
            except Exception as error:  # the pointer may be corrected later
                self._keep(brief(error))
                continue
            if named == self._served and self._generations.is_alive:
                self._failed = None
                self._set(problem=None)
            elif named != self._failed or time.monotonic() >= self._retry_at:
                self._try_to_replace(named)

    def _try_to_replace(self, named: Path | None) -> None:
        before = self._served
        try:
            self._replace(named)
        except Exception as error:  # a broken model must not stop the service
            self._set(failed=self._status.failed + 1)
            self._keep(f"{named}: cannot be loaded: {brief(error)}")
            self._failed, self._retry_at = named, time.monotonic() + RETRY_S
        else:
            if named != before:
                log.info("%s is in use instead of %s", named, before)

    def _replace(self, named: Path | None) -> None:
        self._generations.replace(lambda: self._load(named))
        self._set(loaded=self._status.loaded + 1, problem=None)
        self._served, self._failed = named, None

    def _keep(self, problem: str) -> None:
        """Logs once why the model in use is not the one that the pointer names."""
        if problem != self._status.problem:
            stays = self._served.name if self._served else "the model"
            log.warning("%s; %s stays in use", problem, stays)
        self._set(problem=problem)

    def _set(self, **changes: Any) -> None:
        status = replace(self._status, **changes)
        if status != self._status:
            self._status = status
            status.write(self._folder)
