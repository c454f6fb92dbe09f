"""``torchrun -m deepfm_dist.similar``: write every item's most similar items."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from deepfm_dist.cli import add_rankings_output, print_rankings, run
from deepfm_dist.config import Config

EXAMPLES = ("", "--config sample similar.k=5 similar.metric=inner_product")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "similar",
        "Write every item's most similar items.",
        _similar,
        argv,
        partial(add_rankings_output, "similar_items.parquet"),
        EXAMPLES,
    )


def _similar(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.similar import similar

    target = arguments.output, arguments.output_parts
    print_rankings(similar(config, arguments.overrides, *target))


if __name__ == "__main__":
    sys.exit(main())
