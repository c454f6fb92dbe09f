"""Combinable checksums: those of a table's pieces give the table's."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.jagged import Jagged, from_arrow

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial x**0; bit 31 - k is the coefficient of x**k."""


@dataclass(frozen=True)
class TableSum:
    """CRC-32 of a table's numbers, without texts.

    Attributes:
        pieces: for the column names and each column's numbers: CRC-32, number of bytes, and whether
            further rows append to them.
    """

    pieces: tuple[tuple[int, int, bool], ...]

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """The sum of a table, or of a part of its rows."""
        pieces = []
        for name in table.column_names:
            if table[name].type != pa.string():
                values = from_arrow(table[name])
                arrays: tuple[npt.NDArray[Any], ...] = (
                    (values.lengths, values.values) if isinstance(values, Jagged) else (values,)
                )
                pieces.append((zlib.crc32(name.encode()), len(name.encode()), False))
                for array in map(np.ascontiguousarray, arrays):
                    pieces.append((zlib.crc32(array.data), array.nbytes, True))
        return cls(tuple(pieces))

    def __add__(self, below: Self) -> Self:
        """The sum of these rows followed by others."""
        pieces = []
        for ours, theirs in zip(self.pieces, below.pieces, strict=True):
            crc, n_bytes, grows = ours
            if grows:
                crc, n_bytes = _joined(crc, theirs[0], theirs[1]), n_bytes + theirs[1]
            pieces.append((crc, n_bytes, grows))
        return type(self)(tuple(pieces))

    @property
    def crc(self) -> int:
        """CRC-32 of names and numbers, column by column."""
        total = 0
        for crc, n_bytes, _ in self.pieces:
            total = _joined(total, crc, n_bytes)
        return total


def sums_of_tables(sums: Mapping[str, TableSum]) -> dict[str, int]:
    """`TableSum.crc` of tables, independent of their division into partitions.

    Args:
        sums: by the names of their partitions' files, such as ``train/part-00003.parquet``.

    Returns:
        By the name of the first partition's file.
    """
    tables: dict[tuple[str, str], TableSum] = {}
    for name in sorted(sums):  # in the order of the partitions
        folder, _, file = name.partition("/part-")
        table = folder, file.partition(".")[2]
        tables[table] = tables[table] + sums[name] if table in tables else sums[name]
    return {
        f"{folder}/part-00000{suffix and f'.{suffix}'}": total.crc
        for (folder, suffix), total in tables.items()
    }


def _joined(first: int, second: int, n_bytes: int) -> int:
    """CRC-32 of concatenated bytes from both parts' CRCs and the second one's length.

    Source: zlib's crc32_combine.
    """
    return _product(_power(8 * n_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo CRC-32's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power(n: int) -> int:
    """x**n."""
    power = _ONE
    for k in range(n.bit_length()):
        if n >> k & 1:
            power = _product(_square(k), power)
    return power


@cache
def _square(k: int) -> int:
    """x**(2**k)."""
    return _product(_square(k - 1), _square(k - 1)) if k else _ONE >> 1
