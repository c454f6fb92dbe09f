"""Joins that join nothing, or little, say so; and so do fields that are empty for everybody."""

import logging
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.data.sources import read_table
from deepfm_dist.data.spelling import difference
from deepfm_dist.errors import ConfigError, DataError

BASE: dict[str, Any] = {
    "interactions": {"file": "s.csv", "user": "u", "item": "i"},
    "features": [
        {"name": "user", "entity": "user"},
        {"name": "item", "entity": "item"},
        {"name": "brand", "entity": "item", "file": "items.csv"},
        {"name": "price", "entity": "item", "file": "items.csv", "kind": "numeric"},
    ],
    "split": {"valid": 0, "test": 0},
}
ROWS = [(f"u{k % 5}", str(k % 20)) for k in range(60)]


def prepared(root: Path, keys: list[str], **changes: Any) -> PreparedDataset:
    """Rows of the items 0 to 19, and a file that describes others."""
    if not (root / "s.csv").exists():
        pd.DataFrame(ROWS, columns=["u", "i"]).to_csv(root / "s.csv", index=False)
    lines = [(key, f"b{k % 3}", k, f"The {k}") for k, key in enumerate(keys)]
    items = pd.DataFrame(lines, columns=["i", "brand", "price", "title"])
    items.to_csv(root / "items.csv", index=False)
    prepare(DataConfig.model_validate(BASE | changes), root, root / "d", seed=1)
    return PreparedDataset(root / "d")


@pytest.mark.parametrize(
    ("text", "known", "what"),
    [
        (" 1", "1", "the spaces around them"),
        ("1", "1 ", "the spaces around them"),
        ("20.0", "20", "decimals of zero"),
        ("20", "20.00", "decimals of zero"),
        ("0001", "1", "leading zeros"),
        ("-1", "-1.0", "decimals of zero"),
        ("PHONE", "phone", "upper and lower case"),
        (" 01.0", "1", "the way they are written"),
        ("0", "00", "leading zeros"),
        ("'i1'", "i1", "the quotes around them"),
        ("i1", '"i1"', "the quotes around them"),
        ("\ufeffi1", "i1", "characters that cannot be seen"),
        ("i1\u200b", "i1", "characters that cannot be seen"),
        ("i\uff11", "i1", "Unicode's form"),
        ("1,024", "1024", "separators between thousands"),
        ("1,02", "102", None),
        ("1.5", "15", None),
        ("10", "1", None),
        ("1.0.0", "1.0", None),
        ("", "0", None),
    ],
)
def test_differences_between_texts_are_described(text: str, known: str, what: str | None) -> None:
    found = difference(pa.array([text, "other"]), pa.array(["else", known]))
    if what is None:
        assert found is None
    else:
        assert found is not None
        assert (found.what, found.count, found.text, found.known) == (what, 1, text, known)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "{}.0",
            r"it has '0\.0' and the rows have '0', and 20 differ .* decimals of zero; write",
        ),
        ("{} ", r"it has '0 ' and the rows have '0', and 20 differ only in the spaces"),
        ("{:04d}", r"it has '0000' and the rows have '0', and 20 differ only in leading zer"),
        ("item-{}", r"it has 'item-0' and the rows have '0'; set key to the column of the item id"),
    ],
)
@pytest.mark.parametrize("of_titles", [False, True])
def test_a_side_file_without_a_matching_key_is_refused(
    tmp_path: Path, written: str, message: str, of_titles: bool
) -> None:
    keys = [written.format(k) for k in range(20)]
    changes: dict[str, Any] = {}
    if of_titles:
        changes = {"features": BASE["features"][:2], "titles": {"file": "items.csv"}}
    message = (
        r"items\.csv: the column 'i' has none of the 20 items of the training rows: " + message
    )
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, keys, **changes)


def test_a_side_file_with_few_matching_keys_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    every = [str(k) for k in range(20)]
    prepared(tmp_path, [*every, "99"])
    assert "has" not in caplog.text
    prepared(tmp_path, every[:12])  # 60 %
    assert not caplog.records
    prepared(tmp_path, every[:5])
    message = "items.csv: the column 'i' has 5 of the 20 items (25.0%), and "
    assert [r.getMessage().startswith(message) for r in caplog.records] == [
        True
    ]  # once for two fields
    caplog.clear()
    prepared(tmp_path, [*every[:15], *(f"{k}.0" for k in range(15, 20))])
    (message,) = [r.getMessage() for r in caplog.records]
    assert re.fullmatch(
        r"items\.csv: the column 'i' has 15 of the 20 items \(75\.0%\); 5 differ only in "
        r"decimals of zero: '(1[5-9])' and '\1\.0'",
        message,
    )


def test_a_grown_dataset_may_describe_old_items_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared(tmp_path, [str(k) for k in range(20)])
    (tmp_path / "d").rename(tmp_path / "old")
    pd.DataFrame([("u1", "new")], columns=["u", "i"]).to_csv(tmp_path / "s.csv", index=False)
    prepared(tmp_path, ["3"], vocabulary_from=str(tmp_path / "old"))
    with pytest.raises(DataError, match="it has 'x' and the rows have 'new'"):
        prepared(tmp_path, ["x"], vocabulary_from=str(tmp_path / "old"))


def test_a_field_that_is_empty_for_nearly_everybody_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    n = 100
    rows = pd.DataFrame(
        {
            "u": [f"u{k % 10}" for k in range(n)],
            "i": [f"i{k}" for k in range(n)],
            "h": ["x"] + ["-"] * (n - 1),
            "n": [1.0] * 6 + [None] * (n - 6),
            "c": ["", "k"] * (n // 2),
            "m": ["k"] * 4 + ["NONE"] * (n - 4),
        }
    )
    rows.to_csv(tmp_path / "s.csv", index=False)
    fields = [
        {"name": "h", "missing": ["-"]},
        {"name": "n", "kind": "numeric"},
        {"name": "c"},
        {"name": "m", "entity": "item", "column": "m", "missing": ["NONE"]},
    ]
    caplog.set_level(logging.INFO, "deepfm_dist")
    prepared(tmp_path, ["0"], features=[*BASE["features"][:2], *fields])
    said = {r.getMessage(): r.levelname for r in caplog.records if "no value" in r.getMessage()}
    assert said == {
        "h: 99 of 100 training rows have no value; is the column 'h' the right one, and does "
        "h.missing fit?": "WARNING",
        "n: 94 of 100 training rows have no value": "INFO",
        "c: 50 of 100 training rows have no value": "INFO",
        "m: 96 of 100 items have no value; is the column 'm' the right one, and does m.missing "
        "fit?": "WARNING",
    }


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ([("u0.0", "3.0")], "0 of 1 rows .*"),
        (
            [("u1", "3.0"), ("u2", "4.0")],
            "v.csv: 0 of 2 rows have an item .*decimals of zero.*the same way",
        ),
        ([("U1", "3"), ("U2", "4")], "v.csv: 0 of 2 rows have a user .* upper and lower case: 'U"),
        (
            [("w1", "x1"), ("w2", "x2")],
            "v.csv: 0 of 2 rows have a user .*are these rows of",
        ),
    ],
)
def test_held_out_files_that_match_nothing_are_refused(
    tmp_path: Path, held_out: list[tuple[str, str]], message: str
) -> None:
    pd.DataFrame(held_out, columns=["u", "i"]).to_csv(tmp_path / "v.csv", index=False)
    split = {"valid_file": "v.csv", "test": 0}
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, [str(k) for k in range(20)], split=split)


def test_held_out_files_that_match_little_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New users alone may be meant: their items are known."""
    held_out = [("w1", "3"), ("w2", "4"), ("w3", "5")]
    pd.DataFrame(held_out, columns=["u", "i"]).to_csv(tmp_path / "v.csv", index=False)
    split = {"valid_file": "v.csv", "test": 0}
    prepared(tmp_path, [str(k) for k in range(20)], split=split)
    (message,) = [r.getMessage() for r in caplog.records if "v.csv" in r.getMessage()]
    assert message.startswith("v.csv: 0 of 3 rows have a user of the training rows: 'w")


def test_values_never_seen_in_training_are_counted_field_by_field(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "u": [f"u{k % 5}" for k in range(40)],
            "i": [str(k % 8) for k in range(40)],
            "device": ["phone", "desktop"] * 20,
            "size": ["20", "30"] * 20,
            "n": range(40),
        }
    )
    rows.to_csv(tmp_path / "s.csv", index=False)
    fields = [{"name": "device"}, {"name": "size"}, {"name": "n", "kind": "numeric"}]
    dataset = prepared(tmp_path, ["0"], features=[*BASE["features"][:2], *fields])
    encoder = RowEncoder(dataset)
    table = {
        "user": ["u1", "u2", "nobody"],
        "item": ["1", "2", "3"],
        "field device": ["phone", "PHONE", "DESKTOP"],
        "field size": ["20.0", None, "30"],
        "field n": [1.0, 2.0, None],
    }
    assert {c.key for c in encoder.columns} == set(table)
    for piece in (slice(0, 2), slice(2, 3)):
        encoder.encode(pa.table({name: values[piece] for name, values in table.items()}))
    user, device, size = encoder.unseen()
    assert user == (
        "user: 1 of 3 values were never seen in training and are scored as unknown (such as "
        "'nobody')"
    )
    assert device.startswith("device: 2 of 3 values were never seen in training")
    assert "of 2 different ones, 2 differ only in upper and lower case: 'DESKTOP' and" in device
    assert "size: 1 of 2 values" in size
    assert "1 differ only in decimals of zero: '20.0' and '20'" in size
    context = {"device": "phone", "size": "20", "n": 1.0}
    encoder.fixed_context(context)
    for wrong, message in (
        ({"device": "PHONE"}, "device='PHONE': never seen in training; did you mean 'phone'"),
        ({"size": "20.0"}, "size='20.0': never seen in training; did you mean '20'"),
        ({"device": "desktp"}, "never seen in training; did you mean 'desktop'"),
        ({"size": "x"}, r"never seen in training; it has [23]0, [23]0$"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoder.fixed_context(context | wrong)


def test_words_for_a_missing_value_among_ids_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*ROWS, ("NULL", "1"), ("NULL", "2"), ("nan", "3"), ("u1", "None"), ("Nancy", "nana")]
    pd.DataFrame(rows, columns=["u", "i"]).to_csv(tmp_path / "s.csv", index=False)
    features = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    with caplog.at_level(logging.WARNING):
        prepared(tmp_path, ["1"], features=features)
    users, items = (line for line in caplog.messages if "write for a missing value" in line)
    assert users.startswith("u: 3 training rows with 'NULL' or 'nan' as the id")
    assert items.startswith("i: 1 training row with 'None' as the id")
    assert 'set missing: ["NULL", "nan"] for user and data.on_bad_row=skip' in users
    features[0]["missing"], features[1]["missing"] = ["NULL", "nan"], ["None"]  # type: ignore[assignment]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        dataset = prepared(tmp_path, ["1"], features=features, on_bad_row="skip")
    assert not [line for line in caplog.messages if "write for a missing value" in line]
    assert dataset.manifest.splits["train"].rows == len({*ROWS, ("Nancy", "nana")})


@pytest.mark.parametrize(
    ("ids", "warning"),
    [
        ([" a", " b", " c", "d"], "i: 3 of 4 ids begin or end with a space, such as ' a'"),
        ([" a", "b", "c"], None),
        (["a\0", "b"], r"i: 1 of 2 ids have characters .*, such as 'a\\x00'; write the file"),
        (["a\ufffd", "\ufeffb"], r"i: 2 of 2 ids have characters .*'a\\ufffd'"),
        (["['a', 'b']", '["c"]', "d"], r"i: 2 of 3 ids look like several in one cell, such as"),
        (["a|b", "b|c", "c"], r"i: 2 of 3 ids look like several in one cell, such as 'a\|b'"),
        (["a|b", "c", "d"], None),
        (["1.23E+12", "4E+15", "7"], r"i: 2 of 3 ids are rounded numbers, such as '1\.23E\+12'"),
        (["a\tb", "\u0646\u200c\u0645", "\U0001f469\u200d\U0001f680"], None),  # joiners are letters
    ],
)
def test_ids_that_look_damaged_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ids: list[str], warning: str | None
) -> None:
    pd.DataFrame([(f"u{k}", i) for k, i in enumerate(ids)], columns=["u", "i"]).to_csv(
        tmp_path / "s.csv", index=False
    )
    data = BASE | {"features": BASE["features"][:2]}
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", seed=1)
    warnings = [m for m in caplog.messages if "ids" in m]
    assert len(warnings) == (warning is not None)
    if warning is not None:
        assert re.search(warning.replace("i:", "item:", 1), warnings[0])


@pytest.mark.parametrize(
    ("field", "cells", "warning"),
    [
        ({"missing": ["-1"]}, ["-1.0", "-1", "2"], "x: '-1.0' is a value, and .* decimals of zero"),
        ({"missing": ["NULL"]}, ["null", "NULL", "a"], "x: 'null' is a value, and .* case from"),
        ({"missing": ["NULL"]}, ["NULL", "nullable", "a"], None),
        ({}, ["True", "true", "x"], "x: 1 of 3 values differ .* upper and lower case, such as 'T"),
    ],
)
def test_values_that_nearly_mean_the_same_are_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    field: dict[str, Any],
    cells: list[str],
    warning: str | None,
) -> None:
    rows = [(f"u{k}", f"{'iI'[k % 2]}", cells[k % 3]) for k in range(9)]
    pd.DataFrame(rows, columns=["u", "i", "x"]).to_csv(tmp_path / "s.csv", index=False)
    data = BASE | {"features": [*BASE["features"][:2], {"name": "x"} | field]}
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", seed=1)
    assert [bool(re.search(warning or "", m)) for m in caplog.messages] == [True] * bool(warning)


def test_fields_that_new_rows_leave_empty_are_warned_of(tmp_path: Path) -> None:
    rows = [(f"u{k % 5}", f"i{k % 4}", "ab"[k % 2], k, "" if k % 4 else "x") for k in range(40)]
    frame = pd.DataFrame(rows, columns=["u", "i", "c", "n", "rare"])
    frame.to_csv(tmp_path / "s.csv", index=False)
    fields = [{"name": "c"}, {"name": "n", "kind": "numeric"}, {"name": "rare"}]
    data = BASE | {"features": [*BASE["features"][:2], *fields]}
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", seed=1)
    for change, expected in (
        ({}, []),
        ({"c": "", "rare": ""}, ["c: 40 of 40 rows have no value, which only 0.0%"]),
        ({"n": None}, ["n: 40 of 40 rows have no value"]),
    ):
        encoder = RowEncoder(PreparedDataset(tmp_path / "d"))
        frame.assign(**change).to_csv(tmp_path / "new.csv", index=False)
        encoder.encode(read_table(tmp_path / "new.csv", encoder.columns))
        assert [
            text[: len(want)] for text, want in zip(encoder.unseen(), expected, strict=True)
        ] == (expected)


@pytest.mark.parametrize(("least", "n_warnings"), [(60, 0), (61, 1)])
@pytest.mark.parametrize("field", [{"name": "x"}, {"name": "user", "entity": "user"}])
def test_a_field_without_a_frequent_value_is_warned_of(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    field: dict[str, Any],
    least: int,
    n_warnings: int,
) -> None:
    rows = [(f"u{k % 2}", f"i{k}", f"x{k % 2}") for k in range(120)]
    pd.DataFrame(rows, columns=["u", "i", "x"]).to_csv(tmp_path / "s.csv", index=False)
    item = {"name": "item", "entity": "item"}
    data = BASE | {"features": [item, field | {"min_count": least}]}
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", seed=1)
    warning = f"{field['name']}: no value has min_count={least} training rows, the most frequent"
    assert sum(warning in message for message in caplog.messages) == n_warnings


@pytest.mark.parametrize(
    ("odd", "plain", "what"),
    [
        ("1,000", "1000", "separators between thousands"),
        ("\uff11\uff12", "12", "Unicode's form"),
        ("a\u00a0b", "a b", "Unicode's form"),
        ("12\u200b", "12", "characters that cannot be seen"),
        ("'12'", "12", "the quotes around them"),
        ("012", "12", "leading zeros"),
        ("12.0", "12", "decimals of zero"),
        ("AB", "ab", None),  # ids such as YouTube's differ only in case
    ],
)
def test_ids_written_in_two_ways_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str, plain: str, what: str | None
) -> None:
    rows = [(f"u{k}", odd if k % 2 else plain) for k in range(8)]
    pd.DataFrame(rows, columns=["u", "i"]).to_csv(tmp_path / "s.csv", index=False)
    data = BASE | {"features": BASE["features"][:2]}
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "d", seed=1)
    warnings = [m for m in caplog.messages if "differ from another one only in" in m]
    assert len(warnings) == (what is not None)
    assert what is None or f"only in {what}, such as {odd!r} and {plain!r}" in warnings[0]
