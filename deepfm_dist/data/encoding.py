"""Encodes values of one field from outside the dataset, by the field's kind."""

import math
from typing import Protocol

import numpy as np
import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import (
    hashed_rows,
    numbers_of,
    scaled,
    split_cells,
    transformed,
    vectors_in,
)
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values
from deepfm_dist.data.manifest import NumericSpec
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.spelling import Unseen, suggest_known
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural

Cell = str | float | list[str | float]
"""One or several values of a field."""


class FieldEncoder(Protocol):
    """Encodes one field."""

    def encode(self, cells: pa.Array | pa.ChunkedArray | None, n: int) -> Values:
        """Values of n rows.

        Args:
            cells: ``[n]``, as read from the field's column; None: all empty.
            n: number of rows.
        """

    def encode_one(self, value: Cell | None, where: str) -> Values:
        """Encodes the value of one row.

        Args:
            value: the value, from the configuration or a request; None: empty.
            where: its source, for messages.

        Raises:
            ConfigError: it has the wrong type, or is unknown.
        """


class NumberEncoder:
    """Encodes numbers; missing ones get 0 after the transform, as in training."""

    def __init__(self, feature: Feature, spec: NumericSpec) -> None:
        self._feature, self._spec = feature, spec

    def encode(self, cells: pa.Array | pa.ChunkedArray | None, n: int) -> Values:
        """See `FieldEncoder`."""
        numbers = np.full(n, np.nan) if cells is None else numbers_of(cells, self._feature)
        return transformed(numbers, self._feature, self._spec)

    def encode_one(self, value: Cell | None, where: str) -> Values:
        """See `FieldEncoder`; numeric text is accepted."""
        if value is None:
            return self.encode(None, 1)
        try:
            number = math.nan if isinstance(value, list) else float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{where}: expected a number")
        return self.encode(pa.array([number]), 1)


class VectorEncoder:
    """Encodes vectors; missing ones are zeros."""

    def __init__(self, feature: Feature, spec: NumericSpec) -> None:
        self._feature, self._spec, self._dim = feature, spec, feature.dim or 0

    def encode(self, cells: pa.Array | pa.ChunkedArray | None, n: int) -> Values:
        """See `FieldEncoder`."""
        vectors = np.full((n, self._dim), np.nan, np.float32)
        vectors = vectors if cells is None else vectors_in(cells, self._dim)
        return scaled(vectors, self._feature, self._spec)

    def encode_one(self, value: Cell | None, where: str) -> Values:
        """See `FieldEncoder`; an empty list counts as missing."""
        if value is None or value == []:
            return self.encode(None, 1)
        numbers = value if isinstance(value, list) else []
        is_right = len(numbers) == self._dim and all(
            isinstance(x, int | float) and not isinstance(x, bool) for x in numbers
        )
        with np.errstate(over="ignore"):
            vector = np.array(numbers if is_right else [np.nan], np.float32)
        if not np.isfinite(vector).all():
            raise ConfigError(f"{where}: expected a list of {plural(self._dim, 'finite number')}")
        return self.encode(pa.array([vector], pa.list_(pa.float32())), 1)


class WordEncoder:
    """Encodes categories as rows of the field's table.

    Args:
        feature: the field.
        vocabulary: the vocabulary of its table; None for a hashed field.

    Attributes:
        unseen: unknown values encoded so far; empty for a hashed field.
    """

    def __init__(self, feature: Feature, vocabulary: Vocabulary | None) -> None:
        self._feature, self._vocabulary = feature, vocabulary
        # Users and items are gathered from jagged columns, even if each has one value.
        self._is_single = feature.entity == "context" and not feature.multi_valued
        self.unseen = Unseen(feature.name)

    @property
    def has_vocabulary(self) -> bool:
        """Whether its table has a vocabulary."""
        return self._vocabulary is not None

    def report(self) -> str | None:
        """A report of unknown values encoded so far."""
        return None if self._vocabulary is None else self.unseen.report(self._vocabulary.ids)

    def encode(self, cells: pa.Array | pa.ChunkedArray | None, n: int) -> Values:
        """See `FieldEncoder`; unknown values get row 0 and are counted."""
        if cells is None:
            return self._packed(np.zeros(0, np.int64), np.zeros(0, np.int32), n)
        if isinstance(cells, pa.ChunkedArray):
            cells = pa.concat_arrays(cells.chunks or [pa.array([], cells.type)])
        owners, texts = split_cells(cells, self._feature)
        rows = self._rows(texts)
        self.unseen.add(texts, rows > 0)
        return self._packed(owners, rows, n)

    def encode_one(self, value: Cell | None, where: str) -> Values:
        """See `FieldEncoder`; text may hold several values, like a cell of a file."""
        if value is None:
            return self.encode(None, 1)
        feature, words = self._feature, value if isinstance(value, list) else [value]
        if len(words) > 1 and not feature.multi_valued:
            raise ConfigError(f"{where}: the field has one value")
        if isinstance(value, list):  # elements are complete values and not split
            feature = feature.model_copy(update={"separator": None, "several": None})
        _, texts = split_cells(pa.array([str(word) for word in words], pa.string()), feature)
        rows = self._rows(texts)
        nothing = self._is_single and not len(rows)  # such as a word for "missing"
        if self._vocabulary is not None and (nothing or (rows == 0).any()):
            unknown = str(value) if nothing else texts[int(np.argmin(rows))].as_py()
            which = "" if unknown == str(value) else f"{unknown!r} was "
            hint = suggest_known(self._vocabulary.ids, unknown)
            raise ConfigError(f"{where}: {which}never seen in training{hint}")
        return self._packed(np.zeros(len(rows), np.int64), rows, 1)

    def _rows(self, texts: pa.Array) -> Int32Array:
        """``[m]`` rows of the table; 0 for unknown values."""
        if self._vocabulary is None:
            return hashed_rows(texts, self._feature)
        return self._vocabulary.lookup(texts)

    def _packed(self, owners: Int64Array, rows: Int32Array, n: int) -> Values:
        """Table rows of n rows: one each if the field has one value, else jagged."""
        if not self._is_single:
            return Jagged.from_pairs(owners, rows, n)
        single = np.zeros(n, np.int32)
        single[owners] = rows
        return single


def encoder_of(feature: Feature, dataset: PreparedDataset) -> FieldEncoder:
    """The encoder of a field, with the dataset's vocabularies and statistics."""
    if feature.kind == "numeric":
        return NumberEncoder(feature, dataset.manifest.numeric[feature.name])
    if feature.kind == "vector":
        return VectorEncoder(feature, dataset.manifest.numeric[feature.name])
    vocabulary = dataset.vocabulary(feature.table_name) if feature.has_vocabulary else None
    return WordEncoder(feature, vocabulary)
