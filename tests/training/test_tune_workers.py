"""Workers of one search, some of which are killed."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from deepfm_dist.config import load_config
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.jobs import tune as job
from deepfm_dist.jobs.tune_workers import MAX_STARTS, Worker, supervise, tune_by_workers
from deepfm_dist.training.search import Search, Trial
from deepfm_dist.training.settings import SpanConfig, TuneConfig
from deepfm_dist.tune import _without_workers, main
from tests.ranks import run_in_fork

TRIALS = 12
TUNE = TuneConfig(space={"optimizer.dense.lr": SpanConfig(low=0.001, high=1.0)}, prune=False)
WORKER = """
import os, sys, time
from pathlib import Path
from deepfm_dist.training.search import Search
from deepfm_dist.training.settings import SpanConfig, TuneConfig

folder, trials = Path(sys.argv[1]), int(sys.argv[2])
space = {"optimizer.dense.lr": SpanConfig(low=0.001, high=1.0)}
search = Search(folder / "tune", TuneConfig(space=space, prune=False), False, 1)
while True:
    if (trial := search.next(trials)) is None:
        if not search.n_elsewhere():
            break
        time.sleep(0.05)
        continue
    mark = folder / f"{trial.name}.pid"
    if mark.exists():  # whoever had the trial before is gone, or a zombie
        status = Path("/proc", mark.read_text(), "status")
        assert not status.exists() or "State:\\tZ" in status.read_text(), trial.name
    mark.write_text(str(os.getpid()))
    time.sleep(0.2)  # trains
    mark.unlink()
    search.over("complete", trial.values["optimizer.dense.lr"])
"""


def _worker(number: int, folder: Path, *command: str) -> Worker:
    return Worker(number, command, os.environ, folder / f"worker-{number}.log")


@pytest.mark.slow  # a dozen interpreters
def test_a_search_whose_workers_are_killed_ends_with_all_its_trials(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(TRIALS)]
    workers = [_worker(n, tmp_path, *command) for n in range(3)]
    rng, over = random.Random(7), threading.Event()
    killed: set[int] = set()

    def kill_some() -> None:
        while not over.is_set() and len(killed) < 6:
            at_work = [p for p in tmp_path.glob("*.pid") if p.exists()]
            if at_work and rng.random() < 0.5:
                try:
                    pid = int(rng.choice(at_work).read_text())
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, FileNotFoundError, ValueError):
                    continue
                killed.add(pid)
            time.sleep(0.2)

    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        assert supervise(workers), [w.output.read_text() for w in workers]
    finally:
        over.set()
        killer.join()
    assert len(killed) >= 3
    assert sum(worker.starts for worker in workers) == len(workers) + len(killed)
    past = Search(tmp_path / "tune", TUNE, False, 1).past()
    assert [trial.name for trial in past] == [f"trial_{n:03}" for n in range(TRIALS)]
    assert {trial.outcome for trial in past} == {"complete"}
    assert [trial.best for trial in past] == [t.values["optimizer.dense.lr"] for t in past]
    assert not list(tmp_path.glob("*.pid"))


def test_a_worker_that_fails_or_is_always_killed_ends_the_search(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sleeper = _worker(0, tmp_path, "sleep", "600")
    failing = _worker(1, tmp_path, "sh", "-c", "echo 'ConfigError: no such field' >&2; exit 2")
    with pytest.raises(DeepFMError) as caught:
        supervise([sleeper, failing])
    assert str(caught.value) == (
        f"worker 1: ConfigError: no such field; its output is in {tmp_path / 'worker-1.log'}"
    )
    assert sleeper.poll() == -signal.SIGTERM
    killed = _worker(2, tmp_path, "sh", "-c", "kill -9 $$")
    with pytest.raises(DeepFMError) as caught:
        supervise([killed])
    assert killed.starts == MAX_STARTS == 10
    assert str(caught.value) == (
        f"worker 2: killed by signal 9 (SIGKILL) 10 times, as the kernel does when memory runs "
        f"out; its output is in {tmp_path / 'worker-2.log'}. Its trial is not lost: the same "
        f"command continues it from its last checkpoint"
    )
    restarts = [record.getMessage() for record in caplog.records]
    assert restarts == 9 * [
        "worker 2: killed by signal 9 (SIGKILL); starting it again: its trial continues from its "
        "last checkpoint"
    ]
    shell = _worker(3, tmp_path, "sh", "-c", "exit 255")  # 255 - 128 is no signal
    with pytest.raises(DeepFMError, match="worker 3: exit code 255; its output"):
        supervise([shell])
    assert shell.starts == 1


def test_a_signal_is_passed_on_to_the_workers(tmp_path: Path) -> None:
    script = "trap 'kill $!; echo saved; exit 0' TERM; sleep 600 & touch ready; wait"
    worker = Worker(0, ["sh", "-c", f"cd {tmp_path}; {script}"], os.environ, tmp_path / "log")

    def stop() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert not supervise([worker])
    assert worker.output.read_text() == "saved\n"


def test_a_worker_waits_for_trials_of_others_and_takes_over_lost_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("sample", ["tune.trials=1"])
    first, second = (Search(tmp_path, TUNE, False, 1) for _ in range(2))
    lost = first.next(1)
    assert isinstance(lost, Trial)
    assert job._next(second, config, wait=False) is None
    monkeypatch.setattr(job, "WAIT_S", 0.01)
    threading.Timer(0.1, first.close).start()  # as the end of its process does
    assert job._next(second, config, wait=True) == lost
    second.over("complete", 0.5)
    assert job._next(second, config, wait=True) is None


def test_workers_get_the_command_line_without_what_starts_them() -> None:
    given = ["--config", "a.yaml", "--workers", "4", "tune.trials=3", "--ranks=2", "--quiet"]
    assert _without_workers(given) == ["--config", "a.yaml", "tune.trials=3", "--quiet"]
    assert _without_workers(["--wor", "4", "--run", "runs/x"]) == ["--run", "runs/x"]


def test_ranks_without_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--ranks", "2"]) == 2
    assert "--ranks 2: needs --workers; add --workers 1" in capsys.readouterr().err


def test_workers_are_not_started_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**variables, "TORCHELASTIC_ERROR_FILE": "error.json"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="run it without torchrun, and set --ranks"):
        tune_by_workers(load_config("sample"), [], 2, 1)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfm_dist.jobs.tune_workers._gpus", lambda: ["0", "1", "2", "3"])
    config = load_config("sample", ["tune.space={model.dropout: [0, 0.5]}"])
    with pytest.raises(ConfigError, match="--workers 3 --ranks 2: 6 processes need a GPU each"):
        tune_by_workers(config, [], 3, 2)


@pytest.mark.slow  # interpreters that import torch
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_command_starts_workers_of_several_ranks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], ranks: int
) -> None:
    settings = [
        f"run={{name: one, loggers: [], device: cpu, runs_root: {tmp_path}}}",
        f"run.prepared_root={tmp_path / 'prepared'}",
        "trainer={batch_size: 4096, max_steps: 3, monitor: auc}",
        "model={embedding_dim: 4, over_arch_layer_sizes: [8]}",
        "tune={trials: 3, space: {optimizer.tables.lr: [0.01, 0.1, 0.3]}}",
    ]
    file = tmp_path / "one.yaml"  # workers know nothing of the tests' own sample
    file.write_text(load_config("sample", settings).to_yaml())
    arguments = ["--workers", "2", "--ranks", str(ranks), "--config", str(file)]
    assert run_in_fork(main, arguments, timeout_s=400) == 0
    assert "best: trial_00" in capfd.readouterr().out
    trials = tmp_path / "one/tune"
    plans = [json.loads(path.read_text()) for path in trials.glob("trial_*/plan.json")]
    assert [plan["ranks"] for plan in plans] == [ranks] * 3
    assert (trials / "best.yaml").is_file()
