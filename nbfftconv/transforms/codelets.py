"""Generated tile transforms: a vector lane is a tile (or a filter), and a transform is straight-line code over lanes.

A tile of T_y × T_x samples is transformed row by row, real to complex, then column by column. Rows are transposed from
the tiles' memory to lanes as they are read, and back as they are written. Compiled are the transforms of rows and of
columns of each length, which a tile of any two sides calls by their addresses.
"""

import functools
import math

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES, Layout, Operations, TileTransform, Transform, signature
from nbfftconv.transforms.butterflies import Complex, complex_transform, load, real_inverse, real_transform, store

#: The tile sides that there is a transform for.
SIDES = (8, 9, 10, 12, 13, 14, 15, 16, 18, 20, 24, 28, 30, 32)

# Fractions of the machine's `flops`, as measured where that is 165e9, of transforms of each length.
_RATES = {
    8: 96 / 165, 9: 91 / 165, 10: 98 / 165, 12: 96 / 165, 13: 58 / 165, 14: 75 / 165, 15: 77 / 165, 16: 92 / 165,
    18: 60 / 165, 20: 61 / 165, 24: 60 / 165, 28: 51 / 165, 30: 47 / 165, 32: 63 / 165,
}  # fmt: skip


@functools.cache
def _rows_forward(length):
    """Callback: `count` rows of `length` samples, from their places to [row, k, (re, im), lane].

    What is `ahead` bytes further on is fetched for a later call. The largest magnitudes go to the vector at `largest`.
    """

    def emit(v, places, base, work, count, ahead, largest):
        padded = -(-length // v.lanes) * v.lanes
        masks = 8 * v.lanes

        def row(place, work, bits):
            samples = []
            for group in range(padded // v.lanes):
                rows = []
                for lane in range(v.lanes):
                    start = v.add(base, v.integer_at(v.add(place, v.integer(8 * lane))))
                    at = v.add(start, v.integer(group * VECTOR_BYTES))
                    v.prefetch(v.add(at, ahead))
                    mask = v.mask_at(v.add(place, v.integer(masks + 2 * (group * v.lanes + lane))))
                    rows.append(v.load_some(at, mask))
                    bits = v.larger(bits, v.magnitude_bits(rows[-1]))
                samples += v.transpose(rows)
            for k, value in enumerate(real_transform([Complex(v, x) for x in samples[:length]])):
                store(v, value, v.add(work, v.integer(k * COMPLEX_BYTES)))
            step = (length // 2 + 1) * COMPLEX_BYTES
            return [v.add(place, v.integer(masks + 2 * padded)), v.add(work, v.integer(step)), bits]

        _, _, bits = v.repeat(count, [places, work, v.no_bits()], row)
        v.store_bits(bits, largest)

    kernel = simd.kernel(emit, f"rows_forward_{length}", 6)

    def factory(real):
        def rows_forward(places, base, work, count, ahead, largest):
            kernel(real, (places, base, work, count, ahead, largest))

        return rows_forward

    return Callback(factory, signature(arguments=6))


@functools.cache
def _columns(length, sign):
    """Callback: columns of `length` values, `pitch` bytes from row to row, to the frequencies of each, or back.

    The first column is real, then `count` are complex, then `last` more, one or none, are real. Of a real column only
    half the frequencies are in the spectrum, since the others are conjugate to them.
    """

    def emit(v, work, pitch, spectrum, stride, count, last):
        def column(work, spectrum, steps=length):
            inside = [v.add(work, v.scale(pitch, v.integer(i))) for i in range(length)]
            outside = [v.add(spectrum, v.scale(stride, v.integer(i))) for i in range(steps)]
            following = v.add(spectrum, v.scale(stride, v.integer(steps)))
            if sign < 0:
                for i in range(length):  # a column's lines are apart: stores alone would wait for one after the other
                    at = v.add(following, v.scale(stride, v.integer(i)))
                    v.prefetch(at, write=True)
                    v.prefetch(v.add(at, v.integer(VECTOR_BYTES)), write=True)
                if steps == length:
                    result = complex_transform([load(v, at) for at in inside], sign)
                else:
                    result = real_transform([Complex(v, v.load(at)) for at in inside])
                for value, at in zip(result, outside, strict=True):
                    store(v, value, at)
            else:
                for at in outside:  # the next channel's comes next
                    v.prefetch(v.add(at, v.integer(COMPLEX_BYTES)), level=2)
                    v.prefetch(v.add(at, v.integer(COMPLEX_BYTES + VECTOR_BYTES)), level=2)
                values = [load(v, at) for at in outside]
                result = complex_transform(values, sign) if steps == length else real_inverse(values, length)
                for value, at in zip(result, inside, strict=True):
                    store(v, value, at)
            return [v.add(work, v.integer(COMPLEX_BYTES)), following]

        real = functools.partial(column, steps=length // 2 + 1)
        state = real(work, spectrum)
        state = v.repeat(count, state, column)
        v.repeat(last, state, real)

    kernel = simd.kernel(emit, f"columns_{length}_{sign}", 6)

    def factory(real):
        def columns(work, pitch, spectrum, stride, count, last):
            kernel(real, (work, pitch, spectrum, stride, count, last))

        return columns

    return Callback(factory, signature(arguments=6))


@functools.cache
def _rows_inverse(length):
    """Callback: `count` rows from [row, k, (re, im), lane] to the places of lanes, `pitch` bytes from row to row.

    Whole vectors are written, each before what begins in its midst if that is of a later lane or row.
    """

    def emit(v, places, base, pitch, work, count):
        groups = -(-length // v.lanes)

        def row(base, work):
            spectrum = [load(v, v.add(work, v.integer(k * COMPLEX_BYTES))) for k in range(length // 2 + 1)]
            samples = [x.re for x in real_inverse(spectrum, length)]
            samples += [v.zero()] * (groups * v.lanes - length)
            for group in reversed(range(groups)):
                for lane, value in enumerate(v.transpose(samples[group * v.lanes : (group + 1) * v.lanes])):
                    start = v.add(base, v.integer_at(v.add(places, v.integer(8 * lane))))
                    v.store(value, v.add(start, v.integer(group * VECTOR_BYTES)))
            step = (length // 2 + 1) * COMPLEX_BYTES
            return [v.add(base, pitch), v.add(work, v.integer(step))]

        v.repeat(count, [base, work], row)

    kernel = simd.kernel(emit, f"rows_inverse_{length}", 5)

    def factory(real):
        def rows_inverse(places, base, pitch, work, count):
            kernel(real, (places, base, pitch, work, count))

        return rows_inverse

    return Callback(factory, signature(arguments=5))


_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "rows_forward", "columns_forward", "columns_inverse", "rows_inverse",  # addresses of code
            "height",
            "pitch",  # bytes from a row of the work memory to the next
            "complex_columns", "last_columns",  # columns that are complex; 1 if one more is real
        )
    ]
)  # fmt: skip


def _forward_factory(real):
    itemsize = np.dtype(real).itemsize

    def forward(c, places, base, work, spectrum, stride, rows, ahead, largest):
        simd.call(c.rows_forward, (places, base, work, rows, ahead, largest))
        rest = simd.pointer(real, work)
        for i in range(rows * c.pitch // itemsize, c.height * c.pitch // itemsize):
            rest[i] = real(0)
        simd.call(c.columns_forward, (work, c.pitch, spectrum, stride, c.complex_columns, c.last_columns))

    return forward


def _inverse_factory(real):
    def inverse(c, places, base, pitch, work, spectrum, stride, rows):
        simd.call(c.columns_inverse, (work, c.pitch, spectrum, stride, c.complex_columns, c.last_columns))
        simd.call(c.rows_inverse, (places, base, pitch, work, rows))

    return inverse


_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=9))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=8))


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra: rows are whole vectors."""
    lanes = simd.lanes(real)
    real_columns = 2 - width % 2
    steps = height * (width // 2 + 1) - real_columns * ((height - 1) // 2)  # each of half the frequencies
    return Layout(lanes, -(-width // lanes) * lanes, steps)


@functools.cache
def codelet(real: type, height: int, width: int) -> TileTransform:
    """Return the generated transform of tiles of ``height * width`` scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        Of `SIDES`.
    """
    shape = layout(real, height, width)
    half = width // 2 + 1
    last = 1 - width % 2
    callbacks = (
        _rows_forward(width), _columns(height, -1),
        _columns(height, 1), _rows_inverse(width),
    )  # fmt: skip
    context = np.array(
        (*(callback.address(real) for callback in callbacks), height, half * COMPLEX_BYTES, half - 1 - last, last),
        _CONTEXT,
    )
    return TileTransform(
        _forward.address(real),
        _inverse.address(real),
        context.ctypes.data,
        shape,
        work_items=2 * height * half * shape.lanes,
        kept=context,
    )


def _operations(height, width, frequencies):
    # rows are transformed before the columns are
    logarithms = np.array([math.log2(side) / _RATES[side] for side in SIDES])
    of_sides = (logarithms[np.searchsorted(SIDES, sides)] for sides in (height, width))
    operations = 2.5 * height * width * sum(of_sides)
    return Operations(operations / 2, 0.0, operations / (2 * height))


TRANSFORM = Transform(
    "codelet", codelet, layout, SIDES, _operations,
    product_rate=165 / 165, spectra_rate=35 / 25, stream_rate=33 / 25, row=1.3e-9, skips_rows=True,
)  # fmt: skip
