"""What stages that transform tiles have in common: the transform, and each worker's memory for a lane block of tiles.

Transforms of many tiles read them by an indirection buffer, which is of their own making: from the `Tile` of each
lane. All channels of a lane block have the same one, a channel apart. Transforms back write to one address a lane, or
rows of all lanes side by side.
"""

from typing import NamedTuple

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit
from nbfftconv.passes.views import NO_TILE, Tile, View, next_position, position_of, row_step, tile_at, tiles_of
from nbfftconv.records import fields
from nbfftconv.rounding import round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import LINE_BYTES
from nbfftconv.transforms import TILE_BYTES, Functions, Layout, TileTransform

#: A transform of the tiles of one array: addresses of its functions and of what they read, tiles that it transforms
#: together, bytes of an entry, bins of a spectrum, rows of a tile, vectors in a row, bytes from a row to the next, and
#: what an inverse transform has to be divided by.
TRANSFORM = fields(
    "forward", "inverse", "context", "point", "write",
    "lanes", "entry", "bins", "rows", "row_vectors", "row", "divisor",
)  # fmt: skip
#: A worker's memory: `address` is that of the first worker's, `worker` the bytes to the next one's. It begins with
#: tiles, `tile` bytes each; at `work` is the transform's work, at `factors` what results are multiplied by and what is
#: added to them, at `largest` a vector of the largest magnitudes, at `tiles` the `Tile` of each lane, at `indirection`
#: the buffer of what is read, and then, `places` bytes each, those of what is written, at `strips` tiles side by side.
WORKSPACE = fields(
    "address", "worker", "tile", "work", "factors", "largest", "tiles", "indirection", "places", "strips"
)


def transform_numbers(transform: TileTransform, name: str, rows: int, itemsize: int) -> tuple[int, ...]:
    """Return the numbers of `TRANSFORM`, of the "input", "weight" or "output"; a tile has so many rows."""
    layout, row = transform.layout, transform.layout.pitch * itemsize
    functions: Functions = getattr(transform, name)
    entry = layout.vectors * VECTOR_BYTES
    return (*functions, layout.lanes, entry, layout.bins, rows, row // VECTOR_BYTES, row, transform.divisor)


def workspace_numbers(transform: TileTransform, rows: int, real: type, written: int) -> tuple[int, ...]:
    """Return the numbers of `WORKSPACE`; `address` and `worker` are zero.

    So many lane blocks are `written` where they belong, by indirection buffers.
    """
    layout, itemsize = transform.layout, np.dtype(real).itemsize
    tile = rows * layout.pitch * itemsize
    work = round_up(layout.lanes * tile, LINE_BYTES)
    factors = work + round_up(transform.work_items * itemsize, LINE_BYTES)
    largest = factors + LINE_BYTES
    tiles = largest + LINE_BYTES
    indirection = tiles + round_up(layout.lanes * TILE_BYTES if layout.lanes > 1 else 0, LINE_BYTES)
    places = round_up(rows * transform.indirection_bytes, LINE_BYTES)
    strips = indirection + (1 + written) * places
    return 0, 0, tile, work, factors, largest, tiles, indirection, places, strips


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
    def of(cls, view: View, layout: Layout, itemsize: int) -> "Strips":
        """Return the strips of what is written to a view."""
        lanes, tile_row = layout.lanes, layout.pitch * itemsize
        columns = min(lanes, view.x.tiles) * view.x.samples
        if view.x.sample_step == 1 and view.x.tiles <= lanes:  # as in the array: rows follow each other
            columns = view.x.size
        row = columns * itemsize
        # what is written behind the last row of a strip hits the next one nowhere
        strip = round_up(view.y.samples * row + tile_row, LINE_BYTES)
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
def _note_tile(memory, r, lane, tile):
    """Note the tile of a lane."""
    numbers = simd.pointer(np.int64, memory + r.workspace.tiles + lane * TILE_BYTES)
    numbers[0], numbers[1], numbers[2], numbers[3], numbers[4] = tile


@njit()
def places_of(w, memory, index):
    """Return the address of an indirection buffer: 0 is of what is read, from 1 on they are of what is written."""
    return memory + w.indirection + index * w.places


@njit()
def _point(r, memory, row_bytes, rows, index):
    """Let an indirection buffer point to the tiles that were noted."""
    t, w = r.transform, r.workspace
    simd.call(t.point, (t.context, memory + w.tiles, places_of(w, memory, index), row_bytes, rows))


@njit()
def point_to_array(v, r, memory, lane_block, channel_phases, index):
    """Let an indirection buffer point to the tiles of a lane block in an array whose columns are neighbours."""
    tile, count = tiles_of(v, r.transform.lanes, lane_block)
    position = position_of(v, tile)
    for lane in range(r.transform.lanes):
        if lane > 0:
            position = next_position(v, position, 1)
        _note_tile(memory, r, lane, tile_at(v, position, channel_phases) if lane < count else NO_TILE)
    _point(r, memory, row_step(v), v.y.samples, index)


@njit()
def point_to_tiles(r, memory, rows):
    """Let the indirection buffer point to the tiles of a lane block in the worker's memory."""
    t = r.transform
    for lane in range(t.lanes):
        _note_tile(memory, r, lane, Tile(lane * r.workspace.tile, 0, rows, 0, t.row_vectors * t.lanes))
    _point(r, memory, t.row, rows, 0)


@njit()
def point_to_strips(itemsize, v, r, memory, lane_block, index):
    """Let an indirection buffer point to strips: tiles of a lane block side by side, every row of tiles in one."""
    lanes, strips = r.transform.lanes, r.strips
    addresses = simd.pointer(np.int64, places_of(r.workspace, memory, index))
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
