"""DeepFM: bias + first order + pairwise interactions + over-arch, on shared embeddings.

Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", 2017.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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

from deepfm_dist.model.norm import GlobalBatchNorm, Sum

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # nothing needs what a linear layer gave once more
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
ROW_ALIGNMENT = 4
"""FBGEMM's kernels want rows of a multiple of 4 floats."""


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

    One table instead of two means one lookup and one all-to-all; the price is that both share
    initialisation and, for row-wise optimizers, the accumulator (CONTRIBUTING.md has the figures).

    Args:
        tables: tables by name.
        features: the fields in the order of the output.
        embedding_dim: D; 0 leaves only the first-order weight.
        mean_pooled: fields whose several values are averaged; the others' are summed.
        device: where the tables are; ``meta`` before sharding.
        half: whether they are kept in float16; what is looked up is float32 all the same.
    """

    is_mean_F: Tensor

    def __init__(
        self,
        tables: Mapping[str, Table],
        features: Sequence[str],
        embedding_dim: int,
        mean_pooled: Collection[str] = (),
        device: torch.device | None = None,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.mean_pooled = [name for name in features if name in mean_pooled]
        is_mean_F = torch.tensor([name in mean_pooled for name in features])
        self.register_buffer("is_mean_F", is_mean_F, persistent=False)
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
                    # The mean is taken here: where row-wise and table-wise tables meet in one
                    # collection, TorchRec 1.8 divides the table-wise ones twice.
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
        rows = _in_order(self.ebc(sparse), self.features)
        rows_BFW: Tensor = rows.view(-1, len(self.features), self.row_width)
        if self.mean_pooled:
            lengths_FB = sparse.lengths().view(len(self.features), -1)
            counts_BF = lengths_FB.T.to(rows_BFW.dtype).clamp(min=1)
            rows_BFW = rows_BFW / torch.where(self.is_mean_F, counts_BF, 1.0)[:, :, None]
        return rows_BFW

    def forward(self, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """`rows` as factors ``[B, F, D]`` and first-order weights ``[B, F]``."""
        rows_BFW = self.rows(sparse)
        return rows_BFW[:, :, : self.embedding_dim], rows_BFW[:, :, self.embedding_dim]


@torch.fx.wrap  # TorchRec's pipeline traces what is around the lookup
def _in_order(pooled: KeyedTensor, features: list[str]) -> Tensor:
    """``[B, F * row_width]`` by name: a sharded collection groups its keys by owner."""
    if pooled.keys() == features:
        return pooled.values()
    return KeyedTensor.regroup([pooled], [features])[0]


class FactorizationMachine(nn.Module):
    """First and second order of a factorization machine.

    Args:
        dim: D.
        first_order: whether the linear part counts.

    Source: Rendle, "Factorization Machines", 2010, eq. 1, Lemma 3.1; Guo et al., 2017, eq. 2.
    """

    def __init__(self, dim: int, first_order: bool = True) -> None:
        super().__init__()
        self.dim, self.first_order = dim, first_order

    def forward(self, rows_BFW: Tensor) -> Tensor:
        """Sums the weights of all fields, and the inner products of all pairs of fields.

        Args:
            rows_BFW: ``[B, F, W]`` one row per field: D factors ``v``, a weight ``w``, padding.

        Returns:
            ``[B]``: ``sum_i w_i + sum_{i<j} <v_i, v_j>``.
        """
        score: Tensor = _Interactions.apply(  # type: ignore[no-untyped-call]
            rows_BFW, self.dim, self.first_order
        )
        return score


class _Interactions(torch.autograd.Function):
    """The sums with their gradient in one pass; autograd would fill and add up one for each part.

    The pairs' sum is ``1/2 sum_d ((sum_f v)^2 - sum_f v^2)``; its gradient by ``v_f`` is
    ``sum_g v_g - v_f``.
    """

    @staticmethod
    def forward(ctx: Any, rows_BFW: Tensor, dim: int, first_order: bool) -> Tensor:
        sum_BW = rows_BFW.sum(1)
        ctx.save_for_backward(rows_BFW, sum_BW)
        ctx.dim, ctx.first_order = dim, first_order
        of_sum = sum_BW[:, :dim].square().sum(1)
        sum_of = rows_BFW[:, :, :dim].square().sum((1, 2))
        pairs = 0.5 * (of_sum - sum_of)
        return sum_BW[:, dim] + pairs if first_order else pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor, None, None]:
        rows_BFW, sum_BW = ctx.saved_tensors
        gradient = sum_BW[:, None, :] - rows_BFW
        gradient[:, :, ctx.dim :] = 0
        if ctx.first_order:
            gradient[:, :, ctx.dim] = 1
        return gradient.mul_(gradient_B[:, None, None]), None, None


class OverArch(nn.Module):
    """The multi-layer perceptron; its last layer is linear.

    Args:
        in_features: length of a row.
        layer_sizes: hidden layers.
        activation: relu, gelu, tanh or sigmoid.
        dropout: probability of dropping a hidden unit in training.
        batch_norm: normalise each hidden layer before its activation.
        all_reduce: sums a tensor over the ranks, differentiably; for batch norm.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        all_reduce: Sum | None = None,
    ) -> None:
        super().__init__()
        sizes = [in_features, *layer_sizes]
        pairs = list(itertools.pairwise(sizes))
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(
            GlobalBatchNorm(b, all_reduce) if batch_norm else nn.Identity() for _, b in pairs
        )
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(sizes[-1], 1)

    def forward(self, x_BI: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Scores rows.

        Args:
            x_BI: ``[B, in_features]``.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]``.
        """
        return self._scores(x_BI, self._first.weight, weights_B)

    def of_rows(self, rows_BFW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """`forward` of the leading ``in_features / F`` columns of ``[B, F, W]`` rows.

        They are not copied next to each other: the other columns meet weights of 0.
        """
        _, fields, width = rows_BFW.shape
        weight = self._first.weight.view(self._first.out_features, fields, -1)
        padded = torch.nn.functional.pad(weight, (0, width - weight.shape[2]))
        return self._scores(rows_BFW.flatten(1), padded.flatten(1), weights_B)

    @property
    def _first(self) -> nn.Linear:
        first = self.hidden[0] if len(self.hidden) else self.output
        assert isinstance(first, nn.Linear)
        return first

    def _scores(self, x: Tensor, first_weight: Tensor, weights_B: Tensor | None) -> Tensor:
        """The layers, the first one with the weight given."""
        x = torch.nn.functional.linear(x, first_weight, self._first.bias)
        for norm, following in zip(self.norms, [*self.hidden[1:], self.output], strict=True):
            if isinstance(norm, GlobalBatchNorm):
                x = norm(x, weights_B)
            x = following(self.dropout(self.activation(x)))
        return x.squeeze(1)


class InteractionArch(nn.Module):
    """Everything above the tables: looked-up vectors and numbers -> logits.

    A numeric field is a field like the others: its vector is a learned one times the value.

    Args:
        n_dense: number of numeric fields.
        embedding_dim: D.
        first_order: whether the linear part counts.
        fm: whether the pairwise part counts.
        over_arch: the deep part, ``[B, (F + n_dense) * D] -> [B]``, or None.
        init_std: standard deviation of the numeric fields' vectors.

    Attributes:
        in_bfloat16: whether the over-arch's matrix products are taken in bfloat16; off unless set.
    """

    def __init__(
        self,
        n_dense: int,
        embedding_dim: int,
        first_order: bool = True,
        fm: bool = True,
        over_arch: nn.Module | None = None,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.first_order, self.in_bfloat16 = first_order, False
        self.bias = nn.Parameter(torch.zeros(1))
        self.fm = FactorizationMachine(embedding_dim, first_order) if fm else None
        self.over_arch = over_arch
        self.dense_factors = self.dense_first_order = None
        if n_dense:
            if fm or over_arch is not None:
                vectors = torch.randn(n_dense, embedding_dim) * init_std
                self.dense_factors = nn.Parameter(vectors)
            if first_order:
                self.dense_first_order = nn.Parameter(torch.randn(n_dense) * init_std)

    def forward(
        self, rows_BFW: Tensor, dense_BN: Tensor, weights_B: Tensor | None = None
    ) -> Tensor:
        """Scores rows.

        Args:
            rows_BFW: ``[B, F, W]`` looked-up rows: D factors, first-order weight, padding.
            dense_BN: ``[B, n_dense]``.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]`` logits.
        """
        if dense_BN.shape[1]:
            rows_NW = self._dense_rows(dense_BN.shape[1], rows_BFW)
            rows_BFW = torch.cat([rows_BFW, dense_BN[:, :, None] * rows_NW], 1)
        logits = self.bias.expand(rows_BFW.shape[0])
        if self.fm is not None:
            logits = logits + self.fm(rows_BFW)
        elif self.first_order:
            logits = logits + rows_BFW[:, :, self.embedding_dim].sum(1)
        if self.over_arch is not None:
            with torch.autocast(rows_BFW.device.type, torch.bfloat16, enabled=self.in_bfloat16):
                if isinstance(self.over_arch, OverArch):
                    deep = self.over_arch.of_rows(rows_BFW, weights_B)
                else:
                    deep = self.over_arch(rows_BFW[:, :, : self.embedding_dim].flatten(1))
            logits = logits + deep.float()
        return logits

    def _dense_rows(self, n: int, rows_BFW: Tensor) -> Tensor:
        """``[n_dense, W]``: what numeric fields would have in a table."""
        dim, width = self.embedding_dim, rows_BFW.shape[2]
        factors, first = self.dense_factors, self.dense_first_order
        return torch.cat(
            [
                rows_BFW.new_zeros(n, dim) if factors is None else factors,
                rows_BFW.new_zeros(n, 1) if first is None else first[:, None],
                rows_BFW.new_zeros(n, width - dim - 1),
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
            dense_BN: ``[B, n_dense]`` numeric fields.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]`` logits.
        """
        rows_BFW = self.embedding_arch.rows(sparse)
        logits: Tensor = self.interaction_arch(rows_BFW, dense_BN, weights_B)
        return logits


def build_deepfm(
    tables: Mapping[str, Table],
    features: Sequence[str],
    n_dense: int,
    embedding_dim: int,
    first_order: bool = True,
    fm: bool = True,
    over_arch: Callable[[int], nn.Module] | None = None,
    init_std: float = 0.01,
    mean_pooled: Collection[str] = (),
    device: torch.device | None = None,
    half: bool = False,
) -> DeepFM:
    """A DeepFM, or by its switches an LR (first order alone), an FM or a DNN (over-arch alone).

    Args:
        tables: embedding tables by name.
        features: categorical fields, in order.
        n_dense: number of numeric fields.
        embedding_dim: D.
        first_order: whether the linear part counts.
        fm: whether the pairwise part counts.
        over_arch: makes the deep part, given the length of its input; None: no deep part.
        init_std: standard deviation of the numeric fields' vectors (tables are filled elsewhere).
        mean_pooled: fields whose several values are averaged; the others' are summed.
        device: of the tables; ``meta`` before sharding.
        half: whether tables are kept in float16.
    """
    width = embedding_dim if fm or over_arch is not None else 0
    return DeepFM(
        EmbeddingArch(tables, features, width, mean_pooled, device, half),
        InteractionArch(
            n_dense,
            width,
            first_order,
            fm,
            None if over_arch is None else over_arch((len(features) + n_dense) * width),
            init_std,
        ),
    )
