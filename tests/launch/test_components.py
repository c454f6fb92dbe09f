"""The torchx components: what each scheduler would receive, and a real run on this machine."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

pytest.importorskip("torchx", reason="torchx is not installed (pip install -e .[launch])")
from torchx.runner import get_runner
from torchx.specs.file_linter import validate

ROOT = Path(__file__).parents[2]
COMPONENTS = "launch/components.py"
ARGUMENTS = ["--config", "my file.yaml", "model.over_arch_layer_sizes=[8, 4]"]
NODE = ["-j", "2x4", "--gpu", "4", "--cpu", "16", "--memMB", "64000", "--port", "4321"]
VARIABLES = {
    "train": {"PET_MAX_RESTARTS": "3", "PET_SHUTDOWN_TIMEOUT": "300"},
    "recommend": {},
}
PAGE = (ROOT / "docs/launch.md").read_text()
LINES = {*re.findall(r"torchx run -s (\w+) launch/components\.py:(\w+) ([^`\n]+)", PAGE)}
both = pytest.mark.parametrize("component", ["train", "recommend"])


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where a user types torchx


def request(
    scheduler: str, component: str, *flags: str, arguments: Sequence[str] = ARGUMENTS
) -> Any:
    """What the scheduler would be sent, under the example's options."""
    file = configparser.ConfigParser()
    file.read(".torchxconfig.example")
    options = {k: {"True": True, "False": False}.get(v, v) for k, v in file[scheduler].items()}
    with get_runner() as runner:
        words = [*flags, "--", *arguments]
        info = runner.dryrun_component(f"{COMPONENTS}:{component}", words, scheduler, options)
    return info.request


def check_torchrun(command: str, component: str, head: str) -> None:
    """Reads a shell command as torchrun's parser does, ``head`` in its place."""
    program, *words = shlex.split(re.sub(r"\$\{(\w+):=localhost\}", r"\1", command))
    given = parse_args(words)
    assert program == "torchrun"
    assert (given.nnodes, given.nproc_per_node) == ("2", "4")
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", f"{head}:4321")
    assert (given.module, given.training_script) == (True, f"deepfm_dist.{component}")
    assert given.training_script_args == ARGUMENTS


def check_environment(found: dict[str, str], component: str) -> None:
    always = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "A": "1"}
    assert (always | VARIABLES[component]).items() <= found.items()
    assert len([name for name in found if name.startswith("PET_")]) == len(VARIABLES[component])


@both
def test_torchx_accepts_the_components(component: str) -> None:
    assert validate(COMPONENTS, component) == []


@pytest.mark.filterwarnings(r"ignore:\s+Role recommend")  # of Volcano; see below
@pytest.mark.parametrize("scheduler, component, words", sorted(LINES))
def test_torchx_understands_the_lines_of_the_page(
    scheduler: str, component: str, words: str
) -> None:
    flags, arguments = (shlex.split(part) for part in words.split(" -- "))
    if scheduler == "kubernetes":
        pytest.importorskip("kubernetes", reason="kubernetes is not installed")
    sent = str(request(scheduler, component, *flags, arguments=arguments))
    sent = " ".join(sent.split())  # YAML breaks long lines
    assert f"deepfm_dist.{component} {shlex.join(arguments)}" in sent


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["-j", "2x8", "--gpu", "8"], ("64", "393216", "8")),
        (["-j", "1:2x8"], ("8", "16384", None)),
        (["-j", "1x8", "--cpu", "16", "--memMB", "65536"], ("16", "65536", None)),
    ],
)
def test_a_node_is_given_what_its_processes_need(
    flags: list[str], expected: tuple[str, str, str | None]
) -> None:
    for node in request("slurm", "train", *flags).replicas.values():
        asked = node.sbatch_opts
        found = asked["cpus-per-task"], asked["mem"], asked.get("gpus-per-task")
        assert found == expected


def test_the_example_s_options_need_no_docker() -> None:
    file = configparser.ConfigParser()
    file.read(".torchxconfig.example")
    assert file["cli:run"]["workspace"] == ""


@both
def test_slurm_would_be_asked_for_exactly_this(component: str) -> None:
    nodes = request("slurm", component, *NODE, "--env", "A=1").replicas
    assert len(nodes) == 2
    for node in nodes.values():
        asked = {k: v for k, v in node.sbatch_opts.items() if k not in ("requeue", "ntasks")}
        assert asked == {
            "partition": "gpu",
            "time": "24:00:00",
            "ntasks-per-node": "1",
            "cpus-per-task": "16",
            "mem": "64000",
            "gpus-per-task": "4",
        }
        assert "requeue" in node.sbatch_opts
        assert (node.entrypoint, node.args[0]) == ("bash", "-c")
        check_torchrun(node.args[1], component, "SLURM_JOB_NODELIST_HET_GROUP_0")
        check_environment(node.env, component)


@both
def test_kubernetes_would_be_asked_for_exactly_this(component: str) -> None:
    pytest.importorskip("kubernetes", reason="kubernetes is not installed")
    more = ["--image", "somewhere/deepfm:1", "--mounts", "type=volume,src=claim,dst=/data"]
    with pytest.warns(UserWarning, match="Volcano"):  # it restarts jobs, but counts wrongly
        job = yaml.safe_load(str(request("kubernetes", component, *NODE, *more, "--env", "A=1")))
    assert (job["kind"], job["spec"]["queue"], job["spec"]["maxRetry"]) == ("Job", "default", 3)
    assert len(job["spec"]["tasks"]) == 2
    for number, node in enumerate(job["spec"]["tasks"]):
        pod = node["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == "somewhere/deepfm:1"
        limits = {"cpu": "16000m", "memory": "64000M", "nvidia.com/gpu": "4"}
        assert container["resources"]["limits"] == limits
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
        assert volumes[mounts["/data"]]["persistentVolumeClaim"] == {"claimName": "claim"}
        assert container["command"][:2] == ["bash", "-c"]
        head = "TORCHX_RANK0_HOST" if number == 0 else f"VC_{component.upper()}_0_HOSTS"
        check_torchrun(container["command"][2], component, head)
        environment = {e["name"]: e["value"] for e in container["env"]}
        check_environment(environment, component)


def torchx(home: Path, component: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``torchx run`` in a folder of its own, of whichever version this process imports."""
    main = "import sys; from torchx.cli.main import main; main(sys.argv[1:])"
    flags = ["-s", "local_cwd", f"{ROOT / COMPONENTS}:{component}", "-j", "1x2"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", main, "run", *flags, *arguments],
        cwd=home,
        env=os.environ
        | {"PYTHONPATH": ":".join(filter(None, paths))}
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow  # starts torchx
@pytest.mark.launch
def test_a_request_is_printed_without_docker(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes", reason="kubernetes is not installed")
    shutil.copy(ROOT / ".torchxconfig.example", tmp_path / ".torchxconfig")
    main = "import sys; from torchx.cli.main import main; main(sys.argv[1:])"
    command = ["run", "--dryrun", "-s", "kubernetes", f"{ROOT / COMPONENTS}:train", "-j", "2x8"]
    done = subprocess.run(
        [sys.executable, "-c", main, *command, "--", "--config", "mine.yaml"],
        cwd=tmp_path,
        env=os.environ | {"DOCKER_HOST": f"unix://{tmp_path}/nothing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "deepfm_dist.train --config mine.yaml" in " ".join(done.stdout.split())


@pytest.mark.slow  # four commands, three of which import torch on two ranks
@pytest.mark.launch
def test_torchx_trains_recommends_and_fails_on_this_machine(tmp_path: Path) -> None:
    done = torchx(tmp_path, "train", "--", "--config", "sample", "trainer.max_steps=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"step 20 +loss", done.stdout + done.stderr)
    lines = (tmp_path / "runs/sample/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "end"

    done = torchx(tmp_path, "recommend", "--", "--config", "sample")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/sample/recommendations.csv").is_file()

    once = ["--max_restarts", "0", "--max_retries", "0"]
    done = torchx(tmp_path, "train", *once, "--", "trainer.max_steps=soon")
    assert done.returncode == 1
    assert "trainer.max_steps: input should be a valid integer" in done.stdout + done.stderr


@pytest.mark.slow  # installs an older torchx, and does the above with it
@pytest.mark.launch
def test_the_same_with_torchx_0_7(tmp_path: Path) -> None:
    older = ["torchx==0.7.0", "kubernetes<36"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path / "older"]
    subprocess.run([*install, *older], check=True)
    flags = ["-q", "-k", "not torchx_0_7", "-m", "", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, __file__],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'older'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout
