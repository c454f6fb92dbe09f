"""``torchrun -m deepfm_dist.nightly``: train on a new day, promote the model if it is no worse."""

import argparse
import sys
from collections.abc import Sequence
from datetime import date

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = ("--config mine.yaml", "torchrun --config mine.yaml --day 2026-11-30")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Train on a new day's log, and promote the model if it is no worse."
    return run("nightly", description, _nightly, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--day",
        type=_day,
        default=date.today(),
        metavar="YYYY-MM-DD",
        help="the new day, whose log is trained on (default: today)",
    )


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day (expected: 2026-11-30)") from None


def _nightly(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.nightly import nightly

    night = nightly(config, arguments.day)
    if night is None:
        return
    if night.previous is None:
        compared = "the first model"
    else:
        compared = f"{night.previous} has {night.previous_figure:.6f}"
    outcome = "promoted" if night.promoted else "not promoted"
    print(f"{night.day}: {outcome}: {night.metric} {night.figure:.6f}, {compared}; {night.report}")


if __name__ == "__main__":
    sys.exit(main())
