"""Data that cannot train or measure a model well are named before training."""

import logging
from pathlib import Path

import pytest

from deepfm_dist import prepare, train
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import LabelSpec, Manifest, NumericSpec
from deepfm_dist.data.schema import Feature
from deepfm_dist.distributed.settings import LearningRateConfig
from deepfm_dist.errors import ConfigError
from deepfm_dist.training.checks import (
    check_monitor,
    warn_of_labels,
    warn_of_numbers,
    warn_of_rate_0,
    warn_of_users,
)
from tests.ranks import run_in_fork


def labelled(manifest: Manifest, split: str, rows: int, positives: int) -> Manifest:
    splits = {
        name: spec.model_copy(update={"positives": spec.rows // 2})
        for name, spec in manifest.splits.items()
    }
    splits[split] = splits[split].model_copy(update={"rows": rows, "positives": positives})
    data = manifest.data.model_copy(update={"task": "ctr"})
    return manifest.model_copy(update={"data": data, "splits": splits})


@pytest.mark.parametrize(
    ("split", "positives", "message"),
    [
        (
            "train",
            0,
            "all labels of 1,000 training rows are 0: the model can only learn to predict 0; ",
        ),
        (
            "train",
            1000,
            "all labels of 1,000 training rows are 1: the model can only learn to predict 1; ",
        ),
        (
            "valid",
            0,
            "all labels of 1,000 validation rows are 0: auc, user_auc, calibration and ne are "
            "undefined",
        ),
        ("test", 1000, "all labels of 1,000 test rows are 1: auc, user_auc and ne are undefined"),
        ("train", 1, None),
        ("valid", 999, None),
    ],
)
def test_a_split_of_one_label_is_named(
    sample: PreparedDataset,
    caplog: pytest.LogCaptureFixture,
    split: str,
    positives: int,
    message: str | None,
) -> None:
    warn_of_labels(labelled(sample.manifest, split, 1000, positives))
    assert [r.getMessage().startswith(message or "") for r in caplog.records] == [True] * bool(
        message
    )


def test_single_label_warnings_ignore_sampled_negatives_and_empty_splits(
    sample: PreparedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    assert sample.manifest.sampled
    warn_of_labels(sample.manifest)
    warn_of_labels(labelled(sample.manifest, "valid", 0, 0))
    assert caplog.records == []


def test_a_model_without_users_is_named(
    sample: PreparedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    def of(task: str, *entities: str) -> Manifest:
        features = tuple(Feature(name=f"f{n}", entity=e) for n, e in enumerate(entities))
        data = sample.manifest.data.model_copy(update={"task": task, "features": features})
        return sample.manifest.model_copy(update={"data": data})

    for manifest in (of("implicit", "item", "user"), of("implicit", "context"), of("ctr", "item")):
        warn_of_users(manifest)
    assert caplog.records == []
    warn_of_users(of("implicit", "item", "item"))
    assert "all users get the same ranking; add {name: user, entity: user}" in caplog.text


@pytest.mark.parametrize("monitor", ["auc", "user_auc", "ne"])
def test_a_figure_that_would_be_nan_cannot_be_monitored(
    sample: PreparedDataset, monitor: str
) -> None:
    manifest = labelled(sample.manifest, "valid", 30, 0)
    message = f"trainer.monitor={monitor}: all 30 validation labels are 0, so {monitor} is undefine"
    with pytest.raises(ConfigError, match=message):
        check_monitor(monitor, manifest)
    for other in ("log_loss", "ndcg@10", None):
        check_monitor(other, manifest)
    check_monitor(monitor, labelled(sample.manifest, "valid", 30, 1))


def test_a_target_with_a_dot_in_its_name_is_checked_by_its_own_labels(
    sample: PreparedDataset,
) -> None:
    manifest = labelled(sample.manifest, "valid", 30, 15)
    rows = manifest.data.interactions.model_copy(
        update={"label": None, "labels": ("buy", "buy.again")}
    )
    data = manifest.data.model_copy(update={"interactions": rows})
    labels = {"buy": LabelSpec(rows=30, positives=15), "buy.again": LabelSpec(rows=30, positives=0)}
    valid = manifest.splits["valid"].model_copy(update={"labels": labels})
    splits = {**manifest.splits, "valid": valid}
    manifest = manifest.model_copy(update={"data": data, "splits": splits})
    check_monitor("buy.auc", manifest)
    with pytest.raises(ConfigError, match=r"monitor=buy\.again\.auc: all 30 buy\.again validation"):
        check_monitor("buy.again.auc", manifest)


def test_large_numbers_that_are_not_scaled_are_named(
    sample: PreparedDataset, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {
        "far": ("none", 5e8, 3e8),
        "wide": ("none", 0, 2e3),
        "negative": ("none", -4e3, 1),
        "small": ("none", 3, 900),
        "scaled": ("standard", 5e8, 3e8),
        "log": ("log", 5e8, 3e8),
    }
    features = tuple(
        Feature.model_validate({"name": name, "kind": "numeric", "transform": transform})
        for name, (transform, _, _) in fields.items()
    )
    manifest = sample.manifest.model_copy(
        update={
            "data": sample.manifest.data.model_copy(update={"features": features}),
            "numeric": {n: NumericSpec(mean=m, std=s) for n, (_, m, s) in fields.items()},
        }
    )
    with caplog.at_level(logging.WARNING):
        warn_of_numbers(manifest)
    messages = [r.getMessage() for r in caplog.records]
    assert [m.split("numbers of ")[1].split()[0] for m in messages] == ["far", "wide", "negative"]
    assert "(mean 5e+08, standard deviation 3e+08)" in messages[0]
    assert messages[0].endswith("give the field transform: standard or transform: log")


def test_a_split_of_one_label_is_warned_of_once_by_each_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"u{i % 7},i{i % 11},{i},{int(i < 160 and i % 2)}" for i in range(200)]
    (tmp_path / "rows.csv").write_text("\n".join(["user,item,time,clicked", *rows]))
    (tmp_path / "c.yaml").write_text(
        f"""
data:
  root: {tmp_path}
  task: ctr
  interactions: {{file: rows.csv, user: user, item: item, time: time, label: clicked}}
  features: [{{name: user, entity: user}}, {{name: item, entity: item}}]
  split: {{method: temporal, valid: 0.1, test: 0.1}}
run: {{name: one, runs_root: {tmp_path}/runs, prepared_root: {tmp_path}/prepared}}
trainer: {{epochs: 1, batch_size: 64}}
"""
    )
    run_in_fork(_warns_once, tmp_path, caplog)


def _warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for command in (prepare, train):
        assert command.main(["--config", str(tmp_path / "c.yaml")]) == 0
        lines = [text for r in caplog.records if "all labels of" in (text := r.getMessage())]
        caplog.clear()
        names = [
            line.removeprefix("all labels of 20 ").partition(" rows are 0: ")[0] for line in lines
        ]
        assert names == ["validation", "test"]


def test_a_rate_of_0_before_the_end_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    linear = LearningRateConfig(lr=0.1, decay="linear", decay_steps=6, warmup_steps=2)
    for rate, last_step in (
        (linear, 8),
        (LearningRateConfig(lr=0.1), 9),
        (linear.model_copy(update={"final_lr": 0.01}), 9),
    ):
        warn_of_rate_0("tables", rate, last_step)
    assert not caplog.text
    warn_of_rate_0("tables", linear, 9)
    assert "0 from step 8 on, and the last step is 9" in caplog.text
    assert "optimizer.tables.decay_steps=7" in caplog.text
