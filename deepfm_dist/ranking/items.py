"""The items that can be recommended, and those that users have already seen."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.errors import DataError

Seen = Callable[[int, int], Jagged]
"""(first user, last + 1) -> each one's masked positions. A rank asks for its own users only."""


class Catalogue:
    """The items that can be recommended, in the order of their external ids.

    Args:
        dataset: the prepared dataset.
        rows: item rows that can be recommended; default: all.

    Raises:
        DataError: its rows have no users or no items.
    """

    def __init__(
        self, dataset: PreparedDataset, rows: npt.NDArray[np.integer] | None = None
    ) -> None:
        if set(dataset.manifest.entities) != {"user", "item"}:
            raise DataError(
                f"{dataset.folder}: top items need rows with users and items; name "
                f"data.interactions.user and .item"
            )
        self.rows, self.ids = in_id_order(dataset, "item", rows)
        """``[I]`` item rows and external ids by position."""
        self._position = np.full(dataset.manifest.entities["item"], -1, np.int32)
        self._position[self.rows] = np.arange(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def seen_by(self, users: Int32Array, positives: list[Jagged]) -> Seen:
        """Positions of the items that users have in any of several lists.

        Args:
            users: ``[n]`` rows of the user table, in ranking order.
            positives: item rows of every user.
        """
        return lambda begin, end: self._seen_by(users[begin:end], positives)

    def _seen_by(self, users: Int32Array, positives: list[Jagged]) -> Jagged:
        parts = [part.take(users) for part in positives]
        offsets = np.zeros(len(users) + 1, np.int64)
        for lengths, _ in parts:
            offsets[1:] += lengths
        np.cumsum(offsets, out=offsets)
        values = np.empty(offsets[-1], np.int32)
        room = offsets[:-1].copy()
        for lengths, items in parts:
            # A value goes to its user's next free place plus its number within the list.
            first = np.repeat(room - (np.cumsum(lengths) - lengths), lengths)
            values[first + np.arange(len(items))] = self._position[items]
            room += lengths
        return Jagged(offsets, values)


def in_id_order(
    dataset: PreparedDataset, entity: str, rows: npt.NDArray[np.integer] | None = None
) -> tuple[Int32Array, pa.Array]:
    """Rows of users or items, by default all, and their external ids, in the order of the ids."""
    ids = dataset.entity_ids(entity).slice(1)
    order = np.argsort(id_order(ids))
    if rows is not None:
        order = order[np.isin(order + 1, rows)]
    return (order + 1).astype(np.int32), ids.take(pa.array(order))
