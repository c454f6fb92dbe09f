"""Rows to score from files that are laid out as those of training, or otherwise."""

import json
import logging
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from deepfm_dist import evaluate, predict, train
from deepfm_dist.distributed.part_files import PartFolder
from deepfm_dist.training import prediction
from tests.ranks import run_alone, run_ranks

NAMES = ["label", "user", "ad"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on a file without a header, whose cells stand between bars."""
    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(3)
    rows = pd.DataFrame({n: rng.integers(0, 2 if n == "label" else 9, 400) for n in NAMES})
    rows.to_csv(home / "clicks.csv", sep="|", header=False, index=False)
    data = {
        "root": str(home),
        "task": "ctr",
        "interactions": {"file": "clicks.csv", "user": "user", "label": "label"},
        "files": {"clicks.csv": {"columns": NAMES, "delimiter": "|"}},
        "features": [{"name": "user", "entity": "user"}, {"name": "ad"}],
    }
    run = {"name": "r", "runs_root": str(home), "prepared_root": str(home / "prepared")}
    config = {"run": run, "data": data, "trainer": {"max_steps": 3}}
    (home / "c.yaml").write_text(yaml.safe_dump(config))
    assert run_alone(train.main, ["--quiet", "--config", str(home / "c.yaml")]) == 0
    return home


def _scored(home: Path, file: str, *settings: str) -> pd.DataFrame:
    out = home / "out.parquet"
    arguments = ["--quiet", "--run", str(home / "r"), "--output", str(out), *settings]
    arguments += ["--input", str(home / file)] if file else []
    assert run_alone(predict.main, arguments) == 0
    return pd.read_parquet(out)


def test_a_header_is_not_a_row_in_any_file(home: Path) -> None:
    expected = _scored(home, "")
    assert len(expected) == 400
    assert expected["score"].std() > 0
    rows = pd.read_csv(home / "clicks.csv", sep="|", names=NAMES)
    rows.to_csv(home / "plain.csv", sep="|", header=False, index=False)
    rows[["ad", "user"]].to_csv(home / "headed.csv", sep="|", index=False)
    rows.drop(columns="label").to_csv(home / "commas.csv", index=False)
    commas = "data.files={commas.csv: {delimiter: ','}}"
    for file, settings in (("plain.csv", []), ("headed.csv", []), ("commas.csv", [commas])):
        pd.testing.assert_frame_equal(_scored(home, file, *settings), expected)


def test_memory_is_a_matter_of_the_machine(home: Path) -> None:
    settings = ["--quiet", "--run", str(home / "r"), "data.memory_bytes=0"]
    assert run_alone(evaluate.main, settings) == 0
    assert run_alone(evaluate.main, [*settings, "data.refit=true"]) == 2


def _scored_in_parts(home: Path, out: Path, dies_at: int | None = None) -> int:
    prediction.ROWS_AT_A_TIME = 90
    write = PartFolder.write

    def dying(self: PartFolder, part: int, *more: Any) -> None:
        if part == dies_at:
            raise KeyboardInterrupt
        write(self, part, *more)

    PartFolder.write = dying  # type: ignore[method-assign]
    arguments = ["--quiet", "--run", str(home / "r"), "--output-parts", str(out)]
    return predict.main([*arguments, "--input", str(home / "strange.csv")])


def test_parts_are_those_of_one_file_at_any_world_size_and_after_a_kill(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    rows = (home / "clicks.csv").read_text().splitlines()
    rows[250] = "0|77|3"  # a user whom the model does not know, in the third part
    (home / "strange.csv").write_text("\n".join(rows) + "\n")
    expected = _scored(home, "strange.csv")
    assert run_alone(_scored_in_parts, home, tmp_path / "killed", dies_at=3) == 130
    killed = tmp_path / "killed"
    present = [p.name for p in sorted(killed.iterdir())]
    assert present == ["_inputs.json", *(f"part-{n:06}.parquet" for n in range(3))]
    before = [(killed / name).stat().st_mtime_ns for name in present]
    capfd.readouterr()
    for out, size in ((tmp_path / "one", 1), (tmp_path / "two", 2), (killed, 2)):
        assert run_ranks(_scored_in_parts, size, home, out) == [0] * size
        printed = capfd.readouterr()
        assert f"{out}: 400 rows scored" in printed.out
        unknown = "strange.csv: user: 1 of 400 values were never seen in training"
        assert (unknown in printed.err) == (out != killed), printed.err
        pd.testing.assert_frame_equal(pd.read_parquet(out), expected)
        assert json.loads((out / "_SUCCESS").read_text()) == {"parts": 5, "rows": 400}
    assert [(killed / name).stat().st_mtime_ns for name in present] == before
    digests = [
        [file.read_bytes() for file in sorted((tmp_path / name).iterdir())]
        for name in ("one", "two", "killed")
    ]
    assert digests[0] == digests[1] == digests[2]


def test_unknown_values_are_named_once_whatever_the_ranks(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    (tmp_path / "new.csv").write_text("0|77|3\n1|3|3\n")
    arguments = ["--quiet", "--run", str(home / "r"), "--input", str(tmp_path / "new.csv")]
    for size in (1, 2):
        capfd.readouterr()
        output = [*arguments, "--output", str(tmp_path / f"{size}.parquet")]
        assert run_ranks(predict.main, size, output) == [0] * size
        assert capfd.readouterr().err.count("user: 1 of 2 values were never seen") == 1


def _unwritable(home: Path, output: str, limit: int | None) -> int:
    if limit is not None:  # bytes of a file: what a full disk does, at a byte that is known
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    arguments = ["--quiet", "--run", str(home / "r"), "--output", output]
    try:
        return predict.main(arguments)
    except SystemExit as end:  # of the ranks that hear of rank 0's mistake
        return int(str(end.code))


@pytest.mark.parametrize(
    ("where", "limit", "said", "size"),
    [
        ("clicks.csv/scores.parquet", None, "it is not a folder", 2),
        ("clicks.csv/folder/scores.parquet", None, "Not a directory", 1),
        ("/proc/scores.parquet", None, "No such file or directory", 1),
        ("scores.parquet", 1000, "File too large", 1),
        ("scores.parquet", 1000, "File too large", 2),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(
    home: Path,
    capfd: pytest.CaptureFixture[str],
    where: str,
    limit: int | None,
    said: str,
    size: int,
) -> None:
    before = {*home.rglob("*")}
    assert run_ranks(_unwritable, size, home, str(home / where), limit) == [2] * size
    lines = [x for x in capfd.readouterr().err.splitlines() if "Error" in x]
    assert len(lines) == 1, lines
    [line] = lines
    assert line.startswith("DeepFMError: ") and f"cannot be written: {said}" in line
    assert line.endswith("; give --output or --output-parts a writable place with enough space")
    assert {*home.rglob("*")} == before


def test_an_output_folder_is_made(home: Path) -> None:
    target = home / "some/folder/scores.parquet"
    arguments = ["--quiet", "--run", str(home / "r"), "--output", str(target)]
    assert run_alone(predict.main, arguments) == 0
    assert len(pd.read_parquet(target)) == 400
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_scores_that_are_not_numbers_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # log to stderr, as in a process
    rows = "y,user,price\n" + "".join(f"{k % 2},u{k % 7},{k % 5}\n" for k in range(60))
    (tmp_path / "c.csv").write_text(rows)
    data = {
        "root": str(tmp_path),
        "task": "ctr",
        "interactions": {"file": "c.csv", "user": "user", "label": "y"},
        "features": [{"name": "user", "entity": "user"}, {"name": "price", "kind": "numeric"}],
    }
    run = {"name": "r", "runs_root": str(tmp_path), "prepared_root": str(tmp_path / "prepared")}
    config = {"run": run, "data": data, "trainer": {"max_steps": 1}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert run_alone(train.main, ["--quiet", "--config", str(tmp_path / "c.yaml")]) == 0
    (tmp_path / "new.csv").write_text("user,price\nu1,3\nu2,1e30\nu1,2\nu1,-1e30\n")
    capfd.readouterr()
    scored = _scored(tmp_path, "new.csv")
    assert scored["score"].isna().tolist() == [False, True, False, True]
    line = "new.csv: 2 of 4 scores are not numbers, the first that of row 2: a number of that row"
    assert line in capfd.readouterr().err
    _scored(tmp_path, "c.csv")
    assert "not numbers" not in capfd.readouterr().err
