"""Direct convolution of arrays whose channels come last, which are read and written where they are.

Lanes are channels: of depthwise convolution those of a pixel, else filters, and every channel of a pixel is broadcast.
A work item is some outputs of some rows. In a row, those whose pixels are all inside the image are computed from there;
for the others, a block at a time, the pixels are copied beforehand, with zeros for the padding.

A table has where the *runs* of a pixel begin: scalars that lie one after the other, which are the channels of a tap, or
of all taps of a row if there is no dilation. Lanes beyond the last filter, or channel, are not written; nor are pixels
beyond the last one of a row, which repeat it.
"""

import functools
import math
from typing import Any

import numpy as np

from nbfftconv import jit, scratch, simd
from nbfftconv.direct.block import Programs, Variant, no_biases, program_of
from nbfftconv.geometry import AXIS_NUMBERS, FLAT, ConvGeometry
from nbfftconv.program import Program
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET, power_of_two
from nbfftconv.threads import share

# The block in registers: vectors of filters by pixels; a weight takes as many registers as there are vectors, a pixel
# one. Of depthwise convolution, a vector of channels by pixels.
_VECTORS = 3
_PIXELS = power_of_two((TARGET.registers - _VECTORS - 1) // _VECTORS)
_DEPTHWISE_PIXELS = 8
#: With so many taps, or so small an image, depthwise convolution copies a vector of channels of every pixel beforehand,
#: to three quarters of the first-level cache.
_MANY_TAPS, _WINDOW_BYTES = 16, TARGET.l1_bytes * 3 // 4
#: Groups of fewer filters, in vectors, leave most lanes empty.
_FEWEST_FILTERS = 0.25
#: Outputs of a row in a work item, at most, and work items, enough for many threads.
_COLUMNS, _ITEMS = 512, 24
#: Kernels of a work item take an eighth of the L2 cache.
_CHUNK_BYTES = TARGET.l2_bytes // 8

_RECORD = RecordType(
    fields(
        "input", "weight", "output", "bias", "zeros", "scratch", "worker", "relu", "stream", "turn", "turns",
        # channels and filters of a group, and those of all
        "groups", "channels", "filters", "all_channels", "all_filters",
        # of a group: vectors of filters, and bytes of the kernels of a vector, or block of vectors
        "vectors", "kernels",
        # where runs begin in the image, and in pixels that are copied; runs, and scalars of one
        "table", "copied_table", "runs", "run",
        "pixels", "columns", "chunks", "tiles", "y_core", "x_core", "y_count", "x_count",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_NUMBERS),
    )
)  # fmt: skip


def _emit_dense(v, *arguments):
    *operands, vectors = arguments
    for count in range(1, _VECTORS + 1):
        with v.when(vectors, count):
            _emit_dense_blocks(v, count, *operands)


def _emit_dense_blocks(v, vectors, x, x_pixel, table, runs, run, w, bias, y, y_pixel, relu, lanes, pixels):
    inside = [v.lanes_between(0, lanes, j * v.lanes) for j in range(vectors)]
    biases = [v.masked_load(bias + j * v.vector_bytes, inside[j]) for j in range(vectors)]

    def block(places, x_places):
        def of_run(entry, w, *sums):
            offset = v.load_integer(entry)

            def term(offset, w, *sums):
                sums = list(sums)
                weights = [v.load(w + j * v.vector_bytes) for j in range(vectors)]
                for p, place in enumerate(x_places):
                    value = v.broadcast(place + offset)
                    for j in range(vectors):
                        sums[p * vectors + j] = v.fma(value, weights[j], sums[p * vectors + j])
                return [offset + v.itemsize, w + vectors * v.vector_bytes, *sums]

            _, w, *sums = v.repeat(run, [offset, w, *sums], term)
            return [entry + 8, w, *sums]

        _, _, *sums = v.repeat(runs, [table, w, *biases * _PIXELS], of_run)
        sums = v.repeat(relu, sums, lambda *sums: [v.relu(value) for value in sums])
        written = [
            (sums[p * vectors + j], place + j * v.vector_bytes, inside[j])
            for p, place in reversed(list(enumerate(places)))
            for j in range(vectors)
        ]
        simd.store_masked(v, written, lanes, vectors * v.lanes)

    _emit_pixels(v, _PIXELS, x, x_pixel, y, y_pixel, pixels, block)


def _emit_pixels(v, count, x, x_pixel, y, y_pixel, pixels, block):
    """Emit ``block(addresses of outputs, of pixels)`` for `pixels` in blocks of `count`."""

    def whole(x, y):
        block([y + y_pixel * p for p in range(count)], [x + x_pixel * p for p in range(count)])
        return x + x_pixel * count, y + y_pixel * count

    blocks = (pixels - 1) // count
    x, y = v.repeat(blocks, [x, y], whole)
    # pixels that there are none of repeat the last one, and are written before it
    last = [v.minimum(p, pixels - blocks * count - 1) for p in range(count)]
    block([y + y_pixel * p for p in last], [x + x_pixel * p for p in last])


def _emit_depthwise(v, x, x_pixel, table, runs, w, bias, y, y_pixel, relu, lanes, pixels):
    def block(places, x_places):
        def channels(inside):
            def load(address):
                return v.load(address) if inside is None else v.masked_load(address, inside)

            def vector(offset, w, bias):  # pixels are read as they follow each other
                def tap(entry, w, *sums):
                    at, weights = offset + v.load_integer(entry), v.load(w)
                    pixels = [load(place + at) for place in x_places]
                    sums = [v.fma(value, weights, total) for value, total in zip(pixels, sums, strict=True)]
                    return [entry + 8, w + v.vector_bytes, *sums]

                _, w, *sums = v.repeat(runs, [table, w, *[load(bias)] * len(places)], tap)
                sums = v.repeat(relu, sums, lambda *sums: [v.relu(value) for value in sums])
                for place, value in reversed(list(zip(places, sums, strict=True))):
                    if inside is None:
                        v.store(value, place + offset)
                    else:
                        v.masked_store(value, place + offset, inside)
                return offset + v.vector_bytes, w, bias + v.vector_bytes

            return vector

        state = v.repeat(whole, [0, w, bias], channels(None))
        v.repeat(v.minimum(left, 1), state, channels(v.lanes_between(0, left)))

    whole = lanes // v.lanes
    left = lanes - whole * v.lanes
    _emit_pixels(v, _DEPTHWISE_PIXELS, x, x_pixel, y, y_pixel, pixels, block)


def _emit_copy(v, source, target, count):
    whole = count // v.lanes

    def copy(source, target):
        v.store(v.load(source), target)
        return source + v.vector_bytes, target + v.vector_bytes

    source, target = v.repeat(whole, [source, target], copy)
    inside = v.lanes_between(0, count - whole * v.lanes)
    v.masked_store(v.masked_load(source, inside), target, inside)


def _emit_copy_lanes(v, source, step, target, lanes, count):
    inside = v.lanes_between(0, lanes)

    def copy(source, target):
        v.store(v.masked_load(source, inside), target)
        return source + step, target + v.vector_bytes

    v.repeat(count, [source, target], copy)


def _emit_clear(v, target, count):
    whole = count // v.lanes

    def clear(target):
        v.store(0.0, target)
        return [target + v.vector_bytes]

    (target,) = v.repeat(whole, [target], clear)
    v.masked_store(0.0, target, v.lanes_between(0, count - whole * v.lanes))


# (x, x_pixel, table, runs, run, w, bias, y, y_pixel, relu, lanes, pixels, vectors): outputs of so many pixels, one at
# least, and filters in so many lanes of vectors; the table has runs of scalars.
_dense_row = simd.kernel(_emit_dense, "last_dense_row", 13)
# (x, x_pixel, table, runs, w, bias, y, y_pixel, relu, lanes, pixels): the same of so many channels, each for itself.
_depthwise_row = simd.kernel(_emit_depthwise, "last_depthwise_row")
# (source, target, count) and (target, count): scalars.
_copy_scalars = simd.kernel(_emit_copy, "copy_scalars")
_clear_scalars = simd.kernel(_emit_clear, "clear_scalars")
# (source, step, target, lanes, count): vectors `step` bytes apart, of so many lanes, to neighbouring ones.
_copy_lanes = simd.kernel(_emit_copy_lanes, "copy_lanes")


@jit.njit()
def _copy_pixels(real, itemsize, r, image, y, x, columns, memory):
    """Copy the pixels under the rows of taps from row `y` and column `x` on, zeros where there are none."""
    channels = r.all_channels
    first, last = min(columns, max(0, -x)), max(0, min(columns, r.x_input - x))
    last = max(first, last)
    for u in range(r.y_kernel):
        row, target = y + u * r.y_dilation, memory + u * columns * channels * itemsize
        if row < 0 or row >= r.y_input:
            _clear_scalars(real, (target, columns * channels))
            continue
        source = image + (row * r.x_input + x + first) * channels * itemsize
        _clear_scalars(real, (target, first * channels))
        _copy_scalars(real, (source, target + first * channels * itemsize, (last - first) * channels))
        _clear_scalars(real, (target + last * channels * itemsize, (columns - last) * channels))


def _rows(is_depthwise: bool):
    """Return the function that computes neighbouring outputs of a row, all groups and filters."""

    @jit.njit()
    def depthwise(real, itemsize, lanes, r, x, table, y, pixels, chunk):
        _depthwise_row(real, (
            x, r.x_stride * r.all_channels * itemsize, table, r.runs, r.weight, r.bias,
            y, r.all_filters * itemsize, r.relu, r.filters, pixels,
        ))  # fmt: skip

    @jit.njit()
    def dense(real, itemsize, lanes, r, x, table, y, pixels, chunk):
        blocks = cdiv(r.vectors, _VECTORS)
        first_block, last_block = share(blocks, chunk, r.chunks)
        for group in range(r.groups):
            for block in range(first_block, last_block):
                first, last = share(r.vectors, block, blocks)
                filter = group * r.filters + first * lanes
                _dense_row(real, (
                    x + group * r.channels * itemsize, r.x_stride * r.all_channels * itemsize, table, r.runs, r.run,
                    r.weight + (group * r.vectors + first) * r.kernels, r.bias + filter * itemsize,
                    y + filter * itemsize, r.all_filters * itemsize, r.relu, r.filters - first * lanes, pixels,
                    last - first,
                ))  # fmt: skip

    return depthwise if is_depthwise else dense


def _forward(is_depthwise: bool):
    def last_forward(real):
        itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)
        compute = _rows(is_depthwise)

        def last_pixels(r, worker, begin, end):
            memory = r.scratch + worker * r.worker
            y_reach, x_reach = (r.y_kernel - 1) * r.y_dilation, (r.x_kernel - 1) * r.x_dilation
            pixel = r.all_channels * itemsize
            # columns of outputs whose pixels are inside a row
            first_inside = min(r.x_output, cdiv(r.x_before, r.x_stride))
            last_inside = (r.x_input - 1 - x_reach + r.x_before) // r.x_stride + 1
            last_inside = max(first_inside, min(r.x_output, last_inside))
            for item in range(begin, end):
                chunk, tile = item // r.tiles, item % r.tiles  # a chunk's kernels stay in the second-level cache
                x0 = tile % r.x_count * r.x_core
                y0 = tile // r.x_count % r.y_count * r.y_core
                n = tile // (r.x_count * r.y_count)
                image = r.input + n * r.y_input * r.x_input * pixel
                x1 = min(r.x_output, x0 + r.x_core)
                for row in range(y0, min(r.y_output, y0 + r.y_core)):
                    y = row * r.y_stride - r.y_before
                    output = r.output + (n * r.y_output + row) * r.x_output * r.all_filters * itemsize
                    left, right = min(x1, max(x0, first_inside)), max(x0, min(x1, last_inside))
                    if y < 0 or y + y_reach >= r.y_input:
                        left = right = x1
                    for part in range(2):  # before and after what is inside
                        begin_part, end_part = (x0, left) if part == 0 else (right, x1)
                        for column in range(begin_part, end_part, r.pixels):
                            pixels = min(r.pixels, end_part - column)
                            columns = (r.pixels - 1) * r.x_stride + x_reach + 1
                            x = column * r.x_stride - r.x_before
                            _copy_pixels(real, itemsize, r, image, y, x, columns, memory)
                            at = output + column * r.all_filters * itemsize
                            compute(real, itemsize, lanes, r, memory, r.copied_table, at, pixels, chunk)
                    if right > left:
                        x = image + (y * r.x_input + left * r.x_stride - r.x_before) * pixel
                        at = output + left * r.all_filters * itemsize
                        compute(real, itemsize, lanes, r, x, r.table, at, right - left, chunk)

        last_pixels.__name__ = "last_depthwise_forward" if is_depthwise else "last_dense_forward"
        return last_pixels

    return last_forward


def _windows(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def last_depthwise_windows(r, worker, begin, end):
        memory = r.scratch + worker * r.worker
        pixel, row_bytes = r.all_channels * itemsize, r.columns * VECTOR_BYTES
        for item in range(begin, end):
            vector = item % r.vectors
            y0 = item // r.vectors % r.y_count * r.y_core
            n = item // (r.vectors * r.y_count)
            inside = min(lanes, r.all_channels - vector * lanes)
            rows = min(r.y_core, r.y_output - y0)
            image = r.input + n * r.y_input * r.x_input * pixel + vector * VECTOR_BYTES
            first = min(r.columns, r.x_before)
            last = max(first, min(r.columns, r.x_before + r.x_input))
            for i in range((rows - 1) * r.y_stride + (r.y_kernel - 1) * r.y_dilation + 1):
                row, target = y0 * r.y_stride - r.y_before + i, memory + i * row_bytes
                if row < 0 or row >= r.y_input:
                    _clear_scalars(real, (target, r.columns * lanes))
                    continue
                _clear_scalars(real, (target, first * lanes))
                _copy_lanes(real, (
                    image + row * r.x_input * pixel, pixel, target + first * VECTOR_BYTES, inside, last - first
                ))  # fmt: skip
                _clear_scalars(real, (target + last * VECTOR_BYTES, (r.columns - last) * lanes))
            output = r.output + ((n * r.y_output + y0) * r.x_output) * pixel + vector * VECTOR_BYTES
            for i in range(rows):
                _depthwise_row(real, (
                    memory + i * r.y_stride * row_bytes, r.x_stride * VECTOR_BYTES, r.copied_table, r.runs,
                    r.weight + vector * r.runs * VECTOR_BYTES, r.bias + vector * VECTOR_BYTES,
                    output + i * r.x_output * pixel, pixel, r.relu, inside, r.x_output,
                ))  # fmt: skip

    return last_depthwise_windows


_window_stage = jit.stage(_RECORD)(_windows)
_dense_stage, _depthwise_stage = (jit.stage(_RECORD)(_forward(is_depthwise)) for is_depthwise in (False, True))


def is_depthwise(geometry: ConvGeometry) -> bool:
    """Whether every channel has one filter."""
    return geometry.groups == geometry.weight_size[0] and geometry.weight_size[1] == 1


def _is_windowed(geometry: ConvGeometry) -> bool:
    """Whether depthwise convolution copies pixels beforehand: where it reads them often, and rows are not too long."""
    taps, width = math.prod(geometry.weight_size[2:]), geometry.padded_size[1]
    extent = geometry.dilation[0] * (geometry.weight_size[2] - 1) + 1
    is_often = taps >= _MANY_TAPS or math.prod(geometry.padded_size) * VECTOR_BYTES <= _WINDOW_BYTES
    return is_depthwise(geometry) and is_often and extent * width * VECTOR_BYTES <= _WINDOW_BYTES


def fits(geometry: ConvGeometry, dtype: np.dtype) -> bool:
    """Whether this module is for a geometry."""
    filters = geometry.weight_size[0] // geometry.groups
    if geometry.depth != FLAT or len(geometry.stride) != 2:
        return False
    if not is_depthwise(geometry) and filters < _FEWEST_FILTERS * simd.lanes(dtype.type):
        return False
    return scratch_bytes(geometry, dtype) <= TARGET.l2_bytes // 2  # it is more where taps are far apart


def _is_one_run(geometry: ConvGeometry) -> bool:
    """Whether the channels of all taps of a row lie one after the other."""
    return geometry.groups == 1 and (geometry.dilation[1] == 1 or geometry.weight_size[3] == 1)


def products(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Return the products of a pass, with those of lanes and pixels that there are none of."""
    lanes = simd.lanes(dtype.type)
    (images, filters, height, width), taps = geometry.output_size, math.prod(geometry.weight_size[1:])
    if is_depthwise(geometry):
        return images * height * round_up(width, _DEPTHWISE_PIXELS) * round_up(filters, lanes) * taps
    of_lanes = geometry.groups * round_up(filters // geometry.groups, lanes)
    return images * height * round_up(width, _PIXELS) * of_lanes * taps


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of what `pack` returns."""
    filters, *taps = geometry.weight_size
    if not is_depthwise(geometry):
        filters = geometry.groups * round_up(filters // geometry.groups, simd.lanes(dtype.type))
    return round_up(filters, simd.lanes(dtype.type)) * math.prod(taps) * dtype.itemsize


def pack(geometry: ConvGeometry, w: np.ndarray) -> Memory:
    """Return the kernels: of depthwise convolution as [vector of channels][u][v][lane], else as
    [group][block of vectors][u][v][c][lane of the block], with zeros to fill up the last vector."""
    lanes = simd.lanes(w.dtype.type)
    packed = scratch.aligned(packed_bytes(geometry, w.dtype))
    target = packed.array.view(w.dtype)
    filters, channels, *kernel = geometry.weight_size
    if is_depthwise(geometry):
        by_tap = np.zeros((round_up(filters, lanes), math.prod(kernel)), w.dtype)
        by_tap[:filters] = w.reshape(filters, -1)
        target[:] = by_tap.reshape(-1, lanes, by_tap.shape[1]).transpose(0, 2, 1).ravel()
        return packed
    filters //= geometry.groups
    vectors = cdiv(filters, lanes)
    by_tap = np.zeros((geometry.groups, *kernel, channels, vectors * lanes), w.dtype)
    by_tap[..., :filters] = w.reshape(geometry.groups, filters, channels, *kernel).transpose(0, 3, 4, 2, 1)
    blocks, begin = cdiv(vectors, _VECTORS), 0
    of_groups = target.reshape(geometry.groups, -1)
    for block in range(blocks):
        first, last = (vectors * end // blocks * lanes for end in (block, block + 1))  # as of `share`
        part = by_tap[..., first:last].reshape(geometry.groups, -1)
        of_groups[:, begin : begin + part.shape[1]] = part
        begin += part.shape[1]
    return packed


@functools.lru_cache(maxsize=256)
def _record(geometry: ConvGeometry, dtype: np.dtype) -> tuple[Record, tuple[np.ndarray, ...], int]:
    """Return the record with all numbers, arrays whose addresses it has, and the work items."""
    y, x = (geometry.axis_numbers(axis) for axis in (0, 1))
    images, all_channels, *_ = geometry.input_size
    all_filters, channels, *kernel = geometry.weight_size
    filters, lanes, itemsize = all_filters // geometry.groups, simd.lanes(dtype.type), dtype.itemsize
    if kernel == [1, 1] and geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0)):
        # one row of all pixels
        x |= {"input": images * x["input"] * y["input"], "output": images * x["output"] * y["output"]}
        y |= {"input": 1, "output": 1}
        images = 1
    depthwise, windowed, taps = is_depthwise(geometry), _is_windowed(geometry), math.prod(kernel)
    chunks = 1
    if not depthwise:
        kernels = geometry.groups * round_up(filters, lanes) * channels * taps * itemsize
        chunks = max(1, min(cdiv(kernels, _CHUNK_BYTES), cdiv(cdiv(filters, lanes), _VECTORS)))
    wanted = cdiv(_ITEMS, max(1, images * chunks))
    x_count = cdiv(x["output"], _COLUMNS)
    if y["output"] == 1:
        x_count = max(x_count, min(wanted, cdiv(x["output"], 4 * _PIXELS)))
    x_core = round_up(cdiv(x["output"], max(1, x_count)), _PIXELS)
    x_count = cdiv(x["output"], max(1, x_core))
    y_count = min(y["output"], cdiv(wanted, max(1, x_count)))
    y_core = cdiv(y["output"], max(1, y_count))
    y_count = cdiv(y["output"], max(1, y_core))
    pixels = _DEPTHWISE_PIXELS if depthwise else _PIXELS
    columns = (pixels - 1) * x["stride"] + (x["kernel"] - 1) * x["dilation"] + 1
    u, v = np.ogrid[: kernel[0], : 1 if not depthwise and _is_one_run(geometry) else kernel[1]]
    if windowed:
        columns = (x["output"] - 1) * x["stride"] + (x["kernel"] - 1) * x["dilation"] + 1
        reach, fitting = (y["kernel"] - 1) * y["dilation"], _WINDOW_BYTES // (columns * VECTOR_BYTES)
        y_core = max(1, min(y["output"], (fitting - reach - 1) // y["stride"] + 1))
        y_count = cdiv(y["output"], y_core)
        y_core = cdiv(y["output"], y_count)
        y_count, rows = cdiv(y["output"], y_core), (y_core - 1) * y["stride"] + reach + 1
        copied_row, copied_pixel = y["dilation"] * columns, VECTOR_BYTES
        copied, items = rows * columns * VECTOR_BYTES, images * y_count * cdiv(all_channels, lanes)
    else:
        copied_row, copied_pixel = columns, all_channels * itemsize
        copied, items = kernel[0] * columns * copied_pixel, images * y_count * x_count * chunks
    places = [
        (u * row + v * x["dilation"]).astype(np.int64).ravel() * pixel
        for row, pixel in ((y["dilation"] * x["input"], all_channels * itemsize), (copied_row, copied_pixel))
    ]
    zeros = no_biases(all_filters, dtype)
    numbers = {
        "zeros": zeros.ctypes.data, "table": places[0].ctypes.data, "copied_table": places[1].ctypes.data,
        "groups": geometry.groups, "channels": channels, "filters": all_filters if depthwise else filters,
        "all_channels": all_channels, "all_filters": all_filters, "columns": columns,
        "vectors": cdiv(all_filters if depthwise else filters, lanes),
        "kernels": channels * taps * VECTOR_BYTES, "runs": len(places[0]),
        "run": channels * taps // len(places[0]), "pixels": pixels,
        "chunks": chunks, "tiles": images * y_count * x_count,
        "y_core": y_core, "x_core": x_core, "y_count": y_count, "x_count": x_count,
        "worker": round_up(copied, 64),
    }  # fmt: skip
    for name, axis in (("y", y), ("x", x)):
        numbers |= {f"{name}_{number}": value for number, value in axis.items()}
    record = _RECORD.make(tuple(numbers.get(name, 0) for name in _RECORD.numbers))
    return record, (*places, zeros), items


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread."""
    record, _, _ = _record(geometry, dtype)
    return record["worker"]


def programs(geometry: ConvGeometry, dtype: np.dtype, has_bias: bool, relu: bool) -> Programs:
    """Return the programs of the forward pass, whose weight is what `pack` returned."""
    return Programs(_program, geometry, dtype, has_bias, relu)


@functools.lru_cache(maxsize=256)
def _program(geometry: ConvGeometry, variant: Variant) -> Program:
    record, arrays, items = _record(geometry, variant.dtype)
    stage: Any = _depthwise_stage if is_depthwise(geometry) else _dense_stage
    if _is_windowed(geometry):
        stage = _window_stage
    return program_of(stage, record.copy(), items, 1, variant, arrays)
