"""Checks how many held-out rows have users and items without training rows."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from deepfm_dist.data.jagged import Int32Array, Int64Array
from deepfm_dist.data.manifest import SPLITS, TEST, VALID
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import SplitIds
from deepfm_dist.data.schema import label_of
from deepfm_dist.data.spelling import difference
from deepfm_dist.errors import DataError

log = logging.getLogger(__name__)
_MOST_UNKNOWN = 10_000


@dataclass
class HeldOutIdCheck:
    """Counts held-out rows whose users and items have training rows.

    Attributes:
        rows: ``[splits, entities, 2]``: rows with known ones, and all rows.
        unknown: by split and entity, ascending codes of some unknown ones.
    """

    rows: Int64Array
    unknown: dict[tuple[int, str], Int32Array]

    @classmethod
    def zeros(cls, job: Job) -> "HeldOutIdCheck":
        """Empty counts."""
        entities = {name: np.zeros(0, np.int32) for name in job.entities}
        unknown = {(s, name): codes for s in (VALID, TEST) for name, codes in entities.items()}
        return cls(np.zeros((len(SPLITS), len(entities), 2), np.int64), unknown)

    def add(
        self, trained: Mapping[str, npt.NDArray[np.bool_]], part: PartitionRows, parts: SplitIds
    ) -> None:
        """Adds a partition with its rows' splits ``parts``; see `WritePlan.trained`."""
        for split in (VALID, TEST):
            at = np.flatnonzero(parts == split)
            for place, (name, has_rows) in enumerate(trained.items()):
                codes = part[name][at]
                known = has_rows[codes]
                self.rows[split, place] += known.sum(), len(known)
                self.unknown[split, name] = _some_of(self.unknown[split, name], codes[~known])

    def __add__(self, other: "HeldOutIdCheck") -> "HeldOutIdCheck":
        unknown = {key: _some_of(codes, other.unknown[key]) for key, codes in self.unknown.items()}
        return HeldOutIdCheck(self.rows + other.rows, unknown)

    def check(
        self, job: Job, trained: Mapping[str, npt.NDArray[np.bool_]], ids: Mapping[str, pa.Array]
    ) -> None:
        """Warns if few or no held-out rows have users and items with training rows.

        Args:
            job: the preparation.
            trained: see `WritePlan.trained`.
            ids: texts of the users and items by code.

        Raises:
            DataError: no row has, in a split given by a file or column.
        """
        for split in (VALID, TEST):
            file = getattr(job.data.split, f"{SPLITS[split]}_file")
            given = file or job.data.interactions.split
            where = label_of(file) if file else f"the {SPLITS[split]} split"
            texts = []
            for (n_known, n), name in zip(self.rows[split].tolist(), job.entities, strict=True):
                if 2 * n_known >= n:
                    continue
                unknown = ids[entity_key(name)].take(pa.array(self.unknown[split, name]))
                known = ids[entity_key(name)].filter(pa.array(trained[name]))
                how = difference(unknown, known)
                texts.append(
                    f"{n_known:,} of {n:,} rows have {'a user' if name == 'user' else 'an item'} "
                    f"of the training rows: "
                    + (
                        f"of the other {name}s, {how}"
                        if how
                        else f"{unknown[0].as_py()!r} is not among them, {known[0].as_py()!r} is"
                    )
                )
                if n_known == 0 and how is not None and given:
                    raise DataError(f"{where}: {texts[-1]}; write the ids the same way")
            none_is_known = not self.rows[split, :, 0].any()
            if texts and len(texts) == len(job.entities) and none_is_known and given:
                raise DataError(f"{where}: {'; '.join(texts)}; are these rows of the same log?")
            if texts:
                log.warning("%s", f"{where}: {'; '.join(texts)}")


def _some_of(codes: Int32Array, others: Int32Array) -> Int32Array:
    return np.unique(np.concatenate([codes, others]))[:_MOST_UNKNOWN]
