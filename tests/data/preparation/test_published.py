"""Published data sets, real and generated."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deepfm_dist.config import Config, load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.errors import DataError
from tests.ranks import run_alone
from tests.steps import Run


@pytest.mark.parametrize("name", ["aistages", "movielens_latest_small", "movielens_1m", "notebook"])
def test_real_data_is_prepared(name: str, real_data: Path, tmp_path: Path) -> None:
    config = load_config(
        name, [f"data.root={real_data / load_config(name).data.root.split('/')[-1]}"]
    )
    manifest = prepare(config.data, config.data_root, tmp_path / name, 1)
    rows, n_pairs = config.data.interactions, 0
    for file in filter(None, (rows.file, config.data.split.test_file)):
        path = config.data_root / str(file)
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        if rows.min_rating is not None:
            frame = frame[frame[rows.rating] >= rows.min_rating]
        n_pairs += len(frame[[rows.user, rows.item]].drop_duplicates())
    assert sum(split.positives for split in manifest.splits.values()) == n_pairs > 30_000


def test_criteo_rows_real_and_generated_are_prepared(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)

    def cell(column: int) -> str:
        if rng.random() < 0.2:
            return ""
        return str(rng.integers(-2, 99)) if column < 13 else f"{rng.integers(30) + column:08x}"

    lines = ["\t".join([str(k % 4 // 3), *(cell(c) for c in range(39))]) for k in range(2000)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    config = load_config("criteo", [f"data.root={tmp_path}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert (len(manifest.dense), len(manifest.categorical)) == (13, 26)
    assert [s.rows for s in manifest.splits.values()] == [1600, 200, 200]
    rows = PreparedDataset(tmp_path / "d").rows("train")
    order = np.sort(np.asarray(rows.context["I1"]))
    assert order[0] == pytest.approx(-np.log1p(2))
    assert all(manifest.tables[f"C{c}"].rows <= 31 for c in range(1, 27))
    lines[7] += "\textra"
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train\.txt, line 8: 41 cells instead of 40"):
        prepare(config.data, config.input_root, tmp_path / "d", 1)


def test_avazu_rows_are_prepared(tmp_path: Path) -> None:
    config = load_config("avazu", [f"data.root={tmp_path}"])
    names = ["id", "click", *(f.name for f in config.data.features)]
    lines = [",".join(names)]
    for k in range(500):
        values = [f"{k * 7919 % 97:08x}" for _ in config.data.features]
        lines.append(",".join([str(10**19 + k), str(k % 5 // 4), *values]))
    (tmp_path / "train.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert manifest.splits["train"].positives + manifest.splits["valid"].positives <= 100
    assert manifest.tables["device_ip"].rows == 1_000_001
    assert manifest.tables["hour"].rows <= 98


def _as_published(name: str, column: str, row: int, rng: np.random.Generator) -> str:
    """A cell in the form in which RecZoo publishes the data sets."""
    if name == "criteo_x1":
        return f"{rng.random():.6f}" if column[0] == "I" else str(rng.integers(50) + 1)
    if name == "criteo_x4":
        missing = rng.random() < 0.2
        count = f"{rng.integers(-2, 5000)}.0" if rng.random() < 0.5 else str(rng.integers(9))
        return "" if missing else count if column[0] == "I" else f"{rng.integers(40):08x}"
    if name == "avazu_x4" and column == "hour":
        return f"1410{21 + row % 10}{row % 24:02}"
    return str(rng.integers(60))


@pytest.mark.parametrize(
    "name", ["criteo_x1", "criteo_x4", "avazu_x1", "avazu_x4", "movielens_latest_x1"]
)
def test_published_splits_are_prepared_and_trained_on(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    overrides = [f"data.root={tmp_path}", "trainer.batch_size=512", "trainer.max_steps=2"]
    config = load_config(name, overrides)
    columns = list(dict.fromkeys(f.column or f.name for f in config.data.features))
    unused = ["id"] if name == "avazu_x4" else []
    for split, n in (("train", 1000), ("valid", 200), ("test", 100)):
        lines = [[*unused, str(config.data.interactions.label), *columns]]
        for row in range(n):
            cells = [_as_published(name, column, row, rng) for column in columns]
            lines.append([*(["9" * 19] if unused else []), f"{row % 4 // 3}.0", *cells])
        text = "\n".join(",".join(line) for line in lines)
        (tmp_path / f"{split}.csv").write_text(text + "\n")
    manifest = prepare(config.data, config.input_root, tmp_path / "d", 1)
    assert [s.rows for s in manifest.splits.values()] == [1000, 200, 100]
    assert [f.name for f in manifest.features] == [f.name for f in config.data.features]
    dataset = PreparedDataset(tmp_path / "d")
    ids = {table: dataset.vocabulary(table).ids.to_pylist() for table in manifest.tables}
    if name == "criteo_x4":
        numbers = {int(i) for i in ids["I1"]}
        assert {0, 1, 2} < numbers <= {*range(-2, 1 + int(np.log(5000) ** 2))}
        assert "empty" in ids["C1"] and manifest.tables["C1"].rows <= 42
    if name == "avazu_x4":
        assert len(ids["hour"]) == 24 and len(ids["weekday"]) == 7 and len(ids["weekend"]) == 2
    assert all(0.3 < loss < 1.5 for loss in run_alone(_losses, tmp_path / "d", config))


def _losses(folder: Path, config: Config) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        return run.losses(1, 2)


def test_criteo_and_frappe_as_they_are(real_data: Path, tmp_path: Path) -> None:
    shutil.copy(real_data / "criteo-sample" / "criteo_7200.tsv", tmp_path / "train.txt")
    config = load_config("criteo", [f"data.root={tmp_path}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "criteo", 1)
    assert sum(s.rows for s in manifest.splits.values()) == 7200
    config = load_config("frappe", [f"data.root={real_data / 'frappe-x1'}"])
    manifest = prepare(config.data, config.input_root, tmp_path / "frappe", 1)
    assert (manifest.splits["train"].rows, manifest.splits["valid"].rows) == (202_027, 57_722)
    assert [t.rows - 1 for t in manifest.tables.values()][2:7] == [7, 7, 2, 3, 2]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_row_wise_shard_of_real_items_is_hot(real_data: Path, tmp_path: Path, seed: int) -> None:
    config = load_config("aistages", [f"data.root={real_data / 'aistages'}"])
    prepare(config.data, config.input_root, tmp_path / "d", seed)
    counts = PreparedDataset(tmp_path / "d").popularity()
    block = -(-len(counts) // 4)  # TorchRec cuts ceil(rows / ranks) rows for each rank
    shards = np.add.reduceat(counts, np.arange(0, len(counts), block))
    assert shards.max() <= 1.15 * shards.mean()
    assert np.sort(counts)[::-1][:block].sum() > 0.8 * counts.sum()  # what sorting would do
