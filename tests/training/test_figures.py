"""Figures of training, against TorchRec's metrics and scikit-learn."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import (
    MetricsConfig,
    RecMetricDef,
    RecMetricEnum,
    RecTaskInfo,
)

from deepfm_dist.distributed.pipeline import Step
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.training.figures import TrainingFigures
from tests.ranks import run_alone, run_ranks

STEPS, ROWS = 6, 1000


def drawn(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(ROWS, generator=generator) * 2 - 1
    labels = (torch.rand(ROWS, generator=generator) < torch.sigmoid(logits * 0.7)).float()
    weights = (torch.rand(ROWS, generator=generator) < 0.9).float() * 2
    return logits, labels, weights


def _lines() -> list[dict[str, float]]:
    """A line after every second step, a new object between them as after a resume."""
    with process_group("cpu") as world:
        lines, lifetime = [], list[float]()
        for first in range(0, STEPS, 2):
            figures = TrainingFigures(lifetime)
            for step in (first, first + 1):
                mine = tuple(t.tensor_split(world.world_size)[world.rank] for t in drawn(step))
                for loss in (0.5, float("nan")):
                    outcome = Step(world)
                    outcome.add(torch.tensor(loss / world.world_size), torch.zeros(()))
                    outcome.rows.append(mine)
                    figures.add(outcome)
            lines.append(figures.line(world))
            lifetime = figures.lifetime.tolist()
        return lines


def _of_torchrec() -> dict[str, float]:
    with process_group("cpu") as world:
        task = RecTaskInfo("ctr", "label", "prediction", "weight")
        kinds = (RecMetricEnum.NE, RecMetricEnum.CALIBRATION)
        metrics: Any = generate_metric_module(
            RecMetricModule,
            MetricsConfig(
                rec_tasks=[task],
                rec_metrics={kind: RecMetricDef([task], window_size=ROWS) for kind in kinds},
                throughput_metric=None,
                state_metrics=[],
            ),
            batch_size=ROWS,
            world_size=1,
            my_rank=0,
            state_metrics_mapping={},
            device=world.device,
        )
        for step in range(STEPS):
            logits, labels, weights = drawn(step)
            metrics.update(
                {"prediction": torch.sigmoid(logits), "label": labels, "weight": weights}
            )
        return {name: float(value) for name, value in metrics.compute().items()}


def test_lifetime_figures_are_torchrecs() -> None:
    line, expected = run_alone(_lines)[-1], run_alone(_of_torchrec)
    assert line["lifetime_ne"] == pytest.approx(expected["ne-ctr|lifetime_ne"], rel=1e-6)
    calibration = expected["calibration-ctr|lifetime_calibration"]
    assert line["lifetime_calibration"] == pytest.approx(calibration, rel=1e-6)


def test_a_windows_figures_are_those_of_its_rows() -> None:
    for line, (begin, end) in zip(run_alone(_lines), pairwise(range(0, STEPS + 1, 2)), strict=True):
        columns = zip(*map(drawn, range(begin, end)), strict=True)
        logits, labels, weights = (torch.cat(c).double().numpy() for c in columns)
        loss = np.logaddexp(0, logits) - labels * logits
        assert line["log_loss"] == pytest.approx(np.average(loss, weights=weights), rel=1e-6)
        # Logits that share their first 16 bits are tied: rarely, and half of them for good.
        exact = roc_auc_score(labels, logits, sample_weight=weights)
        assert line["auc"] == pytest.approx(exact, abs=2e-4)


def test_figures_do_not_depend_on_the_world_size() -> None:
    alone = run_alone(_lines)
    for size in (2, 4):
        for lines in run_ranks(_lines, size):
            for ours, theirs in zip(lines, alone, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-8)


def _nothing() -> dict[str, float]:
    with process_group("cpu") as world:
        return TrainingFigures().line(world)


def test_a_window_without_rows_has_no_figures() -> None:
    assert all(np.isnan(value) for value in run_alone(_nothing).values())
