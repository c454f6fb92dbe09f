"""The start-up check: are Python, torch, fbgemm, torchrec and the driver compatible?

Neither TorchRec nor fbgemm pins a torch version, so pip may install sets that fail at import with
an ``undefined symbol``. Only package metadata is read here, nothing heavy is imported: call
:func:`require` before the first ``import torchrec``.

Source: FBGEMM's release compatibility table, and trying the pairs.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from deepfm_dist.errors import EnvironmentProblem

logger = logging.getLogger(__name__)

Version = tuple[int, ...]

# torch -> fbgemm, which has the same number as torchrec. A torch version that is missing here is
# too old for us or too new for any fbgemm release.
FBGEMM_OF_TORCH: dict[Version, Version] = {
    (2, 11): (1, 6),
    (2, 12): (1, 7),
    (2, 13): (1, 8),
    (2, 14): (1, 9),
}
TESTED_TORCH = (2, 13)
FBGEMM_CODE = ("sm_80", "sm_90a", "sm_100a")
"""GPU architectures with machine code in FBGEMM's wheels; they contain no PTX for others."""

_TAKE_CPU = "take the CPU build: `make clean`, then `make VARIANT=cpu demo`"
_TAKE_CUDA = "take the CUDA build: `make clean`, then `make VARIANT=cuda demo`"


@dataclass(frozen=True)
class Installation:
    """Facts about the machine and its Python.

    Attributes:
        python: Version of the interpreter, such as ``(3, 11, 7)``.
        platform: ``sys.platform``, such as ``"linux"``.
        versions: Installed version by package name (torch, fbgemm-gpu, fbgemm-gpu-cpu, torchrec);
            ``None`` or absent where it is not installed.
        has_nvidia_driver: Whether the driver's ``libnvidia-ml.so.1`` loads.
        torch_cuda: ``"cpu"`` or a tag such as ``"cu130"``, where torch's version carries one.
    """

    python: Version
    platform: str
    versions: dict[str, str | None]
    has_nvidia_driver: bool
    torch_cuda: str | None

    @property
    def fbgemm(self) -> str | None:
        """The installed ``"fbgemm-gpu"`` or ``"fbgemm-gpu-cpu"``; ``None`` for none or both."""
        builds = [name for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if self.versions.get(name)]
        return builds[0] if len(builds) == 1 else None

    @property
    def variant(self) -> str | None:
        """Where tables can be, ``"cuda"`` or ``"cpu"``; ``None`` without exactly one fbgemm."""
        return {"fbgemm-gpu": "cuda", "fbgemm-gpu-cpu": "cpu"}.get(self.fbgemm or "")


@dataclass(frozen=True)
class Problem:
    """A problem, its cure, and whether it is fatal."""

    what: str
    cure: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}"


def has_fbgemm_code(capability: Version) -> bool:
    """Whether FBGEMM's CUDA wheels run on a GPU of a compute capability, such as ``(8, 6)``.

    Code for sm_80 runs on every 8.x; code for sm_90a or sm_100a runs on that chip only.
    """
    return capability[0] == 8 or capability in ((9, 0), (10, 0))


def gpu_problem(name: str, capability: Version) -> Problem | None:
    """Why tables cannot be on a GPU; None if they can."""
    if has_fbgemm_code(capability):
        return None
    return Problem(
        f"FBGEMM has no code for {name} (capability {_version_text(capability)}), only for "
        f"{', '.join(FBGEMM_CODE)}",
        "use run.device=cpu, or a GPU of the generation of A100, H100 or B200",
    )


def installed_version(package: str) -> str | None:
    """The version of ``package`` in this environment, ``None`` where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """The memory that this process can still allocate: the machine's, or its container's."""
    fields = dict(
        line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # v1
    ):
        with suppress(OSError, ValueError):  # ValueError: "max", no limit
            most = int(Path("/sys/fs/cgroup", limit).read_text())
            available = min(available, most - int(Path("/sys/fs/cgroup", used).read_text()))
    return max(0, available)


def observe() -> Installation:
    """Inspects the interpreter, the packages' metadata and the driver."""
    names = ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec")
    versions = {name: installed_version(name) for name in names}
    tag = re.search(r"\+(cpu|cu\d+)", versions["torch"] or "")
    return Installation(
        python=sys.version_info[:3],
        platform=sys.platform,
        versions=versions,
        has_nvidia_driver=_has_nvidia_driver(),
        torch_cuda=tag[1] if tag else None,
    )


def problems(installation: Installation, device: str = "auto") -> list[Problem]:
    """Everything that prevents ``installation`` from running on ``device``, causes before effects.

    Args:
        installation: As :func:`observe` returns it.
        device: ``"auto"``, ``"cpu"``, or ``"cuda"`` with or without an index.
    """
    return [
        *_platform_problems(installation),
        *_version_problems(installation),
        *_device_problems(installation, device),
    ]


def require(device: str = "auto") -> None:
    """Raises a one-line error if nothing can run on ``device``; warns about anything unusual.

    Raises:
        EnvironmentProblem: The first fatal problem and its cure.
    """
    detected = problems(observe(), device)
    for problem in detected:
        if problem.fatal:
            raise EnvironmentProblem(str(problem))
    for problem in detected:
        logger.warning("%s", problem)


def _platform_problems(installation: Installation) -> Iterator[Problem]:
    if installation.platform != "linux":
        yield Problem(
            f"torchrec and fbgemm exist for Linux only, this is {installation.platform}",
            "use Linux, WSL2 or Docker",
        )
    if not (3, 11) <= installation.python < (3, 14):
        yield Problem(
            f"Python {_version_text(installation.python)} is not supported",
            "use Python 3.11, 3.12 or 3.13: `make clean`, then `make PYTHON=python3.12 demo`",
        )


def _version_problems(installation: Installation) -> Iterator[Problem]:
    versions = installation.versions
    if versions.get("fbgemm-gpu") and versions.get("fbgemm-gpu-cpu"):
        yield Problem(
            f"fbgemm-gpu {versions['fbgemm-gpu']} and fbgemm-gpu-cpu {versions['fbgemm-gpu-cpu']} "
            "are both installed and overwrite each other",
            "run `make clean`, then `make demo` (removing one of them would break the other)",
        )
        return  # further problems may be caused by either

    can_use_gpu = installation.has_nvidia_driver and installation.torch_cuda != "cpu"
    build = installation.fbgemm or ("fbgemm-gpu" if can_use_gpu else "fbgemm-gpu-cpu")
    torch, fbgemm, torchrec = (versions.get(name) for name in ("torch", build, "torchrec"))
    minor = _minor(torch or "")
    trouble = None
    if not torch:
        trouble = "torch is not installed"
    elif minor < min(FBGEMM_OF_TORCH):
        trouble = f"torch {torch} is older than {_version_text(min(FBGEMM_OF_TORCH))}"
    elif minor not in FBGEMM_OF_TORCH:
        trouble = f"torch {torch} has no fbgemm yet"
    if trouble:
        tested = _version_text(FBGEMM_OF_TORCH[TESTED_TORCH])
        yield Problem(
            trouble,
            f"take torch {_version_text(TESTED_TORCH)} with fbgemm {tested} and torchrec {tested}: "
            "`make clean`, then `make demo`",
        )
        return  # that cure replaces the other packages, too

    series = FBGEMM_OF_TORCH[minor]
    # --no-deps: pip must not follow torchrec's unpinned dependency on fbgemm-gpu.
    same = f"{_version_text(series)}.*"
    cure = f'pip install --no-deps "{build}=={same}" "torchrec=={same}"'
    for name, package, version in (("fbgemm", build, fbgemm), ("torchrec", "torchrec", torchrec)):
        if not version:
            yield Problem(f"{name} is not installed", cure)
        elif _minor(version) != series:
            wanted = f"torch {torch} goes with {name} {_version_text(series)}"
            yield Problem(f"{wanted}, not with {package} {version}", cure)
    if minor != TESTED_TORCH and _minor(fbgemm or "") == _minor(torchrec or "") == series:
        yield Problem(
            f"torch {torch} with {build} {fbgemm} match but are not the tested versions",
            f"if anything fails, try torch {_version_text(TESTED_TORCH)} "
            f"with fbgemm {_version_text(FBGEMM_OF_TORCH[TESTED_TORCH])}",
            fatal=False,
        )


def _device_problems(installation: Installation, device: str) -> Iterator[Problem]:
    fbgemm = f"{installation.fbgemm} {installation.versions.get(installation.fbgemm or '')}"
    driver = installation.has_nvidia_driver
    if installation.variant == "cuda":
        if installation.torch_cuda == "cpu":
            yield Problem(
                f"{fbgemm} needs a CUDA build of torch, not {installation.versions['torch']}",
                f"{_TAKE_CUDA}, with PIP_EXTRA_INDEX_URL unset" if driver else _TAKE_CPU,
            )
        elif not driver:
            yield Problem(
                f"{fbgemm} needs NVIDIA's driver: libnvidia-ml.so.1 is not found",
                f"install the driver (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility) "
                f"or {_TAKE_CPU}",
            )
    elif installation.variant == "cpu":
        if device.startswith("cuda"):
            yield Problem(
                f"run.device={device}, but {fbgemm} has no CUDA kernels",
                _TAKE_CUDA if driver else "this machine has no NVIDIA driver: use run.device=cpu",
            )
        elif device == "auto" and driver:
            yield Problem(
                f"an NVIDIA driver is installed, but {fbgemm} has no CUDA kernels: "
                f"GPUs stay unused",
                f"{_TAKE_CUDA}; or set run.device=cpu",
                fatal=False,
            )


def _has_nvidia_driver() -> bool:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _minor(version: str) -> Version:
    """``"2.13.0+cpu"`` -> ``(2, 13)``, which binary compatibility depends on."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _version_text(version: Version) -> str:
    return ".".join(map(str, version))


def quieten_libraries() -> None:
    """Hides messages of torch and torchrec that are harmless or also raised as exceptions."""
    for noisy in ("torchrec", "fbgemm_gpu", "torch.distributed.checkpoint"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        # Users cannot fix what torch and torchrec warn about in each other.
        warnings.filterwarnings("ignore", category=category, module=r"torch(rec)?(\.|$)")
