"""A small shop: users by id, city and history, items by genres and brand, and a context."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from deepfm_dist.config import load_config

CONFIG = load_config(
    "sample", ["model={embedding_dim: 6, over_arch_layer_sizes: [9, 5], init_std: 0.5}"]
)
N_ITEMS, N_USERS = 45, 20
CITIES, DEVICES, BRANDS = ("Oslo", "Bergen"), ("phone", "desk"), ("Rand al'Thor", "b2", "3")
FEATURES = [
    {"name": "user", "entity": "user"},
    {"name": "city", "entity": "user", "file": "people.csv", "keep": "first"},
    {"name": "seen", "entity": "user", "history": "item", "pooling": "mean"},
    {"name": "item", "entity": "item"},
    {"name": "genre", "entity": "item", "file": "genres.csv"},
    {"name": "brand", "entity": "item", "file": "brands.csv", "keep": "first"},
    {"name": "device"},
    {"name": "hour", "kind": "numeric", "transform": "standard"},
]


class Shop:
    """The files of a shop, and what they say, read by pandas alone."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(4)
        rows = [
            (u, i)
            for u in range(N_USERS)
            for i in {*rng.permutation(N_ITEMS)[:6], *((3 * u + j) % N_ITEMS for j in range(3))}
        ]
        log = pd.DataFrame(rows, columns=["who", "what"])
        log = log.assign(device=rng.choice(DEVICES, len(log)), hour=rng.integers(0, 24, len(log)))
        genres = [(i, g) for i in range(N_ITEMS - 1) for g in rng.permutation(list("XYZ"))[: i % 3]]
        pd.DataFrame(genres, columns=["what", "genre"]).to_csv(folder / "genres.csv", index=False)
        self.genres = {i: {g for j, g in genres if j == i} for i in range(N_ITEMS)}
        self.brands = {i: BRANDS[i % 3] for i in range(N_ITEMS)}
        brands = pd.Series(self.brands, name="brand").rename_axis("what")
        brands.to_csv(folder / "brands.csv")
        self.cities = {u: CITIES[u % 2] for u in range(N_USERS)}
        pd.Series(self.cities, name="city").rename_axis("who").to_csv(folder / "people.csv")
        log.to_csv(folder / "log.csv", index=False)
        self.liked = log.groupby("who").what.apply(list).to_dict()
        self.data: dict[str, Any] = {
            "interactions": {"file": "log.csv", "user": "who", "item": "what"},
            "features": FEATURES,
            "split": {"valid": 0, "test": 0},
        }
