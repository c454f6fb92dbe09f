"""Writes a run's model as safetensors, for code without TorchRec."""

import logging
from dataclasses import dataclass
from pathlib import Path

from deepfm_dist.distributed.checkpoint import check_files
from deepfm_dist.interop.safetensors import (
    FORMAT,
    copy_vocabularies,
    describe_fields,
    export_folder,
    read_config,
    write_config,
    write_entities,
    write_weights,
)
from deepfm_dist.runs.trained import RunOnDisk

MAX_FILE_BYTES = 5_000_000_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """A model that was exported.

    Attributes:
        folder: of its files.
        n_tensors: number of tensors, those of the tables included.
        n_tables: number of embedding tables.
    """

    folder: Path
    n_tensors: int
    n_tables: int


def export(run: RunOnDisk, folder: Path | None = None, max_file_bytes: int | None = None) -> Export:
    """Writes a finished run's model into a folder.

    Args:
        run: the run.
        folder: where to, which may hold an earlier export; None: ``export`` of the run.
        max_file_bytes: bytes of weights in one file; None: `MAX_FILE_BYTES`.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    folder = folder or export_folder_of(run)
    max_file_bytes = max_file_bytes or MAX_FILE_BYTES
    check_files(run.checkpoint)
    model = run.config.model
    with export_folder(folder) as temporary:
        columns = model.embedding_dim + 1 if model.fm or model.deep else 1
        weights = write_weights(run.checkpoint, temporary, columns, max_file_bytes)
        copy_vocabularies(run.dataset, temporary)
        write_entities(run.dataset.with_validation(), temporary)  # as `predict` knows users
        write_config(
            temporary,
            run=run.config.run.name,
            **run.identity,
            model=model.model_dump(mode="json"),
            fields=describe_fields(run.dataset),
        )
    return Export(folder, len(weights), len(run.dataset.manifest.tables))


def up_to_date_export(run: RunOnDisk) -> Path:
    """The folder of the run's export; exports first unless one of this checkpoint exists."""
    folder = export_folder_of(run)
    if not is_export_of(run, folder):
        log.info("%s: exporting step %s", folder, f"{run.state['step']:,}")
        export(run, folder)
    return folder


def export_folder_of(run: RunOnDisk) -> Path:
    """Where a run is exported to by default."""
    return run.config.output_dir / "export"


def is_export_of(run: RunOnDisk, folder: Path) -> bool:
    """Whether a folder holds an undamaged export of a run's checkpoint and data."""
    return ({"format": FORMAT} | run.identity).items() <= read_config(folder).items()
