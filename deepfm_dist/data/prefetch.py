"""Batches that are made while others train."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(make: Callable[[int], T], first: int, last: int, threads: int) -> Iterator[T]:
    """``make(first)`` to ``make(last)``, both included, in this order.

    Args:
        make: a step's batch; called by several threads at once where there are several.
        first: step.
        last: step.
        threads: that make batches, each one at a time, before they are asked for; 0: each batch
            is made when it is asked for.

    Raises:
        Exception: what ``make`` raised, at the step that it raised it for.
    """
    if threads == 0:
        yield from map(make, range(first, last + 1))
        return
    coming: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(threads, "read_ahead")
    try:
        for step in range(first, last + 1):
            coming.append(pool.submit(make, step))
            if len(coming) > threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:  # also where no more are asked for; then none is being made any more
        pool.shutdown(cancel_futures=True)
