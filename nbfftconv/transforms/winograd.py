"""Winograd's minimal filtering F(m, r): of a tile, m outputs a side under r taps, by products at m + r - 1 points.

Along one axis, with the points p of `POINTS` and infinity, y = A·[(G·g) × (B·d)] is the correlation of m + r - 1
samples d with r taps g, where A[i, p] = p^i, G[p, i] = p^i / N(p), N(p) is the product of p - q over the other points
q, and row p of B has the coefficients of the product of x - q. Of infinity, A and G take the last sample, and B the
coefficients of the product of all x - p. Along two axes, the maps follow each other. (Winograd, Arithmetic Complexity
of Computations, 1980; Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.)

The maps of gradients are the transposed ones. A vector lane is a tile, or a filter; tiles are read as they lie in the
array, side by side, and sorted into lanes.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from nbfftconv import rates, simd
from nbfftconv.jit import Callback, njit
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.transforms import (
    Functions,
    Layout,
    Operations,
    TileTransform,
    Transform,
    kernel_callback,
    signature,
)
from nbfftconv.transforms.lanes import load_row, point_rows, row_bytes, store_row, tile_of

#: For numbers of points, infinity aside, those for which rounding errors are smallest, or nearly, of points that come
#: in pairs p, -p, with which maps take fewer operations. Errors of products of random values grow, by two axes, up to
#: 7.1 times for five points (31 for 0, 1, -1, 2, -2), 4.2 for four, 1.7 for three, 2 for two.
POINTS = {
    2: (1.0, -1.0),
    3: (0.0, 1.0, -1.0),
    4: (0.4, -0.4, 1.25, -1.25),
    5: (0.0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)),
}
#: Outputs of a tile along an axis, powers of two: vectors are sorted by them.
OUTPUTS = (2, 4)
#: Taps along an axis.
MOST_TAPS = 3


@functools.cache
def matrices(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A, G and B; of one tap, A and B are the identity, and G repeats it."""
    if taps == 1:
        return np.eye(outputs), np.ones((outputs, 1)), np.eye(outputs)
    points = np.array(POINTS[outputs + taps - 2])
    count = len(points)
    a, g, b = np.zeros((outputs, count + 1)), np.zeros((count + 1, taps)), np.zeros((count + 1, count + 1))
    for index, p in enumerate(points):
        others = np.delete(points, index)
        a[:, index], g[index] = p ** np.arange(outputs), p ** np.arange(taps) / np.prod(p - others)
        b[index, :count] = np.poly(others)[::-1]
    a[-1, -1] = g[-1, -1] = 1
    b[-1] = np.poly(points)[::-1]
    return a, g, b


def apply(v: Any, matrix: np.ndarray, values: list[Any]) -> list[Any]:
    """Emit the product of a matrix and a vector of vectors."""

    def combination(row: np.ndarray) -> Any:
        total = None
        for factor, value in zip(row.tolist(), values, strict=True):
            if factor != 0:
                total = v.fma(value, factor, total) if total is not None else value if factor == 1 else value * factor
        return 0.0 if total is None else total

    return [combination(row) for row in matrix]


def _pairs(points: tuple[float, ...]) -> list[float]:
    """Return one of each pair of points."""
    return [p for p in points if p > 0]


def apply_input(v: Any, points: tuple[float, ...], d: list[Any]) -> list[Any]:
    """Emit B·d: the factors x² - p² of the pairs follow each other, and rows share them."""
    zero, rows = int(0.0 in points), []

    def times_square(p: float, values: list[Any]) -> list[Any]:
        return [v.fma(values[j], -p * p, values[j + 2]) for j in range(len(values) - 2)]

    for p in _pairs(points):
        of_others = functools.reduce(lambda values, q: times_square(q, values), set(_pairs(points)) - {p}, d)
        rows += [v.fma(of_others[zero], sign * p, of_others[zero + 1]) for sign in (1, -1)]
    of_all = times_square(p, of_others)
    return [*of_all[:zero], *rows, of_all[zero]]


def apply_output(v: Any, points: tuple[float, ...], outputs: int, values: list[Any]) -> list[Any]:
    """Emit A·values by sums and differences of the pairs, which rows share."""
    *finite, last = values
    zero = int(0.0 in points)
    pairs = list(zip(_pairs(points), finite[zero::2], finite[zero + 1 :: 2], strict=True))
    sums, differences = [a + b for _, a, b in pairs], [a - b for _, a, b in pairs]
    rows = []
    for i in range(outputs):
        total = finite[0] if i == 0 and zero else last if i == outputs - 1 else None
        for (p, _, _), value in zip(pairs, differences if i % 2 else sums, strict=True):
            factor = p**i
            total = (value if factor == 1 else value * factor) if total is None else v.fma(value, factor, total)
        rows.append(total)
    return rows


def _apply_map(v: Any, name: str, outputs: int, taps: int, values: list[Any]) -> list[Any]:
    """Emit a map: "input" is B, "output" A transposed, "weight" G, and "to_input" and so on their transposes."""
    a, g, b = matrices(outputs, taps)
    if taps > 1 and name == "input":
        return apply_input(v, POINTS[outputs + taps - 2], values)
    if taps > 1 and name == "to_output":
        return apply_output(v, POINTS[outputs + taps - 2], outputs, values)
    of_name = {"input": b, "output": a.T, "weight": g, "to_input": b.T, "to_output": a, "to_weight": g.T}
    return apply(v, of_name[name], values)


_MAPS = ("input", "output", "weight", "to_input", "to_output", "to_weight")


def _sizes(name: str, outputs: int, taps: int) -> tuple[int, int]:
    """Return how many values a map takes and gives."""
    points = outputs + taps - 1
    size = {"input": points, "output": outputs, "weight": taps}[name.removeprefix("to_")]
    return (points, size) if name.startswith("to_") else (size, points)


def rows_of_lanes(name_index: int, outputs: int, taps: int) -> Callable:
    """Emitter: rows of tiles, each where it is, mapped, to [row, point, lane]; as `rows_forward` of codelets."""
    name = _MAPS[name_index]
    length, points = _sizes(name, outputs, taps)

    def emit(v, indirection, base, work, count, ahead, largest):
        def row(pointers, work, magnitude):
            samples, pointers, magnitude = load_row(v, length, pointers, base, ahead, magnitude)
            for k, value in enumerate(_apply_map(v, name, outputs, taps, samples)):
                v.store(value, work + k * v.vector_bytes)
            return [pointers, work + points * v.vector_bytes, magnitude]

        _, _, magnitude = v.repeat(count, [indirection, work, v.zero_magnitude()], row)
        v.store_magnitude(magnitude, largest)

    return emit


def whole_kernels(outputs_y: int, taps_y: int, outputs_x: int, taps_x: int) -> Callable:
    """Emitter: kernels, each all of a piece, to their points: a row of `load_row` has all taps of one."""

    def emit(v, indirection, base, spectrum, stride, ahead, largest):
        samples, _, magnitude = load_row(v, taps_y * taps_x, indirection, base, ahead, v.zero_magnitude())
        rows = [
            _apply_map(v, "weight", outputs_x, taps_x, samples[first : first + taps_x])
            for first in range(0, taps_y * taps_x, taps_x)
        ]
        for j, column in enumerate(zip(*rows, strict=True)):
            for i, value in enumerate(_apply_map(v, "weight", outputs_y, taps_y, list(column))):
                v.store(value, spectrum + stride * (i * len(rows[0]) + j))
        v.store_magnitude(magnitude, largest)

    return emit


def rows_to_lanes(name_index: int, outputs: int, taps: int) -> Callable:
    """Emitter: `count` rows of points from [row, point, lane], mapped, to an address for each lane."""
    name = _MAPS[name_index]
    points, _ = _sizes(name, outputs, taps)

    def emit(v, indirection, base, pitch, work, count):
        def row(base, work):
            values = [v.load(work + k * v.vector_bytes) for k in range(points)]
            store_row(v, _apply_map(v, name, outputs, taps, values), indirection, base)
            return [base + pitch, work + points * v.vector_bytes]

        v.repeat(count, [base, work], row)

    return emit


#: Bytes of a place in an indirection buffer of tiles side by side: an address and a mask. Before them, in words, are
#: the number of segments of the vector that has most, and that of each vector.
_PLACE, _HEADER = 16, 16


def _segments(real: type, outputs: int) -> int:
    """Return the segments of a vector at most: tiles of which it has a part."""
    return cdiv(simd.lanes(real), outputs) + 1


def _places(name: str, outputs: int, taps: int) -> int:
    """Return the vectors in which a row of all lanes lies, those of samples that tiles share once for each tile."""
    length, _ = _sizes(name, outputs, taps)
    return cdiv(length, outputs) * outputs


def _deinterleave(v: Any, vectors: list[Any]) -> list[Any]:
    """Emit the sorting of vectors, a power of two, whose lanes take turns in so many sequences."""
    if len(vectors) == 1:
        return vectors
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    even = _deinterleave(v, [v.even_lanes(a, b) for a, b in pairs])
    odd = _deinterleave(v, [v.odd_lanes(a, b) for a, b in pairs])
    return [x for pair in zip(even, odd, strict=True) for x in pair]


def _interleave(v: Any, vectors: list[Any]) -> list[Any]:
    """Emit the reverse of `_deinterleave`."""
    if len(vectors) == 1:
        return vectors
    even, odd = _interleave(v, vectors[::2]), _interleave(v, vectors[1::2])
    return [x for pair in zip(even, odd, strict=True) for x in v.zip_lanes(*pair)]


def rows_side_by_side(name_index: int, outputs: int, taps: int) -> Callable:
    """Emitter: rows of tiles that lie side by side, mapped, to [row, point, lane].

    Lanes of a vector follow each other in memory up to where a segment ends. The indirection buffer has a header, and
    then, for every row and every segment, for each vector of the row of all lanes an address and a mask.
    """
    name = _MAPS[name_index]
    length, points = _sizes(name, outputs, taps)
    places = _places(name, outputs, taps)

    def emit(v, indirection, base, work, count, ahead, largest):
        row_places = _segments(v.real, outputs) * places

        def rows(segments, is_one):
            def row(pointers, work, magnitude):
                vectors = []
                for place in range(places):

                    def load(pointer):
                        at = base + v.load_integer(pointer)
                        return at, v.masked_load(at, v.load_mask(pointer + 8))

                    at, value = load(pointers + place * _PLACE)
                    if place < outputs or place == places - 1:  # the last one ends in one more line
                        v.prefetch(at + ahead)
                    if not is_one:

                        def segment(pointer, value, load=load):
                            return [pointer + places * _PLACE, value + load(pointer)[1]]

                        _, value = v.repeat(segments - 1, [pointers + (places + place) * _PLACE, value], segment)
                    vectors.append(value)
                samples = []
                for first in range(0, places, outputs):
                    samples += _deinterleave(v, vectors[first : first + outputs])
                samples = samples[:length]
                for sample in samples:
                    magnitude = v.maximum(magnitude, v.magnitude(sample))
                for k, value in enumerate(_apply_map(v, name, outputs, taps, samples)):
                    v.store(value, work + k * v.vector_bytes)
                return [pointers + row_places * _PLACE, work + points * v.vector_bytes, magnitude]

            _, _, magnitude = v.repeat(count, [indirection + 8 * _HEADER, work, v.zero_magnitude()], row)
            v.store_magnitude(magnitude, largest)

        segments = v.load_integer(indirection)
        with v.when(segments, 1):
            rows(1, True)
        with v.unless(segments, 1):
            rows(segments, False)

    return emit


#: Of a place that is a whole line of the array, in its mask.
_IS_LINE = 1 << 32


def rows_to_array(name_index: int, outputs: int, taps: int) -> Callable:
    """Emitter: `count` rows of points from [row, point, lane], mapped, to the rows of tiles that lie side by side.

    The indirection buffer is as in `rows_side_by_side`; what is added is factors[1].
    """
    name = _MAPS[name_index]
    points, _ = _sizes(name, outputs, taps)

    def emit(v, places, base, work, count, factors, relu, stream):
        whole, row_places = (1 << v.lanes) - 1, _segments(v.real, outputs) * outputs
        bias, segments = v.broadcast(factors + v.itemsize), v.load_integer(places)

        def store(value, pointer, streams):
            at, mask = base + v.load_integer(pointer), v.load_integer(pointer + 8)
            if streams:
                with v.when(mask, whole + _IS_LINE):
                    v.store_nontemporal(value, at)
                with v.unless(mask, whole + _IS_LINE):
                    v.masked_store(value, at, v.load_mask(pointer + 8))
            else:
                with v.when(mask & whole, whole):
                    v.store(value, at)
                with v.unless(mask & whole, whole):
                    v.masked_store(value, at, v.load_mask(pointer + 8))

        def rows(clips, streams):
            def row(pointers, work):
                values = [v.load(work + k * v.vector_bytes) for k in range(points)]
                values = [value + bias for value in _apply_map(v, name, outputs, taps, values)]
                if clips:
                    values = [v.relu(value) for value in values]
                for place, value in enumerate(_interleave(v, values)):

                    def segment(pointer, value=value):
                        store(value, pointer, streams)
                        return [pointer + outputs * _PLACE]

                    v.repeat(segments, [pointers + place * _PLACE], segment)
                return [pointers + row_places * _PLACE, work + points * v.vector_bytes]

            v.repeat(count, [places + 8 * _HEADER, work], row)

        for streams in (0, 1):
            for clips in (0, 1):
                with v.when(stream, streams), v.when(relu, clips):
                    rows(clips, streams)

    return emit


def columns(name_index: int, outputs: int, taps: int) -> Callable:
    """Emitter: `count` columns, `pitch` bytes from row to row, mapped, to the points of each; or, of a map that begins
    with "to_", back.

    Points are `stride` bytes apart, along a row of them, and `bin_row` from row to row.
    """
    name = _MAPS[name_index]
    is_back = name.startswith("to_")
    sizes = _sizes(name, outputs, taps)
    samples, points = sizes[::-1] if is_back else sizes

    def emit(v, work, pitch, spectrum, stride, bin_row, count):
        def column(work, spectrum):
            inside = [work + pitch * i for i in range(samples)]
            outside = [spectrum + bin_row * i for i in range(points)]
            if is_back:
                for at in outside:  # the next channel's comes next
                    v.prefetch(at + 2 * v.vector_bytes, level=2)
            source, target = (outside, inside) if is_back else (inside, outside)
            results = _apply_map(v, name, outputs, taps, [v.load(at) for at in source])
            for value, at in zip(results, target, strict=True):
                v.store(value, at)
            return [work + v.vector_bytes, spectrum + stride]

        v.repeat(count, [work, spectrum], column)

    return emit


_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "rows_forward", "columns_forward", "columns_inverse", "rows_inverse",  # addresses of code
            "points",  # along a row
            "outputs", "samples", "places",  # along a row: of a tile, and vectors in which that of all lanes lies
            "segments",  # of a vector, at most
            "row_vectors",  # that a row of samples takes
            "rows_to_array", "whole_kernels",  # addresses of code, or 0
        )
    ]
)  # fmt: skip


@njit()
def _map(c, indirection, base, work, spectrum, stride, rows, ahead, largest):
    """From rows to points, by way of the work memory."""
    simd.call(c.rows_forward, (indirection, base, work, rows, ahead, largest))
    pitch = c.points * simd.VECTOR_BYTES
    simd.call(c.columns_forward, (work, pitch, spectrum, stride, c.points * stride, c.points))


@njit()
def _map_columns_back(c, work, spectrum, stride):
    """From points to rows of points in the work memory."""
    pitch = c.points * simd.VECTOR_BYTES
    simd.call(c.columns_inverse, (work, pitch, spectrum, stride, c.points * stride, c.points))


def _forward_factory(real):
    def forward(c, indirection, base, work, spectrum, stride, rows, ahead, largest):
        _map(c, indirection, base, work, spectrum, stride, rows, ahead, largest)

    return forward


def _forward_kernels_factory(real):
    def forward_kernels(c, indirection, base, work, spectrum, stride, rows, ahead, largest):
        places = indirection + _KERNEL_HEADER
        if simd.pointer(np.int64, indirection)[0] != 0:
            simd.call(c.whole_kernels, (places, base, spectrum, stride, ahead, largest))
        else:
            _map(c, places, base, work, spectrum, stride, rows, ahead, largest)

    return forward_kernels


#: Before the indirection buffer of kernels is told, in a word, whether each is all of a piece.
_KERNEL_HEADER = 64


def _point_kernels_factory(real):
    lanes, itemsize = simd.lanes(real), np.dtype(real).itemsize

    def point_kernels(c, tiles, indirection, row_bytes, rows):
        taps = rows * c.samples
        is_whole = c.whole_kernels != 0 and row_bytes == c.samples * itemsize
        for lane in range(lanes):
            _, above, below, begin, end = tile_of(tiles, lane)
            is_kernel = above == 0 and below == rows and begin == 0 and end == c.samples
            is_whole = is_whole and (is_kernel or below <= above)
        simd.pointer(np.int64, indirection)[0] = is_whole
        for lane in range(lanes):
            tile = tile_of(tiles, lane)
            if is_whole:
                kernel = tile[0], 0, min(tile[2], 1), 0, taps
                point_rows(lanes, indirection + _KERNEL_HEADER, lane, kernel, 1, 0, cdiv(taps, lanes))
            else:
                point_rows(lanes, indirection + _KERNEL_HEADER, lane, tile, rows, row_bytes, c.row_vectors)

    return point_kernels


def _inverse_factory(real):
    def inverse(c, indirection, base, pitch, work, spectrum, stride, rows):
        _map_columns_back(c, work, spectrum, stride)
        simd.call(c.rows_inverse, (indirection, base, pitch, work, rows))

    return inverse


def _write_factory(real):
    vector_bytes = simd.VECTOR_BYTES

    def write(c, indirection, base, work, spectrum, stride, rows, factors, relu, stream):
        _map_columns_back(c, work, spectrum, stride)
        streams = stream if base % vector_bytes == 0 else 0  # else no place that is marked as a line is one
        simd.call(c.rows_to_array, (indirection, base, work, rows, factors, relu, streams))

    return write


def _point_factory(real):
    lanes, itemsize, vector_bytes = simd.lanes(real), np.dtype(real).itemsize, simd.VECTOR_BYTES

    def point(c, tiles, indirection, row_bytes, rows):
        words = simd.pointer(np.int64, indirection)
        row = c.segments * c.places * 2  # words
        most = 0
        for place in range(c.places):
            first, turn = place % c.outputs * lanes, place // c.outputs * c.outputs
            segment, start, above, below = -1, 0, 0, 0
            i = 0
            while i < lanes:  # tile by tile, as far as it is in the vector
                lane, sample = (first + i) // c.outputs, turn + (first + i) % c.outputs
                count = min(c.outputs - (first + i) % c.outputs, lanes - i)
                offset, tile_above, tile_below, tile_begin, tile_end = tile_of(tiles, lane)
                here = offset + (sample - i) * itemsize
                if segment < 0 or here != start or above != tile_above or below != tile_below:
                    segment += 1
                    start, above, below = here, tile_above, tile_below
                    for index in range(rows):
                        word = _HEADER + index * row + (segment * c.places + place) * 2
                        words[word] = start + index * row_bytes
                        words[word + 1] = _IS_LINE if words[word] % vector_bytes == 0 else 0
                begin, end = max(tile_begin, sample), min(tile_end, c.samples, sample + count)
                if begin < end:
                    bits = ((1 << (end - begin)) - 1) << (i + begin - sample)
                    for index in range(above, min(below, rows)):
                        words[_HEADER + index * row + (segment * c.places + place) * 2 + 1] |= bits
                i += count
            words[1 + place] = segment + 1
            most = max(most, segment + 1)
        words[0] = most
        for place in range(c.places):  # where there are fewer segments, the others are empty
            for segment in range(words[1 + place], most):
                for index in range(rows):
                    word = _HEADER + index * row + (segment * c.places + place) * 2
                    words[word], words[word + 1] = 0, 0

    return point


_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=9))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=8))
_write = Callback(_write_factory, signature(_CONTEXT, arguments=10))
_point_side_by_side = Callback(_point_factory, signature(_CONTEXT, arguments=5))
_forward_kernels = Callback(_forward_kernels_factory, signature(_CONTEXT, arguments=9))
_point_kernels = Callback(_point_kernels_factory, signature(_CONTEXT, arguments=5))


def layout(real: type, height: Any, width: Any) -> Layout:
    """Return the layout of tiles and spectra: rows are whole vectors."""
    lanes = simd.lanes(real)
    return Layout(lanes, round_up(width, lanes), height * width, vectors=1)


def _sum_factors(outputs: int, taps: int) -> np.ndarray:
    """Return the least factors of the points of which the sum of the outputs is the combination."""
    a, _, _ = matrices(outputs, taps)
    return np.linalg.pinv(a) @ np.ones(outputs)


@functools.cache
def winograd(real: type, tile: tuple[int, int], taps: tuple[int, int]) -> TileTransform:
    """Return the transform of tiles of (height, width) points, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    tile, taps : tuple of int
        Points and taps, (vertical, horizontal).
    """
    shape = layout(real, *tile)
    outputs = tuple(points - of_axis + 1 for points, of_axis in zip(tile, taps, strict=True))
    kept, of_arrays = [], {}
    for name in ("input", "weight", "output"):
        is_side_by_side = name != "weight"
        forward, inverse = _MAPS.index(name), _MAPS.index(f"to_{name}")
        y, x = (outputs[0], taps[0]), (outputs[1], taps[1])
        rows_forward = rows_side_by_side if is_side_by_side else rows_of_lanes
        callbacks = (
            kernel_callback(rows_forward, forward, *x), kernel_callback(columns, forward, *y),
            kernel_callback(columns, inverse, *y), kernel_callback(rows_to_lanes, inverse, *x),
        )  # fmt: skip
        samples, is_written = _sizes(name, *x)[0], name == "output"
        sizes = tile[1], outputs[1], samples, _places(name, *x), _segments(real, outputs[1]), cdiv(samples, shape.lanes)
        rows_to = kernel_callback(rows_to_array, inverse, *x).address(real) if is_written else 0
        is_common = name == "weight" and taps == (3, 3)  # others are not worth their machine code
        whole = kernel_callback(whole_kernels, *y, *x).address(real) if is_common else 0
        context = np.array((*(callback.address(real) for callback in callbacks), *sizes, rows_to, whole), _CONTEXT)
        point = _point_side_by_side if is_side_by_side else _point_kernels
        forward_of = _forward if is_side_by_side else _forward_kernels
        kept.append(context)
        of_arrays[name] = Functions(
            forward_of.address(real),
            _inverse.address(real),
            context.ctypes.data,
            point.address(real),
            _write.address(real) if is_written else 0,
        )
    places = max(_places(name, outputs[1], taps[1]) for name in ("input", "output"))
    return TileTransform(
        **of_arrays,
        layout=shape,
        work_items=tile[0] * tile[1] * shape.lanes,
        divisor=1,
        sums=np.outer(*(_sum_factors(*of_axis) for of_axis in zip(outputs, taps, strict=True))).reshape(-1),
        indirection_bytes=max(
            row_bytes(real, shape.pitch), (_segments(real, outputs[1]) * places * _PLACE) + 8 * _HEADER
        ),
        kept=kept,
    )


def sides(taps: int, axis: int) -> tuple[int, ...]:
    """Return the points of tiles for so many taps, along either axis."""
    return tuple(outputs + taps - 1 for outputs in OUTPUTS) if taps <= MOST_TAPS else ()


_RATES = rates.of("winograd")


def _operations(height, width, frequencies):
    # two a point and axis, of vectors that are full
    return Operations(4 * height * width / _RATES["transform"], 0.0, 0.0)


TRANSFORM = Transform(
    "winograd", winograd, layout, sides, _operations,
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"],
    read_rate=_RATES["read"], write_rate=_RATES["write"], gathered=_RATES["gathered"], kernel=_RATES["kernel"],
    algorithm="winograd",
)  # fmt: skip
