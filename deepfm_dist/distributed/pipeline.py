"""TorchRec's train pipeline with what every step has to pass before it touches a weight."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.types import LazyAwaitable
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.distributed.optimizers import bound_gradients, parameters_of
from deepfm_dist.distributed.process_group import World
from deepfm_dist.distributed.settings import OptimizerConfig
from deepfm_dist.distributed.sharding import fused_kernels, unlock_cached_rows

PHASES = ("data", "embeddings", "forward", "backward", "optimizer")


class _Unused:
    """The pipeline's own idea of when to update would leave no room between backward and step."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


@dataclass
class Step:
    """What one optimizer step saw.

    Attributes:
        loss: mean over the global batch, the same on every rank.
        stop: whether any rank was asked to stop.
        sparse: table rows of this rank's last micro-batch.
        rows: (logits, labels, weights), ``[b]`` each, of this rank's rows, a micro-batch each;
            none where the loss is that of users.
    """

    loss: float = 0.0
    stop: bool = False
    sparse: KeyedJaggedTensor | None = None
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether the step was taken; one with a NaN or infinite loss touches no weight."""
        return math.isfinite(self.loss)


class TrainPipeline(TrainPipelineSparseDist[Any, Any]):
    """On CUDA, copies the next batches and exchanges their ids while the current one trains.

    On CPU there is nothing to overlap, and a plain loop over the same steps costs less.

    The loss is summed over the ranks before backward: fused tables are updated in backward, so
    that a NaN found later would already be in them.

    Args:
        model: the sharded task; its forward returns (loss, logits).
        optimizer: the combined optimizer.
        world: the ranks.
        micro_batches: batches per optimizer step, whose gradients add up.
        config: bounds of the gradients; default: none.
        asked_to_stop: whether this process was asked to.
        overlapped: whether the next batches are prepared meanwhile; default: on CUDA.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: CombinedOptimizer,
        world: World,
        micro_batches: int = 1,
        config: OptimizerConfig | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
        overlapped: bool | None = None,
    ) -> None:
        super().__init__(model, _Unused(), world.device, custom_model_fwd=self._forward)
        self._updates = optimizer
        self._world, self._micro_batches, self._asked_to_stop = world, micro_batches, asked_to_stop
        self._config = config or OptimizerConfig()
        self._overlapped = world.device.type != "cpu" if overlapped is None else overlapped
        self._of_dense = parameters_of(optimizer, "dense")
        self._of_tables = parameters_of(optimizer, "tables")
        # What forward changes by itself (running statistics); a skipped step puts it back.
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._step = Step()
        self._looking_up_since = 0.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Host seconds by phase.

        embeddings: ids go to the rows' ranks, rows are looked up, pooled rows come back; forward is
        the rest of it, and backward has the gradients' way and the update of fused tables.
        """
        for module in model.modules():
            if isinstance(module, ShardedEmbeddingBagCollection):
                module.register_forward_pre_hook(self._looking_up)
                module.register_forward_hook(self._looked_up)

    def train_step(self, micro_batches: Iterator[Any]) -> Step:
        """Takes one optimizer step. All ranks."""
        step = self._step = Step()
        before = [buffer.clone() for buffer in self._buffers]
        self._updates.zero_grad()
        for _ in range(self._micro_batches):
            if self._overlapped:
                self.progress(micro_batches)
            else:
                with self._timed("data"):
                    batch = next(micro_batches)
                self._backward(self._forward(batch)[0])
        if step.is_finite:
            with self._timed("optimizer"):
                bound_gradients(self._config, self._of_tables, self._of_dense, self._world)
                self._updates.step()
        else:
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
        return step

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        with self._timed("forward"):
            loss, logits = self._model(batch)
        self._step.sparse = batch.sparse
        if logits is not None:
            self._step.rows.append((logits, batch.labels, batch.weights))
        return loss, logits

    def _looking_up(self, _module: torch.nn.Module, _arguments: Any) -> None:
        self._looking_up_since = time.perf_counter()

    def _looked_up(self, module: torch.nn.Module, _arguments: Any, pooled: Any) -> Any:
        """Waits for the pooled rows, which are used next in any case."""
        waited = pooled.wait() if isinstance(pooled, LazyAwaitable) else pooled
        if module.training:  # validation has a phase of its own
            took = time.perf_counter() - self._looking_up_since
            self.seconds["embeddings"] += took
            self.seconds["forward"] -= took
        return waited

    def _backward(self, losses: Tensor) -> None:
        with self._timed("backward"):
            to_learn_from = self._checked(losses)
            if to_learn_from is not None:
                super()._backward(to_learn_from)

    def _checked(self, losses: Tensor) -> Tensor | None:
        """Counts the loss in; what is to be differentiated, or None where it is not finite."""
        asked = losses.new_full((), float(self._asked_to_stop()))
        with self._world.waiting():
            loss, stop = self._world.sum(torch.stack([losses.detach(), asked])).tolist()
        self._step.loss += loss
        self._step.stop |= stop > 0
        # A rank's loss is its share of the global mean; DDP and TorchRec average gradients over
        # the ranks, so that the shares must be scaled up to add up to the mean's.
        return losses * self._world.world_size if self._step.is_finite else None

    def enqueue_batch(self, dataloader_iter: Iterator[Any]) -> bool:
        """Takes the next batch and copies it to the device."""
        with self._timed("data"):
            found: bool = super().enqueue_batch(dataloader_iter)
            return found

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        """Begins to exchange a batch's ids."""
        with self._timed("embeddings"):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: Any) -> None:
        """Ends the exchange of a batch's ids."""
        with self._timed("embeddings"):
            super().wait_sparse_data_dist(context)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
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

    def progress(self, dataloader_iter: Iterator[Any]) -> Any:
        """Trains one batch; `detach`, before the model is called directly, is undone."""
        if not self._model_attached:
            self.attach(self._model)
        return super().progress(dataloader_iter)

    def _forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        loss, logits = super()._forward(batch)
        with self._timed("backward"):
            # TorchRec's progress() differentiates what it is given here, without `_backward`.
            to_learn_from = self._checked(loss)
        if to_learn_from is None:
            unlock_cached_rows(self._model)
            to_learn_from = loss.new_zeros((), requires_grad=True)
        return to_learn_from, logits

    def _prefetch(self, context: Any) -> None:
        with self._timed("embeddings"):
            super()._prefetch(context)


def train_pipeline(model: torch.nn.Module, *arguments: Any, **options: Any) -> TrainPipeline:
    """The pipeline that a model's tables need, with the arguments of `TrainPipeline`."""
    cached = any(kernel.prefetch_pipeline for kernel in fused_kernels(model))
    return (PrefetchTrainPipeline if cached else TrainPipeline)(model, *arguments, **options)
