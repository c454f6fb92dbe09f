"""The ranks that prepare together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepfm_dist.data.jagged import Int64Array


@dataclass(frozen=True)
class Crew:
    """The ranks that prepare together.

    Attributes:
        rank: this one.
        size: how many there are.
        gather: every rank's value, in their order, on every rank. All ranks.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def add_up(self, array: Int64Array) -> Int64Array:
        """The sum of the ranks' arrays. All ranks."""
        total: Int64Array = np.sum(self.gather(array), axis=0)
        return total

    def first_says(self, value: Any) -> Any:
        """Rank 0's value. All ranks."""
        return self.gather(value if self.is_first else None)[0]
