"""Groups of many filters on the matrix unit: products in float32, of numbers in three parts.

A work item is a tile of pixels, of one image or of several small ones, and some filters. The pixels that a tile needs
are split into parts once for all taps, in a *window*: for every 32 channels and each part, planes of pairs of channels,
with zeros for the padding. With strides, a plane has its rows and columns by phases, so that the pixels of neighbouring
outputs under one tap are neighbours. Its rows are so wide that this also holds from row to row: outputs are computed
beyond the end of each, and not written. So 16 pixels of 32 channels under one tap are what the unit reads as a matrix,
wherever they begin.

The sum of an output goes over all channels and taps at once. The kernels are packed beforehand.
"""

import functools
import itertools
import math
from array import array
from typing import NamedTuple

import numpy as np

from nbfftconv import jit, matrix_unit, scratch, simd, threads
from nbfftconv.direct import dense
from nbfftconv.direct.block import Programs, Variant, no_biases, part_of, program_of
from nbfftconv.direct.window import AXIS_FIELDS, axis_in_window
from nbfftconv.geometry import ConvGeometry
from nbfftconv.matrix_unit import DEPTH, PACKED_BYTES, PARTS, SIDE
from nbfftconv.planes import PLANES, input_planes, output_plane_of, plane_of
from nbfftconv.program import Program
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.split_product import packer
from nbfftconv.target import LINE_BYTES, TARGET
from nbfftconv.threads import share

# A worker's memory: the unit's configuration, the largest magnitudes of sums, the window, and sums, of blocks of 2 × 16
# filters and pixels.
_LARGEST, _WINDOW, _SUMS_ROW = 64, 128, 2 * VECTOR_BYTES
_BLOCK_SUMS = 2 * SIDE * _SUMS_ROW
#: Pairs of channels that are multiplied at once, and bytes of one.
_PAIRS, _PAIR = DEPTH // 2, 4
#: Kernels of a group that take no more than this stay in the L2 cache beside a small window; a larger window, for
#: which kernels are read less often, takes five eighths of it.
_RESIDENT_BYTES, _SMALL_WINDOW_BYTES, _WINDOW_BYTES = (TARGET.l2_bytes * part // 8 for part in (2, 2, 5))
#: Pixels of a tile, at most, of several images if they are small: kernels are read once for each tile.
_MOST_PIXELS = 512
#: Steps of a sum that all pixels of a tile go through before the next ones: their kernels are read again and again.
_RUN = 24
#: Work items of a thread that there should be, of parts of the filters if need be.
_ITEMS = 2
# Bits of float32: of infinity, and of 2^-80, of which the parts, and their products with what is not small, are normal.
_INFINITE, _SMALLEST = (int(np.float32(value).view(np.int32)) for value in (np.inf, 2.0**-80))
#: Clock cycles of a multiply-add of vectors, of packing a vector of each of two channels, and of writing one.
_VECTOR_CYCLES, _PACKED_CYCLES, _WRITTEN_CYCLES = 0.57, 20, 6
#: So many times longer than its cycles tell the unit takes for products.
_WAITING = 1.4
#: Less is gained where neighbours of the core have the unit slow down.
WORTHWHILE = 0.75

# Tiles are of `images` images, or of y_core × x_core pixels of one. Of a window: bytes of the planes of a pair, of a
# part of 32 channels, of all three, and of an image; of a plane, bytes of a phase, pixels of a row, and vectors that
# are filled. `table` has where the pixels under the tap of each step are. Steps are taken in runs: sums begin `sums`
# bytes after a worker's memory does, and those of a block are `block_sums` from the next one's.
RECORD = RecordType(
    fields(
        "input", "weight", "output", "bias", "zeros", "table", "scratch", "worker", "largest", "workers",
        "batch", "groups", "channels", "filters", "filter_blocks", "channel_blocks", "chunks", "steps",
        "relu", "stream", "turn", "turns", "images", "y_core", "x_core", "y_count", "x_count",
        "plane", "part", "block", "image", "phase", "row", "vectors", "fetches", "run", "sums", "block_sums",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_FIELDS),
        planes=PLANES,
    )
)  # fmt: skip
_PACKING = RecordType(fields("weight", "packed", "filters", "channels", "taps", "filter_blocks", "scratch", "order"))


def _pack_emitter(interleave: int):
    """Return the emitter that packs rows of every so manieth scalar; or, of 0, of scalars that are a step apart."""

    def emit(v, a, b, row, step, begin, end, of_a, of_b, ahead, target, target_row, part, rows, vectors):
        def masks(first, is_there):
            if interleave == 2:
                return [v.lanes_between(begin, end * is_there, first * 2 + i * v.lanes) for i in range(2)]
            return [v.lanes_between(begin, end * is_there, first)]

        def load(address, of):
            if interleave == 1:
                return v.masked_load(address, of[0])
            if interleave == 2:
                return v.even_lanes(*(v.masked_load(address + i * v.vector_bytes, of[i]) for i in range(2)))
            return v.gather(address, step, of[0])

        def packer(of_a, of_b):
            def pack(a, b, target):
                for address, i in itertools.product((a, b), range(max(1, interleave))):
                    v.prefetch(address + ahead + i * v.vector_bytes)
                parts = zip(matrix_unit.split(v, load(a, of_a)), matrix_unit.split(v, load(b, of_b)), strict=True)
                for i, (low, high) in enumerate(parts):
                    v.store(v.high_halves(low, high, True), target + part * i)
                return a + advance, b + advance, target + v.vector_bytes

            return pack

        advance = step * v.lanes
        last = (vectors - 1) * v.lanes
        pack_first, pack_last = (packer(masks(at, of_a), masks(at, of_b)) for at in (0, last))
        pack_whole = packer([v.all_lanes_if(of_a)] * 2, [v.all_lanes_if(of_b)] * 2)

        def pack_row(a, b, target):
            here = pack_first(a, b, target)
            here = v.repeat(vectors - 2, here, pack_whole)
            v.repeat(v.minimum(vectors - 1, 1), here, pack_last)
            return a + row, b + row, target + target_row

        v.repeat(rows, [a, b, target], pack_row)

    return emit


# (a, b, row, step, begin, end, of_a, of_b, ahead, target, target_row, part, rows, vectors): packs so many rows of
# vectors of two channels; what is so many bytes ahead is fetched. Lanes are `step` bytes apart: neighbours, every other
# scalar, or any. Of what is read of a row, scalars begin .. end - 1, or lanes of any step, are pixels, if `of_a` and
# `of_b` are 1; all others are zero, but there are none in vectors between the first and the last.
_pack_neighbours = simd.kernel(_pack_emitter(1), "pack_window_neighbours")
_pack_every_other = simd.kernel(_pack_emitter(2), "pack_window_every_other")
_pack_apart = simd.kernel(_pack_emitter(0), "pack_window_apart")


def _emit_write(v, sums, sums_row, y, y_row, begin, end, bias, relu, rows, largest):
    inside = v.lanes_between(begin, end)
    clipped = v.all_lanes_if(relu)

    def write(sums, y, bias, found):
        value = v.load(sums)
        found = v.maximum(found, v.magnitude(v.select(inside, value, 0.0)))
        value = value + v.broadcast(bias)
        v.masked_store(v.select(clipped, v.relu(value), value), y, inside)
        return sums + sums_row, y + y_row, bias + v.itemsize, found

    *_, found = v.repeat(rows, [sums, y, bias, v.load_magnitude(largest)], write)
    v.store_magnitude(found, largest)


# (sums, sums_row, y, y_row, begin, end, bias, relu, rows, largest): writes lanes begin .. end - 1 of so many rows of
# sums with the bias of each, clipped if `relu`; at `largest` is a vector of the largest magnitudes of sums.
_write_rows = simd.kernel(_emit_write, "write_window_rows")


def _emit_fetch(v, address, lines):
    def fetch(address):
        v.prefetch(address, level=2)
        return [address + LINE_BYTES]

    v.repeat(lines, [address], fetch)


# (address, lines): fetches neighbouring lines to the second-level cache.
_fetch_lines = simd.kernel(_emit_fetch, "fetch_lines")


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
def _pack_lanes(
    real, itemsize, step, begin, end, a, b, row, of_a, of_b, ahead, target, target_row, part, rows, vectors
):
    """Pack vectors of rows of two channels, whose lanes are `step` scalars apart; begin .. end - 1 are pixels."""
    arguments = (
        a, b, row, step * itemsize, begin, end, of_a, of_b, ahead, target, target_row, part, rows, vectors,
    )  # fmt: skip
    if step == 1:
        _pack_neighbours(real, arguments)
    elif step == 2:
        _pack_every_other(real, arguments)
    else:
        _pack_apart(real, (
            a, b, row, step * itemsize, cdiv(begin, step), cdiv(end, step), of_a, of_b, ahead, target, target_row, part,
            rows, vectors,
        ))  # fmt: skip


@jit.njit()
def _pack_zeros(real, target, target_row, part, rows, vectors):
    """Write rows of zeros to the planes of a pair."""
    _pack_neighbours(real, (0, 0, 0, 0, 0, 0, 0, 0, 0, target, target_row, part, rows, vectors))


@jit.njit()
def _pack_planes(real, itemsize, lanes, r, a, b, y, x, rows, window):
    """Pack the pixels of two channels, at the addresses `a` and `b` or 0 for none, from row `y` and column `x` on."""
    step, jump = r.x_stride * r.x_step, r.y_stride * r.y_step
    of_a, of_b = min(a, 1), min(b, 1)
    source_row, target_row = jump * r.x_input * itemsize, r.row * _PAIR
    ahead = 2 * r.planes.planes * r.y_input * r.x_input * itemsize  # the next pair
    for y_phase in range(r.y_stride):
        count = cdiv(rows - y_phase, r.y_stride)
        first = y + y_phase * r.y_step
        # of these rows, those that are there
        above = max(0, min(cdiv(-first, jump), count))
        below = max(above, min(cdiv(r.y_input - first, jump), count))
        for x_phase in range(r.x_stride):
            column = x + x_phase * r.x_step
            target = window + (y_phase * r.x_stride + x_phase) * r.phase
            _pack_zeros(real, target, target_row, r.part, above, r.vectors)
            at = ((first + above * jump) * r.x_input + column) * itemsize
            place, begin, end = target + above * target_row, -column, r.x_input - column
            whole = lanes * step
            if begin <= whole and end >= whole * (r.vectors - 1):
                _pack_lanes(
                    real, itemsize, step, begin, end, a + at, b + at, source_row, of_a, of_b, ahead, place,
                    target_row, r.part, below - above, r.vectors,
                )  # fmt: skip
            else:  # the last vector of a row is written before the next row's first, which it overlaps
                for i in range(r.vectors - 1, -1, -1):
                    here = i * whole
                    _pack_lanes(
                        real, itemsize, step, begin - here, end - here, a + at + here * itemsize,
                        b + at + here * itemsize, source_row, of_a, of_b, ahead, place + i * VECTOR_BYTES,
                        target_row, r.part, below - above, 1,
                    )  # fmt: skip
            _pack_zeros(real, target + below * target_row, target_row, r.part, count - below, r.vectors)


@jit.njit()
def _channel_at(r, itemsize, n, group, channel):
    """Return the address of a channel of a group, 0 if it is none, or zero."""
    if channel >= r.channels:
        return 0
    plane = plane_of(r.planes, n, group * r.channels + channel)
    return r.input + plane * r.y_input * r.x_input * itemsize if plane >= 0 else 0


@jit.njit()
def _pack_window(real, itemsize, lanes, r, n, group, y0, x0, rows, window):
    """Pack the pixels of an image that a tile of so many rows needs."""
    y, x = y0 * r.y_stride * r.y_step - r.y_before, x0 * r.x_stride * r.x_step - r.x_before
    rows = (rows - 1) * r.y_stride + (r.y_kernel - 1) * r.y_dilation + 1
    for block in range(r.channel_blocks):
        for pair in range(_PAIRS):
            channel = block * DEPTH + 2 * pair
            a, b = _channel_at(r, itemsize, n, group, channel), _channel_at(r, itemsize, n, group, channel + 1)
            _pack_planes(real, itemsize, lanes, r, a, b, y, x, rows, window + block * r.block + pair * r.plane)


@jit.njit()
def _next_pixels(r, itemsize, y0, x0):
    """Return where in a plane the pixels are that the next tile of an image has beside this one's, and their lines."""
    if r.y_count == 1:
        x = (x0 + r.x_core) * r.x_stride * r.x_step
        columns = min(r.x_core * r.x_stride * r.x_step, r.x_input - x) if r.y_input == 1 else 0
        return x * itemsize, max(0, columns) * itemsize // LINE_BYTES
    if r.x_count > 1:
        return 0, 0
    reach = (r.y_kernel - 1) * r.y_dilation + 1
    y = ((y0 + r.y_core - 1) * r.y_stride + reach) * r.y_step - r.y_before
    rows = min(r.y_core * r.y_stride * r.y_step, r.y_input - y)
    return y * r.x_input * itemsize, max(0, rows) * r.x_input * itemsize // LINE_BYTES


@jit.njit()
def _fetch(real, itemsize, r, n, group, offset, lines, call, calls):
    """Fetch this call's part of so many lines of every channel."""
    begin, end = share(lines * r.channels, call, calls)
    while begin < end:
        channel, line = begin // lines, begin % lines
        count = min(lines - line, end - begin)
        plane = plane_of(r.planes, n, group * r.channels + channel)
        if plane >= 0:
            _fetch_lines(real, (
                r.input + plane * r.y_input * r.x_input * itemsize + offset + line * LINE_BYTES, count,
            ))  # fmt: skip
        begin += count


@jit.njit()
def _write_pixels(real, itemsize, r, first, end, columns, sums, y, y_row, filter, filters, largest):
    """Write the sums of pixels first .. end - 1 of a tile, row by row of each vector."""
    p = first
    while p < end:
        row, column = p // r.row, p % r.row
        stop = min(p - (p - first) % SIDE + SIDE, end)
        if column >= columns:
            p = min(stop, (row + 1) * r.row)
            continue
        last = min(stop, row * r.row + columns)
        lane = (p - first) % SIDE
        _write_rows(real, (
            sums + (p - first) // SIDE * VECTOR_BYTES, _SUMS_ROW,
            y + (row * r.x_output + column - lane) * itemsize, y_row,
            lane, lane + last - p, r.bias + filter * itemsize, r.relu, filters, largest,
        ))  # fmt: skip
        p = last


def _forward(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def split_dense_forward(r, worker, begin, end):
        memory = r.scratch + worker * r.worker
        window, sums = memory + _WINDOW, memory + r.sums
        packed = simd.pointer(np.int64, r.largest + 8 * (r.workers + worker))  # the tile in the window, plus 1
        matrix_unit.begin_matrices(real, (memory,))
        _clear_magnitudes(real, (memory + _LARGEST,))
        panel = r.steps * PACKED_BYTES
        plane = r.y_output * r.x_output * itemsize
        y_row = r.planes.outputs * plane
        for item in range(begin, end):
            of_tile = item // r.chunks
            tile, group, y0, x0, first_block, last_block = part_of(r, item, r.filter_blocks)
            rows, columns = min(r.y_core, r.y_output - y0), min(r.x_core, r.x_output - x0)
            first, images = tile * r.images, min(r.images, r.batch - tile * r.images)
            if packed[0] != of_tile + 1:
                for i in range(images):
                    _pack_window(real, itemsize, lanes, r, first + i, group, y0, x0, rows, window + i * r.image)
                packed[0] = of_tile + 1
            pixels = (rows - 1) * r.row + columns
            calls = images * cdiv(pixels, 2 * SIDE)
            all_calls, call = calls * cdiv(last_block - first_block, 2), 0
            offset, next_lines = _next_pixels(r, itemsize, y0, x0)
            for block in range(first_block, last_block, 2):
                blocks = min(2, last_block - block)
                a = r.weight + (group * r.filter_blocks + block) * panel
                filter = group * r.filters + block * SIDE
                filters = min(blocks * SIDE, r.filters - block * SIDE)
                for step in range(0, r.steps, r.run):
                    steps = min(r.run, r.steps - step)
                    is_last = step + steps == r.steps
                    # the kernels of the next run, or of the next filters, of either block
                    following = a + 2 * panel if is_last else a + (step + steps) * PACKED_BYTES
                    lines = r.fetches * cdiv(2 * r.run * PACKED_BYTES // LINE_BYTES, calls * steps)
                    fetched, of_pixels = 0, sums
                    for i in range(images):
                        y = r.output + output_plane_of(r.planes, r.groups * r.filters, first + i, filter) * plane
                        for q in range(0, pixels, 2 * SIDE):
                            vectors = 2 if pixels - q > SIDE else 1
                            beyond = 0 if fetched < r.run * PACKED_BYTES else panel - r.run * PACKED_BYTES
                            at = (y0 + q // r.row) * r.x_output + x0 + min(q % r.row, columns)
                            matrix_unit.multiply_window(real, (
                                a + step * PACKED_BYTES, panel, r.table + 8 * step,
                                window + i * r.image + q * _PAIR, r.plane, r.part, of_pixels, _SUMS_ROW,
                                steps, step, following + fetched + beyond, lines, y + at * itemsize, y_row, blocks,
                                vectors,
                            ))  # fmt: skip
                            fetched += steps * lines * LINE_BYTES
                            if is_last:
                                _fetch(real, itemsize, r, first, group, offset, next_lines, call, all_calls)
                                call += 1
                                _write_pixels(
                                    real, itemsize, r, q, min(q + vectors * SIDE, pixels), columns, of_pixels,
                                    y + (y0 * r.x_output + x0) * itemsize, y_row, filter, filters, memory + _LARGEST,
                                )  # fmt: skip
                            of_pixels += r.block_sums
        matrix_unit.end_matrices(real, ())
        _note_magnitudes(r, worker, memory)

    return split_dense_forward


_pack_rows = packer(is_nested=True, is_transposed=False)


def _pack(real):
    itemsize = np.dtype(real).itemsize

    def split_dense_pack(r, worker, begin, end):
        memory = r.scratch + worker * SIDE * DEPTH * itemsize
        entries, weight = simd.pointer(real, memory), simd.pointer(real, r.weight)
        order = simd.pointer(np.int64, r.order)
        channel_blocks = cdiv(r.channels, DEPTH)
        for item in range(begin, end):
            group, block = item // r.filter_blocks, item % r.filter_blocks
            k = block * SIDE
            target = r.packed + item * channel_blocks * r.taps * PACKED_BYTES
            for channel in range(0, r.channels, DEPTH):
                channels = min(DEPTH, r.channels - channel)
                for tap in range(r.taps):
                    for row in range(SIDE):
                        source = ((group * r.filters + k + row) * r.channels + channel) * r.taps + order[tap]
                        there = channels if k + row < r.filters else 0
                        for i in range(there):
                            entries[row * DEPTH + i] = weight[source + i * r.taps]
                        for i in range(there, DEPTH):
                            entries[row * DEPTH + i] = real(0)
                    _pack_rows(real, memory, DEPTH * itemsize, VECTOR_BYTES, SIDE, DEPTH, target)
                    target += PACKED_BYTES

    return split_dense_pack


_forward_stage, _pack_stage = jit.stage(RECORD)(_forward), jit.stage(_PACKING)(_pack)


class Cut(NamedTuple):
    """How a geometry is cut: a record, to be copied, with all numbers; arrays whose addresses it has; tiles."""

    record: Record
    arrays: tuple[np.ndarray, ...]
    tiles: int


@functools.lru_cache(maxsize=256)
def _order_of_taps(weight_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> np.ndarray:
    """Return the taps in the order in which they are multiplied: those of one phase, which share pixels, together."""
    phases = []
    for taps, s, d in zip(weight_size[2:], stride, dilation, strict=True):
        step = math.gcd(s, d if taps > 1 else 0)
        phases.append(np.arange(taps) * (d // step) % (s // step))
    y, x = phases
    return np.argsort((y[:, None] * (x.max() + 1) + x).ravel(), kind="stable")


@functools.lru_cache(maxsize=256)
def cut(geometry: ConvGeometry, dtype: np.dtype) -> Cut:
    """Return how a geometry is cut."""
    y, x = (axis_in_window(geometry.axis_numbers(axis)) for axis in (0, 1))
    for axis in (y, x):
        axis["stride"] = max(1, axis["stride"])
    images = geometry.input_size[0]
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    taps = math.prod(kernel)
    is_flat = taps == 1 and geometry.stride == (1, 1) and geometry.padding == ((0, 0), (0, 0))
    if is_flat:
        x |= {"input": x["input"] * y["input"], "output": x["output"] * y["output"]}
        y |= {"input": 1, "output": 1}
    y_reach, x_reach = (axis["dilation"] * (axis["kernel"] - 1) for axis in (y, x))
    channel_blocks, blocks = cdiv(channels, DEPTH), cdiv(filters, SIDE)
    kernels = blocks * channel_blocks * taps * PACKED_BYTES
    window = _WINDOW_BYTES if kernels > _RESIDENT_BYTES else _SMALL_WINDOW_BYTES
    budget = window // (channel_blocks * PARTS * y["stride"] * x["stride"] * _PAIRS)  # of a plane

    def plane(y_core: int, x_core: int) -> tuple[int, int]:
        """Return the pixels of a row, and the bytes of a plane: lines, an odd number of them."""
        row = x_core + x_reach // x["stride"]
        return row, (cdiv((y_core + y_reach // y["stride"]) * row * _PAIR, LINE_BYTES) | 1) * LINE_BYTES

    x_count = 1
    while True:
        x_core = round_up(cdiv(x["output"], x_count), SIDE) if x_count > 1 else x["output"]
        least = min(y["output"], max(1, 2 * y_reach // y["stride"]))
        is_small = plane(least, x_core)[1] <= budget and least * x_core <= _MOST_PIXELS
        if is_small or x_core <= 2 * SIDE:
            break
        x_count += 1
    y_core = y["output"]
    y_count = 1
    while y_core > 1 and (plane(y_core, x_core)[1] > budget or y_core * x_core > _MOST_PIXELS):
        y_count += 1
        y_core = cdiv(y["output"], y_count)
    x_count, y_count = cdiv(x["output"], x_core), cdiv(y["output"], y_core)
    row, of_plane = plane(y_core, x_core)
    phase = _PAIRS * of_plane + VECTOR_BYTES  # the last row's last vector may end later
    of_part = y["stride"] * x["stride"] * phase
    image = channel_blocks * PARTS * of_part
    together = 1
    if x_count == y_count == 1:
        together = max(1, min(window // image, _MOST_PIXELS // (x_core * y_core), images))
        together = max(1, cdiv(images, cdiv(max(1, images), together)))
    u, v = np.ogrid[: kernel[0], : kernel[1]]
    y_turn, y_phase = np.divmod(u * y["dilation"], y["stride"])
    x_turn, x_phase = np.divmod(v * x["dilation"], x["stride"])
    places = (y_phase * x["stride"] + x_phase) * phase + (y_turn * row + x_turn) * _PAIR
    places = places.ravel()[_order_of_taps(geometry.weight_size, geometry.stride, geometry.dilation)]
    of_block = PARTS * of_part
    table = (np.arange(channel_blocks)[:, None] * of_block + places).astype(np.int64).ravel()
    zeros = no_biases(geometry.weight_size[0], dtype)
    blocks_of_sums, steps = together * cdiv((y_core - 1) * row + x_core, 2 * SIDE), channel_blocks * taps
    run = steps if blocks_of_sums == 1 else min(steps, _RUN)
    sums = round_up(_WINDOW + together * image + 4096, 64)
    numbers = {
        "table": table.ctypes.data, "zeros": zeros.ctypes.data, "batch": images, "groups": geometry.groups,
        "channels": channels, "filters": filters, "filter_blocks": blocks, "channel_blocks": channel_blocks,
        "chunks": 1, "steps": steps, "run": run, "images": together, "fetches": kernels > _RESIDENT_BYTES,
        "y_core": y_core, "x_core": x_core, "y_count": y_count, "x_count": x_count,
        "plane": of_plane, "part": of_part, "block": of_block, "image": image, "phase": phase, "row": row,
        "vectors": cdiv(row, SIDE), "sums": sums, "block_sums": 0 if run == steps else _BLOCK_SUMS,
        "worker": sums + (1 if run == steps else blocks_of_sums) * _BLOCK_SUMS,
    }  # fmt: skip
    for name, axis in (("y", y), ("x", x)):
        numbers |= {f"{name}_{number}": value for number, value in axis.items()}
    return Cut(
        record=RECORD.make((*(numbers.get(name, 0) for name in RECORD.numbers), input_planes(geometry))),
        arrays=(table, zeros),
        tiles=cdiv(images, together) * geometry.groups * y_count * x_count,
    )


def fits(geometry: ConvGeometry, dtype: np.dtype) -> bool:
    """Whether this module is for a geometry; else, `dense` is."""
    if dtype != np.float32 or not matrix_unit.is_available() or share_of_vectors(geometry) >= WORTHWHILE:
        return False
    return scratch_bytes(geometry, dtype) <= TARGET.l2_bytes  # it is more where taps are far apart


@functools.lru_cache(maxsize=256)  # every call asks
def share_of_vectors(geometry: ConvGeometry) -> float:
    """Return what part of the time that vectors need the unit takes, both with all that is gathered, or packed.

    As it waits for the memory, too, products take longer than the unit's own cycles.
    """
    record = cut(geometry, np.dtype(np.float32)).record
    filters = geometry.weight_size[0] // geometry.groups
    pixels = (record["y_core"] - 1) * record["row"] + record["x_core"]
    tiles = record["y_count"] * record["x_count"]
    products = _WAITING * matrix_unit.BLOCK_CYCLES * tiles * cdiv(pixels, SIDE) * cdiv(filters, SIDE) * record["steps"]
    packed = tiles * record["image"] // (PARTS * VECTOR_BYTES)
    written = filters * tiles * cdiv(pixels, SIDE)
    by_vectors = dense.in_products(dense.cut(geometry, np.dtype(np.float32)).work)
    if by_vectors == 0:
        return math.inf
    of_vectors = _VECTOR_CYCLES / SIDE * by_vectors / (geometry.input_size[0] * geometry.groups)
    return (products + _PACKED_CYCLES * packed + _WRITTEN_CYCLES * written) / of_vectors


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread."""
    return cut(geometry, dtype).record["worker"]


def packed_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of the packed kernels."""
    filters, channels, *kernel = geometry.weight_size
    blocks = geometry.groups * cdiv(filters // geometry.groups, SIDE)
    return blocks * cdiv(channels, DEPTH) * math.prod(kernel) * PACKED_BYTES


def pack(geometry: ConvGeometry, w: np.ndarray) -> Memory:
    """Return the parts of the kernels as [group][block of filters][32 channels][u][v], with zeros to fill them up."""
    packed = scratch.aligned(packed_bytes(geometry, w.dtype))
    filters, channels, *kernel = geometry.weight_size
    filters //= geometry.groups
    order = _order_of_taps(geometry.weight_size, geometry.stride, geometry.dilation)
    items, workers = geometry.groups * cdiv(filters, SIDE), threads.get_workers()[0]
    room = scratch.aligned(workers * SIDE * DEPTH * w.dtype.itemsize)
    numbers = filters, channels, math.prod(kernel), cdiv(filters, SIDE), room.address, order.ctypes.data
    record = _PACKING.make((w.ctypes.data, packed.address, *numbers))
    threads.run(threads.Task(_pack_stage.address(w.dtype.type), record, items, workers))
    return packed


def programs(geometry: ConvGeometry, dtype: np.dtype, has_bias: bool, relu: bool) -> Programs:
    """Return the programs of the forward pass, whose weight is what `pack` returned."""
    return Programs(_program, geometry, dtype, has_bias, relu)


def is_exact(noted: "array[int]") -> bool:
    """Whether results are as exact as in float32, given what the workers have noted.

    They are not where numbers are not finite, or all so small that the unit loses bits.
    """
    largest = max(noted[: len(noted) // 2], default=0)
    return largest == 0 or _SMALLEST <= largest < _INFINITE


@functools.lru_cache(maxsize=256)
def _program(geometry: ConvGeometry, variant: Variant) -> Program:
    made = cut(geometry, variant.dtype)
    record = made.record.copy()
    record["workers"] = variant.workers
    most = max(1, record["filter_blocks"] // 2)
    record["chunks"] = min(most, cdiv(_ITEMS * variant.workers, max(1, made.tiles)))
    return program_of(_forward_stage, record, made.tiles * record["chunks"], 1, variant, made, notes=2)
