"""Every file of a prepared dataset against what plain Python makes of the same input."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.encode import prepare
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError

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
    assert found == [
        ("a", "x", "9", ["happy", "calm"], round(np.log1p(10), 4)),
        ("a", "y", "9", [], round(np.log1p(20), 4)),
        ("b", "x", "9", ["happy"], 0.0),
        ("b", "z", "11", [], round(np.log1p(40), 4)),
        ("c", "z", "9", ["calm"], round(np.log1p(60), 4)),
        ("c", "y", "10", ["calm"], round(np.log1p(70), 4)),
        ("c", "x", "10", ["calm"], round(np.log1p(80), 4)),
        ("c", "v", "10", ["calm"], round(np.log1p(90), 4)),
    ]
    assert dataset.manifest.dropped == {
        "genres.tsv rows of items without training rows": 1,
        "repeated (user, item) rows": 1,
        "repeated first values of one item": 1,
        "repeated genre values of one item": 1,
        "rows rated below 4": 1,
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
    assert positives == [("a", "z"), (None, "x"), ("a", None)]
    known = {"a": {"x", "y", "z"}}
    assert test.n == 6
    for user, item in zip(test.users[1::2], test.items[1::2], strict=True):
        assert items[item] is not None
        assert items[item] not in known.get(users[user] or "", set()) or users[user] is None


def test_negatives_that_do_not_exist_are_refused_and_leave_nothing(root: Path) -> None:
    with pytest.raises(DataError, match=r"evaluation_per_positive=3: .*unseen"):
        made(root, negatives={"evaluation_per_positive": 3})
    assert not list((root / "out").iterdir())


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


def test_what_a_killed_preparation_left_is_cleared(root: Path) -> None:
    left = root / "out" / ".d.part-999999999"
    (left / "train").mkdir(parents=True)
    made(root)
    assert [p.name for p in (root / "out").iterdir()] == ["d"]


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
    assert table["label"].to_pylist() == [1, 0, 1, 0]
    np.testing.assert_allclose(
        table["n"].to_pylist(), (np.array([1, 3, 3, 5]) - 3) / np.std([1, 3, 5]), rtol=1e-6
    )
    (root / "clicks.csv").write_text("y,ad,n\n2,p,1\n")
    with pytest.raises(DataError, match="label y holds 2; labels are 0 or 1"):
        prepare(data, root, root / "ctr", seed=1)


def test_a_folder_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "out").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        made(root)


@pytest.mark.parametrize("name", ["aistages", "movielens_latest_small", "movielens_1m", "notebook"])
def test_real_data_is_prepared(name: str, real_data: Path, tmp_path: Path) -> None:
    config = load_config(
        name, [f"data.root={real_data / load_config(name).data.root.split('/')[-1]}"]
    )
    manifest = prepare(config.data, config.data_root, tmp_path / name, 1)
    assert manifest.splits["train"].rows > 30_000
    assert manifest.splits["test"].rows > 20_000
