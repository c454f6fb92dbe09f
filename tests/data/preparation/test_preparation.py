"""Prepared rows, users and items, against values by hand."""

import gzip
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deepfm_dist import prepare as prepare_command
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import ConfigError, DataError
from tests.data.small_logs import USER_AND_ITEM, bag_of, contents, made, made_of, pairs_of, small


def test_rows_entities_and_counts_are_as_expected(root: Path) -> None:
    dataset = made(root)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    assert sorted(users[1:]) == ["a", "b", "c"]
    assert sorted(items[1:]) == ["v", "x", "y", "z"]  # w was rated below the threshold
    assert dataset.entity_ids("item", cold=True).to_pylist() == [*items, "q"]  # of genres.tsv
    moods = [None, *dataset.vocabulary("mood").ids.to_pylist()]
    hours = [None, *dataset.vocabulary("hour").ids.to_pylist()]
    assert sorted(moods[1:]) == ["calm", "happy"]
    train = dataset.rows("train")
    actual = [
        (
            users[train.users[r]],
            items[train.items[r]],
            hours[train.context["hour"][r]],
            [moods[v] for v in bag_of(train.context["mood"], r)],
            round(float(train.context["amount"][r]), 4),
        )
        for r in range(train.n)
    ]
    assert sorted(actual) == [
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


def test_the_manifest_describes_the_dataset(root: Path) -> None:
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
    actual = pairs_of(dataset, "train")
    labels = dataset.rows("train").labels
    assert labels is not None
    assert {p for p, y in zip(actual, labels, strict=True) if y == 1} == liked
    negatives = [p for p, y in zip(actual, labels, strict=True) if y == 0]
    assert sorted(u for u, _ in negatives) == ["a", "b", "c"]
    assert not set(negatives) & liked
    assert not dataset.manifest.sampled
    dataset = small(root, rows, features, negatives={"fixed_per_user": 3})  # of 2, 3 and 1 unseen
    actual, labels = pairs_of(dataset, "train"), dataset.rows("train").labels
    negatives = [p for p, y in zip(actual, labels, strict=True) if y == 0]
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


def test_an_entitys_field_may_stand_in_the_interactions(root: Path) -> None:
    features = "[{name: user, entity: user}, {name: job, entity: user, column: j, separator: '+'}]"
    dataset = small(root, "u,i,j\na,x,p+q\na,y,\nb,x,\nc,x,q\n", features)
    jobs = [None, *dataset.vocabulary("job").ids.to_pylist()]
    users = dataset.entity_ids("user").to_pylist()
    bags = {u: bag_of(dataset.entity_fields["job"], users.index(u)) for u in "abc"}
    expected = {"a": ["p", "q"], "b": [], "c": ["q"]}
    assert {u: [jobs[v] for v in bag] for u, bag in bags.items()} == expected


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
    actual = {reason: n for reason, n in manifest.dropped.items() if ": rows with" in reason}
    assert actual == {
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


@pytest.mark.parametrize("threads", [0, 1])
def test_a_user_who_has_seen_everything_trains_without_negatives(
    root: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "u,i,h\n" + "".join(f"a,{i},9\n" for i in "vwxyz") + "b,v,9\nb,w,9\nb,x,9\n"
    features = str([*USER_AND_ITEM, {"name": "h"}])
    dataset = small(root, rows, features, negatives={"per_positive": 3})
    batches = TrainingBatches(dataset, 8, 0, 1, 1, threads)
    assert "per_positive=3: too few unseen items for 2 of 2 users" in caplog.text
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    actual: Counter[tuple[str, str, float]] = Counter()
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
                actual[users[user[0]], items[item[0]], float(label)] += 1
    expected = {("a", i, 1.0): 1 for i in "vwxyz"} | {("b", i, 1.0): 1 for i in "vwx"}
    assert actual == Counter(expected | {("b", i, 0.0): 3 for i in "yz"})
    assert len(weights) == 4 * 8
    with pytest.raises(
        DataError, match="every user has interacted with all 2 items, so there are no negatives"
    ):
        TrainingBatches(small(root, "u,i\na,x\na,y\n", str(USER_AND_ITEM)), 4, 0, 1, 1)


@pytest.mark.parametrize(("keep", "dropped"), [("all", 4), ("first", 0)])
def test_numbers_that_are_reported_again_are_counted(root: Path, keep: str, dropped: int) -> None:
    """As categorical values are; an empty cell tells nothing, and takes no other's place."""
    (root / "price.csv").write_text("i,p\nx,\nx,1\nx,2\nx,3\ny,4\ny,\ny,4\nz,\nq,5\nq,6\n")
    field = f"{{name: p, entity: item, file: price.csv, kind: numeric, keep: {keep}}}"
    features = f"[{{name: user, entity: user}}, {{name: item, entity: item}}, {field}]"
    dataset = small(root, "u,i\na,x\na,y\na,z\nb,x\n", features)
    items, prices = dataset.entity_ids("item").to_pylist(), dataset.entity_fields["p"]
    of_x, *others = (np.asarray(prices)[items.index(i)] for i in "xyz")
    assert (of_x in (1, 2, 3), others) == (True, [4, 0])  # a hash chooses between several
    assert dataset.manifest.dropped == {
        **({"repeated p values of one item": dropped} if dropped else {}),
    }


def test_the_reason_for_no_remaining_rows_is_reported(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert "test split is empty: no remaining row has it in the column 'p'" in caplog.text


def test_empty_splits_are_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "deepfm_dist")
    rows, split = "u,i\na,x\nb,y\n", {"method": "random", "valid": 0.1, "test": 0}
    small(root, rows, str(USER_AND_ITEM), split=split)
    empty = "the valid split is empty: split.valid=0.1 holds out no row"
    assert f"{empty}; to hold some out, set data.split.valid=0.4" in caplog.text
    small(root, rows, str(USER_AND_ITEM), split=split | {"valid": 0.4})
    assert "rows: train 1 positive; valid 1 positive" in caplog.text
    last = {"method": "leave_last", "valid": 1, "test": 0}
    dated = {"file": "s.csv", "user": "u", "item": "i", "time": "t"}
    small(root, "u,i,t\na,x,1\nb,y,2\n", str(USER_AND_ITEM), split=last, interactions=dated)
    assert "valid=1 holds out no row; to hold some out, set data.split.method=random" in caplog.text


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


def test_runs_of_several_seeds_can_share_a_split(tmp_path: Path) -> None:
    def prepared(*overrides: str) -> Manifest:
        settings = [f"run.prepared_root={tmp_path}", "data.name=shared", *overrides]
        assert prepare_command.main(["--config", "sample", *settings]) == 0
        return Manifest.read(tmp_path / "shared")

    first = prepared("run.seed=1", "data.seed=4")
    assert prepared("run.seed=2", "data.seed=4") == first
    assert prepared("run.seed=4") == first  # which is the default
    assert prepared("run.seed=2").vocabulary_hash != first.vocabulary_hash
