"""Geometry to plan: algorithm, tile, transform and blocking, by a cost model.

Cost model, in seconds of one core; its rates are those of a 2023 server core with 512-bit vectors, and only their
ratios matter:

- a transform of a T_y × T_x tile costs 2.5·T_y·T_x·log2(T_y·T_x) operations, and two passes over the tile to gather
  or scatter it;
- the products cost 8 operations for every frequency, tile, filter and channel of its group, at the rate of the
  micro-kernel, but not less than reading the kernels' spectra once a block of tiles;
- direct convolution costs 2 operations a multiply-add, and a fixed time for every row of pixels under every tap;
- a call, a block of tiles and the call of a transform have fixed costs.

The cheapest tile is taken whose block of at least one tile fits the scratch limit and whose kernels' spectra fit
`WEIGHT_SPECTRA_LIMIT`. Nothing here depends on the number of threads, so that results do not either.
"""

import functools
import itertools
import math
import os
from typing import Any

import numpy as np

from nbfftconv.geometry import ConvGeometry, Padding, pair
from nbfftconv.plan import DIRECTIONS, ConvPlan
from nbfftconv.tiling import TileGrid, axis_tiles, problem_sizes
from nbfftconv.transforms import plane_stride

ALGORITHMS = ("auto", "fft", "direct")
TRANSFORMS = ("auto", "fftw")

#: The automatic choice never needs more memory for the spectra of the kernels, in bytes.
WEIGHT_SPECTRA_LIMIT = 2**32
#: A block of tiles is at most this large, in bytes, so that what one stage writes is still in the last-level cache for
#: the next.
BLOCK_BYTES = 2**25
#: The largest tile side that is tried, unless the kernel or the caller asks for more.
LARGEST_TILE = 512

_DEFAULT_SCRATCH = 256 * 2**20

# Operations or bytes a second.
_FFT_RATE = 10e9
_PRODUCT_RATE = 45e9
_DIRECT_RATE = 9e9
_COPY_RATE = 6e9
_STREAM_RATE = 10e9
# Seconds.
_FFT_CALL = 150e-6
_DIRECT_CALL = 60e-6
_DIRECT_ROW = 8e-9
_BLOCK = 30e-6
_TRANSFORM_CALL = 0.2e-6


def _scratch_from_environment() -> int:
    text = os.environ.get("NBFFTCONV_SCRATCH_BYTES", "")
    return int(text) if text.isdecimal() and int(text) > 0 else _DEFAULT_SCRATCH


_scratch_limit = _scratch_from_environment()


def set_scratch_limit(nbytes: int) -> None:
    """Bound the memory that a call takes for the spectra of its tiles; the kernels' spectra come on top of it.

    Parameters
    ----------
    nbytes : int
        At first 256 MiB, or what ``NBFFTCONV_SCRATCH_BYTES`` says. Results do not depend on it, unless it rules out the
        tiles that would be chosen without it.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is less than 1.
    """
    global _scratch_limit
    if isinstance(nbytes, bool) or not isinstance(nbytes, (int, np.integer)):
        raise TypeError(f"the scratch limit must be an integer number of bytes, got {nbytes!r}")
    if nbytes < 1:
        raise ValueError(f"the scratch limit must be at least 1 byte, got {nbytes}")
    _scratch_limit = int(nbytes)


def get_scratch_limit() -> int:
    """Return the bound in bytes on the memory that a call takes for the spectra of its tiles."""
    return _scratch_limit


def plan_conv2d(
    input_size: Any,
    weight_size: Any,
    stride: Any = 1,
    padding: Padding = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    direction: str = "forward",
    dtype: Any = np.float32,
    algorithm: str = "auto",
    transform: str = "auto",
    tile: Any = None,
) -> ConvPlan:
    """Plan one pass of a convolution, to look at the decision or to pass it as `plan`.

    Parameters
    ----------
    input_size : sequence of int
        (batch, channels, height, width).
    weight_size : sequence of int
        (out channels, channels / groups, kernel height, kernel width).
    stride, padding, dilation, groups
        As in `nbfftconv.conv2d`.
    direction : {"forward", "grad_weight", "grad_input"}
        The pass.
    dtype : dtype
        float32 or float64.
    algorithm : {"auto", "fft", "direct"}
    transform : {"auto", "fftw"}
        What transforms the tiles.
    tile : int or pair of int, optional
        (height, width) of the tiles, instead of the planner's choice. At least as large as the kernel; with strides,
        as the kernel's longest phase.

    Returns
    -------
    ConvPlan

    Raises
    ------
    TypeError
        If a size is not an integer, or `dtype` is neither float32 nor float64.
    ValueError
        If the sizes do not make a convolution, a name is unknown, `tile` is too small or given with
        ``algorithm="direct"``, or not even one tile fits the scratch limit.
    """
    geometry = ConvGeometry.from_arguments(input_size, weight_size, stride, padding, dilation, groups)
    try:
        kind = np.dtype(dtype)
    except TypeError:
        kind = None
    if kind not in (np.float32, np.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("algorithm", algorithm, ALGORITHMS),
        ("transform", transform, TRANSFORMS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = None if tile is None else pair("tile", tile, 1)
    if size is not None and algorithm == "direct":
        raise ValueError(f"direct convolution has no tiles, got tile={tile!r}")
    return make_plan(geometry, direction, kind.newbyteorder("="), algorithm, size)


def make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str = "auto",
    tile: tuple[int, int] | None = None,
    weight_is_transformed: bool = False,
) -> ConvPlan:
    """Return the plan for a validated geometry, from memory if it was made before.

    `weight_is_transformed` says that the kernels' spectra are kept from call to call, so that a call does not pay for
    them.
    """
    return _make_plan(geometry, direction, dtype, algorithm, tile, weight_is_transformed, _scratch_limit)


@functools.lru_cache(maxsize=4096)
def _make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str,
    tile: tuple[int, int] | None,
    weight_is_transformed: bool,
    limit: int,
) -> ConvPlan:
    def direct(reason: str) -> ConvPlan:
        return ConvPlan(geometry, direction, dtype, "direct", None, None, 0, 0, 0, reason)

    if algorithm == "direct":
        return direct("it was asked for")
    slow = dtype.itemsize / 4
    direct_cost = _direct_cost(geometry) * slow
    sizes = problem_sizes(geometry)
    sides = ((tile[0],), (tile[1],)) if tile else [_tile_sides(*size) for size in sizes]
    axes = [[axis_tiles(geometry, axis, side) for side in sides[axis]] for axis in (0, 1)]
    best = None
    for vertical, horizontal in itertools.product(*axes):
        grid = TileGrid(vertical, horizontal, geometry.input_size[0])
        tile_bytes, weight_bytes = _spectra_bytes(geometry, grid, dtype.itemsize)
        if tile_bytes > limit or (weight_bytes > WEIGHT_SPECTRA_LIMIT and algorithm == "auto"):
            continue
        cost = slow * _fft_cost(geometry, grid, direction, weight_is_transformed, tile_bytes, limit)
        if best is None or cost < best[0]:
            best = cost, grid, tile_bytes, weight_bytes
    if best is None:
        if algorithm == "fft":
            raise ValueError(
                f"the spectra of one tile{f' of {tile}' if tile else ''} for input {geometry.input_size} and weight "
                f"{geometry.weight_size} do not fit the scratch limit of {limit} bytes; "
                "see nbfftconv.planner.set_scratch_limit"
            )
        return direct("no tile fits the limits of memory")
    cost, grid, tile_bytes, weight_bytes = best
    figures = f"the model expects {cost * 1e3:.3g} ms by FFT, {direct_cost * 1e3:.3g} ms direct, on one core"
    if algorithm == "auto" and tile is None and direct_cost <= cost:
        return direct(figures)
    block = _block_tiles(grid, tile_bytes, limit)
    chosen = "it was asked for" if algorithm == "fft" or tile is not None else figures
    return ConvPlan(geometry, direction, dtype, "fft", "fftw", grid, block, block * tile_bytes, weight_bytes, chosen)


def _tile_sides(outputs: int, taps: int) -> list[int]:
    """Lengths to try along one axis: products of small primes, up to one tile for all outputs."""
    whole = outputs + taps - 1
    # Past the largest tile, only as far as the tile is mostly not overlap.
    end = min(whole, max(LARGEST_TILE, 4 * taps))
    sides = [side for side in _smooth_numbers(2 * end) if side >= taps]
    enough = next((i for i, side in enumerate(sides) if side >= end), len(sides) - 1)
    return sides[: enough + 1]


@functools.lru_cache(maxsize=256)
def _smooth_numbers(end: int) -> list[int]:
    """Even products of 2, 3 and 5 (and 1) that are at most `end`; the power of two above it as well."""
    numbers = {1, 2 ** math.ceil(math.log2(max(2, end)))}
    for a in range(1, end.bit_length() + 1):
        for b in range(0, 3):
            for c in range(0, 2):
                if 2**a * 3**b * 5**c <= end:
                    numbers.add(2**a * 3**b * 5**c)
    return sorted(numbers)


def _spectra_bytes(geometry: ConvGeometry, grid: TileGrid, itemsize: int) -> tuple[int, int]:
    """Return the bytes of the spectra of one tile, input and output, and of all kernels."""
    frequencies = grid.vertical.tile * (grid.horizontal.tile // 2 + 1)
    spectrum = 2 * plane_stride(frequencies, itemsize) * itemsize
    filters, channels = geometry.weight_size[:2]
    tile_bytes = (geometry.input_size[1] * grid.channel_phases + filters) * spectrum
    return tile_bytes, filters * channels * grid.channel_phases * spectrum


def _block_tiles(grid: TileGrid, tile_bytes: int, limit: int) -> int:
    return max(1, min(grid.tiles, min(limit, BLOCK_BYTES) // tile_bytes))


def _direct_cost(geometry: ConvGeometry) -> float:
    rows = geometry.multiply_adds / geometry.output_size[3]
    return _DIRECT_CALL + 2 * geometry.multiply_adds / _DIRECT_RATE + _DIRECT_ROW * rows


def _fft_cost(
    geometry: ConvGeometry,
    grid: TileGrid,
    direction: str,
    weight_is_transformed: bool,
    tile_bytes: int,
    limit: int,
) -> float:
    samples = grid.vertical.tile * grid.horizontal.tile
    frequencies = grid.vertical.tile * (grid.horizontal.tile // 2 + 1)
    filters, channels = geometry.weight_size[:2]
    depth = channels * grid.channel_phases
    transform = 2.5 * samples * math.log2(samples + 1) / _FFT_RATE + 8 * samples / _COPY_RATE + _TRANSFORM_CALL
    kernels = 0 if weight_is_transformed and direction != "grad_weight" else filters * depth
    transforms = grid.tiles * (depth * geometry.groups + filters) + kernels
    products = 8 * frequencies * grid.tiles * filters * depth / _PRODUCT_RATE
    blocks = -(-grid.tiles // _block_tiles(grid, tile_bytes, limit))
    streamed = 8 * frequencies * filters * depth * blocks / _STREAM_RATE
    return transforms * transform + max(products, streamed) + _BLOCK * blocks + _FFT_CALL
