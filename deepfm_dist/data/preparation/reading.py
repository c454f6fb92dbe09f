"""Input files -> coded rows, dealt to partitions."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.codes import Codes
from deepfm_dist.data.fields import (
    coded,
    column_of,
    exploded,
    hashed_rows,
    numbers_of,
    row_columns,
    split_cells,
)
from deepfm_dist.data.jagged import Jagged, Values, from_arrow, to_arrow
from deepfm_dist.data.preparation.crew import Crew
from deepfm_dist.data.preparation.job import OPEN, Job, buckets_of, entity_key, partitions_of
from deepfm_dist.data.preparation.rules import coded_columns, content_hashes
from deepfm_dist.data.preparation.spill import Spill
from deepfm_dist.data.schema import Feature, label_of
from deepfm_dist.data.sources import BLOCK_BYTES, Column, EmptyFile, InputFile, read_batches
from deepfm_dist.data.times import TimeColumn
from deepfm_dist.errors import DataError
from deepfm_dist.log import progress

log = logging.getLogger(__name__)
_IMPRESSIONS = 1 << 14  # at a time: some hundred thousand rows


@dataclass
class SideFile:
    """A field of users or items in a file of its own: the file's ids, and their values."""

    keys: pa.Array
    values: Values


class _Stream:
    """One file of rows, which threads read in turns."""

    def __init__(self, job: Job, number: int) -> None:
        self.number, self.file, self.name, self.part = number, *job.inputs[number]
        self.lock, self.dropped, self.is_over = Lock(), Counter[str](), False
        columns = row_columns(job.data, with_split=self.part == OPEN)
        self._batches = _batches(job, self.file, self.name, columns, self.dropped)
        self._left = self.file.text_bytes

    def read(self, bar: Any) -> pa.RecordBatch | None:
        """The next batch; the bar counts bytes of text, of which a batch is about a block."""
        batch = next(self._batches, None)
        self.is_over = batch is None
        step = self._left if batch is None else min(BLOCK_BYTES, self._left)
        bar.update(step)
        self._left -= step
        return batch


class _Queue:
    """The files of rows, from which every thread takes batches until none is left.

    Each thread reads a file that no other one is reading, where there is one; what it has read, it
    codes while another thread goes on with the file.
    """

    def __init__(self, job: Job, bar: Any) -> None:
        self.streams = [_Stream(job, number) for number in range(len(job.inputs))]
        self._bar = bar

    def batches(self, crew: Crew) -> Iterator[tuple[_Stream, pa.RecordBatch]]:
        """This thread's batches."""
        while waiting := [s for s in self.streams if not s.is_over][: crew.size]:
            crew.check()
            stream = next((s for s in waiting if s.lock.acquire(blocking=False)), None)
            if stream is None:
                stream = waiting[0]
                stream.lock.acquire()
            try:
                batch = None if stream.is_over else stream.read(self._bar)
            finally:
                stream.lock.release()
            if batch is not None:
                yield stream, batch


class Reading:
    """Reads files, a share of one thread. All threads.

    Attributes:
        codes: this rank's numbers of the texts of each vocabulary.
        spill: its rows by partition, with these numbers.
        n_read: how many rows it has read.
        n_positive: how many of them are trained on: all but those rated below ``min_rating``.
        side_files: fields in files of their own; the first thread reads them.
        times: what the times of all ranks' rows are like, if they have times.

    Raises:
        DataError: an input cannot be read or leaves no row.
    """

    def __init__(self, job: Job) -> None:
        self._job, data = job, job.data
        tables = {f.table_name for f in data.features if f.has_vocabulary and not f.is_id}
        self.codes = {name: Codes() for name in [*map(entity_key, job.entities), *sorted(tables)]}
        in_memory = job.n_partitions == 1
        self.spill = Spill(None if in_memory else rows_path(job, job.crew.rank), job.n_partitions)
        self.n_read = self.n_positive = 0
        time = data.interactions.time
        self.times = None if time is None else TimeColumn(time)
        kept = {name: np.zeros(2, np.int64) for _, name, _ in job.inputs}  # rows, positives
        text_bytes = sum(file.text_bytes for file, _, _ in job.inputs)
        with progress(text_bytes, "read", "B", job.crew.is_first) as bar:
            queue: _Queue = job.crew.broadcast(_Queue(job, bar) if job.crew.is_first else None)
            for stream, batch in queue.batches(job.crew):
                rows, positives = self.n_read, self.n_positive
                self._add(batch, stream)
                kept[stream.name] += np.array([self.n_read - rows, self.n_positive - positives])
        job.crew.gather(None)  # all files are read
        if job.crew.is_first:
            for stream in queue.streams:
                job.dropped.update(stream.dropped)
        self.spill.close()
        self.side_files: dict[str, SideFile] = {}
        if job.crew.is_first:
            self.side_files = {f.name: self._side_file(f) for f in data.features if f.file}
        from_threads = job.crew.gather((kept, job.dropped, self.times))
        dropped = sum((from_thread for _, from_thread, _ in from_threads), Counter[str]())
        for name in kept:
            n_rows, n_positive = np.sum(
                [from_thread[name] for from_thread, *_ in from_threads], axis=0
            )
            self._check_rows(name, int(n_rows), int(n_positive), dropped)
        if self.times is not None:
            self.times = sum((times for *_, times in from_threads[1:]), from_threads[0][2])
            self.times.check()
            for text in self.times.warnings() if job.crew.is_first else ():
                log.warning("%s", text)

    def _add(self, batch: pa.RecordBatch, stream: _Stream) -> None:
        """Codes a batch and deals its rows to partitions."""
        if self.times is not None:
            self.times.add(batch["time"], stream.file.name)
            self.times.check()
        rated = self._job.data.interactions.rating is not None
        for piece in self._pieces(batch):
            rows = self._coded(piece, stream.part)
            self.spill.add(rows, self._partitions(rows))
            self.n_read += rows.num_rows
            self.n_positive += int(np.asarray(rows["label"]).sum()) if rated else rows.num_rows

    def _pieces(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The batch; of impressions a row for each item, which take many times its memory."""
        if self._job.data.interactions.impressions is None:
            yield batch
            return
        for begin in range(0, batch.num_rows, _IMPRESSIONS):
            yield exploded(batch.slice(begin, _IMPRESSIONS))

    def _check_rows(self, name: str, n_rows: int, n_positive: int, dropped: Counter[str]) -> None:
        _check_some_have_rows(self._job, name, dropped[_without_rows(name)])
        if n_positive == 0:
            least = self._job.data.interactions.min_rating
            starts = {f"{file.pattern}: " for file in self._job.files[name]}
            what = (
                f"no row is rated {least:g} or more; lower interactions.min_rating"
                if n_rows and least is not None
                else "no usable row is left"
            )
            lost = [
                f"{n:,} {reason.removeprefix(start)}"
                for reason, n in dropped.items()
                for start in starts
                if reason.startswith(start)
            ]
            told = ", ".join(lost)
            raise DataError(f"{name}: {what}" + (f"; dropped: {told}" if told else ""))
        if self._job.crew.is_first:
            log.info("read %s: %s rows", name, f"{n_rows:,}")

    def no_rows(self) -> pa.RecordBatch:
        """None, in the columns of the spill."""
        columns = row_columns(self._job.data, with_split=True)
        empty = {c.key: pa.array([], c.arrow_type) for c in columns}
        batch = pa.RecordBatch.from_pydict(empty)
        if self._job.data.interactions.impressions is not None:
            batch = exploded(batch)
        return self._coded(batch, OPEN)

    def _coded(self, batch: pa.RecordBatch, part: int) -> pa.RecordBatch:
        """The columns that later steps need, ids and texts as codes."""
        data, n = self._job.data, batch.num_rows
        spec, split = data.interactions, data.split
        columns: dict[str, pa.Array] = {}
        for name in self._job.entities:
            codes = self.codes[entity_key(name)].encode(batch[name])
            columns[name] = pa.array(codes)
        if part == OPEN and spec.split is not None:
            columns["given"] = batch["split"]
        elif spec.split or split.valid_file or split.test_file:
            columns["given"] = pa.array(np.full(n, part, np.int8))
        for role in ("label", "weight"):
            if getattr(spec, role) is not None:
                columns[role] = batch[role]
        if spec.time is not None:
            for part_of_time in ("whole", "billionths"):
                columns[part_of_time] = batch["time"].field(part_of_time)
        if spec.rating is not None:
            positive = np.asarray(batch["rating"]) >= spec.min_rating
            columns["label"] = pa.array(positive.astype(np.int8))
            if data.repeated == "strongest":
                columns["rating"] = batch["rating"]
        for words in spec.order.values():
            columns["strength"] = pc.index_in(batch["strength"], value_set=pa.array(words))
        for feature in self._job.row_fields:
            values = self._raw(batch[f"field {feature.name}"], feature)
            columns[f"field {feature.name}"] = to_arrow(values)
        if "user" not in self._job.entities:
            columns["bucket"] = pa.array(self._buckets(columns, n))
        return pa.RecordBatch.from_pydict(columns)

    def _raw(self, cells: pa.Array, feature: Feature) -> Values:
        if feature.kind == "numeric":
            return numbers_of(cells, feature)
        return coded(
            cells, feature, self.codes[feature.table_name] if feature.has_vocabulary else None
        )

    def _buckets(self, columns: Mapping[str, pa.Array], n: int) -> npt.NDArray[np.int16]:
        """Buckets of rows without users: by a hash of their cells."""
        hashes = {
            column: np.append(self.codes[name].hashes, np.uint64(0))
            for column, name in coded_columns(self._job).items()
        }
        values = {name: from_arrow(cells) for name, cells in columns.items()}
        return buckets_of(content_hashes(values, np.arange(n), hashes)).astype(np.int16)

    def _partitions(self, rows: pa.RecordBatch) -> npt.NDArray[np.integer]:
        """Partition of each row: by the bucket of its user, else by its own."""
        n, n_partitions = rows.num_rows, self._job.n_partitions
        if n_partitions == 1:
            return np.zeros(n, np.int32)
        if "user" in self._job.entities:
            buckets = buckets_of(self.codes[entity_key("user")].hashes)
            return partitions_of(buckets, n_partitions).astype(np.int32)[np.asarray(rows["user"])]
        return partitions_of(np.asarray(rows["bucket"], np.int64), n_partitions).astype(np.int32)

    def _side_file(self, feature: Feature) -> SideFile:
        assert feature.file is not None
        key = feature.key or getattr(self._job.data.interactions, feature.entity)
        table = side_table(self._job, label_of(feature.file), [Column(key), column_of(feature)])
        keys, cells = (table[name].combine_chunks() for name in (key, column_of(feature).key))
        if feature.kind == "numeric":
            return SideFile(keys, numbers_of(cells, feature))
        owners, texts = split_cells(cells, feature)
        if feature.has_vocabulary:
            codes = self.codes[feature.table_name].encode(texts)
        else:
            codes = hashed_rows(texts, feature)
        return SideFile(keys, Jagged.from_pairs(owners, codes, len(keys)))


def rows_path(job: Job, rank: int) -> Path:
    """Where a rank spills its rows."""
    return job.spill(f"rows-{rank}.arrow")


def side_table(job: Job, name: str, columns: Sequence[Column]) -> pa.Table:
    """Some columns of a file of users or items."""
    dropped: Counter[str] = Counter()
    schema = pa.schema([(c.key, c.arrow_type) for c in columns])
    batches = [b for file in job.files[name] for b in _batches(job, file, name, columns, dropped)]
    _check_some_have_rows(job, name, dropped[_without_rows(name)])
    also_rows = name in {name_of_rows for _, name_of_rows, _ in job.inputs}
    for reason, count in dropped.items():  # a file that several fields read counts once
        of_side = f"{reason}, read for users and items" if also_rows else reason
        job.dropped[of_side] = max(job.dropped[of_side], count)
    return pa.Table.from_batches(batches, schema)


def _batches(
    job: Job, file: InputFile, name: str, columns: Sequence[Column], dropped: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """A file's rows; none, which is counted, if it is an empty one of many."""
    layout, on_bad_row = job.data.files.get(file.pattern), job.data.on_bad_row
    try:
        yield from read_batches(file.path, columns, layout, on_bad_row, dropped, file.pattern)
    except EmptyFile:
        if len(job.files[name]) == 1:
            raise
        dropped[_without_rows(name)] += 1


def _without_rows(name: str) -> str:
    return f"{name}: files without rows"


def _check_some_have_rows(job: Job, name: str, n_empty: int) -> None:
    if n_empty == len(job.files[name]):
        raise DataError(f"{name}: none of its {n_empty} files has a row")
