"""Nested values: lists, objects and their members, as Arrow types or text."""

import ast
import csv
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LITERAL = r"(?s)\A\s*\[.*\]\s*\z"
_SET = r"""(?s)\A\s*(?:\(\s*['"].*\)|\{\s*['"].*\})\s*\z"""  # or a tuple, of texts
_NUMPY = re.compile(r"""\[\s*(?:'[^']*'|"[^"]*")(?:\s+(?:'[^']*'|"[^"]*"))+\s*\]""")
_ARRAY = r"""(?s)\A\s*\{[^{}:]*\}\s*\z"""  # PostgreSQL arrays: {a,"b c",NULL}
_GUID = re.compile(r"\{[\da-fA-F]{8}-[\da-fA-F-]+\}")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)\"""")
_NUMBERS = re.compile(r"\s*[-+.\deE]+(?:\s+[-+.\deE]+)*\s*")
_SAMPLE = 1000
_TWICE = "holds an object with two members {!r}"
_LISTS_OF_LISTS = "holds lists of lists; write each cell as one list"


class NestedError(ValueError):
    """Cells have unexpected nesting.

    Args:
        message: the problem, to follow the column's name.
        members: the members of the cells' objects, one of which could be used.
        is_list: whether they are lists instead of single values.
    """

    def __init__(self, message: str, members: Iterable[str] = (), is_list: bool = False) -> None:
        super().__init__(message)
        self.members, self.is_list = tuple(members), is_list


def plain(cells: pa.Array) -> pa.Array:
    """Cells without dictionary encoding or view layouts."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    return cells.cast(pa.string()) if pa.types.is_string_view(cells.type) else cells


def is_text(kind: pa.DataType) -> bool:
    """Whether cells of a type are texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether cells of a type are lists."""
    kinds = pa.types
    return (
        kinds.is_list(kind)
        or kinds.is_large_list(kind)
        or kinds.is_fixed_size_list(kind)
        or kinds.is_list_view(kind)
        or kinds.is_large_list_view(kind)
    )


def holds_lists(cells: pa.Array) -> bool:
    """Whether cells are lists: by type, or by at least half of the first texts."""
    cells = plain(cells)
    if not is_text(cells.type):
        return is_list(cells.type)
    cells = cells.drop_null()
    sample = cells.filter(pc.not_equal(cells, "")).slice(0, _SAMPLE)
    return len(sample) > 0 and 2 * len(list_literals(sample)) >= len(sample)


def list_literals(texts: pa.Array) -> pa.Array:
    """The texts that are list, set or tuple literals of Python or JSON."""
    sets = texts.filter(pc.match_substring_regex(texts, _SET))
    sets = sets.filter(
        pa.array([_listed_in(text) is not None for text in sets.to_pylist()], pa.bool_())
    )
    lists = texts.filter(pc.match_substring_regex(texts, _LITERAL))
    arrays = texts.filter(pc.match_substring_regex(texts, _ARRAY))
    arrays = arrays.filter(pc.invert(pc.match_substring_regex(arrays, _GUID.pattern)))
    arrays = arrays.filter(pc.invert(pc.is_in(arrays, value_set=sets)))
    if not pc.any(pc.match_substring(arrays, ","), min_count=0).as_py():
        arrays = arrays[:0]  # {a} is ambiguous
    return pa.concat_arrays([lists, sets, arrays])


def members(cells: pa.Array, path: tuple[str, ...], single: bool = False) -> pa.Array:
    """Members of nested cells: name of ``[{"name": "a"}, {"name": "b"}]`` is ``["a", "b"]``.

    Args:
        cells: ``[n]`` structs, maps or lists of them; or texts that are JSON or Python literals.
        path: names, outermost first.
        single: whether members of texts must be single values.

    Returns:
        ``[n]`` the members; texts if the cells are texts.

    Raises:
        NestedError: the member does not exist or is nested.
    """
    for depth, name in enumerate(path, start=1):
        cells = _member(plain(cells), name, single and depth == len(path))
    return cells


def _member(cells: pa.Array, name: str, single: bool) -> pa.Array:
    kind = cells.type
    if pa.types.is_struct(kind):
        known = [kind.field(i).name for i in range(kind.num_fields)]
        if name not in known:
            raise NestedError(f"has no member {name!r}; its members: {', '.join(known)}")
        _check_once(known, frozenset([name]))
        return pc.struct_field(cells, [name])
    if pa.types.is_map(kind) and is_text(kind.key_type):
        key = pa.scalar(name, kind.key_type)
        values = pc.map_lookup(cells, key, "all")
        if (pc.max(pc.list_value_length(values)).as_py() or 0) > 1:
            raise NestedError(_TWICE.format(name))
        return pc.map_lookup(cells, key, "first")
    if is_list(kind):
        lists = cells.cast(pa.list_(kind.value_type))
        return _as_lists(lists, _member(plain(pc.list_flatten(lists)), name, single))
    if is_text(kind):
        return _map_distinct(cells, partial(_member_of_text, name, single), pa.string())
    raise NestedError(f"holds {kind}, which has no member {name!r}")


def _member_of_text(name: str, single: bool, text: str) -> str | None:
    value = _get(_parsed(text, name), name)
    if single and isinstance(value, dict):
        raise NestedError("holds objects", value)
    if single and isinstance(value, list):
        raise NestedError("holds lists where one value is expected", is_list=True)
    return json_text(value)


def _get(value: Any, name: str) -> Any:
    if value is None or isinstance(value, dict):
        return None if value is None else value.get(name)
    if isinstance(value, list):
        return [_get(element, name) for element in value]
    raise NestedError(f"holds {value!r}, which has no member {name!r}")


def as_lists(cells: pa.Array, separator: str | None = None) -> pa.ListArray:
    """Cells -> lists of texts.

    Elements of lists are kept. Text in square brackets is a list, with or without quotes around its
    elements, and so is a Python set or tuple of texts, and PostgreSQL's ``{a,"b c"}``; other text
    is split at the separator.

    Args:
        cells: ``[n]`` lists or single values.
        separator: between the values of a text; None: do not split.

    Returns:
        ``[n]`` list of string, empty for a null cell.

    Raises:
        NestedError: elements are lists or objects.
    """
    if is_list(cells.type):
        if is_list(cells.type.value_type):
            raise NestedError(_LISTS_OF_LISTS)
        lists = cells.cast(pa.list_(cells.type.value_type))
        return _as_lists(lists, texts_of(pc.list_flatten(lists)))
    texts = texts_of(cells)
    if pc.any(pc.match_substring_regex(texts, f"{_LITERAL}|{_SET}|{_ARRAY}")).as_py():
        return _map_distinct(texts, lambda t: _elements(t, separator), pa.list_(pa.string()))
    if separator is not None:
        return pc.split_pattern(texts, separator)
    offsets = np.concatenate([[0], np.cumsum(np.asarray(texts.is_valid()), dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts.drop_null())


def texts_of(cells: pa.Array) -> pa.Array:
    """Single values -> text.

    Integral floats are written as integers, since pandas turns integers with gaps into floats: 1e10
    is 10000000000, NaN is null. The same holds for decimals: 1.00 is 1.

    Raises:
        NestedError: they are lists or objects.
    """
    cells = plain(cells)
    kind = cells.type
    if pa.types.is_struct(kind):
        known = [kind.field(i).name for i in range(kind.num_fields)]
        raise NestedError("holds objects", known)
    if is_list(kind):
        raise NestedError("holds lists where one value is expected", is_list=True)
    if pa.types.is_decimal(kind):
        texts = [None if c is None else f"{c:f}" for c in cells.to_pylist()]
        whole = [t if t is None or "." not in t else t.rstrip("0").rstrip(".") for t in texts]
        return pa.array(whole, pa.string())
    if pa.types.is_floating(kind):
        exact = cells.cast(pa.float64())
        finite = pc.is_finite(exact)
        integral = pc.and_(finite, pc.less(pc.abs(exact), 2.0**63))
        integral = pc.and_(integral, pc.equal(pc.trunc(exact), exact))
        digits = pc.if_else(integral, exact, None).cast(pa.int64()).cast(pa.string())
        return pc.if_else(integral, digits, pc.if_else(finite, cells, None).cast(pa.string()))
    return cells.cast(pa.string())


def text_of(value: Any, gaps_are_null: bool = True) -> str | None:
    """A Python value as text, like `texts_of`.

    Args:
        value: None, a bool, a number or a text.
        gaps_are_null: whether NaN and infinity are null; otherwise their names are used.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return None if gaps_are_null else str(value)
        return str(int(value)) if value.is_integer() and abs(value) < 2.0**63 else repr(value)
    return None if value is None else str(value)


def json_text(value: Any) -> str | None:
    """A Python value as text: lists and objects as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return text_of(value)


def _as_lists(lists: pa.Array, elements: pa.Array) -> pa.ListArray:
    """A list array with its flattened elements replaced."""
    lengths = np.asarray(pc.list_value_length(lists).fill_null(0))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), elements)


def _map_distinct(cells: pa.Array, function: Callable[[str], Any], kind: pa.DataType) -> pa.Array:
    """Maps a Python function over distinct cells; nulls stay null."""
    distinct = cells.dictionary_encode()
    values = [function(text) for text in distinct.dictionary.to_pylist()]
    return pa.array(values, kind).take(distinct.indices)


@cache
def json_decoder(*names: str) -> json.JSONDecoder:
    """Decodes JSON; duplicates of requested members raise `NestedError`."""
    wanted = frozenset(names)

    def once(members: list[tuple[Any, Any]]) -> dict[Any, Any]:
        value = dict(members)
        if len(value) < len(members):
            _check_once([name for name, _ in members], wanted)
        return value

    return json.JSONDecoder(object_pairs_hook=once)


def _check_once(members: Sequence[Any], wanted: frozenset[str]) -> None:
    for name in dict.fromkeys(members):
        if name in wanted and members.count(name) > 1:
            raise NestedError(_TWICE.format(name))


def _parsed(text: str, *wanted: str) -> Any:
    """Parses a JSON or Python literal; other text is returned unchanged.

    Raises:
        NestedError: an object has a duplicate requested member.
    """
    try:
        return json_decoder(*wanted).decode(text)
    except NestedError:
        raise
    except (ValueError, RecursionError):
        return python_literal(text, *wanted)


def python_literal(text: str, *wanted: str) -> Any:
    """The value of a Python literal; other text unchanged.

    Raises:
        NestedError: a dict has a duplicate requested key.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes
        try:
            tree = ast.parse(text.strip(), mode="eval")
            for node in ast.walk(tree) if wanted else ():
                if isinstance(node, ast.Dict):
                    keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
                    _check_once(keys, frozenset(wanted))
            return ast.literal_eval(tree)
        except NestedError:
            raise
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def _listed_in(text: str) -> list[str] | None:
    """The texts in a Python set or tuple, in order; None for anything else."""
    values = python_literal(f"[{text.strip()[1:-1]}]")
    if isinstance(values, list) and all(isinstance(value, str) for value in values):
        return values
    return None


def _array(inner: str) -> list[str]:
    """The elements of a PostgreSQL array, given its contents without braces; NULL is left out."""
    reader = csv.reader([inner], escapechar="\\", skipinitialspace=True)
    return [text for text in next(reader, []) if text and text.upper() != "NULL"]


def _elements(text: str, separator: str | None) -> list[str]:
    """The values in a cell: of a list literal, or between separators."""
    body = text.strip()
    if re.fullmatch(_SET.replace("\\z", ""), body) and (texts := _listed_in(body)) is not None:
        return texts
    if re.fullmatch(_ARRAY.replace("\\z", ""), body) and not _GUID.fullmatch(body):
        return _array(body[1:-1])
    values: Any = None
    if body.startswith("[") and body.endswith("]"):
        if _NUMPY.fullmatch(body):  # Python joins ['a' 'b'] to one text
            values = [single or double for single, double in _QUOTED.findall(body)]
        else:
            values = _parsed(body)
        if isinstance(values, str) and not set(body[1:-1]) & set("[]'\""):
            inner = body[1:-1]
            between = separator if separator and separator in inner else ","
            values = inner.split() if _NUMBERS.fullmatch(inner) else inner.split(between)
    if not isinstance(values, list):
        return text.split(separator) if separator is not None else [text]
    if any(isinstance(value, dict) for value in values):
        raise NestedError("holds objects", next(v for v in values if isinstance(v, dict)))
    if any(isinstance(value, list | tuple | set) for value in values):
        raise NestedError(_LISTS_OF_LISTS)
    return [t for t in map(text_of, values) if t is not None]
