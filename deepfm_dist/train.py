"""``torchrun -m deepfm_dist.train``: train a DeepFM; prepares the data first if necessary."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = (
    "",
    "--config sample model.embedding_dim=32 optimizer.tables.lr=0.1",
    "torchrun --config mine.yaml trainer.monitor=auc trainer.patience=2",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "train",
        "Train a DeepFM; prepares the data first if necessary.",
        _train,
        argv,
        None,
        EXAMPLES,
    )


def _train(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.train import train

    train(config)


if __name__ == "__main__":
    sys.exit(main())
