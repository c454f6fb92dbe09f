"""Inputs behind a URL serve every command, as those on a disk do."""

import json
from pathlib import Path

import pandas as pd

from deepfm_dist import evaluate, predict, train
from deepfm_dist.config import BUNDLE
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
