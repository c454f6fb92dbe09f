"""Split methods: pure functions of the rows' order, users, times and the seed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int64Array, grouped
from deepfm_dist.data.manifest import FOLD_IN, TEST, TRAIN, VALID
from deepfm_dist.data.schema import Split

SplitIds = npt.NDArray[np.int8]
SortKeys = tuple[Int64Array, ...]
"""Sort keys of rows, most significant first."""

Bound = tuple[int, ...]
"""The keys of one row."""

_DIGIT_BITS = 16
DIGITS = 1 << _DIGIT_BITS


def held_out_shares(split: Split) -> tuple[float, float]:
    """The shares of valid and test; 0 if they have their own files."""
    return 0.0 if split.valid_file else split.valid, 0.0 if split.test_file else split.test


def split_by_user(
    split: Split,
    users: npt.NDArray[np.integer],
    n_users: int,
    keys: Int64Array,
) -> SplitIds:
    """per_user and leave_last: each user's last rows by key are held out.

    Args:
        split: the method and the sizes.
        users: ``[n]`` in ``[0, n_users)``.
        n_users: number of users.
        keys: ``[n]`` times, or hashes; rows with equal ones keep their order.

    Returns:
        ``[n]`` int8: 0 train, 1 valid, 2 test. A user's only row is never held out.
    """
    valid, test = held_out_shares(split)
    offsets, order = grouped(users, n_users)
    sort_groups(offsets, order, keys)
    sizes = np.diff(offsets)
    if split.method == "per_user":
        n_valid, n_test = np.rint(sizes * valid), np.rint(sizes * test)
    else:
        n_valid, n_test = np.full(n_users, valid), np.full(n_users, test)
    n_test = np.minimum(n_test, np.maximum(sizes - 1, 0)).astype(np.int64)
    n_valid = np.minimum(n_valid, np.maximum(sizes - 1 - n_test, 0)).astype(np.int64)
    parts = np.zeros(len(users), np.int8)
    _mark_last(offsets, order, n_valid, n_test, parts)
    return parts


def fold_in(
    share: float,
    users: npt.NDArray[np.integer],
    n_users: int,
    keys: Int64Array,
    parts: SplitIds,
) -> SplitIds:
    """Selects the known rows of held-out users: the first ones by key.

    Args:
        share: the share of each user's rows; at least one is held out, and at least one is not.
        users: ``[n]`` in ``[0, n_users)``, at least two rows each.
        n_users: number of users.
        keys: ``[n]`` hashes.
        parts: ``[n]`` int8 the user's split.

    Returns:
        ``[n]`` int8: the user's split, or `FOLD_IN`.
    """
    offsets, order = grouped(users, n_users)
    sort_groups(offsets, order, keys)
    # Rounds up products just below an integer: 0.2 * 10 rows are 2.
    n_held_out = np.floor((1 - share) * np.diff(offsets) + 1e-9).astype(np.int64)
    n_held_out = np.clip(n_held_out, 1, np.maximum(np.diff(offsets) - 1, 1))
    ends = np.repeat(offsets[1:], np.diff(offsets))
    is_held_out = np.arange(len(users)) >= ends - np.repeat(n_held_out, np.diff(offsets))
    split = np.full(len(users), FOLD_IN, np.int8)
    rows = order[is_held_out]
    split[rows] = parts[rows]
    return split


def split_at_bounds(keyed: SortKeys, bounds: tuple[Bound, Bound]) -> SplitIds:
    """Methods random and temporal: rows from a bound on are held out.

    Rows equal in every key (rare for 64-bit hashes) stay together.

    Args:
        keyed: the rows' keys.
        bounds: keys of the first validation row and of the first test row.
    """
    parts = np.zeros(len(keyed[0]), np.int8)
    for part, bound in zip((VALID, TEST), bounds, strict=True):
        held_out = np.ones(len(parts), bool)  # equal in every key: the bound itself
        for keys, key in zip(reversed(keyed), reversed(bound), strict=True):
            held_out = (keys > key) | ((keys == key) & held_out)
        parts[held_out] = part
    return parts


@dataclass(frozen=True)
class Digit:
    """A step of the search for a bound: the histogram of the next digit of the rows' keys.

    Attributes:
        bound: the known first keys of the bound.
        prefix: the known digits of its next key.
        shift: number of bits of that key after the requested digit.
    """

    bound: Bound
    prefix: int
    shift: int

    def counts(self, keyed: SortKeys) -> Int64Array:
        """``[2**16]``: by digit, the number of rows that match the known keys and digits."""
        same = np.ones(len(keyed[0]), bool)
        for keys, key in zip(keyed, self.bound, strict=False):
            same &= keys == key
        values = keyed[len(self.bound)][same] if self.bound else keyed[0]
        words = values.view(np.uint64) ^ np.uint64(1 << 63)  # the order of signed numbers
        if self.shift < 64 - _DIGIT_BITS:
            words = words[words >> np.uint64(self.shift + _DIGIT_BITS) == self.prefix]
        digits = (words >> np.uint64(self.shift)).astype(np.int64) & (DIGITS - 1)
        return np.bincount(digits, minlength=DIGITS)


FIRST_DIGIT = Digit((), 0, 64 - _DIGIT_BITS)
"""The first step of a search."""


def split_bounds(
    split: Split, n: int, count: Callable[[Digit], Int64Array], n_keys: int = 2
) -> tuple[Bound, Bound]:
    """The keys at which held-out rows begin.

    Found by radix selection without sorting: histograms narrow the bound down digit by digit.

    Args:
        split: the sizes, shares of ``n``.
        n: number of rows.
        count: sums `Digit.counts` over all rows.
        n_keys: number of keys of a row.

    Returns:
        Keys of the first validation row and of the first test row.
    """
    valid, test = held_out_shares(split)
    n_test = split.number(test, n)
    bounds: list[Bound] = []
    for last in (n_test + split.number(valid, n), n_test):
        bound: Bound = () if last else (np.iinfo(np.int64).max,) * n_keys
        while len(bound) < n_keys:
            key, above = _from_top(count, bound, last)
            bound, last = (*bound, key), last - above
        bounds.append(bound)
    return bounds[0], bounds[1]


def _from_top(count: Callable[[Digit], Int64Array], bound: Bound, k: int) -> tuple[int, int]:
    """The k-th largest next key of rows with a bound's first keys; number of larger ones.

    Args:
        count: see `split_bounds`.
        bound: the first keys.
        k: from 1.
    """
    prefix, above = 0, 0
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        from_top = np.cumsum(count(Digit(bound, prefix, shift))[::-1])
        place = int(np.searchsorted(from_top, k - above))
        above += int(from_top[place - 1]) if place else 0
        prefix = prefix << _DIGIT_BITS | (DIGITS - 1 - place)
    return prefix - (1 << 63), above


def sort_groups(offsets: Int64Array, order: Int64Array, keys: Int64Array) -> None:
    """Sorts each group of `jagged.grouped` by key, in place; equal rows keep their order.

    Args:
        offsets: the offsets of the groups.
        order: ``[n]`` rows, group by group.
        keys: ``[n]`` of the rows.
    """
    _sort_groups(offsets, order, keys)


def splits_by_time(
    parts: SplitIds,
    users: npt.NDArray[np.integer],
    times: Int64Array,
    other_users: npt.NDArray[np.integer],
    other_times: Int64Array,
    n_users: int,
) -> SplitIds:
    """Splits of other rows of the same users under leave_last, by time.

    Rows before a user's first held-out row are known when it is predicted; rows at its time or
    later are not.

    Args:
        parts: ``[n]`` splits of the rows.
        users: ``[n]`` in ``[0, n_users)``.
        times: ``[n]``.
        other_users: ``[m]`` of the other rows.
        other_times: ``[m]``.
        n_users: number of users.

    Returns:
        ``[m]`` int8.
    """
    split = np.zeros(len(other_users), np.int8)
    for part in (VALID, TEST):
        begins = np.full(n_users, np.iinfo(np.int64).max)
        at = parts == part
        np.minimum.at(begins, users[at], times[at])
        split[other_times >= begins[other_users]] = part
    return split


def count_tied_users(
    parts: SplitIds, users: npt.NDArray[np.integer], times: Int64Array
) -> tuple[int, int]:
    """Number of users whose held-out rows tie with earlier ones, and of all with any."""
    n_users = int(users.max(initial=-1)) + 1
    tied = np.zeros(n_users, bool)
    for part in (VALID, TEST):
        begins = np.full(n_users, np.iinfo(np.int64).max)
        np.minimum.at(begins, users[parts == part], times[parts == part])
        before = parts < part
        tied[users[before][times[before] == begins[users[before]]]] = True
    return int(tied.sum()), len(np.unique(users[parts != TRAIN]))


@compiled
def _sort_groups(offsets: Int64Array, order: Int64Array, keys: Int64Array) -> None:
    for g in range(len(offsets) - 1):
        group = order[offsets[g] : offsets[g + 1]]
        for i in range(1, len(group)):
            if keys[group[i]] < keys[group[i - 1]]:
                in_order = group[np.argsort(keys[group], kind="mergesort")]
                for j in range(len(group)):  # not a slice: see `seeding._permuted`
                    group[j] = in_order[j]
                break


@compiled
def _mark_last(
    offsets: Int64Array, order: Int64Array, n_valid: Int64Array, n_test: Int64Array, parts: SplitIds
) -> None:
    for g in range(len(offsets) - 1):
        end = offsets[g + 1]
        for i in range(end - n_test[g] - n_valid[g], end):
            parts[order[i]] = 2 if i >= end - n_test[g] else 1
