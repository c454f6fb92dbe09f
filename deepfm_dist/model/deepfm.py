"""DeepFM: bias + first order + pairwise interactions + over-arch, on shared embeddings.

Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", 2017.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)

from deepfm_dist.model import kernels
from deepfm_dist.model.norm import batch_norms
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.model.targets import MLPTowers, Towers

POWERS: Mapping[str, float] = {"sum": 0.0, "sqrt": 0.5, "mean": 1.0}
"""Exponent of the number of values in the divisor of their sum, by pooling."""
VECTOR_FACTORS, VECTOR_FIRST_ORDER = "vector_factors_", "vector_first_order_"
"""Prefix of the names of a vector field's parameters, before the field's name."""
ROW_ALIGNMENT = 4
"""FBGEMM's kernels require row lengths that are multiples of 4 floats."""


@dataclass(frozen=True)
class Table:
    """One embedding table.

    Attributes:
        rows: number of rows.
        features: the fields that read it.
    """

    rows: int
    features: tuple[str, ...]


class EmbeddingArch(nn.Module):
    """One row per value: ``[embedding_dim factors | 1 first-order weight | padding]``.

    One table instead of two means one lookup and one all-to-all; in return, both share
    initialisation and, with row-wise optimizers, the accumulator (CONTRIBUTING.md has the figures).

    Args:
        tables: tables by name.
        features: the fields in the order of the output.
        embedding_dim: D; 0 leaves only the first-order weight.
        pooling: by field, how several values become one vector: ``mean``, ``sqrt`` (sum divided by
            the square root of their number); default: ``sum``.
        device: where the tables are; ``meta`` before sharding.
        half: whether they are stored in float16; look-ups return float32 either way.
    """

    power_F: Tensor

    def __init__(
        self,
        tables: Mapping[str, Table],
        features: Sequence[str],
        embedding_dim: int,
        pooling: Mapping[str, str] | None = None,
        device: torch.device | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.features = list(features)
        powers = [POWERS[(pooling or {}).get(name, "sum")] for name in features]
        self.is_divided = any(powers)
        self.register_buffer("power_F", torch.tensor(powers), persistent=False)
        self.embedding_dim = embedding_dim
        self.row_width = -(-(embedding_dim + 1) // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self.ebc = EmbeddingBagCollection(
            device=device,
            tables=[
                EmbeddingBagConfig(
                    name=name,
                    num_embeddings=table.rows,
                    embedding_dim=self.row_width,
                    feature_names=list(table.features),
                    # The mean is computed here: if a collection mixes row-wise and table-wise
                    # tables, TorchRec 1.8 divides the table-wise ones twice.
                    pooling=PoolingType.SUM,
                    data_type=DataType.FP16 if half else DataType.FP32,
                )
                for name, table in tables.items()
            ],
        )

    def rows(self, sparse: KeyedJaggedTensor) -> Tensor:
        """Looks up and pools.

        Args:
            sparse: F keys, in the order of ``features``, of B bags each.

        Returns:
            ``[B, F, row_width]``: ``[factors | first-order weight | padding]``.
        """
        rows_BFW = self.sums(sparse)
        return rows_BFW / self.divisors(sparse)[:, :, None] if self.is_divided else rows_BFW

    def sums(self, sparse: KeyedJaggedTensor) -> Tensor:
        """`rows` before division: the sums of the values' rows."""
        rows = _in_order(self.ebc(sparse), self.features)
        return rows.view(-1, len(self.features), self.row_width)

    def divisors(self, sparse: KeyedJaggedTensor) -> Tensor:
        """``[B, F]`` divisors of pooling."""
        lengths_FB = sparse.lengths().view(len(self.features), -1)
        counts_BF = lengths_FB.T.to(self.power_F.dtype).clamp(min=1)
        return counts_BF.pow(self.power_F)

    def forward(self, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """`rows` as factors ``[B, F, D]`` and first-order weights ``[B, F]``."""
        rows_BFW = self.rows(sparse)
        return rows_BFW[:, :, : self.embedding_dim], rows_BFW[:, :, self.embedding_dim]


@torch.fx.wrap  # TorchRec's pipeline traces the code around the lookup
def _in_order(pooled: KeyedTensor, features: list[str]) -> Tensor:
    """``[B, F * row_width]`` by name: a sharded collection groups its keys by owner."""
    keys, values = pooled.keys(), pooled.values()
    if keys == features:
        return values
    where = _order_of(tuple(keys), tuple(features), values.shape[1], values.device)
    ordered: Tensor = torch.ops.fbgemm.permute_pooled_embs_auto_grad(values, *where)
    return ordered


@cache
def _order_of(
    keys: tuple[str, ...], features: tuple[str, ...], columns: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FBGEMM's arguments for `_in_order`; `KeyedTensor.regroup` would copy them each step."""
    offsets = torch.arange(0, columns + 1, columns // len(keys))  # all rows have the same width
    forth = torch.tensor([keys.index(name) for name in features])
    back = torch.tensor([features.index(name) for name in keys])
    offsets, forth, back = offsets.to(device), forth.to(device), back.to(device)
    return offsets, forth, offsets, back


class FactorizationMachine(nn.Module):
    """First and second order of a factorization machine.

    Args:
        dim: D.
        first_order: whether to include the linear part.
        is_item_field: for each of the F fields, whether it describes the item; then only pairs of
            an item field and another field are included. None: all pairs.

    Source: Rendle, "Factorization Machines", 2010, eq. 1, Lemma 3.1; Guo et al., 2017, eq. 2.
    """

    sides_2F: Tensor | None

    def __init__(
        self, dim: int, first_order: bool = True, is_item_field: Sequence[bool] | None = None
    ) -> None:
        super().__init__()
        self.dim, self.first_order = dim, first_order
        sides = None
        if is_item_field is not None:
            sides = torch.tensor(
                [[not item for item in is_item_field], is_item_field], dtype=torch.float32
            )
        self.register_buffer("sides_2F", sides, persistent=False)

    def forward(self, rows_BFW: Tensor) -> Tensor:
        """Sums the weights of all fields, and the inner products of the pairs of fields.

        Args:
            rows_BFW: ``[B, F, W]`` one row per field: D factors ``v``, a weight ``w``, padding.

        Returns:
            ``[B]``: ``sum_i w_i + sum_{i<j} <v_i, v_j>``.
        """
        return self.with_rows(rows_BFW)[0]

    def with_rows(self, rows_BFW: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`, and the rows for one other consumer, which must own its gradient.

        On CPU the gradients of both are then summed in place.
        """
        if self.sides_2F is None:
            if kernels.can_take(rows_BFW):
                result: tuple[Tensor, Tensor] = _InteractionsOnCPU.apply(  # type: ignore[no-untyped-call]
                    rows_BFW, self.dim, self.first_order
                )
                return result
            return self.forward_side(rows_BFW)[0], rows_BFW
        sides_B2W = self.sides_2F @ rows_BFW
        pairs = sides_B2W[:, :, : self.dim].prod(1).sum(1)
        logits = sides_B2W[:, :, self.dim].sum(1) + pairs if self.first_order else pairs
        return logits, rows_BFW

    def forward_side(self, rows_BFW: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` for the fields of one side, and ``[B, D]`` the sum of their factors."""
        if self.sides_2F is None:
            result: tuple[Tensor, Tensor] = _Interactions.apply(  # type: ignore[no-untyped-call]
                rows_BFW, self.dim, self.first_order
            )
            return result
        sum_BW = rows_BFW.sum(1)
        weights = sum_BW[:, self.dim] if self.first_order else sum_BW.new_zeros(sum_BW.shape[0])
        return weights, sum_BW[:, : self.dim]


class _Interactions(torch.autograd.Function):
    """The sums, with their gradient in one pass; autograd would allocate and add one per part.

    The pairs' sum is ``1/2 sum_d ((sum_f v)^2 - sum_f v^2)``; its gradient by ``v_f`` is
    ``sum_g v_g - v_f``.
    """

    @staticmethod
    def forward(ctx: Any, rows_BFW: Tensor, dim: int, first_order: bool) -> tuple[Tensor, Tensor]:
        sum_BW = rows_BFW.sum(1)
        ctx.save_for_backward(rows_BFW, sum_BW)
        ctx.dim, ctx.first_order = dim, first_order
        ctx.set_materialize_grads(False)
        square_of_sum = sum_BW[:, :dim].square().sum(1)
        sum_of = rows_BFW[:, :, :dim].square().sum((1, 2))
        pairs = 0.5 * (square_of_sum - sum_of)
        return sum_BW[:, dim] + pairs if first_order else pairs, sum_BW[:, :dim]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient_B: Tensor | None, gradient_sum_BD: Tensor | None
    ) -> tuple[Tensor, None, None]:
        rows_BFW, sum_BW = ctx.saved_tensors
        if gradient_B is None:
            gradient = torch.zeros_like(rows_BFW)
        else:
            gradient = sum_BW[:, None, :] - rows_BFW
            gradient[:, :, ctx.dim :] = 0
            if ctx.first_order:
                gradient[:, :, ctx.dim] = 1
            gradient.mul_(gradient_B[:, None, None])
        if gradient_sum_BD is not None:
            gradient[:, :, : ctx.dim] += gradient_sum_BD[:, None]
        return gradient, None, None


class _InteractionsOnCPU(torch.autograd.Function):
    """`_Interactions` by `kernels`; the rows pass through, and their gradient is accumulated."""

    @staticmethod
    def forward(ctx: Any, rows_BFW: Tensor, dim: int, first_order: bool) -> tuple[Tensor, Tensor]:
        halves, firsts = (np.zeros(rows_BFW.shape[2], np.float32) for _ in range(2))
        halves[:dim] = 0.5
        firsts[dim] = first_order
        rows = rows_BFW.detach().contiguous()
        sums = torch.from_numpy(kernels.interactions(rows.numpy(), halves, firsts))
        ctx.save_for_backward(rows, sums)
        ctx.halves, ctx.firsts = halves, firsts
        ctx.set_materialize_grads(False)
        return sums[:, -1], rows_BFW.view_as(rows_BFW)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, gradient_B: Tensor | None, gradient_BFW: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        if gradient_B is None:
            return gradient_BFW, None, None
        rows, sums = ctx.saved_tensors
        gradient = torch.zeros_like(rows) if gradient_BFW is None else gradient_BFW.contiguous()
        logits = gradient_B.contiguous().numpy()
        kernels.add_gradient(
            gradient.numpy(), logits, rows.numpy(), sums.numpy(), ctx.halves, ctx.firsts
        )
        return gradient, None, None


class InteractionArch(nn.Module):
    """Everything above the tables: looked-up vectors and numbers -> logits.

    The factors of a numeric field are learned ones times the value. Those of a vector field ``x``,
    a list of numbers of the user or item, are ``x P``, and its first-order weight ``<x, w>``, with
    a learned ``P [dim, D]`` and ``w [dim]``.

    Args:
        n_dense: number of numeric fields.
        embedding_dim: D.
        first_order: whether the linear part counts.
        fm: whether the pairwise part counts.
        over_arch: the deep part, ``[B, number of fields * D] -> [B]``, or None; of several targets
            `Towers`.
        init_std: standard deviation of the numeric and vector fields' parameters.
        is_item_field: see `FactorizationMachine`; of all fields: categorical, numeric, vectors.
        vectors: length of each vector field by name.
        n_targets: T; see `deepfm_dist.model.targets` for what several share.

    Attributes:
        in_bfloat16: whether the over-arch's matrix products are taken in bfloat16; off unless set.
        scale: ``[T]`` factor of first order and pairs for each of several targets; None for a
            single target.
    """

    def __init__(
        self,
        n_dense: int,
        embedding_dim: int,
        first_order: bool = True,
        fm: bool = True,
        over_arch: nn.Module | None = None,
        init_std: float = 0.01,
        is_item_field: Sequence[bool] | None = None,
        vectors: Mapping[str, int] | None = None,
        n_targets: int = 1,
    ) -> None:
        super().__init__()
        self.embedding_dim, self.n_dense = embedding_dim, n_dense
        self.first_order, self.in_bfloat16 = first_order, False
        self.bias = nn.Parameter(torch.zeros(n_targets))
        is_scaled = n_targets > 1 and (fm or first_order)
        self.scale = nn.Parameter(torch.ones(n_targets)) if is_scaled else None
        self.fm = FactorizationMachine(embedding_dim, first_order, is_item_field) if fm else None
        self.over_arch = over_arch
        self.dense_factors = self.dense_first_order = None
        if n_dense:
            if fm or over_arch is not None:
                self.dense_factors = nn.Parameter(torch.randn(n_dense, embedding_dim) * init_std)
            if first_order:
                self.dense_first_order = nn.Parameter(torch.randn(n_dense) * init_std)
        self.vectors = dict(vectors or {})
        # By name, so that a run that starts from another one's weights finds them.
        for name, length in self.vectors.items():
            factors = torch.randn(length, embedding_dim) * init_std
            if fm or over_arch is not None:
                self.register_parameter(f"{VECTOR_FACTORS}{name}", nn.Parameter(factors))
            if first_order:
                weights = nn.Parameter(torch.randn(length) * init_std)
                self.register_parameter(f"{VECTOR_FIRST_ORDER}{name}", weights)

    def forward(
        self, rows_BFW: Tensor, dense_BN: Tensor, weights_B: Tensor | None = None
    ) -> Tensor:
        """Scores rows.

        Args:
            rows_BFW: ``[B, F, W]`` looked-up rows: D factors, first-order weight, padding.
            dense_BN: ``[B, n_dense + sum of lengths]``: numeric fields, then vectors.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]`` logits, of several targets ``[B, T]``.
        """
        if dense_BN.shape[1]:
            rows_BFW = torch.cat([rows_BFW, *self.dense_fields(dense_BN, rows_BFW)], 1)
        logits: Tensor = self.bias
        if self.fm is not None and isinstance(self.over_arch, OverArch | MLPTowers):
            interactions, rows_BFW = self.fm.with_rows(rows_BFW)
            logits = logits + self._scaled(interactions)
        elif self.fm is not None:
            logits = logits + self._scaled(self.fm(rows_BFW))
        elif self.first_order:
            logits = logits + self._scaled(rows_BFW[:, :, self.embedding_dim].sum(1))
        if self.over_arch is not None:
            with self.autocast(rows_BFW.device.type):
                if isinstance(self.over_arch, OverArch | MLPTowers):
                    deep = self.over_arch.forward_rows(rows_BFW, weights_B)
                else:
                    norms = batch_norms(self.over_arch)
                    for norm in norms:
                        norm.row_weights_B = weights_B
                    deep = self.over_arch(rows_BFW[:, :, : self.embedding_dim].flatten(1))
                    for norm in norms:
                        norm.row_weights_B = None
            logits = logits + deep.float()
        shape = rows_BFW.shape[:1] if self.n_targets == 1 else (len(rows_BFW), self.n_targets)
        return logits.expand(shape)

    @property
    def n_targets(self) -> int:
        """T."""
        return len(self.bias)

    def _scaled(self, interactions_B: Tensor) -> Tensor:
        """First order plus pairs, ``[B]``, scaled for the targets."""
        if self.scale is None:
            return interactions_B
        return (
            interactions_B * self.scale
            if self.n_targets == 1
            else interactions_B[:, None] * self.scale
        )

    @torch.no_grad()
    def weighted_sum(self, weights: Sequence[float]) -> "InteractionArch":
        """A single-target model in eval mode whose logit is the weighted sum of this model's.

        It shares the parameters of numeric and vector fields, and works wherever a single-target
        model does.

        Args:
            weights: the weights of the T targets.
        """
        whole = copy(self)
        whole._parameters, whole._modules = self._parameters.copy(), self._modules.copy()
        by_target = torch.tensor(weights, dtype=torch.float64, device=self.bias.device)
        whole.bias = nn.Parameter((by_target @ self.bias.double()).float()[None], False)
        if self.scale is not None:
            whole.scale = nn.Parameter((by_target @ self.scale.double()).float()[None], False)
        if isinstance(self.over_arch, Towers):
            whole.over_arch = self.over_arch.weighted_sum(weights).to(self.bias.device)
        return whole.eval()

    @torch.no_grad()
    def start_at(self, logits: Sequence[float]) -> None:
        """Initialises the model to predict the same for all rows, up to the size of its vectors.

        Args:
            logits: the logits of the targets.
        """
        self.bias.copy_(torch.tensor(logits))
        if isinstance(self.over_arch, OverArch | MLPTowers):
            for module in self.over_arch.modules():
                if isinstance(module, OverArch):
                    module.start_at_0()

    def autocast(self, device: str) -> AbstractContextManager[object]:
        """Autocast context of the over-arch's matrix products."""
        return torch.autocast(device, torch.bfloat16) if self.in_bfloat16 else nullcontext()

    @property
    def constants(self) -> list[nn.Parameter]:
        """Biases that are part of every logit."""
        over = self.over_arch
        if not isinstance(over, OverArch) or over.output is None:
            return [self.bias]
        return [self.bias, over.output.bias]

    def dense_fields(
        self,
        dense_BN: Tensor,
        rows_BFW: Tensor,
        numeric: Tensor | None = None,
        vectors: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Rows of numeric and vector fields, in the layout of table rows.

        Args:
            dense_BN: ``[B, n_dense + sum of lengths]``.
            rows_BFW: looked-up rows, whose width W the result has.
            numeric: ``[g]`` indices of the requested numeric fields; None: all.
            vectors: indices of the requested vector fields; None: all.

        Returns:
            ``[B, g, W]``, unless there is no numeric field, and ``[B, 1, W]`` for each vector.
        """
        fields, n = [], self.n_dense
        kind = torch.promote_types(dense_BN.dtype, rows_BFW.dtype)
        dense_BN = dense_BN.to(kind)
        if n and (numeric is None or len(numeric)):
            weights = self.dense_factors, self.dense_first_order
            numbers_BN, rows_NW = dense_BN[:, :n], self._as_rows(n, *weights, rows_BFW, kind)
            if numeric is not None:
                numbers_BN, rows_NW = numbers_BN[:, numeric], rows_NW[numeric]
            fields.append(numbers_BN[:, :, None] * rows_NW)
        begin = n
        for place, (name, length) in enumerate(self.vectors.items()):
            x_BL = dense_BN[:, begin : begin + length]
            begin += length
            if vectors is None or place in vectors:
                factors = getattr(self, f"{VECTOR_FACTORS}{name}", None)
                first_order = getattr(self, f"{VECTOR_FIRST_ORDER}{name}", None)
                rows_LW = self._as_rows(length, factors, first_order, rows_BFW, kind)
                fields.append((x_BL @ rows_LW)[:, None])
        return fields

    def _as_rows(
        self,
        n: int,
        factors: Tensor | None,
        first_order: Tensor | None,
        rows_BFW: Tensor,
        kind: torch.dtype,
    ) -> Tensor:
        """``[n, W]``: factors, first-order weights and padding side by side, 0 where None."""
        dim, width = self.embedding_dim, rows_BFW.shape[2]
        zeros = partial(rows_BFW.new_zeros, dtype=kind)
        return torch.cat(
            [
                zeros((n, dim)) if factors is None else factors.to(kind),
                zeros((n, 1)) if first_order is None else first_order[:, None].to(kind),
                zeros((n, width - dim - 1)),
            ],
            1,
        )


class DeepFM(nn.Module):
    """The whole model.

    Args:
        embedding_arch: the tables.
        interaction_arch: everything above them.
    """

    def __init__(self, embedding_arch: EmbeddingArch, interaction_arch: InteractionArch) -> None:
        super().__init__()
        self.embedding_arch = embedding_arch
        self.interaction_arch = interaction_arch

    def forward(
        self, sparse: KeyedJaggedTensor, dense_BN: Tensor, weights_B: Tensor | None = None
    ) -> Tensor:
        """Scores rows.

        Args:
            sparse: table rows of the categorical fields.
            dense_BN: ``[B, n_dense + sum of lengths]``: numeric fields, then vectors.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]`` logits, or ``[B, T]`` for several targets.
        """
        rows_BFW = self.embedding_arch.rows(sparse)
        logits: Tensor = self.interaction_arch(rows_BFW, dense_BN, weights_B)
        return logits

    def weighted_sum(self, weights: Sequence[float]) -> "DeepFM":
        """`InteractionArch.weighted_sum` on the same tables."""
        return DeepFM(self.embedding_arch, self.interaction_arch.weighted_sum(weights))


def build_deepfm(
    tables: Mapping[str, Table],
    features: Sequence[str],
    n_dense: int,
    embedding_dim: int,
    first_order: bool = True,
    fm: bool = True,
    over_arch: Callable[[int], nn.Module] | None = None,
    init_std: float = 0.01,
    pooling: Mapping[str, str] | None = None,
    device: torch.device | None = None,
    half: bool = False,
    is_item_field: Sequence[bool] | None = None,
    vectors: Mapping[str, int] | None = None,
    n_targets: int = 1,
) -> DeepFM:
    """Builds a DeepFM or, with parts switched off, an LR, an FM or a DNN (over-arch only).

    Args:
        tables: embedding tables by name.
        features: categorical fields, in order.
        n_dense: number of numeric fields.
        embedding_dim: D.
        first_order: whether the linear part counts.
        fm: whether the pairwise part counts.
        over_arch: builds the deep part, given the length of its input; None: no deep part.
        init_std: standard deviation of the numeric and vector fields' parameters (tables are filled
            elsewhere).
        pooling: see `EmbeddingArch`.
        device: the device of the tables; ``meta`` before sharding.
        half: whether tables are in float16.
        is_item_field: see `FactorizationMachine`; categorical fields first, then numeric ones, then
            vectors.
        vectors: length of each vector field by name.
        n_targets: T.
    """
    n_fields = len(features) + n_dense + len(vectors or {})
    width = embedding_dim if fm or over_arch is not None else 0
    return DeepFM(
        EmbeddingArch(tables, features, width, pooling, device, half),
        InteractionArch(
            n_dense,
            width,
            first_order=first_order,
            fm=fm,
            over_arch=over_arch and over_arch(n_fields * width),
            init_std=init_std,
            is_item_field=is_item_field,
            vectors=vectors,
            n_targets=n_targets,
        ),
    )
