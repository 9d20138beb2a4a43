"""Groups of many filters on the matrix unit: the products of `dense` in float32, of numbers in three parts.

Work items, tiles and windows are those of `dense`. The kernels are packed once. Of each two vectors of pixels X is
packed, in blocks along i, and multiplied by the kernels of two times 16 filters; sums are written from there.
"""

import functools
import math
from array import array

import numpy as np

from nbfftconv import jit, matrix_unit, scratch, simd, threads
from nbfftconv.direct import dense
from nbfftconv.direct.block import OutputBlock, Programs, Variant, block_kernel, mode_of, part_of, program_of
from nbfftconv.direct.dense import RECORD, gather_tile, gather_vector, next_pixels, vector_of
from nbfftconv.geometry import ConvGeometry
from nbfftconv.matrix_unit import DEPTH, LINES_AHEAD, PACKED_BYTES, SIDE
from nbfftconv.planes import output_plane_of, plane_of
from nbfftconv.program import Program
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.split_product import packer
from nbfftconv.threads import share

#: Vectors of pixels, filters, and rows of X whose parts are packed at once.
BLOCKS = dense.Blocks(vectors=2, rows=SIDE, depth=768, of_scalar=10, is_fixed=True)
# A worker's memory: the unit's configuration, the largest magnitudes of sums, sums of 2 × 16 filters, packed pixels,
# and those that are gathered.
_LARGEST = 64
_SUMS, _SUMS_ROW = 128, BLOCKS.vectors * VECTOR_BYTES
_PIXELS = _SUMS + 2 * SIDE * _SUMS_ROW
_LINE = 64  # bytes
# Bits of float32: of infinity, and of 2^-80, of which the parts, and their products with what is not small, are normal.
_INFINITE, _SMALLEST = (int(np.float32(value).view(np.int32)) for value in (np.inf, 2.0**-80))
#: Clock cycles of a multiply-add of vectors, and of writing one.
_VECTOR_CYCLES, _WRITTEN_CYCLES = 0.57, 4
#: Less is gained where neighbours of the core have the unit slow down.
_WORTHWHILE = 0.8
#: Rows of sums that are written at once.
_WRITTEN = 8

_PACKING = RecordType(fields("weight", "packed", "filters", "taps", "depth", "filter_blocks", "steps"))


def _write(rows: int, vectors: int):
    """Return the emitter that writes a block of sums."""

    def emit(v, sums, y0, y1, end0, end1, bias, relu, y_row, begun, rows_left, mode, largest):
        ends = [end0, end1][:vectors]
        output = OutputBlock(v, [y0, y1][:vectors], ends, y_row, begun, rows_left, mode, rows)
        places = [sums + _SUMS_ROW * i + v.vector_bytes * j for i in range(rows) for j in range(vectors)]
        values = [v.load(at) for at in places]
        found = v.load_magnitude(largest)
        for value, end in zip(values, ends * rows, strict=True):
            found = v.maximum(found, v.magnitude(v.select(v.lanes_between(0, end), value, 0.0)))
        v.store_magnitude(found, largest)
        output.finish([start + value for start, value in zip(output.biases(bias), values, strict=True)], relu)

    return emit


# (sums, y0, y1, end0, end1, bias, relu, y_row, begun, rows_left, mode, largest, rows, vectors), as of `dense`; at
# `largest` is a vector of the largest magnitudes of sums.
_write_sums = block_kernel(_write, _WRITTEN, BLOCKS.vectors, "write_sums", 14)


def _emit_clear(v, address):
    v.store_magnitude(v.zero_magnitude(), address)


_clear_magnitudes = simd.kernel(_emit_clear, "clear_magnitudes")


@jit.njit()
def _note_magnitudes(r, worker, memory):
    """Note whether the largest of a worker's sums is not finite, or so small that the unit has lost bits of it."""
    bits, largest = simd.pointer(np.int32, memory + _LARGEST), 0
    for lane in range(SIDE):
        largest = max(largest, bits[lane])
    noted = simd.pointer(np.int64, r.largest)
    noted[worker] = max(noted[worker], largest)


@jit.njit()
def _steps(taps, depth):
    """Steps of the unit for all of i, in blocks of `depth`."""
    return taps // depth * cdiv(depth, DEPTH) + cdiv(taps % depth, DEPTH)


@jit.njit()
def _part_of(r, item):
    """Return what `part_of` does; items of the same filters, whose kernels stay in a cache, follow each other."""
    return part_of(r, item % r.tiles * r.chunks + item // r.tiles, r.filter_blocks)


@jit.njit()
def _lines_ahead(r, itemsize, next, call, depth):
    """Return where a call fetches lines of what is gathered next, and their distance."""
    if r.phases == 0:  # it is not known
        return next, 0
    lines = cdiv(depth, DEPTH) * LINES_AHEAD
    parts = cdiv(depth, lines)
    if r.is_flat != 0:  # a line of every channel, in some calls
        line = r.x_input * itemsize
        return next + call % parts * lines * line + call // parts % r.next_calls * _LINE, line
    channels = depth // (r.y_kernel * r.x_kernel)
    part = call // channels % (r.next_calls * parts)
    return next + call % channels * r.y_input * r.x_input * itemsize + part * lines * _LINE, _LINE


@jit.njit()
def _add_products(
    real, itemsize, lanes, r, n, group, first_block, last_block, i, depth, next, call, xs, ps, ends, vectors, memory
):
    """Add products to `vectors` vectors of Y, of blocks of filters, and `depth` rows of X from `i` on.

    The pixels are at `xs` in a worker's memory; from pixels `ps` of an image on, so many as `ends`.
    """
    steps = cdiv(depth, DEPTH)
    pixels, sums = memory + _PIXELS, memory + _SUMS
    for j in range(vectors):
        for step in range(steps):
            arguments = (
                xs[j],
                r.table + step * DEPTH * 8,
                depth - step * DEPTH,
                pixels + (j * steps + step) * PACKED_BYTES,
            )
            if (step + 1) * DEPTH <= depth:
                matrix_unit.pack_by_table(real, arguments)
            else:
                matrix_unit.pack_part_by_table(real, arguments)
    plane = r.y_output * r.x_output * itemsize
    y_row = r.planes.outputs * plane
    all_steps = _steps(r.taps, r.depth)
    w = r.weight + i // r.depth * cdiv(r.depth, DEPTH) * PACKED_BYTES
    is_last = i + depth == r.taps
    mode = mode_of(r, is_last, ends[0] >= lanes and (vectors < 2 or ends[1] >= lanes))
    for block in range(first_block, last_block, 2):
        blocks = min(2, last_block - block)
        ahead, line = _lines_ahead(r, itemsize, next, call + (block - first_block) // 2, depth)
        first = group * r.filters + block * SIDE
        y = r.output + output_plane_of(r.planes, r.groups * r.filters, n, first) * plane
        matrix_unit.multiply_packed(real, (
            w + (group * r.filter_blocks + block) * all_steps * PACKED_BYTES, all_steps * PACKED_BYTES,
            pixels, steps * PACKED_BYTES, sums, _SUMS_ROW, SIDE * _SUMS_ROW, VECTOR_BYTES, steps, 0,
            ahead, line, y + ps[0] * itemsize, y_row, blocks, vectors,
        ))  # fmt: skip
        rows = min(blocks * SIDE, r.filters - block * SIDE)
        for row in range(0, rows, _WRITTEN):
            at = y + row * y_row
            left = min(_WRITTEN, rows - row)
            _write_sums(real, (
                sums + row * _SUMS_ROW, at + ps[0] * itemsize, at + ps[1] * itemsize, ends[0], ends[1],
                (r.bias if i == 0 else r.zeros) + (first + row) * itemsize, r.relu if is_last else 0, y_row,
                0 if i == 0 else 1, left, mode, memory + _LARGEST,
                _WRITTEN // 2 if left <= _WRITTEN // 2 else _WRITTEN, vectors,
            ))  # fmt: skip


def _of_windows(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def split_dense_forward(r, worker, begin, end):
        memory = r.scratch + worker * r.worker
        windows = memory + _PIXELS + BLOCKS.vectors * cdiv(r.depth, DEPTH) * PACKED_BYTES
        matrix_unit.begin_matrices(real, (memory,))
        _clear_magnitudes(real, (memory + _LARGEST,))
        taps = r.y_kernel * r.x_kernel
        first_block_of_x, last_block_of_x = share(cdiv(r.taps, r.depth), r.turn, r.turns)
        for item in range(begin, end):
            n, group, y0, x0, first_block, last_block = _part_of(r, item)
            rows, columns = min(r.y_core, r.y_output - y0), min(r.x_core, r.x_output - x0)
            row_vectors = cdiv(columns, lanes)
            vectors = rows * row_vectors
            for i in range(first_block_of_x * r.depth, min(last_block_of_x * r.depth, r.taps), r.depth):
                depth = min(r.depth, r.taps - i)
                channel = group * r.channels + i // taps
                gather_tile(real, itemsize, lanes, r, n, channel, depth // taps, y0, x0, rows, windows)
                next = next_pixels(r, itemsize, max(0, plane_of(r.planes, n, channel)), y0, x0, i, depth)
                calls = 0
                for first in range(0, vectors, BLOCKS.vectors):
                    a = vector_of(r, lanes, windows, y0, x0, row_vectors, first)
                    b = vector_of(r, lanes, windows, y0, x0, row_vectors, min(first + 1, vectors - 1))
                    _add_products(
                        real, itemsize, lanes, r, n, group, first_block, last_block, i, depth, next, calls,
                        (a[0], b[0]), (a[1], b[1]), (a[2], b[2]), min(BLOCKS.vectors, vectors - first), memory,
                    )  # fmt: skip
                    calls += cdiv(last_block - first_block, 2)
        matrix_unit.end_matrices(real, ())
        _note_magnitudes(r, worker, memory)
        if r.stream != 0:
            simd.fence()

    return split_dense_forward


def _of_pixels(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def split_dense_forward_gathered(r, worker, begin, end):
        memory = r.scratch + worker * r.worker
        x = memory + _PIXELS + BLOCKS.vectors * cdiv(r.depth, DEPTH) * PACKED_BYTES
        matrix_unit.begin_matrices(real, (memory,))
        _clear_magnitudes(real, (memory + _LARGEST,))
        pixels = r.y_output * r.x_output
        first_block_of_x, last_block_of_x = share(cdiv(r.taps, r.depth), r.turn, r.turns)
        for item in range(begin, end):
            n, group, _, start, first_block, last_block = _part_of(r, item)
            for i in range(first_block_of_x * r.depth, min(last_block_of_x * r.depth, r.taps), r.depth):
                depth = min(r.depth, r.taps - i)
                for p in range(start, min(start + r.x_core, pixels), BLOCKS.vectors * lanes):
                    vectors = min(BLOCKS.vectors, cdiv(pixels - p, lanes))
                    for j in range(vectors):
                        gather_vector(
                            real, itemsize, lanes, r, n, group, i, i + depth, p + j * lanes, x + j * VECTOR_BYTES,
                            BLOCKS.vectors * VECTOR_BYTES,
                        )  # fmt: skip
                    _add_products(
                        real, itemsize, lanes, r, n, group, first_block, last_block, i, depth, x, 0,
                        (x, x + VECTOR_BYTES), (p, p + lanes), (pixels - p, pixels - p - lanes), vectors, memory,
                    )  # fmt: skip
        matrix_unit.end_matrices(real, ())
        _note_magnitudes(r, worker, memory)
        if r.stream != 0:
            simd.fence()

    return split_dense_forward_gathered


_pack_rows = packer(is_nested=True, is_transposed=False)


def _pack(real):
    itemsize = np.dtype(real).itemsize

    def split_dense_pack(r, worker, begin, end):
        for item in range(begin, end):
            group, block = item // r.filter_blocks, item % r.filter_blocks
            k = block * SIDE
            source, row = r.weight + (group * r.filters + k) * r.taps * itemsize, r.taps * itemsize
            target = r.packed + item * r.steps * PACKED_BYTES
            for i in range(0, r.taps, r.depth):
                depth = min(r.depth, r.taps - i)
                _pack_rows(real, source + i * itemsize, row, VECTOR_BYTES, min(SIDE, r.filters - k), depth, target)
                target += cdiv(depth, DEPTH) * PACKED_BYTES

    return split_dense_pack


_forward_windows = jit.stage(RECORD)(_of_windows)
_forward_gathered = jit.stage(RECORD)(_of_pixels)
_pack_blocks = jit.stage(_PACKING)(_pack)


def fits(geometry: ConvGeometry, dtype: np.dtype) -> bool:
    """Whether this module is for a geometry; else, `dense` is. It does not depend on the image."""
    return dtype == np.float32 and matrix_unit.is_available() and share_of_vectors(geometry) < _WORTHWHILE


@functools.lru_cache(maxsize=256)  # every call asks
def share_of_vectors(geometry: ConvGeometry) -> float:
    """Return what part of the time that vectors need for products the unit takes, with packing and writing.

    As it waits for the memory, too, it takes 1.6 times its own cycles.
    """
    filters, taps = geometry.weight_size[0] // geometry.groups, math.prod(geometry.weight_size[1:])
    products = matrix_unit.BLOCK_CYCLES * cdiv(filters, SIDE) * cdiv(taps, DEPTH)
    written = filters * cdiv(taps, BLOCKS.depth)
    cycles = products + matrix_unit.PACKING_CYCLES * taps + _WRITTEN_CYCLES * written
    return 1.6 * cycles / (_VECTOR_CYCLES * filters * taps)


def cut(geometry: ConvGeometry, dtype: np.dtype) -> dense.Cut:
    """Return how a geometry is cut, with the memory of a worker."""
    made = dense.cut(geometry, dtype, BLOCKS)
    record = made.record.copy()
    record["worker"] += _PIXELS + BLOCKS.vectors * cdiv(record["depth"], DEPTH) * PACKED_BYTES
    return made._replace(record=record)


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of the packed kernels."""
    filters, channels, *kernel = geometry.weight_size
    taps = math.prod(kernel)
    steps = _steps(channels * taps, dense.channels_of_block(channels, taps, BLOCKS) * taps)
    return geometry.groups * cdiv(filters // geometry.groups, SIDE) * int(steps) * PACKED_BYTES


def pack(geometry: ConvGeometry, w: np.ndarray) -> Memory:
    """Return the parts of the kernels as [group][block of filters][block of i][step], with zeros to fill them up."""
    nbytes = packed_bytes(geometry, w.dtype)
    packed = scratch.aligned(nbytes)
    filters, channels, *kernel = geometry.weight_size
    filters, taps = filters // geometry.groups, math.prod(kernel)
    depth, blocks = dense.channels_of_block(channels, taps, BLOCKS) * taps, cdiv(filters, SIDE)
    items = geometry.groups * blocks
    numbers = filters, channels * taps, depth, blocks, nbytes // (items * PACKED_BYTES)
    record = _PACKING.make((w.ctypes.data, packed.address, *numbers))
    stage = _pack_blocks.address(w.dtype.type)
    threads.run(threads.Task(stage, record, items, threads.get_workers()[0]))
    return packed


def programs(geometry: ConvGeometry, dtype: np.dtype, has_bias: bool, relu: bool) -> Programs:
    """Return the programs of the forward pass, whose weight is what `pack` returned."""
    return Programs(_program, geometry, dtype, has_bias, relu)


def is_exact(noted: "array[int]") -> bool:
    """Whether results are as exact as in float32, given what the workers have noted.

    They are not where numbers are not finite, or all so small that the unit loses bits.
    """
    largest = max(noted, default=0)
    return largest == 0 or _SMALLEST <= largest < _INFINITE


@functools.lru_cache(maxsize=256)
def _program(geometry: ConvGeometry, variant: Variant) -> Program:
    made = cut(geometry, variant.dtype)
    stage = _forward_windows if made.record["phases"] else _forward_gathered
    return program_of(stage, made.record.copy(), made.items, made.turns, variant, made, notes=True)
