"""Remote prepared datasets: downloads, local copies and uploads.

All other code reads local copies. A remote dataset is complete once its ``manifest.json`` exists,
which is written last, and never changes afterwards. A copy is up to date if its manifest is
identical. Copies are created atomically, and an outdated copy is replaced, so that each URL takes
the space of one dataset.
"""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from deepfm_dist.data.layout import footer_sum
from deepfm_dist.data.manifest import MANIFEST, Manifest
from deepfm_dist.errors import DataError
from deepfm_dist.lock import Lock
from deepfm_dist.messages import format_bytes
from deepfm_dist.storage import (
    atomic_write,
    is_remote,
    remove_leftovers,
    storage_errors_to_user,
    work_folder,
)

log = logging.getLogger(__name__)
_FOLDERS = ("vocabulary", "entities", "train", "valid", "test")
_CONNECTIONS = 8
"""Number of concurrent transfers."""


def copy_path(folder: Path, cache: str | Path) -> Path:
    """Path of the local copy of a remote dataset: ``CACHE/s3/bucket/mine``."""
    scheme, _, rest = str(folder).partition("://")
    return Path(cache, scheme, *(part for part in rest.split("/") if part not in ("", ".", "..")))


def local_copy(folder: Path, cache: str | Path) -> Path:
    """Returns a local folder unchanged, or a current local copy of a URL's contents.

    Several processes may request the same copy: one downloads it, the others wait.

    Args:
        folder: the folder of the dataset.
        cache: folder for copies.

    Raises:
        DataError: there is no dataset, it is incomplete, or the copy cannot be written.
        DeepFMError: the URL cannot be read.
    """
    if not is_remote(folder):
        return folder
    content, copy = Manifest.read_bytes(folder), copy_path(folder, cache)
    manifest = Manifest.parse(content, folder)
    if _is_current(copy, content):
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        other = "set another run.cache_root"
        with Lock(copy, str(copy), other, other).waiting(math.inf):
            if not _is_current(copy, content):  # another process may have downloaded it
                _download(folder, manifest, content, copy)
    except OSError as error:
        raise DataError(
            f"{copy}: cannot be written: {error.strerror or error}; set run.cache_root to a "
            f"writable folder with enough space"
        ) from None
    return copy


def published(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a published dataset if it has the given fingerprint.

    Raises:
        DataError: the folder holds a different dataset, which is not replaced since others may read
            it.
    """
    with storage_errors_to_user(folder):
        if not (folder / MANIFEST).is_file():
            return None
    try:
        manifest = Manifest.read(folder)
    except DataError as error:  # of another version, or damaged
        reason = str(error).partition("; ")[0]
    else:
        if manifest.fingerprint == fingerprint:
            return manifest
        reason = f"{folder}: holds a dataset of other inputs or settings"
    raise DataError(f"{reason}; delete it, or set data.name (or --output) to write elsewhere")


def publish(source: Path, folder: Path) -> None:
    """Writes a prepared dataset to a URL or a shared disk, the manifest last.

    After a failure it can be repeated: existing files are not sent again. Other files of the
    dataset in ``folder`` are kept; leftovers of other datasets are deleted.

    Args:
        source: folder of the dataset, or of the files still missing in ``folder``.
        folder: the destination.

    Raises:
        DataError: the folder holds a different dataset.
        DeepFMError: the folder cannot be written.
    """
    begun, manifest = time.perf_counter(), Manifest.read(source)
    if published(folder, manifest.fingerprint) is not None:
        return
    files = {f"{f.parent.name}/{f.name}": f for d in _FOLDERS for f in (source / d).glob("*")}
    with storage_errors_to_user(folder):
        there = _files_of(folder)
        new = [
            name
            for name, file in files.items()
            if there.get(name) != file.stat().st_size
            or _footer_sum(folder / name) != manifest.sums[name]
        ]
        _in_parallel(lambda name: _put(files[name], folder / name), new)
        for name in there.keys() - manifest.sums.keys():
            (folder / name).unlink()
        _put(source / MANIFEST, folder / MANIFEST)
    size = sum(files[name].stat().st_size for name in new)
    seconds = time.perf_counter() - begun
    log.info("%s: wrote %s (%.1f s)", folder, format_bytes(size), seconds)


def _is_current(copy: Path, content: bytes) -> bool:
    with suppress(OSError):
        return (copy / MANIFEST).read_bytes() == content
    return False


def _download(folder: Path, manifest: Manifest, content: bytes, copy: Path) -> None:
    """Downloads a dataset, verifies its files, and replaces the copy."""
    begun, sums = time.perf_counter(), manifest.sums
    with storage_errors_to_user(folder):
        there = _files_of(folder)
    if missing := sorted(sums.keys() - there.keys()):
        raise DataError(
            f"{folder}: incomplete: {missing[0]} is missing; delete {folder} and prepare it again"
        )
    sizes = {name: size for name, size in there.items() if name in sums or not sums}
    total, free = sum(sizes.values()), shutil.disk_usage(copy.parent).free
    if total > free:
        raise DataError(
            f"{folder}: takes {format_bytes(total)}, and {copy.parent} has {format_bytes(free)} "
            f"left; set run.cache_root to a folder with enough space"
        )
    remove_leftovers(copy)
    aside = work_folder(copy)
    try:
        for name in _FOLDERS:
            (aside / "new" / name).mkdir(parents=True)
        with storage_errors_to_user(folder):
            _in_parallel(lambda name: _get(folder / name, aside / "new" / name), sizes)
        for name, expected in sums.items():
            if _footer_sum(aside / "new" / name) != expected:
                raise DataError(
                    f"{folder / name}: damaged, or replaced while it was copied: its checksum "
                    f"differs; run the command again, or delete {folder} and prepare it again"
                )
        (aside / "new" / MANIFEST).write_bytes(content)
        if copy.exists():
            copy.rename(aside / "old")
        (aside / "new").rename(copy)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    seconds = time.perf_counter() - begun
    log.info("%s: copied %s to %s (%.1f s)", folder, format_bytes(total), copy, seconds)


def _files_of(folder: Path) -> dict[str, int]:
    """Sizes of a dataset's Parquet files by name."""
    if is_remote(folder):
        remote: Any = folder
        root = f"{remote.path.rstrip('/')}/"
        sizes = {
            name.removeprefix(root): int(facts["size"])
            for name, facts in remote.fs.find(remote.path, detail=True).items()
        }
    else:
        sizes = {f"{f.parent.name}/{f.name}": f.stat().st_size for f in folder.glob("*/*.parquet")}
    return {
        name: size
        for name, size in sizes.items()
        if name.endswith(".parquet") and name.count("/") == 1 and name.split("/")[0] in _FOLDERS
    }


def _footer_sum(path: Path) -> int | None:
    """`footer_sum` of a file; None if it is damaged."""
    with suppress(pa.ArrowInvalid, OSError, OverflowError, ValueError), path.open("rb") as file:
        return footer_sum(pa.PythonFile(file, "r"))
    return None


def _get(path: Path, local: Path) -> None:
    remote: Any = path
    remote.fs.get_file(remote.path, str(local))


def _put(local: Path, path: Path) -> None:
    if is_remote(path):
        remote: Any = path
        remote.fs.put_file(str(local), remote.path)
        return
    with atomic_write(path) as aside:
        shutil.copyfile(local, aside)


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Calls ``work`` for every name in threads; the first error cancels the rest."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        try:
            for _ in pool.map(work, names):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
