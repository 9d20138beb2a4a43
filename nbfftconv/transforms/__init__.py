"""Real transforms of tiles. Each module offers one transform, behind the interface of `Transform`.

All write spectra as `[unit, step, channel, (re, im), lane]`, so that a product reads contiguous channels. A lane is a
tile, or a filter, and a step a frequency; or a unit is one tile, a lane a frequency, and a step a vector of them.
"""

from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from numba import types

from nbfftconv.simd import VECTOR_BYTES

#: Bytes of a vector of complex numbers: the real parts, then the imaginary parts.
COMPLEX_BYTES = 2 * VECTOR_BYTES


def step_stride(channels: int) -> int:
    """Bytes from one step to the next: an odd number of channels, since steps an even number apart share few sets of a
    cache."""
    return (channels | 1) * COMPLEX_BYTES


@dataclass(frozen=True)
class Layout:
    """How the tiles of a transform and their spectra lie in memory.

    Attributes
    ----------
    lanes : int
        Tiles transformed together; with one, the lanes are frequencies.
    pitch : int
        Scalars from a row of a tile to the next.
    steps : int
        Frequencies or, with one lane, vectors of them.
    """

    lanes: int
    pitch: int
    steps: int


@dataclass(frozen=True)
class Transform:
    """The real two-dimensional FFT of one tile size and dtype, as compiled code calls it.

    `forward` and `inverse` are addresses of C functions on addresses, from a unit of tiles to their spectra, and back,
    unnormalised:

    - of one tile, ``void (context, tile, work, spectrum, stride, rows, columns)``: its `height` rows are `pitch`
      scalars apart, and of them only the first `columns` are needed;
    - of a tile for each lane, ``void (context, places, base, work, spectrum, stride, rows, ahead, largest)`` and
      ``void (context, places, base, pitch, work, spectrum, stride, rows)``. The places, in bytes from `base` on, are
      forward those of every row: an int64 for each lane, and 16 bits for each lane of each vector of a row, of the
      samples that are not zero. In the inverse transform they are an int64 for each lane, from where on its rows are
      `pitch` bytes apart. Forward, what is `ahead` bytes further on is fetched for a later call, and the largest
      magnitudes, as bits, are written to the vector at `largest`.

    At every step, `stride` bytes from the next one's, a spectrum has a vector of real parts and one of imaginary parts.
    Of a tile only the first `rows` rows are needed. What is not needed is zero, or may be left out. `work` has room for
    `work_items` scalars, zero at first; nothing else is destroyed. The addresses are good as long as somebody holds the
    transform.

    Attributes
    ----------
    forward, inverse : int
    context : int
    layout : Layout
    work_items : int
    kept : object
        What is at the addresses.
    """

    forward: int
    inverse: int
    context: int
    layout: Layout
    work_items: int
    kept: Any = field(default=None, compare=False, repr=False)


def signature(context: np.dtype | None = None, *, arguments: int) -> Any:
    """Return the signature of a function of so many addresses and integers; a `context` comes first, as a record."""
    kinds = [types.intp] * arguments
    if context is not None:
        kinds[0] = numba.from_dtype(context)
    return types.void(*kinds)
