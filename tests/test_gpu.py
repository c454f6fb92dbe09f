"""What only a GPU can show; skipped without one."""

import fbgemm_gpu
import pytest
import torch

from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.world import world
from deepfm_dist.ranking.catalogue import CatalogueScorer
from deepfm_dist.ranking.engine import Precision
from tests.ranks import run_alone, run_ranks
from tests.test_distributed import Run, difference
from tests.test_kernel import Case, Ranking, error_of
from tests.test_ranking import N_CATEGORICAL, N_DENSE, OF_ITEM, random_arch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or getattr(fbgemm_gpu, "__variant__", "cpu") != "cuda",
        reason="needs a CUDA device and the CUDA build of fbgemm",
    ),
]


def losses_on(device: str, dataset: PreparedDataset, optimizer: str) -> list[float]:
    config = load_config("sample", [f"optimizer.tables.name={optimizer}"])
    with world(device) as ranks:
        return Run(dataset.folder, config, ranks).losses(1, 20)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd", "adam"])
def test_cuda_kernels_give_the_cpus_losses(sample: PreparedDataset, optimizer: str) -> None:
    on_cpu = run_alone(losses_on, "cpu", sample, optimizer)
    assert difference(run_alone(losses_on, "cuda", sample, optimizer), on_cpu) <= 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_losses_of_one(sample: PreparedDataset) -> None:
    alone = run_alone(losses_on, "cuda", sample, "rowwise_adagrad")
    for losses in run_ranks(losses_on, 2, "cuda", sample, "rowwise_adagrad"):
        assert difference(losses, alone) <= 1e-5


CACHED = "sharding.tables={user: {cached: 0.1}, item: {cached: 0.5}}"


def losses_with(
    dataset: PreparedDataset, settings: list[str], stretches: list[tuple[int, int]]
) -> list[float]:
    config = load_config("sample", settings)
    with world("cuda", deterministic=config.run.deterministic) as ranks:
        run = Run(dataset.folder, config, ranks)
        return [loss for first, last in stretches for loss in run.losses(first, last)]


@pytest.mark.parametrize("stretches", [[(1, 20)], [(1, 1), (2, 9), (10, 20)]])
def test_tables_in_the_machines_memory_train_like_those_on_the_gpu(
    sample: PreparedDataset, stretches: list[tuple[int, int]]
) -> None:
    whole = run_alone(losses_with, sample, [], [(1, 20)])
    assert difference(run_alone(losses_with, sample, [CACHED], stretches), whole) <= 1e-5


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_deterministic_training_repeats_itself_bit_for_bit(
    sample: PreparedDataset, optimizer: str
) -> None:
    settings = ["run.deterministic=true", f"optimizer.tables={{name: {optimizer}, lr: 0.003}}"]
    first, second = (run_alone(losses_with, sample, settings, [(1, 30)]) for _ in range(2))
    assert first == second


def test_catalogue_scores_on_cuda_equal_the_cpus() -> None:
    arch, found = random_arch(1, (30, 20, 10), custom=False, batch_norm=True), []
    sides = [
        [torch.randn(n, N_CATEGORICAL, 5), torch.randn(n, N_CATEGORICAL), torch.randn(n, N_DENSE)]
        for n in (7, 11)
    ]
    for device in ("cpu", "cuda"):
        scorer = CatalogueScorer(arch.to(device), OF_ITEM, N_CATEGORICAL)
        users, items = ([tensor.to(device) for tensor in side] for side in sides)
        scores = scorer.scores(scorer.side("user", *users), scorer.side("item", *items))
        found.append(scores.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def on_cuda(case: Case, precision: Precision, n_users: int, n_items: int) -> Ranking:
    from deepfm_dist.ranking.triton_kernel import TritonEngine

    engine = TritonEngine(case.layers, precision, torch.device("cuda"))
    return Ranking(case.to("cuda"), n_users, n_items, engine)


SIZES = [[], [30], [30, 20, 10], [3, 17, 1, 8], [400, 400, 400], [300, 200, 100, 50], [600, 700]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-5), ("tf32", 5e-3), ("bf16", 2e-2)])
def test_the_triton_kernel_ranks_by_the_models_scores(
    sizes: list[int], precision: Precision, error: float
) -> None:
    case = Case.of(70, 3000, 20, sizes, seed=7)
    ranking = on_cuda(case, precision, 70, 3000)
    assert error_of(ranking.scores(), case.expected(70, 3000)) <= error
    ranking.check(10, (1024,))


@pytest.mark.parametrize("k", [1, 100, 500, 1000])
def test_the_triton_kernel_ranks_any_number_of_items_per_user(k: int) -> None:
    case = Case.of(40, 1200, 200, [30, 20, 10], seed=8, ties=True)
    on_cuda(case, "fp32", 40, 1200).check(k)
