"""Will it fit? Memory and traffic of a plan on ranks that need not exist."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
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
from deepfm_dist.distributed.sharding import RESERVED, DoesNotFit, place, table_collection
from deepfm_dist.distributed.world import World
from deepfm_dist.model.deepfm import ROW_ALIGNMENT
from deepfm_dist.model.losses import DeepFMTrain

FLOAT_BYTES = ID_BYTES = 4
IN_FLIGHT = 3
"""Batches whose ids are on a rank at once: in training, being exchanged, being copied."""
_SPREAD = "row_wise"
MOST_RANKS = 8192
"""More are not proposed."""
DENSE_COPIES = 5
"""Floats per parameter of the over-arch: value, gradient, DDP's bucket, Adam's two moments."""


def hypothetical_world(world_size: int, local_world_size: int) -> World:
    """GPUs to plan for; there is no process group, nor need there be a GPU."""
    return World(0, world_size, local_world_size, 0, torch.device("cuda"), dist.HashStore())


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what.

    Attributes:
        task: the model, its tables on the meta device.
        world: the ranks, as `hypothetical_world` makes them.
        optimizer: of the tables.
        sharding: where the tables are asked to lie.
        batch_size: rows per step over all ranks.
        hbm_bytes: memory of a GPU.
    """

    task: DeepFMTrain
    world: World
    optimizer: TableOptimizer
    sharding: ShardingConfig
    batch_size: int
    hbm_bytes: int


@dataclass(frozen=True)
class TableDemand:
    """One table in a plan.

    Attributes:
        table: its name.
        rows: its rows.
        weight_bytes: of all its rows.
        state_bytes: of the optimizer's state and, for dense kernels, the gradient.
        sharding: table_wise, row_wise or replicated.
        ranks: that hold it.
        cached: share of its rows that GPUs keep; None: all of them.
        traffic_bytes: that cross the network in a step, over all ranks: ids, pooled rows and their
            gradients; of a replicated table its gradient.
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
        buffer_bytes: ids, pooled rows and their gradients.
        dense_bytes: the over-arch with its gradients, state and activations.
        sent_bytes: what it sends in a step, the over-arch's all-reduce included.
    """

    table_bytes: int
    buffer_bytes: int
    dense_bytes: int
    sent_bytes: int

    def __add__(self, other: "RankDemand") -> "RankDemand":
        return RankDemand(
            self.table_bytes + other.table_bytes,
            self.buffer_bytes + other.buffer_bytes,
            self.dense_bytes + other.dense_bytes,
            self.sent_bytes + other.sent_bytes,
        )

    @property
    def total_bytes(self) -> int:
        """Memory."""
        return self.table_bytes + self.buffer_bytes + self.dense_bytes


@dataclass(frozen=True)
class Plan:
    """A plan and what it takes.

    Attributes:
        job: what was planned.
        tables: a line per table.
        ranks: a line per rank.
        remedies: what would make it fit, each by itself; empty where it fits.
    """

    job: Job
    tables: Sequence[TableDemand]
    ranks: Sequence[RankDemand]
    remedies: Sequence[str] = ()

    @property
    def fullest(self) -> RankDemand:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)

    @property
    def share(self) -> float:
        """Of a GPU's memory that the fullest rank needs."""
        return self.fullest.total_bytes / self.job.hbm_bytes

    @property
    def fits(self) -> bool:
        """Whether every rank has room, the reserve left free."""
        return self.share <= 1 - RESERVED

    @property
    def seconds_sending(self) -> float:
        """Of the rank that sends most, at TorchRec's figures for NVLink and InfiniBand."""
        sent = max(rank.sent_bytes for rank in self.ranks)
        world = self.job.world
        outside = (world.world_size - world.local_world_size) / max(1, world.world_size - 1)
        per_ms = outside / CROSS_NODE_BANDWIDTH + (1 - outside) / INTRA_NODE_BANDWIDTH
        return sent * per_ms / 1000


def plan(job: Job) -> Plan:
    """Places the tables by TorchRec's planner, and adds up what they need.

    Where it finds no plan, the one shown cuts every table by rows, which spreads them most evenly.

    Raises:
        ConfigError: a placement cannot be.
    """
    plan = _plan_if_possible(job) or _plan_if_possible(_row_wise(job))
    assert plan is not None  # nothing is left to the planner
    return plan if plan.fits else replace(plan, remedies=tuple(_remedies(job)))


def _plan_if_possible(job: Job) -> Plan | None:
    """As the job says; None where the planner finds no room."""
    try:
        return _estimate(job, _place(job))
    except DoesNotFit:
        return None


def _row_wise(job: Job) -> Job:
    return replace(job, sharding=job.sharding.model_copy(update={"kind": _SPREAD}))


def _place(job: Job) -> dict[str, TablePlan]:
    replicable = job.optimizer.replicable
    return place(job.task, job.world, job.sharding, job.batch_size, job.hbm_bytes, replicable)


def _estimate(job: Job, placed: Mapping[str, TablePlan], row_width: int | None = None) -> Plan:
    """What a placement needs; with another width of the rows, if wanted."""
    arch = job.task.model.embedding_arch
    width = row_width or arch.row_width
    ranks = job.world.world_size
    dense = sum(p.numel() for p in job.task.model.interaction_arch.parameters())
    activations = sum(
        m.in_features + m.out_features for m in job.task.modules() if isinstance(m, nn.Linear)
    )
    local_batch = -(-job.batch_size // ranks)
    dense_bytes = FLOAT_BYTES * (DENSE_COPIES * dense + 2 * local_batch * activations)
    demands = [RankDemand(0, 0, dense_bytes, _all_reduced(FLOAT_BYTES * dense, ranks))] * ranks
    tables = []
    for config in arch.ebc.embedding_bag_configs():
        weight_bytes = width * arch.ebc.embedding_bags[config.name].weight.itemsize
        table, of_ranks = _of_table(job, config, placed[config.name], width, weight_bytes)
        tables.append(table)
        demands = [demand + added for demand, added in zip(demands, of_ranks, strict=True)]
    return Plan(job, tables, demands)


def _of_table(
    job: Job, config: EmbeddingBagConfig, placement: TablePlan, width: int, weight_bytes: int
) -> tuple[TableDemand, list[RankDemand]]:
    """What a table needs, in all and of each rank.

    Args:
        job: what is planned.
        config: the table.
        placement: where it lies.
        width: numbers per row.
        weight_bytes: of a row, unless it is replicated.
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
    # Ids and lengths, of which each is one number where a row has one value of a field.
    id_bytes = batch * fields * ID_BYTES
    owner = placement.rank
    holders = range(ranks) if owner is None else range(owner, owner + 1)
    per_rank = rows if is_replicated else -(-rows // len(holders))
    exchanged = 2 * pooled * FLOAT_BYTES + IN_FLIGHT * 2 * id_bytes
    # Pooled rows, their gradient, and ids of the local batch, as they are received.
    held, buffers = [0] * ranks, [exchanged // ranks] * ranks
    for turn, rank in enumerate(holders):
        mine = rows if is_replicated else max(0, min(per_rank, rows - turn * per_rank))
        held[rank] = round(mine * row_bytes)
        if not is_replicated:  # the same of the global batch
            buffers[rank] += 2 * pooled * FLOAT_BYTES + IN_FLIGHT * 2 * id_bytes // len(holders)
    sent = [
        _all_reduced(FLOAT_BYTES * rows * width, ranks)
        if is_replicated
        else sum(_sent(owner, rank, ranks, pooled * job.sharding.float_bytes, id_bytes, id_bytes))
        for rank in range(ranks)
    ]
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
    columns = zip(held, buffers, sent, strict=True)
    return table, [RankDemand(h, b, 0, s) for h, b, s in columns]


def _state_floats(optimizer: TableOptimizer, width: int) -> int:
    """Floats per row besides its weights."""
    if optimizer.kernel is EmbeddingComputeKernel.DENSE:
        return 3 * width  # gradient and two moments: it is Adam's kernel
    return {"rowwise_adagrad": 1, "adagrad": width, "lazy_adam": 2 * width, "sgd": 0}[
        optimizer.name
    ]


def _gpu_bytes(weights: int, state: int, cached: float | None) -> float:
    """Bytes per row in GPU memory, of the weights and the optimizer's state.

    Of a cached table: a number per row that says where it is; a slot for some rows, with 16 bytes
    that say whose it is and since when; and the state of row-wise optimizers. Others' stays with
    the rows, in the machine's memory.
    """
    if cached is None:
        return weights + state
    return FLOAT_BYTES + cached * (weights + 16) + (state if state == FLOAT_BYTES else 0)


def _sent(
    owner: int | None, rank: int, ranks: int, pooled_bytes: int, id_bytes: int, length_bytes: int
) -> tuple[int, int, int]:
    """Bytes of one table that a rank sends in a step: ids, embeddings, their gradients.

    Cut by rows, every rank holds a part of every row's pool: forward scatters the parts and adds
    them up, backward gathers the gradients of all. Whole on one rank, that rank sends the pooled
    rows and the others their gradients. Lengths go where ids go, and cut by rows to every rank.
    """
    others = ranks - 1
    pooled = others * pooled_bytes // ranks
    if owner is None:
        return others * (id_bytes // ranks + length_bytes) // ranks, pooled, pooled
    if rank == owner:
        return 0, pooled, 0
    return (id_bytes + length_bytes) // ranks, 0, pooled_bytes // ranks


def _all_reduced(size_bytes: int, ranks: int) -> int:
    """What a rank sends to sum a tensor over all of them, as a ring does."""
    return 2 * size_bytes * (ranks - 1) // ranks


def sent_bytes(
    sharded: DistributedModelParallel,
    world: World,
    sparse: KeyedJaggedTensor,
    float_bytes: int = FLOAT_BYTES,
) -> dict[str, int]:
    """What all ranks together send for a batch, worked out from the plan and the batch's ids.

    Args:
        sharded: the model.
        world: the ranks.
        sparse: this rank's batch; the others' are taken to be like it.
        float_bytes: bytes in which a float of an embedding travels.

    Returns:
        ids (with the bags' lengths), embeddings, their gradients, and gradients of the over-arch.
    """
    ranks, local = world.world_size, sparse.stride()
    n_ids = sparse.lengths().view(-1, local).sum(1).tolist()
    ids = dict(zip(sparse.keys(), n_ids, strict=True))
    [plan] = sharded.plan.plan.values()
    total = [0, 0, 0]
    for config in table_collection(sharded).tables:
        placed = plan[config.name]
        if kind_of(placed) == REPLICATED:
            table_bytes = FLOAT_BYTES * config.num_embeddings * config.embedding_dim
            total[2] += ranks * _all_reduced(table_bytes, ranks)
            continue
        owner = None if placed.sharding_type == _SPREAD else placed.ranks[0]
        n_ids = ranks * local * len(config.feature_names)
        looked_up = ranks * sum(ids[name] for name in config.feature_names)
        for rank in range(ranks):
            sent = _sent(
                owner,
                rank,
                ranks,
                n_ids * config.embedding_dim * float_bytes,
                looked_up * ID_BYTES,
                n_ids * ID_BYTES,
            )
            total = [a + b for a, b in zip(total, sent, strict=True)]
    dense = sum(p.numel() for k, p in sharded.named_parameters() if ".ebc." not in k)
    names = ("ids", "embeddings", "embedding_gradients", "dense_gradients")
    return dict(zip(names, [*total, ranks * _all_reduced(FLOAT_BYTES * dense, ranks)], strict=True))


def _remedies(job: Job) -> Iterator[str]:
    """Single changes that make it fit, as the user types them."""

    def fits(changed: Job, row_width: int | None = None) -> bool:
        changed = _row_wise(changed)
        return _estimate(changed, _place(changed), row_width).fits

    def remedy(setting: str, changed: Job | None = None) -> str:
        as_asked = changed and _plan_if_possible(changed)
        if job.sharding.kind == _SPREAD or (as_asked and as_asked.fits):
            return setting
        return f"{setting} sharding.kind={_SPREAD}"

    if job.sharding.kind != _SPREAD and fits(job):
        yield f"sharding.kind={_SPREAD}"
    if tables := job.sharding.tables:
        free = replace(job, sharding=job.sharding.model_copy(update={"tables": {}}))
        if fits(free):
            yield remedy(f"no sharding.tables ({', '.join(tables)})", free)
    local = job.world.local_world_size
    sizes = range(job.world.world_size + local, MOST_RANKS + 1, local)
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
