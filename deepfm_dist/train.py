"""``torchrun -m deepfm_dist.train``: a prepared dataset -> a checkpoint of a trained DeepFM."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from deepfm_dist.cli import run
from deepfm_dist.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("train", "Train a DeepFM, preparing the data if need be.", _train, argv)


def _train(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import bytes_of_a_float, loggers, schedule_of, shard_for_training
    from deepfm_dist.data.dataset import PreparedDataset, TrainingBatches
    from deepfm_dist.data.encode import prepare
    from deepfm_dist.distributed.checkpoint import Checkpoints, load
    from deepfm_dist.distributed.planning import sent_bytes
    from deepfm_dist.distributed.world import world
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.runs import begin
    from deepfm_dist.training.evaluation import HeldOut
    from deepfm_dist.training.profiling import profiler
    from deepfm_dist.training.stopping import StopSignals
    from deepfm_dist.training.trainer import LoopState, train

    run_dir, seed = config.run_dir, config.run.seed
    of_run = config.run
    with world(of_run.device, of_run.timeout_s, of_run.threads, of_run.deterministic) as ranks:
        ranks.first_does(
            "prepare", lambda: prepare(config.data, config.input_root, config.prepared_dir, seed)
        )
        dataset = PreparedDataset(config.prepared_dir, config.data.memory_bytes)
        batches = TrainingBatches(
            dataset, config.trainer.batch_size, ranks.rank, ranks.world_size, seed
        )
        schedule = schedule_of(config)
        sharded, optimizer = shard_for_training(config, dataset.manifest, ranks)
        held_out = HeldOut(dataset, "valid") if dataset.manifest.splits["valid"].rows else None

        path, state = ranks.agreed(
            ranks.first_does(
                "begin",
                lambda: begin(
                    config,
                    dataset.manifest,
                    schedule,
                    schedule.last_step(batches.steps_per_epoch),
                ),
            )
            or (None, LoopState())
        )
        if path is not None:
            load(path, ranks, sharded, optimizer, may_have_grown=state.step == 0)
        checkpoints = Checkpoints(run_dir, ranks, config.checkpoint.keep_last)
        belongs_to = {
            "vocabulary_hash": dataset.manifest.vocabulary_hash,
            "config": config.model_dump(mode="json"),
        }

        def save(state: LoopState) -> None:
            keep = [step for step in (state.best_step,) if step is not None]
            checkpoints.save(
                state.step, sharded, optimizer, {**belongs_to, "trainer": asdict(state)}, keep
            )

        with StopSignals() as asked_to_stop:
            train(
                sharded,
                optimizer,
                batches,
                ranks,
                schedule,
                state,
                seed,
                MetricsLog(run_dir, ranks.is_first, state.step, loggers(config, ranks)),
                (lambda: ranks.agreed(held_out.metrics(sharded, ranks))) if held_out else None,
                save,
                asked_to_stop,
                profiler(config.trainer.profile_steps, state.step, run_dir, ranks),
                partial(sent_bytes, sharded, ranks, float_bytes=bytes_of_a_float(config)),
            )
            checkpoints.wait()


if __name__ == "__main__":
    sys.exit(main())
