"""Negatives: uniform over the items a user has not interacted with, without rejection."""

from typing import Any

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged
from deepfm_dist.seeding import mix

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of a counter whose mixed values are independent words
_WINDOW = 15
"""Seen items around the guessed position; four comparisons resolve them."""


def draw_per_positive(
    positives: Int64Array,
    slots: npt.NDArray[np.integer],
    users: Int32Array,
    per_positive: int,
    history: Jagged,
    n_items: int,
    seed: int,
    weights: Int64Array | None = None,
) -> Int32Array:
    """Draws the negatives of (positive, slot) pairs: a pure function of its arguments.

    The ``per_positive`` negatives of one positive are distinct. The user's unseen items, in item
    order and rotated by a random offset, are divided into that many ranges, and one item is drawn
    from each: every unseen item is equally likely. If a user has fewer unseen items, each is the
    negative of one slot, and the remaining slots have none.

    Args:
        positives: ``[m]`` number of the positive each negative belongs to.
        slots: ``[m]`` number of the negative, in ``[0, per_positive)``.
        users: ``[m]`` the positive's user, a row of ``history``.
        per_positive: negatives per positive.
        history: each user's items to avoid, ascending and distinct, in ``[0, n_items)``.
        n_items: number of items.
        seed: the seed of this epoch's draws.
        weights: ``[n_items]`` int64 of `item_weights`, to draw in proportion to; default: uniform.

    Returns:
        ``[m]`` int32 items; -1 for a slot that has none.
    """
    out = np.full(len(positives), -1, np.int32)
    put_negatives(
        out,
        positives,
        slots.astype(np.int64) + 1,
        users,
        per_positive,
        history=history,
        n_items=n_items,
        seed=seed,
        weights=weights,
    )
    return out


def put_negatives(
    out: Int32Array,
    positives: Int64Array,
    slots: Int64Array,
    users: Int32Array,
    per_positive: int,
    history: Jagged,
    n_items: int,
    seed: int,
    weights: Int64Array | None = None,
    first_item: int = 0,
) -> None:
    """Writes the results of `draw_per_positive` into a batch.

    Args:
        out: ``[m]`` int32: the batch's items, those of its positives given.
        positives: ``[m]`` number of the positive that each row is or belongs to.
        slots: ``[m]`` 0 for a positive, which stays, and k + 1 for its negative k. If the user has
            fewer than k + 1 unseen items, the row stays, too.
        users: ``[m]`` the positive's user, a row of ``history``.
        per_positive: negatives per positive.
        history: as above.
        n_items: number of items.
        seed: the seed of this epoch's draws.
        weights: as above.
        first_item: offset added to the drawn items.
    """
    # Keeps the array non-empty if no user has seen any item.
    values = history.values if len(history.values) else np.zeros(1, np.int32)
    flat = (history.offsets, values)
    if weights is not None:
        total = np.concatenate([[0], np.cumsum(weights)])
        _draw_weighted(out, positives, slots, users, *flat, total, seed, first_item)
    else:
        _draw_per_positive(
            out, positives, slots, users, per_positive, *flat, n_items, seed, first_item
        )


def item_weights(counts: Int64Array, power: float) -> Int64Array:
    """``[items]`` training positives -> ``[items]`` int64 in proportion to counts ** power.

    They are at least 1 and their sum is below 2**31 + items, so that sums are exact.
    """
    raw = np.maximum(counts, 1).astype(np.float64) ** power
    scaled: Int64Array = np.maximum(1, np.floor(raw * (2.0**31 / raw.sum()))).astype(np.int64)
    return scaled


def draw_with_replacement(n: int, weights: Int64Array, seed: int) -> Int32Array:
    """``[n]`` int32 items, each drawn in proportion to ``[items]`` int64 weights."""
    total = np.cumsum(weights)
    targets: Int64Array = _targets(n, int(total[-1]), seed)
    return np.searchsorted(total, targets, "right").astype(np.int32)


def draw_distinct(
    per_user: int, history: Jagged, n_items: int, seed: int, users: Int64Array | None = None
) -> Int32Array:
    """``per_user`` distinct negatives for every user.

    Args:
        per_user: negatives per user.
        history: each user's items to avoid, ascending and distinct, in ``[0, n_items)``.
        n_items: number of items.
        seed: the seed of the draws.
        users: ``[users]`` number of each row of ``history`` that seeds its draws; default: its
            index.

    Returns:
        ``[users, per_user]`` int32 items; -1 after the last one if a user has fewer unseen items.

    Source: rejection if most items are unseen; otherwise sampling without replacement by Floyd's
        algorithm (Bentley, Floyd, 1987) over the ranks of the unseen items.
    """
    keys = np.arange(len(history)) if users is None else users
    out: Int32Array = _draw_distinct(per_user, history.offsets, history.values, n_items, seed, keys)
    return out


def users_short_of_negatives(
    wanted: int, history: Jagged, users: npt.NDArray[np.integer], n_items: int
) -> int:
    """Number of users with fewer unseen items than requested negatives.

    Args:
        wanted: number of distinct negatives.
        history: each user's distinct items to avoid.
        users: ``[m]`` users to draw for; counted once each.
        n_items: number of items.
    """
    short = n_items - history.lengths[users] < wanted
    return len(np.unique(users[short]))


@compiled
def _below(word: Any, bound: int) -> Any:
    """Maps a random 64-bit word to [0, bound); deviates from uniform by less than bound / 2**32."""
    return np.int64(((word >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def _targets(n: int, bound: int, seed: int) -> Int64Array:
    out = np.empty(n, np.int64)
    word = mix(np.uint64(seed))
    for i in range(n):
        word += _STEP
        out[i] = _below(mix(word), bound)
    return out


@compiled
def _guess(rank: int, n: int, n_items: int) -> Any:
    """Estimates the number of seen items before the rank-th unseen one, as if evenly spread."""
    place = np.int64(np.float64(rank) * n / (n_items - n))
    return max(0, min(place, n - 1))


@compiled
def _unseen(rank: int, seen: Int32Array, begin: int, end: int, n_items: int) -> Any:
    """The rank-th item that is not in ``seen[begin:end]``."""
    if begin == end:
        return rank
    guess = begin + _guess(rank, end - begin, n_items)
    return _unseen_near(rank, seen, begin, end, guess, seen[guess])


@compiled
def _unseen_near(
    rank: int, seen: Int32Array, begin: int, end: int, guess: int, at_guess: int
) -> Any:
    """The same, searched from ``seen[guess]``, which is ``at_guess``.

    There are ``seen[j] - j`` unseen items below the j-th seen one; a galloping binary search from
    the guess finds the number of seen items before the requested one.
    """
    low, high = begin, end
    if high - low > 8:
        step = 4
        if at_guess - (guess - begin) <= rank:
            low = guess + 1
            while low + step < end and seen[low + step] - (low + step - begin) <= rank:
                low += step + 1
                step *= 2
            high = min(end, low + step)
        else:
            high = guess
            while high - step > begin and seen[high - step] - (high - step - begin) > rank:
                high -= step
                step *= 2
            low = max(begin, high - step)
    while low < high:
        middle = (low + high) // 2
        if seen[middle] - (middle - begin) <= rank:
            low = middle + 1
        else:
            high = middle
    return rank + low - begin


@compiled
def _quotient(a: int, b: int) -> Any:
    """The exact floor of a / b for 0 <= a < 2**53, by float division, which vectorises."""
    return np.int64(np.float64(a) / np.float64(b))


@compiled
def _draw_per_positive(
    out: Int32Array,
    positives: Int64Array,
    slots: Int64Array,
    users: Int32Array,
    per_positive: int,
    offsets: Int64Array,
    seen: Int32Array,
    n_items: int,
    seed: int,
    first_item: int,
) -> None:
    """Works in several passes, each arithmetic or memory-bound, all but the last branch-free.

    Each pass is vectorised over rows. Arithmetic passes use few arrays, since LLVM does not
    vectorise if it would need too many overlap checks. Searching row by row would wait for memory
    at every comparison.
    """
    size, n, last = len(slots), 0, len(seen) - 1
    rows, begins, ends = np.empty_like(slots), np.empty_like(slots), np.empty_like(slots)
    words, parts = np.empty(size, np.uint64), np.empty(size, np.int64)
    for i in range(size):
        begins[n], ends[n] = offsets[users[i]], offsets[users[i] + 1]
        rows[n], words[n], parts[n] = i, positives[i], slots[i]
        free = n_items - (ends[n] - begins[n])
        n += (slots[i] > 0) & (slots[i] <= free)  # slots of other rows are overwritten
    key = mix(np.uint64(seed))
    again, ranks = np.empty(n, np.uint64), np.empty(n, np.int64)
    for i in range(n):
        words[i] = mix(key ^ words[i])
    for i in range(n):
        again[i] = mix(words[i] ^ np.uint64(parts[i]))
    for i in range(n):
        ranks[i] = n_items - (ends[i] - begins[i])
    for i in range(n):
        free = ranks[i]
        n_parts = min(per_positive, free)
        low = _quotient((parts[i] - 1) * free, n_parts)
        high = _quotient(parts[i] * free, n_parts)
        rank = low + _below(again[i], high - low) + _below(words[i], free)
        ranks[i] = rank - free if rank >= free else rank
    guesses, looked = np.empty(n, np.int64), np.empty(n, np.int32)
    for i in range(n):
        guesses[i] = min(begins[i] + _guess(ranks[i], ends[i] - begins[i], n_items), last)
    for i in range(n):
        looked[i] = seen[guesses[i]]
    for i in range(n):  # a window around a better guess, corrected by the error of the first one
        begin, end = begins[i], ends[i]
        off = ranks[i] - (looked[i] - (guesses[i] - begin))
        better = guesses[i] + np.int64(np.float64(off) * (end - begin) / (n_items - (end - begin)))
        guesses[i] = max(begin, min(better - _WINDOW // 2, end - _WINDOW))
    places = guesses.copy()
    for half in (8, 4, 2, 1):
        for i in range(n):
            looked[i] = seen[min(places[i] + half - 1, last)]
        for i in range(n):
            middle = places[i] + half - 1
            below = looked[i] - (middle - begins[i]) <= ranks[i]
            places[i] += half * (below & (middle < ends[i]))
    for i in range(n):
        rank, begin, end, place = ranks[i], begins[i], ends[i], places[i]
        item = rank + place - begin
        left, right = place == guesses[i], place == guesses[i] + _WINDOW
        if (left and place > begin) or (right and place < end):  # possibly beyond the window
            place = min(place, end - 1)
            item = _unseen_near(rank, seen, begin, end, place, seen[place])
        out[rows[i]] = first_item + item


@compiled
def _draw_distinct(
    per_user: int, offsets: Int64Array, seen: Int32Array, n_items: int, seed: int, keys: Int64Array
) -> Int32Array:
    n_users = len(offsets) - 1
    out = np.full((n_users, per_user), -1, np.int32)
    taken_by = np.full(n_items, -1, np.int32)  # item, or rank of an unseen one -> last user
    key = mix(np.uint64(seed))
    for user in range(n_users):
        begin, end = offsets[user], offsets[user + 1]
        free = n_items - (end - begin)
        n_drawn = min(per_user, free)
        word = mix(key ^ np.uint64(keys[user]))
        if 2 * (end - begin + per_user) <= n_items:  # rare, since most items are unseen
            for j in range(begin, end):
                taken_by[seen[j]] = user
            for k in range(per_user):
                while True:
                    word += _STEP
                    item = _below(mix(word), n_items)
                    if taken_by[item] != user:
                        break
                taken_by[item] = user
                out[user, k] = item
            continue
        for k in range(n_drawn):
            last = free - n_drawn + k
            word += _STEP
            rank = _below(mix(word), last + 1)
            if taken_by[rank] == user:
                rank = last
            taken_by[rank] = user
            out[user, k] = _unseen(rank, seen, begin, end, n_items)
    return out


@compiled
def _weighted(target: int, seen: Int32Array, begin: int, end: int, total: Int64Array) -> int:
    """The unseen item at ``target`` on the cumulative weights of unseen items.

    ``total[i]`` is the weight of the items below i.
    """
    for j in range(begin, end):  # targets at or above a seen item move up by its weight
        if target < total[seen[j]]:
            break
        target += total[seen[j] + 1] - total[seen[j]]
    low, high = 0, len(total) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if total[middle] <= target:
            low = middle
        else:
            high = middle
    return low


@compiled
def _draw_weighted(
    out: Int32Array,
    positives: Int64Array,
    slots: Int64Array,
    users: Int32Array,
    offsets: Int64Array,
    seen: Int32Array,
    total: Int64Array,
    seed: int,
    first_item: int,
) -> None:
    """Draws without replacement: later slots avoid the draws of earlier slots of the positive."""
    key = mix(np.uint64(seed))
    for i in range(len(positives)):
        if slots[i] == 0:
            continue
        begin, end = offsets[users[i]], offsets[users[i] + 1]
        if slots[i] > len(total) - 1 - (end - begin):
            continue
        avoid = np.empty(end - begin + slots[i] - 1, np.int32)
        free = total[-1]
        for j in range(begin, end):
            avoid[j - begin] = seen[j]  # not a slice: see `seeding._permuted`
            free -= total[seen[j] + 1] - total[seen[j]]
        word = mix(key ^ np.uint64(positives[i]))
        n = end - begin
        item = 0
        for _ in range(slots[i]):
            word = mix(word)
            item = _weighted(_below(word, free), avoid, 0, n, total)
            free -= total[item + 1] - total[item]
            if n < len(avoid):
                at = n
                while at > 0 and avoid[at - 1] > item:
                    avoid[at] = avoid[at - 1]
                    at -= 1
                avoid[at] = item
                n += 1
        out[i] = first_item + item
