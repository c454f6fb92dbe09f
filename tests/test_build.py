"""Models built from configuration, manifest and checkpoint, and how runs resume."""

import json
import logging
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepfm_dist import build
from deepfm_dist.build import (
    build_model,
    deepfm_of,
    shard_for_inference,
    shard_for_training,
)
from deepfm_dist.config import Config, load_config, with_settings
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest, SplitSpec
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.jobs.validation import check_monitor_name, make_validate
from deepfm_dist.model.deepfm import DeepFM
from deepfm_dist.model.norm import GlobalBatchNorm
from deepfm_dist.model.settings import ModelConfig
from deepfm_dist.runs.folder import set_aside
from deepfm_dist.runs.start import begin, inherited_settings, make_ready
from deepfm_dist.runs.trained import find_run, open_trained
from deepfm_dist.training.state import LoopState
from tests.ranks import RankFailed, run_alone, run_ranks, variables
from tests.steps import config_of

PER_EPOCH = 10


class Raises(nn.Module):
    def __init__(self, in_features: int) -> None:
        raise RuntimeError("no such\nluck")


class Picky(nn.Linear):
    """One logit a row, but as a column: broadcast with the rest it would be B logits a row."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)


class Folding(nn.Module):
    """Normalizes two rows for each row of the batch."""

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.norm = GlobalBatchNorm(in_features // 2)

    def forward(self, x_BI: Tensor) -> Tensor:
        return self.norm(x_BI.reshape(2 * len(x_BI), -1)).view_as(x_BI).sum(1)


class ByRank(nn.Sequential):
    """Batch norm and dropout of torch, which know one rank's rows."""

    def __init__(self, in_features: int) -> None:
        norm, drop = nn.BatchNorm1d(in_features), nn.Dropout(0.5)
        super().__init__(norm, drop, nn.Linear(in_features, 1), nn.Flatten(0))


class Mute(nn.Module):
    def __init__(self, in_features: int) -> None:
        super().__init__()

    def forward(self, x_BI: Tensor) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over_arch": "tests.cross_net:Nothing"}, "no attribute 'Nothing'"),
        ({"over_arch": "no_such_module:CrossNet"}, "No module named"),
        ({"over_arch": "tests.ranks:run_ranks"}, "not a torch.nn.Module"),
        (
            {"over_arch": "tests.cross_net:CrossNet", "over_arch_options": {"depth": 3}},
            "unexpected keyword argument 'depth'",
        ),
        ({"over_arch": "tests.test_build:Raises"}, "cannot be built: RuntimeError: no such luck"),
        ({"over_arch": "tests.test_build:Picky"}, r"gives \[2, 1\] for 2 rows; expected \[2\]"),
        ({"over_arch": "tests.test_build:Mute"}, "gives NoneType for 2 rows"),
        ({"over_arch": "tests.test_build:Folding"}, r"takes \[2, \d+\], .*; got \[4, \d+\]"),
        ({"over_arch": "no_python:X"}, r"SyntaxError: .*; give mlp or package.module:Class"),
    ],
)
def test_an_over_arch_that_cannot_be_used_is_refused_in_one_line(
    sample: PreparedDataset,
    options: dict[str, object],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "no_python.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RankFailed, match=f"ConfigError: .*{message}"):
        run_alone(_powers, ModelConfig.model_validate(options), sample.manifest)


def test_modules_that_know_one_ranks_rows_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    build._warn_of_modules_by_rank("mine:ByRank", ByRank(4))
    build._warn_of_modules_by_rank("mine:Folding", Folding(4))
    norm, drop = caplog.messages
    assert norm.startswith("model.over_arch=mine:ByRank: torch.nn.BatchNorm1d normalizes over one ")
    assert norm.endswith("; use deepfm_dist.model.norm.GlobalBatchNorm")
    assert "torch.nn.Dropout draws" in drop
    assert drop.endswith("; use deepfm_dist.model.dropout.RowDropout")


def _powers(config: ModelConfig, manifest: Manifest) -> list[float]:
    with process_group("cpu") as world:
        return build_model(config, manifest, world, seed=1).model.embedding_arch.power_F.tolist()


def _start(manifest: Manifest) -> tuple[float, float]:
    """The bias of an untrained model, and the largest weight of its over-arch's last layer."""
    with process_group("cpu") as world:
        model = build_model(ModelConfig(init_at_mean=True), manifest, world, seed=1).model
    arch = model.interaction_arch
    return arch.bias.item(), arch.over_arch.output.weight.abs().max().item()


def test_an_untrained_model_predicts_the_mean_label(sample: PreparedDataset) -> None:
    clicks = sample.manifest.data.model_copy(update={"task": "ctr"})
    for positives, expected in ((40, math.log(40.5 / 160.5)), (0, math.log(0.5 / 200.5))):
        train = SplitSpec(rows=200, positives=positives, size_bytes=1600)
        splits = {**sample.manifest.splits, "train": train}
        manifest = sample.manifest.model_copy(update={"data": clicks, "splits": splits})
        assert run_alone(_start, manifest) == pytest.approx((expected, 0.0), abs=1e-6)
    # Each positive of the sample comes with four negatives.
    assert run_alone(_start, sample.manifest)[0] == pytest.approx(math.log(1 / 4), abs=1e-3)


@pytest.mark.parametrize(("pooling", "power"), [("mean", 1.0), ("sqrt", 0.5), ("sum", 0.0)])
def test_fields_are_pooled_as_configured(
    sample: PreparedDataset, pooling: str, power: float
) -> None:
    features = tuple(
        f.model_copy(update={"pooling": pooling}) for f in sample.manifest.data.features
    )
    data = sample.manifest.data.model_copy(update={"features": features})
    manifest = sample.manifest.model_copy(update={"data": data})
    assert run_alone(_powers, ModelConfig(), manifest) == [0.0, 0.0, power]


def _unwrapped(folder: Path, config: Config) -> tuple[bool, bool]:
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        sharded, _ = shard_for_training(config, dataset.manifest, world)
        wrapped = any(isinstance(m, DistributedDataParallel) for m in sharded.modules())
        return wrapped, isinstance(deepfm_of(sharded), DeepFM)


@pytest.mark.parametrize("size", [1, 2])
def test_the_model_is_found_inside_its_wrappers(
    sample: PreparedDataset, sample_config: Config, size: int
) -> None:
    expected = (size > 1, True)  # one rank has nobody to average gradients with
    assert run_ranks(_unwrapped, size, sample.folder, sample_config) == [expected] * size


def _after_another_run(folder: Path, config: Config, training: bool) -> tuple[bool, str]:
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    with process_group("cpu") as world:
        manifest = PreparedDataset(folder).manifest
        (shard_for_training if training else shard_for_inference)(config, manifest, world)
        return torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()


@pytest.mark.parametrize("training", [True, False])
def test_torch_settings_of_one_run_do_not_affect_the_next(
    sample: PreparedDataset, sample_config: Config, training: bool
) -> None:
    left = run_alone(_after_another_run, sample.folder, sample_config, training)
    assert left == (False, "highest")


@pytest.mark.parametrize(
    "state",
    [
        {"step": 3, "vocabulary_hash": "8f2c"},
        {"step": 3, "vocabulary_hash": "8f2c", "config": {"data": {}}},
        {"step": 3, "vocabulary_hash": "8f2c", "config": {"data": {}, "model": 7}},
        {"step": 3, "config": {"data": {}, "model": {}}},
        {"step": "three", "vocabulary_hash": "8f2c", "config": {"data": {}, "model": {}}},
        [],
    ],
)
def test_a_marker_edited_by_hand_is_named(state: object, tmp_path: Path) -> None:
    config = load_config("sample", [f"run.runs_root={tmp_path}"])
    marker = checkpoint.checkpoint_path(config.run_dir, 3) / checkpoint.MARKER
    marker.parent.mkdir(parents=True)
    marker.write_text(json.dumps(state))
    with pytest.raises(RankFailed) as caught:
        run_alone(_opened, config)
    [line] = [x for x in str(caught.value).splitlines() if "CheckpointError: " in x]
    assert f"{marker}: damaged (" in line


def _opened(config: Config) -> None:
    with process_group("cpu") as world:
        open_trained(config, [], world)


class Folder:
    """A run folder with checkpoints that hold nothing but their markers."""

    def __init__(self, sample: PreparedDataset, root: Path) -> None:
        self.manifest, self._root = sample.manifest, root

    def config(self, *overrides: str) -> Config:
        return config_of(f"run.runs_root={self._root}", "trainer.epochs=4", *overrides)

    def save(self, *steps: int, best: int | None = None) -> None:
        config = self.config()
        for step in steps:
            path = checkpoint.checkpoint_path(config.run_dir, step)
            path.mkdir(parents=True)
            state = {
                "step": step,
                **self.manifest.hashes,
                "config": config.model_dump(mode="json"),
                "crc32": {},
                "trainer": asdict(LoopState(step, best_step=best, lifetime=[1.0, 2.0, 3.0, 4.0])),
            }
            (path / checkpoint.MARKER).write_text(json.dumps(state))

    def begin(self, *overrides: str) -> int:
        """Makes the folder ready; returns the step to resume after, 0 for a new run."""
        config = self.config(*overrides)
        start = begin(config, self.manifest, config.trainer.last_step(PER_EPOCH))
        self.is_over = start.is_over
        path = None if start.saved is None else start.saved.path
        assert (path is None) == (start.state.step == 0) == (not start.continues)
        assert path in (None, checkpoint.checkpoint_path(config.run_dir, start.state.step))
        if not start.is_over:
            make_ready(config, start)
        return start.state.step

    @property
    def steps(self) -> list[int]:
        return self.steps_of("sample")

    def steps_of(self, name: str) -> list[int]:
        """Steps of the complete checkpoints of the run of a name."""
        return checkpoint.complete_steps(self._root / name)


@pytest.fixture
def folder(sample: PreparedDataset, tmp_path: Path) -> Folder:
    return Folder(sample, tmp_path)


def test_an_unfinished_run_with_the_same_settings_resumes(folder: Folder) -> None:
    assert folder.begin() == 0
    folder.save(10, 20)
    assert folder.begin() == 20
    elsewhere = ("run.threads=2", "sharding.kind=row_wise", "trainer.log_every_steps=3")
    assert folder.begin(*elsewhere) == 20
    assert folder.begin("checkpoint.resume=always") == 20
    assert folder.begin("data.memory_bytes=100_000_000") == 20
    assert folder.steps == [10, 20]


def test_a_longer_schedule_continues_a_run_and_a_finished_one_is_left_alone(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.save(30, 40)
    assert (folder.begin("trainer.epochs=5"), folder.is_over) == (40, False)
    before = {path: path.stat().st_mtime_ns for path in folder.config().run_dir.rglob("*")}
    for resume in ("auto", "always"):
        assert (folder.begin(f"checkpoint.resume={resume}"), folder.is_over) == (40, True)
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            _set(patch, {**variables(), variable: "1"})
            assert (folder.begin(), folder.is_over) == (40, True)
    caplog.clear()
    assert (folder.begin("trainer.epochs=1", "trainer.monitor=auc"), folder.is_over) == (40, True)
    [said] = [record.getMessage() for record in caplog.records]
    assert f"Run already finished: {folder.config().run_dir}, step 40 (asked for: 10)." in said
    assert said.endswith("Changed without effect: trainer.monitor=auc (was auto)")
    assert {path: path.stat().st_mtime_ns for path in folder.config().run_dir.rglob("*")} == before


def test_a_run_that_stopped_early_continues_with_more_patience(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.save(20)
    marker = checkpoint.checkpoint_path(folder.config().run_dir, 20) / checkpoint.MARKER
    state = json.loads(marker.read_text())
    state["trainer"] |= {"validations_since_best": 3, "monitor": folder.config().monitor}
    marker.write_text(json.dumps(state))
    folder.begin("trainer.epochs=9", "trainer.patience=3")
    assert folder.is_over
    assert "raise trainer.patience=3, or set trainer.patience=null" in caplog.text
    for cure in ("4", "null"):
        assert (folder.begin(f"trainer.patience={cure}"), folder.is_over) == (20, False)


def test_the_decay_of_a_longer_run_may_be_longer(folder: Folder) -> None:
    folder.save(20)
    marker = checkpoint.checkpoint_path(folder.config().run_dir, 20) / checkpoint.MARKER
    state = json.loads(marker.read_text())
    state["config"]["optimizer"]["tables"] |= {"decay": "linear", "decay_steps": 20}
    marker.write_text(json.dumps(state))
    longer = ["trainer.epochs=9", "optimizer.tables.decay=linear"]
    assert folder.begin(*longer, "optimizer.tables.decay_steps=45") == 20
    with pytest.raises(ConfigError, match=r"optimizer\.tables\.lr=1"):
        folder.begin(*longer, "optimizer.tables.decay_steps=45", "optimizer.tables.lr=1")


@pytest.mark.parametrize("resume", ["auto", "always"])
@pytest.mark.parametrize(
    "override",
    [
        "data.memory_bytes=0",
        "run.seed=2",
        "trainer.batch_size=7",
        "model.dropout=0.5",
        "optimizer.dense.lr=1",
        "checkpoint.start_from=elsewhere",
    ],
)
def test_other_settings_under_the_same_name_are_refused_with_cures_that_work(
    folder: Folder, override: str, resume: str
) -> None:
    folder.save(20)
    name, value = override.split("=")
    said = rf"{name}={value}.* \(was .*\); set another run.name, or checkpoint.resume=never, .*\.1$"
    with pytest.raises(ConfigError, match=said):
        folder.begin(override, f"checkpoint.resume={resume}")
    if name != "data.memory_bytes":  # what that changes depends on the data
        with pytest.raises(ConfigError, match=said):
            inherited_settings(folder.config(override, f"checkpoint.resume={resume}"))
    assert folder.steps == [20]
    if name == "checkpoint.start_from":
        return  # there is nothing to start from
    assert folder.begin(override, "run.name=another") == 0
    assert folder.steps == [20]
    for number in (1, 2):
        assert folder.begin(override, "checkpoint.resume=never") == 0
        assert folder.steps == []
        assert folder.steps_of(f"sample.{number}") == [20]
        folder.save(20)


def test_other_data_are_refused_by_their_hash(folder: Folder) -> None:
    folder.save(20)
    saved = folder.manifest.data_hash
    folder.manifest = folder.manifest.model_copy(update={"data_hash": "other"})
    run_dir = folder.config().run_dir
    grown = folder.config("run.name=new", f"checkpoint.start_from={run_dir}")
    assert begin(grown, folder.manifest, 9).saved is not None
    with pytest.raises(ConfigError, match=rf"the data is other \(was {saved}\); set another"):
        folder.begin()
    assert folder.steps == [20]
    assert folder.begin("checkpoint.resume=never") == 0
    assert folder.steps_of("sample.1") == [20]


def test_a_run_that_is_moved_aside_takes_its_results_along_and_leaves_its_study(
    folder: Folder,
) -> None:
    folder.save(20)
    run_dir = folder.config().run_dir
    (run_dir / "config.yaml").write_text(folder.config("data.name=null").to_yaml())
    (run_dir / "report.html").write_text("old")
    (run_dir / "tune").mkdir()
    (run_dir / "tune/study.log").write_text("a study")
    assert folder.begin("checkpoint.resume=never") == 0
    aside = run_dir.with_name("sample.1")
    assert (aside / "report.html").read_text() == "old"
    assert not (run_dir / "report.html").exists()
    assert (run_dir / "tune/study.log").read_text() == "a study"
    moved = load_config(str(aside / "config.yaml"))
    assert (moved.run.name, moved.prepared_dir) == ("sample.1", folder.config().prepared_dir)


@pytest.mark.parametrize("also", [{}, {"data.name": "other"}])
def test_a_run_below_a_folder_keeps_its_dataset_when_it_is_moved_aside(
    tmp_path: Path, also: dict[str, str]
) -> None:
    roots = (f"run.runs_root={tmp_path / 'runs'}", f"run.prepared_root={tmp_path / 'prepared'}")
    config = load_config("sample", ["run.name=shop/monday", *roots])
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    again = with_settings(config, also)
    assert set_aside(again) == again.prepared_dir
    moved = load_config(str(tmp_path / "runs/shop/monday.1/config.yaml"))
    assert moved.run_dir == tmp_path / "runs/shop/monday.1"
    assert moved.prepared_dir == config.prepared_dir


def test_results_without_a_checkpoint_are_moved_aside_too(folder: Folder) -> None:
    run_dir = folder.config().run_dir
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("")  # as a run leaves that ended early
    assert folder.begin() == 0
    assert not run_dir.with_name("sample.1").exists()
    (run_dir / "recommendations.csv").write_text("user,item\n")
    assert folder.begin() == 0
    assert (run_dir.with_name("sample.1") / "recommendations.csv").exists()
    assert not (run_dir / "recommendations.csv").exists()


@pytest.mark.parametrize("lacks", ["checkpoint", "dataset"])
def test_checkpoints_and_datasets_without_data_hashes_are_accepted(
    folder: Folder, lacks: str
) -> None:
    folder.save(20)
    if lacks == "dataset":
        folder.manifest = folder.manifest.model_copy(update={"data_hash": None})
    else:
        marker = checkpoint.checkpoint_path(folder.config().run_dir, 20) / checkpoint.MARKER
        state = json.loads(marker.read_text())
        del state["data_hash"]
        marker.write_text(json.dumps(state))
    assert folder.begin() == 20


def test_settings_that_a_checkpoint_was_made_without_have_their_defaults(
    folder: Folder, sample: PreparedDataset
) -> None:
    folder.save(20)
    config = folder.config()
    marker = checkpoint.checkpoint_path(config.run_dir, 20) / checkpoint.MARKER
    state = json.loads(marker.read_text())
    del state["config"]["model"]["fm_pairs"], state["config"]["trainer"]["accumulate_steps"]
    del state["config"]["data"]["memory_bytes"], state["config"]["evaluate"]
    for feature in state["config"]["data"]["features"]:
        del feature["fill"]
    marker.write_text(json.dumps(state))

    prepared = (f"run.prepared_root={sample.folder.parent}", f"data.name={sample.folder.name}")
    for override in ("model.fm_pairs=all", "model={fm_pairs: all}"):
        actual = find_run(folder.config(*prepared, override), [override])
        assert actual.config.model == config.model
    with pytest.raises(ConfigError, match=r"fm_pairs=across: .* was trained with all; train with"):
        find_run(folder.config("model.fm_pairs=across"), ["model.fm_pairs=across"])

    start = f"checkpoint.start_from={config.run_dir}"
    fresh = folder.config("run.name=new", start)
    start_of_fresh = begin(fresh, folder.manifest, 9).saved
    assert start_of_fresh is not None
    assert start_of_fresh.path == marker.parent
    other = folder.config("run.name=new", start, "model.fm_pairs=across")
    with pytest.raises(ConfigError, match=r"its model has fm_pairs=all, not across; set model.fm"):
        begin(other, folder.manifest, 9)

    with pytest.raises(ConfigError, match=r"model.fm_pairs=across \(was all\); set another run"):
        folder.begin("model.fm_pairs=across", "checkpoint.resume=always")
    assert folder.begin("checkpoint.resume=always") == 20
    assert folder.begin() == 20


def test_a_run_cannot_start_from_its_own_folder(folder: Folder) -> None:
    folder.save(20)
    run_dir = folder.config().run_dir
    of_step = checkpoint.checkpoint_path(run_dir, 20)
    for own in (run_dir, run_dir / ".." / run_dir.name, of_step):
        with pytest.raises(ConfigError, match=r"start_from=.*: this run's own folder.*run\.name"):
            folder.begin("optimizer.tables.lr=0.01", f"checkpoint.start_from={own}")
    assert folder.steps == [20]


def test_an_earlier_checkpoint_can_be_asked_for(folder: Folder) -> None:
    folder.save(10, 20, 30, best=20)
    with pytest.raises(CheckpointError, match="of step 5; available: 10, 20, 30"):
        folder.begin("checkpoint.use=5")
    assert folder.begin() == 30
    (folder.config().run_dir / "metrics.jsonl").write_text("the log of 30 steps\n")
    assert folder.begin("checkpoint.use=best") == 20
    assert (folder.steps, folder.steps_of("sample.1")) == ([10, 20], [30])
    aside = folder.config().run_dir.with_name("sample.1")
    assert (aside / "metrics.jsonl").read_text() == "the log of 30 steps\n"
    assert folder.begin("checkpoint.use=10") == 10
    assert (folder.steps, folder.steps_of("sample.2")) == ([10], [20])


@pytest.mark.parametrize("figure", ["calibration", "majority_rate"])
def test_a_figure_that_does_not_tell_good_from_bad_cannot_be_watched(figure: str) -> None:
    with pytest.raises(ConfigError, match=f"monitor={figure}: not a figure that can be .*log_loss"):
        check_monitor_name(config_of(f"trainer.monitor={figure}"))


def _validation_of_nothing(folder: Path, *overrides: str) -> bool:
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        splits = dataset.manifest.splits
        splits["valid"] = splits["valid"].model_copy(update={"rows": 0})
        config = config_of(*overrides)
        sharded, _ = shard_for_training(config, dataset.manifest, world)
        return make_validate(config, dataset, sharded, world) is None


def test_a_figure_cannot_be_watched_without_validation_rows(sample: PreparedDataset) -> None:
    assert run_alone(_validation_of_nothing, sample.folder)
    for asked in ("monitor=auc", "patience=2", "plateau_factor=0.5", "min_delta=0.1"):
        said = rf"ConfigError: trainer\.{asked}: .*no validation rows"
        with pytest.raises(RankFailed, match=said):
            run_alone(_validation_of_nothing, sample.folder, f"trainer.{asked}")


def test_training_starts_from_a_run_or_from_one_of_its_checkpoints(folder: Folder) -> None:
    folder.save(10, 20, best=20)
    run_dir = folder.config().run_dir
    for start, step in ((run_dir, 20), (checkpoint.checkpoint_path(run_dir, 10), 10)):
        config = folder.config("run.name=new", f"checkpoint.start_from={start}")
        actual = begin(config, folder.manifest, config.trainer.last_step(PER_EPOCH))
        assert actual.saved is not None
        assert actual.saved.path == checkpoint.checkpoint_path(run_dir, step)
        assert (actual.state.step, actual.continues) == (0, False)


def _set(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, text in environment.items():
        patch.setenv(name, text)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize(
    "override",
    ["checkpoint.use=10", "checkpoint.use=5", "checkpoint.use=best", "checkpoint.resume=never"],
)
def test_a_restart_resumes_from_the_latest_checkpoint(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, override: str, variable: str
) -> None:
    folder.save(10, 20, 30, best=20)
    _set(monkeypatch, {**variables(), variable: "1"})
    assert folder.begin(override) == 30
    assert folder.steps == [10, 20, 30]
    if override == "checkpoint.resume=never":  # the first start ended before it moved that run
        assert folder.begin(override, "run.seed=2") == 0
        assert folder.steps_of("sample.1") == [10, 20, 30]


def test_unknown_figures_cannot_be_monitored() -> None:
    with pytest.raises(ConfigError, match=r"monitor=acu: not a figure .*; available: auc"):
        check_monitor_name(config_of("trainer.monitor=acu"))


def _build(folder: Path, override: str) -> None:
    config = config_of(override)
    with process_group("cpu") as world:
        build_model(config.model, Manifest.read(folder), world, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # The sample's tables have 701 + 401 + 19 rows, of embedding_dim + 1 floats.
        ("model.embedding_dim=1000000000000", r"1,121 rows of tables take 4,484,000\.0 GB of "),
        # 3 fields of 10 numbers each: 4 B * (30 * 200,000 + 200,000 ** 2 + 200,000)
        (
            "model={embedding_dim: 10, over_arch_layer_sizes: [200000, 200000]}",
            r"the weights take 160\.0 GB of ",
        ),
    ],
)
def test_weights_that_exceed_the_memory_are_refused_before_they_are_allocated(
    sample: PreparedDataset, override: str, message: str
) -> None:
    with pytest.raises(RankFailed, match=f"ConfigError: model.*{message}"):
        run_alone(_build, sample.folder, override)


def test_compiling_without_a_compiler_is_one_line(
    sample: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RankFailed, match=r"EnvironmentProblem: .*no-such-compiler is not found"):
        run_alone(_shard, sample.folder, "trainer.compile=true")


def test_by_default_what_is_above_the_tables_is_compiled_on_cuda_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    log, cuda = logging.getLogger("deepfm_dist"), torch.device("cuda")
    rows, users = config_of("trainer.loss=bce"), config_of("trainer.loss=softmax")
    assert not build._is_compiled(rows, torch.device("cpu"), log)
    monkeypatch.setenv("CC", sys.executable)
    assert build._is_compiled(rows, cuda, log)
    assert not build._is_compiled(users, cuda, log)
    monkeypatch.setenv("CC", "no-such-cc")
    assert not build._is_compiled(rows, cuda, log)
    said = [record.getMessage() for record in caplog.records]
    lack = "trainer.compile: auto is off, for lack of a C compiler (no-such-cc)"
    assert said == ["trainer.compile: auto is on", "trainer.compile: auto is off", lack]


def _shard(folder: Path, override: str) -> None:
    with process_group("cpu") as world:
        shard_for_training(config_of(override), Manifest.read(folder), world)
