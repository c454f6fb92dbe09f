"""The model in use by a worker, and the status of its replacement."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from deepfm_dist.serving.live import Recommender
from deepfm_dist.storage import atomic_write


class NotReady(Exception):
    """No model is loaded yet."""


@dataclass(frozen=True)
class Status:
    """The status that the command shares with its workers.

    Attributes:
        loaded: number of loaded models, including the first.
        failed: number of failed loads.
        problem: why the model that the pointer names is not in use; None if it is in use or
            loading.
    """

    loaded: int = 0
    failed: int = 0
    problem: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The status in a service's folder."""
        file = folder / "status.json"
        return cls(**json.loads(file.read_bytes())) if file.exists() else cls()

    def write(self, folder: Path) -> None:
        """Replaces the status in a service's folder."""
        with atomic_write(folder / "status.json") as file:
            file.write_text(json.dumps(asdict(self)))


class ModelInUse(Collector):
    """A worker's model, and its Prometheus metrics.

    Args:
        recommender: the model; None while it is loading.
        folder: the folder of the service, with its status; None for a single process.

    Attributes:
        folder: see above.
        is_retiring: whether this model, or the lack of one, has been replaced: clients are asked to
            close their connections.
    """

    def __init__(self, recommender: Recommender | None = None, folder: Path | None = None) -> None:
        self._recommender, self.folder = recommender, folder
        self.is_retiring = recommender is None

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

    @property
    def status(self) -> Status:
        """The state of the service and of its replacement."""
        if self.folder is None:
            return Status(loaded=int(self.is_ready))
        return Status.read(self.folder)

    def collect(self) -> Iterator[Metric]:
        """The figures of the model, for Prometheus."""
        status = self.status
        loads = CounterMetricFamily(
            "deepfm_model_loads", "Models loaded, the first one included.", labels=["result"]
        )
        loads.add_metric(["loaded"], status.loaded)
        loads.add_metric(["failed"], status.failed)
        yield loads
        yield GaugeMetricFamily(
            "deepfm_model_outdated",
            "1: the run that the pointer names could not be loaded.",
            value=float(status.problem is not None),
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
