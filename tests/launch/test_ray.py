"""Training on a Ray cluster of this machine."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.metrics_lines import lines

pytest.importorskip("ray", reason="ray is missing (requirements/launch.txt)")
pytestmark = [pytest.mark.launch, pytest.mark.slow]  # every worker imports torch

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch/ray_train.py")
SETTINGS = (
    *("--config", "sample", "model.embedding_dim=8", "checkpoint.every_steps=10"),
    "trainer={max_steps: 40, batch_size: 4096, log_every_steps: 1, validate_every_epochs: 2}",
)


def killed_once(event: str, values: Mapping[str, Any]) -> None:
    """Kills rank 0, which calls it, at step 25 of the first attempt."""
    if event == "train" and values["step"] == 25 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that use a cluster of four CPUs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,  # this cluster's own
        "NO_COLOR": "1",
    }
    program = str(Path(sys.executable).parent / "ray")
    folder = Path("/tmp") / f"deepfm-ray-{os.getpid()}"  # short: names of sockets are limited
    command = [program, "start", "--head", "--block", f"--port={port}", "--num-cpus=4"]
    command += ["--include-dashboard=false", f"--temp-dir={folder}"]
    log = tmp_path_factory.mktemp("ray") / "log"
    with log.open("w") as output:
        head = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not (address := re.search(rf"[\d.]+:{port}\b", log.read_text())):
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield {**environment, "RAY_ADDRESS": address[0]}
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def run(environment: dict[str, str], home: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    home.mkdir()
    return subprocess.run(
        words, cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def test_a_run_on_ray_has_torchrun_s_figures_though_a_worker_is_killed(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*torchrun, "-m", "deepfm_dist.train", "--quiet", *SETTINGS, "run.loggers=[]"]
    done = run(cluster, tmp_path / "torchrun", *words)
    assert done.returncode == 0, done.stderr
    logger = "run.loggers=['tests.launch.test_ray:killed_once']"
    done = run(cluster, tmp_path / "ray", sys.executable, SCRIPT, *SETTINGS, logger)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ray/killed").exists()
    assert lines(tmp_path / "ray") == lines(tmp_path / "torchrun")
    assert lines(tmp_path / "ray")[-1]["step"] == 40


def test_a_mistake_is_one_line_and_is_not_tried_again(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    missing = "data.interactions.file=none.csv"
    done = run(cluster, tmp_path / "ray", sys.executable, SCRIPT, "--workers", "1", missing)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "DataError" in line]  # among Ray's own
    assert line.startswith("DataError: ") and "none.csv" in line


def test_a_cluster_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("ray_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def refused(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(script.ray, "init", refused)  # it would try for minutes
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert script.main([]) == 2
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers" in capsys.readouterr().err
