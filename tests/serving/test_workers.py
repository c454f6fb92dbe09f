"""Workers that share a model, and what becomes of them when one of them or a process above ends."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from deepfm_dist.errors import EnvironmentProblem  # noqa: E402
from deepfm_dist.serving import following, workers  # noqa: E402
from tests.ranks import run_alone  # noqa: E402

FORK = multiprocessing.get_context("fork")


def _load(named: Path | None) -> Any:
    assert named is not None
    while (named.parent / "wait").exists():
        time.sleep(0.01)
    if named.name == "broken":
        raise ValueError("no such model")
    figures = {"step": 1, "saved_at": 0.0, "n_users": 0, "n_items": 0, "knows_users_by_items": True}
    return SimpleNamespace(name=named.name, find=_find, **figures)


def _find(text: str, n: int) -> list[Any]:
    time.sleep(float(text))
    return []


def _serve(listening: socket.socket, folder: Path) -> None:
    following.POLL_S = 0.05
    workers.RESTART_S = 0.1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    options = workers.WorkerOptions(listening, ("*",), folder, n_workers=2)
    with workers.Generations(options) as generations:
        follower = following.PointerFollower(generations, _load, folder / "current", folder)
        follower.load_first()
        follower.follow()


class Service:
    """A service of models that are mere names, and its processes."""

    def __init__(self, folder: Path, status: int = 200) -> None:
        self.folder = folder
        self.point_to("monday")
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
            self.address = listening.getsockname()
            self.process = FORK.Process(target=_serve, args=(listening, folder))
            self.process.start()
        try:
            self.until(lambda: self._answers(status))
        except BaseException:  # pytest would wait for the process when it ends
            self.__exit__()
            raise

    def _answers(self, status: int) -> bool:
        try:
            return bool(self.get("/readyz").status_code == status)
        except httpx.ReadError:  # from the worker without a model, which ends when there is one
            return False

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def point_to(self, name: str) -> None:
        (self.folder / "new").write_text(name)
        (self.folder / "new").rename(self.folder / "current")

    def get(self, path: str) -> Any:
        return httpx.get(f"http://127.0.0.1:{self.address[1]}{path}", timeout=20)

    def run_name(self) -> str:
        return str(self.get("/readyz").json()["run"])

    @staticmethod
    def until(done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 30
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def below(self, pid: int | None) -> list[int]:
        """Children of a process."""
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def loader_and_workers(self) -> tuple[int, list[int]]:
        """The process that holds the model, once it is the only one and all workers are there."""
        self.until((self.folder / "status.json").exists)  # it is written when all of them answer
        self.until(lambda: len(self.below(self.process.pid)) == 1)
        [loader] = self.below(self.process.pid)
        self.until(lambda: len(self.below(loader)) == 2)
        return loader, self.below(loader)


def _is_refused(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return True
    return False


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        yield service


def test_the_worker_without_a_model_ends_before_the_service_is_ready(tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    with Service(tmp_path, status=503) as service:
        assert service.get("/readyz").headers["connection"] == "close"
        first = service.below(service.process.pid)[0]  # the next one loads the model
        both = [first, *service.below(first)]
        (tmp_path / "wait").unlink()
        service.until(lambda: service._answers(200))
        assert not any(map(_is_running, both))


def test_what_dies_is_replaced(service: Service) -> None:
    loader, both = service.loader_and_workers()
    os.kill(both[0], signal.SIGKILL)
    service.until(lambda: set(service.below(loader)) - set(both))
    same, now = service.loader_and_workers()
    assert same == loader and both[1] in now
    os.kill(loader, signal.SIGKILL)
    service.until(lambda: loader not in service.below(service.process.pid))
    assert service.run_name() == "monday"  # by its workers, if there is no other loader yet
    service.until(lambda: not any(map(_is_running, now)))  # one there is, and they have retired
    assert service.run_name() == "monday"


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("is_loading", [False, True])  # another model meanwhile
def test_no_process_outlives_the_command(service: Service, signal_: int, is_loading: bool) -> None:
    loader, both = service.loader_and_workers()
    others = []
    if is_loading:
        (service.folder / "wait").touch()
        service.point_to("tuesday")
        service.until(lambda: len(service.below(service.process.pid)) == 2)
        others = service.below(service.process.pid)
    head = "POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
    with socket.create_connection(service.address, timeout=20) as begun:
        begun.sendall(
            f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode()
        )
        assert begun.recv(1000).startswith(b"HTTP/1.1 100 ")  # a worker reads it
        os.kill(service.process.pid or 0, signal_)
        service.until(lambda: _is_refused(service.address))
        begun.sendall(b"{.")
        assert begun.recv(1000).startswith(b"HTTP/1.1 400 ")  # that is no JSON
    service.process.join(20)
    assert service.process.exitcode == (0 if signal_ == signal.SIGTERM else -signal_)
    (service.folder / "wait").unlink(missing_ok=True)
    service.until(lambda: not any(map(_is_running, [loader, *both, *others])))


def test_a_kept_connection_gets_an_answer_from_a_model_that_retires(service: Service) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{service.address[1]}", timeout=20) as client:
        answers = [client.get("/readyz")]
        service.point_to("tuesday")

        def is_last() -> bool:
            answers.append(client.get("/readyz"))
            return answers[-1].headers.get("connection") == "close"

        service.until(is_last)  # the new model's workers answer before the old one's retire
        assert {answer.json()["run"] for answer in answers} == {"monday"}
        service.until(lambda: client.get("/readyz").json()["run"] == "tuesday")


def test_figures_are_those_of_all_workers_and_of_earlier_models(service: Service) -> None:
    def asked() -> int:
        text = service.get("/metrics").text
        line = re.search(r'^deepfm_requests_total\{route="/items",status="200"\} (.*)', text, re.M)
        return int(float(line[1])) if line else 0

    _, both = service.loader_and_workers()
    slow = [socket.create_connection(service.address) for _ in range(6)]
    for connection in slow:  # several at a time, so that no worker answers them all
        connection.sendall(b"GET /items?q=0.05 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for connection in slow:
        connection.recv(1000)
        connection.close()
    service.until(lambda: asked() == 6)  # each is counted after its response is sent
    os.kill(both[0], signal.SIGKILL)
    service.until(lambda: not _is_running(both[0]))
    service.point_to("tuesday")
    service.until(lambda: service.run_name() == "tuesday")
    service.point_to("broken")
    service.until(lambda: "no such model" in service.get("/healthz").text)
    service.until(lambda: 'loads_total{result="failed"} 1.0' in service.get("/metrics").text)
    text = service.get("/metrics").text
    assert 'deepfm_model_loads_total{result="loaded"} 2.0' in text
    assert "deepfm_model_outdated 1.0" in text
    assert asked() == 6
    figures = [*service.folder.glob("*.db")]
    assert len(figures) <= 2 * 2 * 3  # counters and histograms of workers of three generations


def test_a_model_that_cannot_be_loaded_first_is_the_command_s_error(tmp_path: Path) -> None:
    (tmp_path / "current").write_text("broken")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        service = FORK.Process(target=_record_error, args=(listening, tmp_path))
        service.start()
        service.join(20)
    kind, message, notes = json.loads((tmp_path / "error.json").read_text())
    assert (kind, message) == ("ValueError", "no such model")
    assert "in _load" in notes  # the traceback of the process that loaded it


def _record_error(listening: socket.socket, folder: Path) -> None:
    try:
        _serve(listening, folder)
    except ValueError as error:
        report = [type(error).__name__, str(error), "".join(error.__notes__)]
        (folder / "error.json").write_text(json.dumps(report))


def test_a_signal_right_after_a_fork_is_not_lost(tmp_path: Path) -> None:
    assert run_alone(_end_while_forking, tmp_path) == "ended with exit code -15"


def _end_while_forking(folder: Path) -> str:
    parent = os.getpid()

    def end_child() -> None:
        if os.getppid() == parent:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.register_at_fork(after_in_child=end_child)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = workers.WorkerOptions(listening, ("*",), folder)
        with workers.Generations(options) as generations:
            try:
                generations.start_without_model()
            except EnvironmentProblem as error:
                return str(error).partition("model ")[2]
    return "started"


def test_a_long_body_s_sender_gets_the_response(service: Service) -> None:
    head = b"POST /recommend HTTP/1.1\r\nHost: localhost\r\n"
    part = b" " * (3 << 19)
    chunk = b"%x\r\n%b\r\n" % (len(part), part)
    declared = head + b"Content-Length: %d\r\n\r\n" % (2 * len(part))
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    for begin, end in ((declared + part, part), (chunked + chunk, chunk + b"0\r\n\r\n")):
        with socket.create_connection(service.address, timeout=20) as sender:
            sender.sendall(begin)
            time.sleep(0.1)  # its length is known by now
            sender.sendall(end)
            assert sender.recv(1000).startswith(b"HTTP/1.1 413 ")
