import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.seeding import derive_seed, permute


@given(st.integers(1, 400), st.integers(0, 2**62))
def test_permute_is_a_bijection_with_random_access(n: int, seed: int) -> None:
    whole = permute(np.arange(n), n, seed)
    assert sorted(whole) == list(range(n))
    some = np.arange(0, n, 3)
    assert (permute(some, n, seed) == whole[some]).all()


def test_permute_mixes() -> None:
    p = permute(np.arange(100_000), 100_000, 5)
    assert abs(np.corrcoef(p, np.arange(100_000))[0, 1]) < 0.01
    assert abs(np.corrcoef(p[1:], p[:-1])[0, 1]) < 0.01
    assert (p != permute(np.arange(100_000), 100_000, 6)).mean() > 0.99


def test_indices_outside_the_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        permute([3], 3, 1)


def test_seeds_differ_by_every_part() -> None:
    seeds = [derive_seed(a, b, c) for a in range(9) for b in ("x", "y", "a" * 30) for c in range(9)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "x") == derive_seed(1, "x")
    purposes = ["evaluation", "evaluatiom", "evaluati", "negatives", "negative_"]
    assert len({derive_seed(purpose) for purpose in purposes}) == len(purposes)


def test_every_index_is_as_likely_at_every_place() -> None:
    n, seeds = 13, 4000
    places = np.array([permute(np.arange(n), n, seed) for seed in range(seeds)])
    table = np.array([np.bincount(places[:, i], minlength=n) for i in range(n)])
    chi_square = ((table - seeds / n) ** 2 / (seeds / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    neighbours = np.bincount((places[:, 1] - places[:, 0]) % n, minlength=n)[1:]
    expected = seeds / (n - 1)
    assert ((neighbours - expected) ** 2 / expected).sum() < (n - 2) + 5 * np.sqrt(2 * (n - 2))


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.data())
def test_large_ranges_stay_in_range_without_collisions(
    n: int, seed: int, data: st.DataObject
) -> None:
    some = data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=20))
    out = permute(some, n, seed)
    assert len(set(out.tolist())) == len(some)
    assert all(0 <= value < n for value in out.tolist())


@given(*[st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))] * 2)
def test_different_parts_give_different_seeds(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_nothing_is_permuted_to_nothing() -> None:
    assert permute([], 0, 1).tolist() == []
    assert permute([0], 1, 1).tolist() == [0]
