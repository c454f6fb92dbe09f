"""One optimizer step: TorchRec's train pipeline, or a plain loop, with a check of the loss."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import LazyAwaitable
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.distributed.optimizers import (
    bound_gradients,
    can_skip_on_device,
    parameters_of,
    skip_updates_if,
    torch_optimizers,
)
from deepfm_dist.distributed.settings import OptimizerConfig
from deepfm_dist.distributed.sharding import (
    TableCollection,
    average_copies,
    fused_kernels,
    unlock_cached_rows,
)
from deepfm_dist.distributed.world import World
from deepfm_dist.model.dropout import row_dropouts

PHASES = ("data", "embeddings", "forward", "backward", "optimizer")


class _NoOptimizer:
    """Disables the update in TorchRec's pipeline, so that gradients can be clipped before it."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


class Step:
    """The outcome of one optimizer step.

    On CUDA the host continues before the device has computed it: the first access to ``loss``,
    ``stop`` or ``is_finite`` waits until it has.

    Attributes:
        sparse: table rows of this rank's last micro-batch.
        rows: (logits, labels, weights), ``[b]`` each, of this rank's rows by micro-batch; empty for
            losses over users.
    """

    def __init__(self, world: World) -> None:
        self.sparse: KeyedJaggedTensor | None = None
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._world = world
        self._totals: Tensor | None = None
        self._is_copied: torch.cuda.Event | None = None
        self._values: tuple[float, float] | None = None

    def add(self, loss: Tensor, stop: Tensor) -> Tensor:
        """Adds a micro-batch's loss. All ranks.

        Args:
            loss: ``[]`` this rank's share.
            stop: ``[]`` 1 if this process was asked to stop, else 0.

        Returns:
            ``[]`` the loss of all ranks and of the step's micro-batches so far.
        """
        totals = self._world.sum(torch.stack([loss.detach(), stop]))
        self._totals = totals if self._totals is None else self._totals + totals
        self._values = None
        return self._totals[0]

    def copy_to_host(self) -> None:
        """Queues the copy of the outcome, so that reading it waits for this step alone."""
        if self._totals is not None and self._totals.device.type == "cuda":
            host = torch.empty(self._totals.shape, pin_memory=True)
            self._totals = host.copy_(self._totals, non_blocking=True)
            self._is_copied = torch.cuda.Event()
            self._is_copied.record()

    def _read(self) -> tuple[float, float]:
        if self._values is None:
            assert self._totals is not None
            with self._world.waiting():
                if self._is_copied is not None:
                    self._is_copied.synchronize()
                loss, stop = self._totals.tolist()
            self._values = loss, stop
        return self._values

    @property
    def loss(self) -> float:
        """Mean over the global batch, the same on every rank."""
        return self._read()[0]

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self._read()[1] > 0

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken; one with a NaN or infinite loss changes no weight."""
        return math.isfinite(self.loss)


class _Prefetcher:
    """Copies the next batch to the device on a separate stream while the current one trains."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Any = None

    def take(self, batches: Iterator[Any]) -> Any:
        """The next batch.

        Raises:
            StopIteration: no batch is left.
        """
        batch = self._copy(batches) if self._next is None else self._next
        if batch is None:
            raise StopIteration
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            batch.record_stream(current)
        self._next = self._copy(batches)
        return batch

    def _copy(self, batches: Iterator[Any]) -> Any:
        batch = next(batches, None)
        if batch is None:
            return None
        with torch.cuda.stream(self._stream):  # None: of no effect
            return batch.to(self._device, non_blocking=True)


class TrainPipeline(TrainPipelineSparseDist[Any, Any]):
    """Takes optimizer steps; skips steps whose loss is not finite.

    Several ranks on CUDA use TorchRec's pipeline, which copies the next batches and exchanges their
    ids while the current one trains. A single rank has no ids to exchange and uses a plain loop,
    with the next batch copied ahead on CUDA; so do ranks on CPU, which have nothing to overlap.

    The loss is summed over the ranks before backward: fused tables are updated in backward, when it
    would be too late to detect a NaN. If ``deferred``, the host does not wait for this sum.
    Backward then always runs, and a flag on the device zeroes the gradients of the pooled rows,
    which leaves tables unchanged, and disables the other optimizers.

    Args:
        model: the sharded task; its forward returns (loss, logits).
        optimizer: the combined optimizer.
        world: the ranks.
        micro_batches: number of batches per optimizer step, whose gradients are summed.
        config: gradient bounds; default: none.
        asked_to_stop: whether this process was asked to stop.
        overlapped: whether to use TorchRec's pipeline; default: with several ranks on CUDA.
        deferred: whether the device decides on a step; default: on CUDA if zero gradients leave
            all tables unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        world: World,
        micro_batches: int = 1,
        config: OptimizerConfig | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        overlapped: bool | None = None,
        deferred: bool | None = None,
    ) -> None:
        super().__init__(model, _NoOptimizer(), world.device, custom_model_fwd=self._forward)
        self._dmp_collection_sync_interval_batches = None  # `average_copies`, once per step
        on_device = world.device.type != "cpu"
        self._world, self.micro_batches, self._asked_to_stop = world, micro_batches, asked_to_stop
        self._config = config or OptimizerConfig()
        self._overlapped = overlapped
        if overlapped is None:
            self._overlapped = on_device and (self._always_overlapped or world.world_size > 1)
        self._ahead = _Prefetcher(world.device) if on_device else None
        self.deferred = on_device if deferred is None else deferred
        self.deferred &= all(map(can_skip_on_device, fused_kernels(model)))
        self._dense = parameters_of(optimizer, "dense")
        self._tables = parameters_of(optimizer, "tables")
        self._replicated = parameters_of(optimizer, "replicated_tables")
        self._optimizers = torch_optimizers(optimizer)
        groups = [group for each in self._optimizers for group in each.param_groups]
        self._learned = [parameter for group in groups for parameter in group["params"]]
        self._buffers = _running_statistics(model)
        self._dropouts = row_dropouts(model)
        # Passing a tensor as the initial gradient costs no operation. A rank's loss is its share of
        # the global mean, but DDP and TorchRec average gradients over the ranks, so the shares are
        # scaled by the number of ranks.
        self._scale = torch.full((), float(world.world_size), device=world.device)
        self._stop = torch.zeros((), device=world.device)
        self._is_finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._is_not_finite = torch.zeros((), device=world.device)
        if self.deferred:
            skip_updates_if(self._is_not_finite, optimizer)
        self._step = Step(world)
        self._looking_up_since = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Host seconds by phase.

        embeddings: ids go to the rows' ranks, rows are looked up, pooled rows come back; forward is
        the rest of it, and backward has the gradients' way and the update of fused tables.
        """
        for module in model.modules():
            if isinstance(module, ShardedEmbeddingBagCollection):
                module.register_forward_pre_hook(self._looking_up)
                module.register_forward_hook(self._on_lookup)

    _always_overlapped = False

    def train_step(self, micro_batches: Iterator[Any]) -> Step:
        """Takes one optimizer step. All ranks."""
        step = self._step = Step(self._world)
        before = [buffer.clone() for buffer in self._buffers]
        for parameter in self._learned:
            parameter.grad = None
        for _ in range(self.micro_batches):
            if self._overlapped:
                self.progress(micro_batches)
            else:
                with self._time("data"):
                    batch = (
                        next(micro_batches)
                        if self._ahead is None
                        else self._ahead.take(micro_batches)
                    )
                self._backward(self._forward(batch)[0])
        if self.deferred or step.is_finite:
            with self._time("optimizer"):
                bound_gradients(
                    self._config, self._tables, self._replicated, self._dense, self._world
                )
                for optimizer in self._optimizers:
                    optimizer.step()
                average_copies(self._model)
        if self.deferred:
            for buffer, value in zip(self._buffers, before, strict=True):
                torch.where(self._is_finite, buffer, value, out=buffer)
        elif not step.is_finite:
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
        step.copy_to_host()
        return step

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        with self._time("forward"):
            for dropout in self._dropouts:
                dropout.first.fill_(batch.first)
            loss, logits = self._model(batch)
        self._step.sparse = batch.sparse
        if logits is not None:
            self._step.rows.append((logits, batch.labels, batch.weights))
        return loss, logits

    def _looking_up(self, _module: nn.Module, _arguments: Any) -> None:
        self._looking_up_since = time.perf_counter()

    def _on_lookup(self, module: nn.Module, _arguments: Any, pooled: Any) -> Any:
        """Waits for the pooled rows, which are needed next."""
        waited = pooled.wait() if isinstance(pooled, LazyAwaitable) else pooled
        if module.training:  # validation is timed as a separate phase
            took = time.perf_counter() - self._looking_up_since
            self.seconds["embeddings"] += took
            self.seconds["forward"] -= took
            values = waited.values()
            if self.deferred and values.requires_grad:
                values.register_hook(self._zero_if_skipped)
        return waited

    def _zero_if_skipped(self, gradient: Tensor) -> Tensor:
        """The gradient of the pooled rows; zeros if the loss is not finite."""
        return torch.where(self._is_finite, gradient, 0.0)

    def _backward(self, losses: Tensor) -> None:
        with self._time("backward"):
            if self._decide(losses):
                losses.backward(self._scale)

    def _decide(self, loss: Tensor) -> bool:
        """Adds a micro-batch's loss to the step's; returns whether to run backward. All ranks."""
        if self._asked_to_stop():
            self._stop.fill_(1.0)
        total = self._step.add(loss, self._stop)
        if not self.deferred:
            return self._step.is_finite
        torch.lt(total.abs(), math.inf, out=self._is_finite)
        torch.logical_not(self._is_finite, out=self._is_not_finite)
        return True

    def _pipeline_model(self, *arguments: Any, **options: Any) -> None:
        super()._pipeline_model(*arguments, **options)
        for module in self._pipelined_modules:  # TorchRec has replaced the exchanges
            assert isinstance(module, TableCollection)
            module.replace_exchanges()

    def enqueue_batch(self, dataloader_iter: Iterator[Any]) -> bool:
        """Takes the next batch and copies it to the device."""
        with self._time("data"):
            enqueued: bool = super().enqueue_batch(dataloader_iter)
            return enqueued

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        """Starts exchanging a batch's ids."""
        with self._time("embeddings"):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: Any) -> None:
        """Completes the exchange of a batch's ids."""
        with self._time("embeddings"):
            super().wait_sparse_data_dist(context)

    @contextmanager
    def _time(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - begun


class PrefetchTrainPipeline(TrainPipeline, PrefetchTrainPipelineSparseDist[Any, Any]):
    """For cached tables: also fetches the next batch's rows into the GPU while this one trains.

    It must be drained before the model is called directly, which would find the next batch's rows
    fetched: give it an iterator that ends there.
    """

    _always_overlapped = True

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        """Trains one batch; `detach`, before the model is called directly, is undone."""
        if not self._model_attached:
            self.attach(self._model)
        return super().progress(dataloader_iter)

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        loss, logits = super()._forward(batch)
        with self._time("backward"):
            # TorchRec's progress() differentiates what it is given here, without `_backward`.
            if self._decide(loss):
                return loss * self._scale, logits
        unlock_cached_rows(self._model)
        return loss.new_zeros((), requires_grad=True), logits

    def _prefetch(self, context: Any) -> None:
        with self._time("embeddings"):
            super()._prefetch(context)


def train_pipeline(model: nn.Module, *arguments: Any, **options: Any) -> TrainPipeline:
    """The pipeline that a model's tables need, with the arguments of `TrainPipeline`."""
    cached = any(kernel.prefetch_pipeline for kernel in fused_kernels(model))
    return (PrefetchTrainPipeline if cached else TrainPipeline)(model, *arguments, **options)


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """The persistent buffers, which forward changes and a skipped step restores.

    Other buffers, such as constants, are not persistent.
    """
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
