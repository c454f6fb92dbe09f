"""The process group: one or more ranks on CPU or CUDA, with or without torchrun."""

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torchrec.distributed import comm

from deepfm_dist.distributed import heartbeat
from deepfm_dist.distributed.world import World
from deepfm_dist.environment import gpu_problem
from deepfm_dist.errors import ConfigError, DeepFMError, EnvironmentProblem, RankLost
from deepfm_dist.launcher import Launch, read_launch
from deepfm_dist.messages import brief, plural

log = logging.getLogger(__name__)

_LOST = re.compile(r"gloo|NCCL|timed? ?out|connection|broken pipe", re.IGNORECASE)


@contextmanager
def process_group(
    device: str = "auto", timeout_s: float = 120, threads: int = 1, deterministic: bool = False
) -> Iterator[World]:
    """Joins the launcher's process group, or creates one of a single rank.

    Args:
        device: auto, cpu or cuda.
        timeout_s: seconds after which a rank that waits for a lost one gives up.
        threads: CPU threads of this process.
        deterministic: whether to use only deterministic CUDA kernels.

    Raises:
        EnvironmentProblem: ``device=cuda`` without a usable GPU.
        ConfigError: more processes on a machine than it has GPUs, or restarts over several
            machines without the variable they need.
    """
    torch.set_num_threads(threads)
    # TorchRec's tracing triggers a torch warning that users cannot act on.
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    launch = read_launch()
    chosen = _device(device, launch.local_rank, launch.local_world_size)
    is_cuda = chosen.type == "cuda"
    if deterministic and is_cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
    torch.use_deterministic_algorithms(deterministic and is_cuda)
    excepthook = sys.excepthook  # torch's, set by _join, prefixes every line with the rank
    store = dist.PrefixStore("deepfm_dist", _join(launch, chosen, timedelta(seconds=timeout_s)))
    world = _world(launch, chosen, store, timeout_s, threads)
    failed = True
    try:
        with ExitStack() as stack:
            if world.watch is not None:
                stack.enter_context(world.watch)
            if world.is_first and world.world_size > 1:
                stack.enter_context(heartbeat.beating(store, timeout_s))
            yield world
            world.barrier()  # rank 0 may hold the store that others still read
        failed = False
    except RuntimeError as error:
        if world.world_size > 1 and _LOST.search(str(error)):
            heartbeat.raise_if_ranks_missing(
                store, world.rank, world.world_size, timeout_s, launch.local_rank, error
            )
        raise
    finally:
        _leave(abort=failed and world.watch is not None)
        if world.world_size == 1:  # a notebook or script may continue after it
            sys.excepthook = excepthook


def _join(launch: Launch, device: torch.device, timeout: timedelta) -> dist.Store:
    """Joins the process group, and returns its store."""
    try:
        store: dist.Store = dist.HashStore()
        if launch.master is not None:  # another program may listen there and never answer
            connect = partial(_store, launch, launch.master, timeout)
            patience = timeout + heartbeat.SHORT
            store = heartbeat.in_background(connect).result(patience.total_seconds())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:
        if launch.master is None:
            raise
        raise _unreachable(launch, launch.master, error) from None
    return store


def _world(
    launch: Launch, device: torch.device, store: dist.Store, timeout_s: float, threads: int
) -> World:
    watch = None
    if device.type == "cuda" and launch.world_size > 1:
        client: dist.Store = store.clone()  # type: ignore[attr-defined]
        watch = heartbeat.Watch(client, launch.rank, launch.world_size, timeout_s)
    cores = len(os.sched_getaffinity(0)) // launch.local_world_size
    return World(
        rank=launch.rank,
        world_size=launch.world_size,
        local_world_size=launch.local_world_size,
        spare_threads=max(0, cores - threads),
        device=device,
        store=store,
        timeout_s=timeout_s,
        watch=watch,
        local_rank=launch.local_rank,
    )


def _leave(abort: bool) -> None:
    """Leaves the process group.

    Args:
        abort: aborts running collectives. NCCL's communicators would otherwise be destroyed
            together with all ranks, after their collectives, which a failed rank never joins.
    """
    comm._INTRA_PG = comm._CROSS_PG = None  # TorchRec's, of machines; another group has others
    if not abort:
        dist.destroy_process_group()
        return
    with suppress(TimeoutError, RuntimeError):
        abort_group = dist.distributed_c10d._abort_process_group
        heartbeat.in_background(abort_group).result(heartbeat.SHORT.total_seconds())


def _device(wanted: str, local_rank: int, local_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpus == 0:
        raise EnvironmentProblem(
            "run.device=cuda, but torch sees no GPU; run python -m deepfm_dist.doctor, or set "
            "run.device=cpu"
        )
    if wanted == "cpu" or gpus == 0 or (wanted == "auto" and not _fbgemm_has_cuda()):
        return torch.device("cpu")
    if local_size > gpus:
        processes = plural(local_size, "process", "processes")
        raise ConfigError(
            f"{processes} on a machine with {plural(gpus, 'GPU')}: "
            f"start torchrun --nproc_per_node={gpus}, or set run.device=cpu"
        )
    gpu = torch.cuda.get_device_properties(local_rank)
    problem = gpu_problem(gpu.name, (gpu.major, gpu.minor))
    if problem is not None and wanted == "cuda":
        raise EnvironmentProblem(str(problem))
    if problem is not None:
        log.warning("the GPU stays unused: %s", problem.what)
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _fbgemm_has_cuda() -> bool:
    import fbgemm_gpu

    return getattr(fbgemm_gpu, "__variant__", "cpu") == "cuda"


def _unreachable(launch: Launch, master: tuple[str, int], error: Exception) -> DeepFMError:
    """The error for a rank that cannot join the others."""
    reason = brief(error) if str(error).strip() else "no answer"
    if launch.by_torchrun:
        return RankLost(
            f"rank {launch.rank} of {launch.world_size} cannot reach the others: {reason}; if this "
            f"happens at every start, a machine's name leads to an address that others do not "
            f"reach: set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) to its network interface"
        )
    host, port = master
    return EnvironmentProblem(
        f"RANK={launch.rank} WORLD_SIZE={launch.world_size} MASTER_ADDR={host} MASTER_PORT={port}: "
        f"the ranks cannot reach each other: {reason}; start all of them, on a free port of an "
        f"address that all can reach (torchrun --nproc_per_node={launch.world_size} does), or for "
        f"a single process run unset RANK WORLD_SIZE"
    )


def _wait_for(master: tuple[str, int], is_served_here: bool, timeout_s: float) -> None:
    """Waits until a store's address is reachable: ranks may start before the store or its DNS name.

    torch would print a C++ stack trace.

    Raises:
        OSError: the last failure.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if is_served_here:
                socket.getaddrinfo(*master)
            else:
                socket.create_connection(master, timeout_s).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _store(launch: Launch, master: tuple[str, int], timeout: timedelta) -> dist.Store:
    """Connects to the store given by torchrun's variables.

    torchrun's agent keeps one store over all restarts, so a restarted gloo group would find the
    dead ranks' addresses. With one agent, the restart count distinguishes the attempts. Several
    agents have different counts: a failure is counted where it happened, a machine that joins or
    leaves nowhere. With the variable, each rendezvous gets its own store, held by rank 0; only
    torchrun's c10d rendezvous supports it.
    """
    if launch.agents > 1 and launch.max_restarts > 0 and launch.agent_holds_store:
        raise ConfigError(
            "torchrun over several machines with --max-restarts needs --rdzv-backend=c10d and "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment; set both on every machine, "
            "as launch/run_train.sh does"
        )
    is_served_here = not launch.agent_holds_store and launch.rank == 0
    _wait_for(master, is_served_here, timeout.total_seconds())
    store: dist.Store = dist.TCPStore(
        *master, launch.world_size, is_master=is_served_here, timeout=timeout
    )
    if launch.agents > 1:
        return store
    return dist.PrefixStore(f"attempt_{launch.restarts}", store)
