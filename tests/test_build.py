"""Which checkpoint a run goes on from."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from deepfm_dist.build import begin, schedule_of
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.training.trainer import LoopState
from tests.test_distributed import config_of

PER_EPOCH = 10


class Folder:
    """A run folder with checkpoints that hold nothing but their markers."""

    def __init__(self, sample: PreparedDataset, root: Path) -> None:
        self._sample, self._root = sample, root

    def config(self, *overrides: str) -> Config:
        return config_of(f"run.runs_root={self._root}", "trainer.epochs=4", *overrides)

    def save(self, *steps: int, best: int | None = None) -> None:
        config = self.config()
        for step in steps:
            path = checkpoint.checkpoint_path(config.run_dir, step)
            path.mkdir(parents=True)
            state = {
                "step": step,
                "vocabulary_hash": self._sample.manifest.vocabulary_hash,
                "config": config.model_dump(mode="json"),
                "crc32": {},
                "trainer": asdict(LoopState(step, best_step=best, lifetime=[1.0, 2.0, 3.0, 4.0])),
            }
            (path / checkpoint.MARKER).write_text(json.dumps(state))

    def begin(self, *overrides: str) -> int:
        """The step after which training goes on; 0: anew."""
        config = self.config(*overrides)
        schedule = schedule_of(config)
        last = schedule.last_step(PER_EPOCH)
        path, state = begin(config, self._sample.manifest, schedule, last)
        assert (path is None) == (state.step == 0)
        assert path is None or path == checkpoint.checkpoint_path(config.run_dir, state.step)
        return state.step

    @property
    def steps(self) -> list[int]:
        return checkpoint.complete_steps(self.config().run_dir)


@pytest.fixture
def folder(sample: PreparedDataset, tmp_path: Path) -> Folder:
    return Folder(sample, tmp_path)


def test_an_unfinished_run_of_the_same_settings_goes_on(folder: Folder) -> None:
    assert folder.begin() == 0
    folder.save(10, 20)
    assert folder.begin() == 20
    elsewhere = ("run.threads=2", "sharding.kind=row_wise", "trainer.log_every_steps=3")
    assert folder.begin(*elsewhere) == 20
    assert folder.begin("checkpoint.resume=always") == 20
    assert folder.steps == [10, 20]


def test_a_longer_schedule_goes_on_and_a_finished_run_begins_anew(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(30, 40)
    assert folder.begin("trainer.epochs=5") == 40
    assert folder.begin("checkpoint.resume=always") == 40
    for variable in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            assert folder.begin() == 40
    assert folder.begin() == 0
    assert folder.steps == []


@pytest.mark.parametrize(
    "override", ["run.seed=2", "trainer.batch_size=7", "model.dropout=0.5", "optimizer.dense.lr=1"]
)
def test_other_settings_begin_anew_or_are_refused_by_name(
    folder: Folder, caplog: pytest.LogCaptureFixture, override: str
) -> None:
    folder.save(20)
    name, value = override.split("=")
    with pytest.raises(ConfigError, match=rf"step_00000020 was .*: {name}={value}.*, not "):
        folder.begin(override, "checkpoint.resume=always")
    assert folder.steps == [20]
    with caplog.at_level(logging.INFO, "deepfm_dist"):
        assert folder.begin(override) == 0
    assert f"is of other settings ({name}={value}" in caplog.text
    assert folder.steps == []


def test_never_begins_anew(folder: Folder) -> None:
    folder.save(20)
    assert folder.begin("checkpoint.resume=never") == 0
    assert folder.steps == []


def test_an_earlier_checkpoint_can_be_asked_for(folder: Folder) -> None:
    folder.save(10, 20, 30, best=20)
    with pytest.raises(CheckpointError, match="of step 5; there are: 10, 20, 30"):
        folder.begin("checkpoint.use=5")
    assert folder.begin() == 30
    assert folder.begin("checkpoint.use=best") == 20
    assert folder.steps == [10, 20]
    assert folder.begin("checkpoint.use=10") == 10
    assert folder.steps == [10]


def test_a_figure_that_is_none_cannot_be_watched(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"monitor=acu: no validation figure; there are: auc"):
        folder.begin("trainer.monitor=acu")
