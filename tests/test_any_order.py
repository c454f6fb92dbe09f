"""Every command after every other on one run, twice as well; nothing trained is lost."""

import hashlib
import itertools
import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from deepfm_dist import (
    combine,
    evaluate,
    export,
    import_weights,
    predict,
    prepare,
    recommend,
    similar,
    train,
    tune,
)
from deepfm_dist.events import EvaluateEvent, RecommendEvent, read_events
from tests.interop.notebook import NotebookDeepFM
from tests.ranks import run_alone, run_ranks

COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "evaluate evaluate.split=valid": evaluate.main,
    "recommend": recommend.main,
    "recommend recommend.k=2 recommend.users=[u1,u2]": recommend.main,
    "similar": similar.main,
    "predict": predict.main,
    "export": export.main,
    "combine --to both": combine.main,
    "import_weights notebook.pt model.deep=true run.name=imported": import_weights.main,
    "prepare": prepare.main,
    "tune": tune.main,
}
ONCE = ("combine --to both", "import_weights notebook.pt model.deep=true run.name=imported")
"""The runs that they make are there the second time."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a log of 40 users and 30 items, and a configuration of a small FM."""
    rng = np.random.default_rng(5)
    rows = [(f"u{u}", f"i{i}") for u in range(40) for i in rng.choice(30, 10, replace=False)]
    pd.DataFrame(rows, columns=["user", "item"]).to_csv(tmp_path / "rows.csv", index=False)
    features = [{"name": name, "entity": name} for name in ("user", "item")]
    config = {
        "run": {
            "name": "it",
            "runs_root": str(tmp_path / "runs"),
            "prepared_root": str(tmp_path / "prepared"),
            "loggers": [],
        },
        "data": {
            "root": str(tmp_path),
            "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
            "features": features,
            "split": {"method": "random", "valid": 0.1, "test": 0.1},
        },
        "model": {"embedding_dim": 4, "deep": False, "over_arch_layer_sizes": [4]},
        "trainer": {"loss": "bce", "batch_size": 256, "epochs": 2, "monitor": "auc"},
        "recommend": {"k": 3},
        "tune": {"trials": 1, "space": {"optimizer.tables.lr": [0.1]}},
    }
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(config))
    sizes = [len({row[column] for row in rows}) for column in (0, 1)]
    torch.save(NotebookDeepFM(sizes, 4, (4,)).state_dict(), tmp_path / "notebook.pt")
    return tmp_path


def every_pair(n: int) -> Iterator[int]:
    """A sequence in which each number below ``n`` follows each, itself included.

    Source: Fredricksen and Maiorana, "Necklaces of beads in k colors and k-ary de Bruijn
    sequences", 1978, for words of two.
    """
    for first in range(n):
        yield first
        for second in range(first + 1, n):
            yield from (first, second)
    yield 0


def typed(home: Path, commands: Sequence[str]) -> dict[str, list[int]]:
    """Exit codes by command, in this process; several ranks take one command each time."""
    if os.environ["WORLD_SIZE"] == "1":  # a process that no launcher has started
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    codes: dict[str, list[int]] = {}
    for command in commands:
        _, *arguments = shlex.split(command)
        given = ["--quiet", "--config", str(home / "it.yaml"), *arguments]
        given = [str(home / "notebook.pt") if a == "notebook.pt" else a for a in given]
        codes.setdefault(command, []).append(COMMANDS[command](given))
    return codes


def trained(home: Path) -> dict[str, str]:
    """Hashes of what no later command may change: the checkpoints, and every user's best items."""
    run = home / "runs/it"
    files = [p for p in (run / "checkpoints").rglob("*") if p.is_file()]
    files += [run / "config.yaml", run / "recommendations.parquet", run / "recommendations.csv"]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def check_what_is_there(home: Path) -> None:
    run = home / "runs/it"
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        *("checkpoints", "config.yaml", "export", "metrics.jsonl", "plan.json", "tune"),
        *("predictions.parquet", "report.html", "report-valid.html"),
        *(
            f"{name}.{ending}"
            for name in ("recommendations", "recommendations-k2-users", "similar_items")
            for ending in ("csv", "parquet")
        ),
    }
    assert not [p for p in home.rglob(".*") if p.name.endswith((".lock", ".parts"))]
    assert len(pd.read_csv(run / "recommendations.csv")) == 40 * 3
    assert pd.read_csv(run / "recommendations-k2-users.csv")["user"].tolist() == [
        *("u1", "u1", "u2", "u2")
    ]
    for name, split in (("report.html", "test"), ("report-valid.html", "valid")):
        page = (run / name).read_text()
        assert f"{split} split" in page or f"{split} rows" in page
        assert "learning-log_loss" in page  # the curves, whatever else the log holds


def test_every_command_after_every_other_on_one_run(home: Path) -> None:
    names = list(COMMANDS)
    order = [names[place] for place in every_pair(len(names))]
    assert {*itertools.pairwise(order)} == {(a, b) for a in names for b in names}
    assert run_alone(typed, home, ["train", "recommend"]) == {"train": [0], "recommend": [0]}
    before = trained(home)
    codes = run_alone(typed, home, order, timeout_s=600)
    for command in ONCE:
        assert codes.pop(command) == [0] + [2] * (len(names) - 1)
    assert {code for of_command in codes.values() for code in of_command} == {0}
    assert trained(home) == before
    check_what_is_there(home)
    events = read_events(home / "runs/it/metrics.jsonl")
    evaluated = [e.split for e in events if isinstance(e, EvaluateEvent)]
    assert (evaluated.count("test"), evaluated.count("valid")) == (len(names),) * 2
    assert len([e for e in events if isinstance(e, RecommendEvent)]) == 2 * len(names) + 1


def test_commands_twice_and_in_reverse_on_two_ranks(home: Path) -> None:
    names = [name for name in COMMANDS if name not in ("export", "tune")]
    run_ranks(typed, 2, home, ["train"])
    run_alone(typed, home, ["export", "tune"])
    run_ranks(typed, 2, home, ["recommend"])
    before = trained(home)
    for command in [*names, *reversed(names)]:
        codes = [0, 2] if command in ONCE else [0]
        for of_rank in run_ranks(typed, 2, home, [command]):
            assert of_rank[command][0] in codes, command
    assert trained(home) == before
    check_what_is_there(home)


def test_the_commands_themselves_in_any_order(home: Path, forked: dict[str, str]) -> None:
    """As typed, on one and two ranks, with a service between them."""
    environment = {**os.environ, **forked, "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}
    config = ["--config", str(home / "it.yaml")]
    python = forked["PYTHON_EXEC"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def run(name: str, *arguments: str, ranks: int = 1) -> str:
        launcher = torchrun if ranks > 1 else []
        command = [python, *launcher, "-m", f"deepfm_dist.{name}", *config, *arguments]
        done = subprocess.run(
            command, cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    run("train", ranks=2)
    run("recommend", ranks=2)
    before = trained(home)
    assert "Run already finished" in run("train")
    run("evaluate", ranks=2)
    serve = [python, "-m", "deepfm_dist.serve", *config, "--port", "8431"]
    service = subprocess.Popen(serve, cwd=home, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert _answer("http://127.0.0.1:8431/users/u1/recommendations?k=2")
    finally:
        service.terminate()
        service.wait(60)
    run("evaluate")
    assert trained(home) == before


def _answer(url: str) -> object:
    for _ in range(600):
        try:
            with urlopen(url) as response:
                return json.load(response)
        except URLError:
            time.sleep(0.2)
    raise AssertionError(f"{url}: no answer")
