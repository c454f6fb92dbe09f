"""TorchRec's train pipeline with a check that every step's loss is finite."""

import math
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DeepFMError


class NonFiniteLoss(DeepFMError):
    """The loss of a step is NaN or infinite; no weight has been touched by it."""


class TrainPipeline(TrainPipelineSparseDist[Any, Any]):
    """Copies the next batches and exchanges their ids while the current one trains.

    The loss is summed over the ranks before backward: fused tables are updated in backward, so
    that a NaN found later would already be in them.

    Args:
        model: the sharded module; its forward returns (loss, output).
        optimizer: the combined optimizer.
        world: the ranks.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, world: World) -> None:
        super().__init__(model, optimizer, world.device)
        self._world = world
        self.mean_loss = float("nan")
        """The last step's loss over the global batch."""

    def _backward(self, losses: Tensor) -> None:
        # A rank's loss is its share of the global mean; DDP and TorchRec average gradients over
        # the ranks, so that the shares must be scaled up to add up to the mean's gradient.
        self.mean_loss = float(self._world.sum(losses.detach().clone()))
        if not math.isfinite(self.mean_loss):
            raise NonFiniteLoss(
                f"the loss is {self.mean_loss}; lower the learning rates (optimizer.tables.lr, "
                f"optimizer.dense.lr) or look for extreme values in numeric fields"
            )
        super()._backward(losses * self._world.world_size)
