"""Exported weights and graphs: documented code scores as `predict` does; memory stays bounded."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from deepfm_dist import export, predict, train
from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint
from deepfm_dist.errors import CheckpointError, DeepFMError, EnvironmentProblem
from deepfm_dist.interop.graph import check_tools
from deepfm_dist.interop.safetensors import export_folder, write_weights
from deepfm_dist.jobs.export import is_export_of, up_to_date_export
from deepfm_dist.runs.trained import find_run
from tests.distributed.checkpoints import saved_tables
from tests.ranks import RankFailed, run_alone, run_ranks
from tests.steps import SMALL, config_of

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
TABLE = "model.model.embedding_arch.ebc.embedding_bags.{}.weight"
OTHER = "model.model.interaction_arch.{}"
MIB = 1 << 20

CLICKS = """
run: {name: clicks}
data:
  root: ROOT
  task: ctr
  interactions: {file: rows.csv, user: u, item: i, label: y}
  features:
    - {name: user, entity: user}
    - {name: item, entity: item}
    - {name: tags, entity: item, file: items.csv, key: i, column: t, separator: "|", pooling: sum}
    - {name: price, entity: item, file: items.csv, key: i, column: p, kind: numeric, transform: log}
    - {name: hour, column: h}
    - {name: words, column: m, separator: "+", missing: [none], table: hour}
    - {name: first_word, column: m, separator: "+", keep: first}
    - {name: ad, column: a, separator: "+", hash_rows: 7, pooling: mean}
    - {name: user_of_row, column: h, fill: nowhere}
    - {name: logits, column: n, kind: numeric, transform: bucket, buckets: 3}
    - {name: p, entity: item, file: items.csv, key: i, kind: numeric, transform: bucket}
    - {name: n, kind: numeric, missing: ["-1"], transform: standard}
    - {name: text, entity: item, file: v.parquet, key: i, kind: vector}
    - {name: taste, entity: user, file: v.parquet, key: u, kind: vector}
  split: {valid: 0, test: 0}
model: {embedding_dim: 6, init_std: 0.3, over_arch_layer_sizes: [9, 5], activation: gelu}
optimizer: {dense: {lr: 0.02}}
trainer: {batch_size: 60, epochs: 3}
"""


def documented(*blocks: int) -> str:
    """Blocks of Python code of the page, in the order asked for."""
    actual = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(actual) == 5
    return "".join(actual[n] for n in blocks)


def scored_by_documented_code(
    code: str,
    folder: Path,
    rows: Path,
    scores: str = "score(rows).numpy()",
    absent: tuple[str, ...] = (),
    graph: Path | None = None,
) -> np.ndarray:
    """What an interpreter without TorchRec, FBGEMM and this package makes of a file's rows.

    Args:
        code: of the page.
        folder: that the code reads in place of ``runs/sample/export``.
        rows: the file.
        scores: expression of the scores of ``rows``.
        absent: other packages that it must not import.
        graph: that the code reads in place of ``runs/sample/export-onnx``.
    """
    names = ("torchrec", "fbgemm_gpu", "deepfm_dist", *absent)
    before = f"import sys\nfor name in {names}:\n    sys.modules[name] = None\n"
    assert 'Path("runs/sample/export' in code
    code = code.replace('"runs/sample/export"', repr(str(folder)))
    code = code.replace('"runs/sample/export-onnx"', repr(str(graph)))
    driver = f"""
rows = pd.read_csv({str(rows)!r}, dtype=str, keep_default_na=False)
pd.DataFrame({{"score": {scores}}}).to_parquet({str(rows) + ".scores"!r})
"""
    # -I: neither the working directory nor PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-I", "-c", before + code + driver],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return pd.read_parquet(f"{rows}.scores")["score"].to_numpy()


def scored_by_predict(home: Path, rows: Path, *settings: str) -> np.ndarray:
    out = rows.with_suffix(".parquet")
    assert run_alone(predict.main, ["--input", str(rows), "--output", str(out), *settings]) == 0
    return pd.read_parquet(out)["score"].to_numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two ranks on the sample, a table of each kind; and the settings that find it."""
    home = tmp_path_factory.mktemp("trained")
    where = [f"run.runs_root={home / 'runs'}", f"run.prepared_root={home / 'prepared'}"]
    kinds = "user: {kind: row_wise}, item: {kind: table_wise}, genre: {kind: replicated}"
    how = [f"sharding.tables={{{kinds}}}", "model.init_std=0.3"]
    run_ranks(train.main, 2, ["--quiet", *where, *how, "trainer.max_steps=40"])
    return home, where


def test_the_documented_code_scores_as_predict_does(trained: tuple[Path, list[str]]) -> None:
    home, where = trained
    rng = np.random.default_rng(5)
    users = [*PreparedDataset(home / "prepared/sample").entity_ids("user").to_pylist()[1:], "?"]
    items = [*PreparedDataset(home / "prepared/sample").entity_ids("item").to_pylist()[1:], "?"]
    frame = pd.DataFrame({"user": rng.choice(users, 3000), "item": rng.choice(items, 3000)})
    frame.to_csv(home / "rows.csv", index=False)
    expected = scored_by_predict(home, home / "rows.csv", *where)
    assert expected.std() > 0.1
    for limit in ([], ["--max-file-bytes", "30000"]):
        assert run_alone(export.main, ["--quiet", *where, *limit]) == 0
        folder = home / "runs/sample/export"
        assert len(list(folder.glob("*.safetensors"))) == (3 if limit else 1)
        actual = scored_by_documented_code(documented(0, 2), folder, home / "rows.csv")
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "model",
    [
        ["model.batch_norm=true"],
        ["model.fm=false", "model.activation=tanh"],
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ["model.fm_pairs=across"],
                ["model.first_order=false"],
                ["model.deep=false"],
                ["model.deep=false", "model.fm=false"],
                ["trainer.table_precision=fp16", "optimizer.tables.name=rowwise_adagrad"],
            )
        ),
    ],
)
def test_the_documented_code_scores_fields_of_every_kind(tmp_path: Path, model: list[str]) -> None:
    rng = np.random.default_rng(1)
    n = 600
    words = ["a", "b", " c", "none", "", "d"]
    rows = pd.DataFrame(
        {
            "u": rng.integers(0, 30, n),
            "i": rng.integers(0, 20, n),
            "h": rng.choice(["9", "12", "", "late"], n),
            "a": rng.choice(["", "é+ü", "b", "campaign 17+b"], n),
            "m": ["+".join(rng.choice(words, rng.integers(0, 4))) for _ in range(n)],
            "n": rng.choice(["-1", "", "3", "4.5", "100"], n),
            "y": rng.integers(0, 2, n),
        }
    )
    rows.to_csv(tmp_path / "rows.csv", index=False)
    tags = ["|".join(rng.choice(["x", "y", "z"], rng.integers(0, 3))) for _ in range(25)]
    items = pd.DataFrame({"i": range(25), "t": tags, "p": rng.choice(["", "7", "900"], 25)})
    items.to_csv(tmp_path / "items.csv", index=False)
    vectors = pd.DataFrame({"i": range(25), "u": range(25), "text": [*rng.normal(0, 9, (25, 4))]})
    vectors["taste"] = [*rng.normal(0, 9, (25, 2))]
    vectors.to_parquet(tmp_path / "v.parquet")
    (tmp_path / "c.yaml").write_text(CLICKS.replace("ROOT", str(tmp_path)))
    settings = ["--config", str(tmp_path / "c.yaml"), f"run.runs_root={tmp_path}"]
    settings += [f"run.prepared_root={tmp_path / 'prepared'}"]
    assert run_alone(train.main, ["--quiet", *settings, *model]) == 0
    rows["u"] += rng.integers(0, 5, n)  # some are unknown now
    rows["i"] += rng.integers(0, 8, n)  # some without training rows, some that no file has
    rows["m"] = rows["m"].str.replace("d", "new")
    rows.drop(columns="y").to_csv(tmp_path / "new.csv", index=False)
    expected = scored_by_predict(tmp_path, tmp_path / "new.csv", *settings)
    assert run_alone(export.main, [*settings, "--output", str(tmp_path / "out")]) == 0
    code = documented(0, 2)
    actual = scored_by_documented_code(code, tmp_path / "out", tmp_path / "new.csv")
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.05
    if model != ["model.batch_norm=true"]:
        return
    graph = ["--format", "onnx", "--output", str(tmp_path / "graph")]
    assert run_alone(export.main, [*settings, *graph]) == 0
    actual = scored_by_documented_code(
        code + documented(3) + FEED_OF_ROWS,
        tmp_path / "out",
        tmp_path / "new.csv",
        "graph_scores(rows)",
        graph=tmp_path / "graph",
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


FEED_OF_ROWS = """
def graph_scores(rows):
    names = {given["kind"]: given["name"] for given in graph["inputs"]}
    feed = {names["user_of_row"]: np.arange(len(rows))}
    for given in graph["inputs"][1:]:
        field = by_name[given["field"]]
        if given["dtype"] == "float32":
            read = given_vectors if given["kind"] == "vector" else numbers
            feed[given["name"]] = read(field, rows).numpy().astype(np.float32)
            continue
        rows_of = [np.ravel(bag) for bag in bags(field, rows)]
        lists = padded(rows_of)
        feed[given["name"]] = lists if given["kind"] == "rows" else lists[:, 0]
    return session.run([graph["output"]], feed)[0]


folder = Path("runs/sample/export")  # of the functions that read weights
config = json.loads((folder / "config.json").read_text())
entities = {e: pd.read_parquet(folder / f"entities/{e}.parquet") for e in fields["entities"]}
"""
"""Inputs of a graph by the page's functions for the weights, which know context fields, too."""


@pytest.mark.parametrize(
    "features",
    [
        "",  # as the recipe chooses them: the item and the user's history of items
        """
  features:
    - {name: user, entity: user}
    - {name: item, entity: item}
    - {name: tags, entity: item, file: items.csv, key: i, column: t, separator: "|"}
    - {name: seen, entity: user, history: item, pooling: sqrt, table: item}
    - {name: seen_tags, entity: user, history: tags}
  history: {max_length: 4}""",
    ],
)
def test_the_documented_code_scores_a_default_run(tmp_path: Path, features: str) -> None:
    rng = np.random.default_rng(3)
    tastes = [rng.permutation(np.arange(u % 3, 24, 3))[:6] for u in range(25)]  # EASE finds these
    pairs = pd.DataFrame([(f"u{u}", i) for u, taste in enumerate(tastes) for i in taste])
    pairs.set_axis(["u", "i"], axis=1).to_csv(tmp_path / "rows.csv", index=False)
    tags = ["|".join(rng.choice(["x", "y", "z"], rng.integers(0, 3))) for _ in range(24)]
    pd.DataFrame({"i": range(24), "t": tags}).to_csv(tmp_path / "items.csv", index=False)
    log = f"data:\n  root: {tmp_path}\n  interactions: {{file: rows.csv, user: u, item: i}}"
    (tmp_path / "c.yaml").write_text(f"{log}{features}")
    settings = ["--config", str(tmp_path / "c.yaml"), "--quiet", "trainer.epochs=3"]
    settings += [f"run.runs_root={tmp_path}", f"run.prepared_root={tmp_path / 'prepared'}"]
    assert run_alone(train.main, settings) == 0
    users, items = [f"u{u}" for u in range(26)], map(str, range(25))  # the last are unknown
    rows = pd.DataFrame([(u, i) for i in items for u in users], columns=["u", "i"])
    rows.to_csv(tmp_path / "new.csv", index=False)
    expected = scored_by_predict(tmp_path, tmp_path / "new.csv", *settings)
    assert run_alone(export.main, [*settings, "--output", str(tmp_path / "out")]) == 0
    actual = scored_by_documented_code(documented(0), tmp_path / "out", tmp_path / "new.csv")
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)
    model = json.loads((tmp_path / "out/config.json").read_text())["model"]
    assert (model["embedding_dim"] > 64) == (not features)  # EASE, which needs a table of its own
    assert len(np.unique(expected.round(4))) > 100
    by_graph = [_scored_by_onnxruntime(tmp_path, settings, t) for t in ("fp32", "int8")]
    np.testing.assert_allclose(by_graph[0], expected, atol=1e-5 * abs(expected).max(), rtol=0)
    exact, rounded = (scores.reshape(-1, len(users)) for scores in by_graph)
    best = np.take_along_axis(exact, np.argsort(-rounded, 0)[:10], 0)
    tenth = np.sort(exact, 0)[-10]
    assert np.mean(best >= tenth - 0.02 * exact.std(0)) >= 0.99  # nearly equal items may swap


def _scored_by_onnxruntime(home: Path, settings: list[str], tables: str) -> np.ndarray:
    """Scores of ``new.csv``, every item for every user, from a graph and without PyTorch."""
    graph = home / f"graph-{tables}"
    how = ["--format", "onnx", "--tables", tables, "--output", str(graph)]
    assert run_alone(export.main, [*settings, *how]) == 0
    return scored_by_documented_code(
        documented(3),
        home,
        home / "new.csv",
        "np.stack([score(u, rows['i'].unique()) for u in rows['u'].unique()], 1).ravel()",
        absent=("torch",),
        graph=graph,
    )


def test_a_graph_is_refused_that_scores_otherwise_or_cannot_be_made(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, where = trained
    target = ["--output", str(tmp_path / "out")]
    score = "deepfm_dist.jobs.export.write_graph"
    monkeypatch.setattr(score, lambda *_: lambda inputs: inputs[0] * torch.nan)
    with pytest.raises(RankFailed, match=r"model.onnx: its logits differ .* by up to nan"):
        run_alone(_raising_export, [*where, *target, "--format", "onnx"])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(EnvironmentProblem, match=r"onnxscript, .* pip install onnx onnxruntime on"):
        check_tools("onnx")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    with pytest.raises(EnvironmentProblem, match="no-compiler is not found; install it or name"):
        check_tools("aoti")


@pytest.mark.slow  # compiles twice
def test_a_program_in_cpp_scores_as_predict_does(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    home, where = trained
    ids = [PreparedDataset(home / "prepared/sample").entity_ids(e) for e in ("user", "item")]
    users, items = ([*column.to_pylist()[1:], "?"][-60:] for column in ids)
    pairs = pd.DataFrame([(u, i) for u in users[-20:] for i in items], columns=["user", "item"])
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    expected = scored_by_predict(home, tmp_path / "pairs.csv", *where)
    folder = tmp_path / "graph"
    how = ["--format", "aoti", "--output", str(folder)]
    assert run_alone(export.main, ["--quiet", *where, *how], timeout_s=600) == 0
    code = re.sub(r"\n(import onnxruntime|session = .*)", "", documented(3))
    page = {}
    exec(code.replace("runs/sample/export-onnx", str(folder)), page)
    by_name = {"user_of_row": np.repeat(np.arange(20), 60)}
    for given in page["graph"]["inputs"][1:]:
        of_users = given["shape"][0] == "users"
        by_name[given["name"]] = page["value"](given, users[-20:] if of_users else pairs["item"])
    inputs = [torch.from_numpy(by_name[given["name"]]) for given in page["graph"]["inputs"]]
    for place, tensor in enumerate(inputs):
        (tmp_path / f"{place}.bin").write_bytes(tensor.numpy().tobytes())
    [program] = re.findall(r"```cpp\n(.*?)```", DOCS.read_text(), re.DOTALL)
    program = program.replace("runs/sample/export-aoti", str(folder))
    given = ", ".join(
        f'at::from_file("{tmp_path}/{place}.bin", false, {tensor.numel()}, at::kLong)'
        f".view({{{', '.join(map(str, tensor.shape))}}})"
        for place, tensor in enumerate(inputs)
    )
    program, n = re.subn(r"inputs = \{.*?\};", f"inputs = {{{given}}};", program, flags=re.DOTALL)
    assert n == 1
    program = program.replace("int main() {", "int main() {\n  std::cout.precision(9);")
    (tmp_path / "score.cpp").write_text(program)
    [build] = re.findall(r"(torch=\$\(python.*?-lc10)\n", DOCS.read_text(), re.DOTALL)
    build = build.replace("g++", compiler)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where the page's python is
    subprocess.run(
        ["bash", "-ec", build], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True
    )
    done = subprocess.run([tmp_path / "score"], capture_output=True, text=True, check=True)
    actual = [float(line) for line in done.stdout.splitlines()]
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def _raising_export(argv: list[str]) -> None:
    """Runs the command; its message becomes an error of the process."""
    with redirect_stderr(StringIO()) as stderr:
        code = export.main(argv)
    assert code == 0, stderr.getvalue()


@pytest.mark.parametrize(("size", "kind"), [(1, "auto"), (4, "row_wise"), (3, "table_wise")])
def test_weights_are_the_checkpoints_at_any_slice_and_file_size(
    sample: PreparedDataset, tmp_path: Path, size: int, kind: str
) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 3)
    pieces = run_ranks(
        saved_tables, size, sample.folder, config_of(*SMALL, f"sharding.kind={kind}"), tmp_path
    )
    for number, (buffer, limit) in enumerate([(1, 1), (1000, 40_000), (1 << 30, 1 << 30)]):
        out = tmp_path / str(number)
        out.mkdir()
        shapes = write_weights(path, out, 11, limit, buffer)
        files = sorted(out.glob("*.safetensors"))
        weights = {k: t for file in files for k, t in load_file(file).items()}
        assert {k: tuple(t.shape) for k, t in weights.items()} == shapes
        for table, rows, piece in (p for of_rank in pieces for p in of_rank):
            np.testing.assert_array_equal(weights[f"tables.{table}"][rows], piece[:, :11])
        index = out / "model.safetensors.index.json"
        assert index.exists() == (len(files) > 1)
        if index.exists():
            listing = json.loads(index.read_text())
            assert listing["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
            for name, file in listing["weight_map"].items():
                with safe_open(out / file, "pt") as opened:
                    assert name in list(opened.keys())
        of_file = [sum(t.nbytes for t in load_file(file).values()) for file in files]
        alone = [len(load_file(file)) == 1 for file in files]
        assert all(n <= limit or single for n, single in zip(of_file, alone, strict=True))
    assert set(shapes) == {
        *("tables.user", "tables.item", "tables.genre", "bias"),
        *(f"over_arch.{n}.{p}" for n in ("hidden.0", "hidden.1", "hidden.2", "output")
          for p in ("weight", "bias")),
    }  # fmt: skip


def _peak_growth(work: object, *arguments: object) -> int:
    """Bytes by which this process' resident memory grew at its highest."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _high_water()
    work(*arguments)  # type: ignore[operator]
    return _high_water() - before


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _save_table(path: Path, rows: int) -> None:
    table = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, 16).contiguous()
    tensors = {TABLE.format("user"): table, OTHER.format("bias"): torch.ones(1)}
    dcp.save(tensors, checkpoint_id=path, no_dist=True)


def _load_table(path: Path, rows: int) -> None:
    table = {TABLE.format("user"): torch.empty(rows, 16)}
    dcp.load(table, storage_reader=dcp.FileSystemReader(path), no_dist=True)


def test_memory_does_not_grow_with_a_table(tmp_path: Path) -> None:
    buffer, grown, usual = 8 * MIB, [], []
    for rows in (MIB, 4 * MIB):  # one piece of 64 and of 256 MiB
        path, out = tmp_path / f"of_{rows}", tmp_path / "out"
        run_alone(_save_table, path, rows)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        grown.append(run_alone(_peak_growth, write_weights, path, out, 13, 1 << 40, buffer))
        usual.append(run_alone(_peak_growth, _load_table, path, rows))
    assert grown[1] - grown[0] < buffer
    assert usual[1] - usual[0] > 128 * MIB
    with safe_open(tmp_path / "out/model.safetensors", "pt") as opened:
        table = opened.get_slice("tables.user")
        assert table.get_shape() == [4 * MIB, 13]
        for row in (0, buffer // 64 - 1, buffer // 64, 4 * MIB - 1):
            assert table[row : row + 1].tolist() == [[float(row)] * 13]
        assert opened.get_tensor("bias").tolist() == [1.0]


def test_a_damaged_checkpoint_and_a_foreign_folder_are_refused_and_leave_nothing(
    sample: PreparedDataset, tmp_path: Path, trained: tuple[Path, list[str]]
) -> None:
    path = checkpoint.checkpoint_path(tmp_path / "run", 3)
    run_alone(saved_tables, sample.folder, config_of(*SMALL), tmp_path / "run")
    [piece] = path.glob("*.distcp")
    whole, target = piece.read_bytes(), tmp_path / "out"
    for damaged in (piece, path / ".metadata"):
        for kept in (100, len(damaged.read_bytes()) // 2):
            content = damaged.read_bytes()
            damaged.write_bytes(content[:kept])
            message = f"{path}: cannot be read: ."
            with pytest.raises(CheckpointError, match=message), export_folder(target) as folder:
                write_weights(path, folder, 11, 1 << 30)
            damaged.write_bytes(content)
    assert piece.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    target.mkdir()
    (target / "precious").write_text("")
    with pytest.raises(DeepFMError, match="holds files but no export"), export_folder(target):
        raise AssertionError
    (tmp_path / "file").write_text("")
    blocked = pytest.raises(DeepFMError, match="cannot be written: Not a directory")
    with blocked, export_folder(tmp_path / "file" / "out"):
        raise AssertionError
    is_a_file = pytest.raises(DeepFMError, match="is a file; --output names a folder")
    with is_a_file, export_folder(tmp_path / "file"):
        raise AssertionError
    _, where = trained
    for wrong in ("model.embedding_dim=4", "--max-file-bytes=0"):
        assert run_alone(export.main, [*where, wrong]) == 2


def test_one_flipped_bit_is_found_before_anything_is_written(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    home, where = trained
    path = checkpoint.find_checkpoint(home / "runs/sample")
    piece = next(path.glob("*.distcp"))
    whole = piece.read_bytes()
    middle = len(whole) // 2
    piece.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    try:
        assert run_alone(export.main, ["--quiet", "--output", str(tmp_path / "out"), *where]) == 2
        with pytest.raises(CheckpointError, match=f"{piece}: damaged: its checksum"):
            checkpoint.check_files(path)
    finally:
        piece.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def _served(settings: list[str]) -> dict[str, np.ndarray]:
    """Weights of the export that `serve` would read."""
    actual = find_run(load_config("sample", settings), settings)
    folder = up_to_date_export(actual)
    assert is_export_of(actual, folder)
    return {name: t.numpy() for name, t in load_file(folder / "model.safetensors").items()}


def test_a_run_trained_again_to_the_same_step_is_exported_again(tmp_path: Path) -> None:
    where = [f"run.runs_root={tmp_path}", f"run.prepared_root={tmp_path / 'prepared'}"]
    again = "checkpoint.resume=never"  # moves the earlier run and its export aside
    for rate in (0.01, 0.02):
        how = [*where, "trainer.max_steps=1", f"optimizer.dense.lr={rate}", again]
        assert run_alone(train.main, ["--quiet", *how]) == 0
        served = run_alone(_served, where)
        written = tmp_path / "sample/export"
        stamp = (written / "config.json").stat().st_mtime_ns
        assert run_alone(_served, where).keys() == served.keys()
        assert (written / "config.json").stat().st_mtime_ns == stamp
        actual = checkpoint.find_checkpoint(tmp_path / "sample")
        bias = {OTHER.format("bias"): torch.empty(1)}
        dcp.load(bias, storage_reader=dcp.FileSystemReader(actual), no_dist=True)
        np.testing.assert_array_equal(served["bias"], bias[OTHER.format("bias")])


def test_the_page_lists_the_written_fields(trained: tuple[Path, list[str]]) -> None:
    home, where = trained
    assert run_alone(export.main, ["--quiet", *where]) == 0
    config = json.loads((home / "runs/sample/export/config.json").read_text())
    assert (
        yaml.safe_load((home / "runs/sample/config.yaml").read_text())["model"] == config["model"]
    )
    assert config["step"] == 40
    assert (
        config["vocabulary_hash"]
        == PreparedDataset(home / "prepared/sample").manifest.vocabulary_hash
    )
