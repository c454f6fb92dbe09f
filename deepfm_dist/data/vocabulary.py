"""Maps external ids to table rows and back; row 0 is out-of-vocabulary."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfm_dist.data.codes import hash_order, hash_texts, seeded
from deepfm_dist.data.jagged import Int32Array, Int64Array
from deepfm_dist.data.layout import signed_table


@dataclass(frozen=True)
class Vocabulary:
    """The ids of a table's rows.

    Attributes:
        ids: ``[rows - 1]`` string: the external id of row ``r`` is ``ids[r - 1]``.
        counts: ``[rows - 1]`` int64: number of occurrences in training.
    """

    ids: pa.Array
    counts: Int64Array

    @classmethod
    def fit(
        cls,
        ids: pa.Array,
        counts: Int64Array,
        min_count: int,
        seed: int,
        earlier: Self | None = None,
        free: Int32Array | None = None,
    ) -> tuple[Self, Int32Array]:
        """Assigns rows to the ids seen at least ``min_count`` times.

        They are ordered by a seeded hash of the id: rows do not depend on the order of ids, and no
        range of rows is hot for a row-wise shard.

        Args:
            ids: ``[n]`` distinct strings.
            counts: ``[n]`` int64.
            min_count: minimum count for a row; an unseen id gets none.
            seed: the seed of the order.
            earlier: a vocabulary whose ids keep their rows regardless of counts; new ids are
                appended, spread over the new rows.
            free: rows of ``earlier`` whose ids are not among ``ids``; new ids take these first, in
                this order, and counts of such a row start again.

        Returns:
            The vocabulary, and the row of each of ``ids``, ``[n]`` int32.
        """
        if earlier is not None:
            rows = earlier.lookup(ids)
            known = rows > 0
            old_counts = earlier.counts.copy()
            np.add.at(old_counts, rows[known] - 1, counts[known])
            new, new_rows = cls.fit(ids.filter(pa.array(~known)), counts[~known], min_count, seed)
            n_old, taken = len(earlier.ids), np.zeros(0, np.int32) if free is None else free
            taken = taken[: len(new.ids)]
            appended = np.arange(n_old + 1, n_old + 1 + len(new.ids) - len(taken), dtype=np.int32)
            row_of_new = np.concatenate([np.zeros(1, np.int32), taken, appended])
            rows[~known] = row_of_new[new_rows]
            source = np.arange(n_old + len(appended))  # of each row: old ids, then new ones
            source[row_of_new[1:] - 1] = n_old + np.arange(len(new.ids))
            joint_ids = pa.concat_arrays([earlier.ids, new.ids]).take(pa.array(source))
            return cls(joint_ids, np.concatenate([old_counts, new.counts])[source]), rows
        kept = np.flatnonzero(counts >= max(1, min_count))
        kept_ids = ids.take(pa.array(kept))
        order = hash_order(kept_ids, seeded(hash_texts(kept_ids), seed))
        rows = np.zeros(len(ids), np.int32)
        rows[kept[order]] = np.arange(1, len(order) + 1, dtype=np.int32)
        return cls(kept_ids.take(pa.array(order)), counts[kept[order]]), rows

    @property
    def rows(self) -> int:
        """Number of rows, including the out-of-vocabulary one."""
        return len(self.ids) + 1

    def lookup(self, ids: pa.Array | pa.ChunkedArray) -> Int32Array:
        """Rows of external ids: ``[n]`` string -> ``[n]`` int32; unknown ones and nulls get 0."""
        if isinstance(ids, pa.ChunkedArray):
            ids = ids.combine_chunks()
        places = pc.index_in(ids, value_set=self.ids).fill_null(-1)
        return np.asarray(places, dtype=np.int32) + np.int32(1)

    def write(self, path: Path) -> None:
        """Writes ``row, id, count`` as Parquet, including the out-of-vocabulary row (a null id)."""
        ids = pa.concat_arrays([pa.nulls(1, pa.string()), self.ids])
        counts = np.concatenate([[0], self.counts])
        columns = {"row": pa.array(np.arange(self.rows, dtype=np.int32)), "id": ids}
        table = pa.table(columns | {"count": pa.array(counts)})
        pq.write_table(
            signed_table(table, path), path, compression="zstd", write_page_checksum=True
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """Reads the columns that `write` wrote."""
        table = table.slice(1)
        return cls(table["id"].combine_chunks(), np.asarray(table["count"], dtype=np.int64))


def external(ids: pa.Array) -> pa.Array:
    """Ids for output: int64 if all are plain integers, otherwise strings."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids


def id_order(ids: pa.Array) -> Int64Array:
    """``[n]`` int64: the rank of each id, numbers by value, texts by code point."""
    order = np.asarray(pc.sort_indices(external(ids)), dtype=np.int64)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place
