"""Resolves a configuration's file names and patterns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec

from deepfm_dist.data.schema import Files, label_of, names_of
from deepfm_dist.data.sources.days import each_day, names_day
from deepfm_dist.data.sources.source import PACKED
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.messages import brief
from deepfm_dist.storage import local_path


@dataclass(frozen=True)
class InputFile:
    """An input file.

    Attributes:
        path: a local path, or a URL that fsspec opens.
        name: relative to ``data.root``.
        size: size in bytes.
        stamp: changes with the contents, as far as the file system shows.
        pattern: the configured name or pattern, the key in `data.files`.
        groups: the first Parquet row group to read and the one after the last; None: all.
    """

    path: str
    name: str
    size: int
    stamp: str
    pattern: str
    groups: tuple[int, int] | None = None

    @property
    def text_bytes(self) -> int:
        """Approximate size of its rows as plain text."""
        suffix = Path(self.path).suffix.lower()
        return self.size * (4 if suffix in PACKED or suffix in (".parquet", ".orc") else 1)


def find_files(root: str | Path, files: Files) -> list[InputFile]:
    """Finds the files that match names and patterns.

    Args:
        root: folder: a local one, or a URL such as ``s3://bucket/logs``.
        files: names or patterns below it. Files are in their order, those of a pattern sorted by
            name.

    Raises:
        DataError: no file matches, or the file system cannot be reached.
        ConfigError: two patterns match the same file, or a name is a URL, which belongs in
            ``data.root``.
    """
    by_path: dict[str, InputFile] = {}
    settings = map(_below_root, names_of(files))
    names = ((setting, name) for setting in settings for name in each_day(setting))
    for setting, name in names:
        for file in _remote(str(root), name) if "://" in str(root) else _local(Path(root), name):
            file = replace(file, pattern=setting)
            if (other := by_path.setdefault(file.path, file)) is not file:
                raise ConfigError(
                    f"{file.name}: matched by both {other.pattern} and {name}; list it once"
                )
    return list(by_path.values())


def _below_root(name: str) -> str:
    try:
        return local_path(name)
    except ValueError:
        folder, _, file = name.rpartition("/")
        raise ConfigError(
            f"{name}: files are named below data.root; set data.root={folder} and name it {file}"
        ) from None


def _local(root: Path, name: str) -> list[InputFile]:
    base, pattern = root, name
    if root.is_file():
        raise ConfigError(f"data.root={root}: is a file; name its folder, data.root={root.parent}")
    if Path(name).is_absolute():
        base, pattern = Path("/"), name.lstrip("/")
    matches = [base / pattern]
    if _is_pattern(pattern) and not matches[0].exists():
        matches = sorted(base.glob(pattern))
    named = {str(p.relative_to(root) if p.is_relative_to(root) else p): p for p in matches}
    named = {n: p for n, p in named.items() if p.exists() and not _is_hidden(n, name)}
    files = [(n, p, p.stat()) for n, p in named.items() if p.is_file()]
    if not files:
        inside = (
            p.relative_to(folder).as_posix()
            for folder in named.values()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        )
        raise DataError(_not_found(str(base / pattern), name, bool(named), inside))
    return [InputFile(str(p), n, s.st_size, str(s.st_mtime_ns), name) for n, p, s in files]


def _remote(root: str, name: str) -> list[InputFile]:
    url = f"{root.rstrip('/')}/{name}"
    try:
        system, below = fsspec.core.url_to_fs(url)
        paths = sorted(system.glob(below)) if _is_pattern(name) else [below]
        cut = len(below) - len(name)
        listed = [system.info(path) for path in paths if not _is_hidden(path[cut:], name)]
        infos = [info for info in listed if info.get("type") != "directory"]
        inside = [
            f"{path}/{file}".removeprefix(f"{listed[0]['name'].rstrip('/')}/")
            for path, _, files in (system.walk(listed[0]["name"]) if listed and not infos else ())
            for file in files
        ]
    except FileNotFoundError:
        raise DataError(_not_found(url, name, False, ())) from None
    except Exception as error:  # a file system may raise anything, such as for missing credentials
        raise DataError(f"{url}: cannot be read: {brief(error)}") from None
    if not infos:
        raise DataError(_not_found(url, name, bool(listed), inside))
    # Changes show in whichever of these the file system provides.
    marks = ("ETag", "etag", "mtime", "LastModified", "updated", "created")
    return [
        InputFile(
            system.unstrip_protocol(info["name"]),
            info["name"][cut:],
            int(info["size"] or 0),
            str(next((info[m] for m in marks if m in info), "")),
            name,
        )
        for info in infos
    ]


def _is_pattern(name: str) -> bool:
    return any(mark in name for mark in "*?[")


def _is_hidden(path: str, pattern: str) -> bool:
    """Whether a pattern matched a hidden file: ``_SUCCESS``, ``.part-0.crc``."""

    def is_hidden(part: str, patterns: Sequence[str]) -> bool:
        return part[:1] in (".", "_") and not any(p[:1] == part[:1] for p in patterns)

    (*folders, file), (*wanted, last) = path.split("/"), pattern.split("/")
    return _is_pattern(pattern) and (
        is_hidden(file, [last]) or any(is_hidden(folder, wanted) for folder in folders)
    )


def _not_found(where: str, name: str, is_folder: bool, inside: Iterable[str]) -> str:
    """Why no file matches; suggests a pattern if the name is a folder."""
    if names_day(name):
        return f"{where}: no such file: python -m deepfm_dist.nightly fills in its day"
    if not is_folder:
        return f"{where}: no such file; is data.root right?"
    first = next((file for file in inside if not _is_hidden(file, "*")), f"x{Path(name).suffix}")
    depth, suffix = first.count("/"), Path(first).suffix
    return f"{where}: is a folder; name its files: {name.rstrip('/')}/{'*/' * depth}*{suffix}"


def find_file(root: str | Path, files: Files, setting: str) -> str:
    """Path or URL of the only file that names or patterns match.

    Raises:
        DataError: no file matches, or the file system cannot be reached.
        ConfigError: several match; ``setting`` is the one to correct.
    """
    matches = find_files(root, files)
    if len(matches) > 1:
        raise ConfigError(
            f"{setting}: {label_of(files)} matches {len(matches)} files; name one of them"
        )
    return matches[0].path
