"""``torchrun -m deepfm_dist.tune``: search hyperparameters with optuna."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.messages import plural

EXAMPLES = (
    "trainer.monitor=auc tune.trials=20",
    "--config mine.yaml --workers 4",
    "torchrun --config mine.yaml",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Search hyperparameters for the best validation metric."
    work = partial(_tune, sys.argv[1:] if argv is None else argv)
    return run("tune", description, work, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="search with N processes, each on its own GPUs; killed ones are restarted (default: "
        "search in this process)",
    )
    parser.add_argument(
        "--ranks",
        type=_count,
        metavar="N",
        help="with --workers: number of ranks that train a trial (default: 1)",
    )
    parser.add_argument(
        "--wait",
        action="store_true",
        help="stay until the trials of other processes are complete; continue those of lost ones",
    )


def _count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes")


def _without_workers(argv: Sequence[str]) -> list[str]:
    """The command's arguments for each of its workers."""
    parser = argparse.ArgumentParser(add_help=False)
    for option in ("--workers", "--ranks"):
        parser.add_argument(option)
    return parser.parse_known_args(argv)[1]


def _tune(argv: Sequence[str], config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.tune import tune
    from deepfm_dist.jobs.tune_workers import tune_by_workers
    from deepfm_dist.report.tables import trials_table

    if arguments.workers is None:
        if arguments.ranks is not None:
            raise ConfigError(
                f"--ranks {arguments.ranks}: needs --workers; add --workers 1, or start tune with "
                f"torchrun"
            )
        result = tune(config, arguments.wait)
    else:
        rest = _without_workers(argv)
        result = tune_by_workers(config, rest, arguments.workers, arguments.ranks or 1)
    if result is None:
        return
    print(trials_table(result.trials, result.monitor))
    if result.n_open:
        print(f"\nstill open in other processes: {plural(result.n_open, 'trial')}")
    elif result.best is None:
        raise DeepFMError(f"{result.study}: no trial is complete; see its log")
    if result.best is not None:
        best = f"{result.best.name}, {result.monitor} {result.best.best:.6f}"
        print(f"\nbest: {best}\nwritten: {result.best_config}")


if __name__ == "__main__":
    sys.exit(main())
