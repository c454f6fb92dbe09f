"""``torchrun -m deepfm_dist.add_ease``: a trained FM plus EASE -> one wider FM of both."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from deepfm_dist.cli import run
from deepfm_dist.config import Config, ShardingConfig, config_from

EXAMPLES = (
    "--config aistages_ranking --to both --weight 96",
    "--run runs/mine --to mine_and_ease --columns 128",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Widen a trained FM by the closed-form ranker EASE."
    return run("add_ease", description, _add, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="NAME", help="name of the run to make of it")
    parser.add_argument(
        "--columns",
        type=int,
        default=256,
        help="of the factors, for EASE (default: %(default)d)",
    )
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
    from torch.nn.functional import pad

    from deepfm_dist.build import deepfm_of, ease_tables, shard_for_training
    from deepfm_dist.distributed import checkpoint
    from deepfm_dist.distributed.sharding import widen
    from deepfm_dist.distributed.world import world
    from deepfm_dist.errors import CheckpointError, ConfigError
    from deepfm_dist.runs import find_finished
    from deepfm_dist.training.trainer import LoopState

    if arguments.columns < 1:
        raise ConfigError(f"--columns {arguments.columns}: must be 1 or more")
    found = find_finished(config, arguments.overrides)
    trained_with = config_from(found.state["config"], origin=str(found.checkpoint))
    places = {"run": found.config.run, "data": found.config.data}
    narrow = trained_with.model_copy(update=places)
    made = narrow.renamed(arguments.to).widened(arguments.columns)
    if checkpoint.complete_steps(made.run_dir):
        raise CheckpointError(f"{made.run_dir}: has checkpoints already; choose another --to")
    with world(config.run.device, config.run.timeout_s, config.run.threads) as ranks:
        values = ranks.agreed(
            ranks.first_does(
                "ease",
                lambda: ease_tables(
                    narrow.model,
                    found.dataset,
                    arguments.columns,
                    arguments.l2,
                    arguments.weight,
                ),
            )
        )
        assert values is not None
        whole = {"sharding": ShardingConfig(kind="table_wise")}  # the same places in both
        manifest = found.dataset.manifest
        before, _ = shard_for_training(narrow.model_copy(update=whole), manifest, ranks)
        checkpoint.load(found.checkpoint, ranks, before)
        sharded, optimizer = shard_for_training(made.model_copy(update=whole), manifest, ranks)
        checkpoint.make_state(optimizer)  # a run may go on from it
        widen(before, sharded, narrow.model.embedding_dim, arguments.columns, values)
        above = deepfm_of(before).interaction_arch.state_dict()
        if "dense_factors" in above:
            above["dense_factors"] = pad(above["dense_factors"], (0, arguments.columns))
        deepfm_of(sharded).interaction_arch.load_state_dict(above)
        step = found.state["step"]
        marker = {
            **found.dataset.manifest.hashes,
            "config": made.model_dump(mode="json"),
            "trainer": asdict(LoopState(step=step)),
        }
        checkpoints = checkpoint.Checkpoints(made.run_dir, ranks, made.checkpoint.keep_last)
        checkpoints.save(step, sharded, optimizer, marker)
        checkpoints.close()
        if ranks.is_first:
            (made.run_dir / "config.yaml").write_text(made.to_yaml())
            print(checkpoint.checkpoint_path(made.run_dir, step))


if __name__ == "__main__":
    sys.exit(main())
