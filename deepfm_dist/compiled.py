"""numba's compiler, with a cache on disk where one can be had."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], signature: Any = None) -> Any:
    """Compiles a function to machine code that runs without Python's lock.

    Args:
        function: what numba can compile.
        signature: its types, to compile at once; default: at the first call.
    """
    types = () if signature is None else (signature,)
    try:
        return numba.njit(*types, cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(*types, nogil=True)(function)
