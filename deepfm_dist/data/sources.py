"""Input files -> Arrow record batches; a bad cell is named by file, line and value."""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.errors import DataError

BLOCK_BYTES = 16 << 20
_UNIT_SEPARATOR = b"\x1f"  # stands in for '::', since Arrow wants one-byte delimiters
_TYPES = {"text": pa.string(), "number": pa.float64(), "time": pa.int64()}


ColumnType = Literal["text", "number", "time"]


@dataclass(frozen=True)
class Column:
    """A column to read.

    Attributes:
        name: its name in the file.
        type: text -> string; number -> float64; time -> int64 seconds (from a number or a
            timestamp such as ``2020-01-31 12:00:00``).
        required: whether an empty cell makes the row a bad one (else it becomes null).
        missing: words that count as an empty cell.
    """

    name: str
    type: ColumnType = "text"
    required: bool = True
    missing: tuple[str, ...] = ()


def read_batches(
    path: Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dropped: Counter[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Streams some columns of a csv, tsv, dat (``::``) or parquet file, gz and zst as well.

    Args:
        path: the file; its suffix tells the format.
        columns: what to read, in the order wanted.
        layout: what the name does not tell: column names, delimiter, encoding.
        on_bad_row: whether a row with an unreadable or empty required cell is an error or dropped.
        dropped: counts of dropped rows by reason, added to.

    Yields:
        Record batches with exactly ``columns``, typed as `Column` says.

    Raises:
        DataError: the file is missing, empty or malformed, lacks a column, or has a bad row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; is data.root right?")
    reader = _Reader(path, tuple(columns), layout or FileFormat(), on_bad_row, dropped)
    yield from reader.batches()


def read_table(
    path: Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dropped: Counter[str] | None = None,
) -> pa.Table:
    """All batches of `read_batches` as one table."""
    schema = pa.schema([(c.name, _TYPES[c.type]) for c in columns])
    return pa.Table.from_batches(read_batches(path, columns, layout, on_bad_row, dropped), schema)


class _Reader:
    def __init__(
        self,
        path: Path,
        columns: tuple[Column, ...],
        layout: FileFormat,
        on_bad_row: str,
        dropped: Counter[str] | None,
    ) -> None:
        self.path, self.columns, self.layout = path, columns, layout
        self.skip_bad = on_bad_row == "skip"
        self.dropped = Counter[str]() if dropped is None else dropped
        suffixes = [s.lower() for s in path.suffixes]
        self.suffix = next((s for s in reversed(suffixes) if s not in (".gz", ".zst")), "")
        dat = self.suffix == ".dat"
        default = "::" if dat else "\t" if self.suffix in (".tsv", ".tab") else ","
        self.delimiter = layout.delimiter or default
        self.encoding = layout.encoding or ("latin-1" if dat else "utf-8")

    def batches(self) -> Iterator[pa.RecordBatch]:
        rows = 0
        raw = self._parquet() if self.suffix == ".parquet" else self._text()
        for batch in raw:
            yield self._typed(batch, first_row=rows)
            rows += batch.num_rows
        if rows == 0:
            raise DataError(f"{self.path}: no rows; expected at least one below the header")

    def _parquet(self) -> Iterator[pa.RecordBatch]:
        try:
            file = pq.ParquetFile(self.path)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path}: not a readable parquet file: {_brief(error)}") from None
        self._check_columns(file.schema_arrow.names)
        names = [c.name for c in self.columns]
        try:
            for batch in file.iter_batches(columns=names, batch_size=1 << 20):
                yield batch.select(names)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path}: a damaged parquet file: {_brief(error)}") from None

    def _text(self) -> Iterator[pa.RecordBatch]:
        ragged: list[pa_csv.InvalidRow] = []

        def on_ragged(row: pa_csv.InvalidRow) -> str:
            if self.skip_bad:
                self.dropped[f"{self.path.name}: rows with a wrong number of cells"] += 1
                return "skip"
            ragged.append(row)
            return "error"

        names = list(self.layout.columns) if self.layout.columns else None
        wide = len(self.delimiter.encode()) > 1
        wanted = [c.name for c in self.columns]

        def opened(only: list[str] | None) -> pa_csv.CSVStreamingReader:
            stream = pa.input_stream(str(self.path))
            if wide:
                stream = stream.read().replace(
                    self.delimiter.encode(self.encoding), _UNIT_SEPARATOR
                )
                stream = pa.BufferReader(stream)
            return pa_csv.open_csv(
                stream,
                pa_csv.ReadOptions(
                    block_size=BLOCK_BYTES, column_names=names, encoding=self.encoding
                ),
                pa_csv.ParseOptions(
                    delimiter=_UNIT_SEPARATOR.decode() if wide else self.delimiter,
                    quote_char=False if wide else '"',
                    invalid_row_handler=on_ragged,
                ),
                pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in wanted},
                    # The others' types would be guessed from the first block and then held to.
                    include_columns=only,
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )

        try:
            try:
                reader = opened(wanted)
            except KeyError:  # a column is missing: look what there is
                self._check_columns(opened(None).schema.names)
                raise
            yield from reader
        except pa.ArrowInvalid as error:
            if ragged:
                row = ragged[0]
                text = row.text.replace(_UNIT_SEPARATOR.decode(), self.delimiter)
                raise DataError(
                    f"{self.path}, line {self._line_of_text(text)}: {row.actual_columns} cells "
                    f"where {row.expected_columns} are expected: {text!r}; mend the row or set "
                    f"data.on_bad_row=skip"
                ) from None
            if "Empty CSV" in str(error):
                raise DataError(f"{self.path}: the file is empty") from None
            raise DataError(f"{self.path}: not readable: {_brief(error)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: not readable: {_brief(error)}") from None

    def _check_columns(self, present: Sequence[str]) -> None:
        for column in self.columns:
            if column.name not in present:
                near = difflib.get_close_matches(column.name, present, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise DataError(
                    f"{self.path}: no column {column.name!r}; {hint}it has: {', '.join(present)}"
                )

    def _typed(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        arrays, bad = [], np.zeros(batch.num_rows, bool)
        for column in self.columns:
            cells = _without(batch.column(column.name), column.missing)
            try:
                values = _convert(cells, column.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise DataError(
                    f"{self.path}: column {column.name!r} holds {cells.type} and cannot be read "
                    f"as {column.type}"
                ) from None
            unreadable = pc.and_(pc.is_null(values), pc.is_valid(cells))
            if column.required:
                unreadable = pc.is_null(values)
                if column.type == "text":
                    unreadable = pc.or_kleene(unreadable, pc.equal(values, ""))
            wrong = np.asarray(unreadable.fill_null(True))
            if wrong.any() and not self.skip_bad:
                self._refuse(column, int(wrong.argmax()), cells, first_row)
            bad |= wrong
            arrays.append(values)
        typed = pa.RecordBatch.from_arrays(arrays, names=[c.name for c in self.columns])
        if bad.any():
            self.dropped[f"{self.path.name}: rows with an unreadable cell"] += int(bad.sum())
            typed = typed.filter(pa.array(~bad))
        return typed

    def _refuse(self, column: Column, at: int, cells: pa.Array, first_row: int) -> None:
        cell = cells[at].as_py()
        what = "is empty" if cell in (None, "") else f"is no {column.type}"
        where = (
            f"row {first_row + at + 1}"
            if self.suffix == ".parquet"
            else f"line {self._line_of_row(first_row + at)}"
        )
        raise DataError(
            f"{self.path}, {where}: {column.name} {'' if cell is None else cell!r} {what}; "
            f"mend the row or set data.on_bad_row=skip"
        )

    def _lines(self) -> Iterator[tuple[int, str]]:
        # Only read again to report an error; blank lines do not count as rows.
        with pa.input_stream(str(self.path)) as stream:
            text = stream.read().decode(self.encoding, errors="replace")
        for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
            if line:
                yield number, line

    def _line_of_row(self, row: int) -> int:
        header = 0 if self.layout.columns else 1
        for index, (number, _) in enumerate(self._lines()):
            if index == row + header:
                return number
        return row + header + 1

    def _line_of_text(self, text: str) -> int:
        return next((number for number, line in self._lines() if line == text.rstrip("\r\n")), 0)


def _without(cells: pa.Array, words: tuple[str, ...]) -> pa.Array:
    """Cells of text with some words turned to null."""
    if not words or not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return cells
    found = pc.is_in(pc.utf8_trim_whitespace(cells), value_set=pa.array(words, cells.type))
    return pc.if_else(found, None, cells)


def _convert(cells: pa.Array, kind: str) -> pa.Array:
    """Cells -> the column's type; what cannot be read becomes null."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if kind == "text":
        return cells.cast(pa.string())
    if kind == "time" and pa.types.is_temporal(cells.type):
        return cells.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        cells = _numbers(cells) if kind == "number" else _times(cells)
    if kind == "number":
        cells = cells.cast(pa.float64(), safe=False)
    if pa.types.is_floating(cells.type):  # NaN and infinity, in float32, are nothing to learn from
        finite = pc.is_finite(cells.cast(pa.float32(), safe=False))
        cells = pc.if_else(finite, cells, None)
    return cells if kind == "number" else cells.cast(pa.int64(), pa.types.is_integer(cells.type))


def _numbers(cells: pa.Array) -> pa.Array:
    cells = pc.utf8_trim_whitespace(cells)
    try:
        return cells.cast(pa.float64())
    except pa.ArrowInvalid:
        return pa.array([_float_or_none(c) for c in cells.to_pylist()], pa.float64())


def _times(cells: pa.Array) -> pa.Array:
    try:
        return cells.cast(pa.int64())
    except pa.ArrowInvalid:
        pass
    try:
        return cells.cast(pa.timestamp("s")).cast(pa.int64())
    except pa.ArrowInvalid:
        return pa.array([_time_or_none(c) for c in cells.to_pylist()], pa.int64())


def _float_or_none(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _time_or_none(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        seconds = int(float(text))
    except (ValueError, OverflowError):
        pass
    else:
        return seconds if abs(seconds) < 1 << 63 else None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
