"""Which kernel and optimizer each table gets on this device, and why."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchrec.optim
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from deepfm_dist.errors import ConfigError


@dataclass(frozen=True)
class TableOptimizer:
    """How embedding tables are updated.

    Attributes:
        name: as the configuration calls it.
        kernel: fused: updated in backward; dense: by a torch optimizer after it.
        kind: the optimizer's class.
        arguments: its arguments.
        reason: why this kernel.
    """

    name: str
    kernel: EmbeddingComputeKernel
    kind: type[torch.optim.Optimizer]
    arguments: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Marks tables for updates in backward; to be called before they are sharded."""
        if self.kernel is EmbeddingComputeKernel.FUSED:
            _apply_optimizer_in_backward(self.kind, parameters, self.arguments)


def table_optimizer(name: str, lr: float, eps: float, device: torch.device) -> TableOptimizer:
    """Chooses the kernel.

    Args:
        name: rowwise_adagrad, adagrad, sgd, adam or lazy_adam.
        lr: learning rate.
        eps: added to the root in the denominator.
        device: where the tables are.

    Raises:
        ConfigError: the device cannot do it.
    """
    fused, dense = EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.DENSE
    in_backward = "updated in backward"
    adaptive = {"lr": lr, "eps": eps}
    match name:
        case "rowwise_adagrad":
            return TableOptimizer(name, fused, torchrec.optim.RowWiseAdagrad, adaptive, in_backward)
        case "adagrad":
            return TableOptimizer(name, fused, torch.optim.Adagrad, adaptive, in_backward)
        case "sgd":
            return TableOptimizer(name, fused, torch.optim.SGD, {"lr": lr}, in_backward)
        case "adam":
            reason = "every row moves at every step, which no fused kernel does"
            return TableOptimizer(name, dense, torch.optim.Adam, adaptive | {"fused": True}, reason)
        case "lazy_adam" if device.type == "cuda":
            return TableOptimizer(name, fused, torch.optim.Adam, adaptive, in_backward)
        case "lazy_adam":
            raise ConfigError(
                f"optimizer.tables.name=lazy_adam: FBGEMM has no such kernel on {device.type}; "
                f"use adam (every row moves) or rowwise_adagrad, or run on CUDA"
            )
    raise ConfigError(f"optimizer.tables.name={name}: unknown")


_DENSE = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}


def combined_optimizer(
    sharded: DistributedModelParallel, tables: TableOptimizer, dense_name: str, dense_lr: float
) -> CombinedOptimizer:
    """One optimizer over the fused tables, the dense tables and everything else.

    Args:
        sharded: the model after sharding.
        tables: how the tables are updated.
        dense_name: adam, adagrad or sgd.
        dense_lr: learning rate of everything but the tables.
    """
    left = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    in_tables = {k: p for k, p in left.items() if ".ebc." in k}
    others = {k: p for k, p in left.items() if k not in in_tables}
    parts = [("fused", sharded.fused_optimizer)]
    if in_tables:
        parts.append(
            (
                "tables",
                KeyedOptimizerWrapper(in_tables, lambda p: tables.kind(p, **tables.arguments)),
            )
        )
    parts.append(
        ("dense", KeyedOptimizerWrapper(others, lambda p: _DENSE[dense_name](p, lr=dense_lr)))
    )
    return CombinedOptimizer(parts)
