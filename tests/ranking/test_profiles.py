"""Figures cut open."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.ranking.metrics import user_metrics
from deepfm_dist.ranking.profiles import GROUPS, Groups, examples, profile

COUNTS = np.arange(40, dtype=np.int64)


def drawn(seed: int) -> tuple[np.ndarray, Jagged]:
    random = np.random.default_rng(seed)
    ranked = np.stack([random.permutation(40)[:12] for _ in range(30)])
    ranked[random.random(30) < 0.2, 7:] = -1
    owners = np.repeat(np.arange(30), random.integers(1, 15, 30))
    items = np.concatenate([random.permutation(40)[: (owners == u).sum()] for u in range(30)])
    return ranked, Jagged.from_pairs(owners, items, 30)


def test_curves_and_groups_are_those_of_single_figures() -> None:
    ranked, relevant = drawn(1)
    cutoffs = range(1, 13)
    of_users = user_metrics(ranked, relevant, cutoffs, COUNTS, 30)
    activity = Groups.by_quantile(relevant.lengths)
    popularity = Groups.by_quantile(COUNTS[relevant.values])
    actual = profile(ranked, relevant, activity, popularity)
    for k in cutoffs:
        np.testing.assert_allclose(actual.recall[k - 1], of_users[f"recall@{k}"].mean())
        np.testing.assert_allclose(actual.ndcg[k - 1], of_users[f"ndcg@{k}"].mean())
    for group, (low, high) in enumerate(activity.bounds):
        mine = (relevant.lengths >= low) & (relevant.lengths <= high)
        np.testing.assert_allclose(actual.by_activity[group], of_users["ndcg@12"][mine].mean())
    for group, (low, high) in enumerate(popularity.bounds):
        pairs = [
            item in ranked[user]
            for user, items in enumerate(relevant.lists())
            for item in items
            if low <= COUNTS[item] <= high
        ]
        np.testing.assert_allclose(actual.by_popularity[group], np.mean(pairs))


@given(st.lists(st.integers(0, 30), max_size=200))
def test_groups_share_the_values_out(values: list[int]) -> None:
    groups = Groups.by_quantile(np.array(values, np.int64))
    assert len(groups.bounds) <= GROUPS
    assert sum(groups.sizes) == len(values)
    for value, group in zip(values, groups.of, strict=True):
        assert groups.bounds[group][0] <= value <= groups.bounds[group][1]
    edges = [edge for bounds in groups.bounds for edge in bounds]
    assert edges == sorted(edges)
    # No group is larger than its share and the equal values that may not be parted.
    for size in groups.sizes:
        most_equal = max(values.count(v) for v in set(values))
        assert size <= len(values) / GROUPS + most_equal


def test_examples_go_from_the_least_to_the_most_active_user() -> None:
    ranked, relevant = drawn(2)
    users = np.arange(1, 31)
    lengths = np.random.default_rng(3).permutation(31)
    history = Jagged.from_pairs(np.repeat(np.arange(31), lengths), np.zeros(lengths.sum()), 31)
    actual = examples(users, ranked, history, relevant)
    active = [len(example.history) for example in actual]
    assert active == sorted(active)
    assert active[0] == min(lengths[1:]) and active[-1] == max(lengths[1:])
    for example in actual:
        place = example.user - 1
        assert example.ranked == [i for i in ranked[place].tolist() if i >= 0]
        assert example.held_out == relevant.lists()[place]
    assert examples(users[:0], ranked[:0], history, relevant) == []
    assert len(examples(users[:2], ranked[:2], history, relevant)) == 2
