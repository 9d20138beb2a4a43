"""Generated transforms of one tile at a time, for tiles too large for `codelets`.

A vector lane is one of neighbouring columns while columns are transformed, and one of neighbouring rows of frequencies
while rows are. Columns are real: two vectors of them are the real and the imaginary part of one complex transform,
taken apart by their symmetry afterwards. A length N = n1·n2 is transformed in two steps, n2 transforms of n1 values and
n1 of n2 (Cooley and Tukey 1965). Frequencies stay in the order [k1, k2] in which the steps leave them: products of
spectra do not care, and the inverse transform, the same steps backwards, expects it.
"""

import functools
import math

import numpy as np

from nbfftconv import rates, simd
from nbfftconv.jit import Callback
from nbfftconv.rounding import cdiv, round_up
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
from nbfftconv.transforms.butterflies import Complex, complex_transform, load_complex, store_complex

#: Tile sides, and the lengths of their two steps.
STEPS = {
    30: (5, 6), 36: (6, 6), 40: (5, 8), 48: (6, 8), 60: (6, 10), 64: (8, 8), 72: (8, 9), 80: (8, 10), 90: (9, 10),
    96: (8, 12), 108: (9, 12), 120: (10, 12), 128: (8, 16), 144: (12, 12), 150: (10, 15), 160: (10, 16), 180: (12, 15),
    192: (12, 16), 240: (15, 16), 256: (16, 16), 300: (15, 20), 320: (16, 20), 400: (20, 20),
}  # fmt: skip
SIDES = tuple(STEPS)

# `transform` and `tall`, beside those of `Transform`: fractions of the machine's `flops`, the latter of columns of more
# rows than that, whose samples are on too many pages.
_RATES = rates.of("four_step")
_TALL = 200


def _times_factors(v, values, factors, scale):
    """Values · the complex numbers at an address, of which the first is `scale`."""
    products = [values[0] if scale == 1 else values[0] * scale]
    for k, value in enumerate(values[1:], 1):
        at = factors + 2 * k * v.itemsize
        products.append(value.times(v.broadcast(at), v.broadcast(at + v.itemsize)))
    return products


def _forward_first(v, steps, source, stride, buffer, factors, scale):
    """First step forward, of values `stride` bytes apart, to a buffer [k1, n2]."""
    n1, n2 = steps
    size = 2 * v.vector_bytes

    def transform(source, target, factors):
        x = [load_complex(v, source + stride * (i * n2)) for i in range(n1)]
        for k, value in enumerate(_times_factors(v, complex_transform(x, -1), factors, scale)):
            store_complex(v, value, target + k * n2 * size)
        return [source + stride, target + size, factors + 2 * n1 * v.itemsize]

    v.repeat(n2, [source, buffer, factors], transform)


def _forward_last(v, steps, buffer, target, stride):
    """Last step forward, from a buffer [k1, n2] to frequencies [k1, k2] `stride` bytes apart."""
    n1, n2 = steps
    size = 2 * v.vector_bytes

    def transform(source, target):
        x = [load_complex(v, source + i * size) for i in range(n2)]
        for k, value in enumerate(complex_transform(x, -1)):
            store_complex(v, value, target + stride * k)
        return [source + n2 * size, target + stride * n2]

    v.repeat(n1, [buffer, target], transform)


def _inverse_first(v, steps, source, stride, buffer, factors):
    """First step of the inverse transform, of frequencies [k1, k2] `stride` bytes apart, to a buffer [k1, n2]."""
    n1, n2 = steps
    size = 2 * v.vector_bytes

    def transform(source, target, factors):
        x = [load_complex(v, source + stride * k) for k in range(n2)]
        for i, value in enumerate(_times_factors(v, complex_transform(x, 1), factors, 1)):
            store_complex(v, value, target + i * size)
        return [source + stride * n2, target + n2 * size, factors + 2 * n2 * v.itemsize]

    v.repeat(n1, [source, buffer, factors], transform)


def _inverse_last(v, steps, buffer, target, stride):
    """Last step of the inverse transform, from a buffer [k1, n2] to values `stride` bytes apart."""
    n1, n2 = steps
    size = 2 * v.vector_bytes

    def transform(source, target):
        x = [load_complex(v, source + k * n2 * size) for k in range(n1)]
        for i, value in enumerate(complex_transform(x, 1)):
            store_complex(v, value, target + stride * (i * n2))
        return [source + size, target + stride]

    v.repeat(n2, [buffer, target], transform)


def _for_each_frequency_pair(v, length, buffer, states, body):
    """Emit ``states = body(k, N - k, *states)`` for k = 0 .. N/2, in some order: their addresses in a buffer."""
    _, n2 = STEPS[length]
    size = 2 * v.vector_bytes

    def pair(k, opposite, *states):
        return [k + size, opposite - size, *body(k, opposite, *states)]

    states = body(buffer, buffer, *states)
    for first, last, count in ((1, n2 - 1, n2 // 2), (n2, length - 1, (length - n2 + 1) // 2)):
        states = v.repeat(count, [buffer + first * size, buffer + last * size, *states], pair)[2:]


def _pairs(v, needed):
    """Pairs of vectors that hold the columns needed."""
    return (needed + (2 * v.lanes - 1)) // (2 * v.lanes)


def _vectors(v, length, needed):
    """Vectors of columns in these pairs."""
    return v.minimum(_pairs(v, needed) * 2, cdiv(length, v.lanes))


def _with_turns(pairs):
    def emit(v, tile, pitch, columns, vector, buffer, factors, needed, turns):
        pairs(v, tile, pitch, columns, vector, buffer, factors, needed, turns - columns)

    return emit


def _without_turns(pairs):
    def emit(v, tile, pitch, columns, vector, buffer, factors, needed):
        pairs(v, tile, pitch, columns, vector, buffer, factors, needed)

    return emit


def columns_forward(length, is_row=False):
    """Emitter: pairs of vectors of columns, samples `pitch` bytes apart, to [column vector, k, (re, im), lane].

    If they are those of a row, each is multiplied by the one in its place in an array `turns`.
    """
    steps = STEPS[length]

    def pairs(v, tile, pitch, columns, vector, buffer, factors, needed, turns=None):
        size = 2 * v.vector_bytes

        def store(value, at):
            if turns is not None:
                turn = load_complex(v, at + turns)
                value = value.times(turn.re, turn.im)
            store_complex(v, value, at)

        def pair(tile, columns):
            _forward_first(v, steps, tile, pitch, buffer, factors, 0.5)
            _forward_last(v, steps, buffer, buffer, size)

            def take_apart(k, opposite, a, b):
                z, y = load_complex(v, k), load_complex(v, opposite)
                store(Complex(v, z.re + y.re, z.im - y.im), a)
                store(Complex(v, z.im + y.im, y.re - z.re), b)
                return [a + size, b + size]

            _for_each_frequency_pair(v, length, buffer, [columns, columns + vector], take_apart)
            return [tile + size, columns + vector * 2]

        v.repeat(_pairs(v, needed), [tile, columns], pair)

    return _with_turns(pairs) if is_row else _without_turns(pairs)


def columns_inverse(length, is_row=False):
    """Emitter: the reverse of `columns_forward`."""
    steps = STEPS[length]

    def pairs(v, tile, pitch, columns, vector, buffer, factors, needed, turns=None):
        size = 2 * v.vector_bytes

        def load(at):
            value = load_complex(v, at)
            if turns is None:
                return value
            turn = load_complex(v, at + turns).conjugate()
            return value.times(turn.re, turn.im)

        def pair(tile, columns):
            def put_together(k, opposite, at_a, at_b):
                a, b = load(at_a), load(at_b)
                z = Complex(v, a.re - b.im, a.im + b.re)
                y = Complex(v, a.re + b.im, b.re - a.im)
                store_complex(v, z, k)
                store_complex(v, y, opposite)
                return [at_a + size, at_b + size]

            _for_each_frequency_pair(v, length, buffer, [columns, columns + vector], put_together)
            _inverse_first(v, steps, buffer, size, buffer, factors)
            _inverse_last(v, steps, buffer, tile, pitch)
            return [tile + size, columns + vector * 2]

        v.repeat(_pairs(v, needed), [tile, columns], pair)

    return _with_turns(pairs) if is_row else _without_turns(pairs)


def _transpose(v, vectors, source, source_step, target, target_step):
    """Transpose squares of complex vectors, `step` bytes from one to the next; return the addresses of what follows."""

    def square(source, target):
        for part in (0, v.vector_bytes):
            rows = [v.load(source + (2 * i * v.vector_bytes + part)) for i in range(v.lanes)]
            for i, value in enumerate(v.transpose(rows)):
                v.store(value, target + (2 * i * v.vector_bytes + part))
        return [source + source_step, target + target_step]

    return v.repeat(vectors, [source, target], square)


def rows_forward(length):
    """Emitter: groups of rows of [column vector, k, (re, im), lane] to bins of a spectrum; all else is zero."""
    steps = STEPS[length]

    def emit(v, columns, vector, spectrum, stride, buffer, factors, needed):
        size = 2 * v.vector_bytes
        vectors = _vectors(v, length, needed)
        zero = Complex(v, 0.0)

        def clear(at):
            store_complex(v, zero, at)
            return [at + size]

        def group(columns, spectrum):
            _, rest = _transpose(v, vectors, columns, vector, buffer, v.lanes * size)
            v.repeat(length - vectors * v.lanes, [rest], clear)
            _forward_first(v, steps, buffer, size, buffer, factors, 1)
            _forward_last(v, steps, buffer, spectrum, stride)
            return [columns + v.lanes * size, spectrum + stride * length]

        v.repeat(vector // (v.lanes * size), [columns, spectrum], group)

    return emit


def rows_inverse(length):
    """Emitter: the reverse of `rows_forward`."""
    steps = STEPS[length]

    def emit(v, columns, vector, spectrum, stride, buffer, factors, needed):
        size = 2 * v.vector_bytes
        vectors = _vectors(v, length, needed)
        zero = Complex(v, 0.0)

        def clear(partner):
            for i in range(v.lanes):
                store_complex(v, zero, partner + i * size)
            return [partner + vector]

        def group(columns, spectrum):
            _inverse_first(v, steps, spectrum, stride, buffer, factors)
            _inverse_last(v, steps, buffer, buffer, size)
            # Two columns are one complex transform: no garbage in either, nor, where there is one, in the last one's
            # partner, where earlier tiles left some.
            for x in range(length, round_up(length, v.lanes)):
                store_complex(v, zero, buffer + x * size)
            _, partner = _transpose(v, vectors, buffer, v.lanes * size, columns, vector)
            v.repeat(vectors & 1, [partner], clear)
            return [columns + v.lanes * size, spectrum + stride * length]

        v.repeat(vector // (v.lanes * size), [columns, spectrum], group)

    return emit


_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "columns_forward", "rows_forward", "columns_inverse", "rows_inverse",  # addresses of code
            "columns_forward_factors", "rows_forward_factors", "columns_inverse_factors", "rows_inverse_factors",
            "pitch", "vector", "buffer",
        )
    ]
)  # fmt: skip


def _forward_factory(real):
    def forward(c, tile, work, spectrum, stride, rows, columns):
        buffer = work + c.buffer
        simd.call(c.columns_forward, (tile, c.pitch, work, c.vector, buffer, c.columns_forward_factors, columns))
        simd.call(c.rows_forward, (work, c.vector, spectrum, stride, buffer, c.rows_forward_factors, columns))

    return forward


def _inverse_factory(real):
    def inverse(c, tile, work, spectrum, stride, rows, columns):
        buffer = work + c.buffer
        simd.call(c.rows_inverse, (work, c.vector, spectrum, stride, buffer, c.rows_inverse_factors, columns))
        simd.call(c.columns_inverse, (tile, c.pitch, work, c.vector, buffer, c.columns_inverse_factors, columns))

    return inverse


_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=7))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=7))


@functools.cache
def step_factors(real, length, sign, scale):
    """exp(sign · 2πi k1 n2 / N) · scale: [n2, k1] forward, [k1, n2] inverse."""
    n1, n2 = STEPS[length]
    products = np.outer(np.arange(n2), np.arange(n1))
    factors = scale * np.exp(sign * 2j * math.pi * products / length)
    factors = factors if sign < 0 else factors.T
    return np.ascontiguousarray(np.stack([factors.real, factors.imag], axis=-1), real)


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra."""
    lanes = simd.lanes(real)
    pairs, groups = cdiv(width, 2 * lanes), cdiv(height // 2 + 1, lanes)
    # Oddly many cache lines a row: at an even number, the samples of a column share few sets of a cache.
    return Layout(1, (2 * pairs + 1) * lanes, groups * width)


@functools.cache
def four_step(real: type, height: int, width: int) -> TileTransform:
    """Return the generated transform of tiles of ``height * width`` scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        Of `SIDES`.
    """
    lanes, shape = simd.lanes(real), layout(real, height, width)
    pairs, groups = shape.pitch // (2 * lanes), shape.bins // width
    vector = groups * lanes * COMPLEX_BYTES
    tables = [
        step_factors(real, height, -1, 0.5), step_factors(real, width, -1, 1.0),
        step_factors(real, height, 1, 1.0), step_factors(real, width, 1, 1.0),
    ]  # fmt: skip
    steps = [
        kernel_callback(columns_forward, height), kernel_callback(rows_forward, width),
        kernel_callback(columns_inverse, height), kernel_callback(rows_inverse, width),
    ]  # fmt: skip
    context = np.array(
        (
            *(step.address(real) for step in steps),
            *(table.ctypes.data for table in tables),
            shape.pitch * np.dtype(real).itemsize, vector, 2 * pairs * vector,
        ),
        _CONTEXT,
    )  # fmt: skip
    buffer = max(height, round_up(width, lanes)) * 2 * lanes
    return TileTransform.of_all(
        Functions(_forward.address(real), _inverse.address(real), context.ctypes.data),
        shape,
        divisor=height * width,
        work_items=2 * pairs * groups * lanes * 2 * lanes + buffer,
        kept=(context, tables, steps),
    )


def _operations(height, width, frequencies):
    # vectors are full of what is transformed twice: columns, then frequencies
    column = 2.5 * height * np.log2(height) / np.where(height > _TALL, _RATES["tall"], _RATES["transform"])
    return Operations(5 * frequencies * np.log2(width) / _RATES["transform"], column, 0.0)


TRANSFORM = Transform(
    "four_step", lambda real, tile, taps: four_step(real, *tile), layout, lambda taps, axis: SIDES, _operations,
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"], row=_RATES["row"],
)  # fmt: skip
