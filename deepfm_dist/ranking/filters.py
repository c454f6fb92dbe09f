"""Sets of items by their attributes: ``genre=Drama and year!=1999``."""

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.spelling import suggest_known
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import nearest, short
from deepfm_dist.ranking.items import Catalogue, attribute_pairs, item_attributes

_CONDITION = re.compile(r"\s*([^\s!=<>]+)\s*(!?=)\s*(\S.*?)\s*", re.DOTALL)
_AND = re.compile(r"\s+and\s+(?=[^\s!=<>]+\s*!?=)", re.IGNORECASE)
FILTERS_KEPT = 4096
"""Number of filters whose items are cached."""


class Condition(NamedTuple):
    """One condition of a filter.

    Attributes:
        field: name of an item field.
        is_equal: whether items with the value are kept; otherwise those without it.
        value: the value, as in the input files.
    """

    field: str
    is_equal: bool
    value: str


def parse_filter(where: str) -> list[Condition]:
    """The conditions of a filter such as ``genre=Drama and year!=1999``.

    Raises:
        ConfigError: a part of it is not ``field=value`` or ``field!=value``.
    """
    conditions = []
    for part in _AND.split(where):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise ConfigError(
                f"where={short(where)}: {short(part.strip())} is not a condition; write "
                f"field=value or field!=value, and join several by and"
            )
        conditions.append(Condition(match[1], match[2] == "=", match[3]))
    return conditions


class ItemFilters:
    """Finds the items of a catalogue by attributes.

    Args:
        dataset: the prepared dataset.
        catalogue: the items that can be recommended.
    """

    def __init__(self, dataset: PreparedDataset, catalogue: Catalogue) -> None:
        self._dataset, self._catalogue = dataset, catalogue
        self._fields = item_attributes(dataset.manifest)
        self._items_by_value: dict[str, tuple[Vocabulary, Jagged]] = {}
        self.positions = lru_cache(FILTERS_KEPT)(self._positions)
        """``[m]`` int32: ascending positions of the items that a filter keeps. Raises ConfigError
        for a field or value that training does not know."""

    def _positions(self, where: str) -> Int32Array:
        kept = self._everything
        for condition in parse_filter(where):
            matching = self._with_value(condition, where)
            if condition.is_equal:
                kept = np.intersect1d(kept, matching, assume_unique=True)
            else:
                kept = np.setdiff1d(kept, matching, assume_unique=True)
        return kept

    @cached_property
    def _everything(self) -> Int32Array:
        return np.arange(len(self._catalogue), dtype=np.int32)

    def _with_value(self, condition: Condition, where: str) -> Int32Array:
        """Ascending positions of the items with a value."""
        name, _, value = condition
        if name not in self._fields:
            raise ConfigError(f"where={short(where)}: {self._unknown_field(name)}")
        vocabulary, items = self._by_value(self._fields[name])
        [row] = vocabulary.lookup(pa.array([value])).tolist()
        if row == 0:
            raise ConfigError(
                f"where={short(where)}: the items of the training data have no {name}={value!r}"
                f"{suggest_known(vocabulary.ids, value)}"
            )
        return items.values[items.offsets[row] : items.offsets[row + 1]]

    def _by_value(self, feature: Feature) -> tuple[Vocabulary, Jagged]:
        """A field's vocabulary and, by its row, the positions of the items with the value."""
        if feature.name not in self._items_by_value:
            vocabulary = self._dataset.vocabulary(feature.table_name)
            pairs = attribute_pairs(self._dataset, self._catalogue, feature.name)
            by_value = Jagged.from_pairs(pairs[:, 0], pairs[:, 1], vocabulary.rows)
            self._items_by_value[feature.name] = vocabulary, by_value
        return self._items_by_value[feature.name]

    def _unknown_field(self, name: str) -> str:
        if any(f.name == name and f.names_entity for f in self._dataset.manifest.categorical):
            return f"{name!r} is an id, which no filter is for; use allow or block"
        if (near := nearest(name, self._fields)) is not None:
            return f"unknown item field {name!r}; did you mean {near}?"
        known: Sequence[str] = [*self._fields]
        if not known:
            return (
                f"{name!r}: this model has no item fields to filter by; train one with "
                f"{{name: {name}, entity: item, file: FILE}} among data.features, or use allow"
            )
        return f"unknown item field {name!r}; available: {', '.join(known)}"
