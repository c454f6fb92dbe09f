"""Scores the rows of a file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import check_formats
from deepfm_dist.data.sources import find_files
from deepfm_dist.distributed.checkpoint import fingerprint_of
from deepfm_dist.distributed.part_files import PartFolder
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.ranking.output import hash_of
from deepfm_dist.runs.trained import (
    LoadedModel,
    open_trained,
    output_lock,
    parts_output,
    ranking_loss,
)
from deepfm_dist.training import prediction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictions:
    """Written predictions.

    Attributes:
        path: the parquet file, or the folder of its parts.
        rows: number of rows.
    """

    path: Path
    rows: int


def predict(
    config: Config,
    source: str,
    target: Path | None = None,
    overrides: Sequence[str] = (),
    parts: str | None = None,
) -> Predictions | None:
    """Scores the rows of a file. All ranks.

    Args:
        config: the settings.
        source: path or URL of the file.
        target: the parquet file to write; None: ``predictions.parquet`` of the run.
        overrides: the overrides of the command line.
        parts: a folder or URL for Parquet parts instead; each rank writes its own.

    Returns:
        What was written on rank 0; None elsewhere.

    Raises:
        CheckpointError: the run has no complete checkpoint.
        ConfigError: a setting does not fit the run.
        DataError: the file cannot be read or lacks a column.
        InUse: another process writes the same parts.
    """
    folder = None if parts is None else parts_output(parts)
    target = target or config.output_dir / "predictions.parquet"
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        check_formats(trained.config.data, Path(source).name)
        files = trained.config.data.files
        dataset = trained.dataset.with_validation()
        loss = ranking_loss(trained.settings)
        if loss is not None and world.is_first:
            log.warning(
                "the column probability is empty: the scores of a model trained with "
                "trainer.loss=%s rank each user's items and are not log-odds",
                loss,
            )
        rate = trained.negative_rate(world)
        odds: dict[str, Any] = {"rate": rate, "log_odds": loss is None}
        if folder is not None:
            with world.hold_on_rank0(output_lock(folder, in_parts=True)):
                inputs = _inputs(trained, dataset, source, odds)
                scored = PartFolder(folder, inputs, world, "predictions")
                rows = prediction.predict_in_parts(
                    trained.sharded, world, dataset, source, files, scored, **odds
                )
            return Predictions(folder, rows) if world.is_first else None
        rows = prediction.predict(trained.sharded, world, dataset, source, files, target, **odds)
        return Predictions(target, rows) if world.is_first else None


def _inputs(
    trained: LoadedModel, dataset: PreparedDataset, source: str, odds: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that scores depend on, as JSON values."""
    folder, _, name = source.rpartition("/")
    if "://" not in source:
        folder, name = "/", str(Path(source).absolute())
    [file] = find_files(folder, name)
    return {
        "weights": fingerprint_of(trained.checkpoint),
        "data": [dataset.manifest.fingerprint, *dataset.past],
        "files": trained.config.model_dump(mode="json")["data"]["files"],
        "rate": None if odds["rate"] is None else hash_of(odds["rate"].log_of_user),
        "log_odds": odds["log_odds"],
        "source": [file.path, file.size, file.stamp],
    }
