"""Figures on labelled rows: AUC, log loss, NE, calibration, accuracy."""

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]


def auc(labels: FloatArray, scores: FloatArray) -> float:
    """Exact area under the ROC curve; ties count one half.

    Args:
        labels: ``[n]`` 0 or 1.
        scores: ``[n]``, any monotone score.

    Returns:
        ``P(score of a positive > score of a negative) + P(equal) / 2``; NaN where all labels are
        the same.

    Source: the Mann-Whitney statistic by average ranks.
    """
    positive = labels > 0.5
    n_positive = int(positive.sum())
    n_negative = len(labels) - n_positive
    if n_positive == 0 or n_negative == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    average_rank = last_rank - (counts - 1) / 2
    rank_sum = average_rank[inverse][positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def log_loss(labels: FloatArray, logits: FloatArray) -> float:
    """Mean binary cross-entropy of ``[n]`` labels and ``[n]`` logits, in nats."""
    z = logits.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, z) - labels * z))


def accuracy(labels: FloatArray, logits: FloatArray) -> float:
    """Share of rows whose probability is on the label's side of 0.5."""
    return float(np.mean((logits > 0) == (labels > 0.5)))


def majority_rate(labels: FloatArray) -> float:
    """Accuracy of always answering the more frequent label."""
    rate = float(np.mean(labels > 0.5))
    return max(rate, 1 - rate)


def normalized_entropy(log_loss: float, rate: float) -> float:
    """Log loss as a share of what always answering the mean label would give; below 1 is better.

    Args:
        log_loss: mean cross-entropy, in nats.
        rate: mean label; where it is 0 or 1 the answer is NaN.

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", 2014.
    """
    if not 0 < rate < 1:
        return float("nan")
    return log_loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def click_metrics(labels: FloatArray, logits: FloatArray) -> dict[str, float]:
    """All figures of this module for ``[n]`` labels and ``[n]`` logits."""
    loss, rate = log_loss(labels, logits), float(np.mean(labels))
    predicted = float(np.mean(1 / (1 + np.exp(-logits.astype(np.float64)))))
    return {
        "auc": auc(labels, logits),
        "log_loss": loss,
        "ne": normalized_entropy(loss, rate),
        "calibration": predicted / rate if rate else float("nan"),
        "accuracy": accuracy(labels, logits),
        "majority_rate": majority_rate(labels),
    }


CLICK_FIGURES = tuple(click_metrics(np.array([0.0, 1.0]), np.zeros(2)))
"""Names of `click_metrics`."""
