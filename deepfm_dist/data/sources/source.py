"""Opens and decompresses one input file, and provides its part of error messages."""

import lzma
import re
import zipfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa

from deepfm_dist.errors import DataError
from deepfm_dist.messages import brief

BLOCK_BYTES = 4 << 20
"""Bytes of text to parse at a time."""
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4", ".xz": "xz", ".zip": "zip"}
"""Compression formats by suffix; Arrow supports all but xz and zip."""
_HEAD_BYTES = 512
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_MAGIC: dict[bytes, str] = {
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\x04\x22\x4d\x18": ".lz4",
    b"\xfd7zXZ\0": ".xz",
    b"PK\x03\x04": ".zip",
    b"PAR1\x15": ".parquet",
    b"ARROW1\0\0": ".arrow",
    b"FEA1\0": ".fea1",
    b"\xd0\xcf\x11\xe0": ".xls",
    b"\x89HDF": ".h5",
    b"\x93NUMPY": ".npy",
    b"Obj\x01": ".avro",
    b"SQLite format 3\0": ".sqlite",
    b"7z\xbc\xaf": ".7z",
    b"Rar!\x1a": ".rar",
    b"\x80\x04\x95": ".pkl",
    b"\x80\x05\x95": ".pkl",
    b"<!DOCTYPE": ".html",
    b"<html": ".html",
    b"version https://git-lfs": ".lfs",
}
_PANDAS = "python -c \"import pandas; pandas.{}('{{name}}').to_parquet('{{stem}}.parquet')\""
_UNREADABLE: dict[str, tuple[str, str]] = {
    ".xlsx": ("an Excel workbook", "save it as CSV"),
    ".xls": ("an Excel workbook", "save it as CSV"),
    ".ods": ("a spreadsheet", "save it as CSV"),
    ".tar": ("a tar archive", "unpack it with tar -xf {name} and name the files in it"),
    ".7z": ("a 7z archive", "unpack it and name the files in it"),
    ".rar": ("a rar archive", "unpack it and name the files in it"),
    ".fea1": ("a Feather file of version 1", _PANDAS.format("read_feather")),
    ".pkl": ("a Python pickle", _PANDAS.format("read_pickle")),
    ".h5": ("an HDF5 file", _PANDAS.format("read_hdf")),
    ".npy": (
        "a NumPy array",
        "write it as CSV or Parquet, with a name for each column (a vector field names it as npy)",
    ),
    ".avro": ("an Avro file", "write it as Parquet"),
    ".sqlite": ("an SQLite database", "export the table as CSV"),
    ".html": ("an HTML page, such as a site's page to log in", "download the file again"),
    ".lfs": ("a Git LFS pointer instead of the file", "fetch the file with git lfs pull"),
}
"""Unsupported formats: name, and advice."""
_OTHER_NAMES = {
    ".feather": ".arrow", ".ipc": ".arrow", ".arrows": ".arrow", ".pq": ".parquet",
    ".ndjson": ".jsonl", ".json": ".jsonl", ".tgz": ".tar", ".xlsm": ".xlsx", ".xlsb": ".xlsx",
    ".pickle": ".pkl", ".hdf": ".h5", ".hdf5": ".h5", ".npz": ".npy", ".db": ".sqlite",
}  # fmt: skip
_COLUMNAR = (".parquet", ".arrow", ".orc")


class EmptyFile(DataError):
    """A file without rows; one of many may be."""


class Source:
    """One input file.

    Args:
        path: local path, or a URL that fsspec opens.
        name: its name in `data.files`; empty if it is not described there.
        may_skip: whether `data.on_bad_row` applies to its bad rows.

    Attributes:
        packing: its compression, a value of `PACKED`; None for a plain file.
        is_prepared: whether it is read for preparation, so that settings of fields can change.
        or_skip: an alternative to fixing a bad row; may be empty.
        failures: errors that reading may raise; a remote file system may raise anything.
        partitions: values by column from folders of the path, as in ``dt=2024-01-01``; None for
            a missing value.
    """

    def __init__(self, path: str, name: str = "", may_skip: bool = False) -> None:
        self.is_prepared = may_skip
        self.or_skip = " or set data.on_bad_row=skip" if may_skip else ""
        self.path, self.name, self._entry = path, name or Path(path).name, _yaml_key(name)
        local = (
            OSError, EOFError, ValueError, pa.ArrowException, lzma.LZMAError, zlib.error,
            zipfile.BadZipFile, NotImplementedError, RuntimeError,
        )  # fmt: skip
        self.failures: tuple[type[Exception], ...] = (Exception,) if "://" in path else local
        self._suffixes = [s.lower() for s in Path(path).suffixes]
        self.packing = PACKED.get(self._suffixes[-1]) if self._suffixes else None
        self.partitions: dict[str, str | None] = {}
        for folder in path.split("/")[:-1]:
            column, equals, value = folder.partition("=")
            if equals and column:
                known = value != _NULL_PARTITION
                self.partitions[unquote(column)] = unquote(value) if known else None

    @cached_property
    def suffix(self) -> str:
        """The lower-case suffix of the format, without that of the compression.

        Alternative suffixes are normalised by `_OTHER_NAMES`.
        """
        suffixes = self._suffixes
        if self.packing == "zip" and len(suffixes) == 1:
            with self._zip() as archive:
                suffixes = [s.lower() for s in Path(self._member(archive)).suffixes]
        suffix = next((s for s in reversed(suffixes) if s not in PACKED), "")
        return _OTHER_NAMES.get(suffix, suffix)

    def open(self) -> Any:
        """Opens the file as stored, as an Arrow file.

        Raises:
            DataError: it does not exist or cannot be opened.
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
        """Opens the file's decompressed bytes as an Arrow stream.

        Raises:
            DataError: it does not exist, cannot be opened, or is an archive of several files.
        """
        if self.packing == "zip":
            archive = self._zip()
            return pa.PythonFile(archive.open(self._member(archive)), "r")
        file = self.open()
        if self.packing == "xz":
            return pa.PythonFile(lzma.open(file), "r")
        return pa.CompressedInputStream(file, self.packing) if self.packing else file

    def _zip(self) -> zipfile.ZipFile:
        file = self.open()
        try:
            return zipfile.ZipFile(file)
        except self.failures as error:
            raise DataError(f"{self.path}: not readable: {brief(error)}") from None

    def _member(self, archive: zipfile.ZipFile) -> str:
        """The only file in a zip archive."""
        names = [n for n in archive.namelist() if not n.endswith("/") and "__MACOSX/" not in n]
        if len(names) == 1:
            return names[0]
        inside = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        raise DataError(
            f"{self.path}: holds {len(names)} files, and only a zip archive of one is read; "
            f"unpack it with unzip {Path(self.path).name}"
            + (f" and name the files: {inside}" if names else "")
        )

    def check_contents(self) -> None:
        """Refuses a file whose contents do not match its name, or with an unsupported format.

        Raises:
            EmptyFile: the file is empty.
            DataError: its contents do not match its name, or its format is not supported.
        """
        name, head = Path(self.path).name, self._head(self.open)
        if head is None:  # the reader reports the error
            return
        if head == b"":
            raise EmptyFile(f"{self.path}: the file is empty")
        stored = _kind_of(head)
        packed = f".{name.rpartition('.')[2].lower()}" if self.packing else ""
        inner = stored
        if packed and stored == packed:
            inner = _kind_of(self._head(self.stream) or b"")
        suffix = ".xlsx" if self._is_workbook(stored) else inner
        if suffix not in _UNREADABLE and (inner or b"\0" in head):
            suffix = self.suffix
        if suffix in _UNREADABLE:
            what, cure = _UNREADABLE[suffix]
            cure = cure.format(name=name, stem=name.split(".")[0])
            raise DataError(f"{self.path}: {what}, which is not read; {cure}")
        if packed and stored != packed:
            what = f"it starts like a {stored} file" if stored else f"it is not packed as {packed}"
            other = name[: -len(packed)]
            other += "" if other.endswith(stored) else stored
            raise DataError(f"{self.path}: not readable: {what}; call it {other}")
        if stored in PACKED and not packed:
            raise DataError(
                f"{self.path}: not readable: it starts like a {stored} file; call it {name}{stored}"
            )
        if packed and self.suffix in _COLUMNAR:
            raise DataError(
                f"{self.path}: a packed {self.suffix} file is not read; unpack it: "
                f"{self.unpack_command} {name} > {name.removesuffix(packed)}"
            )
        if inner in _COLUMNAR and inner != self.suffix:
            raise DataError(
                f"{self.path}: not readable: it starts like a {inner} file; call it {name}{inner}"
            )

    @property
    def unpack_command(self) -> str:
        """A shell command that decompresses the file named after it to stdout."""
        commands = {
            "gzip": "gunzip -c", "zstd": "zstd -dc", "bz2": "bunzip2 -c", "lz4": "lz4 -dc",
            "xz": "xz -dc", "zip": "unzip -p", None: "cat",
        }  # fmt: skip
        return commands[self.packing]

    def _is_workbook(self, stored: str) -> bool:
        """Whether a zip archive is a spreadsheet."""
        if stored != ".zip":
            return False
        with self._zip() as archive:
            return any(n in ("[Content_Types].xml", "mimetype") for n in archive.namelist())

    def _head(self, opened: Callable[[], Any]) -> bytes | None:
        """The first bytes; None if none can be read."""
        try:
            head: bytes = opened().read(_HEAD_BYTES)
        except DataError:
            raise
        except self.failures:
            return None
        return head

    def unreadable(self, error: Exception) -> str:
        """The error for a file whose bytes cannot be read."""
        cure = "; it is cut or damaged: copy it again" if self.packing else ""
        return f"{self.path}: not readable: {brief(error)}{cure}"

    def cure(self, what: str, setting: str, otherwise: str) -> str:
        """Advice about a layout that the file name does not show.

        Args:
            what: the advice, to precede "in data.files".
            setting: the setting of `FileFormat`, as YAML.
            otherwise: the advice if `data.files` does not describe the file.
        """
        if not self._entry:
            return otherwise
        alone = f", or for this file alone {{{self._own_entry}: {{{setting}}}}}"
        return f"{what} in data.files: {{{self._entry}: {{{setting}}}}}" + alone * bool(
            self._own_entry
        )

    @property
    def _own_entry(self) -> str:
        """The file as a YAML key, if it matched a pattern; may be empty."""
        if "**" in self.name or not any(mark in self.name for mark in "*?["):
            return ""
        parts = self.path.split("/")[-1 - self.name.count("/") :]
        return _yaml_key("/".join(parts))


def _kind_of(head: bytes) -> str:
    """The suffix of the format that begins like this; empty for text and unknown formats."""
    if head[257:262] == b"ustar":
        return ".tar"
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return ".bz2"
    if head.startswith(b"ORC") and any(byte < 9 for byte in head[3:16]):
        return ".orc"
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")


def _yaml_key(name: str) -> str:
    """A file's name as a YAML key; one that begins with * would be an alias."""
    return (
        name if re.fullmatch(r"([\w/.][\w/.*-]*)?", name) else "'" + name.replace("'", "''") + "'"
    )
