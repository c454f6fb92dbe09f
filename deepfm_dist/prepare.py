"""``python -m deepfm_dist.prepare``: convert input files to a prepared dataset."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.launcher import read_launch
from deepfm_dist.messages import plural, short

if TYPE_CHECKING:
    from deepfm_dist.data.preparation.dry_run import DryRun

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Convert input files to a prepared dataset."
    return run("prepare", description, _prepare, argv, _add_arguments)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.prepare import dry_run, prepare

    launch = read_launch()
    if launch.world_size > 1:
        if launch.rank > 0:
            return
        log.warning(
            "prepare uses every core of one machine: rank 0 prepares, and the other processes that "
            "torchrun started (%d) have nothing to do; start it as python -m deepfm_dist.prepare",
            launch.world_size - 1,
        )
    if arguments.dry_run:
        print(_preview(dry_run(config)))
    else:
        prepare(config, arguments.threads)


def _preview(preview: "DryRun") -> str:
    """Formats the result of a dry run."""
    splits = ", ".join(f"{name} {rows:,}" for name, rows in preview.splits.items())
    lines = [f"{plural(preview.rows, 'row')} kept of the first {preview.limit:,}: {splits}"]
    lines += [f"dropped {reason}: {count:,}" for reason, count in preview.dropped.items()]
    lines += [f"{reason}: {count:,}" for reason, count in preview.noted.items()]
    cells = [("field", "of", "becomes", "distinct", "missing", "such as")]
    cells += [
        (
            field.name,
            field.entity,
            field.kind,
            "" if field.distinct is None else f"{field.distinct:,}",
            "" if field.missing is None else f"{field.missing:.1%}",
            ", ".join(map(short, field.examples)),
        )
        for field in preview.fields
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join([*lines, *table, "Nothing was written."])


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads that share the work (default: one for each core); the result is the same",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the first 100,000 rows, show what becomes of each field, and write nothing",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more (got {number})")
    return number


if __name__ == "__main__":
    sys.exit(main())
