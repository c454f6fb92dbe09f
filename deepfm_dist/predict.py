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
    from deepfm_dist.distributed.world import world
    from deepfm_dist.errors import ConfigError, DataError
    from deepfm_dist.runs import open_trained
    from deepfm_dist.training.prediction import predict

    if arguments.input and not Path(arguments.input).is_file():
        raise DataError(f"--input {arguments.input}: no such file")
    if arguments.output and Path(arguments.output).suffix != ".parquet":
        better = Path(arguments.output).with_suffix(".parquet")
        raise ConfigError(f"--output {arguments.output}: predictions are parquet; call it {better}")
    with world(config.run.device, config.run.timeout_s, config.run.threads) as ranks:
        trained = open_trained(config, arguments.overrides, ranks)
        data = trained.config.data
        source = Path(arguments.input or _only_file(config, data.interactions.file))
        target = Path(arguments.output or config.output_dir / "predictions.parquet")
        layout = data.files.get(source.name) or data.files.get(data.interactions.file)
        rows = predict(trained.sharded, ranks, trained.dataset, source, layout, target)
        if ranks.is_first:
            print(f"{target}: {rows:,} rows scored")


def _only_file(config: Config, name: str) -> str:
    """The interactions file, where there is one."""
    from deepfm_dist.data.sources import find_files
    from deepfm_dist.errors import ConfigError

    files = find_files(config.data_root, name)
    if len(files) > 1:
        raise ConfigError(f"--input: {name} stands for {len(files)} files; say which one to score")
    return files[0].path


if __name__ == "__main__":
    sys.exit(main())
