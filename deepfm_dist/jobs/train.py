"""Trains a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import loggers, shard_for_training, training_batches
from deepfm_dist.config import Config, resolve
from deepfm_dist.data.batches.histories import hold_out
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.checkpoint import Checkpoints, load, make_state
from deepfm_dist.distributed.planning import sent_bytes
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs import first_order
from deepfm_dist.jobs.finish import Finish, is_finished
from deepfm_dist.jobs.finish import check as check_finish
from deepfm_dist.jobs.prepare import prepare_locked
from deepfm_dist.jobs.validation import check_monitor_name, make_validate
from deepfm_dist.launcher import read_launch
from deepfm_dist.log import MetricsLog
from deepfm_dist.messages import plural
from deepfm_dist.recipe import Choice, that_hold, with_choice
from deepfm_dist.runs.folder import run_lock, write_plan
from deepfm_dist.runs.start import (
    Start,
    begin,
    inherited_settings,
    make_ready,
    read_start,
)
from deepfm_dist.runs.trained import open_dataset
from deepfm_dist.training.checks import warn_of_data, warn_of_rate_0
from deepfm_dist.training.profiling import check_profiled, profiler
from deepfm_dist.training.state import LoopState, NonFiniteLoss
from deepfm_dist.training.stopping import StopSignals
from deepfm_dist.training.trainer import Batches, Hooks, Pruned, Trainer

OnValidation = Callable[[Mapping[str, float], int], None]
"""Called on all ranks with the figures of every validation and its epoch."""

_RESTART_S = 150.0
"""Seconds that a restarted process waits for its predecessor's lock: a network mount may hold a
lost machine's lock for some time.
"""
_ORPHAN_S = 15.0
"""The same for other processes: ranks of a killed launcher need some seconds to exit."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        state: the state of the loop.
        stopped: whether a signal ended it early; the same command resumes it.
    """

    state: LoopState
    stopped: bool


def train(config: Config) -> Trained:
    """Trains a run on the launcher's ranks, or in this process. All ranks.

    Raises:
        CheckpointError: the checkpoint to resume from is missing or damaged.
        ConfigError: a setting does not fit the data, the device or the existing run.
        DataError: the data cannot be prepared.
        InUse: another process trains this run.
        NonFiniteLoss: the loss stayed NaN or infinite.
    """
    with process_group(*config.run.process_group) as world:
        return train_on(config, world)


def train_on(config: Config, world: World, on_validation: OnValidation | None = None) -> Trained:
    """Trains a run in an existing process group. All ranks.

    Args:
        config: the settings.
        world: the process group.
        on_validation: it may raise `Pruned`, on all ranks.

    Raises:
        Pruned: raised by ``on_validation``; checkpoints are complete by then.
        DeepFMError: see `train`.
    """
    trainer = config.trainer.on_ranks(world.world_size)
    config = config.model_copy(update={"trainer": trainer})
    patience_s = _RESTART_S if read_launch().restarted else _ORPHAN_S
    with world.hold_on_rank0(run_lock(config), patience_s):
        return _train_locked(config, world, on_validation)


def _train_locked(config: Config, world: World, on_validation: OnValidation | None) -> Trained:
    """`train_on` while rank 0 holds the run's lock."""
    saved = world.broadcast(world.run_on_rank0("prepare", lambda: _prepare(config)))
    assert saved is not None
    dataset = open_dataset(config, world)
    manifest = dataset.manifest
    config, choices = resolve(config, manifest, *saved)
    if world.is_first:
        _log_choices(choices)
    check_monitor_name(config)
    check_finish(config, manifest)
    first_order.check(config, manifest)
    dataset = _hold_out_items(config, dataset, world)
    batches = training_batches(config, dataset, world)
    last_step = config.trainer.last_step(batches.steps_per_epoch)
    check_profiled(config.trainer.profile_steps, last_step)
    start = world.broadcast(
        world.run_on_rank0(
            "begin", lambda: begin(config, manifest, last_step, is_finished(config, manifest))
        )
        or Start(None, LoopState())
    )
    if start.is_over:
        done = is_finished(config, manifest) or _finish(
            config, world, dataset, start.state, start.chosen
        )
        return Trained(start.state, stopped=not done)
    sharded, optimizer = shard_for_training(config, manifest, world)
    validate = make_validate(config, dataset, sharded, world)
    if world.is_first:
        for part in ("tables", "dense"):
            warn_of_rate_0(part, getattr(config.optimizer, part), last_step)
        warn_of_data(manifest)
    # From here on signals are deferred: a resumed run takes at least one step.
    with StopSignals() as asked_to_stop:
        run = _Run(
            config=config,
            world=world,
            dataset=dataset,
            sharded=sharded,
            optimizer=optimizer,
            state=start.state,
            choices=that_hold(start.chosen, choices, config),
        )
        run.make_ready(start)
        hooks = Hooks(validate, on_validation, asked_to_stop=asked_to_stop)
        if start.saved is None and config.model.linear == "logistic":
            run.put_first_order()
            hooks = replace(hooks, measure_start=config.monitor is not None)
        run.fit(batches, hooks)
    choices = run.choices
    del sharded, validate, run
    stopped = not start.state.is_over(config.trainer.patience, last_step)
    if not stopped:
        stopped = not _finish(config, world, dataset, start.state, choices)
    if stopped and world.is_first:
        text = "Stopped by signal at step %d; rerun the same command to resume"
        log.warning(text, start.state.step)
    return Trained(start.state, stopped)


def _log_choices(choices: Sequence[Choice]) -> None:
    if choices:
        log.info("chosen for this log:")
    for choice in choices:
        log.info("  %s", choice)


def _hold_out_items(config: Config, dataset: PreparedDataset, world: World) -> PreparedDataset:
    """The dataset with items held out for validation by ``trainer.hold_out``."""
    if not config.trainer.hold_out:
        return dataset
    dataset = hold_out(dataset, config.trainer.hold_out)
    assert dataset.held_out is not None
    n_items = len(dataset.held_out.values)
    if not n_items:
        raise ConfigError(
            f"trainer.hold_out={config.trainer.hold_out:g}: holds out no item of any user; "
            f"set a larger share, or 0"
        )
    if world.is_first:
        log.info(
            "no validation rows: %s of %s are held out until the last training (trainer.hold_out)",
            plural(n_items, "training item"),
            plural(int((dataset.held_out.lengths > 0).sum()), "user"),
        )
    return dataset


def _finish(
    config: Config,
    world: World,
    dataset: PreparedDataset,
    state: LoopState,
    choices: Sequence[Choice],
) -> bool:
    """Runs the steps after the loop; False if a signal stopped them."""
    with StopSignals() as asked_to_stop:
        return Finish(config, world, dataset, state, choices, asked_to_stop).run()


def _prepare(config: Config) -> tuple[dict[str, Any] | None, tuple[Choice, ...]]:
    """Prepares the data; returns what is inherited from an earlier run."""
    inherited = inherited_settings(config)
    prepare_locked(config)
    return inherited


@dataclass(frozen=True)
class _Run:
    """A run ready to train. All ranks call every method.

    Attributes:
        config: the settings.
        world: the ranks.
        dataset: the data.
        sharded: the model.
        optimizer: its optimizer.
        state: the state of the loop; updated by training.
        choices: what was chosen from the data.
    """

    config: Config
    world: World
    dataset: PreparedDataset
    sharded: DistributedModelParallel
    optimizer: CombinedOptimizer
    state: LoopState
    choices: list[Choice]

    def make_ready(self, start: Start) -> None:
        """Prepares the run's folder and loads the initial weights."""
        config, world = self.config, self.world
        world.run_on_rank0("make_ready", lambda: make_ready(config, start))
        if world.is_first:
            write_plan(config.run_dir, self.sharded, world)
        if start.saved is None:
            return
        if start.continues:
            load(start.saved.path, world, self.sharded, self.optimizer)
        else:
            read_start(start.saved, config, self.dataset, world, self.sharded, self.optimizer)

    def put_first_order(self) -> None:
        """Initialises first-order weights from a logistic regression."""
        choice = first_order.put_first_order(self.dataset, self.sharded, self.world)
        self.choices[:] = with_choice(self.choices, choice)

    def fit(self, batches: Batches, hooks: Hooks) -> None:
        """Trains to the end, or until a signal; checkpoints are complete afterwards."""
        config, world, state = self.config, self.world, self.state
        run_dir, steps = config.run_dir, config.trainer.profile_steps
        checkpoints = Checkpoints(run_dir, world, config.checkpoint.keep_last)
        listeners = loggers(config, world, state.step)
        metrics = MetricsLog(run_dir, world.is_first, state.step, listeners)
        float_bytes, targets = config.sharding.float_bytes, self.dataset.manifest.targets
        hooks = replace(
            hooks,
            save=partial(self._save, checkpoints, metrics),
            profiler=profiler(steps, state.step, run_dir, world),
            sent_bytes=partial(sent_bytes, self.sharded, world, float_bytes=float_bytes),
        )
        trainer = Trainer(
            self.sharded,
            self.optimizer,
            batches,
            world,
            config,
            seed=config.run.seed,
            state=state,
            metrics=metrics,
            hooks=hooks,
            target_weights=dict(zip(targets, config.trainer.weights_of(targets), strict=True)),
        )
        with closing(metrics):
            try:
                trainer.fit()
            except (NonFiniteLoss, Pruned, ConfigError):  # all ranks raise these, so they can wait
                checkpoints.close()
                raise
            checkpoints.close()

    def _save(self, checkpoints: Checkpoints, metrics: MetricsLog, state: LoopState) -> None:
        metrics.flush()
        # Keep the best one, the best one before an end that was extended, and the last good one.
        kept = [state.best_step, (state.before_end or state.best_state)[1], state.saved_step]
        if self.config.model.linear == "logistic":
            kept.append(0)  # the fitted start, to be blended with the best one
        marker = {
            **self.dataset.manifest.marks,
            "config": self.config.model_dump(mode="json"),
            "trainer": asdict(state),
            "chosen": [asdict(choice) for choice in self.choices],
        }
        steps = [step for step in kept if step is not None]
        if not state.step:
            make_state(self.optimizer)  # the state is created at the first step otherwise
        checkpoints.save(state.step, self.sharded, self.optimizer, marker, steps)
