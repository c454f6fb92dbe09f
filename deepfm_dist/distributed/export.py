"""Weights out of a checkpoint: unsharded safetensors, a slice of a table at a time.

torch.distributed.checkpoint reads whole stored pieces, and a checkpoint of one rank holds each
table in one piece. Here a piece is opened without its numbers, to learn where they lie in the
file, and its rows are copied from there.
"""

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from deepfm_dist.distributed.checkpoint import Reader
from deepfm_dist.errors import CheckpointError, DeepFMError
from deepfm_dist.log import progress
from deepfm_dist.messages import brief
from deepfm_dist.storage import remove_leftovers, work_folder

FORMAT = 1
"""Version of the layout of an export."""
BUFFER_BYTES = 32 << 20
"""Bytes of a table that are read at a time."""

_TABLE = "model.model.embedding_arch.ebc.embedding_bags."
_OTHER = "model.model.interaction_arch."
_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


@dataclass(frozen=True)
class _Weight:
    """One tensor to write.

    Attributes:
        name: in the safetensors file.
        key: in the checkpoint.
        shape: as written.
        dtype: of its elements.
        n_rows: its first dimension; 1 for a scalar.
        row_bytes: bytes of one row as stored.
        kept_bytes: leading bytes of a row that are written.
        chunks: the pieces it is stored in.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_rows: int
    row_bytes: int
    kept_bytes: int
    chunks: tuple[ChunkStorageMetadata, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes as written."""
        return self.n_rows * self.kept_bytes


_CONFIG = "config.json"


@contextmanager
def export_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when all is written.

    Args:
        target: replaced where it holds an earlier export.

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
        raise DeepFMError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


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

    Up to ``max_file_bytes`` it is one ``model.safetensors``; beyond, tensors are dealt in order to
    ``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json`` says which is where,
    as Hugging Face's libraries do. A tensor larger than that has a file of its own.

    Args:
        checkpoint: its folder.
        target: an existing folder to write into.
        table_columns: leading columns of the tables that are used; the padding is left out.
        max_file_bytes: bytes of tensors in a file.
        buffer_bytes: bytes of a table that are in memory at a time, besides one copy.

    Returns:
        Shapes by name: ``tables.<table>`` of ``[rows, table_columns]``, and the rest as
        `deepfm_dist.model.deepfm.InteractionArch` names it.

    Raises:
        CheckpointError: the checkpoint is damaged.
        OSError: the folder cannot be written.
    """
    reader = _Reader(checkpoint)
    weights = reader.weights(table_columns)
    groups = _grouped(weights, max_file_bytes)
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


def _grouped(weights: Sequence[_Weight], max_bytes: int) -> list[list[_Weight]]:
    groups: list[list[_Weight]] = [[]]
    for weight in weights:
        filled = sum(w.size_bytes for w in groups[-1])
        if groups[-1] and filled + weight.size_bytes > max_bytes:
            groups.append([])
        groups[-1].append(weight)
    return groups


def _header(weights: Sequence[_Weight]) -> bytes:
    """Length and JSON that a safetensors file begins with.

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


class _Reader:
    """Rows of a checkpoint's tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = Reader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise self._damaged(error) from None

    def weights(self, table_columns: int) -> list[_Weight]:
        """The model's tensors, tables first."""
        found = []
        for key, stored in self._metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata):
                continue
            name = key.removeprefix(_OTHER)
            shape = tuple(stored.size)
            if key.startswith(_TABLE):
                name = f"tables.{key.removeprefix(_TABLE).removesuffix('.weight')}"
                shape = (shape[0], table_columns)
            elif name == key:
                continue
            if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
                raise self._damaged(f"pieces of {key} are missing")
            if any(chunk.sizes[1:] != stored.size[1:] for chunk in stored.chunks):
                raise self._damaged(f"{key} is cut by columns")
            item_bytes = stored.properties.dtype.itemsize
            n_rows = stored.size[0] if stored.size else 1
            row_bytes = stored.size.numel() // max(1, n_rows) * item_bytes
            kept = table_columns * item_bytes if key.startswith(_TABLE) else row_bytes
            chunks = tuple(stored.chunks)
            dtype = stored.properties.dtype
            found.append(_Weight(name, key, shape, dtype, n_rows, row_bytes, kept, chunks))
        return sorted(found, key=lambda weight: (not weight.key.startswith(_TABLE), weight.name))

    def slices(self, weight: _Weight, buffer_bytes: int) -> Iterator[memoryview]:
        """All rows in order, without their padding; the last slice may be shorter."""
        at_a_time = max(1, buffer_bytes // max(1, weight.row_bytes))
        buffer = np.empty((min(at_a_time, weight.n_rows), weight.row_bytes), np.uint8)
        for begin in range(0, weight.n_rows, at_a_time):
            rows = buffer[: weight.n_rows - begin]
            try:
                self._read(weight, begin, rows)
            except (OSError, EOFError, KeyError, RuntimeError, ValueError, BadZipFile) as error:
                raise self._damaged(error) from None
            yield np.ascontiguousarray(rows[:, : weight.kept_bytes]).data

    def _read(self, weight: _Weight, begin: int, rows: np.ndarray) -> None:
        """Fills ``[m, row_bytes]`` uint8 with the rows from ``begin`` on."""
        for chunk in weight.chunks:
            top, height = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
            low, high = max(begin, top), min(begin + len(rows), top + height)
            if low >= high:
                continue
            stored = self._metadata.storage_data[MetadataIndex(weight.key, chunk.offsets)]
            with (self._folder / stored.relative_path).open("rb") as file:
                file.seek(self._first_byte(file, stored, weight) + (low - top) * weight.row_bytes)
                wanted = rows[low - begin : high - begin]
                if file.readinto(wanted.data) != wanted.nbytes:
                    raise EOFError(f"{stored.relative_path} is too short")

    def _first_byte(self, file: BinaryIO, stored: Any, weight: _Weight) -> int:
        """Where in the file a piece's numbers begin."""
        view = self._reader._slice_file(file, stored)
        empty = torch.load(view, map_location="meta", weights_only=True)
        if empty.dtype != weight.dtype or not empty.is_contiguous() or empty.storage_offset():
            raise ValueError(f"{weight.key} is stored in another way than it was when written")
        return int(stored.offset + empty.untyped_storage()._checkpoint_offset)

    def _damaged(self, error: object) -> CheckpointError:
        return CheckpointError(f"{self._folder}: cannot be read: {brief(error)}")
