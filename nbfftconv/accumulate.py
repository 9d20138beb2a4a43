"""Spectral channel accumulation: at every frequency, the complex matrix product that each pass comes down to.

Per frequency, C[i, j] = sum over r of A[i, r] · B[j, r], with A conjugated or not. A vector lane is a frequency: a
spectrum is a plane of real parts and a plane of imaginary parts, so matrices of any shape, down to 1×1 for depthwise
layers, fill the vectors. Registers hold a block of C while r runs, so each value of C is one chain of additions in the
order of r, whatever the blocks and the threads.
"""

from dataclasses import dataclass

import numpy as np

from nbfftconv import jit, simd, threads

# Rows and columns of the block of C in registers: 2 vectors each, and 2 for every column's B.
_ROWS, _COLUMNS = (4, 3) if simd.REGISTERS == 32 else (2, 2)
#: Rows of C in one work item, so that one group and few frequencies still feed all threads.
_ITEM_ROWS = 32
#: Vectors of frequencies in one work item: neighbouring cache lines of every plane.
_ITEM_VECTORS = 4

_FIELDS = (
    "a", "a_group", "a_row", "a_depth", "b", "b_group", "b_column", "b_depth", "c", "c_group", "c_row", "c_column",
    "groups", "rows", "columns", "depth", "vectors", "imaginary",
)  # fmt: skip
_PRODUCT = np.dtype([(name, np.int64) for name in _FIELDS])


@dataclass(frozen=True)
class Matrix:
    """A matrix of spectra for every group: the array that holds them, and distances in spectra.

    Attributes
    ----------
    spectra : numpy.ndarray
        Contiguous, a spectrum along the last axis.
    group : int
        From a group's matrix to the next one's.
    row : int
        Along the matrix's own index, i or j.
    column : int
        Along the summation index r; for C, along j.
    """

    spectra: np.ndarray
    group: int
    row: int
    column: int


def _block(conjugate: bool, add: bool, rows: int, columns: int):
    """Return the emitter of a product for a block of rows × columns entries of C, over one vector of frequencies."""

    def emit(v, a, a_row, a_depth, b, b_column, b_depth, c, c_row, c_column, imaginary, depth):
        def entry(i, j):
            return v.add(c, v.add(v.scale(c_row, v.integer(i)), v.scale(c_column, v.integer(j))))

        def both(address):
            return v.load(address), v.load(v.add(address, imaginary))

        def step(a, b, *sums):
            sums = list(sums)
            b_values = [both(v.add(b, v.scale(b_column, v.integer(j)))) for j in range(columns)]
            for i in range(rows):
                a_re, a_im = both(v.add(a, v.scale(a_row, v.integer(i))))
                minus = v.negate(a_im)
                for j, (b_re, b_im) in enumerate(b_values):
                    at = 2 * (i * columns + j)
                    re = v.multiply_add(a_re, b_re, sums[at])
                    im = v.multiply_add(a_re, b_im, sums[at + 1])
                    sums[at] = v.multiply_add(a_im if conjugate else minus, b_im, re)
                    sums[at + 1] = v.multiply_add(minus if conjugate else a_im, b_re, im)
            return [v.add(a, a_depth), v.add(b, b_depth), *sums]

        start = []
        for i in range(rows):
            for j in range(columns):
                start += both(entry(i, j)) if add else (v.zero(), v.zero())
        _, _, *sums = v.repeat(depth, [a, b, *start], step)
        for i in range(rows):
            for j in range(columns):
                at = 2 * (i * columns + j)
                v.store(sums[at], entry(i, j))
                v.store(sums[at + 1], v.add(entry(i, j), imaginary))

    return emit


def _kernel(conjugate: bool, add: bool, name: str):
    def emit(v, *arguments):
        *operands, rows, columns = arguments
        for i in range(1, _ROWS + 1):
            for j in range(1, _COLUMNS + 1):
                with v.when(rows, i), v.when(columns, j):
                    _block(conjugate, add, i, j)(v, *operands)

    return simd.kernel(emit, name, 13)


def _stage(multiply):
    def factory(real):
        vector_bytes = simd.VECTOR_BYTES

        def product(p, slot, begin, end):
            row_items = (p.rows + _ITEM_ROWS - 1) // _ITEM_ROWS
            vector_items = (p.vectors + _ITEM_VECTORS - 1) // _ITEM_VECTORS
            for item in range(begin, end):
                first_row = item % row_items * _ITEM_ROWS
                first_vector = item // row_items % vector_items * _ITEM_VECTORS
                group = item // (row_items * vector_items)
                last_row = min(first_row + _ITEM_ROWS, p.rows)
                last_vector = min(first_vector + _ITEM_VECTORS, p.vectors)
                for i in range(first_row, last_row, _ROWS):
                    rows = min(_ROWS, last_row - i)
                    for j in range(0, p.columns, _COLUMNS):
                        columns = min(_COLUMNS, p.columns - j)
                        for vector in range(first_vector, last_vector):
                            shift = vector * vector_bytes
                            a = p.a + group * p.a_group + i * p.a_row + shift
                            b = p.b + group * p.b_group + j * p.b_column + shift
                            c = p.c + group * p.c_group + i * p.c_row + j * p.c_column + shift
                            multiply(real, (
                                a, p.a_row, p.a_depth, b, p.b_column, p.b_depth, c, p.c_row, p.c_column,
                                p.imaginary, p.depth, rows, columns,
                            ))  # fmt: skip

        return product

    return jit.stage(_PRODUCT)(factory)


_product = _stage(_kernel(False, False, "product"))
_conjugate_product = _stage(_kernel(True, False, "conjugate_product"))
_add_conjugate_product = _stage(_kernel(True, True, "add_conjugate_product"))


def _run(stage: jit.Callback, a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int, int], slots: int) -> None:
    groups, rows, _, _ = shape
    real = c.spectra.dtype.type
    spectrum = c.spectra.shape[-1] * c.spectra.itemsize
    vectors = spectrum // 2 // simd.VECTOR_BYTES
    strides = {
        "a_group": a.group, "a_row": a.row, "a_depth": a.column,
        "b_group": b.group, "b_column": b.row, "b_depth": b.column,
        "c_group": c.group, "c_row": c.row, "c_column": c.column,
    }  # fmt: skip
    record = np.zeros((), _PRODUCT)
    for name, matrix in (("a", a), ("b", b), ("c", c)):
        record[name] = matrix.spectra.ctypes.data
    for name, stride in strides.items():
        record[name] = stride * spectrum
    record["groups"], record["rows"], record["columns"], record["depth"] = shape
    record["vectors"], record["imaginary"] = vectors, spectrum // 2
    items = groups * -(-rows // _ITEM_ROWS) * -(-vectors // _ITEM_VECTORS)
    threads.run(stage.address(real), record.ctypes.data, items, slots)


def product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int, int], slots: int) -> None:
    """C = A · B, for every group and frequency.

    Parameters
    ----------
    a, b, c : Matrix
        Spectra of one dtype and length; a plane of a spectrum is a whole number of cache lines.
    shape : tuple of int
        (groups, rows i, columns j, depth r).
    slots : int
        Threads to use at most.
    """
    _run(_product, a, b, c, shape, slots)


def conjugate_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int, int], slots: int) -> None:
    """C = conj(A) · B; parameters as in `product`."""
    _run(_conjugate_product, a, b, c, shape, slots)


def add_conjugate_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int, int], slots: int) -> None:
    """C += conj(A) · B; parameters as in `product`."""
    _run(_add_conjugate_product, a, b, c, shape, slots)
