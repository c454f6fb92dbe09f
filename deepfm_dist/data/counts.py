"""What training rows say: added up over partitions and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deepfm_dist.data.fields import NumericFit
from deepfm_dist.data.jagged import Int32Array, Int64Array, Values, joined, taken


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
    """What a rank's partitions add to the statistics."""

    tables: dict[str, Int64Array]  # training rows by code, of each table that has a vocabulary
    liked: Int64Array  # training positives by item code
    numeric: dict[str, NumericFit]
    firsts: dict[str, Firsts]
    rows: dict[int, Int64Array] = field(default_factory=dict)  # by partition: of each split
    positives: dict[int, Int64Array] = field(default_factory=dict)
    repeated: int = 0
    full: int = 0


def summed(said: Sequence[Counts]) -> Counts:
    """What all ranks counted."""
    total = said[0]
    for more in said[1:]:
        total.tables = {name: total.tables[name] + more.tables[name] for name in total.tables}
        total.liked = total.liked + more.liked
        total.numeric = {name: total.numeric[name] + more.numeric[name] for name in total.numeric}
        for name in more.firsts:
            pieces = [c.firsts[name] for c in (total, more) if name in c.firsts]
            total.firsts[name] = Firsts.merged(pieces)
        total.rows |= more.rows
        total.positives |= more.positives
        total.repeated += more.repeated
        total.full += more.full
    return total
