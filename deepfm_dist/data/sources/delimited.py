"""Delimited text: csv, tsv, dat, libsvm; errors name the line.

Arrow parses; Python rereads a file only to locate errors.
"""

import codecs
import csv
import io
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.cells import Column
from deepfm_dist.data.sources.reader import Reader
from deepfm_dist.data.sources.source import BLOCK_BYTES, PACKED, EmptyFile, Source
from deepfm_dist.data.sources.text_stream import NO_TEXT, QuoteError, Quotes, TextStream
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural, short

log = logging.getLogger(__name__)

_DELIMITERS = {
    ", ": '", "', "; ": '"; "', ",": '","', ";": ";", "\t": '"\\t"', "|": '"|"', "::": '"::"'
}  # fmt: skip
"""Delimiters, and how to write them in YAML."""
_MANY_LINES = 100  # warn about longer cells: two stray quotes may have joined rows
_ID_LINE = re.compile(r"[\w-]+:")  # Netflix's files: the item of the following rows
_UNIT_SEPARATOR = b"\x1f"  # replaces '::', since Arrow requires one-byte delimiters


class DelimitedReader(Reader):
    """Reads delimited lines, and libsvm."""

    def __init__(
        self,
        source: Source,
        columns: Sequence[Column],
        layout: FileFormat,
        dropped: Counter[str] | None,
    ) -> None:
        super().__init__(source, columns, layout, dropped)
        self.libsvm = source.suffix in (".libsvm", ".svm")
        dat = source.suffix == ".dat"
        default = "::" if dat else "\t" if source.suffix in (".tsv", ".tab") else ","
        self.delimiter = " " if self.libsvm else layout.delimiter or default
        self.encoding = layout.encoding or ("latin-1" if dat else "utf-8")
        self.wide = len(self.delimiter.encode()) > 1
        self.quoted = layout.quoted and not (self.wide or self.libsvm)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the requested columns as text."""
        if self.libsvm and not self.layout.columns:
            raise DataError(
                f"{self.source.path}: libsvm has no column names; "
                + self.source.cure("give them", "columns: [label, first, second, ...]", "write csv")
            )
        yield from self._text()

    def present(self) -> Sequence[str]:
        """The configured column names, or those of the header line."""
        return self.layout.columns or self.first_row()

    def cells(self, batch: pa.RecordBatch, column: Column) -> pa.Array:
        """A column's cells; for libsvm, the requested half of each."""
        cells = super().cells(batch, column)
        return _half(cells, 1 if column.type == "number" else 0) if self.libsvm else cells

    def layout_hint(self, present: Sequence[str]) -> str:
        """Advice if another delimiter would fit, or the header line is missing."""
        wanted, line = {c.name for c in self.columns}, self.delimiter.join(present)
        if line.startswith("#"):
            if present[0].lstrip("# ") in wanted:
                return "; remove the # at the beginning of its header line"
            return f"; its first line is a comment; {self._without_comments}"
        if line.lower().startswith("sep="):
            command = self._filter_command("tail -n +2")
            return f"; its first line is for Excel alone; write it without: {command}"
        if "\0" in line:
            encoding = "utf-16-be" if line.startswith("\0") else "utf-16-le"
            name_it = self.source.cure("name it", f"encoding: {encoding}", "save it as UTF-8")
            return f"; its encoding seems to be {encoding}: {name_it}"
        for mark, written in _DELIMITERS.items():
            if mark != self.delimiter and self._is_separated_by(mark, line, wanted):
                cure = self.source.cure("name it", f"delimiter: {written}", f"save it with {mark}")
                return f"; its cells seem to be separated by {mark!r}: {cure}"
        if not self.quoted and wanted & {name.strip('"') for name in present}:
            return "; its names are in quotes: leave quoted: false out of data.files"
        alike = {name.strip().casefold() for name in present} & {n.casefold() for n in wanted}
        if self.layout.columns is None and not alike:
            counts = {mark: line.count(mark) for mark in ("\t", ";", "|", "::")}
            mark = max(counts, key=lambda mark: counts[mark])
            other, n = "", len(present)
            if n == 1 and counts[mark]:
                other, n = f"delimiter: {_DELIMITERS[mark]}, ", 1 + counts[mark]
            add = f"add one of {plural(n, 'name')}"
            cure = self.source.cure("name them", f"{other}columns: [first, second, ...]", add)
            return f"; if it has no header line, {cure}" + f", {n} of them" * (cure != add)
        return ""

    def _is_separated_by(self, mark: str, header: str, wanted: set[str]) -> bool:
        """Whether the header line suggests another delimiter."""
        if mark not in header or not wanted & set(header.split(mark)):
            return False
        if " " not in mark:
            return True
        # Only the header may have spaces; with a two-character delimiter, quotes are text.
        rows = [self.delimiter.join(cells) for _, _, cells in islice(self._parse(), 100)]
        return len({row.count(mark) for row in rows}) == 1 and not any('"' in row for row in rows)

    def _text(self) -> Iterator[pa.RecordBatch]:
        names = list(self.layout.columns) if self.layout.columns else None
        quotes: Quotes | None = None

        def open_reader(only: list[str] | None) -> pa_csv.CSVStreamingReader:
            nonlocal quotes
            quotes = Quotes(self.delimiter, self.layout.escape) if self.quoted else None
            stream = self._utf_8(quotes)
            return pa_csv.open_csv(
                stream,
                pa_csv.ReadOptions(block_size=BLOCK_BYTES, column_names=names),
                pa_csv.ParseOptions(
                    delimiter=_UNIT_SEPARATOR.decode() if self.wide else self.delimiter,
                    quote_char='"' if self.quoted else False,
                    escape_char=self.layout.escape or False,
                    newlines_in_values=self.quoted,
                    invalid_row_handler=self._drop_ragged if self.dropped is not None else None,
                ),
                pa_csv.ConvertOptions(
                    column_types={name: pa.string() for name in self.names},
                    # Arrow would infer the other columns' types from the first block and then
                    # enforce them.
                    include_columns=only,
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )

        self._check_beginning()
        reader: pa_csv.CSVStreamingReader | None = None
        try:
            try:
                reader = open_reader(self.names)
            except KeyError:  # a column is missing: find out what the file has
                self.locate(open_reader(None).schema.names)
                raise
            yield from reader
        except DataError:
            raise
        except QuoteError as error:
            raise self._quote_error(error) from None
        except pa.ArrowInvalid as error:
            if "straddling" in str(error):
                raise self._too_long() from None
            if ragged := re.search(r"Expected (\d+) columns, got \d+: (.*)", str(error), re.DOTALL):
                raise DataError(self._ragged_error(int(ragged[1]), ragged[2])) from None
            if "Empty CSV" in str(error):
                raise EmptyFile(f"{self.source.path}: the file is empty") from None
            raise DataError(self._unreadable(error)) from None
        except self.source.failures as error:
            raise DataError(self._unreadable(error)) from None
        finally:
            # An error of a decoder or remote file references this frame, and Arrow's reading thread
            # keeps the error: if the frame still held the reader, that thread might be the one to
            # free it, and would wait for itself.
            reader = None

        if quotes is not None and quotes.most_lines > _MANY_LINES:
            self._warn_of_long_cell(quotes)

    def _drop_ragged(self, row: pa_csv.InvalidRow) -> str:
        assert self.dropped is not None
        self.dropped[f"{self.source.name}: rows with a wrong number of cells"] += 1
        return "skip"

    def _warn_of_long_cell(self, quotes: Quotes) -> None:
        log.warning(
            "%s, line %d: a quoted cell spans %d lines; %s",
            self.source.path,
            self._line_at(quotes.most_lines_at),
            quotes.most_lines + 1,
            self._quotes_are_text,
        )

    def _utf_8(self, quotes: Quotes | None = None) -> TextStream:
        """The file's text, prepared for Arrow."""
        return TextStream(
            self.source.stream(), self.encoding, self.dropped is not None, self._rewritten, quotes
        )

    def _rewritten(self, lines: bytes) -> bytes:
        if self.wide:
            return lines.replace(self.delimiter.encode(), _UNIT_SEPARATOR)
        if self.libsvm:
            return re.sub(rb"[ \t]+(?=\r?\n|$)", b"", lines)
        return lines

    def _check_beginning(self) -> None:
        """Refuses undecodable text, and missing or duplicate columns."""
        try:
            begin = self.source.stream().read(5)
        except DataError:
            raise
        except self.source.failures:
            return  # the reader reports the error
        if begin[:2] in (b"\xff\xfe", b"\xfe\xff") and self.encoding.lower().startswith("utf-8"):
            raise DataError(
                f"{self.source.path}, line 1: not readable: it starts like UTF-16; "
                + self.source.cure("name the encoding", "encoding: utf-16", "save it as UTF-8")
            )
        if begin.startswith(codecs.BOM_UTF8) and self.layout.encoding is None:
            self.encoding = "utf-8"  # overrides the suffix's default
        header: Sequence[str] = self.layout.columns or ()
        first = self.first_row()
        if len(first) == 1 and _ID_LINE.fullmatch(first[0].strip()):
            raise DataError(self._id_above_rows(first[0].strip()))
        if not header:
            header = first
        elif not self.libsvm:
            self._check_first_row(header, first)
        if header and NO_TEXT not in "".join(header):  # otherwise the reader reports where
            self.locate(header)

    def _check_first_row(self, names: Sequence[str], cells: Sequence[str]) -> None:
        """Refuses a header line if the configuration names the columns."""
        first = dict(zip(names, cells, strict=False))
        wanted = [c.name for c in self.columns if c.name in first]
        same = [name for name in wanted if first[name].strip().casefold() == name.casefold()]
        if same and same == wanted:
            raise DataError(
                f"{self.source.path}: its first line is a header, {short(','.join(first.values()))}"
                f", although data.files names its columns; leave columns out there"
            )
        if cells and cells[0].startswith("#"):
            log.warning(
                "%s: its first line looks like a comment, %s, and is read as a row; if it is one, "
                "%s",
                self.source.path,
                short(self.delimiter.join(cells)),
                self._without_comments,
            )
        if same:
            log.warning(
                "%s: its first line looks like a header, %s, and is read as a row, since its "
                "columns are named in data.files",
                self.source.path,
                short(",".join(first.values())),
            )

    # -- diagnosis: the file is reread only to locate errors ------------------------

    def first_row(self) -> Sequence[str]:
        """The cells of the first non-blank line; empty if none can be read."""
        with suppress(csv.Error, *self.source.failures):
            for _, _, cells in self._parse():
                return cells
        return ()

    def _parse(self) -> Iterator[tuple[int, int, Sequence[str]]]:
        """(row below the header, its first line, cells) of every non-blank row."""
        text = io.TextIOWrapper(
            io.BufferedReader(TextStream(self.source.stream(), self.encoding, replace=True)),
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
        reader = csv.reader(text, delimiter=self.delimiter, escapechar=self.layout.escape)
        while True:
            line = reader.line_num + 1
            values = next(reader, None)
            if values is None:
                return
            if values:
                yield row, line, values
                row += 1

    def _cells(self, line: str) -> list[str]:
        """Splits a line without quotes like Arrow."""
        parted = line.replace(self.delimiter, _UNIT_SEPARATOR.decode()) if self.wide else line
        mark, escape = _UNIT_SEPARATOR.decode() if self.wide else self.delimiter, self.layout.escape
        if escape is None:
            return parted.split(mark)
        rows = csv.reader([parted], delimiter=mark, escapechar=escape, quoting=csv.QUOTE_NONE)
        return next(rows, [])

    def where(self, row: int) -> str:
        """The first line of a row."""
        with suppress(csv.Error, *self.source.failures):
            for number, line, _ in self._parse():
                if number == row:
                    return f"line {line}"
        return super().where(row)

    def _ragged_error(self, expected: int, text: str) -> str:
        where, n = "a row", len(self._cells(text))
        with suppress(csv.Error, *self.source.failures):
            for _, line, cells in self._parse():
                if len(cells) != expected:
                    where, n, text = f"line {line}", len(cells), self.delimiter.join(cells)
                    break
        start = f"{self.source.path}, {where}: {plural(n, 'cell')} instead of {expected}: "
        if every := self._cells_of_every_row(expected):
            return start + every
        if text.lstrip().startswith("#"):
            return f"{start}{short(text)}, a comment; {self._without_comments}{self.source.or_skip}"
        return f"{start}{short(text)}; fix the row{self.source.or_skip}"

    def _cells_of_every_row(self, expected: int) -> str | None:
        """Advice if no row has as many cells as the header."""
        rows: list[Sequence[str]] = []
        with suppress(csv.Error, *self.source.failures):
            rows = [cells for row, _, cells in islice(self._parse(), 100) if row >= 0]
        lengths = {len(cells) for cells in rows}
        if len(rows) < 2 or len(lengths) > 1 or lengths == {expected}:
            return None
        n = lengths.pop()
        for mark, written in _DELIMITERS.items():
            if n == 1 < expected and {1 + cells[0].count(mark) for cells in rows} == {expected}:
                cure = self.source.cure("name it", f"delimiter: {written}", f"save it with {mark}")
                return f"its cells seem to be separated by {mark!r}: {cure}"
        where = "data.files names" if self.layout.columns else "the header line names"
        if n == expected + 1 and all(not cells[-1] for cells in rows):
            mark = self.delimiter if self.delimiter in ",;|" else re.escape(self.delimiter)
            without = self._filter_command(shlex.join(["sed", f"s/{mark}$//"]))
            return (
                f"every row ends with a delimiter, and {where} {expected}; write it without: "
                f"{without}"
            )
        return f"so has every row, and {where} {plural(expected, 'column')}; name all {n}"

    @property
    def _without_comments(self) -> str:
        """Advice on removing lines that begin with #."""
        return "write it without comments: " + self._filter_command("grep -v '^#'")

    def _id_above_rows(self, line: str) -> str:
        rows = """awk '/:$/ {sub(":", ""); id = $0; next} {print id "," $0}'"""
        return (
            f"{self.source.path}, line 1: {line!r} stands above the rows of an item, as in "
            f"Netflix's files; write it into each row: {self._filter_command(rows)}, and name that "
            f"file and its columns, the item's first"
        )

    def _filter_command(self, command: str) -> str:
        """A shell command that filters the file into NAME-rows.SUFFIX."""
        name = Path(self.source.path).name
        stem, *suffixes = name.split(".")
        kept = [s for s in suffixes if f".{s.lower()}" not in PACKED]
        target = shlex.quote(".".join([f"{stem}-rows", *kept]))
        return f"{self.source.unpack_command} {shlex.quote(name)} | {command} > {target}"

    def _quote_error(self, error: QuoteError) -> DataError:
        what = (
            "text follows the closing quote of a cell"
            if error.is_closed
            else "a cell begins with a quote that is not closed"
        )
        cure = self._quotes_are_text
        if self.layout.escape is None and b'\\"' in self._text_at(error.offset):
            meant = 'where \\" is a quote in a cell, say so'
            cure = self.source.cure(meant, r"escape: '\'", 'write "" instead of \\"')
        return DataError(
            f"{self.source.path}, line {self._line_at(error.offset)}: {what}; fix it, or {cure}"
        )

    def _text_at(self, offset: int) -> bytes:
        """Up to 4096 bytes of the text from an offset on."""
        stream = self._utf_8()
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            offset -= len(block)
        text: bytes = stream.read(1 << 12)
        return text

    @property
    def _quotes_are_text(self) -> str:
        what = "where quotes are text, say so"
        return self.source.cure(what, "quoted: false", "write the file without quotes")

    def _too_long(self) -> DataError:
        """Why a row is too long for Arrow: a stray quote, if there is one."""
        if self.quoted:
            stream = self._utf_8(Quotes(self.delimiter, self.layout.escape))
            try:
                while stream.read(1 << 20):
                    pass
            except QuoteError as error:
                return self._quote_error(error)
        return DataError(
            f"{self.source.path}: not readable: a row has more than {BLOCK_BYTES:,} bytes"
        )

    def _line_at(self, offset: int) -> int:
        """The line at this byte offset, counted from 1."""
        line, before = 1, b""
        stream = self._utf_8()
        while offset > 0 and (block := stream.read(min(offset, 1 << 20))):
            ends = block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            line += ends - (before == b"\r" and block[:1] == b"\n")
            offset, before = offset - len(block), block[-1:]
        return line

    def _unreadable(self, error: Exception) -> str:
        if isinstance(error, UnicodeError) or "UTF8" in str(error):
            with (
                suppress(*self.source.failures),
                io.BufferedReader(_Raw(self.source.stream())) as lines,
            ):
                for number, line in enumerate(lines, start=1):
                    try:
                        line.decode(self.encoding)
                    except UnicodeError:
                        return (
                            f"{self.source.path}, line {number}: not readable: {short(line)} is "
                            f"not {self.encoding.upper()} text, but perhaps latin-1 or gbk; "
                            + self.source.cure(
                                "name the encoding", "encoding: latin-1", "save it as UTF-8"
                            )
                        )
        return self.source.unreadable(error)


class _Raw(io.RawIOBase):
    """Adapts an Arrow stream to Python's io."""

    def __init__(self, stream: Any) -> None:
        self._of_arrow = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._of_arrow.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _half(cells: pa.Array, which: int) -> pa.Array:
    """One half of libsvm's ``index:value``; cells without a colon are unchanged."""
    pattern = (r":.*$", r"^[^:]*:")[which]
    return pc.replace_substring_regex(cells, pattern, "")
