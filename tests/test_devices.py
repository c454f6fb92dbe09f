"""The meta device in a GPU's place: what would mix devices, or make the host wait, shows on a CPU.

A meta tensor has a shape and a device but no values. An operation that takes one together with a
CPU tensor would fail on CUDA; one that needs its values would make the host wait for the GPU.
"""

import ast
import dataclasses
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec.sparse import jagged_tensor

import deepfm_dist
from deepfm_dist.build import deepfm_of, shard_for_training, training_batches
from deepfm_dist.config import load_config
from deepfm_dist.data.batches.batch import Batch
from deepfm_dist.data.batches.collation import Collator
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed import kernels
from deepfm_dist.distributed.optimizers import table_optimizer
from deepfm_dist.distributed.pipeline import (
    PrefetchTrainPipeline,
    TrainPipeline,
)
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.distributed.settings import (
    OptimizerConfig,
    ShardingConfig,
    TableOptimizerConfig,
    TablePlan,
)
from deepfm_dist.distributed.sharding import (
    TableCollection,
    fused_kernels,
    init_tables,
    local_shards,
    shard,
)
from deepfm_dist.distributed.world import World
from deepfm_dist.errors import ConfigError
from deepfm_dist.model.deepfm import InteractionArch, OverArch, Table, build_deepfm
from deepfm_dist.model.losses import DeepFMTrain
from deepfm_dist.ranking import catalogue
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engines import selection
from deepfm_dist.ranking.engines.torch import TorchEngine
from deepfm_dist.ranking.evaluation import RankingEvaluator
from deepfm_dist.training.evaluation import RowEvaluator
from tests.conftest import HISTORY
from tests.ranks import run_alone, run_ranks

META = torch.device("meta")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
_HOME = str(Path(deepfm_dist.__file__).parent)
_READS = {
    "aten._local_scalar_dense.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.masked_select.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten._unique2.default",
}


class DeviceUse(TorchDispatchMode):
    """Notes what a GPU would refuse or be waited for, each with the function that asked for it.

    Attributes:
        mixed: operations on tensors of two devices. A CPU tensor without dimensions may meet any.
        reads: operations whose result depends on values, which the host would wait for.
        copies: copies between devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.reads: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or t.device.type == "meta"}
        name = str(func)
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            target = torch.device(kwargs.get("device") or tensors[0].device)
            source = tensors[-1]
            if source.device.type == "meta" != target.type:
                self.reads.append(_caller())
                return torch.zeros(source.shape, dtype=source.dtype)
            if source.device != target:
                self.copies.append(_caller())
        elif len(devices) > 1:
            self.mixed.append(f"{name} in {_caller()}")
        if "meta" in devices and name in _READS:
            self.reads.append(_caller())
            if name == "aten._local_scalar_dense.default":
                return 0.5 if tensors[0].dtype.is_floating_point else 0
        return func(*args, **kwargs)


def _caller() -> str:
    """The innermost function of this package on the stack, as ``model/pairs.py sides``."""
    stack = traceback.extract_stack()
    frames = [f for f in stack if f.filename.startswith(_HOME) and f.name != "to_host"]
    if not frames:
        return "torch or torchrec"
    return f"{Path(frames[-1].filename).relative_to(_HOME)} {frames[-1].name}"


class NoDDP(nn.parallel.DistributedDataParallel):
    """In the place of DDP, which compares the ranks' parameters when it is made."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def _build_params_for_reducer(self) -> Any:
        return [], []


@contextmanager
def fake_world(size: int) -> Iterator[World]:
    """Rank 0 of some ranks on the meta device, whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, size, 0, META, dist.HashStore())
    finally:
        dist.destroy_process_group()


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the meta device through where only names of devices stand in the way."""

    def pooled(self: Any, indices: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
        features = len(self.D_offsets) - 1
        shape = (len(offsets) - 1) // features, features * self.max_D
        return torch.zeros(shape, device=META, requires_grad=True)

    for lookup in (SplitTableBatchedEmbeddingBagsCodegen, DenseTableBatchedEmbeddingBagsCodegen):
        monkeypatch.setattr(lookup, "forward", pooled)
    # Of the fused optimizers, torch has kernels for devices that compute alone.
    sgd = import_module("torch.optim.sgd")
    monkeypatch.setattr(sgd, "_device_dtype_check_for_fused", lambda _: None)
    monkeypatch.setattr(sgd, "_fused_sgd", lambda *_, **__: None)
    monkeypatch.setattr("torchrec.distributed.model_parallel.DistributedDataParallel", NoDDP)
    monkeypatch.setitem(catalogue.PAIRS_PER_STEP, "meta", 1 << 10)


def small_model() -> DeepFMTrain:
    """With everything that has parameters or buffers: norms, numbers, vectors, pooled fields."""
    return DeepFMTrain(
        build_deepfm(
            {"user": Table(100, ("user",)), "item": Table(50, ("item", "seen"))},
            ["user", "item", "seen"],
            2,
            7,
            over_arch=lambda n: OverArch(n, [4, 3], batch_norm=True),
            pooling={"seen": "sqrt"},
            device=META,
            is_item_field=[False, True, False, False, True, True],
            vectors={"text": 5},
        )
    )


def optimizers(**tables: Any) -> OptimizerConfig:
    return OptimizerConfig(tables=TableOptimizerConfig(**tables))


def placed_on(size: int, optimizer: str) -> dict[str, str]:
    with fake_world(size) as world:
        tables = table_optimizer(optimizers(name=optimizer), CPU)
        task = small_model()
        tables.attach(task.model.embedding_arch.ebc.parameters())
        last = TablePlan(kind="table_wise", rank=size - 1)
        config = ShardingConfig(tables={"user": TablePlan(kind="row_wise"), "item": last})
        sharded, _ = shard(task, world, config, tables)
        tensors = [*sharded.named_parameters(), *sharded.named_buffers()]
        return {name: t.device.type for name, t in tensors if t.numel()}


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("size", [1, 2])
def test_every_parameter_and_buffer_is_on_the_device(meta: None, size: int, optimizer: str) -> None:
    places = run_alone(placed_on, size, optimizer)
    assert any(name.endswith("running_var") for name in places)
    assert any(name.endswith("power_F") for name in places)
    assert {name for name, device in places.items() if device != "meta"} == set()


STEPS = {
    "rows": [],
    "batch norm": ["model.batch_norm=true"],
    "histories": [*HISTORY],
    "adam": ["optimizer.tables={name: adam, max_gradient: 0.1}"],
    "softmax": [*HISTORY, "trainer.loss=softmax", "model.deep=false"],
    "softmax, deep": [*HISTORY, "trainer.loss=softmax", "trainer.candidates=32"],
    "bpr": [*HISTORY, "trainer.loss=bpr", "trainer.candidates=32"],
}


def create_input_dist(sharded: nn.Module, keys: list[str]) -> None:
    """What the first forward pass does, which also checks values."""
    for module in sharded.modules():
        if hasattr(module, "_has_uninitialized_input_dist"):
            module._create_input_dist(keys)
            module._has_uninitialized_input_dist = False


def device_use_of_a_step(folder: Path, overrides: list[str]) -> DeviceUse:
    """What two steps of a model on the meta device do, after one that makes what is kept."""
    config = load_config("sample", [*overrides, "optimizer.dense.name=sgd"])
    dataset = PreparedDataset(folder)
    with fake_world(1) as world:
        on_cpu = dataclasses.replace(world, device=CPU)
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        batch = next(iter(training_batches(config, dataset, on_cpu).steps(1, 1))).to(META)
        create_input_dist(sharded, batch.sparse.keys())
        sharded.train()
        pipeline = TrainPipeline(sharded, optimizer, world, config=config.optimizer)
        use, stream = DeviceUse(), iter([batch] * 3)
        for step in range(3):
            with use if step else DeviceUse():
                pipeline.train_step(stream)
        return use


@pytest.mark.parametrize("name", STEPS)
def test_a_step_mixes_no_devices_and_waits_for_nothing(
    meta: None, name: str, sample: PreparedDataset, with_history: PreparedDataset
) -> None:
    dataset = with_history if STEPS[name][: len(HISTORY)] == [*HISTORY] else sample
    use = run_alone(device_use_of_a_step, dataset.folder, STEPS[name])
    assert use.mixed == []
    assert use.copies == use.reads == []


class Exchange:
    """An exchange that is over."""

    def wait(self) -> bool:
        return True


def device_use_of_two_ranks(folder: Path, kind: str) -> tuple[DeviceUse, list[str]]:
    """What two steps in the pipeline of rank 0 do, and which sizes of ids are read from the device.

    The other rank is thought to send what this one does.
    """
    config = load_config("sample", [f"sharding.kind={kind}", "optimizer.dense.name=sgd"])
    dataset, sizes_read = PreparedDataset(folder), []
    length_per_key = jagged_tensor._maybe_compute_length_per_key

    def exchanged(output: Tensor, input: Tensor, *_: Any, **__: Any) -> Exchange:
        if input.device == CPU:
            output.copy_(input)
        return Exchange()

    def computed(**known: Any) -> list[int]:  # on meta TorchRec makes them up
        if known["length_per_key"] is None and known["values"].is_meta:
            sizes_read.append(_caller())
        return length_per_key(**known)

    module = torch.get_device_module
    with pytest.MonkeyPatch.context() as patch, fake_world(2) as world:
        patch.setattr(dist, "all_to_all_single", exchanged)
        patch.setattr(dist, "all_reduce", lambda *_, **__: None)
        patch.setattr(jagged_tensor, "_maybe_compute_length_per_key", computed)
        patch.setattr(torch, "get_device_module", lambda d: torch.cpu if d == META else module(d))
        on_cpu = dataclasses.replace(world, device=CPU)
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        batches = training_batches(config, dataset, on_cpu).steps(1, 5)
        batch = next(iter(batches)).to(META)
        create_input_dist(sharded, batch.sparse.keys())
        sharded.train()
        pipeline = TrainPipeline(sharded, optimizer, world, config=config.optimizer)
        assert pipeline._overlapped
        use, stream = DeviceUse(), iter([batch] * 5)
        for step in range(3):
            sizes_read.clear()
            with use if step else DeviceUse():
                pipeline.train_step(stream)
        return use, list(sizes_read)


@pytest.mark.parametrize(("kind", "reads"), [("table_wise", 0), ("row_wise", 1)])
def test_the_host_exchanges_sizes_of_ids_without_waiting_for_the_device(
    meta: None, sample: PreparedDataset, kind: str, reads: int
) -> None:
    use, sizes_read = run_alone(device_use_of_two_ranks, sample.folder, kind)
    assert use.mixed == use.reads == use.copies == []
    assert len(sizes_read) == reads  # rows are cut by id: how many go where, the device counts


def test_batches_for_cuda_are_pinned_by_the_threads_that_make_them(
    sample: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(
        Batch, "pin_memory", lambda _: threads.append(threading.current_thread().name)
    )
    world = World(0, 1, 1, 0, CUDA, dist.HashStore())
    config = load_config("sample", ["trainer.reading_threads=1", "data.on_device=false"])
    assert list(training_batches(config, sample, world).steps(1, 2)) == [None, None]
    assert [name.startswith("read_ahead") for name in threads] == [True, True]


@pytest.mark.parametrize(("rows", "few"), [(8191, True), (8192, False)])
def test_few_rows_per_gpu_are_warned_of(
    sample: PreparedDataset, caplog: pytest.LogCaptureFixture, rows: int, few: bool
) -> None:
    config = load_config("sample", ["data.on_device=false", f"trainer.batch_size={4 * rows}"])
    training_batches(config, sample, World(0, 4, 4, 0, CUDA, dist.HashStore()))
    warning = f"{rows:,} rows per GPU in a step, too few to keep it busy"
    assert any(warning in r.getMessage() for r in caplog.records) == few


@pytest.mark.parametrize("layers", [[30, 20, 10], [400], [], None])
@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_engines_are_made_and_score_on_the_models_device(
    meta: None, kind: str, layers: list[int] | None
) -> None:
    with META:
        over = None if layers is None else OverArch(50, layers)
        arch = InteractionArch(1, 10, over_arch=over, vectors={"text": 5}).eval()
        rows, first, dense = torch.zeros(9, 3, 10), torch.zeros(9, 3), torch.zeros(9, 6)
    with DeviceUse() as made:
        scorer = CatalogueScorer(arch, [False, True, True, False, True], 3)
        assert scorer.layers is not None
        if kind == "triton":
            triton = pytest.importorskip("deepfm_dist.ranking.engines.triton")
            engine = triton.TritonEngine(scorer.layers, "fp32", META)
            assert {engine._weights.device, engine._biases.device, engine._output.device} == {META}
        else:
            engine = TorchEngine(scorer)
    assert made.mixed == []
    with DeviceUse() as use:
        users, items = (scorer.side(side, rows, first, dense) for side in ("user", "item"))
        packed = engine.allocate(9, items)
        engine.fill(packed, 0, items)
        prepared = engine.users([users])
        if kind == "torch":
            engine.scores(prepared, 9, packed)
            places = torch.zeros(9, 2, dtype=torch.int64, device=META)
            scorer.scores_of_pairs(users, items, places)
    assert use.mixed == use.reads == use.copies == []


def device_use_of_ranking(folder: Path, overrides: list[str]) -> DeviceUse:
    """What ranking the whole catalogue and evaluating rows do with a model on the meta device."""
    config = load_config("sample", overrides)
    dataset = PreparedDataset(folder)
    with fake_world(1) as world:
        sharded, _ = shard_for_training(config, dataset.manifest, world)
        sharded.eval()
        create_input_dist(sharded, Collator(dataset)(None, np.ones(1, np.int32)).sparse.keys())
        held_out = RankingEvaluator(dataset, "valid", {})
        rows = RowEvaluator(dataset, "valid")
        with DeviceUse() as use:
            ranker = held_out.ranker(deepfm_of(sharded), world)
            for chosen in (ranker, ranker.for_users(held_out.users, 50)):
                held_out.measure(chosen, [10], world)
            ranker.scores(0, 3, 3)
            ranker.item_vectors()
            rows.measure(sharded, world)
    return use


@pytest.mark.parametrize("name", ["rows", "histories"])
def test_ranking_and_evaluation_mix_no_devices(
    meta: None,
    sample: PreparedDataset,
    with_history: PreparedDataset,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(selection, "find_spec", lambda _: None)  # a kernel needs values
    dataset = with_history if name == "histories" else sample
    use = run_alone(device_use_of_ranking, dataset.folder, STEPS[name])
    assert use.mixed == []
    # Rankings and scores go to the host, where they are written; a bias is read once for a model.
    assert set(use.reads) == {
        "ranking/catalogue.py __init__",
        "ranking/ranker.py best",
        "ranking/ranker.py scores",
        "distributed/inference.py score_rows",
    }


COPIES = {
    "distributed/world.py to_host",
    "doctor.py _check_collectives",
    "doctor.py _check_table_update",
    "ranking/ranker.py best",  # of scores that wait for no other rank
}
"""Where the host may wait for a copy: a lost rank is noticed in `World.to_host` alone."""


def test_copies_to_the_host_notice_a_lost_rank() -> None:
    actual = set()
    for path in Path(_HOME).rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = (n.func for n in ast.walk(function) if isinstance(n, ast.Call))
                if any(isinstance(f, ast.Attribute) and f.attr == "cpu" for f in calls):
                    actual.add(f"{path.relative_to(_HOME)} {function.name}")
    assert actual == COPIES


def test_tables_on_cuda_leave_the_cpus_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []
    monkeypatch.setattr(kernels, "register", lambda: registered.append(True))
    for device in (CUDA, CPU):
        tables = small_model().model.embedding_arch.ebc.parameters()
        table_optimizer(OptimizerConfig(), device).attach(tables)
        assert len(registered) == (device == CPU)


# By the optimizer's name: weight decay and its mode. The CPU build of FBGEMM makes no lazy_adam.
DECAY = [
    ("rowwise_adagrad", {}, (0.0, WeightDecayMode.NONE)),
    ("rowwise_adagrad", {"l2": 0.25}, (0.25, WeightDecayMode.L2)),
    ("adagrad", {}, (0.0, WeightDecayMode.NONE)),
    ("sgd", {}, (0.0, WeightDecayMode.NONE)),
]


def arguments_of_fbgemm(name: str, options: dict[str, float]) -> dict[str, Any]:
    with fake_world(1) as world:
        tables = table_optimizer(optimizers(name=name, lr=0.5, eps=1e-6, **options), CUDA)
        task = small_model()
        tables.attach(task.model.embedding_arch.ebc.parameters())
        sharded, _ = shard(task, world, ShardingConfig(), tables)
        [kernel] = fused_kernels(sharded)
        return {**kernel.optimizer_args._asdict(), "rate": kernel.get_learning_rate()}


@pytest.mark.parametrize(("name", "options", "decay"), DECAY)
def test_fbgemm_gets_the_optimizers_settings(
    meta: None, name: str, options: dict[str, float], decay: tuple[float, WeightDecayMode]
) -> None:
    actual = run_alone(arguments_of_fbgemm, name, options)
    assert actual["rate"] == 0.5
    assert name == "sgd" or actual["eps"] == 1e-6
    assert (actual["weight_decay"], actual["weight_decay_mode"]) == (decay[0], decay[1].value)
    assert not actual["gradient_clipping"]


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("lazy_adam", {"l2": 0.1}, "lazy_adam would shrink rows by lr . l2 instead"),
        ("adagrad", {"l2": 0.1}, "adagrad on cuda ignores it; use adam, or rowwise_adagrad on"),
        ("sgd", {"l2": 0.1}, "sgd on cuda ignores it"),
        *(
            (name, {"max_gradient": 0.1}, "bounds the gradient of each look-up instead of their")
            for name in ("rowwise_adagrad", "adagrad", "sgd", "lazy_adam")
        ),
    ],
)
def test_what_fbgemm_would_do_otherwise_is_refused(
    name: str, option: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        table_optimizer(optimizers(name=name, **option), CUDA)


@dataclasses.dataclass
class CachedKernel:
    """What an FBGEMM kernel with cached rows knows of its cache."""

    lxu_cache_locking_counter: list[int]
    lxu_cache_locations: list[int]
    prefetch_pipeline: bool = True


def unlocked(folder: Path, poisoned: bool) -> list[list[int]]:
    """Rows that are unlocked by a step, and by a validation after it."""
    counters: list[list[int]] = []
    kernel = CachedKernel([1, 1], [0, 1])

    def decrement(counter: list[int], locations: list[int]) -> None:
        for place in locations:
            counter[place] -= 1

    torch.ops.fbgemm.lxu_cache_locking_counter_decrement = decrement
    config = load_config("sample", [])
    dataset = PreparedDataset(folder)
    with process_group("cpu") as world:
        sharded, optimizer = shard_for_training(config, dataset.manifest, world)
        batch: Any = next(iter(training_batches(config, dataset, world).steps(1, 1)))
        if poisoned:
            batch = dataclasses.replace(batch, labels=batch.labels * float("nan"))
        pipeline = PrefetchTrainPipeline(sharded, optimizer, world)
        sharded.train()
        sharded(batch)  # which makes the exchanges
        TableCollection.fused_kernels = property(lambda self: [kernel])  # type: ignore[assignment]
        loss, _ = pipeline._forward(batch)
        loss.backward()
        counters.append(list(kernel.lxu_cache_locking_counter))
        with torch.no_grad():
            sharded.eval()(batch)
        counters.append(list(kernel.lxu_cache_locking_counter))
    return counters


def test_cached_rows_are_unlocked_where_no_backward_pass_does_it(sample: PreparedDataset) -> None:
    assert run_alone(unlocked, sample.folder, poisoned=False) == [[1, 1], [0, 0]]
    assert run_alone(unlocked, sample.folder, poisoned=True) == [[0, 0], [-1, -1]]


def initialised(threads: int) -> list[np.ndarray]:
    with process_group("cpu") as world:
        tables = table_optimizer(OptimizerConfig(), CPU)
        model = build_deepfm({"user": Table(30_000, ("user",))}, ["user"], 0, 3, device=META)
        tables.attach(model.embedding_arch.ebc.parameters())
        sharded, _ = shard(model, world, ShardingConfig(kind="row_wise"), tables)
        init_tables(sharded, 4, 0.5, seed=3, threads=threads)
        return [piece.numpy().copy() for *_, piece in local_shards(sharded)]


def test_threads_and_ranks_change_no_initial_row() -> None:
    [[alone]] = run_ranks(initialised, 1, 1)
    assert abs(alone.std() - 0.5) < 0.01
    assert len(np.unique(alone)) > 0.99 * alone.size
    for size, threads in ((1, 3), (2, 2)):
        pieces = [piece for [piece] in run_ranks(initialised, size, threads)]
        assert np.array_equal(np.concatenate(pieces), alone)
