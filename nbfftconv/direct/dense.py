"""Groups of many filters: a matrix product whose lanes are output pixels.

Y[k, p] = sum over i of W[k, i] · X[i, p], where i = (c, u, v), and X[i, p] is the pixel, or the zero of the padding,
that output pixel p of an image has under tap (u, v) in channel c. The kernels are packed once. A work item is a tile of
pixels and some filters. It goes through X block by block along i, whole channels; the output holds the sums of the
blocks so far. Blocks do not depend on the threads.

Lanes are neighbours in a row of the output: X is read from windows, a table telling where the pixels under a tap begin.
Where rows are short, lanes would be empty. There they are pixels of several rows, and X is gathered for every tap.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from nbfftconv import jit, scratch, simd, threads
from nbfftconv.direct.block import (
    MOST_PRODUCTS,
    OutputBlock,
    Programs,
    Variant,
    block_kernel,
    mode_of,
    no_biases,
    part_of,
    program_of,
)
from nbfftconv.direct.gather import clear_lanes, gather_lanes
from nbfftconv.direct.window import AXIS_FIELDS, axis_in_window, gather_plane, gather_window
from nbfftconv.geometry import FLAT, ConvGeometry
from nbfftconv.planes import PLANES, input_planes, output_plane_of, plane_of
from nbfftconv.program import Program
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import LINE_BYTES, TARGET, WIDEST_VECTOR_BYTES, power_of_two
from nbfftconv.threads import share

# The block of Y in registers: vectors of pixels, and filters, a power of two as their numbers are. X takes as many
# registers as there are vectors, and a weight one.
_VECTORS = 3
_ROWS = power_of_two((TARGET.registers - _VECTORS - 1) // _VECTORS)
#: Along i, X under one block of pixels takes three quarters of the L1 cache, past which the kernels stream.
_DEPTH = TARGET.l1_bytes * 3 // 4 // (_VECTORS * WIDEST_VECTOR_BYTES)


#: A scalar is gathered in the time of so many products.
_OF_SCALAR = 4
#: Vectors of pixels of a tile whose channels are all in one block, at most, ...
_MOST_VECTORS = 60
#: ... and where they are not, so that the sums so far stay in a cache. For each block of pixels, the kernels are read
#: once more, the first time from beyond the L2 cache.
_MOST_VECTORS_OF_SUMS = 12
#: Windows of all channels of a block take an eighth of the L2 cache.
_WINDOW_BYTES = TARGET.l2_bytes // 8
#: Of an image whose pixels are gathered for every tap, a tile is so many blocks.
_STRIP_BLOCKS = 2
#: Rows of windows that tiles share are gathered again: a tile is so many times as high, at least.
_SHARED = 2
#: Of more than so many phases most would be gathered in vain.
_MOST_PHASES = 4
#: Scalars, in vectors, that are gathered in the time of a call that does it.
_OF_CALL = 230
#: Filters of a work item: more share the gathered pixels, until their kernels, in float64, take more than three
#: quarters of the L2 cache; ...
_MOST_FILTERS = power_of_two(TARGET.l2_bytes * 3 // 4 // (_DEPTH * 8))
#: ... as few as this where there would not be as many work items as _ITEMS, enough for many threads.
_FEWEST_FILTERS = 64
_ITEMS = 24
#: An item has so many products, where it is cut for more items' sake.
_ITEM_PRODUCTS = 2**20

# Channels, filters and taps are those of a group; X is in blocks of `depth` rows. Tiles are of y_core × x_core pixels,
# or of x_core of all of an image. Planes that are one row are `flat`: rows of one window. `row`, `phase` and `window`
# are as in `gather_window`. What comes next of a channel, or in a row of all, is fetched by `next_calls` calls.
RECORD = RecordType(
    fields(
        "input", "weight", "output", "bias", "zeros", "table", "scratch", "worker",
        "groups", "channels", "filters", "taps", "depth", "relu", "stream", "turn", "turns",
        "filter_blocks", "chunks", "y_core", "x_core", "y_count", "x_count",
        "row_vectors", "row", "phase", "phases", "interleave", "window", "is_flat", "next_calls",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_FIELDS),
        planes=PLANES,
    )
)  # fmt: skip
_PACKING = RecordType(fields("weight", "packed", "filters", "taps", "filter_blocks"))


def _block(rows: int, vectors: int):
    """Return the emitter of a block of rows × vectors of Y."""

    def emit(v, *arguments):
        places = [arguments[i : i + _VECTORS][:vectors] for i in range(0, 3 * _VECTORS, _VECTORS)]
        (xs, ys, ends), rest = places, arguments[3 * _VECTORS :]
        table, count, w, ahead, line, bias, relu, y_row, begun, rows_left, mode = rest

        def add_products(entry, w, ahead, *sums):
            sums = list(sums)
            v.prefetch(ahead, level=2)
            offset = v.load_integer(entry)
            pixels = [v.load(x + offset) for x in xs]
            for i in range(rows):
                weight = v.broadcast(w + i * v.itemsize)
                for j in range(vectors):
                    sums[i * vectors + j] = v.fma(weight, pixels[j], sums[i * vectors + j])
            return [entry + 8, w + _ROWS * v.itemsize, ahead + line, *sums]

        output = OutputBlock(v, ys, ends, y_row, begun, rows_left, mode, rows)
        _, _, _, *sums = v.repeat(count, [table, w, ahead, *output.biases(bias)], add_products)
        output.finish(sums, relu)

    return emit


# (x of each vector, y, end, table, count, w, ahead, line, bias, relu, y_row, begun, rows_left, mode, rows, vectors):
# Y[:rows] = W · X, plus the bias, plus what Y holds if it was `begun`, of the first `end` lanes of each vector; of
# `rows`, _ROWS or half as many, only `rows_left` are in memory. X has `count` rows, as the table says; for each a line
# is fetched, `line` bytes apart.
_product = block_kernel(_block, _ROWS, _VECTORS, "product", 3 * _VECTORS + 13)


@jit.njit()
def _add_products(real, itemsize, lanes, r, n, group, block, i, depth, ahead, line, xs, ps, ends, vectors):
    """Add products to a block of Y: of filters, `depth` rows of X from `i` on, and `vectors` vectors.

    Those are at `xs` in a worker's memory; they begin with the pixels `ps` of an image, and have so many as `ends`.
    """
    k = block * _ROWS
    plane = r.y_output * r.x_output * itemsize
    filter = group * r.filters + k
    left = min(_ROWS, r.filters - k)
    w = r.weight + ((group * r.filter_blocks + block) * r.taps + i) * _ROWS * itemsize
    y = r.output + output_plane_of(r.planes, r.groups * r.filters, n, filter) * plane
    is_last = i + depth == r.taps
    is_whole = ends[0] >= lanes and (vectors < 2 or ends[1] >= lanes) and (vectors < 3 or ends[2] >= lanes)
    _product(real, (
        xs[0], xs[1], xs[2], y + ps[0] * itemsize, y + ps[1] * itemsize, y + ps[2] * itemsize,
        ends[0], ends[1], ends[2], r.table, depth, w, ahead, line,
        (r.bias if i == 0 else r.zeros) + filter * itemsize, r.relu if is_last else 0,
        r.planes.outputs * plane, 0 if i == 0 else 1, left, mode_of(r, is_last, is_whole),
        _ROWS // 2 if left <= _ROWS // 2 else _ROWS, vectors,
    ))  # fmt: skip


@jit.njit()
def gather_tile(real, itemsize, lanes, r, n, channel, channels, y, x, rows, memory):
    """Gather the windows of some channels of a tile of so many rows."""
    if r.is_flat != 0:
        gather_window(
            real, itemsize, lanes, r, r.input, plane_of(r.planes, n, channel), x, channels, r.row_vectors, memory
        )
        return
    for c in range(channels):
        gather_plane(
            real, itemsize, lanes, r, plane_of(r.planes, n, channel + c),
            y * r.y_stride * r.y_step - r.y_before, x * r.x_stride * r.x_step - r.x_before,
            (rows - 1) * r.y_stride + (r.y_kernel - 1) * r.y_dilation + 1, r.row_vectors, memory + c * r.window,
        )  # fmt: skip


@jit.njit()
def vector_of(r, lanes, memory, y, x, row_vectors, index):
    """Return where a vector of a tile is in its windows, its first pixel in the image, and its pixels in the row."""
    row, column = index // row_vectors, index % row_vectors
    window = memory + row * r.y_stride * r.row + column * VECTOR_BYTES
    first = x + column * lanes
    return window, (y + row) * r.x_output + first, min(x + r.x_core, r.x_output) - first


@jit.njit()
def next_pixels(r, itemsize, plane, y, x, i, depth):
    """Return where what is gathered next is in memory, which is fetched meanwhile; or, if that is not known, what was.

    It is of the next channels, or of the tile below, or, of flat planes, beside this one.
    """
    row = r.x_input * itemsize
    if r.is_flat != 0:
        here = r.input + plane * row + x * itemsize
        if i + depth < r.taps:
            return here + depth * row
        return here + r.x_core * itemsize if x + r.x_core < r.x_output else here
    top = max(0, y * r.y_stride * r.y_step - r.y_before)
    here = r.input + (plane * r.y_input + top) * row
    if r.x_count > 1:
        return here
    if i + depth < r.taps:
        return here + depth // (r.y_kernel * r.x_kernel) * r.y_input * row
    rows = (r.y_core - 1) * r.y_stride + (r.y_kernel - 1) * r.y_dilation + 1
    below = y * r.y_stride * r.y_step - r.y_before + rows * r.y_step
    return here + (below - top) * row if below < r.y_input else here


def _of_windows(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def dense_forward(r, worker, begin, end):
        memory = r.scratch + worker * r.worker
        taps = r.y_kernel * r.x_kernel
        first_block_of_x, last_block_of_x = share(cdiv(r.taps, r.depth), r.turn, r.turns)
        for item in range(begin, end):
            n, group, y0, x0, first_block, last_block = part_of(r, item, r.filter_blocks)
            rows, columns = min(r.y_core, r.y_output - y0), min(r.x_core, r.x_output - x0)
            row_vectors = cdiv(columns, lanes)
            vectors = rows * row_vectors
            for i in range(first_block_of_x * r.depth, min(last_block_of_x * r.depth, r.taps), r.depth):
                depth = min(r.depth, r.taps - i)
                channel = group * r.channels + i // taps
                gather_tile(real, itemsize, lanes, r, n, channel, depth // taps, y0, x0, rows, memory)
                plane = max(0, plane_of(r.planes, n, channel))
                next = next_pixels(r, itemsize, plane, y0, x0, i, depth)
                calls = 0
                for block in range(first_block, last_block):
                    for first in range(0, vectors, _VECTORS):
                        last = vectors - 1
                        a = vector_of(r, lanes, memory, y0, x0, row_vectors, first)
                        b = vector_of(r, lanes, memory, y0, x0, row_vectors, min(first + 1, last))
                        c = vector_of(r, lanes, memory, y0, x0, row_vectors, min(first + 2, last))
                        if r.is_flat != 0:
                            ahead, line = next + calls % r.next_calls * LINE_BYTES, r.x_input * itemsize
                        else:
                            channel, part = calls % (depth // taps), calls // (depth // taps) % r.next_calls
                            ahead = next + channel * r.y_input * r.x_input * itemsize + part * depth * LINE_BYTES
                            line = LINE_BYTES
                        _add_products(
                            real, itemsize, lanes, r, n, group, block, i, depth, ahead, line,
                            (a[0], b[0], c[0]), (a[1], b[1], c[1]), (a[2], b[2], c[2]), min(_VECTORS, vectors - first),
                        )  # fmt: skip
                        calls += 1
        if r.stream != 0:
            simd.fence()

    return dense_forward


@jit.njit()
def gather_vector(real, itemsize, lanes, r, n, group, begin, end, p, target, pitch):
    """Gather rows begin .. end - 1 of X for the vector of pixels from `p`, rows `pitch` bytes apart."""
    window = r.y_kernel * r.x_kernel
    stop = min(p + lanes, r.y_output * r.x_output)
    lane = 0
    while lane < lanes and p + lane < stop:  # a row of the output after the other
        oy, ox = (p + lane) // r.x_output, (p + lane) % r.x_output
        last = min(lane + r.x_output - ox, stop - p)
        # Lanes beyond the image are computed with, too.
        written = lanes if p + last == stop else last
        period = r.planes.taps * window  # from a channel to the next one whose plane is under the same tap
        for i in range(begin, min(end, begin + period)):
            c, tap = i // window, i % window
            y = (oy * r.y_stride + tap // r.x_kernel * r.y_dilation) * r.y_step - r.y_before
            x0 = ((ox - lane) * r.x_stride + tap % r.x_kernel * r.x_dilation) * r.x_step - r.x_before
            count = cdiv(end - i, period)  # of so many channels, whose planes are equally far apart
            row = target + (i - begin) * pitch
            plane = plane_of(r.planes, n, group * r.channels + c)
            if 0 <= y < r.y_input and plane >= 0:
                gather_lanes(
                    real, itemsize, r.input + (plane * r.y_input + y) * r.x_input * itemsize,
                    r.planes.planes * r.y_input * r.x_input * itemsize,
                    r.x_input, x0, r.x_stride * r.x_step, row, period * pitch, lane, written, count,
                )  # fmt: skip
            else:
                clear_lanes(real, row, period * pitch, lane, written, count)
        lane = last


def _of_pixels(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def dense_forward_gathered(r, worker, begin, end):
        x = r.scratch + worker * r.worker
        pixels = r.y_output * r.x_output
        first_block_of_x, last_block_of_x = share(cdiv(r.taps, r.depth), r.turn, r.turns)
        for item in range(begin, end):
            n, group, _, start, first_block, last_block = part_of(r, item, r.filter_blocks)
            for i in range(first_block_of_x * r.depth, min(last_block_of_x * r.depth, r.taps), r.depth):
                depth = min(r.depth, r.taps - i)
                for p in range(start, min(start + r.x_core, pixels), _VECTORS * lanes):
                    vectors = min(_VECTORS, cdiv(pixels - p, lanes))
                    for j in range(vectors):
                        gather_vector(
                            real, itemsize, lanes, r, n, group, i, i + depth, p + j * lanes, x + j * VECTOR_BYTES,
                            _VECTORS * VECTOR_BYTES,
                        )  # fmt: skip
                    xs = x, x + VECTOR_BYTES, x + 2 * VECTOR_BYTES
                    ps = p, p + lanes, p + 2 * lanes
                    ends = pixels - p, pixels - p - lanes, pixels - p - 2 * lanes
                    for block in range(first_block, last_block):
                        _add_products(real, itemsize, lanes, r, n, group, block, i, depth, x, 0, xs, ps, ends, vectors)
        if r.stream != 0:
            simd.fence()

    return dense_forward_gathered


def _pack(real):
    def dense_pack(r, worker, begin, end):
        for item in range(begin, end):
            group, block = item // r.filter_blocks, item % r.filter_blocks
            k = block * _ROWS
            source = simd.pointer(real, r.weight)
            target = simd.pointer(real, r.packed)
            first, start = (group * r.filters + k) * r.taps, item * r.taps * _ROWS
            for row in range(_ROWS):
                if k + row < r.filters:
                    for i in range(r.taps):
                        target[start + i * _ROWS + row] = source[first + row * r.taps + i]
                else:
                    for i in range(r.taps):
                        target[start + i * _ROWS + row] = real(0)

    return dense_pack


_forward_windows = jit.stage(RECORD)(_of_windows)
_forward_gathered = jit.stage(RECORD)(_of_pixels)
_pack_blocks = jit.stage(_PACKING)(_pack)


class _Tiles(NamedTuple):
    """Numbers of a record; of an image and a group, pixels with those that there are none of, and scalars gathered."""

    numbers: dict[str, int]
    pixels: int
    gathered: int


def _in_windows(
    geometry: ConvGeometry, y: dict[str, int], x: dict[str, int], dtype: np.dtype, wanted: int
) -> _Tiles | None:
    """Return tiles in windows, of which so many are wanted; None if a window would be too large, or mostly in vain."""
    lanes, itemsize = simd.lanes(dtype.type), dtype.itemsize
    channels, taps = geometry.weight_size[1], y["kernel"] * x["kernel"]
    vectors = cdiv(x["output"], lanes)
    if x["stride"] > _MOST_PHASES:
        return None
    depth = cdiv(channels, cdiv(channels, max(1, _DEPTH // taps)))
    most = _MOST_VECTORS if depth == channels else _MOST_VECTORS_OF_SUMS
    others = max(1, geometry.input_size[0] * geometry.groups)
    y_reach, x_reach = (axis["dilation"] * (axis["kernel"] - 1) for axis in (y, x))
    phases = min(x["stride"], x_reach + 1)
    if y["output"] == 1:
        most = min(most, max(_VECTORS, _WINDOW_BYTES // (depth * VECTOR_BYTES)))
    x_count = cdiv(vectors, most)
    if y["output"] == 1:
        x_count = max(x_count, min(cdiv(wanted, others), cdiv(vectors, _VECTORS)))
    x_vectors = cdiv(vectors, x_count)
    x_count = cdiv(vectors, x_vectors)
    row_vectors = x_vectors + cdiv(x_reach // x["stride"], lanes)
    # An odd number of vectors: the same pixel of neighbouring rows shall be in different sets of a cache.
    phase = (row_vectors | 1) * VECTOR_BYTES
    row = phases * phase
    depth = min(depth, _WINDOW_BYTES // (row * (y_reach + 1)))
    if depth == 0:
        return None
    fitting = (_WINDOW_BYTES // (depth * row) - y_reach - 1) // y["stride"] + 1
    fewest = min(fitting, max(1, _SHARED * (y_reach + 1 - y["stride"]) // y["stride"]))
    y_count = cdiv(y["output"], min(fitting, max(1, most // x_vectors)))
    y_count = max(y_count, min(cdiv(wanted, others * x_count), cdiv(y["output"], fewest)))
    y_core = cdiv(y["output"], y_count)
    while y_core < min(fitting, y["output"]) and y_core * x_vectors % _VECTORS != 0:  # whole blocks
        y_core += 1
    window = ((y_core - 1) * y["stride"] + y_reach + 1) * row
    y_count = cdiv(y["output"], y_core)
    numbers = {
        "depth": depth * taps, "y_core": y_core, "x_core": x_vectors * lanes, "y_count": y_count, "x_count": x_count,
        "worker": depth * window, "row_vectors": row_vectors, "row": row, "phase": phase, "phases": phases,
        "interleave": x["stride"], "window": window,
    }  # fmt: skip
    gathered = channels * y_count * x_count * window // itemsize
    return _Tiles(numbers, y["output"] * vectors * lanes, gathered)


def _gathered(channels: int, y: dict[str, int], x: dict[str, int], lanes: int, wanted: int) -> _Tiles:
    """Return tiles of pixels of all rows of an image, of which so many are wanted."""
    pixels, kernel = y["output"] * x["output"], y["kernel"] * x["kernel"]
    depth = cdiv(channels * kernel, cdiv(channels * kernel, _DEPTH))
    core = _VECTORS * lanes
    core *= max(1, min(_STRIP_BLOCKS, pixels // (core * wanted)))
    numbers = {
        "depth": depth, "y_core": 1, "x_core": core, "y_count": 1, "x_count": cdiv(pixels, core),
        "worker": depth * _VECTORS * VECTOR_BYTES,
    }  # fmt: skip
    vectors = cdiv(pixels, lanes)
    calls = vectors * kernel * cdiv(channels * kernel, depth)  # more where a vector has pixels of several rows
    gathered = (vectors * kernel * channels * lanes + calls * _OF_CALL) * (x["output"] + lanes) // x["output"]
    return _Tiles(numbers, vectors * lanes, gathered)


class Work(NamedTuple):
    """What a pass does: products, with those of lanes without a pixel, and scalars gathered."""

    products: int
    gathered: int


def in_products(work: Work) -> int:
    """Return the products that take the time of a pass."""
    return work.products + _OF_SCALAR * work.gathered


class Cut(NamedTuple):
    """How a geometry is cut.

    A record, to be copied, with all numbers and the addresses of two arrays: where the pixels under each tap begin in a
    worker's memory, in bytes, of int64; and biases of zero. Work items; turns; and its work.
    """

    record: Record
    arrays: tuple[np.ndarray, ...]
    items: int
    turns: int
    work: Work


def _effort(tiles: _Tiles, products: int) -> int:
    """Return what tiles cost, in products, of which each pixel has so many."""
    return in_products(Work(tiles.pixels * products, tiles.gathered))


@functools.lru_cache(maxsize=256)
def cut(geometry: ConvGeometry, dtype: np.dtype) -> Cut:
    """Return how a geometry is cut."""
    y, x = (axis_in_window(geometry.axis_numbers(axis)) for axis in (0, 1))
    for axis in (y, x):
        axis["stride"] = max(1, axis["stride"])
    images, lanes, itemsize = geometry.input_size[0], simd.lanes(dtype.type), dtype.itemsize
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    pixels, taps = y["output"] * x["output"], channels * kernel[0] * kernel[1]
    of_pixels = kernel == [1, 1] and geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0))
    is_flat = of_pixels and geometry.depth == FLAT
    if is_flat:
        x |= {"input": pixels, "output": pixels}
        y |= {"input": images * geometry.groups * channels, "output": 1}
    wanted = max(1, min(_ITEMS, cdiv(geometry.multiply_adds, _ITEM_PRODUCTS)))  # also of an empty batch
    tiles = _gathered(channels, y, x, lanes, cdiv(wanted, max(1, images * geometry.groups)))
    in_windows = _in_windows(geometry, y, x, dtype, wanted)
    # rows that are whole images are only gathered in windows
    products = filters * taps
    if in_windows is not None and (is_flat or _effort(in_windows, products) <= _effort(tiles, products)):
        tiles, numbers = in_windows, in_windows.numbers
        c, u, v = np.ogrid[: numbers["depth"] // (kernel[0] * kernel[1]), : kernel[0], : kernel[1]]
        turn, phase = np.divmod(v * x["dilation"], x["stride"])
        places = c * numbers["window"] + u * (y["dilation"] * numbers["row"])
        table = places + phase * numbers["phase"] + turn * itemsize
        rows = numbers["y_core"] * y["stride"] * y["step"]
        lines = numbers["x_core"] * itemsize if is_flat else cdiv(rows * x["input"] * itemsize, numbers["depth"])
        numbers["next_calls"] = max(1, cdiv(lines, LINE_BYTES))
        numbers["is_flat"] = int(is_flat)
    else:
        numbers = tiles.numbers
        table = np.arange(numbers["depth"]) * (_VECTORS * VECTOR_BYTES)
    numbers |= {"groups": geometry.groups, "channels": channels, "filters": filters, "taps": taps}
    numbers["filter_blocks"] = blocks = cdiv(filters, _ROWS)
    copies = images * geometry.groups
    items = copies * numbers["y_count"] * numbers["x_count"]
    chunks = max(cdiv(filters, _MOST_FILTERS), min(cdiv(wanted, max(1, items)), filters // _FEWEST_FILTERS))
    numbers["chunks"] = chunks = min(chunks, blocks)
    for name, axis in (("y", y), ("x", x)):
        numbers |= {f"{name}_{number}": value for number, value in axis.items()}
    longest = numbers["y_core"] * numbers["x_core"] * cdiv(blocks, chunks) * _ROWS * taps
    table = table.ravel().astype(np.int64)
    zeros = no_biases(geometry.weight_size[0], dtype)
    numbers |= {"table": table.ctypes.data, "zeros": zeros.ctypes.data}
    return Cut(
        record=RECORD.make((*(numbers.get(name, 0) for name in RECORD.numbers), input_planes(geometry))),
        arrays=(table, zeros),
        items=items * chunks,
        turns=min(cdiv(taps, numbers["depth"]), cdiv(longest, MOST_PRODUCTS)),
        work=Work(copies * tiles.pixels * filters * taps, copies * tiles.gathered * chunks),
    )


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread."""
    return cut(geometry, dtype).record["worker"]


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of the packed kernels."""
    filters, *taps = geometry.weight_size
    return geometry.groups * round_up(filters // geometry.groups, _ROWS) * math.prod(taps) * dtype.itemsize


def pack(geometry: ConvGeometry, w: np.ndarray) -> Memory:
    """Return the kernels as [group][block of filters][c][u][v][filter], with zeros to fill up the last block."""
    packed = scratch.aligned(packed_bytes(geometry, w.dtype))
    filters, *taps = geometry.weight_size
    filters //= geometry.groups
    blocks = cdiv(filters, _ROWS)
    record = _PACKING.make((w.ctypes.data, packed.address, filters, math.prod(taps), blocks))
    items = geometry.groups * blocks
    threads.run(threads.Task(_pack_blocks.address(w.dtype.type), record, items, threads.get_workers()[0]))
    return packed


def programs(geometry: ConvGeometry, dtype: np.dtype, has_bias: bool, relu: bool) -> Programs:
    """Return the programs of the forward pass, whose weight is what `pack` returned."""
    return Programs(_program, geometry, dtype, has_bias, relu)


@functools.lru_cache(maxsize=256)
def _program(geometry: ConvGeometry, variant: Variant) -> Program:
    made = cut(geometry, variant.dtype)
    stage = _forward_windows if made.record["phases"] else _forward_gathered
    return program_of(stage, made.record.copy(), made.items, made.turns, variant, made)
