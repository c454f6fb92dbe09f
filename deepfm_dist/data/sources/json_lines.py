"""JSON lines: one object per line; errors name the line."""

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.cells import Column
from deepfm_dist.data.sources.nested import (
    NestedError,
    json_decoder,
    json_text,
    python_literal,
    text_of,
)
from deepfm_dist.data.sources.reader import Reader
from deepfm_dist.data.sources.source import BLOCK_BYTES, EmptyFile, Source
from deepfm_dist.data.sources.text_stream import NO_TEXT, TextStream
from deepfm_dist.errors import DataError
from deepfm_dist.messages import brief, short

_Objects = list[dict[str, Any]]
_FROM_PYTHON = (
    'python -c "import ast, json, sys; '
    '[print(json.dumps(ast.literal_eval(line))) for line in sys.stdin]"'
)


class JsonLinesReader(Reader):
    """Reads one object per line, or one array of objects, which must fit into memory.

    Every value becomes text: numbers without a fraction as integers, lists and objects as JSON;
    null and missing members become null.
    """

    takes = frozenset({"encoding", "decimal", "thousands", "optional"})

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields the requested members as text."""
        seen: dict[str, None] = {}
        names: list[str] = []
        row = 0
        for objects in self._blocks():
            if not names or not seen.keys() >= set(names):
                for value in objects:
                    seen |= dict.fromkeys(value)
            if not names:
                # An optional member may first appear in a later block.
                optional = [c.name.split(".")[0] for c in self.columns if not c.required]
                known = {*seen, *self.source.partitions}
                self.locate([*seen, *(n for n in optional if n not in known)])
                names = self.names
            yield pa.RecordBatch.from_arrays(
                [self._texts(name, [o.get(name) for o in objects], row) for name in names],
                names=names,
            )
            row += len(objects)
        if names:
            self.locate([*seen])

    def present(self) -> Sequence[str]:
        """The members of the first objects."""
        return list(dict.fromkeys(name for value in next(self._blocks()) for name in value))

    def where(self, row: int) -> str:
        """The line of an object, or its index if the file is one array."""
        if not self._is_array():
            with suppress(*self.source.failures):
                for number, (line, _) in enumerate(self._lines()):
                    if number == row:
                        return f"line {line}"
        return f"object {row + 1}"

    def _texts(self, name: str, values: list[Any], first_row: int) -> pa.Array:
        """Values of a member as text."""
        columns = [c for c in self.columns if self.places[c.name].column == name]
        nested = all(c.type in ("texts", "vector") or self.places[c.name].path for c in columns)
        is_text = any(c.type in ("text", "texts") for c in columns)
        texts = [v if type(v) is str else text_of(v, is_text) for v in values]
        for at in [at for at, value in enumerate(values) if type(value) in (list, dict)]:
            if not nested and self.dropped is None:
                raise self._nested_error(name, values[at], first_row + at)
            texts[at] = json_text(values[at]) if nested else NO_TEXT
        try:
            return pa.array(texts, pa.string())
        except UnicodeEncodeError:  # half of a surrogate pair, from truncated text
            whole = [t and t.encode("utf-8", "replace").decode() for t in texts]
            return pa.array(whole, pa.string())

    def _nested_error(self, name: str, value: list[Any] | dict[str, Any], row: int) -> DataError:
        what, cure = "a list", "set several: true for its field"
        if isinstance(value, dict) and len(value) > 1 and all(map(str.isdigit, value)):
            what = "an object, which pandas' to_json writes for a column"
            cure = "write rows: to_json(..., orient='records', lines=True)"
        elif isinstance(value, dict):
            what = "an object"
            cure = f"name a member of it: column: {name}.{next(iter(value), 'MEMBER')}"
        return DataError(
            f"{self.source.path}, {self.where(row)}: {name} {short(json_text(value))} is {what} "
            f"where one value is expected; {cure}"
        )

    # -- lines ------------------------------------------------------------------------------------

    def _text(self) -> io.BufferedReader:
        encoding = self.layout.encoding or "utf-8-sig"
        return io.BufferedReader(
            TextStream(self.source.stream(), encoding, replace=self.dropped is not None)
        )

    def _is_array(self) -> bool:
        with suppress(*self.source.failures), self._text() as text:
            return text.read(1 << 12).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        return False

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and text of every non-blank line."""
        with self._text() as text:
            for number, line in enumerate(text, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line := line.strip():
                    yield number, line

    def _blocks(self) -> Iterator[_Objects]:
        """Objects of about `BLOCK_BYTES` of text."""
        decoder = self._decoder()
        try:
            if self._is_array():
                yield self._array()
                return
            objects: _Objects = []
            n_bytes = n_read = 0
            wrong: DataError | None = None
            for number, line in self._lines():
                n_read += 1
                try:
                    value = decoder.decode(line.decode())
                    if type(value) is not dict:
                        raise ValueError("not an object")
                    objects.append(value)
                except (ValueError, RecursionError) as error:
                    wrong = wrong or self._bad_line(number, line, error)
                    if self.dropped is None:
                        raise wrong from None
                    self.dropped[f"{self.source.name}: lines that are not JSON objects"] += 1
                n_bytes += len(line)
                if n_bytes >= BLOCK_BYTES:
                    if wrong is not None and not objects:
                        raise wrong
                    yield objects
                    objects, n_bytes = [], 0
            if wrong is not None and not objects:
                raise wrong
            if n_read == 0:
                raise EmptyFile(f"{self.source.path}: the file is empty")
            yield objects
        except DataError:
            raise
        except self.source.failures as error:
            raise DataError(self.source.unreadable(error)) from None

    def _decoder(self) -> json.JSONDecoder:
        """Refuses objects with duplicate requested members."""
        names = [column.name for column in self.columns]
        return json_decoder(*names, *(part for name in names for part in name.split(".")))

    def _array(self) -> _Objects:
        with self._text() as text:
            try:
                array = self._decoder().decode(text.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{self.source.path}: not readable as a JSON array: {brief(error)}"
                ) from None
        for number, value in enumerate(array, start=1):
            if not isinstance(value, dict):
                raise DataError(
                    f"{self.source.path}: element {number} of the array, {short(value)}, is not an "
                    f"object; write one object for each row"
                )
        if not array:
            raise EmptyFile(f"{self.source.path}: the array is empty")
        return array

    def _bad_line(self, number: int, line: bytes, error: Exception) -> DataError:
        path, text = self.source.path, line.decode(errors="replace")
        if isinstance(error, NestedError):
            return DataError(
                f"{path}, line {number}: {short(text)} {error}; fix the row{self.source.or_skip}"
            )
        if isinstance(error, UnicodeError):
            encoding = "utf-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"
            return DataError(
                f"{path}, line {number}: not readable: {short(line)} is not UTF-8 text; "
                + self.source.cure("name the encoding", f"encoding: {encoding}", "save it as UTF-8")
            )
        unpack, quoted = self.source.unpack_command, shlex.quote(path)
        target = shlex.quote(f"{Path(path).name.split('.')[0]}-rows.jsonl")
        if isinstance(python_literal(text), dict):
            return DataError(
                f"{path}, line {number}: a Python literal rather than JSON; convert the file: "
                f"{unpack} {quoted} | {_FROM_PYTHON} > {target}"
            )
        if text.endswith("},") and _is_object(text[:-1]):
            return DataError(
                f"{path}, line {number}: a comma after an object; write the file without: "
                f"{unpack} {quoted} | sed 's/,$//' > {target}"
            )
        if text == "{":
            return DataError(
                f"{path}, line {number}: the object is not on one line; write each on a line of "
                f"its own: {unpack} {quoted} | jq -c . > {target}"
            )
        return DataError(
            f"{path}, line {number}: {short(text)} is not a JSON object ({brief(error)}); a file "
            f"called {self.source.suffix} has one in each line; fix the row{self.source.or_skip}"
        )


class ObjectReader(JsonLinesReader):
    """Reads objects in memory as if they were the lines of a file.

    Args:
        source: their name in error messages.
        columns: the columns to read.
        objects: JSON values by member, one object per row.
    """

    def __init__(
        self, source: Source, columns: Sequence[Column], objects: Sequence[dict[str, Any]]
    ) -> None:
        super().__init__(source, columns, FileFormat(), None)
        self._objects = [*objects]

    def where(self, row: int) -> str:
        """The number of an object, from 1."""
        return f"row {row + 1}"

    def _nested_error(self, name: str, value: list[Any] | dict[str, Any], row: int) -> DataError:
        what = "a list" if isinstance(value, list) else "an object"
        return DataError(
            f"{self.source.path}, {self.where(row)}: {name} {short(json_text(value))} is {what}; "
            f"give one value"
        )

    def _blocks(self) -> Iterator[_Objects]:
        yield self._objects


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
