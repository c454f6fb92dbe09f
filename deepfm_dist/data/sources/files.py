"""Which files a configuration's names and patterns stand for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

from deepfm_dist.data.sources.source import PACKED, brief
from deepfm_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class InputFile:
    """A file that a configuration's name or pattern stands for.

    Attributes:
        path: a local path, or a URL that fsspec opens.
        name: as it stands in the configuration, below ``data.root``.
        size: in bytes.
        stamp: changes when the contents do, as far as the file system tells.
    """

    path: str
    name: str
    size: int
    stamp: str

    @property
    def text_bytes(self) -> int:
        """About as many bytes as its rows would take as plain text."""
        suffix = Path(self.path).suffix.lower()
        return self.size * (4 if suffix in PACKED or suffix in (".parquet", ".orc") else 1)


def find_files(root: str | Path, name: str) -> list[InputFile]:
    """The files that a name or a pattern with ``*`` stands for, in the order of their names.

    Args:
        root: folder: a local one, or a URL such as ``s3://bucket/logs``.
        name: file name or pattern below it.

    Raises:
        DataError: there is none, or the file system cannot be reached.
    """
    if "://" not in str(root):
        base = Path(root)
        found = sorted(base.glob(name)) if "*" in name else [base / name]
        named = {str(p.relative_to(base) if p.is_relative_to(base) else p): p for p in found}
        named = {n: p for n, p in named.items() if p.exists() and not _is_hidden(n, name)}
        files = [(n, p, p.stat()) for n, p in named.items() if p.is_file()]
        if not files:
            raise DataError(_not_found(str(base / name), name, folders=bool(named)))
        return [InputFile(str(p), n, s.st_size, str(s.st_mtime_ns)) for n, p, s in files]
    url = f"{str(root).rstrip('/')}/{name}"
    try:
        system, below = fsspec.core.url_to_fs(url)
        paths = sorted(system.glob(below)) if "*" in name else [below]
        cut = len(below) - len(name)
        listed = [system.info(path) for path in paths if not _is_hidden(path[cut:], name)]
    except Exception as error:  # a file system may raise anything, such as for a lacking password
        raise DataError(f"{url}: cannot be read: {brief(error)}") from None
    infos = [info for info in listed if info.get("type") != "directory"]
    if not infos:
        raise DataError(_not_found(url, name, folders=bool(listed)))
    # A change shows in whichever of these the file system keeps.
    marks = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
    return [
        InputFile(
            system.unstrip_protocol(info["name"]),
            info["name"][cut:],
            int(info["size"] or 0),
            str(next((info[m] for m in marks if m in info), "")),
        )
        for info in infos
    ]


def _is_hidden(found: str, pattern: str) -> bool:
    """Whether a ``*`` has found what no program means by it: ``_SUCCESS``, ``.part-0.crc``."""

    def is_hidden(part: str, patterns: Sequence[str]) -> bool:
        return part[:1] in (".", "_") and not any(p[:1] == part[:1] for p in patterns)

    (*folders, file), (*wanted, last) = found.split("/"), pattern.split("/")
    return "*" in pattern and (
        is_hidden(file, [last]) or any(is_hidden(folder, wanted) for folder in folders)
    )


def _not_found(where: str, name: str, folders: bool) -> str:
    if not folders:
        return f"{where}: no such file; is data.root right?"
    return f"{where}: is a folder; name its files: {name.rstrip('/')}/*{Path(name).suffix}"


def find_file(root: str | Path, name: str, setting: str) -> str:
    """Path or URL of the one file that a name or pattern stands for.

    Raises:
        DataError: there is none, or the file system cannot be reached.
        ConfigError: there are several; ``setting`` is what to name one by.
    """
    files = find_files(root, name)
    if len(files) > 1:
        raise ConfigError(f"{setting}: {name} stands for {len(files)} files; say which one")
    return files[0].path
