"""A service whose model is replaced while it answers."""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepfm_dist import serve
from deepfm_dist.config import Config, with_settings
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs.train import train
from deepfm_dist.storage import atomic_write, follow_pointer
from tests.ranks import run_in_fork
from tests.serving.shop import shop

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from deepfm_dist.serving import following  # noqa: E402
from deepfm_dist.serving.replacement import ModelInUse  # noqa: E402


def _train_all(configs: list[Config]) -> None:
    for config in configs:
        train(config)


def _until(done: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _promote(runs: Path, name: str) -> None:
    with atomic_write(runs / "current") as file:
        file.write_text(f"{name}\n")


def test_no_request_fails_while_models_are_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "POLL_S", 0.02)
    warnings = logging.FileHandler(tmp_path / "warnings.txt")
    warnings.setLevel(logging.WARNING)
    monkeypatch.setattr(following.log, "handlers", [warnings])
    config, runs = shop(tmp_path), tmp_path / "r"
    settings = {"data.name": "shop", "run.name": "monday", "trainer.max_steps": 2}
    monday = with_settings(config, settings)
    tuesday = with_settings(monday, {"run.name": "tuesday", "trainer.max_steps": 3})
    run_in_fork(_train_all, [monday, tuesday])
    shutil.copytree(runs / "monday", runs / "broken")
    shutil.rmtree(runs / "broken/checkpoints")
    _promote(runs, "monday")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--run", str(runs / "current"), "--port", str(port), "--workers", "2"]
    service = multiprocessing.get_context("fork").Process(target=serve.main, args=(words,))
    service.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
    answers: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=client.base_url, timeout=20) as mine:
            while not stop.is_set():
                answer = mine.get("/users/4/recommendations?k=3")
                answers.append((answer.status_code, answer.text))
                time.sleep(0.005)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    try:
        _until(lambda: _answer(client, "/readyz"))
        rankings = set()
        for thread in askers:
            thread.start()
        for name in ("tuesday", "monday", "tuesday", "monday"):
            _promote(runs, name)
            _until(lambda wanted=name: client.get("/healthz").json()["run"] == wanted)
            rankings.add(client.get("/users/4/recommendations?k=3").text)
        _promote(runs, "broken")
        _until(lambda: client.get("/healthz").json()["problem"])
        health, metrics = client.get("/healthz").json(), client.get("/metrics").text
        time.sleep(0.1)  # several looks at the pointer, which are not logged again
        stop.set()
        for thread in askers:
            thread.join()
        saved = max((runs / "monday").rglob("state.json"), key=os.path.getmtime).stat().st_mtime
        assert 0 <= time.time() - saved - health["model_age_s"] < 30
        _check_that_monday_stays(health, metrics)
        assert len(rankings) == 2  # the models differ
        assert {status for status, _ in answers} == {200}
        assert {text for _, text in answers} == rankings

        _end_while_asking(port, service.pid or 0)
        service.join(20)
        assert service.exitcode == 0
        [warning] = (tmp_path / "warnings.txt").read_text().splitlines()
        assert warning == f"{health['problem']}; monday stays in use"
    finally:
        stop.set()
        service.kill()


def _check_that_monday_stays(health: dict[str, Any], metrics: str) -> None:
    """The model of monday, loaded again after tuesday's, is in use; the last pointer failed."""
    assert health["run"] == "monday"
    assert "broken: cannot be loaded: " in health["problem"]
    lines = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    assert lines['deepfm_model{run="monday",step="2"}'] == "1.0"
    assert float(lines["deepfm_model_age_seconds"]) >= health["model_age_s"]
    assert lines['deepfm_model_loads_total{result="loaded"}'] == "5.0"
    assert lines['deepfm_model_loads_total{result="failed"}'] == "1.0"
    assert lines["deepfm_model_outdated"] == "1.0"


def _end_while_asking(port: int, pid: int) -> None:
    """Sends SIGTERM amid a request, which is answered, while new connections are refused."""
    body = b'{"items": [3], "k": 2}'
    head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as begun:
        begun.sendall(head.encode() + body[:5])
        assert begun.recv(1000).startswith(b"HTTP/1.1 100 ")  # a worker reads it
        os.kill(pid, signal.SIGTERM)
        _until(lambda: _is_refused(port))
        begun.sendall(body[5:])
        assert begun.recv(1000).startswith(b"HTTP/1.1 200 ")


def _answer(client: Any, path: str) -> bool:
    try:
        return bool(client.get(path).status_code == 200)
    except httpx.TransportError:
        return False


def _is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_service_is_alive_before_it_is_ready() -> None:
    from fastapi.testclient import TestClient

    from deepfm_dist.serving.app import make_app

    client = TestClient(make_app(ModelInUse()))
    assert client.get("/healthz").status_code == 200
    assert client.get("/healthz").json()["status"] == "loading"
    for path in ("/readyz", "/users", "/users/4/recommendations"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    assert "deepfm_model_outdated 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("text", ["", "..", "current", "../other", "a\nb", "\x00"])
def test_a_pointer_holds_a_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "current").write_text(text)
    with pytest.raises(ConfigError, match="instead of the name of a run"):
        follow_pointer(tmp_path / "current")
