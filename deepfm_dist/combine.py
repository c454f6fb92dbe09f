"""``torchrun -m deepfm_dist.combine``: combine trained FMs and EASE in one wider FM."""

import argparse
import math
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError

EXAMPLES = (
    "--config aistages_ranking --ease 96 --to both",
    "--config mine.yaml --of seed1,seed2,seed3 --to mean",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Combine trained FMs and EASE in one wider FM."
    return run("combine", description, _combine, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        required=True,
        metavar="NAME",
        help="name of the new run, or its folder if it is to be elsewhere: ./NAME, /FOLDER/NAME",
    )
    parser.add_argument(
        "--of",
        metavar="A,B,C",
        help="names of runs whose logits are averaged (default: run.name)",
    )
    parser.add_argument(
        "--ease",
        type=float,
        metavar="WEIGHT",
        help="weight of EASE's scores relative to these logits (default: no EASE)",
    )
    parser.add_argument(
        "--ease-columns",
        type=int,
        default=256,
        help="factors reserved for EASE (default: %(default)d)",
    )
    parser.add_argument(
        "--ease-l2",
        type=float,
        default=500.0,
        help="L2 regularisation of EASE (default: %(default)g)",
    )
    parser.add_argument(
        "--ease-fields",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="for each value of an item's field (a genre, a director), EASE also sees this many "
        "users who have all of its items (default: %(default)g)",
    )


def _combine(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.combine import EaseColumns, combine

    _check_numbers(arguments)
    ease = None
    if arguments.ease is not None:
        ease = EaseColumns(
            arguments.ease, arguments.ease_columns, arguments.ease_l2, arguments.ease_fields
        )
    names = arguments.of.split(",") if arguments.of else [config.run.name]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--of {arguments.of}: give names of runs, each once: A,B,C")
    result = combine(config, names, arguments.to, ease, arguments.overrides)
    if result is not None:
        print(result.checkpoint)


def _check_numbers(arguments: argparse.Namespace) -> None:
    with_ease = arguments.ease is not None
    if with_ease and arguments.ease_columns < 1:
        raise ConfigError(f"--ease-columns {arguments.ease_columns}: must be 1 or more")
    if with_ease and not math.isfinite(arguments.ease):
        raise ConfigError(f"--ease {arguments.ease}: must be a number")
    if not 0 < arguments.ease_l2 < math.inf:
        raise ConfigError(f"--ease-l2 {arguments.ease_l2:g}: must be above 0")
    if not 0 <= arguments.ease_fields < math.inf:
        raise ConfigError(f"--ease-fields {arguments.ease_fields:g}: must be 0 or more")


if __name__ == "__main__":
    sys.exit(main())
