import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.preparation.split import split_at_bounds, split_bounds, split_by_user
from deepfm_dist.data.schema import Split
from deepfm_dist.seeding import permute

RNG = np.random.default_rng(1)
USERS = RNG.integers(0, 12, 200).astype(np.int32)
USERS[USERS == 11] = 10
USERS[0] = 11  # a user with a single row
TIMES = RNG.integers(0, 50, 200)


def split_rows(
    split: Split, n: int, users: np.ndarray | None, times: np.ndarray | None, seed: int
) -> np.ndarray:
    """What preparation does, with the rows in three pieces where pieces are possible."""
    rows = np.arange(n)
    keys = permute(rows, n, seed) if split.method in ("random", "per_user") else times
    assert keys is not None
    if split.method in ("per_user", "leave_last"):
        assert users is not None
        return split_by_user(split, users, int(users.max()) + 1, keys)
    pieces = [(keys[p], rows[p]) for p in np.array_split(rows, 3)]
    bounds = split_bounds(split, n, lambda digit: sum(digit.counts(piece) for piece in pieces))
    return np.concatenate([split_at_bounds(piece, bounds) for piece in pieces])


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


@given(st.data(), st.sampled_from(["random", "per_user", "temporal", "leave_last"]))
def test_any_rows_are_cut_in_order_of_key_then_file(data: st.DataObject, method: str) -> None:
    n = data.draw(st.integers(1, 25))
    users, times = (
        np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype)
        for dtype in (np.int32, np.int64)
    )
    shares = st.integers(0, 3) if method == "leave_last" else st.sampled_from([0, 0.1, 0.25, 0.45])
    split = Split(method=method, valid=data.draw(shares), test=data.draw(shares))  # type: ignore[arg-type]
    seed = data.draw(st.integers(0, 9))
    key = permute(np.arange(n), n, seed) if method in ("random", "per_user") else times
    groups = users if method in ("per_user", "leave_last") else np.zeros(n, np.int32)
    expected = [0] * n
    for group in set(groups.tolist()):
        rows = sorted(np.flatnonzero(groups == group).tolist(), key=lambda r: (key[r], r))
        size = len(rows)
        last = split.test if method == "leave_last" else round(size * split.test)
        before = split.valid if method == "leave_last" else round(size * split.valid)
        if method in ("per_user", "leave_last"):  # something is left to train on
            last = min(last, size - 1)
            before = min(before, size - 1 - last)
        for place, row in enumerate(reversed(rows)):
            expected[row] = 2 if place < last else 1 if place < last + before else 0
    assert split_rows(split, n, users, times, seed).tolist() == expected


def test_a_given_file_replaces_its_share() -> None:
    split = Split(valid_file="v.csv", test=0.25)
    assert np.bincount(split_rows(split, 200, USERS, None, 1)).tolist() == [150, 0, 50]
    split = Split(valid=0.1, test_file="t.csv", method="per_user")
    assert 2 not in split_rows(split, 200, USERS, None, 1)


def test_random_methods_change_with_the_seed_and_hold_out_evenly() -> None:
    split = Split(method="random", valid=0.2, test=0.3)
    parts = np.array([split_rows(split, 100, None, None, seed) for seed in range(400)])
    assert abs((parts[0] == parts[1]).mean() - 0.38) < 0.2
    for part, share in ((0, 0.5), (1, 0.2), (2, 0.3)):
        often = (parts == part).mean(axis=0)  # of each row: binomial, 400 draws
        assert np.abs(often - share).max() < 5 * np.sqrt(share * (1 - share) / 400)


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.1, 0.34, 0.6]),
    st.integers(1, 4),
)
def test_bounds_equal_a_sort_whatever_the_keys_and_ranks(
    keys: list[int], share: float, ranks: int
) -> None:
    split = Split(method="temporal", valid=share / 2, test=share / 2)
    n = len(keys)
    order = sorted(range(n), key=lambda r: (keys[r], r))
    n_test, n_valid = round(n * share / 2), round(n * share / 2)
    expected = np.zeros(n, int)
    expected[order[n - n_test - n_valid :]] = 1
    expected[order[n - n_test :]] = 2 if n_test else expected[order[n - n_test :]]
    of_rank = [(np.array(keys[r::ranks], np.int64), np.arange(r, n, ranks)) for r in range(ranks)]

    def work(rank: int, add_up: Callable[[np.ndarray], np.ndarray]) -> object:
        return split_bounds(split, n, lambda digit: add_up(digit.counts(of_rank[rank])))

    bounds = in_step(ranks, work)
    actual = np.zeros(n, int)
    for (_, rows), piece, bound in zip(of_rank, of_rank, bounds, strict=True):
        actual[rows] = split_at_bounds(piece, bound)
    assert actual.tolist() == expected.tolist()


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.1, 0.34, 0.45]),
    st.sampled_from([0.0, 0.2]),
)
def test_rows_whose_keys_collide_with_the_bound_stay_together(
    keys: list[int], test: float, valid: float
) -> None:
    """Keys of 3 bits: as few rows as possible are held out so that none is torn from its equals."""
    n, array = len(keys), np.array(keys, np.int64)
    split = Split(method="random", valid=valid, test=test)
    bounds = split_bounds(split, n, lambda digit: digit.counts((array,)), 1)
    parts = split_at_bounds((array,), bounds)
    n_test, n_valid = round(n * test), round(n * valid)
    for held_out, wanted in (
        (parts == 2, n_test),
        (parts >= 1, n_test + n_valid),
    ):
        if not wanted:
            assert not held_out.any()
            continue
        bound = sorted(keys)[n - wanted]  # the key of the wanted-th row from the top
        assert (held_out == (array >= bound)).all()


def in_step(ranks: int, work: Callable[..., object]) -> list[object]:
    """Calls ``work(rank, add_up)`` in as many threads, whose sums are of all."""
    barrier, said = threading.Barrier(ranks), [np.zeros(0)] * ranks

    def add_up(rank: int, counts: np.ndarray) -> np.ndarray:
        said[rank] = counts
        barrier.wait()
        total = np.sum(said, axis=0)
        barrier.wait()
        return total

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda r: work(r, partial(add_up, r)), range(ranks)))
