"""The wheel, installed away from the clone, does the whole job with what it carries."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from deepfm_dist import __version__

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; with hatchling in this environment it is built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    subprocess.run(
        [*PIP, "wheel", "-q", "--no-deps", *here, "-w", folder, ROOT],
        check=True,
        capture_output=True,
    )
    [path] = folder.glob("deepfm_dist-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh_venv(wheel: Path) -> Path:
    """A new environment with the wheel; third-party packages are this environment's."""
    home = wheel.parent / "venv"
    venv.create(home, with_pip=False)
    [site] = home.glob("lib/python*/site-packages")
    subprocess.run(
        [*PIP, "--python", home, "install", "-q", "--no-deps", wheel],
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


def test_the_wheel_holds_the_package_and_what_its_commands_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(
        ["git", "ls-files", "deepfm_dist", "configs", "data/sample"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    package = {name for name in listed if name.startswith("deepfm_dist/")}
    assert {"report.html", "style.css", "index.html", "py.typed"} <= {Path(n).name for n in package}
    assert names == package | {f"deepfm_dist/_bundled/{name}" for name in {*listed} - package}


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
    version = run([fresh_venv / "bin/deepfm", "--version"], tmp_path)
    assert version.stdout == f"deepfm_dist {__version__}\n"
    shown = run(
        [fresh_venv / "bin/deepfm", "train", "--config", "notebook", "--print-config"], tmp_path
    )
    assert shown.returncode == 0, shown.stderr
    assert "fixed_per_user: 50" in shown.stdout
    wrong = run([fresh_venv / "bin/deepfm", "train", "--config", "notebok"], tmp_path)
    assert wrong.returncode == 2
    assert "did you mean notebook?" in wrong.stderr
