"""The process group: 1 to N ranks, on CPU or CUDA, started by torchrun or by hand."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepfm_dist.errors import ConfigError, DeepFMError, EnvironmentProblem

_LONG, _SHORT = timedelta(days=7), timedelta(seconds=5)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks that work together.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        local_world_size: processes on this machine.
        device: where this rank computes.
        store: shared key-value store.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: dist.Store

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes single files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place. All ranks."""
        dist.all_reduce(tensor)
        return tensor

    def differentiable_sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks; gradients are summed on the way back. All ranks."""
        summed: Tensor = _Sum.apply(tensor)  # type: ignore[no-untyped-call]
        return summed

    def gather(self, value: Any) -> list[Any] | None:
        """Picklable values of all ranks, on rank 0; None elsewhere. All ranks."""
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Picklable values of all ranks, on every rank. All ranks."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def first_does(self, name: str, work: Callable[[], T]) -> T | None:
        """Rank 0 works while the others wait, however long; its failure ends all of them.

        Args:
            name: of the work; unique in this process group.
            work: what rank 0 calls.

        Returns:
            What ``work`` returned, on rank 0; None elsewhere.

        Raises:
            Exception: on rank 0, whatever ``work`` raised.
            SystemExit: on the other ranks, when rank 0 failed and said why.
        """
        if not self.is_first:
            self.store.wait([name], _LONG)
            outcome = self.store.get(name)
            if outcome != b"done":
                if self.store.add(f"{name}_heard", 1) == self.world_size - 1:
                    self.store.set(f"{name}_heard_by_all", "")
                raise SystemExit(int(outcome))
            return None
        try:
            result = work()
        except BaseException as error:
            self.store.set(name, "2" if isinstance(error, DeepFMError) else "1")
            if isinstance(error, Exception) and self.world_size > 1:
                with suppress(dist.DistStoreError):  # rank 0 may hold the store: not to leave first
                    self.store.wait([f"{name}_heard_by_all"], _SHORT)
            raise
        self.store.set(name, "done")
        return result


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


@contextmanager
def world(device: str = "auto", timeout_s: float = 120, threads: int = 1) -> Iterator[World]:
    """Joins the process group that torchrun describes, or makes one of a single rank.

    Args:
        device: auto, cpu or cuda.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        threads: CPU threads of this process.

    Raises:
        EnvironmentProblem: ``device=cuda`` without a usable GPU.
        ConfigError: more processes on a machine than it has GPUs, or restarts over several
            machines without the variable they need.
    """
    torch.set_num_threads(threads)
    # TorchRec's tracing makes torch say, once a process, which of two functions it should call.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    env = os.environ
    launched = "RANK" in env and "WORLD_SIZE" in env
    rank, size = (int(env["RANK"]), int(env["WORLD_SIZE"])) if launched else (0, 1)
    local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    chosen = _device(device, local_rank, local_size)
    timeout = timedelta(seconds=timeout_s)
    store = _store(timeout) if launched else dist.HashStore()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=chosen if chosen.type == "cuda" else None,
    )
    try:
        yield World(rank, size, local_size, chosen, dist.PrefixStore("deepfm_dist", store))
        dist.barrier()  # rank 0 may hold the store that others still read
    finally:
        dist.destroy_process_group()


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
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _fbgemm_has_cuda() -> bool:
    import fbgemm_gpu

    return getattr(fbgemm_gpu, "__variant__", "cpu") == "cuda"


def _store(timeout: timedelta) -> dist.Store:
    """The store that torchrun's variables point at.

    torchrun's agent keeps one store over all restarts, and nothing tells the attempts apart: a
    restarted gloo group would find the dead ranks' addresses. One agent's restart count tells
    them apart; several agents count differently and need the variable that gives each attempt
    a store of its own.
    """
    env = os.environ
    shared_by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(env.get("TORCHELASTIC_MAX_RESTARTS", 0))
    own_store = env.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    if int(env.get("GROUP_WORLD_SIZE", 1)) > 1 and restarts > 0 and not own_store:
        raise ConfigError(
            "torchrun over several machines with --max-restarts needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; export it on every machine"
        )
    store: dist.Store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        int(env["WORLD_SIZE"]),
        is_master=not shared_by_agent and env["RANK"] == "0",
        timeout=timeout,
    )
    return dist.PrefixStore(f"attempt_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
