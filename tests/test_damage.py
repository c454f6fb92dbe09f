"""Files of a run and of a dataset that are damaged: read on and say so, or one line."""

import argparse
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from deepfm_dist import cli, evaluate, recommend, train
from deepfm_dist.distributed.checkpoint import find_checkpoint, read_state
from deepfm_dist.errors import CheckpointError, ConfigError
from deepfm_dist.interop.safetensors import FORMAT
from deepfm_dist.jobs.export import is_export_of
from deepfm_dist.report.page import _plan
from tests.ranks import run_alone

SETTINGS = ("trainer.max_steps=2", "run.loggers=[]", "model.over_arch_layer_sizes=[4]")
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "not UTF-8": lambda data: data[:20] + b"\xff" + data[20:],
    "zeros": lambda data: bytes(len(data)),
    "a list": lambda data: b"[]",
    "text": lambda data: b'"x"',
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run; not to be changed."""
    home = tmp_path_factory.mktemp("trained")
    where = [f"run.runs_root={home}/runs", f"run.prepared_root={home}/prepared"]
    assert run_alone(train.main, ["--quiet", *SETTINGS, *where]) == 0
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_configuration_is_read_from_the_checkpoint(
    damage: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = home / "runs/sample"
    asked = argparse.Namespace(run=str(run), config=None, overrides=["recommend.k=7"])
    whole = cli._config_of(asked)
    (run / "config.yaml").write_bytes(DAMAGE[damage]((run / "config.yaml").read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cli._config_of(asked).model == whole.model
    assert whole.recommend.k == cli._config_of(asked).recommend.k == 7
    assert f"the settings of {find_checkpoint(run)} are used" in caplog.text
    asked.overrides.append("recommend.q=7")
    with pytest.raises(ConfigError, match=r"recommend\.q|config\.yaml: "):
        cli._config_of(asked)
    asked.overrides.pop()
    shutil.rmtree(run / "checkpoints")
    if damage == "half":  # may be written by hand
        return
    with pytest.raises(ConfigError, match=r"config\.yaml: "):
        cli._config_of(asked)


def test_a_run_without_its_configuration_is_read_from_the_checkpoint(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = home / "runs/sample"
    asked = argparse.Namespace(run=str(run), config=None, overrides=["recommend.k=7"])
    whole = cli._config_of(asked)
    (run / "config.yaml").unlink()
    assert cli._config_of(asked) == whole
    assert f"config.yaml: missing; the settings of {find_checkpoint(run)} are used" in caplog.text
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"--run .*: no run; .*deepfm_dist\.train makes it"):
        cli._config_of(asked)


def test_configurations_of_versions_with_fewer_sections_are_accepted(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = home / "runs/sample"
    asked = argparse.Namespace(run=str(run), config=None, overrides=[])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    del settings["tune"]
    settings["recommend"]["k"] = 7
    (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert cli._config_of(asked).recommend.k == 10  # the checkpoint knows the section: it was cut
    assert "the section tune is missing" in caplog.text
    caplog.clear()
    marker = find_checkpoint(run) / "state.json"
    state = json.loads(marker.read_text())
    del state["config"]["tune"], state["crc32_of_this"]  # which earlier versions did not write
    marker.write_text(json.dumps(state))
    assert cli._config_of(asked).recommend.k == 7
    assert caplog.text == ""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_plan_is_left_out_of_the_report(
    damage: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = (trained / "runs/sample/plan.json").read_bytes()
    path = tmp_path / "plan.json"
    assert _plan(path) is None and caplog.text == ""
    path.write_bytes(whole)
    plan = _plan(path)
    assert plan is not None and (plan.ranks, plan.device) == (1, "cpu")
    assert sorted(table["rows"] for table in plan.tables) == [19, 401, 701]
    path.write_bytes(DAMAGE[damage](whole))
    assert _plan(path) is None
    assert f"{path}: damaged; the report leaves the sharding plan out" in caplog.text


@pytest.mark.parametrize(
    ("file", "command", "message"),
    [
        ("runs/sample/checkpoints/*/state.json", evaluate.main, "CheckpointError: .*damaged"),
        ("runs/sample/checkpoints/*/.metadata", recommend.main, "CheckpointError: .*damaged"),
        ("prepared/sample/manifest.json", evaluate.main, "DataError: .*manifest.json"),
    ],
)
def test_what_cannot_be_read_without_is_one_line(
    file: str, command: Any, message: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    [path] = home.glob(file)
    whole = path.read_bytes()
    for damage in ("empty", "not UTF-8", "a list"):
        path.write_bytes(DAMAGE[damage](whole))
        where = [f"run.prepared_root={home}/prepared"]
        assert run_alone(command, ["--quiet", "--run", f"{home}/runs/sample", *where]) == 2
        [line] = capfd.readouterr().err.splitlines()[-1:]
        assert re.match(message, line), line


def test_a_damaged_part_of_a_run_names_what_is_left_and_how_it_is_made_again(
    tmp_path: Path,
) -> None:
    part = tmp_path / "run/refit"
    (part / "checkpoints/step_00000002").mkdir(parents=True)
    (part / "checkpoints/step_00000002/state.json").write_text("{")
    cure = (
        f"checkpoint.use=latest, or delete {part}, and python -m deepfm_dist.train makes it again"
    )
    with pytest.raises(CheckpointError, match=re.escape(cure)):
        read_state(part / "checkpoints/step_00000002")


def test_a_damaged_export_is_none(tmp_path: Path) -> None:
    run = SimpleNamespace(identity={"step": 2})
    config = json.dumps({"format": FORMAT, "step": 2, "model": {}}).encode()
    for damage in DAMAGE.values():
        (tmp_path / "config.json").write_bytes(config)
        assert is_export_of(run, tmp_path)
        (tmp_path / "config.json").write_bytes(damage(config))
        assert not is_export_of(run, tmp_path)
