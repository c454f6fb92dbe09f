"""Models in one: the mean of their logits, and EASE ranks there as EASE does."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from deepfm_dist import combine, evaluate, predict, train
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.errors import ConfigError
from deepfm_dist.interop.combine import ease_factors
from deepfm_dist.ranking.baselines import Ease, distinct
from tests.ranks import run_alone, run_ranks

ROOT = Path(__file__).parents[2]
EASE = "evaluate={baselines: [ease], ease_l2: 50, validation_known: false}"
N_YEARS = sum(1 for _ in (ROOT / "data/sample/years.tsv").open()) - 1
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
        "model.linear=none",
        "trainer.refit_best=false",
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
    arguments = [*_settings(tmp_path, "a"), "--to", "b", "--ease-l2", "50", "--ease", "3"]
    arguments += ["--ease-columns", "401"]
    arguments = [a for a in arguments if not a.startswith("model.")]
    assert run_ranks(combine.main, size, arguments) == [0] * size
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
        combine.main,
        1,
        [*where, "--to", "b", "--ease-l2", "50", "--ease", "20", "--ease-columns", "48"],
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
    assert run_alone(combine.main, [*where, "--to", "b"]) == 2


def test_factors_are_the_best_of_their_number(sample: PreparedDataset) -> None:
    train_items, n_items, k = distinct(sample.history), 401, 20
    first, second = (f.double() for f in ease_factors(Ease(50), train_items, n_items, k))
    x = torch.zeros(len(train_items), n_items, dtype=torch.float64)
    x[np.repeat(np.arange(len(x)), train_items.lengths), train_items.values] = 1
    p = torch.linalg.inv(x.T @ x + 50 * torch.eye(n_items))
    scores = x @ (-p / p.diagonal()).fill_diagonal_(0)
    left = torch.linalg.svdvals(scores)[k:].square().sum()
    assert (scores - x @ first @ second.T).square().sum() == pytest.approx(left.item(), rel=1e-3)
    assert ease_factors(Ease(50), train_items, n_items, k)[0].double().equal(first)


def test_factors_without_room_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepfm_dist.interop.combine.available_bytes", lambda: 10**9)
    train_items = Jagged.from_pairs([0], [1], 1)
    with pytest.raises(ConfigError, match=r"EASE of 100,000 items takes 280\.0 GB of memory"):
        ease_factors(Ease(500.0), train_items, 100_000, 4)


def test_columns_beyond_the_items_leave_the_model_where_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shape = "model={embedding_dim: 4, init_std: 0.1, deep: false}"
    settings = _settings(tmp_path, "a", shape, "trainer.max_steps=2")
    assert run_ranks(train.main, 1, settings) == [0]
    where = [*settings[:4], "data.name=shared"]
    none = [*where, "--to", "b", "--ease", "0"]
    assert run_ranks(combine.main, 1, [*none, "--ease-columns", "500"]) == [0]
    for name in "ab":
        assert run_ranks(evaluate.main, 1, [where[0].replace("=a", f"={name}"), *where[1:]]) == [0]
    for name, value in _figures(tmp_path, "a")["model"].items():
        assert _figures(tmp_path, "b")["model"][name] == pytest.approx(value, rel=1e-6), name
    assert run_alone(combine.main, [*none, "--ease-columns", "0"]) == 2
    assert "--ease-columns 0: must be 1 or more" in capfd.readouterr().err


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
            "EASE needs the items' own id and an item history with its own table",
        ),
    ],
)
def test_models_that_have_no_room_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(tmp_path, "a", *overrides, "trainer.max_steps=1")
    assert run_ranks(train.main, 1, settings) == [0]
    assert run_ranks(combine.main, 1, [*settings[:5], "--to", "b", "--ease", "1"]) == [2]
    assert said in capfd.readouterr().err


def _trained(tmp_path: Path, name: str, *overrides: str) -> list[str]:
    """Trains a small model of a number and a vector, too; returns the settings that find it."""
    np.save(tmp_path / "years.npy", np.random.default_rng(1).normal(size=(N_YEARS, 3)))
    fields = (
        "data.features=[{name: seen, entity: user, history: item}, {name: item, entity: item}, "
        "{name: genre, entity: item, file: genres.tsv}, "
        "{name: year, entity: item, file: years.tsv, kind: numeric, transform: standard, "
        "keep: first}, {name: text, entity: item, file: years.tsv, kind: vector, "
        f"npy: {tmp_path / 'years.npy'}}}]"
    )
    settings = [a for a in _settings(tmp_path, name) if a != FIELDS]
    model = "model={embedding_dim: 6, init_std: 0.2, deep: false, fm_pairs: across, linear: none}"
    settings += [fields, model, "trainer.max_steps=5", *overrides]
    assert run_ranks(train.main, 1, settings) == [0]
    return [*settings[:4], "data.name=shared"]


def _logits(tmp_path: Path, where: list[str], name: str, size: int = 1) -> pd.Series:
    rows = tmp_path / "rows.csv"
    pd.read_csv(ROOT / "data/sample/train_ratings.csv")[:200].to_csv(rows, index=False)
    out = tmp_path / f"{name}-{size}.parquet"
    arguments = [where[0].replace("=a", f"={name}"), *where[1:]]
    arguments += ["--input", str(rows), "--output", str(out)]
    assert run_ranks(predict.main, size, arguments) == [0] * size
    return pd.read_parquet(out)["score"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_logits_of_several_are_their_mean(tmp_path: Path, size: int) -> None:
    where = _trained(tmp_path, "a", "run.seed=1", "data.seed=5")
    _trained(tmp_path, "b", "run.seed=2", "data.seed=5")
    _trained(tmp_path, "c", "run.seed=3", "data.seed=5", "model.init_std=0.4")
    arguments = [*where, "--of", "a,b,c", "--to", "m"]
    assert run_ranks(combine.main, size, arguments) == [0] * size
    each = [_logits(tmp_path, where, name) for name in "abc"]
    assert min(float((x - y).abs().mean()) for x in each for y in each if x is not y) > 0.05
    actual = _logits(tmp_path, where, "m", size)
    assert (actual - sum(each) / 3).abs().max() < 1e-5


def test_models_of_other_vocabularies_or_kinds_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = _trained(tmp_path, "a", "data.name=a")[:-1]
    _trained(tmp_path, "b", "data.name=b", "run.seed=2")
    _trained(tmp_path, "c", "data.name=c", "model.first_order=false")
    for name, said in (("b", "train them with the same data.seed"), ("c", "first_order=False")):
        assert run_alone(combine.main, [*where, "--of", f"a,{name}", "--to", "m"]) == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "runs" / "m").exists()


def test_groups_count_as_users_who_have_all_of_their_items(sample: PreparedDataset) -> None:
    train_items, n_items = distinct(sample.history), 401
    groups = Jagged.from_pairs([0, 0, 0, 1, 1], [3, 4, 90, 4, 200], 2)
    first, second = ease_factors(Ease(50), train_items, n_items, n_items, groups, 7.0)
    x = torch.zeros(len(train_items) + 2, n_items, dtype=torch.float64)
    x[np.repeat(np.arange(len(train_items)), train_items.lengths), train_items.values] = 1
    for row, items in enumerate(groups.lists()):
        x[len(train_items) + row, items] = 7.0**0.5
    p = torch.linalg.inv(x.T @ x + 50 * torch.eye(n_items))
    weights = (-p / p.diagonal()).fill_diagonal_(0)
    users = x[: len(train_items)]
    expected = users @ weights
    actual = users @ first.double() @ second.double().T
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    plain = users @ ease_factors(Ease(50), train_items, n_items, n_items)[0].double()
    assert (plain - users @ first.double()).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ease", "nan"], "--ease nan: must be a number"),
        (["--ease", "1", "--ease-l2", "0"], "--ease-l2 0: must be above 0"),
        (["--ease", "1", "--ease-fields", "-3"], "--ease-fields -3: must be 0 or more"),
        (["--ease", "1", "--ease-columns", "0"], "--ease-columns 0: must be 1 or more"),
        (["--of", "a,"], "--of a,: give names of runs, each once: A,B,C"),
        (["--of", "a,a"], "--of a,a: give names of runs, each once: A,B,C"),
    ],
)
def test_contradicting_options_are_refused(
    options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_alone(combine.main, ["--config", "sample", "--to", "b", *options]) == 2
    assert said in capfd.readouterr().err
