"""Prepared datasets behind a URL; tests/launch/test_object_store.py has a real server."""

import errno
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepfm_dist import lock
from deepfm_dist.config import Config, load_config
from deepfm_dist.data import remote
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.remote import local_copy
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import DataError, DeepFMError, InUse
from deepfm_dist.jobs.prepare import dry_run, prepare
from deepfm_dist.lock import Lock
from deepfm_dist.runs.trained import open_dataset
from deepfm_dist.storage import delete_tree, folder_of
from tests.ranks import run_ranks

pytest.importorskip("upath")


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of a dataset's files, without those that readers derive from them, by name."""
    root = str(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and "mapped" not in path.parts]
    return {str(path).removeprefix(root).strip("/"): path.read_bytes() for path in files}


@pytest.fixture
def root() -> str:
    """A new folder in the memory of this process."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def published(sample: PreparedDataset, root: str) -> Path:
    """The sample in memory."""
    folder = folder_of(f"{root}/sample")
    remote.publish(sample.folder, folder)
    return folder


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Names of the files that go to and from memory; `fail_at` is the one that is cut short."""
    from fsspec.implementations.memory import MemoryFileSystem

    class Transfers(list[str]):
        fail_at: str | None = None

    done = Transfers()
    put, get = MemoryFileSystem.put_file, MemoryFileSystem.get_file

    def count(path: str) -> None:
        if done.fail_at and done.fail_at in path:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        done.append(path)

    def put_file(self: Any, local: str, path: str, **_: Any) -> None:
        count(path)
        put(self, local, path)

    def get_file(self: Any, path: str, local: str, **_: Any) -> None:
        Path(local).write_bytes(b"half")
        count(path)
        get(self, path, local)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    return done


def config_at(root: str | Path, *overrides: str) -> Config:
    return load_config("sample", [f"run.prepared_root={root}", *overrides])


def test_prepare_writes_the_local_dataset_behind_a_url_once(
    sample: PreparedDataset,
    root: str,
    transfers: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_at(root, f"run.cache_root={tmp_path}")
    with caplog.at_level(logging.INFO):
        prepare(config)
    folder, local = folder_of(f"{root}/sample"), files_of(sample.folder)
    assert files_of(folder) == local
    assert transfers[-1].endswith("sample/manifest.json")
    assert f"{folder}: wrote " in caplog.text
    transfers.clear()
    prepare(config)  # up to date
    copy = local_copy(folder, tmp_path)  # what was made here is the copy
    assert transfers == [] and files_of(copy) == local
    with pytest.raises(DataError, match=r"holds a dataset of other inputs or settings; delete it"):
        prepare(config_at(root, f"run.cache_root={tmp_path}", "data.split.test=0.3"))
    assert files_of(folder) == local


def test_the_next_command_resumes_an_interrupted_upload(
    sample: PreparedDataset, root: str, transfers: Any, tmp_path: Path
) -> None:
    config, folder = config_at(root, f"run.cache_root={tmp_path}"), folder_of(f"{root}/sample")
    transfers.fail_at = "train/part-00000.parquet"
    with pytest.raises(DeepFMError, match=r"memory://.*/sample: cannot be used: Connection reset"):
        prepare(config)
    assert not (folder / "manifest.json").exists()
    assert Manifest.find(folder) is None
    sent = set(transfers)
    transfers.clear()
    transfers.fail_at = None
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train/part-00007.parquet").write_bytes(b"of another attempt")
    (folder / "notes.txt").write_bytes(b"not of a dataset")
    prepare(config)
    assert sent.isdisjoint(transfers)
    assert files_of(folder) == files_of(sample.folder) | {"notes.txt": b"not of a dataset"}


def test_two_writers_at_a_time_are_refused(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    folder = folder_of(f"{root}/sample")
    with Lock(folder, "", ""), pytest.raises(InUse, match=r"set data.name \(or --output\)"):
        prepare(config_at(root, f"run.cache_root={tmp_path}"))
    assert files_of(folder) == {}


def test_a_cut_download_leaves_nothing(published: Path, transfers: Any, tmp_path: Path) -> None:
    transfers.fail_at = "entities/user.parquet"
    with pytest.raises(DeepFMError, match=r"memory://.*: cannot be used: Connection reset"):
        local_copy(published, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    transfers.fail_at = None
    copy = local_copy(published, tmp_path)
    assert files_of(copy) == files_of(published)
    assert copy == tmp_path / "memory" / str(published).removeprefix("memory://").strip("/")


def test_damage_and_gaps_behind_a_url_are_named(published: Path, tmp_path: Path) -> None:
    part = published / "valid/part-00000.parquet"
    content = part.read_bytes()
    for damaged in (content[:-9] + b"?" + content[-8:], content[: len(content) // 2], b""):
        part.write_bytes(damaged)
        with pytest.raises(DataError, match=r"valid/part-00000\.parquet: damaged, or replaced"):
            local_copy(published, tmp_path)
    part.unlink()
    with pytest.raises(DataError, match=r"incomplete: valid/part-00000\.parquet is missing"):
        local_copy(published, tmp_path)
    with pytest.raises(DataError, match=r"nothing: no prepared dataset; run python -m"):
        local_copy(published.with_name("nothing"), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_is_named(
    published: Path, transfers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(remote.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DataError, match=r"takes .* KiB, and .* has 1000 B left; set run.cache"):
            local_copy(published, tmp_path)
    assert transfers == []

    def full(path: Path, local: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(local))

    monkeypatch.setattr(remote, "_get", full)
    with pytest.raises(DataError, match=r"cannot be written: No space left on device; set run.c"):
        local_copy(published, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_copy_follows_the_dataset(
    published: Path, tmp_path: Path, with_history: PreparedDataset
) -> None:
    before = PreparedDataset(local_copy(published, tmp_path))
    for path in [*published.rglob("*")]:
        if path.is_file():
            path.unlink()
    remote.publish(with_history.folder, published)
    after = PreparedDataset(local_copy(published, tmp_path))
    assert after.folder == before.folder
    assert after.manifest == with_history.manifest
    assert [path.name for path in before.folder.parent.iterdir()] == ["sample"]


def test_a_dataset_of_another_tool_is_copied_and_checked(
    sample: PreparedDataset, root: str, tmp_path: Path
) -> None:
    given = sample.manifest.model_copy(update={"fingerprint": "given", "sums": {}})
    shutil.copytree(sample.folder, tmp_path / "made")
    given.write(tmp_path / "made")
    folder = folder_of(f"{root}/sample")
    for name, content in files_of(tmp_path / "made").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert prepare(config_at(root, f"run.cache_root={tmp_path / 'cache'}")) == given
    copy = local_copy(folder, tmp_path / "cache")
    assert files_of(copy).keys() == files_of(folder).keys() | {"checked"}
    delete_tree(folder)
    prepare(config_at(root, f"run.cache_root={tmp_path / 'cache'}"))
    assert files_of(folder) == files_of(copy) == files_of(sample.folder)


def test_growth_from_a_url_gives_the_bytes_of_growth_from_a_folder(
    sample: PreparedDataset, published: Path, tmp_path: Path
) -> None:
    changed = ("data.split.test=0.3", "data.name=grown")
    manifests = []
    for earlier, place in ((sample.folder, "a"), (published, "b")):
        config = config_at(
            tmp_path / place,
            f"data.vocabulary_from={earlier}",
            f"run.cache_root={tmp_path / 'cache'}",
            *changed,
        )
        manifests.append(prepare(config))
    assert manifests[1].data.vocabulary_from == str(published)
    assert manifests[1].grown_from == (sample.manifest.vocabulary_hash,)
    a, b = (files_of(tmp_path / place / "grown") for place in "ab")
    assert [name for name in a if a[name] != b.get(name)] == ["manifest.json"]
    assert dry_run(config).rows > 0
    config = config_at(
        str(published).removesuffix("/sample"),
        f"data.vocabulary_from={published}",
        f"run.cache_root={tmp_path / 'cache'}",
    )
    with pytest.raises(DeepFMError, match="this dataset itself is written there"):
        prepare(config)


def _opened(root: str, folder: Path) -> str:
    """Opens the dataset on two machines of two ranks each, whose caches are ``0`` and ``1``."""
    from fsspec.implementations.memory import MemoryFileSystem

    machine, local_rank = divmod(int(os.environ["RANK"]), 2)
    os.environ |= {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "2"}
    get = MemoryFileSystem.get_file

    def get_file(self: Any, path: str, local: str, **_: Any) -> None:
        with (folder / "log").open("a") as file:
            file.write(f"{os.environ['RANK']}\n")
        get(self, path, local)

    MemoryFileSystem.get_file = get_file
    with process_group("cpu") as world:
        try:
            config = config_at(root, f"run.cache_root={folder / str(machine)}")
            return open_dataset(config, world).manifest.vocabulary_hash
        except DataError as error:
            return str(error)
        except SystemExit as error:
            return f"exit {error.code}"


def test_one_rank_of_each_machine_downloads(
    published: Path, root: str, sample: PreparedDataset, tmp_path: Path
) -> None:
    assert run_ranks(_opened, 4, root, tmp_path) == 4 * [sample.manifest.vocabulary_hash]
    downloads = (tmp_path / "log").read_text().split()
    assert Counter(downloads) == dict.fromkeys("02", len(sample.manifest.sums))


def test_a_failed_download_ends_all_ranks(published: Path, root: str, tmp_path: Path) -> None:
    (tmp_path / "1").write_text("not a folder")
    texts = run_ranks(_opened, 4, root, tmp_path)
    assert "cannot be written: Not a directory; set run.cache_root" in texts[2]
    assert [texts[rank] for rank in (0, 1, 3)] == 3 * ["exit 2"]
