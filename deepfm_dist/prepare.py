"""``torchrun -m deepfm_dist.prepare``: input files -> a prepared dataset."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("prepare", "Turn input files into a prepared dataset.", _prepare, argv)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    sys.exit(main())
