"""Compilation where no cache can be written."""

import numba
import pytest
from numba.core import caching

from deepfm_dist.compiled import compiled


def test_functions_compile_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: int) -> int:
        return 2 * x

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(doubled)
    assert compiled(doubled)(21) == 42
    assert compiled(doubled, numba.int64(numba.int64)).signatures == [(numba.int64,)]
