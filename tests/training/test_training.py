"""The loop: it learns, keeps its schedule, repeats itself exactly, and never trains on garbage."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepfm_dist import evaluate as evaluate_command
from deepfm_dist import prepare as prepare_command
from deepfm_dist import train as train_command
from deepfm_dist.build import deepfm_of
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.checkpoint import (
    complete_steps,
    find_checkpoint,
    read_state,
    steps_in,
)
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs import train as train_job
from deepfm_dist.jobs.validation import check_monitor_name
from deepfm_dist.log import MetricsLog
from deepfm_dist.model.deepfm import OverArch
from deepfm_dist.training import trainer
from deepfm_dist.training.evaluation import RowEvaluator
from deepfm_dist.training.settings import TrainerConfig
from deepfm_dist.training.state import LoopState, NonFiniteLoss
from deepfm_dist.training.stopping import StopSignals
from deepfm_dist.training.trainer import Hooks, Trainer
from tests.data.damage import cell, setting
from tests.ranks import RankFailed, run_alone, run_ranks
from tests.steps import SMALL, Run, config_of, difference

Change = Callable[[Batch, int, int], None]


class LoadedModel:
    """What a rank saw of a training run.

    Attributes:
        losses: of each step.
        saved: states of the loop that were saved.
        figures: on validation rows, at the end.
        weights: this rank's pieces of the tables, and the over-arch's first layer.
    """

    def __init__(
        self,
        sample: PreparedDataset,
        out: Path,
        *overrides: str,
        state: LoopState | None = None,
        change: Change | None = None,
        validations: list[float] | None = None,
        signal_at: int | None = None,
        deferred: bool | None = None,
    ) -> None:
        trainer.train_pipeline = partial(train_pipeline, deferred=deferred)
        with process_group("cpu") as world:
            config = config_of(*SMALL, "trainer.log_every_steps=1", *overrides)
            run = Run(sample.folder, config, world)
            batch_of = run.batches.batch

            def batch(step: int) -> Batch:
                made = batch_of(step)
                if change:
                    change(made, step, world.rank)
                return made

            def validate() -> dict[str, float]:
                found = world.broadcast(dict(held_out.metrics(run.sharded, world)))
                monitor = config.monitor or "auc"
                return found | ({monitor: validations.pop(0)} if validations else {})

            def save(state: LoopState) -> None:
                self.saved.append(replace(state, lifetime=[*state.lifetime]))
                if state.step == signal_at and world.rank == world.world_size - 1:
                    os.kill(os.getpid(), signal.SIGTERM)

            run.batches.batch = batch  # type: ignore[method-assign]
            held_out = RowEvaluator(sample, "valid")
            self.losses: list[float] = []
            self.saved: list[LoopState] = []
            metrics = MetricsLog(out, world.is_first, 0, [self._note])
            handler = signal.getsignal(signal.SIGTERM)
            with StopSignals() as asked_to_stop:
                state = Trainer(
                    run.sharded,
                    run.optimizer,
                    run.batches,
                    world,
                    config,
                    seed=1,
                    state=state or LoopState(),
                    metrics=metrics,
                    hooks=Hooks(validate, save=save, asked_to_stop=asked_to_stop),
                ).fit()
            assert signal.getsignal(signal.SIGTERM) is handler
            self.steps, self.state = state.step, state
            run.sharded.eval()
            self.figures = dict(held_out.metrics(run.sharded, world))
            self.weights = [piece.numpy().copy() for *_, piece in local_shards(run.sharded)]
            over_arch = deepfm_of(run.sharded).interaction_arch.over_arch
            assert over_arch is not None
            self.weights += [p.detach().numpy().copy() for p in over_arch.state_dict().values()]

    def _note(self, event: str, values: Any) -> None:
        if event == "train":
            self.losses.append(values["log_loss"])


def trained(sample: PreparedDataset, out: Path, *overrides: str, **more: Any) -> LoadedModel:
    return LoadedModel(sample, out, *overrides, **more)


def train_quietly(run: Run) -> None:
    """Trains without validations, checkpoints and log."""
    config = run.config
    Trainer(
        run.sharded,
        run.optimizer,
        run.batches,
        run.process_group,
        config,
        seed=1,
        state=LoopState(),
        metrics=MetricsLog(run.dataset.folder, is_first=False),
    ).fit()


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    actual = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [e for e in actual if e["event"] == kind]


SHORT = ("trainer.epochs=1", "trainer.max_steps=20", "trainer.validate_every_epochs=0")


def test_training_learns_and_keeps_its_schedule(sample: PreparedDataset, tmp_path: Path) -> None:
    options = (
        "trainer={epochs: 8, validate_every_epochs: 4, log_every_steps: 50, batch_size: 2048}",
        "checkpoint.every_epochs=2",
    )
    run = run_alone(trained, sample, tmp_path, *options, "trainer.log_every_steps=50")
    per_epoch = -(-28_798 * 5 // 2048)
    assert run.steps == 8 * per_epoch
    assert [state.step for state in run.saved] == [per_epoch * epoch for epoch in (2, 4, 6, 8)]
    assert run.figures["auc"] > 0.78
    assert run.figures["accuracy"] > run.figures["majority_rate"]
    lines = events(tmp_path, "train")
    steps = {*range(50, run.steps + 1, 50), *(per_epoch * epoch for epoch in (2, 4, 6, 8))}
    assert [line["step"] for line in lines] == sorted(steps)
    assert lines[-1]["log_loss"] < 0.8 * lines[0]["log_loss"]
    phases = ("data", "embeddings", "forward", "backward", "optimizer")
    assert all(line["seconds"][phase] > 0 for line in lines for phase in phases)
    assert [e["epoch"] for e in events(tmp_path, "valid")] == [4, 8]
    assert events(tmp_path, "end")[0]["step"] == run.steps


def test_a_line_holds_the_mean_of_its_window_and_of_all_steps(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    single = run_alone(trained, sample, tmp_path / "1", *SHORT)
    for size in (1, 2):
        out = tmp_path / f"many{size}"
        run_ranks(trained, size, sample, out, *SHORT, "trainer.log_every_steps=8")
        lines = events(out, "train")
        assert [line["step"] for line in lines] == [8, 16, 20]
        for line, (a, b) in zip(lines, itertools.pairwise([0, 8, 16, 20]), strict=True):
            assert line["log_loss"] == pytest.approx(np.mean(single.losses[a:b]), abs=1e-6)
            assert line["lifetime_log_loss"] == pytest.approx(np.mean(single.losses[:b]), abs=1e-6)


def test_max_steps_ends_the_run_with_a_checkpoint(sample: PreparedDataset, tmp_path: Path) -> None:
    run = run_alone(trained, sample, tmp_path, *SHORT, "trainer.max_steps=7")
    assert run.steps == len(run.losses) == 7
    assert [(s.step, s.saved_step, s.logged_step) for s in run.saved] == [(7, 7, 7)]
    assert not events(tmp_path, "valid")


def test_dropout_repeats_bit_for_bit_and_does_something(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    first, second = (
        run_alone(trained, sample, tmp_path, *SHORT, "model.dropout=0.5") for _ in range(2)
    )
    assert first.losses == second.losses
    plain = run_alone(trained, sample, tmp_path, *SHORT)
    assert difference(plain.losses, first.losses) > 1e-4


@pytest.mark.parametrize("size", [1, 2])
def test_validation_measures_in_eval_mode_and_leaves_training_alone(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    options = ("trainer.batch_size=30000", "model.dropout=0.5", "model.batch_norm=true")
    validated, plain = (
        run_ranks(
            trained,
            size,
            sample,
            tmp_path / str(every),
            *options,
            "trainer.epochs=3",
            f"trainer.validate_every_epochs={every}",
        )[0]
        for every in (1, 0)
    )
    assert len(validated.losses) == 15
    assert validated.losses == plain.losses
    actual = events(tmp_path / "1", "valid")
    assert [e["epoch"] for e in actual] == [1, 2, 3]
    assert {k: actual[-1][k] for k in validated.figures} == validated.figures


def _masks(folder: Path, first_draws: int, *overrides: str) -> list[list[bytes]]:
    """What dropout leaves of the first hidden layer of this rank's rows in each of three steps."""
    config = config_of(
        "model={over_arch_layer_sizes: [40], activation: sigmoid, dropout: 0.5}",
        "trainer.max_steps=3",
        *overrides,
    )
    with process_group("cpu") as world:
        run, masks = Run(folder, config, world), list[list[bytes]]()
        over_arch = deepfm_of(run.sharded).interaction_arch.over_arch
        assert isinstance(over_arch, OverArch)
        over_arch.dropout.register_forward_hook(
            lambda _, __, out: masks.append([row.tobytes() for row in (out != 0).numpy()])
        )
        torch.rand(first_draws)
        train_quietly(run)
        return masks


def test_dropout_is_a_function_of_seed_step_and_row(sample: PreparedDataset) -> None:
    alone = run_alone(_masks, sample.folder, 0)
    assert len(alone) == 3 and len(alone[0]) == config_of().trainer.batch_size
    for size, draws in ((1, 7), (2, 0), (4, 7)):
        of_ranks = run_ranks(_masks, size, sample.folder, draws)
        of_steps = zip(*of_ranks, strict=True)
        assert [[mask for rows in step for mask in rows] for step in of_steps] == alone
    accumulated = ("trainer.accumulate_steps=3", "optimizer.tables={name: adam, lr: 0.003}")
    pieces = run_alone(_masks, sample.folder, 0, *accumulated)
    assert [mask for rows in pieces for mask in rows] == [mask for rows in alone for mask in rows]
    all_masks = [mask for rows in alone for mask in rows]
    assert len(set(all_masks)) == len(all_masks)  # 2^40 are possible


def _left_of_a_run(folder: Path) -> list[str]:
    """Parameters that are still there after training, when nobody has the model any more."""
    with process_group("cpu") as world:
        config = config_of(*SMALL, *SHORT, "trainer.max_steps=2")
        run = Run(folder, config, world)
        names = {name: weakref.ref(p) for name, p in run.sharded.named_parameters()}
        train_quietly(run)
        del run
        gc.collect()
        return [name for name, parameter in names.items() if parameter() is not None]


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_left_of_a_model_that_was_trained(sample: PreparedDataset, size: int) -> None:
    assert run_ranks(_left_of_a_run, size, sample.folder) == [[]] * size


def _nan_at(steps: Collection[int], field: str) -> Change:
    def change(batch: Batch, step: int, rank: int) -> None:
        if step in steps and rank == 1:
            getattr(batch, field)[0] = float("nan")

    return change


@pytest.mark.parametrize("field", ["labels", "weights"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_nan_on_one_rank_is_a_step_that_never_was(
    sample: PreparedDataset, tmp_path: Path, field: str, optimizer: str
) -> None:
    options = (*SHORT, f"optimizer.tables.name={optimizer}", "model.batch_norm=true")
    ends = run_ranks(
        trained,
        2,
        sample,
        tmp_path,
        *options,
        "trainer.max_steps=6",
        change=_nan_at(range(6, 7), field),
    )
    expected = run_ranks(trained, 2, sample, tmp_path / "5", *options, "trainer.max_steps=5")
    for with_nan, without in zip(ends, expected, strict=True):
        assert (with_nan.steps, with_nan.state.skipped) == (6, 1)
        for a, b in zip(with_nan.weights, without.weights, strict=True):
            np.testing.assert_array_equal(a, b)
    line = events(tmp_path, "train")[-1]
    assert (line["step"], line["skipped"], line["log_loss"]) == (6, 1, None)


def test_training_continues_after_a_skipped_step(sample: PreparedDataset, tmp_path: Path) -> None:
    change = _nan_at(range(3, 5), "labels")
    run = run_ranks(trained, 2, sample, tmp_path, *SHORT, change=change)[0]
    assert (run.steps, run.state.skipped, run.state.skipped_in_a_row) == (20, 2, 0)
    assert np.isfinite(run.losses[4:]).all()
    assert all(np.isfinite(w).all() for w in run.weights)


def _gives_up(sample: PreparedDataset, out: Path, deferred: bool) -> str:
    with pytest.raises(NonFiniteLoss) as caught:
        LoadedModel(
            sample,
            out,
            *SHORT,
            "trainer.max_skipped=3",
            "checkpoint.every_steps=5",
            "trainer.log_every_steps=100",
            change=_nan_at(range(12, 30), "labels"),
            deferred=deferred,
        )
    return str(caught.value)


def test_too_many_skipped_steps_end_all_ranks_naming_step_and_checkpoint(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    late = run_ranks(_gives_up, 2, sample, tmp_path / "late", deferred=True)
    for message in [*run_ranks(_gives_up, 2, sample, tmp_path, deferred=False), *late]:
        assert message.startswith("step 15: the loss is nan, as before; 3 steps in a row skipped")
        assert "the last checkpoint is that of step 15" not in message
        assert "the last checkpoint is that of step 10; lower the learning rates" in message


def test_outcomes_that_are_read_late_are_counted_in_exactly(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    """As on CUDA, where the device decides and the host reads some steps later."""
    options = (*SHORT, "trainer.log_every_steps=7", "checkpoint.every_steps=9")
    poison = _nan_at([3, 4, 9, 18], "labels")
    at_once, late = (
        run_ranks(
            trained,
            2,
            sample,
            tmp_path / str(deferred),
            *options,
            change=poison,
            deferred=deferred,
        )
        for deferred in (False, True)
    )
    for a, b in zip(at_once, late, strict=True):
        assert (b.state, b.saved, b.losses) == (a.state, a.saved, a.losses)
        assert (b.state.skipped, [s.step for s in b.saved]) == (4, [10, 19, 20])
        for x, y in zip(a.weights, b.weights, strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_signal_that_is_read_late_ends_all_ranks_after_the_same_step(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    options = (*SHORT, "trainer.log_every_steps=100", "checkpoint.every_steps=4")
    runs = run_ranks(trained, 2, sample, tmp_path, *options, signal_at=4, deferred=True)
    # Read with the outcome of step 5 at the latest: where the next checkpoint is due.
    assert [run.steps for run in runs] == [8, 8]


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_to_one_rank_saves_and_ends_all(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    for run in run_ranks(
        trained, size, sample, tmp_path, *SHORT, "checkpoint.every_steps=4", signal_at=8
    ):
        assert run.steps == 9
        assert [state.step for state in run.saved] == [4, 8, 9]


def test_an_improvement_too_small_is_none() -> None:
    trainer = TrainerConfig(min_delta=0.125)
    state, falls = LoopState(monitor="auc"), LoopState(monitor="log_loss")
    for value in (0.5, 0.5625, 0.625, 0.75, 0.875):
        state.update_best({"auc": value}, trainer)
        falls.update_best({"log_loss": 1 - value}, trainer)
    assert (state.best, state.validations_since_best) == (
        0.75,
        1,
    )  # by just min_delta is not enough
    assert (falls.best, falls.validations_since_best) == (0.25, 1)


def test_figures_that_are_not_finite_never_improve() -> None:
    state = LoopState(monitor="auc")
    for value, best, validations_since_best in (
        (float("nan"), None, 1),
        (0.5, 0.5, 0),
        (float("nan"), 0.5, 1),
        (float("inf"), 0.5, 2),
        (0.75, 0.75, 0),
    ):
        state.update_best({"auc": value}, TrainerConfig())
        assert (state.best, state.validations_since_best) == (best, validations_since_best)


def test_the_log_shows_no_probabilities_of_a_model_that_is_trained_to_rank() -> None:
    figures = {"auc": 0.75, "log_loss": 0.5, "ne": 1.25, "accuracy": 0.625, "ndcg@10": 0.125}
    assert trainer._as_line(figures, "softmax", "ndcg@10") == "auc 0.7500  ndcg@10 0.1250"
    watched = "auc 0.7500  log_loss 0.5000  ndcg@10 0.1250"
    assert trainer._as_line(figures, "softmax", "log_loss") == watched
    of_rows = "auc 0.7500  log_loss 0.5000  ne 1.2500  accuracy 0.6250  ndcg@10 0.1250"
    assert trainer._as_line(figures, "bce", None) == of_rows


def test_the_best_checkpoint_is_kept_by_default(sample: PreparedDataset, tmp_path: Path) -> None:
    options = ("trainer.batch_size=30000", "trainer.epochs=4")
    losses = [0.5, 0.4, 0.45, 0.42]
    run = run_alone(trained, sample, tmp_path, *options, validations=losses)
    assert (run.state.monitor, run.state.best, run.state.best_step) == ("log_loss", 0.4, 10)
    assert [s.step for s in run.saved] == [5, 10, 20]
    run = run_alone(trained, sample, tmp_path, *options, "trainer.monitor=null")
    assert (run.state.monitor, run.state.best_step) == (None, None)
    assert [s.step for s in run.saved] == [20]


def test_training_that_gets_worse_is_warned_of_once_and_summed_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, texts = LoopState(monitor="log_loss"), []
    for step, loss in ((10, 0.5), (20, 0.25), (30, 0.375), (40, 0.5), (50, 0.5625)):
        state.step = step
        figures = {"log_loss": loss, "ne": 2 * loss}  # labels with an entropy of 0.5
        state.update_best(figures, TrainerConfig())
        state.warn_if_worsening(figures, per_epoch=10)
        texts.append(caplog.text)
        caplog.clear()
    assert texts[:3] == ["", "", ""]  # one worse validation may be chance
    assert (
        "validation log_loss has not improved since epoch 2: 0.5000 now, 0.2500 at ste" in texts[3]
    )
    assert texts[4] == ""
    caplog.set_level("INFO")
    for patience, level in ((None, "WARNING"), (3, "INFO")):
        caplog.clear()
        state.summarize(figures, 10, patience)
        [record] = caplog.records
        assert record.levelname == level
        assert record.getMessage().startswith(
            "validation log_loss was best at step 20 (epoch 2): 0.2500; at the last step, 50, it is"
            " 0.5625; the checkpoint of step 20 is used"
        )


@pytest.mark.parametrize(
    ("monitor", "entropy"),
    [("log_loss", 1.25), ("ne", 1.25), ("auc", None), ("ndcg@10", None)],
)
def test_a_best_checkpoint_worse_than_a_constant_is_named(
    caplog: pytest.LogCaptureFixture, monitor: str, entropy: float | None
) -> None:
    """The entropy of the labels is 0.5; NE at the best step is not known for every figure."""
    state = LoopState(monitor=monitor)
    for step, loss, auc in ((10, 0.625, 0.6), (20, 0.75, 0.5)):
        state.step = step
        figures = {"log_loss": loss, "ne": 2 * loss, "auc": auc, "ndcg@10": auc}
        state.update_best(figures, TrainerConfig())
    state.summarize(figures, 10, None)
    warned = [r.getMessage() for r in caplog.records if "NE" in r.getMessage()]
    assert len(warned) == (entropy is not None)
    if entropy is not None:
        assert f"validation NE of the checkpoint of step 10 is {entropy:.4f}: always" in warned[0]


def test_a_default_figure_that_is_undefined_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state, undefined = LoopState(monitor="ndcg@10"), {"ndcg@10": float("nan")}
    for is_first in (True, True, False):
        state.update_best(undefined, TrainerConfig())
        state.check_monitored(undefined, is_required=False, is_first=is_first)
    [record] = caplog.records
    assert record.getMessage() == (
        "ndcg@10 is nan on the validation rows, so that no checkpoint can be the best; the last "
        "one is used"
    )
    with pytest.raises(ConfigError, match=r"trainer\.monitor=ndcg@10: it is nan on the validation"):
        state.check_monitored(undefined, is_required=True, is_first=True)


def _never_defined(sample: PreparedDataset, out: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        LoadedModel(
            sample,
            out,
            "trainer={epochs: 3, batch_size: 30000, monitor: auc, patience: 2}",
            validations=[float("nan")] * 3,
        )
    return str(caught.value)


def test_patience_does_not_run_out_on_a_figure_that_is_never_defined(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    for message in run_ranks(_never_defined, 2, sample, tmp_path):
        assert message.startswith("trainer.monitor=auc: it is nan on the validation rows")
        assert message.endswith("set trainer.monitor=log_loss")
    assert len(events(tmp_path, "valid")) == 0


def test_a_watched_figure_lowers_rates_ends_training_and_is_in_the_state(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    options = (
        "trainer.batch_size=30000",
        "trainer.epochs=9",
        "trainer.monitor=auc",
        "trainer.patience=2",
        "trainer.plateau_factor=0.1",
        "optimizer={tables: {lr: 0.5}, dense: {lr: 0.25}}",
    )
    aucs = [0.6, 0.7, 0.65, 0.8, 0.7, 0.75, 0.9]
    run = run_alone(trained, sample, tmp_path, *options, validations=aucs)
    assert run.steps == 6 * 5
    assert (run.state.best, run.state.best_step, run.state.validations_since_best) == (0.8, 20, 2)
    assert [s.step for s in run.saved] == [5, 10, 20, 30]
    by_epoch = [line["lr_tables"] for line in events(tmp_path, "train")[::5]]
    assert by_epoch == pytest.approx([0.5, 0.5, 0.5, 0.05, 0.05, 0.005])
    again = run_alone(trained, sample, tmp_path, *options, state=run.saved[-1])
    assert again.steps == 30  # nothing left to do
    assert json.loads(json.dumps(asdict(run.state))) == asdict(run.state)


def test_an_over_arch_of_ones_own_is_trained(sample: PreparedDataset, tmp_path: Path) -> None:
    cross = ("model.over_arch=tests.cross_net:CrossNet", "model.over_arch_options={layers: 3}")
    options = (*SHORT, "trainer.max_steps=60", *cross)
    losses = run_alone(trained, sample, tmp_path, *options).losses
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_batch_norm_and_dropout_of_ones_own_over_arch_give_the_same_losses_on_any_ranks(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    options = (
        *(*SHORT, "trainer.batch_size=39999"),
        *("trainer.epochs=2", "trainer.max_steps=8"),  # the fourth and the eighth are padded
        "model.over_arch=examples.dcn_v2:DCNv2",
        "model.over_arch_options={layer_sizes: [9, 5], dropout: 0.3, batch_norm: true}",
    )
    alone, *others = (
        run_ranks(trained, size, sample, tmp_path / f"{size}", *options)[0].losses
        for size in (1, 2, 4)
    )
    assert len(alone) == 8
    assert others == [pytest.approx(alone, abs=1e-6)] * 2


def test_a_watched_ranking_is_the_one_that_evaluate_measures(tmp_path: Path) -> None:
    arguments = [
        *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
        "run.loggers=[]",
        "trainer.epochs=2",
        "trainer.monitor=ndcg@10",
        "evaluate={split: valid, k: [5, 10]}",
    ]
    assert run_ranks(train_command.main, 2, arguments) == [0, 0]
    assert run_ranks(evaluate_command.main, 1, arguments) == [0]
    valid = events(tmp_path / "runs" / "sample", "valid")
    best = max(valid, key=lambda event: event["ndcg@10"])
    measured = events(tmp_path / "runs" / "sample", "evaluate")[-1]["figures"]["model"]
    for name in ("ndcg@5", "ndcg@10", "recall@5", "recall@10"):
        assert best[name] == pytest.approx(measured[name], abs=1e-9)
    with pytest.raises(ConfigError, match=r"monitor=ndcg@20: not a figure that can be .*ndcg@10$"):
        check_monitor_name(config_of("trainer.monitor=ndcg@20"))


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_ids_beyond_their_tables_end_training_with_one_line(
    sample: PreparedDataset,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    optimizer: str,
    memory_bytes: int,
) -> None:
    folder = tmp_path / "prepared" / "sample"
    part, user, item = "train/part-00000.parquet", "entities/user.parquet", "entities/item.parquet"
    for name, column, value in (
        (part, "user", 10**9),
        (part, "item", -(10**9)),
        (user, "history", [1, 10**9]),
        (item, "genre", [10**9]),
    ):
        # What other tests have mapped of the good files would stand in for them.
        shutil.copytree(sample.folder, folder, ignore=shutil.ignore_patterns("mapped"))
        cell(name, column, 5, value)(folder)
        setting("sums", value={})(folder)  # else the checksum refuses the file first
        arguments = [
            *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
            f"optimizer.tables={{name: {optimizer}, lr: 0.003}}",
            f"data.memory_bytes={memory_bytes}",
            "trainer.epochs=1",
        ]
        assert run_alone(train_command.main, arguments) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if "DataError" in line]
        wrong = np.ravel(value)[-1]
        said = f"DataError: {folder / name}: the column {column} holds {wrong}, not a row of its ta"
        assert len(lines) == 1 and lines[0].startswith(said)
        shutil.rmtree(folder)


def _typed(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:  # of the ranks that hear of rank 0's mistake
        return int(str(end.code))


def test_a_run_and_its_dataset_outlive_whatever_is_typed_after_the_labels_have_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        f"data={{root: {tmp_path}, task: ctr, interactions: {{file: r.csv, label: y}}, "
        "features: [{name: a}], split: {valid: 0, test: 0.2}}",
        *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
        "run.loggers=[]",
        "evaluate={}",
        "trainer.batch_size=40",
        "optimizer.tables.lr=1",
    ]

    def rows(labels: tuple[int, int]) -> None:
        text = "".join(f"{k % 5},{labels[k % 5 % 2]}\n" for k in range(40))
        (tmp_path / "r.csv").write_text(f"a,y\n{text}")

    def typed(main: Callable[..., int], *more: str) -> tuple[set[int], str]:
        codes = run_ranks(_typed, 1, main, [*arguments, *more])
        return {*codes}, capfd.readouterr().err

    def files() -> dict[Path, bytes]:
        actual = [p for kind in ("prepared", "runs") for p in (tmp_path / kind).rglob("*")]
        return {p: p.read_bytes() for p in actual if p.is_file()}

    runs = tmp_path / "runs"
    rows((0, 1))
    assert typed(train_command.main, "trainer.epochs=4")[0] == {0}
    before = files()
    assert typed(train_command.main, "trainer.epochs=4")[0] == {0}  # already finished
    assert files() == before

    rows((1, 0))
    cure = f"set another run.name, or checkpoint.resume=never, which moves {runs / 'sample'} and"
    said_of_it = "sample would lose the dataset of the checkpoints there; "
    for main in (train_command.main, prepare_command.main):
        codes, said = typed(main, "trainer.epochs=6")
        assert codes == {2}
        assert f"{said_of_it}{cure} its dataset aside" in said
    assert files() == before

    assert typed(train_command.main, "checkpoint.resume=never")[0] == {0}
    assert [line["step"] for line in events(runs / "sample", "train")] == [10]
    assert [line["step"] for line in events(runs / "sample.1", "train")] == [4]
    figures = []
    for name in ("sample", "sample.1"):
        folder = ["--run", str(runs / name)]
        assert {*run_ranks(_typed, 1, evaluate_command.main, folder)} == {0}
        figures.append(events(runs / name, "evaluate")[0]["rows"]["auc"])
    assert figures == [1.0, 1.0]  # labels of its own dataset, which the other's contradict


def test_a_longer_run_knows_nothing_of_where_a_shorter_one_ended(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    options = (
        "trainer={batch_size: 30000, epochs: 9, monitor: auc, patience: 3, plateau_factor: 0.5}",
    )
    whole = run_alone(
        trained,
        sample,
        tmp_path / "1",
        *options,
        "trainer.max_steps=20",
        validations=[0.6, 0.5, 0.4, 0.7],
    )
    part = run_alone(
        trained,
        sample,
        tmp_path / "2",
        *options,
        "trainer.max_steps=12",  # two epochs are 10 steps
        validations=[0.6, 0.5, 0.9],
    )
    assert (part.state.best, part.state.best_step) == (0.9, 12)  # for whoever asks for the best
    state = LoopState(**json.loads(json.dumps(asdict(part.saved[-1]))))
    on = run_alone(
        trained,
        sample,
        tmp_path / "3",
        *options,
        "trainer.max_steps=20",
        validations=[0.4, 0.7],
        state=state,
    )
    assert on.state.best_state == whole.state.best_state == [0.7, 20, 0, 0.25]


def test_another_figure_to_watch_is_not_compared_with_the_one_before() -> None:
    state = LoopState()
    state.resume("ne")
    state.step = 5
    state.update_best({"ne": 0.9}, TrainerConfig())
    state.resume("ne")
    assert state.best_state == [0.9, 5, 0, 1.0]
    state.resume("auc")
    assert (state.monitor, state.best, state.best_step) == ("auc", None, None)


def test_nothing_is_saved_while_steps_are_skipped(sample: PreparedDataset, tmp_path: Path) -> None:
    options = (*SHORT, "checkpoint.every_steps=3", "trainer.max_steps=10")
    nan = {"change": _nan_at(range(5, 8), "labels")}
    run = run_ranks(trained, 2, sample, tmp_path, *options, **nan)[0]
    assert [s.step for s in run.saved] == [3, 8, 9, 10]  # that of step 6 once there is a step again
    nan = {"change": _nan_at(range(8, 20), "labels")}
    run = run_ranks(trained, 2, sample, tmp_path, *options, **nan)[0]
    assert [(s.step, s.saved_step) for s in run.saved] == [(3, 3), (6, 6), (10, 6)]


def _ends_without_numbers(sample: PreparedDataset, out: Path) -> str:
    with pytest.raises(NonFiniteLoss) as caught:
        LoadedModel(
            sample,
            out,
            "trainer={epochs: 3, batch_size: 30000}",
            "checkpoint.every_steps=4",
            "optimizer={tables: {name: sgd, lr: 1e30}, dense: {name: sgd, lr: 1e30}}",
        )
    return str(caught.value)


def test_nan_weights_end_training_at_the_validation(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    message = run_alone(_ends_without_numbers, sample, tmp_path)
    assert re.match(
        r"step 5: the validation log loss is (nan|inf); the last checkpoint is none;", message
    )


def test_steps_are_traced_or_refused_where_there_are_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--quiet",
        *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
        "run.loggers=[]",
        "trainer={max_steps: 4, validate_every_epochs: 0}",
    ]
    assert run_alone(train_command.main, [*arguments, "trainer.profile_steps=[2, 3]"]) == 0
    trace = json.loads((tmp_path / "runs/sample/profile_rank0.json").read_text())
    steps = {e["name"] for e in trace["traceEvents"] if "ProfilerStep" in e.get("name", "")}
    assert len(steps) == 2
    assert run_alone(train_command.main, [*arguments, "trainer.profile_steps=[5, 9]"]) == 2
    said = "profile_steps=[5, 9]: the run has 4 steps; choose earlier ones"
    assert said in capfd.readouterr().err
    assert complete_steps(tmp_path / "runs/sample") == [4]  # the refused one has cleared nothing


def test_a_run_knows_the_steps_of_those_it_began_from(tmp_path: Path) -> None:
    """Fused optimizers correct their bias by them: moments are not as young as the run."""
    arguments = [
        "--quiet",
        *(f"run.{kind}_root={tmp_path / kind}" for kind in ("prepared", "runs")),
        "run.loggers=[]",
        "data.name=shared",
    ]
    actual = []
    for name, steps, start in (("a", 4, None), ("b", 3, "a"), ("c", 2, "b")):
        begun = [] if start is None else [f"checkpoint.start_from={tmp_path / 'runs' / start}"]
        trainer = f"trainer={{max_steps: {steps}, validate_every_epochs: 0}}"
        command = [*arguments, f"run.name={name}", trainer, *begun]
        assert run_alone(train_command.main, command) == 0
        actual.append(steps_in(read_state(find_checkpoint(tmp_path / "runs" / name))))
    assert actual == [4, 7, 9]


def _trained_by_rank(home: Path, folder: Path, size: int) -> int:
    where = f"run={{name: r, device: cpu, prepared_root: {folder.parent}, runs_root: {home}}}"
    sizes = (f"data.name={folder.name}", f"trainer.batch_size_per_rank={size}")
    config = config_of(*SMALL, where, *sizes, "trainer.max_steps=1", "trainer.epochs=1")
    return train_job.train(config).state.step


def test_a_batch_size_per_rank_is_recorded_as_that_of_all_ranks(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    assert run_ranks(_trained_by_rank, 2, tmp_path, sample.folder, 300) == [1, 1]
    recorded = read_state(find_checkpoint(tmp_path / "r"))["config"]["trainer"]
    assert (recorded["batch_size"], recorded["batch_size_per_rank"]) == (600, None)
    assert run_alone(_trained_by_rank, tmp_path, sample.folder, 600) == 1  # the same batches
    with pytest.raises(RankFailed, match=r"trainer.batch_size"):
        run_alone(_trained_by_rank, tmp_path, sample.folder, 300)
