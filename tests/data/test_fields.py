"""Fields: values, numbers, lists, derived values, and ids that look alike."""

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist.data.fields import split_cells
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.preparation import job
from deepfm_dist.data.schema import Feature
from deepfm_dist.data.sources import read_table
from deepfm_dist.errors import DataError
from deepfm_dist.seeding import mix
from tests.data.small_logs import USER_AND_ITEM, bag_of, bag_rows, small


@pytest.mark.parametrize(("keep", "bags"), [("all", ["pq", "r", "", "s"]), ("first", "pr s")])
def test_a_context_field_keeps_all_or_the_first_of_its_values(
    root: Path, keep: str, bags: list[str]
) -> None:
    features = f"[{{name: user, entity: user}}, {{name: m, separator: '|', keep: {keep}}}]"
    dataset = small(root, "u,i,m\na,x,p|q\na,y,|r|\nb,x,\nb,z,s\n", features)
    ids = ["", *dataset.vocabulary("m").ids.to_pylist()]
    values = dataset.rows("train").context["m"]
    if keep == "all":
        actual = ["".join(ids[v] for v in bag_of(values, r)) for r in range(4)]
    else:  # a row without a value has the unknown one
        actual = [ids[v] or " " for v in np.asarray(values)]
    assert sorted(actual) == sorted(bags)


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
      {name: noted, entity: user, column: at, kind: numeric, transform: standard},
      {name: log, column: at, kind: numeric, transform: log}]"""
    dataset = small(root, "u,i,at,same\n" + lines, features)
    assert (dataset.manifest.files > 1) == (partition_bytes == 40)
    expected = (np.arange(10) - 4.5) / np.std(np.arange(10))
    for name in ("at", "born", "noted"):
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
    for name in ("born", "noted"):
        values = np.asarray(dataset.entity_fields[name])
        assert values.dtype == np.float32
        np.testing.assert_allclose(values[places], expected, rtol=1e-6)
    again = RowEncoder(dataset).encode(read_table(root / "s.csv", RowEncoder(dataset).columns))
    np.testing.assert_allclose(np.asarray(again.context["at"]), expected, rtol=1e-6)


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


def test_values_between_separators_that_no_field_names_are_reported(
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
    actual = [bag_of(dataset.entity_fields["user"], users.index(u)) for u in "abc"]
    assert actual == [[1 + fnv(u) % 5] for u in "abc"]
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
    actual = np.asarray(read.context["n"])[np.argsort([int(users[u][1:]) for u in read.users])]
    bounds = dataset.manifest.numeric["n"].boundaries
    assert len(bounds) == 7
    assert dataset.manifest.tables["n"].rows == 9
    assert actual[::10].tolist() == [0] * 300
    for cell, row in zip(cells, actual.tolist(), strict=True):
        if cell:
            assert row == 1 + sum(np.float32(cell) >= np.float32(b) for b in bounds)
    shares = np.bincount(actual[actual > 0], minlength=9)[1:] / 2700
    assert np.abs(shares - 1 / 8).max() < 0.02  # exact but for bins of 1 in 128
    again = RowEncoder(dataset).encode(read_table(root / "s.csv", RowEncoder(dataset).columns))
    assert np.asarray(again.context["n"]).tolist() == actual.tolist()
    caplog.set_level("INFO", "deepfm_dist")
    few = small(root, "u,i,n\na,x,1\nb,x,1\nc,x,2\n", features)
    assert "one bucket" not in caplog.text
    assert sorted(np.asarray(few.rows("train").context["n"]).tolist()) == [1, 1, 2]
    small(root, "u,i,n\na,x,1700000000\nb,x,1700086400\n", features)
    assert "n: all of its values fall into one bucket, whose width" in caplog.text


def test_what_is_derived_from_a_cell_is_what_plain_python_derives() -> None:
    rng = np.random.default_rng(5)
    counts = [*"0123", "-1", "2.0", "2.01", "3e2", *map(str, rng.integers(-5, 10**9, 200))]
    feature = Feature(name="n", derive="log_squared", fill="0")
    _, actual = split_cells(pa.array([*counts, "", None]), feature)
    expected = [
        math.floor(math.log(x) ** 2) if x > 2 else int(x) for x in map(float, [*counts, 0, 0])
    ]
    assert actual.to_pylist() == [str(x) for x in expected]
    times = [datetime(2014, 1, 1) + timedelta(hours=int(h)) for h in rng.integers(0, 9000, 200)]
    derivations: dict[str, Callable[[datetime], int]] = {
        "hour": lambda t: t.hour,
        "weekday": lambda t: t.weekday(),
        "weekend": lambda t: t.weekday() >= 5,
    }
    for name, derivation in derivations.items():
        feature = Feature.model_validate({"name": "t", "derive": name, "time_format": "%y%m%d%H"})
        owners, actual = split_cells(
            pa.array(["", *(t.strftime("%y%m%d%H") for t in times)]), feature
        )
        assert owners.tolist() == list(range(1, 201))
        assert actual.to_pylist() == [str(int(derivation(t))) for t in times]


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
