"""``python -m deepfm_dist.serve``: serve recommendations over HTTP."""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

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
from deepfm_dist.typed_yaml import settings_of

if TYPE_CHECKING:
    from deepfm_dist.serving.live import Recommender
    from deepfm_dist.serving.replacement import Loading

EXAMPLES = ("--run runs/sample", "--run runs/mine --port 9000 recommend.context.device=phone")
SERVED = ("context", "mask", "memory_bytes", "cold_items")
"""Settings of ``recommend`` that a service looks at."""
LOOPBACK = ("127.0.0.1", "localhost")


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


def _serve(config: Config, arguments: argparse.Namespace) -> None:
    try:
        import torch
        import uvicorn

        from deepfm_dist.serving.app import make_app
        from deepfm_dist.serving.connections import BACKLOG, ImpatientProtocol, max_connections
        from deepfm_dist.serving.replacement import Loading, ModelInUse
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"serving needs {error.name}, which is not installed; "
            f"pip install fastapi 'uvicorn[standard]' prometheus-client"
        ) from None

    _check_settings(config, arguments.overrides)
    torch.set_num_threads(config.run.threads)  # of this thread, which answers
    listening = _socket(arguments.host, arguments.port)
    url = f"http://{arguments.host}:{listening.getsockname()[1]}"
    model = ModelInUse()
    ImpatientProtocol.limit = max_connections()
    settings = uvicorn.Config(
        make_app(model, LOOPBACK if arguments.host in LOOPBACK else ("*",)),
        http=ImpatientProtocol,
        ws="none",
        backlog=BACKLOG,
        log_level="error",  # a client's mistake is not worth a line
        access_log=False,
    )
    server = uvicorn.Server(settings)

    def load(folder: Path | None) -> "Recommender":
        theirs = config if folder is None else config_of_run(folder, arguments.overrides)
        return _loaded(theirs, arguments.overrides)

    def on_first(error: BaseException | None) -> None:
        if error is None:
            print(f"{url}/ shows a page, {url}/docs the API; ctrl-C ends it", flush=True)
        else:
            server.should_exit = True

    loading = Loading(model, load, pointer_of(arguments), on_first)
    # uvicorn answers what it has and then raises the signal again, for these handlers.
    signal.signal(signal.SIGTERM, _exit_with(EXIT_OK, loading))
    signal.signal(signal.SIGINT, _exit_with(EXIT_INTERRUPTED, loading))
    loading.start()
    server.run(sockets=[listening])
    if loading.error is not None:
        raise loading.error


def _loaded(config: Config, overrides: Sequence[str]) -> "Recommender":
    """Loads a run's model, exporting it first if necessary."""
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.jobs.export import up_to_date_export
    from deepfm_dist.runs.trained import find_run
    from deepfm_dist.serving.live import Recommender

    _check_settings(config, overrides)
    source = find_run(config, overrides)
    folder = up_to_date_export(source)
    with (
        memory_errors_to_user(),
        process_group("cpu", config.run.timeout_s, config.run.threads) as world,
    ):
        return Recommender(source, folder, world)


def _exit_with(code: int, loading: "Loading") -> Callable[[int, FrameType | None], None]:
    """A signal handler that ends the process, whether or not a model is being loaded."""

    def end(signum: int, frame: FrameType | None) -> None:
        if not loading.stop():  # torch would abort if the interpreter ended under it
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    return end


def _check_settings(config: Config, overrides: Sequence[str]) -> None:
    """Looks at what was typed, and at what would leave items out.

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
