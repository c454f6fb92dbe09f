import numpy as np
import pytest

from deepfm_dist.data.schema import Split
from deepfm_dist.data.split import split_rows

RNG = np.random.default_rng(1)
USERS = RNG.integers(0, 12, 200).astype(np.int32)
USERS[USERS == 11] = 10
USERS[0] = 11  # a user with a single row
TIMES = RNG.integers(0, 50, 200)


def parts_of(method: str, valid: float, test: float) -> np.ndarray:
    return split_rows(Split(method=method, valid=valid, test=test), 200, USERS, TIMES, seed=3)  # type: ignore[arg-type]


def test_random_holds_out_exact_shares() -> None:
    parts = parts_of("random", 0.1, 0.25)
    assert np.bincount(parts).tolist() == [130, 20, 50]
    assert (parts == parts_of("random", 0.1, 0.25)).all()


def test_temporal_holds_out_the_last_rows() -> None:
    parts = parts_of("temporal", 0.1, 0.2)
    order = sorted(range(200), key=lambda i: (TIMES[i], i))
    assert parts[order].tolist() == [0] * 140 + [1] * 20 + [2] * 40


@pytest.mark.parametrize(
    ("method", "valid", "test"), [("per_user", 0.2, 0.3), ("leave_last", 1, 2)]
)
def test_methods_by_user_equal_a_loop(method: str, valid: float, test: float) -> None:
    parts = parts_of(method, valid, test)
    for user in range(12):
        rows = np.flatnonzero(user == USERS)
        n = len(rows)
        n_test = min(round(n * test) if method == "per_user" else test, n - 1)
        n_valid = min(round(n * valid) if method == "per_user" else valid, n - 1 - n_test)
        counts = np.bincount(parts[rows], minlength=3)
        assert counts.tolist() == [n - n_test - n_valid, n_valid, n_test]
        if method == "leave_last":
            order = sorted(rows, key=lambda i: (TIMES[i], i))
            assert parts[order].tolist() == sorted(parts[order])
    assert parts[0] == 0
