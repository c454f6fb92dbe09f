"""``python -m deepfm_dist.doctor``: check the installation and suggest fixes.

Unlike the start-up check it imports torchrec and fbgemm and runs them. Exit code 0 if all is fine,
2 if something has to be fixed first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from deepfm_dist import environment
from deepfm_dist.arguments import Parser, complete
from deepfm_dist.environment import Problem, memory_bytes
from deepfm_dist.messages import error_line
from deepfm_dist.terminal import coloured
from deepfm_dist.version import __version__

_LIBRARIES = ("numpy", "pandas", "pyarrow", "numba")
_GIB = 2**30
_LIMIT_S = 300  # limit for the self-test; compiling kernels for the first time takes a minute


def examine(device: str = "auto") -> dict[str, Any]:
    """Inspects this machine, then imports and runs what training needs.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``, the device to train on.

    Returns:
        The content of ``--json``: ``versions``, ``variant``, ``devices``, ``backends``,
        ``self_test`` and ``problems`` (each ``what``, ``cure``, ``fatal``).
    """
    installation = environment.observe()
    problems = environment.problems(installation, device)
    libraries = {name: environment.installed_version(name) for name in _LIBRARIES}
    missing = " ".join(name for name, version in libraries.items() if not version)
    if missing:
        problems.append(Problem(f"not installed: {missing}", f"pip install {missing}"))
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
    wants_gpu = installation.variant == "cuda" and device != "cpu"
    try:
        failure = _try_torch(report, problems, wants_gpu, must_have_gpu=device == "cuda")
    # A broken binary may raise ImportError, OSError, RuntimeError or AttributeError.
    except Exception as error:
        failure = error_line(error)
    if failure is not None:
        report["self_test"] = "failed"
        fatal = any(problem.fatal for problem in problems)
        cure = "fix the problems above first" if fatal else "run `make clean`, then `make demo`"
        problems.append(Problem(f"self-test: {failure}", cure))
    report["problems"] = [asdict(problem) for problem in problems]
    return report


def _try_torch(
    report: dict[str, Any], problems: list[Problem], wants_gpu: bool, must_have_gpu: bool
) -> str | None:
    """Adds torch's view of the devices to the report and problems, then runs the self-test.

    Returns:
        How the self-test failed; None if it passed.
    """
    report["backends"] = _backends()
    report["devices"] |= _torch_devices()
    gpus = report["devices"]["gpus"]
    if wants_gpu and not gpus:
        cure = (
            "look at CUDA_VISIBLE_DEVICES and at nvidia-smi (the driver may be older than torch's "
            "CUDA)"
        )
        problems.append(Problem("torch sees no GPU", cure, fatal=must_have_gpu))
    if wants_gpu:
        problems += _gpu_problems(gpus)
    return _failure_of_self_test("cuda" if wants_gpu and gpus else "cpu")


def self_test(device: str) -> None:
    """Runs a small example of everything that training and ranking need.

    The name of each check is printed when it begins.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        Exception: any error of a broken import or kernel; ``AssertionError`` for a wrong result.
    """
    for name, check in _CHECKS.items():
        print(name, flush=True)
        check(device)


def _check_lookup(device: str) -> None:
    """Permutes a jagged batch with fbgemm's kernel and pools it with torchrec's collection."""
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


def _check_collectives(device: str) -> None:
    """Joins a process group of one rank and sums in it on device and host."""
    import torch

    from deepfm_dist.distributed.process_group import process_group

    with process_group(device) as world:
        for tensor in (torch.ones(3, device=world.device), torch.ones(3)):
            torch.distributed.all_reduce(tensor)
            torch.testing.assert_close(tensor.cpu(), torch.ones(3))


def _check_table_update(device: str) -> None:
    """Updates a sharded table in the backward pass, by row-wise Adagrad."""
    import torch
    from torchrec import KeyedJaggedTensor

    from deepfm_dist.distributed.optimizers import table_optimizer
    from deepfm_dist.distributed.process_group import process_group
    from deepfm_dist.distributed.settings import (
        OptimizerConfig,
        ShardingConfig,
        TableOptimizerConfig,
    )
    from deepfm_dist.distributed.sharding import fill_tables, local_shards, shard
    from deepfm_dist.model.deepfm import Table, build_deepfm

    with process_group(device) as world:
        tables = table_optimizer(OptimizerConfig(tables=TableOptimizerConfig(lr=0.5)), world.device)
        model = build_deepfm(
            {"user": Table(9, ("user",))}, ["user"], 0, 3, device=torch.device("meta")
        )
        tables.attach(model.embedding_arch.ebc.parameters())
        sharded, _ = shard(model, world, ShardingConfig(), tables)
        fill_tables(sharded, {"user": torch.full((9, 4), 2.0, device=world.device)})
        ids = KeyedJaggedTensor(
            ["user"], torch.tensor([7, 7, 7]), lengths=torch.tensor([2, 0, 1])
        ).to(world.device)
        rows = sharded.module.embedding_arch.sums(ids)
        torch.testing.assert_close(rows[:, 0, 0].cpu(), torch.tensor([4.0, 0.0, 2.0]))
        rows.sum().backward()
        # The row was looked up three times: g = 3 in every column, h = mean(g^2), so that the step
        # is lr * g / sqrt(h) = lr.
        expected = torch.full((9, 4), 2.0)
        expected[7] -= 0.5
        torch.testing.assert_close(local_shards(sharded)[0][3].cpu(), expected)


def _check_catalogue(device: str) -> None:
    """Scores all pairs of some users and items by the device's kernel and by torch."""
    import torch

    from deepfm_dist.model.deepfm import InteractionArch
    from deepfm_dist.model.over_arch import OverArch
    from deepfm_dist.ranking.catalogue import CatalogueScorer
    from deepfm_dist.ranking.engines.selection import engine_for

    torch.manual_seed(0)
    arch = InteractionArch(0, 8, over_arch=OverArch(16, [20, 10])).to(device).eval()
    scorer = CatalogueScorer(arch, [False, True], 2)
    users, items = (
        scorer.side(
            side,
            torch.randn(n, 2, 8, device=device),
            torch.randn(n, 2, device=device),
            torch.zeros(n, 0, device=device),
        )
        for side, n in (("user", 5), ("item", 300))
    )
    engine = engine_for(scorer, torch.device(device))
    packed = engine.allocate(300, items)
    engine.fill(packed, 0, items)
    scores = engine.scores(engine.users([users]), 5, packed)
    torch.testing.assert_close(scores, scorer.scores(users, items), rtol=1e-4, atol=1e-4)


_CHECKS: dict[str, Callable[[str], None]] = {
    "look-up": _check_lookup,
    "collectives": _check_collectives,
    "table update": _check_table_update,
    "catalogue kernel": _check_catalogue,
}


def _failure_of_self_test(device: str) -> str | None:
    """Runs `self_test` in a subprocess, since a broken binary may crash it; None if it passed."""
    program = f"from deepfm_dist.doctor import run_self_test; run_self_test({device!r})"
    joining = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environ = {k: v for k, v in os.environ.items() if k not in joining}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=environ,
            timeout=_LIMIT_S,
            check=False,
        )
        printed, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"{_last_line(printed)}: not done in {_LIMIT_S} seconds"
    if code == 0:
        return None
    if code < 0:
        return f"{_last_line(printed)}: killed by {signal.Signals(-code).name}"
    return _last_line(printed) or _last_line(done.stderr)


def run_self_test(device: str) -> None:
    """Runs `self_test` as a process: exit code 0, or 1 with the failure as the last line."""
    logging.getLogger("torch.fx").setLevel(logging.ERROR)  # torchrec's use of it is deprecated
    try:
        self_test(device)
    except Exception as error:
        print(error_line(error), flush=True)
        sys.exit(1)


def _last_line(text: str) -> str:
    return next(reversed(text.strip().splitlines()), "")


def _gpu_problems(gpus: Sequence[dict[str, Any]]) -> list[Problem]:
    """Problems of each kind of GPU here that cannot hold tables."""
    kinds = {(gpu["name"], tuple(map(int, gpu["capability"].split(".")))) for gpu in gpus}
    detected = [environment.gpu_problem(*kind) for kind in sorted(kinds)]
    return [problem for problem in detected if problem is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the examination; returns 0 if all is fine, 2 if there is a fatal problem."""
    description = "Check the installation of this machine."
    parser = Parser("doctor", description, ["--device cuda --json"])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    complete(parser)
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
        (
            "CPU",
            f"cores: {devices['cpu_cores']}; torch threads: {devices.get('torch_threads', '?')}",
        ),
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
