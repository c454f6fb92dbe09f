"""Logs and settings on which the ways of preparation are compared."""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

FEATURES = [
    {"name": "user", "entity": "user"},
    {"name": "item", "entity": "item"},
    {"name": "h", "column": "c"},
    {"name": "w", "kind": "numeric", "transform": "standard"},
    {"name": "city", "entity": "user", "column": "c"},
    {"name": "genre", "entity": "item", "file": "side.csv", "column": "g"},
    {"name": "price", "entity": "item", "file": "side.csv", "column": "p", "kind": "numeric"},
]
SEEN = {"name": "seen", "entity": "user", "history": "item"}
WITH_TIMES: dict[str, Any] = {
    "interactions": {"file": "rows*", "user": "u", "item": "i", "time": "t", "weight": "x"},
    "features": FEATURES,
    "titles": {"file": "side.csv", "column": "g"},
    "negatives": {"evaluation_per_positive": 2},
}
WITHOUT_TIMES = WITH_TIMES | {
    "interactions": {"file": "rows*", "user": "u", "item": "i", "weight": "x"}
}
FIXED: dict[str, Any] = {
    "interactions": {"file": "rows*", "user": "u", "item": "i"},
    "features": FEATURES[:2],
    "negatives": {"fixed_per_user": 3},
}
CLICKS: dict[str, Any] = {
    "task": "ctr",
    "interactions": {"file": "rows*", "label": "y", "time": "t"},
    "features": [FEATURES[2], FEATURES[3], {"name": "i"}],
}
SHARES = {"valid": 0.1, "test": 0.2}
CASES = {
    "random": WITH_TIMES | {"split": {"method": "random", **SHARES}},
    "per_user": WITHOUT_TIMES
    | {"features": [*FEATURES, SEEN], "split": {"method": "per_user", **SHARES}},
    "temporal": WITH_TIMES | {"split": {"method": "temporal", **SHARES}},
    "leave_last": WITH_TIMES
    | {"features": [*FEATURES, SEEN], "split": {"method": "leave_last", "valid": 1, "test": 2}},
    "fixed": FIXED | {"split": {"method": "random", **SHARES}},
    "fixed per user": FIXED | {"split": {"method": "per_user", **SHARES}},
    "clicks": CLICKS | {"split": {"method": "random", **SHARES}},
    "clicks by time": CLICKS | {"split": {"method": "temporal", **SHARES}},
    "clicks of users": CLICKS
    | {
        "interactions": {"file": "rows*", "labels": ["y", "z"], "user": "u", "item": "i"},
        "features": FEATURES,
        "split": {"method": "random", **SHARES},
    },
}


def log_of(n: int, seed: int = 3) -> pd.DataFrame:
    """Rows of which some share user and item, some the time, and some all of their cells."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "u": rng.integers(0, n // 12, n),
            "i": rng.integers(0, 60, n),
            "t": rng.integers(0, n // 3, n),
            "c": rng.choice([*"abcd"], n),
            "w": rng.normal(1e6, 1, n).round(3),
            "x": rng.choice([0.1, 0.7, 1.3], n),
            "y": rng.integers(0, 2, n),
            "z": rng.choice(["0", "1", ""], n),
        }
    )
    return pd.concat([rows, rows.sample(n // 10, random_state=1)], ignore_index=True)


def write_rows(folder: Path, rows: pd.DataFrame, form: str) -> Path:
    folder.mkdir()
    side = pd.DataFrame({"i": [*range(60)] * 2, "g": [*"pqrst"] * 24, "p": [*range(8)] * 15})
    if form == "shuffled":
        rows, side = (frame.sample(frac=1, random_state=5) for frame in (rows, side))
    side.to_csv(folder / "side.csv", index=False)
    if form == "parquet":
        pq.write_table(pa.Table.from_pandas(rows), folder / "rows.parquet")
    elif form == "gzip":
        text = rows.to_csv(index=False).encode()
        (folder / "rows.csv.gz").write_bytes(gzip.compress(text))
    elif form == "rewritten":
        rows = rows[rows.columns[::-1]].assign(
            extra=[f"{k}, of no use" for k in range(len(rows))],
            w=[f"{w:.12e}" if k % 2 else f"+{w}00" for k, w in enumerate(rows["w"])],
        )
        rows.to_csv(folder / "rows.csv", index=False, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    elif form == "mixed":
        rows[:300].to_csv(folder / "rows-1.csv", index=False)
        pq.write_table(pa.Table.from_pandas(rows[300:600]), folder / "rows-0.parquet")
        rows[600:].to_json(folder / "rows-2.jsonl", orient="records", lines=True)
    elif form == "split":
        for k in range(3):
            rows.iloc[k::3].to_csv(folder / f"rows-{9 - k}.csv", index=False)
    else:
        rows.to_csv(folder / "rows.csv", index=False)
    return folder
