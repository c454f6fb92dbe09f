"""Data frames in, data frames out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deepfm_dist import Model, fit
from deepfm_dist.config import load_config
from deepfm_dist.errors import ConfigError, DataError
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
    return orders, articles


def _fitted(folder: Path) -> dict[str, object]:
    del os.environ["RANK"]  # as in a notebook, every call makes a group of its own
    orders, articles = shop()
    columns = {"user": "who", "item": "what", "time": "day"}
    model = fit(
        orders,
        **columns,
        items=articles,
        context=["device"],
        folder=folder,
        model=SMALL,
        trainer={"epochs": 2, "batch_size": 256},
        recommend={"context": {"device": "phone"}},
    )
    figures = model.evaluate(k=[3, 5])
    best = model.recommend(k=3, users=["u3", "u17"])
    rows = orders.iloc[[5, 2]].assign(who=["u3", "nobody"])
    return {
        "features": [f.model_dump(exclude_defaults=True) for f in model.config.data.features],
        "figures": figures,
        "best": best,
        "similar": model.similar(k=2),
        "scores": model.predict(rows),
        "again": Model.load(folder / "model.yaml").predict(rows),
        "report": model.report.read_text(),
    }


def test_a_model_of_frames(tmp_path: Path) -> None:
    found = run_alone(_fitted, tmp_path)
    fields = {f["name"]: f for f in found["features"]}  # type: ignore[attr-defined]
    assert list(fields) == ["user_id", "item_id", "tags", "price", "brand", "device"]
    assert "keep" not in fields["tags"]
    assert fields["price"]["kind"] == "numeric"
    assert fields["brand"] == {
        "name": "brand", "entity": "item", "file": "item-brand.parquet", "keep": "first"
    }  # fmt: skip
    figures = found["figures"]
    assert list(figures.index) == ["test rows", "model", "popularity"]
    assert 0 < figures.loc["test rows", "auc"] < 1
    assert 0 <= figures.loc["model", "recall@5"] <= 1
    best = found["best"]
    assert best["user_id"].tolist() == ["u17"] * 3 + ["u3"] * 3
    orders, _ = shop()
    for user, of_user in best.groupby("user_id"):
        assert not set(of_user["item_id"]) & set(orders["what"][orders["who"] == user])
    assert len(found["similar"]) == 2 * orders["what"].nunique()
    assert found["scores"].index.tolist() == [5, 2]
    pd.testing.assert_series_equal(found["scores"], found["again"])
    assert "thing 1" in found["report"]
    # The commands read the same run.
    config = load_config(str(tmp_path / "model.yaml"))
    assert (config.run_dir / "checkpoints").is_dir()


def test_mistakes_are_told(tmp_path: Path) -> None:
    orders, _ = shop()
    with pytest.raises(DataError, match=r"interactions: no column 'user'; there are: who, what"):
        fit(orders, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean model\.embedding_dim"):
        fit(orders, user="who", item="what", folder=tmp_path, model={"embeding_dim": 3})


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
