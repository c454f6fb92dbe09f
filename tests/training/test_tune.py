"""Searches: within their space, the same after a stop, and worth their trials."""

import importlib.util
import json
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch.distributed import distributed_c10d

from deepfm_dist import train, tune
from deepfm_dist.config import Config, load_config
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DeepFMError
from deepfm_dist.jobs.train import Trained, train_on
from deepfm_dist.jobs.tune import tune as searched
from deepfm_dist.training.search import Search, Trial
from deepfm_dist.training.settings import SpanConfig, TuneConfig
from deepfm_dist.training.state import LoopState
from deepfm_dist.training.trainer import Pruned
from tests.interop.test_logistic import _clicks
from tests.ranks import run_alone, run_ranks

TUNE = TuneConfig(
    space={
        "optimizer.dense.lr": SpanConfig(low=0.001, high=1.0, log=True),
        "model.embedding_dim": SpanConfig(low=4, high=32),
        "model.over_arch_layer_sizes": ([30, 20], [64]),
    },
    prune=False,
)
PRUNED = TuneConfig(space={"model.dropout": SpanConfig(low=0.0, high=0.5)})


def value_of(trial: Trial) -> float:
    """What a trial is worth: a smooth function of what it tried."""
    lr, dim = trial.values["optimizer.dense.lr"], trial.values["model.embedding_dim"]
    bonus = 0.5 if trial.values["model.over_arch_layer_sizes"] == [64] else 0.0
    return bonus - abs(lr - 0.1) - abs(dim - 20) / 100


def tried(search: Search, trials: int, until: int = 10**9) -> list[Trial]:
    """Goes on with a search; at the ``until``-th trial it is left open."""
    actual: list[Trial] = []
    while (trial := search.next(trials)) is not None:
        actual.append(trial)
        if len(actual) == until:
            search.close()  # as the end of its process does
            break
        search.over("complete", value_of(trial))
    return actual


def test_a_search_stays_in_its_space_and_finds_what_is_good(tmp_path: Path) -> None:
    search = Search(tmp_path, TUNE, False, 1)
    trials = tried(search, 40)
    assert [t.name for t in trials] == [f"trial_{n:03}" for n in range(40)]
    for trial in trials:
        assert 0.001 <= trial.values["optimizer.dense.lr"] <= 1.0
        assert trial.values["model.embedding_dim"] in range(4, 33)
        assert trial.values["model.over_arch_layer_sizes"] in ([30, 20], [64])
    best = search.best()
    assert best is not None
    assert best.best == max(value_of(t) for t in trials) > 0.4
    assert len({json.dumps(t.values) for t in trials}) == 40


@pytest.mark.parametrize("until", [1, 4, 14])
def test_a_search_that_was_cut_off_tries_the_same_as_one_that_was_not(
    tmp_path: Path, until: int
) -> None:
    whole = tried(Search(tmp_path / "whole", TUNE, False, 1), 16)
    before = tried(Search(tmp_path / "cut", TUNE, False, 1), 16, until)
    again = Search(tmp_path / "cut", TUNE, False, 1)
    after = tried(again, 16)
    assert before[-1] == after[0]  # the open one, under its name
    assert before[:-1] + after == whole
    assert [(t.name, t.values, t.best) for t in again.past()] == [
        (t.name, t.values, value_of(t)) for t in whole
    ]
    assert again.next(16) is None
    with pytest.raises(ConfigError, match=r"study\.log: the study of another search"):
        Search(tmp_path / "cut", TUNE, False, 2)
    with pytest.raises(ConfigError, match=r"study\.log: the study of another search"):
        Search(tmp_path / "cut", TUNE, False, 1, of={"trainer": {"epochs": 9}})


@pytest.mark.parametrize("lower", [False, True])
def test_a_trial_below_the_median_is_not_worth_going_on_with(tmp_path: Path, lower: bool) -> None:
    search = Search(tmp_path, PRUNED, lower, 1)
    sign = -1 if lower else 1
    for level in (0.5, 0.6, 0.7, 0.8):  # the first four run to their end
        assert search.next(9) is not None
        assert not any(search.report(epoch, sign * (level + epoch / 100)) for epoch in range(1, 6))
        search.over("complete", sign * (level + 0.05))
    search.next(9)
    assert not search.report(1, sign * 0.1)  # too early to tell
    assert search.report(2, sign * 0.1)
    search.over("pruned", None)
    search.next(9)
    assert search.report(3, sign * 0.6)
    search.over("pruned", None)
    search.next(9)
    assert not search.report(3, sign * 0.75)
    search.over("failed", None)
    assert [t.outcome for t in search.past()] == ["complete"] * 4 + ["pruned"] * 2 + ["failed"]
    best = search.best()
    assert best is not None
    assert best.best == pytest.approx(sign * 0.85)


def test_a_trial_that_was_cut_off_is_judged_by_its_earlier_epochs_too(tmp_path: Path) -> None:
    actual = []
    for name, cut in (("whole", False), ("cut", True)):
        search = Search(tmp_path / name, PRUNED, False, 1)
        for level in (0.5, 0.6, 0.7, 0.8):
            search.next(9)
            assert not any(search.report(epoch, level) for epoch in range(1, 6))
            search.over("complete", level)
        search.next(9)
        stops = [search.report(epoch, 0.9) for epoch in (1, 2, 3)]
        if cut:
            search.close()
            search = Search(tmp_path / name, PRUNED, False, 1)
            search.next(9)
            stops += [search.report(3, 0.9)]  # validated again, after the checkpoint before it
        stops += [search.report(epoch, 0.5) for epoch in (4, 5)]
        search.over("complete", 0.9)
        trials = search._study.get_trials(deepcopy=False)
        actual.append(trials[-1].intermediate_values)
        assert not any(stops)
    assert actual[0] == actual[1]


def test_settings_that_do_not_go_together_are_a_failed_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(config: Config, *_: Any) -> Trained:
        if config.model.dropout:
            raise ConfigError("has no rows for batch norm")
        return Trained(LoopState(best=0.5), stopped=False)

    monkeypatch.setattr("deepfm_dist.jobs.tune.train_on", trained)
    space = "tune={trials: 6, space: {model.dropout: [0, 0.5]}}"
    assert run_ranks(_run, 1, tune.main, *_settings(tmp_path, "one"), space) == [0]
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "one/tune/study.log")))
    trials = optuna.load_study(storage=journal, study_name="tune").trials
    tried = {(json.loads(t.params["model.dropout"]), t.state.name) for t in trials}
    assert len(trials) == 6
    assert tried == {(0, "COMPLETE"), (0.5, "FAIL")}
    assert "dropout: 0.0" in (tmp_path / "one/tune/best.yaml").read_text()


def _run(main: Any, *arguments: str) -> int:
    return int(main(["--quiet", *arguments]))


def _settings(folder: Path, name: str) -> list[str]:
    return [
        f"run.runs_root={folder}",
        f"run.prepared_root={folder / 'prepared'}",
        f"run.name={name}",
        "data.name=sample",
        "run.loggers=[]",
        "trainer={batch_size: 4096, epochs: 2, monitor: auc}",
        "model={embedding_dim: 4, over_arch_layer_sizes: [8]}",
    ]


@pytest.mark.slow  # two searches
def test_the_command_finds_the_same_best_settings_on_one_and_two_ranks(tmp_path: Path) -> None:
    space = (
        "tune={trials: 3, space: {optimizer.tables.lr: [0.0001, 0.3], model.embedding_dim: [4, 6]}}"
    )
    for name, size in (("one", 1), ("two", 2)):
        arguments = [*_settings(tmp_path, name), space]
        codes = run_ranks(_run, size, tune.main, *arguments, timeout_s=300)
        assert codes == [0] * size
    actual = [
        yaml.safe_load((tmp_path / name / "tune" / "best.yaml").read_text())
        for name in ("one", "two")
    ]
    assert actual[0]["run"].pop("name") == "one_best" and actual[1]["run"].pop("name") == "two_best"
    assert actual[0] == actual[1]
    assert actual[0]["optimizer"]["tables"]["lr"] == 0.3
    tried = tmp_path / "one" / "tune"
    kept = list(tried.glob("*/checkpoints/step_*/state.json"))
    assert len({path.parts[-4] for path in kept}) == 1  # the best trial's
    assert run_alone(_run, train.main, "--config", str(tried / "best.yaml"), timeout_s=300) == 0
    again = (tmp_path / "one_best" / "checkpoints").glob("step_*/state.json")
    assert _best(again) == _best(kept)


def _pruned_while_saving(config: Config) -> tuple[list[int], int]:
    """Complete steps and process groups of a run pruned while a checkpoint was being written."""
    pruned = threading.Event()

    def finish(self: Any, **arguments: Any) -> None:
        pruned.wait(60)
        time.sleep(0.2)  # into what would come next
        as_it_is(self, **arguments)

    def on_validation(figures: Mapping[str, float], epoch: int) -> None:
        pruned.set()
        raise Pruned

    as_it_is, checkpoint._Writer.finish = checkpoint._Writer.finish, finish  # type: ignore[method-assign]
    with process_group("cpu") as world:
        with pytest.raises(Pruned):
            train_on(config, world, on_validation)
        return checkpoint.complete_steps(config.run_dir), len(distributed_c10d._world.pg_map)


@pytest.mark.parametrize("size", [1, 2])
def test_a_trial_ends_after_its_checkpoint_is_complete(tmp_path: Path, size: int) -> None:
    step = ["trainer.max_steps=3", "checkpoint.every_steps=2"]
    config = load_config("sample", [*_settings(tmp_path, "one"), *step])
    assert run_ranks(_pruned_while_saving, size, config) == [([2], 1)] * size


def _best(states: Iterable[Path]) -> float:
    return max(float(json.loads(path.read_text())["trainer"]["best"]) for path in states)


def _tuned_clicks(folder: Path, monitor: str = "log_loss") -> None:
    rates = SpanConfig(low=1.0, high=2.0)  # too high for the loop
    config = _clicks(
        folder,
        0.0,
        model={"embedding_dim": 4, "over_arch_layer_sizes": [6]},
        trainer={"max_steps": 4, "refit_best": True, "monitor": monitor},
        tune={"space": {"optimizer.tables.lr": rates}, "trials": 2},
    )
    result = searched(config)
    assert result is not None and result.best is not None
    runs = config.run_dir / "tune"
    figures = [trial.best for trial in result.trials]
    if monitor == "auc":  # what follows the loop is not measured by it
        best = checkpoint.read_checkpoint(runs / result.best.name, "best")
        assert best.state["trainer"]["best"] == result.best.best == max(f for f in figures if f)
        assert not checkpoint.complete_steps(runs / result.best.name / checkpoint.REFIT)
        return
    assert len({*figures}) == 2 and min(f for f in figures if f) == result.best.best
    best = checkpoint.read_checkpoint(runs / result.best.name, checkpoint.REFIT)
    assert best.state["trainer"]["best"] == result.best.best
    # In the loop, the fitted start was the best: it is the same in all trials.
    loop = checkpoint.read_checkpoint(runs / result.best.name, "best")
    assert loop.state["step"] == 0


@pytest.mark.parametrize("monitor", ["log_loss", "auc"])
def test_trials_of_few_clicks_are_measured_by_what_they_end_with(
    tmp_path: Path, monitor: str
) -> None:
    run_alone(_tuned_clicks, tmp_path, monitor)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.monitor=auc", "tune.space={}"], "tune.space is empty: name what to vary"),
        (
            ["trainer.monitor=null", "tune.space={model.dropout: [0]}"],
            "tune compares trials by a validation figure, and trainer.monitor=null turns it off",
        ),
        (
            ["trainer.monitor=auc", "tune.space={model.dropuot: [0]}"],
            "tune.space.model.dropuot: model.dropuot: unknown field; did you mean model.dropout?",
        ),
        (
            ["trainer.monitor=auc", "tune.space={model.dropout: {low: 0, high: 2}}"],
            "model.dropout: input should be less than 1",
        ),
        (
            ["trainer.monitor=auc", "tune.space={trainer.batch_size: {low: 32, high: 128.5}}"],
            "tune.space.trainer.batch_size: trainer.batch_size: ",
        ),
        (
            ["trainer.monitor=auc", "tune.space={trainer.monitor: [auc, log_loss]}"],
            "trials are compared by one figure; leave it out",
        ),
    ],
)
def test_a_search_that_cannot_work_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    assert run_alone(_run, tune.main, f"run.runs_root={tmp_path}", *overrides) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tune.space={data.split.valid: [0.1]}", "data.split.valid is the same for all trials"),
        ("tune.space={model.dropout: []}", "model.dropout has no values to choose from"),
        ("tune.space={model.dropout: {low: 1, high: 0}}", "low must be below high"),
    ],
)
def test_invalid_search_spaces_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("sample", [override])


def test_a_search_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tune needs the library optuna.*pip install optuna"):
        Search(tmp_path, TUNE, False, 1)


def _worker(folder: Path, started: Path) -> list[str]:
    """Takes part in a search until it is over; its trials."""
    search, actual = Search(folder, TUNE, False, 1), []
    while (trial := search.next(12)) is not None:
        (started / trial.name).open("x").close()  # nobody else has it
        time.sleep(0.5)  # trains
        search.over("complete", value_of(trial))
        actual.append(trial.name)
    return actual


def test_several_workers_share_one_study(tmp_path: Path) -> None:
    """Each trial is of one worker, each is tried once, and all differ."""
    (tmp_path / "started").mkdir()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(_worker, tmp_path / "study", tmp_path / "started") for _ in range(3)]
        actual = [future.result() for future in futures]
    assert sorted(name for of_worker in actual for name in of_worker) == [
        f"trial_{n:03}" for n in range(12)
    ]
    assert all(actual)  # none was kept out
    past = Search(tmp_path / "study", TUNE, False, 1).past()
    assert [t.outcome for t in past] == ["complete"] * 12
    assert [t.best for t in past] == [value_of(t) for t in past]
    assert len({json.dumps(t.values) for t in past}) == 12


def test_a_trial_of_a_worker_at_work_is_left_alone_and_that_of_a_lost_one_taken_over(
    tmp_path: Path,
) -> None:
    first, second = (Search(tmp_path, TUNE, False, 1) for _ in range(2))
    lost, other = first.next(2), second.next(2)
    assert lost is not None and other is not None
    assert (lost.name, other.name) == ("trial_000", "trial_001")
    assert second.n_elsewhere() == 2
    second.over("complete", 0.5)
    assert second.next(2) is None  # the first is still at work
    assert second.n_elsewhere() == 1
    first.close()  # as the end of its process does
    assert second.next(2) == lost
    second.over("complete", 0.25)
    assert second.next(2) is None
    assert (second.n_elsewhere(), len(second.past())) == (0, 2)


def test_a_study_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "study.log").mkdir()
    with pytest.raises(DeepFMError, match=r"/study\.log: .* a folder of that name is in the way"):
        Search(tmp_path, TUNE, False, 1)
    (tmp_path / "tune").write_text("mine")
    with pytest.raises(DeepFMError, match=r"/tune: cannot be written: it is not a folder"):
        Search(tmp_path / "tune", TUNE, False, 1)


@pytest.mark.parametrize(
    "damage", [b'{"op_code": 5, "wor', b"\xff\xfe\x00", b'{"op_code": 5}garbage\n', b"[]\n"]
)
def test_a_study_is_read_across_damaged_lines(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before = tried(Search(tmp_path, TUNE, False, 1), 3)
    with (tmp_path / "study.log").open("ab") as file:
        file.write(damage)
    again = Search(tmp_path, TUNE, False, 1)
    after = tried(again, 5)
    whole = tried(Search(tmp_path / "whole", TUNE, False, 1), 5)
    assert before + after == whole
    caplog.clear()
    assert len(Search(tmp_path, TUNE, False, 1).past()) == 5
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path / 'study.log'}: skipped 1 damaged line; ")
