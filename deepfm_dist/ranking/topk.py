"""The best K items of each user: seen ones masked, ties by position."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.float_order import sortable

NO_ITEM = -1
"""Position in the empty slots of users with fewer than K candidates."""
NO_KEY = -(2**63)
"""Key of an empty slot, below that of any item."""
_LAST = 2**32 - 1
_LEAST = -0x7F800000
"""Sort key of the smallest finite float32."""


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best positions of each row; equal scores in the order of their positions.

    Args:
        scores: ``[U, I]`` float32; ``-inf`` excludes an item.
        k: K.

    Returns:
        positions ``[U, K]`` int64 and scores ``[U, K]``, best first; slots without a candidate hold
        `NO_ITEM` and ``-inf``.
    """
    n_items = scores.shape[1]
    keys = keys_of(scores, torch.arange(n_items, device=scores.device))
    best, positions = best_of_keys(keys, k)
    return positions, best


def keys_of(scores: Tensor, positions: Tensor) -> Tensor:
    """Distinct int64 keys in the order of a ranking: by score, equal ones by position.

    Args:
        scores: float32; ``-inf`` excludes an item.
        positions: int64 in [0, 2^32), of the same shape or one that broadcasts to it; ignored for
            excluded items.
    """
    ordered = sortable((scores + 0.0).view(torch.int32)).to(torch.int64)
    return (ordered << 32) | ((_LAST - positions) & _LAST)


def best_of_keys(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K highest of each row of keys.

    Args:
        keys: ``[U, n]`` of `keys_of`; a key below that of every score is an empty slot.
        k: K.

    Returns:
        scores ``[U, K]`` float32 and positions ``[U, K]`` int64, best first; slots without an item
        hold ``-inf`` and `NO_ITEM`.
    """
    top = keys.topk(min(k, keys.shape[1]), dim=1).values
    if top.shape[1] < k:
        gap = top.new_full((len(top), k - top.shape[1]), NO_KEY)
        top = torch.cat([top, gap], 1)
    known = top >= _LEAST << 32
    scores = sortable((top >> 32).to(torch.int32)).view(torch.float32)
    return (
        scores.where(known, float("-inf")),
        (_LAST - (top & _LAST)).where(known, NO_ITEM),
    )


def masked_top_k(scores: Tensor, masked: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`top_k` with some pairs masked.

    Args:
        scores: ``[U, I]`` float32; changed in place.
        masked: (rows, positions) of the pairs, int64 each.
        k: K.
    """
    scores[masked] = float("-inf")
    return top_k(scores, k)


Mask = Callable[[int, int], tuple[Tensor, Tensor]]
"""Maps (first, last + 1) of some users to (rows, positions) of their masked pairs, int64 each."""


def mask_of(seen: Jagged, device: torch.device, offset: int, n_items: int) -> Mask:
    """Masks each user's seen items among some items.

    They are selected on the host: on a GPU the number of pairs would have to be read back.

    Args:
        seen: item positions of each user, in the users' order; negative ones are left out.
        device: where the scores are.
        offset: position of the first item, from which the returned positions count.
        n_items: number of items.
    """

    def of(begin: int, end: int) -> tuple[Tensor, Tensor]:
        low, high = int(seen.offsets[begin]), int(seen.offsets[end])
        positions = torch.from_numpy(seen.values[low:high]).long() - offset
        lengths = torch.from_numpy(seen.lengths[begin:end])
        rows = torch.repeat_interleave(torch.arange(end - begin), lengths)
        here = (positions >= 0) & (positions < n_items)
        return rows[here].to(device), positions[here].to(device)

    return of
