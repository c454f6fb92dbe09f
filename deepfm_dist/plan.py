"""``python -m deepfm_dist.plan``: check whether a model fits a cluster."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError

GIB = 1 << 30
EXAMPLES = (
    "--config mine.yaml --world-size 8",
    "--world-size 64 --hbm-gib 141 --rows user=1_000_000_000 --rows item=5_000_000 --rows genre=50",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "plan",
        "Check whether a model fits a number of GPUs.",
        _plan,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument(
        "--local-world-size",
        type=int,
        metavar="N",
        help="GPUs per machine (default: 8, or --world-size if smaller)",
    )
    parser.add_argument(
        "--hbm-gib", type=float, default=80, metavar="N", help="memory per GPU in GiB (default: 80)"
    )
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="TABLE=N",
        help="rows of a table (default: those of the prepared dataset)",
    )


def _plan(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.distributed.sharding import DoesNotFit
    from deepfm_dist.jobs.plan import plan
    from deepfm_dist.report.tables import plan_table

    size = arguments.world_size
    per_machine = arguments.local_world_size or min(8, size)
    if size < 1 or per_machine < 1 or size % per_machine or arguments.hbm_gib <= 0:
        raise ConfigError(
            f"--world-size {size} --local-world-size {per_machine} --hbm-gib "
            f"{arguments.hbm_gib:g}: positive numbers are needed, as many GPUs on every machine"
        )
    rows = dict(_rows(text) for text in arguments.rows)
    result = plan(config, rows, size, per_machine, round(arguments.hbm_gib * GIB))
    print(plan_table(result))
    if not result.fits:
        gpus = f"{size} GPU{'s' * (size > 1)} of {arguments.hbm_gib:g} GiB"
        remedies = "; or ".join(result.remedies) or "more and larger GPUs, fewer rows"
        raise DoesNotFit(f"does not fit {gpus}; use {remedies}")


def _rows(text: str) -> tuple[str, int]:
    table, _, number = text.partition("=")
    try:
        rows = int(number)
    except ValueError:
        rows = 0
    if rows < 1:
        raise ConfigError(f"--rows {text}: give TABLE=N, such as user=1_000_000_000")
    return table, rows


if __name__ == "__main__":
    sys.exit(main())
