"""The training loop."""

import gc
import logging
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.distributed.optimizers import set_learning_rates
from deepfm_dist.distributed.pipeline import Step, train_pipeline
from deepfm_dist.distributed.settings import CheckpointConfig, OptimizerConfig
from deepfm_dist.distributed.sharding import set_table_steps
from deepfm_dist.distributed.world import World
from deepfm_dist.events import EndEvent, TrainEvent, ValidEvent
from deepfm_dist.log import MetricsLog, progress
from deepfm_dist.model.dropout import begin_step, row_dropouts
from deepfm_dist.seeding import derive_seed
from deepfm_dist.training.figures import TrainingFigures
from deepfm_dist.training.metrics import order_figures
from deepfm_dist.training.settings import TrainerConfig
from deepfm_dist.training.state import LoopState

log = logging.getLogger(__name__)
READ_AFTER = 8
"""Number of steps that the host may run ahead of the device before it reads a step's outcome. The
same on all ranks, so that all stop after the same step."""


class Batches(Protocol):
    """The global batches of a run, sliced for a rank."""

    batch_size: int
    steps_per_epoch: int
    threads: int

    def batch(self, step: int) -> Any:
        """This rank's slice of a step's batch, counted from 1; `steps` calls it."""

    def steps(self, first: int, last: int) -> Iterator[Any]:
        """Batches of steps ``first`` to ``last``, inclusive."""


class Pruned(Exception):
    """The run is not worth continuing; all ranks raise it after the same validation."""


class Settings(Protocol):
    """The settings that the loop reads; `deepfm_dist.config.Config` provides them."""

    @property
    def trainer(self) -> TrainerConfig:
        """When to stop, log and validate."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Learning rates, and bounds of the gradients."""

    @property
    def checkpoint(self) -> CheckpointConfig:
        """When to save."""

    @property
    def monitor(self) -> str | None:
        """The validation figure that decides which checkpoint is best; or None."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, on all ranks.

    Attributes:
        validate: figures on held-out rows, the same on all ranks; None: no validations.
        on_validation: receives the figures of each validation and its epoch; may raise `Pruned`, on
            all ranks.
        save: writes a checkpoint.
        measure_start: whether to validate the initial weights and save them as step 0.
        asked_to_stop: whether this process was asked to stop; if any was, all ranks stop.
        profiler: its ``step`` is called once per step.
        sent_bytes: bytes sent between ranks for a micro-batch, by kind.
    """

    validate: Callable[[], Mapping[str, float]] | None = None
    on_validation: Callable[[Mapping[str, float], int], None] | None = None
    save: Callable[[LoopState], None] | None = None
    measure_start: bool = False
    asked_to_stop: Callable[[], bool] = lambda: False
    profiler: torch.profiler.profile | None = None
    sent_bytes: Callable[[KeyedJaggedTensor], Mapping[str, int]] = lambda _: {}


def _as_line(figures: Mapping[str, float], loss: str, monitor: str | None) -> str:
    """Validation figures for the log; of probabilities if the loss gives any or one is watched."""
    shown = {*figures} if loss == "bce" else {*order_figures(figures), monitor}
    meaningful = {name: value for name, value in figures.items() if name in shown}
    return "  ".join(f"{name} {value:.4f}" for name, value in meaningful.items())


class Trainer:
    """Trains a model, starting from ``state``. All ranks call every method.

    Args:
        model: the sharded task.
        optimizer: its optimizer.
        batches: the global batches, sliced for this rank.
        world: the ranks.
        config: the settings.
        seed: the seed of dropout.
        state: the state of the loop; changed in place.
        metrics: where events are written.
        hooks: what the loop calls.
        target_weights: weights of several targets, by name, in their figures.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: CombinedOptimizer,
        batches: Batches,
        world: World,
        config: Settings,
        *,
        seed: int,
        state: LoopState,
        metrics: MetricsLog,
        hooks: Hooks | None = None,
        target_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.state, self.per_epoch = state, batches.steps_per_epoch
        self.last_step = config.trainer.last_step(self.per_epoch)
        self._model, self._optimizer, self._batches, self._world = model, optimizer, batches, world
        self._config, self._seed, self._metrics = config, seed, metrics
        self._hooks = hooks or Hooks()
        self._pipeline = train_pipeline(
            model,
            optimizer,
            world,
            config.trainer.accumulate_steps,
            config.optimizer,
            self._hooks.asked_to_stop,
        )
        self._dropouts = row_dropouts(model)
        self._rates = {"lr_tables": 0.0, "lr_dense": 0.0}
        self._unread: deque[Step] = deque()
        self._last: Step | None = None
        self._figures = TrainingFigures(state.lifetime, target_weights)
        self._clock = _Clock(self._pipeline.seconds)

    def fit(self) -> LoopState:
        """Trains until the last step, until patience runs out, or until a rank is asked to stop.

        Returns:
            The state.

        Raises:
            NonFiniteLoss: more than ``trainer.max_skipped`` steps in a row, or a validation, had a
                loss that is not finite.
            ConfigError: the monitored figure is NaN at the first validation.
        """
        state, trainer, hooks = self.state, self._config.trainer, self._hooks
        if state.step < self.last_step:
            state.resume(self._config.monitor)
        step, save_due, stop, figures = state.step, False, self._is_over, dict[str, float]()
        if step == 0 and state.best is None and hooks.measure_start:
            self._measure_start()
        micro_batches = self._micro_batches(step + 1)
        self._model.train()
        with (
            _frozen_heap(),
            hooks.profiler or nullcontext(),
            progress(self.last_step, "train", "step", self._world.is_first, step) as bar,
        ):
            while not stop:
                step += 1
                self._begin(step)
                self._unread.append(self._pipeline.train_step(micro_batches))
                bar.update()
                if hooks.profiler:
                    hooks.profiler.step()

                validation_due = self._is_validation_due(step)
                log_due = step % trainer.log_every_steps == 0
                save_due |= self._is_save_due(step)
                read_all = validation_due or log_due or save_due or step == self.last_step
                stop = self._read_outcomes(0 if read_all else READ_AFTER)
                if validation_due:
                    figures = self._validate()
                    save_due |= state.best_step == step
                    micro_batches = self._micro_batches(step + 1)
                stop |= self._is_over
                if stop:
                    self._read_outcomes(0)
                # While steps are being skipped, no checkpoint is saved: it would push out older,
                # good ones.
                saving = hooks.save is not None and (stop or (save_due and self._is_finite))
                if saving or stop or log_due:
                    # A checkpoint ends a window, so that a resumed run starts its window at the
                    # same step.
                    bar.set_postfix(self._log(), refresh=False)
                if saving:
                    self._save()
                    save_due = False
        self._finish(figures)
        return state

    def _begin(self, step: int) -> None:
        """Sets what depends on the step alone: random numbers and learning rates."""
        begin_step(self._dropouts, self._seed, step)
        # What else draws, such as an over-arch of the user's own, does so on each rank by itself.
        self._world.seed(derive_seed(self._seed, "draws", step, self._world.rank))
        config, scale = self._config.optimizer, self.state.lr_scale
        tables, dense = config.tables.at(step) * scale, config.dense.at(step) * scale
        self._rates = {"lr_tables": tables, "lr_dense": dense}
        set_learning_rates(self._optimizer, tables, dense)

    def _micro_batches(self, first: int) -> Iterator[Any]:
        """Micro-batches up to the next validation; the pipeline must be empty by then."""
        parts, every = self._config.trainer.accumulate_steps, self.last_step
        if self._hooks.validate:
            every = self._config.trainer.validate_every_epochs * self.per_epoch
        until = min(self.last_step, -(-first // every) * every) if every else self.last_step
        for batch in self._batches.steps(first, until):
            yield from batch.split(parts)

    def _read_outcomes(self, unread: int) -> bool:
        """Counts all steps but the last ``unread``; returns whether any rank was asked to stop.

        Only reading the outcome waits for the device.
        """
        stop = False
        while len(self._unread) > (unread if self._pipeline.deferred else 0):
            self._last = self._unread.popleft()
            self.state.count(self._last, self._config.trainer.max_skipped)
            self._figures.add(self._last)
            stop |= self._last.stop
        return stop

    @property
    def _is_finite(self) -> bool:
        return self._last is not None and self._last.is_finite

    @property
    def _is_over(self) -> bool:
        return self.state.is_over(self._config.trainer.patience, self.last_step)

    def _is_validation_due(self, step: int, is_last_due: bool = True) -> bool:
        every = self._config.trainer.validate_every_epochs * self.per_epoch
        is_last = is_last_due and step == self.last_step
        return self._hooks.validate is not None and every > 0 and (is_last or step % every == 0)

    def _is_save_due(self, step: int) -> bool:
        config = self._config.checkpoint
        every = config.every_epochs * self.per_epoch, config.every_steps
        return any(n > 0 and step % n == 0 for n in every)

    def _measure_start(self) -> None:
        """Validates and saves the initial weights."""
        if self._hooks.validate is not None:
            self._validate()
            if self._hooks.save is not None:
                self.state.saved_step = 0
                self._hooks.save(self.state)

    def _validate(self) -> dict[str, float]:
        """Measures the model on held-out rows and compares it with the best one so far."""
        state, step, epoch = self.state, self.state.step, self.state.step // self.per_epoch
        assert self._hooks.validate is not None
        self._pipeline.detach()  # validation calls the model directly
        self._model.eval()
        with self._clock.timed("validation"):
            figures = dict(self._hooks.validate())
            if self._hooks.on_validation is not None:
                self._hooks.on_validation(figures, epoch)
        self._model.train()
        set_table_steps(self._model, state.earlier_steps + step)
        if not math.isfinite(figures.get("log_loss", 0.0)):
            raise state.not_finite(f"the validation log loss is {figures['log_loss']}")
        if not self._is_validation_due(step, is_last_due=False):
            state.before_end = state.best_state
        trainer, is_first = self._config.trainer, self._world.is_first
        state.update_best(figures, trainer)
        state.check_monitored(figures, trainer.needs_monitor is not None, is_first)
        shown = _as_line(figures, trainer.loss, state.monitor)
        if self._last is None:
            log.info("start  %s", shown)
        else:
            log.info("epoch %d  step %d  loss %.4f  %s", epoch, step, self._last.loss, shown)
        self._metrics.write(ValidEvent(step=step, epoch=epoch, **figures))
        if is_first:
            state.warn_if_worsening(figures, self.per_epoch)
        return figures

    def _log(self) -> dict[str, str]:
        """Writes the training figures since the last line; returns those for the progress bar."""
        state, step = self.state, self.state.step
        assert self._last is not None
        line = self._figures.line(self._world)
        spent = self._clock.read(step - state.logged_step, self._batches.batch_size)
        if self._last.sparse is not None:
            sent, parts = self._hooks.sent_bytes(self._last.sparse), self._pipeline.micro_batches
            spent["sent_bytes"] = {kind: size * parts for kind, size in sent.items()}
        self._metrics.write(
            TrainEvent(step=step, **line, **self._rates, skipped=state.skipped, **spent)
        )
        state.logged_step, state.lifetime = step, self._figures.lifetime.tolist()
        return {"loss": f"{line['loss']:.4f}", "rows/s": f"{spent['rows_per_s']:,.0f}"}

    def _save(self) -> None:
        assert self._hooks.save is not None
        with self._clock.timed("checkpoint"):
            if self._is_finite:
                self.state.saved_step = self.state.step
            self._hooks.save(self.state)

    def _finish(self, figures: Mapping[str, float]) -> None:
        """Detaches the pipeline from the model and summarises the run.

        Args:
            figures: the figures of the last validation, if any.
        """
        self._pipeline.detach()
        world, patience = self._world, self._config.trainer.patience
        if figures and world.is_first and self._is_over:
            self.state.summarize(figures, self.per_epoch, patience)
        peak = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if world.device.type == "cuda":
            peak["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(world.device) / 2**30
        by_rank = {kind: world.gather_object(gib) for kind, gib in peak.items()}
        if world.is_first:
            self._metrics.write(EndEvent(step=self.state.step, **by_rank))


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keeps the garbage collector from scanning everything imported and built so far."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Clock:
    """Host seconds between two log lines, by phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._begun = seconds, time.perf_counter()
        self._before = dict(seconds)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        begun = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begun

    def read(self, steps: int, batch_size: int) -> dict[str, Any]:
        """Seconds by phase and rows per second of training since the last call."""
        now, before, after = time.perf_counter(), self._before, dict(self._seconds)
        spent = {phase: after[phase] - before.get(phase, 0.0) for phase in after}
        aside = spent.get("validation", 0.0) + spent.get("checkpoint", 0.0)
        rows_per_s = round(steps * batch_size / (now - self._begun - aside))
        self._begun, self._before = now, after
        return {"rows_per_s": rows_per_s, "seconds": {k: round(v, 4) for k, v in spent.items()}}
