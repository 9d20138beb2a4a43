"""Pixels from images to scratch memory, as masked vectors: what lies outside an image is not touched."""

from nbfftconv import jit, simd
from nbfftconv.rounding import cdiv


def _copy(v, source, source_step, target, target_step, begin, end, first, last, count):
    inside, written = v.lanes_between(begin, end), v.lanes_between(first, last)

    def vector(source, target):
        v.masked_store(v.masked_load(source, inside), target, written)
        return [source + source_step, target + target_step]

    v.repeat(count, [source, target], vector)


def _copy_even(v, source, source_step, target, target_step, begin, end, first, last, count):
    inside, written = [v.lanes_between(begin, end, i * v.lanes) for i in range(2)], v.lanes_between(first, last)

    def vector(source, target):
        halves = [v.masked_load(source + i * v.vector_bytes, inside[i]) for i in range(2)]
        v.masked_store(v.even_lanes(*halves), target, written)
        return [source + source_step, target + target_step]

    v.repeat(count, [source, target], vector)


def _copy_strided(v, source, source_step, scalar_step, target, target_step, begin, end, first, last, count):
    inside, written = v.lanes_between(begin, end), v.lanes_between(first, last)

    def vector(source, target):
        v.masked_store(v.gather(source, scalar_step, inside), target, written)
        return [source + source_step, target + target_step]

    v.repeat(count, [source, target], vector)


def _copy_full(v, source, source_row, target, target_row, rows, vectors):
    def row(source, target):
        def vector(source, target):
            v.store(v.load(source), target)
            return [source + v.vector_bytes, target + v.vector_bytes]

        v.repeat(vectors, [source, target], vector)
        return [source + source_row, target + target_row]

    v.repeat(rows, [source, target], row)


def _copy_full_even(v, source, source_row, target, target_row, rows, vectors):
    def row(source, target):
        def vector(source, target):
            v.store(v.even_lanes(v.load(source), v.load(source + v.vector_bytes)), target)
            return [source + 2 * v.vector_bytes, target + v.vector_bytes]

        v.repeat(vectors, [source, target], vector)
        return [source + source_row, target + target_row]

    v.repeat(rows, [source, target], row)


# (source, source_step, target, target_step, begin, end, first, last, count): `count` vectors, of which scalars
# begin .. end - 1 are read and lanes first .. last - 1 are written, zeros where nothing is read.
_copy_vectors = simd.kernel(_copy, "copy_vectors")
# The same of every other scalar.
_copy_every_other = simd.kernel(_copy_even, "copy_every_other")
# (source, source_step, scalar_step, ...): the same of scalars `scalar_step` bytes apart, counted alone.
_copy_apart = simd.kernel(_copy_strided, "copy_apart")
# (source, source_row, target, target_row, rows, vectors): rows of whole vectors.
_copy_rows = simd.kernel(_copy_full, "copy_rows")
# The same of every other scalar, from twice as many vectors.
_copy_rows_every_other = simd.kernel(_copy_full_even, "copy_rows_every_other")


@jit.njit()
def clear_lanes(real, target, target_step, first, last, count):
    """Set lanes first .. last - 1 of `count` vectors, `target_step` bytes apart, to zero."""
    _copy_vectors(real, (target, 0, target, target_step, 0, 0, first, last, count))


@jit.njit()
def gather_lanes(real, itemsize, row, row_step, width, x, x_step, target, target_step, first, last, count):
    """Fill lanes first .. last - 1 of `count` vectors, `target_step` bytes apart, from as many rows of `width` pixels.

    Lane j holds pixel x + j·x_step of a row, or zero if there is none.
    """
    if x_step == 1:
        _copy_vectors(real, (row + x * itemsize, row_step, target, target_step, -x, width - x, first, last, count))
    elif x_step == 2:
        _copy_every_other(real, (row + x * itemsize, row_step, target, target_step, -x, width - x, first, last, count))
    else:
        begin, end = cdiv(-x, x_step), cdiv(width - x, x_step)
        _copy_apart(
            real,
            (row + x * itemsize, row_step, x_step * itemsize, target, target_step, begin, end, first, last, count),
        )


@jit.njit()
def copy_rows(real, source, source_row, x_step, target, target_row, rows, vectors):
    """Copy rows of so many vectors, of every scalar or, with an `x_step` of 2, of every other one; all are pixels."""
    if vectors > 0 and x_step == 1:
        _copy_rows(real, (source, source_row, target, target_row, rows, vectors))
    elif vectors > 0:
        _copy_rows_every_other(real, (source, source_row, target, target_row, rows, vectors))
