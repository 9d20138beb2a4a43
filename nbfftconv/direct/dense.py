"""Groups of many filters: a matrix product whose lanes are output pixels.

Y[k, p] = sum over i of W[k, i] · X[i, p], where i = (c, u, v), and X[i, p] is the pixel, or the zero of the padding,
that output pixel p of an image has under tap (u, v) in channel c. The kernels are packed once. A work item is a strip
of pixels and some filters; its part of X is gathered block by block along i into scratch memory of a fixed size,
whatever the geometry, and the output holds the sums of the blocks so far. Blocks do not depend on the threads.
"""

import functools
import math

import numpy as np

from nbfftconv import jit, scratch, simd, threads
from nbfftconv.direct.block import MOST_PRODUCTS, OutputBlock, block_kernel
from nbfftconv.direct.gather import clear_lanes, gather_lanes
from nbfftconv.geometry import AXIS_NUMBERS, ConvGeometry
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET, WIDEST_VECTOR_BYTES, power_of_two
from nbfftconv.threads import in_turns, share

# The block of Y in registers: vectors of pixels, and filters, a power of two as their numbers are. X takes as many
# registers as there are vectors, and a weight one.
_VECTORS = 3
_ROWS = power_of_two((TARGET.registers - _VECTORS - 1) // _VECTORS)
#: Along i, X under one block of pixels takes three quarters of the L1 cache, past which the kernels stream.
_DEPTH = TARGET.l1_bytes * 3 // 4 // (_VECTORS * WIDEST_VECTOR_BYTES)
#: Blocks of pixels in a strip: for each, the kernels are read once more, the first time from beyond the L2 cache.
_STRIP_BLOCKS = 2
#: Filters of a work item: more share the gathered pixels, until their kernels, in float64, take more than three
#: quarters of the L2 cache; ...
_MOST_FILTERS = power_of_two(TARGET.l2_bytes * 3 // 4 // (_DEPTH * 8))
#: ... as few as this where there would not be as many work items as _ITEMS, enough for many threads.
_FEWEST_FILTERS = 64
_ITEMS = 24

_RECORD = np.dtype(
    [
        *((name, np.int64) for name in ("input", "weight", "packed", "output", "bias", "zeros", "scratch", "worker")),
        # channels and filters of a group; taps of all its channels; gathered at once
        *((name, np.int64) for name in ("groups", "channels", "filters", "taps", "depth", "relu", "turn", "turns")),
        # vectors of pixels of an image, in blocks, in strips; blocks of filters of a group, in chunks
        *((name, np.int64) for name in ("vectors", "pixel_blocks", "strips", "filter_blocks", "chunks")),
        *((f"{axis}_{name}", np.int64) for axis in "yx" for name in AXIS_NUMBERS),
    ]
)
_stage = jit.stage(_RECORD)


def _block(rows: int, vectors: int):
    """Return the emitter of a block of rows × vectors of Y."""

    def emit(v, x, w, bias, y, y_row, depth, first, end, rows_left, relu):
        def add_products(x, w, *sums):
            sums = list(sums)
            pixels = [v.load(x + j * v.vector_bytes) for j in range(vectors)]
            for i in range(rows):
                weight = v.broadcast(w + i * v.itemsize)
                for j in range(vectors):
                    sums[i * vectors + j] = v.fma(weight, pixels[j], sums[i * vectors + j])
            return [x + vectors * v.vector_bytes, w + _ROWS * v.itemsize, *sums]

        output = OutputBlock(v, y, y_row, first, end, rows_left, rows, vectors)
        _, _, *sums = v.repeat(depth, [x, w, *[0.0] * (rows * vectors)], add_products)
        output.add(sums, [v.broadcast(bias + row * v.itemsize) for row in output.rows], relu)

    return emit


# (x, w, bias, y, y_row, depth, first, end, rows_left, relu, rows, vectors): Y[:rows, :end] = W · X, plus the bias, plus
# what Y holds from pixel `first` on; of `rows`, _ROWS or half as many, only `rows_left` are in memory.
_product = block_kernel(_block, _ROWS, _VECTORS, "product", 12)


@jit.njit()
def _gather_vector(real, itemsize, lanes, r, image, begin, end, p, target, pitch):
    """Gather rows begin .. end - 1 of X for the vector of pixels from `p`, rows `pitch` bytes apart."""
    window = r.y_kernel * r.x_kernel
    stop = min(p + lanes, r.y_output * r.x_output)
    lane = 0
    while lane < lanes and p + lane < stop:  # a row of the output after the other
        oy, ox = (p + lane) // r.x_output, (p + lane) % r.x_output
        last = min(lane + r.x_output - ox, stop - p)
        # Lanes beyond the image are computed with, too.
        written = lanes if p + last == stop else last
        for i in range(begin, min(end, begin + window)):
            c, tap = i // window, i % window
            y = oy * r.y_stride + tap // r.x_kernel * r.y_dilation - r.y_before
            x0 = (ox - lane) * r.x_stride + tap % r.x_kernel * r.x_dilation - r.x_before
            count = cdiv(end - i, window)  # the same tap of so many channels
            row = target + (i - begin) * pitch
            channel_step = r.y_input * r.x_input * itemsize
            if 0 <= y < r.y_input:
                gather_lanes(
                    real, itemsize, image + (c * r.y_input + y) * r.x_input * itemsize, channel_step, r.x_input,
                    x0, r.x_stride, row, window * pitch, lane, written, count,
                )  # fmt: skip
            else:
                clear_lanes(real, row, window * pitch, lane, written, count)
        lane = last


def _forward(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def dense_forward(r, worker, begin, end):
        x = r.scratch + worker * r.worker
        pixels = r.y_output * r.x_output
        for item in range(begin, end):
            chunk = item % r.chunks
            strip = item // r.chunks % r.strips
            group = item // (r.chunks * r.strips) % r.groups
            n = item // (r.chunks * r.strips * r.groups)
            image = r.input + (n * r.groups + group) * r.channels * r.y_input * r.x_input * itemsize
            first_block, last_block = share(r.filter_blocks, chunk, r.chunks)
            first, last = share(r.pixel_blocks, strip, r.strips)
            first_depth, last_depth = share(cdiv(r.taps, r.depth), r.turn, r.turns)
            for i in range(first_depth * r.depth, min(last_depth * r.depth, r.taps), r.depth):
                depth = min(r.depth, r.taps - i)
                for pixel_block in range(first, last):
                    vector, stop = share(r.vectors, pixel_block, r.pixel_blocks)
                    vectors = stop - vector
                    p = vector * lanes
                    for j in range(vectors):
                        _gather_vector(
                            real, itemsize, lanes, r, image, i, i + depth, p + j * lanes, x + j * VECTOR_BYTES,
                            vectors * VECTOR_BYTES,
                        )  # fmt: skip
                    count = min(vectors * lanes, pixels - p)
                    for block in range(first_block, last_block):
                        k = block * _ROWS
                        left = min(_ROWS, r.filters - k)
                        rows = _ROWS // 2 if left <= _ROWS // 2 else _ROWS
                        w = r.packed + ((group * r.filter_blocks + block) * r.taps + i) * _ROWS * itemsize
                        y = r.output + (((n * r.groups + group) * r.filters + k) * pixels + p) * itemsize
                        bias = (r.bias if i == 0 else r.zeros) + (group * r.filters + k) * itemsize
                        relu = r.relu if i + depth == r.taps else 0
                        _product(real, (
                            x, w, bias, y, pixels * itemsize, depth, count if i == 0 else 0, count, left, relu,
                            rows, vectors,
                        ))  # fmt: skip

    return dense_forward


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


_forward_items = _stage(_forward)
_pack_blocks = _stage(_pack)


@functools.lru_cache(maxsize=256)
def _numbers(geometry: ConvGeometry, dtype: np.dtype) -> np.ndarray:
    """Return the record with all numbers, and no address; to be copied."""
    record = np.zeros((), _RECORD)
    images, _, height, width = geometry.output_size
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    for index, axis in enumerate("yx"):
        for name, number in geometry.axis_numbers(index).items():
            record[f"{axis}_{name}"] = number
    taps = channels * kernel[0] * kernel[1]
    vectors = cdiv(height * width, simd.lanes(dtype.type))
    pixel_blocks = cdiv(vectors, _VECTORS)
    strips = cdiv(pixel_blocks, _STRIP_BLOCKS)
    others = max(1, images * geometry.groups * strips)
    chunks = max(cdiv(filters, _MOST_FILTERS), min(cdiv(_ITEMS, others), filters // _FEWEST_FILTERS))
    record["groups"], record["channels"], record["filters"] = geometry.groups, channels, filters
    record["taps"], record["depth"] = taps, cdiv(taps, cdiv(taps, _DEPTH))
    record["vectors"], record["pixel_blocks"], record["strips"] = vectors, pixel_blocks, strips
    record["filter_blocks"] = blocks = cdiv(filters, _ROWS)
    record["chunks"] = min(chunks, blocks)
    return record


def scratch_bytes() -> int:
    """Bytes of scratch memory of each thread."""
    return _DEPTH * _VECTORS * VECTOR_BYTES


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of the packed kernels."""
    filters, *taps = geometry.weight_size
    return geometry.groups * round_up(filters // geometry.groups, _ROWS) * math.prod(taps) * dtype.itemsize


def pack(geometry: ConvGeometry, w: np.ndarray) -> np.ndarray:
    """Return the kernels as [group][block of filters][c][u][v][filter], with zeros to fill up the last block."""
    packed = scratch.aligned(packed_bytes(geometry, w.dtype)).array
    record = jit.copy_record(_numbers(geometry, w.dtype))
    record["weight"], record["packed"] = w.ctypes.data, packed.ctypes.data
    items = geometry.groups * int(record["filter_blocks"])
    threads.run(threads.Task(_pack_blocks.address(w.dtype.type), record, items, threads.get_workers()[0]))
    return packed


def forward(
    geometry: ConvGeometry, x: np.ndarray, packed: np.ndarray, bias: np.ndarray | None, relu: bool, y: np.ndarray
) -> None:
    """Convolve `x` into `y` with the kernels that `pack` returned."""
    workers = threads.get_workers()[0]
    record = jit.copy_record(_numbers(geometry, x.dtype))
    zeros = np.zeros(geometry.weight_size[0], x.dtype)
    memory = scratch.borrow(workers * scratch_bytes())
    for name, array in (("input", x), ("packed", packed), ("output", y), ("zeros", zeros)):
        record[name] = array.ctypes.data
    record["scratch"] = memory.address
    record["bias"] = record["zeros"] if bias is None else bias.ctypes.data
    record["worker"], record["relu"] = scratch_bytes(), relu
    items = geometry.input_size[0] * int(record["groups"] * record["strips"] * record["chunks"])
    pixels = _STRIP_BLOCKS * _VECTORS * simd.lanes(x.dtype.type)
    products = pixels * cdiv(int(record["filter_blocks"]), int(record["chunks"])) * _ROWS * int(record["taps"])
    threads.run(*in_turns(_forward_items.address(x.dtype.type), record, items, workers, cdiv(products, MOST_PRODUCTS)))
