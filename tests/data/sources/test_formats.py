"""Formats other than delimited text, packings, lists and partition columns."""

import bz2
import gzip
import itertools
import json
import lzma
import math
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
import yaml

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.fields import column_of, split_cells
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.lookup import RowEncoder
from deepfm_dist.data.manifest import Manifest, input_files
from deepfm_dist.data.preparation.local import detect_lists, prepare
from deepfm_dist.data.schema import DataConfig, Feature, FileFormat
from deepfm_dist.data.sources import (
    Column,
    ColumnType,
    delimited,
    find_files,
    find_lists,
    json_lines,
    read_table,
)
from deepfm_dist.errors import ConfigError, DataError

COLUMNS = [Column("user"), Column("score", "number")]
EXPECTED = {"user": ["007", "b"], "score": [1.5, -2.0]}
CSV = b"user,score\n007,1.5\nb,-2\n"


@pytest.mark.parametrize("suffix", [".bz2", ".xz", ".zip", ".lz4", ".gz", ".zst"])
@pytest.mark.parametrize("remote", [False, True])
def test_packed_text_is_unpacked_by_its_suffix(tmp_path: Path, suffix: str, remote: bool) -> None:
    path = tmp_path / f"a.csv{suffix}"
    halves = CSV[:15], CSV[15:]
    if suffix == ".bz2":  # as parallel packers write it: several streams
        path.write_bytes(b"".join(map(bz2.compress, halves)))
    elif suffix == ".xz":
        path.write_bytes(b"".join(map(lzma.compress, halves)))
    elif suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/._a.csv", b"\0")
            archive.writestr("folder/a.csv", CSV)
    else:
        with pa.output_stream(
            path, compression={".gz": "gzip", ".zst": "zstd"}.get(suffix, "lz4")
        ) as file:
            file.write(CSV)
    assert path.read_bytes() != CSV
    url = f"file://{path}" if remote else path
    assert read_table(url, COLUMNS).to_pydict() == EXPECTED


def test_a_zip_archive_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t.tsv", CSV.replace(b",", b"\t"))
    assert read_table(tmp_path / "t.zip", COLUMNS).to_pydict() == EXPECTED
    with zipfile.ZipFile(tmp_path / "t.zip", "a") as archive:
        archive.writestr("u.tsv", b"")
    with pytest.raises(DataError, match=r"holds 2 files, .*unzip t.zip and name .*t.tsv, u.tsv"):
        read_table(tmp_path / "t.zip", COLUMNS)


TABLE = pa.table({"user": ["007", "b"], "score": [1.5, -2.0], "more": [1, 2]})


@pytest.mark.parametrize("name", ["a.feather", "a.arrow", "a.arrows", "a.orc", "a.parquet", "a.pq"])
def test_typed_columns_are_read_from_every_format(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("orc"):
        pyarrow.orc.write_table(TABLE, path, compression="zstd")
    elif name.endswith(("parquet", "pq")):
        pq.write_table(TABLE, path)
    else:
        new = pa.ipc.new_stream if name.endswith("arrows") else pa.ipc.new_file
        with new(path, TABLE.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
            file.write_table(TABLE)
    assert read_table(path, COLUMNS).to_pydict() == EXPECTED
    with pytest.raises(DataError, match=r"no column 'users'; did you mean 'user'\?"):
        read_table(path, [Column("users")])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a readable|damaged"):
        read_table(path, COLUMNS)


TAR = gzip.compress(b"x" * 257 + b"ustar", mtime=0)


def _workbook(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.csv", bz2.compress(CSV), r"starts like a \.bz2 file; call it a\.csv\.bz2$"),
        ("a.csv", lzma.compress(CSV), r"starts like a \.xz file; call it a\.csv\.xz$"),
        ("a.csv.gz", CSV, r"is not packed as \.gz; call it a\.csv$"),
        ("a.csv.gz", bz2.compress(CSV), r"starts like a \.bz2 file; call it a\.csv\.bz2$"),
        ("a.csv", b"ARROW1\0\0", r"starts like a \.arrow file; call it a\.csv\.arrow$"),
        ("a.tgz", TAR, r"a tar archive, .*tar -xf a\.tgz"),
        ("a.tar.gz", TAR, r"a tar archive, .*tar -xf a\.tar\.gz"),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1\x15", mtime=0),
            r"gunzip -c a\.parquet\.gz > a\.parquet$",
        ),
        ("a.csv", b"\x89HDF\r\n", r"an HDF5 file, .*pandas\.read_hdf\('a\.csv'\)\.to_parquet"),
        ("a.pkl", b"\x80\x04\x95", r"a Python pickle, which is not read; python -c .*read_pickle"),
        ("a.csv", b"<!DOCTYPE html>\n<html>", r"an HTML page, .*download the file again"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "fetch the file with git lfs"),
        ("a.sqlite", b"SQLite format 3\0", "an SQLite database, .*export the table as CSV"),
    ],
)
def test_files_that_contradict_their_names_are_reported(
    tmp_path: Path, name: str, raw: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / name, COLUMNS)


def test_a_workbook_is_named_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("a.xlsx", "a.csv", "a.zip"):
        _workbook(tmp_path / name)
        with pytest.raises(DataError, match="an Excel workbook, which is not read; save it as CSV"):
            read_table(tmp_path / name, COLUMNS)


# -- lists ---------------------------------------------------------------------------------------

TAGS = [["a, b", "c"], [], None, ["c"]]
WRITTEN = {
    "python": ["['a, b', 'c']", "[]", "", "['c']"],
    "json": ['["a, b", "c"]', "[]", "", '["c"]'],
    "numpy": ["['a, b' 'c']", "[]", "", "['c']"],
}


@pytest.mark.parametrize("form", [*WRITTEN, "list", "large_list", "dictionary", "json lines"])
@pytest.mark.parametrize("separator", [None, ","])
def test_lists_are_several_values(tmp_path: Path, form: str, separator: str | None) -> None:
    path = tmp_path / "a.parquet"
    if form in WRITTEN:
        path = tmp_path / "a.csv"
        pd.DataFrame({"tags": WRITTEN[form], "x": "y"}).to_csv(path, index=False)
    elif form == "json lines":
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"tags": tags}) + "\n" for tags in TAGS))
    else:
        text = pa.dictionary(pa.int32(), pa.string()) if form == "dictionary" else pa.string()
        kind = pa.large_list(text) if form == "large_list" else pa.list_(text)
        pq.write_table(pa.table({"tags": pa.array(TAGS, kind)}), path)
    assert find_lists(path, ["tags"]) == {"tags": True}
    column = Column("tags", "texts", required=False, separator=separator)
    found = read_table(path, [column])["tags"].to_pylist()
    assert [values or [] for values in found] == [["a, b", "c"], [], [], ["c"]]


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("[27, 9]", ["27", "9"]),
        ("[27.0, None, 1.5]", ["27", "1.5"]),
        ("[1 2 3]", ["1", "2", "3"]),
        ("[Action, Drama]", ["Action", " Drama"]),
        ("[REC]", ["REC"]),
        ("[a] or [b]", ["[a] or [b]"]),
        ('["it\'s", "so \\"good\\""]', ["it's", 'so "good"']),
        ("Comedy|Drama", ["Comedy", "Drama"]),
    ],
)
def test_cells_of_lists_as_text(tmp_path: Path, cell: str, values: list[str]) -> None:
    pd.DataFrame({"tags": [cell], "x": 1}).to_csv(tmp_path / "a.csv", index=False)
    column = Column("tags", "texts", required=False, separator="|")
    assert read_table(tmp_path / "a.csv", [column])["tags"].to_pylist() == [values]


GENRES = [
    [{"id": 28, "name": "Action"}, {"id": 18, "name": "Drama"}],
    [],
    [{"id": 18, "name": "Drama"}],
]


@pytest.mark.parametrize("form", ["parquet", "jsonl", "json in csv", "python in csv"])
def test_a_member_of_objects_is_taken(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("a.csv" if "csv" in form else f"a.{form}")
    frame = pd.DataFrame({"genres": GENRES, "at": [{"hour": 7}, {"hour": 8}, {}]})
    if form == "parquet":
        pq.write_table(pa.Table.from_pandas(frame), path)
    elif form == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.map(json.dumps if form == "json in csv" else repr).to_csv(path, index=False)
    columns = [
        Column("genres.name", "texts", required=False),
        Column("genres.id", "texts", required=False),
        Column("at.hour", "number", required=False),
    ]
    assert find_lists(path, ["genres.name", "at.hour"]) == {"genres.name": True, "at.hour": False}
    assert read_table(path, columns).to_pydict() == {
        "genres.name": [["Action", "Drama"], [], ["Drama"]],
        "genres.id": [["28", "18"], [], ["18"]],
        "at.hour": [7.0, 8.0, None],
    }
    with pytest.raises(DataError, match=r"holds objects; .*: genres\.id or genres\.name"):
        read_table(path, [Column("genres", "texts", required=False)])
    if form == "parquet":
        with pytest.raises(DataError, match=r"has no member 'nam'; its members: id, name"):
            read_table(path, [Column("genres.nam", "texts")])


def _prepared(root: Path, features: list[dict[str, Any]], **data: Any) -> tuple[Manifest, Path]:
    rows = {"file": "rows.csv", "user": "user", "item": "item"}
    ids = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    config = DataConfig.model_validate(
        {
            "interactions": rows,
            "features": [*ids, *features],
            "split": {"valid": 0, "test": 0},
            **data,
        }
    )
    return prepare(config, root, root / "prepared", seed=1), root / "prepared"


def test_a_field_on_a_column_of_lists_has_several_values(tmp_path: Path) -> None:
    """Of the rows and of a file of items, without a separator."""
    rows = pd.DataFrame({"user": [*"aabb"], "item": [*"xyxy"]})
    rows["tags"] = ["['p', 'q']", "['q']", "[]", "['p', 'q']"]
    rows.to_csv(tmp_path / "rows.csv", index=False)
    items = pa.table({"item": ["x", "y"], "genres": [["Drama", "War"], ["War"]]})
    pq.write_table(items, tmp_path / "items.parquet")
    features = [{"name": "tags"}, {"name": "genres", "entity": "item", "file": "items.parquet"}]
    manifest, folder = _prepared(tmp_path, features)
    assert [f.several for f in manifest.features] == [None, None, True, True]
    ids = {
        name: pq.read_table(folder / f"vocabulary/{name}.parquet")["id"].to_pylist()
        for name in ("item", "tags", "genres")
    }
    train = pq.read_table(folder / "train").to_pylist()
    found = sorted(sorted(ids["tags"][r] for r in row["tags"]) for row in train)
    assert found == [[], ["p", "q"], ["p", "q"], ["q"]]
    entities = pq.read_table(folder / "entities/item.parquet").to_pylist()[1:]
    assert {e["id"]: sorted(ids["genres"][r] for r in e["genres"]) for e in entities} == {
        "x": ["Drama", "War"],
        "y": ["War"],
    }
    encoder = RowEncoder(PreparedDataset(folder))
    rows.assign(tags=[["p", "q"], ["q"], [], None]).to_json(
        tmp_path / "new.jsonl", orient="records", lines=True
    )
    new = encoder.encode(read_table(tmp_path / "new.jsonl", encoder.columns)).context["tags"]
    assert isinstance(new, Jagged)
    bags = [new.values[a:b] for a, b in itertools.pairwise(new.offsets)]
    assert [sorted(ids["tags"][r] for r in bag) for bag in bags] == [["p", "q"], ["q"], [], []]
    given = encoder.fixed_context({"tags": "['q', 'p']"})["tags"]
    assert isinstance(given, Jagged)
    assert sorted(ids["tags"][r] for r in given.values) == ["p", "q"]
    with pytest.raises(ConfigError, match=r"tags: fill is for a cell of one value.*holds lists"):
        _prepared(tmp_path, [{"name": "tags", "fill": "none"}])
    manifest, folder = _prepared(tmp_path, [{"name": "tags", "several": False}])
    assert pq.read_schema(folder / "train/part-00000.parquet").field("tags").type == pa.int32()


# -- partitions of folders -----------------------------------------------------------------------


def _whole(cell: Any) -> Any:
    """A time as whole seconds; any other cell as it is."""
    return cell["whole"] if isinstance(cell, dict) else cell


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_folders_give_columns(tmp_path: Path, suffix: str) -> None:
    for day, shop in (("2024-01-01", "a%2Fb"), ("2024-01-02", "__HIVE_DEFAULT_PARTITION__")):
        path = tmp_path / f"dt={day}/shop={shop}/part-0.{suffix}"
        path.parent.mkdir(parents=True)
        frame = pd.DataFrame({"user": ["u", "v"]})
        if suffix == "parquet":
            frame.to_parquet(path)
        elif suffix == "csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_json(path, orient="records", lines=True)
    columns = [Column("user"), Column("dt", "time"), Column("shop", required=False)]
    tables = [read_table(path, columns) for path in sorted(tmp_path.glob("*/*/*"))]
    found = [{n: [_whole(c) for c in t[n].to_pylist()] for n in t.column_names} for t in tables]
    day = pd.Timestamp("2024-01-01").value // 10**9
    assert found == [
        {"user": ["u", "v"], "dt": [day] * 2, "shop": ["a/b"] * 2},
        {"user": ["u", "v"], "dt": [day + 86400] * 2, "shop": [None] * 2},
    ]
    with pytest.raises(DataError, match=r"no column 'day'; .*it has: user, dt, shop"):
        read_table(next(tmp_path.glob(f"*/*/*.{suffix}")), [Column("day")])


# -- JSON ----------------------------------------------------------------------------------------

VALUES = [
    {"user": "007", "n": 1.0, "at": "2020-01-31 12:00:00", "gone": None},
    {"user": 2**63 + 5, "n": 2.5, "at": 86400},
    {"user": 7.0, "n": "3", "at": "1970-01-01", "é": "\ud83d\ude00"},
    {"user": True, "n": None, "at": 0},
]


@pytest.mark.parametrize("form", ["lines", "blocks", "array", "ndjson.gz", "utf-16"])
def test_json_is_read(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "blocks":
        monkeypatch.setattr(json_lines, "BLOCK_BYTES", 60)
    text = "\r\n\n".join(map(json.dumps, VALUES))
    path = tmp_path / ("a.ndjson.gz" if "gz" in form else "a.json")
    encoding = "utf-16" if form == "utf-16" else None
    begin = "" if encoding else "\ufeff"
    text = json.dumps(VALUES, indent=1) if form == "array" else begin + text
    raw = text.encode(encoding or "utf-8")
    path.write_bytes(gzip.compress(raw) if "gz" in form else raw)
    columns = [
        Column("user"),
        Column("n", "number", required=False),
        Column("at", "time"),
        Column("é", required=False),
    ]
    found = read_table(path, columns, FileFormat(encoding=encoding)).to_pydict()
    assert {name: [_whole(cell) for cell in cells] for name, cells in found.items()} == {
        "user": ["007", str(2**63 + 5), "7", "true"],
        "n": [1.0, 2.5, 3.0, None],
        "at": [int(pd.Timestamp("2020-01-31 12:00").timestamp()), 86400, 0, 0],
        "é": [None, None, "\U0001f600", None],
    }
    with pytest.raises(DataError, match=r"no column 'm'; .*it has: user, n, at, gone, é$"):
        read_table(path, [Column("m", required=False)], FileFormat(encoding=encoding))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"user": "a", "score": 1}\n\n{"user": "b", "score": "x"}',
            "line 3: score 'x' is not",
        ),
        ('{"user": "a", "score": 1}\n{"user": ""}', "line 2: user '' is empty"),
        ('{"user": "a", "score": 1}\n{"user": "b", ', "line 2: .* is not a JSON object"),
        ('{"user": "a", "score": NaN}', r"line 1: score 'nan' is not a number"),
        ('{"user": ["a"], "score": 1}', r"line 1: user '\[\"a\"\]' is a list where one value"),
        ('{"user": {"id": 1}, "score": 1}', r"name a member of it: column: user\.id$"),
        (
            "user,score\na,1\n",
            r"line 1: 'user,score' is not a JSON object .*called \.jsonl has",
        ),
        ("", "the file is empty"),
        ("[]", "the array is empty"),
        ("[1]", "element 1 of the array, 1, is not an object"),
        ('[{"user": "a", "score": "x"}]', "object 1: score 'x' is not a number"),
    ],
)
def test_what_is_wrong_in_json_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_table(tmp_path / "a.jsonl", COLUMNS)
    assert len(str(caught.value).splitlines()) == 1


def test_bad_lines_of_json_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = ['{"user": "a", "score": 1}', "oops", '{"user": ["b"], "score": 2}', '{"score": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"user": "c", "score": 4}']))
    dropped: Counter[str] = Counter()
    table = read_table(tmp_path / "a.jsonl", COLUMNS, None, "skip", dropped)
    assert table.to_pydict() == {"user": ["a", "c"], "score": [1.0, 4.0]}
    assert dropped == {
        "a.jsonl: lines that are not JSON objects": 1,
        "a.jsonl: rows with an unreadable cell": 2,
    }
    (tmp_path / "a.jsonl").write_text("oops\n" * 3)
    with pytest.raises(DataError, match="line 1: 'oops' is not a JSON object"):
        read_table(tmp_path / "a.jsonl", COLUMNS, None, "skip", dropped)


@pytest.mark.parametrize("packed", [False, True])
def test_python_literals_are_converted_by_the_command_that_is_named(
    tmp_path: Path, packed: bool
) -> None:
    """Steam's reviews: one dict of Python for each line."""
    rows = [
        {"user": "a'b", "score": 1.5, "early": False},
        {"user": 'c"', "score": 2, "early": True},
    ]
    raw = "".join(f"{row!r}\n" for row in rows).encode()
    path = tmp_path / f"steam_new.json{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    with pytest.raises(DataError, match="line 1: a Python literal rather than JSON") as caught:
        read_table(path, COLUMNS)
    command = str(caught.value).partition("convert the file: ")[2]
    path_with_python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path_with_python}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert read_table(tmp_path / shlex.split(command)[-1], COLUMNS).to_pydict() == {
        "user": ["a'b", 'c"'],
        "score": [1.5, 2.0],
    }


def test_undecodable_bytes_are_not_python_literals(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"user": "a", "score": 1}\n{"user": "\xe9", "score": 2}\n')
    with pytest.raises(DataError, match=r"line 2: not readable: .* is not UTF-8 text; name the"):
        read_table(tmp_path / "a.jsonl", COLUMNS, name="a.jsonl")
    layout = FileFormat(encoding="latin-1")
    assert read_table(tmp_path / "a.jsonl", COLUMNS, layout)["user"].to_pylist() == ["a", "\xe9"]


# -- lists of files and patterns -----------------------------------------------------------------


def test_lists_of_files_are_read_as_one(tmp_path: Path) -> None:
    """Names, patterns, layouts of their own, an empty one among them; of rows, splits and items."""
    days = {f"day{d}.csv": f"user,item\nu{d},x\nv{d},y\n" for d in range(1, 6)}
    days |= {"old.txt": "u0;z\n", "day9.csv": "", "test1.csv": "user,item\nu1,y\n"}
    days |= {"test2.csv": "user,item\nu2,y\n", "a.csv": "item,genre\nx,War\n"}
    days |= {"b.csv": "item,genre\ny,Drama\n"}
    for name, text in days.items():
        (tmp_path / name).write_text(text)
    manifest, folder = _prepared(
        tmp_path,
        [{"name": "genre", "entity": "item", "file": ["a.csv", "b.csv"], "keep": "first"}],
        interactions={
            "file": ["day[1-3].csv", "old.txt", "day9.csv"],
            "user": "user",
            "item": "item",
        },
        files={"old.txt": {"columns": ["user", "item"], "delimiter": ";"}},
        split={"valid": 0, "test_file": ["test1.csv", "test2.csv"]},
        titles={"file": ["b.csv", "a.csv"], "column": "genre"},
        negatives={"per_positive": 1, "evaluation_per_positive": 1},
    )
    users = pq.read_table(folder / "vocabulary/user.parquet")["id"].to_pylist()
    assert sorted(users[1:]) == ["u0", "u1", "u2", "u3", "v1", "v2", "v3"]
    assert manifest.splits["train"].rows == 7
    assert [*manifest.inputs][:5] == ["day1.csv", "day2.csv", "day3.csv", "old.txt", "day9.csv"]
    items = pq.read_table(folder / "entities/item.parquet").to_pylist()[1:]
    assert {item["id"]: item["title"] for item in items} == {"x": "War", "y": "Drama", "z": None}


def test_a_file_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item\nu,x\n")
    with pytest.raises(ConfigError, match=r"a\.csv: matched by both \*\.csv and a\.csv"):
        find_files(tmp_path, ("*.csv", "a.csv"))


@pytest.mark.parametrize("remote", [False, True])
def test_the_pattern_for_a_folder_is_named(tmp_path: Path, remote: bool) -> None:
    for name in ("log/_SUCCESS", "log/dt=1/part-0.parquet", "log/dt=2/part-0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    root = f"local://{tmp_path}" if remote else str(tmp_path)
    with pytest.raises(DataError, match="log: is a folder; name its files: ") as caught:
        find_files(root, "log")
    pattern = str(caught.value).rpartition(" ")[2]
    assert pattern == "log/*/*.parquet"
    found = [file.name for file in find_files(root, pattern)]
    assert found == ["log/dt=1/part-0.parquet", "log/dt=2/part-0.parquet"]


def test_names_with_marks_of_patterns_are_names(tmp_path: Path) -> None:
    for name in ("day[1].csv", "day1.csv"):
        (tmp_path / name).write_text("user\na\n")
    assert [f.name for f in find_files(tmp_path, "day[1].csv")] == ["day[1].csv"]
    assert [f.name for f in find_files(tmp_path, "day[12].csv")] == ["day1.csv"]
    [found] = find_files("elsewhere", f"{tmp_path}/day?.csv")
    assert found.path == f"{tmp_path}/day1.csv"


# -- layouts of delimited text -------------------------------------------------------------------

NUMBERS = [Column("n", "number", required=False), Column("at", "time", required=False)]


def test_decimal_commas_are_read_where_they_are_declared(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "n;at;text\n0,50;1593898069,5;1,5\n -1,5e3 ;2020-01-31 00:00:00.5;\n7;8;\n,5;;\n"
    )
    declared = FileFormat(delimiter=";", decimal=",")
    found = read_table(path, [*NUMBERS, Column("text", required=False)], declared)
    assert found["n"].to_pylist() == [0.5, -1500.0, 7.0, 0.5]
    halves = [(cell or {}).get("billionths") for cell in found["at"].to_pylist()]
    assert halves == [500_000_000, 500_000_000, 0, None]
    assert found["text"].to_pylist() == ["1,5", None, None, None]  # a category as it stands
    with pytest.raises(
        DataError, match="line 2: n '0,50' is not a number; where the comma is"
    ) as e:
        read_table(path, NUMBERS, FileFormat(delimiter=";"), name="a.csv")
    cure = str(e.value).partition("in data.files: ")[2].partition(", or fix")[0]
    assert yaml.safe_load(cure) == {"a.csv": {"decimal": ","}}
    path.write_text("n;at\n1.234,5;\n1.234;\n")
    for line, cell in ((2, "1.234,5"), (3, "1.234")):  # with a comma for decimals, perhaps 1234
        with pytest.raises(
            DataError, match=rf"line {line}: n '{cell}' is not a number: it has a point, and dec"
        ):
            read_table(path, NUMBERS, declared)
        path.write_text("n;at\n1;\n1.234;\n")


@pytest.mark.parametrize(
    ("cell", "number", "thousands", "decimal"),
    [
        ("1,234", 1234, ",", "."),
        (" -12,345,678.5 ", -12345678.5, ",", "."),
        ("1.234,5", 1234.5, ".", ","),
        ("1.234", 1234, ".", ","),
        ("1\u202f234,5", 1234.5, " ", ","),
        ("1 234", 1234, " ", "."),
        ("12'345.5", 12345.5, "'", "."),
    ],
)
def test_separators_of_thousands_are_read_where_they_are_declared(
    tmp_path: Path, cell: str, number: float, thousands: str, decimal: str
) -> None:
    path, layout = tmp_path / "a.csv", {"delimiter": "|", "decimal": decimal}
    path.write_text(f"n|text\n{cell}|{cell}\n7|x\n", encoding="utf-8")
    columns = [Column("n", "number", required=False), Column("text")]
    with pytest.raises(DataError, match="thousands") as caught:
        read_table(path, columns, FileFormat.model_validate(layout), name="a.csv")
    assert "set missing" not in str(caught.value)
    cure = re.search(r"\{a\.csv: \{thousands: .*?\}\}", str(caught.value))
    assert cure and yaml.safe_load(cure[0]) == {"a.csv": {"thousands": thousands}}
    declared = FileFormat.model_validate(layout | {"thousands": thousands})
    found = read_table(path, columns, declared).to_pydict()
    assert found == {"n": [number, 7], "text": [cell, "x"]}
    for wrong in ("1,23", "12,34,567", ",234", "1234,567", "1..234"):
        path.write_text(f"n|text\n{wrong}|x\n")
        if decimal == "." or "." in wrong:
            with pytest.raises(DataError, match="is not a number"):
                read_table(path, columns, declared)
    if decimal == ".":
        with pytest.raises(ValueError, match="thousands and decimal are both"):
            FileFormat.model_validate({"thousands": "."})


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_optional_columns_may_be_missing(tmp_path: Path, suffix: str) -> None:
    frame, path = pd.DataFrame({"user": ["a", "b"]}), tmp_path / f"log{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    kinds: list[ColumnType] = ["text", "texts", "number"]
    columns = [Column("user"), *(Column(kind, kind, required=False) for kind in kinds)]
    layout = FileFormat(optional=("user", *kinds))
    table = read_table(path, columns, layout).to_pydict()
    assert table == {
        "user": ["a", "b"],
        "text": [None] * 2,
        "texts": [[]] * 2,
        "number": [None] * 2,
    }
    assert find_lists(path, ["user", "texts"], layout) == {"user": False}
    with pytest.raises(DataError, match="no column 'text'"):
        read_table(path, columns, FileFormat(optional=("number",)))
    with pytest.raises(DataError, match="no column 'item'"):  # a row needs it
        read_table(path, [*columns, Column("item")], FileFormat(optional=("item", *kinds)))


def test_lists_are_detected_in_the_first_file_that_has_the_column(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("user,item\nu,i\n")
    (tmp_path / "2.csv").write_text("user,item,tags,device\nu,i,,desk\n")
    (tmp_path / "3.csv").write_text("user,item,tags,device\nu,i,\"['a', 'b']\",desk\n")
    data = DataConfig.model_validate(
        {
            "interactions": {"file": "*.csv", "user": "user", "item": "item"},
            "features": [{"name": "tags"}, {"name": "device"}],
            "files": {"1.csv": {"optional": ["tags", "device"]}},
        }
    )
    tags, device = detect_lists(data, input_files(data, tmp_path)).features
    assert (tags.several, device.several) == (True, None)


@pytest.mark.parametrize(
    ("cell", "layout", "expected"),
    [
        ("1,600,000,000", {"thousands": ","}, (1_600_000_000, 0)),
        ("1.600.000.000,25", {"thousands": ".", "decimal": ","}, (1_600_000_000, 250_000_000)),
        ("2020-01-31 10:00", {"thousands": ","}, (1_580_464_800, 0)),
        ("20200131", {"thousands": ","}, (20_200_131, 0)),
    ],
)
def test_times_have_the_separators_of_the_file(
    tmp_path: Path, cell: str, layout: dict[str, str], expected: tuple[int, int]
) -> None:
    (tmp_path / "a.csv").write_text(f"at\n{cell}\n")
    layout = {"delimiter": "|"} | layout
    table = read_table(
        tmp_path / "a.csv", [Column("at", "time")], FileFormat.model_validate(layout)
    )
    [time] = table["at"].to_pylist()
    assert (time["whole"], time["billionths"]) == expected


def test_numbers_to_derive_from_have_the_separators_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x\n1.234,5\n7,5\n")
    feature = Feature.model_validate({"name": "x", "derive": "log_squared"})
    layout = FileFormat.model_validate({"delimiter": ";", "decimal": ",", "thousands": "."})
    cells = read_table(path, [column_of(feature)], layout)["field x"].combine_chunks()
    _, texts = split_cells(cells, feature)
    assert texts.to_pylist() == [str(int(math.log(x) ** 2)) for x in (1234.5, 7.5)]


@pytest.mark.parametrize("mark", [",", "."])
def test_times_to_derive_from_have_the_separators_of_the_file(tmp_path: Path, mark: str) -> None:
    path, decimal = tmp_path / "a.csv", "," if mark == "." else "."
    path.write_text("x\n" + f"{1_600_000_000:,}\n".replace(",", mark))  # 12:26:40 UTC
    feature = Feature.model_validate({"name": "x", "derive": "hour", "time_format": "s"})
    layout = {"delimiter": ";", "decimal": decimal}
    with pytest.raises(DataError, match=rf"say so in data.files: .*thousands: \"\{mark}\""):
        read_table(path, [column_of(feature)], FileFormat.model_validate(layout), name="a.csv")
    declared = FileFormat.model_validate(layout | {"thousands": mark})
    cells = read_table(path, [column_of(feature)], declared)["field x"].combine_chunks()
    assert split_cells(cells, feature)[1].to_pylist() == ["12"]


def test_true_and_false_are_numbers_in_text_as_in_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n\nTrue\nfalse\n2\n")
    assert read_table(tmp_path / "a.csv", NUMBERS[:1])["n"].to_pylist() == [1, 0, 2]
    pq.write_table(pa.table({"n": [True, False]}), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet", NUMBERS[:1])["n"].to_pylist() == [1, 0]


def test_an_escape_makes_the_next_character_text(tmp_path: Path) -> None:
    """As in Book-Crossing; the quotes are followed over blocks of any size."""
    path = tmp_path / "a.csv"
    rows = ['1;"The \\"Book\\""', '2;"a\\";b"', '3;"c\\\\"', "4;d\\;e", '5;"say ""yes"""']
    path.write_text("id;title\n" + "\n".join(rows * 40) + "\n", encoding="latin-1")
    columns, layout = [Column("id"), Column("title")], {"delimiter": ";", "encoding": "latin-1"}
    escaped = FileFormat.model_validate(layout | {"escape": "\\"})
    titles = ['The "Book"', 'a";b', "c\\", "d;e", 'say "yes"']
    for block_bytes in (64, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
            assert read_table(path, columns, escaped)["title"].to_pylist() == titles * 40
    with pytest.raises(DataError, match="line 2: text follows the closing quote") as caught:
        read_table(path, columns, FileFormat.model_validate(layout), name="a.csv")
    cure = yaml.safe_load(str(caught.value).partition("in data.files: ")[2])
    assert cure == {"a.csv": {"escape": "\\"}}
    path.write_text('id;title\n1;"x\\"\n')
    with pytest.raises(DataError, match="line 2: a cell begins with a quote that is not closed"):
        read_table(path, columns, escaped)
    path.write_text('id;title\n1;"x\\"y"\n2;z;z\n')
    with pytest.raises(DataError, match="line 3: 3 cells instead of 2"):
        read_table(path, columns, escaped)
    with pytest.raises(DataError, match="line 3: 3 cells instead of 2"):
        read_table(path, columns, escaped.model_copy(update={"quoted": False}))


@pytest.mark.parametrize("written", ["\\t", "\\x09", "\\u0009", "\\011", "\t"])
def test_a_tab_may_be_written_with_a_backslash(tmp_path: Path, written: str) -> None:
    assert FileFormat(delimiter=written).delimiter == "\t"
    assert Feature(name="a", separator=written).separator == "\t"
    (tmp_path / "a.txt").write_bytes(CSV.replace(b",", b"\t"))
    found = read_table(tmp_path / "a.txt", COLUMNS, FileFormat(delimiter=written))
    assert found.to_pydict() == EXPECTED


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"escape": "ab"}, "escape: one ASCII character"),
        ({"escape": "|", "delimiter": "|"}, "escape and delimiter are both"),
        ({"delimiter": "\n"}, "delimiter: '\\\\n' ends a line"),
        ({"decimal": ";"}, "decimal"),
    ],
)
def test_layouts_that_cannot_be_are_refused(layout: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FileFormat.model_validate(layout)


def test_a_header_is_not_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text(" User ,score\na,1\n")
    named = FileFormat(columns=("user", "score"))
    with pytest.raises(DataError, match=r"first line is a header, ' User ,score', .*leave columns"):
        read_table(path, COLUMNS, named)
    with pytest.raises(DataError, match="first line is a header"):
        read_table(path, COLUMNS[:1], named, "skip")
    path.write_text("user,points\na,1\n")
    assert len(read_table(path, COLUMNS, named, "skip")) == 1
    assert "its first line looks like a header, 'user,points', and is read as a row" in caplog.text


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        (
            "a.parquet",
            {"delimiter": ";"},
            "delimiter does not apply to .parquet files; leave it out",
        ),
        ("a.json", {"columns": ["user"]}, "columns does not apply to .jsonl files"),
    ],
)
def test_settings_that_a_format_has_no_use_for_are_refused(
    tmp_path: Path, name: str, layout: dict[str, Any], said: str
) -> None:
    pq.write_table(TABLE, tmp_path / name) if "parquet" in name else None
    (tmp_path / "a.json").write_text('{"user": "a", "score": 1}')
    with pytest.raises(DataError, match=said):
        read_table(tmp_path / name, COLUMNS, FileFormat.model_validate(layout))


def test_the_cure_for_nan_in_parquet_cures(tmp_path: Path) -> None:
    """Of a field's numbers; NaN is a number to nobody."""
    table = pa.table({"n": [1.5, float("nan")], "text": ["NULL", "2"]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name, expected in (("n", [1.5, None]), ("text", [None, 2.0])):
        column = Column(name, "number", required=False)
        with pytest.raises(DataError, match="where it means no value, leave the cell empty, or"):
            read_table(tmp_path / "a.parquet", [column])  # whose fields are trained already
        with pytest.raises(DataError, match="where it means no value, set missing: ") as caught:
            read_table(tmp_path / "a.parquet", [column], on_bad_row="error")
        cure = str(caught.value).partition(", set ")[2].partition(" for its field")[0]
        words = yaml.safe_load(cure)["missing"]
        column = Column(name, "number", required=False, missing=tuple(words))
        assert read_table(tmp_path / "a.parquet", [column])[name].to_pylist() == expected


def test_quoted_names_are_reported_if_quotes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"user","score"\n"a",1\n')
    with pytest.raises(DataError, match="its names are in quotes: leave quoted: false out of"):
        read_table(tmp_path / "a.csv", COLUMNS, FileFormat(quoted=False))


@pytest.mark.parametrize(
    ("cell", "values"),
    [
        ("{a,b}", ["a", "b"]),
        ('{"b c",a}', ["b c", "a"]),
        ('{"say \\"x\\"",NULL,d}', ['say "x"', "d"]),
        ("{}", []),
        ("{3F2504E0-4F89-11D3-9A0C-0305E82C3301}", ["{3F2504E0-4F89-11D3-9A0C-0305E82C3301}"]),
        ('{"a": 1}', ['{"a": 1}']),
    ],
)
def test_arrays_as_postgresql_writes_them_are_lists(
    tmp_path: Path, cell: str, values: list[str]
) -> None:
    frame = pd.DataFrame({"c": [cell, "{x,y}", "{z}"]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert find_lists(tmp_path / "a.csv", ["c"]) == {"c": True}
    read = read_table(tmp_path / "a.csv", [Column("c", "texts", required=False)])
    assert read["c"].to_pylist() == [values, ["x", "y"], ["z"]]
    pd.DataFrame({"c": ["{a}", "{b}"]}).to_csv(tmp_path / "b.csv", index=False)
    assert find_lists(tmp_path / "b.csv", ["c"]) == {"c": False}


def test_lists_of_lists_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"c": [[["a"], ["b", "c"]]]}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('c\n"[[1], [2, 3]]"\n')
    for name in ("a.parquet", "a.csv"):
        with pytest.raises(DataError, match=r"'c' holds lists of lists; write each cell as one li"):
            read_table(tmp_path / name, [Column("c", "texts")])


def test_an_item_above_its_rows_is_written_into_them_by_the_command_that_is_named(
    tmp_path: Path,
) -> None:
    text = "1:\n1488844,3,2005-09-06\n822109,5,2005-05-13\n2:\n885013,4,2005-10-19\n"
    (tmp_path / "combined_data_1.txt").write_text(text)
    layout = FileFormat(columns=("user", "rating", "day"))
    for given in (None, layout):
        with pytest.raises(DataError, match=r"line 1: '1:' stands above the rows of an ite") as why:
            read_table(tmp_path / "combined_data_1.txt", [Column("user")], given, "skip")
    command = str(why.value).partition("each row: ")[2].partition(", and name")[0]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    layout = FileFormat(columns=("item", "user", "rating", "day"))
    columns = [Column("item"), Column("user"), Column("rating", "number")]
    read = read_table(tmp_path / "combined_data_1-rows.txt", columns, layout)
    assert read.to_pydict() == {
        "item": ["1", "1", "2"],
        "user": ["1488844", "822109", "885013"],
        "rating": [3, 5, 4],
    }


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "text", [b"# a table\n" + CSV, b"# of users, and scores\n" + CSV, CSV + b"# end\n"]
)
def test_comments_are_left_out_by_the_command_that_is_named(
    tmp_path: Path, suffix: str, text: bytes
) -> None:
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(gzip.compress(text) if suffix else text)
    with pytest.raises(DataError, match=r"comment; write it without comments: ") as why:
        read_table(path, COLUMNS)
    command = str(why.value).partition("without comments: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_table(tmp_path / "a-rows.csv", COLUMNS).to_pydict() == EXPECTED


def test_a_comment_that_may_be_a_row_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_text("# user,0\n007,1.5\n")
    read_table(tmp_path / "a.csv", COLUMNS, FileFormat(columns=("user", "score")))
    assert "looks like a comment, '# user,0', and is read as a row" in caplog.text
    (tmp_path / "b.csv").write_text("#user,score\n007,1.5\n")
    with pytest.raises(DataError, match="remove the # at the beginning of its header line"):
        read_table(tmp_path / "b.csv", COLUMNS)


def _of_cells(cells: pa.Array) -> pa.Table:
    return pa.table({"user": pa.array(["a", "b"]), "g": cells})


def _twice_in_parquet(path: Path, kind: str) -> None:
    cells = {
        "struct": lambda: pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["n", "n"]),
        "map": lambda: pa.array([[("n", 1)], [("n", 1)] * 2], pa.map_(pa.string(), pa.int8())),
        "text": lambda: pa.array(['{"n": 1}', '{"n": 1, "m": 2, "n": 3}']),
        "literal": lambda: pa.array(["{'n': 1}", "{'n': 1, 'm': 2, 'n': 3}"]),
    }[kind]()  # fmt: skip
    pq.write_table(_of_cells(cells), path)


@pytest.mark.parametrize("kind", ["struct", "map", "text", "literal"])
def test_a_member_that_comes_twice_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    _twice_in_parquet(path, kind)
    with pytest.raises(DataError, match=r"column 'g\.n' holds an object with two members 'n'"):
        read_table(path, [Column("user"), Column("g.n")])
    if kind != "struct":
        assert read_table(path, [Column("g.m", required=False)]).num_rows == 2


@pytest.mark.parametrize(
    "line", ['{"user": "a", "user": "b"}', '{"user": "a", "g": {"n": 1, "n": 1}}']
)
def test_a_member_of_a_json_line_that_comes_twice_is_a_bad_row(tmp_path: Path, line: str) -> None:
    path, good = (
        tmp_path / "a.jsonl",
        '{"user": "x", "g": {"n": 3, "m": 1, "m": 1}, "z": 1, "z": 2}',
    )
    columns = [Column("user"), Column("g.n", required=False)]
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=r"line 2: .* holds an object with two members '(user|n)'"):
        read_table(path, columns)
    dropped = Counter[str]()
    table = read_table(path, columns, on_bad_row="skip", dropped=dropped)
    assert table.to_pydict() == {"user": ["x", "x"], "g.n": ["3", "3"]}
    assert sum(dropped.values()) == 1
    path.write_text(f"[{good}, {line}]")
    with pytest.raises(DataError, match="two members"):
        read_table(path, columns)


def test_a_member_that_no_object_has_is_named_when_lists_are_looked_for(tmp_path: Path) -> None:
    pq.write_table(_of_cells(pa.array([{"n": 1}, {"n": 2}])), tmp_path / "a.parquet")
    for name in ("g.m", "user.m"):
        with pytest.raises(DataError, match="has no member 'm'"):
            find_lists(tmp_path / "a.parquet", [name])


def test_one_file_of_a_pattern_may_be_laid_out_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u,i\na,x\n")
    (tmp_path / "b.csv").write_text("b;y\n")
    data = {
        "interactions": {"file": "*.csv", "user": "u", "item": "i"},
        "features": [{"name": "item", "entity": "item"}],
        "split": {"valid": 0, "test": 0},
    }
    with pytest.raises(DataError, match=r"b\.csv: no column 'u'.* alone \{b\.csv: \{.*columns: \["):
        prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "out", 1)
    data["files"] = {"b.csv": {"delimiter": ";", "columns": ["u", "i"]}}
    manifest = prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "out", 1)
    assert manifest.splits["train"].rows == 2
    for name in ("c.csv", "c.txt"):  # none of the files
        data["files"] = {name: {"delimiter": ";"}}
        with pytest.raises(ConfigError, match=f"'{name}' is not a file that is read"):
            prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "out", 1)


def test_lists_behind_the_first_rows_say_how_to_read_them(tmp_path: Path) -> None:
    pq.write_table(pa.table({"u": ["a"], "i": ["x"], "tag": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"u": ["b"], "i": ["x"], "tag": [["t", "s"]]}), tmp_path / "b.parquet")
    tag: dict[str, Any] = {"name": "tag"}
    data = {
        "interactions": {"file": "*.parquet", "user": "u", "item": "i"},
        "features": [{"name": "item", "entity": "item"}, tag],
        "split": {"valid": 0, "test": 0},
    }
    with pytest.raises(DataError, match=r"set several: true for the field tag$"):
        prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "out", 1)
    tag["several"] = True
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "out", 1)
    assert pq.read_table(tmp_path / "out/vocabulary/tag.parquet").num_rows == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_lists_are_refused_as_single_values(tmp_path: Path, name: str) -> None:
    """An id of such a member would be the text of the list."""
    path, bags = tmp_path / name, [{"id": ["x", "y"]}, {"id": ["z"]}]
    if name == "a.jsonl":
        path.write_text("".join(json.dumps({"user": "a", "g": bag}) + "\n" for bag in bags))
    elif name == "a.csv":
        pd.DataFrame({"user": "a", "g": [json.dumps(bag) for bag in bags]}).to_csv(path)
    else:
        pq.write_table(pa.table({"user": ["a", "a"], "g": bags}), path)
    with pytest.raises(DataError, match="holds lists where one value is expected; write a row"):
        read_table(path, [Column("user"), Column("g.id")])
    with pytest.raises(DataError, match=r"holds lists .*; set several: true for the field g$"):
        field = Column("g.id", purpose="field g", required=False)
        read_table(path, [Column("user"), field], on_bad_row="error")
    table = read_table(path, [Column("user"), Column("g.id", "texts")])
    assert table["g.id"].to_pylist() == [["x", "y"], ["z"]]


def test_objects_with_commas_behind_them_are_written_without_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": "a", "score": 1, "more": true},\n{"user": "b", "score": 2},\n')
    with pytest.raises(DataError, match="line 1: a comma after an object") as caught:
        read_table(path, COLUMNS)
    command = str(caught.value).partition("without: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    written = tmp_path / shlex.split(command)[-1]
    assert read_table(written, COLUMNS)["user"].to_pylist() == ["a", "b"]


def test_json_of_other_shapes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    pd.DataFrame({"user": ["a", "b"], "score": [1, 2]}).to_json(path)
    with pytest.raises(DataError, match=r"which pandas' to_json writes .*lines=True\)$"):
        read_table(path, COLUMNS)
    path.write_text('{\n "user": "a", "score": 1\n}\n')
    with pytest.raises(DataError, match=r"not on one line; .*cat \S+a\.json \| jq -c \. > a-rows"):
        read_table(path, COLUMNS)
    path.write_bytes('{"user": "a", "score": 1}\n'.encode("utf-16"))
    with pytest.raises(DataError, match=r"data\.files: \{a\.json: \{encoding: utf-16\}\}"):
        read_table(path, COLUMNS, name="a.json")
    layout = FileFormat(encoding="utf-16")
    assert read_table(path, COLUMNS, layout)["user"].to_pylist() == ["a"]
