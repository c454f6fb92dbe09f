"""Batch norm over the global batch, on any device."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks; gradients flow back through it the same way."""


class GlobalBatchNorm(nn.Module):
    """Batch norm with the weighted statistics of all ranks' rows; without any, the running ones.

    ``torch.nn.SyncBatchNorm`` runs on CUDA only and would count the rows that pad a batch; this
    one leaves rows of weight 0 out, and is the same on every device and at every world size.

    Args:
        num_features: C.
        all_reduce: sums a tensor over all ranks, differentiably; default: this process alone.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics.

    Source: Ioffe, Szegedy, "Batch Normalization", 2015; running variance unbiased, as PyTorch's.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        all_reduce: Sum | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.all_reduce = all_reduce or (lambda tensor: tensor)
        self.eps, self.momentum = eps, momentum

    def forward(self, x_BC: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Normalises rows.

        Args:
            x_BC: ``[B, C]``.
            weights_B: ``[B]`` row weights in the statistics; default ones.

        Returns:
            ``[B, C]``.
        """
        if not self.training:
            return self._normalize(x_BC, self.running_mean, self.running_var)
        w_B1 = torch.ones_like(x_BC[:, :1]) if weights_B is None else weights_B[:, None]
        # The mean first, then the squares around it: one pass of sums would cancel.
        sums = self.all_reduce(torch.cat([(w_B1 * x_BC).sum(0), w_B1.sum(0)]))
        is_any = sums[-1] > 0  # the last part of a split batch may be padding alone
        total = sums[-1].detach().where(is_any, 1.0)
        mean = (sums[:-1] / total).where(is_any, self.running_mean)
        squares = self.all_reduce((w_B1 * (x_BC - mean).square()).sum(0))
        var = (squares / total).where(is_any, self.running_var)
        with torch.no_grad():
            unbiased = var * (total / (total - 1).clamp(min=1))
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return self._normalize(x_BC, mean, var)

    def _normalize(self, x_BC: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x_BC - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias
