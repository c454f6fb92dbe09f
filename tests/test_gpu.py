"""What only a GPU can show; skipped without one, but where a CPU can run a test's body as well.

Ranks on a GPU are spawned: asking whether there is one initialises CUDA here, and no process that
is forked from this one could use it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fbgemm_gpu
import pytest
import torch

from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.pipeline import train_pipeline
from deepfm_dist.distributed.process_group import process_group
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.types import Precision
from tests.distributed.checkpoints import resumed, trained_through
from tests.kernel_cases import Case, Ranking, error_of
from tests.ranking.cases import COLUMNS_OF_ITEM, N_CATEGORICAL, OF_ITEM, random_arch
from tests.ranks import run_ranks
from tests.steps import SMALL, Run, config_of, difference

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or getattr(fbgemm_gpu, "__variant__", "cpu") != "cuda",
        reason="needs a CUDA device and the CUDA build of fbgemm",
    ),
]
CACHED = "sharding.tables={user: {cached: 0.1}, item: {cached: 0.5}}"
CUT = "sharding.tables={user: {kind: row_wise}}"
"""What a CPU has in place of cached tables: another plan."""


def needs_cuda(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CUDA:
        test = mark(test)
    return test


def on_cuda(*values: object) -> object:
    return pytest.param("cuda", *values, marks=CUDA)


def run_on(device: str, work: Callable[..., Any], *args: Any, size: int = 1) -> list[Any]:
    """`run_ranks` on GPUs or on CPU; what ``work`` returned, by rank."""
    return run_ranks(work, size, *args, device, spawn=device == "cuda")


def losses_of(folder: Path, optimizer: str, device: str) -> list[float]:
    config = load_config("sample", [f"optimizer.tables.name={optimizer}"])
    with process_group(device) as world:
        return Run(folder, config, world).losses(1, 20)


@needs_cuda
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_cuda_kernels_give_the_cpus_losses(sample: PreparedDataset, optimizer: str) -> None:
    [on_cpu], [on_gpu] = (
        run_on(device, losses_of, sample.folder, optimizer) for device in ("cpu", "cuda")
    )
    assert difference(on_gpu, on_cpu) <= 1e-4


def test_spawned_ranks_are_those_that_are_forked(sample: PreparedDataset) -> None:
    job = losses_of, 2, sample.folder, "rowwise_adagrad", "cpu"
    assert run_ranks(*job, spawn=True) == run_ranks(*job)


@needs_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(sample: PreparedDataset) -> None:
    [alone] = run_on("cuda", losses_of, sample.folder, "rowwise_adagrad")
    for losses in run_on("cuda", losses_of, sample.folder, "rowwise_adagrad", size=2):
        assert difference(losses, alone) <= 1e-5


def losses_with(
    folder: Path, settings: list[str], stretches: list[tuple[int, int]], device: str
) -> tuple[list[float], str]:
    """Losses of stretches of steps, and the name of the pipeline."""
    config = load_config("sample", settings)
    with process_group(device, deterministic=config.run.deterministic) as world:
        run = Run(folder, config, world)
        losses = [loss for first, last in stretches for loss in run.losses(first, last)]
        return losses, type(train_pipeline(run.sharded, run.optimizer, world)).__name__


@pytest.mark.parametrize("stretches", [[(1, 20)], [(1, 1), (2, 9), (10, 20)]])
@pytest.mark.parametrize(
    ("device", "optimizer", "plan", "most"),
    [
        on_cuda("rowwise_adagrad", CACHED, 1e-5),
        on_cuda("lazy_adam", CACHED, 1e-4),  # whose first steps are as long whatever the gradient
        ("cpu", "rowwise_adagrad", CUT, 1e-5),
    ],
)
def test_tables_in_the_machines_memory_train_like_those_on_the_gpu(
    sample: PreparedDataset,
    device: str,
    optimizer: str,
    plan: str,
    most: float,
    stretches: list[tuple[int, int]],
) -> None:
    settings = [f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"]
    [(whole, _)] = run_on(device, losses_with, sample.folder, settings, [(1, 20)])
    [(losses, used)] = run_on(device, losses_with, sample.folder, [*settings, plan], stretches)
    assert difference(losses, whole) <= most
    assert used == ("PrefetchTrainPipeline" if device == "cuda" else "TrainPipeline")


@pytest.mark.parametrize(
    ("device", "optimizer"),
    [
        *(on_cuda(name) for name in ("rowwise_adagrad", "lazy_adam", "adam")),
        ("cpu", "rowwise_adagrad"),
    ],
)
def test_deterministic_training_repeats_itself_bit_for_bit(
    sample: PreparedDataset, device: str, optimizer: str
) -> None:
    settings = ["run.deterministic=true", f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"]
    first, second = (
        run_on(device, losses_with, sample.folder, settings, [(1, 30)])[0][0] for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("device", "optimizer", "plan"),
    [
        *(on_cuda(name, CUT) for name in ("rowwise_adagrad", "lazy_adam", "adam")),
        *(on_cuda(name, CACHED) for name in ("rowwise_adagrad", "lazy_adam")),
        ("cpu", "rowwise_adagrad", CUT),
    ],
)
def test_a_resumed_run_is_identical_bit_for_bit(
    sample: PreparedDataset, tmp_path: Path, device: str, optimizer: str, plan: str
) -> None:
    tables = f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"
    config = config_of(*SMALL, tables, plan, "run.deterministic=true")
    [whole] = run_on(device, trained_through, sample.folder, config, tmp_path)
    assert run_on(device, resumed, sample.folder, config, tmp_path) == [whole[20:]]


@needs_cuda
def test_catalogue_scores_on_cuda_equal_the_cpus() -> None:
    arch, actual = random_arch(1, (30, 20, 10), custom=False, batch_norm=True), []
    shapes = (N_CATEGORICAL, 5), (N_CATEGORICAL,), (len(COLUMNS_OF_ITEM),)
    sides = [[torch.randn(n, *shape) for shape in shapes] for n in (7, 11)]
    for device in ("cpu", "cuda"):
        scorer = CatalogueScorer(arch.to(device), OF_ITEM, N_CATEGORICAL)
        users, items = ([tensor.to(device) for tensor in side] for side in sides)
        scores = scorer.scores(scorer.side("user", *users), scorer.side("item", *items))
        actual.append(scores.cpu())
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-5, atol=1e-5)


def ranked_on_cuda(case: Case, precision: Precision, n_users: int, n_items: int) -> Ranking:
    from deepfm_dist.ranking.engines.triton import TritonEngine

    engine = TritonEngine(case.layers, precision, torch.device("cuda"))
    return Ranking(case.to("cuda"), n_users, n_items, engine)


SIZES = [[], [30], [30, 20, 10], [3, 17, 1, 8], [400, 400, 400], [300, 200, 100, 50], [600, 700]]


@needs_cuda
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("tf32", 5e-3), ("bf16", 2e-2)])
def test_the_triton_kernel_ranks_by_the_models_scores(
    sizes: list[int], precision: Precision, error: float
) -> None:
    case = Case.of(70, 3000, 20, sizes, seed=7)
    ranking = ranked_on_cuda(case, precision, 70, 3000)
    assert error_of(ranking.scores(), case.expected(70, 3000)) <= error
    ranking.check(10, (1024,))


@needs_cuda
@pytest.mark.parametrize("k", [1, 100, 500, 1000])
def test_the_triton_kernel_ranks_any_number_of_items_per_user(k: int) -> None:
    case = Case.of(40, 1200, 200, [30, 20, 10], seed=8, ties=True)
    ranked_on_cuda(case, "fp32", 40, 1200).check(k)
