"""Impressions, histories of item ids, and the layouts of MIND and Taobao, on generated files."""

from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from deepfm_dist import predict, train
from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import exploded
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.preparation import job, reading
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from tests.data.small_logs import contents
from tests.ranks import run_alone

MIND_TIME = "%m/%d/%Y %I:%M:%S %p"
Impression = tuple[str, datetime, list[str], list[tuple[str, int]]]
Mind = tuple[Path, list[Impression], list[Impression]]


def _impressions(rng: np.random.Generator, days: list[int], n: int, users: int) -> list[Impression]:
    """Rows as MIND has them: a user, a time, earlier clicks, and what was shown, with labels."""
    rows = []
    for _ in range(n):
        clock = (int(rng.integers(parts)) for parts in (24, 60, 60))
        moment = datetime(2019, 11, int(rng.choice(days)), *clock, tzinfo=UTC)
        clicks = [f"N{i}" for i in rng.choice(60, rng.integers(0, 6), replace=False)]
        items = [f"N{i}" for i in rng.choice(40, rng.integers(2, 8), replace=False)]
        clicked = rng.integers(len(items))
        shown = [(item, int(place == clicked)) for place, item in enumerate(items)]
        rows.append((f"U{rng.integers(users)}", moment, clicks, shown))
    return rows


def _behaviors(rows: list[Impression]) -> str:
    lines = []
    for number, (user, moment, clicks, shown) in enumerate(rows, start=1):
        hour = moment.strftime("%I").lstrip("0")  # 11/9/2019 1:05:58 PM
        at = f"{moment.month}/{moment.day}/{moment.year} {hour}:{moment:%M:%S %p}"
        cells = [str(number), user, at, " ".join(clicks), " ".join(f"{i}-{y}" for i, y in shown)]
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def mind(tmp_path_factory: pytest.TempPathFactory) -> Mind:
    """A folder with the files of MIND, and the impressions of train and dev."""
    root, rng = tmp_path_factory.mktemp("mind"), np.random.default_rng(5)
    sets = _impressions(rng, [9, 10, 11, 12], 300, 30), _impressions(rng, [15], 60, 40)
    news = [
        (f"N{i}", f"c{i % 3}", f"s{i % 7}", f'The "Best" {i}', 'of "it', "x", '[{"L": 1}]', "[]")
        for i in range(60)
    ]
    for name, rows in zip(("MINDsmall_train", "MINDsmall_dev"), sets, strict=True):
        (root / name).mkdir()
        (root / name / "behaviors.tsv").write_text(_behaviors(rows))
        (root / name / "news.tsv").write_text("".join("\t".join(row) + "\n" for row in news))
    return root, *sets


SMALL = (
    "model.embedding_dim=4",
    "model.over_arch_layer_sizes=[4]",
    "trainer.epochs=1",
    "trainer.batch_size=256",
    "run.loggers=[]",
)


def test_mind_is_prepared_as_published(mind: Mind, tmp_path: Path) -> None:
    root, trained, held_out = mind
    config = load_config("mind", [f"data.root={root}"])
    prepare(config.data, root, tmp_path / "p", 1)
    dataset = PreparedDataset(tmp_path / "p")
    assert Counter(_rows_of(dataset, "train")) + Counter(_rows_of(dataset, "valid")) == Counter(
        _expected(trained, dataset)
    )
    assert Counter(_rows_of(dataset, "test")) == Counter(_expected(held_out, dataset))
    assert dataset.manifest.tables["item"].features == ("clicked", "item")
    shown = {item for _, _, _, items in trained for item, _ in items}
    assert set(dataset.entity_ids("item").to_pylist()) - {None} <= shown  # no item by clicks alone
    titles = dataset.titles()
    assert titles is not None
    assert titles[dataset.entity_ids("item").to_pylist().index("N3")].as_py() == 'The "Best" 3'


def _rows_of(dataset: PreparedDataset, split: str) -> list[tuple[object, ...]]:
    """The rows of a split in the words of the input."""
    rows = dataset.rows(split)
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    hours = [None, *dataset.vocabulary("hour").ids.to_pylist()]
    clicked = rows.context["clicked"]
    assert isinstance(clicked, Jagged)
    assert rows.users is not None and rows.items is not None and rows.labels is not None
    bags = [clicked.values[a:b] for a, b in pairwise(clicked.offsets)]
    return [
        (users[u], items[i], int(y), hours[h], tuple(items[v] for v in bag))
        for u, i, y, h, bag in zip(
            rows.users, rows.items, rows.labels, rows.context["hour"], bags, strict=True
        )
    ]


def _expected(rows: list[Impression], dataset: PreparedDataset) -> list[tuple[object, ...]]:
    users, items, hours = (
        set(ids.to_pylist())
        for ids in (
            dataset.entity_ids("user"),
            dataset.entity_ids("item"),
            dataset.vocabulary("hour").ids,
        )
    )

    def known(name: str, names: set[str]) -> str | None:
        return name if name in names else None

    return [
        (
            known(user, users),
            known(item, items),
            label,
            known(str(moment.hour), hours),
            tuple(known(click, items) for click in clicks),
        )
        for user, moment, clicks, shown in rows
        for item, label in shown
    ]


def test_mind_is_trained_on_and_every_item_shown_is_scored(mind: Mind, tmp_path: Path) -> None:
    root, _, held_out = mind
    places = [f"run.{name}={tmp_path}/{name}" for name in ("prepared_root", "runs_root")]
    command = ["--config", "mind", f"data.root={root}", *SMALL, *places]
    assert run_alone(train.main, command) == 0
    unlabelled = tmp_path / "dev.tsv"  # as MIND's test set
    lines = _behaviors(held_out).replace("-1", "").replace("-0", "")
    unlabelled.write_text(lines)
    source = str(root / "MINDsmall_dev/behaviors.tsv")
    for name, file in (("labelled", source), ("unlabelled", str(unlabelled))):
        output = ["--input", file, "--output", str(tmp_path / f"{name}.parquet")]
        assert run_alone(predict.main, [*command, *output]) == 0
    scores = pd.read_parquet(tmp_path / "labelled.parquet")
    shown = [(user, item) for user, _, _, items in held_out for item, _ in items]
    assert list(zip(scores.user, scores.item, strict=True)) == shown
    assert pd.read_parquet(tmp_path / "unlabelled.parquet").equals(scores)


def test_taobao_is_prepared_as_published(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [
        (user, f"{2268000 + item}", f"{1000 + item % 5}", kind, 1511544070 + 10 * n)
        for n, (user, item) in enumerate(
            (int(u), int(i)) for u in range(1, 41) for i in rng.choice(20, 8, replace=False)
        )
        for kind in ["pv"]
    ]
    order = rng.permutation(len(rows))
    text = "".join(",".join(map(str, rows[n])) + "\n" for n in order)
    (tmp_path / "UserBehavior.csv").write_text(text)
    config = load_config("taobao", [f"data.root={tmp_path}"])
    prepare(config.data, tmp_path, tmp_path / "p", 1)
    dataset = PreparedDataset(tmp_path / "p")
    users, items = (dataset.entity_ids(e).to_pylist() for e in ("user", "item"))
    held = pd.read_parquet(tmp_path / "p/test").query("label == 1")
    last = {str(user): item for user, item, *_ in rows}  # rows are in the order of time
    assert {users[u]: items[i] for u, i in zip(held.user, held.item, strict=True)} == last
    values = dataset.entity_fields["category"]
    words = [None, *dataset.vocabulary("category").ids.to_pylist()]
    assert isinstance(values, Jagged)
    for row, item in enumerate(items[1:], start=1):
        bag = values.values[values.offsets[row] : values.offsets[row + 1]]
        assert [words[v] for v in bag] == [str(1000 + (int(item) - 2268000) % 5)]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["N1-1 N2-0", " A-1-0  b-c-1 "], [("N1", 1), ("N2", 0), ("A-1", 0), ("b-c", 1)]),
        (["N1 A-1"], [("N1", None), ("A-1", None)]),
    ],
)
def test_impressions_explode(cells: list[str], expected: list[object]) -> None:
    lists = pa.array([cell.split(" ") for cell in cells])
    batch = pa.RecordBatch.from_pydict(
        {"impressions": lists, "user": pa.array(["u", "v"][: len(cells)])}
    )
    actual = exploded(batch).to_pydict()
    assert [*zip(actual["item"], actual["label"], strict=True)] == expected
    assert actual["user"] == ["u"] * 2 + ["v"] * (len(expected) - 2)


@pytest.mark.parametrize("cell", ["N1-1 N2", "N1-2", "-1", "", "N1-1,N2-0"])
def test_an_impression_without_label_is_named(tmp_path: Path, cell: str) -> None:
    (tmp_path / "a.tsv").write_text(f"user\tshown\nu\tN1-1\nv\t{cell}\n")
    with pytest.raises(
        DataError, match=r"a\.tsv, line 3: shown '.*' is (not a list of items|empty)"
    ):
        prepare(_config(), tmp_path, tmp_path / "p", 1)


def _config(**changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "task": "ctr",
            "interactions": {"file": "a.tsv", "user": "user", "impressions": "shown"},
            "features": [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}],
            "split": {"valid": 0, "test": 0},
        }
        | changes
    )


def test_what_impressions_cannot_be_is_refused() -> None:
    assert _config() == DataConfig.model_validate(_config().model_dump())
    with pytest.raises(ValueError, match=r"interactions\.impressions needs task: ctr"):
        _config(task="implicit")
    ids = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    for field, message in (
        ({"name": "x", "entity": "item", "column": "x"}, "x: a row of impressions has many items"),
        (
            {"name": "x", "table": "item", "hash_rows": 5},
            "x cannot share the table of the items' ids",
        ),
        (
            {"name": "x", "table": "item", "min_count": 5},
            "x: min_count is that of item, whose table",
        ),
    ):
        for features in ([*ids, field], [field, *ids]):
            with pytest.raises(ValueError, match=message):
                _config(features=features)


def test_a_field_without_one_id_of_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("user\tshown\tclicks\nu\tN1-1 N2-0\tn1 n2 n1\n")
    ids = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    field = {"name": "clicks", "table": "item", "separator": " "}
    with pytest.raises(
        DataError, match=r"none of 6 values is one: such as 'n1', where ids .* 'N\d'"
    ):
        prepare(_config(features=[*ids, field]), tmp_path, tmp_path / "p", 1)


def test_several_ranks_explode_the_same_rows(
    mind: Mind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_IMPRESSIONS", 7)
    root, *_ = mind
    data = load_config("mind", [f"data.root={root}"]).data
    prepare(data, root, tmp_path / "one", 1)
    monkeypatch.setattr(job, "PARTITION_BYTES", 3000)
    prepare(data, root, tmp_path / "parted", 1)
    prepare(data, root, tmp_path / "two", 1, threads=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "parted")
    one, two = (PreparedDataset(tmp_path / name) for name in ("one", "two"))
    for split in ("train", "valid", "test"):
        assert Counter(_rows_of(one, split)) == Counter(_rows_of(two, split))
