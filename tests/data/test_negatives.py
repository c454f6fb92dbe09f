import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.negatives import (
    _unseen,
    draw_distinct,
    draw_per_positive,
    item_weights,
    users_short_of_negatives,
)

N_ITEMS = 30
SEEN = [[0, 3, 4, 29], [], list(range(25))]
HISTORY = Jagged.from_pairs(np.repeat([0, 1, 2], [4, 0, 25]), sum(SEEN, []), 3)  # noqa: RUF017


def draw(user: int, k: int, positives: int, seed: int = 1) -> np.ndarray:
    n = positives * k
    return draw_per_positive(
        np.repeat(np.arange(positives), k),
        np.tile(np.arange(k), positives),
        np.full(n, user, np.int32),
        k,
        HISTORY,
        N_ITEMS,
        seed,
    ).reshape(positives, k)


@pytest.mark.parametrize("user", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_negatives_are_unseen_distinct_and_uniform(user: int, k: int) -> None:
    drawn = draw(user, k, 20_000)
    unseen = sorted(set(range(N_ITEMS)) - set(SEEN[user]))
    assert set(drawn.ravel()) == set(unseen)
    assert all(len(set(row)) == k for row in drawn)
    counts = np.bincount(drawn.ravel(), minlength=N_ITEMS)[unseen]
    expected = drawn.size / len(unseen)
    assert ((counts - expected) ** 2 / expected).sum() < 2 * len(unseen) + 20


def test_a_draw_depends_on_its_own_row_alone() -> None:
    whole = draw(0, 4, 100)
    alone = draw_per_positive(
        np.array([7]), np.array([2]), np.zeros(1, np.int32), 4, HISTORY, N_ITEMS, 1
    )
    assert alone[0] == whole[7, 2]
    assert (whole != draw(0, 4, 100, seed=2)).any()


def test_distinct_draws_reach_every_unseen_item() -> None:
    assert sorted(draw_distinct(5, HISTORY, N_ITEMS, 1)[2]) == [25, 26, 27, 28, 29]
    counts = np.zeros(N_ITEMS)
    for seed in range(3000):
        drawn = draw_distinct(3, HISTORY, N_ITEMS, seed)
        for user in range(3):
            assert len(set(drawn[user])) == 3
            assert not set(drawn[user]) & set(SEEN[user])
        counts[drawn[0]] += 1
    free = counts[[i for i in range(N_ITEMS) if i not in SEEN[0]]]
    assert ((free - free.mean()) ** 2 / free.mean()).sum() < 2 * len(free) + 20


@pytest.mark.parametrize("power", [None, 0.5])
@pytest.mark.parametrize("n_items", [25, 27, 30])
def test_a_user_with_few_unseen_items_gets_each_of_them_once(
    n_items: int, power: float | None
) -> None:
    """User 2 has seen 25 items, so that 0, 2 or 5 of 8 wanted negatives exist."""
    k, positives = 8, 40
    weights = None if power is None else item_weights(np.arange(n_items) + 1, power)
    drawn = draw_per_positive(
        np.repeat(np.arange(positives), k),
        np.tile(np.arange(k), positives),
        np.full(k * positives, 2, np.int32),
        k,
        HISTORY,
        n_items,
        seed=1,
        weights=weights,
    ).reshape(positives, k)
    n_free = n_items - 25
    assert (drawn[:, n_free:] == -1).all()
    assert (np.sort(drawn[:, :n_free], axis=1) == np.arange(25, n_items)).all()
    fixed = draw_distinct(k, HISTORY, n_items, 1)[2]
    assert sorted(fixed[:n_free]) == [*range(25, n_items)]
    assert (fixed[n_free:] == -1).all()


def test_users_short_of_negatives_are_counted_once() -> None:
    users = np.array([0, 2, 2])
    assert users_short_of_negatives(5, HISTORY, users, N_ITEMS) == 0
    assert users_short_of_negatives(6, HISTORY, users, N_ITEMS) == 1
    assert users_short_of_negatives(27, HISTORY, users, N_ITEMS) == 2
    assert users_short_of_negatives(99, HISTORY, users[:0], N_ITEMS) == 0


@given(st.sets(st.integers(0, 39)), st.integers(0, 5))
def test_the_rth_unseen_item_is_found(seen: set[int], before: int) -> None:
    others = [7] * before  # of the users before this one
    values = np.array([*others, *sorted(seen), 0, 1], np.int32)
    actual = [_unseen(r, values, before, before + len(seen), 40) for r in range(40 - len(seen))]
    assert actual == sorted(set(range(40)) - seen)


def test_every_pair_of_unseen_items_can_be_drawn_together() -> None:
    drawn = np.sort(draw(2, 2, 30_000), axis=1) - 25  # two of five: the stretches are 2 and 3 long
    pairs = np.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25).reshape(5, 5)
    assert (pairs[np.triu_indices(5, 1)] > 0).all()


def test_a_positives_negatives_change_with_the_seed_and_the_positive() -> None:
    whole = draw(1, 4, 500)
    assert (whole == draw(1, 4, 500)).all()
    for other in (draw(1, 4, 500, seed=2), np.roll(whole, 1, axis=0)):
        assert abs((whole == other).mean() - 1 / N_ITEMS) < 0.02  # no more alike than by chance


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_popular_items_are_drawn_in_proportion(power: float) -> None:
    counts = np.arange(1, N_ITEMS + 1) ** 2
    weights = item_weights(counts, power)
    assert weights / weights.sum() == pytest.approx(counts**power / (counts**power).sum(), rel=1e-5)
    n = 60_000
    args = np.arange(n), np.zeros(n, np.int64), np.zeros(n, np.int32), 1, HISTORY, N_ITEMS, 4
    drawn = np.bincount(draw_per_positive(*args, weights), minlength=N_ITEMS)
    unseen = [i for i in range(N_ITEMS) if i not in SEEN[0]]
    assert drawn[SEEN[0]].sum() == 0
    expected = n * weights[unseen] / weights[unseen].sum()
    statistic = ((drawn[unseen] - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, len(unseen) - 1) > 1e-4


def test_weighted_negatives_of_a_positive_are_distinct_as_drawn_one_after_the_other() -> None:
    weights = item_weights(np.arange(N_ITEMS) ** 3, 1)
    for user, seen in enumerate(SEEN):
        k, n = 4, 4000
        drawn = draw_per_positive(
            np.repeat(np.arange(n), k),
            np.tile(np.arange(k), n),
            np.full(n * k, user, np.int32),
            k,
            HISTORY,
            N_ITEMS,
            5,
            weights,
        ).reshape(n, k)
        assert not set(drawn.ravel()) & set(seen)
        assert all(len(set(row)) == k for row in drawn)
        # P(second = j) = sum over i of P(first = i) w_j / (W - w_i)
        free = np.array([0 if i in seen else w for i, w in enumerate(weights)], float)
        first = free / free.sum()
        after = free[None, :] / (free.sum() - free[:, None])
        np.fill_diagonal(after, 0)
        expected = n * (first @ after)
        there = expected > 5
        actual = np.bincount(drawn[:, 1], minlength=N_ITEMS)
        statistic = ((actual - expected)[there] ** 2 / expected[there]).sum()
        assert chi2.sf(statistic, there.sum() - 1) > 1e-4


@pytest.mark.parametrize("user", [0, 1, 2])
def test_draws_pass_a_chi_square_test_of_uniformity(user: int) -> None:
    unseen = sorted(set(range(N_ITEMS)) - set(SEEN[user]))
    per_positive = np.bincount(draw(user, 1, 50_000, seed=6).ravel(), minlength=N_ITEMS)
    distinct = np.zeros(N_ITEMS)
    for seed in range(3000):
        distinct[draw_distinct(1, HISTORY, N_ITEMS, seed)[user]] += 1
    for counts in (per_positive, distinct):
        assert counts.sum() == counts[unseen].sum()
        assert chisquare(counts[unseen]).pvalue > 1e-4


@given(st.sets(st.integers(0, 199)), st.integers(0, 9))
def test_the_rth_unseen_item_of_a_long_history_is_found(seen: set[int], before: int) -> None:
    values = np.array([5] * before + sorted(seen) + [0, 199], np.int32)
    end = before + len(seen)
    actual = [_unseen(r, values, before, end, 200) for r in range(200 - len(seen))]
    assert actual == sorted(set(range(200)) - seen)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 150), st.integers(1, 4)), max_size=6),
    st.sets(st.integers(0, 399), max_size=40),
    st.integers(0, 3),
)
def test_as_many_negatives_as_unseen_items_are_all_of_them(
    runs: list[tuple[int, int, int]], others: set[int], place: int
) -> None:
    """However uneven a history: each stretch is then one item, which has to be found."""
    n_items = 400
    seen = others | {
        i for at, n, step in runs for i in range(at, at + n * step, step) if i < n_items
    }
    lists: list[list[int]] = [[] for _ in range(4)]
    lists[place] = sorted(seen)
    history = Jagged(
        np.cumsum([0, *map(len, lists)]), np.array([i for row in lists for i in row], np.int32)
    )
    for user in (place, (place + 1) % 4):
        free = sorted(set(range(n_items)) - set(lists[user]))
        k = len(free)
        drawn = draw_per_positive(
            np.full(k, 3), np.arange(k), np.full(k, user, np.int32), k, history, n_items, 8
        )
        assert sorted(drawn) == free
