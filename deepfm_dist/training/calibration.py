"""Predicted probabilities beside what happened."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deepfm_dist.distributed.world import World

FloatArray = npt.NDArray[np.floating]

STRETCHES = 20
_LIMIT, _PER_UNIT = 16, 64
"""Logits beyond the limit share a bin; bins of a unit of logit."""


@dataclass(frozen=True)
class Curve:
    """Rows in the order of their logits, cut into stretches of about as many each.

    Attributes:
        predicted: mean probability of each stretch.
        observed: share of label 1.
        rows: their weight.
    """

    predicted: list[float]
    observed: list[float]
    rows: list[float]


class Calibration:
    """Sums over rows by narrow bins of their logits: memory does not grow with the rows."""

    def __init__(self) -> None:
        self._sums = np.zeros((2 * _LIMIT * _PER_UNIT + 1, 3))

    def add(self, labels: FloatArray, logits: FloatArray, weights: FloatArray | None) -> None:
        """Counts rows in.

        Args:
            labels: ``[n]`` 0 or 1.
            logits: ``[n]``.
            weights: ``[n]``; None: 1 each.
        """
        clipped = np.clip(logits.astype(np.float64), -_LIMIT, _LIMIT)
        bins = np.floor((clipped + _LIMIT) * _PER_UNIT).astype(np.int64)
        weight = np.ones(len(logits)) if weights is None else weights.astype(np.float64)
        probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
        for column, values in enumerate((weight, weight * labels, weight * probability)):
            self._sums[:, column] += np.bincount(bins, values, minlength=len(self._sums))

    def curve(self, world: World) -> Curve:
        """The curve of all ranks' rows. All ranks.

        Source: DeGroot, Fienberg, "The Comparison and Evaluation of Forecasters", 1983.
        """
        sums = torch.from_numpy(self._sums.copy()).to(world.device)
        world.sum(sums)
        filled = sums.cpu().numpy()
        filled = filled[filled[:, 0] > 0]
        rows = filled[:, 0].cumsum()
        # A bin belongs to the stretch that its middle row is in.
        stretch = ((rows - filled[:, 0] / 2) / rows[-1:] * STRETCHES).astype(np.int64)
        begins = np.flatnonzero(np.diff(stretch, prepend=-1))
        if len(begins) == 0:
            return Curve([], [], [])
        weight, labels, predicted = np.add.reduceat(filled, begins).T
        return Curve((predicted / weight).tolist(), (labels / weight).tolist(), weight.tolist())
