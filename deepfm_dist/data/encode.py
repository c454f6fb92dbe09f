"""Input files -> a prepared dataset: split, fit vocabularies, write rows, entities, manifest.

Layout of ``prepared/<name>/``::

    manifest.json                what is here and where it came from; written last
    vocabulary/<table>.parquet   row, id, count
    entities/user.parquet        row r describes user r: id, fields as lists of rows, history
    entities/item.parquet        row r describes item r: id, fields, count, title
    train/ valid/ test/          user, item, [label], [time], one column per context field
"""

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from deepfm_dist.data.jagged import Int32Array, Int64Array, Jagged
from deepfm_dist.data.manifest import (
    FORMAT,
    Manifest,
    NumericSpec,
    SplitSpec,
    TableSpec,
    fingerprint,
    hash_of,
    input_files,
    versions,
)
from deepfm_dist.data.negatives import (
    check_enough_unseen,
    draw_distinct,
    draw_per_positive,
)
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.data.split import SPLITS, TEST, TRAIN, VALID, split_rows
from deepfm_dist.data.vocabulary import Vocabulary, encode_distinct
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float32]
ROW_GROUP = 1 << 20


def prepare(data: DataConfig, root: Path, folder: Path, seed: int) -> Manifest:
    """Makes sure that ``folder`` holds the dataset that the configuration describes.

    An unchanged dataset is reused; a changed input file or setting makes it anew. The folder
    appears whole or not at all: it is written aside and renamed.

    Args:
        data: files, features, split, negatives.
        root: folder of the input files.
        folder: where the prepared dataset goes.
        seed: of splits, negatives and row order.

    Returns:
        The manifest.

    Raises:
        DataError: an input cannot be read or used, or the folder cannot be written.
    """
    wanted = fingerprint(data, root, seed)
    if (folder / "manifest.json").is_file():
        try:
            manifest = Manifest.read(folder)
        except DataError:
            manifest = None
        if manifest is not None and manifest.fingerprint == wanted:
            log.info("%s is up to date", folder)
            return manifest
        log.info("%s is of other inputs or settings: preparing it anew", folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: holds files but no prepared dataset; delete it, or set data.name or "
            f"run.prepared_root to another folder"
        )
    started = time.perf_counter()
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    try:
        _remove_leftovers(folder)
        part.mkdir(parents=True)
        manifest = _Preparation(data, root, seed).write(part, wanted)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _report(manifest, folder, time.perf_counter() - started)
    return manifest


def _remove_leftovers(folder: Path) -> None:
    """Deletes what preparations of this folder left that were killed."""
    for part in folder.parent.glob(f".{folder.name}.part-*"):
        if not Path("/proc", part.name.rpartition("-")[2]).exists():
            shutil.rmtree(part, ignore_errors=True)


def _report(manifest: Manifest, folder: Path, seconds: float) -> None:
    for reason, count in manifest.dropped.items():
        log.info("dropped %s: %s", reason, f"{count:,}")
    sizes = ", ".join(f"{name} {spec.rows:,}" for name, spec in manifest.splits.items())
    tables = ", ".join(f"{name} {spec.rows:,}" for name, spec in manifest.tables.items())
    log.info("%s: rows %s; tables %s (%.1f s)", folder, sizes, tables, seconds)


@dataclass
class _Rows:
    """The interactions, one array per column; ``part`` is -1 where the split is still open."""

    columns: dict[str, pa.ChunkedArray]
    part: npt.NDArray[np.int8]
    labels: FloatArray

    def __len__(self) -> int:
        return len(self.part)

    def filter(self, mask: npt.NDArray[np.bool_]) -> "_Rows":
        arrow = pa.array(mask)
        columns = {name: column.filter(arrow) for name, column in self.columns.items()}
        return _Rows(columns, self.part[mask], self.labels[mask])


@dataclass
class _Entity:
    """Users or items: every distinct id of the interactions, and the table's rows."""

    codes: Int32Array  # [rows of the interactions]
    ids: pa.Array  # [distinct] by code
    vocabulary: Vocabulary = field(init=False)
    row_of_code: Int32Array = field(init=False)  # [distinct]; 0 for those not in the vocabulary

    def fit(self, weights: FloatArray | None, min_count: int, seed: int) -> None:
        counts = np.bincount(self.codes, weights=weights, minlength=len(self.ids)).astype(np.int64)
        self.vocabulary = Vocabulary.fit(self.ids, counts, min_count, seed)
        self.row_of_code = self.vocabulary.lookup(self.ids)

    @property
    def rows(self) -> Int32Array:
        return self.row_of_code[self.codes]


class _Preparation:
    """The steps of one preparation, in order; holds the rows in memory."""

    def __init__(self, data: DataConfig, root: Path, seed: int) -> None:
        self.data, self.root, self.seed = data, root, seed
        self.dropped: Counter[str] = Counter()
        self.vocabularies: dict[str, Vocabulary] = {}
        self.numeric: dict[str, NumericSpec] = {}

    def write(self, folder: Path, wanted: str) -> Manifest:
        """Runs all steps and writes the dataset into an empty folder."""
        rows = self._read()
        entities = {
            name: _Entity(*encode_distinct(rows.columns[column]))
            for name in ("user", "item")
            if (column := getattr(self.data.interactions, name)) is not None
        }
        if self.data.task == "implicit":
            rows = self._drop_duplicates(rows, entities)
        if self.data.negatives.fixed_per_user is not None:
            rows = self._add_fixed_negatives(rows, entities)
        self._split(rows, entities)
        in_train = rows.part == TRAIN
        for name, entity in entities.items():
            of_id = [f for f in self.data.features if f.entity == name and f.is_id]
            entity.fit(
                in_train.astype(np.float32),
                of_id[0].min_count if of_id else 1,
                derive_seed(self.seed, "rows", name),
            )
            for feature in of_id:
                self.vocabularies[feature.table_name] = entity.vocabulary
        columns = self._fields(rows, entities, in_train)
        self._write_vocabularies(folder)
        self._write_entities(folder, rows, entities, columns)
        splits = self._write_rows(folder, rows, entities, columns)
        manifest = Manifest(
            format=FORMAT,
            fingerprint=wanted,
            vocabulary_hash=self._vocabulary_hash(),
            seed=self.seed,
            data=self.data,
            tables=self._tables(),
            entities={name: e.vocabulary.rows for name, e in entities.items()},
            numeric=self.numeric,
            splits=splits,
            dropped=dict(sorted(self.dropped.items())),
            inputs={name: (self.root / name).stat().st_size for name in input_files(self.data)},
            versions=versions(),
        )
        manifest.write(folder)
        return manifest

    # -- read -----------------------------------------------------------------------------------

    def _read(self) -> _Rows:
        spec, split = self.data.interactions, self.data.split
        files = [(spec.file, -1), (split.valid_file, VALID), (split.test_file, TEST)]
        parts = []
        for file, part in files:
            if file is None:
                continue
            table = self._table(file, _row_columns(self.data, with_split=part == -1))
            parts.append(self._rows_of(table, part, file))
            log.info("read %s: %s rows", file, f"{table.num_rows:,}")
        columns = {
            name: pa.chunked_array([c for p in parts for c in p.columns[name].chunks])
            for name in parts[0].columns
        }
        return _Rows(
            columns,
            np.concatenate([p.part for p in parts]),
            np.concatenate([p.labels for p in parts]),
        )

    def _rows_of(self, table: pa.Table, part: int, file: str) -> _Rows:
        spec = self.data.interactions
        columns = {name: table[name] for name in table.column_names}
        parts = np.full(table.num_rows, part, np.int8)
        if spec.split in columns:
            parts = self._given_parts(columns.pop(spec.split))
        labels = np.ones(table.num_rows, np.float32)
        if spec.label is not None:
            labels = np.asarray(columns.pop(spec.label), np.float32)
            wrong = (labels != 0) & (labels != 1)
            if wrong.any():
                raise DataError(
                    f"{file}: label {spec.label} holds {labels[wrong][0]:g}; labels are 0 or 1"
                )
        rows = _Rows(columns, parts, labels)
        if spec.rating is not None:
            low = np.asarray(rows.columns.pop(spec.rating)) < spec.min_rating
            self._count(f"rows rated below {spec.min_rating:g}", low)
            rows = rows.filter(~low)
            if len(rows) == 0:
                raise DataError(
                    f"{file}: no row is rated {spec.min_rating:g} or more; "
                    f"lower interactions.min_rating"
                )
        return rows

    def _given_parts(self, column: pa.ChunkedArray) -> npt.NDArray[np.int8]:
        names = {str(i): i for i in range(3)} | {name: i for i, name in enumerate(SPLITS)}
        codes, values = encode_distinct(column)
        for value in values.to_pylist():
            if value not in names:
                raise DataError(
                    f"{self.data.interactions.file}: split {self.data.interactions.split} holds "
                    f"{value!r}; use 0, 1, 2 or train, valid, test"
                )
        return np.array([names[v] for v in values.to_pylist()], np.int8)[codes]

    def _table(self, file: str, columns: Sequence[Column]) -> pa.Table:
        layout = self.data.files.get(file)
        dropped: Counter[str] = Counter()
        table = read_table(self.root / file, columns, layout, self.data.on_bad_row, dropped)
        self.dropped |= dropped  # a file that several fields read counts once
        return table

    def _count(self, reason: str, mask: npt.NDArray[np.bool_] | int) -> None:
        if count := int(np.sum(mask)):
            self.dropped[reason] += count

    # -- rows -----------------------------------------------------------------------------------

    def _drop_duplicates(self, rows: _Rows, entities: dict[str, _Entity]) -> _Rows:
        user, item = entities["user"], entities["item"]
        pair = user.codes.astype(np.int64) * len(item.ids) + item.codes
        first = np.zeros(len(rows), bool)
        first[np.unique(pair, return_index=True)[1]] = True
        self._count("repeated (user, item) rows", ~first)
        for entity in entities.values():
            entity.codes = entity.codes[first]
        return rows.filter(first)

    def _add_fixed_negatives(self, rows: _Rows, entities: dict[str, _Entity]) -> _Rows:
        per_user = self.data.negatives.fixed_per_user
        assert per_user is not None
        user, item = entities["user"], entities["item"]
        n_users, n_items = len(user.ids), len(item.ids)
        history = Jagged.from_pairs(user.codes, item.codes, n_users).sorted()
        check_enough_unseen(
            per_user, history, np.arange(n_users), n_items, "data.negatives.fixed_per_user"
        )
        drawn = draw_distinct(per_user, history, n_items, derive_seed(self.seed, "fixed"))
        user.codes = np.concatenate(
            [user.codes, np.repeat(np.arange(n_users, dtype=np.int32), per_user)]
        )
        item.codes = np.concatenate([item.codes, drawn.ravel()])
        labels = np.concatenate([rows.labels, np.zeros(drawn.size, np.float32)])
        part = np.concatenate([rows.part, np.full(drawn.size, -1, np.int8)])
        return _Rows({}, part, labels)  # the schema allows no other columns with fixed negatives

    def _split(self, rows: _Rows, entities: dict[str, _Entity]) -> None:
        """Fills in ``rows.part``; the split comes before anything is fitted."""
        if self.data.refit:
            rows.part[:] = TRAIN
            return
        open_rows = np.flatnonzero(rows.part == -1)
        if len(open_rows):
            spec = self.data.interactions
            times = rows.columns.get(spec.time) if spec.time else None
            users = entities["user"].codes[open_rows] if "user" in entities else None
            rows.part[open_rows] = split_rows(
                self.data.split,
                len(open_rows),
                users,
                None if times is None else np.asarray(times, np.int64)[open_rows],
                derive_seed(self.seed, "split"),
            )
        if not (rows.part == TRAIN).any():
            raise DataError(f"{self.data.interactions.file}: the split leaves no training rows")

    # -- fields ---------------------------------------------------------------------------------

    def _fields(
        self, rows: _Rows, entities: Mapping[str, _Entity], in_train: npt.NDArray[np.bool_]
    ) -> dict[str, "_Values"]:
        """Raw values of every field, then one vocabulary per table, then table rows."""
        raw: dict[str, _Values] = {}
        for feature in self.data.features:
            if feature.is_id:
                continue
            if feature.entity == "context":
                raw[feature.name] = self._context_values(feature, rows)
            else:
                raw[feature.name] = self._entity_values(feature, rows, entities[feature.entity])
        for feature in self.data.features:
            if feature.kind == "numeric":
                fitted_on = in_train if feature.entity == "context" else slice(1, None)
                self._fit_numeric(feature, raw[feature.name], fitted_on)
        shared: dict[str, list[Feature]] = {}
        for feature in self.data.features:
            if feature.kind == "categorical" and not feature.is_id:
                shared.setdefault(feature.table_name, []).append(feature)
        for table, features in shared.items():
            self._fit_table(table, features, raw, in_train)
        return raw

    def _context_values(self, feature: Feature, rows: _Rows) -> "_Values":
        cells = rows.columns[feature.column or feature.name]
        if feature.kind == "numeric":
            return _Values(numbers=numbers_of(cells, feature))
        owners, values = split_cells(cells, feature)
        if feature.keep == "first":
            first = np.unique(owners, return_index=True)[1]
            owners, values = owners[first], values.take(pa.array(first))
        return _Values(owners=owners, texts=values, n=len(rows))

    def _entity_values(self, feature: Feature, rows: _Rows, entity: _Entity) -> "_Values":
        column = feature.column or feature.name
        n = entity.vocabulary.rows
        if feature.file is None:
            owner_rows, cells = entity.rows, rows.columns[column]
            keep = np.unique(owner_rows, return_index=True)[1]  # an entity's first row tells
            keep = keep[owner_rows[keep] > 0]
            owner_rows, cells = owner_rows[keep], cells.take(pa.array(keep))
        else:
            key = feature.key or getattr(self.data.interactions, feature.entity)
            table = self._table(feature.file, [Column(key), column_of(feature)])
            owner_rows, cells = entity.vocabulary.lookup(table[key]), table[column]
            known = owner_rows > 0
            reason = f"{feature.file} rows of {feature.entity}s without training rows"
            self.dropped |= Counter({reason: int((~known).sum())})
            owner_rows, cells = owner_rows[known], cells.filter(pa.array(known))
        if feature.kind == "numeric":
            numbers = np.full(n, np.nan, np.float32)
            # Backwards, so that the first row of an entity is the one that stays.
            numbers[owner_rows[::-1]] = numbers_of(cells, feature)[::-1]
            return _Values(numbers=numbers)
        cell_of_value, texts = split_cells(cells, feature)
        owners = owner_rows[cell_of_value]
        codes, distinct = encode_distinct(texts)
        pair = owners.astype(np.int64) * max(1, len(distinct)) + codes
        first = np.sort(np.unique(pair, return_index=True)[1])
        self._count(
            f"repeated {feature.name} values of one {feature.entity}", len(pair) - len(first)
        )
        if feature.keep == "first":
            first = np.sort(first[np.unique(owners[first], return_index=True)[1]])
        owners, texts = owners[first], texts.take(pa.array(first))
        without = n - 1 - len(np.unique(owners))
        if without:
            log.info("%s: %s %ss have none", feature.name, f"{without:,}", feature.entity)
        return _Values(owners=owners, texts=texts, n=n)

    def _fit_numeric(
        self, feature: Feature, values: "_Values", fitted_on: npt.NDArray[np.bool_] | slice
    ) -> None:
        assert values.numbers is not None
        fitted = transformed(values.numbers[fitted_on], feature, None)
        fitted = fitted[~np.isnan(fitted)].astype(np.float64)
        mean = float(fitted.mean()) if len(fitted) else 0.0
        std = float(fitted.std()) if len(fitted) else 1.0
        self.numeric[feature.name] = NumericSpec(mean=mean, std=std or 1.0)
        values.numbers = np.nan_to_num(
            transformed(values.numbers, feature, self.numeric[feature.name])
        )

    def _fit_table(
        self,
        table: str,
        features: Sequence[Feature],
        raw: Mapping[str, "_Values"],
        in_train: npt.NDArray[np.bool_],
    ) -> None:
        texts = [raw[f.name].texts for f in features]
        codes, distinct = encode_distinct(pa.chunked_array([t.combine_chunks() for t in texts]))
        weights = [
            in_train[raw[f.name].owners] if f.entity == "context" else np.ones(len(t))
            for f, t in zip(features, texts, strict=True)
        ]
        counts = np.bincount(codes, np.concatenate(weights), len(distinct)).astype(np.int64)
        vocabulary = Vocabulary.fit(
            distinct,
            counts,
            max(f.min_count for f in features),
            derive_seed(self.seed, "rows", table),
        )
        self.vocabularies[table] = vocabulary
        for feature in features:
            values = raw[feature.name]
            values.jagged = Jagged.from_pairs(
                values.owners, vocabulary.lookup(values.texts), values.n
            )

    # -- write ----------------------------------------------------------------------------------

    def _tables(self) -> dict[str, TableSpec]:
        tables: dict[str, TableSpec] = {}
        for name, vocabulary in self.vocabularies.items():
            features = [
                f for f in self.data.features if f.kind == "categorical" and f.table_name == name
            ]
            names = tuple(f.name for f in features)
            tables[name] = TableSpec(rows=vocabulary.rows, features=names)
        # In the order of the fields, so that the model does not depend on how tables were fitted.
        first_use = [f.table_name for f in self.data.features if f.kind == "categorical"]
        return {name: tables[name] for name in dict.fromkeys(first_use)}

    def _vocabulary_hash(self) -> str:
        digests = {}
        for name, vocabulary in self.vocabularies.items():
            digest = hashlib.sha256()
            for buffer in pa.concat_arrays([vocabulary.ids]).buffers():
                digest.update(buffer or b"")
            digests[name] = digest.hexdigest()
        return hash_of(digests)

    def _write_vocabularies(self, folder: Path) -> None:
        (folder / "vocabulary").mkdir()
        for name, vocabulary in self.vocabularies.items():
            vocabulary.write(folder / "vocabulary" / f"{name}.parquet")

    def _write_entities(
        self,
        folder: Path,
        rows: _Rows,
        entities: Mapping[str, _Entity],
        columns: Mapping[str, "_Values"],
    ) -> None:
        (folder / "entities").mkdir()
        for name, entity in entities.items():
            n = entity.vocabulary.rows
            ids = pa.concat_arrays([pa.nulls(1, pa.string()), entity.vocabulary.ids])
            table: dict[str, pa.Array] = {"id": ids}
            for feature in self.data.features:
                if feature.entity == name and not feature.is_id:
                    table[feature.name] = columns[feature.name].to_arrow(as_lists=True)
            if {"user", "item"} <= entities.keys():
                liked = (rows.part == TRAIN) & (rows.labels == 1)
                if name == "user":
                    table["history"] = self._history(rows, entities, liked).to_arrow()
                else:
                    counts = np.bincount(entity.rows[liked], minlength=n)
                    table["count"] = pa.array(counts)
            if name == "item" and self.data.titles is not None:
                table["title"] = self._titles(entity)
            pq.write_table(
                pa.table(table), folder / "entities" / f"{name}.parquet", compression="zstd"
            )

    def _history(
        self, rows: _Rows, entities: Mapping[str, _Entity], liked: npt.NDArray[np.bool_]
    ) -> Jagged:
        """Each user's training items, in time order where times are known, else in file order."""
        users, items = entities["user"].rows, entities["item"].rows
        at = np.flatnonzero(liked & (users > 0) & (items > 0))
        if (times := rows.columns.get(self.data.interactions.time or "")) is not None:
            at = at[np.argsort(np.asarray(times, np.int64)[at], kind="stable")]
        return Jagged.from_pairs(users[at], items[at], entities["user"].vocabulary.rows)

    def _titles(self, items: _Entity) -> pa.Array:
        titles = self.data.titles
        assert titles is not None
        key = titles.key or self.data.interactions.item
        assert key is not None
        table = self._table(titles.file, [Column(key), Column(titles.column, required=False)])
        place = pc.index_in(items.vocabulary.ids, value_set=table[key].combine_chunks())
        found = table[titles.column].take(place).combine_chunks()
        return pa.concat_arrays([pa.nulls(1, pa.string()), found])

    def _write_rows(
        self,
        folder: Path,
        rows: _Rows,
        entities: Mapping[str, _Entity],
        columns: Mapping[str, "_Values"],
    ) -> dict[str, SplitSpec]:
        labelled = self.data.task == "ctr" or self.data.negatives.fixed_per_user is not None
        everything: dict[str, pa.Array] = {n: pa.array(e.rows) for n, e in entities.items()}
        everything["label"] = pa.array(rows.labels)
        if (times := rows.columns.get(self.data.interactions.time or "")) is not None:
            everything["time"] = times.combine_chunks()
        for feature in self.data.features:
            if feature.entity == "context":
                everything[feature.name] = columns[feature.name].to_arrow(feature.multi_valued)
        table = pa.table(everything)
        splits = {}
        for number, name in enumerate(SPLITS):
            chosen = np.flatnonzero(rows.part == number)
            part = table.take(pa.array(chosen))
            positives = int(rows.labels[chosen].sum())
            if not labelled:
                if number == TRAIN:
                    part = part.drop_columns(["label"])
                elif len(chosen):
                    part = self._with_negatives(part, chosen, entities, number)
            (folder / name).mkdir()
            pq.write_table(
                part,
                folder / name / "part-00000.parquet",
                compression="zstd",
                row_group_size=ROW_GROUP,
            )
            splits[name] = SplitSpec(rows=part.num_rows, positives=positives)
        return splits

    def _with_negatives(
        self, part: pa.Table, chosen: Int64Array, entities: Mapping[str, _Entity], number: int
    ) -> pa.Table:
        """Held-out positives, each followed by its negatives.

        Negatives are items of the table, none of them a positive of the user in any split.
        """
        user, item = entities["user"], entities["item"]
        known = item.rows > 0
        n_items = item.vocabulary.rows - 1
        history = Jagged.from_pairs(user.codes[known], item.rows[known] - 1, len(user.ids)).sorted()
        k = self.data.negatives.evaluation_per_positive
        users = user.codes[chosen]
        check_enough_unseen(k, history, users, n_items, "data.negatives.evaluation_per_positive")
        drawn = draw_per_positive(
            np.repeat(np.arange(len(chosen)), k),
            np.tile(np.arange(k), len(chosen)),
            np.repeat(users, k),
            k,
            history,
            n_items,
            derive_seed(self.seed, "evaluation", number),
        )
        positive = np.asarray(part["item"]).reshape(-1, 1)
        items = np.hstack([positive, drawn.reshape(-1, k) + 1]).ravel().astype(np.int32)
        labels = np.tile(np.array([1.0] + [0.0] * k, np.float32), len(chosen))
        part = part.take(pa.array(np.repeat(np.arange(len(chosen)), k + 1)))
        part = part.set_column(part.column_names.index("item"), "item", pa.array(items))
        return part.set_column(part.column_names.index("label"), "label", pa.array(labels))


@dataclass
class _Values:
    """A field's values: numbers, or texts with the entity or row that owns each."""

    numbers: FloatArray | None = None
    owners: npt.NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, np.int64))
    texts: pa.ChunkedArray = field(default_factory=lambda: pa.chunked_array([], pa.string()))
    n: int = 0
    jagged: Jagged | None = None

    def to_arrow(self, as_lists: bool) -> pa.Array:
        if self.numbers is not None:
            return pa.array(self.numbers)
        assert self.jagged is not None
        if as_lists:
            return self.jagged.to_arrow()
        single = np.zeros(self.n, np.int32)
        single[self.jagged.lengths > 0] = self.jagged.values
        return pa.array(single)


def _row_columns(data: DataConfig, with_split: bool) -> list[Column]:
    """Columns of the interactions that a configuration needs, each once."""
    spec = data.interactions
    wanted: dict[str, Column] = {}

    def add(name: str | None, column: Column) -> None:
        if name is None:
            return
        if wanted.setdefault(name, column).type != column.type:
            raise ConfigError(
                f"data: column {name!r} is asked for both as {wanted[name].type} and as "
                f"{column.type}; copy it under another name"
            )

    add(spec.user, Column(spec.user or ""))
    add(spec.item, Column(spec.item or ""))
    add(spec.label, Column(spec.label or "", "number"))
    add(spec.time, Column(spec.time or "", "time"))
    add(spec.rating, Column(spec.rating or "", "number"))
    if with_split:
        add(spec.split, Column(spec.split or ""))
    for feature in data.features:
        if not feature.is_id and feature.file is None:
            column = column_of(feature)
            add(column.name, column)
    return list(wanted.values())


def column_of(feature: Feature) -> Column:
    """The column that holds a field's values."""
    name = feature.column or feature.name
    if feature.kind == "numeric":
        return Column(name, "number", required=False, missing=feature.missing)
    return Column(name, required=False)


def split_cells(
    cells: pa.ChunkedArray, feature: Feature
) -> tuple[npt.NDArray[np.int64], pa.ChunkedArray]:
    """Cells -> (row of each value, value): empty and missing cells gone, several values split.

    Args:
        cells: ``[n]`` string.
        feature: its separator and its words for "missing".

    Returns:
        rows ``[m]`` int64 ascending, and values ``[m]`` string.
    """
    owners = np.arange(len(cells), dtype=np.int64)
    if feature.separator is not None:
        lists = pc.split_pattern(cells, feature.separator)
        if isinstance(lists, pa.ChunkedArray):
            lists = lists.combine_chunks()
            if isinstance(lists, pa.ChunkedArray):
                lists = pa.array([], pa.list_(pa.string()))
        owners = np.asarray(pc.list_parent_indices(lists), dtype=np.int64)
        cells = pa.chunked_array([lists.flatten()])
    cells = pc.utf8_trim_whitespace(cells)
    missing = pa.array(["", *feature.missing])
    valid = pc.and_(pc.is_valid(cells), pc.invert(pc.is_in(cells, value_set=missing)))
    mask = np.asarray(valid.fill_null(False)).astype(bool)
    return owners[mask], cells.filter(pa.array(mask))


def numbers_of(cells: pa.ChunkedArray, feature: Feature) -> FloatArray:
    """Cells of a numeric field as float32, missing ones as NaN."""
    numbers = cells.cast(pa.float64()).to_numpy()
    for word in feature.missing:
        with suppress(ValueError):  # words that are no numbers were missing from the start
            numbers = np.where(numbers == float(word), np.nan, numbers)
    return numbers.astype(np.float32)


def transformed(numbers: FloatArray, feature: Feature, spec: NumericSpec | None) -> FloatArray:
    """Applies a numeric field's transform; ``standard`` is left out where ``spec`` is None.

    log is ``sign(x) * log(1 + |x|)``; standard is ``(x - mean) / std``. NaN stays NaN.
    """
    if feature.transform == "log":
        return np.sign(numbers) * np.log1p(np.abs(numbers))
    if feature.transform == "standard" and spec is not None:
        return ((numbers - spec.mean) / spec.std).astype(np.float32)
    return numbers
