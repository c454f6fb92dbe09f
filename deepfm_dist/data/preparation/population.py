"""Drops rare items and users, and holds out whole users."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.codes import Hashes, seeded
from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.data.manifest import FOLD_IN, TRAIN
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import (
    DIGITS,
    Bound,
    Digit,
    SplitIds,
    fold_in,
    split_at_bounds,
    split_bounds,
)
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed

Mask = npt.NDArray[np.bool_]


def drops_items(job: Job) -> bool:
    """Whether rare items are dropped."""
    return job.data.interactions.min_rows_per_item > 1


def drops_users(job: Job) -> bool:
    """Whether users with few rows are dropped."""
    return job.data.interactions.min_rows_per_user > 1


def holds_out_users(job: Job) -> bool:
    """Whether whole users are held out."""
    return job.data.split.method == "users" and not job.data.refit


@dataclass(frozen=True)
class Population:
    """The criteria for the rows that remain, as far as known.

    Attributes:
        item_rows: ``[items]`` rows of all partitions, if rare items are dropped.
        bounds: the bounds of `UserKeys`, if users are held out.
        trained_rows: ``[items]`` training rows per item after users are held out.
    """

    item_rows: Int64Array | None = None
    bounds: tuple[Bound, Bound] | None = None
    trained_rows: Int64Array | None = None

    def select(
        self, job: Job, part: PartitionRows, hashes: Hashes
    ) -> tuple[PartitionRows, SplitIds | None]:
        """The remaining rows of a partition with their splits, and the splits of its users.

        Args:
            job: the preparation; it counts dropped rows.
            part: the rows.
            hashes: the hashes of its users' ids.
        """
        if self.item_rows is not None:
            part = part.keeping(rows_of_frequent_items(job, part, self.item_rows))
        if drops_users(job) and (self.item_rows is not None or not drops_items(job)):
            part = part.keeping(rows_of_frequent_users(job, part))
        if self.bounds is None:
            return part, None
        keys = UserKeys.from_partition(job, part, hashes)
        user_parts = keys.splits(len(part.users), self.bounds)
        if self.trained_rows is not None:
            keep = rows_of_rankable_users(job, part, user_parts, self.trained_rows)
            part = part.keeping(keep)
            part = part.assigned(*user_splits(job, part, user_parts))
        return part, user_parts


# Functions of one partition.


def item_counts(part: PartitionRows, n_items: int, user_parts: SplitIds | None) -> Int64Array:
    """``[items]`` rows by item code; with ``user_parts``, those of training users."""
    items = part["item"]
    if user_parts is not None:
        items = items[user_parts[part["local"]] == TRAIN]
    return np.bincount(items, minlength=n_items)


def rows_of_frequent_items(job: Job, part: PartitionRows, counts: Int64Array) -> Mask:
    """``[n]`` rows that stay when rare items are dropped.

    Args:
        job: the preparation; it counts dropped rows.
        part: the rows.
        counts: ``[items]`` rows of all partitions.
    """
    least = job.data.interactions.min_rows_per_item
    keep: Mask = (counts >= least)[part["item"]]
    job.drop(f"rows of items with fewer than {least:,} rows", _n_left_out(keep))
    return keep


def rows_of_frequent_users(job: Job, part: PartitionRows) -> Mask:
    """``[n]`` rows that stay when users with few rows are dropped."""
    least, local = job.data.interactions.min_rows_per_user, part["local"]
    keep: Mask = (np.bincount(local, minlength=len(part.users)) >= least)[local]
    job.drop(f"rows of users with fewer than {least:,} rows", _n_left_out(keep))
    return keep


@dataclass(frozen=True)
class UserKeys:
    """The keys that assign users to splits.

    Attributes:
        users: ``[m]`` indices of the partition's users with at least two rows.
        keys: ``[m]`` int64 hashes of their ids.
    """

    users: Int64Array
    keys: Int64Array

    @classmethod
    def from_partition(cls, job: Job, part: PartitionRows, hashes: Hashes) -> "UserKeys":
        """The keys of a partition, given the hashes of its users' ids."""
        rows = np.bincount(part["local"], minlength=len(part.users))
        users = np.flatnonzero(rows >= 2)
        return cls(users, seeded(hashes[users], derive_seed(job.seed, "users")).view(np.int64))

    def splits(self, n_users: int, bounds: tuple[Bound, Bound]) -> SplitIds:
        """``[n_users]`` int8: the split of every user of the partition."""
        user_parts = np.full(n_users, TRAIN, np.int8)
        user_parts[self.users] = split_at_bounds((self.keys,), bounds)
        return user_parts


def check_users_remain(job: Job, n_users: int) -> None:
    """Checks that some users with at least two rows are not held out.

    Raises:
        DataError: no user is left for training.
    """
    split = job.data.split
    n_held_out = split.number(split.valid, n_users) + split.number(split.test, n_users)
    if n_held_out >= n_users:
        raise DataError(
            f"data.split: valid={split.valid:g} and test={split.test:g} hold out "
            f"{plural(n_held_out, 'user')}, as many as have two rows or more ({n_users:,}); "
            f"hold out fewer"
        )


def rows_of_rankable_users(
    job: Job, part: PartitionRows, user_parts: SplitIds, trained_rows: Int64Array
) -> Mask:
    """``[n]`` rows to keep: held-out users need at least two rows of trained items.

    Args:
        job: the preparation; it counts dropped rows.
        part: the rows.
        user_parts: ``[users]``: the split of each.
        trained_rows: ``[items]`` training rows of all partitions.
    """
    row_parts = user_parts[part["local"]]
    keep: Mask = (row_parts == TRAIN) | (trained_rows > 0)[part["item"]]
    left = np.bincount(part["local"][keep], minlength=len(user_parts))
    keep &= (row_parts == TRAIN) | (left >= 2)[part["local"]]
    reason = "rows of held-out users whose items have no training rows, or who have one item"
    job.drop(reason, _n_left_out(keep))
    return keep


def user_splits(
    job: Job, part: PartitionRows, user_parts: SplitIds
) -> tuple[SplitIds, SplitIds | None]:
    """Splits of rows, and of those with low ratings, given the users' splits."""
    parts = user_parts[part["local"]]
    at = np.flatnonzero(parts != TRAIN)
    known = fold_in(
        job.data.split.fold_in, part["local"][at], len(user_parts), part["key"][at], parts[at]
    )
    parts[at] = known
    if part.low is None:
        return parts, None
    # Low ratings of held-out users are dropped, as in the literature.
    is_trained = user_parts[part.low["local"]] == TRAIN
    return parts, np.where(is_trained, TRAIN, FOLD_IN).astype(np.int8)


def _n_left_out(keep: Mask) -> int:
    return int((~keep).sum())


# Functions over all partitions, run by threads.


def drop_rare(job: Job, partitions: Partitions) -> None:
    """Drops items with few positives, then users with few remaining ones, once each. All threads.

    Source: the preprocessing of Liang et al., "Variational Autoencoders for Collaborative
    Filtering", 2018.
    """
    if drops_items(job):
        counts = _item_counts(job, partitions, None)
        for p in job.own_partitions:
            partitions.leave_out(p, rows_of_frequent_items(job, partitions.load(p), counts))
    if drops_users(job):
        for p in job.own_partitions:
            partitions.leave_out(p, rows_of_frequent_users(job, partitions.load(p)))


def hold_out_users(job: Job, partitions: Partitions) -> None:
    """Assigns all rows to splits under ``split.method=users``. All threads.

    Users are assigned to splits by a hash of their id. A held-out user's rows of items without
    training rows are dropped; a share of the others is known (`manifest.FOLD_IN`), the rest is held
    out. Users with a single row are not held out, and those left with one are dropped. Their
    low-rated items are neither known nor masked.

    Raises:
        DataError: no user is left for training.

    Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018, section 4.
    """
    keys_by_partition: dict[int, UserKeys] = {}
    for p in job.own_partitions:
        part = partitions.load(p)
        hashes = partitions.hashes(entity_key("user"))[part.users]
        keys = UserKeys.from_partition(job, part, hashes)
        partitions.save_array(p, "user keys", keys.keys)  # on disk if there are many
        keys_by_partition[p] = replace(keys, keys=partitions.load_array(p, "user keys"))
    n_own = sum(len(keys.users) for keys in keys_by_partition.values())
    n_users = int(job.crew.add_up(np.array([n_own]))[0])
    check_users_remain(job, n_users)

    def count(digit: Digit) -> Int64Array:
        counts = np.zeros(DIGITS, np.int64)
        for keys in keys_by_partition.values():
            counts += digit.counts((keys.keys,))
        return job.crew.add_up(counts)

    bounds = split_bounds(job.data.split, n_users, count, n_keys=1)
    for p, keys in keys_by_partition.items():
        partitions.save_array(p, "user parts", keys.splits(len(partitions.users(p)), bounds))
    trained_rows = _item_counts(job, partitions, "user parts")
    for p in job.own_partitions:
        user_parts = np.asarray(partitions.load_array(p, "user parts"))
        keep = rows_of_rankable_users(job, partitions.load(p), user_parts, trained_rows)
        partitions.leave_out(p, keep)
        partitions.assign(p, *user_splits(job, partitions.load(p), user_parts))


def _item_counts(job: Job, partitions: Partitions, user_parts: str | None) -> Int64Array:
    """`item_counts` of all partitions, using saved arrays by name. All threads."""
    n_items = len(partitions.ids[entity_key("item")])
    counts = np.zeros(n_items, np.int64)
    for p in job.own_partitions:
        of_users = None if user_parts is None else np.asarray(partitions.load_array(p, user_parts))
        counts += item_counts(partitions.load(p), n_items, of_users)
    return job.crew.add_up(counts)
