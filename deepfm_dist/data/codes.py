"""Maps streamed texts to small integers; and a stable hash of texts."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int32Array, Int64Array
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import mix

Bytes = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]
MOST_TEXT_BYTES = (1 << 31) - 1
"""Largest total length of a table's distinct texts."""
_FEW_WORDS = 32
"""Up to this number, texts are sorted by insertion."""


class Codes:
    """Numbers texts in order of first appearance: an exact hash table in flat arrays.

    Memory grows with distinct texts only: about 24 bytes plus the text for each.
    """

    def __init__(self) -> None:
        self._n = 0
        self._used = 0  # bytes of the arena
        self._slots = np.full(1 << 12, -1, np.int32)
        self._hashes = np.zeros(1 << 11, np.uint64)
        self._ends = np.zeros((1 << 11) + 1, np.int64)  # text i is arena[ends[i]:ends[i + 1]]
        self._arena = np.zeros(1 << 15, np.uint8)

    def __len__(self) -> int:
        return self._n

    @property
    def hashes(self) -> Hashes:
        """``[n]`` uint64: `hash_texts` of each text, by code."""
        return self._hashes[: self._n]

    def encode(self, texts: pa.Array) -> Int32Array:
        """Codes of ``[n]`` string, new ones for texts not seen before; nulls get -1."""
        out = np.full(len(texts), -1, np.int32)
        offsets, data, valid = _buffers(texts)
        at = 0
        while True:
            at, self._n, self._used = _encode(
                at,
                offsets,
                data,
                valid,
                self._slots,
                self._hashes,
                self._ends,
                self._arena,
                self._n,
                self._used,
                out,
            )
            if at == len(texts):
                return out
            self._grow(int(offsets[at + 1] - offsets[at]))

    def _grow(self, wanted_bytes: int) -> None:
        if self._n == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._ends = np.concatenate([self._ends, np.zeros(self._n, np.int64)])
            self._slots = _slots_of(self._hashes[: self._n], 2 * len(self._slots))
        else:
            more = max(len(self._arena), wanted_bytes)
            self._arena = np.concatenate([self._arena, np.zeros(more, np.uint8)])

    def texts(self) -> pa.Array:
        """``[n]`` string: the text of each code.

        Raises:
            DataError: they exceed Arrow's 32-bit offsets.
        """
        offsets = self._ends[: self._n + 1]
        check_texts(self._n, self._used)
        data = pa.py_buffer(self._arena[: self._used].tobytes())
        return pa.StringArray.from_buffers(self._n, pa.py_buffer(offsets.astype(np.int32)), data)


def check_texts(n: int, n_bytes: int) -> None:
    """Refuses more text than Arrow's 32-bit offsets can address.

    Raises:
        DataError: ``n_bytes`` is too large.
    """
    if n_bytes > MOST_TEXT_BYTES:
        raise DataError(
            f"{n:,} distinct values of one table are {n_bytes:,} bytes of text, more than the "
            f"{MOST_TEXT_BYTES:,} allowed; set hash_rows for its fields, or, if they are ids of "
            f"users or items, write shorter ones"
        )


def hash_texts(texts: pa.Array) -> Hashes:
    """``[n]`` string -> ``[n]`` uint64, the same on every machine and in every version.

    Source: FNV-1a (Fowler, Noll, Vo) over the UTF-8 bytes, finished by SplitMix64's mixer.
    """
    offsets, data, _ = _buffers(texts)
    return _hash_all(offsets, data)


def seeded(words: Hashes, seed: int) -> Hashes:
    """Mixes ``[n]`` words with a seed."""
    keys = np.full(len(words), seed, np.uint64)
    mix_into(keys, words)
    return keys


def hash_order(texts: pa.Array, hashes: Hashes) -> Int64Array:
    """``[n]`` int64: the order of texts by hash, ties by code point.

    Equal texts keep their order.
    """
    order = argsort_words(hashes)
    in_order = hashes[order]
    same = np.flatnonzero(in_order[1:] == in_order[:-1])
    collisions = same[~equal_texts(texts, order[same], order[same + 1])]
    if len(collisions) == 0:
        return order
    for word in np.unique(in_order[collisions]):
        begin, end = (int(np.searchsorted(in_order, word, side)) for side in ("left", "right"))
        run = slice(begin, end)
        words = texts.take(pa.array(order[run])).to_pylist()
        order[run] = order[run][sorted(range(len(words)), key=words.__getitem__)]
    return order


def argsort_words(words: Hashes) -> Int64Array:
    """``[n]`` int64: a stable argsort of 64-bit words, fast if they are distributed like hashes.

    They are dealt by their upper bits to about n / 4 groups, which are sorted one by one.
    """
    order = np.arange(len(words))
    if len(words) > 1:
        least = words.min()
        bits = max(1, len(words).bit_length() - 3)
        shift = max(0, int(words.max() - least).bit_length() - bits)
        _sort_words(words, order, least, np.uint64(shift), 1 << bits)
    return order


def equal_texts(texts: pa.Array, one: Int64Array, other: Int64Array) -> npt.NDArray[np.bool_]:
    """``[m]`` bool: whether the texts at two lists of indices are equal.

    Args:
        texts: ``[n]`` string without nulls.
        one: ``[m]`` indices.
        other: ``[m]`` indices.
    """
    offsets, data, _ = _buffers(texts)
    equal: npt.NDArray[np.bool_] = _equal_texts(offsets, data, one, other)
    return equal


@compiled
def mix_into(keys: Hashes, words: Hashes) -> None:
    """Mixes ``[n]`` words into ``[n]`` keys, in place."""
    for i in range(len(keys)):
        keys[i] = mix(keys[i] ^ words[i])


def _buffers(texts: pa.Array) -> tuple[Int32Array, Bytes, npt.NDArray[np.bool_]]:
    _, offsets, data = texts.buffers()
    valid = np.ones(len(texts), bool)
    if texts.null_count:
        valid = np.asarray(texts.is_valid())
    if offsets is None:
        return np.zeros(len(texts) + 1, np.int32), np.zeros(0, np.uint8), valid
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return ends, np.frombuffer(data or b"", np.uint8), valid


@compiled
def _hash(data: Bytes, begin: int, end: int) -> Any:
    word = np.uint64(0xCBF29CE484222325)
    for i in range(begin, end):
        word = (word ^ np.uint64(data[i])) * np.uint64(0x100000001B3)
    return mix(word)


@compiled
def _hash_all(offsets: Int32Array, data: Bytes) -> Hashes:
    out = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(out)):
        out[i] = _hash(data, offsets[i], offsets[i + 1])
    return out


@compiled
def _sort_words(words: Hashes, order: Int64Array, least: Any, shift: Any, n_groups: int) -> None:
    ends = np.zeros(n_groups + 1, np.int64)
    for word in words:
        ends[((word - least) >> shift) + np.uint64(1)] += 1
    for g in range(n_groups):
        ends[g + 1] += ends[g]
    placed = np.empty(len(words), np.uint64)
    for i in range(len(words)):
        g = (words[i] - least) >> shift
        placed[ends[g]], order[ends[g]] = words[i], i
        ends[g] += 1
    begin = 0
    for g in range(n_groups):
        end = ends[g]
        if end - begin > _FEW_WORDS:
            by = np.argsort(placed[begin:end], kind="mergesort")
            before = order[begin:end].copy()
            for i in range(end - begin):
                order[begin + i] = before[by[i]]
        else:
            for i in range(begin + 1, end):
                word, row, k = placed[i], order[i], i
                while k > begin and placed[k - 1] > word:
                    placed[k], order[k] = placed[k - 1], order[k - 1]
                    k -= 1
                placed[k], order[k] = word, row
        begin = end


@compiled
def _equal_texts(
    offsets: Int32Array, data: Bytes, one: Int64Array, other: Int64Array
) -> npt.NDArray[np.bool_]:
    out = np.zeros(len(one), np.bool_)
    for i in range(len(one)):
        a, b = offsets[one[i]], offsets[other[i]]
        n = offsets[one[i] + 1] - a
        if offsets[other[i] + 1] - b == n:
            k = 0
            while k < n and data[a + k] == data[b + k]:
                k += 1
            out[i] = k == n
    return out


@compiled
def _encode(
    at: int,
    offsets: Int32Array,
    data: Bytes,
    valid: npt.NDArray[np.bool_],
    slots: Int32Array,
    hashes: Hashes,
    ends: Int64Array,
    arena: Bytes,
    n: int,
    used: int,
    out: Int32Array,
) -> tuple[int, int, int]:
    """Encodes from row ``at`` until the end or until the table is full; open addressing."""
    mask = np.uint64(len(slots) - 1)
    while at < len(out):
        if valid[at]:
            begin, end = offsets[at], offsets[at + 1]
            word = _hash(data, begin, end)
            place = word & mask
            while True:
                code = slots[place]
                if code < 0:
                    if n == len(hashes) or used + end - begin > len(arena):
                        return at, n, used
                    for i in range(begin, end):
                        arena[used + i - begin] = data[i]
                    used += end - begin
                    slots[place], hashes[n], ends[n + 1] = n, word, used
                    out[at] = n
                    n += 1
                    break
                if hashes[code] == word and ends[code + 1] - ends[code] == end - begin:
                    first = ends[code]
                    i = 0
                    while i < end - begin and arena[first + i] == data[begin + i]:
                        i += 1
                    if i == end - begin:
                        out[at] = code
                        break
                place = (place + np.uint64(1)) & mask
        at += 1
    return at, n, used


@compiled
def _slots_of(hashes: Hashes, size: int) -> Int32Array:
    slots = np.full(size, -1, np.int32)
    mask = np.uint64(size - 1)
    for code in range(len(hashes)):
        place = hashes[code] & mask
        while slots[place] >= 0:
            place = (place + np.uint64(1)) & mask
        slots[place] = code
    return slots
