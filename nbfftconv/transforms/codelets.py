"""Generated tile transforms: a vector lane is a tile (or a filter), and a transform is straight-line code over lanes.

A tile of T_y × T_x samples is transformed row by row, real to complex, then column by column. Rows are transposed from
the tiles' memory to lanes as they are read, and back as they are written. Compiled are the transforms of rows and of
columns of each length, which a tile of any two sides calls by their addresses.
"""

import functools
import math

import numpy as np

from nbfftconv import rates, simd
from nbfftconv.jit import Callback
from nbfftconv.rounding import round_up
from nbfftconv.transforms import (
    COMPLEX_BYTES,
    Functions,
    Layout,
    Operations,
    TileTransform,
    Transform,
    kernel_callback,
    signature,
)
from nbfftconv.transforms.butterflies import (
    Complex,
    complex_transform,
    load_complex,
    real_inverse,
    real_transform,
    store_complex,
)
from nbfftconv.transforms.lanes import load_row, point_callback, row_bytes, store_row

#: The tile sides that there is a transform for.
SIDES = (8, 9, 10, 12, 13, 14, 15, 16, 18, 20, 24, 28, 30, 32)

# `length_8` and so on, beside those of `Transform`: fractions of the machine's `flops` of transforms of each length.
_RATES = rates.of("codelet")


def rows_forward(length):
    """Emitter: `count` rows of `length` samples, from where they are to [row, k, (re, im), lane].

    What is `ahead` bytes further on is fetched for a later call. The largest magnitudes go to the vector at `largest`.
    """

    def emit(v, indirection, base, work, count, ahead, largest):
        size = 2 * v.vector_bytes

        def row(pointers, work, magnitude):
            samples, pointers, magnitude = load_row(v, length, pointers, base, ahead, magnitude)
            spectrum = real_transform([Complex(v, x) for x in samples])
            for k, value in enumerate(spectrum):
                store_complex(v, value, work + k * size)
            return [pointers, work + len(spectrum) * size, magnitude]

        _, _, magnitude = v.repeat(count, [indirection, work, v.zero_magnitude()], row)
        v.store_magnitude(magnitude, largest)

    return emit


def columns(length, sign):
    """Emitter: columns of `length` values, `pitch` bytes from row to row, to the frequencies of each, or back.

    The first column is real, then `count` are complex, then `last` more, one or none, are real. Of a real column only
    half the frequencies are in the spectrum, since the others are conjugate to them.
    """

    def emit(v, work, pitch, spectrum, stride, count, last):
        size = 2 * v.vector_bytes

        def column(work, spectrum, bins=length):
            inside = [work + pitch * i for i in range(length)]
            outside = [spectrum + stride * i for i in range(bins)]
            following = spectrum + stride * bins
            if sign < 0:
                for i in range(length):  # a column's lines are apart: stores alone would wait for one after the other
                    at = following + stride * i
                    v.prefetch(at, write=True)
                    v.prefetch(at + v.vector_bytes, write=True)
                if bins == length:
                    result = complex_transform([load_complex(v, at) for at in inside], sign)
                else:
                    result = real_transform([Complex(v, v.load(at)) for at in inside])
                for value, at in zip(result, outside, strict=True):
                    store_complex(v, value, at)
            else:
                for at in outside:  # the next channel's comes next
                    v.prefetch(at + size, level=2)
                    v.prefetch(at + (size + v.vector_bytes), level=2)
                values = [load_complex(v, at) for at in outside]
                result = complex_transform(values, sign) if bins == length else real_inverse(values, length)
                for value, at in zip(result, inside, strict=True):
                    store_complex(v, value, at)
            return [work + size, following]

        def real_column(work, spectrum):
            return column(work, spectrum, length // 2 + 1)

        state = real_column(work, spectrum)
        state = v.repeat(count, state, column)
        v.repeat(last, state, real_column)

    return emit


def rows_inverse(length):
    """Emitter: `count` rows from [row, k, (re, im), lane] to the addresses of lanes, `pitch` bytes from row to row.

    Whole vectors are written, each before what begins in its midst if that is of a later lane or row.
    """

    def emit(v, indirection, base, pitch, work, count):
        size = 2 * v.vector_bytes

        def row(base, work):
            spectrum = [load_complex(v, work + k * size) for k in range(length // 2 + 1)]
            store_row(v, [x.re for x in real_inverse(spectrum, length)], indirection, base)
            return [base + pitch, work + len(spectrum) * size]

        v.repeat(count, [base, work], row)

    return emit


_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "rows_forward", "columns_forward", "columns_inverse", "rows_inverse",  # addresses of code
            "height",
            "pitch",  # bytes from a row of the work memory to the next
            "complex_columns", "last_columns",  # columns that are complex; 1 if one more is real
            "row_vectors",
        )
    ]
)  # fmt: skip


def _forward_factory(real):
    itemsize = np.dtype(real).itemsize

    def forward(c, indirection, base, work, spectrum, stride, rows, ahead, largest):
        simd.call(c.rows_forward, (indirection, base, work, rows, ahead, largest))
        rest = simd.pointer(real, work)
        for i in range(rows * c.pitch // itemsize, c.height * c.pitch // itemsize):
            rest[i] = real(0)
        simd.call(c.columns_forward, (work, c.pitch, spectrum, stride, c.complex_columns, c.last_columns))

    return forward


def _inverse_factory(real):
    def inverse(c, indirection, base, pitch, work, spectrum, stride, rows):
        simd.call(c.columns_inverse, (work, c.pitch, spectrum, stride, c.complex_columns, c.last_columns))
        simd.call(c.rows_inverse, (indirection, base, pitch, work, rows))

    return inverse


_point = point_callback(_CONTEXT)
_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=9))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=8))


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra: rows are whole vectors."""
    lanes = simd.lanes(real)
    real_columns = 2 - width % 2
    bins = height * (width // 2 + 1) - real_columns * ((height - 1) // 2)  # each of half the frequencies
    return Layout(lanes, round_up(width, lanes), bins)


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
        kernel_callback(rows_forward, width), kernel_callback(columns, height, -1),
        kernel_callback(columns, height, 1), kernel_callback(rows_inverse, width),
    )  # fmt: skip
    addresses = (callback.address(real) for callback in callbacks)
    numbers = height, half * COMPLEX_BYTES, half - 1 - last, last, shape.pitch // shape.lanes
    context = np.array((*addresses, *numbers), _CONTEXT)
    return TileTransform.of_all(
        Functions(_forward.address(real), _inverse.address(real), context.ctypes.data, _point.address(real)),
        shape,
        work_items=2 * height * half * shape.lanes,
        divisor=height * width,
        indirection_bytes=row_bytes(real, shape.pitch),
        kept=context,
    )


def _operations(height, width, frequencies):
    # rows are transformed before the columns are
    logarithms = np.array([math.log2(side) / _RATES[f"length_{side}"] for side in SIDES])
    of_sides = (logarithms[np.searchsorted(SIDES, sides)] for sides in (height, width))
    operations = 2.5 * height * width * sum(of_sides)
    return Operations(operations / 2, 0.0, operations / (2 * height))


TRANSFORM = Transform(
    "codelet", lambda real, tile, taps: codelet(real, *tile), layout, lambda taps, axis: SIDES, _operations,
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"], row=_RATES["row"],
    skips_rows=True,
)  # fmt: skip
