"""One input file: how it is opened and unpacked, and what an error line says about it."""

import re
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from deepfm_dist.errors import DataError

BLOCK_BYTES = 16 << 20
"""Of text, that is parsed at a time."""
PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Arrow's name for what a file is packed with, by suffix."""


class EmptyFile(DataError):
    """A file without rows; one of many may be."""


class Source:
    """One input file.

    Args:
        path: local path, or a URL that fsspec opens.
        name: what `data.files` calls the file; empty where `data.files` does not describe it.

    Attributes:
        packing: what it is packed with, as Arrow calls it; None for a plain file.
        suffix: lower-case suffix that names the format, without that of the packing.
        failures: what reading it may raise: a remote file system raises anything at all.
    """

    def __init__(self, path: str, name: str = "") -> None:
        self.path, self.name, self._entry = path, name or Path(path).name, _yaml_key(name)
        local = (OSError, EOFError, ValueError, pa.ArrowException)
        self.failures: tuple[type[Exception], ...] = (Exception,) if "://" in path else local
        suffixes = [s.lower() for s in Path(path).suffixes]
        self.packing = PACKED.get(suffixes[-1]) if suffixes else None
        self.suffix = next((s for s in reversed(suffixes) if s not in PACKED), "")

    def open(self) -> Any:
        """The file as stored, as an Arrow file.

        Raises:
            DataError: it is not there or cannot be opened.
        """
        try:
            if "://" in self.path:
                return pa.PythonFile(fsspec.open(self.path, "rb").open(), "r")
            return pa.OSFile(self.path)
        except (FileNotFoundError, IsADirectoryError):
            raise DataError(f"{self.path}: no such file; is data.root right?") from None
        except self.failures as error:
            raise DataError(f"{self.path}: cannot be read: {brief(error)}") from None

    def stream(self) -> Any:
        """The file's bytes, unpacked, as an Arrow stream."""
        file = self.open()
        return pa.CompressedInputStream(file, self.packing) if self.packing else file

    def cure(self, what: str, setting: str, otherwise: str) -> str:
        """What to do about a layout that the file's name does not tell.

        Args:
            what: what to do, before "in data.files".
            setting: of `FileFormat`, as YAML.
            otherwise: what to do where `data.files` does not describe the file.
        """
        return (
            f"{what} in data.files: {{{self._entry}: {{{setting}}}}}" if self._entry else otherwise
        )


def _yaml_key(name: str) -> str:
    """A file's name as a YAML key; one that begins with * would be an alias."""
    return (
        name if re.fullmatch(r"([\w/.][\w/.*-]*)?", name) else "'" + name.replace("'", "''") + "'"
    )


def brief(error: Exception) -> str:
    """An error's message on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def short(value: object) -> str:
    """A value as an error line shows it: its repr, at most 120 characters."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
