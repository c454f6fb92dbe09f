"""Writes every user's best unseen items."""

from collections.abc import Sequence

from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError
from deepfm_dist.events import RecommendEvent
from deepfm_dist.jobs.ranking_files import RankingOutput, Rankings, ranking_job
from deepfm_dist.log import MetricsLog, warn_if_unwritable
from deepfm_dist.ranking import recommendation
from deepfm_dist.runs.trained import ranking_loss

OUTPUT = RankingOutput(
    "recommendations",
    (
        *("recommend.k", "recommend.users", "recommend.histories", "recommend.requests"),
        *("recommend.allow_items", "recommend.block_items", "recommend.mask", "recommend.context"),
        *("recommend.cold_items", "recommend.popularity_penalty", "recommend.diversity"),
        *("recommend.at_most", "recommend.explain", "recommend.targets"),
    ),
)


def recommend(
    config: Config,
    overrides: Sequence[str] = (),
    output: str | None = None,
    parts: str | None = None,
) -> Rankings | None:
    """Writes every user's best unseen items as Parquet and CSV. All ranks.

    Args:
        config: the settings.
        overrides: the overrides of the command line.
        output: the parquet file; None: in the run's folder, see `LoadedModel.output`.
        parts: a folder or URL for Parquet parts instead; each rank writes its own.

    Returns:
        What was written on rank 0; None elsewhere.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run, or ``output`` is not a parquet file.
        DataError: a list of users or items cannot be used.
        InUse: another process writes the same results.
    """
    with ranking_job(config, overrides, OUTPUT, output, parts) as job:
        wants = config.recommend
        asked = "recommend.probability=true" if wants.probability else None
        asked = "recommend.matrix=int8" if wants.matrix == "int8" else asked
        loss = ranking_loss(job.trained.settings)
        if asked is not None and loss is not None:
            raise ConfigError(
                f"{asked}: the scores of a model trained with trainer.loss={loss} rank each user's "
                f"items and are not log-odds; train with trainer.loss=bce, or leave it out"
            )
        wanted = config.recommend.model_copy(update={"cold_items": job.cold_items})
        files = recommendation.recommend(
            job.model,
            job.world,
            job.trained.dataset.with_validation(),
            wanted,
            job.folder,
            checkpoint=job.trained.checkpoint,
            name=job.name,
            in_parts=job.in_parts,
            rate=job.trained.negative_rate(job.world) if wants.probability else None,
        )
        if files is not None:
            event = RecommendEvent(step=job.trained.step, **files.figures)
            with warn_if_unwritable("the figures of this command are not kept there"):
                MetricsLog(config.output_dir, is_first=True).write(event)
        return job.result(files)
