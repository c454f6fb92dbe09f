"""The launcher's environment variables, and how a rank and its launcher end together.

torchrun describes a rank by environment variables. Other tools set some of the same names and leave
them behind, so they are read and checked here only.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Thread

from deepfm_dist.errors import EnvironmentProblem

_LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that every launcher sets; all are required for a process group."""
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
_COPIES = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables set by tools that start several copies of a command without a process group."""

_INT32_MAX = 2**31 - 1
"""The largest number that torch takes as a rank."""

GRACE_S = 5.0
"""Seconds within which a launcher ends the other ranks after one has failed."""


@dataclass(frozen=True)
class Launch:
    """This process as described by its launcher; the defaults are those of a single process.

    Attributes:
        rank: the rank of this process, from 0.
        world_size: number of processes.
        local_rank: rank of this process on its machine.
        local_world_size: processes on this machine.
        master: host and port of the store; None for a single process.
        agents: number of torchrun agents, one per machine.
        restarts: number of times that torchrun restarted the ranks.
        max_restarts: maximum number of restarts.
        restarted: whether torchrun or Slurm started this process again after an earlier attempt.
        agent_holds_store: whether torchrun serves the store; otherwise rank 0 does.
        error_file: where torchrun looks for the reason of a failure; None without torchrun.
        ignored: ignored variables, ``NAME=value`` each: they are set, but not by a launcher.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master: tuple[str, int] | None = None
    agents: int = 1
    restarts: int = 0
    max_restarts: int = 0
    restarted: bool = False
    agent_holds_store: bool = False
    error_file: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def by_torchrun(self) -> bool:
        """Whether this process' parent is torchrun."""
        return self.error_file is not None


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Reads the launcher's variables; an empty one counts as unset.

    ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` together describe a launch. An
    incomplete set is left over from another tool and ignored, unless it implies other ranks.

    Args:
        environment: variables by name; default: the process's.

    Raises:
        EnvironmentProblem: a launch has a malformed or contradictory variable, or several processes
            were started that would run independently.
    """
    variables = os.environ if environment is None else environment
    given = {name: text.strip() for name, text in variables.items() if text.strip()}
    slurm_restarts = _number(given, "SLURM_RESTART_COUNT", 0)
    missing = [name for name in _LAUNCH if name not in given]
    if missing:
        _refuse_separate_ranks(given, missing)
        leftovers = [name for name in ("RANK", "WORLD_SIZE", *_LOCAL) if name in given]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return Launch(
            restarted=slurm_restarts > 0,
            ignored=tuple(f"{n}={given[n]}" for n in leftovers if given[n] != alone[n]),
        )
    size = _number(given, "WORLD_SIZE", 1, low=1)
    local_size = _number(given, "LOCAL_WORLD_SIZE", 1, low=1, high=size)
    restarts = _number(given, "TORCHELASTIC_RESTART_COUNT", 0)
    return Launch(
        rank=_number(given, "RANK", 0, high=size - 1),
        world_size=size,
        local_rank=_number(given, "LOCAL_RANK", 0, high=local_size - 1),
        local_world_size=local_size,
        master=(given["MASTER_ADDR"], _number(given, "MASTER_PORT", 0, 1, 65535)),
        agents=_number(given, "GROUP_WORLD_SIZE", 1, low=1),
        restarts=restarts,
        max_restarts=_number(given, "TORCHELASTIC_MAX_RESTARTS", 0),
        restarted=restarts > 0 or slurm_restarts > 0,
        agent_holds_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        error_file=given.get("TORCHELASTIC_ERROR_FILE"),
    )


def report_to_torchrun(launch: Launch, error: Exception) -> bool:
    """Leaves an error's text where torchrun looks for the root cause.

    Returns:
        Whether torchrun will end now and show the text on this process' stderr, below its summary.
    """
    if launch.error_file is None:
        return False
    message = {
        "message": f"{type(error).__name__}: {error}",
        "extraInfo": {"timestamp": str(int(time.time()))},
    }
    try:
        with open(launch.error_file, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
        ours, theirs = os.fstat(sys.stderr.fileno()), os.stat(f"/proc/{os.getppid()}/fd/2")
    except (OSError, ValueError):
        return False
    # If stderr goes to a log of this rank, the text belongs there, too.
    return os.path.samestat(ours, theirs) and launch.restarts >= launch.max_restarts


def wait_for_the_end(launch: Launch) -> None:
    """Gives the launcher time to end this rank in case rank 0 failed and reported the reason.

    Ranks usually fail for the same reason. If this function returns on a rank other than 0, rank 0
    has not failed, and the failure is this rank's own.
    """
    if launch.rank != 0:
        if launch.by_torchrun:  # whose summary lists every rank that ends with another code
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        time.sleep(GRACE_S if launch.local_rank == 0 else 2 * GRACE_S)


def watch_torchrun(launch: Launch) -> None:
    """Ends this process if torchrun is killed: otherwise it would stay and hold its port.

    The kernel reports the parent's end, so watching costs nothing.
    """
    if not launch.by_torchrun:
        return
    parent = os.getppid()
    try:
        handle = os.pidfd_open(parent)
    except OSError:  # not on this kernel, or gone already
        return

    def end() -> None:
        select.select([handle], [], [])
        if launch.local_rank == 0:
            print(
                f"torchrun (process {parent}) was killed: its ranks end; rerun the same command to "
                f"resume from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    Thread(target=end, daemon=True).start()


def _refuse_separate_ranks(given: Mapping[str, str], missing: list[str]) -> None:
    """Refuses several processes that would each run as the only one.

    Raises:
        EnvironmentProblem: there are others.
    """
    size = given.get("WORLD_SIZE", "")
    if "RANK" in given and size.isdecimal() and int(size) > 1:
        raise EnvironmentProblem(
            f"RANK={given['RANK']} and WORLD_SIZE={size} are set, but not {' and '.join(missing)}: "
            f"start all ranks with torchrun --nproc_per_node={size}, or for a single process run "
            f"unset RANK WORLD_SIZE"
        )
    for name, tool in _COPIES.items():
        copies = given.get(name, "")
        if copies.isdecimal() and int(copies) > 1:
            raise EnvironmentProblem(
                f"{tool} has started this command {copies} times ({name}={copies}), and each would "
                f"be a run on its own: let it start one torchrun per machine, as "
                f"launch/slurm/train.sbatch does, or for a single process run unset {name}"
            )


def _number(
    given: Mapping[str, str], name: str, default: int, low: int = 0, high: int = _INT32_MAX
) -> int:
    text = given.get(name, str(default))
    # int() raises a different error for thousands of digits.
    if text.isascii() and text.isdecimal() and len(text) <= 20 and low <= int(text) <= high:
        return int(text)
    where, names = "", name
    if name in (*_LAUNCH, *_LOCAL):
        where, names = " as torchrun sets it", " ".join(_LAUNCH)
    raise EnvironmentProblem(
        f"{name}={given.get(name)} must be a whole number from {low} to {high}{where}; "
        f"for a single process run unset {names}"
    )
