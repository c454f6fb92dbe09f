"""Data frames in, data frames out."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deepfm_dist import Model, fit
from deepfm_dist.api import python_words
from deepfm_dist.config import load_config
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import CheckpointError, ConfigError, DataError
from tests.ranks import run_alone

ROOT = Path(__file__).parents[1]
SMALL = {"embedding_dim": 4, "over_arch_layer_sizes": [4]}


def shop() -> tuple[pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(1)
    orders = pd.DataFrame({"who": np.repeat([f"u{i}" for i in range(40)], 12)})
    orders["what"] = (60 * random.random(480) ** 2).astype(int)
    orders["day"] = pd.Timestamp("2026-01-01") + pd.to_timedelta(random.random(480) * 90, "D")
    orders["device"] = random.choice(["phone", "desk"], 480)
    articles = pd.DataFrame({"what": range(60), "title": [f"thing {i}" for i in range(60)]})
    articles["tags"] = [["a", "b"][: i % 3] for i in range(60)]  # 0 to 2 of them
    articles["price"] = random.random(60) * 100
    articles["brand"] = [i % 5 for i in range(60)]
    articles["look"] = [random.random(3) if i % 9 else None for i in range(60)]
    return orders, articles


COLUMNS = {"user": "who", "item": "what", "time": "day"}


def _mistake(model: Model, rows: Any) -> str:
    with pytest.raises(DataError) as caught:
        model.predict(rows)
    return str(caught.value)


def _fitted(folder: Path) -> dict[str, Any]:
    del os.environ["RANK"]  # as in a notebook, every call makes a group of its own
    orders, articles = shop()
    model = fit(
        orders,
        **COLUMNS,
        items=articles,
        context=["device"],
        folder=folder,
        model=SMALL,
        trainer={"epochs": 2, "batch_size": 256},
        recommend={"context": {"device": "phone"}},
    )
    evaluation = model.evaluate(k=[3, 5])
    best = model.recommend(k=3, users=["u3", "u17"], allow_items=articles["what"].to_numpy())
    rows = orders.iloc[[5, 2]].assign(who=["u3", "nobody"])
    asked = pd.DataFrame(
        {"who": ["u17", "u3"], "k": [2, 3], "block": [[str(best["item_id"].iloc[-1])], None]}
    )
    asked.to_parquet(folder / "asked.parquet")
    with pytest.raises(DataError) as refused:
        model.recommend(requests=asked.assign(k=[2, 0.5]))
    return {
        "asked": [
            model.recommend(requests=requests)
            for requests in (str(folder / "asked.parquet"), asked, pa.Table.from_pandas(asked))
        ],
        "refused": str(refused.value),
        "features": [f.model_dump(exclude_defaults=True) for f in model.config.data.features],
        "rows": evaluation.rows,
        "rankings": evaluation.rankings,
        "verdicts": evaluation.verdicts,
        "shown": (repr(evaluation), evaluation._repr_html_(), repr(model)),
        "best": best,
        "similar": model.similar(k=2),
        "scores": model.predict(rows),
        "again": Model.load(folder / "model.yaml").predict(rows),
        "run_config": Model.load(folder / "runs" / "model").predict(rows),
        "report": model.report.read_text(),
        "mistakes": [
            _mistake(model, rows.drop(columns="device")),
            _mistake(model, rows.to_dict()),
            _mistake(model, rows.assign(what=[3, "x"])),
        ],
    }


def test_a_model_of_frames(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = run_alone(_fitted, tmp_path)
    assert capfd.readouterr().out == ""
    of_file, *of_frames = found["asked"]
    assert of_file["request"].tolist() == [0, 0, 1, 1, 1]
    for of_frame in of_frames:
        pd.testing.assert_frame_equal(of_frame, of_file)
    assert found["refused"].startswith("requests, row 2: k 0.5 is not a whole number above 0")
    fields = {f["name"]: f for f in found["features"]}
    assert list(fields) == ["user_id", "item_id", "tags", "price", "brand", "look", "device"]
    assert "keep" not in fields["tags"]
    assert fields["price"]["kind"] == "numeric"
    assert fields["brand"] == {
        "name": "brand", "entity": "item", "file": "item-brand.parquet", "keep": "first"
    }  # fmt: skip
    assert fields["look"] == {
        "name": "look", "entity": "item", "file": "item-look.parquet", "kind": "vector"
    }  # fmt: skip
    # Rows and rankings apart, with no empty cell; the same figures as in the run's log.
    rows, rankings = found["rows"], found["rankings"]
    assert (list(rows.index), list(rankings.index)) == (["test"], ["model", "popularity"])
    assert not rows.isna().any(axis=None) and not rankings.isna().any(axis=None)
    events = map(json.loads, (tmp_path / "runs/model/metrics.jsonl").read_text().splitlines())
    [logged] = [event for event in events if event["event"] == "evaluate"]
    assert rows.loc["test"].to_dict() == logged["rows"]
    assert rankings.loc["model"].to_dict() == logged["figures"]["model"]
    assert {"recall@3", "recall@5", "ndcg@5"} < set(rankings.columns)
    [ranked, *_] = found["verdicts"]
    assert "popularity: NDCG@5" in ranked and ranked in found["shown"][0]
    assert found["shown"][1].count("<table") == 2
    shown = found["shown"][2].splitlines()
    assert shown[0].startswith(f"deepfm_dist model 'model': {tmp_path}/runs/model/checkpoints/step")
    manifest = json.loads((tmp_path / "prepared/model/manifest.json").read_text())
    n_train = manifest["splits"]["train"]["rows"]
    assert shown[1] == f"  trained on {n_train} positives, 40 users, 60 items"
    assert shown[2] == "  fields: user_id, item_id, tags, price, brand, look, device"
    assert len(shown) < 10 and max(map(len, shown[1:])) < 100
    best = found["best"]
    assert best["user_id"].tolist() == ["u17"] * 3 + ["u3"] * 3
    orders, _ = shop()
    for user, of_user in best.groupby("user_id"):
        assert not set(of_user["item_id"]) & set(orders["what"][orders["who"] == user])
    assert len(found["similar"]) == 2 * orders["what"].nunique()
    scores = found["scores"]
    assert (scores.index.tolist(), list(scores.columns)) == ([5, 2], ["logit", "probability"])
    assert (scores["probability"] < 1 / (1 + np.exp(-scores["logit"]))).all()  # negatives are drawn
    pd.testing.assert_frame_equal(scores, found["again"])
    pd.testing.assert_frame_equal(scores, found["run_config"])
    assert "thing 1" in found["report"]
    missing, no_frame, mixed = found["mistakes"]
    assert no_frame.startswith("rows: must be a pandas DataFrame, not dict")
    assert missing.startswith("rows: no column 'device'")
    assert mixed.startswith("rows: a column holds values that Parquet cannot store together (")
    assert "column what" in mixed
    # The commands read the same run.
    config = load_config(str(tmp_path / "model.yaml"))
    assert (config.run_dir / "checkpoints").is_dir()


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Lines that the package logs meanwhile, from warnings on."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("deepfm_dist")
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def _refused(folder: Path, orders: pd.DataFrame) -> str:
    del os.environ["RANK"]
    with pytest.raises(DataError) as caught:
        fit(orders, user="who", item="what", folder=folder)
    return str(caught.value)


def _two_fits(folder: Path) -> dict[str, Any]:
    del os.environ["RANK"]
    orders = shop()[0].drop(columns="device")
    settings: dict[str, Any] = {"trainer": {"epochs": 1, "batch_size": 256}, "folder": folder}
    first = fit(orders, **COLUMNS, model=SMALL, **settings)
    before = first.predict(orders)
    second = fit(orders, **COLUMNS, model={**SMALL, "embedding_dim": 8}, **settings)
    other = orders[orders["what"] < 30]
    third = fit(other, **COLUMNS, model=SMALL, **settings)
    found: dict[str, Any] = {
        "names": [m.config.run.name for m in (first, second, third)],
        "first": (before, first.predict(orders)),
        "second": second.predict(orders),
    }
    found["errors"] = errors = []
    named: dict[str, Any] = {**COLUMNS, **settings, "name": "model"}
    for frame, sizes in ((orders, {**SMALL, "embedding_dim": 8}), (other, SMALL)):
        with pytest.raises(ConfigError) as caught:
            fit(frame, **named, model=sizes)
        errors.append(str(caught.value))
    found["after"] = first.predict(orders)  # what was refused has changed nothing
    with _logged() as lines:
        same = fit(orders, **named, model=SMALL)
        same.predict(orders.assign(who="nobody"))
    found["same"], found["lines"] = same.predict(orders), lines
    longer = {**named, "trainer": {"epochs": 2, "batch_size": 256}}
    found["steps"] = [m.checkpoint.name for m in (first, fit(orders, **longer, model=SMALL))]
    found["replaced"] = fit(
        other, **named, model=SMALL, checkpoint={"resume": "never"}
    ).config.run.name
    with pytest.raises(CheckpointError) as caught:
        first.predict(orders)
    found["gone"] = str(caught.value)
    return found


def test_every_model_is_its_own(tmp_path: Path) -> None:
    found = run_alone(_two_fits, tmp_path)
    assert found["names"] == ["model", "model-2", "model-3"]
    before, after = found["first"]
    pd.testing.assert_frame_equal(before, after)
    assert not np.allclose(before["logit"], found["second"]["logit"])
    settings, frames = found["errors"]
    assert 'model={"embedding_dim": 8}' in settings and "another name" in settings
    assert f"{tmp_path}/runs/model holds a model 'model' of other data frames; give this" in frames
    for message in (settings, frames):
        assert 'checkpoint={"resume": "never"}' in message
    finished, unseen = found["lines"]
    assert finished.startswith(f"Run already finished: {tmp_path}/runs/model, step ")
    assert finished.endswith(
        'to train again, set another name, or checkpoint={"resume": "never"}, which moves this run '
        "aside"
    )
    assert unseen.startswith("rows: user: 480 of 480 values were never seen in training")
    first, longer = (int(name.removeprefix("step_")) for name in found["steps"])
    assert longer == 2 * first
    pd.testing.assert_frame_equal(before, found["after"])
    pd.testing.assert_frame_equal(before, found["same"])
    assert found["replaced"] == "model"
    assert (
        "no longer the checkpoint of this model: its run was trained again; Model.load"
        in found["gone"]
    )


def _hook_is_left_alone() -> bool:
    before = sys.excepthook
    with process_group("cpu"):
        pass
    return sys.excepthook is before


def test_later_tracebacks_name_no_rank() -> None:
    assert run_alone(_hook_is_left_alone)


def test_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders, _ = shop()
    with pytest.raises(DataError, match=r"interactions: no column 'user'; available: who, what"):
        fit(orders, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean model\.embedding_dim"):
        fit(orders, user="who", item="what", folder=tmp_path, model={"embeding_dim": 3})
    for frames, message in (
        ({"interactions": [1, 2]}, "interactions: must be a pandas DataFrame, not list"),
        ({"interactions": orders, "items": pa.table({"what": [1]})}, r"it as \.to_pandas\(\)"),
        (
            {"interactions": pd.concat([orders, orders["who"]], axis=1)},
            r"interactions: several columns are called 'who'; keep one, such as by frame\.loc",
        ),
    ):
        with pytest.raises(DataError, match=message):
            fit(**frames, user="who", item="what", folder=tmp_path)
    for name, message in ((2024, r"run\.name: input should be a valid string"), ("a/b", "folder=")):
        with pytest.raises(ConfigError, match=message):
            fit(orders, user="who", item="what", folder=tmp_path, name=name)
    with pytest.raises(DataError, match="no column 'shelf'"):  # a text is one column
        fit(orders, user="who", item="what", context="shelf", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    empty = run_alone(_refused, tmp_path, orders.assign(who=["u1", None, *orders["who"][2:]]))
    assert empty.startswith("interactions, row 2: who '' is empty; fix")
    with pytest.raises(ConfigError, match="not a file; give the configuration that fit wrote"):
        Model.load(tmp_path / "nothing.yaml")
    (tmp_path / "new.yaml").write_text(load_config("sample").to_yaml())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no complete checkpoint; run fit\(\.\.\.\) first"):
        Model.load("new.yaml")


def test_columns_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    orders, _ = shop()
    frame = orders.assign(stars=3, **{"odd name": 1})
    rows = {"weight": "stars"}
    with pytest.raises(ConfigError):  # before anything is trained
        fit(frame, **COLUMNS, folder=tmp_path, name="a/b", data={"interactions": rows})
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "interactions: columns not used: device, odd name"
    ]
    caplog.clear()
    with pytest.raises(ConfigError):
        fit(orders, **COLUMNS, context="device", folder=tmp_path, name="a/b")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("drop the row or set data.on_bad_row=skip", 'set data={"on_bad_row": "skip"}'),
        ("optimizer.tables.lr=0.05: too high", 'optimizer={"tables": {"lr": 0.05}}: too high'),
        ("set recommend.users=[4, 6]; or", 'set recommend={"users": [4, 6]}; or'),
        (
            'set data.interactions.time_format="%d/%m/%Y %H:%M" or',
            'set data={"interactions": {"time_format": "%d/%m/%Y %H:%M"}} or',
        ),
        (
            "data.interactions.time_format=\"[iso, '%Y%m%d']\"",
            'data={"interactions": {"time_format": ["iso", "%Y%m%d"]}}',
        ),
        ("(trainer.monitor=null, or", '(trainer={"monitor": None}, or'),
        ("run python -m deepfm_dist.train first", "run fit(...) first"),
        ("python -m deepfm_dist.evaluate, then", "Model.evaluate(), then"),
        (
            "in use by process 7; wait for it, stop it, or choose another --output",
            "in use by process 7; wait for it or stop it",
        ),
        ("did you mean model.embedding_dim?", "did you mean model.embedding_dim?"),
        ("my.data.root=3 and /data.csv", "my.data.root=3 and /data.csv"),
    ],
)
def test_errors_speak_python(message: str, expected: str) -> None:
    spoken = python_words(message)
    assert expected in spoken and "--" not in spoken


def test_importing_the_package_is_light() -> None:
    code = "import deepfm_dist, sys; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow  # a process that trains
def test_the_example_runs(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(ROOT / "data")
    command = [sys.executable, str(ROOT / "examples/notebook.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "popularity" in done.stdout
    assert (tmp_path / "deepfm/runs/model/report.html").is_file()
