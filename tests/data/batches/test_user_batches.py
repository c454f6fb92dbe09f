"""Batches of users: whole epochs, targets never seen, the same global batch at any world size."""

import numpy as np
import pytest
import torch

from deepfm_dist.config import load_config
from deepfm_dist.data.batches.batch import UserBatch
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.errors import ConfigError
from deepfm_dist.model.losses import bpr_sum, softmax_sum

SAMPLED = Candidates(50, 0.75, targets_per_user=5)


def bags_of(batch: UserBatch, key: str) -> list[list[int]]:
    return [bag.tolist() for bag in batch.sparse[key].to_dense()]


def items_of_users(dataset: PreparedDataset) -> list[set[int]]:
    return [set(bag) for bag in dataset.history.lists()]


def readable(batch: UserBatch) -> list[tuple[object, ...]]:
    """(bag, targets, known places, genres of the bag) of each real user of a rank."""
    users = bags_of(batch, "user")
    rows: list[tuple[object, ...]] = []
    own = bags_of(batch, "item")[batch.n_shared :]
    for u in range(batch.n_users):
        at = (batch.target_users == u).nonzero()[:, 0].tolist()
        targets = [
            batch.target_items[t].item() + 1 if len(batch.target_items) else own[t][0] for t in at
        ]
        known = sorted(batch.known_items[batch.known_users == u].tolist())
        bags = [tuple(bags_of(batch, key)[u]) for key in ("user", "seen", "seen_genre")]
        rows.append((*bags, tuple(targets), tuple(known)))
    assert all(bag == [] for bag in users[batch.n_users :])
    return [row for row in rows if row[0] != ()]


@pytest.mark.slow  # whole epochs, row by row
@pytest.mark.parametrize("candidates", [Candidates(), SAMPLED])
def test_an_epoch_cuts_every_users_items_into_bag_and_targets(
    with_history: PreparedDataset, candidates: Candidates
) -> None:
    items = items_of_users(with_history)
    genres = with_history.entity_fields["genre"].lists()  # type: ignore[union-attr]
    batches = UserBatches(with_history, 64, 0, 1, 1, candidates)
    bags: list[dict[int, tuple[int, ...]]] = []
    for epoch in range(2):
        first = 1 + epoch * batches.steps_per_epoch
        bags.append({})
        for batch in batches.steps(first, first + batches.steps_per_epoch - 1):
            shared = bags_of(batch, "item")[: batch.n_shared]
            for (user,), bag, of_genre, targets, known in readable(batch):  # type: ignore[misc]
                assert user not in bags[-1]
                bags[-1][user] = bag
                assert set(bag) <= items[user]
                assert not set(targets) & set(bag)
                assert list(of_genre) == [g for item in bag for g in genres[item]]
                places = [p for p, item in enumerate(shared) if item[0] in items[user]]
                assert list(known) == places
                if candidates.sampled is None:
                    assert set(bag) | set(targets) == items[user]
                    assert shared == [[i] for i in range(1, batch.n_candidates + 1)]
                    assert not batch.log_expected.any()
                else:
                    most = len(items[user] - set(bag))
                    assert len(set(targets)) == len(targets) == min(5, most)
                    assert set(targets) <= items[user]
        assert set(bags[-1]) == {u for u, bag in enumerate(items) if bag}
    assert bags[0] != bags[1]
    assert UserBatches(with_history, 64, 0, 1, 2, candidates).batch(1) is not None


def test_what_was_expected_of_a_candidate_is_its_share(with_history: PreparedDataset) -> None:
    batch = UserBatches(with_history, 64, 0, 1, 1, SAMPLED).batch(3)
    counts = with_history.popularity()[1:]
    share = np.maximum(counts, 1) ** 0.75 / (np.maximum(counts, 1) ** 0.75).sum()
    drawn = np.array(bags_of(batch, "item")[:50])[:, 0]
    assert np.allclose(batch.log_expected, np.log(50 * share[drawn - 1]), atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("candidates", [Candidates(), SAMPLED])
@pytest.mark.parametrize("step", [1, 11, 12])
def test_ranks_share_users_and_candidates(
    with_history: PreparedDataset, size: int, candidates: Candidates, step: int
) -> None:
    whole = UserBatches(with_history, 63, 0, 1, 1, candidates).batch(step)
    parts = [UserBatches(with_history, 63, r, size, 1, candidates).batch(step) for r in range(size)]
    assert len({p.sparse.stride() for p in parts}) == 1
    assert {p.global_weight.item() for p in parts} == {whole.target_weights.sum().item()}
    assert [row for part in parts for row in readable(part)] == readable(whole)
    shared = [bag for p in parts for bag in bags_of(p, "item")[: p.n_shared]]
    assert shared[: whole.n_candidates] == bags_of(whole, "item")[: whole.n_shared]
    assert all(bag == [] for bag in shared[whole.n_candidates :])
    assert all((p.log_expected == whole.log_expected).all() for p in parts)


def test_without_a_history_all_of_a_users_items_are_targets(sample: PreparedDataset) -> None:
    batch = UserBatches(sample, 50, 0, 1, 1, Candidates()).batch(1)
    users = [bag[0] for bag in bags_of(batch, "user")[: batch.n_users]]
    items = items_of_users(sample)
    for place, user in enumerate(users):
        targets = batch.target_items[batch.target_users == place] + 1
        assert sorted(targets.tolist()) == sorted(items[user])


def test_users_without_a_target_have_a_loss_of_zero(with_history: PreparedDataset) -> None:
    batches = UserBatches(with_history, 2, 0, 1, 1, Candidates())
    assert batches._drawn is not None
    batches._drawn.dropout, batches._drawn.max_length = 1e-9, None  # nothing is left out
    batch = batches.batch(1)
    assert len(batch.target_users) == len(batch.target_items) == 0
    logits = torch.randn(2, batch.n_candidates)
    targets = batch.target_users, batch.target_weights
    known = batch.known_users, batch.known_items
    sums = [
        softmax_sum(torch.zeros(0), logits, *targets, known, batch.log_expected),
        bpr_sum(torch.zeros(0), logits, *targets, known),
    ]
    assert [float(total / batch.global_weight) for total in sums] == [0.0, 0.0]


def test_ranks_without_users_are_refused(with_history: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="a batch of 4 users over 3 ranks leaves a rank without"):
        UserBatches(with_history, 4, 2, 3, 1, Candidates())


@pytest.mark.slow  # a whole epoch, row by row
def test_rows_of_an_epoch_see_the_other_items_and_negatives_see_the_same(
    with_history: PreparedDataset,
) -> None:
    """The bag of a row lacks its target, that of a negative the target of its positive."""
    items = items_of_users(with_history)
    batches = TrainingBatches(with_history, 5000, 0, 1, seed=1)
    of_positive: dict[tuple[int, tuple[int, ...]], int] = {}
    negatives = []
    n = 0
    for batch in batches.steps(1, batches.steps_per_epoch):
        users, seen, bags = (
            [b.tolist() for b in batch.sparse[k].to_dense()] for k in ("user", "item", "seen")
        )
        for user, item, bag, label, weight in zip(
            users, seen, bags, batch.labels, batch.weights, strict=True
        ):
            if not weight:
                continue
            assert set(bag) <= items[user[0]] - {item[0]}
            assert len(bag) <= 20
            if label:
                n += 1
                of_positive[user[0], tuple(bag)] = item[0]
            else:
                negatives.append((user[0], tuple(bag)))
    assert n == with_history.history.offsets[-1]
    assert all(key in of_positive for key in negatives)


def test_held_out_rows_see_the_same_at_most_20_items(with_history: PreparedDataset) -> None:
    from deepfm_dist.data.batches.collation import Collator

    items = items_of_users(with_history)
    users = np.arange(len(items), dtype=np.int32)
    one, again = (Collator(with_history)(u, None) for u in (users, users[::-1].copy()))
    bags = bags_of(one, "seen")  # type: ignore[arg-type]
    assert bags == bags_of(again, "seen")[::-1]  # type: ignore[arg-type]
    for bag, of_user in zip(bags, items, strict=True):
        assert set(bag) <= of_user
        assert len(set(bag)) == len(bag) == min(20, len(of_user))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.history={}", "set data.history.dropout, to 0.5 for example"),
        ("data.features=[{name: a, entity: user, history: nothing}]", "available: item"),
        ("data.features=[{name: a, entity: item, history: item}]", "a history is a user's"),
        ("data.features=[{name: a, entity: user, history: item, keep: first}]", "keep does not go"),
        ("data.features=[{name: a, entity: user}]", "history: no field has it"),
        (
            "data.features=[{name: user, entity: user}, "
            "{name: a, entity: user, history: item, table: user}]",
            "a can share that of item, or have its own",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    with_history: PreparedDataset, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config = load_config("sample", ["data.history.dropout=0.5", override])
        manifest = with_history.manifest.model_copy(
            update={
                "data": config.data.model_copy(
                    update={"features": with_history.manifest.data.features}
                )
            }
        )
        changed = PreparedDataset(with_history.folder)
        changed.manifest = manifest
        UserBatches(changed, 64, 0, 1, 1, Candidates())


def test_weights_of_rows_are_refused(with_history: PreparedDataset) -> None:
    weighted = PreparedDataset(with_history.folder)
    data = with_history.manifest.data
    rows = data.interactions.model_copy(update={"weight": "w"})
    data = data.model_copy(update={"interactions": rows})
    weighted.manifest = with_history.manifest.model_copy(update={"data": data})
    with pytest.raises(ConfigError, match=r"leave interactions\.weight=w out"):
        UserBatches(weighted, 64, 0, 1, 1, Candidates())
