"""The same model at any world size, plan and optimizer; failures that stop cleanly."""

import dataclasses
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torchrec import KeyedJaggedTensor
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from deepfm_dist.build import deepfm_of
from deepfm_dist.config import Config
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import checkpoint, heartbeat, sharding
from deepfm_dist.distributed import process_group as world_module
from deepfm_dist.distributed.optimizers import combined_optimizer, table_optimizer
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.planning import hypothetical_world
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.replicated import ReplicatedOptimizer
from deepfm_dist.distributed.settings import (
    DenseOptimizerConfig,
    OptimizerConfig,
    ShardingConfig,
    TableOptimizerConfig,
    TablePlan,
)
from deepfm_dist.distributed.sharding import init_tables, local_shards, shard
from deepfm_dist.errors import ConfigError, DataError, EnvironmentProblem
from deepfm_dist.launcher import Launch
from deepfm_dist.model.deepfm import Table, build_deepfm
from deepfm_dist.model.losses import DeepFMTrain
from deepfm_dist.training.evaluation import RowEvaluator
from tests.conftest import HISTORY
from tests.plain_deepfm import PlainDeepFM
from tests.ranks import RankFailed, run_alone, run_ranks
from tests.steps import COPIES, SMALL, Run, config_of, difference, on_two_machines

LARGE = ("model.over_arch_layer_sizes=[400, 400, 400]", "model.embedding_dim=10")
OF_USERS = (*HISTORY, "trainer.batch_size=61", "model.init_std=0.1")
SAMPLED = "trainer.candidates=90"
MIXED = "sharding.tables={user: {kind: row_wise}, item: {kind: table_wise, rank: 1}}"


def train(folder: Path, config: Config, steps: int, shuffled: int | None = None) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        return run.losses(1, steps, lambda b: b if shuffled is None else permuted(b, shuffled))


def permuted(batch: Batch, seed: int) -> Batch:
    """The same rows in another order."""
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(seed))
    by_key = [jagged.to_dense() for jagged in batch.sparse.to_dict().values()]
    bags = [[bag[i] for i in order.tolist()] for bag in by_key]
    sparse = KeyedJaggedTensor(
        batch.sparse.keys(),
        torch.cat([torch.cat(b) for b in bags]).int(),
        lengths=torch.tensor([len(x) for b in bags for x in b], dtype=torch.int32),
    )
    return Batch(
        sparse, batch.dense[order], batch.labels[order], batch.weights[order], batch.global_weight
    )


ELSEWHERE = [
    (2, "sharding.kind=table_wise"),
    (2, "sharding.kind=row_wise"),
    (2, MIXED),
    (2, COPIES),
    (4, "sharding.kind=auto"),  # item and genre are replicated
    (4, "sharding.kind=row_wise"),
]


@pytest.mark.parametrize(
    "optimizer",
    [
        "rowwise_adagrad",
        "adam",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("sgd", "adagrad")),
    ],
)
def test_losses_do_not_depend_on_world_size_or_plan(
    sample: PreparedDataset, optimizer: str
) -> None:
    lr = 0.003 if optimizer == "adam" else 0.05
    common = (*SMALL, f"optimizer.tables={{name: {optimizer}, lr: {lr}}}")
    common = (*common, "model.dropout=0.1") if optimizer == "adam" else common
    alone = run_alone(train, sample.folder, config_of(*common), 30)
    assert alone[-1] < alone[0]
    for size, plan in ELSEWHERE:
        config = config_of(*common, plan)
        for losses in run_ranks(train, size, sample.folder, config, 30):
            assert difference(losses, alone) <= 1e-6, (size, plan)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_replicated_tables_give_the_losses_of_sharded_ones(
    sample: PreparedDataset, size: int
) -> None:
    plans = (COPIES, "sharding.kind=row_wise", "sharding.kind=table_wise")
    copied, *cut = (run_ranks(train, size, sample.folder, config_of(*SMALL, p), 20) for p in plans)
    assert len(set(copied[0])) == 20
    for losses in (*copied, *(losses for ranks in cut for losses in ranks)):
        assert difference(losses, copied[0]) <= (1e-6 if size > 1 else 0)


@pytest.mark.slow  # fifty steps of 400-400-400, seven times
def test_a_wide_over_arch_differs_no_more_than_reordered_rows(sample: PreparedDataset) -> None:
    config = config_of(*LARGE)
    alone = run_alone(train, sample.folder, config, 50)
    reordered = [
        run_alone(train, sample.folder, config, 50, shuffled=seed) for seed in (5, 6, 7, 8)
    ]
    apart = max(difference(losses, alone) for losses in reordered)
    for size, plan in [(2, "sharding.kind=row_wise"), (4, "sharding.kind=table_wise")]:
        losses = run_ranks(train, size, sample.folder, config_of(*LARGE, plan), 50)[0]
        assert difference(losses[:10], alone[:10]) <= 1e-6
        # Where a gradient is rounding noise, Adam's step is its sign: some orders of the rows meet
        # such a weight, others do not, so that one order alone says little.
        assert difference(losses, alone) <= 3 * apart


def trained_parts(folder: Path, config: Config, steps: int) -> dict[str, Any]:
    """Losses and validation figures, and what is above the tables, after training."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        losses = run.losses(1, steps)
        state = run.sharded.state_dict()
        parts = {name: t.numpy().copy() for name, t in state.items() if ".ebc." not in name}
        figures = dict(RowEvaluator(run.dataset, "valid").metrics(run.sharded.eval(), world))
        return parts | {"losses": losses} | figures


def test_batch_norm_leaves_every_weight_and_figure_alone_under_adam(
    sample: PreparedDataset,
) -> None:
    """Adam makes a whole step of any gradient: one that is rounding error would drift apart."""
    common = (*SMALL, "model.batch_norm=true", "model.dropout=0.1", "trainer.batch_size=1003")
    assert config_of(*common).optimizer.dense.name == "adam"
    alone = run_alone(trained_parts, sample.folder, config_of(*common), 12)
    assert {"model.interaction_arch.over_arch.norms.0.running_mean", "log_loss"} <= alone.keys()
    for size in (2, 3, 4):
        actual = run_ranks(trained_parts, size, sample.folder, config_of(*common), 12)[0]
        for name, expected in alone.items():
            np.testing.assert_allclose(actual[name], expected, rtol=0, atol=2e-6, err_msg=name)


def test_a_loss_of_rankings_leaves_biases_that_cancel_where_they_were(
    sample: PreparedDataset,
) -> None:
    common = (*SMALL, "trainer.loss=softmax", SAMPLED, "trainer.batch_size=1003")
    before, after = (run_alone(trained_parts, sample.folder, config_of(*common), n) for n in (0, 3))
    for name in ("bias", "over_arch.output.bias"):
        name = f"model.interaction_arch.{name}"
        np.testing.assert_array_equal(after[name], before[name])
    name = "model.interaction_arch.over_arch.output.weight"
    assert not np.array_equal(after[name], before[name])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_wide_over_arch_trains_alike_under_every_optimizer(
    sample: PreparedDataset, optimizer: str
) -> None:
    table_config = f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"
    common = (*LARGE, table_config, "trainer.batch_size=1024")
    alone = run_alone(train, sample.folder, config_of(*common), 10)
    for size, plan in [(2, MIXED), (4, "sharding.kind=row_wise")]:
        losses = run_ranks(train, size, sample.folder, config_of(*common, plan), 10)[0]
        assert difference(losses, alone) <= 1e-6


@pytest.mark.parametrize("parts", ["first_order", "fm", "deep"])
def test_a_part_of_the_model_alone_trains_alike_on_two_ranks(
    sample: PreparedDataset, parts: str
) -> None:
    switches = [f"model.{name}={name == parts}" for name in ("first_order", "fm", "deep")]
    config = config_of(*SMALL, *switches, "model.init_std=0.2")
    alone = run_alone(train, sample.folder, config, 15)
    assert alone[-1] < alone[0]
    assert difference(run_ranks(train, 2, sample.folder, config, 15)[1], alone) <= 1e-6


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adam", ["trainer.loss=softmax", "model.deep=false"]),
        ("rowwise_adagrad", ["trainer.loss=softmax", "model.dropout=0.1"]),
        ("adam", ["trainer.loss=softmax", SAMPLED, "data.negatives.popularity_power=0.5"]),
        ("sgd", ["trainer.loss=bpr", SAMPLED, "model.dropout=0.1"]),
        ("adam", ["trainer.loss=bce", "trainer.batch_size=1003"]),
    ],
)
def test_histories_and_losses_of_users_do_not_depend_on_the_world_size(
    with_history: PreparedDataset, optimizer: str, options: list[str]
) -> None:
    lr = 0.5 if optimizer == "sgd" else 0.003  # enough to show within 15 noisy steps
    common = (*SMALL, *OF_USERS, f"optimizer.tables={{name: {optimizer}, lr: {lr}}}", *options)
    alone = run_alone(train, with_history.folder, config_of(*common), 15)
    assert min(alone[-5:]) < alone[0]
    for size, plan in [(2, "sharding.kind=row_wise"), (4, "sharding.kind=table_wise")]:
        config = config_of(*common, plan)
        for losses in run_ranks(train, size, with_history.folder, config, 15):
            apart = difference(np.divide(losses, alone).tolist(), [1.0] * 15)
            assert apart <= 1e-6, (size, plan)


def _what_is_agreed(value: object) -> bool:
    with process_group("cpu") as world:
        return world.broadcast(value if world.is_first else None) is value


def test_one_rank_agrees_with_itself_without_a_copy() -> None:
    assert run_alone(_what_is_agreed, lambda: "not even picklable")


def _sent_around() -> tuple[list[int], list[int]]:
    with process_group("cpu") as world:
        mine = 10 * world.rank + torch.arange(2 * world.world_size)
        return world.all_gather_tensor(mine[:2]).tolist(), world.all_to_all(mine).tolist()


def test_rows_are_gathered_and_exchanged_by_rank() -> None:
    assert run_alone(_sent_around) == ([0, 1], [0, 1])
    together = [0, 1, 10, 11, 20, 21]
    expected = [
        (together, [10 * r + 2 * to + i for r in range(3) for i in (0, 1)]) for to in (0, 1, 2)
    ]
    assert run_ranks(_sent_around, 3) == expected


def _placed_in(gib: int) -> str:
    """Where ranks of machines of so much memory place a table of 3.2 GB."""
    with process_group("cpu") as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "memory_bytes", lambda: gib << 30)
        table = {"item": Table(100_000_000, ("item",))}
        model = build_deepfm(table, ["item"], 0, embedding_dim=7, device=torch.device("meta"))
        return sharding.place(model, world, ShardingConfig(), 64, hbm_bytes=0)["item"].kind


def test_the_planner_knows_the_memory_of_the_machine() -> None:
    assert run_ranks(_placed_in, 2, 32) in (["table_wise"] * 2, ["row_wise"] * 2)
    assert run_ranks(_placed_in, 2, 5) == ["row_wise"] * 2
    with pytest.raises(RankFailed, match="DoesNotFit: the tables do not fit 2 ranks"):
        run_ranks(_placed_in, 2, 2)


def _by_the_pipeline(folder: Path, config: Config, overlapped: bool) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        pipeline = train_pipeline(run.sharded, run.optimizer, world, overlapped=overlapped)
        batches = run.batches.steps(1, 4)
        return [pipeline.train_step(batches).loss for _ in range(4)]


@pytest.mark.parametrize("options", [["model.deep=false"], [SAMPLED]])
def test_losses_of_users_pass_torchrecs_pipeline(
    with_history: PreparedDataset, options: list[str]
) -> None:
    config = config_of(*SMALL, *OF_USERS, "trainer.loss=softmax", *options)
    plain, overlapped = (
        run_ranks(_by_the_pipeline, 2, with_history.folder, config, way)[0] for way in (False, True)
    )
    assert overlapped == plain


def _seconds_where_embeddings_travel_slowly(folder: Path) -> dict[str, float]:
    with process_group("cpu") as world:
        run = Run(folder, config_of(*SMALL), world)
        pipeline, batches = (
            train_pipeline(run.sharded, run.optimizer, world),
            run.batches.steps(1, 4),
        )
        pipeline.train_step(batches)
        [collection] = (
            m for m in run.sharded.modules() if isinstance(m, ShardedEmbeddingBagCollection)
        )
        on_time = collection.compute_and_output_dist

        def late(context: Any, ids: Any) -> Any:
            time.sleep(0.5)
            return on_time(context, ids)

        collection.compute_and_output_dist = late
        pipeline.seconds.update(dict.fromkeys(pipeline.seconds, 0.0))
        pipeline.train_step(batches)
        run.sharded.eval()
        run.sharded(next(batches))
        return pipeline.seconds


def test_the_time_of_embeddings_is_reported_from_that_of_the_rest(sample: PreparedDataset) -> None:
    for seconds in run_ranks(_seconds_where_embeddings_travel_slowly, 2, sample.folder):
        assert 0.5 < seconds["embeddings"] < 1
        assert 0 < seconds["forward"] < 0.5


class RowWiseAdagrad:
    """One accumulator a row: the mean square of its gradient over the whole width."""

    def __init__(self, weights: list[torch.nn.Parameter], lr: float, width: int) -> None:
        self.weights, self.lr, self.width = weights, lr, width
        self.sums = [torch.zeros(len(w)) for w in weights]

    def step(self) -> None:
        for weight, total in zip(self.weights, self.sums, strict=True):
            assert weight.grad is not None
            total += weight.grad.square().sum(1) / self.width
            weight.data -= self.lr * weight.grad / (total.sqrt() + 1e-8)[:, None]


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "adam"])
def test_losses_equal_an_independent_models(sample: PreparedDataset, optimizer: str) -> None:
    losses, expected = run_alone(_ours_and_plain, sample, optimizer)
    assert expected[-1] < expected[0]
    assert difference(losses, expected) <= 2e-6


def _ours_and_plain(sample: PreparedDataset, optimizer: str) -> tuple[list[float], list[float]]:
    lr = 0.003 if optimizer == "adam" else 0.05
    config = config_of(
        *SMALL, "trainer.batch_size=200", f"optimizer.tables={{name: {optimizer}, lr: {lr}}}"
    )
    torch.manual_seed(0)
    plain = PlainDeepFM(
        {n: spec.rows for n, spec in sample.manifest.tables.items()},
        [("user", "user", "sum"), ("item", "item", "sum"), ("genre", "genre", "mean")],
        0,
        10,
        (30, 20, 10),
    )
    with process_group("cpu") as world:
        run = Run(sample.folder, config, world)
        arch = deepfm_of(run.sharded).interaction_arch
        with torch.no_grad():
            for table, _, _, piece in local_shards(run.sharded):
                plain.tables[table].weight.copy_(piece[:, :11])
            plain.bias.copy_(arch.bias)
            linears = [m for m in plain.mlp if isinstance(m, torch.nn.Linear)]
            mine = [*arch.over_arch.hidden, arch.over_arch.output]
            for theirs, ours in zip(linears, mine, strict=True):
                theirs.load_state_dict(ours.state_dict())
        losses = run.losses(1, 30)
    tables = list(plain.tables.parameters())
    in_tables = {id(p) for p in tables}
    rest = [p for p in plain.parameters() if id(p) not in in_tables and p.numel()]
    table_config: Any = {
        "sgd": lambda: torch.optim.SGD(tables, lr=lr),
        "adam": lambda: torch.optim.Adam(tables, lr=lr, eps=1e-8),
        "rowwise_adagrad": lambda: RowWiseAdagrad(tables, lr, width=12),
    }[optimizer]()
    dense = torch.optim.Adam(rest, lr=1e-3)
    expected = []
    for step in range(1, 31):
        batch = run.batches.batch(step)
        bags = {k: [b.tolist() for b in j.to_dense()] for k, j in batch.sparse.to_dict().items()}
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            plain(bags, batch.dense), batch.labels
        )
        plain.zero_grad()
        loss.backward()
        table_config.step()
        dense.step()
        expected.append(float(loss))
    return losses, expected


def _pieces(folder: Path, config: Config) -> list[tuple[str, slice, np.ndarray]]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        return [(t, rows, piece.numpy().copy()) for t, rows, _, piece in local_shards(run.sharded)]


@pytest.mark.parametrize(("size", "plan"), ELSEWHERE)
def test_tables_start_the_same_everywhere(sample: PreparedDataset, size: int, plan: str) -> None:
    config = config_of(*SMALL)
    whole = {table: piece for table, _, piece in run_alone(_pieces, sample.folder, config)}
    for piece in whole.values():
        assert (piece[:, 11:] == 0).all()
        assert 0.04 < piece[:, :11].std() < 0.06
    actual = {table: np.full_like(piece, np.nan) for table, piece in whole.items()}
    for pieces in run_ranks(_pieces, size, sample.folder, config_of(*SMALL, plan)):
        for table, rows, piece in pieces:
            actual[table][rows] = piece
    for table, piece in whole.items():
        np.testing.assert_array_equal(actual[table], piece)


@pytest.mark.parametrize(
    ("size", "plan", "expected"),
    [
        (2, "sharding.kind=table_wise", {"user": [701, 0], "item": [0, 401], "genre": [19, 0]}),
        (2, "sharding.kind=row_wise", {"user": [351, 350], "item": [201, 200], "genre": [10, 9]}),
        (2, MIXED, {"user": [351, 350], "item": [0, 401]}),
        (4, "sharding.tables={genre: {kind: table_wise, rank: 3}}", {"genre": [0, 0, 0, 19]}),
    ],
)
def test_tables_are_placed_as_planned(
    sample: PreparedDataset, size: int, plan: str, expected: dict[str, list[int]]
) -> None:
    actual = run_ranks(_pieces, size, sample.folder, config_of(*SMALL, plan))
    for table, rows in expected.items():
        assert [sum(len(p) for t, _, p in of_rank if t == table) for of_rank in actual] == rows


def _with_small_tables(config: ShardingConfig) -> tuple[list[float], set[str]]:
    """Losses of three steps, and the tables that this rank has rows of."""
    rows = {"gender": 3, "age": 9, "user": 10}
    with process_group("cpu") as world:
        torch.manual_seed(0)
        model = build_deepfm(
            {name: Table(n, (name,)) for name, n in rows.items()},
            list(rows),
            n_dense=0,
            embedding_dim=3,
            device=torch.device("meta"),
        )
        optimizers = OptimizerConfig(
            tables=TableOptimizerConfig(lr=0.1), dense=DenseOptimizerConfig(name="sgd", lr=0.1)
        )
        tables = table_optimizer(optimizers, world.device)
        tables.attach(model.embedding_arch.ebc.parameters())
        sharded, _ = shard(DeepFMTrain(model), world, config, tables)
        init_tables(sharded, 4, 0.5, seed=1)
        optimizer = combined_optimizer(sharded, tables, optimizers)
        mine = torch.arange(24).chunk(world.world_size)[world.rank]
        batch = Batch(
            KeyedJaggedTensor(
                list(rows),
                torch.cat([mine % n for n in rows.values()]).int(),
                lengths=torch.ones(len(rows) * len(mine), dtype=torch.int32),
            ),
            torch.zeros(len(mine), 0),
            (mine % 5 < 2).float(),
            torch.ones(len(mine)),
            torch.tensor(24.0),
        )
        pipeline, stream = train_pipeline(sharded, optimizer, world), iter([batch] * 3)
        losses = [pipeline.train_step(stream).loss for _ in range(3)]
        return losses, {table for table, _, _, piece in local_shards(sharded) if len(piece)}


@pytest.mark.parametrize("default", ["row_wise", "auto"])
def test_a_table_too_small_to_give_every_rank_a_row_is_not_cut(
    default: Literal["row_wise", "auto"],
) -> None:
    alone, _ = run_alone(_with_small_tables, ShardingConfig(kind="table_wise"))
    actual = run_ranks(_with_small_tables, 4, ShardingConfig(kind=default))
    for losses, _ in actual:
        assert difference(losses, alone) <= 1e-6
    holders = {t: sum(t in tables for _, tables in actual) for t in ("gender", "age", "user")}
    # Nine rows go 3, 3, 3, 0; of a table that is left to auto every rank has a copy.
    assert holders["gender"] == holders["age"] == (4 if default == "auto" else 1)
    assert holders["user"] == 4
    with pytest.raises(RankFailed, match=r"tables.age.kind=row_wise: 9 rows cut over 4 ranks"):
        run_ranks(_with_small_tables, 4, ShardingConfig(tables={"age": TablePlan(kind="row_wise")}))


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_cpu_refuses_to_cache_a_table(sample: PreparedDataset, optimizer: str) -> None:
    wanted = [f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"]
    wanted.append("sharding.tables={item: {cached: 0.25}}")
    with pytest.raises(RankFailed, match=r"sharding.tables.item.cached=0.25: a cpu has no cache"):
        run_alone(train, sample.folder, config_of(*SMALL, *wanted), 1)


def test_an_id_out_of_range_is_an_error_not_another_row(sample: PreparedDataset) -> None:
    with pytest.raises(RankFailed, match="idx < num_rows"):
        run_alone(_out_of_range, sample.folder)


def _out_of_range(folder: Path) -> None:
    def shifted(batch: Batch) -> Batch:
        batch.sparse.values()[0] = 10_000
        return batch

    with process_group("cpu") as world:
        Run(folder, config_of(*SMALL), world).losses(1, 1, shifted)


def _first_does(fails: bool) -> int | None:
    def work() -> int:
        if fails:
            raise DataError("rank 0 could not")
        return 5

    with process_group("cpu") as world:
        return world.run_on_rank0("something", work)


def test_rank_zero_works_while_the_others_wait() -> None:
    assert run_ranks(_first_does, 2, False) == [5, None]
    with pytest.raises(RankFailed) as caught:
        run_ranks(_first_does, 2, True)
    assert "DataError: rank 0 could not" in str(caught.value)
    assert "SystemExit: 2" in str(caught.value)


def _first_takes(seconds: float, held_by: int) -> str | None:
    """Rank 0 works for some seconds, or stops where they are none; a rank holds the store."""

    def store(launch: Launch, master: tuple[str, int], timeout: timedelta) -> dist.Store:
        is_master = launch.rank == held_by
        return dist.TCPStore(*master, launch.world_size, is_master=is_master, timeout=timeout)

    def work() -> str:
        if seconds == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(seconds)
        return "done"

    world_module._store, heartbeat.SHORT = store, timedelta(seconds=1)
    with process_group("cpu", timeout_s=2) as world:
        return world.run_on_rank0("something", work)


def test_rank_zero_may_work_for_longer_than_the_time_out() -> None:
    assert run_ranks(_first_takes, 2, 5.0, 0) == ["done", None]


@pytest.mark.parametrize("held_by", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rank_zero_is_missed_at_its_work_within_the_time_out(held_by: int) -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(_first_takes, 3, 0.0, held_by)
    assert time.monotonic() - begun < 30
    said = "rank 0 of 3 did not answer: killed, or hanging for run.timeout_s=2 seconds"
    assert str(caught.value).count(f"RankLost: {said}; look into its log") == 1
    assert str(caught.value).count("SystemExit: 1") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sharding.tables={users: {kind: row_wise}}", "unknown table; available: user, item"),
        ("sharding.tables={user: {kind: table_wise, rank: 3}}", "the last of 1 rank is 0"),
        ("optimizer.tables.name=lazy_adam", "no lazy_adam kernel on cpu; use adam"),
        ("sharding.kind=table_row_wise", "only on CUDA, not on a cpu; use row_wise"),
        ("sharding.tables={user: {kind: table_row_wise}}", "tables.user.kind=.*: only on CUDA"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    sample: PreparedDataset, override: str, message: str
) -> None:
    with pytest.raises(RankFailed, match=f"ConfigError: .*{message}"):
        run_alone(train, sample.folder, config_of(override), 1)


def test_more_processes_than_gpus_are_refused_with_the_right_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EnvironmentProblem, match="torch sees no GPU"):
        world_module._device("cuda", 0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(world_module, "_fbgemm_has_cuda", lambda: True)
    with pytest.raises(ConfigError, match=r"4 processes .* 2 GPUs: start .*--nproc_per_node=2"):
        world_module._device("auto", 0, 4)
    assert world_module._device("cpu", 0, 4) == torch.device("cpu")


def test_restarts_over_machines_without_their_variable_are_refused() -> None:
    # torchrun says so without the variable, and always under its static rendezvous.
    launch = Launch(world_size=2, agents=2, max_restarts=3, agent_holds_store=True)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        world_module._store(launch, ("localhost", 1), timedelta(seconds=1))


def _one_hangs(folder: Path, asleep: int, timeout_s: float) -> None:
    heartbeat.SHORT = timedelta(seconds=1)
    with process_group("cpu", timeout_s) as world:
        run = Run(folder, config_of(*SMALL), world)
        run.losses(1, 2)
        if world.rank == asleep:
            time.sleep(600)
        run.losses(3, 4)


@pytest.mark.parametrize(
    "asleep",
    [2, pytest.param(0, marks=pytest.mark.slow)],  # waits for the time-out
)
def test_a_hanging_rank_is_named_within_the_time_out(sample: PreparedDataset, asleep: int) -> None:
    begun = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(_one_hangs, 3, sample.folder, asleep, 3.0)
    assert time.monotonic() - begun < 60
    said = f"rank {asleep} of 3 did not answer: killed, or hanging for run.timeout_s=3 seconds"
    assert str(caught.value).count(f"RankLost: {said}; look into its log") == 1
    assert str(caught.value).count("SystemExit: 1") == 1


def _weights_after(folder: Path, config: Config, steps: int) -> dict[str, np.ndarray]:
    """Whole tables and the over-arch, of one rank."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        run.losses(1, steps)
        state = run.sharded.state_dict()
        return {
            name: (t.to_local().local_shards()[0] if ".ebc." in name else t).numpy().copy()
            for name, t in state.items()
        }


def test_parts_of_a_batch_add_up_to_the_batch(sample: PreparedDataset) -> None:
    common = (*SMALL, "optimizer.tables={name: adam, lr: 0.003}", "trainer.batch_size=999")
    whole = run_alone(train, sample.folder, config_of(*common), 20)
    for size in (1, 2):
        config = config_of(*common, "trainer.accumulate_steps=3", "sharding.kind=row_wise")
        assert difference(run_ranks(train, size, sample.folder, config, 20)[0], whole) <= 1e-6
    with pytest.raises(ConfigError, match=r"accumulate_steps=3: rowwise_adagrad updates tables"):
        config_of("trainer.accumulate_steps=3")
    many = config_of(*common, "trainer.accumulate_steps=1000")
    with pytest.raises(RankFailed, match=r"accumulate_steps=1000: a rank has only 999 rows"):
        run_alone(train, sample.folder, many, 1)


def test_l2_is_half_the_squared_norm_in_the_loss(sample: PreparedDataset) -> None:
    """SGD on everything but the tables: one step, w - lr (g + l2 w)."""
    common = (*SMALL, "optimizer.dense={name: sgd, lr: 0.1}", "optimizer.tables.name=adam")
    start, plain, decayed = (
        run_alone(_weights_after, sample.folder, config_of(*common, f"optimizer.dense.l2={l2}"), n)
        for l2, n in ((0, 0), (0, 1), (0.5, 1))
    )
    name = next(n for n in start if n.endswith("over_arch.hidden.0.weight"))
    expected = plain[name] - 0.1 * 0.5 * start[name]
    np.testing.assert_allclose(decayed[name], expected, rtol=1e-5, atol=1e-7)


def test_l2_of_tables_moves_every_row_at_any_world_size(sample: PreparedDataset) -> None:
    l2 = 0.01
    common = (*SMALL, f"optimizer.tables={{name: adam, lr: 0.003, l2: {l2}}}")
    alone = run_alone(train, sample.folder, config_of(*common), 30)
    for losses in run_ranks(train, 2, sample.folder, config_of(*common), 30):
        assert difference(losses, alone) <= 1e-6
    # A row that no batch touched: Adam's first step is lr * sign(l2 * w), whatever the size.
    few = (*common, "trainer.batch_size=8")
    start, moved = (
        run_alone(_weights_after, sample.folder, config_of(*few), steps) for steps in (0, 1)
    )
    name = next(n for n in start if "t_user" in n or ".user." in n)
    used = np.abs(start[name]) > 1e-3  # not the padding, nor where eps matters
    step = (start[name] - moved[name])[used] / np.sign(start[name][used])
    assert np.mean(np.abs(step - 0.003) < 1e-5) > 0.95
    with pytest.raises(RankFailed, match=r"l2=0.01: FBGEMM's rowwise_adagrad on cpu ignores it"):
        run_alone(train, sample.folder, config_of("optimizer.tables.l2=0.01"), 1)


def test_the_gradient_of_tables_is_bounded_element_by_element(sample: PreparedDataset) -> None:
    """Adam's first step is lr * g / (|g| + eps): with eps = 1 it tells the gradient."""
    bound = 1e-4
    common = "optimizer.tables={name: adam, lr: 1.0, eps: 1.0}"
    start, free, moved = (
        run_alone(_weights_after, sample.folder, config_of(*SMALL, common, *more), steps)
        for steps, more in (
            (0, ()),
            (1, ()),
            (1, (f"optimizer.tables.max_gradient={bound}",)),
        )
    )
    for name in (n for n in start if ".ebc." in n):
        step, bounded = start[name] - free[name], start[name] - moved[name]
        gradient = step / (1 - np.abs(step))
        assert np.abs(gradient).max() > 10 * bound
        clipped = np.clip(gradient, -bound, bound)
        np.testing.assert_allclose(bounded, clipped / (1 + np.abs(clipped)), atol=2e-7)
    with pytest.raises(RankFailed, match=r"max_gradient=0.1: FBGEMM's sgd bounds the gradient of"):
        config = config_of("optimizer.tables={name: sgd, max_gradient: 0.1}")
        run_alone(train, sample.folder, config, 1)


def test_gradients_of_tables_are_bounded_where_a_rank_holds_none(sample: PreparedDataset) -> None:
    bounded = "optimizer.tables={name: adam, lr: 0.003, max_gradient: 0.001}"
    names = ("user", "item", "genre")
    on_rank0 = ", ".join(f"{name}: {{kind: table_wise, rank: 0}}" for name in names)
    config = config_of(*SMALL, bounded, f"sharding.tables={{{on_rank0}}}")
    alone, together = (run_ranks(train, size, sample.folder, config, 5)[0] for size in (1, 2))
    assert difference(together, alone) <= 1e-6


def test_the_norm_of_the_dense_gradient_is_bounded(sample: PreparedDataset) -> None:
    common = (*SMALL, "optimizer.dense={name: sgd, lr: 1.0}", "trainer.batch_size=999")
    start, free, bounded = (
        run_alone(_weights_after, sample.folder, config_of(*common, *more), steps)
        for steps, more in ((0, ()), (1, ()), (1, ("optimizer.dense.max_norm=0.001",)))
    )
    names = [n for n in start if ".ebc." not in n]
    gradient, taken = (
        np.concatenate([(start[n] - after[n]).ravel() for n in names]) for after in (free, bounded)
    )
    norm = np.linalg.norm(gradient)
    assert norm > 0.01
    np.testing.assert_allclose(taken, gradient * 0.001 / norm, rtol=1e-2, atol=1e-7)
    config = config_of(*common, "optimizer.dense.max_norm=0.001", "sharding.kind=row_wise")
    alone, two = (run_ranks(train, size, sample.folder, config, 30)[0] for size in (1, 2))
    assert difference(alone, two) <= 1e-6


@pytest.mark.parametrize("bound", [0.01, 100.0])
def test_the_norm_of_the_whole_gradient_is_bounded_l2_included(
    sample: PreparedDataset, bound: float
) -> None:
    """Adam with eps = 1 tells the tables' gradient, SGD the others'."""
    common = (
        *SMALL,
        "optimizer.tables={name: adam, lr: 1.0, eps: 1.0, l2: 0.3}",
        "optimizer.dense={name: sgd, lr: 1.0, l2: 0.2}",
        "trainer.batch_size=999",
    )
    no_l2 = ("optimizer.tables.l2=0", "optimizer.dense.l2=0")
    start, free = (
        run_alone(_weights_after, sample.folder, config_of(*common, *no_l2), n) for n in (0, 1)
    )
    step = {name: (start[name] - free[name]).astype(np.float64) for name in start}
    gradient = {
        name: s / (1 - np.abs(s)) + 0.3 * start[name] if ".ebc." in name else s + 0.2 * start[name]
        for name, s in step.items()
    }
    norm = np.sqrt(sum(np.square(g).sum() for g in gradient.values()))
    table_config = np.sqrt(sum(np.square(g).sum() for n, g in gradient.items() if ".ebc." in n))
    assert 0.05 < table_config / norm < 0.999 and 0.02 < norm < 50
    config = config_of(*common, f"optimizer.max_norm={bound}")
    moved = run_alone(_weights_after, sample.folder, config, 1)
    for name, g in gradient.items():
        g = g * min(1.0, bound / norm)
        taken = g / (1 + np.abs(g)) if ".ebc." in name else g
        np.testing.assert_allclose(start[name] - moved[name], taken, rtol=2e-3, atol=5e-7)


@pytest.mark.slow  # many worlds of ranks
def test_a_bounded_norm_is_the_same_at_any_world_size_and_plan(sample: PreparedDataset) -> None:
    common = (
        *SMALL,
        "optimizer.tables={name: adam, lr: 0.003, eps: 0.001, l2: 0.01}",
        "optimizer.dense={name: sgd, lr: 0.5}",
        "optimizer.max_norm=0.02",
    )
    alone = run_alone(train, sample.folder, config_of(*common), 30)
    unbounded = run_alone(train, sample.folder, config_of(*common, "optimizer.max_norm=9"), 30)
    assert difference(alone, unbounded) > 1e-3
    for size, plan in ELSEWHERE:
        for losses in run_ranks(train, size, sample.folder, config_of(*common, plan), 30):
            assert difference(losses, alone) <= 1e-6, (size, plan)
    with pytest.raises(ConfigError, match=r"max_norm=10: rowwise_adagrad updates tables in the "):
        config_of("optimizer.max_norm=10")


@pytest.mark.parametrize(
    ("override", "sizes", "least", "most"),
    [
        ("trainer.precision=bf16", (1, 2), 1e-5, 2e-3),
        ("trainer.table_precision=fp16", (1, 2), 1e-7, 1e-4),
        (f"trainer.table_precision=fp16 & {COPIES}", (2,), 1e-7, 1e-4),
        ("sharding={communication: fp16, kind: row_wise}", (2,), 1e-7, 1e-4),
        ("sharding={communication: fp16, kind: table_wise}", (2,), 1e-7, 1e-4),
        pytest.param("trainer.compile=true", (1,), 0.0, 1e-6, marks=pytest.mark.slow),  # a compiler
    ],
)
def test_less_precision_and_compilation_stay_near_and_repeat_exactly(
    sample: PreparedDataset, override: str, sizes: tuple[int, ...], least: float, most: float
) -> None:
    common = (*SMALL, "model.dropout=0.1")
    exact = run_alone(train, sample.folder, config_of(*common), 30)
    for size in sizes:
        first, second = (
            run_ranks(train, size, sample.folder, config_of(*common, *override.split(" & ")), 30)[0]
            for _ in range(2)
        )
        assert first == second
        assert least <= difference(first, exact) <= most


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.precision=tf32", "trainer.precision=tf32: not available on a CPU"),
        ("sharding.communication=bf16", "communication=bf16: gloo would send fp16"),
    ],
)
def test_what_a_cpu_has_not_is_refused(sample: PreparedDataset, override: str, said: str) -> None:
    with pytest.raises(RankFailed, match=said):
        run_alone(train, sample.folder, config_of(override), 1)
    with pytest.raises(ConfigError, match=r"table_precision=fp16: adam on the tables"):
        config_of("trainer.table_precision=fp16", "optimizer.tables.name=adam")


def _stepped(
    name: str, gradients: list[np.ndarray], l2: float, half: bool
) -> tuple[np.ndarray, np.ndarray]:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = ReplicatedOptimizer({"t": weight}, name, 0.5, 1e-3, l2, half)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    state = optimizer.state[weight]["t.momentum1"].numpy() if name != "sgd" else np.zeros(0)
    return weight.detach().numpy(), state


@pytest.mark.parametrize("l2", [0.0, 0.25])
@pytest.mark.parametrize("name", ["rowwise_adagrad", "adagrad", "sgd"])
def test_copies_take_the_steps_of_fused_tables(name: str, l2: float) -> None:
    """By hand; the row that is not looked up stays, L2 or not."""
    gradients = [np.arange(12, dtype=np.float32).reshape(3, 4) - i for i in (2, 5)]
    for gradient in gradients:
        gradient[1] = 0
    start = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    expected, h = start.astype(np.float64), np.zeros((3, 4))
    for gradient in gradients:
        g = gradient + l2 * expected * np.array([[1], [0], [1]])
        if name == "sgd":
            expected = expected - 0.5 * g
            continue
        h += np.square(g).mean(1, keepdims=True) if name == "rowwise_adagrad" else np.square(g)
        expected = expected - 0.5 * g / (np.sqrt(h) + 1e-3)
    weight, state = _stepped(name, gradients, l2, half=False)
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
    if name != "sgd":
        columns = h[:, 0] if name == "rowwise_adagrad" else h
        np.testing.assert_allclose(state, columns, rtol=1e-5)
    rounded, _ = _stepped(name, gradients[:1], l2, half=True)
    exact, _ = _stepped(name, gradients[:1], l2, half=False)
    np.testing.assert_array_equal(rounded, exact.astype(np.float16))


def test_a_table_is_replicated_up_to_the_rows_that_a_rank_looks_up() -> None:
    tables = {
        "one": Table(32, ("one",)),
        "more": Table(33, ("more",)),
        "shared": Table(64, ("a", "b")),
        "named": Table(5, ("named",)),
    }
    names = [field for table in tables.values() for field in table.features]
    model = build_deepfm(tables, names, 0, embedding_dim=3, device=torch.device("meta"))
    config = ShardingConfig(tables={"named": TablePlan(kind="table_wise")})

    def copies(config: ShardingConfig, world_size: int, replicable: bool = True) -> set[str]:
        world = hypothetical_world(world_size, world_size)
        placed = sharding.place(model, world, config, 64, 1 << 30, replicable)
        return {name for name, plan in placed.items() if plan.kind == "replicated"}

    assert copies(config, 2) == {"one", "shared"}
    assert copies(config, 4) == copies(config, 1) == copies(config, 2, replicable=False) == set()
    assert copies(ShardingConfig(kind="row_wise"), 2) == set()
    everywhere = ShardingConfig(tables={"more": TablePlan(kind="replicated")})
    assert "more" in copies(everywhere, 8)
    assert copies(everywhere, 1) == set()
    with pytest.raises(ConfigError, match=r"tables.more.kind=replicated: .*lazy_adam cannot"):
        copies(everywhere, 2, replicable=False)
    with pytest.raises(ValidationError, match=r"cached=0.5: a replicated table is small"):
        TablePlan(kind="replicated", cached=0.5)


def _saved_on_the_way(
    folder: Path, config: Config, run_dir: Path
) -> tuple[list[float], dict[str, slice]]:
    """Losses of twelve steps, and this rank's rows of each table."""
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        losses = run.losses(1, 6)
        run.save(run_dir, 6)
        losses += run.losses(7, 12)
        return losses, {table: rows for table, rows, *_ in local_shards(run.sharded)}


def _resumed(folder: Path, config: Config, run_dir: Path) -> list[float]:
    with process_group("cpu") as world:
        run = Run(folder, config, world)
        checkpoint.load(checkpoint.find_checkpoint(run_dir), world, run.sharded, run.optimizer)
        return run.losses(7, 12)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_tables_cut_within_a_machine_train_and_resume_as_on_one_rank(
    sample: PreparedDataset, tmp_path: Path, optimizer: str
) -> None:
    common = (*SMALL, f"optimizer.tables={{name: {optimizer}, lr: 0.003}}")
    alone, cut = config_of(*common), config_of(*common, "sharding.kind=table_row_wise")
    expected, _ = run_alone(_saved_on_the_way, sample.folder, alone, tmp_path / "alone")
    job = _saved_on_the_way, sample.folder, cut, tmp_path / "cut"
    actual = run_ranks(on_two_machines, 4, *job)
    for losses, _ in actual:
        assert difference(losses, expected) <= 1e-6
    first = [{"user": slice(0, 351), "genre": slice(0, 10)}]
    first += [{"user": slice(351, 701), "genre": slice(10, 19)}]
    assert [rows for _, rows in actual] == [
        *first,
        {"item": slice(0, 201)},
        {"item": slice(201, 401)},
    ]
    resumed = run_alone(_resumed, sample.folder, alone, tmp_path / "cut")
    assert difference(resumed, expected[6:]) <= 1e-6


def test_a_table_is_cut_over_the_ranks_of_one_machine() -> None:
    tables = {name: Table(rows, (name,)) for name, rows in (("a", 90), ("b", 90), ("few", 3))}
    model = build_deepfm(tables, list(tables), 0, embedding_dim=3, device=torch.device("meta"))
    everywhere = ShardingConfig(kind="table_row_wise", tables={"b": TablePlan(kind="row_wise")})

    def placed(config: ShardingConfig, size: int, local: int) -> dict[str, tuple[str, int | None]]:
        actual = sharding.place(model, hypothetical_world(size, local), config, 64, 1 << 30)
        return {name: (plan.kind, plan.rank) for name, plan in actual.items()}

    actual = placed(everywhere, 8, 4)  # three rows are too few for four ranks
    assert actual == {"a": ("table_row_wise", 0), "b": ("row_wise", None), "few": ("table_wise", 2)}
    assert placed(everywhere, 4, 4)["a"] == ("row_wise", None)
    named = ShardingConfig(tables={"a": TablePlan(kind="table_row_wise", rank=6)})
    assert placed(named, 8, 4)["a"] == ("table_row_wise", 4)
    for config, size, local, message in (
        (everywhere, 6, 4, r"kind=table_row_wise: 6 ranks on machines of 4 each; start as many"),
        (
            ShardingConfig(tables={"few": TablePlan(kind="table_row_wise")}),
            *(8, 4),
            r"few.kind=table_row_wise: 3 rows cut over 4 ranks leave a rank without any",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            placed(config, size, local)


class _Asked(Exception):
    """What TorchRec's planner was asked."""


def _ask(**asked: Any) -> None:
    raise _Asked(asked)


def test_the_planner_may_cut_tables_within_machines_and_groups_where_there_is_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {name: Table(900, (name,)) for name in ("a", "b")}
    model = build_deepfm(tables, list(tables), 0, embedding_dim=3, device=torch.device("meta"))
    monkeypatch.setattr(sharding, "EmbeddingShardingPlanner", _ask)

    def asked(size: int, local: int, device: str = "cuda", **settings: Any) -> dict[str, Any]:
        config = ShardingConfig(**settings)
        every = hypothetical_world(size, local)
        every = dataclasses.replace(every, device=torch.device(device))
        group = sharding.sharding_group(every, config)
        with pytest.raises(_Asked) as caught:
            sharding.place(model, group, config, 64, 1 << 30, replicable=False)
        topology, constraints = (caught.value.args[0][k] for k in ("topology", "constraints"))
        kinds = {name: of_table.sharding_types for name, of_table in constraints.items()}
        return kinds | {"ranks": topology.world_size, "of a machine": topology.local_world_size}

    within = ["table_wise", "row_wise", "table_row_wise"]
    everywhere = {"ranks": 8, "of a machine": 4}
    assert asked(8, 4) == {"a": within, "b": within, **everywhere}
    named = {"a": TablePlan(kind="table_row_wise")}
    assert asked(8, 4, tables=named) == {"a": ["table_row_wise"], "b": within, **everywhere}
    # Two groups of four of eight ranks on two machines: a group has two ranks of each machine.
    grouped = {"ranks": 4, "of a machine": 2}
    assert asked(8, 4, group_size=4) == {"a": within[:2], "b": within[:2], **grouped}
    # On a CPU it may choose neither, and both are refused by name.
    assert asked(8, 4, "cpu") == {"a": within[:2], "b": within[:2], **everywhere}
    for settings, message in (
        ({"kind": "table_row_wise"}, "sharding.kind=table_row_wise: only on CUDA, not on a cpu"),
        ({"tables": named}, "tables.a.kind=table_row_wise: only on CUDA, not on a cpu"),
        ({"group_size": 4}, "sharding.group_size=4: only on CUDA, not on a cpu"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked(8, 4, "cpu", **settings)


def _pipelines(folder: Path) -> list[str]:
    with process_group("cpu") as world:
        run, actual = Run(folder, config_of(*SMALL), world), []
        [kernel] = sharding.fused_kernels(run.sharded)
        for kernel.prefetch_pipeline in (False, True):
            actual.append(type(train_pipeline(run.sharded, run.optimizer, world)).__name__)
        return actual


def test_tables_that_are_fetched_ahead_get_the_pipeline_for_it(sample: PreparedDataset) -> None:
    assert run_alone(_pipelines, sample.folder) == ["TrainPipeline", "PrefetchTrainPipeline"]
