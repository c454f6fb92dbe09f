"""Faster CPU kernels for row-wise Adagrad and for lookups."""

import warnings
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch import library as operators

from deepfm_dist.compiled import compiled

_OPERATOR = "fbgemm::split_embedding_backward_codegen_rowwise_adagrad_cpu"
_SUM_POOLING = 0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # multiplicative hashing
FloatArray = npt.NDArray[np.float32]


@cache
def register() -> operators.Library:
    """Replaces FBGEMM's kernel by `rowwise_adagrad` in this process.

    FBGEMM 1.8's JIT-compiled kernel mixes legacy SSE instructions into AVX code, which stalls the
    processor: half of a small model's step (``benchmarks/row_updates.py``). Unsupported cases
        (float16 tables, weighted bags) still use FBGEMM's kernel.

    Returns:
        An object that keeps it registered.
    """
    stock = operators.get_kernel(_OPERATOR, "CPU")

    def update(keys: Any, *arguments: Any) -> None:
        (
            gradient,
            weights,
            _,
            weights_offsets,
            columns,
            _,
            rows_before,
            _,
            ids,
            offsets,
            pooling,
            per_id_weights,
            _,
            accumulator,
            _,
            accumulator_offsets,
            lr,
            eps,
            *_,
        ) = arguments
        is_weighted = per_id_weights is not None and per_id_weights.numel()
        tensors = (gradient, weights, accumulator)
        if pooling != _SUM_POOLING or is_weighted or any(t.dtype != torch.float32 for t in tensors):
            stock.call_boxed(keys, *arguments)
            return
        rowwise_adagrad(
            gradient.detach().contiguous().numpy(),
            _numpy(weights),
            weights_offsets.numpy(),
            columns.numpy(),
            rows_before.numpy(),
            ids.numpy(),
            offsets.numpy(),
            _numpy(accumulator),
            accumulator_offsets.numpy(),
            np.float32(lr.item()),
            np.float32(eps),
        )

    ours = operators.Library("fbgemm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about replaced kernels
        ours.impl(_OPERATOR.split("::")[1], update, "CPU", with_keyset=True, allow_override=True)
    return ours


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def look_up(tables: Any, ids: Tensor, offsets: Tensor) -> Tensor:
    """Looks up and sums; tables under row-wise Adagrad are updated in the backward pass.

    FBGEMM's Python takes longer on the way to the look-up of 1,000 rows than the look-up itself:
    float32 tables on a CPU do without it.

    Args:
        tables: FBGEMM's module, whose memory, settings and results these are.
        ids: int32 or int64 rows that are looked up, feature by feature, bag by bag.
        offsets: ``[F * B + 1]`` of the bags.

    Returns:
        ``[B, columns]``: the sums, features side by side.

    Raises:
        IndexError: an id is not a row of its table.
    """
    ours = (
        isinstance(tables, SplitTableBatchedEmbeddingBagsCodegen)
        and tables.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD
        and int(tables.pooling_mode) == _SUM_POOLING
        and tables.D_offsets.device.type == ids.device.type == "cpu"
        and tables.weights_host.dtype == torch.float32
        and tables.weights_host.numel() > 0
        and ids.dtype == offsets.dtype
    )
    if not ours:
        return tables(ids.long(), offsets.long())
    pooled: Tensor = _LookUp.apply(  # type: ignore[no-untyped-call]
        tables.placeholder_autograd_tensor, tables, ids, offsets
    )
    return pooled


class _LookUp(torch.autograd.Function):
    """`look_up` by `pool`, and by `rowwise_adagrad` backwards."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, tables: Any, ids: Tensor, offsets: Tensor) -> Tensor:
        columns = tables.D_offsets.numpy()
        batch = (len(offsets) - 1) // (len(columns) - 1)
        pooled = torch.empty(batch, int(columns[-1]))
        tables.iter.fill_(int(tables.iter_cpu.add_(1)))  # look-ups, as FBGEMM counts them
        ctx.tables, ctx.ids, ctx.offsets = tables, ids.numpy(), offsets.numpy()
        weights, begins = _numpy(tables.weights_host), tables.weights_offsets.numpy()
        rows = tables.rows_per_table.numpy()
        wrong = pool(pooled.numpy(), weights, begins, columns, rows, ctx.ids, ctx.offsets)
        if wrong >= 0:
            raise IndexError(
                f"id {ctx.ids[wrong]}, number {wrong} of a batch, is no row of its table"
            )
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        tables = ctx.tables
        rowwise_adagrad(
            gradient.contiguous().numpy(),
            _numpy(tables.weights_host),
            tables.weights_offsets.numpy(),
            tables.D_offsets.numpy(),
            tables.hash_size_cumsum.numpy(),
            ctx.ids,
            ctx.offsets,
            _numpy(tables.momentum1_host),
            tables.momentum1_offsets.numpy(),
            np.float32(tables.learning_rate_tensor.item()),
            np.float32(tables.optimizer_args.eps),
        )
        return None, None, None, None


@compiled
def pool(
    pooled: FloatArray,
    weights: FloatArray,
    weights_offsets: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
    ids: npt.NDArray[np.integer],
    offsets: npt.NDArray[np.integer],
) -> int:
    """Sums the looked-up rows of each bag.

    Args:
        pooled: ``[B, columns[-1]]`` room for the sums.
        weights: as `rowwise_adagrad` takes them, and so are the others but ``rows``.
        weights_offsets: ``[F]``.
        columns: ``[F + 1]``; multiples of 4.
        rows: ``[F]`` of each feature's table.
        ids: rows that are looked up.
        offsets: ``[F * B + 1]``.

    Returns:
        The place of an id that is not a row of its table, or -1.
    """
    batch = len(pooled)
    for f in range(len(columns) - 1):
        left, width = int(columns[f]), int(columns[f + 1] - columns[f])
        first, n_rows = weights_offsets[f], rows[f]
        begin = int(offsets[f * batch])
        for bag in range(batch):
            end = int(offsets[f * batch + bag + 1])
            if begin == end:
                pooled[bag, left : left + width] = 0
            for i in range(begin, end):
                row = int(ids[i])
                if row < 0 or row >= n_rows:
                    return i
                at = first + row * width
                # Four at a time, which needs no check for a remainder.
                if i == begin:
                    for d in range(0, width, 4):
                        pooled[bag, left + d] = weights[at + d]
                        pooled[bag, left + d + 1] = weights[at + d + 1]
                        pooled[bag, left + d + 2] = weights[at + d + 2]
                        pooled[bag, left + d + 3] = weights[at + d + 3]
                else:
                    for d in range(0, width, 4):
                        pooled[bag, left + d] += weights[at + d]
                        pooled[bag, left + d + 1] += weights[at + d + 1]
                        pooled[bag, left + d + 2] += weights[at + d + 2]
                        pooled[bag, left + d + 3] += weights[at + d + 3]
            begin = end
    return -1


@compiled
def rowwise_adagrad(
    gradient: FloatArray,
    weights: FloatArray,
    weights_offsets: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    rows_before: npt.NDArray[np.int64],
    ids: npt.NDArray[np.integer],
    offsets: npt.NDArray[np.integer],
    accumulator: FloatArray,
    accumulator_offsets: npt.NDArray[np.int64],
    lr: np.float32,
    eps: np.float32,
) -> None:
    """Updates the looked-up rows of several tables, once per row.

    With g the sum of a row's gradients: ``h += mean(g^2)``, ``w -= lr / (sqrt(h) + eps) * g``.

    Args:
        gradient: ``[B, columns[-1]]`` of the pooled rows, features side by side.
        weights: all tables, concatenated, row by row.
        weights_offsets: ``[F]`` offset of each feature's table.
        columns: ``[F + 1]`` int32: the features' columns of ``gradient``; multiples of 4.
        rows_before: ``[F + 1]``: the same for two neighbours if they read the same table.
        ids: looked-up rows, by feature and bag.
        offsets: ``[F * B + 1]``: the bags' ids.
        accumulator: the rows' h.
        accumulator_offsets: ``[F]`` offset of each feature's table.
        lr: learning rate.
        eps: added to the root.

    Source: Duchi et al., "Adaptive Subgradient Methods", 2011, with one h for a row as in
    ``torchrec.optim.RowWiseAdagrad``.
    """
    n_features = len(columns) - 1
    batch = (len(offsets) - 1) // n_features
    feature = 0
    while feature < n_features:
        first = feature
        while feature < n_features - 1 and rows_before[feature + 1] == rows_before[feature]:
            feature += 1
        feature += 1
        begin, end = offsets[first * batch], offsets[feature * batch]
        width = columns[first + 1] - columns[first]
        # Distinct rows in order of first occurrence, and the sums of their gradients.
        bits = 1
        while (1 << bits) < 2 * (end - begin):
            bits += 1
        places = np.full(1 << bits, -1, np.int32)
        rows = np.empty(end - begin, np.int64)
        sums = np.empty((end - begin, width), np.float32)
        mask, shift = np.uint64((1 << bits) - 1), np.uint64(64 - bits)
        n_rows = 0
        for f in range(first, feature):
            left = columns[f]
            for bag in range(batch):
                for i in range(offsets[f * batch + bag], offsets[f * batch + bag + 1]):
                    row = ids[i]
                    at = (np.uint64(row) * _GOLDEN) >> shift
                    while places[at] >= 0 and rows[places[at]] != row:
                        at = (at + np.uint64(1)) & mask
                    place = places[at]
                    if place < 0:
                        places[at] = n_rows
                        rows[n_rows] = row
                        for d in range(0, width, 4):
                            sums[n_rows, d] = gradient[bag, left + d]
                            sums[n_rows, d + 1] = gradient[bag, left + d + 1]
                            sums[n_rows, d + 2] = gradient[bag, left + d + 2]
                            sums[n_rows, d + 3] = gradient[bag, left + d + 3]
                        n_rows += 1
                    else:
                        for d in range(0, width, 4):
                            sums[place, d] += gradient[bag, left + d]
                            sums[place, d + 1] += gradient[bag, left + d + 1]
                            sums[place, d + 2] += gradient[bag, left + d + 2]
                            sums[place, d + 3] += gradient[bag, left + d + 3]
        table, state = weights_offsets[first], accumulator_offsets[first]
        for place in range(n_rows):
            a = b = c = e = np.float32(0)
            for d in range(0, width, 4):
                a += sums[place, d] * sums[place, d]
                b += sums[place, d + 1] * sums[place, d + 1]
                c += sums[place, d + 2] * sums[place, d + 2]
                e += sums[place, d + 3] * sums[place, d + 3]
            row = rows[place]
            h = accumulator[state + row] + ((a + b) + (c + e)) / np.float32(width)
            accumulator[state + row] = h
            step = lr / (np.sqrt(h) + eps)
            at_row = table + row * width
            for d in range(0, width, 4):
                weights[at_row + d] -= step * sums[place, d]
                weights[at_row + d + 1] -= step * sums[place, d + 1]
                weights[at_row + d + 2] -= step * sums[place, d + 2]
                weights[at_row + d + 3] -= step * sums[place, d + 3]
