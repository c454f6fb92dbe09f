"""How long preparation takes and how much memory it needs, by the number of rows.

Generated interactions of up to 1 M users and 100 k items, a twentieth of each user's rows held out
for validation and a tenth for the test, go from csv to a finished dataset; or files of one's own
under a configuration.

    python benchmarks/prepare.py --rows 10000000
    python benchmarks/prepare.py --rows 10000000 --threads 1 --users 4000000
    python benchmarks/prepare.py --rows 20000000 --one-partition
    python benchmarks/prepare.py --config my.yaml
"""

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

BLOCK_ROWS = 4_000_000
CONFIG = """
run: {{name: generated, prepared_root: {folder}/prepared}}
data:
  root: {folder}
  interactions: {{file: "rows-*.csv", user: user, item: item, time: time}}
  features: [{{name: user, entity: user}}, {{name: item, entity: item}}]
  split: {{method: per_user, valid: 0.05, test: 0.1}}
"""


def generate(folder: Path, rows: int, users: int, items: int) -> None:
    """Writes ``rows`` interactions: users alike, items by a power law, in the order of time."""
    rng = np.random.default_rng(1)
    weights = (np.arange(items) + 20.0) ** -1.1
    bounds = np.cumsum(weights) / weights.sum()
    for number, begin in enumerate(range(0, rows, BLOCK_ROWS)):
        n = min(BLOCK_ROWS, rows - begin)
        table = pa.table(
            {
                "user": rng.integers(0, users, n),
                "item": np.searchsorted(bounds, rng.random(n)),
                "time": 1_500_000_000 + begin + np.arange(n),
            }
        )
        pa.csv.write_csv(table, folder / f"rows-{number:03d}.csv")


def measure(arguments: list[str], one_partition: bool) -> None:
    """Prepares in this process alone; prints wall and CPU seconds without the start."""
    import deepfm_dist.data.preparation.local  # noqa: F401
    from deepfm_dist.data.preparation import job
    from deepfm_dist.prepare import main

    if one_partition:
        job.MOST_PARTITIONS = 1
    begun, cpu = time.perf_counter(), time.process_time()
    main([*arguments, "--quiet"])
    print(time.perf_counter() - begun, time.process_time() - cpu)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder that others write to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


class DiskWatch(threading.Thread):
    """Measures a folder repeatedly and keeps the maximum."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak_bytes, self.done = folder, 0, threading.Event()

    def run(self) -> None:
        """Looks until it is done."""
        while not self.done.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, size_of(self.folder))


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, help="rows to generate and prepare")
    parser.add_argument("--config", help="prepare these files instead")
    parser.add_argument("--users", type=int, default=1_000_000, help="generated users")
    parser.add_argument("--items", type=int, default=100_000, help="generated items")
    parser.add_argument("--threads", type=int, help="that share the work (default: the cores)")
    parser.add_argument(
        "--one-partition", action="store_true", help="hold all rows at once, as one partition is"
    )
    parser.add_argument("--folder", help="where to put files (default: the temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    arguments = parser.parse_intermixed_args()
    if arguments.measure:
        given = ["--threads", str(arguments.threads)] if arguments.threads else []
        given += ["--config", arguments.measure, *arguments.overrides]
        measure(given, arguments.one_partition)
        return 0
    if (arguments.rows is None) == (arguments.config is None):
        parser.error("give --rows or --config")
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    print(f"python {platform.python_version()}, pyarrow {pa.__version__}, numba {version('numba')}")
    print(f"command: {shlex.join(sys.argv)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        config = arguments.config
        if config is None:
            begun = time.perf_counter()
            generate(folder, arguments.rows, arguments.users, arguments.items)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"generated {size / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s")
            config = str(folder / "config.yaml")
            Path(config).write_text(CONFIG.format(folder=folder))
        for path in folder.glob("rows-*.csv"):  # as warm for every number of rows that fits
            path.read_bytes()
        command = [sys.executable, __file__, "--measure", config]
        command += ["--one-partition"] * arguments.one_partition
        if arguments.threads:
            command += ["--threads", str(arguments.threads)]
        prepared = folder / "prepared"
        command += [f"run.prepared_root={prepared}", *arguments.overrides]
        watch = DiskWatch(prepared)
        watch.start()
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        watch.done.set()
        watch.join()
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, cpu_seconds = map(float, said.split())
        (made,) = prepared.iterdir()
        manifest = json.loads((made / "manifest.json").read_text())
        result = {
            "rows": sum(s["positives"] for s in manifest["splits"].values())
            + sum(manifest["dropped"].values()),
            "threads": arguments.threads or len(os.sched_getaffinity(0)),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_gib": spent.ru_maxrss / 2**20,
            "disk_gb": watch.peak_bytes / 1e9,
            "dataset_gb": size_of(made) / 1e9,
        }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
