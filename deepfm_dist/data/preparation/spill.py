"""Partitioned rows between steps, in memory or spilled to disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.jagged import Int32Array, grouped, joined, taken


class Spill:
    """One rank's rows by partition: an Arrow file whose record batches hold one partition each.

    Args:
        path: the file to write; None keeps the rows in memory.
        n_partitions: number of partitions.
    """

    def __init__(self, path: Path | None, n_partitions: int) -> None:
        self.path = path
        self.places: list[list[int]] = [[] for _ in range(n_partitions)]
        """The numbers of each partition's record batches."""
        self._in_memory: list[pa.RecordBatch] = []
        self._writer: pa.RecordBatchFileWriter | None = None
        self._written = 0

    def add(self, batch: pa.RecordBatch, partitions: npt.NDArray[np.integer]) -> None:
        """Appends rows to ``partitions [n]``, keeping their order."""
        if len(self.places) == 1:
            self._put(batch, 0)
            return
        offsets, order = grouped(partitions, len(self.places))
        batch = batch.take(pa.array(order))
        for p in np.flatnonzero(np.diff(offsets)):
            self._put(batch.slice(offsets[p], offsets[p + 1] - offsets[p]), int(p))

    def _put(self, batch: pa.RecordBatch, partition: int) -> None:
        self.places[partition].append(self._written)
        self._written += 1
        if self.path is None:
            self._in_memory.append(batch)
            return
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self.path), batch.schema)
        self._writer.write_batch(batch)

    def close(self) -> None:
        """Finishes writing."""
        if self._writer is not None:
            self._writer.close()

    def read(self, partition: int) -> list[pa.RecordBatch]:
        """A partition's rows in the order in which they were added."""
        if self.path is None:
            return [self._in_memory[i] for i in self.places[partition]]
        return read_spilled(self.path, self.places[partition])


def read_spilled(path: Path, places: Sequence[int]) -> list[pa.RecordBatch]:
    """Memory-maps record batches of a `Spill`'s file."""
    if not places:
        return []
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in places]


@dataclass
class PartitionRows:
    """The rows of a partition, in the order of `rules.row_order`.

    Attributes:
        columns: ``[n]`` each: ``key`` int64, the hash used for splits and order; ``user`` and
            ``item`` int32 codes, and ``local`` int32, the user's index among the partition's users,
            or ``bucket`` int16 without users; ``label`` int8, and for several labels ``label:NAME``
            int8, -1 if unknown; ``given`` int8, train, valid or test if given by the input, else
            -1; ``time`` int64, multiplied by ``Manifest.time_scale``, and ``weight`` float32, if
            known; ``field NAME``, raw numbers and codes of the fields in the rows.
        low: the rows rated below ``min_rating``, which count as seen but are not trained on; None
            if no ratings are read.
        repeated: number of rows dropped as repeats of a user and item.
        tied: number of pairs for which a hash chose the row to keep.
        short: number of users with fewer unseen items than requested fixed negatives.
        users: codes of all users of the partition, ascending.
        time_scale: see `Manifest.time_scale`.
    """

    columns: dict[str, Any]
    low: "PartitionRows | None" = None
    repeated: int = 0
    tied: int = 0
    short: int = 0
    users: Int32Array = field(default_factory=lambda: np.zeros(0, np.int32))
    time_scale: int = 1

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def with_low(self) -> list["PartitionRows"]:
        """These rows with others that only count as seen."""
        return [self] if self.low is None else [self, self.low]

    def where(self, mask: npt.NDArray[np.bool_]) -> "PartitionRows":
        """Selects rows."""
        if mask.all():
            return self
        return self.take(np.flatnonzero(mask))

    def keeping(self, mask: npt.NDArray[np.bool_]) -> "PartitionRows":
        """The same partition with a subset of its rows; rows with low ratings stay."""
        return replace(self, columns=self.take(np.flatnonzero(mask)).columns)

    def assigned(
        self, parts: npt.NDArray[np.int8], low_parts: npt.NDArray[np.int8] | None
    ) -> "PartitionRows":
        """The same partition with splits assigned to its rows and low-rated rows."""
        low = self.low
        if low is not None:
            low = replace(low, columns={**low.columns, "given": np.asarray(low_parts)})
        return replace(self, columns={**self.columns, "given": np.asarray(parts)}, low=low)

    def take(self, rows: npt.NDArray[np.integer]) -> "PartitionRows":
        """Gathers rows by index."""
        return PartitionRows({name: taken(values, rows) for name, values in self.columns.items()})

    @classmethod
    def joined(cls, parts: Sequence["PartitionRows"]) -> "PartitionRows":
        """Concatenates rows."""
        return cls({name: joined([p[name] for p in parts]) for name in parts[0].columns})
