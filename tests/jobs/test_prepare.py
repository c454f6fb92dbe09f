"""Preparation under torchrun: rank 0 prepares with the threads of its machine."""

import logging
from pathlib import Path
from typing import Any

import pytest

from deepfm_dist import prepare
from deepfm_dist.config import Config, load_config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.jobs import train
from deepfm_dist.launcher import read_launch
from tests.ranks import run_ranks, variables


def test_rank_0_prepares_and_the_others_have_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [f"run.prepared_root={tmp_path}"]
    for rank in (1, 0):
        for name, value in variables(rank, 2).items():
            monkeypatch.setenv(name, value)
        with caplog.at_level(logging.WARNING, "deepfm_dist"):
            assert prepare.main(arguments) == 0
        assert (tmp_path / "sample").exists() == (rank == 0)
    assert "the other processes that torchrun started (1) have nothing to do" in caplog.text


class _Seen(Exception):
    """Ends the training once the dataset is opened."""


def _prepared_by_train(config: Config, marks: Path) -> str | None:
    """The hash of the dataset that a rank would train on; ranks that prepare leave a mark."""

    def prepare_locked(config: Config) -> Manifest:
        (marks / f"rank-{read_launch().rank}").touch()
        return real(config)

    def open_dataset(config: Config, *_: Any) -> None:
        raise _Seen(Manifest.read(config.prepared_dir).data_hash)

    real = train.prepare_locked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "prepare_locked", prepare_locked)
        patch.setattr(train, "open_dataset", open_dataset)
        with process_group(*config.run.process_group) as world:
            with pytest.raises(_Seen) as actual:
                train.train_on(config, world)
            world.barrier()
    return str(actual.value)


def test_training_on_several_ranks_prepares_once_and_every_rank_sees_it(tmp_path: Path) -> None:
    places = [f"run.prepared_root={tmp_path}", f"run.runs_root={tmp_path}"]
    marks = tmp_path / "marks"
    marks.mkdir()
    hashes = run_ranks(_prepared_by_train, 2, load_config("sample", places), marks)
    assert [path.name for path in marks.iterdir()] == ["rank-0"]
    assert hashes == [Manifest.read(tmp_path / "sample").data_hash] * 2
