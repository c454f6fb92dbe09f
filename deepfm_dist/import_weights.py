"""``python -m deepfm_dist.import_weights``: convert a notebook's state dict to a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.storage import option_of

EXAMPLES = (
    "model.pt --config notebook run.name=imported",
    "model.pt --config notebook --fields user,item,genre --ids genre=genres.txt",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Convert a notebook's DeepFM to a checkpoint."
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
    from deepfm_dist.jobs.import_weights import import_weights

    id_files = dict(_id_file(text) for text in arguments.ids)
    file = Path(option_of("FILE", arguments.file))
    result = import_weights(config, file, id_files, arguments.fields)
    if result is not None:
        print(f"{result.checkpoint}: {plural(result.n_tables, 'table')} of {arguments.file}")


def _id_file(text: str) -> tuple[str, Path]:
    field, equals, file = text.partition("=")
    if not (field and equals and file):
        raise ConfigError(f"--ids {text}: give FIELD=FILE")
    return field, Path(option_of("--ids", file))


if __name__ == "__main__":
    sys.exit(main())
