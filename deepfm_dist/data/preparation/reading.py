"""Reads input files into coded, partitioned rows."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
    labels_of,
    numbers_of,
    row_columns,
    split_cells,
    times_of,
    vectors_in,
)
from deepfm_dist.data.jagged import Int64Array, Jagged, Values, from_arrow, to_arrow
from deepfm_dist.data.preparation.crew import Crew
from deepfm_dist.data.preparation.job import OPEN, Job, buckets_of, entity_key, partitions_of
from deepfm_dist.data.preparation.rules import coded_columns, content_hashes
from deepfm_dist.data.preparation.spill import Spill
from deepfm_dist.data.schema import LABEL_OF, Feature, label_of
from deepfm_dist.data.sources import (
    BLOCK_BYTES,
    Column,
    EmptyFile,
    InputFile,
    MissingColumnError,
    column_names,
    read_batches,
    read_vectors,
)
from deepfm_dist.data.times import TimeColumn
from deepfm_dist.errors import DataError
from deepfm_dist.log import progress
from deepfm_dist.messages import plural

log = logging.getLogger(__name__)
_MOST_FILES = 1000
"""Maximum number of files searched for a column that another lacks."""
_IMPRESSIONS = 1 << 14  # at a time: some hundred thousand rows


@dataclass
class SideFile:
    """A field of users or items in a separate file: ids and values."""

    keys: pa.Array
    values: Values


class _Stream:
    """A file of rows that threads read in turns."""

    def __init__(self, job: Job, number: int) -> None:
        self.number, self.lock, self.is_over = number, Lock(), False
        self.dropped = Counter[str]()
        self.setting = job.inputs[number][1]
        self._batches = row_batches(job, number, self.dropped)
        self._left = job.inputs[number][0].text_bytes

    def read(self, bar: Any) -> pa.RecordBatch | None:
        """The next batch; the bar counts bytes of text, of which a batch is about a block."""
        batch = next(self._batches, None)
        self.is_over = batch is None
        step = self._left if batch is None else min(BLOCK_BYTES, self._left)
        bar.update(step)
        self._left -= step
        return batch


class _Queue:
    """The files of rows; threads take batches until none is left.

    Each thread prefers a file that no other thread is reading. While it encodes a batch, another
    thread may continue with the file.
    """

    def __init__(self, job: Job, bar: Any) -> None:
        self.streams = [_Stream(job, number) for number in range(len(job.inputs))]
        self._bar, self._limit, self._n_read = bar, job.rows_limit, Counter[str]()

    def batches(self, crew: Crew) -> Iterator[tuple[_Stream, pa.RecordBatch]]:
        """This thread's batches."""
        while waiting := [s for s in self.streams if not s.is_over][: crew.size]:
            crew.check()
            stream = next((s for s in waiting if s.lock.acquire(blocking=False)), None)
            if stream is None:
                stream = waiting[0]
                stream.lock.acquire()
            try:
                batch = None if stream.is_over else self._cut(stream, stream.read(self._bar))
            finally:
                stream.lock.release()
            if batch is not None:
                yield stream, batch

    def _cut(self, stream: _Stream, batch: pa.RecordBatch | None) -> pa.RecordBatch | None:
        """Cuts a batch to the rows still wanted from the files of its setting."""
        if batch is None or self._limit is None:
            return batch
        batch = batch.slice(0, self._limit - self._n_read[stream.setting])
        self._n_read[stream.setting] += batch.num_rows
        for other in self.streams:
            other.is_over |= self._n_read[other.setting] == self._limit
        return batch


@dataclass
class ReadFacts:
    """Facts collected by a reader of rows.

    Attributes:
        kept: by `label_of` the files' setting: number of rows, and of rows not rated below
            ``min_rating``.
        times: statistics of the rows' times, if they have times.
        dropped: number of dropped rows, by reason.
        clocks: statistics of other times that fields derive values from, by field.
    """

    kept: dict[str, Int64Array]
    times: TimeColumn | None
    dropped: Counter[str]
    clocks: dict[str, TimeColumn] = field(default_factory=dict)

    @classmethod
    def zeros(cls, job: Job) -> "ReadFacts":
        """Empty facts."""
        time = job.data.interactions.time
        kept = {name: np.zeros(2, np.int64) for _, name, _ in job.inputs}
        return cls(kept, None if time is None else TimeColumn(time), Counter())

    def __add__(self, other: "ReadFacts") -> "ReadFacts":
        times = self.times
        if times is not None and other.times is not None:
            times = times + other.times
        kept = {name: rows + other.kept[name] for name, rows in self.kept.items()}
        clocks = self.clocks | {
            name: self.clocks[name] + clock if name in self.clocks else clock
            for name, clock in other.clocks.items()
        }
        return ReadFacts(kept, times, self.dropped + other.dropped, clocks)

    def add_clock(self, feature: Feature, cells: pa.Array, file: str) -> None:
        """Adds the cells of a field that derives values from times."""
        clock = self.clocks.setdefault(feature.name, _clock_of(feature))
        clock.add(times_of(cells, feature), file)

    def check(self, job: Job) -> None:
        """Checks and reports the joined facts of all readers.

        Raises:
            DataError: no row of a setting's files is left, or times mix two notations.
        """
        for name, (n_rows, n_positive) in self.kept.items():
            _check_some_have_rows(job, name, self.dropped[_without_rows(name)])
            if n_positive == 0:
                raise DataError(self._nothing_left(job, name, int(n_rows)))
            log.info("read %s: %s", name, plural(n_rows, "row"))
        if self.times is not None:
            self.times.check()
            _warn_of(self.times)
        for name in sorted(self.clocks):
            _warn_of(self.clocks[name])

    def _nothing_left(self, job: Job, name: str, n_rows: int) -> str:
        least = job.data.interactions.min_rating
        starts = {f"{file.pattern}: " for file in job.files[name]}
        what = (
            f"no row is rated {least:g} or more; lower interactions.min_rating"
            if n_rows and least is not None
            else "no usable row is left"
        )
        lost = [
            f"{n:,} {reason.removeprefix(start)}"
            for reason, n in self.dropped.items()
            for start in starts
            if reason.startswith(start)
        ]
        return f"{name}: {what}" + (f"; dropped: {', '.join(lost)}" if lost else "")


def _clock_of(feature: Feature) -> TimeColumn:
    return TimeColumn(feature.column or feature.name, feature=feature.name)


def _warn_of(times: TimeColumn) -> None:
    for text in times.warnings():
        log.warning("%s", text)


class RowCoder:
    """Encodes and partitions rows, for one thread or one cluster task.

    Args:
        job: the preparation.
        spill: receives the rows by partition.

    Attributes:
        codes: this reader's codes of each vocabulary's texts.
        spill: its coded rows.
        facts: about its input.
    """

    def __init__(self, job: Job, spill: Spill) -> None:
        self._job, self.spill = job, spill
        self.codes = {name: Codes() for name in vocabularies_of_rows(job)}
        self.facts = ReadFacts.zeros(job)
        self._clocks = _other_times(job)

    def add(self, batch: pa.RecordBatch, number: int) -> None:
        """Adds rows of a file, given by its index in ``job.inputs``."""
        file, name, part = self._job.inputs[number]
        if self.facts.times is not None:
            self.facts.times.add(batch["time"], file.name)
            self.facts.times.check()
        for feature in self._clocks:
            self.facts.add_clock(feature, batch[f"field {feature.name}"], file.name)
        rated = self._job.data.interactions.rating is not None
        for piece in self._pieces(batch):
            rows = self._coded(self._labelled(piece, name), part)
            self.spill.add(rows, self._partitions(rows))
            n = rows.num_rows
            n_positive = int(np.asarray(rows["label"]).sum()) if rated else n
            self.facts.kept[name] += np.array([n, n_positive])

    def _pieces(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The batch in pieces: expanded impressions take many times its memory."""
        if self._job.data.interactions.impressions is None:
            yield batch
            return
        for begin in range(0, batch.num_rows, _IMPRESSIONS):
            yield exploded(batch.slice(begin, _IMPRESSIONS))

    def _labelled(self, batch: pa.RecordBatch, name: str) -> pa.RecordBatch:
        """With several labels, the rows that have any; counts the others."""
        targets = self._job.data.interactions.labels
        if not targets:
            return batch
        known = [np.asarray(batch[f"{LABEL_OF}{target}"].is_valid()) for target in targets]
        labelled = np.logical_or.reduce(known)
        if labelled.all():
            return batch
        self.facts.dropped[f"{name}: rows without any of {', '.join(targets)}"] += int(
            (~labelled).sum()
        )
        return batch.filter(pa.array(labelled))

    def no_rows(self) -> pa.RecordBatch:
        """An empty table with the columns of the spill."""
        columns = row_columns(self._job.data, with_split=True)
        empty = {c.key: pa.array([], c.arrow_type) for c in columns}
        batch = pa.RecordBatch.from_pydict(empty)
        if self._job.data.interactions.impressions is not None:
            batch = exploded(batch)
        return self._coded(batch, OPEN)

    def _coded(self, batch: pa.RecordBatch, part: int) -> pa.RecordBatch:
        """The columns for later steps, with ids and texts as codes."""
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
        if spec.labels:
            columns |= {n: pa.array(v) for n, v in labels_of(batch, spec.labels).items()}
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
        """Buckets of rows without users, by a hash of their cells."""
        hashes = {
            column: np.append(self.codes[name].hashes, np.uint64(0))
            for column, name in coded_columns(self._job).items()
        }
        values = {name: from_arrow(cells) for name, cells in columns.items()}
        return buckets_of(content_hashes(values, np.arange(n), hashes)).astype(np.int16)

    def _partitions(self, rows: pa.RecordBatch) -> npt.NDArray[np.integer]:
        """Partition of each row, by the bucket of its user or else its own."""
        n, n_partitions = rows.num_rows, self._job.n_partitions
        if n_partitions == 1:
            return np.zeros(n, np.int32)
        if "user" in self._job.entities:
            hashes = self.codes[entity_key("user")].hashes.take(np.asarray(rows["user"]))
            return partitions_of(buckets_of(hashes), n_partitions).astype(np.int32)
        return partitions_of(np.asarray(rows["bucket"], np.int64), n_partitions).astype(np.int32)


class ThreadReader:
    """Reads one thread's share of the files. All threads.

    Attributes:
        coder: this thread's coded rows.
        side_files: fields in separate files; read by the first thread only.
        time_scale: factor that makes the times of all threads integers.

    Raises:
        DataError: an input cannot be read or leaves no row.
    """

    def __init__(self, job: Job) -> None:
        in_memory = job.n_partitions == 1
        spill = Spill(None if in_memory else rows_path(job, job.crew.rank), job.n_partitions)
        self.coder = RowCoder(job, spill)
        text_bytes = sum(file.text_bytes for file, _, _ in job.inputs)
        with progress(text_bytes, "read", "B", job.crew.is_first) as bar:
            queue: _Queue = job.crew.broadcast(_Queue(job, bar) if job.crew.is_first else None)
            for stream, batch in queue.batches(job.crew):
                self.coder.add(batch, stream.number)
        job.crew.gather(None)  # all files are read
        spill.close()
        facts = self.coder.facts
        self.side_files: dict[str, SideFile] = {}
        if job.crew.is_first:
            for stream in queue.streams:
                facts.dropped.update(stream.dropped)
            self.side_files = read_side_files(job, self.coder.codes)
        first, *others = job.crew.gather(facts)
        together: ReadFacts = sum(others, first)
        if job.crew.is_first:
            together.check(job)
            job.dropped.update(together.dropped)
        job.crew.gather(None)  # raises if the check failed
        self.time_scale = 1 if together.times is None else together.times.scale


def _other_times(job: Job) -> list[Feature]:
    """Row fields that derive values from times, one per column and its formats."""
    spec = job.data.interactions
    known = {(spec.time, spec.time_formats)}
    fields = []
    for feature in job.row_fields:
        source = (feature.column or feature.name, feature.time_formats)
        if feature.derives_time and source not in known:
            known.add(source)
            fields.append(feature)
    return fields


def vocabularies_of_rows(job: Job) -> list[str]:
    """Names of the vocabularies with texts in the input, `entity_key` first."""
    tables = {f.table_name for f in job.data.features if f.has_vocabulary and not f.is_id}
    return [*map(entity_key, job.entities), *sorted(tables)]


def read_side_files(job: Job, codes: Mapping[str, Codes]) -> dict[str, SideFile]:
    """Reads the fields of users and items in separate files, by name.

    Args:
        job: the preparation.
        codes: the codes of each vocabulary; extended.
    """
    return {f.name: _side_file(job, f, codes) for f in job.data.features if f.file}


def _side_file(job: Job, feature: Feature, codes: Mapping[str, Codes]) -> SideFile:
    assert feature.file is not None
    key = feature.key or getattr(job.data.interactions, feature.entity)
    if feature.npy is not None:
        return _side_arrays(job, feature, key)
    table = side_table(job, label_of(feature.file), [Column(key), column_of(feature)])
    keys = table[key].combine_chunks()
    if feature.kind == "vector":
        assert feature.dim is not None
        return SideFile(keys, vectors_in(table[column_of(feature).key], feature.dim))
    cells = table[column_of(feature).key].combine_chunks()
    if feature.kind == "numeric":
        return SideFile(keys, numbers_of(cells, feature))
    if feature.derives_time:
        clock = _clock_of(feature)
        clock.add(times_of(cells, feature), label_of(feature.file))
        _warn_of(clock)
    owners, texts = split_cells(cells, feature)
    if feature.has_vocabulary:
        numbers = codes[feature.table_name].encode(texts)
    else:
        numbers = hashed_rows(texts, feature)
    return SideFile(keys, Jagged.from_pairs(owners, numbers, len(keys)))


def _side_arrays(job: Job, feature: Feature, key: str) -> SideFile:
    """A field of vectors in NumPy files next to a file of ids."""
    assert feature.file is not None and feature.npy is not None and feature.dim is not None
    name = label_of(feature.npy)
    ids = Column(key, required=False)  # an empty id keeps its row
    keys = side_table(job, label_of(feature.file), [ids])[key].combine_chunks()
    vectors, n_bad = read_vectors(
        job.files[name],
        label_of(feature.file),
        len(keys),
        feature.dim,
        skip_bad=job.data.on_bad_row == "skip",
    )
    job.drop(f"{name}: vectors with NaN or infinity", n_bad)
    return SideFile(keys.fill_null(""), vectors)


def rows_path(job: Job, rank: int) -> Path:
    """Path of a rank's spilled rows."""
    return job.spill(f"rows-{rank}.arrow")


def side_table(job: Job, name: str, columns: Sequence[Column]) -> pa.Table:
    """Reads columns of a file of users or items."""
    dropped: Counter[str] = Counter()
    schema = pa.schema([(c.key, c.arrow_type) for c in columns])
    batches = [b for file in job.files[name] for b in _batches(job, file, name, columns, dropped)]
    _check_some_have_rows(job, name, dropped[_without_rows(name)])
    also_rows = name in {name_of_rows for _, name_of_rows, _ in job.inputs}
    for reason, count in dropped.items():  # count a file only once if several fields read it
        label = f"{reason}, read for users and items" if also_rows else reason
        job.dropped[label] = max(job.dropped[label], count)
    return pa.Table.from_batches(batches, schema)


def row_batches(job: Job, number: int, dropped: Counter[str]) -> Iterator[pa.RecordBatch]:
    """Reads the rows of a file of ``job.inputs``; counts dropped rows."""
    file, name, part = job.inputs[number]
    return _batches(job, file, name, row_columns(job.data, with_split=part == OPEN), dropped)


def _batches(
    job: Job, file: InputFile, name: str, columns: Sequence[Column], dropped: Counter[str]
) -> Iterator[pa.RecordBatch]:
    """A file's rows; an empty file among several is skipped and counted."""
    layout, on_bad_row = job.data.files.get(file.pattern), job.data.on_bad_row
    try:
        yield from read_batches(
            file.path, columns, layout, on_bad_row, dropped, file.pattern, groups=file.groups
        )
    except EmptyFile:
        if len(job.files[name]) == 1:
            raise
        dropped[_without_rows(name)] += 1
    except MissingColumnError as error:
        other = None if error.cure is None else _other_file_with(error.column, job, file, name)
        more = "" if other is None else f"; {other.name} has it: {error.cure}"
        raise DataError(f"{error}{more}") from None


def _other_file_with(column: str, job: Job, file: InputFile, name: str) -> InputFile | None:
    """Finds another file of the setting that has the column."""
    for other in job.files[name][:_MOST_FILES]:
        with suppress(DataError):
            layout = job.data.files.get(other.pattern)
            if other.path != file.path and column in column_names(other.path, layout):
                return other
    return None


def _without_rows(name: str) -> str:
    return f"{name}: files without rows"


def _check_some_have_rows(job: Job, name: str, n_empty: int) -> None:
    if n_empty == len(job.files[name]):
        raise DataError(f"{name}: {plural(n_empty, 'file')} without a row")
