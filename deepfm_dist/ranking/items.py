"""The items that can be recommended, and those that users have already seen."""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Jagged, taken
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.messages import plural

log = logging.getLogger(__name__)

ColdItems = Literal["include", "exclude", "only"]
"""How a ranking treats items without training rows (`Manifest.cold`)."""

Seen = Callable[[int, int], Jagged]
"""Maps (first user, last + 1) to their masked positions; called for a rank's own users only."""


def cold_items_to_rank(
    wanted: ColdItems | None, id_dropout: float, manifest: Manifest
) -> ColdItems:
    """Decides how to treat items without training rows.

    Args:
        wanted: ``recommend.cold_items``.
        id_dropout: ``data.id_dropout`` that the model was trained with.
        manifest: the manifest of the dataset.

    Raises:
        ConfigError: only cold items are ranked, and the data has none.
    """
    n = manifest.cold.get("item", 0)
    if n == 0:
        if wanted == "only":
            raise ConfigError(
                "recommend.cold_items=only: the dataset has no items without training rows; give "
                "an item field of data.features a file that describes some, or leave it out"
            )
        return "exclude"
    items = f"{plural(n, 'item')} without training rows"
    if wanted is None and not id_dropout:
        log.info("%s not ranked: the model was trained without data.id_dropout", items)
        return "exclude"
    if wanted in ("include", "only") and not id_dropout:
        log.warning(
            "recommend.cold_items=%s: %s have the unknown id, which was not trained, so their "
            "scores are not comparable with others; train with data.id_dropout=0.1",
            wanted,
            items,
        )
    return wanted or "include"


class Catalogue:
    """The items that can be recommended, in the order of their external ids.

    Args:
        dataset: the prepared dataset.
        rows: item rows that can be recommended; default: all.
        cold_items: how to treat items without training rows.

    Raises:
        DataError: the rows have no users or no items, or no item is left.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        rows: npt.NDArray[np.integer] | None = None,
        cold_items: ColdItems = "exclude",
    ) -> None:
        if set(dataset.manifest.entities) != {"user", "item"}:
            raise DataError(
                f"{dataset.folder}: top items need rows with users and items; name "
                f"data.interactions.user and .item"
            )
        n_items = dataset.manifest.n_rows("item")
        self.first_cold = dataset.manifest.entities["item"]
        """First row of the items without training rows."""
        rows = np.arange(1, n_items, dtype=np.int32) if rows is None else rows
        if cold_items != "include":
            rows = rows[(rows >= self.first_cold) == (cold_items == "only")]
        self.rows, self.ids = in_id_order(dataset, "item", rows)
        """``[I]`` item rows and external ids by position."""
        self._position = np.full(n_items, -1, np.int32)
        self._position[self.rows] = np.arange(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, users: Int32Array, positives: list[Jagged]) -> Seen:
        """Positions of users' items in any of several lists.

        Args:
            users: ``[n]`` rows of the user table, in ranking order.
            positives: item rows of every user.
        """
        return self.seen_in([(users, bags) for bags in positives])

    def seen_in(self, lists: Sequence[tuple[Int32Array, Jagged]]) -> Seen:
        """`seen_by` for lists with different row numbers per user.

        Args:
            lists: pairs of each user's row, negative if there is none, and the lists of item rows.
        """
        return lambda begin, end: self._seen([b.take(r[begin:end]) for r, b in lists], end - begin)

    def positions_of(self, rows: npt.NDArray[np.integer]) -> Int32Array:
        """``[n]`` item rows -> ``[n]`` positions; -1 for items that cannot be recommended."""
        positions: Int32Array = self._position[rows]
        return positions

    def _seen(self, parts: Sequence[tuple[Int32Array, Int32Array]], n: int) -> Jagged:
        offsets = np.zeros(n + 1, np.int64)
        for lengths, _ in parts:
            offsets[1:] += lengths
        np.cumsum(offsets, out=offsets)
        values = np.empty(offsets[-1], np.int32)
        room = offsets[:-1].copy()
        for lengths, items in parts:
            # A value goes to its user's next free slot plus its index within the list.
            first = np.repeat(room - (np.cumsum(lengths) - lengths), lengths)
            values[first + np.arange(len(items))] = self._position[items]
            room += lengths
        return Jagged(offsets, values)


def item_attributes(manifest: Manifest) -> dict[str, Feature]:
    """The item fields with a vocabulary, other than the item's own id, by name."""
    return {
        f.name: f
        for f in manifest.categorical
        if f.entity == "item" and not f.names_entity and f.has_vocabulary
    }


def attribute_pairs(
    dataset: PreparedDataset, catalogue: Catalogue, name: str
) -> npt.NDArray[np.int32]:
    """``[n, 2]`` int32: distinct (table row of a value, position of an item with it), ascending.

    Args:
        dataset: the prepared dataset.
        catalogue: the items.
        name: one of `item_attributes`.
    """
    values = taken(dataset.entity_fields_with_cold[name], catalogue.rows)
    positions = np.arange(len(catalogue), dtype=np.int32)
    if isinstance(values, Jagged):
        positions, values = np.repeat(positions, values.lengths), values.values
    pairs: npt.NDArray[np.int32] = np.unique(
        np.stack([np.asarray(values, np.int32), positions], 1), axis=0
    )
    return pairs


def in_id_order(
    dataset: PreparedDataset, entity: str, rows: npt.NDArray[np.integer] | None = None
) -> tuple[Int32Array, pa.Array]:
    """Rows of users or items, by default all, and their external ids, in the order of the ids."""
    ids = dataset.entity_ids(entity, cold=True).slice(1)
    order = np.argsort(id_order(ids))
    if rows is not None:
        order = order[np.isin(order + 1, rows)]
    return (order + 1).astype(np.int32), ids.take(pa.array(order))
