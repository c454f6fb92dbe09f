"""Turns a field's cells into values: columns to read, multi-valued cells, numbers, statistics."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.codes import Codes, hash_texts
from deepfm_dist.data.jagged import (
    VECTORS_AT_ONCE,
    FloatArray,
    HalfArray,
    Int32Array,
    Int64Array,
    Jagged,
    Values,
)
from deepfm_dist.data.manifest import NumericSpec
from deepfm_dist.data.moments import Moments
from deepfm_dist.data.schema import LABEL_OF, NO_LABEL, DataConfig, Feature
from deepfm_dist.data.sources import Check, Column, ColumnType, as_lists
from deepfm_dist.data.times import ISO, read_clock, read_times
from deepfm_dist.errors import DataError
from deepfm_dist.float_order import sortable

STRENGTHS = ("strength", "rating", "label", "weight")
"""Purposes of columns that rank the strength of a row, most significant first."""
_BINS = 1 << 16


def row_columns(data: DataConfig, with_split: bool) -> list[Column]:
    """Columns to read from the interactions, by purpose: ``user``, ``time``, ..., ``field NAME``.

    A column of the file may serve several purposes.
    """
    spec = data.interactions
    roles: list[tuple[str, ColumnType]] = [
        ("user", "text"),
        ("item", "text"),
        ("label", "label"),
        ("time", "time"),
        ("rating", "number"),
        ("weight", "weight"),
    ]
    if with_split:
        roles.append(("split", "split"))
    if spec.impressions is not None:
        roles = [(role, kind) for role, kind in roles if role not in ("item", "label")]
    missing: dict[str, tuple[str, ...]] = {
        f.entity: f.missing for f in data.features if f.names_entity
    }
    columns = [
        Column(
            name,
            kind,
            missing=missing.get(role, ()),
            formats=spec.time_formats if role == "time" else (),
            purpose=role,
        )
        for role, kind in roles
        if (name := getattr(spec, role)) is not None
    ]
    columns += [
        Column(name, "label", False, ("", "nan", "NaN"), purpose=f"{LABEL_OF}{name}")
        for name in spec.labels
    ]
    for name, words in spec.order.items():
        known = Check(
            partial(_none_of, words),
            f"a word of interactions.order: {', '.join(words)}",
            cure="add it there",
        )
        columns.append(Column(name, checks=(known,), purpose="strength"))
    if spec.impressions is not None:
        columns.append(impressions_column(spec.impressions, labelled=True))
    return [*columns, *map(column_of, in_rows(data))]


def labels_of(
    rows: pa.RecordBatch | pa.Table, names: Sequence[str]
) -> dict[str, npt.NDArray[np.int8]]:
    """Several labels of rows, ``[n]`` int8 each: 0, 1, or `NO_LABEL` for an empty cell.

    An additional ``label`` is 1 if any label is 1, that is, if the user did anything with the item.

    Args:
        rows: the rows, as `row_columns` reads them.
        names: the names of the labels.
    """
    columns = {
        f"{LABEL_OF}{n}": np.asarray(rows[f"{LABEL_OF}{n}"].fill_null(NO_LABEL), np.int8)
        for n in names
    }
    any_of_them = np.stack(list(columns.values())).max(0) == 1
    return {**columns, "label": any_of_them.astype(np.int8)}


def _none_of(words: tuple[str, ...], cells: pa.Array) -> npt.NDArray[np.bool_]:
    """``[n]`` string -> ``[n]`` bool: cells with other text."""
    known = pc.or_(pc.is_in(cells, value_set=pa.array(words)), pc.is_null(cells))
    return ~np.asarray(known, bool)


def impressions_column(name: str, labelled: bool) -> Column:
    """A column of items that were shown together.

    Args:
        name: the name of the column.
        labelled: whether an item without a label makes the row invalid.
    """
    checks = (Check(_is_unlabelled, "a list of items with labels, such as N1-1 N2-0"),)
    return Column(
        name, "texts", checks=checks if labelled else (), separator=" ", purpose="impressions"
    )


def _is_unlabelled(cells: pa.Array) -> npt.NDArray[np.bool_]:
    """``[n]`` list of string -> ``[n]`` bool: cells without items or with an unlabelled item."""
    owners, items = _shown(cells)
    wrong = np.asarray(pc.equal(cells.is_valid(), True)).copy()
    wrong[owners] = False
    labelled = pc.match_substring_regex(items, r".-[01]$")
    joined = pc.match_substring_regex(items, r"-[01][,;|]")  # N1-1,N2-0: other separators
    wrong[owners[~np.asarray(pc.and_not(labelled, joined)).astype(bool)]] = True
    return wrong


def _shown(cells: pa.Array) -> tuple[Int64Array, pa.Array]:
    """The non-empty items of each cell: (row, item with label)."""
    owners = np.asarray(pc.list_parent_indices(cells), np.int64)
    items = pc.utf8_trim_whitespace(cells.flatten())
    there = np.asarray(pc.not_equal(items, "").fill_null(False)).astype(bool)
    return owners[there], items.filter(pa.array(there))


def exploded(batch: pa.RecordBatch) -> pa.RecordBatch:
    """One row per item of ``impressions``: the columns ``item``, ``label`` and all others.

    If an item of the batch has no label, labels are omitted and items are not parsed.
    """
    owners, items = _shown(batch["impressions"])
    labels = pa.nulls(len(items), pa.int8())
    if pc.all(pc.match_substring_regex(items, r".-[01]$")).as_py():
        labels = pc.ends_with(items, "1").cast(pa.int8())
        items = pc.utf8_slice_codeunits(items, 0, -2)
    rows = batch.drop_columns("impressions").take(pa.array(owners))
    return rows.append_column("item", items).append_column("label", labels)


def in_rows(data: DataConfig) -> list[Feature]:
    """Fields with values in the interactions, other than ids."""
    return [f for f in data.features if f.file is None and not f.names_entity and f.history is None]


def column_of(feature: Feature) -> Column:
    """The column that holds a field's values, by the purpose ``field NAME``."""
    name, purpose = feature.column or feature.name, f"field {feature.name}"
    if feature.kind == "vector":
        check = Check(
            partial(_other_vectors, feature.dim), f"a vector of {feature.dim} finite numbers"
        )
        return Column(
            name,
            "vector",
            required=False,
            missing=feature.missing,
            checks=(check,),
            separator=feature.separator,
            purpose=purpose,
        )
    if feature.kind == "numeric":
        return Column(name, "number", required=False, missing=feature.missing, purpose=purpose)
    checks: tuple[Check, ...] = ()
    if feature.derive is not None:
        check = Check(partial(_underivable, feature), _source(feature))
        if feature.derives_time:
            setting = f"time_format of the field {feature.name}"
            check = replace(check, setting=setting, formats=_formats(feature))
        checks = (check,)
    kind: ColumnType = "texts" if feature.in_lists else "text"
    derived_from: Literal["number", "time"] | None = None
    if feature.derive == "log_squared":
        derived_from = "number"
    elif feature.derives_time:
        derived_from = "time"
    separator = feature.separator
    return Column(
        name,
        kind,
        required=False,
        checks=checks,
        separator=separator,
        derived_from=derived_from,
        purpose=purpose,
    )


def split_cells(cells: pa.Array, feature: Feature) -> tuple[Int64Array, pa.Array]:
    """Splits cells into (row, value) pairs; drops empty and missing cells.

    Args:
        cells: ``[n]`` string, or list of string.
        feature: defines separator, words for "missing", fill and derived value; if it keeps the
            first value only, a row has at most one.

    Returns:
        rows ``[m]`` int64 ascending, and values ``[m]`` string.

    Raises:
        DataError: no value can be derived from a cell. Reading files already refuses such cells.
    """
    owners, cells = _split(cells, feature)
    return owners, cells if feature.derive is None else _derive(cells, feature)


def _split(cells: pa.Array, feature: Feature) -> tuple[Int64Array, pa.Array]:
    """`split_cells` without derived fields."""
    owners = np.arange(len(cells), dtype=np.int64)
    if feature.in_lists:
        lists = cells if pa.types.is_list(cells.type) else as_lists(cells, feature.separator)
        owners = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        cells = lists.flatten()
    cells = pc.utf8_trim_whitespace(cells)
    missing = pa.array(["", *feature.missing])
    valid = pc.and_(pc.is_valid(cells), pc.invert(pc.is_in(cells, value_set=missing)))
    mask = np.asarray(valid.fill_null(False)).astype(bool)
    if feature.fill is not None:
        cells = pc.if_else(pa.array(mask), cells, feature.fill)
    elif not mask.all():
        owners, cells = owners[mask], cells.filter(pa.array(mask))
    if feature.in_lists and feature.keep == "first":
        first = np.flatnonzero(np.diff(owners, prepend=-1))
        owners, cells = owners[first], cells.take(pa.array(first))
    return owners, cells


def _derive(cells: pa.Array, feature: Feature) -> pa.Array:
    """``[m]`` string -> ``[m]`` string by ``feature.derive``; computed once per distinct cell."""
    distinct = cells.dictionary_encode()
    values = _derivable(distinct.dictionary, feature)
    if values.null_count:
        text = distinct.dictionary.filter(pc.is_null(values))[0].as_py()
        name = feature.column or feature.name
        raise DataError(f"column {name!r}: {text!r} is not {_source(feature)}; correct it")
    return values.cast(pa.string()).take(distinct.indices)


def _underivable(feature: Feature, cells: pa.Array) -> npt.NDArray[np.bool_]:
    """``[n]`` cells -> ``[n]`` bool: non-empty cells from which nothing can be derived."""
    if feature.in_lists:
        owners, texts = _split(cells, feature)
        bad = np.zeros(len(cells), bool)
        bad[owners[np.asarray(pc.is_null(_derivable(texts, feature)))]] = True
        return bad
    distinct = cells.dictionary_encode()
    owners, texts = _split(distinct.dictionary, feature.model_copy(update={"fill": None}))
    wrong = np.zeros(len(distinct.dictionary) + 1, bool)  # the last one represents null
    wrong[owners[np.asarray(pc.is_null(_derivable(texts, feature)))]] = True
    return wrong[np.asarray(distinct.indices.fill_null(-1))]


def _formats(feature: Feature) -> tuple[str, ...]:
    """Formats of the times that a field derives values from."""
    return feature.time_formats or (ISO,)


def times_of(cells: pa.Array, feature: Feature) -> pa.StructArray:
    """The times that a field derives values from.

    Args:
        cells: ``[n]`` string, or list of string.
        feature: the field.

    Returns:
        ``[m]`` `times.TIME`, of the cells that are not missing.
    """
    _, texts = _split(cells, feature.model_copy(update={"fill": None}))
    distinct = texts.dictionary_encode()
    return read_times(distinct.dictionary, _formats(feature)).take(distinct.indices)


def _source(feature: Feature) -> str:
    """The type of cells that the field derives values from."""
    kind = "a number"
    if feature.derives_time:
        kind = " or ".join(["a time", *feature.time_formats]).replace(" or ", " like ", 1)
    return (
        f"{kind}, as derive={feature.derive} of the field {feature.name} needs, nor among its "
        f"`missing`"
    )


def _derivable(texts: pa.Array, feature: Feature) -> pa.Array:
    """``[m]`` string -> ``[m]`` integers by ``feature.derive``, null if unparsable."""
    if feature.derive == "log_squared":
        x = _numbers(texts)
        finite = np.isfinite(x)
        x = np.where(finite, x, 0)
        whole = np.trunc(np.where(x > 2, np.log(np.maximum(x, 2)) ** 2, x))
        return pa.array(whole.astype(np.int64), mask=~finite)
    times = read_clock(texts, feature.time_formats)
    if feature.derive == "hour":
        return pc.hour(times)
    days = pc.day_of_week(times)
    return days if feature.derive == "weekday" else pc.greater_equal(days, 5).cast(pa.int8())


def _numbers(texts: pa.Array) -> npt.NDArray[np.float64]:
    """``[m]`` string -> ``[m]`` float64, NaN if it is not a number."""
    try:
        numbers = texts.cast(pa.float64())
    except pa.ArrowInvalid:
        numbers = pa.array([_number(text) for text in texts], pa.float64())
    result: npt.NDArray[np.float64] = numbers.to_numpy(zero_copy_only=False)
    return result


def _number(text: pa.Scalar) -> float | None:
    try:
        return float(text.cast(pa.float64()).as_py())
    except pa.ArrowInvalid:
        return None


def coded(cells: pa.Array, feature: Feature, codes: Codes | None) -> Values:
    """A categorical field's cells as codes, one or several per row.

    Args:
        cells: ``[n]`` string.
        feature: the field.
        codes: codes of the field's table, extended in place; None for a hashed field, which returns
            table rows.

    Returns:
        ``[n]`` int32, -1 for no value; jagged for a multi-valued field.
    """
    owners, texts = split_cells(cells, feature)
    numbers = hashed_rows(texts, feature) if codes is None else codes.encode(texts)
    if feature.multi_valued:
        return Jagged.from_pairs(owners, numbers, len(cells))
    single = np.full(len(cells), -1, np.int32)
    single[owners] = numbers
    return single


def hashed_rows(texts: pa.Array, feature: Feature) -> Int32Array:
    """Rows of a hashed field's table: 1 + hash mod ``hash_rows``; row 0 is for no value."""
    assert feature.hash_rows is not None
    places = hash_texts(texts) % np.uint64(feature.hash_rows)
    rows: Int32Array = places.astype(np.int32) + np.int32(1)
    return rows


def numbers_of(cells: pa.Array | pa.ChunkedArray, feature: Feature) -> npt.NDArray[np.float64]:
    """Cells of a numeric field as float64, missing ones as NaN."""
    numbers = cells.cast(pa.float64())
    if isinstance(numbers, pa.ChunkedArray):
        numbers = numbers.combine_chunks()
    numbers = numbers.to_numpy(zero_copy_only=False)
    for word in feature.missing:
        with suppress(ValueError):  # non-numeric words were already treated as missing
            numbers = np.where(numbers == float(word), np.nan, numbers)
    result: npt.NDArray[np.float64] = numbers
    return result


def _other_vectors(dim: int | None, cells: pa.Array) -> npt.NDArray[np.bool_]:
    """``[n]`` list of float32 -> ``[n]`` bool: cells other than ``dim`` finite numbers."""
    lengths = np.asarray(pc.list_value_length(cells).fill_null(0), np.int64)
    wrong = (lengths != dim) & (lengths > 0)
    finite = np.asarray(pc.is_finite(cells.flatten()).fill_null(False)).astype(bool)
    wrong[np.repeat(np.arange(len(lengths)), lengths)[~finite]] = True
    return wrong


def vectors_in(cells: pa.Array | pa.ChunkedArray, dim: int) -> FloatArray:
    """Cells of a vector field as ``[n, dim]`` float32; rows of missing ones are NaN."""
    vectors = np.full((len(cells), dim), np.nan, np.float32)
    begin = 0
    for chunk in cells.chunks if isinstance(cells, pa.ChunkedArray) else [cells]:
        valid = np.asarray(chunk.is_valid()).astype(bool)
        rows = begin + np.flatnonzero(valid)
        vectors[rows] = np.asarray(chunk.flatten()).reshape(-1, dim)
        begin += len(chunk)
    return vectors


def scaled(vectors: FloatArray, feature: Feature, spec: NumericSpec) -> HalfArray:
    """The model's input vectors: divided by ``spec.std``, zeros for missing ones.

    Args:
        vectors: ``[n, dim]`` float32; NaN in rows without a vector.
        feature: the field.
        spec: its statistics.

    Returns:
        ``[n, dim]`` float16.

    Raises:
        DataError: a vector overflows float16: it is more than 65,504 times as long as those of
            training.
    """
    out = np.empty(vectors.shape, np.float16)
    for begin in range(0, len(vectors), VECTORS_AT_ONCE):
        block = vectors[begin : begin + VECTORS_AT_ONCE] / np.float32(spec.std)
        if (np.abs(np.nan_to_num(block)) > np.finfo(np.float16).max).any():
            largest = np.nanmax(np.abs(block)) * spec.std
            raise DataError(
                f"{feature.name}: a vector holds a number of the size {largest:g}, but training "
                f"vectors have a length of {spec.std:g}; scale all vectors the same way"
            )
        out[begin : begin + len(block)] = np.nan_to_num(block)
    return out


def transformed(
    numbers: npt.NDArray[np.float64], feature: Feature, spec: NumericSpec
) -> FloatArray | Int32Array:
    """Applies a numeric field's transform.

    log is ``sign(x) * log(1 + |x|)``; standard is ``(x - mean) / std``; NaN becomes 0. bucket is
    1 + the number of boundaries at or below x, and 0 for NaN.

    Args:
        numbers: ``[n]`` float64: float32 would resolve times in seconds to two minutes only.
        feature: the field.
        spec: its statistics.

    Returns:
        ``[n]`` float32; for buckets int32.
    """
    if feature.transform == "bucket":  # in float32, as in the histogram
        bounds, numbers32 = np.array(spec.boundaries, np.float32), numbers.astype(np.float32)
        rows = 1 + np.searchsorted(bounds, numbers32, side="right")
        return np.where(np.isnan(numbers), 0, rows).astype(np.int32)
    if feature.transform == "log":
        numbers = _log(numbers)
    if feature.transform == "standard":
        numbers = (numbers - spec.mean) / spec.std
    return np.nan_to_num(numbers.astype(np.float32))


def _log(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = np.sign(numbers) * np.log1p(np.abs(numbers))
    return result


@dataclass
class NumericFit:
    """Statistics of a numeric field that can be summed in any order of rows.

    Attributes:
        feature: the field.
        moments: the moments of the numbers, exact.
        histogram: the histogram of the upper half of each value's float32 bits, for buckets.
    """

    feature: Feature
    moments: Moments = field(default_factory=Moments)
    histogram: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        """Adds raw numbers; ignores NaN."""
        values = _log(numbers) if self.feature.transform == "log" else numbers
        values = values[~np.isnan(values)]
        if self.feature.transform == "bucket":
            if len(self.histogram) == 0:
                self.histogram = np.zeros(_BINS, np.int64)
            self.histogram += np.bincount(upper_bits(values), minlength=_BINS)
        else:
            self.moments.add(values)

    def __add__(self, other: Self) -> Self:
        histogram = self.histogram if len(self.histogram) else other.histogram
        if len(self.histogram) and len(other.histogram):
            histogram = self.histogram + other.histogram
        return type(self)(self.feature, self.moments + other.moments, histogram)

    def spec(self) -> NumericSpec:
        """The fitted statistics."""
        if self.feature.transform == "bucket":
            return NumericSpec(mean=0, std=1, boundaries=self._boundaries())
        std = float(np.sqrt(self.moments.variance))
        return NumericSpec(mean=self.moments.mean, std=std or 1.0)

    def _boundaries(self) -> tuple[float, ...]:
        """Quantiles, at the lower edges of bins: accurate to 1 part in 128."""
        if not self.histogram.sum():
            return ()
        below = np.cumsum(self.histogram)
        wanted = below[-1] * np.arange(1, self.feature.buckets) / self.feature.buckets
        bins = np.unique(np.searchsorted(below, wanted, side="right"))
        bins = bins[bins > np.flatnonzero(self.histogram)[0]]
        bits = sortable((bins - _BINS // 2).astype(np.int32) << 16)
        return tuple(float(v) for v in bits.view(np.float32))


def upper_bits(values: npt.NDArray[np.floating]) -> Int64Array:
    """The upper half of each number's float32 bits: ``[n]`` in [0, 2^16), in their order."""
    bits = (values.astype(np.float32) + np.float32(0)).view(np.int32)  # makes -0 and 0 equal
    return (sortable(bits) >> 16).astype(np.int64) + _BINS // 2


def lookup_rows(values: Values, row_of_code: Int32Array) -> Values:
    """Codes -> table rows; -1 (no value) indexes the last element, which is 0."""
    if isinstance(values, Jagged):
        return Jagged(values.offsets, row_of_code[values.values])
    return row_of_code[values]


def table_names(features: Sequence[Feature]) -> list[str]:
    """Tables of the fields, in the order of their first use."""
    return list(dict.fromkeys(f.table_name for f in features if f.in_table))
