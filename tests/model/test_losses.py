"""Losses over candidates, against torch's cross-entropy, their formulas and their means."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from deepfm_dist.data.negatives import draw_with_replacement, item_weights
from deepfm_dist.model.losses import bpr_sum, softmax_sum

USERS, ITEMS = 5, 12


def drawn(seed: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits in float64, and each user's training items; one user has none."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (USERS, ITEMS))).requires_grad_()
    known = [rng.choice(ITEMS, n, replace=False).tolist() for n in (3, 1, 6, 0, 2)]
    return logits, known


def pairs(known: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    flat = [(u, i) for u, of_user in enumerate(known) for i in of_user]
    users, items = zip(*flat, strict=True)
    return torch.tensor(users), torch.tensor(items)


@pytest.mark.parametrize("seed", range(4))
def test_softmax_is_the_cross_entropy_among_the_items_a_user_does_not_know(seed: int) -> None:
    logits, known = drawn(seed)
    users, items = pairs(known)
    weights = torch.linspace(0.5, 2, len(users), dtype=torch.float64)
    ours = softmax_sum(
        logits[users, items], logits, users, weights, (users, items), torch.zeros(ITEMS)
    )
    expected = torch.zeros((), dtype=torch.float64)
    for user, item, weight in zip(users.tolist(), items.tolist(), weights, strict=True):
        others = [i for i in range(ITEMS) if i not in known[user]]
        row = logits[user, [item, *others]][None]
        expected = expected + weight * cross_entropy(row, torch.tensor([0]))
    assert torch.allclose(ours, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_a_user_who_knows_every_candidate_costs_nothing() -> None:
    logits = torch.randn(1, 3, requires_grad=True)
    known = torch.zeros(3, dtype=torch.long), torch.arange(3)
    users, weights = torch.tensor([0]), torch.ones(1)
    for loss in (
        softmax_sum(logits[:, 0], logits, users, weights, known, torch.zeros(3)),
        bpr_sum(logits[:, 0], logits, users, weights, known),
    ):
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].eq(0).all()


@pytest.mark.parametrize("seed", range(3))
def test_bpr_is_the_mean_over_the_pairs(seed: int) -> None:
    logits, known = drawn(seed)
    users, items = pairs(known)
    weights = torch.linspace(0.5, 2, len(users), dtype=torch.float64)
    ours = bpr_sum(logits[users, items], logits, users, weights, (users, items))
    expected = 0.0
    for user, item, weight in zip(users.tolist(), items.tolist(), weights.tolist(), strict=True):
        others = [i for i in range(ITEMS) if i not in known[user]]
        z = logits.detach()[user]
        expected += weight * float(-logsigmoid(z[item] - z[others]).mean())
    assert ours.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.75])
def test_the_correction_makes_drawn_candidates_stand_for_all_items(power: float) -> None:
    """``E sum_c exp(z_c) / expected_c`` over all draws, enumerated, is ``sum_i exp(z_i)``."""
    n, draws = 4, 3
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    share = (
        item_weights(np.array([50, 3, 7, 20]), power)
        / item_weights(np.array([50, 3, 7, 20]), power).sum()
    )
    nobody = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    target = torch.tensor([0.0], dtype=torch.float64)
    mean = 0.0
    for places in itertools.product(range(n), repeat=draws):
        loss = softmax_sum(
            target,
            logits[:, list(places)],
            torch.tensor([0]),
            torch.ones(1, dtype=torch.float64),
            nobody,
            torch.log(torch.from_numpy(draws * share[list(places)])),
        )
        mean += float(np.prod(share[list(places)])) * (math.exp(loss.item()) - 1)
    assert mean == pytest.approx(float(logits.exp().sum()), rel=1e-12)


def test_candidates_come_as_often_as_their_weights_say() -> None:
    weights = item_weights(np.array([100, 1, 30, 0, 9]), 0.5)
    drawn = draw_with_replacement(200_000, weights, seed=3)
    times = np.bincount(drawn, minlength=5) / len(drawn)
    share = weights / weights.sum()
    assert np.abs(times - share).max() < 5 * np.sqrt(0.25 / len(drawn))
    assert (draw_with_replacement(50, weights, 3) == drawn[:50]).all()
