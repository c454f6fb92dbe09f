"""Python commands that start in milliseconds: forked from a process that has imported everything.

`start` gives a folder with a `python` and a `torchrun`. Both hand their arguments, environment,
folder and standard streams to the server, which forks; they pass signals on and end as the fork
does. What the server has not imported, or has imported differently, is run by the real interpreter.
A fork differs from a new interpreter in its parent and in how long its imports take.
"""

import array
import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import socket
import struct
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "benchmarks"
CLIENT = """\
#!{interpreter} -SEs
import array, json, os, signal, socket, struct, sys

arguments = {first} + sys.argv[1:]
given = arguments[1:] if arguments[:1] == ["-u"] else arguments
module = given[1] if given[:1] == ["-m"] else ""
script = os.path.realpath(given[0]) if given[:1] and given[0].endswith(".py") else ""
known = module.split(".")[0] == "deepfm_dist" or module == "torch.distributed.run"
known = known or script.startswith("{scripts}/")
if not known or os.environ.get("TRITON_INTERPRET") != {interpreted!r}:
    os.execv("{interpreter}", ["{interpreter}"] + arguments)
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
job = json.dumps([given, os.getcwd(), dict(os.environ), os.getppid(), __file__]).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg(
    [struct.pack("I", len(job))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
)
server.sendall(job)
fork = struct.unpack("i", server.recv(4))[0]
def pass_on(number, frame):
    try:
        os.kill(fork, number)
    except ProcessLookupError:
        pass

for name in ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), pass_on)
answer = server.recv(4)
status = struct.unpack("i", answer)[0] if answer else 1
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.waitstatus_to_exitcode(status))
"""


@contextmanager
def start(folder: Path) -> Iterator[dict[str, str]]:
    """Starts a server and ends it; gives the variables that let commands find it."""
    address = folder / "server"
    for name, first in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
        client = folder / "bin" / name
        client.parent.mkdir(exist_ok=True)
        client.write_text(
            CLIENT.format(
                interpreter=sys.executable,
                first=first,
                scripts=SCRIPTS,
                interpreted=os.environ.get("TRITON_INTERPRET"),
                address=address,
            )
        )
        client.chmod(0o755)
    command = [sys.executable, "-m", "tests.fork_server", str(address)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield {
            "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHON_EXEC": str(folder / "bin/python"),  # of the ranks that torchrun starts
        }
        server.kill()


def _import_all() -> None:
    package = importlib.import_module("deepfm_dist")
    for module in pkgutil.walk_packages(package.__path__, "deepfm_dist."):
        importlib.import_module(module.name)
    importlib.import_module("torch.distributed.run")


def _serve(address: str) -> tuple[Any, ...]:
    """Forks for every client; returns in the fork, with what the client wants done."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in ready.select():
            if key.data is None:
                client = listener.accept()[0]
                job, streams = _receive(client)
                fork = os.fork()
                if fork == 0:
                    for held in [*ready.get_map()]:
                        os.close(held)
                    ready.close()
                    client.close()
                    for stream, fd in enumerate(streams):
                        os.dup2(fd, stream)
                        os.close(fd)
                    return job
                for fd in streams:
                    os.close(fd)
                client.sendall(struct.pack("i", fork))
                ended = os.pidfd_open(fork)
                ready.register(ended, selectors.EVENT_READ, (fork, client, ended))
                ready.register(client, selectors.EVENT_READ, (fork, client, ended))
                continue
            if key.fd not in ready.get_map():  # its command ended a moment ago
                continue
            fork, client, ended = key.data
            if key.fd != ended:  # the client was killed
                os.kill(fork, 9)
                ready.unregister(client)
                continue
            status = os.waitpid(fork, 0)[1]
            ready.unregister(ended)
            os.close(ended)
            if client.fileno() in ready.get_map():
                ready.unregister(client)
                client.sendall(struct.pack("i", status))
            client.close()


def _receive(client: socket.socket) -> tuple[tuple[Any, ...], "array.array[int]"]:
    streams = array.array("i")
    size, rights, _, _ = client.recvmsg(4, socket.CMSG_LEN(3 * streams.itemsize))
    streams.frombytes(rights[0][2])
    left, parts = struct.unpack("I", size)[0], []
    while left:
        parts.append(client.recv(left))
        left -= len(parts[-1])
    return tuple(json.loads(b"".join(parts))), streams


def _run(arguments: list[str], cwd: str, environment: Any, parent: int, interpreter: str) -> int:
    """Does what the interpreter would; returns its exit code."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.getppid = lambda: parent
    sys.executable = interpreter
    module = arguments[1] if arguments[0] == "-m" else None
    sys.argv = arguments if module is None else arguments[1:]
    sys.path.insert(0, cwd if module else str(Path(arguments[0]).resolve().parent))
    try:
        if module is None:
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)
    _import_all()
    gc.freeze()
    code = _run(*_serve(sys.argv[1]))
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without taking down, object by object, all that is imported
