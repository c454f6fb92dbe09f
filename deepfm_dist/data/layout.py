"""Checks a prepared dataset that another tool wrote, before anything is trained on it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.jagged import Jagged, Values, from_arrow
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.split import SPLITS
from deepfm_dist.errors import DataError

_Columns = Mapping[str, tuple[pa.DataType, float, float]]
"""Of each: its type, its least value, and the least value that is too large."""
_INT32S = pa.list_(pa.int32())
_NUMBER = (pa.float32(), -np.inf, np.inf)
_COUNT = (pa.int64(), 0, np.inf)


def check_layout(folder: Path, manifest: Manifest) -> None:
    """Reads every file once, a row group at a time.

    Args:
        folder: of the dataset.
        manifest: of it.

    Raises:
        DataError: names the first file that is not as ``docs/data.md`` says.
    """
    for feature in manifest.features:
        if feature.in_table:
            _check_table(folder, manifest, feature)
    for entity, rows in manifest.entities.items():
        path = folder / "entities" / f"{entity}.parquet"
        found = sum(n for n, _ in _groups(path, _of_entity(manifest, entity)))
        _agree(path, "rows", found, rows)
        _check_ids(path)
    for split in SPLITS:
        _check_split(folder, manifest, split)


def _check_table(folder: Path, manifest: Manifest, feature: Feature) -> None:
    name = feature.table_name
    rows = manifest.tables[name].rows if name in manifest.tables else 0
    path = folder / "manifest.json"
    if feature.transform == "bucket":
        wanted = 2 + len(manifest.numeric[feature.name].boundaries)
    elif feature.hash_rows is not None:
        wanted = 1 + feature.hash_rows
    elif feature.is_id:
        wanted = manifest.entities[feature.entity]
    else:
        wanted = rows
    _agree(path, f"rows of the table {name}", rows, wanted)
    if name in manifest.vocabularies:
        path = folder / "vocabulary" / f"{name}.parquet"
        columns = {"row": (pa.int32(), 0, rows), "id": (pa.string(), 0, 0), "count": _COUNT}
        begin = 0
        for n, values in _groups(path, columns):
            if not (values["row"] == np.arange(begin, begin + n)).all():  # type: ignore[union-attr]
                raise _wrong(path, "row does not count from 0")
            begin += n
        _agree(path, "rows", begin, rows)
        _check_ids(path)


def _check_ids(path: Path) -> None:
    ids = pq.read_table(path, columns=["id"])["id"]
    if ids[0].is_valid or ids.null_count != 1:
        raise _wrong(path, "id must be null in row 0, and in no other")
    if len(ids.unique()) < len(ids):
        raise _wrong(path, "an id comes twice")


def _of_entity(manifest: Manifest, entity: str) -> _Columns:
    columns: dict[str, tuple[pa.DataType, float, float]] = {"id": (pa.string(), 0, 0)}
    for feature in manifest.features:
        if feature.entity == entity and not feature.is_id:
            columns[feature.name] = _of_field(manifest, feature, always_lists=True)
    if {"user", "item"} <= manifest.entities.keys():
        if entity == "user":
            columns["history"] = (_INT32S, 1, manifest.entities["item"])
        else:
            columns["count"] = _COUNT
    if entity == "item" and manifest.data.titles is not None:
        columns["title"] = (pa.string(), 0, 0)
    return columns


def _of_field(
    manifest: Manifest, feature: Feature, always_lists: bool
) -> tuple[pa.DataType, float, float]:
    if not feature.in_table:
        return _NUMBER
    lists = feature.multi_valued or (always_lists and feature.kind == "categorical")
    return _INT32S if lists else pa.int32(), 0, manifest.tables[feature.table_name].rows


def _check_split(folder: Path, manifest: Manifest, split: str) -> None:
    spec, rows_of = manifest.splits[split], manifest.data.interactions
    columns: dict[str, tuple[pa.DataType, float, float]] = {
        name: (pa.int32(), 0, rows) for name, rows in manifest.entities.items()
    }
    if split != "train" or not manifest.sampled:
        columns["label"] = (pa.float32(), 0, 1.5)
    rare = folder / "entities" / "rare.parquet"
    if (split == "train" or manifest.data.negatives.avoid == "all") and rare.exists():
        behind = manifest.entities["user"] + sum(
            n for n, _ in _groups(rare, {"history": (_INT32S, 1, manifest.entities["item"])})
        )
        columns["drawer"] = (pa.int32(), 0, behind)
    if rows_of.weight is not None:
        columns["weight"] = (pa.float32(), np.nextafter(np.float32(0), np.float32(1)), np.inf)
    for feature in manifest.features:
        if feature.entity == "context":
            columns[feature.name] = _of_field(manifest, feature, always_lists=False)
    n = positives = 0
    for p in range(manifest.files):
        path = folder / split / f"part-{p:05d}.parquet"
        for rows, values in _groups(path, columns):
            if split == "train" and ((manifest.cuts > n) & (manifest.cuts < n + rows)).any():
                raise _wrong(path, f"the row group at row {n} of the split crosses a cut")
            labels = values.get("label", np.ones(rows, np.float32))
            assert isinstance(labels, np.ndarray)
            if not np.isin(labels, (0, 1)).all():
                raise _wrong(path, "label must be 0 or 1")
            n += rows
            positives += int(labels.sum())
    _agree(folder / split, "rows", n, spec.rows)
    _agree(folder / split, "positives", positives, spec.positives)


def _groups(path: Path, columns: _Columns) -> Iterator[tuple[int, dict[str, Values]]]:
    """Rows and columns of each row group, texts left out, once types and values are checked."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, (kind, *_) in columns.items():
                found = schema.field(name).type if name in schema.names else "missing"
                if found != kind:
                    raise _wrong(path, f"the column {name} is {found}, not {kind}")
            names = [name for name, (kind, *_) in columns.items() if kind != pa.string()]
            for g in range(file.num_row_groups):
                table = file.read_row_group(g, names)
                values = {name: from_arrow(table[name]) for name in names}
                for name, column in values.items():
                    flat = column.values if isinstance(column, Jagged) else column
                    _, low, high = columns[name]
                    if table[name].null_count or not ((flat >= low) & (flat < high)).all():
                        raise _wrong(path, f"the column {name} must lie in [{low:g}, {high:g})")
                yield table.num_rows, values
    except (OSError, pa.ArrowInvalid) as error:
        raise _wrong(path, " ".join(str(error).split())[:80]) from None


def _agree(path: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise _wrong(path, f"{found:,} {what}, where the manifest says {wanted:,}")


def _wrong(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}; docs/data.md says how a dataset is laid out")
