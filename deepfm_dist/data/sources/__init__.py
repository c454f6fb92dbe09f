"""Input files -> Arrow record batches; a bad cell is named by file, line and value.

Each format has a `Reader`, which gives the columns as the file has them; `cells` converts those to
the types that are asked for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.cells import CellTyper, Check, Column, ColumnType
from deepfm_dist.data.sources.columnar import ParquetReader
from deepfm_dist.data.sources.delimited import DelimitedReader
from deepfm_dist.data.sources.files import InputFile, find_file, find_files
from deepfm_dist.data.sources.source import BLOCK_BYTES, EmptyFile, Source

__all__ = [
    "BLOCK_BYTES",
    "Check",
    "Column",
    "ColumnType",
    "EmptyFile",
    "InputFile",
    "find_file",
    "find_files",
    "in_tables",
    "laid_out_like",
    "read_batches",
    "read_table",
]


def read_batches(
    path: str | Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dropped: Counter[str] | None = None,
    name: str = "",
) -> Iterator[pa.RecordBatch]:
    """Streams some columns of a csv, tsv, dat (``::``), libsvm or parquet file, gz and zst as well.

    Args:
        path: the file, or its URL; the suffix tells the format.
        columns: what to read, in the order wanted.
        layout: what the name does not tell: column names, delimiter, encoding.
        on_bad_row: whether a row with an unreadable or empty required cell is an error or dropped.
        dropped: counts of dropped rows by reason, added to.
        name: what `data.files` calls the file, for error messages and reasons; empty: it is read
            as it is, whatever `data.files` says.

    Yields:
        Record batches with exactly ``columns``, typed as `Column` says.

    Raises:
        EmptyFile: the file has no rows.
        DataError: the file is missing or malformed, lacks a column, or has a bad row.
    """
    source, skip_bad = Source(str(path), name), on_bad_row == "skip"
    counts = Counter[str]() if dropped is None else dropped
    kind = ParquetReader if source.suffix == ".parquet" else DelimitedReader
    once = list({column.name: column for column in columns}.values())
    reader = kind(source, once, layout or FileFormat(), counts if skip_bad else None)
    cells = CellTyper(source, columns, counts, skip_bad, reader.where, reader.cells)
    rows = 0
    for batch in reader.batches():
        yield cells.typed(batch, first_row=rows)
        rows += batch.num_rows
    if rows == 0:
        raise EmptyFile(f"{source.path}: no rows; expected at least one below the header")


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dropped: Counter[str] | None = None,
    name: str = "",
) -> pa.Table:
    """All batches of `read_batches` as one table."""
    schema = pa.schema([(c.key, c.arrow_type) for c in columns])
    batches = read_batches(path, columns, layout, on_bad_row, dropped, name)
    return pa.Table.from_batches(batches, schema)


def in_tables(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Record batches of any size -> tables of so many rows, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        while sum(len(b) for b in waiting) >= rows:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, rows).combine_chunks()
            waiting = table.slice(rows).to_batches()
    if waiting:
        yield pa.Table.from_batches(waiting).combine_chunks()


def laid_out_like(
    path: str | Path, columns: Sequence[Column], layout: FileFormat | None
) -> FileFormat | None:
    """How a file is laid out that is like another, but may have a header where that has none.

    Args:
        path: the file, or its URL.
        columns: what is to be read; its first line is a header if it names all of them.
        layout: of the other.
    """
    if layout is None or layout.columns is None:
        return layout
    bare = layout.model_copy(update={"columns": None})
    source = Source(str(path))
    reader = DelimitedReader(source, columns, bare, None)
    return bare if {column.name for column in columns} <= set(reader.first_row()) else layout
