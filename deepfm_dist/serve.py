"""``python -m deepfm_dist.serve``: serve recommendations over HTTP."""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from deepfm_dist.cli import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    config_of_run,
    memory_errors_to_user,
    pointer_of,
    run,
)
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError, EnvironmentProblem
from deepfm_dist.messages import plural
from deepfm_dist.storage import folder_of
from deepfm_dist.typed_yaml import settings_of

if TYPE_CHECKING:
    from deepfm_dist.serving.live import Recommender

EXAMPLES = (
    "--run runs/sample",
    "--run runs/mine --port 9000 --workers 4 recommend.context.device=phone",
)
SERVED = (
    *("context", "mask", "memory_bytes", "cold_items"),
    *("popularity_penalty", "diversity", "at_most", "rerank"),
)
"""Settings of ``recommend`` that a service uses."""
LOOPBACK = ("127.0.0.1", "localhost")
log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Serve recommendations over HTTP, with a page to try them."
    return run("serve", description, _serve, argv, _add_arguments, EXAMPLES)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default=LOOPBACK[0],
        help="address to listen on (default: %(default)s, this machine only)",
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0: any")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that answer requests with one copy of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: one JSON object per line, requests included (default: %(default)s)",
    )


def _serve(config: Config, arguments: argparse.Namespace) -> None:
    try:
        from deepfm_dist.serving.following import PointerFollower
        from deepfm_dist.serving.telemetry import JsonFormatter
        from deepfm_dist.serving.workers import Generations, WorkerOptions
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"serving needs {error.name}, which is not installed; "
            f"pip install fastapi 'uvicorn[standard]' prometheus-client"
        ) from None

    _check_settings(config, arguments.overrides)
    _check_workers(arguments.workers)
    if arguments.log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())
    listening = _socket(arguments.host, arguments.port)
    url = f"http://{arguments.host}:{listening.getsockname()[1]}"

    def load(folder: Path | None) -> "Recommender":
        if folder is None:
            return _loaded(config, arguments.overrides)
        # Opened in this process: connections to an object store do not survive a fork.
        theirs = config_of_run(folder_of(str(folder)), arguments.overrides)
        return _loaded(theirs, arguments.overrides)

    with TemporaryDirectory(prefix="deepfm-serve-") as folder:
        options = WorkerOptions(
            listening,
            hosts=LOOPBACK if arguments.host in LOOPBACK else ("*",),
            folder=Path(folder),
            n_workers=arguments.workers,
            threads=config.run.threads,
            logs_requests=arguments.log_format == "json",
        )
        signal.signal(signal.SIGTERM, _exit_with(EXIT_OK))
        signal.signal(signal.SIGINT, _exit_with(EXIT_INTERRUPTED))
        with Generations(options) as generations:
            follower = PointerFollower(generations, load, pointer_of(arguments), Path(folder))
            follower.load_first()
            print(f"{url}/ shows a page, {url}/docs the API; ctrl-C ends it", flush=True)
            follower.follow()


def _check_workers(n: int) -> None:
    """Checks the number of workers.

    Raises:
        ConfigError: it is not positive.
    """
    if n < 1:
        raise ConfigError(f"--workers {n}: must be positive; use --workers 1")
    cores = len(os.sched_getaffinity(0))
    if n > cores:
        log.warning(
            "--workers %d: more than this process's %s, so they take turns; use --workers %d",
            n,
            plural(cores, "core"),
            cores,
        )


def _loaded(config: Config, overrides: Sequence[str]) -> "Recommender":
    """Loads a run's model, exporting it first if necessary."""
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.jobs.export import up_to_date_export
    from deepfm_dist.runs.trained import find_run
    from deepfm_dist.serving.live import Recommender

    _check_settings(config, overrides)
    source = find_run(config, overrides)
    folder = up_to_date_export(source)
    # One thread: OpenMP threads started now would be missing in workers forked later.
    with memory_errors_to_user(), process_group("cpu", config.run.timeout_s, threads=1) as world:
        return Recommender(source, folder, world)


def _exit_with(code: int) -> Callable[[int, FrameType | None], NoReturn]:
    """A signal handler that exits the command, which then stops the workers."""

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(code)

    return end


def _check_settings(config: Config, overrides: Sequence[str]) -> None:
    """Refuses overrides that the service would ignore, and settings that exclude items.

    Raises:
        ConfigError: the service would ignore it.
    """
    names = [name for override in overrides for name in settings_of(override, Config)]
    for name in [*names, "recommend.allow_items", "recommend.block_items"]:
        section, _, field = name.partition(".")
        if section not in ("recommend", "similar") or field.partition(".")[0] in SERVED:
            continue
        settings = getattr(config, section)
        if getattr(settings, field) != type(settings).model_fields[field].default:
            value = settings.model_dump(mode="json")[field]
            if isinstance(value, list):
                value = f"[{', '.join(map(str, value))}]"
            raise ConfigError(
                f"{name}={value}: not used by the service, which ranks all items for any user, "
                f"as many as a request says, and similar ones by cosine; leave it out"
            )


def _socket(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentProblem(
            f"--host {host} --port {port}: {reason}; give another --port, or 0 for any"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
