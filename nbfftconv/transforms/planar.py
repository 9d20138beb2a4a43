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

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES, Layout, Operations, TileTransform, Transform, signature
from nbfftconv.transforms.butterflies import Complex, complex_transform, load, store

#: Tile sides, and the lengths of their two steps.
STEPS = {
    30: (5, 6), 36: (6, 6), 40: (5, 8), 48: (6, 8), 60: (6, 10), 64: (8, 8), 72: (8, 9), 80: (8, 10), 90: (9, 10),
    96: (8, 12), 108: (9, 12), 120: (10, 12), 128: (8, 16), 144: (12, 12), 150: (10, 15), 160: (10, 16), 180: (12, 15),
    192: (12, 16), 240: (15, 16), 256: (16, 16), 300: (15, 20), 320: (16, 20), 400: (20, 20),
}  # fmt: skip
SIDES = tuple(STEPS)

# Fractions of the machine's `flops`, as measured where that is 165e9; also of columns of more rows than that: their
# samples are on too many pages.
_RATE, _TALL_RATE = 54 / 165, 45 / 165
_TALL = 200


def _at(v, address, distance):
    return v.add(address, v.integer(distance))


def _turn(v, value, factor):
    """value · the complex number at an address."""
    re, im = v.broadcast(factor), v.broadcast(_at(v, factor, v.itemsize))
    return Complex(
        v,
        v.multiply_add(value.re, re, v.negate(v.times(value.im, im))),
        v.multiply_add(value.re, im, v.times(value.im, re)),
    )


def _turn_all(v, values, factors, scale):
    """Values · the complex numbers at an address, of which the first is `scale`."""
    first = values[0] if scale == 1 else values[0].scaled(scale)
    return [first, *(_turn(v, x, _at(v, factors, 2 * k * v.itemsize)) for k, x in enumerate(values[1:], 1))]


def _forward_first(v, steps, source, stride, buffer, factors, scale):
    """First step forward, of values `stride` bytes apart, to a buffer [k1, n2]."""
    n1, n2 = steps

    def transform(source, target, factors):
        x = [load(v, v.add(source, v.scale(stride, v.integer(i * n2)))) for i in range(n1)]
        for k, value in enumerate(_turn_all(v, complex_transform(x, -1), factors, scale)):
            store(v, value, _at(v, target, k * n2 * COMPLEX_BYTES))
        return [v.add(source, stride), _at(v, target, COMPLEX_BYTES), _at(v, factors, 2 * n1 * v.itemsize)]

    v.repeat(v.integer(n2), [source, buffer, factors], transform)


def _forward_last(v, steps, buffer, target, stride):
    """Last step forward, from a buffer [k1, n2] to frequencies [k1, k2] `stride` bytes apart."""
    n1, n2 = steps

    def transform(source, target):
        x = [load(v, _at(v, source, i * COMPLEX_BYTES)) for i in range(n2)]
        for k, value in enumerate(complex_transform(x, -1)):
            store(v, value, v.add(target, v.scale(stride, v.integer(k))))
        return [_at(v, source, n2 * COMPLEX_BYTES), v.add(target, v.scale(stride, v.integer(n2)))]

    v.repeat(v.integer(n1), [buffer, target], transform)


def _inverse_first(v, steps, source, stride, buffer, factors):
    """First step of the inverse transform, of frequencies [k1, k2] `stride` bytes apart, to a buffer [k1, n2]."""
    n1, n2 = steps

    def transform(source, target, factors):
        x = [load(v, v.add(source, v.scale(stride, v.integer(k)))) for k in range(n2)]
        for i, value in enumerate(_turn_all(v, complex_transform(x, 1), factors, 1)):
            store(v, value, _at(v, target, i * COMPLEX_BYTES))
        return [
            v.add(source, v.scale(stride, v.integer(n2))),
            _at(v, target, n2 * COMPLEX_BYTES),
            _at(v, factors, 2 * n2 * v.itemsize),
        ]

    v.repeat(v.integer(n1), [source, buffer, factors], transform)


def _inverse_last(v, steps, buffer, target, stride):
    """Last step of the inverse transform, from a buffer [k1, n2] to values `stride` bytes apart."""
    n1, n2 = steps

    def transform(source, target):
        x = [load(v, _at(v, source, k * n2 * COMPLEX_BYTES)) for k in range(n1)]
        for i, value in enumerate(complex_transform(x, 1)):
            store(v, value, v.add(target, v.scale(stride, v.integer(i * n2))))
        return [_at(v, source, COMPLEX_BYTES), v.add(target, stride)]

    v.repeat(v.integer(n2), [buffer, target], transform)


def _for_each_frequency_pair(v, length, buffer, states, body):
    """Emit ``states = body(k, N - k, *states)`` for k = 0 .. N/2, in some order: their addresses in a buffer."""
    _, n2 = STEPS[length]
    states = body(buffer, buffer, *states)
    for first, last, count in ((1, n2 - 1, n2 // 2), (n2, length - 1, (length - n2 + 1) // 2)):

        def one(k, opposite, *states):
            return [_at(v, k, COMPLEX_BYTES), _at(v, opposite, -COMPLEX_BYTES), *body(k, opposite, *states)]

        start = [_at(v, buffer, first * COMPLEX_BYTES), _at(v, buffer, last * COMPLEX_BYTES), *states]
        states = v.repeat(v.integer(count), start, one)[2:]


def _pairs(v, needed):
    """Pairs of vectors that hold the columns needed."""
    return v.divide(v.add(needed, v.integer(2 * v.lanes - 1)), v.integer(2 * v.lanes))


def _vectors(v, length, needed):
    """Vectors of columns in these pairs."""
    return v.minimum(v.scale(_pairs(v, needed), v.integer(2)), v.integer(-(-length // v.lanes)))


@functools.cache
def _columns_forward(length):
    """Intrinsic: pairs of vectors of columns, samples `pitch` bytes apart, to [column vector, k, (re, im), lane]."""
    steps = STEPS[length]

    def emit(v, tile, pitch, columns, vector, buffer, factors, needed):
        def pair(tile, columns):
            _forward_first(v, steps, tile, pitch, buffer, factors, 0.5)
            _forward_last(v, steps, buffer, buffer, v.integer(COMPLEX_BYTES))

            def take_apart(k, opposite, a, b):
                z, y = load(v, k), load(v, opposite)
                store(v, Complex(v, v.plus(z.re, y.re), v.minus(z.im, y.im)), a)
                store(v, Complex(v, v.plus(z.im, y.im), v.minus(y.re, z.re)), b)
                return [_at(v, a, COMPLEX_BYTES), _at(v, b, COMPLEX_BYTES)]

            _for_each_frequency_pair(v, length, buffer, [columns, v.add(columns, vector)], take_apart)
            return [_at(v, tile, COMPLEX_BYTES), v.add(columns, v.scale(vector, v.integer(2)))]

        v.repeat(_pairs(v, needed), [tile, columns], pair)

    return simd.kernel(emit, f"columns_forward_{length}", 7)


@functools.cache
def _columns_inverse(length):
    """Intrinsic: the reverse of `_columns_forward`."""
    steps = STEPS[length]

    def emit(v, tile, pitch, columns, vector, buffer, factors, needed):
        def pair(tile, columns):
            def put_together(k, opposite, a, b):
                a_value, b_value = load(v, a), load(v, b)
                z = Complex(v, v.minus(a_value.re, b_value.im), v.plus(a_value.im, b_value.re))
                y = Complex(v, v.plus(a_value.re, b_value.im), v.minus(b_value.re, a_value.im))
                store(v, z, k)
                store(v, y, opposite)
                return [_at(v, a, COMPLEX_BYTES), _at(v, b, COMPLEX_BYTES)]

            _for_each_frequency_pair(v, length, buffer, [columns, v.add(columns, vector)], put_together)

            _inverse_first(v, steps, buffer, v.integer(COMPLEX_BYTES), buffer, factors)
            _inverse_last(v, steps, buffer, tile, pitch)
            return [_at(v, tile, COMPLEX_BYTES), v.add(columns, v.scale(vector, v.integer(2)))]

        v.repeat(_pairs(v, needed), [tile, columns], pair)

    return simd.kernel(emit, f"columns_inverse_{length}", 7)


def _transpose(v, vectors, source, source_step, target, target_step):
    """Transpose squares of complex vectors, `step` bytes from one to the next; return the addresses of what follows."""

    def square(source, target):
        for part in (0, VECTOR_BYTES):
            rows = [v.load(_at(v, source, i * COMPLEX_BYTES + part)) for i in range(v.lanes)]
            for i, value in enumerate(v.transpose(rows)):
                v.store(value, _at(v, target, i * COMPLEX_BYTES + part))
        return [v.add(source, source_step), v.add(target, target_step)]

    return v.repeat(vectors, [source, target], square)


@functools.cache
def _rows_forward(length):
    """Intrinsic: groups of rows of [column vector, k, (re, im), lane] to steps of a spectrum; all else is zero."""
    steps = STEPS[length]

    def emit(v, columns, vector, spectrum, stride, buffer, factors, needed):
        vectors = _vectors(v, length, needed)
        zero = Complex(v, v.zero(), v.zero())

        def clear(place):
            store(v, zero, place)
            return [_at(v, place, COMPLEX_BYTES)]

        def group(columns, spectrum):
            _, rest = _transpose(v, vectors, columns, vector, buffer, v.integer(v.lanes * COMPLEX_BYTES))
            v.repeat(v.subtract(v.integer(length), v.scale(vectors, v.integer(v.lanes))), [rest], clear)
            _forward_first(v, steps, buffer, v.integer(COMPLEX_BYTES), buffer, factors, 1)
            _forward_last(v, steps, buffer, spectrum, stride)
            return [_at(v, columns, v.lanes * COMPLEX_BYTES), v.add(spectrum, v.scale(stride, v.integer(length)))]

        v.repeat(v.divide(vector, v.integer(v.lanes * COMPLEX_BYTES)), [columns, spectrum], group)

    return simd.kernel(emit, f"rows_forward_{length}", 7)


@functools.cache
def _rows_inverse(length):
    """Intrinsic: the reverse of `_rows_forward`."""
    steps = STEPS[length]

    def emit(v, columns, vector, spectrum, stride, buffer, factors, needed):
        vectors = _vectors(v, length, needed)
        zero = Complex(v, v.zero(), v.zero())

        def clear(partner):
            for i in range(v.lanes):
                store(v, zero, _at(v, partner, i * COMPLEX_BYTES))
            return [v.add(partner, vector)]

        def group(columns, spectrum):
            _inverse_first(v, steps, spectrum, stride, buffer, factors)
            _inverse_last(v, steps, buffer, buffer, v.integer(COMPLEX_BYTES))
            for x in range(length, -(-length // v.lanes) * v.lanes):  # two columns are one complex transform: no
                store(v, zero, _at(v, buffer, x * COMPLEX_BYTES))  # garbage in either,
            _, partner = _transpose(v, vectors, buffer, v.integer(v.lanes * COMPLEX_BYTES), columns, vector)
            v.repeat(v.odd(vectors), [partner], clear)  # nor in the last one's partner, where earlier tiles left some
            return [_at(v, columns, v.lanes * COMPLEX_BYTES), v.add(spectrum, v.scale(stride, v.integer(length)))]

        v.repeat(v.divide(vector, v.integer(v.lanes * COMPLEX_BYTES)), [columns, spectrum], group)

    return simd.kernel(emit, f"rows_inverse_{length}", 7)


@functools.cache
def _step(make, length):
    kernel = make(length)

    def factory(real):
        def step(a, b, c, d, e, f, g):
            kernel(real, (a, b, c, d, e, f, g))

        return step

    return Callback(factory, signature(arguments=7))


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
def _factors(real, length, sign, scale):
    """exp(sign · 2πi k1 n2 / N) · scale: [n2, k1] forward, [k1, n2] inverse."""
    n1, n2 = STEPS[length]
    products = np.outer(np.arange(n2), np.arange(n1))
    factors = scale * np.exp(sign * 2j * math.pi * products / length)
    factors = factors if sign < 0 else factors.T
    return np.ascontiguousarray(np.stack([factors.real, factors.imag], axis=-1), real)


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra."""
    lanes = simd.lanes(real)
    pairs, groups = -(-width // (2 * lanes)), -(-(height // 2 + 1) // lanes)
    # Oddly many cache lines a row: at an even number, the samples of a column share few sets of a cache.
    return Layout(1, (2 * pairs + 1) * lanes, groups * width)


@functools.cache
def planar(real: type, height: int, width: int) -> TileTransform:
    """Return the generated transform of tiles of ``height * width`` scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        Of `SIDES`.
    """
    lanes, shape = simd.lanes(real), layout(real, height, width)
    pairs, groups = shape.pitch // (2 * lanes), shape.steps // width
    vector = groups * lanes * COMPLEX_BYTES
    tables = [
        _factors(real, height, -1, 0.5), _factors(real, width, -1, 1.0),
        _factors(real, height, 1, 1.0), _factors(real, width, 1, 1.0),
    ]  # fmt: skip
    steps = [
        _step(_columns_forward, height), _step(_rows_forward, width),
        _step(_columns_inverse, height), _step(_rows_inverse, width),
    ]  # fmt: skip
    context = np.array(
        (
            *(step.address(real) for step in steps),
            *(table.ctypes.data for table in tables),
            shape.pitch * np.dtype(real).itemsize, vector, 2 * pairs * vector,
        ),
        _CONTEXT,
    )  # fmt: skip
    buffer = max(height, -(-width // lanes) * lanes) * 2 * lanes
    return TileTransform(
        _forward.address(real),
        _inverse.address(real),
        context.ctypes.data,
        shape,
        work_items=2 * pairs * groups * lanes * 2 * lanes + buffer,
        kept=(context, tables, steps),
    )


def _operations(height, width, frequencies):
    # vectors are full of what is transformed twice: columns, then frequencies
    column = 2.5 * height * np.log2(height) / np.where(height > _TALL, _TALL_RATE, _RATE)
    return Operations(5 * frequencies * np.log2(width) / _RATE, column, 0.0)


TRANSFORM = Transform(
    "planar", planar, layout, SIDES, _operations,
    product_rate=125 / 165, spectra_rate=8 / 25, stream_rate=13 / 25, row=3e-9,
)  # fmt: skip
