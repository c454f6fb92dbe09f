"""DeepFM scores of every (user, item) pair, factorised.

What depends on one side alone is computed once for that side.

With the fields of a pair split into those of the user (context and its numbers included) and
those of the item, ``S`` the sum and ``Q`` the sum of squares of a side's factor vectors:

* second order: ``1/2 (|S_u + S_i|^2 - Q_u - Q_i)``
  ``= <S_u, S_i> + 1/2 (|S_u|^2 - Q_u) + 1/2 (|S_i|^2 - Q_i)``: one GEMM plus two constants;
* over-arch: its first layer is a sum of a user part and an item part; the other layers run per
  pair. Batch norm is folded into the layer before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.model.norm import GlobalBatchNorm

PAIRS_PER_STEP = {"cpu": 8192, "cuda": 1 << 21}
"""Pairs whose hidden layers are in memory at once; on CPU they should stay in the cache."""


@dataclass(frozen=True)
class Side:
    """What one side contributes to its pairs' logits.

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

    def __getitem__(self, rows: slice) -> "Side":
        return Side(*(t[rows] for t in self.tensors))


class CatalogueScorer:
    """Scores all pairs of some users and some items.

    Args:
        arch: the trained InteractionArch, in eval mode.
        item_fields: for each categorical field and then each numeric one, whether it describes
            the item (else the user or the context).
        n_categorical: number of categorical fields.

    Attributes:
        layers: the over-arch's hidden layers above the first and its output, float64, batch norm
            folded in; empty without a hidden layer, None where the over-arch cannot be split.
        activation: between them.
    """

    def __init__(
        self, arch: InteractionArch, item_fields: Sequence[bool], n_categorical: int
    ) -> None:
        self._arch = arch
        self._n_categorical = n_categorical
        of_item = torch.tensor(item_fields, dtype=torch.bool, device=arch.bias.device)
        self._fields = {"user": (~of_item).nonzero()[:, 0], "item": of_item.nonzero()[:, 0]}
        over = arch.over_arch
        folded = _folded(over) if isinstance(over, OverArch) else None
        self._first = None if folded is None else folded[0]
        self._output_bias = 0.0 if folded is None or len(folded) == 1 else float(folded[-1][1])
        self.layers = [] if over is None else None if folded is None else folded[1:]
        self.activation = over.activation if isinstance(over, OverArch) else nn.Identity()

    @torch.no_grad()
    def side(self, which: str, factors_BFD: Tensor, first_BF: Tensor, dense_BN: Tensor) -> Side:
        """Prepares users or items.

        Args:
            which: ``user`` or ``item``.
            factors_BFD: ``[n, F, D]`` from the embedding arch; only this side's fields are read.
            first_BF: ``[n, F]`` first-order weights.
            dense_BN: ``[n, n_dense]`` numeric fields.
        """
        arch, fields = self._arch, self._fields[which]
        n = factors_BFD.shape[0]
        # In float64: these sums are few, and their rounding would reach every pair.
        constant = factors_BFD.new_zeros(n, dtype=torch.float64)
        if which == "user":
            constant += arch.bias.double() + self._output_bias
        categorical = fields[fields < self._n_categorical]
        numeric = fields[fields >= self._n_categorical] - self._n_categorical
        numbers = dense_BN[:, numeric].double()
        if arch.first_order:
            constant += first_BF[:, categorical].double().sum(1)
            if arch.dense_first_order is not None:
                constant += numbers @ arch.dense_first_order[numeric].double()
        vectors = factors_BFD[:, categorical].double()
        if arch.dense_factors is not None:
            scaled = numbers[:, :, None] * arch.dense_factors[numeric].double()
            vectors = torch.cat([vectors, scaled], 1)
        factor_sum = vectors.sum(1)
        if arch.fm is not None:
            constant += 0.5 * (factor_sum.square() - vectors.square().sum(1)).sum(1)
        hidden = vectors.flatten(1)
        if arch.fm is None:
            factor_sum = factor_sum[:, :0]
        if self._first is not None:
            weight, bias = self._first
            dim = factors_BFD.shape[2]
            columns = (fields[:, None] * dim + torch.arange(dim, device=fields.device)).flatten()
            hidden = hidden @ weight[:, columns].T
            if which == "user":
                hidden = hidden + bias
            if not self.layers:  # no hidden layer: the output is a sum of both sides
                constant += hidden[:, 0]
        if self.layers is not None and not self.layers:
            hidden = hidden[:, :0]
        return Side(constant.float(), factor_sum.float(), hidden.float())

    @torch.no_grad()
    def scores(self, users: Side, items: Side, deep: bool = True) -> Tensor:
        """Logits of all pairs.

        Args:
            users: U users.
            items: I items.
            deep: whether the over-arch counts.

        Returns:
            ``[U, I]`` float32.
        """
        scores = users.constant[:, None] + items.constant
        scores.addmm_(users.factor_sum, items.factor_sum.T)
        if not deep or self.layers == []:
            return scores
        n_users, n_items = scores.shape
        limit = PAIRS_PER_STEP[scores.device.type]
        item_step = min(n_items, limit)
        user_step = max(1, limit // item_step)
        for u in range(0, n_users, user_step):
            for i in range(0, n_items, item_step):
                user, item = users.hidden[u : u + user_step], items.hidden[i : i + item_step]
                block = scores[u : u + user_step, i : i + item_step]
                block += self._deep(user[:, None], item[None])
        return scores

    @torch.no_grad()
    def scores_of_pairs(self, users: Side, items: Side, positions: Tensor) -> Tensor:
        """Logits of each user and some items of its own.

        Args:
            users: U users.
            items: I items.
            positions: ``[U, N]`` int64 in [0, I).

        Returns:
            ``[U, N]`` float32.
        """
        scores = users.constant[:, None] + items.constant[positions]
        step = max(1, PAIRS_PER_STEP[scores.device.type] // positions.shape[1])
        for u in range(0, len(scores), step):
            wanted = positions[u : u + step]
            factors, hidden = items.factor_sum[wanted], items.hidden[wanted]
            block = scores[u : u + step]
            block += (factors @ users.factor_sum[u : u + step, :, None])[:, :, 0]
            if self.layers != []:
                block += self._deep(users.hidden[u : u + step, None], hidden)
        return scores

    def _deep(self, user: Tensor, item: Tensor) -> Tensor:
        """The over-arch but its output's bias: ``[u, 1, H]``, ``[u or 1, i, H]`` -> ``[u, i]``."""
        shape = len(user), item.shape[1]
        if self.layers is None:
            return self._unsplit(user, item).view(shape)
        x = self.activation(user + item).flatten(0, 1)
        for weight, bias in self.layers[:-1]:
            x = self.activation(torch.addmm(bias.float(), x, weight.float().T))
        return (x @ self.layers[-1][0].float()[0]).view(shape)

    def _unsplit(self, user: Tensor, item: Tensor) -> Tensor:
        """An over-arch of the user's own: its input is put together for each pair."""
        over_arch = self._arch.over_arch
        assert over_arch is not None
        n_fields = sum(len(fields) for fields in self._fields.values())
        dim = (user.shape[2] + item.shape[2]) // n_fields
        n, m = len(user), item.shape[1]
        x = user.new_empty(n, m, n_fields, dim)
        x[:, :, self._fields["user"]] = user.view(n, 1, -1, dim)
        x[:, :, self._fields["item"]] = item.view(len(item), m, -1, dim)
        out: Tensor = over_arch(x.view(n * m, -1))
        return out


def _folded(over_arch: OverArch) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of all layers in float64, batch norm folded in."""
    layers = []
    for linear, norm in zip(over_arch.hidden, over_arch.norms, strict=True):
        assert isinstance(linear, nn.Linear)
        weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
        if isinstance(norm, GlobalBatchNorm):
            scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
            weight = weight * scale[:, None]
            bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
            weight, bias = weight.detach(), bias.detach()
        layers.append((weight, bias))
    output = over_arch.output
    layers.append((output.weight.detach().double(), output.bias.detach().double()))
    return layers
