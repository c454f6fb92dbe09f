"""Batches of rows of a prepared dataset; they do not depend on the world size."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepfm_dist.data.batches.batch import Batch, local_batch_size
from deepfm_dist.data.batches.collation import ABSENT, Collator, padded
from deepfm_dist.data.batches.histories import HistorySampler, chosen
from deepfm_dist.data.batches.id_dropout import Hidden, IdDropout
from deepfm_dist.data.batches.lanes import Lanes, SelectedRows
from deepfm_dist.data.batches.negatives import NegativeSampler
from deepfm_dist.data.dataset import PreparedDataset, labels_in
from deepfm_dist.data.jagged import Int32Array, Int64Array, Values, taken
from deepfm_dist.data.layout import NEGATIVE_USER
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.prefetch import read_ahead
from deepfm_dist.errors import ConfigError
from deepfm_dist.seeding import derive_seed, permuted_range


def _check(manifest: Manifest) -> None:
    """Refuses time-ordered histories: a row would see what its user took later."""
    settings: dict[str, int | str] = {
        f"data.features: {f.name}: last": f.last for f in manifest.features if f.last
    }
    if manifest.data.history.targets == "later":
        settings["data.history.targets"] = "later"
    for setting, value in settings.items():
        raise ConfigError(
            f"{setting}={value} is for models trained on users; set trainer.loss=softmax, or leave "
            f"{setting.split()[-1]} out"
        )


class TrainingBatches:
    """The batches of a training run: a pure function of (seed, step, rank, world size).

    The global batch of a step, over all ranks, depends on (seed, step) alone.

    Where negatives are sampled, a positive is followed by its ``per_positive`` negatives in a
    virtual list of rows, and it is that list which is shuffled: a batch has exactly ``batch_size``
    rows, and every epoch draws new negatives unless they are fixed.

    Training rows are kept in memory and fully shuffled if they fit; otherwise they are streamed
    from disk (`deepfm_dist.data.batches.lanes`).

    Args:
        dataset: the prepared dataset.
        batch_size: rows per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        seed: the seed of order and negatives.
        threads: number of threads that prefetch batches; at most one for a streamed dataset.
        id_dropout: share of user and item ids that each step replaces by the unknown id.
        rows: columns of the rows to train on, in memory; default: the training rows.

    Attributes:
        source: the training rows.
        collate: makes batches of them.
        negatives: the sampler; None if rows are labelled.
        id_dropout: replaces ids.
        first: position of this rank's first row in a global batch.

    Raises:
        ConfigError: the batch is too small to give every rank a row, or histories are time-ordered.
        DataError: no user has an unseen item to draw as a negative.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        threads: int = 0,
        id_dropout: float = 0.0,
        rows: Mapping[str, Values] | None = None,
    ) -> None:
        manifest = dataset.manifest
        _check(manifest)
        self.collate = Collator(dataset)
        self.id_dropout = IdDropout(id_dropout, seed)
        self._seed = seed
        self.negatives = NegativeSampler(dataset, seed) if manifest.sampled else None
        self._histories = HistorySampler(dataset, seed) if manifest.has_history else None
        self._label_shares = manifest.label_shares
        self._copies = copies = 1 + manifest.data.negatives.per_positive if manifest.sampled else 1
        n_rows = manifest.splits["train"].rows if rows is None else len(next(iter(rows.values())))
        self.rows_per_epoch = n_rows * copies
        self.batch_size = min(batch_size, self.rows_per_epoch)
        self.local_batch_size = local_batch_size(self.batch_size, world_size, "row")
        self.steps_per_epoch = -(-self.rows_per_epoch // self.batch_size)
        self.first = rank * self.local_batch_size
        columns = dataset.row_columns("train")
        self.source: InMemoryRows | Lanes
        self.threads = threads
        if rows is not None:
            self.source = InMemoryRows(rows, copies, seed)
        elif manifest.splits["train"].size_bytes <= dataset.memory_bytes:
            self.source = InMemoryRows(dataset.columns("train", columns), copies, seed)
        else:
            self.threads = min(threads, 1)  # lanes are read in order
            share = self.local_batch_size / self.batch_size
            self.source = Lanes(
                dataset.files, manifest, columns, copies, share, self.batch_size, seed=seed
            )

    def batch(self, step: int) -> Batch:
        """This rank's rows of global step ``step``, counted from 1."""
        return self.with_users(step)[1]

    def with_users(self, step: int) -> tuple[Int32Array | None, Batch]:
        """``[b]`` rows of the user table (`ABSENT` for padding) and `batch`."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        begin = at * self.batch_size
        end = min(begin + self.batch_size, self.rows_per_epoch)
        first = min(self.first, end - begin)
        last = min(self.first + self.local_batch_size, end - begin)
        taken_rows = self.source.take(epoch, begin, end, first, last)
        return self._collate(taken_rows, step, end - begin)

    def _collate(
        self, selected: SelectedRows, step: int, n_rows: int
    ) -> tuple[Int32Array | None, Batch]:
        """The users and the batch of this rank's rows; ``n_rows`` counts all ranks' rows."""
        epoch = (step - 1) // self.steps_per_epoch
        index, columns = selected.index, selected.columns
        users, negative_users = (
            _take(columns.get(name), index) for name in ("user", NEGATIVE_USER)
        )
        labels = labels_in(columns, index)
        if labels is None or self.negatives is not None:  # slot 0 is the positive
            labels = (selected.slot == 0).astype(np.float32)
        items = bags = None
        if self.negatives is None or self._histories is not None:
            items = _take(columns.get("item"), index)
        if self._histories is not None:
            assert users is not None and items is not None
            lengths, values = self._histories.excluding_target(users, items, selected.row, epoch)
            bags = padded(lengths, self.local_batch_size, 0), values
        if self.negatives is not None:
            assert users is not None
            negative_users = users if negative_users is None else negative_users
            if items is None:  # only rows that no negative replaces
                positive = np.flatnonzero(selected.slot == 0)
                items = np.empty(len(index), np.int32)
                items[positive] = _take(columns["item"], index[positive])
            self.negatives.put(items, selected.row, selected.slot, negative_users, epoch)
        weights = _take(columns.get("weight"), index)
        context_rows = index
        if self.negatives is not None and self.negatives.some_are_short:
            assert users is not None and items is not None and negative_users is not None
            absent = self.negatives.absent(selected.slot, negative_users)
            users, items = np.where(absent, ABSENT, users), np.where(absent, ABSENT, items)
            context_rows = np.where(absent, ABSENT, index)
            weights = np.where(absent, np.float32(0), 1 if weights is None else weights)
            if bags is not None:
                bags = chosen(bags, ~np.repeat(padded(absent, len(bags[0]), True), bags[0]))
        height = self.local_batch_size
        users = padded(users, height, ABSENT)
        batch = self.collate(
            users,
            padded(items, height, ABSENT),
            columns,
            padded(context_rows, height, ABSENT),
            padded(labels, height, 0),
            n_real=len(index),
            global_weight=self.global_weight(n_rows),
            weights=weights,
            bags=bags,
            hidden=self._hidden(selected, step),
        )
        return users, replace(batch, first=self.first)

    def global_weight(self, n_rows: int) -> Tensor:
        """`Batch.global_weight` for a global batch of this many rows."""
        shares = 1.0 if self._label_shares is None else self._label_shares
        return torch.tensor(n_rows * shares, dtype=torch.float32)

    def _hidden(self, selected: SelectedRows, step: int) -> Hidden | None:
        if not self.id_dropout.share:
            return None
        numbers = selected.row * self._copies + selected.slot
        hidden = self.id_dropout.hidden(step, user=numbers, item=numbers)
        height = self.local_batch_size
        return hidden and {name: padded(rows, height, False) for name, rows in hidden.items()}

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps ``first`` to ``last``, both included."""
        return read_ahead(self.batch, first, last, self.threads)


class InMemoryRows:
    """All training rows, fully shuffled in every epoch.

    Args:
        columns: the rows' columns.
        copies: occurrences of each row: once, and once per negative.
        seed: the seed of the order.

    Attributes:
        n: rows of an epoch, counting copies.
    """

    def __init__(self, columns: Mapping[str, Values], copies: int, seed: int) -> None:
        self.columns, self.copies, self._seed = columns, copies, seed
        self.n = len(next(iter(columns.values()))) * copies

    def seed_of(self, epoch: int) -> int:
        """The seed of an epoch's order."""
        return derive_seed(self._seed, "order", epoch)

    def take(self, epoch: int, begin: int, end: int, first: int, last: int) -> SelectedRows:
        """Rows ``first`` to ``last`` (excluded) of the batch of rows ``begin`` to ``end``."""
        virtual = permuted_range(begin + first, begin + last, self.n, self.seed_of(epoch))
        rows = virtual // self.copies
        return SelectedRows(self.columns, rows, rows, virtual - rows * self.copies)


def _take(values: Values | None, index: Int64Array) -> Any:
    return None if values is None else taken(values, index)
