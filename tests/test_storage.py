"""Folders of a run on a disk; tests/launch/test_object_store.py has those behind a URL."""

import sys
import zlib
from pathlib import Path

import pytest

from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.messages import brief
from deepfm_dist.storage import (
    atomic_write,
    crc32,
    delete_tree,
    folder_of,
    is_of_storage,
    is_remote,
    storage_errors_to_user,
    write_errors_to_user,
)


def test_a_local_folder_is_a_path() -> None:
    assert folder_of("runs") == Path("runs")
    assert folder_of("file:///runs") == Path("/runs")
    assert not is_remote(folder_of("runs"))


def test_a_url_without_a_library_for_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(ConfigError, match=r"s3://b: cannot be opened .*pip install universal-path"):
        folder_of("s3://b")


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_write(path) as aside:
        aside.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(ZeroDivisionError), atomic_write(path) as aside:
        aside.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    delete_tree(path.parent)
    delete_tree(path.parent)
    assert not path.parent.exists()


def test_local_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, storage_errors_to_user(tmp_path):
        (tmp_path / "nothing").read_text()
    assert is_of_storage(caught.value)
    assert brief(caught.value) == "No such file or directory"
    assert not is_of_storage(ValueError("x"))
    assert brief(ValueError("")) == "ValueError"


def test_a_folder_in_the_place_of_a_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    cure = r"/report\.html: cannot be written: a folder of that name is in the way; move or delete"
    with pytest.raises(DeepFMError, match=cure), write_errors_to_user(tmp_path):
        (tmp_path / "report.html").write_text("")
    with (
        pytest.raises(DeepFMError, match=cure),
        write_errors_to_user(tmp_path),
        atomic_write(tmp_path / "report.html") as file,
    ):
        file.write_text("")


def test_the_checksum_of_a_file_in_blocks_is_that_of_its_bytes(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", b"0123456" * 700_000  # more than one block
    path.write_bytes(contents)
    assert crc32(path) == zlib.crc32(contents)
