"""What the model consumes in one step on one rank."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from deepfm_dist.errors import ConfigError


@dataclass
class Batch(Pipelineable):
    """One rank's rows of a global batch; rows that pad it have weight 0 and empty bags.

    Attributes:
        sparse: table rows of every categorical field, keys in the manifest's order; int32
            ``lengths [F * b]`` and ``values [sum]``, field-major.
        dense: ``[b, n_dense]`` float32 numeric fields.
        labels: ``[b]`` float32, 0 or 1.
        weights: ``[b]`` float32, 1 in the mean of training rows; 0 for padding.
        global_weight: ``[]`` float32, what the loss is divided by: the rows of all ranks, padding
            aside. It is the sum of weights in the mean, and a rank knows it without asking.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    global_weight: Tensor

    def split(self, pieces: int) -> Iterator["Batch"]:
        """The same rows in several batches, the last ones shorter where they do not divide.

        ``global_weight`` stays the whole batch's, so that the pieces' losses add up to its loss.

        Raises:
            ConfigError: there are more pieces than rows.
        """
        if pieces == 1:
            yield self
            return
        height, keys = len(self.labels), self.sparse.keys()
        if height < pieces:
            raise ConfigError(
                f"trainer.accumulate_steps={pieces}: a rank has only {height} rows of a batch; use "
                f"a larger trainer.batch_size"
            )
        lengths = self.sparse.lengths().view(len(keys), height).tensor_split(pieces, 1)
        bags = [self.sparse[key].values() for key in keys]
        by_key = [b.split([int(n[f].sum()) for n in lengths]) for f, b in enumerate(bags)]
        rows = [tensor.tensor_split(pieces) for tensor in (self.dense, self.labels, self.weights)]
        for i, length in enumerate(lengths):
            values = torch.cat([of_key[i] for of_key in by_key])
            sparse = KeyedJaggedTensor(keys, values, lengths=length.flatten())
            yield Batch(sparse, *(column[i] for column in rows), self.global_weight)

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
