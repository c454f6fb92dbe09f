"""An independent DeepFM in plain PyTorch, for comparison; shares no code with the package."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Bags = Mapping[str, Sequence[Sequence[int]]]
"""For each field, the table rows of each example."""


class PlainDeepFM(nn.Module):
    """Tables of D + 1 columns, the pairwise sum over all pairs, an nn.Sequential on top."""

    def __init__(
        self,
        tables: Mapping[str, int],
        fields: Sequence[tuple[str, str, str]],
        n_dense: int,
        dim: int,
        hidden: Sequence[int],
        activation: str = "ReLU",
        batch_norm: bool = False,
        first_order: bool = True,
        fm: bool = True,
        deep: bool = True,
        is_item_field: Sequence[bool] | None = None,
        vectors: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.fields, self.dim = list(fields), dim
        self.use = (first_order, fm, deep)
        self.is_item_field = is_item_field
        self.tables = nn.ModuleDict({k: nn.Embedding(n, dim + 1) for k, n in tables.items()})
        self.projections = nn.ModuleList(nn.Linear(n, dim + 1, bias=False) for n in vectors)
        self.dense_factors = nn.Parameter(torch.randn(n_dense, dim))
        self.dense_first = nn.Parameter(torch.randn(n_dense))
        self.bias = nn.Parameter(torch.randn(1))
        layers: list[nn.Module] = []
        width = (len(self.fields) + n_dense + len(vectors)) * dim
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if batch_norm:
                layers.append(nn.BatchNorm1d(size))
            layers.append(getattr(nn, activation)())
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, bags: Bags, dense: Tensor) -> Tensor:
        vectors, firsts = [], []
        for name, table, pooling in self.fields:
            rows = []
            for bag in bags[name]:
                looked_up = self.tables[table](torch.tensor(list(bag), dtype=torch.long))
                total = looked_up.sum(0)
                rows.append(total / max(1, len(bag)) if pooling == "mean" else total)
            both = torch.stack(rows)
            vectors.append(both[:, : self.dim])
            firsts.append(both[:, self.dim])
        n_dense = len(self.dense_first)
        for j in range(n_dense):
            vectors.append(dense[:, j : j + 1] * self.dense_factors[j])
            firsts.append(dense[:, j] * self.dense_first[j])
        lengths = [projection.in_features for projection in self.projections]
        parts = dense[:, n_dense:].split(lengths, 1) if lengths else ()
        for projection, x in zip(self.projections, parts, strict=True):
            vectors.append(projection(x)[:, : self.dim])
            firsts.append(projection(x)[:, self.dim])
        first_order, fm, deep = self.use
        logits = self.bias.expand(len(dense))
        if first_order:
            logits = logits + torch.stack(firsts).sum(0)
        if fm:
            for a in range(len(vectors)):
                for b in range(a):
                    if (
                        self.is_item_field is not None
                        and self.is_item_field[a] == self.is_item_field[b]
                    ):
                        continue
                    logits = logits + (vectors[a] * vectors[b]).sum(1)
        if deep:
            logits = logits + self.mlp(torch.cat(vectors, 1))[:, 0]
        return logits
