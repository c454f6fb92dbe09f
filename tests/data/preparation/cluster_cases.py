"""Settings and files on which preparation by threads and by tasks is compared."""

from pathlib import Path
from typing import Any

from deepfm_dist.data.preparation import local
from deepfm_dist.data.schema import DataConfig
from tests.data.preparation.content_logs import CASES as SPLITS_AND_TASKS
from tests.data.preparation.content_logs import WITH_TIMES, log_of, write_rows

RATED = {"file": "rows*", "user": "u", "item": "i", "time": "t", "rating": "x", "min_rating": 0.5}
CASES: dict[str, Any] = SPLITS_AND_TASKS | {
    "given files": WITH_TIMES | {"split": {"valid_file": "v.csv", "test_file": "w.csv"}},
    "rated": WITH_TIMES
    | {"interactions": RATED, "split": {"method": "leave_last", "valid": 1, "test": 1}},
    "refit": WITH_TIMES | {"refit": True},
    "rare users": WITH_TIMES
    | {
        "features": [
            {"name": "user", "entity": "user", "min_count": 14},
            *WITH_TIMES["features"][1:],
        ]
    },
    "users": SPLITS_AND_TASKS["random"]
    | {
        "interactions": WITH_TIMES["interactions"] | {"min_rows_per_item": 4},
        "features": [
            {"name": "seen", "entity": "user", "history": "item"},
            {"name": "item", "entity": "item"},
        ],
        "split": {"method": "users", "valid": 0.1, "test": 0.2},
    },
    "frequent users": SPLITS_AND_TASKS["random"]
    | {"interactions": RATED | {"min_rows_per_item": 3, "min_rows_per_user": 5}},
    "buckets": {
        "task": "ctr",
        "interactions": {"file": "rows*", "user": "u", "impressions": "s"},
        "features": [
            {"name": "user", "entity": "user"},
            {"name": "item", "entity": "item"},
            {"name": "w", "kind": "numeric", "transform": "bucket"},
            {"name": "x", "hash_rows": 7},
            {"name": "c", "separator": "|"},
        ],
    },
    "vectors": WITH_TIMES
    | {
        "features": [
            *WITH_TIMES["features"][:2],
            {"name": "v", "entity": "item", "kind": "vector", "file": "v.parquet", "key": "i"},
            {"name": "p", "entity": "user", "kind": "vector", "file": "v.parquet", "key": "u"},
        ]
    },
    "growth": SPLITS_AND_TASKS["random"] | {"vocabulary_from": "earlier"},
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def write_inputs(folder: Path) -> Path:
    """Writes the files that `CASES` read, and an earlier dataset; returns their folder."""
    rows = log_of(500)
    rows["s"] = [f"N{i % 9}-1 N{i % 11}-0" for i in rows["i"]]
    write_rows(folder, rows, "split")
    for name, seed in (("v.csv", 5), ("w.csv", 6)):
        log_of(120, seed).to_csv(folder / name, index=False)
    vectors = rows[["u", "i"]].assign(v=[[k % 7, 2.5] for k in range(len(rows))])
    vectors.assign(p=vectors["v"]).to_parquet(folder / "v.parquet")
    earlier = DataConfig.model_validate(CASES["temporal"])
    local.prepare(earlier, folder, folder / "earlier", seed=4)
    return folder
