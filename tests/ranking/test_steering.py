"""Penalties, diversity and limits, against loops over all pairs."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError
from deepfm_dist.ranking.evaluation import (
    STEERED,
    Comparison,
    RankingEvaluator,
    evaluate_ranking,
)
from deepfm_dist.ranking.items import Catalogue
from deepfm_dist.ranking.output import RankingFiles
from deepfm_dist.ranking.ranker import ModelRanker, Users
from deepfm_dist.ranking.recommendation import _with_figures, recommend
from deepfm_dist.ranking.settings import RecommendConfig
from deepfm_dist.ranking.steering import Limits
from deepfm_dist.report.verdicts import ranking_verdicts
from tests.data.small_logs import made_of
from tests.ranking.shop import CONFIG, N_ITEMS, Shop
from tests.ranks import run_alone

CONTEXT = {"device": "desk", "hour": "7"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, PreparedDataset]:
    folder = tmp_path_factory.mktemp("shop")
    shop = Shop(folder)
    return shop, made_of(folder, shop.data)


def _recommended(folder: Path, wanted: RecommendConfig, out: Path) -> np.ndarray:
    """Recommends by a model of the seed alone; cosines of all items by their ids."""
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        model = deepfm_of(shard_for_training(CONFIG, dataset.manifest, world)[0].eval())
        rate = NegativeRate.from_dataset(dataset)
        recommend(model, world, dataset, wanted, out, rate=rate)
        catalogue = Catalogue(dataset)
        nobody = Users(np.zeros(0, np.int32))
        ranker = ModelRanker.from_model(model, world, dataset, catalogue, nobody, {})
        vectors = ranker.item_vectors().double().numpy()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.array(catalogue.ids.to_pylist(), int)
    cosines = np.empty((N_ITEMS, N_ITEMS))
    cosines[np.ix_(ids, ids)] = unit @ unit.T
    return cosines


def _ranked(shop: tuple[Shop, PreparedDataset], out: Path, **settings: Any) -> pd.DataFrame:
    wanted = RecommendConfig.model_validate({"context": CONTEXT, **settings})
    run_alone(_recommended, shop[1].folder, wanted, out)
    return pd.read_parquet(out / "recommendations.parquet")


def test_the_penalty_is_a_term_of_the_score(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    plain = _ranked(shop, tmp_path / "plain", k=N_ITEMS, probability=True)
    penalised = _ranked(
        shop, tmp_path / "steered", k=5, popularity_penalty=0.7, probability=True, explain=100
    )
    counts = pd.Series([i for items in shop[0].liked.values() for i in items]).value_counts()
    plain["score"] -= 0.7 * np.log(plain["item_id"].map(counts) + 1)
    plain = plain.sort_values(["user_id", "score"], ascending=[True, False])
    expected = plain.groupby("user_id").head(5).reset_index(drop=True)
    assert penalised["item_id"].tolist() == expected["item_id"].tolist()
    np.testing.assert_allclose(penalised["score"], expected["score"], atol=1e-5)
    np.testing.assert_allclose(penalised["probability"], expected["probability"], atol=1e-5)
    for row in penalised.head(20).itertuples():
        explanation: Any = row.explanation
        shares = {(r["field"], r["value"]): r["share"] for r in explanation["reasons"]}
        total = sum(shares.values()) + explanation["base"] + explanation["remainder"]
        assert total == pytest.approx(row.score, abs=1e-4)
        penalty = -0.7 * np.log(counts[row.item_id] + 1)
        assert shares["popularity_penalty", None] == pytest.approx(penalty, abs=1e-5)


def chosen_by_loops(
    shop: Shop, items: list[int], scores: list[float], cosines: np.ndarray, **settings: Any
) -> list[int]:
    """Items in the order of their choice, by the definition."""
    diversity, limits = settings.get("diversity", 0.0), settings.get("at_most", {})
    low, high = min(scores), max(scores)
    chosen: list[int] = []
    while len(chosen) < 6:
        values = {}
        for item, score in zip(items, scores, strict=True):
            kept = [*chosen, item]
            fields = {"genre": [g for i in kept for g in shop.genres[i]],
                      "brand": [shop.brands[i] for i in kept]}  # fmt: skip
            mine = {"genre": shop.genres[item], "brand": {shop.brands[item]}}
            fits = all(fields[f].count(v) <= most for f, most in limits.items() for v in mine[f])
            if item not in chosen and fits:
                likeness = max((cosines[item, other] for other in chosen), default=0)
                relevance = (score - low) / (high - low)
                values[item] = (1 - diversity) * relevance - diversity * likeness
        if not values:
            break
        chosen.append(max(values, key=lambda item: values[item]))
    return chosen


@pytest.mark.parametrize(
    "settings",
    [
        {"diversity": 0.4},
        {"at_most": {"genre": 2}},
        {"diversity": 0.7, "at_most": {"genre": 3, "brand": 1}},
        {"diversity": 1.0, "popularity_penalty": 0.5},
    ],
)
def test_items_are_chosen_by_definition(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path, settings: dict[str, Any]
) -> None:
    penalty = {"popularity_penalty": settings.get("popularity_penalty", 0.0)}
    first = _ranked(shop, tmp_path / "first", k=15, **penalty)
    wanted = RecommendConfig.model_validate({"context": CONTEXT, "k": 6, "rerank": 15, **settings})
    cosines = run_alone(_recommended, shop[1].folder, wanted, tmp_path / "again")
    again = pd.read_parquet(tmp_path / "again" / "recommendations.parquet")
    differs = False
    for user, rows in first.groupby("user_id"):
        expected = chosen_by_loops(
            shop[0], rows["item_id"].tolist(), rows["score"].tolist(), cosines, **settings
        )
        mine = again[again["user_id"] == user]
        assert mine["item_id"].tolist() == expected
        assert mine["rank"].tolist() == list(range(1, len(expected) + 1))
        by_id = rows.set_index("item_id")["score"]
        np.testing.assert_array_equal(mine["score"], by_id[expected])
        differs |= expected != rows["item_id"].tolist()[: len(expected)]
    assert differs


def test_an_answer_does_not_depend_on_how_many_items_another_request_wants(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    file, users = tmp_path / "requests.parquet", [*shop[0].liked][:8]
    answers = []
    for most in (3, 15):
        pd.DataFrame({"user": users, "k": [3] * 7 + [most]}).to_parquet(file)
        out = tmp_path / str(most)
        found = _ranked(shop, out, requests=str(file), k=3, rerank=6, diversity=0.5)
        assert (found["request"] == 7).sum() == most
        answers.append(found[found["request"] < 7].drop(columns="request"))
    pd.testing.assert_frame_equal(*answers)


def test_limits_are_for_item_fields(shop: tuple[Shop, PreparedDataset]) -> None:
    with pytest.raises(ConfigError, match=r"at_most\.gnre: unknown item field; did you mean genre"):
        Limits.from_settings(shop[1], Catalogue(shop[1]), {"gnre": 2})
    limits = Limits.from_settings(shop[1], Catalogue(shop[1]), {})
    assert isinstance(limits.values, Jagged) and len(limits.values.values) == 0
    for settings, message in (
        ({"diversity": 0.5, "rerank": 5}, "rerank=5 is less than k=10; set rerank=10"),
        ({"rerank": 50}, "rerank=50 needs diversity or at_most"),
        ({"diversity": 0.5, "candidates": 50}, "candidates=50 is less than rerank=100; lower"),
        ({"popularity_penalty": 1, "matrix": "fp32"}, "leave it out, or popularity_penalty"),
    ):
        with pytest.raises(ValueError, match=message):
            RecommendConfig.model_validate(settings)


def test_an_unknown_value_is_not_limited(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    brands = pd.Series(shop.brands | {7: "rare", 8: None}, name="brand").rename_axis("what")
    brands.to_csv(tmp_path / "brands.csv")
    features = [f | {"min_count": 10} if f["name"] == "brand" else f for f in shop.data["features"]]
    dataset = made_of(tmp_path, shop.data | {"features": features})
    catalogue = Catalogue(dataset)
    limits = Limits.from_settings(dataset, catalogue, {"brand": 1})
    is_limited = [int(i) not in (7, 8) for i in catalogue.ids.to_pylist()]
    assert limits.values.lengths.tolist() == is_limited


def _compared(
    folder: Path, steering: RecommendConfig, cutoffs: Sequence[int] = (10,)
) -> Comparison | None:
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        model = deepfm_of(
            shard_for_training(load_config("sample"), dataset.manifest, world)[0].eval()
        )
        held_out = RankingEvaluator(dataset, "test", {})
        return evaluate_ranking(model, world, held_out, cutoffs, {}, steering=steering)


def test_evaluate_measures_what_steering_changes(sample: PreparedDataset) -> None:
    plain = run_alone(_compared, sample.folder, RecommendConfig())
    assert list(plain.figures) == ["model"]
    steered = run_alone(
        _compared, sample.folder, RecommendConfig(popularity_penalty=5, diversity=0.5)
    )
    assert list(steered.figures) == ["model", STEERED]
    assert steered.figures["model"] == plain.figures["model"]
    assert steered.figures[STEERED]["novelty@10"] > steered.figures["model"]["novelty@10"] + 1
    [verdict] = ranking_verdicts(steered, 10)
    assert verdict.title == "Steered rankings" and "novelty" in verdict.text


def test_figures_at_a_cutoff_are_those_of_recommendations_of_that_many(
    sample: PreparedDataset,
) -> None:
    """Of 15 items that are ranked again; 40 recommendations are of 40."""
    steering = RecommendConfig(k=5, diversity=0.6, rerank=15)
    together = run_alone(_compared, sample.folder, steering, (40, 5, 10))
    for k, rerank in ((5, 15), (10, 15), (40, 40)):
        alone = RecommendConfig(k=k, diversity=0.6, rerank=rerank)
        expected = run_alone(_compared, sample.folder, alone, (k,))
        for name, value in expected.figures[STEERED].items():
            assert together.figures[STEERED][name] == value, name
        assert (
            together.differences[STEERED][f"ndcg@{k}"] == expected.differences[STEERED][f"ndcg@{k}"]
        )
    assert together.figures["model"].keys() == together.figures[STEERED].keys()


@pytest.mark.parametrize(
    ("at_most", "expected"),
    [
        (
            {"genre": 1},
            (
                "WARNING",
                "recommend.at_most: 3 of 9 users get fewer items than asked for; raise "
                "recommend.rerank=100, the number that they are chosen from, or the limits",
            ),
        ),
        ({}, ("INFO", "fewer than 10 candidates to recommend to 3 users")),
    ],
)
def test_limits_that_leave_users_too_few_items_are_warned_of(
    at_most: dict[str, int], expected: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    path, asked = Path("a.parquet"), SimpleNamespace(requests=None)
    files = RankingFiles(path, None, path, owners=9, rows=70, k=10, full=6)
    with caplog.at_level("INFO", "deepfm_dist"):
        _with_figures(files, {}, cast(Any, asked), RecommendConfig(at_most=at_most))
    assert [(line.levelname, line.getMessage()) for line in caplog.records] == [expected]
