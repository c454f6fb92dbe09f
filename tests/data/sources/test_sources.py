import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import subprocess
import traceback
import zipfile
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist.data import sources
from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources import Column, delimited, in_tables, read_table
from deepfm_dist.errors import DataError

EXAMPLES = int(os.environ.get("DEEPFM_FUZZ_EXAMPLES", 100))
"""Files that each fuzzer makes up; 100,000 take minutes."""
COLUMNS = [Column("user"), Column("score", "number"), Column("at", "time")]
EXPECTED = {"user": ["007", "b"], "score": [1.5, -2.0], "at": [10, 86400]}


def values(table: pa.Table) -> dict[str, list[Any]]:
    """The columns of a table, times as exact numbers."""

    def value(cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        return cell["whole"] + Decimal(cell["billionths"]) / 10**9

    return {name: [value(c) for c in cells] for name, cells in table.to_pydict().items()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "at,user,score\n10,007,1.5\n1970-01-02 00:00:00,b,-2\n"),
        ("a.tsv", "user\tscore\tat\n007\t1.5\t10\n\nb\t-2\t86400.0\n"),
        ("a.dat", "user::score::at\n007::1.5::10\nb::-2::86400\n"),
    ],
)
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_text_files_are_read(tmp_path: Path, name: str, text: str, packing: str) -> None:
    path = tmp_path / (name + packing)
    with pa.output_stream(path) as file:  # packs as the suffix says
        file.write(text.encode())
    assert (path.read_bytes() == text.encode()) == (packing == "")
    assert values(read_table(path, COLUMNS)) == EXPECTED


def test_parquet_and_headerless_latin_1_files_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user": [7, 8], "score": [1, 2]}), tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", COLUMNS[:2])
    assert table.to_pydict() == {"user": ["7", "8"], "score": [1.0, 2.0]}
    (tmp_path / "m.dat").write_bytes("1::Amélie, or: so (2001)::Comedy\n".encode("latin-1"))
    layout = FileFormat(columns=("item", "title", "genres"))
    assert read_table(tmp_path / "m.dat", [Column("title")], layout)["title"].to_pylist() == [
        "Amélie, or: so (2001)"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("user,score,at\n", "no rows"),
        ("users,score,at\na,1,2\n", r"no column 'user'; did you mean 'users'\?"),
        ("user,score,at\na,1,2\n\n\nb,x,3\n", "line 5: score 'x' is not a number"),
        ("user,score,at\na,1,2\nb,nan,3\n", "line 3: score 'nan' is not a number"),
        ("user,score,at\na,1,2\n,1,3\n", "line 3: user '' is empty"),
        ("user,score,at\na,1,soon\n", "line 2: at 'soon' is not a time"),
        ("user,score,at\na,1,2\nb,1\n", "line 3: 2 cells instead of 3: 'b,1'"),
        ("user,score,at\na,1,2\n\nb,1,2,9\n", "line 4: 4 cells instead of 3"),
        ("user,score,at\r\n\r\na,inf,2\r\n", "line 3: score 'inf' is not a number"),
        ("user,score,at\na,1e300,2\n", "line 2: score '1e300' is too large a number"),
        ("user,score,at\na,,2\n", "line 2: score '' is empty"),
        ('user,score,at\n"",1,2\n', "line 2: user '' is empty"),
        ("user,score,at\na,1e400,2\n", "line 2: score '1e400' is too large a number"),
        ("user,score,at\na,1,18446744073709551616\n", "line 2: at '18446744073709551616' is not a"),
        ("user,score,at\na,1,1e30\n", "line 2: at '1e30' is not a time"),
        ("user,score,at\na,1,2020-02-30\n", "line 2: at '2020-02-30' is not a time"),
    ],
)
def test_a_bad_file_is_named_with_line_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, COLUMNS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv", COLUMNS)


def test_a_refusal_keeps_no_reader_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's reading thread, which holds what a decoder raised, must not free the reader."""
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 64)  # the reader opens; a later block is bad
    path = tmp_path / "a.csv"
    path.write_bytes(("user,score,at\n" + "a,1,2\n" * 3000).encode("utf-16")[:-1])
    with pytest.raises(DataError, match="is not UTF-16 text") as caught:
        read_table(path, COLUMNS, FileFormat(encoding="utf-16"))
    decoder = caught.value.__context__
    assert isinstance(decoder, UnicodeDecodeError)
    frames = [frame for frame, _ in traceback.walk_tb(decoder.__traceback__)]
    assert frames
    held = [value for frame in frames for value in frame.f_locals.values()]
    assert not [value for value in held if isinstance(value, pa.RecordBatchReader)]


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,score,at\na,1,2\nb,x,3\nc,1\n,1,1\nd,2,4\n")
    dropped: Counter[str] = Counter()
    table = read_table(path, COLUMNS, on_bad_row="skip", dropped=dropped)
    assert table["user"].to_pylist() == ["a", "d"]
    assert dropped == {
        "a.csv: rows with an unreadable cell": 2,
        "a.csv: rows with a wrong number of cells": 1,
    }


def test_lines_are_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 200)
    rows = [f"u{i},{i},{i}" for i in range(100)]
    rows[77] = "u77,oops,77"
    (tmp_path / "a.csv").write_text("\n".join(["user,score,at", *rows]))
    with pytest.raises(DataError, match="line 79: score 'oops'"):
        read_table(tmp_path / "a.csv", COLUMNS)
    (tmp_path / "a.csv").write_text("\n\n".join(["user,score,at", *rows]))
    with pytest.raises(DataError, match="line 157: score 'oops'"):
        read_table(tmp_path / "a.csv", COLUMNS)
    rows[77] = "u77,77,77,77"
    (tmp_path / "a.csv").write_text("\n\n".join(["user,score,at", *rows]))
    with pytest.raises(DataError, match="line 157: 4 cells"):
        read_table(tmp_path / "a.csv", COLUMNS)


def test_lines_end_where_files_end_them(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"  # \x85 ends a line for Python's splitlines, not in the file
    path.write_bytes(b"user::score\n\n\x85::1\n\nb::two\n")
    with pytest.raises(DataError, match="line 5: score 'two'"):
        read_table(path, COLUMNS[:2])
    path.write_bytes(b"user::score\n\x85::1\n\n\x85::1::2\n")
    with pytest.raises(DataError, match="line 4: 3 cells instead of 2: "):
        read_table(path, COLUMNS[:2])


def test_unused_columns_may_hold_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 64)
    rows = ["1,98101"] * 40 + ["2,V6B 1A1"]  # numbers in the first block, text in the last
    (tmp_path / "a.csv").write_text("\n".join(["user,zip", *rows]))
    assert read_table(tmp_path / "a.csv", COLUMNS[:1])["user"].to_pylist() == ["1"] * 40 + ["2"]


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ('user,score\n"a, ""b""",1\n', ['a, "b"']),
        ("user,score\n 1 ,1\n", [" 1 "]),  # an id is taken as it stands
        ("user,score\nNA,1\nnull,2\n", ["NA", "null"]),
        ("\ufeffuser,score\nb,1\n", ["b"]),
    ],
)
def test_text_is_taken_verbatim(tmp_path: Path, text: str, cells: list[str]) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert read_table(tmp_path / "a.csv", COLUMNS[:1])["user"].to_pylist() == cells


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [
        ("86400", 86400),
        ("86400.9", "86400.9"),
        ("1e3", 1000),
        ("1970-01-02", 86400),
        ("1970-01-02T00:00:01", 86401),
        ("1970-01-02T00:00:01Z", 86401),
        ("1970-01-02 09:00:01.5+09:00", "86401.5"),
        ("1970-01-02 00:00:01.5", "86401.5"),
        ("1970-01-02 00:00:01 UTC", 86401),
        ("-0.5", "-0.5"),
        ("1969-12-31 23:59:59.5", "-0.5"),
        ("1593898000.123456789", "1593898000.123456789"),
        ("9999-12-31", 253402214400),
        ("0001-01-01 00:00:00", -62135596800),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_times_are_numbers_or_iso_timestamps(tmp_path: Path, cell: str, seconds: int | str) -> None:
    (tmp_path / "a.csv").write_text(f"at\n{cell}\n")
    read = values(read_table(tmp_path / "a.csv", [Column("at", "time")]))
    assert read["at"] == [Decimal(seconds)]


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (pa.array([1.5, None]), "number", [1.5, None]),
        (pa.array([True, False]), "number", [1.0, 0.0]),
        (pa.array(["1", "x"]).dictionary_encode(), "text", ["1", "x"]),
        (pa.array([90061.7]), "time", [Decimal("90061.7")]),
        (pa.array([1], pa.int32()).cast(pa.date32()), "time", [86400]),
        (pa.array([1500], pa.timestamp("ms", "Asia/Seoul")), "time", [1.5]),
        (pa.array([2.0, float("nan")]), "number", "row 2: c nan is not a number"),
        (pa.array([2.0, float("nan")]), "time", "row 2: c nan is not a time"),
        (pa.array(["1", "x"]).dictionary_encode(), "number", "row 2: c 'x' is not a number"),
        (pa.array([[1]]), "text", "column 'c' holds lists where one value is"),
        (pa.array([5, 2**63], pa.uint64()), "time", f"row 2: c {2**63} is not a time"),
        (pa.array([1.5, 1e19]), "time", r"row 2: c 1e\+19 is not a time"),
        (pa.array([-0.5, 0.9, 7e9]), "time", [-0.5, Decimal("0.9"), 7_000_000_000]),
        (pa.array([-500, 1500], pa.timestamp("ms")), "time", [-0.5, 1.5]),
        (pa.array(["a", None]).cast(pa.string_view()), "text", ["a", None]),
        (pa.array(["10"]).cast(pa.string_view()), "time", [10]),
        (pa.array([b"a", b"\xe9"]), "text", r"row 2: c b'\\xe9' is not text"),
        (pa.array([Decimal("1.00"), Decimal("2.50"), None]), "text", ["1", "2.5", None]),
    ],
)
def test_parquet_columns_are_converted_or_refused(
    tmp_path: Path, array: pa.Array, kind: sources.ColumnType, expected: list[object] | str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"c": array}), path)
    columns = [Column("c", kind, required=False)]
    if isinstance(expected, list):
        assert values(read_table(path, columns))["c"] == expected
    else:
        with pytest.raises(DataError, match=expected):
            read_table(path, columns)


@pytest.mark.parametrize("number", ["1_000", "\u0661\u0662"])
def test_numbers_are_not_what_python_calls_one(tmp_path: Path, number: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"c\n1\n{number}\n", encoding="utf-8")
    for kind in ("number", "time"):
        with pytest.raises(DataError, match=f"line 3: c '{number}' is not a {kind}"):
            read_table(path, [Column("c", kind)])


def test_words_for_missing_are_numbers_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = {"f": [1.5, float("nan"), -1.0], "i": [3, 4, -1], "t": ["2", "NA", "-1"]}
    pq.write_table(pa.table(cells), path)
    columns = [Column(n, "number", False, ("nan", "-1", "NA")) for n in cells]
    expected = {"f": [1.5, None, None], "i": [3, 4, None], "t": [2, None, None]}
    assert read_table(path, columns).to_pydict() == expected


STRAY = {
    "unclosed": ('1,x\n2,"y\n' + "3,z\n" * 3000, 3, "a quote that is not closed"),
    "unclosed, empty": ('1,x\n2,"', 3, "a quote that is not closed"),
    "two strays": ('1,"Open\n' + "3,z\n" * 3000 + '4,"Open\n', 2, "follows the closing quote"),
    "a nickname": ('1,x\r\n\r\n2,"Weird Al" Yankovic\r\n', 4, "follows the closing quote"),
    "another column": ('1,x\r2,y\r"3"3,z\r', 4, "follows the closing quote"),
    "after lines in quotes": ('1,"a\n""b""\n"\n2,"y\n', 5, "a quote that is not closed"),
}


@pytest.mark.parametrize("case", STRAY)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_stray_quotes_swallow_no_rows(
    tmp_path: Path,
    case: str,
    encoding: str,
    on_bad_row: Literal["error", "skip"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text, line, problem = STRAY[case]
    path = tmp_path / "a.csv"
    path.write_bytes(("id,title\n" + text).encode(encoding))
    for block_bytes in (64, delimited.BLOCK_BYTES):
        monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        with pytest.raises(DataError, match=f"line {line}: .*{problem}.*a.csv: {{quoted: false}}"):
            read_table(
                path, [Column("id")], FileFormat(encoding=encoding), on_bad_row, None, "a.csv"
            )
    if "lines" not in case:
        plain = FileFormat(encoding=encoding, quoted=False)
        read = read_table(path, [Column("id"), Column("title")], plain)
        rows = [row for row in re.split("\r\n|\n|\r", text) if row]
        assert [",".join(row.values()) for row in read.to_pylist()] == rows


def test_a_cell_of_very_many_lines_triggers_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,title\n0,"two\nlines"\n1,"Open\n' + "3,z\n" * 3000 + '4,6"\n5,w\n')
    assert read_table(path, [Column("id")])["id"].to_pylist() == ["0", "1", "5"]
    assert "a.csv, line 4: a quoted cell spans 3002 lines" in caplog.text


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.dat"])
@pytest.mark.parametrize("encoding", [None, "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "gbk"])
def test_every_format_is_read_in_every_encoding(
    tmp_path: Path, name: str, encoding: str | None
) -> None:
    delimiter = {"a.csv": ",", "a.tsv": "\t", "a.dat": "::"}[name]
    text = "user,score,at\nzoë\u4e2d,1.5,10\nb,-2,86400".replace(",", delimiter)
    text = text.replace("ë", "") if encoding == "gbk" else text
    begin = "\ufeff" if encoding in (None, "utf-16-le") else ""
    (tmp_path / name).write_bytes((begin + text).encode(encoding or "utf-8"))
    read = read_table(tmp_path / name, COLUMNS, FileFormat(encoding=encoding))
    first = text.split("\n")[1].split(delimiter)[0]
    assert values(read) == {"user": [first, "b"], "score": [1.5, -2.0], "at": [10, 86400]}


@pytest.mark.parametrize("encoding", ["utf-16", "gbk", "utf-8"])
def test_undecodable_rows_are_skipped_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    parts = ["user,score\n\u4e2d,1\n", "x\u4e2d,2\n", "b,3\n"]
    raw = [part.encode(encoding) for part in parts]
    bad = b"\x00\xdc" if encoding == "utf-16" else b"\xff\xff"
    mark = len("x".encode(encoding))
    raw[1] = raw[1][:mark] + bad + raw[1][mark:]
    raw = [part.removeprefix(codecs.BOM_UTF16_LE) if i else part for i, part in enumerate(raw)]
    path.write_bytes(b"".join(raw))
    dropped: Counter[str] = Counter()
    layout = FileFormat(encoding=encoding)
    read = read_table(path, COLUMNS[:2], layout, "skip", dropped).to_pydict()
    assert read == {"user": ["\u4e2d", "b"], "score": [1.0, 3.0]}
    assert dropped == {"a.csv: rows with an unreadable cell": 1}
    with pytest.raises(DataError, match=r"is not .* text"):
        read_table(path, COLUMNS[:2], layout)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".parquet"])
def test_packed_files_without_their_suffix_are_known(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pq.write_table(pa.table({"user": ["a"]}), tmp_path / "a.csv")
    else:
        with pa.output_stream(tmp_path / f"packed{suffix}") as file:
            file.write(b"user\na\n")
        (tmp_path / f"packed{suffix}").rename(tmp_path / "a.csv")
    with pytest.raises(DataError, match=f"like a {suffix} file; call it a.csv{suffix}"):
        read_table(tmp_path / "a.csv", COLUMNS[:1])


def test_a_separator_that_arrow_is_given_may_stand_in_a_cell(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("user::score\na::1\nx\x1fx::2\n")
    with pytest.raises(DataError, match="line 3: 3 cells instead of 2"):
        read_table(tmp_path / "a.dat", COLUMNS[:2])


@pytest.mark.parametrize("name", ["rot13", "base64", "undefined", "nosuch"])
def test_binary_encodings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown text encoding '{name}'"):
        FileFormat(encoding=name)


_WITH_GAPS = pa.array([3, float("nan"), float("inf"), 4], pa.float64())


@pytest.mark.parametrize(
    "array",
    [_WITH_GAPS, _WITH_GAPS.cast(pa.float32()), _WITH_GAPS.dictionary_encode()],
    ids=["float64", "float32", "dictionary"],
)
def test_missing_numbers_are_not_text(tmp_path: Path, array: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"c": array}), path)
    optional, required = [Column("c", required=False)], [Column("c")]
    assert read_table(path, optional)["c"].to_pylist() == ["3", None, None, "4"]
    dropped: Counter[str] = Counter()
    kept = read_table(path, required, on_bad_row="skip", dropped=dropped)
    assert kept["c"].to_pylist() == ["3", "4"]
    assert dropped == {"a.parquet: rows with an unreadable cell": 2}
    with pytest.raises(DataError, match="row 2: c '' is empty"):
        read_table(path, required)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()], ids=str)
def test_integral_floats_are_the_same_ids_as_integers(tmp_path: Path, kind: pa.DataType) -> None:
    largest = {pa.float16(): 2**15, pa.float32(): 2**40, pa.float64(): 2**62}[kind]
    numbers = [0, 7, -3, largest, largest - largest // 512]
    cells = pa.array(np.array([*numbers, 0.5], kind.to_pandas_dtype()))
    pq.write_table(pa.table({"c": cells}), tmp_path / "a.parquet")
    found = read_table(tmp_path / "a.parquet", [Column("c")])["c"].to_pylist()
    assert found == [*map(str, numbers), "0.5"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    text = "user\n" + "".join(f"{i * 7919}\n" for i in range(50_000))
    for name in ("a.csv.gz", "a.parquet"):
        path = tmp_path / name
        if name == "a.parquet":
            pq.write_table(pa.table({"user": [str(i) for i in range(9999)]}), path)
        else:
            with pa.output_stream(path) as file:
                file.write(text.encode())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=f"{name}: .*not.* readable"):
            read_table(path, COLUMNS[:1])
    path.write_bytes(whole[:40] + b"\1" * (len(whole) // 2) + whole[40 + len(whole) // 2 :])
    with pytest.raises(DataError, match="a damaged parquet file"):
        read_table(path, COLUMNS[:1])
    (tmp_path / "a.csv").write_bytes(b"user\n\xff\n")
    with pytest.raises(DataError, match=r"not readable: .*UTF"):
        read_table(tmp_path / "a.csv", COLUMNS[:1])


def test_an_empty_cell_that_need_not_be_there_is_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,n,c\nx,1,y\n,,\n"","",""\n')
    optional = [Column("c", required=False), Column("n", "number", required=False)]
    assert read_table(tmp_path / "a.csv", optional).to_pydict() == {
        "c": ["y", None, None],
        "n": [1.0, None, None],
    }


def test_lines_of_a_file_without_header_are_counted_from_its_first(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("\nx\t1\n\ny\ttwo\n")
    with pytest.raises(DataError, match="line 4: score 'two'"):
        read_table(tmp_path / "a.tsv", COLUMNS[:2], FileFormat(columns=("user", "score")))


def test_words_for_missing_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n\n1\n NA \n\nN/A\n")
    column = Column("n", "number", required=False, missing=("NA", "N/A"))
    assert read_table(tmp_path / "a.csv", [column])["n"].to_pylist() == [1.0, None, None]
    with pytest.raises(DataError, match="line 5: n 'N/A' is not a number"):
        read_table(tmp_path / "a.csv", [Column("n", "number", required=False, missing=("NA",))])


def test_delimiters_may_have_any_length_and_alphabet(tmp_path: Path) -> None:
    for delimiter in ("|", "||", "§"):
        layout = FileFormat(delimiter=delimiter, encoding="latin-1")
        text = f"user{delimiter}score\né{delimiter}1\n"
        (tmp_path / "a.txt").write_bytes(text.encode("latin-1"))
        assert read_table(tmp_path / "a.txt", COLUMNS[:2], layout).to_pydict() == {
            "user": ["é"],
            "score": [1.0],
        }


def test_line_breaks_within_quotes_do_not_shift_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_text('user,score\n"a\nb",1\n,2\n')
    with pytest.raises(DataError, match="line 4: user '' is empty"):
        read_table(path, COLUMNS[:2])
    path.write_text('user,score\n"a\n\nb",1\nc,2,3\n')
    with pytest.raises(DataError, match="line 5: 3 cells instead of 2: 'c,2,3'"):
        read_table(path, COLUMNS[:2])
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 64)
    path.write_text("user,score\n" + '"a\nb",1\n' * 99)
    assert read_table(path, COLUMNS[:2])["user"].to_pylist() == ["a\nb"] * 99


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("user,score\na,1\n".encode("utf-16"), r"line 1: not readable: it starts like UTF-16"),
        (b"user,score\na,1\n\xe9,2\n", r"line 3: not readable: b'\\xe9,2\\n' is not UTF-8 text"),
        (b"us\xe9r,user\na,1\n", r"line 1: not readable: b'us\\xe9r,user\\n' is not UTF-8 text"),
        (b"user,user,score\na,b,1\n", "two columns are called 'user'"),
        (b'"a\nuser",score\na,1\n', r"no column 'user'; .*it has: 'a\\nuser', score$"),
        (b"user,score\na,1\n\xaf,2,3\n", "line 3: 3 cells instead of 2"),
        (b"\xef\xbb\xbfuser,score\r\na,x\r\n", "line 2: score 'x' is not a number"),
    ],
)
def test_undecodable_text_is_reported_by_line(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "a.csv", COLUMNS[:2])


def test_undecodable_rows_are_skipped_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Arrow's callback for ragged rows cannot raise: it printed."""
    path = tmp_path / "a.csv"
    path.write_bytes("user,score,z\né,1,\n".encode() + b"\xaf,2,3,4\n\xe9,5,\nb,6,\xe9\nc,7,\n")
    dropped: Counter[str] = Counter()
    table = read_table(path, COLUMNS[:2], on_bad_row="skip", dropped=dropped)
    assert table["user"].to_pylist() == ["é", "b", "c"]  # nobody reads b's z
    assert dropped == {
        "a.csv: rows with a wrong number of cells": 1,
        "a.csv: rows with an unreadable cell": 1,
    }
    path.write_bytes(b"a\n" + "user,score\na,1\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.csv.*not readable"):
        read_table(path, COLUMNS[:2], FileFormat(encoding="utf-16"))
    assert capfd.readouterr().err == ""


def test_damaged_text_files_are_reported(tmp_path: Path) -> None:
    """Looking for the line that is no text must not fail on the damage."""
    path = tmp_path / "a.csv.gz"
    text = "user,score\n" + "".join(f"{i * 7919},1\n" for i in range(9999))
    whole = gzip.compress(text.encode("utf-16-le"))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.csv\.gz.*: not readable"):
        read_table(path, COLUMNS[:2], FileFormat(encoding="utf-16"))


class NoPassword(Exception):
    """What a remote file system raises is no OSError."""


def test_any_file_system_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/x/a.csv", b"user,score\na,1\n")

    def fails(*args: object, **kwargs: object) -> None:
        raise NoPassword("no password\nfor x")

    for name in ("info", "_open"):
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), name, fails)
            with pytest.raises(DataError, match=r"memory://.*a\.csv: cannot be read: no password"):
                read_table(sources.find_files("memory://x", "a.csv")[0].path, COLUMNS[:2])


def test_all_members_of_gz_files_are_read(tmp_path: Path) -> None:
    whole = gzip.compress(b"user,score\na,1\n") + gzip.compress(b"b,2\n")
    (tmp_path / "a.csv.gz").write_bytes(whole)
    assert read_table(tmp_path / "a.csv.gz", COLUMNS[:2])["user"].to_pylist() == ["a", "b"]


def test_ids_may_be_larger_than_int64(tmp_path: Path) -> None:
    ids = [2**64 - 1, 2**63]
    pq.write_table(pa.table({"user": pa.array(ids, pa.uint64())}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("user\n" + "".join(f"{i}\n" for i in ids))
    for name in ("a.parquet", "a.csv"):
        assert read_table(tmp_path / name, COLUMNS[:1])["user"].to_pylist() == [*map(str, ids)]


def test_libsvm_gives_indices_to_texts_and_values_to_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.libsvm"
    path.write_text("1 7:1 3:0.5 \n0 8:1 3:2\r\n")
    columns = [Column("y", "label"), Column("who"), Column("n", "number")]
    layout = FileFormat(columns=("y", "who", "n"))
    assert read_table(path, columns, layout).to_pydict() == {
        "y": [1, 0],
        "who": ["7", "8"],
        "n": [0.5, 2.0],
    }
    with pytest.raises(DataError, match=r"libsvm has no column names; give them in data\.files"):
        read_table(path, columns, name="a.libsvm")
    with pytest.raises(DataError, match=r"libsvm has no column names; write csv$"):
        read_table(path, columns)
    path.write_text("1 7:1 3:0.5\n\n0 8:1\n")
    with pytest.raises(DataError, match="line 3: 2 cells instead of 3: '0 8:1'"):
        read_table(path, columns, layout)
    path.write_text("1 7:1 3:0.5\n-1 8:1 3:1\n")
    with pytest.raises(
        DataError, match="line 2: y '-1' is not a label: 0, 1, true or false is expected"
    ):
        read_table(path, columns, layout)


@pytest.mark.parametrize(
    ("kind", "last"), [(pa.float64(), 2**53), (pa.float32(), 2**24), (pa.float16(), 2**11)]
)
def test_floats_that_stand_for_several_ids_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: pa.DataType, last: int
) -> None:
    assert float(np.array(last + 1, kind.to_pandas_dtype())) == last  # it is the next id's, too
    path = tmp_path / "a.parquet"
    for largest, is_named in ((last - 1, False), (last, True)):
        cells = pa.array(np.array([7, np.nan, largest], kind.to_pandas_dtype()), from_pandas=True)
        pq.write_table(pa.table({"who": cells, "n": cells}), path)
        caplog.clear()
        with caplog.at_level("WARNING"):
            table = read_table(path, [Column("who", required=False), Column("n", "number", False)])
        assert table["who"].to_pylist() == ["7", None, str(largest)]
        said = f"'who' holds ids as {kind}, such as {last}, each of which stands for several integ"
        assert (said in caplog.text) == is_named
        assert len(caplog.records) == is_named


def test_errors_about_labels_explain_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y\n1\nno\n")
    with pytest.raises(DataError, match=r"line 3: y 'no' is not a label: .* in its place$"):
        read_table(tmp_path / "a.csv", [Column("y", "label")])
    said = r"write 0 or 1 in its place, or set data\.on_bad_row=skip, which drops such rows$"
    with pytest.raises(DataError, match=said):
        read_table(tmp_path / "a.csv", [Column("y", "label")], on_bad_row="error")


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_wide_delimiters_are_found_wherever_blocks_end(tmp_path: Path, packing: str) -> None:
    rows = [(f"user: {i}", str(i)) for i in range(150_000)]
    path = tmp_path / f"a.dat{packing}"
    with pa.output_stream(path) as file:
        file.write(("user::score\n" + "\n".join(map("::".join, rows))).encode())
    found = read_table(path, COLUMNS[:2])
    assert found["user"].to_pylist() == [u for u, _ in rows]


PIECES = st.sampled_from(
    [
        *'aé1,;|"\\\t :-.[]{}\0\x1f\x85\ufeff\n\r',
        "\r\n",
        "::",
        '""',
        "nan",
        "1e999",
        "user",
        "score",
    ]
)
NAMES = (
    *("f.csv", "f.tsv", "f.dat", "f.libsvm", "f.csv.gz", "f.txt.zst", "f.parquet", "f.jsonl"),
    *("f.csv.bz2", "f.csv.xz", "f.zip", "f.feather", "f.orc", "f.json.gz"),
)
TYPED = ("parquet", "feather", "orc")


@settings(max_examples=EXAMPLES)
@given(
    st.lists(PIECES, max_size=40).map("".join) | st.binary(max_size=60),
    st.sampled_from(NAMES),
    st.sampled_from(["error", "skip"]),
    st.sampled_from([None, "|", "::", "latin-1"]),
    st.booleans(),
)
def test_fuzz_any_file_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    body: str | bytes,
    name: str,
    on_bad_row: Literal["error", "skip"],
    option: str | None,
    headed: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    raw = body.encode() if isinstance(body, str) else body
    if headed:
        raw = b"user,score\n" + raw
    path.write_bytes(raw)
    layout = FileFormat(
        columns=None if headed else ("user", "score"),
        delimiter=None if option == "latin-1" else option,
        encoding="latin-1" if option == "latin-1" else None,
        escape="\\" if option == "|" else None,
    )
    if any(suffix in name for suffix in ("json", *TYPED)):
        layout = FileFormat()
    dropped: Counter[str] = Counter()
    try:
        table = read_table(path, COLUMNS[:2], layout, on_bad_row, dropped)
    except DataError as error:
        assert str(path) in str(error)
        assert len(str(error).splitlines()) == 1
        return
    assert table["user"].null_count == table["score"].null_count == 0
    assert on_bad_row == "skip" or not dropped
    assert "" not in table["user"].to_pylist()


WHOLE = "user,score,at,y,part\n" + "".join(
    f"{u},{s},{t},{y},{p}\n"
    for u, s, t, y, p in [
        ("007", 1.5, 10, 1, "train"),
        ('"a, ""b"""', -2, "1970-01-02", 0, 1),
        ('"two\nlines"', "1e3", "1970-01-02T00:00:01Z", 1.0, "test"),
        ("é", 0, 86400.9, 0, 2),
        (2**64, ".5", -1, "1", 0),
    ]
)
ROLES = (
    *COLUMNS,
    Column("y", "label"),
    Column("part", "split"),
    Column("y", "number", required=False, missing=("NA",)),
)
EDIT = st.tuples(st.integers(0, 10_000), st.integers(0, 12), PIECES)


def edited(raw: bytes, edits: list[tuple[int, int, str]]) -> bytes:
    """Bytes with stretches of them replaced."""
    for place, length, piece in edits:
        at = place % (len(raw) + 1)
        raw = raw[:at] + piece.encode() + raw[at + length :]
    return raw


def write_typed(table: pa.Table, path: Path) -> None:
    """A table in the format that the suffix names."""
    if path.suffix == ".orc":
        pyarrow.orc.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        pq.write_table(table, path)


@settings(max_examples=EXAMPLES)
@given(
    st.lists(EDIT, max_size=4),
    st.lists(EDIT, max_size=2),
    st.sampled_from(NAMES),
    st.lists(st.sampled_from(ROLES), min_size=1, max_size=4, unique_by=lambda c: c.name),
    st.sampled_from(["error", "skip"]),
    st.sampled_from([None, "utf-16", "latin-1"]),
    st.integers(1, 200),
)
def test_fuzz_a_damaged_file_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    in_text: list[tuple[int, int, str]],
    in_file: list[tuple[int, int, str]],
    name: str,
    columns: list[Column],
    on_bad_row: Literal["error", "skip"],
    encoding: str | None,
    block_bytes: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    delimiter = {"tsv": "\t", "dat": "::", "libsvm": " "}.get(name.split(".")[1], ",")
    text = edited(WHOLE.replace(",", delimiter).encode(), in_text)
    if encoding == "utf-16":
        text = text.decode(errors="replace").encode(encoding)
    cells = [line.split(",") for line in WHOLE.replace("two\nlines", "").splitlines()]
    table = pa.table({n: [row[c] for row in cells[1:]] for c, n in enumerate(cells[0])})
    if "json" in name:
        text = edited("".join(json.dumps(r) + "\n" for r in table.to_pylist()).encode(), in_text)
        encoding = None
    if name.endswith(TYPED):
        encoding = None
        write_typed(table, path)
    elif name.endswith("zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("f.csv", text)
    elif name.endswith("xz"):
        path.write_bytes(lzma.compress(text))
    else:
        with pa.output_stream(path) as file:
            file.write(text)
    path.write_bytes(edited(path.read_bytes(), in_file))
    names = ("user", "score", "at", "y", "part") if name.endswith("libsvm") else None
    layout = FileFormat(encoding=encoding, columns=names)
    dropped: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", 64 + block_bytes)
        try:
            table = read_table(path, columns, layout, on_bad_row, dropped)
        except DataError as error:
            message = str(error)
            assert str(path) in message
            assert len(message.splitlines()) == 1
            if found := re.search(r"f\.csv, line (\d+): \w+ ('[^'\\]*') is", message):
                whole = path.read_bytes().decode(encoding or "utf-8-sig", errors="replace")
                lines = re.split("\r\n|\r|\n", whole)[int(found[1]) - 1 :]
                row = next(csv.reader(io.StringIO("\n".join(lines))))
                assert found[2][1:-1] in row
            return
    lost = sum(n for reason, n in dropped.items() if "fractions" not in reason)
    assert on_bad_row == "skip" or not lost
    for column in columns:
        assert not (column.required and table[column.name].null_count)
    if name == "f.csv" and encoding is None:
        texts = [c.name for c in columns if c.type == "text" and on_bad_row == "error"]
        _agrees_with_csv(path, table, lost, texts)


def _agrees_with_csv(path: Path, table: pa.Table, lost: int, texts: list[str]) -> None:
    """What Arrow read as text is what Python's strict reader reads, and no row is unaccounted."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header, *rows = [row for row in csv.reader(file, strict=True) if row]
    assert len(rows) == len(table) + lost
    for name in texts:
        assert table[name].to_pylist() == [row[header.index(name)] for row in rows]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)


@given(st.lists(st.tuples(CELL, st.floats(width=32, allow_nan=False, allow_infinity=False))))
def test_what_a_csv_writer_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, float]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("user", "score"), *rows])
    if not rows:
        with pytest.raises(DataError, match="no rows"):
            read_table(path, COLUMNS[:2])
        return
    table = read_table(path, COLUMNS[:2])
    assert list(zip(table["user"].to_pylist(), table["score"].to_pylist(), strict=True)) == rows


@pytest.mark.parametrize("cuts", [[0, 23], [0, 5, 5, 21, 23], [0, 7, 14, 23, 23]])
def test_batches_of_any_size_become_tables_of_one(cuts: list[int]) -> None:
    rows = pa.record_batch({"row": pa.array(range(23), pa.int64())})
    batches = (rows.slice(begin, end - begin) for begin, end in itertools.pairwise(cuts))
    found = [table["row"].to_pylist() for table in in_tables(batches, 7)]
    assert found == [list(range(a, min(a + 7, 23))) for a in range(0, 23, 7)]


@pytest.mark.parametrize("name", ["a.csv", "of/may.csv", "*.csv", "it's a: {b}.csv", "my day.csv"])
def test_the_advice_on_a_layout_is_the_cure(tmp_path: Path, name: str) -> None:
    """As it stands, put into the configuration's YAML."""
    path = tmp_path / "a.csv"
    for encoding, said in (("latin-1", None), ("utf-16", "utf-16")):
        path.write_bytes("user,score\nJos\xe9,1\n".encode(encoding))
        with pytest.raises(DataError, match="UTF") as caught:
            read_table(path, COLUMNS[:2], name=name)
        advice = str(caught.value).rpartition("name the encoding in data.files: ")[2]
        advice, _, alone = advice.partition(", or for this file alone ")
        if name == "*.csv":
            assert yaml.safe_load(alone) == {"a.csv": {"encoding": said or "latin-1"}}
        found = yaml.safe_load(advice)
        assert list(found) == [name]
        layout = FileFormat(encoding=said or "latin-1")
        assert found[name] == {"encoding": said or "latin-1"}
        assert read_table(path, COLUMNS[:2], layout)["user"].to_pylist() == ["Jos\xe9"]
        with pytest.raises(DataError, match=r"; save it as UTF-8$"):  # data.files is not asked
            read_table(path, COLUMNS[:2])


def test_empty_files_are_recognised(tmp_path: Path) -> None:
    packed = gzip.compress(b"")
    for name, data in {
        "a.csv": b"",
        "b.csv": b"user,score",
        "c.csv.gz": packed,
        "d.dat": b"\n",
        "e.parquet": b"",
        "f.csv": b"user,score\n",
    }.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.table({"user": [""], "score": [1.0]}).slice(1), tmp_path / "g.parquet")
    for path in tmp_path.iterdir():
        with pytest.raises(sources.EmptyFile, match=r"no rows|is empty"):
            read_table(path, COLUMNS[:2])
    (tmp_path / "a.csv").write_text("a,1")  # one row is one, with a line's end or without
    layout = FileFormat(columns=("user", "score"))
    assert read_table(tmp_path / "a.csv", COLUMNS[:2], layout)["user"].to_pylist() == ["a"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_pattern_means_files_that_are_data(tmp_path: Path, remote: bool) -> None:
    root: Any = tmp_path / "data"
    names = ["part-0.csv", "part-1.csv", ".part-0.csv.crc", "_SUCCESS", ".x.csv", "_y.csv"]
    names += ["_temporary/part-2.csv", ".ipynb/part-3.csv", "more/part-4.csv", "rows.csv/p.csv"]
    memory = fsspec.filesystem("memory")
    for name in names:
        if remote:
            memory.pipe(f"/patterns/{name}", b"user\na\n")
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("user\na\n")
    root = "memory://patterns" if remote else root
    for pattern, found in {
        "*": ["part-0.csv", "part-1.csv"],
        "*.csv": ["part-0.csv", "part-1.csv"],
        ".*": [".part-0.csv.crc", ".x.csv"],
        "_*.csv": ["_y.csv"],
        "*/*.csv": ["more/part-4.csv", "rows.csv/p.csv"],
        "_temporary/*": ["_temporary/part-2.csv"],
        "_y.csv": ["_y.csv"],
        "part-?.csv": ["part-0.csv", "part-1.csv"],
        "part-[1-3].csv": ["part-1.csv"],
        "**/part-[24].csv": ["more/part-4.csv"],
    }.items():
        assert [f.name for f in sources.find_files(root, pattern)] == found
    for name, said in {
        "rows.csv": r"rows\.csv: is a folder; name its files: rows\.csv/\*\.csv",
        "more/": r"is a folder; name its files: more/\*\.csv$",
        "ro*.csv": r"is a folder; name its files: ro\*\.csv/\*\.csv",
        "n*.csv": r"no such file; is data\.root right",
    }.items():
        with pytest.raises(DataError, match=said):
            sources.find_files(root, name)


def _typed(root: Path, message: str) -> Path:
    """Runs the shell command that ends an error line; the file that it writes."""
    command = message.rpartition("write it without: ")[2]
    subprocess.run(command, shell=True, cwd=root, check=True)
    return root / shlex.split(command)[-1]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("head", "end", "layout", "message"),
    [
        (
            "user|score",
            "|",
            {"delimiter": "|"},
            "line 2: 3 cells .*every row ends with",
        ),
        ("user,score", ",", {}, "line 2: 3 cells instead of 2: every row ends with a delimiter"),
        (
            "user.score",
            ".",
            {"delimiter": "."},
            "line 2: 3 cells .*every row ends with",
        ),
        ("sep=;\nuser;score", "", {"delimiter": ";"}, "its first line is for Excel alone"),
    ],
)
def test_lines_that_programs_add_are_taken_out_by_the_command_in_the_message(
    tmp_path: Path, head: str, end: str, layout: dict[str, str], message: str, packed: bool
) -> None:
    mark = layout.get("delimiter", ",")
    text = f"{head}\n" + "".join(f"u{k}{mark}{k}{end}\n" for k in range(3))
    path = tmp_path / ("a b.csv.gz" if packed else "a b.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, COLUMNS[:2], FileFormat(**layout), name="a b.csv")
    written = _typed(tmp_path, str(caught.value))
    table = read_table(written, COLUMNS[:2], FileFormat(**layout))
    assert table.to_pydict() == {"user": ["u0", "u1", "u2"], "score": [0, 1, 2]}


def test_errors_explain_rows_that_all_have_extra_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,score\n1,a,3\n2,b,4\n")
    with pytest.raises(DataError, match=r"so has every row, .*names 2 columns; name all 3$"):
        read_table(path, COLUMNS[:2], on_bad_row="error")
    path.write_text("user,score\n1,a,3\n2,4\n")
    with pytest.raises(DataError, match=r"3 cells instead of 2: '1,a,3'; fix the row or set"):
        read_table(path, COLUMNS[:2], on_bad_row="error")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("again", ["user", "\ufeffuser"])
def test_a_repeated_header_is_not_a_row(tmp_path: Path, name: str, again: str) -> None:
    path = tmp_path / name
    users, items = ["a", "user", again, "user", "b"], ["1", "2", "item", "item", "item"]
    if name == "a.csv":
        rows = "".join(f"{u},{i}\n" for u, i in zip(users, items, strict=True))
        path.write_text("user,item\n" + rows)
    elif name == "a.jsonl":
        lines = [json.dumps({"user": u, "item": i}) for u, i in zip(users, items, strict=True)]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.table({"user": users, "item": items}), path)
    columns, place = [Column("user"), Column("item")], {"a.csv": "line 4", "a.jsonl": "line 3"}
    with pytest.raises(DataError, match=f"{place.get(name, 'row 3')}: a repeated header line"):
        read_table(path, columns, on_bad_row="error")
    dropped = Counter[str]()
    table = read_table(path, columns, on_bad_row="skip", dropped=dropped)
    assert table.to_pydict() == {"user": ["a", "user", "b"], "item": ["1", "2", "item"]}
    assert dropped == {f"{name}: rows that repeat the header": 2}
    with pytest.raises(
        DataError, match="a repeated header line"
    ):  # before a cell that is no number
        read_table(path, [Column("user"), Column("item", "number")])


@pytest.mark.parametrize(
    ("raw", "message", "delimiter"),
    [
        ("User, Score \na,1\n", r"did you mean 'User'\? it has: User,  Score $", None),
        ("user, score\na, 1\n", r"separated by ', ': name it in .*: \", \"\}\}$", ", "),
        ("user; score\na; 1\n", r"separated by '; ': name it in .*: \"; \"\}\}$", "; "),
        ('user, score\n"a, b", 1\n', r"did you mean ' score'\? it has: user,  score$", None),
        ("user, score\na,1\n", r"did you mean ' score'\? it has: user,  score$", None),
    ],
)
def test_spaces_and_capitals_in_a_header_are_named(
    tmp_path: Path, raw: str, message: str, delimiter: str | None
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(raw)
    with pytest.raises(DataError, match=message):
        read_table(path, COLUMNS[:2], name="a.csv")
    if delimiter is not None:
        found = read_table(path, COLUMNS[:2], FileFormat(delimiter=delimiter)).to_pydict()
        assert found == {"user": ["a"], "score": [1.0]}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("user,score\na,1\n".encode(encoding))
    with pytest.raises(DataError, match=f"its encoding seems to be {encoding}: name it in"):
        read_table(tmp_path / "a.csv", COLUMNS[:2], name="a.csv")
    layout = FileFormat(encoding=encoding)
    assert read_table(tmp_path / "a.csv", COLUMNS[:2], layout)["user"].to_pylist() == ["a"]


def test_truncated_compressed_files_are_reported(tmp_path: Path) -> None:
    whole = gzip.compress(b"user,score\n" + os.urandom(4096).hex().encode())
    (tmp_path / "a.csv.gz").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="it is cut or damaged: copy it again"):
        read_table(tmp_path / "a.csv.gz", COLUMNS[:2])


@pytest.mark.parametrize(("mark", "written"), [("\t", "\t"), (";", ";"), ("|", "|"), ("::", "::")])
def test_the_delimiter_of_a_file_without_a_header_is_named(
    tmp_path: Path, mark: str, written: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"1{mark}a{mark}x\n2{mark}{mark}y\n")
    with pytest.raises(
        DataError, match=r"columns: \[first, second, ...\]\}\}, 3 of them$"
    ) as caught:
        read_table(path, COLUMNS[:2], name="a.csv")
    typed = str(caught.value).rpartition("in data.files: ")[2].removesuffix(", 3 of them")
    names = ["score", "more", "user"]
    layout = yaml.safe_load(typed)["a.csv"] | {"columns": names}
    assert layout["delimiter"] == written
    expected = {"user": ["x", "y"], "score": [1, 2]}
    assert read_table(path, COLUMNS[:2], FileFormat(**layout)).to_pydict() == expected
    with pytest.raises(DataError, match="separated by") as caught:
        read_table(path, COLUMNS[:2], FileFormat(columns=tuple(names)), name="a.csv")
    typed = str(caught.value).rpartition("in data.files: ")[2]
    layout = yaml.safe_load(typed)["a.csv"] | {"columns": names}
    assert read_table(path, COLUMNS[:2], FileFormat(**layout)).to_pydict() == expected
