"""Runs the suite at a size that fits twenty minutes on two cores, and rewrites docs/benchmarks.md.

    python benchmarks
    python benchmarks --only catalogue,negatives --output some.md

Each script ends with a line of JSON; the page is made of these lines alone. Where
``benchmarks/rivals/build.sh`` has created the rivals' environment, training and the catalogue are
compared with them.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from machine import cpu_model

HERE = Path(__file__).parent
TARGET = HERE.parent / "docs" / "benchmarks.md"
RIVALS = HERE.parent / ".venv-rivals"
LIMIT_S = 900
PACKAGES = (
    "torch",
    "torchrec",
    "fbgemm-gpu-cpu",
    "numpy",
    "numba",
    "pyarrow",
    "fastapi",
    "uvicorn",
)

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of a table: a result, optionally compared with another.

    Attributes:
        what: unit and description.
        ours: our result.
        reference: name of what it is compared with; empty without a comparison.
        other: result of the reference.
        ratio: ours to the other.
    """

    what: str
    ours: str
    reference: str = ""
    other: str = ""
    ratio: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A run of a script.

    Attributes:
        command: the script under ``benchmarks/`` and its arguments.
        lines: its JSON -> lines of the table.
    """

    command: str
    lines: Callable[[Report], Sequence[Line]]

    @property
    def script(self) -> str:
        """Name of the script."""
        return self.command.split()[0].removesuffix(".py")


def _training(what: str) -> Callable[[Report], Sequence[Line]]:
    def lines(report: Report) -> Sequence[Line]:
        ours = report["rows_per_s"]
        others = {
            "fastest rival": report.get("rival_rows_per_s"),
            "plain PyTorch": report.get("plain_rows_per_s"),
            "bare TorchRec step, no reading": report.get("bare_rows_per_s"),
        }
        return [
            Line(f"rows/s, {what}", f"{ours:,}", name, f"{other:,}", f"{ours / other:.2f} x")
            for name, other in others.items()
            if other
        ]

    return lines


def _catalogue(what: str) -> Callable[[Report], Sequence[Line]]:
    def lines(report: Report) -> Sequence[Line]:
        ours, lines = report["pairs_per_s"], []
        for name, field in (
            ("forward pass", "naive_pairs_per_s"),
            ("torch, factorised", "torch_pairs_per_s"),
            ("RecBole's full sort", "recbole_pairs_per_s"),
            ("peak of sgemm", "limit_pairs_per_s"),
        ):
            if (other := report.get(field)) is None:  # no rivals' environment
                continue
            ratio = f"{ours / other:.0%} of it" if "peak" in name else f"{ours / other:.1f} x"
            label = f"M pairs/s, {what}"
            lines.append(Line(label, f"{ours / 1e6:.2f}", name, f"{other / 1e6:.2f}", ratio))
        return lines

    return lines


def _negatives(report: Report) -> Sequence[Line]:
    ours, theirs = report["seconds_50"], report["notebook_seconds_50"]
    return [
        Line(
            "s, 50 each for 31,360 users",
            f"{ours:g}",
            "the notebook's loop",
            f"{theirs:,.0f}",
            f"{theirs / ours:,.0f} x as fast",
        ),
        Line("s, 200 each", f"{report['seconds_200']:g}"),
    ]


def _prepare(report: Report) -> Sequence[Line]:
    rows = report["rows"]
    return [
        Line(f"rows/s, {rows:,} rows prepared", f"{rows / report['seconds']:,.0f}"),
        Line(f"GiB peak memory, {rows:,} rows", f"{report['peak_gib']:.2f}"),
    ]


def _reading(report: Report) -> Sequence[Line]:
    reading, training = report["reading_rows_per_s"], report["training_rows_per_s"]
    ahead = report["both_ahead_rows_per_s"]
    return [
        Line(
            "rows/s read",
            f"{reading:,}",
            "rows/s trained",
            f"{training:,}",
            f"{training / reading:.1%} of a step",
        ),
        Line("rows/s, both on one core", f"{report['both_rows_per_s']:,}"),
        Line(
            "rows/s, batches prepared on another core",
            f"{ahead:,}",
            "rows/s trained",
            f"{training:,}",
            f"{ahead / training:.0%} of it",
        ),
    ]


def _recommend(report: Report) -> Sequence[Line]:
    lines = []
    for ranks, result in report["ranks"].items():
        what = f"recommend, {ranks} rank{'s' * (int(ranks) > 1)}"
        times = result["times_the_first"]
        lines += [
            Line(
                f"M pairs/s, {what}",
                f"{result['pairs_per_s'] / 1e6:.1f}",
                *(("one rank", "", f"{times:.2f} x") if times != 1 else ()),
            ),
            Line(f"GiB per rank without imports, {what}", f"{result['beside_imports_gib']:.2f}"),
        ]
    return lines


def _serving(report: Report) -> Sequence[Line]:
    what = f"{report['shape_items']:,} items"
    return [
        Line(f"requests/s, {what}", f"{report['requests_per_s']:,}"),
        Line(f"ms of CPU per request, {what}", f"{report['cpu_ms']:g}"),
        Line(f"ms at {report['rate']:g} requests/s, median, {what}", f"{report['p50_ms']:g}"),
        Line(
            f"ms at {report['rate']:g} requests/s, 99th percentile, {what}",
            f"{report['p99_ms']:g}",
            "target",
            "10",
            f"{report['p99_ms'] / 10:.0%} of it",
        ),
    ]


SUITE = {
    "Training": [
        Benchmark("training.py --batch-size 8192", _training("30-20-10, batch 8,192")),
        Benchmark("training.py --batch-size 1024", _training("30-20-10, batch 1,024")),
        Benchmark(
            "training.py --batch-size 1024 --layers 400-400-400",
            _training("400-400-400, batch 1,024"),
        ),
    ],
    "The whole catalogue": [
        Benchmark("catalogue.py", _catalogue("dim 10, 30-20-10")),
        Benchmark("catalogue.py --threads 2", _catalogue("the same, two threads")),
        Benchmark("catalogue.py --embedding-dim 200", _catalogue("dim 200, 30-20-10")),
        Benchmark("catalogue.py --layers 400-400-400", _catalogue("dim 10, 400-400-400")),
        Benchmark("recommend.py", _recommend),
    ],
    "Negatives": [Benchmark("negatives.py", _negatives)],
    "Preparation": [
        Benchmark("prepare.py --rows 1000000", _prepare),
        Benchmark("prepare.py --rows 10000000", _prepare),
    ],
    "Reading during training": [Benchmark("reading.py", _reading)],
    "Serving, one worker on one core": [
        Benchmark("serving.py --shape sample", _serving),
        Benchmark("serving.py --shape notebook", _serving),
    ],
}


def main() -> int:
    """Runs the suite; 1 where a script failed."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", help="names of scripts, by commas: catalogue,negatives")
    parser.add_argument("--output", type=Path, default=TARGET, help="page to write")
    parser.add_argument("--rivals", type=Path, default=RIVALS, help="the rivals' environment")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else None
    begun, reports = time.monotonic(), {}
    for benchmark in (b for group in SUITE.values() for b in group):
        if wanted is None or benchmark.script in wanted:
            reports[benchmark.command] = _run(benchmark, options.rivals)
    if not reports:
        parser.error(f"--only {options.only}: unknown script")
    minutes = (time.monotonic() - begun) / 60
    options.output.write_text(page(reports, _about(minutes)))
    print(f"\nwritten: {options.output} ({minutes:.0f} minutes)")
    return int(any(report is None for report in reports.values()))


def _run(benchmark: Benchmark, rivals: Path) -> Report | None:
    """A script's JSON; None where it failed."""
    command = [sys.executable, *_typed(benchmark.command).split()[1:]]
    if benchmark.script in ("training", "catalogue"):
        command += ["--rivals", str(rivals)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    # One thread a process unless a script says otherwise, as the project's commands have it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"failed: {error}", file=sys.stderr)
        return None
    print(done.stdout, end="")
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report


def _typed(command: str) -> str:
    return f"python benchmarks/{command}"


def _about(minutes: float) -> str:
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = {package: _version(package) for package in PACKAGES}
    versions = ", ".join(f"{package} {v}" for package, v in installed.items() if v)
    return (
        f"{date.today():%B %Y}; {cpu_model()}, {cores} core{'s' * (cores > 1)}, "
        f"{memory_gib:.0f} GiB; Python {platform.python_version()}, {versions}. "
        f"The suite took {minutes:.0f} minutes."
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def page(reports: Mapping[str, Report | None], about: str) -> str:
    """The page.

    Args:
        reports: JSON by command; None where it failed.
        about: machine and versions.
    """
    parts = [
        "# Benchmarks\n",
        "Written by `make bench`, which runs the scripts of `benchmarks/` and takes every\n"
        "result from their last lines. Results depend on the machine; compare the ratios.\n",
        f"{about}\n",
    ]
    for title, group in SUITE.items():
        selected = [b for b in group if b.command in reports]
        if not selected:
            continue
        parts.append(f"## {title}\n")
        lines, failed = [], []
        for benchmark in selected:
            report = reports[benchmark.command]
            if report is None:
                failed.append(benchmark.command)
            else:
                lines += benchmark.lines(report)
        if lines:
            rows = [
                f"| {x.what} | {x.ours} | {x.reference} | {x.other} | {x.ratio} |" for x in lines
            ]
            head = "| what | ours | compared with | | ratio |\n|---|---|---|---|---|"
            parts.append("\n".join([head, *rows, ""]))
        parts += [f"`{_typed(command)}` failed.\n" for command in failed]
        commands = "\n".join(_typed(b.command) for b in selected)
        parts.append(f"```\n{commands}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
