"""Bags of a user's items: what is drawn, what never is, and that draws need no memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.batches.histories import chosen, kept_in_bags
from deepfm_dist.data.jagged import Jagged

HISTORIES = st.lists(st.sets(st.integers(1, 40), max_size=25), min_size=1, max_size=6)


def jagged(bags: list[set[int]]) -> Jagged:
    owners = [row for row, bag in enumerate(bags) for _ in bag]
    return Jagged.from_pairs(owners, [item for bag in bags for item in bag], len(bags))


@given(
    HISTORIES,
    st.integers(0, 2**40),
    st.floats(0, 0.95),
    st.none() | st.integers(1, 10),
    st.data(),
)
def test_a_bag_is_of_the_users_other_items_and_the_rows_own_draw(
    histories: list[set[int]],
    seed: int,
    dropout: float,
    max_length: int | None,
    data: st.DataObject,
) -> None:
    history = jagged(histories)
    users = np.array(data.draw(st.lists(st.integers(-1, len(histories) - 1), min_size=1)), np.int32)
    keys = np.array(
        data.draw(st.lists(st.integers(0, 99), min_size=len(users), max_size=len(users)))
    )
    left_out = np.array([data.draw(st.integers(1, 40)) for _ in users], np.int32)

    def bags_of(rows: np.ndarray) -> list[list[int]]:
        flags = kept_in_bags(
            history, users[rows], keys[rows], seed, dropout, max_length, left_out[rows]
        )
        lengths, values = chosen(history.take(users[rows]), flags)
        assert lengths.sum() == len(values)
        return [piece.tolist() for piece in np.split(values, np.cumsum(lengths)[:-1])]

    bags = bags_of(np.arange(len(users)))
    for bag, user, target in zip(bags, users, left_out, strict=True):
        others = histories[user] - {int(target)} if user >= 0 else set()
        assert set(bag) <= others
        assert len(set(bag)) == len(bag) <= (max_length or 40)
        if dropout == 0:
            assert len(bag) == min(len(others), max_length or 40)
    backwards = np.arange(len(users))[::-1]
    assert bags_of(backwards) == bags[::-1]  # in whatever company


@pytest.mark.parametrize(("dropout", "max_length"), [(0.3, None), (0.0, 12), (0.5, 12)])
def test_every_item_is_as_likely_as_the_others(dropout: float, max_length: int | None) -> None:
    items, rows = 40, 20_000
    history = jagged([set(range(1, items + 1))])
    users = np.zeros(rows, np.int32)
    flags = kept_in_bags(history, users, np.arange(rows), 5, dropout, max_length)
    times = flags.reshape(rows, items)
    sizes = times.sum(1)
    assert sizes.max() <= (max_length or items)
    mean = times.mean(0)
    assert np.abs(mean - mean.mean()).max() < 5 * np.sqrt(0.25 / rows)
    if max_length is None:
        assert mean.mean() == pytest.approx(1 - dropout, abs=0.003)
        # Independent of each other: the variance of the size is binomial.
        assert sizes.var() == pytest.approx(items * dropout * (1 - dropout), rel=0.05)
    elif dropout == 0:
        assert (sizes == max_length).all()


def test_another_seed_and_another_row_are_other_draws() -> None:
    history = jagged([set(range(1, 200))])
    users = np.zeros(2, np.int32)
    one, two = kept_in_bags(history, users, np.array([3, 4]), 1, 0.5).reshape(2, -1)
    other = kept_in_bags(history, users, np.array([3, 4]), 2, 0.5).reshape(2, -1)[0]
    for a, b in ((one, two), (one, other)):
        assert 0.3 < (a == b).mean() < 0.7
