"""DeepFM: bias + first order + pairwise interactions + over-arch, on shared embeddings.

Source: Guo et al., "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction", 2017.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)

from deepfm_dist.model.norm import GlobalBatchNorm, Sum

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "relu": nn.ReLU,
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
    initialisation and, for row-wise optimizers, the accumulator.

    Args:
        tables: tables by name.
        features: the fields in the order of the output.
        embedding_dim: D; 0 leaves only the first-order weight.
        mean_pooled: fields whose several values are averaged; the others' are summed.
        device: where the tables are; ``meta`` before sharding.
    """

    is_mean_F: Tensor

    def __init__(
        self,
        tables: Mapping[str, Table],
        features: Sequence[str],
        embedding_dim: int,
        mean_pooled: Collection[str] = (),
        device: torch.device | None = None,
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
                )
                for name, table in tables.items()
            ],
        )

    def forward(self, sparse: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Looks up and pools.

        Args:
            sparse: F keys, in the order of ``features``, of B bags each.

        Returns:
            factors ``[B, F, D]`` and first-order weights ``[B, F]``.
        """
        pooled = self.ebc(sparse)
        # By name: a sharded collection returns its keys grouped by owner, not in our order.
        rows = KeyedTensor.regroup([pooled], [self.features])[0]
        rows_BFW = rows.view(-1, len(self.features), self.row_width)
        if self.mean_pooled:
            lengths_FB = sparse.lengths().view(len(self.features), -1)
            counts_BF = lengths_FB.T.to(rows_BFW.dtype).clamp(min=1)
            rows_BFW = rows_BFW / torch.where(self.is_mean_F, counts_BF, 1.0)[:, :, None]
        return rows_BFW[:, :, : self.embedding_dim], rows_BFW[:, :, self.embedding_dim]


class FactorizationMachine(nn.Module):
    """Second-order interactions of a factorization machine.

    Source: Rendle, "Factorization Machines", 2010, Lemma 3.1; Guo et al., 2017, eq. 2.
    """

    def forward(self, factors_BFD: Tensor) -> Tensor:
        """Sums the inner products of all pairs of fields.

        Args:
            factors_BFD: ``[B, F, D]`` one factor vector per field.

        Returns:
            ``[B]``: ``sum_{i<j} <v_i, v_j>``, as ``1/2 sum_d ((sum_f v)^2 - sum_f v^2)``.
        """
        of_sum = factors_BFD.sum(1).square()
        sum_of = factors_BFD.square().sum(1)
        return 0.5 * (of_sum - sum_of).sum(1)


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
        x = x_BI
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            x = linear(x)
            if isinstance(norm, GlobalBatchNorm):
                x = norm(x, weights_B)
            x = self.dropout(self.activation(x))
        out: Tensor = self.output(x).squeeze(1)
        return out


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
        self.first_order = first_order
        self.bias = nn.Parameter(torch.zeros(1))
        self.fm = FactorizationMachine() if fm else None
        self.over_arch = over_arch
        self.dense_factors = self.dense_first_order = None
        if n_dense:
            if fm or over_arch is not None:
                vectors = torch.randn(n_dense, embedding_dim) * init_std
                self.dense_factors = nn.Parameter(vectors)
            if first_order:
                self.dense_first_order = nn.Parameter(torch.randn(n_dense) * init_std)

    def forward(
        self,
        factors_BFD: Tensor,
        first_order_BF: Tensor,
        dense_BN: Tensor,
        weights_B: Tensor | None = None,
    ) -> Tensor:
        """Scores rows.

        Args:
            factors_BFD: ``[B, F, D]``.
            first_order_BF: ``[B, F]``.
            dense_BN: ``[B, n_dense]``.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]`` logits.
        """
        logits = self.bias.expand(factors_BFD.shape[0])
        if self.first_order:
            logits = logits + first_order_BF.sum(1)
            if self.dense_first_order is not None:
                logits = logits + dense_BN @ self.dense_first_order
        if self.dense_factors is not None:
            factors_BFD = torch.cat([factors_BFD, dense_BN[:, :, None] * self.dense_factors], 1)
        if self.fm is not None:
            logits = logits + self.fm(factors_BFD)
        if self.over_arch is not None:
            x_BI = factors_BFD.flatten(1)
            if isinstance(self.over_arch, OverArch):
                logits = logits + self.over_arch(x_BI, weights_B)
            else:
                logits = logits + self.over_arch(x_BI)
        return logits


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
        factors_BFD, first_order_BF = self.embedding_arch(sparse)
        logits: Tensor = self.interaction_arch(factors_BFD, first_order_BF, dense_BN, weights_B)
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
    """
    width = embedding_dim if fm or over_arch is not None else 0
    return DeepFM(
        EmbeddingArch(tables, features, width, mean_pooled, device),
        InteractionArch(
            n_dense,
            width,
            first_order,
            fm,
            None if over_arch is None else over_arch((len(features) + n_dense) * width),
            init_std,
        ),
    )
