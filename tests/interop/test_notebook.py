"""A notebook's model, imported, scores as the notebook does."""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from deepfm_dist import import_weights, predict, recommend, train
from deepfm_dist.bundle import BUNDLE
from deepfm_dist.errors import DataError
from deepfm_dist.interop.notebook import read_weights
from tests.interop.notebook import NotebookDeepFM
from tests.ranks import run_alone, run_ranks

DIM, HIDDEN = 6, (9, 5)
MODEL = [f"model.embedding_dim={DIM}", f"model.over_arch_layer_sizes={[*HIDDEN]}"]
FIRST_GENRE = "data.features=[{name: user, entity: user}, {name: item, entity: item}, "
FIRST_GENRE += "{name: genre, entity: item, file: genres.tsv, keep: first}]"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Rows with the first genre of their item, as a notebook has them; items without are left."""
    rows = pd.read_csv(BUNDLE / "data/sample/train_ratings.csv")
    genres = pd.read_csv(BUNDLE / "data/sample/genres.tsv", sep="\t")
    return rows.merge(genres.drop_duplicates("item"), on="item")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("imported")
    return ["--quiet", *MODEL, FIRST_GENRE, f"run.runs_root={home}", f"run.prepared_root={home}/p"]


def saved(path: Path, sizes: Sequence[int], seed: int = 1) -> NotebookDeepFM:
    torch.manual_seed(seed)
    model = NotebookDeepFM(sizes, DIM, HIDDEN).eval()
    torch.save(model.state_dict(), path)
    return model


def scored(frame: pd.DataFrame, folder: Path, *settings: str) -> np.ndarray:
    rows, out = folder / "rows.csv", folder / "scores.parquet"
    frame[["user", "item"]].to_csv(rows, index=False)
    files = ["--input", str(rows), "--output", str(out)]
    assert run_alone(predict.main, [*files, *settings]) == 0
    # The notebook's own output: `probability` is corrected for the negatives of these settings.
    return 1 / (1 + np.exp(-pd.read_parquet(out)["score"].to_numpy()))


@pytest.mark.parametrize("size", [1, 2])
def test_sorted_ids_need_no_files(
    frame: pd.DataFrame, where: list[str], tmp_path: Path, size: int
) -> None:
    # The notebook's own way; every user, item and genre has training rows, but for two items of
    # no genre, which are still items.
    items = sorted(pd.read_csv(BUNDLE / "data/sample/train_ratings.csv")["item"].unique())
    ids = [sorted(frame["user"].unique()), items, sorted(frame["genre"].unique())]
    model = saved(tmp_path / "m.pt", [len(of_field) for of_field in ids])
    settings = [*where, f"run.name=sorted{size}"]
    settings += [f"data.root=file://{BUNDLE}/data/sample"] if size == 2 else []
    assert run_ranks(import_weights.main, size, [str(tmp_path / "m.pt"), *settings]) == [0] * size
    actual = scored(frame, tmp_path, *settings)
    place = [{v: k for k, v in enumerate(of_field)} for of_field in ids]
    columns = [frame[c].map(p) for c, p in zip(["user", "item", "genre"], place, strict=True)]
    with torch.no_grad():
        expected = model(torch.tensor(np.stack(columns, 1))).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=0)


def test_the_page_s_commands_work(where: list[str], tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs/import.md"
    [block] = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)
    saved(tmp_path / "deepfm.pt", [700, 400, 18])
    commands = {c.__name__: c.main for c in (import_weights, recommend)}
    for line in block.splitlines():
        python, _, module, *words = shlex.split(line)
        words = [w.replace("deepfm.pt", f"{tmp_path}/deepfm.pt") for w in words]
        words = [w.replace("mine.yaml", "sample") for w in words]
        assert (python, run_alone(commands[module], [*words, *where])) == ("python", 0)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_training_resumes_from_an_import(
    frame: pd.DataFrame, where: list[str], tmp_path: Path, optimizer: str
) -> None:
    items = pd.read_csv(BUNDLE / "data/sample/train_ratings.csv")["item"]
    sizes = [frame["user"].nunique(), items.nunique(), frame["genre"].nunique()]
    saved(tmp_path / "m.pt", sizes)
    tables = f"optimizer.tables={{name: {optimizer}, lr: 0.001}}"
    settings = [*where, f"run.runs_root={tmp_path}", "run.name=further", tables]
    assert run_ranks(import_weights.main, 2, [str(tmp_path / "m.pt"), *settings]) == [0, 0]
    steps = ["trainer.max_steps=2", "trainer.log_every_steps=1", "checkpoint.resume=always"]
    assert run_ranks(train.main, 2, [*settings, *steps]) == [0, 0]
    lines = (tmp_path / "further/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines if '"train"' in x] == [1, 2]


def test_fields_and_ids_in_any_order_and_ids_of_one_side_only(
    frame: pd.DataFrame, where: list[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    items = rng.permutation([*frame["item"].unique()[5:], 999_999]).tolist()
    genres = rng.permutation([*frame["genre"].unique(), "Opera"]).tolist()
    users = sorted(frame["user"].unique())
    model = saved(tmp_path / "m.pt", [len(genres), len(users), len(items)])
    for name, ids in {"items": items, "genres": genres}.items():
        (tmp_path / name).write_text("".join(f"{i}\n" for i in ids))
    settings = [*where, "run.name=ordered"]
    files = ["--ids", f"item={tmp_path / 'items'}", "--ids", f"genre={tmp_path / 'genres'}"]
    arguments = [str(tmp_path / "m.pt"), *files, "--fields", "genre,user,item", *settings]
    assert run_alone(import_weights.main, arguments) == 0
    known = frame[frame["item"].isin(items)]
    columns = [
        known[c].map({v: k for k, v in enumerate(ids)})
        for c, ids in {"genre": genres, "user": users, "item": items}.items()
    ]
    with torch.no_grad():
        expected = model(torch.tensor(np.stack(columns, 1))).numpy()
    np.testing.assert_allclose(scored(known, tmp_path, *settings), expected, atol=2e-6, rtol=0)
    # An item the notebook does not have is a row of zeros, as is an unknown user.
    unknown = frame[~frame["item"].isin(items)].assign(user=-5).drop_duplicates("genre")
    state = model.state_dict()
    rows = [state["embedding.weight"][genres.index(g)] for g in unknown["genre"]]
    zeros = torch.zeros(len(unknown), DIM)
    expected = state["bias"] + torch.stack(
        [state["fc.weight"][genres.index(g), 0] for g in unknown["genre"]]
    )
    with torch.no_grad():
        deep = model.mlp_layers(torch.cat([torch.stack(rows), zeros, zeros], 1))[:, 0]
    actual = scored(unknown, tmp_path, *settings)
    np.testing.assert_allclose(actual, (expected + deep).sigmoid(), atol=2e-6, rtol=0)


def _without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("fc.weight"), "missing: fc.weight; expected are bias"),
        (_without("mlp_layers.3.bias"), "missing: mlp_layers.3.bias; expected"),
        (lambda s: s | {"mlp.0.weight": s["bias"]}, "unknown: mlp.0.weight; expected"),
        (lambda s: s | {"mlp_layers.1.running_mean": s["bias"]}, "unknown: mlp_layers.1.running"),
        (lambda s: {k: v for k, v in s.items() if "mlp" not in k}, "too few linear layers"),
        (lambda s: s | {"fc.weight": s["fc.weight"][:-1]}, "fc.weight has shape .*, not "),
        (lambda s: s | {"embedding.weight": s["bias"]}, r"embedding.weight has shape \[1\]"),
        (
            lambda s: s | {"mlp_layers.3.weight": torch.zeros(5, 4)},
            r"mlp_layers.3.weight has shape \[5, 4\], not \[5, 9\]",
        ),
        (
            lambda s: s | {"mlp_layers.6.weight": torch.zeros(2, 5)},
            r"mlp_layers.6.weight has shape \[2, 5\], not \[1, 5\]",
        ),
        (lambda s: s | {"bias": s["bias"].long()}, "bias holds torch.int64, not floats"),
        (
            lambda s: s | {"fc.weight": s["fc.weight"].where(s["fc.weight"] < 0, torch.nan)},
            r"fc.weight: \d+ of its weights are NaN or infinite",
        ),
        (lambda s: list(s.values()), "not a state dict; write torch.save"),
        (lambda s: NotebookDeepFM([3], 1, [1]), "not a file of plain tensors .*write it by"),
        (None, "not a file of plain tensors"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused_by_name(
    change: Callable[[Any], object] | None,
    message: str,
    where: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "m.pt"
    model = saved(path, [700, 400, 18])
    if change is None:
        path.write_text("not a checkpoint")
    else:
        torch.save(change(dict(model.state_dict())), path)
    assert import_weights.main([str(path), *where]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f"DataError: {path}: .*{message}", line), line


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    weights = saved(path, [700, 400, 18]).state_dict()["embedding.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 1001] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path}: damaged: the checksum of .* differs"):
        read_weights(path)


def _complaint(arguments: list[str]) -> str:
    """The last line on stderr of a command that ends with exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert import_weights.main(arguments) == 2
    assert "Traceback" not in err.getvalue()
    return err.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.embedding_dim=4"], f"ConfigError: .*differ .*; set model.embedding_dim={DIM}$"),
        (
            ["model={embedding_dim: 6, batch_norm: true, activation: gelu}"],
            r"set model.over_arch_layer_sizes=\[9,5\] model.activation=relu model.batch_norm=F",
        ),
        (["--fields", "user,item"], "ConfigError: --fields user,item: must name each of user, it"),
        (["--ids", "genres=x"], "ConfigError: --ids genres=...: unknown field; available: user"),
        (["--ids", "genre"], "ConfigError: --ids genre: give FIELD=FILE"),
        (["--ids", "genre=GENRES"], "DataError: GENRES: cannot be read: No such file"),
        (["--ids", "genre=TWICE"], "DataError: TWICE, line 3: 'a' is in line 1 already"),
        (["--ids", "genre=ONE"], r"DataError: .*has 1,118 rows, .*1,101 \(.*genre 1\); give the n"),
        (["data.features=[{name: user, entity: user}]"], "18 numbers, 3 fields of 6; .*has 1: us"),
        (
            ["data.features=[{name: user, entity: user}, {name: g, entity: item, file: genres.tsv, "
             "column: genre}]"],
            "ConfigError: g may have several values a row, .*set keep: first",
        ),
        (
            ["data={interactions: {file: train_ratings.csv, user: user, item: item}, features: "
             "[{name: user, entity: user}, {name: when, column: time, kind: numeric}], "
             "root: data/sample}"],
            "ConfigError: when is numeric",
        ),
        (
            ["data.features=[{name: user, entity: user, hash_rows: 50}]"],
            "ConfigError: user is hashed, .*leave hash_rows out",
        ),
        (
            ["data={interactions: {file: train_ratings.csv, user: user, item: item}, features: "
             "[{name: user, entity: user}, {name: when, column: time, kind: numeric, transform: "
             "bucket}], root: data/sample}"],
            "ConfigError: when is numeric",
        ),
        (
            ["data.features=[{name: a, column: user, table: t}, "
             "{name: b, column: item, table: t}]"],
            "ConfigError: a shares the table t",
        ),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_by_name(
    where: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    saved(tmp_path / "m.pt", [700, 400, 18])
    (tmp_path / "TWICE").write_text("a\nb\na\n")
    (tmp_path / "ONE").write_text("a\n")
    files = {name: str(tmp_path / name) for name in ("GENRES", "TWICE", "ONE")}
    for name, path in files.items():
        arguments = [a.replace(name, path) for a in arguments]
        message = message.replace(name, path)
    name = f"run.name={tmp_path.name}"
    line = run_alone(_complaint, [str(tmp_path / "m.pt"), *where, *arguments, name])
    assert re.search(message, line), line


def test_a_run_that_has_checkpoints_is_left_alone(
    where: list[str], tmp_path: Path, frame: pd.DataFrame
) -> None:
    settings = [*where, "run.name=trained", "trainer.max_steps=1"]
    assert run_alone(train.main, settings) == 0
    saved(tmp_path / "m.pt", [700, 400, 18])
    line = run_alone(_complaint, [str(tmp_path / "m.pt"), *settings])
    assert re.match("CheckpointError: .*trained: already has checkpoints; give .*run.name", line)
