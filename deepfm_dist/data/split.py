"""Which rows are held out: pure functions of the rows' order, users, times and the seed."""

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int32Array, Int64Array
from deepfm_dist.data.schema import Split
from deepfm_dist.seeding import permute

TRAIN, VALID, TEST = 0, 1, 2
SPLITS = ("train", "valid", "test")


def split_rows(
    split: Split, n: int, users: Int32Array | None, times: Int64Array | None, seed: int
) -> npt.NDArray[np.int8]:
    """Assigns rows to train, valid and test.

    Args:
        split: the method and the sizes.
        n: number of rows.
        users: ``[n]`` user codes, for the methods that work per user.
        times: ``[n]`` seconds, for the methods that go by time; ties keep file order.
        seed: of the random methods.

    Returns:
        ``[n]`` int8: 0 train, 1 valid, 2 test. A user's only row is never held out by the
        methods that work per user.
    """
    valid = 0.0 if split.valid_file else split.valid
    test = 0.0 if split.test_file else split.test
    if split.method in ("random", "temporal"):
        if split.method == "random":
            place = permute(np.arange(n), n, seed)
        else:
            assert times is not None
            place = np.empty(n, np.int64)
            place[np.argsort(times, kind="stable")] = np.arange(n)
        return _cut(n - 1 - place, np.full(n, round(n * valid)), np.full(n, round(n * test)))
    assert users is not None
    key = permute(np.arange(n), n, seed) if split.method == "per_user" else times
    assert key is not None
    order = np.lexsort((np.arange(n), key, users))
    sizes = np.bincount(users)
    begin = np.cumsum(sizes) - sizes
    from_last = np.empty(n, np.int64)
    from_last[order] = (begin + sizes - 1)[users[order]] - np.arange(n)
    if split.method == "per_user":
        n_valid, n_test = np.rint(sizes * valid), np.rint(sizes * test)
    else:
        n_valid, n_test = np.full(len(sizes), valid), np.full(len(sizes), test)
    n_test = np.minimum(n_test, sizes - 1)
    n_valid = np.minimum(n_valid, sizes - 1 - n_test)
    return _cut(from_last, n_valid[users], n_test[users])


def _cut(
    from_last: Int64Array, n_valid: npt.NDArray[np.number], n_test: npt.NDArray[np.number]
) -> npt.NDArray[np.int8]:
    part = np.zeros(len(from_last), np.int8)
    part[from_last < n_valid + n_test] = VALID
    part[from_last < n_test] = TEST
    return part
