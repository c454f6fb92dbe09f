"""Seeded logs of kinds that no public data set is: few or wide rows, new items, short sequences.

The labels of click logs are drawn from the log-odds of a factorization machine: weights of all
values and inner products of their vectors. Users of the sequences walk among groups of items, so
that the next item depends on the last ones. Clicks on new items hang on each user's taste for an
item's genre alone, and the items of the test have no other rows.

    python benchmarks/logs.py OUT --log clicks_10k
    python -m deepfm_dist.train --config OUT/config.yaml
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import yaml

VECTOR_LENGTH = 4
WEIGHTS_STD, PAIRS_STD, NUMBERS_WEIGHT = 0.9, 0.5, 0.2
GROUPS, LEAVES_GROUP = 400, 0.25
"""Groups of items, and the probability with which a user's next item is of another one."""


@dataclass(frozen=True)
class Clicks:
    """A click log.

    Attributes:
        rows: number of rows.
        values: number of values of each categorical field.
        numbers: number of numeric fields.
        bias: log-odds of a click where nothing else speaks.
    """

    rows: int
    values: tuple[int, ...]
    numbers: int = 0
    bias: float = -1.5


@dataclass(frozen=True)
class Sequences:
    """Users' items in order of time; the last two of each are held out.

    Attributes:
        users: number of users.
        items: number of items.
        length: items of a user.
    """

    users: int
    items: int
    length: int = 5


@dataclass(frozen=True)
class NewItems:
    """A click log whose test is of items that have no training rows.

    Attributes:
        rows: number of rows; a tenth more for validation, a fifth for the test.
        users: number of users.
        items: number of items, half of them new.
        genres: number of genres.
        taste_std: standard deviation of a user's log-odds of a click over the genres.
    """

    rows: int
    users: int = 300
    items: int = 240
    genres: int = 12
    taste_std: float = 2.7


@dataclass(frozen=True)
class Ratings:
    """Ratings of 1 to 5 with their times; 4 and 5 are positives.

    Attributes:
        users: number of users.
        items: number of items.
        rows: number of ratings, about.
        least: ratings of a user, at least.
    """

    users: int
    items: int
    rows: int
    least: int = 20


LOGS: dict[str, Clicks | Sequences | NewItems | Ratings] = {
    "clicks_2k": Clicks(2_000, (50, 20, 10)),
    "clicks_10k": Clicks(10_000, (500, 200, 10, 4, 24)),
    "clicks_unbalanced": Clicks(50_000, (2_000, 500, 10, 4, 24), bias=-6.0),
    "clicks_two_fields": Clicks(20_000, (50, 20)),
    "clicks_one_large_field": Clicks(100_000, (60_000, 30, 10)),
    "clicks_39_fields": Clicks(100_000, (1_000,) * 6 + (100,) * 10 + (10,) * 10, 13, -1.0),
    "clicks_new_items": NewItems(20_000),
    "sequences": Sequences(20_000, 12_000),
    "sequences_small": Sequences(5_000, 3_000),
    "sequences_tiny": Sequences(2_000, 1_200),
    "ratings_100k": Ratings(943, 1_682, 100_000),
}


def clicks(log: Clicks, seed: int) -> pd.DataFrame:
    """Rows of a click log: the categorical fields, the numeric ones, the label ``y``."""
    rng = np.random.default_rng(seed)
    columns: dict[str, npt.NDArray[np.generic]] = {}
    logits = np.full(log.rows, log.bias)
    vectors = []
    for number, n_values in enumerate(log.values):
        values = rng.integers(0, n_values, log.rows)
        if n_values > 20:  # a few values have most of the rows
            values = np.minimum(rng.pareto(1.1, log.rows) * n_values / 20, n_values - 1).astype(int)
        columns[f"c{number}"] = np.char.add("v", values.astype(str))
        logits += rng.normal(0, WEIGHTS_STD / len(log.values) ** 0.5, n_values)[values]
        vectors.append(rng.normal(size=(n_values, VECTOR_LENGTH))[values])
    factors = np.stack(vectors, 1)
    pairs = (factors.sum(1) ** 2 - (factors**2).sum(1)).sum(1)
    logits += PAIRS_STD * pairs / pairs.std()
    for number in range(log.numbers):
        columns[f"x{number}"] = rng.normal(size=log.rows).round(4)
        logits += NUMBERS_WEIGHT * columns[f"x{number}"]
    columns["y"] = (rng.random(log.rows) < 1 / (1 + np.exp(-logits))).astype(int)
    return pd.DataFrame(columns)


def sequences(log: Sequences, seed: int) -> pd.DataFrame:
    """Rows ``user, item, time``; no user has an item twice."""
    rng = np.random.default_rng(seed)
    popularity = (np.arange(log.items) + 5.0) ** -0.8
    group_of = rng.integers(0, GROUPS, log.items)
    members = [np.flatnonzero(group_of == group) for group in range(GROUPS)]
    members = [items for items in members if len(items)]
    shares = np.array([popularity[items].sum() for items in members])
    rows = []
    for user in range(log.users):
        group, taken = int(rng.choice(len(members), p=shares / shares.sum())), []
        while len(taken) < log.length:
            if rng.random() < LEAVES_GROUP:
                group = int(group + rng.integers(1, 4)) % len(members)
            weights = popularity[members[group]]
            item = int(rng.choice(members[group], p=weights / weights.sum()))
            if item not in taken:
                taken.append(item)
        rows += [(user, item, time) for time, item in enumerate(taken)]
    return pd.DataFrame(rows, columns=["user", "item", "time"])


def ratings(log: Ratings, seed: int) -> pd.DataFrame:
    """Rows ``user, item, rating, time``.

    Who rates what depends on popularity and taste, and so does the rating. A user rates within some
    days, in any order.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 18, log.items)
    vectors = rng.normal(size=(18, 8))[kinds] + 0.7 * rng.normal(size=(log.items, 8))
    popularity = -0.9 * np.log(np.arange(log.items) + 10.0)
    lengths = rng.pareto(1.3, log.users)
    lengths = np.minimum(lengths, 8 * lengths.mean())
    extra = log.rows / log.users - log.least
    lengths = (log.least + extra * lengths / lengths.mean()).astype(int)
    rows = []
    for user, length in enumerate(np.minimum(lengths, log.items // 2)):
        taste = vectors @ rng.normal(size=8) / 8**0.5
        odds = popularity + 0.8 * taste + rng.gumbel(size=log.items)
        items = rng.permutation(np.argsort(-odds)[:length])
        liking = 3.2 + 0.7 * taste[items] + rng.normal(0, 0.8, length)
        times = (
            875_000_000 + rng.integers(0, 20_000_000) + rng.integers(0, 300_000, length).cumsum()
        )
        stars = np.clip(np.round(liking), 1, 5).astype(int)
        rows += [*zip([user] * length, items, stars, times, strict=True)]
    return pd.DataFrame(rows, columns=["user", "item", "rating", "time"])


def clicks_on_new_items(log: NewItems, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows ``user, item, y, split``, and each item's genre."""
    rng = np.random.default_rng(seed)
    genres = rng.integers(0, log.genres, log.items)
    taste = rng.normal(0, log.taste_std, (log.users, log.genres))
    half, parts = log.items // 2, []
    for split, n, first in (
        ("train", log.rows, 0),
        ("valid", log.rows // 10, 0),
        ("test", log.rows // 5, half),
    ):
        users, items = rng.integers(0, log.users, n), rng.integers(first, first + half, n)
        odds = taste[users, genres[items]]
        y = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(int)
        parts.append(pd.DataFrame({"user": users, "item": items, "y": y, "split": split}))
    return pd.concat(parts), pd.DataFrame({"item": range(log.items), "genre": genres})


def write(name: str, folder: Path, seed: int = 1) -> Path:
    """Writes a log and the configuration that names its columns; returns the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    log = LOGS[name]
    if isinstance(log, Clicks):
        rows = clicks(log, seed)
        kinds = {c: {"kind": "numeric"} if c.startswith("x") else {} for c in rows if c != "y"}
        data = {
            "task": "ctr",
            "interactions": {"file": "log.csv", "label": "y"},
            "features": [{"name": column, **kind} for column, kind in kinds.items()],
            "split": {"valid": 0.1, "test": 0.2},
        }
    elif isinstance(log, NewItems):
        rows, genres = clicks_on_new_items(log, seed)
        genres.to_csv(folder / "genres.csv", index=False)
        columns = {"user": "user", "item": "item", "label": "y", "split": "split"}
        data = {
            "task": "ctr",
            "interactions": {"file": "log.csv", **columns},
            "features": [
                {"name": "user", "entity": "user"},
                {"name": "item", "entity": "item"},
                {"name": "genre", "entity": "item", "file": "genres.csv"},
            ],
        }
    elif isinstance(log, Ratings):
        rows = ratings(log, seed)
        columns = {name: name for name in rows}
        data = {
            "interactions": {"file": "log.csv", **columns, "min_rating": 4},
            "split": {"method": "per_user"},
        }
    else:
        rows = sequences(log, seed)
        data = {
            "interactions": {"file": "log.csv", "user": "user", "item": "item", "time": "time"},
            "split": {"method": "leave_last", "valid": 1, "test": 1},
        }
    rows.to_csv(folder / "log.csv", index=False)
    path = folder / "config.yaml"
    data["root"] = str(folder.resolve())
    path.write_text(yaml.safe_dump({"run": {"name": name}, "data": data}))
    return path


def main() -> int:
    """Writes one log."""
    parser = argparse.ArgumentParser(description="Write a log of an unusual kind.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--log", choices=LOGS, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(write(arguments.log, arguments.out, arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
