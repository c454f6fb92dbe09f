"""Scores, mask and running top-K of user-item pairs in one pass over the catalogue, on CPU.

`BLOCK` items are scored for `ROWS` users at a time; hidden units live in a scratch that stays in
the cache, and no matrix of scores is ever in memory. What the compilers' loops do not give is the
register blocking of the products, so these are written as LLVM IR: `ROWS` outputs of `BLOCK`
items in registers, one broadcast weight and one fused multiply-add for each vector. Layer sizes
are arguments, so that one compilation serves every model.

A score is one fixed chain of fused multiply-adds. Its bits do not depend on the user, item, block,
thread or vector width that it is computed with.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deepfm_dist.compiled import compiled
from deepfm_dist.data.jagged import Int64Array
from deepfm_dist.vector_code import BLOCK, INDEX, LANES, ROWS, VECTORS, Code

FloatArray = npt.NDArray[np.float32]
Layer = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Weights ``[out, in]`` and biases ``[out]``."""

_BIT = ir.IntType(1)

GROUP = ("outputs", "inputs", "first weight", "first bias", "input row", "output row")
"""Columns that describe a group of a layer's units."""


class Network(NamedTuple):
    """The layers above the first, cut into groups of at most `ROWS` outputs.

    Attributes:
        groups: ``[G, len(GROUP)]``.
        weights: for each group ``[inputs, outputs]``, flat.
        biases: the biases of all groups' outputs.
        output: ``[H_last]`` weights of the last, linear layer.
        first: scratch row of the first layer's units.
        last: scratch row of the last hidden layer's units.
        rows: scratch rows in all.
    """

    groups: Int64Array
    weights: FloatArray
    biases: FloatArray
    output: FloatArray
    first: int
    last: int
    rows: int


class Users(NamedTuple):
    """The user side; users go in chunks of `ROWS`, the last one padded.

    Attributes:
        constant: ``[chunks * ROWS]``.
        factors: ``[chunks, D, ROWS]``, flat.
        hidden: ``[chunks * ROWS, H]``, flat.
    """

    constant: FloatArray
    factors: FloatArray
    hidden: FloatArray


class Items(NamedTuple):
    """The item side in blocks of `BLOCK`; what pads the last one has a constant of ``-inf``.

    Attributes:
        constant: ``[blocks * BLOCK]``.
        factors: ``[blocks, D, BLOCK]``, flat.
        hidden: ``[blocks, H, BLOCK]``, flat.
        n: number of items.
        dim: D.
        units: H, the first layer's size.
    """

    constant: FloatArray
    factors: FloatArray
    hidden: FloatArray
    n: int
    dim: int
    units: int


def network_of(layers: Sequence[Layer]) -> Network:
    """Lays out the layers above the first.

    Args:
        layers: every hidden layer but the first, then the output, whose bias is left out; empty
            for a model without hidden layers.
    """
    if not layers:
        none = np.zeros(0, np.float32)
        return Network(
            np.zeros((0, len(GROUP)), np.int64), none, none, none, first=0, last=0, rows=0
        )
    sizes = [weight.shape[1] for weight, _ in layers]
    # Layers alternate between two halves, so that none overwrites its own input.
    starts = [index % 2 * max(sizes) for index in range(len(sizes))]
    groups: list[tuple[int, ...]] = []
    weights: list[FloatArray] = []
    biases: list[FloatArray] = []
    n_weights = n_biases = 0
    for index, (weight, bias) in enumerate(layers[:-1]):
        begin = 0
        # As evenly as possible: a group of few rows leaves registers idle.
        for rows in np.array_split(np.arange(len(bias)), -(-len(bias) // ROWS)):
            source, target = starts[index], starts[index + 1] + begin
            groups.append((len(rows), weight.shape[1], n_weights, n_biases, source, target))
            weights.append(weight[rows].T.astype(np.float32).ravel())
            biases.append(bias[rows].astype(np.float32))
            begin += len(rows)
            n_weights += weights[-1].size
            n_biases += len(rows)
    nothing = [np.zeros(0, np.float32)]
    return Network(
        np.array(groups, np.int64).reshape(-1, len(GROUP)),
        np.concatenate(nothing + weights),
        np.concatenate(nothing + biases),
        layers[-1][0][0].astype(np.float32),
        first=starts[0],
        last=starts[-1],
        rows=2 * max(sizes),
    )


def aligned_zeros(*shape: int) -> FloatArray:
    """Zeros aligned to a cache line, so that no vector crosses one."""
    size = int(np.prod(shape))
    room = np.zeros(size + 16, np.float32)
    skip = -(room.ctypes.data // 4) % 16
    return room[skip : skip + size].reshape(shape)


def empty_items(n: int, dim: int, units: int) -> Items:
    """Room for n items."""
    blocks = -(-n // BLOCK)
    constant = aligned_zeros(blocks * BLOCK)
    constant[n:] = -np.inf
    factors, hidden = (aligned_zeros(blocks * size * BLOCK) for size in (dim, units))
    return Items(constant, factors, hidden, n, dim, units)


@intrinsic
def _pairwise(typing: Any, users: Any, chunk: Any, items: Any, block: Any, n: Any, s: Any) -> Any:
    """Scores from the constants and factors of `ROWS` users from ``chunk`` on, into ``s``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        users, chunk, items, block, network, scratch = zip(signature.args, arguments, strict=True)
        dim = code.field(items, "dim")[1]
        sums = code.product(
            ROWS,
            code.address(code.field(users, "factors"), builder.mul(chunk[1], dim)),
            code.address(code.field(users, "constant"), chunk[1]),
            code.row(code.address(code.field(items, "factors")), builder.mul(block[1], dim)),
            dim,
        )
        scores = code.row(code.address(scratch), code.field(network, "rows")[1])
        for r, user_sums in enumerate(sums):
            code.store(user_sums, code.row(scores, code.index(r)))
        return context.get_dummy_value()

    return types.void(users, chunk, items, block, n, s), emit


@intrinsic
def _pairwise_of_one(typing: Any, users: Any, user: Any, items: Any, n: Any, s: Any) -> Any:
    """`_pairwise` for one user and one block, with the same operations in the same order."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        users, user, items, network, scratch = zip(signature.args, arguments, strict=True)
        dim, rows = code.field(items, "dim")[1], code.index(ROWS)
        row = builder.urem(user[1], rows)
        chunk = builder.mul(builder.sub(user[1], row), dim)
        weights = code.forward(code.address(code.field(users, "factors"), chunk), row)
        factors = code.address(code.field(items, "factors"))

        def step(j: Any, sums: list[Any]) -> list[Any]:
            weight = code.splat(builder.load(code.forward(weights, builder.mul(j, rows))))
            x = code.load(code.row(factors, j))
            return [code.fma(weight, x[v], sums[v]) for v in range(VECTORS)]

        constant = builder.load(code.address(code.field(users, "constant"), user[1]))
        sums = code.loop(dim, [code.splat(constant)] * VECTORS, step)
        scores = code.row(code.address(scratch), code.field(network, "rows")[1])
        code.store(sums, code.row(scores, row))
        return context.get_dummy_value()

    return types.void(users, user, items, n, s), emit


@intrinsic
def _complete(
    typing: Any, users: Any, user: Any, items: Any, block: Any, n: Any, s: Any, least: Any
) -> Any:
    """Adds the over-arch and the items' constants to a user's row; the bits above ``least``."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        users, user, items, block, network, scratch, least = zip(
            signature.args, arguments, strict=True
        )
        hidden = code.address(scratch)
        units = code.field(items, "units")[1]
        user_hidden = code.address(code.field(users, "hidden"), builder.mul(user[1], units))
        item_hidden = code.row(
            code.address(code.field(items, "hidden")), builder.mul(block[1], units)
        )
        first = code.row(hidden, code.field(network, "first")[1])

        def first_layer(j: Any, _: list[Any]) -> list[Any]:
            part = code.splat(builder.load(code.forward(user_hidden, j)))
            sums = [builder.fadd(part, item) for item in code.load(code.row(item_hidden, j))]
            code.store([code.relu(x) for x in sums], code.row(first, j))
            return []

        code.loop(units, [], first_layer)
        groups = code.field(network, "groups")
        weights, biases, output = (
            code.address(code.field(network, name)) for name in ("weights", "biases", "output")
        )

        def group(g: Any, _: list[Any]) -> list[Any]:
            place = code.address(groups, builder.mul(g, code.index(len(GROUP))))
            count, n, weight, bias, source, target = (
                builder.load(code.forward(place, code.index(k))) for k in range(len(GROUP))
            )
            end = builder.append_basic_block()
            switch = builder.switch(count, end)
            for rows in range(1, ROWS + 1):
                case = builder.append_basic_block()
                switch.add_case(code.index(rows), case)
                builder.position_at_end(case)
                sums = code.product(
                    rows,
                    code.forward(weights, weight),
                    code.forward(biases, bias),
                    code.row(hidden, source),
                    n,
                )
                for r, unit_sums in enumerate(sums):
                    place = code.row(hidden, builder.add(target, code.index(r)))
                    code.store([code.relu(x) for x in unit_sums], place)
                builder.branch(end)
            builder.position_at_end(end)
            return []

        code.loop(code.length(groups), [], group)
        row = builder.urem(user[1], code.index(ROWS))
        scores = code.row(hidden, builder.add(code.field(network, "rows")[1], row))
        constants = code.load(code.row(code.address(code.field(items, "constant")), block[1]))
        last = code.row(hidden, code.field(network, "last")[1])

        def output_layer(j: Any, sums: list[Any]) -> list[Any]:
            weight = code.splat(builder.load(code.forward(output, j)))
            x = code.load(code.row(last, j))
            return [code.fma(weight, x[v], sums[v]) for v in range(VECTORS)]

        start = [builder.fadd(s, c) for s, c in zip(code.load(scores), constants, strict=True)]
        sums = code.loop(code.length(code.field(network, "output")), start, output_layer)
        code.store(sums, scores)
        above = code.index(0)
        for v, total in enumerate(sums):
            bits = builder.fcmp_ordered(">", total, code.splat(least[1]))
            mask = builder.zext(builder.bitcast(bits, ir.IntType(LANES)), INDEX)
            above = builder.or_(above, builder.shl(mask, code.index(v * LANES)))
        return above

    return types.uint64(users, user, items, block, n, s, least), emit


@intrinsic
def _lowest_bit(typing: Any, bits: Any) -> Any:
    """Number of the lowest bit that is set."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_BIT, 1))

    return types.int64(types.uint64), emit


@compiled
def _keep(
    above: Any,
    scores: FloatArray,
    places: Int64Array,
    user: int,
    best: FloatArray,
    positions: Int64Array,
) -> None:
    """Inserts marked scores into a user's best, each after equal ones."""
    first, last = user % ROWS * BLOCK, best.shape[1] - 1
    while above:
        lane = _lowest_bit(above)
        above &= above - np.uint64(1)
        score = scores[first + lane]
        if score > best[user, last]:
            at = last
            while at > 0 and best[user, at - 1] < score:
                best[user, at] = best[user, at - 1]
                positions[user, at] = positions[user, at - 1]
                at -= 1
            best[user, at] = score
            positions[user, at] = places[lane]


@compiled
def update_top_k(
    users: Users,
    begin: int,
    end: int,
    items: Items,
    offset: int,
    network: Network,
    seen_offsets: Int64Array,
    seen: npt.NDArray[np.int32],
    best: FloatArray,
    positions: Int64Array,
    scratch: FloatArray,
) -> None:
    """Scores items for some users and keeps each user's K best.

    Args:
        users: the user side.
        begin: first user, a multiple of `ROWS`.
        end: last user + 1.
        items: some items, of higher positions than any that came before.
        offset: position of the first one.
        network: layers above the first.
        seen_offsets: ``[users + 1]``.
        seen: each user's masked positions, in any order.
        best: ``[users, K]`` best scores so far, best first; ``-inf`` where fewer.
        positions: ``[users, K]`` their positions.
        scratch: ``[network.rows + ROWS, BLOCK]``, flat.
    """
    scores, places = scratch[network.rows * BLOCK :], np.empty(BLOCK, np.int64)
    blocks, last = len(items.constant) // BLOCK, best.shape[1] - 1
    masked = np.empty((ROWS, blocks), np.uint64)
    for chunk in range(begin, end, ROWS):
        masked[:] = 0
        for r in range(min(ROWS, end - chunk)):
            for at in range(seen_offsets[chunk + r], seen_offsets[chunk + r + 1]):
                item = seen[at] - offset
                if 0 <= item < items.n:
                    masked[r, item // BLOCK] |= np.uint64(1) << np.uint64(item % BLOCK)
        for block in range(blocks):
            _pairwise(users, chunk, items, block, network, scratch)
            for user in range(chunk, min(chunk + ROWS, end)):
                least = best[user, last]
                above = _complete(users, user, items, block, network, scratch, least)
                above &= ~masked[user - chunk, block]
                if above:
                    for lane in range(BLOCK):
                        places[lane] = offset + block * BLOCK + lane
                    _keep(above, scores, places, user, best, positions)


@compiled
def copy_items(items: Items, places: Int64Array, picked: Items) -> None:
    """Copies ``[n]`` places of some items into n others."""
    for at in range(len(places)):
        block, lane = divmod(places[at], BLOCK)
        to_block, to_lane = divmod(at, BLOCK)
        picked.constant[at] = items.constant[places[at]]
        for packed, size, target in (
            (items.factors, items.dim, picked.factors),
            (items.hidden, items.units, picked.hidden),
        ):
            source, room = block * size * BLOCK + lane, to_block * size * BLOCK + to_lane
            for j in range(size):
                target[room + j * BLOCK] = packed[source + j * BLOCK]


@compiled
def rows_of(items: Items) -> FloatArray:
    """``[n, width]``: each item's constant, factors and hidden part, one after the other.

    The width is a multiple of `LANES`, so that whole vectors of an item can be loaded.
    """
    dim, units = items.dim, items.units
    rows = np.zeros((items.n, -(-(1 + dim + units) // LANES) * LANES), np.float32)
    for at in range(items.n):
        block, lane = divmod(at, BLOCK)
        rows[at, 0] = items.constant[at]
        for j in range(dim):
            rows[at, 1 + j] = items.factors[(block * dim + j) * BLOCK + lane]
        for j in range(units):
            rows[at, 1 + dim + j] = items.hidden[(block * units + j) * BLOCK + lane]
    return rows


@intrinsic
def _transpose(typing: Any, rows: Any, places: Any, lane: Any, out: Any) -> Any:
    """Puts `LANES` rows into columns of ``out``, ``[width, BLOCK]`` flat, from a lane on.

    ``places`` are the rows' numbers. A vector of each row is loaded and these are transposed in
    registers: vectors that are stored number by number would be waited for when they are read.
    """

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder)
        rows, places, lane, out = zip(signature.args, arguments, strict=True)
        shape = context.make_array(rows[0])(context, builder, value=rows[1]).shape
        width = builder.extract_value(shape, 1)
        numbers = code.address(places)
        starts = [
            code.address(rows, builder.mul(builder.load(code.forward(numbers, k)), width))
            for k in map(code.index, range(LANES))
        ]
        target = code.forward(code.address(out), lane[1])

        def tile(t: Any, _: list[Any]) -> list[Any]:
            first = builder.mul(t, code.index(LANES))
            vectors = [code.load_vector(code.forward(start, first)) for start in starts]
            for j, vector in enumerate(code.transposed(vectors)):
                code.store_vector(vector, code.row(target, builder.add(first, code.index(j))))
            return []

        code.loop(builder.udiv(width, code.index(LANES)), [], tile)
        return context.get_dummy_value()

    return types.void(rows, places, lane, out), emit


@compiled
def update_top_k_of_candidates(
    users: Users,
    begin: int,
    end: int,
    items: Items,
    rows: FloatArray,
    offset: int,
    network: Network,
    candidates: Int64Array,
    best: FloatArray,
    positions: Int64Array,
    scratch: FloatArray,
) -> None:
    """`update_top_k` for each user's own few items; it documents the other arguments.

    ``candidates`` are ``[users, N]`` positions, ascending; others' than these items' are skipped.
    ``rows`` are `rows_of` the items.
    """
    scores = scratch[network.rows * BLOCK :]
    dim, units, last = items.dim, items.units, best.shape[1] - 1
    room, places = np.zeros(rows.shape[1] * BLOCK, np.float32), np.zeros(BLOCK, np.int64)
    hidden = (1 + dim) * BLOCK
    picked = Items(room[:BLOCK], room[BLOCK:hidden], room[hidden:], BLOCK, dim, units)
    for user in range(begin, end):
        mine = candidates[user]
        low = np.searchsorted(mine, offset)
        high = np.searchsorted(mine, offset + items.n)
        for start in range(low, high, BLOCK):
            n = high - start if high - start < BLOCK else BLOCK
            for lane in range(n):
                places[lane] = mine[start + lane] - offset
            for lane in range(0, n, LANES):
                _transpose(rows, places[lane:], lane, room)
            picked.constant[n:] = -np.inf
            _pairwise_of_one(users, user, picked, network, scratch)
            above = _complete(users, user, picked, 0, network, scratch, best[user, last])
            _keep(above, scores, mine[start:], user, best, positions)


@compiled
def all_scores(
    users: Users,
    begin: int,
    end: int,
    items: Items,
    network: Network,
    out: FloatArray,
    scratch: FloatArray,
) -> None:
    """Scores of users ``begin`` to ``end`` and all items, into those rows of ``out``."""
    scores = scratch[network.rows * BLOCK :]
    for chunk in range(begin, end, ROWS):
        for block in range(len(items.constant) // BLOCK):
            _pairwise(users, chunk, items, block, network, scratch)
            for user in range(chunk, min(chunk + ROWS, end)):
                _complete(users, user, items, block, network, scratch, np.float32(np.inf))
                for lane in range(min(BLOCK, items.n - block * BLOCK)):
                    out[user, block * BLOCK + lane] = scores[user % ROWS * BLOCK + lane]
