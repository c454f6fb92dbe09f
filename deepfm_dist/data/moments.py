"""Exact, order-independent sums of floating-point numbers."""

from fractions import Fraction
from typing import Self

import numpy as np
import numpy.typing as npt

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int64Array

_EXPONENTS = 2048
_MANTISSA_BITS = 52
_LOW_BITS = 26
_LEAST_EXPONENT = -1074  # of the last bit of a float64
_MOST_SQUARED = 1e150
_SPLITTER = 134217729.0  # 2**27 + 1, of Dekker's product


class Moments:
    """Exact count, sum and sum of squares of finite float64 numbers.

    Mantissas are summed as integers, separately for each exponent, so that the sums do not depend
    on order or division into pieces. The capacity is 2**36 numbers. Squares are capped at 1e300.

    Attributes:
        n: count.

    Source: the superaccumulator of Kulisch, "Computer Arithmetic and Validity", 2008; squares by
    Dekker's product, "A floating-point technique for extending the available precision", 1971.
    """

    def __init__(self) -> None:
        self.n = 0
        self._sums = np.zeros((2, _EXPONENTS, 2), np.int64)

    def add(self, numbers: npt.NDArray[np.float64]) -> None:
        """Adds ``[n]`` finite numbers."""
        self.n += len(numbers)
        _add(self._sums, np.ascontiguousarray(numbers))

    def __add__(self, other: Self) -> Self:
        total = type(self)()
        total.n = self.n + other.n
        total._sums = self._sums + other._sums
        return total

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 of no numbers."""
        return float(self._sum(0) / max(self.n, 1))

    @property
    def variance(self) -> float:
        """The mean squared deviation from the mean, rounded once; 0 of no numbers."""
        n = max(self.n, 1)
        variance = self._sum(1) / n - (self._sum(0) / n) ** 2
        return float(variance) if variance > 0 else 0.0

    def _sum(self, power: int) -> Fraction:
        total = 0
        for exponent in np.flatnonzero(self._sums[power].any(axis=1)).tolist():
            high, low = self._sums[power, exponent].tolist()
            total += ((high << _LOW_BITS) + low) << max(exponent - 1, 0)
        return Fraction(total) / (1 << -_LEAST_EXPONENT)


@compiled
def _put(sums: Int64Array, word: int, sign: int) -> None:
    exponent = word >> _MANTISSA_BITS
    mantissa = word & ((1 << _MANTISSA_BITS) - 1)
    if exponent:
        mantissa |= 1 << _MANTISSA_BITS
    sums[exponent, 0] += sign * (mantissa >> _LOW_BITS)
    sums[exponent, 1] += sign * (mantissa & ((1 << _LOW_BITS) - 1))


@compiled
def _add(sums: Int64Array, numbers: npt.NDArray[np.float64]) -> None:
    terms = np.empty(3, np.float64)  # the number, its rounded square, and the rounding error
    words = terms.view(np.int64)
    for i in range(len(numbers)):
        x = numbers[i]
        terms[0] = x
        x = min(max(x, -_MOST_SQUARED), _MOST_SQUARED)
        scaled = _SPLITTER * x
        high = scaled - (scaled - x)
        low = x - high
        square = x * x
        terms[1] = square
        terms[2] = ((high * high - square) + 2.0 * high * low) + low * low
        for k in range(3):
            word = words[k] & 0x7FFFFFFFFFFFFFFF
            _put(sums[min(k, 1)], word, -1 if words[k] < 0 else 1)
