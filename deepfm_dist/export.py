"""``python -m deepfm_dist.export``: write a model as safetensors, for code without TorchRec."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.storage import option_of

EXAMPLES = ("", "--config mine.yaml --output /models/mine --max-file-bytes 2000000000")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "export",
        "Write a model as safetensors, for code without TorchRec.",
        _export,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder to write (default: export of the run)"
    )
    parser.add_argument(
        "--max-file-bytes",
        type=int,
        metavar="N",
        help="bytes of weights in one file (default: 5000000000)",
    )


def _export(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.export import export
    from deepfm_dist.runs.trained import find_run

    max_file_bytes = arguments.max_file_bytes
    if max_file_bytes is not None and max_file_bytes < 1:
        raise ConfigError(f"--max-file-bytes {max_file_bytes}: must be positive")
    output = Path(option_of("--output", arguments.output)) if arguments.output else None
    result = export(find_run(config, arguments.overrides), output, max_file_bytes)
    print(
        f"{result.folder}: {plural(result.n_tensors, 'tensor')}, {plural(result.n_tables, 'table')}"
    )


if __name__ == "__main__":
    sys.exit(main())
