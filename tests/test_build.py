"""Where configuration, manifest and checkpoint meet."""

import json
from pathlib import Path

import pytest
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepfm_dist.build import build_model, deepfm_of, open_trained, shard_for_training
from deepfm_dist.config import Config, ModelConfig, load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.optimizers import table_optimizer
from deepfm_dist.distributed.world import world
from deepfm_dist.model.deepfm import DeepFM
from tests.ranks import RankFailed, run_alone, run_ranks


class Raises(nn.Module):
    def __init__(self, in_features: int) -> None:
        raise RuntimeError("no such\nluck")


class Picky(nn.Linear):
    """One logit a row, but as a column: broadcast with the rest it would be B logits a row."""

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features, 1)


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
        run_alone(_mean_pooled, ModelConfig.model_validate(options), sample.manifest)


def _mean_pooled(config: ModelConfig, manifest: Manifest) -> list[str]:
    with world("cpu") as ranks:
        return build_model(config, manifest, ranks, seed=1).model.embedding_arch.mean_pooled


@pytest.mark.parametrize(("pooling", "expected"), [("mean", ["genre"]), ("sum", [])])
def test_fields_are_pooled_as_configured(
    sample: PreparedDataset, pooling: str, expected: list[str]
) -> None:
    features = tuple(
        f.model_copy(update={"pooling": pooling}) for f in sample.manifest.data.features
    )
    data = sample.manifest.data.model_copy(update={"features": features})
    manifest = sample.manifest.model_copy(update={"data": data})
    assert run_alone(_mean_pooled, ModelConfig(), manifest) == expected


def _unwrapped(folder: Path, config: Config) -> tuple[bool, bool]:
    with world("cpu") as ranks:
        dataset = PreparedDataset(folder)
        optimizer = table_optimizer("sgd", 0.1, 1e-8, ranks.device)
        sharded = shard_for_training(config, dataset.manifest, ranks, optimizer)
        wrapped = any(isinstance(m, DistributedDataParallel) for m in sharded.modules())
        return wrapped, isinstance(deepfm_of(sharded), DeepFM)


@pytest.mark.parametrize("size", [1, 2])
def test_the_model_is_found_inside_its_wrappers(
    sample: PreparedDataset, sample_config: Config, size: int
) -> None:
    assert run_ranks(_unwrapped, size, sample.folder, sample_config) == [(True, True)] * size


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
    with world("cpu") as ranks:
        open_trained(config, [], ranks)
