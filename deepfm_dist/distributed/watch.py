"""Ends a process that waits on its GPU for ranks that are gone.

gloo raises an error as soon as a rank is lost. NCCL does not: the host waits inside a CUDA call for
a kernel that waits for the lost rank, and Python runs no signal handler there. A thread looks after
the process instead.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import torch.distributed as dist

from deepfm_dist.errors import RankLost

_ANSWER_S = 5.0  # in which another waiting rank answers


def rank_lost(missing: list[int], world_size: int, timeout_s: float) -> RankLost:
    """The error that names the ranks which did not answer."""
    names = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    return RankLost(
        f"{names} of {world_size} did not answer: killed, or hanging for run.timeout_s="
        f"{timeout_s:g} seconds; look into {'their' if len(missing) > 1 else 'its'} log"
    )


class Watch:
    """Looks after the main thread while it is inside `waiting`.

    When that takes almost ``timeout_s``, or `_ANSWER_S` longer than a signal that came meanwhile
    (a launcher sends SIGTERM to those that are left), the ranks that wait say so in the store. The
    lowest of them names the others, and all of them end with exit code 1.

    Args:
        store: shared by the ranks; nobody else uses this object.
        rank: of this process.
        world_size: number of ranks.
        timeout_s: seconds after which a lost rank is given up.
        end: ends the process.
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
        # Before NCCL's own watchdog, which aborts the process with a page of C++ frames.
        self._patience_s = max(timeout_s / 2, timeout_s - 3 * _ANSWER_S)
        self._since: float | None = None
        self._over = Event()
        self._signals, self._wakeup = os.pipe()

    def __enter__(self) -> "Watch":
        os.set_blocking(self._wakeup, False)
        # Written to when a signal arrives, whatever the main thread is doing.
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
        """To be entered while the host waits for the GPU, and with it for all ranks."""
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
                signalled = None  # the main thread runs on, and hears signals itself
            elif now - since > self._patience_s or (
                signalled is not None and now - signalled > _ANSWER_S
            ):
                self.raise_if_ranks_missing(since)
                signalled = None

    def raise_if_ranks_missing(self, since: float) -> None:
        """Ends the process if other ranks do not wait as this one does."""
        with suppress(dist.DistError):
            before = [self._store.add(f"waits_{rank}", 0) for rank in range(self._world_size)]
            there = {self._rank}
            until = time.monotonic() + 2 * _ANSWER_S
            # To the end even when all have answered: a rank that began later needs this answer.
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
                print(f"RankLost: {error}", file=sys.stderr, flush=True)
        # Also where the store is gone, with the rank that held it.
        if self._since == since:
            self._end(RankLost.exit_code)
