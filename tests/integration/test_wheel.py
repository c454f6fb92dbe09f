"""The wheel, installed away from the clone, does the whole job with what it carries."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fresh_venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the built wheel; third-party packages are this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True, capture_output=True
    )
    [wheel] = folder.glob("deepfm_dist-*.whl")
    home = folder / "venv"
    venv.create(home, with_pip=False)
    [site] = home.glob("lib/python*/site-packages")
    subprocess.run(
        [*pip, "--python", home, "install", "-q", "--no-deps", wheel],
        check=True,
        capture_output=True,
    )
    # Packages only: a path in a .pth file does not run that folder's own .pth files, so that an
    # editable install of the clone stays out of sight.
    (site / "third_party.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def run(command: list[str | Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEEPFM_DATA")}
    return subprocess.run(command, cwd=cwd, env=bare, capture_output=True, text=True, check=False)


@pytest.mark.slow  # the whole demo: four commands on two ranks
def test_the_demo_runs_from_an_installed_wheel(fresh_venv: Path, tmp_path: Path) -> None:
    where = run([fresh_venv / "bin/python", "-c", "import deepfm_dist as d; print(d)"], tmp_path)
    assert str(fresh_venv) in where.stdout
    done = run([fresh_venv / "bin/deepfm", "demo", "trainer.epochs=1"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole catalogue, K = 10" in done.stdout
    assert (tmp_path / "runs/sample/report.html").is_file()
    assert (tmp_path / "runs/sample/recommendations.csv").read_text().startswith("user,item\n")


def test_the_script_knows_the_bundled_configurations(fresh_venv: Path, tmp_path: Path) -> None:
    shown = run(
        [fresh_venv / "bin/deepfm", "train", "--config", "notebook", "--print-config"], tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert "fixed_per_user: 50" in shown.stdout
    wrong = run([fresh_venv / "bin/deepfm", "train", "--config", "notebok"], tmp_path)
    assert wrong.returncode == 2
    assert "did you mean notebook?" in wrong.stderr
