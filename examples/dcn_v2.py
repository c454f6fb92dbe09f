"""DCN-V2 as the over-arch: an example of ``model.over_arch``.

    model:
      over_arch: examples.dcn_v2:DCNv2
      over_arch_options: {cross_layers: 3, dropout: 0.2, batch_norm: true}

An over-arch is any module ``[B, in_features] -> [B]``. It is called with ``in_features``, the
columns of all fields' vectors and of the numeric fields, and with ``over_arch_options``. The
first-order and the FM part stay, unless ``model.first_order`` and ``model.fm`` are false.

Dropout and batch norm come from the package: torch's own would make results depend on the number of
ranks.

Source: Wang et al., "DCN V2: Improved Deep & Cross Network", 2021; cross layers and MLP in
parallel, initialised as in FuxiCTR.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deepfm_dist.model.dropout import RowDropout
from deepfm_dist.model.norm import GlobalBatchNorm


class DCNv2(nn.Module):
    """Cross layers next to an MLP; a linear output of both.

    Args:
        in_features: columns of the input.
        cross_layers: number of cross layers, ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l``.
        layer_sizes: hidden layers of the MLP.
        dropout: after each hidden layer of the MLP.
        batch_norm: after each hidden linear layer of the MLP, over the global batch.
    """

    def __init__(
        self,
        in_features: int,
        cross_layers: int = 3,
        layer_sizes: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(in_features, in_features) for _ in range(cross_layers))
        layers: list[nn.Module] = []
        width = in_features
        for size in layer_sizes:
            layers.append(nn.Linear(width, size, bias=not batch_norm))
            layers += [GlobalBatchNorm(size)] if batch_norm else []
            layers += [nn.ReLU(), RowDropout(dropout, size)]
            width = size
        self.mlp = nn.Sequential(*layers)
        self.output = nn.Linear(in_features + width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x_BI: Tensor) -> Tensor:
        """``[B, in_features]`` -> ``[B]`` logits."""
        x = x_BI
        for layer in self.cross:
            x = x_BI * layer(x) + x
        return self.output(torch.cat([x, self.mlp(x_BI)], dim=1)).squeeze(1)
