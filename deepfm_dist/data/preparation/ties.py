"""Which of several rows stays, and in which order equal rows come: by what they say.

Nothing here depends on the order of files and rows, on partitions or ranks. Where everything
that a rule compares is equal, a seeded hash of the rows' cells decides; rows whose cells are equal
too are interchangeable.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.codes import Hashes
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, Values, grouped, taken
from deepfm_dist.data.preparation.spill import Part
from deepfm_dist.data.split import TieKeys
from deepfm_dist.seeding import mix

Rule = Literal["latest", "earliest", "strongest"]
_STRENGTHS = ("strength", "rating", "label", "weight")
"""Columns of a `Part` that say how much a row counts, the most significant first."""


def words_of(values: Values, hashes: Hashes | None) -> Hashes:
    """One 64-bit word for each value of a column.

    Args:
        values: ``[n]`` numbers, codes or bags of codes.
        hashes: hash of each code, and a last one for no value (-1); None: the numbers themselves.
    """
    if isinstance(values, Jagged):
        flat = values.values.astype(np.int64).view(np.uint64)
        return _folded(values.offsets, flat if hashes is None else hashes[values.values])
    if hashes is not None:
        return hashes[values]
    numbers: npt.NDArray[Any] = np.asarray(values)
    if numbers.dtype.kind == "f":  # 0.0 and -0.0 are one number, and so are all NaNs
        numbers = np.where(np.isnan(numbers), np.nan, numbers + 0.0).astype(np.float64)
        return numbers.view(np.uint64)
    return numbers.astype(np.int64).view(np.uint64)


def content_keys(
    part: Part, rows: Int64Array, hashes: Mapping[str, Hashes], seed: int
) -> npt.NDArray[np.uint64]:
    """A seeded hash of some rows' cells.

    Args:
        part: the partition.
        rows: ``[m]`` numbers of its rows.
        hashes: see `words_of`, for each column of the part that holds codes.
        seed: of the hash.

    Returns:
        ``[m]`` uint64.
    """
    keys = np.full(len(rows), seed, np.uint64)
    for name in sorted(part.columns):
        # Where a row lies is not what it says, and rows that are compared have the same time.
        if name not in ("row", "local", "given", "time"):
            _mix_into(keys, words_of(taken(part[name], rows), hashes.get(name)))
    return keys


def one_per_pair(
    part: Part, n_users: int, n_items: int, rule: Rule, ties: TieKeys
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which row of each (user, item) stays.

    Rows that are given to an earlier split stay before those of a later one: what has been trained
    on is no news in the test. Then the rule decides: ``latest`` and ``earliest`` by time, then by
    strength; ``strongest`` by strength, then by time. Then ``ties`` does.

    Args:
        part: rows of a partition, with ``local`` users.
        n_users: users of the partition.
        n_items: number of items.
        rule: see there.
        ties: orders rows that the rule finds equal.

    Returns:
        ``[n]`` bool, and of how many pairs ``ties`` chose between rows that differ.
    """
    pair, keep = _first_of_pair(*grouped(part["local"], n_users), part["item"], n_items)
    again = np.flatnonzero(~keep)
    if len(again) == 0:
        return keep, 0
    strengths = [-part[name][again].astype(np.float64) for name in _STRENGTHS if name in part]
    times = [part["time"][again]] if "time" in part else []
    if rule != "earliest":
        times = [-time for time in times]
    by_rule = [*strengths, *times] if rule == "strongest" else [*times, *strengths]
    keys = [pair[again], part["given"][again], *by_rule]
    best = _leading(keys)
    alone, tied = best[~_has_equal(keys, best)], best[_has_equal(keys, best)]
    keep[again[alone]] = True
    if len(tied):
        content = ties(again[tied])
        pairs = keys[0][tied]
        order = np.lexsort((content, pairs))
        begins = np.flatnonzero(np.diff(pairs[order], prepend=-1))
        keep[again[tied[order[begins]]]] = True
        ends = np.append(begins[1:], len(order)) - 1
        differ = content[order[begins]] != content[order[ends]]
        return keep, int(differ.sum())
    return keep, 0


def _leading(keys: Sequence[npt.NDArray[Any]]) -> Int64Array:
    """Places of the rows of each group (the first key) whose other keys are its least, ascending.

    All of them, where several rows are equal in every key.
    """
    order = np.lexsort(tuple(reversed(keys)))
    same = np.ones(len(order), bool)
    for key in keys:
        same &= np.diff(key[order], prepend=key[order[:1]]) == 0
    begins = np.diff(keys[0][order], prepend=-1) != 0
    run = np.cumsum(~same | begins)
    leads = np.zeros(run[-1] + 1, bool)
    leads[run[begins]] = True
    return np.sort(order[leads[run]])


def _has_equal(keys: Sequence[npt.NDArray[Any]], best: Int64Array) -> npt.NDArray[np.bool_]:
    """Whether another of the best rows is of the same group."""
    _, inverse, counts = np.unique(keys[0][best], return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def latest_rows(
    entities: npt.NDArray[np.integer],
    times: Int64Array,
    words: Hashes,
    says: npt.NDArray[np.bool_],
    n: int,
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """The row that tells what a field says of each user or item.

    It is the latest that says something; of several at that time the one with the least word.

    Args:
        entities: ``[m]`` codes of users or items, in ``[0, n)``.
        times: ``[m]``.
        words: ``[m]`` hash of each row's value, seeded.
        says: ``[m]`` whether a row has a value.
        n: number of users or items.

    Returns:
        ``[n]`` int64 row numbers, -1 where no row says anything; ``[n]`` bool, whether rows say
        different things.
    """
    found: tuple[Int64Array, npt.NDArray[np.bool_]] = _latest_rows(entities, times, words, says, n)
    return found


@compiled
def _latest_rows(
    entities: npt.NDArray[np.integer],
    times: Int64Array,
    words: Hashes,
    says: npt.NDArray[np.bool_],
    n: int,
) -> Any:
    best = np.full(n, -1, np.int64)
    differ = np.zeros(n, np.bool_)
    for i in range(len(entities)):
        if not says[i]:
            continue
        entity = entities[i]
        b = best[entity]
        if b < 0:
            best[entity] = i
            continue
        if words[i] != words[b]:
            differ[entity] = True
        if times[i] > times[b] or (times[i] == times[b] and words[i] < words[b]):
            best[entity] = i
    return best, differ


@compiled
def _first_of_pair(offsets: Int64Array, order: Int64Array, items: Int32Array, n_items: int) -> Any:
    """``[n]`` int32, the first row with each row's group and item; ``[n]`` bool, the only ones."""
    first, alone = np.empty(len(items), np.int32), np.ones(len(items), np.bool_)
    last_group = np.full(n_items, -1, np.int64)
    row_of = np.zeros(n_items, np.int64)
    for g in range(len(offsets) - 1):
        for i in range(offsets[g], offsets[g + 1]):
            row = order[i]
            item = items[row]
            if last_group[item] != g:
                last_group[item] = g
                row_of[item] = row
            else:
                alone[row] = alone[row_of[item]] = False
            first[row] = row_of[item]
    return first, alone


def seeded(words: Hashes, seed: np.uint64) -> Hashes:
    """``[n]`` words mixed with a seed."""
    keys = np.full(len(words), seed, np.uint64)
    _mix_into(keys, words)
    return keys


@compiled
def _mix_into(keys: npt.NDArray[np.uint64], words: Hashes) -> None:
    for i in range(len(keys)):
        keys[i] = mix(keys[i] ^ words[i])


@compiled
def _folded(offsets: Int64Array, words: Hashes) -> Hashes:
    out = np.empty(len(offsets) - 1, np.uint64)
    for r in range(len(out)):
        word = np.uint64(offsets[r + 1] - offsets[r])
        for i in range(offsets[r], offsets[r + 1]):
            word = mix(word ^ words[i])
        out[r] = word
    return out
