"""Detects lost ranks: rank 0's heartbeat, a roll call after failures, a watchdog for GPUs.

gloo raises an error when a rank is lost, and `raise_if_ranks_missing` finds out which one. NCCL
does not: the host blocks in a CUDA call on a kernel that waits for the lost rank, and Python runs
no signal handlers there. A thread, `Watch`, monitors the process instead.

`torch.distributed.monitored_barrier` also names missing ranks, but only on rank 0 and only with
gloo.
"""

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread
from typing import TypeVar

import torch
import torch.distributed as dist

from deepfm_dist.errors import RankLost
from deepfm_dist.terminal import print_error

SHORT = timedelta(seconds=5)
"""Seconds within which a live rank answers."""
_ANSWER_S = 5.0  # in which another waiting rank answers
_BEATS = "beats"  # how often rank 0 has shown that it is there
T = TypeVar("T")


def in_background(work: Callable[[], T], device: torch.device | None = None) -> Future[T]:
    """Calls a function that may block forever in a daemon thread.

    Args:
        work: the function.
        device: this rank's device, if ``work`` may use it. Threads start on GPU 0, and every rank
            of a machine would create a CUDA context there.
    """
    outcome = Future[T]()

    def call() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=call, daemon=True).start()
    return outcome


@contextmanager
def beating(store: dist.Store, timeout_s: float) -> Iterator[None]:
    """Increments a counter in the store while this process, rank 0, runs; `wait_for` watches it.

    Args:
        store: shared by the ranks.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
    """
    over = Event()

    def beat() -> None:
        # A separate client: calls on one client are serialised, and some block on other ranks.
        client: dist.Store = store.clone()  # type: ignore[attr-defined]
        while not over.wait(_interval_s(timeout_s)):
            client.add(_BEATS, 1)

    thread = in_background(beat)
    try:
        yield
    finally:
        over.set()
        with suppress(TimeoutError, RuntimeError):
            thread.result(SHORT.total_seconds())


def wait_for(store: dist.Store, key: str, timeout_s: float) -> bytes:
    """Waits for a key that rank 0 sets, for as long as rank 0 sends heartbeats.

    Args:
        store: shared by the ranks.
        key: the key.
        timeout_s: seconds without a heartbeat after which rank 0 is considered lost.

    Returns:
        The value of the key.

    Raises:
        DistStoreError: when rank 0 is lost.
    """

    def read() -> tuple[bytes, int]:
        is_set = store.check([key])
        return store.get(key) if is_set else b"", store.add(_BEATS, 0)

    beats, last_beat, pause_s = 0, time.monotonic(), 0.001
    while (left_s := last_beat + timeout_s - time.monotonic()) > 0:
        try:  # rank 0 may hold the store, whose calls then never return
            value, count = in_background(read).result(left_s)
        except TimeoutError:
            break
        if value:
            return value
        if count != beats:
            beats, last_beat = count, time.monotonic()
        time.sleep(pause_s)
        # Short pauses, so that a complete barrier returns quickly.
        pause_s = min(2 * pause_s, _interval_s(timeout_s), 0.05)
    raise dist.DistStoreError(f"timed out: no sign of life from rank 0 in {key!r}")


def _interval_s(timeout_s: float) -> float:
    """Seconds between heartbeats."""
    return min(1.0, timeout_s / 10)


def rank_lost(missing: list[int], world_size: int, timeout_s: float) -> RankLost:
    """The error that names the ranks that did not answer."""
    names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    return RankLost(
        f"{names} of {world_size} did not answer: killed, or hanging for run.timeout_s="
        f"{timeout_s:g} seconds; look into {'their' if len(missing) > 1 else 'its'} log"
    )


def raise_if_ranks_missing(
    store: dist.Store,
    rank: int,
    world_size: int,
    timeout_s: float,
    local_rank: int,
    error: RuntimeError,
) -> None:
    """Finds out which ranks are missing after a collective failed.

    Args:
        store: shared by the ranks.
        rank: the rank of this process.
        world_size: number of ranks.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        local_rank: this process among those of its machine.
        error: what failed.

    Raises:
        RankLost: if ranks do not answer, on the lowest rank that does; if the store is gone, on the
            lowest rank of each machine.
        SystemExit: on the other ranks.
    """
    # Calls to a store on a disconnected machine never return.
    patience_s = 2 * SHORT.total_seconds() + 0.2 * world_size
    try:
        missing = in_background(lambda: _missing(store, rank, world_size)).result(patience_s)
        speaks = min({*range(world_size)} - {*missing})
    except (TimeoutError, RuntimeError):
        # Rank 0 held the store, so other missing ranks can be neither detected nor reported.
        missing, speaks = [0], max(1, rank - local_rank)
    if not missing:
        return
    if rank != speaks:
        raise SystemExit(RankLost.exit_code) from error
    raise rank_lost(missing, world_size, timeout_s) from error


def _missing(store: dist.Store, own_rank: int, world_size: int) -> list[int]:
    """Ranks that do not answer.

    Raises:
        RuntimeError: the store is gone.
    """
    missing = []
    store.set(f"here_{own_rank}", "")
    deadline = time.monotonic() + SHORT.total_seconds()
    for rank in range(world_size):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            store.wait([f"here_{rank}"], timedelta(seconds=left))
        except dist.DistStoreError:
            missing.append(rank)
    return missing


class Watch:
    """Monitors the main thread while it is inside `waiting`.

    If that takes almost ``timeout_s``, or `_ANSWER_S` after a signal (a launcher sends SIGTERM to
    the remaining ranks), the waiting ranks report in the store. The lowest of them names the
    missing ones, and all of them exit with code 1.

    Args:
        store: shared by the ranks; not used elsewhere.
        rank: the rank of this process.
        world_size: number of ranks.
        timeout_s: seconds after which to give up on a lost rank.
        end: exits the process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        timeout_s: float,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout_s, self._end = timeout_s, end
        # Earlier than NCCL's watchdog, which aborts the process with a page of C++ frames.
        self._patience_s = max(timeout_s / 2, timeout_s - 3 * _ANSWER_S)
        self._since: float | None = None
        self._over = Event()
        self._signals, self._wakeup = os.pipe()

    def __enter__(self) -> "Watch":
        os.set_blocking(self._wakeup, False)
        # Written to when a signal arrives, even if the main thread is inside a C call.
        self._before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._thread = Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._before)
        os.write(self._wakeup, b"\0")
        self._thread.join(2 * _ANSWER_S)
        if not self._thread.is_alive():
            os.close(self._signals)
            os.close(self._wakeup)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context to enter while the host waits for the GPU, and so for all ranks."""
        if self._since is not None:  # inside another one
            yield
            return
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _look(self) -> None:
        signalled = None
        while not self._over.is_set():
            ready, _, _ = select.select([self._signals], [], [], min(1.0, _ANSWER_S / 4))
            now, since = time.monotonic(), self._since
            if ready:
                os.read(self._signals, 64)
                signalled = now
            if since is None:
                signalled = None  # the main thread keeps running and handles signals itself
            elif now - since > self._patience_s or (
                signalled is not None and now - signalled > _ANSWER_S
            ):
                self._end_if_ranks_missing(since)
                signalled = None

    def _end_if_ranks_missing(self, since: float) -> None:
        """Exits the process if other ranks do not report as waiting."""
        with suppress(dist.DistError):
            before = [self._store.add(f"waits_{rank}", 0) for rank in range(self._world_size)]
            there = {self._rank}
            until = time.monotonic() + 2 * _ANSWER_S
            # Even if all have answered: a rank that started later needs this answer.
            while time.monotonic() < until and self._since == since:
                self._store.add(f"waits_{self._rank}", 1)
                time.sleep(_ANSWER_S / 10)
                there |= {
                    rank
                    for rank in range(self._world_size)
                    if self._store.add(f"waits_{rank}", 0) > before[rank]
                }
            if len(there) == self._world_size or self._since != since:
                return
            if self._rank == min(there):
                missing = sorted({*range(self._world_size)} - there)
                error = rank_lost(missing, self._world_size, self._timeout_s)
                print_error(RankLost.__name__, str(error))
        # Also if the store is gone with the rank that held it.
        if self._since == since:
            self._end(RankLost.exit_code)
