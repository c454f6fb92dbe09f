"""Trains on a Ray cluster: the same run as `torchrun -m deepfm_dist.train`, restarted by Ray.

    python launch/ray_train.py --workers 2 --config mine.yaml
    ray job submit -- python launch/ray_train.py --workers 16 --gpu --config /shared/mine.yaml

Ray starts the workers and replaces lost ones; a run resumes from its own last checkpoint. Without a
cluster (RAY_ADDRESS, or one that runs on this machine), Ray starts one on this machine. Every
machine needs the package, and the folders or URLs of data and runs.
"""

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepfm_dist.cli import run
from deepfm_dist.config import Config, config_from
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.environment import quieten_libraries
from deepfm_dist.errors import ConfigError, DeepFMError, EnvironmentProblem
from deepfm_dist.jobs.train import train_on

try:
    import ray
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer
except ModuleNotFoundError as error:
    sys.exit(f"launch/ray_train.py needs {error.name}: pip install -e '.[ray]'")


class Variables(Backend):
    """Sets on each worker the variables by which torchrun describes a rank.

    The run joins the process group itself: it chooses backends and the time-out.
    """

    share_cuda_visible_devices = True  # the GPU of a rank is that of its local rank

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Before each attempt."""
        host, port = worker_group.execute_single(0, address)
        worker_group.execute(describe_rank, host, port)


class Launched(TorchConfig):
    """`Variables` in place of Ray's own process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        """What starts the workers."""
        return Variables


def address() -> tuple[str, int]:
    """This machine's address, and a port that is free there."""
    host = ray.util.get_node_ip_address()
    with socket.socket() as free:
        free.bind(("", 0))
        return host, free.getsockname()[1]


def describe_rank(host: str, port: int) -> None:
    """Sets the variables of a worker's rank."""
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }


def train_worker(job: dict[str, Any]) -> DeepFMError | None:
    """One rank of the run; reports the figures of each validation to Ray.

    Args:
        job: `config`, and the `folder` that its relative paths start from.

    Returns:
        The user's mistake that ended the run, if any: raised, Ray would try again.
    """
    config = config_from(job["config"])
    _log_like_a_command(is_first=ray.train.get_context().get_world_rank() == 0)

    def report(figures: Any, epoch: int) -> None:
        ray.train.report({**figures, "epoch": epoch})

    try:
        if not Path(job["folder"]).is_dir():
            raise EnvironmentProblem(
                f"{job['folder']}: not on {socket.gethostname()}; start the command in a folder "
                f"that all machines share"
            )
        os.chdir(job["folder"])
        with process_group(*config.run.process_group) as world:
            train_on(config, world, report)
    except DeepFMError as error:
        if error.exit_code != 2:
            raise
        return error
    return None


def _log_like_a_command(is_first: bool) -> None:
    """Our lines of rank 0 at INFO, others' from WARNING on."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("deepfm_dist").setLevel(logging.INFO if is_first else logging.WARNING)
    quieten_libraries()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=2, help="ranks (default: %(default)s)")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each rank")
    parser.add_argument(
        "--cpus", type=float, help="CPUs for each rank (default: 8 with a GPU, otherwise 1)"
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        help="restarts after a rank is lost; -1: without limit (default: %(default)s)",
    )


def _train(config: Config, arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}: must be positive; use --workers 2")
    try:
        ray.init(log_to_driver=True)
    except ConnectionError:
        raise EnvironmentProblem(
            f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: no Ray cluster answers, or it does not "
            f"accept this machine's token (RAY_AUTH_MODE=token); correct it, or unset RAY_ADDRESS "
            f"to start a cluster on this machine"
        ) from None
    cpus = arguments.cpus or (8 if arguments.gpu else 1)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "folder": os.getcwd(),
        },
        torch_config=Launched(),
        scaling_config=ScalingConfig(
            num_workers=arguments.workers,
            use_gpu=arguments.gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if arguments.gpu else {})},
        ),
        run_config=RunConfig(
            name=config.run.name,
            failure_config=FailureConfig(max_failures=arguments.max_failures),
        ),
    )
    try:
        mistake = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        for failure in failures:
            if isinstance(failure, DeepFMError):
                raise failure from None
        raise
    if mistake is not None:
        raise mistake


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    return run("train", "Train a DeepFM on a Ray cluster.", _train, argv, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
