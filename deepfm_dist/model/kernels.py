"""CPU kernels for what torch does in many passes: the pairwise interactions, and a small MLP."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from deepfm_dist.compiled import compiled
from deepfm_dist.vector_code import BLOCK, ROWS, TILE, Code

FloatArray = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
UInt32Array = npt.NDArray[np.uint32]
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B
UNIT_FACTOR = 0x9E3779B1
"""Odd: it takes the numbers of units to words that differ in all of their bits."""
CHUNK = 16
"""Blocks that pass backwards through the MLP together; they stay in the core's cache."""


def can_take(rows_BFW: Tensor) -> bool:
    """Whether the kernels can take these rows, ``[B, F, W]``, as they are and where they are."""
    is_float = rows_BFW.device.type == "cpu" and rows_BFW.dtype == torch.float32
    return is_float and rows_BFW.shape[2] % 4 == 0 and not torch.compiler.is_compiling()


@compiled
def interactions(rows: FloatArray, halves: FloatArray, firsts: FloatArray) -> FloatArray:
    """First and second order of a factorization machine, and what its gradient needs.

    Args:
        rows: ``[B, F, W]``; W is a multiple of 4.
        halves: ``[W]`` 0.5 for columns of factors, else 0.
        firsts: ``[W]`` 1 for the column of first-order weights, else 0.

    Returns:
        ``[B, W + 1]``: the sums over the fields by column, and the logit
        ``sum_d halves_d ((sum_f v_fd)^2 - sum_f v_fd^2) + sum_d firsts_d sum_f v_fd``.
    """
    batch, fields, width = rows.shape
    out = np.empty((batch, width + 1), np.float32)
    for b in range(batch):
        t0 = t1 = t2 = t3 = np.float32(0)
        for d in range(0, width, 4):
            s0 = s1 = s2 = s3 = np.float32(0)
            q0 = q1 = q2 = q3 = np.float32(0)
            for f in range(fields):
                v0, v1, v2, v3 = (
                    rows[b, f, d],
                    rows[b, f, d + 1],
                    rows[b, f, d + 2],
                    rows[b, f, d + 3],
                )
                s0 += v0
                s1 += v1
                s2 += v2
                s3 += v3
                q0 += v0 * v0
                q1 += v1 * v1
                q2 += v2 * v2
                q3 += v3 * v3
            out[b, d], out[b, d + 1], out[b, d + 2], out[b, d + 3] = s0, s1, s2, s3
            t0 += halves[d] * (s0 * s0 - q0) + firsts[d] * s0
            t1 += halves[d + 1] * (s1 * s1 - q1) + firsts[d + 1] * s1
            t2 += halves[d + 2] * (s2 * s2 - q2) + firsts[d + 2] * s2
            t3 += halves[d + 3] * (s3 * s3 - q3) + firsts[d + 3] * s3
        out[b, width] = (t0 + t1) + (t2 + t3)
    return out


@compiled
def add_gradient(
    gradient: FloatArray,
    logit_gradients_B: FloatArray,
    rows: FloatArray,
    sums: FloatArray,
    halves: FloatArray,
    firsts: FloatArray,
) -> None:
    """Adds the gradient of `interactions` by the rows.

    Args:
        gradient: ``[B, F, W]`` is added to.
        logit_gradients_B: ``[B]`` the gradient by the logits.
        rows: ``[B, F, W]`` as above.
        sums: ``[B, W + 1]`` what `interactions` returned.
        halves: ``[W]`` as above.
        firsts: ``[W]`` as above.
    """
    batch, fields, width = rows.shape
    for b in range(batch):
        g = logit_gradients_B[b]
        for f in range(fields):
            for d in range(width):
                pair = (halves[d] + halves[d]) * (sums[b, d] - rows[b, f, d])
                gradient[b, f, d] += g * (pair + firsts[d])


class MLPState(NamedTuple):
    """What the gradient of `mlp` needs.

    Attributes:
        sizes: ``[L + 1]`` units by layer: the inputs, then the hidden layers.
        matrices: ``[out, in + 1]`` weights and biases of each layer, the output last, flat.
        units: ``[blocks, sum of (sizes + 1), BLOCK]`` inputs and hidden units of `BLOCK` rows of
            the batch at a time, each layer followed by ones for the biases.
        scale: dropout's factor for the units that it keeps.
    """

    sizes: Int64Array
    matrices: FloatArray
    units: FloatArray
    scale: np.float32


@intrinsic
def _multiply_rows(
    typing: Any, out: Any, floor: Any, weights: Any, strides: Any, inputs: Any, rows: Any, n: Any
) -> Any:
    """`_multiply` for at most `ROWS` rows, which are held in registers."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        out, floor, weights, strides, inputs, rows, n = zip(signature.args, arguments, strict=True)
        apart = (builder.extract_value(strides[1], 0), builder.extract_value(strides[1], 1))
        end, least = builder.append_basic_block(), code.splat(floor[1])
        switch = builder.switch(rows[1], end)
        for count in range(1, ROWS + 1):
            case = builder.append_basic_block()
            switch.add_case(code.index(count), case)
            builder.position_at_end(case)
            products = code.product(
                count, code.address(weights), None, code.address(inputs), n[1], apart
            )
            for r, row in enumerate(products):
                bounded = [code.at_least(least, vector) for vector in row]
                code.store(bounded, code.row(code.address(out), code.index(r)))
            builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(out, floor, weights, strides, inputs, rows, n), emit


@compiled
def _multiply(
    out: FloatArray,
    weights: FloatArray,
    strides: tuple[int, int],
    inputs: FloatArray,
    floor: np.float32,
) -> None:
    """``out[j] = max(floor, sum_i weights[j, i] inputs[i])``; NaN stays NaN.

    Args:
        out: ``[n, BLOCK]``.
        weights: ``[n, m]``, flat.
        strides: the strides of its rows and columns.
        inputs: ``[m, BLOCK]``.
        floor: 0 for ReLU, or ``-inf``.
    """
    n, begin = len(out), 0
    for groups in range((n + ROWS - 1) // ROWS, 0, -1):
        rows = (n - begin + groups - 1) // groups  # even groups: few rows leave registers idle
        first = weights[begin * strides[0] :]
        _multiply_rows(out[begin:], floor, first, strides, inputs, rows, len(inputs))
        begin += rows


@intrinsic
def _tile(
    typing: Any, sums: Any, left: Any, right: Any, strides: Any, places: Any, blocks: Any
) -> Any:
    """Inner products, over all blocks, of `TILE` rows from ``places`` on, into ``sums``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        sums, left, right = zip(signature.args[:3], arguments[:3], strict=True)
        sides = []
        for side, array in enumerate((left, right)):
            place, last = (builder.extract_value(arguments[4], 2 * side + k) for k in range(2))
            numbers = [builder.add(place, code.index(k)) for k in range(TILE[side])]
            inside = [builder.icmp_signed("<", number, last) for number in numbers]
            rows = [builder.select(*pair, last) for pair in zip(inside, numbers, strict=True)]
            sides.append([code.row(code.address(array), row) for row in rows])
        apart = (builder.extract_value(arguments[3], 0), builder.extract_value(arguments[3], 1))
        for k, total in enumerate(code.outer(sides[0], sides[1], apart, arguments[5])):
            builder.store(total, code.forward(code.address(sums), code.index(k)))
        return context.get_dummy_value()

    return types.void(sums, left, right, strides, places, blocks), emit


@compiled
def _add_outer(out: FloatArray, left: FloatArray, right: FloatArray) -> None:
    """``out[j, i] += sum_b <left[b, j], right[b, i]>``.

    Args:
        out: ``[n, m]``, flat.
        left: ``[blocks, n, BLOCK]``; blocks need not be contiguous.
        right: ``[blocks, m, BLOCK]``, in the same way.
    """
    blocks, n, _ = left.shape
    m = right.shape[1]
    strides = left.strides[0] // left.itemsize, right.strides[0] // right.itemsize
    sums = np.empty(TILE[0] * TILE[1], np.float32)
    for j in range(0, n, TILE[0]):
        for i in range(0, m, TILE[1]):
            # Beyond the end, the last row comes again.
            _tile(sums, left, right, strides, (j, n - 1, i, m - 1), blocks)
            if j + TILE[0] <= n and i + TILE[1] <= m:  # loops of known lengths are vectorised
                for a in range(TILE[0]):
                    for b in range(TILE[1]):
                        out[(j + a) * m + i + b] += sums[a * TILE[1] + b]
                continue
            for a in range(min(TILE[0], n - j)):
                for b in range(min(TILE[1], m - i)):
                    out[(j + a) * m + i + b] += sums[a * TILE[1] + b]


@compiled
def _repack(source: FloatArray, sizes: Int64Array, target: FloatArray, into: bool) -> None:
    """Copies weights ``[out, in]`` and biases ``[out]``, layer by layer, to ``[out, in + 1]``.

    Args:
        source: the parameters of all layers, flat.
        sizes: the sizes, as in `MLPState`.
        target: the matrices, flat.
        into: False: copies them back, from ``target``.
    """
    begin = 0
    for layer in range(len(sizes)):
        n, m = sizes[layer + 1] if layer + 1 < len(sizes) else 1, sizes[layer]
        for j in range(n):
            at, bias = begin + j * m, begin + n * m + j
            place = begin + j * (m + 1)
            if into:
                target[place : place + m] = source[at : at + m]
                target[place + m] = source[bias]
            else:
                source[at : at + m] = target[place : place + m]
                source[bias] = target[place + m]
        begin += n * (m + 1)


def drop_below(dropout: float) -> int:
    """A unit is dropped if its 32 random bits are below this number."""
    return int(min(dropout * 2.0**32, 2.0**32 - 1))


def dropout_scale(dropout: float) -> float:
    """What the units that are kept are multiplied by."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


_drop_below, _dropout_scale = compiled(drop_below), compiled(dropout_scale)


@compiled
def dropout_mask(
    numbers: Int64Array, key: int, first_unit: int, n_units: int, dropout: float
) -> FloatArray:
    """Dropout's mask: a function of the key, of a row's number and of a unit's number.

    Args:
        numbers: ``[B]`` of the rows.
        key: the key of this step; 64 bits.
        first_unit: number of the first unit.
        n_units: number of units.
        dropout: probability of dropping a unit.

    Returns:
        ``[B, n_units]``: 0 where a unit is dropped, elsewhere what keeps the mean.
    """
    mask = np.empty((len(numbers), n_units), np.float32)
    bound, scale = np.uint32(_drop_below(dropout)), np.float32(_dropout_scale(dropout))
    for b in range(len(numbers)):
        row = _row_word(numbers[b], key)
        for unit in range(n_units):
            is_kept = _bits(row, np.uint32(first_unit + unit)) >= bound
            mask[b, unit] = scale if is_kept else np.float32(0)
    return mask


@compiled
def _row_word(number: int, key: int) -> np.uint32:
    """The row's part of what is random about its units."""
    word = _mixed(np.uint32(np.uint32(number) ^ np.uint32(key)))
    word = _mixed(np.uint32(word ^ np.uint32(number >> 32)))
    return np.uint32(_mixed(np.uint32(word ^ np.uint32(key >> 32))))


@compiled
def _bits(row: np.uint32, unit: np.uint32) -> np.uint32:
    """32 random bits of a unit of a row."""
    return np.uint32(_mixed(np.uint32(row ^ np.uint32(unit * np.uint32(UNIT_FACTOR)))))


@compiled
def _drop(
    units: FloatArray, first_unit: int, rows: UInt32Array, dropout: float, scale: np.float32
) -> None:
    """Multiplies the units of a block of rows by their `dropout_mask`.

    Args:
        units: ``[n, BLOCK]``.
        first_unit: number of the first unit.
        rows: ``[BLOCK]`` the rows' words.
        dropout: the probability.
        scale: the scale of the units that are kept.
    """
    bound = np.uint32(_drop_below(dropout))
    for j in range(len(units)):
        unit = np.uint32(first_unit + j)
        for r in range(BLOCK):
            kept = scale * units[j, r]
            units[j, r] = kept if _bits(rows[r], unit) >= bound else np.float32(0)


@compiled
def _mixed(x: np.uint32) -> np.uint32:
    """A permutation of the 32-bit integers that looks random.

    Source: C. Wellons, "Prospecting for Hash Functions", 2018 (lowbias32).
    """
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(FIRST_FACTOR))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(SECOND_FACTOR))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def mlp(
    rows: FloatArray,
    sizes: Int64Array,
    parameters: FloatArray,
    dropout: float,
    key: int,
    first: int,
) -> tuple[FloatArray, MLPState]:
    """A ReLU MLP with one linear output, on the leading columns of each field's row.

    Args:
        rows: ``[B, F, W]``.
        sizes: ``[L + 1]`` units by layer: ``F D`` inputs, then L hidden layers.
        parameters: weights ``[out, in]`` and biases ``[out]`` of each hidden layer in turn, then
            those of the output, flat.
        dropout: probability of dropping a hidden unit; the others are scaled to the same mean.
        key: the key of this step, as `dropout_mask` takes it; the hidden units are numbered layer
            by layer.
        first: number of the first row.

    Returns:
        ``[B]`` outputs, and what `mlp_gradient` needs.
    """
    batch, fields, _ = rows.shape
    dim, blocks = sizes[0] // fields, (batch + BLOCK - 1) // BLOCK
    scale = np.float32(_dropout_scale(dropout))
    matrices = np.empty_like(parameters)
    _repack(parameters, sizes, matrices, True)
    outputs, last = np.empty(batch, np.float32), np.empty((1, BLOCK), np.float32)
    units = np.empty((blocks, (sizes + 1).sum(), BLOCK), np.float32)
    words = np.empty(BLOCK, np.uint32)
    for block in range(blocks):
        begin_row = block * BLOCK
        n = min(BLOCK, batch - begin_row)
        inputs = units[block, : sizes[0]]
        for r in range(n):
            for f in range(fields):
                for d in range(dim):
                    inputs[f * dim + d, r] = rows[begin_row + r, f, d]
        inputs[:, n:] = 0
        if dropout > 0:
            for r in range(BLOCK):
                words[r] = _row_word(first + begin_row + r, key)
        start = begin = unit = 0
        for layer in range(len(sizes)):
            size = sizes[layer] + 1
            below = units[block, start : start + size]
            below[-1] = 1
            start += size
            if layer + 1 < len(sizes):
                out = units[block, start : start + sizes[layer + 1]]
                _multiply(out, matrices[begin:], (size, 1), below, np.float32(0))
                if dropout > 0:
                    _drop(out, unit, words, dropout, scale)
                unit += len(out)
                begin += len(out) * size
        _multiply(last, matrices[begin:], (size, 1), below, np.float32(-np.inf))
        outputs[begin_row : begin_row + n] = last[0, :n]
    return outputs, MLPState(sizes, matrices, units, scale)


@compiled
def _pass_where_positive(gradient: FloatArray, units: FloatArray, scale: np.float32) -> None:
    """The gradient by what ReLU and dropout made ``units`` of."""
    for j in range(len(gradient)):
        for r in range(BLOCK):
            # Computed before it is decided on, which makes a selection of it and no branch.
            through, unit = scale * gradient[j, r], units[j, r]
            gradient[j, r] = through if unit > 0 else np.float32(0)


@compiled
def mlp_gradient(
    gradient: FloatArray, state: MLPState, by_rows: FloatArray, by_parameters: FloatArray
) -> None:
    """The gradient of `mlp`.

    Args:
        gradient: ``[B]`` by the outputs.
        state: as returned.
        by_rows: ``[B, F, W]`` zeros, to which the gradient by the rows is written.
        by_parameters: room for the gradient by the parameters, flat.
    """
    sizes, matrices, units, scale = state
    batch, fields, _ = by_rows.shape
    dim, no_floor = sizes[0] // fields, np.float32(-np.inf)
    by_matrices = np.zeros_like(matrices)
    upper = np.empty((CHUNK, sizes.max(), BLOCK), np.float32)
    lower = np.empty_like(upper)
    for first in range(0, len(units), CHUNK):
        blocks = min(CHUNK, len(units) - first)
        above = upper[:blocks, :1]
        above[:] = 0
        for block in range(blocks):
            row = (first + block) * BLOCK
            n = min(BLOCK, batch - row)
            above[block, 0, :n] = gradient[row : row + n]
        begin, start = len(matrices), units.shape[1]
        for layer in range(len(sizes) - 1, -1, -1):
            # `above`: the gradients by what the layer above sums up, before its activation.
            size = sizes[layer] + 1
            start -= size
            begin -= above.shape[1] * size
            below = units[first : first + blocks, start : start + size]
            _add_outer(by_matrices[begin:], above, below)
            for block in range(blocks):
                out = lower[block, : size - 1]
                _multiply(out, matrices[begin:], (1, size), above[block], no_floor)
                if layer:
                    _pass_where_positive(out, below[block], scale)
            above, lower, upper = lower[:blocks, : size - 1], upper, lower
        for block in range(blocks):
            row = (first + block) * BLOCK
            for r in range(min(BLOCK, batch - row)):
                for f in range(fields):
                    for d in range(dim):
                        by_rows[row + r, f, d] = above[block, f * dim + d, r]
    _repack(by_parameters, sizes, by_matrices, False)
