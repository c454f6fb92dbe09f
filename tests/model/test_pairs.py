"""Factorised logits of pairs are those of the model's forward."""

from typing import Any

import pytest
import torch

from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.model.pairs import PairScorer

DIM, WIDTH, CATEGORICAL, NUMERIC = 6, 8, 5, 2
VECTORS = {"text": 3, "taste": 2}
OF_ITEM = (False, True, True, False, True, True, False, True, False)
COLUMNS_OF_ITEM = torch.tensor([True, False, True, True, True, False, False])
USERS, ITEMS = 7, 9


@pytest.mark.parametrize(
    "options",
    [
        {"deep": None},
        {"deep": None, "first_order": False},
        {"deep": []},
        {"deep": [5]},
        {"deep": None, "is_item_field": OF_ITEM},
        {"deep": [5], "is_item_field": OF_ITEM, "first_order": False},
        {"deep": [5, 4], "activation": "gelu"},
        {"deep": [5, 4], "fm": False, "first_order": False},
    ],
)
def test_pairs_are_scored_as_rows_are_with_the_same_gradients(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepfm_dist.model.pairs.PAIRS_AT_A_TIME", 20)  # several blocks of users
    torch.manual_seed(3)
    sizes, activation = options.pop("deep"), options.pop("activation", "relu")
    over = None if sizes is None else OverArch(len(OF_ITEM) * DIM, sizes, activation=activation)
    arch = InteractionArch(
        NUMERIC, DIM, over_arch=over, init_std=0.5, vectors=VECTORS, **options
    ).double()
    torch.nn.init.normal_(arch.bias)
    rows = torch.randn(max(USERS, ITEMS), CATEGORICAL, WIDTH, dtype=torch.float64)
    rows[:, :, DIM + 1 :] = 0
    rows.requires_grad_()
    divisors = torch.rand(len(rows), CATEGORICAL, dtype=torch.float64) + 0.5
    dense = torch.randn(len(rows), len(COLUMNS_OF_ITEM), dtype=torch.float64)
    is_item = torch.tensor(OF_ITEM)

    # Every pair as a row of its own: fields of the user from one place, the item's from another.
    u, i = (
        g.flatten() for g in torch.meshgrid(torch.arange(USERS), torch.arange(ITEMS), indexing="ij")
    )
    table_config, of_numbers = is_item[:CATEGORICAL], COLUMNS_OF_ITEM
    divided = rows / divisors[:, :, None]
    pair_rows = torch.where(table_config[None, :, None], divided[i], divided[u])
    pair_dense = torch.where(of_numbers, dense[i], dense[u])
    expected = arch(pair_rows, pair_dense).view(USERS, ITEMS)

    scorer = PairScorer(arch, OF_ITEM, CATEGORICAL)
    users, items = scorer.sides(rows, divisors, dense, USERS, ITEMS)
    actual = scorer.all_pairs(users, items)
    assert torch.allclose(actual, expected, rtol=1e-11, atol=1e-11)
    some = torch.tensor([0, 3, 3, 6]), torch.tensor([8, 0, 1, 4])
    assert torch.allclose(
        scorer.pairs(users[some[0]], items[some[1]], some[0]), expected[some], rtol=1e-11
    )
    weights = torch.randn(USERS, ITEMS, dtype=torch.float64)
    wanted = [rows, *arch.parameters()]
    ours = torch.autograd.grad((actual * weights).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)
