"""Users from outside the training data, described by a file of items, attributes or both."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import STRENGTHS, row_columns
from deepfm_dist.data.jagged import Int64Array, Jagged, Values
from deepfm_dist.data.lookup import UserAttributes
from deepfm_dist.data.schema import (
    LABEL_OF,
    NO_LABEL,
    OUT_OF_VOCABULARY,
    DataConfig,
    Interactions,
    label_of,
)
from deepfm_dist.data.sources import Column, column_names, read_table
from deepfm_dist.data.spelling import difference
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewUsers:
    """Users from outside the training data, and their items.

    Attributes:
        ids: ``[n]`` string, sorted.
        histories: ``[n]`` rows of distinct positive items, in order of time, or of the file if it
            has no times.
        seen: ``[n]`` rows of the other items, such as those with a low rating.
        attributes: the users' fields, if the file has such columns.
    """

    ids: pa.Array
    histories: Jagged
    seen: Jagged
    attributes: Mapping[str, Values] | None = None


def read_new_users(dataset: PreparedDataset, path: Path) -> NewUsers:
    """Reads users from a file of ``user`` and ``item``, of the log's columns, or of attributes.

    Ratings, labels and repeated rows are treated as in the log. If the file has columns of user
    fields, each user gets the first value in each; users with values need no items.

    Args:
        dataset: the prepared dataset.
        path: a file in any format that preparation reads.

    Returns:
        The users with a known positive item or a value of a field.

    Raises:
        DataError: the model knows users by id alone, the file does not exist, or it describes no
            user.
    """
    fields = UserAttributes(dataset)
    if not dataset.manifest.has_history and not fields.names:
        raise DataError(
            f"recommend.histories={path}: this model knows its users by id, not by their items; "
            f"{how_to_know_users_by_items(dataset)}"
        )
    if not path.exists():
        raise DataError(f"recommend.histories={path}: no such file")
    described = _Described.read(dataset, path, fields)
    table = _in_time_order(_read_items(dataset, path, bool(described.columns)))
    place = pc.index_in(table["item"], value_set=dataset.entity_ids("item", cold=True).slice(1))
    is_known = np.asarray(pc.is_valid(place)).astype(bool)
    unknown = pc.unique(table["item"].filter(pa.array(~is_known)))
    positive = _is_positive(table, dataset.manifest.data.interactions)
    if not len(described.users):
        if described.columns and not table.num_rows:
            names = ", ".join(column.name for column in described.columns)
            raise DataError(f"{path}: no user has an item or a value of {names}; fill some in")
        _check_some_are_known(dataset, path, table, is_known, positive)
    items = np.asarray(place.fill_null(-1), np.int32) + np.int32(1)
    stays = is_known & _rows_that_stay(dataset.manifest.data, path, table, items)
    with_items = table["user"].filter(pa.array(stays & positive)).combine_chunks()
    ids = pc.unique(pa.concat_arrays([with_items, described.users]))
    ids = ids.take(pa.array(np.argsort(id_order(ids))))
    users = np.asarray(pc.index_in(table["user"], value_set=ids).fill_null(-1), np.int64)
    histories, seen = (
        Jagged.from_pairs(users[which], items[which], len(ids)).each_once()
        for which in (stays & positive, stays & ~positive & (users >= 0))
    )
    everyone = len(
        pc.unique(pa.concat_arrays([table["user"].combine_chunks(), described.everyone]))
    )
    _report(dataset, path, is_known, everyone - len(ids), unknown)
    n_seen = int(seen.offsets[-1])
    if n_seen:
        log.info(
            "%s: %s of users that are not positives: they are not recommended, and the model does "
            "not know users by them",
            path,
            plural(n_seen, "item"),
        )
    return NewUsers(ids, histories, seen, described.fields_of(ids, path))


@dataclass(frozen=True)
class _Described:
    """The users of a file with values of user fields.

    Attributes:
        fields: the fields of the model.
        columns: the columns of these fields that the file has.
        table: ``user`` and these columns.
    """

    fields: UserAttributes
    columns: Sequence[Column]
    table: pa.Table

    @classmethod
    def read(cls, dataset: PreparedDataset, path: Path, fields: UserAttributes) -> Self:
        """Reads a file."""
        present = column_names(path)
        columns = fields.columns(present)
        users = id_column(dataset, "user", present)
        if not columns:
            return cls(fields, (), pa.table({"user": pa.array([], pa.string())}))
        return cls(fields, columns, read_table(path, [users, *columns]).combine_chunks())

    @property
    def everyone(self) -> pa.Array:
        """``[rows]`` string: the users of all rows."""
        return self.table["user"].combine_chunks()

    @property
    def users(self) -> pa.Array:
        """``[n]`` string: those with a value."""
        given = np.zeros(self.table.num_rows, bool)
        for column in self.columns:
            given |= is_given(self.table[column.key].combine_chunks())
        return pc.unique(self.everyone.filter(pa.array(given)))

    def fields_of(self, ids: pa.Array, path: Path) -> dict[str, Values] | None:
        """Each user's first value of each field; None if there are no such columns."""
        if not self.columns:
            return None
        users = np.asarray(pc.index_in(self.everyone, value_set=ids).fill_null(-1), np.int64)
        cells_by_field = {}
        for column in self.columns:
            cells = self.table[column.key].combine_chunks()
            at = np.flatnonzero((users >= 0) & np.asarray(cells.is_valid()))
            owners, first = np.unique(users[at], return_index=True)
            place = np.full(len(ids), -1, np.int64)
            place[owners] = at[first]
            cells_by_field[column.key] = cells.take(pa.array(place, mask=place < 0))
        names = ", ".join(column.name for column in self.columns)
        log.info("%s: users are known by %s", path, names)
        fields = self.fields.encode_columns(cells_by_field, len(ids))
        for text in self.fields.unseen():
            log.warning("%s: %s", path, text)
        return fields


def is_given(cells: pa.Array) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: cells that have a value."""
    if cells.type == pa.list_(pa.string()):
        given = np.zeros(len(cells), bool)
        given[flat_texts(cells)[0]] = True
        return given
    if pa.types.is_nested(cells.type):  # vectors
        return np.asarray(pc.greater(pc.list_value_length(cells), 0).fill_null(False)).astype(bool)
    valid = cells.is_valid()
    if pa.types.is_string(cells.type):
        valid = pc.and_(valid, pc.not_equal(cells, "").fill_null(False))
    return np.asarray(valid).astype(bool)


def flat_texts(lists: pa.Array) -> tuple[Int64Array, pa.Array]:
    """(row, text) of each element of some lists that is not empty."""
    owners, texts = np.asarray(pc.list_parent_indices(lists), np.int64), lists.flatten()
    there = np.asarray(pc.not_equal(texts, "").fill_null(False)).astype(bool)
    return owners[there], texts.filter(pa.array(there))


def _read_items(dataset: PreparedDataset, path: Path, are_described: bool) -> pa.Table:
    """The rows with an item: ids, and those columns of the log that say what a row is.

    Args:
        dataset: the prepared dataset.
        path: the path of the file.
        are_described: whether it has columns of users' fields, so that rows may have no item.
    """
    columns = _columns(dataset, path)
    if not are_described:
        _check_takes_items(dataset, path)
        return read_table(path, columns).combine_chunks()
    present = column_names(path)
    columns = [replace(c, required=c.key == "user") for c in columns if c.name in present]
    table = read_table(path, columns).combine_chunks()
    if "item" not in table.column_names:
        table = table.append_column("item", pa.nulls(table.num_rows, pa.string()))
    with_item = is_given(table["item"].combine_chunks())
    if with_item.any():
        _check_takes_items(dataset, path)
    for column in columns:
        empty = np.flatnonzero(with_item & np.asarray(table[column.key].is_null()))
        if len(empty):
            raise DataError(
                f"{path}, row {empty[0] + 1}: {column.name} is empty, and the row has an item; "
                f"fill it in, or leave the item out"
            )
    return table.filter(pa.array(with_item))


def _check_takes_items(dataset: PreparedDataset, path: Path) -> None:
    """Refuses items for a model that cannot use them."""
    if not dataset.manifest.has_history:
        names = ", ".join(UserAttributes(dataset).names)
        raise DataError(
            f"recommend.histories={path}: this model does not know users by their items, but by "
            f"{names}; give columns of these, without items, or "
            f"{how_to_know_users_by_items(dataset)}"
        )


def how_to_know_users_by_items(dataset: PreparedDataset) -> str:
    """Advice for recommending to users outside the training data, for error messages."""
    return (
        f"train a model that knows users by their items, {{name: seen, entity: user, history: "
        f"item}} among data.features, and pass recommend.histories=FILE; or add their rows to "
        f"{label_of(dataset.manifest.data.interactions.file)} and train again"
    )


def id_column(dataset: PreparedDataset, entity: str, present: Sequence[str]) -> Column:
    """The column of a file with the ids of users or items, read for ``user`` or ``item``.

    It has the name used in the interactions, or else ``user`` or ``item``.

    Args:
        dataset: the prepared dataset.
        entity: user or item.
        present: the file's columns.
    """
    columns = row_columns(dataset.manifest.data, with_split=False)
    in_log = next((c for c in columns if c.key == entity), Column(entity, purpose=entity))
    return in_log if in_log.name in present else replace(in_log, name=entity)


def spelling_hint(dataset: PreparedDataset, entity: str, unknown: Sequence[str]) -> str:
    """A hint if unknown ids look like known ones in another notation; may be empty."""
    how = difference(pa.array(unknown, pa.string()), dataset.entity_ids(entity, cold=True).slice(1))
    return f"; {how}" if how else ""


def _columns(dataset: PreparedDataset, path: Path) -> list[Column]:
    """The columns to read: ids, and the log's columns that define what a row is."""
    present = column_names(path)
    ids = [id_column(dataset, entity, present) for entity in ("user", "item")]
    columns = row_columns(dataset.manifest.data, with_split=False)
    roles = ("time", *STRENGTHS, *dataset.manifest.data.interactions.label_columns)
    # The dataset is prepared: its missing-value words can no longer change.
    return ids + [
        replace(c, checks=tuple(replace(check, cure=None) for check in c.checks))
        for c in columns
        if c.key in roles and c.name in present
    ]


def _is_positive(table: pa.Table, spec: Interactions) -> npt.NDArray[np.bool_]:
    """``[n]`` bool."""
    if "rating" in table.column_names:
        return np.asarray(table["rating"]) >= spec.min_rating
    if "label" in table.column_names:
        return np.asarray(table["label"]) == 1
    if present := [name for name in table.column_names if name.startswith(LABEL_OF)]:
        return np.logical_or.reduce(
            [np.asarray(table[n].fill_null(NO_LABEL)) == 1 for n in present]
        )
    return np.ones(table.num_rows, bool)


def _check_some_are_known(
    dataset: PreparedDataset,
    path: Path,
    table: pa.Table,
    is_known: npt.NDArray[np.bool_],
    positive: npt.NDArray[np.bool_],
) -> None:
    if not is_known.any():
        theirs, ours = pc.unique(table["item"]), dataset.entity_ids("item", cold=True).slice(1)
        raise DataError(
            f"{path}: none of its items is in the training data: it has {pc.min(theirs).as_py()!r} "
            f"and the training data have {pc.min(ours).as_py()!r}"
            f"{spelling_hint(dataset, 'item', theirs.to_pylist())}; write ids as the log has them"
        )
    if not (positive & is_known).any():
        least = dataset.manifest.data.interactions.min_rating
        what = "has the label 1" if least is None else f"is rated {least:g} or more"
        raise DataError(
            f"{path}: no row of an item in the training data {what}; add rows that do, since "
            f"nothing else says what its users like"
        )


def _rows_that_stay(
    data: DataConfig, path: Path, table: pa.Table, items: npt.NDArray[np.int32]
) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: which of several rows of a user and an item to keep, by the log's rule."""
    rule, stays = data.repeated, np.ones(table.num_rows, bool)
    if rule == "all":
        return stays
    names = set(table.column_names)
    strengths = [-_strength(name, table[name], data) for name in STRENGTHS if name in names]
    times = _times(table)
    if rule != "earliest":
        times = [-part for part in times]
    users = np.asarray(table["user"].combine_chunks().dictionary_encode().indices)
    by_rule = [*strengths, *times] if rule == "strongest" else [*times, *strengths]
    if not times and rule != "earliest":  # the file is in order of time
        by_rule.append(-np.arange(table.num_rows))
    order = np.lexsort((*reversed(by_rule), items, users))
    again = (np.diff(users[order]) == 0) & (np.diff(items[order]) == 0)
    stays[order[1:][again]] = False
    missing = [] if "strength" in names else [*data.interactions.order]
    again &= items[order[1:]] != OUT_OF_VOCABULARY
    if missing and again.any() and names & {"rating", "label"}:
        log.warning(
            "%s: it has no column %r, whose words say which of several rows of a user and an item "
            "is the strongest; chosen without it: %s",
            path,
            missing[0],
            plural(int(again.sum()), "row"),
        )
    return stays


def _in_time_order(table: pa.Table) -> pa.Table:
    """Rows in order of time; ties, or all rows without times, in the order of the file."""
    times = _times(table)
    order = np.lexsort((np.arange(table.num_rows), *reversed(times)))
    return table.take(pa.array(order)).combine_chunks() if times else table


def _times(table: pa.Table) -> list[Int64Array]:
    """``[n]`` whole seconds and billionths of the rows' times; nothing without times."""
    if "time" not in table.column_names:
        return []
    time = table["time"].combine_chunks()
    return [np.asarray(time.field(name)).astype(np.int64) for name in ("whole", "billionths")]


def _strength(name: str, cells: pa.ChunkedArray, data: DataConfig) -> npt.NDArray[np.float64]:
    """``[n]`` the strength that rows are compared by, one of `STRENGTHS`."""
    if name == "strength":
        [words] = data.interactions.order.values()
        cells = pc.index_in(cells, value_set=pa.array(words))
    return np.asarray(cells).astype(np.float64)


def _report(
    dataset: PreparedDataset,
    path: Path,
    is_known: npt.NDArray[np.bool_],
    n_without: int,
    unknown: pa.Array,
) -> None:
    """Logs what is left out: rows of unknown items, and users without known items or values."""
    n_strange = int((~is_known).sum())
    if n_strange:
        hint = spelling_hint(dataset, "item", unknown.to_pylist())
        log.log(
            logging.WARNING if hint else logging.INFO,
            "%s: left out %s of items that are not in the training data%s",
            path,
            plural(n_strange, "row"),
            hint,
        )
    if n_without:
        log.info(
            "%s: left out %s without an item known to the model",
            path,
            plural(n_without, "user"),
        )
