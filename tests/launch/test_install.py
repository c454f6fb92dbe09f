"""New environments: the wheel by the commands of docs/install.md, and the CUDA build by make."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch  # installs torch and all the rest

ROOT = Path(__file__).parents[2]


NVML = ("Init_v2", "DeviceGetCount_v2", "DeviceGetHandleByIndex_v2", "DeviceGetPciInfo_v3")
NVML += ("DeviceGetNvLinkState", "DeviceGetNvLinkRemotePciInfo_v2")
"""Functions of the driver's library that FBGEMM's CUDA build is linked with."""
CUDA_BYTES = 12 << 30
"""Room for the CUDA build of torch with NVIDIA's libraries, and for what pip unpacks."""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DEEPFM_DATA")}
    bare |= environment
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


def test_the_cuda_build_computes_on_a_cpu_with_a_stub_of_the_driver(tmp_path: Path) -> None:
    """It cannot even be imported without the driver's library."""
    if shutil.disk_usage(tmp_path).free < CUDA_BYTES:
        pytest.skip(f"needs {CUDA_BYTES >> 30} GiB of disk")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    # A CPU build of torch that is offered elsewhere would be taken for the same version.
    from_index = {"PIP_FIND_LINKS": str(nothing), "PIP_EXTRA_INDEX_URL": ""}
    home, stub = tmp_path / "venv", tmp_path / "stub"
    make = ["make", "-C", ROOT, "VARIANT=cuda", f"PYTHON={sys.executable}", f"VENV={home}"]
    run([*make, home / ".cuda"], tmp_path, **from_index)
    python = home / "bin/python"
    run([python, "-m", "pip", "install", "-q", "pytest", "hypothesis"], tmp_path)
    stub.mkdir()
    source = stub / "nvml.c"
    not_loaded = 9  # NVML_ERROR_DRIVER_NOT_LOADED
    source.write_text(
        "".join(f"int nvml{name}(void) {{ return {not_loaded}; }}\n" for name in NVML)
    )
    library = stub / "libnvidia-ml.so.1"
    run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source], tmp_path)
    with_stub = {"LD_LIBRARY_PATH": str(stub), "OMP_NUM_THREADS": "1"}
    program = "import fbgemm_gpu, torch; print(fbgemm_gpu.__variant__, torch.version.cuda)"
    assert re.fullmatch(r"cuda 1\d\.\d\n", run([python, "-c", program], tmp_path, **with_stub))
    shown = run([python, "-m", "deepfm_dist.doctor"], tmp_path, **with_stub)
    assert re.search(r"^variant +cuda$", shown, re.MULTILINE)
    assert re.search(r"^backends +gloo, nccl$", shown, re.MULTILINE)
    assert re.search(r"^self-test +ok$", shown, re.MULTILINE)
    tests = ["test_devices.py", "test_gpu.py", "distributed/test_kernels.py"]
    tests += ["distributed/test_pipeline.py"]
    files = [ROOT / "tests" / name for name in tests]
    shown = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], ROOT, **with_stub)
    assert re.search(r"^\d+ passed", shown.splitlines()[-1])
