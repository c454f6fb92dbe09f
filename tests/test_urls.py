"""Commands read and write URLs as they do paths."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from deepfm_dist import evaluate, predict, recommend, train, tune
from deepfm_dist.bundle import BUNDLE
from tests.ranks import run_alone


def test_commands_after_training_read_behind_a_url(tmp_path: Path) -> None:
    where = [f"run.runs_root={tmp_path}", f"run.prepared_root={tmp_path / 'prepared'}"]
    url = [*where, f"data.root=file://{BUNDLE}/data/sample"]
    assert run_alone(train.main, ["--quiet", *url, "trainer.max_steps=1"]) == 0
    assert run_alone(evaluate.main, ["--quiet", *url]) == 0
    [line] = [
        json.loads(line)
        for line in (tmp_path / "sample/metrics.jsonl").read_text().splitlines()
        if "evaluate" in line
    ]
    assert "best_possible" in line["figures"]
    scores = []
    for settings in (url, where):
        out = tmp_path / f"{len(scores)}.parquet"
        assert run_alone(predict.main, ["--quiet", "--output", str(out), *settings]) == 0
        scores.append(pd.read_parquet(out))
    assert len(scores[0]) == len(pd.read_csv(BUNDLE / "data/sample/train_ratings.csv"))
    pd.testing.assert_frame_equal(*scores)


def _evaluated_behind_a_url(home: Path) -> tuple[list[str], list[str]]:
    """Runs in one process, whose memory is the store; what lies in the store, and at home."""
    from upath import UPath

    os.chdir(home)
    del os.environ["WORLD_SIZE"]  # each command makes a world of its own
    settings = ["run.runs_root=memory://runs", "trainer.max_steps=1", "evaluate.reference=null"]
    assert train.main(["--quiet", "run.prepared_root=memory://prepared", *settings]) == 0
    shutil.rmtree(home / "prepared")  # as on another machine
    for command in (evaluate, predict, recommend):
        assert command.main(["--quiet", "--run", "memory://runs/sample/", *settings[2:]]) == 0
    run = UPath("memory://runs/sample")
    assert (UPath("memory://prepared/sample") / "manifest.json").exists()
    copies = [path.parent for path in home.rglob("manifest.json")]
    assert copies == [home / "prepared/memory/prepared/sample"]
    assert "evaluate" in (run / "metrics.jsonl").read_text()
    stored = sorted(path.name for path in run.iterdir())
    return stored, sorted(path.name for path in (home / "runs/sample").iterdir())


def test_train_and_evaluate_write_behind_a_url_and_others_on_the_machine(tmp_path: Path) -> None:
    pytest.importorskip("upath")
    stored, here = run_alone(_evaluated_behind_a_url, tmp_path)
    assert {"checkpoints", "config.yaml", "metrics.jsonl", "report.html"} <= set(stored)
    assert {"predictions.parquet", "recommendations.parquet"} <= set(here)


def test_a_search_behind_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("upath")
    monkeypatch.chdir(tmp_path)
    assert run_alone(_refused, "run.runs_root=memory://runs", "trainer.monitor=auc") == (
        "ConfigError: run.runs_root=memory://runs: the journal of a search is locked and appended "
        "to, which needs a local disk; set run.runs_root to a local folder"
    )
    assert [*tmp_path.iterdir()] == []


def _refused(*settings: str) -> str:
    """The line on stderr of a search that ends with exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert tune.main(["--quiet", *settings]) == 2
    return err.getvalue().strip()


def _moved_aside() -> dict[str, str]:
    from upath import UPath

    os.environ.pop("WORLD_SIZE", None)
    where = ["--quiet", "run.runs_root=memory://aside", "trainer.max_steps=1"]
    assert train.main(where) == 0
    run = UPath("memory://aside/sample")
    (run / "a [1]*.txt").write_text("of the first run")
    assert train.main([*where, "optimizer.dense.lr=0.1"]) == 2  # other settings: it stays
    assert (run / "a [1]*.txt").exists()
    assert train.main([*where, "optimizer.dense.lr=0.1", "checkpoint.resume=never"]) == 0
    return {
        str(path.path).partition("aside/")[2]: path.read_text() if path.suffix == ".txt" else ""
        for path in UPath("memory://aside").rglob("*")
        if path.is_file()
    }


def test_a_run_in_an_object_store_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("upath")
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "runs/sample"  # another run of that name
    local.mkdir(parents=True)
    for name in ("config.yaml", "report.html"):
        (local / name).write_text("of a run on this disk")
    stored = run_alone(_moved_aside)
    assert [path.name for path in local.parent.iterdir()] == ["sample"]
    assert stored["sample.1/a [1]*.txt"] == "of the first run"
    assert "sample/a [1]*.txt" not in stored
    for name in ("sample", "sample.1"):
        assert f"{name}/config.yaml" in stored
        assert any(path.startswith(f"{name}/checkpoints/step_00000001/") for path in stored)
    assert not [path for path in stored if path.endswith(".lock")]
