"""Several ranks in one test: forked from the process that has already imported everything.

A process that has used CUDA cannot fork others that do; ranks on GPUs are spawned.
"""

import ctypes
import faulthandler
import gc
import itertools
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def variables(rank: int = 0, world_size: int = 1, port: int = 29500) -> dict[str, str]:
    """What a launcher sets for a rank of one machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message is its traceback."""


def run_ranks(
    work: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    spawn: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Calls ``work(*args, **kwargs)`` on every rank as torchrun would, and returns what each gave.

    ``work`` joins the group itself, by `process_group`. The parent must never have joined one:
    gloo's threads and locks do not survive a fork. A single rank is forked too. With ``spawn`` each
    rank is a new interpreter, which takes seconds; ``work`` and its arguments are pickled.
    """
    port = next(port for port in _ports if not _answers(port))
    folder = Path(tempfile.mkdtemp())
    children = []
    for rank in range(world_size):
        job = rank, world_size, port, folder, work, args, kwargs
        children.append(_spawn(*job) if spawn else _fork(*job))
    _wait(children, time.monotonic() + timeout_s)
    results = []
    failures = []
    for rank in range(world_size):
        path = folder / f"{rank}.pickle"
        ok, value = (
            pickle.loads(path.read_bytes()) if path.exists() else (False, "died or was killed")
        )
        results.append(value)
        if not ok:
            failures.append(f"rank {rank} of {world_size}: {value}")
    if failures:
        raise RankFailed("\n".join(failures))
    return results


# Below the ports that Linux gives to outgoing connections: one of those could take a port that was
# free a moment ago. Each process that runs tests has a hundred of its own.
_ports = itertools.cycle(range(10_000 + os.getpid() % 200 * 100, 10_100 + os.getpid() % 200 * 100))


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def run_alone(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run_ranks` with a world of one."""
    return run_ranks(work, 1, *args, **kwargs)[0]


def run_in_fork(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``work`` in a process that no launcher started: it may join one group after another."""
    return run_alone(_without_launcher, work, *args, **kwargs)


def _without_launcher(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for name in variables():
        del os.environ[name]
    return work(*args, **kwargs)


def heed_permissions() -> None:
    """Makes this process heed the permissions of files, as root does not otherwise.

    The thread that calls it loses CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, and so do those that it
    starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110
    assert libc.capset(header, sets) == 0


def _fork(*job: Any) -> int:
    child = os.fork()
    if child == 0:
        # Garbage of the parent may wait for threads that no child has when it is collected.
        gc.freeze()
        _be_rank(*job)
    return child


def _spawn(rank: int, world_size: int, port: int, folder: Path, *work: Any) -> int:
    path = folder / f"{rank}.job"
    path.write_bytes(pickle.dumps((rank, world_size, port, folder, *work)))
    arguments = [sys.executable, "-m", "tests.ranks", str(path)]
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.spawnve(os.P_NOWAIT, sys.executable, arguments, {**os.environ, "PYTHONPATH": paths})


def _be_rank(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    work: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    code = 1
    faulthandler.register(signal.SIGUSR1, file=2)
    try:
        os.environ.update(variables(rank, world_size, port))
        torch.set_num_threads(1)
        outcome = (True, work(*args, **kwargs))
        code = 0
    except BaseException:
        outcome = (False, traceback.format_exc())
    part = folder / f"{rank}.part"
    part.write_bytes(pickle.dumps(outcome))
    part.rename(folder / f"{rank}.pickle")
    os._exit(code)


def _wait(children: list[int], deadline: float) -> None:
    """Waits for all; kills those left some seconds after a failure, or at the deadline."""
    left = set(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.discard(child)
                if status != 0:
                    deadline = min(deadline, time.monotonic() + 5)
        if left and time.monotonic() > deadline:
            for child in left:
                os.kill(child, signal.SIGUSR1)  # it shows where it hangs
            time.sleep(0.2)
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return
        time.sleep(0.01)


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  (sets the environment up as for pytest's own process)

    _be_rank(*pickle.loads(Path(sys.argv[1]).read_bytes()))
