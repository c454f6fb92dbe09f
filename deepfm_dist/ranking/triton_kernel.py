"""Scores, mask and running top-K of user-item pairs in one pass over the catalogue, on CUDA.

A program takes a few users past a stretch of the catalogue, a tile of items at a time. The first
layer is a sum of what is there for the user and for the item, so that a tile's work begins with
``relu(u + i)``; the layers above it are products of ``[pairs, inputs]`` with weights that tensor
cores make. Hidden units stay in registers, scores become keys that hold score and position, and a
tile's keys go one by one among a user's best, which few do: no matrix of scores is ever in memory.

A score is one fixed chain of products and sums. Which user, item, tile or launch it is computed
in does not change a bit of it.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from deepfm_dist.data.jagged import Jagged
from deepfm_dist.model.pairs import Side
from deepfm_dist.ranking.engine import USER_BLOCK, Best, Precision
from deepfm_dist.ranking.topk import NO_KEY, best_of_keys, keys_of, mask_of

log = logging.getLogger(__name__)

ITEM_TILE = 128
"""Items that what pads a catalogue fills up to; a tile has a part of it."""
USERS = 4
"""Users of a tile."""
STEP = 32
"""Units of the first layer that are made at a time."""
DIM_STEP = 32
"""Numbers of factor vectors that are multiplied at a time."""
HELD_BYTES = 2048
"""Of a pair's units in layers between the first and the last, two in a row: registers hold them."""
MOST_K = 512
"""Items per user that registers hold; more are taken from scores in memory."""
RESIDENT_BYTES = 1 << 16
"""Weights that may stay on chip from tile to tile; more are read again for each."""
PROGRAMS = 2048
"""Programs that keep a large GPU busy; fewer users than that share the catalogue out."""

_NONE = tl.constexpr(NO_KEY)
_FULL = tl.constexpr(2**63 - 1)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


class Layout(NamedTuple):
    """How a model's hidden layers are cut; each is padded by units of zero.

    Attributes:
        units: the first layer's.
        middle: of each layer between the first and the last, which are held whole, its blocks.
        last: the last layer's units; 0 where that is the first.
        chunk: of these at a time.
        pairs: of a tile.
        streamed: whether weights are read for each tile.
        stages: loads of weights under way in a loop.
    """

    units: int
    middle: tuple[tuple[int, ...], ...]
    last: int
    chunk: int
    pairs: int
    streamed: bool
    stages: int

    @classmethod
    def of(cls, sizes: Sequence[int], kind: torch.dtype) -> "Layout":
        """Of hidden layers of some sizes, their units of a type."""
        if not sizes:
            return cls(0, (), 0, 0, 128, False, 1)
        half = kind.itemsize == 2
        chunk = _power(sizes[-1], 64 if half else 32) if len(sizes) > 1 else 0
        middle = tuple(_blocks(size, 128 if half else 64) for size in sizes[1:-1])
        # Tensor cores take 64 rows at a time; 128 halve the traffic of weights, if they fit.
        fit = _held(sizes) * kind.itemsize <= 1024
        n_weights = sum(_multiple(a, 16) * _multiple(b, 16) for a, b in itertools.pairwise(sizes))
        # In fp32 each lies there twice, as its tf32 and what that leaves.
        streamed = n_weights * (2 if half else 8) > RESIDENT_BYTES
        return cls(
            _multiple(sizes[0], STEP),
            middle,
            _multiple(sizes[-1], chunk) if chunk else 0,
            chunk,
            128 if fit and (half or not streamed) else 64,
            streamed,
            2 if half else 1,
        )

    @property
    def sizes(self) -> list[int]:
        """Padded units of all hidden layers."""
        return [n for n in (self.units, *map(sum, self.middle), self.last) if n]

    def options(self, deep: bool, dim: int, k: int) -> dict[str, Any]:
        """What the kernel is compiled for.

        Args:
            deep: whether the over-arch counts.
            dim: padded numbers of a factor vector.
            k: items per user.
        """
        middle = [*self.middle, (), ()]
        return {
            "DIM": dim,
            "DIM_STEP": max(1, min(dim, DIM_STEP)),
            "UNITS": self.units if deep else 0,
            "STEP": STEP,
            "SECOND": middle[0],
            "THIRD": middle[1],
            "LAST": self.last,
            "CHUNK": self.chunk,
            "USERS": USERS,
            "ITEMS": self.pairs // USERS,
            "K": _power(k, 2 * k, 1),
            "STREAMED": self.streamed,
            "STAGES": self.stages + 1,
            "LAST_STAGES": self.stages,
            "num_warps": 8 if self.streamed or k > MOST_K // 2 else 4,
        }

    @property
    def leaner(self) -> "Layout | None":
        """One that takes less of the chip and gives the same scores; None: there is none."""
        if self.pairs == 16:
            return None
        return self._replace(pairs=self.pairs // 2, stages=1)


def reason_against(sizes: Sequence[int], precision: Precision) -> str | None:
    """Why hidden layers of some sizes are not for this kernel; None: they are."""
    most = HELD_BYTES // _kind(precision).itemsize
    if len(sizes) > 4:
        return f"the over-arch has {len(sizes)} hidden layers, more than 4"
    if _held(sizes) > most:
        return f"layers between the first and the last have more than {most} units in {precision}"
    return None


def _kind(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _held(sizes: Sequence[int]) -> int:
    """Units that are held at once."""
    middle = [_multiple(size, 16) for size in sizes[1:-1]]
    return max((a + b for a, b in itertools.pairwise([0, *middle])), default=0)


def _power(n: int, most: int, least: int = 16) -> int:
    """The smallest power of two that holds n, within limits."""
    return max(least, min(most, 1 << (n - 1).bit_length()))


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _blocks(n: int, most: int) -> tuple[int, ...]:
    """Powers of two whose sum is n, rounded up to a multiple of 16."""
    n, found = _multiple(n, 16), []
    for size in (128, 64, 32, 16):
        if size <= most:
            found += [size] * (n // size)
            n %= size
    return tuple(found)


@triton.constexpr_function
def _begin(blocks: Any, block: int) -> int:
    return sum(blocks[:block])


@triton.constexpr_function
def _size(blocks: Any) -> int:
    return sum(blocks)


@triton.jit
def _first_layer(
    of_users, of_items, user, item, begin,
    UNITS: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """``STEP`` units of the first layer from ``begin`` on: ``[pairs, STEP]``."""
    unit = begin + tl.arange(0, STEP)
    u = tl.load(of_users + user[:, None] * UNITS + unit[None, :])
    i = tl.load(of_items + item[:, :, None] * UNITS + unit[None, None, :])
    return tl.maximum(u[:, None, :] + i, 0.0).reshape(PAIRS, STEP)


@triton.jit
def _add(
    x, weights, begin, out, sums,
    INPUTS: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of N inputs from ``begin`` on; weights are ``[outputs, INPUTS]``."""
    inputs = begin + tl.arange(0, N)
    w = tl.load(weights + out[None, :] * INPUTS + inputs[:, None])
    x = x.to(w.dtype)
    if _INTERPRETED:  # the interpreter takes bfloat16 for integers; products are the same
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, sums, input_precision=PRECISION)


@triton.jit
def _second_layer(
    of_users, of_items, user, item, weights, biases, begin,
    UNITS: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """N units of the second layer from ``begin`` on, the first layer's made on the way."""
    out = begin + tl.arange(0, N)
    sums = tl.zeros((PAIRS, N), tl.float32) + tl.load(biases + out)[None, :]
    for k in tl.range(0, UNITS, STEP, num_stages=STAGES):
        x = _first_layer(of_users, of_items, user, item, k, UNITS, STEP, PAIRS)
        sums = _add(x, weights, k, out, sums, UNITS, STEP, PRECISION)
    return tl.maximum(sums, 0.0)


@triton.jit
def _next_layer(
    x, weights, biases, begin,
    BLOCKS: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """N units from ``begin`` on of a layer above one that is held in blocks."""
    out = begin + tl.arange(0, N)
    sums = tl.zeros((PAIRS, N), tl.float32) + tl.load(biases + out)[None, :]
    for b in tl.static_range(len(BLOCKS)):
        sums = _add(
            x[b], weights, _begin(BLOCKS, b), out, sums, _size(BLOCKS), BLOCKS[b], PRECISION
        )
    return tl.maximum(sums, 0.0)


@triton.jit
def _over_arch(
    of_users, of_items, user, item, weights, biases, output,
    UNITS: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr,
    LAST: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, LAST_STAGES: tl.constexpr,
):  # fmt: skip
    """What the over-arch adds to the logits: ``[pairs]``."""
    total = tl.zeros((PAIRS,), tl.float32)
    if LAST == 0:
        for k in tl.range(0, UNITS, STEP):
            x = _first_layer(of_users, of_items, user, item, k, UNITS, STEP, PAIRS)
            total += tl.sum(x * tl.load(output + k + tl.arange(0, STEP))[None, :], 1)
    else:  # not after an early return, which Triton compiles all the same
        kind = weights.dtype.element_ty
        x = ()
        for b in tl.static_range(len(SECOND)):
            units = _second_layer(
                of_users, of_items, user, item, weights, biases, _begin(SECOND, b),
                UNITS, STEP, SECOND[b], PAIRS, PRECISION, STAGES,
            )  # fmt: skip
            x = x + (units.to(kind),)  # noqa: RUF005  (Triton knows no star)
        if len(SECOND) > 0:
            weights += _size(SECOND) * UNITS
            biases += _size(SECOND)
        y = ()
        for b in tl.static_range(len(THIRD)):
            units = _next_layer(
                x, weights, biases, _begin(THIRD, b), SECOND, THIRD[b], PAIRS, PRECISION
            )
            y = y + (units.to(kind),)  # type: ignore[assignment] # noqa: RUF005
        if len(THIRD) > 0:
            weights += _size(THIRD) * _size(SECOND)
            biases += _size(THIRD)
        for n in tl.range(0, LAST, CHUNK, num_stages=LAST_STAGES):
            if len(THIRD) > 0:
                z = _next_layer(y, weights, biases, n, THIRD, CHUNK, PAIRS, PRECISION)
            elif len(SECOND) > 0:
                z = _next_layer(x, weights, biases, n, SECOND, CHUNK, PAIRS, PRECISION)
            else:
                z = _second_layer(
                    of_users, of_items, user, item, weights, biases, n,
                    UNITS, STEP, CHUNK, PAIRS, PRECISION, STAGES,
                )  # fmt: skip
            total += tl.sum(z * tl.load(output + n + tl.arange(0, CHUNK))[None, :], 1)
    return total


# Triton would compile it again whenever a size becomes 1 or a multiple of 16, or ceases to be one,
# as the number of users does with every last block.
@triton.jit(do_not_specialize=["n_users", "n_items", "columns", "offset", "k"])
def _rank(
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
    """Takes ``USERS`` users past ``columns_per_split`` items, or candidates of their own.

    Sides are padded to whole tiles: constants ``[n]``, factors ``[n, DIM]``, hidden
    ``[n, UNITS]``. ``weights`` and ``biases`` are those of the layers above the first, ``[outputs,
    inputs]`` each, one after the other; ``output`` is the last one's. ``candidates`` are ``[users,
    columns]`` positions. ``seen`` are positions less ``offset``, ascending for each user, from
    ``seen_begins[split, user]`` to ``seen_ends[user]``. Written are ``keys``, ``[splits, users,
    k]``, the best in no order, or with KEEP_SCORES ``scores_out``, ``[users, columns]``.
    """
    user = (tl.program_id(0) * USERS + tl.arange(0, USERS)).to(tl.int64)
    split = tl.program_id(1)
    lane = tl.arange(0, K).to(tl.int64)
    # Empty places are distinct, so that one at a time is the least; unused ones never are.
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
                # The compiler does not know, and so keeps no weights in registers for all tiles.
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
                found = tl.load(seen + next_seen, next_seen < end_seen, _FULL)
                while tl.min(found, 0) < begin + ITEMS:
                    scores = tl.where(found[:, None] == column, float("-inf"), scores)
                    next_seen += (found < begin + ITEMS).to(tl.int64)
                    found = tl.load(seen + next_seen, next_seen < end_seen, _FULL)
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


class TritonEngine:
    """ReLU layers on CUDA: one pass over the catalogue.

    Args:
        layers: of the over-arch above the first, in float64; empty where it has no hidden layer.
        precision: of its products: ``fp32`` takes three of tf32's for one, which leaves float32's
            rounding; ``tf32`` takes one, and ``bf16`` also holds the hidden units so.
        device: a CUDA device.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], precision: Precision, device: torch.device
    ) -> None:
        self.name = f"Triton kernel, {precision}"
        self.work_bytes = 0
        self._device = device
        kind = _kind(precision)
        self._input_precision = "tf32" if precision == "tf32" else "tf32x3"
        sizes = [weight.shape[1] for weight, _ in layers]
        self._layout = layout = Layout.of(sizes, kind)
        model = layers[0][0].device if layers else device
        nothing = torch.zeros(0, dtype=torch.float64, device=model)
        weights, biases = [nothing], [nothing]
        padded = layout.sizes
        for (weight, bias), n_in, n_out in zip(layers[:-1], padded, padded[1:], strict=False):
            weights.append(_padded(weight, n_out, n_in).flatten())
            biases.append(_padded(bias[:, None], n_out, 1).flatten())
        output = _padded(layers[-1][0], 1, padded[-1]).flatten() if layers else nothing
        self._weights = torch.cat(weights).to(device, kind)
        self._biases = torch.cat(biases).to(device, torch.float32)
        self._output = output.to(device, torch.float32)

    def allocate(self, n: int, like: Side) -> "Items":
        """Room for n items."""
        rows = _multiple(n, ITEM_TILE)
        side = Side(
            like.constant.new_full((rows,), float("-inf")),
            like.factor_sum.new_zeros(rows, _columns(like.factor_sum)),
            like.hidden.new_zeros(rows, self._layout.units),
        )
        return Items(side, n)

    def fill(self, items: "Items", begin: int, side: Side) -> None:
        """Puts items into their place; what is past the end is left out."""
        n = min(items.n - begin, len(side.constant))
        for target, source in zip(items.side.tensors, side.tensors, strict=True):
            room = target[begin : begin + n]
            if source.dim() > 1:
                room = room[:, : source.shape[1]]
            room.copy_(source[:n])

    def users(self, sides: Sequence[Side]) -> Side:
        """Prepares users."""
        n = sum(len(side.constant) for side in sides)
        users = self.allocate(n, sides[0])
        begin = 0
        for side in sides:
            self.fill(users, begin, side)
            begin += len(side.constant)
        return users.side

    def update(
        self, users: Side, items: "Items", offset: int, seen: Jagged, best: Best, deep: bool = True
    ) -> None:
        """Runs items past users; see `Engine`."""
        n, k = best.scores.shape
        if k > MOST_K:
            self._update_from_scores(users, items, offset, seen, best, deep)
            return
        columns = len(items.side.constant)
        splits, width = self._splits(n, columns)
        rows, positions = mask_of(seen, self._device)(0, n)
        positions -= offset
        here = (positions >= 0) & (positions < items.n)
        order = ((rows[here] << 32) | positions[here]).sort().values
        owners = torch.arange(n, device=self._device) << 32
        firsts = torch.arange(splits, device=self._device) * width
        begins = torch.searchsorted(order, owners + firsts[:, None])
        ends = torch.searchsorted(order, owners + (1 << 32))
        found = order & 0xFFFFFFFF, begins, ends
        self._launch(users, items, offset, n, columns, best, deep, seen=found)

    def _update_from_scores(
        self, users: Side, items: "Items", offset: int, seen: Jagged, best: Best, deep: bool
    ) -> None:
        positions = torch.arange(offset, offset + items.n, device=self._device)
        mask = mask_of(seen, self._device)
        for begin in range(0, len(best.scores), USER_BLOCK):
            part = slice(begin, min(begin + USER_BLOCK, len(best.scores)))
            scores = self._scores(users[part], len(best.scores[part]), items, deep)
            rows, places = mask(part.start, part.stop)
            places -= offset
            here = (places >= 0) & (places < items.n)
            scores[rows[here], places[here]] = float("-inf")
            self._merge(best, part, keys_of(scores, positions))

    def update_of_candidates(
        self, users: Side, items: "Items", offset: int, candidates: Tensor, best: Best
    ) -> None:
        """Runs each user's own items past it; see `Engine`."""
        n, columns = candidates.shape
        candidates = candidates.contiguous()
        if best.scores.shape[1] > MOST_K:
            out = torch.empty(n, columns, device=self._device)
            self._launch(users, items, offset, n, columns, None, candidates=candidates, out=out)
            self._merge(best, slice(0, n), keys_of(out, candidates))
            return
        self._launch(users, items, offset, n, columns, best, candidates=candidates)

    def scores(self, users: Side, n_users: int, items: "Items") -> Tensor:
        """``[n_users, items]`` float32."""
        return self._scores(users, n_users, items)

    def _scores(self, users: Side, n_users: int, items: "Items", deep: bool = True) -> Tensor:
        out = torch.empty(n_users, items.n, device=self._device)
        columns = len(items.side.constant)
        self._launch(users, items, 0, n_users, columns, None, deep, out=out)
        return out

    def _merge(self, best: Best, users: slice, keys: Tensor) -> None:
        scores, positions = best.scores[users], best.positions[users]
        keys = torch.cat([keys_of(scores, positions), keys], 1)
        scores[:], positions[:] = best_of_keys(keys, scores.shape[1])

    def _splits(self, n_users: int, columns: int) -> tuple[int, int]:
        """In how many parts the catalogue is taken, and how many columns each has."""
        wanted = -(-PROGRAMS * USERS // max(n_users, 1))
        tiles = -(-columns // ITEM_TILE)
        width = -(-tiles // min(wanted, tiles)) * ITEM_TILE
        return -(-columns // width), width

    def _launch(
        self,
        users: Side,
        items: "Items",
        offset: int,
        n: int,
        columns: int,
        best: Best | None,
        deep: bool = True,
        seen: tuple[Tensor, Tensor, Tensor] | None = None,
        candidates: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        unused = users.constant
        splits, width = self._splits(n, columns)
        k = 1 if best is None else best.scores.shape[1]
        keys = torch.empty(splits, n, k, dtype=torch.int64, device=self._device)
        arguments = (
            *users.tensors,
            *items.side.tensors,
            self._weights,
            self._biases,
            self._output,
            unused if candidates is None else candidates,
            *((unused,) * 3 if seen is None else seen),
            keys,
            unused if out is None else out,
            n,
            items.n,
            columns,
            width,
            offset,
            k,
        )
        while True:
            options = self._layout.options(deep, users.factor_sum.shape[1], k)
            options |= {"OF_CANDIDATES": candidates is not None, "KEEP_SCORES": out is not None}
            options["PRECISION"] = self._input_precision
            try:
                _rank[-(-n // USERS), splits](*arguments, **options)
                break
            except OutOfResources as error:
                leaner = self._layout.leaner
                if leaner is None:
                    raise
                log.info("catalogue: tiles of %d pairs, since %s", leaner.pairs, error)
                self._layout = leaner
        if best is not None:
            self._merge(best, slice(0, n), keys.transpose(0, 1).reshape(n, splits * k))


class Items(NamedTuple):
    """The item side.

    Attributes:
        side: padded to whole tiles by items with a constant of ``-inf``, and to whole blocks of
            numbers and units.
        n: number of items.
    """

    side: Side
    n: int


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    room = matrix.new_zeros(rows, columns)
    room[: matrix.shape[0], : matrix.shape[1]] = matrix
    return room


def _columns(factors: Tensor) -> int:
    """D in whole steps, or the power of two that holds it."""
    dim = factors.shape[1]
    return _multiple(dim, _power(dim, DIM_STEP, 1)) if dim else 0
