"""The interface of ranking engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.topk import NO_ITEM

USER_BLOCK = 512
"""Number of users looked up and multiplied together: a GEMM's last digits depend on its height."""
Precision = Literal["fp32", "tf32", "bf16"]
"""Precision of the over-arch's products on CUDA."""


@dataclass(frozen=True)
class Best:
    """The best items of some users so far.

    Attributes:
        scores: ``[n, K]`` float32, best first; ``-inf`` in empty slots.
        positions: ``[n, K]`` int64; `NO_ITEM` in empty slots.
    """

    scores: Tensor
    positions: Tensor

    @classmethod
    def none(cls, n: int, k: int, device: torch.device) -> Self:
        """Empty slots for n users."""
        scores = torch.full((n, k), float("-inf"), device=device)
        return cls(scores, torch.full((n, k), NO_ITEM, dtype=torch.int64, device=device))


class Engine(Protocol):
    """Ranks items for users, both prepared by it.

    Attributes:
        name: the name of the engine.
        work_bytes: working memory per item of a block, besides the item itself.
    """

    name: str
    work_bytes: int

    def allocate(self, n: int, like: Side) -> Any:
        """Allocates space for n items."""

    def fill(self, items: Any, begin: int, side: Side) -> None:
        """Writes items into their places; those past the end are left out."""

    def take(self, items: Any, places: Int64Array) -> Any:
        """Selects items at ``[n]`` ascending indices, at least one."""

    def users(self, sides: Sequence[Side]) -> Any:
        """Prepares users, in blocks of `USER_BLOCK`."""

    def update(
        self, users: Any, items: Any, offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Updates the best items of the first ``len(best.scores)`` users.

        Args:
            users: from `users`.
            items: from `allocate`, filled; of higher positions than any that came before.
            offset: position of the first.
            seen: each user's masked positions.
            best: changed in place.
            deep: whether the over-arch counts.
        """

    def update_of_candidates(
        self, users: Any, items: Any, offset: int, candidates: Tensor, best: Best
    ) -> None:
        """`update` for each user's own items, ``[n, N]`` positions, ascending, `NO_ITEM` first."""

    def scores(self, users: Any, n_users: int, items: Any) -> Tensor:
        """``[n_users, items]`` float32."""
