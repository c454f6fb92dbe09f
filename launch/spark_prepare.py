"""Prepares a dataset on Spark: the one that `python -m deepfm_dist.prepare` makes, byte for byte.

    python launch/spark_prepare.py --config mine.yaml
    spark-submit --master yarn launch/spark_prepare.py --config mine.yaml --output s3://bucket/mine

Spark moves records and runs failed tasks again; what tasks do is in
`deepfm_dist.data.preparation.cluster`. Every machine of the cluster needs the package.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from deepfm_dist.cli import run
from deepfm_dist.config import Config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.cluster import BATCH_RECORDS, Record, Task, in_arrow, prepare_on
from deepfm_dist.data.preparation.job import Job
from deepfm_dist.errors import ConfigError, EnvironmentProblem
from deepfm_dist.jobs.prepare import prepare
from deepfm_dist.storage import folder_of, is_remote

SCHEMA = "kind string, key long, source long, piece int, more boolean, payload binary"
DEFAULTS = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(BATCH_RECORDS),
    "spark.ui.showConsoleProgress": "false",
}
ON_THIS_MACHINE = {
    "spark.app.name": "deepfm prepare",
    "spark.master": "local[*,4]",  # a task may fail three times, as on a cluster
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}
"""Settings of a session that spark-submit has not started."""


class SparkRecords:
    """`Record` s as the rows of a data frame."""

    def __init__(self, frame: Any) -> None:
        self.frame = frame

    def map(self, task: Task) -> "SparkRecords":
        """What a task makes of the records of each partition."""
        return SparkRecords(self.frame.mapInArrow(partial(in_arrow, task), SCHEMA))

    def only(self, *kinds: str) -> "SparkRecords":
        """Those of some kinds, and errors."""
        return SparkRecords(self.frame.where(self.frame["kind"].isin(*kinds, "error")))

    def by_key(self, n: int) -> "SparkRecords":
        """In ``n`` partitions by key, each ordered by key, source and piece."""
        return SparkRecords(
            self.frame.repartition(n, "key").sortWithinPartitions("key", "source", "piece")
        )

    def kept(self) -> "SparkRecords":
        """The same, computed once, on the disks of the cluster."""
        from pyspark import StorageLevel

        frame = self.frame.persist(StorageLevel.DISK_ONLY)
        frame.count()
        return SparkRecords(frame)

    def stream(self) -> Iterator[Record]:
        """All records, a partition at a time in the driver."""
        return (record_of(row) for row in self.frame.toLocalIterator())

    def collect(self) -> Iterator[Record]:
        """All records."""
        return map(record_of, self.frame.collect())

    def release(self) -> None:
        """Deletes what is kept."""
        self.frame.unpersist()


class Spark:
    """Runs tasks on Spark.

    Args:
        session: a classic one; Spark Connect has no broadcasts.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def numbers(self, n: int) -> SparkRecords:
        """An empty record for each key from 0 to ``n - 1``, each in its own partition."""
        frame = self._session.range(0, n, 1, n)
        constants = "'' kind", "id key", "0L source", "0 piece", "false more", "binary('') payload"
        return SparkRecords(frame.selectExpr(*constants))

    def share(self, value: Any) -> Callable[[], Any]:
        """Broadcasts a value."""
        return partial(attrgetter("value"), self._session.sparkContext.broadcast(value))


def record_of(row: Any) -> Record:
    """A row of a data frame."""
    return Record(*row[:-1], payload=bytes(row["payload"]))


@contextmanager
def spark_session(settings: Sequence[str]) -> Iterator[Any]:
    """A session with the settings of ``--spark`` and spark-submit; on this machine by default.

    Raises:
        ConfigError: a setting is not KEY=VALUE.
        EnvironmentProblem: pyspark or Java is missing.
    """
    try:
        from pyspark.errors import PySparkRuntimeError, PythonException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise EnvironmentProblem(
            f"Spark is not installed ({error}); pip install 'deepfm-dist[spark]'"
        ) from None
    # Nothing here becomes a pandas frame.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # spark-submit has started Spark with its own settings, which are not to be overwritten.
    chosen = DEFAULTS if "PYSPARK_GATEWAY_PORT" in os.environ else DEFAULTS | ON_THIS_MACHINE
    chosen = chosen | dict(_setting(text) for text in settings)
    try:
        session = SparkSession.builder.config(map=chosen).getOrCreate()
    except PySparkRuntimeError as error:
        raise EnvironmentProblem(
            f"Spark does not start ({error}); it needs Java 17 or later: install it, or set "
            f"JAVA_HOME"
        ) from None
    session.sparkContext.setLogLevel("ERROR")
    try:
        yield session
    except PythonException as error:
        if "No module named 'deepfm_dist'" not in str(error):
            raise
        raise EnvironmentProblem(
            "a machine of the cluster does not have this package: install deepfm-dist there, or "
            "hand an environment to spark-submit (--archives)"
        ) from None
    finally:
        session.stop()


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.startswith("spark.") and equals):
        raise ConfigError(f"--spark {text}: write KEY=VALUE, such as spark.driver.memory=4g")
    return name, value


def prepare_on_spark(config: Config, session: Any, output: Path | None = None) -> Manifest:
    """Prepares the data on Spark, or finds them up to date.

    Args:
        config: what to prepare.
        session: of Spark.
        output: where the dataset goes if not below ``run.prepared_root``; may be behind a URL.

    Raises:
        ConfigError: a setting does not fit the data.
        DataError: an input file cannot be used.
    """

    def build(job: Job, wanted: str) -> Manifest:
        return prepare_on(Spark(session), job, wanted, output)

    if output is None and is_remote(config.prepared_dir):
        output = config.prepared_dir
    if output is None:
        return prepare(config, build=build)
    with tempfile.TemporaryDirectory() as folder:  # for what the driver writes
        run_settings = config.run.model_copy(update={"prepared_root": folder})
        config = config.model_copy(update={"run": run_settings})
        return prepare(config, build=build, destination=output)


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    output = None if arguments.output is None else folder_of(arguments.output)
    with spark_session(arguments.spark) as session:
        prepare_on_spark(config, session, output)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.prog = "python launch/spark_prepare.py"
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder of the dataset, or its URL, that all machines of the cluster reach (default: "
        "run.prepared_root/NAME)",
    )
    parser.add_argument(
        "--spark",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of Spark, such as spark.driver.memory=4g; may be given several times",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    description = "Turn input files into a prepared dataset on Spark."
    return run("prepare", description, _prepare, argv, _add_arguments)


if __name__ == "__main__":
    sys.exit(main())
