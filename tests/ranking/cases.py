"""Models, settings and digests for rankings."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from deepfm_dist.config import Config, load_config
from deepfm_dist.model.deepfm import InteractionArch, OverArch
from deepfm_dist.model.norm import GlobalBatchNorm
from tests.cross_net import CrossNet

VECTORS = {"text": 3, "taste": 1, "image": 2}
OF_ITEM = [False, True, True, False, True, False, True, False, True]
"""Of four categorical fields, two numeric ones and three vectors."""
N_CATEGORICAL, N_DENSE = 4, 2
COLUMNS_OF_ITEM = [True, False, True, True, True, False, True, True]
"""Of the two numbers and of each number of the vectors."""


def random_arch(
    seed: int, hidden: tuple[int, ...] | None, custom: bool, **options: object
) -> InteractionArch:
    torch.manual_seed(seed)
    dim = int(options.pop("dim", 5))  # type: ignore[call-overload]
    in_features = len(OF_ITEM) * dim
    over_arch: nn.Module | None = None
    if custom:
        over_arch = CrossNet(in_features)
    elif hidden is not None:
        over_arch = OverArch(
            in_features,
            hidden,
            activation=str(options.pop("activation", "relu")),
            dropout=0.5,
            batch_norm=bool(options.pop("batch_norm", False)),
        )
        for module in over_arch.modules():
            if isinstance(module, GlobalBatchNorm):
                for tensor in (module.weight.data, module.bias.data, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    first_order, fm = bool(options.get("first_order", True)), bool(options.get("fm", True))
    is_item_field = OF_ITEM if options.get("across") else None
    arch = InteractionArch(
        N_DENSE, dim, first_order, fm, over_arch, 0.5, is_item_field=is_item_field, vectors=VECTORS
    )
    arch.bias.data.normal_()
    return arch.eval()


def config_of(*overrides: str) -> Config:
    wide = "model={embedding_dim: 10, over_arch_layer_sizes: [30, 20, 10], init_std: 0.5}"
    return load_config("sample", [wide, *overrides])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
