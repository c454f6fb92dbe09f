"""Repeated commands keep a run's dataset and report."""

import html
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deepfm_dist import evaluate, prepare, train
from deepfm_dist.config import load_config
from deepfm_dist.jobs.evaluate import _changes, _settings_shown
from tests.data.small_datasets import config_of, write_input
from tests.ranks import run_in_fork

FIELDS = "[{name: user, entity: user}, {name: item, entity: item}]"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run ``run`` on a dataset ``run``, and its configuration."""
    home = tmp_path_factory.mktemp("folder")
    write_input(home)
    short = "trainer={max_steps: 2, validate_every_epochs: 0, monitor: null}"
    model = "model={embedding_dim: 4, over_arch_layer_sizes: [4]}"
    names = ["run.name=run", "data.name=run", "data.history={}", "run.loggers=[]"]
    config = config_of(home, FIELDS, model, short, *names)
    (home / "c.yaml").write_text(config.to_yaml())
    run_in_fork(_typed, train.main, home)
    return home


def _typed(command: Any, home: Path, *more: str) -> None:
    assert command(["--quiet", "--config", str(home / "c.yaml"), *more]) == 0


@pytest.mark.parametrize("text", ['{"format": 3}', "{"])
def test_a_dataset_of_runs_that_cannot_be_read_is_kept(
    home: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    config = yaml.safe_load((home / "c.yaml").read_text())
    prepared = Path(config["run"]["prepared_root"]) / "run"
    manifest = prepared / "manifest.json"
    changed = {**json.loads(manifest.read_text()), "format": 3}
    manifest.write_text(json.dumps(changed) if "format" in text else text)
    kept = {p.name for p in prepared.parent.iterdir()}
    with caplog.at_level(logging.WARNING):
        _typed(prepare.main, home)
    [aside] = {p.name for p in prepared.parent.iterdir()} - kept
    assert re.fullmatch(r"run\.\d", aside)
    assert "manifest" in caplog.text and aside in caplog.text and "was trained on" in caplog.text
    assert (prepared.with_name(aside) / "train").is_dir()
    run_in_fork(_typed, evaluate.main, home)


def test_a_dataset_that_no_run_needs_is_replaced(home: Path) -> None:
    other = f"run.runs_root={home / 'none'}"
    prepared = Path(yaml.safe_load((home / "c.yaml").read_text())["run"]["prepared_root"])
    (prepared / "run/manifest.json").write_text("{")
    before = {*prepared.iterdir()}
    _typed(prepare.main, home, other)
    assert {*prepared.iterdir()} == before


def test_the_report_shows_the_settings_of_the_run_and_what_evaluate_had_instead(
    home: Path,
) -> None:
    run_in_fork(_typed, evaluate.main, home, "evaluate.k=[3]", "trainer.epochs=99")
    run = Path(yaml.safe_load((home / "c.yaml").read_text())["run"]["runs_root"]) / "run"
    page = html.unescape((run / "report.html").read_text())
    settings, _, instead = page.partition("# In place of these, this evaluation has:\n")
    assert "max_steps: 2\n" in settings and "epochs: 99" not in settings
    shown = yaml.safe_load(instead.partition("<")[0])
    assert shown == {"evaluate": {"k": [3]}}
    # A model that was computed after the loop has a name of its own, which changes nothing.
    assert _changes({"name": "run/refit", "k": [10]}, {"name": "run", "k": [3]}) == {"k": [3]}


def test_the_report_of_a_folded_model_shows_the_settings_that_it_was_trained_with() -> None:
    chosen, wide = (
        load_config("sample", [f"model={{embedding_dim: {dim}, over_arch_layer_sizes: {sizes}}}"])
        for dim, sizes in ((8, [64, 64]), (40, [320, 320]))
    )
    folded: Any = SimpleNamespace(config=wide, settings=wide.model_dump(mode="json"))
    text = _settings_shown(folded, {"trained_config": chosen.model_dump(mode="json")})
    settings, _, differing = text.partition("# This model combines others")
    layers = {"embedding_dim": 8, "over_arch_layer_sizes": [64, 64]}
    assert layers.items() <= yaml.safe_load(settings)["model"].items()
    wider = {"embedding_dim": 40, "over_arch_layer_sizes": [320, 320]}
    assert yaml.safe_load(f"#{differing}") == {"model": wider}
    of_loop = _settings_shown(folded, {})
    assert wider.items() <= yaml.safe_load(of_loop)["model"].items()
