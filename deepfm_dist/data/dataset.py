"""A prepared dataset -> batches that do not depend on the world size."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec import KeyedJaggedTensor

from deepfm_dist.data.batch import Batch
from deepfm_dist.data.jagged import FloatArray, Int32Array, Int64Array, Jagged, Values, from_arrow
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.negatives import check_enough_unseen, draw_per_positive
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.seeding import derive_seed, permute

ABSENT = -1
"""Row number that stands for "nobody": all of its bags are empty."""


@dataclass(frozen=True)
class Rows:
    """Rows of a split, in file order.

    Attributes:
        users: ``[n]`` int32 rows of the user table, or None where the data has no users.
        items: ``[n]`` int32 rows of the item table, or None.
        labels: ``[n]`` float32; None where every row is a positive.
        context: values of the context fields, ``[n]`` each.
        n: number of rows.
    """

    users: Int32Array | None
    items: Int32Array | None
    labels: FloatArray | None
    context: Mapping[str, Values]
    n: int


class PreparedDataset:
    """Reads what `deepfm_dist.data.encode.prepare` wrote.

    Args:
        folder: ``prepared/<name>``.

    Raises:
        DataError: there is no dataset, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)

    def rows(self, split: str) -> Rows:
        """All rows of train, valid or test."""
        files = range(self.manifest.files)
        table = pa.concat_tables([self._read(f"{split}/part-{p:05d}.parquet") for p in files])
        of_row = [f.name for f in self.manifest.features if f.entity == "context"]
        users, items, labels = (
            table[name].to_numpy() if name in table.column_names else None
            for name in ("user", "item", "label")
        )
        context = {name: from_arrow(table[name]) for name in of_row}
        return Rows(users, items, labels, context, table.num_rows)

    def vocabulary(self, table: str) -> Vocabulary:
        """External ids of a table's rows."""
        return Vocabulary.from_table(self._read(f"vocabulary/{table}.parquet"))

    @cached_property
    def entity_fields(self) -> dict[str, Values]:
        """Fields that describe users and items; element r belongs to row r of the entity."""
        fields: dict[str, Values] = {}
        for name in self.manifest.entities:
            of_entity = [f for f in self.manifest.features if f.entity == name and not f.is_id]
            if of_entity:
                table = self._read(f"entities/{name}.parquet", [f.name for f in of_entity])
                fields |= {f.name: from_arrow(table[f.name]) for f in of_entity}
        return fields

    def entity_ids(self, entity: str) -> pa.Array:
        """``[rows]`` string: external ids; row 0 (unknown) is null."""
        return self._read(f"entities/{entity}.parquet", ["id"])["id"].combine_chunks()

    def titles(self) -> pa.Array | None:
        """``[rows]`` string: titles of the items, where the configuration names them."""
        if self.manifest.data.titles is None:
            return None
        return self._read("entities/item.parquet", ["title"])["title"].combine_chunks()

    def popularity(self) -> Int64Array:
        """``[rows]`` int64: training positives of each item."""
        return np.asarray(self._read("entities/item.parquet", ["count"])["count"], np.int64)

    @cached_property
    def history(self) -> Jagged:
        """Each user's training items, in time order where times are known."""
        return Jagged.from_arrow(self._read("entities/user.parquet", ["history"])["history"])

    def positives(self, split: str) -> Jagged:
        """Each user's positive items in a split; those outside the vocabulary are item 0."""
        if split == "train":
            return self.history
        rows = self.rows(split)
        if rows.users is None or rows.items is None:
            raise DataError(f"{self.folder}: rows without users and items have no top items")
        mask = np.ones(rows.n, bool) if rows.labels is None else rows.labels == 1
        return Jagged.from_pairs(rows.users[mask], rows.items[mask], self.manifest.entities["user"])

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        try:
            return pq.read_table(self.folder / name, columns=columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{self.folder / name}: missing or damaged ({' '.join(str(error).split())[:80]}); "
                f"delete {self.folder} and prepare it anew"
            ) from None


class Collator:
    """Users, items and context of some rows -> a batch."""

    def __init__(self, dataset: PreparedDataset) -> None:
        manifest = dataset.manifest
        self.keys = [f.name for f in manifest.categorical]
        self._categorical, self._dense = manifest.categorical, manifest.dense
        self._fields = dataset.entity_fields

    def __call__(
        self,
        users: Int32Array | None,
        items: Int32Array | None,
        context: Mapping[str, Values] | None = None,
        context_rows: npt.NDArray[np.integer] | None = None,
        labels: FloatArray | None = None,
        n_real: int | None = None,
        global_weight: float | None = None,
    ) -> Batch:
        """Looks up every field.

        Args:
            users: ``[b]`` rows of the user table; `ABSENT` leaves the user's fields empty.
            items: ``[b]`` rows of the item table; `ABSENT` leaves the item's fields empty.
            context: context fields of many rows; None leaves them empty.
            context_rows: ``[b]`` which of these rows; `ABSENT` leaves the context empty.
            labels: ``[b]``; default zeros.
            n_real: how many leading rows are no padding; default all.
            global_weight: weight sum over all ranks; default ``n_real``.
        """
        given = {"user": users, "item": items, "context": context_rows}
        height = next(len(rows) for rows in given.values() if rows is not None)
        nobody = np.full(height, ABSENT, np.int32)
        index: dict[str, npt.NDArray[np.integer]] = {
            entity: nobody if rows is None else rows for entity, rows in given.items()
        }
        lengths, values = [], []
        for feature in self._categorical:
            n, v = self._bags(feature, index[feature.entity], context)
            lengths.append(n)
            values.append(v)
        dense = np.zeros((height, len(self._dense)), np.float32)
        for column, feature in enumerate(self._dense):
            rows = index[feature.entity]
            source = self._source(feature, context)
            if isinstance(source, np.ndarray):
                present = rows >= 0
                dense[present, column] = source[rows[present]]
        n_real = height if n_real is None else n_real
        weights = np.zeros(height, np.float32)
        weights[:n_real] = 1
        return Batch(
            KeyedJaggedTensor(
                self.keys,
                torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
            ),
            torch.from_numpy(dense),
            torch.zeros(height) if labels is None else torch.from_numpy(labels),
            torch.from_numpy(weights),
            torch.tensor(float(n_real if global_weight is None else global_weight)),
        )

    def _source(self, feature: Feature, context: Mapping[str, Values] | None) -> Values | None:
        if feature.entity == "context":
            return None if context is None else context[feature.name]
        return self._fields[feature.name]

    def _bags(
        self,
        feature: Feature,
        rows: npt.NDArray[np.integer],
        context: Mapping[str, Values] | None,
    ) -> tuple[Int32Array, Int32Array]:
        present = rows >= 0
        if feature.is_id:
            return present.astype(np.int32), rows[present].astype(np.int32)
        source = self._source(feature, context)
        if source is None:
            return np.zeros(len(rows), np.int32), np.zeros(0, np.int32)
        if isinstance(source, Jagged):
            return source.take(rows)
        return present.astype(np.int32), source[rows[present]].astype(np.int32)


class TrainingBatches:
    """The batches of a training run: a pure function of (seed, step, rank, world size).

    The global batch of a step, all ranks' rows together, is one of (seed, step) alone.

    Where negatives are sampled, a positive is followed by its ``per_positive`` negatives in a
    virtual list of rows, and it is that list which is shuffled: a batch has exactly
    ``batch_size`` rows, and every epoch draws new negatives.

    Args:
        dataset: the prepared dataset.
        batch_size: rows per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        seed: of order and negatives.

    Raises:
        ConfigError: the batch is too small to give every rank a row.
        DataError: a user has fewer unseen items than negatives are wanted.
    """

    def __init__(
        self, dataset: PreparedDataset, batch_size: int, rank: int, world_size: int, seed: int
    ) -> None:
        self._rows = dataset.rows("train")
        self._collate = Collator(dataset)
        self._seed = seed
        self._per_positive = 0
        if dataset.manifest.sampled:
            assert self._rows.users is not None
            self._per_positive = dataset.manifest.data.negatives.per_positive
            self._n_items = dataset.manifest.entities["item"] - 1
            history = dataset.history
            self._history = Jagged(history.offsets, history.values - np.int32(1)).sorted()
            check_enough_unseen(
                self._per_positive,
                self._history,
                self._rows.users,
                self._n_items,
                "data.negatives.per_positive",
            )
        self.rows_per_epoch = self._rows.n * (1 + self._per_positive)
        self.batch_size = min(batch_size, self.rows_per_epoch)
        self.local_batch_size = -(-self.batch_size // world_size)
        if self.local_batch_size * (world_size - 1) >= self.batch_size:
            raise ConfigError(
                f"a batch of {self.batch_size} rows over {world_size} ranks leaves a rank without "
                f"rows; use at most {self.batch_size} ranks that divide it, or a larger "
                f"trainer.batch_size"
            )
        self.steps_per_epoch = -(-self.rows_per_epoch // self.batch_size)
        self._first = rank * self.local_batch_size

    def batch(self, step: int) -> Batch:
        """This rank's rows of global step ``step``, counted from 1."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        begin = at * self.batch_size
        end = min(begin + self.batch_size, self.rows_per_epoch)
        mine = np.arange(
            min(begin + self._first, end),
            min(begin + self._first + self.local_batch_size, end),
        )
        order = derive_seed(self._seed, "order", epoch)
        return self._collated(permute(mine, self.rows_per_epoch, order), epoch, float(end - begin))

    def _collated(self, virtual: Int64Array, epoch: int, global_weight: float) -> Batch:
        rows, slots = np.divmod(virtual, 1 + self._per_positive)
        users = None if self._rows.users is None else self._rows.users[rows]
        items = None if self._rows.items is None else self._rows.items[rows]
        labels = np.ones(len(rows), np.float32)
        if self._rows.labels is not None:
            labels = self._rows.labels[rows]
        if self._per_positive:
            assert users is not None and items is not None
            negative = slots > 0
            labels[negative] = 0
            items[negative] = 1 + draw_per_positive(
                rows[negative],
                slots[negative] - 1,
                users[negative],
                self._per_positive,
                self._history,
                self._n_items,
                derive_seed(self._seed, "negatives", epoch),
            )
        height = self.local_batch_size
        return self._collate(
            padded(users, height, ABSENT),
            padded(items, height, ABSENT),
            self._rows.context,
            padded(rows, height, ABSENT),
            padded(labels, height, 0),
            n_real=len(rows),
            global_weight=global_weight,
        )

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps ``first`` to ``last``, both included."""
        for step in range(first, last + 1):
            yield self.batch(step)


def padded(array: Any, height: int, value: float) -> Any:
    """``[m]`` -> ``[height]`` by appending ``value``; None stays None."""
    if array is None or len(array) == height:
        return array
    return np.concatenate([array, np.full(height - len(array), value, array.dtype)])
