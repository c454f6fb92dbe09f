"""Mistakes of the command line, and what all tables of them share."""

import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfm_dist import (
    combine,
    evaluate,
    export,
    plan,
    predict,
    prepare,
    recommend,
    similar,
    train,
    tune,
)
from tests.ranks import run_ranks

COMMANDS = {
    "prepare": prepare.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "recommend": recommend.main,
    "similar": similar.main,
    "predict": predict.main,
    "export": export.main,
    "tune": tune.main,
    "plan": plan.main,
    "combine": combine.main,
}
N_USERS, N_ITEMS = 40, 30


def made_rows() -> list[list[str]]:
    """A third of all pairs, each with a rating, a label, a device and a time."""
    rng = np.random.default_rng(7)
    rows = []
    for user in range(N_USERS):
        for item in rng.choice(N_ITEMS, 10, replace=False):
            rating, device = rng.integers(1, 6), rng.choice(["phone", "desk"])
            label, time = int(rating > 3), 1_600_000_000 + len(rows)
            rows.append([f"u{user}", f"i{item}", str(rating), str(label), device, str(time)])
    return rows


def csv_of(
    rows: Sequence[Sequence[str]], header: str = "user,item,rating,label,device,time"
) -> str:
    return header + "\n" + "".join(",".join(row) + "\n" for row in rows)


ROWS = made_rows()
FILES = {
    "rows.csv": csv_of(ROWS),
    "items.csv": "item,genre,price\n"
    + "".join(f"i{i},g{i % 3}|g{i % 5},{i / 4}\n" for i in range(N_ITEMS)),
    "users.csv": "user\nu1\nu2\n",
    "histories.csv": "user,item\nnew,i1\nnew,i2\n",
}
DATA: dict[str, Any] = {
    "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
    "features": [
        {"name": "user", "entity": "user"},
        {"name": "item", "entity": "item"},
        {"name": "genre", "entity": "item", "file": "items.csv", "separator": "|"},
    ],
}
SEEN = {"name": "seen", "entity": "user", "history": "item"}
CITY = {"name": "city", "entity": "user", "file": "people.csv", "keep": "first"}
PEOPLE = {
    "people.csv": "user,city\n" + "".join(f"u{n},{('Oslo', 'Rome')[n % 2]}\n" for n in range(9))
}
CTR = {
    "task": "ctr",
    "interactions": {"file": "rows.csv", "user": "user", "item": "item", "label": "label"},
}
SMALL = {
    "model": {"embedding_dim": 4, "over_arch_layer_sizes": [4]},
    "trainer": {"batch_size": 256, "epochs": 1},
    "run": {"name": "cures", "loggers": []},
}


def parquet_of(rows: str) -> bytes:
    file = io.BytesIO()
    pd.read_csv(io.StringIO(rows)).to_parquet(file)
    return file.getvalue()


@dataclass(frozen=True)
class Mistake:
    """A command that fails, what its line says, and what to type then.

    Attributes:
        command: the command and its arguments.
        cure: what has to stand in the error line, word for word.
        typed: arguments added to the command; one of the same setting takes the place of the old.
        left_out: arguments of the command that the cure takes away.
        data: changes of `DATA`.
        files: changes of `FILES`.
        new_files: what the cure changes in files.
        new_data: what the cure changes in the configuration's ``data`` section.
        first: commands that the cure types before the command.
        before: commands that have run before the mistake.
        without: libraries that are not installed until the cure installs them.
        env: variables of the environment until the cure.
        machine: what the package finds on this machine, by name of a function or constant; the
            cure changes nothing about it.
        ranks: that take the command.
        damage: what happens to the folder before the mistake.
        by_hand: what the cure does to the folder besides commands.
        warnings: whether lines come before the error's.
    """

    command: str
    cure: str
    typed: str = ""
    left_out: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    new_files: Mapping[str, str | bytes] = field(default_factory=dict)
    new_data: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    damage: Callable[[Path], object] | None = None
    by_hand: Callable[[Path], object] | None = None
    warnings: bool = False

    @property
    def name(self) -> str:
        """What cures.txt calls it."""
        return f"{self.command}: {self.cure}"


def changed(row: int, column: int, text: str) -> str:
    rows = [list(r) for r in ROWS]
    rows[row][column] = text
    return csv_of(rows)


def timed(text: Callable[[int], str]) -> str:
    return csv_of([[*row[:5], text(int(row[5]))] for row in ROWS])


SPACE = "tune.space={optimizer.dense.lr: {low: 0.0001, high: 0.01, log: true}}"
CTR_OVERRIDES = (
    "data.task=ctr data.interactions.label=label data.interactions.user=null "
    "data.interactions.item=null 'data.features=[{name: device}]'"
)
RANKED = "train trainer.loss=softmax model.deep=false model.linear=ease"
GROWN = "data.name=grown data.vocabulary_from=prepared_root/cures"
HASHED = "data.features=[{name: user, entity: user}, {name: item, entity: item, hash_rows: 9}]"
PRINT = "train --print-config "
VECTORS = "item,v\n" + "".join(f'i{i},"[{i}, 1]"\n' for i in range(N_ITEMS))
IDS = "item\n" + "".join(f"i{i}\n" for i in range(N_ITEMS))


def vectors(**changes: Any) -> dict[str, Any]:
    vector = {"name": "v", "entity": "item", "kind": "vector", "file": "v.csv"}
    return {"features": [*DATA["features"][:2], vector | changes]}


def npy_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


OBJECTS = "".join(f'{{"item": "i{i}", "genres": [{{"id": {i % 3}}}]}}\n' for i in range(N_ITEMS))


def genres(**of_field: str) -> list[dict[str, Any]]:
    """The fields, with the items' genres in a file of objects."""
    genre = {"name": "genres", "entity": "item", "file": "items.jsonl", **of_field}
    return [*DATA["features"][:2], genre]


def write(folder: Path, mistake: Mistake, cured: bool = False) -> None:
    """Writes a mistake's input files and configuration."""
    for name, text in {**FILES, **mistake.files, **(mistake.new_files if cured else {})}.items():
        file, content = folder / name, text.encode() if isinstance(text, str) else text
        if not file.is_file() or file.read_bytes() != content:  # or its dataset would be another
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    data = {**DATA, **mistake.data, **(mistake.new_data if cured else {}), "root": str(folder)}
    (folder / "c.yaml").write_text(json.dumps({**SMALL, "data": data}))


def exit_code(
    folder: Path, command: str, left_out: Sequence[str] = (), added: str = "", ranks: int = 1
) -> int:
    """Types a command, with some arguments left out and others added; returns its exit code."""
    name, argv = _command_line(folder, command, left_out, added)
    if name == "prepare" or "--print-config" in argv:
        return _main(name, argv)
    codes = {*run_ranks(_main, ranks, name, argv)}  # the others join a process group
    assert len(codes) == 1, codes
    return int(codes.pop())


def exit_code_here(folder: Path, command: str, added: str = "") -> int:
    """`_typed` in a process that may join process groups itself."""
    return _main(*_command_line(folder, command, (), added))


def _command_line(
    folder: Path, command: str, left_out: Sequence[str], added: str
) -> tuple[str, list[str]]:
    name, *arguments = shlex.split(command)
    more = shlex.split(added)
    settings = {a.partition("=")[0] for a in more if "=" in a}
    kept = [a for a in arguments if a not in left_out and a.partition("=")[0] not in settings]
    where = [f"run.prepared_root={folder / 'prepared_root'}"]
    if "--run" not in (*kept, *more):
        where += ["--config", str(folder / "c.yaml"), f"run.runs_root={folder / 'runs_root'}"]
    return name, ["--quiet", *where, *kept, *more]


def _main(name: str, argv: Sequence[str]) -> int:
    try:
        return COMMANDS[name](argv)
    except SystemExit as error:  # argparse
        return int(error.code or 0)
