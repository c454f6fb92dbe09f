"""Whether one log gives one dataset, for any packing, division and order of its files.

A generated log is prepared as CSV, in another order, as other numbers of files, as gzip and as
Parquet, with one thread and with partitions of other sizes: hashes of rows and vocabularies have to
be the same. Then its first row is removed: every other pair has to stay in its split but those next
to the bounds.

    python benchmarks/content.py --rows 5000000
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig

N_ITEMS = 2_000
SPEC: dict[str, Any] = {
    "interactions": {"file": "rows*", "user": "user", "item": "item", "time": "time"},
    "features": [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}],
}
FILES = {"plain": 3, "shuffled": 3, "in one file": 1, "in 7 files": 7, "gzip": 2, "parquet": 1}
"""Forms of the log, with the number of their files."""


def generate(n: int) -> pa.Table:
    """``n`` rows, of which some share user and item, and many the time."""
    rng = np.random.default_rng(7)
    return pa.table(
        {
            "user": rng.integers(0, n // 25, n),
            "item": (N_ITEMS * rng.random(n) ** 2).astype(np.int64),
            "time": 1_600_000_000 + rng.integers(0, n // 5, n),
        }
    )


def write(folder: Path, log: pa.Table, form: str) -> None:
    """Writes a log in one of `FILES`, the last rows in the first file."""
    folder.mkdir()
    if form == "parquet":
        pq.write_table(log, folder / "rows.parquet")
        return
    if form == "shuffled":
        log = log.take(pa.array(np.random.default_rng(8).permutation(len(log))))
    height = -(-len(log) // FILES[form])
    for number in range(FILES[form]):
        name = f"rows-{FILES[form] - number}.csv" + (".gz" if form == "gzip" else "")
        with pa.output_stream(str(folder / name)) as stream:
            pa.csv.write_csv(log.slice(number * height, height), stream)


def sides(folder: Path, n_users: int) -> npt.NDArray[np.int8]:
    """``[users * items]``: the split of each pair's row, -1 where it has none."""
    found = np.full((n_users, N_ITEMS), -1, np.int8)
    ids = {}
    for name in ("user", "item"):
        texts = pq.read_table(folder / f"vocabulary/{name}.parquet")["id"]
        ids[name] = np.asarray(texts.slice(1).cast(pa.int64()))
    for number, split in enumerate(SPLITS):
        rows = pq.read_table(folder / split)
        if split != "train":  # sampled negatives are no rows of the log
            rows = rows.filter(pc.equal(rows["label"], 1))
        users, items = (rows[name].to_numpy() for name in ("user", "item"))
        known = (users > 0) & (items > 0)
        found[ids["user"][users[known] - 1], ids["item"][items[known] - 1]] = number
    return found.ravel()


def prepared(root: Path, folder: Path, method: str, threads: int) -> Manifest:
    """Prepares one form of the log."""
    split = {"method": method, "valid": 0.05, "test": 0.1}
    return prepare(DataConfig.model_validate(SPEC | {"split": split}), root, folder, 0, threads)


def compare(folder: Path, log: pa.Table) -> bool:
    """Prepares the log in all forms; says which datasets differ from the first."""
    default, same = job.PARTITION_BYTES, True
    runs = [(form, 2, default) for form in FILES]
    runs += [("plain", 1, default), ("plain", 4, default // 4), ("plain", 2, 8 * default)]
    first = None
    for number, (form, threads, partition_bytes) in enumerate(runs):
        if not (folder / form).exists():
            write(folder / form, log, form)
        job.PARTITION_BYTES = partition_bytes
        manifest = prepared(folder / form, folder / f"dataset-{number}", "per_user", threads)
        rows = {name: spec.rows for name, spec in manifest.splits.items()}
        found = manifest.hashes, rows, manifest.profile
        first = first or found
        same &= found == first
        word = "the same" if found == first else "ANOTHER DATASET"
        print(f"{form}, {threads} threads, {manifest.files} partitions: {word}", flush=True)
    job.PARTITION_BYTES = default
    return same


def remove_first(folder: Path, log: pa.Table) -> bool:
    """Removes the first row; says how many other pairs have changed sides."""
    few = True
    write(folder / "rest", log.slice(1), "plain")
    for method in ("random", "per_user"):
        found = []
        for form in ("plain", "rest"):
            prepared(folder / form, folder / f"{form}-{method}", method, 2)
            found.append(sides(folder / f"{form}-{method}", len(log) // 25))
        before, after = found
        both = (before >= 0) & (after >= 0)
        moved = int((before[both] != after[both]).sum())
        few &= moved <= 2 and both.sum() >= (before >= 0).sum() - 1
        print(f"first row removed, {method}: {moved} of {both.sum():,} pairs moved", flush=True)
    return few


def main() -> int:
    """Runs the comparison; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows to generate")
    parser.add_argument("--folder", help="where to put files (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        log = generate(arguments.rows)
        same = compare(Path(name), log)
        return 0 if remove_first(Path(name), log) and same else 1


if __name__ == "__main__":
    sys.exit(main())
