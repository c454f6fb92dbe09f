"""Our CPU kernel against FBGEMM's own, which it stands in for, and against float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor

from deepfm_dist.distributed import kernels

ROWS = (40, 3, 900)
LR, EPS = 0.05, 1e-8


@pytest.fixture
def unregistered() -> Iterator[None]:
    """FBGEMM's kernels as they come, whatever other tests have done."""

    def unregister() -> None:
        kernels.register()._destroy()
        kernels.register.cache_clear()

    unregister()
    yield
    unregister()


def lookups(
    features: tuple[int, ...], width: int, precision: SparseType = SparseType.FP32
) -> SplitTableBatchedEmbeddingBagsCodegen:
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=list(features),
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        weights_precision=precision,
        learning_rate=LR,
        eps=EPS,
    )
    generator = torch.Generator().manual_seed(1)
    for table in module.split_embedding_weights():
        table.copy_(torch.randn(table.shape, generator=generator))
    return module


def bags(features: tuple[int, ...], batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(features) * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = [
        torch.randint(0, ROWS[table], (int(lengths[f * batch : (f + 1) * batch].sum()),))
        for f, table in enumerate(features)
    ]
    return torch.cat(ids), offsets


def trained(
    features: tuple[int, ...], width: int, batch: int, precision: SparseType = SparseType.FP32
) -> list[Tensor]:
    torch.manual_seed(0)
    module = lookups(features, width, precision)
    for step in range(5):
        ids, offsets = bags(features, batch, step)
        out = module(ids, offsets)
        out.backward(torch.randn(out.shape))
    states = [state for (state,) in module.split_optimizer_states()]
    return [t.detach().float().clone() for t in (*module.split_embedding_weights(), *states)]


@pytest.mark.parametrize("features", [(0, 1, 2), (0, 1, 1, 2, 2, 2), (0, 0, 1, 2)])
@pytest.mark.parametrize(("width", "batch"), [(4, 7), (12, 64), (20, 1)])
def test_rows_and_accumulators_are_those_of_fbgemm(
    unregistered: None, features: tuple[int, ...], width: int, batch: int
) -> None:
    theirs = trained(features, width, batch)
    kernels.register()
    ours = trained(features, width, batch)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def _by_look_up(
    features: tuple[int, ...], width: int, batch: int, dtype: torch.dtype
) -> list[Tensor]:
    torch.manual_seed(0)
    module = lookups(features, width)
    found = []
    for step in range(5):
        ids, offsets = bags(features, batch, step)
        out = kernels.look_up(module, ids.to(dtype), offsets.to(dtype))
        found.append(out.detach().clone())
        out.backward(torch.randn(out.shape))
    states = [state for (state,) in module.split_optimizer_states()]
    return [*module.split_embedding_weights(), *states, *found]


@pytest.mark.parametrize("features", [(0, 1, 2), (0, 1, 1, 2, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_look_ups_without_fbgemms_python_give_the_same(
    unregistered: None, features: tuple[int, ...], dtype: torch.dtype
) -> None:
    theirs = trained(features, 12, 64)
    ours = _by_look_up(features, 12, 64, dtype)
    for a, b in zip(ours, theirs, strict=False):
        torch.testing.assert_close(a.detach(), b, rtol=2e-6, atol=2e-6)
    torch.manual_seed(0)
    ids, offsets = bags(features, 64, 0)
    first = lookups(features, 12)(ids, offsets)
    torch.testing.assert_close(ours[2 * len(ROWS)], first.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_id_that_is_no_row_is_refused(wrong: int) -> None:
    module = lookups((0, 1, 2), 4)
    ids, offsets = torch.tensor([39, 2, wrong, 899]), torch.tensor([0, 1, 3, 4])
    with pytest.raises(IndexError, match=f"id {wrong}, number 2 of a batch"):
        kernels.look_up(module, ids, offsets)


def test_float16_tables_are_left_to_fbgemm(unregistered: None) -> None:
    theirs = trained((0, 1, 2), 8, 32, SparseType.FP16)
    kernels.register()
    for a, b in zip(trained((0, 1, 2), 8, 32, SparseType.FP16), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradients_of_equal_rows_are_added_before_the_row_moves() -> None:
    """Against the formula in float64: one table, read by two features, every row many times."""
    rows, width, batch = 5, 8, 30
    generator = np.random.default_rng(0)
    gradient = generator.standard_normal((batch, 2 * width)).astype(np.float32)
    ids = generator.integers(0, rows, 2 * batch)
    weights = generator.standard_normal(rows * width).astype(np.float32)
    state = generator.random(rows).astype(np.float32)
    g = np.zeros((rows, width))
    for i, row in enumerate(ids):
        feature, bag = divmod(i, batch)
        g[row] += gradient[bag, feature * width : (feature + 1) * width]
    h = state + (g**2).mean(1)
    expected = weights.reshape(rows, width) - LR * g / (np.sqrt(h) + EPS)[:, None]
    kernels.rowwise_adagrad(
        gradient,
        weights,
        np.zeros(2, np.int64),
        np.array([0, width, 2 * width], np.int32),
        np.array([0, 0, rows]),
        ids,
        np.arange(2 * batch + 1),
        state,
        np.zeros(2, np.int64),
        np.float32(LR),
        np.float32(EPS),
    )
    np.testing.assert_allclose(weights.reshape(rows, width), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, h, rtol=1e-5)
