"""Imports go downwards, as CONTRIBUTING says."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import deepfm_dist

PACKAGE = Path(deepfm_dist.__file__).parent
COMMANDS = {
    "prepare", "train", "evaluate", "recommend", "similar", "predict", "doctor", "demo",
    "export", "import_weights", "combine", "plan", "serve", "tune", "nightly",
}  # fmt: skip
LEVELS = [
    {
        "errors",
        "messages",
        "section",
        "compiled",
        "vector_code",
        "float_order",
        "terminal",
        "events",
        "version",
        "bundle",
    },
    {"launcher", "storage", "seeding", "typed_yaml", "arguments"},
    {"log", "lock", "environment", "setting_errors"},
    {"model"},
    {"data", "distributed"},
    {"training", "ranking"},
    {"interop", "recipe"},
    {"config", "report"},
    {"build"},
    {"runs"},
    {"jobs"},
    {"cli", "api", "serving"},
    COMMANDS,
    {"__init__", "__main__"},
]
"""From the bottom up; rooms of one level do not import each other."""
_BELOW_MODEL = {"model", "errors", "section", "seeding", "compiled", "vector_code"}
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
EDGES = COMMANDS | {"report", "build", "runs", "api"}
"""Where tables are made for people."""
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_bundled" not in path.parts
}


@cache
def imports_of(path: Path) -> set[str]:
    """Every dotted name that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_imported_by(path: Path) -> set[str]:
    """Modules of the package that a file imports; those of a package as its ``__init__``."""
    modules = set()
    for name in imports_of(path):
        if name.split(".")[0] != "deepfm_dist":
            continue
        parent = name.rpartition(".")[0] or name
        candidates = (name, f"{name}.__init__", parent, f"{parent}.__init__")
        modules.add(next(module for module in candidates if module in MODULES))
    return modules


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def test_imports_run_downwards() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = room_of(path)
        for imported in modules_imported_by(path):
            target = imported.split(".")[1]
            if target != room and LEVEL[target] >= LEVEL[room]:
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_no_import_is_circular_not_even_inside_a_function() -> None:
    graph = {module: modules_imported_by(path) for module, path in MODULES.items()}
    assert [*TopologicalSorter(graph).static_order()]  # raises CycleError, which names the modules


def test_one_process_prepares_without_torch() -> None:
    # It takes longer to load than many datasets to prepare, and 0.3 GiB.
    code = "import sys, deepfm_dist.jobs.prepare as _; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_special_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in MODULES.values():
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
    for path in MODULES.values():
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "deepfm_dist":
                continue
            target = parts[1]
            if room == "model" and target not in _BELOW_MODEL:
                wrong.append(f"{path}: {name}")
            if target == "config" and room not in COMMANDS | {
                "cli",
                "build",
                "runs",
                "jobs",
                "api",
            }:
                wrong.append(f"{path}: {name}")
    assert wrong == []


def test_the_rules_name_every_room_and_no_other() -> None:
    assert {room_of(path) for path in MODULES.values()} == set(LEVEL)
    assert any(
        name.startswith("torchrec.distributed")
        for path in MODULES.values()
        for name in imports_of(path)
    )


_DATA_ROOMS_MAY_IMPORT = {
    "top": lambda target: target not in ("preparation", "batches"),
    "sources": lambda target: target in ("sources", "schema", "times"),
    "preparation": lambda target: target != "batches",
    "batches": lambda target: target not in ("preparation", "sources"),
}
"""The rooms of `data/`; its top says what a prepared dataset is."""


def test_the_rooms_of_data_keep_apart() -> None:
    wrong = []
    for module, path in MODULES.items():
        package, room, *rest = [*module.split(".")[1:], ""]
        if package != "data":
            continue
        may_import = _DATA_ROOMS_MAY_IMPORT[room if rest[:-1] else "top"]
        wrong += [
            f"{module} imports {imported}"
            for imported in modules_imported_by(path)
            if imported.startswith("deepfm_dist.data.") and not may_import(imported.split(".")[2])
        ]
    assert wrong == []
