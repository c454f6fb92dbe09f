"""``torchrun -m deepfm_dist.evaluate``: evaluate a trained model on held-out rows."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = (
    "",
    "--config sample evaluate.k=[5,10,20] evaluate.baselines=[popularity,ease]",
    "torchrun --config mine.yaml evaluate.split=valid",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "evaluate",
        "Evaluate a trained model on held-out rows and write a report.",
        _evaluate,
        argv,
        None,
        EXAMPLES,
    )


def _evaluate(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.evaluate import evaluate
    from deepfm_dist.report.tables import metrics_table

    result = evaluate(config, arguments.overrides)
    if result is not None:
        figures = result.split, result.meaningful_rows, result.comparison
        print(metrics_table(*figures, config.evaluate.k, result.composition))
        paths = (result.metrics_log, result.report)
        files = [f"written: {path}" for path in paths if path is not None]
        print("", *result.verdicts, *[""][: len(files)], *files, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
