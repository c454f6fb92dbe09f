"""Exit codes and one-line mistakes."""

import importlib
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import deepfm_dist
from deepfm_dist import (
    __main__,
    cli,
    demo,
    doctor,
    evaluate,
    predict,
    prepare,
    recommend,
    similar,
    terminal,
    train,
)
from deepfm_dist.arguments import as_typed
from deepfm_dist.cli import config_of_run
from deepfm_dist.config import load_config, with_settings
from tests.ranks import run_alone, run_in_fork

ROOT = Path(__file__).parents[1]
Main = Callable[[Sequence[str] | None], int]


@pytest.fixture
def bad_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose file has an empty cell in line 4."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "rows.csv").write_text("user,item\n1,2\n\n,3\n")
    data = {
        "root": str(folder),
        "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
        "features": [{"name": "user", "entity": "user"}],
    }
    (folder / "bad.yaml").write_text(json.dumps({"data": data}))
    return folder / "bad.yaml"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (prepare.main, ["trainer.batchsize=1"], "ConfigError: .*did you mean trainer.batch_size"),
        (prepare.main, ["--config", "sampel"], "ConfigError: .*did you mean sample"),
        (prepare.main, ["data.root=/nowhere"], "DataError: /nowhere/.*no such file"),
        (
            prepare.main,
            ["data.interactions.user=usr"],
            "DataError: .*no column 'usr'; did you mean",
        ),
        (prepare.main, ["--config", "BAD"], r"DataError: .*rows.csv, line 4: user '' is empty; "),
        (prepare.main, ["data.root=${NOT_SET}/x"], "ConfigError: .*variable is not set"),
        (train.main, ["trainer.batch_size=0"], r"ConfigError: .*batch_size=0: .*\(got 0\)"),
        (evaluate.main, [], r"CheckpointError: runs/sample.*python -m deepfm_dist\.train"),
        (recommend.main, [], r"CheckpointError: runs/sample.*python -m deepfm_dist\.train"),
        (predict.main, [], r"CheckpointError: runs/sample.*python -m deepfm_dist\.train"),
        (predict.main, ["--input=no.csv"], r"DataError: --input no\.csv: no such file$"),
        (
            predict.main,
            ["--output=out.csv"],
            r"ConfigError: --output out\.csv: results are parquet; use --output out\.parquet$",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    main: Main,
    arguments: list[str],
    message: str,
    bad_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    arguments = [str(bad_rows) if a == "BAD" else a for a in arguments]
    run_in_fork(_is_one_line_and_exit_2, main, arguments, message, capsys)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def _is_one_line_and_exit_2(
    main: Main, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in ([], ["--quiet"]):
        assert main([*quiet, *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        [line] = captured.err.splitlines()
        assert re.search(message, line)


@pytest.mark.parametrize(
    ("file", "named", "cure"),
    [
        ("runs", "runs", "set run.runs_root"),
        ("runs/sample/plan.json/x", "plan.json", "move or delete it"),
        ("runs/sample/tensorboard", "tensorboard", "set run.runs_root"),
    ],
)
def test_runs_that_cannot_be_written_are_one_line_and_exit_2(
    file: str, named: str, cure: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    blocking = tmp_path / file
    blocking.parent.mkdir(parents=True, exist_ok=True)
    blocking.write_text("")
    roots = [f"run.runs_root={tmp_path / 'runs'}", f"run.prepared_root={tmp_path / 'data'}"]
    arguments = ["--quiet", *roots, "run.loggers=[tensorboard]", "trainer.max_steps=1"]
    assert run_alone(train.main, arguments) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"DeepFMError: .*{named}.*: cannot be written: .*; {cure}.*", line)


@pytest.mark.parametrize("module", [prepare, train, evaluate, recommend, similar, predict])
def test_every_command_prints_its_configuration(
    module: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert module.main(["--print-config", "run.seed=9"]) == 0  # type: ignore[attr-defined]
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(str(path)).run.seed == 9


def test_prepare_succeeds_and_a_bug_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare.main([f"run.prepared_root={tmp_path}"]) == 0
    assert (tmp_path / "sample" / "manifest.json").is_file()

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run("prepare", "", broken, [])


def test_progress_is_logged_unless_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (False, True):
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        arguments = [f"run.prepared_root={tmp_path}", "--quiet"]
        assert prepare.main(arguments if quiet else arguments[:1]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("read train_ratings.csv" in captured.err) == (not quiet)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        assert prepare.main(arguments if quiet else arguments[:1]) == 0
        assert ("is up to date" in capsys.readouterr().err) == (not quiet)
        (tmp_path / "sample" / "manifest.json").write_text("{}")


def test_an_interrupt_is_not_a_bug() -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    assert cli.run("prepare", "", interrupted, []) == cli.EXIT_INTERRUPTED


@pytest.mark.parametrize("nproc", ["0", "-1", "two"])
def test_the_demo_refuses_a_number_of_ranks_that_is_none(
    nproc: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        demo.main(["--nproc", nproc])
    [line] = capsys.readouterr().err.splitlines()
    assert f"'{nproc}' is not a number of ranks; see" in line


def test_the_commands_are_listed_and_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in __main__.commands():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert len(line) > 40
    assert __main__.main(["trian"]) == 2
    assert capsys.readouterr().err == "ConfigError: trian: unknown command; did you mean train?\n"
    assert __main__.main(["prepare", "--print-config", "run.seed=9"]) == 0
    assert "seed: 9" in capsys.readouterr().out


def test_one_script_runs_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"deepfm": "deepfm_dist.__main__:main"}
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"deepfm_dist {deepfm_dist.__version__}\n"
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/deepfm"])
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "usage: deepfm train" in shown and "\n  deepfm train --config sample" in shown
    for config in (ROOT / "configs").glob("*.yaml"):
        assert re.search(rf"\b{config.stem}\b", shown.partition("bundled configurations:")[2])


def test_messages_name_commands_as_they_were_typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = ["recommend", "--run", str(tmp_path / "none")]
    assert __main__.main(line) == 2
    assert "config.yaml: python -m deepfm_dist.train makes it" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/deepfm"])
    assert __main__.main(line) == 2
    assert "config.yaml: deepfm train makes it" in capsys.readouterr().err
    assert as_typed("see python -m deepfm_dist, or run python -m deepfm_dist.plan.") == (
        "see deepfm, or run deepfm plan."
    )


@pytest.mark.parametrize(
    ("main", "option"), [(train.main, "--quite"), (demo.main, "--x"), (doctor.main, "--device=tpu")]
)
def test_an_unknown_option_is_one_line(
    main: Main, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([option])
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"ConfigError: .*; see python -m deepfm_dist\.\w+ --help", line)
    assert option.partition("=")[0] in line


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("deepfm recom", {"recommend "}),
        ("deepfm train --pri", {"--print-config "}),
        ("deepfm train --config movielens_l", {"movielens_latest_small", "movielens_latest_x1"}),
        ("deepfm doctor --device c", {"cpu", "cuda"}),
    ],
)
def test_a_shell_completes_commands_and_their_options(
    line: str, expected: set[str], tmp_path: Path
) -> None:
    pytest.importorskip("argcomplete")
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    answer = {"_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "answer")}
    command = [sys.executable, "-m", "deepfm_dist"]
    subprocess.run(command, env=os.environ | asked | answer, cwd=tmp_path, check=True)
    assert {*(tmp_path / "answer").read_text().split("\n")} == expected


def test_a_run_s_folder_is_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    text = load_config("sample", ["run.seed=9"]).to_yaml()
    (tmp_path / "mine/config.yaml").write_text(text)
    shown = []
    for option in ("--config", "--run"):
        assert prepare.main(["--print-config", option, f"{tmp_path / 'mine'}/"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "seed: 9" in shown[0] and "name: mine" in shown[0]


@pytest.mark.parametrize("name", __main__.commands())
def test_help_shows_examples_that_parse(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main = importlib.import_module(f"deepfm_dist.{name}").main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    text = re.sub(r" \\\n +", " ", text)
    assert f"usage: python -m deepfm_dist.{name}" in text
    examples = re.findall(rf"-m deepfm_dist\.{name}\b *(.*)", text.partition("examples:")[2])
    assert examples
    if main in (demo.main, doctor.main):
        return
    for example in examples:
        # What an example names is the reader's.
        named = re.sub(r"--run \S+", "--config sample", example.replace("mine.yaml", "sample"))
        arguments = [a for a in shlex.split(named) if not a.startswith("recommend.context")]
        assert main(["--print-config", *arguments]) == 0, example
        capsys.readouterr()


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.coloured("no", "red", io.StringIO()) == "no"
    assert terminal.coloured("yes", "red", Terminal()) == "\033[31myes\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.coloured("no", "red", Terminal()) == "no"


def test_lines_of_errors_are_one_write_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under PYTHONUNBUFFERED two writes of one rank would have another rank's line between them."""
    writes: list[str] = []

    class Unbuffered(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Unbuffered())
    assert __main__.main(["trian"]) == 2
    with pytest.raises(SystemExit, match="2"):
        train.main(["--no-such-option"])
    assert train.main(["--config", "missing.yaml"]) == 2
    errors = [text for text in writes if "Error" in text]
    assert len(errors) == 3
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in errors)


@pytest.mark.parametrize(
    ("command", "used", "without_effect"),
    [
        ("prepare", ["data.root", "run.seed"], ["trainer.epochs", "run.device", "recommend.k"]),
        (
            "train",
            ["run.loggers", "evaluate.k"],
            ["evaluate.ease_l2", "recommend.k", "tune.trials"],
        ),
        (
            "evaluate",
            ["evaluate.ease_l2", "recommend.context.x"],
            ["trainer.epochs", "recommend.k"],
        ),
        ("recommend", ["run.deterministic", "recommend.k"], ["evaluate.k", "run.loggers"]),
        ("similar", ["similar.k"], ["recommend.k", "sharding.tables.user.kind"]),
        ("predict", ["run.device", "run.deterministic"], ["recommend.k", "optimizer.tables.lr"]),
        ("serve", ["recommend.context", "run.threads"], ["run.device", "trainer.compile"]),
        ("export", ["checkpoint.use"], ["run.device", "run.deterministic"]),
        ("tune", ["tune.trials", "optimizer.dense.lr"], ["similar.k"]),
    ],
)
def test_settings_without_effect_are_known(
    command: str, used: list[str], without_effect: list[str]
) -> None:
    assert [name for name in used if not cli.uses_setting(command, name)] == []
    assert [name for name in without_effect if cli.uses_setting(command, name)] == []


def test_every_setting_changes_what_some_command_does() -> None:
    tree = load_config("sample").model_dump()
    names = [f"{section}.{field}" for section in tree for field in tree[section]]
    assert len(names) > 80
    assert [n for n in names if not any(cli.uses_setting(c, n) for c in cli.SETTINGS_USED)] == []
    not_of_a_run = {"demo", "doctor"}
    assert {*cli.SETTINGS_USED} | not_of_a_run == {*__main__.commands()}


def test_a_setting_without_effect_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["trainer.epochs=3", "similar={k: 5}", f"run.prepared_root={tmp_path}"]
    assert prepare.main(["--quiet", *settings]) == 0
    lines = [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]
    assert lines == [
        "trainer.epochs has no effect on prepare; it is a setting of train, import_weights, "
        "combine, plan, tune, nightly",
        "similar.k has no effect on prepare; it is a setting of similar, serve",
    ]


def test_settings_of_ranks_reach_the_process_group() -> None:
    """Every command that computes joins its ranks with the same four settings."""
    wanted = ("cpu", 7.0, 3, True)
    options = ["run.device=cpu", "run.timeout_s=7", "run.threads=3", "run.deterministic=true"]
    assert load_config("sample", options).run.process_group == wanted
    jobs = (
        "train",
        "tune",
        "evaluate",
        "predict",
        "ranking_files",
        "combine",
        "import_weights",
        "nightly",
    )
    for name in jobs:
        source = (ROOT / f"deepfm_dist/jobs/{name}.py").read_text()
        assert "process_group(*config.run.process_group)" in source, name


def test_memory_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def torch_s(*_: object) -> None:
        torch.empty(1 << 60)

    def numpy_s(*_: object) -> None:
        np.empty(1 << 55)

    for work, message in (
        (torch_s, "cannot allocate 4,611,686,018.4 GB: "),
        (numpy_s, "256. PiB: "),
    ):
        assert cli.run("prepare", "", work, ["--quiet"]) == 2
        [line] = capsys.readouterr().err.splitlines()[-1:]
        assert re.match(f"OutOfMemory: .*{message}", line)


@pytest.mark.parametrize("moved_to", ["runs/shop/monday", "copies/tuesday"])
def test_a_run_finds_its_dataset_wherever_its_folder_is(tmp_path: Path, moved_to: str) -> None:
    settings = {"run.name": "shop/monday", "run.prepared_root": str(tmp_path / "prepared")}
    config = with_settings(load_config("sample"), settings)
    folder = tmp_path / moved_to
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    read = config_of_run(folder, [])
    assert read.run_dir == folder
    assert read.prepared_dir == tmp_path / "prepared/shop/monday"
    assert config_of_run(folder, ["run.name=next"]).prepared_dir == tmp_path / "prepared/next"
    assert config_of_run(folder, ["data.name=other"]).prepared_dir == tmp_path / "prepared/other"
