"""``torchrun -m deepfm_dist.recommend``: every user's top-K unseen items."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config

if TYPE_CHECKING:
    from deepfm_dist.data.dataset import PreparedDataset
    from deepfm_dist.ranking.output import RankingFiles

WHAT = ("k", "users", "histories", "allow_items", "block_items", "mask", "context")
"""Settings that decide whom and what a file is of; the others decide how it is made."""
EXAMPLES = (
    "",
    "--config sample recommend.k=20 recommend.users=[4,6] --output two.parquet",
    "torchrun --config mine.yaml recommend.block_items=sold_out.csv",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "recommend",
        "Write every user's best unseen items.",
        _recommend,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="parquet file; a CSV file is written next to it (default: recommendations.parquet of "
        "the run; settings that differ from the run's own are added to the name)",
    )


def _recommend(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.report.tables import ranking_table

    written = write_recommendations(config, arguments.overrides, arguments.output)
    if written is not None:
        print(ranking_table(*written))


def write_recommendations(
    config: Config, overrides: Sequence[str] = (), output: str | None = None
) -> "tuple[RankingFiles, PreparedDataset] | None":
    """Writes every user's best unseen items. All ranks.

    Args:
        config: the settings.
        overrides: of the command line.
        output: the parquet file; None: in the run's folder, see `LoadedModel.output`.

    Returns:
        On rank 0 what was written, and the dataset it is of; None elsewhere.
    """
    from deepfm_dist.build import deepfm_of
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.events import RecommendEvent
    from deepfm_dist.lock import Lock
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.ranking.recommendation import Wanted, recommend
    from deepfm_dist.runs import open_trained

    asked = config.recommend
    wanted = Wanted(**asked.model_dump(exclude={"mask"}), masked_splits=asked.mask)
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        target = trained.output("recommend", "recommendations", WHAT, output)
        with world.hold_on_rank0(Lock(target, str(target), "choose another --output")):
            written = recommend(
                deepfm_of(trained.sharded),
                world,
                trained.dataset,
                wanted,
                target.parent,
                trained.checkpoint,
                target.stem,
            )
        if written is not None:
            event = RecommendEvent(step=trained.step, **written.figures)
            MetricsLog(config.output_dir, True).write(event)
        return None if written is None else (written, trained.dataset)


if __name__ == "__main__":
    sys.exit(main())
