"""Metrics on training rows, computed before the step that learns from them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from deepfm_dist.distributed.pipeline import Step
from deepfm_dist.distributed.world import World
from deepfm_dist.float_order import sortable
from deepfm_dist.training.metrics import AreaUnderCurve, Tally, normalized_entropy, with_means

_BINS = 1 << 16


class TrainingFigures:
    """Mean loss over a window of steps; for rows, also log loss, NE, AUC and calibration.

    These are computed for the window and for all steps so far. Rows count by their weight, so that
    padding does not. The AUC of a window treats logits as tied if they round to the same bfloat16
    (sign, exponent and 7 bits of fraction).

    Args:
        lifetime: sums over all earlier steps, as `lifetime` holds them.
        target_weights: weights of several targets by name, as `metrics.with_means` takes them.
    """

    def __init__(
        self, lifetime: Sequence[float] = (), target_weights: Mapping[str, float] | None = None
    ) -> None:
        self._weights = target_weights or {}
        n = max(1, len(self._weights))
        self.lifetime = torch.tensor([*lifetime] or [0.0] * 4 * n, dtype=torch.float64)
        """``[T * 4]`` sums over rows by target: cross-entropy, weight, label, probability."""
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._losses: list[float] = []

    def add(self, step: Step) -> None:
        """Adds a step's rows. Rows of a skipped step are not learned from and not counted."""
        if step.is_finite:
            self._rows += step.rows
            self._losses.append(step.loss)

    def line(self, world: World) -> dict[str, float]:
        """The figures since the last call and over the whole run; starts a window. All ranks."""
        losses, self._losses = self._losses, []
        loss = {"loss": sum(losses) / len(losses) if losses else float("nan")}
        if losses and not self._rows:
            return loss
        return loss | self._row_figures(world)

    def _row_figures(self, world: World) -> dict[str, float]:
        rows, self._rows = self._rows, []
        if not rows:  # on all ranks, then
            nothing = torch.zeros(0, *self._shape, device=world.device)
            rows = [(nothing, nothing, nothing)]
        # Steps are summed one by one, in order: a run's totals must not depend on where its windows
        # end, that is, on where it was stopped and resumed.
        step_sums = world.to_host(world.sum(torch.stack([_sums(*values) for values in rows])))
        for sums in step_sums:
            self.lifetime += sums
        columns = (torch.cat(pieces) for pieces in zip(*rows, strict=True))
        counts = [_histogram(*target_figure) for target_figure in _by_target(*columns)]
        window = step_sums.sum(0).split(4)
        figures = []
        histograms = world.to_host(world.sum(torch.stack(counts))).numpy()
        for sums, histogram in zip(window, histograms, strict=True):
            negative, positive = histogram.T
            bins = np.arange(_BINS, dtype=np.float32)
            area = AreaUnderCurve()
            area.add(Tally(np.zeros(_BINS, np.int64), bins, positive, negative))
            figures.append(_figures(sums) | {"auc": area.value})
        lifetime = [
            {f"lifetime_{name}": value for name, value in _figures(sums).items()}
            for sums in self.lifetime.split(4)
        ]
        return self._together(figures) | self._together(lifetime, "lifetime_")

    def _together(self, figures: Sequence[dict[str, float]], start: str = "") -> dict[str, float]:
        """The figures of one target, or those of several with their means."""
        if not self._weights:
            return figures[0]
        return with_means(dict(zip(self._weights, figures, strict=True)), self._weights, start)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self._weights),) if self._weights else ()


def _by_target(
    logits: Tensor, labels: Tensor, weights: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of ``[b]`` or ``[b, T]`` logits and labels by target; unknown labels have weight 0."""
    if logits.dim() == 1:
        return [(logits, labels, weights)]
    is_known = labels >= 0
    weights = weights.view(len(weights), -1) * is_known
    columns = logits, labels.where(is_known, 0.0), weights
    return list(zip(*(column.unbind(1) for column in columns), strict=True))


def _sums(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """``[T * 4]`` float64, as in `TrainingFigures.lifetime`."""
    columns = []
    for z, y, w in _by_target(logits, labels, weights):
        entropy = binary_cross_entropy_with_logits(z, y, w, reduction="none")
        columns += [entropy, w, w * y, w * torch.sigmoid(z)]
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


def _figures(sums: Tensor) -> dict[str, float]:
    entropy, weight, label, probability = sums.tolist()
    if weight == 0:
        return dict.fromkeys(("log_loss", "ne", "calibration"), float("nan"))
    return {
        "log_loss": entropy / weight,
        "ne": normalized_entropy(entropy / weight, label / weight),
        "calibration": probability / label if label else float("nan"),
    }


def _histogram(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """``[bins, 2]`` float64: weight by bin (ascending logits) and label."""
    upper = sortable((logits + 0.0).view(torch.int32)) >> 16  # + 0.0: makes -0.0 and 0.0 equal
    cell = (upper + _BINS // 2) * 2 + (labels > 0.5)
    counts = torch.zeros(2 * _BINS, dtype=torch.float64, device=logits.device)
    # Not bincount: on CUDA it is nondeterministic, and refused where determinism is required.
    return counts.index_add_(0, cell, weights.double()).view(_BINS, 2)
