"""The launcher's variables, and how ranks and their launcher end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from deepfm_dist import cli, launcher, prepare
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import EnvironmentProblem
from deepfm_dist.launcher import Launch, read_launch
from tests.ranks import variables

TORCHRUN = {
    **variables(1, 4),
    "GROUP_WORLD_SIZE": "1",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_ERROR_FILE": "/tmp/error.json",
}


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in TORCHRUN.items() if name not in names}


def test_a_launch_is_read() -> None:
    assert read_launch(TORCHRUN) == Launch(
        rank=1,
        world_size=4,
        local_rank=1,
        local_world_size=4,
        master=("127.0.0.1", 29500),
        restarts=1,
        max_restarts=2,
        restarted=True,
        agent_holds_store=True,
        error_file="/tmp/error.json",
    )
    few = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "80"}
    assert read_launch(few) == Launch(rank=3, world_size=4, master=("node0", 80))


@pytest.mark.parametrize(
    ("leftovers", "ignored"),
    [
        ({}, ()),
        ({"RANK": "", "WORLD_SIZE": " "}, ()),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, ()),
        ({"RANK": "1"}, ("RANK=1",)),
        ({"RANK": "x", "WORLD_SIZE": "1"}, ("RANK=x",)),
        ({"WORLD_SIZE": "4", "MASTER_ADDR": "a"}, ("WORLD_SIZE=4",)),
        ({"WORLD_SIZE": "x", "RANK": "0"}, ("WORLD_SIZE=x",)),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, ("LOCAL_RANK=1", "LOCAL_WORLD_SIZE=2")),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, ()),
        ({"SLURM_PROCID": "x", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ()),
    ],
)
def test_leftover_variables_are_not_a_launch(
    leftovers: dict[str, str], ignored: tuple[str, ...]
) -> None:
    assert read_launch(leftovers) == Launch(ignored=ignored)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK=x must be a whole number from 0 to 3"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 must be"),
        (TORCHRUN | {"RANK": "\N{FULLWIDTH DIGIT ONE}"}, "RANK=. must be"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1 must be"),
        (TORCHRUN | {"RANK": "1.0"}, r"RANK=1\.0 must be"),
        (
            TORCHRUN | {"WORLD_SIZE": "0"},
            "WORLD_SIZE=0 must be a whole number from 1 to 2147483647",
        ),
        (TORCHRUN | {"WORLD_SIZE": "9" * 20}, "WORLD_SIZE=9+ must be .* to 2147483647"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=9+ must be .* to 2147483647"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE=four must be"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 must be a whole number from 0 to 3"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE=5 must be .* from 1 to 4"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT=http must be .* from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be"),
        (TORCHRUN | {"GROUP_WORLD_SIZE": "x"}, "GROUP_WORLD_SIZE=x .* unset GROUP_WORLD_SIZE$"),
        (TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x must be"),
        ({"SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT=x .* unset SLURM_RESTART_COUNT$"),
        (without("MASTER_PORT"), "RANK=1 and WORLD_SIZE=4 are set, but not MASTER_PORT: "),
        (without("MASTER_ADDR", "MASTER_PORT"), "but not MASTER_ADDR and MASTER_PORT: "),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun has started this command 4 times"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started this command 2 times"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_with_the_cure(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(EnvironmentProblem, match=message) as caught:
        read_launch(environment)
    cure = str(caught.value).rpartition(" run unset ")[2].split()
    cured = {name: text for name, text in environment.items() if name not in cure}
    read_launch(cured)  # what the message says to type does help


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "EnvironmentProblem: RANK=x must be"),
        ({"RANK": "1"}, "DataError: /nowhere"),
        ({"RANK": "x", "LOCAL_RANK": "y"}, "DataError: /nowhere"),
    ],
)
def test_a_mistake_is_shown_whatever_the_variables_say(
    environment: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(launcher, "watch_torchrun", lambda launch: None)
    assert prepare.main(["--quiet", "data.root=/nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_ignored_options_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare.main([f"run.prepared_root={tmp_path}"]) == 0
    assert "ignored: LOCAL_RANK=1; " in caplog.text


def test_ranks_that_cannot_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfm_dist.distributed.heartbeat.SHORT", timedelta(seconds=0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        port = silent.getsockname()[1]
        for rank, reason in ((0, "address already in use"), (1, "no answer")):
            for name, text in variables(rank, 2, port).items():
                monkeypatch.setenv(name, text)
            with pytest.raises(EnvironmentProblem, match=rf"MASTER_PORT={port}: .*{reason}"):
                join()
    monkeypatch.setenv("MASTER_ADDR", "nosuchhost.invalid")
    with pytest.raises(EnvironmentProblem, match=r"MASTER_ADDR=nosuchhost\.invalid .*unset RANK"):
        join()


def join() -> None:
    with process_group("cpu", timeout_s=0.5):
        pass


def test_a_mistake_of_one_rank_alone_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in variables(1, 2).items():
        monkeypatch.setenv(name, text)
    begun = time.monotonic()
    monkeypatch.setattr(launcher, "GRACE_S", 0.1)
    assert cli.run("prepare", "", prepare._prepare, ["--quiet", "trainer.batch_size=0"]) == 2
    assert time.monotonic() - begun >= 0.2  # in which a launcher would have ended it
    assert "trainer.batch_size" in capsys.readouterr().err


def test_the_ranks_of_a_killed_launcher_end(tmp_path: Path) -> None:
    rank = (
        "import os, time; from deepfm_dist.launcher import *\n"
        "watch_torchrun(read_launch()); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}]); time.sleep(60)"
    )
    torchrun = subprocess.Popen(
        [sys.executable, "-c", parent],
        env=os.environ | variables() | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert torchrun.stdout is not None
    child = int(torchrun.stdout.readline())
    torchrun.send_signal(signal.SIGKILL)
    _, errors = torchrun.communicate(timeout=10)  # until the rank has closed them, too
    assert errors.startswith(f"torchrun (process {torchrun.pid}) was killed: its ranks end; ")
    assert not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/exe").exists()


def test_torchrun_gets_the_cause_and_shows_it_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (variables() | {"TORCHELASTIC_ERROR_FILE": f"{tmp_path}/e.json"}).items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(cli, "watch_torchrun", lambda launch: None)
    assert prepare.main(["data.root=/nowhere"]) == 2
    cause = json.loads((tmp_path / "e.json").read_text())["message"]
    assert re.fullmatch("DataError: /nowhere/.*no such file.*", cause["message"])


def test_a_mistake_under_torchrun_is_one_screen(tmp_path: Path, forked: dict[str, str]) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "deepfm_dist.train", "--quiet", "data.root=/nowhere"]
    environment = os.environ | forked
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert done.stderr.count("DataError: /nowhere/train_ratings.csv: no such file") == 1
    assert "DataError: /nowhere/train_ratings.csv: no such file" in lines[-2]
    assert len(lines) < 45
