"""Input files -> Arrow record batches; a bad cell is named by file, line and value."""

import codecs
import csv
import difflib
import io
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.text_stream import NO_TEXT, QuoteError, Quotes, TextStream
from deepfm_dist.errors import ConfigError, DataError

log = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1\x15": ".parquet"}
_MANY_LINES = 100  # more in one cell are worth a word: two stray quotes may have made it one
_UNIT_SEPARATOR = b"\x1f"  # stands in for '::', since Arrow wants one-byte delimiters
_TYPES = {
    "text": pa.string(),
    "number": pa.float64(),
    "weight": pa.float32(),
    "time": pa.int64(),
    "label": pa.int8(),
    "split": pa.int8(),
}
_WANTED = {
    "text": "text",
    "number": "number",
    "weight": "weight: a number above 0 is expected",
    "time": "time",
    "label": "label: 0 or 1 is expected",
    "split": "split: 0, 1, 2 or train, valid, test is expected",
}
_SPLIT_NAMES = pa.array(["0", "1", "2", "train", "valid", "test"])

ColumnType = Literal["text", "number", "weight", "time", "label", "split"]


@dataclass(frozen=True)
class Check:
    """What a column's cells are to be beside their type.

    Attributes:
        wrong: ``[n]`` string -> ``[n]`` bool: which are something else; an empty cell never is.
        wanted: what they are to be, after "is no".
    """

    wrong: Callable[[pa.Array], npt.NDArray[np.bool_]]
    wanted: str


@dataclass(frozen=True)
class Column:
    """A column to read.

    Attributes:
        name: its name in the file.
        type: text -> string; number -> float64; weight -> float32 above 0; time -> int64 seconds
            (from a number or a timestamp such as ``2020-01-31 12:00:00``); label -> int8 0 or 1;
            split -> int8 0, 1 or 2 (train, valid, test).
        required: whether an empty cell makes the row a bad one (else it becomes null).
        missing: words that count as an empty cell.
        checks: what makes a row a bad one, too.
    """

    name: str
    type: ColumnType = "text"
    required: bool = True
    missing: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def arrow_type(self) -> pa.DataType:
        """What its values are read as."""
        return _TYPES[self.type]


class EmptyFile(DataError):
    """A file without rows; one of many may be."""


@dataclass(frozen=True)
class InputFile:
    """A file that a configuration's name or pattern stands for.

    Attributes:
        path: a local path, or a URL that fsspec opens.
        name: as it stands in the configuration, below ``data.root``.
        size: in bytes.
        stamp: changes when the contents do, as far as the file system tells.
    """

    path: str
    name: str
    size: int
    stamp: str

    @property
    def text_bytes(self) -> int:
        """About as many bytes as its rows would take as plain text."""
        suffix = Path(self.path).suffix.lower()
        return self.size * (4 if suffix in _PACKED or suffix == ".parquet" else 1)


def find_files(root: str | Path, name: str) -> list[InputFile]:
    """The files that a name or a pattern with ``*`` stands for, in the order of their names.

    Args:
        root: folder: a local one, or a URL such as ``s3://bucket/logs``.
        name: file name or pattern below it.

    Raises:
        DataError: there is none, or the file system cannot be reached.
    """
    if "://" not in str(root):
        base = Path(root)
        found = sorted(base.glob(name)) if "*" in name else [base / name]
        named = {str(p.relative_to(base) if p.is_relative_to(base) else p): p for p in found}
        named = {n: p for n, p in named.items() if p.exists() and not _is_hidden(n, name)}
        files = [(n, p, p.stat()) for n, p in named.items() if p.is_file()]
        if not files:
            raise DataError(_not_found(str(base / name), name, folders=bool(named)))
        return [InputFile(str(p), n, s.st_size, str(s.st_mtime_ns)) for n, p, s in files]
    url = f"{str(root).rstrip('/')}/{name}"
    try:
        system, below = fsspec.core.url_to_fs(url)
        paths = sorted(system.glob(below)) if "*" in name else [below]
        cut = len(below) - len(name)
        listed = [system.info(path) for path in paths if not _is_hidden(path[cut:], name)]
    except Exception as error:  # a file system may raise anything, such as for a lacking password
        raise DataError(f"{url}: cannot be read: {_brief(error)}") from None
    infos = [info for info in listed if info.get("type") != "directory"]
    if not infos:
        raise DataError(_not_found(url, name, folders=bool(listed)))
    # A change shows in whichever of these the file system keeps.
    marks = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
    return [
        InputFile(
            system.unstrip_protocol(info["name"]),
            info["name"][cut:],
            int(info["size"] or 0),
            str(next((info[m] for m in marks if m in info), "")),
        )
        for info in infos
    ]


def _is_hidden(found: str, pattern: str) -> bool:
    """Whether a ``*`` has found what no program means by it: ``_SUCCESS``, ``.part-0.crc``."""

    def is_hidden(part: str, patterns: Sequence[str]) -> bool:
        return part[:1] in (".", "_") and not any(p[:1] == part[:1] for p in patterns)

    (*folders, file), (*wanted, last) = found.split("/"), pattern.split("/")
    return "*" in pattern and (
        is_hidden(file, [last]) or any(is_hidden(folder, wanted) for folder in folders)
    )


def _not_found(where: str, name: str, folders: bool) -> str:
    if not folders:
        return f"{where}: no such file; is data.root right?"
    return f"{where}: is a folder; name its files: {name.rstrip('/')}/*{Path(name).suffix}"


def find_file(root: str | Path, name: str, setting: str) -> str:
    """Path or URL of the one file that a name or pattern stands for.

    Raises:
        DataError: there is none, or the file system cannot be reached.
        ConfigError: there are several; ``setting`` is what to name one by.
    """
    files = find_files(root, name)
    if len(files) > 1:
        raise ConfigError(f"{setting}: {name} stands for {len(files)} files; say which one")
    return files[0].path


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
    reader = _Reader(str(path), tuple(columns), layout or FileFormat(), on_bad_row, dropped, name)
    yield from reader.batches()


def read_table(
    path: str | Path,
    columns: Sequence[Column],
    layout: FileFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    dropped: Counter[str] | None = None,
    name: str = "",
) -> pa.Table:
    """All batches of `read_batches` as one table."""
    schema = pa.schema([(c.name, c.arrow_type) for c in columns])
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
    reader = _Reader(str(path), tuple(columns), bare, "error", None)
    first: Sequence[str] = ()
    with suppress(csv.Error, *reader.failures):
        _, _, first = next(reader._parsed(), (0, 0, ()))
    return bare if {column.name for column in columns} <= set(first) else layout


class _Reader:
    def __init__(
        self,
        path: str,
        columns: tuple[Column, ...],
        layout: FileFormat,
        on_bad_row: str,
        dropped: Counter[str] | None,
        name: str = "",
    ) -> None:
        self.path, self.columns, self.layout = path, columns, layout
        self.name, self.entry = name or Path(path).name, _as_yaml(name)
        self.skip_bad = on_bad_row == "skip"
        # What reading may raise: a remote file system anything at all.
        local = (OSError, EOFError, ValueError, pa.ArrowException)
        self.failures: tuple[type[Exception], ...] = (Exception,) if "://" in path else local
        self.dropped = Counter[str]() if dropped is None else dropped
        suffixes = [s.lower() for s in Path(path).suffixes]
        self.packing = _PACKED.get(suffixes[-1]) if suffixes else None
        self.suffix = next((s for s in reversed(suffixes) if s not in _PACKED), "")
        self.libsvm = self.suffix in (".libsvm", ".svm")
        dat = self.suffix == ".dat"
        default = "::" if dat else "\t" if self.suffix in (".tsv", ".tab") else ","
        self.delimiter = " " if self.libsvm else layout.delimiter or default
        self.encoding = layout.encoding or ("latin-1" if dat else "utf-8")
        self.wide = len(self.delimiter.encode()) > 1
        self.quoted = layout.quoted and not (self.wide or self.libsvm)

    def batches(self) -> Iterator[pa.RecordBatch]:
        if self.libsvm and not self.layout.columns:
            raise DataError(
                f"{self.path}: libsvm has no column names; "
                + self._cure("give them", "columns: [label, first, second, ...]", "write csv")
            )
        rows = 0
        raw = self._parquet() if self.suffix == ".parquet" else self._text()
        for batch in raw:
            yield self._typed(batch, first_row=rows)
            rows += batch.num_rows
        if rows == 0:
            raise EmptyFile(f"{self.path}: no rows; expected at least one below the header")

    def _cure(self, what: str, setting: str, otherwise: str) -> str:
        """What to do about a layout that the file's name does not tell."""
        return f"{what} in data.files: {{{self.entry}: {{{setting}}}}}" if self.entry else otherwise

    # -- files ----------------------------------------------------------------------------------

    def _opened(self) -> Any:
        """The file as stored."""
        try:
            if "://" in self.path:
                return pa.PythonFile(fsspec.open(self.path, "rb").open(), "r")
            return pa.OSFile(self.path)
        except (FileNotFoundError, IsADirectoryError):
            raise DataError(f"{self.path}: no such file; is data.root right?") from None
        except self.failures as error:
            raise DataError(f"{self.path}: cannot be read: {_brief(error)}") from None

    def _stream(self) -> Any:
        """The file's text as bytes, unpacked."""
        file = self._opened()
        return pa.CompressedInputStream(file, self.packing) if self.packing else file

    def _parquet(self) -> Iterator[pa.RecordBatch]:
        opened = self._opened()
        try:
            file = pq.ParquetFile(opened)
        except self.failures as error:
            if "file size is 0 bytes" in str(error):
                raise EmptyFile(f"{self.path}: the file is empty") from None
            raise DataError(f"{self.path}: not a readable parquet file: {_brief(error)}") from None
        self._check_columns(file.schema_arrow.names)
        names = [c.name for c in self.columns]
        try:
            for batch in file.iter_batches(columns=names, batch_size=1 << 20):
                yield batch.select(names)
        except self.failures as error:
            raise DataError(f"{self.path}: a damaged parquet file: {_brief(error)}") from None

    def _text(self) -> Iterator[pa.RecordBatch]:
        def on_ragged(row: pa_csv.InvalidRow) -> str:
            self.dropped[f"{self.name}: rows with a wrong number of cells"] += 1
            return "skip"

        names = list(self.layout.columns) if self.layout.columns else None
        wanted = [c.name for c in self.columns]

        quotes: Quotes | None = None

        def opened(only: list[str] | None) -> pa_csv.CSVStreamingReader:
            nonlocal quotes
            quotes = Quotes(self.delimiter) if self.quoted else None
            stream = self._utf_8(quotes)
            return pa_csv.open_csv(
                stream,
                pa_csv.ReadOptions(block_size=BLOCK_BYTES, column_names=names),
                pa_csv.ParseOptions(
                    delimiter=_UNIT_SEPARATOR.decode() if self.wide else self.delimiter,
                    quote_char='"' if self.quoted else False,
                    newlines_in_values=self.quoted,
                    invalid_row_handler=on_ragged if self.skip_bad else None,
                ),
                pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in wanted},
                    # The others' types would be guessed from the first block and then held to.
                    include_columns=only,
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )

        self._check_beginning()
        reader: pa_csv.CSVStreamingReader | None = None
        try:
            try:
                reader = opened(wanted)
            except KeyError:  # a column is missing: look what there is
                self._check_columns(opened(None).schema.names)
                raise
            yield from reader
        except DataError:
            raise
        except QuoteError as error:
            raise self._unbalanced(error) from None
        except pa.ArrowInvalid as error:
            if "straddling" in str(error):
                raise self._too_long() from None
            if ragged := re.search(r"Expected (\d+) columns, got \d+: (.*)", str(error), re.DOTALL):
                raise DataError(self._ragged(int(ragged[1]), ragged[2])) from None
            if "Empty CSV" in str(error):
                raise EmptyFile(f"{self.path}: the file is empty") from None
            raise DataError(self._unreadable(error)) from None
        except self.failures as error:
            raise DataError(self._unreadable(error)) from None
        finally:
            # What a decoder or a remote file raised passed through this frame, and Arrow's reading
            # thread keeps it: were the reader still here, that thread could be the one to free it,
            # and would wait for its own end.
            reader = None

        if quotes is not None and quotes.most_lines > _MANY_LINES:
            log.warning(
                "%s, line %d: a cell in quotes goes on for %d lines; %s",
                self.path,
                self._line_at(quotes.most_lines_at),
                quotes.most_lines + 1,
                self._quotes_are_text,
            )

    def _utf_8(self, quotes: Quotes | None = None) -> TextStream:
        """The file's text as Arrow is to read it."""
        return TextStream(self._stream(), self.encoding, self.skip_bad, self._rewritten, quotes)

    def _rewritten(self, lines: bytes) -> bytes:
        if self.wide:
            return lines.replace(self.delimiter.encode(), _UNIT_SEPARATOR)
        if self.libsvm:
            return re.sub(rb"[ \t]+(?=\r?\n|$)", b"", lines)
        return lines

    def _check_beginning(self) -> None:
        """Refuses what is no text of its encoding, and columns that are missing or come twice."""
        try:
            begin = self._stream().read(5)
        except DataError:
            raise
        except self.failures:
            return  # the reader says why
        for magic, suffix in _MAGIC.items():
            if begin.startswith(magic):
                raise DataError(
                    f"{self.path}: not readable: it begins as {suffix} files do; call it "
                    f"{Path(self.path).name}{suffix}"
                )
        if begin[:2] in (b"\xff\xfe", b"\xfe\xff") and self.encoding.lower().startswith("utf-8"):
            raise DataError(
                f"{self.path}, line 1: not readable: it begins as UTF-16 does; "
                + self._cure("name the encoding", "encoding: utf-16", "save it as UTF-8")
            )
        if begin.startswith(codecs.BOM_UTF8) and self.layout.encoding is None:
            self.encoding = "utf-8"  # whatever the suffix's usual one is
        header: Sequence[str] = self.layout.columns or ()
        if not header:
            with suppress(csv.Error, *self.failures):
                _, _, header = next(self._parsed(), (0, 0, ()))
        if header and NO_TEXT not in "".join(header):  # else the reader says where
            self._check_columns(header)

    def _check_columns(self, present: Sequence[str]) -> None:
        for column in self.columns:
            if column.name not in present:
                near = difflib.get_close_matches(column.name, present, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                names = ", ".join(n if n.isprintable() else repr(n) for n in present)
                raise DataError(f"{self.path}: no column {column.name!r}; {hint}it has: {names}")
            if list(present).count(column.name) > 1:
                raise DataError(f"{self.path}: two columns are called {column.name!r}; rename one")

    # -- cells ----------------------------------------------------------------------------------

    def _typed(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        arrays, bad = [], np.zeros(batch.num_rows, bool)
        for column in self.columns:
            cells = batch.column(column.name)
            if self.libsvm:
                cells = _half(cells, 1 if column.type == "number" else 0)
            cells = _without(_plain(cells), column.missing)
            if column.type == "text":
                cells = _whole_as_integers(cells)
            try:
                if column.type == "time":
                    values, cut = _seconds(_moments(cells))
                    if cut:
                        self.dropped[f"{self.name}: fractions of seconds in {column.name}"] += cut
                else:
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
            if self.skip_bad and column.type == "text":
                no_text = pc.match_substring(values, NO_TEXT)
                unreadable = pc.or_kleene(unreadable, no_text.fill_null(False))
            faults = [(check.wrong(values), check.wanted) for check in column.checks]
            if pc.any(unreadable, min_count=0).as_py() is not False:
                faults.append((np.asarray(unreadable.fill_null(True)), _WANTED[column.type]))
            for wrong, wanted in faults:
                if wrong.any() and not self.skip_bad:
                    self._refuse(column.name, wanted, int(wrong.argmax()), cells, first_row)
                bad |= wrong
            arrays.append(values)
        typed = pa.RecordBatch.from_arrays(arrays, names=[c.name for c in self.columns])
        if bad.any():
            self.dropped[f"{self.name}: rows with an unreadable cell"] += int(bad.sum())
            typed = typed.filter(pa.array(~bad))
        return typed

    def _refuse(self, name: str, wanted: str, at: int, cells: pa.Array, first_row: int) -> None:
        cell = cells[at].as_py()
        what = "is empty" if cell in (None, "") else f"is no {wanted}"
        row = first_row + at
        where = f"row {row + 1}" if self.suffix == ".parquet" else self._where(row)
        shown = _short("" if cell is None else cell)
        raise DataError(
            f"{self.path}, {where}: {name} {shown} {what}; mend the row or set data.on_bad_row=skip"
        )

    # -- diagnosis: the file is read again, only to say where it is wrong ------------------------

    def _parsed(self) -> Iterator[tuple[int, int, Sequence[str]]]:
        """(row below the header, line it begins on, cells) of every row that is not blank."""
        text = io.TextIOWrapper(
            io.BufferedReader(TextStream(self._stream(), self.encoding, replace=True)),
            "utf-8-sig",
            newline="" if self.quoted else None,
        )
        row = 0 if self.layout.columns else -1
        if not self.quoted:
            for line, cells in enumerate(text, start=1):
                if cells := cells.rstrip("\r\n"):
                    yield row, line, self._cells(cells.rstrip(" "))
                    row += 1
            return
        reader = csv.reader(text, delimiter=self.delimiter)
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            if values:
                yield row, line, values
                row += 1

    def _cells(self, line: str) -> list[str]:
        """A line without quotes, split where Arrow does."""
        parted = line.replace(self.delimiter, _UNIT_SEPARATOR.decode()) if self.wide else line
        return parted.split(_UNIT_SEPARATOR.decode() if self.wide else self.delimiter)

    def _where(self, wanted: int) -> str:
        with suppress(csv.Error, *self.failures):
            for row, line, _ in self._parsed():
                if row == wanted:
                    return f"line {line}"
        return f"row {wanted + 1}"

    def _ragged(self, expected: int, text: str) -> str:
        where, n = "a row", len(self._cells(text))
        with suppress(csv.Error, *self.failures):
            for _, line, cells in self._parsed():
                if len(cells) != expected:
                    where, n, text = f"line {line}", len(cells), self.delimiter.join(cells)
                    break
        return (
            f"{self.path}, {where}: {n} cells where {expected} are expected: {_short(text)}; "
            f"mend the row or set data.on_bad_row=skip"
        )

    def _unbalanced(self, error: QuoteError) -> DataError:
        what = (
            "text stands behind the closing quote of a cell"
            if error.is_closed
            else "a cell begins with a quote that is not closed"
        )
        return DataError(
            f"{self.path}, line {self._line_at(error.offset)}: {what}; mend it, or "
            f"{self._quotes_are_text}"
        )

    @property
    def _quotes_are_text(self) -> str:
        what = "where quotes are text, say so"
        return self._cure(what, "quoted: false", "write it anew without quotes")

    def _too_long(self) -> DataError:
        """Why a row is longer than Arrow takes: a stray quote, if there is one."""
        if self.quoted:
            stream = self._utf_8(Quotes(self.delimiter))
            try:
                while stream.read(1 << 20):
                    pass
            except QuoteError as error:
                return self._unbalanced(error)
        return DataError(f"{self.path}: not readable: a row has more than {BLOCK_BYTES:,} bytes")

    def _line_at(self, offset: int) -> int:
        """The line that so many bytes of the text lie before, from 1."""
        line, before = 1, b""
        stream = self._utf_8()
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            ends = block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            line += ends - (before == b"\r" and block[:1] == b"\n")
            offset, before = offset - len(block), block[-1:]
        return line

    def _unreadable(self, error: Exception) -> str:
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            with suppress(*self.failures), io.BufferedReader(_Raw(self._stream())) as lines:
                for number, line in enumerate(lines, start=1):
                    try:
                        line.decode(self.encoding)
                    except UnicodeError:
                        return (
                            f"{self.path}, line {number}: not readable: {_short(line)} is no "
                            f"{self.encoding.upper()} text; "
                            + self._cure("name the encoding", "encoding: ...", "save it as UTF-8")
                        )
        return f"{self.path}: not readable: {_brief(error)}"


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's io sees one."""

    def __init__(self, stream: Any) -> None:
        self._of_arrow = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._of_arrow.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _half(cells: pa.Array, which: int) -> pa.Array:
    """One half of libsvm's ``index:value``; a cell without colon, such as the label, as it is."""
    pattern = (r":.*$", r"^[^:]*:")[which]
    return pc.replace_substring_regex(cells, pattern, "")


def _plain(cells: pa.Array) -> pa.Array:
    """Cells without an encoding or a layout of their own."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    return cells.cast(pa.string()) if pa.types.is_string_view(cells.type) else cells


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _without(cells: pa.Array, words: tuple[str, ...]) -> pa.Array:
    """Cells with some words, or the numbers that these words are, turned to null."""
    if not words:
        return cells
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        found = pc.is_in(pc.utf8_trim_whitespace(cells), value_set=pa.array(words, cells.type))
        return pc.if_else(found, None, cells)
    if not _is_number(cells.type):
        return cells
    numbers = [n for n in map(_float_or_none, words) if n is not None]
    exact = cells.cast(pa.float64(), safe=False)
    found = pc.is_in(exact, value_set=pa.array(numbers, pa.float64()))
    if any(map(math.isnan, numbers)):
        found = pc.or_(found, pc.is_nan(exact).fill_null(False))
    return pc.if_else(found, None, cells)


def _convert(cells: pa.Array, kind: str) -> pa.Array:
    """Cells -> the column's type; what cannot be read becomes null."""
    if kind == "text":
        try:
            return cells.cast(pa.string())
        except pa.ArrowInvalid:  # bytes, of which some are no text
            return pa.array([_text_or_none(c) for c in cells.to_pylist()], pa.string())
    if kind == "split":
        place = pc.index_in(pc.utf8_trim_whitespace(cells.cast(pa.string())), _SPLIT_NAMES)
        return pc.if_else(pc.greater_equal(place, 3), pc.subtract(place, 3), place).cast(pa.int8())
    if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
        cells = _numbers(cells)
    cells = cells.cast(pa.float64(), safe=False)
    # NaN and infinity, in float32, are nothing to learn from.
    cells = pc.if_else(pc.is_finite(cells.cast(pa.float32(), safe=False)), cells, None)
    if kind == "weight":
        cells = cells.cast(pa.float32(), safe=False)
        return pc.if_else(pc.greater(cells, 0), cells, None)
    if kind == "label":
        binary = pc.is_in(cells, pa.array([0.0, 1.0]))
        return pc.if_else(binary, cells, None).cast(pa.int8())
    return cells


def _numbers(cells: pa.Array) -> pa.Array:
    cells = pc.utf8_trim_whitespace(cells)
    try:
        return cells.cast(pa.float64())
    except pa.ArrowInvalid:
        return pa.array([_float_or_none(c) for c in cells.to_pylist()], pa.float64())


def _moments(cells: pa.Array) -> pa.Array:
    """Times of any kind -> a temporal type, integers or floats; null where it is none."""
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return cells
    for kind in (pa.int64(), pa.timestamp("s"), pa.timestamp("us"), pa.float64()):
        try:
            return cells.cast(kind)
        except pa.ArrowInvalid:
            pass
    return pa.array([_time_or_none(c) for c in cells.to_pylist()], pa.float64())


def _seconds(moments: pa.Array) -> tuple[pa.Array, int]:
    """Moments -> int64 whole seconds, null where that is too small, and how many were cut."""
    if pa.types.is_temporal(moments.type):
        moments = moments.cast(pa.timestamp("us"), safe=False)
        seconds = pc.floor_temporal(moments, unit="second")
        cut = pc.not_equal(moments, seconds)
        return seconds.cast(pa.timestamp("s")).cast(pa.int64()), pc.sum(cut).as_py() or 0
    if pa.types.is_uint64(moments.type):
        moments = pc.if_else(pc.less(moments, pa.scalar(2**63, pa.uint64())), moments, None)
    if not pa.types.is_floating(moments.type):
        return moments.cast(pa.int64()), 0
    seconds = pc.floor(moments.cast(pa.float64()))
    inside = pc.and_(pc.greater_equal(seconds, -(2.0**63)), pc.less(seconds, 2.0**63))
    seconds = pc.if_else(inside, seconds, None)
    cut = pc.not_equal(seconds, moments)
    return seconds.cast(pa.int64()), pc.sum(cut).as_py() or 0


def _whole_as_integers(cells: pa.Array) -> pa.Array:
    """Floats -> text, as their integers have it, which pandas makes floats where there are gaps.

    A gap is no id called nan, and ten thousand million is none called 1e+10. Decimals likewise:
    1.00 is 1. What is neither stays as it is.
    """
    if pa.types.is_decimal(cells.type):
        texts = [None if c is None else f"{c:f}" for c in cells.to_pylist()]
        whole = [t if t is None or "." not in t else t.rstrip("0").rstrip(".") for t in texts]
        return pa.array(whole, pa.string())
    if not pa.types.is_floating(cells.type):
        return cells
    exact = cells.cast(pa.float64())
    finite = pc.is_finite(exact)
    whole = pc.and_(finite, pc.less(pc.abs(exact), 2.0**63))
    whole = pc.and_(whole, pc.equal(pc.trunc(exact), exact))
    digits = pc.if_else(whole, exact, None).cast(pa.int64()).cast(pa.string())
    return pc.if_else(whole, digits, pc.if_else(finite, cells, None).cast(pa.string()))


def _float_or_none(text: str | None) -> float | None:
    """A number as files have it: Python would also take 1_000 and digits of other scripts."""
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _time_or_none(text: str | None) -> float | None:
    if text is None:
        return None
    seconds = _float_or_none(text)
    if seconds is not None:
        return seconds
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _text_or_none(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None


def _as_yaml(name: str) -> str:
    """A file's name as a key; such as begins with * would be something else."""
    return (
        name if re.fullmatch(r"([\w/.][\w/.*-]*)?", name) else "'" + name.replace("'", "''") + "'"
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
