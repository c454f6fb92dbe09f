"""Figures on rows against counting and scikit-learn."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import calibration as sk_calibration
from sklearn import metrics as sk

from deepfm_dist.training.metrics import Tally, calibration_curve, figures_of, mean_auc, row_sums
from tests.oracles.row_figures import user_auc

rows = st.lists(st.tuples(st.integers(0, 1), st.integers(-4, 4)), min_size=2, max_size=40).filter(
    lambda pairs: len({label for label, _ in pairs}) == 2
)


def area(labels: Any, scores: Any, groups: Any = None, weights: Any = None) -> float:
    """Mean AUC of groups; of one, the AUC."""
    groups = np.zeros(len(labels), np.int32) if groups is None else groups
    w = np.ones(len(labels)) if weights is None else weights.astype(np.float64)
    total, weight = mean_auc(Tally.of(groups, scores, w * (labels > 0.5), w * (labels <= 0.5)))
    return total / weight if weight else float("nan")


def figures_on(labels: Any, logits: Any, weights: Any = None) -> dict[str, float]:
    figures = figures_of(row_sums(labels, logits, weights))
    return figures | {"auc": area(labels, logits, None, weights)}


@given(rows)
def test_auc_counts_ordered_pairs(pairs: list[tuple[int, int]]) -> None:
    labels = np.array([p[0] for p in pairs], np.float32)
    scores = np.array([p[1] for p in pairs], np.float32)
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    assert area(labels, scores) == pytest.approx(wins / (len(positive) * len(negative)), abs=1e-12)
    assert area(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)


@given(rows)
def test_log_loss_and_accuracy_equal_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    labels = np.array([p[0] for p in pairs], np.float32)
    logits = np.array([p[1] for p in pairs], np.float64)
    probability = 1 / (1 + np.exp(-logits))
    figures = figures_on(labels, logits)
    assert figures["log_loss"] == pytest.approx(sk.log_loss(labels, probability), abs=1e-9)
    assert figures["accuracy"] == sk.accuracy_score(labels, probability > 0.5)


@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.integers(-4, 4), st.integers(0, 2), st.integers(1, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_a_row_of_weight_2_counts_as_two(rows: list[tuple[int, int, int, int]]) -> None:
    labels, logits, users, times = (np.array(c) for c in zip(*rows, strict=True))
    several = [np.repeat(c, times) for c in (labels, logits.astype(float), users)]
    actual = figures_on(labels, logits.astype(float), times.astype(float))
    assert actual == pytest.approx(figures_on(*several[:2]), abs=1e-12, nan_ok=True)
    of_users = area(labels, logits, users, times)
    assert of_users == pytest.approx(area(*several), abs=1e-12, nan_ok=True)


@given(rows, st.integers(0, 2**32 - 1))
def test_weighted_figures_equal_scikit_learns(pairs: list[tuple[int, int]], seed: int) -> None:
    weights = np.random.default_rng(seed).lognormal(0, 2, len(pairs)).astype(np.float32)
    labels, logits = (np.array(c, np.float32) for c in zip(*pairs, strict=True))
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    figures = figures_on(labels, logits, weights)
    wide = weights.astype(np.float64)
    for name, value in {
        "auc": sk.roc_auc_score(labels, logits, sample_weight=wide),
        "log_loss": sk.log_loss(labels, probability, sample_weight=wide),
        "accuracy": sk.accuracy_score(labels, probability > 0.5, sample_weight=wide),
        "calibration": (wide * probability).sum() / (wide * labels).sum(),
    }.items():
        assert figures[name] == pytest.approx(value, abs=1e-9), name


def test_extreme_logits_stay_finite() -> None:
    figures = figures_on(np.array([1.0, 0.0]), np.array([-1e4, -1e4]))
    assert figures["log_loss"] == pytest.approx(5e3)


def test_one_class_has_no_auc_and_full_majority() -> None:
    figures = figures_on(np.ones(3, np.float32), np.array([1.0, 2.0, -1.0], np.float32))
    assert np.isnan(figures["auc"])
    assert figures["majority_rate"] == 1
    figures = figures_on(np.array([0, 0, 1], np.float32), np.zeros(3))
    assert figures["majority_rate"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(-3, 3)), min_size=1))
def test_user_auc_is_the_weighted_mean_of_scikit_learns(
    triples: list[tuple[int, int, int]],
) -> None:
    users, labels, scores = (np.array(column) for column in zip(*triples, strict=True))
    expected = user_auc(labels, scores, users)
    assert area(labels, scores, users) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_calibration_compares_stretches_of_rows_as_scikit_learn_does() -> None:
    random = np.random.default_rng(1)
    probabilities = 1 / (1 + np.exp(-np.linspace(-4, 3, 1000)))
    labels = (random.random(1000) < probabilities).astype(np.float64)
    sums = np.stack([np.ones(1000), probabilities, labels])
    actual = calibration_curve(np.pad(sums, ((0, 0), (5, 5))))  # bins without rows
    observed, predicted = sk_calibration.calibration_curve(
        labels, probabilities, n_bins=20, strategy="quantile"
    )
    assert actual.rows == [50] * 20
    np.testing.assert_allclose(actual.predicted, predicted)
    np.testing.assert_allclose(actual.observed, observed)
    few = calibration_curve(sums[:, :3])
    assert few.rows == [1, 1, 1]
    assert few.predicted == probabilities[:3].tolist()
    assert calibration_curve(sums * [[1], [0.5], [0.5]]).rows == [50] * 20
