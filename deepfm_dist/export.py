"""``python -m deepfm_dist.export``: write a model for code without TorchRec."""

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
    "",
    "--config mine.yaml --output /models/mine --max-file-bytes 2000000000",
    "--config mine.yaml --format onnx --tables int8",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run(
        "export",
        "Write a model for code without TorchRec: its weights, or one scoring graph.",
        _export,
        argv,
        _add_arguments,
        EXAMPLES,
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=("safetensors", "onnx", "aoti"),
        default="safetensors",
        help="safetensors: weights for your own code; onnx, aoti: one scoring graph, for "
        "onnxruntime or for C++ with libtorch (default: %(default)s)",
    )
    parser.add_argument(
        "--tables",
        choices=("fp32", "fp16", "int8"),
        help="precision of the tables inside a graph (default: fp32)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder to write (default: export of the run; for graphs export-onnx, export-aoti)",
    )
    parser.add_argument(
        "--max-file-bytes",
        type=int,
        metavar="N",
        help="bytes of weights in one file (default: 5000000000)",
    )


def _export(config: Config, arguments: argparse.Namespace) -> None:
    from deepfm_dist.interop.graph import Precision
    from deepfm_dist.jobs.export import export, export_graph
    from deepfm_dist.runs.trained import find_run

    max_file_bytes, kind = arguments.max_file_bytes, arguments.format
    if max_file_bytes is not None and max_file_bytes < 1:
        raise ConfigError(f"--max-file-bytes {max_file_bytes}: must be positive")
    output = Path(option_of("--output", arguments.output)) if arguments.output else None
    if kind == "safetensors":
        if arguments.tables is not None:
            raise ConfigError(
                f"--tables {arguments.tables}: weights are written as they were trained; leave it "
                f"out, or use --format onnx or --format aoti"
            )
        result = export(find_run(config, arguments.overrides), output, max_file_bytes)
        n_tensors, n_tables = plural(result.n_tensors, "tensor"), plural(result.n_tables, "table")
        print(f"{result.folder}: {n_tensors}, {n_tables}")
        return
    if max_file_bytes is not None:
        raise ConfigError(
            f"--max-file-bytes {max_file_bytes}: a graph is one file; leave it out, or use "
            f"--format safetensors"
        )
    tables: Precision = arguments.tables or "fp32"
    graph = export_graph(config, arguments.overrides, kind, tables, output)
    print(
        f"{graph.file}: {plural(graph.n_inputs, 'input')}, {graph.tables_bytes / 1e6:,.1f} MB of "
        f"{tables} tables; logits differ from the model's by at most {graph.difference:.1g} of the "
        f"largest"
    )


if __name__ == "__main__":
    sys.exit(main())
