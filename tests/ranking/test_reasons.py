"""Shares of a logit: they sum to it, and are what their definitions say."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config, with_settings
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.model.deepfm import OverArch
from deepfm_dist.ranking.reasons import Explainer
from deepfm_dist.ranking.recommendation import recommend
from deepfm_dist.ranking.settings import RecommendConfig
from tests.data.small_logs import made_of
from tests.ranking.cases import digest
from tests.ranking.shop import CONFIG, Shop
from tests.ranks import run_alone, run_ranks


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, PreparedDataset]:
    folder = tmp_path_factory.mktemp("shop")
    shop = Shop(folder)
    return shop, made_of(folder, shop.data)


def _recommended(
    folder: Path, config: Config, wanted: RecommendConfig, out: Path
) -> tuple[dict[str, np.ndarray], Any]:
    """Explained rankings of a model of the seed alone; its tables and the rest of it."""
    dataset = PreparedDataset(folder)
    with process_group("cpu", threads=1) as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        model = deepfm_of(sharded)
        for module in model.interaction_arch.modules():
            if hasattr(module, "running_var"):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.normal_(0, 0.3)
        recommend(model, world, dataset, wanted, out)
        tables = {}
        if world.world_size == 1:
            for name, _, _, piece in local_shards(sharded):
                tables[name] = piece.double().numpy().copy()
        arch = model.interaction_arch.double()
        deep = arch.over_arch
        return tables, (
            {n: p.detach().numpy().copy() for n, p in arch.named_parameters() if "over" not in n},
            None if deep is None else [deep.state_dict(), deep.layers[0].in_features],
        )


def share_by_definition(
    shop: tuple[Shop, PreparedDataset],
    config: Config,
    model: tuple[dict[str, np.ndarray], Any],
    user: int,
    item: int,
) -> dict[tuple[str, str | None], float]:
    """A pair's shares by field and value, from sums over values, fields and 2,000 points."""
    (files, dataset), (tables, (parameters, deep)) = shop, model
    dim = config.model.embedding_dim
    manifest = dataset.manifest
    liked = sorted({str(i) for i in files.liked[user]})
    values: dict[str, list[str]] = {
        "user": [str(user)],
        "city": [files.cities[user]],
        "seen": liked,
        "item": [str(item)],
        "genre": sorted(files.genres[item]),
        "brand": [files.brands[item]],
        "device": ["desk"],
    }
    vectors: dict[tuple[str, str | None], np.ndarray] = {}
    for field in manifest.categorical:
        ids = dataset.vocabulary(field.table_name).ids.to_pylist()
        divided = len(values[field.name]) if field.pooling == "mean" and field.multi_valued else 1
        for text in values[field.name]:
            row = tables[field.table_name][ids.index(text) + 1]
            vectors[field.name, text] = row[: dim + 1] / max(divided, 1)
    spec = manifest.numeric["hour"]
    hour = np.append(parameters["dense_factors"][0], parameters["dense_first_order"][0])
    vectors["hour", None] = hour * (7 - spec.mean) / spec.std
    names = [f.name for f in (*manifest.categorical, *manifest.dense)]
    fields = {name: np.zeros(dim + 1) for name in names}
    for (name, _), vector in vectors.items():
        fields[name] = fields[name] + vector
    of_item = {"item", "genre", "brand"}
    gradients = {name: np.zeros(dim) for name in names}
    if deep is not None:
        state, n_inputs = deep
        sizes = config.model.over_arch_layer_sizes
        over_arch = OverArch(n_inputs, sizes, batch_norm=config.model.batch_norm).double().eval()
        over_arch.load_state_dict(state)
        x = torch.from_numpy(np.concatenate([fields[name][:dim] for name in names]))
        points = (torch.arange(2000).double()[:, None] + 0.5) / 2000 * x
        points.requires_grad_()
        over_arch(points).sum().backward()
        assert points.grad is not None
        mean = points.grad.mean(0).numpy().reshape(len(names), dim)
        gradients = dict(zip(names, mean, strict=True))
    shares = {}
    for (name, text), vector in vectors.items():
        share = vector[dim] + vector[:dim] @ gradients[name]
        for other in names:
            across = (other in of_item) != (name in of_item)
            if other != name and (config.model.fm_pairs == "all" or across):
                share += vector[:dim] @ fields[other][:dim] / 2
        shares[name, text] = float(share)
    return shares


@pytest.mark.parametrize(
    "settings",
    [
        {"model.deep": False},
        {"model.deep": False, "model.fm_pairs": "across"},
        {},
        {"model.batch_norm": True, "model.over_arch_layer_sizes": [7]},
    ],
)
def test_shares_are_those_of_their_definitions_and_sum_to_the_logit(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = with_settings(CONFIG, settings)
    wanted = RecommendConfig(k=4, explain=100, context={"device": "desk", "hour": "7"})
    model = run_alone(_recommended, shop[1].folder, config, wanted, tmp_path)
    ranked = pd.read_parquet(tmp_path / "recommendations.parquet")
    assert len(ranked) == 80
    is_linear = settings.get("model.deep") is False
    for number, row in enumerate(ranked.itertuples()):
        explanation: dict[str, Any] = row.explanation
        shares = {(r["field"], r["value"]): r["share"] for r in explanation["reasons"]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert abs(explanation["other"]) < 1e-5
        total = explanation["base"] + sum(shares.values()) + explanation["remainder"]
        assert total == pytest.approx(row.score, abs=1e-4)
        assert abs(explanation["remainder"]) < (
            1e-4 if settings.get("model.deep") is False else 0.1
        )
        if number % 16 == 0:
            expected = share_by_definition(shop, config, model, row.user_id, row.item_id)
            assert shares == pytest.approx(expected, abs=1e-5 if is_linear else 0.05)


def test_explained_requests_are_the_same_at_any_number_of_ranks(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    requests = pd.DataFrame({"who": ["3", None, "5"] * 200, "city": [None, "Oslo", None] * 200})
    requests = requests.assign(where=["genre=X", None, "brand=b2"] * 200, device="desk", hour=7.0)
    requests.to_parquet(tmp_path / "r.parquet")
    wanted = RecommendConfig(requests=str(tmp_path / "r.parquet"), k=3, explain=2)
    for world_size in (1, 2):
        run_ranks(
            _recommended, world_size, shop[1].folder, CONFIG, wanted, tmp_path / f"{world_size}"
        )
    name = "recommendations.parquet"
    assert digest(tmp_path / "1" / name) == digest(tmp_path / "2" / name)
    ranked = pd.read_parquet(tmp_path / "1" / name)
    described = ranked[ranked["request"] == 1]
    for explanation, score in zip(described["explanation"], described["score"], strict=True):
        shares = [reason["share"] for reason in explanation["reasons"]]
        assert len(shares) == 2
        rest = explanation["base"] + explanation["other"] + explanation["remainder"]
        assert rest + sum(shares) == pytest.approx(score, abs=1e-4)
        assert "user" not in {reason["field"] for reason in explanation["reasons"]}


def _explained_counts(folder: Path, wanted: RecommendConfig, out: Path) -> list[int]:
    counts, explain = [], Explainer.explain

    def counting(self: Explainer, batches: Any, items: Jagged, most: int) -> Any:
        counts.extend(items.lengths.tolist())
        return explain(self, batches, items, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Explainer, "explain", counting)
        _recommended(folder, CONFIG, wanted, out)
    return counts


def test_only_the_items_that_a_request_gets_are_explained(
    shop: tuple[Shop, PreparedDataset], tmp_path: Path
) -> None:
    asked = [1, 9, 2, 3]
    requests = pd.DataFrame({"who": ["3", "4", "5", "6"], "k": asked, "device": "desk", "hour": 7})
    requests.to_csv(tmp_path / "r.csv", index=False)
    wanted = RecommendConfig(requests=str(tmp_path / "r.csv"), explain=1)
    counts = run_alone(_explained_counts, shop[1].folder, wanted, tmp_path / "out")
    assert [n for n in counts if n] == asked
    ranked = pd.read_parquet(tmp_path / "out/recommendations.parquet")
    assert ranked.groupby("request").size().tolist() == asked
    assert ranked["explanation"].notna().all()
