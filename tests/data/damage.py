"""Changes to a prepared dataset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def changed(name: str, change: Callable[[pd.DataFrame], Any]) -> Callable[[Path], None]:
    """Another content of a file, of the same types and row groups."""

    def apply(folder: Path) -> None:
        with pq.ParquetFile(folder / name) as file:
            table, groups = file.read(), range(file.num_row_groups)
            heights = [file.metadata.row_group(g).num_rows for g in groups]
        frame = change(table.to_pandas(types_mapper=pd.ArrowDtype))
        schema = pa.schema([table.schema.field(c) for c in frame.columns])
        table = pa.Table.from_pandas(frame, schema, preserve_index=False)
        with pq.ParquetWriter(folder / name, schema) as writer:
            for height, end in zip(heights, np.cumsum(heights), strict=True):
                writer.write_table(table.slice(end - height, height), max(1, height))

    return apply


def cell(name: str, column: str, row: int, value: Any) -> Callable[[Path], None]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        values = frame[column].tolist()
        values[row] = value
        return frame.assign(**{column: pd.Series(values, dtype=frame[column].dtype)})

    return changed(name, change)


def setting(*path: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        inside = manifest
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return apply
