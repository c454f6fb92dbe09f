"""The best K items of each user: seen ones masked, ties by position."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepfm_dist.data.jagged import Jagged

NO_ITEM = -1
"""Position that fills the places of users with fewer than K candidates."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best positions of each row; equal scores in the order of their positions.

    Args:
        scores: ``[U, I]`` float32; ``-inf`` marks what is no candidate.
        k: K.

    Returns:
        positions ``[U, K]`` int64 and scores ``[U, K]``, best first; places without a candidate
        hold `NO_ITEM` and ``-inf``.
    """
    n_users, n_items = scores.shape
    # A float's bits, seen as an integer, are in its order once negative ones are flipped; the
    # position in the low half makes every key distinct, so that the result is determined.
    bits = (scores + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    last = n_items - 1
    keys = (ordered << 32) | (last - torch.arange(n_items, device=scores.device))
    positions = last - (keys.topk(min(k, n_items), dim=1).values & 0xFFFFFFFF)
    best = scores.gather(1, positions)
    if n_items < k:
        gap = (n_users, k - n_items)
        positions = torch.cat([positions, positions.new_full(gap, NO_ITEM)], 1)
        best = torch.cat([best, best.new_full(gap, float("-inf"))], 1)
    return positions.where(best > float("-inf"), NO_ITEM), best


def masked_top_k(scores: Tensor, masked: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`top_k` after taking some pairs out of the running.

    Args:
        scores: ``[U, I]`` float32; changed in place.
        masked: (rows, positions) of the pairs, int64 each.
        k: K.
    """
    scores[masked] = float("-inf")
    return top_k(scores, k)


Mask = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first, last + 1) of a stretch of users -> (rows, positions) of their masked pairs."""


def mask_of(seen: Jagged, device: torch.device) -> Mask:
    """Masks each user's seen items.

    Args:
        seen: item positions of each user, in the users' order; negative ones are left out.
        device: where the scores are.
    """

    def of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        low, high = int(seen.offsets[begin]), int(seen.offsets[end])
        positions = torch.from_numpy(seen.values[low:high]).long()
        lengths = torch.from_numpy(seen.lengths[begin:end])
        rows = torch.repeat_interleave(torch.arange(end - begin), lengths)
        known = positions >= 0
        return rows[known].to(device), positions[known].to(device)

    return of
