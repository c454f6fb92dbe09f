"""Calibration against scikit-learn and by several ranks."""

import numpy as np
from sklearn.calibration import calibration_curve

from deepfm_dist.distributed.world import world
from deepfm_dist.training.calibration import STRETCHES, Calibration, Curve
from tests.ranks import run_ranks

RANDOM = np.random.default_rng(1)
LOGITS = RANDOM.normal(-1, 2, 50_000).astype(np.float32)
PROBABILITIES = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
LABELS = (RANDOM.random(50_000) < PROBABILITIES).astype(np.float32)


def _curve(parts: int) -> Curve:
    with world("cpu") as ranks:
        calibration = Calibration()
        for part in range(ranks.rank, parts, ranks.world_size):
            rows = slice(part, None, parts)
            calibration.add(LABELS[rows], LOGITS[rows], None)
        return calibration.curve(ranks)


def test_the_curve_is_scikit_learns_whatever_the_ranks() -> None:
    alone = run_ranks(_curve, 1, 1)[0]
    observed, predicted = calibration_curve(
        LABELS, PROBABILITIES, n_bins=STRETCHES, strategy="quantile"
    )
    assert sum(alone.rows) == len(LABELS)
    np.testing.assert_allclose(alone.rows, len(LABELS) / STRETCHES, rtol=0.1)  # whole bins
    np.testing.assert_allclose(alone.predicted, predicted, atol=0.005)
    np.testing.assert_allclose(alone.observed, observed, atol=0.01)
    for curve in run_ranks(_curve, 2, 7):
        np.testing.assert_allclose(curve.predicted, alone.predicted)
        np.testing.assert_allclose(curve.observed, alone.observed)


def _small() -> list[Curve]:
    curves = []
    with world("cpu") as ranks:
        for n in (0, 1, 3):
            calibration = Calibration()
            logits = np.array([-40.0, 0.0, 40.0], np.float32)[:n]
            calibration.add(np.array([0, 1, 1], np.float32)[:n], logits, np.array([1, 2, 1])[:n])
            curves.append(calibration.curve(ranks))
    return curves


def test_few_rows_and_extreme_ones() -> None:
    none, one, three = run_ranks(_small, 1)[0]
    assert none == Curve([], [], [])
    assert one.observed == [0] and one.rows == [1]
    np.testing.assert_allclose(three.predicted, [0, 0.5, 1], atol=1e-12)
    assert (three.observed, three.rows) == ([0, 1, 1], [1, 2, 1])
