"""``python -m deepfm_dist.doctor``: what is installed here, does it work, and if not, what to do.

Unlike the start-up check it imports torchrec and fbgemm and runs them. Exit 0 if all is fine, 2 if
something has to be cured first.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from deepfm_dist import __version__, environment
from deepfm_dist.environment import Problem, memory_bytes
from deepfm_dist.terminal import coloured

_LIBRARIES = ("numpy", "pandas", "pyarrow", "numba")
_GIB = 2**30


def examine(device: str = "auto") -> dict[str, Any]:
    """Observe this machine, then import and run what training needs.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``, the one training is meant for.

    Returns:
        What ``--json`` prints: ``versions``, ``variant``, ``devices``, ``backends``, ``self_test``
        and ``problems`` (each ``what``, ``cure``, ``fatal``).
    """
    installation = environment.observe()
    found = environment.problems(installation, device)
    libraries = {name: environment.installed_version(name) for name in _LIBRARIES}
    missing = " ".join(name for name, version in libraries.items() if not version)
    if missing:
        found.append(Problem(f"not installed: {missing}", f"pip install {missing}"))

    report: dict[str, Any] = {
        "versions": {
            "python": ".".join(map(str, installation.python)),
            "deepfm_dist": __version__,
            **installation.versions,
            **libraries,
            "torchx": environment.installed_version("torchx-nightly")
            or environment.installed_version("torchx"),
        },
        "variant": installation.variant,
        "devices": {
            "cpu_cores": len(os.sched_getaffinity(0))
            if sys.platform == "linux"
            else os.cpu_count(),
            "memory_bytes": memory_bytes(),
        },
        "backends": [],
        "self_test": "ok",
    }
    try:
        report["backends"] = _backends()
        report["devices"] |= _torch_devices()
        wants_gpu = installation.variant == "cuda" and device != "cpu"
        has_gpu = bool(report["devices"]["gpus"])
        if wants_gpu and not has_gpu:
            found.append(
                Problem(
                    "torch sees no GPU",
                    "look at CUDA_VISIBLE_DEVICES and at nvidia-smi (the driver may be older than "
                    "torch's CUDA)",
                    fatal=device == "cuda",
                )
            )
        self_test("cuda" if wants_gpu and has_gpu else "cpu")
    # A broken binary raises ImportError, OSError, RuntimeError or AttributeError as it likes.
    except Exception as error:
        report["self_test"] = "failed"
        reason = (str(error).splitlines() or [""])[0]
        found.append(
            Problem(
                f"self-test: {type(error).__name__}: {reason}",
                "cure the problems above first"
                if any(problem.fatal for problem in found)
                else "run `make clean`, then `make demo`",
            )
        )
    report["problems"] = [asdict(problem) for problem in found]
    return report


def self_test(device: str) -> None:
    """Permute a jagged batch with fbgemm's kernel and pool it with torchrec's collection.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        Exception: Whatever a broken import or kernel raises; ``AssertionError`` for a wrong sum.
    """
    importlib.import_module("fbgemm_gpu")
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # torchrec's call to it is deprecated
    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

    keys = ["user", "item"]
    collection = EmbeddingBagCollection(
        device=torch.device(device),
        tables=[
            EmbeddingBagConfig(name=key, embedding_dim=4, num_embeddings=5, feature_names=[key])
            for key in keys
        ],
    )
    batch = KeyedJaggedTensor(
        keys=keys, values=torch.tensor([3, 1, 2, 4]), lengths=torch.tensor([1, 0, 2, 1])
    ).to(torch.device(device))
    pooled = collection(batch.permute([1, 0])).to_dict()
    item = collection.embedding_bags["item"].weight
    torch.testing.assert_close(pooled["item"], torch.stack([item[1] + item[2], item[4]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the examination; 0 if all is fine, 2 if a fatal problem was found."""
    parser = argparse.ArgumentParser(
        prog="python -m deepfm_dist.doctor",
        description=__doc__.splitlines()[0],
        epilog="examples:\n  python -m deepfm_dist.doctor --device cuda --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    report = examine(arguments.device)
    print(json.dumps(report, indent=2) if arguments.json else _as_text(report))
    return 2 if any(problem["fatal"] for problem in report["problems"]) else 0


def _backends() -> list[str]:
    import torch.distributed as dist

    if not dist.is_available():
        return []
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    return [name for name, there in available.items() if there]


def _torch_devices() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "torch_threads": torch.get_num_threads(),
        "gpus": [
            {
                "name": gpu.name,
                "memory_bytes": gpu.total_memory,
                "capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in gpus
        ],
    }


def _heading(fatal: bool) -> str:
    return coloured("PROBLEM", "red") if fatal else coloured("warning", "yellow")


def _as_text(report: dict[str, Any]) -> str:
    devices = report["devices"]
    rows = [(name, version or "not installed") for name, version in report["versions"].items()]
    rows += [
        ("variant", report["variant"] or "unclear"),
        ("CPU", f"{devices['cpu_cores']} cores, {devices.get('torch_threads', '?')} torch threads"),
        ("memory", f"{devices['memory_bytes'] / _GIB:.1f} GiB"),
    ]
    rows += [
        (
            f"GPU {index}",
            f"{gpu['name']}, {gpu['memory_bytes'] / _GIB:.1f} GiB, capability {gpu['capability']}",
        )
        for index, gpu in enumerate(devices.get("gpus", []))
    ] or [("GPU", "none")]
    rows += [
        ("backends", ", ".join(report["backends"]) or "none"),
        ("self-test", report["self_test"]),
    ]
    lines = [f"{name:<15} {value}" for name, value in rows]
    for problem in report["problems"]:
        lines.append(f"{_heading(problem['fatal'])}: {problem['what']}")
        lines.append(f"   cure: {problem['cure']}")
    return "\n".join([*lines, *([] if report["problems"] else ["no problems found"])])


if __name__ == "__main__":
    sys.exit(main())
