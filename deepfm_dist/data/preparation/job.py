"""What all steps of one preparation know."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from deepfm_dist.data.codes import Hashes
from deepfm_dist.data.fields import in_rows
from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.data.manifest import TEST, VALID
from deepfm_dist.data.preparation.crew import Crew
from deepfm_dist.data.schema import DataConfig, Feature, label_of
from deepfm_dist.data.sources import InputFile

PARTITION_BYTES = 8 << 20
"""Of input, as plain text, that one of many partitions is meant for: threads hold one each, and
there are enough of them for all threads to end at about the same time."""
IN_MEMORY_PARTITIONS = 4
"""Up to this size there is a single partition, which stays in memory."""
BUCKET_BITS = 9
"""Rows are ordered by the first bits of a hash, their bucket, before anything else. A partition has
the rows of neighbouring buckets: the order of all rows does not depend on the partitions."""
MOST_PARTITIONS = 1 << BUCKET_BITS
OPEN = -1
"""In place of a split: which one a row belongs to is yet to be said."""


def entity_key(name: str) -> str:
    """What the ids of users or items go by among the tables' values."""
    return f"entity {name}"


@dataclass(frozen=True)
class Job:
    """One preparation, as one thread sees it.

    Attributes:
        data: the settings of the dataset.
        files: the input files by `label_of` their setting.
        seed: of splits, negatives and row order.
        crew: the threads.
        folder: of the dataset to be.
        dropped: what this thread has left out of the input, by reason.
        noted: what users should know of the rest, by reason, counted by this thread.
        rows_limit: how many rows are read of the files of each setting, if not all; they are one
            partition.
        earlier: folder of the dataset that this one continues, if any.
    """

    data: DataConfig
    files: dict[str, list[InputFile]]
    seed: int
    crew: Crew
    folder: Path
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    rows_limit: int | None = None
    earlier: Path | None = None

    def drop(self, reason: str, count: int) -> None:
        """Counts dropped rows, by reason."""
        if count:
            self.dropped[reason] += count

    def note(self, reason: str, count: int) -> None:
        """Counts what users should know of."""
        if count:
            self.noted[reason] += count

    @cached_property
    def entities(self) -> list[str]:
        """Which of user and item the rows have."""
        return [name for name in ("user", "item") if getattr(self.data.interactions, name)]

    @cached_property
    def row_fields(self) -> list[Feature]:
        """Fields whose values stand in the rows."""
        return in_rows(self.data)

    @cached_property
    def inputs(self) -> list[tuple[InputFile, str, int]]:
        """Every file of rows, `label_of` its setting, and its split."""
        split = self.data.split
        settings = [
            (self.data.interactions.file, OPEN),
            (split.valid_file, VALID),
            (split.test_file, TEST),
        ]
        named = [(label_of(files), part) for files, part in settings if files is not None]
        return [(file, name, part) for name, part in named for file in self.files[name]]

    @cached_property
    def n_partitions(self) -> int:
        """Partitions that the rows are dealt to."""
        n = -(-sum(file.text_bytes for file, _, _ in self.inputs) // PARTITION_BYTES)
        if self.rows_limit is not None or n <= IN_MEMORY_PARTITIONS:
            return 1
        return min(MOST_PARTITIONS, n)

    @cached_property
    def n_user_groups(self) -> int:
        """Groups of rows of the user table, which are finished one after the other."""
        return -(-self.n_partitions // IN_MEMORY_PARTITIONS)

    def for_task(self, files: dict[str, list[InputFile]] | None = None) -> "Job":
        """The same for one task of a cluster, with nothing left out or noted yet.

        Args:
            files: the same input in other pieces, if it is divided.
        """
        job = replace(
            self, files=files or self.files, crew=Crew(), dropped=Counter(), noted=Counter()
        )
        vars(job)["n_partitions"] = self.n_partitions  # not this machine's
        return job

    @property
    def own_partitions(self) -> range:
        """This thread's partitions."""
        return range(self.crew.rank, self.n_partitions, self.crew.size)

    def spill(self, name: str) -> Path:
        """A file that goes when the dataset is whole."""
        return self.folder.with_name("spill") / name


def buckets_of(hashes: Hashes) -> Int64Array:
    """``[n]`` hashes -> ``[n]`` int64 buckets, which ascend as the hashes do."""
    return (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def partitions_of(buckets: Int64Array, n_partitions: int) -> Int64Array:
    """``[n]`` buckets -> ``[n]`` int64 partitions, which ascend as the buckets do."""
    return (buckets * n_partitions) >> BUCKET_BITS
