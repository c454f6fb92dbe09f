"""Over-archs of several targets, and their weighted sum as one over-arch.

A model of targets t = 1..T, such as click and buy, shares its embeddings. Its logits are

    z_t = bias_t + scale_t * (first order + pairs) + over_arch_t(vectors)

with first order and pairs of one factorization machine, a learned ``scale_t`` per target, and an
over-arch per target, whose first layers may be shared (a shared bottom).

Source: Caruana, "Multitask Learning", 1997, for shared layers below those of each task; Ma et al.,
"Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", 2018, for
the shared bottom of recommenders.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepfm_dist.model.norm import GlobalBatchNorm
from deepfm_dist.model.over_arch import OverArch


class Towers(nn.Module):
    """The over-archs of several targets.

    Args:
        towers: one for each target, ``[B, in_features] -> [B]``.
    """

    def __init__(self, towers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(towers)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Scores rows: ``[B, in_features]`` -> ``[B, T]``."""
        return torch.stack([tower(x_BI) for tower in self.towers], 1)

    def weighted_sum(self, weights: Sequence[float]) -> nn.Module:
        """One over-arch ``[B, in_features] -> [B]``, in eval mode, that gives the weighted sum."""
        return _WeightedSum(self, weights).eval()


class _WeightedSum(nn.Module):
    """A weighted sum of towers of any kind."""

    weights_T: Tensor

    def __init__(self, towers: Towers, weights: Sequence[float]) -> None:
        super().__init__()
        self.towers = towers
        self.register_buffer("weights_T", torch.tensor(weights), persistent=False)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Scores rows: ``[B, in_features]`` -> ``[B]``."""
        scores: Tensor = self.towers(x_BI) @ self.weights_T.to(x_BI)
        return scores


class MLPTowers(Towers):
    """Multi-layer perceptrons of several targets, optionally with shared first layers.

    Args:
        towers: one per target, on top of the shared layers, if any.
        shared: an `OverArch` without output; None: nothing is shared.
    """

    def __init__(self, towers: Sequence[OverArch], shared: OverArch | None = None) -> None:
        super().__init__(towers)
        self.shared = shared

    @property
    def mlps(self) -> list[OverArch]:
        """The towers."""
        return [tower for tower in self.towers if isinstance(tower, OverArch)]

    def forward(self, x_BI: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """Scores rows.

        Args:
            x_BI: ``[B, in_features]``.
            weights_B: ``[B]`` row weights; those of weight 0 do not count in batch norm.

        Returns:
            ``[B, T]``.
        """
        if self.shared is not None:
            x_BI = self.shared(x_BI, weights_B)
        return torch.stack([tower(x_BI, weights_B) for tower in self.towers], 1)

    def forward_rows(self, rows_BFW: Tensor, weights_B: Tensor | None = None) -> Tensor:
        """`forward` of ``[B, F, W]`` rows, as `OverArch.forward_rows` takes them."""
        if self.shared is not None:
            x_BH = self.shared.forward_rows(rows_BFW, weights_B)
            return torch.stack([tower(x_BH, weights_B) for tower in self.towers], 1)
        return torch.stack([tower.forward_rows(rows_BFW, weights_B) for tower in self.mlps], 1)

    @torch.no_grad()
    def weighted_sum(self, weights: Sequence[float]) -> OverArch:
        """One over-arch ``[B, in_features] -> [B]``, in eval mode, that gives the weighted sum.

        The towers' first layers, which share their input, are concatenated; further layers are
        block-diagonal; the last one is the weighted sum.
        """
        shared, mlps = self.shared, self.mlps
        layers: list[tuple[Tensor, Tensor | None]] = []
        layers += [] if shared is None else [(m.weight, m.bias) for m in shared.layers]
        norms = [] if shared is None else [[norm] for norm in shared.norms]
        norms += map(list, zip(*(m.norms for m in mlps), strict=True))
        for place, linears in enumerate(zip(*(m.layers for m in mlps), strict=True)):
            parts = [linear.weight for linear in linears]
            weight = torch.block_diag(*parts) if place else torch.cat(parts)
            bias = None
            if linears[0].bias is not None:
                bias = torch.cat([linear.bias for linear in linears])
            layers.append((weight, bias))
        output, output_bias = layers[-1]
        assert output_bias is not None
        by_target = torch.tensor([weights], dtype=torch.float64, device=output.device)
        layers[-1] = (by_target @ output.double(), by_target[0] @ output_bias.double()[:, None])
        has_norm = bool(norms) and isinstance(norms[0][0], GlobalBatchNorm)
        sizes = [len(weight) for weight, _ in layers[:-1]]
        whole = OverArch(layers[0][0].shape[1], sizes, batch_norm=has_norm).to(output.device)
        whole.activation = mlps[0].activation
        for linear, (weight, bias) in zip(whole.layers, layers, strict=True):
            linear.weight.copy_(weight)
            if bias is not None:
                linear.bias.copy_(bias)
        for norm, parts_of_norm in zip(whole.norms, norms if has_norm else [], strict=has_norm):
            for name, tensor in norm.state_dict().items():
                tensor.copy_(torch.cat([part.state_dict()[name] for part in parts_of_norm]))
        return whole.eval()


def mlp_towers(
    in_features: int, layer_sizes: Sequence[int], n_targets: int, n_shared: int, **options: Any
) -> OverArch | MLPTowers:
    """The multi-layer perceptron of one target, or those of several.

    Args:
        in_features: length of a row.
        layer_sizes: hidden layers of each target, shared ones first.
        n_targets: T.
        n_shared: number of shared layers; ignored for one target.
        **options: of `OverArch`.
    """
    if n_targets == 1:
        return OverArch(in_features, layer_sizes, **options)
    below, above = layer_sizes[:n_shared], layer_sizes[n_shared:]
    shared = OverArch(in_features, below, has_output=False, **options) if below else None
    in_tower = below[-1] if below else in_features
    return MLPTowers([OverArch(in_tower, above, **options) for _ in range(n_targets)], shared)


def first_layer_names(name: str, n_targets: int, n_shared: int) -> list[str]:
    """Names of the first layers of `mlp_towers`, given the name in an `OverArch`."""
    if n_targets < 2:
        return [name]
    if n_shared:
        return [f"shared.{name}"]
    return [f"towers.{target}.{name}" for target in range(n_targets)]
