"""Dropout that depends on the row's number and not on the generator of a rank."""

import itertools

import numpy as np
import pytest
import torch

from deepfm_dist.model import kernels
from deepfm_dist.model.dropout import RowDropout, begin_step, dropout_mask, row_dropouts, unit_words
from deepfm_dist.model.targets import mlp_towers
from deepfm_dist.seeding import derive_seed

NUMBERS = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, (5 << 32) | 2**31, 2**63 - 1])


@pytest.mark.parametrize("p", [0.0001, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("key", [0, 1, 2**31, 2**62 + 12345, -1])
def test_tensor_operations_and_the_kernel_draw_the_same_mask(key: int, p: float) -> None:
    numbers = np.concatenate([NUMBERS, np.arange(200)])
    expected = kernels.dropout_mask(numbers, key, 7, 300, p)
    actual = dropout_mask(torch.from_numpy(numbers), torch.tensor(key), unit_words(307)[7:], p)
    np.testing.assert_array_equal(actual.numpy(), expected)


def test_masks_look_independent() -> None:
    n, h, p = 4000, 96, 0.3
    keys = [derive_seed(1, "dropout", step, 0) for step in (1, 2, 3)]
    masks = np.stack([kernels.dropout_mask(np.arange(n), k, 0, h, p) > 0 for k in keys])
    for axes, count in (((0, 1, 2), masks.size), ((0, 1), 3 * n), ((0, 2), 3 * h)):
        deviation = (p * (1 - p) / count) ** 0.5
        worst = np.abs(masks.mean(axes) - (1 - p)).max()
        assert worst < 5 * deviation, axes
    standard = (masks - (1 - p)) / (p * (1 - p)) ** 0.5
    within = np.einsum("knu,knv->uv", standard, standard) / (3 * n)
    assert np.abs(within - np.eye(h)).max() < 5 / (3 * n) ** 0.5
    for a, b in itertools.combinations(standard, 2):
        assert abs((a * b).mean()) < 5 / (n * h) ** 0.5
    neighbours = (standard[:, 1:] * standard[:, :-1]).mean()
    assert abs(neighbours) < 5 / (3 * n * h) ** 0.5


def test_units_are_scaled_to_the_same_mean_and_so_are_gradients() -> None:
    drop = RowDropout(0.25, 8)
    x = torch.rand(50, 8, requires_grad=True)
    out = drop(x)
    kept = out != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, x.where(kept, 0) / 0.75)
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.75)
    drop.eval()
    assert drop(x) is x


def test_every_module_and_step_has_a_key_of_its_own() -> None:
    towers = mlp_towers(6, [5, 4], 2, 1, dropout=0.5)
    dropouts = row_dropouts(towers)
    assert len(dropouts) == 3
    assert not row_dropouts(mlp_towers(6, [5, 4], 2, 1))
    keys = list[int]()
    for seed, step in itertools.product((1, 2), (1, 2)):
        begin_step(dropouts, seed, step)
        keys += [int(dropout.key) for dropout in dropouts]
    assert len(set(keys)) == 12
    assert not towers.state_dict().keys() & {"towers.0.dropout.key", "shared.dropout.first"}


def test_pairs_of_a_user_have_numbers_of_their_own() -> None:
    drop = RowDropout(0.5, 1)
    drop.first.fill_(40)
    numbers = drop.pair_numbers(torch.arange(3)[:, None], torch.arange(4))
    assert numbers.tolist() == [[(40 + u) * 2**32 + i for i in range(4)] for u in range(3)]
