"""Real transforms of tiles. Each module offers one transform, behind the interface of `Transform`."""

from dataclasses import dataclass


def plane_stride(frequencies: int, itemsize: int) -> int:
    """Scalars from the real to the imaginary plane: cache lines, oddly many so that planes use all sets of a cache."""
    lines = -(-frequencies * itemsize // 64)
    return (lines | 1) * 64 // itemsize


@dataclass(frozen=True)
class Transform:
    """The real two-dimensional FFT of one tile size and dtype, as compiled code calls it.

    `forward` and `inverse` are addresses of C functions ``void (context, tile, work, real, imaginary)`` on addresses:
    from a tile of ``height * width`` scalars to two planes of ``height * (width // 2 + 1)`` scalars, and back,
    unnormalised. `work` has room for ``work_items`` scalars; the inverse destroys nothing but `work`.

    Attributes
    ----------
    forward, inverse : int
    context : int
    frequencies : int
        Scalars of a plane.
    work_items : int
    """

    forward: int
    inverse: int
    context: int
    frequencies: int
    work_items: int
