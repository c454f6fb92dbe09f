"""The training loop."""

import gc
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.distributed.optimizers import set_learning_rates
from deepfm_dist.distributed.pipeline import Step, train_pipeline
from deepfm_dist.distributed.process_group import World
from deepfm_dist.distributed.settings import CheckpointConfig, OptimizerConfig
from deepfm_dist.distributed.sharding import set_table_steps
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.events import EndEvent, TrainEvent, ValidEvent
from deepfm_dist.log import MetricsLog, progress
from deepfm_dist.seeding import derive_seed
from deepfm_dist.training.figures import TrainingFigures
from deepfm_dist.training.settings import TrainerConfig

log = logging.getLogger(__name__)
HIGHER_IS_BETTER = ("auc", "user_auc", "accuracy")
LOWER_IS_BETTER = ("log_loss", "ne")
"""Figures on rows that can be monitored; of rankings all can, and higher is better."""
WARN_AFTER = 2
"""Validations in a row without a better figure that are more than chance."""


class Batches(Protocol):
    """The global batches of a run, sliced for a rank."""

    batch_size: int
    steps_per_epoch: int
    threads: int

    def steps(self, first: int, last: int) -> Iterator[Any]:
        """Batches of steps ``first`` to ``last``, both included."""


class NonFiniteLoss(DeepFMError):
    """The losses of several steps in a row, or of a validation, were NaN or infinite.

    No weight was touched by such steps.
    """


class Pruned(Exception):
    """The run is not worth going on with; all ranks say so after the same validation."""


@dataclass
class LoopState:
    """What the loop knows beside the step it is at: everything else follows from the step.

    Attributes:
        step: optimizer steps taken or skipped.
        skipped: steps that were skipped, in all.
        skipped_in_a_row: of these, the last ones.
        logged_step: step of the last line of training figures.
        saved_step: step of the last checkpoint.
        best: best value of the monitored figure.
        best_step: step it was measured at.
        monitor: the figure it is of.
        validations_since_best: validations since.
        lr_scale: what plateaus have left of the learning rates.
        lifetime: sums of `TrainingFigures`.
        before_end: best, best_step, validations_since_best and lr_scale before a validation that
            ran only because training ended; they are restored when training is resumed.
        earlier_steps: steps of the runs before, whose weights and optimizer state it began with.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    logged_step: int = 0
    saved_step: int | None = None
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0
    lr_scale: float = 1.0
    lifetime: list[float] = field(default_factory=list)
    monitor: str | None = None
    before_end: list[Any] | None = None
    earlier_steps: int = 0

    def resume(self, monitor: str | None) -> None:
        """Makes it the state of a run that did not end here, and monitors a figure.

        Args:
            monitor: the validation figure that decides which checkpoint is best; None: none does.
        """
        if self.before_end is not None:
            self.best, self.best_step, self.validations_since_best, self.lr_scale = self.before_end
            self.before_end = None
        if monitor != self.monitor:
            self.best, self.best_step, self.validations_since_best = None, None, 0
            self.monitor = monitor

    def count(self, outcome: Step, max_skipped: int) -> None:
        """Counts a step in.

        Raises:
            NonFiniteLoss: too many in a row were skipped.
        """
        self.step += 1
        self.skipped_in_a_row = 0 if outcome.is_finite else self.skipped_in_a_row + 1
        self.skipped += not outcome.is_finite
        if not outcome.is_finite:
            log.warning("step %d skipped: its loss is %s", self.step, outcome.loss)
        if self.skipped_in_a_row > max_skipped:
            raise self.not_finite(
                f"the loss is {outcome.loss}, as in the {max_skipped} steps before, all of them "
                f"skipped"
            )

    def not_finite(self, what: str) -> NonFiniteLoss:
        """The error that says so, and what there is to go back to."""
        saved = "none" if self.saved_step is None else f"that of step {self.saved_step}"
        return NonFiniteLoss(
            f"step {self.step}: {what}; the last checkpoint is {saved}; lower the learning rates "
            f"(optimizer.tables.lr, optimizer.dense.lr) or look for extreme values in numeric "
            f"fields"
        )

    def is_over(self, patience: int | None, last: int) -> bool:
        """Whether nothing is left to do.

        Args:
            patience: validations without a better figure that end the run.
            last: the step after which it ends.
        """
        out_of_patience = patience is not None and self.validations_since_best >= patience
        return self.step >= last or out_of_patience

    @property
    def best_state(self) -> list[Any]:
        """What `update_best` changes."""
        return [self.best, self.best_step, self.validations_since_best, self.lr_scale]

    def check_monitored(
        self, figures: Mapping[str, float], is_required: bool, is_first: bool
    ) -> None:
        """Refuses a monitored figure that is undefined on the validation rows.

        Args:
            figures: of this validation.
            is_required: whether a setting asks for it; if not, a warning is logged at the first
                validation.
            is_first: whether this is rank 0.

        Raises:
            ConfigError: it is NaN, and so it will stay.
        """
        if self.monitor is None or self.best is not None:
            return
        text = (
            f"{figures[self.monitor]} on the validation rows, so that no checkpoint can be the best"
        )
        if is_required:
            raise ConfigError(
                f"trainer.monitor={self.monitor}: it is {text}; set trainer.monitor=log_loss"
            )
        if is_first and self.validations_since_best == 1:
            log.warning("%s is %s; the last one is used", self.monitor, text)

    def warn_if_worsening(self, figures: Mapping[str, float], per_epoch: int) -> None:
        """Warns at the second validation in a row without a better monitored figure. Rank 0.

        Args:
            figures: of this validation.
            per_epoch: steps per epoch.
        """
        if self.monitor is None or self.best is None or self.validations_since_best != WARN_AFTER:
            return
        log.warning(
            "validation %s has not improved since epoch %.4g: %.4f now, %.4f at step %s; more "
            "epochs may not help; see docs/training.md#overfitting",
            self.monitor,
            self.best_step_in_epochs(per_epoch),
            figures[self.monitor],
            self.best,
            f"{self.best_step:,}",
        )

    def summarize(self, figures: Mapping[str, float], per_epoch: int, patience: int | None) -> None:
        """Says which checkpoint of a run that has ended is the best one. Rank 0.

        Args:
            figures: of the last validation.
            per_epoch: steps per epoch.
            patience: validations without a better figure that end the run.
        """
        if self.monitor is None or self.best is None or self.best_step is None:
            return
        expected = patience is not None or self.validations_since_best < WARN_AFTER
        if self.best_step != self.step:
            log.log(
                logging.INFO if expected else logging.WARNING,
                "validation %s was best at step %s (epoch %.4g): %.4f; at the last step, %s, it is "
                "%.4f; the checkpoint of step %s is used; to use the last one, set "
                "checkpoint.use=latest",
                self.monitor,
                f"{self.best_step:,}",
                self.best_step_in_epochs(per_epoch),
                self.best,
                f"{self.step:,}",
                figures[self.monitor],
                f"{self.best_step:,}",
            )
        if (entropy := self._best_ne(figures)) >= 1:
            log.warning(
                "validation NE of the checkpoint of step %s is %.4f: always predicting the mean "
                "label has a lower log loss; lower the learning rates (optimizer.tables.lr, "
                "optimizer.dense.lr), or check labels and fields",
                f"{self.best_step:,}",
                entropy,
            )

    def best_step_in_epochs(self, per_epoch: int) -> float:
        """Epochs up to the best step."""
        assert self.best_step is not None
        return self.best_step / per_epoch

    def _best_ne(self, figures: Mapping[str, float]) -> float:
        """NE at the best step, NaN where it cannot be told from the last validation's figures."""
        assert self.best is not None
        if self.monitor == "ne":
            return self.best
        if self.monitor == "log_loss" and figures["log_loss"] > 0:  # both over the same entropy
            return figures["ne"] * (self.best / figures["log_loss"])
        is_of_rows = self.best_step == self.step and "@" not in (self.monitor or "")
        return figures["ne"] if is_of_rows else math.nan

    def update_best(self, figures: Mapping[str, float], trainer: TrainerConfig) -> None:
        """Compares the monitored figure with the best one; one that is not finite is no better."""
        if self.monitor is None:
            return
        value = figures[self.monitor]
        sign = -1 if self.monitor in LOWER_IS_BETTER else 1
        gain = sign * (value - self.best) if self.best is not None else math.inf
        if math.isfinite(value) and gain > trainer.min_delta:
            self.best, self.best_step, self.validations_since_best = value, self.step, 0
        else:
            self.validations_since_best += 1
            self.lr_scale *= trainer.plateau_factor


def train(
    sharded: nn.Module,
    optimizer: CombinedOptimizer,
    batches: Batches,
    world: World,
    trainer: TrainerConfig,
    optimizers: OptimizerConfig,
    checkpoints: CheckpointConfig,
    monitor: str | None,
    state: LoopState,
    seed: int,
    metrics: MetricsLog,
    validate: Callable[[], Mapping[str, float]] | None = None,
    save: Callable[[LoopState], None] | None = None,
    asked_to_stop: Callable[[], bool] = lambda: False,
    profiler: torch.profiler.profile | None = None,
    sent_bytes: Callable[[KeyedJaggedTensor], Mapping[str, int]] = lambda _: {},
) -> LoopState:
    """Trains a model from where ``state`` says. All ranks.

    Args:
        sharded: the sharded task.
        optimizer: its optimizer.
        batches: the global batches, sliced for this rank.
        world: the ranks.
        trainer: when to stop, log and validate.
        optimizers: learning rates, and bounds of the gradients.
        checkpoints: when to save.
        monitor: the validation figure that decides which checkpoint is best; None: none does.
        state: of the loop; changed in place.
        seed: of dropout.
        metrics: where events are written.
        validate: figures on held-out rows; called on all ranks, which get the same.
        save: writes a checkpoint; called on all ranks.
        asked_to_stop: whether this process was told to; one is enough for all to stop.
        profiler: stepped with the loop.
        sent_bytes: bytes that the ranks send each other for a micro-batch, by what they are of.

    Returns:
        ``state``.

    Raises:
        NonFiniteLoss: more than ``trainer.max_skipped`` steps in a row had a loss that is not
            finite.
        ConfigError: the monitored figure is NaN at the first validation.
    """
    per_epoch = batches.steps_per_epoch
    last = trainer.last_step(per_epoch)
    pipeline = train_pipeline(
        sharded,
        optimizer,
        world,
        trainer.accumulate_steps,
        optimizers,
        asked_to_stop,
    )

    def pieces(first: int) -> Iterator[Any]:
        """Micro-batches up to the next validation, before which the pipeline has to be empty."""
        every = trainer.validate_every_epochs * per_epoch if validate else last
        until = min(last, -(-first // every) * every) if every else last
        for batch in batches.steps(first, until):
            yield from batch.split(trainer.accumulate_steps)

    micro_batches = pieces(state.step + 1)
    figures, clock = TrainingFigures(state.lifetime), _Clock(pipeline.seconds)
    if state.step < last:
        state.resume(monitor)
    going_on, due = not state.is_over(trainer.patience, last), False
    found: Mapping[str, float] = {}
    sharded.train()
    with (
        _frozen(),
        profiler or nullcontext(),
        progress(last, "train", "step", world.is_first, state.step) as bar,
    ):
        while going_on:
            step = state.step + 1
            # Dropout of a step on a rank is the same whatever came before it.
            world.seed(derive_seed(seed, "dropout", step, world.rank))
            lr_tables = optimizers.tables.at(step) * state.lr_scale
            lr_dense = optimizers.dense.at(step) * state.lr_scale
            set_learning_rates(optimizer, lr_tables, lr_dense)
            outcome = pipeline.train_step(micro_batches)
            state.count(outcome, trainer.max_skipped)
            figures.add(outcome)
            bar.update()
            if profiler:
                profiler.step()

            epoch, inside = divmod(step, per_epoch)
            if validate and _due(trainer.validate_every_epochs, epoch, inside, step == last):
                pipeline.detach()  # validation calls the model directly
                sharded.eval()
                with clock.timed("validation"):
                    found = validate()
                sharded.train()
                set_table_steps(sharded, state.earlier_steps + step)
                if not math.isfinite(found.get("log_loss", 0.0)):
                    raise state.not_finite(f"the validation log loss is {found['log_loss']}")
                if not _due(trainer.validate_every_epochs, epoch, inside):
                    state.before_end = state.best_state
                state.update_best(found, trainer)
                state.check_monitored(found, trainer.needs_monitor is not None, world.is_first)
                told = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
                log.info("epoch %d  step %d  loss %.4f  %s", epoch, step, outcome.loss, told)
                metrics.write(ValidEvent(step=step, epoch=epoch, **found))
                if world.is_first:
                    state.warn_if_worsening(found, per_epoch)
                micro_batches = pieces(step + 1)
            going_on = not (state.is_over(trainer.patience, last) or outcome.stop)
            due |= (
                state.best_step == step
                or _due(checkpoints.every_epochs, epoch, inside)
                or (checkpoints.every_steps > 0 and step % checkpoints.every_steps == 0)
            )
            # While steps are skipped nothing is saved that earlier checkpoints would make room for.
            saving = save is not None and (not going_on or (due and outcome.is_finite))
            if saving or not going_on or step % trainer.log_every_steps == 0:
                # A checkpoint ends a window, so that a resumed run begins one where this run does.
                line = figures.line(world)
                spent = clock.read(step - state.logged_step, batches.batch_size)
                shown = {"loss": f"{line['loss']:.4f}", "rows/s": f"{spent['rows_per_s']:,.0f}"}
                bar.set_postfix(shown, refresh=False)
                line |= {"lr_tables": lr_tables, "lr_dense": lr_dense, "skipped": state.skipped}
                if outcome.sparse is not None:
                    sent = sent_bytes(outcome.sparse)
                    spent["sent_bytes"] = {k: v * trainer.accumulate_steps for k, v in sent.items()}
                metrics.write(TrainEvent(step=step, **line, **spent))
                state.logged_step, state.lifetime = step, figures.lifetime.tolist()
            if save and saving:
                due = False
                with clock.timed("checkpoint"):
                    if outcome.is_finite:
                        state.saved_step = step
                    save(state)
    pipeline.detach()
    if found and world.is_first and state.is_over(trainer.patience, last):
        state.summarize(found, per_epoch, trainer.patience)
    peak = {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if world.device.type == "cuda":
        peak["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated(world.device) / 2**30
    of_ranks = {kind: world.gather_object(gib) for kind, gib in peak.items()}
    if world.is_first:
        metrics.write(EndEvent(step=state.step, **of_ranks))
    return state


@contextmanager
def _frozen() -> Iterator[None]:
    """What was imported and built stays meanwhile: no need to look through it again and again."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Clock:
    """Where the time between two lines went; host seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._begun = seconds, time.perf_counter()
        self._before = dict(seconds)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds what happens inside to a phase."""
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


def _due(every_epochs: int, epoch: int, inside: int, is_last: bool = False) -> bool:
    """Whether a step, the ``inside``-th of an epoch, ends one of every so many epochs."""
    return every_epochs > 0 and (is_last or (inside == 0 and epoch % every_epochs == 0))
