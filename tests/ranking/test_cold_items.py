"""Items without training rows: known by their attributes, scored exactly, ranked on demand."""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from deepfm_dist import cli
from deepfm_dist.config import Config, config_from, load_config, with_settings
from deepfm_dist.data.batches.id_dropout import IdDropout
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.batches.user_batches import Candidates, UserBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.jobs import recommend as recommend_job
from deepfm_dist.jobs import similar as similar_job
from deepfm_dist.jobs.evaluate import evaluate
from deepfm_dist.jobs.export import export
from deepfm_dist.jobs.predict import predict
from deepfm_dist.jobs.recommend import recommend
from deepfm_dist.jobs.similar import similar
from deepfm_dist.jobs.train import train
from deepfm_dist.ranking.evaluation import RankingEvaluator
from deepfm_dist.ranking.items import Catalogue, cold_items_to_rank
from deepfm_dist.ranking.ranker import FixedRanker
from deepfm_dist.runs.trained import LoadedModel, find_run
from deepfm_dist.seeding import derive_seed, mix
from tests.data.small_logs import bag_of, made_of, small
from tests.ranks import run_alone, run_in_fork, run_ranks
from tests.steps import Run, difference

FIELDS: list[dict[str, Any]] = [
    {"name": "user", "entity": "user"},
    {"name": "item", "entity": "item"},
    {"name": "genre", "entity": "item", "file": "g.csv"},
]


def clicks_on_new_items(folder: Path) -> Config:
    """Clicks that hang on an item's genre; the items of the test have no other rows."""
    rng = np.random.default_rng(1)
    genres, effects = rng.integers(0, 12, 160), rng.normal(0, 3, 12)
    for name, n, first in (("train", 6000, 0), ("valid", 800, 0), ("test", 1500, 80)):
        rows = pd.DataFrame({"user": rng.integers(0, 60, n)})
        rows["item"] = rng.integers(first, first + 80, n)
        rows["log_odds"] = effects[genres[rows["item"]]]
        rows["label"] = (rng.random(n) < 1 / (1 + np.exp(-rows["log_odds"]))).astype(int)
        rows.to_csv(folder / f"{name}.csv", index=False)
    pd.DataFrame({"item": range(160), "genre": genres}).to_csv(folder / "g.csv", index=False)
    columns = {"user": "user", "item": "item", "label": "label"}
    return config_from(
        {
            "run": {
                "name": "new",
                "prepared_root": str(folder / "prepared"),
                "runs_root": str(folder / "runs"),
                "loggers": [],
            },
            "data": {
                "root": str(folder),
                "task": "ctr",
                "interactions": {"file": "train.csv", **columns},
                "split": {"valid_file": "valid.csv", "test_file": "test.csv"},
                "features": FIELDS,
                "id_dropout": 0.1,
            },
            "model": {
                "embedding_dim": 8,
                "over_arch_layer_sizes": [16],
                "batch_norm": False,
                "dropout": 0,
            },
            "trainer": {"epochs": 12, "patience": 2},
            "recommend": {"k": 160, "mask": []},
        }
    )


def _everything(config: Config, folder: Path) -> dict[str, Any]:
    train(config)
    result = evaluate(config)
    assert result is not None
    out = {"rows": result.rows}
    predict(config, str(folder / "test.csv"), folder / "scores.parquet")
    for choice in ("include", "exclude", "only"):
        ours = with_settings(config, {"recommend.cold_items": choice})
        recommend(ours, output=str(folder / f"{choice}.parquet"))
        similar(ours, output=str(folder / f"similar-{choice}.parquet"))
    recommend(config, output=str(folder / "default.parquet"))
    export(find_run(config, []), folder / "export")
    return out


def _recommended(config: Config, target: Path) -> None:
    recommend(with_settings(config, {"recommend.cold_items": "include"}), output=str(target))


def brute_force(folder: Path) -> pd.DataFrame:
    """``user_id, item_id, logit``: every pair in float64, from the weights of an export."""
    tensors = load_file(folder / "model.safetensors").items()
    w = {name: tensor.double().numpy() for name, tensor in tensors}
    users, items = (pd.read_parquet(folder / f"entities/{e}.parquet") for e in ("user", "item"))
    n_known = len(w["tables.item"])
    rows = []
    for u in range(1, len(users)):
        for i in range(1, len(items)):
            [genre] = items["genre"][i]
            x = np.stack(
                [
                    w["tables.user"][u],
                    w["tables.item"][i if i < n_known else 0],
                    w["tables.genre"][genre],
                ]
            )
            v = x[:, :-1]
            pairs = sum(v[a] @ v[b] for a in range(3) for b in range(a))
            h = np.maximum(
                w["over_arch.hidden.0.weight"] @ v.ravel() + w["over_arch.hidden.0.bias"], 0
            )
            deep = w["over_arch.output.weight"][0] @ h + w["over_arch.output.bias"][0]
            logit = w["bias"][0] + x[:, -1].sum() + pairs + deep
            rows.append((users["id"][u], items["id"][i], logit))
    return pd.DataFrame(rows, columns=["user_id", "item_id", "logit"])


def test_new_items_are_judged_by_their_attributes_alike_everywhere(tmp_path: Path) -> None:
    config = clicks_on_new_items(tmp_path)
    figures = run_in_fork(_everything, config, tmp_path)["rows"]
    test = pd.read_csv(tmp_path / "test.csv")
    possible = roc_auc_score(test["label"], test["log_odds"])
    scores = pd.read_parquet(tmp_path / "scores.parquet")["score"]
    area = roc_auc_score(test["label"], scores)
    assert area >= possible - 0.02  # 0.5 where their attributes are not known
    assert figures["auc_cold"] == figures["auc"] == pytest.approx(area)
    assert "auc_warm" not in figures  # the test has none

    ranked = {
        name: pd.read_parquet(tmp_path / f"{name}.parquet")
        for name in ("include", "exclude", "only", "default")
    }
    is_new = {name: frame["item_id"] >= 80 for name, frame in ranked.items()}
    assert not is_new["exclude"].any()
    assert is_new["only"].all()
    pd.testing.assert_frame_equal(ranked["default"], ranked["include"])
    assert {name: len(frame) for name, frame in ranked.items()} == {
        "include": 60 * 160,
        "exclude": 60 * 80,
        "only": 60 * 80,
        "default": 60 * 160,
    }
    expected = brute_force(tmp_path / "export").astype({"user_id": int, "item_id": int})
    both = ranked["include"].merge(expected, on=["user_id", "item_id"], validate="1:1")
    assert len(both) == 60 * 160
    error = (both["score"] - both["logit"]).abs() / both["logit"].abs().clip(lower=1)
    assert error.max() <= 1e-5

    alike = pd.read_parquet(tmp_path / "similar-include.parquet")
    genres = pd.read_csv(tmp_path / "g.csv")["genre"]
    nearest = alike[(alike["item_id"] >= 80) & (alike["rank"] == 1)]
    same = genres[nearest["item_id"]].to_numpy() == genres[nearest["similar_item_id"]].to_numpy()
    assert same.mean() > 0.9  # nothing else tells new items of a genre apart
    assert (pd.read_parquet(tmp_path / "similar-exclude.parquet")["item_id"] < 80).all()

    run_ranks(_recommended, 2, config, tmp_path / "two.parquet")
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "include.csv").read_bytes()
    assert (tmp_path / "two.parquet").read_bytes() == (tmp_path / "include.parquet").read_bytes()


def _recall(config: Config) -> float:
    train(config)
    result = evaluate(config)
    assert result is not None
    assert result.comparison is not None
    return result.comparison.figures["model"]["recall@10"]


@pytest.mark.slow
def test_the_default_model_ranks_new_items_nearly_as_well_as_the_odds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    genres, taste = rng.integers(0, 12, 180), rng.normal(0, 2, (300, 12))
    odds = np.exp(taste[:, genres])
    known: list[tuple[int, int]] = []
    new: list[tuple[int, int]] = []
    possible = []
    for user, weights in enumerate(odds):
        for items, n, rows in ((range(120), 20, known), (range(120, 180), 6, new)):
            chance = weights[list(items)] / weights[list(items)].sum()
            liked = rng.choice(items, n, replace=False, p=chance)
            rows += [(user, item) for item in liked]
        best = 120 + np.argsort(-weights[120:], kind="stable")[:10]
        possible.append(np.isin(liked, best).mean())
    for name, rows in (("known", known), ("new", new)):
        pd.DataFrame(rows, columns=["user", "item"]).to_csv(tmp_path / f"{name}.csv", index=False)
    pd.DataFrame({"item": range(180), "genre": genres}).to_csv(tmp_path / "g.csv", index=False)
    roots = {"prepared_root": str(tmp_path / "p"), "runs_root": str(tmp_path / "r"), "loggers": []}
    data = {
        "root": str(tmp_path),
        "interactions": {"file": "known.csv", "user": "user", "item": "item"},
        "split": {"test_file": "new.csv"},
        "features": FIELDS,
        "id_dropout": 0.1,
    }
    config = config_from(
        {"run": {"name": "new", **roots}, "data": data, "recommend": {"cold_items": "only"}}
    )
    assert run_in_fork(_recall, config) >= 0.8 * np.mean(possible)


def _area_of_new_items(config: Config) -> float:
    train(config)
    result = evaluate(config)
    assert result is not None
    return result.rows["auc_cold"]


@pytest.mark.slow
def test_the_default_model_judges_clicks_on_new_items_nearly_as_well_as_the_rows_allow(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(4)
    n_users, n_genres, n_items = 250, 10, 200
    genres, taste = rng.integers(0, n_genres, n_items), rng.normal(0, 2.7, (n_users, n_genres))
    parts = {}
    for split, n, items in (
        ("train", 45_000, (0, 100)),
        ("valid", 4_500, (0, 100)),
        ("test", 9_000, (100, 200)),  # none of them has other rows
    ):
        rows = pd.DataFrame({"user": rng.integers(0, n_users, n), "split": split})
        rows["item"] = rng.integers(*items, n)
        odds = taste[rows["user"], genres[rows["item"]]]
        rows["label"] = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(int)
        parts[split] = rows.assign(genre=genres[rows["item"]])
    pd.concat(parts.values()).to_csv(tmp_path / "log.csv", index=False)
    pd.DataFrame({"item": range(n_items), "genre": genres}).to_csv(tmp_path / "g.csv", index=False)
    # The share of clicks of each user and genre: as good as any estimate from the rows.
    means = parts["train"].groupby(["user", "genre"])["label"].agg(["sum", "size"])
    means = ((means["sum"] + 0.5) / (means["size"] + 1)).rename("mean").reset_index()
    test = parts["test"].merge(means, on=["user", "genre"], how="left").fillna({"mean": 0.5})
    possible = roc_auc_score(test["label"], test["mean"])
    columns = {"user": "user", "item": "item", "label": "label", "split": "split"}
    roots = {"prepared_root": str(tmp_path / "p"), "runs_root": str(tmp_path / "r"), "loggers": []}
    data = {"root": str(tmp_path), "task": "ctr", "interactions": {"file": "log.csv", **columns}}
    sections = {"run": {"name": "clicks", **roots}, "data": {**data, "features": FIELDS}}
    # Without the models of folds, which take a minute.
    config = config_from({**sections, "trainer": {"refit_best": False}})
    area = run_in_fork(_area_of_new_items, config)
    assert area >= max(0.87, possible - 0.01)


ROWS = "u,i,s\na,x,train\na,y,train\nb,x,train\nb,y,train\nc,x,train\nc,y,train\na,rare,train\n"
ROWS += "a,new,valid\nb,new,test\nb,other,test\nc,x,test\n"
GENRES = "i,g\nx,A\ny,B\nrare,A\nnew,B\nnever,A|C\n"
SPEC: dict[str, Any] = {
    "interactions": {"file": "s.csv", "user": "u", "item": "i", "split": "s"},
    "features": [
        {"name": "user", "entity": "user"},
        {"name": "item", "entity": "item", "min_count": 2},
        {"name": "g", "entity": "item", "file": "g.csv", "separator": "|"},
    ],
    "titles": {"file": "t.csv", "column": "t"},
    "negatives": {"evaluation_per_positive": 1},
}


def prepared(folder: Path, **changes: Any) -> PreparedDataset:
    (folder / "s.csv").write_text(ROWS)
    (folder / "g.csv").write_text(GENRES)
    (folder / "t.csv").write_text("i,t\nx,The X\nnever,Never seen\n")
    return made_of(folder, SPEC | changes)


def test_items_of_attribute_files_have_rows_behind_the_trained_ones(tmp_path: Path) -> None:
    dataset = prepared(tmp_path)
    assert dataset.manifest.entities["item"] == 3
    assert dataset.manifest.cold == {"item": 3}
    ids = dataset.entity_ids("item", cold=True).to_pylist()
    assert sorted(ids[1:3]) == ["x", "y"]
    assert sorted(ids[3:]) == ["never", "new", "rare"]  # `other` has no attributes
    words = [None, *dataset.vocabulary("g").ids.to_pylist()]
    assert sorted(words[1:]) == ["A", "B"]  # of training items alone
    values = dataset.entity_fields_with_cold["g"]
    of_item = {name: [words[v] for v in bag_of(values, ids.index(name))] for name in ids[1:]}
    assert of_item == {"x": ["A"], "y": ["B"], "rare": ["A"], "new": ["B"], "never": ["A", None]}
    titles = dict(zip(ids, dataset.titles(cold=True).to_pylist(), strict=True))  # type: ignore[union-attr]
    assert (titles["x"], titles["never"], titles["new"]) == ("The X", "Never seen", None)
    users = dataset.entity_ids("user").to_pylist()

    def items_of(split: str) -> list[tuple[str, str | None]]:
        rows = dataset.rows(split)
        positive = [True] * rows.n if rows.labels is None else rows.labels == 1
        assert rows.users is not None
        assert rows.items is not None
        pairs = zip(rows.users, rows.items, positive, strict=True)
        return sorted((users[u], ids[i] or "?") for u, i, yes in pairs if yes)

    assert ("a", "?") in items_of("train")  # `rare` is learned as the unknown item
    assert items_of("valid") == [("a", "new")]
    assert items_of("test") == [("b", "?"), ("b", "new")]
    [history, seen_train], [seen_valid] = dataset.met("train"), dataset.met("valid")
    a = users.index("a")
    assert sorted(ids[i] for i in bag_of(history, a)) == ["x", "y"]
    assert [ids[i] for i in bag_of(seen_train, a)] == ["rare"]  # and is not recommended to a
    assert [ids[i] for i in bag_of(seen_valid, a)] == ["new"]
    for held_out in (False, True):  # no negative is drawn among new items
        assert dataset.seen(held_out).values.max() <= 1
    assert dataset.with_validation().history.values.max() <= 2
    mapped = PreparedDataset(dataset.folder, memory_bytes=0)
    assert bag_of(mapped.entity_fields_with_cold["g"], ids.index("never")) == bag_of(
        values, ids.index("never")
    )
    dataset.files.check_everything()


def test_a_catalogue_file_lists_the_new_items(tmp_path: Path) -> None:
    (tmp_path / "offer.csv").write_text("sku\nx\nnever\nunheard\n")
    catalogue = {"file": "offer.csv", "key": "sku"}
    dataset = prepared(tmp_path, catalogue=catalogue)
    ids = dataset.entity_ids("item", cold=True).to_pylist()
    assert sorted(ids[3:]) == ["never", "unheard"]
    assert bag_of(dataset.entity_fields_with_cold["g"], ids.index("unheard")) == []
    rows = {"sku": ["x", "never"]}
    pd.DataFrame(rows).to_csv(tmp_path / "offer.csv", index=False)
    assert prepared(tmp_path, catalogue=catalogue).manifest.cold == {"item": 1}


def test_a_grown_dataset_keeps_what_users_met_of_items_that_were_new(tmp_path: Path) -> None:
    earlier = prepared(tmp_path)
    (tmp_path / "s.csv").write_text("u,i,s\na,x,train\nb,new,train\nc,new,train\nb,y,test\n")
    (tmp_path / "g.csv").write_text(GENRES + "tomorrow,A\n")
    spec = SPEC | {"vocabulary_from": str(earlier.folder)}
    data = DataConfig.model_validate(spec)
    prepare(data, tmp_path, tmp_path / "later", seed=1)
    later = PreparedDataset(tmp_path / "later")
    ids, users = (later.entity_ids(e, cold=True).to_pylist() for e in ("item", "user"))
    assert ids[:3] == earlier.entity_ids("item").to_pylist()[:3]
    assert ids[3] == "new"  # has a row of its own now
    assert sorted(ids[4:]) == ["never", "rare", "tomorrow"]
    met = [bags for split in ("train", "valid", "test") for bags in later.met(split)]
    of_a = {ids[i] for bags in met for i in bag_of(bags, users.index("a"))}
    assert of_a == {"x", "y", "rare", "new"}


def test_files_of_rows_and_of_nothing_else_give_no_new_items(tmp_path: Path) -> None:
    features = "[{name: user, entity: user}, {name: item, entity: item}, "
    features += "{name: g, entity: item, column: g}]"
    dataset = small(tmp_path, "u,i,g\na,x,1\na,y,2\nb,x,1\n", features)
    assert dataset.manifest.cold == {}
    assert not (dataset.folder / "entities" / "cold_item.parquet").exists()
    assert cold_items_to_rank("include", 0.1, dataset.manifest) == "exclude"
    with pytest.raises(ConfigError, match=r"recommend\.cold_items=only: .* no items without"):
        cold_items_to_rank("only", 0.1, dataset.manifest)
    with pytest.raises(ValueError, match=r"id_dropout=0\.1: no field .* is the id"):
        DataConfig.model_validate(SPEC | {"features": SPEC["features"][2:], "id_dropout": 0.1})


def test_untrained_unknown_ids_are_ranked_on_demand_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = prepared(tmp_path).manifest
    caplog.set_level(logging.INFO)
    assert cold_items_to_rank(None, 0.1, manifest) == "include"
    assert caplog.text.count("unknown id") == 0
    assert cold_items_to_rank(None, 0, manifest) == "exclude"
    assert "3 items without training rows not ranked" in caplog.text
    assert cold_items_to_rank("only", 0, manifest) == "only"
    assert "recommend.cold_items=only: 3 items without training rows have the unknown id" in (
        caplog.text
    )
    dataset = prepared(tmp_path)
    names = {
        choice: sorted(Catalogue(dataset, cold_items=choice).ids.to_pylist())
        for choice in ("include", "exclude", "only")
    }
    assert names["exclude"] == ["x", "y"]
    assert names["only"] == ["never", "new", "rare"]
    assert names["include"] == sorted(names["exclude"] + names["only"])


def test_rankings_of_new_items_need_a_held_out_one(sample: PreparedDataset) -> None:
    assert sample.manifest.cold == {"item": 2}
    with pytest.raises(DataError, match=r"cold_items=only: no item of the test split's rows"):
        RankingEvaluator(sample, "test", {}, cold_items="only")


@pytest.mark.parametrize("job", [recommend_job, similar_job])
def test_new_items_alone_do_not_take_the_place_of_the_rankings_of_all(job: ModuleType) -> None:
    config = load_config("sample", ["recommend.cold_items=only"])
    run = LoadedModel(config, None, None, Path(), 0, load_config("sample").model_dump(mode="json"))  # type: ignore[arg-type]
    path = run.output(job.OUTPUT.default_name, job.OUTPUT.settings, None)
    assert path.name == f"{job.OUTPUT.default_name}-cold_items-only.parquet"


@pytest.mark.parametrize("command", ["evaluate", "recommend", "similar", "serve", "nightly"])
def test_what_is_ranked_has_an_effect_on_every_command_that_ranks(command: str) -> None:
    assert cli.uses_setting(command, "recommend.cold_items")


def _measured(folder: Path) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
    dataset = PreparedDataset(folder)
    actual = {}
    with process_group("cpu") as world:
        for choice in ("include", "only"):
            held_out = RankingEvaluator(dataset, "test", {}, cold_items=choice)
            scores = torch.tensor([{"never": 3.0, "new": 2, "x": 4, "y": 1, "rare": 0}[i]
                                   for i in held_out.catalogue.ids.to_pylist()])  # fmt: skip
            n = len(held_out.catalogue)
            ranker = FixedRanker(lambda b, e, s=scores: s.repeat(e - b, 1), n)  # type: ignore[misc]
            measured = held_out.measure(ranker, (1, 2), world)
            assert measured is not None
            actual[choice] = measured[1]
    return actual


def test_figures_of_items_with_and_without_training_rows_stand_apart(tmp_path: Path) -> None:
    # b has met x and y; of never, new, rare it is shown never and new. c met x, which is masked.
    figures = run_alone(_measured, prepared(tmp_path).folder)
    include, only = figures["include"], figures["only"]
    assert include["recall_cold@1"].tolist() == [0]
    assert include["recall_cold@2"].tolist() == [1]
    assert include["ndcg_cold@2"] == pytest.approx([1 / np.log2(3)])
    assert np.isnan(include["recall_warm@2"]).all()  # nobody has a held-out one left
    assert include["recall@2"].tolist() == [0.5]  # `other` is in no catalogue, and was held out
    assert only["recall@2"].tolist() == [1]


def test_a_share_of_ids_is_replaced_by_seed_step_and_row() -> None:
    numbers = np.arange(20_000)
    hidden = IdDropout(0.3, 5).hidden(7, item=numbers)
    assert hidden is not None
    assert hidden["item"].mean() == pytest.approx(0.3, abs=0.01)
    key = mix(np.uint64(derive_seed(5, "id_dropout", "item", 7)))
    expected = [int(mix(key ^ np.uint64(n))) >> 32 < round(0.3 * 2**32) for n in range(200)]
    assert hidden["item"][:200].tolist() == expected
    for other in (
        IdDropout(0.3, 6).hidden(7, item=numbers),
        IdDropout(0.3, 5).hidden(8, item=numbers),
    ):
        assert other is not None
        assert (other["item"] & hidden["item"]).mean() == pytest.approx(0.09, abs=0.01)
    assert IdDropout(0, 5).hidden(7, item=numbers) is None


@pytest.mark.parametrize("kind", ["rows", "users"])
def test_ranks_replace_the_same_ids_and_no_attributes(sample: PreparedDataset, kind: str) -> None:
    def batch(rank: int, size: int, share: float) -> dict[str, list[list[int]]]:
        if kind == "rows":
            made: Any = TrainingBatches(sample, 600, rank, size, 3, id_dropout=share).batch(2)
            heights = [len(made.labels)] * 2
        else:
            made = UserBatches(sample, 60, rank, size, 3, Candidates(), id_dropout=share).batch(2)
            heights = [made.n_users, made.n_shared]
        bags = {}
        for name, height in zip(("user", "item", "genre"), (*heights, heights[1]), strict=True):
            of_field = made.sparse[name]
            parts = of_field.values().split(of_field.lengths().tolist())
            bags[name] = [part.tolist() for part in parts[:height]]
        return bags

    whole, plain = batch(0, 1, 0.4), batch(0, 1, 0.0)
    parts = [batch(rank, 3, 0.4) for rank in range(3)]
    for name in whole:
        together = [bag for part in parts for bag in part[name]]
        assert together[: len(whole[name])] == whole[name]
    assert whole["genre"] == plain["genre"]
    for name in ("user", "item"):
        replaced = [bag != usual for bag, usual in zip(whole[name], plain[name], strict=True)]
        assert 0.2 < np.mean(replaced) < 0.6
        ours = [bag for bag, is_new in zip(whole[name], replaced, strict=True) if is_new]
        assert ours == [[0]] * len(ours)


def _losses(config: Config) -> list[float]:
    with process_group("cpu") as world:
        return Run(config.prepared_dir, config, world).losses(1, 12)


def test_losses_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    config = with_settings(clicks_on_new_items(tmp_path), {"data.id_dropout": 0.3})
    prepare(config.data, config.data_root, config.prepared_dir, seed=1)
    one, two = run_alone(_losses, config), run_ranks(_losses, 2, config)[0]
    assert difference(one, two) < 1e-6
    without = with_settings(config, {"data.id_dropout": 0.0})
    assert difference(one, run_alone(_losses, without)) > 1e-4
