"""Labels as numbers, booleans or words, in every format."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.errors import DataError


def labels(path: Path) -> list[Any]:
    values: list[Any] = read_table(str(path), [Column("y", "label")])["y"].to_pylist()
    return values


def test_numbers_and_truth_values_are_labels(tmp_path: Path) -> None:
    words = {"0": 0, "1": 1, "true": 1, "False": 0, "TRUE": 1, "1.0": 1, "0.0": 0, " true": 1}
    path = tmp_path / "rows.csv"
    path.write_text("y,x\n" + "".join(f"{word},x\n" for word in words))
    assert labels(path) == [*words.values()]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"y": y}) + "\n" for y in (True, False, 1, "True", 0.0)))
    assert labels(path) == [1, 0, 1, 1, 0]
    path = tmp_path / "rows.parquet"
    texts = pa.array(["True", "false"])
    for column in (pa.array([True, False]), texts, texts.dictionary_encode(), pa.array([1.0, 0.0])):
        pq.write_table(pa.table({"y": column}), path)
        assert labels(path) == [1, 0]


@pytest.mark.parametrize("word", ["yes", "t", "on", "2", "-1", "0.5", "clicked"])
def test_other_words_are_not_labels(tmp_path: Path, word: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"y,x\n1,x\n{word},x\n")
    message = f"line 3: y '{word}' is not a label: 0, 1, true or false is expected; write 0 or 1"
    with pytest.raises(DataError, match=message):
        labels(path)
    pq.write_table(pa.table({"y": [True, None]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="row 2: y '' is empty"):
        labels(tmp_path / "rows.parquet")
