"""The loop: it learns, keeps its schedule, and repeats itself exactly."""

import json
from pathlib import Path

import pytest

from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.world import world
from deepfm_dist.log import MetricsLog
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
    trained = [e["step"] for e in found if e["event"] == "train"]
    assert trained == [*range(50, len(losses), 50), len(losses)]
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
def test_an_over_arch_of_ones_own_is_trained(
    sample: PreparedDataset, tmp_path: Path, size: int
) -> None:
    schedule = Schedule(1, max_steps=60, validate_every_epochs=0)
    cross = ("model.over_arch=tests.cross_net:CrossNet", "model.over_arch_options={layers: 3}")
    losses, _, _ = run_ranks(_train, size, sample, tmp_path, schedule, *cross)[0]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
