import gzip
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepfm_dist.data import sources
from deepfm_dist.data.schema import FileFormat
from deepfm_dist.data.sources import Column, read_table
from deepfm_dist.errors import DataError

COLUMNS = [Column("user"), Column("score", "number"), Column("at", "time")]
EXPECTED = {"user": ["007", "b"], "score": [1.5, -2.0], "at": [10, 86400]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "at,user,score\n10,007,1.5\n1970-01-02 00:00:00,b,-2\n"),
        ("a.tsv", "user\tscore\tat\n007\t1.5\t10\n\nb\t-2\t86400.9\n"),
        ("a.dat", "user::score::at\n007::1.5::10\nb::-2::86400\n"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_text_files_are_read(tmp_path: Path, name: str, text: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read_table(path, COLUMNS).to_pydict() == EXPECTED


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
        ("user,score,at\na,1,2\n\n\nb,x,3\n", "line 5: score 'x' is no number"),
        ("user,score,at\na,1,2\nb,nan,3\n", "line 3: score 'nan' is no number"),
        ("user,score,at\na,1,2\n,1,3\n", "line 3: user '' is empty"),
        ("user,score,at\na,1,soon\n", "line 2: at 'soon' is no time"),
        ("user,score,at\na,1,2\nb,1\n", "line 3: 2 cells where 3 are expected: 'b,1'"),
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


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user,score,at\na,1,2\nb,x,3\nc,1\n,1,1\nd,2,4\n")
    dropped: Counter[str] = Counter()
    table = read_table(path, COLUMNS, on_bad_row="skip", dropped=dropped)
    assert table["user"].to_pylist() == ["a", "d"]
    assert sorted(dropped.values()) == [1, 2]


def test_lines_are_counted_over_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 200)
    rows = [f"u{i},{i},{i}" for i in range(100)]
    rows[77] = "u77,oops,77"
    (tmp_path / "a.csv").write_text("\n".join(["user,score,at", *rows]))
    with pytest.raises(DataError, match="line 79: score 'oops'"):
        read_table(tmp_path / "a.csv", COLUMNS)
