"""Scores of the rows of a file."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.negative_rate import NegativeRate
from deepfm_dist.data.schema import FileFormat, names_of
from deepfm_dist.data.sources import in_tables, laid_out_like, read_batches
from deepfm_dist.distributed.inference import probabilities, score_rows
from deepfm_dist.distributed.part_files import PartFolder, write_options
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import DeepFMError
from deepfm_dist.messages import plural
from deepfm_dist.storage import (
    ANOTHER_OUTPUT,
    remove_leftovers,
    work_folder,
    write_errors_to_user,
)
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
    rate: NegativeRate | None = None,
    log_odds: bool = True,
) -> int:
    """Scores a file, row by row in its order. All ranks.

    Writes a parquet file with the columns that were read, ``score`` (float32 logit) and
    ``probability`` (of several targets ``score_buy``, ``probability_buy``, ...); the same bytes at
    any world size. The file appears only when it is complete.

    Args:
        model: the sharded task in eval mode.
        world: the ranks.
        dataset: the prepared dataset the model was trained on.
        source: path or URL of a file with the columns of the interactions.
        files: layouts by name. A source without one is read like the interactions file, but may
            have a header if that has none.
        target: the parquet file to write.
        rate: the rate of drawn negatives, which ``probability`` is corrected for.
        log_odds: whether scores are log-odds; if not, ``probability`` is null.

    Returns:
        Number of rows.

    Raises:
        DataError: ``source`` cannot be read.
        DeepFMError: on rank 0, where ``target`` cannot be written.
        SystemExit: on the other ranks, then.
    """
    rows_of_file, n_rows = _RowsOfFile.open(dataset, source, files, rate, log_odds), 0
    aside = work_folder(target)  # two processes may write the same file
    writer = _Writer(target, aside)
    try:
        # Before any work that would be lost.
        world.run_on_rank0(str(target), lambda: _check_writable(target, aside))
        for table in rows_of_file.tables():
            n, block, log_rates = rows_of_file.encode(table)
            scored, problem = score_rows(model, world, n, BLOCK_ROWS, block), None
            if (pieces := world.gather_object([logits for _, logits in scored])) is not None:
                logits = np.concatenate([block for piece in pieces for block in piece])
                problem = writer.write(rows_of_file.annotate(table, logits, log_rates))
                writer.not_finite.add(logits, n_rows)
            n_rows += n
            if (problem := world.broadcast(problem)) is not None:
                raise problem if world.is_first else SystemExit(problem.exit_code)
        writer.finish()
    finally:
        if world.is_first:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
    if world.is_first:  # every rank read all rows
        rows_of_file.warn(writer.not_finite)
    return n_rows


def predict_in_parts(
    model: nn.Module,
    world: World,
    dataset: PreparedDataset,
    source: str,
    files: Mapping[str, FileFormat],
    parts: PartFolder,
    rate: NegativeRate | None = None,
    log_odds: bool = True,
) -> int:
    """Scores a file like `predict`, into a folder of parts that each rank writes itself. All ranks.

    A part holds `ROWS_AT_A_TIME` rows at any world size, and parts are in the order of the file.

    Args:
        model: the sharded task in eval mode.
        world: the ranks.
        dataset: the prepared dataset the model was trained on.
        source: path or URL of the file, as for `predict`.
        files: layouts by name.
        parts: the output folder; existing parts are kept.
        rate: as for `predict`.
        log_odds: as for `predict`.

    Returns:
        Number of rows.

    Raises:
        DataError: ``source`` cannot be read.
        DeepFMError: a part cannot be written.
    """
    if parts.summary is not None:
        log.info("%s: already complete, from the same inputs", parts.folder)
        return int(parts.summary["rows"])
    if parts.present:
        log.info("reusing %s of an interrupted run", plural(len(parts.present), "part"))
    rows_of_file = _RowsOfFile.open(dataset, source, files, rate, log_odds)
    not_finite = _NotFinite()
    waiting: list[tuple[int, int, pa.Table]] = []  # (part, first row, rows): one for each rank
    n_rows = n_parts = 0
    for table in rows_of_file.tables():
        if n_parts not in parts.present:
            waiting.append((n_parts, n_rows, table))
        n_rows, n_parts = n_rows + table.num_rows, n_parts + 1
        if len(waiting) == world.world_size:
            _write_parts(waiting, model, world, rows_of_file, parts, not_finite)
            waiting.clear()
    if waiting:
        _write_parts(waiting, model, world, rows_of_file, parts, not_finite)
    parts.finish(n_parts, {"rows": n_rows})
    rows_of_file.warn_of_all(world, not_finite)
    return n_rows


def _write_parts(
    waiting: Sequence[tuple[int, int, pa.Table]],
    model: nn.Module,
    world: World,
    rows_of_file: "_RowsOfFile",
    parts: PartFolder,
    not_finite: "_NotFinite",
) -> None:
    """Scores and writes one part per rank; others still join the look-ups. All ranks.

    Args:
        waiting: number, first row and rows of at most one part for each rank.
        model: the sharded task.
        world: the ranks.
        rows_of_file: the file that the rows are from.
        parts: where they go.
        not_finite: takes in this rank's scores.
    """
    blocks = range(-(-max(table.num_rows for _, _, table in waiting) // BLOCK_ROWS))
    has_part = world.rank < len(waiting)
    part, begin, table = waiting[world.rank if has_part else 0]
    n, block, log_rates = rows_of_file.encode(table if has_part else table.slice(0, 0))
    pieces = [logits for _, logits in score_rows(model, world, n, BLOCK_ROWS, block, blocks)]
    if has_part:
        logits = np.concatenate(pieces)
        not_finite.add(logits, begin)
        scored = rows_of_file.annotate(table, logits, log_rates)
        parts.write(part, scored.schema, [scored])


@dataclass(frozen=True)
class _RowsOfFile:
    """The rows of a file, encoded for a model.

    Attributes:
        source: path or URL.
        name: the name of the file, for messages.
        layout: its columns and format.
        encoder: looks its values up.
        collate: makes batches of them.
        rate: the rate of the negatives drawn in training, if some are.
        log_odds: whether scores are log-odds.
    """

    source: str
    name: str
    layout: FileFormat | None
    encoder: RowEncoder
    collate: Collator
    rate: NegativeRate | None
    log_odds: bool

    @classmethod
    def open(
        cls,
        dataset: PreparedDataset,
        source: str,
        files: Mapping[str, FileFormat],
        rate: NegativeRate | None,
        log_odds: bool,
    ) -> "_RowsOfFile":
        encoder, name = RowEncoder(dataset), Path(source).name
        interactions = names_of(dataset.manifest.data.interactions.file)[0]
        layout = files.get(name) or laid_out_like(source, encoder.columns, files.get(interactions))
        return cls(source, name, layout, encoder, Collator(dataset), rate=rate, log_odds=log_odds)

    def tables(self) -> Iterator[pa.Table]:
        """`ROWS_AT_A_TIME` rows each, the last one fewer."""
        batches = read_batches(self.source, self.encoder.columns, self.layout, name=self.name)
        return in_tables(self.encoder.in_rows(batches), ROWS_AT_A_TIME)

    def encode(
        self, table: pa.Table
    ) -> tuple[int, Callable[[int, int], Batch], npt.NDArray[np.float64] | None]:
        """Encodes rows: their number, a function that collates some of them, and `log_rates`.

        The latter are 0 without drawn negatives, and None if scores are not log-odds.
        """
        rows = self.encoder.encode(table)
        log_rates = np.zeros(rows.n) if self.log_odds else None
        if self.rate is not None:
            assert rows.users is not None
            assert rows.items is not None
            log_rates = self.rate.log_rates(rows.users, rows.items)

        def block(begin: int, end: int) -> Batch:
            begin, end = min(begin, rows.n), min(end, rows.n)
            return collate_rows(self.collate, rows, begin, end, BLOCK_ROWS)

        return rows.n, block, log_rates

    def annotate(
        self,
        table: pa.Table,
        logits: npt.NDArray[np.float32],
        log_rates: npt.NDArray[np.float64] | None,
    ) -> pa.Table:
        """Rows with their scores, and probabilities corrected for `NegativeRate`.

        Without ``log_rates``, probabilities are null.
        """
        table = self.encoder.as_in_the_file(table)
        ends = [f"_{target}" for target in self.encoder.targets] or [""]
        for end, target_figure in zip(ends, logits.reshape(len(logits), -1).T, strict=True):
            table = table.append_column(f"score{end}", pa.array(target_figure))
            column = pa.nulls(len(logits), pa.float32())
            if log_rates is not None:
                column = pa.array(probabilities(target_figure + log_rates).astype(np.float32))
            table = table.append_column(f"probability{end}", column)
        return table

    def warn(self, not_finite: "_NotFinite") -> None:
        """Logs warnings about the rows that were encoded, and their scores."""
        not_finite.warn(self.name)
        for text in self.encoder.unseen():
            log.warning("%s: %s", self.name, text)

    def warn_of_all(self, world: World, not_finite: "_NotFinite") -> None:
        """Logs warnings about the rows that all ranks scored. All ranks call it."""
        counted = world.gather_object((self.encoder.unknown, not_finite))
        if counted is None:
            return
        for unknown, theirs in counted[1:]:
            not_finite.merge(theirs)
            for field, values in unknown.items():
                self.encoder.unknown[field].merge(values)
        self.warn(not_finite)


class _NotFinite:
    """Counts scores that are NaN or infinite."""

    def __init__(self) -> None:
        self._rows = self._count = 0
        self._first: int | None = None

    def add(self, logits: npt.NDArray[np.float32], begin: int) -> None:
        """Adds the scores of rows from ``begin`` on."""
        where = np.flatnonzero(~np.isfinite(logits.reshape(len(logits), -1)).all(1))
        self._rows += len(logits)
        self._count += len(where)
        if len(where):
            self._first = min(begin + int(where[0]) + 1, self._first or sys.maxsize)

    def merge(self, other: "_NotFinite") -> None:
        """Adds the counts of another rank."""
        self._rows += other._rows
        self._count += other._count
        if other._first is not None:
            self._first = min(other._first, self._first or sys.maxsize)

    def warn(self, name: str) -> None:
        """Logs how many there are, if any; ``name`` is the input file's."""
        if self._first is not None:
            log.warning(
                "%s: %s of %s scores are not numbers, the first that of row %s: a number of that "
                "row is too far from those of training",
                name,
                f"{self._count:,}",
                f"{self._rows:,}",
                f"{self._first:,}",
            )


class _Writer:
    """Appends scored rows to a parquet file, which appears when it is complete."""

    def __init__(self, target: Path, aside: Path) -> None:
        self._target, self._aside = target, aside
        self._writer: pq.ParquetWriter | None = None
        self.not_finite = _NotFinite()

    def write(self, table: pa.Table) -> DeepFMError | None:
        """Appends scored rows; returns the error if that fails."""
        try:
            with write_errors_to_user(self._target, ANOTHER_OUTPUT):
                if self._writer is None:
                    options = write_options(table.schema)
                    self._writer = pq.ParquetWriter(self._aside, table.schema, **options)
                self._writer.write_table(table)
        except DeepFMError as error:
            return error
        return None

    def finish(self) -> None:
        """Moves the file into place if something was written."""
        if self._writer is not None:
            with write_errors_to_user(self._target, ANOTHER_OUTPUT):
                self._writer.close()
                os.replace(self._aside, self._target)


def _check_writable(target: Path, aside: Path) -> None:
    with write_errors_to_user(target, ANOTHER_OUTPUT):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        aside.touch()
