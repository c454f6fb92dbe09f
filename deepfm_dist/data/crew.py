"""The ranks that prepare together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", np.int64, np.float64)


@dataclass(frozen=True)
class Crew:
    """The ranks that prepare together.

    Attributes:
        rank: this one.
        size: how many there are.
        gather: every rank's value, in their order, on every rank. All ranks.
        total: the sum of the ranks' arrays, on every rank, where there is a better way than
            `gather`. All ranks.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    total: Callable[[Any], Any] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def add_up(self, array: npt.NDArray[T]) -> npt.NDArray[T]:
        """The sum of the ranks' arrays. All ranks."""
        if self.size == 1:
            return array
        total: npt.NDArray[T] = (
            self.total(array) if self.total else np.sum(self.gather(array), axis=0)
        )
        return total

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value. All ranks."""
        return self.gather(value if self.is_first else None)[0]
