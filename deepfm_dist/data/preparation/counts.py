"""Assigns rows to splits and gathers statistics of training rows over all partitions."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
from deepfm_dist.data.manifest import FOLD_IN, SPLITS, TEST, TRAIN, VALID
from deepfm_dist.data.moments import Moments
from deepfm_dist.data.preparation.job import OPEN, Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.population import drop_rare, hold_out_users, holds_out_users
from deepfm_dist.data.preparation.rules import latest_rows, words_of
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import (
    DIGITS,
    Bound,
    Digit,
    SortKeys,
    SplitIds,
    count_tied_users,
    split_at_bounds,
    split_bounds,
    split_by_user,
    splits_by_time,
)
from deepfm_dist.data.schema import Feature, label_of
from deepfm_dist.data.times import USUAL
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
_DAY_S = 86_400
NEARLY_ALL = 0.95
"""A field with this share of empty rows, users or items triggers a warning."""


@dataclass
class EntityValues:
    """A user or item field stored in the rows: the value in the latest training row.

    Attributes:
        entity: ``[m]`` distinct codes.
        time: ``[m]`` of their rows; 0 if no times are read.
        word: ``[m]`` seeded hashes of the values, the smallest of which decides between equal
            times.
        values: ``[m]``.
        differ: ``[m]`` whether rows of the same user or item have different values.
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
        """The values of ``n`` users or items from their rows."""
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
        latest = cls.from_rows(
            entity,
            np.concatenate([p.time for p in pieces]),
            np.concatenate([p.word for p in pieces]),
            joined([p.values for p in pieces]),
            n,
        )
        differ = np.zeros(n, bool)
        differ[entity[np.concatenate([p.differ for p in pieces])]] = True
        latest.differ |= differ[latest.entity]
        return latest


def has_value(values: Values) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: raw values of a field that are not missing."""
    if isinstance(values, Jagged):
        return np.asarray(values.lengths > 0)
    if values.ndim == 2:  # NaN in the whole row
        return np.asarray(~np.isnan(values[:, 0]))
    return np.asarray(~np.isnan(values) if values.dtype.kind == "f" else values >= 0)


def report_empty(feature: Feature, n_empty: int, n: int, rows: str) -> None:
    """Logs how many of ``n`` rows, users or items have no value in a field."""
    if n_empty and feature.kind == "vector":
        log.warning(
            "%s: %s of %s %s have no vector; the model gets zeros",
            feature.name,
            f"{n_empty:,}",
            f"{n:,}",
            rows,
        )
    elif n_empty:
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


@dataclass(frozen=True)
class Splitter:
    """Assigns the rows of a partition to splits, before anything is fitted.

    Attributes:
        job: the preparation.
        bounds: keys of the first held-out rows, if `has_bounds`.
    """

    job: Job
    bounds: tuple[Bound, Bound] | None = None

    @property
    def has_bounds(self) -> bool:
        """Whether the split divides all rows at two keys, rather than each user's rows."""
        return self.job.data.split.method in ("random", "temporal") and not self.job.data.refit

    @property
    def n_keys(self) -> int:
        """Number of sort keys."""
        return 2 if self.job.data.split.method == "temporal" else 1

    def keyed(self, part: PartitionRows) -> SortKeys:
        """The sort keys of rows without a given split: a hash, or the time."""
        method, at = self.job.data.split.method, np.flatnonzero(part["given"] == OPEN)
        if method == "temporal":
            return part["time"][at], part["key"][at]
        return (part["time" if method == "leave_last" else "key"][at],)

    def with_bounds(self, n: int, count: Callable[[Digit], Int64Array]) -> "Splitter":
        """The same with the bounds of all rows.

        Args:
            n: number of such rows in all partitions.
            count: sums `Digit.counts` over `keyed` of all partitions.
        """
        if not (self.has_bounds and n):
            return self
        once = cache(count)  # both bounds share the first digit
        return replace(self, bounds=split_bounds(self.job.data.split, n, once, self.n_keys))

    def parts(self, part: PartitionRows) -> SplitIds:
        """``[n]`` int8 splits of rows."""
        return self._parts(part, len(part.users))

    def low_parts(self, part: PartitionRows, parts: SplitIds) -> SplitIds | None:
        """Splits of rows that only count as seen: those of a positive with the same time or key.

        Args:
            part: the rows.
            parts: splits of the other rows.
        """
        if part.low is None:
            return None
        return self._parts(part.low, len(part.users), (parts, part))

    def _parts(
        self,
        part: PartitionRows,
        n_users: int,
        positives: tuple[SplitIds, PartitionRows] | None = None,
    ) -> SplitIds:
        split, parts = self.job.data.split, part["given"].copy()
        at = np.flatnonzero(parts == OPEN)
        if self.job.data.refit:
            parts[:] = TRAIN
        elif len(at) and self.bounds is not None:
            parts[at] = split_at_bounds(self.keyed(part), self.bounds)
        elif len(at) and split.method == "leave_last" and positives is not None:
            held_out, rows = positives
            known = held_out, rows["local"], rows["time"]
            parts[at] = splits_by_time(*known, part["local"][at], part["time"][at], n_users)
        elif len(at):
            parts[at] = split_by_user(split, part["local"][at], n_users, self.keyed(part)[0])
        return parts

    def ties(self, part: PartitionRows, parts: SplitIds) -> Int64Array:
        """``[2, 2]``: counts of splits decided by a hash because times are equal.

        Under ``leave_last``: users whose held-out rows tie with rows of an earlier split, and all
        users with held-out rows. Under ``temporal``, for valid and for test: rows at the bound's
        time, and those of them in an earlier split.
        """
        ties = np.zeros((2, 2), np.int64)
        is_open = part["given"] == OPEN
        if self.job.data.split.method == "leave_last":
            ties[0] = count_tied_users(
                parts[is_open], part["local"][is_open], part["time"][is_open]
            )
        elif self.job.data.split.method == "temporal" and self.bounds is not None:
            times, of_open = part["time"][is_open], parts[is_open]
            for held_out, bound in zip((VALID, TEST), self.bounds, strict=True):
                same = times == bound[0]
                ties[held_out - 1] = same.sum(), (same & (of_open < held_out)).sum()
        return ties

    def note_ties(self, ties: Int64Array) -> None:
        """Adds the `ties` of all partitions to the job's notes."""
        if self.job.data.split.method == "leave_last":
            tied_users, held_out_users = ties[0].tolist()
            if tied_users:
                share = f"{tied_users / held_out_users:.1%}"
                self.job.note(
                    f"users ({share}) whose held-out rows have a training row's time", tied_users
                )
        elif self.bounds is not None:
            for held_out, bound in zip((VALID, TEST), self.bounds, strict=True):
                if held_out == VALID and bound == self.bounds[1]:  # nothing is held out for it
                    continue
                n, n_below = ties[held_out - 1].tolist()
                if n_below:
                    name = SPLITS[held_out]
                    self.job.note(f"rows at the time where {name} begins, on both sides", n)


@dataclass
class Counts:
    """Statistics accumulated over partitions, by a thread or a cluster task.

    Attributes:
        tables: training rows by code, of each table that has a vocabulary; threads share them.
        liked: training positives by item code; threads share them.
        numeric: figures of each numeric context field.
        of_entities: figures of each field of users and items stored in the rows.
        rows: ``[partitions, splits]``;
        positives: the same.
        weights: the weights of the training rows, where they are known.
        ties: see `Splitter.ties`.
        repeated: rows dropped because another one has their user and item.
        low: rows that only count as seen.
        empty: training rows without a value, by context field.
        days: number of dated rows of all splits, by day since 1970 (UTC).
    """

    tables: dict[str, Int64Array]
    liked: Int64Array
    numeric: dict[str, NumericFit]
    of_entities: dict[str, EntityValues]
    rows: Int64Array
    positives: Int64Array
    weights: Moments
    ties: Int64Array
    repeated: int = 0
    low: int = 0
    empty: Counter[str] = field(default_factory=Counter)
    days: Counter[int] = field(default_factory=Counter)

    @classmethod
    def zeros(cls, job: Job, tables: dict[str, Int64Array], liked: Int64Array) -> "Counts":
        """Empty counts on top of given tables; see `no_tables`."""
        context = [f for f in job.row_fields if f.entity == "context"]
        return cls(
            tables=tables,
            liked=liked,
            numeric={f.name: NumericFit(f) for f in context if f.kind == "numeric"},
            of_entities={},
            rows=np.zeros((job.n_partitions, len(SPLITS)), np.int64),
            positives=np.zeros((job.n_partitions, len(SPLITS)), np.int64),
            weights=Moments(),
            ties=np.zeros((2, 2), np.int64),
        )

    def add(
        self, splitter: Splitter, hashes: Callable[[str], Hashes], p: int, part: PartitionRows
    ) -> SplitIds:
        """Adds a partition.

        Args:
            splitter: assigns its rows.
            hashes: the hashes of the texts of a vocabulary, see `Partitions.hashes`.
            p: its number.
            part: its rows.

        Returns:
            The splits of its rows.
        """
        job, parts = splitter.job, splitter.parts(part)
        words_seed = derive_seed(job.seed, "values")
        at = np.flatnonzero(parts == TRAIN)
        # Held-out users that are partly known have a row in the user table, too.
        of_users = np.flatnonzero((parts == TRAIN) | (parts == FOLD_IN))
        for name in job.entities:
            rows = of_users if name == "user" else at
            self._count(job, self.tables[entity_key(name)], part[name][rows])
        if "item" in part:
            self._count(job, self.liked, part["item"][at[part["label"][at] == 1]])
        for feature in job.row_fields:
            rows = of_users if feature.entity == "user" else at
            values = taken(part[f"field {feature.name}"], rows)
            if feature.entity == "context":
                self.empty[feature.name] += len(at) - int(has_value(values).sum())
            if feature.entity != "context":
                n = len(self.tables[entity_key(feature.entity)])
                of_values = hashes(feature.table_name) if feature.has_vocabulary else None
                words = seeded(words_of(values, of_values), words_seed)
                times = part["time"][rows] if "time" in part else np.zeros(len(rows), np.int64)
                latest = EntityValues.from_rows(part[feature.entity][rows], times, words, values, n)
                if (before := self.of_entities.get(feature.name)) is not None:
                    latest = EntityValues.merged([before, latest], n)
                self.of_entities[feature.name] = latest
            elif feature.kind == "numeric":
                assert not isinstance(values, Jagged)
                self.numeric[feature.name].add(values.astype(np.float64, copy=False))
            elif feature.has_vocabulary:
                flat = values.values if isinstance(values, Jagged) else values.astype(np.int32)
                self._count(job, self.tables[feature.table_name], flat)
        n = len(SPLITS)
        self.rows[p] = np.bincount(parts, minlength=n)[:n]
        self.positives[p] = np.bincount(parts[part["label"] == 1], minlength=n)[:n]
        if "time" in part:
            self.days.update(rows_by_day(part["time"], part.time_scale))
        if "weight" in part:
            self.weights.add(part["weight"][at].astype(np.float64))
        self.ties += splitter.ties(part, parts)
        self.repeated += part.repeated
        self.low += 0 if part.low is None else len(part.low)
        rule, per = job.data.repeated, job.data.negatives.fixed_per_user
        job.note(f"(user, item) pairs whose rows are equal by repeated={rule}", part.tied)
        job.note(f"users with fewer than negatives.fixed_per_user={per} unseen items", part.short)
        return parts

    @staticmethod
    def _count(job: Job, table: Int64Array, codes: Int32Array) -> None:
        with job.crew.lock:
            count_into(table, codes)

    @property
    def mean_weight(self) -> float:
        """Mean weight of the training rows; 1 without weights."""
        return self.weights.mean if self.weights.n else 1.0

    @classmethod
    def joined(cls, job: Job, pieces: Sequence["Counts"]) -> "Counts":
        """Joins counts of all pieces; the tables are shared and taken from the first piece."""
        first, entity_of = pieces[0], {f.name: f.entity for f in job.row_fields}
        names = list(dict.fromkeys(name for piece in pieces for name in piece.of_entities))
        return cls(
            tables=first.tables,
            liked=first.liked,
            numeric={
                n: sum((p.numeric[n] for p in pieces[1:]), first.numeric[n]) for n in first.numeric
            },
            of_entities={
                name: EntityValues.merged(
                    [p.of_entities[name] for p in pieces if name in p.of_entities],
                    len(first.tables[entity_key(entity_of[name])]),
                )
                for name in names
            },
            rows=np.sum([p.rows for p in pieces], axis=0),
            positives=np.sum([p.positives for p in pieces], axis=0),
            weights=sum((p.weights for p in pieces[1:]), first.weights),
            ties=np.sum([p.ties for p in pieces], axis=0),
            repeated=sum(p.repeated for p in pieces),
            low=sum(p.low for p in pieces),
            empty=sum((p.empty for p in pieces), Counter()),
            days=sum((p.days for p in pieces), Counter()),
        )

    def report(self, splitter: Splitter) -> None:
        """Reports dropped rows and notes of all partitions.

        Raises:
            DataError: no row is left for training.
        """
        job = splitter.job
        splitter.note_ties(self.ties)
        job.drop("repeated (user, item) rows", self.repeated)
        n_train = int(self.rows[:, TRAIN].sum())
        for feature in job.row_fields:
            report_empty(feature, self.empty[feature.name], n_train, "training rows")
        least = job.data.interactions.min_rating or 0
        job.drop(f"rows rated below {least:g}, kept as seen", self.low)
        if n_train == 0:
            raise DataError(
                f"{label_of(job.data.interactions.file)}: the split leaves no training rows of "
                f"{int(self.rows.sum()):,} (repeated ones dropped: {self.repeated:,}); hold out "
                f"fewer"
            )


def rows_by_day(times: Int64Array, time_scale: int) -> dict[int, int]:
    """Number of times per day since 1970 (UTC); plain numbers are ignored."""
    first, last = (second // _DAY_S for second in USUAL)
    days = times // (_DAY_S * time_scale)
    counts = np.bincount(days[(days >= first) & (days <= last)] - first)
    there = np.flatnonzero(counts)
    return dict(zip((there + first).tolist(), counts[there].tolist(), strict=True))


def no_tables(job: Job, ids: Mapping[str, pa.Array]) -> tuple[dict[str, Int64Array], Int64Array]:
    """Zeros for every code: `Counts.tables` and `Counts.liked`.

    Args:
        job: the preparation.
        ids: texts of each vocabulary.
    """
    tables = {name: np.zeros(len(texts), np.int64) for name, texts in ids.items()}
    return tables, np.zeros(len(ids.get(entity_key("item"), ())), np.int64)


def split_and_count(job: Job, partitions: Partitions) -> Counts:
    """Assigns each row to a split, and counts training rows. All threads.

    The ``[n]`` int8 splits of each partition are saved as ``parts``, those of rows that only count
    as seen as ``low parts``.

    Raises:
        DataError: no row is left for training.
    """
    drop_rare(job, partitions)
    if holds_out_users(job):
        hold_out_users(job, partitions)
    splitter = Splitter(job)
    if splitter.has_bounds:
        n_open = 0
        for p in job.own_partitions:
            keyed = splitter.keyed(partitions.load(p))
            n_open += len(keyed[0])
            for k, keys in enumerate(keyed):
                partitions.save_array(p, f"split key {k}", keys)

        def count(digit: Digit) -> Int64Array:
            digit_counts = np.zeros(DIGITS, np.int64)
            for p in job.own_partitions:
                kept = (partitions.load_array(p, f"split key {k}") for k in range(splitter.n_keys))
                digit_counts += digit.counts(tuple(kept))
            return job.crew.add_up(digit_counts)

        n = int(job.crew.add_up(np.array([n_open]))[0])
        splitter = splitter.with_bounds(n, count)
    zeros = no_tables(job, partitions.ids) if job.crew.is_first else None
    counts = Counts.zeros(job, *job.crew.broadcast(zeros))
    for p in job.own_partitions:
        part = partitions.load(p)
        parts = counts.add(splitter, partitions.hashes, p, part)
        partitions.save_array(p, "parts", parts)
        if (low_parts := splitter.low_parts(part, parts)) is not None:
            partitions.save_array(p, "low parts", low_parts)
    gathered = job.crew.gather(counts)
    total: Counts = job.crew.broadcast(Counts.joined(job, gathered) if job.crew.is_first else None)
    if job.crew.is_first:
        total.report(splitter)
    job.crew.gather(None)  # raises if the first thread failed
    return total
