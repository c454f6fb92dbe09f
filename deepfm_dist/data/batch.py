"""What the model consumes in one step on one rank."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """One rank's rows of a global batch; rows that pad it have weight 0 and empty bags.

    Attributes:
        sparse: table rows of every categorical field, keys in the manifest's order; int32
            ``lengths [F * b]`` and ``values [sum]``, field-major.
        dense: ``[b, n_dense]`` float32 numeric fields.
        labels: ``[b]`` float32, 0 or 1.
        weights: ``[b]`` float32; 0 for padding.
        global_weight: ``[]`` float32: the sum of weights over all ranks.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    global_weight: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same on another device."""
        return Batch(
            self.sparse.to(device, non_blocking),
            self.dense.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.weights.to(device, non_blocking=non_blocking),
            self.global_weight.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The same in pinned memory."""
        return Batch(
            self.sparse.pin_memory(),
            self.dense.pin_memory(),
            self.labels.pin_memory(),
            self.weights.pin_memory(),
            self.global_weight.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the memory alive until ``stream`` has used it."""
        self.sparse.record_stream(stream)
        for tensor in (self.dense, self.labels, self.weights, self.global_weight):
            tensor.record_stream(stream)
