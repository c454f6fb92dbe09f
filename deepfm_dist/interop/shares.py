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
NODES = {1: 21, 2: 21, 3: 9}
"""Nodes of the Gauss-Legendre quadrature over each share, by the number of shares."""


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
        additions: ``[B]`` each, at most three: contributions of the parts. An addition that is 0
            everywhere has no effect.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``; only their ratios matter.

    Returns:
        A share from 0 to 1 for each addition.
    """
    if not additions:
        return []
    nodes, widths = np.polynomial.legendre.leggauss(NODES[len(additions)])
    grid = np.array([*itertools.product((nodes + 1) / 2, repeat=len(additions))])
    volumes = np.array([*itertools.product(widths, repeat=len(additions))]).prod(1)
    parts = np.reshape(additions, (len(additions), len(labels)))
    losses = np.array([log_loss(base + shares @ parts, labels, row_weights) for shares in grid])
    masses = volumes * np.exp(-len(labels) * (losses - losses.min()))
    return [float(share) for share in masses @ grid / masses.sum()]
