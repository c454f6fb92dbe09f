"""A search by several processes on this machine, each training one trial at a time."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.jobs.prepare import prepare
from deepfm_dist.jobs.tune import SearchResult, check_search, search_folder, search_result
from deepfm_dist.launcher import read_launch
from deepfm_dist.storage import write_errors_to_user

log = logging.getLogger(__name__)

MAX_STARTS = 10
"""Maximum number of starts of a worker, including the first."""
_POLL_S = 0.2


def tune_by_workers(
    config: Config, arguments: Sequence[str], n_workers: int, n_ranks: int
) -> SearchResult | None:
    """Runs ``tune`` in several processes until all trials are complete.

    Args:
        config: the settings.
        arguments: the arguments of each worker's command line.
        n_workers: number of workers on this machine.
        n_ranks: number of processes per trial; torchrun starts them if there are several.

    Returns:
        The search; None if a signal stopped it: rerun the same command to resume.

    Raises:
        ConfigError: there is nothing to search, there are fewer GPUs than ranks, or torchrun
            started this process.
        DeepFMError: a worker failed, or was killed repeatedly.
    """
    if read_launch().by_torchrun:
        raise ConfigError(
            "tune --workers starts processes itself; run it without torchrun, and set --ranks to "
            "the number of processes for a trial"
        )
    check_search(config)
    environments = _environments(config, n_workers, n_ranks)
    prepare(config)  # once, before the workers start
    with write_errors_to_user(search_folder(config)):
        search_folder(config).mkdir(parents=True, exist_ok=True)
    command = [*_launcher(n_ranks), "deepfm_dist.tune", *arguments, "--wait"]
    prefix = f"worker-{socket.gethostname()}"
    workers = [
        Worker(n, command, environment, search_folder(config) / f"{prefix}-{n}.log")
        for n, environment in enumerate(environments)
    ]
    return search_result(config) if supervise(workers) else None


@dataclass
class Worker:
    """A process that is restarted if it is killed.

    Attributes:
        number: the number of the worker, from 0.
        command: what to start.
        environment: variables of the process.
        output: file for its output.
        process: the latest one; None before the first start.
        starts: number of starts.
    """

    number: int
    command: Sequence[str]
    environment: Mapping[str, str]
    output: Path
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    def start(self) -> None:
        """Starts the process."""
        with write_errors_to_user(self.output), self.output.open("ab") as file:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.starts += 1

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def send(self, number: int) -> None:
        """Sends the process a signal if it is running."""
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)


def supervise(workers: Sequence[Worker]) -> bool:
    """Runs workers to their end and restarts those that are killed.

    Signals to this process are forwarded to the workers, which save their trials.

    Returns:
        Whether all are done; False if a signal stopped them.

    Raises:
        DeepFMError: a worker failed or was killed `MAX_STARTS` times; the others are stopped.
    """
    with _passed_on(workers) as received:
        for worker in workers:
            worker.start()
            assert worker.process is not None
            log.info("worker %d: process %d, %s", worker.number, worker.process.pid, worker.output)
        running, problem = [*workers], None
        while running:
            time.sleep(_POLL_S)
            for worker in [*running]:
                code = worker.poll()
                if code is None:
                    continue
                running.remove(worker)
                if code == 0 or received or problem is not None:
                    continue
                killer = _signal_of(code)
                if killer is not None and worker.starts < MAX_STARTS:
                    log.warning(
                        "worker %d: killed by %s; starting it again: its trial continues from its "
                        "last checkpoint",
                        worker.number,
                        killer,
                    )
                    worker.start()
                    running.append(worker)
                    continue
                problem = _problem(worker, code)
                for other in running:
                    other.send(signal.SIGTERM)
    if problem is not None:
        raise problem
    return not received


def _problem(worker: Worker, code: int) -> DeepFMError:
    if (killer := _signal_of(code)) is not None:
        memory = ", as the kernel does when memory runs out" * (killer == _signal_of(-9))
        return DeepFMError(
            f"worker {worker.number}: killed by {killer} {worker.starts} times{memory}; its output "
            f"is in {worker.output}. Its trial is not lost: the same command continues it from its "
            f"last checkpoint"
        )
    lines = worker.output.read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if "Error: " in line), f"exit code {code}")
    return DeepFMError(f"worker {worker.number}: {last}; its output is in {worker.output}")


def _signal_of(code: int) -> str | None:
    """The signal of an exit code, such as "signal 9 (SIGKILL)"; None for other codes.

    Shells report a signal of a child as 128 plus its number.
    """
    number = -code if code < 0 else code - 128
    if number not in signal.valid_signals():
        return None
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"signal {number}{name}"


@contextmanager
def _passed_on(workers: Sequence[Worker]) -> Iterator[list[int]]:
    """Forwards signals to workers; yields the list of received ones."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for worker in workers:
            worker.send(signal.SIGTERM)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launcher(n_ranks: int) -> list[str]:
    if n_ranks == 1:
        return [sys.executable, "-m"]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--standalone", f"--nproc_per_node={n_ranks}", "-m"]


def _environments(config: Config, n_workers: int, n_ranks: int) -> list[dict[str, str]]:
    """Environment of each worker, with its own GPUs, if any.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    gpus = _gpus() if config.run.device != "cpu" else []
    needed = n_workers * n_ranks
    if gpus and needed > len(gpus):
        raise ConfigError(
            f"--workers {n_workers} --ranks {n_ranks}: {needed} processes need a GPU each, and "
            f"this machine has {len(gpus)}; lower one of them, or set run.device=cpu"
        )
    shares = [gpus[n * n_ranks : (n + 1) * n_ranks] for n in range(n_workers)]
    return [
        {**os.environ, **({"CUDA_VISIBLE_DEVICES": ",".join(share)} if share else {})}
        for share in shares
    ]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()  # by NVML: starts no context
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else map(str, range(count))
    return [*names][:count]
