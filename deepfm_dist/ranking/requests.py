"""Requests from a file: a user, a choice of items and a context each."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Jagged, offsets_of
from deepfm_dist.data.lookup import RowEncoder, UserAttributes
from deepfm_dist.data.sources import Column, column_names, find_empty_list, read_table
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.messages import nearest, plural
from deepfm_dist.ranking.baselines import distinct
from deepfm_dist.ranking.filters import ItemFilters
from deepfm_dist.ranking.items import Catalogue
from deepfm_dist.ranking.new_users import (
    flat_texts,
    how_to_know_users_by_items,
    id_column,
    is_given,
    spelling_hint,
)
from deepfm_dist.ranking.ranker import Users
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.ranking.subsets import EVERYTHING, ItemSets

log = logging.getLogger(__name__)

LIST_SEPARATOR = "|"
"""Separator of items in a text cell."""
COLUMNS = (
    Column("request"),
    Column("items", "texts", required=False, separator=LIST_SEPARATOR),
    Column("allow", "texts", required=False, separator=LIST_SEPARATOR),
    Column("block", "texts", required=False, separator=LIST_SEPARATOR),
    Column("where", required=False),
    Column("k", "number", required=False),
)
"""Columns of a request other than its user and the model's fields."""


@dataclass(frozen=True)
class Requests:
    """n requests.

    Attributes:
        ids: ``[n]`` keys to join results by.
        user_ids: ``[n]`` string; null for users described by items or attributes.
        users: the users.
        k: ``[n]`` int32: number of items.
        sets: items that may be ranked.
        blocked: excluded item rows of each request.
    """

    ids: pa.Array
    user_ids: pa.Array
    users: Users
    k: Int32Array
    sets: ItemSets
    blocked: Jagged

    @property
    def arrays(self) -> list[npt.NDArray[Any]]:
        """All arrays that rankings depend on."""
        users = self.users
        fields = [*(users.attributes or {}).values(), *(users.context or {}).values()]
        arrays: list[npt.NDArray[Any]] = [users.rows, self.k, self.sets.number]
        arrays += [offsets_of(np.array([*map(len, self.sets.positions)], np.int64))]
        arrays += self.sets.positions
        for values in (self.blocked, users.histories, *fields):
            if isinstance(values, Jagged):
                arrays += [values.offsets, values.values]
            elif values is not None:
                arrays.append(values)
        return arrays


class BadFilter(ConfigError):
    """A filter that cannot be used.

    Args:
        place: the place of its request.
        problem: description of the error.
    """

    def __init__(self, place: int, problem: str) -> None:
        super().__init__(problem)
        self.place = place


def item_sets(
    filters: ItemFilters,
    catalogue: Catalogue,
    where: Sequence[str | None],
    allow: Sequence[Int32Array | None],
) -> ItemSets:
    """The items that each of n requests may get; equal requests share a set.

    Args:
        filters: the filters of the catalogue.
        catalogue: the items that can be recommended.
        where: a filter for each; None: no filter.
        allow: item rows for each; None: no list.

    Raises:
        BadFilter: a filter cannot be used.
    """
    number = np.full(len(where), EVERYTHING, np.int32)
    positions: list[Int32Array] = []
    known: dict[tuple[str | None, bytes | None], int] = {}
    for place, (text, rows) in enumerate(zip(where, allow, strict=True)):
        if text is None and rows is None:
            continue
        key = text, None if rows is None else rows.tobytes()
        if key not in known:
            known[key] = len(positions)
            try:
                positions.append(_positions(filters, catalogue, text, rows))
            except ConfigError as error:
                raise BadFilter(place, str(error)) from None
        number[place] = known[key]
    return ItemSets(number, positions)


def _positions(
    filters: ItemFilters, catalogue: Catalogue, where: str | None, rows: Int32Array | None
) -> Int32Array:
    """Ascending positions of the items that a filter, a list or both keep."""
    kept = None if where is None else filters.positions(where)
    if rows is None:
        assert kept is not None
        return kept
    allowed = np.unique(catalogue.positions_of(rows))
    allowed = allowed[allowed >= 0]
    return allowed if kept is None else np.intersect1d(kept, allowed, assume_unique=True)


def read_requests(
    dataset: PreparedDataset, catalogue: Catalogue, path: Path, config: RecommendConfig
) -> Requests:
    """Reads requests from a file, one per row.

    Args:
        dataset: the prepared dataset.
        catalogue: the items that can be recommended.
        path: a file in any format that preparation reads.
        config: ``k`` and ``context`` for requests without their own.

    Returns:
        The requests whose user is known or described by items or attributes.

    Raises:
        DataError: the file or a filter cannot be read, or no request can be answered.
        ConfigError: a context field has neither a column nor a value.
    """
    if not path.is_file():
        raise DataError(f"recommend.requests={path}: no such file; write one row per request to it")
    return _Reader(dataset, path).read(catalogue, config)


class _Reader:
    """Reads a file of requests; arguments as for `read_requests`."""

    def __init__(self, dataset: PreparedDataset, path: Path) -> None:
        self._dataset, self._path = dataset, path
        self._encoder, self._attributes = RowEncoder(dataset), UserAttributes(dataset)
        self._item_ids = dataset.entity_ids("item", cold=True).slice(1)
        present = column_names(path)
        user = id_column(dataset, "user", present)
        self._described = self._attributes.columns(present)
        self._columns = [column for column in COLUMNS if column.name in present]
        self._columns += [*self._described, *self._encoder.context_columns(present)]
        if user.name in present:
            self._columns.append(replace(user, required=False))
        self._check_columns(present)

    def _check_columns(self, present: Sequence[str]) -> None:
        """Refuses a file without users, and warns about unused columns."""
        names = [column.name for column in self._columns]
        own = {column.name for column in COLUMNS}
        if (twice := next((n for n in names if n in own and names.count(n) > 1), None)) is not None:
            raise DataError(
                f"{self._path}: the column {twice!r} is a field of this model and a part of every "
                f"request; give the field another column and train again"
            )
        has_history = self._dataset.manifest.has_history
        if "items" in names and not has_history:
            raise DataError(
                f"{self._path}: the column items: this model knows its users by id, not by their "
                f"items; {how_to_know_users_by_items(self._dataset)}"
            )
        user_column = id_column(self._dataset, "user", present)
        user = self._dataset.manifest.data.interactions.user or "user"
        fields = [column.name for column in self._attributes.all_columns]
        ways = list(dict.fromkeys([user, "user", *["items"] * has_history, *fields]))
        if not {*ways} & {*names} and len(present) == 1 and re.search(r"[;|\t]", present[0]):
            read_table(self._path, [replace(user_column, name=user)])  # says what it looks like
        if not {*ways} & {*names}:
            raise DataError(
                f"{self._path}: no column identifies the user: {', '.join(ways)}; it has: "
                f"{', '.join(present)}"
            )
        if unused := [name for name in present if name not in names]:
            usable = {*own, *ways, *(c.name for c in self._encoder.pair_columns)} - {*names}
            near = [(name, nearest(name, usable)) for name in unused]
            hints = [f"; is {name!r} meant to be {other!r}?" for name, other in near if other]
            text = "%s: columns that are not used: %s%s"
            log.warning(text, self._path, ", ".join(unused), "".join(hints))

    def read(self, catalogue: Catalogue, config: RecommendConfig) -> Requests:
        """Reads the requests; arguments as for `read_requests`."""
        table = read_table(self._path, self._columns).combine_chunks()
        table = table.append_column("row", pa.array(np.arange(table.num_rows)))
        table = self._with_ids(table)
        rows, table = self._users_of(table)
        filters = ItemFilters(self._dataset, catalogue)
        try:
            sets = item_sets(filters, catalogue, self._where(table), self._allowed(table))
        except BadFilter as error:
            raise DataError(f"{self._at(table, error.place)}: {error}") from None
        requests = Requests(
            table["request"].combine_chunks(),
            _cells(table, "user", pa.string()),
            self._described_users(table, rows),
            self._k(table, config.k, len(catalogue)),
            sets,
            self._items(table, "block"),
        )
        context = self._encoder.context_of_requests(table, config.context)
        for text in (*self._encoder.unseen(), *self._attributes.unseen()):
            log.warning("%s: %s", self._path, text)
        empty = np.flatnonzero(sets.sizes(len(catalogue)) == 0)
        if len(empty):
            log.warning(
                "%s: lists and filters leave no item for %s, such as request %s",
                self._path,
                plural(len(empty), "request"),
                requests.ids[int(empty[0])],
            )
        return replace(requests, users=replace(requests.users, context=context or None))

    def _at(self, table: pa.Table, place: int) -> str:
        """The place of a request in the file, for messages."""
        return f"{self._path}, row {table['row'][place].as_py() + 1}"

    def _with_ids(self, table: pa.Table) -> pa.Table:
        """The table with ``request``: the file's column, or else row numbers from 0."""
        if "request" not in table.column_names:
            return table.append_column("request", table["row"])
        counts = pc.value_counts(table["request"].combine_chunks())
        again = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(again):
            raise DataError(
                f"{self._path}: the column request repeats {plural(len(again), 'value')}, "
                f"such as {again[0]['values'].as_py()!r}; number the requests, or leave the "
                f"column out"
            )
        return table

    def _users_of(self, table: pa.Table) -> tuple[Int32Array, pa.Table]:
        """Rows of the user table, 0 for described users, and the requests with either kind of user.

        Logs the number of requests with neither.
        """
        user_ids = _cells(table, "user", pa.string())
        place = pc.index_in(user_ids, value_set=self._dataset.entity_ids("user").slice(1))
        rows = np.asarray(place.fill_null(-1), np.int32) + np.int32(1)
        described = self._items(table, "items").lengths > 0
        for column in self._described:
            described |= is_given(table[column.key].combine_chunks())
        both = int(((rows > 0) & described).sum())
        if both:
            log.warning(
                "%s: %s name a user of the training data and items or attributes as well, which "
                "are not used",
                self._path,
                plural(both, "request"),
            )
        kept = (rows > 0) | described
        if not kept.all():
            unknown = user_ids.filter(pa.array(~kept)).drop_null().unique()
            such = ""
            if len(unknown):
                hint = spelling_hint(self._dataset, "user", unknown.to_pylist())
                such = f" (such as {unknown[0].as_py()!r}{hint})"
            n = plural(int((~kept).sum()), "request")
            problem = (
                f"whose user is not in the training data{such} and is not described by items or "
                f"attributes"
            )
            if not kept.any():
                raise DataError(f"{self._path}: it has only requests {problem}")
            log.warning("%s: left out %s %s", self._path, n, problem)
        return rows[kept], table.filter(pa.array(kept))

    def _described_users(self, table: pa.Table, rows: Int32Array) -> Users:
        """The users without their context; ``rows`` as for `_users_of`."""
        is_known = rows > 0
        if is_known.all():
            return Users(rows)
        fields = None
        if self._described:
            cells = {c.key: table[c.key].combine_chunks() for c in self._described}
            fields = self._attributes.encode_columns(cells, len(rows))
        return Users(
            np.where(is_known, rows, np.arange(len(rows))).astype(np.int32),
            distinct(self._items(table, "items", count=True)),
            fields,
            is_known if is_known.any() else None,
        )

    def _where(self, table: pa.Table) -> list[str | None]:
        return [text or None for text in _cells(table, "where", pa.string()).to_pylist()]

    def _allowed(self, table: pa.Table) -> list[Int32Array | None]:
        """Rows of the items that each request allows; None without a list."""
        if "allow" not in table.column_names:
            return [None] * table.num_rows
        if (row := find_empty_list(self._path, "allow")) is not None:
            raise DataError(
                f"{self._path}, row {row}: allow is a list without items, which leaves nothing to "
                f"rank; drop the row, or write null to allow all items"
            )
        given = is_given(table["allow"].combine_chunks())
        rows = self._items(table, "allow")
        return [
            np.unique(rows.values[rows.offsets[place] : rows.offsets[place + 1]])
            if is_list
            else None
            for place, is_list in enumerate(given.tolist())
        ]

    def _items(self, table: pa.Table, name: str, count: bool | None = None) -> Jagged:
        """Item rows of a column of lists; empty without one.

        Args:
            table: the table of requests.
            name: the name of the column.
            count: whether to log the number of unknown ids; default: yes, except for users' items.
        """
        if name not in table.column_names:
            return Jagged.empty(table.num_rows)
        owners, ids = flat_texts(table[name].combine_chunks())
        place = pc.index_in(ids, value_set=self._item_ids)
        is_known = np.asarray(pc.is_valid(place)).astype(bool)
        if not is_known.all() and (name != "items" if count is None else count):
            unknown = ids.filter(pa.array(~is_known)).unique()
            hint = spelling_hint(self._dataset, "item", unknown.to_pylist())
            log.log(
                logging.WARNING if hint else logging.INFO,
                "%s: %s: %s not in the training data (such as %r%s)",
                self._path,
                name,
                plural(len(unknown), "item"),
                unknown[0].as_py(),
                hint,
            )
        rows = np.asarray(place.drop_null(), np.int32) + np.int32(1)
        return Jagged.from_pairs(owners[is_known], rows, table.num_rows)

    def _k(self, table: pa.Table, default: int, n_items: int) -> Int32Array:
        """``[n]`` requested number of items, at most the size of the catalogue."""
        wanted = np.asarray(_cells(table, "k", pa.float64()).fill_null(default), np.float64)
        wrong = np.flatnonzero(~((wanted >= 1) & (wanted == np.floor(wanted)) & (wanted < np.inf)))
        if len(wrong):
            raise DataError(
                f"{self._at(table, int(wrong[0]))}: k {wanted[wrong[0]]:g} is not a whole number "
                f"above 0; correct it, or leave it empty for recommend.k={default}"
            )
        return np.minimum(wanted, max(n_items, 1)).astype(np.int32)


def _cells(table: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    """A column; nulls without one."""
    if name not in table.column_names:
        return pa.nulls(table.num_rows, kind)
    return table[name].combine_chunks()
