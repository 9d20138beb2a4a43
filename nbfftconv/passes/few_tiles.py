"""Products of few tiles, which would leave most lanes of a lane block empty: their lanes are filters instead.

A lane block of real spectra of which few lanes have a tile: per bin, Y[t, k] = sum over c of X[t, c] · W[k, c], where
the entries of X are broadcast, and what is a vector of the kernels' spectra is one of Y. It is transposed afterwards,
so that lanes are tiles as in other lane blocks.
"""

from typing import Any

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.accumulate import REAL, Few, Matrix
from nbfftconv.passes.context import Context, Spectra
from nbfftconv.passes.views import SPECTRA
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.threads import Task

#: Of the lanes, a half has a tile at most; and so many as a block in registers has rows.
_PART = 2

# `products` is where Y is, as [bin, group, tile, vector of filters, lane].
_TRANSPOSE = RecordType(fields("products", "groups", "filters", "vectors", "tiles", spectra=SPECTRA))


def _emit_transpose(v, source, row, last_row, target, count):
    rows = v.transpose([v.load(source + row * v.minimum(i, last_row)) for i in range(v.lanes)])
    for i, value in enumerate(rows):
        v.masked_store(value, target + i * v.vector_bytes, v.all_lanes_if(v.maximum(count - i, 0)))


# (source, row, last_row, target, count): `count` vectors of a square whose rows are `row` bytes apart, transposed; what
# is beyond the last row repeats it.
_transpose_square = simd.kernel(_emit_transpose, "transpose_square")


def _stage(real):
    lanes, vector_bytes = simd.lanes(real), simd.VECTOR_BYTES

    def few_tiles_to_lanes(r, worker, begin, end):
        row = r.vectors * vector_bytes
        for item in range(begin, end):
            bin, group = item // r.groups, item % r.groups
            for vector in range(r.vectors):
                first = vector * lanes
                _transpose_square(real, (
                    r.products + item * r.tiles * row + vector * vector_bytes, row, r.tiles - 1,
                    r.spectra.address + bin * r.spectra.bin + (group * r.filters + first) * vector_bytes,
                    min(lanes, r.filters - first),
                ))  # fmt: skip

    return few_tiles_to_lanes


_few_tiles_to_lanes = jit.stage(_TRANSPOSE)(_stage)


def few_tiles(tiles: Any, lanes: Any) -> Any:
    """Return how many tiles the last lane block has, if these are few, else 0; of an array, one."""
    rest = tiles % lanes
    return np.where((rest <= lanes // _PART) & (rest <= REAL.rows), rest, 0)


class FewTiles:
    """The products of the last lane block of the block under way, if its tiles are few.

    Parameters
    ----------
    context : Context
    input, output : Spectra
        Of the block.

    Attributes
    ----------
    tiles : int
        How many there are, 0 if they are not few.
    operands : tuple or None
        What `nbfftconv.accumulate.conjugate_product` takes.
    """

    def __init__(self, context: Context, input: Spectra, output: Spectra) -> None:
        self._context = context
        self.tiles = int(few_tiles(context.block_tiles, context.lanes)) if context.blocking is REAL else 0
        self.operands: Few | None = None
        if self.tiles == 0:
            return
        x, self._output = (each.from_lane_block(context.lane_blocks - 1) for each in (input, output))
        entry, self._vectors = context.entry, cdiv(context.group_filters, context.lanes)
        row = self._vectors * entry
        self._products = context.borrow(context.bins * context.groups * self.tiles * row).address
        b = Matrix(
            context.real, x.address, group=context.group_depth * entry, row=context.plan.dtype.itemsize, column=entry,
            bin=x.bin, blocking=REAL,
        )  # fmt: skip
        c = Matrix(
            context.real, self._products, group=self.tiles * row, row=row, column=entry,
            bin=context.groups * self.tiles * row, blocking=REAL,
        )  # fmt: skip
        self.operands = b, c, self.tiles

    def add_transposition(self) -> None:
        """Let tiles be lanes, once the products are there."""
        if self.tiles == 0:
            return
        context, y = self._context, self._output
        sizes = self._products, context.groups, context.group_filters, self._vectors, self.tiles
        record = _TRANSPOSE.make((*sizes, (y.address, y.lane_block, y.bin)))
        stage = _few_tiles_to_lanes.address(context.real)
        context.add_task(Task(stage, record, context.bins * context.groups, context.workers))
