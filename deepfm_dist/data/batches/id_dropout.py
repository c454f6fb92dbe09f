"""Replaces ids by the unknown id in training, as a pure function of seed and step.

A model that never sees an unknown id learns nothing about it: its table row keeps its random
initial values, and attributes do not learn what the id already explains. With a share of ids
replaced, the unknown row becomes the average user or item, and attributes have to explain the rest,
as they must for an item without training rows.

Source: Volkovs, Yu, Poutanen, "DropoutNet: Addressing Cold Start in Recommender Systems", 2017,
which drops the inputs of users and items in this way.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.seeding import derive_seed, mix

Hidden = dict[str, npt.NDArray[np.bool_]]
"""By entity, ``[b]`` bool: whether a row's id is replaced."""


@dataclass(frozen=True)
class IdDropout:
    """Decides which ids a step replaces, the same at any world size.

    Attributes:
        share: the share of the ids, in [0, 1).
        seed: the seed of the draws.
    """

    share: float
    seed: int

    @property
    def threshold(self) -> int:
        """An id is replaced if the upper 32 bits of its random word are below this."""
        return round(self.share * 2**32)

    def key(self, entity: str, step: int) -> int:
        """The 63-bit key that a step mixes row numbers with."""
        return derive_seed(self.seed, "id_dropout", entity, step)

    def hidden(self, step: int, **numbers: npt.NDArray[np.integer] | None) -> Hidden | None:
        """Which ids a step replaces; None if the share is 0.

        Args:
            step: the step, counted from 1.
            numbers: by entity, ``[m]`` the number that the draw of each row depends on: for
                labelled rows the position in the epoch's list, for users and candidates the table
                row; None for an entity that the rows lack.
        """
        if not self.share:
            return None
        return {
            entity: hidden_rows(rows.astype(np.int64), self.key(entity, step), self.threshold)
            for entity, rows in numbers.items()
            if rows is not None
        }


@compiled
def hidden_rows(numbers: Int64Array, key: int, threshold: int) -> Any:
    """``[m]`` bool: whether the upper half of each number's random word is below a threshold."""
    hidden = np.empty(len(numbers), np.bool_)
    limit, step_word = np.uint64(threshold), mix(np.uint64(key))
    for i in range(len(numbers)):
        hidden[i] = (mix(step_word ^ np.uint64(numbers[i])) >> np.uint64(32)) < limit
    return hidden
