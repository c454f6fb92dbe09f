"""EASE in a model's columns ranks as EASE does, and nothing else of the model changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfm_dist import add_ease, evaluate, train
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.ranking.baselines import Ease, distinct
from tests.ranks import run_ranks

EASE = "evaluate={baselines: [ease], ease_l2: 50}"
FIELDS = """data.features=[
    {name: seen, entity: user, history: item, pooling: POOLING},
    {name: item, entity: item},
    {name: genre, entity: item, file: genres.tsv}]"""


def _settings(tmp_path: Path, name: str, *overrides: str, pooling: str = "sum") -> list[str]:
    return [
        *(f"run.{k}={v}" for k, v in {"name": name, "loggers": "[]"}.items()),
        *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
        "data.name=shared",
        FIELDS.replace("POOLING", pooling),
        "data.history.dropout=0.5",
        "model.deep=false",
        "trainer.loss=softmax",
        "trainer.batch_size=100",
        "optimizer.tables={name: adam, lr: 0.01}",
        "evaluate.baselines=[ease]",
        "evaluate.ease_l2=50",
        *overrides,
    ]


def _figures(tmp_path: Path, name: str) -> dict[str, dict[str, float]]:
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    figures: dict[str, dict[str, float]] = json.loads(lines[-1])["figures"]
    return figures


def _first_loss(tmp_path: Path, name: str) -> float:
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    return next(float(line["loss"]) for line in losses if line["event"] == "train")


@pytest.mark.parametrize("size", [1, 2])
def test_all_columns_of_an_empty_model_rank_as_ease_does(tmp_path: Path, size: int) -> None:
    empty = ("model={embedding_dim: 9, init_std: 0, deep: false}",)
    still = ("trainer.max_steps=1", "optimizer.tables={name: adam, lr: 1.0e-12}")
    assert run_ranks(train.main, size, _settings(tmp_path, "a", *empty, *still)) == [0] * size
    arguments = [*_settings(tmp_path, "a"), "--to", "b", "--l2", "50", "--weight", "3"]
    arguments += ["--columns", "401"]
    arguments = [a for a in arguments if not a.startswith("model.")]
    assert run_ranks(add_ease.main, size, arguments) == [0] * size
    assert (
        run_ranks(
            evaluate.main,
            size,
            [*_settings(tmp_path, "b")[:4], "data.name=shared", EASE],
        )
        == [0] * size
    )
    figures = _figures(tmp_path, "b")
    for name, value in figures["ease"].items():
        assert figures["model"][name] == pytest.approx(value, rel=2e-3), name


def test_both_are_better_than_the_model_alone_and_can_be_trained_on(
    tmp_path: Path,
) -> None:
    shape = ("model={embedding_dim: 16, init_std: 0.01, deep: false}",)
    settings = _settings(tmp_path, "a", *shape, "trainer.epochs=10", pooling="sqrt")
    assert run_ranks(train.main, 1, settings) == [0]
    where = [*settings[:4], "data.name=shared", EASE]
    assert run_ranks(
        add_ease.main, 1, [*where, "--to", "b", "--l2", "50", "--weight", "20", "--columns", "48"]
    ) == [0]
    assert run_ranks(evaluate.main, 1, where) == [0]
    assert run_ranks(evaluate.main, 1, [where[0].replace("=a", "=b"), *where[1:]]) == [0]
    alone, both = (_figures(tmp_path, name)["model"] for name in "ab")
    assert both["ndcg@10"] > alone["ndcg@10"] + 0.02
    wide = ("model={embedding_dim: 64, init_std: 0.01, deep: false}", "trainer.epochs=1")
    start = f"checkpoint.start_from={tmp_path / 'runs' / 'b'}"
    assert run_ranks(train.main, 1, _settings(tmp_path, "c", *wide, start, pooling="sqrt")) == [0]
    losses = {n: _first_loss(tmp_path, n) for n in "ac"}
    assert losses["c"] < losses["a"] - 0.1  # it begins where the other ended
    assert add_ease.main([*where, "--to", "b"]) == 2


def test_factors_are_the_best_of_their_number(sample: PreparedDataset) -> None:
    train_items, n_items, k = distinct(sample.history), 401, 20
    first, second = (f.double() for f in Ease(50).factors(train_items, n_items, k))
    x = torch.zeros(len(train_items), n_items, dtype=torch.float64)
    x[np.repeat(np.arange(len(x)), train_items.lengths), train_items.values] = 1
    p = torch.linalg.inv(x.T @ x + 50 * torch.eye(n_items))
    scores = x @ (-p / p.diagonal()).fill_diagonal_(0)
    left = torch.linalg.svdvals(scores)[k:].square().sum()
    assert (scores - x @ first @ second.T).square().sum() == pytest.approx(left.item(), rel=1e-3)
    assert Ease(50).factors(train_items, n_items, k)[0].double().equal(first)


def test_columns_beyond_the_items_leave_the_model_where_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = "model={embedding_dim: 4, init_std: 0.1, deep: false}"
    settings = _settings(tmp_path, "a", shape, "trainer.max_steps=2")
    assert run_ranks(train.main, 1, settings) == [0]
    where = [*settings[:4], "data.name=shared"]
    none = [*where, "--to", "b", "--weight", "0"]
    assert run_ranks(add_ease.main, 1, [*none, "--columns", "500"]) == [0]
    for name in "ab":
        assert run_ranks(evaluate.main, 1, [where[0].replace("=a", f"={name}"), *where[1:]]) == [0]
    for name, value in _figures(tmp_path, "a")["model"].items():
        assert _figures(tmp_path, "b")["model"][name] == pytest.approx(value, rel=1e-6), name
    assert add_ease.main([*none, "--columns", "0"]) == 2
    assert "--columns 0: must be 1 or more" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.deep=true",), "train with model.deep=false"),
        (
            (
                "model={embedding_dim: 8, deep: false}",
                "data.features=[{name: user, entity: user}, {name: item, entity: item}]",
                "data.history={}",
            ),
            "needs the items' own id and a history of items with a table of its own",
        ),
    ],
)
def test_models_that_have_no_room_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(tmp_path, "a", *overrides, "trainer.max_steps=1")
    assert run_ranks(train.main, 1, settings) == [0]
    assert run_ranks(add_ease.main, 1, [*settings[:5], "--to", "b"]) == [2]
    assert said in capfd.readouterr().err
