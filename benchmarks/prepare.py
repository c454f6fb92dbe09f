"""How long preparation takes and how much memory it needs, by the number of rows.

Generated interactions of up to 1 M users and 100 k items, a twentieth of each user's rows held out
for validation and a tenth for the test, go from csv to a finished dataset; or files of one's own
under a configuration.

    python benchmarks/prepare.py --rows 10000000
    python benchmarks/prepare.py --config my.yaml
"""

import argparse
import json
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

USERS, ITEMS = 1_000_000, 100_000
BLOCK_ROWS = 4_000_000
CONFIG = """
run: {{name: generated, prepared_root: {folder}/prepared}}
data:
  root: {folder}
  interactions: {{file: "rows-*.csv", user: user, item: item, time: time}}
  features: [{{name: user, entity: user}}, {{name: item, entity: item}}]
  split: {{method: per_user, valid: 0.05, test: 0.1}}
"""


def generate(folder: Path, rows: int) -> None:
    """Writes ``rows`` interactions: users alike, items by a power law, in the order of time."""
    rng = np.random.default_rng(1)
    weights = (np.arange(ITEMS) + 20.0) ** -1.1
    bounds = np.cumsum(weights) / weights.sum()
    for number, begin in enumerate(range(0, rows, BLOCK_ROWS)):
        n = min(BLOCK_ROWS, rows - begin)
        table = pa.table(
            {
                "user": rng.integers(0, USERS, n),
                "item": np.searchsorted(bounds, rng.random(n)),
                "time": 1_500_000_000 + begin + np.arange(n),
            }
        )
        pa.csv.write_csv(table, folder / f"rows-{number:03d}.csv")


def measure(config: str, folder: str) -> None:
    """Prepares in this process alone; prints seconds and peak memory."""
    from deepfm_dist.config import load_config
    from deepfm_dist.data.encode import prepare

    read = load_config(config)
    begun = time.perf_counter()
    manifest = prepare(read.data, read.data_root, Path(folder) / "out", read.run.seed)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = sum(spec.positives for spec in manifest.splits.values())
    dropped = sum(manifest.dropped.values())
    print(json.dumps({"rows": rows + dropped, "seconds": seconds, "peak_gib": peak}))


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, help="rows to generate and prepare")
    parser.add_argument("--config", help="prepare these files instead")
    parser.add_argument("--folder", help="where to put files (default: the temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.folder)
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
            generate(folder, arguments.rows)
            size = sum(path.stat().st_size for path in folder.iterdir())
            print(f"generated {size / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s")
            config = str(folder / "config.yaml")
            Path(config).write_text(CONFIG.format(folder=folder))
        for path in folder.glob("rows-*.csv"):  # as warm for every number of rows that fits
            path.read_bytes()
        command = [sys.executable, __file__, "--measure", config, "--folder", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
