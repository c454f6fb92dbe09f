"""Batches: the same global batch at any world size, every row used, fields looked up right."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepfm_dist.config import load_config
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import ABSENT, Collator
from deepfm_dist.data.batches.histories import hold_out
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.data.jagged import Jagged, taken
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.data.sources import read_table
from deepfm_dist.errors import ConfigError, DataError
from tests.data.batches.readable import rows_of


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("step", [1, 144, 145, 288])
def test_ranks_share_the_global_batch(sample: PreparedDataset, size: int, step: int) -> None:
    whole = TrainingBatches(sample, 1000, 0, 1, seed=1).batch(step)
    parts = [TrainingBatches(sample, 1000, r, size, seed=1).batch(step) for r in range(size)]
    assert len({len(p.labels) for p in parts}) == 1
    assert {float(p.global_weight) for p in parts} == {float(whole.weights.sum())}
    assert [row for part in parts for row in rows_of(part)] == rows_of(whole)


@pytest.mark.slow  # whole epochs, row by row
def test_an_epoch_has_every_positive_once_and_its_negatives(sample: PreparedDataset) -> None:
    batches = TrainingBatches(sample, 5000, 0, 1, seed=1)
    k = sample.manifest.data.negatives.per_positive
    seen_negatives = []
    expected = Counter(
        (u, i)
        for u in range(len(sample.history))
        for i in sample.history.values[
            sample.history.offsets[u] : sample.history.offsets[u + 1]
        ].tolist()
    )
    for epoch in range(2):
        first = 1 + epoch * batches.steps_per_epoch
        rows = [
            r for b in batches.steps(first, first + batches.steps_per_epoch - 1) for r in rows_of(b)
        ]
        pairs = [(u[0], i[0]) for u, i, _, _ in rows]  # type: ignore[index]
        labels = [row[3] for row in rows]
        positives = Counter(p for p, y in zip(pairs, labels, strict=True) if y == 1)
        negatives = [p for p, y in zip(pairs, labels, strict=True) if y == 0]
        assert positives == expected
        assert len(negatives) == k * len(expected)
        assert not set(negatives) & set(expected)
        per_user = Counter(u for u, _ in negatives)
        assert all(per_user[u] == k * n for u, n in Counter(u for u, _ in expected).items())
        seen_negatives.append(Counter(negatives))
    assert seen_negatives[0] != seen_negatives[1]
    again = TrainingBatches(sample, 5000, 0, 1, seed=1).batch(3)
    assert rows_of(again) == rows_of(batches.batch(3))


@pytest.mark.parametrize("avoid", ["train", "all"])
@pytest.mark.parametrize("redraw", [True, False])
def test_negatives_avoid_and_change_as_they_are_reported(
    tmp_path: Path, avoid: str, redraw: bool
) -> None:
    rng = np.random.default_rng(1)
    pairs = sorted({(int(u), int(i)) for u, i in rng.integers(0, (12, 15), (90, 2))})
    (tmp_path / "r.csv").write_text("u,i\n" + "".join(f"{u},{i}\n" for u, i in pairs))
    data = DataConfig.model_validate(
        {
            "interactions": {"file": "r.csv", "user": "u", "item": "i"},
            "features": [{"name": n, "entity": n} for n in ("user", "item")],
            "split": {"method": "per_user", "valid": 0.2, "test": 0.2},
            "negatives": {
                "per_positive": 2,
                "evaluation_per_positive": 1,
                "avoid": avoid,
                "redraw": redraw,
                "popularity_power": 0.5 if redraw else 0.0,
            },
        }
    )
    prepare(data, tmp_path, tmp_path / "d", seed=1)
    dataset = PreparedDataset(tmp_path / "d")
    held_out = {
        (u, i)
        for split in ("valid", "test")
        for u, bag in enumerate(dataset.positives(split).lists())
        for i in bag
    }
    batches = TrainingBatches(dataset, 30, 0, 1, seed=2)
    epochs = []
    for epoch in range(6):
        first = 1 + epoch * batches.steps_per_epoch
        rows = [
            row
            for b in batches.steps(first, first + batches.steps_per_epoch - 1)
            for row in rows_of(b)
        ]
        epochs.append(sorted((u[0], i[0]) for u, i, y in rows if not y))  # type: ignore[index]
    assert (epochs[0] == epochs[1]) != redraw
    drawn = {pair for epoch in epochs for pair in epoch}
    assert bool(drawn & held_out) == (avoid == "train")


def test_ranks_without_rows_are_refused(sample: PreparedDataset) -> None:
    with pytest.raises(ConfigError, match="batch of 4 rows over 3 ranks leaves a rank without"):
        TrainingBatches(sample, 4, 0, 3, seed=1)
    everything = TrainingBatches(sample, 10**9, 0, 1, seed=1)
    assert everything.steps_per_epoch == 1


def test_the_collator_looks_up_each_rows_fields(sample: PreparedDataset) -> None:
    users, items = np.array([3, ABSENT, 5], np.int32), np.array([7, 8, ABSENT], np.int32)
    batch = Collator(sample)(users, items, n_real=2, labels=np.array([1, 0, 0], np.float32))
    genres = sample.entity_fields["genre"]
    assert isinstance(genres, Jagged)
    bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
    assert bags["user"] == [[3], [], [5]]
    assert bags["item"] == [[7], [8], []]
    expected = [genres.values[genres.offsets[i] : genres.offsets[i + 1]].tolist() for i in (7, 8)]
    assert bags["genre"] == [*expected, []]
    assert batch.weights.tolist() == [1, 1, 0]
    assert batch.to(torch.device("cpu")).labels.tolist() == [1, 0, 0]


def test_numbers_and_context_reach_the_batch_and_new_rows_equal_prepared_ones(
    tmp_path: Path,
) -> None:
    (tmp_path / "r.csv").write_text("u,i,h,m,n\na,x,1,p|q,4\nb,y,2,,9\nb,x,1,q,\n")
    fields = (
        "[{name: user, entity: user}, {name: h}, {name: m, separator: '|'}, "
        "{name: n, kind: numeric}]"
    )
    config = load_config(
        "sample",
        [
            f"data={{root: {tmp_path}, interactions: {{file: r.csv, user: u, item: i}}, "
            f"features: {fields}, split: {{valid: 0, test: 0}}}}"
        ],
    )
    prepare(config.data, tmp_path, tmp_path / "d", seed=1)
    dataset = PreparedDataset(tmp_path / "d")
    rows = dataset.rows("train")
    numbers = np.asarray(rows.context["n"]).tolist()
    in_file = np.array([numbers.index(n) for n in (4, 9, 0)])  # where the file's rows are now
    places = np.array([in_file[2], in_file[0], ABSENT])
    batch = Collator(dataset)(rows.users, rows.items, rows.context, places)
    assert batch.dense[:, 0].tolist() == [0, 4, 0]
    bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
    assert [len(b) for b in bags["m"]] == [1, 2, 0]
    assert bags["m"][1][1] == bags["m"][0][0]
    assert [len(b) for b in bags["h"]] == [1, 1, 0]
    encoder = RowEncoder(dataset)
    new = encoder.encode(read_table(tmp_path / "r.csv", encoder.columns))
    assert new.users is not None
    assert new.users.tolist() == rows.users[in_file].tolist()  # type: ignore[index]
    assert np.array_equal(new.context["h"], np.asarray(rows.context["h"])[in_file])  # type: ignore[arg-type]
    trained = taken(rows.context["m"], in_file)
    assert new.context["m"].values.tolist() == trained.values.tolist()  # type: ignore[union-attr]
    fixed = encoder.fixed_context({"h": 2, "m": "q", "n": "7"})
    assert fixed["n"].tolist() == [7]  # type: ignore[union-attr]
    for values, message in [
        ({"m": "q", "n": 1}, "recommend.context.h: this model depends on h"),
        (
            {"m": "q"},
            "recommend.context.h: this model depends on h, n; give the value to recommend for: "
            "recommend.context.h=VALUE recommend.context.n=VALUE$",
        ),
        ({"h": 3, "m": "q", "n": 1}, "h=3: never seen in training"),
        ({"h": 1, "m": "q", "n": "much"}, "expected a number"),
        ({"hx": 1, "m": "q", "n": 1}, "hx: unknown .*; did you mean recommend.context.h?"),
        ({"h": 1, "m": "q", "n": 1, "zz": 1}, "zz: unknown context field; available: h, m, n"),
    ]:
        with pytest.raises(ConfigError, match=message):
            encoder.fixed_context(values)


def test_a_manifest_that_may_not_be_read_is_named(
    sample: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(DataError, match=r"manifest.json: .*Permission denied"):
        PreparedDataset(sample.folder)


def test_a_damaged_dataset_is_named(sample: PreparedDataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared dataset"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest of this version"):
        PreparedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text((sample.folder / "manifest.json").read_text())
    with pytest.raises(DataError, match="missing or damaged"):
        PreparedDataset(tmp_path).rows("train")


def test_the_dataset_is_parquet_that_other_tools_read(sample: PreparedDataset) -> None:
    frame = pd.read_parquet(sample.folder / "test")
    assert set(frame.columns) == {"user", "item", "label", "time"}
    assert len(frame) == sample.manifest.splits["test"].rows


FEATURES = """
- {name: user, entity: user}
- {name: item, entity: item}
- {name: tags, entity: item, file: items.csv, column: t, separator: "|"}
- {name: price, entity: item, file: items.csv, column: p, kind: numeric}
- {name: job, entity: user, column: j}
- {name: h}
- {name: m, separator: "+"}
- {name: n, kind: numeric}
- {name: log_n, column: n, kind: numeric, transform: log}
"""
ITEMS = {"x": (["k", "l"], 3.5), "y": ([], 0.0), "z": (["l"], -1.0)}
ROWS: list[tuple[str, str, str, str, str, float, int]] = [
    ("a", "x", "q", "8", "u+v", 1.0, 1),
    ("a", "y", "q", "9", "", 2.0, 0),
    ("b", "z", "r", "8", "v", 0.0, 1),
    ("c", "x", "", "9", "w+u", 4.0, 0),
    ("c", "z", "", "9", "u", 5.0, 0),
]


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """A few labelled rows with fields of every kind."""
    root = tmp_path_factory.mktemp("clicks")
    (root / "rows.csv").write_text(
        "u,i,j,h,m,n,y\n" + "".join(",".join(map(str, row)) + "\n" for row in ROWS)
    )
    (root / "items.csv").write_text(
        "i,t,p\n" + "".join(f"{i},{'|'.join(t)},{p or ''}\n" for i, (t, p) in ITEMS.items())
    )
    data = DataConfig.model_validate(
        {
            "task": "ctr",
            "interactions": {"file": "rows.csv", "user": "u", "item": "i", "label": "y"},
            "features": yaml.safe_load(FEATURES),
            "split": {"valid": 0, "test": 0},
        }
    )
    prepare(data, root, root / "d", seed=4)
    return PreparedDataset(root / "d")


def in_words(dataset: PreparedDataset, batch: Batch) -> list[tuple[dict[str, list[str]], object]]:
    """Each row's bags as external ids, and its numbers."""
    tables = {f.name: f.table_name for f in dataset.manifest.categorical}
    ids = {n: [None, *dataset.vocabulary(t).ids.to_pylist()] for n, t in tables.items()}
    bags = {
        key: [[ids[key][v] for v in bag.tolist()] for bag in jagged.to_dense()]
        for key, jagged in batch.sparse.to_dict().items()
    }
    height = len(batch.labels)
    return [({k: bags[k][r] for k in bags}, batch.dense[r].tolist()) for r in range(height)]


def in_file_order(dataset: PreparedDataset) -> Rows:
    """The training rows in the order of `ROWS`, whose n is a number of its own in each."""
    rows = dataset.rows("train")
    numbers = np.asarray(rows.context["n"]).tolist()
    order = np.array([numbers.index(row[5]) for row in ROWS])
    columns = {n: v for n, v in (("user", rows.users), ("item", rows.items)) if v is not None}
    return Rows.of({n: taken(v, order) for n, v in (columns | dict(rows.context)).items()})


def expected_row(user: int | None, item: int | None, context: int | None) -> tuple[object, object]:
    """What the fields of (the user of row, the item of row, the context of row) are."""
    bags: dict[str, list[str | None]] = {"user": [], "item": [], "tags": [], "job": []}
    bags |= {"h": [], "m": []}
    price = number = 0.0
    if user is not None:
        bags["user"], bags["job"] = [ROWS[user][0]], [ROWS[user][2]] if ROWS[user][2] else []
    if item is not None:
        tags, price = ITEMS[ROWS[item][1]]
        bags["item"], bags["tags"] = [ROWS[item][1]], [*tags]
    if context is not None:
        bags["h"], number = [ROWS[context][3]], ROWS[context][5]
        bags["m"] = [*filter(None, ROWS[context][4].split("+"))]
    return bags, [price, number, float(np.log1p(np.float32(number)))]


PLACE = st.none() | st.integers(0, len(ROWS) - 1)


@given(st.lists(st.tuples(PLACE, PLACE, PLACE), min_size=1, max_size=8))
def test_the_collator_equals_a_loop_over_the_rows(
    clicks: PreparedDataset, places: list[tuple[int | None, int | None, int | None]]
) -> None:
    rows = in_file_order(clicks)
    assert rows.users is not None
    assert rows.items is not None
    users, items, context = (
        np.array([ABSENT if p is None else column[p] for p in column_places], np.int32)
        for column, column_places in zip(
            (rows.users, rows.items, np.arange(rows.n)), zip(*places, strict=True), strict=True
        )
    )
    batch = Collator(clicks)(users, items, rows.context, context)
    actual = in_words(clicks, batch)
    for (bags, numbers), place in zip(actual, places, strict=True):
        expected_bags, expected_numbers = expected_row(*place)
        assert bags == expected_bags
        assert numbers == pytest.approx(expected_numbers)
    assert batch.weights.tolist() == [1] * len(places)
    assert float(batch.global_weight) == len(places)
    assert batch.sparse.keys() == [f.name for f in clicks.manifest.categorical]


def test_both_sides_may_lack_fields(clicks: PreparedDataset) -> None:
    items = in_file_order(clicks).items
    batch = Collator(clicks)(None, items)
    expected = [expected_row(None, place, None) for place in range(len(ROWS))]
    assert [bags for bags, _ in in_words(clicks, batch)] == [bags for bags, _ in expected]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_labelled_rows_come_once_an_epoch_each_with_its_own_fields(
    clicks: PreparedDataset, size: int
) -> None:
    orders = []
    for epoch in range(3):
        seen = []
        for step in (1 + 2 * epoch, 2 + 2 * epoch):  # five rows, three a step
            parts = [TrainingBatches(clicks, 3, r, size, seed=2).batch(step) for r in range(size)]
            for part in parts:
                real = int(part.weights.sum())
                for (bags, numbers), label in list(
                    zip(in_words(clicks, part), part.labels.tolist(), strict=True)
                )[:real]:
                    match = [
                        place
                        for place in range(len(ROWS))
                        if expected_row(place, place, place)[0] == bags
                    ]
                    assert len(match) == 1
                    assert label == ROWS[match[0]][-1]
                    assert numbers == pytest.approx(expected_row(*match * 3)[1])
                    seen += match
        assert sorted(seen) == list(range(len(ROWS)))
        orders.append(tuple(seen))
    assert len(set(orders)) > 1  # another order in every epoch


def test_only_clicks_are_history_and_popularity(clicks: PreparedDataset) -> None:
    users, items = (clicks.entity_ids(e).to_pylist() for e in ("user", "item"))
    history = {
        users[u]: [items[i] for i in clicks.history.values[slice(*clicks.history.offsets[u:][:2])]]
        for u in range(1, len(users))
    }
    assert history == {"a": ["x"], "b": ["z"], "c": []}
    counts = dict(zip(items, clicks.popularity().tolist(), strict=True))
    assert counts == {None: 0, "x": 1, "y": 0, "z": 1}


def test_an_own_seed_has_its_own_order(sample: PreparedDataset) -> None:
    one, two = (rows_of(TrainingBatches(sample, 500, 0, 1, s).batch(1)) for s in (1, 2))
    assert len(set(one) & set(two)) < 50


@pytest.mark.parametrize("columns", ["user,item", "item,extra,user"])
def test_new_rows_are_looked_up_and_unknown_ones_are_row_0(
    sample: PreparedDataset, tmp_path: Path, columns: str
) -> None:
    known = sample.entity_ids("user")[5].as_py(), sample.entity_ids("item")[9].as_py()
    cells = {"user": [known[0], "nobody"], "item": ["nothing", known[1]], "extra": ["?", "!"]}
    order = columns.split(",")
    lines = [",".join(cells[c][r] for c in order) for r in range(2)]
    (tmp_path / "new.csv").write_text("\n".join([columns, *lines]))
    encoder = RowEncoder(sample)
    rows = encoder.encode(read_table(tmp_path / "new.csv", encoder.columns))
    assert rows.users is not None
    assert rows.items is not None
    assert (rows.users.tolist(), rows.items.tolist()) == ([5, 0], [0, 9])
    assert rows.labels is None
    assert encoder.fixed_context({}) == {}
    with pytest.raises(ConfigError, match=r"h: unknown context field; this model has none"):
        encoder.fixed_context({"h": 1})


def test_rows_read_again_equal_the_prepared_ones_in_every_field(clicks: PreparedDataset) -> None:
    encoder = RowEncoder(clicks)  # two fields read the column n
    again = encoder.encode(read_table(clicks.folder.parent / "rows.csv", encoder.columns))
    rows = in_file_order(clicks)
    assert again.context.keys() == rows.context.keys() == {"h", "m", "n", "log_n"}
    place = np.arange(rows.n)
    batches = [Collator(clicks)(r.users, r.items, r.context, place) for r in (rows, again)]
    assert in_words(clicks, batches[0]) == in_words(clicks, batches[1])


def test_a_value_of_the_configuration_is_the_same_as_in_a_file(clicks: PreparedDataset) -> None:
    said = load_config("sample", ["recommend.context={h: 8, m: u+v, n: 1, log_n: 1}"])
    context = RowEncoder(clicks).fixed_context(said.recommend.context)
    one = Collator(clicks)(None, None, context, np.zeros(1, np.int32))
    [(bags, numbers)] = in_words(clicks, one)
    expected_bags, expected_numbers = expected_row(None, None, 0)
    assert bags == expected_bags
    assert numbers == pytest.approx(expected_numbers)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("vocabulary/user.parquet", lambda d: d.vocabulary("user")),
        ("entities/user.parquet", lambda d: d.history),
        ("entities/item.parquet", lambda d: d.entity_fields),
        ("entities/item.parquet", lambda d: d.titles()),
        ("test/part-00000.parquet", lambda d: d.positives("test")),
    ],
)
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_file_is_named(
    sample: PreparedDataset,
    tmp_path: Path,
    file: str,
    read: Callable[[PreparedDataset], object],
    damage: str,
) -> None:
    shutil.copytree(sample.folder, tmp_path / "d")
    path = tmp_path / "d" / file
    read(PreparedDataset(tmp_path / "d"))
    whole = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(DataError, match=f"{file}: missing or damaged .*delete .*/d and prepare"):
        read(PreparedDataset(tmp_path / "d"))


def test_training_items_serve_as_those_of_validation_rows(with_history: PreparedDataset) -> None:
    cut = hold_out(with_history, 0.5)
    whole, kept = with_history.history.lists(), cut.history.lists()
    held_out = cut.positives("valid").lists()
    assert cut.has_validation
    for items, rest, out in zip(whole, kept, held_out, strict=True):
        assert rest == [item for item in items if item not in out]
        assert sorted(rest + out) == sorted(items)
        assert rest or not items
    assert sum(map(len, held_out)) == pytest.approx(sum(map(len, whole)) / 2, rel=0.05)
    assert cut.positives("train").lists() == cut.met("train")[0].lists() == kept
    avoided = cut.seen(held_out=False).lists()
    assert all(
        not {i - 1 for i in out} & {*seen} for out, seen in zip(held_out, avoided, strict=True)
    )
    assert cut.with_validation() is with_history
    assert with_history.history.lists() == whole


def test_known_validation_items_are_held_out_as_others_are_and_each_draw_has_its_own(
    with_history: PreparedDataset,
) -> None:
    known = with_history.with_validation()
    whole, train = known.history.lists(), with_history.history.lists()
    assert whole != train
    drawn = []
    for draw in range(3):
        cut = hold_out(known, 0.2, draw)
        kept, held_out = cut.history.lists(), cut.positives("valid").lists()
        for items, rest, out in zip(whole, kept, held_out, strict=True):
            assert rest == [item for item in items if item not in out]
            assert sorted(rest + out) == sorted(items)
        assert cut.met("train")[0].lists() == kept
        assert any({*out} - {*items} for items, out in zip(train, held_out, strict=True))
        drawn.append({(u, item) for u, out in enumerate(held_out) for item in out})
    # Two independent draws of a fifth share a 25th.
    n_items = sum(map(len, whole))
    assert len(drawn[0] & drawn[1]) == pytest.approx(n_items / 25, rel=0.2)
    assert len(drawn[1] & drawn[2]) == pytest.approx(n_items / 25, rel=0.2)


def test_validation_rows_belong_to_the_past_of_the_test(with_history: PreparedDataset) -> None:
    later = with_history.with_validation()
    train, valid = with_history.history.lists(), with_history.positives("valid").lists()
    expected = [
        [*old, *dict.fromkeys(i for i in new if i > 0 and i not in old)]
        for old, new in zip(train, valid, strict=True)
    ]
    expected[0] = []
    assert later.history.lists() == expected
    assert sum(map(len, expected)) > sum(map(len, train)) + 1000
    # Masks and the trained one stay as they were.
    assert with_history.history.lists() == train
    assert [m.lists() for m in later.met("train")] == [m.lists() for m in with_history.met("train")]
    avoided = later.seen(held_out=False).lists()
    assert {i - 1 for i in expected[7]} <= set(avoided[7])
    mapped_from_disk = PreparedDataset(with_history.folder, memory_bytes=0).with_validation()
    assert mapped_from_disk.history.lists() == expected
    assert later.with_validation().history.lists() == expected
