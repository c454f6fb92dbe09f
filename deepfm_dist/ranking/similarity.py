"""Finds every item's most similar items, by the vectors that users' vectors are multiplied with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int64Array, Jagged
from deepfm_dist.distributed.checkpoint import fingerprint_of
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.chunks import rank_users
from deepfm_dist.ranking.engines.numba import NumbaEngine
from deepfm_dist.ranking.items import Catalogue, ColdItems
from deepfm_dist.ranking.output import RankingFiles, ResumableOutput
from deepfm_dist.ranking.ranker import ModelRanker, Users
from deepfm_dist.ranking.settings import SimilarConfig
from deepfm_dist.ranking.types import Best


class _VectorRanker:
    """Ranks items by inner products with other items."""

    def __init__(self, vectors: torch.Tensor, threads: int) -> None:
        n = len(vectors)
        self._side = Side(torch.zeros(n), vectors, torch.zeros(n, 0))
        self._engine = NumbaEngine([], threads)
        self._items = self._engine.allocate(n, self._side)
        self._engine.fill(self._items, 0, self._side)

    def __len__(self) -> int:
        return self._items.n

    def prepare(self, chunks: Sequence[tuple[int, int]], height: int) -> Sequence[tuple[int, int]]:
        return chunks

    def best(
        self, users: tuple[int, int], seen: Jagged, k: int
    ) -> tuple[Int64Array, npt.NDArray[np.float32]]:
        begin, end = users
        best = Best.none(end - begin, k, torch.device("cpu"))
        if end > begin:
            items = self._engine.users([self._side[begin:end]])
            self._engine.update(items, self._items, 0, seen, best)
        return best.positions.numpy(), best.scores.numpy()


def _itself(begin: int, end: int) -> Jagged:
    return Jagged(np.arange(end - begin + 1, dtype=np.int64), np.arange(begin, end, dtype=np.int32))


def unit_length(vectors: torch.Tensor) -> torch.Tensor:
    """``[n, D]`` vectors, float32, divided by their lengths: their products are cosines."""
    vectors = vectors.double()
    return (vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)).float()


def similar_items(
    model: DeepFM,
    world: World,
    dataset: PreparedDataset,
    config: SimilarConfig,
    folder: Path,
    checkpoint: Path | None = None,
    name: str = "similar_items",
    in_parts: bool = False,
    cold_items: ColdItems = "exclude",
) -> RankingFiles | None:
    """Ranks all other items for every item. All ranks.

    It compares items' summed factor vectors, side features included, which the pairwise part
    multiplies with a user's vector.

    Writes ``similar_items.parquet`` (``item_id, similar_item_id, score, rank``) and
    ``similar_items.csv`` (``item,similar_item``).

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        config: number of items and measure.
        folder: where the files go.
        checkpoint: the checkpoint of the weights; an interrupted command is resumed if they have
            not changed.
        name: the name of the files, without suffix.
        in_parts: whether to keep each rank's parts, in a folder of that name.
        cold_items: how to treat items without training rows.

    Returns:
        On rank 0 what was written; None elsewhere.

    Raises:
        ConfigError: the model has no pairwise part.
    """
    if model.interaction_arch.fm is None:
        raise ConfigError(
            "model.fm=false: similar items compare the vectors of the pairwise part, which this "
            "model does not have; train one with model.fm=true"
        )
    catalogue = Catalogue(dataset, cold_items=cold_items)
    n = len(catalogue)
    no_users = Users(np.zeros(0, np.int32))
    item_ranker = ModelRanker.from_model(model, world, dataset, catalogue, no_users, {})
    vectors = world.to_host(item_ranker.item_vectors())
    if config.metric == "cosine":
        vectors = unit_length(vectors)
    ranker = _VectorRanker(vectors, torch.get_num_threads())
    target = folder / (name if in_parts else f"{name}.parquet")
    inputs = None if checkpoint is None else _inputs(dataset, config, checkpoint, cold_items)
    parts = ResumableOutput(target, n, inputs, world, "similar items", in_parts)
    parts.log_reuse()
    ranked = rank_users(
        ranker, n, _itself, config.k, world, parts.missing, description="compare items"
    )
    items = "similar_item_id", catalogue.ids
    parts.write_ranked(ranked, {"item_id": catalogue.ids}, items, config.k)
    return parts.finish_ranked({"item": "item_id", "similar_item": "similar_item_id"})


def _inputs(
    dataset: PreparedDataset, config: SimilarConfig, checkpoint: Path, cold_items: ColdItems
) -> dict[str, Any]:
    """Everything that similar items depend on, as JSON values."""
    data = [dataset.manifest.fingerprint, *dataset.past]
    settings = config.model_dump(mode="json") | {"cold_items": cold_items}
    return {"weights": fingerprint_of(checkpoint), "data": data, **settings}
