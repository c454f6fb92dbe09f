"""The model's input for one step on one rank."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural


class _OnDevice(Pipelineable):
    """A dataclass of tensors and plain numbers that can be moved between devices."""

    def _changed(self, change: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: change(v) for k, v in values.items() if not isinstance(v, int)}
        return replace(self, **moved)

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self._changed(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in pinned memory."""
        return self._changed(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Marks the tensors as used by ``stream``, so that their memory is not reused too early."""

        def record(value: Any) -> Any:
            value.record_stream(stream)
            return value

        self._changed(record)


def local_batch_size(batch_size: int, world_size: int, unit: str) -> int:
    """Number of rows or users of each rank; the last rank may have fewer.

    Args:
        batch_size: rows or users of all ranks.
        world_size: number of ranks.
        unit: row or user.

    Raises:
        ConfigError: a rank would have none.
    """
    local = -(-batch_size // world_size)
    if local * (world_size - 1) >= batch_size:
        raise ConfigError(
            f"a batch of {plural(batch_size, unit)} over {world_size} ranks leaves a rank without "
            f"{unit}s; use at most {plural(batch_size, 'rank')}, or a larger trainer.batch_size"
        )
    return local


@dataclass
class Batch(_OnDevice):
    """One rank's rows of a global batch; padding rows have weight 0 and empty bags.

    Attributes:
        sparse: table rows of every categorical field, keys in the manifest's order; int32
            ``lengths [F * b]`` and ``values [sum]``, field-major.
        dense: ``[b, n_dense + sum of dims]`` float32: numeric fields, then vectors.
        labels: ``[b]`` float32, 0 or 1; with several targets ``[b, T]``, -1 if unknown.
        weights: ``[b]`` float32, 1 in the mean of training rows; 0 for padding.
        global_weight: ``[]`` float32, the divisor of the loss: number of rows on all ranks without
            padding; with several targets ``[T]``, that number times the share of training rows that
            have the label. It equals the expected sum of weights, and every rank can compute it
            without communication.
        first: number of the first row in the global batch.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    global_weight: Tensor
    first: int = 0

    def split(self, pieces: int) -> Iterator["Batch"]:
        """The same rows in several batches; the last ones are shorter if they do not divide evenly.

        ``global_weight`` stays that of the full batch, so that the losses of the pieces add up to
        its loss.

        Raises:
            ConfigError: there are more pieces than rows.
        """
        if pieces == 1:
            yield self
            return
        height, keys = len(self.labels), self.sparse.keys()
        if height < pieces:
            raise ConfigError(
                f"trainer.accumulate_steps={pieces}: a rank has only {plural(height, 'row')} "
                f"of a batch; use a larger trainer.batch_size"
            )
        lengths = self.sparse.lengths().view(len(keys), height).tensor_split(pieces, 1)
        bags = [self.sparse[key].values() for key in keys]
        by_key = [b.split([int(n[f].sum()) for n in lengths]) for f, b in enumerate(bags)]
        rows = [tensor.tensor_split(pieces) for tensor in (self.dense, self.labels, self.weights)]
        first = self.first
        for i, length in enumerate(lengths):
            parts = [of_key[i] for of_key in by_key]
            sparse = KeyedJaggedTensor(
                keys,
                torch.cat(parts),
                lengths=length.flatten(),
                length_per_key=[len(part) for part in parts],
            )
            yield Batch(sparse, *(column[i] for column in rows), self.global_weight, first)
            first += length.shape[1]


@dataclass
class UserBatch(_OnDevice):
    """One rank's users of a step, their target items, and the candidate items to compare with.

    Everything is looked up at once: row r of ``sparse`` has the fields of the r-th user and those
    of the r-th item, so that one collective serves both sides; the shorter side is padded with
    empty bags. The first ``n_shared`` items are this rank's share of the candidates, which the
    ranks exchange; rows of the targets may follow, one per target.

    Attributes:
        sparse: sparse features, as a `Batch`'s, of ``height`` rows.
        dense: ``[height, n_dense + sum of dims]`` float32: numeric fields, then vectors.
        n_users: number of this rank's users, padding included.
        n_shared: candidates that this rank looks up.
        n_candidates: candidates of all ranks together, without the last rank's padding.
        target_users: ``[T]`` int64: index of the target's user among this rank's users.
        target_items: ``[T]`` int64: indices among the candidates; empty if the targets have rows of
            their own.
        target_weights: ``[T]`` float32.
        known_users: ``[M]`` int64: users of (user, candidate) pairs where the candidate is a
            training item and so no negative.
        known_items: ``[M]`` int64: the candidates of these pairs.
        log_expected: ``[n_candidates]`` float32: log of the candidate's expected count in this
            step; 0 if every item is a candidate.
        global_weight: ``[]`` float32: the sum of target weights over all ranks; 1 if that is 0.
        first: number of the first user in the global batch.
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    n_users: int
    n_shared: int
    n_candidates: int
    target_users: Tensor
    target_items: Tensor
    target_weights: Tensor
    known_users: Tensor
    known_items: Tensor
    log_expected: Tensor
    global_weight: Tensor
    first: int = 0

    def split(self, pieces: int) -> Iterator["UserBatch"]:
        """The batch itself: all users of a step share its candidates, so it cannot be split."""
        assert pieces == 1
        yield self
