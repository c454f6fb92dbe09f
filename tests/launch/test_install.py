"""The wheel, installed with pip into a new environment by the commands of docs/install.md."""

import os
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch  # installs torch and all the rest

ROOT = Path(__file__).parents[2]


def run(command: list[str | Path], cwd: Path) -> str:
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEEPFM_DATA")}
    done = subprocess.run(command, cwd=cwd, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_cpu_machine_gets_a_working_installation_from_the_wheel(tmp_path: Path) -> None:
    page = (ROOT / "docs/install.md").read_text()
    [commands] = re.findall(r"```sh\n(pip install .*whl\[cpu\].*\n(?:.+\n)*?)```", page)
    pip = [sys.executable, "-m", "pip"]
    run([*pip, "wheel", "-q", "--no-deps", "-w", tmp_path / "dist", ROOT], tmp_path)
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    for command in commands.splitlines():
        run([home / "bin" / "pip", *shlex.split(command)[1:]], tmp_path)

    installed = run([home / "bin/pip", "list", "--format=freeze"], tmp_path)
    versions = dict(line.split("==") for line in installed.replace("_", "-").splitlines())
    assert versions["torch"].startswith("2.13.0")
    assert versions["fbgemm-gpu-cpu"] == "1.8.0"
    assert versions["torchrec"] == "1.8.0"
    assert "fbgemm-gpu" not in versions
    assert not {"pytest", "mypy", "ruff", "kubernetes", "playwright"} & {*versions}
    assert "self-test" in run([home / "bin/deepfm", "doctor"], tmp_path)
    shown = run([home / "bin/deepfm", "demo", "trainer.epochs=1"], tmp_path)
    assert "whole catalogue, K = 10" in shown
    assert (tmp_path / "runs/sample/report.html").is_file()
