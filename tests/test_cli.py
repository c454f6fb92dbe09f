"""Exit codes and one-line mistakes."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deepfm_dist import cli, evaluate, predict, prepare, recommend, train
from deepfm_dist.config import load_config

Main = Callable[[Sequence[str] | None], int]


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
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    main: Main,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--quiet", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert re.search(message, line)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    monkeypatch.setenv("RANK", "1")
    assert main(["--quiet", *arguments]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("module", [prepare, train, evaluate, recommend, predict])
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
