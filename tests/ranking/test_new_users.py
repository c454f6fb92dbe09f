"""New users from a file: which of their rows are positives, against pandas."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.errors import DataError
from deepfm_dist.ranking.new_users import NewUsers, read_new_users
from tests.data.small_logs import made_of

SEEN = {"name": "seen", "entity": "user", "history": "item"}
N_ITEMS = 12


def _dataset(root: Path, data: dict[str, Any] | None = None, **rows: Any) -> PreparedDataset:
    """Items 0 to 11, each liked by someone; columns ``who``, ``what``, ``stars``, ``at``, ``y``."""
    lines = [f"u{k % 5},{k % N_ITEMS},5,{k},1\n" for k in range(60)]
    (root / "log.csv").write_text("who,what,stars,at,y\n" + "".join(lines))
    spec = {
        "interactions": {"file": "log.csv", "user": "who", "item": "what"} | rows,
        "features": [{"name": "item", "entity": "item"}, SEEN],
        "split": {"valid": 0, "test": 0},
    }
    return made_of(root, spec | (data or {}))


def _as_sets(dataset: PreparedDataset, new: NewUsers) -> dict[str, tuple[set[str], set[str]]]:
    """By user: items of the history, and others that are seen."""
    ids = dataset.entity_ids("item").to_pylist()
    return {
        user: ({ids[item] for item in liked}, {ids[item] for item in seen})
        for user, liked, seen in zip(
            new.ids.to_pylist(), new.histories.lists(), new.seen.lists(), strict=True
        )
    }


def _frame() -> pd.DataFrame:
    """Rows of 30 users, many of the same item, with ratings and times all different."""
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(
        {
            "who": [f"n{u}" for u in rng.integers(0, 30, 400)],
            "what": rng.integers(0, N_ITEMS + 3, 400).astype(str),  # three are not in the log
            "stars": rng.permutation(np.linspace(1, 5, 400)).round(3),
            "at": rng.permutation(400),
        }
    )
    frame["y"] = (frame.stars >= 4).astype(int)
    return frame


@pytest.mark.parametrize("rule", ["latest", "earliest", "strongest", None])
@pytest.mark.parametrize("has_times", [True, False])
def test_rows_of_new_users_count_as_in_the_log(
    tmp_path: Path, rule: str | None, has_times: bool
) -> None:
    rows = {"rating": "stars", "min_rating": 4, "time": "at"}
    dataset = _dataset(tmp_path, **rows, **({} if rule is None else {"repeated": rule}))
    frame = _frame() if has_times else _frame().drop(columns="at")
    frame.to_csv(tmp_path / "new.csv", index=False)
    new = _as_sets(dataset, read_new_users(dataset, tmp_path / "new.csv"))
    by = {"earliest": "at", "strongest": "stars"}.get(rule or "", "at") if has_times else "stars"
    known = frame[frame.what.astype(int) < N_ITEMS].sort_values(by)
    pairs = known.groupby(["who", "what"])
    kept = pairs.first() if rule == "earliest" and has_times else pairs.last()
    kept = kept.reset_index()
    liked = kept[kept.stars >= 4].groupby("who").what.apply(set)
    low = kept[kept.stars < 4].groupby("who").what.apply(set)
    assert 0 < len(liked) < frame.who.nunique()  # some have no positive
    assert new == {user: (items, low.get(user, set())) for user, items in liked.items()}


def test_the_strongest_row_of_a_new_user_is_that_of_the_logs_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["cart", "view", "buy"]
    log = pd.DataFrame({"who": [f"u{k % 5}" for k in range(60)], "what": np.arange(60) % N_ITEMS})
    log = log.assign(stars=5, act="buy")
    spec = {
        "interactions": {"file": "log.csv", "user": "who", "item": "what", "rating": "stars"}
        | {"min_rating": 4, "repeated": "strongest", "order": {"act": words}},
        "features": [{"name": "item", "entity": "item"}, SEEN],
        "split": {"valid": 0, "test": 0},
    }
    log.to_csv(tmp_path / "log.csv", index=False)
    dataset = made_of(tmp_path, spec)
    frame = _frame().drop(columns=["at", "y"])
    frame["act"] = np.random.default_rng(6).choice(words, len(frame))
    frame.to_csv(tmp_path / "new.csv", index=False)
    new = _as_sets(dataset, read_new_users(dataset, tmp_path / "new.csv"))
    known = frame[frame.what.astype(int) < N_ITEMS]
    known = known.assign(strength=known.act.map(words.index)).sort_values(["strength", "stars"])
    kept = known.groupby(["who", "what"]).last().reset_index()
    assert (kept.stars < known.groupby(["who", "what"]).stars.max().to_numpy()).any()
    liked = kept[kept.stars >= 4].groupby("who").what.apply(set)
    low = kept[kept.stars < 4].groupby("who").what.apply(set)
    assert new == {user: (items, low.get(user, set())) for user, items in liked.items()}
    assert caplog.text == ""

    frame.drop(columns="act").to_csv(tmp_path / "new.csv", index=False)
    read_new_users(dataset, tmp_path / "new.csv")
    again = int(known.duplicated(["who", "what"]).sum())
    assert "it has no column 'act', whose words say" in caplog.text
    assert f"is the strongest; chosen without it: {again} rows" in caplog.text
    frame.assign(act="steal").to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(DataError, match=r"act 'steal' is not a word of .* view, buy; fix the row$"):
        read_new_users(dataset, tmp_path / "new.csv")
    with pytest.raises(DataError, match=r"^recommend\.histories=.*gone\.csv: no such file$"):
        read_new_users(dataset, tmp_path / "gone.csv")


def test_labels_say_what_was_clicked(tmp_path: Path) -> None:
    click = {"task": "ctr"}
    dataset = _dataset(tmp_path, click, label="y", time="at")
    frame = _frame()
    frame.to_parquet(tmp_path / "new.parquet")
    new = _as_sets(dataset, read_new_users(dataset, tmp_path / "new.parquet"))
    known = frame[frame.what.astype(int) < N_ITEMS]
    clicked = known[known.y == 1].groupby("who").what.apply(set)
    shown = known[known.y == 0].groupby("who").what.apply(set)
    assert new == {user: (items, shown.get(user, set())) for user, items in clicked.items()}


def test_files_may_have_their_own_names_and_no_ratings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _dataset(tmp_path, rating="stars", min_rating=4, time="at")
    caplog.set_level("INFO")
    for text in ('{"user": "a", "item": 3}\n{"user": "b", "item": "03"}\n',
                 '{"who": "a", "what": 3}\n{"who": "b", "what": "03"}\n'):  # fmt: skip
        (tmp_path / "new.jsonl").write_text(text)
        caplog.clear()
        new = read_new_users(dataset, tmp_path / "new.jsonl")
        assert _as_sets(dataset, new) == {"a": ({"3"}, set())}
        assert "left out 1 row of items" in caplog.text
        assert "1 differ only in leading zeros: '03' and '3'" in caplog.text
        assert "left out 1 user without an item known to the model" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,what\na,3.0\n", r"none of its items .* has '3\.0' .* have '0'; 1 differ only in dec"),
        ("who,what,stars\na,3,2\n", "no row of an item in the training data is rated 4 or more"),
        ("who,what,stars\na,3,\n", "line 2: stars '' is empty"),
        ("who,thing\na,3\n", "no column 'item'"),
    ],
)
def test_files_that_say_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    dataset = _dataset(tmp_path, rating="stars", min_rating=4, time="at")
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_new_users(dataset, tmp_path / "new.csv")


CITY = {"name": "city", "entity": "user", "file": "people.csv", "keep": "first"}


def _with_cities(root: Path, *features: dict[str, Any]) -> PreparedDataset:
    people = "".join(f"u{k},{('Oslo', 'Rome')[k % 2]}\n" for k in range(5))
    (root / "people.csv").write_text("who,city\n" + people)
    item = {"name": "item", "entity": "item"}
    return _dataset(root, {"features": [item, *features, CITY]}, rating="stars", min_rating=4)


def test_a_new_user_with_attributes_needs_no_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dataset = _with_cities(tmp_path, SEEN)
    rows = "who,what,stars,city\nc,3,5,\nb,,,Rome\na,1,5,\na,,,Oslo\nd,,,\ne,4,1,\ne,,,Paris\n"
    (tmp_path / "new.csv").write_text(rows)
    new = read_new_users(dataset, tmp_path / "new.csv")
    assert _as_sets(dataset, new) == {
        "a": ({"1"}, set()),
        "b": (set(), set()),
        "c": ({"3"}, set()),
        "e": (set(), {"4"}),
    }
    assert new.attributes is not None
    words = ["unknown", *dataset.vocabulary("city").ids.to_pylist()]
    cities = new.attributes["city"]
    assert isinstance(cities, Jagged)
    assert [[words[c] for c in bag] for bag in cities.lists()] == [
        ["Oslo"],
        ["Rome"],
        [],
        ["unknown"],
    ]
    assert "left out 1 user without" in caplog.text

    (tmp_path / "new.csv").write_text("who,what,stars,city\nb,,,Rome\nc,3,,\n")
    with pytest.raises(DataError, match="row 2: stars is empty, and the row has an item; fill"):
        read_new_users(dataset, tmp_path / "new.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,city,what,stars\nb,Rome,3,5\n", "does not know users by their items, but by city; "),
        ("who,what,stars\nb,3,5\n", "give columns of these, without items, or train a model that"),
        ("who,city\nb,\n", "no user has an item or a value of city; fill some in"),
    ],
)
def test_a_model_of_attributes_takes_no_items(tmp_path: Path, text: str, message: str) -> None:
    dataset = _with_cities(tmp_path)
    (tmp_path / "new.csv").write_text("who,city\nb,Rome\na,\n")
    assert read_new_users(dataset, tmp_path / "new.csv").ids.to_pylist() == ["b"]
    (tmp_path / "new.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_new_users(dataset, tmp_path / "new.csv")


def test_a_repeated_item_without_times_has_its_last_place(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, time="at")
    (tmp_path / "new.csv").write_text("who,what\na,7\na,2\na,7\n")
    [bag] = read_new_users(dataset, tmp_path / "new.csv").histories.lists()
    assert dataset.entity_ids("item").take(bag).to_pylist() == ["2", "7"]


@pytest.mark.parametrize("has_times", [True, False])
def test_items_of_new_users_are_in_order(tmp_path: Path, has_times: bool) -> None:
    dataset = _dataset(tmp_path, time="at")
    frame = pd.DataFrame(
        {"who": list("abbaab"), "what": [7, 2, 9, 3, 5, 1], "at": [3, 9, 8, 1, 2, 10]}
    )
    (frame if has_times else frame.drop(columns="at")).to_csv(tmp_path / "new.csv", index=False)
    new = read_new_users(dataset, tmp_path / "new.csv")
    ids = dataset.entity_ids("item").to_pylist()
    bags = {
        u: [int(ids[i]) for i in bag]
        for u, bag in zip(new.ids.to_pylist(), new.histories.lists(), strict=True)
    }
    in_order = frame.sort_values("at") if has_times else frame
    assert bags == in_order.groupby("who").what.apply(list).to_dict()
