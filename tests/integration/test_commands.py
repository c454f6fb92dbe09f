"""The real commands, started as the README shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
QUICK = ["trainer.max_steps=20", "model.over_arch_layer_sizes=[8]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_whole_job_from_an_empty_folder(home: Path) -> None:
    train = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "deepfm_dist.train", *QUICK]
    done = run(train, home)
    assert done.returncode == 0, done.stderr
    assert "sharding plan on 2 x cpu" in done.stderr
    assert (home / "runs/sample/checkpoints/step_00000020/state.json").is_file()
    done = run(["python", "-m", "deepfm_dist.evaluate"], home)
    assert done.returncode == 0, done.stderr
    assert "popularity" in done.stdout
    done = run([*train[:-3], "deepfm_dist.recommend", "recommend.k=3"], home)
    assert done.returncode == 0, done.stderr
    assert "700 users, 2,100 rows" in done.stdout
    rows = home / "rows.csv"
    rows.write_text("user,item\n4,276\nnobody,276\n")
    done = run(["python", "-m", "deepfm_dist.predict", "--input", str(rows)], home)
    assert done.returncode == 0, done.stderr
    assert "2 rows scored" in done.stdout
    assert "1 ids were never seen in training" in done.stderr
    events = [json.loads(x) for x in (home / "runs/sample/metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["valid", "train", "end", "evaluate"]


def test_asking_for_another_model_than_was_trained_is_refused(home: Path) -> None:
    done = run(["python", "-m", "deepfm_dist.recommend", "model.embedding_dim=8"], home)
    assert done.returncode == 2
    assert "embedding_dim=8" in done.stderr
    assert "was trained with 16" in done.stderr


def test_a_mistake_on_every_rank_is_said_once(home: Path) -> None:
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "deepfm_dist.train"]
    done = run([*command, "trainer.batch_size=1"], home)
    assert done.returncode != 0
    said = [x for x in done.stderr.splitlines() if x.startswith("ConfigError: a batch of 1 rows")]
    assert len(said) == 1
    # The earlier run is untouched.
    assert (home / "runs/sample/checkpoints/step_00000020/state.json").is_file()
