"""Vectors of users and items: read from any layout, scaled, one float16 row each; or one line."""

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.manifest import GIVEN, settings_of
from deepfm_dist.data.preparation.dry_run import dry_run
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig, Feature
from deepfm_dist.errors import ConfigError, DataError

ROWS = "u,i\na,x\na,y\nb,x\nb,z\nc,y\n"
VECTORS = {"x": [1.0, 2.0, 2.0], "y": [0.0, -4.0, 3.0], "new": [6.0, 0.0, 0.0]}
SCALE = np.sqrt((9 + 25) / 2)  # the root mean square of the lengths of x and y, which are trained
FIELD = {"name": "text", "entity": "item", "kind": "vector", "file": "v.parquet"}


def spec_of(field: dict[str, Any], **changes: Any) -> dict[str, Any]:
    ids = [{"name": "user", "entity": "user"}, {"name": "item", "entity": "item"}]
    return {
        "interactions": {"file": "s.csv", "user": "u", "item": "i"},
        "features": [*ids, field],
        "split": {"valid": 0, "test": 0},
    } | changes


def made(folder: Path, field: dict[str, Any], **changes: Any) -> PreparedDataset:
    (folder / "s.csv").write_text(ROWS)
    prepare(DataConfig.model_validate(spec_of(field, **changes)), folder, folder / "out" / "d", 1)
    return PreparedDataset(folder / "out" / "d")


def vectors_of(dataset: PreparedDataset, name: str = "text") -> dict[str | None, list[float]]:
    """Scaled vectors by external id, cold items included; None: the unknown item."""
    ids = dataset.entity_ids("item", cold=True).to_pylist()
    vectors = dataset.entity_fields_with_cold[name]
    assert isinstance(vectors, np.ndarray) and vectors.dtype == np.float16
    return dict(zip(ids, vectors.astype(float).tolist(), strict=True))


def write(folder: Path, vectors: Any, ids: list[str] | None = None) -> None:
    ids = list(VECTORS) if ids is None else ids
    pq.write_table(pa.table({"i": ids, "text": vectors}), folder / "v.parquet")


def lists(kind: pa.DataType) -> pa.Array:
    return pa.array([*VECTORS.values()], kind)


def text(mark: str, ends: str = "  ") -> str:
    cells = [mark.join(str(x) for x in v) for v in VECTORS.values()]
    lines = [f"{i};{ends[0]}{cell}{ends[1]}\n" for i, cell in zip(VECTORS, cells, strict=True)]
    return "i;text\n" + "".join(lines)


def _arrow(kind: pa.DataType) -> Any:
    return lambda folder: write(folder, lists(kind))


def _csv(mark: str, ends: str) -> Any:  # the vector of z is empty
    return lambda folder: (folder / "v.csv").write_text(text(mark, ends) + "z;\n")


def _npy(kind: str) -> Any:
    def save(folder: Path) -> None:
        np.save(folder / "v.npy", np.array([*VECTORS.values()]).astype(kind))
        (folder / "ids.csv").write_text("\n".join(["i", *VECTORS]) + "\n")

    return save


def _npy_packed(folder: Path) -> None:
    _npy("<f4")(folder)
    (folder / "v.npy.gz").write_bytes(gzip.compress((folder / "v.npy").read_bytes()))


def _json(folder: Path) -> None:
    lines = [json.dumps({"i": i, "text": v}) for i, v in (VECTORS | {"z": None}).items()]
    (folder / "v.jsonl").write_text("\n".join(lines))


CSV = FIELD | {"file": "v.csv"}
SEMICOLON = {"files": {"v.csv": {"delimiter": ";"}}}
NPY = FIELD | {"file": "ids.csv", "npy": "v.npy"}
LAYOUTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "list<float>": (_arrow(pa.list_(pa.float32())), FIELD, {}),
    "list<double>": (_arrow(pa.list_(pa.float64())), FIELD, {}),
    "list<int8>": (_arrow(pa.list_(pa.int8())), FIELD, {}),
    "large_list": (_arrow(pa.large_list(pa.float32())), FIELD, {}),
    "fixed size": (_arrow(pa.list_(pa.float32(), 3)), FIELD, {}),
    "half": (_arrow(pa.list_(pa.float16(), 3)), FIELD | {"dim": 3}, {}),
    "in brackets": (_csv(", ", "[]"), CSV, SEMICOLON),
    "separated": (_csv("|", "  "), CSV | {"separator": "|"}, SEMICOLON),
    "JSON": (_json, FIELD | {"file": "v.jsonl"}, {}),
    "npy, packed": (_npy_packed, NPY | {"npy": "v.npy.gz"}, {}),
    "npy float64": (_npy("<f8"), NPY, {}),
    "npy int16, a pattern": (_npy("<i2"), NPY | {"npy": "v*.npy"}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_of_any_layout_are_scaled_by_those_of_trained_items(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save, field, changes = LAYOUTS[layout]
    save(tmp_path)
    with caplog.at_level(logging.WARNING):
        dataset = made(tmp_path, field, **changes)
    spec = dataset.manifest.numeric["text"]
    assert (spec.std, spec.mean) == (pytest.approx(SCALE), 0)
    assert dataset.manifest.vectors == {"text": 3}
    expected = {name: np.array(v) / SCALE for name, v in VECTORS.items()}
    actual = vectors_of(dataset)
    assert actual.keys() == {None, "x", "y", "z", "new"}
    for name, vector in actual.items():
        np.testing.assert_allclose(vector, expected.get(str(name), np.zeros(3)), rtol=1e-3)
    assert "text: 1 of 3 items have no vector; the model gets zeros" in caplog.text
    dataset.files.check_everything()


def test_large_vectors_are_mapped_and_gathered_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path, [*rng.normal(0, 1e6, (3, 40))])
    dataset = made(tmp_path, FIELD)
    held = vectors_of(dataset)
    monkeypatch.setattr("deepfm_dist.data.dataset._VECTORS_IN_MEMORY", 0)
    mapped = PreparedDataset(dataset.folder)
    vectors = mapped.entity_fields_with_cold["text"]
    assert vectors_of(mapped) == held
    assert (dataset.folder / "mapped").is_dir()
    assert isinstance(vectors, np.ndarray) and not vectors.flags.writeable
    batch = Collator(mapped)(np.array([1, 2, -1], np.int32), np.array([4, -1, 1], np.int32))
    expected = np.stack([vectors[4], np.zeros(40, np.float16), vectors[1]])
    assert batch.dense.shape == (3, 40)
    assert np.array_equal(batch.dense.numpy(), expected.astype(np.float32))


def test_one_of_several_vectors_is_kept_independent_of_order(tmp_path: Path) -> None:
    vectors = [[2.0, 1.0], [1.0, 9.0], [1.0, 3.0], [5.0, 5.0]]
    results = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        folder = tmp_path / str(order[0])
        folder.mkdir()
        write(folder, [vectors[k] for k in order], ["xxxy"[k] for k in order])
        dataset = made(folder, FIELD)
        assert dataset.manifest.dropped["repeated text vectors of one item"] == 2
        results.append((dataset.manifest.data_hash, vectors_of(dataset)["x"]))
    assert results[0] == results[1] == results[2]
    np.testing.assert_allclose(np.divide(*results[0][1]), 1 / 3, rtol=1e-3)
    first = made(tmp_path / "3", FIELD | {"keep": "first"})
    np.testing.assert_allclose(np.divide(*vectors_of(first)["x"]), 1 / 3, rtol=1e-3)


def test_only_the_vectors_are_part_of_what_a_dataset_and_its_checkpoints_go_by(
    tmp_path: Path,
) -> None:
    hashes = []
    for x in ([1.0, 2.0, 2.0], [2.0, 1.0, 2.0], [9.0, 9.0, 9.0]):
        folder = tmp_path / str(x)
        folder.mkdir()
        write(folder, [x, *[*VECTORS.values()][1:]])
        manifest = made(folder, FIELD).manifest
        hashes.append((manifest.data_hash, manifest.vocabulary_hash))
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1] == hashes[1][1] != hashes[2][1]  # of another scale


def test_a_grown_dataset_keeps_the_scale_and_the_vectors_that_are_gone(tmp_path: Path) -> None:
    write(tmp_path, lists(pa.list_(pa.float32())))
    earlier = made(tmp_path, FIELD)
    before = vectors_of(earlier)
    write(tmp_path, [[600.0, 0.0, 0.0], [0.0, 0.0, 3.0]], ["y", "z"])
    (tmp_path / "s.csv").write_text(ROWS + "c,late\n")
    changes = {"vocabulary_from": str(earlier.folder)}
    data = DataConfig.model_validate(spec_of(FIELD, **changes))
    prepare(data, tmp_path, tmp_path / "later", 1)
    later = PreparedDataset(tmp_path / "later")
    after = vectors_of(later)
    assert later.manifest.numeric["text"].std == pytest.approx(SCALE)
    assert after["x"] == before["x"]
    np.testing.assert_allclose(after["y"], np.array([600.0, 0, 0]) / SCALE, rtol=1e-3)
    np.testing.assert_allclose(after["z"], np.array([0, 0, 3.0]) / SCALE, rtol=1e-3)
    assert after["late"] == [0, 0, 0]
    write(tmp_path, [[1.0, 0.0]], ["y"])
    with pytest.raises(ConfigError, match="text: dim is 2 and was 3"):
        prepare(data, tmp_path, tmp_path / "other", 1)


def test_an_earlier_datasets_fingerprint_does_not_know_the_settings_of_vectors() -> None:
    data = DataConfig.model_validate(spec_of({"name": "place"}))
    assert not {"npy", "dim"} & settings_of(data)["features"][2].keys()


def test_vectors_of_zeros_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    with caplog.at_level(logging.WARNING):
        dataset = made(tmp_path, FIELD)
    assert "all vectors of items with training rows are zeros or missing" in caplog.text
    assert vectors_of(dataset)["new"] == [1, 1]


def test_a_dry_run_shows_the_length_and_the_scale(tmp_path: Path) -> None:
    write(tmp_path, lists(pa.list_(pa.float32())))
    (tmp_path / "s.csv").write_text(ROWS)
    found = dry_run(DataConfig.model_validate(spec_of(FIELD)), tmp_path, seed=0)
    assert found.fields[2].kind == f"vector of 3 numbers, scaled by 1 / {SCALE:.6g}"
    assert found.fields[2].missing == pytest.approx(1 / 3)


F32 = pa.list_(pa.float32())
BAD: dict[str, tuple[Any, str]] = {
    "another length": (
        pa.array([[1, 2], [1, 2, 3]], F32),
        r"v\.parquet, row 2: text \[1.0, 2.0, 3.0\] \(3 numbers\) is not a vector of 2 finite",
    ),
    "NaN": (
        pa.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, float("nan")]], F32),
        r"row 2: text \[1.0, 2.0, 3.0, \.\.\.\] \(5 numbers, number 5 is nan\) is not",
    ),
    "infinity": (pa.array([[1, 2], [float("-inf"), 1]], F32), "row 2: .* number 1 is -inf"),
    "too large": (pa.array([[1, 2], [1, 1e39]], pa.list_(pa.float64())), r"number 2 is 1e\+39"),
    "null inside": (pa.array([[1, 2], [1, None]], F32), "row 2: .* number 2 is None"),
    "words": (["[1, 2]", "[1, two]"], "row 2: text '.1, two.' is not a vector of 2 finite"),
    "numbers": (pa.array([1.0, 2.0]), "holds double where vectors are expected"),
    "nested": (pa.array([[[1.0]], [[2.0]]]), "holds lists of lists"),
    "objects": (pa.array([{"a": 1}, {"a": 2}]), "column 'text' holds struct"),
    "unbracketed": (["1 2", "3 4"], "column 'text' holds '1 2', which is not a list of numbers"),
    "none": (pa.array([None, []], F32), "the column 'text' holds no vector; write a list"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_vector_is_named_with_its_row_and_dropped_on_demand(
    what: str, tmp_path: Path
) -> None:
    vectors, message = BAD[what]
    write(tmp_path, vectors, ["x", "y"])
    with pytest.raises(DataError, match=message) as error:
        made(tmp_path, FIELD)
    assert "\n" not in str(error.value)
    if what in ("numbers", "nested", "objects", "unbracketed", "none"):
        return  # the column is not one of vectors
    dataset = made(tmp_path, FIELD, on_bad_row="skip")
    assert dataset.manifest.dropped["v.parquet: rows with an unreadable cell"] == 1
    assert vectors_of(dataset)["y"] == [0] * len(vectors_of(dataset)["x"])


BAD_ARRAYS: dict[str, tuple[Any, str]] = {
    "fewer": (np.ones((2, 4)), r"v\.npy: 2 vectors, where ids\.csv has 3 rows; write one vector"),
    "one dimension": (np.ones(3), r"has the shape \[3\]; save an array of shape \[rows, numbers\]"),
    "no numbers": (np.ones((3, 0)), r"has the shape \[3, 0\]"),
    "texts": (np.array([["a"], ["b"], ["c"]]), "holds <U1 where numbers are expected"),
    "objects": (np.array([[None]] * 3), "not a readable npy file: .*objects"),
    "NaN": (
        np.array([[1, 2], [1, np.nan], [3, 4]]),
        r"v\.npy, row 1: number 1 is nan, not finite \(both counted from 0\)",
    ),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_a_bad_array_is_named(what: str, tmp_path: Path) -> None:
    array, message = BAD_ARRAYS[what]
    np.save(tmp_path / "v.npy", array)
    (tmp_path / "ids.csv").write_text("i\nx\ny\nnew\n")
    with pytest.raises(DataError, match=message) as error:
        made(tmp_path, NPY)
    assert "\n" not in str(error.value)
    if what == "NaN":
        dataset = made(tmp_path, NPY, on_bad_row="skip")
        assert dataset.manifest.dropped["v.npy: vectors with NaN or infinity"] == 1
        assert vectors_of(dataset)["y"] == [0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"i,j\n", "not an npy file; write it"), (None, "no such file")],
)
def test_files_that_are_not_arrays_are_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "v.npy").write_bytes(content)
    (tmp_path / "ids.csv").write_text("i\nx\n")
    with pytest.raises(DataError, match=message):
        made(tmp_path, NPY)


def test_a_vector_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    write(tmp_path, [[1.0, 0.0], [1.0, 0.0], [0.0, -2e5]])
    message = "text: a vector holds a number of the size 200000, but training vectors have"
    with pytest.raises(DataError, match=message):
        made(tmp_path, FIELD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entity": "context", "file": None}, "a vector describes users or items; set entity"),
        ({"file": None}, "text: a vector needs a file with one row per item; set file"),
        ({"transform": "log"}, "text: transform does not apply to a vector field"),
        ({"hash_rows": 9}, "text: hash_rows does not apply to a vector field"),
        ({"npy": "v.npy", "column": "text"}, "column does not apply to a vector in an npy file"),
        ({"kind": "numeric", "dim": 3}, "dim is for vector fields; text is numeric"),
        ({"kind": "categorical", "npy": "v.npy"}, "npy is for vector fields"),
        ({"dim": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_a_vector_are_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Feature.model_validate(FIELD | change)


def test_vectors_that_another_tool_writes_are_checked(tmp_path: Path) -> None:
    write(tmp_path, lists(pa.list_(pa.float32())))
    dataset = made(tmp_path, FIELD)
    given = dataset.manifest.model_copy(update={"fingerprint": GIVEN, "sums": {}})
    given.write(dataset.folder)
    assert vectors_of(made(tmp_path, FIELD)) == vectors_of(dataset)  # dim is that of the manifest
    file = dataset.folder / "entities/item.parquet"
    table = pq.read_table(file)
    for cells, message in (
        ([np.array([np.nan] * 3, "<f2").tobytes()] * len(table), "a number that is not finite"),
        ([None] * len(table), "the column text holds null"),
        ([b"12345678"] * len(table), r"the column text is fixed_size_binary\[8\], not"),
    ):
        width = 8 if "8" in message else 6
        column = table.schema.get_field_index("text")
        pq.write_table(table.set_column(column, "text", pa.array(cells, pa.binary(width))), file)
        (dataset.folder / "checked").unlink(missing_ok=True)
        with pytest.raises(DataError, match=message):
            made(tmp_path, FIELD)


def test_a_numpy_file_takes_no_description() -> None:
    with pytest.raises(ValidationError, match=r"v\.npy is a NumPy file, which describes itself"):
        DataConfig.model_validate(spec_of(NPY, files={"v.npy": {"delimiter": ";"}}))


def test_a_frame_of_vectors_is_read_as_pandas_writes_it(tmp_path: Path) -> None:
    frame = pd.DataFrame({"i": [*VECTORS], "text": [np.array(v) for v in VECTORS.values()]})
    frame.to_parquet(tmp_path / "v.parquet")
    np.testing.assert_allclose(
        vectors_of(made(tmp_path, FIELD))["y"], np.array(VECTORS["y"]) / SCALE, rtol=1e-3
    )


def test_the_pages_titles_become_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[3] / "docs/vectors.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    *_, config = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    movies = "movieId,title,genres\n1,Toy Story (1995),Comedy\n2,Toy Story 2 (1999),Comedy\n"
    (tmp_path / "movies.csv").write_text(movies + "3,It,Horror\n4,Heat (1995),Crime\n")
    rows = "".join(f"{u},{i},5,{u}\n" for u in range(5) for i in (1, 2, 4))
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    exec(code, {})
    data = DataConfig.model_validate(yaml.safe_load(config)["data"])
    prepare(data, tmp_path, tmp_path / "out", 1)
    dataset = PreparedDataset(tmp_path / "out")
    assert dataset.manifest.vectors == {"words": 256}
    vectors = {i: np.array(v) for i, v in vectors_of(dataset, "words").items()}
    assert vectors["1"] @ vectors["2"] > vectors["1"] @ vectors["4"] > 0
    assert not vectors["3"].any()  # too short for a trigram
