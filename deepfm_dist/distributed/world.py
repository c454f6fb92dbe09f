"""The ranks of a run and their communication."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deepfm_dist.distributed import heartbeat
from deepfm_dist.errors import DeepFMError
from deepfm_dist.lock import Lock

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks that work together.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        local_world_size: processes on this machine.
        spare_threads: this rank's share of the machine's cores, minus its compute threads.
        device: where this rank computes.
        store: shared key-value store.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        watch: ends this process when it waits on its GPU for ranks that are gone; None: waiting
            for a lost rank raises an error.
        local_rank: this process among those of its machine, from 0.
    """

    rank: int
    world_size: int
    local_world_size: int
    spare_threads: int
    device: torch.device
    store: dist.Store
    timeout_s: float = 120
    watch: heartbeat.Watch | None = None
    local_rank: int = 0

    def waiting(self) -> AbstractContextManager[None]:
        """Context to enter while the host waits for the device, and so for all ranks."""
        return nullcontext() if self.watch is None else self.watch.waiting()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copies a tensor to the CPU, waiting for the device and so for all ranks."""
        with self.waiting():
            return tensor.cpu()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes single files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the ranks, in place. All ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def differentiable_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates equally shaped tensors by rank, ``[n, ...]`` -> ``[ranks * n, ...]``.

        Gradients flow back to the rows' ranks, summed over the ranks. All ranks.
        """
        if self.world_size == 1:
            return tensor
        if tensor.numel() == 0:
            return tensor.new_empty(self.world_size * len(tensor), *tensor.shape[1:])
        joined: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
        return joined

    def all_gather_tensor(self, tensor: Tensor) -> Tensor:
        """Concatenates equally shaped tensors by rank, on this rank's device. All ranks.

        ``[n, ...]`` -> ``[ranks * n, ...]``, without gradients.
        """
        tensor = tensor.to(self.device).contiguous()
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Sends each rank a range of rows, and concatenates the received ones by rank. All ranks.

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
        """Seeds this rank's random number generators.

        `torch.manual_seed` would format a stack trace for each missing type of device.
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
        """Runs ``work`` on rank 0 while the others wait; its failure ends all ranks.

        The others wait as long as rank 0 sends heartbeats; without one they give up after the
        timeout of the process group.

        Args:
            name: identifies the work; unique in this process group.
            work: function to call on rank 0.

        Returns:
            What ``work`` returned, on rank 0; None elsewhere.

        Raises:
            Exception: on rank 0, the exception raised by ``work``.
            SystemExit: on the other ranks, if rank 0 failed and reported it.
            DistStoreError: on the other ranks, if rank 0 is gone.
        """
        if self.is_first:
            return self._run_for_others(name, work)
        self._wait_for_work(name)
        return None

    def run_on_each_machine(self, name: str, work: Callable[[], object]) -> None:
        """Runs ``work`` on the first rank of every machine; see `run_on_rank0`. All ranks."""
        is_leader = self.all_gather_object(self.local_rank == 0)
        if self.local_rank == 0:
            self._run_for_others(f"{name} {self.rank}", work)
        for rank in range(self.world_size):
            if is_leader[rank] and rank != self.rank:
                self._wait_for_work(f"{name} {rank}")

    def _wait_for_work(self, name: str) -> None:
        outcome = heartbeat.wait_for(self.store, name, self.timeout_s)
        if outcome != b"done":
            if self.store.add(f"{name}_seen", 1) == self.world_size - 1:
                self.store.set(f"{name}_seen_by_all", "")
            raise SystemExit(int(outcome))

    def _run_for_others(self, name: str, work: Callable[[], T]) -> T:
        try:
            result = work()
        except BaseException as error:
            code = error.exit_code if isinstance(error, DeepFMError) else 1
            self.store.set(name, str(code))
            if isinstance(error, Exception) and self.world_size > 1:
                with suppress(dist.DistStoreError):  # rank 0 may hold the store and must exit last
                    self.store.wait([f"{name}_seen_by_all"], heartbeat.SHORT)
            raise
        self.store.set(name, "done")
        return result

    @contextmanager
    def hold_on_rank0(self, lock: Lock, wait_s: float = 0.0) -> Iterator[None]:
        """Rank 0 holds a lock while all ranks are inside; see `run_on_rank0`. All ranks.

        Args:
            lock: the lock.
            wait_s: seconds to wait for another holder.

        Raises:
            InUse: on rank 0, if another process holds it.
            SystemExit: on the other ranks in that case.
        """
        self.run_on_rank0(str(lock.path), lambda: lock.acquire(wait_s))
        try:
            yield
        finally:
            lock.release()


# torch.distributed.nn.functional gives the same values and gradients, but has deprecated this in
# favour of a private module.
class _Gather(torch.autograd.Function):
    """An all-gather whose gradient sums the gradients of all ranks' losses."""

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
