"""Figures on labelled rows: AUC, per-user AUC, log loss, NE, calibration, accuracy.

A row of weight 2 counts as two rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]

PROBABILITY_FIGURES = ("log_loss", "ne", "calibration", "accuracy", "majority_rate")
"""Figures that compare probabilities with labels."""


@dataclass(frozen=True)
class Tally:
    """Weights of labelled rows by group and score: all that AUC needs.

    Attributes:
        groups: ``[m]`` ascending.
        scores: ``[m]`` ascending within a group, each once.
        positive: ``[m]`` float64 weight of the rows with label 1.
        negative: ``[m]`` float64 weight of the others.
    """

    groups: IntArray
    scores: FloatArray
    positive: FloatArray
    negative: FloatArray

    @classmethod
    def of(
        cls, groups: IntArray, scores: FloatArray, positive: FloatArray, negative: FloatArray
    ) -> Self:
        """Rows ``[n]`` in any order, or pieces of a tally."""
        order = np.lexsort((scores, groups))
        groups, scores = groups[order], scores[order]
        is_new = np.ones(len(order), bool)
        is_new[1:] = (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])
        place, m = is_new.cumsum() - 1, int(is_new.sum())
        sums = [np.bincount(place, w[order], m).astype(np.float64) for w in (positive, negative)]
        return cls(groups[is_new], scores[is_new], sums[0], sums[1])

    @classmethod
    def merge(cls, pieces: Sequence[Self]) -> Self:
        """The tally of all pieces' rows."""
        names = ("groups", "scores", "positive", "negative")
        return cls.of(*(np.concatenate([getattr(p, n) for p in pieces]) for n in names))

    def by_group(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """``[groups]`` each: weight of ordered pairs, of positives, of negatives.

        A positive and a negative are ordered where the positive's score is higher; ties count half.

        Source: the Mann-Whitney statistic.
        """
        if len(self.groups) == 0:
            return np.zeros(0), np.zeros(0), np.zeros(0)
        starts = np.flatnonzero(np.r_[True, self.groups[1:] != self.groups[:-1]])
        below = self.negative.cumsum() - self.negative
        below -= np.repeat(below[starts], np.diff(np.r_[starts, len(self.groups)]))
        wins = self.positive * (below + self.negative / 2)
        sums = (np.add.reduceat(a, starts) for a in (wins, self.positive, self.negative))
        return tuple(sums)  # type: ignore[return-value]


class AreaUnderCurve:
    """Area under the ROC curve, computed from rows in the order of their scores.

    A positive row and a negative one that share a score count one half.
    """

    def __init__(self) -> None:
        self._wins = self._positive = self._negative = 0.0

    def add(self, tally: Tally) -> None:
        """Adds rows of one group; their scores must be above those of all earlier rows."""
        wins, positive, negative = (float(v.sum()) for v in tally.by_group())
        self._wins += wins + positive * self._negative
        self._positive, self._negative = self._positive + positive, self._negative + negative

    @property
    def value(self) -> float:
        """NaN where all labels are the same."""
        pairs = self._positive * self._negative
        return self._wins / pairs if pairs else float("nan")


def mean_auc(tally: Tally) -> tuple[float, float]:
    """Summed AUC of the groups that have both labels, each times its weight; and that weight.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", 2017, eq. 12.
    """
    wins, positive, negative = tally.by_group()
    both = (positive > 0) & (negative > 0)
    wins, positive, negative = wins[both], positive[both], negative[both]
    weight = positive + negative
    return float((weight * (wins / (positive * negative))).sum()), float(weight.sum())


def row_sums(labels: FloatArray, logits: FloatArray, weights: FloatArray | None) -> FloatArray:
    """``[5]`` float64 weighted sums over rows, for `figures_of`.

    They are: ones, labels, cross-entropy in nats, probability, whether the probability is on the
    label's side of 0.5.
    """
    z = logits.astype(np.float64)
    terms = np.stack(
        [
            np.ones(len(z)),
            labels,
            np.logaddexp(0.0, z) - labels * z,
            np.exp(-np.logaddexp(0.0, -z)),
            (z > 0) == (labels > 0.5),
        ]
    )
    sums: FloatArray = (terms if weights is None else terms * weights).sum(1)
    return sums


def figures_of(sums: FloatArray) -> dict[str, float]:
    """`PROBABILITY_FIGURES`."""
    weight, label, entropy, probability, correct = sums.tolist()
    if weight == 0:  # no row has this label
        return dict.fromkeys(PROBABILITY_FIGURES, float("nan"))
    loss, rate = entropy / weight, label / weight
    return {
        "log_loss": loss,
        "ne": normalized_entropy(loss, rate),
        "calibration": probability / label if label else float("nan"),
        "accuracy": correct / weight,
        "majority_rate": max(rate, 1 - rate),
    }


def order_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that depend only on the order of the scores: all but `PROBABILITY_FIGURES`."""
    return {
        name: value
        for name, value in figures.items()
        if split_target(name)[1] not in PROBABILITY_FIGURES
    }


def target_figure(target: str, name: str) -> str:
    """Name of a figure of one of several targets: ``buy.auc``."""
    return f"{target}.{name}"


def split_target(figure: str) -> tuple[str | None, str]:
    """A figure's target and plain name, the opposite of `target_figure`; no target: None.

    Targets may contain dots and figures do not: ``a.b.auc`` is the AUC of ``a.b``.
    """
    target, _, name = figure.rpartition(".")
    return target or None, name


def with_means(
    figures: Mapping[str, Mapping[str, float]], weights: Mapping[str, float], start: str = ""
) -> dict[str, float]:
    """Figures by target, and their means under the plain names.

    The means are weighted, over the targets that have the figure. The exception is ``ne``: the mean
    log loss divided by the mean log loss of always predicting the mean labels.

    Args:
        figures: the figures, by target and name.
        weights: the weights, by target.
        start: prefix of all names.
    """
    ne, log_loss = f"{start}ne", f"{start}log_loss"
    first, *others = figures.values()
    shared = [name for name in first if all(name in other for other in others)]
    total = sum(weights[target] for target in figures)
    shares = {target: weights[target] / total for target in figures}
    means = {
        name: sum(share * figures[target][name] for target, share in shares.items())
        for name in shared
    }
    if ne in means:
        constants = sum(
            share * figures[target][log_loss] / (figures[target][ne] or float("nan"))
            for target, share in shares.items()
        )
        means[ne] = means[log_loss] / constants
    each = {
        target_figure(target, name): value
        for target, by_name in figures.items()
        for name, value in by_name.items()
    }
    return means | each


def normalized_entropy(log_loss: float, rate: float) -> float:
    """Log loss divided by that of always predicting the mean label; below 1 is better.

    Args:
        log_loss: mean cross-entropy, in nats.
        rate: mean label; if it is 0 or 1, the result is NaN.

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014.
    """
    if not 0 < rate < 1:
        return float("nan")
    return log_loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


@dataclass(frozen=True)
class Calibration:
    """Rows in the order of their logits, divided into bins of about equal weight.

    Attributes:
        predicted: mean probability of each bin.
        observed: share of label 1.
        rows: weight of its rows.
    """

    predicted: list[float]
    observed: list[float]
    rows: list[float]


def calibration_curve(sums: FloatArray, n_bins: int = 20) -> Calibration:
    """Compares predicted probabilities with observed labels.

    Args:
        sums: ``[3, bins]`` by bin of logits, lowest first: sums of weight, weight * probability and
            weight * label.
        n_bins: maximum number of result bins; each joins whole given bins.

    Source: DeGroot, Fienberg, "The Comparison and Evaluation of Forecasters", 1983.
    """
    sums = sums[:, sums[0] > 0]
    rows = sums[0]
    begins = np.searchsorted(rows.cumsum() - rows, np.arange(n_bins) / n_bins * rows.sum())
    begins = np.unique(begins[begins < len(rows)])
    rows, predicted, observed = np.add.reduceat(sums, begins, axis=1)
    return Calibration((predicted / rows).tolist(), (observed / rows).tolist(), rows.tolist())
