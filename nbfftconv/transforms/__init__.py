"""Real transforms of tiles. Each module offers one transform, behind the interface of `Transform`."""

from dataclasses import dataclass

#: Channels by which the memory of a frequency exceeds its own, where lanes are tiles: at a stride of a power of two the
#: frequencies of a channel would share few sets of a cache.
PADDING_CHANNELS = 1


def plane_stride(frequencies: int, itemsize: int) -> int:
    """Scalars from the real to the imaginary plane: cache lines, oddly many so that planes use all sets of a cache."""
    lines = -(-frequencies * itemsize // 64)
    return (lines | 1) * 64 // itemsize


@dataclass(frozen=True)
class Transform:
    """The real two-dimensional FFT of one tile size and dtype, as compiled code calls it.

    `forward` and `inverse` are addresses of C functions ``void (context, tiles, work, real, imaginary, stride, rows)``
    on addresses: from `lanes` tiles, each ``height * pitch`` scalars, to their spectra, and back, unnormalised. With
    one lane, a spectrum is two planes; else, at every frequency, a vector of the lanes' real parts and one of their
    imaginary parts, `stride` bytes from those of the next frequency. Of a tile only the first `rows` rows are needed:
    the others are zero, or may be left out. `work` has room for ``work_items`` scalars; nothing else is destroyed.

    Attributes
    ----------
    forward, inverse : int
    context : int
    lanes : int
    pitch : int
        Scalars from a row of a tile to the next.
    frequencies : int
        Frequencies of a tile: ``height * (width // 2 + 1)``.
    work_items : int
    """

    forward: int
    inverse: int
    context: int
    lanes: int
    pitch: int
    frequencies: int
    work_items: int
