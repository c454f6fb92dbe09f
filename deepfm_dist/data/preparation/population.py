"""Who takes part: rare items and users are dropped, and some users are held out entirely."""

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.codes import seeded
from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.data.manifest import FOLD_IN, TRAIN
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.split import (
    DIGITS,
    Digit,
    SplitIds,
    fold_in,
    split_at_bounds,
    split_bounds,
)
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed


def drop_rare(job: Job, partitions: Partitions) -> None:
    """Drops items with few positives, then users with few of what is left, once each. All ranks.

    Source: the preprocessing of Liang et al., "Variational Autoencoders for Collaborative
    Filtering", 2018.
    """
    least_users, least_items = (
        job.data.interactions.min_rows_per_item,
        job.data.interactions.min_rows_per_user,
    )
    if least_users > 1:
        enough = _item_counts(job, partitions, None) >= least_users
        for p in job.own_partitions:
            keep = enough[partitions.load(p)["item"]]
            job.drop(f"rows of items with fewer than {least_users:,} rows", _n_left_out(keep))
            partitions.leave_out(p, keep)
    if least_items > 1:
        for p in job.own_partitions:
            local = partitions.load(p)["local"]
            keep = (np.bincount(local, minlength=len(partitions.users(p))) >= least_items)[local]
            job.drop(f"rows of users with fewer than {least_items:,} rows", _n_left_out(keep))
            partitions.leave_out(p, keep)


def hold_out_users(job: Job, partitions: Partitions) -> None:
    """Says of every row where it goes under ``split.method=users``. All ranks.

    Users are dealt to the splits by a hash of their id. Of a held-out user, rows of items without
    training rows are dropped; of the others a share is known (`manifest.FOLD_IN`), the rest is held
    out. Users with a single row are not held out, and those who are left with one are dropped.
    What they have rated low is neither known nor masked.

    Raises:
        DataError: no user is left for training.

    Source: Liang et al., "Variational Autoencoders for Collaborative Filtering", 2018, section 4.
    """
    split, seed = job.data.split, derive_seed(job.seed, "users")
    eligible = {}
    for p in job.own_partitions:
        rows = np.bincount(partitions.load(p)["local"], minlength=len(partitions.users(p)))
        eligible[p] = np.flatnonzero(rows >= 2)
        hashes = partitions.hashes(entity_key("user"))[partitions.users(p)[eligible[p]]]
        partitions.save_array(p, "user keys", seeded(hashes, seed).view(np.int64))
    n_users = int(job.crew.add_up(np.array([sum(map(len, eligible.values()))]))[0])
    n_held_out = split.number(split.valid, n_users) + split.number(split.test, n_users)
    if n_held_out >= n_users:
        raise DataError(
            f"data.split: valid={split.valid:g} and test={split.test:g} hold out "
            f"{plural(n_held_out, 'user')}, as many as have two rows or more ({n_users:,}); "
            f"hold out fewer"
        )

    def count(digit: Digit) -> Int64Array:
        counts = np.zeros(DIGITS, np.int64)
        for p in job.own_partitions:
            counts += digit.counts((np.asarray(partitions.load_array(p, "user keys")),))
        return job.crew.add_up(counts)

    bounds = split_bounds(split, n_users, count, n_keys=1)
    for p in job.own_partitions:
        user_parts = np.full(len(partitions.users(p)), TRAIN, np.int8)
        keys = np.asarray(partitions.load_array(p, "user keys"))
        user_parts[eligible[p]] = split_at_bounds((keys,), bounds)
        partitions.save_array(p, "user parts", user_parts)
    in_training = _item_counts(job, partitions, "user parts") > 0
    for p in job.own_partitions:
        part, user_parts = partitions.load(p), np.asarray(partitions.load_array(p, "user parts"))
        of_rows = user_parts[part["local"]]
        keep = (of_rows == TRAIN) | in_training[part["item"]]
        left = np.bincount(part["local"][keep], minlength=len(user_parts))
        reason = "rows of held-out users whose items have no training rows, or who have one item"
        keep &= (of_rows == TRAIN) | (left >= 2)[part["local"]]
        job.drop(reason, _n_left_out(keep))
        partitions.leave_out(p, keep)
        part = partitions.load(p)
        low_parts = None
        if part.low is not None:  # those of held-out users are left out, as in the literature
            is_trained = user_parts[part.low["local"]] == TRAIN
            low_parts = np.where(is_trained, TRAIN, FOLD_IN).astype(np.int8)
        parts = _parts(split.fold_in, part["local"], part["key"], user_parts)
        partitions.assign(p, parts, low_parts)


def _parts(
    share: float, local: npt.NDArray[np.integer], keys: Int64Array, user_parts: SplitIds
) -> SplitIds:
    parts = user_parts[local]
    at = np.flatnonzero(parts != TRAIN)
    parts[at] = fold_in(share, local[at], len(user_parts), keys[at], parts[at])
    return parts


def _item_counts(job: Job, partitions: Partitions, user_parts: str | None) -> Int64Array:
    """``[items]`` rows by item code; with ``user_parts``, those of training users. All ranks."""
    n_items = len(partitions.ids[entity_key("item")])
    counts = np.zeros(n_items, np.int64)
    for p in job.own_partitions:
        part = partitions.load(p)
        items = part["item"]
        if user_parts is not None:
            items = items[np.asarray(partitions.load_array(p, user_parts))[part["local"]] == TRAIN]
        counts += np.bincount(items, minlength=n_items)
    return job.crew.add_up(counts)


def _n_left_out(keep: npt.NDArray[np.bool_]) -> int:
    return int((~keep).sum())
