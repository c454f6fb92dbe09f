"""Code shared by all commands: arguments, start-up check, exit codes."""

import argparse
import atexit
import gc
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deepfm_dist.arguments import (
    EXAMPLES,
    Parser,
    as_typed,
    bundled_as_text,
    complete,
    complete_config,
)
from deepfm_dist.config import Config, config_from, load_config
from deepfm_dist.environment import quieten_libraries, require
from deepfm_dist.errors import ConfigError, DeepFMError, OutOfMemory, RankLost
from deepfm_dist.launcher import (
    Launch,
    read_launch,
    report_to_torchrun,
    wait_for_the_end,
    watch_torchrun,
)
from deepfm_dist.messages import brief
from deepfm_dist.storage import folder_of, follow_pointer, storage_errors_to_user
from deepfm_dist.terminal import print_error
from deepfm_dist.typed_yaml import settings_of

if TYPE_CHECKING:
    from deepfm_dist.jobs.ranking_files import Rankings

# Garbage collection at exit would visit all of torch's objects, which takes a second or more.
atexit.register(gc.freeze)

log = logging.getLogger("deepfm_dist")

EXIT_OK, EXIT_INTERRUPTED = 0, 130

_ALWAYS = (
    *("run.name", "run.runs_root", "run.prepared_root", "run.cache_root", "run.threads"),
    "data",
)
_INFERENCE = (
    *(*_ALWAYS, "run.device", "run.deterministic", "run.timeout_s"),
    *("model", "sharding.kind", "checkpoint.use"),
)
_TRAINING = (
    *("run", "data", "model", "optimizer", "sharding", "trainer", "checkpoint"),
    *("evaluate.k", "evaluate.mask_seen", "recommend.context"),
)
SETTINGS_USED = {
    "prepare": (*_ALWAYS, "run.seed"),
    "train": _TRAINING,
    "evaluate": (
        *(*_INFERENCE, "evaluate", "recommend.context", "recommend.cold_items"),
        *("recommend.popularity_penalty", "recommend.diversity"),
        *("recommend.at_most", "recommend.rerank"),
    ),
    "recommend": (*_INFERENCE, "recommend"),
    "similar": (*_INFERENCE, "similar", "recommend.cold_items"),
    "predict": _INFERENCE,
    # Settings of recommend and similar that a service would ignore are refused.
    "serve": (*_ALWAYS, "run.timeout_s", "model", "checkpoint.use", "recommend", "similar"),
    "export": (*_ALWAYS, "model", "checkpoint.use"),
    "import_weights": _TRAINING,
    "combine": _TRAINING,
    "plan": _TRAINING,
    "tune": (*_TRAINING, "tune"),
    "nightly": (*_TRAINING, "evaluate", "recommend.cold_items", "nightly"),
}
"""The settings or sections that affect each command."""


def uses_setting(command: str, setting: str) -> bool:
    """Whether a setting, by its dotted name, affects a command."""
    used = SETTINGS_USED.get(command, Config.model_fields)
    return any(f"{setting}.".startswith(f"{name}.") for name in used)


def run(
    name: str,
    description: str,
    work: Callable[[Config, argparse.Namespace], None],
    argv: Sequence[str] | None,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    examples: Sequence[str] = EXAMPLES,
) -> int:
    """Parses the command line, checks the installation, and does the work.

    Args:
        name: the name of the command.
        description: one line for --help.
        work: takes the configuration and the command's own arguments.
        argv: arguments; default: the process's.
        add_arguments: adds the command's own arguments.
        examples: the examples of its arguments, for --help; see `deepfm_dist.arguments.EXAMPLES`.

    Returns:
        0: done; 2: user error (one line on stderr). A bug raises, with exit code 1.
    """
    parser = _command_parser(name, description, examples)
    if add_arguments:
        add_arguments(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="settings to override"
    )
    complete(parser)
    arguments = parser.parse_intermixed_args(argv)
    launch = Launch()
    _log_to_stderr(arguments.quiet)
    try:
        launch = read_launch()
        watch_torchrun(launch)
        _run_on_rank(name, launch, arguments, work)
    except DeepFMError as error:
        # Usually all ranks fail for the same reason, which rank 0 reports.
        if not isinstance(error, RankLost):
            wait_for_the_end(launch)
        if not report_to_torchrun(launch, error):
            print_error(type(error).__name__, as_typed(str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit:  # another rank has failed
        wait_for_the_end(launch)
        raise
    except Exception as error:
        report_to_torchrun(launch, error)
        raise
    return EXIT_OK


def _run_on_rank(
    name: str,
    launch: Launch,
    arguments: argparse.Namespace,
    work: Callable[[Config, argparse.Namespace], None],
) -> None:
    """Resolves the configuration, then prints it or does the work."""
    if launch.rank != 0:
        log.setLevel(logging.WARNING)
    config = _config_of(arguments, searched=name == "tune")
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return
    if launch.ignored:
        log.warning(
            "ignored: %s; MASTER_ADDR and MASTER_PORT are not set, so this runs as a single "
            "process",
            " ".join(launch.ignored),
        )
    if launch.rank == 0:
        _warn_of_settings_without_effect(name, arguments.overrides)
    require(config.run.device)
    with memory_errors_to_user():
        work(config, arguments)


def _command_parser(name: str, description: str, examples: Sequence[str]) -> Parser:
    """A parser with the arguments of all commands that take a configuration."""
    parser = Parser(name, description, examples)
    parser.epilog = f"bundled configurations:\n{bundled_as_text()}\n\n{parser.epilog}"
    source = parser.add_mutually_exclusive_group()
    config = source.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file, name of a bundled one, or a run's folder (default: sample)",
    )
    config.completer = complete_config  # type: ignore[attr-defined]  # argcomplete reads it
    source.add_argument(
        "--run",
        metavar="FOLDER",
        help="use the settings of a run, by its folder or URL; under torchrun, which has its own "
        "--run, write --config runs/sample",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )
    parser.add_argument("--quiet", action="store_true", help="print results and errors only")
    return parser


def add_output(description: str, parser: argparse.ArgumentParser) -> None:
    """Adds ``--output`` and ``--output-parts`` for a command that writes a table.

    Args:
        description: what ``--output`` names.
        parser: the parser of the command.
    """
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", metavar="FILE", help=description)
    target.add_argument(
        "--output-parts",
        metavar="FOLDER",
        help="folder or URL for Parquet parts instead of one file; each rank writes its own, and "
        "_SUCCESS is written last. After a kill, the same command writes the missing parts",
    )


def add_rankings_output(default: str, parser: argparse.ArgumentParser) -> None:
    """`add_output` for a command that writes rankings; ``default`` is the file's name."""
    description = (
        f"parquet file; a CSV file is written next to it (default: {default} of the run; "
        f"settings that differ from the run's own are added to the name)"
    )
    add_output(description, parser)


def print_rankings(result: "Rankings | None") -> None:
    """Prints the first rankings of the result. Only rank 0 has a result."""
    from deepfm_dist.report.tables import ranking_table

    if result is not None:
        print(ranking_table(result.files, result.dataset))


@contextmanager
def memory_errors_to_user() -> Iterator[None]:
    """Turns failed allocations into user errors, for work whose size depends on settings.

    Raises:
        OutOfMemory: numpy, Arrow or torch cannot allocate enough memory.
    """
    try:
        yield
    except Exception as error:
        text = brief(error)
        # torch's CPU allocator raises a plain RuntimeError; CUDA's is called OutOfMemoryError.
        is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (is_memory or "DefaultCPUAllocator: can't allocate memory" in text):
            raise
        wanted = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGTP]i?B)", text)
        size = f"{int(wanted[1]) / 1e9:,.1f} GB" if wanted and wanted[1] else wanted and wanted[2]
        raise OutOfMemory(
            f"cannot allocate {size or 'memory'}: lower what the settings ask for "
            f"(trainer.batch_size, model.embedding_dim, recommend.k, evaluate.k, "
            f"recommend.memory_bytes), or use a larger machine"
        ) from error


def _warn_of_settings_without_effect(command: str, overrides: Sequence[str]) -> None:
    for setting in (name for override in overrides for name in settings_of(override, Config)):
        if not uses_setting(command, setting):
            others = ", ".join(other for other in SETTINGS_USED if uses_setting(other, setting))
            log.warning("%s has no effect on %s; it is a setting of %s", setting, command, others)


def _config_of(arguments: argparse.Namespace, searched: bool = False) -> Config:
    run = _run_of(arguments)
    if run is None:
        return load_config(arguments.config, arguments.overrides, searched)
    return config_of_run(follow_pointer(run), arguments.overrides)


def _run_of(arguments: argparse.Namespace) -> Path | None:
    """The run (or pointer) that --run or --config names; None if it is a settings file."""
    run = arguments.run
    if run is None and arguments.config and _is_run(arguments.config):
        run = arguments.config
    return None if run is None else folder_of(run.rstrip("/"))


def pointer_of(arguments: argparse.Namespace) -> Path | None:
    """The pointer file ``current`` that --run or --config names; None if it is something else."""
    run = _run_of(arguments)
    return None if run is None or follow_pointer(run) == run else run


def config_of_run(folder: Path, overrides: Sequence[str]) -> Config:
    """The settings of a run.

    Raises:
        ConfigError: there is no run, its settings are damaged, or an override is wrong.
    """
    file = folder / "config.yaml"
    with storage_errors_to_user(file):
        exists = file.is_file()
    if not exists and not _saved_sections(folder):
        raise ConfigError(
            f"--run {folder}: no run; the folder of one, such as runs/sample, has a config.yaml: "
            f"python -m deepfm_dist.train makes it"
        )
    where = [f"run.runs_root={folder.parent}", f"run.name={folder.name}"]
    overrides = [*where, *overrides]
    if not exists:
        return _config_of_checkpoint(folder, overrides, ConfigError(f"{file}: missing"))
    try:
        config = _on_own_data(load_config(str(file), overrides), load_config(str(file)), folder)
        with storage_errors_to_user(file):
            text = file.read_text(encoding="utf-8")
    except ConfigError as error:
        return _config_of_checkpoint(folder, overrides, error)
    # A truncated file would silently use defaults; an earlier version may have had fewer sections.
    missing = [s for s in Config.model_fields if not re.search(rf"^{s}:.*\n", text, re.MULTILINE)]
    if missing and (cut := [s for s in missing if s in _saved_sections(folder)]):
        with suppress(ConfigError):
            damage = ConfigError(f"{file}: the section {cut[0]} is missing")
            return _config_of_checkpoint(folder, overrides, damage)
    return config


def _on_own_data(config: Config, saved: Config, folder: Path) -> Config:
    """A run's settings with the dataset it was trained on, even if its folder was renamed.

    By default the dataset has the name of the run, which a renamed or copied folder no longer
    shows. An overridden run.name belongs to another run.
    """
    is_own = config.run.name == folder.name != saved.run.name
    if config.data.name is not None or not is_own:
        return config
    data = config.data.model_copy(update={"name": saved.run.name})
    return config.model_copy(update={"data": data})


def _saved_sections(folder: Path) -> Collection[str]:
    """The sections of settings in a run's checkpoint; empty without a checkpoint."""
    from deepfm_dist.distributed.checkpoint import read_checkpoint

    with suppress(DeepFMError):
        sections: Mapping[str, object] = read_checkpoint(folder).state["config"]
        return sections.keys()
    return ()


def _config_of_checkpoint(folder: Path, overrides: Sequence[str], damage: ConfigError) -> Config:
    """The settings from a run's latest checkpoint, for a damaged config.yaml.

    Raises:
        ConfigError: there is no checkpoint, or an override is wrong.
    """
    from deepfm_dist.distributed.checkpoint import read_checkpoint

    try:
        saved = read_checkpoint(folder)
        settings = config_from(saved.state["config"], origin=str(saved.path))
    except DeepFMError:
        raise damage from None
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "config.yaml")
        copy.write_text(settings.to_yaml(), encoding="utf-8")
        try:
            config = _on_own_data(load_config(str(copy), overrides), settings, folder)
        except ConfigError:
            raise damage from None
    log.warning("%s; the settings of %s are used", damage, saved.path)
    return config


def _is_run(config: str) -> bool:
    if "://" in config:
        return not config.endswith((".yaml", ".yml"))
    return (follow_pointer(Path(config)) / "config.yaml").is_file()


class _Formatter(logging.Formatter):
    """Formats commands in messages as the user types them."""

    def format(self, record: logging.LogRecord) -> str:
        return as_typed(super().format(record))


def _log_to_stderr(quiet: bool) -> None:
    """Logs our messages from INFO on, others from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    quieten_libraries()
