"""Replicated tables and their optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ParameterSharding, ShardingType

REPLICATED = "replicated"
"""Kind of a replicated table; data parallel in TorchRec."""
REPLICABLE = ("rowwise_adagrad", "adagrad", "sgd")
"""Fused optimizers that `ReplicatedOptimizer` implements; adam is torch's on every table."""


def kind_of(table: ParameterSharding) -> str:
    """The kind of a placed table in terms of the configuration."""
    kind: str = table.sharding_type
    return REPLICATED if kind == ShardingType.DATA_PARALLEL.value else kind


def replicated_tables(sharded: DistributedModelParallel) -> set[str]:
    """Names of the replicated tables."""
    [plan] = sharded.plan.plan.values()
    return {name for name, table in plan.items() if kind_of(table) == REPLICATED}


def table_of(parameter: str) -> str:
    """The table that a parameter's full name belongs to."""
    return parameter.split(".embedding_bags.")[1].removesuffix(".weight")


class ReplicatedOptimizer(torch.optim.Optimizer):
    """FBGEMM's fused optimizers, computed from gradients of whole tables.

    Gradients are averaged over the ranks first, so that every copy takes the same step. Rows that
    no rank looked up have no gradient and do not change.

    - ``rowwise_adagrad``: ``h += mean(g^2)`` of a row, ``w -= lr / (sqrt(h) + eps) * g``
    - ``adagrad``: the same with one ``h`` per weight
    - ``sgd``: ``w -= lr * g``

    The state has FBGEMM's names, so that checkpoints do not depend on the placement of tables.

    Args:
        tables: weights ``[rows, width]`` by name of the table.
        name: rowwise_adagrad, adagrad or sgd.
        lr: learning rate.
        eps: added to the root.
        l2: adds ``l2 * row`` to the gradient of a row that was looked up.
        half: whether weights are rounded to float16 after each step.

    Source: `deepfm_dist.distributed.kernels.rowwise_adagrad`. ``torchrec.optim.RowWiseAdagrad``
    has a different state, and adds the L2 term to every row.
    """

    def __init__(
        self,
        tables: Mapping[str, nn.Parameter],
        name: str,
        lr: float,
        eps: float = 1e-8,
        l2: float = 0.0,
        half: bool = False,
    ) -> None:
        super().__init__(list(tables.values()), {"lr": lr})
        self._name, self._eps, self._l2, self._half = name, eps, l2, half
        self._tables = {f"{table}.momentum1": weight for table, weight in tables.items()}
        for key, weight in self._tables.items():
            if name != "sgd":
                shape = weight.shape[:1] if name == "rowwise_adagrad" else weight.shape
                self.state[weight] = {key: torch.zeros(shape, device=weight.device)}

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Updates all tables."""
        lr = self.param_groups[0]["lr"]
        for key, parameter in self._tables.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            weight = parameter.as_subclass(Tensor)
            if self._l2:
                gradient = gradient + self._l2 * weight * gradient.any(1, keepdim=True)
            if self._name == "sgd":
                weight.sub_(gradient, alpha=lr)
            else:
                h = self.state[parameter][key]
                h += gradient.square().mean(1) if h.dim() == 1 else gradient.square()
                root = h.sqrt().add_(self._eps)
                weight.addcdiv_(gradient, root[:, None] if h.dim() == 1 else root, value=-lr)
            if self._half:
                weight.copy_(weight.half())
