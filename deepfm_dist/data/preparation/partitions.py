"""The rows by partition, in one numbering of all ranks' texts."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.codes import Hashes, hash_texts
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    from_arrow,
    grouped,
    offsets_of,
    union,
)
from deepfm_dist.data.negatives import draw_distinct, users_short_of_negatives
from deepfm_dist.data.preparation.job import OPEN, Job, of_entity
from deepfm_dist.data.preparation.merge import unite
from deepfm_dist.data.preparation.reading import Reading, rows_path
from deepfm_dist.data.preparation.spill import Part, read_spilled
from deepfm_dist.data.preparation.ties import content_keys, one_per_pair
from deepfm_dist.data.split import TieKeys
from deepfm_dist.data.times import scaled
from deepfm_dist.seeding import derive_seed


class Partitions:
    """The rows of all ranks, one partition at a time. All ranks.

    Attributes:
        ids: texts of each vocabulary by code.
        n_open: rows over all ranks that are given to no split.
        side_files: fields in files of their own, on rank 0.
        time_scale: what times are multiplied by to make whole numbers of all of them.
    """

    def __init__(self, job: Job, reading: Reading) -> None:
        self._job, self._spill = job, reading.spill
        self._no_rows = reading.no_rows()
        self.ids, self._code_maps = unite(job, reading.codes)
        reading.codes.clear()
        said = job.crew.gather((reading.n_read, reading.n_open, reading.spill.places))
        self._first_row = offsets_of([n_read for n_read, _, _ in said])
        self.n_open = sum(n_open for _, n_open, _ in said)
        self._places = [places for *_, places in said]
        self.side_files = reading.side_files
        self.time_scale = reading.times.scale if reading.times is not None else 1
        for feature in job.data.features:
            side = self.side_files.get(feature.name)
            if side is not None and feature.has_vocabulary:
                side.values = _mapped(side.values, self._code_maps[0][feature.table_name])
        if "user" in job.entities:
            hashes = hash_texts(self.ids[of_entity("user")])
            of_user = np.asarray(hashes % np.uint64(job.n_parts), np.int64)
            offsets, by_part = grouped(of_user, job.n_parts)
            self._members = Jagged(offsets, by_part.astype(np.int32))
            self._local: Int32Array = np.empty(len(of_user), np.int32)
            begins = np.repeat(offsets[:-1], np.diff(offsets))
            self._local[by_part] = (np.arange(len(by_part)) - begins).astype(np.int32)
        self._cached: Part | None = None
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._hashes: dict[str, Hashes] = {}

    def users(self, p: int) -> Int32Array:
        """Codes of a partition's users, ascending."""
        return self._members.values[self._members.offsets[p] : self._members.offsets[p + 1]]

    def user_ids(self, p: int) -> pa.Array:
        """``[users]`` string: their ids."""
        return self.ids[of_entity("user")].take(pa.array(self.users(p)))

    def keep(self, p: int, name: str, array: npt.NDArray[Any]) -> None:
        """Puts aside what a later step wants to know of a partition."""
        if self._job.n_parts == 1:
            self._kept[name] = array
        else:
            np.save(self._job.spill(f"{name}-{p}.npy"), array)

    def kept(self, p: int, name: str) -> Any:
        """What this rank has put aside."""
        if self._job.n_parts == 1:
            return self._kept[name]
        return np.load(self._job.spill(f"{name}-{p}.npy"), mmap_mode="r")

    def hashes(self, name: str) -> Hashes:
        """``[codes + 1]`` hash of each text of a vocabulary, and 0 for no value."""
        if name not in self._hashes:
            self._hashes[name] = np.append(hash_texts(self.ids[name]), np.uint64(0))
        return self._hashes[name]

    def ties(self, part: Part) -> TieKeys:
        """Orders rows that are equal in all that a rule compares: by a seeded hash of their cells.

        Args:
            part: the rows.
        """
        of_column = {name: of_entity(name) for name in self._job.entities}
        of_column |= {
            f"field {f.name}": f.table_name for f in self._job.row_fields if f.has_vocabulary
        }

        def keys(rows: Int64Array) -> Hashes:
            hashes = {column: self.hashes(name) for column, name in of_column.items()}
            return content_keys(part, rows, hashes, derive_seed(self._job.seed, "ties"))

        return keys

    def load(self, p: int) -> Part:
        """A partition without repeated rows, and with its fixed negatives."""
        if self._cached is not None:
            return self._cached
        part, data = self._spilled(p), self._job.data
        rule = data.repeated
        if rule != "all":
            n_users, n_items = len(self.users(p)), len(self.ids[of_entity("item")])
            keep, tied = one_per_pair(part, n_users, n_items, rule, self.ties(part))
            part = replace(part.where(keep), repeated=int((~keep).sum()), tied=tied)
        if data.interactions.rating is not None:
            positive = part["label"] == 1
            part = replace(part, columns=part.where(positive).columns, low=part.where(~positive))
        if data.negatives.fixed_per_user is not None:
            part = self._with_fixed_negatives(part, p, data.negatives.fixed_per_user)
        if self._job.n_parts == 1:  # several rounds go over it
            self._cached = part
        return part

    def _spilled(self, p: int) -> Part:
        found: list[Part] = []
        for rank, places in enumerate(self._places):
            if rank == self._job.crew.rank:
                batches = self._spill.read(p)
            else:
                batches = read_spilled(rows_path(self._job, rank), places[p])
            if batches:
                found.append(self._united(pa.Table.from_batches(batches), rank))
        return Part.joined(found or [self._united(pa.Table.from_batches([self._no_rows]), 0)])

    def _united(self, table: pa.Table, rank: int) -> Part:
        """One rank's rows of a partition in the numbering of all."""
        maps, n = self._code_maps[rank], table.num_rows
        columns: dict[str, Any] = {
            "label": np.ones(n, np.int8),
            "given": np.full(n, OPEN, np.int8),
            **{name: from_arrow(table[name]) for name in table.column_names},
        }
        columns["row"] = columns["row"] + self._first_row[rank]
        if "whole" in columns:
            whole, billionths = columns.pop("whole"), columns.pop("billionths")
            columns["time"] = scaled(whole, billionths, self.time_scale)
        for name in self._job.entities:
            columns[name] = maps[of_entity(name)][columns[name]]
        if "user" in columns:
            columns["local"] = self._local[columns["user"]]
        for feature in self._job.row_fields:
            if feature.has_vocabulary:
                name = f"field {feature.name}"
                columns[name] = _mapped(columns[name], maps[feature.table_name])
        return Part(columns)

    def _with_fixed_negatives(self, part: Part, p: int, per_user: int) -> Part:
        members, n_items = self.users(p), len(self.ids[of_entity("item")])
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
            members.astype(np.int64),
        )
        there = drawn >= 0
        there[np.setdiff1d(np.arange(len(members)), with_positives)] = False
        users = np.repeat(members, there.sum(axis=1))
        slots = np.nonzero(there)[1]
        # The schema allows no times and no fields in the rows beside these.
        columns = {
            "row": self.n_open + users.astype(np.int64) * per_user + slots,
            "user": users,
            "item": drawn[there],
            "local": self._local[users],
            "label": np.zeros(len(users), np.int8),
            "given": np.full(len(users), OPEN, np.int8),
        }
        positives = Part({name: part[name] for name in columns})
        joint = Part.joined([positives, Part(columns)])
        return replace(part, columns=joint.columns, short=short)


def _mapped(values: Values, code_map: Int32Array) -> Values:
    """Codes in another numbering; -1 stays: it finds the map's last element."""
    if isinstance(values, Jagged):
        return Jagged(values.offsets, code_map[values.values])
    return code_map[values]
