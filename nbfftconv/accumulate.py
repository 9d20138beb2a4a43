"""Spectral channel accumulation: at every frequency, the complex matrix product that each pass comes down to.

Per frequency, C[i, j] = sum over r of A[i, r] · B[j, r], with A conjugated or not. What a vector lane is depends on
the transform that made the spectra. With FFTW a lane is a frequency: A, B and C are vectors, so matrices of any shape,
down to 1×1 for depthwise layers, fill them. With the codelets a lane is a tile of B and C, or a filter of A: entries of
A are broadcast, or, where the sum is over tiles, the lanes are summed up at the end.

Registers hold a block of C while r runs, so each value of C is one chain of additions in the order of r, whatever
the blocks and the threads.
"""

from dataclasses import dataclass

import numpy as np

from nbfftconv import jit, simd, threads

# Rows and columns of the block of C in registers: 2 vectors each, and 2 for every column's B.
ROWS, COLUMNS = (4, 3) if simd.REGISTERS == 32 else (2, 2)
#: Rows of C in one work item, so that one group and few frequencies still feed all threads.
_ITEM_ROWS = 32

_MATRICES = [f"{matrix}{name}" for matrix in "abc" for name in ("", "_group", "_row", "_rows", "_column", "_step")]
_PRODUCT = np.dtype(
    [
        *((name, np.int64) for name in _MATRICES),
        *((name, np.int64) for name in ("groups", "rows", "columns", "depth", "steps")),
        # neighbours of which index are `row` apart in A and C, and `column` in A; beyond them, `rows` apart
        *((name, np.int64) for name in ("row_lanes", "depth_lanes")),
    ]
)


@dataclass(frozen=True)
class Matrix:
    """Where the entries of a matrix of spectra are: the array that holds them, and distances in bytes.

    Attributes
    ----------
    spectra : numpy.ndarray
    group : int
        From a group's matrix to the next one's.
    row, column : int
        Along i (of A and C) or j (of B), and along r (of A and B) or j (of C).
    step : int
        From one step of the spectra to the next.
    lane_axis : {None, "row", "column"}
        The index, if any, whose neighbours are the lanes of a vector, so that an entry is a scalar.
    vectors : int
        Along that index, from one vector to the next; `row` or `column` is the distance of lanes.
    """

    spectra: np.ndarray
    group: int
    row: int
    column: int
    step: int
    lane_axis: str | None = None
    vectors: int = 0


@dataclass(frozen=True)
class _Kind:
    """A kind of product.

    Attributes
    ----------
    conjugate : bool
        A is conjugated.
    add : bool
        C is added to.
    broadcast : bool
        An entry of A is a scalar.
    nested : bool
        Neighbours along r are lanes of A.
    reduce : bool
        An entry of C is a scalar, the sum over the lanes.
    """

    name: str
    conjugate: bool = False
    add: bool = False
    broadcast: bool = False
    nested: bool = False
    reduce: bool = False


def _block(kind: _Kind, rows: int, columns: int):
    """Return the emitter of a block of rows × columns entries of C, at some steps of the spectra."""

    def emit(
        v, a, a_row, a_depth, a_depths, a_step, b, b_column, b_depth, b_step, c, c_row, c_column, c_step,
        depth, depth_lanes, steps,
    ):  # fmt: skip
        def both(load, address):
            return load(address), load(v.add(address, v.integer(simd.VECTOR_BYTES)))

        def at(start, stride, index):
            return v.add(start, v.scale(stride, v.integer(index)))

        load_a = v.broadcast if kind.broadcast else v.load

        def add_products(a, b, *sums):
            sums = list(sums)
            b_values = [both(v.load, at(b, b_column, j)) for j in range(columns)]
            for i in range(rows):
                a_re, a_im = both(load_a, at(a, a_row, i))
                minus = v.negate(a_im)
                for j, (b_re, b_im) in enumerate(b_values):
                    k = 2 * (i * columns + j)
                    re = v.multiply_add(a_re, b_re, sums[k])
                    im = v.multiply_add(a_re, b_im, sums[k + 1])
                    sums[k] = v.multiply_add(a_im if kind.conjugate else minus, b_im, re)
                    sums[k + 1] = v.multiply_add(minus if kind.conjugate else a_im, b_re, im)
            return [v.add(a, a_depth), v.add(b, b_depth), *sums]

        def depth_block(a, b, left, *sums):
            _, b, *sums = v.repeat(v.minimum(left, depth_lanes), [a, b, *sums], add_products)
            return [v.add(a, a_depths), b, v.subtract(left, depth_lanes), *sums]

        def block(a, b, c):
            entries = [at(at(c, c_row, i), c_column, j) for i in range(rows) for j in range(columns)]
            sums = []
            for entry in entries:
                sums += both(v.load, entry) if kind.add and not kind.reduce else (v.zero(), v.zero())
            if kind.nested:
                blocks = v.divide(v.add(depth, v.subtract(depth_lanes, v.integer(1))), depth_lanes)
                _, _, _, *sums = v.repeat(blocks, [a, b, depth, *sums], depth_block)
            else:
                _, _, *sums = v.repeat(depth, [a, b, *sums], add_products)
            store = v.add_lanes if kind.reduce else v.store
            for k, entry in enumerate(entries):
                store(sums[2 * k], entry)
                store(sums[2 * k + 1], v.add(entry, v.integer(simd.VECTOR_BYTES)))
            return [v.add(a, a_step), v.add(b, b_step), v.add(c, c_step)]

        v.repeat(steps, [a, b, c], block)

    return emit


def _kernel(kind: _Kind):
    def emit(v, *arguments):
        *operands, rows, columns = arguments
        for i in range(1, ROWS + 1):
            for j in range(1, COLUMNS + 1):
                with v.when(rows, i), v.when(columns, j):
                    _block(kind, i, j)(v, *operands)

    return simd.kernel(emit, kind.name, 18)


_KINDS = (
    _Kind("product"),
    _Kind("conjugate_product", conjugate=True),
    _Kind("add_conjugate_product", conjugate=True, add=True),
    _Kind("nested_scalar_product", broadcast=True, nested=True),
    _Kind("scalar_conjugate_product", conjugate=True, broadcast=True),
    _Kind("add_reduced_conjugate_product", conjugate=True, add=True, reduce=True),
)
#: Intrinsics ``(a, a_row, a_column, a_rows, a_step, b, b_row, b_column, b_step, c, c_row, c_column, c_step, depth,
#: depth_lanes, steps, rows, columns)`` of a block of up to `ROWS` rows and `COLUMNS` columns.
KERNELS = {kind.name: _kernel(kind) for kind in _KINDS}


def _stage(name: str):
    multiply = KERNELS[name]

    def factory(real):
        def product(p, slot, begin, end):
            row_items = (p.rows + _ITEM_ROWS - 1) // _ITEM_ROWS
            for item in range(begin, end):
                first_row = item % row_items * _ITEM_ROWS
                step = item // row_items % p.steps
                group = item // (row_items * p.steps)
                last_row = min(first_row + _ITEM_ROWS, p.rows)
                for j in range(0, p.columns, COLUMNS):
                    columns = min(COLUMNS, p.columns - j)
                    for i in range(first_row, last_row, min(ROWS, p.row_lanes)):
                        rows = min(ROWS, p.row_lanes, last_row - i)
                        a_row = i // p.row_lanes * p.a_rows + i % p.row_lanes * p.a_row
                        c_row = i // p.row_lanes * p.c_rows + i % p.row_lanes * p.c_row
                        a = p.a + group * p.a_group + a_row + step * p.a_step
                        b = p.b + group * p.b_group + j * p.b_row + step * p.b_step
                        c = p.c + group * p.c_group + c_row + j * p.c_column + step * p.c_step
                        multiply(real, (
                            a, p.a_row, p.a_column, p.a_rows, 0, b, p.b_row, p.b_column, 0, c, p.c_row, p.c_column, 0,
                            p.depth, p.depth_lanes, 1, rows, columns,
                        ))  # fmt: skip

        return product

    return jit.stage(_PRODUCT)(factory)


_STAGES = {name: _stage(name) for name in KERNELS}


def _run(name: str, a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int) -> None:
    groups, rows, _, depth, steps = shape
    real = c.spectra.dtype.type
    lanes = simd.lanes(real)
    record = np.zeros((), _PRODUCT)
    for letter, matrix in (("a", a), ("b", b), ("c", c)):
        record[letter] = matrix.spectra.ctypes.data
        for field in ("group", "row", "column", "step"):
            record[f"{letter}_{field}"] = getattr(matrix, field)
        record[f"{letter}_rows"] = lanes * matrix.row if matrix.lane_axis is None else matrix.vectors
    record["groups"], record["rows"], record["columns"], record["depth"], record["steps"] = shape
    record["row_lanes"] = lanes if "row" in (a.lane_axis, c.lane_axis) else 2**40
    record["depth_lanes"] = lanes
    items = groups * -(-rows // _ITEM_ROWS) * steps
    threads.run(_STAGES[name].address(real), record.ctypes.data, items, slots)


def product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int) -> None:
    """C = A · B, for every group and step.

    Parameters
    ----------
    a, b, c : Matrix
        The entries of A may be lanes along r.
    shape : tuple of int
        (groups, rows i, columns j, depth r, steps of the spectra).
    slots : int
        Threads to use at most.
    """
    _run("product" if a.lane_axis is None else "nested_scalar_product", a, b, c, shape, slots)


def conjugate_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int) -> None:
    """C = conj(A) · B; parameters as in `product`, but the entries of A may be lanes along i."""
    name = "conjugate_product" if a.lane_axis is None else "scalar_conjugate_product"
    _run(name, a, b, c, shape, slots)


def add_conjugate_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int) -> None:
    """C += conj(A) · B; parameters as in `product`, but entries of C may be lanes along i, sums over lanes."""
    name = "add_conjugate_product" if c.lane_axis is None else "add_reduced_conjugate_product"
    _run(name, a, b, c, shape, slots)
