"""``torchrun -m deepfm_dist.recommend``: write every user's top-K unseen items."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = (
    "",
    "--config sample recommend.k=20 recommend.users=[4,6] --output two.parquet",
    "torchrun --config mine.yaml recommend.block_items=sold_out.csv",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "recommend",
        "Write every user's top-K unseen items.",
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
    from deepfm_dist.jobs.recommend import recommend
    from deepfm_dist.report.tables import ranking_table

    result = recommend(config, arguments.overrides, arguments.output)
    if result is not None:
        print(ranking_table(result.files, result.dataset))


if __name__ == "__main__":
    sys.exit(main())
