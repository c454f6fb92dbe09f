"""The script for the first GPU, rehearsed on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "first_light.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("first_light_in_test", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_a_failing_check_is_a_line_and_stops_no_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: str) -> None:
        assert device == "cuda", f"on {device}"

    checks = {
        "wrong": script.Check(wrong, 9, "the other device"),
        "right": script.Check(lambda device: 3, 9, "3"),
        "scaling": script.Check(lambda device: 4, 9, "4", gpus=3),
    }
    monkeypatch.setattr(script, "CHECKS", checks)

    def in_this_process(name: str, device: str, limit_s: float, home: str) -> dict[str, Any]:
        assert limit_s == 9
        return script._outcome(name, device) | {"seconds": 0.1}

    monkeypatch.setattr(script, "_run", in_this_process)
    assert script.main(["--device", "cpu"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("failed  wrong: AssertionError: on cpu")
    assert "(test_first_light.py:" in lines[0]
    assert lines[1] == "        expected: the other device"
    assert lines[2] == "found   right: 3"
    assert lines[4] == "skipped scaling: 2 GPUs"
    report = json.loads(last)["checks"]
    assert report["right"] == {"found": 3, "seconds": 0.1, "expected": "3"}
    assert script.main(["--device", "cpu", "--only", "right"]) == 0


def test_a_check_that_hangs_or_dies_is_given_up(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "fake.py"
    monkeypatch.setattr(script, "__file__", str(fake))
    fake.write_text("import time; time.sleep(60)")
    begun = time.monotonic()
    outcome = script._run("any", "cpu", 1, str(tmp_path))
    assert outcome["failed"] == "not done in 1 seconds"
    assert time.monotonic() - begun < 20
    fake.write_text("import os; os.abort()")
    assert script._run("any", "cpu", 20, str(tmp_path))["failed"].startswith("exit code -6")


@pytest.mark.slow  # a process for each check
def test_all_checks_can_be_rehearsed_on_a_cpu(forked: dict[str, str]) -> None:
    done = subprocess.run(
        [forked["PYTHON_EXEC"], str(SCRIPT), "--device", "cpu"],
        env=os.environ | forked,
        cwd=SCRIPT.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout.splitlines()[-1])["checks"]
    assert len(checks) >= 11
    assert {name for name, outcome in checks.items() if "found" not in outcome} == set()
