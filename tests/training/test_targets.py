"""Several targets: what a log says of each, one model of all, ranked by a combination of them."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import log_loss, roc_auc_score

from deepfm_dist.config import Config, config_from, with_settings
from deepfm_dist.data.batches.device_batches import DeviceBatches
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.compatibility import check_start
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DataError, DeepFMError
from deepfm_dist.jobs.evaluate import evaluate
from deepfm_dist.jobs.export import export
from deepfm_dist.jobs.predict import predict
from deepfm_dist.jobs.recommend import recommend
from deepfm_dist.jobs.train import train
from deepfm_dist.model.deepfm import DeepFM, InteractionArch, Table, build_deepfm
from deepfm_dist.model.losses import DeepFMTrain, known_bce_sums
from deepfm_dist.model.targets import MLPTowers, Towers, mlp_towers
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.runs.trained import find_run
from deepfm_dist.serving.live import Prediction, Recommender, Scored
from tests.ranks import run_in_fork, run_ranks
from tests.steps import Run, difference

N_USERS, N_ITEMS = 30, 20
TARGETS = ["click", "buy"]
COMBINED = {"click": 0.3, "buy": -1.5}


def log_of_clicks(folder: Path, n: int = 900) -> pd.DataFrame:
    """Rows of which a buy is known where there was a click, and sometimes a click is not known."""
    rng = np.random.default_rng(5)
    rows = pd.DataFrame({"user": rng.integers(0, N_USERS, n), "item": rng.integers(0, N_ITEMS, n)})
    rows["hour"] = rng.integers(0, 24, n)
    rows["device"] = rng.choice(["phone", "desk"], n)
    rows["weight"] = rng.integers(1, 4, n)
    odds = rng.normal(size=N_USERS)[rows["user"]] + rng.normal(size=N_ITEMS)[rows["item"]]
    rows["click"] = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(float)
    rows["buy"] = np.where(rows["click"] == 1, (rng.random(n) < 0.3).astype(float), np.nan)
    rows.loc[rng.random(n) < 0.1, "click"] = np.nan
    rows["split"] = rng.choice(["train", "valid", "test"], n, p=[0.7, 0.15, 0.15])
    rows.to_csv(folder / "log.csv", index=False)
    return rows


def config_of(folder: Path, **model: Any) -> Config:
    columns = {"user": "user", "item": "item", "split": "split", "weight": "weight"}
    roots = {"prepared_root": str(folder / "prepared"), "runs_root": str(folder / "runs")}
    shape = {"embedding_dim": 6, "over_arch_layer_sizes": [8, 5], "dropout": 0.0}
    return config_from(
        {
            "run": {"name": "r", "loggers": [], **roots},
            "data": {
                "root": str(folder),
                "task": "ctr",
                "interactions": {"file": "log.csv", **columns, "labels": TARGETS},
                "features": [
                    {"name": "user", "entity": "user"},
                    {"name": "item", "entity": "item"},
                    {"name": "device"},
                    {"name": "hour", "kind": "numeric", "transform": "standard"},
                ],
            },
            "model": {**shape, **model},
            "trainer": {"epochs": 2, "batch_size": 64, "target_weights": {"buy": 3}},
            "recommend": {
                "k": N_ITEMS,
                "mask": [],
                "context": {"device": "phone", "hour": 7},
                "targets": COMBINED,
            },
        }
    )


def prepared(config: Config) -> PreparedDataset:
    prepare(config.data, config.input_root, config.prepared_dir, seed=1)
    return PreparedDataset(config.prepared_dir)


def test_a_dataset_counts_the_rows_of_each_label_and_leaves_those_without_any_out(
    tmp_path: Path,
) -> None:
    rows = log_of_clicks(tmp_path)
    dataset = prepared(config_of(tmp_path))
    known = rows[rows[TARGETS].notna().any(axis=1)]
    manifest = dataset.manifest
    assert len(rows) - len(known) > 0
    assert manifest.dropped == {"log.csv: rows without any of click, buy": len(rows) - len(known)}
    for split, part in known.groupby("split"):
        spec = manifest.splits[str(split)]
        assert (spec.rows, spec.positives) == (len(part), (part[TARGETS] == 1).any(axis=1).sum())
        for target in TARGETS:
            of_label = spec.labels[target]
            assert (of_label.rows, of_label.positives) == (part[target].count(), part[target].sum())
    dataset.files.check_everything()
    train = known[known["split"] == "train"]
    np.testing.assert_allclose(manifest.label_shares, train[TARGETS].notna().mean())
    odds = [np.log((train[t].sum() + 0.5) / ((train[t] == 0).sum() + 0.5)) for t in TARGETS]
    np.testing.assert_allclose(manifest.log_odds, odds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["click"]}, "labels names several targets; for one, set label: click"),
        ({"labels": ["click", "click"]}, "labels names 'click' twice"),
        ({"label": "buy"}, "label and labels: list all targets in labels (buy too)"),
        ({"labels": ["click", "user"]}, "labels and user are both the column 'user'"),
        ({"labels": ["click", "hour"]}, "hour: the column 'hour' is one of interactions.labels"),
        ({"rating": "hour", "min_rating": 3}, "rating makes a label of its own"),
        ({"repeated": "strongest", "weight": None}, "cannot compare rows by several labels"),
        ({"impressions": "item", "item": None}, "impressions have one label for each item"),
    ],
)
def test_settings_that_do_not_go_with_several_labels_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tree = config_of(tmp_path).model_dump(mode="json")
    tree["data"]["interactions"] |= change
    with pytest.raises(DeepFMError) as caught:
        config_from(tree)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("trainer.target_weights", {"sale": 1}, "'sale' is not in data.interactions.labels"),
        ("trainer.target_weights", {"buy": 0}, "the weight of buy must be above 0 (got 0)"),
        ("recommend.targets", {"sale": 1}, "available: click, buy"),
        ("recommend.targets", {"buy": 0}, "all weights are 0"),
        ("recommend.targets", {"buy": 1e308}, "weights must be from -1000000 to 1000000"),
        ("recommend.probability", True, "is no log-odds; rank by one of them"),
        ("recommend.matrix", "int8", "recommend.targets={buy: 1}"),
        ("model.shared_layers", 3, "over_arch_layer_sizes has 2"),
        ("model.linear", "logistic", "fits one label"),
        ("data.task", "implicit", "interactions.labels needs task: ctr"),
        ("trainer.loss", "softmax", "trainer.loss=softmax: needs positives (data.task=implicit)"),
    ],
)
def test_what_targets_cannot_do_is_refused_by_name(
    setting: str, value: Any, message: str, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    with pytest.raises(DeepFMError) as caught:
        with_settings(config, {setting: value})
    assert message in str(caught.value)


def test_the_probability_of_the_one_target_that_ranks_is_known(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with_settings(config, {"recommend.targets": {"buy": 1}, "recommend.probability": True})


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("2", "log.csv, line 2: buy '2' is not a label: 0, 1, true or false is expected"),
        (None, "interactions.labels: buy is empty in all"),
    ],
)
def test_useless_labels_are_refused(cells: str | None, message: str, tmp_path: Path) -> None:
    rows = log_of_clicks(tmp_path).assign(buy=cells)
    rows.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(DataError) as caught:
        prepared(config_of(tmp_path))
    assert message in str(caught.value)


def test_a_label_that_is_always_the_same_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from deepfm_dist.training.checks import warn_of_labels

    log_of_clicks(tmp_path).assign(buy=0).to_csv(tmp_path / "log.csv", index=False)
    warn_of_labels(prepared(config_of(tmp_path)).manifest)
    assert "all buy labels of" in caplog.text and "data.interactions.labels" in caplog.text
    assert "click labels" not in caplog.text


def test_starting_from_a_model_of_other_targets_is_refused(tmp_path: Path) -> None:
    log_of_clicks(tmp_path)
    config = config_of(tmp_path)
    tree = config.data.model_dump(mode="json")
    tree["interactions"] |= {"labels": [], "label": "click"}
    alone = DataConfig.model_validate(tree)
    with pytest.raises(ConfigError, match=r"was trained on one target, and .*labels=click,buy"):
        check_start("start", {}, alone, prepared(config).manifest)


def test_the_loss_counts_known_labels_alone() -> None:
    rng = np.random.default_rng(2)
    z, w = rng.normal(size=(9, 2)), rng.random(9)
    y = rng.integers(-1, 2, (9, 2))
    losses = w[:, None] * np.log1p(np.exp(np.where(y == 1, -z, z)))
    expected = [losses[y[:, t] >= 0, t].sum() for t in range(2)]
    logits = torch.tensor(z, requires_grad=True)
    sums = known_bce_sums(logits, torch.tensor(y, dtype=torch.float64), torch.tensor(w))
    np.testing.assert_allclose(sums.detach(), expected)
    sums.sum().backward()
    assert logits.grad is not None
    assert (logits.grad.numpy() == 0).tolist() == (y < 0).tolist()


def test_batches_have_the_labels_of_their_rows_wherever_they_are_made(tmp_path: Path) -> None:
    log = log_of_clicks(tmp_path)
    dataset = prepared(config_of(tmp_path))
    pieces = {"batch_size": 64, "world_size": 1, "rank": 0, "seed": 3}
    host = TrainingBatches(dataset, **pieces)
    made = [host.batch(step) for step in range(1, host.steps_per_epoch + 1)]
    on_device = DeviceBatches(host, torch.device("cpu"))
    for step, batch in enumerate(made, 1):
        other = on_device.batch(step)
        assert torch.equal(other.labels, batch.labels)
        assert torch.equal(other.global_weight, batch.global_weight)
    train = log[(log["split"] == "train") & log[TARGETS].notna().any(axis=1)]
    labels = torch.cat([b.labels[b.weights > 0] for b in made]).numpy()
    expected = train[TARGETS].fillna(-1).value_counts().sort_index()
    actual = pd.DataFrame(labels, columns=TARGETS).value_counts().sort_index()
    assert actual.to_dict() == expected.to_dict()
    total = torch.stack([batch.global_weight for batch in made]).sum(0)
    np.testing.assert_allclose(total, train[TARGETS].count(), rtol=1e-6)
    streamed = TrainingBatches(PreparedDataset(dataset.folder, memory_bytes=0), **pieces)
    some = torch.cat([b.labels[b.weights > 0] for b in streamed.steps(1, len(made))]).numpy()
    actual = pd.DataFrame(some, columns=TARGETS).value_counts().sort_index()
    assert actual.to_dict() == expected.to_dict()


@pytest.mark.parametrize("weights", [[], [1.0, 3.0]])
def test_torchrecs_pipeline_can_trace_the_task(weights: list[float]) -> None:
    class AboveTheModel(torch.fx.Tracer):
        def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, DeepFM)

    tables = {"user": Table(3, ("user",))}
    model = build_deepfm(tables, ["user"], 0, 4, n_targets=max(1, len(weights)))
    AboveTheModel().trace(DeepFMTrain(model, weights))


def _losses(config: Config) -> list[float]:
    with process_group("cpu") as world:
        return Run(config.prepared_dir, config, world).losses(1, 20)


def test_losses_are_the_same_at_any_world_size(tmp_path: Path) -> None:
    log_of_clicks(tmp_path)
    config = config_of(tmp_path, shared_layers=1, batch_norm=True, dropout=0.1)
    config = with_settings(config, {"model.linear": "none", "trainer.loss": "bce"})
    prepared(config)
    alone, *others = (run_ranks(_losses, size, config)[0] for size in (1, 2, 4))
    assert np.isfinite(alone).all()
    for losses in others:
        assert difference(losses, alone) <= 1e-6


def _trained(config: Config, folder: Path) -> tuple[dict[str, float], list[Prediction], Any]:
    """Figures, what the service says of one row, and whom it recommends what."""
    train(config)
    result = evaluate(config)
    assert result is not None and result.report is not None
    predict(config, str(folder / "log.csv"), folder / "scores.parquet")
    recommend(config, output=str(folder / "ranked.parquet"))
    explained = {"recommend.explain": 2, "recommend.users": ["1"]}
    recommend(with_settings(config, explained), output=str(folder / "explained.parquet"))
    run = find_run(config, [])
    export(run, folder / "export")
    with process_group("cpu") as world:
        service = Recommender(run, folder / "export", world)
        predictions, _ = service.predict([{"user": 1, "item": 2, "device": "desk", "hour": 3}])
        return result.rows, predictions, service.recommend("1", N_ITEMS)


def check_service(prediction: Prediction, ranking: list[Scored], folder: Path) -> None:
    """Compares the answers of `_trained` with the files of predict and recommend."""
    assert prediction.targets is not None and prediction.probability is None
    together = sum(COMBINED[name] * (of.score or 0) for name, of in prediction.targets.items())
    assert prediction.score == pytest.approx(together, abs=1e-5)
    for one in prediction.targets.values():
        assert one.score is not None
        assert one.probability == pytest.approx(1 / (1 + np.exp(-one.score)), rel=1e-5)
    ranked = pd.read_parquet(folder / "ranked.parquet").query("user_id == 1")
    assert [s.card.id for s in ranking] == ranked["item_id"].tolist()
    np.testing.assert_allclose([s.score for s in ranking], ranked["score"], atol=1e-5)
    assert all(s.probability is None for s in ranking)
    for row in pd.read_parquet(folder / "explained.parquet").itertuples():
        explained: Any = row.explanation
        shares = [explained["base"], explained["other"], explained["remainder"]]
        shares += [reason["share"] for reason in explained["reasons"]]
        assert sum(shares) == pytest.approx(row.score, abs=1e-4)


def _recommended(config: Config, target: Path) -> None:
    recommend(config, output=str(target))


def test_rankings_are_the_weighted_sum_of_the_targets_logits(tmp_path: Path) -> None:
    log = log_of_clicks(tmp_path)
    config = config_of(tmp_path, shared_layers=1, batch_norm=True, fm_pairs="across")
    figures, [prediction], ranking = run_in_fork(_trained, config, tmp_path)
    scores = pd.read_parquet(tmp_path / "scores.parquet")
    check_service(prediction, ranking, tmp_path)
    test = log["split"] == "test"
    shares = {"click": 0.25, "buy": 0.75}
    for target in TARGETS:
        known = test & log[target].notna()
        y, w = log.loc[known, target], log.loc[known, "weight"]
        z = scores.loc[known, f"score_{target}"]
        p = scores.loc[known, f"probability_{target}"]
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-z)), rtol=1e-5)
        assert figures[f"{target}.auc"] == pytest.approx(roc_auc_score(y, z, sample_weight=w))
        loss = log_loss(y, p.astype(float), sample_weight=w)
        assert figures[f"{target}.log_loss"] == pytest.approx(loss, rel=1e-5)
    for name in ("auc", "log_loss"):
        mean = sum(share * figures[f"{target}.{name}"] for target, share in shares.items())
        assert figures[name] == pytest.approx(mean)
    entropy = sum(s * figures[f"{t}.log_loss"] / figures[f"{t}.ne"] for t, s in shares.items())
    assert figures["ne"] == pytest.approx(figures["log_loss"] / entropy)
    page = next((tmp_path / "runs/r").glob("report*.html")).read_text()
    assert all(f'id="calibration-{t}"' in page and f"{t}.auc" in page for t in TARGETS)

    ranked = pd.read_parquet(tmp_path / "ranked.parquet")
    assert len(ranked) == N_USERS * N_ITEMS
    expected = brute_force(tmp_path / "export", config, Manifest.read(config.prepared_dir))
    both = ranked.merge(expected, on=["user_id", "item_id"], validate="1:1")
    assert len(both) == len(ranked)
    error = (both["score"] - both["logit"]).abs() / both["logit"].abs().clip(lower=1)
    assert error.max() <= 1e-5
    order = ranked.groupby("user_id")["score"].apply(lambda s: s.is_monotonic_decreasing)
    assert order.all()
    run_ranks(_recommended, 2, config, tmp_path / "two.parquet")
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "ranked.csv").read_bytes()


def brute_force(folder: Path, config: Config, manifest: Manifest) -> pd.DataFrame:
    """The combined logits of all pairs in float64, from an export and the formula of the page."""
    tensors = load_file(folder / "model.safetensors").items()
    w = {name: tensor.double().numpy() for name, tensor in tensors}
    assert json.loads((folder / "config.json").read_text())["targets"] == TARGETS
    users, items = (pd.read_parquet(folder / f"entities/{e}.parquet") for e in ("user", "item"))
    devices = pd.read_parquet(folder / "vocabulary/device.parquet").set_index("id")["row"]
    spec, dim = manifest.numeric["hour"], config.model.embedding_dim
    hour = (7 - spec.mean) / spec.std
    hour_row = hour * np.append(w["dense_factors"][0], w["dense_first_order"][0])

    def layer(x: np.ndarray, start: str, n: int) -> np.ndarray:
        x = w[f"{start}.hidden.{n}.weight"] @ x + w.get(f"{start}.hidden.{n}.bias", 0)
        norm = f"{start}.norms.{n}."
        if f"{norm}running_mean" in w:
            x = (x - w[f"{norm}running_mean"]) / np.sqrt(w[f"{norm}running_var"] + 1e-5)
            x = x * w[f"{norm}weight"] + w[f"{norm}bias"]
        return np.maximum(x, 0)

    phone, across = w["tables.device"][devices["phone"]], config.model.fm_pairs == "across"
    n_shared, n_layers = config.model.shared_layers, len(config.model.over_arch_layer_sizes)
    pairs_of_fields = [p for p in combinations(range(4), 2) if 1 in p or not across]
    rows = []
    for u in range(1, len(users)):
        for i in range(1, len(items)):
            x = np.stack([w["tables.user"][u], w["tables.item"][i], phone, hour_row])
            v = x[:, :dim]
            pairs = sum(v[a] @ v[b] for a, b in pairs_of_fields)
            bottom = v.ravel()
            for n in range(n_shared):
                bottom = layer(bottom, "over_arch.shared", n)
            total = 0.0
            for t, target in enumerate(TARGETS):
                h, start = bottom, f"over_arch.towers.{t}"
                for n in range(n_layers - n_shared):
                    h = layer(h, start, n)
                deep = w[f"{start}.output.weight"][0] @ h + w[f"{start}.output.bias"][0]
                linear = w["scale"][t] * (x[:, dim].sum() + pairs)
                total += COMBINED[target] * (w["bias"][t] + linear + deep)
            rows.append((users["id"][u], items["id"][i], total))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "logit"]).astype(
        {"user_id": int, "item_id": int}
    )


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("n_shared", [0, 1, 3])
def test_one_over_arch_gives_the_weighted_sum_of_the_towers(
    n_shared: int, batch_norm: bool
) -> None:
    torch.manual_seed(1)
    options = {"activation": "tanh", "batch_norm": batch_norm}
    towers = mlp_towers(12, [7, 6, 5], n_targets=3, n_shared=n_shared, **options)
    assert isinstance(towers, MLPTowers)
    weights, x = [0.5, 0.0, -2.0], torch.randn(40, 12)
    towers(x + 1)  # moves the running means and variances
    whole = towers.eval().weighted_sum(weights)
    np.testing.assert_allclose(
        whole(x).detach(), (towers(x) @ torch.tensor(weights)).detach(), atol=1e-6
    )


@pytest.mark.parametrize("kind", [MLPTowers, Towers])
def test_the_weighted_sum_is_on_the_models_device(kind: type[Towers]) -> None:
    deep: Any = mlp_towers(8, [7, 5], n_targets=2, n_shared=0)
    deep = deep if kind is MLPTowers else Towers(list(deep.towers))
    arch = InteractionArch(0, 4, over_arch=deep, n_targets=2).to("meta")
    model = arch.weighted_sum([0.7, -1.2])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize("over_arch", ["mlp", "of the user's own", "none"])
def test_the_catalogue_scores_what_the_forward_pass_does(over_arch: str) -> None:
    torch.manual_seed(2)
    n, dim, is_item = 6, 4, [False, True, True, False]
    deep: Any = None
    if over_arch != "none":
        deep = mlp_towers(4 * dim, [7, 5], n_targets=2, n_shared=0)
    if over_arch == "of the user's own":
        deep = Towers(list(deep.towers))
    arch = InteractionArch(1, dim, over_arch=deep, n_targets=2).eval()
    for parameter in arch.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    weights = [0.7, -1.2]
    scorer = CatalogueScorer(arch.weighted_sum(weights), is_item, n_categorical=3)
    rows, dense = torch.randn(n, 3, dim + 1), torch.randn(n, 1)
    user, item = (
        scorer.side(s, rows[:, :, :dim], rows[:, :, dim], dense) for s in ("user", "item")
    )
    for u in range(n):
        pairs = torch.stack([rows[u, 0].expand(n, -1), rows[:, 1], rows[:, 2]], 1)
        expected = arch(pairs, dense[u].expand(n, -1)).double() @ torch.tensor(weights).double()
        np.testing.assert_allclose(scorer.scores(user, item)[u], expected.detach(), atol=1e-5)
