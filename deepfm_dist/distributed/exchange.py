"""Exchanges ids between ranks: sizes from host to host, and only those lengths that vary."""

from collections.abc import Sequence, Set

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.dist_data import KJTAllToAllTensorsAwaitable, SplitsAllToAllAwaitable
from torchrec.distributed.types import Awaitable


class _ExchangedIds(KeyedJaggedTensor):
    """Exchanged ids without reading back the number per field.

    TorchRec reads it back for all received ids, though only several groups of tables need it.
    """

    def split(self, segments: list[int]) -> list[KeyedJaggedTensor]:
        """The ids of groups of fields; one group has all."""
        if segments == [len(self.keys())]:
            return [self]
        pieces: list[KeyedJaggedTensor] = super().split(segments)
        return pieces


class IdExchange:
    """Replaces ``KJTAllToAll.forward``, in TorchRec's pipeline and in a plain loop.

    TorchRec 1.8 copies the sizes to the GPU, exchanges them there and reads them back, which
    synchronises seven times on CUDA. The sizes to send are known on the host (from `Batch.sparse`),
    except for row-wise tables, where they depend on the ids.

    Each rank sends with the sizes which of its single-valued fields have a value in every row.
    If that holds on all ranks, as in every batch but a padded one, and all have as many rows, the
    receiver fills in the lengths, which are ones. If it holds for all fields, there is no exchange
    of lengths.

    Args:
        pg: the ranks.
        splits: number of fields that each rank receives.
        stagger: TorchRec's reordering for table_row_wise.
        single_valued: fields that never have more than one value in a row.
    """

    def __init__(
        self,
        pg: dist.ProcessGroup,
        splits: Sequence[int],
        stagger: int,
        single_valued: Set[str] = frozenset(),
    ) -> None:
        self.pg, self.splits, self.stagger = pg, list(splits), stagger
        self.single_valued = single_valued

    def __call__(self, ids: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Starts an exchange of ids, whose keys are ordered by receiving rank. All ranks."""
        return _Sizes(self, ids)


class _Sizes(Awaitable[Awaitable[KeyedJaggedTensor]]):
    """An exchange of sizes; the ids are sent when it is over."""

    def __init__(self, exchange: IdExchange, ids: KeyedJaggedTensor) -> None:
        super().__init__()
        self._exchange, self._ids = exchange, ids
        ranks, height = exchange.pg.size(), ids.stride()
        _, self._sent = ids.dist_splits(exchange.splits)
        numbers = zip(ids.keys(), ids.length_per_key(), strict=True)
        single = [(key, n) for key, n in numbers if key in exchange.single_valued]
        self._single = [key for key, _ in single]
        is_full = [[int(n == height)] * ranks for _, n in single]
        self._sizes = [self._sent, [height] * ranks, *is_full]
        self._awaitable: SplitsAllToAllAwaitable | None = None
        if ranks > 1:
            rows = list(torch.tensor(self._sizes).unbind())
            self._awaitable = SplitsAllToAllAwaitable(rows, exchange.pg)

    def _wait_impl(self) -> Awaitable[KeyedJaggedTensor]:
        sizes = self._sizes if self._awaitable is None else self._awaitable.wait()
        received, heights, *is_full = sizes
        full = set()
        if len(set(heights)) == 1:
            full = {key for key, ranks in zip(self._single, is_full, strict=True) if all(ranks)}
        return _Ids(self._exchange, self._ids, self._sent, received, heights, full)


class _Ids(KJTAllToAllTensorsAwaitable):
    """An exchange of ids, and of the lengths of fields that are not ``full``."""

    def __init__(
        self,
        exchange: IdExchange,
        ids: KeyedJaggedTensor,
        sent: list[int],
        received: list[int],
        heights: list[int],
        full: Set[str],
    ) -> None:
        rank = exchange.pg.rank()
        by_rank = _split(ids.keys(), exchange.splits)
        varying = [[key for key in keys if key not in full] for keys in by_rank]
        input_splits, output_splits, tensors = [sent], [received], [ids.values()]
        labels = ["values"]
        if any(varying):
            labels.insert(0, "lengths")
            input_splits.insert(0, [len(keys) * ids.stride() for keys in varying])
            output_splits.insert(0, [len(varying[rank]) * height for height in heights])
            tensors.insert(0, _lengths_without(full, ids))
        self._as_high = len(set(heights)) == 1
        self._varying = [key not in full for key in by_rank[rank]]
        super().__init__(
            pg=exchange.pg,
            input=ids,
            splits=exchange.splits,
            input_splits=input_splits,
            output_splits=output_splits,
            input_tensors=tensors,
            labels=labels,
            keys=by_rank[rank],
            device=ids.device(),
            stagger=exchange.stagger,
            stride_per_rank=heights,
        )

    def _wait_impl(self) -> KeyedJaggedTensor:
        """What all ranks have sent, by field."""
        ids = self._input
        if self._workers == 1:
            return _ExchangedIds(
                ids.keys(),
                ids.values(),
                lengths=ids.lengths(),
                stride=ids.stride(),
                length_per_key=ids.length_per_key(),
            )
        if not self._as_high:  # as some inference batches are not
            received: KeyedJaggedTensor = super()._wait_impl()
            return received
        for awaitable in self._awaitables:
            awaitable.wait()
        values, height = self._output_tensors[-1], ids.stride()
        n_rows = self._workers * height
        lengths = self._lengths(height)
        if self._recat is not None and height > 0:
            lengths, values, _ = torch.ops.fbgemm.permute_2D_sparse_data(
                self._recat, lengths, values, None, values.numel()
            )
        return _ExchangedIds(
            self._keys,
            values,
            lengths=lengths.view(-1),
            stride=n_rows,
            length_per_key=None if any(self._varying) else [n_rows] * len(self._keys),
        )

    def _lengths(self, height: int) -> Tensor:
        """``[ranks * fields, height]``: the lengths, by sender and field."""
        n_fields, n_varying = len(self._keys), sum(self._varying)
        if n_fields == n_varying:
            return self._output_tensors[0].view(-1, height)
        shape = (self._workers, n_fields, height)
        lengths = torch.ones(shape, dtype=self._input.lengths().dtype, device=self._device)
        if n_varying:
            received = self._output_tensors[0].view(self._workers, n_varying, height).unbind(1)
            places = [i for i, varies in enumerate(self._varying) if varies]
            for place, of_field in zip(places, received, strict=True):
                lengths[:, place] = of_field
        return lengths.view(-1, height)


def _lengths_without(full: Set[str], ids: KeyedJaggedTensor) -> Tensor:
    """The lengths of all fields but the full ones, by field."""
    if not full:
        return ids.lengths()
    by_field = ids.lengths().view(-1, ids.stride())
    return torch.cat([by_field[i] for i, key in enumerate(ids.keys()) if key not in full])


def _split(keys: list[str], sizes: list[int]) -> list[list[str]]:
    """Consecutive pieces."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [keys[end - size : end] for end, size in zip(ends, sizes, strict=True)]
