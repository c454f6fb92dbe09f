"""Estimates memory and traffic of a sharding plan on hypothetical ranks."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner.constants import CROSS_NODE_BANDWIDTH, INTRA_NODE_BANDWIDTH

from deepfm_dist.distributed.optimizers import TableOptimizer, table_optimizer
from deepfm_dist.distributed.replicated import REPLICATED, kind_of
from deepfm_dist.distributed.settings import OptimizerConfig, ShardingConfig, TablePlan
from deepfm_dist.distributed.sharding import (
    RESERVED,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    DoesNotFit,
    group_of,
    place,
    sharding_group,
    table_collection,
)
from deepfm_dist.distributed.world import World
from deepfm_dist.model.deepfm import ROW_ALIGNMENT
from deepfm_dist.model.losses import DeepFMTrain

FLOAT_BYTES = ID_BYTES = 4
IN_FLIGHT = 3
"""Batches whose ids and numbers a rank holds at once: in training, being exchanged and copied."""
MOST_RANKS = 8192
"""Maximum number of GPUs to propose."""
DENSE_COPIES = 5
"""Floats per parameter of the over-arch: value, gradient, DDP's bucket, Adam's two moments."""


def hypothetical_world(world_size: int, local_world_size: int) -> World:
    """A world of GPUs to plan for; needs neither a process group nor GPUs."""
    return World(0, world_size, local_world_size, 0, torch.device("cuda"), dist.HashStore())


@dataclass(frozen=True)
class Job:
    """What to train, and on which ranks.

    Attributes:
        task: the model, its tables on the meta device.
        world: the ranks, from `hypothetical_world`.
        optimizer: the optimizer of the tables.
        sharding: configured placement.
        batch_size: rows per step over all ranks.
        hbm_bytes: memory of a GPU.
        single_valued: fields with one value in every row.
    """

    task: DeepFMTrain
    world: World
    optimizer: TableOptimizer
    sharding: ShardingConfig
    batch_size: int
    hbm_bytes: int
    single_valued: Set[str] = frozenset()


@dataclass(frozen=True)
class TableDemand:
    """One table in a plan.

    Attributes:
        table: its name.
        rows: its rows.
        weight_bytes: size of all its rows.
        state_bytes: size of the optimizer's state and, for dense kernels, the gradient.
        sharding: table_wise, row_wise, table_row_wise or replicated.
        ranks: the ranks that hold it, counted within their group.
        cached: share of its rows that GPUs keep; None: all of them.
        traffic_bytes: that cross the network in a step, over all ranks: ids, pooled rows and their
            gradients; of a replicated table its gradient; of a table of which each group of ranks
            has a copy, also the traffic of averaging.
    """

    table: str
    rows: int
    weight_bytes: int
    state_bytes: int
    sharding: str
    ranks: range
    cached: float | None
    traffic_bytes: int


@dataclass(frozen=True)
class RankDemand:
    """One rank in a plan.

    Attributes:
        table_bytes: weights and optimizer state of its pieces of tables, as far as a GPU has them.
        buffer_bytes: ids, numbers and vectors of batches, pooled rows and their gradients.
        dense_bytes: the over-arch with its gradients, state and activations.
        sent_bytes: bytes sent in a step, including the over-arch's all-reduce.
        local_bytes: the part that stays within the machine.
    """

    table_bytes: int
    buffer_bytes: int
    dense_bytes: int
    sent_bytes: int
    local_bytes: float

    def __add__(self, other: "RankDemand") -> "RankDemand":
        return RankDemand(
            self.table_bytes + other.table_bytes,
            self.buffer_bytes + other.buffer_bytes,
            self.dense_bytes + other.dense_bytes,
            self.sent_bytes + other.sent_bytes,
            self.local_bytes + other.local_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """Memory."""
        return self.table_bytes + self.buffer_bytes + self.dense_bytes


@dataclass(frozen=True)
class Plan:
    """A plan and its demands.

    Attributes:
        job: what was planned.
        tables: a line per table.
        ranks: a line per rank.
        remedies: single changes that would make it fit; empty if it fits.
    """

    job: Job
    tables: Sequence[TableDemand]
    ranks: Sequence[RankDemand]
    remedies: Sequence[str] = ()

    @property
    def fullest(self) -> RankDemand:
        """The rank that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def share(self) -> float:
        """Share of a GPU's usable memory that the fullest rank needs."""
        return self.fullest.total_bytes / self.job.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether every rank fits, with the reserve left free."""
        return self.share <= 1 - RESERVED

    @property
    def seconds_sending(self) -> float:
        """Time of the slowest rank, with TorchRec's bandwidths of NVLink and InfiniBand."""
        return (
            max(
                (rank.sent_bytes - rank.local_bytes) / CROSS_NODE_BANDWIDTH
                + rank.local_bytes / INTRA_NODE_BANDWIDTH
                for rank in self.ranks
            )
            / 1000
        )


def plan(job: Job) -> Plan:
    """Places the tables with TorchRec's planner, and sums their demands.

    If it finds no plan, every table is sharded by rows, which is the most even.

    Raises:
        ConfigError: a placement is impossible.
    """
    plan = _plan_if_possible(job) or _plan_if_possible(_row_wise(job))
    assert plan is not None  # nothing is left to the planner
    return plan if plan.fits else replace(plan, remedies=tuple(_remedies(job)))


def _plan_if_possible(job: Job) -> Plan | None:
    """The job's plan; None if the planner finds none."""
    try:
        return _estimate(job, _place(job))
    except DoesNotFit:
        return None


def _row_wise(job: Job) -> Job:
    return replace(job, sharding=job.sharding.model_copy(update={"kind": ROW_WISE}))


def _place(job: Job) -> dict[str, TablePlan]:
    group = _group(job)
    return place(
        job.task,
        group.world,
        job.sharding,
        group.batch_size,
        job.hbm_bytes,
        job.optimizer.replicable,
    )


def _group(job: Job) -> Job:
    """The part of a job that one group of ranks does, where each has a copy of the tables."""
    world = sharding_group(job.world, job.sharding, job.optimizer)
    n_groups = job.world.world_size // world.world_size
    return replace(job, world=world, batch_size=-(-job.batch_size // n_groups))


def _estimate(job: Job, placed: Mapping[str, TablePlan], row_width: int | None = None) -> Plan:
    """The demands of a placement, optionally with another row width."""
    arch = job.task.model.embedding_arch
    width = row_width or arch.row_width
    ranks = job.world.world_size
    dense = sum(p.numel() for p in job.task.model.interaction_arch.parameters())
    activations = sum(
        m.in_features + m.out_features for m in job.task.modules() if isinstance(m, nn.Linear)
    )
    local_batch = -(-job.batch_size // ranks)
    dense_bytes = FLOAT_BYTES * (DENSE_COPIES * dense + 2 * local_batch * activations)
    reduced = _all_reduced(FLOAT_BYTES * dense, ranks)
    above = job.task.model.interaction_arch
    numbers = local_batch * (above.n_dense + sum(above.vectors.values()))
    number_bytes = IN_FLIGHT * FLOAT_BYTES * numbers
    stays = reduced * _local_share(job.world)
    demands = [RankDemand(0, number_bytes, dense_bytes, reduced, stays)] * ranks
    tables = []
    for config in arch.ebc.embedding_bag_configs():
        weight_bytes = width * arch.ebc.embedding_bags[config.name].weight.itemsize
        placement = placed[config.name]
        table, rank_demands = _table_demand(
            job if placement.kind == REPLICATED else _group(job),
            config,
            placement,
            width,
            weight_bytes,
        )
        if placement.kind != REPLICATED:
            table, rank_demands = _copied(job, table, rank_demands)
        tables.append(table)
        demands = [demand + added for demand, added in zip(demands, rank_demands, strict=True)]
    return Plan(job, tables, demands)


def _table_demand(
    job: Job, config: EmbeddingBagConfig, placement: TablePlan, width: int, weight_bytes: int
) -> tuple[TableDemand, list[RankDemand]]:
    """A table's demand, in total and per rank.

    Args:
        job: the plan's inputs.
        config: the table.
        placement: the placement of the table.
        width: numbers per row.
        weight_bytes: size of a row, unless the table is replicated.
    """
    ranks, batch = job.world.world_size, job.batch_size
    fields, rows = len(config.feature_names), config.num_embeddings
    state_bytes = FLOAT_BYTES * _state_floats(job.optimizer, width)
    is_replicated = placement.kind == REPLICATED
    if is_replicated:  # in fp32, with a gradient of every row
        weight_bytes = FLOAT_BYTES * width
        if job.optimizer.kernel is not EmbeddingComputeKernel.DENSE:
            state_bytes += FLOAT_BYTES * width
    row_bytes = _gpu_bytes(weight_bytes, state_bytes, placement.cached)
    pooled = batch * fields * width
    # Ids and lengths, one number each if a row has one value of the field.
    id_bytes = batch * fields * ID_BYTES
    length_bytes = batch * _n_lengths(config, placement.kind, job.single_valued) * ID_BYTES
    holders = _holders(placement.kind, placement.rank, job.world)
    per_rank = rows if is_replicated else -(-rows // len(holders))
    exchanged = 2 * pooled * FLOAT_BYTES + IN_FLIGHT * 2 * id_bytes
    # Received pooled rows, their gradient, and ids of the local batch.
    held, buffers = [0] * ranks, [exchanged // ranks] * ranks
    for turn, rank in enumerate(holders):
        mine = rows if is_replicated else max(0, min(per_rank, rows - turn * per_rank))
        held[rank] = round(mine * row_bytes)
        if not is_replicated:  # the same of the global batch
            buffers[rank] += 2 * pooled * FLOAT_BYTES + IN_FLIGHT * 2 * id_bytes // len(holders)
    sent, local = [], []
    for rank in range(ranks):
        mine = _all_reduced(FLOAT_BYTES * rows * width, ranks)
        if not is_replicated:
            pooled_bytes = pooled * job.sharding.float_bytes
            sent_by_kind = _sent(holders, rank, ranks, pooled_bytes, id_bytes, length_bytes)
            mine = sum(sent_by_kind)
        stays = mine * _local_share(job.world)
        if placement.kind == TABLE_ROW_WISE:
            # Gradients alone are gathered within the machine; as many bytes of rows are before.
            stays = sent_by_kind[0] + 2 * sent_by_kind[2] if rank in holders else 0
        sent.append(mine)
        local.append(stays)
    table = TableDemand(
        table=config.name,
        rows=rows,
        weight_bytes=rows * weight_bytes,
        state_bytes=rows * state_bytes,
        sharding=placement.kind,
        ranks=holders,
        cached=placement.cached,
        traffic_bytes=sum(sent),
    )
    columns = zip(held, buffers, sent, local, strict=True)
    return table, [RankDemand(h, b, 0, s, stays) for h, b, s, stays in columns]


def _copied(
    job: Job, table: TableDemand, demands: Sequence[RankDemand]
) -> tuple[TableDemand, list[RankDemand]]:
    """What a table needs of which each group of ranks has a copy, given the needs of one group."""
    n_groups = job.world.world_size // len(demands)
    if n_groups == 1:
        return table, list(demands)
    local = min(n_groups, job.world.local_world_size)  # neighbors hold the same rows
    replicas = hypothetical_world(n_groups, local)
    copied = []
    for demand in demands:
        averaged = _all_reduced(demand.table_bytes, n_groups)
        stays = averaged * _local_share(replicas)
        copied += [demand + RankDemand(0, 0, 0, averaged, stays)] * n_groups
    traffic_bytes = sum(demand.sent_bytes for demand in copied)
    return replace(table, traffic_bytes=traffic_bytes), copied


def _state_floats(optimizer: TableOptimizer, width: int) -> int:
    """Floats per row besides its weights."""
    if optimizer.kernel is EmbeddingComputeKernel.DENSE:
        return 3 * width  # gradient and two moments of Adam
    return {"rowwise_adagrad": 1, "adagrad": width, "lazy_adam": 2 * width, "sgd": 0}[
        optimizer.name
    ]


def _gpu_bytes(weights: int, state: int, cached: float | None) -> float:
    """Bytes per row in GPU memory, of the weights and the optimizer's state.

    A cached table has a place number for each row, slots for some of the rows, each with 16 bytes
    of bookkeeping, and the state of row-wise optimizers. Other optimizers' state stays with the
    rows in host memory.
    """
    if cached is None:
        return weights + state
    return FLOAT_BYTES + cached * (weights + 16) + (state if state == FLOAT_BYTES else 0)


def _local_share(world: World) -> float:
    """The share of an all-to-all that stays on a rank's own machine."""
    return (world.local_world_size - 1) / max(1, world.world_size - 1)


def _holders(kind: str, rank: int | None, world: World) -> range:
    """The ranks that hold a table, given one of them."""
    if rank is None:
        return range(world.world_size)
    return range(rank, rank + (world.local_world_size if kind == TABLE_ROW_WISE else 1))


def _n_lengths(config: EmbeddingBagConfig, sharding: str, full: Set[str]) -> int:
    """Number of a table's fields whose lengths are sent, see `IdExchange`."""
    return len(set(config.feature_names) - (full if sharding == TABLE_WISE else set()))


def _sent(
    holders: range, rank: int, ranks: int, pooled_bytes: int, id_bytes: int, length_bytes: int
) -> tuple[int, int, int]:
    """Bytes of one table that a rank sends in a step: ids, embeddings, their gradients.

    Every holder has a part of every row's pool. Forward, the holders scatter the parts among
    themselves and add them up; each then has the sums of as many rows of every machine, and sends
    the others theirs. Backward takes the same way back: gradients go to a holder each, and the
    holders gather them from each other. Ids go to their holder, lengths to every one.
    """
    n = len(holders)
    others = n - (rank in holders)
    ids = others * (id_bytes // n + length_bytes) // ranks
    if rank not in holders:
        return ids, 0, pooled_bytes // ranks
    among_holders = (n - 1) * pooled_bytes // n
    elsewhere = pooled_bytes // n - pooled_bytes // ranks
    return ids, among_holders + elsewhere, among_holders


def _all_reduced(size_bytes: int, ranks: int) -> int:
    """Bytes that a rank sends in a ring all-reduce."""
    return 2 * size_bytes * (ranks - 1) // ranks


def sent_bytes(
    sharded: DistributedModelParallel,
    world: World,
    sparse: KeyedJaggedTensor,
    float_bytes: int = FLOAT_BYTES,
) -> dict[str, int]:
    """Total bytes that all ranks send for a batch, computed from the plan and the batch's ids.

    Args:
        sharded: the model.
        world: the ranks.
        sparse: this rank's batch; the others' are assumed to be similar.
        float_bytes: bytes per transmitted float of an embedding.

    Returns:
        ids (with the lengths that are sent), embeddings, their gradients, and gradients of the
        over-arch.
    """
    group = group_of(sharded, world)  # averaging over groups belongs to a step, not to a batch
    ranks, local = group.world_size, sparse.stride()
    n_groups = world.world_size // ranks
    ids = dict(zip(sparse.keys(), sparse.length_per_key(), strict=True))
    [plan] = sharded.plan.plan.values()
    tables = table_collection(sharded)
    full = {name for name, n in ids.items() if n == local} & tables.single_valued
    total = [0, 0, 0]
    for config in tables.tables:
        placed = plan[config.name]
        if kind_of(placed) == REPLICATED:
            table_bytes = FLOAT_BYTES * config.num_embeddings * config.embedding_dim
            total[2] += world.world_size * _all_reduced(table_bytes, world.world_size)
            continue
        owner = None if placed.sharding_type == ROW_WISE else placed.ranks[0] // n_groups
        holders = _holders(placed.sharding_type, owner, group)
        n_ids = ranks * local * len(config.feature_names)
        looked_up = ranks * sum(ids[name] for name in config.feature_names)
        n_lengths = ranks * local * _n_lengths(config, placed.sharding_type, full)
        for rank in range(ranks):
            sent = _sent(
                holders,
                rank,
                ranks,
                n_ids * config.embedding_dim * float_bytes,
                looked_up * ID_BYTES,
                n_lengths * ID_BYTES,
            )
            total = [a + n_groups * b for a, b in zip(total, sent, strict=True)]
    dense = sum(p.numel() for k, p in sharded.named_parameters() if ".ebc." not in k)
    names = ("ids", "embeddings", "embedding_gradients", "dense_gradients")
    dense_bytes = world.world_size * _all_reduced(FLOAT_BYTES * dense, world.world_size)
    return dict(zip(names, [*total, dense_bytes], strict=True))


def _remedies(job: Job) -> Iterator[str]:
    """Single settings that make it fit, as typed on the command line."""

    def fits(changed: Job, row_width: int | None = None) -> bool:
        changed = _row_wise(changed)
        return _estimate(changed, _place(changed), row_width).fits

    size, ranks = job.sharding.group_size, job.world.world_size

    def remedy(setting: str, changed: Job | None = None) -> str:
        as_asked = changed and _plan_if_possible(changed)
        if job.sharding.kind == ROW_WISE or (as_asked and as_asked.fits):
            return setting
        return f"{setting} sharding.kind={ROW_WISE}"

    if job.sharding.kind != ROW_WISE and fits(job):
        yield f"sharding.kind={ROW_WISE}"
    if tables := job.sharding.tables:
        free = replace(job, sharding=job.sharding.model_copy(update={"tables": {}}))
        if fits(free):
            yield remedy(f"no sharding.tables ({', '.join(tables)})", free)
    for larger in range((size or ranks) + 1, ranks + 1):
        grouped = {"group_size": larger if larger < ranks else None}
        changed = replace(job, sharding=job.sharding.model_copy(update=grouped))
        if ranks % larger == 0 and fits(changed):
            yield remedy(f"sharding.group_size={grouped['group_size'] or 'null'}", changed)
            break
    local = job.world.local_world_size
    # More groups would leave each rank's part of the tables as large as it is.
    most = MOST_RANKS if size is None else 0
    sizes = range(ranks + local, most + 1, local)
    enough = bisect_left(
        sizes, True, key=lambda n: fits(replace(job, world=hypothetical_world(n, local)))
    )
    if enough < len(sizes):
        more = replace(job, world=hypothetical_world(sizes[enough], local))
        yield remedy(f"--world-size {sizes[enough]}", more)
    if job.optimizer.name != "rowwise_adagrad":
        smaller = table_optimizer(OptimizerConfig(), job.world.device)
        if fits(changed := replace(job, optimizer=smaller)):
            yield remedy("optimizer.tables.name=rowwise_adagrad", changed)
    width = job.task.model.embedding_arch.row_width
    narrower = range(width - ROW_ALIGNMENT, 0, -ROW_ALIGNMENT)
    enough = bisect_left(narrower, True, key=lambda w: fits(job, w))
    if enough < len(narrower):
        yield remedy(f"model.embedding_dim={narrower[enough] - 1}")
    batch_size = job.batch_size // 2
    while batch_size >= job.world.world_size:
        if fits(changed := replace(job, batch_size=batch_size)):
            yield remedy(f"trainer.batch_size={batch_size}", changed)
            break
        batch_size //= 2
