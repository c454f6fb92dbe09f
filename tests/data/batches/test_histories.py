"""Bags of a user's items: what is drawn, what never is, and that draws need no memory."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.batches.histories import (
    HistorySampler,
    chosen,
    hold_out,
    kept_in_bags,
    latest,
)
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import ConfigError
from tests.data.small_logs import made_of

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
    assert bags_of(backwards) == bags[::-1]  # whichever users come with them


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


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), st.integers(1, 7))
def test_the_latest_items_are_the_last_of_each_list(bags: list[list[int]], n: int) -> None:
    lengths = np.array([len(bag) for bag in bags], np.int32)
    lengths, values = latest((lengths, np.array([i for bag in bags for i in bag], np.int32)), n)
    assert lengths.tolist() == [len(bag[-n:]) for bag in bags]
    assert values.tolist() == [i for bag in bags for i in bag[-n:]]


ORDERED: dict[str, Any] = {
    "interactions": {"file": "log.csv", "user": "user", "item": "item", "time": "at"},
    "features": [
        {"name": "item", "entity": "item"},
        {"name": "seen", "entity": "user", "history": "item"},
        {"name": "latest", "entity": "user", "history": "item", "last": 3},
    ],
    "history": {"targets": "later"},
    "split": {"method": "leave_last", "valid": 2, "test": 1},
}


@pytest.fixture(scope="module")
def ordered(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedDataset, list[list[int]]]:
    """40 users' items of a shuffled file with times, and each user's item rows in order."""
    root, rng = tmp_path_factory.mktemp("ordered"), np.random.default_rng(2)
    rows = [(u, i, at) for u in range(40) for at, i in enumerate(rng.permutation(30)[: 4 + u % 9])]
    frame = pd.DataFrame(rows, columns=["user", "item", "at"])
    frame.sample(frac=1, random_state=1).to_csv(root / "log.csv", index=False)
    dataset = made_of(root, ORDERED)
    users, items = (
        {id_: row for row, id_ in enumerate(dataset.entity_ids(name).to_pylist())}
        for name in ("user", "item")
    )
    in_order: list[list[int]] = [[] for _ in users]
    for user, items_of_user in frame.groupby("user").item:
        in_order[users[str(user)]] = [items.get(str(i), 0) for i in items_of_user]
    return dataset, in_order


def test_an_item_that_comes_again_has_its_last_place(tmp_path: Path) -> None:
    rows = [("u", item, at) for at, item in enumerate("abcabd")] + [("v", "a", 9), ("w", "b", 9)]
    frame = pd.DataFrame(rows, columns=["user", "item", "at"])
    frame.sample(frac=1, random_state=1).to_csv(tmp_path / "log.csv", index=False)
    interactions = {**ORDERED["interactions"], "repeated": "all"}
    split = {"method": "temporal", "valid": 0, "test": 0}
    dataset = made_of(tmp_path, {**ORDERED, "interactions": interactions, "split": split})
    items = dataset.entity_ids("item").to_pylist()
    user = dataset.entity_ids("user").to_pylist().index("u")
    assert [items[row] for row in dataset.history.lists()[user]] == ["c", "a", "b", "d"]


def test_later_items_are_predicted_from_all_before_them(
    ordered: tuple[PreparedDataset, list[list[int]]],
) -> None:
    dataset, in_order = ordered
    users, sampler = np.arange(1, 41, dtype=np.int32), HistorySampler(dataset, seed=1)
    cuts = np.empty((300, 40), int)
    for epoch in range(len(cuts)):
        bags, targets = (Jagged.from_pairs(np.repeat(users, n), v, 41).lists()
                         for n, v in sampler.split(users, epoch))  # fmt: skip
        for user in users:
            assert bags[user] + targets[user] == in_order[user][:-3]
            assert targets[user]
        cuts[epoch] = [len(bags[user]) for user in users]
    alone = [sampler.split(users[u : u + 1], 7)[0][0].item() for u in range(40)]
    assert alone == cuts[7].tolist()  # whichever users come with them
    lengths = np.array([len(in_order[user]) - 3 for user in users])
    assert (cuts[:, lengths == 1] == 0).all()
    assert set(cuts[:, lengths == 5].ravel().tolist()) == {1, 2, 3, 4}
    assert cuts[:, lengths == 9].mean() == pytest.approx(4.5, abs=0.25)


def test_a_field_of_the_latest_items_has_those_of_validation_at_its_end(
    ordered: tuple[PreparedDataset, list[list[int]]],
) -> None:
    dataset, in_order = ordered
    users = np.arange(1, 41, dtype=np.int32)
    for known, there in ((dataset, -3), (dataset.with_validation(), -1)):
        batch = Collator(known)(users, None)
        for field, most in (("seen", 99), ("latest", 3)):
            jagged = batch.sparse[field]
            offsets = jagged.offsets().tolist()
            bags = [jagged.values()[a:b].tolist() for a, b in pairwise(offsets)]
            # An item without training rows is in no history.
            assert bags == [[i for i in in_order[u][:there] if i][-most:] for u in users]


def test_the_last_items_are_held_out_of_histories_in_order(
    ordered: tuple[PreparedDataset, list[list[int]]],
) -> None:
    dataset, in_order = ordered
    cut = hold_out(dataset, 0.3)
    assert cut.held_out is not None
    for user, held_out in enumerate(cut.held_out.lists()):
        items = in_order[user][:-3]
        n = min(-(-3 * len(items) // 10), max(0, len(items) - 1))
        assert held_out == items[len(items) - n :]
        assert cut.history.lists()[user] == items[: len(items) - n]
    earlier = hold_out(cut, 0.3)
    for user, items in enumerate(cut.history.lists()):
        n = min(-(-3 * len(items) // 10), max(0, len(items) - 1))
        assert earlier.positives("valid").lists()[user] == items[len(items) - n :]
        assert earlier.history.lists()[user] == items[: len(items) - n]


def test_training_on_rows_has_no_latest_items(
    ordered: tuple[PreparedDataset, list[list[int]]],
) -> None:
    with pytest.raises(ConfigError, match=r"latest: last=3 .*trainer\.loss=softmax.* leave last"):
        TrainingBatches(ordered[0], 8, 0, 1, 1)
    later, manifest = PreparedDataset(ordered[0].folder), ordered[0].manifest
    all_items = manifest.data.model_copy(update={"features": manifest.data.features[:2]})
    later.manifest = manifest.model_copy(update={"data": all_items})
    with pytest.raises(
        ConfigError, match=r"history\.targets=later .* leave data\.history\.targets"
    ):
        TrainingBatches(later, 8, 0, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interactions": {"file": "log.csv", "user": "user", "item": "item"},
          "split": {"method": "per_user"}}, "latest: last=3 needs the order of time"),
        ({"split": {"method": "per_user"}}, "latest: last=3: with split.method=per_user"),
        ({"split": {"method": "random"}, "features": ORDERED["features"][:2]},
         "history.targets=later: with split.method=random"),
        ({"features": [*ORDERED["features"], {"name": "x", "entity": "item", "file": "x.csv",
                                              "last": 2}]}, "x: last=2 is for a history"),
    ],
)  # fmt: skip
def test_settings_of_order_need_an_order(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(ORDERED | changes)
