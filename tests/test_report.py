"""Tables for people."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.output import Written
from deepfm_dist.report import metrics_table, ranking_table


def test_figures_stand_beside_each_other() -> None:
    figures = {"model": {"recall@5": 0.5, "recall@10": 0.6}, "ease": {"recall@5": 0.25}}
    intervals = {"model": {"recall@5": (0.4, 0.6)}, "ease": {"recall@5": (0.2, 0.3)}}
    comparison = Comparison(figures, intervals, {"ease": {"recall@5": (0.1, 0.4)}})
    lines = metrics_table("valid", {"auc": 0.75}, comparison, (5,)).splitlines()
    assert lines[0] == "valid rows"
    assert lines[1].split() == ["auc", "0.7500"]
    assert lines[3] == "valid rankings, whole catalogue, K = 5"
    assert [line.split()[-1] for line in lines[4:]] == [
        "recall",
        *["0.5000", "0.4000", "0.6000"],
        *["0.2500", "0.2000", "0.3000", "0.1000", "0.4000"],
    ]
    assert lines[-1].startswith("  model minus it, to")
    assert metrics_table("test", {"auc": 1}, None, (5,)) == "test rows\nauc    1.0000"


def test_the_best_titles_of_three_users_are_shown(sample: PreparedDataset, tmp_path: Path) -> None:
    ids = [int(i) for i in sample.entity_ids("item").to_pylist()[1:41]]
    titles = sample.titles()
    assert titles is not None
    path = tmp_path / "r.parquet"
    table = {"user_id": [7] * 40 + [5] * 40 + [6] * 40 + [9] * 40, "item_id": ids * 4}
    table |= {"score": [0.5] * 160, "rank": [*range(1, 41)] * 4}
    pq.write_table(pa.table(table), path)
    text = ranking_table(Written(path, tmp_path / "r.csv", 4, 160, 40), sample)
    blocks = text.split("\n\n")
    assert [b.splitlines()[0] for b in blocks[:3]] == ["user 7", "user 5", "user 6"]
    for block in blocks[:3]:
        shown = block.splitlines()[3:]
        assert [int(line.split()[0]) for line in shown] == list(range(1, 11))
        for line, item, title in zip(shown, ids, titles.to_pylist()[1:], strict=False):
            assert line.split(maxsplit=3)[1:] == [str(item), "0.5000", title]
    assert blocks[3].splitlines() == [
        "4 users, 160 rows",
        f"written: {tmp_path / 'r.csv'}",
        f"written: {path}",
    ]
