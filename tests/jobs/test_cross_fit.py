"""Models of the folds of a click log, and their mean as one model."""

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config, config_from, with_settings
from deepfm_dist.data.dataset import PreparedDataset, Rows
from deepfm_dist.distributed.checkpoint import find_checkpoint, read_state
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import DistributedModelParallel
from deepfm_dist.distributed.world import World
from deepfm_dist.interop.logistic import fit_folds, folds
from deepfm_dist.jobs.cross_fit import CrossFitting, _taken, kinds_of
from deepfm_dist.jobs.first_order import put_weights, without_output
from deepfm_dist.jobs.train import train
from deepfm_dist.jobs.widen import empty_model
from deepfm_dist.recipe import choices_in
from deepfm_dist.runs.trained import find_run, open_trained
from deepfm_dist.storage import delete_tree
from deepfm_dist.training.evaluation import RowEvaluator
from tests.interop.test_logistic import _clicks
from tests.ranks import run_in_fork, run_ranks

FloatArray = npt.NDArray[np.float64]


def _config(folder: Path) -> Config:
    trainer = {"max_steps": 8, "refit_best": True}
    model = {"dropout": 0, "embedding_dim": 4, "over_arch_layer_sizes": [12, 6]}
    optimizer = {"tables": {"lr": 0.05}, "dense": {"lr": 0.02}}
    return _clicks(folder, 0.5, 0.4, model=model, trainer=trainer, optimizer=optimizer)


def _text(config: Config) -> str:
    train(config)
    path = find_checkpoint(config.run_dir, "auto")
    assert (path.parents[1].name, path.name) == ("refit", "step_00000008")
    [choice] = [c for c in choices_in(read_state(path)) if c.setting == "trainer.refit_best"]
    return choice.reason


def _logits(model: DistributedModelParallel, world: World, dataset: PreparedDataset) -> FloatArray:
    model.eval()
    rows = RowEvaluator(dataset, "test").scored_rows(model, world)
    assert rows is not None
    return rows.logits


def test_fms_of_many_rows_have_what_the_recipe_chooses_for_an_fm(sample: PreparedDataset) -> None:
    config = with_settings(
        config_from({"data": sample.manifest.data}),
        {"optimizer.tables": {"name": "adam", "lr": 0.0007, "l2": 0.005}, "model.deep": True},
    )
    fields, n = len(sample.manifest.features), sample.manifest.splits["train"].rows

    def rates(*chosen: str) -> list[tuple[float, float]]:
        fitting = CrossFitting(config, sample, None, lambda: False, chosen)  # type: ignore[arg-type]
        tables = [kind.optimizer.tables for kind in fitting._kinds()]
        return [(each.lr, each.l2) for each in tables]

    both = rates("optimizer.tables.lr", "optimizer.tables.l2")
    assert both == [(0.0007, 0.005), (0.005, pytest.approx(fields / n, rel=0.05))]
    assert rates("optimizer.tables.lr")[1] == (0.005, 0.005)  # the L2 was typed
    assert rates() == [(0.0007, 0.005)] * 2


def _agrees_with_its_parts(folder: Path) -> str:
    config = _config(folder)
    text = _text(config)
    delete_tree(config.run_dir / "refit")  # as if it had been killed before the end
    assert _text(config) == text
    with process_group("cpu") as world:
        used = open_trained(config, (), world)
        dataset = used.dataset
        config = config_from(read_state(used.checkpoint)["trained_config"])
        assert used.config.model.embedding_dim == 2 * 5 * 4
        assert used.config.model.over_arch_layer_sizes == (60, 30)
        fitting = CrossFitting(config, dataset, world, lambda: False)
        columns = fitting._columns()
        rows, fold_of = Rows.of(columns), folds(1_200 - 240)
        assert rows.labels is not None and rows.weights is not None
        log = dataset.rows("train"), dataset.rows("valid")
        assert rows.labels.tolist() == [y for part in log for y in part.labels]
        starts = fit_folds(dataset, rows, fold_of)
        regression, of_parts = np.zeros(240), np.zeros((3, 240))
        out_of_fold = np.zeros((3, rows.n))
        for fold, start in enumerate(starts.weights):
            alone, _ = empty_model(config, dataset.manifest, world)
            put_weights(start, alone)
            regression += _logits(alone, world, dataset) / 5
            for kind, settings in enumerate(kinds_of(config)):
                trained = fitting._train(
                    settings, fold, start, _taken(columns, fold_of != fold), steps=8
                )
                assert trained is not None
                own, part = Rows.of(_taken(columns, fold_of == fold)), 2 * kind
                out_of_fold[part : part + 2, fold_of == fold] = fitting._logits(trained[0], own)
                if kind == 0:
                    with without_output(deepfm_of(trained[0]).interaction_arch.over_arch):
                        of_parts[0] += _logits(trained[0], world, dataset) / 5
                    part = 1
                of_parts[part] += _logits(trained[0], world, dataset) / 5
        logits = _logits(used.sharded, world, dataset)
    constant = starts.constants.mean()
    deep = [of_parts[0] - regression, of_parts[1] - of_parts[0]]
    parts = np.stack([regression - constant, *deep, of_parts[2] - regression], 1)
    exact = np.linalg.lstsq(parts, logits - constant, rcond=None)[0]
    shares = [float(share) for share in re.findall(r"(\d\.\d\d) of", text)]
    assert exact == pytest.approx(shares, abs=0.006)
    assert logits == pytest.approx(constant + parts @ exact, abs=1e-4)
    figures = [float(figure) for figure in re.findall(r"0\.\d{4}", text)]
    scores = [starts.held_out, starts.constants[fold_of]]
    for figure, of_rows in zip(figures[1:], [*out_of_fold[1:], *scores], strict=True):
        losses = np.log1p(np.exp(np.where(rows.labels == 1, -of_rows, of_rows)))
        assert figure == pytest.approx(np.average(losses, weights=rows.weights), abs=6e-5)
    assert figures[0] < min(figures[1:])
    # The figure of a search: of validation rows, by what does not know them.
    base, known = starts.constants[fold_of], starts.held_out
    of_deep, with_over_arch, of_fm = out_of_fold
    added = [known - base, of_deep - known, with_over_arch - of_deep, of_fm - known]
    blended = base + exact @ np.stack(added)
    losses = np.log1p(np.exp(np.where(rows.labels == 1, -blended, blended)))[-240:]
    best = read_state(used.checkpoint)["trainer"]["best"]
    assert best == pytest.approx(np.average(losses, weights=rows.weights[-240:]), abs=1e-4)
    return text


def test_the_mean_is_one_model_on_any_number_of_ranks_and_after_a_kill(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    text = run_in_fork(_agrees_with_its_parts, tmp_path / "one")
    assert run_ranks(_text, 2, _config(tmp_path / "two")) == [text, text]


def _without(folder: Path) -> None:
    diverges = {"optimizer.tables.lr": 2.0, "run.name": "fm", "model.deep": False}
    config = with_settings(_config(folder), diverges)
    text = _text(config)
    assert "of what FM adds;" in text and "DeepFM" not in text
    assert find_run(config, ()).config.model.embedding_dim == 5 * 4
    # The loop was best at another step than the part has.
    assert find_checkpoint(config.run_dir, "best").name == "step_00000000"
    assert find_checkpoint(config.run_dir / "refit", "auto").name == "step_00000008"


def test_a_model_without_an_over_arch_has_folds_of_its_own_kind(tmp_path: Path) -> None:
    run_in_fork(_without, tmp_path)
