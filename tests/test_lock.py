"""One writer at a time, whatever becomes of the one before."""

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deepfm_dist import lock as lock_module
from deepfm_dist.errors import InUse
from deepfm_dist.lock import Lock


def lock_of(folder: Path) -> Lock:
    return Lock(folder / "run", "runs/run", "choose another run.name")


@contextmanager
def another_process(work: Callable[[], object]) -> Iterator[int]:
    """A forked process that has done some work and stays; its number."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        work()
        os.write(done, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def refused(folder: Path) -> str:
    with pytest.raises(InUse) as caught:
        lock_of(folder).acquire()
    return str(caught.value)


@pytest.fixture(params=["flock", "no flock"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's locks, and on a file system without."""
    if request.param == "no flock":

        def unsupported(*_: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", unsupported)
    for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 0.6), ("SETTLE_S", 0.02)):
        monkeypatch.setattr(lock_module, name, seconds)
    return str(request.param)


def test_one_of_two_processes_gets_in_and_the_other_hears_who_it_is(
    tmp_path: Path, kind: str
) -> None:
    with another_process(lambda: lock_of(tmp_path).acquire()) as holder:
        said = refused(tmp_path)
        assert said.startswith(
            f"runs/run: in use by process {holder} on {socket.gethostname()} since 20"
        )
        assert said.endswith("; wait for it, stop it, or choose another run.name")
    begun = time.monotonic()
    with lock_of(tmp_path):  # the other was killed by SIGKILL
        assert time.monotonic() - begun < 0.5
        assert (tmp_path / ".run.lock").is_file()
    assert not any(tmp_path.iterdir())


def test_a_lock_that_is_given_back_is_free_and_waited_for(tmp_path: Path, kind: str) -> None:
    first, second = lock_of(tmp_path), lock_of(tmp_path)
    first.acquire()
    assert f"process {os.getpid()} on " in refused(tmp_path)  # by this very process, too
    later = threading.Timer(0.2, first.release)
    later.start()
    second.acquire(wait_s=30)
    assert f"process {os.getpid()} on " in refused(tmp_path)
    second.release()
    second.release()
    assert not any(tmp_path.iterdir())


def test_a_process_forked_by_a_killed_one_does_not_keep_its_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def work() -> None:
        lock_of(tmp_path).acquire()
        if os.fork() == 0:
            os.write(writing, f"{os.getpid()}\n".encode())  # what runs at a fork has run
            time.sleep(60)
            os._exit(0)

    with another_process(work):
        grandchild = int(os.read(reading, 100))
    try:
        with lock_of(tmp_path):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


@pytest.mark.parametrize("host", ["another", "this"])
def test_without_flock_a_silent_holder_is_left_over_and_one_that_beats_is_not(
    tmp_path: Path, kind: str, host: str
) -> None:
    """The holder is a process of another host, or of this one before a reboot: its pid lives."""
    if kind == "flock":
        pytest.skip("the kernel knows")
    path = tmp_path / ".run.lock"
    facts = {
        "host": socket.gethostname() if host == "this" else "another",
        "pid": os.getppid(),
        "since": "2030-01-01",
        "token": "theirs",
    }
    path.write_text(json.dumps({**facts, "beats": 0}))
    over = threading.Event()

    def beat() -> None:
        beats = 0
        while not over.wait(0.05):
            beats += 1
            path.write_text(json.dumps({**facts, "beats": beats}))

    beating = threading.Thread(target=beat)
    beating.start()
    assert f"in use by process {os.getppid()} on {facts['host']} since 2030-01-01" in (
        refused(tmp_path)
    )
    over.set()
    beating.join()
    begun = time.monotonic()
    with lock_of(tmp_path):
        assert time.monotonic() - begun >= lock_module.STALE_S
        time.sleep(3 * lock_module.BEAT_S)
        assert json.loads(path.read_text())["beats"] > 0
    assert not path.exists()


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_lock_file_is_ignored(tmp_path: Path, kind: str, left: bytes) -> None:
    (tmp_path / ".run.lock").write_bytes(left)
    with lock_of(tmp_path):
        assert "in use by process" in refused(tmp_path)


def test_in_an_object_store_a_lock_holds_until_it_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upath = pytest.importorskip("upath")
    for name, seconds in (("BEAT_S", 0.05), ("STALE_S", 0.6), ("SETTLE_S", 0.02)):
        monkeypatch.setattr(lock_module, name, seconds)
    folder = upath.UPath("memory://locks")
    folder.mkdir(exist_ok=True)
    with lock_of(folder):
        assert f"process {os.getpid()} on {socket.gethostname()} since 20" in refused(folder)
    assert not any(folder.iterdir())
    (folder / ".run.lock").write_bytes(b"of a process that was killed")
    with lock_of(folder):
        assert (folder / ".run.lock").is_file()
    assert not any(folder.iterdir())


def test_a_lock_behind_a_connection_that_is_cut_is_released(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock_of(tmp_path)
    held.acquire()

    def cut(self: Lock) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "_read", cut)
        held.release()
    with lock_of(tmp_path):  # nobody keeps it alive
        pass
