"""A model as unsharded safetensors, with vocabularies and ``config.json``, for other code."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import from_arrow
from deepfm_dist.data.schema import Feature
from deepfm_dist.distributed.stored_model import StoredModel, StoredWeight
from deepfm_dist.errors import CheckpointError, DeepFMError
from deepfm_dist.log import progress
from deepfm_dist.messages import brief
from deepfm_dist.storage import remove_leftovers, work_folder

FORMAT = 2
"""Version of the layout of an export. Version 1 had no histories."""
BUFFER_BYTES = 32 << 20
"""Bytes of a table to read at a time."""

_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_CONFIG = "config.json"


@contextmanager
def export_folder(target: Path) -> Iterator[Path]:
    """Yields a folder to write into, which becomes ``target`` at the end.

    Args:
        target: an earlier export there is replaced.

    Raises:
        DeepFMError: it holds something else, or cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise DeepFMError(f"{target}: is a file; --output names a folder")
    if target.exists() and not (target / _CONFIG).is_file() and any(target.iterdir()):
        raise DeepFMError(f"{target}: holds files but no export; give another --output")
    part = work_folder(target)
    try:
        remove_leftovers(target)
        part.mkdir(parents=True)
        yield part
        if target.exists():
            shutil.rmtree(target)
        part.rename(target)
    except OSError as error:
        raise DeepFMError(
            f"{target}: cannot be written: {error.strerror or error}; give another --output, or "
            f"make the folder writable"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the values of `write_config`; empty if the export is missing or damaged."""
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def write_config(folder: Path, **values: Any) -> None:
    """Writes ``config.json``: what a reader needs besides weights and vocabularies."""
    (folder / _CONFIG).write_text(json.dumps({"format": FORMAT} | values, indent=2) + "\n")


def write_weights(
    checkpoint: Path,
    target: Path,
    table_columns: int,
    max_file_bytes: int,
    buffer_bytes: int = BUFFER_BYTES,
) -> dict[str, tuple[int, ...]]:
    """Writes a checkpoint's model as safetensors, without a process group.

    Up to ``max_file_bytes`` it is one ``model.safetensors``; larger models are divided into
    ``model-00001-of-0000N.safetensors`` with ``model.safetensors.index.json``, the layout of
    Hugging Face's libraries. A larger tensor gets a separate file. The writer of
    torch.distributed.checkpoint needs tensors in memory, which tables may exceed.

    Args:
        checkpoint: its folder.
        target: an existing folder to write into.
        table_columns: number of leading columns of the tables to write, without padding.
        max_file_bytes: maximum bytes of tensors in a file.
        buffer_bytes: bytes of a table in memory at a time, plus one copy.

    Returns:
        Shapes by name: ``tables.<table>`` of ``[rows, table_columns]``, and the rest with the names
        of `deepfm_dist.model.deepfm.InteractionArch`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: the folder cannot be written.
    """
    reader = StoredModel(checkpoint)
    weights = reader.weights(table_columns)
    groups = _group_by_size(weights, max_file_bytes)
    files = {
        "model.safetensors"
        if len(groups) == 1
        else f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }
    total = sum(weight.size_bytes for weight in weights)
    with progress(total, "export", "B", is_first=True) as bar:
        for file, group in files.items():
            with (target / file).open("wb") as out:
                out.write(_header(group))
                for weight in group:
                    for rows in reader.slices(weight, buffer_bytes):
                        out.write(rows)
                        bar.update(rows.nbytes)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {w.name: file for file, group in files.items() for w in group},
        }
        text = json.dumps(index, indent=2, sort_keys=True)
        (target / "model.safetensors.index.json").write_text(text + "\n")
    return {w.name: w.shape for w in weights}


def _group_by_size(weights: Sequence[StoredWeight], max_bytes: int) -> list[list[StoredWeight]]:
    groups: list[list[StoredWeight]] = [[]]
    for weight in weights:
        filled = sum(w.size_bytes for w in groups[-1])
        if groups[-1] and filled + weight.size_bytes > max_bytes:
            groups.append([])
        groups[-1].append(weight)
    return groups


def _header(weights: Sequence[StoredWeight]) -> bytes:
    """The header of a safetensors file: length and JSON.

    Source: https://github.com/huggingface/safetensors, README, "Format".
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for weight in weights:
        described[weight.name] = {
            "dtype": _DTYPES[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [at, at + weight.size_bytes],
        }
        at += weight.size_bytes
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_weights(export: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export by name.

    Raises:
        CheckpointError: a file is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(export.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path}: damaged ({brief(error)}); delete {export}, and it is exported again"
            ) from None
    return tensors


def describe_fields(dataset: PreparedDataset) -> dict[str, Any]:
    """The fields in the model's order, as JSON values.

    Returns:
        ``entities``: the column with the external id of each entity; ``categorical``, ``numeric``
        and ``vectors``: the fields.
    """
    manifest = dataset.manifest
    rows = manifest.data.interactions
    return {
        "entities": {name: getattr(rows, name) for name in manifest.entities},
        "categorical": [
            _describe(f)
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
                "last": f.last,
                "several": f.multi_valued,
                "pooling": f.pooling if f.multi_valued else "sum",
            }
            for f in manifest.categorical
        ],
        "numeric": [
            _describe(f)
            | {"transform": f.transform}
            | {k: getattr(manifest.numeric[f.name], k) for k in ("mean", "std")}
            for f in manifest.dense
        ],
        "vectors": [
            _describe(f) | {"dim": f.dim, "scale": manifest.numeric[f.name].std}
            for f in manifest.vector_fields
        ],
    }


def _describe(feature: Feature) -> dict[str, Any]:
    return {
        "name": feature.name,
        "entity": feature.entity,
        "column": feature.column or feature.name,
        "separator": feature.separator,
        "missing": ["", *feature.missing],
    }


def copy_vocabularies(dataset: PreparedDataset, target: Path) -> None:
    """Copies ``vocabulary/`` into a folder."""
    (target / "vocabulary").mkdir()
    for name in dataset.manifest.vocabularies:
        file = f"vocabulary/{name}.parquet"
        dataset.files.open(file)
        shutil.copyfile(dataset.folder / file, target / file)
    dataset.files.check_current()


def write_entities(dataset: PreparedDataset, target: Path) -> None:
    """Writes ``entities/``: for each user and item the external id and every field's value.

    A history field is a list of rows of its table, as used outside training; vectors are scaled
    like the model's input. Items without training rows follow the others; they have no row in the
    item table.

    Args:
        dataset: the prepared dataset.
        target: an existing folder to write into.
    """
    (target / "entities").mkdir()
    manifest = dataset.manifest
    histories = [f for f in manifest.categorical if f.history is not None]
    collate = Collator(dataset) if histories else None
    for entity in manifest.entities:
        first, *_ = files = dataset.files.entity_files(entity)
        fields = [f for f in manifest.features if f.entity == entity and f.describes_entity]
        columns = ["id", *(f.name for f in fields)]
        kinds = [dataset.files.open(first).schema_arrow.field(name) for name in columns]
        for place, name in enumerate(columns):
            if name in manifest.vectors:
                kind = pa.list_(pa.float16(), manifest.vectors[name])
                kinds[place] = pa.field(name, kind)
        if entity == "user":
            kinds += [pa.field(f.name, pa.list_(pa.int32())) for f in histories]
        groups = [(file, *g) for file in files for g in enumerate(dataset.group_rows(file))]
        with pq.ParquetWriter(target / first, pa.schema(kinds), compression="zstd") as writer:
            begin = 0
            for file, group, n_rows in groups:
                table = dataset.read_group(file, group, columns)
                arrays = [_as_list(table[name]) for name in columns]
                if entity == "user" and collate is not None:
                    users = np.arange(begin, begin + n_rows, dtype=np.int32)
                    arrays += [collate.history(f, users).to_arrow() for f in histories]
                writer.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(kinds)))
                begin += n_rows
    dataset.files.check_current()


def _as_list(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column with the bytes of vectors as lists of float16; others as they are."""
    if not pa.types.is_fixed_size_binary(column.type):
        return column
    vectors = from_arrow(column)
    assert isinstance(vectors, np.ndarray)
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
