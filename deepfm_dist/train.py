"""``torchrun -m deepfm_dist.train``: a prepared dataset -> a checkpoint of a trained DeepFM."""

import argparse
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("train", "Train a DeepFM, preparing the data if need be.", _train, argv)


def _train(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import shard_for_training
    from deepfm_dist.data.dataset import PreparedDataset, TrainingBatches
    from deepfm_dist.data.encode import prepare
    from deepfm_dist.distributed import checkpoint
    from deepfm_dist.distributed.optimizers import combined_optimizer, table_optimizer
    from deepfm_dist.distributed.world import world
    from deepfm_dist.log import MetricsLog
    from deepfm_dist.training.evaluation import HeldOut
    from deepfm_dist.training.trainer import Schedule, train

    run_dir, seed = config.run_dir, config.run.seed
    with world(config.run.device, config.run.timeout_s, config.run.threads) as ranks:
        ranks.first_does(
            "prepare", lambda: prepare(config.data, config.input_root, config.prepared_dir, seed)
        )
        dataset = PreparedDataset(config.prepared_dir, config.data.memory_bytes)
        manifest = dataset.manifest
        batches = TrainingBatches(
            dataset, config.trainer.batch_size, ranks.rank, ranks.world_size, seed
        )
        of_tables, of_dense = config.optimizer.tables, config.optimizer.dense
        tables = table_optimizer(of_tables.name, of_tables.lr, of_tables.eps, ranks.device)
        sharded = shard_for_training(config, manifest, ranks, tables)
        optimizer = combined_optimizer(sharded, tables, of_dense.name, of_dense.lr)

        metrics = MetricsLog(run_dir, ranks.is_first, fresh=True)
        ranks.first_does("run", lambda: _new_run(config))
        held_out = HeldOut(dataset, "valid") if manifest.splits["valid"].rows else None

        def save(step: int) -> None:
            state = {
                "step": step,
                "vocabulary_hash": manifest.vocabulary_hash,
                "config": config.model_dump(mode="json"),
            }
            path = checkpoint.checkpoint_path(run_dir, step)
            checkpoint.save(path, ranks, sharded, optimizer, state)

        train(
            sharded,
            optimizer,
            batches,
            ranks,
            Schedule(**config.trainer.model_dump(exclude={"batch_size"})),
            seed,
            metrics,
            (lambda: held_out.metrics(sharded, ranks)) if held_out else None,
            save,
        )


def _new_run(config: Config) -> None:
    """Clears the run folder of an earlier run's checkpoints; writes the resolved configuration."""
    from deepfm_dist.distributed import checkpoint

    checkpoint.remove_all(config.run_dir)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())


if __name__ == "__main__":
    sys.exit(main())
