"""`recommend` as a user types it, at some numbers of ranks: pairs a second, and memory.

The notebook's shape, generated: 31,360 users, 6,807 items, dim 10, 30-20-10, trained for a few
steps; every user's top 10 of the items not seen in training, written as Parquet and CSV. The
time is that of ranking and of writing its parts, without start and merge. A rank's memory is its
peak resident set, and what it takes above a process that has imported what computes, torch and
TorchRec; pages that ranks share count in each.

    python benchmarks/recommend.py
    python benchmarks/recommend.py --ranks 1,2,4 recommend.candidates=500
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from serving import trained

from deepfm_dist.events import RecommendEvent, last, read_events

IMPORTS = "import resource, torch, torchrec; print(resource.getrusage(0).ru_maxrss)"


def recommended(run: Path, ranks: int, settings: list[str]) -> dict[str, Any]:
    """The figures that `recommend` leaves in metrics.jsonl."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, "-m", "deepfm_dist.recommend", "--quiet", "--config", str(run), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        command, cwd=run.parents[1], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    event = last(read_events(run / "metrics.jsonl"), RecommendEvent)
    assert event is not None
    return event.values()


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--folder", type=Path, help="where to put the run (default: temporary)")
    parser.add_argument("settings", nargs="*", help="section.field=value for recommend")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    packages = ("torch", "torchrec", "numba", "pyarrow")
    print(f"python {platform.python_version()}, {', '.join(f'{p} {version(p)}' for p in packages)}")
    print(f"command: {shlex.join(sys.argv)}")
    imports = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
    imported_gib = int(imports.stdout) / 2**20
    report: dict[str, Any] = {"imported_gib": round(imported_gib, 3), "ranks": {}}
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.folder or Path(temporary)
        home.mkdir(parents=True, exist_ok=True)
        run = trained("notebook", home)
        first = None
        for ranks in map(int, arguments.ranks.split(",")):
            runs = [
                recommended(run, ranks, arguments.settings) for _ in range(arguments.repeats + 1)
            ][1:]  # the first one compiles and fills the disk's cache
            speed = statistics.median(found["pairs_per_s"] for found in runs)
            peak = max(max(found["peak_memory_gib"]) for found in runs)
            first = first or speed
            report["ranks"][ranks] = {
                "pairs_per_s": round(speed),
                "times_the_first": round(speed / first, 3),
                "peak_gib": round(peak, 3),
                "beside_imports_gib": round(peak - imported_gib, 3),
            }
            print(
                f"{ranks} rank{'s' * (ranks > 1)}: {speed / 1e6:.1f} M pairs/s, "
                f"{speed / first:.2f} times the first; a rank's peak {peak:.2f} GiB, "
                f"{peak - imported_gib:.2f} GiB above the imports"
            )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
