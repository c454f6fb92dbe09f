"""Runs and data in an object store: a real S3 server, its connection cut in a save."""

import gzip
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist import lock, nightly, recommend, serve, train, tune
from deepfm_dist.build import shard_for_inference
from deepfm_dist.cli import config_of_run
from deepfm_dist.config import load_config, with_settings
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.remote import local_copy
from deepfm_dist.data.sources import Column, find_files, read_table
from deepfm_dist.distributed import checkpoint
from deepfm_dist.distributed.part_files import PartFolder
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import CheckpointError, ConfigError, DataError, DeepFMError
from deepfm_dist.events import EndEvent, TrainEvent, ValidEvent
from deepfm_dist.jobs.prepare import prepare
from deepfm_dist.jobs.train import train as train_run
from deepfm_dist.log import MetricsLog
from deepfm_dist.storage import atomic_write, delete_tree, folder_of, follow_pointer
from tests.launch.s3 import clients_of, s3_server
from tests.metrics_lines import lines
from tests.ranks import RankFailed, run_in_fork, run_ranks
from tests.serving.shop import shop
from tests.steps import SMALL, Run, config_of, difference

for needed in ("moto", "s3fs", "upath"):
    pytest.importorskip(needed, reason=f"{needed} is missing (requirements/launch.txt)")
pytestmark = pytest.mark.launch  # brings up a server

ROOT = Path(__file__).parents[2]


class Wire:
    """A way to a server that can be cut.

    Args:
        server: host and port that connections lead to.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._cut_at: bytes | None = None
        self.is_cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, text: str) -> None:
        """Cuts all connections in the middle of the first request in which a text stands."""
        self._cut_at = text.encode()

    def mend(self) -> None:
        """Lets connections through again."""
        self._cut_at = None
        self.is_cut.clear()

    def _accept(self) -> None:
        while True:
            client = self._listener.accept()[0]
            if self.is_cut.is_set():
                client.close()
                continue
            server = socket.create_connection(self._server)
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while block := one.recv(1 << 16):
                if self._cut_at is not None and self._cut_at in block:
                    self.is_cut.set()
                if self.is_cut.is_set():
                    other.sendall(block[: len(block) // 2])
                    break
                other.sendall(block)
        except OSError:
            pass
        finally:
            for end in (one, other):
                end.close()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """The way to a new S3 server with one bucket; clients find it by the usual variables."""
    with s3_server() as address:
        way = Wire(address)
        with clients_of(way.port):
            folder_of("s3://bucket").mkdir()
            yield way


@pytest.fixture
def runs(wire: Wire, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the bucket."""
    yield folder_of(f"s3://bucket/{request.node.name}")
    wire.mend()


def _state(step: int) -> dict[str, Any]:
    return {"config": {"data": {}, "model": {}}, "vocabulary_hash": "", "trainer": {"step": step}}


def _saved(folder: Path, run_dir: str) -> list[float]:
    """Losses of steps 1 to 20; checkpoints of 5 and 10 are written meanwhile."""
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        checkpoints = checkpoint.Checkpoints(folder_of(run_dir), world, keep_last=1)
        losses: list[float] = []
        for step in (5, 10):
            losses += run.losses(step - 4, step)
            checkpoints.save(step, run.sharded, run.optimizer, _state(step))
        losses += run.losses(11, 20)
        checkpoints.wait()
        return losses


def _resumed(folder: Path, run_dir: str) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        path = checkpoint.find_checkpoint(folder_of(run_dir))
        checkpoint.load(path, world, run.sharded, run.optimizer)
        return run.losses(11, 20)


def test_a_checkpoint_is_read_at_another_world_size(sample: PreparedDataset, runs: Path) -> None:
    whole = run_ranks(_saved, 4, sample.folder, str(runs))[0]
    assert checkpoint.complete_steps(runs) == [10]
    assert [p.name for p in (runs / "checkpoints").iterdir()] == ["step_00000010"]
    for size in (1, 2, 4):
        resumed = run_ranks(_resumed, size, sample.folder, str(runs))[0]
        assert difference(resumed, whole[10:]) <= 1e-6, size


def _cut_while_saving(folder: Path, run_dir: str) -> str:
    import s3fs

    s3fs.S3FileSystem.retries = 2  # seconds instead of half a minute
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        run.save(folder_of(run_dir), 3)
        with pytest.raises(CheckpointError) as caught:
            run.save(folder_of(run_dir), 4)
        return str(caught.value)


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "state.json.part"])
def test_a_cut_in_a_save_is_one_line_and_leaves_the_checkpoint_before(
    sample: PreparedDataset, wire: Wire, runs: Path, file: str
) -> None:
    wire.cut_at(f"step_00000004/{file}")
    said = run_ranks(_cut_while_saving, 2, sample.folder, str(runs))
    assert wire.is_cut.is_set()
    wire.mend()
    for message in said:
        assert message.startswith(f"{checkpoint.checkpoint_path(runs, 4)}: cannot be written: ")
        assert "\n" not in message
    assert checkpoint.complete_steps(runs) == [3]
    run_ranks(_loaded, 1, sample.folder, str(checkpoint.find_checkpoint(runs)))


def _loaded(folder: Path, path: str) -> None:
    with process_group("cpu") as world:
        sharded = shard_for_inference(config_of(*SMALL), PreparedDataset(folder).manifest, world)
        checkpoint.load(folder_of(path), world, sharded)


def _part(part: int) -> pa.Table:
    return pa.table({"id": np.arange(part, part + 9)})


def _written_in_parts(folder: str) -> list[int]:
    """Each rank writes every other of four parts, if it is missing; parts that were there."""
    import s3fs

    s3fs.S3FileSystem.retries = 2  # seconds instead of half a minute
    with process_group("cpu") as world:
        parts = PartFolder(folder_of(folder), {"weights": 1}, world, "scores")
        for part in range(world.rank, 4, world.world_size):
            if part not in parts.present:
                parts.write(part, _part(part).schema, [_part(part)])
        parts.finish(4, {"rows": 36})
        return sorted(parts.present)


def test_parts_are_written_by_their_ranks_and_a_cut_costs_only_those_that_are_missing(
    wire: Wire, runs: Path
) -> None:
    wire.cut_at("part-000002.parquet")
    with pytest.raises(RankFailed, match=r"DeepFMError: .*/part-000002.parquet: cannot be used: "):
        run_ranks(_written_in_parts, 1, str(runs / "out"))
    wire.mend()
    assert sorted(p.name for p in (runs / "out").iterdir()) == [
        "_inputs.json",
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    assert run_ranks(_written_in_parts, 2, str(runs / "out")) == [[0, 1], [0, 1]]
    assert json.loads((runs / "out/_SUCCESS").read_text()) == {"parts": 4, "rows": 36}
    for part in range(4):
        with (runs / f"out/part-{part:06}.parquet").open("rb") as file:
            assert pq.read_table(file).equals(_part(part))


def test_damage_is_found(sample: PreparedDataset, runs: Path) -> None:
    run_ranks(_saved, 1, sample.folder, str(runs))
    path = checkpoint.find_checkpoint(runs)
    file = path / "__0_0.distcp"
    whole = file.read_bytes()
    for damage, what in ((whole[:-1] + b"?", "damaged: its checksum"), (None, "cannot be read")):
        file.unlink() if damage is None else file.write_bytes(damage)
        with pytest.raises(AssertionError, match=rf"CheckpointError: {file}: {what}"):
            run_ranks(_loaded, 1, sample.folder, str(path))


def test_figures_are_written_again_with_each_checkpoint(runs: Path, wire: Wire) -> None:
    log = MetricsLog(runs, is_first=True, from_step=0)
    log.write(TrainEvent(step=1))
    assert log.path.read_text() == ""
    log.flush()
    log.write(TrainEvent(step=2))
    log.write(ValidEvent(step=2))
    assert [json.loads(x)["step"] for x in log.path.read_text().splitlines()] == [1, 2, 2]
    log = MetricsLog(runs, is_first=True, from_step=1)
    log.write(EndEvent(step=3))
    assert [json.loads(x)["step"] for x in log.path.read_text().splitlines()] == [1, 3]


def test_data_are_found_by_pattern_and_read_as_from_a_disk(runs: Path) -> None:
    texts = {"day1.csv": "user,item\n1,a\n2,b\n", "day2.csv.gz": "user,item\n3,c\n", "x.csv": ""}
    for name, text in texts.items():
        packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (runs / name).write_bytes(packed)
    actual = find_files(str(runs), "day*")
    assert [(f.name, f.path) for f in actual] == [(n, f"{runs}/{n}") for n in [*texts][:2]]
    columns = [Column("item"), Column("user", "number")]
    tables = [read_table(file.path, columns) for file in actual]
    assert [t.to_pylist() for t in tables] == [
        [{"item": "a", "user": 1.0}, {"item": "b", "user": 2.0}],
        [{"item": "c", "user": 3.0}],
    ]
    (runs / "day1.csv").write_text("user,item\n1,a\n2,c\n")  # of the same length
    [changed, kept] = find_files(str(runs), "day*")
    assert (changed.stamp != actual[0].stamp, kept.stamp) == (True, actual[1].stamp)
    with pytest.raises(DataError, match=r"no such file; is data\.root right"):
        find_files(str(runs), "night*")


def test_prepared_data_cut_on_their_way_are_complete_or_not_there(
    tmp_path: Path, runs: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)  # seconds instead of half a minute
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    config = load_config("sample", [f"run.prepared_root={runs}", f"run.cache_root={tmp_path}/a"])
    folder, part = runs / "sample", "sample/train/part-00000.parquet"
    wire.cut_at(part)
    with pytest.raises(DeepFMError, match=r"sample: cannot be used: [^\n]*network$"):
        prepare(config)
    assert wire.is_cut.is_set()
    wire.mend()
    assert Manifest.find(folder) is None
    manifest = prepare(config)
    wire.cut_at(part)
    with pytest.raises(DeepFMError, match=r"sample: cannot be used: [^\n]*network$"):
        local_copy(folder, tmp_path / "b")
    wire.mend()
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file()]
    made, copy = local_copy(folder, tmp_path / "a"), local_copy(folder, tmp_path / "b")
    assert copy == tmp_path / "b/s3/bucket" / runs.name / "sample"
    assert PreparedDataset(copy).manifest == manifest
    for name in manifest.sums:
        assert (copy / name).read_bytes() == (made / name).read_bytes()


def test_a_file_that_was_written_here_is_there(runs: Path) -> None:
    with atomic_write(runs / "trace[0]*.json") as file:
        file.write_text("{}")
        assert not (runs / "trace[0]*.json").exists()
    assert (runs / "trace[0]*.json").read_text() == "{}"
    delete_tree(runs)
    assert not (runs / "trace[0]*.json").exists()


def test_what_is_not_there_is_one_line(runs: Path) -> None:
    with pytest.raises(DeepFMError, match="s3://nowhere/x: cannot be used: The specified bucket"):
        MetricsLog(folder_of("s3://nowhere/x"), is_first=True, from_step=0)
    with pytest.raises(ConfigError, match=r"nope://x: cannot be opened \(.*universal-pathlib"):
        folder_of("nope://x")


def _command(main: Callable[[list[str]], int], *words: str) -> int:
    import s3fs

    s3fs.S3FileSystem.retries = 2  # seconds instead of half a minute
    lock.STALE_S = 0.5
    return main(["--quiet", *words])


def _cut(wire: Wire, at: str, capfd: Any, main: Any, *words: str) -> str:
    """The error line of a command whose connection is cut."""
    capfd.readouterr()
    wire.cut_at(at)
    assert run_in_fork(_command, main, *words) == 2
    assert wire.is_cut.is_set()
    wire.mend()
    [line] = [x for x in capfd.readouterr().err.splitlines() if "Error: " in x]
    return str(line)


def test_a_search_and_parts_survive_a_cut(
    tmp_path: Path, runs: Path, wire: Wire, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shop.yaml").write_text(shop(tmp_path).to_yaml())
    config, cache = ["--config", str(tmp_path / "shop.yaml")], f"run.cache_root={tmp_path / 'c'}"
    search = [*config, cache, "tune={trials: 2, space: {optimizer.tables.lr: [0.01, 0.3]}}"]
    search += ["trainer.max_steps=2", "data.split.valid=0.2"]
    local = [*search, "run.name=local"]
    remote = [*search, "run.name=remote", f"run.prepared_root={runs}"]
    assert run_in_fork(_command, tune.main, *local) == 0
    expected = capfd.readouterr().out.partition("written:")[0]
    assert expected.count("complete") == 2
    line = _cut(wire, "train/part-00000.parquet", capfd, tune.main, *remote)
    assert f"{runs}/remote: cannot be used: " in line
    assert run_in_fork(_command, tune.main, *remote) == 0
    assert capfd.readouterr().out.partition("written:")[0] == expected
    assert run_in_fork(_command, tune.main, *search, f"run.runs_root={runs}") == 2
    assert "needs a local disk" in capfd.readouterr().err

    roots = [f"run.{kind}_root={runs / kind}" for kind in ("runs", "prepared")]
    assert run_in_fork(_command, train.main, *config, *roots, cache, "trainer.max_steps=2") == 0
    run = ["--run", str(runs / "runs/shop"), cache]
    whole, parts = tmp_path / "whole.parquet", runs / "out"
    assert run_in_fork(_command, recommend.main, *run, "--output", str(whole)) == 0
    in_parts = [*run, "--output-parts", str(parts)]
    line = _cut(wire, "out/part-000000.parquet", capfd, recommend.main, *in_parts)
    assert "part-000000.parquet: cannot be used: " in line
    assert not (parts / "_SUCCESS").exists()
    assert run_in_fork(_command, recommend.main, *in_parts) == 0
    assert json.loads((parts / "_SUCCESS").read_text())["parts"] == 1
    with (parts / "part-000000.parquet").open("rb") as file:
        assert pq.read_table(file).to_pylist() == pq.read_table(whole).to_pylist()


def test_a_service_in_a_bucket_answers_while_its_connection_is_cut(
    tmp_path: Path, runs: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from deepfm_dist.serving import following

    monkeypatch.setattr(following, "POLL_S", 0.1)
    monkeypatch.setattr(following, "RETRY_S", 0.2)
    roots = {f"run.{kind}_root": str(runs / kind) for kind in ("runs", "prepared")}
    settings = {**roots, "run.cache_root": str(tmp_path / "cache"), "trainer.max_steps": 2}
    config = shop(tmp_path)
    for name in ("monday", "tuesday"):
        more = {"run.name": name, "data.name": "shop"}
        run_in_fork(train_run, with_settings(config, {**settings, **more}))
        settings["trainer.max_steps"] = 3
    current = runs / "runs/current"
    current.write_text("monday\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--run", str(current), "--port", str(port), f"run.cache_root={tmp_path / 'new'}"]
    line = _cut(wire, "__0_0.distcp", capfd, serve.main, *words)
    assert "s3://bucket/" in line
    service = multiprocessing.get_context("fork").Process(
        target=_command, args=(serve.main, *words)
    )
    service.start()
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def until(done: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline
            with suppress(httpx.TransportError):
                if done():
                    return
            time.sleep(0.05)

    def answer() -> str:
        response = client.get("/users/3/recommendations")
        assert response.status_code == 200
        return str(response.text)

    def health() -> dict[str, Any]:
        return dict(client.get("/healthz").json())

    try:
        until(lambda: client.get("/readyz").status_code == 200)
        before = answer()
        wire.cut_at("runs/current")
        until(lambda: health()["problem"])
        assert answer() == before
        wire.mend()
        until(lambda: not health()["problem"])
        wire.cut_at("tuesday/checkpoints")
        current.write_text("tuesday\n")
        until(lambda: "tuesday: cannot be loaded" in (health()["problem"] or ""))
        assert answer() == before
        wire.mend()
        until(lambda: health()["run"] == "tuesday")
        assert not health()["problem"]
        assert answer() != before
        service.terminate()
        service.join(30)
        assert service.exitcode == 0
    finally:
        service.kill()


def test_a_run_of_and_in_a_bucket_cut_in_a_save_ends_as_a_local_one(
    tmp_path: Path, runs: Path, wire: Wire
) -> None:
    for file in (ROOT / "data/sample").glob("*.?sv"):
        (runs / "data" / file.name).write_bytes(file.read_bytes())
    options = ["trainer={max_steps: 40, log_every_steps: 20}", "checkpoint.every_steps=10"]

    def train(home: Path, world: int, *more: str) -> "subprocess.Popen[str]":
        home.mkdir(exist_ok=True)
        torchrun = ["torch.distributed.run", f"--nproc_per_node={world}", "--max-restarts=1"]
        return subprocess.Popen(
            [sys.executable, "-m", *torchrun, "-m", "deepfm_dist.train", *options, *more],
            cwd=home,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    local = train(tmp_path / "local", 2)
    assert local.wait() == 0, local.communicate()[0]
    wire.cut_at("step_00000020/__0_0")
    remote = train(
        tmp_path / "remote", 2, f"run.runs_root={runs / 'runs'}", f"data.root={runs / 'data'}"
    )
    assert wire.is_cut.wait(120)
    assert remote.stdout is not None
    output = ""
    for line in remote.stdout:  # until the ranks give up
        output += line
        if "CheckpointError" in line:
            break
    wire.mend()
    output += remote.communicate()[0]
    assert remote.returncode == 0, output
    assert "step_00000020: cannot be written" in output
    assert "resuming training after step 10" in output
    assert not (tmp_path / "remote/runs").exists()
    assert lines(runs) == lines(tmp_path / "local")


def _clicks(day: int) -> str:
    """A day's log: clicks on even items, some of them by chance."""
    rng, n = np.random.default_rng(day), 300
    users, items = rng.integers(0, 30, n), rng.integers(0, 20, n)
    clicks = (items % 2 == 0) ^ (rng.random(n) < 0.1)
    times = 1793491200 + 86400 * day + 288 * np.arange(n)
    rows = zip(clicks.astype(int), users, items, times, strict=True)
    return "click,user,item,time\n" + "".join(f"{c},{u},{i},{t}\n" for c, u, i, t in rows)


def _night(settings: list[str], day: str) -> int:
    import s3fs

    s3fs.S3FileSystem.retries = 2  # seconds instead of half a minute
    return nightly.main(["--quiet", *settings, "--day", day])


def _recommended(pointer: str, cache: Path) -> list[tuple[int | str, float]]:
    """What the service has for a user, with the model that a pointer names."""
    import s3fs

    s3fs.S3FileSystem.retries = 2
    overrides = [f"run.cache_root={cache}"]
    config = config_of_run(follow_pointer(folder_of(pointer)), overrides)
    scored = serve._loaded(config, overrides).recommend("3", 5)
    return [(one.card.id, one.score) for one in scored]


def _nightly_settings(cache: Path) -> dict[str, Any]:
    return {
        "run": {"name": "mine", "loggers": [], "cache_root": str(cache)},
        "data": {
            "task": "ctr",
            "interactions": {
                "user": "user", "item": "item", "label": "click", "time": "time",
                "file": "{day-1..day}.csv",
            },
            "features": [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}],
            "split": {"method": "temporal", "valid": 0.1, "test": 0.1},
        },
        "model": {"embedding_dim": 4, "deep": False, "linear": "none"},
        "trainer": {"epochs": 4, "batch_size": 64},
        "checkpoint": {"every_steps": 3},
        "nightly": {"tolerance": 0.5},
    }  # fmt: skip


def test_nights_and_a_service_in_a_bucket_survive_a_cut_in_each(
    tmp_path: Path, runs: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    local = tmp_path / "local"
    (local / "logs").mkdir(parents=True)
    for day in (1, 2):
        for folder in (runs / "logs", local / "logs"):
            (folder / f"2026-11-0{day}.csv").write_text(_clicks(day))
    (tmp_path / "mine.yaml").write_text(json.dumps(_nightly_settings(tmp_path / "cache")))
    where = {
        home: [
            *("--config", str(tmp_path / "mine.yaml"), f"data.root={home / 'logs'}"),
            *(f"run.{kind}_root={home / kind}" for kind in ("runs", "prepared")),
        ]
        for home in (local, runs)
    }
    for home in where:
        assert run_in_fork(_night, where[home], "2026-11-01") == 0
    assert run_in_fork(_night, where[local], "2026-11-02") == 0
    capfd.readouterr()
    for cut in ("2026-11-02/checkpoints/step_00000012/", "mine/nights.csv"):
        wire.cut_at(cut)
        assert run_in_fork(_night, where[runs], "2026-11-02") == 2
        assert wire.is_cut.is_set()
        wire.mend()
        said = capfd.readouterr().err
        assert "Traceback" not in said
        assert (runs / "runs/mine/current").read_text() == "2026-11-01\n"
    assert run_in_fork(_night, where[runs], "2026-11-02") == 0
    nights = [
        [line.rpartition(",")[0] for line in (home / "runs/mine/nights.csv").read_text().split()]
        for home in where
    ]
    assert nights[0] == nights[1]
    assert (runs / "runs/mine/current").read_text() == "2026-11-02\n"

    pointers = [f"{home / 'runs/mine/current'}" for home in where]
    expected = run_in_fork(_recommended, pointers[0], tmp_path / "cache")
    wire.cut_at("__0_0.distcp")
    with pytest.raises(RankFailed, match=r"(CheckpointError|DeepFMError): s3://bucket/[^\n]*$"):
        run_in_fork(_recommended, pointers[1], tmp_path / "fresh")
    wire.mend()
    assert run_in_fork(_recommended, pointers[1], tmp_path / "fresh") == expected
    copies = {p.name for p in (tmp_path / f"fresh/s3/bucket/{runs.name}").iterdir()}
    assert copies == {"prepared", "runs"}  # nothing else is left on this machine
    assert {path.name for path in tmp_path.iterdir()} == {"local", "mine.yaml", "cache", "fresh"}
