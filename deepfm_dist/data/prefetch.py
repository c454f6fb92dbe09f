"""Prefetches batches in threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(make: Callable[[int], T], first: int, last: int, threads: int) -> Iterator[T]:
    """Yields ``make(first)`` to ``make(last)``, inclusive and in order.

    Args:
        make: makes a step's batch; called concurrently by several threads.
        first: step.
        last: step.
        threads: number of batches made ahead at a time; 0: each batch is made on request.

    Raises:
        Exception: an error of ``make``, raised at its step.
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
    finally:  # also if the consumer stops early; afterwards no batch is in progress
        pool.shutdown(cancel_futures=True)
