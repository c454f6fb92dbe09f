"""Scores the rows of a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepfm_dist.config import Config
from deepfm_dist.data.manifest import check_formats
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.runs.trained import open_trained
from deepfm_dist.training import prediction


@dataclass(frozen=True)
class Predictions:
    """Scores that were written.

    Attributes:
        path: the parquet file.
        rows: their number.
    """

    path: Path
    rows: int


def predict(
    config: Config, source: str, target: Path | None = None, overrides: Sequence[str] = ()
) -> Predictions | None:
    """Scores the rows of a file. All ranks.

    Args:
        config: the settings.
        source: path or URL of the file.
        target: the parquet file to write; None: ``predictions.parquet`` of the run.
        overrides: of the command line.

    Returns:
        What was written on rank 0; None elsewhere.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run.
        DataError: the file cannot be read or lacks a column.
    """
    target = target or config.output_dir / "predictions.parquet"
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        check_formats(trained.config.data, Path(source).name)
        files = trained.config.data.files
        dataset = trained.dataset.with_validation()
        rows = prediction.predict(trained.sharded, world, dataset, source, files, target)
        return Predictions(target, rows) if world.is_first else None
