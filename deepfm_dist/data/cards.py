"""Display data of items: id, title, genres."""

from dataclasses import dataclass

import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.schema import OUT_OF_VOCABULARY
from deepfm_dist.data.vocabulary import external


@dataclass(frozen=True)
class Card:
    """What is displayed of an item.

    Attributes:
        id: external id.
        title: None if the data has no titles.
        tags: values of its categorical fields, such as genres.
    """

    id: str | int
    title: str | None
    tags: list[str]


class Cards:
    """Looks up items' cards by row."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self._ids = external(dataset.entity_ids("item", cold=True).slice(1))
        self._titles = dataset.titles(cold=True)
        self._tags = [
            (dataset.entity_fields_with_cold[f.name], dataset.vocabulary(f.table_name).ids)
            for f in dataset.manifest.categorical
            if f.entity == "item" and not f.is_id and f.has_vocabulary
        ]

    def __call__(self, row: int) -> Card:
        """The card of an item row; None for the row of unknown items."""
        tags: list[str] = []
        for values, words in self._tags:
            row_values = (
                values.values[values.offsets[row] : values.offsets[row + 1]]
                if isinstance(values, Jagged)
                else values[row : row + 1]
            )
            tags += [words[int(v) - 1].as_py() for v in row_values if v != OUT_OF_VOCABULARY]
        title = None if self._titles is None else _text(self._titles[row])
        return Card(self._ids[row - 1].as_py(), title, tags)


def _text(cell: pa.Scalar) -> str | None:
    text: str | None = cell.as_py()
    return text
