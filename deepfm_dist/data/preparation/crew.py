"""A crew of threads that prepare together in one process."""

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
    """State shared by the threads of a crew."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = Barrier(size), [None] * size
        self.lock = Lock()


@dataclass(frozen=True)
class Crew:
    """One of several threads that process different files and partitions.

    Compiled code, Arrow and file access release the GIL, so threads are as fast as processes and
    share what they read.

    Attributes:
        rank: the rank of this thread.
        size: number of threads.
    """

    rank: int = 0
    size: int = 1
    _shared: Any = field(default_factory=lambda: _Shared(1))

    def __reduce__(self) -> tuple[type["Crew"], tuple[()]]:
        return Crew, ()  # in another process, a crew of one

    @property
    def is_first(self) -> bool:
        """Whether this is the first thread, the caller."""
        return self.rank == 0

    @property
    def lock(self) -> Lock:
        """Guards data that all threads modify."""
        lock: Lock = self._shared.lock
        return lock

    def gather(self, value: Any) -> list[Any]:
        """Every thread's value, in order, without copying. All threads."""
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
        """Maps ``function`` over items on the crew's threads.

        Called by the first thread while the others wait.
        """
        if self.size == 1:
            return [function(item) for item in items]
        with ThreadPoolExecutor(self.size, "prepare") as pool:
            return list(pool.map(function, items))

    def check(self) -> None:
        """Raises in this thread if another one failed.

        Raises:
            BrokenBarrierError: another thread failed.
        """
        if self._shared.barrier.broken:
            raise BrokenBarrierError

    def fail(self) -> None:
        """Makes the other threads raise at their next `gather` or `check`."""
        self._shared.barrier.abort()


def run_crew(size: int, work: Callable[[Crew], Result]) -> Result:
    """Calls ``work`` in this thread and ``size - 1`` others.

    Returns:
        The result of this thread.

    Raises:
        BaseException: the error of the first thread that failed.
    """
    shared = _Shared(size)
    failures: list[BaseException] = []

    def guarded(rank: int) -> Result | None:
        crew = Crew(rank, size, shared)
        try:
            return work(crew)
        except BrokenBarrierError:  # another thread failed
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
