"""Learning rates over the steps, against torch's schedulers."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from deepfm_dist.config import load_config
from deepfm_dist.distributed.settings import LearningRateConfig
from deepfm_dist.errors import ConfigError

WARM, DECAY, LAST = 10, 30, 60


def of_torch(after: Callable[[Any], Any]) -> list[float]:
    """Rates of the steps 1 to LAST by linear warm-up and then another scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    warm = lr_scheduler.LinearLR(optimizer, 1 / WARM, 1.0, WARM - 1)
    schedule = lr_scheduler.SequentialLR(optimizer, [warm, after(optimizer)], [WARM - 1])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(LAST):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            schedule.step()
    return rates


@pytest.mark.parametrize(
    ("decay", "final", "after"),
    [
        ("constant", 0.0, lambda o: lr_scheduler.ConstantLR(o, 1.0, 1)),
        ("linear", 0.1, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, DECAY)),
        ("polynomial", 0.0, lambda o: lr_scheduler.PolynomialLR(o, DECAY, 2.0)),
        (
            "cosine",
            0.1,
            lambda o: lr_scheduler.CosineAnnealingLR(o, DECAY, 0.02),
        ),
    ],
)
def test_rates_are_those_of_torchs_schedulers(
    decay: Any, final: float, after: Callable[[Any], Any]
) -> None:
    steps = None if decay == "constant" else DECAY
    rate = LearningRateConfig(
        lr=0.2, warmup_steps=WARM, decay=decay, decay_steps=steps, final_lr=0.2 * final
    )
    ours = [rate.at(step) for step in range(1, LAST + 1)]
    last = WARM + DECAY if decay == "cosine" else LAST
    assert ours[:last] == pytest.approx(of_torch(after)[:last], abs=1e-9)
    assert ours[last:] == pytest.approx([0.2 * final] * (LAST - last))


def test_without_warm_up_the_first_step_has_the_base_rate() -> None:
    assert LearningRateConfig(lr=0.2).at(1) == 0.2
    assert LearningRateConfig(lr=0.2, decay="linear", decay_steps=10).at(10) == 0


def test_decay_needs_a_length() -> None:
    without = ["optimizer.tables.decay=cosine", "optimizer.tables.decay_steps=null"]
    with pytest.raises(ConfigError, match=r"optimizer.tables: decay=cosine needs decay_steps"):
        load_config("sample", without)
    assert load_config("sample", [*without, "optimizer.tables.decay_steps=auto"])
