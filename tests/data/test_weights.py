"""Rows that count more than others, from the file to the loss."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from deepfm_dist.model.deepfm import OverArch, Table, build_deepfm
from deepfm_dist.model.losses import DeepFMTrain

WEIGHTS = [2, 1, 3, 1, 2, 1, 4, 1, 1, 2]
CLICKS = "y,u,h,n,w\n" + "".join(
    f"{k % 3 % 2},u{k % 4},h{k % 3},{k},{w}\n" for k, w in enumerate(WEIGHTS)
)
FIELDS = [{"name": "user", "entity": "user"}, {"name": "h"}, {"name": "n", "kind": "numeric"}]


def clicks(folder: Path, text: str = CLICKS, **changes: Any) -> PreparedDataset:
    (folder / "c.csv").write_text(text)
    spec = {
        "task": "ctr",
        "interactions": {"file": "c.csv", "user": "u", "label": "y", "weight": "w"},
        "features": FIELDS,
        "split": {"valid": 0, "test": 0},
    }
    prepare(DataConfig.model_validate(spec | changes), folder, folder / "d", 1)
    return PreparedDataset(folder / "d")


@pytest.mark.parametrize("weight", ["-1", "0", "nan", "inf", "", "x", "1e99", "1e-99"])
def test_invalid_weights_are_refused_or_skipped(tmp_path: Path, weight: str) -> None:
    text = CLICKS + f"1,u1,h1,1,{weight}\n"
    what = r"is empty" if weight == "" else "is not a weight: a number above 0 is expected"
    with pytest.raises(DataError, match=rf"c\.csv, line 12: w '{weight}' {what}; .*skip$"):
        clicks(tmp_path, text)
    dataset = clicks(tmp_path, text, on_bad_row="skip")
    assert dataset.manifest.splits["train"].rows == len(WEIGHTS)
    assert dataset.manifest.dropped == {"c.csv: rows with an unreadable cell": 1}


def test_weights_are_not_fields_and_exclude_fixed_negatives(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'w' is interactions\.weight, and no field"):
        clicks(tmp_path, features=[*FIELDS, {"name": "w", "kind": "numeric"}])
    rows = {"file": "c.csv", "user": "u", "item": "h", "weight": "w"}
    fixed = {"interactions": rows, "task": "implicit", "negatives": {"fixed_per_user": 1}}
    with pytest.raises(ValueError, match=r"fixed_per_user have no interactions\.weight"):
        clicks(tmp_path, features=FIELDS[:1], **fixed)


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("world_size", [1, 3])
def test_training_rows_carry_their_weights(
    tmp_path: Path, memory_bytes: int, world_size: int
) -> None:
    folder = clicks(tmp_path, lanes=2).folder
    mean = sum(WEIGHTS) / len(WEIGHTS)
    actual = []
    for rank in range(world_size):
        batches = TrainingBatches(PreparedDataset(folder, memory_bytes), 6, rank, world_size, 7)
        for batch, rows in zip(batches.steps(1, 2), (6, 4), strict=True):
            assert batch.global_weight == rows
            real = batch.weights > 0
            actual += zip(batch.dense[real, 0].tolist(), batch.weights[real].tolist(), strict=True)
    assert [int(n) for n, _ in sorted(actual)] == list(range(10))
    np.testing.assert_allclose([w for _, w in sorted(actual)], np.divide(WEIGHTS, mean), rtol=1e-6)


def test_negatives_weigh_what_their_positive_does(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text(
        "u,i,w\n" + "".join(f"u{k % 9},i{k * 7 % 31},{1 + k % 5}\n" for k in range(90))
    )
    spec = {
        "interactions": {"file": "s.csv", "user": "u", "item": "i", "weight": "w"},
        "features": [
            {"name": "user", "entity": "user"},
            {"name": "item", "entity": "item"},
            {"name": "heavy", "column": "x", "kind": "numeric"},
        ],
        "negatives": {"per_positive": 2, "evaluation_per_positive": 3},
    }
    frame = pd.read_csv(tmp_path / "s.csv").assign(x=lambda f: f["w"])
    frame.to_csv(tmp_path / "s.csv", index=False)
    prepare(DataConfig.model_validate(spec), tmp_path, tmp_path / "d", 1)
    dataset = PreparedDataset(tmp_path / "d")
    mean, rows = dataset.manifest.mean_weight, dataset.rows("train")
    assert mean == pytest.approx(np.mean(np.asarray(rows.context["heavy"])))
    held_out = dataset.rows("test")
    assert held_out.weights is not None
    assert held_out.n == 4 * dataset.manifest.splits["test"].positives
    heavy = np.asarray(held_out.context["heavy"])
    np.testing.assert_allclose(held_out.weights * mean, heavy, rtol=1e-6)
    batches = TrainingBatches(dataset, 50, 0, 1, seed=2)
    for batch in batches.steps(1, batches.steps_per_epoch):
        np.testing.assert_allclose(batch.weights * mean, batch.dense[:, 0], rtol=1e-6)
        assert 0 < batch.labels.sum() < len(batch.labels)


def test_a_row_of_weight_2_trains_as_two_rows(tmp_path: Path) -> None:
    dataset = clicks(tmp_path)
    manifest = dataset.manifest
    tables = {name: Table(spec.rows, spec.features) for name, spec in manifest.tables.items()}
    torch.manual_seed(1)
    over_arch = partial(OverArch, layer_sizes=(8,), activation="relu", dropout=0, batch_norm=True)
    model = build_deepfm(tables, ["user", "h"], 1, 4, over_arch=over_arch, init_std=0.5)
    task = DeepFMTrain(model).double()
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = TrainingBatches(dataset, 10, 0, 1, seed=3).batch(1)
    rows = dataset.rows("train")
    assert rows.weights is not None
    times = np.rint(rows.weights * manifest.mean_weight).astype(int)
    several = np.repeat(np.arange(10), times)
    assert rows.users is not None
    assert rows.labels is not None
    repeated = Collator(dataset)(
        rows.users[several], None, rows.context, several, rows.labels[several]
    )
    losses, gradients = [], []
    for part in (batch, repeated):
        part.dense, part.labels = (
            part.dense.double(),
            part.labels.double(),
        )
        loss, logits = task(part)
        z, y, w = (t.double().numpy() for t in (logits, part.labels, part.weights))
        oracle = (w * (np.logaddexp(0, z) - y * z)).sum() / w.sum()
        assert loss.item() == pytest.approx(oracle, rel=1e-6)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(task.parameters()), allow_unused=True))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_weights_too_far_apart_for_float32_stay_above_zero(tmp_path: Path) -> None:
    """Of 1e30 and 1e-30 by turns the mean is 5e29, of which the lesser ones are 2e-60."""
    rows = "".join(f"{k % 2},u{k % 4},h{k % 3},{k},{(1e-30, 1e30)[k % 2]}\n" for k in range(40))
    dataset = clicks(tmp_path, "y,u,h,n,w\n" + rows)
    noted = dataset.manifest.noted
    assert [n for text, n in noted.items() if "weight is below 1.2e-38 of the mean" in text] == [20]
    weights = pd.read_parquet(tmp_path / "d/train").weight
    assert sorted(set(weights)) == [np.finfo(np.float32).tiny, 2.0]
    assert len(dataset.rows("train").weights) == 40  # type: ignore[arg-type]  # all are above 0
