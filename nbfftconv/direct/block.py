"""Blocks of the output in registers: where one lies, how sums are added to it, and a kernel for each size.

Also what passes of such blocks have in common: how many threads they are worth, and what their records say of arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from nbfftconv import simd, threads
from nbfftconv.arrays import is_streamed
from nbfftconv.geometry import ConvGeometry
from nbfftconv.records import Record
from nbfftconv.simd import VECTOR_BYTES

#: Products of a work item, at most, as far as it can be cut: a call answers signals between two items.
MOST_PRODUCTS = 2**29


#: Products that a core is taken to compute in a second.
_PRODUCTS_PER_SECOND = 5e10


def workers_for(geometry: ConvGeometry) -> int:
    """Return the number of threads for a pass."""
    return threads.get_workers(geometry.multiply_adds / _PRODUCTS_PER_SECOND)[0]


@functools.lru_cache(maxsize=64)
def no_biases(filters: int, dtype: np.dtype) -> np.ndarray:
    """Return a bias of zero for each filter."""
    return np.zeros(filters, dtype)


def point_to_arrays(
    record: Record,
    x: np.ndarray,
    weight: int,
    zeros: int,
    bias: np.ndarray | None,
    relu: bool,
    y: np.ndarray,
) -> None:
    """Set the fields of a record that depend on the arrays; `weight` and `zeros`, of `no_biases`, are addresses."""
    record["input"], record["weight"], record["output"] = x.ctypes.data, weight, y.ctypes.data
    record["zeros"] = zeros
    record["bias"] = zeros if bias is None else bias.ctypes.data
    record["relu"] = relu
    rows_are_lines = record["x_output"] * x.itemsize % VECTOR_BYTES == 0
    record["stream"] = is_streamed(y.nbytes) and rows_are_lines and record["output"] % VECTOR_BYTES == 0


class OutputBlock:
    """A block of rows × vectors of the output, `y_row` bytes from row to row, of which `rows_left` are in memory.

    From vector to vector it is `y_step` bytes and `lane_step` pixels. Of the pixels of a row, those up to `end` are
    written; they hold sums already if `begun` is 1, else they are not read.
    """

    def __init__(
        self, v, y, y_row, y_step, lane_step, begun, end, rows_left, streamed, rows: int, vectors: int
    ) -> None:
        self._v, self._begun, self._streamed = v, begun, streamed
        # Rows that there are none of repeat the last one, and are written before it.
        last = rows_left - 1
        self.rows = [v.minimum(i, last) for i in range(rows)]
        self._places = [[y + y_row * row + y_step * j for j in range(vectors)] for row in self.rows]
        self._inside = [v.lanes_between(0, end - lane_step * j) for j in range(vectors)]
        with v.unless(streamed, 1):
            for place in sum(self._places, []):
                v.prefetch(place, write=True)

    def biases(self, bias) -> list:
        """Return sums to begin with: of all vectors of a row, the scalar that `bias` has for it."""
        return [self._v.broadcast(bias + row * self._v.itemsize) for row in self.rows for _ in self._inside]

    def finish(self, sums, relu) -> None:
        """Write sums, row after row, with what there is already; clip them if `relu` is 1.

        If the block is `streamed`, it is whole, and written past the caches.
        """
        v = self._v
        places = list(zip(sum(self._places, []), self._inside * len(self._places), strict=True))

        def add_begun(*sums):
            return [v.masked_load(*place) + value for place, value in zip(places, sums, strict=True)]

        sums = v.repeat(self._begun, sums, add_begun)
        sums = v.repeat(relu, sums, lambda *sums: [v.relu(value) for value in sums])
        # rows that there are none of come first
        written = [
            (value, *place)
            for row in reversed(range(len(self._places)))
            for value, place in list(zip(sums, places, strict=True))[row * len(self._inside) :][: len(self._inside)]
        ]
        with v.when(self._streamed, 1):
            for value, place, _ in written:
                v.store_nontemporal(value, place)
        with v.unless(self._streamed, 1):
            for value, place, mask in written:
                v.masked_store(value, place, mask)


def block_kernel(block: Callable[[int, int], Callable], rows: int, vectors: int, name: str, arity: int) -> Any:
    """Return the intrinsic of ``block(rows or rows / 2, 1 .. vectors)``; its last two arguments choose the size."""

    def emit(v, *arguments):
        *operands, rows_used, vectors_used = arguments
        for i in (rows // 2, rows):
            for j in range(1, vectors + 1):
                with v.when(rows_used, i), v.when(vectors_used, j):
                    block(i, j)(v, *operands)

    return simd.kernel(emit, name, arity)
