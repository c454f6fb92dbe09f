"""Locks that allow one writer at a time to a run's folder or an output file.

The lock file ``.NAME.lock`` is next to what it protects, names the host and process that hold it,
and is deleted afterwards. If the file system supports ``flock``, the kernel holds the lock and
releases it when the process ends. Elsewhere (an object store, some network mounts) the holder
rewrites the file every `BEAT_S` seconds: if the process is gone from this host, or the file has not
changed for `STALE_S` seconds while another process waited, the lock is stale and may be taken. Two
processes that lock a folder in an object store within `SETTLE_S` may both succeed.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from deepfm_dist.errors import InUse
from deepfm_dist.storage import ANOTHER_ROOT, is_of_storage, is_remote, write_errors_to_user

log = logging.getLogger(__name__)

BEAT_S = 10.0
"""Seconds between heartbeats of a holder without ``flock``."""
STALE_S = 35.0
"""Seconds without a heartbeat after which its lock is stale."""
SETTLE_S = 0.5
"""Seconds after which a lock without ``flock`` is read again, in case two were written at once."""
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_descriptors: set[int] = set()
_tokens: set[str] = set()


def _close_in_child() -> None:
    """A forked child must not keep the locks of a parent that crashes."""
    for descriptor in _descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """An exclusive lock on a folder or file.

    Args:
        target: the folder or file; its parent folder is created if missing.
        what: name of the target, for messages.
        cure: alternative to waiting, for messages.
        elsewhere: what to do if the lock file cannot be written, for messages.
    """

    def __init__(self, target: Path, what: str, cure: str, elsewhere: str = ANOTHER_ROOT) -> None:
        self.path = target.with_name(f".{target.name}.lock")
        self._what, self._cure, self._elsewhere = what, cure, elsewhere
        self._descriptor: int | None = None
        self._token = uuid.uuid4().hex
        self._released: threading.Event | None = None

    def acquire(self, wait_s: float = 0.0) -> None:
        """Takes the lock.

        Args:
            wait_s: how long to wait for another holder.

        Raises:
            InUse: another process holds it.
            DeepFMError: the lock file cannot be written.
        """
        begun, is_logged = time.monotonic(), False
        while True:
            with write_errors_to_user(self.path.parent, self._elsewhere):
                holder = self._try()
            if holder is None:
                return
            waited = time.monotonic() - begun
            if waited >= wait_s:
                raise InUse(
                    f"{self._what}: in use by {_describe(holder)}; wait for it, stop it, or "
                    f"{self._cure}"
                )
            if not is_logged and waited > 1:
                log.info("%s: in use by %s; waiting for it", self._what, _describe(holder))
                is_logged = True
            time.sleep(min(0.2, wait_s - waited))

    def release(self) -> None:
        """Releases the lock; without effect if it is not held."""
        if self._released is not None:
            self._released.set()
            self._released = None
            _tokens.discard(self._token)
            try:
                if self._read().get("token") == self._token:
                    self._unlink()
            except Exception as error:  # without heartbeats it becomes stale
                if not is_of_storage(error):
                    raise
        if self._descriptor is not None:
            self._unlink()  # while it is held: waiting processes check that it still exists
            _descriptors.discard(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    @contextmanager
    def waiting(self, wait_s: float) -> Iterator[None]:
        """Holds the lock inside the block, after waiting for another holder; see `acquire`."""
        self.acquire(wait_s)
        try:
            yield
        finally:
            self.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> dict[str, Any] | None:
        """Tries to take the lock; returns its holder if that is another process."""
        if is_remote(self.path):
            return self._try_without_flock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self._is_at_path(descriptor):  # its holder deleted it meanwhile
                    os.close(descriptor)
                    continue
            except BlockingIOError:
                os.close(descriptor)
                return self._read()
            except OSError as error:
                os.close(descriptor)
                if error.errno not in _NO_FLOCK:
                    raise
                return self._try_without_flock()
            os.ftruncate(descriptor, 0)
            os.write(descriptor, self._text().encode())
            self._descriptor = descriptor
            _descriptors.add(descriptor)
            return None

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _try_without_flock(self) -> dict[str, Any] | None:
        holder = self._read()
        if holder and not _is_gone(holder) and not self._is_left_over(holder):
            return holder
        self._put(self._text())
        time.sleep(SETTLE_S)
        if (holder := self._read()).get("token") != self._token:
            return holder
        _tokens.add(self._token)
        self._released = threading.Event()
        threading.Thread(target=self._beat, args=(self._released,), daemon=True).start()
        return None

    def _is_left_over(self, holder: dict[str, Any]) -> bool:
        """Waits for a holder's heartbeat; True if there is none."""
        log.info("%s: waiting to see whether %s is alive", self.path, _describe(holder))
        until = time.monotonic() + STALE_S
        while time.monotonic() < until:
            time.sleep(min(1.0, STALE_S / 10))
            now = self._read()
            if not now:
                return True
            if now != holder:
                return False
        return True

    def _beat(self, released: threading.Event) -> None:
        beats = 0
        while not released.wait(BEAT_S):
            beats += 1
            try:
                if self._read().get("token") == self._token and not released.is_set():
                    self._put(self._text(beats))
            except Exception as error:
                if not is_of_storage(error):
                    raise

    def _put(self, text: str) -> None:
        """Replaces the file; readers see the old or the new text."""
        if is_remote(self.path):
            self.path.write_text(text)
            return
        aside = self.path.with_name(f"{self.path.name}.{self._token}")
        aside.write_text(text)
        aside.replace(self.path)

    def _text(self, beats: int = 0) -> str:
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": self._token,
            "beats": beats,
        }
        return json.dumps(facts) + "\n"

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # none, or its holder is writing it
            return {}
        return content if isinstance(content, dict) else {}

    def _unlink(self) -> None:
        with suppress(OSError):
            self.path.unlink()


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder was a process of this host that has ended, maybe with our pid."""
    if holder.get("host") != socket.gethostname() or holder.get("token") in _tokens:
        return False
    pid = holder.get("pid")
    return pid == os.getpid() or not isinstance(pid, int) or not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _describe(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
