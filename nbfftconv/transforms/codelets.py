"""Generated tile transforms: a vector lane is a tile (or a filter), and a transform is straight-line code over lanes.

A tile of T_y × T_x samples is transformed row by row, real to complex, then column by column. A length is factored into
4, 2, 3 and 5, decimated in time forward and in frequency inverse; of a real sequence only the half of the spectrum is
computed that its symmetry leaves. Rows are transposed from the tiles' memory to lanes as they are read, and back as
they are written.
"""

import cmath
import functools
import math

import numpy as np
from numba import types

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.transforms import Transform

#: The tile sides that there is a transform for.
SIDES = (8, 12, 16, 20, 24, 32)


class _Complex:
    """A complex vector under construction; `im` is None for a real one."""

    def __init__(self, v, re, im=None):
        self.v, self.re, self.im = v, re, im

    def __add__(self, other):
        v = self.v
        if self.im is None or other.im is None:
            im = other.im if self.im is None else self.im
        else:
            im = v.plus(self.im, other.im)
        return _Complex(v, v.plus(self.re, other.re), im)

    def __sub__(self, other):
        v = self.v
        if other.im is None:
            return _Complex(v, v.minus(self.re, other.re), self.im)
        im = v.negate(other.im) if self.im is None else v.minus(self.im, other.im)
        return _Complex(v, v.minus(self.re, other.re), im)

    def conjugate(self):
        return _Complex(self.v, self.re, None if self.im is None else self.v.negate(self.im))

    def times_i(self):
        v = self.v
        return _Complex(v, v.constant(0.0) if self.im is None else v.negate(self.im), self.re)

    def scaled(self, factor):
        v = self.v
        c = v.constant(factor)
        return _Complex(v, v.times(self.re, c), None if self.im is None else v.times(self.im, c))

    def plus_scaled(self, factor, other):
        """self + factor * other, for a real factor."""
        v = self.v
        c = v.constant(factor)
        re = v.multiply_add(other.re, c, self.re)
        if other.im is None:
            return _Complex(v, re, self.im)
        im = v.times(other.im, c) if self.im is None else v.multiply_add(other.im, c, self.im)
        return _Complex(v, re, im)

    def turned(self, numerator, denominator):
        """self · exp(2πi numerator / denominator)."""
        v = self.v
        quarter = 4 * numerator
        if quarter % denominator == 0:
            turns = quarter // denominator % 4
            if turns == 0:
                return self
            if turns == 1:
                return self.times_i()
            if turns == 2:
                return _Complex(v, v.negate(self.re), None if self.im is None else v.negate(self.im))
            return self.times_i().turned(1, 2)
        w = cmath.exp(2j * math.pi * numerator / denominator)
        c, s = v.constant(w.real), v.constant(w.imag)
        if self.im is None:
            return _Complex(v, v.times(self.re, c), v.times(self.re, s))
        re = v.multiply_add(self.re, c, v.negate(v.times(self.im, s)))
        return _Complex(v, re, v.multiply_add(self.re, s, v.times(self.im, c)))


def _radix(n):
    return next((r for r in (4, 2, 3, 5) if n % r == 0), n)


def _small(x, sign):
    """Transform of 2, 3, 4 or 5 values; the kernel is exp(sign · 2πi jk / n)."""
    n = len(x)
    if n == 2:
        return [x[0] + x[1], x[0] - x[1]]
    if n == 4:
        a, b, c, d = x[0] + x[2], x[0] - x[2], x[1] + x[3], x[1] - x[3]
        t = d.turned(sign, 4)
        return [a + c, b + t, a - c, b - t]
    # odd: pair up j and n - j
    sums = [x[j] + x[n - j] for j in range(1, (n + 1) // 2)]
    differences = [(x[j] - x[n - j]).times_i() for j in range(1, (n + 1) // 2)]
    total = x[0]
    for s in sums:
        total = total + s
    result = [total] + [None] * (n - 1)
    for k in range(1, (n + 1) // 2):
        even, odd = x[0], None
        for j, (s, d) in enumerate(zip(sums, differences, strict=True), 1):
            even = even.plus_scaled(math.cos(2 * math.pi * j * k / n), s)
            factor = sign * math.sin(2 * math.pi * j * k / n)
            odd = d.scaled(factor) if odd is None else odd.plus_scaled(factor, d)
        result[k], result[n - k] = even + odd, even - odd
    return result


def _complex_transform(x, sign):
    n = len(x)
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    parts = [_complex_transform(x[j::r], sign) for j in range(r)]
    result = [None] * n
    for k in range(m):
        for q, value in enumerate(_small([parts[j][k].turned(sign * j * k, n) for j in range(r)], sign)):
            result[k + q * m] = value
    return result


def _real_transform(x):
    """Spectrum 0 .. n/2 of n real values."""
    n = len(x)
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    parts = [_real_transform(x[j::r]) for j in range(r)]
    result = [None] * (n // 2 + 1)
    for k in range(m // 2 + 1):
        for q, value in enumerate(_small([parts[j][k].turned(-j * k, n) for j in range(r)], -1)):
            index = k + q * m
            if index <= n // 2:
                result[index] = value
            elif result[n - index] is None:
                result[n - index] = value.conjugate()
    return [_Complex(y.v, y.re) if 2 * k % n == 0 else y for k, y in enumerate(result)]


def _real_inverse(x, n):
    """n real values of their spectrum 0 .. n/2, unnormalised."""
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    halves = [[None] * (m // 2 + 1) for _ in range(r)]
    for k in range(m // 2 + 1):
        indices = [(k + q * m) % n for q in range(r)]
        values = [x[i] if i <= n // 2 else x[n - i].conjugate() for i in indices]
        for j, value in enumerate(_small(values, 1)):
            turned = value.turned(j * k, n)
            halves[j][k] = _Complex(turned.v, turned.re) if 2 * k % m == 0 else turned
    result = [None] * n
    for j in range(r):
        result[j::r] = _real_inverse(halves[j], m)
    return result


def _load(v, address, imaginary):
    return _Complex(v, v.load(address), v.load(v.add(address, imaginary)))


def _store(v, value, address, imaginary):
    v.store(value.re, address)
    v.store(v.constant(0.0) if value.im is None else value.im, v.add(address, imaginary))


@functools.cache
def _rows_forward(length):
    """Intrinsic: `count` rows of `length` samples, from tiles `pitch` bytes apart to [row, k, (re, im), lane]."""

    def emit(v, tile, pitch, work, count):
        vector = v.integer(simd.VECTOR_BYTES)
        padded = -(-length // v.lanes) * v.lanes

        def row(tile, work):
            samples = []
            for group in range(padded // v.lanes):
                start = v.add(tile, v.integer(group * simd.VECTOR_BYTES))
                rows = [v.load(v.add(start, v.scale(pitch, v.integer(lane)))) for lane in range(v.lanes)]
                samples += v.transpose(rows)
            for k, value in enumerate(_real_transform([_Complex(v, x) for x in samples[:length]])):
                _store(v, value, v.add(work, v.integer(2 * k * simd.VECTOR_BYTES)), vector)
            step = 2 * (length // 2 + 1) * simd.VECTOR_BYTES
            return [v.add(tile, v.integer(padded * v.itemsize)), v.add(work, v.integer(step))]

        v.repeat(count, [tile, work], row)

    return simd.kernel(emit, f"rows_forward_{length}", 4)


@functools.cache
def _columns(height, half, sign):
    """Intrinsic: `half` columns of `height` values from [row, k, (re, im), lane] to frequencies [k, row], or back."""

    def emit(v, work, real_part, imaginary_part, stride):
        vector = v.integer(simd.VECTOR_BYTES)
        imaginary = v.add(imaginary_part, v.scale(real_part, v.integer(-1)))

        def column(work, spectrum):
            inside = [v.add(work, v.integer(2 * i * half * simd.VECTOR_BYTES)) for i in range(height)]
            outside = [v.add(spectrum, v.scale(stride, v.integer(i))) for i in range(height)]
            if sign < 0:
                following = v.add(spectrum, v.scale(stride, v.integer(height)))
                for i in range(height):  # a column's lines are apart: stores alone would wait for one after the other
                    at = v.add(following, v.scale(stride, v.integer(i)))
                    v.prefetch(at, write=True)
                    v.prefetch(v.add(at, imaginary), write=True)
                result = _complex_transform([_load(v, at, vector) for at in inside], sign)
                for value, at in zip(result, outside, strict=True):
                    _store(v, value, at, imaginary)
            else:
                result = _complex_transform([_load(v, at, imaginary) for at in outside], sign)
                for value, at in zip(result, inside, strict=True):
                    _store(v, value, at, vector)
            return [v.add(work, v.integer(2 * simd.VECTOR_BYTES)), v.add(spectrum, v.scale(stride, v.integer(height)))]

        v.repeat(v.integer(half), [work, real_part], column)

    return simd.kernel(emit, f"columns_{height}_{half}_{sign}", 4)


@functools.cache
def _rows_inverse(length):
    """Intrinsic: `count` rows from [row, k, (re, im), lane] to tiles `pitch` bytes apart."""

    def emit(v, tile, pitch, work, count):
        vector = v.integer(simd.VECTOR_BYTES)
        padded = -(-length // v.lanes) * v.lanes

        def row(tile, work):
            spectrum = [
                _load(v, v.add(work, v.integer(2 * k * simd.VECTOR_BYTES)), vector) for k in range(length // 2 + 1)
            ]
            spectrum = [_Complex(v, y.re) if 2 * k % length == 0 else y for k, y in enumerate(spectrum)]
            samples = [x.re for x in _real_inverse(spectrum, length)]
            samples += [v.zero()] * (padded - length)
            for group in range(padded // v.lanes):
                start = v.add(tile, v.integer(group * simd.VECTOR_BYTES))
                for lane, value in enumerate(v.transpose(samples[group * v.lanes : (group + 1) * v.lanes])):
                    v.store(value, v.add(start, v.scale(pitch, v.integer(lane))))
            step = 2 * (length // 2 + 1) * simd.VECTOR_BYTES
            return [v.add(tile, v.integer(padded * v.itemsize)), v.add(work, v.integer(step))]

        v.repeat(count, [tile, work], row)

    return simd.kernel(emit, f"rows_inverse_{length}", 4)


_SIGNATURE = types.void(*[types.intp] * 7)


@functools.cache
def _callbacks(height, width):
    half = width // 2 + 1
    rows_forward, rows_inverse = _rows_forward(width), _rows_inverse(width)
    columns_forward, columns_inverse = _columns(height, half, -1), _columns(height, half, 1)

    def forward_factory(real):
        row = 2 * half * simd.lanes(real)
        pitch_bytes = height * pitch(real, width) * np.dtype(real).itemsize

        def forward(context, tile, work, real_part, imaginary_part, stride, rows):
            rows_forward(real, (tile, pitch_bytes, work, rows))
            rest = simd.pointer(real, work)
            for i in range(rows * row, height * row):
                rest[i] = real(0)
            columns_forward(real, (work, real_part, imaginary_part, stride))

        return forward

    def inverse_factory(real):
        pitch_bytes = height * pitch(real, width) * np.dtype(real).itemsize

        def inverse(context, tile, work, real_part, imaginary_part, stride, rows):
            columns_inverse(real, (work, real_part, imaginary_part, stride))
            rows_inverse(real, (tile, pitch_bytes, work, rows))

        return inverse

    return Callback(forward_factory, _SIGNATURE), Callback(inverse_factory, _SIGNATURE)


def pitch(real: type, width: int) -> int:
    """Scalars from a row of a tile to the next: whole vectors."""
    lanes = simd.lanes(real)
    return -(-width // lanes) * lanes


@functools.cache
def codelet(real: type, height: int, width: int) -> Transform:
    """Return the generated transform of tiles of ``height * width`` scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        Of `SIDES`.
    """
    forward, inverse = _callbacks(height, width)
    half = width // 2 + 1
    return Transform(
        forward.address(real),
        inverse.address(real),
        0,
        lanes=simd.lanes(real),
        pitch=pitch(real, width),
        frequencies=height * half,
        work_items=2 * height * half * simd.lanes(real),
    )
