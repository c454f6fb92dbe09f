"""Datasets written by hand, as docs/data.md says, and all that may be wrong with one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deepfm_dist.data.batches.held_out import SplitReader
from deepfm_dist.data.batches.row_batches import TrainingBatches
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.layout import DatasetFiles
from deepfm_dist.data.preparation import write_plan
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.errors import DataError
from tests.data.damage import cell, changed, setting

DATA = DataConfig.model_validate(
    yaml.safe_load("""
interactions: {file: rows/*.parquet, user: u, item: i}
features:
  - {name: user, entity: user}
  - {name: item, entity: item}
  - {name: genre, entity: item, file: genres.csv, keep: first}
  - {name: age, entity: user, file: people.csv, kind: numeric, transform: standard}
  - {name: hour}
  - {name: mood, separator: "|"}
  - {name: ad, hash_rows: 100}
  - {name: price, kind: numeric, transform: bucket, buckets: 3}
negatives: {per_positive: 1, evaluation_per_positive: 1}
""")
)
INT, REAL, INTS = pa.int32(), pa.float32(), pa.list_(pa.int32())


def write(path: Path, group_rows: int, **columns: tuple[pa.DataType, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(values, kind) for name, (kind, values) in columns.items()})
    pq.write_table(table, path, row_group_size=group_rows)


def write_by_hand(folder: Path) -> None:
    """Writes a dataset as Spark would: 5 training rows in 2 files, 2 groups, 2 lanes."""
    _write_entities(folder)
    for split, part, pairs, labels in (
        ("train", 0, [(1, 1), (1, 2), (2, 1)], None),
        ("train", 1, [(2, 2), (2, 3)], None),
        ("valid", 0, [(1, 3), (1, 4)], [1, 0]),
        ("valid", 1, [], []),
        ("test", 0, [], []),
        ("test", 1, [(2, 4), (2, 0)], [1, 0]),
    ):
        n = len(pairs)
        labelled = {} if labels is None else {"label": (REAL, labels)}
        write(
            folder / split / f"part-{part:05d}.parquet",
            2 if part else 3,
            user=(INT, [u for u, _ in pairs]),
            item=(INT, [i for _, i in pairs]),
            **labelled,
            hour=(INT, [1 + k % 2 for k in range(n)]),
            mood=(INTS, [[1, 2][: k % 3] for k in range(n)]),
            ad=(INT, [100 - k for k in range(n)]),
            price=(INT, [k % 4 for k in range(n)]),
        )
    (folder / "manifest.json").write_text(json.dumps(_manifest()))


def _write_entities(folder: Path) -> None:
    """Writes the vocabularies, users and items."""
    text, long = pa.string(), pa.int64()

    def vocabulary(name: str, *ids: str) -> None:
        rows = list(range(len(ids) + 1))
        write(
            folder / "vocabulary" / f"{name}.parquet",
            9,
            row=(INT, rows),
            id=(text, [None, *ids]),
            count=(long, [0] + [2] * len(ids)),
        )

    vocabulary("user", "ann", "bob")
    vocabulary("item", "x", "y", "z", "w")
    vocabulary("genre", "Drama")
    vocabulary("hour", "9", "10")
    vocabulary("mood", "calm", "happy")
    write(
        folder / "entities" / "user.parquet",
        2,
        id=(text, [None, "ann", "bob"]),
        age=(REAL, [0, 1, -1]),
        history=(INTS, [[], [1, 2], [1, 2, 3]]),
        seen_train=(INTS, [[], [], []]),
        seen_valid=(INTS, [[], [3], []]),
        seen_test=(INTS, [[], [], [4]]),
    )
    write(
        folder / "entities" / "item.parquet",
        9,
        id=(text, [None, "x", "y", "z", "w"]),
        genre=(INTS, [[], [1], [], [1], []]),
        count=(long, [0, 2, 2, 1, 0]),
    )


def _manifest() -> dict[str, Any]:
    splits = {"train": (5, 5), "valid": (2, 1), "test": (2, 1)}
    sizes = {"user": 3, "item": 5, "genre": 2, "hour": 3, "mood": 3, "ad": 101, "price": 4}
    return {
        "format": 4,
        "fingerprint": "given",
        "vocabulary_hash": "of the ids in row order",
        "seed": 1,
        "data": DATA.model_dump(mode="json"),
        "tables": {name: {"rows": n, "features": [name]} for name, n in sizes.items()},
        "entities": {"user": 3, "item": 5},
        "numeric": {
            "age": {"mean": 40, "std": 10},
            "price": {"mean": 0, "std": 1, "boundaries": [2, 5]},
        },
        "splits": {
            name: {"rows": rows, "positives": positives, "size_bytes": 40 * rows}
            for name, (rows, positives) in splits.items()
        },
        "files": 2,
        "lanes": 2,
        "groups": 2,
        "dropped": {},
        "inputs": {},
        "versions": {"spark": "4"},
    }


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_a_dataset_written_by_hand_is_accepted(tmp_path: Path, memory_bytes: int) -> None:
    folder = tmp_path / "d"
    write_by_hand(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = prepare(DATA.model_copy(update={"root": "elsewhere"}), tmp_path, folder, seed=9)
    assert {p: p.read_bytes() for p in before} == before
    prepare(DATA, tmp_path, folder, seed=1)
    assert manifest.splits["train"].rows == 5
    dataset = PreparedDataset(folder, memory_bytes)
    batches = TrainingBatches(dataset, 10, 0, 1, seed=1)
    batch = batches.batch(1)
    bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
    positive = batch.labels == 1
    pairs = sorted(
        (u[0], i[0]) for u, i, y in zip(bags["user"], bags["item"], positive, strict=True) if y
    )
    assert pairs == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert set(map(tuple, bags["genre"])) <= {(), (1,)}
    with pytest.raises(DataError, match=r"other settings: data\.split differs; use the same"):
        other = DATA.model_copy(update={"split": DATA.split.model_copy(update={"valid": 0.2})})
        prepare(other, tmp_path, folder, seed=1)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_no_rows_of_empty_parts_are_rows(tmp_path: Path, split: str) -> None:
    write_by_hand(tmp_path)
    reader = SplitReader(PreparedDataset(tmp_path, 0), split)
    assert reader.n == 2
    for begin, end in ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2)):
        labels = reader.read(begin, end).labels
        assert labels is not None
        assert labels.tolist() == [1, 0][begin:end]


TRAIN, VALID, USERS = (
    "train/part-00000.parquet",
    "valid/part-00000.parquet",
    "entities/user.parquet",
)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / TRAIN).unlink(), r"part-00000\.parquet: .*[Ff]ailed to open"),
        (lambda f: (f / USERS).write_bytes(b"PAR1"), r"user\.parquet: .*Parquet"),
        (changed(TRAIN, lambda f: f.drop(columns="hour")), "column hour is missing, not int32"),
        (changed("train/part-00001.parquet", lambda f: f[:1]), "4 rows, where the manifest says 5"),
        (cell(TRAIN, "user", 0, 3), "the column user holds 3, not a row of its table, 0 to 2"),
        (cell(TRAIN, "item", 1, -1), "the column item holds -1, not a row of its table, 0 to 4"),
        (cell(TRAIN, "mood", 2, [3]), "the column mood holds 3, not a row of its table, 0 to 2"),
        (cell(TRAIN, "price", 2, 4), "the column price holds 4, not a row of its table, 0 to 3"),
        (
            cell("entities/item.parquet", "genre", 1, [1, 1]),
            r"item\.parquet: genre has several values, though the field has one",
        ),
        (cell(VALID, "label", 1, 0.5), "label must be 0 or 1"),
        (cell(VALID, "label", 1, 1), "valid: 2 positives, where the manifest says 1"),
        (cell(USERS, "age", 1, float("nan")), "the column age holds null"),
        (
            cell(USERS, "history", 1, [0]),
            "history holds 0, not a row of its table, 1 to 4",
        ),
        (cell(USERS, "id", 0, "eve"), "id must be null in row 0, and in no other"),
        (cell(USERS, "id", 2, "ann"), r"user\.parquet: an id comes twice"),
        (cell("vocabulary/hour.parquet", "row", 1, 0), r"hour\.parquet: row does not count from 0"),
        (
            cell("vocabulary/mood.parquet", "count", 1, -1),
            r"count holds -1, not in \[0, inf\)",
        ),
        (setting("tables", "ad", "rows", value=100), "100 rows of the table ad, .* says 101"),
        (setting("tables", "price", "rows", value=9), "9 rows of the table price, .* says 4"),
        (setting("tables", "hour", "rows", value=4), r"hour\.parquet: 3 rows, .* says 4"),
        (setting("tables", "user", "rows", value=9), "9 rows of the table user, .* says 3"),
        (setting("entities", "item", value=9), "5 rows of the table item, .* says 9"),
        (setting("groups", value=4), "row group at row 0 of the split crosses a cut"),
    ],
)
def test_layout_errors_are_reported(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    write_by_hand(tmp_path / "d")
    spoil(tmp_path / "d")
    with pytest.raises(DataError, match=message) as caught:
        prepare(DATA, tmp_path, tmp_path / "d", seed=1)
    assert len(str(caught.value).splitlines()) == 1


ITEMS, LATER = "entities/item.parquet", "train/part-00001.parquet"


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cell(TRAIN, "user", 0, 3), "part-00000.*: the column user holds 3, not a row of .*0 to 2"),
        (cell(LATER, "item", 1, -1), "part-00001.*: the column item holds -1, not a row of .*to 4"),
        (cell(TRAIN, "mood", 2, [1, 3]), "the column mood holds 3, not a row of its table, 0 to 2"),
        (cell(TRAIN, "ad", 2, 10**6), "the column ad holds 1000000, not a row of .* 0 to 100"),
        (cell(VALID, "item", 1, 5), "valid/part-00000.*: the column item holds 5, not a row of"),
        (cell(USERS, "history", 1, [5]), "user.*: the column history holds 5, not a row .*1 to 4"),
        (cell(USERS, "history", 1, [-7]), "the column history holds -7, not a row of its table"),
        (cell(ITEMS, "genre", 1, [2]), "item.*: the column genre holds 2, not a row of .* 0 to 1"),
        (changed(ITEMS, lambda f: f[:4]), r"item\.parquet: 4 rows, where the manifest says 5"),
        (changed(TRAIN, lambda f: f[:2]), "train: 4 rows, where the manifest says 5"),
        (changed("vocabulary/hour.parquet", lambda f: f[:2]), r"hour\.parquet: 2 rows, where"),
        (setting("tables", "user", "rows", value=2), "2 rows of the table user, where .* says 3"),
        (setting("tables", "price", "rows", value=3), "3 rows of the table price, .* says 4"),
    ],
)
def test_no_id_beyond_its_table_is_read(
    tmp_path: Path, spoil: Callable[[Path], None], message: str, memory_bytes: int
) -> None:
    """A dataset that was whole once; what another tool wrote is looked at only once."""
    write_by_hand(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message + ".*; delete .* and prepare it again") as caught:
        dataset = PreparedDataset(tmp_path, memory_bytes)
        TrainingBatches(dataset, 10, 0, 1, seed=1).batch(1)
        SplitReader(dataset, "valid").read(0, 2)
    assert len(str(caught.value).splitlines()) == 1


def test_prepared_datasets_have_a_valid_layout(
    sample: PreparedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    DatasetFiles(sample.folder, sample.manifest).check_everything()
    monkeypatch.setattr("deepfm_dist.data.preparation.job.PARTITION_BYTES", 500)
    monkeypatch.setattr(write_plan, "LANE_WINDOW_ROWS", 100)
    lines = [
        f"{k % 2},u{k % 7},{'ab'[k % 2]}|c,{k},{1 + k % 3},{'' if k % 5 else k}\n"
        for k in range(300)
    ]
    (tmp_path / "c.csv").write_text("y,u,m,n,w,b\n" + "".join(lines))
    data = {
        "task": "ctr",
        "interactions": {"file": "c.csv", "label": "y", "user": "u", "weight": "w"},
        "features": [
            {"name": "user", "entity": "user", "min_count": 30},
            {"name": "city", "entity": "user", "column": "m", "separator": "|"},
            {"name": "m", "separator": "|", "hash_rows": 3},
            {"name": "n", "kind": "numeric", "transform": "log"},
            {"name": "b", "kind": "numeric", "transform": "bucket"},
            {"name": "age", "entity": "user", "column": "b", "kind": "numeric"},
        ],
    }
    manifest = prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", 1)
    assert manifest.files > 5
    DatasetFiles(tmp_path / "d", manifest).check_everything()
    shutil.rmtree(tmp_path / "d" / "valid")
    with pytest.raises(DataError, match="valid"):
        DatasetFiles(tmp_path / "d", manifest).check_everything()


def test_fields_of_every_kind_are_laid_out_as_they_have_to_be(tmp_path: Path) -> None:
    rows = [f"{k % 31},{k * k % 37},{k % 3}|x,{k}\n" for k in range(150)]
    (tmp_path / "r.csv").write_text("u,i,c,n\n" + "".join(rows))
    (tmp_path / "i.csv").write_text("i,g,p\n" + "".join(f"{k},a{k}|b,{k}\n" for k in range(11)))
    features = """
- {name: user, entity: user, hash_rows: 4}
- {name: item, entity: item, min_count: 5}
- {name: home, entity: user, column: c}
- {name: first, entity: item, file: i.csv, column: g, separator: "|", keep: first}
- {name: hashed, entity: item, file: i.csv, column: g, separator: "|", hash_rows: 7}
- {name: bucket, entity: item, file: i.csv, column: p, kind: numeric, transform: bucket}
- {name: p, entity: item, file: i.csv, kind: numeric}
- {name: seen, entity: user, history: item, table: item}
- {name: seen_first, entity: user, history: first}
- {name: n, kind: numeric, transform: bucket}
"""
    data = {
        "interactions": {"file": "r.csv", "user": "u", "item": "i"},
        "features": yaml.safe_load(features),
        "negatives": {"per_positive": 1, "evaluation_per_positive": 1},
    }
    manifest = prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", 1)
    DatasetFiles(tmp_path / "d", manifest).check_everything()
    PreparedDataset(tmp_path / "d")


def test_a_byte_that_has_changed_is_never_read_as_another_number(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    shutil.copytree(sample.folder, tmp_path / "d")
    for name in ("train/part-00000.parquet", "entities/user.parquet", "vocabulary/item.parquet"):
        path, whole = tmp_path / "d" / name, sample.files.read(name)
        data, noticed = path.read_bytes(), 0
        for place in np.linspace(4, len(data) - 1, 60).astype(int):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            try:
                assert PreparedDataset(tmp_path / "d").files.read(name).equals(whole)
            except DataError as error:
                assert f"{name}: missing or damaged" in str(error)
                noticed += 1
        assert noticed >= 55
        path.write_bytes(data)
    PreparedDataset(tmp_path / "d").rows("train")


def test_files_that_have_changed_places_are_named(tmp_path: Path) -> None:
    """Two files of the same rows and types: nothing in them alone is wrong."""
    lines = [f"u{k % 9},i{k % 7},{'ab'[k % 2]},{'ab'[k // 2 % 2]}\n" for k in range(90)]
    (tmp_path / "r.csv").write_text("u,i,a,b\n" + "".join(lines))
    fields = [{"name": n, "entity": n} for n in ("user", "item")] + [{"name": "a"}, {"name": "b"}]
    data = {
        "interactions": {"file": "r.csv", "user": "u", "item": "i"},
        "features": fields,
        "split": {"valid": 0, "test": 0},
    }
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", 1)
    one, other = (tmp_path / "d" / f"vocabulary/{name}.parquet" for name in "ab")
    shutil.copyfile(one, tmp_path / "aside")
    shutil.copyfile(other, one)
    shutil.copyfile(tmp_path / "aside", other)
    with pytest.raises(DataError, match=r"vocabulary/a\.parquet: .*not the file that was prepared"):
        PreparedDataset(tmp_path / "d")
