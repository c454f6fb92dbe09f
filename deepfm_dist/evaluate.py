"""``torchrun -m deepfm_dist.evaluate``: figures of a trained model on held-out rows."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("evaluate", "Measure a trained model on held-out rows.", _evaluate, argv)


def _evaluate(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import deepfm_of, open_trained
    from deepfm_dist.distributed.world import world
    from deepfm_dist.errors import DataError
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.ranking.evaluation import evaluate_ranking
    from deepfm_dist.report import metrics_table
    from deepfm_dist.training.evaluation import HeldOut

    split = config.evaluate.split
    with world(config.run.device, config.run.timeout_s, config.run.threads) as ranks:
        trained = open_trained(config, arguments.overrides, ranks)
        dataset = trained.dataset
        if dataset.manifest.splits[split].rows == 0:
            raise DataError(
                f"{dataset.folder}: the {split} split has no rows"
                + ("; it was refit on all of them" if dataset.manifest.data.refit else "")
            )
        rows = HeldOut(dataset, split).metrics(trained.sharded, ranks)
        rankings = {}
        if dataset.manifest.data.task == "implicit":
            reference = config.evaluate.reference
            rankings = evaluate_ranking(
                deepfm_of(trained.sharded),
                ranks,
                dataset,
                split,
                config.evaluate.k,
                config.recommend.context,
                config.data_root / reference if reference else None,
            )
        metrics = MetricsLog(config.run_dir, ranks.is_first)
        if ranks.is_first:
            metrics.write("evaluate", split=split, rows=rows, rankings=rankings)
            print(metrics_table(split, rows, rankings))
            print(f"\nwritten: {metrics.path}")


if __name__ == "__main__":
    sys.exit(main())
