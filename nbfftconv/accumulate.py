"""Spectral channel accumulation: at every frequency, the complex matrix product that each pass comes down to.

Per frequency, C[i, j] = sum over r of A[i, r] · B[j, r], with A conjugated or not. What a vector lane is depends on
the transform that made the spectra. With FFTW and the planar transforms a lane is a frequency: A, B and C are vectors,
so matrices of any shape, down to 1×1 for depthwise layers, fill them. With the codelets a lane is a tile of B and C, or
a filter of A, whose entries are broadcast; where the sum is over tiles, a panel of A is transposed, its lanes become
those of C, and the entries of B are broadcast.

Registers hold a block of C while r runs, so each value of C is one chain of additions in the order of r, whatever
the blocks and the threads.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES

# Rows and columns of the block of C in registers: 2 vectors each, and 2 for every column's B.
ROWS, COLUMNS = (4, 3) if simd.REGISTERS == 32 else (2, 2)
#: Rows of a block of one column: enough chains of additions to hide their latency.
TALL_ROWS = 2 * ROWS
#: Channels, or tiles, summed before the next block: three columns of B stay in the first-level cache.
_DEPTH = 88
#: Rows of C in one work item, so that one group and few frequencies still feed all threads.
_ITEM_ROWS = 128

#: Vectors of a transposed panel, at most: with their tiles, a part of the second-level cache.
_PANEL_VECTORS = 16

_FIELDS = ("", "_group", "_row", "_rows", "_column", "_columns", "_step")
_PRODUCT = np.dtype(
    [
        # in the order of `_record`; a matrix's `rows` and `columns` are bytes from as many rows or columns as a vector
        # has lanes to the next ones
        *((f"{matrix}{name}", np.int64) for matrix in "abc" for name in _FIELDS),
        *((name, np.int64) for name in ("groups", "rows", "columns", "depth", "steps")),
        *((name, np.int64) for name in ("add", "a_lines", "panels")),
    ]
)


@dataclass(frozen=True)
class Matrix:
    """Where the entries of a matrix of spectra are: an address, and distances in bytes.

    Attributes
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    address : int
        Of the spectra.
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

    real: type
    address: int
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
    broadcast : bool
        An entry of A is a scalar.
    nested : bool
        Neighbours along r are lanes of A.
    """

    name: str
    conjugate: bool = False
    broadcast: bool = False
    nested: bool = False


def _block(kind: _Kind, rows: int, columns: int):
    """Return the emitter of a block of rows × columns entries of C, at some steps of the spectra."""

    def emit(
        v, a, a_row, a_depth, a_depths, a_step, b, b_column, b_depth, b_step, c, c_row, c_column, c_step,
        depth, depth_lanes, steps, go_on, ahead, c_ahead,
    ):  # fmt: skip
        def both(load, address):
            return load(address), load(v.add(address, v.integer(VECTOR_BYTES)))

        def at(start, stride, index):
            return v.add(start, v.scale(stride, v.integer(index)))

        load_a = v.broadcast if kind.broadcast else v.load

        def add_products(a, b, ahead, *sums):
            sums = list(sums)
            v.prefetch(ahead, level=2)
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
            return [v.add(a, a_depth), v.add(b, b_depth), v.add(ahead, v.integer(COMPLEX_BYTES)), *sums]

        def depth_block(a, b, ahead, left, *sums):
            _, b, ahead, *sums = v.repeat(v.minimum(left, depth_lanes), [a, b, ahead, *sums], add_products)
            return [v.add(a, a_depths), b, ahead, v.subtract(left, depth_lanes), *sums]

        mask = v.all_or_none(go_on)

        def block(a, b, c):
            entries = [at(at(c, c_row, i), c_column, j) for i in range(rows) for j in range(columns)]
            sums = []
            for entry in entries:
                v.prefetch(v.add(entry, c_ahead), write=True, level=2)
                v.prefetch(v.add(v.add(entry, v.integer(VECTOR_BYTES)), c_ahead), write=True, level=2)
                sums += both(lambda at: v.load_some(at, mask), entry)
            if kind.nested:
                blocks = v.divide(v.add(depth, v.subtract(depth_lanes, v.integer(1))), depth_lanes)
                _, _, _, _, *sums = v.repeat(blocks, [a, b, ahead, depth, *sums], depth_block)
            else:
                _, _, _, *sums = v.repeat(depth, [a, b, ahead, *sums], add_products)
            for k, entry in enumerate(entries):
                v.store(sums[2 * k], entry)
                v.store(sums[2 * k + 1], v.add(entry, v.integer(VECTOR_BYTES)))
            return [v.add(a, a_step), v.add(b, b_step), v.add(c, c_step)]

        v.repeat(steps, [a, b, c], block)

    return emit


def _kernel(kind: _Kind):
    def emit(v, *arguments):
        *operands, rows, columns = arguments
        for i, j in [*itertools.product(range(1, ROWS + 1), range(1, COLUMNS + 1)), (TALL_ROWS, 1)]:
            with v.when(rows, i), v.when(columns, j):
                _block(kind, i, j)(v, *operands)

    return simd.kernel(emit, kind.name, 21)


_KINDS = (
    _Kind("product"),
    _Kind("conjugate_product", conjugate=True),
    _Kind("nested_scalar_product", broadcast=True, nested=True),
    _Kind("scalar_conjugate_product", conjugate=True, broadcast=True),
)
#: Intrinsics ``(a, a_row, a_column, a_rows, a_step, b, b_row, b_column, b_step, c, c_row, c_column, c_step, depth,
#: depth_lanes, steps, go_on, ahead, c_ahead, rows, columns)`` of a block of up to `ROWS` rows and `COLUMNS` columns, or
#: of `TALL_ROWS` and one. With `go_on`, C is added to. A line for every r is fetched from `ahead` on, and those
#: `c_ahead` from what is written.
KERNELS = {kind.name: _kernel(kind) for kind in _KINDS}


def _stage(kind: _Kind):
    multiply = KERNELS[kind.name]

    def factory(real):
        lanes = simd.lanes(real)

        def product(p, slot, begin, end):
            row_items = (p.rows + _ITEM_ROWS - 1) // _ITEM_ROWS
            depth_blocks = (p.depth + _DEPTH - 1) // _DEPTH
            depth = ((p.depth + depth_blocks - 1) // depth_blocks + lanes - 1) // lanes * lanes
            # Groups are next to each other in memory, steps follow.
            a_following, b_following, c_following = p.a_step, p.b_step, p.c_step
            if p.groups > 1:
                a_following, b_following, c_following = p.a_group, p.b_group, p.c_group
            for item in range(begin, end):
                first_row = item % row_items * _ITEM_ROWS
                last_row = min(first_row + _ITEM_ROWS, p.rows)
                group = item // row_items % p.groups
                step = item // (row_items * p.groups)
                a_start = p.a + group * p.a_group + step * p.a_step + first_row // lanes * p.a_rows
                b_start = p.b + group * p.b_group + step * p.b_step
                c_start = p.c + group * p.c_group + step * p.c_step
                for r in range(0, p.depth, depth):
                    is_last = r + depth >= p.depth
                    # what comes next: the next lanes of rows of A, and the next depth, step or group of B
                    a_rows = a_start + r // lanes * p.a_columns
                    a_next = a_start + (a_following if is_last else (r + depth) // lanes * p.a_columns)
                    b_block = b_start + r * p.b_column
                    b_next = b_start + (b_following if is_last else (r + depth) * p.b_column)
                    b_lines = 0
                    for first in range(first_row, last_row, lanes):
                        last = min(first + lanes, last_row)
                        a_ahead = a_next if last == last_row else a_rows + p.a_rows
                        a_lines = 0
                        j = 0
                        while j < p.columns:
                            # never a single column where two and two will do
                            columns = 2 if p.columns - j == 4 and COLUMNS == 3 else min(COLUMNS, p.columns - j)
                            i = first
                            while i < last:
                                rows = min(ROWS, last - i)
                                if columns == 1 and last - i >= TALL_ROWS:
                                    rows = TALL_ROWS
                                a = a_rows + (i - first) * p.a_row
                                b = b_block + j * p.b_row
                                c = c_start + first // lanes * p.c_rows + (i - first) * p.c_row + j * p.c_column
                                ahead = b
                                if a_lines < p.a_lines:
                                    ahead = a_ahead + a_lines // 2 * p.a_row + a_lines % 2 * VECTOR_BYTES
                                    a_lines += 1
                                elif b_lines < 2 * p.columns:
                                    ahead = b_next + b_lines // 2 * p.b_row + b_lines % 2 * VECTOR_BYTES
                                    b_lines += 1
                                multiply(real, (
                                    a, p.a_row, p.a_column, p.a_columns, 0, b, p.b_row, p.b_column, 0,
                                    c, p.c_row, p.c_column, 0, min(depth, p.depth - r), lanes, 1, p.add + r, ahead,
                                    c_following if is_last else 0, rows, columns,
                                ))  # fmt: skip
                                i += rows
                            j += columns
                        a_rows += p.a_rows

        return product

    return jit.stage(_PRODUCT)(factory)


def _transpose(v, source, row, last_row, target):
    for part, sign in ((0, lambda x: x), (VECTOR_BYTES, v.negate)):
        rows = [v.add(source, v.scale(row, v.minimum(v.integer(i), last_row))) for i in range(v.lanes)]
        values = v.transpose([v.load(v.add(at, v.integer(part))) for at in rows])
        for i, value in enumerate(values):
            v.store(sign(value), v.add(target, v.integer(i * COMPLEX_BYTES + part)))


# (source, row, last_row, target): conjugates of as many complex vectors as a vector has lanes, `row` bytes apart,
# transposed; what is beyond the last row repeats it.
_transpose_conjugates = simd.kernel(_transpose, "transpose_conjugates", 4)


def _panel_stage():
    multiply = KERNELS["nested_scalar_product"]

    def factory(real):
        lanes, itemsize = simd.lanes(real), np.dtype(real).itemsize

        def panel_product(p, slot, begin, end):
            vectors = (p.rows + lanes - 1) // lanes
            panels = (vectors + _PANEL_VECTORS - 1) // _PANEL_VECTORS
            column_items = (p.columns + _ITEM_ROWS - 1) // _ITEM_ROWS
            depth = panel_depth(lanes, p.depth)
            a_following, b_following, c_following = p.a_step, p.b_step, p.c_step
            if p.groups > 1:
                a_following, b_following, c_following = p.a_group, p.b_group, p.c_group
            panel = p.panels + slot * _PANEL_VECTORS * panel_depth(lanes, _DEPTH) * COMPLEX_BYTES
            for item in range(begin, end):
                first_column = item % column_items * _ITEM_ROWS
                last_column = min(first_column + _ITEM_ROWS, p.columns)
                first_vector = item // column_items % panels * _PANEL_VECTORS
                last_vector = min(first_vector + _PANEL_VECTORS, vectors)
                group = item // (column_items * panels) % p.groups
                step = item // (column_items * panels * p.groups)
                a_start = p.a + group * p.a_group + step * p.a_step
                b_start = p.b + group * p.b_group + step * p.b_step
                c_start = p.c + group * p.c_group + step * p.c_step
                for r in range(0, p.depth, depth):
                    tiles = min(depth, p.depth - r)
                    for vector in range(first_vector, last_vector):
                        for tile in range(0, tiles, lanes):
                            _transpose_conjugates(real, (
                                a_start + (r + tile) // lanes * p.a_columns + vector * p.a_rows, p.a_row,
                                p.rows - 1 - vector * lanes,
                                panel + ((vector - first_vector) * depth + tile) * COMPLEX_BYTES,
                            ))  # fmt: skip
                    # what comes next: the next depth, step or group of A and B, a line of every entry for each product
                    is_last = r + depth >= p.depth
                    a_next = a_start + (a_following if is_last else (r + depth) // lanes * p.a_columns)
                    b_next = b_start + (b_following if is_last else (r + depth) // lanes * p.b_columns)
                    a_next += first_vector * p.a_rows
                    b_next += first_column * p.b_row
                    a_chunks = ((last_vector - first_vector) * lanes + tiles - 1) // tiles
                    b_chunks = (last_column - first_column + tiles - 1) // tiles
                    units = (tiles + lanes - 1) // lanes
                    fetched = 0
                    vector = first_vector
                    while vector < last_vector:
                        # never a single vector where two and two will do
                        left = last_vector - vector
                        count = 2 if left == 4 and COLUMNS == 3 else min(COLUMNS, left)
                        column = first_column
                        while column < last_column:
                            columns = min(ROWS, last_column - column)
                            if count == 1 and last_column - column >= TALL_ROWS:
                                columns = TALL_ROWS
                            a = b_start + r // lanes * p.b_columns + column * p.b_row
                            b = panel + (vector - first_vector) * depth * COMPLEX_BYTES
                            ahead, index = b, fetched // 2
                            if index < units * a_chunks:
                                ahead = a_next + index % units * p.a_columns + index // units * tiles * p.a_row
                            elif index < units * (a_chunks + b_chunks):
                                index -= units * a_chunks
                                ahead = b_next + index % units * p.b_columns + index // units * tiles * p.b_row
                            ahead += fetched % 2 * VECTOR_BYTES
                            fetched += 1
                            multiply(real, (
                                a, p.b_row, itemsize, p.b_columns, 0,
                                b, depth * COMPLEX_BYTES, COMPLEX_BYTES, 0,
                                c_start + vector * p.c_rows + column * p.c_column, p.c_column, p.c_rows, 0,
                                tiles, lanes, 1, p.add + r, ahead,
                                c_following if is_last else 0, columns, count,
                            ))  # fmt: skip
                            column += columns
                        vector += count

        return panel_product

    return jit.stage(_PRODUCT)(factory)


@jit.njit()
def panel_depth(lanes, depth):
    """Return how many of so many tiles a panel has at once."""
    blocks = (depth + _DEPTH - 1) // _DEPTH
    return ((depth + blocks - 1) // blocks + lanes - 1) // lanes * lanes


_STAGES = {kind.name: _stage(kind) for kind in _KINDS}
_panel_product = _panel_stage()


def panel_bytes(real: type) -> int:
    """Bytes of a thread's panel."""
    lanes = simd.lanes(real)
    return _PANEL_VECTORS * -(-_DEPTH // lanes) * lanes * COMPLEX_BYTES


def _record(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], add: bool, panels: int = 0) -> np.ndarray:
    lanes = simd.lanes(c.real)
    numbers: list[int] = []
    for m in (a, b, c):
        row_vectors = m.vectors if m.lane_axis == "row" else lanes * m.row
        column_vectors = m.vectors if m.lane_axis == "column" else lanes * m.column
        numbers += m.address, m.group, m.row, row_vectors, m.column, column_vectors, m.step
    # Along r, the entries of a row of A fill cache lines of real and of imaginary parts, or share them with other rows.
    a_lines = {None: 2 * lanes, "row": 2, "column": 0}[a.lane_axis]
    return np.array([*numbers, *shape, add, a_lines, panels], np.int64)


def _task(
    name: str, a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int, add: bool = False
) -> threads.Task:
    groups, rows, _, _, steps = shape
    items = groups * -(-rows // _ITEM_ROWS) * steps
    return threads.Task(_STAGES[name].address(c.real), _record(a, b, c, shape, add), items, slots)


def product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int) -> threads.Task:
    """Return the task C = A · B, for every group and step of the spectra.

    Parameters
    ----------
    a, b, c : Matrix
        The entries of A may be lanes along r.
    shape : tuple of int
        (groups, rows i, columns j, depth r, steps of the spectra).
    slots : int
        Threads to use at most.
    """
    return _task("product" if a.lane_axis is None else "nested_scalar_product", a, b, c, shape, slots)


def conjugate_product(
    a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], slots: int, add: bool = False
) -> threads.Task:
    """Return the task C = conj(A) · B, or C += conj(A) · B.

    Parameters are as in `product`, but the entries of A may be lanes along i.
    """
    name = "conjugate_product" if a.lane_axis is None else "scalar_conjugate_product"
    return _task(name, a, b, c, shape, slots, add)


def panel_product(
    a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], panels: Memory, slots: int, add: bool = False
) -> threads.Task:
    """Return the task C = conj(A) · B, or C += conj(A) · B, where entries of A and B are lanes along r, of C along i.

    Parameters are as in `product`; `panels` has `panel_bytes` for each thread.
    """
    groups, rows, columns, _, steps = shape
    real = c.real
    vectors = -(-rows // simd.lanes(real))
    items = groups * -(-columns // _ITEM_ROWS) * -(-vectors // _PANEL_VECTORS) * steps
    record = _record(a, b, c, shape, add, panels.address)
    return threads.Task(_panel_product.address(real), record, items, slots)
