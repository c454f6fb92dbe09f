"""Local and remote folders: paths, or URLs that fsspec opens (``s3://bucket/runs``).

Both are `Path` to the rest of the code: a URL becomes a `UPath`, which has the same methods. The
differences of object stores are handled here.
"""

import errno
import glob
import logging
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import AfterValidator

from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.messages import brief, short

log = logging.getLogger(__name__)
_SCHEMES = (
    *("s3", "s3a", "gs", "gcs", "az", "adl", "abfs", "abfss", "hdfs", "oss"),
    *("http", "https", "ftp", "sftp", "memory", "file"),
)
"""Prefixes that mark a URL, even if slashes are missing; folder names may also contain a colon."""


def path_or_url(text: str) -> str:
    """A path, or a URL; a local file's URL becomes its path.

    Raises:
        ValueError: the text is neither.
    """
    text = text.removeprefix("file://")
    scheme, _, rest = text.partition(":")
    if scheme in _SCHEMES and not (rest.startswith("//") and rest.strip("/")):
        raise ValueError(f"is not a complete URL; write {scheme}://{rest.strip('/') or 'BUCKET'}")
    return text


def writable_path_or_url(text: str) -> str:
    """A path, or the URL of a place that can be written to.

    Raises:
        ValueError: the text is neither.
    """
    text = path_or_url(text)
    if text.startswith(("http://", "https://")):
        raise ValueError("can only be read; name a folder on a disk or in an object store (s3://)")
    return text


def local_path(text: str) -> str:
    """A path on this machine; a local file's URL becomes its path.

    Raises:
        ValueError: the text is a URL.
    """
    if "://" in (text := path_or_url(text)):
        raise ValueError("is a URL, and only a path on this machine can be used here")
    return text


def folder_name(text: str) -> str:
    """The name of a folder below a root, such as ``ml1m`` or ``shop/monday``.

    Raises:
        ValueError: the folder would be elsewhere, or the text is not a name.
    """
    if not text.isprintable() or {"", ".", ".."} & {*text.split("/")}:
        raise ValueError(
            f"{text!r} is not the name of a folder below its root; use one such as ml1m"
        )
    return text


def _as_setting(check: Callable[[str], str], text: str) -> str:
    try:
        if not text:
            raise ValueError("is empty; name a folder or file, such as .")
        return check(text)
    except ValueError as error:
        raise ValueError(f"{text or repr(text)} {error}") from None


PathOrUrl = Annotated[str, AfterValidator(partial(_as_setting, path_or_url))]
"""A setting that is a path or a URL."""
WritablePathOrUrl = Annotated[str, AfterValidator(partial(_as_setting, writable_path_or_url))]
"""A setting that is a path or a URL where files can be written."""
FolderName = Annotated[str, AfterValidator(folder_name)]
"""A setting that names a folder below a root."""
LocalPath = Annotated[str, AfterValidator(partial(_as_setting, local_path))]
"""A setting that is a path on this machine."""


def option_of(option: str, text: str, check: Callable[[str], str] = local_path) -> str:
    """The path that an option of a command names.

    Raises:
        ConfigError: ``check`` refuses it.
    """
    try:
        return check(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text} {error}") from None


def folder_of(text: str) -> Path:
    """A local folder, or one behind a URL.

    Raises:
        ConfigError: the URL is malformed, or a library for such URLs is not installed.
    """
    try:
        text = path_or_url(text)
    except ValueError as error:
        raise ConfigError(f"{text} {error}") from None
    if "://" not in text:
        return Path(text)
    try:
        from upath import UPath

        # Other ranks write there, so cached listings may be stale.
        folder = UPath(text, use_listings_cache=False)
        _ = folder.fs
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{text}: cannot be opened ({error}); pip install universal-pathlib and fsspec's "
            f"library for such URLs: s3fs, gcsfs, adlfs"
        ) from None
    return cast(Path, folder)


CURRENT = "current"
"""A pointer file: it names the run in use among those in its folder; see `follow_pointer`."""


def follow_pointer(run: Path) -> Path:
    """Resolves a pointer file ``current`` to its run; returns other paths unchanged.

    Raises:
        ConfigError: the file cannot be read or does not contain a name.
    """
    if run.name != CURRENT:
        return run
    with storage_errors_to_user(run):
        if not run.is_file():
            return run
        text = run.read_bytes().decode(errors="replace").strip()
    if text in ("", ".", "..", CURRENT) or not text.isprintable() or "/" in text:
        raise ConfigError(
            f"{run}: holds {short(text, 50)} instead of the name of a run in {run.parent}; write "
            f"the name into it, such as 2026-11-30"
        )
    return run.with_name(text)


def is_remote(path: Path) -> bool:
    """Whether a path is behind a URL."""
    return not isinstance(path, Path)


def delete_tree(folder: Path) -> None:
    """Deletes a folder as far as possible; it may be missing."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    remote: Any = folder
    try:
        for file in remote.fs.find(remote.path):  # fs.rm would treat a * in a name as a pattern
            remote.fs.rm_file(file)
    except Exception as error:
        if not is_of_storage(error):
            raise


def move_tree(folder: Path, new: Path) -> None:
    """Moves a folder; the target must not exist.

    An object store copies every file before it deletes the first, so that a crash loses none.
    """
    if not is_remote(folder):
        new.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(new)
        return
    remote: Any = folder
    files = remote.fs.find(remote.path)
    for file in files:
        remote.fs.cp_file(file, f"{cast(Any, new).path}{file.removeprefix(remote.path)}")
    for file in files:
        remote.fs.rm_file(file)


def rename(path: Path, new: Path) -> None:
    """Renames a file within its folder."""
    if not is_remote(path):
        path.rename(new)
        return
    remote: Any = path  # its `rename` would treat a * in a name as a pattern
    remote.fs.cp_file(remote.path, cast(Any, new).path)
    remote.fs.rm_file(remote.path)


def work_folder(folder: Path) -> Path:
    """This process' temporary folder next to a local folder; renamed to it when complete.

    The name includes the host: machines that share a disk may have equal process ids.
    """
    return folder.with_name(f".{folder.name}.part-{socket.gethostname()}-{os.getpid()}")


def remove_leftovers(folder: Path) -> None:
    """Deletes work folders left by killed processes of this machine.

    Processes of other machines cannot be checked, so their folders stay.
    """
    prefix = f".{folder.name}.part-"
    for aside in folder.parent.glob(f"{glob.escape(prefix)}*"):
        host, _, process = aside.name.removeprefix(prefix).rpartition("-")
        if host != socket.gethostname():
            log.info("%s: left by another machine; delete it if no process is using it", aside)
        elif process == str(os.getpid()) or not Path("/proc", process).exists():
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):  # a file, or gone by now
                aside.unlink()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a local file to write; it becomes ``path`` if the block ends without an error."""
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        aside = work_folder(path)  # two processes may write it at the same time
        try:
            yield aside
            aside.rename(path)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        return
    remote: Any = path
    with tempfile.TemporaryDirectory() as folder:
        aside = Path(folder) / path.name
        yield aside
        with storage_errors_to_user(path):
            remote.fs.put_file(str(aside), remote.path)


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


@contextmanager
def storage_errors_to_user(path: Path) -> Iterator[None]:
    """Turns errors of remote storage into user errors.

    Raises:
        DeepFMError: the URL cannot be reached, read or written.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or not is_of_storage(error) or _is_local_disk_full(error):
            raise
        raise DeepFMError(
            f"{path}: cannot be used: {brief(error)}; check the address, the credentials and the "
            f"network"
        ) from None


ANOTHER_ROOT = "set run.runs_root to a writable folder with enough space"
"""Advice if a run's folder cannot be written."""
ANOTHER_OUTPUT = "give --output or --output-parts a writable place with enough space"
"""Advice if a result cannot be written."""


@contextmanager
def write_errors_to_user(folder: Path, cure: str = ANOTHER_ROOT) -> Iterator[None]:
    """Turns errors of writing to a folder into user errors.

    Args:
        folder: the folder of a run, or of a result.
        cure: what to do if it cannot be written, for the message.

    Raises:
        DeepFMError: it cannot be written: no permission, the disk is full, or the URL is wrong.
    """
    try:
        with storage_errors_to_user(folder):
            yield
    except IsADirectoryError as error:
        raise DeepFMError(
            f"{error.filename2 or error.filename or folder}: cannot be written: a folder of that "
            f"name is in the way; move or delete it"
        ) from None
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else brief(error)
        named = str(error.filename or folder)
        if Path(named).name.startswith(f".{folder.name}.part-"):  # see `work_folder`
            named = str(folder)
        raise DeepFMError(f"{named}: cannot be written: {reason}; {cure}") from None


def _is_local_disk_full(error: Exception) -> bool:
    """Whether a transfer failed because a local disk is full or cannot be written."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_of_storage(error: Exception) -> bool:
    """Whether an error comes from storage: object store libraries raise more than OSError."""
    libraries = ("aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google")
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not kinds.isdisjoint(libraries)
