"""Bits of floating-point numbers in the order of the numbers."""

from typing import Any


def sortable(bits: Any) -> Any:
    """Bits of float32 as integers that sort as the numbers do, and such integers as bits again.

    Negative numbers have their exponent and fraction flipped, which is its own inverse. Add 0.0 to
    the numbers first where -0.0 and 0.0 have to be equal.

    Args:
        bits: int32, of NumPy or torch.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
