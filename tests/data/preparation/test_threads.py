"""Nothing depends on threads, blocks and partitions; a kill leaves a dataset or none."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.manifest import SPLITS
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.data.sources import delimited
from deepfm_dist.errors import DataError
from tests.data.small_logs import bag_rows, contents

MANY: dict[str, Any] = yaml.safe_load("""
interactions: {file: "day*.csv", user: u, item: i, time: at}
features:
  - {name: user, entity: user, min_count: 3}
  - {name: item, entity: item}
  - {name: genre, entity: item, file: genres.csv, column: g}
  - {name: city, entity: user, column: c}
  - {name: weight, entity: item, column: w, kind: numeric, transform: standard}
  - {name: h, column: c, table: city}
  - {name: m, separator: "|", min_count: 2}
  - {name: hashed, column: m, separator: "|", hash_rows: 7}
  - {name: w, kind: numeric, transform: standard}
  - {name: b, column: w, kind: numeric, transform: bucket, buckets: 4}
negatives: {evaluation_per_positive: 2, per_positive: 1}
""")


def many_days(folder: Path, rows: int = 900) -> Path:
    """Four files of rows, some of them repeated, and one of items."""
    rng = np.random.default_rng(5)
    for day in range(4):
        lines = [
            f"u{rng.integers(60)},{rng.integers(400)},{rng.integers(500)},"
            f"{'abc'[rng.integers(3)]},{'|'.join(rng.choice([*'pqrst'], rng.integers(3)))},"
            f"{rng.integers(50) if rng.random() < 0.9 else ''}\n"
            for _ in range(rows // 4)
        ]
        (folder / f"day{day}.csv").write_text("u,i,at,c,m,w\n" + "".join(lines))
    genres = "".join(f"{i},{'xyz'[i % 3]}\n{i},k\n" for i in range(0, 450, 2))
    (folder / "genres.csv").write_text("i,g\n" + genres)
    return folder


SPLIT_METHODS = [
    {"method": "random", "valid": 0.1, "test": 0.2},
    {"method": "per_user", "valid": 0.1, "test": 0.2},
    {"method": "temporal", "valid": 0.1, "test": 0.2},
    {"method": "leave_last", "valid": 1, "test": 2},
]


@pytest.mark.parametrize("split", SPLIT_METHODS, ids=lambda s: s["method"])
def test_nothing_depends_on_blocks_and_little_on_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any]
) -> None:
    data = DataConfig.model_validate(MANY | {"split": split})
    many_days(tmp_path)
    prepare(data, tmp_path, tmp_path / "whole", seed=2)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    prepare(data, tmp_path, tmp_path / "blocks", seed=2)
    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    prepare(data, tmp_path, tmp_path / "parts", seed=2)
    whole, parts = (PreparedDataset(tmp_path / name) for name in ("whole", "parts"))
    assert parts.manifest.files > 5
    for name in ("tables", "entities", "dropped", "vocabulary_hash"):
        assert getattr(parts.manifest, name) == getattr(whole.manifest, name)
    for name, rows in whole.manifest.splits.items():
        assert parts.manifest.splits[name].rows == rows.rows
    for name, spec in whole.manifest.numeric.items():
        again = parts.manifest.numeric[name]
        assert (again.mean, again.std) == pytest.approx((spec.mean, spec.std))
        assert again.boundaries == spec.boundaries
    assert bag_rows(parts.history) == bag_rows(whole.history)
    for field, values in whole.entity_fields.items():
        actual = parts.entity_fields[field]
        if isinstance(values, Jagged):
            assert bag_rows(actual) == bag_rows(values)
        else:
            np.testing.assert_allclose(np.asarray(actual), values, rtol=1e-5)
    for name in SPLITS:
        frames = []
        for dataset in (whole, parts):
            frame = pd.read_parquet(dataset.folder / name)
            if name != "train":  # which negatives were drawn goes by the order of rows
                frame = frame[frame["label"] == 1]
            frame = frame.assign(w=frame["w"].round(4))
            frames.append(sorted(map(repr, frame.itertuples(index=False))))
        assert frames[0] == frames[1]


@pytest.mark.parametrize("split", SPLIT_METHODS, ids=lambda s: s["method"])
@pytest.mark.parametrize("partition_bytes", [3000, 1 << 30])
def test_several_threads_prepare_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any], partition_bytes: int
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)  # threads share a file, too
    data = DataConfig.model_validate(MANY | {"split": split})
    many_days(tmp_path)
    manifest = prepare(data, tmp_path, tmp_path / "alone", seed=2, threads=1)
    for threads in (2, 7):
        assert prepare(data, tmp_path, tmp_path / "d", 2, threads) == manifest
        assert contents(tmp_path / "d") == contents(tmp_path / "alone")
        assert prepare(data, tmp_path, tmp_path / "d", 2, threads) == manifest  # up to date
        shutil.rmtree(tmp_path / "d")


def test_a_failing_thread_ends_the_others_and_its_error_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    many_days(tmp_path)
    with (tmp_path / "day2.csv").open("a") as file:
        file.write("u1,2,late,a,p,3\n")
    data = DataConfig.model_validate(MANY)
    with pytest.raises(DataError, match=r"day2\.csv, line 227: at 'late' is not a time"):
        prepare(data, tmp_path, tmp_path / "d", 2, threads=4)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == set()
    assert not [t for t in threading.enumerate() if t.name.startswith("prepare")]


def killed_at(event: int, work: Callable[[], Any]) -> None:
    """Works until the process has touched the file system so often, and dies there."""
    left = event

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = name == "open" and isinstance(arguments[1], str) and {*"wax+"} & {*arguments[1]}
        if writes or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


def dies(work: Callable[[], Any], after_s: float | None = None) -> bool:
    """Whether a forked process that does the work is killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow  # many processes
def test_a_kill_at_any_moment_leaves_a_complete_dataset_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    many_days(tmp_path, 400)
    config = [MANY, MANY | {"split": SPLIT_METHODS[1]}]
    old, new = (
        partial(prepare, DataConfig.model_validate(c), tmp_path, tmp_path / "d", 2) for c in config
    )
    whole = []
    for work in (new, old):
        work()
        whole.append(contents(tmp_path / "d"))

    def check(died: bool) -> None:
        """The earlier dataset, the new one or nothing is there; the next run makes the new one."""
        left = contents(tmp_path / "d") if (tmp_path / "d").exists() else None
        assert left in ((whole[1], whole[0], None) if died else (whole[0],))
        new()
        assert contents(tmp_path / "d") == whole[0]
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["d"]

    def dies_at(event: int) -> bool:
        old()
        died = dies(partial(killed_at, event, new))
        check(died)
        return died

    rng, event = np.random.default_rng(), 1
    while dies_at(event):
        event += int(rng.integers(1, 20))
    assert event > 40
    for back in range(1, 16):  # from putting the new one in the old one's place to the end
        dies_at(event - back)
    begun = time.monotonic()
    old()
    seconds = time.monotonic() - begun
    for moment in rng.random(5):
        old()
        check(dies(new, after_s=moment * seconds))


def test_clicks_without_users_are_partitioned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 300)
    lines = "".join(f"{i % 2},a{i % 13},{i}\n" for i in range(500))
    (tmp_path / "c.csv").write_text("y,a,n\n" + lines)
    spec = {
        "task": "ctr",
        "interactions": {"file": "c.csv", "label": "y"},
        "features": [{"name": "a"}, {"name": "n", "kind": "numeric"}],
    }
    data = DataConfig.model_validate(spec)
    actual = []
    for partition_bytes in (1 << 30, 500):
        monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
        prepare(data, tmp_path, tmp_path / str(partition_bytes), seed=1)
        frames = {s: pd.read_parquet(tmp_path / str(partition_bytes) / s) for s in SPLITS}
        assert [len(f) for f in frames.values()] == [400, 50, 50]
        actual.append({s: sorted(map(tuple, f.to_numpy())) for s, f in frames.items()})
    assert actual[0] == actual[1]
    prepare(data, tmp_path, tmp_path / "three", 1, threads=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "500")
