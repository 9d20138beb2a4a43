"""Linear transforms of tiles: what one has to offer. Each module has one `Transform`, and `registry` has them all.

All write spectra as `[lane block, bin, channel, (re, im), lane]`, or, where a transform is real, `[lane block, bin,
channel, lane]`, so that a product reads contiguous channels. A lane is a tile, or a filter, and a bin a frequency, or a
point; or a lane block is one tile, a lane a frequency, and a bin a vector of them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from nbfftconv import simd
from nbfftconv.jit import Callback
from nbfftconv.rounding import cdiv
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import LINE_BYTES

#: Bytes of the numbers of a tile that `point` of `Functions` is given.
TILE_BYTES = 5 * 8

#: Bytes of a vector of complex numbers: the real parts, then the imaginary parts.
COMPLEX_BYTES = 2 * VECTOR_BYTES


def bin_stride(channels: Any, entry_bytes: Any) -> Any:
    """Bytes from one bin to the next: an odd number of channels, or of the lines that real ones share, since bins an
    even number apart share few sets of a cache."""
    unit = np.where(entry_bytes == VECTOR_BYTES, max(VECTOR_BYTES, LINE_BYTES), entry_bytes)
    units = cdiv(channels * entry_bytes, unit)
    return (units + 1 - units % 2) * unit


@dataclass(frozen=True)
class Layout:
    """How the tiles of a transform and their spectra lie in memory.

    Attributes
    ----------
    lanes : int
        Tiles transformed together; with one, the lanes are frequencies.
    pitch : int
        Scalars from a row of a tile to the next.
    bins : int
        Frequencies or, with one lane, vectors of them.
    vectors : int
        Vectors of an entry of a spectrum: real and imaginary parts, or 1 if it is real.
    """

    lanes: int
    pitch: int
    bins: int
    vectors: int = 2


def indirection_row_bytes(real: type, pitch: int) -> int:
    """Bytes of an indirection buffer for a row of `pitch` scalars: for each lane an address, and a mask a vector."""
    lanes = simd.lanes(real)
    return 8 * lanes + 2 * pitch


class Functions(NamedTuple):
    """The transform of the tiles of one array, as compiled code calls it: addresses of C functions on addresses.

    `forward` goes from a lane block of tiles to its spectra, `inverse` back, up to a divisor:

    - of one tile, ``void (context, tile, work, spectrum, stride, rows, columns)``: its `height` rows are `pitch`
      scalars apart, and of them only the first `columns` are needed;
    - of a tile for each lane, ``void (context, indirection, base, work, spectrum, stride, rows, ahead, largest)`` and
      ``void (context, indirection, base, pitch, work, spectrum, stride, rows)``. Forward, the indirection buffer is
      what `point` made of the tiles, whose addresses are counted from `base`; what is `ahead` bytes further on is
      fetched for a later call, and the largest magnitudes, as bits, are written to the vector at `largest`. In the
      inverse transform it has an int64 for each lane, from where on its rows are `pitch` bytes apart.

    Some can write tiles that lie side by side to where they belong: ``void write(context, indirection, base, work,
    spectrum, stride, rows, factors, relu, stream)`` transforms back to what an indirection buffer of `point` points to,
    adds factors[1], clips negative values if `relu` is 1, and writes lines past the caches if `stream` is 1.

    ``void point(context, tiles, indirection, row_bytes, rows)`` fills an indirection buffer: `tiles` has, for each
    lane, the numbers of `nbfftconv.passes.views.Tile` as int64, and of a tile the first `rows` rows, `row_bytes` apart,
    are read.

    For every bin, `stride` bytes from the next one's, a spectrum has the vectors of an entry. Of a tile only the first
    `rows` rows are needed. What is not needed is zero, or may be left out.

    Attributes
    ----------
    forward, inverse : int
    context : int
    point : int
        0 for transforms of one tile.
    write : int
        0 where it is not to be had.
    """

    forward: int
    inverse: int
    context: int
    point: int = 0
    write: int = 0


@dataclass(frozen=True)
class TileTransform:
    """The linear transform of one tile size and dtype.

    `work` has room for `work_items` scalars, zero at first; nothing else is destroyed. The addresses are good as long
    as somebody holds the transform.

    Attributes
    ----------
    input, weight, output : Functions
        From and to the input, the kernels and the output, or their gradients. Those of an FFT are all the same.
    layout : Layout
    work_items : int
    indirection_bytes : int
        Of an indirection buffer of a row.
    divisor : int
        What an inverse transform has to be divided by.
    sums : numpy.ndarray
        Factors, float64, of the first bins of the output's spectra, of which the sum of a tile is the combination.
    kept : object
        What is at the addresses.
    """

    input: Functions
    weight: Functions
    output: Functions
    layout: Layout
    work_items: int
    divisor: int
    indirection_bytes: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.ones(1), compare=False, repr=False)
    kept: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of_all(cls, functions: Functions, layout: Layout, **rest: Any) -> "TileTransform":
        """Return the transform whose functions are the same for all arrays."""
        return cls(functions, functions, functions, layout, **rest)


class Operations(NamedTuple):
    """Operations of a tile's transform, each divided by its fraction of the machine's `flops`; arrays or numbers.

    Attributes
    ----------
    base : numpy.ndarray
        Those that there always are.
    column, row : numpy.ndarray or float
        Those of every column, in whole pairs of vectors, and of every row that is needed.
    """

    base: np.ndarray
    column: np.ndarray | float
    row: np.ndarray | float


@dataclass(frozen=True, eq=False)
class Transform:
    """A transform that plans may choose: its tiles, what they cost, and how one is made.

    Attributes
    ----------
    name : str
        As plans and users call it.
    make : callable
        ``make(real, tile, taps)`` returns the `TileTransform` of a tile size, (height, width), for kernels of so many
        taps a side.
    layout : callable
        ``layout(real, height, width)`` returns the `Layout`; of arrays of sides, one of arrays.
    sides : callable or None
        ``sides(taps, axis)`` returns the tile sides that it has for so many taps along an axis, 0 vertical or 1
        horizontal, rising; None for any.
    operations : callable
        ``operations(height, width, frequencies)``, of arrays, returns `Operations`.
    product_rate : float
        Fraction of the machine's `flops` of the products.
    spectra_rate, stream_rate : float
        Fractions of its `bandwidth` of spectra that go through the last-level cache, and of kernels' spectra that are
        read.
    row : float
        Seconds of a row that is gathered or scattered.
    read_rate, write_rate : float or None
        Fractions of its `bandwidth` of arrays that are read and written; None for those of most transforms.
    gathered : float
        Seconds, as far as they are reckoned, of a sample that is gathered alone, where strides or dilations part it
        from its neighbours.
    kernel : float
        The same of a kernel's gradient that is written.
    skips_rows : bool
        Whether rows that are not needed are left out.
    algorithm : str
        The name of the implementation whose plans may choose it.
    is_library : bool
        Whether a library computes it, for whose stages users may set a number of threads.
    is_available : bool
        Whether it is to be had in this process; if not, no plan chooses it.
    """

    name: str
    make: Callable[[type, tuple[int, int], tuple[int, int]], TileTransform]
    layout: Callable[[type, Any, Any], Layout]
    sides: Callable[[int, int], tuple[int, ...]] | None
    operations: Callable[[np.ndarray, np.ndarray, np.ndarray], Operations]
    product_rate: float
    spectra_rate: float
    stream_rate: float
    row: float = 0.0
    read_rate: float | None = None
    write_rate: float | None = None
    gathered: float = 0.0
    kernel: float = 0.0
    skips_rows: bool = False
    algorithm: str = "fft"
    is_library: bool = False
    is_available: bool = True


def sides_of_rows(lengths: tuple[int, ...]) -> Callable[[int, int], tuple[int, ...]]:
    """Return `sides` of a transform of rows that are so long."""
    return lambda taps, axis: lengths if axis == 1 else (1,) if taps == 1 else ()


def signature(context: np.dtype | None = None, *, arguments: int) -> Any:
    """Return the signature of a function of so many addresses and integers; a `context` comes first, as a record."""
    kinds = [types.intp] * arguments
    if context is not None:
        kinds[0] = numba.from_dtype(context)
    return types.void(*kinds)


@functools.cache
def kernel_callback(emitter: Callable[..., Callable], *numbers: int) -> Callback:
    """Return the C function of the kernel that ``emitter(*numbers)`` emits, of 5 to 8 addresses and integers."""
    emit = emitter(*numbers)
    kernel = simd.kernel(emit, "_".join(map(str, (emitter.__name__, *numbers))))
    arity = emit.__code__.co_argcount - 1

    def factory(real):  # a C function has no tuple of arguments
        def of_5(a, b, c, d, e):
            kernel(real, (a, b, c, d, e))

        def of_6(a, b, c, d, e, f):
            kernel(real, (a, b, c, d, e, f))

        def of_7(a, b, c, d, e, f, g):
            kernel(real, (a, b, c, d, e, f, g))

        def of_8(a, b, c, d, e, f, g, h):
            kernel(real, (a, b, c, d, e, f, g, h))

        return {5: of_5, 6: of_6, 7: of_7, 8: of_8}[arity]

    return Callback(factory, signature(arguments=arity))
