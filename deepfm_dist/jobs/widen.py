"""Combines models as columns of a wider one, whose logit is the sum of theirs."""

from collections.abc import Callable, Mapping

from torch import Tensor
from torchrec.optim.keyed import CombinedOptimizer

from deepfm_dist.build import deepfm_of, shard_for_training
from deepfm_dist.config import Config
from deepfm_dist.data.manifest import Manifest
from deepfm_dist.distributed.settings import ShardingConfig
from deepfm_dist.distributed.sharding import DistributedModelParallel, local_shards
from deepfm_dist.distributed.world import World
from deepfm_dist.interop.combine import add_dense, add_over_arch, add_tables, put_columns
from deepfm_dist.model.over_arch import OverArch


def shard_to_widen(
    config: Config, manifest: Manifest, world: World
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """A model whose tables are placed independently of their width. All ranks.

    A run makes several of them, so their plans are not logged.
    """
    config = config.model_copy(update={"sharding": ShardingConfig(kind="table_wise")})
    return shard_for_training(config, manifest, world, is_logged=False)


def empty_model(
    config: Config, manifest: Manifest, world: World
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """`shard_to_widen` with all weights 0. All ranks."""
    target, optimizer = shard_to_widen(config, manifest, world)
    for *_, rows in local_shards(target):
        rows.zero_()
    for parameter in deepfm_of(target).interaction_arch.parameters():
        parameter.data.zero_()
    return target, optimizer


def add_model(
    model: DistributedModelParallel, target: DistributedModelParallel, column: int, share: float
) -> int:
    """Adds a share of a model's logits, its factors from a column on. All ranks.

    Returns:
        The first column after them.
    """
    part, whole = (deepfm_of(each).interaction_arch for each in (model, target))
    dim, width = part.embedding_dim, whole.embedding_dim
    add_tables(model, target, (dim, width), column, share)
    add_dense(part, whole, column, share)
    if isinstance(part.over_arch, OverArch) and isinstance(whole.over_arch, OverArch):
        add_over_arch(part.over_arch, whole.over_arch, (dim, width), column, share)
    return column + dim


def put_ease(
    target: DistributedModelParallel,
    world: World,
    column: int,
    fit: Callable[[], Mapping[str, Tensor]],
) -> None:
    """Writes EASE's factors, which rank 0 fits, from a column on. All ranks."""
    values = world.broadcast(world.run_on_rank0("ease", fit))
    assert values is not None
    put_columns(target, column, values)
