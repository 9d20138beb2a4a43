"""Spectral channel accumulation: at every bin, the matrix product that each pass comes down to.

Per bin, C[i, j] = sum over r of A[i, r] · B[j, r], with A conjugated or not. Entries are complex, or, as some
transforms have them, real. What a vector lane is depends on the transform that made the spectra. Where it takes one
tile at a time, a lane is a frequency: A, B and C are vectors, so matrices of any shape, down to 1×1 for depthwise
layers, fill them. Where it takes many, a lane is a tile of B and C, or a filter of A, whose entries are broadcast;
where the sum is over tiles, a panel of A is transposed, its lanes become those of C, and the entries of B are
broadcast.

Registers hold a block of C while r runs, so each value of C is one chain of additions in the order of r, whatever
the blocks and the threads.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from nbfftconv import jit, simd, threads
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.scratch import Memory
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET, WIDEST_VECTOR_BYTES, power_of_two

#: Real products of so many channels, or tiles, are summed apart.
_REAL_DEPTH = 64
#: Lines of A that come so many channels later are fetched into the first-level cache, where they would be waited for.
_LINES_AHEAD = 8


@dataclass(frozen=True)
class Blocking:
    """How products of one kind of entries are blocked; derived from the target.

    Attributes
    ----------
    vectors : int
        Vectors of an entry: real and imaginary parts, or 1 if it is real.
    rows, columns : int
        Of the block of C in registers, at most.
    depth : int
        Channels, or tiles, summed before the next block, in eights: the block's columns of B, and C, take three
        quarters of the first-level cache. The rest is for A, which streams past.
    item_rows : int
        Rows of C in one work item: their A of one depth takes at most three quarters of the second-level cache. No
        more, so that one group and few bins still feed all threads.
    panel_vectors : int
        Vectors of a transposed panel, at most, a power of two as numbers of filters are: with the tiles that it is made
        of, a quarter of the second-level cache.
    """

    vectors: int
    rows: int
    columns: int
    depth: int
    item_rows: int
    panel_vectors: int

    @classmethod
    def of(cls, vectors: int) -> "Blocking":
        """Return that of entries of so many vectors."""
        rows, columns = _register_block(TARGET.registers, vectors)
        # What stays in caches is reckoned for the widest vectors and their block of C.
        entry = vectors * WIDEST_VECTOR_BYTES
        widest_rows, widest_columns = _register_block(32, vectors)
        depth = (TARGET.l1_bytes * 3 // 4 // entry - widest_rows * widest_columns) // widest_columns // 8 * 8
        if vectors == 1:
            depth = min(depth, _REAL_DEPTH)
        item_rows = TARGET.l2_bytes * 3 // 4 // (depth * entry) // 16 * 16
        panel_vectors = power_of_two(TARGET.l2_bytes // 4 // (2 * round_up(depth, 16) * entry))
        return cls(vectors, rows, columns, depth, item_rows, panel_vectors)

    @property
    def is_summed_apart(self) -> bool:
        """Whether the sum of each depth is formed apart, and then added.

        Short chains of additions have smaller errors, which the maps of real spectra would multiply.
        """
        return self.vectors == 1

    @property
    def tall_rows(self) -> int:
        """Rows of a block of one column: enough chains of additions to hide their latency."""
        return 2 * self.rows

    @property
    def fused_rows(self) -> int:
        """Rows of C that a fused pass computes together before it transforms them back."""
        return self.rows if self.vectors == 2 else 2 * self.rows

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry."""
        return self.vectors * VECTOR_BYTES

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel, of either scalar type."""
        return self.panel_vectors * round_up(self.depth, VECTOR_BYTES // 4) * self.entry_bytes


def _register_block(registers: int, vectors: int) -> tuple[int, int]:
    """Rows and columns of the block of C in registers, for the fewest loads a product.

    An entry takes `vectors` of C, as many a column of B, and as many of A. Real blocks are of so many rows, a power of
    two, as numbers of filters are.
    """
    sides = range(1, registers // vectors)
    blocks = [(i, j) for i in sides for j in sides if vectors * (i * j + j + 1) <= registers]
    if vectors == 1:
        blocks = [(i, 3) for i, j in blocks if j == 3 and i == power_of_two(i)]
    return min(blocks, key=lambda block: 1 / block[0] + 1 / block[1])


#: Of complex entries, by which spectra of FFTs are multiplied, and of real ones.
COMPLEX, REAL = Blocking.of(2), Blocking.of(1)

# `rows` and `columns` are bytes from as many rows or columns as a vector has lanes to the next ones.
_NUMBERS = "address", "group", "row", "rows", "column", "columns", "bin"
_OPERAND = fields(*_NUMBERS)
# `few` rows of `few_b` are multiplied as well, with vectors of A, to `few_c`.
RECORD = RecordType(
    fields(
        "groups", "rows", "columns", "depth", "bins", "add", "a_lines", "panels", "few",
        a=_OPERAND, b=_OPERAND, c=_OPERAND, few_b=_OPERAND, few_c=_OPERAND,
    )
)  # fmt: skip


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
    bin : int
        From one bin of the spectra to the next.
    lane_axis : {None, "row", "column"}
        The index, if any, whose neighbours are the lanes of a vector, so that an entry is a scalar.
    vectors : int
        Along that index, from one vector to the next; `row` or `column` is the distance of lanes.
    blocking : Blocking
        `COMPLEX` or `REAL`.
    """

    real: type
    address: int
    group: int
    row: int
    column: int
    bin: int
    lane_axis: str | None = None
    vectors: int = 0
    blocking: Blocking = COMPLEX


@dataclass(frozen=True)
class _Variant:
    """A product as one kernel computes it.

    Attributes
    ----------
    name : str
    conjugate : bool
        A is conjugated.
    broadcast : bool
        An entry of A is a scalar.
    nested : bool
        Neighbours along r are lanes of A.
    blocking : Blocking
    """

    name: str
    conjugate: bool = False
    broadcast: bool = False
    nested: bool = False
    blocking: Blocking = COMPLEX


def _multiply_real(v, a, b, sums, conjugate):
    return [v.fma(a[0], b[0], sums[0])]


def _multiply_complex(v, a, b, sums, conjugate):
    (a_re, a_im), (b_re, b_im) = a, b
    to_re, to_im = (a_im, -a_im) if conjugate else (-a_im, a_im)
    re, im = v.fma(a_re, b_re, sums[0]), v.fma(a_re, b_im, sums[1])
    return [v.fma(to_re, b_im, re), v.fma(to_im, b_re, im)]


def _block(variant: _Variant, rows: int, columns: int):
    """Return the emitter of a block of rows × columns entries of C, at some bins of the spectra."""
    vectors = variant.blocking.vectors
    multiply = {1: _multiply_real, 2: _multiply_complex}[vectors]
    is_summed_apart = variant.blocking.is_summed_apart

    def emit(
        v, a, a_row, a_column, a_columns, a_bin, b, b_row, b_column, b_bin, c, c_row, c_column, c_bin,
        depth, depth_lanes, bins, go_on, ahead, c_ahead,
    ):  # fmt: skip
        def parts(load, address):
            return [load(address + part * v.vector_bytes) for part in range(vectors)]

        # From one row's scalar to the next one's. With a number that is not known here, addresses would be a chain of
        # additions, as long as the products of two columns take.
        distance = variant.blocking.entry_bytes if variant.nested else v.itemsize
        # One column of real products takes a line of A in as many cycles as the second-level cache needs for it.
        is_streamed = columns == vectors == 1 and variant.broadcast and not variant.nested

        def add_products(a, b, ahead, *sums):
            sums = list(sums)
            v.prefetch(ahead, level=2)
            if is_streamed:
                v.prefetch(a + _LINES_AHEAD * v.vector_bytes)
            b_values = [parts(v.load, b + b_row * j) for j in range(columns)]
            for i in range(rows):
                a_value = parts(v.broadcast, a + distance * i) if variant.broadcast else parts(v.load, a + a_row * i)
                for j, b_value in enumerate(b_values):
                    of_entry = slice(vectors * (i * columns + j), vectors * (i * columns + j + 1))
                    sums[of_entry] = multiply(v, a_value, b_value, sums[of_entry], variant.conjugate)
            return [a + a_column, b + b_column, ahead + vectors * v.vector_bytes, *sums]

        def add_lanes(a, b, ahead, left, *sums):
            _, b, ahead, *sums = v.repeat(v.minimum(left, depth_lanes), [a, b, ahead, *sums], add_products)
            return [a + a_columns, b, ahead, left - depth_lanes, *sums]

        mask = v.all_lanes_if(go_on)

        def so_far(entries):
            return [part for entry in entries for part in parts(lambda at: v.masked_load(at, mask), entry)]

        def block(a, b, c):
            entries = [c + c_row * i + c_column * j for i in range(rows) for j in range(columns)]
            for entry in entries if not is_summed_apart else ():  # which have few lines: 2 % faster without
                for part in range(vectors):
                    v.prefetch(entry + part * v.vector_bytes + c_ahead, write=True, level=2)
            sums = [0.0] * (vectors * rows * columns) if is_summed_apart else so_far(entries)
            if variant.nested:
                whole = (depth + (depth_lanes - 1)) // depth_lanes
                _, _, _, _, *sums = v.repeat(whole, [a, b, ahead, depth, *sums], add_lanes)
            else:
                _, _, _, *sums = v.repeat(depth, [a, b, ahead, *sums], add_products)
            if is_summed_apart:
                sums = [total + value for total, value in zip(so_far(entries), sums, strict=True)]
            for k, entry in enumerate(entries):
                for part in range(vectors):
                    v.store(sums[vectors * k + part], entry + part * v.vector_bytes)
            return [a + a_bin, b + b_bin, c + c_bin]

        v.repeat(bins, [a, b, c], block)

    return emit


def _kernel(variant: _Variant):
    blocking = variant.blocking
    sizes = itertools.product(range(1, blocking.rows + 1), range(1, blocking.columns + 1))
    blocks = [*sizes, (blocking.tall_rows, 1)]

    def emit(v, *arguments):
        *operands, rows, columns = arguments
        for i, j in blocks:
            with v.when(rows, i), v.when(columns, j):
                _block(variant, i, j)(v, *operands)

    return simd.kernel(emit, variant.name, 21)


_VARIANTS = (
    _Variant("product"),
    _Variant("conjugate_product", conjugate=True),
    _Variant("nested_scalar_product", broadcast=True, nested=True),
    _Variant("scalar_conjugate_product", conjugate=True, broadcast=True),
    _Variant("real_scalar_product", broadcast=True, blocking=REAL),
    _Variant("real_nested_scalar_product", broadcast=True, nested=True, blocking=REAL),
)
#: Intrinsics ``(a, a_row, a_column, a_rows, a_bin, b, b_row, b_column, b_bin, c, c_row, c_column, c_bin, depth,
#: depth_lanes, bins, go_on, ahead, c_ahead, rows, columns)`` of a block of up to `rows` and `columns` of the blocking,
#: or of `tall_rows` and one. With `go_on`, C is added to. A line for every r is fetched from `ahead` on, and those
#: `c_ahead` from what is written.
KERNELS = {variant.name: _kernel(variant) for variant in _VARIANTS}


@jit.njit()
def block_depth(lanes, depth, most):
    """Return how many of so many entries along r are summed before the next block: whole vectors, about `most`."""
    return round_up(cdiv(depth, cdiv(depth, most)), lanes)


def _stage(variant: _Variant):
    multiply = KERNELS[variant.name]
    most_rows, most_columns, tall_rows = variant.blocking.rows, variant.blocking.columns, variant.blocking.tall_rows
    vectors, most_depth, item_rows = variant.blocking.vectors, variant.blocking.depth, variant.blocking.item_rows
    has_few = variant.broadcast and not variant.nested and variant.blocking is REAL

    def factory(real):
        lanes = simd.lanes(real)

        def product(p, worker, begin, end):
            row_items = cdiv(p.rows, item_rows)
            depth = block_depth(lanes, p.depth, most_depth)
            # Groups are next to each other in memory, bins follow.
            a_following, b_following, c_following = p.a.bin, p.b.bin, p.c.bin
            if p.groups > 1:
                a_following, b_following, c_following = p.a.group, p.b.group, p.c.group
            for item in range(begin, end):
                first_row = item % row_items * item_rows
                last_row = min(first_row + item_rows, p.rows)
                group = item // row_items % p.groups
                spectrum_bin = item // (row_items * p.groups)
                a_start = p.a.address + group * p.a.group + spectrum_bin * p.a.bin + first_row // lanes * p.a.rows
                b_start = p.b.address + group * p.b.group + spectrum_bin * p.b.bin
                c_start = p.c.address + group * p.c.group + spectrum_bin * p.c.bin
                for r in range(0, p.depth, depth):
                    is_last = r + depth >= p.depth
                    # what comes next: the next lanes of rows of A, and the next depth, bin or group of B
                    a_rows = a_start + r // lanes * p.a.columns
                    a_next = a_start + (a_following if is_last else (r + depth) // lanes * p.a.columns)
                    b_block = b_start + r * p.b.column
                    b_next = b_start + (b_following if is_last else (r + depth) * p.b.column)
                    b_lines = 0
                    for first in range(first_row, last_row, lanes):
                        last = min(first + lanes, last_row)
                        a_ahead = a_next if last == last_row else a_rows + p.a.rows
                        a_lines = 0
                        j = 0
                        while j < p.columns:
                            # never a single column where two and two will do
                            columns = (
                                2 if p.columns - j == 4 and most_columns == 3 else min(most_columns, p.columns - j)
                            )
                            i = first
                            while i < last:
                                rows = min(most_rows, last - i)
                                if columns == 1 and last - i >= tall_rows:
                                    rows = tall_rows
                                a = a_rows + (i - first) * p.a.row
                                b = b_block + j * p.b.row
                                c = c_start + first // lanes * p.c.rows + (i - first) * p.c.row + j * p.c.column
                                ahead = b
                                if a_lines < p.a_lines:
                                    ahead = a_ahead + a_lines // vectors * p.a.row + a_lines % vectors * VECTOR_BYTES
                                    a_lines += 1
                                elif b_lines < vectors * p.columns:
                                    ahead = b_next + b_lines // vectors * p.b.row + b_lines % vectors * VECTOR_BYTES
                                    b_lines += 1
                                multiply(real, (
                                    a, p.a.row, p.a.column, p.a.columns, 0, b, p.b.row, p.b.column, 0,
                                    c, p.c.row, p.c.column, 0, min(depth, p.depth - r), lanes, 1, p.add + r, ahead,
                                    c_following if is_last else 0, rows, columns,
                                ))  # fmt: skip
                                i += rows
                            j += columns
                        if has_few and p.few > 0:
                            multiply(real, (
                                p.few_b.address + group * p.few_b.group + spectrum_bin * p.few_b.bin
                                + r * p.few_b.column,
                                p.few_b.row, p.few_b.column, 0, 0, a_rows, 0, p.a.column, 0,
                                p.few_c.address + group * p.few_c.group + spectrum_bin * p.few_c.bin
                                + first // lanes * p.few_c.column,
                                p.few_c.row, p.few_c.column, 0, min(depth, p.depth - r), lanes, 1, p.add + r,
                                a_ahead if p.columns == 0 else a_rows, 0, p.few, 1,
                            ))  # fmt: skip
                        a_rows += p.a.rows

        return product

    return jit.stage(RECORD)(factory)


def _transposition(blocking: Blocking):
    """Return ``(source, row, last_row, target)``: conjugates of as many vectors of entries as a vector has lanes, `row`
    bytes apart, transposed; what is beyond the last row repeats it."""
    vectors = blocking.vectors

    def emit(v, source, row, last_row, target):
        for part in range(vectors):
            at = source + part * v.vector_bytes
            values = v.transpose([v.load(at + row * v.minimum(i, last_row)) for i in range(v.lanes)])
            for i, value in enumerate(values):
                v.store(-value if part else value, target + (vectors * i + part) * v.vector_bytes)

    return simd.kernel(emit, f"transpose_conjugates_{vectors}")


def _panel_stage(variant: _Variant):
    multiply, transpose_conjugates = KERNELS[variant.name], _transposition(variant.blocking)
    most_rows, most_columns, tall_rows = variant.blocking.rows, variant.blocking.columns, variant.blocking.tall_rows
    vectors, most_depth, item_rows = variant.blocking.vectors, variant.blocking.depth, variant.blocking.item_rows
    panel_vectors, entry, panel_bytes = (
        variant.blocking.panel_vectors,
        variant.blocking.entry_bytes,
        variant.blocking.panel_bytes,
    )

    def factory(real):
        lanes, itemsize = simd.lanes(real), np.dtype(real).itemsize

        def panel_product(p, worker, begin, end):
            row_vectors = cdiv(p.rows, lanes)
            panels = cdiv(row_vectors, panel_vectors)
            column_items = cdiv(p.columns, item_rows)
            depth = block_depth(lanes, p.depth, most_depth)
            a_following, b_following, c_following = p.a.bin, p.b.bin, p.c.bin
            if p.groups > 1:
                a_following, b_following, c_following = p.a.group, p.b.group, p.c.group
            panel = p.panels + worker * panel_bytes
            for item in range(begin, end):
                first_column = item % column_items * item_rows
                last_column = min(first_column + item_rows, p.columns)
                first_vector = item // column_items % panels * panel_vectors
                last_vector = min(first_vector + panel_vectors, row_vectors)
                group = item // (column_items * panels) % p.groups
                spectrum_bin = item // (column_items * panels * p.groups)
                a_start = p.a.address + group * p.a.group + spectrum_bin * p.a.bin
                b_start = p.b.address + group * p.b.group + spectrum_bin * p.b.bin
                c_start = p.c.address + group * p.c.group + spectrum_bin * p.c.bin
                for r in range(0, p.depth, depth):
                    tiles = min(depth, p.depth - r)
                    for vector in range(first_vector, last_vector):
                        for tile in range(0, tiles, lanes):
                            transpose_conjugates(real, (
                                a_start + (r + tile) // lanes * p.a.columns + vector * p.a.rows, p.a.row,
                                p.rows - 1 - vector * lanes,
                                panel + ((vector - first_vector) * depth + tile) * entry,
                            ))  # fmt: skip
                    # what comes next: the next depth, bin or group of A and B, a line of every entry for each product
                    is_last = r + depth >= p.depth
                    a_next = a_start + (a_following if is_last else (r + depth) // lanes * p.a.columns)
                    b_next = b_start + (b_following if is_last else (r + depth) // lanes * p.b.columns)
                    a_next += first_vector * p.a.rows
                    b_next += first_column * p.b.row
                    a_chunks = cdiv((last_vector - first_vector) * lanes, tiles)
                    b_chunks = cdiv(last_column - first_column, tiles)
                    lane_blocks = cdiv(tiles, lanes)
                    fetched = 0
                    vector = first_vector
                    while vector < last_vector:
                        # never a single vector where two and two will do
                        left = last_vector - vector
                        count = 2 if left == 4 and most_columns == 3 else min(most_columns, left)
                        column = first_column
                        while column < last_column:
                            columns = min(most_rows, last_column - column)
                            if count == 1 and last_column - column >= tall_rows:
                                columns = tall_rows
                            a = b_start + r // lanes * p.b.columns + column * p.b.row
                            b = panel + (vector - first_vector) * depth * entry
                            ahead, index = b, fetched // vectors
                            if index < lane_blocks * a_chunks:
                                ahead = (
                                    a_next + index % lane_blocks * p.a.columns + index // lane_blocks * tiles * p.a.row
                                )
                            elif index < lane_blocks * (a_chunks + b_chunks):
                                index -= lane_blocks * a_chunks
                                ahead = (
                                    b_next + index % lane_blocks * p.b.columns + index // lane_blocks * tiles * p.b.row
                                )
                            ahead += fetched % vectors * VECTOR_BYTES
                            fetched += 1
                            multiply(real, (
                                a, p.b.row, itemsize, p.b.columns, 0,
                                b, depth * entry, entry, 0,
                                c_start + vector * p.c.rows + column * p.c.column, p.c.column, p.c.rows, 0,
                                tiles, lanes, 1, p.add + r, ahead,
                                c_following if is_last else 0, columns, count,
                            ))  # fmt: skip
                            column += columns
                        vector += count

        return panel_product

    return jit.stage(RECORD)(factory)


#: B and C of a few more rows, and how many these are, at most the rows of a block in registers.
Few = tuple[Matrix, Matrix, int]

_STAGES = {variant.name: _stage(variant) for variant in _VARIANTS}
_PANEL_STAGES = {variant.blocking: _panel_stage(variant) for variant in _VARIANTS if variant.nested}


def _operand(m: Matrix) -> tuple[int, ...]:
    lanes = simd.lanes(m.real)
    rows = m.vectors if m.lane_axis == "row" else lanes * m.row
    columns = m.vectors if m.lane_axis == "column" else lanes * m.column
    return m.address, m.group, m.row, rows, m.column, columns, m.bin


def record_of(
    a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], add: bool, panels: int = 0, few: Few | None = None
) -> Record:
    """Return the record of a product; `shape` has its first numbers."""
    # Along r, the entries of a row of A fill cache lines of each of their parts, or share them with other rows.
    vectors = a.blocking.vectors
    a_lines = {None: vectors * simd.lanes(a.real), "row": vectors, "column": 0}[a.lane_axis]
    few_b, few_c = ((0,) * len(_NUMBERS),) * 2 if few is None else map(_operand, few[:2])
    numbers = *shape, add, a_lines, panels, 0 if few is None else few[2]
    return RECORD.make((*numbers, *map(_operand, (a, b, c)), few_b, few_c))


def _task(
    name: str,
    a: Matrix,
    b: Matrix,
    c: Matrix,
    shape: tuple[int, ...],
    workers: int,
    add: bool = False,
    few: Few | None = None,
) -> threads.Task:
    groups, rows, _, _, bins = shape
    items = groups * cdiv(rows, a.blocking.item_rows) * bins
    return threads.Task(_STAGES[name].address(c.real), record_of(a, b, c, shape, add, few=few), items, workers)


def product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], workers: int) -> threads.Task:
    """Return the task C = A · B, for every group and bin of the spectra.

    Parameters
    ----------
    a, b, c : Matrix
        The entries of A may be lanes along r; real ones are.
    shape : tuple of int
        (groups, rows i, columns j, depth r, bins of the spectra).
    workers : int
        Threads to use at most.
    """
    name = "product" if a.lane_axis is None else "nested_scalar_product"
    return _task("real_" + name if a.blocking is REAL else name, a, b, c, shape, workers)


def conjugate_product(
    a: Matrix,
    b: Matrix,
    c: Matrix,
    shape: tuple[int, ...],
    workers: int,
    add: bool = False,
    few: Few | None = None,
) -> threads.Task:
    """Return the task C = conj(A) · B, or C += conj(A) · B.

    Parameters are as in `product`, but the entries of A may be lanes along i; real ones are. With these there may be
    `few` rows of B more, whose entries are broadcast, while those of A are vectors: of few tiles, where a vector of
    them would have empty lanes.
    """
    name = "conjugate_product" if a.lane_axis is None else "scalar_conjugate_product"
    return _task("real_scalar_product" if a.blocking is REAL else name, a, b, c, shape, workers, add, few)


def panel_product(
    a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], panels: Memory, workers: int, add: bool = False
) -> threads.Task:
    """Return the task C = conj(A) · B, or C += conj(A) · B, where entries of A and B are lanes along r, of C along i.

    Parameters are as in `product`; `panels` has `panel_bytes` of the blocking for each thread.
    """
    groups, rows, columns, _, bins = shape
    real, blocking = c.real, a.blocking
    vectors = cdiv(rows, simd.lanes(real))
    items = groups * cdiv(columns, blocking.item_rows) * cdiv(vectors, blocking.panel_vectors) * bins
    record = record_of(a, b, c, shape, add, panels.address)
    return threads.Task(_PANEL_STAGES[blocking].address(real), record, items, workers)
