"""Posterior-mean shares of the parts of a model, given labelled rows.

A model's log-odds are those of a simple model plus the contribution of each further part, scaled by
a share from 0 to 1. The shares are posterior means under a uniform prior: with many rows, nearly
the most likely ones; with too few rows to tell, one half, which keeps a quarter of the harm of a
harmful part and three quarters of the benefit of a useful one. There is nothing to tune.

Source: Hoeting et al., "Bayesian Model Averaging: A Tutorial", 1999.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
NODES = {1: 21, 2: 21, 3: 9, 4: 6}
"""Nodes of the Gauss-Legendre quadrature over each share, by the number of shares."""
DEVIATIONS = 4.0
"""Standard deviations around the likeliest shares that the nodes cover: where rows are many, all
likely shares would lie between two nodes over 0 to 1."""
_ROUNDS, _SMALLEST_STEP, _UNCHANGED = 30, 1e-3, 1e-6


def log_loss(logits: Float64Array, labels: Float64Array, row_weights: Float64Array) -> float:
    """The weighted mean log loss.

    Args:
        logits: ``[B]``.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``.
    """
    losses = np.logaddexp(0, logits) - labels * logits
    return float(row_weights @ losses / row_weights.sum())


def mean_shares(
    base: Float64Array,
    additions: Sequence[Float64Array],
    labels: Float64Array,
    row_weights: Float64Array,
) -> list[float]:
    """Posterior means of the shares of additions to log-odds.

    None of them should have been fitted to these rows.

    Args:
        base: ``[B]`` log-odds by the simple model.
        additions: ``[B]`` each, at most four: contributions of the parts. An addition that is 0
            everywhere has no effect.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``; only their ratios matter.

    Returns:
        A share from 0 to 1 for each addition.
    """
    if not additions:
        return []
    parts = np.reshape(additions, (len(additions), len(labels)))
    low, high = _interval(base, parts, labels, row_weights * (len(labels) / row_weights.sum()))
    nodes, widths = np.polynomial.legendre.leggauss(NODES[len(additions)])
    unit = np.array([*itertools.product((nodes + 1) / 2, repeat=len(additions))])
    grid = low + (high - low) * unit
    volumes = np.array([*itertools.product(widths, repeat=len(additions))]).prod(1)
    losses = np.array([log_loss(base + shares @ parts, labels, row_weights) for shares in grid])
    masses = volumes * np.exp(-len(labels) * (losses - losses.min()))
    return [float(share) for share in masses @ grid / masses.sum()]


def _interval(
    base: Float64Array, parts: Float64Array, labels: Float64Array, weights: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """``[K]`` bounds from 0 to 1 around the likeliest shares of ``[K, B]`` parts.

    Newton's method: the likeliest shares of the quadratic approximation, repeated.
    """
    shares = np.full(len(parts), 0.5)
    for _ in range(_ROUNDS):
        logits = base + shares @ parts
        predicted = 1 / (1 + np.exp(-np.clip(logits, -40, 40)))
        slopes = parts @ (weights * (predicted - labels))
        curvature = (parts * (weights * predicted * (1 - predicted))) @ parts.T
        curvature += 1e-9 * np.eye(len(parts))  # a part that is 0 everywhere has none
        step, size = _likeliest(slopes, curvature, shares) - shares, 1.0
        before = log_loss(logits, labels, weights)
        while size > _SMALLEST_STEP and before < log_loss(
            base + (shares + size * step) @ parts, labels, weights
        ):
            size /= 2
        shares = shares + size * step
        if np.abs(size * step).max() < _UNCHANGED:
            break
    reach = DEVIATIONS * np.sqrt(np.diag(np.linalg.inv(curvature)))
    return np.maximum(0, shares - reach), np.minimum(1, shares + reach)


def _likeliest(slopes: Float64Array, curvature: Float64Array, shares: Float64Array) -> Float64Array:
    """``[K]`` where a quadratic is least within 0 to 1, one share after the other.

    Args:
        slopes: ``[K]`` at ``shares``.
        curvature: ``[K, K]``.
        shares: ``[K]``.
    """
    least = shares.copy()
    for _ in range(200):
        for k, own in enumerate(np.diag(curvature)):
            slope = slopes[k] + curvature[k] @ (least - shares)
            least[k] = np.clip(least[k] - slope / own, 0, 1)
    return least
