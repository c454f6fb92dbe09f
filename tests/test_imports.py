"""Imports go downwards, as CONTRIBUTING says."""

import ast
import subprocess
import sys
from pathlib import Path

import deepfm_dist

PACKAGE = Path(deepfm_dist.__file__).parent
LEVELS = {
    "errors": 0, "messages": 0, "section": 0, "compiled": 0, "terminal": 0, "events": 0,
    "launcher": 1, "storage": 1, "seeding": 1, "typed_yaml": 1, "log": 2, "lock": 2,
    "environment": 2, "model": 3, "data": 4, "distributed": 4, "training": 5, "ranking": 5,
    "interop": 6,
}  # fmt: skip
"""Everything else (commands, config, build, report, cli) is on top."""
TOP = 7


COMMANDS = {
    "prepare", "train", "evaluate", "recommend", "similar", "predict", "doctor", "demo",
    "export", "import_weights", "combine", "plan", "serve", "tune",
}  # fmt: skip
EDGES = COMMANDS | {"report", "build", "runs", "api"}
"""Where tables are made for people."""


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "_bundled" not in p.parts)


def test_no_module_imports_from_above_or_beside() -> None:
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for name in imports_of(path):
            if not name.startswith("deepfm_dist."):
                continue
            target = name.split(".")[1]
            if target == room or target.startswith("__"):
                continue
            if LEVELS.get(room, TOP) < LEVELS.get(target, TOP) or (
                room in LEVELS and LEVELS[room] == LEVELS.get(target, TOP)
            ):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_one_process_prepares_without_torch() -> None:
    # It takes longer to load than many datasets to prepare, and 0.3 GiB.
    code = (
        "import sys, deepfm_dist.prepare, deepfm_dist.data.encode; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_special_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for name in imports_of(path):
            if name.startswith("torchrec.distributed") and room != "distributed":
                wrong.append(f"{path}: {name}")
            if name.startswith("torch.distributed.checkpoint") and room != "distributed":
                wrong.append(f"{path}: {name}")
            if room == "model" and name.split(".")[0] in ("pathlib", "zipfile", "io", "os"):
                wrong.append(f"{path}: {name}")
            if name.split(".")[0] == "pandas" and room not in EDGES:
                wrong.append(f"{path}: {name}")
            if name.split(".")[0] == "torchx":
                wrong.append(f"{path}: {name}")
    assert wrong == []


def test_the_model_knows_neither_files_nor_machines_and_configuration_stays_on_top() -> None:
    wrong = []
    for path in MODULES:
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "deepfm_dist":
                continue
            target = parts[1]
            if room == "model" and target not in ("model", "errors", "section", "seeding"):
                wrong.append(f"{path}: {name}")
            if target == "config" and room not in COMMANDS | {"cli", "build", "runs", "api"}:
                wrong.append(f"{path}: {name}")
    assert wrong == []


def test_what_the_rules_speak_of_exists() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__", "__main__"}
    assert rooms == set(LEVELS) | COMMANDS | {
        *("config", "cli", "build", "report", "runs", "api", "serving"),
    }
    assert any(
        name.startswith("torchrec.distributed") for path in MODULES for name in imports_of(path)
    )
