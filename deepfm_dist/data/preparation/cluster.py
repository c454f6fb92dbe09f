"""Preparation on a cluster: the steps of `local` as tasks per file and per partition.

Tasks call the same functions as threads, so the dataset is byte-identical. Rows move between tasks
through the engine, never through the driver. The driver holds what the first thread holds in
`local`: all distinct ids and values, and counts by id; histories on its disk.

1. `_read`: a file, or some row groups of a large Parquet file -> its rows by partition, with the
   texts of their ids and values.
2. `_merge`: the distinct texts in a range of hashes; the driver numbers all of them.
3. `_load`: a partition's rows -> codes of texts, without repeated rows, in order; `_select` keeps
   the rows that remain if rare users and items are dropped or users held out.
4. `_count_digits`: histograms of the keys, from which the driver finds where held-out rows begin.
5. `_count`: splits of rows, and statistics of training rows; the driver fits.
6. `_write`: the partition's files, and its users' histories.

Tasks are pure functions of their input, so they can be rerun. This module knows no engine;
`launch/spark_prepare.py` provides Spark.
"""

import logging
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.codes import Codes, Hashes, hash_texts
from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged, from_arrow, to_arrow
from deepfm_dist.data.layout import footer_sums
from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.preparation.counts import Counts, Splitter, no_tables
from deepfm_dist.data.preparation.fitting import Fitter, PreviousDataset
from deepfm_dist.data.preparation.histories import HistoryWriter
from deepfm_dist.data.preparation.job import Job, buckets_of, entity_key, partitions_of
from deepfm_dist.data.preparation.local import finish
from deepfm_dist.data.preparation.merge import CodeMap, merge_vocabularies
from deepfm_dist.data.preparation.partitions import Partitions, mapped_side_files
from deepfm_dist.data.preparation.population import (
    Population,
    UserKeys,
    check_users_remain,
    drops_items,
    drops_users,
    holds_out_users,
    item_counts,
)
from deepfm_dist.data.preparation.reading import (
    ReadFacts,
    RowCoder,
    read_side_files,
    row_batches,
    vocabularies_of_rows,
)
from deepfm_dist.data.preparation.rules import coded_columns
from deepfm_dist.data.preparation.spill import PartitionRows, Spill
from deepfm_dist.data.preparation.split import DIGITS, FIRST_DIGIT, Digit, split_bounds
from deepfm_dist.data.preparation.write_plan import WritePlan
from deepfm_dist.data.preparation.writing import RowWriter, WriteResult, carry
from deepfm_dist.data.sources import InputFile, in_pieces
from deepfm_dist.errors import DataError, DeepFMError
from deepfm_dist.storage import (
    atomic_write,
    delete_tree,
    folder_of,
    is_remote,
    storage_errors_to_user,
)

log = logging.getLogger(__name__)
_BATCHES_AT_ONCE = 4
"""Number of a file's blocks that a task holds before it passes on their rows."""
_PIECE_BYTES = 4 << 20
_READ_BYTES = 64 << 20
"""Minimum uncompressed bytes of a Parquet file per task."""
_SHARED = "_shared"
"""A folder next to the dataset's files for the driver's input to tasks."""
_COUNTS_AT_ONCE = 64
_ADDING_TASKS = 16


@dataclass(frozen=True)
class Record:
    """A piece of data passed between tasks and the driver.

    Attributes:
        kind: the kind of the data.
        key: the partition, file or range of hashes that it belongs to.
        source: distinguishes objects of the same kind and key.
        piece: index among the pieces of an object.
        more: whether another piece follows.
        payload: the pickled object.
    """

    kind: str
    key: int
    source: int
    piece: int
    more: bool
    payload: bytes


Task = Callable[[Iterator[Record]], Iterator[Record]]
ARROW_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("key", pa.int64()),
        ("source", pa.int64()),
        ("piece", pa.int32()),
        ("more", pa.bool_()),
        ("payload", pa.binary()),
    ]
)
"""Schema of records, for engines that move Arrow batches."""
BATCH_RECORDS = 16
"""Records per batch, each of at most `_PIECE_BYTES`."""


def in_arrow(task: Task, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs a task on the records of a partition as Arrow batches."""
    given = (Record(**row) for batch in batches for row in batch.to_pylist())
    waiting: list[dict[str, Any]] = []
    for record in task(given):
        waiting.append(vars(record))
        if len(waiting) == BATCH_RECORDS:
            yield pa.RecordBatch.from_pylist(waiting, ARROW_SCHEMA)
            waiting = []
    yield pa.RecordBatch.from_pylist(waiting, ARROW_SCHEMA)


class Records(Protocol):
    """A partitioned collection of records on a cluster."""

    def map(self, task: Task) -> "Records":
        """Applies a task to the records of each partition."""

    def only(self, *kinds: str) -> "Records":
        """The records of some kinds, and errors."""

    def by_key(self, n: int) -> "Records":
        """Repartitions by key into ``n`` partitions, ordered by key, source and piece."""

    def kept(self) -> "Records":
        """The same records, computed once and persisted on the cluster's disks."""

    def stream(self) -> Iterator[Record]:
        """Streams all records to the driver; for persisted ones."""

    def collect(self) -> Iterator[Record]:
        """All records at once; for few and small ones."""

    def release(self) -> None:
        """Releases persisted records."""


class Engine(Protocol):
    """Runs tasks."""

    def numbers(self, n: int) -> Records:
        """One empty record per key from 0 to ``n - 1``, each in its own partition."""

    def share(self, value: Any) -> Callable[[], Any]:
        """Makes a value available to every task."""


def prepare_on(engine: Engine, job: Job, wanted: str, folder: Path | None = None) -> Manifest:
    """Prepares a dataset with tasks on a cluster.

    Args:
        engine: runs the tasks.
        job: the preparation; the driver writes vocabularies, users, items and the manifest into its
            folder.
        wanted: fingerprint of the dataset.
        folder: where tasks write rows if not into the job's folder, such as a URL.

    Raises:
        DataError: an input cannot be read or used.
    """
    driver = _Driver(engine, job, wanted, job.folder if folder is None else folder)
    try:
        return driver.prepare()
    finally:
        driver.clear()


class _Driver:
    """The driver's side of all steps."""

    def __init__(self, engine: Engine, job: Job, wanted: str, folder: Path) -> None:
        self._engine, self._job, self._wanted = engine, job, wanted
        # Tasks have separate working folders.
        self._folder = str(folder if is_remote(folder) else folder.absolute())
        self._shared_folder = folder / _SHARED
        delete_tree(self._shared_folder)  # left by a killed driver
        pieces = {
            name: [piece for file in files for piece in in_pieces(_absolute(file), _READ_BYTES)]
            for name, files in job.files.items()
        }
        task_job = job.for_task(pieces)
        self._n_inputs = len(task_job.inputs)
        self._task_job = engine.share(task_job)
        self._kept: list[Records] = []
        with atomic_write(self._shared_folder / "fingerprint") as file:
            file.write_text(wanted)

    def prepare(self) -> Manifest:
        """Runs all steps."""
        job, earlier = self._job, PreviousDataset(self._job.earlier)
        task = partial(_read, self._task_job, self._folder, self._wanted)
        read = self._keep(self._engine.numbers(self._n_inputs).map(task))
        facts = self._facts(read)
        codes = self._texts(read)
        side_files = read_side_files(job, codes)
        ids, [code_map] = merge_vocabularies([codes], job.crew)
        side_files = mapped_side_files(job, side_files, code_map)
        time_scale = 1 if facts.times is None else facts.times.scale
        known = self._engine.share(_Known(ids, {n: hash_texts(t) for n, t in ids.items()}))
        loaded = self._keep(
            read.only("rows")
            .by_key(job.n_partitions)
            .map(partial(_load, self._task_job, known, time_scale))
        )
        read.release()
        first_user = self._users(loaded, ids)
        loaded = self._population(loaded, len(ids.get(entity_key("item"), ())))
        partitions = Partitions(job, _no_rows, ids, side_files, time_scale, in_memory=False)
        splitter = self._splitter(loaded)
        counts = self._counts(loaded, splitter, known, partitions, first_user)
        fit = Fitter(job, partitions, counts, earlier)
        plan = WritePlan.from_counts(job, counts, fit.fitted)
        n_users = fit.fitted.rows.get("user", 1)
        histories = HistoryWriter(n_users, plan.n_rare, job.n_user_groups, job.spill(""), job.crew)
        carry(histories, earlier, fit)
        written, sums = self._write(loaded, splitter, plan, first_user, histories)
        written.known.check(job, plan.trained, ids)
        return finish(
            job,
            self._wanted,
            counts,
            fit,
            plan,
            written,
            histories=histories,
            earlier=earlier,
            row_sums=sums,
        )

    def clear(self) -> None:
        """Releases what the cluster persists."""
        for records in self._kept:
            records.release()
        delete_tree(self._shared_folder)

    def _keep(self, records: Records) -> Records:
        kept = records.kept()
        self._kept.append(kept)
        return kept

    def _facts(self, read: Records) -> ReadFacts:
        """Checks the readers' facts and repeats their warnings."""
        records = sorted(read.only("facts", "warnings").collect(), key=lambda r: (r.key, r.kind))
        for _, text in _reassembled(record for record in records if record.kind == "warnings"):
            log.warning("%s", text)
        facts_of_files = _reassembled(record for record in records if record.kind != "warnings")
        first, *others = (facts for _, facts in facts_of_files)
        facts: ReadFacts = sum(others, first)
        facts.check(self._job)
        self._job.dropped.update(facts.dropped)
        return facts

    def _texts(self, read: Records) -> dict[str, Codes]:
        """The distinct texts of all vocabularies but the users', in any order."""
        user = entity_key("user")
        codes = {name: Codes() for name in vocabularies_of_rows(self._job) if name != user}
        merged = self._keep(read.only("texts").by_key(self._job.n_partitions).map(_merge))
        for _, texts in _reassembled(merged.stream()):
            for name, new_texts in texts.items():
                codes[name].encode(new_texts)
        merged.release()
        return codes

    def _users(self, loaded: Records, ids: dict[str, pa.Array]) -> Int64Array:
        """Adds the users' ids; returns their ``[partitions + 1]`` offsets by partition."""
        n_users = np.zeros(self._job.n_partitions + 1, np.int64)
        if "user" not in self._job.entities:
            return n_users
        by_partition: dict[int, pa.Array] = {}
        for record, texts in _reassembled(loaded.only("users").stream()):
            by_partition[record.key] = texts
            n_users[record.key + 1] = len(texts)
        in_order = pa.concat_arrays([by_partition[p] for p in sorted(by_partition)])
        others = dict(ids)
        ids.clear()  # in the order of `vocabularies_of_rows`
        ids |= {entity_key("user"): in_order} | others
        return np.cumsum(n_users)

    def _population(self, loaded: Records, n_items: int) -> Records:
        """Partitions with the remaining rows, if some users or items are excluded."""
        job, known = self._job, Population()
        with_users = loaded.only("part", "users")

        def items() -> Int64Array:
            task = partial(_count_items, self._task_job, self._engine.share(known))
            return self._summed(with_users.map(task), n_items)

        if drops_items(job):
            known = replace(known, item_rows=items())
        if holds_out_users(job):
            task = partial(_user_keys, self._task_job, self._engine.share(known))
            count = self._counting(self._keep(with_users.map(task)))
            n_users = int(count(FIRST_DIGIT).sum())
            check_users_remain(job, n_users)
            bounds = split_bounds(job.data.split, n_users, count, n_keys=1)
            known = replace(known, bounds=bounds)
            known = replace(known, trained_rows=items())
        if not (drops_items(job) or drops_users(job) or holds_out_users(job)):
            return loaded
        task = partial(_select, self._task_job, self._engine.share(known))
        selected = self._keep(with_users.map(task))
        for _, dropped in _reassembled(selected.only("dropped").stream()):
            job.dropped.update(dropped)
        loaded.release()
        return selected

    def _summed(self, counted: Records, n: int) -> Int64Array:
        """``[n]`` sums of `_sparse` results; with many partitions, tasks pre-aggregate them."""
        if self._job.n_partitions > _ADDING_TASKS:
            counted = counted.by_key(_ADDING_TASKS).map(_add_up)
        return _sum_of(counted.collect(), n)

    def _counting(self, keys: Records) -> Callable[[Digit], Int64Array]:
        """Sums `Digit.counts` over ``keys``."""

        @cache
        def count(digit: Digit) -> Int64Array:
            task = partial(_count_digits, digit)
            return self._summed(keys.map(task), DIGITS)

        return count

    def _splitter(self, loaded: Records) -> Splitter:
        splitter = Splitter(self._job)
        if not splitter.has_bounds:
            return splitter
        keys = self._keep(loaded.only("part").map(partial(_split_keys, self._task_job)))
        count = self._counting(keys)
        return splitter.with_bounds(int(count(FIRST_DIGIT).sum()), count)

    def _counts(
        self,
        loaded: Records,
        splitter: Splitter,
        known: Callable[[], "_Known"],
        partitions: Partitions,
        first_user: Int64Array,
    ) -> Counts:
        job = self._job
        task = partial(_count, self._task_job, known, splitter.bounds)
        counted = self._keep(loaded.only("part").map(task))
        total = Counts.zeros(job, *no_tables(job, partitions.ids))
        waiting: list[Counts] = []
        for record, (counts, tables, noted) in _reassembled(counted.stream()):
            _add_tables(total, tables, int(first_user[record.key]))
            for feature in job.row_fields:
                if feature.entity == "user" and feature.name in counts.of_entities:
                    values = counts.of_entities[feature.name]
                    values.entity = values.entity + np.int32(first_user[record.key])
            job.noted.update(noted)
            waiting.append(counts)
            if len(waiting) == _COUNTS_AT_ONCE:
                total = Counts.joined(job, [total, *waiting])
                waiting = []
        counted.release()
        total = Counts.joined(job, [total, *waiting])
        total.report(splitter)
        return total

    def _write(
        self,
        loaded: Records,
        splitter: Splitter,
        plan: WritePlan,
        first_user: Int64Array,
        histories: HistoryWriter,
    ) -> tuple[WriteResult, dict[str, int]]:
        """Writes the rows; also returns `footer_sums` of their files."""
        job = self._job
        if "user" in job.entities:
            for p in range(job.n_partitions):
                own = plan.for_users(int(first_user[p]), int(first_user[p + 1]))
                with atomic_write(_users_file(self._shared_folder, p)) as file:
                    file.write_bytes(pickle.dumps(_UserSlice.from_plan(own)))
            plan = plan.for_users(0, 0)
        task = partial(
            _write, self._task_job, self._engine.share(plan), splitter.bounds, self._folder
        )
        done = self._keep(loaded.only("part").map(task))
        written, sums = WriteResult.zeros(job), dict[str, int]()
        for record, value in _reassembled(done.stream()):
            if record.kind == "history":
                histories.add(*value)
                continue
            part, part_sums, noted = value
            shift = np.int32(first_user[record.key])
            for (split, entity), codes in part.known.unknown.items():
                if entity == "user":
                    part.known.unknown[split, entity] = codes + shift
            written = written + part
            sums |= part_sums
            job.noted.update(noted)
        done.release()
        return written, sums


@dataclass(frozen=True)
class _Known:
    """The texts of all vocabularies but the users', in the order of their hashes.

    Attributes:
        ids: the ids, by vocabulary.
        hashes: their hashes.
    """

    ids: dict[str, pa.Array]
    hashes: dict[str, Hashes]

    def codes(self, name: str, texts: pa.Array) -> Int32Array:
        """``[n]`` known texts of a vocabulary -> ``[n]`` int32 codes."""
        wanted = hash_texts(texts)
        places = np.searchsorted(self.hashes[name], wanted)
        open_ones = np.arange(len(places))
        while len(open_ones):  # texts with equal hashes are adjacent
            stored = self.ids[name].take(pa.array(places[open_ones]))
            differ = np.asarray(pc.not_equal(stored, texts.take(pa.array(open_ones))))
            open_ones = open_ones[differ]
            places[open_ones] += 1
        return places.astype(np.int32)

    def hashes_of(self, name: str) -> Hashes:
        """``[codes + 1]``: see `Partitions.hashes`."""
        return np.append(self.hashes[name], np.uint64(0))


@dataclass(frozen=True)
class _UserSlice:
    """The part of a `WritePlan` about the users of one partition."""

    row_of_code: Int32Array
    negative_user: Int32Array | None
    trained: Any

    @classmethod
    def from_plan(cls, plan: WritePlan) -> "_UserSlice":
        rows = plan.fitted.row_of_code[entity_key("user")]
        return cls(rows, plan.negative_user, plan.trained["user"])

    def put_into(self, plan: WritePlan) -> WritePlan:
        rows = plan.fitted.row_of_code | {entity_key("user"): self.row_of_code}
        return replace(
            plan,
            fitted=replace(plan.fitted, row_of_code=rows),
            negative_user=self.negative_user,
            trained=plan.trained | {"user": self.trained},
        )


def _absolute(file: InputFile) -> InputFile:
    return file if "://" in file.path else replace(file, path=str(Path(file.path).absolute()))


def _sum_of(records: Iterable[Record], n: int) -> Int64Array:
    """``[n]`` sums of `_sparse` results."""
    sums = np.zeros(n, np.int64)
    for _, (codes, counts) in _reassembled(records):
        sums[codes] += counts
    return sums


def _users_file(folder: Path, p: int) -> Path:
    return folder / f"users-{p:05d}"


def _no_rows(p: int) -> Any:
    raise AssertionError("the driver loads no partition")


def _add_tables(total: Counts, tables: Mapping[str, Any], first_user: int) -> None:
    """Adds a partition's ``(codes, counts)``, whose users are numbered from 0."""
    for name, (codes, counts) in tables.items():
        into = total.liked if name == "liked" else total.tables[name]
        into[codes + (first_user if name == entity_key("user") else 0)] += counts


# Tasks.


def _reporting(task: Callable[..., Iterator[Record]]) -> Callable[..., Iterator[Record]]:
    """Wraps a task so that user errors reach the driver as records and are not retried."""

    @wraps(task)
    def reported(*given: Any) -> Iterator[Record]:
        try:
            yield from task(*given)
        except DeepFMError as error:
            yield from _records("error", 0, error)

    return reported


def _records(kind: str, key: int, value: Any, source: int = 0) -> Iterator[Record]:
    data = pickle.dumps(value, protocol=5)
    for begin in range(0, len(data), _PIECE_BYTES):
        end = begin + _PIECE_BYTES
        yield Record(kind, key, source, begin // _PIECE_BYTES, end < len(data), data[begin:end])


def _reassembled(records: Iterable[Record]) -> Iterator[tuple[Record, Any]]:
    """Reassembles what `_records` cut into pieces; yields each object at its last piece.

    Raises:
        DeepFMError: a task failed with it.
    """
    pieces: list[bytes] = []
    for record in records:
        pieces.append(record.payload)
        if not record.more:
            value = pickle.loads(b"".join(pieces))
            pieces.clear()
            if record.kind == "error":
                raise value
            yield record, value


def _read(
    job_of: Callable[[], Job], folder: str, wanted: str, records: Iterator[Record]
) -> Iterator[Record]:
    """Numbers of files -> ``rows`` by partition, ``texts`` by range of hashes, ``facts``."""
    for record in records:
        with _recorded_warnings() as warnings:
            try:
                _check_shared(folder, wanted)
                yield from _read_file(job_of(), record.key)
            except DeepFMError as error:  # the driver names that of the first file
                yield from _records("error", record.key, error)
        for text in warnings:
            yield from _records("warnings", record.key, text)


def _check_shared(folder: str, wanted: str) -> None:
    """Checks first that tasks see files that the driver writes."""
    file = folder_of(folder) / _SHARED / "fingerprint"
    with storage_errors_to_user(file):
        if not (file.is_file() and file.read_text() == wanted):
            raise DataError(
                f"{folder}: a worker cannot see what the driver wrote there; use a disk that all "
                f"machines share, or a URL"
            )


def _read_file(shared: Job, number: int) -> Iterator[Record]:
    job, dropped = shared.for_task(), Counter[str]()
    coder = RowCoder(job, Spill(None, job.n_partitions))
    if number == 0:  # every partition gets files, even without rows
        empty = _bytes_of(pa.Table.from_batches([coder.no_rows()]))
        for p in range(job.n_partitions):
            yield from _records("rows", p, (empty, {}))
    first = (number << 32) + 1
    for place, batch in enumerate(row_batches(job, number, dropped)):
        if place and place % _BATCHES_AT_ONCE == 0:
            yield from _rows_by_partition(job, coder, first + place)
        coder.add(batch, number)
    yield from _rows_by_partition(job, coder, first)
    user = entity_key("user")
    others = {name: codes.texts() for name, codes in coder.codes.items() if name != user}
    yield from _by_hash(job, others, number)
    coder.facts.dropped.update(dropped)
    yield from _records("facts", number, coder.facts)


def _rows_by_partition(job: Job, coder: RowCoder, source: int) -> Iterator[Record]:
    """Yields and clears a reader's rows, by partition, with the texts of their codes."""
    spill, coder.spill = coder.spill, Spill(None, job.n_partitions)
    texts = {name: codes.texts() for name, codes in coder.codes.items()}
    for p in range(job.n_partitions):
        if batches := spill.read(p):
            table = pa.Table.from_batches(batches).combine_chunks()
            table, own = _with_own_codes(job, table, texts)
            yield from _records("rows", p, (_bytes_of(table), own), source)


def _bytes_of(table: pa.Table) -> bytes:
    """A table in Arrow's stream format: pickle would include all that a slice refers to."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _table(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _with_own_codes(
    job: Job, table: pa.Table, texts: Mapping[str, pa.Array]
) -> tuple[pa.Table, dict[str, pa.Array]]:
    """Rows recoded to the texts that occur in them, and these texts."""
    columns = coded_columns(job)
    own: dict[str, pa.Array] = {}
    for name in dict.fromkeys(columns.values()):
        of_name = [c for c, vocabulary in columns.items() if vocabulary == name]
        values = {column: from_arrow(table[column]) for column in of_name}
        flat = [v.values if isinstance(v, Jagged) else v for v in values.values()]
        codes = np.sort(np.concatenate(flat).astype(np.int32))  # np.unique is ten times slower
        used = codes[np.diff(codes, prepend=np.int32(-1)) != 0]  # -1 is no value
        own[name] = texts[name].take(pa.array(used))
        place = np.full(len(texts[name]) + 1, -1, np.int32)
        place[used] = np.arange(len(used), dtype=np.int32)
        for column, value in values.items():
            mapped = (
                Jagged(value.offsets, place[value.values])
                if isinstance(value, Jagged)
                else place[value]
            )
            at = table.column_names.index(column)
            table = table.set_column(at, column, to_arrow(mapped))
    return table, own


def _by_hash(job: Job, texts: Mapping[str, pa.Array], source: int) -> Iterator[Record]:
    """Texts by range of hashes: ``{vocabulary: texts}`` for each."""
    by_range: dict[int, dict[str, pa.Array]] = {}
    for name, of_name in texts.items():
        of_text = partitions_of(buckets_of(hash_texts(of_name)), job.n_partitions)
        for number in np.unique(of_text).tolist():
            mine = of_name.take(pa.array(np.flatnonzero(of_text == number)))
            by_range.setdefault(number, {})[name] = mine
    for number, of_names in by_range.items():
        yield from _records("texts", number, of_names, source)


@_reporting
def _merge(records: Iterator[Record]) -> Iterator[Record]:
    """``texts`` of several readers -> the distinct ones."""
    for key, things in groupby(_reassembled(records), lambda thing: thing[0].key):
        codes: dict[str, Codes] = {}
        for _, texts in things:
            for name, of_name in texts.items():
                codes.setdefault(name, Codes()).encode(of_name)
        yield from _records("texts", key, {name: c.texts() for name, c in codes.items()})


@_reporting
def _load(
    job_of: Callable[[], Job],
    known_of: Callable[[], _Known],
    time_scale: int,
    records: Iterator[Record],
) -> Iterator[Record]:
    """``rows`` of a partition -> its ``part`` and its ``users``."""
    job, known, user = job_of().for_task(), known_of(), entity_key("user")
    for p, things in groupby(_reassembled(records), lambda thing: thing[0].key):
        coded = [value for _, value in things]
        of_users: list[dict[str, Codes]] = [{user: Codes()} for _ in coded]
        maps: list[CodeMap] = []
        for own, (_, texts) in zip(of_users, coded, strict=True):
            own[user].encode(texts.get(user, pa.array([], pa.string())))
            others = {name: known.codes(name, t) for name, t in texts.items() if name != user}
            maps.append({name: np.append(codes, np.int32(-1)) for name, codes in others.items()})
        ids, user_maps = merge_vocabularies(of_users, job.crew)
        empty = dict.fromkeys(known.ids, np.full(1, -1, np.int32))
        tables = [
            (_table(table), empty | code_map | user_map)
            for (table, _), code_map, user_map in zip(coded, maps, user_maps, strict=True)
        ]
        partitions = Partitions(
            job,
            {p: tables}.__getitem__,
            {**ids, **known.ids},
            {},
            time_scale,
            in_memory=True,
            hashes={name: known.hashes_of(name) for name in known.ids},
        )
        part = partitions.load(p)
        yield from _records("part", p, part)
        yield from _records("users", p, ids[user])


def _with_users(records: Iterator[Record]) -> Iterator[tuple[int, PartitionRows, pa.Array]]:
    """Pairs each partition with its users' ids, which `_load` yields in turn."""
    part = None
    for record, value in _reassembled(records):
        if record.kind == "part":
            part = value
        elif part is not None:
            yield record.key, part, value


@_reporting
def _count_items(
    job_of: Callable[[], Job], known_of: Callable[[], Population], records: Iterator[Record]
) -> Iterator[Record]:
    """``part`` and ``users`` -> occurrences of each item, in training if splits are known."""
    for p, part, users in _with_users(records):
        part, user_parts = known_of().select(job_of().for_task(), part, hash_texts(users))
        n_items = int(part["item"].max(initial=-1)) + 1
        yield from _records("items", p, _sparse(item_counts(part, n_items, user_parts)))


@_reporting
def _user_keys(
    job_of: Callable[[], Job], known_of: Callable[[], Population], records: Iterator[Record]
) -> Iterator[Record]:
    """``part`` and ``users`` -> the ``keys`` by which users are held out."""
    for p, part, users in _with_users(records):
        job, hashes = job_of().for_task(), hash_texts(users)
        part, _ = known_of().select(job, part, hashes)
        yield from _records("keys", p, (UserKeys.from_partition(job, part, hashes).keys,))


@_reporting
def _select(
    job_of: Callable[[], Job], known_of: Callable[[], Population], records: Iterator[Record]
) -> Iterator[Record]:
    """``part`` and ``users`` -> the remaining ``part``, and ``dropped`` counts."""
    for p, part, users in _with_users(records):
        job = job_of().for_task()
        part, _ = known_of().select(job, part, hash_texts(users))
        yield from _records("part", p, part)
        yield from _records("dropped", p, job.dropped)


@_reporting
def _split_keys(job_of: Callable[[], Job], records: Iterator[Record]) -> Iterator[Record]:
    """``part`` -> the ``keys`` of its open rows."""
    splitter = Splitter(job_of().for_task())
    for record, part in _reassembled(records):
        yield from _records("keys", record.key, splitter.keyed(part))


def _sparse(counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Indices and values of non-zero entries."""
    there = np.flatnonzero(counts)
    return there, counts[there]


@_reporting
def _add_up(records: Iterator[Record]) -> Iterator[Record]:
    """Sums `_sparse` results of many partitions."""
    total = np.zeros(0, np.int64)
    key = None
    for record, (places, counts) in _reassembled(records):
        key = record.key
        more = int(places.max(initial=-1)) + 1 - len(total)
        total = np.append(total, np.zeros(max(0, more), np.int64))
        total[places] += counts
    if key is not None:
        yield from _records("sum", key, _sparse(total))


@_reporting
def _count_digits(digit: Digit, records: Iterator[Record]) -> Iterator[Record]:
    """``keys`` -> histograms of their next digits, non-zero counts only."""
    for record, keyed in _reassembled(records):
        yield from _records("digits", record.key, _sparse(digit.counts(keyed)))


@_reporting
def _count(
    job_of: Callable[[], Job],
    known_of: Callable[[], _Known],
    bounds: Any,
    records: Iterator[Record],
) -> Iterator[Record]:
    """``part`` -> its counts, those by code as ``(codes, counts)``."""
    known = known_of()
    for record, part in _reassembled(records):
        job, user = job_of().for_task(), entity_key("user")
        ids = {**known.ids, **({user: part.users} if "user" in job.entities else {})}
        counts = Counts.zeros(job, *no_tables(job, ids))
        counts.add(Splitter(job, bounds), known.hashes_of, record.key, part)
        tables = counts.tables | {"liked": counts.liked}
        sparse = {name: _sparse(table) for name, table in tables.items()}
        counts = replace(counts, tables={}, liked=np.zeros(0, np.int64))
        yield from _records("counts", record.key, (counts, sparse, job.noted))


class _Pairs:
    """Collects users' items, by kind of list."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Any, Int32Array]] = []

    def add(self, name: str, rows: Any, items: Int32Array) -> None:
        """See `HistoryWriter.add`."""
        self.added.append((name, rows, items))


@_reporting
def _write(
    job_of: Callable[[], Job],
    plan_of: Callable[[], WritePlan],
    bounds: Any,
    folder: str,
    records: Iterator[Record],
) -> Iterator[Record]:
    """``part`` -> its files, ``written`` counts, and the ``history`` of its users."""
    goal = folder_of(folder)
    for record, part in _reassembled(records):
        plan = plan_of()
        if len(part.users):
            own: _UserSlice = pickle.loads(_users_file(goal / _SHARED, record.key).read_bytes())
            plan = own.put_into(plan)
        with tempfile.TemporaryDirectory() as name:
            job = replace(job_of().for_task(), folder=Path(name))
            splitter, pairs = Splitter(job, bounds), _Pairs()
            for split in SPLITS:
                (job.folder / split).mkdir()
            writer = RowWriter(job, plan, pairs)
            parts = splitter.parts(part)
            writer.add(record.key, part, parts, splitter.low_parts(part, parts))
            sums = footer_sums(job.folder)
            for file in sums:  # a task that is rerun or runs twice writes the same
                with atomic_write(goal / file) as aside:
                    shutil.copyfile(job.folder / file, aside)
        yield from _records("written", record.key, (writer.written, sums, job.noted))
        for source, added in enumerate(pairs.added):
            yield from _records("history", record.key, added, source)


class _Hearing(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self._texts.append(record.getMessage())


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Collects the package's warnings for the driver to repeat."""
    texts: list[str] = []
    handler, logger = _Hearing(texts), logging.getLogger("deepfm_dist")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
