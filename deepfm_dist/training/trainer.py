"""The training loop."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.data.dataset import TrainingBatches
from deepfm_dist.distributed.pipeline import NonFiniteLoss, TrainPipeline
from deepfm_dist.distributed.world import World
from deepfm_dist.log import MetricsLog, progress
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """When things happen.

    Attributes:
        epochs: passes over the training rows.
        max_steps: upper bound on the steps, or None.
        log_every_steps: steps between two lines of training loss.
        validate_every_epochs: epochs between two validations; 0: never.
        checkpoint_every_epochs: epochs between two checkpoints; 0: only after the last step.
    """

    epochs: int
    max_steps: int | None = None
    log_every_steps: int = 50
    validate_every_epochs: int = 1
    checkpoint_every_epochs: int = 0


def train(
    sharded: nn.Module,
    optimizer: CombinedOptimizer,
    batches: TrainingBatches,
    world: World,
    schedule: Schedule,
    seed: int,
    metrics: MetricsLog,
    validate: Callable[[], Mapping[str, float]] | None = None,
    save: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains a model. All ranks.

    Args:
        sharded: the sharded task.
        optimizer: its optimizer.
        batches: the global batches, sliced for this rank.
        world: the ranks.
        schedule: when to stop, log, validate, save.
        seed: of dropout.
        metrics: where events are written.
        validate: figures on held-out rows, called on all ranks.
        save: writes a checkpoint of a step, called on all ranks.

    Returns:
        The loss of each step over the global batch, the same on every rank.

    Raises:
        NonFiniteLoss: a step's loss is NaN or infinite; names the step.
    """
    per_epoch = batches.steps_per_epoch
    last = min(schedule.epochs * per_epoch, schedule.max_steps or schedule.epochs * per_epoch)
    pipeline = TrainPipeline(sharded, optimizer, world)
    stream = batches.steps(1, last)
    losses: list[float] = []
    begun, logged_at = time.perf_counter(), 0
    sharded.train()
    with progress(last, "train", "step", world.is_first) as bar:
        for step in range(1, last + 1):
            # Dropout of a step on a rank is the same whatever came before it.
            torch.manual_seed(derive_seed(seed, "dropout", step, world.rank))
            try:
                pipeline.progress(stream)
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"step {step}: {error}") from None
            losses.append(pipeline.mean_loss)
            bar.update()
            if step % schedule.log_every_steps == 0 or step == last:
                now = time.perf_counter()
                rows_per_s = (step - logged_at) * batches.batch_size / (now - begun)
                mean = sum(losses[logged_at:]) / (step - logged_at)
                begun, logged_at = now, step
                metrics.write("train", step=step, loss=mean, rows_per_s=round(rows_per_s))
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            epoch, inside = divmod(step, per_epoch)
            if inside and step != last:
                continue
            if validate and _due(schedule.validate_every_epochs, epoch, step == last):
                pipeline.detach()  # validation calls the model directly
                sharded.eval()
                figures = validate()
                sharded.train()
                if world.is_first:
                    shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
                    log.info("epoch %d  step %d  loss %.4f  %s", epoch, step, losses[-1], shown)
                    metrics.write("valid", step=step, epoch=epoch, **figures)
                begun = time.perf_counter()
            if save and (step == last or _due(schedule.checkpoint_every_epochs, epoch, False)):
                save(step)
    pipeline.detach()
    return losses


def _due(every: int, epoch: int, is_last: bool) -> bool:
    return every > 0 and (is_last or epoch % every == 0)
