"""The manifest's description of a log, against pandas."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig

SPEC = {
    "interactions": {"file": "rows.csv", "user": "u", "item": "i", "time": "t"},
    "features": [
        {"name": "user", "entity": "user"},
        {"name": "hour", "column": "h"},
        {"name": "amount", "kind": "numeric"},
        {"name": "price", "entity": "item", "kind": "numeric", "column": "p"},
    ],
    "split": {"method": "random", "valid": 0.1, "test": 0.1},
}


def written(folder: Path, days: int, n: int = 800) -> pd.DataFrame:
    rng = np.random.default_rng(4)
    rows = pd.DataFrame({"u": rng.integers(0, 90, n), "i": np.arange(n)})  # no pair twice
    start = pd.Timestamp("2021-03-01").timestamp()
    rows["t"] = [f"{second:.3f}" for second in start + rng.random(n) * days * 86_400]
    rows.loc[0, "t"], rows.loc[1, "t"] = f"{start:.3f}", f"{start + days * 86_400 - 1:.3f}"
    rows["h"] = rng.choice(["7", "8", ""], n)
    rows["amount"] = np.where(rng.random(n) < 0.3, "", "5")
    rows["p"] = np.where(rows["i"] % 4 == 0, "", "1")
    rows.to_csv(folder / "rows.csv", index=False)
    return rows


@pytest.mark.parametrize(("days", "partition_bytes"), [(20, 1 << 20), (20, 2000), (3000, 1 << 20)])
def test_rows_by_day_and_missing_values_are_counted(
    days: int, partition_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = written(tmp_path, days)
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    manifest = prepare(DataConfig.model_validate(SPEC), tmp_path, tmp_path / "d", seed=1)
    assert (manifest.files > 1) == (partition_bytes == 2000)
    profile = manifest.profile
    dates = pd.to_datetime(rows["t"].astype(float), unit="s").dt.floor("D")
    assert profile.first_day == "2021-03-01"
    assert profile.days_per_period == (1 if days == 20 else 8)
    of_rows = (dates - pd.Timestamp("2021-03-01")).dt.days // profile.days_per_period
    assert profile.rows_by_period == tuple(np.bincount(of_rows))
    # A fifth of the rows is held out at random: shares of training rows are close to those of all.
    assert profile.missing["hour"] == pytest.approx((rows["h"] == "").mean(), abs=0.03)
    assert profile.missing["amount"] == pytest.approx((rows["amount"] == "").mean(), abs=0.03)
    assert profile.missing["price"] == pytest.approx(0.25, abs=0.03)
    assert "user" not in profile.missing
    pairs = (manifest.entities["user"] - 1) * (manifest.entities["item"] - 1)
    assert manifest.density == manifest.splits["train"].positives / pairs


def test_plain_numbers_have_no_days(tmp_path: Path) -> None:
    written(tmp_path, 20)
    rows = pd.read_csv(tmp_path / "rows.csv")
    rows["t"] = np.arange(len(rows))
    rows.to_csv(tmp_path / "rows.csv", index=False)
    manifest = prepare(DataConfig.model_validate(SPEC), tmp_path, tmp_path / "d", seed=1)
    assert (manifest.profile.first_day, manifest.profile.rows_by_period) == (None, ())
