"""The process group: 1 to N ranks, on CPU or CUDA, started by torchrun or by hand."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepfm_dist.distributed.watch import Watch, rank_lost
from deepfm_dist.environment import gpu_problem
from deepfm_dist.errors import ConfigError, DeepFMError, EnvironmentProblem, RankLost
from deepfm_dist.launcher import Launch, read_launch
from deepfm_dist.lock import Lock
from deepfm_dist.messages import brief

log = logging.getLogger(__name__)

_SHORT = timedelta(seconds=5)
_BEATS = "beats"  # how often rank 0 has shown that it is there
_LOST = re.compile(r"gloo|NCCL|timed? ?out|connection|broken pipe", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks that work together.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        local_world_size: processes on this machine.
        spare_threads: this rank's share of the machine's cores, less those it computes with.
        device: where this rank computes.
        store: shared key-value store.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        watch: ends this process when it waits on its GPU for ranks that are gone; None: waiting
            for a lost rank raises an error.
    """

    rank: int
    world_size: int
    local_world_size: int
    spare_threads: int
    device: torch.device
    store: dist.Store
    timeout_s: float = 120
    watch: Watch | None = None

    def waiting(self) -> AbstractContextManager[None]:
        """To be entered while the host waits for the device, and with it for all ranks."""
        return nullcontext() if self.watch is None else self.watch.waiting()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes single files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place. All ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks; gradients are summed on the way back. All ranks."""
        summed: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
        return summed

    def differentiable_gather(self, tensor: Tensor) -> Tensor:
        """Joins the ranks' tensors of one shape by rank, ``[n, ...]`` -> ``[ranks * n, ...]``.

        Gradients go back to where the rows came from, summed over the ranks. All ranks.
        """
        if self.world_size == 1:
            return tensor
        if tensor.numel() == 0:
            return tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        joined: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
        return joined

    def all_gather_tensor(self, tensor: Tensor) -> Tensor:
        """Joins the ranks' tensors of one shape by rank, on this one's device. All ranks.

        ``[n, ...]`` -> ``[ranks * n, ...]``, without gradients.
        """
        tensor = tensor.to(self.device).contiguous()
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Sends each rank a stretch of rows, and joins by rank what was sent here. All ranks.

        Args:
            tensor: ``[ranks * n, ...]`` on the device.

        Returns:
            ``[ranks * n, ...]``.
        """
        if self.world_size == 1:
            return tensor
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor)
        return received

    def seed(self, seed: int) -> None:
        """Seeds the random numbers that this rank computes with.

        `torch.manual_seed` keeps a formatted stack trace for each kind of device that is not there.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def broadcast(self, value: T) -> T:
        """Rank 0's picklable value, on every rank. All ranks."""
        values = [value]
        if self.world_size > 1:
            with self.waiting():
                dist.broadcast_object_list(values, 0)
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Picklable values of all ranks, by rank, on every rank. All ranks."""
        values: list[Any] = [None] * self.world_size
        with self.waiting():
            dist.all_gather_object(values, value)
        return values

    def gather_object(self, value: Any) -> list[Any] | None:
        """Picklable values of all ranks, on rank 0; None elsewhere. All ranks."""
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        with self.waiting():
            dist.gather_object(value, values)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        with self.waiting():
            dist.barrier()

    def run_on_rank0(self, name: str, work: Callable[[], T]) -> T | None:
        """Rank 0 works while the others wait, however long; its failure ends all of them.

        They wait as long as rank 0's process is alive: one that was stopped or whose machine is
        lost is missed after the time-out of the process group.

        Args:
            name: of the work; unique in this process group.
            work: what rank 0 calls.

        Returns:
            What ``work`` returned, on rank 0; None elsewhere.

        Raises:
            Exception: on rank 0, whatever ``work`` raised.
            SystemExit: on the other ranks, when rank 0 failed and said why.
            DistStoreError: on the other ranks, when rank 0 is there no more.
        """
        if not self.is_first:
            outcome = self._outcome_of(name)
            if outcome != b"done":
                if self.store.add(f"{name}_heard", 1) == self.world_size - 1:
                    self.store.set(f"{name}_heard_by_all", "")
                raise SystemExit(int(outcome))
            return None
        try:
            result = work()
        except BaseException as error:
            code = error.exit_code if isinstance(error, DeepFMError) else 1
            self.store.set(name, str(code))
            if isinstance(error, Exception) and self.world_size > 1:
                with suppress(dist.DistStoreError):  # rank 0 may hold the store: not to leave first
                    self.store.wait([f"{name}_heard_by_all"], _SHORT)
            raise
        self.store.set(name, "done")
        return result

    @contextmanager
    def hold_on_rank0(self, lock: Lock, wait_s: float = 0.0) -> Iterator[None]:
        """Rank 0 holds a lock while all ranks are inside; see `run_on_rank0`. All ranks.

        Args:
            lock: what rank 0 acquires.
            wait_s: how long it waits for another holder.

        Raises:
            InUse: on rank 0, when another process holds it.
            SystemExit: on the other ranks, then.
        """
        self.run_on_rank0(str(lock.path), lambda: lock.acquire(wait_s))
        try:
            yield
        finally:
            lock.release()

    def _outcome_of(self, name: str) -> bytes:
        """What rank 0 says of its work in the end."""

        def heard() -> tuple[bytes, int]:
            done = self.store.check([name])
            return self.store.get(name) if done else b"", self.store.add(_BEATS, 0)

        beats, last_beat, pause_s = 0, time.monotonic(), 0.001
        while (left_s := last_beat + self.timeout_s - time.monotonic()) > 0:
            try:  # rank 0 may hold the store, and calls to it never return
                outcome, found = in_background(heard).result(left_s)
            except TimeoutError:
                break
            if outcome:
                return outcome
            if found != beats:
                beats, last_beat = found, time.monotonic()
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, self._beat_s, 0.05)  # what is done should not wait
        raise dist.DistStoreError(f"timed out: no sign of life from rank 0 in {name!r}")

    @contextmanager
    def heartbeat(self) -> Iterator[None]:
        """Rank 0 counts on in the store as long as its process runs."""
        over = Event()

        def beat() -> None:
            # Of its own: calls to a store wait for each other, and some wait long for other ranks.
            store: dist.Store = self.store.clone()  # type: ignore[attr-defined]
            while not over.wait(self._beat_s):
                store.add(_BEATS, 1)

        beating = in_background(beat) if self.is_first and self.world_size > 1 else None
        try:
            yield
        finally:
            over.set()
            if beating is not None:
                with suppress(TimeoutError, RuntimeError):
                    beating.result(_SHORT.total_seconds())

    @property
    def _beat_s(self) -> float:
        return min(1.0, self.timeout_s / 10)


class _Sum(torch.autograd.Function):
    """An all-reduce whose gradient is an all-reduce: each rank's input reaches each rank's loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed


class _Gather(torch.autograd.Function):
    """An all-gather whose gradient adds up what each rank's loss says of this rank's input."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.n = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        begin = dist.get_rank() * ctx.n
        return summed[begin : begin + ctx.n]


@contextmanager
def process_group(
    device: str = "auto", timeout_s: float = 120, threads: int = 1, deterministic: bool = False
) -> Iterator[World]:
    """Joins the process group that torchrun describes, or makes one of a single rank.

    Args:
        device: auto, cpu or cuda.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        threads: CPU threads of this process.
        deterministic: whether CUDA is to use only kernels that repeat themselves bit for bit.

    Raises:
        EnvironmentProblem: ``device=cuda`` without a usable GPU.
        ConfigError: more processes on a machine than it has GPUs, or restarts over several
            machines without the variable they need.
    """
    torch.set_num_threads(threads)
    # TorchRec's tracing makes torch say, once a process, which of two functions it should call.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    launch = read_launch()
    rank, size, local_size = launch.rank, launch.world_size, launch.local_world_size
    chosen = _device(device, launch.local_rank, local_size)
    deterministic &= chosen.type == "cuda"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it
    torch.use_deterministic_algorithms(deterministic)
    timeout = timedelta(seconds=timeout_s)
    excepthook = sys.excepthook  # torch's own, set below, puts the rank in front of every line
    try:
        store: dist.Store = dist.HashStore()
        if launch.master is not None:  # something else may listen there, and never answer
            join = partial(_store, launch, launch.master, timeout)
            store = in_background(join).result(timeout_s + _SHORT.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:
        if launch.master is None:
            raise
        raise _unreachable(launch, launch.master, error) from None
    spare = max(0, len(os.sched_getaffinity(0)) // local_size - threads)
    shared = dist.PrefixStore("deepfm_dist", store)
    watch = None
    if chosen.type == "cuda" and size > 1:
        of_its_own: dist.Store = shared.clone()  # type: ignore[attr-defined]
        watch = Watch(of_its_own, rank, size, timeout_s)
    world = World(rank, size, local_size, spare, chosen, shared, timeout_s, watch)
    failed = True
    try:
        with ExitStack() as stack:
            if watch is not None:
                stack.enter_context(watch)
            stack.enter_context(world.heartbeat())
            yield world
            with world.waiting():
                dist.barrier()  # rank 0 may hold the store that others still read
        failed = False
    except RuntimeError as error:
        if size > 1 and _LOST.search(str(error)):
            raise_if_ranks_missing(world, launch.local_rank, timeout_s, error)
        raise
    finally:
        _leave(abort=failed and watch is not None)
        if size == 1:  # a notebook or a script may go on after it
            sys.excepthook = excepthook


def _leave(abort: bool) -> None:
    """Leaves the process group.

    Args:
        abort: gives up what is under way. NCCL's communicators would otherwise be destroyed
            together with all ranks, after their collectives, which a failed rank never joins.
    """
    if not abort:
        dist.destroy_process_group()
        return
    with suppress(TimeoutError, RuntimeError):
        in_background(dist.distributed_c10d._abort_process_group).result(_SHORT.total_seconds())


def in_background(work: Callable[[], T], device: torch.device | None = None) -> Future[T]:
    """Calls something that may never return, without keeping the process from ending.

    Args:
        work: what the thread calls.
        device: where this rank computes, if ``work`` may touch it. A thread begins on GPU 0, and
            every rank of a machine would open a CUDA context there.
    """
    outcome = Future[T]()

    def call() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=call, daemon=True).start()
    return outcome


def raise_if_ranks_missing(
    world: World, local_rank: int, timeout_s: float, error: RuntimeError
) -> None:
    """After an exchange failed: who is still there?

    Raises:
        RankLost: when others do not answer, on the lowest rank that does; where the store is gone,
            on the lowest one of each machine.
        SystemExit: on the others that do.
    """
    # A store on a machine that was cut off keeps its callers waiting for good.
    patience_s = 2 * _SHORT.total_seconds() + 0.2 * world.world_size
    try:
        missing = in_background(lambda: _missing(world)).result(patience_s)
        speaks = min({*range(world.world_size)} - {*missing})
    except (TimeoutError, RuntimeError):
        # Rank 0 held the store. Who else is gone with it cannot be known, nor be said to others.
        missing, speaks = [0], max(1, world.rank - local_rank)
    if not missing:
        return
    if world.rank != speaks:
        raise SystemExit(RankLost.exit_code) from error
    raise rank_lost(missing, world.world_size, timeout_s) from error


def _missing(world: World) -> list[int]:
    """Ranks that do not say that they are there.

    Raises:
        RuntimeError: there is no store any more.
    """
    missing = []
    world.store.set(f"here_{world.rank}", "")
    deadline = time.monotonic() + _SHORT.total_seconds()
    for rank in range(world.world_size):
        left = max(deadline - time.monotonic(), 0.1)
        try:
            world.store.wait([f"here_{rank}"], timedelta(seconds=left))
        except dist.DistStoreError:
            missing.append(rank)
    return missing


def _device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus == 0:
        raise EnvironmentProblem(
            "run.device=cuda, but torch sees no GPU; run python -m deepfm_dist.doctor, or set "
            "run.device=cpu"
        )
    if wanted == "cpu" or gpus == 0 or (wanted == "auto" and not _fbgemm_has_cuda()):
        return torch.device("cpu")
    if local_size > gpus:
        raise ConfigError(
            f"{local_size} processes on a machine with {gpus} GPU{'s' * (gpus > 1)}: start "
            f"torchrun --nproc_per_node={gpus}, or set run.device=cpu"
        )
    gpu = torch.cuda.get_device_properties(local_rank)
    problem = gpu_problem(gpu.name, (gpu.major, gpu.minor))
    if problem is not None and wanted == "cuda":
        raise EnvironmentProblem(str(problem))
    if problem is not None:
        log.warning("the GPU stays unused: %s", problem.what)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _fbgemm_has_cuda() -> bool:
    import fbgemm_gpu

    return getattr(fbgemm_gpu, "__variant__", "cpu") == "cuda"


def _unreachable(launch: Launch, master: tuple[str, int], error: Exception) -> DeepFMError:
    """What to say of a rank that cannot join the others."""
    reason = brief(error) if str(error).strip() else "no answer"
    if launch.by_torchrun:
        return RankLost(
            f"rank {launch.rank} of {launch.world_size} cannot reach the others: {reason}; if this "
            f"happens at every start, a machine's name leads to an address that others do not "
            f"reach: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to its network interface"
        )
    host, port = master
    return EnvironmentProblem(
        f"RANK={launch.rank} WORLD_SIZE={launch.world_size} MASTER_ADDR={host} MASTER_PORT={port}: "
        f"the ranks cannot reach each other: {reason}; start all of them, on a free port of an "
        f"address that all can reach (torchrun --nproc_per_node={launch.world_size} does), or for "
        f"a single process run unset RANK WORLD_SIZE"
    )


def _wait_for(master: tuple[str, int], is_served_here: bool, timeout_s: float) -> None:
    """Waits until a store's address can be reached: ranks may start before it, or its name.

    torch would print a stack of its own.

    Raises:
        OSError: the last reason why not.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if is_served_here:
                socket.getaddrinfo(*master)
            else:
                socket.create_connection(master, timeout_s).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _store(launch: Launch, master: tuple[str, int], timeout: timedelta) -> dist.Store:
    """The store that torchrun's variables point at.

    torchrun's agent keeps one store over all restarts, and nothing tells the attempts apart: a
    restarted gloo group would find the dead ranks' addresses. One agent's restart count tells
    them apart. Several agents count differently: a failure counts where it happened, a machine that
    comes or goes counts nowhere. With the variable each rendezvous, however it came about, has a
    store of its own, which rank 0 holds; only torchrun's c10d rendezvous knows the variable.
    """
    if launch.agents > 1 and launch.max_restarts > 0 and launch.agent_holds_store:
        raise ConfigError(
            "torchrun over several machines with --max-restarts needs --rdzv-backend=c10d and "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; set both on every machine, "
            "as launch/run_train.sh does"
        )
    is_served_here = not launch.agent_holds_store and launch.rank == 0
    _wait_for(master, is_served_here, timeout.total_seconds())
    store: dist.Store = dist.TCPStore(
        *master, launch.world_size, is_master=is_served_here, timeout=timeout
    )
    if launch.agents > 1:
        return store
    return dist.PrefixStore(f"attempt_{launch.restarts}", store)
