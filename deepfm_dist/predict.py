"""``torchrun -m deepfm_dist.predict``: a score for each row of a file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deepfm_dist.cli import run
from deepfm_dist.config import Config

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
    parser.add_argument(
        "--output", metavar="FILE", help="parquet file (default: predictions.parquet of the run)"
    )


def _predict(config: Config, arguments: argparse.Namespace) -> None:
    scored = write_predictions(config, arguments.input, arguments.output, arguments.overrides)
    if scored is not None:
        target, rows = scored
        print(f"{target}: {rows:,} rows scored")


def write_predictions(
    config: Config,
    source: str | None = None,
    output: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[Path, int] | None:
    """Scores the rows of a file. All ranks.

    Args:
        config: the settings.
        source: path or URL of the file; None: the interactions file.
        output: the parquet file to write; None: ``predictions.parquet`` of the run.
        overrides: of the command line.

    Returns:
        On rank 0 the file written and its number of rows; None elsewhere.
    """
    from deepfm_dist.data.manifest import check_formats
    from deepfm_dist.data.sources import find_file
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.errors import ConfigError, DataError
    from deepfm_dist.runs import open_trained
    from deepfm_dist.storage import option_of, path_or_url
    from deepfm_dist.training.prediction import predict

    if source:
        source = option_of("--input", source, path_or_url)
    else:
        source = find_file(config.input_root, config.data.interactions.file, "--input")
    output = option_of("--output", output) if output else None
    if "://" not in source and not Path(source).is_file():
        raise DataError(f"--input {source}: no such file")
    if output and Path(output).suffix != ".parquet":
        better = Path(output).with_suffix(".parquet")
        raise ConfigError(f"--output {output}: predictions are parquet; use --output {better}")
    with process_group(*config.run.process_group) as world:
        trained = open_trained(config, overrides, world)
        target = Path(output or config.output_dir / "predictions.parquet")
        check_formats(trained.config.data, Path(source).name)
        files = trained.config.data.files
        rows = predict(trained.sharded, world, trained.dataset, source, files, target)
        return (target, rows) if world.is_first else None


if __name__ == "__main__":
    sys.exit(main())
