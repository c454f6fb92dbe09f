"""``python -m deepfm_dist.import_weights``: a notebook's state dict -> a checkpoint of ours."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.storage import option_of

EXAMPLES = (
    "model.pt --config notebook run.name=imported",
    "model.pt --config notebook --fields user,item,genre --ids genre=genres.txt",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Make a checkpoint of a notebook's DeepFM."
    return run("import_weights", description, _import, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="state dict, as torch.save wrote it")
    parser.add_argument(
        "--fields",
        metavar="A,B,C",
        help="the fields in the notebook's order (default: as in data.features)",
    )
    parser.add_argument(
        "--ids",
        action="append",
        default=[],
        metavar="FIELD=FILE",
        help="a field's ids in the notebook's order, one a line (default: sorted)",
    )


def _import(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.build import deepfm_of, shard_for_training
    from deepfm_dist.data.encode import prepare
    from deepfm_dist.distributed.checkpoint import Checkpoints, checkpoint_path, make_state
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.distributed.sharding import fill_tables
    from deepfm_dist.interop.notebook import from_notebook, read_weights
    from deepfm_dist.runs import before_replacing, open_dataset, run_lock
    from deepfm_dist.training.state import LoopState

    id_files = dict(_id_file(text) for text in arguments.ids)
    weights = read_weights(Path(option_of("FILE", arguments.file)))
    with (
        process_group(*config.run.process_group) as world,
        world.hold_on_rank0(run_lock(config)),
    ):
        world.run_on_rank0(
            "prepare",
            lambda: prepare(
                config.data,
                config.input_root,
                config.prepared_dir,
                config.data_seed,
                before_replacing=partial(before_replacing, config),
            ),
        )
        dataset = open_dataset(config, world)
        values, state = from_notebook(config.model, dataset, weights, id_files, arguments.fields)
        if any((config.run_dir / "checkpoints").glob("step_*")):
            raise CheckpointError(
                f"{config.run_dir}: has checkpoints already; give the import a run.name of its own"
            )
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        make_state(optimizer)  # a run may go on from the import
        fill_tables(sharded, values)
        deepfm_of(sharded).interaction_arch.load_state_dict(state)
        checkpoints = Checkpoints(config.run_dir, world, config.checkpoint.keep_last)
        marker = {
            **dataset.manifest.marks,
            "config": config.model_dump(mode="json"),
            "trainer": asdict(LoopState()),
        }
        checkpoints.save(0, sharded, optimizer, marker)
        checkpoints.close()
        if world.is_first:
            (config.run_dir / "config.yaml").write_text(config.to_yaml())
            print(f"{checkpoint_path(config.run_dir, 0)}: {len(values)} tables of {arguments.file}")


def _id_file(text: str) -> tuple[str, Path]:
    field, equals, file = text.partition("=")
    if not (field and equals and file):
        raise ConfigError(f"--ids {text}: give FIELD=FILE")
    return field, Path(option_of("--ids", file))


if __name__ == "__main__":
    sys.exit(main())
