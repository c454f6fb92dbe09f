"""The model in use, and its replacement by the one that a pointer names."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deepfm_dist.messages import brief
from deepfm_dist.serving.live import Recommender
from deepfm_dist.storage import follow_pointer

POLL_S = 2.0
"""Seconds between two looks at the pointer."""
RETRY_S = 60.0
"""Seconds until a model that could not be loaded is tried again."""
log = logging.getLogger(__name__)


class NotReady(Exception):
    """No model is loaded yet."""


class ModelInUse(Collector):
    """The model that answers requests, and what Prometheus is shown of it.

    A request takes the model once, at its start. One that has been replaced is freed after its last
    request.

    Args:
        recommender: the first model; None: it is still to be loaded.

    Attributes:
        problem: why the model that the pointer names is not in use; None: it is, or is
            being loaded.
        failures: number of times that a new model could not be loaded.
    """

    def __init__(self, recommender: Recommender | None = None) -> None:
        self._recommender = recommender
        self.problem: str | None = None
        self._loaded = self.failures = 0

    @property
    def recommender(self) -> Recommender:
        """The model for a request.

        Raises:
            NotReady: no model is loaded yet.
        """
        if self._recommender is None:
            raise NotReady
        return self._recommender

    @property
    def is_ready(self) -> bool:
        """Whether a model is loaded."""
        return self._recommender is not None

    def replace(self, recommender: Recommender) -> None:
        """Takes another model for the requests from now on."""
        self._recommender, self.problem = recommender, None
        self._loaded += 1

    def collect(self) -> Iterator[Metric]:
        """The figures of the model, for Prometheus."""
        loads = CounterMetricFamily(
            "deepfm_model_loads", "Models loaded, the first one included.", labels=["result"]
        )
        loads.add_metric(["loaded"], self._loaded)
        loads.add_metric(["failed"], self.failures)
        yield loads
        yield GaugeMetricFamily(
            "deepfm_model_outdated",
            "1: the run that the pointer names could not be loaded.",
            value=float(self.problem is not None),
        )
        if self._recommender is not None:
            labels = [self._recommender.name, str(self._recommender.step)]
            info = GaugeMetricFamily("deepfm_model", "The model in use.", labels=["run", "step"])
            info.add_metric(labels, 1)
            yield info
            yield GaugeMetricFamily(
                "deepfm_model_age_seconds",
                "Seconds since the checkpoint in use was saved.",
                value=age_s(self._recommender),
            )


def age_s(recommender: Recommender) -> float:
    """Seconds since a model's checkpoint was saved."""
    return max(0.0, time.time() - recommender.saved_at)


class Loading(threading.Thread):
    """Loads the first model, and then each one that the pointer names.

    Requests are answered meanwhile. A model that cannot be loaded is logged once, and tried again
    every `RETRY_S`.

    Args:
        model: takes the models.
        load: loads the model of a run's folder; None: of the command's own settings.
        pointer: the file that names the run in use; None: the first model stays.
        on_first: is called when the first model is loaded, or cannot be.

    Attributes:
        error: why the first model could not be loaded.
    """

    def __init__(
        self,
        model: ModelInUse,
        load: Callable[[Path | None], Recommender],
        pointer: Path | None,
        on_first: Callable[[BaseException | None], None],
    ) -> None:
        super().__init__(name="model-loading", daemon=True)
        self._model, self._load, self._pointer = model, load, pointer
        self._on_first = on_first
        self._stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Loads until `stop`."""
        try:
            served = follow_pointer(self._pointer) if self._pointer else None
            self._model.replace(self._load(served))
        except BaseException as error:
            self.error = error
        self._on_first(self.error)
        if self.error is None and self._pointer is not None:
            self._follow(self._pointer, served)

    def stop(self) -> bool:
        """Stops looking at the pointer.

        Returns:
            Whether the thread has ended; else it is still loading a model.
        """
        self._stopping.set()
        self.join(1)
        return not self.is_alive()

    def _follow(self, pointer: Path, served: Path | None) -> None:
        failed, retry_at = None, 0.0
        while not self._stopping.wait(POLL_S):
            try:
                named = follow_pointer(pointer)
            except Exception as error:
                self._keep(brief(error))
                continue
            if named == served:
                self._model.problem = failed = None
                continue
            if named == failed and time.monotonic() < retry_at:
                continue
            try:
                self._model.replace(self._load(named))
            except Exception as error:  # a broken model must not end the thread
                self._model.failures += 1
                self._keep(f"{named}: cannot be loaded: {brief(error)}")
                failed, retry_at = named, time.monotonic() + RETRY_S
            else:
                log.info("%s is in use instead of %s", named, served)
                served, failed = named, None

    def _keep(self, problem: str) -> None:
        """Reports once why the model in use is not the one that the pointer names."""
        if problem != self._model.problem:
            log.warning("%s; %s stays in use", problem, self._model.recommender.name)
        self._model.problem = problem
