"""Ranks with torch operations: any model on any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.topk import NO_ITEM, mask_of, masked_top_k, top_k
from deepfm_dist.ranking.types import USER_BLOCK, Best


class TorchEngine:
    """Any model on any device."""

    def __init__(self, scorer: CatalogueScorer) -> None:
        self.name = "torch"
        # Scores; and for the top-K, 8-byte keys, their shifted halves and a copy of the mask.
        self.work_bytes = USER_BLOCK * (4 + 3 * 8)
        self._scorer = scorer

    def allocate(self, n: int, like: Side) -> Side:
        """Allocates space for n items."""
        return Side(*(t.new_empty(n, *t.shape[1:]) for t in like.tensors))

    def fill(self, items: Side, begin: int, side: Side) -> None:
        """Writes items into their places; those past the end are left out."""
        for target, source in zip(items.tensors, side.tensors, strict=True):
            room = target[begin : begin + len(source)]
            room.copy_(source[: len(room)])

    def take(self, items: Side, places: Int64Array) -> Side:
        """Some of the items; see `Engine`."""
        return items[torch.from_numpy(places).to(items.constant.device)]

    def users(self, sides: Sequence[Side]) -> Side:
        """Prepares users."""
        return Side(*map(torch.cat, zip(*(s.tensors for s in sides), strict=True)))

    def update(
        self, users: Side, items: Side, offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Updates users' best items; see `Engine`."""
        n, k = best.scores.shape
        mask = mask_of(seen, best.scores.device, offset, len(items.constant))
        for begin in range(0, n, USER_BLOCK):
            end = min(begin + USER_BLOCK, n)
            scores = self._scorer.scores(users[begin : begin + USER_BLOCK], items, deep)
            top = masked_top_k(scores[: end - begin], mask(begin, end), k)
            self._merge(best, slice(begin, end), top[1], top[0] + offset)

    def update_of_candidates(
        self, users: Side, items: Side, offset: int, candidates: Tensor, best: Best
    ) -> None:
        """Updates users' best from their own candidates; see `Engine`."""
        for begin in range(0, len(best.scores), USER_BLOCK):
            block = slice(begin, min(begin + USER_BLOCK, len(best.scores)))
            places = candidates[block] - offset
            here = (places >= 0) & (places < len(items.constant))
            scores = self._scorer.scores_of_pairs(users[block], items, places.where(here, 0))
            scores.masked_fill_(~here, float("-inf"))
            self._merge(best, block, scores, candidates[block])

    def _merge(self, best: Best, users: slice, scores: Tensor, positions: Tensor) -> None:
        """Merges new items into the best; ties stay in the order of positions."""
        joined = torch.cat([best.scores[users], scores], 1)
        order, merged = top_k(joined, best.scores.shape[1])
        positions = torch.cat([best.positions[users], positions], 1)
        best.scores[users] = merged
        best.positions[users] = positions.gather(1, order.clamp(min=0)).where(order >= 0, NO_ITEM)

    def scores(self, users: Side, n_users: int, items: Side) -> Tensor:
        """``[n_users, items]`` float32."""
        out = items.constant.new_empty(n_users, len(items.constant))
        for begin in range(0, n_users, USER_BLOCK):
            scores = self._scorer.scores(users[begin : begin + USER_BLOCK], items)
            room = out[begin : begin + USER_BLOCK]
            room.copy_(scores[: len(room)])
        return out
