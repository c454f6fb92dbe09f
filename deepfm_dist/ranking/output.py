"""Writes rankings: one Parquet part per chunk of users, kept as parts or merged by rank 0."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.data.sources import in_tables
from deepfm_dist.data.vocabulary import external
from deepfm_dist.distributed.inference import probabilities
from deepfm_dist.distributed.part_files import PartFolder, write_options
from deepfm_dist.distributed.world import World
from deepfm_dist.messages import plural
from deepfm_dist.ranking.chunks import Ranked, deal_chunks, users_per_chunk
from deepfm_dist.storage import ANOTHER_OUTPUT, storage_errors_to_user, write_errors_to_user

log = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float32]
MatrixKind = Literal["int8", "fp16", "fp32"]

Probability = Callable[[Int64Array, Int64Array, FloatArray], FloatArray]
"""Maps (indices of owners, positions of items, logits) to probabilities, ``[n]`` float32 each."""

MATRIX_USERS = 512
"""Number of users whose scores of the whole catalogue are in memory at once."""
_COUNTS = ("rows", "full", "some")
"""Counts in the summary of complete parts."""
_CELLS = {"int8": pa.int8(), "fp16": pa.float16(), "fp32": pa.float32()}


@dataclass(frozen=True)
class RankingFiles:
    """The written files and their counts.

    Attributes:
        parquet: owner (user or item), item, score, rank; the file, or the folder of its parts.
        csv: owner and item; None for parts.
        first: the file with the first rows.
        owners: number of owners.
        rows: number of rows.
        k: items per owner requested; the largest if requests differ.
        full: number of owners with all requested items.
        none: number of owners without any.
        figures: measurements taken while ranking; see `recommend`.
    """

    parquet: Path
    csv: Path | None
    first: Path
    owners: int
    rows: int
    k: int
    full: int
    none: int = 0
    figures: Mapping[str, Any] = field(default_factory=dict)


class ResumableOutput:
    """A result that is made in parts, each complete or absent. All ranks.

    The result is either the folder of the parts, or one file that rank 0 merges them into. The
    parts of a run that was killed are reused if they were made from the same inputs.

    Args:
        target: the parquet file or, for parts, the folder.
        n_users: users of all ranks; each `users_per_chunk` of them has a part.
        inputs: everything that the parts depend on, as JSON values; None: never reuse earlier
            parts.
        world: the ranks.
        content: what the parts hold, for error messages.
        in_parts: whether ``target`` is the folder of the parts.

    Attributes:
        missing: chunks left to do;
        reused: number of existing parts.

    Raises:
        ConfigError: the folder holds other files, or parts of something else.
        DeepFMError: the folder cannot be written.
    """

    def __init__(
        self,
        target: Path,
        n_users: int,
        inputs: Mapping[str, object] | None,
        world: World,
        content: str,
        in_parts: bool = False,
    ) -> None:
        self.target, self._in_parts = target, in_parts
        folder = target if in_parts else target.with_name(f".{target.name}.parts")
        self.parts = PartFolder(folder, inputs, world, content, private=not in_parts)
        self._size, self._n_users, self._world = users_per_chunk(n_users), n_users, world
        self._n_parts = -(-n_users // self._size)
        self.missing = [s for s in range(self._n_parts) if s not in self.parts.present]
        self.reused = self._n_parts - len(self.missing)
        self._rows = self._full = self._some = 0

    def log_reuse(self) -> None:
        """Logs how many parts of an earlier run are reused."""
        if self.parts.summary is not None:
            log.info("%s: already complete, from the same inputs", self.target)
        elif self.reused:
            log.info("reusing %s of an interrupted run", plural(self.reused, "part"))

    def write(self, begin: int, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes the part of the chunk that begins with user ``begin``.

        Raises:
            DeepFMError: the disk is full, for example.
        """
        self.parts.write(begin // self._size, schema, tables)

    def write_ranked(
        self,
        ranked: Iterator[Ranked],
        owners: Mapping[str, pa.Array],
        items: tuple[str, pa.Array],
        k: int | npt.NDArray[np.int32],
        probability: Probability | None = None,
        explanations: Callable[[Int64Array, Int64Array], pa.Array] | None = None,
    ) -> None:
        """Writes ranked chunks: columns of the owner, ``item, score, rank``, ``probability``.

        All ranks.

        Args:
            ranked: this rank's.
            owners: ``[U]`` columns by name, the first one with the external ids of the users (or
                items or requests) ranked for, in ranking order.
            items: the item column's name, and ``[I]`` external ids by position.
            k: items per owner asked for, of all or of each.
            probability: computes a column of that name.
            explanations: computes one from (index of the owner in the chunk, index in its ranking).
        """
        columns_of_owner = {name: external(column) for name, column in owners.items()}
        item_ids = external(items[1])
        name = next(iter(owners))
        self._owners, self._k = (name, columns_of_owner[name]), np.broadcast_to(k, self._n_users)
        for begin, positions, scores in ranked:
            wanted = self._k[begin : begin + len(positions), None]
            there = (positions >= 0) & (np.arange(positions.shape[1]) < wanted)
            self._rows += int(there.sum())
            self._full += int((there.sum(1) == wanted[:, 0]).sum())
            self._some += int(there.any(1).sum())
            owner, rank = np.nonzero(there)
            columns = {
                name: column.take(pa.array(begin + owner))
                for name, column in columns_of_owner.items()
            }
            columns |= {
                items[0]: item_ids.take(pa.array(positions[owner, rank])),
                "score": pa.array(scores[owner, rank]),
                "rank": pa.array((rank + 1).astype(np.int32)),
            }
            if probability is not None:
                values = probability(begin + owner, positions[owner, rank], scores[owner, rank])
                columns["probability"] = pa.array(values)
            if explanations is not None:
                columns["explanation"] = explanations(owner, rank)
            table = pa.table(columns)
            self.write(begin, table.schema, [table])

    def write_matrix(
        self,
        scores: Callable[[int, int, int], FloatArray],
        users: pa.Array,
        items: pa.Array,
        kind: MatrixKind,
    ) -> None:
        """Writes chunks of users as ``user_id`` and ``scores``, a list of one length. All ranks.

        One column per item would take thousands of times as many pages as one list column. The
        item ids are in the schema's metadata: JSON under ``item_ids``.

        Args:
            scores: maps (first user, last + 1, maximum number of users on any rank) to ``[users,
                I]`` logits.
            users: ``[U]`` external ids.
            items: ``[I]`` external ids by position.
            kind: the kind of a score: logits in fp32 or fp16, or probabilities in units of 1/127 in
                int8.
        """
        user_ids = external(users)
        cell = _CELLS[kind]
        schema = pa.schema(
            [("user_id", user_ids.type), ("scores", pa.list_(cell, len(items)))],
            {"item_ids": json.dumps(external(items).to_pylist())},
        )

        def tables(begin: int, end: int) -> Iterator[pa.Table]:
            for first in range(begin, begin + self._size, MATRIX_USERS):
                low, high = min(first, end), min(first + MATRIX_USERS, end)
                block = scores(low, high, MATRIX_USERS)
                if kind == "int8":
                    block = np.rint(127 * probabilities(block))
                if high > low:
                    cells = pa.array(block.ravel().astype(cell.to_pandas_dtype()))
                    lists = pa.FixedSizeListArray.from_arrays(cells, len(items))
                    yield pa.table([user_ids[low:high], lists], schema=schema)

        dealt = deal_chunks(self._n_users, len(items), self._world, self.missing, "score matrix")
        for begin, end in dealt:
            if end > begin:
                self.write(begin, schema, tables(begin, end))
            else:
                list(tables(begin, end))  # look-ups involve all ranks

    def finish_ranked(self, csv_columns: Mapping[str, str]) -> RankingFiles | None:
        """Completes what `write_ranked` wrote. All ranks.

        One file: rank 0 merges the parts, and some of their columns into a CSV file; neither
        appears before it is complete. Parts: they are marked as complete.

        Args:
            csv_columns: columns by their name in the CSV file.

        Returns:
            On rank 0 what was written; None elsewhere.

        Raises:
            DeepFMError: the disk is full, for example.
        """
        counts = self._counts()
        self._finish(csv_columns, 1 << 20, {"owners": self._n_users, **counts})
        if not self._world.is_first:
            return None
        first = self.parts.path(0) if self._in_parts else self.target
        csv = None if self._in_parts else self.csv
        return RankingFiles(
            self.target,
            csv,
            first,
            owners=self._n_users,
            rows=counts["rows"],
            k=int(self._k.max(initial=1)),
            full=counts["full"],
            none=self._n_users - counts["some"],
        )

    def finish_matrix(self) -> None:
        """Completes what `write_matrix` wrote. All ranks."""
        self._finish({}, MATRIX_USERS, {"users": self._n_users})

    def _counts(self) -> dict[str, int]:
        """Rows of all parts, owners with all requested items, and with any. All ranks."""
        if (summary := self.parts.summary) is not None:
            # Earlier versions did not count owners with any items.
            return {"some": self._n_users} | {n: summary[n] for n in _COUNTS if n in summary}
        rows, full, some = self._rows, self._full, self._some
        name, ids = self._owners
        reused = sorted(self.parts.present)[self._world.rank :: self._world.world_size]
        for path in map(self.parts.path, reused):
            with storage_errors_to_user(path), path.open("rb") as file:
                table = pq.read_table(file, columns=[name, "rank"])
            owners = np.asarray(pc.index_in(table[name].combine_chunks(), value_set=ids))
            rows += table.num_rows
            ranks = np.asarray(table["rank"])
            full += int((ranks == self._k[owners]).sum())
            some += int((ranks == 1).sum())
        of_ranks = self._world.all_gather_object((rows, full, some))
        return dict(zip(_COUNTS, np.sum(of_ranks, 0).tolist(), strict=True))

    def _finish(
        self, csv_columns: Mapping[str, str], rows: int, summary: Mapping[str, Any]
    ) -> None:
        if self._in_parts:
            if self.parts.summary is None:
                self.parts.finish(self._n_parts, summary)
            return

        def merge() -> None:
            self.parts.check_complete(self._n_parts)
            with write_errors_to_user(self.target, ANOTHER_OUTPUT):
                self._merge(csv_columns, rows)

        self._world.barrier()
        self._world.run_on_rank0(f"{self.target.name}_end", merge)

    @property
    def csv(self) -> Path:
        """The CSV file."""
        return self.target.with_suffix(".csv")

    def _merge(self, csv_columns: Mapping[str, str], rows: int) -> None:
        parts = [self.parts.path(part) for part in range(self._n_parts)]
        merged, text = self.parts.folder / "merged", self.parts.folder / "csv"
        schema = pq.read_schema(parts[0])
        batches = (b for part in parts for b in pq.ParquetFile(part).iter_batches(rows))
        narrow = pa.schema([(new, schema.field(old).type) for new, old in csv_columns.items()])
        options = pa_csv.WriteOptions(include_header=False, quoting_style="needed")
        with (
            pq.ParquetWriter(merged, schema, **write_options(schema)) as writer,
            text.open("wb") as file,
        ):
            # Arrow would quote the names.
            file.write((",".join(csv_columns) + "\n").encode())
            with pa_csv.CSVWriter(file, narrow, write_options=options) as lines:
                # Equal row groups: the merged bytes do not depend on how users were dealt.
                for table in in_tables(batches, rows):
                    writer.write_table(table)
                    if csv_columns:
                        picked = table.select(list(csv_columns.values()))
                        lines.write_table(picked.rename_columns(narrow.names))
        os.replace(merged, self.target)
        if csv_columns:
            os.replace(text, self.csv)
        shutil.rmtree(self.parts.folder)


def hash_of(*arrays: np.ndarray) -> str:
    """A hash of the values of some arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
