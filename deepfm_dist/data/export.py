"""What a reader of exported weights needs of a prepared dataset."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.schema import Feature


def describe_fields(dataset: PreparedDataset) -> dict[str, Any]:
    """The fields in the model's order, as JSON values.

    Returns:
        ``entities``: the column with the external id of each entity; ``categorical`` and
        ``numeric``: the fields.
    """
    manifest = dataset.manifest
    rows = manifest.data.interactions
    return {
        "entities": {name: getattr(rows, name) for name in manifest.entities},
        "categorical": [
            _described(f)
            | {
                "table": f.table_name,
                "is_id": f.is_id,
                "fill": f.fill,
                "derive": f.derive,
                "hash_rows": f.hash_rows,
                "boundaries": manifest.numeric[f.name].boundaries
                if f.transform == "bucket"
                else None,
                "history": f.history,
                "several": f.multi_valued,
                "pooling": f.pooling if f.multi_valued else "sum",
            }
            for f in manifest.categorical
        ],
        "numeric": [
            _described(f)
            | {"transform": f.transform}
            | {k: getattr(manifest.numeric[f.name], k) for k in ("mean", "std")}
            for f in manifest.dense
        ],
    }


def _described(feature: Feature) -> dict[str, Any]:
    return {
        "name": feature.name,
        "entity": feature.entity,
        "column": feature.column or feature.name,
        "separator": feature.separator,
        "missing": ["", *feature.missing],
    }


def copy_vocabularies(dataset: PreparedDataset, target: Path) -> None:
    """Copies ``vocabulary/`` and, without histories, ``entities/`` into a folder."""
    for part in ("vocabulary", "entities"):
        (target / part).mkdir()
    for name in dataset.manifest.vocabularies:
        file = f"vocabulary/{name}.parquet"
        dataset.layout.open(file)
        shutil.copyfile(dataset.folder / file, target / file)
    for name in dataset.manifest.entities:
        source = dataset.layout.open(f"entities/{name}.parquet")
        of_entity = [
            f.name for f in dataset.manifest.features if f.entity == name and f.describes_entity
        ]
        schema = pa.schema([source.schema_arrow.field(name) for name in ("id", *of_entity)])
        path = target / "entities" / f"{name}.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in source.iter_batches(columns=schema.names):
                writer.write_batch(batch.select(schema.names))
    dataset.layout.check_current()
