"""Figures on labelled rows: AUC, per-user AUC, log loss, NE, calibration, accuracy."""

import math

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.schema import OUT_OF_VOCABULARY

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


def user_auc(labels: FloatArray, scores: FloatArray, users: npt.NDArray[np.integer]) -> float:
    """Mean AUC of the users that have both labels, weighted by their rows ("GAUC").

    Args:
        labels: ``[n]`` 0 or 1.
        scores: ``[n]``, any score that is monotone within a user.
        users: ``[n]`` whose row it is.

    Returns:
        NaN where no user has both labels.

    Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", 2017, eq. 12.
    """
    order = np.lexsort((scores, users))
    label, score, user = labels[order] > 0.5, scores[order], users[order]
    is_new_user = np.r_[True, user[1:] != user[:-1]]
    is_new_score = is_new_user | np.r_[True, score[1:] != score[:-1]]
    of_user, of_score = is_new_user.cumsum() - 1, is_new_score.cumsum() - 1
    first = np.flatnonzero(is_new_user)
    rows = np.bincount(of_user)
    positives = np.bincount(of_user, label)
    # Ranks within the user, ties by their average.
    first_of_score = np.flatnonzero(is_new_score)
    tied = np.bincount(of_score)
    rank = (first_of_score + (tied + 1) / 2)[of_score] - first[of_user]
    rank_sum = np.bincount(of_user, rank * label)
    pairs = positives * (rows - positives)
    has_both = pairs > 0
    if not has_both.any():
        return float("nan")
    wins = (rank_sum - positives * (positives + 1) / 2)[has_both]
    return float(np.average(wins / pairs[has_both], weights=rows[has_both]))


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


def click_metrics(
    labels: FloatArray, logits: FloatArray, users: npt.NDArray[np.integer] | None = None
) -> dict[str, float]:
    """All figures of this module.

    Args:
        labels: ``[n]`` 0 or 1.
        logits: ``[n]``.
        users: ``[n]`` rows of the user table; those of `OUT_OF_VOCABULARY` are not told apart and
            have no part in ``user_auc``, which is left out where there are no users.
    """
    loss, rate = log_loss(labels, logits), float(np.mean(labels))
    predicted = float(np.mean(1 / (1 + np.exp(-logits.astype(np.float64)))))
    figures = {"auc": auc(labels, logits)}
    if users is not None:
        known = users != OUT_OF_VOCABULARY
        figures["user_auc"] = user_auc(labels[known], logits[known], users[known])
    return figures | {
        "log_loss": loss,
        "ne": normalized_entropy(loss, rate),
        "calibration": predicted / rate if rate else float("nan"),
        "accuracy": accuracy(labels, logits),
        "majority_rate": majority_rate(labels),
    }


CLICK_FIGURES = tuple(click_metrics(np.array([0.0, 1.0]), np.zeros(2), np.ones(2, np.int32)))
"""Names of `click_metrics`."""
