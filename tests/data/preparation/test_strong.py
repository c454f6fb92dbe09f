"""Strong generalization: users held out entirely, against the same done by numpy and pandas."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import config_from
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.ranking.baselines import Ease, Popularity
from deepfm_dist.ranking.evaluation import Comparison, RankingEvaluator, evaluate_ranking
from tests.ranks import run_ranks

N_USERS, N_ITEMS, N_VALID, N_TEST = 200, 60, 20, 30
L2 = 20.0
FIELDS = [
    {"name": "seen", "entity": "user", "history": "item", "pooling": "sqrt"},
    {"name": "item", "entity": "item"},
]


def settings(**changes: Any) -> dict[str, Any]:
    split = {"method": "users", "valid": N_VALID, "test": N_TEST} | changes.pop("split", {})
    data: dict[str, Any] = {
        "interactions": {
            "file": "ratings.csv", "user": "u", "item": "i", "rating": "r", "min_rating": 4,
            "min_rows_per_item": 3, "min_rows_per_user": 5,
        },
        "features": FIELDS,
        "split": split,
        "history": {"dropout": 0.5},
        "negatives": {"evaluation_per_positive": 1},
    }  # fmt: skip
    return {"run": {"name": "s"}, "data": data | changes, "model": {"deep": False}}


@pytest.fixture(scope="module")
def ratings() -> pd.DataFrame:
    """Ratings of 1 to 5 with popular and unpopular items, and tastes that EASE can find."""
    rng = np.random.default_rng(7)
    taste, kind = rng.integers(0, 3, N_USERS), np.arange(N_ITEMS) % 3
    rows = []
    for user in range(N_USERS):
        chances = (1 / (1 + np.arange(N_ITEMS))) * np.where(kind == taste[user], 8, 1)
        n = int(rng.integers(3, 25))
        for item in rng.choice(N_ITEMS, n, replace=False, p=chances / chances.sum()):
            rows.append((f"u{user}", f"i{item}", int(rng.choice([2, 4, 5], p=[0.2, 0.4, 0.4]))))
    return pd.DataFrame(rows, columns=["u", "i", "r"]).sample(frac=1, random_state=1)


def prepared(rows: pd.DataFrame, folder: Path, threads: int) -> PreparedDataset:
    """In several partitions."""
    folder.mkdir()
    rows.to_csv(folder / "ratings.csv", index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepfm_dist.data.preparation.job.PARTITION_BYTES", 6000)
        prepare(config_from(settings()).data, folder, folder / "d", 1, threads=threads)
    return PreparedDataset(folder / "d")


@pytest.fixture(scope="module")
def dataset(ratings: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepared(ratings, tmp_path_factory.mktemp("strong") / "s", threads=2)


def pairs(dataset: PreparedDataset, split: str) -> set[tuple[str, str]]:
    """(user, item) of a split's positives, by their ids."""
    users, items = (dataset.entity_ids(name).to_pylist() for name in ("user", "item"))
    columns = dataset.columns(
        split, ["user", "item", "label"] if split != "train" else ["user", "item"]
    )
    label = columns.get("label", np.ones(len(columns["user"])))
    return {
        (users[u], items[i])
        for u, i, y in zip(columns["user"], columns["item"], label, strict=True)
        if y == 1
    }


def histories(dataset: PreparedDataset) -> dict[str, set[str]]:
    users, items = (dataset.entity_ids(name).to_pylist() for name in ("user", "item"))
    lists = dataset.history.lists()
    return {users[u]: {items[i] for i in lists[u]} for u in range(1, len(users))}


def taking_part(ratings: pd.DataFrame) -> pd.DataFrame:
    """What is left of the ratings: positives; of items with 3 of them; of users with 5 of these."""
    rows = ratings[ratings.r >= 4]
    rows = rows[rows.groupby("i").u.transform("size") >= 3]
    return rows[rows.groupby("u").i.transform("size") >= 5]


def test_users_are_held_out_entirely(dataset: PreparedDataset, ratings: pd.DataFrame) -> None:
    rows = taking_part(ratings)
    assert 0 < len(rows) < (ratings.r >= 4).sum()
    items_of = rows.groupby("u").i.agg(set).to_dict()
    split = {name: pairs(dataset, name) for name in ("train", "valid", "test")}
    users = {name: {u for u, _ in actual} for name, actual in split.items()}
    assert len(users["valid"]) == N_VALID and len(users["test"]) == N_TEST
    assert not users["train"] & (users["valid"] | users["test"])
    assert not users["valid"] & users["test"]
    assert set.union(*users.values()) == set(items_of)
    trained = {i for _, i in split["train"]}
    known = histories(dataset)
    for user in users["train"]:
        assert {i for u, i in split["train"] if u == user} == items_of[user] == known[user]
    for name in ("valid", "test"):
        for user in users[name]:
            held_out = {i for u, i in split[name] if u == user}
            of_user = items_of[user] & trained
            assert held_out | known[user] == of_user and not held_out & known[user]
            assert len(held_out) == max(1, int(0.2 * len(of_user) + 1e-9))
    # What is fitted sees training users alone.
    counts = pd.Series([i for _, i in split["train"]]).value_counts()
    ids = dataset.entity_ids("item").to_pylist()
    assert dict(zip(ids[1:], dataset.popularity()[1:], strict=True)) == counts.to_dict()


def test_the_split_goes_by_content(
    dataset: PreparedDataset, ratings: pd.DataFrame, tmp_path: Path
) -> None:
    other = prepared(ratings.iloc[::-1], tmp_path / "reversed", threads=1)
    for split in ("train", "valid", "test"):
        assert pairs(other, split) == pairs(dataset, split)
    assert histories(other) == histories(dataset)
    assert other.manifest.data_hash == dataset.manifest.data_hash
    # Another item in a held-out user's known part is another dataset, though no row file has it.
    user = next(u for u, _ in pairs(dataset, "test"))
    known = sorted(histories(dataset)[user])
    changed = ratings[~((ratings.u == user) & (ratings.i == known[0]))]
    other = prepared(changed, tmp_path / "changed", threads=1)
    assert other.manifest.data_hash != dataset.manifest.data_hash


def expected(dataset: PreparedDataset, cutoffs: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Figures of EASE and popularity on the test users, by dense numpy."""
    known, train, test = histories(dataset), pairs(dataset, "train"), pairs(dataset, "test")
    items = sorted({i for _, i in train})
    column = {item: n for n, item in enumerate(items)}
    users = sorted({u for u, _ in train})
    x = np.zeros((len(users), len(items)))
    for u, i in train:
        x[users.index(u), column[i]] = 1
    p = np.linalg.inv(x.T @ x + L2 * np.eye(len(items)))
    b = -p / np.diag(p)
    np.fill_diagonal(b, 0)
    actual: dict[str, dict[str, list[float]]] = {"ease": {}, "popularity": {}}
    for user in sorted({u for u, _ in test}):
        bag = np.zeros(len(items))
        bag[[column[i] for i in known[user]]] = 1
        wanted = {column[i] for u, i in test if u == user}
        for name, scores in (("ease", bag @ b), ("popularity", x.sum(0))):
            ranked = np.argsort(-np.where(bag > 0, -np.inf, scores), kind="stable")
            for k in cutoffs:
                hit = np.array([item in wanted for item in ranked[:k]])
                dcg = (hit / np.log2(np.arange(2, k + 2))).sum()
                ideal = (1 / np.log2(np.arange(2, min(k, len(wanted)) + 2))).sum()
                for figure, value in (
                    (f"capped_recall@{k}", hit.sum() / min(k, len(wanted))),
                    (f"recall@{k}", hit.sum() / len(wanted)),
                    (f"ndcg@{k}", dcg / ideal),
                ):
                    actual[name].setdefault(figure, []).append(float(value))
    return {
        name: {figure: float(np.mean(values)) for figure, values in of.items()}
        for name, of in actual.items()
    }


def _compared(folder: Path, cutoffs: tuple[int, ...]) -> Comparison | None:
    config, dataset = config_from(settings()), PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded, _ = shard_for_training(config, dataset.manifest, world)
        sharded.eval()
        held_out = RankingEvaluator(dataset, "test", {})
        baselines = {"ease": Ease(L2), "popularity": Popularity()}
        return evaluate_ranking(deepfm_of(sharded), world, held_out, cutoffs, baselines)


def test_figures_are_those_of_numpy_at_any_world_size(dataset: PreparedDataset) -> None:
    cutoffs = (2, 20)
    oracle = expected(dataset, cutoffs)
    of_worlds = [run_ranks(_compared, size, dataset.folder, cutoffs)[0] for size in (1, 2)]
    for actual in of_worlds:
        for name, figures in oracle.items():
            for figure, value in figures.items():
                # Items of the same popularity may stand in another order.
                tolerance = 1e-6 if name == "ease" else 0.03
                assert actual.figures[name][figure] == pytest.approx(value, abs=tolerance), figure
        assert actual.insight.n_users == N_TEST
    assert of_worlds[0].figures == of_worlds[1].figures
    assert oracle["ease"]["ndcg@20"] > oracle["popularity"]["ndcg@20"]


def test_held_out_users_are_not_targets(dataset: PreparedDataset) -> None:
    trained = {u for u, _ in pairs(dataset, "train")}
    batches = UserBatches(dataset, 1000, 0, 1, 1, Candidates())
    ids = dataset.entity_ids("user").to_pylist()
    assert {ids[u] for u in batches._users} == trained
    assert batches.batch_size == len(trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": [{"name": "user", "entity": "user"}, *FIELDS]},
            "split.method=users: user knows users by their id, and held-out users have no training "
            "rows; replace it by {name: seen, entity: user, history: item} in data.features",
        ),
        ({"features": FIELDS[1:], "history": {}}, "add {name: seen, entity: user, history: item}"),
        ({"split": {"valid": 2.5}}, "valid=2.5: a share below 1, or a number of users"),
        ({"split": {"valid": 0.5, "test": 0.5}}, "leave no training rows"),
        ({"split": {"test_file": "t.csv"}}, "does not go with valid_file or test_file"),
        ({"split": {"method": "per_user", "valid": 0.1, "test": 0.1, "fold_in": 0.5}},
         "fold_in=0.5 is for method=users"),
        ({"vocabulary_from": "x"}, "split.method=users does not go with vocabulary_from"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_held_out_users_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from(settings(**changes))
    assert message in str(caught.value)


def test_the_protocol_has_to_fit_the_split(
    dataset: PreparedDataset, ratings: pd.DataFrame, tmp_path: Path
) -> None:
    strong = settings() | {"evaluate": {"protocol": "strong"}}
    assert config_from(strong).evaluate.protocol == "strong"
    weak = settings(split={"method": "per_user", "valid": 0.1, "test": 0.1})
    with pytest.raises(ConfigError, match=r"set data\.split\.method=users$"):
        config_from(weak | {"evaluate": {"protocol": "strong"}})
    with pytest.raises(ConfigError, match=r"set data\.split\.method=per_user$"):
        config_from(settings() | {"evaluate": {"protocol": "weak"}})
    ratings.to_csv(tmp_path / "ratings.csv", index=False)
    n = len(taking_part(ratings).u.unique())
    many = config_from(settings(split={"valid": n - 30, "test": 30}))
    with pytest.raises(DataError, match=f"hold out {n} users, as many as have two rows or more"):
        prepare(many.data, tmp_path, tmp_path / "d", 1)
