"""Fixtures: the sample prepared once, real data where DEEPFM_DATA names its folder."""

import logging
import os
import shutil
from pathlib import Path

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch, which imports triton

import pytest
import torch
from hypothesis import settings

from deepfm_dist.config import Config, load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.encode import prepare

torch.set_num_threads(1)  # ranks are forked: OpenMP's thread pool must not exist
settings.register_profile("unhurried", deadline=None)  # numba compiles at the first example
settings.load_profile("unhurried")
for noisy in ("torchrec", "fbgemm_gpu"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def sample_config() -> Config:
    """The bundled sample's configuration."""
    return load_config("sample")


@pytest.fixture(scope="session")
def sample(sample_config: Config, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """The bundled sample, prepared once; not to be changed."""
    folder = tmp_path_factory.mktemp("prepared") / "sample"
    prepare(sample_config.data, sample_config.data_root, folder, sample_config.run.seed)
    return PreparedDataset(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip."""
    folder = os.environ.get("DEEPFM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DEEPFM_DATA names no folder of real data")
    return Path(folder)
