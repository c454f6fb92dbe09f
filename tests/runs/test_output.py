"""Which files the results of a command may be written to."""

import os
from pathlib import Path

import pytest

from deepfm_dist.config import load_config
from deepfm_dist.errors import ConfigError
from deepfm_dist.runs.trained import parquet_output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("best.csv", "--output best.csv: results are parquet; use --output best.parquet"),
        (".", "--output .: a folder; name a parquet file, such as scores.parquet"),
        ("out", "--output out: a folder; name a parquet file, such as out/scores.parquet"),
        ("rows.parquet", "--output rows.parquet: an input of this run; choose another file"),
        ("link.parquet", "--output link.parquet: an input of this run; choose another file"),
        ("new.parquet", "--output new.parquet: an input of this run; choose another file"),
        ("old.parquet", None),
        ("none/yet.parquet", None),
    ],
)
def test_an_output_is_a_parquet_file_that_nothing_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("rows.parquet", "new.parquet", "old.parquet"):
        (tmp_path / name).write_bytes(b"")
    os.symlink("rows.parquet", "link.parquet")
    overrides = [f"data.root={tmp_path}", "data.interactions.file=rows.parquet"]
    config = load_config("sample", [*overrides, "data.titles=null"])
    if message is None:
        assert parquet_output(given, config, "new.parquet") == Path(given)
        return
    with pytest.raises(ConfigError) as error:
        parquet_output(given, config, "new.parquet")
    assert str(error.value) == message
