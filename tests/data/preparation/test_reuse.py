"""Datasets are prepared again only if needed; an interrupted preparation leaves the old one."""

import logging
import os
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.errors import DataError
from tests.data.small_logs import ROWS, USER_AND_ITEM, contents, made, made_of, pairs_of, small


def test_a_changed_input_or_setting_is_prepared_again(root: Path) -> None:
    made(root)
    first = (root / "out/d/manifest.json").stat().st_mtime_ns
    made(root)
    assert (root / "out/d/manifest.json").stat().st_mtime_ns == first
    assert "title" in pq.read_schema(root / "out/d/entities/item.parquet").names
    made(root, titles=None)
    assert "title" not in pq.read_schema(root / "out/d/entities/item.parquet").names
    (root / "rows.csv").write_text(ROWS + "c,y2,9,5,10,calm,80\n")
    assert made(root, titles=None).manifest.entities["item"] == 6
    assert [p.name for p in (root / "out").iterdir()] == ["d"]


@pytest.mark.parametrize("change", ["seed", "setting", "contents", "unreadable row", "nothing"])
def test_any_change_counts(root: Path, change: str) -> None:
    rows = "u,i\n" + "".join(f"{k % 3},{k}\n" for k in range(10, 20))
    small(root, rows, str(USER_AND_ITEM))
    before = PreparedDataset(root / "out" / "s").manifest
    spec = before.data.model_dump() | {"name": "other", "root": "elsewhere"}  # these do not count
    # As in the saved settings of a run for which the recipe chose no history.
    spec["history"] |= {"add": False, "targets": "random", "dropout": 0.0}
    if change == "setting":
        spec["negatives"] = {"per_positive": 2}
    if change == "contents":  # of the same length
        (root / "s.csv").write_text(rows.replace("19", "20"))
        os.utime(root / "s.csv", ns=(1, 1))
    if change == "unreadable row":
        spec["on_bad_row"] = "skip"
    after = made_of(root, spec, seed=1 + (change == "seed")).manifest
    assert (after.fingerprint == before.fingerprint) == (change == "nothing")
    assert (after.vocabulary_hash == before.vocabulary_hash) == (change not in ("seed", "contents"))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("s.csv", "", ""),  # at other times
        ("s.csv", "\n0,0,0,1\n1,1,1,1", "\n0,0,1,1\n1,1,0,1"),
        ("s.csv", "\n0,0,0,1\n1,1,1,1", "\n0,1,0,1\n1,0,1,1"),
        ("s.csv", "\n0,0,0,1", "\n0,0,0,2"),
        ("side.csv", "2,4", "2,5"),
        ("v.csv", "0,1,1", "0,2,1"),
    ],
    ids=["nothing", "labels", "items", "weight", "field", "held out"],
)
def test_the_datas_hash_is_of_all_that_is_trained_on(
    root: Path, name: str, old: str, new: str
) -> None:
    texts = {
        "s.csv": "u,i,y,w\n" + "".join(f"{k % 3},{k % 7},{k % 2},1\n" for k in range(50)),
        "v.csv": "u,i,y,w\n0,1,1,1\n1,2,0,1\n",
        "side.csv": "i,n\n1,3\n2,4\n",
    }
    of_items = {"name": "n", "entity": "item", "file": "side.csv", "kind": "numeric"}
    spec = {
        "task": "ctr",
        "interactions": {"file": "s.csv", "user": "u", "item": "i", "label": "y", "weight": "w"},
        "features": [*USER_AND_ITEM, of_items],
        "split": {"valid_file": "v.csv", "test": 0},
    }

    def made_at(time_ns: int) -> Manifest:
        for file, text in texts.items():
            (root / file).write_text(text)
            os.utime(root / file, ns=(1, time_ns))
        return made_of(root, spec).manifest

    before = made_at(1)
    assert old in texts[name]
    texts[name] = texts[name].replace(old, new, 1)
    after = made_at(2)
    assert after.fingerprint != before.fingerprint
    assert after.vocabulary_hash == before.vocabulary_hash
    assert (after.data_hash == before.data_hash) == (old == new)


@pytest.mark.parametrize("change", ["boundaries", "mean", "hash_rows", "buckets", "transform"])
def test_a_checkpoint_fits_only_what_its_numbers_and_hashes_were(root: Path, change: str) -> None:
    def hash_after(number: int, rows: int, buckets: int, of_x: str) -> str:
        fields = f"""[{{name: h, column: i, hash_rows: {rows}}},
          {{name: n, kind: numeric, transform: bucket, buckets: {buckets}}},
          {{name: x, kind: numeric, transform: {of_x}}}]"""
        x, n = (number, 1) if change == "mean" else (1, number)
        lines = "".join(f"u,{k},{k * n},{k * x}\n" for k in range(40))
        small(root, f"u,i,n,x\n{lines}", fields)
        return PreparedDataset(root / "out" / "s").manifest.vocabulary_hash

    before = hash_after(1, 5, 4, "standard")
    assert hash_after(1, 5, 4, "standard") == before
    assert before != hash_after(
        1 + (change in ("boundaries", "mean")),
        5 + (change == "hash_rows"),
        4 + (change == "buckets"),
        "none" if change == "transform" else "standard",
    )


def test_what_a_killed_preparation_left_is_cleared(root: Path) -> None:
    """On this machine: of another one's, nobody here knows whether it is still at work."""
    host, init = socket.gethostname(), 1
    dead = [f".d.part-{host}-999999999", f".d.part-{host}-{os.getpid()}"]
    alive = [f".d.part-{host}-{init}", ".d.part-other-9", ".d[1].part-x-2", ".dd.part-x-3"]
    for name in (*dead, *alive):
        (root / "out" / name / "dataset" / "train").mkdir(parents=True)
    made(root)
    assert sorted(p.name for p in (root / "out").iterdir()) == sorted(["d", *alive])


def test_a_folder_that_cannot_be_written_is_named(root: Path) -> None:
    (root / "out").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        made(root)


@pytest.mark.parametrize("text", ['{"format":', "{}"])
def test_a_damaged_manifest_is_named_when_it_is_prepared_again(
    root: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = made(root).folder
    wanted = contents(folder)
    (folder / "manifest.json").write_text(text)
    with caplog.at_level(logging.INFO):
        made(root)
    assert contents(folder) == wanted
    assert "manifest.json: not a manifest of this version" in caplog.text
    assert "of other inputs or settings" not in caplog.text


def test_an_error_leaves_the_earlier_dataset_unchanged(root: Path) -> None:
    dataset = small(root, "u,i\na,x\n")
    before = {p: p.read_bytes() for p in dataset.folder.rglob("*.parquet")}
    with pytest.raises(DataError, match="line 2: u '' is empty"):
        small(root, "u,i\n,x\n")
    assert {p: p.read_bytes() for p in (root / "out").rglob("*.parquet")} == before
    assert [p.name for p in (root / "out").iterdir()] == ["s"]
    (dataset.folder / "manifest.json").write_text("{}")  # as of another version: made anew
    assert pairs_of(small(root, "u,i\nb,x\n"), "train") == [("b", "x")]


def test_a_folder_of_other_things_is_never_replaced(root: Path) -> None:
    thesis = root / "out" / "s" / "thesis.tex"
    thesis.parent.mkdir(parents=True)
    small(root, "u,i\na,x\n")  # an empty folder is no loss
    for path in [p for p in thesis.parent.rglob("*") if p.is_file()]:
        path.unlink()
    thesis.write_text("years of work")
    with pytest.raises(DataError, match="holds files but no prepared dataset"):
        small(root, "u,i\na,x\n")
    assert thesis.read_text() == "years of work"
