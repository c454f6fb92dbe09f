"""TorchRec's pipeline, which CUDA takes, against the plain loop that a CPU takes: both on CPU."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec import KeyedTensor

from deepfm_dist.build import shard_for_training, training_batches
from deepfm_dist.config import Config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.pipeline import TrainPipeline
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.sharding import set_table_steps
from deepfm_dist.model import deepfm, kernels
from deepfm_dist.model.dropout import begin_step, row_dropouts
from tests.conftest import HISTORY
from tests.ranks import run_alone, run_ranks
from tests.steps import COPIES, SMALL, config_of

POISONED = 7
STRETCHES = ((1, 6), (7, 12))


def losses(folder: Path, config: Config, overlapped: bool, deferred: bool) -> list[float]:
    """Twelve steps, the seventh with a NaN in a label, with a validation in between."""
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        batches = training_batches(config, dataset, world)
        parts = config.trainer.accumulate_steps
        pipeline = TrainPipeline(
            sharded,
            optimizer,
            world,
            parts,
            config.optimizer,
            overlapped=overlapped,
            deferred=deferred,
        )
        assert pipeline.deferred is deferred

        def pieces(first: int, last: int) -> Iterator[Any]:
            for step, batch in enumerate(batches.steps(first, last), first):
                whole: Any = batch
                if step == POISONED and world.rank == world.world_size - 1:
                    field = "labels" if hasattr(batch, "labels") else "target_weights"
                    value = getattr(batch, field) * math.nan
                    whole = dataclasses.replace(whole, **{field: value})
                yield from whole.split(parts)

        taken, dropouts = [], row_dropouts(sharded)
        for first, last in STRETCHES:
            stream = pieces(first, last)
            sharded.train()
            for step in range(first, last + 1):
                begin_step(dropouts, 1, step)
                taken.append(pipeline.train_step(stream))
            pipeline.detach()
            sharded.eval()
            with torch.no_grad():
                sharded(next(iter(training_batches(rows_of(config), dataset, world).steps(1, 1))))
            set_table_steps(sharded, last)
        return [step.loss for step in taken]


def rows_of(config: Config) -> Config:
    trainer = config.trainer.model_copy(update={"loss": "bce", "candidates": None})
    return config.model_copy(update={"trainer": trainer})


CASES = {
    "rows": [],
    "batch norm and dropout, table-wise": [
        *("model.batch_norm=true", "model.dropout=0.2"),
        *("sharding.kind=table_wise", "trainer.batch_size=1000"),
    ],
    "accumulated": [
        "trainer.accumulate_steps=2",
        "optimizer.tables={name: adam, lr: 0.003}",
        "optimizer.max_norm=0.1",
    ],
    "softmax": [*HISTORY, "trainer.loss=softmax", "trainer.batch_size=61"],
}


KINDS = [(False, False), (True, False), (False, True), (True, True)]
"""Whether batches pass TorchRec's pipeline, and whether the host reads losses late."""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_gives_the_losses_of_the_loop_bit_for_bit(
    sample: PreparedDataset, with_history: PreparedDataset, case: str, size: int
) -> None:
    folder = (with_history if case == "softmax" else sample).folder
    config = config_of(*SMALL, "trainer.batch_size=999", *CASES[case])
    loop, *others = (run_ranks(losses, size, folder, config, *kind) for kind in KINDS)
    assert math.isnan(loop[0][POISONED - 1])
    assert sum(map(math.isfinite, loop[0])) == len(loop[0]) - 1
    assert len(set(loop[0])) == len(loop[0])
    for other in others:
        assert list(map(repr, other)) == list(map(repr, loop))


def trained(folder: Path, config: Config, poisoned: str | None, device_decides: bool) -> Any:
    """All weights and states of optimizers after batches 1 and 3, or 1, a poisoned 2, and 3."""
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        pipeline = TrainPipeline(
            sharded, optimizer, world, 1, config.optimizer, deferred=device_decides
        )
        batches: list[Any] = list(training_batches(config, dataset, world).steps(1, 3))
        if poisoned is None:
            del batches[1]
        else:
            value = getattr(batches[1], poisoned) * math.inf
            batches[1] = dataclasses.replace(batches[1], **{poisoned: value})
        stream = iter(batches)
        finite = [pipeline.train_step(stream).is_finite for _ in batches]
        assert finite.count(False) == (poisoned is not None)
        states = {
            f"{k}.{n}": v for k, s in optimizer.state_dict()["state"].items() for n, v in s.items()
        }
        tensors = {**sharded.state_dict(), **states}
        return {
            name: (t.to_local().local_shards()[0] if hasattr(t, "to_local") else t).clone().numpy()
            for name, t in tensors.items()
        }


OPTIMIZERS = {
    "rowwise_adagrad": ("rowwise_adagrad", "{name: adam, l2: 0.1}"),
    "adagrad": ("adagrad", "{name: adagrad, l2: 0.1}"),
    "sgd": ("sgd", "{name: sgd, l2: 0.1}"),
    "adam": ("adam", "{name: adam, max_norm: 0.01}"),
}


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace_in_weights_and_optimizers(
    sample: PreparedDataset, optimizer: str, device_decides: bool
) -> None:
    tables, dense = OPTIMIZERS[optimizer]
    config = config_of(
        *SMALL,
        "trainer.batch_size=999",
        "model.batch_norm=true",
        f"optimizer.tables.name={tables}",
        f"optimizer.dense={dense}",
    )
    expected = run_alone(trained, sample.folder, config, None, False)
    for field in ("weights", "labels"):
        found = run_alone(trained, sample.folder, config, field, device_decides)
        assert found.keys() == expected.keys()
        assert any("running_mean" in name for name in found)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_a_skipped_step_leaves_no_trace_in_copies_of_tables(
    sample: PreparedDataset, optimizer: str
) -> None:
    """At two ranks, which each have all of the tables."""
    config = config_of(
        *SMALL, COPIES, "trainer.batch_size=999", f"optimizer.tables.name={optimizer}"
    )
    expected = run_ranks(trained, 2, sample.folder, config, None, False)
    for device_decides in (False, True):
        found = run_ranks(trained, 2, sample.folder, config, "weights", device_decides)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


# Operations that launch nothing on a GPU: another view of the same memory, or a question.
_FREE = (
    *("view", "detach", "expand", "slice", "select", "transpose", "squeeze", "as_strided"),
    *("aten.t.", "split", "alias", "permute", "is_pinned", "prim.", "sym_", "unbind", "lift_fresh"),
    "profiler.",
)


class Operations(TorchDispatchMode):
    """Counts what is called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_looked_up_rows_are_only_permuted_where_their_order_differs() -> None:
    pooled = KeyedTensor(["a", "b"], [4, 4], torch.arange(16.0).view(2, 8))
    with Operations() as found:
        assert deepfm._in_order(pooled, ["a", "b"]) is pooled.values()
    assert found.counts == {}
    swapped = deepfm._in_order(pooled, ["b", "a"])  # makes the permutation, which is kept
    assert swapped.tolist() == [[4, 5, 6, 7, 0, 1, 2, 3], [12, 13, 14, 15, 8, 9, 10, 11]]
    with Operations() as found:
        deepfm._in_order(pooled, ["b", "a"])
    assert [name for name in found.counts if "permute_pooled" not in name] == []


def operations(folder: Path, config: Config, overlapped: bool) -> dict[str, int]:
    """Of the sixth step, as CUDA takes it: without the kernels that only a CPU has."""
    kernels.can_take = lambda _: False
    with process_group("cpu") as world:
        dataset = PreparedDataset(folder)
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        stream = iter(training_batches(config, dataset, world).steps(1, 9))
        pipeline = TrainPipeline(sharded, optimizer, world, overlapped=overlapped, deferred=True)
        for _ in range(5):
            pipeline.train_step(stream)
        with Operations() as found:
            pipeline.train_step(stream)
        pipeline.detach()
        return dict(found.counts)


MOST = {(1, False): 71, (1, True): 74, (2, False): 96, (2, True): 96}
"""Operations of a step by world size and pipeline. Lower them with the code; a higher one needs
a reason."""


@pytest.mark.parametrize(("size", "overlapped"), MOST)
def test_a_step_takes_no_more_operations_than_it_did(
    sample: PreparedDataset, size: int, overlapped: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    counts = run_ranks(operations, size, sample.folder, config_of(*SMALL), overlapped)[0]
    working = {k: n for k, n in counts.items() if not any(free in k for free in _FREE)}
    assert sum(working.values()) <= MOST[size, overlapped], sorted(working.items())
    assert "reducer.cpp" not in capfd.readouterr().err  # it remarks on searches for unused weights


COLLECTIVES = {
    ("row_wise", False): 7,
    ("row_wise", True): 13,
    ("replicated", False): 2,
    ("replicated", True): 8,
}
"""Of a step at two ranks, by kind of all tables and whether three layers have batch norm. With
replicated tables: DDP's bucket, and the loss with a flag for values that are not finite. Each norm
adds one collective for its statistics and one for their gradients."""


@pytest.mark.parametrize(("kind", "batch_norm"), COLLECTIVES)
def test_a_step_takes_no_more_collectives_than_it_did(
    sample: PreparedDataset, kind: str, batch_norm: bool
) -> None:
    placed = COPIES if kind == "replicated" else f"sharding.kind={kind}"
    config = config_of(*SMALL, placed, f"model.batch_norm={batch_norm}")
    assert len(config.model.over_arch_layer_sizes or ()) == 3
    for counts in run_ranks(operations, 2, sample.folder, config, False):
        taken = {name: n for name, n in counts.items() if name.startswith("c10d.")}
        assert 0 < sum(taken.values()) <= COLLECTIVES[kind, batch_norm], taken
