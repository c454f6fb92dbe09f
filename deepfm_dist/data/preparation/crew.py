"""The threads that prepare together, in one process."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier, BrokenBarrierError, Lock
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", np.int64, np.float64)
Item = TypeVar("Item")
Result = TypeVar("Result")


class _Shared:
    """What the threads of a crew exchange."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = Barrier(size), [None] * size
        self.lock = Lock()


@dataclass(frozen=True)
class Crew:
    """One of several threads that do the same work on different files and partitions.

    Compiled code, Arrow and files leave Python's lock alone, so that threads are as good as
    processes, and they share what they have read.

    Attributes:
        rank: of this thread.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1
    _shared: Any = field(default_factory=lambda: _Shared(1))

    def __reduce__(self) -> tuple[type["Crew"], tuple[()]]:
        return Crew, ()  # in another process it is alone

    @property
    def is_first(self) -> bool:
        """Whether this is the thread that called."""
        return self.rank == 0

    @property
    def lock(self) -> Lock:
        """Guards what all threads change."""
        lock: Lock = self._shared.lock
        return lock

    def gather(self, value: Any) -> list[Any]:
        """Every thread's value, in their order: the objects themselves. All threads."""
        if self.size == 1:
            return [value]
        self._shared.values[self.rank] = value
        self._shared.barrier.wait()
        values = list(self._shared.values)
        self._shared.barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        """The first thread's value. All threads."""
        return self.gather(value if self.is_first else None)[0]

    def add_up(self, array: npt.NDArray[T]) -> npt.NDArray[T]:
        """The sum of the threads' arrays. All threads."""
        total: npt.NDArray[T] = np.sum(self.gather(array), axis=0)
        return total

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """``function`` of every item, on as many threads as the crew has.

        For the first thread, while the others wait for it.
        """
        if self.size == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self.size, "prepare") as pool:
            return list(pool.map(function, items))

    def check(self) -> None:
        """Ends this thread's work if another one has failed.

        Raises:
            BrokenBarrierError: it has.
        """
        if self._shared.barrier.broken:
            raise BrokenBarrierError

    def fail(self) -> None:
        """Lets the other threads end at their next `gather` or `check`."""
        self._shared.barrier.abort()


def run_crew(size: int, work: Callable[[Crew], Result]) -> Result:
    """Calls ``work`` in this thread and ``size - 1`` others.

    Returns:
        What it returned in this thread.

    Raises:
        BaseException: what the first thread to fail raised.
    """
    shared = _Shared(size)
    failures: list[BaseException] = []

    def guarded(rank: int) -> Result | None:
        crew = Crew(rank, size, shared)
        try:
            return work(crew)
        except BrokenBarrierError:  # another thread has failed
            return None
        except BaseException as error:
            with crew.lock:
                failures.append(error)
            crew.fail()
            return None

    with ThreadPoolExecutor(max(1, size - 1), "prepare") as pool:
        others: list[Future[Any]] = [pool.submit(guarded, rank) for rank in range(1, size)]
        result = guarded(0)
        for other in others:
            other.result()
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]
