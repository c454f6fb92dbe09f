"""``torchrun -m deepfm_dist.recommend``: write every user's top-K unseen items."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import add_rankings_output, print_rankings, run
from deepfm_dist.config import Config, with_settings
from deepfm_dist.storage import option_of

EXAMPLES = (
    "",
    "--config sample recommend.k=20 recommend.users=[4,6] --output two.parquet",
    "torchrun --config mine.yaml recommend.block_items=sold_out.csv",
    "torchrun --config mine.yaml --output-parts s3://bucket/recommendations/today",
    "--config mine.yaml --requests requests.parquet --output answers.parquet",
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
        "--requests",
        metavar="FILE",
        help="answer the requests of a file, one per row: recommend.requests=FILE",
    )
    add_rankings_output("recommendations.parquet", parser)


def _recommend(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.recommend import recommend

    if arguments.requests is not None:
        file = option_of("--requests", arguments.requests)
        config = with_settings(config, {"recommend.requests": file})
    target = arguments.output, arguments.output_parts
    print_rankings(recommend(config, arguments.overrides, *target))


if __name__ == "__main__":
    sys.exit(main())
