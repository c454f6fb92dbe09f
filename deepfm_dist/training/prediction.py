"""Scores of the rows of a file."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.schema import FileFormat, names_of
from deepfm_dist.data.sources import in_tables, laid_out_like, read_batches
from deepfm_dist.distributed.inference import probabilities, score_rows
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DeepFMError
from deepfm_dist.storage import remove_leftovers, work_folder, write_errors_to_user
from deepfm_dist.training.evaluation import BLOCK_ROWS, collate_rows

log = logging.getLogger(__name__)
ROWS_AT_A_TIME = 64 * BLOCK_ROWS


def predict(
    model: nn.Module,
    world: World,
    dataset: PreparedDataset,
    source: str,
    files: Mapping[str, FileFormat],
    target: Path,
) -> int:
    """Scores a file, row by row in its order. All ranks.

    Writes a parquet file with the columns that were read, ``score`` (float32 logit) and
    ``probability`` (float32); the same bytes at any world size. It appears when it is whole.

    Args:
        model: the sharded task in eval mode.
        world: the ranks.
        dataset: the prepared dataset the model was trained on.
        source: path or URL of a csv, tsv, dat or parquet file with the columns of the interactions.
        files: layouts by name. A source that is not among them is like the interactions file, but
            may have a header where that has none.
        target: the parquet file to write.

    Returns:
        Number of rows.

    Raises:
        DataError: ``source`` cannot be read.
        DeepFMError: on rank 0, where ``target`` cannot be written.
        SystemExit: on the other ranks, then.
    """
    encoder, collate, name = RowEncoder(dataset), Collator(dataset), Path(source).name
    interactions = names_of(dataset.manifest.data.interactions.file)[0]
    layout = files.get(name) or laid_out_like(source, encoder.columns, files.get(interactions))
    aside = work_folder(target)  # two processes may write the same file
    writer = _Writer(target, aside)
    n_rows = 0
    try:
        # Before any work that would be lost.
        world.run_on_rank0(str(target), lambda: _check_writable(target, aside))
        batches = read_batches(source, encoder.columns, layout, name=name)
        for table in in_tables(encoder.in_rows(batches), ROWS_AT_A_TIME):
            rows = encoder.encode(table)
            block = partial(_block, collate, rows)
            scored = score_rows(model, world, rows.n, BLOCK_ROWS, block)
            problem: DeepFMError | None = None
            if (pieces := world.gather_object([logits for _, logits in scored])) is not None:
                logits = np.concatenate([block for piece in pieces for block in piece])
                problem = writer.write(encoder.as_in_the_file(table), logits)
            n_rows += rows.n
            if (problem := world.broadcast(problem)) is not None:
                raise problem if world.is_first else SystemExit(problem.exit_code)
        writer.finish()
    finally:
        if world.is_first:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
    writer.warn_of_not_finite(name)
    for text in encoder.unseen():
        log.warning("%s: %s", name, text)
    return n_rows


class _Writer:
    """Appends scored rows to a parquet file that appears at the end."""

    def __init__(self, target: Path, aside: Path) -> None:
        self._target, self._aside = target, aside
        self._writer: pq.ParquetWriter | None = None
        self._n_rows = self._n_not_finite = self._first_not_finite = 0

    def write(self, table: pa.Table, logits: npt.NDArray[np.float32]) -> DeepFMError | None:
        """Appends rows with their scores; returns why it cannot."""
        not_finite = np.flatnonzero(~np.isfinite(logits))
        if len(not_finite) and not self._n_not_finite:
            self._first_not_finite = self._n_rows + int(not_finite[0]) + 1
        self._n_not_finite += len(not_finite)
        self._n_rows += len(logits)
        table = table.append_column("score", pa.array(logits))
        table = table.append_column(
            "probability", pa.array(probabilities(logits).astype(np.float32))
        )
        try:
            with write_errors_to_user(self._target):
                if self._writer is None:
                    self._writer = pq.ParquetWriter(self._aside, table.schema, compression="zstd")
                self._writer.write_table(table)
        except DeepFMError as error:
            return error
        return None

    def finish(self) -> None:
        """Puts the file in its place, where something was written."""
        if self._writer is not None:
            with write_errors_to_user(self._target):
                self._writer.close()
                os.replace(self._aside, self._target)

    def warn_of_not_finite(self, name: str) -> None:
        """Logs how many scores are not numbers, if any; ``name``: of the file that was read."""
        if self._n_not_finite:
            log.warning(
                "%s: %s of %s scores are not numbers, the first that of row %s: a number of that "
                "row is too far from those of training",
                name,
                f"{self._n_not_finite:,}",
                f"{self._n_rows:,}",
                f"{self._first_not_finite:,}",
            )


def _check_writable(target: Path, aside: Path) -> None:
    with write_errors_to_user(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        aside.touch()


def _block(collate: Collator, rows: Rows, begin: int, end: int) -> Batch:
    return collate_rows(collate, rows, begin, end, BLOCK_ROWS)
