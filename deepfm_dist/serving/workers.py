"""The service's processes: for each model, a generation of workers that share its memory.

    the command          listens, and starts a generation for each model that is to be served
      a generation       loads the model, starts its workers and replaces those that die
        a worker         answers requests

Workers are forked from the process that has loaded the model: its tables, indices and compiled
kernels are in memory once. uvicorn's supervisor spawns workers, each of which would load the model
again.

All workers accept connections from one socket. With SO_REUSEPORT each would have its own queue,
whose connections would be reset when a worker exits.

When a process ends in any way, its children notice the end of a pipe, the lifeline: they finish the
requests on their connections, and exit.
"""

import asyncio
import ctypes
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import FrameType
from typing import Self

import torch
import uvicorn

from deepfm_dist.errors import DeepFMError, EnvironmentProblem
from deepfm_dist.serving.app import make_app
from deepfm_dist.serving.connections import (
    BACKLOG,
    REQUEST_S,
    ImpatientProtocol,
    max_connections,
)
from deepfm_dist.serving.live import Recommender
from deepfm_dist.serving.replacement import ModelInUse
from deepfm_dist.serving.telemetry import share_figures

DRAIN_S = REQUEST_S + 5
"""Seconds within which a retiring worker has to finish its requests."""
LEAVE_S = 2.0
"""Seconds by which connections to the worker without a model may delay the first model's."""
RESTART_S = 1.0
"""Minimum seconds between the start of a worker and its replacement."""
PR_SET_PDEATHSIG = 1  # of prctl(2)
SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop a process of the service."""
FORK = multiprocessing.get_context("fork")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerOptions:
    """Options shared by all workers of a service.

    Attributes:
        listening: the socket.
        hosts: see `make_app`.
        folder: the folder of the service, where its processes keep metrics and status.
        n_workers: per generation.
        threads: per worker.
        logs_requests: whether each request is logged.
    """

    listening: socket.socket
    hosts: Sequence[str]
    folder: Path
    n_workers: int = 1
    threads: int = 1
    logs_requests: bool = False


class Generation:
    """A process that loads a model, and its workers.

    Args:
        number: distinguishes concurrent generations.
        load: loads the model; may return None, for workers that answer without one.
        n_workers: number of workers.
        options: the options of all workers.
    """

    _lifelines: set[int] = set()  # noqa: RUF012  # children must not hold them open

    def __init__(
        self,
        number: int,
        load: Callable[[], Recommender | None],
        n_workers: int,
        options: WorkerOptions,
    ) -> None:
        self.number, self._load = number, load
        self._n_workers, self._options = n_workers, options
        self._pipe, pipe = FORK.Pipe()
        lifeline, held = os.pipe()
        self._lifeline: int | None = held
        self._lifelines.add(held)
        self.process = FORK.Process(target=self._main, args=(pipe, lifeline))
        gc.freeze()  # garbage collection writes to every object, which would copy shared pages
        self.process.start()
        pipe.close()
        os.close(lifeline)

    def wait_until_loaded(self) -> None:
        """Waits until the model is loaded; no worker is started yet.

        Raises:
            Exception: loading the model failed.
        """
        self._receive()

    def start_workers(self) -> None:
        """Starts the workers, and waits until all of them answer.

        Raises:
            EnvironmentProblem: a worker ended at its start.
        """
        with suppress(BrokenPipeError):  # its exit is reported below
            self._pipe.send(None)
        self._receive()

    def _receive(self) -> None:
        try:
            error = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise EnvironmentProblem(
                f"the process that was loading the model ended with exit code {code}"
                f"{'; the machine may be out of memory' if code == -signal.SIGKILL else ''}"
            ) from None
        if error is not None:
            raise error

    def retire(self) -> None:
        """Stops the generation once its connections are closed."""
        if self._lifeline is not None:
            self._lifelines.remove(self._lifeline)
            os.close(self._lifeline)
            self._lifeline = None

    # In the generation's own process:

    def _main(self, pipe: connection.Connection, lifeline: int) -> None:
        self._pipe.close()  # the command's end, which would hide that the command has ended
        self._pipe = pipe
        for other in self._lifelines:
            os.close(other)
        self._lifelines.clear()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches every process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _signal_at_end_of_parent(signal.SIGTERM)  # loading does not check the lifeline
        command = multiprocessing.parent_process()
        if command is None or not command.is_alive():
            return
        try:
            recommender = self._load()
        except Exception as error:
            pipe.send(_portable(error))
            return
        _signal_at_end_of_parent(0)
        signal.signal(signal.SIGTERM, _exit)
        gc.collect()
        gc.freeze()
        try:
            try:
                pipe.send(None)
                pipe.recv()
            except (EOFError, ConnectionError):  # the command has ended meanwhile
                return
            self._keep_workers(recommender, lifeline)
        finally:
            self._options.listening.close()
            for worker in multiprocessing.active_children():
                worker.terminate()
            for worker in multiprocessing.active_children():
                worker.join(DRAIN_S + REQUEST_S)

    def _keep_workers(self, recommender: Recommender | None, lifeline: int) -> None:
        ready, begins = os.pipe()
        workers: dict[int, ForkProcess] = {}
        n_ready, started = 0, 0.0
        while True:
            for index in set(range(self._n_workers)) - set(workers):
                time.sleep(max(0.0, started - time.monotonic()))
                started = time.monotonic() + (RESTART_S if self._pipe.closed else 0)
                workers[index] = FORK.Process(
                    target=self._work, args=(recommender, index, lifeline, begins, ready)
                )
                with _signals_blocked():
                    workers[index].start()
            over = connection.wait([lifeline, ready, *(w.sentinel for w in workers.values())])
            if lifeline in over:
                self._options.listening.close()
                for worker in workers.values():
                    worker.join()
                return
            if ready in over:
                n_ready += len(os.read(ready, self._n_workers))
                if n_ready >= self._n_workers and not self._pipe.closed:
                    self._pipe.send(None)
                    self._pipe.close()
            for index, worker in [*workers.items()]:
                if worker.sentinel not in over:
                    continue
                worker.join()
                if not self._pipe.closed:
                    text = f"a worker ended with exit code {worker.exitcode} at its start"
                    self._pipe.send(EnvironmentProblem(text))
                    return
                log.warning(
                    "worker %d (process %s) ended with exit code %s; another takes its place",
                    index,
                    worker.pid,
                    worker.exitcode,
                )
                del workers[index]

    def _work(
        self, recommender: Recommender | None, index: int, lifeline: int, begins: int, ready: int
    ) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(ready)
        self._pipe.close()
        torch.set_num_threads(self._options.threads)
        share_figures(self._options.folder, f"{self.number}-{index}")
        model = ModelInUse(recommender, self._options.folder)
        ImpatientProtocol.limit = max_connections()
        settings = uvicorn.Config(
            make_app(model, self._options.hosts, self._options.logs_requests),
            http=ImpatientProtocol,
            ws="none",
            backlog=BACKLOG,
            log_config=None,
            log_level="error",  # client errors are not logged
            access_log=False,
            timeout_graceful_shutdown=int(DRAIN_S),
        )
        _Worker(settings, model, lifeline, begins).run([self._options.listening])


class _Worker(uvicorn.Server):
    """uvicorn's server with a graceful exit that does not close connections in use.

    Args:
        config: uvicorn's settings.
        model: marked as retiring, so that responses ask clients to close connections.
        lifeline: file that ends when the worker should retire.
        begins: file that receives a byte when the worker is ready.
    """

    def __init__(
        self, config: uvicorn.Config, model: ModelInUse, lifeline: int, begins: int
    ) -> None:
        super().__init__(config)
        self._model, self._lifeline, self._begins = model, lifeline, begins

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Exits after current requests; ctrl-C is left to the command."""
        if sig == signal.SIGINT:
            return
        if not self.started:
            super().handle_exit(sig, frame)
            return
        asyncio.get_running_loop().call_soon_threadsafe(self._leave, 0.0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts answering."""
        await super().startup(sockets)
        self._leaving: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(self._lifeline, self._retire)
        with suppress(BrokenPipeError):  # the parent process has died
            os.write(self._begins, b"1")
        os.close(self._begins)

    def _retire(self) -> None:
        asyncio.get_running_loop().remove_reader(self._lifeline)
        self._leave(DRAIN_S)

    def _leave(self, drain_s: float) -> None:
        """Stops accepting connections, and exits once all are closed or after some seconds."""
        for server in self.servers:
            server.close()
        self._model.is_retiring = True
        self._leaving = asyncio.create_task(self._exit_after_connections(drain_s))

    async def _exit_after_connections(self, drain_s: float) -> None:
        deadline = time.monotonic() + drain_s
        await asyncio.sleep(0.1)  # requests on recently accepted connections may not be read yet
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True


class Generations:
    """The generations of a service: the one in use, and earlier ones that are retiring.

    Args:
        options: the options of all workers.
    """

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._living: list[Generation] = []  # the last one is in use
        self._first: Generation | None = None  # answers while there is no model

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops all processes after their current requests."""
        self._options.listening.close()  # connections are refused once no process holds it
        for generation in self._living:
            generation.process.terminate()
        deadline = time.monotonic() + DRAIN_S + 2 * REQUEST_S
        for generation in self._living:
            generation.process.join(max(0.0, deadline - time.monotonic()))
            generation.process.kill()
            generation.retire()

    @property
    def is_alive(self) -> bool:
        """Whether the process of the model in use is alive; its workers answer without it."""
        return self._living[-1].process.is_alive()

    def start_without_model(self) -> None:
        """Starts a worker that answers while the first model is loading."""
        self._first = self._start(lambda: None, n_workers=1)
        self._living.append(self._first)

    def replace(self, load: Callable[[], Recommender]) -> None:
        """Loads a model; earlier workers answer until its workers are ready.

        The worker without a model exits before the first model's workers start: once the service
        reported ready, answers come from a model. Connections wait in the meantime.

        Raises:
            Exception: loading the model failed; nothing is replaced.
        """
        self._reap()
        generation = self._start(load, self._options.n_workers)
        for earlier in self._living:
            earlier.retire()
        self._living.append(generation)

    def _start(self, load: Callable[[], Recommender | None], n_workers: int) -> Generation:
        number = next(n for n in range(1000) if n not in {g.number for g in self._living})
        generation = None
        try:
            with _signals_blocked():
                generation = Generation(number, load, n_workers, self._options)
            generation.wait_until_loaded()
            if self._first is not None:
                self._first.retire()
                self._first.process.join(LEAVE_S)
                self._first = None
            generation.start_workers()
        except BaseException:
            if generation is not None:
                generation.process.terminate()
                generation.process.join()
                generation.retire()
            raise
        return generation

    def wait(self, timeout_s: float) -> None:
        """Waits until a process ends, or for the time-out."""
        connection.wait(
            [g.process.sentinel for g in self._living if g.process.is_alive()], timeout_s
        )
        self._reap()

    def _reap(self) -> None:
        """Drops generations that have ended.

        The number of a killed one is not reused, since its workers may still be alive.
        """
        last = self._living[-1:]
        self._living = [g for g in self._living if g in last or g.process.exitcode != 0]


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals around a fork, until the child unblocks them.

    Otherwise one that arrives during Python's callbacks after a fork is lost: its handler raises
    `SystemExit` there, which Python prints and ignores.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_at_end_of_parent(number: int) -> None:
    """Makes the kernel send this process a signal when its parent ends; 0: none."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _exit(signum: int, frame: FrameType | None) -> None:
    sys.exit(0)


def _portable(error: Exception) -> Exception:
    """A picklable form of an error; bugs carry their traceback as a note."""
    if not isinstance(error, DeepFMError):
        error.add_note("".join(traceback.format_exception(error)))
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError("".join(traceback.format_exception(error)))
