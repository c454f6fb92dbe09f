"""Sortable integer representations of floating-point numbers."""

from typing import Any


def sortable(bits: Any) -> Any:
    """Maps float32 bits to integers that sort like the numbers; its own inverse.

    It flips exponent and fraction of negative numbers. Add 0.0 to the numbers first if -0.0 and 0.0
    must be equal.

    Args:
        bits: int32, of NumPy or torch.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
