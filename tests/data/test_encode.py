"""Every file of a prepared dataset against what plain Python makes of the same input."""

import gzip
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deepfm_dist import prepare as prepare_command
from deepfm_dist.config import Config, load_config
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import split_cells
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.manifest import SPLITS, Manifest
from deepfm_dist.data.preparation import job
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.data.sources import delimited, read_table
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import ConfigError, DataError
from deepfm_dist.seeding import mix
from tests.distributed.test_distributed import Run
from tests.ranks import run_alone

ROWS = """u,i,at,stars,hour,mood,amount
a,x,5,5,9,happy|calm,10
a,y,4,5,9,,20
a,y,9,5,10,calm,30
b,x,1,5,9,happy,
b,z,2,5,11,?,40
b,w,3,1,11,calm,50
c,z,7,5,9,calm,60
c,y,8,5,10,calm,70
c,x,9,5,10,calm,80
c,v,10,5,10,calm,90
"""
GENRES = "i\tgenre\nx\tComedy\nx\tDrama\nx\tComedy\ny\tDrama\nq\tHorror\n"
PEOPLE = "u,age\na,30\nb,\nc,50\nc,99\n"
HELD_OUT = (
    "u,i,at,stars,hour,mood,amount\na,z,10,5,9,calm,1\nd,x,10,5,9,calm,1\na,new,11,5,9,sad,1\n"
)
BASE: dict[str, Any] = yaml.safe_load("""
interactions: {file: rows.csv, user: u, item: i, time: at, rating: stars, min_rating: 4}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: genre, entity: item, file: genres.tsv}
  - {name: first, entity: item, file: genres.tsv, column: genre, keep: first, table: genre}
  - {name: age, entity: user, file: people.csv, kind: numeric, transform: standard}
  - {name: hour}
  - {name: mood, separator: "|", missing: ["?"], min_count: 2}
  - {name: amount, kind: numeric, transform: log}
titles: {file: titles.csv, column: name}
split: {valid: 0, test_file: heldout.csv}
negatives: {evaluation_per_positive: 1}
""")


def bag_of(jagged: object, row: int) -> list[int]:
    assert isinstance(jagged, Jagged)
    return jagged.values[jagged.offsets[row] : jagged.offsets[row + 1]].tolist()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "rows.csv": ROWS,
        "genres.tsv": GENRES,
        "people.csv": PEOPLE,
        "heldout.csv": HELD_OUT,
        "titles.csv": "i,name\nx,The X\nz,The Z\n",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def made(root: Path, **changes: Any) -> PreparedDataset:
    data = DataConfig.model_validate(BASE | changes)
    prepare(data, root, root / "out" / "d", seed=1)
    return PreparedDataset(root / "out" / "d")


def test_rows_entities_and_counts_are_as_expected(root: Path) -> None:
    dataset = made(root)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    assert sorted(users[1:]) == ["a", "b", "c"]
    assert sorted(items[1:]) == ["v", "x", "y", "z"]  # w was rated below the threshold
    moods = [None, *dataset.vocabulary("mood").ids.to_pylist()]
    hours = [None, *dataset.vocabulary("hour").ids.to_pylist()]
    assert sorted(moods[1:]) == ["calm", "happy"]
    train = dataset.rows("train")
    found = [
        (
            users[train.users[r]],
            items[train.items[r]],
            hours[train.context["hour"][r]],
            [moods[v] for v in bag_of(train.context["mood"], r)],
            round(float(train.context["amount"][r]), 4),
        )
        for r in range(train.n)
    ]
    assert sorted(found) == [
        ("a", "x", "9", ["happy", "calm"], round(np.log1p(10), 4)),
        ("a", "y", "10", ["calm"], round(np.log1p(30), 4)),  # the later of two
        ("b", "x", "9", ["happy"], 0.0),
        ("b", "z", "11", [], round(np.log1p(40), 4)),
        ("c", "v", "10", ["calm"], round(np.log1p(90), 4)),
        ("c", "x", "10", ["calm"], round(np.log1p(80), 4)),
        ("c", "y", "10", ["calm"], round(np.log1p(70), 4)),
        ("c", "z", "9", ["calm"], round(np.log1p(60), 4)),
    ]
    assert dataset.manifest.dropped == {
        "genres.tsv rows of items without training rows": 1,  # though two fields read them
        "repeated (user, item) rows": 1,
        "repeated age values of one user": 1,
        "repeated first values of one item": 1,
        "repeated genre values of one item": 1,
        "rows rated below 4, kept as seen": 1,
    }
    genre_ids = [None, *dataset.vocabulary("genre").ids.to_pylist()]
    for field, expected in {
        "genre": {"x": ["Comedy", "Drama"], "y": ["Drama"], "z": []},
        "first": {"x": ["Comedy"], "y": ["Drama"], "z": []},
    }.items():
        for item, genres in expected.items():
            row = items.index(item)
            bag = bag_of(dataset.entity_fields[field], row)
            assert [genre_ids[v] for v in bag] == genres
    ages = dataset.entity_fields["age"]
    assert isinstance(ages, np.ndarray)
    assert {u: round(float(ages[users.index(u)]), 5) for u in "abc"} == {"a": -1, "b": 0, "c": 1}
    of_c = bag_of(dataset.history, users.index("c"))
    assert [items[v] for v in of_c] == ["z", "y", "x", "v"]  # in time order
    titles = dataset.titles()
    assert titles is not None
    assert [titles[items.index(i)].as_py() for i in "xyz"] == ["The X", None, "The Z"]
    assert dataset.popularity()[items.index("x")] == 3


def test_held_out_rows_keep_unknown_ids_and_get_clean_negatives(root: Path) -> None:
    dataset = made(root)
    test = dataset.rows("test")
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    assert test.labels.tolist() == [1, 0] * 3
    at = zip(test.users[::2], test.items[::2], strict=True)
    positives = [(users[u], items[i]) for u, i in at]
    assert sorted(positives, key=str) == [("a", "z"), ("a", None), (None, "x")]
    known = {"a": {"x", "y", "z"}}
    assert test.n == 6
    for user, item in zip(test.users[1::2], test.items[1::2], strict=True):
        assert items[item] is not None
        assert items[item] not in known.get(users[user] or "", set()) or users[user] is None


def test_held_out_rows_have_as_many_negatives_as_exist(root: Path) -> None:
    dataset = made(root, negatives={"evaluation_per_positive": 3})
    test, users = dataset.rows("test"), dataset.entity_ids("user").to_pylist()
    items = dataset.entity_ids("item").to_pylist()
    negatives: dict[str | None, list[str]] = {}
    for user, item, label in zip(test.users, test.items, test.labels, strict=True):
        if label == 0:
            negatives.setdefault(users[user], []).append(items[item])
    # Of the items v, x, y and z: user a has met x, y and z, and the unknown user d has met x.
    assert sorted(negatives["a"]) == ["v", "v"]  # of two positives
    assert sorted(negatives[None]) == ["v", "y", "z"]
    assert dataset.manifest.splits["test"].rows == 3 + 2 + 3
    short = "users of test with fewer than negatives.evaluation_per_positive=3 unseen items"
    assert dataset.manifest.noted[short] == 1


def test_a_changed_input_or_setting_is_prepared_anew(root: Path) -> None:
    made(root)
    first = (root / "out/d/manifest.json").stat().st_mtime_ns
    made(root)
    assert (root / "out/d/manifest.json").stat().st_mtime_ns == first
    made(root, titles=None)
    second = (root / "out/d/manifest.json").stat().st_mtime_ns
    assert second != first
    (root / "rows.csv").write_text(ROWS + "c,y2,9,5,10,calm,80\n")
    assert made(root, titles=None).manifest.entities["item"] == 6
    assert [p.name for p in (root / "out").iterdir()] == ["d"]


@pytest.mark.parametrize("change", ["seed", "setting", "contents", "unreadable row", "nothing"])
def test_any_change_counts(root: Path, change: str) -> None:
    rows = "u,i\n" + "".join(f"{k % 3},{k}\n" for k in range(10, 20))
    small(root, rows, str(USER_AND_ITEM))
    before = PreparedDataset(root / "out" / "s").manifest
    spec = before.data.model_dump() | {"name": "other", "root": "elsewhere"}  # these do not count
    if change == "setting":
        spec["negatives"] = {"per_positive": 2}
    if change == "contents":  # of the same length
        (root / "s.csv").write_text(rows.replace("19", "20"))
        os.utime(root / "s.csv", ns=(1, 1))
    if change == "unreadable row":
        spec["on_bad_row"] = "skip"
    after = made_of(root, spec, seed=1 + (change == "seed")).manifest
    assert (after.fingerprint == before.fingerprint) == (change == "nothing")
    assert (after.vocabulary_hash == before.vocabulary_hash) == (change not in ("seed", "contents"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("s.csv", "", ""),  # at other times
        ("s.csv", "\n0,0,0,1\n1,1,1,1", "\n0,0,1,1\n1,1,0,1"),
        ("s.csv", "\n0,0,0,1\n1,1,1,1", "\n0,1,0,1\n1,0,1,1"),
        ("s.csv", "\n0,0,0,1", "\n0,0,0,2"),
        ("side.csv", "2,4", "2,5"),
        ("v.csv", "0,1,1", "0,2,1"),
    ],
    ids=["nothing", "labels", "items", "weight", "field", "held out"],
)
def test_the_datas_hash_is_of_all_that_is_trained_on(
    root: Path, name: str, old: str, new: str
) -> None:
    texts = {
        "s.csv": "u,i,y,w\n" + "".join(f"{k % 3},{k % 7},{k % 2},1\n" for k in range(50)),
        "v.csv": "u,i,y,w\n0,1,1,1\n1,2,0,1\n",
        "side.csv": "i,n\n1,3\n2,4\n",
    }
    of_items = {"name": "n", "entity": "item", "file": "side.csv", "kind": "numeric"}
    spec = {
        "task": "ctr",
        "interactions": {"file": "s.csv", "user": "u", "item": "i", "label": "y", "weight": "w"},
        "features": [*USER_AND_ITEM, of_items],
        "split": {"valid_file": "v.csv", "test": 0},
    }

    def made_at(time_ns: int) -> Manifest:
        for file, text in texts.items():
            (root / file).write_text(text)
            os.utime(root / file, ns=(1, time_ns))
        return made_of(root, spec).manifest

    before = made_at(1)
    assert old in texts[name]
    texts[name] = texts[name].replace(old, new, 1)
    after = made_at(2)
    assert after.fingerprint != before.fingerprint
    assert after.vocabulary_hash == before.vocabulary_hash
    assert (after.data_hash == before.data_hash) == (old == new)


@pytest.mark.parametrize("change", ["boundaries", "mean", "hash_rows", "buckets", "transform"])
def test_a_checkpoint_fits_only_what_its_numbers_and_hashes_were(root: Path, change: str) -> None:
    def hash_after(number: int, rows: int, buckets: int, of_x: str) -> str:
        fields = f"""[{{name: h, column: i, hash_rows: {rows}}},
          {{name: n, kind: numeric, transform: bucket, buckets: {buckets}}},
          {{name: x, kind: numeric, transform: {of_x}}}]"""
        x, n = (number, 1) if change == "mean" else (1, number)
        lines = "".join(f"u,{k},{k * n},{k * x}\n" for k in range(40))
        small(root, f"u,i,n,x\n{lines}", fields)
        return PreparedDataset(root / "out" / "s").manifest.vocabulary_hash

    before = hash_after(1, 5, 4, "standard")
    assert hash_after(1, 5, 4, "standard") == before
    assert before != hash_after(
        1 + (change in ("boundaries", "mean")),
        5 + (change == "hash_rows"),
        4 + (change == "buckets"),
        "none" if change == "transform" else "standard",
    )


def test_what_a_killed_preparation_left_is_cleared(root: Path) -> None:
    """On this machine: of another one's, nobody here knows whether it is still at work."""
    host, init = socket.gethostname(), 1
    dead = [f".d.part-{host}-999999999", f".d.part-{host}-{os.getpid()}"]
    alive = [f".d.part-{host}-{init}", ".d.part-other-9", ".d[1].part-x-2", ".dd.part-x-3"]
    for name in (*dead, *alive):
        (root / "out" / name / "dataset" / "train").mkdir(parents=True)
    made(root)
    assert sorted(p.name for p in (root / "out").iterdir()) == sorted(["d", *alive])


def test_refit_trains_on_everything(root: Path) -> None:
    dataset = made(root, refit=True)
    assert dataset.manifest.splits["train"].rows == 11
    assert dataset.manifest.splits["test"].rows == 0


def test_fixed_negatives_are_split_with_the_positives(root: Path) -> None:
    features = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    dataset = made(
        root,
        features=features,
        split={"valid": 0, "test": 0.3},
        negatives={"fixed_per_user": 1},
        interactions={"file": "rows.csv", "user": "u", "item": "i"},
    )
    frame = pd.concat([pd.read_parquet(dataset.folder / s) for s in ("train", "test")])
    assert len(frame) == 9 + 3
    assert (frame["label"] == 0).sum() == 3
    assert len(pd.read_parquet(dataset.folder / "test")) == 4
    assert not frame[frame["item"] > 0].duplicated(["user", "item"]).any()


def test_click_rows_keep_their_labels(root: Path) -> None:
    (root / "clicks.csv").write_text("y,ad,n\n1,p,1\n0,q,3\n1,p,\n0,r,5\n")
    spec = {"file": "clicks.csv", "label": "y"}
    data = DataConfig.model_validate(
        {
            "task": "ctr",
            "interactions": spec,
            "features": [{"name": "ad"}, {"name": "n", "kind": "numeric", "transform": "standard"}],
            "split": {"valid": 0, "test": 0},
        }
    )
    prepare(data, root, root / "ctr", seed=1)
    table = pq.read_table(root / "ctr/train")
    rows = sorted(zip(table["n"].to_pylist(), table["label"].to_pylist(), strict=True))
    numbers = (np.array([1, 3, 3, 5]) - 3) / np.std([1, 3, 5])
    np.testing.assert_allclose(rows, np.stack([numbers, [1, 0, 1, 0]], axis=1), rtol=1e-6)
    (root / "clicks.csv").write_text("y,ad,n\n2,p,1\n")
    with pytest.raises(DataError, match=r"clicks\.csv, line 2: y '2' is not a label: 0, 1"):
        prepare(data, root, root / "ctr", seed=1)


def test_a_folder_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "out").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        made(root)


USER_AND_ITEM = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]


def small(
    root: Path, rows: str, features: str = "[{name: user, entity: user}]", **changes: Any
) -> PreparedDataset:
    """A dataset of one file ``s.csv`` with users ``u`` and items ``i``, nothing held out."""
    (root / "s.csv").write_text(rows)
    spec = {
        "interactions": {"file": "s.csv", "user": "u", "item": "i"},
        "features": yaml.safe_load(features),
        "split": {"valid": 0, "test": 0},
    }
    return made_of(root, spec | changes)


def made_of(root: Path, spec: dict[str, Any], seed: int = 1) -> PreparedDataset:
    prepare(DataConfig.model_validate(spec), root, root / "out" / "s", seed)
    return PreparedDataset(root / "out" / "s")


def pairs_of(dataset: PreparedDataset, split: str) -> list[tuple[str | None, str | None]]:
    """(user, item) of a split's rows as external ids; None is unknown."""
    rows = dataset.rows(split)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    assert rows.users is not None
    assert rows.items is not None
    return [(users[u], items[i]) for u, i in zip(rows.users, rows.items, strict=True)]


def test_the_manifest_tells_what_is_there(root: Path) -> None:
    manifest = made(root).manifest
    assert {n: (t.rows, t.features) for n, t in manifest.tables.items()} == {
        "user": (4, ("user",)),
        "item": (5, ("item",)),
        "genre": (3, ("genre", "first")),  # one shared table
        "hour": (4, ("hour",)),
        "mood": (3, ("mood",)),
    }
    assert manifest.entities == {"user": 4, "item": 5}
    assert {n: (s.rows, s.positives) for n, s in manifest.splits.items()} == {
        "train": (8, 8),
        "valid": (0, 0),
        "test": (6, 3),
    }
    assert manifest.inputs == {
        name: (root / name).stat().st_size
        for name in ("rows.csv", "heldout.csv", "genres.tsv", "people.csv", "titles.csv")
    }
    assert (manifest.numeric["age"].mean, manifest.numeric["age"].std) == (40, 10)  # 30, 50


def test_no_split_but_train_reaches_vocabularies_and_statistics(root: Path) -> None:
    rows = "u,i,p,h,part\na,x,1,k,0\nb,y,3,k,train\na,z,100,new,1\nc,x,100,k,valid\nb,q,100,k,2\n"
    fields = """[{name: user, entity: user}, {name: item, entity: item}, {name: h},
      {name: p, kind: numeric, transform: standard}]"""
    spec = {"file": "s.csv", "user": "u", "item": "i", "split": "part"}
    only = {"negatives": {"evaluation_per_positive": 1}, "interactions": spec}
    dataset = small(root, rows, fields, **only)
    assert dataset.manifest.entities == {"user": 3, "item": 3}
    assert dataset.vocabulary("h").ids.to_pylist() == ["k"]
    assert (dataset.manifest.numeric["p"].mean, dataset.manifest.numeric["p"].std) == (2, 1)
    assert sorted(pairs_of(dataset, "train")) == [("a", "x"), ("b", "y")]
    valid, test = pairs_of(dataset, "valid"), pairs_of(dataset, "test")
    held_out = dataset.rows("valid")
    hours = np.asarray(held_out.context["h"]).tolist()
    with_negatives = zip(valid[::2], valid[1::2], hours[::2], hours[1::2], strict=True)
    assert sorted(with_negatives, key=str) == [  # negatives keep the context
        (("a", None), ("a", "y"), 0, 0),
        ((None, "x"), (None, "y"), 1, 1),
    ]
    assert test == [("b", None), ("b", "x")]
    assert np.asarray(held_out.context["p"]).tolist() == [98] * 4
    (root / "s.csv").write_text(rows.replace("valid", "perhaps"))
    with pytest.raises(
        DataError, match=r"s\.csv, line 5: part 'perhaps' is not a split: 0, 1, 2 or train"
    ):
        made_of(root, dataset.manifest.data.model_dump())
    (root / "s.csv").write_text("u,i,p,h,part\na,x,1,k,2\n")
    with pytest.raises(DataError, match=r"s\.csv: the split leaves no training rows"):
        made_of(root, dataset.manifest.data.model_dump())


def test_held_out_files_are_held_out_and_rows_repeated_there_are_dropped(root: Path) -> None:
    (root / "v.csv").write_text("u,i,s\na,y,5\na,x,5\nb,y,1\n")
    rated = {"file": "s.csv", "user": "u", "item": "i", "rating": "s", "min_rating": 3}
    dataset = small(
        root,
        "u,i,s\na,x,5\nb,x,4\nb,z,3\nb,y,2\n",
        interactions=rated,
        split={"valid_file": "v.csv", "test": 0},
        negatives={"evaluation_per_positive": 1},
    )
    assert sorted(pairs_of(dataset, "train")) == [("a", "x"), ("b", "x"), ("b", "z")]
    assert pairs_of(dataset, "valid") == [("a", None), ("a", "z")]
    assert dataset.manifest.dropped == {
        "rows rated below 3, kept as seen": 1,
        "repeated (user, item) rows": 2,  # (b, y) is below in both files
    }
    (root / "v.csv").write_text("u,i,s\na,y,1\n")
    with pytest.raises(DataError, match=r"^v\.csv: no row is rated 3 or more"):
        made_of(root, dataset.manifest.data.model_dump())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_negatives_avoid_a_users_positives_of_every_split(root: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    liked = {(f"u{rng.integers(6)}", f"i{rng.integers(12)}") for _ in range(50)}
    (root / "s.csv").write_text("u,i\n" + "".join(f"{u},{i}\n" for u, i in sorted(liked)))
    spec = {
        "interactions": {"file": "s.csv", "user": "u", "item": "i"},
        "features": USER_AND_ITEM,
        "split": {"valid": 0.2, "test": 0.2},
        "negatives": {"evaluation_per_positive": 2},
    }
    dataset = made_of(root, spec, seed)
    positives: list[tuple[str | None, str | None]] = pairs_of(dataset, "train")
    known_users = {u for u, _ in positives}
    known_items = {i for _, i in positives}
    for split in ("valid", "test"):
        labels, pairs = dataset.rows(split).labels, pairs_of(dataset, split)
        assert labels is not None
        assert labels.tolist() == [1, 0, 0] * (len(pairs) // 3)
        for place in range(0, len(pairs), 3):
            (user, _), *negatives = group = pairs[place : place + 3]
            assert {u for u, _ in group} == {user}
            assert {i for _, i in negatives} <= known_items
            assert len(set(negatives)) == 2
            if user is not None:
                assert not set(negatives) & liked
        positives += pairs[::3]
    expected = sorted(
        str((u if u in known_users else None, i if i in known_items else None)) for u, i in liked
    )
    assert sorted(map(str, positives)) == expected


def test_fixed_negatives_are_distinct_unseen_and_as_many_for_each_user(root: Path) -> None:
    liked = {("a", "w"), ("a", "x"), ("b", "x"), ("c", "y"), ("c", "z"), ("c", "w")}
    rows = "u,i\n" + "".join(f"{u},{i}\n" for u, i in sorted(liked))
    features = str(USER_AND_ITEM)
    dataset = small(root, rows, features, negatives={"fixed_per_user": 1})
    found = pairs_of(dataset, "train")
    labels = dataset.rows("train").labels
    assert labels is not None
    assert {p for p, y in zip(found, labels, strict=True) if y == 1} == liked
    negatives = [p for p, y in zip(found, labels, strict=True) if y == 0]
    assert sorted(u for u, _ in negatives) == ["a", "b", "c"]
    assert not set(negatives) & liked
    assert not dataset.manifest.sampled
    dataset = small(root, rows, features, negatives={"fixed_per_user": 3})  # of 2, 3 and 1 unseen
    found, labels = pairs_of(dataset, "train"), dataset.rows("train").labels
    negatives = [p for p, y in zip(found, labels, strict=True) if y == 0]
    assert set(negatives) == {(u, i) for u in "abc" for i in "wxyz"} - liked
    assert len(negatives) == 2 + 3 + 1
    assert list(dataset.manifest.noted.items()) == [
        ("users with fewer than negatives.fixed_per_user=3 unseen items", 2)
    ]


def test_ids_are_text(root: Path) -> None:
    dataset = small(root, "u,i\n007,1e3\n7,1000\n007,01\n", str(USER_AND_ITEM))
    assert sorted(pairs_of(dataset, "train")) == [("007", "01"), ("007", "1e3"), ("7", "1000")]


def test_rare_ids_share_the_unknown_row(root: Path) -> None:
    features = "[{name: user, entity: user, min_count: 2}, {name: item, entity: item}]"
    dataset = small(root, "u,i\na,x\na,y\nb,x\n", features)
    assert sorted(pairs_of(dataset, "train"), key=str) == [("a", "x"), ("a", "y"), (None, "x")]
    assert dataset.manifest.tables["user"].rows == 2
    features = "[{name: user, entity: user}, {name: h, min_count: 2}]"
    dataset = small(root, "u,i,h\na,x,p\na,y,q\nb,x,p\n", features)
    assert dataset.vocabulary("h").ids.to_pylist() == ["p"]
    assert sorted(np.asarray(dataset.rows("train").context["h"]).tolist()) == [0, 1, 1]


def test_histories_are_in_time_order(root: Path) -> None:
    timed = {"file": "s.csv", "user": "u", "item": "i", "time": "at"}
    times = {"ax": "03", "by": "01", "ay": "02", "az": "04", "aw": "02 12:00"}
    rows = "u,i,at\n" + "".join(f"{u},{i},1970-01-{at}\n" for (u, i), at in times.items())
    dataset = small(root, rows, str(USER_AND_ITEM), interactions=timed)
    items = dataset.entity_ids("item").to_pylist()
    user = dataset.entity_ids("user").to_pylist().index("a")
    assert [items[v] for v in bag_of(dataset.history, user)] == [*"ywxz"]


@pytest.mark.parametrize(("keep", "bags"), [("all", ["pq", "r", "", "s"]), ("first", "pr s")])
def test_a_context_field_keeps_all_or_the_first_of_its_values(
    root: Path, keep: str, bags: list[str]
) -> None:
    features = f"[{{name: user, entity: user}}, {{name: m, separator: '|', keep: {keep}}}]"
    dataset = small(root, "u,i,m\na,x,p|q\na,y,|r|\nb,x,\nb,z,s\n", features)
    ids = ["", *dataset.vocabulary("m").ids.to_pylist()]
    values = dataset.rows("train").context["m"]
    if keep == "all":
        found = ["".join(ids[v] for v in bag_of(values, r)) for r in range(4)]
    else:  # a row without a value has the unknown one
        found = [ids[v] or " " for v in np.asarray(values)]
    assert sorted(found) == sorted(bags)


@pytest.mark.parametrize(
    ("missing", "cells", "expected"),
    [
        ("[]", "4,,9", [4, 0, 9]),
        ("[NA, '-1']", "NA,-1.0,9", [0, 0, 9]),
        ("['?']", "?,?,9", [0, 0, 9]),
    ],
)
def test_a_missing_number_is_0(root: Path, missing: str, cells: str, expected: list[float]) -> None:
    rows = "u,i,n\n" + "".join(f"u{k},x,{c}\n" for k, c in enumerate(cells.split(",")))
    features = f"[{{name: user, entity: user}}, {{name: n, kind: numeric, missing: {missing}}}]"
    values = small(root, rows, features).rows("train").context["n"]
    assert sorted(np.asarray(values).tolist()) == sorted(expected)


def test_numbers_are_transformed_as_their_formulas_say(root: Path) -> None:
    cells = [4.0, -2.5, 0.0, 11.0]
    kinds = ("none", "log", "standard")
    fields = [{"name": t, "column": "n", "kind": "numeric", "transform": t} for t in kinds]
    rows = "u,i,n\n" + "".join(f"u{k},x,{c}\n" for k, c in enumerate(cells))
    context = small(root, rows, str(USER_AND_ITEM + fields)).rows("train").context
    mean = sum(cells) / 4
    std = (sum((c - mean) ** 2 for c in cells) / 4) ** 0.5
    for name, expected in {
        "none": cells,
        "log": [math.copysign(math.log1p(abs(c)), c) for c in cells],
        "standard": [(c - mean) / std for c in cells],
    }.items():
        np.testing.assert_allclose(np.sort(context[name]), np.sort(expected), rtol=1e-6)
    features = "[{name: user, entity: user}, {name: n, kind: numeric, transform: standard}]"
    constant = small(root, "u,i,n\na,x,7\nb,x,7\n", features)
    assert np.asarray(constant.rows("train").context["n"]).tolist() == [0, 0]


@pytest.mark.parametrize("partition_bytes", [40, 1 << 30])
def test_close_numbers_far_from_0_stay_apart_until_they_are_transformed(
    root: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    times = [1_700_000_000 + 10 * k for k in range(10)]
    lines = "".join(f"u{k},{k},{n},0.1\n" for k, n in enumerate(times))
    (root / "born.csv").write_text("u,born\n" + "".join(f"u{k},{n}\n" for k, n in enumerate(times)))
    features = """[{name: user, entity: user}, {name: k, column: i},
      {name: at, kind: numeric, transform: standard},
      {name: same, kind: numeric, transform: standard},
      {name: born, entity: user, file: born.csv, kind: numeric, transform: standard},
      {name: told, entity: user, column: at, kind: numeric, transform: standard},
      {name: log, column: at, kind: numeric, transform: log}]"""
    dataset = small(root, "u,i,at,same\n" + lines, features)
    assert (dataset.manifest.files > 1) == (partition_bytes == 40)
    expected = (np.arange(10) - 4.5) / np.std(np.arange(10))
    for name in ("at", "born", "told"):
        spec = dataset.manifest.numeric[name]
        assert (spec.mean, spec.std) == pytest.approx((1_700_000_045, 28.72281323269), rel=1e-8)
    rows, ids = dataset.rows("train"), dataset.vocabulary("k").ids.to_pylist()
    order = np.argsort([int(ids[k - 1]) for k in np.asarray(rows.context["k"])])
    at = np.asarray(rows.context["at"])
    assert at.dtype == np.float32
    np.testing.assert_allclose(at[order], expected, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(rows.context["same"]), 0, atol=1e-15)
    np.testing.assert_allclose(np.asarray(rows.context["log"]), np.log1p(1.7e9), rtol=1e-6)
    users = [f"u{k}" for k in range(10)]
    places = [dataset.entity_ids("user").to_pylist().index(u) for u in users]
    for name in ("born", "told"):
        values = np.asarray(dataset.entity_fields[name])
        assert values.dtype == np.float32
        np.testing.assert_allclose(values[places], expected, rtol=1e-6)
    again = RowEncoder(dataset).encode(read_table(root / "s.csv", RowEncoder(dataset).columns))
    np.testing.assert_allclose(np.asarray(again.context["at"]), expected, rtol=1e-6)


def test_an_entitys_field_may_stand_in_the_interactions(root: Path) -> None:
    features = "[{name: user, entity: user}, {name: job, entity: user, column: j, separator: '+'}]"
    dataset = small(root, "u,i,j\na,x,p+q\na,y,\nb,x,\nc,x,q\n", features)
    jobs = [None, *dataset.vocabulary("job").ids.to_pylist()]
    users = dataset.entity_ids("user").to_pylist()
    bags = {u: bag_of(dataset.entity_fields["job"], users.index(u)) for u in "abc"}
    expected = {"a": ["p", "q"], "b": [], "c": ["q"]}
    assert {u: [jobs[v] for v in bag] for u, bag in bags.items()} == expected


def test_one_column_serves_several_purposes_each_with_its_own_settings(root: Path) -> None:
    """Time, a category, an hour, numbers with and without a word for missing, an id."""
    features = """[{name: user, entity: user}, {name: item, entity: item},
      {name: raw, column: at}, {name: hour, column: at, derive: hour, time_format: "%y%m%d%H"},
      {name: day, column: at, derive: weekday, time_format: "%y%m%d%H"},
      {name: n, column: m, kind: numeric, missing: ["-1"]}, {name: all, column: m, kind: numeric},
      {name: c, column: m, missing: ["-1"]}, {name: filled, column: m, missing: ["7"], fill: none},
      {name: parts, column: s, separator: "|"}, {name: joined, column: s},
      {name: who, column: u}, {name: number, column: u, kind: numeric}]"""
    rows = "u,i,at,m,s\n1,x,14102100,-1,a|b\n1,y,14102223,7,b\n2,x,14102105,8,a|b\n"
    dataset = small(
        root, rows, features, interactions={"file": "s.csv", "user": "u", "item": "i", "time": "at"}
    )
    read, words = dataset.rows("train"), {}
    order = np.argsort(pq.read_table(dataset.folder / "train")["time"].to_numpy())
    for feature in dataset.manifest.features:
        if feature.entity == "context" and feature.kind == "categorical":
            ids = ["", *dataset.vocabulary(feature.table_name).ids.to_pylist()]
            values = read.context[feature.name]
            bags = (
                [values.values[a:b] for a, b in pairwise(values.offsets)]
                if isinstance(values, Jagged)
                else [[v] for v in values]
            )
            words[feature.name] = [{ids[v] for v in bags[row]} for row in order]
    assert words == {
        "raw": [{"14102100"}, {"14102105"}, {"14102223"}],
        "hour": [{"0"}, {"5"}, {"23"}],
        "day": [{"1"}, {"1"}, {"2"}],
        "c": [{""}, {"8"}, {"7"}],
        "filled": [{"-1"}, {"8"}, {"none"}],
        "parts": [{"a", "b"}, {"a", "b"}, {"b"}],
        "joined": [{"a|b"}, {"a|b"}, {"b"}],
        "who": [{"1"}, {"2"}, {"1"}],
    }
    numbers = {
        name: [float(read.context[name][row]) for row in order] for name in ("n", "all", "number")
    }
    assert numbers == {"n": [0, 8, 7], "all": [-1, 8, 7], "number": [1, 2, 1]}
    again = RowEncoder(dataset)
    new = again.encode(read_table(root / "s.csv", again.columns))
    for name, values in new.context.items():
        flat = values.values if isinstance(values, Jagged) else values
        trained = read.context[name]
        assert sorted(flat) == sorted(trained.values if isinstance(trained, Jagged) else trained)


def test_ids_that_only_look_alike_are_kept_apart_and_named(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with caplog.at_level("WARNING"):
        dataset = small(root, f"u,i\na,{composed}\nb,{decomposed}\nb,tea\n", str(USER_AND_ITEM))
    assert {composed, decomposed, "tea"} <= set(dataset.entity_ids("item").to_pylist())
    assert "item: 1 of 3 values differ from another one only in Unicode's" in caplog.text
    assert "'caf\\xe9'" in caplog.text and "'cafe\\u0301'" in caplog.text


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (" 7", "the spaces around them"),
        ("7 ", "the spaces around them"),
        ("7.0", "decimals of zero"),
        ("007", "leading zeros"),
        ("17", None),
        ("7.5", None),
    ],
)
def test_ids_written_in_two_ways_are_kept_apart_and_named(
    root: Path, caplog: pytest.LogCaptureFixture, other: str, what: str | None
) -> None:
    with caplog.at_level("WARNING"):
        dataset = small(root, f"u,i\na,7\nb,{other}\nb,tea\na,TEA\n", str(USER_AND_ITEM))
    assert set(dataset.entity_ids("item").to_pylist()) == {None, "7", other, "tea", "TEA"}
    said = f"item: 1 of 4 values differ from another one only in {what}, such as {other!r} and '7'"
    assert (said in caplog.text) == (what is not None)
    assert ("differ from another" in caplog.text) == (what is not None)


@pytest.mark.parametrize("text", ["['a', 'b']", "{'a', 'b'}", "('a', 'b')", '["a", "b"]'])
def test_lists_among_texts_are_named_and_sets_and_tuples_are_lists(
    root: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    fields = str(USER_AND_ITEM)[:-1] + ", {name: g%s}]"
    cell = '"' + text.replace('"', '""') + '"'
    few = f"u,i,g\na,x,{cell}\na,y,c\nb,y,c\nb,z,[REC]\nc,x,c\n"

    def ids(rows: str, several: str = "") -> set[str]:
        dataset = small(root, rows, fields % several)
        texts = pq.read_table(dataset.folder / "vocabulary/g.parquet")["id"].to_pylist()
        return set(texts) - {None}

    with caplog.at_level("WARNING"):
        assert ids(few) == {text, "c", "[REC]"}
        assert f"g: 1 of 3 values are lists, such as {text!r}, and each is taken" in caplog.text
        caplog.clear()
        assert ids(few, ", several: false") == {text, "c", "[REC]"}
        assert ids(few, ", several: true") == {"a", "b", "c", "REC"}
        assert ids(f"u,i,g\na,x,{cell}\na,y,c\nb,y,{cell}\n") == {"a", "b", "c"}
        assert not ids(few.replace(cell, "(USA)")) ^ {"(USA)", "c", "[REC]"}
        assert "are lists" not in caplog.text


def test_values_between_separators_that_no_field_names_are_told(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "u,i,g\na,x,War|Drama\na,y,Drama|Crime\nb,y,War\nb,z,Crime;x\n"

    def ids(settings: str) -> set[str]:
        caplog.clear()
        with caplog.at_level("WARNING"):
            dataset = small(root, rows, str(USER_AND_ITEM)[:-1] + f", {{name: g{settings}}}]")
        texts = pq.read_table(dataset.folder / "vocabulary/g.parquet")["id"].to_pylist()
        return set(texts) - {None}

    assert ids("") == {"War|Drama", "Drama|Crime", "War", "Crime;x"}
    line = "g: 2 of 4 values hold '|', such as 'Drama|Crime', and each is taken for one value; set"
    assert line in caplog.text
    assert len(ids(", separator: ;")) == 5
    assert "g: 2 of 5 values hold" not in caplog.text  # fewer than half
    assert ids(', separator: "|"') == {"War", "Drama", "Crime", "Crime;x"}
    assert "values hold" not in caplog.text
    assert len(ids(", several: false")) == 4
    assert "values hold" not in caplog.text


def test_a_separator_holds_within_brackets_too(root: Path) -> None:
    rows = 'u,i,g\na,x,[War;Drama]\na,y,[Crime]\nb,y,War\nb,z,"[War, x]"\n'
    fields = str(USER_AND_ITEM)[:-1] + ", {name: g, separator: ;}]"
    texts = pq.read_table(small(root, rows, fields).folder / "vocabulary/g.parquet")["id"]
    assert {t.strip() for t in texts.to_pylist() if t} == {"War", "Drama", "Crime", "x"}


def test_bad_rows_are_refused_or_skipped_and_counted_once(root: Path) -> None:
    (root / "who.csv").write_text("u,g,age\na,k,1\n,k,2\nb,k,x\n")
    features = """[{name: user, entity: user}, {name: g, entity: user, file: who.csv},
      {name: h, entity: user, file: who.csv, column: g}]"""
    rows = "u,i\na,x\n\nb,\nb,y\n"
    with pytest.raises(DataError, match=r"s\.csv, line 4: i '' is empty; .*on_bad_row=skip"):
        small(root, rows, features)
    with pytest.raises(DataError, match=r"who\.csv, line 3: u '' is empty"):
        small(root, rows.replace("b,\n", ""), features)
    assert not list((root / "out").iterdir())
    dataset = small(root, rows, features, on_bad_row="skip")
    assert sorted(pairs_of(dataset, "train")) == [("a", "x"), ("b", "y")]
    assert dataset.manifest.dropped == {
        "s.csv: rows with an unreadable cell": 1,
        "who.csv: rows with an unreadable cell": 1,
    }


def test_a_description_of_no_file_is_refused(root: Path) -> None:
    rows = "u;i\na;x\n"
    for name, said in (
        ("t.csv", r"'t\.csv' is not a file that is read; did you mean 's\.csv'\? available"),
        ("other.txt", r"'other\.txt' is not a file that is read; available: s\.csv, who"),
    ):
        fields = "[{name: user, entity: user}, {name: g, entity: user, file: who.tsv}]"
        with pytest.raises(ConfigError, match=r"^data\.files: " + said):
            small(root, rows, fields, files={name: {"delimiter": ";"}})
    assert small(root, rows, files={"s.csv": {"delimiter": ";"}}).manifest.splits["train"].rows == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_kept_or_counted_file_by_file(root: Path, threads: int) -> None:
    """Files of one name in several folders are several, and so are their rows and what is read
    of them for users and items."""
    texts = {
        "a/x.csv": "u,i,g\na,x,k\nb,y\nb,z\n,y,k\nc,x,k\nd,w,k\nd,q,k\n",
        "b/x.csv": "u,g\na,k\nb\nc,k\n",
        "c/x.csv": "u,i,g\na,z\na,y,k\n",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    fields = """[{name: user, entity: user}, {name: g, entity: user, file: b/x.csv},
      {name: own, entity: user, file: a/x.csv, column: g}]"""
    spec = {
        "interactions": {"file": "a/x.csv", "user": "u", "item": "i"},
        "features": yaml.safe_load(fields),
        "split": {"valid": 0, "test_file": "c/x.csv"},
        "on_bad_row": "skip",
        "negatives": {"evaluation_per_positive": 1},
    }
    data = DataConfig.model_validate(spec)
    manifest = prepare(data, root, root / "out" / "s", 1, threads)
    found = {reason: n for reason, n in manifest.dropped.items() if ": rows with" in reason}
    assert found == {
        "a/x.csv: rows with a wrong number of cells": 2,
        "a/x.csv: rows with an unreadable cell": 1,
        "a/x.csv: rows with a wrong number of cells, read for users and items": 2,
        "a/x.csv: rows with an unreadable cell, read for users and items": 1,
        "b/x.csv: rows with a wrong number of cells": 1,
        "c/x.csv: rows with a wrong number of cells": 1,
    }
    kept = [s.positives for s in manifest.splits.values()]
    assert kept == [7 - 2 - 1, 0, 2 - 1]


@pytest.mark.parametrize(
    ("suffix", "on_bad_row", "threads"),
    [(".csv", "error", 1), (".csv", "skip", 2), (".parquet", "skip", 1), (".csv.gz", "error", 1)],
)
def test_one_of_many_files_may_be_empty(
    root: Path, suffix: str, on_bad_row: str, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "deepfm_dist")

    def write(name: str, **columns: list[str]) -> None:
        table, path = pa.table(columns), root / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".parquet":
            pq.write_table(table, path)
        else:
            table.to_pandas().to_csv(path, index=False)

    nothing: list[str] = []
    for hour in range(4):
        lines = (["a", "b"], ["x", f"y{hour}"]) if hour in (1, 3) else (nothing, nothing)
        write(f"rows/{hour}", u=pa.array(lines[0], pa.string()), i=pa.array(lines[1], pa.string()))
    (root / f"rows/4{suffix}").write_bytes(b"")
    write("who/0", u=pa.array([], pa.string()), g=pa.array([], pa.string()))
    write("who/1", u=["a"], g=["k"])
    spec = {
        "interactions": {"file": f"rows/*{suffix}", "user": "u", "item": "i"},
        "features": [
            {"name": "user", "entity": "user"},
            {"name": "g", "entity": "user", "file": f"who/*{suffix}"},
            {"name": "h", "entity": "user", "file": f"who/*{suffix}", "column": "g"},
        ],
        "split": {"valid": 0, "test": 0},
        "on_bad_row": on_bad_row,
    }

    def prepared() -> Manifest:
        data = DataConfig.model_validate(spec)
        folder = root / "out" / "s"
        return prepare(data, root, folder, 1, threads)

    manifest = prepared()
    assert manifest.splits["train"].rows == 3  # (a, x) comes twice
    assert manifest.dropped == {
        "repeated (user, item) rows": 1,
        f"rows/*{suffix}: files without rows": 3,
        f"who/*{suffix}: files without rows": 1,
    }
    assert f"dropped rows/*{suffix}: files without rows: 3" in caplog.text
    for hour in (1, 3):
        (root / f"rows/{hour}{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match=r"^rows/\*\..*: 5 files without a row"):
        prepared()
    spec["interactions"] = {"file": f"rows/1{suffix}", "user": "u", "item": "i"}
    with pytest.raises(DataError, match="the file is empty"):
        made_of(root, spec)


def test_the_seed_decides_splits_and_rows_and_nothing_else_does(root: Path) -> None:
    def files(folder: str, seed: int) -> dict[str, bytes]:
        data = DataConfig.model_validate(
            {
                "interactions": {"file": "s.csv", "user": "u", "item": "i"},
                "features": USER_AND_ITEM,
            }
        )
        prepare(data, root, root / folder, seed)
        parts = (root / folder).rglob("*.parquet")
        return {str(p.relative_to(root / folder)): p.read_bytes() for p in parts}

    (root / "s.csv").write_text("u,i\n" + "".join(f"{k % 7},{k % 60}\n" for k in range(99)))
    one, same, other = files("one", 5), files("two", 5), files("three", 6)
    assert one == same
    assert [name for name in one if one[name] == other[name]] == []


MANY: dict[str, Any] = yaml.safe_load("""
interactions: {file: "day*.csv", user: u, item: i, time: at}
features:
  - {name: user, entity: user, min_count: 3}
  - {name: item, entity: item}
  - {name: genre, entity: item, file: genres.csv, column: g}
  - {name: city, entity: user, column: c}
  - {name: weight, entity: item, column: w, kind: numeric, transform: standard}
  - {name: h, column: c, table: city}
  - {name: m, separator: "|", min_count: 2}
  - {name: hashed, column: m, separator: "|", hash_rows: 7}
  - {name: w, kind: numeric, transform: standard}
  - {name: b, column: w, kind: numeric, transform: bucket, buckets: 4}
negatives: {evaluation_per_positive: 2, per_positive: 1}
""")


def many_days(folder: Path, rows: int = 900) -> Path:
    """Four files of rows, some of them repeated, and one of items."""
    rng = np.random.default_rng(5)
    for day in range(4):
        lines = [
            f"u{rng.integers(60)},{rng.integers(400)},{rng.integers(500)},"
            f"{'abc'[rng.integers(3)]},{'|'.join(rng.choice([*'pqrst'], rng.integers(3)))},"
            f"{rng.integers(50) if rng.random() < 0.9 else ''}\n"
            for _ in range(rows // 4)
        ]
        (folder / f"day{day}.csv").write_text("u,i,at,c,m,w\n" + "".join(lines))
    genres = "".join(f"{i},{'xyz'[i % 3]}\n{i},k\n" for i in range(0, 450, 2))
    (folder / "genres.csv").write_text("i,g\n" + genres)
    return folder


@pytest.mark.parametrize("text", ['{"format":', "{}"])
def test_a_damaged_manifest_is_named_when_it_is_prepared_again(
    root: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = made(root).folder
    wanted = contents(folder)
    (folder / "manifest.json").write_text(text)
    with caplog.at_level(logging.INFO):
        made(root)
    assert contents(folder) == wanted
    assert "manifest.json: not a manifest of this version" in caplog.text
    assert "of other inputs or settings" not in caplog.text


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder below it, by name."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


SPLIT_METHODS = [
    {"method": "random", "valid": 0.1, "test": 0.2},
    {"method": "per_user", "valid": 0.1, "test": 0.2},
    {"method": "temporal", "valid": 0.1, "test": 0.2},
    {"method": "leave_last", "valid": 1, "test": 2},
]


@pytest.mark.parametrize("split", SPLIT_METHODS, ids=lambda s: s["method"])
def test_nothing_depends_on_blocks_and_little_on_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any]
) -> None:
    data = DataConfig.model_validate(MANY | {"split": split})
    many_days(tmp_path)
    prepare(data, tmp_path, tmp_path / "whole", seed=2)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    prepare(data, tmp_path, tmp_path / "blocks", seed=2)
    assert contents(tmp_path / "blocks") == contents(tmp_path / "whole")
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    prepare(data, tmp_path, tmp_path / "parts", seed=2)
    whole, parts = (PreparedDataset(tmp_path / name) for name in ("whole", "parts"))
    assert parts.manifest.files > 5
    for name in ("tables", "entities", "dropped", "vocabulary_hash"):
        assert getattr(parts.manifest, name) == getattr(whole.manifest, name)
    for name, rows in whole.manifest.splits.items():
        assert parts.manifest.splits[name].rows == rows.rows
    for name, spec in whole.manifest.numeric.items():
        again = parts.manifest.numeric[name]
        assert (again.mean, again.std) == pytest.approx((spec.mean, spec.std))
        assert again.boundaries == spec.boundaries
    assert bag_rows(parts.history) == bag_rows(whole.history)
    for field, values in whole.entity_fields.items():
        found = parts.entity_fields[field]
        if isinstance(values, Jagged):
            assert bag_rows(found) == bag_rows(values)
        else:
            np.testing.assert_allclose(np.asarray(found), values, rtol=1e-5)
    for name in SPLITS:
        frames = []
        for dataset in (whole, parts):
            frame = pd.read_parquet(dataset.folder / name)
            if name != "train":  # which negatives were drawn goes by the order of rows
                frame = frame[frame["label"] == 1]
            frame = frame.assign(w=frame["w"].round(4))
            frames.append(sorted(map(repr, frame.itertuples(index=False))))
        assert frames[0] == frames[1]


def bag_rows(jagged: object) -> list[list[int]]:
    assert isinstance(jagged, Jagged)
    return jagged.lists()


@pytest.mark.parametrize("split", SPLIT_METHODS, ids=lambda s: s["method"])
@pytest.mark.parametrize("partition_bytes", [3000, 1 << 30])
def test_several_threads_prepare_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any], partition_bytes: int
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)  # threads share a file, too
    data = DataConfig.model_validate(MANY | {"split": split})
    many_days(tmp_path)
    manifest = prepare(data, tmp_path, tmp_path / "alone", seed=2, threads=1)
    for threads in (2, 7):
        assert prepare(data, tmp_path, tmp_path / "d", 2, threads) == manifest
        assert contents(tmp_path / "d") == contents(tmp_path / "alone")
        assert prepare(data, tmp_path, tmp_path / "d", 2, threads) == manifest  # up to date
        shutil.rmtree(tmp_path / "d")


def test_a_thread_that_fails_ends_the_others_and_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1000)
    many_days(tmp_path)
    with (tmp_path / "day2.csv").open("a") as file:
        file.write("u1,2,late,a,p,3\n")
    data = DataConfig.model_validate(MANY)
    with pytest.raises(DataError, match=r"day2\.csv, line 227: at 'late' is not a time"):
        prepare(data, tmp_path, tmp_path / "d", 2, threads=4)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == set()
    assert not [t for t in threading.enumerate() if t.name.startswith("prepare")]


def killed_at(event: int, work: Callable[[], Any]) -> None:
    """Works until the process has touched the file system so often, and dies there."""
    left = event

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = name == "open" and isinstance(arguments[1], str) and {*"wax+"} & {*arguments[1]}
        if writes or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    work()


def dies(work: Callable[[], Any], after_s: float | None = None) -> bool:
    """Whether a forked process that does the work is killed before its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow  # many processes
def test_a_kill_at_any_moment_leaves_a_whole_dataset_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    many_days(tmp_path, 400)
    config = [MANY, MANY | {"split": SPLIT_METHODS[1]}]
    old, new = (
        partial(prepare, DataConfig.model_validate(c), tmp_path, tmp_path / "d", 2) for c in config
    )
    whole = []
    for work in (new, old):
        work()
        whole.append(contents(tmp_path / "d"))

    def check(died: bool) -> None:
        """The earlier dataset, the new one or nothing is there; the next run makes the new one."""
        left = contents(tmp_path / "d") if (tmp_path / "d").exists() else None
        assert left in ((whole[1], whole[0], None) if died else (whole[0],))
        new()
        assert contents(tmp_path / "d") == whole[0]
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["d"]

    def dies_at(event: int) -> bool:
        old()
        died = dies(partial(killed_at, event, new))
        check(died)
        return died

    rng, event = np.random.default_rng(), 1
    while dies_at(event):
        event += int(rng.integers(1, 20))
    assert event > 40
    for back in range(1, 16):  # from putting the new one in the old one's place to the end
        dies_at(event - back)
    begun = time.monotonic()
    old()
    seconds = time.monotonic() - begun
    for moment in rng.random(5):
        old()
        check(dies(new, after_s=moment * seconds))


def test_clicks_without_users_are_partitioned_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 300)
    lines = "".join(f"{i % 2},a{i % 13},{i}\n" for i in range(500))
    (tmp_path / "c.csv").write_text("y,a,n\n" + lines)
    spec = {
        "task": "ctr",
        "interactions": {"file": "c.csv", "label": "y"},
        "features": [{"name": "a"}, {"name": "n", "kind": "numeric"}],
    }
    data = DataConfig.model_validate(spec)
    found = []
    for partition_bytes in (1 << 30, 500):
        monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
        prepare(data, tmp_path, tmp_path / str(partition_bytes), seed=1)
        frames = {s: pd.read_parquet(tmp_path / str(partition_bytes) / s) for s in SPLITS}
        assert [len(f) for f in frames.values()] == [400, 50, 50]
        found.append({s: sorted(map(tuple, f.to_numpy())) for s, f in frames.items()})
    assert found[0] == found[1]
    prepare(data, tmp_path, tmp_path / "three", 1, threads=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "500")


def test_an_error_leaves_the_earlier_dataset_as_it_was(root: Path) -> None:
    dataset = small(root, "u,i\na,x\n")
    before = {p: p.read_bytes() for p in dataset.folder.rglob("*.parquet")}
    with pytest.raises(DataError, match="line 2: u '' is empty"):
        small(root, "u,i\n,x\n")
    assert {p: p.read_bytes() for p in (root / "out").rglob("*.parquet")} == before
    assert [p.name for p in (root / "out").iterdir()] == ["s"]
    (dataset.folder / "manifest.json").write_text("{}")  # as of another version: made anew
    assert pairs_of(small(root, "u,i\nb,x\n"), "train") == [("b", "x")]


def test_a_folder_of_other_things_is_never_replaced(root: Path) -> None:
    thesis = root / "out" / "s" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    small(root, "u,i\na,x\n")  # an empty folder is no loss
    for path in [p for p in thesis.parent.rglob("*") if p.is_file()]:
        path.unlink()
    thesis.write_text("years of work")
    with pytest.raises(DataError, match="holds files but no prepared dataset"):
        small(root, "u,i\na,x\n")
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("name", ["aistages", "movielens_latest_small", "movielens_1m", "notebook"])
def test_real_data_is_prepared(name: str, real_data: Path, tmp_path: Path) -> None:
    config = load_config(
        name, [f"data.root={real_data / load_config(name).data.root.split('/')[-1]}"]
    )
    manifest = prepare(config.data, config.data_root, tmp_path / name, 1)
    assert manifest.splits["train"].rows > 30_000
    assert manifest.splits["test"].rows > 20_000


def test_a_users_field_in_the_rows_comes_from_a_training_row(root: Path) -> None:
    rows = "u,i,at,city\na,x,9,late\na,y,1,early\na,z,2,early\nb,x,1,town\nb,y,2,town\nb,w,1,town\n"
    dataset = small(
        root,
        rows,
        """[{name: user, entity: user}, {name: item, entity: item},
          {name: city, entity: user, column: city}]""",
        interactions={"file": "s.csv", "user": "u", "item": "i", "time": "at"},
        split={"method": "leave_last", "valid": 0, "test": 1},
        negatives={"evaluation_per_positive": 1},
    )
    cities = [None, *dataset.vocabulary("city").ids.to_pylist()]
    assert sorted(cities[1:]) == ["early", "town"]
    users = dataset.entity_ids("user").to_pylist()
    bags = [bag_of(dataset.entity_fields["city"], users.index(u)) for u in ("a", "b")]
    assert [[cities[v] for v in bag] for bag in bags] == [["early"], ["town"]]


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
@pytest.mark.parametrize("avoid", ["train", "all"])
def test_users_below_min_count_draw_none_of_their_own_items(
    root: Path, memory_bytes: int, avoid: str
) -> None:
    rng = np.random.default_rng(3)
    liked = {(f"u{u}", f"i{i}") for u in range(30) for i in rng.choice(10, 3 + 2 * (u % 2), False)}
    rows = "u,i,who\n" + "".join(f"{u},{i},{u}\n" for u, i in sorted(liked))
    dataset = small(
        root,
        rows,
        "[{name: user, entity: user, min_count: 4}, {name: item, entity: item}, {name: who}]",
        negatives={"per_positive": 3, "avoid": avoid},
        split={"valid": 0.1 * (avoid == "all"), "test": 0.1 * (avoid == "all")},
    )
    assert 10 < dataset.manifest.entities["user"] <= 16
    dataset = PreparedDataset(dataset.folder, memory_bytes)
    who = [None, *dataset.vocabulary("who").ids.to_pylist()]
    items = dataset.entity_ids("item").to_pylist()
    batches = TrainingBatches(dataset, 50, 0, 1, seed=2)
    negatives = set()
    for batch in batches.steps(1, 3 * batches.steps_per_epoch):
        bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
        for row in range(int(batch.weights.sum())):
            pair = who[bags["who"][row][0]], items[bags["item"][row][0]]
            assert (pair in liked) == bool(batch.labels[row])
            if not batch.labels[row]:
                negatives.add(pair)
    assert len(negatives) > 0.8 * (300 - len(liked))  # and nothing else is avoided


def test_values_are_hashed_onto_rows_everywhere_alike(root: Path) -> None:
    features = """[{name: user, entity: user, hash_rows: 5}, {name: item, entity: item},
      {name: tags, separator: '|', hash_rows: 3}, {name: h, hash_rows: 4}]"""
    dataset = small(root, "u,i,tags,h\na,x,p|q,\nb,y,,r\nc,x,q,r\n", features)

    def fnv(text: str) -> int:
        word = 0xCBF29CE484222325
        for byte in text.encode():
            word = (word ^ byte) * 0x100000001B3 % 2**64
        return int(mix(np.uint64(word)))

    assert {n: t.rows for n, t in dataset.manifest.tables.items()} == {
        "user": 6,
        "item": 3,
        "tags": 4,
        "h": 5,
    }
    rows = dataset.rows("train")
    tags = [[1 + fnv(t) % 3 for t in bag] for bag in ("pq", "", "q")]
    users = dataset.entity_ids("user").to_pylist()
    assert rows.users is not None
    order = np.argsort([users[u] for u in rows.users])
    assert [bag_of(rows.context["tags"], r) for r in order] == tags
    hours = [0, 1 + fnv("r") % 4, 1 + fnv("r") % 4]
    assert np.asarray(rows.context["h"])[order].tolist() == hours
    found = [bag_of(dataset.entity_fields["user"], users.index(u)) for u in "abc"]
    assert found == [[1 + fnv(u) % 5] for u in "abc"]
    again = RowEncoder(dataset).encode(read_table(root / "s.csv", RowEncoder(dataset).columns))
    assert bag_rows(again.context["tags"]) == tags
    assert np.asarray(again.context["h"]).tolist() == hours


def test_numbers_fall_into_buckets_of_about_as_many_rows(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(2)
    numbers = np.round(rng.lognormal(3, 2, 3000) * np.where(rng.random(3000) < 0.2, -1, 1), 3)
    cells = ["" if k % 10 == 0 else str(n) for k, n in enumerate(numbers)]
    rows = "u,i,n\n" + "".join(f"u{k},x,{c}\n" for k, c in enumerate(cells))
    features = (
        "[{name: user, entity: user}, {name: n, kind: numeric, transform: bucket, buckets: 8}]"
    )
    dataset = small(root, rows, features)
    read, users = dataset.rows("train"), dataset.entity_ids("user").to_pylist()
    assert read.users is not None
    found = np.asarray(read.context["n"])[np.argsort([int(users[u][1:]) for u in read.users])]
    bounds = dataset.manifest.numeric["n"].boundaries
    assert len(bounds) == 7
    assert dataset.manifest.tables["n"].rows == 9
    assert found[::10].tolist() == [0] * 300
    for cell, row in zip(cells, found.tolist(), strict=True):
        if cell:
            assert row == 1 + sum(np.float32(cell) >= np.float32(b) for b in bounds)
    shares = np.bincount(found[found > 0], minlength=9)[1:] / 2700
    assert np.abs(shares - 1 / 8).max() < 0.02  # exact but for bins of 1 in 128
    again = RowEncoder(dataset).encode(read_table(root / "s.csv", RowEncoder(dataset).columns))
    assert np.asarray(again.context["n"]).tolist() == found.tolist()
    caplog.set_level("INFO", "deepfm_dist")
    few = small(root, "u,i,n\na,x,1\nb,x,1\nc,x,2\n", features)
    assert "one bucket" not in caplog.text
    assert sorted(np.asarray(few.rows("train").context["n"]).tolist()) == [1, 1, 2]
    small(root, "u,i,n\na,x,1700000000\nb,x,1700086400\n", features)
    assert "n: all of its values fall into one bucket, which tells" in caplog.text


GROWING: dict[str, Any] = yaml.safe_load("""
interactions: {file: day1.csv, user: u, item: i, time: t}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: tag, entity: item, file: tags.csv}
  - {name: city, entity: user, column: city}
  - {name: h}
  - {name: n, kind: numeric, transform: standard}
split: {valid: 0, test: 0}
""")


@pytest.mark.parametrize("partition_bytes", [40, 1 << 30])
def test_a_grown_vocabulary_keeps_the_rows_of_old_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_bytes: int
) -> None:
    monkeypatch.setattr(job, "PARTITION_BYTES", partition_bytes)
    day1 = [(f"u{k % 9}", f"i{k % 14}", k, "pqr"[k % 9 % 3], k % 4, k % 5) for k in range(60)]
    day2 = [(f"u{k % 13}", f"i{k % 20}", 99 + k, "", k % 6, 50 + k) for k in range(3, 60)]
    for name, rows in (("day1", day1), ("day2", day2)):
        lines = "".join(",".join(map(str, row)) + "\n" for row in rows)
        (tmp_path / f"{name}.csv").write_text("u,i,t,city,h,n\n" + lines)
    (tmp_path / "tags.csv").write_text("i,tag\n" + "".join(f"i{k},t{k % 3}\n" for k in range(14)))
    prepare(DataConfig.model_validate(GROWING), tmp_path, tmp_path / "old", seed=1)
    (tmp_path / "tags.csv").write_text(
        "i,tag\n" + "".join(f"i{k},t{k % 5}\n" for k in range(7, 20))
    )
    spec = GROWING | {"vocabulary_from": str(tmp_path / "old")}
    spec["interactions"] = GROWING["interactions"] | {"file": "day2.csv"}
    prepare(DataConfig.model_validate(spec), tmp_path, tmp_path / "new", seed=8)
    old, new = PreparedDataset(tmp_path / "old"), PreparedDataset(tmp_path / "new")
    assert new.manifest.grown_from == (old.manifest.vocabulary_hash,)
    for table in old.manifest.tables:
        before, after = (d.vocabulary(table).ids.to_pylist() for d in (old, new))
        assert after[: len(before)] == before
        assert len(set(after)) == len(after)
    assert sorted(new.entity_ids("user").to_pylist()[1:]) == sorted(f"u{k}" for k in range(13))
    assert sorted(new.entity_ids("item").to_pylist()[1:]) == sorted(f"i{k}" for k in range(20))
    assert new.manifest.numeric == old.manifest.numeric
    users, items = (new.entity_ids(e).to_pylist() for e in ("user", "item"))
    cities = [None, *new.vocabulary("city").ids.to_pylist()]
    tags = [None, *new.vocabulary("tag").ids.to_pylist()]
    for k in range(9):  # told on the first day only
        bag = bag_of(new.entity_fields["city"], users.index(f"u{k}"))
        assert [cities[v] for v in bag] == ["pqr"[k % 3]]
    for k in range(20):  # told anew where it is told
        bag = bag_of(new.entity_fields["tag"], items.index(f"i{k}"))
        assert [tags[v] for v in bag] == [f"t{k % 3}" if k < 7 else f"t{k % 5}"]
    for user in range(13):
        liked = [r[1] for r in (*day1, *day2) if r[0] == f"u{user}"]
        bag = bag_of(new.history, users.index(f"u{user}"))
        assert [items[v] for v in bag] == [*dict.fromkeys(liked)]
    counts = dict(zip(items, new.popularity().tolist(), strict=True))
    pairs = [p for day in (day1, day2) for p in {r[:2] for r in day}]
    assert all(counts[f"i{k}"] == sum(p[1] == f"i{k}" for p in pairs) for k in range(20))
    for table, at in (("user", 0), ("item", 1)):
        vocabulary = new.vocabulary(table)
        found = dict(zip(vocabulary.ids.to_pylist(), vocabulary.counts.tolist(), strict=True))
        assert found == Counter(p[at] for p in pairs)
    unchanged = new.manifest.fingerprint
    prepare(DataConfig.model_validate(GROWING), tmp_path, tmp_path / "old", seed=2)
    prepare(DataConfig.model_validate(spec), tmp_path, tmp_path / "new", seed=8)
    assert PreparedDataset(tmp_path / "new").manifest.fingerprint != unchanged


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("n", {"transform": "bucket"}, "transform is 'bucket' and was 'standard'"),
        ("n", {"transform": "none"}, "transform is 'none' and was 'standard'"),
        ("b", {"transform": "standard"}, "transform is 'standard' and was 'bucket'"),
        ("b", {"buckets": 4}, "buckets is 4 and was 3"),
        ("b", {"kind": "categorical", "transform": "none"}, "kind is 'categorical' and was 'num"),
        ("h", {"hash_rows": 9}, "hash_rows is 9 and was 5"),
        ("h", {"hash_rows": None}, "hash_rows is None and was 5"),
        ("m", {"hash_rows": 7}, "hash_rows is 7 and was None"),
        ("m", {"separator": None}, "separator is None and was '|'"),
        ("m", {"derive": "hour"}, "derive is 'hour' and was None"),
        ("m", {"table": "other"}, "table is 'other' and was 'm'"),
        ("user", {"column": "m"}, "entity's own id is False and was True"),
        ("m", {"table": "m", "min_count": 2, "missing": ["-"], "pooling": "sum"}, None),
        ("n", {"column": "b", "buckets": 9}, None),
        ("k", {"name": "added", "column": "m"}, None),
    ],
    ids=str,
)
def test_a_field_keeps_its_rows_only_where_it_means_the_same(
    root: Path, name: str, changes: dict[str, Any], told: str | None
) -> None:
    features = yaml.safe_load("""[{name: user, entity: user}, {name: item, entity: item},
      {name: m, separator: "|"}, {name: h, column: m, hash_rows: 5}, {name: k, column: m},
      {name: n, kind: numeric, transform: standard},
      {name: b, kind: numeric, transform: bucket, buckets: 3}]""")
    rows = "u,i,m,n,b\n" + "".join(f"{k % 3},{k},{k % 4}|p,{k},{k}\n" for k in range(9))
    before = small(root, rows, str(features)).folder.rename(root / "before")
    changed = [f | changes if f["name"] == name else f for f in features]

    def grown() -> None:
        small(root, rows, json.dumps(changed), vocabulary_from=str(before))

    if told is None:
        grown()
    else:
        with pytest.raises(ConfigError, match=re.escape(f"features: {name}: {told}")):
            grown()


def test_a_dataset_does_not_grow_from_itself(root: Path) -> None:
    rows = "u,i\na,x\nb,y\n"
    folder = small(root, rows, str(USER_AND_ITEM)).folder
    before = contents(folder)
    (root / "link").symlink_to(folder)
    for name in (folder, folder / ".." / "s", root / "link"):
        with pytest.raises(ConfigError, match=r"vocabulary_from=.*grow.*; set data\.name"):
            small(root, rows, str(USER_AND_ITEM), vocabulary_from=str(name))
    assert contents(folder) == before


@pytest.mark.parametrize("threads", [0, 1])
def test_a_user_who_has_seen_everything_trains_without_negatives(
    root: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "u,i,h\n" + "".join(f"a,{i},9\n" for i in "vwxyz") + "b,v,9\nb,w,9\nb,x,9\n"
    features = str([*USER_AND_ITEM, {"name": "h"}])
    dataset = small(root, rows, features, negatives={"per_positive": 3})
    batches = TrainingBatches(dataset, 8, 0, 1, 1, threads)
    assert "per_positive=3: fewer unseen items for 2 of 2 users" in caplog.text
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    found: Counter[tuple[str, str, float]] = Counter()
    weights = []
    for batch in batches.steps(1, batches.steps_per_epoch):
        fields = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
        assert float(batch.global_weight) == 8
        weights += batch.weights.tolist()
        for user, item, hour, label, weight in zip(
            fields["user"], fields["item"], fields["h"], batch.labels, batch.weights, strict=True
        ):
            if weight == 0:  # as a row that pads the last batch
                assert (user, item, hour, float(label)) == ([], [], [], 0)
            else:
                found[users[user[0]], items[item[0]], float(label)] += 1
    expected = {("a", i, 1.0): 1 for i in "vwxyz"} | {("b", i, 1.0): 1 for i in "vwx"}
    assert found == Counter(expected | {("b", i, 0.0): 3 for i in "yz"})
    assert len(weights) == 4 * 8
    with pytest.raises(DataError, match="every user has met all 2 items, so that no negative"):
        TrainingBatches(small(root, "u,i\na,x\na,y\n", str(USER_AND_ITEM)), 4, 0, 1, 1)


@pytest.mark.parametrize(("keep", "dropped"), [("all", 3), ("first", 0)])
def test_numbers_that_are_told_again_are_counted(root: Path, keep: str, dropped: int) -> None:
    """As categorical values are; an empty cell tells nothing, and takes no other's place."""
    (root / "price.csv").write_text("i,p\nx,\nx,1\nx,2\nx,3\ny,4\ny,\ny,4\nz,\nq,5\nq,6\n")
    field = f"{{name: p, entity: item, file: price.csv, kind: numeric, keep: {keep}}}"
    features = f"[{{name: user, entity: user}}, {{name: item, entity: item}}, {field}]"
    dataset = small(root, "u,i\na,x\na,y\na,z\nb,x\n", features)
    items, prices = dataset.entity_ids("item").to_pylist(), dataset.entity_fields["p"]
    of_x, *others = (np.asarray(prices)[items.index(i)] for i in "xyz")
    assert (of_x in (1, 2, 3), others) == (True, [4, 0])  # a hash chooses between several
    assert dataset.manifest.dropped == {
        "price.csv rows of items without training rows": 2,
        **({"repeated p values of one item": dropped} if dropped else {}),
    }


def test_why_nothing_is_left_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    features = "[{name: user, entity: user}, {name: item, entity: item, min_count: 3}]"
    rows = "u,i\na,x\nb,x\na,y\nb,z\n"
    with pytest.raises(
        DataError, match=r"s\.csv: no item is known: .* 2 training .* min_count is 3"
    ):
        small(root, rows, features)
    held_out = {"file": "s.csv", "user": "u", "item": "i", "split": "p"}
    with pytest.raises(DataError, match=r"no training rows of 2 \(repeated ones dropped: 1\)"):
        small(
            root,
            "u,i,p\nb,x,2\nc,y,2\nb,x,2\n",
            str(USER_AND_ITEM),
            interactions=held_out,
        )
    with pytest.raises(DataError, match=r"no usable row is left; dropped: 2 rows with an unreadab"):
        small(root, "u,i\n,x\n,y\n", str(USER_AND_ITEM), on_bad_row="skip")
    caplog.set_level("INFO", "deepfm_dist")
    (root / "v.csv").write_text("u,i\na,x\nb,z\n")
    small(root, rows, str(USER_AND_ITEM), split={"valid": 0, "test": 0, "valid_file": "v.csv"})
    assert "valid split is empty: every row of split.valid_file=v.csv is dropped" in caplog.text
    assert "test split" not in caplog.text
    only_train = rows.replace("\n", ",0\n").replace("i,0", "i,p")
    small(root, only_train, str(USER_AND_ITEM), interactions=held_out)
    assert "test split is empty: no row that is left has it in the column 'p'" in caplog.text


def test_an_empty_split_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deepfm_dist")
    split = {"method": "random", "valid": 0.1, "test": 0}
    small(root, "u,i\na,x\nb,y\n", str(USER_AND_ITEM), split=split)
    assert "the valid split is empty: split.valid=0.1 holds out no row" in caplog.text


def test_files_come_from_any_file_system(root: Path) -> None:
    memory = fsspec.filesystem("memory")
    lines = [f"{'abc'[k % 3]},{'xyz'[k % 7 % 3]}\n" for k in range(30)]
    for day in range(3):
        text = "u,i\n" + "".join(lines[10 * day : 10 * day + 10])
        (root / f"day{day}.csv.gz").write_bytes(gzip.compress(text.encode()))
        memory.pipe(f"/logs/day{day}.csv.gz", gzip.compress(text.encode()))
    spec = {
        "interactions": {"file": "day*.csv.gz", "user": "u", "item": "i"},
        "features": USER_AND_ITEM,
        "split": {"valid": 0, "test": 0},
    }
    data = DataConfig.model_validate(spec)
    prepare(data, root, root / "local", seed=1)
    prepare(data, "memory://logs", root / "remote", seed=1)
    local, remote = contents(root / "local"), contents(root / "remote")
    assert [n for n in local if local[n] != remote[n]] == ["manifest.json"]
    manifests = [PreparedDataset(root / n).manifest for n in ("local", "remote")]
    assert manifests[0].inputs == manifests[1].inputs
    with pytest.raises(DataError, match=r"memory://logs/night\*\.csv: no such file"):
        spec["interactions"] = {"file": "night*.csv", "user": "u", "item": "i"}
        prepare(DataConfig.model_validate(spec), "memory://logs", root / "remote", seed=1)
    memory.pipe("/logs/day1.csv.gz", gzip.compress(b"u,j\na,x\n"))
    with pytest.raises(DataError, match=r"day1\.csv\.gz: no column 'i'; it has: u, j"):
        prepare(data, "memory://logs", root / "remote", seed=1)


def test_criteo_rows_real_and_generated_are_prepared(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)

    def cell(column: int) -> str:
        if rng.random() < 0.2:
            return ""
        return str(rng.integers(-2, 99)) if column < 13 else f"{rng.integers(30) + column:08x}"

    lines = ["\t".join([str(k % 4 // 3), *(cell(c) for c in range(39))]) for k in range(2000)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    config = load_config("criteo", [f"data.root={tmp_path}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert (len(manifest.dense), len(manifest.categorical)) == (13, 26)
    assert [s.rows for s in manifest.splits.values()] == [1600, 200, 200]
    rows = PreparedDataset(tmp_path / "d").rows("train")
    order = np.sort(np.asarray(rows.context["I1"]))
    assert order[0] == pytest.approx(-np.log1p(2))
    assert all(manifest.tables[f"C{c}"].rows <= 31 for c in range(1, 27))
    lines[7] += "\textra"
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train\.txt, line 8: 41 cells instead of 40"):
        prepare(config.data, config.input_root, tmp_path / "d", 1)


def test_avazu_rows_are_prepared(tmp_path: Path) -> None:
    config = load_config("avazu", [f"data.root={tmp_path}"])
    names = ["id", "click", *(f.name for f in config.data.features)]
    lines = [",".join(names)]
    for k in range(500):
        values = [f"{k * 7919 % 97:08x}" for _ in config.data.features]
        lines.append(",".join([str(10**19 + k), str(k % 5 // 4), *values]))
    (tmp_path / "train.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert manifest.splits["train"].positives + manifest.splits["valid"].positives <= 100
    assert manifest.tables["device_ip"].rows == 1_000_001
    assert manifest.tables["hour"].rows <= 98


def _as_published(name: str, column: str, row: int, rng: np.random.Generator) -> str:
    """A cell in the form in which RecZoo publishes the data sets."""
    if name == "criteo_x1":
        return f"{rng.random():.6f}" if column[0] == "I" else str(rng.integers(50) + 1)
    if name == "criteo_x4":
        missing = rng.random() < 0.2
        count = f"{rng.integers(-2, 5000)}.0" if rng.random() < 0.5 else str(rng.integers(9))
        return "" if missing else count if column[0] == "I" else f"{rng.integers(40):08x}"
    if name == "avazu_x4" and column == "hour":
        return f"1410{21 + row % 10}{row % 24:02}"
    return str(rng.integers(60))


def test_what_is_derived_from_a_cell_is_what_plain_python_derives() -> None:
    rng = np.random.default_rng(5)
    counts = [*"0123", "-1", "2.0", "2.01", "3e2", *map(str, rng.integers(-5, 10**9, 200))]
    feature = Feature(name="n", derive="log_squared", fill="0")
    _, found = split_cells(pa.array([*counts, "", None]), feature)
    expected = [
        math.floor(math.log(x) ** 2) if x > 2 else int(x) for x in map(float, [*counts, 0, 0])
    ]
    assert found.to_pylist() == [str(x) for x in expected]
    times = [datetime(2014, 1, 1) + timedelta(hours=int(h)) for h in rng.integers(0, 9000, 200)]
    derivations: dict[str, Callable[[datetime], int]] = {
        "hour": lambda t: t.hour,
        "weekday": lambda t: t.weekday(),
        "weekend": lambda t: t.weekday() >= 5,
    }
    for name, derivation in derivations.items():
        feature = Feature.model_validate({"name": "t", "derive": name, "time_format": "%y%m%d%H"})
        owners, found = split_cells(
            pa.array(["", *(t.strftime("%y%m%d%H") for t in times)]), feature
        )
        assert owners.tolist() == list(range(1, 201))
        assert found.to_pylist() == [str(int(derivation(t))) for t in times]


def test_a_cell_from_which_nothing_can_be_derived_is_named(root: Path) -> None:
    features = [{"name": "x", "derive": "log_squared"}, *USER_AND_ITEM]
    rows = "u,i,x\na,x,3\na,y,\nb,x,many\nb,z,4\n"
    what = r"s\.csv, line 4: x 'many' is not a number, as derive=log_squared of the field x"
    with pytest.raises(DataError, match=what):
        small(root, rows, str(features))
    (root / "prices.csv").write_text("i,x\nx,3\ny,inf\n")
    in_file = [{**features[0], "entity": "item", "file": "prices.csv"}, *USER_AND_ITEM]
    with pytest.raises(DataError, match=r"prices\.csv, line 3: x 'inf' is not a number"):
        small(root, rows, str(in_file))
    features.append({"name": "z", "column": "x"})  # the column's first field derives nothing
    kept = small(root, rows, str(features[::-1]), on_bad_row="skip").manifest
    assert kept.splits["train"].rows == 3
    assert kept.dropped == {"s.csv: rows with an unreadable cell": 1}
    with pytest.raises(DataError, match=r"^column 'x': 'many' is not a number, as derive=log_sq"):
        split_cells(pa.array(["3", "many"]), Feature.model_validate(features[0]))
    features[0] = {"name": "x", "derive": "hour"}
    with pytest.raises(DataError, match=r"line 3: x 'noon' is not a time, as derive=hou"):
        small(root, "u,i,x\na,x,2020-01-01 11:00:00\nb,x,noon\n", str(features))


@pytest.mark.parametrize(
    "name", ["criteo_x1", "criteo_x4", "avazu_x1", "avazu_x4", "movielens_latest_x1"]
)
def test_published_splits_are_prepared_and_trained_on(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    overrides = [f"data.root={tmp_path}", "trainer.batch_size=512", "trainer.max_steps=2"]
    config = load_config(name, overrides)
    columns = list(dict.fromkeys(f.column or f.name for f in config.data.features))
    unused = ["id"] if name == "avazu_x4" else []
    for split, n in (("train", 1000), ("valid", 200), ("test", 100)):
        lines = [[*unused, str(config.data.interactions.label), *columns]]
        for row in range(n):
            cells = [_as_published(name, column, row, rng) for column in columns]
            lines.append([*(["9" * 19] if unused else []), f"{row % 4 // 3}.0", *cells])
        text = "\n".join(",".join(line) for line in lines)
        (tmp_path / f"{split}.csv").write_text(text + "\n")
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert [s.rows for s in manifest.splits.values()] == [1000, 200, 100]
    assert [f.name for f in manifest.features] == [f.name for f in config.data.features]
    dataset = PreparedDataset(tmp_path / "d")
    ids = {table: dataset.vocabulary(table).ids.to_pylist() for table in manifest.tables}
    if name == "criteo_x4":
        numbers = {int(i) for i in ids["I1"]}
        assert {0, 1, 2} < numbers <= {*range(-2, 1 + int(np.log(5000) ** 2))}
        assert "empty" in ids["C1"] and manifest.tables["C1"].rows <= 42
    if name == "avazu_x4":
        assert len(ids["hour"]) == 24 and len(ids["weekday"]) == 7 and len(ids["weekend"]) == 2
    assert all(0.3 < loss < 1.5 for loss in run_alone(_losses, tmp_path / "d", config))


def _losses(folder: Path, config: Config) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        return run.losses(1, 2)


def test_criteo_and_frappe_as_they_are(real_data: Path, tmp_path: Path) -> None:
    shutil.copy(real_data / "criteo-sample" / "criteo_7200.tsv", tmp_path / "train.txt")
    config = load_config("criteo", [f"data.root={tmp_path}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "criteo", 1)
    assert sum(s.rows for s in manifest.splits.values()) == 7200
    config = load_config("frappe", [f"data.root={real_data / 'frappe-x1'}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "frappe", 1)
    assert (manifest.splits["train"].rows, manifest.splits["valid"].rows) == (202_027, 57_722)
    assert [t.rows - 1 for t in manifest.tables.values()][2:7] == [7, 7, 2, 3, 2]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_row_wise_shard_of_real_items_is_hot(real_data: Path, tmp_path: Path, seed: int) -> None:
    config = load_config("aistages", [f"data.root={real_data / 'aistages'}"])
    prepare(config.data, config.input_root, tmp_path / "d", seed)
    counts = PreparedDataset(tmp_path / "d").popularity()
    block = -(-len(counts) // 4)  # TorchRec cuts ceil(rows / ranks) rows for each rank
    shards = np.add.reduceat(counts, np.arange(0, len(counts), block))
    assert shards.max() <= 1.15 * shards.mean()
    assert np.sort(counts)[::-1][:block].sum() > 0.8 * counts.sum()  # what sorting would do


def test_runs_of_several_seeds_can_share_a_split(tmp_path: Path) -> None:
    def prepared(*overrides: str) -> Manifest:
        settings = [f"run.prepared_root={tmp_path}", "data.name=shared", *overrides]
        assert prepare_command.main(["--config", "sample", *settings]) == 0
        return Manifest.read(tmp_path / "shared")

    first = prepared("run.seed=1", "data.seed=4")
    assert prepared("run.seed=2", "data.seed=4") == first
    assert prepared("run.seed=4") == first  # which is the default
    assert prepared("run.seed=2").vocabulary_hash != first.vocabulary_hash
