"""Geometry to plan: algorithm, tile, transform and blocking, by a cost model.

Cost model, in seconds of one core; its rates are those of a 2023 server core with 512-bit vectors, and only their
ratios matter:

- a transform of a T_y × T_x tile costs 2.5·T_y·T_x·log2(T_y·T_x) operations, and two passes over the tile to gather
  or scatter it;
- the products cost 8 operations for every frequency, tile, filter and channel of its group, at the rate of the
  micro-kernel, but not less than reading the kernels' spectra once a block of tiles; lanes without a tile cost the
  same;
- direct convolution costs 2 operations a multiply-add, lanes without a pixel included, and the arrays once; for
  groups of many filters, also the pixels gathered for every tap, and packing the kernels; its gradients, a fixed time
  for every row of pixels under every tap;
- a call, a block of tiles and the call of a transform have fixed costs.

1×1 kernels are left to direct convolution. Else the cheapest tile is taken whose block of at least one tile fits the
scratch limit and whose kernels' spectra fit `WEIGHT_SPECTRA_LIMIT`. Nothing here depends on the number of threads, so
that results do not either.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfftconv import direct, simd
from nbfftconv.direct import depthwise
from nbfftconv.geometry import ConvGeometry, Padding, pair
from nbfftconv.plan import DIRECTIONS, ConvPlan
from nbfftconv.scratch import get_scratch_limit
from nbfftconv.tiling import TileGrid, axis_tiles, problem_sizes
from nbfftconv.transforms import PADDING_CHANNELS, codelets, plane_stride

ALGORITHMS = ("auto", "fft", "direct")
TRANSFORMS = ("auto", "fftw", "codelet")

#: The automatic choice never needs more memory for the spectra of the kernels, in bytes.
WEIGHT_SPECTRA_LIMIT = 2**32
#: A block of tiles is at most this large, in bytes, so that what one stage writes is still in the last-level cache for
#: the next.
BLOCK_BYTES = 2**26
#: The largest tile side that is tried, unless the kernel or the caller asks for more.
LARGEST_TILE = 512

# Operations or bytes a second.
_FFT_RATE = 10e9
_PRODUCT_RATE = 45e9
_CODELET_RATE = 60e9
_TILE_PRODUCT_RATE = 130e9
_DENSE_RATE = 145e9
_WINDOW_RATE = 115e9
_GRADIENT_RATE = 9e9
_COPY_RATE = 6e9
_STREAM_RATE = 10e9
# Scalars a second.
_GATHER_RATE = 5e9
_PACK_RATE = 0.7e9
_DENSE_MOVE_RATE = 5e9
_WINDOW_MOVE_RATE = 4e9
# Seconds.
_FFT_CALL = 150e-6
_DIRECT_CALL = 60e-6
_GRADIENT_ROW = 8e-9
_BLOCK = 30e-6
_TRANSFORM_CALL = 0.2e-6


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
    transform : {"auto", "fftw", "codelet"}
        What transforms the tiles: FFTW, or generated code for tile sides of 8, 12, 16, 20, 24 and 32.
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
        If the sizes do not make a convolution, a name is unknown, `tile` is too small, given with
        ``algorithm="direct"`` or asked of the codelets and none of theirs, or not even one tile fits the scratch limit.
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
    return make_plan(geometry, direction, kind.newbyteorder("="), algorithm, transform, size)


def make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str = "auto",
    transform: str = "auto",
    tile: tuple[int, int] | None = None,
    weight_is_transformed: bool = False,
) -> ConvPlan:
    """Return the plan for a validated geometry, from memory if it was made before.

    `weight_is_transformed` says that the kernels' spectra are kept from call to call, so that none pays for them.
    """
    return _make_plan(
        geometry, direction, dtype, algorithm, transform, tile, weight_is_transformed, get_scratch_limit()
    )


@functools.lru_cache(maxsize=4096)
def _make_plan(
    geometry: ConvGeometry,
    direction: str,
    dtype: np.dtype,
    algorithm: str,
    transform: str,
    tile: tuple[int, int] | None,
    weight_is_transformed: bool,
    limit: int,
) -> ConvPlan:
    def direct_plan(reason: str) -> ConvPlan:
        memory = (0, 0)
        if direction == "forward":
            memory = (direct.scratch_bytes(geometry, dtype), direct.packed_bytes(geometry, dtype))
        return ConvPlan(geometry, direction, dtype, "direct", None, None, 0, *memory, reason)

    if algorithm == "direct":
        return direct_plan("it was asked for")
    is_free = algorithm == "auto" and transform == "auto" and tile is None
    if is_free and geometry.weight_size[2:] == (1, 1):
        return direct_plan("an FFT cannot save anything with a 1x1 kernel")
    slow = dtype.itemsize / 4
    direct_cost = _direct_cost(geometry, direction, dtype, weight_is_transformed) * slow
    best = None
    for name, grid in _candidates(geometry, transform, tile):
        memory = _Memory.of(geometry, grid, direction, dtype, name)
        if memory.unit > limit or (memory.weight > WEIGHT_SPECTRA_LIMIT and algorithm == "auto"):
            continue
        units = memory.block_units(limit)
        cost = slow * _fft_cost(geometry, grid, direction, weight_is_transformed, memory, units)
        if best is None or cost < best[0]:
            best = cost, name, grid, memory, units
    if best is None:
        if algorithm == "fft":
            raise ValueError(
                f"the spectra of one tile{f' of {tile}' if tile else ''} for input {geometry.input_size} and weight "
                f"{geometry.weight_size} do not fit the scratch limit of {limit} bytes; "
                "see nbfftconv.scratch.set_scratch_limit"
            )
        return direct_plan("no tile fits the limits of memory")
    cost, name, grid, memory, units = best
    figures = f"the model expects {cost * 1e3:.3g} ms by FFT, {direct_cost * 1e3:.3g} ms direct, on one core"
    if is_free and direct_cost <= cost:
        return direct_plan(figures)
    chosen = figures if is_free else "it was asked for"
    block = max(1, min(grid.tiles, units * memory.lanes))
    return ConvPlan(geometry, direction, dtype, "fft", name, grid, block, units * memory.unit, memory.weight, chosen)


def _candidates(geometry: ConvGeometry, transform: str, tile: tuple[int, int] | None) -> Iterator[tuple[str, TileGrid]]:
    """Yield the transforms and tile grids to choose from."""
    names = ["fftw", "codelet"] if transform == "auto" else [transform]
    if tile is not None and not set(tile) <= set(codelets.SIDES):
        if transform == "codelet":
            raise ValueError(f"there are codelets for tile sides {codelets.SIDES}, not for tile {tile}")
        names = ["fftw"]
    sizes = problem_sizes(geometry)
    for name in names:
        if tile is not None:
            sides = [(tile[0],), (tile[1],)]
        elif name == "fftw":
            sides = [_tile_sides(*size) for size in sizes]
        else:
            sides = [[side for side in codelets.SIDES if side >= taps] for _, taps in sizes]
            if transform == "codelet" and not all(sides):
                raise ValueError(f"no codelet is as large as the kernel {geometry.weight_size[2:]}")
        axes = [[axis_tiles(geometry, axis, side) for side in sides[axis]] for axis in (0, 1)]
        for vertical, horizontal in itertools.product(*axes):
            yield name, TileGrid(vertical, horizontal, geometry.input_size[0])


@dataclass(frozen=True)
class _Memory:
    """Bytes that a choice takes.

    Attributes
    ----------
    lanes : int
        Tiles, or filters, whose spectra are made together: a unit.
    units : int
        Units of tiles.
    unit : int
        Bytes of the spectra of one unit, input and output.
    weight : int
        Bytes of the kernels' spectra.
    filters : int
        Filters of all groups, with the lanes that have none.
    """

    lanes: int
    units: int
    unit: int
    weight: int
    filters: int

    @classmethod
    def of(cls, geometry: ConvGeometry, grid: TileGrid, direction: str, dtype: np.dtype, name: str) -> "_Memory":
        height, width = grid.vertical.tile, grid.horizontal.tile
        filters, channels = geometry.weight_size[:2]
        depth = channels * grid.channel_phases
        if name == "fftw":
            lanes, padding, tile = 1, 0, 0
            spectrum = 2 * plane_stride(height * (width // 2 + 1), dtype.itemsize) * dtype.itemsize
        else:
            lanes, padding = simd.lanes(dtype.type), PADDING_CHANNELS
            spectrum = 2 * height * (width // 2 + 1) * dtype.itemsize
            # grad_input cannot leave tiles in the place of their spectra
            tile = height * codelets.pitch(dtype.type, width) * dtype.itemsize if direction == "grad_input" else 0
        inputs = depth * geometry.groups
        unit = lanes * ((inputs + padding) * spectrum + inputs * tile + (filters + padding) * spectrum)
        lane_filters = geometry.groups * -(-filters // geometry.groups // lanes) * lanes
        weight = lane_filters * (depth + padding) * spectrum
        return cls(lanes, -(-grid.tiles // lanes), unit, weight, lane_filters)

    def block_units(self, limit: int) -> int:
        """Units of a block."""
        return max(1, min(self.units, min(limit, BLOCK_BYTES) // self.unit))


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


def _direct_cost(geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_packed: bool) -> float:
    images, filters, height, width = geometry.output_size
    if direction != "forward":
        rows = geometry.multiply_adds / width
        return _DIRECT_CALL + 2 * geometry.multiply_adds / _GRADIENT_RATE + _GRADIENT_ROW * rows
    taps = math.prod(geometry.weight_size[1:])
    lanes = simd.lanes(dtype.type)
    moved = math.prod(geometry.input_size) + math.prod(geometry.output_size)
    if depthwise.fits(geometry, dtype):
        products = 2 * images * filters * taps * _whole(height, 4) * _whole(width, lanes)
        return _DIRECT_CALL + products / _WINDOW_RATE + moved / _WINDOW_MOVE_RATE
    pixels = images * _whole(height * width, lanes)
    products = 2 * pixels * filters * taps
    gathered = pixels * geometry.groups * taps * (1 + lanes / width)
    packed = 0 if weight_is_packed else filters * taps
    return (
        _DIRECT_CALL + products / _DENSE_RATE + gathered / _GATHER_RATE + packed / _PACK_RATE + moved / _DENSE_MOVE_RATE
    )


def _whole(count: int, block: int) -> int:
    """The multiple of `block` that is next to `count`, or `count`."""
    return -(-count // block) * block


def _fft_cost(
    geometry: ConvGeometry, grid: TileGrid, direction: str, weight_is_transformed: bool, memory: _Memory, units: int
) -> float:
    samples = grid.vertical.tile * grid.horizontal.tile
    frequencies = grid.vertical.tile * (grid.horizontal.tile // 2 + 1)
    filters, channels = geometry.weight_size[:2]
    depth = channels * grid.channel_phases
    by_tiles = memory.lanes > 1
    fft_rate, product_rate = (_CODELET_RATE, _TILE_PRODUCT_RATE) if by_tiles else (_FFT_RATE, _PRODUCT_RATE)
    transform = 2.5 * samples * math.log2(samples + 1) / fft_rate + 8 * samples / _COPY_RATE + _TRANSFORM_CALL
    kernels = 0 if weight_is_transformed and direction != "grad_weight" else memory.filters * depth
    tiles = memory.units * memory.lanes
    transforms = tiles * (depth * geometry.groups + filters) + kernels
    if by_tiles:  # registers are filled by three units, and the kernels' entries read once for all units of a block
        product_rate *= units / (units + 0.9)
    products = 8 * frequencies * tiles * filters * depth / product_rate
    blocks = -(-memory.units // units)
    streamed = memory.weight * blocks / _STREAM_RATE
    return transforms * transform + max(products, streamed) + _BLOCK * blocks + _FFT_CALL
