"""A small shop whose users are known by items, attributes or both."""

from pathlib import Path

import numpy as np
import pandas as pd

from deepfm_dist.config import Config, config_from

KINDS = ("dry", "wet", "dry and wet")


def shop(folder: Path) -> Config:
    """A model of users by items, city, tags, age and taste, that depends on the device of a row."""
    rng = np.random.default_rng(3)
    rows = pd.DataFrame({"user": np.repeat(np.arange(30), 8)})
    rows["item"] = np.concatenate([rng.permutation(20)[:8] for _ in range(30)])
    rows["device"] = rng.choice(["phone", "desk"], len(rows))
    rows.to_csv(folder / "rows.csv", index=False)
    people = pd.DataFrame({"user": range(30), "city": rng.choice(["Oslo", "Bergen"], 30)})
    people["age"] = rng.integers(20, 60, 30)
    people["tags"] = ["|".join(rng.choice(list("abc"), 2, replace=False)) for _ in range(30)]
    people.to_csv(folder / "people.csv", index=False)
    taste = pd.DataFrame({"user": range(30), "taste": [*rng.normal(0, 100, (30, 3))]})
    taste.to_parquet(folder / "taste.parquet")
    kinds = pd.DataFrame({"item": range(20), "kind": [KINDS[i % 3] for i in range(20)]})
    kinds.to_csv(folder / "kinds.csv", index=False)
    of_user = {"entity": "user", "file": "people.csv"}
    features = [
        {"name": "seen", "entity": "user", "history": "item"},
        {"name": "item", "entity": "item"},
        {"name": "kind", "entity": "item", "file": "kinds.csv"},
        {"name": "city", **of_user, "keep": "first"},
        {"name": "age", **of_user, "kind": "numeric", "transform": "standard"},
        {"name": "tags", **of_user, "separator": "|"},
        {"name": "taste", "entity": "user", "file": "taste.parquet", "kind": "vector"},
        {"name": "device"},
    ]
    roots = {"prepared_root": str(folder / "p"), "runs_root": str(folder / "r"), "loggers": []}
    return config_from(
        {
            "run": {"name": "shop", **roots},
            "data": {
                "root": str(folder),
                "interactions": {"file": "rows.csv", "user": "user", "item": "item"},
                "features": features,
                "split": {"valid": 0, "test": 0},
            },
            "model": {"init_std": 0.3, "embedding_dim": 6, "over_arch_layer_sizes": [8]},
            "trainer": {"max_steps": 20, "batch_size": 200},
            "recommend": {"context": {"device": "phone"}},
        }
    )
