"""Figures on rows against counting and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from deepfm_dist.training.metrics import (
    accuracy,
    auc,
    click_metrics,
    log_loss,
    majority_rate,
    user_auc,
)

rows = st.lists(st.tuples(st.integers(0, 1), st.integers(-4, 4)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


@given(rows)
def test_auc_counts_ordered_pairs(pairs: list[tuple[int, int]]) -> None:
    labels = np.array([p[0] for p in pairs], np.float32)
    scores = np.array([p[1] for p in pairs], np.float32)
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    assert auc(labels, scores) == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-12)
    assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)


@given(rows)
def test_log_loss_and_accuracy_equal_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    labels = np.array([p[0] for p in pairs], np.float32)
    logits = np.array([p[1] for p in pairs], np.float64)
    probability = 1 / (1 + np.exp(-logits))
    assert log_loss(labels, logits) == pytest.approx(sk.log_loss(labels, probability), abs=1e-9)
    assert accuracy(labels, logits) == sk.accuracy_score(labels, probability > 0.5)


def test_extreme_logits_stay_finite() -> None:
    assert log_loss(np.array([1.0, 0.0]), np.array([-1e4, -1e4])) == pytest.approx(5e3)


def test_one_class_has_no_auc_and_full_majority() -> None:
    figures = click_metrics(np.ones(3, np.float32), np.array([1.0, 2.0, -1.0], np.float32))
    assert np.isnan(figures["auc"])
    assert figures["majority_rate"] == 1
    assert majority_rate(np.array([0, 0, 1], np.float32)) == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(-3, 3)), min_size=1))
def test_user_auc_is_the_weighted_mean_of_scikit_learns(
    triples: list[tuple[int, int, int]],
) -> None:
    users, labels, scores = (np.array(column) for column in zip(*triples, strict=True))
    of_user = [
        (sk.roc_auc_score(labels[users == u], scores[users == u]), (users == u).sum())
        for u in np.unique(users)
        if len(set(labels[users == u])) == 2
    ]
    found = user_auc(labels.astype(np.float32), scores.astype(np.float32), users)
    if of_user:
        values, weights = zip(*of_user, strict=True)
        assert found == pytest.approx(np.average(values, weights=weights), abs=1e-9)
    else:
        assert np.isnan(found)


def test_unknown_users_have_no_part_in_user_auc() -> None:
    labels, logits = np.array([1.0, 0, 1, 0]), np.array([1.0, 0, 0, 1])
    figures = click_metrics(labels, logits, np.array([1, 1, 0, 0]))
    assert figures["user_auc"] == 1
    assert "user_auc" not in click_metrics(labels, logits)
