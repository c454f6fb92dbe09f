"""Fits vocabularies and statistics on training rows."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from deepfm_dist.data.codes import seeded
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import (
    NumericFit,
    hashed_rows,
    lookup_rows,
    scaled,
    table_names,
    transformed,
)
from deepfm_dist.data.jagged import VECTORS_AT_ONCE, Int32Array, Jagged, Values, offsets_of, taken
from deepfm_dist.data.layout import GENERATION, LAST_DAY, DatasetFiles
from deepfm_dist.data.manifest import TRAIN, NumericSpec
from deepfm_dist.data.preparation.counts import Counts, has_value, report_empty
from deepfm_dist.data.preparation.job import Job, entity_key
from deepfm_dist.data.preparation.partitions import Partitions
from deepfm_dist.data.preparation.reading import side_table
from deepfm_dist.data.preparation.rules import words_of
from deepfm_dist.data.preparation.vocabulary_warnings import vocabulary_warnings
from deepfm_dist.data.schema import CatalogueFile, Feature, Files, label_of
from deepfm_dist.data.sources import Column
from deepfm_dist.data.spelling import check_join
from deepfm_dist.data.vocabulary import Vocabulary
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)
_ALL_IN_MEMORY = 1 << 62


@dataclass(frozen=True)
class FitResult:
    """Results of fitting that all threads need to write rows.

    Attributes:
        row_of_code: table rows of each vocabulary's texts, and a last element 0 for no value. Rows
            of cold items follow those of the item table.
        numeric: statistics of the numeric fields.
        rows: the rows of the user and item tables.
        cold: number of cold items, by entity; see `Manifest.cold`.
    """

    row_of_code: dict[str, Int32Array]
    numeric: dict[str, NumericSpec]
    rows: dict[str, int]
    cold: dict[str, int]

    def encoded(self, feature: Feature, values: Values) -> Values:
        """Raw numbers or codes -> model inputs."""
        if feature.kind == "numeric":
            assert not isinstance(values, Jagged)
            return transformed(
                values.astype(np.float64, copy=False), feature, self.numeric[feature.name]
            )
        if feature.kind == "vector":
            assert not isinstance(values, Jagged)
            return scaled(
                values.astype(np.float32, copy=False), feature, self.numeric[feature.name]
            )
        if feature.has_vocabulary:
            return lookup_rows(values, self.row_of_code[feature.table_name])
        return values if isinstance(values, Jagged) else np.maximum(values, np.int32(0))

    def trained(self, entity: str, rows: Int32Array) -> Int32Array:
        """Rows of users or items with those of cold ones replaced by the unknown row 0."""
        if not self.cold.get(entity):
            return rows
        return np.where(rows < self.rows[entity], rows, np.int32(0))


@dataclass(frozen=True)
class Lifetimes:
    """When ids of users or items were last seen, and since when they have their rows.

    Attributes:
        last_day: ``[rows]`` int32: the last day of the latest log with the id, since 1970.
        generation: ``[rows]`` int32: number of datasets in the chain before the id got its row.
        reused: rows that new ids took over from forgotten ones in this dataset.
    """

    last_day: Int32Array
    generation: Int32Array
    reused: Int32Array


class PreviousDataset:
    """The dataset whose ids keep their rows, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder or Path()
        self.dataset = None if folder is None else PreparedDataset(self._folder, _ALL_IN_MEMORY)
        self.manifest = None if self.dataset is None else self.dataset.manifest

    def column(self, entity: str, name: str) -> pa.ChunkedArray | None:
        """A column of its users or items; None if missing."""
        if self.manifest is None or entity not in self.manifest.entities:
            return None
        file = f"entities/{entity}.parquet"
        layout = DatasetFiles(self._folder, self.manifest)
        if name not in layout.open(file).schema_arrow.names:
            return None
        return layout.read(file, [name])[name]

    def last_days(self, entity: str, today: int) -> Int32Array | None:
        """``[rows]``: see `Lifetimes`; without a record of them, the last day of its log."""
        days = self.column(entity, LAST_DAY)
        if days is not None:
            return days.to_numpy().astype(np.int32)
        if self.manifest is None or entity not in self.manifest.entities:
            return None
        profile, last = self.manifest.profile, today
        if profile.first_day is not None:
            first = int(np.datetime64(profile.first_day, "D").astype(np.int64))
            last = first + profile.days_per_period * len(profile.rows_by_period) - 1
        return np.full(self.manifest.entities[entity], min(last, today), np.int32)

    def generations(self, entity: str) -> Int32Array:
        """``[rows]``: see `Lifetimes`."""
        generations = self.column(entity, GENERATION)
        if generations is not None:
            return generations.to_numpy().astype(np.int32)
        assert self.manifest is not None
        return np.zeros(self.manifest.entities[entity], np.int32)

    def vocabulary(self, name: str) -> Vocabulary | None:
        """The vocabulary of a table, or of the users or items."""
        if name.startswith(entity_key("")):
            entity = name.removeprefix(entity_key(""))
            ids = self.column(entity, "id")
            if self.manifest is None or ids is None:
                return None
            for feature in self.manifest.features:
                if feature.entity == entity and feature.is_id:  # its table has the counts
                    return self.vocabulary(feature.table_name)
            return Vocabulary(ids.slice(1).combine_chunks(), np.zeros(len(ids) - 1, np.int64))
        if self.manifest is None or name not in self.manifest.vocabularies:
            return None
        layout = DatasetFiles(self._folder, self.manifest)
        return Vocabulary.from_table(layout.read(f"vocabulary/{name}.parquet"))


class Fitter:
    """Fits on all training rows. First thread.

    Attributes:
        entities: vocabularies of the users and items.
        cold: ids of the cold items, if there are any, by entity; see `Manifest.cold`.
        values: raw values of their fields, by table row.
        cold_values: raw values of the cold items' fields.
        vocabularies: the vocabularies, by table.
        lifetimes: the lifetimes of the users' and items' ids, where they are recorded.
        fitted: the part of the fit that writing rows needs.
        time_scale: see `Partitions`.
    """

    def __init__(
        self, job: Job, partitions: Partitions, counts: Counts, earlier: PreviousDataset
    ) -> None:
        self._job, self._partitions, self._counts = job, partitions, counts
        self._earlier, self.time_scale = earlier, partitions.time_scale
        self._row_of_code: dict[str, Int32Array] = {}
        self._joined: dict[tuple[str, str | None], bool] = {}
        self._free = {name: self._forgettable(name) for name in job.entities}
        self.entities = self._fit_entities()
        self.lifetimes = self._lifetimes()
        self.cold = self._cold_items()
        self.values: dict[str, Values] = {}
        self.cold_values: dict[str, Values] = {}
        for feature in job.data.features:
            if feature.describes_entity:
                self.values[feature.name] = self._entity_values(feature)
        self.vocabularies = self._fit_tables()
        self._fit_histories()
        for name, ids in partitions.ids.items():
            if name not in self._row_of_code:  # other fields use the table of ids
                self._row_of_code[name] = self.vocabularies[name].lookup(ids)
        self.fitted = FitResult(
            {
                name: np.append(self._row_of_code[name], np.int32(0))
                for name in partitions.ids  # sorted
            },
            self._numeric(),
            {name: v.rows for name, v in self.entities.items()},
            {name: len(ids) for name, ids in self.cold.items()},
        )

    def _fit_entities(self) -> dict[str, Vocabulary]:
        """Fits the vocabularies of users and items and checks all vocabularies, in threads."""
        job, ids, tables = self._job, self._partitions.ids, self._counts.tables
        tasks: list[Callable[[], Any]] = [
            *(partial(self._vocabulary, entity_key(n), self._min_count(n)) for n in job.entities),
            *(partial(vocabulary_warnings, job.data, n, ids[n], tables[n]) for n in ids),
        ]
        results = job.crew.map(lambda task: task(), tasks)
        vocabularies = dict(zip(job.entities, results, strict=False))
        if job.data.task == "implicit" and vocabularies["item"].rows == 1:
            most = int(tables[entity_key("item")].max())
            raise DataError(
                f"{label_of(job.data.interactions.file)}: no item is known: the most frequent one "
                f"has {plural(most, 'training row')}, and the item's min_count is "
                f"{self._min_count('item')}; lower it"
            )
        for texts in results[len(job.entities) :]:
            for text in texts:
                log.warning("%s", text)
        return vocabularies

    def _cold_items(self) -> dict[str, pa.Array]:
        """The ids of items without a table row that attribute files describe.

        Those in the log get the rows after the item table.
        """
        data, entity = self._job.data, "item"
        if entity not in self.entities:
            return {}
        rows_files = {name for _, name, _ in self._job.inputs}  # held-out rows describe no one
        fields = [f for f in data.features if f.entity == entity and f.file is not None]
        fields = [f for f in fields if f.file and label_of(f.file) not in rows_files]
        keys = [self._partitions.side_files[f.name].keys for f in fields]
        if fields and data.catalogue is not None:
            keys = [self._catalogue_ids(data.catalogue)]
        if not keys:
            return {}
        vocabulary, key = self.entities[entity], entity_key(entity)
        ids = pa.chunked_array([k.cast(pa.string()) for k in keys]).unique()
        missing = [w for f in data.features if f.entity == entity for w in f.missing if f.is_id]
        new = (vocabulary.lookup(ids) == 0) & ~np.asarray(pc.is_in(ids, pa.array(["", *missing])))
        if not new.any():
            return {}
        ids = ids.filter(pa.array(new))
        seed = derive_seed(self._job.seed, "rows", "cold item")
        cold, _ = Vocabulary.fit(ids, np.ones(len(ids), np.int64), 1, seed)
        rows = self._row_of_code[key]
        cold_rows = cold.lookup(self._partitions.ids[key])
        self._row_of_code[key] = np.where(
            (rows == 0) & (cold_rows > 0), cold_rows + np.int32(vocabulary.rows - 1), rows
        )
        return {entity: cold.ids}

    def _catalogue_ids(self, catalogue: CatalogueFile) -> pa.Array:
        key = catalogue.key or self._job.data.interactions.item
        assert key is not None
        ids = side_table(self._job, label_of(catalogue.file), [Column(key)])[key]
        self.check_join("item", catalogue.file, catalogue.key, ids, "data.catalogue")
        return ids.combine_chunks()

    def rows_of(self, entity: str, ids: pa.Array | pa.ChunkedArray) -> Int32Array:
        """``[n]`` string -> ``[n]`` int32 rows of users or items, of cold ones too; unknown: 0."""
        rows = self.entities[entity].lookup(ids)
        if entity in self.cold:
            ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
            place = np.asarray(pc.index_in(ids, value_set=self.cold[entity]).fill_null(-1))
            cold = (place + self.entities[entity].rows).astype(np.int32)
            rows = np.where((rows == 0) & (place >= 0), cold, rows)
        return rows

    def _fit_tables(self) -> dict[str, Vocabulary]:
        """Fits the vocabularies of embedding tables, except those used only by histories."""
        vocabularies: dict[str, Vocabulary] = {}
        for table in table_names(self._job.data.features):
            features = [f for f in self._job.data.features if f.table_name == table and f.in_table]
            features = [f for f in features if f.history is None]
            if not features:  # a history's own table
                continue
            ids = [f for f in features if f.is_id]
            if ids:  # other fields of these ids may share it
                vocabularies[table] = self.entities[ids[0].entity]
                if len(features) > 1:
                    self._check_ids(table, ids[0], [f for f in features if not f.is_id])
            elif features[0].has_vocabulary:
                least = max(f.min_count for f in features)
                vocabularies[table] = self._vocabulary(table, least)
        return vocabularies

    def _check_ids(self, table: str, named: Feature, others: list[Feature]) -> None:
        """Refuses fields that share the table of ids but contain none of them."""
        values, counts = self._partitions.ids[table], self._counts.tables[table]
        known = self.entities[named.entity].lookup(values) > 0
        n, n_known = int(counts.sum()), int(counts[known].sum())
        names = ", ".join(f.name for f in others)
        if n and not n_known:
            raise DataError(
                f"{names}: table {table!r} is the table of {named.entity} ids, and none of {n:,} "
                f"values is one: such as {values[int(counts.argmax())].as_py()!r}, where ids are "
                f"such as {self.entities[named.entity].ids[0].as_py()!r}; name the column of ids, "
                f"or leave the table out"
            )
        share = 100 * n_known / max(n, 1)
        log.info("%s: %.1f %% of the values are ids of known %ss", names, share, named.entity)

    def _fit_histories(self) -> None:
        """Gives a history's table the vocabulary of its source field."""
        for feature in self._job.data.features:
            if feature.history is not None:
                source = self._job.data.source_of(feature)
                self.vocabularies[feature.table_name] = (
                    self.entities["item"] if source.is_id else self.vocabularies[source.table_name]
                )

    def _numeric(self) -> dict[str, NumericSpec]:
        specs = {name: fit.spec() for name, fit in self._counts.numeric.items()}
        for feature in self._job.data.features:
            if feature.kind == "numeric" and feature.entity != "context":
                fit, values = NumericFit(feature), self.values[feature.name]
                assert not isinstance(values, Jagged)
                fit.add(values[1:].astype(np.float64, copy=False))
                specs[feature.name] = fit.spec()
            if feature.kind == "vector":
                specs[feature.name] = self._scale_of(feature)
            if feature.transform == "bucket" and not specs[feature.name].boundaries:
                log.info(
                    "%s: all of its values fall into one bucket, whose width is 1 part in 128",
                    feature.name,
                )
        before = {} if self._earlier.manifest is None else self._earlier.manifest.numeric
        return specs | {n: s for n, s in before.items() if n in specs}

    def _scale_of(self, feature: Feature) -> NumericSpec:
        """The root mean square of the lengths of a field's vectors, of trained users or items."""
        vectors = self.values[feature.name]
        assert not isinstance(vectors, Jagged)
        known = vectors[1:][has_value(vectors)[1:]]
        squares = np.zeros(len(known))
        for begin in range(0, len(known), VECTORS_AT_ONCE):
            block = slice(begin, begin + VECTORS_AT_ONCE)
            squares[block] = np.square(known[block], dtype=np.float64).sum(1)
        scale = math.sqrt(math.fsum(squares) / max(1, len(squares)))
        if not scale:
            log.warning(
                "%s: all vectors of %ss with training rows are zeros or missing, so the field "
                "carries no information; check %s",
                feature.name,
                feature.entity,
                label_of(feature.npy or feature.file or ""),
            )
        return NumericSpec(mean=0, std=scale or 1.0)

    def _min_count(self, entity: str) -> int:
        ids = [f for f in self._job.data.features if f.entity == entity and f.is_id]
        return ids[0].min_count if ids else 1

    def _vocabulary(self, name: str, min_count: int) -> Vocabulary:
        vocabulary, self._row_of_code[name] = Vocabulary.fit(
            self._partitions.ids[name],
            self._counts.tables[name],
            min_count,
            derive_seed(self._job.seed, "rows", name.removeprefix(entity_key(""))),
            self._earlier.vocabulary(name),
            free=self._free.get(name.removeprefix(entity_key("")))
            if name.startswith(entity_key(""))
            else None,
        )
        return vocabulary

    @cached_property
    def _today(self) -> int:
        """The last day of the log, since 1970; 0 if no day is needed and no row has a date.

        Raises:
            DataError: no row has a date, and ids are to be forgotten.
        """
        if not self._counts.days and self._job.data.forget_after is None:
            return 0
        if not self._counts.days:
            raise DataError(
                f"data.forget_after={self._job.data.forget_after}: no row of "
                f"{label_of(self._job.data.interactions.file)} has a date in the column "
                f"{self._job.data.interactions.time!r}; leave forget_after out"
            )
        return max(self._counts.days)

    def _forgettable(self, entity: str) -> Int32Array | None:
        """Rows of ids that are neither in this log nor in recent days, oldest first.

        None: nothing is recorded. A record of an earlier dataset is continued, since it shows which
            rows were reused.
        """
        days, before = self._job.data.forget_after, self._earlier.vocabulary(entity_key(entity))
        if before is None:
            return None
        if days is None:
            is_recorded = self._earlier.column(entity, GENERATION) is not None
            return np.zeros(0, np.int32) if is_recorded else None
        last_days = self._earlier.last_days(entity, self._today)
        assert last_days is not None
        is_old = self._today - last_days > days
        is_old[before.lookup(self._partitions.ids[entity_key(entity)])] = False
        is_old[0] = False
        rows = np.flatnonzero(is_old)
        return rows[np.argsort(last_days[rows], kind="stable")].astype(np.int32)

    def _lifetimes(self) -> dict[str, Lifetimes]:
        """The lifetimes to record, after rows are assigned; logs the number of forgotten ids."""
        lifetimes, forgotten, waiting = {}, [], []
        for name, free in self._free.items():
            if free is None:
                continue
            now, last_days = self.entities[name], self._earlier.last_days(name, self._today)
            assert last_days is not None
            manifest = self._earlier.manifest
            assert manifest is not None
            generation = len(manifest.grown_from) + 1
            n_old, key = len(last_days), entity_key(name)
            rows_here = now.lookup(self._partitions.ids[key])
            reused = np.intersect1d(free, rows_here).astype(np.int32)
            days = np.full(now.rows, self._today, np.int32)
            days[:n_old] = last_days
            days[rows_here] = np.maximum(days[rows_here], self._today)
            generations = np.full(now.rows, generation, np.int32)
            generations[:n_old] = self._earlier.generations(name)
            generations[reused] = generation
            lifetimes[name] = Lifetimes(days, generations, reused)
            forgotten.append(plural(len(reused), name))
            waiting.append(plural(len(free) - len(reused), name))
        if lifetimes and self._job.data.forget_after is not None:
            since = np.datetime64(self._today - self._job.data.forget_after, "D")
            log.info(
                "forgot %s not seen since %s, whose rows went to new ones; %s more keep theirs "
                "until new ones need them",
                " and ".join(forgotten),
                since,
                " and ".join(waiting),
            )
        return lifetimes

    def _entity_values(self, feature: Feature) -> Values:
        """Raw values of a field of users or items, by table row; counts their codes."""
        vocabulary = self.entities[feature.entity]
        n_cold = len(self.cold.get(feature.entity, ()))
        if feature.names_entity:
            hashed = np.append(np.int32(0), hashed_rows(vocabulary.ids, feature))
            no_ids = np.zeros(n_cold, np.int32)
            self.cold_values[feature.name] = Jagged(np.arange(n_cold + 1), no_ids)
            return Jagged(np.arange(vocabulary.rows + 1), hashed)
        if feature.file is None:
            in_rows = self._counts.of_entities[feature.name]
            rows = self._row_of_code[entity_key(feature.entity)][in_rows.entity]
            raw = in_rows.values
            self._job.note(
                f"{feature.entity}s whose rows differ in {feature.name}: the latest row is used",
                int(in_rows.differ.sum()),
            )
        else:
            side = self._partitions.side_files[feature.name]
            self.check_join(feature.entity, feature.file, feature.key, side.keys, feature.name)
            rows, raw = self.rows_of(feature.entity, side.keys), side.values
            # "first" depends on the order of the file, and vectors rarely repeat.
            if feature.keep == "all" and feature.kind != "vector":
                hashes = (
                    self._partitions.hashes(feature.table_name) if feature.has_vocabulary else None
                )
                words = seeded(words_of(raw, hashes), derive_seed(self._job.seed, "values"))
                order = np.lexsort((words_of(raw, None), words, rows))
                rows, raw = rows[order], taken(raw, order)
            # Several fields may read the same rows of a file.
            reason = f"{label_of(feature.file)} rows of {feature.entity}s without training rows"
            unknown = int((rows == 0).sum())
            self._job.drop(reason, max(0, unknown - self._job.dropped[reason]))
        known = np.flatnonzero(rows > 0)
        n = vocabulary.rows
        values = self._by_row(feature, rows[known], taken(raw, known), n + n_cold)
        if n_cold:
            self.cold_values[feature.name] = taken(values, np.arange(n, n + n_cold))
            values = taken(values, np.arange(n))
            if feature.kind == "vector":
                n_empty = n_cold - int(has_value(self.cold_values[feature.name]).sum())
                report_empty(feature, n_empty, n_cold, "items without training rows")
        self._check_filled(feature, values)
        if isinstance(values, Jagged) and feature.has_vocabulary:
            table = self._counts.tables[feature.table_name]
            table += np.bincount(values.values, minlength=len(table))
        return values

    def check_join(
        self,
        entity: str,
        file: Files,
        key: str | None,
        keys: pa.Array | pa.ChunkedArray,
        field: str,
    ) -> None:
        """Compares a side file's keys with the training rows' users or items, once per file.

        Args:
            entity: user or item.
            file: the file.
            key: column of the keys; None: the interactions'.
            keys: string.
            field: the column to read.

        Raises:
            DataError: no key matches.
        """
        name, column = label_of(file), key or getattr(self._job.data.interactions, entity)
        if (name, column) in self._joined:
            return
        ids = self._partitions.ids[entity_key(entity)]
        trained = pa.array(self._counts.tables[entity_key(entity)] > 0)
        others = pa.concat_arrays([ids.cast(pa.string()), self.entities[entity].ids])
        try:
            warning = check_join(
                f"{name}: the column {column!r}",
                keys,
                ids.filter(trained),
                others,
                entity,
                f"set key to the column of the {entity} ids, or leave {field} out",
            )
        except ValueError as error:
            raise DataError(str(error)) from None
        self._joined[name, column] = warning is not None
        if warning is not None:
            log.warning("%s", warning)

    def _check_filled(self, feature: Feature, values: Values) -> None:
        """Warns if many users or items have no value in a field."""
        if self._earlier.column(feature.entity, feature.name) is not None:
            return  # an earlier dataset may have values
        key = feature.key or getattr(self._job.data.interactions, feature.entity)
        if feature.file is not None and self._joined[label_of(feature.file), key]:
            return  # already reported: few are in the file
        n = len(values) - 1
        n_empty = n - int(has_value(values)[1:].sum())
        report_empty(feature, n_empty, n, f"{feature.entity}s")

    def missing(self, feature: Feature) -> float | None:
        """Share of rows, users or items without a value; None for ids and histories."""
        if feature.name in self.values:
            present = has_value(self.values[feature.name])[1:]
            return 1 - float(present.mean()) if len(present) else 0.0
        if feature.entity == "context":
            return self._counts.empty[feature.name] / int(self._counts.rows[:, TRAIN].sum())
        return None

    def _by_row(self, feature: Feature, rows: Int32Array, raw: Values, n: int) -> Values:
        """(row, value) pairs -> one value or bag for each of ``n`` rows; the first value counts."""
        if feature.kind == "vector":
            return self._vectors_by_row(feature, rows, raw, n)
        if feature.kind == "numeric":
            assert not isinstance(raw, Jagged)
            known = np.flatnonzero(~np.isnan(raw))
            owners, first = np.unique(rows[known], return_index=True)
            if feature.keep == "all":
                self._job.drop(
                    f"repeated {feature.name} values of one {feature.entity}",
                    len(known) - len(first),
                )
            numbers = np.full(n, np.nan)
            numbers[owners] = raw[known[first]]
            return numbers
        if not isinstance(raw, Jagged):
            there = raw >= 0
            raw = Jagged(offsets_of(there), raw[there].astype(np.int32))
        owners = np.repeat(rows, raw.lengths).astype(np.int64)
        values = raw.values
        pair = owners * (int(values.max(initial=0)) + 1) + values
        first = np.sort(np.unique(pair, return_index=True)[1])
        self._job.drop(
            f"repeated {feature.name} values of one {feature.entity}", len(pair) - len(first)
        )
        bags = Jagged.from_pairs(owners[first], values[first], n)
        return bags if feature.multi_valued else bags.firsts()

    def _vectors_by_row(
        self, feature: Feature, rows: Int32Array, raw: Values, n: int
    ) -> npt.NDArray[np.float32]:
        """``[n, dim]``: one vector for each row, NaN where there is none.

        If a row has several vectors, the lexicographically smallest is kept, or with ``keep:
        first`` the first in the file.
        """
        assert isinstance(raw, np.ndarray)
        known = np.flatnonzero(has_value(raw))
        order = known[np.argsort(rows[known], kind="stable")]
        owners, first, counts = np.unique(rows[order], return_index=True, return_counts=True)
        chosen = order[first]
        if feature.keep == "all":
            for place in np.flatnonzero(counts > 1):
                several = order[first[place] : first[place] + counts[place]]
                chosen[place] = min(several, key=lambda row: raw[row].tolist())
        self._job.drop(
            f"repeated {feature.name} vectors of one {feature.entity}", len(order) - len(owners)
        )
        vectors = np.full((n, raw.shape[1]), np.nan, np.float32)
        vectors[owners] = raw[chosen]
        return vectors
