"""Reads input files as Arrow record batches; errors name file, line and value of a bad cell.

Each format has a `Reader`, which returns columns with the file's types; `cells` converts them to
the requested types.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.arrays import open_array, read_vectors
from deepfm_dist.data.sources.cells import CellTyper, Check, Column, ColumnType, vectors_of, without
from deepfm_dist.data.sources.columnar import ColumnarReader, parquet_groups
from deepfm_dist.data.sources.delimited import DelimitedReader
from deepfm_dist.data.sources.files import InputFile, find_file, find_files
from deepfm_dist.data.sources.json_lines import JsonLinesReader, ObjectReader
from deepfm_dist.data.sources.nested import (
    NestedError,
    as_lists,
    holds_lists,
    is_list,
    plain,
    texts_of,
)
from deepfm_dist.data.sources.reader import MissingColumnError, Reader
from deepfm_dist.data.sources.source import BLOCK_BYTES, EmptyFile, Source
from deepfm_dist.errors import DataError
from deepfm_dist.messages import short

__all__ = [
    "BLOCK_BYTES",
    "Check",
    "Column",
    "ColumnType",
    "EmptyFile",
    "InputFile",
    "MissingColumnError",
    "as_lists",
    "column_names",
    "find_empty_list",
    "find_file",
    "find_files",
    "find_lists",
    "in_pieces",
    "in_tables",
    "laid_out_like",
    "length_of_vectors",
    "open_array",
    "read_batches",
    "read_objects",
    "read_table",
    "read_vectors",
]

_READERS: dict[str, type[Reader]] = {
    ".parquet": ColumnarReader,
    ".arrow": ColumnarReader,
    ".orc": ColumnarReader,
    ".jsonl": JsonLinesReader,
}
"""Readers by suffix; any other file is delimited text."""


def read_batches(
    path: str | Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] | None = None,
    dropped: Counter[str] | None = None,
    name: str = "",
    groups: tuple[int, int] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Streams columns of a file in any format listed in `docs/data.md`.

    Args:
        path: the file, or its URL; the suffix names the format.
        columns: what to read, in order.
        layout: what the file name does not show: column names, delimiter, encoding.
        on_bad_row: whether a row with an unreadable or empty required cell is an error or dropped;
            None: an error that does not name this setting, where it has no effect.
        dropped: counts of dropped rows by reason; updated.
        name: the file's name in `data.files`, for messages and reasons; empty if `data.files` does
            not describe it.
        groups: see `InputFile`.

    Yields:
        Record batches with exactly ``columns``, typed as `Column` says.

    Raises:
        EmptyFile: the file has no rows.
        DataError: the file is missing or malformed, lacks a column, or has a bad row.
    """
    source, skip_bad = Source(str(path), name, on_bad_row is not None), on_bad_row == "skip"
    counts = Counter[str]() if dropped is None else dropped
    reader = _reader(source, columns, layout, counts if skip_bad else None)
    cells = CellTyper(source, columns, counts, skip_bad, reader.where, reader.cells)
    rows = 0
    if groups is not None:
        assert isinstance(reader, ColumnarReader)
        rows = reader.read_only(groups)
    for batch in reader.batches():
        yield cells.typed(batch, rows)
        rows += batch.num_rows
    if rows == 0:
        raise EmptyFile(f"{source.path}: no rows; expected at least one below the header")


def in_pieces(file: InputFile, n_bytes: int) -> list[InputFile]:
    """The file, or pieces of a large Parquet file to read in parallel.

    Args:
        file: the file to divide.
        n_bytes: minimum uncompressed size of all pieces but the last.
    """
    source = Source(file.path, file.pattern)
    if file.text_bytes < 2 * n_bytes or source.suffix != ".parquet":
        return [file]
    try:
        source.check_contents()
        groups = parquet_groups(source, n_bytes)
    except DataError:  # reading raises the precise error
        return [file]
    except source.failures:
        return [file]
    return [replace(file, groups=piece) for piece in groups] or [file]


def _reader(
    source: Source,
    columns: Sequence[Column],
    layout: FileFormat | None,
    dropped: Counter[str] | None,
) -> Reader:
    """The reader of a file's format."""
    source.check_contents()
    kind = _READERS.get(source.suffix, DelimitedReader)
    return kind(source, columns, layout or FileFormat(), dropped)


def column_names(path: str | Path, layout: FileFormat | None = None) -> list[str]:
    """The columns of a file.

    Args:
        path: the file, or its URL.
        layout: what the file name does not show; None if `data.files` does not describe the file.

    Raises:
        DataError: the file is missing, empty or not readable.
    """
    source = Source(str(path))
    return [*_reader(source, (), layout, None).present(), *source.partitions]


def find_lists(
    path: str | Path, names: Sequence[str], layout: FileFormat | None = None, name: str = ""
) -> dict[str, bool]:
    """Detects which columns hold lists, by their types or, for text, by the first rows.

    Args:
        path: the file, or its URL.
        names: the columns.
        layout: the layout of the file.
        name: its name in `data.files`.

    Returns:
        Whether each column holds lists; columns with empty first rows are left out.

    Raises:
        EmptyFile: the file has no rows.
        DataError: the file cannot be read, or lacks a column.
    """
    columns = [Column(name, "texts", required=False) for name in names]
    reader = _reader(Source(str(path), name), columns, layout, Counter())
    for batch in reader.batches():
        if batch.num_rows:
            try:
                cells = {c.name: reader.cells(batch, c) for c in columns}
                filled = {name: a for name, a in cells.items() if a.null_count < len(a)}
                return {name: holds_lists(a) for name, a in filled.items()}
            except NestedError as error:
                raise DataError(f"{path}: {error}") from None
    raise EmptyFile(f"{path}: no rows; expected at least one below the header")


def length_of_vectors(
    path: str | Path, column: Column, layout: FileFormat | None = None, name: str = ""
) -> int | None:
    """Length of the first readable vector of a file; None if all cells are empty.

    Args:
        path: the file, or its URL.
        column: the column of type vector.
        layout: the layout of the file.
        name: its name in `data.files`.

    Raises:
        DataError: the file cannot be read, or the column is missing or holds something else.
    """
    unreadable: str | None = None
    reader = _reader(Source(str(path), name), [column], layout, Counter())
    for batch in reader.batches():
        try:
            cells = without(plain(reader.cells(batch, column)), column.missing)
            vectors = vectors_of(cells, column.separator)
        except NestedError as error:
            raise DataError(f"{path}: column {column.name!r} {error}") from None
        lengths = np.asarray(pc.list_value_length(vectors).fill_null(0), np.int64)
        readable = lengths > 0
        no_numbers = np.flatnonzero(np.asarray(vectors.flatten().is_null()))
        readable[np.repeat(np.arange(len(lengths)), lengths)[no_numbers]] = False
        if readable.any():
            return int(lengths[readable][0])
        if unreadable is None and lengths.any():
            unreadable = short(cells[int(lengths.argmax())].as_py())
    if unreadable is not None:
        raise DataError(
            f"{path}: column {column.name!r} holds {unreadable}, which is not a list of numbers; "
            f"write vectors as [0.5, 1.5], or set separator for the field"
        )
    return None


_NO_VALUES = r"^\s*(\[(\s|,|\"|null)*\]|\|[\s|]*)\s*$"
"""Matches text that is a list without values: ``[]``, ``[null]``, ``|``."""


def find_empty_list(path: str | Path, column: str) -> int | None:
    """The first row, counted from 1, whose cell is a list without values; None if there is none.

    Null and empty elements are not values. `read_table` also returns such a list for a null cell.

    Args:
        path: the file.
        column: one of its columns.
    """
    wanted = Column(column, "texts", required=False)
    reader = _reader(Source(str(path)), [wanted], None, None)
    rows = 0
    for batch in reader.batches():
        cells = plain(reader.cells(batch, wanted))
        if is_list(cells.type):
            values = texts_of(cells.flatten())
            owners = np.asarray(pc.list_parent_indices(cells))
            empty = np.array(cells.is_valid())
            empty[owners[np.asarray(pc.not_equal(values, "").fill_null(False))]] = False
        else:
            matches = pc.match_substring_regex(texts_of(cells), _NO_VALUES)
            empty = np.asarray(matches.fill_null(False)).astype(bool)
        if empty.any():
            return rows + int(empty.argmax()) + 1
        rows += batch.num_rows
    return None


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] | None = None,
    dropped: Counter[str] | None = None,
    name: str = "",
) -> pa.Table:
    """Reads all batches of `read_batches` as one table."""
    schema = pa.schema([(c.key, c.arrow_type) for c in columns])
    batches = read_batches(path, columns, layout, on_bad_row, dropped, name)
    return pa.Table.from_batches(batches, schema)


def read_objects(
    objects: Sequence[dict[str, Any]], columns: Sequence[Column], name: str
) -> pa.Table:
    """Reads objects in memory like `read_table` a file of JSON lines.

    Args:
        objects: JSON values by member, one object per row, at least one.
        columns: what to read, in order.
        name: the name of the objects, for error messages.

    Raises:
        DataError: a member is missing, unknown or cannot be read.
    """
    members = {c.name: {*accumulate(c.name.split("."), "{}.{}".format)} for c in columns}
    known = {*members, *(name.split(".")[0] for name in members)}
    for number, row in enumerate(objects, 1):
        for member in row:
            if member not in known:
                raise DataError(
                    f"{name}, row {number}: unknown field {short(member, 50)}; allowed: "
                    f"{', '.join(members)}"
                )
        for column, places in members.items():
            if places.isdisjoint(row):
                raise DataError(
                    f"{name}, row {number}: {column} is missing; give null for a field without a "
                    f"value"
                )
    source = Source(name)
    reader = ObjectReader(source, columns, objects)
    cells = CellTyper(source, columns, Counter(), False, reader.where, reader.cells)
    return pa.Table.from_batches([cells.typed(batch, 0) for batch in reader.batches()])


def in_tables(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """Regroups record batches into tables of this many rows; the last one is shorter."""
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
    """The layout of a file that is like another but may have a header.

    Args:
        path: the file, or its URL.
        columns: the columns to read; the first line is a header if it names all of them.
        layout: the layout of the other file.
    """
    if layout is None or layout.columns is None:
        return layout
    bare = layout.model_copy(update={"columns": None})
    source = Source(str(path))
    if source.suffix in _READERS:
        return None
    reader = DelimitedReader(source, columns, bare, None)
    return bare if {column.name for column in columns} <= set(reader.first_row()) else layout
