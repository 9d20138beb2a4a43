"""Products of float32 matrices on a processor's matrix unit (AMX), which multiplies numbers of 8 significant bits.

A float32 number has 24 significant bits, so it is the sum of three bfloat16 numbers, x = x_0 + x_1 + x_2, each the
nearest to what those before it leave. Of the nine products of the parts of two numbers, six are added up in float32:
those left out, x_1·y_2, x_2·y_1 and x_2·y_2, are below 2^-24 of the whole together, less than the rounding of one
product. So a product is as exact as in float32, with six times the multiplications, by a unit that does sixteen times
as many (Henry, Tang and Heinecke 2019, Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
Computations). Numbers below 2^-100 lose bits, for the unit takes denormal numbers as zero.

Operands are packed into *panels*: for 16 rows of A, or 16 columns of B, and every 32 entries of the sum, the three
parts one after the other, each an image of a matrix register.
"""

import ctypes
import functools
import itertools
import platform
import sys

from nbfftconv import simd
from nbfftconv.target import TARGET

#: Rows and columns of a register of float32 numbers, and entries of the sum that are multiplied at once.
SIDE, DEPTH = 16, 32
#: Parts of a number, and bytes of a register.
PARTS, REGISTER_BYTES = 3, 1024
#: Bytes of the packed parts of 16 rows or columns, of 32 entries of the sum.
PACKED_BYTES = PARTS * REGISTER_BYTES
_ROW = 64  # bytes
#: Clock cycles of the six products of two packed registers, and of packing a vector.
BLOCK_CYCLES, PACKING_CYCLES = 96, 5

# Registers: a block of C of 2 × 2, two of A and two of B.
_A, _B = 4, 6
# While 32 entries of a sum are multiplied, so many lines of what is packed next are fetched, and rows of the next C.
LINES_AHEAD, _ROWS_AHEAD = 16, 4
#: Pairs of vectors along the sum that are packed while 32 entries are multiplied.
PAIRS = 8
# Parts of A and B that are multiplied, the smallest products first; one operand stays from each to the next.
_PRODUCTS = (2, 0), (1, 0), (1, 1), (0, 1), (0, 2), (0, 0)


@functools.cache
def is_available() -> bool:
    """Return whether this process may use the unit; ask Linux for it, once."""
    if not TARGET.has_matrix_unit or sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _emit_begin(v, memory):
    # palette 1; bytes of a row of each register, from byte 16 on; its rows, from byte 48 on
    for i, word in enumerate(
        [1, 0, _ROW * 0x0001000100010001, _ROW * 0x0001000100010001, 0, 0, SIDE * 0x0101010101010101, 0]
    ):
        v.store_integer(word, memory + 8 * i)
    v.begin_matrices(memory)


def _emit_end(v):
    v.end_matrices()


def split(v, x):
    """Return the three parts of numbers."""
    high = v.to_bfloat16(x)
    rest = x - high
    middle = v.to_bfloat16(rest)
    return high, middle, rest - middle


def _packing_emitter(is_pairs: bool, is_whole: bool):
    """Return the emitter that packs 16 rows of a register, each of a vector at `a` and one at `b`; `row` bytes apart.

    They are pairs of entries that follow each other along the sum, or the entries of a row. Of `a_rows` and `b_rows`
    that there are, lanes up to `a_lanes` and `b_lanes` are taken; the others are zero.
    """

    def emit(v, a, b, row, a_rows, b_rows, a_lanes, b_lanes, target):
        def load(address, i, rows, lanes):
            if is_whole:
                return v.load(address)
            is_there = v.minimum(v.maximum(rows - i, 0), 1)
            return v.masked_load(address, v.lanes_between(0, is_there * lanes))

        def pack(a, b, target, i):
            parts = zip(split(v, load(a, i, a_rows, a_lanes)), split(v, load(b, i, b_rows, b_lanes)), strict=True)
            for part, (low, high) in enumerate(parts):
                v.store(v.high_halves(low, high, is_pairs), target + part * REGISTER_BYTES)
            return a + row, b + row, target + _ROW, i + 1

        v.repeat(SIDE, [a, b, target, 0], pack)

    return emit


def _packing(is_pairs: bool, is_whole: bool):
    name = f"pack_{'pairs' if is_pairs else 'rows'}{'' if is_whole else '_of_part'}"
    return simd.kernel(_packing_emitter(is_pairs, is_whole), name)


def _emit_transpose(v, packed):
    for part in range(PARTS):
        rows = [packed + part * REGISTER_BYTES + i * _ROW for i in range(SIDE)]
        for row, value in zip(rows, v.transpose([v.load(row) for row in rows]), strict=True):
            v.store(value, row)


def _of_sizes(block):
    """Return the emitter of a block of one or two times 16 rows, and as many columns: its last two arguments."""

    def emit(v, *arguments):
        *operands, rows, columns = arguments
        for i, j in itertools.product((1, 2), (1, 2)):
            with v.when(rows, i), v.when(columns, j):
                block(v, *operands, rows=i, columns=j)

    return emit


def _emit_products(v, products, a, b, rows, columns, others=()):
    """Emit products of parts; ``a(i, part)``, ``b(j, part)`` are where 16 rows or columns are, and their distance.

    Each step of `others` emits what vectors do between two operations of the unit, which then does not wait for it.
    """
    others = iter(others)
    of_a = of_b = None
    for part_of_a, part_of_b in products:
        if part_of_a != of_a:
            for i in range(rows):
                v.matrix_load(_A + i, *a(i, part_of_a))
                next(others, None)
        if part_of_b != of_b:
            for j in range(columns):
                v.matrix_load(_B + j, *b(j, part_of_b))
                next(others, None)
        of_a, of_b = part_of_a, part_of_b
        for i, j in itertools.product(range(rows), range(columns)):
            v.matrix_fma(2 * i + j, _A + i, _B + j)
            next(others, None)
    for _ in others:
        pass


def _emit_begun(v, add, entries, c_row):
    """Emit zeros in registers of C or, if `add` is not 0, the loads of what there is."""
    with v.when(add, 0):
        for register, _ in entries:
            v.matrix_zero(register)
    with v.unless(add, 0):
        for register, address in entries:
            v.matrix_load(register, address, c_row)


def _packed_pairs(v, source, entry, target):
    """Emit, step by step, the packing of some pairs of vectors along the sum."""
    for i in range(PAIRS):
        low = split(v, v.load(source + entry * (2 * i)))
        yield
        high = split(v, v.load(source + entry * (2 * i + 1)))
        yield
        for part, halves in enumerate(zip(low, high, strict=True)):
            v.store(v.high_halves(*halves, True), target + part * REGISTER_BYTES + i * _ROW)
            yield


def _emit_block(
    v, a, a_block, b, b_block, c, c_row, c_rows, c_column, steps, add, ahead, line, c_ahead, c_ahead_row, source=None,
    target=None, *, rows, columns,
):  # fmt: skip
    entries = [(2 * i + j, c + c_rows * i + c_column * j) for i in range(rows) for j in range(columns)]
    _emit_begun(v, add, entries, c_row)

    def step(a, b, ahead, c_ahead, source=None, target=None):
        for i in range(LINES_AHEAD):
            v.prefetch(ahead + line * i, level=2)
        for i, j in itertools.product(range(_ROWS_AHEAD), range(columns)):
            v.prefetch(c_ahead + c_ahead_row * i + c_column * j, write=True)
        _emit_products(
            v,
            _PRODUCTS,
            lambda i, part: (a + a_block * i + part * REGISTER_BYTES, _ROW),
            lambda j, part: (b + b_block * j + part * REGISTER_BYTES, _ROW),
            rows,
            columns,
            () if source is None else _packed_pairs(v, source, line, target),
        )
        following = a + PACKED_BYTES, b + PACKED_BYTES, ahead + line * LINES_AHEAD, c_ahead + c_ahead_row * _ROWS_AHEAD
        return following if source is None else (*following, source + line * DEPTH, target + PACKED_BYTES)

    packing = [] if source is None else [source, target]
    v.repeat(steps, [a, b, ahead, c_ahead, *packing], step)
    for register, address in entries:
        v.matrix_store(register, address, c_row)


# The same of A and B, where B, the pixels, is split; the smallest first.
_PRODUCTS_OF_WINDOW = (0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (0, 0)


def _emit_window_block(
    v, a, a_block, table, b, b_row, b_part, c, c_row, steps, add, ahead, lines, y, y_row, *, rows, columns,
):  # fmt: skip
    entries = [(2 * i + j, c + c_row * SIDE * i + _ROW * j) for i in range(rows) for j in range(columns)]
    _emit_begun(v, add, entries, c_row)

    def fetch(ahead):
        v.prefetch(ahead, level=2)
        return [ahead + _ROW]

    def step(a, entry, ahead, y):
        here = b + v.load_integer(entry)
        (ahead,) = v.repeat(lines, [ahead], fetch)
        for i, j in itertools.product(range(_ROWS_AHEAD), range(columns)):
            v.prefetch(y + y_row * i + j * _ROW, write=True)
        _emit_products(
            v,
            _PRODUCTS_OF_WINDOW,
            lambda i, part: (a + a_block * i + part * REGISTER_BYTES, _ROW),
            lambda j, part: (here + _ROW * j + b_part * part, b_row),
            rows,
            columns,
        )
        return a + PACKED_BYTES, entry + 8, ahead, y + y_row * _ROWS_AHEAD

    v.repeat(steps, [a, table, ahead, y], step)
    for register, address in entries:
        v.matrix_store(register, address, c_row)


_emit_multiply, _emit_multiply_window = _of_sizes(_emit_block), _of_sizes(_emit_window_block)


def _emit_copy(v, source, source_row, target, target_row, rows):
    def copy(source, target):
        v.store(v.load(source), target)
        return source + source_row, target + target_row

    v.repeat(rows, [source, target], copy)


#: (memory): begins with the unit; its configuration is written to 64 bytes. ``end_matrices`` takes nothing.
begin_matrices, end_matrices = simd.kernel(_emit_begin, "begin_matrices"), simd.kernel(_emit_end, "end_matrices")
#: (a, b, row, a_rows, b_rows, a_lanes, b_lanes, target): packs 32 entries of the sum. Vectors at `a`, `b`, and `row`
#: bytes later, and so on, are neighbours along the sum, whose lanes are 16 columns (`pairs`); or the entries of a row.
#: Of a `part`, some are not there.
pack_pairs, pack_part_of_pairs = _packing(is_pairs=True, is_whole=True), _packing(is_pairs=True, is_whole=False)
pack_rows, pack_part_of_rows = _packing(is_pairs=False, is_whole=True), _packing(is_pairs=False, is_whole=False)
#: (packed): 16 rows to 16 columns, or the other way round.
transpose_packed = simd.kernel(_emit_transpose, "transpose_packed")
#: (a, a_block, b, b_block, c, c_row, c_rows, c_column, steps, add, ahead, line, c_ahead, c_ahead_row, rows, columns):
#: C = A · B, or C += A · B, of one or two times 16 rows, `a_block` and `c_rows` bytes apart, and as many columns,
#: `b_block` and `c_column` apart; sums are over `steps` times 32 entries. Meanwhile lines are fetched from `ahead` on,
#: `line` bytes apart, and rows of the next C.
multiply_packed = simd.kernel(_emit_multiply, "multiply_packed", 16)
#: (..., c_ahead_row, source, target): the same of two times 16 rows and columns. Meanwhile `PAIRS` pairs of vectors of
#: every 32 entries are packed, `line` bytes apart, from `source` on, to `target`.
multiply_and_pack = simd.kernel(functools.partial(_emit_block, rows=2, columns=2), "multiply_and_pack", 16)
#: (a, a_block, table, b, b_row, b_part, c, c_row, steps, add, ahead, lines, y, y_row, rows, columns): the same where B
#: is in a window: rows `b_row` bytes apart, parts `b_part`, 32 entries of the sum where the table says. With each of
#: these so many lines are fetched, from `ahead` on, and some rows from `y` on, which will be written.
multiply_window = simd.kernel(_emit_multiply_window, "multiply_window", 16)
#: (source, source_row, target, target_row, rows): vectors, one a row.
copy_rows = simd.kernel(_emit_copy, "copy_rows")
