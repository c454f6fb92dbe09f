"""Rows of different lengths in two flat arrays."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.compiled import compiled

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Jagged:
    """``values[offsets[r]:offsets[r + 1]]`` belong to row r.

    Attributes:
        offsets: ``[rows + 1]`` int64.
        values: ``[offsets[-1]]`` int32.
    """

    offsets: Int64Array
    values: Int32Array

    @classmethod
    def from_pairs(cls, rows: npt.ArrayLike, values: npt.ArrayLike, n_rows: int) -> Self:
        """Groups (row, value) pairs by row, pairs of one row in their given order."""
        row_array = np.asarray(rows, dtype=np.int64)
        order = np.argsort(row_array, kind="stable")
        counts = np.bincount(row_array, minlength=n_rows)
        offsets = np.zeros(n_rows + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return cls(offsets, np.asarray(values, dtype=np.int32)[order])

    @classmethod
    def from_arrow(cls, lists: pa.ChunkedArray | pa.Array) -> Self:
        """Arrow's list column as flat arrays; null lists are empty."""
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.combine_chunks()
        lengths = np.asarray(pc.list_value_length(lists).fill_null(0), dtype=np.int64)
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets, np.asarray(lists.flatten(), dtype=np.int32))

    def to_arrow(self) -> pa.Array:
        """The same as an Arrow ``list<int32>`` column."""
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), self.values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64Array:
        """``[rows]`` int64: values per row."""
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.integer]) -> tuple[Int32Array, Int32Array]:
        """Some rows, one after the other.

        Args:
            rows: ``[m]`` row numbers; a negative one stands for an empty row.

        Returns:
            lengths ``[m]`` int32 and values ``[sum(lengths)]`` int32.
        """
        lengths = _lengths(self.offsets, rows)
        return lengths, _gather(self.offsets, self.values, rows, int(lengths.sum()))

    def sorted(self) -> Self:
        """The same with each row's values in ascending order."""
        rows = np.repeat(np.arange(len(self)), self.lengths)
        return type(self)(self.offsets, self.values[np.lexsort((self.values, rows))])


@compiled
def _lengths(offsets: Int64Array, rows: npt.NDArray[np.integer]) -> Int32Array:
    out = np.zeros(len(rows), np.int32)
    for i in range(len(rows)):
        if rows[i] >= 0:
            out[i] = offsets[rows[i] + 1] - offsets[rows[i]]
    return out


@compiled
def _gather(
    offsets: Int64Array, values: Int32Array, rows: npt.NDArray[np.integer], total: int
) -> Int32Array:
    out = np.empty(total, np.int32)
    at = 0
    for i in range(len(rows)):
        if rows[i] >= 0:
            for j in range(offsets[rows[i]], offsets[rows[i] + 1]):
                out[at] = values[j]
                at += 1
    return out
