"""Reruns the tables of docs/quality.md: every row by the commands that a user types.

The rows stand in `benchmarks/quality.yaml`: configuration (or one of `benchmarks/logs.py`, which is
generated), overrides, seeds. Each is prepared and
trained by `deepfm_dist.train`, combined by `deepfm_dist.combine` and trained on from there where it
says so, and measured by `deepfm_dist.evaluate` from the checkpoint with the best watched figure.
Figures are means over the seeds with their standard deviation, or of one seed, for rankings with
the 95 % interval over users; the time is that of training, on
this machine as busy as it is. The same seed gives the same digits again.

    DEEPFM_DATA=/path/to/data python benchmarks/quality.py                  # all tables
    DEEPFM_DATA=/path/to/data python benchmarks/quality.py --table ctr --row DeepFM
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from logs import LOGS, write
from machine import cpu_model

from deepfm_dist.events import EvaluateEvent, last, read_events


def command(module: str, *arguments: str) -> float:
    """Runs a command of the package, its log on stderr; returns its seconds."""
    typed = [sys.executable, "-m", f"deepfm_dist.{module}", *arguments]
    print(f"$ {shlex.join(['python', *typed[1:]])}", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    subprocess.run(typed, check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return time.perf_counter() - begun


def measured(row: dict[str, Any], seed: int, work: Path) -> dict[str, Any]:
    """Trains and evaluates a row with a seed.

    Returns:
        ``seconds`` of training, and by ranking (the rows' own figures under ``model``, with the
        model's ranking) the figures of the last evaluation, and the ``intervals`` of those of
        rankings.
    """
    name = "".join(c if c.isalnum() else "_" for c in f"{row['config']}_{row['name']}_{seed}")
    config = row["config"]
    if config in LOGS:
        config = str(write(config, work / "logs" / config))
    places = ["--config", config, f"run.runs_root={work / 'runs'}"]
    places += [f"run.prepared_root={work / 'prepared'}", "run.loggers=[]"]
    # A run that continued, or had finished before, would be timed in part or not at all.
    places.append("checkpoint.resume=never")
    shared = [*places, *row.get("overrides", []), f"data.seed={seed}"]
    command("prepare", *shared)  # not a part of the time of training
    seconds, parts = 0.0, []
    for of_part in range(seed, seed + row.get("mean_of", 1)):
        parts.append(f"{name}_{of_part}")
        seconds += command("train", *shared, f"run.name={parts[-1]}", f"run.seed={of_part}")
    if "combine" in row or len(parts) > 1:
        options = ["--of", ",".join(parts), "--to", name, *row.get("combine", [])]
        shutil.rmtree(work / "runs" / name, ignore_errors=True)  # of an earlier run of this row
        command("combine", *shared, *options)
    else:
        name = parts[0]
    if "trained_on" in row:
        begun, name = f"checkpoint.start_from={work / 'runs' / name}", f"{name}_on"
        of_row = [*places, f"data.seed={seed}", f"run.seed={seed}", *row["trained_on"]]
        seconds += command("train", *of_row, begun, f"run.name={name}")
    # What was combined is of another width than the overrides say: the checkpoint knows.
    command("evaluate", *places, f"run.name={name}", *row.get("evaluate", []))
    found = last(read_events(work / "runs" / name / "metrics.jsonl"), EvaluateEvent)
    assert found is not None
    figures = {ranking: dict(of) for ranking, of in found.figures.items()}
    figures["model"] = found.rows | figures.get("model", {})
    return {"seconds": seconds, "figures": figures, "intervals": found.intervals}


def summary(runs: list[dict[str, Any]], show: list[str]) -> dict[str, dict[str, Any]]:
    """By ranking: each shown figure's mean, standard deviation and values; seconds of the model."""
    found: dict[str, dict[str, Any]] = {}
    for ranking, figures in runs[0]["figures"].items():
        found[ranking] = {}
        for figure in (f for f in show if f in figures):  # rankings have none of rows
            values = [run["figures"][ranking][figure] for run in runs]
            found[ranking][figure] = {
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                "values": values,
            }
            interval = runs[0]["intervals"].get(ranking, {}).get(figure)
            if len(runs) == 1 and interval is not None:
                found[ranking][figure]["interval"] = [*interval]
    found["model"]["seconds"] = statistics.mean(run["seconds"] for run in runs)
    return found


def line(name: str, figures: dict[str, Any], show: list[str], n_seeds: int) -> str:
    """A line of a table in Markdown."""
    cells = []
    for figure in show:
        of = figures.get(figure)
        spread = f" ± {of['sd']:.5f}" if of and n_seeds > 1 else ""
        if of and "interval" in of:
            spread = " ({:.4f} to {:.4f})".format(*of["interval"])
        cells.append(f"{of['mean']:.5f}{spread}" if of else "")
    seconds = f"{figures['seconds']:.0f}" if "seconds" in figures else ""
    return f"| {' | '.join([name, *cells, str(n_seeds), seconds])} |"


def main() -> int:
    """Prints the tables, and one JSON object with all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--table", help="only this one")
    parser.add_argument("--row", help="only this row")
    parser.add_argument("--seeds", type=int, help="only the first N seeds of each row")
    parser.add_argument("--work", type=Path, default=Path("quality"), help="folder of all runs")
    arguments = parser.parse_args()
    print(f"machine: {cpu_model()}, {os.cpu_count()} cores, 1 thread")
    print(
        f"versions: python {platform.python_version()}, torch {version('torch')}, "
        f"torchrec {version('torchrec')}"
    )
    print(f"command: {shlex.join(['python', *sys.argv])}", flush=True)
    everything: dict[str, Any] = {}
    for table in yaml.safe_load(arguments.rows.read_text()):
        rows = [r for r in table["rows"] if arguments.row in (None, r["name"])]
        if arguments.table not in (None, table["table"]) or not rows:
            continue
        show = table["show"]
        print(f"\n{table['title']}\n\n| model | {' | '.join(show)} | seeds | seconds |")
        print("|" + "---|" * (len(show) + 3), flush=True)
        found = everything[table["table"]] = {}
        for row in rows:
            seeds = row["seeds"][: arguments.seeds]
            try:
                runs = [measured(row, seed, arguments.work.resolve()) for seed in seeds]
            except subprocess.CalledProcessError as error:
                print(f"failed: {shlex.join(error.cmd)}; its log is above", file=sys.stderr)
                return 1
            found[row["name"]] = summary(runs, show)
            for ranking, figures in found[row["name"]].items():
                if ranking != "model":
                    print(line(ranking, figures, show, len(seeds)), flush=True)
                elif not row.get("untrained"):
                    print(line(row["name"], figures, show, len(seeds)), flush=True)
    if not everything:
        print("no such table or row", file=sys.stderr)
        return 2
    print(json.dumps(everything))
    return 0


if __name__ == "__main__":
    sys.exit(main())
