"""Scores, mask and running top-K of user-item pairs in one pass over the catalogue, on CUDA.

A program ranks a range of the catalogue for a few users, one tile of items at a time. The first
layer is the sum of precomputed parts of the user and the item, so a tile starts with
``relu(u + i)``; the layers above it are matrix products of ``[pairs, inputs]`` and the weights, on
tensor cores. Hidden units stay in registers. Each score is packed with its position into a 64-bit
key, and the few keys of a tile that exceed a user's current worst replace it, one at a time. The
matrix of scores is never in memory.

The order of operations within a score is fixed, so its bits do not depend on the tile, the split or
the launch that computes it.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from deepfm_dist.ranking.topk import NO_KEY
from deepfm_dist.ranking.types import Precision

ITEM_TILE = 128
"""The catalogue is padded to a multiple of this many items; tiles are smaller and divide it."""
USERS = 4
"""Users per tile."""
STEP = 16
"""Units of the first layer computed per iteration; twice as many where registers allow."""
DIM_STEP = 32
"""Dimensions of factor vectors multiplied per iteration."""
HELD_BYTES = 2048
"""Limit per pair for the units of the layer before the last, which registers must hold."""
MOST_K = 512
"""Largest K that registers hold; for more, scores are written to memory."""
RESIDENT_BYTES = 1 << 16
"""Weights up to this size may stay on chip between tiles; larger ones are read for each tile."""

_NONE = tl.constexpr(NO_KEY)
_FULL = tl.constexpr(2**63 - 1)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class TileConfig(NamedTuple):
    """How a model's hidden layers are divided into blocks. Layers are padded with zero units.

    Attributes:
        units: units of the first layer.
        middle: block sizes of each layer between the first and the last. Registers hold all blocks
            of the layer before the last, and one block of the layer before that.
        last: units of the last layer; 0 if there is only one layer.
        chunk: units of the last layer computed per iteration.
        pairs: user-item pairs per tile.
        streamed: whether weights are read again for each tile.
        stages: pipeline stages of the loops that load weights.
        step: units of the first layer computed per iteration.
    """

    units: int
    middle: tuple[tuple[int, ...], ...]
    last: int
    chunk: int
    pairs: int
    streamed: bool
    stages: int
    step: int = STEP

    @classmethod
    def of(cls, sizes: Sequence[int], precision: Precision) -> "TileConfig":
        """The configuration for layer sizes; benchmarks/compiled_kernels.py counts spills."""
        if not sizes:
            return cls(0, (), 0, 0, 128, streamed=False, stages=1)
        kind, half = weight_dtype(precision), precision == "bf16"
        chained = len(sizes) > 3
        chunk = power_of_two(sizes[-1], 64 if half else 32) if len(sizes) > 1 else 0
        middle = tuple(_blocks(size, 128 if half else 64) for size in sizes[1:-1])
        n_weights = sum(round_up(a, 16) * round_up(b, 16) for a, b in itertools.pairwise(sizes))
        # In fp32, each weight is stored twice: in tf32, and the remainder.
        streamed = n_weights * (2 if half else 8) > RESIDENT_BYTES
        # 128 pairs, if they fit, take half the instructions and reads of weights of 64: two groups
        # of four warps would share the 64 rows that tensor cores take, and each would prepare them
        # all. Sums of the third layer are held in float32.
        fit = _held(sizes) * (4 if chained else kind.itemsize) <= 1024
        # Half the units per iteration reduce or avoid register spills in these cases.
        is_narrow = precision == "tf32" or (precision == "fp32" and streamed)
        step = STEP if is_narrow else 2 * STEP
        return cls(
            units=round_up(sizes[0], step),
            middle=middle,
            last=round_up(sizes[-1], chunk) if chunk else 0,
            chunk=chunk,
            pairs=128 if fit else 64,
            streamed=streamed,
            stages=2 if half else 1,
            step=step,
        )

    @property
    def sizes(self) -> list[int]:
        """Padded units of all hidden layers."""
        return [n for n in (self.units, *map(sum, self.middle), self.last) if n]

    def options(self, deep: bool, dim: int, k: int) -> dict[str, Any]:
        """The kernel's compile-time constants.

        Args:
            deep: whether to add the over-arch's logits.
            dim: padded dimension of factor vectors.
            k: items per user.
        """
        middle = [*self.middle, (), ()]
        return {
            "DIM": dim,
            "DIM_STEP": max(1, min(dim, DIM_STEP)),
            "UNITS": self.units if deep else 0,
            "STEP": self.step,
            "SECOND": middle[0],
            "THIRD": middle[1],
            "LAST": self.last,
            "CHUNK": self.chunk,
            "USERS": USERS,
            "ITEMS": self.pairs // USERS,
            "K": power_of_two(k, 2 * k, 1),
            "STREAMED": self.streamed,
            "STAGES": self.stages + 1,
            "LAST_STAGES": self.stages,
            "num_warps": 8 if self.streamed or k > MOST_K // 2 else 4,
        }

    @property
    def leaner(self) -> "TileConfig | None":
        """A configuration with fewer pairs per tile and the same scores; None at the smallest."""
        if self.pairs == 16:
            return None
        return self._replace(pairs=self.pairs // 2, stages=1)


def unsupported_reason(sizes: Sequence[int], precision: Precision) -> str | None:
    """Why this kernel does not support hidden layers of these sizes; None if it does."""
    most = HELD_BYTES // weight_dtype(precision).itemsize
    if len(sizes) > 4:
        return f"the over-arch has {len(sizes)} hidden layers, more than 4"
    if _held(sizes) > most:
        return f"the hidden layer before the last has more than {most} units in {precision}"
    return None


def weight_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the over-arch's weights."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _held(sizes: Sequence[int]) -> int:
    """The units that registers hold at once: those of the layer before the last."""
    return round_up(sizes[-2], 16) if len(sizes) > 2 else 0


def power_of_two(n: int, most: int, least: int = 16) -> int:
    """The smallest power of two that is at least n, within limits."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least n."""
    return -(-n // multiple) * multiple


def _blocks(n: int, most: int) -> tuple[int, ...]:
    """Powers of two, 16 or more, whose sum is n rounded up to a multiple of 16."""
    n, sizes = round_up(n, 16), []
    for size in (128, 64, 32, 16):
        if size <= most:
            sizes += [size] * (n // size)
            n %= size
    return tuple(sizes)


@triton.constexpr_function
def _begin(blocks: Any, block: int) -> int:
    return sum(blocks[:block])


@triton.constexpr_function
def _size(blocks: Any) -> int:
    return sum(blocks)


@triton.constexpr_function
def _equal(blocks: Any) -> int:
    """How many blocks are as large as the first; these come first."""
    return sum(block == blocks[0] for block in blocks)


@triton.jit
def _first_layer(
    user_hidden, item_hidden, user, item, begin,
    UNITS: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Computes ``STEP`` units of the first layer, starting at ``begin``: ``[pairs, STEP]``."""
    unit = begin + tl.arange(0, STEP)
    u = tl.load(user_hidden + user[:, None] * UNITS + unit[None, :])
    i = tl.load(item_hidden + item[:, :, None] * UNITS + unit[None, None, :])
    return tl.maximum(u[:, None, :] + i, 0.0).reshape(PAIRS, STEP)


@triton.jit
def _biased(biases, begin, PAIRS: tl.constexpr, N: tl.constexpr):
    """The biases of N units, starting at ``begin``, for each pair: ``[PAIRS, N]``."""
    bias = tl.load(biases + begin + tl.arange(0, N))
    return tl.zeros((PAIRS, N), tl.float32) + bias[None, :]


@triton.jit
def _add(
    x, weights, begin, out, sums,
    INPUTS: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of N inputs, starting at ``begin``; weights are ``[outputs, INPUTS]``."""
    inputs = begin + tl.arange(0, N)
    w = tl.load(weights + out[None, :] * INPUTS + inputs[:, None])
    x = x.to(w.dtype)
    if _INTERPRETED:  # the interpreter treats bfloat16 as integers; products are the same
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, sums, input_precision=PRECISION)


@triton.jit
def _second_layer(
    user_hidden, item_hidden, user, item, weights, biases, begin,
    UNITS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes N units of the second layer, starting at ``begin``, and its inputs on the fly."""
    out = begin + tl.arange(0, N)
    sums = _biased(biases, begin, PAIRS, N)
    for k in tl.range(0, UNITS, STEP, num_stages=STAGES):
        x = _first_layer(user_hidden, item_hidden, user, item, k, UNITS, STEP, PAIRS)
        sums = _add(x, weights, k, out, sums, UNITS, STEP, PRECISION)
    return tl.maximum(sums, 0.0)


@triton.jit
def _add_blocks(
    x, weights, begin, sums,
    BLOCKS: tl.constexpr, N: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of N inputs, starting at ``begin``, to all blocks of a layer's sums."""
    added = ()
    for b in tl.static_range(len(BLOCKS)):
        out = _begin(BLOCKS, b) + tl.arange(0, BLOCKS[b])
        block = _add(x, weights, begin, out, sums[b], INPUTS, N, PRECISION)
        added = added + (block,)  # type: ignore[assignment] # noqa: RUF005  (Triton has no star)
    return added


@triton.jit
def _third_layer(
    user_hidden, item_hidden, user, item, weights, biases,
    UNITS: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Computes the third layer in blocks. Each block of the second is added to it and let go.

    Equal blocks are a loop: written out, the code would be several times as long, and offsets of
    every block would take registers.
    """
    above = weights + _size(SECOND) * UNITS
    sums = ()
    for b in tl.static_range(len(THIRD)):
        begin = _size(SECOND) + _begin(THIRD, b)
        bias = _biased(biases, begin, PAIRS, THIRD[b])
        sums = sums + (bias,)  # type: ignore[assignment] # noqa: RUF005
    for begin in tl.range(0, _equal(SECOND) * SECOND[0], SECOND[0], num_stages=1):
        x = _second_layer(
            user_hidden, item_hidden, user, item, weights, biases, begin,
            UNITS, STEP, SECOND[0], PAIRS, PRECISION, STAGES,
        )  # fmt: skip
        sums = _add_blocks(x, above, begin, sums, THIRD, SECOND[0], _size(SECOND), PRECISION)
    for b in tl.static_range(_equal(SECOND), len(SECOND)):
        x = _second_layer(
            user_hidden, item_hidden, user, item, weights, biases, _begin(SECOND, b),
            UNITS, STEP, SECOND[b], PAIRS, PRECISION, STAGES,
        )  # fmt: skip
        sums = _add_blocks(
            x, above, _begin(SECOND, b), sums, THIRD, SECOND[b], _size(SECOND), PRECISION
        )
    y = ()
    for b in tl.static_range(len(THIRD)):
        units = tl.maximum(sums[b], 0.0).to(weights.dtype.element_ty)
        y = y + (units,)  # type: ignore[assignment] # noqa: RUF005
    return y


@triton.jit
def _next_layer(
    x, weights, biases, begin,
    BLOCKS: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes N units, starting at ``begin``, of a layer whose inputs are held in blocks."""
    out = begin + tl.arange(0, N)
    sums = _biased(biases, begin, PAIRS, N)
    for b in tl.static_range(len(BLOCKS)):
        sums = _add(
            x[b], weights, _begin(BLOCKS, b), out, sums, _size(BLOCKS), BLOCKS[b], PRECISION
        )
    return tl.maximum(sums, 0.0)


@triton.jit
def _over_arch(
    user_hidden, item_hidden, user, item, weights, biases, output,
    UNITS: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    LAST: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, LAST_STAGES: tl.constexpr,
):  # fmt: skip
    """The over-arch's share of the logits: ``[pairs]``."""
    total = tl.zeros((PAIRS,), tl.float32)
    if LAST == 0:
        for k in tl.range(0, UNITS, STEP):
            x = _first_layer(user_hidden, item_hidden, user, item, k, UNITS, STEP, PAIRS)
            total += tl.sum(x * tl.load(output + k + tl.arange(0, STEP))[None, :], 1)
    else:  # an early return would not help: Triton compiles what follows it anyway
        x = ()
        y = ()
        if len(THIRD) > 0:
            y = _third_layer(
                user_hidden, item_hidden, user, item, weights, biases,
                UNITS, STEP, SECOND, THIRD, PAIRS, PRECISION, STAGES,
            )  # fmt: skip
            weights += _size(SECOND) * UNITS + _size(THIRD) * _size(SECOND)
            biases += _size(SECOND) + _size(THIRD)
        else:
            for b in tl.static_range(len(SECOND)):
                units = _second_layer(
                    user_hidden, item_hidden, user, item, weights, biases, _begin(SECOND, b),
                    UNITS, STEP, SECOND[b], PAIRS, PRECISION, STAGES,
                )  # fmt: skip
                x = x + (units.to(weights.dtype.element_ty),)  # noqa: RUF005
            weights += _size(SECOND) * UNITS
            biases += _size(SECOND)
        for n in tl.range(0, LAST, CHUNK, num_stages=LAST_STAGES):
            if len(THIRD) > 0:
                z = _next_layer(y, weights, biases, n, THIRD, CHUNK, PAIRS, PRECISION)
            elif len(SECOND) > 0:
                z = _next_layer(x, weights, biases, n, SECOND, CHUNK, PAIRS, PRECISION)
            else:
                z = _second_layer(
                    user_hidden, item_hidden, user, item, weights, biases, n,
                    UNITS, STEP, CHUNK, PAIRS, PRECISION, STAGES,
                )  # fmt: skip
            total += tl.sum(z * tl.load(output + n + tl.arange(0, CHUNK))[None, :], 1)
    return total


# Triton specialises on whether an integer is 1 or a multiple of 16, and would recompile for the
# last block of users, whose size differs.
@triton.jit(do_not_specialize=["n_users", "n_items", "columns", "offset", "k"])
def rank_pairs(
    user_constant, user_factors, user_hidden, item_constant, item_factors, item_hidden,
    weights, biases, output,
    candidates, seen, seen_begins, seen_ends, keys, scores_out,
    n_users, n_items, columns, columns_per_split, offset, k,
    DIM: tl.constexpr, DIM_STEP: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr,
    USERS: tl.constexpr, ITEMS: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    OF_CANDIDATES: tl.constexpr, KEEP_SCORES: tl.constexpr, STAGES: tl.constexpr,
    LAST_STAGES: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Ranks ``columns_per_split`` items, or each user's own candidates, for ``USERS`` users.

    Sides are padded to whole tiles: constants ``[n]``, factors ``[n, DIM]``, hidden
    ``[n, UNITS]``. ``weights`` (``[outputs, inputs]`` each) and ``biases`` of the layers above the
    first are concatenated; ``output`` has the weights of the logit. ``candidates`` are positions,
    ``[users, columns]``. ``seen`` has positions minus ``offset``, ascending for each user, from
    ``seen_begins[split, user]`` to ``seen_ends[user]``. Writes ``keys``, ``[splits, users, k]``,
    the best in any order, or with KEEP_SCORES ``scores_out``, ``[users, columns]``.
    """
    user = (tl.program_id(0) * USERS + tl.arange(0, USERS)).to(tl.int64)
    split = tl.program_id(1)
    lane = tl.arange(0, K).to(tl.int64)
    # Empty slots differ, so that only one at a time is the least; slots from k on never are.
    best = tl.where(lane < k, _NONE + 1 + lane, _FULL)[None, :] + tl.zeros((USERS, K), tl.int64)
    least = tl.min(best, 1)
    if not OF_CANDIDATES and not KEEP_SCORES:
        next_seen = tl.load(seen_begins + split * n_users + user, user < n_users, 0)
        end_seen = tl.load(seen_ends + user, user < n_users, 0)
    first = split * columns_per_split
    for begin in tl.range(first, tl.minimum(first + columns_per_split, columns), ITEMS):
        column = begin + tl.arange(0, ITEMS)[None, :]
        if OF_CANDIDATES:
            mine = (user[:, None] < n_users) & (column < columns)
            item = tl.load(candidates + user[:, None] * columns + column, mine, -1) - offset
            known = (item >= 0) & (item < n_items)
            item = tl.where(known, item, 0)
        else:
            item = column.to(tl.int64)
        scores = tl.load(user_constant + user)[:, None] + tl.load(item_constant + item)
        for d in tl.range(0, DIM, DIM_STEP):
            number = d + tl.arange(0, DIM_STEP)
            u = tl.load(user_factors + user[:, None] * DIM + number[None, :])
            i = tl.load(item_factors + item[:, :, None] * DIM + number[None, None, :])
            scores += tl.sum(u[:, None, :] * i, 2)
        if UNITS > 0:
            nought = 0
            if STREAMED:
                # Always 0, but unknown to the compiler: it cannot keep weights in registers.
                nought = tl.multiple_of(tl.minimum(begin, 0), 16)
            scores += _over_arch(
                user_hidden, item_hidden, user, item,
                weights + nought, biases + nought, output + nought,
                UNITS, STEP, SECOND, THIRD, LAST, CHUNK, USERS * ITEMS, PRECISION,
                STAGES, LAST_STAGES,
            ).reshape(USERS, ITEMS)  # fmt: skip
        if OF_CANDIDATES:
            scores = tl.where(known, scores, float("-inf"))
        if KEEP_SCORES:
            width = columns if OF_CANDIDATES else n_items
            place = scores_out + user[:, None] * width + column
            tl.store(place, scores, (user[:, None] < n_users) & (column < width))
        else:
            if not OF_CANDIDATES:
                seen_items = tl.load(seen + next_seen, next_seen < end_seen, _FULL)
                while tl.min(seen_items, 0) < begin + ITEMS:
                    scores = tl.where(seen_items[:, None] == column, float("-inf"), scores)
                    next_seen += (seen_items < begin + ITEMS).to(tl.int64)
                    seen_items = tl.load(seen + next_seen, next_seen < end_seen, _FULL)
            bits = (scores + 0.0).to(tl.int32, bitcast=True)
            ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
            key = (ordered << 32) | (0xFFFFFFFF - (item + offset))
            key = tl.where(scores > float("-inf"), key, _NONE)
            top = tl.max(key, 1)
            while tl.max((top > least).to(tl.int32), 0) > 0:
                replaced = (top > least)[:, None] & (best == least[:, None])
                best = tl.where(replaced, top[:, None], best)
                least = tl.min(best, 1)
                key = tl.where(key == top[:, None], _NONE, key)
                top = tl.max(key, 1)
    if not KEEP_SCORES:
        place = keys + (split * n_users + user[:, None]) * k + lane[None, :]
        tl.store(place, best, (user[:, None] < n_users) & (lane[None, :] < k))
