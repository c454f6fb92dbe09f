"""``torchrun -m deepfm_dist.evaluate``: figures of a trained model on held-out rows."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config

if TYPE_CHECKING:
    from deepfm_dist.ranking.evaluation import Comparison
    from deepfm_dist.report.verdicts import Verdict

EXAMPLES = (
    "",
    "--config sample evaluate.k=[5,10,20] evaluate.baselines=[popularity,ease]",
    "torchrun --config mine.yaml evaluate.split=valid",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "evaluate", "Measure a trained model on held-out rows.", _evaluate, argv, None, EXAMPLES
    )


def _evaluate(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.report.tables import metrics_table

    result = evaluate_run(config, arguments.overrides)
    if result is not None:
        print(metrics_table(result.split, result.rows, result.comparison, config.evaluate.k))
        files = (f"written: {path}" for path in result.files)
        print("", *result.verdicts, "", *files, sep="\n")


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` measured.

    Attributes:
        split: valid or test.
        rows: figures on its rows.
        comparison: of rankings; None where rows have labels.
        verdicts: how good that is, in words.
        files: what was written: the log of metrics, the report.
    """

    split: str
    rows: dict[str, float]
    comparison: "Comparison | None"
    verdicts: "list[Verdict]"
    files: tuple[Path, Path]


def evaluate_run(config: Config, overrides: Sequence[str] = ()) -> Evaluation | None:
    """Measures a run's model on held-out rows, and writes its report. All ranks.

    Args:
        config: the settings.
        overrides: of the command line.

    Returns:
        On rank 0 what was found; None elsewhere.
    """
    from deepfm_dist.build import baselines_of, deepfm_of
    from deepfm_dist.data.sources import find_file
    from deepfm_dist.distributed import checkpoint
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.errors import DataError
    from deepfm_dist.events import EvaluateEvent, ValidEvent, read_events
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.ranking.evaluation import LOGGED, RankingEvaluator, evaluate_ranking
    from deepfm_dist.report.verdicts import verdicts_on
    from deepfm_dist.runs import open_trained
    from deepfm_dist.training.evaluation import RowEvaluator

    split, cutoffs = config.evaluate.split, config.evaluate.k
    baselines = baselines_of(config)
    reference = config.evaluate.reference
    if reference is not None and config.data.task == "implicit":
        reference = find_file(config.input_root, reference, "evaluate.reference")
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world, same_rows=True)
        dataset = trained.dataset
        own_split = trained.settings.get("evaluate", {}).get("split", split)
        if dataset.manifest.splits[split].rows == 0:
            raise DataError(
                f"{dataset.folder}: the {split} split has no rows"
                + ("; it was refit on all of them" if dataset.manifest.data.refit else "")
            )
        items = None
        if dataset.manifest.data.task == "implicit":
            items = RankingEvaluator(
                dataset, split, config.recommend.context, config.evaluate.mask_seen
            )
        measured = RowEvaluator(dataset, split).measured(trained.sharded, world)
        comparison = None
        if items is not None:
            comparison = evaluate_ranking(
                deepfm_of(trained.sharded),
                world,
                items,
                cutoffs,
                baselines,
                reference,
            )
        metrics = MetricsLog(config.run_dir, world.is_first)
        if measured is None:  # not rank 0
            return None
        rows = measured.figures
        found = {k: getattr(comparison, k) for k in LOGGED} if comparison else {}
        metrics.write(EvaluateEvent(step=trained.step, split=split, rows=rows, **found))
        events = read_events(metrics.path)
        verdicts = verdicts_on(
            checkpoint.read_state(trained.checkpoint),
            [e for e in events if isinstance(e, ValidEvent)],
            rows,
            split,
            comparison,
            max(cutoffs),
        )
        from deepfm_dist.report.page import write_page  # draws: slow to import

        page = write_page(
            config.run_dir,
            trained.config.to_yaml(),
            trained.checkpoint,
            dataset,
            split,
            rows,
            measured.calibration,
            comparison,
            cutoffs,
            verdicts,
            "report.html" if split == own_split else f"report-{split}.html",
            events,
        )
        return Evaluation(split, rows, comparison, verdicts, (metrics.path, page))


if __name__ == "__main__":
    sys.exit(main())
