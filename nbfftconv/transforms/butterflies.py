"""Transforms of a few values, each a vector: straight-line code, as Python generates it for `nbfftconv.simd.Emitter`.

A length is factored into 4, 2, 3, 5 and what is left, such as the 7 of 14, or 13, decimated in time forward and in
frequency inverse; of a real sequence only the half of the spectrum is computed that its symmetry leaves.
"""

import cmath
import math


class Complex:
    """A complex vector under construction; `im` is None for a real one."""

    def __init__(self, v, re, im=None):
        self.v, self.re, self.im = v, re, im

    def __add__(self, other):
        im = self.im if other.im is None else other.im if self.im is None else self.im + other.im
        return Complex(self.v, self.re + other.re, im)

    def __neg__(self):
        return Complex(self.v, -self.re, None if self.im is None else -self.im)

    def __sub__(self, other):
        im = self.im if other.im is None else -other.im if self.im is None else self.im - other.im
        return Complex(self.v, self.re - other.re, im)

    def __mul__(self, factor):
        """Product with a real factor."""
        return Complex(self.v, self.re * factor, None if self.im is None else self.im * factor)

    def fma(self, factor, addend):
        """self · a real factor + addend, each part with one rounding."""
        v = self.v
        re = v.fma(self.re, factor, addend.re)
        if self.im is None:
            return Complex(v, re, addend.im)
        return Complex(v, re, self.im * factor if addend.im is None else v.fma(self.im, factor, addend.im))

    def conjugate(self):
        """The complex conjugate."""
        return Complex(self.v, self.re, None if self.im is None else -self.im)

    def times_i(self):
        """self · i."""
        return Complex(self.v, 0.0 if self.im is None else -self.im, self.re)

    def times(self, re, im):
        """self · (re + im·i)."""
        v = self.v
        if self.im is None:
            return Complex(v, self.re * re, self.re * im)
        return Complex(v, v.fma(self.re, re, -(self.im * im)), v.fma(self.re, im, self.im * re))

    def times_root(self, numerator, denominator):
        """self · exp(2πi numerator / denominator)."""
        quarters, rest = divmod(4 * numerator, denominator)
        if rest:
            w = cmath.exp(2j * math.pi * numerator / denominator)
            return self.times(w.real, w.imag)
        turned = self.times_i() if quarters % 2 else self
        return -turned if quarters % 4 >= 2 else turned


def load_complex(v, address):
    """The complex vector at an address, real part first."""
    return Complex(v, v.load(address), v.load(address + v.vector_bytes))


def store_complex(v, value, address):
    """Write a complex vector to an address, real part first."""
    v.store(value.re, address)
    v.store(0.0 if value.im is None else value.im, address + v.vector_bytes)


def _radix(n):
    return next((r for r in (4, 2, 3, 5) if n % r == 0), n)


def _small(x, sign):
    """Transform of 2, 4 or an odd number of values; the kernel is exp(sign · 2πi jk / n)."""
    n = len(x)
    if n == 2:
        return [x[0] + x[1], x[0] - x[1]]
    if n == 4:
        a, b, c, d = x[0] + x[2], x[0] - x[2], x[1] + x[3], x[1] - x[3]
        t = d.times_root(sign, 4)
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
            even = s.fma(math.cos(2 * math.pi * j * k / n), even)
            factor = sign * math.sin(2 * math.pi * j * k / n)
            odd = d * factor if odd is None else d.fma(factor, odd)
        result[k], result[n - k] = even + odd, even - odd
    return result


def complex_transform(x, sign):
    """Transform of complex values; the kernel is exp(sign · 2πi jk / n)."""
    n = len(x)
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    parts = [complex_transform(x[j::r], sign) for j in range(r)]
    result = [None] * n
    for k in range(m):
        for q, value in enumerate(_small([parts[j][k].times_root(sign * j * k, n) for j in range(r)], sign)):
            result[k + q * m] = value
    return result


def real_transform(x):
    """Spectrum 0 .. n/2 of n real values."""
    n = len(x)
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    parts = [real_transform(x[j::r]) for j in range(r)]
    result = [None] * (n // 2 + 1)
    for k in range(m // 2 + 1):
        for q, value in enumerate(_small([parts[j][k].times_root(-j * k, n) for j in range(r)], -1)):
            index = k + q * m
            if index <= n // 2:
                result[index] = value
            elif result[n - index] is None:
                result[n - index] = value.conjugate()
    return _with_real_ends(result, n)


def _with_real_ends(spectrum, n):
    """A spectrum 0 .. n/2 of real values: its first value and, for even n, its last one are real."""
    return [Complex(y.v, y.re) if 2 * k % n == 0 else y for k, y in enumerate(spectrum)]


def real_inverse(x, n):
    """n real values of their spectrum 0 .. n/2, unnormalised; the imaginary parts of its ends do not count."""
    x = _with_real_ends(x, n)
    if n == 1:
        return x
    r = _radix(n)
    m = n // r
    halves = [[None] * (m // 2 + 1) for _ in range(r)]
    for k in range(m // 2 + 1):
        indices = [(k + q * m) % n for q in range(r)]
        values = [x[i] if i <= n // 2 else x[n - i].conjugate() for i in indices]
        for j, value in enumerate(_small(values, 1)):
            halves[j][k] = value.times_root(j * k, n)
    result = [None] * n
    for j in range(r):
        result[j::r] = real_inverse(halves[j], m)
    return result
