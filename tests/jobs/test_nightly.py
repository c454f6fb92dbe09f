"""Four nights with kills end as four nights without; what is worse is not promoted."""

import csv
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from deepfm_dist import evaluate, nightly, predict
from deepfm_dist.api import Model
from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.sources import find_files
from deepfm_dist.data.sources.days import each_day, on_day
from deepfm_dist.distributed.checkpoint import Checkpoints
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.jobs import nightly as job
from deepfm_dist.jobs.nightly import Night, Nights, is_no_worse, settings_of_day
from deepfm_dist.storage import folder_of
from tests.ranks import RankFailed, run_alone, run_in_fork, run_ranks

DAYS = [f"2026-11-0{n}" for n in range(1, 5)]
WORSE = DAYS[1]
"""The day whose log, but for its last rows, has the labels the wrong way round."""


def _log(day: str) -> pd.DataFrame:
    """A day of 300 clicks on even items, some of them by chance; new users come at its ends."""
    rng = np.random.default_rng(DAYS.index(day))
    start = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    items = rng.integers(0, 20, 300)
    users = rng.integers(0, 30, 300)
    users[:20] = users[-9:] = 100 + DAYS.index(day)
    clicks = (items % 2 == 0) ^ (rng.random(300) < 0.1)
    if day == WORSE:
        clicks[:180] = ~clicks[:180]
    time = start + 288 * np.arange(300)
    return pd.DataFrame({"click": clicks.astype(int), "user": users, "ad": items, "time": time})


@pytest.fixture
def make_home(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with four days of a log and a configuration."""

    def make(name: str) -> Path:
        home = tmp_path / name
        home.mkdir()
        for day in DAYS:
            _log(day).to_csv(home / f"{day}.csv", index=False)
        rows = {"user": "user", "label": "click", "time": "time", "file": "{day-1..day}.csv"}
        config = {
            "run": {
                "name": "mine",
                "runs_root": str(home / "runs"),
                "prepared_root": str(home / "prepared"),
                "loggers": [],
            },
            "data": {
                "root": str(home),
                "task": "ctr",
                "interactions": rows,
                "features": [{"name": "user", "entity": "user"}, {"name": "ad"}],
                "split": {"method": "temporal", "valid": 0.1, "test": 0.1},
            },
            "model": {"embedding_dim": 4, "deep": False, "fm": False, "linear": "none"},
            "optimizer": {"tables": {"name": "adam", "lr": 0.1, "l2": 0}},
            "trainer": {"epochs": 4, "batch_size": 64},
            "checkpoint": {"every_steps": 3},
            "nightly": {"tolerance": 0.05, "keep_days": 2},
        }
        (home / "mine.yaml").write_text(yaml.safe_dump(config))
        return home

    return make


def _night(home: Path, day: str, dies: str | None = None) -> int:
    """Runs a night; it dies, as by kill -9, when it has done or is about to do something."""

    def dying(real: Callable[..., Any], after: int, first: bool) -> Callable[..., Any]:
        calls = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == after and first:
                os._exit(9)
            result = real(*args, **kwargs)
            if calls == after:
                os._exit(9)
            calls += 1
            return result

        return call

    places: dict[str, tuple[Any, str, int, bool]] = {
        "begun": (Nights, "write", 0, False),
        "training": (Checkpoints, "save", 1, False),
        "trained": (job, "measure_weights", 0, True),
        "decided": (Nights, "write", 0, True),
        "recorded": (Nights, "promote", 0, True),
        "promoted": (Nights, "promote", 0, False),
        "deleting": (job, "delete_tree", 0, False),
    }
    if dies is not None:
        owner, name, after, first = places[dies]
        setattr(owner, name, dying(getattr(owner, name), after, first))
    arguments = ["--quiet", "--config", str(home / "mine.yaml"), "--day", day]
    return nightly.main(arguments)


def _lines(home: Path) -> list[dict[str, str]]:
    with (home / "runs/mine/nights.csv").open() as file:
        return [{k: v for k, v in line.items() if k != "report"} for line in csv.DictReader(file)]


KILLS = {
    DAYS[0]: ["begun", "training", "promoted"],
    DAYS[1]: ["training", "trained"],
    DAYS[2]: ["decided"],
    DAYS[3]: ["recorded", "deleting"],
}


@pytest.mark.slow  # twenty nights, killed ones included
def test_four_nights_with_kills_end_as_four_without(
    make_home: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    calm, killed = make_home("calm"), make_home("killed")
    said = {}
    for day in DAYS:
        capfd.readouterr()
        assert run_alone(_night, calm, day) == 0
        said[day] = capfd.readouterr().out
        for place in KILLS[day]:
            with pytest.raises(RankFailed, match="died or was killed"):
                run_alone(_night, killed, day, dies=place)
        assert run_ranks(_night, 2, killed, day) == [0, 0]
        assert run_alone(_night, killed, day) == 0  # it is over: nothing changes
    # As in the configuration: the same figures, of one rank and of two.
    lines = pd.DataFrame(_lines(calm)), pd.DataFrame(_lines(killed))
    for name in ("figure", "previous_figure"):
        numbers = [pd.to_numeric(frame.pop(name)).to_numpy() for frame in lines]
        np.testing.assert_allclose(*numbers, atol=1e-6)
    pd.testing.assert_frame_equal(*lines)
    assert list(lines[0]["promoted"]) == ["True", "False", "False", "True"]
    assert list(lines[0]["previous"]) == ["", DAYS[0], DAYS[0], DAYS[0]]
    assert said[DAYS[0]].startswith(f"{DAYS[0]}: promoted: log_loss 0.")
    assert said[WORSE].startswith(f"{WORSE}: not promoted: log_loss ")
    for home in (calm, killed):
        runs = home / "runs/mine"
        assert (runs / "current").read_text() == f"{DAYS[3]}\n"
        kept = [DAYS[0], *DAYS[2:]]  # two nights, and the one that the last one started from
        assert sorted(p.name for p in (home / "prepared/mine").iterdir()) == kept
        assert sorted(p.name for p in runs.iterdir() if p.is_dir()) == [*kept, "nights"]
    _check_rows(calm)
    _check_previous_figure(calm)
    assert run_alone(_night, calm, DAYS[1]) == 2  # of a day before that of the model in use


def _times(home: Path, day: str, split: str) -> set[int]:
    """The times of a split's rows, no two of which are the same."""
    table = pd.read_parquet(home / "prepared/mine" / day / split)
    return {*table["time"].tolist()}


def _check_rows(home: Path) -> None:
    """What is held out one night is trained on the next; ids keep their rows."""
    held_out = _times(home, DAYS[2], "test")
    assert len(held_out) == 60
    assert held_out <= _times(home, DAYS[3], "train")
    assert held_out.isdisjoint(_times(home, DAYS[2], "train"))
    before, after = (
        PreparedDataset(home / "prepared/mine" / day).entity_ids("user").to_pylist()
        for day in (DAYS[0], DAYS[3])
    )
    assert after[: len(before)] == before and len(after) > len(before)


def _check_previous_figure(home: Path) -> None:
    """The figure of the model in use is that of its predictions for the day's last rows."""
    rows = _log(DAYS[3])[-60:]
    rows.to_csv(home / "held_out.csv", index=False)
    out = home / "scores.parquet"
    arguments = ["--quiet", "--run", str(home / "runs/mine" / DAYS[0])]
    arguments += ["--input", str(home / "held_out.csv"), "--output", str(out)]
    assert run_alone(predict.main, arguments) == 0
    p = pd.read_parquet(out)["probability"].to_numpy(float)
    y = rows["click"].to_numpy()
    expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    [line] = [line for line in _lines(home) if line["day"] == DAYS[3]]
    assert float(line["previous_figure"]) == pytest.approx(expected, abs=1e-5)


def test_commands_find_the_run_in_use(make_home: Callable[[str], Path]) -> None:
    home = make_home("home")
    assert run_alone(_night, home, DAYS[0]) == 0
    current = str(home / "runs/mine/current")
    assert run_alone(evaluate.main, ["--quiet", "--config", current]) == 0
    assert run_alone(evaluate.main, ["--quiet", "--run", current]) == 0
    assert run_in_fork(_scores_in_python, current) == 1
    options = ["run.name=next", f"checkpoint.start_from={current}"]
    assert load_config(str(home / "mine.yaml"), options).checkpoint.start_from == current


@pytest.mark.slow  # two nights
def test_nights_may_be_behind_a_url(make_home: Callable[[str], Path]) -> None:
    pytest.importorskip("upath", reason="universal-pathlib is not installed")
    run_in_fork(_two_nights_behind_a_url, make_home("home"))


def _two_nights_behind_a_url(home: Path) -> None:
    roots = "run.runs_root=memory://bucket/runs", "run.prepared_root=memory://bucket/prepared"
    arguments = ["--quiet", "--config", str(home / "mine.yaml"), f"run.cache_root={home}", *roots]
    for day in DAYS[:2]:
        assert nightly.main([*arguments, "--day", day]) == 0
    runs = folder_of("memory://bucket/runs/mine")
    assert (runs / "current").read_text() == f"{DAYS[0]}\n"
    lines = list(csv.DictReader((runs / "nights.csv").read_text().splitlines()))
    assert [line["promoted"] for line in lines] == ["True", "False"]
    current = ["--quiet", "--run", "memory://bucket/runs/mine/current"]
    rows = ["--input", str(home / f"{DAYS[0]}.csv"), "--output-parts", "memory://bucket/scores"]
    assert predict.main([*current, *rows]) == 0
    assert (folder_of("memory://bucket/scores") / "_SUCCESS").is_file()


def _scores_in_python(current: str) -> int:
    return len(Model.load(current).predict(pd.DataFrame({"user": ["1"], "ad": ["2"]})))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "data.interactions.file=clicks.csv",
            "is the same file every night; put the day in its name",
        ),
        ("data.split.method=random", "data.split.method=random: holds out rows of days that the"),
        ("nightly.metric=aucc", "nightly.metric=aucc: is not measured; choose from auc, "),
    ],
)
def test_a_night_that_could_not_judge_is_refused(
    make_home: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    option: str,
    message: str,
) -> None:
    home = make_home("home")
    arguments = ["--quiet", "--config", str(home / "mine.yaml"), "--day", DAYS[0], option]
    assert run_alone(nightly.main, arguments) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("metric", "figure", "previous", "expected"),
    [
        ("auc", 0.80, None, True),
        ("auc", float("nan"), None, False),
        ("auc", 0.80, float("nan"), True),
        ("auc", 0.792, 0.80, True),
        ("auc", 0.791, 0.80, False),
        ("log_loss", 0.505, 0.50, True),
        ("log_loss", 0.506, 0.50, False),
        ("ndcg@10", 0.10, 0.20, False),
        ("ndcg@10", 0.20, 0.10, True),
    ],
)
def test_no_worse_is_within_the_tolerance(
    metric: str, figure: float, previous: float | None, expected: bool
) -> None:
    assert is_no_worse(figure, previous, 0.0100001, metric) == expected


def test_the_predecessor_of_the_model_in_use_is_kept(make_home: Callable[[str], Path]) -> None:
    """Also when later nights were not promoted: going back to it must be possible."""
    home = make_home("home")
    nights = Nights(load_config(str(home / "mine.yaml")))
    for day, previous, promoted in (
        (DAYS[0], None, True),
        (DAYS[1], DAYS[0], True),
        (DAYS[2], DAYS[1], False),
        (DAYS[3], DAYS[1], False),
    ):
        (home / "runs/mine" / day).mkdir(parents=True)
        nights.write(Night(day, previous, promoted=promoted))
        if promoted:
            nights.promote(day)
        nights.delete_old(keep=1)
    assert sorted(path.name for path in (home / "runs/mine").glob("2026-*")) == [
        *(DAYS[0], DAYS[1], DAYS[3])
    ]


@pytest.mark.parametrize("text", ["", "click,user,ad,time\n"])
def test_a_day_without_rows_is_an_error(make_home: Callable[[str], Path], text: str) -> None:
    home = make_home("home")
    config, day = load_config(str(home / "mine.yaml")), date.fromisoformat(DAYS[1])
    names = settings_of_day(config, day, None).data.interactions.file
    assert names == (f"{DAYS[0]}.csv", f"{DAYS[1]}.csv")
    (home / names[1]).write_text(text)  # the day before still has rows
    with pytest.raises(DataError, match=rf"^{names[1]}: no rows, .* the log of {DAYS[1]} is comp"):
        settings_of_day(config, day, None)


def test_what_a_night_needs_is_checked_before_it_begins(make_home: Callable[[str], Path]) -> None:
    home = make_home("home")
    config = load_config(str(home / "mine.yaml"))
    nights, folder = Nights(config), home / "runs/mine"
    folder.mkdir(parents=True)

    def message(day: str) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            job._begin(config, nights, day)
        return str(caught.value)

    nights.promote("best")
    assert message(DAYS[1]) == (
        f"{folder}/current: names best, but nights are named by their day; write the day of one "
        f"into it, such as 2026-11-30"
    )
    nights.promote(DAYS[0])
    assert message(DAYS[1]) == (
        f"{folder}/current: names {DAYS[0]}, but {folder / DAYS[0]} is not complete or not there; "
        f"write the day of another run into it, or delete it to train a first model"
    )
    assert nights.read(DAYS[1]) is None
    step = folder / DAYS[0] / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text("{}")
    assert f"but {home / 'prepared/mine' / DAYS[0]} is not complete" in message(DAYS[1])
    assert message("2026-10-31").startswith("--day 2026-10-31: the model in use was trained on ")
    nights.pointer.unlink()
    assert job._begin(config, nights, DAYS[1]) == Night(DAYS[1])
    nights.write(Night(DAYS[2], previous=DAYS[0]))
    assert message(DAYS[2]).endswith(f"delete this file and {folder / DAYS[2]} to begin it again")
    for damaged in ('{"day":', '{"day": "2026-11-03", "colour": 1}', "[]"):
        nights.record(DAYS[2]).write_text(damaged)
        assert message(DAYS[2]).startswith(f"{nights.record(DAYS[2])}: not the record of a night")


@pytest.mark.parametrize(("linear", "continues"), [("logistic", False), ("none", True)])
def test_a_model_that_starts_from_a_regression_is_not_trained_further(
    linear: str, continues: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start has neither the regression nor the models of folds that end such a training."""
    saved = SimpleNamespace(state={"config": {"model": {"linear": linear}}})
    monkeypatch.setattr(job, "read_checkpoint", lambda *where: saved)
    config = load_config("sample", [f"run={{name: n, runs_root: {tmp_path}}}"])
    of_day = settings_of_day(config, date(2026, 11, 2), "2026-11-01")
    warm = str(tmp_path / "n/2026-11-01") if continues else None
    assert of_day.checkpoint.start_from == warm
    assert of_day.data.vocabulary_from == "prepared/n/2026-11-01"


def test_names_of_days_are_filled_in() -> None:
    day = date(2026, 3, 1)
    names = [f"x/{day - timedelta(n)}.csv" for n in (2, 1, 0)]
    assert [n for n, _ in on_day("x/{day-2..day}.csv", day)] == names
    assert [of for _, of in on_day("x/{day-2..day}.csv", day)] == [
        day - timedelta(n) for n in (2, 1, 0)
    ]
    assert on_day("{day:%Y/%m}/{day-1:%Y%m%d}.csv", day) == [("2026/03/20260228.csv", day)]
    assert on_day("plain.csv", day) == [("plain.csv", day)]
    assert each_day("a/{2026-02-27..2026-03-01}.csv") == [
        *("a/2026-02-27.csv", "a/2026-02-28.csv", "a/2026-03-01.csv")
    ]
    assert each_day("{20251231..20260101}") == ["20251231", "20260101"]
    for wrong in ("{2026-03-01..2026-02-27}", "{2026-02-27..2026-02-30}"):
        with pytest.raises(ConfigError, match="write days like"):
            each_day(wrong)


def test_a_range_of_days_is_read_in_their_order(tmp_path: Path) -> None:
    for day in DAYS[:3]:
        (tmp_path / f"{day}.csv").write_text("user\n1\n")
    setting = f"{{{DAYS[0]}..{DAYS[2]}}}.csv"
    found = find_files(tmp_path, setting)
    assert [file.name for file in found] == [f"{day}.csv" for day in DAYS[:3]]
    assert {file.pattern for file in found} == {setting}
