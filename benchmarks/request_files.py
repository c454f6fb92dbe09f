"""Requests with a context and a filter each against the plain catalogue, in one run.

The notebook's shape, generated: 31,360 users, 6,807 items, dim 10, 30-20-10, trained for a few
steps, with the hour of a row as context. The plain catalogue is every user's top 10 at one hour.
There is a request for each user, with its own hour and one of some filters by genre, or with a list
of 500 items that no other request has. Pairs are those that are scored: of a request, the items
that its filter or list keeps. Requests per second count requests of any number of items. The
time is that of ranking and writing its parts; ways take turns.

    python benchmarks/request_files.py
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from recommend import recommended
from serving import MODEL
from synthetic import NOTEBOOK, write

FEATURES = (
    "data.features=[{name: user, entity: user}, {name: item, entity: item},"
    " {name: genre, entity: item, file: genres.tsv},"
    " {name: hour, column: time, derive: hour, time_format: s}]"
)
LISTED = 500
"""Items of a list."""


def trained(home: Path) -> Path:
    """Trains a model of the shape for a few steps; returns the run's folder."""
    data = home / "data"
    if not (data / "train_ratings.csv").is_file():
        write(NOTEBOOK, data)
    settings = ["run.loggers=[]", "trainer.max_steps=20", "trainer.validate_every_epochs=0", *MODEL]
    settings += ["checkpoint.resume=never", f"data.root={data}", "run.name=requests", FEATURES]
    settings += ["trainer.loss=bce", "recommend.context.hour=0"]
    command = [sys.executable, "-m", "deepfm_dist.train", "--quiet", "--config", "sample"]
    subprocess.run([*command, *settings], check=True, cwd=home)
    return home / "runs" / "requests"


def write_requests(home: Path, filters: int) -> dict[str, Path]:
    """Files of requests by name."""
    data, rng = home / "data", np.random.default_rng(1)
    users = pd.read_csv(data / "train_ratings.csv", usecols=["user"])["user"].unique()
    genres = pd.read_csv(data / "genres.tsv", sep="\t")
    names, items = genres["genre"].unique(), genres["item"].unique()
    wheres = [f"genre={name}" for name in names]
    wheres += [f"genre!={a} and genre!={b}" for a in names for b in names if a < b]
    asked = pd.DataFrame({"user": users, "time": rng.integers(0, 24, len(users)) * 3600})
    paths = {name: home / f"{name}.parquet" for name in ("filters", "lists")}
    chosen = rng.permutation(wheres)[:filters]
    asked.assign(where=rng.choice(chosen, len(users))).to_parquet(paths["filters"])
    lists = [rng.choice(items, LISTED, replace=False) for _ in users]
    asked.assign(allow=pd.Series(lists)).to_parquet(paths["lists"])
    return paths


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--filters", type=int, default=50, help="different ones (default: 50)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--folder", type=Path, help="where to put the run (default: temporary)")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {platform.platform()}")
    print(f"command: {shlex.join(sys.argv)}")
    with tempfile.TemporaryDirectory() as temporary:
        home = (arguments.folder or Path(temporary)).absolute()
        home.mkdir(parents=True, exist_ok=True)
        run = trained(home)
        ways = {"plain": ["recommend.context.hour=0"]}
        for name, path in write_requests(home, arguments.filters).items():
            ways[name] = [f"recommend.requests={path}"]
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(arguments.repeats + 1):
            for name, settings in ways.items():
                figures = recommended(run, 1, settings)
                if turn:  # the first one compiles and fills the disk's cache
                    speeds[name].append(figures["pairs_per_s"])
                    seconds[name].append(figures["seconds"])
    report = {name: round(statistics.median(values)) for name, values in speeds.items()}
    took = {name: statistics.median(values) for name, values in seconds.items()}
    for name, speed in report.items():
        print(
            f"{name}: {speed / 1e6:.1f} M pairs/s, {speed / report['plain']:.2f} times the plain; "
            f"{NOTEBOOK.n_users / took[name]:,.0f} requests/s, "
            f"{took['plain'] / took[name]:.2f} times the plain"
        )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
