"""TorchX components: `torchx run -s SCHEDULER launch/components.py:train -j 2x8 -- --config FILE`.

They run with torchx 0.7.0 and with the nightlies after it.
"""

# 0.7.0 reads the annotations below as text and knows only these forms.
# ruff: noqa: UP006, UP035, UP045
from typing import Dict, List, Optional

from torchx import specs
from torchx.components import dist

# 0.7.0 has only the older name.
_torchrun = getattr(dist, "torchrun", None) or dist.ddp


def train(
    *args: str,
    j: str = "1x2",
    name: str = "deepfm",
    image: str = "deepfm-dist:cpu",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    max_restarts: int = 3,
    max_retries: int = 3,
    save_seconds: int = 300,
    port: int = 29500,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Trains a DeepFM; restarted, it resumes from its last checkpoint.

    Args:
        args: arguments of deepfm_dist.train: --config FILE section.field=value ...
        j: [MIN_NODES:]NODESxPROCESSES, processes on each node
        name: name of the job
        image: container image, where the scheduler runs containers
        cpu: CPUs of a node; 0: 8 for each GPU, or 1 for each process
        gpu: GPUs of a node, one process each
        memMB: memory of a node in MB; 0: 49152 for each GPU, or 2048 for each process
        max_restarts: how often torchrun starts the ranks again after one is lost
        max_retries: how often the scheduler starts the job again
        save_seconds: after SIGTERM, how long ranks may write a checkpoint
        port: port of the rendezvous on the first of several nodes
        env: more environment variables: A=1,B=2
        mounts: what the container sees of the host: type=bind,src=/data,dst=/data
    """
    variables = {"PET_MAX_RESTARTS": str(max_restarts), "PET_SHUTDOWN_TIMEOUT": str(save_seconds)}
    return _app(
        "train",
        args,
        j,
        name,
        image,
        cpu,
        gpu,
        memMB,
        max_retries,
        port,
        variables | (env or {}),
        mounts,
    )


def recommend(
    *args: str,
    j: str = "1x2",
    name: str = "deepfm-recommend",
    image: str = "deepfm-dist:cpu",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,
    max_retries: int = 3,
    port: int = 29500,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Writes every user's best unseen items, by a trained DeepFM.

    Args:
        args: arguments of deepfm_dist.recommend: --config FILE section.field=value ...
        j: NODESxPROCESSES, processes on each node
        name: name of the job
        image: container image, where the scheduler runs containers
        cpu: CPUs of a node; 0: 8 for each GPU, or 1 for each process
        gpu: GPUs of a node, one process each
        memMB: memory of a node in MB; 0: 49152 for each GPU, or 2048 for each process
        max_retries: how often the scheduler starts the job again
        port: port of the rendezvous on the first of several nodes
        env: more environment variables: A=1,B=2
        mounts: what the container sees of the host: type=bind,src=/data,dst=/data
    """
    return _app(
        "recommend", args, j, name, image, cpu, gpu, memMB, max_retries, port, env or {}, mounts
    )


def _app(
    command: str,
    args: tuple[str, ...],
    j: str,
    name: str,
    image: str,
    cpu: int,
    gpu: int,
    memMB: int,
    max_retries: int,
    port: int,
    env: dict[str, str],
    mounts: list[str] | None,
) -> specs.AppDef:
    processes = int(j.rpartition("x")[2])
    cpu = cpu or (8 * gpu or processes)
    memMB = memMB or (49152 * gpu or 2048 * processes)
    # The first: each restart gets its own store; gloo would meet the dead ranks' addresses.
    always = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    return _torchrun(
        *args,
        m=f"deepfm_dist.{command}",
        j=j,
        name=name,
        image=image,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        max_retries=max_retries,
        rdzv_port=port,
        env=always | env,
        mounts=mounts,
    )
