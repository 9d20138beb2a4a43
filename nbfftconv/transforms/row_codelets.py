"""Generated transforms of rows, for kernels of one row: a vector lane is a tile, as of `codelets`, whose length is
transformed in two steps.

A row of N = n1·n2 samples is a matrix [n1, n2]. Its columns are transformed, real to complex, multiplied by the factors
between two steps (Cooley and Tukey 1965), and then the n2 values of each frequency k1 are, as columns of `codelets`.
Bins are in the order [k1, k2]; those of k1 = 0, whose values are real, are half of them.
"""

import functools
import math

import numpy as np

from nbfftconv import rates, simd
from nbfftconv.jit import Callback
from nbfftconv.transforms import (
    COMPLEX_BYTES,
    Functions,
    Layout,
    Operations,
    TileTransform,
    Transform,
    kernel_callback,
    sides_of_rows,
    signature,
)
from nbfftconv.transforms.butterflies import Complex, load_complex, real_inverse, real_transform, store_complex
from nbfftconv.transforms.codelets import columns
from nbfftconv.transforms.lanes import load_vector, point_callback, row_bytes, store_vector

#: Lengths, and those of their two steps; the second is of whole vectors.
STEPS = {
    **{16 * n: (n, 16) for n in (4, 6, 8, 9, 10, 12, 13, 14, 15, 16, 18, 20, 24, 28, 30, 32)},
    **{32 * n: (n, 32) for n in (18, 20, 24, 28, 30, 32)},
}
LENGTHS = tuple(STEPS)

# `transform`, beside those of `Transform`: fraction of the machine's `flops` of a transform.
_RATES = rates.of("row_codelet")


def first_forward(n1):
    """Emitter: rows, from where they are, to [n2, k1, (re, im), lane], times the factors [n2, k1] from k1 = 1 on.

    Rows are of `vectors` vectors, whose samples go to a buffer [sample, lane]. What is `ahead` bytes further on is
    fetched for a later call. The largest magnitudes go to the vector at `largest`.
    """
    half = n1 // 2 + 1

    def emit(v, indirection, base, buffer, work, n2, factors, ahead, largest):
        size = 2 * v.vector_bytes

        def to_lanes(offset, masks, target, magnitude):
            samples, magnitude = load_vector(v, indirection, masks, base, offset, ahead, magnitude)
            for i, value in enumerate(samples):
                v.store(value, target + i * v.vector_bytes)
            after = target + v.lanes * v.vector_bytes
            return [offset + v.vector_bytes, masks + 2 * v.lanes, after, magnitude]

        state = [0, indirection + 8 * v.lanes, buffer, v.zero_magnitude()]
        *_, magnitude = v.repeat(n2 * n1 // v.lanes, state, to_lanes)
        v.store_magnitude(magnitude, largest)

        def column(source, target, factors):
            samples = [Complex(v, v.load(source + n2 * v.vector_bytes * i)) for i in range(n1)]
            for k, value in enumerate(real_transform(samples)):
                if k > 0:
                    at = factors + 2 * (k - 1) * v.itemsize
                    value = value.times(v.broadcast(at), v.broadcast(at + v.itemsize))
                store_complex(v, value, target + k * size)
            return [source + v.vector_bytes, target + half * size, factors + 2 * (half - 1) * v.itemsize]

        v.repeat(n2, [buffer, work, factors], column)

    return emit


def last_inverse(n1):
    """Emitter: the reverse of `first_forward`, to the addresses of lanes.

    Whole vectors are written, each before what begins in its midst if that is of a later lane.
    """
    half = n1 // 2 + 1

    def emit(v, indirection, base, buffer, work, n2, factors):
        size = 2 * v.vector_bytes

        def column(source, target, factors):
            values = [load_complex(v, source + k * size) for k in range(half)]
            for k in range(1, half):
                at = factors + 2 * (k - 1) * v.itemsize
                values[k] = values[k].times(v.broadcast(at), -v.broadcast(at + v.itemsize))
            for i, value in enumerate(real_inverse(values, n1)):
                v.store(value.re, target + n2 * v.vector_bytes * i)
            return [source + half * size, target + v.vector_bytes, factors + 2 * (half - 1) * v.itemsize]

        v.repeat(n2, [work, buffer, factors], column)
        vectors = n2 * n1 // v.lanes

        def from_lanes(offset, source):
            source, offset = source - v.lanes * v.vector_bytes, offset - v.vector_bytes
            samples = [v.load(source + i * v.vector_bytes) for i in range(v.lanes)]
            store_vector(v, samples, indirection, base, offset)
            return [offset, source]

        v.repeat(vectors, [vectors * v.vector_bytes, buffer + vectors * v.lanes * v.vector_bytes], from_lanes)

    return emit


_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "first_forward", "columns_forward", "columns_inverse", "last_inverse",  # addresses of code
            "factors", "n2",
            "pitch",  # bytes from the values of a column to the next column's
            "complex_columns",
            "buffer",  # bytes of the work memory before the buffer
            "row_vectors",
        )
    ]
)  # fmt: skip


def _forward_factory(real):
    def forward(c, indirection, base, work, spectrum, stride, rows, ahead, largest):
        simd.call(c.first_forward, (indirection, base, work + c.buffer, work, c.n2, c.factors, ahead, largest))
        simd.call(c.columns_forward, (work, c.pitch, spectrum, stride, c.complex_columns, 0))

    return forward


def _inverse_factory(real):
    def inverse(c, indirection, base, pitch, work, spectrum, stride, rows):
        simd.call(c.columns_inverse, (work, c.pitch, spectrum, stride, c.complex_columns, 0))
        simd.call(c.last_inverse, (indirection, base, work + c.buffer, work, c.n2, c.factors))

    return inverse


_point = point_callback(_CONTEXT)
_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=9))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=8))


@functools.cache
def _factors(real, length):
    """exp(-2πi k1 n2 / N), [n2, k1], from k1 = 1 on."""
    n1, n2 = STEPS[length]
    factors = np.exp(-2j * math.pi * np.outer(np.arange(n2), np.arange(1, n1 // 2 + 1)) / length)
    return np.ascontiguousarray(np.stack([factors.real, factors.imag], axis=-1), real)


_FIRST, _SECOND = (np.array(steps) for steps in zip(*STEPS.values(), strict=True))


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra."""
    step = np.searchsorted(LENGTHS, width)
    n1, n2 = _FIRST[step], _SECOND[step]
    return Layout(simd.lanes(real), width, n2 // 2 + 1 + n1 // 2 * n2)


@functools.cache
def row_codelet(real: type, length: int) -> TileTransform:
    """Return the generated transform of rows of so many scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    length : int
        Of `LENGTHS`.
    """
    n1, n2 = STEPS[length]
    half, lanes = n1 // 2 + 1, simd.lanes(real)
    factors = _factors(real, length)
    callbacks = (
        kernel_callback(first_forward, n1), kernel_callback(columns, n2, -1),
        kernel_callback(columns, n2, 1), kernel_callback(last_inverse, n1),
    )  # fmt: skip
    addresses = (callback.address(real) for callback in callbacks)
    values = half * n2 * COMPLEX_BYTES
    numbers = factors.ctypes.data, n2, half * COMPLEX_BYTES, half - 1, values, length // lanes
    context = np.array((*addresses, *numbers), _CONTEXT)
    bins = int(layout(real, 1, length).bins)
    return TileTransform.of_all(
        Functions(_forward.address(real), _inverse.address(real), context.ctypes.data, _point.address(real)),
        Layout(lanes, length, bins),
        work_items=2 * half * n2 * lanes + length * lanes,
        divisor=length,
        indirection_bytes=row_bytes(real, length),
        kept=(context, factors, callbacks),
    )


TRANSFORM = Transform(
    "row_codelet",
    lambda real, tile, taps: row_codelet(real, tile[1]),
    layout,
    sides_of_rows(LENGTHS),
    lambda height, width, frequencies: Operations(2.5 * width * np.log2(width) / _RATES["transform"], 0.0, 0.0),
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"], row=_RATES["row"],
    gathered=_RATES["gathered"],
)  # fmt: skip
