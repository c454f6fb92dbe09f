"""What EASE adds to a trained model is found by measuring it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import ndcg_score

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.interop.linear import (
    COLUMNS,
    L2,
    Linear,
    Validation,
    _likely,
    ease_weights,
    leading_vectors,
    search,
    standardized,
)
from deepfm_dist.ranking.baselines import co_counts

N_ITEMS, N_USERS = 60, 300


@pytest.fixture(scope="module")
def users() -> tuple[Jagged, Validation]:
    """Users who take ten of the twenty items of their group, two of which are held out."""
    rng = np.random.default_rng(3)
    taken = [rng.choice(20, 10, replace=False) + 20 * (u % 3) for u in range(N_USERS)]
    owner = np.repeat(np.arange(N_USERS), 8)
    train = Jagged.from_pairs(owner, np.concatenate([np.sort(t[:8]) for t in taken]), N_USERS)
    relevant = Jagged.from_pairs(
        np.repeat(np.arange(N_USERS), 2), np.concatenate([t[8:] for t in taken]), N_USERS
    )
    noise = torch.from_numpy(rng.normal(size=(N_USERS, N_ITEMS))).float()
    return train, Validation(train, relevant, train, noise)


def test_ndcg_is_that_of_scikit_learn(users: tuple[Jagged, Validation]) -> None:
    _, validation = users
    scores = validation.trained.numpy().astype(np.float64)
    expected = []
    for user in range(N_USERS):
        unseen = np.setdiff1d(np.arange(N_ITEMS), validation.masked.lists()[user])
        gains = np.isin(unseen, validation.relevant.lists()[user]).astype(float)
        expected.append(ndcg_score([gains], [scores[user, unseen]], k=10))
    assert validation.ndcg(validation.trained) == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_catalogue_may_have_fewer_items_than_are_ranked() -> None:
    train = Jagged.from_pairs([0, 0, 1, 2], [1, 2, 1, 3], 3)
    relevant = Jagged.from_pairs([0, 1, 2], [3, 2, 1], 3)
    validation = Validation(train, relevant, train, torch.zeros(3, 4))
    actual = search([(train, validation)], 4, None)
    assert actual.columns == 4
    # User 0 has one item left; users 1 and 2 have two, and ties are broken either way.
    assert 0.6 < actual.ndcg_trained <= 1


def test_cold_items_have_no_place(users: tuple[Jagged, Validation]) -> None:
    train, validation = users
    beyond = np.full(N_USERS, N_ITEMS + 3, np.int32)
    relevant, masked = (
        Jagged.from_pairs(
            np.concatenate([np.repeat(np.arange(N_USERS), lists.lengths), np.arange(N_USERS)]),
            np.concatenate([lists.values, beyond]),
            N_USERS,
        )
        for lists in (validation.relevant, validation.masked)
    )
    with_cold = replace(validation, relevant=relevant, masked=masked)
    assert search([(train, with_cold)], N_ITEMS, None) == search(
        [(train, validation)], N_ITEMS, None
    )


def test_what_knows_nothing_is_left_out(users: tuple[Jagged, Validation]) -> None:
    train, validation = users
    actual = search([(train, validation)], N_ITEMS, None)
    assert actual.ndcg > actual.ndcg_trained + 0.1
    assert (actual.trained, actual.weight, actual.field_weight) == (0, 1, 0)
    assert actual.ndcg == actual.ndcg_ease


def test_next_to_one_that_knows_all_it_has_no_weight(
    users: tuple[Jagged, Validation], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation = users
    monkeypatch.setattr("deepfm_dist.interop.linear.COLUMNS", (4, 32))
    right = torch.zeros(N_USERS, N_ITEMS)
    owner = np.repeat(np.arange(N_USERS), 2)
    right[torch.from_numpy(owner), torch.from_numpy(validation.relevant.values).long()] = 9999.0
    knowing = Validation(train, validation.relevant, train, right)
    actual = search([(train, knowing)], N_ITEMS, None)
    assert actual.ndcg == actual.ndcg_trained == 1
    assert actual.weight == 0
    alone = [_ndcg_of_ease(validation, train, actual.l2, n) for n in (4, 32)]
    assert alone[0] < alone[1]
    assert actual.ndcg_ease == pytest.approx(max(alone), abs=1e-6)


def _ndcg_of_ease(users: Validation, train: Jagged, l2: float, columns: int) -> float:
    gram = torch.from_numpy(co_counts(train, N_ITEMS)).float()
    weights = standardized(*ease_weights(gram, l2))
    vectors = leading_vectors(weights, gram, columns)
    return users.ndcg(users.scores(weights @ vectors) @ vectors.T)


def test_few_users_do_not_decide_on_a_weight_by_chance() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(3, 10_000))
    few = {4.0: 0.30 + noise[0, :20], 32.0: 0.29 + noise[1, :20], 256.0: 0.28 + noise[2, :20]}
    assert _likely(few, 0.1 + noise[0, :20]) == 32.0  # not told apart: the middle of them
    many = {w: 0.3 - k / 100 + 0.01 * noise[k] for k, w in enumerate((4.0, 32.0, 256.0))}
    assert _likely(many, 0.1 + noise[0]) == 4.0
    assert _likely(many, 0.4 + 0.01 * noise[0]) == 0.0  # each is clearly worse than none


def test_what_training_adds_has_to_be_clear(users: tuple[Jagged, Validation]) -> None:
    """Of few users, EASE alone; the same difference of many users, or in several cuts, counts."""
    train, validation = users
    owner = torch.from_numpy(np.repeat(np.arange(N_USERS), 2))
    hint = 0.3 * validation.trained
    hint[owner, torch.from_numpy(validation.relevant.values).long()] += 0.2
    both = replace(validation, trained=hint)
    actual = search([(train, both)], N_ITEMS, None)
    assert actual.trained == 1
    # It can be had: the same settings give the same figure.
    gram = torch.from_numpy(co_counts(train, N_ITEMS)).float()
    weights = standardized(*ease_weights(gram, actual.l2))
    vectors = leading_vectors(weights, gram, actual.columns)
    scores = hint + actual.weight * both.scores(weights @ vectors) @ vectors.T
    assert both.ndcg(scores) == pytest.approx(actual.ndcg, abs=1e-6)
    few = [np.arange(first, first + 12) for first in range(0, 60, 12)]
    cuts = [
        Validation(
            *(Jagged.from_pairs(*_pairs(lists, some)) for lists in (train, validation.relevant)),
            masked=Jagged.from_pairs(*_pairs(train, some)),
            trained=hint[torch.from_numpy(some)],
            ids=some.astype(np.int32),
        )
        for some in few
    ]
    alone = search([(train, cuts[0])], N_ITEMS, None)
    assert (alone.trained, alone.weight, alone.columns) == (0, 1, N_ITEMS)
    fits = {l2: ease_weights(gram, l2) for l2 in L2}
    by_l2 = {l2: cuts[0].ndcg(cuts[0].scores(standardized(*fit))) for l2, fit in fits.items()}
    published = {l2: cuts[0].ndcg(cuts[0].scores(weights)) for l2, (weights, _) in fits.items()}
    assert alone.ndcg == alone.ndcg_ease == pytest.approx(max(by_l2.values()), abs=1e-6)
    assert by_l2[alone.l2] == pytest.approx(max(by_l2.values()), abs=1e-6)
    assert published[alone.l2_as_published] == pytest.approx(max(published.values()), abs=1e-6)
    assert actual.l2_as_published in L2
    assert search([(train, cut) for cut in cuts], N_ITEMS, None).trained == 1
    # The same users again in other cuts say little more.
    assert search([(train, cuts[0])] * 5, N_ITEMS, None).trained == 0


def _pairs(lists: Jagged, some: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    lengths, values = lists.take(some)
    return np.repeat(np.arange(len(some)), lengths), values, len(some)


def test_fields_that_say_the_groups_are_used(users: tuple[Jagged, Validation]) -> None:
    _, validation = users
    few = Jagged.from_pairs([0, 0, 1, 1], [0, 20, 21, 40], N_USERS)  # nobody's items go together
    groups = Jagged.from_pairs(np.arange(N_ITEMS) // 20, np.arange(N_ITEMS), 3)
    actual = search([(few, validation)], N_ITEMS, groups)
    assert actual.field_weight > 0
    assert actual.ndcg > search([(few, validation)], N_ITEMS, None).ndcg + 0.1


def test_standardized_scores_are_those_in_units_of_the_residuals_deviation(
    users: tuple[Jagged, Validation],
) -> None:
    """The deviations from a ridge regression of each item on all others, by scikit-learn."""
    train, _ = users
    x = np.zeros((N_USERS, N_ITEMS))
    x[np.repeat(np.arange(N_USERS), 8), train.values] = 1
    weights, deviations = ease_weights(torch.from_numpy(x.T @ x).float(), 20.0)
    for item in (0, 25, 59):
        others = np.delete(x, item, axis=1)
        ridge = Ridge(20.0, fit_intercept=False, tol=1e-10).fit(others, x[:, item])
        loss = (
            np.square(x[:, item] - ridge.predict(others)).sum() + 20 * np.square(ridge.coef_).sum()
        )
        assert float(deviations[item]) == pytest.approx((loss + 20) ** 0.5, rel=1e-4)
        expected = np.insert(ridge.coef_, item, 0) / (loss + 20) ** 0.5
        assert standardized(weights, deviations)[:, item].numpy() == pytest.approx(
            expected, abs=1e-5
        )


def test_leading_vectors_are_those_of_the_scores(users: tuple[Jagged, Validation]) -> None:
    train, _ = users
    x = torch.zeros(N_USERS, N_ITEMS, dtype=torch.float64)
    x[np.repeat(np.arange(N_USERS), 8), train.values] = 1
    gram = x.T @ x
    weights = ease_weights(gram, 20.0)[0].double()
    vectors = leading_vectors(weights, gram, 5)
    expected = torch.linalg.svd(x @ weights).Vh[:5].T
    overlap = (expected.T @ vectors.double()).abs()
    assert torch.linalg.svdvals(overlap).min() > 0.99


def test_users_without_held_out_items_leave_nothing_to_measure() -> None:
    none = Jagged(np.zeros(3, np.int64), np.zeros(0, np.int32))
    validation = Validation(none, none, none, torch.zeros(2, 5))
    assert search([(none, validation)], 5, None) == Linear(weight=0.0)
    assert max(COLUMNS) == 512
