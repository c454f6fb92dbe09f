"""Logits of (user, item) pairs; terms that depend on one side only are computed once.

With the fields of a pair split into those of the user (context and its numbers included) and
those of the item, ``S`` the sum and ``Q`` the sum of squares of a side's factor vectors:

* second order: ``1/2 (|S_u + S_i|^2 - Q_u - Q_i)``
  ``= <S_u, S_i> + 1/2 (|S_u|^2 - Q_u) + 1/2 (|S_i|^2 - Q_i)``: one GEMM plus two constants, which
  vanish if only pairs across the sides are included;
* over-arch: the first layer is the sum of a user part and an item part; the other layers run per
  pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepfm_dist.model.deepfm import InteractionArch
from deepfm_dist.model.over_arch import OverArch

Layer = tuple[Tensor, Tensor]
"""Weight ``[out, in]`` and bias ``[out]``."""
PAIRS_AT_A_TIME = 1 << 19
"""Maximum number of pairs whose hidden layers are in memory at once in training."""


@dataclass(frozen=True)
class Side:
    """One side's contribution to pairs' logits.

    Attributes:
        constant: ``[n]`` terms that depend on this side alone.
        factor_sum: ``[n, D]`` sum of its fields' factor vectors.
        hidden: ``[n, H]`` its part of the over-arch's first layer; for an over-arch that cannot
            be split, ``[n, fields * D]``, its fields' vectors.
    """

    constant: Tensor
    factor_sum: Tensor
    hidden: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of it."""
        return self.constant, self.factor_sum, self.hidden

    def __getitem__(self, rows: Any) -> Self:
        return type(self)(*(t[rows] for t in self.tensors))

    def where(self, flags: Tensor, other: Self) -> Self:
        """Selects rows of this side where ``[n]`` flags are set, and of another elsewhere."""
        constant, *rest = zip(self.tensors, other.tensors, strict=True)
        return type(self)(
            constant[0].where(flags, constant[1]),
            *(mine.where(flags[:, None], theirs) for mine, theirs in rest),
        )


@dataclass(frozen=True)
class Fields:
    """The fields of one side.

    Attributes:
        places: ``[f + g + v]`` indices among all fields: categorical, numeric, vectors.
        categorical: ``[f]`` indices among the categorical fields.
        numeric: ``[g]`` indices among the numeric ones.
        vectors: ``v`` indices among the vector fields.
        columns: ``[(f + g + v) * D]`` columns of the over-arch's input.
    """

    places: Tensor
    categorical: Tensor
    numeric: Tensor
    vectors: tuple[int, ...]
    columns: Tensor

    @classmethod
    def at(
        cls,
        places: Sequence[int],
        n_categorical: int,
        n_numeric: int,
        embedding_dim: int,
        device: torch.device,
    ) -> Self:
        """The fields at given indices among all fields.

        Computed on the host: masking on a GPU would synchronise.
        """
        categorical = [place for place in places if place < n_categorical]
        others = [place - n_categorical for place in places if place >= n_categorical]
        numeric = [place for place in others if place < n_numeric]
        vectors = tuple(place - n_numeric for place in others if place >= n_numeric)
        columns = [place * embedding_dim + d for place in places for d in range(embedding_dim)]
        where, of_tables, of_numbers, of_input = (
            torch.tensor(values, dtype=torch.int64, device=device)
            for values in (places, categorical, numeric, columns)
        )
        return cls(where, of_tables, of_numbers, vectors, of_input)

    @classmethod
    def for_both_sides(
        cls,
        is_item_field: Sequence[bool],
        n_categorical: int,
        arch: InteractionArch,
        device: torch.device,
    ) -> tuple[Self, Self]:
        """The fields of the user side and of the item side.

        Args:
            is_item_field: for each categorical, then each numeric, then each vector field, whether
                it describes the item (otherwise the user or the context).
            n_categorical: number of categorical fields.
            arch: everything above the tables.
            device: the device of the model.
        """
        user, item = (
            cls.at(
                [place for place, item in enumerate(is_item_field) if bool(item) == side],
                n_categorical,
                arch.n_dense,
                arch.embedding_dim,
                device,
            )
            for side in (False, True)
        )
        return user, item


def side_of(
    arch: InteractionArch,
    fields: Fields,
    rows_nfW: Tensor,
    dense_nN: Tensor,
    first_layer: Layer | None,
    with_bias: bool,
) -> Side:
    """Computes one side, in the precision of ``rows_nfW``.

    Args:
        arch: everything above the tables.
        fields: the side's.
        rows_nfW: ``[n, f, W]`` looked-up rows of its categorical fields.
        dense_nN: ``[n, n_dense + sum of lengths]`` all numeric fields and vectors.
        first_layer: the first layer of the over-arch; None if it cannot be split.
        with_bias: whether to include the biases of the model and of the first layer.
    """
    kind, dim = rows_nfW.dtype, arch.embedding_dim
    if dense := arch.dense_fields(dense_nN, rows_nfW, fields.numeric, fields.vectors):
        rows_nfW = torch.cat([rows_nfW, *dense], 1)
    if arch.fm is not None:
        constant, factor_sum = arch.fm.forward_side(rows_nfW)
    else:
        constant = (
            rows_nfW[:, :, dim].sum(1) if arch.first_order else rows_nfW.new_zeros(len(rows_nfW))
        )
        factor_sum = rows_nfW.new_zeros(len(rows_nfW), 0)
    if arch.scale is not None:  # applied once per term: for pairs across, to the user's factors
        scale = arch.scale.to(kind)
        constant = constant * scale
        factor_sum = factor_sum * scale if with_bias else factor_sum
    if with_bias:
        constant = constant + arch.bias.to(kind)
    if arch.over_arch is None:
        return Side(constant, factor_sum, rows_nfW.new_zeros(len(rows_nfW), 0))
    hidden = rows_nfW[:, :, :dim].flatten(1)
    if first_layer is not None:
        weight, bias = (part.to(kind) for part in first_layer)
        hidden = hidden @ weight[:, fields.columns].T
        if with_bias:
            hidden = hidden + bias
    return Side(constant, factor_sum, hidden)


class _Sides(torch.autograd.Function):
    """Selected fields of the first rows, divided, for each of two sides, with one gradient.

    Each slice would otherwise have a full-size gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_HFW: Tensor,
        divisors_HF: Tensor,
        sizes: tuple[int, int],
        fields: tuple[Sequence[int], Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(divisors_HF)
        ctx.shape, ctx.sizes, ctx.fields = rows_HFW.shape, sizes, fields
        sides = []
        for n, places in zip(sizes, fields, strict=True):
            side = rows_HFW.new_empty(n, len(places), rows_HFW.shape[2])
            for at, place in enumerate(places):
                torch.div(rows_HFW[:n, place], divisors_HF[:n, place, None], out=side[:, at])
            sides.append(side)
        return sides[0], sides[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *side_gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (divisors_HF,) = ctx.saved_tensors
        gradient = side_gradients[0].new_empty(ctx.shape)
        for n, places, side_gradient in zip(ctx.sizes, ctx.fields, side_gradients, strict=True):
            for at, place in enumerate(places):
                divided = gradient[:n, place]
                torch.div(side_gradient[:, at], divisors_HF[:n, place, None], out=divided)
                gradient[n:, place] = 0
        return gradient, None, None, None


class PairScorer:
    """Logits of many users and items in training, equal to those of the model's forward.

    Args:
        arch: everything above the tables; its over-arch, if any, an `OverArch` without batch norm.
        is_item_field: for each categorical, then each numeric, then each vector field, whether it
            describes the item.
        n_categorical: number of categorical fields.
    """

    def __init__(
        self, arch: InteractionArch, is_item_field: Sequence[bool], n_categorical: int
    ) -> None:
        self.arch, self._is_item_field, self._n_categorical = arch, is_item_field, n_categorical
        self._fields: tuple[Fields, Fields] | None = None

    def sides(
        self, sums_HFW: Tensor, divisors_HF: Tensor, dense_HN: Tensor, n_users: int, n_items: int
    ) -> tuple[Side, Side]:
        """The sides of the first rows' users and items.

        Args:
            sums_HFW: ``[H, F, W]`` sums of looked-up rows, of all fields.
            divisors_HF: ``[H, F]`` divisors of pooling.
            dense_HN: ``[H, n_dense + sum of lengths]`` numeric fields, then vectors.
            n_users: number of users.
            n_items: number of items.
        """
        is_item_field = self._is_item_field[: self._n_categorical]
        places = tuple(
            [f for f, item in enumerate(is_item_field) if item == side] for side in (0, 1)
        )
        rows = _Sides.apply(  # type: ignore[no-untyped-call]
            sums_HFW, divisors_HF, (n_users, n_items), places
        )
        if self._fields is None:  # the device is known only here; copied once
            self._fields = Fields.for_both_sides(
                self._is_item_field, self._n_categorical, self.arch, sums_HFW.device
            )
        over, first_layer = self.arch.over_arch, None
        if over is not None:
            assert isinstance(over, OverArch)
            first_layer = over.layers[0].weight, over.layers[0].bias
        users, items = (
            side_of(self.arch, fields, r, dense_HN[: len(r)], first_layer, with_bias)
            for fields, r, with_bias in zip(self._fields, rows, (True, False), strict=True)
        )
        return users, items

    def all_pairs(self, users: Side, items: Side) -> Tensor:
        """``[U, I]`` logits."""
        constants = users.constant[:, None] + items.constant
        z = torch.addmm(constants, users.factor_sum, items.factor_sum.T)
        over = self.arch.over_arch
        if over is None:
            return z
        assert isinstance(over, OverArch)
        step = max(1, PAIRS_AT_A_TIME // len(items.constant))
        numbers_UC = None
        if over.dropout.is_on:
            user_U, item_C = (torch.arange(n, device=z.device) for n in z.shape)
            numbers_UC = over.dropout.pair_numbers(user_U[:, None], item_C)
        deep = []
        with self.arch.autocast(z.device.type):
            for begin in range(0, len(users.constant), step):
                rows = slice(begin, begin + step)
                numbers = None if numbers_UC is None else numbers_UC[rows].flatten()
                block = users.hidden[rows, None], items.hidden[None], numbers
                # Hidden layers of all pairs would not fit into memory: backward recomputes them.
                deep.append(checkpoint(_deep, over, *block, use_reentrant=False))
        return z + torch.cat(deep).float()

    def pairs(self, users: Side, items: Side, user_T: Tensor) -> Tensor:
        """``[T]`` logits of targets.

        Args:
            users: the targets' users.
            items: the targets' items.
            user_T: ``[T]`` the users' places in the batch, in ascending order.
        """
        z = users.constant + items.constant + (users.factor_sum * items.factor_sum).sum(1)
        over = self.arch.over_arch
        if over is None:
            return z
        assert isinstance(over, OverArch)
        with self.arch.autocast(z.device.type):
            numbers_T = None
            if over.dropout.is_on:
                first_T = torch.searchsorted(user_T, user_T)
                place_T = torch.arange(len(user_T), device=user_T.device) - first_T
                # Targets behind the candidates of `all_pairs`: they are other pairs.
                numbers_T = over.dropout.pair_numbers(user_T, place_T + (1 << 31))
            deep = over.above_first(users.hidden + items.hidden, numbers_B=numbers_T)
        return z + deep.float()


def _deep(over_arch: OverArch, user: Tensor, item: Tensor, numbers: Tensor | None) -> Tensor:
    hidden = user + item
    deep = over_arch.above_first(hidden.flatten(0, 1), numbers_B=numbers)
    return deep.view(hidden.shape[:2])
