"""Batch norm over the global batch, on any device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gather = Callable[[Tensor], Tensor]
"""Concatenates all ranks' ``[n, ...]`` to ``[ranks * n, ...]``, differentiably."""


class GlobalBatchNorm(nn.Module):
    """Batch norm with weighted statistics over all ranks' rows, or running ones without rows.

    ``torch.nn.SyncBatchNorm`` runs on CUDA only and would include padding rows; this one ignores
    rows of weight 0, and gives the same results on every device and at every world size.

    An over-arch given by import path builds it from ``num_features`` and calls it with ``[B, C]``,
    a row for each row of the batch. Training supplies the ranks and the rows' weights. The linear
    layer before it should have no bias: subtracting the mean cancels it, and Adam would follow its
    gradient, pure rounding error that depends on the number of ranks.

    Args:
        num_features: C.
        gather: concatenates the ranks' statistics, once per forward pass; default: a single
            process.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.

    Attributes:
        row_weights_B: ``[B]`` weights of the rows of calls without ``weights_B``; None: ones.

    Source: Ioffe, Szegedy, "Batch Normalization", 2015; running variance unbiased, as PyTorch's.
    Ranks' statistics are joined as in Chan et al., "Updating formulae and a pairwise algorithm for
    computing sample variances", 1979.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        gather: Gather | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.gather = gather or (lambda tensor: tensor)
        self.eps, self.momentum = eps, momentum
        self.row_weights_B: Tensor | None = None

    def forward(self, x_BC: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Normalises rows.

        Args:
            x_BC: ``[B, C]``.
            weights_B: ``[B]`` row weights in the statistics; default: `row_weights_B`.

        Returns:
            ``[B, C]``.

        Raises:
            ValueError: ``x_BC`` has another shape, or not a row for each weight.
        """
        weights_B = self.row_weights_B if weights_B is None else weights_B
        n_rows = x_BC.shape[0] if weights_B is None else len(weights_B)
        if x_BC.shape != (n_rows, len(self.weight)):
            raise ValueError(
                f"GlobalBatchNorm({len(self.weight)}) takes [{n_rows}, {len(self.weight)}], a row "
                f"for each row of the batch; got {list(x_BC.shape)}"
            )
        if not self.training:
            return self._normalize(x_BC, self.running_mean, self.running_var)
        w_B1 = torch.ones_like(x_BC[:, :1]) if weights_B is None else weights_B[:, None]
        # Two passes, since a one-pass sum of squares would suffer from cancellation.
        weight, sums = w_B1.sum(0), (w_B1 * x_BC).sum(0)
        squares = (w_B1 * (x_BC - _quotient(sums, weight)).square()).sum(0)
        of_ranks_RS = self.gather(torch.cat([sums, squares, weight])[None])
        sums_RC, squares_RC, weights_R1 = of_ranks_RS.split([len(sums), len(sums), 1], 1)
        total = weights_R1.detach().sum(0)
        is_any = total > 0  # the last part of a split batch may be all padding
        total = total.where(is_any, 1.0)
        mean = (sums_RC.sum(0) / total).where(is_any, self.running_mean)
        # Shifts each rank's squares from its own mean to the common one.
        off_RC = _quotient(sums_RC, weights_R1) - mean
        squares = (squares_RC + weights_R1 * off_RC.square()).sum(0)
        var = (squares / total).where(is_any, self.running_var)
        with torch.no_grad():
            unbiased = var * (total / (total - 1).clamp(min=1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return self._normalize(x_BC, mean, var)

    def _normalize(self, x_BC: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x_BC - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias


def batch_norms(module: nn.Module) -> Sequence[GlobalBatchNorm]:
    """Those of a module and the modules in it."""
    return [norm for norm in module.modules() if isinstance(norm, GlobalBatchNorm)]


def _quotient(sums: Tensor, weights: Tensor) -> Tensor:
    """``sums / weights``, or 0 if the weight is 0."""
    return sums / weights.detach().where(weights > 0, 1.0)
