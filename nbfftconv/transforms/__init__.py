"""Real transforms of tiles. Each module offers one transform, behind the interface of `Transform`.

All write spectra as `[unit, step, channel, (re, im), lane]`, so that a product reads contiguous channels. A lane is a
tile, or a filter, and a step a frequency; or a unit is one tile, a lane a frequency, and a step a vector of them.
"""

from dataclasses import dataclass
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

    `forward` and `inverse` are addresses of C functions ``void (context, tiles, work, spectrum, stride, rows)`` on
    addresses: from a unit of tiles, each ``height * pitch`` scalars, to their spectra, and back, unnormalised. At every
    step, `stride` bytes from the next one's, a spectrum has a vector of real parts and one of imaginary parts. Of a
    tile only the first `rows` rows are needed: the others are zero, or may be left out. `work` has room for
    `work_items` scalars, zero at first; nothing else is destroyed.

    Attributes
    ----------
    forward, inverse : int
    context : int
    layout : Layout
    work_items : int
    """

    forward: int
    inverse: int
    context: int
    layout: Layout
    work_items: int


def signature(context: np.dtype | None = None) -> Any:
    """Return the signature of `Transform.forward` and `inverse`, which see their context as a record, if it is one."""
    first = types.intp if context is None else numba.from_dtype(context)
    return types.void(first, *[types.intp] * 5)
