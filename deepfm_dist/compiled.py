"""numba's compiler, with an on-disk cache where possible."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], signature: Any = None) -> Any:
    """Compiles a function to machine code that releases the GIL.

    Args:
        function: function: in numba's subset of Python.
        signature: types to compile for eagerly; default: at the first call.
    """
    types = () if signature is None else (signature,)
    try:
        return numba.njit(*types, cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(*types, nogil=True)(function)
