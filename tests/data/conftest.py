"""Fixtures of the tests of data."""

from pathlib import Path

import pytest

from tests.data.small_logs import GENRES, HELD_OUT, PEOPLE, ROWS


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
