"""The loop: it learns, keeps its schedule, and repeats itself exactly."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepfm_dist.build import deepfm_of
from deepfm_dist.data.batch import Batch
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.pipeline import NonFiniteLoss
from deepfm_dist.distributed.sharding import local_shards
from deepfm_dist.distributed.world import world
from deepfm_dist.log import MetricsLog
from deepfm_dist.model.deepfm import OverArch
from deepfm_dist.training.evaluation import HeldOut
from deepfm_dist.training.trainer import Schedule, train
from tests.ranks import run_alone, run_ranks
from tests.test_distributed import SMALL, Run, config_of, difference


def _train(
    sample: PreparedDataset, out: Path, schedule: Schedule, *overrides: str
) -> tuple[list[float], list[int], dict[str, float]]:
    """Losses, steps of the checkpoints, final figures on validation rows."""
    with world("cpu") as ranks:
        run = Run(sample.folder, config_of(*SMALL, *overrides), ranks)
        held_out, saved = HeldOut(sample, "valid"), list[int]()
        losses = train(
            run.sharded,
            run.optimizer,
            run.batches,
            ranks,
            schedule,
            seed=1,
            metrics=MetricsLog(out, ranks.is_first, fresh=True),
            validate=lambda: held_out.metrics(run.sharded, ranks),
            save=saved.append,
        )
        run.sharded.eval()
        return losses, saved, dict(held_out.metrics(run.sharded, ranks))


def events(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_training_learns_and_keeps_its_schedule(sample: PreparedDataset, tmp_path: Path) -> None:
    schedule = Schedule(8, log_every_steps=50, validate_every_epochs=4, checkpoint_every_epochs=2)
    losses, saved, figures = run_alone(_train, sample, tmp_path, schedule)
    per_epoch = -(-28_798 * 5 // 2048)
    assert len(losses) == 8 * per_epoch
    assert saved == [per_epoch * epoch for epoch in (2, 4, 6, 8)]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert figures["auc"] > 0.78
    assert figures["accuracy"] > figures["majority_rate"]
    found = events(tmp_path)
    trained = [e for e in found if e["event"] == "train"]
    steps = [*range(50, len(losses), 50), len(losses)]
    assert [e["step"] for e in trained] == steps
    means = [np.mean(losses[a:b]) for a, b in itertools.pairwise([0, *steps])]
    assert [e["loss"] for e in trained] == pytest.approx(means)
    assert [e["epoch"] for e in found if e["event"] == "valid"] == [4, 8]


def test_max_steps_ends_the_run_with_a_checkpoint(sample: PreparedDataset, tmp_path: Path) -> None:
    schedule = Schedule(4, max_steps=7, validate_every_epochs=0)
    losses, saved, _ = run_alone(_train, sample, tmp_path, schedule)
    assert len(losses) == 7
    assert saved == [7]
    assert [e["event"] for e in events(tmp_path)] == ["train"]


def test_dropout_repeats_bit_for_bit_and_does_something(
    sample: PreparedDataset, tmp_path: Path
) -> None:
    schedule = Schedule(1, max_steps=20, validate_every_epochs=0)
    first, second = (
        run_alone(_train, sample, tmp_path, schedule, "model.dropout=0.5") for _ in range(2)
    )
    assert first == second
    plain = run_alone(_train, sample, tmp_path, schedule)
    assert difference(plain[0], first[0]) > 1e-4


@pytest.mark.parametrize("size", [1, 2])
def test_validation_measures_in_eval_mode_and_leaves_training_alone(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    options = ("trainer.batch_size=30000", "model.dropout=0.5", "model.batch_norm=true")
    validated, plain = (
        run_ranks(
            _train, size, sample, tmp_path / str(every), Schedule(3, None, 50, every), *options
        )
        for every in (1, 0)
    )
    for (losses, _, _), (expected, _, _) in zip(validated, plain, strict=True):
        assert len(losses) == 15
        assert losses == expected
    found = [e for e in events(tmp_path / "1") if e["event"] == "valid"]
    assert [e["epoch"] for e in found] == [1, 2, 3]
    assert {k: found[-1][k] for k in validated[0][2]} == validated[0][2]


def _masks(folder: Path, first_draws: int) -> list[bytes]:
    """What dropout leaves of the first hidden layer in each of three steps."""
    config = config_of("model={over_arch_layer_sizes: [40], activation: sigmoid, dropout: 0.5}")
    with world("cpu") as ranks:
        run, masks = Run(folder, config, ranks), list[bytes]()
        over_arch = deepfm_of(run.sharded).interaction_arch.over_arch
        assert isinstance(over_arch, OverArch)
        over_arch.dropout.register_forward_hook(
            lambda _, __, out: masks.append((out != 0).numpy().tobytes())
        )
        torch.rand(first_draws)
        log = MetricsLog(folder, is_first=False)
        train(run.sharded, run.optimizer, run.batches, ranks, Schedule(1, max_steps=3), 1, log)
        return masks


def test_dropout_is_a_function_of_seed_step_and_rank(sample: PreparedDataset) -> None:
    first, second = (run_ranks(_masks, 2, sample.folder, draws) for draws in (0, 7))
    assert first == second
    masks = [mask for of_rank in first for mask in of_rank]
    assert len(set(masks)) == len(masks) == 6


@pytest.mark.parametrize("field", ["labels", "weights"])
def test_a_nan_on_one_rank_ends_all_ranks_naming_the_step(
    sample: PreparedDataset, field: str
) -> None:
    for message, in_tables in run_ranks(_poisoned_at_step_3, 2, sample.folder, field):
        assert message.startswith("step 3: the loss is nan; lower the learning rates")
        assert not in_tables


def _poisoned_at_step_3(folder: Path, field: str) -> tuple[str, bool]:
    with world("cpu") as ranks:
        run = Run(folder, config_of(*SMALL), ranks)
        batch_of = run.batches.batch

        def batch(step: int) -> Batch:
            made = batch_of(step)
            if step == 3 and ranks.rank == 1:
                getattr(made, field)[0] = float("nan")
            return made

        run.batches.batch = batch  # type: ignore[method-assign]
        log = MetricsLog(folder, is_first=False)
        with pytest.raises(NonFiniteLoss) as caught:
            train(run.sharded, run.optimizer, run.batches, ranks, Schedule(1, 9), 1, log)
        pieces = [piece for *_, piece in local_shards(run.sharded)]
        return str(caught.value), any(bool(p.isnan().any()) for p in pieces)


@pytest.mark.parametrize("size", [1, 2])
def test_an_over_arch_of_ones_own_is_trained(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    schedule = Schedule(1, max_steps=60, validate_every_epochs=0)
    cross = ("model.over_arch=tests.cross_net:CrossNet", "model.over_arch_options={layers: 3}")
    losses, _, _ = run_ranks(_train, size, sample, tmp_path, schedule, *cross)[0]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
