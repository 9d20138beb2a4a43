"""Windows: the pixels of a channel that a tile of outputs needs, in scratch memory, with zeros for the padding.

A window has every `step`-th pixel of the input, the common divisor of stride and dilation, which are divided by it. Of
a horizontal stride that remains, each row is so many rows of every `stride`-th of these pixels, its phases, so that the
pixels of neighbouring outputs under one tap are neighbours.
"""

import math

from nbfftconv import jit
from nbfftconv.direct.gather import clear_lanes, copy_rows, gather_lanes
from nbfftconv.geometry import AXIS_NUMBERS
from nbfftconv.rounding import cdiv
from nbfftconv.simd import VECTOR_BYTES

#: Fields of records with an axis of `axis_in_window`.
AXIS_FIELDS = (*AXIS_NUMBERS, "step")


def axis_in_window(numbers: dict[str, int]) -> dict[str, int]:
    """Return the numbers of an axis with stride and dilation as in the window; one that is never taken is none."""
    stride = numbers["stride"] if numbers["output"] > 1 else 0
    dilation = numbers["dilation"] if numbers["kernel"] > 1 else 0
    step = math.gcd(stride, dilation) or 1
    return {**numbers, "stride": stride // step, "dilation": dilation // step, "step": step}


@jit.njit()
def gather_window(real, itemsize, lanes, r, plane, y, x, rows, vectors, window):
    """Gather rows of so many vectors, `r.row` bytes apart, from row `y` and column `x` of a channel's plane on.

    Lane j of a row is column x + (j·r.interleave + phase)·r.x_step for each of `r.phases`, `r.phase` bytes apart.
    """
    above = max(0, min(cdiv(-y, r.y_step), rows))
    below = max(above, min(cdiv(r.y_input - y, r.y_step), rows))
    source = plane + (y + above * r.y_step) * r.x_input * itemsize
    source_row = r.y_step * r.x_input * itemsize
    step = r.interleave * r.x_step
    for phase in range(r.phases):
        column = x + phase * r.x_step
        target = window + phase * r.phase
        # vectors of which all that is read are pixels
        begin, end = 0, 0
        if step <= 2:
            begin = min(vectors, cdiv(max(0, -column), lanes * step))
            end = max(begin, min(vectors, (r.x_input - column) // (lanes * step)))
            copy_rows(
                real, source + (column + begin * lanes * step) * itemsize, source_row, step,
                target + above * r.row + begin * VECTOR_BYTES, r.row, below - above, end - begin,
            )  # fmt: skip
        for i in range(vectors):
            place = target + i * VECTOR_BYTES
            if above > 0:
                clear_lanes(real, place, r.row, 0, lanes, above)
            if i < begin or i >= end:
                gather_lanes(
                    real, itemsize, source, source_row, r.x_input, column + i * lanes * step, step,
                    place + above * r.row, r.row, 0, lanes, below - above,
                )  # fmt: skip
            if below < rows:
                clear_lanes(real, place + below * r.row, r.row, 0, lanes, rows - below)


@jit.njit()
def gather_plane(real, itemsize, lanes, r, plane, y, x, rows, vectors, window):
    """Gather rows as `gather_window` does, of one of the input's planes; zeros if it is -1, that there is none."""
    if plane >= 0:
        source = r.input + plane * r.y_input * r.x_input * itemsize
        gather_window(real, itemsize, lanes, r, source, y, x, rows, vectors, window)
        return
    for row in range(rows):
        for phase in range(r.phases):
            place = window + row * r.row + phase * r.phase
            clear_lanes(real, place, VECTOR_BYTES, 0, lanes, vectors)
