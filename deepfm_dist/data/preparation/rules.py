"""Order and deduplication of rows, by their contents and never by their position.

Nothing here depends on the order of files and rows, on partitions or ranks. Rows are sorted by
keys, seeded hashes of user and item or of all cells, before any rule is applied; if a rule finds
rows equal, the first one counts. Colliding keys are ordered by the cells; rows with equal cells are
interchangeable.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.codes import Hashes, argsort_words, mix_into, seeded
from deepfm_dist.data.fields import STRENGTHS
from deepfm_dist.data.jagged import Int64Array, Jagged, Values, taken
from deepfm_dist.data.preparation.job import BUCKET_BITS, Job, entity_key
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.seeding import mix

Rule = Literal["latest", "earliest", "strongest"]
_NO_CONTENT = frozenset(("key", "local", "given", "time", "whole", "billionths", "bucket"))


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
    if numbers.dtype.kind == "f":  # -0.0 and 0.0 are equal, and so are all NaNs
        numbers = np.where(np.isnan(numbers), np.nan, numbers + 0.0).astype(np.float64)
        return numbers.view(np.uint64)
    return numbers.astype(np.int64).view(np.uint64)


def coded_columns(job: Job) -> dict[str, str]:
    """The coded columns of a `PartitionRows`, with their vocabularies."""
    tables = {name: entity_key(name) for name in job.entities}
    return tables | {f"field {f.name}": f.table_name for f in job.row_fields if f.has_vocabulary}


def content_hashes(
    columns: Mapping[str, Values],
    rows: npt.NDArray[np.integer],
    hashes: Mapping[str, Hashes],
    seed: int = 0,
) -> Hashes:
    """A seeded hash of rows' cells, without times.

    Args:
        columns: the columns, as in a `PartitionRows`.
        rows: ``[m]`` numbers of rows.
        hashes: see `words_of`, for each column that holds codes.
        seed: the seed of the hash.

    Returns:
        ``[m]`` uint64.
    """
    keys = np.full(len(rows), seed, np.uint64)
    for name in _content(columns):
        mix_into(keys, words_of(taken(columns[name], rows), hashes.get(name)))
    return keys


def _content(columns: Mapping[str, Values]) -> list[str]:
    """The columns with a row's contents, without time."""
    return [name for name in sorted(columns) if name not in _NO_CONTENT]


def pair_keys(users: Hashes, items: Hashes, seed: int) -> Hashes:
    """``[n]`` hashes of users and of items -> ``[n]`` keys of the pairs."""
    keys = seeded(users, seed)
    mix_into(keys, items)
    return keys


def row_order(
    part: PartitionRows, keys: Hashes, buckets: Int64Array, hashes: Mapping[str, Hashes], seed: int
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """The order of a partition's rows: by bucket, key, then contents.

    Args:
        part: the rows in any order.
        keys: ``[n]`` of the rows.
        buckets: ``[n]``, see `job.buckets_of`.
        hashes: see `words_of`, for each column that holds codes. Codes are in the order of hashes.
        seed: the seed of the order of rows with equal keys.

    Returns:
        ``[n]`` int64 row numbers, and ``[n]`` bool: whether cells and time equal those of the
        previous row.
    """
    words = buckets.astype(np.uint64) << np.uint64(64 - BUCKET_BITS) | keys >> np.uint64(
        BUCKET_BITS
    )
    order = argsort_words(words)
    again = np.zeros(len(order), bool)
    in_order = words[order]
    equal = in_order[1:] == in_order[:-1]
    places = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
    if len(places):
        rows = order[places]
        pair = [part[name][rows] for name in ("user", "item") if name in part]
        cells = [*pair, *_cells(part, rows)]
        content = content_hashes(part.columns, rows, hashes, seed)
        by = [words[rows], keys[rows], *pair, content, *cells, part["given"][rows]]
        at = np.lexsort(tuple(reversed(by)))
        order[places] = rows[at]
        same = np.append(False, equal[places[1:] - 1])
        for column in cells:
            same[1:] &= column[at][1:] == column[at][:-1]
        again[places] = same
    return order, again


def _cells(part: PartitionRows, rows: Int64Array) -> list[npt.NDArray[Any]]:
    """Times and cells of rows as numbers and codes."""
    words = [part["time"][rows]] if "time" in part else []
    for name in _content(part.columns):
        values = taken(part[name], rows)
        words += [values.lengths] if isinstance(values, Jagged) else []
        words.append(words_of(values, None))
    return words


def occurrences(again: npt.NDArray[np.bool_]) -> Int64Array:
    """``[n]`` int64: number of directly preceding rows that are equal."""
    places = np.arange(len(again))
    return places - np.maximum.accumulate(np.where(again, 0, places))


def one_per_pair(
    part: PartitionRows, rule: Rule, hashes: Mapping[str, Hashes]
) -> tuple[npt.NDArray[np.bool_], int]:
    """Selects the row of each (user, item) to keep.

    Rows given to an earlier split take precedence over a later one, so that training pairs are not
    repeated in the test. Then the rule decides: ``latest`` and ``earliest`` by time, then strength;
    ``strongest`` by strength, then time. Ties are decided by the order of the rows.

    Args:
        part: rows of a partition; those of one user and item are adjacent.
        rule: ``data.interactions.repeated``.
        hashes: see `words_of`, for each column that holds codes.

    Returns:
        ``[n]`` bool, and the number of pairs in which order decided between different rows.
    """
    begins = np.ones(len(part), bool)
    if len(part):
        begins[1:] = (np.diff(part["user"]) != 0) | (np.diff(part["item"]) != 0)
    keep = begins & np.append(begins[1:], True)
    again = np.flatnonzero(~keep)
    if len(again) == 0:
        return keep, 0
    strengths = [-part[name][again].astype(np.float64) for name in STRENGTHS if name in part]
    times = [part["time"][again]] if "time" in part else []
    if rule != "earliest":
        times = [-time for time in times]
    by_rule = [*strengths, *times] if rule == "strongest" else [*times, *strengths]
    pairs = np.cumsum(begins[again])
    best = _leading([pairs, part["given"][again], *by_rule])
    first = np.diff(pairs[best], prepend=-1) != 0
    keep[again[best[first]]] = True
    content = content_hashes(part.columns, again[best], hashes)
    run = np.cumsum(first) - 1
    differ = content != content[np.flatnonzero(first)[run]]
    return keep, len(np.unique(run[differ]))


def _leading(keys: Sequence[npt.NDArray[Any]]) -> Int64Array:
    """Ascending indices of the rows in each group (the first key) with its smallest other keys.

    If several rows are equal in every key, all of them.
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


def latest_rows(
    entities: npt.NDArray[np.integer],
    times: Int64Array,
    words: Hashes,
    says: npt.NDArray[np.bool_],
    n: int,
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """The row that provides a field's value for each user or item.

    It is the latest row with a value; among several at that time, the one with the smallest word.

    Args:
        entities: ``[m]`` codes of users or items, in ``[0, n)``.
        times: ``[m]``.
        words: ``[m]`` seeded hash of each row's value.
        says: ``[m]`` whether a row has a value.
        n: number of users or items.

    Returns:
        ``[n]`` int64 row numbers, -1 if no row has a value; ``[n]`` bool: whether rows have
        different values.
    """
    latest: tuple[Int64Array, npt.NDArray[np.bool_]] = _latest_rows(entities, times, words, says, n)
    return latest


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
def _folded(offsets: Int64Array, words: Hashes) -> Hashes:
    out = np.empty(len(offsets) - 1, np.uint64)
    for r in range(len(out)):
        word = np.uint64(offsets[r + 1] - offsets[r])
        for i in range(offsets[r], offsets[r + 1]):
            word = mix(word ^ words[i])
        out[r] = word
    return out
