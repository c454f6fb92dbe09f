"""``python -m deepfm_dist.serve``: serve recommendations over HTTP."""

import argparse
import socket
import sys
from collections.abc import Sequence

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.errors import ConfigError, EnvironmentProblem
from deepfm_dist.typed_yaml import settings_of

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
        import uvicorn

        from deepfm_dist.serving.app import make_app
        from deepfm_dist.serving.connections import BACKLOG, ImpatientProtocol, max_connections
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"serving needs {error.name}, which is not installed; "
            f"pip install fastapi 'uvicorn[standard]' prometheus-client"
        ) from None
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.jobs.export import up_to_date_export
    from deepfm_dist.runs.trained import find_run
    from deepfm_dist.serving.live import Recommender

    _check_settings(config, arguments.overrides)
    listening = _socket(arguments.host, arguments.port)
    source = find_run(config, arguments.overrides)
    folder = up_to_date_export(source)
    with process_group("cpu", config.run.timeout_s, config.run.threads) as world:
        recommender = Recommender(source, folder, world)
    url = f"http://{arguments.host}:{listening.getsockname()[1]}"
    print(f"{url}/ shows a page, {url}/docs the API; ctrl-C ends it", flush=True)
    app = make_app(recommender, LOOPBACK if arguments.host in LOOPBACK else ("*",))
    ImpatientProtocol.limit = max_connections()
    settings = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        ws="none",
        backlog=BACKLOG,
        log_level="error",  # a client's mistake is not worth a line
        access_log=False,
    )
    uvicorn.Server(settings).run(sockets=[listening])


def _check_settings(config: Config, overrides: Sequence[str]) -> None:
    """Looks at what was typed, and at what would leave items out.

    Raises:
        ConfigError: the service would not heed it.
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
