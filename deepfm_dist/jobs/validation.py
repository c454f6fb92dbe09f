"""Validation during training."""

from collections.abc import Callable, Mapping

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.ranking.evaluation import RANKING_FIGURES, RankingEvaluator
from deepfm_dist.ranking.items import cold_items_to_rank
from deepfm_dist.training.checks import check_monitor
from deepfm_dist.training.evaluation import RowEvaluator
from deepfm_dist.training.metrics import target_figure
from deepfm_dist.training.state import HIGHER_IS_BETTER, LOWER_IS_BETTER

MOST_USERS = 10_000
"""Maximum number of users that a validation ranks for; an evenly spaced sample of more."""


def make_validate(
    config: Config, dataset: PreparedDataset, sharded: DistributedModelParallel, world: World
) -> Callable[[], Mapping[str, float]] | None:
    """Makes a function that measures the model on the validation rows; None without such rows.

    It also ranks the catalogue if the loss or the monitored figure is one of rankings.

    Raises:
        ConfigError: a setting needs a monitored figure and there are no validation rows; or the
            figure is undefined on them; or the catalogue is ranked and ``recommend.context`` lacks
            a field.
    """
    if not dataset.has_validation:
        if asked := config.trainer.needs_monitor:
            raise ConfigError(
                f"trainer.{asked}: {dataset.folder} has no validation rows; hold some out "
                f"(data.split.valid=0.1, data.refit=false), or leave the setting out"
            )
        return None
    rows: RowEvaluator | None = None
    if dataset.held_out is not None and "@" not in (config.monitor or "@"):
        raise ConfigError(
            f"trainer.monitor={config.monitor}: a figure of validation rows, and there are none; "
            f"monitor ndcg@{max(config.evaluate.k)}, or hold some out (data.split.valid=0.1)"
        )
    if dataset.held_out is None:
        check_monitor(config.monitor, dataset.manifest)
        weights = config.trainer.weights_of(dataset.manifest.targets)
        rows = RowEvaluator(dataset, "valid", weights)
    items: RankingEvaluator | None = None
    if config.trainer.loss != "bce" or "@" in (config.monitor or ""):
        items = RankingEvaluator(
            dataset,
            "valid",
            config.recommend.context,
            config.evaluate.mask_seen,
            MOST_USERS,
            cold_items_to_rank(None, config.data.id_dropout, dataset.manifest),
        )
        if not len(items.users) and config.trainer.needs_monitor:
            raise ConfigError(
                f"trainer.monitor={config.monitor}: no user with training rows has an item to rank "
                f"in the validation rows; hold out rows of users who have others "
                f"(data.split.method=per_user), or, where each user has one row, set "
                f"trainer.monitor=null to train for trainer.epochs"
            )

    def validate() -> Mapping[str, float]:
        figures = dict(rows.metrics(sharded, world)) if rows is not None else {}
        if items is not None:
            figures |= items.metrics(deepfm_of(sharded), world, config.evaluate.k)
        return world.broadcast(figures)

    return validate


def check_monitor_name(config: Config) -> None:
    """Refuses a monitored figure that validation does not measure.

    Raises:
        ConfigError: ``trainer.monitor`` is not a validation figure, or not one that can be
            optimised.
    """
    monitor = config.monitor
    figures = [*HIGHER_IS_BETTER, *LOWER_IS_BETTER]
    for target in config.data.interactions.labels:
        figures += [target_figure(target, name) for name in (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)]
    if config.data.task == "implicit":
        figures += [f"{name}@{k}" for k in config.evaluate.k for name in RANKING_FIGURES]
    if monitor is not None and monitor not in figures:
        raise ConfigError(
            f"trainer.monitor={monitor}: not a figure that can be monitored; available: "
            f"{', '.join(figures)}"
        )
    if (monitor or "").split(".")[-1] == "user_auc" and config.data.interactions.user is None:
        raise ConfigError(
            "trainer.monitor=user_auc: the rows have no users; name data.interactions.user"
        )
