"""The trend of a validation curve at the end of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NOTABLE = 0.01
"""A change of at least this share of a curve's range is not a plateau."""


@dataclass(frozen=True)
class Trend:
    """The end of a validation curve.

    Attributes:
        kind: improving: the last validation is the best, notably better than the one before;
            worsened: it is notably worse than the best; flat: neither.
        best: (step, value) of the best validation.
        last: (step, value) of the last validation.
    """

    kind: Literal["improving", "worsened", "flat"]
    best: tuple[float, float]
    last: tuple[float, float]


def trend_of(points: Sequence[tuple[float, float]], lower_is_better: bool) -> Trend | None:
    """Compares the last validation with the best one and with the one before.

    Args:
        points: (step, value) in order.
        lower_is_better: whether the figure falls as a model improves.

    Returns:
        None without two validations.
    """
    if len(points) < 2:
        return None
    sign = 1 if lower_is_better else -1
    values = [sign * value for _, value in points]
    notable = NOTABLE * (max(values) - min(values))
    place = values.index(min(values))
    kind: Literal["improving", "worsened", "flat"] = "flat"
    if place == len(values) - 1 and values[-2] - values[-1] >= notable:
        kind = "improving"
    elif values[-1] - values[place] >= notable > 0:
        kind = "worsened"
    return Trend(kind, points[place], points[-1])


def sentence(trend: Trend | None, lower_is_better: bool) -> str:
    """The trend as a sentence for a plot's caption; empty if it is flat or unknown."""
    if trend is None or trend.kind == "flat":
        return ""
    if trend.kind == "improving":
        verb = "falling" if lower_is_better else "rising"
        return f"Validation was still {verb} at the last step."
    verb = "risen" if lower_is_better else "fallen"
    return (
        f"Validation was best at step {trend.best[0]:,} ({trend.best[1]:.4f}) and had {verb} to "
        f"{trend.last[1]:.4f} by the last step."
    )
