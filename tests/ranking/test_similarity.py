"""Similar items against float64 vectors and a full sort."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.ranking.settings import SimilarConfig
from deepfm_dist.ranking.similarity import similar_items
from tests.ranking.cases import config_of, digest
from tests.ranks import RankFailed, run_alone, run_ranks

FILES = ("similar_items.csv", "similar_items.parquet")


def _similar(
    folder: Path, config: Config, metric: Literal["cosine", "inner_product"], out: Path
) -> dict[str, np.ndarray]:
    """Ranks by an untrained model that depends on the seed alone; its tables."""
    dataset = PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        similar_items(deepfm_of(sharded), world, dataset, SimilarConfig(k=500, metric=metric), out)
        return {name: piece.numpy().copy() for name, _, _, piece in local_shards(sharded)}


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_similar_items_are_those_of_a_full_sort(
    sample: PreparedDataset, tmp_path: Path, metric: Literal["cosine", "inner_product"]
) -> None:
    config = config_of("sharding.tables={genre: {kind: table_wise}}")
    outs = [tmp_path / str(size) for size in (1, 3)]
    for out in outs:
        out.mkdir()
    tables = run_alone(_similar, sample.folder, config, metric, outs[0])
    run_ranks(_similar, 3, sample.folder, config, metric, outs[1])
    assert [digest(outs[0] / f) for f in FILES] == [digest(outs[1] / f) for f in FILES]

    genres = sample.entity_fields["genre"]
    assert isinstance(genres, Jagged)
    vectors = tables["item"][1:, :10].astype(np.float64)
    for row in range(1, len(genres)):
        mine = genres.values[genres.offsets[row] : genres.offsets[row + 1]]
        if len(mine):
            vectors[row - 1] += tables["genre"][mine, :10].mean(0)
    if metric == "cosine":
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = np.array([int(i) for i in sample.entity_ids("item").to_pylist()[1:]])
    order = np.argsort(ids)
    ids, vectors = ids[order], vectors[order]
    scores = vectors @ vectors.T
    np.fill_diagonal(scores, -np.inf)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :399]
    frame = pd.read_parquet(outs[0] / "similar_items.parquet")
    assert list(frame.columns) == ["item_id", "similar_item_id", "score", "rank"]
    assert (frame["item_id"].to_numpy().reshape(-1, 399) == ids[:, None]).all()
    actual = np.searchsorted(ids, frame["similar_item_id"].to_numpy()).reshape(-1, 399)
    assert (actual == best).mean() > 0.99
    wanted = np.take_along_axis(scores, best, 1)
    np.testing.assert_allclose(
        frame["score"].to_numpy().reshape(-1, 399), wanted, atol=2e-5, rtol=2e-5
    )
    pairs = pd.read_csv(outs[0] / "similar_items.csv")
    assert list(pairs.columns) == ["item", "similar_item"]
    assert (pairs.to_numpy() == frame[["item_id", "similar_item_id"]].to_numpy()).all()


def test_a_model_without_a_pairwise_part_is_refused(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed, match=r"ConfigError: model\.fm=false"):
        run_alone(_similar, sample.folder, config_of("model.fm=false"), "cosine", tmp_path)
