"""Chooses kernel and optimizer of the tables on a device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchrec.optim
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from deepfm_dist.distributed import kernels
from deepfm_dist.distributed.replicated import (
    REPLICABLE,
    REPLICATED,
    ReplicatedOptimizer,
    replicated_tables,
    table_of,
)
from deepfm_dist.distributed.settings import OptimizerConfig
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError


@torch.no_grad()
def bound_gradients(
    config: OptimizerConfig,
    tables: Sequence[Tensor],
    replicated: Sequence[Tensor],
    dense: Sequence[Tensor],
    world: World,
) -> None:
    """Clips gradients between backward and update, as configured. All ranks.

    Args:
        config: the bounds; L2 is added here if the clipped gradient includes it.
        tables: this rank's pieces of tables with the dense kernel.
        replicated: replicated tables, with averaged gradients.
        dense: the other replicated parameters, with averaged gradients.
        world: the ranks.
    """
    all_tables, shared = [*tables, *replicated], [*replicated, *dense]
    if config.max_norm is not None:
        for parameters, l2 in ((all_tables, config.tables.l2), (dense, config.dense.l2)):
            for parameter in parameters:
                if l2 and parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=l2)
        # Each rank has part of the tables and all other parameters.
        squared = world.sum(_squared_norm(tables, world)) + _squared_norm(shared, world)
        # Like torch.nn.utils.clip_grad_norm_.
        scale = (config.max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
        for parameter in (*tables, *shared):
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    if config.dense.max_norm is not None:
        torch.nn.utils.clip_grad_norm_(dense, config.dense.max_norm)
    if (bound := config.tables.max_gradient) is not None:
        for parameter in all_tables:  # torch's function fails on a rank without tables
            if parameter.grad is not None:
                parameter.grad.clamp_(-bound, bound)


def _squared_norm(parameters: Sequence[Tensor], world: World) -> Tensor:
    """``[]`` float64: sum of the squares of all elements of the gradients."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for parameter in parameters:
        if parameter.grad is not None:
            total += torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()
    return total


@dataclass(frozen=True)
class TableOptimizer:
    """How embedding tables are updated.

    Attributes:
        name: its name in the configuration.
        kernel: fused: updated in backward; dense: by a torch optimizer afterwards.
        kind: the optimizer's class.
        arguments: its arguments.
        fused_params: further arguments of FBGEMM's kernel.
        reason: reason for the choice of kernel.
        device: the device of the tables.
        half: whether tables are in float16.
    """

    name: str
    kernel: EmbeddingComputeKernel
    kind: type[torch.optim.Optimizer]
    reason: str
    arguments: dict[str, Any]
    fused_params: dict[str, Any]
    device: torch.device
    half: bool = False

    @property
    def replicable(self) -> bool:
        """Whether it supports replicated tables."""
        return self.kernel is EmbeddingComputeKernel.DENSE or self.name in REPLICABLE

    def for_replicas(self, parameters: Mapping[str, nn.Parameter]) -> KeyedOptimizerWrapper:
        """The optimizer of replicated tables, by their full names."""
        if self.kernel is EmbeddingComputeKernel.DENSE:
            return KeyedOptimizerWrapper(parameters, lambda p: self.kind(p, **self.arguments))
        tables = {table_of(name): parameter for name, parameter in parameters.items()}
        lr, eps = self.arguments["lr"], self.arguments.get("eps", 0.0)
        l2 = self.arguments.get("weight_decay", 0.0)
        return KeyedOptimizerWrapper(
            parameters, lambda _: ReplicatedOptimizer(tables, self.name, lr, eps, l2, self.half)
        )

    def attach(self, parameters: Iterable[nn.Parameter]) -> None:
        """Marks tables for updates in backward; call it before sharding."""
        if self.kernel is EmbeddingComputeKernel.FUSED:
            if self.kind is torchrec.optim.RowWiseAdagrad and self.device.type == "cpu":
                kernels.register()
            # A copy, since torch removes the learning rate from it.
            _apply_optimizer_in_backward(self.kind, parameters, dict(self.arguments))


def table_optimizer(config: OptimizerConfig, device: torch.device) -> TableOptimizer:
    """Chooses the kernel.

    Args:
        config: the optimizers' settings. With ``max_norm``, `bound_gradients` adds L2.
        device: the device of the tables.

    Raises:
        ConfigError: the device does not support it.
    """
    name, lr, max_gradient = config.tables.name, config.tables.lr, config.tables.max_gradient
    l2 = config.tables.l2 if config.max_norm is None else 0.0
    fused, dense = EmbeddingComputeKernel.FUSED, EmbeddingComputeKernel.DENSE
    adaptive = {"lr": lr, "eps": config.tables.eps}
    if name == "adam":
        return TableOptimizer(
            name,
            dense,
            torch.optim.Adam,
            "every row moves at every step, which no fused kernel does",
            adaptive | {"weight_decay": l2, "fused": True},
            fused_params={},
            device=device,
        )
    if name == "lazy_adam" and device.type != "cuda":
        raise ConfigError(
            f"optimizer.tables.name=lazy_adam: FBGEMM has no lazy_adam kernel on {device.type}; "
            f"use adam (every row moves) or rowwise_adagrad, or run on CUDA"
        )
    if l2 and name == "lazy_adam":
        raise ConfigError(
            f"optimizer.tables.l2={l2:g}: FBGEMM's lazy_adam would shrink rows by lr * l2 instead "
            f"of adding to their gradients; use adam or rowwise_adagrad"
        )
    if l2 and not (name == "rowwise_adagrad" and device.type == "cuda"):
        raise ConfigError(
            f"optimizer.tables.l2={l2:g}: FBGEMM's {name} on {device.type} ignores it; use adam, "
            f"or rowwise_adagrad on CUDA"
        )
    if max_gradient is not None:
        raise ConfigError(
            f"optimizer.tables.max_gradient={max_gradient:g}: FBGEMM's {name} bounds the gradient "
            f"of each look-up instead of their sum; use adam"
        )
    fused_params: dict[str, Any] = {}
    if l2:  # the default mode ignores it
        fused_params["weight_decay_mode"] = WeightDecayMode.L2
    return TableOptimizer(
        name,
        fused,
        _FUSED[name],
        "updated in backward",
        {"lr": lr} if name == "sgd" else adaptive | ({"weight_decay": l2} if l2 else {}),
        fused_params=fused_params,
        device=device,
    )


_FUSED: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "lazy_adam": torch.optim.Adam,
}
_DENSE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adagrad": partial(torch.optim.Adagrad, fused=True),
    "sgd": partial(torch.optim.SGD, fused=True),
}


def combined_optimizer(
    sharded: DistributedModelParallel,
    tables: TableOptimizer,
    config: OptimizerConfig,
) -> CombinedOptimizer:
    """One optimizer over the fused tables, the dense tables and everything else.

    Args:
        sharded: the model after sharding.
        tables: how the tables are updated.
        config: the optimizers' settings. With ``max_norm`` L2 is left to `bound_gradients`.
    """
    copies = replicated_tables(sharded)
    left = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    others = {k: p for k, p in left.items() if ".ebc." not in k}
    replicated = {k: p for k, p in left.items() if ".ebc." in k and table_of(k) in copies}
    in_tables = {k: p for k, p in left.items() if k not in others and k not in replicated}
    parts = [("fused", sharded.fused_optimizer)]
    if replicated:
        part = "tables" if tables.kernel is EmbeddingComputeKernel.DENSE else "fused"
        parts.append((f"{REPLICATED}_{part}", tables.for_replicas(replicated)))
    if in_tables:
        parts.append(
            (
                "tables",
                KeyedOptimizerWrapper(in_tables, lambda p: tables.kind(p, **tables.arguments)),
            )
        )
    l2 = config.dense.l2 if config.max_norm is None else 0.0
    dense = partial(_DENSE[config.dense.name], lr=config.dense.lr, weight_decay=l2)
    parts.append(("dense", KeyedOptimizerWrapper(others, dense)))
    return CombinedOptimizer(parts)


def torch_optimizers(optimizer: CombinedOptimizer) -> list[torch.optim.Optimizer]:
    """The parts of a `combined_optimizer` that update after backward: all but fused tables."""
    return [keyed._optimizer for name, keyed in optimizer.optimizers if name != "fused"]


def parameters_of(optimizer: CombinedOptimizer, part: str) -> list[Tensor]:
    """The parameters of a part of a `combined_optimizer`.

    Args:
        optimizer: the combined one.
        part: ``tables`` (this rank's pieces under the dense kernel), ``replicated_tables`` (the
            tables that every rank has, under adam) or ``dense`` (everything but the tables).
    """
    return [
        parameter
        for name, keyed in optimizer.optimizers
        if name == part
        for parameter in keyed.params.values()
    ]


def skip_updates_if(flag: Tensor, optimizer: CombinedOptimizer) -> None:
    """Skips the update of everything but fused tables, if a flag is set.

    Like `torch.amp.GradScaler`: torch's fused kernels read the flag on the device.

    Args:
        flag: ``[]`` float32 on their device; 1 to skip the step, else 0.
        optimizer: a `combined_optimizer`.
    """
    for each in torch_optimizers(optimizer):
        each.found_inf, each.grad_scale = flag, None  # type: ignore[attr-defined]


def can_skip_on_device(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether zero gradients leave a fused table and its optimizer state unchanged.

    With Adam, moments would decay; with weight decay, rows would shrink.
    """
    return kernel.optimizer in _STILL_AT_ZERO and not kernel.optimizer_args.weight_decay


_STILL_AT_ZERO = (OptimType.EXACT_ROWWISE_ADAGRAD, OptimType.EXACT_ADAGRAD, OptimType.EXACT_SGD)


def set_learning_rates(optimizer: CombinedOptimizer, tables: float, dense: float) -> None:
    """Sets the learning rates of the next step if they changed."""
    for name, keyed in optimizer.optimizers:
        rate = dense if name == "dense" else tables
        if any(group["lr"] != rate for group in keyed.param_groups):
            for group in keyed.param_groups:
                group["lr"] = rate
            if name == "fused":
                keyed.zero_grad()  # which passes the rate to FBGEMM's kernels
