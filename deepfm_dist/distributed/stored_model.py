"""Reads the model in a checkpoint in slices of tables.

torch.distributed.checkpoint reads whole shards, and in the checkpoint of one rank each table is one
shard. Here a shard is opened on the meta device to find its elements in the file, and its rows are
read directly.
"""

import pickle
from collections.abc import Iterator
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
from deepfm_dist.errors import CheckpointError
from deepfm_dist.messages import brief

_TABLE = "model.model.embedding_arch.ebc.embedding_bags."
_OTHER = "model.model.interaction_arch."


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of a checkpoint's model.

    Attributes:
        name: ``tables.<table>``, or the name in `InteractionArch`.
        key: its key in the checkpoint.
        shape: the shape, without the padding of a table's rows.
        dtype: the dtype of its elements.
        n_rows: its first dimension; 1 for a scalar.
        row_bytes: bytes of one row as stored.
        kept_bytes: bytes of a row without padding.
        chunks: its shards.
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
        """Bytes without padding."""
        return self.n_rows * self.kept_bytes


class StoredModel:
    """The model of a checkpoint, read without a process group and a few rows at a time.

    Raises:
        CheckpointError: its metadata is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = Reader(folder)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise self._damage_error(error) from None

    def weights(self, table_columns: int) -> list[StoredWeight]:
        """The model's tensors, tables first.

        Args:
            table_columns: number of used leading columns of the tables, without padding.

        Raises:
            CheckpointError: shards are missing.
        """
        weights = []
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
                raise self._damage_error(f"pieces of {key} are missing")
            if any(chunk.sizes[1:] != stored.size[1:] for chunk in stored.chunks):
                raise self._damage_error(f"{key} is cut by columns")
            item_bytes = stored.properties.dtype.itemsize
            n_rows = stored.size[0] if stored.size else 1
            row_bytes = stored.size.numel() // max(1, n_rows) * item_bytes
            kept = table_columns * item_bytes if key.startswith(_TABLE) else row_bytes
            chunks = tuple(stored.chunks)
            dtype = stored.properties.dtype
            weights.append(
                StoredWeight(
                    name=name,
                    key=key,
                    shape=shape,
                    dtype=dtype,
                    n_rows=n_rows,
                    row_bytes=row_bytes,
                    kept_bytes=kept,
                    chunks=chunks,
                )
            )
        return sorted(weights, key=lambda weight: (not weight.key.startswith(_TABLE), weight.name))

    def slices(self, weight: StoredWeight, buffer_bytes: int) -> Iterator[memoryview]:
        """All rows in order, without their padding; the last slice may be shorter.

        Args:
            weight: one of `weights`.
            buffer_bytes: bytes of stored rows in memory at a time, besides one copy.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        at_a_time = max(1, buffer_bytes // max(1, weight.row_bytes))
        buffer = np.empty((min(at_a_time, weight.n_rows), weight.row_bytes), np.uint8)
        for begin in range(0, weight.n_rows, at_a_time):
            rows = buffer[: weight.n_rows - begin]
            try:
                self._read(weight, begin, rows)
            except (OSError, EOFError, KeyError, RuntimeError, ValueError, BadZipFile) as error:
                raise self._damage_error(error) from None
            yield np.ascontiguousarray(rows[:, : weight.kept_bytes]).data

    def _read(self, weight: StoredWeight, begin: int, rows: np.ndarray) -> None:
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

    def _first_byte(self, file: BinaryIO, stored: Any, weight: StoredWeight) -> int:
        """Offset in the file of a shard's first element."""
        view = self._reader._slice_file(file, stored)
        empty = torch.load(view, map_location="meta", weights_only=True)
        if empty.dtype != weight.dtype or not empty.is_contiguous() or empty.storage_offset():
            raise ValueError(f"{weight.key} is stored differently from when it was written")
        return int(stored.offset + empty.untyped_storage()._checkpoint_offset)

    def _damage_error(self, error: object) -> CheckpointError:
        return CheckpointError(f"{self._folder}: cannot be read: {brief(error)}")
