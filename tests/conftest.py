"""Fixtures: the sample prepared once, real data where DEEPFM_DATA names its folder."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # before torch, which imports triton

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from deepfm_dist.config import NAMED, Config, load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from tests import fork_server


def _in_forks_only(join: Callable[..., None]) -> Callable[..., None]:
    """Refuses to join a process group in the process that forks ranks.

    Gloo's threads do not survive a fork. A rank that collects the parent's group as garbage waits
    for them for ever.
    """
    parent = os.getpid()

    def joined(backend: str, *args: Any, **kwargs: Any) -> None:
        assert os.getpid() != parent or backend == "fake", "call it by tests.ranks.run_in_fork"
        join(backend, *args, **kwargs)

    return joined


def pytest_configure() -> None:
    """Applies to pytest's own process; spawned ranks import this module too and must join."""
    dist.init_process_group = _in_forks_only(dist.init_process_group)


NAMED.insert(0, Path(__file__).parent / "configs")  # their sample leaves nothing to the recipe
torch.set_num_threads(1)  # ranks are forked: OpenMP's thread pool must not exist
settings.register_profile("unhurried", deadline=None)  # numba compiles at the first example
settings.load_profile("unhurried")
HISTORY = (
    """data.features=[
    {name: user, entity: user},
    {name: seen, entity: user, history: item, pooling: sqrt, table: item},
    {name: seen_genre, entity: user, history: genre},
    {name: item, entity: item},
    {name: genre, entity: item, file: genres.tsv}]""",
    "data.history={dropout: 0.5, max_length: 20}",
)
"""Overrides of the sample: histories of the items themselves, in their table, and of genres."""
for noisy in ("torchrec", "fbgemm_gpu"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Works in an empty folder: what lies in the clone, such as runs/, must not matter."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands set the level of our log."""
    log = logging.getLogger("deepfm_dist")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables with which `python` and `torchrun` start without importing; see `fork_server`."""
    with fork_server.start(tmp_path_factory.mktemp("forked")) as variables:
        yield variables


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
def with_history(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """The sample with fields of the users' histories, prepared once; not to be changed."""
    config = load_config("sample", HISTORY)
    folder = tmp_path_factory.mktemp("prepared") / "with_history"
    prepare(config.data, config.data_root, folder, config.run.seed)
    return PreparedDataset(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip."""
    folder = os.environ.get("DEEPFM_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DEEPFM_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine, driven by Playwright; or a skip."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser to look at pages with (none of {', '.join(names)})")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Containers have no sandbox to offer; what is shown is our own pages.
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
