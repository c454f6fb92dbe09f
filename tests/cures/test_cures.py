"""Every cure that an error line names is typed, and cures.

A row of the tables is a command that fails, a part of its error line, and what a user then types.
The line has to contain that part, so a cure that is not named fails like one that does not work.
"""

import ast
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import deepfm_dist
from tests.cures.commands import COMMAND_ORDER, OTHERS
from tests.cures.inputs import INPUT
from tests.cures.machines import MACHINES
from tests.cures.mistakes import SPACE, Mistake, exit_code, exit_code_here, write
from tests.cures.requests import REQUESTS
from tests.cures.settings import SETTINGS
from tests.cures.targets import TARGETS
from tests.ranks import heed_permissions, run_in_fork

ALL = [*SETTINGS, *INPUT, *COMMAND_ORDER, *OTHERS, *REQUESTS, *MACHINES, *TARGETS]
READ_ONLY = {
    "recommend": ("--output", "--output OUT/best.parquet"),
    "similar": ("--output", "--output OUT/alike.parquet"),
    "predict": ("--output", "--output OUT/scores.parquet"),
    "recommend --output-parts parts": ("--output-parts", "--output-parts OUT/parts"),
    "export": ("give another --output", "--output OUT/exported"),
    "combine --of flat --to both": ("--to /FOLDER/NAME", "--to OUT/combined/both"),
    "prepare data.name=new": ("set run.prepared_root", "run.prepared_root=OUT"),
    "train run.name=new data.name=cures": ("set run.runs_root", "run.runs_root=OUT"),
    f"tune trainer.monitor=auc tune.trials=1 '{SPACE}'": (
        "set run.runs_root",
        "run.runs_root=OUT data.name=cures",
    ),
}
"""Commands that write below the current folder: what their errors name, and what is then typed."""


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mistake], Path]:
    """Makes a folder with what has run before a mistake; not to be changed."""

    made: dict[str, Path] = {}

    def home(mistake: Mistake) -> Path:
        inputs = repr((mistake.before, mistake.data, mistake.files))
        if inputs not in made:
            made[inputs] = tmp_path_factory.mktemp("cures")
            write(made[inputs], mistake)
            for command in mistake.before:
                assert exit_code(made[inputs], command) == 0
        return made[inputs]

    return home


@cache
def _templates() -> dict[str, str]:
    """Messages that name a cure after a semicolon, with … for values, and their modules."""
    package, found = Path(deepfm_dist.__file__).parent, {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = _literal(node.exc.args[0])
                if re.search(_VERBS, _clause(text)) and "; " in text:
                    found[text] = path.relative_to(package).as_posix()
    return found


_VERBS = (
    r"\b(use|set|give|leave|choose|run|install|name|take|train|write|lower|delete|export|hold|create"
    r"|remove|ask|vary|correct|wait|unset|list|add|put|prepare)\b"
)


def _literal(node: ast.expr) -> str:
    """The text of a message's expression; … stands for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_literal, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return "…"


def _clause(template: str) -> str:
    return template.rpartition("; ")[2]


def _is_of(line: str, template: str) -> bool:
    return re.search(".*".join(map(re.escape, template.split("…"))), line) is not None


ROWS_OF_CURES = {m.name for m in ALL}
TYPED = dict(
    line.split("\t")
    for line in (Path(__file__).parent / "cures.txt").read_text(encoding="utf-8").splitlines()
)
"""Messages, as `_templates` has them or had before they were reworded: the row that types each."""
NOT_OF_COMMANDS = {
    "api.py": "arguments of Python, not of a command; see test_api",
    "data/sources/days.py": "a range of days as in other rows, which names more; see test_nightly",
    "data/preparation/cluster.py": "needs Spark on several machines; see test_cluster",
    "interop/graph.py": "needs a missing library or compiler; see test_export",
    "interop/notebook.py": "needs a notebook's weights; see test_notebook",
    "jobs/nightly.py": "needs logs by day; see test_nightly",
    "jobs/import_weights.py": "needs a notebook's weights; see test_notebook",
    "launcher.py": "variables that every test sets itself; see test_launcher",
    "lock.py": "needs a second process; see test_lock",
    "serve.py": "a service does not end; see test_serving",
    "serving/live.py": "a service does not end; see test_serving",
}
"""Modules whose cures no row types, and why."""
_CUDA = "comes after a check that needs a GPU or libraries built for one"
_SECOND = "needs a second process that changes files while the first one reads them"
_MACHINES = "needs ranks that do not share a disk"
_PROCESSES = "starts or needs torchrun itself; see test_tune_workers"
NOT_TYPED = {
    "…=table_row_wise: … on machines": _CUDA,
    "…: only on CUDA, not on a …; leave it out": "in groups of ranks; see test_groups",
    "…: does not divide the …; use …": _CUDA,
    "…: … on machines of … each; start as many": _CUDA,
    "…: TorchRec averages the state of Adagrad only": _CUDA,
    "…: …=table_row_wise needs all ranks of a machine": _CUDA,
    "…: sharding.tables.….cached=…: rows in the cache": _CUDA,
    "run.device=cuda, but torch sees no GPU": _CUDA,
    "sharding.tables.….kind=replicated: optimizer.tables.name=lazy_adam": _CUDA,
    "optimizer.tables.l2=…: FBGEMM's lazy_adam": _CUDA,
    "…: adam moves every row at every step": _CUDA,
    "--workers … --ranks …: … processes need": _CUDA,
    "…: no complete checkpoint (…); if its run": _SECOND,
    "…: prepared again, moved or deleted": _SECOND,
    "…: … of … parts that other ranks wrote": _MACHINES + "; see test_part_files",
    "…: rank … finds another dataset": _MACHINES,
    "…: a worker cannot see": _MACHINES,
    "torchrun over several machines": "needs several machines; see test_elastic",
    "tune --workers starts processes itself": _PROCESSES,
    "--ranks …: needs --workers": _PROCESSES,
    "evaluate.baselines: ials has vectors of the users": "needs the library implicit",
    "column …: … is not …; correct it": "only a service meets such cells; see test_predict",
    "…, row …: … is missing; give null": "only a service reads such objects; see test_predict",
    "…: damaged (…); delete …, and it is exported": "only a service reads exports; see test_damage",
    "…: cannot be opened (…); pip install": "the cure installs a library; see test_paths",
}
"""Beginnings of messages whose cure no row types, and why."""


def test_every_cure_is_typed_by_a_row_or_excused() -> None:
    templates = _templates()
    missing = [
        f"{module}: {text}"
        for text, module in templates.items()
        if text not in TYPED
        and module not in NOT_OF_COMMANDS
        and not text.startswith(tuple(NOT_TYPED))
    ]
    reworded = Counter(_clause(text) for text in TYPED if text not in templates)
    missing = [text for text in missing if not reworded[_clause(text)]]
    assert missing == [], "add a row that types the cure, and its message to cures.txt"
    assert {*TYPED.values()} <= {*ROWS_OF_CURES, *READ_ONLY}, "cures.txt names rows that are gone"
    assert set(templates.values()) >= NOT_OF_COMMANDS.keys()


@pytest.mark.parametrize("mistake", ALL, ids=lambda m: m.name)
def test_the_cure_that_an_error_names_cures(
    mistake: Mistake,
    homes: Callable[[Mistake], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    monkeypatch.chdir(tmp_path)
    if len(mistake.before) == 1:
        shutil.copytree(homes(mistake), tmp_path, dirs_exist_ok=True)
    write(tmp_path, mistake)
    for command in mistake.before[1:] and mistake.before:  # runs know where others are
        assert exit_code(tmp_path, command) == 0
    if mistake.damage is not None:
        mistake.damage(tmp_path)
    for place, value in mistake.machine.items():
        monkeypatch.setattr(place, value)
    capfd.readouterr()
    with monkeypatch.context() as patch:
        for name in mistake.without:
            patch.setitem(sys.modules, name, None)
        for name, value in mistake.env.items():
            patch.setenv(name, value)
        assert exit_code(tmp_path, mistake.command, ranks=mistake.ranks) == 2
    *warnings, line = dict.fromkeys(filter(None, capfd.readouterr().err.splitlines()))
    assert bool(warnings) == mistake.warnings, warnings
    assert mistake.cure in line
    namesakes = [m for m in ALL if m.name == mistake.name]
    for template, row in TYPED.items():
        if row == mistake.name and template in _templates() and len(namesakes) == 1:
            assert _is_of(line, template), f"cures.txt: {template}"
    write(tmp_path, mistake, cured=True)
    if mistake.by_hand is not None:
        mistake.by_hand(tmp_path)
    for command in mistake.first:
        assert exit_code(tmp_path, command) == 0
    code = exit_code(tmp_path, mistake.command, mistake.left_out, mistake.typed, mistake.ranks)
    assert code == 0, capfd.readouterr().err


def test_folders_that_cannot_be_written_have_cures(
    homes: Callable[[Mistake], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    before = ("train", "train run.name=flat model.deep=false data.name=cures")
    shutil.copytree(homes(Mistake("", "", before=before)), home)
    write(home, Mistake("", ""))
    capfd.readouterr()
    out.mkdir()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.chdir(home)
    folders = [home, *(p for p in home.rglob("*") if p.is_dir())]
    (home / "runs_root/cures/metrics.jsonl").chmod(0o444)
    for path in folders:
        path.chmod(0o555)
    times = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    try:
        run_in_fork(_type_where_nothing_can_be_written, home, out, capfd)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert {p: p.stat().st_mtime_ns for p in home.rglob("*")} == times


def _type_where_nothing_can_be_written(
    home: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    heed_permissions()
    for command, (cure, typed) in READ_ONLY.items():
        assert exit_code_here(home, command) == 2, command
        [line] = capfd.readouterr().err.splitlines()
        assert "cannot be written: Permission denied; " in line and cure in line, line
        assert exit_code_here(home, command, added=typed.replace("OUT", str(out))) == 0, command
        said = capfd.readouterr().err
        assert "Error" not in said, said
    assert exit_code_here(home, "evaluate") == 0  # its figures are printed
    shown = capfd.readouterr()
    log_line, page_line = shown.err.splitlines()
    run = home / "runs_root/cures"
    copied = f"copy the run to another folder: cp -r {run} FOLDER, --run FOLDER/cures"
    assert log_line == (
        f"{run / 'metrics.jsonl'}: cannot be written: Permission denied; the figures are not kept; "
        f"{copied}"
    )
    assert page_line.startswith(f"{run / 'report.html'}: cannot be written: Permission denied; ")
    assert "log_loss" in shown.out and "written: " not in shown.out
    shutil.copytree(run, out / "copies/cures")
    for path in ("", "metrics.jsonl"):
        (out / "copies/cures" / path).chmod(0o755)
    assert exit_code_here(home, f"evaluate --run {out / 'copies/cures'}") == 0
    assert (out / "copies/cures/report.html").is_file()
