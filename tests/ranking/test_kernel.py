"""The compiled kernel against float64, full sorts and itself cut up differently."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist import vector_code
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.ranking.engines.numba import NumbaEngine
from tests.kernel_cases import Case, Ranking, error_of

pytestmark = pytest.mark.skipif(not vector_code.HAS_FMA, reason="the kernel needs multiply-add")


def compiled(case: Case, n_users: int, n_items: int, threads: int = 1) -> Ranking:
    return Ranking(case, n_users, n_items, NumbaEngine(case.layers, threads))


sizes = st.lists(st.integers(1, 37), max_size=4)


@settings(max_examples=60)
@given(st.integers(1, 33), st.integers(1, 90), st.integers(0, 19), sizes, st.integers(0, 2**31))
def test_scores_equal_float64(
    n_users: int, n_items: int, dim: int, sizes: list[int], seed: int
) -> None:
    case = Case.of(n_users, n_items, dim, sizes, seed)
    actual = compiled(case, n_users, n_items).scores()
    assert error_of(actual, case.expected(n_users, n_items)) <= 1e-5


@settings(max_examples=60)
@given(
    st.integers(1, 33),
    st.integers(1, 90),
    sizes,
    st.integers(1, 25),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_top_k_equals_a_full_sort_of_the_same_scores(
    n_users: int, n_items: int, sizes: list[int], k: int, ties: bool, seed: int
) -> None:
    case = Case.of(n_users, n_items, 3, sizes, seed, ties)
    compiled(case, n_users, n_items).check(k, (64,) if n_items > 64 else ())


def test_cuts_of_the_catalogue_and_threads_change_no_bit() -> None:
    n_users, n_items = 300, 2500
    case = Case.of(n_users, n_items, 12, [33, 21, 10, 7], seed=1)
    alone = compiled(case, n_users, n_items).top_k(17)
    for threads, cuts in ((1, (1024,)), (3, ()), (2, (1024, 2048))):
        again = compiled(case, n_users, n_items, threads).top_k(17, cuts)
        assert again.positions.equal(alone.positions)
        assert again.scores.equal(alone.scores)
    few = compiled(case, 7, n_items)
    few.case = Case(case.users, case.items, case.layers, Jagged.from_pairs([], [], 7))
    assert few.scores().equal(compiled(case, n_users, n_items).scores()[:7])


def test_wide_layers_are_exact() -> None:
    case = Case.of(5, 50, 200, [400, 400, 400], seed=3)
    assert error_of(compiled(case, 5, 50).scores(), case.expected(5, 50)) <= 1e-5
