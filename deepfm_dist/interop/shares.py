"""How much of each part of a model to use, by the likelihood of labelled rows.

A model's log-odds are those of a simple model plus what each further part adds, and each addition
gets a share from 0 to 1. The shares are posterior means under a uniform prior: where rows are many,
nearly the likeliest ones; where rows are too few to tell, a half, with which a harmful part does a
quarter of its harm and a useful one three quarters of its good. Nothing has to be tuned.

Source: Hoeting et al., "Bayesian Model Averaging: A Tutorial", 1999.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
NODES = 21
"""Values of a share for which the likelihood is calculated: those of Gauss and Legendre."""


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
    """Posterior mean of the shares of some additions to the log-odds of rows.

    The rows should not have been used to fit any of them.

    Args:
        base: ``[B]`` log-odds by the simple model.
        additions: ``[B]`` each: what a part adds to them. An addition that is 0 everywhere changes
            nothing.
        labels: ``[B]`` 0 or 1.
        row_weights: ``[B]``; only their ratios matter.

    Returns:
        A share from 0 to 1 for each addition.
    """
    nodes, widths = np.polynomial.legendre.leggauss(NODES)
    grid = np.array([*itertools.product((nodes + 1) / 2, repeat=len(additions))])
    volumes = np.array([*itertools.product(widths, repeat=len(additions))]).prod(1)
    parts = np.reshape(additions, (len(additions), len(labels)))
    losses = np.array([log_loss(base + shares @ parts, labels, row_weights) for shares in grid])
    masses = volumes * np.exp(-len(labels) * (losses - losses.min()))
    return [float(share) for share in masses @ grid / masses.sum()]
