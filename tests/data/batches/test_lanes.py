"""Streamed training rows: every row once an epoch, the same batches at any number of ranks."""

import os
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist.data import layout
from deepfm_dist.data.batches import lanes as lanes_module
from deepfm_dist.data.batches.lanes import consumed
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation import job, write_plan
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from tests.data.batches.readable import rows_of


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 3), st.data())
def test_lanes_take_turns_until_each_is_done(
    rows: int, lanes: int, copies: int, data: st.DataObject
) -> None:
    sizes = [copies * (rows // lanes + (lane < rows % lanes)) for lane in range(lanes)]
    left, order = list(sizes), []
    while any(left):  # one row at a time from each lane that still has one
        for lane in range(lanes):
            if left[lane]:
                left[lane] -= 1
                order.append(lane)
    total = data.draw(st.integers(0, rows * copies))
    actual = consumed(rows, lanes, copies, total)
    assert actual.tolist() == [order[:total].count(lane) for lane in range(lanes)]


def prepared(folder: Path, rows: int, lanes: int, window: int, task: str = "ctr") -> Path:
    """``rows`` labelled rows (or positives) that know their number: n is i, m i's digits."""
    lines = "".join(
        f"u{i % 7},i{i % 1009},{i % 3 % 2},{i},{'|'.join(str(i)[:2])}\n" for i in range(rows)
    )
    (folder / "r.csv").write_text("u,i,y,n,m\n" + lines)
    spec: dict[str, Any] = {
        "task": task,
        "interactions": {"file": "r.csv", "user": "u", "item": "i"},
        "features": [
            {"name": "user", "entity": "user"},
            {"name": "item", "entity": "item"},
            {"name": "m", "separator": "|"},
            {"name": "n", "kind": "numeric"},
        ],
        "split": {"valid": 0, "test": 0},
        "lanes": lanes,
    }
    if task == "ctr":
        spec["interactions"]["label"] = "y"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_plan, "LANE_WINDOW_ROWS", window)
        patch.setattr(job, "PARTITION_BYTES", 2000)
        prepare(DataConfig.model_validate(spec), folder, folder / "d", seed=3)
    return folder / "d"


def numbers(batches: list[TrainingBatches], step: int) -> list[int]:
    """The numbers of the rows of a step, in the order of the ranks."""
    actual: list[int] = []
    for of_rank in batches:
        batch = of_rank.batch(step)
        real = int(batch.weights.sum())
        actual += [int(n) for n in batch.dense[:real, 0]]
        assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(batch.weights) - real)
        bags = batch.sparse.to_dict()["m"].to_dense()
        assert [len(bag) for bag in bags[:real]] == [
            min(2, len(str(n))) for n in actual[len(actual) - real :]
        ]
        assert [y % 1 for y in batch.labels.tolist()] == [0] * len(batch.labels)
        labels = batch.labels[:real].tolist()
        assert labels == [n % 3 % 2 for n in actual[len(actual) - real :]]
    return actual


@settings(max_examples=25)
@given(
    rows=st.integers(2, 400),
    lanes=st.integers(1, 9),
    window=st.sampled_from([10, 100, 1000]),
    size=st.integers(1, 5),
    batch_size=st.integers(1, 150),
    seed=st.integers(0, 5),
)
def test_every_row_comes_once_an_epoch_at_any_world_size(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    lanes: int,
    window: int,
    size: int,
    batch_size: int,
    seed: int,
) -> None:
    dataset = PreparedDataset(
        prepared(tmp_path_factory.mktemp("lanes"), rows, lanes, window), memory_bytes=0
    )
    assert (dataset.manifest.lanes, dataset.manifest.splits["train"].rows) == (lanes, rows)
    batch_size = min(batch_size, rows)
    alone = [TrainingBatches(dataset, batch_size, 0, 1, seed)]
    steps = alone[0].steps_per_epoch
    orders = []
    for epoch in range(2):
        order = []
        for step in range(1 + epoch * steps, 1 + (epoch + 1) * steps):
            order += numbers(alone, step)
        assert sorted(order) == list(range(rows))
        orders.append(order)
    assert rows < 10 or orders[0] != orders[1]
    if -(-batch_size // size) * (size - 1) >= batch_size:
        return
    ranks = [TrainingBatches(dataset, batch_size, r, size, seed) for r in range(size)]
    for step in (2 * steps, 1, steps, max(1, steps // 2)):  # from anywhere, in any order
        epoch, at = divmod(step - 1, steps)
        expected = orders[epoch][at * batch_size : (at + 1) * batch_size]
        assert numbers(ranks, step) == expected


def test_negatives_are_the_same_at_any_world_size_and_avoid_positives(tmp_path: Path) -> None:
    dataset = PreparedDataset(prepared(tmp_path, 300, 5, 20, "implicit"), memory_bytes=0)
    k = dataset.manifest.data.negatives.per_positive
    ranks = [TrainingBatches(dataset, 64, r, 3, 9) for r in range(3)]
    alone = TrainingBatches(dataset, 64, 0, 1, 9)
    liked = {(u, i) for u, bag in enumerate(dataset.history.lists()) for i in bag}
    actual: Counter[tuple[int, int]] = Counter()
    for step in range(1, alone.steps_per_epoch + 1):
        whole = rows_of(alone.batch(step))
        assert [row for of_rank in ranks for row in rows_of(of_rank.batch(step))] == whole
        for users, items, *_, label in whole:
            pair = (users[0], items[0])  # type: ignore[index]
            assert (pair in liked) == (label == 1)
            actual[pair] += label == 1
    assert {p for p, n in actual.items() if n} == liked
    assert sum(actual.values()) == 300 == alone.rows_per_epoch // (1 + k)
    held = PreparedDataset(dataset.folder)  # in memory: the same rows and as many batches
    assert TrainingBatches(held, 64, 0, 1, 9).steps_per_epoch == alone.steps_per_epoch


def test_large_histories_are_mapped_and_the_same(tmp_path: Path) -> None:
    folder = prepared(tmp_path, 300, 5, 20, "implicit")
    held, mapped = PreparedDataset(folder), PreparedDataset(folder, memory_bytes=0)
    assert held.history.lists() == mapped.history.lists()
    assert not (folder / "mapped" / "user-history-_as_it_is").is_file()
    files = sorted(p.name for p in (folder / "mapped").rglob("*.*"))
    assert files == ["offsets.npy", "sums.json", "values.bin"]
    for seen in (held.seen(False), mapped.seen(False), PreparedDataset(folder, 0).seen(False)):
        assert seen.lists() == [sorted(i - 1 for i in bag) for bag in held.history.lists()]
    assert not mapped.history.values.flags.writeable


@pytest.mark.parametrize("name", ["values.bin", "offsets.npy", "sums.json"])
def test_a_damaged_map_of_large_histories_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = prepared(tmp_path, 300, 5, 20, "implicit")
    bags = PreparedDataset(folder, memory_bytes=0).history.lists()
    file = next((folder / "mapped").rglob(name))
    good = file.read_bytes()
    file.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    assert PreparedDataset(folder, memory_bytes=0).history.lists() == bags
    assert f"{file.parent}: its checksums differ" in caplog.text
    assert file.read_bytes() == good
    caplog.clear()
    assert PreparedDataset(folder, memory_bytes=0).history.lists() == bags
    assert not caplog.records


def test_large_columns_of_items_are_mapped_and_the_same(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("u,i\n" + "".join(f"u{i % 7},i{i % 90}\n" for i in range(630)))
    rows = "".join(f"i{i},{i / 8}\n" for i in range(90))
    (tmp_path / "items.csv").write_text("i,price\n" + rows)
    is_item_field = {"entity": "item", "file": "items.csv", "key": "i"}
    spec = {
        "interactions": {"file": "r.csv", "user": "u", "item": "i"},
        "features": [
            {"name": "user", "entity": "user"},
            {"name": "item", "entity": "item"},
            {"name": "price", **is_item_field, "kind": "numeric"},
            {
                "name": "range",
                **is_item_field,
                "column": "price",
                "kind": "numeric",
                "transform": "bucket",
            },
        ],
        "split": {"valid": 0, "test": 0},
    }
    folder = tmp_path / "d"
    prepare(DataConfig.model_validate(spec), tmp_path, folder, seed=3)
    held = PreparedDataset(folder).entity_fields
    for _ in range(2):  # made, then found
        mapped = PreparedDataset(folder, memory_bytes=0).entity_fields
        for name, kind in (("price", np.float32), ("range", np.int32)):
            actual = mapped[name]
            assert isinstance(actual, np.ndarray)
            assert actual.dtype == kind
            assert not actual.flags.writeable
            np.testing.assert_array_equal(actual, held[name])
    assert {p.name for p in (folder / "mapped").iterdir()} == {"item-price", "item-range"}


def test_work_on_large_histories_that_others_left_does_no_harm(tmp_path: Path) -> None:
    folder = prepared(tmp_path, 300, 5, 20, "implicit")
    name = "user-history-_as_it_is"
    there = [  # a killed process, this process' number in other containers, and the old place
        f".{name}.part-{socket.gethostname()}-999999999",
        f".{name}.part-elsewhere-{os.getpid()}",
        f".{name}-{os.getpid()}",
    ]
    for left in there:
        (folder / "mapped" / left).mkdir(parents=True)
    held, mapped = PreparedDataset(folder), PreparedDataset(folder, memory_bytes=0)
    assert held.history.lists() == mapped.history.lists()
    assert sorted(p.name for p in (folder / "mapped").iterdir()) == sorted([*there[1:], name])


def test_a_streamed_batch_mixes_many_groups(tmp_path: Path) -> None:
    dataset = PreparedDataset(prepared(tmp_path, 4000, 16, 500), memory_bytes=0)
    order = numbers([TrainingBatches(dataset, 200, 0, 1, 1)], 1)
    assert len({n // 100 for n in order}) > 14
    assert abs(np.std(order) / (4000 / 12**0.5) - 1) < 0.2  # of evenly drawn rows


def test_damaged_training_files_are_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path, 900, 4, 100)
    path = sorted((folder / "train").iterdir())[1]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-00001\.parquet: missing or damaged"):
        TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)
    path.write_bytes(sorted((folder / "train").iterdir())[0].read_bytes())
    with pytest.raises(DataError, match=r"part-00001\.parquet: .*not the file that was prepared"):
        TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)
    manifest = Manifest.read(folder).model_copy(update={"sums": {}})
    manifest.write(folder)  # as another tool would
    with pytest.raises(DataError, match=r"train: [\d,]+ rows, where the manifest says 900"):
        TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)
    path.write_bytes(whole)
    pq.write_table(pq.read_table(path), path)
    with pytest.raises(DataError, match=r"train: a row group crosses a cut; delete .*d and prepa"):
        TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)


def test_a_dataset_that_is_replaced_while_it_is_streamed_is_read_on_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared(tmp_path, 900, 4, 100)
    assert len(list((folder / "train").iterdir())) > 2
    few, many = (TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1) for _ in range(2))
    undisturbed = numbers([TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)], 2)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "_HELD_FILES", 1)
        patch.setattr(lanes_module, "_OPEN_FILES", 1)
        tight = TrainingBatches(PreparedDataset(folder, 0), 64, 0, 1, 1)
        first = few.batch(1)
        tight.batch(1)
        folder.rename(tmp_path / "before")
        (tmp_path / "r.csv").unlink()
        again = prepared(tmp_path, 899, 4, 100)
        assert again == folder
        shutil.rmtree(tmp_path / "before")
        with pytest.raises(DataError, match=r"/d: prepared again, moved or deleted.*run the comm"):
            for step in range(2, 30):
                tight.batch(step)
    assert numbers([many], 2) == undisturbed
    assert first.labels.tolist() == few.batch(1).labels.tolist()
