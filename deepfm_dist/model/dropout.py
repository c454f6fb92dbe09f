"""Dropout whose masks depend neither on the number of ranks nor on the device.

Whether a unit of a row is dropped is a function of the step's key, the row's number in the global
batch and the unit's number. `torch.nn.Dropout` draws from the rank's generator instead: its masks
change with the number of ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepfm_dist.model import kernels
from deepfm_dist.seeding import derive_seed

_FIRST, _SECOND = kernels.FIRST_FACTOR, kernels.SECOND_FACTOR - (1 << 32)


class RowDropout(nn.Module):
    """Sets units to 0 in training, and scales the others to keep the mean.

    Args:
        p: probability of dropping a unit.
        n_units: number of units, of all layers that the module is called for.

    Attributes:
        key: ``[]`` int64, another one for each step and each module of a model.
        first: ``[]`` int64: number of this rank's first row, or user, in the global batch.
    """

    key: Tensor
    first: Tensor
    units_H: Tensor

    def __init__(self, p: float, n_units: int) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("units_H", unit_words(n_units), persistent=False)
        # Tensors: a compiled model would be compiled again for another integer.
        for name in ("key", "first"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64), persistent=False)

    def numbers(self, n: int) -> Tensor:
        """``[n]`` int64: numbers of a rank's rows in the global batch."""
        return self.first + torch.arange(n, device=self.first.device)

    @property
    def is_on(self) -> bool:
        """Whether units are dropped now."""
        return self.training and self.p > 0

    def pair_numbers(self, users: Tensor, places: Tensor) -> Tensor:
        """Numbers of pairs, of the shape to which both arguments broadcast.

        Args:
            users: int64, of this rank's batch.
            places: int64 below 2^32: what the pair is among those of its user.
        """
        return ((self.first + users) << 32) | places

    def forward(self, x_BH: Tensor, first_unit: int = 0, numbers_B: Tensor | None = None) -> Tensor:
        """Drops units.

        Args:
            x_BH: ``[B, H]``.
            first_unit: number of the first column's unit, of all units of the module.
            numbers_B: ``[B]`` int64: of the rows, in the global batch; default: one after another.

        Returns:
            ``[B, H]``.
        """
        if not self.is_on:
            return x_BH
        numbers_B = self.numbers(len(x_BH)) if numbers_B is None else numbers_B
        if x_BH.device.type == "cpu" and not torch.compiler.is_compiling():
            mask = torch.from_numpy(
                kernels.dropout_mask(
                    numbers_B.numpy(), int(self.key), first_unit, x_BH.shape[1], self.p
                )
            )
        else:
            units_H = self.units_H[first_unit : first_unit + x_BH.shape[1]]
            mask = dropout_mask(numbers_B, self.key, units_H, self.p)
        return x_BH * mask.to(x_BH.dtype)


def begin_step(dropouts: Sequence[RowDropout], seed: int, step: int) -> None:
    """Gives each module its key of a step."""
    for place, dropout in enumerate(dropouts):
        dropout.key.fill_(derive_seed(seed, "dropout", step, place))


def row_dropouts(model: nn.Module) -> list[RowDropout]:
    """Those of a model that drop units in training, always in the same order."""
    return [m for m in model.modules() if isinstance(m, RowDropout) and m.p > 0]


def unit_words(n_units: int) -> Tensor:
    """``[n_units]`` int32: the units' part of what is random.

    A constant: computed in a compiled model, torch 2.13 takes the product for one that does not
    overflow, and on a CPU draws other masks.
    """
    return torch.arange(n_units, dtype=torch.int32) * (kernels.UNIT_FACTOR - (1 << 32))


def dropout_mask(numbers_B: Tensor, key: Tensor, units_H: Tensor, p: float) -> Tensor:
    """`kernels.dropout_mask` in tensor operations, for any device.

    Args:
        numbers_B: ``[B]`` int64: of the rows.
        key: ``[]`` int64.
        units_H: ``[H]`` int32: of `unit_words`.
        p: probability of dropping a unit.

    Returns:
        ``[B, H]`` float32.
    """
    low_B, high_B = numbers_B.to(torch.int32), (numbers_B >> 32).to(torch.int32)
    words_B = _mixed(_mixed(low_B ^ key.to(torch.int32)) ^ high_B)
    words_B = _mixed(words_B ^ (key >> 32).to(torch.int32))
    bits_BH = _mixed(words_B[:, None] ^ units_H)
    # Compared as unsigned integers are: with the sign bit turned over.
    is_kept_BH = (bits_BH ^ -(1 << 31)) >= kernels.drop_below(p) - (1 << 31)
    return is_kept_BH * kernels.dropout_scale(p)


def _mixed(words: Tensor) -> Tensor:
    """`kernels._mixed` of int32, whose products wrap as those of unsigned integers do."""
    words = (words ^ _shifted(words, 16)) * _FIRST
    words = (words ^ _shifted(words, 15)) * _SECOND
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's fills with the sign."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)
