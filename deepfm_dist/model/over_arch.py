"""The over-arch, the deep part of a DeepFM: a multi-layer perceptron."""

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deepfm_dist.model import kernels
from deepfm_dist.model.dropout import RowDropout
from deepfm_dist.model.norm import GlobalBatchNorm
from deepfm_dist.vector_code import HAS_FMA

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # the linear layer's output is not reused
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
_KERNEL_UNITS = 512
"""Maximum layer size for `kernels`."""


class _MLPOnCPU(torch.autograd.Function):
    """The over-arch by `kernels`, from rows to output."""

    @staticmethod
    def forward(
        ctx: Any, rows_BFW: Tensor, dropout: float, key: int, first: int, *parameters: Tensor
    ) -> Tensor:
        rows = rows_BFW.detach().contiguous()
        sizes = np.array([weight.shape[1] for weight in parameters[::2]])
        flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
        outputs, state = kernels.mlp(rows.numpy(), sizes, flat.numpy(), dropout, key, first)
        ctx.state, ctx.rows_shape = state, rows.shape
        ctx.shapes = [parameter.shape for parameter in parameters]
        return torch.from_numpy(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_B: Tensor) -> tuple[Tensor | None, ...]:
        sizes = [shape.numel() for shape in ctx.shapes]
        by_rows, flat = torch.zeros(ctx.rows_shape), torch.empty(sum(sizes))
        gradient = gradient_B.contiguous().numpy()
        kernels.mlp_gradient(gradient, ctx.state, by_rows.numpy(), flat.numpy())
        parts = zip(flat.split(sizes), ctx.shapes, strict=True)
        return by_rows, None, None, None, *(part.view(shape) for part, shape in parts)


class OverArch(nn.Module):
    """The multi-layer perceptron; its last layer is linear.

    Args:
        in_features: length of a row.
        layer_sizes: hidden layers.
        activation: relu, gelu, tanh or sigmoid.
        dropout: probability of dropping a hidden unit in training.
        batch_norm: normalise each hidden layer before its activation. These layers have no bias:
            subtracting the mean cancels it, and Adam would follow its gradient, pure rounding error
            that depends on the number of ranks.
        init: distribution of the weights: uniform is PyTorch's default; xavier_normal has zero
            biases.
        has_output: whether there is a linear output layer; otherwise the last hidden layer is the
            result.
    """

    def __init__(
        self,
        in_features: int,
        layer_sizes: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        init: str = "uniform",
        has_output: bool = True,
    ) -> None:
        super().__init__()
        sizes = [in_features, *layer_sizes]
        pairs = list(itertools.pairwise(sizes))
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=not batch_norm) for a, b in pairs)
        self.norms = nn.ModuleList(
            GlobalBatchNorm(b) if batch_norm else nn.Identity() for _, b in pairs
        )
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = RowDropout(dropout, sum(layer_sizes))
        self.output = nn.Linear(sizes[-1], 1) if has_output else None
        if init == "xavier_normal":
            for linear in self.layers:
                nn.init.xavier_normal_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.register_load_state_dict_pre_hook(_fold_biases)  # type: ignore[no-untyped-call]

    def forward(self, x_BI: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Scores rows.

        Args:
            x_BI: ``[B, in_features]``.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B]``; without an output ``[B, H]``.
        """
        return self.above_first(self.layers[0](x_BI), weights_B)

    @property
    def layers(self) -> list[nn.Linear]:
        """All linear layers, the output layer last."""
        linears = [*self.hidden] if self.output is None else [*self.hidden, self.output]
        return linears

    def forward_rows(self, rows_BFW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """`forward` of the leading ``in_features / F`` columns of ``[B, F, W]`` rows.

        The columns are not copied: the other columns are multiplied by weights of 0.
        """
        if self._has_kernel and kernels.can_take(rows_BFW):
            return self._by_kernel(rows_BFW)
        _, fields, width = rows_BFW.shape
        first = self.layers[0]
        weight = first.weight.view(first.out_features, fields, -1)
        padded = functional.pad(weight, (0, width - weight.shape[2]))
        x_BH = functional.linear(rows_BFW.flatten(1), padded.flatten(1), first.bias)
        return self.above_first(x_BH, weights_B)

    @property
    def _has_kernel(self) -> bool:
        return (
            self.output is not None
            and isinstance(self.activation, nn.ReLU)
            and not any(isinstance(norm, GlobalBatchNorm) for norm in self.norms)
            and max(linear.out_features for linear in self.layers) <= _KERNEL_UNITS
            and torch.get_num_threads() == 1
            and HAS_FMA
            and not torch.is_autocast_enabled("cpu")
        )

    def _by_kernel(self, rows_BFW: Tensor) -> Tensor:
        drop = self.dropout
        dropout = (float(drop.p), int(drop.key), int(drop.first)) if drop.is_on else (0.0, 0, 0)
        parameters = [p for linear in self.layers for p in (linear.weight, linear.bias)]
        output: Tensor = _MLPOnCPU.apply(rows_BFW, *dropout, *parameters)  # type: ignore[no-untyped-call]
        return output

    def above_first(
        self, x_BH: Tensor, weights_B: Tensor | None = None, numbers_B: Tensor | None = None
    ) -> Tensor:
        """Scores the output of the first linear layer like ``forward``.

        Args:
            x_BH: ``[B, H]``.
            weights_B: as in ``forward``.
            numbers_B: ``[B]`` of the rows, for dropout; see `RowDropout.forward`.
        """
        x, above, unit = x_BH, self.layers[1:], 0
        for place, norm in enumerate(self.norms):
            if isinstance(norm, GlobalBatchNorm):
                x = norm(x, weights_B)
            x = self.dropout(self.activation(x), unit, numbers_B)
            unit += x.shape[1]
            if place < len(above):
                x = above[place](x)
        return x if self.output is None else x.squeeze(1)

    @torch.no_grad()
    def start_at_0(self) -> None:
        """Initialises the output layer to 0."""
        if self.output is not None:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)


def _fold_biases(
    over_arch: nn.Module, state: dict[str, Any], prefix: str, *hook_arguments: object
) -> None:
    """Folds biases before batch norm, from earlier versions, into the running means."""
    for name, mean in biases_before_norm(state, prefix).items():
        state[mean] = state[mean] - state.pop(name)


def biases_before_norm(names: Collection[str], prefix: str = "") -> dict[str, str]:
    """Biases before batch norm in an `OverArch` of an earlier version.

    Args:
        names: the names of a state's tensors.
        prefix: the prefix of the over-arch's names.

    Returns:
        For each such bias, the running mean to fold it into.
    """
    pattern = re.compile(re.escape(prefix) + r"hidden\.(\d+)\.bias")
    matches = {name: pattern.fullmatch(name) for name in names}
    means = {name: f"{prefix}norms.{m[1]}.running_mean" for name, m in matches.items() if m}
    return {name: mean for name, mean in means.items() if mean in names}
