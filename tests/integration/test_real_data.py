"""Real files in the format in which they are published."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq

from deepfm_dist.config import load_config
from deepfm_dist.data.encode import prepare


def test_movielens_as_published_prepares_as_its_parquet_copy(
    real_data: Path, tmp_path: Path
) -> None:
    source = real_data / "ml-1m"
    rows = pq.read_table(source / "ml1m_implicit_ctr.parquet").to_pandas()
    rows["rating"] = rows["rating"].clip(lower=3)  # the copy has 0 for what is below 4
    columns = [rows[name] for name in ("user", "item", "rating", "ts")]
    with (tmp_path / "ratings.dat").open("w", encoding="latin-1") as file:
        file.writelines(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in zip(*columns, strict=True))
    for name in ("movies.dat", "users.dat"):
        shutil.copy(source / name, tmp_path)
    as_published = load_config("movielens_dat")
    copy = load_config(
        "movielens_1m", ["data.interactions.split=null", "data.split.method=temporal"]
    )
    folders = tmp_path / "dat", tmp_path / "parquet"
    prepare(as_published.data, tmp_path, folders[0], seed=1)
    prepare(copy.data, source, folders[1], seed=1)
    written = [
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.parquet")}
        for folder in folders
    ]
    assert written[0].keys() == written[1].keys()
    assert Path("entities/user.parquet") in written[0]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []
