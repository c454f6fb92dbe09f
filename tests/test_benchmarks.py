"""The page of benchmarks is made of what the scripts say."""

import argparse
import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from tests.ranks import run_alone

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_suite", BENCHMARKS / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # as Python does for a script
        spec.loader.exec_module(module)
    return module


REPORTS: dict[str, dict[str, Any]] = {
    "training": {"rows_per_s": 300, "plain_rows_per_s": 200, "rival_rows_per_s": 150},
    "catalogue": {
        "pairs_per_s": 45e6, "naive_pairs_per_s": 3e6, "torch_pairs_per_s": 9e6,
        "limit_pairs_per_s": 60e6, "recbole_pairs_per_s": 1.5e6,
    },
    "negatives": {"seconds_50": 0.05, "seconds_200": 0.2, "notebook_seconds_50": 300},
    "prepare": {"rows": 1000, "seconds": 0.5, "peak_gib": 0.75},
    "reading": {
        "reading_rows_per_s": 1000, "training_rows_per_s": 100, "both_rows_per_s": 90,
        "both_ahead_rows_per_s": 96,
    },
    "recommend": {
        "ranks": {
            "1": {"pairs_per_s": 50e6, "times_the_first": 1.0, "beside_imports_gib": 0.3},
            "2": {"pairs_per_s": 95e6, "times_the_first": 1.9, "beside_imports_gib": 0.3},
        },
    },
    "serving": {
        "shape_items": 6807, "requests_per_s": 1200, "cpu_ms": 0.8, "rate": 500, "p50_ms": 1.5,
        "p99_ms": 4,
    },
}  # fmt: skip


def test_the_rows_of_the_quality_tables_are_configurations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEEPFM_DATA", "/somewhere")
    tables = yaml.safe_load((BENCHMARKS / "quality.yaml").read_text())
    rows = [row for table in tables for row in table["rows"]]
    assert len(rows) > 12
    monkeypatch.syspath_prepend(BENCHMARKS)
    logs = importlib.import_module("logs")
    of_tests = {
        "clicks": logs.Clicks(50, (3, 40), 1),
        "new": logs.NewItems(40),
        "steps": logs.Sequences(8, 500),
        "stars": logs.Ratings(5, 90, 110),
    }
    kinds = {name: type(log) for name, log in logs.LOGS.items()}
    monkeypatch.setattr(logs, "LOGS", of_tests)
    written = {type(log): str(logs.write(n, tmp_path / n)) for n, log in of_tests.items()}
    for row in rows:
        row["config"] = written.get(kinds.get(row["config"]), row["config"])
        load_config(row["config"], [*row.get("overrides", []), *row.get("evaluate", [])])
        load_config(row["config"], row.get("trained_on", []))
        assert row["seeds"]


def test_every_result_is_next_to_its_reference(suite: ModuleType) -> None:
    commands = [b for group in suite.SUITE.values() for b in group]
    text = suite.page({b.command: REPORTS[b.script] for b in commands}, "a machine")
    for line in (
        "| rows/s, 30-20-10, batch 8,192 | 300 | fastest rival | 150 | 2.00 x |",
        "| rows/s, 30-20-10, batch 8,192 | 300 | plain PyTorch | 200 | 1.50 x |",
        "| M pairs/s, dim 10, 30-20-10 | 45.00 | peak of sgemm | 60.00 | 75% of it |",
        "| M pairs/s, dim 10, 30-20-10 | 45.00 | RecBole's full sort | 1.50 | 30.0 x |",
        "| s, 50 each for 31,360 users | 0.05 | the notebook's loop | 300 | 6,000 x as fast |",
        "| rows/s, 1,000 rows prepared | 2,000 |  |  |  |",
        "| rows/s read | 1,000 | rows/s trained | 100 | 10.0% of a step |",
        "| rows/s, batches prepared on another core | 96 | rows/s trained | 100 | 96% of it |",
        "| M pairs/s, recommend, 2 ranks | 95.0 | one rank |  | 1.90 x |",
        "| GiB per rank without imports, recommend, 2 ranks | 0.30 |  |  |  |",
        "| ms at 500 requests/s, 99th percentile, 6,807 items | 4 | target | 10 | 40% of it |",
    ):
        assert line in text
    for benchmark in commands:
        assert f"python benchmarks/{benchmark.command}\n" in text
    some = suite.page({"negatives.py": None}, "a machine")
    assert "`python benchmarks/negatives.py` failed." in some
    assert "## Training" not in some


def test_the_suite_names_scripts_and_options_that_exist(suite: ModuleType) -> None:
    for group in suite.SUITE.values():
        for benchmark in group:
            script, *arguments = benchmark.command.split()
            tree = ast.parse((BENCHMARKS / script).read_text())
            known = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
            assert {a for a in arguments if a.startswith("--")} <= known
            # Every field that the page reads is one that the script writes.
            assert REPORTS[benchmark.script].keys() <= known


class Typed(Exception):
    """In the place of a command that a script would run: its arguments."""


@pytest.mark.parametrize("script", ["training", "serving", "quality", "first_order_tables"])
def test_no_measurement_continues_an_earlier_one_or_stops_at_its_run(
    script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module(script)
    args = argparse.Namespace(
        steps=5, batch_size=8, layers=[3], device="cpu", threads=1, settings=[]
    )

    def typed(command: list[str], **_: Any) -> None:
        if "deepfm_dist.prepare" not in command:
            raise Typed(*command)

    monkeypatch.setattr(subprocess, "run", typed)
    monkeypatch.setattr(sys, "argv", ["script", "--seeds", "1"])
    if script == "first_order_tables":
        monkeypatch.setattr(module.train, "main", lambda arguments: typed(arguments))
    measure = {
        "training": lambda: module.ours(tmp_path, args, 1),
        "serving": lambda: module.trained("sample", tmp_path),
        "quality": lambda: module.measured({"config": "sample", "name": "x"}, 1, tmp_path),
        "first_order_tables": lambda: module.main(),
    }[script]
    commands = []
    for _ in range(2):
        with pytest.raises(Typed) as actual:
            measure()
        commands.append(actual.value.args)
    places = {a for command in commands for a in command if a.startswith("run.runs_root=")}
    assert "checkpoint.resume=never" in commands[0] or len(places) == 2


def figures_of_steps(prepared: Path) -> dict[str, dict[str, float]]:
    training = importlib.import_module("training")
    args = argparse.Namespace(
        steps=10, batch_size=64, layers=[3], device="cpu", threads=1, settings=[]
    )
    config = load_config("sample")
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 9, (640, 3)), rng.integers(0, 2, 640).astype(np.float32)
    data = argparse.Namespace(sizes=[9, 9, 9])
    training.configured = lambda *_: (config, prepared)
    return training.steps_compared(Path(), data, drawn, args)


def test_steps_are_measured_next_to_torchrecs_own(
    monkeypatch: pytest.MonkeyPatch, sample: PreparedDataset
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    actual = run_alone(figures_of_steps, sample.folder)
    assert actual.keys() == {"ours", "torchrec_pipeline"}
    for figures in actual.values():
        assert 0 < figures["host_ms"] <= figures["ms"] + 0.1
        assert 0 < figures["busy"] <= 1
        assert figures["rows_per_s"] == pytest.approx(64e3 / figures["ms"], rel=0.01)
