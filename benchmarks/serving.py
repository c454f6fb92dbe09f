"""How many requests a second a service answers, how long one takes, and what its workers cost.

The service is pinned to as many cores as it has workers, and the clients to the other cores where
there are any. Requests come over one loopback connection each: first one after the other on every
connection, for the greatest rate, then at a steady rate whether or not the earlier ones have been
answered, so that waiting counts (an open loop). Where clients share the cores of the service, the
CPU time of a request is what can be compared: workers over it are the requests that they can answer
a second.

A request asks for a user's top 10 of the whole catalogue, or scores rows (--rows). With --swaps the
model is replaced that many times at the steady rate; failed requests are counted.

    python benchmarks/serving.py --shape sample
    python benchmarks/serving.py --shape notebook
    python benchmarks/serving.py --shape notebook --workers 2 --swaps 10
    python benchmarks/serving.py --shape sample --rows 1000 --rate 5

The notebook's shape is the generated world of its 31,360 users and 6,807 items, dim 10, 30-20-10,
trained for a few steps: what is measured does not depend on how good the weights are.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import NOTEBOOK, write

from deepfm_dist.messages import plural

MODEL = ["model.embedding_dim=10", "model.over_arch_layer_sizes=[30,20,10]"]
CONNECTIONS = 32


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=("sample", "notebook"), default="sample")
    parser.add_argument("--rate", type=float, default=500, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of the steady rate")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows that a request has scored")
    parser.add_argument("--swaps", type=int, default=0, help="models replaced meanwhile")
    parser.add_argument("--folder", type=Path, help="where to put the run (default: temporary)")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    packages = ("torch", "fastapi", "uvicorn")
    print(f"python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}")
    print(f"command: {shlex.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        run = trained(arguments.shape, home)
        pointer = run.with_name("current")
        pointer.write_text(run.name)
        command = [sys.executable, "-m", "deepfm_dist.serve", "--quiet", "--run", str(pointer)]
        command += ["--port", "0", "--workers", str(arguments.workers)]
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: arguments.workers])  # of the service, which inherits it
        service = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True)
        os.sched_setaffinity(0, cores[arguments.workers :] or cores)
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline().partition("/ shows")[0].rpartition(":")[2])
            report = asyncio.run(_measured(service.pid, port, pointer, arguments))
        finally:
            service.terminate()
            service.wait()
    print(
        f"{report['shape_items']:,} items, {plural(arguments.workers, 'worker')}: "
        f"{report['requests_per_s']:,} requests/s one after the other on {CONNECTIONS} "
        f"connections, {report['cpu_ms']} ms of CPU each; at {report['rate']:g}/s "
        f"p50 {report['p50_ms']} ms, p99 {report['p99_ms']} ms, {report['failed']} failed during "
        f"{plural(arguments.swaps, 'replacement')} of the model; {report['pss_mb']:,} MB"
    )
    print(json.dumps({"shape": arguments.shape, "workers": arguments.workers, **report}))
    return 0


def trained(shape: str, home: Path) -> Path:
    """Trains a model of a shape for a few steps; returns the run's folder."""
    settings = ["run.loggers=[]", "trainer.max_steps=20", "trainer.validate_every_epochs=0", *MODEL]
    settings.append("data.name=served")  # of the copy of the run, too
    settings.append("checkpoint.resume=never")  # --folder may hold a run of other settings
    if shape == "notebook":
        data = home / "data"
        if not (data / "train_ratings.csv").is_file():
            write(NOTEBOOK, data)
        settings += [f"data.root={data}", "run.name=notebook"]
    command = [sys.executable, "-m", "deepfm_dist.train", "--quiet", "--config", "sample"]
    subprocess.run([*command, *settings], check=True, cwd=home)
    return home / "runs" / shape


def _processes(pid: int) -> list[int]:
    """A process and those below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in _processes(int(child)))]


def _cpu_s(pid: int) -> float:
    """Seconds that a service has computed: fields 14 and 15 of proc(5)'s ``stat``."""
    stats = [Path(f"/proc/{p}/stat").read_text().rpartition(")")[2] for p in _processes(pid)]
    ticks = sum(int(ticks) for stat in stats for ticks in stat.split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def _pss_mb(pid: int) -> float:
    """Memory of a service in MB; a page that several of its processes share counts once."""
    texts = [Path(f"/proc/{p}/smaps_rollup").read_text() for p in _processes(pid)]
    kib = [int(line.split()[1]) for t in texts for line in t.splitlines() if line[:4] == "Pss:"]
    return sum(kib) * 1024 / 1e6


async def _requests(connection: "_Connection", n_rows: int | None) -> list[bytes]:
    """Requests for users' top 10, or with rows to score."""
    users = json.loads((await connection.asked(_get("/users?limit=1000")))[1])["ids"]
    if n_rows is None:
        return [_get(f"/users/{user}/recommendations?k=10") for user in users]
    found = json.loads((await connection.asked(_get("/items?limit=100")))[1])["items"]
    rng = np.random.default_rng(2)
    return [_rows(users, found, n_rows, rng) for _ in range(20)]


async def _measured(
    pid: int, port: int, pointer: Path, arguments: argparse.Namespace
) -> dict[str, float]:
    connections = [_Connection(port) for _ in range(CONNECTIONS)]
    health = json.loads((await connections[0].asked(_get("/healthz")))[1])
    requests = await _requests(connections[0], arguments.rows)
    counts, n_answers = (b'"rank"', 10) if arguments.rows is None else (b'"score"', arguments.rows)
    drawn = np.random.default_rng(1).integers(0, len(requests), 1 << 16)
    failed = 0

    async def ask(connection: _Connection, number: int) -> None:
        nonlocal failed
        try:
            status, body = await connection.asked(requests[drawn[number % len(drawn)]])
        except (OSError, asyncio.IncompleteReadError):
            status, body = 0, b""
        failed += status != 200 or body.count(counts) != n_answers

    async def in_turn(connection: _Connection, number: int) -> int:
        done, end = 0, time.perf_counter() + 5
        while time.perf_counter() < end:
            await ask(connection, done * CONNECTIONS + number)
            done += 1
        return done

    await asyncio.gather(*(ask(c, n) for n, c in enumerate(connections)))  # warm-up
    begun, computed = time.perf_counter(), _cpu_s(pid)
    done = sum(await asyncio.gather(*(in_turn(c, n) for n, c in enumerate(connections))))
    greatest = done / (time.perf_counter() - begun)
    cpu_ms, pss_mb = (_cpu_s(pid) - computed) / done * 1000, _pss_mb(pid)

    free: asyncio.Queue[_Connection] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)
    took: list[float] = []

    async def one(number: int, due: float) -> None:
        connection = await free.get()
        await ask(connection, number)
        took.append(time.perf_counter() - due)
        free.put_nowait(connection)

    swapping = asyncio.create_task(_swapped(port, pointer, arguments.swaps))
    begun, number, waiting = time.perf_counter(), 0, []
    while number < arguments.rate * arguments.seconds or not swapping.done():
        due = begun + number / arguments.rate
        if (delay := due - time.perf_counter()) > 0:
            await asyncio.sleep(delay)
        # From when it was due, not sent: a slow sender hides no waiting.
        waiting.append(asyncio.create_task(one(number, due)))
        number += 1
    await asyncio.gather(swapping, *waiting)
    p50, p99 = np.percentile(np.array(took) * 1000, [50, 99])
    return {
        "shape_items": health["items"],
        "shape_users": health["users"],
        "requests_per_s": round(greatest),
        "cpu_ms": round(cpu_ms, 3),
        "rate": arguments.rate,
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "failed": failed,
        "pss_mb": round(pss_mb),
    }


async def _swapped(port: int, pointer: Path, times: int) -> None:
    """Replaces the model as often as asked, by copies of its run."""
    names = [pointer.read_text(), "copy"]
    if times and not pointer.with_name(names[1]).exists():
        shutil.copytree(pointer.with_name(names[0]), pointer.with_name(names[1]))
    connection = _Connection(port)
    for number in range(1, times + 1):
        wanted = names[number % 2]
        aside = pointer.with_name("pointer")
        aside.write_text(wanted)
        aside.rename(pointer)
        while json.loads((await connection.asked(_get("/readyz")))[1])["run"] != wanted:
            await asyncio.sleep(0.1)


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def _rows(users: list[str], items: list[Any], n: int, rng: np.random.Generator) -> bytes:
    """A request that has pairs of users and items scored."""
    rows = [
        {"user": users[rng.integers(len(users))], "item": items[rng.integers(len(items))]["id"]}
        for _ in range(n)
    ]
    body = json.dumps({"rows": rows}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


class _Connection:
    """A kept-alive HTTP/1.1 connection; a client library would be the slower end of it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def asked(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        if self._stream is None or self._stream[0].at_eof():  # the service closes idle ones
            self._stream = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._stream
        writer.write(request)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(re.search(rb"\r\ncontent-length: (\d+)", head)[1])  # type: ignore[index]
            body = await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            self._stream = None
            raise
        if b"\r\nconnection: close" in head:
            writer.close()
            self._stream = None
        return int(head[9:12]), body


if __name__ == "__main__":
    sys.exit(main())
