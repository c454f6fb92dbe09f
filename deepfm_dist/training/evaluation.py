"""Row metrics of the sharded model on held-out rows."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import ABSENT, Collator, padded
from deepfm_dist.data.batches.held_out import SplitReader
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.fields import upper_bits
from deepfm_dist.data.jagged import Int64Array, Jagged, Values
from deepfm_dist.data.schema import OUT_OF_VOCABULARY
from deepfm_dist.distributed.inference import probabilities, score_rows
from deepfm_dist.distributed.world import World
from deepfm_dist.training.metrics import (
    AreaUnderCurve,
    Calibration,
    FloatArray,
    Tally,
    calibration_curve,
    figures_of,
    mean_auc,
    row_sums,
    with_means,
)

BLOCK_ROWS = 8192
RANKED_ROWS = 1 << 21
"""Maximum number of scored rows that rank 0 sorts at a time."""
_RECORD = np.dtype(
    [("logit", "f4"), ("label", "f4"), ("weight", "f4"), ("user", "i4"), ("item", "i4")]
)
"""A scored row whose label is known."""
_BINS = 1 << 16
_Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Unknown:
    """Counts of held-out rows whose users, items or values have no own embedding.

    Attributes:
        n: number of rows counted: the positives if negatives are sampled (from known items),
            otherwise all rows.
        rows: by "user", "item" and context field, the number of rows without a known value: it is
            missing from training, below ``min_count``, or empty. Cold items with known attributes
            are not counted.
    """

    n: int
    rows: dict[str, int]


@dataclass(frozen=True)
class ScoredRows:
    """Held-out rows with a model's scores.

    Attributes:
        logits: ``[B]`` float64.
        labels: ``[B]`` float64.
        weights: ``[B]`` float64.
    """

    logits: npt.NDArray[np.float64]
    labels: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A model's figures on held-out rows.

    Attributes:
        figures: auc, user_auc if rows have users, and `figures_of`; for several targets, as in
            `metrics.with_means`.
        calibrations: predicted against observed probabilities, by target; the key of a single
            target is "".
        unknown: counts of values that training rows do not have.
    """

    figures: dict[str, float]
    calibrations: dict[str, Calibration]
    unknown: Unknown


class RowEvaluator:
    """Scores the labelled rows of a split; can be used repeatedly.

    Rows are read from disk when needed and written back with their scores, so memory use does not
    grow with the number of rows.

    Args:
        dataset: the prepared dataset.
        split: valid or test.
        target_weights: weights of several targets in their combined figures; default: equal.
    """

    def __init__(
        self, dataset: PreparedDataset, split: str, target_weights: Sequence[float] = ()
    ) -> None:
        targets = dataset.manifest.targets
        self._weights = dict(zip(targets, target_weights or [1.0] * len(targets), strict=True))
        self._reader = SplitReader(dataset, split)
        self._collate = Collator(dataset)
        self._n_users = dataset.manifest.entities.get("user", 0)
        self._n_items = dataset.manifest.entities.get("item", 0)
        self._has_cold_items = dataset.manifest.cold.get("item", 0) > 0
        self._only_positives = dataset.manifest.data.task == "implicit"
        context_fields = (f for f in dataset.manifest.categorical if f.entity == "context")
        self._fields = [f.name for f in context_fields if f.has_vocabulary]
        self._fields = [*dataset.manifest.entities, *self._fields]

    def metrics(self, model: nn.Module, world: World) -> Mapping[str, float]:
        """The figures of `measured`, on rank 0; empty elsewhere. All ranks."""
        measured = self.measure(model, world)
        return {} if measured is None else measured.figures

    def measure(self, model: nn.Module, world: World) -> Measured | None:
        """Scores all rows, and measures them on rank 0; None elsewhere. All ranks.

        Args:
            model: the sharded task in eval mode.
            world: the ranks.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in self._weights or "1"]
            # By block, and in the order of blocks: the same at any world size.
            sums: list[list[FloatArray]] = [[] for _ in files]
            unknown = np.zeros(1 + len(self._fields), np.int64)
            for block, logits in self._scored_blocks(model, world):
                assert block.labels is not None
                unknown += self._count_unknown(block)
                by_target = zip(_columns(logits), _columns(block.labels), strict=True)
                for target, (logits_B, labels_B) in enumerate(by_target):
                    known = labels_B >= 0
                    scored = _records_of(block, logits_B, labels_B)[known]
                    weights = None if block.weights is None else scored["weight"]
                    sums[target].append(row_sums(scored["label"], scored["logit"], weights))
                    files[target].write(scored.tobytes())
            results = [self._measure_records(_mapped(file), world) for file in files]
        world.sum(torch.from_numpy(unknown))
        gathered = world.gather_object(sums)
        if gathered is None:
            return None
        n, *rows = unknown.tolist()
        unknown_rows = dict(zip(self._fields, rows, strict=True))
        by_name: dict[str, dict[str, float]] = {}
        for target, name in enumerate(self._weights or [""]):
            total = np.sum([s for from_rank in gathered for s in from_rank[target]], axis=0)
            by_name[name] = results[target][0] | figures_of(total)
        curves = dict(zip(by_name, (calibration_curve(bins) for _, bins in results), strict=True))
        figures = with_means(by_name, self._weights) if self._weights else by_name[""]
        return Measured(figures, curves, Unknown(n, unknown_rows))

    def _measure_records(
        self, records: _Records, world: World
    ) -> tuple[dict[str, float], FloatArray]:
        """AUC over all rows, per user and for cold items, and calibration; on rank 0. All ranks."""
        area, bins = _auc(records, world)
        figures = {"auc": area}
        if self._n_users:
            figures["user_auc"] = _user_auc(records, self._n_users, world)
        if self._has_cold_items and not self._only_positives:
            figures |= self._auc_apart(records, world)
        return figures, bins

    def scored_rows(self, model: nn.Module, world: World) -> ScoredRows | None:
        """Scores all rows, and returns them on rank 0, in order; None elsewhere. All ranks.

        Args:
            model: the sharded task in eval mode.
            world: the ranks.
        """
        blocks = [np.zeros((3, 0))]
        for block, logits in self._scored_blocks(model, world):
            assert block.labels is not None
            weights = np.ones(block.n) if block.weights is None else block.weights
            blocks.append(np.stack([logits, block.labels, weights]).astype(np.float64))
        gathered = world.gather_object(np.concatenate(blocks, 1))
        return None if gathered is None else ScoredRows(*np.concatenate(gathered, 1))

    def _scored_blocks(
        self, model: nn.Module, world: World
    ) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        """This rank's rows and their logits, block by block; rank 0 has the first rows."""
        block = self._reader.read(0, 0)

        def collate(begin: int, end: int) -> Batch:
            nonlocal block
            block = self._reader.read(begin, end)
            return collate_rows(self._collate, block, 0, block.n, BLOCK_ROWS)

        for _, logits in score_rows(model, world, self._reader.n, BLOCK_ROWS, collate):
            yield block, logits

    def _auc_apart(self, records: _Records, world: World) -> dict[str, float]:
        """AUC of the rows whose items have training rows, and of those whose items have none.

        On rank 0; a part without rows has no figure. All ranks.
        """
        first_cold = self._n_items
        parts: dict[str, Callable[[_Records], npt.NDArray[np.bool_]]] = {
            "auc_warm": lambda rows: (rows["item"] > 0) & (rows["item"] < first_cold),
            "auc_cold": lambda rows: np.asarray(rows["item"] >= first_cold),
        }
        figures = {}
        for name, is_of_part in parts.items():
            area, bins = _auc(records, world, is_of_part)
            if bins[0].any():
                figures[name] = area
        return figures

    def _count_unknown(self, block: Rows) -> Int64Array:
        """``[1 + fields]`` int64: counted rows, then by field those without a known value."""
        counts = np.ones(block.n, bool)
        if self._only_positives:
            assert block.labels is not None
            counts = block.labels > 0.5
        values = {"user": block.users, "item": block.items} | dict(block.context)
        rows = [counts, *(counts & _has_no_known_value(values[name]) for name in self._fields)]
        return np.array([unknown.sum() for unknown in rows], np.int64)


def _columns(values: FloatArray) -> list[FloatArray]:
    """``[B]`` or ``[B, T]`` by target."""
    return [values] if values.ndim == 1 else list(values.T)


def _records_of(rows: Rows, logits: FloatArray, labels: FloatArray) -> _Records:
    """Rows with their scores and labels, ``[B]`` each."""
    scored = np.ones(len(logits), _RECORD)
    scored["logit"], scored["label"] = logits, labels
    for name, column in (("weight", rows.weights), ("user", rows.users), ("item", rows.items)):
        if column is not None:
            scored[name] = column
    return scored


def _mapped(file: IO[bytes]) -> _Records:
    """The records that a file holds."""
    file.flush()
    n = file.tell() // _RECORD.itemsize
    return np.memmap(file, _RECORD, "r", shape=n) if n else np.zeros(0, _RECORD)


def _has_no_known_value(column: Values | None) -> npt.NDArray[np.bool_]:
    """``[n]`` bool: whether the value is unknown, that is, row 0 of its table."""
    assert column is not None
    if not isinstance(column, Jagged):
        return np.asarray(column == OUT_OF_VOCABULARY)
    owner = np.repeat(np.arange(len(column)), column.lengths)
    known = np.bincount(owner[column.values != OUT_OF_VOCABULARY], minlength=len(column))
    return np.asarray(known == 0)


def _all(rows: _Records) -> npt.NDArray[np.bool_]:
    return np.ones(len(rows), bool)


def _known_users(rows: _Records) -> npt.NDArray[np.bool_]:
    return np.asarray(rows["user"] != OUT_OF_VOCABULARY)


def _auc(
    records: _Records,
    world: World,
    counts: Callable[[_Records], npt.NDArray[np.bool_]] = _all,
) -> tuple[float, FloatArray]:
    """Area under the ROC curve over all ranks' rows, on rank 0, a range of scores at a time.

    Args:
        records: this rank's.
        world: the ranks.
        counts: selects the rows that count.

    Returns:
        It, NaN where all labels are the same, and what `metrics.calibration_curve` takes.
    """
    area, bins = AreaUnderCurve(), np.zeros((3, _BINS))
    for tally in _tallies(records, world, lambda rows: upper_bits(rows["logit"]), False, counts):
        area.add(tally)
        weight = tally.positive + tally.negative
        predicted = weight * probabilities(tally.scores)
        at = upper_bits(tally.scores)
        bins += [np.bincount(at, w, _BINS) for w in (weight, predicted, tally.positive)]
    return area.value, bins


def _user_auc(records: _Records, n_users: int, world: World) -> float:
    """Mean AUC of known users, weighted by rows, on rank 0, a range of users at a time."""
    height = -(-n_users // _BINS)
    total = weight = 0.0
    for tally in _tallies(records, world, lambda rows: rows["user"] // height, True, _known_users):
        user_auc, their_weight = mean_auc(tally)
        total, weight = total + user_auc, weight + their_weight
    return total / weight if weight else float("nan")


def _tallies(
    records: _Records,
    world: World,
    bins_of: Callable[[_Records], npt.NDArray[np.integer]],
    by_user: bool,
    is_counted: Callable[[_Records], npt.NDArray[np.bool_]],
) -> Iterator[Tally]:
    """The tally of all ranks' rows, a range of bins at a time; empty off rank 0. All ranks."""
    counts = np.zeros(_BINS, np.int64)
    for rows in _chunks(records):
        counts += np.bincount(bins_of(rows), minlength=_BINS)
    world.sum(torch.from_numpy(counts))
    below = np.r_[0, np.cumsum(counts)]
    low = 0
    while low < _BINS:  # as many bins as fit into that many rows, and at least one
        high = max(low + 1, int(np.searchsorted(below, below[low] + RANKED_ROWS, "right")) - 1)
        pieces = []
        for rows in _chunks(records):
            bins = bins_of(rows)
            inside = (low <= bins) & (bins < high) & is_counted(rows)
            rows = rows[inside]
            weight = rows["weight"].astype(np.float64)
            groups = rows["user"] if by_user else np.zeros(len(rows), np.int32)
            is_positive = rows["label"] > 0.5
            pieces.append(
                Tally.of(groups, rows["logit"], weight * is_positive, weight * ~is_positive)
            )
        gathered = world.gather_object(Tally.merge(pieces))
        yield Tally.merge(gathered or [Tally.of(*np.zeros((4, 0)))])
        low = high


def _chunks(records: _Records) -> Iterator[_Records]:
    for begin in range(0, max(1, len(records)), RANKED_ROWS):
        yield records[begin : begin + RANKED_ROWS]


def collate_rows(collate: Collator, rows: Rows, begin: int, end: int, height: int) -> Batch:
    """Rows ``begin`` to ``end`` as a batch of ``height``, padded with empty ones."""

    def piece(column: npt.NDArray[np.int32] | None) -> npt.NDArray[np.int32] | None:
        block: npt.NDArray[np.int32] | None = padded(
            None if column is None else column[begin:end], height, ABSENT
        )
        return block

    return collate(
        piece(rows.users),
        piece(rows.items),
        rows.context,
        padded(np.arange(begin, end), height, ABSENT),
        n_real=end - begin,
    )
