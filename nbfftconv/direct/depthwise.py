"""Groups of few filters: sliding windows whose lanes are neighbouring output pixels of a row.

A work item is a tile of an image's output, for filters of one group. The pixels under it are gathered into scratch
memory, with zeros for the padding, channel by channel as many as fit. With a horizontal stride s, a row is s rows of
every s-th pixel, so that all loads are of neighbours. Vertically, output rows that are dilation / gcd apart under taps
that are stride / gcd apart share their pixels: a block of R such rows under U such taps loads R + U - 1 rows for R·U
multiplications. Of images of one row, its vectors are the rows of a block: taps that are a vector apart share their
pixels.

What a tap needs, its place in the window and in the kernel, is in a table: first all runs of U = 4 taps, then those of
3, 2 and 1.
"""

import functools
import math
from typing import Any

import numpy as np

from nbfftconv import jit, simd
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
from nbfftconv.direct.window import AXIS_FIELDS, gather_plane
from nbfftconv.geometry import ConvGeometry
from nbfftconv.planes import PLANES, input_planes, output_plane_of, plane_of, put_planes
from nbfftconv.program import Program
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET, power_of_two
from nbfftconv.threads import share

#: Registers hold the weights of a run of this many taps, ...
_RUN = 4
#: ... a vector of pixels, and the sums of this many rows and vectors of a row, a power of two as widths are.
_ROWS = 8
_VECTORS = power_of_two((TARGET.registers - _RUN - 1) // _ROWS)
#: Vectors of a row whose sums are in registers.
_ROW_VECTORS = _ROWS * _VECTORS
#: More filters in a group, and more than so many for every tap of a channel, are left to `dense`, which gathers for
#: every tap, but only once for all filters.
_MOST_FILTERS, _FILTERS_PER_TAP = 4, 1.5
#: So are larger strides, for which most of a window would be gathered in vain, ...
_MOST_STRIDE = 4
#: ... and kernels with dilation so large that the smallest tile's window would take more than a quarter of the L2
#: cache.
_MOST_BYTES = TARGET.l2_bytes // 4
#: Windows are meant to be found in the first-level cache, or mostly: each is read once for every filter.
_WINDOW_BYTES = TARGET.l2_bytes // 64
#: Columns of a tile, at most.
_COLUMNS = 1024
#: Tiles are cut smaller for as many work items, enough for many threads.
_ITEMS = 24

_RECORD = RecordType(
    fields(
        "input", "weight", "output", "bias", "zeros", "scratch", "worker",
        # channels and filters of a group, in chunks; channels gathered at once
        "groups", "channels", "filters", "chunks", "depth", "relu", "stream", "turn", "turns",
        # runs of 4, 3, 2 and 1 taps in the table
        "table", "runs4", "runs3", "runs2", "runs1",
        # of the window: rows, vectors in a row, bytes of a row of every s-th pixel, of a row and of a channel
        "rows", "vectors", "phase", "row", "window", "phases", "interleave",
        # bytes between window rows of neighbouring output rows, and weights of neighbouring taps, of a block
        "row_step", "tap_step", "y_phases",
        "y_core", "x_core", "y_count", "x_count",
        # whether images are of one row; then, taps from one to the one that needs the next vector, 0 if there is none
        "is_row", "tap_shift",
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_FIELDS),
        planes=PLANES,
    )
)  # fmt: skip


def _block(rows: int, vectors: int):
    """Return the emitter of a block of rows × vectors of the output."""

    def emit(v, x, x_channel, row_step, w, w_channel, tap_step, channels, table, runs4, runs3, runs2, runs1,
             bias, relu, ahead, lines, y, y_row, begun, end, rows_left, mode):  # fmt: skip
        def fetch(ahead):
            v.prefetch(ahead, level=2)
            return [ahead + v.vector_bytes]

        def run(taps, x, w):
            def add_products(entry, ahead, *sums):
                sums = list(sums)
                (ahead,) = v.repeat(lines, [ahead], fetch)
                source, weight = x + v.load_integer(entry), w + v.load_integer(entry + 8)
                weights = [v.broadcast(weight + tap_step * u) for u in range(taps)]
                for row in range(rows + taps - 1):
                    for j in range(vectors):
                        pixels = v.load(source + row_step * row + j * v.vector_bytes)
                        for u in range(taps):
                            if 0 <= row - u < rows:
                                k = (row - u) * vectors + j
                                sums[k] = v.fma(weights[u], pixels, sums[k])
                return [entry + 16, ahead, *sums]

            return add_products

        def channel(x, w, ahead, *sums):
            entry = table
            for taps, count in zip((4, 3, 2, 1), (runs4, runs3, runs2, runs1), strict=True):
                entry, ahead, *sums = v.repeat(count, [entry, ahead, *sums], run(taps, x, w))
            return [x + x_channel, w + w_channel, ahead, *sums]

        places, ends = zip(*((y + j * v.vector_bytes, end - j * v.lanes) for j in range(vectors)), strict=True)
        output = OutputBlock(v, places, ends, y_row, begun, rows_left, mode, rows)
        _, _, _, *sums = v.repeat(channels, [x, w, ahead, *[v.broadcast(bias)] * (rows * vectors)], channel)
        output.finish(sums, relu)

    return emit


# (x, x_channel, row_step, w, w_channel, tap_step, channels, table, runs of 4, 3, 2 and 1 taps, bias, relu, ahead,
# lines, y, y_row, begun, end, rows_left, mode, rows, vectors): as `_product` in `dense`, of the windows that `table`
# describes; from `ahead` on so many lines are fetched for every run.
_windows = block_kernel(_block, _ROWS, _VECTORS, "windows", 24)
#: The same of vectors of a row, as rows.
_row_windows = block_kernel(_block, _ROW_VECTORS, 1, "row_windows", 24)


@jit.njit()
def _add_row(real, itemsize, lanes, r, window, w, depth, bias, begun, is_last, relu, ahead, lines, output, columns):
    """Add products to so many columns of a row of outputs; return up to where pixels are fetched.

    `ahead` and `lines` are as of `_windows`.
    """
    w_channel, runs = r.x_kernel * itemsize, (r.runs4 + r.runs3 + r.runs2 + r.runs1) * depth
    first = 0
    while first < columns:  # whole vectors, and the last one
        count = min(_ROW_VECTORS, (columns - first) // lanes)
        inside = lanes
        if count == 0:
            count, inside = 1, columns - first
        _row_windows(real, (
            window + first * itemsize, r.window, VECTOR_BYTES, w, w_channel, r.tap_step, depth,
            r.table, r.runs4, r.runs3, r.runs2, r.runs1,
            bias, relu, ahead, lines,
            output + first * itemsize, VECTOR_BYTES, begun, inside,
            count, mode_of(r, is_last, inside == lanes),
            _ROW_VECTORS // 2 if count <= _ROW_VECTORS // 2 else _ROW_VECTORS, 1,
        ))  # fmt: skip
        ahead += lines * runs * VECTOR_BYTES
        first += count * lanes
    return ahead


def _forward(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def depthwise_forward(r, worker, begin, end):
        window = r.scratch + worker * r.worker
        width = r.x_output
        w_channel = r.y_kernel * r.x_kernel * itemsize
        first_depth, last_depth = share(cdiv(r.channels, r.depth), r.turn, r.turns)
        for item in range(begin, end):
            n, group, y0, x0, first_filter, last_filter = part_of(r, item, r.filters)
            x1, y1 = min(width, x0 + r.x_core), min(r.y_output, y0 + r.y_core)
            for c in range(first_depth * r.depth, min(last_depth * r.depth, r.channels), r.depth):
                depth = min(r.depth, r.channels - c)
                for i in range(depth):
                    gather_plane(
                        real, itemsize, lanes, r, plane_of(r.planes, n, group * r.channels + c + i),
                        y0 * r.y_stride - r.y_before, x0 * r.x_stride - r.x_before, r.rows, r.vectors,
                        window + i * r.window,
                    )  # fmt: skip
                # meanwhile what follows in memory is fetched, which comes next: of this row, other rows, or a channel
                plane = max(0, plane_of(r.planes, n, group * r.channels + c + depth - 1))
                if r.is_row != 0:
                    blocks, pixels = cdiv(x1 - x0, _ROW_VECTORS * lanes), (x1 - x0) * r.x_stride
                    following = plane * r.x_input + min(r.x_input, x1 * r.x_stride)
                else:
                    blocks = cdiv(y1 - y0, _ROWS) * cdiv(x1 - x0, _VECTORS * lanes)
                    below, pixels = y0 * r.y_stride - r.y_before + r.rows, r.rows * r.x_input
                    following = (plane * r.y_input + min(r.y_input, max(0, below))) * r.x_input
                ahead, ahead_end = r.input + following * itemsize, r.input + (following + pixels) * itemsize
                runs = (r.runs4 + r.runs3 + r.runs2 + r.runs1) * depth
                lines = cdiv(pixels * itemsize * depth // VECTOR_BYTES, runs * blocks * (last_filter - first_filter))
                is_last = c + depth == r.channels
                relu = r.relu if is_last else 0
                for f in range(first_filter, last_filter):
                    k = group * r.filters + f
                    w = r.weight + (k * r.channels + c) * w_channel
                    bias = (r.bias if c == 0 else r.zeros) + k * itemsize
                    plane = output_plane_of(r.planes, r.groups * r.filters, n, k)
                    output = r.output + plane * r.y_output * width * itemsize
                    if r.is_row != 0:
                        ahead = _add_row(
                            real, itemsize, lanes, r, window, w, depth, bias, 0 if c == 0 else 1, is_last, relu,
                            ahead, lines if ahead < ahead_end else 0, output + x0 * itemsize, x1 - x0,
                        )  # fmt: skip
                        continue
                    for phase in range(min(r.y_phases, y1 - y0)):
                        rows = cdiv(y1 - y0 - phase, r.y_phases)
                        for i in range(0, rows, _ROWS):
                            row = phase + i * r.y_phases
                            left = min(_ROWS, rows - i)
                            for x in range(x0, x1, _VECTORS * lanes):
                                count = min(_VECTORS * lanes, x1 - x)
                                source = window + row * r.y_stride * r.row + (x - x0) * itemsize
                                target = output + ((y0 + row) * width + x) * itemsize
                                _windows(real, (
                                    source, r.window, r.row_step, w, w_channel, r.tap_step, depth,
                                    r.table, r.runs4, r.runs3, r.runs2, r.runs1,
                                    bias, relu, ahead, lines if ahead < ahead_end else 0,
                                    target, r.y_phases * width * itemsize, 0 if c == 0 else 1, count,
                                    left, mode_of(r, is_last, count % lanes == 0),
                                    _ROWS // 2 if left <= _ROWS // 2 else _ROWS,
                                    cdiv(count, lanes),
                                ))  # fmt: skip
                                ahead += lines * runs * VECTOR_BYTES
        if r.stream != 0:
            simd.fence()

    return depthwise_forward


_forward_tiles = jit.stage(_RECORD)(_forward)


@functools.lru_cache(maxsize=256)
def _record(geometry: ConvGeometry, dtype: np.dtype) -> Any:
    """Return the record with all numbers but those of runs, and no address; None where `dense` is the way."""
    axes = [geometry.axis_numbers(axis) for axis in (0, 1)]
    for axis in axes:  # a step that is never taken would only make the window larger
        axis["stride"] = axis["stride"] if axis["output"] > 1 else 1
        axis["dilation"] = axis["dilation"] if axis["kernel"] > 1 else 1
    y, x = axes
    filters, channels = geometry.weight_size[0] // geometry.groups, geometry.weight_size[1]
    most_filters = max(_MOST_FILTERS, _FILTERS_PER_TAP * y["kernel"] * x["kernel"])
    if filters > most_filters or x["stride"] > _MOST_STRIDE or y["stride"] > _MOST_STRIDE:
        return None
    lanes, itemsize = simd.lanes(dtype.type), dtype.itemsize
    common = math.gcd(y["stride"], y["dilation"])
    y_phases, tap_phases = y["dilation"] // common, y["stride"] // common

    x_reach, tap_step, tap_shift = (x["kernel"] - 1) * x["dilation"] // x["stride"], tap_phases * x["kernel"], 0
    is_row = y["output"] == y["kernel"] == 1
    if is_row:
        fitting = _WINDOW_BYTES // (x["stride"] * itemsize) - x_reach
        x_count = cdiv(x["output"], max(fitting, x_reach, _ROW_VECTORS * lanes))
        x_core = round_up(cdiv(x["output"], x_count), _ROW_VECTORS * lanes)
        distance = lanes * x["stride"]
        if distance % x["dilation"] == 0 and distance < x["kernel"] * x["dilation"]:
            tap_step = tap_shift = distance // x["dilation"]
        x_count = cdiv(x["output"], x_core)
    else:
        x_count = cdiv(x["output"], _COLUMNS)
        x_core = round_up(cdiv(x["output"], x_count), lanes)
    # blocks of too many rows, or vectors, read beyond what they need
    vectors = cdiv(x_core + x_reach, lanes) + (_ROW_VECTORS // 2 - 1) * is_row
    if vectors % 8 == 0:  # rows of a window shall use all sets of a cache
        vectors += 1
    phase = vectors * VECTOR_BYTES
    row = x["stride"] * phase

    block = _ROWS * y_phases
    reach = (y["kernel"] - 1) * y["dilation"]
    fitting = ((_WINDOW_BYTES // row - reach - 1) // y["stride"] + 1) // block
    others = max(1, geometry.input_size[0] * geometry.groups * x_count)
    y_count = max(cdiv(y["output"], max(1, fitting) * block), min(cdiv(_ITEMS, others), cdiv(y["output"], block)))
    y_core = round_up(cdiv(y["output"], y_count), block)
    y_count = cdiv(y["output"], y_core)
    rows = 1 if is_row else (y_core - 1) * y["stride"] + reach + 1
    window = rows * row
    if window > _MOST_BYTES:
        return None

    record = _RECORD.zeros()
    for name, axis in zip("yx", axes, strict=True):
        for number, value in axis.items():
            record[f"{name}_{number}"] = value
    depth = max(1, min(channels, _WINDOW_BYTES // window))
    products = y_core * x_core * y["kernel"] * x["kernel"]  # of a channel and a filter
    chunks = cdiv(filters, max(1, min(filters, MOST_PRODUCTS // (products * depth))))
    turns = min(cdiv(channels, depth), cdiv(products * channels * cdiv(filters, chunks), MOST_PRODUCTS))
    numbers = {
        "groups": geometry.groups, "channels": channels, "filters": filters, "chunks": chunks, "depth": depth,
        "rows": rows, "vectors": vectors, "phase": phase, "row": row, "window": window,
        "row_step": y["stride"] * y_phases * row, "tap_step": tap_step * itemsize, "tap_shift": tap_shift,
        "y_phases": y_phases, "y_core": y_core, "x_core": x_core, "y_count": y_count, "x_count": x_count,
        "is_row": is_row, "phases": x["stride"], "interleave": x["stride"], "y_step": 1, "x_step": 1,
        "worker": depth * window, "turns": turns,
    }  # fmt: skip
    put_planes(record, input_planes(geometry))
    for name, value in numbers.items():
        record[name] = value
    return record


_OF_RUNS = ("y_kernel", "x_kernel", "y_stride", "x_stride", "y_dilation", "x_dilation", "row", "phase", "tap_shift")


@functools.lru_cache(maxsize=8)
def _runs(
    y_kernel: int, x_kernel: int, y_stride: int, x_stride: int, y_dilation: int, x_dilation: int, row: int, phase: int,
    tap_shift: int, itemsize: int,
) -> tuple[np.ndarray, list[int]]:  # fmt: skip
    """Return the table, of int64: for each run of taps, its place in a channel's window and in the channel's kernel, in
    bytes; and how many of them have 1, 2, 3 and 4 taps."""
    count, distance = (x_kernel, tap_shift) if tap_shift else (y_kernel, y_stride // math.gcd(y_stride, y_dilation))
    lengths, taps = [], []
    for first in range(min(distance, count)):
        column = range(first, count, distance)
        parts = cdiv(len(column), _RUN)
        for part in range(parts):
            run = column[len(column) * part // parts : len(column) * (part + 1) // parts]
            lengths.append(len(run))
            taps.append(run[0])
    of_runs, others = np.array(taps, np.int64), np.arange(1 if tap_shift else x_kernel, dtype=np.int64)[:, None]
    y, x = (others, of_runs) if tap_shift else (of_runs, others)
    offset, turn = np.divmod(x * x_dilation, x_stride)
    places = y * (y_dilation * row) + turn * phase + offset * itemsize
    weights = (y * x_kernel + x) * itemsize
    longest_first = np.argsort(np.tile(np.negative(lengths), len(others)), kind="stable")
    table = np.stack([places.ravel(), weights.ravel()], axis=1)[longest_first]
    return table, [lengths.count(length) * len(others) for length in range(1, _RUN + 1)]


def fits(geometry: ConvGeometry, dtype: np.dtype) -> bool:
    """Whether this module is for a geometry; else, `dense` is."""
    return _record(geometry, dtype) is not None


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread."""
    return _record(geometry, dtype)["worker"]


def programs(geometry: ConvGeometry, dtype: np.dtype, has_bias: bool, relu: bool) -> Programs:
    """Return the programs of the forward pass, whose weight is as it came."""
    return Programs(_program, geometry, dtype, has_bias, relu)


@functools.lru_cache(maxsize=256)
def _program(geometry: ConvGeometry, variant: Variant) -> Program:
    record = _record(geometry, variant.dtype).copy()
    table, counts = _runs(*(record[name] for name in _OF_RUNS), variant.dtype.itemsize)
    record["table"] = table.ctypes.data
    for length, count in enumerate(counts, 1):
        record[f"runs{length}"] = count
    zeros = no_biases(geometry.weight_size[0], variant.dtype)
    record["zeros"] = zeros.ctypes.data
    items = geometry.input_size[0] * record["groups"] * record["y_count"] * record["x_count"] * record["chunks"]
    return program_of(_forward_tiles, record, items, record["turns"], variant, table, zeros)
