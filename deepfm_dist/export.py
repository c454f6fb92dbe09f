"""``python -m deepfm_dist.export``: a run's model as safetensors, for code without TorchRec."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.cli import run
from deepfm_dist.config import Config

MAX_FILE_BYTES = 5_000_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("export", "Write a model as safetensors.", _export, argv, _add_arguments)


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
    from deepfm_dist.data.export import copy_vocabularies, describe_fields
    from deepfm_dist.distributed.checkpoint import check_files
    from deepfm_dist.distributed.export import export_folder, write_config, write_weights
    from deepfm_dist.runs import find_finished

    found = find_finished(config, arguments.overrides)
    check_files(found.checkpoint)
    target = Path(arguments.output or found.config.run_dir / "export")
    model = found.config.model
    with export_folder(target) as folder:
        columns = model.embedding_dim + 1 if model.fm or model.deep else 1
        weights = write_weights(found.checkpoint, folder, columns, arguments.max_file_bytes)
        copy_vocabularies(found.dataset, folder)
        write_config(
            folder,
            run=found.config.run.name,
            step=found.state["step"],
            vocabulary_hash=found.state["vocabulary_hash"],
            model=model.model_dump(mode="json"),
            fields=describe_fields(found.dataset),
        )
    print(f"{target}: {len(weights)} tensors, {len(found.dataset.manifest.tables)} tables")


if __name__ == "__main__":
    sys.exit(main())
