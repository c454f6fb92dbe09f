"""``torchrun -m deepfm_dist.train``: a prepared dataset -> a checkpoint of a trained DeepFM."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config

EXAMPLES = (
    "",
    "--config sample model.embedding_dim=32 optimizer.tables.lr=0.1",
    "torchrun --config mine.yaml trainer.monitor=auc trainer.patience=2",
)

_RESTART_S = 150.0
"""Seconds for which a restarted process waits for the lock of the one before it: a network mount
may keep that of a lost machine for a while."""
_ORPHAN_S = 15.0
"""The same for others: the ranks of a launcher that was killed need some seconds to end."""
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from deepfm_dist.distributed.process_group import World
    from deepfm_dist.training.state import LoopState


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "train", "Train a DeepFM, preparing the data if need be.", _train, argv, None, EXAMPLES
    )


def _train(config: Config, arguments: argparse.Namespace) -> None:
    train_run(config)


def train_run(config: Config) -> None:
    """Trains a run on the ranks that a launcher has started, or alone. All ranks."""
    from deepfm_dist.distributed.process_group import process_group

    with process_group(*config.run.process_group) as world:
        train_on(config, world)


def train_on(
    config: Config,
    world: "World",
    on_validation: Callable[[Mapping[str, float], int], None] | None = None,
) -> tuple["LoopState", bool]:
    """Prepares the data if need be, and trains. All ranks.

    Args:
        config: the settings.
        world: the process group.
        on_validation: called on all ranks with every validation's figures and its epoch; it may
            raise `Pruned`, on all of them.

    Returns:
        The state of the loop, and whether a signal ended it before its time.

    Raises:
        Pruned: as ``on_validation`` did; what was being saved is whole by then.
        InUse: another process trains this run.
    """
    from deepfm_dist.launcher import read_launch
    from deepfm_dist.runs import run_lock

    with world.hold_on_rank0(
        run_lock(config), _RESTART_S if read_launch().restarted else _ORPHAN_S
    ):
        return _train_alone(config, world, on_validation)


def _train_alone(
    config: Config, world: "World", on_validation: Callable[[Mapping[str, float], int], None] | None
) -> tuple["LoopState", bool]:
    """`train_on`, of the process that holds the run's lock."""
    from deepfm_dist.build import (
        check_monitor_name,
        loggers,
        shard_for_training,
        training_batches,
        validation_of,
    )
    from deepfm_dist.data.encode import prepare
    from deepfm_dist.distributed.checkpoint import Checkpoints, load
    from deepfm_dist.distributed.planning import sent_bytes
    from deepfm_dist.errors import ConfigError
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.runs import (
        Start,
        before_replacing,
        begin,
        check_settings,
        make_ready,
        open_dataset,
        read_start,
        write_plan,
    )
    from deepfm_dist.training.checks import warn_of_labels, warn_of_numbers
    from deepfm_dist.training.profiling import check_profiled, profiler
    from deepfm_dist.training.state import LoopState, NonFiniteLoss
    from deepfm_dist.training.stopping import StopSignals
    from deepfm_dist.training.trainer import Hooks, Pruned, Trainer

    run_dir = config.run_dir

    def prepare_data() -> None:
        check_settings(config)
        prepare(
            config.data,
            config.input_root,
            config.prepared_dir,
            config.data_seed,
            before_replacing=partial(before_replacing, config),
        )

    world.run_on_rank0("prepare", prepare_data)
    dataset = open_dataset(config, world)
    batches = training_batches(config, dataset, world)
    check_monitor_name(config)
    last = config.trainer.last_step(batches.steps_per_epoch)
    check_profiled(config.trainer.profile_steps, last)
    start = world.broadcast(
        world.run_on_rank0("begin", lambda: begin(config, dataset.manifest, last))
        or Start(None, LoopState())
    )
    path, state = start.path, start.state
    if start.is_over:
        return state, False
    sharded, optimizer = shard_for_training(config, dataset.manifest, world)
    validate = validation_of(config, dataset, sharded, world)
    if world.is_first:
        warn_of_numbers(dataset.manifest)
        warn_of_labels(dataset.manifest)

    with StopSignals() as asked_to_stop:  # a run that is yet to go on takes a step, then
        world.run_on_rank0("make_ready", lambda: make_ready(config, start))
        if world.is_first:
            write_plan(run_dir, sharded, world)
        if path is not None:
            if start.continues:
                load(path, world, sharded, optimizer)
            else:
                read_start(path, config, dataset.manifest, world, sharded, optimizer)
        checkpoints = Checkpoints(run_dir, world, config.checkpoint.keep_last)
        belongs_to = {
            **dataset.manifest.marks,
            "config": config.model_dump(mode="json"),
        }

        def save(state: LoopState) -> None:
            metrics.flush()
            # The best one, that of a longer run, and the last before steps were skipped.
            kept = [state.best_step, (state.before_end or state.best_state)[1], state.saved_step]
            keep = [step for step in kept if step is not None]
            checkpoints.save(
                state.step, sharded, optimizer, {**belongs_to, "trainer": asdict(state)}, keep
            )

        listeners = loggers(config, world, state.step)
        metrics = MetricsLog(run_dir, world.is_first, state.step, listeners)
        with closing(metrics):
            try:
                Trainer(
                    sharded,
                    optimizer,
                    batches,
                    world,
                    config,
                    seed=config.run.seed,
                    state=state,
                    metrics=metrics,
                    hooks=Hooks(
                        validate,
                        on_validation,
                        save,
                        asked_to_stop,
                        profiler(config.trainer.profile_steps, state.step, run_dir, world),
                        partial(
                            sent_bytes, sharded, world, float_bytes=config.sharding.float_bytes
                        ),
                    ),
                ).fit()
            except (NonFiniteLoss, Pruned, ConfigError):  # all ranks raise these: they can wait
                checkpoints.close()
                raise
            checkpoints.close()
    stopped = not state.is_over(config.trainer.patience, last)
    if stopped and world.is_first:
        log.warning("Stopped by signal at step %d; rerun the same command to resume", state.step)
    return state, stopped


if __name__ == "__main__":
    sys.exit(main())
