"""What only a GPU can show; skipped without one."""

import fbgemm_gpu
import pytest
import torch

from deepfm_dist.config import load_config
from deepfm_dist.data.dataset import PreparedDataset
from deepfm_dist.distributed.world import world
from tests.ranks import run_alone, run_ranks
from tests.test_distributed import Run, difference

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
