"""What stages that transform tiles have in common: the transform, and each worker's memory for a lane block of tiles.

Transforms of many tiles read rows by an indirection buffer: of every row, for each lane the address of its samples and
a mask of those that are not zero. All channels of a lane block have the same one, a channel apart. Transforms back
write to one address a lane.
"""

from typing import NamedTuple

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit
from nbfftconv.passes.records import fields
from nbfftconv.passes.views import NO_TILE, Tile, View, next_position, position_of, row_step, tile_at, tiles_of
from nbfftconv.rounding import round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import TileTransform, indirection_row_bytes

_LINE = 64

#: A transform: addresses of its functions and of what they read, tiles that it transforms together, bins of a spectrum,
#: rows of a tile, vectors in a row, bytes from a row to the next, and samples of a tile.
TRANSFORM = fields("forward", "inverse", "context", "lanes", "bins", "rows", "row_vectors", "row", "samples")
#: A worker's memory: `address` is that of the first worker's, `worker` the bytes to the next one's. It begins with
#: tiles, `tile` bytes each; at `work` is the transform's work, at `factors` what results are multiplied by and what is
#: added to them, at `largest` a vector of the largest magnitudes, at `indirection` the buffer, of `indirection_row`
#: bytes a row, at `strips` tiles side by side.
WORKSPACE = fields(
    "address", "worker", "tile", "work", "factors", "largest", "indirection", "indirection_row", "strips"
)


def transform_numbers(transform: TileTransform, tile: tuple[int, int], itemsize: int) -> tuple[int, ...]:
    """Return the numbers of `TRANSFORM`."""
    layout, row = transform.layout, transform.layout.pitch * itemsize
    addresses = transform.forward, transform.inverse, transform.context
    return (*addresses, layout.lanes, layout.bins, tile[0], row // VECTOR_BYTES, row, tile[0] * tile[1])


def workspace_numbers(transform: TileTransform, rows: int, real: type) -> tuple[int, ...]:
    """Return the numbers of `WORKSPACE`; `address` and `worker` are zero."""
    layout, itemsize = transform.layout, np.dtype(real).itemsize
    tile = rows * layout.pitch * itemsize
    work = round_up(layout.lanes * tile, _LINE)
    factors = work + round_up(transform.work_items * itemsize, _LINE)
    largest = factors + _LINE
    indirection = largest + _LINE
    indirection_row = indirection_row_bytes(real, layout.pitch) if layout.lanes > 1 else 0
    strips = indirection + round_up(rows * indirection_row, _LINE)
    return 0, 0, tile, work, factors, largest, indirection, indirection_row, strips


class Strips(NamedTuple):
    """Tiles side by side in a worker's memory, in strips of which whole rows are written.

    Attributes
    ----------
    row : int
        Bytes from a row of a strip to the next.
    strip : int
        Bytes from a strip to the next.
    total : int
        Strips of a lane block: a row of tiles each, the first of which may begin before it; one for lanes without a
        tile.
    """

    row: int
    strip: int
    total: int

    @classmethod
    def of(cls, view: View, lanes: int, tile_row: int, itemsize: int) -> "Strips":
        """Return the strips of what is written to a view; `tile_row` is the bytes of a row of a tile."""
        columns = min(lanes, view.x.tiles) * view.x.samples
        if view.x.sample_step == 1 and view.x.tiles <= lanes:  # as in the array: rows follow each other
            columns = view.x.size
        row = columns * itemsize
        # what is written behind the last row of a strip hits the next one nowhere
        strip = round_up(view.y.samples * row + tile_row, _LINE)
        return cls(row, strip, (lanes - 2) // view.x.tiles + 3)

    @property
    def nbytes(self) -> int:
        """Bytes of the strips of a lane block."""
        return self.total * self.strip


#: The record of `Strips`.
STRIPS = fields(*Strips._fields)


@njit()
def memory_of(w, worker):
    """Return the address of a worker's memory."""
    return w.address + worker * w.worker


@njit()
def _point_rows(r, memory, lane, rows, row_bytes, tile):
    """Note where a lane's rows are, and what of them is not zero."""
    t, w = r.transform, r.workspace
    for i in range(rows):
        row = memory + w.indirection + i * w.indirection_row
        simd.pointer(np.int64, row)[lane] = tile.offset + i * row_bytes
        masks = simd.pointer(np.uint16, row + 8 * t.lanes)
        for vector in range(t.row_vectors):
            bits = 0
            if tile.above <= i and i < tile.below:
                last = min(max(tile.end - vector * t.lanes, 0), t.lanes)
                bits = (1 << last) - (1 << min(max(tile.begin - vector * t.lanes, 0), last))
            masks[vector * t.lanes + lane] = bits


@njit()
def point_to_array(v, r, memory, lane_block, channel_phases):
    """Let the indirection buffer point to the tiles of a lane block in an array whose columns are neighbours."""
    rows, row_bytes = v.y.samples, row_step(v)
    tile, count = tiles_of(v, r.transform.lanes, lane_block)
    position = position_of(v, tile)
    for lane in range(r.transform.lanes):
        if lane > 0:
            position = next_position(v, position, 1)
        if lane < count:
            _point_rows(r, memory, lane, rows, row_bytes, tile_at(v, position, channel_phases))
        else:
            _point_rows(r, memory, lane, rows, row_bytes, NO_TILE)


@njit()
def point_to_tiles(r, memory, rows):
    """Let the indirection buffer point to the tiles of a lane block in the worker's memory."""
    t = r.transform
    for lane in range(t.lanes):
        tile = Tile(lane * r.workspace.tile, 0, rows, 0, t.row_vectors * t.lanes)
        _point_rows(r, memory, lane, rows, t.row, tile)


@njit()
def point_to_strips(itemsize, v, r, memory, lane_block):
    """Let the buffer of addresses point to strips: tiles of a lane block side by side, every row of tiles in one."""
    lanes, strips = r.transform.lanes, r.strips
    addresses = simd.pointer(np.int64, memory + r.workspace.indirection)
    tile, count = tiles_of(v, lanes, lane_block)
    strip, at, column = 0, 0, tile % v.x.tiles
    for lane in range(lanes):
        if lane > 0:
            column += 1
            at += v.x.samples * itemsize
        if column == v.x.tiles:
            column, strip = 0, strip + 1
            at = strip * strips.strip
        addresses[lane] = at if lane < count else (strips.total - 1) * strips.strip
