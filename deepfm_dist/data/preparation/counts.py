"""Where rows belong, and what training rows say: added up over partitions and ranks."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.codes import Hashes, seeded
from deepfm_dist.data.fields import NumericFit
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    count_into,
    joined,
    taken,
)
from deepfm_dist.data.manifest import SPLITS, TEST, TRAIN, VALID
from deepfm_dist.data.moments import Moments
from deepfm_dist.data.preparation.job import OPEN, Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.rules import latest_rows, words_of
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import (
    Bound,
    SortKeys,
    SplitIds,
    count_tied_users,
    split_at_bounds,
    split_bounds,
    split_by_user,
    splits_by_time,
)
from deepfm_dist.data.schema import Feature, label_of
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
NEARLY_ALL = 0.95
"""Share of the rows, users or items without a value from which on a field is warned of."""


@dataclass
class EntityValues:
    """A field of users or items that stands in the rows: what the latest training row says.

    Attributes:
        entity: ``[m]`` codes, each once.
        time: ``[m]`` of the rows that say it; 0 where no times are read.
        word: ``[m]`` seeded hashes of the values, the least of which decides between equal times.
        values: ``[m]``.
        differ: ``[m]`` whether rows of the same user or item say different things.
    """

    entity: Int32Array
    time: Int64Array
    word: Hashes
    values: Values
    differ: npt.NDArray[np.bool_]

    @classmethod
    def from_rows(
        cls,
        entities: Int32Array,
        times: Int64Array,
        words: Hashes,
        values: Values,
        n: int,
    ) -> "EntityValues":
        """What rows say of ``n`` users or items."""
        row, differ = latest_rows(entities, times, words, has_value(values), n)
        there = np.flatnonzero(row >= 0)
        row = row[there]
        return cls(
            there.astype(np.int32), times[row], words[row], taken(values, row), differ[there]
        )

    @classmethod
    def merged(cls, pieces: Sequence["EntityValues"], n: int) -> "EntityValues":
        """The latest of each entity over all pieces."""
        entity = np.concatenate([p.entity for p in pieces])
        found = cls.from_rows(
            entity,
            np.concatenate([p.time for p in pieces]),
            np.concatenate([p.word for p in pieces]),
            joined([p.values for p in pieces]),
            n,
        )
        differ = np.zeros(n, bool)
        differ[entity[np.concatenate([p.differ for p in pieces])]] = True
        found.differ |= differ[found.entity]
        return found


def has_value(values: Values) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: which raw values of a field are not missing."""
    if isinstance(values, Jagged):
        return np.asarray(values.lengths > 0)
    return np.asarray(~np.isnan(values) if values.dtype.kind == "f" else values >= 0)


def report_empty(feature: Feature, n_empty: int, n: int, rows: str) -> None:
    """Logs how many of ``n`` rows, users or items have no value in a field."""
    if n_empty:
        where = f"column {feature.column or feature.name!r}"
        where += f" of {label_of(feature.file)}" if feature.file else ""
        nearly_all = n_empty >= NEARLY_ALL * n
        log.log(
            logging.WARNING if nearly_all else logging.INFO,
            "%s: %s of %s %s have no value%s",
            feature.name,
            f"{n_empty:,}",
            f"{n:,}",
            rows,
            f"; is the {where} the right one, and does {feature.name}.missing fit?"
            if nearly_all
            else "",
        )


@dataclass
class Counts:
    """What a thread's partitions add to the statistics.

    Attributes:
        tables: training rows by code, of each table that has a vocabulary; of all threads.
        liked: training positives by item code; of all threads.
        numeric: of each numeric field that stands in context.
        of_entities: of each field of users and items that stands in the rows.
        rows: ``[partitions, splits]``; positives: the same.
        weights: of the training rows, where they are known.
        repeated: rows dropped because another one has their user and item.
        low: rows that are seen but not trained on.
        empty: training rows without a value, of each field that stands in context.
    """

    tables: dict[str, Int64Array]
    liked: Int64Array
    numeric: dict[str, NumericFit]
    of_entities: dict[str, EntityValues]
    rows: Int64Array
    positives: Int64Array
    weights: Moments
    repeated: int = 0
    low: int = 0
    empty: Counter[str] = field(default_factory=Counter)

    @classmethod
    def zeros(cls, job: Job, partitions: Partitions) -> "Counts":
        """Nothing counted yet."""
        context = [f for f in job.row_fields if f.entity == "context"]
        tables, liked = job.crew.broadcast(
            (
                {name: np.zeros(len(ids), np.int64) for name, ids in partitions.ids.items()},
                np.zeros(len(partitions.ids.get(entity_key("item"), ())), np.int64),
            )
            if job.crew.is_first
            else None
        )
        return cls(
            tables=tables,
            liked=liked,
            numeric={f.name: NumericFit(f) for f in context if f.kind == "numeric"},
            of_entities={},
            rows=np.zeros((job.n_partitions, len(SPLITS)), np.int64),
            positives=np.zeros((job.n_partitions, len(SPLITS)), np.int64),
            weights=Moments(),
        )

    def add(
        self, job: Job, partitions: Partitions, p: int, part: PartitionRows, parts: SplitIds
    ) -> None:
        """Counts a partition in, whose rows go where ``parts`` says."""
        words_seed = derive_seed(job.seed, "values")
        at = np.flatnonzero(parts == TRAIN)
        for name in job.entities:
            self._count(job, self.tables[entity_key(name)], part[name][at])
        if "item" in part:
            self._count(job, self.liked, part["item"][at[part["label"][at] == 1]])
        for feature in job.row_fields:
            values = taken(part[f"field {feature.name}"], at)
            if feature.entity == "context":
                self.empty[feature.name] += len(at) - int(has_value(values).sum())
            if feature.entity != "context":
                n = len(self.tables[entity_key(feature.entity)])
                hashes = partitions.hashes(feature.table_name) if feature.has_vocabulary else None
                words = seeded(words_of(values, hashes), words_seed)
                times = part["time"][at] if "time" in part else np.zeros(len(at), np.int64)
                found = EntityValues.from_rows(part[feature.entity][at], times, words, values, n)
                if (before := self.of_entities.get(feature.name)) is not None:
                    found = EntityValues.merged([before, found], n)
                self.of_entities[feature.name] = found
            elif feature.kind == "numeric":
                assert not isinstance(values, Jagged)
                self.numeric[feature.name].add(values.astype(np.float64, copy=False))
            elif feature.has_vocabulary:
                flat = values.values if isinstance(values, Jagged) else values.astype(np.int32)
                self._count(job, self.tables[feature.table_name], flat)
        self.rows[p] = np.bincount(parts, minlength=len(SPLITS))
        self.positives[p] = np.bincount(parts[part["label"] == 1], minlength=len(SPLITS))
        if "weight" in part:
            self.weights.add(part["weight"][at].astype(np.float64))
        self.repeated += part.repeated
        self.low += 0 if part.low is None else len(part.low)

    @staticmethod
    def _count(job: Job, table: Int64Array, codes: Int32Array) -> None:
        with job.crew.lock:
            count_into(table, codes)

    @property
    def mean_weight(self) -> float:
        """Of the training rows."""
        return self.weights.mean if self.weights.n else 1.0

    def combined(self, job: Job) -> "Counts":
        """What all ranks counted. All threads."""
        crew, entity_of = job.crew, {f.name: f.entity for f in job.row_fields}
        others = (self.weights, self.numeric, self.of_entities, self.repeated, self.low, self.empty)
        weights, numeric, of_entities, repeated, low, empty = zip(*crew.gather(others), strict=True)
        names = list(dict.fromkeys(name for from_thread in of_entities for name in from_thread))
        return Counts(
            self.tables,
            self.liked,
            {n: sum((f[n] for f in numeric[1:]), numeric[0][n]) for n in self.numeric},
            {
                name: EntityValues.merged(
                    [from_thread[name] for from_thread in of_entities if name in from_thread],
                    len(self.tables[entity_key(entity_of[name])]),
                )
                for name in names
            },
            crew.add_up(self.rows),
            crew.add_up(self.positives),
            sum(weights[1:], weights[0]),
            sum(repeated),
            sum(low),
            sum(empty, Counter()),
        )


def split_and_count(job: Job, partitions: Partitions) -> Counts:
    """Splits all rows before anything is fitted, and counts training rows. All threads.

    Each partition's rows get ``[n]`` int8, kept as ``parts``, and those that are only seen, as
    ``low parts``: they go where a positive of their time, or of their share, would go.

    Raises:
        DataError: no row is left for training.
    """
    split = job.data.split
    per_user = job.data.negatives.fixed_per_user or 0
    timed = split.method in ("temporal", "leave_last")

    def keyed(part: PartitionRows) -> SortKeys:
        """What the rows that are still open are ordered by: a hash, or the time."""
        at = np.flatnonzero(part["given"] == OPEN)
        if split.method == "temporal":
            return part["time"][at], part["key"][at]
        return (part["time" if timed else "key"][at],)

    def all_keyed() -> Iterator[SortKeys]:
        for p in job.own_partitions:
            yield tuple(partitions.load_array(p, f"split key {k}") for k in range(n_keys))

    bounds, n_keys = None, 2 if timed else 1
    if split.method in ("random", "temporal") and not job.data.refit:
        for p in job.own_partitions:
            for k, keys in enumerate(keyed(partitions.load(p))):
                partitions.save_array(p, f"split key {k}", keys)
        n = int(job.crew.add_up(np.array([sum(len(keys[0]) for keys in all_keyed())]))[0])
        if n:
            bounds = split_bounds(split, n, all_keyed, job.crew.add_up, n_keys)

    def parts_of(part: PartitionRows, p: int, positives: PartitionRows | None = None) -> SplitIds:
        """Where rows go; those that are only seen, as their users' positives say."""
        parts = part["given"].copy()
        at = np.flatnonzero(parts == OPEN)
        if job.data.refit:
            parts[:] = TRAIN
        elif len(at) and bounds is not None:
            parts[at] = split_at_bounds(keyed(part), bounds)
        elif len(at) and split.method == "leave_last" and positives is not None:
            held_out = partitions.load_array(p, "parts"), positives["local"], positives["time"]
            n_users = len(partitions.users(p))
            parts[at] = splits_by_time(*held_out, part["local"][at], part["time"][at], n_users)
        elif len(at):
            parts[at] = split_by_user(
                split, part["local"][at], len(partitions.users(p)), keyed(part)[0]
            )
        return parts

    counts = Counts.zeros(job, partitions)
    tied_users = held_out_users = 0
    for p in job.own_partitions:
        part = partitions.load(p)
        parts = parts_of(part, p)
        partitions.save_array(p, "parts", parts)
        if part.low is not None:
            partitions.save_array(p, "low parts", parts_of(part.low, p, part))
        if split.method == "leave_last":
            is_open = part["given"] == OPEN
            tied, held_out = count_tied_users(
                parts[is_open], part["local"][is_open], part["time"][is_open]
            )
            tied_users, held_out_users = tied_users + tied, held_out_users + held_out
        counts.add(job, partitions, p, part, parts)
        rule, per = job.data.repeated, f"negatives.fixed_per_user={per_user}"
        job.note(f"(user, item) pairs whose rows are equal by repeated={rule}", part.tied)
        job.note(f"users with fewer than {per} unseen items", part.short)
    counts = counts.combined(job)
    _note_ties(job, tied_users, held_out_users, bounds, all_keyed)
    if job.crew.is_first:
        job.drop("repeated (user, item) rows", counts.repeated)
        for feature in job.row_fields:
            n_train = int(counts.rows[:, TRAIN].sum())
            report_empty(feature, counts.empty[feature.name], n_train, "training rows")
        least = job.data.interactions.min_rating or 0
        job.drop(f"rows rated below {least:g}, kept as seen", counts.low)
    n_rows, file = int(counts.rows.sum()), label_of(job.data.interactions.file)
    if counts.rows[:, TRAIN].sum() == 0:
        raise DataError(
            f"{file}: the split leaves no training rows of {n_rows:,} ({counts.repeated:,} "
            f"repeated ones are dropped); hold out fewer"
        )
    return counts


def _note_ties(
    job: Job,
    tied_users: int,
    held_out_users: int,
    bounds: tuple[Bound, Bound] | None,
    all_keyed: Callable[[], Iterable[SortKeys]],
) -> None:
    """Counts what equal times left to the hash of the rows' cells. All threads."""
    if job.data.split.method == "leave_last":
        tied_users, held_out_users = job.crew.add_up(np.array([tied_users, held_out_users]))
        if tied_users and job.crew.is_first:
            share = f"{tied_users / held_out_users:.1%}"
            job.note(f"users ({share}) whose held-out rows have a training row's time", tied_users)
    elif job.data.split.method == "temporal" and bounds is not None:
        for part, bound in zip((VALID, TEST), bounds, strict=True):
            if part == VALID and bound == bounds[1]:  # nothing is held out for it
                continue
            at_bound = [keyed[0] == bound[0] for keyed in all_keyed()]
            below = [
                same & (split_at_bounds(keyed, bounds) < part)
                for same, keyed in zip(at_bound, all_keyed(), strict=True)
            ]
            n, n_below = (sum(int(rows.sum()) for rows in pieces) for pieces in (at_bound, below))
            n, n_below = job.crew.add_up(np.array([n, n_below]))
            if n_below and job.crew.is_first:
                job.note(f"rows at the time where {SPLITS[part]} begins, on both sides", int(n))
