"""Plain-text tables."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.vocabulary import external
from deepfm_dist.distributed.planning import Plan, RankDemand
from deepfm_dist.distributed.sharding import RESERVED
from deepfm_dist.messages import format_bytes, plural
from deepfm_dist.ranking.evaluation import Comparison
from deepfm_dist.ranking.output import RankingFiles
from deepfm_dist.training.search import Trial

SHOWN_OWNERS, SHOWN_ITEMS = 3, 10


def metrics_table(
    split: str,
    rows: Mapping[str, float],
    comparison: Comparison | None,
    cutoffs: Sequence[int],
    composition: str = "",
) -> str:
    """Figures on rows, and rankings side by side: one table for each K.

    Args:
        split: valid or test.
        rows: figures on its rows.
        comparison: the comparison of rankings, if any.
        cutoffs: values of K.
        composition: the composition of the rows, see `Manifest.composition`.
    """
    figures = pd.Series(dict(rows)).map("{:.4f}".format)
    title = f"{split} rows: {composition}" if composition else f"{split} rows"
    blocks = [f"{title}\n{figures.to_string()}"]
    for k in cutoffs if comparison else ():
        assert comparison is not None
        labels, lines = [], []
        for name, metrics in comparison.figures.items():
            labels.append(name)
            lines.append(_at_cutoff(metrics, k))
            for label, bounds in (
                ("95 %", comparison.intervals[name]),
                ("model minus it", comparison.differences.get(name, {})),
            ):
                for end, side in enumerate(("from", "to") if bounds else ()):
                    labels.append(f"  {label}, {side}")
                    lines.append(_at_cutoff({m: pair[end] for m, pair in bounds.items()}, k))
        text = pd.DataFrame(lines, labels).to_string(float_format=_four_digits, na_rep="")
        blocks.append(f"{split} rankings, whole catalogue, K = {k}\n{text}")
    return "\n\n".join(blocks)


def _at_cutoff(line: Mapping[str, float], k: int) -> dict[str, float]:
    named = (name.split("@") for name in line)
    return {figure: line[f"{figure}@{at}"] for figure, at in named if at == str(k)}


def _four_digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def ranking_table(written: RankingFiles, dataset: PreparedDataset) -> str:
    """The first users' (or items') items by title, and the files."""
    with written.first.open("rb") as opened, pq.ParquetFile(opened) as file:  # may exceed memory
        first = islice(file.iter_batches(SHOWN_OWNERS * written.k), 1)
        # Keeps integer ids next to nulls, as for users outside the training data.
        shown = pa.Table.from_batches(first, file.schema_arrow).to_pandas(integer_object_nulls=True)
    owner = shown.columns[0]
    item = next(name for name in shown.columns[1:] if name.endswith("item_id"))
    titles = dataset.titles(cold=True)
    if titles is not None:
        ids = external(dataset.entity_ids("item", cold=True).slice(1)).to_pylist()
        by_id = dict(zip(ids, titles.slice(1).to_pylist(), strict=True))
        shown["title"] = shown[item].map(by_id)
    if "explanation" in shown:
        shown["reasons"] = shown.pop("explanation").map(_reasons)
    kind = owner.removesuffix("_id")
    blocks = []
    for one in shown[owner].drop_duplicates().head(SHOWN_OWNERS):
        rows = shown[shown[owner] == one].head(SHOWN_ITEMS)
        rows = rows.drop(columns=owner).set_index("rank")
        blocks.append(f"{kind} {one}\n{rows.to_string(float_format='{:.4f}'.format, na_rep='')}")
    total = f"{plural(written.owners, kind)}, {plural(written.rows, 'row')}"
    files = "\n".join(f"written: {path}" for path in (written.csv, written.parquet) if path)
    if (short := written.figures.get("short_list")) is not None:
        total += (
            f"\n{plural(short['candidates'], 'candidate')}: on {plural(short['users'], 'user')} "
            f"{short['overlap']:.4f} of the exact top {written.k}, {short['times_as_fast']:.1f} "
            f"times as fast; the over-arch replaces {short['deep_share']:.3f} of the pairwise "
            f"part's top {written.k}"
        )
    return "\n\n".join([*blocks, f"{total}\n{files}"])


def _reasons(explanation: dict[str, Any]) -> str:
    """The values with the largest shares of a score, as ``seen 17 +0.435``."""
    return ", ".join(
        " ".join(filter(None, (one["field"], one["value"], f"{one['share']:+.3f}")))
        for one in explanation["reasons"]
    )


def plan_table(plan: Plan) -> str:
    """A plan: one line per table, and one per rank or range of equal ranks."""
    job = plan.job
    tables = pd.DataFrame(
        {
            "table": table.table,
            "rows": f"{table.rows:,}",
            "weights": format_bytes(table.weight_bytes),
            "optimizer": format_bytes(table.state_bytes),
            "sharding": table.sharding,
            "ranks": _from_to(table.ranks[0], table.ranks[-1]),
            "cached": "all" if table.cached is None else f"{table.cached:.0%}",
            "network/step": format_bytes(table.traffic_bytes),
        }
        for table in plan.tables
    )
    if all(table.cached is None for table in plan.tables):
        tables = tables.drop(columns="cached")
    runs: list[tuple[int, int, RankDemand]] = []
    for number, rank in enumerate(plan.ranks):
        if runs and runs[-1][2] == rank:
            runs[-1] = (runs[-1][0], number, rank)
        else:
            runs.append((number, number, rank))
    ranks = pd.DataFrame(
        {
            "ranks": _from_to(first, last),
            "tables": format_bytes(rank.table_bytes),
            "buffers": format_bytes(rank.buffer_bytes),
            "dense": format_bytes(rank.dense_bytes),
            "memory": format_bytes(rank.total_bytes),
            "of limit": f"{rank.total_bytes / job.hbm_bytes:.1%}",
            "sends/step": format_bytes(rank.sent_bytes),
        }
        for first, last, rank in runs
    )
    size = job.world.world_size
    machines = size // job.world.local_world_size
    group_size = job.sharding.group_size or size
    groups = ""
    if group_size < size:
        tables = tables.rename(columns={"ranks": "ranks of group"})
        groups = (
            f"{size // group_size} groups of {group_size} ranks, each with a copy of all tables\n"
        )
    return (
        f"{tables.to_string(index=False)}\n\n{ranks.to_string(index=False)}\n\n{groups}"
        f"{plural(size, 'GPU')} on {plural(machines, 'machine')}, "
        f"{format_bytes(job.hbm_bytes)} each, {RESERVED:.0%} of it to stay free; "
        f"{job.optimizer.name}; {plural(job.batch_size, 'row')} a step\n"
        f"fullest rank: {format_bytes(plan.fullest.total_bytes)}, {plan.share:.1%} of the limit; "
        f"about {plan.seconds_sending * 1000:.2f} ms of a step go to sending"
    )


def trials_table(trials: Sequence[Trial], monitor: str) -> str:
    """The trials of a search, in order: outcome, best figure, settings."""
    lines = [{"trial": t.name, "outcome": t.outcome, monitor: t.best, **t.values} for t in trials]
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.5g}".format, na_rep="")


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
