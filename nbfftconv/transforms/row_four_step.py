"""Generated transforms of one long row at a time: that of a matrix, as of `four_step`, with factors between its steps.

A row of N = n1·n2 samples is a matrix [n1, n2]. Columns are transformed, then multiplied by exp(-2πi k1 n2 / N), then
rows are (Cooley and Tukey 1965): only that makes it another transform than the matrix' own.
"""

import functools
import math

import numpy as np

from nbfftconv import rates, simd
from nbfftconv.jit import Callback
from nbfftconv.rounding import cdiv
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
from nbfftconv.transforms.four_step import (
    SIDES,
    STEPS,
    columns_forward,
    columns_inverse,
    rows_forward,
    rows_inverse,
    step_factors,
)

_WIDEST = 16  # lanes


def _matrices() -> dict[int, tuple[int, int]]:
    """Return the matrix of each length: columns are whole pairs of vectors, and half of n1 fills many of a vector."""
    found: dict[int, tuple[int, int]] = {}
    for n1 in SIDES:
        for n2 in SIDES:
            if n2 % (2 * _WIDEST) == 0:
                each = [found.get(n1 * n2, (n1, n2)), (n1, n2)]
                found[n1 * n2] = min(each, key=lambda matrix: (cdiv(matrix[0] // 2 + 1, _WIDEST) * matrix[1], matrix))
    return dict(sorted(found.items()))


#: Lengths, and the sizes of their matrices.
MATRICES = _matrices()
LENGTHS = tuple(MATRICES)

# `transform`, beside those of `Transform`: fraction of the machine's `flops` of a transform.
_RATES = rates.of("row_four_step")

_CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            "columns_forward", "rows_forward", "columns_inverse", "rows_inverse",  # addresses of code
            "columns_forward_factors", "rows_forward_factors", "columns_inverse_factors", "rows_inverse_factors",
            "turns", "width", "pitch", "vector", "buffer",
        )
    ]
)  # fmt: skip


def _forward_factory(real):
    def forward(c, tile, work, spectrum, stride, rows, columns):
        buffer = work + c.buffer
        simd.call(
            c.columns_forward, (tile, c.pitch, work, c.vector, buffer, c.columns_forward_factors, c.width, c.turns)
        )
        simd.call(c.rows_forward, (work, c.vector, spectrum, stride, buffer, c.rows_forward_factors, c.width))

    return forward


def _inverse_factory(real):
    def inverse(c, tile, work, spectrum, stride, rows, columns):
        buffer = work + c.buffer
        simd.call(c.rows_inverse, (work, c.vector, spectrum, stride, buffer, c.rows_inverse_factors, c.width))
        simd.call(
            c.columns_inverse, (tile, c.pitch, work, c.vector, buffer, c.columns_inverse_factors, c.width, c.turns)
        )

    return inverse


_forward = Callback(_forward_factory, signature(_CONTEXT, arguments=7))
_inverse = Callback(_inverse_factory, signature(_CONTEXT, arguments=7))


def stored_frequencies(length: int) -> np.ndarray:
    """Return the frequencies of a column in the order in which they are stored: of every k and N - k one."""
    n1, n2 = STEPS[length]
    order = (np.arange(n1)[:, None] + n1 * np.arange(n2)).ravel()
    return order[[0, *range(1, n2 // 2 + 1), *range(n2, n2 + (length - n2 + 1) // 2)]]


def _turns(real, n1, n2, groups):
    """exp(-2πi k1 n2 / N), as [column vector, k1, (re, im), lane]; 0 for those k1 that only fill vectors."""
    lanes, k1 = simd.lanes(real), stored_frequencies(n1)
    turns = np.zeros((n2 // lanes, groups * lanes, 2, lanes), real)
    exact = np.exp(-2j * math.pi * np.outer(k1, np.arange(n2)) / (n1 * n2)).reshape(len(k1), -1, lanes)
    turns[:, : len(k1), 0] = exact.real.transpose(1, 0, 2)
    turns[:, : len(k1), 1] = exact.imag.transpose(1, 0, 2)
    return turns


_FIRST, _SECOND = (np.array(sides) for sides in zip(*MATRICES.values(), strict=True))


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra."""
    matrix = np.searchsorted(LENGTHS, width)
    return Layout(1, width, cdiv(_FIRST[matrix] // 2 + 1, simd.lanes(real)) * _SECOND[matrix])


@functools.lru_cache(maxsize=16)
def row_four_step(real: type, length: int) -> TileTransform:
    """Return the generated transform of rows of so many scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    length : int
        Of `LENGTHS`.
    """
    n1, n2 = MATRICES[length]
    lanes = simd.lanes(real)
    groups, vectors = cdiv(n1 // 2 + 1, lanes), n2 // lanes
    vector = groups * lanes * COMPLEX_BYTES
    tables = [
        step_factors(real, n1, -1, 0.5), step_factors(real, n2, -1, 1.0),
        step_factors(real, n1, 1, 1.0), step_factors(real, n2, 1, 1.0), _turns(real, n1, n2, groups),
    ]  # fmt: skip
    steps = [
        kernel_callback(columns_forward, n1, True), kernel_callback(rows_forward, n2),
        kernel_callback(columns_inverse, n1, True), kernel_callback(rows_inverse, n2),
    ]  # fmt: skip
    numbers = n2, n2 * np.dtype(real).itemsize, vector, vectors * vector
    addresses = (*(step.address(real) for step in steps), *(table.ctypes.data for table in tables))
    context = np.array((*addresses, *numbers), _CONTEXT)
    return TileTransform.of_all(
        Functions(_forward.address(real), _inverse.address(real), context.ctypes.data),
        Layout(1, length, groups * n2),
        divisor=length,
        work_items=vectors * groups * lanes * 2 * lanes + max(n1, n2) * 2 * lanes,
        kept=(context, tables, steps),
    )


def _operations(height, width, frequencies):
    # vectors are full of columns, but not always of frequencies
    matrix = np.searchsorted(LENGTHS, width)
    operations = 2.5 * width * np.log2(_FIRST[matrix]) + 5 * frequencies * np.log2(_SECOND[matrix])
    return Operations(operations / _RATES["transform"], 0.0, 0.0)


TRANSFORM = Transform(
    "row_four_step",
    lambda real, tile, taps: row_four_step(real, tile[1]),
    layout,
    sides_of_rows(LENGTHS),
    _operations,
    product_rate=_RATES["product"], spectra_rate=_RATES["spectra"], stream_rate=_RATES["stream"], row=_RATES["row"],
)  # fmt: skip
