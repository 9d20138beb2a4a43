"""Products of spectra on the matrix unit: what the stages of `accumulate` are for vectors.

An item packs the rows that it has of one operand, a block of the sum at a time, and takes the columns of the other one
two registers at a time: they are packed once for all rows of the item, by vectors, while the unit multiplies others.
"""

from typing import Any

import numpy as np

from nbfftconv import jit, matrix_unit, threads
from nbfftconv.accumulate import RECORD, Matrix, record_of
from nbfftconv.jit import njit
from nbfftconv.matrix_unit import DEPTH, LINES_AHEAD, PACKED_BYTES, PAIRS, SIDE
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.scratch import Memory

#: Entries of a sum that are packed at once, and rows: they take most of the second-level cache.
MOST_DEPTH, ITEM_ROWS = 256, 512
#: Clock cycles of a multiply-add of vectors, and of packing an entry that is transposed.
_VECTOR_CYCLES, _TRANSPOSED_CYCLES = 0.51, 11 / SIDE
#: Less is gained where neighbours of the core have the unit slow down.
_WORTHWHILE = 0.67
_ENTRY = 4  # bytes
# A worker's memory: the unit's configuration, room for a block of C, columns and rows.
_BLOCK, _COLUMNS = 64, 64 + 2 * SIDE * 64
_ROWS = _COLUMNS + 4 * MOST_DEPTH // DEPTH * PACKED_BYTES
#: Calls of the kernel that packs while it multiplies, for a lane block of columns.
_CALLS = DEPTH // 2 // PAIRS
WORKER_BYTES = _ROWS + ITEM_ROWS // SIDE * (MOST_DEPTH // DEPTH) * PACKED_BYTES


def packer(is_nested: bool, is_transposed: bool):
    """Return the function that packs 16 rows, or columns, of an operand.

    Along the sum, an entry is `entry` bytes after the one before; if that is nested, lanes are entries, and `entry` is
    from a vector to the next one.
    """
    pack = matrix_unit.pack_rows if is_nested else matrix_unit.pack_pairs
    pack_part = matrix_unit.pack_part_of_rows if is_nested else matrix_unit.pack_part_of_pairs
    transpose = matrix_unit.transpose_packed

    @njit()
    def pack_block(real, source, row, entry, rows, depth, target):
        for r in range(0, depth, DEPTH):
            left = min(DEPTH, depth - r)
            if is_nested:
                a, b, step = source + r // SIDE * entry, source + (r // SIDE + 1) * entry, row
                a_rows, b_rows, a_lanes, b_lanes = rows, rows, min(SIDE, left), max(0, left - SIDE)
                is_whole = left == DEPTH and rows == SIDE
            else:
                a, b, step = source + r * entry, source + (r + 1) * entry, 2 * entry
                a_rows, b_rows, a_lanes, b_lanes = (left + 1) // 2, left // 2, SIDE, SIDE
                is_whole = left == DEPTH
            if is_whole:
                pack(real, (a, b, step, a_rows, b_rows, a_lanes, b_lanes, target))
            else:
                pack_part(real, (a, b, step, a_rows, b_rows, a_lanes, b_lanes, target))
            if is_transposed:
                transpose(real, (target,))
            target += PACKED_BYTES

    return pack_block


@njit()
def _multiply_columns(
    real, block, of_rows, of_columns, packed, steps, b, b_rows, depth, c, c_row, c_rows, c_column, rows, j, count,
    columns, add, calls, of_next,
):  # fmt: skip
    """Multiply all packed rows by one or two packed lane blocks of columns, from `j` on.

    So many calls of the kernel pack what comes next.
    """
    vector, lines = SIDE * _ENTRY, LINES_AHEAD * steps
    next_columns = j + 2 + calls // _CALLS
    for i in range(0, rows - rows % SIDE, 2 * SIDE):
        blocks = 2 if rows - i >= 2 * SIDE else 1
        # what comes next: vectors of other columns, the sum's one after the other, and rows of C
        call = i // (2 * SIDE)
        fetched = call * lines
        ahead = b + min(next_columns + fetched // depth, columns - 1) * b_rows + fetched % depth * vector
        here = c + i // SIDE * c_rows
        c_ahead = here + 2 * c_rows if rows - i > 2 * SIDE else c + 2 * c_column
        operands = (
            of_rows + i // SIDE * packed, packed, of_columns, packed, here, c_row, c_rows, c_column, steps, add,
            ahead, vector, c_ahead, c_row,
        )  # fmt: skip
        if call < calls:
            k, part = call // _CALLS, call % _CALLS
            source = b + (j + 2 + k) * b_rows + 2 * PAIRS * part * vector
            matrix_unit.multiply_and_pack(real, (*operands, source, of_next + k * packed + PAIRS * part * vector))
        else:
            matrix_unit.multiply_packed(real, (*operands, blocks, count))
    left = rows % SIDE
    if left > 0:  # fewer than a register has
        here, row = c + rows // SIDE * c_rows, 2 * vector
        for k in range(count if add else 0):
            matrix_unit.copy_rows(real, (here + k * c_column, c_row, block + k * vector, row, left))
        matrix_unit.multiply_packed(real, (
            of_rows + rows // SIDE * packed, packed, of_columns, packed, block, row, 0, vector, steps, add,
            of_columns, 0, block, 0, 1, count,
        ))  # fmt: skip
        for k in range(count):
            matrix_unit.copy_rows(real, (block + k * vector, row, here + k * c_column, c_row, left))


def _multiplier(is_nested: bool):
    """Return the function that adds a product of rows and columns to a matrix C, or begins it; lanes of C are columns.

    Entries of rows and columns are nested along the sum, or neighbours along rows, or columns, are lanes.
    """
    pack_rows, pack_columns = packer(is_nested, not is_nested), packer(is_nested, is_nested)

    @njit()
    def multiply_split(
        real, memory, a, a_row, a_rows, a_entry, b, b_row, b_rows, b_entry, c, c_row, c_rows, c_column, rows, columns,
        last_columns, depth, add,
    ):  # fmt: skip
        block, of_columns, of_rows = memory + _BLOCK, memory + _COLUMNS, memory + _ROWS
        most = round_up(cdiv(depth, cdiv(depth, MOST_DEPTH)), DEPTH)
        for first in range(0, depth, most):
            this_depth = min(most, depth - first)
            steps = cdiv(this_depth, DEPTH)
            packed = steps * PACKED_BYTES
            vector = first // SIDE if is_nested else first
            for i in range(0, rows, SIDE):
                source, target = a + vector * a_entry + i // SIDE * a_rows, of_rows + i // SIDE * packed
                pack_rows(real, source, a_row, a_entry, min(SIDE, rows - i), this_depth, target)
            done = 0
            for j in range(0, columns, 2):
                count = min(2, columns - j)
                buffer = of_columns + j % 4 * packed
                for k in range(done, count):
                    source, target = b + vector * b_entry + (j + k) * b_rows, buffer + k * packed
                    here = SIDE if j + k < columns - 1 else last_columns
                    pack_columns(real, source, b_row, b_entry, here, this_depth, target)
                done = 0
                if not is_nested and this_depth % DEPTH == 0:
                    done = min(max(0, min(2, columns - j - 2)), rows // (2 * SIDE) // _CALLS)
                _multiply_columns(
                    real, block, of_rows, buffer, packed, steps, b + vector * b_entry, b_rows, this_depth,
                    c + j * c_column, c_row, c_rows, c_column, rows, j, count, columns, add + first, done * _CALLS,
                    of_columns + (j + 2) % 4 * packed,
                )  # fmt: skip

    return multiply_split


@njit()
def _part_of(item, row_items, groups):
    """Return the first row, the group and the bin of an item."""
    return item % row_items * ITEM_ROWS, item // row_items % groups, item // (row_items * groups)


@njit()
def _matrix_at(operand, group, bin):
    """Return where the matrix of a group and bin begins."""
    return operand.address + group * operand.group + bin * operand.bin


def _product(real):
    multiply = _multiplier(is_nested=False)

    def split_product(p, worker, begin, end):
        memory = p.panels + worker * WORKER_BYTES
        matrix_unit.begin_matrices(real, (memory,))
        for item in range(begin, end):
            first, group, bin = _part_of(item, cdiv(p.rows, ITEM_ROWS), p.groups)
            multiply(
                real, memory,
                _matrix_at(p.a, group, bin) + first // SIDE * p.a.rows, 0, p.a.rows, p.a.column,
                _matrix_at(p.b, group, bin), 0, p.b.row, p.b.column,
                _matrix_at(p.c, group, bin) + first // SIDE * p.c.rows, p.c.row, p.c.rows, p.c.column,
                min(ITEM_ROWS, p.rows - first), p.columns, SIDE, p.depth, p.add,
            )  # fmt: skip
        matrix_unit.end_matrices(real, ())

    return split_product


def _panel_product(real):
    multiply = _multiplier(is_nested=True)

    def split_panel_product(p, worker, begin, end):
        memory = p.panels + worker * WORKER_BYTES
        matrix_unit.begin_matrices(real, (memory,))
        vectors = cdiv(p.rows, SIDE)
        for item in range(begin, end):
            first, group, bin = _part_of(item, cdiv(p.columns, ITEM_ROWS), p.groups)
            multiply(
                real, memory,
                _matrix_at(p.b, group, bin) + first * p.b.row, p.b.row, SIDE * p.b.row, p.b.columns,
                _matrix_at(p.a, group, bin), p.a.row, p.a.rows, p.a.columns,
                _matrix_at(p.c, group, bin) + first * p.c.column, p.c.column, SIDE * p.c.column, p.c.rows,
                min(ITEM_ROWS, p.columns - first), vectors, p.rows - (vectors - 1) * SIDE, p.depth, p.add,
            )  # fmt: skip
        matrix_unit.end_matrices(real, ())

    return split_panel_product


_product_stage, _panel_product_stage = jit.stage(RECORD)(_product), jit.stage(RECORD)(_panel_product)


def share_of_vectors(real: type, vectors: Any, rows: Any, columns: Any, depth: Any) -> Any:
    """Return what part of the time that vectors need for a product the unit takes; 1 where vectors are to do it.

    A product is of rows and columns, these in lane blocks, and its sum over `depth` entries, of so many vectors; all
    may be arrays. As the unit waits for the memory, too, it takes 1.3 times its own cycles. Complex entries it does not
    multiply.
    """
    if real is not np.float32 or not matrix_unit.is_available():
        return np.ones(np.shape(columns))
    products = matrix_unit.BLOCK_CYCLES * cdiv(rows, SIDE) * columns * cdiv(depth, DEPTH)
    packing = _TRANSPOSED_CYCLES * rows * depth + matrix_unit.PACKING_CYCLES * columns * depth
    share = 1.3 * (products + packing) / (_VECTOR_CYCLES * rows * columns * depth)
    return np.where((vectors == 1) & (share < _WORTHWHILE), share, 1.0)


def product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], memory: Memory, workers: int) -> threads.Task:
    """Return the task C = A · B of real entries, those of A lanes along i, as `accumulate.conjugate_product`.

    `memory` has `WORKER_BYTES` for each thread.
    """
    groups, rows, _, _, bins = shape
    items = groups * cdiv(rows, ITEM_ROWS) * bins
    record = record_of(a, b, c, shape, False, memory.address)
    return threads.Task(_product_stage.address(c.real), record, items, workers)


def panel_product(
    a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, ...], memory: Memory, workers: int, add: bool = False
) -> threads.Task:
    """Return the task C = A · B, or C += A · B, of real entries, as `accumulate.panel_product`."""
    groups, _, columns, _, bins = shape
    items = groups * cdiv(columns, ITEM_ROWS) * bins
    record = record_of(a, b, c, shape, add, memory.address)
    return threads.Task(_panel_product_stage.address(c.real), record, items, workers)
