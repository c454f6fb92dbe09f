"""``python -m deepfm_dist.export``: a run's model as safetensors, for code without TorchRec."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError

if TYPE_CHECKING:
    from deepfm_dist.runs import RunOnDisk

MAX_FILE_BYTES = 5_000_000_000
EXAMPLES = ("", "--config mine.yaml --output /models/mine --max-file-bytes 2000000000")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("export", "Write a model as safetensors.", _export, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder to write (default: export of the run)"
    )
    parser.add_argument(
        "--max-file-bytes",
        type=int,
        default=MAX_FILE_BYTES,
        metavar="N",
        help="bytes of weights in one file (default: %(default)s)",
    )


def _export(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.runs import find_run
    from deepfm_dist.storage import option_of

    if arguments.max_file_bytes < 1:
        raise ConfigError(f"--max-file-bytes {arguments.max_file_bytes}: must be positive")
    output = option_of("--output", arguments.output) if arguments.output else None
    found = find_run(config, arguments.overrides)
    target = Path(output or found.config.output_dir / "export")
    tensors = export(found, target, arguments.max_file_bytes)
    print(f"{target}: {tensors} tensors, {len(found.dataset.manifest.tables)} tables")


def export(found: "RunOnDisk", target: Path, max_file_bytes: int = MAX_FILE_BYTES) -> int:
    """Writes a finished run's model into a folder.

    Args:
        found: the run.
        target: the folder, which may hold an earlier export.
        max_file_bytes: bytes of weights in one file.

    Returns:
        How many tensors there are.
    """
    from deepfm_dist.distributed.checkpoint import check_files
    from deepfm_dist.interop.safetensors import (
        copy_vocabularies,
        describe_fields,
        export_folder,
        write_config,
        write_weights,
    )

    check_files(found.checkpoint)
    model = found.config.model
    with export_folder(target) as folder:
        columns = model.embedding_dim + 1 if model.fm or model.deep else 1
        weights = write_weights(found.checkpoint, folder, columns, max_file_bytes)
        copy_vocabularies(found.dataset, folder)
        write_config(
            folder,
            run=found.config.run.name,
            **found.identity,
            model=model.model_dump(mode="json"),
            fields=describe_fields(found.dataset),
        )
    return len(weights)


if __name__ == "__main__":
    sys.exit(main())
