"""Preparation on Spark: the bytes of local preparation, whatever fails on the way."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deepfm_dist.config import load_config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation import job, local
from deepfm_dist.data.preparation.cluster import Record, Task, prepare_on
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from deepfm_dist.storage import folder_of
from tests.data.preparation.cluster_cases import CASES, files_of, write_inputs
from tests.launch.s3 import clients_of, s3_server

pytest.importorskip("pyspark", reason="pyspark is missing (requirements/launch.txt)")
pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(
        shutil.which("java") is None and "JAVA_HOME" not in os.environ,
        reason="Java is missing (apt-get install openjdk-17-jre-headless)",
    ),
]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/spark_prepare.py"
FAST = ["spark.sql.adaptive.enabled=false", "spark.ui.enabled=false"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("cluster") / "in")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spark_prepare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def s3() -> Iterator[Path]:
    """A bucket; Spark's workers have the variables of the process that started them."""
    for needed in ("moto", "s3fs", "upath"):
        pytest.importorskip(needed, reason=f"{needed} is missing (requirements/launch.txt)")
    with s3_server() as (_, port), clients_of(port):
        bucket = folder_of("s3://bucket")
        bucket.mkdir()
        yield bucket


@pytest.fixture(scope="module")
def session(script: ModuleType, s3: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the workers
        with script.spark_session(["spark.master=local[2,4]", *FAST]) as session:
            yield session


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", 3_000)


@pytest.mark.parametrize("case", CASES)
def test_spark_prepares_the_bytes_that_threads_prepare(
    case: str,
    inputs: Path,
    tmp_path: Path,
    script: ModuleType,
    session: Any,
    partitioned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(inputs)
    data, engine = DataConfig.model_validate(CASES[case]), script.Spark(session)
    manifest = local.prepare(data, inputs, tmp_path / "threads", seed=4)
    local.prepare(data, inputs, tmp_path / "spark", seed=4, build=partial(prepare_on, engine))
    assert manifest.files > 1
    threads, spark = (files_of(tmp_path / name) for name in ("threads", "spark"))
    assert [name for name in threads if threads[name] != spark.get(name)] == []
    assert threads.keys() == spark.keys()


def dying(task: Task, folder: str, stage: int, records: Iterator[Record]) -> Iterator[Record]:
    """A task whose process ends at its first record of each kind, once."""
    for record in task(records):
        yield record
        try:
            (Path(folder) / f"{stage} {record.kind}").touch(exist_ok=False)
        except FileExistsError:
            continue
        os._exit(9)


def test_tasks_that_are_killed_change_nothing(
    inputs: Path,
    tmp_path: Path,
    script: ModuleType,
    session: Any,
    partitioned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    stages, records_map = iter(range(1000)), script.SparkRecords.map

    def deadly_map(records: Any, task: Task) -> Any:
        return records_map(records, partial(dying, task, str(killed), next(stages)))

    monkeypatch.setattr(script.SparkRecords, "map", deadly_map)
    build = partial(prepare_on, script.Spark(session))
    data = DataConfig.model_validate(CASES["temporal"])
    local.prepare(data, inputs, tmp_path / "threads", seed=4)
    local.prepare(data, inputs, tmp_path / "spark", seed=4, build=build)
    kinds = {path.name.split()[1] for path in killed.iterdir()}
    assert {"rows", "texts", "part", "digits", "counts", "written"} <= kinds
    assert files_of(tmp_path / "threads") == files_of(tmp_path / "spark")


def test_input_and_output_lie_in_an_object_store(
    s3: Path, tmp_path: Path, script: ModuleType, session: Any
) -> None:
    for file in (ROOT / "data/sample").glob("*.?sv"):
        (s3 / "input" / file.name).write_bytes(file.read_bytes())
    given = [f"data.root={s3 / 'input'}", f"run.prepared_root={tmp_path}"]
    config = load_config("sample", given)
    local.prepare(config.data, config.input_root, tmp_path / "local", config.data_seed)
    script.prepare_on_spark(config, session, s3 / "out")
    remote: Any = s3 / "out"
    names = [f.removeprefix(f"{remote.path}/") for f in remote.fs.find(remote.path)]
    local_files = files_of(tmp_path / "local")
    assert sorted(names) == sorted(local_files)
    assert {name: (s3 / "out" / name).read_bytes() for name in names} == local_files
    config = load_config("sample", [given[0], f"run.prepared_root={s3}", "data.name=out"])
    again = script.prepare_on_spark(config, session)
    assert again.fingerprint == Manifest.read(tmp_path / "local").fingerprint
    other = load_config("sample", [*given, "data.split.test=0.3"])
    with pytest.raises(DataError, match="holds a dataset of other inputs or settings"):
        script.prepare_on_spark(other, session, s3 / "out")


def call(command: list[str], *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*command, str(SCRIPT), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_both_ways_to_start_it_work_and_a_bad_cell_is_one_line(tmp_path: Path) -> None:
    submit = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]"]
    done = call(submit, "--quiet", f"run.prepared_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / "sample").splits["train"].rows == 28_798
    for file in (ROOT / "data/sample").glob("*.?sv"):
        shutil.copy(file, tmp_path)
    with (tmp_path / "train_ratings.csv").open("a") as file:
        file.write("1,2,yesterday\n")
    done = call([sys.executable], f"data.root={tmp_path}", f"run.prepared_root={tmp_path / 'p'}")
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("DataError: ")
    assert "train_ratings.csv, line 36007" in line and "'yesterday'" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p/sample").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = call([sys.executable], "--spark", "driver.memory=4g")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "ConfigError: --spark driver.memory=4g: write KEY=VALUE, such as spark.driver.memory=4g"
    )
