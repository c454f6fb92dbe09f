"""Rows of variable length in two flat arrays."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.compiled import compiled
from deepfm_dist.storage import crc32, remove_leftovers, work_folder

log = logging.getLogger(__name__)

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]

VECTORS_AT_ONCE = 1 << 14
"""Rows of vectors processed at a time, to bound temporary memory."""
_SUMS = "sums.json"
"""Checksums by file of a mapped folder."""
_AT_ONCE = 4
"""Number of values copied per row regardless of its length: the next row overwrites the excess,
which is cheaper than an unpredictable branch.
"""


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
    def empty(cls, n_rows: int) -> Self:
        """Rows without values."""
        return cls(np.zeros(n_rows + 1, np.int64), np.zeros(0, np.int32))

    @classmethod
    def from_pairs(cls, rows: npt.ArrayLike, values: npt.ArrayLike, n_rows: int) -> Self:
        """Groups (row, value) pairs by row, keeping their order within a row."""
        offsets, order = grouped(np.asarray(rows, dtype=np.int64), n_rows)
        return cls(offsets, np.asarray(values, dtype=np.int32)[order])

    @classmethod
    def from_arrow(cls, lists: pa.ChunkedArray | pa.Array) -> Self:
        """Arrow's list column as flat arrays; null lists are empty."""
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.combine_chunks()
        lengths = np.asarray(pc.list_value_length(lists).fill_null(0))
        return cls(offsets_of(lengths), np.asarray(lists.flatten(), dtype=np.int32))

    def to_arrow(self) -> pa.Array:
        """The same as an Arrow ``list<int32>`` column."""
        offsets = pa.array((self.offsets - self.offsets[0]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, self.values[self.offsets[0] : self.offsets[-1]])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64Array:
        """``[rows]`` int64: values per row."""
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.integer]) -> tuple[Int32Array, Int32Array]:
        """Gathers rows, concatenated.

        Args:
            rows: ``[m]`` row numbers; negative ones are empty rows.

        Returns:
            lengths ``[m]`` int32 and values ``[sum(lengths)]`` int32.
        """
        lengths = _lengths(self.offsets, rows)
        return lengths, _gather(self.offsets, self.values, rows, int(lengths.sum()))

    def sorted(self) -> Self:
        """The same with each row's values in ascending order."""
        return type(self)(self.offsets, _sorted_rows(self.offsets, self.values))

    def lists(self) -> list[list[int]]:
        """Each row's values, for few rows."""
        return [self.values[a:b].tolist() for a, b in pairwise(self.offsets.tolist())]

    def each_once(self) -> Self:
        """The same with duplicates within a row removed, keeping the first."""
        n = 1 + int(self.values.max(initial=0))
        owners = np.repeat(np.arange(len(self)), self.lengths)
        _, kept = np.unique(owners * n + self.values, return_index=True)
        kept.sort()
        return type(self).from_pairs(owners[kept], self.values[kept], len(self))

    def firsts(self) -> Self:
        """The same with each row's first value only."""
        there = np.flatnonzero(self.lengths)
        return type(self)(offsets_of(self.lengths > 0), self.values[self.offsets[there]])

    @classmethod
    def concatenated(cls, parts: Sequence[Self]) -> Self:
        """Concatenates the rows of all parts."""
        lengths = np.concatenate([p.lengths for p in parts])
        values = [p.values[p.offsets[0] : p.offsets[-1]] for p in parts]
        return cls(offsets_of(lengths), np.concatenate(values))


def union(parts: Sequence[Jagged]) -> Jagged:
    """Each row's distinct ascending values over all parts."""
    if len(parts) == 1:
        joint = parts[0].sorted()
    else:
        owners = np.concatenate([np.repeat(np.arange(len(p)), p.lengths) for p in parts])
        values = np.concatenate([p.values[p.offsets[0] : p.offsets[-1]] for p in parts])
        joint = Jagged.from_pairs(owners, values, len(parts[0])).sorted()
    first = np.diff(joint.values, prepend=-1) != 0
    begins = joint.offsets[:-1]
    first[begins[begins < len(first)]] = True
    if first.all():
        return joint
    kept = np.cumsum(np.append(0, first))
    return Jagged(kept[joint.offsets], joint.values[first])


Values = Int32Array | FloatArray | HalfArray | npt.NDArray[np.float64] | Jagged
"""A field's values: per row, one table row, one number (float64 until transformed), several table
rows, or one vector ``[rows, dim]`` (float32 until scaled, then float16).
"""


def taken(values: Values, rows: npt.NDArray[np.integer]) -> Values:
    """Some rows of a field."""
    if not isinstance(values, Jagged):
        return values.take(rows, axis=0)
    lengths, flat = values.take(rows)
    return Jagged(offsets_of(lengths), flat)


def joined(parts: Sequence[Values]) -> Values:
    """Concatenates a field's rows."""
    if len(parts) == 1:
        return parts[0]
    lists = [p for p in parts if isinstance(p, Jagged)]
    if lists:
        return Jagged.concatenated(lists)
    return np.concatenate([p for p in parts if not isinstance(p, Jagged)])


def to_arrow(values: Values) -> pa.Array:
    """A field as an Arrow column; float16 vectors as the bytes of each."""
    if isinstance(values, Jagged):
        return values.to_arrow()
    if values.ndim == 1:
        return pa.array(values)
    n, dim = values.shape
    content = pa.py_buffer(np.ascontiguousarray(values, "<f2"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * dim), n, [None, content])


def from_arrow(column: pa.ChunkedArray | pa.Array) -> Values:
    """Inverse of `to_arrow`."""
    if pa.types.is_list(column.type):
        return Jagged.from_arrow(column)
    if pa.types.is_fixed_size_binary(column.type):
        return _vectors_of_bytes(column)
    array: Int32Array = (
        column.to_numpy() if len(column) else np.zeros(0, column.type.to_pandas_dtype())
    )
    return array


def _vectors_of_bytes(column: pa.ChunkedArray | pa.Array) -> HalfArray:
    """``[n, dim]`` float16 from the bytes of each vector."""
    width = column.type.byte_width
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    blocks = [np.zeros((0, width // 2), np.float16)]
    for chunk in filter(len, chunks):
        content = np.frombuffer(chunk.buffers()[1], "<f2").reshape(-1, width // 2)
        blocks.append(content[chunk.offset : chunk.offset + len(chunk)])
    return blocks[1] if len(blocks) == 2 else np.concatenate(blocks)


def offsets_of(lengths: npt.ArrayLike) -> Int64Array:
    """``[n]`` lengths -> ``[n + 1]`` int64 offsets."""
    lengths = np.asarray(lengths, np.int64)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def grouped(groups: npt.NDArray[np.integer], n_groups: int) -> tuple[Int64Array, Int64Array]:
    """Counting sort.

    Args:
        groups: ``[n]`` group of each element, in ``[0, n_groups)``.
        n_groups: number of groups.

    Returns:
        offsets ``[n_groups + 1]`` int64 and order ``[n]`` int64: the elements of group g are
        ``order[offsets[g]:offsets[g + 1]]``, ascending.
    """
    offsets = offsets_of(counted(groups, n_groups))
    return offsets, _placed(groups, offsets[:-1].copy())


def counted(codes: npt.NDArray[np.integer], n: int) -> Int64Array:
    """``[n]`` int64: occurrences of each code 0 to n - 1; negative codes are ignored."""
    counts = np.zeros(n, np.int64)
    count_into(counts, codes)
    return counts


@compiled
def count_into(counts: Int64Array, codes: npt.NDArray[np.integer]) -> None:
    """Adds the occurrences of each code to ``[n]`` counts; negative codes are ignored."""
    for code in codes:
        if code >= 0:
            counts[code] += 1


@compiled
def _placed(groups: npt.NDArray[np.integer], next_place: Int64Array) -> Int64Array:
    order = np.empty(len(groups), np.int64)
    for i in range(len(groups)):
        group = groups[i]
        order[next_place[group]] = i
        next_place[group] += 1
    return order


@compiled
def _sorted_rows(offsets: Int64Array, values: Int32Array) -> Int32Array:
    out = values.copy()
    for r in range(len(offsets) - 1):
        begin, end = offsets[r], offsets[r + 1]
        if end - begin > 1:
            out[begin:end].sort()
    return out


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
    out = np.empty(total + _AT_ONCE, np.int32)
    at, last = 0, len(values) - 1
    for i in range(len(rows)):
        if rows[i] >= 0:
            begin, end = offsets[rows[i]], offsets[rows[i] + 1]
            if begin < end:
                for j in range(_AT_ONCE):
                    out[at + j] = values[min(begin + j, last)]
            for j in range(_AT_ONCE, end - begin):
                out[at + j] = values[begin + j]
            at += end - begin
    return out[:total]


def mapped(folder: Path, pieces: Callable[[], Iterable[Jagged]]) -> Jagged:
    """Rows in memory-mapped files, shared by all processes of a machine.

    Args:
        folder: the folder of the files; created atomically from ``pieces`` if it is missing.
        pieces: the rows, in consecutive pieces.
    """

    def write(aside: Path) -> None:
        lengths = []
        with (aside / "values.bin").open("wb") as file:
            for piece in pieces():
                lengths.append(piece.lengths)
                file.write(np.ascontiguousarray(piece.values).data)
        np.save(aside / "offsets.npy", offsets_of(np.concatenate(lengths)))

    _made_once(folder, write)
    offsets = np.asarray(np.load(folder / "offsets.npy", mmap_mode="r"))
    if offsets[-1] == 0:
        return Jagged(offsets, np.zeros(0, np.int32))
    return Jagged(offsets, np.asarray(np.memmap(folder / "values.bin", np.int32, mode="r")))


def mapped_values(
    folder: Path, n: int, pieces: Callable[[], Iterable[npt.NDArray[Any]]]
) -> Int32Array | FloatArray | HalfArray:
    """`mapped` for rows of one value or one vector each.

    Args:
        folder: the folder of the file; see `mapped`.
        n: total number of rows.
        pieces: the values, in consecutive pieces of one type.

    Returns:
        ``[n]`` values of that type, or ``[n, dim]``, read-only.
    """

    def write(aside: Path) -> None:
        whole, at = None, 0
        for piece in pieces():
            if whole is None:
                whole = np.lib.format.open_memmap(
                    aside / "values.npy", mode="w+", dtype=piece.dtype, shape=(n, *piece.shape[1:])
                )
            whole[at : at + len(piece)] = piece
            at += len(piece)

    _made_once(folder, write)
    return np.asarray(np.load(folder / "values.npy", mmap_mode="r"))


def _made_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Creates a folder atomically, even if several processes try at once.

    Its files have checksums, which each process verifies once; a damaged folder is created again.
    """
    if folder.is_dir():
        if _is_undamaged(folder):
            return
        log.warning("%s: its checksums differ; making it again", folder)
        damaged = work_folder(folder)
        with suppress(OSError):  # another process was first
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    remove_leftovers(folder)
    aside = work_folder(folder)
    aside.mkdir(parents=True)
    write(aside)
    sums = {path.name: crc32(path) for path in aside.iterdir()}
    (aside / _SUMS).write_text(json.dumps(sums))
    try:
        aside.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(aside)


def _is_undamaged(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _SUMS).read_text())
        return {name: crc32(folder / name) for name in sums} == sums
    except (OSError, ValueError, AttributeError):  # also a folder of a version without checksums
        return False
