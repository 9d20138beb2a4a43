"""Rows of many tiles, a tile in each lane, from and to memory: each lane's row is where it is, and is transposed.

An indirection buffer has, for every row, an int64 for each lane, the address of its samples in bytes from a base on,
and 16 bits for each lane of each vector of the row, of the samples that are not zero.
"""

from typing import Any

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import Callback, njit
from nbfftconv.rounding import cdiv
from nbfftconv.transforms import TILE_BYTES, signature


def row_bytes(real: type, pitch: int) -> int:
    """Bytes of an indirection buffer for a row of `pitch` scalars."""
    return 8 * simd.lanes(real) + 2 * pitch


@njit()
def point_rows(lanes, indirection, lane, tile, rows, row_bytes, vectors):
    """Note where a lane's rows are, of so many vectors, and what of them is not zero; a tile is as in `Functions`."""
    offset, above, below, begin, end = tile
    for i in range(rows):
        row = indirection + i * (8 * lanes + 2 * vectors * lanes)
        simd.pointer(np.int64, row)[lane] = offset + i * row_bytes
        masks = simd.pointer(np.uint16, row + 8 * lanes)
        for vector in range(vectors):
            bits = 0
            if above <= i and i < below:
                last = min(max(end - vector * lanes, 0), lanes)
                bits = (1 << last) - (1 << min(max(begin - vector * lanes, 0), last))
            masks[vector * lanes + lane] = bits


@njit()
def tile_of(tiles, lane):
    """Return the numbers of a lane's tile."""
    tile = simd.pointer(np.int64, tiles + lane * TILE_BYTES)
    return tile[0], tile[1], tile[2], tile[3], tile[4]


def point_callback(context: np.dtype) -> Callback:
    """Return what fills such a buffer: `point` of `nbfftconv.transforms.Functions`.

    Of the context it reads `row_vectors`, the vectors of a row.
    """

    def factory(real):
        lanes = simd.lanes(real)

        def point(c, tiles, indirection, row_bytes, rows):
            for lane in range(lanes):
                point_rows(lanes, indirection, lane, tile_of(tiles, lane), rows, row_bytes, c.row_vectors)

        return point

    return Callback(factory, signature(context, arguments=5))


def load_row(v: Any, length: int, pointers: Any, base: Any, ahead: Any, magnitude: Any) -> tuple[list[Any], Any, Any]:
    """Emit the load of a row; return its samples, where the next row's addresses are, and the largest magnitudes.

    What is `ahead` bytes further on is fetched for a later call.
    """
    masks, groups = 8 * v.lanes, cdiv(length, v.lanes)  # masks follow the addresses
    samples = []
    for group in range(groups):
        of_group = pointers + (masks + 2 * group * v.lanes)
        more, magnitude = load_vector(v, pointers, of_group, base, group * v.vector_bytes, ahead, magnitude)
        samples += more
    return samples[:length], pointers + (masks + 2 * groups * v.lanes), magnitude


def load_vector(
    v: Any, addresses: Any, masks: Any, base: Any, offset: Any, ahead: Any, magnitude: Any
) -> tuple[list[Any], Any]:
    """Emit the load of a vector of each lane's row, `offset` bytes after its address; return as `load_row` does."""
    rows = []
    for lane in range(v.lanes):
        at = base + v.load_integer(addresses + 8 * lane) + offset
        v.prefetch(at + ahead)
        rows.append(v.masked_load(at, v.load_mask(masks + 2 * lane)))
        magnitude = v.maximum(magnitude, v.magnitude(rows[-1]))
    return v.transpose(rows), magnitude


def store_row(v: Any, samples: list[Any], addresses: Any, base: Any) -> None:
    """Emit the store of a row, to an address for each lane.

    Whole vectors are written, each before what begins in its midst if that is of a later lane or row.
    """
    groups = cdiv(len(samples), v.lanes)
    samples = samples + [0.0] * (groups * v.lanes - len(samples))
    for group in reversed(range(groups)):
        of_group = samples[group * v.lanes : (group + 1) * v.lanes]
        store_vector(v, of_group, addresses, base, group * v.vector_bytes)


def store_vector(v: Any, samples: list[Any], addresses: Any, base: Any, offset: Any) -> None:
    """Emit the store of a vector of each lane's row, `offset` bytes after its address."""
    for lane, value in enumerate(v.transpose(samples)):
        v.store(value, base + v.load_integer(addresses + 8 * lane) + offset)
