"""The plan for writing partitions: table rows, splits, lanes and groups."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.jagged import Int32Array, Int64Array, offsets_of
from deepfm_dist.data.manifest import SPLITS, TRAIN, cuts_of
from deepfm_dist.data.preparation.counts import Counts
from deepfm_dist.data.preparation.fitting import FitResult
from deepfm_dist.data.preparation.job import Job, entity_key

LANE_WINDOW_ROWS = 1 << 22
"""Number of rows that all lanes together hold in memory when streaming."""


@dataclass(frozen=True)
class WritePlan:
    """Everything needed to write the rows of any partition.

    A cluster task has only its partition's users in ``row_of_code``, ``negative_user`` and
    ``trained``.

    Attributes:
        fitted: the tables' rows and the statistics.
        first_of: for each split, ``[partitions + 1]`` number of rows in preceding partitions.
        lanes: number of streams of training rows.
        groups: groups of training rows, a multiple of ``lanes``.
        mean_weight: mean weight of the training rows.
        negative_user: ``[users]`` the user whose history a user's negatives avoid, if some users
            have no table row; these are numbered from the end of the user table on, for the sampler
            only.
        n_rare: number of these users.
        trained: by entity, ``[codes]`` bool: whether they have training rows.
    """

    fitted: FitResult
    first_of: tuple[Int64Array, ...]
    lanes: int
    groups: int
    mean_weight: float
    negative_user: Int32Array | None
    n_rare: int
    trained: dict[str, npt.NDArray[np.bool_]]

    @classmethod
    def from_counts(cls, job: Job, counts: Counts, fitted: FitResult) -> "WritePlan":
        """Makes the plan from the counts of all partitions."""
        n_train = int(counts.rows[:, TRAIN].sum())
        lanes = job.data.lanes or _default_lanes(n_train)
        negative_user = _negative_users(job, counts, fitted)
        n_rows = fitted.rows.get("user", 1)
        return cls(
            fitted=fitted,
            first_of=tuple(offsets_of(counts.rows[:, split]) for split in range(len(SPLITS))),
            lanes=lanes,
            groups=lanes * -(-n_train // LANE_WINDOW_ROWS),
            mean_weight=counts.mean_weight,
            negative_user=negative_user,
            n_rare=0 if negative_user is None else max(0, int(negative_user.max()) + 1 - n_rows),
            trained={name: counts.tables[entity_key(name)] > 0 for name in job.entities},
        )

    @property
    def cuts(self) -> Int64Array:
        """Cuts between groups of training rows."""
        return cuts_of(int(self.first_of[TRAIN][-1]), self.groups)

    def for_users(self, begin: int, end: int) -> "WritePlan":
        """The plan restricted to users with codes ``begin`` to ``end``."""
        cut = slice(begin, end)
        row_of_code, user = self.fitted.row_of_code, entity_key("user")
        users = np.append(row_of_code[user][:-1][cut], np.int32(0))
        return replace(
            self,
            fitted=replace(self.fitted, row_of_code=row_of_code | {user: users}),
            negative_user=None if self.negative_user is None else self.negative_user[cut],
            trained=self.trained | {"user": self.trained["user"][cut]},
        )


def _negative_users(job: Job, counts: Counts, fitted: FitResult) -> Int32Array | None:
    """See `WritePlan.negative_user`."""
    if not draws_in_training(job):
        return None
    rows = fitted.row_of_code[entity_key("user")][:-1]
    rare = (rows == 0) & (counts.tables[entity_key("user")] > 0)
    if not rare.any():
        return None
    rows = rows.copy()
    rows[rare] = fitted.rows["user"] + np.arange(rare.sum(), dtype=np.int32)
    return rows


def draws_in_training(job: Job) -> bool:
    """Whether training draws the negatives, rather than preparation."""
    return job.data.task == "implicit" and job.data.negatives.fixed_per_user is None


def _default_lanes(rows: int) -> int:
    """64, and from 2**30 rows on one for every 2**24, as a power of two up to 4,096."""
    return min(4096, max(64, 1 << (rows >> 24).bit_length())) if rows >= 1 << 30 else 64
