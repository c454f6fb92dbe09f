"""Figures on labelled rows: AUC, log loss, accuracy."""

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


def click_metrics(labels: FloatArray, logits: FloatArray) -> dict[str, float]:
    """All figures of this module for ``[n]`` labels and ``[n]`` logits."""
    return {
        "auc": auc(labels, logits),
        "log_loss": log_loss(labels, logits),
        "accuracy": accuracy(labels, logits),
        "majority_rate": majority_rate(labels),
    }
