"""Blocks of the output in registers: where one lies, how sums are added to it, and a kernel for each size.

Also what passes of such blocks have in common: how many threads they are worth, and their programs.
"""

import functools
import itertools
import math
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbfftconv import simd, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import Callback, njit
from nbfftconv.program import Program, Recording
from nbfftconv.records import Record
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET
from nbfftconv.threads import in_turns, share

#: Products of a work item, at most, as far as it can be cut: a call answers signals between two items.
MOST_PRODUCTS = 2**29
#: Outputs larger than this are written past the caches. Smaller ones, which take little more time than their writing,
#: find room in the last level, where the next layer finds them.
_STREAMED_BYTES = TARGET.last_level_bytes
#: Products that a core is taken to compute in a second.
_PRODUCTS_PER_SECOND = 5e10


def workers_for(geometry: ConvGeometry) -> int:
    """Return the number of threads for a pass."""
    return threads.get_workers(geometry.multiply_adds / _PRODUCTS_PER_SECOND)[0]


@functools.lru_cache(maxsize=64)
def no_biases(filters: int, dtype: np.dtype) -> np.ndarray:
    """Return a bias of zero for each filter."""
    return np.zeros(filters, dtype)


class Variant(NamedTuple):
    """What else a program depends on than the geometry.

    Attributes
    ----------
    dtype : numpy.dtype
    has_bias, relu : bool
    stream : bool
        Whether the output is large, and begins at a multiple of a vector's size: it is written past the caches if its
        rows do, too.
    workers : int
    """

    dtype: np.dtype
    has_bias: bool
    relu: bool
    stream: bool
    workers: int


def program_of(
    stage: Callback, record: Record, items: int, turns: int, variant: Variant, *kept: Any, notes: int = 0
) -> Program:
    """Return the program of a stage over items, whose record, a copy, lacks what depends on a call.

    Its `zeros` is the address of biases of zero, and `worker` the bytes of scratch memory of a thread. What is `kept`
    has addresses in it. If it `notes` something, each worker has so many words at its `largest` for that.
    """
    recording, workers = Recording(), variant.workers
    if notes:
        record["largest"] = recording.zeroed(notes * workers, np.int64).address
    for name in ("input", "weight", "output"):
        record[name] = recording.operand(name).address
    record["bias"] = recording.operand("bias").address if variant.has_bias else record["zeros"]
    record["relu"] = variant.relu
    record["stream"] = variant.stream and record["x_output"] * variant.dtype.itemsize % VECTOR_BYTES == 0
    record["scratch"] = recording.borrow(workers * record["worker"]).address
    return recording.program(in_turns(stage.address(variant.dtype.type), record, items, workers, turns), *kept)


class Programs:
    """The programs of a pass: for outputs that are written past the caches, and for others.

    Parameters
    ----------
    make : callable
        Returns the program of a variant.
    geometry : ConvGeometry
    dtype : numpy.dtype
    has_bias, relu : bool
    """

    def __init__(
        self,
        make: Callable[[ConvGeometry, Variant], Program],
        geometry: ConvGeometry,
        dtype: np.dtype,
        has_bias: bool,
        relu: bool,
    ) -> None:
        self._make, self._geometry = make, geometry
        self._variant = Variant(dtype, has_bias, relu, False, workers_for(geometry))
        self._is_large = math.prod(geometry.output_shape) * dtype.itemsize > _STREAMED_BYTES
        self._program = None if self._is_large else make(geometry, self._variant)

    def run(self, input: int, weight: int, output: int, bias: int) -> "array[int]":
        """Run one of them on arrays at these addresses; return what its workers have noted."""
        program = self._program
        if program is None:
            stream = self._is_large and output % VECTOR_BYTES == 0
            program = self._make(self._geometry, self._variant._replace(stream=stream))
        return program.run(input=input, weight=weight, output=output, bias=bias)


@njit()
def part_of(r, item, filters):
    """Return image, group, the first row and column of the tile, and the range of filters of an item.

    The filters of a group, or blocks of them, are so many.
    """
    chunk, tile = item % r.chunks, item // r.chunks
    x = tile % r.x_count * r.x_core
    y = tile // r.x_count % r.y_count * r.y_core
    group = tile // (r.x_count * r.y_count) % r.groups
    n = tile // (r.x_count * r.y_count * r.groups)
    first, last = share(filters, chunk, r.chunks)
    return n, group, y, x, first, last


#: How a block is written: only pixels that there are; all, past the caches; all.
MASKED, STREAMED, WHOLE = 0, 1, 2


@njit()
def mode_of(r, is_last, is_whole):
    """Return how a block is written, whose sums are finished if it is the last of its pixels."""
    if not is_whole:
        return MASKED
    return STREAMED if r.stream != 0 and is_last else WHOLE


class OutputBlock:
    """A block of rows × vectors of the output, `y_row` bytes from row to row, of which `rows_left` are in memory.

    The vectors of the first row are at `places`; of each so many lanes as `ends` has are written, all if `mode` is not
    `MASKED`. They hold sums already if `begun` is 1, else they are not read.
    """

    def __init__(self, v, places, ends, y_row, begun, rows_left, mode, rows: int) -> None:
        self._v, self._begun, self._mode = v, begun, mode
        # Rows that there are none of repeat the last one, and are written before it.
        last = rows_left - 1
        self.rows = [v.minimum(i, last) for i in range(rows)]
        self._places = [[place + y_row * row for place in places] for row in self.rows]
        self._inside = [v.lanes_between(0, end) for end in ends]
        with v.unless(mode, STREAMED):
            for place in itertools.chain(*self._places):
                v.prefetch(place, write=True)

    def biases(self, bias) -> list:
        """Return sums to begin with: of all vectors of a row, the scalar that `bias` has for it."""
        return [self._v.broadcast(bias + row * self._v.itemsize) for row in self.rows for _ in self._inside]

    def finish(self, sums, relu) -> None:
        """Write sums, row after row, with what there is already; clip them if `relu` is 1."""
        v, vectors = self._v, len(self._inside)

        def add_begun(*sums):
            places = zip(itertools.chain(*self._places), self._inside * len(self._places), strict=True)
            return [v.masked_load(*place) + value for place, value in zip(places, sums, strict=True)]

        sums = v.repeat(self._begun, list(sums), add_begun)
        sums = v.repeat(relu, sums, lambda *sums: [v.relu(value) for value in sums])
        rows = [sums[i : i + vectors] for i in range(0, len(sums), vectors)]
        written = [
            (value, place, mask)
            for row, places in zip(reversed(rows), reversed(self._places), strict=True)
            for value, place, mask in zip(row, places, self._inside, strict=True)
        ]
        with v.when(self._mode, MASKED):
            for value, place, mask in written:
                v.masked_store(value, place, mask)
        for mode, store in ((STREAMED, v.store_nontemporal), (WHOLE, v.store)):
            with v.when(self._mode, mode):
                for value, place, _ in written:
                    store(value, place)


def block_kernel(block: Callable[[int, int], Callable], rows: int, vectors: int, name: str, arity: int) -> Any:
    """Return the intrinsic of ``block(rows or rows / 2, 1 .. vectors)``; its last two arguments choose the size."""

    def emit(v, *arguments):
        *operands, rows_used, vectors_used = arguments
        for i in (rows // 2, rows):
            for j in range(1, vectors + 1):
                with v.when(rows_used, i), v.when(vectors_used, j):
                    block(i, j)(v, *operands)

    return simd.kernel(emit, name, arity)
