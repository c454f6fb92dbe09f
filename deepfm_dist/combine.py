"""``torchrun -m deepfm_dist.combine``: trained FMs, and EASE, in one wider FM."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict

from deepfm_dist.cli import run
from deepfm_dist.config import Config, config_from
from deepfm_dist.distributed.settings import ShardingConfig

EXAMPLES = (
    "--config aistages_ranking --ease 96 --to both",
    "--config mine.yaml --of seed1,seed2,seed3 --to mean",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Put trained FMs, and the closed-form ranker EASE, into one wider FM."
    return run("combine", description, _combine, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", required=True, metavar="NAME", help="name of the run to make")
    parser.add_argument(
        "--of",
        metavar="A,B,C",
        help="names of the runs, the mean of whose logits counts (default: run.name alone)",
    )
    parser.add_argument(
        "--ease",
        type=float,
        metavar="WEIGHT",
        help="of EASE's scores beside these logits (default: no EASE)",
    )
    parser.add_argument(
        "--ease-columns",
        type=int,
        default=256,
        help="of the factors, for EASE (default: %(default)d)",
    )
    parser.add_argument(
        "--ease-l2", type=float, default=500.0, help="EASE's weight decay (default: %(default)g)"
    )
    parser.add_argument(
        "--ease-fields",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="EASE also sees, for each value of an item's field (a genre, a director), so many "
        "users who have all its items (default: %(default)g)",
    )


def _combine(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import deepfm_of, shard_for_training
    from deepfm_dist.distributed import checkpoint
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.distributed.sharding import local_shards
    from deepfm_dist.errors import CheckpointError, ConfigError
    from deepfm_dist.interop.combine import add_dense, add_tables, ease_tables, put_columns
    from deepfm_dist.runs import find_run, run_lock
    from deepfm_dist.storage import write_errors_to_user
    from deepfm_dist.training.state import LoopState

    with_ease = arguments.ease is not None
    columns = arguments.ease_columns if with_ease else 0
    if with_ease and columns < 1:
        raise ConfigError(f"--ease-columns {columns}: must be 1 or more")
    if with_ease and not math.isfinite(arguments.ease):
        raise ConfigError(f"--ease {arguments.ease}: must be a number")
    if not 0 < arguments.ease_l2 < math.inf:
        raise ConfigError(f"--ease-l2 {arguments.ease_l2:g}: must be above 0")
    if not 0 <= arguments.ease_fields < math.inf:
        raise ConfigError(f"--ease-fields {arguments.ease_fields:g}: must be 0 or more")
    names = arguments.of.split(",") if arguments.of else [config.run.name]
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"--of {arguments.of}: give names of runs, each once: A,B,C")
    found = [find_run(config.called(name), arguments.overrides) for name in names]
    dataset = found[0].dataset
    narrow = [
        config_from(f.state["config"], origin=str(f.checkpoint)).model_copy(
            update={"run": f.config.run, "data": f.config.data}
        )
        for f in found
    ]
    for source, one in zip(found, narrow, strict=True):
        if source.state["vocabulary_hash"] != dataset.manifest.vocabulary_hash:
            raise CheckpointError(
                f"{source.checkpoint}: of vocabulary {source.state['vocabulary_hash']}, not "
                f"{dataset.manifest.vocabulary_hash} as {found[0].checkpoint}; what is put "
                f"together has one: train them with the same data.seed"
            )
        _check_can_be_widened(one, narrow[0])
    width = columns + sum(one.model.embedding_dim for one in narrow)
    made = narrow[0].renamed(arguments.to).with_columns(width)
    with (
        process_group(*config.run.process_group) as world,
        world.hold_on_rank0(run_lock(made)),
    ):
        if checkpoint.complete_steps(made.run_dir):
            raise CheckpointError(f"{made.run_dir}: has checkpoints already; choose another --to")
        whole = {"sharding": ShardingConfig(kind="table_wise")}  # the same places in all
        manifest = dataset.manifest
        sharded, optimizer = shard_for_training(made.model_copy(update=whole), manifest, world)
        checkpoint.make_state(optimizer)  # a run may go on from it
        for *_, rows in local_shards(sharded):
            rows.zero_()
        arch = deepfm_of(sharded).interaction_arch
        for parameter in arch.parameters():
            parameter.data.zero_()
        at, share = 0, 1 / len(found)
        for source, one in zip(found, narrow, strict=True):
            part, _ = shard_for_training(one.model_copy(update=whole), manifest, world)
            checkpoint.load(source.checkpoint, world, part)
            dim = one.model.embedding_dim
            add_tables(part, sharded, (dim, width), at, share)
            add_dense(deepfm_of(part).interaction_arch, arch, at, share)
            at += dim
        if with_ease:
            values = world.broadcast(
                world.run_on_rank0(
                    "ease",
                    lambda: ease_tables(
                        dataset,
                        columns,
                        arguments.ease_l2,
                        arguments.ease,
                        arguments.ease_fields,
                    ),
                )
            )
            assert values is not None
            put_columns(sharded, at, values)
        step = max(source.state["step"] for source in found)
        marker = {
            **manifest.marks,
            "config": made.model_dump(mode="json"),
            "trainer": asdict(LoopState(step=step)),
        }
        checkpoints = checkpoint.Checkpoints(made.run_dir, world, made.checkpoint.keep_last)
        checkpoints.save(step, sharded, optimizer, marker)
        checkpoints.close()
        if world.is_first:
            with write_errors_to_user(made.run_dir):
                (made.run_dir / "config.yaml").write_text(made.to_yaml())
            print(checkpoint.checkpoint_path(made.run_dir, step))


def _check_can_be_widened(config: Config, like: Config) -> None:
    """Refuses what cannot be put beside another model as more columns of factors.

    Raises:
        ConfigError: the model has a deep part or no pairwise one, or is of other fields than
            ``like`` or treats them otherwise.
    """
    from deepfm_dist.errors import ConfigError

    model = config.model
    if model.deep or not model.fm:
        raise ConfigError(
            f"combine: {config.run.name} has model.deep={model.deep}, model.fm={model.fm}: more "
            f"columns are for a pairwise part alone, a deep part would read them too; train with "
            f"model.deep=false"
        )
    for name in ("first_order", "fm_pairs"):
        ours, others = getattr(model, name), getattr(like.model, name)
        if ours != others:
            raise ConfigError(
                f"combine: {config.run.name} has model.{name}={ours}, {like.run.name} {others}; "
                f"train both with the same"
            )
    for name in ("features", "history"):
        if getattr(config.data, name) != getattr(like.data, name):
            raise ConfigError(
                f"combine: {config.run.name} and {like.run.name} have other data.{name}; train "
                f"both with the same"
            )


if __name__ == "__main__":
    sys.exit(main())
