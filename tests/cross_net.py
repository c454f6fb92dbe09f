"""An over-arch of one's own: a cross network (Wang et al., "Deep & Cross Network", 2017)."""

import torch
from torch import Tensor, nn


class CrossNet(nn.Module):
    """x_{l+1} = x_0 * (w_l . x_l) + b_l + x_l, then a linear output."""

    def __init__(self, in_features: int, layers: int = 2) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(layers, in_features) / in_features)
        self.biases = nn.Parameter(torch.zeros(layers, in_features))
        self.output = nn.Linear(in_features, 1)

    def forward(self, x_BI: Tensor) -> Tensor:
        x = x_BI
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x_BI * (x @ weight)[:, None] + bias + x
        return self.output(x).squeeze(1)
