"""Reads a prepared dataset: rows, vocabularies, and fields of users and items."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.jagged import (
    FloatArray,
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    from_arrow,
    joined,
    mapped,
    mapped_values,
    offsets_of,
    taken,
    union,
)
from deepfm_dist.data.layout import GENERATION, HISTORY, NEGATIVE_USER, SEEN, DatasetFiles
from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.schema import LABEL_OF, OUT_OF_VOCABULARY
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import DataError

_USERS_AT_ONCE = 1 << 20
_VECTORS_IN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Rows:
    """Rows of a split, in file order.

    Attributes:
        users: ``[n]`` int32 rows of the user table, or None if the data has no users.
        items: ``[n]`` int32 rows of the item table, or None.
        labels: ``[n]`` float32, ``[n, T]`` for several targets; None if every row is a positive.
        weights: ``[n]`` float32, 1 in the mean of training rows; None if all are 1.
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
        labels = labels_in(columns)
        for name in label_columns_in(columns):
            del context[name]
        roles = [context.pop(name, None) for name in ("user", "item", "weight")]
        users, items, weights = roles
        n = len(next(iter(columns.values())))
        return cls(users, items, labels, context, n, weights)


def labels_in(
    columns: Mapping[str, Any], rows: npt.NDArray[np.integer] | None = None
) -> FloatArray | None:
    """Labels from the columns of their files.

    Args:
        columns: the columns of many rows.
        rows: ``[n]`` selected rows; None: all.

    Returns:
        ``[n]`` float32, or ``[n, T]`` for several targets, `NO_LABEL` if unknown; None without a
        label.
    """
    by_target: list[Any] = [
        columns[name] if rows is None else taken(columns[name], rows)
        for name in label_columns_in(columns)
    ]
    return np.stack(by_target, 1) if len(by_target) > 1 else next(iter(by_target), None)


def label_columns_in(names: Iterable[str]) -> list[str]:
    """The label columns among these, in the order of the targets."""
    return [name for name in names if name == "label" or name.startswith(LABEL_OF)]


class PreparedDataset:
    """Reads what `deepfm_dist.data.preparation.local.prepare` wrote.

    Args:
        folder: ``prepared/<name>``.
        memory_bytes: limit of what is held in memory: larger training rows are streamed, larger
            histories and columns of users and items memory-mapped. Default: the setting it was
            prepared with.

    Raises:
        DataError: there is no dataset, or a file is missing, damaged or inconsistent with the
            manifest. Readers raise it, too, for ids that are not rows of their table.
    """

    def __init__(self, folder: Path, memory_bytes: int | None = None) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self.files = DatasetFiles(folder, self.manifest)
        self.files.check_sizes()
        wanted = self.manifest.data.memory_bytes if memory_bytes is None else memory_bytes
        self.memory_bytes = wanted
        self.past: tuple[str, ...] = ("train",)
        """Splits whose positives are in `history`; see `with_validation`."""
        self.held_out: Jagged | None = None
        """Training items that serve as validation items; see `holding_out`."""
        self._whole: Self | None = None

    def holding_out(self, held_out: Jagged) -> Self:
        """The same dataset with some of the users' known items held out for validation.

        `with_validation` undoes it.

        Args:
            held_out: each user's items of `history` to use for validation.
        """
        cut = copy(self)
        for name in ("history", "training_history"):  # cached values of the full dataset
            cut.__dict__.pop(name, None)
        cut.__dict__["_train_history"] = _without(self.history, held_out)
        cut.held_out, cut._whole, cut.past = held_out, self, ("train",)
        return cut

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows or held-out items."""
        return self.held_out is not None or self.manifest.splits["valid"].rows > 0

    def with_validation(self) -> Self:
        """The same dataset with validation rows treated as past interactions.

        They become part of the users' histories. What was fitted to training rows, such as
        vocabularies and popularity, stays.
        """
        if self._whole is not None:
            return self._whole
        known = {"user", "item"} <= self.manifest.entities.keys()
        if not (known and self.manifest.splits["valid"].positives):
            return self
        later = copy(self)
        for name in ("history", "training_history"):  # cached values of the original dataset
            later.__dict__.pop(name, None)
        later.past = ("train", "valid")
        return later

    def row_columns(self, split: str) -> list[str]:
        """The columns of a split's rows that model and sampler need."""
        present = self.files.open(f"{split}/part-00000.parquet").schema_arrow.names
        context_fields = [f.name for f in self.manifest.features if f.entity == "context"]
        labels = self.manifest.data.interactions.label_columns
        return [
            n
            for n in ("user", "item", *labels, "weight", NEGATIVE_USER, *context_fields)
            if n in present
        ]

    def columns(self, split: str, names: list[str]) -> dict[str, Values]:
        """Some columns of all rows of train, valid or test."""
        files = range(self.manifest.files)
        tables = [self._read(f"{split}/part-{p:05d}.parquet", names) for p in files]
        table = pa.concat_tables(tables)
        self.files.agree(split, "rows", table.num_rows, self.manifest.splits[split].rows)
        return {name: from_arrow(table[name]) for name in names}

    def rows(self, split: str) -> Rows:
        """All rows of train, valid or test."""
        return Rows.of(self.columns(split, self.row_columns(split)))

    def vocabulary(self, table: str) -> Vocabulary:
        """A table's vocabulary."""
        return Vocabulary.from_table(self._read(f"vocabulary/{table}.parquet"))

    @cached_property
    def entity_fields(self) -> dict[str, Values]:
        """Fields that describe users and items; element r belongs to row r of the entity."""
        return self._fields(cold=False)

    @cached_property
    def entity_fields_with_cold(self) -> dict[str, Values]:
        """`entity_fields` with cold items (`Manifest.cold`) appended to the item table."""
        return self._fields(cold=True) if self.manifest.cold else self.entity_fields

    def _fields(self, cold: bool) -> dict[str, Values]:
        fields: dict[str, Values] = {}
        for name in self.manifest.entities:
            cold_fields = [
                f for f in self.manifest.features if f.entity == name and f.describes_entity
            ]
            if cold_fields:
                kinds = self.files.open(f"entities/{name}.parquet").schema_arrow
                for f in cold_fields:
                    if pa.types.is_list(kinds.field(f.name).type):
                        fields[f.name] = self._mapped_if_large(name, [f.name], _as_it_is, cold)
                    else:
                        fields[f.name] = self._values_mapped_if_large(name, f.name, cold)
        return fields

    def reused_rows(self, vocabulary_hash: str) -> dict[str, Int64Array]:
        """Rows that belonged to different ids in an earlier dataset, by table.

        Args:
            vocabulary_hash: the hash of the earlier dataset's vocabularies.
        """
        chain = (*self.manifest.grown_from, self.manifest.vocabulary_hash)
        if vocabulary_hash not in chain:
            return {}
        reused = {}
        for entity in self.manifest.entities:
            name = f"entities/{entity}.parquet"
            if GENERATION in self.files.open(name).schema_arrow.names:
                generations = self._read(name, [GENERATION])[GENERATION].to_numpy()
                reused[entity] = np.flatnonzero(generations > chain.index(vocabulary_hash))
        rows = {}
        for feature in self.manifest.categorical:
            source = feature
            if feature.history is not None:
                source = self.manifest.data.source_of(feature)
            if source.is_id and source.entity in reused:
                rows[feature.table_name] = reused[source.entity]
        return rows

    def entity_ids(self, entity: str, cold: bool = False) -> pa.Array:
        """``[rows]`` string: external ids; row 0 (unknown) is null.

        Args:
            entity: user or item.
            cold: whether those of cold items (`Manifest.cold`) follow.
        """
        return self._entity_texts(entity, "id", cold)

    def _entity_texts(self, entity: str, column: str, cold: bool) -> pa.Array:
        names = self.files.entity_files(entity, cold)
        return pa.concat_arrays([self._read(n, [column])[column].combine_chunks() for n in names])

    def titles(self, cold: bool = False) -> pa.Array | None:
        """``[rows]`` string: titles of the items, if configured.

        Args:
            cold: whether those of cold items (`Manifest.cold`) follow.
        """
        if self.manifest.data.titles is None:
            return None
        return self._entity_texts("item", "title", cold)

    def popularity(self) -> Int64Array:
        """``[rows]`` int64: training positives of each item, without cold items."""
        return np.asarray(self._read("entities/item.parquet", ["count"])["count"], np.int64)

    @cached_property
    def history(self) -> Jagged:
        """Each user's training items, in order of time if times are known.

        For a dataset `with_validation`, followed by the items of validation rows.
        """
        if self.past == ("train",):
            return self._train_history
        train, valid = self._train_history, self.positives("valid")
        owners = np.repeat(np.arange(len(valid)), valid.lengths)
        known = (owners > OUT_OF_VOCABULARY) & (valid.values > OUT_OF_VOCABULARY)
        known &= valid.values < self.manifest.entities["item"]  # cold items are in no history
        valid = Jagged.from_pairs(owners[known], valid.values[known], len(valid))
        if 4 * len(train.values) <= self.memory_bytes:
            return _with_new(train, valid)

        def pieces() -> Iterator[Jagged]:
            for begin in range(0, len(train), _USERS_AT_ONCE):
                end = min(begin + _USERS_AT_ONCE, len(train))
                yield _with_new(
                    _lists_between(train, begin, end), _lists_between(valid, begin, end)
                )

        return mapped(self.folder / "mapped" / "user-history-valid", pieces)

    @cached_property
    def _train_history(self) -> Jagged:
        return self._mapped_if_large("user", [HISTORY], _as_it_is)

    @cached_property
    def rare_history(self) -> Jagged:
        """Training items of the users without a row in the user table (`has_rare_users`)."""
        if not self.has_rare_users:
            return Jagged.empty(0)
        return self._mapped_if_large("rare", [HISTORY], _as_it_is)

    @cached_property
    def training_history(self) -> Jagged:
        """`history`, but empty for held-out users (``split.method=users``)."""
        data = self.manifest.data
        if data.split.method != "users" or data.refit:
            return self.history
        is_trained = np.ones(len(self.history), bool)
        for split in (split for split in SPLITS if split not in self.past):
            is_trained[np.asarray(self.columns(split, ["user"])["user"])] = False
        lengths = np.where(is_trained, self.history.lengths, 0)
        values = self.history.values[np.repeat(is_trained, self.history.lengths)]
        return Jagged(offsets_of(lengths), values)

    def met(self, split: str) -> list[Jagged]:
        """All items of users' rows in a split, liked or not.

        Args:
            split: train, valid or test.

        Returns:
            Lists that together hold each user's items with a row in the item table; for train, the
            positives and the others.
        """
        self._check_users_and_items()
        return [
            self._train_history
            if name == HISTORY
            else self._mapped_if_large("user", [name], _as_it_is)
            for name in SEEN[split]
        ]

    def seen(self, held_out: bool) -> Jagged:
        """The items that the sampler avoids: all items of users' rows, liked or not.

        Args:
            held_out: whether to include valid and test.

        Returns:
            Row r: distinct ascending items of user r, counted from 0 (row - 1); rows for users
            without a table row follow (see `layout.NEGATIVE_USER`).
        """
        splits = ("train", "valid", "test") if held_out else self.past
        names = [name for split in splits for name in SEEN[split]]
        n_items = self.manifest.entities["item"]

        def _ascending_from_0(bags: list[Jagged]) -> Jagged:
            return drawable_items(bags, n_items)

        if self.held_out is not None and not held_out:
            others = [self._mapped_if_large("user", [n], _as_it_is) for n in names if n != HISTORY]
            seen = _ascending_from_0([self._train_history, *others])
        else:
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
        """Each user's positive items in a split, in order of time if known; unknown items are 0."""
        if split == "train":
            return self.training_history
        if split == "valid" and self.held_out is not None:
            return self.held_out
        self._check_users_and_items()
        names = ["user", "item", "label"]
        has_time = "time" in self.files.open(f"{split}/part-00000.parquet").schema_arrow.names
        columns: dict[str, Any] = self.columns(split, [*names, "time"] if has_time else names)
        rows = np.flatnonzero(columns["label"] == 1)
        if has_time:
            rows = rows[np.argsort(columns["time"][rows], kind="stable")]
        n_users = self.manifest.entities["user"]
        return Jagged.from_pairs(columns["user"][rows], columns["item"][rows], n_users)

    def _check_users_and_items(self) -> None:
        if not {"user", "item"} <= self.manifest.entities.keys():
            raise DataError(f"{self.folder}: rows without users and items cannot be ranked")

    def _mapped_if_large(
        self,
        entity: str,
        columns: list[str],
        change: Callable[[list[Jagged]], Jagged],
        cold: bool = False,
    ) -> Jagged:
        """List columns of an entity table, joined; large ones are unpacked once and memory-mapped.

        The ranks of a machine share the pages.
        """
        names = self.files.entity_files(entity, cold)
        groups, n_values = [], 0
        for name in names:
            with self.files.open(name) as file:
                schema = file.metadata.schema
                leaves = [
                    i
                    for i in range(file.metadata.num_columns)
                    if schema.column(i).path.split(".")[0] in columns
                ]
                for g in range(file.num_row_groups):
                    group = file.metadata.row_group(g)
                    n_values += sum(group.column(leaf).num_values for leaf in leaves)
                    groups.append((name, g))

        def read(tables: list[pa.Table]) -> Jagged:
            table = pa.concat_tables([table.select(columns) for table in tables])
            return change([Jagged.from_arrow(table[column]) for column in columns])

        if 4 * n_values <= self.memory_bytes:
            return read([self._read(name, columns) for name in names])

        def pieces() -> Iterator[Jagged]:
            for name, g in groups:
                yield read([self.read_group(name, g, columns)])

        parts = "-".join((entity, *columns, change.__name__, *["cold"] * (len(names) > 1)))
        bags = mapped(self.folder / "mapped" / parts, pieces)
        self.files.check_current()
        return bags

    def _values_mapped_if_large(self, entity: str, column: str, cold: bool) -> Values:
        """A column of scalars or vectors of an entity table; see `_mapped_if_large`.

        Vectors are mapped beyond a few MiB: copies per rank would dominate memory.
        """
        names = self.files.entity_files(entity, cold)
        groups = [(name, g, n) for name in names for g, n in enumerate(self.group_rows(name))]
        total = sum(n for *_, n in groups)
        dim = self.manifest.vectors.get(column)
        row_bytes, limit = 4, self.memory_bytes
        if dim is not None:
            row_bytes, limit = 2 * dim, min(limit, _VECTORS_IN_MEMORY)
        if row_bytes * total <= limit:
            return joined([from_arrow(self._read(name, [column])[column]) for name in names])

        def pieces() -> Iterator[npt.NDArray[Any]]:
            for name, g, _ in groups:
                values = from_arrow(self.read_group(name, g, [column])[column])
                assert not isinstance(values, Jagged)
                yield values

        part = "-".join((entity, column, *["cold"] * (len(names) > 1)))
        bags = mapped_values(self.folder / "mapped" / part, total, pieces)
        self.files.check_current()
        return bags

    def group_rows(self, name: str) -> list[int]:
        """Rows of each row group of a file."""
        metadata = self.files.open(name).metadata
        return [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]

    def read_group(self, name: str, group: int, columns: list[str]) -> pa.Table:
        """Some columns of a row group."""
        try:
            table = self.files.open(name).read_row_group(group, columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise self.files.damaged(name, error) from None
        return self.files.check(name, table)

    def _read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        return self.files.read(name, columns)


def _with_new(lists: Jagged, more: Jagged) -> Jagged:
    """Appends to each list the distinct values that only the other list has."""
    n_values = 1 + max(int(part.values.max(initial=0)) for part in (lists, more))
    owners, others = (np.repeat(np.arange(len(part)), part.lengths) for part in (lists, more))
    pairs = others * n_values + more.values
    new = np.zeros(len(pairs), bool)
    new[np.unique(pairs, return_index=True)[1]] = True
    new &= ~np.isin(pairs, owners * n_values + lists.values)
    return Jagged.from_pairs(
        np.concatenate([owners, others[new]]),
        np.concatenate([lists.values, more.values[new]]),
        len(lists),
    )


def _without(lists: Jagged, others: Jagged) -> Jagged:
    """Removes from each list the values of the other list."""
    n_values = 1 + max(int(part.values.max(initial=0)) for part in (lists, others))
    owners, theirs = (np.repeat(np.arange(len(part)), part.lengths) for part in (lists, others))
    kept = ~np.isin(owners * n_values + lists.values, theirs * n_values + others.values)
    return Jagged.from_pairs(owners[kept], lists.values[kept], len(lists))


def _lists_between(lists: Jagged, begin: int, end: int) -> Jagged:
    """Consecutive lists."""
    offsets = lists.offsets[begin : end + 1]
    return Jagged(offsets - offsets[0], lists.values[offsets[0] : offsets[-1]])


def _as_it_is(bags: list[Jagged]) -> Jagged:
    return bags[0]


def drawable_items(bags: list[Jagged], n_items: int) -> Jagged:
    """Item rows in several lists -> distinct ascending items, counted from 0.

    Cold items, from row ``n_items`` on, are left out: they are never sampled.
    """
    joint = union(bags)
    if len(joint.values) and int(joint.values.max()) >= n_items:
        kept = np.flatnonzero(joint.values < n_items)
        owners = np.repeat(np.arange(len(joint)), joint.lengths)[kept]
        joint = Jagged.from_pairs(owners, joint.values[kept], len(joint))
    return Jagged(joint.offsets, joint.values - np.int32(1))
