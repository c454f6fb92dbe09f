"""``torchrun -m deepfm_dist.predict``: score the rows of a file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.cli import add_output, run
from deepfm_dist.config import Config
from deepfm_dist.errors import DataError
from deepfm_dist.messages import plural
from deepfm_dist.storage import option_of, path_or_url

EXAMPLES = (
    "--config sample --input rows.csv --output scores.parquet",
    "torchrun --config mine.yaml --input rows.parquet",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("predict", "Score the rows of a file.", _predict, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", metavar="FILE", help="rows to score (default: the interactions file)"
    )
    add_output("parquet file (default: predictions.parquet of the run)", parser)


def _predict(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.jobs.predict import predict
    from deepfm_dist.runs.trained import parquet_output

    source = _source(config, arguments.input)
    target = parquet_output(arguments.output, config, source) if arguments.output else None
    parts = arguments.output_parts
    result = predict(config, source, target, arguments.overrides, parts)
    if result is not None:
        print(f"{result.path}: {plural(result.rows, 'row')} scored")


def _source(config: Config, given: str | None) -> str:
    """Path or URL of the rows to score."""
    from deepfm_dist.data.sources import find_file

    if given:
        source = option_of("--input", given, path_or_url)
    else:
        source = find_file(config.input_root, config.data.interactions.file, "--input")
    if "://" not in source and not Path(source).is_file():
        raise DataError(f"--input {source}: no such file")
    return source


if __name__ == "__main__":
    sys.exit(main())
