"""Connections whose client sends no whole request."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

from deepfm_dist.serving import connections  # noqa: E402


@pytest.fixture
def small_service() -> Iterator[int]:
    """A small application behind our connections, and its port."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    class Small(connections.ImpatientProtocol):
        limit = 20

    listening = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, http=Small, lifespan="off", log_level="critical")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


HALVES = (
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n",
    b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP",
)


@pytest.mark.parametrize("half", HALVES)
def test_half_open_connections_are_closed(
    small_service: int, half: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = small_service
    monkeypatch.setattr(connections, "REQUEST_S", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        slow.sendall(half)
        with suppress(ConnectionResetError):
            while slow.recv(1000):  # until it is closed
                pass
        begun = time.monotonic()
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        assert time.monotonic() - begun < 5


def test_half_open_connections_block_no_one(small_service: int) -> None:
    port = small_service
    left = []
    for _ in range(3):
        for _ in range(40):  # twice what it holds
            left.append(socket.create_connection(("127.0.0.1", port), timeout=10))
            left[-1].sendall(HALVES[1])
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
    for connection in left:
        connection.close()
