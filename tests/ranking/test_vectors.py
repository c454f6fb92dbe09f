"""Vectors of users and items: what they say of new items, exact everywhere, at any world size."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from deepfm_dist.config import Config, config_from, with_settings
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs.evaluate import evaluate
from deepfm_dist.jobs.export import export
from deepfm_dist.jobs.predict import predict
from deepfm_dist.jobs.recommend import recommend
from deepfm_dist.jobs.similar import similar
from deepfm_dist.jobs.train import train
from deepfm_dist.runs.trained import find_run
from tests.ranks import run_in_fork, run_ranks
from tests.steps import Run, difference

N_USERS, N_ITEMS, TRAINED = 40, 120, 60
TEXT = {"name": "text", "entity": "item", "kind": "vector", "file": "items.parquet"}
TASTE = {"name": "taste", "entity": "user", "kind": "vector", "file": "ids.csv", "npy": "v.npy"}
IDS = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]


def clicks(folder: Path) -> Config:
    """Clicks that hang on a direction of the items' vectors; those of the test are all new."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(N_ITEMS, 6))
    effects = 3 * vectors @ (direction := rng.normal(size=6)) / np.linalg.norm(direction)
    for name, n, first in (("train", 4000, 0), ("valid", 600, 0), ("test", 1500, TRAINED)):
        rows = pd.DataFrame({"user": rng.integers(0, N_USERS, n)})
        rows["item"] = rng.integers(first, first + TRAINED, n)
        rows["log_odds"] = effects[rows["item"]]
        rows["label"] = (rng.random(n) < 1 / (1 + np.exp(-rows["log_odds"]))).astype(int)
        rows.to_csv(folder / f"{name}.csv", index=False)
    known = pd.DataFrame({"item": range(N_ITEMS), "text": [*(1000 * vectors).astype("float32")]})
    known.drop(index=[3, TRAINED + 3]).to_parquet(folder / "items.parquet")
    pd.DataFrame({"user": range(N_USERS)}).to_csv(folder / "ids.csv", index=False)
    np.save(folder / "v.npy", rng.normal(size=(N_USERS, 3)))
    pd.DataFrame({"item": range(N_ITEMS)}).to_csv(folder / "catalogue.csv", index=False)
    columns = {"user": "user", "item": "item", "label": "label"}
    roots = {"prepared_root": str(folder / "prepared"), "runs_root": str(folder / "runs")}
    return config_from(
        {
            "run": {"name": "new", **roots, "loggers": []},
            "data": {
                "root": str(folder),
                "task": "ctr",
                "interactions": {"file": "train.csv", **columns},
                "split": {"valid_file": "valid.csv", "test_file": "test.csv"},
                "features": [*IDS, TEXT, TASTE],
                "catalogue": {"file": "catalogue.csv"},
                "id_dropout": 0.1,
            },
            "model": {
                "embedding_dim": 8,
                "over_arch_layer_sizes": [16],
                "batch_norm": False,
                "dropout": 0,
            },
            "optimizer": {"dense": {"lr": 0.003}},
            "trainer": {"epochs": 8, "patience": 2},
            "recommend": {"k": N_ITEMS, "mask": []},
        }
    )


def _everything(config: Config, folder: Path) -> dict[str, Any]:
    train(config)
    result = evaluate(config)
    assert result is not None
    predict(config, str(folder / "test.csv"), folder / "scores.parquet")
    recommend(config, output=str(folder / "all.parquet"))
    few = {"recommend.memory_bytes": 1}  # items in blocks, again for every chunk of users
    recommend(with_settings(config, few), output=str(folder / "blocks.parquet"))
    similar(config, output=str(folder / "similar.parquet"))
    export(find_run(config, []), folder / "export")
    return result.rows


def _recommended(config: Config, target: Path) -> None:
    recommend(config, output=str(target))


def brute_force(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Logits of all pairs, and the items' factor sums, in float64 from an export."""
    tensors = load_file(folder / "model.safetensors").items()
    w = {name: tensor.double().numpy() for name, tensor in tensors}
    users, items = (pd.read_parquet(folder / f"entities/{e}.parquet") for e in ("user", "item"))

    def projected(vector: Any, name: str) -> np.ndarray:
        x = np.asarray(vector, np.float64)
        return np.append(x @ w[f"vector_factors_{name}"], x @ w[f"vector_first_order_{name}"])

    n_known, rows, sums = len(w["tables.item"]), [], []
    texts = [projected(v, "text") for v in items["text"]]
    tastes = [projected(v, "taste") for v in users["taste"]]
    for i in range(1, len(items)):
        of_item = w["tables.item"][i if i < n_known else 0]
        sums.append((items["id"][i], (of_item + texts[i])[:-1]))
        for u in range(1, len(users)):
            x = np.stack([w["tables.user"][u], of_item, texts[i], tastes[u]])
            v = x[:, :-1]
            pairs = sum(v[a] @ v[b] for a in range(4) for b in range(a))
            h = w["over_arch.hidden.0.weight"] @ v.ravel() + w["over_arch.hidden.0.bias"]
            deep = w["over_arch.output.weight"][0] @ np.maximum(h, 0) + w["over_arch.output.bias"]
            logit = w["bias"][0] + x[:, -1].sum() + pairs + deep[0]
            rows.append((users["id"][u], items["id"][i], logit))
    logits = pd.DataFrame(rows, columns=["user_id", "item_id", "logit"])
    return logits, pd.DataFrame(sums, columns=["id", "sum"]).set_index("id")


def _auc(config: Config) -> float:
    train(config)
    result = evaluate(config)
    assert result is not None
    return result.rows["auc_cold"]


def test_a_small_log_knows_new_items_by_their_vectors_from_its_fitted_start(
    tmp_path: Path,
) -> None:
    config = with_settings(clicks(tmp_path), {"trainer.epochs": 2})
    assert config.model.is_auto("linear")
    test = pd.read_csv(tmp_path / "test.csv")
    possible = roc_auc_score(test["label"], test["log_odds"])
    assert run_in_fork(_auc, config) >= possible - 0.03


def test_new_items_are_judged_by_their_vectors_alike_everywhere(tmp_path: Path) -> None:
    config = with_settings(clicks(tmp_path), {"model.linear": "none"})
    figures = run_in_fork(_everything, config, tmp_path)
    test = pd.read_csv(tmp_path / "test.csv")
    possible = roc_auc_score(test["label"], test["log_odds"])
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    area = roc_auc_score(test["label"], scores["score"])
    assert area >= possible - 0.03  # 0.5 without their vectors
    assert figures["auc_cold"] == pytest.approx(area)

    expected, sums = brute_force(tmp_path / "export")
    expected = expected.astype({"user_id": int, "item_id": int})
    ranked = pd.read_parquet(tmp_path / "all.parquet")
    both = ranked.merge(expected, on=["user_id", "item_id"], validate="1:1")
    assert len(both) == N_USERS * N_ITEMS
    error = (both["score"] - both["logit"]).abs() / both["logit"].abs().clip(lower=1)
    assert error.max() <= 1e-5
    assert (tmp_path / "blocks.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()
    rows = scores.astype({"user": int, "item": int}).merge(
        expected, left_on=["user", "item"], right_on=["user_id", "item_id"]
    )
    assert len(rows) == len(scores)
    np.testing.assert_allclose(rows["score"], rows["logit"], rtol=1e-5, atol=1e-5)

    alike = pd.read_parquet(tmp_path / "similar.parquet")
    vectors = sums["sum"].map(lambda v: v / np.linalg.norm(v))
    for row in alike.astype(str).drop_duplicates("item_id").itertuples():
        cosine = vectors[row.item_id] @ vectors[row.similar_item_id]
        assert float(row.score) == pytest.approx(cosine, abs=1e-5)

    run_ranks(_recommended, 2, config, tmp_path / "two.parquet")
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()


def _losses(config: Config) -> list[float]:
    with process_group("cpu") as world:
        return Run(config.prepared_dir, config, world).losses(1, 20)


BOUNDED = "optimizer={max_norm: 0.5, dense: {l2: 0.01}, tables: {name: adam, l2: 0.01}}"


@pytest.mark.parametrize(
    "settings",
    [
        ("trainer.loss=bce", "model.over_arch_layer_sizes=[8]", BOUNDED),
        ("trainer.loss=softmax", "model.deep=false", "model.fm_pairs=across"),
    ],
)
def test_losses_are_the_same_at_any_world_size(settings: tuple[str, ...], tmp_path: Path) -> None:
    from deepfm_dist.config import load_config

    rng = np.random.default_rng(2)
    pairs = pd.DataFrame(rng.integers(0, (30, 25), (400, 2)), columns=["user", "item"])
    pairs.drop_duplicates().to_csv(tmp_path / "rows.csv", index=False)
    items = pd.DataFrame({"item": range(22), "text": [*rng.normal(0, 50, (22, 5))]})
    items.to_parquet(tmp_path / "items.parquet")
    np.save(tmp_path / "v.npy", rng.normal(size=(30, 3)))
    pd.DataFrame({"user": range(30)}).to_csv(tmp_path / "ids.csv", index=False)
    config = config_from(
        {
            "run": {"name": "r", "prepared_root": str(tmp_path / "prepared")},
            "data": {
                "root": str(tmp_path),
                "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
                "features": [*IDS, TEXT, TASTE],
                "split": {"valid": 0, "test": 0},
            },
            "model": {"init_std": 0.3, "embedding_dim": 6},
            "trainer": {"batch_size": 24},
        }
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    config = load_config(str(tmp_path / "c.yaml"), [*settings])
    prepare(config.data, tmp_path, config.prepared_dir, 1)
    alone = run_ranks(_losses, 1, config)[0]
    assert alone[0] != alone[-1]
    for size in (2, 4):
        assert difference(run_ranks(_losses, size, config)[0], alone) <= 1e-6
