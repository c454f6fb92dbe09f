"""Collects each user's items by split from all partitions."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, grouped, offsets_of, union
from deepfm_dist.data.layout import LISTS
from deepfm_dist.data.prefetch import read_ahead
from deepfm_dist.data.preparation.crew import Crew

CARRIED = "carried"
"""Items held out by an earlier dataset: they count as seen unless this dataset has the pair."""


class HistoryWriter:
    """Spills users' items to disk and writes them grouped by ranges of user rows.

    Args:
        n_users: rows of the user table.
        n_rare: users without a row, numbered after it.
        n_buckets: number of ranges of rows, finished one by one.
        folder: the folder for temporary files.
        crew: the threads.
    """

    def __init__(self, n_users: int, n_rare: int, n_buckets: int, folder: Path, crew: Crew) -> None:
        self.n_users, self.n_rare, self.folder, self.crew = n_users, n_rare, folder, crew
        self.n_buckets = n_buckets
        self.height = -(-(n_users + n_rare) // n_buckets)

    def _path(self, name: str, bucket: int, rank: int) -> Path:
        return self.folder / f"{name}-{bucket}-{rank}.bin"

    def add(self, name: str, rows: npt.NDArray[np.integer], items: Int32Array) -> None:
        """Appends ``[m]`` pairs to one of `LISTS` or `CARRIED`, in order within each row."""
        offsets, order = grouped(rows // self.height, self.n_buckets)
        pairs = np.stack([rows.astype(np.int32), items], axis=1)
        pairs = pairs.view(np.int64).ravel().take(order)  # copied as one number
        for bucket in np.flatnonzero(np.diff(offsets)):
            with self._path(name, int(bucket), self.crew.rank).open("ab") as file:
                file.write(pairs[offsets[bucket] : offsets[bucket + 1]].data)

    def write(self, path: Path, table: pa.Table) -> None:
        """Writes the user table with its lists, and the lists of users without a row."""
        fields = [pa.field(name, pa.list_(pa.int32())) for name in LISTS]
        schema = pa.schema([*table.schema, *fields], table.schema.metadata)
        rare: dict[str, list[Jagged]] = {name: [] for name in LISTS}
        how = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(path, schema, **how) as writer:
            # Other threads compute the lists, one per thread ahead.
            ahead = read_ahead(self._lists, 0, self.n_buckets - 1, self.crew.size - 1)
            for bucket, lists in enumerate(ahead):
                begin = bucket * self.height
                n = max(0, min(self.height, self.n_users - begin))
                piece = table.slice(begin, n)
                for field, bags in zip(fields, lists, strict=True):
                    own = Jagged(bags.offsets[: n + 1], bags.values[: bags.offsets[n]])
                    piece = piece.append_column(field, own.to_arrow())
                    rare[field.name].append(Jagged(bags.offsets[n:], bags.values))
                writer.write_table(piece, row_group_size=max(1, n))
        if self.n_rare:
            columns = {n: Jagged.concatenated(parts).to_arrow() for n, parts in rare.items()}
            pq.write_table(pa.table(columns), path.with_name("rare.parquet"), **how)

    def _lists(self, bucket: int) -> list[Jagged]:
        """`LISTS` of a bucket's rows."""
        begin = bucket * self.height
        lists = {name: self._bags(name, bucket, begin) for name in LISTS}
        carried = self._bags(CARRIED, bucket, begin)
        if len(carried.values):
            rows = np.repeat(np.arange(len(carried)), carried.lengths)
            n_items = 1 + max(
                int(bags.values.max(initial=0)) for bags in (carried, *lists.values())
            )
            pairs = rows * n_items + carried.values
            known = union(list(lists.values()))
            known_pairs = np.repeat(np.arange(len(known)), known.lengths) * n_items + known.values
            there = ~np.isin(pairs, known_pairs)
            more = Jagged.from_pairs(rows[there], carried.values[there], len(carried))
            lists["seen_train"] = union([lists["seen_train"], more])
        return list(lists.values())

    def _bags(self, name: str, bucket: int, begin: int) -> Jagged:
        """The distinct items of each row of a bucket, in the order of their last occurrence."""
        paths = [self._path(name, bucket, rank) for rank in range(self.crew.size)]
        flat = [np.fromfile(path, np.int32) for path in paths if path.exists()]
        pairs = np.concatenate([np.zeros(0, np.int32), *flat]).reshape(-1, 2)
        n = max(0, min(self.height, self.n_users + self.n_rare - begin))
        offsets, order = grouped(pairs[:, 0] - begin, n)
        items = pairs[order, 1]
        lengths = np.diff(offsets)
        backwards = np.repeat(offsets[:-1] + offsets[1:] - 1, lengths) - np.arange(len(items))
        last = first_pairs(offsets, backwards, items, int(items.max(initial=0)) + 1)
        kept = np.add.reduceat(np.append(last, False), offsets[:-1]) * (lengths > 0)
        return Jagged(offsets_of(kept), items[last])


@compiled
def first_pairs(
    offsets: Int64Array, order: Int64Array, items: Int32Array, n_items: int
) -> npt.NDArray[np.bool_]:
    """Whether a row is the first of its group with its item; groups as from `jagged.grouped`."""
    first = np.zeros(len(items), np.bool_)
    last_group = np.full(n_items, -1, np.int64)
    for g in range(len(offsets) - 1):
        for i in range(offsets[g], offsets[g + 1]):
            row = order[i]
            if last_group[items[row]] != g:
                last_group[items[row]] = g
                first[row] = True
    return first
