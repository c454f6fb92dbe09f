"""Batches: the same global batch at any world size, every row used, fields looked up right."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deepfm_dist.config import load_config
from deepfm_dist.data.batch import Batch
from deepfm_dist.data.dataset import ABSENT, Collator, PreparedDataset, TrainingBatches
from deepfm_dist.data.encode import prepare
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.sources import read_table
from deepfm_dist.errors import ConfigError, DataError


def rows_of(batch: Batch) -> list[tuple[object, ...]]:
    """(user bag, item bag, genre bag, label) of the rows that count."""
    bags = [[tuple(b.tolist()) for b in j.to_dense()] for j in batch.sparse.to_dict().values()]
    real = int(batch.weights.sum())
    assert batch.weights.tolist() == [1.0] * real + [0.0] * (len(batch.weights) - real)
    assert all(bag == () for of_key in bags for bag in of_key[real:])
    return list(zip(*bags, batch.labels.tolist(), strict=True))[:real]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("step", [1, 144, 145, 288])
def test_ranks_share_the_global_batch(sample: PreparedDataset, size: int, step: int) -> None:
    whole = TrainingBatches(sample, 1000, 0, 1, seed=1).batch(step)
    parts = [TrainingBatches(sample, 1000, r, size, seed=1).batch(step) for r in range(size)]
    assert len({len(p.labels) for p in parts}) == 1
    assert {float(p.global_weight) for p in parts} == {float(whole.weights.sum())}
    assert [row for part in parts for row in rows_of(part)] == rows_of(whole)


def test_an_epoch_has_every_positive_once_and_its_negatives(sample: PreparedDataset) -> None:
    batches = TrainingBatches(sample, 5000, 0, 1, seed=1)
    k = sample.manifest.data.negatives.per_positive
    seen_negatives = []
    expected = Counter(
        (u, i)
        for u in range(len(sample.history))
        for i in sample.history.values[
            sample.history.offsets[u] : sample.history.offsets[u + 1]
        ].tolist()
    )
    for epoch in range(2):
        first = 1 + epoch * batches.steps_per_epoch
        rows = [
            r for b in batches.steps(first, first + batches.steps_per_epoch - 1) for r in rows_of(b)
        ]
        pairs = [(u[0], i[0]) for u, i, _, _ in rows]  # type: ignore[index]
        labels = [row[3] for row in rows]
        positives = Counter(p for p, y in zip(pairs, labels, strict=True) if y == 1)
        negatives = [p for p, y in zip(pairs, labels, strict=True) if y == 0]
        assert positives == expected
        assert len(negatives) == k * len(expected)
        assert not set(negatives) & set(expected)
        per_user = Counter(u for u, _ in negatives)
        assert all(per_user[u] == k * n for u, n in Counter(u for u, _ in expected).items())
        seen_negatives.append(Counter(negatives))
    assert seen_negatives[0] != seen_negatives[1]
    again = TrainingBatches(sample, 5000, 0, 1, seed=1).batch(3)
    assert rows_of(again) == rows_of(batches.batch(3))


def test_ranks_without_rows_are_refused(sample: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="batch of 4 rows over 3 ranks leaves a rank without"):
        TrainingBatches(sample, 4, 0, 3, seed=1)
    everything = TrainingBatches(sample, 10**9, 0, 1, seed=1)
    assert everything.steps_per_epoch == 1


def test_the_collator_looks_up_each_rows_fields(sample: PreparedDataset) -> None:
    users, items = np.array([3, ABSENT, 5], np.int32), np.array([7, 8, ABSENT], np.int32)
    batch = Collator(sample)(users, items, n_real=2, labels=np.array([1, 0, 0], np.float32))
    genres = sample.entity_fields["genre"]
    assert isinstance(genres, Jagged)
    bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
    assert bags["user"] == [[3], [], [5]]
    assert bags["item"] == [[7], [8], []]
    expected = [genres.values[genres.offsets[i] : genres.offsets[i + 1]].tolist() for i in (7, 8)]
    assert bags["genre"] == [*expected, []]
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.to(torch.device("cpu")).labels.tolist() == [1, 0, 0]


def test_numbers_and_context_reach_the_batch_and_new_rows_equal_prepared_ones(
    tmp_path: Path,
) -> None:
    (tmp_path / "r.csv").write_text("u,i,h,m,n\na,x,1,p|q,4\nb,y,2,,9\nb,x,1,q,\n")
    fields = (
        "[{name: user, entity: user}, {name: h}, {name: m, separator: '|'}, "
        "{name: n, kind: numeric}]"
    )
    config = load_config(
        "sample",
        [
            f"data={{root: {tmp_path}, interactions: {{file: r.csv, user: u, item: i}}, "
            f"features: {fields}, split: {{valid: 0, test: 0}}}}"
        ],
    )
    prepare(config.data, tmp_path, tmp_path / "d", seed=1)
    dataset = PreparedDataset(tmp_path / "d")
    rows = dataset.rows("train")
    batch = Collator(dataset)(rows.users, rows.items, rows.context, np.array([2, 0, ABSENT]))
    assert batch.dense[:, 0].tolist() == [0, 4, 0]
    bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
    assert [len(b) for b in bags["m"]] == [1, 2, 0]
    assert bags["m"][1][1] == bags["m"][0][0]
    assert [len(b) for b in bags["h"]] == [1, 1, 0]
    encoder = RowEncoder(dataset)
    new = encoder.encode(read_table(tmp_path / "r.csv", encoder.columns))
    assert new.users is not None
    assert new.users.tolist() == rows.users.tolist()  # type: ignore[union-attr]
    assert np.array_equal(new.context["h"], rows.context["h"])  # type: ignore[arg-type]
    assert new.context["m"].values.tolist() == rows.context["m"].values.tolist()  # type: ignore[union-attr]
    fixed = encoder.fixed_context({"h": 2, "m": "q", "n": "7"})
    assert fixed["n"].tolist() == [7]  # type: ignore[union-attr]
    for values, message in [
        ({"m": "q", "n": 1}, "recommend.context.h: this model looks at h"),
        ({"h": 3, "m": "q", "n": 1}, "h=3: never seen in training"),
        ({"h": 1, "m": "q", "n": "much"}, "expected a number"),
        ({"h": 1, "m": "q", "n": 1, "z": 1}, "no such context field; has: h, m, n"),
    ]:
        with pytest.raises(ConfigError, match=message):
            encoder.fixed_context(values)


def test_a_damaged_dataset_is_named(sample: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared dataset"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest of this version"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text((sample.folder / "manifest.json").read_text())
    with pytest.raises(DataError, match="missing or damaged"):
        PreparedDataset(tmp_path).rows("train")


def test_the_dataset_is_parquet_that_other_tools_read(sample: PreparedDataset) -> None:
    frame = pd.read_parquet(sample.folder / "test")
    assert set(frame.columns) == {"user", "item", "label", "time"}
    assert len(frame) == sample.manifest.splits["test"].rows
