"""First-order weights that start from a logistic regression with one prior for each field."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config, config_from, resolve, with_settings
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.data.jagged import Jagged
from deepfm_dist.data.preparation.local import prepare
from deepfm_dist.distributed.checkpoint import complete_steps, find_checkpoint, load, read_state
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.events import ValidEvent, read_events
from deepfm_dist.interop.logistic import (
    Inputs,
    VectorInputs,
    _newton,
    cross_validate,
    fit,
    fit_first_order,
)
from deepfm_dist.interop.shares import log_loss
from deepfm_dist.jobs.first_order import put_first_order
from deepfm_dist.jobs.train import train
from deepfm_dist.recipe import choices_in
from deepfm_dist.runs.start import begin
from deepfm_dist.runs.trained import find_run
from deepfm_dist.training.evaluation import RowEvaluator, ScoredRows
from tests.ranks import run_in_fork, run_ranks


def _inputs(codes: npt.NDArray[Any], numbers: npt.NDArray[Any], sizes: list[int]) -> Inputs:
    """One-hot fields of some numbers of values, then numbers, then the bias."""
    n, n_fields = codes.shape
    columns = codes + np.r_[0, np.cumsum(sizes)][:n_fields]
    dense = np.c_[numbers, np.ones(n)]
    groups = [*sizes, numbers.shape[1], 1]
    return Inputs(
        np.r_[np.repeat(np.arange(n), n_fields), np.repeat(np.arange(n), dense.shape[1])],
        np.r_[columns.ravel(), np.tile(sum(sizes) + np.arange(dense.shape[1]), n)],
        np.r_[np.ones(columns.size), dense.ravel()],
        np.repeat(np.arange(len(groups)), groups),
        n,
    )


def _drawn(n: int, seed: int, effect: float) -> tuple[Inputs, npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows whose label hangs on the first of two fields and on a number."""
    rng = np.random.default_rng(seed)
    sizes = [40, 60]
    codes = np.stack([rng.integers(0, size, n) for size in sizes], 1)
    numbers = rng.normal(size=(n, 1))
    weights = rng.normal(0, effect, sizes[0])
    logits = weights[codes[:, 0]] + 0.5 * numbers[:, 0] - 1
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float)
    return _inputs(codes, numbers, sizes), labels, weights


def test_vectors_of_items_are_numbers_of_their_rows() -> None:
    rng = np.random.default_rng(4)
    vectors, which = rng.normal(size=(30, 3)), rng.integers(0, 30, 1_000)
    codes = rng.integers(0, 20, (1_000, 1))
    labels = (rng.random(1_000) < 1 / (1 + np.exp(-vectors[which, 0]))).astype(float)
    as_numbers = _inputs(codes, vectors[which], [20])
    bare = _inputs(codes, np.zeros((1_000, 0)), [20])
    as_vectors = Inputs(
        bare.rows,
        np.where(bare.columns == 20, 23, bare.columns),  # the bias stands behind the vector
        bare.values,
        as_numbers.groups,
        1_000,
        vectors=(VectorInputs(20, which, vectors),),
    )
    row_weights = rng.uniform(0.5, 1.5, 1_000)
    for ours, theirs in zip(
        fit(as_vectors, labels, row_weights), fit(as_numbers, labels, row_weights), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert fit(as_vectors, labels, row_weights)[0][20] > 0.7


def test_with_given_precisions_it_is_sklearns_regression() -> None:
    inputs, labels, _ = _drawn(2_000, 1, 1.0)
    row_weights = np.random.default_rng(2).uniform(0.5, 1.5, 2_000)
    precisions = np.full(102, 3.0)
    precisions[-1] = 1e-6
    found, _ = _newton(inputs, labels, row_weights, np.zeros(102), precisions, None)
    matrix = np.zeros((2_000, 102))
    np.add.at(matrix, (inputs.rows, inputs.columns), inputs.values)
    model = LogisticRegression(C=1 / 3, tol=1e-8, max_iter=1000)
    model.fit(matrix[:, :-1], labels, row_weights)
    assert found[:-1] == pytest.approx(model.coef_[0], abs=1e-3)
    assert found[-1] == pytest.approx(model.intercept_[0], abs=1e-3)


def test_the_spread_of_each_fields_weights_is_found() -> None:
    inputs, labels, truth = _drawn(20_000, 3, 0.8)
    weights, precisions = fit(inputs, labels, np.ones(20_000))
    assert np.corrcoef(weights[:40], truth)[0, 1] > 0.98
    assert precisions[0] ** -0.5 == pytest.approx(truth.std(), rel=0.3)
    assert precisions[1] ** -0.5 < 0.1  # this field says nothing
    assert weights[100] == pytest.approx(0.5, abs=0.05)


def test_the_spread_is_found_from_few_rows_too() -> None:
    start = np.full(102, 10.0)
    start[-1] = 1e-6
    shares = []
    for seed in range(6):  # 20 rows for each weight: how much they determine it counts
        inputs, labels, truth = _drawn(800, seed, 0.8)
        _, precisions = _newton(inputs, labels, np.ones(800), np.zeros(102), start, inputs.groups)
        shares.append(precisions[0] ** -0.5 / truth.std())
    assert np.mean(shares) == pytest.approx(1, abs=0.2)


def test_labels_that_are_all_the_same_give_a_bias_alone() -> None:
    inputs, labels, _ = _drawn(100, 4, 1.0)
    weights, _ = fit(inputs, np.zeros_like(labels), np.ones(100))
    assert (weights[:-1] == 0).all()
    assert weights[-1] == pytest.approx(np.log(0.5 / 100.5))


def _clicks(folder: Path, effect: float, pairs: float = 0.0, **sections: Any) -> Config:
    """A log of 1,200 rows: a field, a bag of values, a number, weights.

    Args:
        folder: where it is written.
        effect: how far the log-odds hang on the field and the number.
        pairs: how far they hang on a number whose sign depends on the field.
        sections: of settings.
    """
    rng = np.random.default_rng(5)
    log = pd.DataFrame({"a": rng.integers(0, 9, 1_200)})
    log["tags"] = ["|".join(map(str, rng.integers(0, 6, 1 + k % 3))) for k in range(1_200)]
    log["x"] = rng.normal(2, 3, 1_200).round(3)
    log["w"] = rng.integers(1, 4, 1_200)
    logits = effect * (rng.normal(size=9)[log["a"]] + 0.3 * (log["x"] - 2)) - 0.5
    logits += pairs * np.where(log["a"] % 2, 1, -1) * (log["x"] - 2)
    log["y"] = (rng.random(1_200) < 1 / (1 + np.exp(-logits))).astype(int)
    log.to_csv(folder / "log.csv", index=False)
    roots = {f"{kind}_root": str(folder / kind) for kind in ("prepared", "runs")}
    data = {
        "task": "ctr",
        "root": str(folder),
        "interactions": {"file": "log.csv", "label": "y", "weight": "w"},
        "features": [
            {"name": "a"},
            {"name": "tags", "separator": "|", "pooling": "mean"},
            {"name": "x", "kind": "numeric"},
        ],
        "split": {"valid": 0.2, "test": 0.2},
    }
    trainer = {"refit_best": False} | sections.pop("trainer", {})
    run = roots | {"loggers": []}
    return config_from({"run": run, "data": data, "trainer": trainer, **sections})


def _logits_of_start(config: Config) -> tuple[list[float], dict[str, list[float]], float]:
    with process_group("cpu") as world:
        dataset = PreparedDataset(config.prepared_dir)
        config, _ = resolve(config, dataset.manifest)
        sharded, _ = shard_for_training(config, dataset.manifest, world)
        put_first_order(dataset, sharded, world)
        above = deepfm_of(sharded).interaction_arch
        dim = above.embedding_dim
        pieces = {table: piece[:, dim].tolist() for table, *_, piece in local_shards(sharded)}
        assert above.dense_first_order is not None
        return above.dense_first_order.tolist(), pieces, above.bias.item()


def test_the_model_starts_from_it_on_any_number_of_ranks(tmp_path: Path) -> None:
    config = _clicks(tmp_path, 1.5, sharding={"kind": "row_wise"})
    prepare(config.data, config.data_root, config.prepared_dir, seed=1)
    dataset = PreparedDataset(config.prepared_dir)
    fitted = fit_first_order(dataset)
    train_rows = dataset.rows("train")
    # Its gradient is 0 at the maximum: the residuals of each value add up to precision * weight.
    assert train_rows.weights is not None and train_rows.labels is not None
    values, bags = train_rows.context["a"], train_rows.context["tags"]
    assert isinstance(bags, Jagged)
    mean = [fitted.weights.tables["tags"][bag].mean().item() for bag in bags.lists()]
    assert isinstance(values, np.ndarray)
    logits = (
        fitted.weights.tables["a"][torch.tensor(values), 0].numpy()
        + np.array(mean)
        + fitted.weights.bias
    )
    logits += fitted.weights.numbers[0].item() * np.asarray(train_rows.context["x"])
    positive = train_rows.weights @ train_rows.labels + 0.5
    constant = np.log(positive / (train_rows.weights.sum() + 1 - positive))
    logits = constant + (logits - constant) / fitted.share  # the regression itself
    residual = train_rows.weights * (train_rows.labels - 1 / (1 + np.exp(-logits)))
    by_value = np.bincount(np.asarray(values), residual)
    held_back = (
        fitted.weights.tables["a"][:, 0].numpy() / fitted.share / fitted.deviations["a"] ** 2
    )
    assert by_value == pytest.approx(held_back[: len(by_value)], abs=0.05)
    assert residual.sum() == pytest.approx(0, abs=0.05)
    alone, [one, two] = (
        run_ranks(_logits_of_start, 1, config)[0],
        run_ranks(_logits_of_start, 2, config),
    )
    for numbers, _, bias in (alone, one, two):
        assert numbers == pytest.approx(fitted.weights.numbers.tolist())
        assert bias == pytest.approx(fitted.weights.bias)
    for table in ("a", "tags"):
        assert alone[1][table] == pytest.approx(fitted.weights.tables[table][:, 0].tolist())
        assert one[1].get(table, []) + two[1].get(table, []) == alone[1][table]


def test_cross_validated_rows_do_not_know_their_labels() -> None:
    inputs, labels, _ = _drawn(300, 6, 1.0)
    ones = np.ones(300)
    weights, precisions = fit(inputs, labels, ones)
    held_out, constants = cross_validate(inputs, labels, ones, weights, precisions)
    for row in (0, 17):
        flipped = labels.copy()
        flipped[row] = 1 - flipped[row]
        again = cross_validate(inputs, flipped, ones, weights, precisions)
        assert again[0][row] == pytest.approx(held_out[row], abs=1e-3)
        assert again[1][row] == constants[row]
        assert np.abs(again[0] - held_out).max() > 0.01  # other folds do know it
    assert log_loss(held_out, labels, ones) < log_loss(constants, labels, ones)
    same = cross_validate(inputs, np.zeros(300), ones, weights, precisions)
    assert (same[0] == same[1]).all()


def _scores(config: Config, world: World, path: Path, over_arch: bool = True) -> ScoredRows:
    """Validation rows by a checkpoint, with or without what its over-arch adds. One rank."""
    dataset = PreparedDataset(config.prepared_dir)
    sharded, _ = shard_for_training(config, dataset.manifest, world)
    load(path, world, sharded)
    sharded.eval()
    if not over_arch:
        for parameter in deepfm_of(sharded).interaction_arch.over_arch.output.parameters():
            parameter.data.zero_()
    rows = RowEvaluator(dataset, "valid").scored_rows(sharded, world)
    assert rows is not None
    return rows


def _blended(config: Config) -> str:
    state = train(config).state
    assert state.best_step
    path = find_checkpoint(config.run_dir, "auto")
    assert path.parents[1].name == "selected"
    [choice] = [c for c in choices_in(read_state(path)) if c.setting == "model.linear"]
    return choice.reason


def _with_pairs(folder: Path) -> Config:
    trainer = {"max_steps": 30, "validate_every_epochs": 1}
    sections = {"trainer": trainer, "optimizer": {"tables": {"lr": 0.05}}}
    return _clicks(folder, 0.5, 0.4, model={"dropout": 0}, **sections)  # which depends on the rank


def _blends(folder: Path) -> str:
    config = _with_pairs(folder)
    reason = _blended(config)
    with process_group("cpu") as world:
        run = find_run(config, ())
        used = _scores(run.config, world, run.checkpoint)
        loop = run.config
        start = _scores(loop, world, find_checkpoint(config.run_dir, 0))
        best = find_checkpoint(config.run_dir, "best")
        # The next day's training starts from what the loop learned, not from a share of it.
        from_loop = {"start_from": str(config.run_dir), "start_weights_only": True}
        settings = {"run.name": "next", "checkpoint": from_loop}
        next_day = begin(with_settings(loop, settings), run.dataset.manifest, 1).saved
        assert next_day is not None and next_day.path == best
        trained, fm = _scores(loop, world, best), _scores(loop, world, best, over_arch=False)
    shares = [float(share) for share in re.findall(r"(\d\.\d\d) of (?:what|the)", reason)]
    assert all(0 < share < 1 for share in shares)
    parts = [fm.logits - start.logits, trained.logits - fm.logits]
    exact = np.linalg.lstsq(np.stack(parts, 1), used.logits - start.logits, rcond=None)[0]
    assert exact == pytest.approx(shares, abs=0.006)
    # Up to the products of the start's factors, of a standard deviation of 0.01.
    assert used.logits - start.logits == pytest.approx(exact @ np.stack(parts), abs=5e-3)
    figures = [float(f) for f in re.findall(r"0\.\d{4}", reason)][-4:]
    assert len(np.unique(used.weights)) == 3
    prior = PreparedDataset(config.prepared_dir).manifest.log_odds[0]
    for figure, logits in zip(
        figures, (used.logits, start.logits, trained.logits, np.full(240, prior)), strict=True
    ):
        losses = np.log1p(np.exp(np.where(used.labels == 1, -logits, logits)))
        assert figure == pytest.approx(np.average(losses, weights=used.weights), abs=6e-5)
    return reason


def test_a_finished_run_uses_a_share_of_what_training_added(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    reason = run_in_fork(_blends, tmp_path / "one")
    config = _with_pairs(tmp_path / "two")
    assert run_ranks(_blended, 2, config) == [reason, reason]


def _trains(folder: Path) -> None:
    settings = {"max_steps": 6, "validate_every_epochs": 1}
    config = _clicks(folder, 0.0, trainer=settings, optimizer={"tables": {"lr": 1.0}})
    state = train(config).state
    assert state.best_step == 0  # at such a rate, nothing good is learned
    assert 0 in complete_steps(config.run_dir)
    path = find_checkpoint(config.run_dir, "auto")
    assert (path.parents[1].name, path.name) == ("selected", "step_00000000")
    first = next(
        e for e in read_events(config.run_dir / "metrics.jsonl") if isinstance(e, ValidEvent)
    )
    assert (first.step, first.epoch) == (0, 0)
    assert first.figures["ne"] < 1.01
    again = with_settings(config, {"trainer.max_steps": 9})
    assert train(again).state.best == state.best
    with process_group("cpu") as world:
        run = find_run(config, ())
        used = _scores(run.config, world, run.checkpoint)
        start = _scores(run.config, world, find_checkpoint(config.run_dir, 0))
        assert (used.logits == start.logits).all()
    for settings, message in (
        ({"model.first_order": False}, "model.first_order is off"),
        ({"model.linear": "ease"}, "model.linear=ease: for models that are trained on users"),
    ):
        tree = {"run.name": "refused", "model.linear": "logistic"} | settings
        with pytest.raises(ConfigError, match=message):
            train(with_settings(config, tree))


def test_what_was_learned_badly_leaves_the_start(tmp_path: Path) -> None:
    run_in_fork(_trains, tmp_path)
