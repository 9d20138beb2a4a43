"""Tiles: which pixels a tile reads and which it writes. Knows no FFT and no array.

Stride s and dilation d turn into stride-1 convolutions, axis by axis, without computing what would be discarded.
Output o = d'·q + r reads pixel s·o + d·u under tap u = s'·v + a, where g = gcd(s, d), s' = s/g, d' = d/g. That pixel is

    s·r + d·a + lcm(s, d)·(q + v),

so for each *image phase* r < d' and *channel phase* a < s' the taps v slide over a subsampled image with stride 1.
Image phases multiply the images; channel phases multiply the channels, over which the forward pass sums.
"""

import math
from dataclasses import dataclass

from nbfftconv.geometry import ConvGeometry
from nbfftconv.rounding import cdiv


@dataclass(frozen=True)
class AxisTiles:
    """Tiles along one axis.

    Attributes
    ----------
    tile : int
        Samples T of a tile, the length of its transform.
    taps : int
        Taps of the longest channel phase of the kernel.
    outputs : int
        Outputs T - taps + 1 of a tile.
    count : int
        Tiles that cover the outputs of one image phase.
    image_phases, channel_phases : int
        Numbers of phases r and a.
    input_step, output_step, tap_step : int
        The distances of neighbouring samples in the input, the output and the kernel: lcm(s, d), d' and s'.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((1, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="codelet", tile=16)
    >>> axis = plan.grid.vertical
    >>> axis.tile, axis.taps, axis.outputs, axis.count
    (16, 5, 12, 3)
    """

    tile: int
    taps: int
    outputs: int
    count: int
    image_phases: int
    channel_phases: int
    input_step: int
    output_step: int
    tap_step: int


def _unit_stride(outputs: int, kernel: int, stride: int, dilation: int) -> tuple[int, int, int, int, int]:
    """Return input_step, output_step, tap_step, and the outputs and taps of the longest phase."""
    if outputs == 1:
        stride = 1
    if kernel == 1:
        dilation = 1
    common = math.gcd(stride, dilation)
    output_step, tap_step = dilation // common, stride // common
    return stride * output_step, output_step, tap_step, cdiv(outputs, output_step), cdiv(kernel, tap_step)


def problem_sizes(geometry: ConvGeometry) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (outputs, taps) of the stride-1 problem, for the vertical and the horizontal axis."""
    sizes = []
    for axis in (0, 1):
        *_, outputs, taps = _unit_stride(
            geometry.output_size[2 + axis],
            geometry.weight_size[2 + axis],
            geometry.stride[axis],
            geometry.dilation[axis],
        )
        sizes.append((outputs, taps))
    return sizes[0], sizes[1]


def axis_tiles(geometry: ConvGeometry, axis: int, tile: int) -> AxisTiles:
    """Cover the outputs along an axis, 0 vertical or 1 horizontal, with tiles of `tile` samples.

    Raises
    ------
    ValueError
        If the kernel does not fit the tile.
    """
    outputs, kernel = geometry.output_size[2 + axis], geometry.weight_size[2 + axis]
    input_step, output_step, tap_step, longest, taps = _unit_stride(
        outputs, kernel, geometry.stride[axis], geometry.dilation[axis]
    )
    if tile < taps:
        raise ValueError(
            f"tile {tile} is smaller than the {taps} taps of the kernel {geometry.weight_size[2:]} along axis {axis}"
        )
    gained = tile - taps + 1
    return AxisTiles(
        tile,
        taps,
        gained,
        cdiv(longest, gained),
        min(output_step, outputs),
        min(tap_step, kernel),
        input_step,
        output_step,
        tap_step,
    )


@dataclass(frozen=True)
class TileGrid:
    """The tiles of a convolution; the same grid serves all three passes.

    Tiles are numbered with the image slowest, then vertical and horizontal image phase, row and column.

    Attributes
    ----------
    vertical : AxisTiles
        Along the height.
    horizontal : AxisTiles
        Along the width.
    images : int
        Images of the batch.

    Examples
    --------
    >>> import nbfftconv
    >>> plan = nbfftconv.plan_conv2d((4, 8, 40, 40), (8, 8, 5, 5), algorithm="fft", transform="codelet", tile=16)
    >>> plan.grid.tiles_per_image, plan.grid.tiles
    (9, 36)
    """

    vertical: AxisTiles
    horizontal: AxisTiles
    images: int

    @property
    def tiles_per_image(self) -> int:
        """Tiles of one image, over all its phases."""
        axes = (self.vertical, self.horizontal)
        return math.prod(axis.image_phases * axis.count for axis in axes)

    @property
    def tiles(self) -> int:
        """Tiles of the batch."""
        return self.images * self.tiles_per_image

    @property
    def channel_phases(self) -> int:
        """Channels of the stride-1 problem for each channel of the input."""
        return self.vertical.channel_phases * self.horizontal.channel_phases
