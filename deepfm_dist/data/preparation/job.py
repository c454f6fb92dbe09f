"""The context shared by all steps of a preparation."""

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
"""Target size of a partition, as plain text: each thread holds one, and there are enough of them
for threads to finish at about the same time.
"""
IN_MEMORY_PARTITIONS = 4
"""Up to this many partitions' worth of input, there is a single partition in memory."""
BUCKET_BITS = 9
"""Rows are ordered first by the leading bits of a hash, their bucket. A partition consists of
adjacent buckets, so the order of all rows does not depend on the partitions.
"""
MOST_PARTITIONS = 1 << BUCKET_BITS
OPEN = -1
"""Placeholder for a split that is not assigned yet."""


def entity_key(name: str) -> str:
    """Key of the ids of users or items among the tables' values."""
    return f"entity {name}"


@dataclass(frozen=True)
class Job:
    """One preparation, as one thread sees it.

    Attributes:
        data: the settings of the dataset.
        files: the input files by `label_of` their setting.
        seed: the seed of splits, negatives and row order.
        crew: the threads.
        folder: where the dataset is written.
        dropped: counts of input that this thread dropped, by reason.
        noted: counts of other remarks by this thread, by reason.
        rows_limit: number of rows to read per setting, as a single partition; None: all.
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
        """Counts a remark for users."""
        if count:
            self.noted[reason] += count

    @cached_property
    def entities(self) -> list[str]:
        """The entities, user and item, that the rows have."""
        return [name for name in ("user", "item") if getattr(self.data.interactions, name)]

    @cached_property
    def row_fields(self) -> list[Feature]:
        """Fields stored in the rows."""
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
        """Number of partitions."""
        n = -(-sum(file.text_bytes for file, _, _ in self.inputs) // PARTITION_BYTES)
        if self.rows_limit is not None or n <= IN_MEMORY_PARTITIONS:
            return 1
        return min(MOST_PARTITIONS, n)

    @cached_property
    def n_user_groups(self) -> int:
        """Number of row groups of the user table, which are finished one by one."""
        return -(-self.n_partitions // IN_MEMORY_PARTITIONS)

    def for_task(self, files: dict[str, list[InputFile]] | None = None) -> "Job":
        """The same job for one cluster task, with empty counts.

        Args:
            files: the input divided into pieces, if it is.
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
        """Path of a temporary file."""
        return self.folder.with_name("spill") / name


def buckets_of(hashes: Hashes) -> Int64Array:
    """``[n]`` hashes -> ``[n]`` int64 buckets, in the same order."""
    return (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def partitions_of(buckets: Int64Array, n_partitions: int) -> Int64Array:
    """``[n]`` buckets -> ``[n]`` int64 partitions, in the same order."""
    return (buckets * n_partitions) >> BUCKET_BITS
