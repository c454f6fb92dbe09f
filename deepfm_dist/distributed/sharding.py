"""Shards the tables with DistributedModelParallel and wraps the over-arch in DDP."""

import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    KeyedJaggedTensor,
    KeyedTensor,
)
from torchrec.distributed.embedding_types import (
    EmbeddingComputeKernel as EmbeddingComputeKernel,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs_registry,
)
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DMPCollection
from torchrec.distributed.model_parallel import (
    DistributedModelParallel as DistributedModelParallel,
)
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.sharding.tw_sharding import TwSparseFeaturesDist
from torchrec.distributed.sharding_plan import (
    ParameterShardingGenerator,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ParameterSharding,
    ShardingEnv,
    ShardingPlan,
    ShardingType,
)
from torchrec.modules.embedding_configs import DataType

from deepfm_dist.distributed import kernels
from deepfm_dist.distributed.exchange import IdExchange
from deepfm_dist.distributed.optimizers import TableOptimizer
from deepfm_dist.distributed.replicated import REPLICABLE, REPLICATED, kind_of, table_of
from deepfm_dist.distributed.settings import ShardingConfig, TablePlan
from deepfm_dist.distributed.world import World
from deepfm_dist.environment import memory_bytes
from deepfm_dist.errors import ConfigError
from deepfm_dist.messages import plural
from deepfm_dist.seeding import derive_seed

log = logging.getLogger(__name__)

ROW_WISE, TABLE_ROW_WISE = ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value
TABLE_WISE = ShardingType.TABLE_WISE.value
_WITHIN_MACHINES = ("cuda",)
"""Devices whose tables may be cut over the ranks of one machine."""
_IN_GROUPS = ("cuda",)
"""Devices for which TorchRec makes a `DMPCollection`."""
_INIT_ROWS = 4096  # rows per seed
BATCH_SIZE = 8192
RESERVED = 0.15
"""Share of a GPU's memory that plans leave free for CUDA's context, NCCL and fragmentation."""

REPLICATED_ROWS = 1.0
"""By default a table is replicated if it has at most this many rows per look-up that a rank makes
in a step: with more, its gradient is larger than the pooled rows that would be exchanged
instead.
"""
_NO_ROOM = (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS)


class DoesNotFit(ConfigError):
    """No placement of the tables fits the ranks' memory."""


@dataclass(frozen=True)
class PlacedTable:
    """One line of the plan.

    Attributes:
        table: its name.
        rows: its rows.
        row_width: floats per row.
        sharding: table_wise, row_wise, table_row_wise or replicated.
        ranks: the ranks that hold it.
        kernel: fused, fused_uvm_caching or dense.
    """

    table: str
    rows: int
    row_width: int
    sharding: str
    ranks: str
    kernel: str


class TableCollection(ShardedEmbeddingBagCollection):
    """Calls FBGEMM's kernel directly at one rank.

    TorchRec's exchanges and wrappers, which are no-ops there, would take a quarter of a small
    model's step.

    Attributes:
        single_valued: fields that never have more than one value in a row.
    """

    single_valued: Set[str] = frozenset()

    @property
    def tables(self) -> list[EmbeddingBagConfig]:
        """What was sharded."""
        return list(self._embedding_bag_configs)

    @property
    def fused_kernels(self) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
        """FBGEMM's kernels of fused tables.

        ``modules()`` does not include them: the look-ups are in a plain list.
        """
        modules = (m for lookup in self._lookups for m in lookup.modules())
        return [m for m in modules if isinstance(m, SplitTableBatchedEmbeddingBagsCodegen)]

    @property
    def replicated(self) -> frozenset[str]:
        """The replicated tables."""
        plan = self.module_sharding_plan.items()
        return frozenset(name for name, table in plan if kind_of(table) == REPLICATED)

    def _create_input_dist(self, input_feature_names: list[str]) -> None:
        super()._create_input_dist(input_feature_names)
        self.replace_exchanges()

    def replace_exchanges(self) -> None:
        """Exchanges ids as `IdExchange` does."""
        for of_sharding in self._input_dists:
            exchange = getattr(of_sharding, "_dist", None)  # replicated tables exchange nothing
            if exchange is not None:
                # A row-wise table gets a value on one rank, and none on the others.
                is_whole = isinstance(of_sharding, TwSparseFeaturesDist)
                exchange.forward = IdExchange(
                    exchange._pg,
                    exchange._splits,
                    exchange._stagger,
                    self.single_valued if is_whole else frozenset(),
                )

    def init_data_parallel(self) -> None:
        """Lets the model's DDP average the gradients of replicated tables.

        TorchRec would wrap each look-up in its own DDP, which adds an all-reduce.
        """
        for lookup in self._replicas():
            lookup.__dict__["module"] = lookup  # TorchRec unwraps it

    def _replicas(self) -> Iterator[nn.Module]:
        """Look-ups of replicated tables."""
        for sharding, lookup in zip(self._embedding_shardings, self._lookups, strict=True):
            if isinstance(sharding, DpPooledEmbeddingSharding):
                yield lookup

    @contextmanager
    def replicas_as_submodules(self) -> Iterator[None]:
        """Inside, ``modules()`` includes the look-ups of replicated tables."""
        self.replicas = nn.ModuleList(self._replicas())
        try:
            yield
        finally:
            del self.replicas

    def forward(self, features: KeyedJaggedTensor) -> Any:
        """Looks up and pools; returns a `KeyedTensor` or an awaitable of one."""
        pooled = self._pooled(features)
        if not torch.is_grad_enabled():
            unlock_cached_rows(self)
        return pooled

    def _pooled(self, features: KeyedJaggedTensor) -> Any:
        alone = self._env.world_size == 1 and len(self._lookups) == 1
        if not alone or self._has_uninitialized_input_dist:  # the first call creates the exchanges
            return super().forward(features)
        if self._has_features_permute:
            features = features.permute(self._features_order, self._features_order_tensor)
        lookup = self._lookups[0]
        if len(lookup._emb_modules) == 1:
            tables = lookup._emb_modules[0].emb_module
            pooled = kernels.look_up(tables, features.values(), features.offsets())
        else:
            pooled = lookup(features)
        return KeyedTensor(self._embedding_names, self._embedding_dims, pooled)


class _DataParallelWrapper(DefaultDataParallelWrapper):
    """One DDP with a single bucket for the over-arch and the replicated tables."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wraps everything but sharded tables."""
        with table_collection(dmp).replicas_as_submodules():
            super().wrap(dmp, env, device)
            wrapped = dmp._dmp_wrapped_module
            if isinstance(wrapped, DistributedDataParallel):
                _lay_out_buckets(wrapped)


def _lay_out_buckets(wrapped: DistributedDataParallel) -> None:
    """Makes DDP build its buckets now, with a backward pass of zero gradients. All ranks.

    Otherwise it does so after the first step. The order in which ranks are summed depends on the
    buckets, so the first step after a resume would differ from an uninterrupted run.
    """
    learned, _ = wrapped._build_params_for_reducer()
    if not learned or wrapped.find_unused_parameters:  # then buckets do not change
        return
    wrapped.reducer.prepare_for_forward()
    wrapped.reducer.prepare_for_backward([])
    torch.stack([parameter.flatten()[:1].sum() for parameter in learned]).sum().mul(0).backward()
    wrapped.reducer._rebuild_buckets()
    for parameter in learned:
        parameter.grad = None


def table_collection(model: nn.Module) -> TableCollection:
    """The tables of a sharded model."""
    [collection] = [m for m in model.modules() if isinstance(m, TableCollection)]
    return collection


def fused_kernels(model: nn.Module) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's kernels of all fused tables of a sharded model."""
    collections = (m for m in model.modules() if isinstance(m, TableCollection))
    return [kernel for collection in collections for kernel in collection.fused_kernels]


def unlock_cached_rows(model: nn.Module) -> None:
    """Unlocks the cached rows of a look-up without a backward pass.

    FBGEMM locks a batch's rows in the cache when they are fetched, and unlocks them in the backward
    pass. Without one, as in validation or after a non-finite loss, they would stay locked.
    """
    for kernel in fused_kernels(model):
        if kernel.prefetch_pipeline:
            torch.ops.fbgemm.lxu_cache_locking_counter_decrement(
                kernel.lxu_cache_locking_counter, kernel.lxu_cache_locations
            )


def set_table_steps(model: nn.Module, step: int) -> None:
    """Sets the step count of fused optimizers, for bias correction.

    FBGEMM counts look-ups instead, including validation, and starts at 0 in each process.
    """
    for kernel in fused_kernels(model):
        kernel.iter.fill_(step)
        kernel.iter_cpu.fill_(step)


class _Sharder(EmbeddingBagCollectionSharder):
    """Creates `TableCollection`; on CPU the stock sharder hides row-wise sharding."""

    single_valued: Set[str] = frozenset()

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> TableCollection:
        tables = TableCollection(
            module,
            params,
            env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
        tables.single_valued = self.single_valued
        return tables

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return list(dict.fromkeys([*types, ROW_WISE, TABLE_ROW_WISE]))


def shard(
    module: nn.Module,
    world: World,
    config: ShardingConfig,
    optimizer: TableOptimizer | None = None,
    batch_size: int = BATCH_SIZE,
    some_unused: bool = False,
    single_valued: Set[str] = frozenset(),
) -> tuple[DistributedModelParallel, list[PlacedTable]]:
    """Shards the tables over the ranks and wraps the rest in DDP. All ranks.

    Args:
        module: holds one EmbeddingBagCollection, on the meta device.
        world: the ranks.
        config: placement of tables; a table with fewer rows than ranks is not sharded by rows
            unless configured explicitly.
        optimizer: the optimizer of the tables, attached to them; None: inference only.
        batch_size: rows per step over all ranks, for the planner.
        some_unused: whether some weights may get no gradient in a step; DDP then looks for them.
        single_valued: fields that never have more than one value in a row; the lengths of those in
            table-wise tables are sent only if some row has no value.

    Returns:
        The sharded module and its plan, one line per table.

    Raises:
        ConfigError: a placement names an unknown table or rank, shards a table that is too small,
            or caches one where that is impossible.
        DoesNotFit: the tables do not fit.
    """
    path, ebc = _collection(module)
    # An id out of range must raise, not look up another row.
    sharder = _Sharder(
        fused_params={
            "bounds_check_mode": BoundsCheckMode.FATAL,
            **(optimizer.fused_params if optimizer else {}),
        },
        qcomm_codecs_registry=_codecs(config.communication, world),
    )
    sharder.single_valued = single_valued
    wrapper = _DataParallelWrapper(static_graph=False, find_unused_parameters=some_unused)
    hbm_bytes = 0
    if world.device.type == "cuda":
        hbm_bytes = torch.cuda.get_device_properties(world.device).total_memory
    replicable = optimizer is None or optimizer.replicable
    group = sharding_group(world, config, optimizer)
    n_groups = world.world_size // group.world_size
    placed = place(module, group, config, batch_size // n_groups, hbm_bytes, replicable)
    kernel = optimizer.kernel if optimizer else EmbeddingComputeKernel.DENSE
    module_plan = _module_plan(ebc, placed, kernel, sharder, group)
    sharded = _distribute(module, world, group, ShardingPlan({path: module_plan}), sharder, wrapper)
    if world.world_size == 1:
        # TorchRec moves unsharded modules in its DDP wrapper, which is not used here.
        sharded.module.to(world.device)
    return sharded, placed_tables(sharded)


def _distribute(
    module: nn.Module,
    world: World,
    group: World,
    plan: ShardingPlan,
    sharder: _Sharder,
    wrapper: _DataParallelWrapper,
) -> DistributedModelParallel:
    """Shards a module over all ranks, or over each group of ranks. All ranks."""
    options: dict[str, Any] = {
        "device": world.device,
        "plan": plan,
        "sharders": [sharder],
        # A single rank needs no DDP, which would take a fifth of a small model's step.
        "init_data_parallel": world.world_size > 1,
        "data_parallel_wrapper": wrapper,
    }
    if group is world:
        env = ShardingEnv(world.world_size, world.rank, dist.group.WORLD, output_dtensor=True)
        return DistributedModelParallel(module, env=env, **options)
    _set_machine_size(world)
    with _without_root_logger():
        return DMPCollection(
            module,
            world_size=world.world_size,
            sharding_group_size=group.world_size,
            global_pg=dist.group.WORLD,
            **options,
        )


@contextmanager
def _without_root_logger() -> Iterator[None]:
    """For `DMPCollection`, which logs its process groups as warnings of the root logger.

    The first such line would give that logger a handler, which would print all later lines again.
    """
    handlers = logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.handlers[:] = handlers


def sharding_group(
    world: World, config: ShardingConfig, optimizer: TableOptimizer | None = None
) -> World:
    """The ranks that share one copy of the tables: all of them, or this rank's group.

    Group ``g`` of ``n`` has the ranks ``g, g + n, g + 2 n, ...``, as TorchRec forms them: the
    ranks that hold the same rows are neighbors, on one machine if possible, because averaging
    tables takes more bytes than exchanging embeddings.

    Args:
        world: all ranks; may be hypothetical.
        config: names the size of a group.
        optimizer: the optimizer of the tables; None: they are only read.

    Returns:
        ``world`` itself if there is only one group.

    Raises:
        ConfigError: groups are not available on this device, of this size, or together with
            another setting.
    """
    size = config.group_size
    if size is None or size == world.world_size:
        return world
    setting = f"sharding.group_size={size}"
    if world.device.type not in _IN_GROUPS:
        raise ConfigError(
            f"{setting}: only on CUDA, not on a {world.device.type}; leave it out, and tables are "
            f"sharded over all ranks"
        )
    if world.world_size % size:
        sizes = [n for n in range(2, world.world_size + 1) if world.world_size % n == 0]
        raise ConfigError(
            f"{setting}: does not divide the {plural(world.world_size, 'rank')}; use "
            f"{' or '.join(map(str, sizes)) or 'null'}"
        )
    if world.world_size % world.local_world_size:
        raise ConfigError(
            f"{setting}: {plural(world.world_size, 'rank')} on machines of "
            f"{world.local_world_size} each; start as many on every machine, or leave it out"
        )
    _check_groups(setting, config, optimizer)
    return _group_of_size(world, size)


def group_of(sharded: DistributedModelParallel, world: World) -> World:
    """The `sharding_group` that a model was sharded over."""
    if isinstance(sharded, DMPCollection):
        return _group_of_size(world, sharded.device_mesh.size(1))
    return world


def _group_of_size(world: World, size: int) -> World:
    n_groups = world.world_size // size
    return replace(
        world,
        rank=world.rank // n_groups,
        world_size=size,
        local_world_size=max(1, world.local_world_size // n_groups),
    )


def _check_groups(setting: str, config: ShardingConfig, optimizer: TableOptimizer | None) -> None:
    """Raises a ConfigError for what cannot be averaged over groups of ranks."""
    if optimizer is not None and optimizer.name not in REPLICABLE:
        raise ConfigError(
            f"{setting}: TorchRec averages the state of Adagrad only, not of "
            f"optimizer.tables.name={optimizer.name}; use {', '.join(REPLICABLE[:-1])} or "
            f"{REPLICABLE[-1]}"
        )
    for name, kind in _kinds_by_setting(config).items():
        if kind == TABLE_ROW_WISE:
            raise ConfigError(
                f"{setting}: {name}=table_row_wise needs all ranks of a machine in one group; use "
                f"row_wise"
            )
    for name, placement in config.tables.items():
        if placement.cached is not None:
            raise ConfigError(
                f"{setting}: sharding.tables.{name}.cached={placement.cached:g}: rows in the cache "
                f"would not be averaged; use one of the two"
            )


def average_copies(sharded: nn.Module) -> None:
    """Averages tables and their optimizer's state over the groups of ranks, if any. All ranks."""
    if isinstance(sharded, DMPCollection):
        sharded.sync()


def _module_plan(
    ebc: EmbeddingBagCollection,
    placed: Mapping[str, TablePlan],
    kernel: EmbeddingComputeKernel,
    sharder: _Sharder,
    world: World,
) -> EmbeddingModuleShardingPlan:
    """A placement in TorchRec's format."""
    plan: dict[str, ParameterShardingGenerator] = {}
    for name, placement in placed.items():
        if placement.kind == REPLICATED:
            _keep_in_fp32(ebc, name)
            plan[name] = data_parallel()
        elif placement.rank is None:
            plan[name] = row_wise()
        elif placement.kind == TABLE_ROW_WISE:
            _set_machine_size(world)
            plan[name] = table_row_wise(host_index=placement.rank // world.local_world_size)
        else:
            plan[name] = table_wise(rank=placement.rank)
    module_plan = construct_module_sharding_plan(
        ebc,
        plan,
        sharder=sharder,
        local_size=world.local_world_size,
        world_size=world.world_size,
        device_type=world.device.type,
    )
    for name, placement in placed.items():
        module_plan[name].compute_kernel = _kernel_of(name, placement, kernel, world.device).value
        module_plan[name].cache_params = _cache_of(placement)
    return module_plan


def _set_machine_size(world: World) -> None:
    """TorchRec reads the size of a machine from the environment and assumes 8 otherwise."""
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world.local_world_size))


def _keep_in_fp32(ebc: EmbeddingBagCollection, table: str) -> None:
    """Gradients have their table's precision, but are summed over look-ups and ranks."""
    for config in ebc.embedding_bag_configs():
        if config.name == table:
            config.data_type = DataType.FP32
            ebc.embedding_bags[table].float()


def placed_tables(sharded: DistributedModelParallel) -> list[PlacedTable]:
    """The plan of a sharded model, one line per table."""
    [module_plan] = sharded.plan.plan.values()
    lines = []
    for config in table_collection(sharded).tables:
        table = module_plan[config.name]
        kind = kind_of(table)
        ranks = "all"
        if kind == TABLE_WISE:
            ranks = str(table.ranks[0])
        elif kind == TABLE_ROW_WISE:
            ranks = f"{table.ranks[0]}-{table.ranks[-1]}"
        size = config.num_embeddings, config.embedding_dim
        lines.append(PlacedTable(config.name, *size, kind, ranks, table.compute_kernel))
    return lines


def place(
    module: nn.Module,
    world: World,
    config: ShardingConfig,
    batch_size: int,
    hbm_bytes: int,
    replicable: bool = True,
) -> dict[str, TablePlan]:
    """Decides where to place each table. All ranks, or none: the ranks may be hypothetical.

    Args:
        module: holds one EmbeddingBagCollection, on the meta device.
        world: the ranks; may be a plan for ranks without a process group.
        config: configured placement.
        batch_size: rows per step over all ranks.
        hbm_bytes: memory of a GPU; ignored on CPU.
        replicable: whether the tables' optimizer can update copies of them.

    Returns:
        By table: row_wise, replicated, table_wise with its rank, or table_row_wise with the first
        rank of its machine. One rank replicates nothing, and one machine cuts all tables row_wise.

    Raises:
        ConfigError: a placement names an unknown table or rank, shards a table that is too small,
            or shards it within a machine where that is impossible.
        DoesNotFit: the tables do not fit.
    """
    _, ebc = _collection(module)
    tables = {config.name: config for config in ebc.embedding_bag_configs()}
    _check_placements(config, tables, world, replicable)
    wanted = {name: config.tables.get(name, TablePlan()) for name in tables}
    if config.kind == "auto" and replicable and world.world_size > 1:
        wanted = _replicated_if_small(tables, wanted, world, batch_size)
    cut_over = world.local_world_size if config.kind == TABLE_ROW_WISE else world.world_size
    wanted = {
        name: p.model_copy(
            update={"kind": config.kind if _can_be_cut(tables[name], cut_over) else "table_wise"}
        )
        if p.kind == "auto"
        else p
        for name, p in wanted.items()
    }
    if world.local_world_size == world.world_size:
        one_machine = {"kind": ROW_WISE, "rank": None}
        wanted = {
            name: p.model_copy(update=one_machine) if p.kind == TABLE_ROW_WISE else p
            for name, p in wanted.items()
        }
    if any(p.kind == "auto" for p in wanted.values()) and world.world_size > 1:
        left = {name: p for name, p in wanted.items() if p.kind != REPLICATED}
        wanted |= _plan(
            _only(ebc, left), world, left, batch_size, hbm_bytes, config.group_size is not None
        )
    return {name: _with_rank(p, turn, world) for turn, (name, p) in enumerate(wanted.items())}


def _with_rank(placement: TablePlan, turn: int, world: World) -> TablePlan:
    """A placement with its rank; unspecified ranks and machines are assigned in turn."""
    kind, size, local = placement.kind, world.world_size, world.local_world_size
    if kind == ROW_WISE or (kind == REPLICATED and size > 1):
        return placement
    if kind == TABLE_ROW_WISE:
        rank = turn * local % size if placement.rank is None else placement.rank // local * local
    else:
        kind, rank = "table_wise", turn % size if placement.rank is None else placement.rank
    return placement.model_copy(update={"kind": kind, "rank": rank})


def _check_placements(
    config: ShardingConfig,
    tables: Mapping[str, EmbeddingBagConfig],
    world: World,
    replicable: bool,
) -> None:
    """Raises a ConfigError for an impossible placement; see `place`."""
    for setting, kind in _kinds_by_setting(config).items():
        if kind == TABLE_ROW_WISE and world.device.type not in _WITHIN_MACHINES:
            raise ConfigError(
                f"{setting}=table_row_wise: only on CUDA, not on a {world.device.type}; use "
                f"row_wise, which cuts tables over the ranks of all machines"
            )
        if kind == TABLE_ROW_WISE and world.world_size % world.local_world_size:
            raise ConfigError(
                f"{setting}=table_row_wise: {plural(world.world_size, 'rank')} on machines of "
                f"{world.local_world_size} each; start as many on every machine, or use row_wise"
            )
    for name, placement in config.tables.items():
        if name not in tables:
            raise ConfigError(
                f"sharding.tables.{name}: unknown table; available: {', '.join(tables)}"
            )
        if placement.rank is not None and placement.rank >= world.world_size:
            raise ConfigError(
                f"sharding.tables.{name}.rank={placement.rank}: the last of "
                f"{plural(world.world_size, 'rank')} is {world.world_size - 1}"
            )
        cut_over = {ROW_WISE: world.world_size, TABLE_ROW_WISE: world.local_world_size}
        ranks = cut_over.get(placement.kind, 1)
        if not _can_be_cut(tables[name], ranks):
            raise ConfigError(
                f"sharding.tables.{name}.kind={placement.kind}: "
                f"{plural(tables[name].num_embeddings, 'row')} cut over "
                f"{ranks} ranks leave a rank without any; use table_wise"
            )
        if placement.kind == REPLICATED and not replicable:
            raise ConfigError(
                f"sharding.tables.{name}.kind=replicated: optimizer.tables.name=lazy_adam cannot "
                f"update copies; use table_wise, or another optimizer"
            )


def _kinds_by_setting(config: ShardingConfig) -> dict[str, str]:
    by_table = {f"sharding.tables.{name}.kind": p.kind for name, p in config.tables.items()}
    return {"sharding.kind": config.kind, **by_table}


def _replicated_if_small(
    tables: Mapping[str, EmbeddingBagConfig],
    wanted: Mapping[str, TablePlan],
    world: World,
    batch_size: int,
) -> dict[str, TablePlan]:
    """Replicates the tables left to ``auto`` that have few rows. Rank 0 logs them."""
    per_rank = -(-batch_size // world.world_size)
    placed = dict(wanted)
    for name, placement in wanted.items():
        table = tables[name]
        bound = int(REPLICATED_ROWS * per_rank * len(table.feature_names))
        if placement == TablePlan() and table.num_embeddings <= bound:
            placed[name] = TablePlan(kind="replicated")
            if dist.is_initialized() and dist.get_rank() == 0:
                log.info(
                    "table %s is replicated: %s, at most the %s that a rank looks up in a step",
                    name,
                    plural(table.num_embeddings, "row"),
                    f"{bound:,}",
                )
    return placed


def check_placements(
    config: ShardingConfig, kernel: EmbeddingComputeKernel, device: torch.device
) -> None:
    """Refuses placements that the kernel or the device does not support.

    Raises:
        ConfigError: a table cannot be cached.
    """
    for name, placement in config.tables.items():
        _kernel_of(name, placement, kernel, device)


def _kernel_of(
    table: str, placement: TablePlan, kernel: EmbeddingComputeKernel, device: torch.device
) -> EmbeddingComputeKernel:
    """The kernel of a table, given the default one.

    Replicated tables need gradients of all rows, which only the dense kernel computes.

    Raises:
        ConfigError: this kernel or device does not support caching.
    """
    if placement.kind == REPLICATED:
        return EmbeddingComputeKernel.DENSE
    if placement.cached is None:
        return kernel
    setting = f"sharding.tables.{table}.cached={placement.cached:g}"
    if device.type != "cuda":
        raise ConfigError(f"{setting}: a {device.type} has no cache for rows; leave it out")
    if kernel is not EmbeddingComputeKernel.FUSED:
        raise ConfigError(
            f"{setting}: adam moves every row at every step; use optimizer.tables.name="
            f"rowwise_adagrad or lazy_adam"
        )
    return EmbeddingComputeKernel.FUSED_UVM_CACHING


def _cache_of(placement: TablePlan) -> CacheParams | None:
    if placement.cached is None:
        return None
    return CacheParams(load_factor=placement.cached, prefetch_pipeline=True)


def _collection(module: nn.Module) -> tuple[str, EmbeddingBagCollection]:
    return next(
        (name, m) for name, m in module.named_modules() if isinstance(m, EmbeddingBagCollection)
    )


def _codecs(communication: str, world: World) -> dict[str, Any] | None:
    if communication == "fp32":
        return None
    if communication == "bf16" and world.device.type == "cpu":
        raise ConfigError("sharding.communication=bf16: gloo would send fp16; use fp16")
    kind = CommType(communication)
    # Scaled, since small gradients underflow in fp16.
    scale = 128.0 if kind == CommType.FP16 else None
    codecs: dict[str, Any] = get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=kind, backward_precision=kind, backward_loss_scale=scale),
        device=world.device,
    )
    return codecs


def _can_be_cut(table: EmbeddingBagConfig, ranks: int) -> bool:
    """Whether each rank would get a row: FBGEMM's fused kernels fail on an empty piece."""
    per_rank = -(-table.num_embeddings // ranks)
    return per_rank * (ranks - 1) < table.num_embeddings


def _only(ebc: EmbeddingBagCollection, names: Collection[str]) -> EmbeddingBagCollection:
    """A collection of selected tables of another one, sharing its weights."""
    configs = [config for config in ebc.embedding_bag_configs() if config.name in names]
    collection = EmbeddingBagCollection(configs, device=torch.device("meta"))
    for name in names:
        collection.embedding_bags[name] = ebc.embedding_bags[name]
    return collection


def _plan(
    ebc: EmbeddingBagCollection,
    world: World,
    wanted: Mapping[str, TablePlan],
    batch_size: int,
    hbm_bytes: int,
    grouped: bool,
) -> dict[str, TablePlan]:
    """Runs TorchRec's planner on the remaining tables; all ranks get the same plan."""
    topology = Topology(
        world_size=world.world_size,
        local_world_size=world.local_world_size,
        compute_device=world.device.type,
        hbm_cap=hbm_bytes,
        # The host memory of hypothetical machines is unknown; TorchRec assumes 128 GiB per rank.
        ddr_cap=memory_bytes() // world.local_world_size if dist.is_initialized() else None,
    )
    kinds = ["table_wise", ROW_WISE]
    machines, left = divmod(world.world_size, world.local_world_size)
    if world.device.type in _WITHIN_MACHINES and machines > 1 and not left and not grouped:
        kinds.append(TABLE_ROW_WISE)
    constraints = {
        name: ParameterConstraints(
            sharding_types=kinds if p.kind == "auto" else [p.kind],
            # The planner only knows fused kernels; that does not affect placement.
            compute_kernels=[
                (
                    EmbeddingComputeKernel.FUSED
                    if p.cached is None
                    else EmbeddingComputeKernel.FUSED_UVM_CACHING
                ).value
            ],
            cache_params=_cache_of(p),
        )
        for name, p in wanted.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=-(-batch_size // world.world_size),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(RESERVED),
    )
    module, sharders = nn.ModuleDict({"tables": ebc}), [_Sharder()]
    try:
        plan = (
            planner.collective_plan(module, sharders, dist.group.WORLD)
            if dist.is_initialized()
            else planner.plan(module, sharders)
        ).plan["tables"]
    except PlannerError as error:
        if error.error_type not in _NO_ROOM:
            raise
        raise DoesNotFit(
            f"the tables do not fit {world.world_size} ranks; python -m deepfm_dist.plan says what "
            f"to change"
        ) from None
    return {name: _as_planned(placement, plan[name]) for name, placement in wanted.items()}


def _as_planned(placement: TablePlan, planned: ParameterSharding) -> TablePlan:
    """A placement completed with the planner's decisions."""
    rank = planned.ranks[0] if planned.sharding_type != ROW_WISE and planned.ranks else None
    if placement.kind == "auto":
        return placement.model_copy(update={"kind": planned.sharding_type, "rank": rank})
    return placement.model_copy(update={"rank": rank if placement.rank is None else placement.rank})


@torch.no_grad()
def init_tables(
    sharded: DistributedModelParallel,
    used_width: int,
    init_std: float,
    seed: int,
    threads: int = 1,
) -> None:
    """Initialises the tables from N(0, init_std^2); values depend on seed, table and row only.

    Args:
        sharded: the sharded model.
        used_width: number of used leading columns; the padding stays 0.
        init_std: standard deviation.
        seed: the seed of all tables.
        threads: number of threads; results do not depend on it. One draws 0.3 billion numbers per
            second, and other ranks wait for at most ``run.timeout_s``.
    """

    def drawn(name: str, block: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(seed, "init", name, block))
        return torch.empty(_INIT_ROWS, used_width).normal_(0, init_std, generator=generator)

    with ThreadPoolExecutor(threads) as pool:
        for name, rows, columns, shard_tensor in local_shards(sharded):
            shard_tensor.zero_()
            width = columns.stop - columns.start
            blocks = range(rows.start // _INIT_ROWS, -(-rows.stop // _INIT_ROWS))
            at_a_time = 4 * threads  # otherwise all blocks would soon be in memory
            for at in range(0, len(blocks), at_a_time):
                some = blocks[at : at + at_a_time]
                for block, values in zip(some, pool.map(partial(drawn, name), some), strict=True):
                    begin, end = block * _INIT_ROWS, (block + 1) * _INIT_ROWS
                    low, high = max(begin, rows.start), min(end, rows.stop)
                    piece = values[
                        low - begin : high - begin, columns.start : columns.start + width
                    ]
                    target = shard_tensor[low - rows.start : high - rows.start, : piece.shape[1]]
                    target.copy_(piece)


@torch.no_grad()
def fill_tables(sharded: DistributedModelParallel, values: Mapping[str, Tensor]) -> None:
    """Copies given values into the tables.

    Args:
        sharded: the sharded model.
        values: ``[rows, columns]`` by table; columns beyond these (the padding) become 0.
    """
    for name, rows, columns, shard_tensor in local_shards(sharded):
        piece = values[name][rows, columns]
        shard_tensor.zero_()
        shard_tensor[:, : piece.shape[1]].copy_(piece)


@torch.no_grad()
def mark_rows(sharded: DistributedModelParallel) -> None:
    """Sets all table rows to NaN, so that `fill_marked_rows` finds those left unset."""
    for *_, piece in local_shards(sharded):
        piece.fill_(math.nan)


@torch.no_grad()
def fill_marked_rows(
    sharded: DistributedModelParallel, world: World, zeroed: Collection[str]
) -> None:
    """Fills rows that are still NaN with their table's row 0, that of the unknown id. All ranks.

    Args:
        sharded: the model.
        world: the ranks.
        zeroed: tables to fill with zeros instead.
    """
    pieces = local_shards(sharded)
    first_rows = {
        (table, columns.start): world.to_host(piece[0].nan_to_num())
        for table, rows, columns, piece in pieces
        if rows.start == 0 and len(piece)
    }
    unknown = {
        key: row for rows in world.all_gather_object(first_rows) for key, row in rows.items()
    }
    for table, _, columns, piece in pieces:
        row = unknown[table, columns.start].to(piece.device)
        piece[piece.isnan().any(dim=1)] = torch.zeros_like(row) if table in zeroed else row


def local_shards(
    sharded: DistributedModelParallel,
) -> list[tuple[str, slice, slice, Tensor]]:
    """This rank's pieces of the tables: (table, its rows, its columns, the piece itself)."""
    pieces = []
    for key, value in sharded.state_dict().items():
        if ".embedding_bags." not in key:
            continue
        table = table_of(key)
        if not isinstance(value, DTensor):  # replicated
            n_rows, width = value.shape
            pieces.append((table, slice(0, n_rows), slice(0, width), value))
            continue
        local: Any = value.to_local()
        # A rank without a piece of the table still has an offset.
        for piece, (row, column) in zip(local.local_shards(), local.local_offsets(), strict=False):
            pieces.append(
                (
                    table,
                    slice(row, row + piece.shape[0]),
                    slice(column, column + piece.shape[1]),
                    piece,
                )
            )
    return pieces
