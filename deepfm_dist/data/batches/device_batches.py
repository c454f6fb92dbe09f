"""Batches made on the device from a dataset stored there, bit for bit equal to the host's.

Order and negatives are integer functions of (seed, step), written here as tensor operations for any
device; `deepfm_dist.seeding` and `deepfm_dist.data.negatives` are the versions for one CPU core.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.negatives import NegativeSampler
from deepfm_dist.data.batches.row_batches import InMemoryRows, TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset, label_columns_in
from deepfm_dist.data.jagged import Jagged, Values
from deepfm_dist.data.layout import NEGATIVE_USER
from deepfm_dist.data.schema import Feature
from deepfm_dist.seeding import half_bits, mix, round_keys

BLOCK_ROWS = 1 << 24
"""Rows of a rank made at a time: a block of any size costs about 4,000 kernel launches."""
WORK_BYTES = 120
"""Bytes per row of a block: the integers being mixed, and the block itself."""


def _signed(word: int) -> int:
    """A 64-bit word as a torch int64: signed, wrapping."""
    return word - (1 << 64) if word >= 1 << 63 else word


_GOLDEN, _FIRST, _SECOND = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A logical right shift; torch's is arithmetic."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def mixed(words: Tensor) -> Tensor:
    """`deepfm_dist.seeding.mix` of ``[n]`` int64 words."""
    words = words + _GOLDEN
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def permuted(places: Tensor, n: int, seed: int) -> Tensor:
    """`deepfm_dist.seeding.permute` of ``[m]`` int64 places in ``[0, n)``.

    The host waits for the device: the number of rounds depends on the values.
    """
    keys, bits = [_signed(int(key)) for key in round_keys(seed)], int(half_bits(n))
    words = _rounds(places, keys, bits)
    outside = (words >= n).nonzero().squeeze(1)
    while len(outside):
        walking = _rounds(words[outside], keys, bits)
        words[outside] = walking
        outside = outside[walking >= n]
    return words


def _rounds(words: Tensor, keys: list[int], bits: int) -> Tensor:
    mask = (1 << bits) - 1
    left, right = words >> bits, words & mask
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        left = left ^ (mixed(right ^ first) & mask)
        right = right ^ (mixed(left ^ second) & mask)
    return (left << bits) | right


def _below(words: Tensor, bounds: Tensor | int) -> Tensor:
    """Maps random 64-bit words to ``[0, bound)``."""
    return (_shifted(words, 32) * bounds) >> 32


class _Lists:
    """A `Jagged` on a device."""

    def __init__(self, lists: Jagged, device: torch.device) -> None:
        self.offsets = _move(lists.offsets, device)
        self.values = _move(lists.values, device)
        self.lengths = self.offsets.diff()

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``[m]`` row numbers, negative for an empty row -> lengths ``[m]`` and all values."""
        there = rows >= 0
        known = torch.where(there, rows, 0)
        lengths = torch.where(there, self.lengths[known], 0)
        total = int(lengths.sum())
        # Source offset minus destination offset of each row's values.
        begins = self.offsets[known] - (lengths.cumsum(0) - lengths)
        places = torch.repeat_interleave(begins, lengths, output_size=total)
        return lengths, self.values[places + torch.arange(total, device=rows.device)]


class _Drawn:
    """A `NegativeSampler` on a device: one binary search finds a user's n-th unseen item."""

    def __init__(self, negatives: NegativeSampler, device: torch.device) -> None:
        self._of_host = negatives
        seen = _Lists(negatives.seen, device)
        self._begins, self._lengths = seen.offsets[:-1], seen.lengths
        self._stride = negatives.n_items + 1
        users = torch.arange(len(seen.lengths), device=device)
        owners = torch.repeat_interleave(users, seen.lengths, output_size=len(seen.values))
        inside = torch.arange(len(seen.values), device=device) - self._begins[owners]
        # Number of unseen items below each seen one: ascending within a user, and from user to
        # user.
        self._unseen_below = owners * self._stride + seen.values - inside

    def put(
        self, items: Tensor, rows: Tensor, slots: Tensor, negative_users: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Puts an epoch's negatives among the items; also returns which rows have none.

        Args:
            items: ``[m]`` int64: the rows' positives.
            rows: ``[m]`` int64: training rows.
            slots: ``[m]`` int64: 0 for the positive, k for its k-th negative.
            negative_users: ``[m]`` int64: users to draw negatives for.
            epoch: the epoch, counted from 0.
        """
        free = self._of_host.n_items - self._lengths[negative_users]
        words = mixed(rows ^ _signed(int(mix(np.uint64(self._of_host.seed_of(epoch))))))
        n = free.clamp(min=1, max=self._of_host.per_positive)
        low = ((slots - 1) * free).div(n, rounding_mode="floor")
        high = (slots * free).div(n, rounding_mode="floor")
        ranks = low + _below(mixed(words ^ slots), high - low) + _below(words, free)
        ranks = torch.where(ranks >= free, ranks - free, ranks)
        seen_before = torch.searchsorted(
            self._unseen_below, negative_users * self._stride + ranks, right=True
        )
        drawn = ranks + seen_before - self._begins[negative_users] + 1
        absent = slots > free
        return torch.where((slots > 0) & ~absent, drawn, items), absent


@dataclass
class _Field:
    """A categorical field of a block.

    Attributes:
        lengths: ``[steps, rows]`` of the bags; None: one value each.
        values: the values of all steps, concatenated.
        ends: offsets of the steps in ``values``, and their end.
    """

    lengths: Tensor | None
    values: Tensor
    ends: list[int]


@dataclass
class _Block:
    """The batches of consecutive full steps of an epoch.

    Attributes:
        first: global step of its first batch, from 1.
        steps: number of batches.
        fields: the fields, in the manifest's order.
        lengths: ``[fields, steps, height]`` int32; None: one value everywhere.
        dense: ``[steps, height, n_dense]`` float32.
        rows: ``[steps, height]`` of the users and items whose vectors each step gathers; -1 for
            none. All steps' vectors at once would be too large.
        labels: ``[steps, height]`` float32, or ``[steps, height, T]`` of several targets.
        weights: ``[steps, height]`` float32.
    """

    first: int
    steps: int
    fields: list[_Field]
    lengths: Tensor | None
    dense: Tensor
    labels: Tensor
    weights: Tensor
    rows: Mapping[str, Tensor]


class DeviceBatches:
    """The batches of a `TrainingBatches`, made on the device.

    The batches of many steps are made at once, and each batch is a slice: the host does not wait in
    between. An epoch's last batch, if shorter, comes from the host.

    Args:
        host: the batches to reproduce; `reason_for_host` must return None for it.
        device: where they are made.
    """

    threads = 0

    def __init__(self, host: TrainingBatches, device: torch.device) -> None:
        assert isinstance(host.source, InMemoryRows)
        self._host, self._device = host, device
        self.batch_size, self.steps_per_epoch = host.batch_size, host.steps_per_epoch
        self._order = host.source
        self._columns = _all_moved(host.source.columns, device)
        self._label_columns = label_columns_in(host.source.columns)
        self._drawn = None if host.negatives is None else _Drawn(host.negatives, device)
        collate = host.collate
        self._keys, self._categorical, self._dense = (
            collate.keys,
            collate.categorical,
            collate.dense,
        )
        self._vectors = collate.vectors
        self._of_entities = _all_moved(collate.fields, device)
        first, self._height = host.first, host.local_batch_size
        self._first, self._real = first, min(self._height, self.batch_size - first)
        self._full_steps = host.rows_per_epoch // self.batch_size  # of an epoch
        self._most = max(1, BLOCK_ROWS // self._real)
        self._ones = torch.ones(len(self._keys) * self._height, dtype=torch.int32, device=device)
        self._global_weight = host.global_weight(self.batch_size).to(device)
        self._block: _Block | None = None
        if device.type == "cuda":  # batches may be made on another stream than the arrays above
            torch.cuda.current_stream(device).synchronize()

    def batch(self, step: int) -> Batch:
        """This rank's rows of global step ``step``, counted from 1."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        if at >= self._full_steps:
            short = self._host.batch(step)
            if self._device.type == "cuda":
                short = short.pin_memory()
            return short.to(self._device, non_blocking=True)
        block = self._block
        if block is None or not block.first <= step < block.first + block.steps:
            self._block = None  # its memory is reused for the next one
            first = at // self._most * self._most
            steps = min(self._most, self._full_steps - first)
            block = self._block = self._made(epoch, first, steps)
        k = step - block.first
        lengths = self._ones if block.lengths is None else block.lengths[:, k].reshape(-1)
        values = [f.values[f.ends[k] : f.ends[k + 1]] for f in block.fields]
        sparse = KeyedJaggedTensor(
            self._keys,
            torch.cat(values),
            lengths=lengths,
            length_per_key=[len(of_field) for of_field in values],
        )
        dense = self._with_vectors(block.dense[k], {n: rows[k] for n, rows in block.rows.items()})
        labels, weights = block.labels[k], block.weights[k]
        return Batch(sparse, dense, labels, weights, self._global_weight, self._host.first)

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps ``first`` to ``last``, both included."""
        return map(self.batch, range(first, last + 1))

    def _made(self, epoch: int, first: int, steps: int) -> _Block:
        """Makes the batches of ``steps`` steps of an epoch from step ``first`` (from 0) on."""
        device, order = self._device, self._order
        begins = (first + torch.arange(steps, device=device)) * self.batch_size + self._first
        places = (begins[:, None] + torch.arange(self._real, device=device)).flatten()
        virtual = permuted(places, order.n, order.seed_of(epoch))
        rows = virtual.div(order.copies, rounding_mode="floor")
        slots = virtual - rows * order.copies
        users, items, weights, negative_users = (
            None if (column := self._columns.get(name)) is None else column[rows]
            for name in ("user", "item", "weight", NEGATIVE_USER)
        )
        by_target = [self._columns[name][rows] for name in self._label_columns]
        labels = torch.stack(by_target, 1) if len(by_target) > 1 else next(iter(by_target), None)
        if labels is None or self._drawn is not None:  # slot 0 is the positive
            labels = (slots == 0).float()
        context = rows
        if self._drawn is not None:
            assert users is not None and items is not None
            whose = users if negative_users is None else negative_users
            items, absent = self._drawn.put(items.long(), rows, slots, whose.long(), epoch)
            if self._host.negatives is not None and self._host.negatives.some_are_short:
                users, items, context = (torch.where(absent, -1, t) for t in (users, items, rows))
                weights = torch.where(absent, 0.0, 1.0 if weights is None else weights)
        if weights is None:
            weights = labels.new_ones(len(labels))
        index = {"user": users, "item": items, "context": context}
        hidden = self._hidden(virtual, epoch * self.steps_per_epoch + first + 1, steps)
        fields = [self._field(f, index, hidden, steps) for f in self._categorical]
        return _Block(
            first=epoch * self.steps_per_epoch + first + 1,
            steps=steps,
            fields=fields,
            lengths=self._lengths(fields, steps),
            dense=self._numbers(index, steps),
            labels=self._pad(labels.view(steps, self._real, *labels.shape[1:])),
            weights=self._pad(weights.view(steps, -1)),
            rows={
                entity: self._pad(rows.view(steps, -1), -1)
                for entity, rows in index.items()
                if rows is not None and any(f.entity == entity for f in self._vectors)
            },
        )

    def _hidden(self, virtual: Tensor, first_step: int, steps: int) -> dict[str, Tensor]:
        """`IdDropout.hidden` of the rows of some steps, ``[steps * rows]`` each."""
        dropout = self._host.id_dropout
        if not dropout.share:
            return {}
        hidden = {}
        for entity in ("user", "item"):
            keys = [_signed(dropout.key(entity, first_step + k)) for k in range(steps)]
            by_step = mixed(torch.tensor(keys, device=self._device))
            words = mixed(virtual.view(steps, -1) ^ by_step[:, None]).flatten()
            hidden[entity] = _shifted(words, 32) < dropout.threshold
        return hidden

    def _field(
        self,
        feature: Feature,
        index: Mapping[str, Tensor | None],
        hidden: Mapping[str, Tensor],
        steps: int,
    ) -> _Field:
        rows = index[feature.entity]
        assert rows is not None
        source = None if feature.is_id else self._source(feature)
        if isinstance(source, _Lists):
            lengths, values = source.take(rows.long())
        else:
            lengths, known = (rows >= 0).long(), rows
            if self._host.negatives is not None and self._host.negatives.some_are_short:
                known = rows[rows >= 0]
            values = known if source is None else source[known]
        if feature.names_entity and feature.entity in hidden:
            is_hidden = hidden[feature.entity]
            if len(values) < len(rows):
                is_hidden = is_hidden[rows >= 0]
            values = values.where(~is_hidden, 0)
        if not isinstance(source, _Lists) and len(values) == len(rows):
            ends = [k * self._real for k in range(steps + 1)]
            return _Field(None, values.int(), ends)
        by_step = lengths.view(steps, -1)
        ends = [0, *by_step.sum(1).cumsum(0).tolist()]
        return _Field(by_step.int(), values.int(), ends)

    def _lengths(self, fields: list[_Field], steps: int) -> Tensor | None:
        if self._real == self._height and all(field.lengths is None for field in fields):
            return None
        one = torch.ones(steps, self._real, dtype=torch.int32, device=self._device)
        return torch.stack([self._pad(one if f.lengths is None else f.lengths) for f in fields])

    def _numbers(self, index: Mapping[str, Tensor | None], steps: int) -> Tensor:
        shape = steps, self._height, len(self._dense)
        numbers = torch.zeros(shape, device=self._device)
        for column, feature in enumerate(self._dense):
            rows, source = index[feature.entity], self._source(feature)
            assert rows is not None and isinstance(source, Tensor)
            column_values = torch.where(rows >= 0, source[rows.clamp(min=0)].float(), 0.0)
            numbers[:, : self._real, column] = column_values.view(steps, -1)
        return numbers

    def _with_vectors(self, dense: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
        """A step's numeric fields, followed by the vectors of its users and items."""
        if not self._vectors:
            return dense
        columns = [dense]
        for feature in self._vectors:
            which, vectors = rows[feature.entity], self._source(feature)
            assert isinstance(vectors, Tensor)
            gathered = vectors[which.clamp(min=0)].float()
            columns.append(gathered.where(which[:, None] >= 0, 0.0))
        return torch.cat(columns, 1)

    def _source(self, feature: Feature) -> "Tensor | _Lists":
        columns = self._columns if feature.entity == "context" else self._of_entities
        column_values: Tensor | _Lists = columns[feature.name]
        return column_values

    def _pad(self, values: Tensor, value: int = 0) -> Tensor:
        """Pads ``[steps, rows, ...]`` to ``[steps, height, ...]`` with a value."""
        inner = [0, 0] * (values.dim() - 2)
        return torch.nn.functional.pad(values, (*inner, 0, self._height - self._real), value=value)


def reason_for_host(dataset: PreparedDataset, loss: str, accumulate_steps: int) -> str | None:
    """Why batches cannot be made on the device; None if they can.

    Args:
        dataset: the prepared dataset.
        loss: ``trainer.loss``.
        accumulate_steps: ``trainer.accumulate_steps``.
    """
    manifest = dataset.manifest
    if loss != "bce":
        return f"batches of users (trainer.loss={loss})"
    if accumulate_steps > 1:
        return f"batches in parts (trainer.accumulate_steps={accumulate_steps})"
    if manifest.has_history:
        return "histories of users"
    if manifest.sampled and (power := manifest.data.negatives.popularity_power):
        return f"negatives by popularity (data.negatives.popularity_power={power:g})"
    if manifest.splits["train"].size_bytes > dataset.memory_bytes:
        return f"rows streamed from disk (data.memory_bytes={dataset.memory_bytes})"
    return None


def device_bytes(host: TrainingBatches) -> int:
    """Bytes of device memory that `DeviceBatches` needs."""
    assert isinstance(host.source, InMemoryRows)
    held = [*host.source.columns.values(), *host.collate.fields.values()]
    total = sum(_bytes(values) for values in held)
    if host.negatives is not None:
        total += 8 * len(host.negatives.seen.values) + 16 * len(host.negatives.seen)
    rows = min(BLOCK_ROWS, host.local_batch_size * host.steps_per_epoch)
    return total + rows * (WORK_BYTES + 8 * (len(host.collate.keys) + len(host.collate.dense)))


def _bytes(values: Values) -> int:
    if isinstance(values, Jagged):
        return 2 * values.offsets.nbytes + values.values.nbytes
    return values.nbytes


def _move(values: Any, device: torch.device) -> Tensor:
    array = np.ascontiguousarray(values)
    if not array.flags.writeable:  # memory-mapped
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _all_moved(columns: Mapping[str, Values], device: torch.device) -> dict[str, Any]:
    return {
        name: _Lists(values, device) if isinstance(values, Jagged) else _move(values, device)
        for name, values in columns.items()
    }
