"""Real files in the format in which they are published."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.ranking.baselines import Ease, Popularity
from deepfm_dist.ranking.evaluation import RankingEvaluator, evaluate_ranking
from tests.ranks import run_alone


def test_movielens_as_published_prepares_as_its_parquet_copy(
    real_data: Path, tmp_path: Path
) -> None:
    source = real_data / "ml-1m"
    rows = pq.read_table(source / "ml1m_implicit_ctr.parquet").to_pandas()
    rows["rating"] = rows["rating"].clip(lower=3)  # the copy has 0 for what is below 4
    columns = [rows[name] for name in ("user", "item", "rating", "ts")]
    with (tmp_path / "ratings.dat").open("w", encoding="latin-1") as file:
        file.writelines(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in zip(*columns, strict=True))
    for name in ("movies.dat", "users.dat"):
        shutil.copy(source / name, tmp_path)
    as_published = load_config("movielens_dat")
    copy = load_config(
        "movielens_1m", ["data.interactions.split=null", "data.split.method=temporal"]
    )
    folders = tmp_path / "dat", tmp_path / "parquet"
    prepare(as_published.data, tmp_path, folders[0], seed=1)
    prepare(copy.data, source, folders[1], seed=1)
    written = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.parquet")}
        for folder in folders
    ]
    assert written[0].keys() == written[1].keys()
    assert Path("entities/user.parquet") in written[0]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


def _figures_of_baselines(folder: Path) -> dict[str, tuple[float, ...]]:
    config = load_config("aistages_ranking", ["model.embedding_dim=1"])
    prepare(config.data, config.data_root, folder, seed=1)
    dataset = PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        baselines = {"popularity": Popularity(), "ease": Ease(500.0)}
        held_out = RankingEvaluator(dataset, "test", {})
        actual = evaluate_ranking(deepfm_of(sharded), world, held_out, [10], baselines)
    assert actual is not None
    return {n: (actual.figures[n]["recall@10"], actual.figures[n]["ndcg@10"]) for n in baselines}


@pytest.mark.slow  # a matrix of 6,807 items is inverted
def test_baselines_have_their_known_figures_on_aistages(real_data: Path, tmp_path: Path) -> None:
    figures = run_alone(_figures_of_baselines, tmp_path / "aistages")
    assert figures["popularity"] == pytest.approx((0.0783, 0.2297), abs=5e-5)
    assert figures["ease"] == pytest.approx((0.1524, 0.4310), abs=5e-5)
