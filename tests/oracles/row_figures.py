"""Figures on labelled rows, all at once and by scikit-learn; nothing here is the package's own."""

from typing import Any

import numpy as np
from sklearn import metrics as sk


def auc(labels: Any, scores: Any, weights: Any = None) -> float:
    """NaN where all labels are the same."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(sk.roc_auc_score(labels, scores, sample_weight=weights))


def user_auc(labels: Any, scores: Any, users: Any, weights: Any = None) -> float:
    """Mean AUC of the users that have both labels, weighted by their rows; NaN without any."""
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    of_users = [
        (auc(labels[r], scores[r], w[r]), w[r].sum()) for r in users == np.unique(users)[:, None]
    ]
    both = np.array([pair for pair in of_users if not np.isnan(pair[0])]).reshape(-1, 2)
    return float(np.average(both[:, 0], weights=both[:, 1])) if len(both) else float("nan")


def click_figures(
    labels: Any, logits: Any, users: Any = None, weights: Any = None
) -> dict[str, float]:
    """All figures; users of row 0 are unknown and have no part in ``user_auc``."""
    w = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    figures = {"auc": auc(labels, logits, w)}
    if users is not None:
        known = users != 0
        figures["user_auc"] = user_auc(labels[known], logits[known], users[known], w[known])
    probability, rate = 1 / (1 + np.exp(-logits)), float(np.average(labels, weights=w))
    loss = sk.log_loss(labels, probability, sample_weight=w, labels=[0, 1])
    constant = sk.log_loss(labels, np.full(len(w), rate), sample_weight=w, labels=[0, 1])
    one_class = rate in (0, 1)
    return figures | {
        "log_loss": loss,
        "ne": float("nan") if one_class else loss / constant,
        "calibration": (w * probability).sum() / (w * labels).sum() if rate else float("nan"),
        "accuracy": sk.accuracy_score(labels, logits > 0, sample_weight=w),
        "majority_rate": max(rate, 1 - rate),
    }
