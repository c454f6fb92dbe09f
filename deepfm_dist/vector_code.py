"""Vector instructions for compiled kernels, written as LLVM IR.

Compilers do not generate register-blocked matrix products from loops: outputs in registers, one
broadcast weight and one fused multiply-add per vector.
"""

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

_HAS = binding.get_host_cpu_features()
LANES, VECTORS, ROWS = (
    (16, 2, 10) if _HAS.get("avx512f") else (8, 2, 5) if _HAS.get("avx2") else (4, 4, 6)
)
"""Floats per vector, vectors per block, and output rows of a block held in registers."""
BLOCK = LANES * VECTORS
"""Floats per row of the kernels' matrices: items, or rows of a batch."""
HAS_FMA = bool(_HAS.get("fma")) or platform.machine() in ("aarch64", "arm64")
"""Whether the processor has fused multiply-add; without it, the kernels are slow."""
TILE = (4, 4) if LANES == 16 else (3, 3)
"""Numbers of left and right rows whose inner products are held in registers."""

FLOAT, INDEX = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(FLOAT, LANES)
_Typed = tuple[Any, Any]
"""A numba type and a value of it in LLVM."""


class Code:
    """Emits the few instructions that the kernels consist of."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.b = context, builder

    def index(self, value: int) -> Any:
        """A 64-bit integer."""
        return ir.Constant(INDEX, value)

    def field(self, value: _Typed, name: str) -> _Typed:
        """A field of a named tuple."""
        number = value[0].fields.index(name)
        return value[0].types[number], self.b.extract_value(value[1], number)

    def address(self, array: _Typed, element: Any = None) -> Any:
        """Address of an element of an array, by default its first."""
        data = self.context.make_array(array[0])(self.context, self.b, value=array[1]).data
        return data if element is None else self.forward(data, element)

    def length(self, array: _Typed) -> Any:
        """An array's first dimension."""
        shape = self.context.make_array(array[0])(self.context, self.b, value=array[1]).shape
        return self.b.extract_value(shape, 0)

    def forward(self, address: Any, elements: Any) -> Any:
        """The address some elements later."""
        return self.b.gep(address, [elements])

    def row(self, address: Any, number: Any) -> Any:
        """Address of row ``number`` of `BLOCK` floats."""
        return self.forward(address, self.b.mul(number, self.index(BLOCK)))

    def _vectors(self, address: Any) -> list[Any]:
        places = [self.forward(address, self.index(v * LANES)) for v in range(VECTORS)]
        return [self.b.bitcast(place, _VECTOR.as_pointer()) for place in places]

    def load(self, address: Any) -> list[Any]:
        """The `VECTORS` vectors of a row."""
        return [self.b.load(place, align=4) for place in self._vectors(address)]

    def store(self, values: list[Any], address: Any) -> None:
        """Writes the `VECTORS` vectors of a row."""
        for value, place in zip(values, self._vectors(address), strict=True):
            self.b.store(value, place, align=4)

    def load_vector(self, address: Any) -> Any:
        """`LANES` floats."""
        return self.b.load(self.b.bitcast(address, _VECTOR.as_pointer()), align=4)

    def store_vector(self, value: Any, address: Any) -> None:
        """Writes `LANES` floats."""
        self.b.store(value, self.b.bitcast(address, _VECTOR.as_pointer()), align=4)

    def transposed(self, vectors: list[Any]) -> list[Any]:
        """`LANES` vectors, so that lane j of vector i is lane i of vector j."""
        distance, lanes = 1, range(LANES)
        while distance < LANES:
            # For each two vectors this far apart, swap the off-diagonal quarters.
            near = [j if not j & distance else LANES + j - distance for j in lanes]
            far = [j + distance if not j & distance else LANES + j for j in lanes]
            swapped = list(vectors)
            for i in lanes:
                if not i & distance:
                    pair = vectors[i], vectors[i | distance]
                    swapped[i] = self.b.shuffle_vector(*pair, _lanes(near))
                    swapped[i | distance] = self.b.shuffle_vector(*pair, _lanes(far))
            vectors, distance = swapped, 2 * distance
        return vectors

    def splat(self, scalar: Any) -> Any:
        """A vector of one value."""
        empty = ir.Constant(_VECTOR, ir.Undefined)
        first = ir.Constant(ir.IntType(32), 0)
        vector = self.b.insert_element(empty, scalar, first)
        return self.b.shuffle_vector(vector, empty, _lanes([0] * LANES))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a b + c``, rounded once."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        name = f"llvm.fma.v{LANES}f32"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), [a, b, c])

    def relu(self, value: Any) -> Any:
        """The larger of 0 and a vector; 0 for NaN."""
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        return self.b.select(self.b.fcmp_ordered(">", value, zero), value, zero)

    def at_least(self, floor: Any, value: Any) -> Any:
        """The larger of two vectors; NaN where ``value`` is."""
        return self.b.select(self.b.fcmp_ordered("<", value, floor), floor, value)

    def loop(
        self, count: Any, start: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """Runs ``body(j, values) -> values`` for j in [0, count); the values stay in registers."""
        before = self.b.block
        head, inside, after = (self.b.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        j = self.b.phi(INDEX)
        j.add_incoming(self.index(0), before)
        values = [self.b.phi(_VECTOR) for _ in start]
        for phi, value in zip(values, start, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", j, count), inside, after)
        self.b.position_at_end(inside)
        for phi, value in zip(values, body(j, values), strict=True):
            phi.add_incoming(value, self.b.block)
        j.add_incoming(self.b.add(j, self.index(1)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return values

    def product(
        self,
        rows: int,
        weights: Any,
        biases: Any,
        inputs: Any,
        n: Any,
        strides: tuple[Any, Any] | None = None,
    ) -> list[list[Any]]:
        """``biases[r] + sum_j weights[r, j] inputs[j]`` for some rows r: `VECTORS` vectors each.

        Args:
            rows: number of rows; at most `ROWS` fit the registers.
            weights: address of the first weight.
            biases: address of the biases; None: 0.
            inputs: address of ``[n, BLOCK]``.
            n: number of inputs.
            strides: distance between the weights of two rows and of two inputs; None: an input's
                weights are contiguous.
        """
        by_row, by_input = strides or (self.index(1), self.index(rows))

        def step(j: Any, sums: list[Any]) -> list[Any]:
            x = self.load(self.row(inputs, j))
            line = self.forward(weights, self.b.mul(j, by_input))
            products = []
            for r in range(rows):
                place = self.forward(line, self.b.mul(by_row, self.index(r)))
                weight = self.splat(self.b.load(place))
                products += [self.fma(weight, x[v], sums[r * VECTORS + v]) for v in range(VECTORS)]
            return products

        start = []
        for r in range(rows):
            bias = ir.Constant(FLOAT, 0.0)
            if biases is not None:
                bias = self.b.load(self.forward(biases, self.index(r)))
            start += [self.splat(bias)] * VECTORS
        sums = self.loop(n, start, step)
        return [sums[r * VECTORS : (r + 1) * VECTORS] for r in range(rows)]

    def outer(
        self, lefts: Sequence[Any], rights: Sequence[Any], strides: tuple[Any, Any], blocks: Any
    ) -> list[Any]:
        """``sum_b <left[b], right[b]>`` for each pair of some rows of `BLOCK`, left ones first.

        Args:
            lefts: addresses of rows in the first block.
            rights: the same.
            strides: distance between the rows of two blocks, left and right.
            blocks: number of blocks.
        """

        def step(j: Any, sums: list[Any]) -> list[Any]:
            left, right = (
                [self.load(self.forward(row, self.b.mul(j, stride))) for row in rows]
                for rows, stride in zip((lefts, rights), strides, strict=True)
            )
            pairs = [(x, y) for x in left for y in right]
            for v in range(VECTORS):
                sums = [self.fma(x[v], y[v], s) for (x, y), s in zip(pairs, sums, strict=True)]
            return sums

        start = [self.splat(ir.Constant(FLOAT, 0.0))] * (len(lefts) * len(rights))
        sums = self.loop(blocks, start, step)
        if len(sums) != LANES:
            return [self.total(s) for s in sums]
        totals = self.totals(sums)
        lanes = (ir.Constant(ir.IntType(32), lane) for lane in range(LANES))
        return [self.b.extract_element(totals, lane) for lane in lanes]

    def totals(self, vectors: list[Any]) -> Any:
        """A vector of the sums of `LANES` vectors' floats: lane j has that of vector j.

        A tree over all of them takes a third of the instructions of their `total` one by one.
        """
        left, distance = dict(enumerate(vectors)), 1
        while distance < LANES:
            lanes = range(LANES)
            near = _lanes([j if not j & distance else LANES + j - distance for j in lanes])
            far = _lanes([j + distance if not j & distance else LANES + j for j in lanes])
            pairs = {i: (left[i], left[i | distance]) for i in left if not i & distance}
            left = {
                i: self.b.fadd(
                    self.b.shuffle_vector(*pair, near), self.b.shuffle_vector(*pair, far)
                )
                for i, pair in pairs.items()
            }
            distance *= 2
        return left[0]

    def total(self, vector: Any) -> Any:
        """The sum of a vector's floats, in a fixed order: halves are added."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            halves = (
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(begin, begin + lanes)))
                for begin in (0, lanes)
            )
            vector = self.b.fadd(*(self.b.shuffle_vector(vector, vector, half) for half in halves))
        return self.b.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _lanes(numbers: Sequence[int]) -> Any:
    """The lane indices of a shuffle."""
    return ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(numbers))
