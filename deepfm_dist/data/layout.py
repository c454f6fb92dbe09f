"""Validates the files of a prepared dataset; above all, that every id is a row of its table.

Kernels do not check ids: FBGEMM's dense ones read past the end of the table. Sizes of tables are
checked when a dataset is opened, values when they are read: once for arrays kept in memory, and
once per row group for streamed rows.

Files are verified, too: a file's footer is compared with the manifest's checksum when it is opened,
and Arrow verifies the checksums of its pages on reading. Files stay open, so that readers are not
affected when a dataset of the same name is prepared again.
"""

import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.jagged import VECTORS_AT_ONCE, Jagged, Values, from_arrow
from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.schema import NO_LABEL, Feature
from deepfm_dist.errors import DataError

COLD = "cold_"
"""Prefix of the file that describes an entity's cold ones; see `Manifest.cold`."""
HISTORY = "history"
SEEN = {"train": (HISTORY, "seen_train"), "valid": ("seen_valid",), "test": ("seen_test",)}
"""By split, the columns of the user table that together hold a user's items. ``history`` has the
training positives, the others the remaining items.
"""
LISTS = tuple(name for names in SEEN.values() for name in names)
LAST_DAY, GENERATION = "row.last_day", "row.generation"
"""int32 columns of users and items for datasets that forget ids: the last day (since 1970) of the
latest log with an id, and the number of datasets in the chain before it got its row. Fields cannot
have these names.
"""
NEGATIVE_USER = "drawer"
"""Column of the training rows: the user whose items the row's negatives avoid, if users without a
table row share row 0.
"""
_Columns = Mapping[str, tuple[pa.DataType, float, float]]
"""Of each column: type, minimum, and exclusive maximum."""
_INT32S = pa.list_(pa.int32())
_NUMBER = (pa.float32(), -np.inf, np.inf)
_COUNT = (pa.int64(), 0, np.inf)
_TEXT = (pa.string(), 0, 0)
_HELD_FILES = 128
"""Maximum number of open files per process; some systems allow 256."""


class DatasetFiles:
    """Checks the files of a prepared dataset."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._opened = _identity(folder)
        self._held: OrderedDict[str, tuple[pa.NativeFile, pq.FileMetaData]] = OrderedDict()
        self._one_at_a_time = Lock()

    def open(self, name: str) -> pq.ParquetFile:
        """A file of the dataset; several readers of one file may be in use at a time.

        Raises:
            DataError: it is missing, damaged or replaced.
        """
        try:
            with self._one_at_a_time:
                if name not in self._held:
                    source = pa.OSFile(str(self._folder / name))
                    self._held[name] = source, pq.read_metadata(source)
                    self._check_prepared(name, source)
                self._held.move_to_end(name)
                source, metadata = self._held[name]
                if len(self._held) > _HELD_FILES:
                    self._held.popitem(last=False)
            return pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise self.damaged(name, error) from None

    def read(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Reads columns of a file and checks their values.

        Raises:
            DataError: see `open` and `check`.
        """
        try:
            table = self.open(name).read(columns)
        except (OSError, pa.ArrowInvalid) as error:
            raise self.damaged(name, error) from None
        return self.check(name, table)

    def check_current(self) -> None:
        """Checks that files opened by path belong to this dataset.

        Raises:
            DataError: it was replaced.
        """
        if _identity(self._folder) != self._opened:
            raise DataError(
                f"{self._folder}: prepared again, moved or deleted while it was in use; run the "
                f"command again"
            )

    def _check_prepared(self, name: str, source: pa.NativeFile) -> None:
        self.check_current()
        expected = self._manifest.sums.get(name)
        if expected is not None and footer_sum(source) != expected:
            raise pa.ArrowInvalid("not the file that was prepared: its checksum differs")

    def damaged(self, name: str, error: Exception) -> DataError:
        """The error for an unreadable file."""
        self.check_current()
        return DataError(
            f"{self._folder / name}: missing or damaged ({' '.join(str(error).split())[:80]}); "
            f"delete {self._folder} and prepare it again"
        )

    def check_sizes(self) -> None:
        """Compares the sizes of tables, vocabularies and entities.

        Raises:
            DataError: they differ, or a file is missing or damaged.
        """
        manifest = self._manifest
        for feature in manifest.categorical:
            table = feature.table_name
            stored, wanted = self._rows_of(table), self._rows_for(feature)
            self.agree("manifest.json", f"rows of the table {table}", stored, wanted)
        for table in manifest.vocabularies:
            name = f"vocabulary/{table}.parquet"
            self.agree(name, "rows", self._height(name), self._rows_of(table))
        for entity, rows in manifest.entities.items():
            name = f"entities/{entity}.parquet"
            self.agree(name, "rows", self._height(name), rows)
        for entity, rows in manifest.cold.items():
            name = f"entities/{COLD}{entity}.parquet"
            self.agree(name, "rows", self._height(name), rows)

    def entity_files(self, entity: str, cold: bool = True) -> list[str]:
        """The files with the rows of users or items.

        Args:
            entity: user or item.
            cold: whether to include cold ones.
        """
        names = [entity, *([f"{COLD}{entity}"] if cold and entity in self._manifest.cold else [])]
        return [f"entities/{name}.parquet" for name in names]

    def check(self, name: str, table: pa.Table) -> pa.Table:
        """Checks types and values.

        Args:
            name: the name of the file.
            table: any of its rows and columns.

        Returns:
            ``table``.

        Raises:
            DataError: a value is out of bounds, such as an id beyond its table.
        """
        for column, (kind, low, high) in self._columns(name).items():
            if column not in table.column_names:
                continue
            if table[column].type != kind:
                raise self.wrong(name, f"the column {column} is {table[column].type}, not {kind}")
            if pa.types.is_fixed_size_binary(kind):
                self._check_vectors(name, column, table[column])
                continue
            for chunk in table[column].chunks if kind != pa.string() else ():
                cells = chunk.flatten() if kind == _INT32S else chunk
                if chunk.null_count or cells.null_count:
                    raise self.wrong(name, f"the column {column} holds null")
                values = cells.to_numpy()
                if len(values) and not (values.min() >= low and values.max() < high):
                    value = values[~((values >= low) & (values < high))][0]
                    meant = f"a row of its table, {low} to {high - 1}"
                    if kind not in (pa.int32(), _INT32S):
                        meant = f"in [{low:g}, {high:g})"
                    raise self.wrong(name, f"the column {column} holds {value}, not {meant}")
        return table

    def _check_vectors(self, name: str, column: str, cells: pa.ChunkedArray) -> None:
        if cells.null_count:
            raise self.wrong(name, f"the column {column} holds null")
        vectors = from_arrow(cells)
        assert isinstance(vectors, np.ndarray)
        for begin in range(0, len(vectors), VECTORS_AT_ONCE):
            if not np.isfinite(vectors[begin : begin + VECTORS_AT_ONCE]).all():
                raise self.wrong(name, f"the column {column} holds a number that is not finite")

    def check_everything(self) -> None:
        """Reads every file once, a row group at a time.

        Raises:
            DataError: names the first file that violates ``docs/data.md``.
        """
        self.check_sizes()
        for table in self._manifest.vocabularies:
            name, begin = f"vocabulary/{table}.parquet", 0
            for n, values in self._groups(name):
                if not np.array_equal(values["row"], np.arange(begin, begin + n)):  # type: ignore[arg-type]
                    raise self.wrong(name, "row does not count from 0")
                begin += n
            self._check_ids(name)
        cold = (f"{COLD}{entity}" for entity in self._manifest.cold)
        for entity in (*self._manifest.entities, *cold, *["rare"] * self._has_rare):
            name = f"entities/{entity}.parquet"
            for _, columns in self._groups(name):
                self._check_single_values(name, columns)
            if entity != "rare":
                self._check_ids(name)
        for split in SPLITS:
            self._check_split(split)

    def _check_single_values(self, name: str, columns: Mapping[str, Values]) -> None:
        for field in self._manifest.single_valued & columns.keys():
            values = columns[field]
            if isinstance(values, Jagged) and values.lengths.max(initial=0) > 1:
                raise self.wrong(name, f"{field} has several values, though the field has one")

    def agree(self, name: str, what: str, stored: int, wanted: int) -> None:
        """Compares a number with the manifest's.

        Raises:
            DataError: they differ.
        """
        if stored != wanted:
            raise self.wrong(name, f"{stored:,} {what}, where the manifest says {wanted:,}")

    def _rows_of(self, table: str) -> int:
        tables = self._manifest.tables
        return tables[table].rows if table in tables else 0

    def _rows_for(self, feature: Feature) -> int:
        """The required number of rows of a field's table."""
        manifest = self._manifest
        if feature.transform == "bucket":
            return 2 + len(manifest.numeric[feature.name].boundaries)
        if feature.hash_rows is not None:
            return 1 + feature.hash_rows
        if feature.history is not None:
            feature = manifest.data.source_of(feature)
        if feature.is_id:
            return manifest.entities.get(feature.entity, 0)
        return self._rows_of(feature.table_name)

    def _columns(self, name: str) -> _Columns:
        """The required columns of a file; it may have more."""
        manifest, (kind, file) = self._manifest, name.split("/")
        history_spec = (_INT32S, 1, manifest.entities.get("item", 0))
        seen_spec = (_INT32S, 1, manifest.n_rows("item") if "item" in manifest.entities else 0)
        lists = {name: history_spec if name == HISTORY else seen_spec for name in LISTS}
        if kind == "vocabulary":
            rows = (pa.int32(), 0, self._rows_of(file.removesuffix(".parquet")))
            return {"row": rows, "id": _TEXT, "count": _COUNT}
        if file == "rare.parquet":
            return lists
        columns: dict[str, tuple[pa.DataType, float, float]] = {}
        if kind == "entities":
            is_cold = file.startswith(COLD)
            entity = file.removesuffix(".parquet").removeprefix(COLD)
            columns["id"] = _TEXT
            for feature in manifest.features:
                if feature.entity == entity and feature.describes_entity:
                    columns[feature.name] = self._field_spec(feature, always_lists=True)
            if {"user", "item"} <= manifest.entities.keys() and not is_cold:
                columns |= lists if entity == "user" else {"count": _COUNT}
            if entity == "item" and manifest.data.titles is not None:
                columns["title"] = _TEXT
            return columns
        for entity, n_trained in manifest.entities.items():
            n = n_trained if kind == "train" else manifest.n_rows(entity)
            columns[entity] = (pa.int32(), 0, n)
        if kind != "train" or not manifest.sampled:
            columns["label"] = (pa.float32(), 0, 1.5)
            columns |= {n: (pa.float32(), NO_LABEL, 1.5) for n in self._labels}
        if kind == "train" and self._has_rare:
            rare = self._height("entities/rare.parquet")
            columns[NEGATIVE_USER] = (pa.int32(), 0, manifest.entities["user"] + rare)
        if manifest.data.interactions.weight is not None:
            columns["weight"] = (pa.float32(), np.nextafter(np.float32(0), np.float32(1)), np.inf)
        for feature in manifest.features:
            if feature.entity == "context":
                columns[feature.name] = self._field_spec(feature, always_lists=False)
        return columns

    @property
    def _labels(self) -> tuple[str, ...]:
        """Columns of several labels; ``label`` is 1 if any of them is."""
        spec = self._manifest.data.interactions
        return spec.label_columns if spec.labels else ()

    @property
    def _has_rare(self) -> bool:
        return (self._folder / "entities" / "rare.parquet").exists()

    def _field_spec(self, feature: Feature, always_lists: bool) -> tuple[pa.DataType, float, float]:
        if feature.kind == "vector":
            return pa.binary(2 * self._manifest.vectors[feature.name]), -np.inf, np.inf
        if not feature.in_table:
            return _NUMBER
        lists = feature.kind == "categorical" and (always_lists or feature.multi_valued)
        return _INT32S if lists else pa.int32(), 0, self._rows_of(feature.table_name)

    def _check_ids(self, name: str) -> None:
        ids = self.read(name, ["id"])["id"]
        if name.startswith(f"entities/{COLD}"):
            if ids.null_count:
                raise self.wrong(name, "id must not be null")
        elif ids[0].is_valid or ids.null_count != 1:
            raise self.wrong(name, "id must be null in row 0, and in no other")
        if len(ids.unique()) < len(ids):
            raise self.wrong(name, "an id comes twice")

    def _check_split(self, split: str) -> None:
        manifest, spec = self._manifest, self._manifest.splits[split]
        n = positives = 0
        known = {column: np.zeros(2, np.int64) for column in self._labels}
        for p in range(manifest.files):
            name = f"{split}/part-{p:05d}.parquet"
            for rows, values in self._groups(name):
                if split == "train" and ((manifest.cuts > n) & (manifest.cuts < n + rows)).any():
                    raise self.wrong(name, f"the row group at row {n} of the split crosses a cut")
                labels = values.get("label", np.ones(rows, np.float32))
                assert isinstance(labels, np.ndarray)
                if not np.isin(labels, (0, 1)).all():
                    raise self.wrong(name, "label must be 0 or 1")
                for column in self._labels:
                    if not np.isin(np.asarray(values[column]), (NO_LABEL, 0, 1)).all():
                        raise self.wrong(name, f"{column} must be 0, 1 or {NO_LABEL} (not known)")
                    known[column] += [np.count_nonzero(values[column] == y) for y in (0, 1)]
                n += rows
                positives += int(labels.sum())
        self.agree(split, "rows", n, spec.rows)
        self.agree(split, "positives", positives, spec.positives)
        for column, label_spec in zip(known, spec.labels.values(), strict=True):
            self.agree(split, f"rows with {column}", int(known[column].sum()), label_spec.rows)
            self.agree(split, f"{column} positives", int(known[column][1]), label_spec.positives)

    def _groups(self, name: str) -> Iterator[tuple[int, dict[str, Values]]]:
        """Checks each row group, without texts; yields its rows and columns."""
        columns = self._columns(name)
        try:
            with self.open(name) as file:
                schema = file.schema_arrow
                for column, (kind, *_) in columns.items():
                    kind_stored = schema.field(column).type if column in schema.names else "missing"
                    if kind_stored != kind:
                        raise self.wrong(name, f"the column {column} is {kind_stored}, not {kind}")
                names = [column for column, (kind, *_) in columns.items() if kind != pa.string()]
                for g in range(file.num_row_groups):
                    table = self.check(name, file.read_row_group(g, names))
                    yield table.num_rows, {c: from_arrow(table[c]) for c in names}
        except (OSError, pa.ArrowInvalid) as error:
            raise self.damaged(name, error) from None

    def _height(self, name: str) -> int:
        return int(self.open(name).metadata.num_rows)

    def wrong(self, name: str, what: str) -> DataError:
        """The error for an invalid file."""
        return DataError(
            f"{self._folder / name}: {what}; delete {self._folder} and prepare it again, laid out "
            f"as docs/data.md says"
        )


def _identity(folder: Path) -> tuple[int, ...] | None:
    """Hash of the manifest in a folder, or None without one."""
    try:
        status = (folder / "manifest.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def signed_table(table: pa.Table, path: Path, total: int = 0) -> pa.Table:
    """A table with its file's name and a checksum of its values in the metadata.

    They end up in the footer, which could otherwise equal that of another file of the same size.
    """
    name = f"{path.parent.name}/{path.name}"
    return table.replace_schema_metadata({"file": name, "crc32": str(total)})


def footer_sum(source: pa.NativeFile) -> int:
    """CRC-32 of a Parquet file's size and footer, which describes its pages."""
    size = source.size()
    length = int.from_bytes(source.read_at(4, size - 8), "little")
    footer = source.read_at(length + 8, size - length - 8)
    return zlib.crc32(footer, zlib.crc32(str(size).encode()))


def footer_sums(folder: Path) -> dict[str, int]:
    """`footer_sum` of every Parquet file of a dataset, by its name."""
    files = sorted(folder.glob("*/*.parquet"))
    return {str(f.relative_to(folder)): footer_sum(pa.OSFile(str(f))) for f in files}
