"""Converts a file's cells to the requested types."""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources.nested import (
    NestedError,
    as_lists,
    is_list,
    is_text,
    plain,
    texts_of,
)
from deepfm_dist.data.sources.source import Source
from deepfm_dist.data.sources.text_stream import NO_TEXT
from deepfm_dist.data.times import TIME, cure_for, formats_of, guess_formats, read_times
from deepfm_dist.errors import DataError
from deepfm_dist.messages import short

log = logging.getLogger(__name__)

_TYPES = {
    "text": pa.string(),
    "texts": pa.list_(pa.string()),
    "number": pa.float64(),
    "weight": pa.float32(),
    "time": TIME,
    "label": pa.int8(),
    "split": pa.int8(),
    "vector": pa.list_(pa.float32()),
}
_WANTED = {
    "text": "text",
    "texts": "text",
    "number": "a number",
    "weight": "a weight: a number above 0 is expected",
    "time": "a time",
    "label": "a label: 0, 1, true or false is expected",
    "split": "a split: 0, 1, 2 or train, valid, test is expected",
    "vector": "a vector of numbers",
}
_LARGE_FLOATS = {pa.float64(): 2.0**53, pa.float32(): 2.0**24, pa.float16(): 2.0**11}
"""Floats from here on represent several integers."""
_TRUTH = {"false": 0.0, "true": 1.0}
_DECIMAL_COMMA = r"^(\s*[-+]?\d*),(\d*(?:[eE][-+]?\d+)?\s*)$"
_HAS_POINT = "\N{NO-BREAK SPACE}(a point)"
"""Marks numbers with a point if the decimal separator is a comma."""
_GROUP_MARKS = {",": ",", ".": r"\.", "'": "['\u2019]", " ": "[ \u00a0\u202f]"}
"""Regular expressions of thousands separators by `FileFormat.thousands`."""
_SPLIT_NAMES = pa.array(["0", "1", "2", "train", "valid", "test"])

ColumnType = Literal["text", "texts", "number", "weight", "time", "label", "split", "vector"]


@dataclass(frozen=True)
class Check:
    """A check of a column's cells, in addition to their type.

    Attributes:
        wrong: ``[n]`` string -> ``[n]`` bool: invalid cells; an empty cell is valid.
        wanted: description of valid cells, to follow "is not".
        setting: name of the time format setting, if the cells are times.
        formats: values of that setting.
        cure: first advice about an invalid cell.
    """

    wrong: Callable[[pa.Array], npt.NDArray[np.bool_]]
    wanted: str
    setting: str | None = None
    formats: tuple[str, ...] = ()
    cure: str | None = None


@dataclass(frozen=True)
class _Fault:
    """Invalid cells of a batch: a `Check`, applied.

    Attributes:
        wrong: ``[n]`` bool.
    """

    wrong: npt.NDArray[np.bool_]
    wanted: str
    setting: str | None = None
    formats: tuple[str, ...] = ()
    cure: str | None = None


@dataclass(frozen=True)
class Column:
    """A column to read.

    Attributes:
        name: its name in the file.
        type: text -> string; texts -> list of string; number -> float64; weight -> float32 above
            0; time -> `times.TIME`; label -> int8 0 or 1; split -> int8 0, 1 or 2 (train, valid,
            test); vector -> list of float32, null where it is empty.
        required: whether an empty cell makes the row invalid; otherwise it becomes null.
        missing: words that count as empty.
        checks: further checks.
        separator: for texts and vectors, between the values of a cell that is not a list.
        formats: the formats of times, see `times.read_times`.
        derived_from: type of its text for values derived from numbers or times, which use the
            separators of `FileFormat`; None: words.
        purpose: distinguishes several uses of one column; names its values. Default: ``name``.
    """

    name: str
    type: ColumnType = "text"
    required: bool = True
    missing: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    separator: str | None = None
    formats: tuple[str, ...] = ()
    derived_from: Literal["number", "time"] | None = None
    purpose: str = ""

    @property
    def key(self) -> str:
        """The name of its values."""
        return self.purpose or self.name

    @property
    def arrow_type(self) -> pa.DataType:
        """The Arrow type of its values."""
        return _TYPES[self.type]


class CellTyper:
    """Converts cells to the requested types; refuses or drops rows with invalid cells.

    Args:
        source: the file.
        columns: the columns to read.
        dropped: counts of dropped rows by reason; updated.
        skip_bad: whether to drop rows with an invalid cell; otherwise they are errors.
        where: returns the place of a row in the file, for messages.
        cells_of: returns a column's cells in a batch of the file.
    """

    def __init__(
        self,
        source: Source,
        columns: Sequence[Column],
        dropped: Counter[str],
        skip_bad: bool,
        where: Callable[[int], str],
        cells_of: Callable[[pa.RecordBatch, Column], pa.Array],
    ) -> None:
        self._source, self._columns, self._dropped = source, columns, dropped
        self._skip_bad, self._where, self._cells_of = skip_bad, where, cells_of
        self._warned = False
        self._time_formats: dict[str, tuple[str, ...]] = {}  # by column, of the first batch
        self._with_large_floats: set[str] = set()

    def typed(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        """The valid rows, typed as in `Column`.

        Args:
            batch: the requested columns, with the file's types.
            first_row: number of rows before it in the file.

        Raises:
            DataError: a cell or column cannot be converted.
        """
        arrays, headers = [], _header_rows(batch)
        if headers.any():
            self._refuse_headers(headers, first_row)
        bad = headers.copy()
        for column in self._columns:
            cells, values = self._converted(column, batch)
            unreadable = pc.and_(pc.is_null(values), pc.is_valid(cells))
            if column.required:
                unreadable = pc.is_null(values)
                if column.type == "text":
                    unreadable = pc.or_kleene(unreadable, pc.equal(values, ""))
            if self._skip_bad and column.type in ("text", "texts") and is_text(cells.type):
                no_text = pc.match_substring(cells, NO_TEXT)
                unreadable = pc.or_kleene(unreadable, no_text.fill_null(False))
            faults = [
                _Fault(c.wrong(values), c.wanted, c.setting, c.formats, c.cure)
                for c in column.checks
            ]
            if pc.any(unreadable, min_count=0).as_py() is not False:
                wrong = np.asarray(unreadable.fill_null(True))
                setting = "data.interactions.time_format" if column.type == "time" else None
                faults.append(_Fault(wrong, _WANTED[column.type], setting, column.formats))
            for fault in faults:
                fault.wrong[headers] = False
                if fault.wrong.any():
                    self._refuse(column, fault, cells, values, first_row)
                bad |= fault.wrong
            if column.type == "time" and column.key not in self._time_formats:
                self._time_formats[column.key] = column.formats or formats_of(values)
            arrays.append(values)
        typed = pa.RecordBatch.from_arrays(arrays, names=[c.key for c in self._columns])
        if n_unreadable := int(bad.sum() - headers.sum()):
            self._dropped[f"{self._source.name}: rows with an unreadable cell"] += n_unreadable
        if bad.any():
            typed = typed.filter(pa.array(~bad))
        return typed

    def _number_cure(self, column: Column, cell: str) -> str:
        """Advice about a cell that is not a number, ending with "or"; may be empty."""
        cures = []
        if re.match(_DECIMAL_COMMA, cell):
            meant = "where the comma is a decimal point, say so"
            cures.append(self._source.cure(meant, 'decimal: ","', "write points"))
        for mark, pattern in _GROUP_MARKS.items():
            if re.fullmatch(rf"\s*[-+]?\d{{1,3}}(?:{pattern}\d{{3}})+(?:[.,]\d*)?\s*", cell):
                meant = f"where {mark!r} separates thousands, say so"
                cures.append(self._source.cure(meant, f'thousands: "{mark}"', "write none"))
        if not (cures or column.required or re.search(r"\d", cell)):
            word = json.dumps(cell, ensure_ascii=False)
            how = f"set missing: [{word}] for its field"
            how = how if self._source.is_prepared else "leave the cell empty"
            cures.append(f"where it means no value, {how}")
        return "".join(f"{cure}, or " for cure in cures)

    def _refuse_headers(self, headers: npt.NDArray[np.bool_], first_row: int) -> None:
        """Refuses rows that repeat the header, or counts them if bad rows are dropped."""
        if not self._skip_bad:
            where = self._where(first_row + int(headers.argmax()))
            raise DataError(
                f"{self._source.path}, {where}: a repeated header line, as in concatenated "
                f"files; remove it{self._source.or_skip}"
            )
        self._dropped[f"{self._source.name}: rows that repeat the header"] += int(headers.sum())

    def _converted(self, column: Column, batch: pa.RecordBatch) -> tuple[pa.Array, pa.Array]:
        """A column's cells, null if empty, and their converted values."""
        start = f"{self._source.path}: column {column.name!r}"
        try:
            cells = without(plain(self._cells_of(batch, column)), column.missing)
            if column.type in ("text", "texts") and pa.types.is_floating(cells.type):
                self._warn_of_large_floats(column, cells)
            if column.type == "texts":
                return cells, as_lists(cells, column.separator)
            if column.type == "time":
                return cells, read_times(cells, column.formats)
            if column.type == "vector":
                vectors = vectors_of(cells, column.separator)
                return pc.if_else(vectors.is_null(), None, cells), vectors
            if column.type == "text" and not pa.types.is_binary(cells.type):
                cells = texts_of(cells)
            return cells, _convert(cells, column.type)
        except NestedError as error:
            cure = _nested_cure(column, error, self._source.is_prepared)
            raise DataError(f"{start} {error}{cure}") from None
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(
                f"{start} holds {cells.type} and cannot be read as {column.type}"
            ) from None

    def _warn_of_large_floats(self, column: Column, cells: pa.Array) -> None:
        """Warns, once per column, about ids that are floats too large to be exact integers."""
        if column.name in self._with_large_floats:
            return
        sizes = pc.abs(cells.cast(pa.float64()))
        large = cells.filter(pc.greater_equal(sizes, _LARGE_FLOATS[cells.type]))
        large = texts_of(large).drop_null()
        if len(large):
            self._with_large_floats.add(column.name)
            log.warning(
                "%s: the column %r holds ids as %s, such as %s, each of which stands for several "
                "integers: ids that were different may have become one; write them as integers or "
                "text",
                self._source.path,
                column.name,
                cells.type,
                large[0],
            )

    def _time_cure(
        self, column: Column, fault: _Fault, cells: pa.Array, values: pa.Array
    ) -> str | None:
        """Advice on a time format that reads all cells."""

        def texts(which: npt.NDArray[np.bool_]) -> list[str]:
            some = cells.filter(pa.array(which)).drop_null().slice(0, 1000)
            return [text for text in map(str, some.unique().to_pylist()) if text]

        if fault.setting is None:
            return None
        bad, good = texts(fault.wrong), texts(~fault.wrong)
        if not bad:
            return None
        if guess_formats(*bad, *good):  # one format for all
            return cure_for([*bad, *good], fault.setting)
        known = self._time_formats.get(column.key, ())
        if column.type == "time" and not fault.formats:
            known = known or formats_of(values)
        elif good or known:
            known = fault.formats
        return cure_for(bad, fault.setting, known)

    def _refuse(
        self, column: Column, fault: _Fault, cells: pa.Array, values: pa.Array, first_row: int
    ) -> None:
        """Raises an error about the first bad cell, or warns about the first one of a file."""
        if self._skip_bad and self._warned:
            return
        row = int(fault.wrong.argmax())
        wanted, setting, cell = fault.wanted, fault.setting, cells[row].as_py()
        what = "is empty" if cell in (None, "") else f"is not {wanted}"
        if wanted == _WANTED["number"] and _is_too_large(str(cell)):
            what = "is too large a number: float32 ends at 3.4e38"
        if isinstance(cell, str) and cell.endswith(_HAS_POINT):
            cell = cell.removesuffix(_HAS_POINT)
            what += ": it has a point, and decimal is a comma"
        shown = short("" if cell is None else cell)
        if column.type == "vector" and isinstance(cell, list):
            shown = _shown_vector(cell)
        cure = None if what == "is empty" else self._time_cure(column, fault, cells, values)
        path, where, name = self._source.path, self._where(first_row + row), column.name
        if self._skip_bad:
            self._warned = True
            hint = f"; if all are written so, {cure}" if cure else ""
            log.warning("%s, %s: %s %s %s: dropped%s", path, where, name, shown, what, hint)
            return
        if cure is not None:
            if not self._source.is_prepared:
                cure = "write times as in the training data"
            raise DataError(f"{path}, {where}: {name} {shown} {what}; {cure}")
        if column.type == "label" and what != "is empty":
            skip = f",{self._source.or_skip}, which drops such rows" if self._source.or_skip else ""
            raise DataError(
                f"{path}, {where}: {name} {shown} {what}; write 0 or 1 in its place{skip}"
            )
        is_unknown = setting and self._source.is_prepared and what != "is empty"
        also = f", or set {setting} to how times are written" if is_unknown else ""
        first = f"{fault.cure}, or " if fault.cure else ""
        if (column.derived_from or column.type) in ("number", "time") and cell is not None:
            first = self._number_cure(column, str(cell)) or first
        raise DataError(
            f"{path}, {where}: {name} {shown} {what}; "
            f"{first}fix the row{self._source.or_skip}{also}"
        )


def _nested_cure(column: Column, error: NestedError, is_prepared: bool) -> str:
    """Advice about unexpectedly nested cells; may be empty."""
    if error.is_list:
        field = column.purpose.removeprefix("field ")
        if field != column.purpose and is_prepared:
            return f"; set several: true for the field {field}"
        return "; write a row for each, as pandas' explode does"
    names = " or ".join(f"{column.name}.{member}" for member in error.members[:9])
    return f"; name the member that is wanted: {names}" if names else ""


def _header_rows(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: rows that repeat the column names."""
    is_header = np.zeros(batch.num_rows, bool)
    for number, name in enumerate(batch.schema.names):
        cells = plain(batch.column(number))
        if not is_text(cells.type):
            return np.zeros(batch.num_rows, bool)
        names = pa.array([name, f"\ufeff{name}"], cells.type)  # possibly with a byte-order mark
        is_name = np.asarray(pc.is_in(cells, value_set=names)).astype(bool)
        is_header = is_name if number == 0 else is_header & is_name
        if not is_header.any():
            break
    return is_header


def plain_numbers(cells: pa.Array, kind: ColumnType, layout: FileFormat) -> pa.Array:
    """Normalises numbers in text: decimal points, no thousands separators.

    If the decimal separator is a comma, numbers with a point become invalid.
    """
    if kind in ("text", "texts", "vector") or not is_text(cells.type):
        return cells
    if layout.thousands is not None:
        mark = _GROUP_MARKS[layout.thousands]
        rest = rf"(?:{re.escape(layout.decimal)}\d*)?\s*$"
        grouped = pc.match_substring_regex(cells, rf"^\s*[-+]?\d{{1,3}}(?:{mark}\d{{3}})+{rest}")
        cells = pc.if_else(grouped, pc.replace_substring_regex(cells, mark, ""), cells)
    if layout.decimal == ".":
        return cells
    points = pc.replace_substring_regex(cells, _DECIMAL_COMMA, r"\1.\2")
    if kind == "time":  # timestamps have points
        return points
    strange = pc.match_substring(cells, ".")
    return pc.if_else(strange, pc.binary_join_element_wise(cells, _HAS_POINT, ""), points)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def without(cells: pa.Array, words: tuple[str, ...]) -> pa.Array:
    """Cells with words for "missing", or the equivalent numbers, replaced by null."""
    if not words:
        return cells
    if is_text(cells.type):
        is_missing = pc.is_in(pc.utf8_trim_whitespace(cells), value_set=pa.array(words, cells.type))
        return pc.if_else(is_missing, None, cells)
    if not _is_number(cells.type):
        return cells
    numbers = [n for n in map(_float_or_none, words) if n is not None]
    exact = cells.cast(pa.float64(), safe=False)
    is_missing = pc.is_in(exact, value_set=pa.array(numbers, pa.float64()))
    if any(map(math.isnan, numbers)):
        is_missing = pc.or_(is_missing, pc.is_nan(exact).fill_null(False))
    return pc.if_else(is_missing, None, cells)


def vectors_of(cells: pa.Array, separator: str | None = None) -> pa.ListArray:
    """Lists of numbers, or texts such as ``[0.1, 0.2]`` -> lists of float32.

    Args:
        cells: ``[n]`` lists or texts.
        separator: the separator of a text without brackets.

    Returns:
        ``[n]`` list of float32: null for a null cell or empty list; invalid elements are null.

    Raises:
        NestedError: the cells are neither lists nor texts.
    """
    if not is_list(cells.type) and not is_text(cells.type) and not pa.types.is_null(cells.type):
        raise NestedError(f"holds {cells.type} where vectors are expected: lists of numbers")
    if is_text(cells.type):
        cells = pc.if_else(pc.equal(pc.utf8_trim_whitespace(cells), ""), None, cells)
    if is_list(cells.type) and _is_number(cells.type.value_type):
        lists, flat = cells, pc.list_flatten(cells)
    else:
        lists = as_lists(cells, separator)
        flat = _numbers(lists.flatten(), {})
    lengths = np.asarray(pc.list_value_length(lists).fill_null(0), np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    numbers = flat.cast(pa.float32(), safe=False)
    return pa.ListArray.from_arrays(offsets, numbers, mask=pa.array(lengths == 0))


def _shown_vector(cell: list[object]) -> str:
    """A vector for a message: its beginning, length and first invalid element."""
    numbers = [_float_or_none(str(x)) if x is not None else None for x in cell]
    finite = [x is not None and abs(x) <= float(np.finfo(np.float32).max) for x in numbers]
    first = ", ".join(str(x) for x in cell[:3]) + (", ..." if len(cell) > 3 else "")
    what = f"{len(cell)} numbers"
    if not all(finite):
        place = finite.index(False)
        what += f", number {place + 1} is {cell[place]}"
    return f"[{first}] ({what})"


def _convert(cells: pa.Array, kind: str) -> pa.Array:
    """Converts cells to the column's type; unreadable ones become null."""
    if kind == "text":
        try:
            return cells.cast(pa.string())
        except pa.ArrowInvalid:  # bytes that are not all valid UTF-8
            return pa.array([_text_or_none(c) for c in cells.to_pylist()], pa.string())
    if kind == "split":
        place = pc.index_in(pc.utf8_trim_whitespace(cells.cast(pa.string())), _SPLIT_NAMES)
        return pc.if_else(pc.greater_equal(place, 3), pc.subtract(place, 3), place).cast(pa.int8())
    if is_text(cells.type):
        cells = _numbers(cells, _TRUTH if kind in ("label", "number") else {})
    cells = cells.cast(pa.float64(), safe=False)
    # NaN and infinity, in float32, cannot be learned from.
    cells = pc.if_else(pc.is_finite(cells.cast(pa.float32(), safe=False)), cells, None)
    if kind == "weight":
        cells = cells.cast(pa.float32(), safe=False)
        return pc.if_else(pc.greater(cells, 0), cells, None)
    if kind == "label":
        binary = pc.is_in(cells, pa.array([0.0, 1.0]))
        return pc.if_else(binary, cells, None).cast(pa.int8())
    return cells


def _numbers(cells: pa.Array, words: Mapping[str, float]) -> pa.Array:
    """Text -> float64, null if it is neither a number nor one of some words."""
    cells = pc.utf8_trim_whitespace(cells)
    try:
        return cells.cast(pa.float64())
    except pa.ArrowInvalid:
        distinct = cells.dictionary_encode()
        texts = distinct.dictionary.to_pylist()
        numbers = [words.get(t.lower(), _float_or_none(t)) for t in texts]
        return pa.array(numbers, pa.float64()).take(distinct.indices)


def _float_or_none(text: str | None) -> float | None:
    """Parses a number; unlike Python, refuses 1_000 and digits of other scripts."""
    if text is None or not text.isascii() or "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _is_too_large(text: str) -> bool:
    """Whether text rejected by `_convert` is a number that is too large."""
    return _float_or_none(text) is not None and any(digit in text for digit in "0123456789")


def _text_or_none(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None
