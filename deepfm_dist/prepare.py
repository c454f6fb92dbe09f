"""``python -m deepfm_dist.prepare``: input files -> a prepared dataset."""

import argparse
import logging
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.launcher import read_launch

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Turn input files into a prepared dataset."
    return run("prepare", description, _prepare, argv, _add_arguments)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.prepare import prepare

    launch = read_launch()
    if launch.world_size > 1:
        if launch.rank > 0:
            return
        log.warning(
            "prepare uses every core of one machine: rank 0 prepares, and the other processes that "
            "torchrun started (%d) have nothing to do; start it as python -m deepfm_dist.prepare",
            launch.world_size - 1,
        )
    prepare(config, arguments.threads)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads that share the work (default: one for each core); the result is the same",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more (got {number})")
    return number


if __name__ == "__main__":
    sys.exit(main())
