"""Partitions -> train/, valid/ and test/ as table rows; vocabularies; users and items."""

import logging
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
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
    offsets_of,
    taken,
    to_arrow,
    union,
)
from deepfm_dist.data.layout import HISTORY, NEGATIVE_USER, SEEN, signed_table
from deepfm_dist.data.manifest import SPLITS, TRAIN, SplitSpec, cuts_of
from deepfm_dist.data.negatives import draw_per_positive, users_short_of_negatives
from deepfm_dist.data.preparation.counts import Counts
from deepfm_dist.data.preparation.fitting import FitResult, Fitter, PreviousDataset
from deepfm_dist.data.preparation.histories import CARRIED, HistoryWriter
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.reading import side_table
from deepfm_dist.data.preparation.spill import PartitionRows
from deepfm_dist.data.preparation.split import SplitIds, sort_groups
from deepfm_dist.data.schema import label_of
from deepfm_dist.data.sources import Column
from deepfm_dist.data.spelling import difference
from deepfm_dist.errors import DataError
from deepfm_dist.log import progress
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
LANE_WINDOW_ROWS = 1 << 22
"""Rows that all lanes together hold in memory when they are streamed."""
HELD_OUT_GROUP_ROWS = 1 << 20
_MOST_UNKNOWN = 10_000


class RowWriter:
    """Writes the rows of every split, a file for each partition. All threads.

    Attributes:
        lanes: streams that training rows are dealt to.
        groups: groups of training rows, a multiple of ``lanes``.
        histories: what users have met, put aside for the user table.
        sums: `sum_of` every file that this rank has written, by its name.
    """

    def __init__(
        self,
        job: Job,
        partitions: Partitions,
        counts: Counts,
        fitted: FitResult,
        earlier: PreviousDataset,
    ) -> None:
        self._job, self._partitions, self._counts, self._fitted = job, partitions, counts, fitted
        n_train = int(counts.rows[:, TRAIN].sum())
        self.lanes = job.data.lanes or _default_lanes(n_train)
        self.groups = self.lanes * -(-n_train // LANE_WINDOW_ROWS)
        self._cuts = cuts_of(n_train, self.groups)
        self.sums: dict[str, int] = {}
        self._known = HeldOutIdCheck(job, partitions, counts)
        self._first_of = [offsets_of(counts.rows[:, split]) for split in range(len(SPLITS))]
        self._sampled = job.data.task == "implicit" and job.data.negatives.fixed_per_user is None
        self._negative_user = self._negative_users()
        self._unused = {"train": set[str](), "valid": {NEGATIVE_USER}, "test": {NEGATIVE_USER}}
        if self._sampled:
            self._unused["train"] = {"label"}
        n_rows = fitted.rows.get("user", 1)
        n_rare = (
            0
            if self._negative_user is None
            else max(0, int(self._negative_user.max()) + 1 - n_rows)
        )
        self.histories = HistoryWriter(n_rows, n_rare, job.n_partitions, job.spill(""), job.crew)
        if job.crew.is_first and earlier.manifest is not None:
            self._carry(earlier)

    def write(self) -> dict[str, SplitSpec]:
        """Writes this rank's partitions."""
        job, sizes = self._job, np.zeros(len(SPLITS), np.int64)
        n_rows = np.zeros(len(SPLITS), np.int64)
        if job.crew.is_first:
            for name in SPLITS:
                (job.folder / name).mkdir()
        job.crew.gather(None)
        with progress(len(job.own_partitions), "write", "partition", job.crew.is_first) as bar:
            for p in job.own_partitions:
                part, parts = (
                    self._partitions.load(p),
                    np.asarray(self._partitions.load_array(p, "parts")),
                )
                columns = self._columns(part)
                known = self._known_items(part, p) if self._sampled else None
                for split, name in enumerate(SPLITS):
                    at, first = np.flatnonzero(parts == split), int(self._first_of[split][p])
                    used = {n: v for n, v in columns.items() if n not in self._unused[name]}
                    table = pa.table({n: to_arrow(taken(v, at)) for n, v in used.items()})
                    cuts = self._cuts
                    if split != TRAIN:
                        if known is not None and len(at):
                            table = self._with_negatives(
                                table, part["local"][at], part["key"][at], known, split
                            )
                        cuts = np.arange(first, first + table.num_rows, HELD_OUT_GROUP_ROWS)
                    file = f"{name}/part-{p:05d}.parquet"
                    self.sums[file] = sum_of(table)
                    n_rows[split] += table.num_rows
                    signed = signed_table(table, job.folder / file, self.sums[file])
                    _write_groups(signed, job.folder / file, cuts, first)
                    sizes[split] += sum(table[n].nbytes for n in table.column_names if n != "time")
                self._known.add(part, parts)
                if {"user", "item"} <= columns.keys():
                    self._put_histories(part, p, parts, columns)
                bar.update()
        self._known.check()
        sizes, n_rows = job.crew.add_up(sizes), job.crew.add_up(n_rows)
        return {
            name: SplitSpec(
                rows=int(n_rows[s]),
                positives=int(self._counts.positives[:, s].sum()),
                size_bytes=int(sizes[s]),
            )
            for s, name in enumerate(SPLITS)
        }

    def _columns(self, part: PartitionRows) -> dict[str, Any]:
        """What stands in the files, for all rows of a partition."""
        columns: dict[str, Any] = {}
        for name in self._job.entities:
            columns[name] = self._fitted.row_of_code[entity_key(name)][part[name]]
        if self._negative_user is not None:
            columns[NEGATIVE_USER] = self._negative_user[part["user"]]
        columns["label"] = part["label"].astype(np.float32)
        if "weight" in part:
            weights = part["weight"].astype(np.float64) / self._counts.mean_weight
            least = float(np.finfo(np.float32).tiny)  # below it, float32 ends at 0
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

    def _negative_users(self) -> Int32Array | None:
        """``[users]``: whose history a user's negatives avoid, where some have no row of their own.

        Those are numbered from the end of the user table on, for the sampler alone.
        """
        if not self._sampled:
            return None
        rows = self._fitted.row_of_code[entity_key("user")][:-1]
        rare = (rows == 0) & (self._counts.tables[entity_key("user")] > 0)
        if not rare.any():
            return None
        rows = rows.copy()
        rows[rare] = self._fitted.rows["user"] + np.arange(rare.sum(), dtype=np.int32)
        return rows

    def _known_items(self, part: PartitionRows, p: int) -> Jagged:
        """What held-out negatives avoid: items of each user of a partition, from 0, ascending."""
        n_users, known = len(self._partitions.users(p)), []
        for rows in part.with_low:
            items = self._fitted.row_of_code[entity_key("item")][rows["item"]]
            at = np.flatnonzero(items > 0)
            known.append(Jagged.from_pairs(rows["local"][at], items[at] - 1, n_users))
        return union(known)

    def _put_histories(
        self, part: PartitionRows, p: int, parts: SplitIds, columns: dict[str, Any]
    ) -> None:
        """Puts aside what the users of a partition have met, by split."""
        users, items = columns.get(NEGATIVE_USER, columns["user"]), columns["item"]
        known = (users > 0) & (items > 0)
        positive = part["label"] == 1
        liked = np.flatnonzero(known & (parts == TRAIN) & positive)
        if "time" in part:
            liked = liked[_in_time_order(part, liked)]
        self.histories.add(HISTORY, users[liked], items[liked])
        # A label of 0 is of a row that was shown, or of a fixed negative, which nobody has seen.
        met = known & (positive | (self._job.data.task == "ctr"))
        for split, name in enumerate(SPLITS):
            at = np.flatnonzero(met & (parts == split) & ~((split == TRAIN) & positive))
            self.histories.add(SEEN[name][-1], users[at], items[at])
        if (low := part.low) is None:
            return
        row_of_code, low_parts = (
            self._fitted.row_of_code,
            self._partitions.load_array(p, "low parts"),
        )
        of_users = (
            row_of_code[entity_key("user")] if self._negative_user is None else self._negative_user
        )
        users, items = of_users[low["user"]], row_of_code[entity_key("item")][low["item"]]
        met = (users > 0) & (items > 0)
        for split, name in enumerate(SPLITS):
            at = np.flatnonzero(met & (low_parts == split))
            self.histories.add(SEEN[name][-1], users[at], items[at])
        table = pa.table({"user": users, "item": items, "split": np.asarray(low_parts)})
        self.sums[f"seen/part-{p:05d}"] = sum_of(table)

    def _carry(self, earlier: PreviousDataset) -> None:
        """What users met in an earlier dataset's splits. First thread.

        What it held out is seen by now, but was not trained on.
        """
        before = earlier.dataset
        if before is None or not {"user", "item"} <= before.manifest.entities.keys():
            return
        history, seen = before.met("train")
        held_out = [*before.met("valid"), *before.met("test")]
        for name, bags in ((HISTORY, history), *((CARRIED, bags) for bags in (seen, *held_out))):
            self.histories.add(name, np.repeat(np.arange(len(bags)), bags.lengths), bags.values)

    def _with_negatives(
        self, table: pa.Table, users: Int32Array, keys: Int64Array, known: Jagged, split: int
    ) -> pa.Table:
        """Held-out positives, each followed by its negatives.

        Negatives are items of the table that the user has no row with, in any split. They go by the
        key of the positive, wherever it stands.
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
            derive_seed(self._job.seed, "evaluation", split),
        )
        items = np.hstack([table["item"].to_numpy().reshape(-1, 1), drawn.reshape(-1, k) + 1])
        there = np.hstack([np.ones((n, 1), bool), drawn.reshape(-1, k) >= 0])
        labels = np.tile(np.array([1.0] + [0.0] * k, np.float32), (n, 1))[there]
        table = table.take(pa.array(np.repeat(np.arange(n), there.sum(axis=1))))
        for name, values in (("item", items[there].astype(np.int32)), ("label", labels)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        return table


def _in_time_order(part: PartitionRows, rows: Int64Array) -> Int64Array:
    """Places of some rows, user by user, each user's in time order."""
    local = part["local"][rows]
    offsets, order = grouped(local, int(local.max(initial=0)) + 1)
    sort_groups(offsets, order, part["time"][rows])
    return order


class HeldOutIdCheck:
    """Counts held-out rows whose users and items have training rows. All threads.

    Args:
        job: the preparation.
        partitions: its rows.
        counts: of its training rows.
    """

    def __init__(self, job: Job, partitions: Partitions, counts: Counts) -> None:
        self._job, self._partitions = job, partitions
        self._trained = {name: counts.tables[entity_key(name)] > 0 for name in job.entities}
        self._rows = np.zeros((len(SPLITS), len(job.entities), 2), np.int64)  # known, all
        self._unknown: dict[tuple[int, str], Int32Array] = {}

    def add(self, part: PartitionRows, parts: SplitIds) -> None:
        """Counts a partition in, whose rows go where ``parts`` says."""
        for split in range(TRAIN + 1, len(SPLITS)):
            at = np.flatnonzero(parts == split)
            for place, name in enumerate(self._job.entities):
                codes = part[name][at]
                known = self._trained[name][codes]
                self._rows[split, place] += known.sum(), len(known)
                before = self._unknown.get((split, name), np.zeros(0, np.int32))
                unknown = np.unique(np.concatenate([before, codes[~known]]))
                self._unknown[split, name] = unknown[:_MOST_UNKNOWN]

    def check(self) -> None:
        """Says where few held-out rows, or none, are of users and items with training rows.

        Raises:
            DataError: none is, in a split that a file or a column gives.
        """
        job = self._job
        rows, unknown = job.crew.add_up(self._rows), job.crew.gather(self._unknown)
        for split in range(TRAIN + 1, len(SPLITS)):
            file = getattr(job.data.split, f"{SPLITS[split]}_file")
            given = file or job.data.interactions.split
            texts = []
            for (n_known, n), name in zip(rows[split].tolist(), job.entities, strict=True):
                codes = [
                    from_thread[split, name]
                    for from_thread in unknown
                    if (split, name) in from_thread
                ]
                if 2 * n_known >= n or not codes:
                    continue
                ids = self._partitions.ids[entity_key(name)]
                strange = ids.take(pa.array(np.unique(np.concatenate(codes))))
                trained = ids.filter(pa.array(self._trained[name]))
                how = difference(strange, trained)
                texts.append(
                    f"{n_known:,} of {n:,} rows have {'a user' if name == 'user' else 'an item'} "
                    f"of the training rows: "
                    + (
                        f"of the other {name}s, {how}"
                        if how
                        else f"{strange[0].as_py()!r} is not among them, {trained[0].as_py()!r} is"
                    )
                )
                if n_known == 0 and how is not None and given:
                    raise DataError(self._told(split, texts[-1:]) + "; write the ids alike")
            if texts and len(texts) == len(job.entities) and not rows[split, :, 0].any() and given:
                raise DataError(self._told(split, texts) + "; are these rows of the same log?")
            if texts and job.crew.is_first:
                log.warning("%s", self._told(split, texts))

    def _told(self, split: int, texts: list[str]) -> str:
        file = getattr(self._job.data.split, f"{SPLITS[split]}_file")
        where = label_of(file) if file else f"the {SPLITS[split]} split"
        return f"{where}: {'; '.join(texts)}"


def write_entities(
    job: Job, fit: Fitter, counts: Counts, histories: HistoryWriter, earlier: PreviousDataset
) -> dict[str, int]:
    """Writes vocabularies and the tables of users and items. First thread.

    Returns:
        `sum_of` the tables, but for histories, which follow from the rows.
    """
    sums = {}
    (job.folder / "vocabulary").mkdir()
    for name, vocabulary in fit.vocabularies.items():
        vocabulary.write(job.folder / "vocabulary" / f"{name}.parquet")
    (job.folder / "entities").mkdir()
    for name, vocabulary in fit.entities.items():
        table = {"id": pa.concat_arrays([pa.nulls(1, pa.string()), vocabulary.ids])}
        for feature in job.data.features:
            if feature.name in fit.values and feature.entity == name:
                raw = fit.values[feature.name]
                encoded = fit.fitted.encoded(feature, raw)
                if (before := earlier.column(name, feature.name)) is not None:
                    encoded = _carried(raw, encoded, from_arrow(before))
                table[feature.name] = to_arrow(encoded)
        path = job.folder / "entities" / f"{name}.parquet"
        if name == "item" and "user" in fit.entities:
            positives = np.zeros(vocabulary.rows, np.int64)
            np.add.at(positives, fit.fitted.row_of_code[entity_key("item")][:-1], counts.liked)
            if (before := earlier.column("item", "count")) is not None:
                positives[: len(before)] += before.to_numpy()
            table["count"] = pa.array(positives)
        if name == "item" and job.data.titles is not None:
            table["title"] = _titles(job, fit)
        sums[f"entities/{name}.parquet"] = total = sum_of(pa.table(table))
        signed = signed_table(pa.table(table), path, total)
        if name == "user" and "item" in fit.entities:
            histories.write(path, signed)
        else:
            pq.write_table(signed, path, compression="zstd", write_page_checksum=True)
    return sums


def sum_of(table: pa.Table) -> int:
    """CRC-32 of a table's numbers, its texts left out."""
    found = 0
    for name in table.column_names:
        if table[name].type != pa.string():
            values = from_arrow(table[name])
            arrays = (values.lengths, values.values) if isinstance(values, Jagged) else (values,)
            for part in (name.encode(), *map(np.ascontiguousarray, arrays)):
                found = zlib.crc32(part, found)
    return found


def _carried(raw: Values, encoded: Values, before: Values) -> Values:
    """A users' or items' field with the earlier dataset's values where there are none now."""
    n = len(before)
    if isinstance(encoded, Jagged) and isinstance(before, Jagged):
        both = Jagged.concatenated([encoded, before])
        rows = np.arange(len(encoded))
        empty = np.flatnonzero(encoded.lengths[:n] == 0)
        rows[empty] = len(encoded) + empty
        return taken(both, rows)
    if isinstance(raw, Jagged) or isinstance(encoded, Jagged) or isinstance(before, Jagged):
        return encoded
    empty = np.flatnonzero(np.isnan(raw[:n]))
    encoded[empty] = before[empty]
    return encoded


def _titles(job: Job, fit: Fitter) -> pa.Array:
    titles, items = job.data.titles, fit.entities["item"]
    assert titles is not None
    key = titles.key or job.data.interactions.item
    assert key is not None
    table = side_table(
        job, label_of(titles.file), [Column(key), Column(titles.column, required=False)]
    )
    fit.check_join("item", titles.file, titles.key, table[key], "titles")
    rows, texts = items.lookup(table[key]), table[titles.column].combine_chunks()
    # Of several titles the one with the least hash stays, wherever it stands.
    told = np.flatnonzero((rows > 0) & np.asarray(texts.is_valid()))
    order = told[np.lexsort((hash_texts(texts)[told], rows[told]))]
    owners, first = np.unique(rows[order], return_index=True)
    place = np.full(items.rows, -1, np.int64)
    place[owners] = order[first]
    return texts.take(pa.array(place, mask=place < 0))


def _default_lanes(rows: int) -> int:
    """64, and from 2**30 rows on one for every 2**24, as a power of two up to 4,096."""
    return min(4096, max(64, 1 << (rows >> 24).bit_length())) if rows >= 1 << 30 else 64


def _write_groups(table: pa.Table, path: Path, cuts: Int64Array, first: int) -> None:
    """Writes rows ``first`` and those behind it of a split, cut at some of its row numbers."""
    inside = cuts[(cuts > first) & (cuts < first + table.num_rows)] - first
    ends = np.unique(np.concatenate([[0], inside, [table.num_rows]]))
    # Few values repeat within a group: a dictionary of them costs more than it saves.
    how = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, table.schema, **how) as writer:
        for begin, end in pairwise(ends):
            writer.write_table(table.slice(begin, end - begin), row_group_size=int(end - begin))
