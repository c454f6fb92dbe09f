"""Writes every item's most similar items."""

from collections.abc import Sequence

from deepfm_dist.config import Config
from deepfm_dist.jobs.ranking_files import RankingOutput, Rankings, ranking_job
from deepfm_dist.ranking.similarity import similar_items

OUTPUT = RankingOutput("similar_items", ("similar.k", "similar.metric", "recommend.cold_items"))


def similar(
    config: Config,
    overrides: Sequence[str] = (),
    output: str | None = None,
    parts: str | None = None,
) -> Rankings | None:
    """Writes every item's most similar items as Parquet and CSV. All ranks.

    Args:
        config: the settings.
        overrides: the overrides of the command line.
        output: the parquet file; None: in the run's folder, see `LoadedModel.output`.
        parts: a folder or URL for Parquet parts instead; each rank writes its own.

    Returns:
        What was written on rank 0; None elsewhere.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run, the model has no pairwise part, or ``output``
            is not a parquet file.
        InUse: another process writes the same results.
    """
    with ranking_job(config, overrides, OUTPUT, output, parts) as job:
        files = similar_items(
            job.model,
            job.world,
            job.trained.dataset,
            config.similar,
            folder=job.folder,
            checkpoint=job.trained.checkpoint,
            name=job.name,
            in_parts=job.in_parts,
            cold_items=job.cold_items,
        )
        return job.result(files)
