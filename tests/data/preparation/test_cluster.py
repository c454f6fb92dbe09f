"""Preparation by tasks gives the bytes of preparation by threads; here the tasks run in order."""

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation import cluster, job, local
from deepfm_dist.data.preparation.cluster import (
    ARROW_SCHEMA,
    Record,
    Records,
    Task,
    in_arrow,
    prepare_on,
)
from deepfm_dist.data.preparation.job import Job
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from tests.data.preparation.cluster_cases import CASES, files_of, write_inputs
from tests.data.preparation.content_logs import log_of, write_rows


class InOrder:
    """Records in memory, whose tasks run one after the other, the last partition first."""

    def __init__(self, partitions: list[list[Record]]) -> None:
        self._partitions = partitions

    def map(self, task: Task) -> "InOrder":
        task = pickle.loads(pickle.dumps(task))  # it runs elsewhere
        return InOrder([[*_through_arrow(task, records)] for records in self._partitions][::-1])

    def only(self, *kinds: str) -> "InOrder":
        wanted = {*kinds, "error"}
        return InOrder([[r for r in records if r.kind in wanted] for records in self._partitions])

    def by_key(self, n: int) -> "InOrder":
        found: list[list[Record]] = [[] for _ in range(n)]
        for records in self._partitions:
            for record in records:
                found[record.key * 7 % n].append(record)  # some have several keys, some none
        return InOrder([sorted(f, key=lambda r: (r.key, r.source, r.piece)) for f in found])

    def kept(self) -> "InOrder":
        return self

    def stream(self) -> Iterator[Record]:
        return (record for records in self._partitions for record in records)

    collect = stream

    def release(self) -> None:
        pass


def _through_arrow(task: Task, records: list[Record]) -> Iterator[Record]:
    batch = pa.RecordBatch.from_pylist([vars(r) for r in records], ARROW_SCHEMA)
    for made in in_arrow(task, iter([batch])):
        yield from (Record(**row) for row in made.to_pylist())


class Value:
    def __init__(self, value: Any) -> None:
        self._pickled = pickle.dumps(value)

    def __call__(self) -> Any:
        return pickle.loads(self._pickled)


class OneProcess:
    """Runs tasks in this process."""

    def numbers(self, n: int) -> Records:
        return InOrder([[Record("", key, 0, 0, False, b"")] for key in range(n)])

    def share(self, value: Any) -> Callable[[], Any]:
        return Value(value)


def by_tasks(job: Job, wanted: str) -> Manifest:
    return prepare_on(OneProcess(), job, wanted)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("cluster") / "in")


@pytest.mark.parametrize("case", CASES)
def test_tasks_give_the_bytes_that_threads_give(
    case: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    monkeypatch.setattr(cluster, "_PIECE_BYTES", 2000)
    monkeypatch.setattr(cluster, "_COUNTS_AT_ONCE", 2)
    monkeypatch.setattr(cluster, "_ADDING_TASKS", 3)
    monkeypatch.chdir(inputs)
    data = DataConfig.model_validate(CASES[case])
    manifest = local.prepare(data, inputs, tmp_path / "threads", seed=4)
    local.prepare(data, inputs, tmp_path / "tasks", seed=4, build=by_tasks)
    assert manifest.files > 4
    threads, tasks = (files_of(tmp_path / name) for name in ("threads", "tasks"))
    assert [name for name in threads if threads[name] != tasks.get(name)] == []
    assert threads.keys() == tasks.keys()


def test_a_bad_cell_is_named_and_a_reader_s_warning_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_rows(tmp_path / "in", log_of(60), "split")
    rows = pd.read_csv(root / "rows-8.csv")
    rows["t"] = rows["t"].astype(object)
    rows.loc[3, "t"] = "soon"
    rows.to_csv(root / "rows-8.csv", index=False)
    data = DataConfig.model_validate(CASES["temporal"])
    with pytest.raises(DataError, match=r"rows-8\.csv, line 5: .*'soon'"):
        local.prepare(data, root, tmp_path / "d", seed=4, build=by_tasks)
    assert not (tmp_path / "d").exists()
    skipping = data.model_copy(update={"on_bad_row": "skip"})
    with caplog.at_level(logging.WARNING):
        manifest = local.prepare(skipping, root, tmp_path / "d", seed=4, build=by_tasks)
    assert sum(manifest.dropped.values()) >= 1
    assert sum("soon" in record.getMessage() for record in caplog.records) == 1


def test_tasks_share_a_large_parquet_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_rows(tmp_path / "in", log_of(500), "plain")
    rows = pd.read_csv(root / "rows.csv")
    (root / "rows.csv").unlink()
    rows.to_parquet(root / "rows.parquet", row_group_size=60)  # 550 rows
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    monkeypatch.setattr(cluster, "_READ_BYTES", 5000)
    n_tasks: list[int] = []
    numbers = OneProcess.numbers
    monkeypatch.setattr(
        OneProcess, "numbers", lambda self, n: (n_tasks.append(n), numbers(self, n))[1]
    )
    data = DataConfig.model_validate(CASES["temporal"])
    local.prepare(data, root, tmp_path / "threads", seed=4)
    local.prepare(data, root, tmp_path / "tasks", seed=4, build=by_tasks)
    assert 3 < n_tasks[0] < 10
    assert files_of(tmp_path / "threads") == files_of(tmp_path / "tasks")
    rows["t"] = rows["t"].astype(float)
    rows.loc[407, "t"] = np.inf
    rows.to_parquet(root / "rows.parquet", row_group_size=60)
    with pytest.raises(DataError, match=r"rows\.parquet, row 408: .*inf"):
        local.prepare(data, root, tmp_path / "bad", seed=4, build=by_tasks)


def test_texts_of_one_hash_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_texts(texts: pa.Array) -> np.ndarray:
        return np.where(np.array(texts) == "b", 3, 7).astype(np.uint64)

    ids = pa.array(["b", "a", "c", "d"])
    known = cluster._Known({"x": ids}, {"x": hash_texts(ids)})
    monkeypatch.setattr(cluster, "hash_texts", hash_texts)
    assert known.codes("x", pa.array(["d", "b", "a", "c", "d"])).tolist() == [3, 0, 1, 2, 3]
