"""Batches made by tensor operations, against those of the host: the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from deepfm_dist.build import shard_for_training, training_batches
from deepfm_dist.config import Config, load_config
from deepfm_dist.data.batches import device_batches
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.device_batches import DeviceBatches, device_bytes, mixed, permuted
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.seeding import mix, permute
from tests.conftest import HISTORY
from tests.ranks import RankFailed, run_alone, run_ranks

CPU = torch.device("cpu")
words = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(words, min_size=1))
def test_words_are_mixed_as_on_the_host(some: list[int]) -> None:
    expected = [int(mix(np.uint64(word % 2**64))) for word in some]
    assert [word % 2**64 for word in mixed(torch.tensor(some)).tolist()] == expected


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_places_are_shuffled_as_on_the_host(n: int, seed: int) -> None:
    assert np.array_equal(permuted(torch.arange(n), n, seed).numpy(), permute(range(n), n, seed))


def rows(seed: int, **columns: Any) -> pd.DataFrame:
    """300 distinct pairs of 40 users and 30 items, user 0 with nearly all of them."""
    rng = np.random.default_rng(seed)
    pairs = pd.DataFrame(rng.integers(0, (40, 30), (300, 2)), columns=["u", "i"])
    most = pd.DataFrame({"u": 0, "i": np.arange(28)})
    frame = pd.concat([pairs, most]).drop_duplicates(ignore_index=True)
    frame["hour"] = rng.integers(0, 24, len(frame))
    frame["price"] = rng.random(len(frame)).round(3)
    frame["tags"] = ["|".join(rng.choice(list("abcd"), rng.integers(0, 3))) for _ in frame.index]
    return frame.assign(**columns)


FIELDS = [
    {"name": "user", "entity": "user", "min_count": 6},
    {"name": "item", "entity": "item"},
    {"name": "kind", "entity": "item", "file": "items.csv"},
    {"name": "year", "entity": "item", "file": "items.csv", "kind": "numeric"},
    {"name": "hour", "entity": "context"},
    {"name": "tags", "entity": "context", "separator": "|"},
    {"name": "price", "entity": "context", "kind": "numeric"},
    {"name": "text", "entity": "item", "kind": "vector", "file": "items.csv", "npy": "v.npy"},
    {"name": "taste", "entity": "user", "kind": "vector", "file": "tastes.parquet"},
]
NEGATIVES = {"per_positive": 4}
DATA: dict[str, dict[str, Any]] = {
    "negatives": {"negatives": NEGATIVES, "features": [*FIELDS[:5], *FIELDS[7:]]},
    "negatives that stay": {"negatives": NEGATIVES | {"redraw": False}, "features": FIELDS[:2]},
    "labels and weights": {
        "task": "ctr",
        "interactions": {
            "file": "rows.csv", "user": "u", "item": "i", "label": "y", "weight": "w",
        },
        "features": FIELDS,
    },
}  # fmt: skip


def prepared(name: str, folder: Path) -> PreparedDataset:
    rng = np.random.default_rng(1)
    frame = rows(2)
    frame["y"], frame["w"] = rng.integers(0, 2, len(frame)), rng.integers(1, 4, len(frame))
    frame.to_csv(folder / "rows.csv", index=False)
    items = pd.DataFrame({"i": range(30), "kind": rng.integers(0, 5, 30), "year": rng.random(30)})
    items.iloc[:28].to_csv(folder / "items.csv", index=False)
    np.save(folder / "v.npy", rng.normal(size=(28, 5)))
    tastes = pd.DataFrame({"u": range(35), "taste": [*rng.normal(size=(35, 3))]})
    tastes.to_parquet(folder / "tastes.parquet")
    default = {
        "interactions": {"file": "rows.csv", "user": "u", "item": "i"},
        "split": {"valid": 0, "test": 0},
    }
    data = DataConfig.model_validate(default | DATA[name])
    prepare(data, folder, folder / "d", seed=1)
    return PreparedDataset(folder / "d")


def assert_equal(found: Batch, expected: Batch) -> None:
    assert found.sparse.keys() == expected.sparse.keys()
    assert found.sparse.length_per_key() == expected.sparse.length_per_key()
    for name in ("lengths", "values"):
        ours, theirs = (getattr(b.sparse, name)() for b in (found, expected))
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    for name in ("dense", "labels", "weights", "global_weight"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("name", DATA)
def test_batches_are_the_hosts_bit_for_bit(
    name: str, rank: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_batches, "BLOCK_ROWS", 100)  # three steps of one rank
    dataset = prepared(name, tmp_path)
    share = 0.0 if name == "negatives that stay" else 0.3
    host, other = (
        TrainingBatches(dataset, 31, rank, size, seed=3, id_dropout=share) for _ in range(2)
    )
    ours = DeviceBatches(other, CPU)
    if name == "negatives":
        assert host.negatives is not None
        assert host.negatives.some_are_short
        assert dataset.has_rare_users
    last = 2 * host.steps_per_epoch  # with the short batches of two epochs
    for step, batch in enumerate(ours.steps(1, last), 1):
        assert_equal(batch, host.batch(step))
    assert_equal(ours.batch(2), host.batch(2))  # of a block that is there no more


def test_several_values_of_a_field_come_from_the_device(sample: PreparedDataset) -> None:
    host = TrainingBatches(sample, 1000, 0, 1, seed=1)
    ours = DeviceBatches(host, CPU)
    assert ours.batch(1).sparse.length_per_key()[2] > 1000
    for step in (1, 7, host.steps_per_epoch, host.steps_per_epoch + 1):
        assert_equal(ours.batch(step), host.batch(step))


class Operations(TorchDispatchMode):
    """Notes what is called on tensors, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_batch_takes_two_copies_and_no_read_back(sample: PreparedDataset) -> None:
    ours = DeviceBatches(TrainingBatches(sample, 1000, 0, 1, seed=1), CPU)
    ours.batch(1)
    with Operations() as used:
        ours.batch(2)
    copies = [name for name in used.names if "view" not in name]
    assert copies == ["aten.clone.default", "aten.cat.default"]


def losses(folder: Path, config: Config) -> list[float]:
    dataset = PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        batches = training_batches(config, dataset, world)
        assert isinstance(batches, DeviceBatches) == (config.data.on_device is True)
        pipeline, stream = train_pipeline(sharded, optimizer, world), batches.steps(1, 5)
        sharded.train()
        return [pipeline.train_step(stream).loss for _ in range(5)]


@pytest.mark.parametrize("size", [1, 2])
def test_losses_are_equal_bit_for_bit(sample: PreparedDataset, size: int) -> None:
    ours, hosts = (
        run_ranks(losses, size, sample.folder, load_config("sample", [f"data.on_device={on}"]))
        for on in ("true", "false")
    )
    assert ours == hosts


def on_device(folder: Path, overrides: list[str]) -> str:
    with process_group("cpu") as world:
        config = load_config("sample", overrides)
        return type(training_batches(config, PreparedDataset(folder), world)).__name__


def test_a_cpu_leaves_batches_to_the_host_by_default(sample: PreparedDataset) -> None:
    assert run_alone(on_device, sample.folder, []) == "TrainingBatches"


def test_what_the_device_does_not_make_is_refused_by_name(
    sample: PreparedDataset, with_history: PreparedDataset
) -> None:
    reasons = {
        device_batches.reason_for_host(sample, "bce", 1): None,
        device_batches.reason_for_host(sample, "bpr", 1): "batches of users (trainer.loss=bpr)",
        device_batches.reason_for_host(sample, "bce", 2): (
            "batches in parts (trainer.accumulate_steps=2)"
        ),
        device_batches.reason_for_host(with_history, "bce", 1): "histories of users",
        device_batches.reason_for_host(PreparedDataset(sample.folder, 10), "bce", 1): (
            "rows streamed from disk (data.memory_bytes=10)"
        ),
    }
    assert list(reasons) == list(reasons.values())
    error = r"ConfigError: data\.on_device=true: histories of users can only be made by the host"
    with pytest.raises(RankFailed, match=error):
        run_alone(on_device, with_history.folder, [*HISTORY, "data.on_device=true"])


def test_byte_counts_cover_all_arrays(sample: PreparedDataset) -> None:
    host = TrainingBatches(sample, 1000, 0, 1, seed=1)
    rows = sample.rows("train")
    assert rows.users is not None
    assert rows.items is not None
    columns = rows.users.nbytes + rows.items.nbytes + 8 * len(sample.seen(False).values)
    assert device_bytes(host) > columns + host.rows_per_epoch * 8 * 8
