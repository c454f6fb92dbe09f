"""The events in a run's ``metrics.jsonl``, and the reader of that file.

Writers construct the models below, readers get them back. Figures whose names depend on the task
(``log_loss``, ``auc``, ``ndcg@10``) are extra fields: numbers, or None for NaN, which JSON lacks.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

log = logging.getLogger(__name__)

Figure = int | float | None
"""None stands for NaN: the figure is undefined on its rows."""
Interval = tuple[Figure, Figure]


class _Event(BaseModel):
    """The base of all events, which are immutable."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    event: str

    def values(self) -> dict[str, Any]:
        """The fields without the event's name, for loggers."""
        return self.model_dump(exclude={"event"}, exclude_unset=True)

    def line(self) -> str:
        """The event as a line of the file; NaN becomes null."""
        return json.dumps({"event": self.event} | _without_nan(self.values())) + "\n"


class _StepEvent(_Event):
    """An event of the training loop; further fields are figures."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Figure] = Field(init=False)

    step: int
    """Optimizer steps taken."""

    def __init__(self, **values: Any) -> None:  # for mypy: the names of figures are not fixed
        super().__init__(**values)

    @property
    def figures(self) -> Mapping[str, Figure]:
        """The figures by name."""
        return self.__pydantic_extra__


class TrainEvent(_StepEvent):
    """Figures on training rows since the previous event, scored before they were learned from."""

    event: Literal["train"] = "train"
    rows_per_s: Figure = None
    """Rows per second of training, excluding validation and checkpoints."""
    seconds: dict[str, Figure] = Field(default_factory=dict)
    """Host seconds of rank 0 by phase."""
    sent_bytes: dict[str, int] = Field(default_factory=dict)
    """Bytes sent between ranks per step, by kind."""


class ValidEvent(_StepEvent):
    """A validation."""

    event: Literal["valid"] = "valid"
    epoch: int | None = None
    """Epochs completed."""


class EndEvent(_Event):
    """The end of training, or a stop."""

    event: Literal["end"] = "end"
    step: int
    """Optimizer steps taken."""
    peak_memory_gib: list[float] = Field(default_factory=list)
    """Resident memory of each rank."""
    peak_gpu_memory_gib: list[float] = Field(default_factory=list)
    """Memory that torch allocated on each rank's GPU."""


class EvaluateEvent(_Event):
    """Figures of ``evaluate``."""

    event: Literal["evaluate"] = "evaluate"
    step: int | None = None
    """Step of the measured checkpoint."""
    split: str
    """valid or test."""
    rows: dict[str, Figure]
    """Figures on the split's rows."""
    unknown: dict[str, int] = Field(default_factory=dict)
    """Rows without a known user, item or value of a context field, by its name; of implicit data
    only positives count."""
    figures: dict[str, dict[str, Figure]] = Field(default_factory=dict)
    """By ranking and name; empty where rows have labels."""
    intervals: dict[str, dict[str, Interval]] = Field(default_factory=dict)
    """95 % bootstrap intervals of these."""
    differences: dict[str, dict[str, Interval]] = Field(default_factory=dict)
    """The same intervals for the model's figure minus another ranking's."""


class RecommendEvent(_Event):
    """What ``recommend`` measured."""

    event: Literal["recommend"] = "recommend"
    step: int | None = None
    """Step of the checkpoint."""
    peak_memory_gib: list[float] = Field(default_factory=list)
    """Resident memory of each rank."""
    pairs: int | None = None
    """Users times items; None if an interrupted command was resumed."""
    seconds: float | None = None
    """Seconds that scoring took."""
    pairs_per_s: float | None = None
    short_list: dict[str, float] | None = None
    """Recall lost and time saved by scoring only the best candidates in full."""


Event = TrainEvent | ValidEvent | EndEvent | EvaluateEvent | RecommendEvent
E = TypeVar("E", bound=_Event)
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


def read_events(path: Path) -> list[Event]:
    """Reads a run's ``metrics.jsonl``; a missing file has no events.

    Damaged lines, such as those cut short by a crash, and events of another version are skipped and
    counted in a warning, so that no command fails because of an old log.
    """
    if not path.is_file():
        return []
    events, skipped = [], 0
    for line in path.read_bytes().splitlines():
        try:
            events.append(_EVENT.validate_json(line))
        except ValueError:
            skipped += bool(line.strip())
    if skipped:
        log.warning(
            "%s: %s of %s lines skipped: damaged, or of another version of deepfm_dist",
            path,
            f"{skipped:,}",
            f"{len(events) + skipped:,}",
        )
    return events


def last(events: list[Event], kind: type[E]) -> E | None:
    """The latest event of a kind, or None."""
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
