"""Blocks of the output in registers: where one lies, how sums are added to it, and a kernel for each size."""

from collections.abc import Callable
from typing import Any

from nbfftconv import simd

#: Products of a work item, at most, as far as it can be cut: a call answers signals between two items.
MOST_PRODUCTS = 2**29


class OutputBlock:
    """A block of rows × vectors of the output, `y_row` bytes from row to row, of which `rows_left` are in memory.

    Of the pixels of a row, those up to `end` are written, and those from `first` on hold sums already.
    """

    def __init__(self, v, y, y_row, first, end, rows_left, rows: int, vectors: int) -> None:
        self._v = v
        # Rows that there are none of repeat the last one, and are written before it.
        last = rows_left - 1
        self.rows = [v.minimum(i, last) for i in range(rows)]
        self._places = [[y + y_row * row + j * v.vector_bytes for j in range(vectors)] for row in self.rows]
        self._inside = [v.lanes_between(0, end, j * v.lanes) for j in range(vectors)]
        self._begun = [v.lanes_between(first, end, j * v.lanes) for j in range(vectors)]
        for place in sum(self._places, []):
            v.prefetch(place, write=True)

    def add(self, sums, biases, relu) -> None:
        """Add sums, row after row, and a bias for each row; clip what is written if `relu` is 1."""
        v, sums, totals = self._v, iter(sums), []
        for places, bias in zip(self._places, biases, strict=True):
            row = zip(places, self._begun, strict=True)
            totals.append([v.masked_load(place, mask) + bias + next(sums) for place, mask in row])
        for clip in (False, True):
            with v.when(relu, int(clip)):
                for row, places in zip(reversed(totals), reversed(self._places), strict=True):
                    for value, place, mask in zip(row, places, self._inside, strict=True):
                        v.masked_store(v.relu(value) if clip else value, place, mask)


def block_kernel(block: Callable[[int, int], Callable], rows: int, vectors: int, name: str, arity: int) -> Any:
    """Return the intrinsic of ``block(rows or rows / 2, 1 .. vectors)``; its last two arguments choose the size."""

    def emit(v, *arguments):
        *operands, rows_used, vectors_used = arguments
        for i in (rows // 2, rows):
            for j in range(1, vectors + 1):
                with v.when(rows_used, i), v.when(vectors_used, j):
                    block(i, j)(v, *operands)

    return simd.kernel(emit, name, arity)
