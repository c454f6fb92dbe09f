"""DeepFM scores of every (user, item) pair, factorised as `deepfm_dist.model.pairs` says.

Batch norm is folded into the layer before it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepfm_dist.model.deepfm import InteractionArch
from deepfm_dist.model.norm import GlobalBatchNorm
from deepfm_dist.model.over_arch import OverArch
from deepfm_dist.model.pairs import Fields, Layer, Side, side_of

PAIRS_PER_STEP = {"cpu": 8192, "cuda": 1 << 21}
"""Pairs whose hidden layers are in memory at once; on CPU they should fit the cache."""


class CatalogueScorer:
    """Scores all pairs of some users and some items.

    Args:
        arch: the trained InteractionArch, in eval mode.
        item_fields: whether each field describes the item (otherwise the user or the context):
            categorical, then numeric, then vector fields.
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
        user, item = Fields.for_both_sides(item_fields, n_categorical, arch, arch.bias.device)
        self._fields = {"user": user, "item": item}
        over = arch.over_arch
        folded = _fold_batch_norm(over) if isinstance(over, OverArch) else None
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
            dense_BN: ``[n, n_dense + sum of lengths]`` numeric fields, then vectors.
        """
        # In float64: there are few of these sums, and their rounding would affect every pair.
        fields = self._fields[which]
        rows = torch.cat([factors_BFD, first_BF[:, :, None]], 2)[:, fields.categorical]
        side = side_of(
            self._arch,
            fields,
            rows.double(),
            dense_BN,
            self._first,
            which == "user",
        )
        constant, hidden = side.constant, side.hidden
        if which == "user":
            constant = constant + self._output_bias
        if self._first is not None and not self.layers:
            constant = constant + hidden[:, 0]  # no hidden layer: the output is a sum of both sides
        if self.layers is not None and not self.layers:
            hidden = hidden[:, :0]
        return Side(constant.float(), side.factor_sum.float(), hidden.float())

    def deep(self, x_BI: Tensor) -> Tensor:
        """The over-arch of the fields' vectors; differentiable.

        Args:
            x_BI: ``[B, fields * D]`` float64.

        Returns:
            ``[B]`` float64, computed in float32 where the over-arch cannot be split.
        """
        over_arch = self._arch.over_arch
        if over_arch is None:
            return x_BI.new_zeros(len(x_BI))
        device = self._arch.bias.device
        if self.layers is None or self._first is None:
            out: Tensor = over_arch(x_BI.to(device, torch.float32))
            return out.to(x_BI)
        weight, bias = self._first
        x = torch.addmm(bias, x_BI.to(device), weight.T)
        for weight, bias in self.layers:
            x = torch.addmm(bias, self.activation(x), weight.T)
        return x[:, 0].to(x_BI.device)

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
        """Logits of each user with this user's own items.

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
        """The over-arch without output bias: ``[u, 1, H]``, ``[u or 1, i, H]`` -> ``[u, i]``."""
        shape = len(user), item.shape[1]
        if self.layers is None:
            return self._unsplit(user, item).view(shape)
        x = self.activation(user + item).flatten(0, 1)
        for weight, bias in self.layers[:-1]:
            x = self.activation(torch.addmm(bias.float(), x, weight.float().T))
        return (x @ self.layers[-1][0].float()[0]).view(shape)

    def _unsplit(self, user: Tensor, item: Tensor) -> Tensor:
        """A custom over-arch: its input is assembled for each pair."""
        over_arch = self._arch.over_arch
        assert over_arch is not None
        n_fields = sum(len(fields.places) for fields in self._fields.values())
        dim = (user.shape[2] + item.shape[2]) // n_fields
        n, m = len(user), item.shape[1]
        x = user.new_empty(n, m, n_fields, dim)
        x[:, :, self._fields["user"].places] = user.view(n, 1, -1, dim)
        x[:, :, self._fields["item"].places] = item.view(len(item), m, -1, dim)
        out: Tensor = over_arch(x.view(n * m, -1))
        return out


def _fold_batch_norm(over_arch: OverArch) -> list[Layer]:
    """Weights and biases of all layers in float64, batch norm folded in."""
    layers = []
    for linear, norm in zip(over_arch.hidden, over_arch.norms, strict=True):
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().double()
        if isinstance(norm, GlobalBatchNorm):
            scale = norm.weight.detach().double() * torch.rsqrt(
                norm.running_var.double() + norm.eps
            )
            weight = weight * scale[:, None]
            bias = norm.bias.detach().double() - norm.running_mean.double() * scale
        else:
            bias = linear.bias.detach().double()
        layers.append((weight, bias))
    output = over_arch.layers[-1]
    layers.append((output.weight.detach().double(), output.bias.detach().double()))
    return layers
