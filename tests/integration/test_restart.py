"""Training under torchrun: killed at any moment, stopped by a scheduler, it ends with one model."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from deepfm_dist.distributed.checkpoint import MARKER, complete_steps, find_checkpoint
from tests.metrics_lines import lines

ROOT = Path(__file__).parents[2]
START_S = "start_s"  # file with the seconds from the ranks' start to their first checkpoint
KILLS = int(os.environ.get("DEEPFM_KILLS", "1"))  # `make check` asks for four
OPTIONS = (
    f"trainer={{epochs: {KILLS + 3}, batch_size: 4096, log_every_steps: 25}}",
    "trainer.validate_every_epochs=2",
    "checkpoint={every_steps: 10, keep_last: 3}",
    "model={dropout: 0.2, over_arch_layer_sizes: [32, 16], batch_norm: true}",
    "run.loggers=[]",
)


def start(home: Path, max_restarts: int, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--max-restarts={max_restarts}", "--monitor-interval=0.1"]
    command += ["-m", "deepfm_dist.train", *OPTIONS, *overrides]
    home.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        cwd=home,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def workers(torchrun: subprocess.Popen[str], unlike: Collection[int] = ()) -> list[int]:
    """Process ids of both ranks, none of them one of ``unlike``, as soon as they are there."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    actual: list[int] = []
    while torchrun.poll() is None and (len(actual) < 2 or {*actual} & {*unlike}):
        time.sleep(0.02)
        actual = [int(pid) for pid in children.read_text().split()]
    return actual


def weights(home: Path) -> dict[str, Any]:
    dcp_to_torch_save(find_checkpoint(home / "runs/sample"), home / "whole.pt")
    whole: dict[str, Any] = torch.load(home / "whole.pt")
    return whole


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("undisturbed")
    run = start(home, 0)
    workers(run)
    begun = time.monotonic()
    wait_for_a_checkpoint(run, home)
    (home / START_S).write_text(f"{time.monotonic() - begun}")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    return home


def wait_for_a_checkpoint(
    run: subprocess.Popen[str], home: Path, at_most_s: float = math.inf
) -> None:
    """Waits for a whole one more than there is."""
    begun, deadline = complete_steps(home / "runs/sample"), time.monotonic() + at_most_s
    while complete_steps(home / "runs/sample") == begun and run.poll() is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)


def half_written(home: Path) -> set[Path]:
    """Checkpoints that are being written, or never will be whole."""
    folders = (home / "runs/sample/checkpoints").glob("*")
    return {folder for folder in folders if not (folder / MARKER).exists()}


def wait_for_a_save(run: subprocess.Popen[str], home: Path) -> None:
    """Waits until another checkpoint is begun to be written."""
    left_behind = half_written(home)
    while not half_written(home) - left_behind and run.poll() is None:
        left_behind &= half_written(home)
        time.sleep(0.002)


def test_kills_at_random_moments_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("moments drawn from seed", seed)
    draw, home = random.Random(seed), tmp_path / "killed"
    start_s = float((undisturbed / START_S).read_text())
    run, ranks, resumed = start(home, KILLS), list[int](), 0
    for moment in draw.choices(["start", "save", "step"], k=KILLS):
        ranks, checkpoints = workers(run, unlike=ranks), complete_steps(home / "runs/sample")
        if moment == "start":  # importing, meeting, reading a checkpoint, the first steps
            wait_for_a_checkpoint(run, home, draw.uniform(0, start_s))
        elif moment == "save":
            wait_for_a_save(run, home)
        else:  # or validation, or the save after this one
            wait_for_a_checkpoint(run, home)
            time.sleep(draw.uniform(0, 0.15))
        resumed += bool(checkpoints) and moment != "start"
        assert run.poll() is None, "the run was over before it was killed often enough"
        os.kill(draw.choice(ranks), signal.SIGKILL)
    resumed += bool(complete_steps(home / "runs/sample"))
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert output.count("resuming training after step") >= resumed, output
    assert same(weights(home), weights(undisturbed))
    assert lines(home) == lines(undisturbed)


@pytest.mark.slow  # four starts, each of which imports torch on two ranks
def test_a_preempted_run_saves_exits_cleanly_and_resumes(undisturbed: Path, tmp_path: Path) -> None:
    home = tmp_path / "preempted"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        run = start(home, 0)
        wait_for_a_checkpoint(run, home)
        os.kill(workers(run)[1], number)
        asked = time.monotonic()
        output = run.communicate()[0]
        assert run.returncode == 0, output
        assert time.monotonic() - asked < 10
        stopped = complete_steps(home / "runs/sample")[-1]
        assert f"Stopped by signal at step {stopped}; rerun the same command to resume" in output
    run = start(home, 0)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert f"resuming training after step {stopped:,}" in output
    assert same(weights(home), weights(undisturbed))
    ours, theirs = ([e for e in lines(h) if e["event"] == "valid"] for h in (home, undisturbed))
    assert ours == theirs  # each stop also ended a window of training figures
