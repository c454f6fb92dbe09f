"""The partitions of all readers' rows, in one numbering of texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.codes import Hashes, hash_texts, mix_into
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    from_arrow,
    union,
)
from deepfm_dist.data.negatives import draw_distinct, users_short_of_negatives
from deepfm_dist.data.preparation.job import OPEN, Job, buckets_of, entity_key, partitions_of
from deepfm_dist.data.preparation.merge import CodeMap, merge_vocabularies
from deepfm_dist.data.preparation.reading import SideFile, ThreadReader
from deepfm_dist.data.preparation.rules import (
    coded_columns,
    content_hashes,
    occurrences,
    one_per_pair,
    pair_keys,
    row_order,
    words_of,
)
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import SplitIds
from deepfm_dist.data.times import BILLION, scaled
from deepfm_dist.seeding import derive_seed

CodedTables = Callable[[int], Sequence[tuple[pa.Table, CodeMap]]]
"""A partition's rows as coded by each reader (at least one table, possibly empty), with the map
from the reader's codes to the common numbering.
"""


class Partitions:
    """Loads the rows of all readers, one partition at a time.

    Shared by all threads; each loads different partitions.

    Args:
        job: the preparation.
        tables: returns the rows of a partition.
        ids: texts of each vocabulary by code, in the order of their hashes. A cluster task has only
            the users of its partition.
        side_files: fields in separate files.
        time_scale: factor that makes all times integers.
        in_memory: whether data for later steps is kept in memory, because there is only one
            partition.
        hashes: the hashes of the ids, as far as known; see `hashes`.
    """

    def __init__(
        self,
        job: Job,
        tables: CodedTables,
        ids: dict[str, pa.Array],
        side_files: Mapping[str, SideFile],
        time_scale: int,
        in_memory: bool,
        hashes: Mapping[str, Hashes] | None = None,
    ) -> None:
        self._job, self._tables, self._in_memory = job, tables, in_memory
        self.ids, self.side_files, self.time_scale = ids, side_files, time_scale
        self._hashes = dict(hashes or {})
        self._first_user = np.zeros(job.n_partitions + 1, np.int64)
        if "user" in job.entities:  # codes are in the order of hashes
            of_user = partitions_of(
                buckets_of(self.hashes(entity_key("user"))[:-1]), job.n_partitions
            )
            self._first_user = np.searchsorted(of_user, np.arange(job.n_partitions + 1))
        self._cached: PartitionRows | None = None
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._trimmed: set[int] = set()
        self._assigned: set[int] = set()
        self._of_repeated: dict[int, tuple[int, int]] = {}  # repeated, tied; of loaded partitions

    @classmethod
    def from_readers(cls, job: Job, readers: Sequence[ThreadReader]) -> "Partitions":
        """Merges all threads' rows; empties the readers' vocabularies."""
        first, spills = readers[0], [r.coder.spill for r in readers]
        no_rows = pa.Table.from_batches([first.coder.no_rows()])
        ids, maps = merge_vocabularies([r.coder.codes for r in readers], job.crew)
        side_files = mapped_side_files(job, first.side_files, maps[0])

        def tables(p: int) -> list[tuple[pa.Table, CodeMap]]:
            batches = [spill.read(p) for spill in spills]
            coded = zip(batches, maps, strict=True)
            return [(pa.Table.from_batches(b), from_thread) for b, from_thread in coded if b] or [
                (no_rows, maps[0])
            ]

        return cls(job, tables, ids, side_files, first.time_scale, in_memory=job.n_partitions == 1)

    def users(self, p: int) -> Int32Array:
        """Codes of a partition's users, ascending."""
        return np.arange(*self._first_user[p : p + 2], dtype=np.int32)

    def save_array(self, p: int, name: str, array: npt.NDArray[Any]) -> None:
        """Saves an array of a partition for a later step."""
        if self._in_memory:
            self._kept[name] = array
        else:
            np.save(self._job.spill(f"{name}-{p}.npy"), array)

    def load_array(self, p: int, name: str) -> Any:
        """Loads a saved array."""
        if self._in_memory:
            return self._kept[name]
        return np.load(self._job.spill(f"{name}-{p}.npy"), mmap_mode="r")

    def hashes(self, name: str) -> Hashes:
        """``[codes + 1]`` hash of each text of a vocabulary, and 0 for no value."""
        if name not in self._hashes:
            self._hashes[name] = np.append(hash_texts(self.ids[name]), np.uint64(0))
        return self._hashes[name]

    @property
    def _cell_hashes(self) -> dict[str, Hashes]:
        """By column of the rows: the hash of each code."""
        return {column: self.hashes(name) for column, name in coded_columns(self._job).items()}

    def load(self, p: int) -> PartitionRows:
        """Loads a partition: ordered, without repeated rows, with fixed negatives."""
        if self._cached is not None:
            return self._cached
        part, data = self._spilled(p), self._job.data
        if p in self._of_repeated:
            part = part.take(np.asarray(self.load_array(p, "order")))
            part.columns["key"] = np.asarray(self.load_array(p, "key"))
        else:
            part, order = self._in_order(part, p)
            if not self._in_memory:
                self.save_array(p, "order", order.astype(np.int32))
                self.save_array(p, "key", part["key"])
        repeated, tied = self._of_repeated[p]
        part = replace(part, repeated=repeated, tied=tied)
        if data.interactions.rating is not None:
            positive = part["label"] == 1
            part = replace(part, columns=part.where(positive).columns, low=part.where(~positive))
        if data.negatives.fixed_per_user is not None:
            part = self._with_fixed_negatives(part, p, data.negatives.fixed_per_user)
        if p in self._trimmed:
            rows = np.asarray(self.load_array(p, "taking part"))
            part = replace(part, columns=part.take(rows).columns)
        if p in self._assigned:
            low_parts = None if part.low is None else self.load_array(p, "assigned low")
            part = part.assigned(self.load_array(p, "assigned"), low_parts)
        part = replace(part, users=self.users(p), time_scale=self.time_scale)
        if self._in_memory:  # it is loaded several times
            self._cached = part
        return part

    def leave_out(self, p: int, keep: npt.NDArray[np.bool_]) -> None:
        """Restricts `load` to a subset of rows; rows with low ratings stay.

        Args:
            p: the partition.
            keep: ``[n]`` selects rows.
        """
        if self._cached is not None:
            self._cached = self._cached.keeping(keep)
            return
        rows = np.flatnonzero(keep)
        if p in self._trimmed:
            rows = np.asarray(self.load_array(p, "taking part"))[rows]
        self.save_array(p, "taking part", rows)
        self._trimmed.add(p)

    def assign(self, p: int, parts: SplitIds, low_parts: SplitIds | None) -> None:
        """Assigns splits to a partition's rows for later calls of `load`.

        Args:
            p: the partition.
            parts: ``[n]`` int8.
            low_parts: the same of the rows with low ratings.
        """
        if self._cached is not None:
            self._cached = self._cached.assigned(parts, low_parts)
            return
        self.save_array(p, "assigned", parts)
        if low_parts is not None:
            self.save_array(p, "assigned low", low_parts)
        self._assigned.add(p)

    def _in_order(self, part: PartitionRows, p: int) -> tuple[PartitionRows, Int64Array]:
        """Rows with their keys, without repeated ones, and their original indices."""
        rule, seed, hashes = self._job.data.repeated, self._job.seed, self._cell_hashes
        every = np.arange(len(part))
        if rule != "all":  # other cells of a row do not affect its split
            keys = self._pair_keys(part)
        else:
            keys = content_hashes(part.columns, every, hashes, derive_seed(seed, "split"))
            if "time" in part:
                mix_into(keys, words_of(part["time"] // self.time_scale, None))
                part_of_second = part["time"] % self.time_scale * (BILLION // self.time_scale)
                mix_into(keys, words_of(part_of_second, None))
        buckets = self._buckets(part)
        order, again = row_order(part, keys, buckets, hashes, derive_seed(seed, "ties"))
        part, keys = part.take(order), keys[order]
        self._of_repeated[p] = 0, 0
        if rule != "all":
            keep, tied = one_per_pair(part, rule, hashes)
            self._of_repeated[p] = int((~keep).sum()), tied
            if not keep.all():
                part, keys, order = part.where(keep), keys[keep], order[keep]
        elif again.any():  # rows with equal contents are divided among splits
            equal = np.flatnonzero(again)
            number = occurrences(again)[equal].astype(np.uint64)
            own = keys[equal]
            mix_into(own, number)
            keys[equal] = own
        part.columns["key"] = keys.view(np.int64)
        return part, order

    def _pair_keys(self, part: PartitionRows) -> Hashes:
        users, items = (self.hashes(entity_key(name))[part[name]] for name in ("user", "item"))
        return pair_keys(users, items, derive_seed(self._job.seed, "split"))

    def _buckets(self, part: PartitionRows) -> Int64Array:
        if "user" not in part:
            return part["bucket"].astype(np.int64)
        return buckets_of(self.hashes(entity_key("user"))[part["user"]])

    def _spilled(self, p: int) -> PartitionRows:
        part = PartitionRows.joined([self._recoded_rows(*coded) for coded in self._tables(p)])
        if "user" in part:
            part.columns["local"] = part["user"] - np.int32(self._first_user[p])
        return part

    def _recoded_rows(self, table: pa.Table, code_map: CodeMap) -> PartitionRows:
        """A reader's rows, recoded to the common numbering."""
        n = table.num_rows
        columns: dict[str, Any] = {
            "label": np.ones(n, np.int8),
            "given": np.full(n, OPEN, np.int8),
            **{name: from_arrow(table[name]) for name in table.column_names},
        }
        if "whole" in columns:
            whole, billionths = columns.pop("whole"), columns.pop("billionths")
            columns["time"] = scaled(whole, billionths, self.time_scale)
        for name in self._job.entities:
            columns[name] = code_map[entity_key(name)][columns[name]]
        for feature in self._job.row_fields:
            if feature.has_vocabulary:
                name = f"field {feature.name}"
                columns[name] = _mapped(columns[name], code_map[feature.table_name])
        return PartitionRows(columns)

    def _with_fixed_negatives(self, part: PartitionRows, p: int, per_user: int) -> PartitionRows:
        members, n_items = self.users(p), len(self.ids[entity_key("item")])
        history = union(
            [Jagged.from_pairs(s["local"], s["item"], len(members)) for s in part.with_low]
        )
        with_positives = np.unique(part["local"])
        short = users_short_of_negatives(per_user, history, with_positives, n_items)
        drawn = draw_distinct(
            per_user,
            history,
            n_items,
            derive_seed(self._job.seed, "fixed"),
            self.hashes(entity_key("user"))[members].view(np.int64),
        )
        there = drawn >= 0
        there[np.setdiff1d(np.arange(len(members)), with_positives)] = False
        users = np.repeat(members, there.sum(axis=1))
        # The schema allows neither times nor other fields in these rows.
        columns = {
            "user": users,
            "item": drawn[there],
            "local": users - np.int32(self._first_user[p]),
            "label": np.zeros(len(users), np.int8),
            "given": np.full(len(users), OPEN, np.int8),
        }
        positives = PartitionRows({name: part[name] for name in columns})
        joint = PartitionRows.joined([positives, PartitionRows(columns)])
        keys = self._pair_keys(joint)
        buckets, seed = self._buckets(joint), derive_seed(self._job.seed, "ties")
        order, _ = row_order(joint, keys, buckets, self._cell_hashes, seed)
        joint.columns["key"] = keys.view(np.int64)
        return replace(part, columns=joint.take(order).columns, short=short)


def mapped_side_files(
    job: Job, side_files: Mapping[str, SideFile], code_map: CodeMap
) -> dict[str, SideFile]:
    """Recodes fields in separate files to the common numbering."""
    tables = {f.name: f.table_name for f in job.data.features if f.has_vocabulary}
    return {
        name: replace(side, values=_mapped(side.values, code_map[tables[name]]))
        if name in tables
        else side
        for name, side in side_files.items()
    }


def _mapped(values: Values, code_map: Int32Array) -> Values:
    """Maps codes to another numbering; -1 is kept, as it indexes the map's last element."""
    if isinstance(values, Jagged):
        return Jagged(values.offsets, code_map[values.values])
    return code_map[values]
