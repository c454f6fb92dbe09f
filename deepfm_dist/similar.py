"""``torchrun -m deepfm_dist.similar``: write every item's most similar items."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = ("", "--config sample similar.k=5 similar.metric=inner_product")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "similar",
        "Write every item's most similar items.",
        _similar,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="parquet file; a CSV file is written next to it (default: similar_items.parquet of "
        "the run; settings that differ from the run's own are added to the name)",
    )


def _similar(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.similar import similar
    from deepfm_dist.report.tables import ranking_table

    result = similar(config, arguments.overrides, arguments.output)
    if result is not None:
        print(ranking_table(result.files, result.dataset))


if __name__ == "__main__":
    sys.exit(main())
