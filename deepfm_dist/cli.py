"""What every command shares: arguments, start-up check, exit codes."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from deepfm_dist.config import Config, load_config
from deepfm_dist.errors import DeepFMError, RankLost

# Before torch is imported: its reducer would remark on `find_unused_parameters` (see sharding.py).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

EXIT_OK, EXIT_INTERRUPTED = 0, 130

_EXAMPLES = """\
examples:
  python -m deepfm_dist.{name}
  python -m deepfm_dist.{name} --config sample model.embedding_dim=32
  torchrun --nproc_per_node=4 -m deepfm_dist.{name} --config my.yaml data.root=/data
"""


def run(
    name: str,
    description: str,
    work: Callable[[Config, argparse.Namespace], None],
    argv: Sequence[str] | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parses the command line, checks the installation, calls the work.

    Args:
        name: of the command.
        description: one line for --help.
        work: takes the configuration and the command's own arguments.
        argv: arguments; default: the process's.
        add_arguments: adds the command's own arguments.

    Returns:
        0 done, 2 the user's mistake (one line on stderr). A bug leaves its traceback, and 1.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m deepfm_dist.{name}",
        description=description,
        epilog=_EXAMPLES.format(name=name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file or name of a bundled one (default: sample)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument("--quiet", action="store_true", help="print results and errors only")
    if add_arguments:
        add_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings to override"
    )
    arguments = parser.parse_intermixed_args(argv)
    _log_to_stderr(arguments.quiet)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(config.to_yaml(), end="")
            return EXIT_OK
        from deepfm_dist.environment import require

        require(config.run.device)
        work(config, arguments)
    except DeepFMError as error:
        # Every rank of a launch makes the same mistake; rank 0 says so. A mistake of one rank
        # alone shows as root cause in torchrun's own summary.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankLost):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        _tell_torchrun(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        _tell_torchrun(error)
        raise
    return EXIT_OK


def _tell_torchrun(error: Exception) -> None:
    """Writes the error where torchrun looks for a root cause, if torchrun is there."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _log_to_stderr(quiet: bool) -> None:
    """Our lines at INFO, others' from WARNING on, without the noise we know to be harmless."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if is_first and not quiet else logging.WARNING
    logging.getLogger("deepfm_dist").setLevel(level)
    for noisy in ("torchrec", "fbgemm_gpu", "torch.distributed.checkpoint"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # their errors reach us as exceptions
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        # What torch and torchrec say about each other is not the user's to cure.
        warnings.filterwarnings("ignore", category=category, module=r"torch(rec)?(\.|$)")
