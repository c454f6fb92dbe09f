"""The start-up check and the doctor: each broken combination gets its own line and cure."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deepfm_dist import doctor, environment
from deepfm_dist.distributed import process_group
from deepfm_dist.environment import FBGEMM_OF_TORCH, TESTED_TORCH, Installation, problems
from deepfm_dist.errors import EnvironmentProblem
from tests.ranks import RankFailed, run_alone

REPOSITORY = Path(__file__).parent.parent
CPU = Installation(
    python=(3, 11, 7),
    platform="linux",
    versions={"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0"},
    has_nvidia_driver=False,
    torch_cuda="cpu",
)
CUDA = Installation(
    python=(3, 12, 1),
    platform="linux",
    versions={"torch": "2.13.0", "fbgemm-gpu": "1.8.0", "torchrec": "1.8.0"},
    has_nvidia_driver=True,
    torch_cuda=None,  # the package index's own wheel carries no tag
)


def with_versions(base: Installation, **versions: str | None) -> Installation:
    renamed = {name.replace("_", "-"): version for name, version in versions.items()}
    return replace(base, versions=base.versions | renamed)


@pytest.mark.parametrize(
    ("installation", "device"),
    [
        (CPU, "auto"),
        (CPU, "cpu"),
        (CUDA, "auto"),
        (CUDA, "cpu"),
        (CUDA, "cuda:1"),
        (replace(CUDA, torch_cuda="cu130"), "cuda"),
        (replace(CPU, has_nvidia_driver=True), "cpu"),
        (with_versions(CPU, torch="2.13.0", torchrec="1.8.3"), "auto"),  # a CUDA torch, a patch
        (replace(CPU, python=(3, 13, 9)), "auto"),
    ],
)
def test_a_good_installation_has_no_problem(installation: Installation, device: str) -> None:
    assert problems(installation, device) == []


SET = 'pip install --no-deps "fbgemm-gpu-cpu==1.8.*" "torchrec==1.8.*"'
TESTED = "take torch 2.13 with fbgemm 1.8 and torchrec 1.8: `make clean`"
BROKEN = {
    "macOS": (replace(CPU, platform="darwin"), "Linux only, this is darwin", "WSL2 or Docker"),
    "old Python": (
        replace(CPU, python=(3, 10, 4)),
        "Python 3.10.4 is not supported",
        "make PYTHON=python3.12",
    ),
    "new Python": (
        replace(CPU, python=(3, 14, 0)),
        "Python 3.14.0 is not supported",
        "make PYTHON=python3.12",
    ),
    "no torch": (with_versions(CPU, torch=None), "torch is not installed", TESTED),
    "old torch, its own fbgemm": (
        with_versions(CPU, torch="2.10.0+cpu", fbgemm_gpu_cpu="1.5.0", torchrec="1.5.0"),
        "torch 2.10.0+cpu is older than 2.11",
        TESTED,
    ),
    "torch ahead of fbgemm": (
        with_versions(CPU, torch="2.15.0", fbgemm_gpu_cpu="1.9.0", torchrec="1.9.2"),
        "torch 2.15.0 has no fbgemm yet",
        TESTED,
    ),
    "both fbgemm": (
        with_versions(CPU, fbgemm_gpu="1.9.0"),
        "fbgemm-gpu 1.9.0 and fbgemm-gpu-cpu 1.8.0 are both installed",
        "run `make clean`",
    ),
    "no fbgemm": (with_versions(CPU, fbgemm_gpu_cpu=None), "fbgemm is not installed", SET),
    "no fbgemm, a GPU": (
        with_versions(CUDA, fbgemm_gpu=None),
        "fbgemm is not installed",
        '"fbgemm-gpu==1.8.*"',
    ),
    "no fbgemm, a GPU, a CPU torch": (
        replace(with_versions(CPU, fbgemm_gpu_cpu=None), has_nvidia_driver=True),
        "fbgemm is not installed",
        SET,
    ),
    "fbgemm behind torch": (
        with_versions(CPU, fbgemm_gpu_cpu="1.7.0"),
        "torch 2.13.0+cpu goes with fbgemm 1.8, not with fbgemm-gpu-cpu 1.7.0",
        SET,
    ),
    "fbgemm ahead of torch": (
        with_versions(CUDA, fbgemm_gpu="1.9.0"),
        "torch 2.13.0 goes with fbgemm 1.8, not with fbgemm-gpu 1.9.0",
        'pip install --no-deps "fbgemm-gpu==1.8.*" "torchrec==1.8.*"',
    ),
    "no torchrec": (with_versions(CPU, torchrec=None), "torchrec is not installed", SET),
    "torchrec ahead": (
        with_versions(CPU, torchrec="1.9.2"),
        "torch 2.13.0+cpu goes with torchrec 1.8, not with torchrec 1.9.2",
        SET,
    ),
    "CUDA fbgemm, CPU torch": (
        replace(with_versions(CUDA, torch="2.13.0+cpu"), torch_cuda="cpu"),
        "fbgemm-gpu 1.8.0 needs a CUDA build of torch, not 2.13.0+cpu",
        "`make VARIANT=cuda demo`, with PIP_EXTRA_INDEX_URL unset",
    ),
    "CUDA fbgemm, CPU torch, no GPU": (
        replace(with_versions(CUDA, torch="2.13.0+cpu"), torch_cuda="cpu", has_nvidia_driver=False),
        "fbgemm-gpu 1.8.0 needs a CUDA build of torch, not 2.13.0+cpu",
        "make VARIANT=cpu",
    ),
    "CUDA fbgemm, no driver": (
        replace(CUDA, has_nvidia_driver=False),
        "fbgemm-gpu 1.8.0 needs NVIDIA's driver: libnvidia-ml.so.1 is not found",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility) or take the CPU build",
    ),
}


@pytest.mark.parametrize(("installation", "what", "cure"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_broken_installation_has_one_problem_and_its_cure(
    installation: Installation, what: str, cure: str, device: str
) -> None:
    (problem,) = problems(installation, device)
    assert problem.fatal
    assert what in problem.what
    assert cure in problem.cure
    assert "\n" not in str(problem)


def test_all_problems_of_a_plain_pip_install_of_torchrec_are_reported() -> None:
    installation = replace(
        with_versions(CPU, fbgemm_gpu_cpu=None, fbgemm_gpu="1.9.0"), has_nvidia_driver=False
    )
    whats = [problem.what for problem in problems(installation)]
    assert "torch 2.13.0+cpu goes with fbgemm 1.8, not with fbgemm-gpu 1.9.0" in whats
    assert "fbgemm-gpu 1.9.0 needs a CUDA build of torch, not 2.13.0+cpu" in whats


@pytest.mark.parametrize(
    ("driver", "cure"), [(True, "make VARIANT=cuda"), (False, "use run.device=cpu")]
)
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_is_refused_by_the_cpu_variant(device: str, driver: bool, cure: str) -> None:
    (problem,) = problems(replace(CPU, has_nvidia_driver=driver), device)
    assert problem.fatal
    assert problem.what == f"run.device={device}, but fbgemm-gpu-cpu 1.8.0 has no CUDA kernels"
    assert cure in problem.cure


def test_an_unused_gpu_is_a_warning() -> None:
    (problem,) = problems(replace(CPU, has_nvidia_driver=True), "auto")
    assert not problem.fatal
    assert "GPUs stay unused" in problem.what
    assert "make VARIANT=cuda" in problem.cure


@pytest.mark.parametrize(("torch", "fbgemm"), FBGEMM_OF_TORCH.items())
def test_every_matched_pair_is_accepted_with_a_warning_where_it_is_not_the_tested_one(
    torch: tuple[int, int], fbgemm: tuple[int, int]
) -> None:
    minor = f"{fbgemm[0]}.{fbgemm[1]}"
    installation = with_versions(
        CUDA, torch=f"{torch[0]}.{torch[1]}.0+cu130", fbgemm_gpu=f"{minor}.0", torchrec=f"{minor}.1"
    )
    actual = problems(installation, "cuda")
    assert not any(problem.fatal for problem in actual)
    assert len(actual) == (torch != TESTED_TORCH)
    assert all("torch 2.13 with fbgemm 1.8" in problem.cure for problem in actual)


def test_this_installation_is_observed_and_accepted() -> None:
    installation = environment.observe()
    assert installation.python == sys.version_info[:3]
    assert installation.fbgemm
    environment.require()


def test_require_raises_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = with_versions(replace(CPU, python=(3, 10, 0)), torchrec=None)
    monkeypatch.setattr(environment, "observe", lambda: broken)
    with pytest.raises(EnvironmentProblem) as raised:
        environment.require()
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("Python 3.10.0 is not supported; use Python 3.11, 3.12")


def test_require_logs_what_is_merely_unusual(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unusual = with_versions(CPU, torch="2.14.1", fbgemm_gpu_cpu="1.9.0", torchrec="1.9.2")
    monkeypatch.setattr(environment, "observe", lambda: unusual)
    environment.require()
    assert "not the tested versions; if anything fails" in caplog.text


def test_the_check_imports_nothing_heavy() -> None:
    program = (
        "import sys, deepfm_dist.environment as e; e.observe(); "
        "print(sorted({'torch', 'fbgemm_gpu', 'torchrec', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def requirements(name: str) -> set[str]:
    """The lines of a file in requirements/, without comments and what it includes."""
    text = (REPOSITORY / "requirements" / name).read_text()
    return {line for line in text.splitlines() if line and not line.startswith(("#", "-r"))}


def test_the_requirement_files_agree_with_pyproject_and_with_the_check() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    # `make` installs torchrec and the project with --no-deps, so base.txt has to be complete.
    needs_of_torchrec = {*extras["cpu"]} - {"torch==2.13.0"} - requirements("cpu.txt")
    assert requirements("base.txt") == {"torch==2.13.0"} | needs_of_torchrec | {
        line for line in project["dependencies"] if not line.startswith("torch>=")
    }
    named = {canonicalize_name(Requirement(line).name) for line in needs_of_torchrec}
    required = [Requirement(line) for line in metadata.requires("torchrec") or []]
    mandatory = {canonicalize_name(r.name) for r in required if not r.marker}
    assert named | {"tqdm", "fbgemm-gpu"} == mandatory
    assert requirements("cpu.txt") <= {*extras["cpu"]}
    assert {"torch==2.13.0"} | requirements("cuda.txt") | requirements("torchrec.txt") == {
        *extras["cuda"]
    }

    pins = dict(line.split("==") for line in extras["cuda"])
    versions = environment.Installation(
        (3, 12, 0), "linux", pins, has_nvidia_driver=True, torch_cuda=None
    )
    assert problems(versions, "cuda") == []


NOT_DECLARED = {
    "triton": "comes with the CUDA build of torch, and only a GPU needs it",
    "fbgemm_gpu": "in the extras cpu and cuda: which build is right depends on the machine",
    "torchrec": "in the extra cuda; the extra cpu cannot name it, see pyproject.toml",
}
EXTRA_OF = {"serve.py": "serve", "serving": "serve"}
"""Rooms that nothing but their own command imports: their extra may be imported at the top."""


@cache
def distributions_of_modules() -> dict[str, set[str]]:
    """Reads every installed distribution, which takes a second."""
    modules = {"upath": ["universal-pathlib"], **metadata.packages_distributions()}
    # One that two folders of sys.path hold comes twice.
    return {module: {canonicalize_name(n) for n in names} for module, names in modules.items()}


def third_party_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields the distributions that a file imports, and whether as soon as it is imported."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    distributions = distributions_of_modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
        else:
            continue
        for module in {name.split(".")[0] for name in modules} - {*sys.stdlib_module_names}:
            if module not in NOT_DECLARED:
                [distribution] = distributions.get(module, {module})
                yield canonicalize_name(distribution), id(node) not in lazy


def names_of(lines: Iterable[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_what_the_package_imports_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    always = names_of(project["dependencies"]) | {"deepfm-dist"}
    sometimes = always | names_of(line for extra in extras.values() for line in extra)
    missing = []
    package = REPOSITORY / "deepfm_dist"
    for path in sorted(package.rglob("*.py")):
        extra = EXTRA_OF.get(path.relative_to(package).parts[0])
        at_once = always | names_of(extras[extra] if extra else [])
        for name, is_at_once in third_party_imports(path):
            if name not in (at_once if is_at_once else sometimes):
                missing.append(f"{path}: {name}")
    assert missing == [], missing


def test_what_tests_and_tools_import_is_in_the_requirements() -> None:
    files = ("base.txt", "dev.txt", "launch.txt")
    known = names_of(line for name in files for line in requirements(name))
    known |= {"deepfm-dist", "tests", "benchmarks", "examples"}
    scripts = {canonicalize_name(path.stem) for path in (REPOSITORY / "benchmarks").iterdir()}
    missing = []
    for folder in ("tests", "docs", "examples", "launch", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            # These compare with other libraries, each in an environment of its own.
            if path.parent.name not in ("oracles", "rivals"):
                names = {name for name, _ in third_party_imports(path)}
                missing += [f"{path}: {name}" for name in sorted(names - known - scripts)]
    assert missing == [], missing


@pytest.fixture
def no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what the doctor says of other things: the self-test takes seconds."""
    monkeypatch.setattr(doctor, "_failure_of_self_test", lambda device: None)


def test_the_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for package in ("torch", "torchrec", "numpy", "pandas", "pyarrow", "numba"):
        version = environment.installed_version(package) or "missing"
        assert re.search(rf"^{package} +{re.escape(version)}$", out, re.MULTILINE)
    assert re.search(r"^self-test +ok$", out, re.MULTILINE)
    assert "gloo" in out


def test_the_doctor_prints_json(no_self_test: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["variant"] == environment.observe().variant
    assert report["versions"]["torch"] == environment.installed_version("torch")
    assert report["devices"]["cpu_cores"] >= 1
    assert report["devices"]["memory_bytes"] > 2**20
    assert report["self_test"] == "ok"


def test_the_doctor_lists_each_gpu(
    no_self_test: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    assert doctor.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^GPU 0 +Some GPU, 80\.0 GiB, capability 9\.0$", out, re.MULTILINE)
    assert re.search(r"^GPU 1 +Some GPU", out, re.MULTILINE)


@pytest.mark.parametrize(("device", "expected"), [("cuda", 2), ("auto", 0)])
def test_the_doctor_misses_a_gpu_that_torch_does_not_see(
    no_self_test: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    device: str,
    expected: int,
) -> None:
    monkeypatch.setattr(environment, "observe", lambda: CUDA)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.main(["--device", device]) == expected
    out = capsys.readouterr().out
    assert f"{'PROBLEM' if expected else 'warning'}: torch sees no GPU" in out
    assert "cure: look at CUDA_VISIBLE_DEVICES" in out


@pytest.mark.parametrize(
    ("module", "failure"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "look-up: killed by SIGILL"),
        ("import time; time.sleep(60)", "look-up: not done in 5 seconds"),
    ],
)
def test_a_torchrec_that_does_not_import_is_a_line_and_exit_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    module: str,
    failure: str,
) -> None:
    """As broken binaries go: an exception, an instruction that the CPU lacks, a call that hangs."""
    (tmp_path / "torchrec.py").write_text(module)
    # As light as can be: what is imported before it shall not take the time that is measured.
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPOSITORY}")
    monkeypatch.setattr(doctor, "_LIMIT_S", 5 if "sleep" in module else 60)
    assert doctor.main([]) == 2
    out = capsys.readouterr().out
    assert f"PROBLEM: self-test: {failure}" in out
    assert "cure: run `make clean`" in out


WRONG = {
    "_check_collectives": ("torch.distributed.all_reduce", lambda tensor: tensor.add_(1)),
    "_check_table_update": (
        "deepfm_dist.distributed.kernels.rowwise_adagrad",
        lambda *_: None,
    ),
    "_check_catalogue": (
        "deepfm_dist.ranking.engines.numba.NumbaEngine.scores",
        lambda self, users, n, items: torch.zeros(n, items.n),
    ),
}


@pytest.mark.parametrize("check", WRONG)
def test_the_self_test_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    monkeypatch.setattr(*WRONG[check])
    with pytest.raises(RankFailed, match="Tensor-likes are not close"):
        run_alone(getattr(doctor, check), "cpu")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
def test_a_gpu_that_fbgemm_has_code_for_is_accepted(capability: tuple[int, int]) -> None:
    assert environment.gpu_problem("Some GPU", capability) is None


@pytest.mark.parametrize("capability", [(7, 5), (10, 3), (12, 0)])
def test_a_gpu_that_fbgemm_has_no_code_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_self_test: None,
    capability: tuple[int, int],
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30, major=major, minor=minor)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: gpu)
    monkeypatch.setattr(environment, "observe", lambda: CUDA)
    monkeypatch.setattr(process_group, "_fbgemm_has_cuda", lambda: True)
    assert doctor.main(["--device", "cuda"]) == 2
    line = f"FBGEMM has no code for Some GPU (capability {major}.{minor}), only for sm_80, sm_90a"
    assert capsys.readouterr().out.count(line) == 1
    assert process_group._device("auto", 0, 1).type == "cpu"
    with pytest.raises(EnvironmentProblem, match=r"use run.device=cpu, or a GPU of the gen"):
        process_group._device("cuda", 0, 1)


def test_a_missing_library_and_a_fatal_problem_are_lines_too(
    no_self_test: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = environment.installed_version
    monkeypatch.setattr(
        environment, "installed_version", lambda name: None if name == "numba" else real(name)
    )
    monkeypatch.setattr(environment, "observe", lambda: with_versions(CPU, torchrec=None))
    assert doctor.main(["--device", "cuda"]) == 2
    out = capsys.readouterr().out
    assert "PROBLEM: torchrec is not installed" in out
    assert "PROBLEM: run.device=cuda" in out
    assert "PROBLEM: not installed: numba" in out
