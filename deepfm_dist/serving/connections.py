"""Closes HTTP connections whose client does not send a complete request in time."""

import asyncio
import os
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

REQUEST_S = 10.0
"""Seconds after a connection's start or last answer within which a complete request must arrive."""
MAX_HEADER_BYTES = 1 << 16
MAX_CONNECTIONS = 1000
BACKLOG = 128
"""Maximum number of connections that the kernel queues until they are accepted."""


def max_connections() -> int:
    """Connections that this process can hold, after raising its limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = len(os.listdir("/proc/self/fd")) + BACKLOG + 32
    wanted = MAX_CONNECTIONS + others
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - others))


class ImpatientProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with a time-out for requests.

    If there are too many connections, the one that has waited longest is closed in favour of a new
    one, so that half-open connections cannot block the service.

    Attributes:
        limit: maximum number of connections.
    """

    limit = MAX_CONNECTIONS

    _waiting: dict["ImpatientProtocol", None] = {}  # noqa: RUF012  # in the order of opening
    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """Starts waiting for the first request."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.limit:
            longest = next(iter(self._waiting))
            longest._stop_waiting()  # otherwise it would be used for the next one, too
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Stops waiting once a request is complete."""
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
            return
        self._wait()
        if self.cycle is None or self.cycle.response_complete:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.abort()

    def on_response_complete(self) -> None:
        """Starts waiting for the next request."""
        super().on_response_complete()
        self._header_bytes = 0
        if not self.transport.is_closing() and not self._is_answering():
            self._wait()

    def _is_answering(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.more_body

    def _wait(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)
            self._waiting[self] = None

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            self._waiting.pop(self, None)
