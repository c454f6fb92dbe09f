"""``torchrun -m deepfm_dist.similar``: every item's most similar items."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config

if TYPE_CHECKING:
    from deepfm_dist.data.dataset import PreparedDataset
    from deepfm_dist.ranking.output import RankingFiles

EXAMPLES = ("", "--config sample similar.k=5 similar.metric=inner_product")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "similar",
        "Write every item's most similar items.",
        _similar,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="parquet file; a CSV file is written next to it (default: similar_items.parquet of "
        "the run; settings that differ from the run's own are added to the name)",
    )


def _similar(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.report.tables import ranking_table

    written = write_similar_items(config, arguments.overrides, arguments.output)
    if written is not None:
        print(ranking_table(*written))


def write_similar_items(
    config: Config, overrides: Sequence[str] = (), output: str | None = None
) -> "tuple[RankingFiles, PreparedDataset] | None":
    """Writes every item's most similar items. All ranks.

    Args:
        config: the settings.
        overrides: of the command line.
        output: the parquet file; None: in the run's folder, see `LoadedModel.output`.

    Returns:
        On rank 0 what was written, and the dataset it is of; None elsewhere.
    """
    from deepfm_dist.build import deepfm_of
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.lock import Lock
    from deepfm_dist.ranking.similarity import similar_items
    from deepfm_dist.runs import open_trained

    asked = config.similar
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        model = deepfm_of(trained.sharded)
        target = trained.output("similar", "similar_items", ("k", "metric"), output)
        with world.hold_on_rank0(Lock(target, str(target), "choose another --output")):
            written = similar_items(
                model,
                world,
                trained.dataset,
                asked.k,
                asked.metric,
                target.parent,
                target.stem,
            )
        return None if written is None else (written, trained.dataset)


if __name__ == "__main__":
    sys.exit(main())
