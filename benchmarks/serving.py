"""How many recommendations a second a service gives, and how long one takes: one worker, one core.

The service runs in a process of its own, pinned to one core where there are several; requests come
from this process over one loopback connection each, at a steady rate whether or not the earlier
ones have been answered, so that waiting counts (an open loop). Before that as many as are answered
in turn give the greatest rate. Every request asks for another user's top 10 of the whole catalogue.

    python benchmarks/serving.py --shape sample
    python benchmarks/serving.py --shape notebook

The notebook's shape is the generated world of its 31,360 users and 6,807 items, dim 10, 30-20-10,
trained for a few steps: what is measured does not depend on how good the weights are.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from synthetic import NOTEBOOK, write

MODEL = ["model.embedding_dim=10", "model.over_arch_layer_sizes=[30,20,10]"]
CONNECTIONS = 32


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=("sample", "notebook"), default="sample")
    parser.add_argument("--rate", type=float, default=500, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of the steady rate")
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
        command = [sys.executable, "-m", "deepfm_dist.serve", "--quiet", "--run", str(run)]
        command += ["--port", "0"]
        service = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True)
        try:
            assert service.stdout is not None
            port = int(service.stdout.readline().partition("/ shows")[0].rpartition(":")[2])
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) > 1:
                os.sched_setaffinity(service.pid, {cores[0]})
                os.sched_setaffinity(0, set(cores[1:]))
            report = asyncio.run(_measured(service.pid, port, arguments.rate, arguments.seconds))
        finally:
            service.terminate()
            service.wait()
    print(
        f"{report['shape_items']:,} items: {report['requests_per_s']:,} requests/s one after the "
        f"other on {CONNECTIONS} connections, {report['cpu_ms']} ms of CPU each; at "
        f"{report['rate']:g}/s p50 {report['p50_ms']} ms, p99 {report['p99_ms']} ms"
    )
    print(json.dumps({"shape": arguments.shape, **report}))
    return 0


def trained(shape: str, home: Path) -> Path:
    """Trains a model of a shape for a few steps; returns the run's folder."""
    settings = ["run.loggers=[]", "trainer.max_steps=20", "trainer.validate_every_epochs=0", *MODEL]
    settings.append("checkpoint.resume=never")  # --folder may hold a run of other settings
    if shape == "notebook":
        data = home / "data"
        if not (data / "train_ratings.csv").is_file():
            write(NOTEBOOK, data)
        settings += [f"data.root={data}", "run.name=notebook"]
    command = [sys.executable, "-m", "deepfm_dist.train", "--quiet", "--config", "sample"]
    subprocess.run([*command, *settings], check=True, cwd=home)
    return home / "runs" / shape


def _cpu_s(pid: int) -> float:
    """Seconds that a process has computed: fields 14 and 15 of proc(5)'s ``stat``."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _measured(pid: int, port: int, rate: float, seconds: float) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while True:
        try:
            await _Connection.opened(port)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    connections = [await _Connection.opened(port) for _ in range(CONNECTIONS)]
    health = json.loads((await connections[0].get("/healthz"))[1])
    users = json.loads((await connections[0].get("/users?limit=1000"))[1])["ids"]
    paths = [f"/users/{user}/recommendations?k=10" for user in users]
    drawn = np.random.default_rng(1).integers(0, len(paths), 1 << 16)

    async def in_turn(connection: _Connection, number: int) -> int:
        done, end = 0, time.perf_counter() + 5
        while time.perf_counter() < end:
            await connection.asked(paths[drawn[(done * CONNECTIONS + number) % len(drawn)]])
            done += 1
        return done

    await asyncio.gather(*(c.asked(paths[n]) for n, c in enumerate(connections)))  # warm-up
    begun, computed = time.perf_counter(), _cpu_s(pid)
    done = sum(await asyncio.gather(*(in_turn(c, n) for n, c in enumerate(connections))))
    greatest = done / (time.perf_counter() - begun)
    cpu_ms = (_cpu_s(pid) - computed) / done * 1000

    free: asyncio.Queue[_Connection] = asyncio.Queue()
    for connection in connections:
        free.put_nowait(connection)
    took: list[float] = []

    async def one(path: str, due: float) -> None:
        connection = await free.get()
        await connection.asked(path)
        took.append(time.perf_counter() - due)
        free.put_nowait(connection)

    n, begun, waiting = int(rate * seconds), time.perf_counter(), []
    for number in range(n):
        due = begun + number / rate
        if (delay := due - time.perf_counter()) > 0:
            await asyncio.sleep(delay)
        # From when it was due, not sent: a sender that lags behind hides no waiting.
        waiting.append(asyncio.create_task(one(paths[drawn[number % len(drawn)]], due)))
    await asyncio.gather(*waiting)
    p50, p99 = np.percentile(np.array(took) * 1000, [50, 99])
    return {
        "shape_items": health["items"],
        "shape_users": health["users"],
        "requests_per_s": round(greatest),
        "cpu_ms": round(cpu_ms, 3),
        "rate": rate,
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
    }


class _Connection:
    """A kept-alive HTTP/1.1 connection; a client library would be the slower end of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def opened(cls, port: int) -> "_Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        status, length = int(head[9:12]), 0
        for line in head.split(b"\r\n"):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, await self._reader.readexactly(length)

    async def asked(self, path: str) -> None:
        """Asks for ten items and checks that they came."""
        status, body = await self.get(path)
        assert status == 200 and body.count(b'"rank"') == 10, (status, body[:200])


if __name__ == "__main__":
    sys.exit(main())
