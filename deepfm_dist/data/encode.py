"""Input files -> a prepared dataset: split, fit vocabularies, write rows, entities, manifest.

Layout of ``prepared/<name>/``::

    manifest.json                what is here and where it came from; written last
    vocabulary/<table>.parquet   row, id, count
    entities/user.parquet        row r describes user r: id, fields as lists of rows, history
    entities/item.parquet        row r describes item r: id, fields, count, title
    entities/rare.parquet        histories of the users below min_count, who share row 0
    train/ valid/ test/          user, item, [label], [time], one column per context field

Rows stream through twice and are never held together. First they are read, their texts become
codes, and they are dealt to partitions by a hash of their user: on disk, unless all of them fit
one partition. A partition is small enough for memory and has all of its users' rows, so that
repeated rows, splits by user and histories are a matter of one partition; splits over all rows
need two numbers that histograms give. Then vocabularies and statistics are fitted on training rows
alone, and the partitions are written out as table rows.

Several ranks share the files, then the partitions. Nothing depends on how many there are, nor on
the sizes of blocks.
"""

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.codes import Codes, hash_texts
from deepfm_dist.data.counts import Counts, Firsts, summed
from deepfm_dist.data.crew import Crew
from deepfm_dist.data.fields import (
    NumericFit,
    coded,
    column_of,
    hashed_rows,
    in_rows,
    lookup_rows,
    numbers_of,
    row_columns,
    split_cells,
    table_names,
    transformed,
)
from deepfm_dist.data.histories import Histories, first_pairs
from deepfm_dist.data.jagged import (
    Int32Array,
    Int64Array,
    Jagged,
    Values,
    counted,
    from_arrow,
    grouped,
    offsets_of,
    taken,
    to_arrow,
)
from deepfm_dist.data.manifest import (
    FORMAT,
    Manifest,
    NumericSpec,
    SplitSpec,
    TableSpec,
    cuts_of,
    fingerprint,
    hash_of,
    input_files,
    versions,
)
from deepfm_dist.data.negatives import check_enough_unseen, draw_distinct, draw_per_positive
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.data.sources import Column, InputFile, read_batches, read_table
from deepfm_dist.data.spill import Part, Spill, read_spilled
from deepfm_dist.data.split import (
    SPLITS,
    TEST,
    TRAIN,
    VALID,
    Keyed,
    Parts,
    bounds_of,
    sort_groups,
    split_at,
    split_by_user,
)
from deepfm_dist.data.vocabulary import Vocabulary, id_order
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import derive_seed, permute

log = logging.getLogger(__name__)
PARTITION_BYTES = 128 << 20
"""Of input, as plain text, that one partition is meant for."""
MOST_PARTITIONS = 512
LANE_WINDOW_ROWS = 1 << 22
"""Rows that all lanes together hold in memory when they are streamed."""
HELD_OUT_GROUP_ROWS = 1 << 20
_FILE_BLOCK_ROWS = 1 << 16
_OPEN = -1


def prepare(
    data: DataConfig, root: str | Path, folder: Path, seed: int, crew: Crew | None = None
) -> Manifest:
    """Makes sure that ``folder`` holds the dataset that the configuration describes. All ranks.

    An unchanged dataset is reused; a changed input file or setting makes it anew. The folder
    appears whole or not at all: it is written aside and renamed.

    Args:
        data: files, features, split, negatives.
        root: folder of the input files, or its URL.
        folder: where the prepared dataset goes; of all ranks the same.
        seed: of splits, negatives and row order.
        crew: the ranks that share the work; default: this process alone.

    Returns:
        The manifest.

    Raises:
        DataError: an input cannot be read or used, or the folder cannot be written.
    """
    crew = crew or Crew()
    files = input_files(data, root)
    earlier = Manifest.read(Path(data.vocabulary_from)) if data.vocabulary_from else None
    wanted = fingerprint(data, files, seed, earlier.fingerprint if earlier else None)
    wanted = crew.first_says(wanted)
    current = crew.first_says(_current(folder, wanted) if crew.is_first else None)
    if current is not None:
        if crew.is_first:
            log.info("%s is up to date", folder)
        return current
    started = time.perf_counter()
    part = folder.with_name(f".{folder.name}.part-{crew.first_says(os.getpid())}")
    try:
        if crew.is_first:
            _remove_leftovers(folder)
            (part / "spill").mkdir(parents=True)
        crew.gather(None)
        manifest = _Preparation(data, files, seed, crew, part).write(wanted)
        if crew.is_first:
            shutil.rmtree(part / "spill")
            if folder.exists():
                shutil.rmtree(folder)
            part.rename(folder)
        crew.gather(None)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        if crew.is_first:
            shutil.rmtree(part, ignore_errors=True)
    if crew.is_first:
        _report(manifest, folder, time.perf_counter() - started)
    return manifest


def _current(folder: Path, wanted: str) -> Manifest | None:
    """The manifest, where the folder holds the dataset that is wanted."""
    if (folder / "manifest.json").is_file():
        try:
            manifest = Manifest.read(folder)
        except DataError:
            manifest = None
        if manifest is not None and manifest.fingerprint == wanted:
            return manifest
        log.info("%s is of other inputs or settings: preparing it anew", folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: holds files but no prepared dataset; delete it, or set data.name or "
            f"run.prepared_root to another folder"
        )
    return None


def _remove_leftovers(folder: Path) -> None:
    """Deletes what preparations of this folder left that were killed."""
    for part in folder.parent.glob(f".{folder.name}.part-*"):
        if not Path("/proc", part.name.rpartition("-")[2]).exists():
            shutil.rmtree(part, ignore_errors=True)


def _report(manifest: Manifest, folder: Path, seconds: float) -> None:
    for reason, count in manifest.dropped.items():
        log.info("dropped %s: %s", reason, f"{count:,}")
    for name in SPLITS[1:]:
        share = getattr(manifest.data.split, name)
        if share and manifest.splits[name].rows == 0 and not manifest.data.refit:
            log.info("the %s split is empty: split.%s=%g holds out no row", name, name, share)
    sizes = ", ".join(f"{name} {spec.rows:,}" for name, spec in manifest.splits.items())
    tables = ", ".join(f"{name} {spec.rows:,}" for name, spec in manifest.tables.items())
    log.info("%s: rows %s; tables %s (%.1f s)", folder, sizes, tables, seconds)


@dataclass
class _SideFile:
    """A field of users or items in a file of its own: the file's ids, and their values."""

    keys: pa.Array
    values: Values


@dataclass
class _Fitted:
    """What rank 0 fits and all need."""

    row_of_code: dict[str, Int32Array]
    numeric: dict[str, NumericSpec]
    entity_rows: dict[str, int]


def _of_entity(name: str) -> str:
    return f"entity {name}"


class _Preparation:
    """The steps of one preparation, in order."""

    def __init__(
        self,
        data: DataConfig,
        files: dict[str, list[InputFile]],
        seed: int,
        crew: Crew,
        folder: Path,
    ) -> None:
        self.data, self.files, self.seed, self.crew, self.folder = data, files, seed, crew, folder
        self.dropped: Counter[str] = Counter()
        rows = data.interactions
        self.entities = [name for name in ("user", "item") if getattr(rows, name) is not None]
        self.of_rows = in_rows(data)
        tables = {f.table_name for f in data.features if f.has_vocabulary and not f.is_id}
        self.codes = {name: Codes() for name in [*map(_of_entity, self.entities), *sorted(tables)]}
        self.inputs = self._inputs()
        text_bytes = sum(file.text_bytes for file, _, _ in self.inputs)
        self.n_parts = min(MOST_PARTITIONS, max(1, -(-text_bytes // PARTITION_BYTES)))
        self.mine = range(crew.rank, self.n_parts, crew.size)
        self.in_memory = self.n_parts == 1 and crew.size == 1
        self.earlier: Manifest | None = None
        if data.vocabulary_from is not None:
            self.earlier = Manifest.read(Path(data.vocabulary_from))
        self._cached: Part | None = None
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self.vocabularies: dict[str, Vocabulary] = {}

    def write(self, wanted: str) -> Manifest:
        """Runs all steps and writes the dataset into an empty folder."""
        self._read()
        self._unite()
        self._split()
        fitted = self._fit()
        splits = self._write_rows(fitted)
        of_others = self.crew.gather(self.dropped)[1:]
        manifest = None
        if self.crew.is_first:
            self._write_entities(fitted)
            self.dropped = sum(of_others, self.dropped)
            manifest = self._manifest(wanted, splits, fitted)
            manifest.write(self.folder)
        return self.crew.first_says(manifest)

    # -- read: files -> codes, in partitions ----------------------------------------------------

    def _inputs(self) -> list[tuple[InputFile, str, int]]:
        """Every file of rows, the name it goes by in the configuration, and its split."""
        split = self.data.split
        names = [
            (self.data.interactions.file, _OPEN),
            (split.valid_file, VALID),
            (split.test_file, TEST),
        ]
        return [(f, name, part) for name, part in names if name for f in self.files[name]]

    def _read(self) -> None:
        path = None if self.in_memory else self._spill_path(self.crew.rank)
        self.spill = Spill(path, self.n_parts)
        self.n_read = 0
        self.n_open = 0
        kept = Counter({name: 0 for _, name, _ in self.inputs})
        sizes = offsets_of([file.text_bytes for file, _, _ in self.inputs])
        for number, (file, name, part) in enumerate(self.inputs):
            middle = (sizes[number] + sizes[number + 1]) // 2
            if middle * self.crew.size // (sizes[-1] + 1) != self.crew.rank:
                continue
            columns = row_columns(self.data, with_split=part == _OPEN)
            in_file = 0
            layout = self.data.files.get(name)
            for batch in read_batches(
                file.path, columns, layout, self.data.on_bad_row, self.dropped
            ):
                in_file += self._take_in(batch, part, number, in_file)
            kept[name] += in_file
            if part == _OPEN and self.data.interactions.split is None:
                self.n_open += in_file
        self.spill.close()
        self.side_files = {}
        if self.crew.is_first:
            self.side_files = {f.name: self._side_file(f) for f in self.data.features if f.file}
        totals = sum(self.crew.gather(kept), Counter(dict.fromkeys(kept, 0)))
        for name in kept:
            if totals[name] == 0:
                least = self.data.interactions.min_rating
                raise DataError(
                    f"{name}: no usable row is left"
                    if least is None
                    else f"{name}: no row is rated {least:g} or more; lower interactions.min_rating"
                )
            if self.crew.is_first:
                log.info("read %s: %s rows", name, f"{totals[name]:,}")

    def _spill_path(self, rank: int) -> Path:
        return self.folder / "spill" / f"rows-{rank}.arrow"

    def _take_in(self, batch: pa.RecordBatch, part: int, file_number: int, in_file: int) -> int:
        """Encodes and spills a batch; returns how many of its rows are of use."""
        spec = self.data.interactions
        if spec.rating is not None:
            low = np.asarray(batch[spec.rating]) < spec.min_rating
            self._count(f"rows rated below {spec.min_rating:g}", int(low.sum()))
            batch = batch.filter(pa.array(~low))
        n = batch.num_rows
        names, arrays = ["row"], [pa.array(np.arange(self.n_read, self.n_read + n))]
        for name in self.entities:
            names.append(name)
            codes = self.codes[_of_entity(name)].encode(batch[getattr(spec, name)])
            arrays.append(pa.array(codes))
        if spec.label is not None:
            names.append("label")
            arrays.append(batch[spec.label])
        if part != _OPEN or spec.split is not None or self._has_given:
            given = np.full(n, part, np.int8)
            if part == _OPEN and spec.split is not None:
                given = np.asarray(batch[spec.split])
            names.append("given")
            arrays.append(pa.array(given))
        if spec.time is not None:
            names.append("time")
            arrays.append(batch[spec.time])
        for feature in self.of_rows:
            names.append(f"field {feature.name}")
            arrays.append(to_arrow(self._raw(batch[column_of(feature).name], feature)))
        self.spill.add(
            pa.RecordBatch.from_arrays(arrays, names),
            self._partitions(arrays, file_number, in_file, n),
        )
        self.n_read += n
        return n

    @property
    def _has_given(self) -> bool:
        split = self.data.split
        return split.valid_file is not None or split.test_file is not None

    def _raw(self, cells: pa.Array, feature: Feature) -> Values:
        if feature.kind == "numeric":
            return numbers_of(cells, feature)
        return coded(
            cells, feature, self.codes[feature.table_name] if feature.has_vocabulary else None
        )

    def _partitions(
        self, arrays: Sequence[pa.Array], file_number: int, in_file: int, n: int
    ) -> npt.NDArray[np.integer]:
        """Partition of each row: by its user, else by blocks of its file."""
        if self.n_parts == 1:
            return np.zeros(n, np.int32)
        if "user" in self.entities:
            hashes = self.codes[_of_entity("user")].hashes
            return (hashes % np.uint64(self.n_parts)).astype(np.int32)[np.asarray(arrays[1])]
        blocks, inverse = np.unique(
            np.arange(in_file, in_file + n) // _FILE_BLOCK_ROWS, return_inverse=True
        )
        dealt = [derive_seed(file_number, int(block)) % self.n_parts for block in blocks]
        return np.array(dealt, np.int32)[inverse]

    def _side_file(self, feature: Feature) -> _SideFile:
        assert feature.file is not None
        key = feature.key or getattr(self.data.interactions, feature.entity)
        table = self._side_table(feature.file, [Column(key), column_of(feature)])
        keys, cells = table[key].combine_chunks(), table[column_of(feature).name].combine_chunks()
        if feature.kind == "numeric":
            return _SideFile(keys, numbers_of(cells, feature))
        owners, texts = split_cells(cells, feature)
        if feature.has_vocabulary:
            codes = self.codes[feature.table_name].encode(texts)
        else:
            codes = hashed_rows(texts, feature)
        return _SideFile(keys, Jagged.from_pairs(owners, codes, len(keys)))

    def _side_table(self, name: str, columns: Sequence[Column]) -> pa.Table:
        dropped: Counter[str] = Counter()
        layout = self.data.files.get(name)
        tables = [
            read_table(file.path, columns, layout, self.data.on_bad_row, dropped)
            for file in self.files[name]
        ]
        self.dropped |= dropped  # a file that several fields read counts once
        return pa.concat_tables(tables)

    def _count(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += count

    # -- unite: every rank's codes -> one numbering ----------------------------------------------

    def _unite(self) -> None:
        """Numbers the texts in `id_order`, whoever met them first."""
        mine = {name: codes.texts() for name, codes in self.codes.items()}
        said = self.crew.gather((mine, self.n_read, self.n_open, self.spill.places))
        self.ids: dict[str, pa.Array] = {}
        self.code_maps: list[dict[str, Int32Array]] = [{} for _ in said]
        for name in self.codes:
            union = self.codes[name] if self.crew.size == 1 else Codes()
            of_ranks = [union.encode(texts[name]) for texts, *_ in said]
            ids = union.texts()
            place = id_order(ids).astype(np.int32)
            order = np.empty_like(place)
            order[place] = np.arange(len(place), dtype=np.int32)
            self.ids[name] = ids.take(pa.array(order))
            for rank, codes in enumerate(of_ranks):
                self.code_maps[rank][name] = place[codes]
        self.codes.clear()
        self.first_row = offsets_of([n_read for _, n_read, _, _ in said])
        self.n_open = sum(n_open for *_, n_open, _ in said)
        self.places = [places for *_, places in said]
        for feature in self.data.features:
            side = self.side_files.get(feature.name)
            if side is not None and feature.has_vocabulary:
                side.values = _mapped(side.values, self.code_maps[0][feature.table_name])
        if "user" in self.entities:
            hashes = hash_texts(self.ids[_of_entity("user")])
            of_user = np.asarray(hashes % np.uint64(self.n_parts), np.int64)
            offsets, by_part = grouped(of_user, self.n_parts)
            self.members = Jagged(offsets, by_part.astype(np.int32))
            self.local: Int32Array = np.empty(len(of_user), np.int32)
            begins = np.repeat(offsets[:-1], np.diff(offsets))
            self.local[by_part] = (np.arange(len(by_part)) - begins).astype(np.int32)

    def _members(self, p: int) -> Int32Array:
        """Codes of a partition's users, ascending."""
        return self.members.values[self.members.offsets[p] : self.members.offsets[p + 1]]

    def _user_ids(self, p: int) -> pa.Array:
        return self.ids[_of_entity("user")].take(pa.array(self._members(p)))

    def _load(self, p: int) -> Part:
        """A partition, without repeated rows, with its fixed negatives."""
        if self._cached is not None:
            return self._cached
        part = self._spilled(p)
        if self.data.task == "implicit":
            assert part.local is not None
            assert part.item is not None
            n_items = len(self.ids[_of_entity("item")])
            offsets, order = grouped(part.local, len(self._members(p)))
            first = first_pairs(offsets, order, part.item, n_items)
            part = replace(part.where(first), repeated=int((~first).sum()))
            if self.data.on_bad_row == "skip":
                assert part.local is not None
                sizes = counted(part.local, len(self._members(p)))
                full = sizes[part.local] == n_items
                part = replace(part.where(~full), repeated=part.repeated, full=int(full.sum()))
            if self.data.negatives.fixed_per_user is not None:
                part = self._with_fixed_negatives(part, p)
        if self.n_parts == 1:  # several rounds go over it
            self._cached = part
        return part

    def _spilled(self, p: int) -> Part:
        found: list[Part] = []
        for rank, places in enumerate(self.places):
            if rank == self.crew.rank:
                batches = self.spill.read(p)
            else:
                batches = read_spilled(self._spill_path(rank), places[p])
            if batches:
                found.append(self._united(pa.Table.from_batches(batches), rank))
        return Part.joined(found or [self._united(self._no_rows(), 0)])

    def _no_rows(self) -> pa.Table:
        fields: list[tuple[str, pa.DataType]] = [("row", pa.int64())]
        fields += [(name, pa.int32()) for name in self.entities]
        if self.data.interactions.time:
            fields.append(("time", pa.int64()))
        for f in self.of_rows:
            several = pa.list_(pa.int32()) if f.multi_valued else pa.int32()
            fields.append((f"field {f.name}", pa.float32() if f.kind == "numeric" else several))
        return pa.schema(fields).empty_table()

    def _united(self, table: pa.Table, rank: int) -> Part:
        """One rank's rows of a partition in the numbering of all."""
        maps, names = self.code_maps[rank], table.column_names
        n = table.num_rows
        entities = {name: maps[_of_entity(name)][table[name].to_numpy()] for name in self.entities}
        fields = {}
        for feature in self.of_rows:
            values = from_arrow(table[f"field {feature.name}"])
            if feature.has_vocabulary:
                values = _mapped(values, maps[feature.table_name])
            fields[feature.name] = values
        user = entities.get("user")
        return Part(
            row=table["row"].to_numpy() + self.first_row[rank],
            user=user,
            item=entities.get("item"),
            local=None if user is None else self.local[user],
            label=table["label"].to_numpy() if "label" in names else np.ones(n, np.int8),
            given=table["given"].to_numpy() if "given" in names else np.full(n, _OPEN, np.int8),
            time=table["time"].to_numpy() if "time" in names else None,
            fields=fields,
        )

    def _with_fixed_negatives(self, part: Part, p: int) -> Part:
        per_user = self.data.negatives.fixed_per_user
        assert per_user is not None
        members, n_items = self._members(p), len(self.ids[_of_entity("item")])
        assert part.user is not None
        assert part.item is not None
        assert part.local is not None
        history = Jagged.from_pairs(part.local, part.item, len(members)).sorted()
        check_enough_unseen(
            per_user,
            history,
            np.arange(len(members)),
            n_items,
            "data.negatives.fixed_per_user",
            self._user_ids(p),
        )
        drawn = draw_distinct(
            per_user, history, n_items, derive_seed(self.seed, "fixed"), members.astype(np.int64)
        )
        users = np.repeat(members, per_user)
        slots = np.tile(np.arange(per_user), len(members))
        n = len(users)
        return Part(  # the schema allows no times and no fields in the rows beside these
            row=np.concatenate([part.row, self.n_open + users.astype(np.int64) * per_user + slots]),
            user=np.concatenate([part.user, users]),
            item=np.concatenate([part.item, drawn.ravel()]),
            local=np.concatenate([part.local, self.local[users]]),
            label=np.concatenate([part.label, np.zeros(n, np.int8)]),
            given=np.concatenate([part.given, np.full(n, _OPEN, np.int8)]),
            time=None,
            fields={},
            repeated=part.repeated,
            full=part.full,
        )

    # -- split: and what training rows say -------------------------------------------------------

    def _split(self) -> None:
        """Says where each row belongs, before anything is fitted, and counts training rows."""
        split = self.data.split
        per_user = self.data.negatives.fixed_per_user or 0
        self.n_shuffled = self.n_open + per_user * len(self.ids.get(_of_entity("user"), ()))
        self.bounds = None
        if split.method in ("random", "temporal") and self.n_open and not self.data.refit:
            for p in self.mine:
                part = self._load(p)
                still_open = part.given == _OPEN
                self._keep(p, "keys", self._keys(part)[still_open])
                self._keep(p, "row", part.row[still_open])
            n = int(self.crew.add_up(np.array([sum(len(k) for k, _ in self._keyed())]))[0])
            self.bounds = bounds_of(split, n, self._keyed, self.crew.add_up)
        self.counts = self._no_counts()
        for p in self.mine:
            part = self._load(p)
            parts = self._parts(part, p)
            self._keep(p, "parts", parts)
            self._add_counts(self.counts, part, parts, p)
        said = self.crew.gather(self.counts)
        self.counts = summed(said)
        if self.crew.is_first:
            self._count("repeated (user, item) rows", self.counts.repeated)
            self._count("rows of users who have seen every item", self.counts.full)
        if self._rows_of_split(TRAIN).sum() == 0:
            raise DataError(f"{self.data.interactions.file}: the split leaves no training rows")

    def _keep(self, p: int, name: str, array: npt.NDArray[Any]) -> None:
        if self.n_parts == 1:
            self._kept[name] = array
        else:
            np.save(self.folder / "spill" / f"{name}-{p}.npy", array)

    def _kept_at(self, p: int, name: str) -> Any:
        if self.n_parts == 1:
            return self._kept[name]
        return np.load(self.folder / "spill" / f"{name}-{p}.npy", mmap_mode="r")

    def _keyed(self) -> Iterator[Keyed]:
        for p in self.mine:
            yield self._kept_at(p, "keys"), self._kept_at(p, "row")

    def _keys(self, part: Part) -> Int64Array:
        """What rows are ordered by for the split: a shuffle, or the time."""
        if self.data.split.method in ("random", "per_user"):
            keys = np.full(len(part), -1, np.int64)
            at = part.given == _OPEN
            keys[at] = permute(part.row[at], self.n_shuffled, derive_seed(self.seed, "split"))
            return keys
        assert part.time is not None
        return part.time

    def _parts(self, part: Part, p: int) -> Parts:
        if self.data.refit:
            return np.zeros(len(part), np.int8)
        parts = part.given.copy()
        at = np.flatnonzero(parts == _OPEN)
        if len(at) == 0:
            return parts
        if self.bounds is not None:
            keyed = self._kept_at(p, "keys"), self._kept_at(p, "row")
            parts[at] = split_at(keyed, self.bounds)
        else:
            assert part.local is not None
            keys, n_users = self._keys(part)[at], len(self._members(p))
            parts[at] = split_by_user(self.data.split, part.local[at], n_users, keys)
        return parts

    def _no_counts(self) -> Counts:
        """Nothing counted yet; `NumericFit` of each numeric field that stands in context."""
        return Counts(
            tables={name: np.zeros(len(ids), np.int64) for name, ids in self.ids.items()},
            liked=np.zeros(len(self.ids.get(_of_entity("item"), ())), np.int64),
            numeric={
                f.name: NumericFit(f)
                for f in self.of_rows
                if f.kind == "numeric" and f.entity == "context"
            },
            firsts={},
        )

    def _add_counts(self, counts: Counts, part: Part, parts: Parts, p: int) -> None:
        at = np.flatnonzero(parts == TRAIN)
        for name in self.entities:
            table = counts.tables[_of_entity(name)]
            table += counted(getattr(part, name)[at], len(table))
        if part.item is not None:
            liked = part.item[at[part.label[at] == 1]]
            counts.liked += counted(liked, len(counts.liked))
        for feature in self.of_rows:
            values = taken(part.fields[feature.name], at)
            if feature.entity != "context":
                codes = getattr(part, feature.entity)[at]
                offsets, order = grouped(codes, len(self.ids[_of_entity(feature.entity)]))
                there = np.flatnonzero(np.diff(offsets))
                first = order[offsets[there]]
                found = Firsts(there.astype(np.int32), part.row[at[first]], taken(values, first))
                before = [counts.firsts[feature.name]] if feature.name in counts.firsts else []
                counts.firsts[feature.name] = Firsts.merged([*before, found])
            elif feature.kind == "numeric":
                assert not isinstance(values, Jagged)
                counts.numeric[feature.name].add(p, values.astype(np.float32))
            elif feature.has_vocabulary:
                flat = values.values if isinstance(values, Jagged) else values.astype(np.int32)
                table = counts.tables[feature.table_name]
                table += counted(flat, len(table))
        counts.rows[p] = np.bincount(parts, minlength=len(SPLITS))
        counts.positives[p] = np.bincount(parts[part.label == 1], minlength=len(SPLITS))
        counts.repeated += part.repeated
        counts.full += part.full

    def _rows_of_split(self, split: int) -> Int64Array:
        """``[partitions]``: rows of a split."""
        return np.array([self.counts.rows[p][split] for p in range(self.n_parts)])

    # -- fit -------------------------------------------------------------------------------------

    def _fit(self) -> _Fitted:
        """Vocabularies and statistics, on rank 0, for all."""
        fitted = None
        if self.crew.is_first:
            self.entity_vocabularies = {
                name: self._fit_vocabulary(_of_entity(name), self._min_count_of(name))
                for name in self.entities
            }
            self.entity_values, own_counts = self._entity_values()
            self.vocabularies = {}
            for table in table_names(self.data.features):
                features = [f for f in self.data.features if f.table_name == table and f.in_table]
                features = [f for f in features if f.history is None]
                if not features:  # a history's own
                    continue
                if features[0].is_id:
                    self.vocabularies[table] = self.entity_vocabularies[features[0].entity]
                elif features[0].has_vocabulary:
                    self.counts.tables[table] += own_counts.get(table, 0)
                    least = max(f.min_count for f in features)
                    self.vocabularies[table] = self._fit_vocabulary(table, least)
            self._fit_histories()
            numeric = {name: fit.spec() for name, fit in self.counts.numeric.items()}
            for feature in self.data.features:
                if feature.kind == "numeric" and feature.entity != "context":
                    fit = NumericFit(feature)
                    values = self.entity_values[feature.name]
                    assert not isinstance(values, Jagged)
                    fit.add(0, values[1:].astype(np.float32))
                    numeric[feature.name] = fit.spec()
            if self.earlier is not None:
                numeric |= {n: s for n, s in self.earlier.numeric.items() if n in numeric}
            lookups = {_of_entity(n): v for n, v in self.entity_vocabularies.items()}
            lookups |= {n: v for n, v in self.vocabularies.items() if n in self.ids}
            fitted = _Fitted(
                {name: v.lookup(self.ids[name]) for name, v in lookups.items()},
                numeric,
                {name: v.rows for name, v in self.entity_vocabularies.items()},
            )
        said: _Fitted = self.crew.first_says(fitted)
        return said

    def _fit_histories(self) -> None:
        """A history's table has the rows of that which its values belong to."""
        for feature in self.data.features:
            if feature.history is not None:
                source = self.data.source_of(feature)
                self.vocabularies[feature.table_name] = (
                    self.entity_vocabularies["item"]
                    if source.is_id
                    else self.vocabularies[source.table_name]
                )

    def _min_count_of(self, entity: str) -> int:
        ids = [f for f in self.data.features if f.entity == entity and f.is_id]
        return ids[0].min_count if ids else 1

    def _fit_vocabulary(self, name: str, min_count: int) -> Vocabulary:
        spread = name.removeprefix("entity ")
        return Vocabulary.fit(
            self.ids[name],
            self.counts.tables[name],
            min_count,
            derive_seed(self.seed, "rows", spread),
            self._earlier_vocabulary(name),
        )

    def _earlier_vocabulary(self, name: str) -> Vocabulary | None:
        if self.earlier is None:
            return None
        entity = name.removeprefix("entity ")
        if name.startswith("entity "):
            ids = self._earlier_column(entity, "id")
            if ids is None:
                return None
            return Vocabulary(ids.slice(1).combine_chunks(), np.zeros(len(ids) - 1, np.int64))
        if name not in self.earlier.tables:
            return None
        path = Path(self.data.vocabulary_from or "") / "vocabulary" / f"{name}.parquet"
        return Vocabulary.from_table(pq.read_table(path))

    def _entity_values(self) -> tuple[dict[str, Values], dict[str, Int64Array]]:
        """Raw values of the users' and items' fields by table row, and how often codes come."""
        values: dict[str, Values] = {}
        counts: dict[str, Int64Array] = {}
        for feature in self.data.features:
            if not feature.describes_entity:
                continue
            vocabulary = self.entity_vocabularies[feature.entity]
            if feature.names_entity:
                hashed = np.append(np.int32(0), hashed_rows(vocabulary.ids, feature))
                values[feature.name] = Jagged(np.arange(vocabulary.rows + 1), hashed)
                continue
            if feature.file is None:
                firsts = self.counts.firsts[feature.name]
                rows = vocabulary.lookup(self.ids[_of_entity(feature.entity)])[firsts.entity]
                found = firsts.values
            else:
                side = self.side_files[feature.name]
                rows = vocabulary.lookup(side.keys)
                reason = f"{feature.file} rows of {feature.entity}s without training rows"
                self.dropped |= Counter({reason: int((rows == 0).sum())})
                found = side.values
            known = np.flatnonzero(rows > 0)
            values[feature.name] = self._by_row(
                feature, rows[known], taken(found, known), vocabulary.rows
            )
            own = values[feature.name]
            if isinstance(own, Jagged) and feature.has_vocabulary:
                table = feature.table_name
                more = np.bincount(own.values, minlength=len(self.ids[table]))
                counts[table] = counts.get(table, 0) + more
        return values, counts

    def _by_row(self, feature: Feature, rows: Int32Array, found: Values, n: int) -> Values:
        """Values of some rows, in the order of the file -> one number or bag for each of ``n``."""
        if feature.kind == "numeric":
            assert not isinstance(found, Jagged)
            numbers = np.full(n, np.nan, np.float32)
            numbers[rows[::-1]] = found[::-1]  # backwards: the first line of an entity stays
            return numbers
        if not isinstance(found, Jagged):
            there = found >= 0
            found = Jagged(offsets_of(there), found[there].astype(np.int32))
        owners = np.repeat(rows, found.lengths).astype(np.int64)
        values = found.values
        pair = owners * (int(values.max(initial=0)) + 1) + values
        first = np.sort(np.unique(pair, return_index=True)[1])
        self._count(
            f"repeated {feature.name} values of one {feature.entity}", len(pair) - len(first)
        )
        owners, values = owners[first], values[first]
        bags = Jagged.from_pairs(owners, values, n)
        without = int((bags.lengths[1:] == 0).sum())
        if without:
            log.info("%s: %s %ss have none", feature.name, f"{without:,}", feature.entity)
        return bags if feature.multi_valued else bags.firsts()

    # -- write -----------------------------------------------------------------------------------

    def _write_rows(self, fitted: _Fitted) -> dict[str, SplitSpec]:
        """train/, valid/ and test/, a file for each partition; histories are put aside."""
        k = self.data.negatives.evaluation_per_positive
        labelled = self.data.task == "ctr" or self.data.negatives.fixed_per_user is not None
        if self.crew.is_first:
            for name in SPLITS:
                (self.folder / name).mkdir()
        self.crew.gather(None)
        n_train = int(self._rows_of_split(TRAIN).sum())
        self.lanes = self.data.lanes or _default_lanes(n_train)
        self.groups = self.lanes * -(-n_train // LANE_WINDOW_ROWS)
        first_of = [offsets_of(self._rows_of_split(split)) for split in range(len(SPLITS))]
        self._number_rare_users(fitted)
        self.histories = Histories(
            fitted.entity_rows.get("user", 1), self.n_rare, self.n_parts, self.folder, self.crew
        )
        before = self._earlier_column("user", "history")
        if self.crew.is_first and before is not None:
            bags = Jagged.from_arrow(before)
            self.histories.add(np.repeat(np.arange(len(bags)), bags.lengths), bags.values)
        sizes = np.zeros(len(SPLITS), np.int64)
        for p in self.mine:
            part, parts = self._load(p), np.asarray(self._kept_at(p, "parts"))
            known = None if labelled else self._known_items(part, p, fitted)
            columns = self._columns(part, fitted)
            for split, name in enumerate(SPLITS):
                at = np.flatnonzero(parts == split)
                unused = {"drawer"} if split != TRAIN else set() if labelled else {"label"}
                table = pa.table(
                    {n: to_arrow(taken(v, at)) for n, v in columns.items() if n not in unused}
                )
                first = int(first_of[split][p])
                if split != TRAIN and known is not None and len(at):
                    assert part.local is not None
                    table = self._with_negatives(
                        table, part.local[at], known, p, split, first, fitted
                    )
                path = self.folder / name / f"part-{p:05d}.parquet"
                if split == TRAIN:
                    _write_groups(table, path, cuts_of(n_train, self.groups), first)
                else:
                    n = first + table.num_rows
                    _write_groups(table, path, np.arange(first, n, HELD_OUT_GROUP_ROWS), first)
                without_time = [
                    c for n, c in zip(table.column_names, table.columns, strict=True) if n != "time"
                ]
                sizes[split] += sum(c.nbytes for c in without_time)
            if {"user", "item"} <= columns.keys():
                self.histories.add(*self._liked(part, parts, columns))
        sizes = self.crew.add_up(sizes)
        rows = np.sum([self.counts.rows[p] for p in range(self.n_parts)], axis=0)
        positives_of = np.sum([self.counts.positives[p] for p in range(self.n_parts)], axis=0)
        several = [1, 1, 1] if labelled else [1, 1 + k, 1 + k]
        return {
            name: SplitSpec(
                rows=int(rows[s]) * several[s],
                positives=int(positives_of[s]),
                size_bytes=int(sizes[s]),
            )
            for s, name in enumerate(SPLITS)
        }

    def _columns(self, part: Part, fitted: _Fitted) -> dict[str, Any]:
        """What stands in the files, for all rows of a partition."""
        columns: dict[str, Any] = {}
        for name in self.entities:
            columns[name] = fitted.row_of_code[_of_entity(name)][getattr(part, name)]
        if self.rare_row is not None:
            assert part.user is not None
            columns["drawer"] = self.rare_row[part.user]
        columns["label"] = part.label.astype(np.float32)
        if part.time is not None:
            columns["time"] = part.time
        for feature in self.of_rows:
            if feature.entity == "context":
                columns[feature.name] = self._encoded(feature, part.fields[feature.name], fitted)
        return columns

    def _encoded(self, feature: Feature, values: Values, fitted: _Fitted) -> Values:
        """Raw numbers or codes -> what the model looks up."""
        if feature.kind == "numeric":
            assert not isinstance(values, Jagged)
            return transformed(values.astype(np.float32), feature, fitted.numeric[feature.name])
        if feature.has_vocabulary:
            return lookup_rows(values, fitted.row_of_code[feature.table_name])
        return values if isinstance(values, Jagged) else np.maximum(values, np.int32(0))

    def _number_rare_users(self, fitted: _Fitted) -> None:
        """Users without a row of their own still have a history that their negatives must avoid.

        They are numbered from the end of the user table on, for the sampler alone.
        """
        self.rare_row: Int32Array | None = None
        self.n_rare = 0
        if self.data.task == "ctr" or self.data.negatives.fixed_per_user is not None:
            return
        of_user = fitted.row_of_code[_of_entity("user")]
        rare = (of_user == 0) & (self.counts.tables[_of_entity("user")] > 0)
        self.n_rare = int(rare.sum())
        if self.n_rare:
            self.rare_row = of_user.copy()
            first = fitted.entity_rows["user"]
            self.rare_row[rare] = first + np.arange(self.n_rare, dtype=np.int32)

    def _known_items(self, part: Part, p: int, fitted: _Fitted) -> Jagged:
        """What held-out negatives avoid: items of each user of a partition, from 0, ascending."""
        assert part.local is not None
        items = fitted.row_of_code[_of_entity("item")][part.item]
        at = np.flatnonzero(items > 0)
        return Jagged.from_pairs(part.local[at], items[at] - 1, len(self._members(p))).sorted()

    def _with_negatives(
        self,
        table: pa.Table,
        users: Int32Array,
        history: Jagged,
        p: int,
        split: int,
        first: int,
        fitted: _Fitted,
    ) -> pa.Table:
        """Held-out positives, each followed by its negatives.

        Negatives are items of the table, none of them a positive of the user in any split.
        """
        k, n_items = self.data.negatives.evaluation_per_positive, fitted.entity_rows["item"] - 1
        option = "data.negatives.evaluation_per_positive"
        check_enough_unseen(k, history, users, n_items, option, self._user_ids(p))
        n = len(users)
        drawn = draw_per_positive(
            np.repeat(np.arange(first, first + n), k),
            np.tile(np.arange(k), n),
            np.repeat(users, k),
            k,
            history,
            n_items,
            derive_seed(self.seed, "evaluation", split),
        )
        items = np.hstack([table["item"].to_numpy().reshape(-1, 1), drawn.reshape(-1, k) + 1])
        labels = np.tile(np.array([1.0] + [0.0] * k, np.float32), n)
        table = table.take(pa.array(np.repeat(np.arange(n), k + 1)))
        for name, values in (("item", items.ravel().astype(np.int32)), ("label", labels)):
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        return table

    @staticmethod
    def _liked(part: Part, parts: Parts, columns: dict[str, Any]) -> tuple[Int32Array, Int32Array]:
        """Training positives as (row of the history, item), each user's in time order."""
        users, items = columns.get("drawer", columns["user"]), columns["item"]
        at = np.flatnonzero((parts == TRAIN) & (part.label == 1) & (users > 0) & (items > 0))
        assert part.local is not None
        if part.time is not None:
            offsets, order = grouped(part.local[at], int(part.local.max(initial=0)) + 1)
            sort_groups(offsets, order, part.time[at])
            at = at[order]
        return users[at], items[at]

    def _write_entities(self, fitted: _Fitted) -> None:
        (self.folder / "vocabulary").mkdir()
        for name, vocabulary in self.vocabularies.items():
            vocabulary.write(self.folder / "vocabulary" / f"{name}.parquet")
        (self.folder / "entities").mkdir()
        for name, vocabulary in self.entity_vocabularies.items():
            ids = pa.concat_arrays([pa.nulls(1, pa.string()), vocabulary.ids])
            table: dict[str, pa.Array] = {"id": ids}
            for feature in self.data.features:
                if feature.entity == name and feature.describes_entity:
                    values = self.entity_values[feature.name]
                    encoded = self._encoded(feature, values, fitted)
                    table[feature.name] = to_arrow(self._carried(feature, values, encoded))
            path = self.folder / "entities" / f"{name}.parquet"
            if name == "user" and "item" in self.entities:
                self.histories.write(path, pa.table(table))
                continue
            if name == "item" and "user" in self.entities:
                counts = np.zeros(vocabulary.rows, np.int64)
                np.add.at(counts, fitted.row_of_code[_of_entity("item")], self.counts.liked)
                if (before := self._earlier_column("item", "count")) is not None:
                    counts[: len(before)] += before.to_numpy()
                table["count"] = pa.array(counts)
            if name == "item" and self.data.titles is not None:
                table["title"] = self._titles(vocabulary)
            pq.write_table(pa.table(table), path, compression="zstd")

    def _earlier_column(self, entity: str, name: str) -> pa.ChunkedArray | None:
        """A column of the earlier dataset's entity table, if there is one."""
        if self.earlier is None or entity not in self.earlier.entities:
            return None
        path = Path(self.data.vocabulary_from or "") / "entities" / f"{entity}.parquet"
        if name not in pq.read_schema(path).names:
            return None
        return pq.read_table(path, columns=[name])[name]

    def _carried(self, feature: Feature, raw: Values, encoded: Values) -> Values:
        """A users' or items' field with the earlier dataset's values where there are none now."""
        column = self._earlier_column(feature.entity, feature.name)
        if column is None:
            return encoded
        before = from_arrow(column)
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

    def _titles(self, items: Vocabulary) -> pa.Array:
        titles = self.data.titles
        assert titles is not None
        key = titles.key or self.data.interactions.item
        assert key is not None
        table = self._side_table(titles.file, [Column(key), Column(titles.column, required=False)])
        rows = items.lookup(table[key])
        place = np.full(items.rows, -1, np.int64)
        place[rows[::-1]] = np.arange(len(rows))[::-1]
        place[0] = -1
        return table[titles.column].combine_chunks().take(pa.array(place, mask=place < 0))

    def _manifest(self, wanted: str, splits: dict[str, SplitSpec], fitted: _Fitted) -> Manifest:
        tables = {}
        for name in table_names(self.data.features):
            features = [f for f in self.data.features if f.in_table and f.table_name == name]
            if features[0].transform == "bucket":
                rows = 2 + len(fitted.numeric[features[0].name].boundaries)
            elif features[0].hash_rows is not None:
                rows = 1 + features[0].hash_rows
            else:
                rows = self.vocabularies[name].rows
            tables[name] = TableSpec(rows=rows, features=tuple(f.name for f in features))
        return Manifest(
            format=FORMAT,
            fingerprint=wanted,
            vocabulary_hash=self._vocabulary_hash(),
            grown_from=(*self.earlier.grown_from, self.earlier.vocabulary_hash)
            if self.earlier
            else (),
            seed=self.seed,
            data=self.data,
            tables=tables,
            entities={name: v.rows for name, v in self.entity_vocabularies.items()},
            numeric=fitted.numeric,
            splits=splits,
            files=self.n_parts,
            lanes=self.lanes,
            groups=self.groups,
            dropped=dict(sorted(self.dropped.items())),
            inputs={f.name: f.size for of_name in self.files.values() for f in of_name},
            versions=versions(),
        )

    def _vocabulary_hash(self) -> str:
        digests = {}
        for name, vocabulary in self.vocabularies.items():
            digest = hashlib.sha256()
            for buffer in pa.concat_arrays([vocabulary.ids]).buffers():
                digest.update(buffer or b"")
            digests[name] = digest.hexdigest()
        return hash_of(digests)


def _mapped(values: Values, code_map: Int32Array) -> Values:
    """Codes in another numbering; -1 stays."""
    padded = np.append(code_map, np.int32(-1))
    if isinstance(values, Jagged):
        return Jagged(values.offsets, padded[values.values])
    return padded[values]


def _default_lanes(rows: int) -> int:
    """64, and from 2**30 rows on one for every 2**24, as a power of two up to 4,096."""
    return min(4096, max(64, 1 << (rows >> 24).bit_length())) if rows >= 1 << 30 else 64


def _write_groups(table: pa.Table, path: Path, cuts: Int64Array, first: int) -> None:
    """Writes rows ``first`` and those behind it of a split, cut at some of its row numbers."""
    inside = cuts[(cuts > first) & (cuts < first + table.num_rows)] - first
    ends = np.unique(np.concatenate([[0], inside, [table.num_rows]]))
    # Few values repeat within a group: a dictionary of them costs more than it saves.
    with pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False) as writer:
        for begin, end in pairwise(ends):
            writer.write_table(table.slice(begin, end - begin), row_group_size=int(end - begin))
