"""How well the whole catalogue is ranked for users with held-out items."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Int32Array, Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.data.split import SPLITS
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DataError
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.metrics import ranking_metrics
from deepfm_dist.ranking.ranker import (
    Catalogue,
    FixedRanker,
    ModelRanker,
    Ranker,
    constant_ranker,
    gather_ranked,
    rank_users,
)

log = logging.getLogger(__name__)


def evaluate_ranking(
    model: DeepFM,
    world: World,
    dataset: PreparedDataset,
    split: str,
    cutoffs: Sequence[int],
    context: Mapping[str, str | float],
    reference: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Ranking metrics of the model, of popularity, and of a reference's scores. All ranks.

    Users are those known from training with a held-out positive; masked are their positives in
    the splits that come before: train, and for the test also valid.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        split: valid or test.
        cutoffs: values of K.
        context: values of the context fields.
        reference: parquet file ``user, item, score`` with another system's scores.

    Returns:
        By ranking, the metrics of `ranking_metrics`; empty on ranks other than 0.
    """
    relevant_of_all = dataset.positives(split)
    users = np.flatnonzero(relevant_of_all.lengths > 0).astype(np.int32)
    users = users[users > 0]
    left_out = len(relevant_of_all) - 1 - len(users)
    if left_out:
        log.info("%s users have no held-out items: not ranked for", f"{left_out:,}")
    if of_unknown := int(relevant_of_all.lengths[0]):
        log.info(
            "%s held-out items are of users without training rows: not ranked for",
            f"{of_unknown:,}",
        )
    catalogue = Catalogue(dataset)
    before = SPLITS[: SPLITS.index(split)]
    seen = catalogue.seen_by(users, [dataset.positives(s) for s in before])
    relevant = Jagged.from_pairs(
        np.repeat(np.arange(len(users)), relevant_of_all.lengths[users]),
        relevant_of_all.take(users)[1],
        len(users),
    )
    fixed = RowEncoder(dataset).fixed_context(context)
    rankers: dict[str, Ranker] = {
        "model": ModelRanker(model, world, dataset, catalogue, users, fixed),
        "popularity": constant_ranker(dataset.popularity()[catalogue.rows], world.device),
    }
    if reference is not None:
        rankers[reference.stem] = _reference_ranker(reference, dataset, catalogue, users, world)
    found = {}
    for name, ranker in rankers.items():
        positions = gather_ranked(
            rank_users(ranker, seen, max(cutoffs), world), max(cutoffs), world
        )
        if positions is not None:
            ranked = np.where(positions >= 0, catalogue.rows[positions], -1)
            found[name] = ranking_metrics(ranked, relevant, cutoffs)
    return found


def _reference_ranker(
    path: Path, dataset: PreparedDataset, catalogue: Catalogue, users: Int32Array, world: World
) -> FixedRanker:
    columns = [Column("user"), Column("item"), Column("score", "number")]
    table = read_table(path, columns)
    user_ids = dataset.entity_ids("user").take(pa.array(users))
    rows = np.asarray(pc.index_in(table["user"], value_set=user_ids).fill_null(-1))
    places = np.asarray(pc.index_in(table["item"], value_set=catalogue.ids).fill_null(-1))
    known = (rows >= 0) & (places >= 0)
    if not known.any():
        raise DataError(f"{path}: none of its users and items are in the dataset")
    dense = torch.full((len(users), len(catalogue)), float("-inf"))
    dense[rows[known], places[known]] = torch.from_numpy(
        np.asarray(table["score"])[known].astype(np.float32)
    )
    return FixedRanker(
        lambda begin, end: dense[begin:end].to(world.device, copy=True), len(catalogue)
    )
