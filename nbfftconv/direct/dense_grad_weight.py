"""The gradient with respect to the kernels, of groups of many filters: a matrix product whose lanes are filters.

dW[k, i] = sum over p of G[k, p] · X[i, p], where i = (c, u, v), p is an output pixel of any image, and X[i, p] the
pixel, or the zero of the padding, that p has under tap (u, v) in channel c. A work item is some filters and some taps
of a group. It goes through its pixels band by band: the input under a band is gathered, once for all taps, with zeros
for the padding, then block by block of pixels the gradient, transposed so that filters are neighbours. Where that
makes few work items, each is cut into parts, of as many bands, whose sums are added up at the end. Where it makes long
ones, they take turns, of some bands each. Neither bands nor parts nor turns depend on the threads.
"""

import functools
from typing import Any

import numpy as np

from nbfftconv import jit, scratch, simd, threads
from nbfftconv.direct.block import MOST_PRODUCTS
from nbfftconv.direct.gather import clear_lanes
from nbfftconv.direct.window import AXIS_FIELDS, axis_in_window, gather_window
from nbfftconv.geometry import ConvGeometry
from nbfftconv.records import RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET, WIDEST_VECTOR_BYTES, power_of_two
from nbfftconv.threads import in_turns, share

# The block of dW in registers: vectors of filters, and taps. G takes as many registers as there are vectors, and a
# pixel one.
_VECTORS = 3
_TAPS = (TARGET.registers - _VECTORS - 1) // _VECTORS
#: Pixels of a block: G under one block of filters takes half of the L1 cache.
_PIXELS = TARGET.l1_bytes // 2 // (_VECTORS * WIDEST_VECTOR_BYTES)
#: Blocks of filters of a work item, at most, which share the gathered input; as few as this for as many items as
#: _ITEMS, enough for many threads.
_MOST_BLOCKS, _FEWEST_BLOCKS = 4, 2
_ITEMS = 24
#: Taps of a work item, at most: more share the transposed gradient, until their sums take more than a quarter of the L2
#: cache. They are those of a power of two of channels of 3×3 kernels.
_MOST_TAPS = 9 * power_of_two(TARGET.l2_bytes // 4 // (9 * _MOST_BLOCKS * _VECTORS * WIDEST_VECTOR_BYTES))
#: The input under a band is meant to take a quarter of the L2 cache, and is at most as wide as a block of pixels, ...
_WINDOW_BYTES, _COLUMNS = TARGET.l2_bytes // 4, _PIXELS
#: ... and where the smallest band's would not fit that cache, because of a large dilation, `gradients` is the way.
_MOST_BYTES = TARGET.l2_bytes
#: A band of a work item has so many products, at most.
_BAND_PRODUCTS = 2 * MOST_PRODUCTS
#: So it is for groups of fewer filters, whose lanes would be empty, and of fewer weights, for which little is gained
#: from what is gathered.
_FEWEST_FILTERS, _FEWEST_WEIGHTS = 2, 32

_RECORD = RecordType(
    fields(
        "input", "weight", "output", "scratch", "worker",
        # channels, filters and taps of a group; sums of a part of all items, and of an item
        "images", "groups", "channels", "filters", "taps", "sums", "part", "item",
        # vectors of filters, in blocks, in chunks; blocks of taps, in chunks; parts of the bands
        "vectors", "filter_blocks", "filter_chunks", "tap_blocks", "tap_chunks",
        "turn", "turns", "bands", "parts",
        "image_core", "y_core", "x_core", "y_count", "x_count",
        # bytes of the window's rows, channels and images, and where what follows it in a worker begins
        "row", "phase", "phases", "interleave", "plane", "image", "gradient", "pixel_table", "tap_table", "slot_sums",
        # every so many pixels of the input are in the window, in which strides and dilations are divided by that
        *(f"{axis}_{name}" for axis in "yx" for name in AXIS_FIELDS),
    )
)  # fmt: skip
_stage = jit.stage(_RECORD)


def _product_block(vectors: int):
    """Return the emitter of a block of taps × vectors of filters."""

    def emit(v, pixels, taps, g, sums, count):
        offsets = [v.load_integer(taps + 8 * i) for i in range(_TAPS)]
        places = [sums + i * v.vector_bytes for i in range(_TAPS * vectors)]
        for place in places:
            v.prefetch(place, write=True)

        def add_products(pixel, g, *totals):
            totals = list(totals)
            x = v.load_integer(pixel)
            filters = [v.load(g + j * v.vector_bytes) for j in range(vectors)]
            for i in range(_TAPS):
                value = v.broadcast(x + offsets[i])
                for j in range(vectors):
                    totals[i * vectors + j] = v.fma(value, filters[j], totals[i * vectors + j])
            return [pixel + 8, g + vectors * v.vector_bytes, *totals]

        _, _, *totals = v.repeat(count, [pixels, g, *[0.0] * (_TAPS * vectors)], add_products)
        for place, total in zip(places, totals, strict=True):
            v.store(v.load(place) + total, place)

    return emit


def _product_blocks(v, *arguments):
    *operands, vectors_used = arguments
    for vectors in range(1, _VECTORS + 1):
        with v.when(vectors_used, vectors):
            _product_block(vectors)(v, *operands)


def _rows(v, step, left):
    """Distances of as many rows as a vector has lanes; rows that there are none of repeat the last of `left`."""
    last = left - 1
    return [step * v.minimum(i, last) for i in range(v.lanes)]


def _transpose_block(v, source, source_step, left, count, target, target_step):
    rows = _rows(v, source_step, left)

    def square(source, target, count):
        inside = v.lanes_between(0, count)
        for row in rows:  # for the next block of pixels
            v.prefetch(source + row + _PIXELS * v.itemsize, level=2)
        for i, pixel in enumerate(v.transpose([v.masked_load(source + row, inside) for row in rows])):
            v.store(pixel, target + target_step * i)
        return [source + v.vector_bytes, target + target_step * v.lanes, count - v.lanes]

    squares = (count + (v.lanes - 1)) // v.lanes
    v.repeat(squares, [source, target, count], square)


def _scatter_block(v, sums, sums_step, part, parts, left, count, target, target_step):
    def add_part(sums, *totals):
        values = [v.load(sums + sums_step * i) for i in range(v.lanes)]
        return [sums + part, *(total + value for total, value in zip(totals, values, strict=True))]

    _, *totals = v.repeat(parts, [sums, *[0.0] * v.lanes], add_part)
    inside = v.lanes_between(0, count)
    rows = zip(v.transpose(totals), _rows(v, target_step, left), strict=True)
    for total, row in reversed(list(rows)):  # the last row that there is comes after those that repeat it
        v.masked_store(total, target + row, inside)


# (pixels, taps, g, sums, count, vectors): add to sums[tap][filter] the products of `count` vectors g[pixel][filter]
# with the scalars at pixels[pixel] + taps[tap], two tables of int64.
_product = simd.kernel(_product_blocks, "weight_product", 6)
# (source, source_step, left, count, target, target_step): `left` rows, at most as many as a vector has lanes, of
# `count` scalars as `count` vectors; up to a whole number of vectors of scalars are written.
_transpose = simd.kernel(_transpose_block, "transpose_pixels")
# (sums, sums_step, part, parts, left, count, target, target_step): the transposed sum over parts of `count` vectors,
# at most as many as their lanes, as `left` rows of `count` scalars.
_scatter = simd.kernel(_scatter_block, "scatter_weight")


@jit.njit()
def _list_pixels(itemsize, r, window, rows, columns, begin, end, table):
    """Fill a table with the places in the window of pixels begin .. end - 1 of a band."""
    places = simd.pointer(np.int64, table)
    image, rest = begin // (rows * columns), begin % (rows * columns)
    y, x = rest // columns, rest % columns
    for i in range(end - begin):
        places[i] = window + image * r.image + y * r.y_stride * r.row + x * r.x_stride * itemsize
        x += 1
        if x == columns:
            x, y = 0, y + 1
            if y == rows:
                y, image = 0, image + 1


@jit.njit()
def _gather_gradient(real, itemsize, lanes, r, plane, n, y, x, rows, columns, begin, end, vector, vectors, target):
    """Gather pixels begin .. end - 1 of a band as [pixel][filter], of `vectors` vectors of filters of a group."""
    pixels = r.y_output * r.x_output
    line = rows * columns if columns == r.x_output else columns  # pixels without a gap
    while begin < end:
        image, rest = begin // (rows * columns), begin % (rows * columns)
        count = min(end - begin, line - rest % line)
        source = plane + (n + image) * r.groups * r.filters * pixels * itemsize
        source += ((y + rest // columns) * r.x_output + x + rest % columns) * itemsize
        for j in range(vectors):
            k = (vector + j) * lanes
            _transpose(real, (
                source + k * pixels * itemsize, pixels * itemsize, min(lanes, r.filters - k), count,
                target + j * VECTOR_BYTES, vectors * VECTOR_BYTES,
            ))  # fmt: skip
        target += count * vectors * VECTOR_BYTES
        begin += count


@jit.njit()
def _chunk(r, item):
    """Group, range of blocks of filters and range of taps of an item."""
    tap_chunk, item = item % r.tap_chunks, item // r.tap_chunks
    filter_chunk, group = item % r.filter_chunks, item // r.filter_chunks
    first_block, last_block = share(r.filter_blocks, filter_chunk, r.filter_chunks)
    first_taps, last_taps = share(r.tap_blocks, tap_chunk, r.tap_chunks)
    return group, first_block, last_block, first_taps * _TAPS, min(last_taps * _TAPS, r.taps)


@jit.njit()
def _add_up(real, itemsize, lanes, r, item, sums, part, parts):
    """Write an item's part of dW, the sum over parts of its sums."""
    group, first_block, last_block, first_tap, last_tap = _chunk(r, item)
    for block in range(first_block, last_block):
        vector, stop = share(r.vectors, block, r.filter_blocks)
        step = (stop - vector) * VECTOR_BYTES
        for k in range(vector * lanes, stop * lanes, lanes):
            row = r.weight + (group * r.filters + k) * r.taps * itemsize
            for tap in range(first_tap, last_tap, lanes):
                _scatter(real, (
                    sums + (tap - first_tap) * step + (k // lanes - vector) * VECTOR_BYTES, step, part, parts,
                    min(lanes, r.filters - k), min(lanes, last_tap - tap), row + tap * itemsize, r.taps * itemsize,
                ))  # fmt: skip
        sums += round_up(last_tap - first_tap, _TAPS) * step


def _grad_weight(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def dense_grad_weight(r, worker, begin, end):
        window = r.scratch + worker * r.worker
        gradient, pixel_table, tap_table = window + r.gradient, window + r.pixel_table, window + r.tap_table
        tap_places = simd.pointer(np.int64, tap_table)
        kernel = r.y_kernel * r.x_kernel
        for part_item in range(begin, end):
            item, part = part_item // r.parts, part_item % r.parts
            group, first_block, last_block, first_tap, last_tap = _chunk(r, item)
            first_channel, last_channel = first_tap // kernel, cdiv(last_tap, kernel)
            blocks = cdiv(last_tap - first_tap, _TAPS)
            for i in range(blocks * _TAPS):  # taps that there are none of repeat the last one
                tap = min(first_tap + i, last_tap - 1)
                u, v = tap % kernel // r.x_kernel, tap % r.x_kernel
                column = v * r.x_dilation * itemsize
                tap_places[i] = (tap // kernel - first_channel) * r.plane + u * r.y_dilation * r.row + column
            is_whole = r.parts == 1 and r.turns == 1
            sums = window + r.slot_sums if is_whole else r.sums + part * r.part + item * r.item
            if r.turn == 0:
                clear_lanes(real, sums, VECTOR_BYTES, 0, lanes, r.item // VECTOR_BYTES)
            first_band, last_band = share(r.bands, part, r.parts)
            first_turn, last_turn = share(last_band - first_band, r.turn, r.turns)
            for band in range(first_band + first_turn, first_band + last_turn):
                n = band // (r.y_count * r.x_count) * r.image_core
                y = band // r.x_count % r.y_count * r.y_core
                x = band % r.x_count * r.x_core
                images = min(r.image_core, r.images - n)
                rows, columns = min(r.y_core, r.y_output - y), min(r.x_core, r.x_output - x)
                for image in range(images):
                    for c in range(first_channel, last_channel):
                        plane = ((n + image) * r.groups + group) * r.channels + c
                        gather_window(
                            real, itemsize, lanes, r, r.input + plane * r.y_input * r.x_input * itemsize,
                            y * r.y_stride * r.y_step - r.y_before, x * r.x_stride * r.x_step - r.x_before,
                            (rows - 1) * r.y_stride + (r.y_kernel - 1) * r.y_dilation + 1,
                            cdiv((columns - 1) * r.x_stride + (r.x_kernel - 1) * r.x_dilation + 1, lanes),
                            window + image * r.image + (c - first_channel) * r.plane,
                        )  # fmt: skip
                pixels = images * rows * columns
                parts = cdiv(pixels, _PIXELS)
                for pixel_block in range(parts):
                    p, stop = share(pixels, pixel_block, parts)
                    _list_pixels(itemsize, r, window, rows, columns, p, stop, pixel_table)
                    block_sums = sums
                    for block in range(first_block, last_block):
                        vector, last_vector = share(r.vectors, block, r.filter_blocks)
                        vectors = last_vector - vector
                        _gather_gradient(
                            real, itemsize, lanes, r,
                            r.output + group * r.filters * r.y_output * r.x_output * itemsize, n, y, x, rows, columns,
                            p, stop, vector, vectors, gradient,
                        )  # fmt: skip
                        for i in range(blocks):
                            _product(real, (
                                pixel_table, tap_table + i * _TAPS * 8, gradient, block_sums, stop - p, vectors,
                            ))  # fmt: skip
                            block_sums += _TAPS * vectors * VECTOR_BYTES
            if is_whole:
                _add_up(real, itemsize, lanes, r, item, sums, 0, 1)

    return dense_grad_weight


def _add_parts(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def add_parts(r, worker, begin, end):
        for item in range(begin, end):
            _add_up(real, itemsize, lanes, r, item, r.sums + item * r.item, r.part, r.parts)

    return add_parts


_grad_weight_items = _stage(_grad_weight)
_add_part_items = _stage(_add_parts)


@functools.lru_cache(maxsize=256)
def _record(geometry: ConvGeometry, dtype: np.dtype) -> Any:
    """Return the record with all numbers, and no address; None where `gradients` is the way."""
    y, x = (axis_in_window(geometry.axis_numbers(axis)) for axis in (0, 1))
    filters, channels = geometry.weight_size[0] // geometry.groups, geometry.weight_size[1]
    kernel = y["kernel"] * x["kernel"]
    if filters < _FEWEST_FILTERS or filters * channels * kernel < _FEWEST_WEIGHTS:
        return None
    lanes, images = simd.lanes(dtype.type), geometry.input_size[0]
    numbers: dict[str, Any] = {
        "images": images, "groups": geometry.groups, "channels": channels, "filters": filters,
        "taps": channels * kernel, "tap_blocks": cdiv(channels * kernel, _TAPS), "vectors": cdiv(filters, lanes),
    }  # fmt: skip

    numbers["x_count"] = cdiv(x["output"], _COLUMNS)
    numbers["x_core"] = x_core = cdiv(x["output"], numbers["x_count"])
    reach = (y["kernel"] - 1) * y["dilation"]
    row = cdiv((x_core - 1) * x["stride"] + (x["kernel"] - 1) * x["dilation"] + 1, lanes) * VECTOR_BYTES
    most_taps = min(_MOST_TAPS, numbers["tap_blocks"] * _TAPS)
    while True:
        depth = min(channels, cdiv(most_taps - 1, kernel) + 1)
        if depth * row * (reach + 1) <= _MOST_BYTES:
            break
        if most_taps == _TAPS:
            return None
        most_taps = max(_TAPS, most_taps // 2)
    fitting = (_WINDOW_BYTES // (depth * row) - reach - 1) // max(1, y["stride"]) + 1
    most_filters = min(numbers["vectors"], _MOST_BLOCKS * _VECTORS) * lanes
    fitting = max(1, min(fitting, _BAND_PRODUCTS // (most_taps * most_filters * x_core)))
    numbers["y_count"] = cdiv(y["output"], fitting)
    numbers["y_core"] = y_core = cdiv(y["output"], numbers["y_count"])
    # An odd number of vectors: the same pixel of neighbouring channels shall be in different sets of a cache.
    plane = (((y_core - 1) * y["stride"] + reach + 1) * row // VECTOR_BYTES | 1) * VECTOR_BYTES
    image_core = 1
    if numbers["y_count"] == numbers["x_count"] == 1:
        image_core = max(1, min(images, _WINDOW_BYTES // (depth * plane), _PIXELS // (y_core * x_core)))
    numbers |= {
        "row": row,
        "phases": 1,
        "interleave": 1,
        "plane": plane,
        "image": depth * plane,
        "image_core": image_core,
    }
    numbers["bands"] = cdiv(images, image_core) * numbers["y_count"] * numbers["x_count"]

    numbers["tap_chunks"] = tap_chunks = cdiv(numbers["tap_blocks"], most_taps // _TAPS)
    numbers["filter_blocks"] = blocks = cdiv(numbers["vectors"], _VECTORS)
    others = geometry.groups * tap_chunks
    wanted = cdiv(_ITEMS, others * max(1, numbers["bands"]))
    numbers["filter_chunks"] = chunks = max(cdiv(blocks, _MOST_BLOCKS), min(wanted, blocks // _FEWEST_BLOCKS))
    numbers["parts"] = parts = max(1, min(numbers["bands"], cdiv(_ITEMS, others * chunks)))

    block = min(_PIXELS, image_core * y_core * x_core)
    item_taps = cdiv(numbers["tap_blocks"], tap_chunks) * _TAPS
    item_filters = cdiv(blocks, chunks) * _VECTORS * lanes
    pixels = cdiv(images * y["output"] * x["output"], parts)
    numbers["turns"] = max(1, min(numbers["bands"] // parts, cdiv(item_taps * item_filters * pixels, MOST_PRODUCTS)))
    # `_scatter` reads whole vectors of taps.
    numbers["item"] = (cdiv(blocks, chunks) * item_taps + lanes) * _VECTORS * VECTOR_BYTES
    numbers["part"] = geometry.groups * tap_chunks * chunks * numbers["item"]
    numbers["gradient"] = image_core * depth * plane
    # Transposition writes whole vectors of pixels.
    numbers["pixel_table"] = numbers["gradient"] + (block + lanes) * _VECTORS * VECTOR_BYTES
    numbers["tap_table"] = numbers["pixel_table"] + 8 * block
    numbers["slot_sums"] = round_up(numbers["tap_table"] + 8 * item_taps, VECTOR_BYTES)
    numbers["worker"] = numbers["slot_sums"] + (numbers["item"] if parts == numbers["turns"] == 1 else 0)
    numbers |= {f"{name}_{number}": value for name, axis in (("y", y), ("x", x)) for number, value in axis.items()}
    record = _RECORD.zeros()
    for name, value in numbers.items():
        record[name] = value
    return record


def fits(geometry: ConvGeometry, dtype: np.dtype) -> bool:
    """Whether this module is for a geometry; else, `gradients` is."""
    return _record(geometry, dtype) is not None


def scratch_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of scratch memory of each thread."""
    return _record(geometry, dtype)["worker"]


def sums_bytes(geometry: ConvGeometry, dtype: np.dtype) -> int:
    """Bytes of the sums of all parts; none where one turn does them, whose sums are in the thread's scratch memory."""
    record = _record(geometry, dtype)
    return record["parts"] * record["part"] if record["parts"] > 1 or record["turns"] > 1 else 0


def work(geometry: ConvGeometry, dtype: np.dtype) -> tuple[int, int]:
    """Products, with those of lanes without a filter and taps that there are none of, and scalars gathered."""
    record = _record(geometry, dtype)
    images, _, height, width = geometry.output_size
    pixels = geometry.groups * images * height * width
    filters = record["vectors"] * simd.lanes(dtype.type)
    windows = record["groups"] * record["tap_chunks"] * record["filter_chunks"] * record["bands"]
    gathered = windows * record["gradient"] // dtype.itemsize + pixels * filters * record["tap_chunks"]
    return pixels * filters * record["tap_blocks"] * _TAPS, gathered


def grad_weight(geometry: ConvGeometry, x: np.ndarray, dw: np.ndarray, g: np.ndarray) -> None:
    """Compute the gradient with respect to the kernels into `dw`."""
    workers = threads.get_workers()[0]
    record = _record(geometry, x.dtype).copy()
    memory, sums = scratch.borrow(workers * record["worker"]), scratch.borrow(sums_bytes(geometry, x.dtype))
    for name, array in (("input", x), ("weight", dw), ("output", g)):
        record[name] = array.ctypes.data
    record["scratch"], record["sums"] = memory.address, sums.address
    items = record["groups"] * record["filter_chunks"] * record["tap_chunks"]
    parts, turns = record["parts"], record["turns"]
    tasks = in_turns(_grad_weight_items.address(x.dtype.type), record, items * parts, workers, turns)
    if parts > 1 or turns > 1:
        tasks.append(threads.Task(_add_part_items.address(x.dtype.type), record, items, workers))
    threads.run(*tasks)
