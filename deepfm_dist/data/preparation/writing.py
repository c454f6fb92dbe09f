"""Writes train/, valid/ and test/ as table rows, vocabularies, and entity tables."""

import logging
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.codes import hash_texts
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    from_arrow,
    grouped,
    taken,
    to_arrow,
    union,
)
from deepfm_dist.data.layout import (
    GENERATION,
    HISTORY,
    LAST_DAY,
    NEGATIVE_USER,
    SEEN,
    signed_table,
)
from deepfm_dist.data.manifest import FOLD_IN, SPLITS, TRAIN, LabelSpec, SplitSpec
from deepfm_dist.data.negatives import draw_per_positive, users_short_of_negatives
from deepfm_dist.data.preparation.checksums import TableSum
from deepfm_dist.data.preparation.counts import Counts, has_value
from deepfm_dist.data.preparation.fitting import Fitter, PreviousDataset
from deepfm_dist.data.preparation.held_out_ids import HeldOutIdCheck
from deepfm_dist.data.preparation.histories import CARRIED, HistoryWriter
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.reading import side_table
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import SplitIds, sort_groups
from deepfm_dist.data.preparation.write_plan import WritePlan, draws_in_training
from deepfm_dist.data.schema import LABEL_OF, DataConfig, label_of
from deepfm_dist.data.sources import Column
from deepfm_dist.errors import DataError
from deepfm_dist.log import progress
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
HELD_OUT_GROUP_ROWS = 1 << 20
_MOST_GROUP_ROWS, _GROUP_BYTES = 1 << 20, 1 << 30
"""Rows per row group of an entity table, and approximate bytes in memory at a time."""


@dataclass
class WriteResult:
    """Counts of written rows, by a thread or a cluster task.

    Attributes:
        sums: the sums of every file of rows, by name.
        rows: ``[splits]``, including held-out negatives.
        sizes: ``[splits]`` bytes in memory, as needed for training.
        known: counts of held-out rows with known users and items.
        labelled: ``[splits, targets, 2]``: rows with each label 0 and 1; no targets, if the rows
            have one label or none.
    """

    sums: dict[str, TableSum]
    rows: Int64Array
    sizes: Int64Array
    known: "HeldOutIdCheck"
    labelled: Int64Array

    @classmethod
    def zeros(cls, job: Job) -> "WriteResult":
        """Empty counts."""
        zeros = np.zeros(len(SPLITS), np.int64)
        labelled = np.zeros((len(SPLITS), len(job.data.interactions.labels), 2), np.int64)
        return cls({}, zeros, zeros.copy(), HeldOutIdCheck.zeros(job), labelled)

    def __add__(self, other: "WriteResult") -> "WriteResult":
        return WriteResult(
            self.sums | other.sums,
            self.rows + other.rows,
            self.sizes + other.sizes,
            self.known + other.known,
            self.labelled + other.labelled,
        )

    def splits(self, counts: Counts, data: DataConfig) -> dict[str, SplitSpec]:
        """The splits for the manifest.

        Raises:
            DataError: no training row has one of several labels.
        """
        labels = data.interactions.labels
        for label, rows in zip(labels, self.labelled[TRAIN].sum(1), strict=True):
            if rows == 0:
                raise DataError(
                    f"interactions.labels: {label} is empty in all training rows "
                    f"({counts.rows[:, TRAIN].sum():,}); leave it out, or train on rows that have "
                    f"it (data.split)"
                )
        return {
            name: SplitSpec(
                rows=int(self.rows[s]),
                positives=int(counts.positives[:, s].sum()),
                size_bytes=int(self.sizes[s]),
                labels={
                    label: LabelSpec(rows=int(counted.sum()), positives=int(counted[1]))
                    for label, counted in zip(labels, self.labelled[s], strict=True)
                },
            )
            for s, name in enumerate(SPLITS)
        }


def write_rows(
    job: Job, partitions: Partitions, plan: WritePlan, histories: HistoryWriter
) -> WriteResult:
    """Writes the rows of all partitions. All threads.

    Raises:
        DataError: no held-out row has a known user or item.
    """
    if job.crew.is_first:
        for name in SPLITS:
            (job.folder / name).mkdir()
    job.crew.gather(None)
    writer = RowWriter(job, plan, histories)
    with progress(len(job.own_partitions), "write", "partition", job.crew.is_first) as bar:
        for p in job.own_partitions:
            part, parts = partitions.load(p), np.asarray(partitions.load_array(p, "parts"))
            low_parts = (
                None if part.low is None else np.asarray(partitions.load_array(p, "low parts"))
            )
            writer.add(p, part, parts, low_parts)
            bar.update()
    first, *others = job.crew.gather(writer.written)
    together: WriteResult = sum(others, first)
    if job.crew.is_first:
        together.known.check(job, plan.trained, partitions.ids)
    job.crew.gather(None)  # ends here if the first thread has failed
    return together


class PairSink(Protocol):
    """Receives users' items, like `HistoryWriter`."""

    def add(self, name: str, rows: npt.NDArray[np.integer], items: Int32Array) -> None:
        """Adds ``[m]`` pairs of a user row and an item."""


class RowWriter:
    """Writes the rows of partitions, one file per partition and split.

    Args:
        job: the preparation.
        plan: see `WritePlan`.
        histories: receives users' items.

    Attributes:
        written: counts of written rows.
    """

    def __init__(self, job: Job, plan: WritePlan, histories: PairSink) -> None:
        self._job, self._plan, self._fitted = job, plan, plan.fitted
        self._histories, self._cuts = histories, plan.cuts
        self._sampled = draws_in_training(job)
        self._unused = {"train": set[str](), "valid": {NEGATIVE_USER}, "test": {NEGATIVE_USER}}
        if self._sampled:
            self._unused["train"] = {"label"}
        self._not_trained_on = {"time"}
        if job.data.interactions.labels:  # it only identifies the user's items
            self._not_trained_on.add("label")
        self.written = WriteResult.zeros(job)

    def add(self, p: int, part: PartitionRows, parts: SplitIds, low_parts: SplitIds | None) -> None:
        """Writes a partition.

        Args:
            p: its number.
            part: its rows.
            parts: their splits.
            low_parts: splits of rows that only count as seen.
        """
        job, written = self._job, self.written
        columns = self._columns(part)
        known = self._known_items(part) if self._sampled else None
        for split, name in enumerate(SPLITS):
            at, first = np.flatnonzero(parts == split), int(self._plan.first_of[split][p])
            used = {n: v for n, v in columns.items() if n not in self._unused[name]}
            if split == TRAIN and "item" in used:  # rare items train the unknown row
                used["item"] = self._fitted.trained("item", used["item"])
            table = pa.table({n: to_arrow(taken(v, at)) for n, v in used.items()})
            cuts = self._cuts
            if split != TRAIN:
                if known is not None and len(at):
                    table = self._with_negatives(
                        table, part["local"][at], part["key"][at], known, split
                    )
                cuts = np.arange(first, first + table.num_rows, HELD_OUT_GROUP_ROWS)
            file = f"{name}/part-{p:05d}.parquet"
            written.sums[file] = TableSum.of(table)
            signed = signed_table(table, job.folder / file, written.sums[file].crc)
            _write_groups(signed, job.folder / file, cuts, first)
            written.rows[split] += table.num_rows
            for target, label in enumerate(job.data.interactions.labels):
                values = columns[f"{LABEL_OF}{label}"][at]
                written.labelled[split, target] += [(values == y).sum() for y in (0, 1)]
            for_training = [n for n in table.column_names if n not in self._not_trained_on]
            written.sizes[split] += sum(table[n].nbytes for n in for_training)
        written.known.add(self._plan.trained, part, parts)
        if {"user", "item"} <= columns.keys():
            self._put_histories(p, part, parts, low_parts, columns)

    def _columns(self, part: PartitionRows) -> dict[str, Any]:
        """The columns of the files, for all rows of a partition."""
        columns: dict[str, Any] = {}
        for name in self._job.entities:
            columns[name] = self._fitted.row_of_code[entity_key(name)][part[name]]
        if self._plan.negative_user is not None:
            columns[NEGATIVE_USER] = self._plan.negative_user[part["user"]]
        for name in dict.fromkeys(("label", *self._job.data.interactions.label_columns)):
            columns[name] = part[name].astype(np.float32)
        if "weight" in part:
            weights = part["weight"].astype(np.float64) / self._plan.mean_weight
            least = float(np.finfo(np.float32).tiny)  # smaller numbers underflow float32
            self._job.note(
                f"rows whose weight is below {least:.1e} of the mean and counts as that",
                int((weights < least).sum()),
            )
            columns["weight"] = np.maximum(weights, least).astype(np.float32)
        if "time" in part:
            columns["time"] = part["time"]
        for feature in self._job.row_fields:
            if feature.entity == "context":
                values = part[f"field {feature.name}"]
                columns[feature.name] = self._fitted.encoded(feature, values)
        return columns

    def _known_items(self, part: PartitionRows) -> Jagged:
        """The items that held-out negatives avoid, by user of the partition: from 0, ascending."""
        n_users, known = len(part.users), []
        for rows in part.with_low:
            items = self._fitted.row_of_code[entity_key("item")][rows["item"]]
            items = self._fitted.trained("item", items)  # no other items are drawn
            at = np.flatnonzero(items > 0)
            known.append(Jagged.from_pairs(rows["local"][at], items[at] - 1, n_users))
        return union(known)

    def _put_histories(
        self,
        p: int,
        part: PartitionRows,
        parts: SplitIds,
        low_parts: SplitIds | None,
        columns: dict[str, Any],
    ) -> None:
        """Adds the items of a partition's users to the histories, by split."""
        users, items = columns.get(NEGATIVE_USER, columns["user"]), columns["item"]
        known = (users > 0) & (items > 0)
        positive = part["label"] == 1
        folded_in = parts == FOLD_IN
        in_history = positive & (self._fitted.trained("item", items) > 0)
        liked = np.flatnonzero(known & ((parts == TRAIN) | folded_in) & in_history)
        if "time" in part:
            liked = liked[_in_time_order(part, liked)]
        self._histories.add(HISTORY, users[liked], items[liked])
        if folded_in.any():  # no file of rows has these
            table = pa.table({"user": users[folded_in], "item": items[folded_in]})
            self.written.sums[f"fold_in/part-{p:05d}"] = TableSum.of(table)
        # A label of 0 marks a shown item, or a fixed negative, which was not seen.
        met = known & (positive | (self._job.data.task == "ctr"))
        for split, name in enumerate(SPLITS):
            at = np.flatnonzero(met & (parts == split) & ~((split == TRAIN) & in_history))
            self._histories.add(SEEN[name][-1], users[at], items[at])
        if (low := part.low) is None or low_parts is None:
            return
        row_of_code, negative_user = self._fitted.row_of_code, self._plan.negative_user
        user_rows = row_of_code[entity_key("user")] if negative_user is None else negative_user
        users, items = user_rows[low["user"]], row_of_code[entity_key("item")][low["item"]]
        met = (users > 0) & (items > 0)
        for split, name in enumerate(SPLITS):
            at = np.flatnonzero(met & (low_parts == split))
            self._histories.add(SEEN[name][-1], users[at], items[at])
        table = pa.table({"user": users, "item": items, "split": low_parts})
        self.written.sums[f"seen/part-{p:05d}"] = TableSum.of(table)

    def _with_negatives(
        self, table: pa.Table, users: Int32Array, keys: Int64Array, known: Jagged, split: int
    ) -> pa.Table:
        """Held-out positives, each followed by its negatives.

        Negatives are items of the table without a row of the user in any split. They depend on the
        positive's key, not its position.
        """
        k = self._job.data.negatives.evaluation_per_positive
        n, n_items = len(users), self._fitted.rows["item"] - 1
        option = f"negatives.evaluation_per_positive={k}"
        short = users_short_of_negatives(k, known, users, n_items)
        self._job.note(f"users of {SPLITS[split]} with fewer than {option} unseen items", short)
        drawn = draw_per_positive(
            np.repeat(keys, k),
            np.tile(np.arange(k), n),
            np.repeat(users, k),
            k,
            known,
            n_items,
            seed=derive_seed(self._job.seed, "evaluation", split),
        )
        items = np.hstack([table["item"].to_numpy().reshape(-1, 1), drawn.reshape(-1, k) + 1])
        there = np.hstack([np.ones((n, 1), bool), drawn.reshape(-1, k) >= 0])
        labels = np.tile(np.array([1.0] + [0.0] * k, np.float32), (n, 1))[there]
        table = table.take(pa.array(np.repeat(np.arange(n), there.sum(axis=1))))
        for name, values in (("item", items[there].astype(np.int32)), ("label", labels)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        return table


def _in_time_order(part: PartitionRows, rows: Int64Array) -> Int64Array:
    """Row indices sorted by user, then time."""
    local = part["local"][rows]
    offsets, order = grouped(local, int(local.max(initial=0)) + 1)
    sort_groups(offsets, order, part["time"][rows])
    return order


def carry(histories: PairSink, earlier: PreviousDataset, fit: Fitter) -> None:
    """Adds users' items from an earlier dataset's splits, which count as seen.

    Its held-out items are not training items.
    """
    before = earlier.dataset
    if before is None or not {"user", "item"} <= before.manifest.entities.keys():
        return
    row_now = np.arange(before.manifest.n_rows("item"), dtype=np.int32)
    if n_cold := before.manifest.cold.get("item", 0):  # some of them may have table rows now
        row_now[-n_cold:] = fit.rows_of("item", before.entity_ids("item", cold=True)[-n_cold:])
    is_known = np.ones(before.manifest.entities["user"], bool)
    if "item" in fit.lifetimes:  # these rows belong to other items now
        row_now[fit.lifetimes["item"].reused] = 0
    if "user" in fit.lifetimes:
        is_known[fit.lifetimes["user"].reused] = False
    history, seen = before.met("train")
    held_out = [*before.met("valid"), *before.met("test")]
    for name, bags in ((HISTORY, history), *((CARRIED, bags) for bags in (seen, *held_out))):
        users, items = np.repeat(np.arange(len(bags)), bags.lengths), row_now[bags.values]
        kept = (items > 0) & is_known[users]
        histories.add(name, users[kept], items[kept])


def write_entities(
    job: Job, fit: Fitter, counts: Counts, histories: HistoryWriter, earlier: PreviousDataset
) -> dict[str, int]:
    """Writes vocabularies and entity tables. First thread.

    Returns:
        `TableSum.crc` of the tables without histories, which follow from the rows.
    """
    (job.folder / "vocabulary").mkdir()
    (job.folder / "entities").mkdir()
    tables = {name: _entity_table(job, fit, counts, earlier, name) for name in fit.entities}
    titles = None if job.data.titles is None else _titles(job, fit)
    if titles is not None:
        n = fit.entities["item"].rows
        tables["item"] = tables["item"].append_column("title", titles[:n])
    for name, ids in fit.cold.items():
        tables[f"cold_{name}"] = _cold_table(job, fit, name, ids)
        if titles is not None:
            titled = tables[f"cold_{name}"].append_column("title", titles[n:])
            tables[f"cold_{name}"] = titled
    sums = {f"entities/{name}.parquet": TableSum.of(table).crc for name, table in tables.items()}

    def write_entity(name: str) -> None:
        path = job.folder / "entities" / f"{name}.parquet"
        signed = signed_table(tables[name], path, sums[f"entities/{name}.parquet"])
        if name == "user" and "item" in fit.entities:
            histories.write(path, signed)
        else:
            n_rows = max(1024, _GROUP_BYTES // max(1, signed.nbytes // max(1, len(signed))))
            pq.write_table(
                signed,
                path,
                min(n_rows, _MOST_GROUP_ROWS),
                compression="zstd",
                write_page_checksum=True,
            )

    def write_vocabulary(name: str) -> None:
        fit.vocabularies[name].write(job.folder / "vocabulary" / f"{name}.parquet")

    tasks = [
        *(partial(write_entity, name) for name in tables),
        *(partial(write_vocabulary, name) for name in fit.vocabularies),
    ]
    job.crew.map(lambda task: task(), tasks)
    return sums


def _entity_table(
    job: Job, fit: Fitter, counts: Counts, earlier: PreviousDataset, name: str
) -> pa.Table:
    """An entity table without histories."""
    vocabulary, lifetimes = fit.entities[name], fit.lifetimes.get(name)
    reused = np.zeros(0, np.int32) if lifetimes is None else lifetimes.reused
    columns = {"id": pa.concat_arrays([pa.nulls(1, pa.string()), vocabulary.ids])}
    for feature in job.data.features:
        if feature.name in fit.values and feature.entity == name:
            raw = fit.values[feature.name]
            encoded = fit.fitted.encoded(feature, raw)
            if (before := earlier.column(name, feature.name)) is not None:
                encoded = _carried(raw, encoded, from_arrow(before), reused)
            columns[feature.name] = to_arrow(encoded)
    if name == "item" and "user" in fit.entities:
        positives = np.zeros(vocabulary.rows, np.int64)
        rows = fit.fitted.trained("item", fit.fitted.row_of_code[entity_key("item")][:-1])
        np.add.at(positives, rows, counts.liked)
        if (before := earlier.column("item", "count")) is not None:
            carried = before.to_numpy().copy()
            carried[reused] = 0
            positives[: len(carried)] += carried
        columns["count"] = pa.array(positives)
    if lifetimes is not None:
        columns[LAST_DAY] = pa.array(lifetimes.last_day)
        columns[GENERATION] = pa.array(lifetimes.generation)
    return pa.table(columns)


def _cold_table(job: Job, fit: Fitter, name: str, ids: pa.Array) -> pa.Table:
    """The table of cold items: the columns of the item table without counts."""
    columns = {"id": ids}
    for feature in job.data.features:
        if feature.name in fit.cold_values and feature.entity == name:
            encoded = fit.fitted.encoded(feature, fit.cold_values[feature.name])
            columns[feature.name] = to_arrow(encoded)
    return pa.table(columns)


def _carried(raw: Values, encoded: Values, before: Values, reused: Int32Array) -> Values:
    """A user or item field; empty values are filled from the earlier dataset.

    Args:
        raw: ``[rows]`` raw values of the new dataset.
        encoded: the same as model inputs.
        before: ``[earlier rows]`` model inputs of the earlier dataset.
        reused: rows that belonged to another id before.
    """
    n = len(before)
    is_same = np.ones(n, bool)
    is_same[reused] = False
    if isinstance(encoded, Jagged) and isinstance(before, Jagged):
        both = Jagged.concatenated([encoded, before])
        rows = np.arange(len(encoded))
        empty = np.flatnonzero((encoded.lengths[:n] == 0) & is_same)
        rows[empty] = len(encoded) + empty
        return taken(both, rows)
    if isinstance(raw, Jagged) or isinstance(encoded, Jagged) or isinstance(before, Jagged):
        return encoded
    empty = np.flatnonzero(~has_value(raw[:n]) & is_same)
    encoded[empty] = before[empty]
    return encoded


def _titles(job: Job, fit: Fitter) -> pa.Array:
    """``[items + cold items]`` string."""
    titles, n_items = job.data.titles, fit.entities["item"].rows + len(fit.cold.get("item", ()))
    assert titles is not None
    key = titles.key or job.data.interactions.item
    assert key is not None
    table = side_table(
        job, label_of(titles.file), [Column(key), Column(titles.column, required=False)]
    )
    fit.check_join("item", titles.file, titles.key, table[key], "titles")
    rows, texts = fit.rows_of("item", table[key]), table[titles.column].combine_chunks()
    # If an item has several titles, the one with the smallest hash is kept.
    known = np.flatnonzero((rows > 0) & np.asarray(texts.is_valid()))
    order = known[np.lexsort((hash_texts(texts)[known], rows[known]))]
    owners, first = np.unique(rows[order], return_index=True)
    place = np.full(n_items, -1, np.int64)
    place[owners] = order[first]
    return texts.take(pa.array(place, mask=place < 0))


def _write_groups(table: pa.Table, path: Path, cuts: Int64Array, first: int) -> None:
    """Writes rows of a split from ``first`` on, in row groups cut at given row numbers."""
    inside = cuts[(cuts > first) & (cuts < first + table.num_rows)] - first
    ends = np.unique(np.concatenate([[0], inside, [table.num_rows]]))
    # Few values repeat within a group, so a dictionary would cost more than it saves.
    how = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, table.schema, **how) as writer:
        for begin, end in pairwise(ends):
            writer.write_table(table.slice(begin, end - begin), row_group_size=int(end - begin))
