"""2D parallelism: groups of ranks that each have a copy of the tables, averaged after each step.

TorchRec makes such groups on CUDA only. Here gloo takes NCCL's place: TorchRec's class without its
assertion, and without GPU numbers in the places of shards.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrec.distributed.model_parallel as torchrec_dmp
from torch import Tensor

from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint, sharding
from deepfm_dist.distributed.optimizers import table_optimizer
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.planning import hypothetical_world
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.settings import (
    OptimizerConfig,
    ShardingConfig,
    TableOptimizerConfig,
    TablePlan,
)
from deepfm_dist.distributed.sharding import local_shards, sharding_group
from deepfm_dist.errors import ConfigError
from deepfm_dist.jobs.plan import plan
from deepfm_dist.report.tables import plan_table
from tests.ranks import run_alone, run_ranks
from tests.steps import SMALL, Run, config_of, difference

PLACES = (
    "sharding.tables={user: {kind: row_wise}, item: {kind: table_wise, rank: 1}, "
    "genre: {kind: replicated}}"
)
Pieces = dict[tuple[str, int], Tensor]


def _allow_groups_on_cpu() -> None:
    source = inspect.getsource(torchrec_dmp.DMPCollection)
    exec(compile(source, torchrec_dmp.__file__, "exec", optimize=1), vars(torchrec_dmp))
    place = torchrec_dmp._remote_device
    torchrec_dmp._remote_device = lambda text: place(text.partition("cpu")[0] + "cpu")
    sharding.DMPCollection = torchrec_dmp.DMPCollection  # type: ignore[misc]
    sharding._IN_GROUPS = ("cpu",)


def _pieces(run: Run) -> Pieces:
    return {(t, rows.start): piece.clone() for t, rows, _, piece in local_shards(run.sharded)}


def _trained(
    folder: Path, config: Config, run_dir: Path | None = None
) -> tuple[list[float], list[float], Pieces]:
    """Losses of eight steps in the plain loop and in TorchRec's pipeline, and what was saved."""
    if config.sharding.group_size:
        _allow_groups_on_cpu()
    losses: list[list[float]] = []
    with process_group("cpu") as world:
        for overlapped in (True, False):
            run = Run(folder, config, world)
            pipeline = train_pipeline(
                run.sharded, run.optimizer, world, overlapped=overlapped, deferred=overlapped
            )
            batches = run.batches.steps(1, 8)
            losses.append([pipeline.train_step(batches).loss for _ in range(6)])
            pipeline.detach()
        pieces = _pieces(run)
        if run_dir is not None:
            run.save(run_dir, 6)
        losses[1] += [pipeline.train_step(batches).loss for _ in range(2)]
        return losses[1], losses[0], pieces


def _resumed(folder: Path, config: Config, run_dir: Path) -> tuple[list[float], Pieces]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        checkpoint.load(checkpoint.find_checkpoint(run_dir), world, run.sharded, run.optimizer)
        pieces = _pieces(run)
        return run.losses(7, 8), pieces


@pytest.mark.parametrize(
    ("optimizer", "apart"),
    # The mean of the groups' SGD steps is the step of all rows. Adagrad scales each group's step,
    # and the mean with a group that has not looked a row up halves it.
    [("sgd", 1e-6), ("rowwise_adagrad", 0.03)],
)
def test_groups_hold_equal_tables_that_one_rank_resumes_from(
    sample: PreparedDataset, tmp_path: Path, optimizer: str, apart: float
) -> None:
    common = (*SMALL, f"optimizer.tables={{name: {optimizer}, lr: 0.05}}")
    alone, _, _ = run_alone(_trained, sample.folder, config_of(*common))
    config = config_of(*common, PLACES, "sharding.group_size=2")
    ranks = run_ranks(_trained, 4, sample.folder, config, tmp_path)
    for losses, overlapped, _ in ranks:
        assert difference(losses, alone) <= apart
        assert losses == ranks[0][0]
        assert overlapped == losses[:6]
    assert optimizer == "sgd" or difference(ranks[0][0], alone) > 1e-5
    # Groups are ranks 0 and 2, and 1 and 3; neighbors hold the same rows.
    held = [sorted(pieces) for *_, pieces in ranks]
    assert held[0] == held[1] == [("genre", 0), ("user", 0)]
    assert held[2] == held[3] == [("genre", 0), ("item", 0), ("user", 351)]
    resumed, saved = run_alone(_resumed, sample.folder, config_of(*common), tmp_path)
    for *_, pieces in ranks:
        for (table, begin), piece in pieces.items():
            assert torch.equal(piece, saved[table, 0][begin : begin + len(piece)])
    assert resumed[0] == pytest.approx(ranks[0][0][6], abs=1e-6)  # nothing was averaged since
    assert resumed == pytest.approx(ranks[0][0][6:], abs=apart)


def _placed(device: str, size: int, name: str = "sgd", local: int = 4, **settings: Any) -> Any:
    world = hypothetical_world(size, local)
    if device == "cpu":
        object.__setattr__(world, "device", torch.device("cpu"))
    optimizer = table_optimizer(
        OptimizerConfig(tables=TableOptimizerConfig(name=name)),  # type: ignore[arg-type]
        torch.device("cuda"),
    )
    return sharding_group(world, ShardingConfig(**settings), optimizer)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("cpu", 8), {}, r"group_size=4: only on CUDA, not on a cpu; leave it out"),
        (("cuda", 6), {}, r"group_size=4: does not divide the 6 ranks; use 2 or 3 or 6$"),
        (("cuda", 12, "sgd", 8), {}, r"12 ranks on machines of 8 each; start as many on every"),
        (("cuda", 8, "adam"), {}, r"state of Adagrad only, not of optimizer.tables.name=adam; use"),
        (("cuda", 8, "lazy_adam"), {}, r"use rowwise_adagrad, adagrad or sgd"),
        (
            ("cuda", 8),
            {"kind": "table_row_wise"},
            r"group_size=4: sharding.kind=table_row_wise needs all ranks of a machine in one group",
        ),
        (
            ("cuda", 8),
            {"tables": {"item": TablePlan(cached=0.5)}},
            r"sharding.tables.item.cached=0.5: rows in the cache would not be averaged",
        ),
    ],
)
def test_what_groups_cannot_do_is_refused(
    arguments: tuple[Any, ...], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _placed(*arguments, group_size=4, **settings)


def test_one_group_of_all_ranks_means_no_groups() -> None:
    for size in (None, 8):
        assert _placed("cpu", 8, "adam", group_size=size).world_size == 8
    assert _placed("cuda", 16, local=8, group_size=4).local_world_size == 2


def test_a_plan_counts_the_copies_and_what_averaging_sends() -> None:
    """Two groups of four of 8 GPUs on two machines: neighbors, on one machine, average."""
    rows = {"user": 4_000_000, "item": 2_000_000, "genre": 19}
    common = (*SMALL, "sharding.kind=row_wise", "trainer.batch_size=8192")
    one, two = (
        plan(config_of(*common, *grouped), rows, 8, 4, 80 << 30)
        for grouped in ((), ("sharding.group_size=4",))
    )
    row_bytes = 12 * 4 + 4  # 10 factors, a weight, padding; a number of row-wise Adagrad
    shards = sum(-(-n // 4) for n in rows.values()) * row_bytes
    assert two.ranks[0].table_bytes == pytest.approx(shards, rel=1e-6)
    assert two.ranks[0].table_bytes == pytest.approx(2 * one.ranks[0].table_bytes, rel=1e-4)
    # A rank has partial sums of its group's 4,096 rows and sends those of the three others' rows;
    # the gradients take the same way back. Averaging with one neighbor takes the shards' size.
    exchanged = 3072 * 3 * 2 * 12 * 4
    ids = 3 * 3 * (1024 / 4 * 4 + 1024 * 4)
    dense = 2 * 7 * sum(p.numel() for p in two.job.task.model.interaction_arch.parameters()) * 4 / 8
    sent = two.ranks[0].sent_bytes
    assert sent == pytest.approx(shards + exchanged + ids + dense, rel=1e-3)
    assert two.ranks[0].local_bytes > shards
    assert "\n2 groups of 4 ranks, each with a copy of all tables\n" in plan_table(two)
    assert sum(t.traffic_bytes for t in two.tables) == pytest.approx(8 * (sent - dense), rel=1e-3)


def test_a_plan_that_does_not_fit_proposes_larger_groups() -> None:
    common = (*SMALL, "sharding.kind=row_wise", "sharding.group_size=2")
    rows = {"user": 400_000_000, "item": 1000, "genre": 19}
    assert "sharding.group_size=4" in plan(config_of(*common), rows, 8, 8, 8 << 30).remedies
