"""``torchrun -m deepfm_dist.tune``: search hyperparameters with optuna."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import DeepFMError
from deepfm_dist.messages import plural


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("tune", "Search hyperparameters for the best validation metric.", _tune, argv)


def _tune(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.tune import tune
    from deepfm_dist.report.tables import trials_table

    result = tune(config)
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
