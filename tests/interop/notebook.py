"""The notebook's model."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class NotebookDeepFM(nn.Module):
    """The model of the notebooks: one offset table for all fields; gives probabilities."""

    def __init__(self, sizes: Sequence[int], dim: int, mlp_dims: Sequence[int]) -> None:
        super().__init__()
        self.offsets = [0, *np.cumsum(sizes)[:-1].tolist()]
        self.bias = nn.Parameter(torch.randn(1))
        self.fc = nn.Embedding(sum(sizes), 1)
        self.embedding = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        layers: list[nn.Module] = []
        for a, b in zip([len(sizes) * dim, *mlp_dims], mlp_dims, strict=False):
            layers += [nn.Linear(a, b), nn.ReLU(True), nn.Dropout(0.1)]
        self.mlp_layers = nn.Sequential(*layers, nn.Linear(mlp_dims[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tensor(self.offsets)
        embed_x = self.embedding(x)
        fm_y = self.bias + torch.sum(self.fc(x), dim=1)
        square_of_sum = torch.sum(embed_x, dim=1) ** 2
        sum_of_square = torch.sum(embed_x**2, dim=1)
        fm_y = fm_y + 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        mlp_y = self.mlp_layers(embed_x.view(len(x), -1))
        return torch.sigmoid(fm_y + mlp_y).squeeze(1)
