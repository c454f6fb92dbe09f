"""Items in a user's log are neither negatives nor recommendations, liked or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import SPLITS
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.ranking.items import Catalogue
from tests.data.small_logs import made_of

N_USERS, N_ITEMS, LEAST = 12, 24, 4
FIELDS = [
    {"name": "user", "entity": "user"},
    {"name": "seen", "entity": "user", "history": "item"},
    {"name": "item", "entity": "item"},
]
Pairs = set[tuple[str, str]]


def _log() -> pd.DataFrame:
    """Half of all pairs, of which more than half are rated low; splits at random."""
    rng = np.random.default_rng(9)
    pairs = rng.permutation(N_USERS * N_ITEMS)[: N_USERS * N_ITEMS // 2]
    log = pd.DataFrame({"user": pairs // N_ITEMS, "item": pairs % N_ITEMS})
    log["rating"] = rng.integers(1, 6, len(log))
    log["split"] = rng.choice(SPLITS, len(log), p=[0.6, 0.2, 0.2])
    log["user"], log["item"] = "u" + log.user.astype(str), "i" + log.item.astype(str)
    liked = log.rating >= LEAST
    # All users and items have a training positive, or they would have no row of their own.
    trained = log[liked & (log.split == "train")]
    assert trained.user.nunique() == N_USERS
    log = log[log.item.isin(trained.item)]
    assert (log.rating < LEAST).sum() > 30
    return log


def _dataset(root: Path, log: pd.DataFrame, **negatives: Any) -> PreparedDataset:
    log.to_csv(root / "s.csv", index=False)
    columns = {"user": "user", "item": "item", "rating": "rating", "split": "split"}
    spec = {
        "interactions": {"file": "s.csv", "min_rating": LEAST, **columns},
        "features": FIELDS,
        "history": {"dropout": 0.3},
        "negatives": negatives,
    }
    if "fixed_per_user" in negatives:  # drawn before the split, and known users alone
        del columns["split"], spec["history"]
        spec |= {"interactions": {"file": "s.csv", "min_rating": LEAST, **columns}}
        spec |= {"features": FIELDS[::2], "split": {"valid": 0.2, "test": 0.2}}
    return made_of(root, spec)


def _pairs(frame: pd.DataFrame) -> Pairs:
    return set(zip(frame.user, frame.item, strict=True))


def _named(dataset: PreparedDataset, users: Any, items: Any) -> Pairs:
    ids = [dataset.entity_ids(entity).to_pylist() for entity in ("user", "item")]
    return {(ids[0][u], ids[1][i]) for u, i in zip(map(int, users), map(int, items), strict=True)}


def _everything(log: pd.DataFrame) -> Pairs:
    return {(user, item) for user in log.user.unique() for item in log.item.unique()}


@pytest.mark.parametrize("avoid", ["train", "all"])
@pytest.mark.parametrize("popularity_power", [0.0, 0.5])
def test_training_negatives_are_all_that_was_not_met_and_nothing_else(
    tmp_path: Path, avoid: str, popularity_power: float
) -> None:
    log = _log()
    dataset = _dataset(
        tmp_path, log, per_positive=4, avoid=avoid, popularity_power=popularity_power
    )
    met = _pairs(log if avoid == "all" else log[log.split == "train"])
    batches = TrainingBatches(dataset, 100, 0, 1, seed=1)
    drawn: dict[int, Pairs] = {0: set(), 1: set()}
    for step in range(1, 30 * batches.steps_per_epoch):
        batch = batches.batch(step)
        users, items = (batch.sparse[name].values().numpy() for name in ("user", "item"))
        labels = batch.labels.numpy()[: len(users)]  # the last batch of an epoch is padded
        for label, pairs in drawn.items():
            pairs |= _named(dataset, users[labels == label], items[labels == label])
    assert drawn[1] == _pairs(log[(log.split == "train") & (log.rating >= LEAST)])
    assert drawn[0] == _everything(log) - met


@pytest.mark.parametrize("avoid", ["train", "all"])
@pytest.mark.parametrize("candidates", [Candidates(), Candidates(40, 0.5, targets_per_user=3)])
def test_candidates_of_users_leave_out_what_they_met(
    tmp_path: Path, avoid: str, candidates: Candidates
) -> None:
    log = _log()
    dataset = _dataset(tmp_path, log, avoid=avoid)
    met = _pairs(log if avoid == "all" else log[log.split == "train"])
    liked = _pairs(log[(log.split == "train") & (log.rating >= LEAST)])
    batch = UserBatches(dataset, N_USERS, 0, 1, 1, candidates).batch(1)
    users = batch.sparse["user"].values().numpy()[:N_USERS]
    shared = batch.sparse["item"].values().numpy()[: batch.n_candidates]
    known = np.zeros((N_USERS, batch.n_candidates), bool)
    known[batch.known_users.numpy(), batch.known_items.numpy()] = True
    compared = {
        is_known: _named(dataset, users[(at := np.nonzero(known == is_known))[0]], shared[at[1]])
        for is_known in (True, False)
    }
    assert not compared[False] & met
    assert compared[True] <= met
    if candidates.sampled is None:
        assert compared[True] == met
    own = batch.sparse["item"].values().numpy()[batch.n_shared :]
    targets = batch.target_items.numpy() + 1 if len(batch.target_items) else own
    assert _named(dataset, users[batch.target_users.numpy()], targets) <= liked


def test_held_out_negatives_were_met_in_no_split(tmp_path: Path) -> None:
    log = _log()
    dataset = _dataset(tmp_path, log, evaluation_per_positive=20)  # all that there are
    for split in ("valid", "test"):
        rows = dataset.rows(split)
        assert rows.users is not None and rows.items is not None and rows.labels is not None
        negative = np.asarray(rows.labels) == 0
        users = set(log[(log.split == split) & (log.rating >= LEAST)].user)
        unmet = _everything(log) - _pairs(log)
        expected = {(user, item) for user, item in unmet if user in users}
        assert _named(dataset, rows.users[negative], rows.items[negative]) == expected


def test_fixed_negatives_were_not_met(tmp_path: Path) -> None:
    log = _log()
    dataset = _dataset(tmp_path, log, fixed_per_user=N_ITEMS)
    negatives: Pairs = set()
    for split in SPLITS:
        rows = dataset.rows(split)
        assert rows.users is not None and rows.items is not None and rows.labels is not None
        at = np.asarray(rows.labels) == 0
        negatives |= _named(dataset, rows.users[at], rows.items[at])
    assert negatives == _everything(log) - _pairs(log)


def test_what_is_masked_is_all_that_was_met(tmp_path: Path) -> None:
    log = _log()
    dataset = _dataset(tmp_path, log)
    catalogue = Catalogue(dataset)
    users = np.arange(1, N_USERS + 1, dtype=np.int32)
    met_so_far: list[Any] = []
    for number, split in enumerate(SPLITS, 1):
        met_so_far += dataset.met(split)
        seen = catalogue.seen_by(users, met_so_far)(0, N_USERS)
        owners = np.repeat(users, np.diff(seen.offsets))
        expected = _pairs(log[log.split.isin(SPLITS[:number])])
        assert _named(dataset, owners, catalogue.rows[seen.values]) == expected


def test_the_rate_of_negatives_counts_what_can_be_drawn(tmp_path: Path) -> None:
    log = _log()
    dataset = _dataset(tmp_path, log, per_positive=4)
    trained = log[log.split == "train"]
    n_positives = trained[trained.rating >= LEAST].groupby("user").size()
    n_unmet = log.item.nunique() - trained.groupby("user").size()
    expected = np.log(4 * n_positives / n_unmet)  # of a pair that is not met, in an epoch
    rate = NegativeRate.from_dataset(dataset)
    assert rate is not None
    ids = dataset.entity_ids("user").to_pylist()[1:]
    assert dict(zip(ids, rate.log_of_user[1:], strict=True)) == pytest.approx(
        expected.to_dict(), abs=1e-5
    )
