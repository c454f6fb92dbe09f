"""Stateless seeds and shuffles: pure functions, the same on every rank and after a resume."""

from functools import partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled

IntArray = npt.NDArray[np.int64]

_ROUNDS = 6


@partial(compiled, signature=numba.uint64(numba.uint64))
def mix(x: Any) -> Any:
    """SplitMix64's finaliser, a bijection of 64-bit words with good mixing.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def round_keys(seed: int) -> Any:
    """``[6]`` uint64 round keys of `permute`."""
    keys = np.empty(_ROUNDS, np.uint64)
    key = mix(np.uint64(seed))
    for r in range(_ROUNDS):
        key = mix(key)
        keys[r] = key
    return keys


@compiled
def half_bits(n: int) -> int:
    """Half the number of bits of the words in `permute`, for ``range(n)``."""
    bits = 0
    while (n - 1) >> bits > 0:
        bits += 1
    return max(1, (bits + 1) // 2)


@compiled
def _rounds(words: Any, keys: Any, shift: Any) -> None:
    """One pass through the Feistel network for all words; branch-free, so that it vectorises."""
    mask = (np.uint64(1) << shift) - np.uint64(1)
    k0, k1, k2, k3, k4, k5 = keys[0], keys[1], keys[2], keys[3], keys[4], keys[5]
    for i in range(len(words)):
        left, right = words[i] >> shift, words[i] & mask
        left ^= mix(right ^ k0) & mask
        right ^= mix(left ^ k1) & mask
        left ^= mix(right ^ k2) & mask
        right ^= mix(left ^ k3) & mask
        left ^= mix(right ^ k4) & mask
        right ^= mix(left ^ k5) & mask
        words[i] = (left << shift) | right


@compiled
def _permuted(words: Any, n: int, seed: int) -> IntArray:
    keys, shift = round_keys(seed), np.uint64(half_bits(n))
    _rounds(words, keys, shift)
    end = np.uint64(n)
    outside = np.empty(len(words), np.int64)
    left = 0
    for i in range(len(words)):
        outside[left] = i  # overwritten by the next one unless kept: no branch to predict
        left += words[i] >= end
    while left:  # walk the cycle until it is back inside: at most 4 steps on average
        walking = words[outside[:left]]
        _rounds(walking, keys, shift)
        n_walked, left = left, 0
        for i in range(n_walked):  # numba takes seconds to compile a slice assignment
            words[outside[i]] = walking[i]
            outside[left] = outside[i]
            left += walking[i] >= end
    return words.view(np.int64)


@compiled
def permuted_range(low: int, high: int, n: int, seed: int) -> IntArray:
    """`permute` of ``low`` to ``high`` (excluded), without checks, for compiled code."""
    return _permuted(np.arange(low, high).view(np.uint64), n, seed)


def permute(indices: npt.ArrayLike, n: int, seed: int) -> IntArray:
    """Where a seeded shuffle of ``range(n)`` sends each index.

    Args:
        indices: ``[m]`` integers in ``[0, n)``.
        n: size of the range.
        seed: any non-negative 64-bit integer; different seeds give different bijections.

    Returns:
        ``[m]`` int64 in ``[0, n)``; over all of ``range(n)``, each value occurs once.

    Raises:
        ValueError: an index is outside ``[0, n)``.

    Source: a balanced Feistel network (Luby, Rackoff, 1988) restricted to ``range(n)`` by
    cycle walking (Black, Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    array = np.ascontiguousarray(indices, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= n):
        raise ValueError(f"indices must be in [0, {n}), got {array.min()}..{array.max()}")
    result: IntArray = _permuted(array.ravel().astype(np.uint64), n, seed)
    return result.reshape(array.shape)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from several values, for independent draws by purpose, epoch and row."""
    seed = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(part.encode(), "little")
        while True:  # consume long values 64 bits at a time
            seed = int(mix(np.uint64(seed ^ (part & 0xFFFFFFFFFFFFFFFF))))
            part >>= 64
            if part == 0:
                break
    return seed >> 1
