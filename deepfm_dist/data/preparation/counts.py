"""Where rows belong, and what training rows say: added up over partitions and ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deepfm_dist.data.crew import Crew
from deepfm_dist.data.fields import NumericFit
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    counted,
    grouped,
    joined,
    taken,
)
from deepfm_dist.data.preparation.job import OPEN, Job, of_entity
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.spill import Part
from deepfm_dist.data.split import (
    SPLITS,
    TRAIN,
    Keyed,
    Parts,
    bounds_of,
    split_at,
    split_by_user,
)
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import derive_seed, permute


@dataclass
class Firsts:
    """A field of users or items that stands in the rows: what the first training row says."""

    entity: Int32Array  # codes, each once
    row: Int64Array  # the row that says it
    values: Values

    @classmethod
    def merged(cls, pieces: Sequence["Firsts"]) -> "Firsts":
        """The first of each entity over all pieces."""
        entity = np.concatenate([p.entity for p in pieces])
        row = np.concatenate([p.row for p in pieces])
        order = np.lexsort((row, entity))
        keep = order[np.flatnonzero(np.diff(entity[order], prepend=-1))]
        return cls(entity[keep], row[keep], taken(joined([p.values for p in pieces]), keep))


@dataclass
class Counts:
    """What a rank's partitions add to the statistics.

    Attributes:
        tables: training rows by code, of each table that has a vocabulary.
        liked: training positives by item code.
        numeric: of each numeric field that stands in context.
        firsts: of each field of users and items that stands in the rows.
        rows: ``[partitions, splits]``; positives: the same.
        weight: ``[partitions]``: weight of the training rows.
        repeated: rows dropped because an earlier one has their user and item.
        full: rows dropped because their users have seen every item.
    """

    tables: dict[str, Int64Array]
    liked: Int64Array
    numeric: dict[str, NumericFit]
    firsts: dict[str, Firsts]
    rows: Int64Array
    positives: Int64Array
    weight: npt.NDArray[np.float64]
    repeated: int = 0
    full: int = 0

    @classmethod
    def none(cls, job: Job, partitions: Partitions) -> "Counts":
        """Nothing counted yet."""
        context = [f for f in job.row_fields if f.entity == "context"]
        return cls(
            tables={name: np.zeros(len(ids), np.int64) for name, ids in partitions.ids.items()},
            liked=np.zeros(len(partitions.ids.get(of_entity("item"), ())), np.int64),
            numeric={f.name: NumericFit(f) for f in context if f.kind == "numeric"},
            firsts={},
            rows=np.zeros((job.n_parts, len(SPLITS)), np.int64),
            positives=np.zeros((job.n_parts, len(SPLITS)), np.int64),
            weight=np.zeros(job.n_parts),
        )

    def add(self, job: Job, p: int, part: Part, parts: Parts) -> None:
        """Counts a partition in, whose rows go where ``parts`` says."""
        at = np.flatnonzero(parts == TRAIN)
        for name in job.entities:
            table = self.tables[of_entity(name)]
            table += counted(part[name][at], len(table))
        if "item" in part:
            self.liked += counted(part["item"][at[part["label"][at] == 1]], len(self.liked))
        for feature in job.row_fields:
            values = taken(part[f"field {feature.name}"], at)
            if feature.entity != "context":
                codes = part[feature.entity][at]
                offsets, order = grouped(codes, len(self.tables[of_entity(feature.entity)]))
                there = np.flatnonzero(np.diff(offsets))
                first = order[offsets[there]]
                found = Firsts(there.astype(np.int32), part["row"][at[first]], taken(values, first))
                before = [self.firsts[feature.name]] if feature.name in self.firsts else []
                self.firsts[feature.name] = Firsts.merged([*before, found])
            elif feature.kind == "numeric":
                assert not isinstance(values, Jagged)
                self.numeric[feature.name].add(p, values.astype(np.float64, copy=False))
            elif feature.has_vocabulary:
                flat = values.values if isinstance(values, Jagged) else values.astype(np.int32)
                table = self.tables[feature.table_name]
                table += counted(flat, len(table))
        self.rows[p] = np.bincount(parts, minlength=len(SPLITS))
        self.positives[p] = np.bincount(parts[part["label"] == 1], minlength=len(SPLITS))
        self.weight[p] = part["weight"][at].sum(dtype=np.float64) if "weight" in part else len(at)
        self.repeated += part.repeated
        self.full += part.full

    @property
    def mean_weight(self) -> float:
        """Of the training rows."""
        return float(self.weight.sum() / self.rows[:, TRAIN].sum())

    def of_all(self, crew: Crew) -> "Counts":
        """What all ranks counted. All ranks."""
        others = (self.numeric, self.firsts, self.repeated, self.full)
        numeric, firsts, repeated, full = zip(*crew.gather(others), strict=True)
        return Counts(
            {name: crew.add_up(table) for name, table in self.tables.items()},
            crew.add_up(self.liked),
            {n: sum((f[n] for f in numeric[1:]), numeric[0][n]) for n in self.numeric},
            {n: Firsts.merged([f[n] for f in firsts if n in f]) for f in firsts for n in f},
            crew.add_up(self.rows),
            crew.add_up(self.positives),
            crew.add_up(self.weight),
            sum(repeated),
            sum(full),
        )


def split_and_count(job: Job, partitions: Partitions) -> Counts:
    """Says where each row belongs, before anything is fitted, and counts training rows. All ranks.

    Each partition's rows get ``[n]`` int8, kept as ``parts``.

    Raises:
        DataError: no row is left for training.
    """
    split = job.data.split
    per_user = job.data.negatives.fixed_per_user or 0
    n_shuffled = partitions.n_open
    n_shuffled += per_user * len(partitions.ids.get(of_entity("user"), ()))
    seed = derive_seed(job.seed, "split")

    def keyed(part: Part) -> Keyed:
        """What the rows that are still open are ordered by: a shuffle, or the time."""
        row = part["row"][part["given"] == OPEN]
        if split.method in ("random", "per_user"):
            return permute(row, n_shuffled, seed), row
        return part["time"][part["given"] == OPEN], row

    def all_keyed() -> Iterator[Keyed]:
        for p in job.mine:
            yield partitions.kept(p, "keys"), partitions.kept(p, "row")

    bounds = None
    if split.method in ("random", "temporal") and partitions.n_open and not job.data.refit:
        for p in job.mine:
            keys, rows = keyed(partitions.load(p))
            partitions.keep(p, "keys", keys)
            partitions.keep(p, "row", rows)
        n = int(job.crew.add_up(np.array([sum(len(k) for k, _ in all_keyed())]))[0])
        bounds = bounds_of(split, n, all_keyed, job.crew.add_up)
    counts = Counts.none(job, partitions)
    for p in job.mine:
        part = partitions.load(p)
        parts = part["given"].copy()
        if job.data.refit:
            parts[:] = TRAIN
        elif len(at := np.flatnonzero(parts == OPEN)):
            if bounds is not None:
                where = partitions.kept(p, "keys"), partitions.kept(p, "row")
                parts[at] = split_at(where, bounds)
            else:
                n_users = len(partitions.users(p))
                parts[at] = split_by_user(split, part["local"][at], n_users, keyed(part)[0])
        partitions.keep(p, "parts", parts)
        counts.add(job, p, part, parts)
    counts = counts.of_all(job.crew)
    if job.crew.is_first:
        job.drop("repeated (user, item) rows", counts.repeated)
        job.drop("rows of users who have seen every item", counts.full)
    n_rows, file = int(counts.rows.sum()), job.data.interactions.file
    if n_rows == 0:
        raise DataError(
            f"{file}: no row is left: {counts.full:,} are of users who have seen every item, for "
            f"whom no negative exists; add items, or leave these users out"
        )
    if counts.rows[:, TRAIN].sum() == 0:
        raise DataError(
            f"{file}: the split leaves no training rows of {n_rows:,} ({counts.repeated:,} "
            f"repeated ones and {counts.full:,} of users who have seen every item are dropped); "
            f"hold out fewer"
        )
    return counts
