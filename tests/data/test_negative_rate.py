"""Probabilities corrected for drawn negatives: the rate by hand and by drawing, known odds."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.config import Config, config_from, with_settings
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs.predict import predict
from deepfm_dist.jobs.recommend import recommend
from deepfm_dist.jobs.train import train
from deepfm_dist.training.activity import _fit
from tests.data.small_logs import USER_AND_ITEM, made_of
from tests.ranks import run_in_fork

ROWS = "u,i\n" + "".join(f"{u},{i}\n" for u, n in (("a", 1), ("b", 4), ("c", 2)) for i in range(n))
ROWS += "".join(f"d,{i}\n" for i in range(3, 10))


def prepared(folder: Path, **negatives: Any) -> PreparedDataset:
    (folder / "s.csv").write_text(ROWS)
    spec = {
        "interactions": {"file": "s.csv", "user": "u", "item": "i"},
        "features": USER_AND_ITEM,
        "split": {"valid": 0, "test": 0},
        "negatives": negatives,
    }
    return made_of(folder, spec)


def test_the_score_of_a_random_row_becomes_the_share_of_the_users_items(tmp_path: Path) -> None:
    # A model that knows nothing has log-odds of -log(k) for every row: 1 positive, k negatives.
    dataset = prepared(tmp_path, per_positive=3)
    rate = NegativeRate.from_dataset(dataset)
    assert rate is not None
    users = dataset.entity_ids("user").to_pylist()
    row = [users.index(name) for name in "abcd"]
    logits = -np.log(3) + rate.log_rates(np.array(row), np.array([1, 5, 9, 1]))
    shares = 1 / (1 + np.exp(-logits))
    assert shares == pytest.approx([1 / 10, 4 / 10, 2 / 10, 7 / 10])
    of_all = 1 / (1 + np.exp(np.log(3) - rate.log_of_user[0]))
    assert of_all == pytest.approx(14 / 40)
    new = rate.for_histories(Jagged(np.array([0, 2, 2]), np.array([4, 7], np.int32)))
    odds = np.exp(new.log_rates(np.arange(2), np.array([1, 1]))) / 3
    assert odds == pytest.approx([2 / 8, 14 / 26])  # of nobody nothing is known: as of all
    histories = Jagged(np.array([0, 3]), np.array([4, 7, 11], np.int32))  # 11 is a cold item
    disliked = Jagged(np.array([0, 3]), np.array([4, 5, 12], np.int32))
    [odds] = np.exp(rate.for_histories(histories, [disliked]).log_rates([0], [1])) / 3
    assert odds == pytest.approx(2 / 7)  # of 10 items, 4, 5 and 7 are not drawn
    labelled = prepared(tmp_path, fixed_per_user=2)
    assert NegativeRate.from_dataset(labelled) is None


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_pairs_are_drawn_at_the_given_rate(tmp_path: Path, power: float) -> None:
    dataset = prepared(tmp_path, per_positive=1, popularity_power=power)
    rate = NegativeRate.from_dataset(dataset)
    assert rate is not None
    batches = TrainingBatches(dataset, 10_000, 0, 1, seed=1)
    counts, epochs = np.zeros((5, 11)), 1500
    for step in range(1, epochs + 1):
        batch = batches.batch(step)
        drawn = batch.labels.numpy() == 0
        users, items = (batch.sparse[name].values().numpy()[drawn] for name in ("user", "item"))
        np.add.at(counts, (users, items), 1)
    users, items = np.nonzero(counts)
    expected = epochs * np.exp(rate.log_rates(users, items))
    assert len(users) == 40 - 14
    assert (np.abs(counts[users, items] - expected) < 5 * np.sqrt(expected)).all()


def _scored(config: Config, folder: Path) -> None:
    train(config)
    predict(config, str(folder / "pairs.csv"), folder / "scores.parquet")
    ours = with_settings(config, {"recommend.probability": True, "recommend.k": 200})
    recommend(ours, output=str(folder / "ranked.parquet"))
    ranked_by = with_settings(config, {"run.name": "s", "trainer.loss": "softmax"})
    train(with_settings(ranked_by, {"trainer.max_steps": 1}))
    for setting, value in (("probability", True), ("matrix", "int8")):
        with pytest.raises(ConfigError, match=rf"recommend\.{setting}=\w+: .* not log-odds"):
            recommend(with_settings(ranked_by, {f"recommend.{setting}": value}))
    predict(ranked_by, str(folder / "pairs.csv"), folder / "ranks.parquet")


def test_probabilities_are_those_of_the_generator(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    n_users, n_items = 400, 200
    activity, appeal = rng.normal(-2.5, 1, n_users), rng.normal(0, 1, n_items)
    true = 1 / (1 + np.exp(-activity[:, None] - appeal))
    users, items = np.nonzero(rng.random(true.shape) < true)
    pd.DataFrame({"user": users, "item": items}).to_csv(tmp_path / "rows.csv", index=False)
    users, items = np.indices(true.shape).reshape(2, -1)
    pairs = pd.DataFrame({"user": users, "item": items, "true": true.ravel()})
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    roots = {"prepared_root": str(tmp_path / "p"), "runs_root": str(tmp_path / "r"), "loggers": []}
    config = config_from(
        {
            "run": {"name": "odds", **roots},
            "data": {
                "root": str(tmp_path),
                "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
                "features": USER_AND_ITEM,
                "split": {"valid": 0, "test": 0},
            },
            "model": {"deep": False, "embedding_dim": 4},
            "trainer": {"loss": "bce", "epochs": 5, "batch_size": 256},
        }
    )
    run_in_fork(_scored, config, tmp_path)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    assert (scores["user"].astype(int) == pairs["user"]).all()
    trained = scores["user"].isin(pd.read_csv(tmp_path / "rows.csv", dtype=str)["user"])
    scores, pairs = scores[trained.to_numpy()], pairs[trained.to_numpy()]
    assert scores["probability"].mean() == pytest.approx(pairs["true"].mean(), rel=0.05)
    # By what users are, not by the positives that they happen to have: few of these are bad luck.
    quarter = np.searchsorted(np.quantile(activity, [0.25, 0.5, 0.75]), activity)
    of_quarter = quarter[pairs["user"]]
    for part in range(4):
        found, expected = (
            values[of_quarter == part].mean() for values in (scores["probability"], pairs["true"])
        )
        assert found == pytest.approx(expected, rel=0.05)
    appealing = (appeal > np.median(appeal))[pairs["item"]]
    for part in (appealing, ~appealing):  # of others the model knows little
        found, expected = scores["probability"][part].mean(), pairs["true"][part].mean()
        assert found == pytest.approx(expected, rel=0.15)
    assert (1 / (1 + np.exp(-scores["score"]))).mean() > 1.3 * pairs["true"].mean()
    ranked = pd.read_parquet(tmp_path / "ranked.parquet")
    assert list(ranked.columns) == ["user_id", "item_id", "score", "rank", "probability"]
    scores = scores.assign(user_id=scores["user"].astype(int), item_id=scores["item"].astype(int))
    both = ranked.merge(scores, on=["user_id", "item_id"], suffixes=("", "_of_row"))
    assert len(both) == len(ranked) > 0
    np.testing.assert_allclose(both["probability"], both["probability_of_row"], rtol=1e-4)
    ranks = pd.read_parquet(tmp_path / "ranks.parquet")
    assert ranks["probability"].isna().all() and ranks["score"].notna().all()


def test_rows_count_by_their_weights_in_the_shifts_by_activity() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=500).astype(np.float32), rng.random(500) < 0.3
    weights = rng.integers(0, 4, 500)
    repeated = np.arange(500).repeat(weights)
    for rows, times in ((np.arange(500), weights), (repeated, np.ones(len(repeated)))):
        y = labels[rows].astype(np.float32)
        knots, [shift] = _fit(np.zeros(len(rows)), logits[rows], y, times.astype(np.float32))
        assert knots.tolist() == [0.0]
        # The maximum of the likelihood, with a normal prior of precision 10.
        predicted = 1 / (1 + np.exp(-logits[repeated] - shift))
        assert (labels[repeated] - predicted).sum() == pytest.approx(10 * shift, abs=0.2)
