"""Rankings in files: a parquet part per chunk of users, merged into parquet and CSV by rank 0."""

import hashlib
import json
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

from deepfm_dist.data.sources import in_tables
from deepfm_dist.data.vocabulary import external
from deepfm_dist.distributed.inference import probabilities
from deepfm_dist.distributed.world import World
from deepfm_dist.ranking.chunks import Ranked, deal_chunks, users_per_chunk
from deepfm_dist.storage import write_errors_to_user

FloatArray = npt.NDArray[np.float32]
MatrixKind = Literal["int8", "fp16", "fp32"]

MATRIX_USERS = 512
"""Users whose scores of the whole catalogue are in memory at once."""
_CELLS = {"int8": pa.int8(), "fp16": pa.float16(), "fp32": pa.float32()}
_KEY = "key.json"


@dataclass(frozen=True)
class RankingFiles:
    """What was written.

    Attributes:
        parquet: owner (user or item), item, score, rank.
        csv: owner and item.
        owners: number of owners.
        rows: number of rows.
        k: items per owner asked for.
        full: owners who got as many.
        figures: what was measured meanwhile; see `recommend`.
    """

    parquet: Path
    csv: Path
    owners: int
    rows: int
    k: int
    full: int
    figures: Mapping[str, Any] = field(default_factory=dict)


class ResumableOutput:
    """The parts of a file that is being made, each complete or not there. All ranks.

    The parts of a run that was killed are reused if they were made from the same key.

    Args:
        folder: of the run; the same disk for all ranks.
        name: of the file to be.
        n_users: users of all ranks; each `users_per_chunk` of them has a part.
        key: what the parts depend on, as JSON values; None: earlier parts are never reused.
        world: the ranks.

    Attributes:
        missing: numbers of the chunks left to do.
        reused: how many parts were there already.

    Raises:
        DeepFMError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, name: str, n_users: int, key: Mapping[str, object] | None, world: World
    ) -> None:
        self.target, self.aside = folder / name, folder / f".{name}.parts"
        self._size, self._n_users, self._world = users_per_chunk(n_users), n_users, world
        text = json.dumps(key, indent=2, sort_keys=True)
        world.run_on_rank0(f"{name}_begin", lambda: self._open(text, key is not None))
        n = -(-n_users // self._size)
        self.missing = [s for s in range(n) if not self._path(s).exists()]
        self.reused = n - len(self.missing)
        world.barrier()  # nobody writes a part before all have looked

    def _path(self, chunk: int) -> Path:
        return self.aside / f"{chunk:06d}.parquet"

    def _open(self, text: str, lasting: bool) -> None:
        key = self.aside / _KEY
        with write_errors_to_user(self.aside):
            if not (lasting and key.is_file() and key.read_text() == text):
                shutil.rmtree(self.aside, ignore_errors=True)
                self.aside.mkdir(parents=True)
                key.write_text(text)

    def write(self, begin: int, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes the part of the chunk that begins with user ``begin``.

        Raises:
            DeepFMError: the disk is full, say.
        """
        path = self._path(begin // self._size)
        aside = path.with_suffix(".part")
        with write_errors_to_user(aside):
            with pq.ParquetWriter(
                aside, schema, use_dictionary=_repetitive_columns(schema)
            ) as writer:
                for table in tables:
                    writer.write_table(table)
            os.replace(aside, path)

    def write_ranked(
        self, ranked: Iterator[Ranked], owners: pa.Array, items: pa.Array, names: tuple[str, str]
    ) -> None:
        """Writes ranked chunks as ``owner, item, score, rank``. All ranks.

        Args:
            ranked: this rank's.
            owners: ``[U]`` external ids of all users (or of what is ranked for), in ranking order.
            items: ``[I]`` external ids by position.
            names: of the first two columns.
        """
        owner_ids, item_ids = external(owners), external(items)
        for begin, positions, scores in ranked:
            owner, rank = np.nonzero(positions >= 0)
            columns = {
                names[0]: owner_ids.take(pa.array(begin + owner)),
                names[1]: item_ids.take(pa.array(positions[owner, rank])),
                "score": pa.array(scores[owner, rank]),
                "rank": pa.array((rank + 1).astype(np.int32)),
            }
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

        A column for each item would take thousands of times as many pages as one of lists. The
        item ids are in the schema's metadata: JSON under ``item_ids``.

        Args:
            scores: (first user, last + 1, users that any rank asks for) -> ``[users, I]`` logits.
            users: ``[U]`` external ids.
            items: ``[I]`` external ids by position.
            kind: of a score: logits in fp32 or fp16, or probabilities in units of 1/127 in int8.
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
                list(tables(begin, end))  # looking up is for all ranks

    def merge_ranked(self, csv_columns: Mapping[str, str], k: int) -> RankingFiles | None:
        """Joins what `write_ranked` wrote, and some columns of it into a CSV file. All ranks.

        Neither file appears before it is whole.

        Args:
            csv_columns: columns by their name in the CSV file.
            k: items per owner asked for.

        Returns:
            On rank 0 what was written; None elsewhere.

        Raises:
            DeepFMError: the disk is full, say.
        """
        rows = full = 0

        def count(table: pa.Table) -> None:
            nonlocal rows, full
            rows += table.num_rows
            full += pc.sum(pc.equal(table["rank"], k)).as_py()

        self._merge(csv_columns, 1 << 20, count)
        if not self._world.is_first:
            return None
        return RankingFiles(self.target, self.csv, self._n_users, rows, k, full)

    def merge_matrix(self) -> None:
        """Joins what `write_matrix` wrote; the file appears when it is whole. All ranks."""
        self._merge({}, MATRIX_USERS, lambda _: None)

    def _merge(
        self, csv_columns: Mapping[str, str], rows: int, see: Callable[[pa.Table], None]
    ) -> None:
        def merge() -> None:
            with write_errors_to_user(self.target):
                self._write_merged(csv_columns, rows, see)

        self._world.barrier()
        self._world.run_on_rank0(f"{self.target.name}_end", merge)

    @property
    def csv(self) -> Path:
        """The CSV file."""
        return self.target.with_suffix(".csv")

    def _write_merged(
        self, csv_columns: Mapping[str, str], rows: int, see: Callable[[pa.Table], None]
    ) -> None:
        parts = sorted(self.aside.glob("*.parquet"))
        whole, text = self.aside / "whole", self.aside / "csv"
        schema = pq.read_schema(parts[0])
        batches = (b for part in parts for b in pq.ParquetFile(part).iter_batches(rows))
        narrow = pa.schema([(new, schema.field(old).type) for new, old in csv_columns.items()])
        options = pa_csv.WriteOptions(include_header=False, quoting_style="needed")
        with (
            pq.ParquetWriter(
                whole, schema, compression="zstd", use_dictionary=_repetitive_columns(schema)
            ) as writer,
            text.open("wb") as file,
        ):
            # Arrow would put the names into quotes.
            file.write((",".join(csv_columns) + "\n").encode())
            with pa_csv.CSVWriter(file, narrow, write_options=options) as lines:
                # Of one size: the merged bytes do not depend on how users were dealt.
                for table in in_tables(batches, rows):
                    writer.write_table(table)
                    see(table)
                    if csv_columns:
                        picked = table.select(list(csv_columns.values()))
                        lines.write_table(picked.rename_columns(narrow.names))
        os.replace(whole, self.target)
        if csv_columns:
            os.replace(text, self.csv)
        shutil.rmtree(self.aside)


def state_of(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files: of a checkpoint, say."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def hash_of(*arrays: np.ndarray) -> str:
    """A hash of the values of some arrays."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _repetitive_columns(schema: pa.Schema) -> bool | list[str]:
    """Columns worth a dictionary: scores are all different, and trying takes half of the time."""
    return [n for n in schema.names if n != "score"] if "score" in schema.names else True
