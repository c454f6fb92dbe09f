"""Every user's top-K items, written to files."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.vocabulary import id_order
from deepfm_dist.distributed.world import World
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.ranking.output import write_recommendations
from deepfm_dist.ranking.ranker import Catalogue, ModelScores, rank_users

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recommendations:
    """What was written.

    Attributes:
        parquet: ``user_id, item_id, score, rank``.
        csv: ``user,item``.
        users: number of users.
        rows: number of rows.
        k: items per user asked for.
    """

    parquet: Path
    csv: Path
    users: int
    rows: int
    k: int


def recommend(
    model: DeepFM,
    world: World,
    dataset: PreparedDataset,
    k: int,
    masked_splits: Sequence[str],
    context: Mapping[str, str | float],
    folder: Path,
) -> Recommendations | None:
    """Ranks the catalogue for every user. All ranks.

    Args:
        model: the DeepFM, sharded, in eval mode.
        world: the ranks.
        dataset: the prepared dataset.
        k: items per user.
        masked_splits: a user's positives in these are never recommended.
        context: values of the context fields.
        folder: where the files go.

    Returns:
        On rank 0 what was written; None elsewhere.
    """
    catalogue = Catalogue(dataset)
    ids = dataset.entity_ids("user").slice(1)
    order = np.argsort(id_order(ids))
    users = (order + 1).astype(np.int32)
    fixed = RowEncoder(dataset).fixed_context(context)
    scores = ModelScores(model, world, dataset, catalogue, users, fixed)
    seen = catalogue.seen_by(users, [dataset.positives(split) for split in masked_splits])
    ranked = rank_users(scores, seen, k, world)
    written = write_recommendations(ranked, ids.take(pa.array(order)), catalogue.ids, folder, world)
    if written is None:
        return None
    parquet, csv, rows = written
    if rows < k * len(users):
        short = int((len(catalogue) - seen.lengths < k).sum())
        log.info("%s users have fewer than %d unseen items", f"{short:,}", k)
    return Recommendations(parquet, csv, len(users), rows, k)
