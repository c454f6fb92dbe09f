"""A prepared dataset -> batches that do not depend on the world size."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchrec import KeyedJaggedTensor

from deepfm_dist.data.bags import Bags, chosen, kept_in_bags
from deepfm_dist.data.batch import Batch
from deepfm_dist.data.histories import HISTORY, SEEN
from deepfm_dist.data.jagged import (
    FloatArray,
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    from_arrow,
    mapped,
    mapped_values,
    offsets_of,
    taken,
    union,
)
from deepfm_dist.data.lanes import Lanes, Taken
from deepfm_dist.data.layout import Layout
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.negatives import item_weights, put_negatives, users_short_of_negatives
from deepfm_dist.data.read_ahead import read_ahead
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.seeding import derive_seed, permuted_range

log = logging.getLogger(__name__)
ABSENT = -1
"""Row number that stands for "nobody": all of its bags are empty."""


@dataclass(frozen=True)
class Rows:
    """Rows of a split, in file order.

    Attributes:
        users: ``[n]`` int32 rows of the user table, or None where the data has no users.
        items: ``[n]`` int32 rows of the item table, or None.
        labels: ``[n]`` float32; None where every row is a positive.
        weights: ``[n]`` float32, 1 in the mean of training rows; None where all are 1.
        context: values of the context fields, ``[n]`` each.
        n: number of rows.
    """

    users: Int32Array | None
    items: Int32Array | None
    labels: FloatArray | None
    context: Mapping[str, Values]
    n: int
    weights: FloatArray | None = None

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Rows":
        """Rows from the columns of their files."""
        context = dict(columns)
        roles = [context.pop(name, None) for name in ("user", "item", "label", "weight")]
        users, items, labels, weights = roles
        n = len(next(iter(columns.values())))
        return cls(users, items, labels, context, n, weights)


class PreparedDataset:
    """Reads what `deepfm_dist.data.encode.prepare` wrote.

    Args:
        folder: ``prepared/<name>``.
        memory_bytes: up to which size something is held in memory; larger training rows are
            streamed, larger histories and columns of users and items mapped. Default: as it was
            prepared with.

    Raises:
        DataError: there is no dataset, or a file of it is missing, damaged or at odds with the
            manifest; whatever reads values raises it too, for ids that are no rows of their table.
    """

    def __init__(self, folder: Path, memory_bytes: int | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.layout = Layout(folder, self.manifest)
        self.layout.check_sizes()
        wanted = self.manifest.data.memory_bytes if memory_bytes is None else memory_bytes
        self.memory_bytes = wanted

    def row_columns(self, split: str) -> list[str]:
        """What the model and the sampler need of a split's rows."""
        present = self.layout.open(f"{split}/part-00000.parquet").schema_arrow.names
        of_rows = [f.name for f in self.manifest.features if f.entity == "context"]
        return [n for n in ("user", "item", "label", "weight", "drawer", *of_rows) if n in present]

    def columns(self, split: str, names: list[str]) -> dict[str, Values]:
        """Some columns of all rows of train, valid or test."""
        files = range(self.manifest.files)
        tables = [self._read(f"{split}/part-{p:05d}.parquet", names) for p in files]
        table = pa.concat_tables(tables)
        self.layout.agree(split, "rows", table.num_rows, self.manifest.splits[split].rows)
        return {name: from_arrow(table[name]) for name in names}

    def rows(self, split: str) -> Rows:
        """All rows of train, valid or test."""
        return Rows.of(self.columns(split, self.row_columns(split)))

    def vocabulary(self, table: str) -> Vocabulary:
        """External ids of a table's rows."""
        return Vocabulary.from_table(self._read(f"vocabulary/{table}.parquet"))

    @cached_property
    def entity_fields(self) -> dict[str, Values]:
        """Fields that describe users and items; element r belongs to row r of the entity."""
        fields: dict[str, Values] = {}
        for name in self.manifest.entities:
            of_entity = [
                f for f in self.manifest.features if f.entity == name and f.describes_entity
            ]
            if of_entity:
                path = f"entities/{name}.parquet"
                kinds = self.layout.open(path).schema_arrow
                for f in of_entity:
                    if pa.types.is_list(kinds.field(f.name).type):
                        fields[f.name] = self._mapped_if_large(name, [f.name], _as_it_is)
                    else:
                        fields[f.name] = self._values_mapped_if_large(name, f.name)
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
        return self._mapped_if_large("user", [HISTORY], _as_it_is)

    @cached_property
    def rare_history(self) -> Jagged:
        """Training items of the users without a row in the user table (`has_rare_users`)."""
        if not self.has_rare_users:
            return Jagged(np.zeros(1, np.int64), np.zeros(0, np.int32))
        return self._mapped_if_large("rare", [HISTORY], _as_it_is)

    def met(self, split: str) -> list[Jagged]:
        """What users have met in a split, whether they liked it or not.

        Args:
            split: train, valid or test.

        Returns:
            Lists that together hold each user's items, those with a row in the item table; of
            train the positives (`history`), and what else was seen.
        """
        self._check_users_and_items()
        return [
            self.history if name == HISTORY else self._mapped_if_large("user", [name], _as_it_is)
            for name in SEEN[split]
        ]

    def seen(self, held_out: bool) -> Jagged:
        """What the sampler avoids: all that users have met, whether they liked it or not.

        Args:
            held_out: whether what they met in valid and test is avoided too.

        Returns:
            Row r: distinct items, ascending, from 0 (row - 1), of user r; behind the users, of
            those without a row (`column drawer` of the training rows).
        """
        splits = ("train", "valid", "test") if held_out else ("train",)
        names = [name for split in splits for name in SEEN[split]]
        seen = self._mapped_if_large("user", names, _ascending_from_0)
        if self.has_rare_users:
            rare = self._mapped_if_large("rare", names, _ascending_from_0)
            seen = Jagged.concatenated([seen, rare])
        return seen

    @property
    def has_rare_users(self) -> bool:
        """Whether training rows belong to users without a row in the user table."""
        return (self.folder / "entities" / "rare.parquet").exists()

    def positives(self, split: str) -> Jagged:
        """Each user's positive items in a split; those outside the vocabulary are item 0."""
        if split == "train":
            return self.history
        self._check_users_and_items()
        columns: dict[str, Any] = self.columns(split, ["user", "item", "label"])
        mask = columns["label"] == 1
        n_users = self.manifest.entities["user"]
        return Jagged.from_pairs(columns["user"][mask], columns["item"][mask], n_users)

    def _check_users_and_items(self) -> None:
        if not {"user", "item"} <= self.manifest.entities.keys():
            raise DataError(f"{self.folder}: rows without users and items have no top items")

    def _mapped_if_large(
        self, entity: str, columns: list[str], change: Callable[[list[Jagged]], Jagged]
    ) -> Jagged:
        """List columns of an entity table as one; large ones are unpacked once and then mapped.

        Every rank of a machine maps the same pages, where otherwise each would hold a copy.
        """
        name = f"entities/{entity}.parquet"
        with self.layout.open(name) as file:
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            schema = file.metadata.schema
            leaves = [
                i
                for i in range(file.metadata.num_columns)
                if schema.column(i).path.split(".")[0] in columns
            ]
        n_values = sum(group.column(leaf).num_values for group in groups for leaf in leaves)
        if 4 * n_values <= self.memory_bytes:
            table = self._read(name, columns)
            return change([Jagged.from_arrow(table[column]) for column in columns])

        def pieces() -> Iterator[Jagged]:
            for g in range(len(groups)):
                table = self.read_group(name, g, columns)
                yield change([Jagged.from_arrow(table[column]) for column in columns])

        parts = "-".join((entity, *columns, change.__name__))
        found = mapped(self.folder / "mapped" / parts, pieces)
        self.layout.check_current()
        return found

    def _values_mapped_if_large(self, entity: str, column: str) -> Values:
        """A plain column of an entity table; see `_mapped_if_large`."""
        name = f"entities/{entity}.parquet"
        rows = self.group_rows(name)
        if 4 * sum(rows) <= self.memory_bytes:
            return from_arrow(self._read(name, [column])[column])

        def pieces() -> Iterator[npt.NDArray[Any]]:
            for g in range(len(rows)):
                yield self.read_group(name, g, [column])[column].to_numpy()

        found = mapped_values(self.folder / "mapped" / f"{entity}-{column}", sum(rows), pieces)
        self.layout.check_current()
        return found

    def group_rows(self, name: str) -> list[int]:
        """Rows of each row group of a file."""
        metadata = self.layout.open(name).metadata
        return [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]

    def read_group(self, name: str, group: int, columns: list[str]) -> pa.Table:
        """Some columns of a row group."""
        try:
            table = self.layout.open(name).read_row_group(group, columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise self.layout.damaged(name, error) from None
        return self.layout.check(name, table)

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.layout.read(name, columns)


class Collator:
    """Users, items and context of some rows -> a batch."""

    def __init__(self, dataset: PreparedDataset) -> None:
        manifest = dataset.manifest
        self.keys = [f.name for f in manifest.categorical]
        self._categorical, self._dense = manifest.categorical, manifest.dense
        self._fields = dataset.entity_fields
        self._source_of = manifest.data.source_of
        self._histories = DrawnHistories(dataset) if manifest.has_history else None

    def __call__(
        self,
        users: Int32Array | None,
        items: Int32Array | None,
        context: Mapping[str, Values] | None = None,
        context_rows: npt.NDArray[np.integer] | None = None,
        labels: FloatArray | None = None,
        n_real: int | None = None,
        global_weight: float | None = None,
        weights: FloatArray | None = None,
        bags: Bags | None = None,
    ) -> Batch:
        """Looks up every field.

        Args:
            users: ``[b]`` rows of the user table; `ABSENT` leaves the user's fields empty.
            items: ``[b]`` rows of the item table; `ABSENT` leaves the item's fields empty.
            context: context fields of many rows; None leaves them empty.
            context_rows: ``[b]`` which of these rows; `ABSENT` leaves the context empty.
            labels: ``[b]``; default zeros.
            n_real: how many leading rows are no padding; default all.
            global_weight: weight that the loss is divided by; default ``n_real``.
            weights: ``[n_real]`` of the rows; default ones.
            bags: each row's bag of items, for history fields; default: the user's training items,
                nothing left out.
        """
        given = {"user": users, "item": items, "context": context_rows}
        height = next(len(rows) for rows in given.values() if rows is not None)
        nobody = np.full(height, ABSENT, np.int32)
        index: dict[str, npt.NDArray[np.integer]] = {
            entity: nobody if rows is None else rows for entity, rows in given.items()
        }
        lengths, values = [], []
        if self._histories is not None and bags is None:
            bags = self._histories.whole(index["user"])
        for feature in self._categorical:
            if feature.history is not None:
                assert bags is not None
                n, v = self._of_items(self._source_of(feature), bags)
            else:
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
        row_weights = np.zeros(height, np.float32)
        row_weights[:n_real] = 1 if weights is None else weights
        return Batch(
            KeyedJaggedTensor(
                self.keys,
                torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
                # Known here; TorchRec would add the lengths up, on CUDA waiting for the sums.
                length_per_key=[len(of_field) for of_field in values],
            ),
            torch.from_numpy(dense),
            torch.zeros(height) if labels is None else torch.from_numpy(labels),
            torch.from_numpy(row_weights),
            torch.tensor(float(n_real if global_weight is None else global_weight)),
        )

    def _of_items(self, field: Feature, bags: Bags) -> Bags:
        """Bags of items -> bags of all that a field says of these items."""
        if field.is_id:
            return bags
        lengths, values = self._bags(field, bags[1], None)
        running = offsets_of(lengths)
        return np.diff(running[offsets_of(bags[0])]).astype(np.int32), values

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
        source = None if feature.is_id else self._source(feature, context)
        if isinstance(source, Jagged):
            return source.take(rows)
        if source is None and not feature.is_id:
            return np.zeros(len(rows), np.int32), np.zeros(0, np.int32)
        lengths = (rows >= 0).astype(np.int32)
        if not lengths.all():  # seldom: only the last batch of an epoch is padded
            rows = rows[rows >= 0]
        values = rows if source is None else source[rows]
        return lengths, values.astype(np.int32, copy=False)


class DrawnHistories:
    """The bags of items that history fields are of.

    Args:
        dataset: the prepared dataset.
        seed: of the draws while training.
    """

    def __init__(self, dataset: PreparedDataset, seed: int = 0) -> None:
        spec = dataset.manifest.data.history
        self.dropout, self.max_length = spec.dropout, spec.max_length
        self._history, self._seed = dataset.history, seed
        self._fixed_seed = derive_seed(dataset.manifest.seed, "history")

    def whole(self, users: npt.NDArray[np.integer], history: Jagged | None = None) -> Bags:
        """All of the users' items, or ``max_length`` of them, always the same ones.

        Args:
            users: ``[m]`` rows of the histories.
            history: of others than the users of training.
        """
        history = self._history if history is None else history
        items = history.take(users)
        if self.max_length is None or not (items[0] > self.max_length).any():
            return items
        cut = kept_in_bags(history, users, users, self._fixed_seed, max_length=self.max_length)
        return chosen(items, cut)

    def beside(self, users: Int32Array, targets: Int32Array, rows: Int64Array, epoch: int) -> Bags:
        """What rows see in training: their users' items but the row's own, thinned out.

        Args:
            users: ``[m]`` the rows' users.
            targets: ``[m]`` the positive of each row, or of the positive its negative goes with:
                what a bag lacks must not tell one from the other.
            rows: ``[m]`` number of that positive among all training rows.
            epoch: from 0.
        """
        flags = kept_in_bags(
            self._history, users, rows, self._seed_of(epoch), self.dropout, self.max_length, targets
        )
        return chosen(self._history.take(users), flags)

    def split(self, users: Int32Array, epoch: int) -> tuple[Bags, Bags]:
        """Users' items in two: the bag, and what was left out of it."""
        flags = kept_in_bags(
            self._history, users, users, self._seed_of(epoch), self.dropout, self.max_length
        )
        items = self._history.take(users)
        return chosen(items, flags), chosen(items, ~flags)

    def _seed_of(self, epoch: int) -> int:
        return derive_seed(self._seed, "history", epoch)


class TrainingBatches:
    """The batches of a training run: a pure function of (seed, step, rank, world size).

    The global batch of a step, all ranks' rows together, is one of (seed, step) alone.

    Where negatives are sampled, a positive is followed by its ``per_positive`` negatives in a
    virtual list of rows, and it is that list which is shuffled: a batch has exactly
    ``batch_size`` rows, and every epoch draws new negatives unless they are to stay.

    Training rows are held in memory where they fit, shuffled as a whole; else they are streamed
    from disk (`deepfm_dist.data.lanes`).

    Args:
        dataset: the prepared dataset.
        batch_size: rows per step over all ranks.
        rank: this rank.
        world_size: number of ranks.
        seed: of order and negatives.
        threads: that make batches ahead; of a streamed dataset's one at most.

    Raises:
        ConfigError: the batch is too small to give every rank a row.
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
    ) -> None:
        manifest = dataset.manifest
        self._collate = Collator(dataset)
        self._seed = seed
        self._negatives = Negatives(dataset, seed) if manifest.sampled else None
        self._histories = DrawnHistories(dataset, seed) if manifest.has_history else None
        copies = 1 + (manifest.data.negatives.per_positive if manifest.sampled else 0)
        self.rows_per_epoch = manifest.splits["train"].rows * copies
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
        columns = dataset.row_columns("train")
        self._source: InMemory | Lanes
        self.threads = threads
        if manifest.splits["train"].size_bytes <= dataset.memory_bytes:
            self._source = InMemory(dataset.columns("train", columns), copies, seed)
        else:
            self.threads = min(threads, 1)  # lanes are read in order
            share = self.local_batch_size / self.batch_size
            self._source = Lanes(
                dataset.layout, manifest, columns, copies, share, self.batch_size, seed
            )

    def batch(self, step: int) -> Batch:
        """This rank's rows of global step ``step``, counted from 1."""
        epoch, at = divmod(step - 1, self.steps_per_epoch)
        begin = at * self.batch_size
        end = min(begin + self.batch_size, self.rows_per_epoch)
        first = min(self._first, end - begin)
        last = min(self._first + self.local_batch_size, end - begin)
        taken_rows = self._source.take(epoch, begin, end, first, last)
        return self._collated(taken_rows, epoch, float(end - begin))

    def _collated(self, found: Taken, epoch: int, global_weight: float) -> Batch:
        index, columns = found.index, found.columns
        users, labels, drawers = (
            _picked(columns.get(name), index) for name in ("user", "label", "drawer")
        )
        if labels is None or self._negatives is not None:  # slot 0 is the positive
            labels = (found.slot == 0).astype(np.float32)
        items = bags = None
        if self._negatives is None or self._histories is not None:
            items = _picked(columns.get("item"), index)
        if self._histories is not None:
            assert users is not None and items is not None
            lengths, values = self._histories.beside(users, items, found.row, epoch)
            bags = padded(lengths, self.local_batch_size, 0), values
        if self._negatives is not None:
            assert users is not None
            drawers = users if drawers is None else drawers
            if items is None:  # only those that no negative takes the place of
                positive = np.flatnonzero(found.slot == 0)
                items = np.empty(len(index), np.int32)
                items[positive] = _picked(columns["item"], index[positive])
            self._negatives.put(items, found.row, found.slot, drawers, epoch)
        weights = _picked(columns.get("weight"), index)
        context_rows = index
        if self._negatives is not None and self._negatives.some_are_short:
            assert users is not None and items is not None and drawers is not None
            absent = self._negatives.absent(found.slot, drawers)
            users, items = np.where(absent, ABSENT, users), np.where(absent, ABSENT, items)
            context_rows = np.where(absent, ABSENT, index)
            weights = np.where(absent, np.float32(0), 1 if weights is None else weights)
            if bags is not None:
                bags = chosen(bags, ~np.repeat(padded(absent, len(bags[0]), True), bags[0]))
        height = self.local_batch_size
        return self._collate(
            padded(users, height, ABSENT),
            padded(items, height, ABSENT),
            columns,
            padded(context_rows, height, ABSENT),
            padded(labels, height, 0),
            n_real=len(index),
            global_weight=global_weight,
            weights=weights,
            bags=bags,
        )

    def steps(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps ``first`` to ``last``, both included."""
        return read_ahead(self.batch, first, last, self.threads)


class InMemory:
    """All training rows, shuffled as a whole in every epoch.

    Args:
        columns: the rows' columns.
        copies: times that each row comes: once, and once for each negative.
        seed: of the order.
    """

    def __init__(self, columns: Mapping[str, Values], copies: int, seed: int) -> None:
        self._columns, self._copies, self._seed = columns, copies, seed
        self._n = len(next(iter(columns.values()))) * copies

    def take(self, epoch: int, begin: int, end: int, first: int, last: int) -> Taken:
        """Rows ``first`` to ``last`` (excluded) of the batch of rows ``begin`` to ``end``."""
        order = derive_seed(self._seed, "order", epoch)
        virtual = permuted_range(begin + first, begin + last, self._n, order)
        rows = virtual // self._copies
        return Taken(self._columns, rows, rows, virtual - rows * self._copies)


class Negatives:
    """Draws the negatives of training rows, as the configuration says.

    Args:
        dataset: the prepared dataset.
        seed: of the draws.

    Attributes:
        some_are_short: whether some users have fewer unseen items than negatives are wanted.

    Raises:
        DataError: no user has an unseen item.
    """

    def __init__(self, dataset: PreparedDataset, seed: int) -> None:
        self._spec, self._seed = dataset.manifest.data.negatives, seed
        self._n_items = dataset.manifest.entities["item"] - 1
        self._seen = dataset.seen(self._spec.avoid == "all")
        self._weights = None
        if self._spec.popularity_power:
            self._weights = item_weights(dataset.popularity()[1:], self._spec.popularity_power)
        active = np.flatnonzero(self._seen.lengths)
        wanted = self._spec.per_positive
        n_short = users_short_of_negatives(wanted, self._seen, active, self._n_items)
        self.some_are_short = n_short > 0
        self._n_unseen = self._n_items - self._seen.lengths if n_short else None
        if n_short and (self._seen.lengths[active] == self._n_items).all():
            raise DataError(
                f"{dataset.folder}: every user has met all {self._n_items:,} items, so that no "
                f"negative exists; add items, or label the rows (data.task=ctr)"
            )
        if n_short:
            log.warning(
                "data.negatives.per_positive=%d: %s of %s users have fewer unseen items, and get "
                "as many negatives as there are",
                wanted,
                f"{n_short:,}",
                f"{len(active):,}",
            )

    def put(
        self,
        items: Int32Array,
        rows: Int64Array,
        slots: Int64Array,
        drawers: Int32Array,
        epoch: int,
    ) -> None:
        """Overwrites items, rows of the item table, with the negatives of an epoch.

        Args:
            items: ``[m]``; those with slot 0 stay, and those that are `absent`.
            rows: ``[m]`` training rows.
            slots: ``[m]`` which of a row's negatives, from 1.
            drawers: ``[m]`` whose negatives.
            epoch: from 0.
        """
        put_negatives(
            items,
            rows,
            slots,
            drawers,
            self._spec.per_positive,
            self._seen,
            self._n_items,
            derive_seed(self._seed, "negatives", epoch if self._spec.redraw else 0),
            self._weights,
            first_item=1,
        )

    def absent(self, slots: Int64Array, drawers: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """``[m]`` bool: which rows stand for a negative that does not exist; see `put`."""
        if self._n_unseen is None:
            return np.zeros(len(slots), bool)
        return slots > self._n_unseen[drawers]


def _as_it_is(bags: list[Jagged]) -> Jagged:
    return bags[0]


def _ascending_from_0(bags: list[Jagged]) -> Jagged:
    """Rows of the item table in any of several lists -> items from 0, each once, ascending."""
    joint = union(bags)
    return Jagged(joint.offsets, joint.values - np.int32(1))


def _picked(values: Values | None, index: Int64Array) -> Any:
    return None if values is None else taken(values, index)


def padded(array: Any, height: int, value: float) -> Any:
    """``[m]`` -> ``[height]`` by appending ``value``; None stays None."""
    if array is None or len(array) == height:
        return array
    return np.concatenate([array, np.full(height - len(array), value, array.dtype)])
