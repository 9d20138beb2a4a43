"""Generated tile transforms: a vector lane is a tile (or a filter), and a transform is straight-line code over lanes.

A tile of T_y × T_x samples is transformed row by row, real to complex, then column by column. Rows are transposed from
the tiles' memory to lanes as they are read, and back as they are written.
"""

import functools

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES, Layout, Transform, signature
from nbfftconv.transforms.butterflies import Complex, complex_transform, load, real_inverse, real_transform, store

#: The tile sides that there is a transform for.
SIDES = (8, 9, 10, 12, 13, 14, 15, 16, 18, 20, 24, 28, 30, 32)


def place_bytes(real: type, pitch: int) -> int:
    """Bytes of the places of one row: for each lane an address, and a mask for each vector of `pitch` scalars."""
    lanes = simd.lanes(real)
    return 8 * lanes + 2 * pitch


@functools.cache
def _rows_forward(length):
    """Intrinsic: `count` rows of `length` samples, from their places to [row, k, (re, im), lane].

    What is `ahead` bytes further on is fetched for a later call. The largest magnitudes go to the vector at `largest`.
    """

    def emit(v, places, base, work, count, ahead, largest):
        padded = -(-length // v.lanes) * v.lanes
        masks = 8 * v.lanes

        def row(place, work, bits):
            samples = []
            for group in range(padded // v.lanes):
                rows = []
                for lane in range(v.lanes):
                    start = v.add(base, v.integer_at(v.add(place, v.integer(8 * lane))))
                    at = v.add(start, v.integer(group * VECTOR_BYTES))
                    v.prefetch(v.add(at, ahead))
                    mask = v.mask_at(v.add(place, v.integer(masks + 2 * (group * v.lanes + lane))))
                    rows.append(v.load_some(at, mask))
                    bits = v.larger(bits, v.magnitude_bits(rows[-1]))
                samples += v.transpose(rows)
            for k, value in enumerate(real_transform([Complex(v, x) for x in samples[:length]])):
                store(v, value, v.add(work, v.integer(k * COMPLEX_BYTES)))
            step = (length // 2 + 1) * COMPLEX_BYTES
            return [v.add(place, v.integer(masks + 2 * padded)), v.add(work, v.integer(step)), bits]

        _, _, bits = v.repeat(count, [places, work, v.no_bits()], row)
        v.store_bits(bits, largest)

    return simd.kernel(emit, f"rows_forward_{length}", 6)


def _column_steps(height, width):
    """Frequencies of the columns k = 0 .. width/2: of a real column half, since the others are conjugate to them."""
    return [height // 2 + 1 if 2 * k % width == 0 else height for k in range(width // 2 + 1)]


@functools.cache
def _columns(height, width, sign):
    """Intrinsic: columns of `height` values from [row, k, (re, im), lane] to the frequencies of each, or back.

    Columns 0 and width/2 are real.
    """
    half = width // 2 + 1

    def emit(v, work, spectrum, stride):
        def column(work, spectrum, steps=height):
            inside = [v.add(work, v.integer(i * half * COMPLEX_BYTES)) for i in range(height)]
            outside = [v.add(spectrum, v.scale(stride, v.integer(i))) for i in range(steps)]
            following = v.add(spectrum, v.scale(stride, v.integer(steps)))
            if sign < 0:
                for i in range(height):  # a column's lines are apart: stores alone would wait for one after the other
                    at = v.add(following, v.scale(stride, v.integer(i)))
                    v.prefetch(at, write=True)
                    v.prefetch(v.add(at, v.integer(VECTOR_BYTES)), write=True)
                if steps == height:
                    result = complex_transform([load(v, at) for at in inside], sign)
                else:
                    result = real_transform([Complex(v, v.load(at)) for at in inside])
                for value, at in zip(result, outside, strict=True):
                    store(v, value, at)
            else:
                for at in outside:  # the next channel's comes next
                    v.prefetch(v.add(at, v.integer(COMPLEX_BYTES)), level=2)
                    v.prefetch(v.add(at, v.integer(COMPLEX_BYTES + VECTOR_BYTES)), level=2)
                values = [load(v, at) for at in outside]
                result = complex_transform(values, sign) if steps == height else real_inverse(values, height)
                for value, at in zip(result, inside, strict=True):
                    store(v, value, at)
            return [v.add(work, v.integer(COMPLEX_BYTES)), following]

        steps = _column_steps(height, width)
        work, spectrum = column(work, spectrum, steps[0])
        work, spectrum = v.repeat(v.integer(steps[1:].count(height)), [work, spectrum], column)
        if steps[-1] != height:
            column(work, spectrum, steps[-1])

    return simd.kernel(emit, f"columns_{height}_{width}_{sign}", 3)


@functools.cache
def _rows_inverse(length):
    """Intrinsic: `count` rows from [row, k, (re, im), lane] to the places of lanes, `pitch` bytes from row to row.

    Whole vectors are written, each before what begins in its midst if that is of a later lane or row.
    """

    def emit(v, places, base, pitch, work, count):
        groups = -(-length // v.lanes)

        def row(base, work):
            spectrum = [load(v, v.add(work, v.integer(k * COMPLEX_BYTES))) for k in range(length // 2 + 1)]
            samples = [x.re for x in real_inverse(spectrum, length)]
            samples += [v.zero()] * (groups * v.lanes - length)
            for group in reversed(range(groups)):
                for lane, value in enumerate(v.transpose(samples[group * v.lanes : (group + 1) * v.lanes])):
                    start = v.add(base, v.integer_at(v.add(places, v.integer(8 * lane))))
                    v.store(value, v.add(start, v.integer(group * VECTOR_BYTES)))
            step = (length // 2 + 1) * COMPLEX_BYTES
            return [v.add(base, pitch), v.add(work, v.integer(step))]

        v.repeat(count, [base, work], row)

    return simd.kernel(emit, f"rows_inverse_{length}", 5)


@functools.cache
def _callbacks(height, width):
    half = width // 2 + 1
    rows_forward, rows_inverse = _rows_forward(width), _rows_inverse(width)
    columns_forward, columns_inverse = _columns(height, width, -1), _columns(height, width, 1)

    def forward_factory(real):
        row = 2 * half * simd.lanes(real)

        def forward(places, base, work, spectrum, stride, rows, ahead, largest):
            rows_forward(real, (places, base, work, rows, ahead, largest))
            rest = simd.pointer(real, work)
            for i in range(rows * row, height * row):
                rest[i] = real(0)
            columns_forward(real, (work, spectrum, stride))

        return forward

    def inverse_factory(real):
        def inverse(places, base, pitch, work, spectrum, stride, rows):
            columns_inverse(real, (work, spectrum, stride))
            rows_inverse(real, (places, base, pitch, work, rows))

        return inverse

    return Callback(forward_factory, signature(arguments=8)), Callback(inverse_factory, signature(arguments=7))


def layout(real: type, height: int, width: int) -> Layout:
    """Return the layout of tiles and spectra: rows are whole vectors."""
    lanes = simd.lanes(real)
    real_columns = 2 - width % 2
    steps = height * (width // 2 + 1) - real_columns * ((height - 1) // 2)  # as `_column_steps`
    return Layout(lanes, -(-width // lanes) * lanes, steps)


@functools.cache
def codelet(real: type, height: int, width: int) -> Transform:
    """Return the generated transform of tiles of ``height * width`` scalars, compiled at the first request.

    Parameters
    ----------
    real : type
        `numpy.float32` or `numpy.float64`.
    height, width : int
        Of `SIDES`.
    """
    forward, inverse = _callbacks(height, width)
    shape = layout(real, height, width)
    work_items = 2 * height * (width // 2 + 1) * shape.lanes
    return Transform(forward.address(real), inverse.address(real), 0, shape, work_items)
