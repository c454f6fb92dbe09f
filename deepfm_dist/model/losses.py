"""The training objective."""

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from deepfm_dist.model.deepfm import DeepFM


class LabelledRows(Protocol):
    """What a training step consumes (`deepfm_dist.data.batch.Batch` is one)."""

    sparse: Any
    dense: Tensor
    labels: Tensor
    weights: Tensor
    global_weight: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device."""
        ...


class DeepFMTrain(nn.Module):
    """The model with its loss, in the form that TorchRec's pipelines train.

    Args:
        model: the DeepFM.
    """

    def __init__(self, model: DeepFM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: LabelledRows) -> tuple[Tensor, Tensor]:
        """Scores a batch.

        Returns:
            This rank's share of the loss, ``[]``: shares add up over the ranks to the weighted
            mean of the global batch; and logits ``[b]``.
        """
        logits = self.model(batch.sparse, batch.dense, batch.weights)
        loss = weighted_bce_sum(logits, batch.labels, batch.weights) / batch.global_weight
        return loss, logits.detach()


def weighted_bce_sum(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum of the rows' binary cross-entropies, each times its weight.

    Args:
        logits: ``[B]``.
        labels: ``[B]`` in [0, 1].
        weights: ``[B]``.

    Returns:
        ``[]``: ``sum_i w_i (log(1 + exp(z_i)) - y_i z_i)``.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels, weights, reduction="sum"
    )
