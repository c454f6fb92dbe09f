"""``torchrun -m deepfm_dist.add_ease``: a trained model plus EASE -> a model of both."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from deepfm_dist.cli import run
from deepfm_dist.config import Config, config_from


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Write the closed-form ranker EASE into columns that a model has kept for it."
    return run("add_ease", description, _add, argv, _add_arguments)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="NAME", help="name of the run to make of it")
    parser.add_argument(
        "--l2", type=float, default=500.0, help="EASE's weight decay (default: %(default)g)"
    )
    parser.add_argument(
        "--weight",
        type=float,
        default=1.0,
        help="of EASE's scores beside the model's own logits (default: %(default)g)",
    )


def _add(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import ease_columns, ease_tables, shard_for_training
    from deepfm_dist.distributed import checkpoint
    from deepfm_dist.distributed.sharding import fill_columns
    from deepfm_dist.distributed.world import world
    from deepfm_dist.errors import CheckpointError
    from deepfm_dist.runs import find_finished
    from deepfm_dist.training.trainer import LoopState

    found = find_finished(config, arguments.overrides)
    trained_with = config_from(found.state["config"], origin=str(found.checkpoint))
    places = {"run": found.config.run, "data": found.config.data}
    made = trained_with.model_copy(update=places).renamed(arguments.to)
    if checkpoint.complete_steps(made.run_dir):
        raise CheckpointError(f"{made.run_dir}: has checkpoints already; choose another --to")
    with world(config.run.device, config.run.timeout_s, config.run.threads) as ranks:
        sharded, optimizer = shard_for_training(made, found.dataset.manifest, ranks)
        checkpoint.load(found.checkpoint, ranks, sharded, optimizer)
        values = ranks.agreed(
            ranks.first_does(
                "ease", lambda: ease_tables(made, found.dataset, arguments.l2, arguments.weight)
            )
        )
        assert values is not None
        fill_columns(sharded, values, ease_columns(made.model))
        step = found.state["step"]
        marker = {
            "vocabulary_hash": found.dataset.manifest.vocabulary_hash,
            "config": made.model_dump(mode="json"),
            "trainer": asdict(LoopState(step=step)),
        }
        checkpoints = checkpoint.Checkpoints(made.run_dir, ranks, made.checkpoint.keep_last)
        checkpoints.save(step, sharded, optimizer, marker)
        checkpoints.wait()
        if ranks.is_first:
            (made.run_dir / "config.yaml").write_text(made.to_yaml())
            print(checkpoint.checkpoint_path(made.run_dir, step))


if __name__ == "__main__":
    sys.exit(main())
