"""Catalogue scores, top-K and ranking metrics against brute force."""

import copy
import itertools
import json
import logging
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepfm_dist import vector_code
from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config, config_from
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.data.schema import DataConfig
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.errors import ConfigError
from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.ranking import catalogue, evaluation, output
from deepfm_dist.ranking.baselines import (
    AnySize,
    Baseline,
    Ease,
    Ials,
    ItemKNN,
    Popularity,
    distinct,
)
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engines.numba import NumbaEngine
from deepfm_dist.ranking.engines.selection import engine_for
from deepfm_dist.ranking.engines.torch import TorchEngine
from deepfm_dist.ranking.evaluation import Comparison, RankingEvaluator, evaluate_ranking
from deepfm_dist.ranking.metrics import coverage, interval, means, resampled_means, user_metrics
from deepfm_dist.ranking.recommendation import recommend
from deepfm_dist.ranking.settings import IalsConfig, RecommendConfig
from deepfm_dist.ranking.topk import NO_ITEM, top_k
from deepfm_dist.runs.trained import open_trained
from deepfm_dist.training import prediction
from deepfm_dist.training.evaluation import RowEvaluator
from tests.data.small_logs import small
from tests.ranking.cases import (
    COLUMNS_OF_ITEM,
    N_CATEGORICAL,
    OF_ITEM,
    config_of,
    digest,
    random_arch,
)
from tests.ranks import RankFailed, run_alone, run_ranks
from tests.steps import Run

BASELINES = {"popularity": Popularity(), "item_knn": ItemKNN(20), "ease": Ease(100.0)}


def difference_from_forward(arch: InteractionArch, dim: int = 5) -> float:
    """Largest error of either engine's scores, in units of max(1, |logit|)."""
    n_users, n_items = 7, 11
    is_item_field = torch.tensor(OF_ITEM)
    shapes = (N_CATEGORICAL, dim), (N_CATEGORICAL,), (len(COLUMNS_OF_ITEM),)
    users, items = ([torch.randn(n, *shape) for shape in shapes] for n in (n_users, n_items))
    scorer = CatalogueScorer(arch, OF_ITEM, N_CATEGORICAL)
    cpu, sides = torch.device("cpu"), (scorer.side("user", *users), scorer.side("item", *items))
    actual = []
    for engine in (TorchEngine(scorer), engine_for(scorer, cpu)):
        packed = engine.allocate(n_items, sides[1])
        engine.fill(packed, 0, sides[1])
        prepared = engine.users([sides[0]])
        actual.append(engine.scores(prepared, n_users, packed))
        # A rank that has run out of users still takes its part in the others' look-ups.
        assert engine.scores(prepared, 0, packed).shape == (0, n_items)
    double = copy.deepcopy(arch).double()
    pairs = []
    for u, i in itertools.product(range(n_users), range(n_items)):
        rows = []
        for user, item, mask in zip(
            users,
            items,
            (
                is_item_field[:N_CATEGORICAL, None],
                is_item_field[:N_CATEGORICAL],
                torch.tensor(COLUMNS_OF_ITEM),
            ),
            strict=True,
        ):
            rows.append(torch.where(mask, item[i], user[u]).double())
        pairs.append(rows)
    factors, first, dense = (torch.stack([p[k] for p in pairs]) for k in range(3))
    with torch.no_grad():
        expected = (
            double(torch.cat([factors, first[:, :, None]], 2), dense)
            .detach()
            .view(n_users, n_items)
        )
    difference = torch.stack(actual) - expected
    return float((difference.abs() / expected.abs().clamp(min=1)).max())


@pytest.mark.parametrize("hidden", [None, (), (6,), (30, 20, 10), (3, 17, 1, 8)])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("switches", [{}, {"fm": False}, {"first_order": False}, {"across": True}])
def test_factorised_scores_equal_the_forward_pass(
    hidden: tuple[int, ...] | None, batch_norm: bool, switches: dict[str, bool]
) -> None:
    if hidden is None and (batch_norm or switches.get("fm") is False):
        switches = {}
    arch = random_arch(1, hidden, custom=False, batch_norm=batch_norm, **switches)
    assert difference_from_forward(arch) <= 1e-5


@settings(max_examples=60)
@given(
    hidden=st.none() | st.lists(st.integers(1, 45), max_size=4).map(tuple),
    dim=st.integers(1, 40),
    first_order=st.booleans(),
    fm=st.booleans(),
    across=st.booleans(),
    batch_norm=st.booleans(),
    activation=st.sampled_from(["relu", "relu", "gelu", "tanh", "sigmoid"]),
    seed=st.integers(0, 2**31),
)
def test_factorised_scores_of_any_shape_equal_the_forward_pass(
    hidden: tuple[int, ...] | None, dim: int, seed: int, **options: object
) -> None:
    arch = random_arch(seed, hidden, custom=False, dim=dim, **options)
    assert difference_from_forward(arch, dim) <= 1e-5


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "sigmoid"])
def test_every_activation_is_scored_exactly(activation: str) -> None:
    assert difference_from_forward(random_arch(2, (9, 4), False, activation=activation)) <= 1e-5


def test_an_over_arch_of_ones_own_is_scored_exactly() -> None:
    assert difference_from_forward(random_arch(3, None, custom=True)) <= 1e-5


@pytest.mark.parametrize(
    ("hidden", "custom", "activation", "kind"),
    [
        ((9, 4), False, "relu", NumbaEngine),
        ((), False, "gelu", NumbaEngine),
        (None, False, "relu", NumbaEngine),
        ((9, 4), False, "gelu", TorchEngine),
        (None, True, "relu", TorchEngine),
    ],
)
def test_the_kernel_is_taken_where_it_can_be(
    hidden: tuple[int, ...] | None, custom: bool, activation: str, kind: type
) -> None:
    arch = random_arch(5, hidden, custom, activation=activation)
    scorer = CatalogueScorer(arch, OF_ITEM, N_CATEGORICAL)
    expected = kind if vector_code.HAS_FMA else TorchEngine
    assert type(engine_for(scorer, torch.device("cpu"))) is expected


def test_a_precision_that_a_cpu_has_not_is_refused() -> None:
    scorer = CatalogueScorer(random_arch(5, (9, 4), False), OF_ITEM, N_CATEGORICAL)
    with pytest.raises(ConfigError, match=r"recommend\.precision=bf16: a CPU computes in fp32"):
        engine_for(scorer, torch.device("cpu"), "bf16")


@pytest.mark.parametrize("pairs", [1, 5, 13, 40])
def test_blocks_of_any_size_give_the_same_scores(
    pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalogue.PAIRS_PER_STEP, "cpu", pairs)
    assert difference_from_forward(random_arch(4, (8, 3), False)) <= 1e-5
    assert difference_from_forward(random_arch(4, None, custom=True)) <= 1e-5


values = st.sampled_from([-float("inf"), -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 3.0, 3.0000002])


@given(
    st.lists(st.lists(values, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 9)
)
def test_top_k_equals_a_full_sort(rows: list[list[float]], k: int) -> None:
    positions, scores = top_k(torch.tensor(rows), k)
    for row, actual, best in zip(
        torch.tensor(rows).tolist(), positions.tolist(), scores.tolist(), strict=True
    ):
        order = sorted((i for i in range(6) if row[i] > -float("inf")), key=lambda i: (-row[i], i))
        expected = (order + [NO_ITEM] * k)[:k]
        assert actual == expected
        assert best == [row[i] if i >= 0 else -float("inf") for i in expected]


def figures_by_loops(
    best: list[int], wanted: list[int], k: int, counts: list[int], n_users: int
) -> dict[str, float]:
    """One user's figures, read off their definitions."""
    shown = [item for item in best[:k] if item >= 0]
    hit = [item >= 0 and item in wanted for item in best[:k]]
    at = [rank for rank, is_hit in enumerate(hit, 1) if is_hit]
    possible = min(k, len(wanted))
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, possible + 1))
    nothing = float("nan")
    return {
        "recall": len(at) / len(wanted),
        "ndcg": sum(1 / math.log2(rank + 1) for rank in at) / ideal,
        "hit_rate": float(len(at) > 0),
        "precision": len(at) / k,
        "map": sum(sum(hit[:rank]) / rank for rank in at) / possible,
        "mrr": 1 / at[0] if at else 0.0,
        "popularity": sum(counts[i] for i in shown) / len(shown) if shown else nothing,
        "novelty": sum(-math.log2(max(counts[i], 1) / n_users) for i in shown) / len(shown)
        if shown
        else nothing,
    }


@settings(max_examples=60)
@given(st.data())
def test_ranking_metrics_equal_a_loop_over_users(data: st.DataObject) -> None:
    n_users = data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(0, 9), min_size=13, max_size=13))
    ranked, relevant = [], []
    for _ in range(n_users):
        items = data.draw(st.permutations(range(1, 9)))
        filled = data.draw(st.integers(0, 5))
        ranked.append([*items[:filled], *[-1] * (5 - filled)])
        known = data.draw(st.sets(st.integers(1, 12), min_size=1))
        relevant.append(sorted(known) + [0] * data.draw(st.integers(0, 2)))
    jagged = Jagged.from_pairs(
        np.repeat(np.arange(n_users), [len(r) for r in relevant]), np.concatenate(relevant), n_users
    )
    actual = user_metrics(np.array(ranked), jagged, [1, 3, 5], np.array(counts), 9)
    share = coverage(np.array(ranked), [1, 3, 5], 12)
    average = means(actual)
    for k in (1, 3, 5):
        expected = pd.DataFrame(
            [figures_by_loops(b, w, k, counts, 9) for b, w in zip(ranked, relevant, strict=True)]
        )
        for name, values in expected.items():
            np.testing.assert_allclose(actual[f"{name}@{k}"], values, rtol=0, atol=1e-9)
            assert average[f"{name}@{k}"] == pytest.approx(values.mean(), abs=1e-9, nan_ok=True)
        shown = {item for best in ranked for item in best[:k] if item >= 0}
        assert share[f"coverage@{k}"] == len(shown) / 12


@pytest.mark.parametrize("library", ["lenskit", "rectools"])
def test_ranking_metrics_equal_another_librarys(library: str) -> None:
    """`tests/oracles/ranking_metrics.py` wrote the figures; what is defined otherwise is scaled."""
    written = json.loads((Path(__file__).parents[1] / "oracles" / f"{library}.json").read_text())
    n_items = written["items"]
    for case in written["cases"]:
        ranked = np.array(case["ranked"])
        n_users, k_max = ranked.shape
        lengths = np.array([len(items) for items in case["relevant"]])
        relevant = Jagged.from_pairs(
            np.repeat(np.arange(n_users), lengths), np.concatenate(case["relevant"]), n_users
        )
        counts = np.bincount(np.concatenate(case["seen"]), minlength=n_items)
        cutoffs = [k for k in range(1, k_max + 1) if f"recall@{k}" in case["figures"]]
        actual: dict[str, Any] = user_metrics(ranked, relevant, cutoffs, counts, n_users)
        actual |= coverage(ranked, cutoffs, n_items)
        for k in cutoffs:
            possible = np.minimum(lengths, k)
            if library == "lenskit":  # of what K places can hold
                actual[f"recall@{k}"] *= lengths / possible
            else:  # of all relevant items
                actual[f"map@{k}"] *= possible / lengths
        for name, values in case["figures"].items():
            np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-9, err_msg=name)


def test_bootstrap_intervals_are_those_of_the_mean_and_of_paired_differences() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 5, 400)  # what both rankings find hard in a user cancels in pairs
    ours, theirs = {"m": hard + rng.normal(0.3, 1, 400)}, {"m": hard + rng.normal(0, 1, 400)}
    a, b = resampled_means(ours)["m"], resampled_means(theirs)["m"]
    for samples, values in ((a, ours["m"]), (a - b, ours["m"] - theirs["m"])):
        error = values.std() / 20
        low, high = interval(samples)
        assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
        assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_ease_and_item_knn_are_their_definitions() -> None:
    rng = np.random.default_rng(0)
    x = (rng.random((30, 9)) < 0.4).astype(np.float64)
    users, items = x.nonzero()
    train = Jagged.from_pairs(users, items, 30)
    everyone = np.arange(30, dtype=np.int32)
    # EASE: each column is the ridge regression on the other items.
    actual = Ease(3.0).fit(train, 9)(train, everyone)
    for item in range(9):
        others = np.delete(x, item, 1)
        weights = np.linalg.solve(others.T @ others + 3 * np.eye(8), others.T @ x[:, item])
        np.testing.assert_allclose(actual[:, item], others @ weights, atol=1e-5)
    norm = np.linalg.norm(x, axis=0)
    cosine = (x.T @ x / norm[:, None] / norm).astype(np.float32)
    np.fill_diagonal(cosine, 0)
    for row in cosine:
        row[np.argsort(-row, kind="stable")[4:]] = 0
    votes = ItemKNN(4).fit(train, 9)(train, everyone)
    np.testing.assert_allclose(votes, x @ cosine, atol=1e-5)


def test_the_nearest_items_are_those_of_a_full_sort() -> None:
    """Equal cosines, of which there are many, in the order of the items."""
    rng = np.random.default_rng(1)
    x = (rng.random((40, 25)) < 0.25).astype(np.float64)
    x[:, 7] = x[:, 3]  # a pair with the same users
    x[:, 11] = 0  # nobody's
    train = Jagged.from_pairs(*x.nonzero(), 40)
    norm = np.sqrt(np.maximum(x.sum(0), 1))
    cosine = (x.T @ x / norm[:, None] / norm).astype(np.float32)
    np.fill_diagonal(cosine, 0)
    for k in (1, 3, 24, 100):
        expected = np.zeros_like(cosine)
        for item in range(25):
            best = np.argsort(-cosine[item], kind="stable")[:k]
            expected[item, best] = cosine[item, best]
        one_item_each = Jagged.from_pairs(np.arange(25), np.arange(25), 25)
        actual = ItemKNN(k).fit(train, 25)(one_item_each, np.arange(25, dtype=np.int32))
        np.testing.assert_array_equal(actual, expected)


def test_neighbours_of_a_large_catalogue_need_no_matrix() -> None:
    rng = np.random.default_rng(2)
    users, items = rng.integers(0, 2000, 20_000), rng.integers(0, 60_000, 20_000)
    train = distinct(Jagged.from_pairs(users, items, 2000))
    _, difference = ItemKNN(5).fit_to_memory(60_000, 10_000_000)
    assert difference == ""
    actual = ItemKNN(5).fit(train, 60_000)(train, np.array([4, 9], np.int32))
    assert actual.shape == (2, 60_000)  # a matrix of this side would take 29 GB
    with pytest.raises(ConfigError, match=r"item_knn_neighbours=3, or leave it out") as caught:
        ItemKNN(5).fit_to_memory(60_000, 2_000_000)
    assert "keeps 5 neighbours of each of 60,000 items, 0.0024 GB" in str(caught.value)


def test_ease_is_fitted_on_as_many_popular_items_as_memory_has_room_for() -> None:
    rng = np.random.default_rng(4)
    x = (rng.random((50, 8)) < [0.2, 0.6, 0.1, 0.5, 0.6, 0.3, 0.05, 0.4]).astype(np.float64)
    train = Jagged.from_pairs(*x.nonzero(), 50)
    counts = x.sum(0)
    popular = np.sort(np.argsort(-counts, kind="stable")[:5])
    others = np.setdiff1d(np.arange(8), popular)
    actual = Ease(3.0, 5).fit(train, 8)(train, np.arange(50, dtype=np.int32)).numpy()
    inverse = np.linalg.inv(x[:, popular].T @ x[:, popular] + 3 * np.eye(5))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    np.testing.assert_allclose(actual[:, popular], x[:, popular] @ weights, atol=1e-5)
    assert actual[:, others].max() < actual[:, popular].min()
    for row in actual:
        assert np.argsort(-row[others], kind="stable").tolist() == (
            np.argsort(-counts[others], kind="stable").tolist()
        )


@pytest.mark.parametrize(
    ("room_bytes", "n_fitted"),
    [
        # 12 bytes per cell in four fifths of the memory: 15 GB have room for 31,622 items.
        (int(15e9), 30_000),
        (int(1e9), 8_000),  # 8,164
        (int(160e9), None),  # 103,279
        (int(0.015e9), 1_000),
    ],
)
def test_what_ease_is_fitted_on_follows_from_memory(room_bytes: int, n_fitted: int | None) -> None:
    sized, difference = Ease(500.0).fit_to_memory(100_000, room_bytes)
    assert sized == Ease(500.0, n_fitted)
    assert difference == ("" if n_fitted is None else f" on {n_fitted:,} items")


def test_baselines_without_room_say_what_they_need() -> None:
    with pytest.raises(ConfigError, match=r"ease takes 120\.0 GB for a matrix of 100,000 x "):
        Ease(500.0).fit_to_memory(100_000, 10_000_000)
    for baseline in (Popularity(), Ials(IalsConfig(factors=4, l2=0.1, alpha=1.0, iterations=2), 1)):
        assert baseline.fit_to_memory(10**9, 0) == (baseline, "")


def _names_of_rankings(folder: Path, room_bytes: int) -> list[str] | None:
    with process_group("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepfm_dist.ranking.evaluation.available_bytes", lambda: room_bytes)
        patch.setattr("deepfm_dist.ranking.baselines._FIT_BYTES", 10_000)
        dataset = PreparedDataset(folder)
        model = deepfm_of(shard_for_training(config_of(), dataset.manifest, world)[0].eval())
        held_out = RankingEvaluator(dataset, "test", {})
        baselines: dict[str, Baseline] = {"popularity": Popularity(), "ease": Ease(500.0)}
        actual = evaluate_ranking(model, world, held_out, (5,), baselines)
        return None if actual is None else list(actual.figures)


def test_the_table_names_what_ease_was_fitted_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = {(u, int(i)) for u in range(60) for i in rng.integers(0, 1500, 40)}
    (tmp_path / "r.csv").write_text("u,i\n" + "".join(f"{u},{i}\n" for u, i in sorted(rows)))
    data = {
        "interactions": {"file": "r.csv", "user": "u", "item": "i"},
        "features": [{"name": "u", "entity": "user"}, {"name": "i", "entity": "item"}],
        "split": {"method": "per_user", "valid": 0, "test": 0.1},
    }
    prepare(DataConfig.model_validate(data), tmp_path, tmp_path / "p", 1)
    # Two ranks of a machine share its memory: half of it has room for 1,000 items.
    names = run_ranks(_names_of_rankings, 2, tmp_path / "p", int(2 * 1.3 * 10_000 * 1000**2))
    assert names == [["model", "popularity", "ease on 1,000 items"], None]


def test_ials_solves_its_own_least_squares() -> None:
    pytest.importorskip("implicit")
    rng = np.random.default_rng(0)
    x = (rng.random((60, 12)) < 0.3).astype(np.float64)
    train = Jagged.from_pairs(*x.nonzero(), 60)
    fitted = Ials(IalsConfig(factors=4, l2=0.7, alpha=5.0, iterations=200), 1).fit(train, 12)
    assert isinstance(fitted, partial)
    users, items = (f.double().numpy() for f in fitted.args)
    # An item's vector, solved for last, given the users': weight 5 on a positive, else 1.
    for item in range(12):
        weights = np.where(x[:, item] == 1, 5.0, 1.0)
        left = (users.T * weights) @ users + 0.7 * np.eye(4)
        expected = np.linalg.solve(left, users.T @ (weights * x[:, item]))
        np.testing.assert_allclose(items[item], expected, atol=1e-3)
    everyone = np.arange(60, dtype=np.int32)
    np.testing.assert_allclose(fitted(train, everyone), users @ items.T, atol=1e-5)


def test_ials_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"ials needs the library implicit.*pip install"):
        Ials(IalsConfig(factors=8, l2=0.1, alpha=1.0, iterations=2), 1)


def _everything(folder: Path, config: Config, out: Path, k: int) -> dict[str, object]:
    """Ranks, predicts and evaluates with an untrained model whose rows depend on the seed only."""
    dataset = PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded = shard_for_training(config, dataset.manifest, world)[0].eval()
        model, items = deepfm_of(sharded), RankingEvaluator(dataset, "test", {})
        recommend(model, world, dataset, RecommendConfig(k=k), out)
        prediction.ROWS_AT_A_TIME, prediction.BLOCK_ROWS = 20_000, 8192
        source = config.data_root / "train_ratings.csv"
        n_rows = prediction.predict(
            sharded, world, dataset, str(source), {}, out / "predictions.parquet"
        )
        pieces = {t: p.numpy().copy() for t, _, _, p in local_shards(sharded)}
        over = model.interaction_arch.over_arch
        assert isinstance(over, OverArch)
        return {
            "rankings": evaluate_ranking(model, world, items, (5, 10), BASELINES),
            "rows": dict(RowEvaluator(dataset, "test").metrics(sharded, world)),
            "n_rows": n_rows,
            "tables": pieces,
            "layers": [
                (m.weight.detach().numpy(), m.bias.detach().numpy())
                for m in [*over.hidden, over.output]
            ],
            "bias": float(model.interaction_arch.bias),
        }


def test_files_are_byte_identical_at_any_world_size_and_the_ranking_is_right(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    results, digests = {}, {}
    for size in (1, 2, 4):
        out = tmp_path / str(size)
        out.mkdir()
        config = config_of("sharding.tables={genre: {kind: table_wise}}")
        results[size] = run_ranks(_everything, size, sample.folder, config, out, 10)[0]
        digests[size] = [digest(p) for p in sorted(out.iterdir())]
        assert [p.name for p in sorted(out.iterdir())] == [
            "predictions.parquet",
            "recommendations.csv",
            "recommendations.parquet",
        ]
    assert digests[1] == digests[2] == digests[4]
    for size in (2, 4):
        assert results[size]["rankings"] == results[1]["rankings"]
        assert results[size]["rows"] == results[1]["rows"]
    out = tmp_path / "1"
    assert (out / "recommendations.csv").read_text().splitlines()[0] == "user,item"
    frame = pd.read_parquet(out / "recommendations.parquet")
    assert list(frame.columns) == ["user_id", "item_id", "score", "rank"]
    assert frame["user_id"].is_monotonic_increasing
    assert len(frame) == 700 * 10
    pairs = pd.read_csv(out / "recommendations.csv")
    assert (pairs.to_numpy() == frame[["user_id", "item_id"]].to_numpy()).all()
    assert pq.read_schema(out / "recommendations.parquet").types == [
        pa.int64(),
        pa.int64(),
        pa.float32(),
        pa.int32(),
    ]
    predicted = pd.read_parquet(out / "predictions.parquet")
    check_against_brute_force(sample, results[1], frame, predicted)


def check_against_brute_force(
    sample: PreparedDataset, model: dict[str, object], frame: pd.DataFrame, predicted: pd.DataFrame
) -> None:
    """Scores every pair in float64; compares rank by rank, and the predicted rows."""
    tables = {t: w.astype(np.float64) for t, w in model["tables"].items()}  # type: ignore[attr-defined]
    genres = sample.entity_fields["genre"]
    assert isinstance(genres, Jagged)
    genre = np.zeros((len(genres), 12))
    for item in range(len(genres)):
        rows = genres.values[genres.offsets[item] : genres.offsets[item + 1]]
        if len(rows):
            genre[item] = tables["genre"][rows].mean(0)
    layers = model["layers"]
    users = sample.entity_ids("user").to_pylist()
    items = sample.entity_ids("item").to_pylist()
    seen = [sample.positives(s) for s in ("train", "valid", "test")]
    ids = np.array([int(i) for i in items[1:]])
    for user, of_user in list(frame.groupby("user_id"))[::7]:
        row = users.index(str(user))
        v = np.broadcast_to(tables["user"][row], (len(ids), 12))
        fields = np.stack([v, tables["item"][1:], genre[1:]], 1)
        f = fields[:, :, :10]
        score = model["bias"] + fields[:, :, 10].sum(1)
        score = score + 0.5 * ((f.sum(1) ** 2).sum(1) - (f**2).sum((1, 2)))
        x = f.reshape(len(ids), -1)
        for weight, bias in layers[:-1]:  # type: ignore[index]
            x = np.maximum(x @ weight.T.astype(np.float64) + bias, 0)
        weight, bias = layers[-1]  # type: ignore[index]
        score = score + x @ weight[0].astype(np.float64) + bias[0]
        rows = predicted[(predicted["user"].astype(int) == user)]
        rows = rows[rows["item"].astype(int).isin(ids)]
        exact = pd.Series(score, ids)[rows["item"].astype(int)].to_numpy()
        assert len(rows) > 0
        assert (np.abs(rows["score"] - exact) <= 1e-5 * np.maximum(1, np.abs(exact))).all()
        for part in seen:
            known = part.values[part.offsets[row] : part.offsets[row + 1]]
            score[known[known > 0] - 1] = -np.inf
        best = np.lexsort((ids, -score))[:10]
        mine = np.searchsorted(np.sort(ids), of_user["item_id"])
        mine = np.argsort(ids)[mine]
        tolerance = 1e-5 * np.maximum(1, np.abs(score[best]))
        assert (np.abs(of_user["score"].to_numpy() - score[mine]) <= tolerance).all()
        assert (np.abs(score[mine] - score[best]) <= tolerance).all()
        assert list(of_user["rank"]) == list(range(1, 11))


def test_predictions_keep_the_files_rows(sample: PreparedDataset, tmp_path: Path) -> None:
    config = config_of()
    result = run_alone(_everything, sample.folder, config, tmp_path, 10)
    given_rows = pd.read_csv(config.data_root / "train_ratings.csv")
    frame = pd.read_parquet(tmp_path / "predictions.parquet")
    assert result["n_rows"] == len(frame) == len(given_rows)
    assert (frame["user"].astype(int) == given_rows["user"]).all()
    assert (frame["item"].astype(int) == given_rows["item"]).all()
    expected = 1 / (1 + np.exp(-frame["score"].astype(np.float64)))
    np.testing.assert_allclose(frame["probability"], expected, rtol=1e-6)


def test_users_with_few_unseen_items_get_fewer_rows(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    run_alone(_everything, sample.folder, config_of(), tmp_path, 500)
    frame = pd.read_parquet(tmp_path / "recommendations.parquet")
    n_items = sample.manifest.entities["item"] - 1
    parts = [sample.positives(split) for split in ("train", "valid", "test")]
    known = sum(int((p.values > 0).sum()) for p in parts)
    assert len(frame) == 700 * n_items - known


def test_popularity_is_evaluated_as_by_hand(sample: PreparedDataset, tmp_path: Path) -> None:
    actual = run_alone(_everything, sample.folder, config_of(), tmp_path, 10)["rankings"].figures
    train, valid, test = (sample.positives(s) for s in ("train", "valid", "test"))
    counts = np.bincount(train.values, minlength=sample.manifest.entities["item"]).astype(float)
    ids = np.array([0, *map(int, sample.entity_ids("item").to_pylist()[1:])])
    recalls = []
    for user in range(1, len(test)):
        wanted = test.values[test.offsets[user] : test.offsets[user + 1]]
        if len(wanted) == 0:
            continue
        score = counts.copy()
        score[0] = -np.inf
        for part in (train, valid):
            score[part.values[part.offsets[user] : part.offsets[user + 1]]] = -np.inf
        best = np.lexsort((ids, -score))[:10]
        recalls.append(len(set(best) & set(wanted)) / len(wanted))
    assert actual["popularity"]["recall@10"] == pytest.approx(np.mean(recalls), abs=1e-12)


def test_context_is_checked_before_anything_is_scored(sample: PreparedDataset) -> None:
    for split in ("valid", "test"):
        with pytest.raises(ConfigError, match=r"recommend\.context\.hour: unknown context field"):
            RankingEvaluator(sample, split, {"hour": 8})


def _times_sorted_out(folder: Path) -> int:
    """How often the training items were sorted out for all baselines together."""
    done: list[Jagged] = []
    with process_group("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "distinct", lambda rows: (done.append(rows), distinct(rows))[1])
        dataset = PreparedDataset(folder)
        model = deepfm_of(shard_for_training(config_of(), dataset.manifest, world)[0].eval())
        evaluate_ranking(model, world, RankingEvaluator(dataset, "test", {}), (5,), BASELINES)
    return len(done)


def test_baselines_share_what_they_are_fitted_on(sample: PreparedDataset) -> None:
    assert run_alone(_times_sorted_out, sample.folder) == 1


def _written_to_a_full_disk(folder: Path, file: str) -> None:
    ranked = iter([(0, np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))])
    with process_group("cpu") as world:
        parts = output.ResumableOutput(folder / "found.parquet", 1, None, world, "recommendations")
        (parts.parts.folder / file).symlink_to("/dev/full")
        parts.write_ranked(ranked, {"user": pa.array(["u"])}, ("item", pa.array(["i"])), 1)
        parts.finish_ranked({"user": "user"})


@pytest.mark.parametrize("file", [".part-000000.parquet", "merged", "csv"])
def test_a_full_disk_is_one_line(tmp_path: Path, file: str) -> None:
    with pytest.raises(RankFailed) as caught:
        run_alone(_written_to_a_full_disk, tmp_path, file)
    assert re.search(
        r"\n.*DeepFMError: .*: cannot be written: .*No space left.*\n$", str(caught.value)
    )


def _ranked_by_reference(folder: Path, reference: str) -> Comparison | None:
    config = config_of()
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        model = deepfm_of(shard_for_training(config, dataset.manifest, world)[0].eval())
        items = RankingEvaluator(dataset, "test", {})
        return evaluate_ranking(model, world, items, (5, 10), BASELINES, reference)


def test_a_reference_of_counts_ranks_as_popularity_does(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    users, items = (sample.entity_ids(e).to_pylist()[1:] for e in ("user", "item"))
    counts = np.bincount(sample.history.values, minlength=len(items) + 1)[1:].astype(float)
    pairs = pd.MultiIndex.from_product([[*users, "nobody"], [*items, "nothing"]])
    table = pd.DataFrame({"score": np.tile([*counts, 1e9], len(users) + 1)}, index=pairs)
    path = tmp_path / "counts.parquet"
    table.rename_axis(["user", "item"]).reset_index().sample(frac=1).to_parquet(path)
    actual = run_alone(_ranked_by_reference, sample.folder, f"file://{path}").figures
    assert actual["counts"] == actual["popularity"] != actual["model"]
    pd.DataFrame({"user": ["nobody"], "item": ["1"], "score": [1.0]}).to_parquet(path)
    with pytest.raises(RankFailed, match=r"DataError: .*none of its users and items"):
        run_alone(_ranked_by_reference, sample.folder, str(path))


def test_misleading_references_are_refused_or_warned_about(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    held_out = np.flatnonzero(sample.positives("test").lengths)[1:].tolist()
    users, item = sample.entity_ids("user").take(held_out).to_pylist(), "1"
    item = sample.entity_ids("item")[1].as_py()
    twice = [(users[0], item, 1.0), (users[1], item, 1.0), (users[0], item, 2.0)]
    for name, rows, said in (
        ("model", twice[:1], "another ranking of the table is called model"),
        ("popularity", twice[:1], "another ranking of the table is called popularity"),
        ("other", twice, f"user '{users[0]}' and item '{item}' have 2 scores; leave one of them"),
    ):
        path = tmp_path / f"{name}.csv"
        pd.DataFrame(rows, columns=["user", "item", "score"]).to_csv(path, index=False)
        with pytest.raises(RankFailed, match=said):
            run_alone(_ranked_by_reference, sample.folder, str(path))
    path = tmp_path / "part.csv"
    pd.DataFrame(twice[:2], columns=["user", "item", "score"]).to_csv(path, index=False)
    messages = run_alone(_messages_about_reference, sample.folder, str(path))
    assert len(messages) == 2
    assert re.search(r"part\.csv: scores for 2 of \d+ users", messages[0])
    assert re.search(r"no recommendations for \d+ users, counted as misses", messages[1])


def _messages_about_reference(folder: Path, reference: str) -> list[str]:
    records: list[logging.LogRecord] = []
    handler, told_by = logging.Handler(), logging.getLogger("deepfm_dist")
    handler.emit = records.append  # type: ignore[method-assign]
    told_by.addHandler(handler)
    told_by.setLevel(logging.INFO)
    _ranked_by_reference(folder, reference)
    return [r.getMessage() for r in records if "part.csv" in r.getMessage()]


class _Counting(AnySize):
    """A baseline that keeps what it is fitted on."""

    counts: np.ndarray

    def fit(self, train: Jagged, n_items: int) -> Any:
        self.counts = np.bincount(train.values, minlength=n_items)
        return Popularity().fit(train, n_items)


def _fitted_on(folder: Path) -> tuple[list[int], list[int]]:
    with process_group("cpu") as world:
        dataset, kept = PreparedDataset(folder), _Counting()
        model = deepfm_of(shard_for_training(config_of(), dataset.manifest, world)[0].eval())
        items = RankingEvaluator(dataset, "test", {})
        evaluate_ranking(model, world, items, (5,), {"kept": kept})
        return kept.counts.tolist(), dataset.popularity()[items.catalogue.rows].tolist()


def test_baselines_are_fitted_on_all_training_rows_of_rare_users_too(tmp_path: Path) -> None:
    features = "[{name: user, entity: user, min_count: 45}, {name: item, entity: item}]"
    config = config_of(f"data.features={features}", f"run.prepared_root={tmp_path}")
    prepare(config.data, config.data_root, config.prepared_dir, 1)
    dataset = PreparedDataset(config.prepared_dir)
    assert len(dataset.rare_history.values) > 1000
    fitted, expected = run_alone(_fitted_on, config.prepared_dir)
    assert fitted == expected


def every_kind_of_field(folder: Path) -> Config:
    """Single and several values and numbers on both sides, a shared table, two context fields."""
    rng = np.random.default_rng(0)
    users, items = (
        np.repeat(np.arange(60), 8),
        rng.permuted(np.tile(np.arange(40), (60, 1)), axis=1),
    )
    frame = pd.DataFrame({"user": users, "item": items[:, :8].ravel()})
    frame["hour"], frame["warmth"] = rng.integers(0, 3, len(frame)), rng.normal(size=len(frame))
    frame.to_csv(folder / "rows.csv", index=False)
    for entity, n in (("user", 60), ("item", 46)):  # six items have no rows
        tags = ["|".join(map(str, rng.permutation(12)[: rng.integers(0, 8)])) for _ in range(n)]
        numbers = rng.normal(5, 2, n).round(2)
        side = pd.DataFrame({entity: range(n), "tags": tags, "number": numbers})
        side.to_csv(folder / f"{entity}s.csv", index=False)
    tags = {"column": "tags", "separator": "|", "table": "tag"}
    number = {"column": "number", "kind": "numeric", "transform": "standard"}
    of_user, is_item_field = (
        {"entity": entity, "file": f"{entity}s.csv"} for entity in ("user", "item")
    )
    features: list[dict[str, object]] = [
        {"name": "hour"},
        {"name": "item_tags", "pooling": "sum", **is_item_field, **tags},
        {"name": "item_number", **is_item_field, **number},
        {"name": "user", "entity": "user"},
        {"name": "user_tags", **of_user, **tags},
        {"name": "warmth", "kind": "numeric"},
        {"name": "item", "entity": "item"},
        {"name": "user_number", **of_user, **number},
    ]
    rows = {"file": "rows.csv", "user": "user", "item": "item"}
    return config_from(
        {
            "run": {"prepared_root": str(folder / "prepared"), "runs_root": str(folder / "runs")},
            "data": {"root": str(folder), "interactions": rows, "features": features},
            "model": {
                "embedding_dim": 6,
                "init_std": 0.3,
                "over_arch_layer_sizes": [16, 8],
                "batch_norm": True,
                "dropout": 0.1,
            },
            "trainer": {"batch_size": 200},
            "sharding": {"kind": "row_wise"},
            "recommend": {"context": {"hour": "2", "warmth": 1.5}},
        }
    )


def _trained_and_saved(config: Config) -> None:
    with process_group("cpu") as world:
        run = Run(config.prepared_dir, config, world)
        run.losses(1, 10)
        run.save(config.run_dir, 10)


def _recommended_and_predicted(config: Config, out: Path, *overrides: str) -> None:
    with process_group("cpu") as world:
        trained = open_trained(config, overrides, world)
        context, dataset = config.recommend.context, trained.dataset
        wanted = RecommendConfig(k=12, mask=("train",), context=context, cold_items="include")
        recommend(deepfm_of(trained.sharded), world, dataset, wanted, out, trained.checkpoint)

        def write_pairs() -> None:
            pairs = pd.read_parquet(out / "recommendations.parquet")[["user_id", "item_id"]]
            pairs.columns = pd.Index(["user", "item"])
            pairs.assign(**context).to_csv(out / "pairs.csv", index=False)

        world.run_on_rank0("pairs", write_pairs)
        source, target = out / "pairs.csv", out / "predictions.parquet"
        prediction.predict(trained.sharded, world, dataset, str(source), {}, target)


def test_files_are_identical_at_any_world_size_and_equal_the_forward_pass(
    tmp_path: Path,
) -> None:
    config = every_kind_of_field(tmp_path)
    prepare(config.data, config.data_root, config.prepared_dir, seed=1)
    run_ranks(_trained_and_saved, 4, config)
    files = ("recommendations.csv", "recommendations.parquet", "predictions.parquet")
    digests = set()
    for size, kind in [(1, "auto"), (2, "row_wise"), (4, "row_wise"), (4, "auto")]:
        out = tmp_path / f"{size}_{kind}"
        out.mkdir()
        sharding = config.sharding.model_copy(update={"kind": kind})
        elsewhere = config.model_copy(update={"sharding": sharding})
        run_ranks(_recommended_and_predicted, size, elsewhere, out)
        digests.add(tuple(digest(out / name) for name in files))
    assert len(digests) == 1
    ranked = pd.read_parquet(out / "recommendations.parquet")["score"].to_numpy()
    forward = pd.read_parquet(out / "predictions.parquet")["score"].to_numpy()
    assert len(ranked) == 60 * 12
    assert ranked.std() > 0.1
    items = pd.read_parquet(out / "recommendations.parquet")["item_id"]
    assert (items >= 40).any()
    assert (np.abs(ranked - forward) <= 1e-5 * np.maximum(1, np.abs(forward))).all()


def test_a_checkpoint_refuses_other_settings_and_other_data(tmp_path: Path) -> None:
    config = every_kind_of_field(tmp_path)
    prepare(config.data, config.data_root, config.prepared_dir, seed=1)
    run_alone(_trained_and_saved, config)
    model = config.model.model_copy(update={"embedding_dim": 8})
    other = config.model_copy(update={"model": model})
    for override in ("model.embedding_dim=8", "model={embedding_dim: 8}"):
        refusal = r"ConfigError: model\.embedding_dim=8: .* was trained with 6"
        with pytest.raises(RankFailed, match=refusal):
            run_alone(_recommended_and_predicted, other, tmp_path, override)
    prepare(config.data, config.data_root, config.prepared_dir, seed=2)
    with pytest.raises(RankFailed, match=r"CheckpointError: .* was trained on vocabulary"):
        run_alone(_recommended_and_predicted, config, tmp_path)


def test_who_is_not_ranked_is_said_only_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test.csv").write_text("u,i\na,y\nnobody,y\n")
    split = {"valid": 0, "test_file": "test.csv"}
    rows = "u,i\na,x\nb,x\nb,y\nc,y\nc,z\n"
    dataset = small(tmp_path, rows, split=split, negatives={"evaluation_per_positive": 1})
    caplog.clear()
    with caplog.at_level("INFO"):
        for is_logged in (True, False):
            RankingEvaluator(dataset, "test", {}, is_logged=is_logged)
    assert [record.message for record in caplog.records] == [
        "2 users without held-out items: not ranked",
        "1 held-out item of unknown users: not ranked",
    ]
