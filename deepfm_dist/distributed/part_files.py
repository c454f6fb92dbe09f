"""A local or remote folder of Parquet parts that ranks write in parallel."""

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.storage import (
    ANOTHER_OUTPUT,
    atomic_write,
    delete_tree,
    is_remote,
    storage_errors_to_user,
    write_errors_to_user,
)

log = logging.getLogger(__name__)

SUCCESS = "_SUCCESS"
"""Exists once all parts are complete; JSON with their number and a summary."""
_INPUTS = "_inputs.json"
_PART = re.compile(r"part-(\d{6})\.parquet")
_NO_DICTIONARY = ("score", "probability")
"""Columns with mostly distinct values: trying dictionary encoding would take half of the time."""


class PartFolder:
    """Parts ``part-000000.parquet``, ..., each complete or absent. All ranks.

    Parts are renamed into place when complete, so that an interrupted job resumes with the missing
    ones. Parts are reused only if they were made from the same inputs.

    Args:
        folder: a URL, or a folder that all ranks share.
        inputs: everything that the parts depend on, as JSON values; None: never reuse earlier
            parts.
        world: the ranks.
        content: description of the parts; parts of something else are not replaced.
        private: whether the folder belongs to this job, so that anything else in it is deleted;
            otherwise a folder with other files is refused.

    Attributes:
        present: numbers of existing parts.
        summary: the summary of a complete folder; None if it was incomplete.

    Raises:
        ConfigError: the folder holds other files or parts of something else, or is a file.
        DeepFMError: the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        inputs: Mapping[str, object] | None,
        world: World,
        content: str = "",
        private: bool = False,
    ) -> None:
        self.folder, self._world, self._private = folder, world, private
        self._content = content
        described = {"content": content, **(inputs or {})}
        text = json.dumps(described, indent=2, sort_keys=True) + "\n"
        opened = world.run_on_rank0(f"{folder}_open", lambda: self._open(text, inputs is not None))
        self.present, self.summary = world.broadcast(opened or (frozenset[int](), None))

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{part:06d}.parquet"

    def _open(self, inputs: str, reusable: bool) -> tuple[frozenset[int], Mapping[str, Any] | None]:
        with write_errors_to_user(self.folder, ANOTHER_OUTPUT):
            names = self._names()
            if reusable and _INPUTS in names and (self.folder / _INPUTS).read_text() == inputs:
                present = frozenset(int(m[1]) for m in map(_PART.fullmatch, names) if m)
                return present, self._complete(present) if SUCCESS in names else None
            self._clear(names)
            if not is_remote(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / _INPUTS) as file:
                file.write_text(inputs)
        return frozenset(), None

    def _names(self) -> set[str]:
        if not self.folder.exists():
            return set()
        if self.folder.is_file():
            raise ConfigError(f"{self.folder}: is a file; name a folder for the parts")
        return {path.name for path in self.folder.iterdir()}

    def _complete(self, present: frozenset[int]) -> Mapping[str, Any] | None:
        """The summary of a complete folder; None if a part is missing."""
        mark = self.folder / SUCCESS
        try:
            summary: Mapping[str, Any] = json.loads(mark.read_text())
            missing = summary["parts"] - len(present)
        except (ValueError, KeyError, TypeError):
            missing = 1
        if not missing:
            return summary
        log.warning("%s: complete before, but parts are missing now; making them again", mark)
        mark.unlink()
        return None

    def _clear(self, names: set[str]) -> None:
        """Deletes parts that were made from other inputs."""
        if self._private:
            delete_tree(self.folder)
            return
        own = sorted(name for name in names if _PART.fullmatch(name))
        others = sorted(name for name in names - {*own} if name[:1] not in (".", "_"))
        if others or (own and _INPUTS not in names):
            raise ConfigError(
                f"{self.folder}: holds files that this command did not write "
                f"({[*others, *own][0]}); name a new or empty folder"
            )
        if own and (content := self._content_there()) not in (self._content, ""):
            raise ConfigError(
                f"{self.folder}: holds {content}, and this command writes {self._content}; name a "
                f"new or empty folder"
            )
        if own or SUCCESS in names:
            log.info("%s: replacing its parts, which were made from other inputs", self.folder)
        for name in (
            SUCCESS,
            *own,
            _INPUTS,
        ):  # the mark first, so that an interrupted removal leaves an incomplete folder
            (self.folder / name).unlink(missing_ok=True)

    def _content_there(self) -> str:
        """Description of the existing parts; empty for an earlier version's."""
        with suppress(ValueError, AttributeError):  # damaged
            return str(json.loads((self.folder / _INPUTS).read_text()).get("content", ""))
        return ""

    def write(self, part: int, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes a part. Any rank.

        Raises:
            DeepFMError: it cannot be written: the disk is full, for example.
        """
        path = self.path(part)
        with write_errors_to_user(path, ANOTHER_OUTPUT):
            if is_remote(path):
                with atomic_write(path) as aside:
                    _write_parquet(aside, schema, tables)
                return
            aside = path.with_name(f".{path.name}")
            _write_parquet(aside, schema, tables)
            os.replace(aside, path)

    def check_complete(self, n_parts: int) -> None:
        """Checks that this process sees the parts of all ranks.

        Raises:
            DeepFMError: parts written on another machine are missing.
        """
        with storage_errors_to_user(self.folder):
            names = self._names()
        missing = [p for p in map(self.path, range(n_parts)) if p.name not in names]
        if missing:
            raise DeepFMError(
                f"{self.folder}: {len(missing):,} of {n_parts:,} parts that other ranks wrote are "
                f"not there, such as {missing[0].name}; name a folder that all machines share, or "
                f"a URL"
            )

    def finish(self, n_parts: int, summary: Mapping[str, Any]) -> None:
        """Marks the folder as complete, once all ranks have written their parts. All ranks.

        Raises:
            DeepFMError: see `check_complete`.
        """

        def mark() -> None:
            self.check_complete(n_parts)
            with (
                write_errors_to_user(self.folder, ANOTHER_OUTPUT),
                atomic_write(self.folder / SUCCESS) as file,
            ):
                file.write_text(json.dumps({"parts": n_parts, **summary}) + "\n")

        self._world.barrier()
        self._world.run_on_rank0(f"{self.folder}_finish", mark)


def write_options(schema: pa.Schema) -> dict[str, Any]:
    """Options of `pyarrow.parquet.ParquetWriter` for results."""
    repetitive = [name for name in schema.names if name not in _NO_DICTIONARY]
    return {
        "compression": "zstd",
        "use_dictionary": repetitive if len(repetitive) < len(schema.names) else True,
    }


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema, **write_options(schema)) as writer:
        for table in tables:
            writer.write_table(table)
