"""Geometry to plan: algorithm, tile, transform and blocking, by a cost model.

Cost model, in seconds of one core; its rates are those of a 2023 server core with 512-bit vectors, and only their
ratios matter:

- a transform of a T_y × T_x tile costs 2.5·T_y·T_x·log2(T_y·T_x) operations, and two passes over the tile to gather
  or scatter it;
- the products cost 8 operations for every frequency, tile, filter and channel of its group, at the rate of the
  micro-kernel, but not less than reading the kernels' spectra once a block of tiles; lanes without a tile cost the
  same;
- direct convolution costs 2 operations a multiply-add, and a fixed time for every row of pixels under every tap;
- a call, a block of tiles and the call of a transform have fixed costs.

1×1 kernels are left to direct convolution. Else the cheapest tile is taken whose block of at least one tile fits the
scratch limit and whose kernels' spectra fit `WEIGHT_SPECTRA_LIMIT`. Nothing here depends on the number of threads, so
that results do not either.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import COLUMNS, ROWS
from nbfftconv.geometry import ConvGeometry, Padding, pair
from nbfftconv.plan import DIRECTIONS, ConvPlan, filters_of_share
from nbfftconv.scratch import get_scratch_limit
from nbfftconv.tiling import TileGrid, axis_tiles, problem_sizes
from nbfftconv.transforms import COMPLEX_BYTES, Layout, codelets, fftw, planar, step_stride

ALGORITHMS = ("auto", "fft", "direct")
TRANSFORMS = ("auto", "fftw", "codelet", "planar")
_LAYOUTS = {"fftw": fftw.layout, "codelet": codelets.layout, "planar": planar.layout}
_SIDES = {"codelet": codelets.SIDES, "planar": planar.SIDES}

#: The automatic choice never needs more memory for the spectra of the kernels, in bytes.
WEIGHT_SPECTRA_LIMIT = 2**32
#: A block of tiles is at most this large, in bytes, so that what one stage writes is still in the last-level cache for
#: the next.
BLOCK_BYTES = 3 * 2**25
#: The largest tile side that is tried, unless the kernel or the caller asks for more.
LARGEST_TILE = 512

# A fused block of tiles is at most this large: it stays in the second-level cache of its core.
_CORE_BYTES = 1_300_000
# Channels of a group up to which a fused pass is considered; beyond, it would read the kernels' spectra too often.
_FUSED_DEPTH = 16

# Operations a second, in float32.
_TRANSFORM_RATES = {"fftw": 10e9, "codelet": 60e9, "planar": 52e9}
_PRODUCT_RATES = {"fftw": 90e9, "codelet": 170e9, "planar": 90e9}
_DIRECT_RATE = 9e9
# Bytes a second: of arrays read and written, of spectra that go through the last-level cache, of kernels' spectra.
_READ_RATE = 8e9
_WRITE_RATE = 4.5e9
_SPECTRA_RATE = 7.5e9
_STREAM_RATE = 36e9
# Seconds.
_FFT_CALL = 150e-6
_DIRECT_CALL = 60e-6
_DIRECT_ROW = 8e-9
_BLOCK = 30e-6
_TILE_ROW = 5e-9
_TRANSFORM_CALL = 0.1e-6


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
    def direct(reason: str) -> ConvPlan:
        return ConvPlan(geometry, direction, dtype, "direct", None, None, False, 0, 0, 0, reason)

    if algorithm == "direct":
        return direct("it was asked for")
    is_free = algorithm == "auto" and transform == "auto" and tile is None
    if is_free and geometry.weight_size[2:] == (1, 1):
        return direct("an FFT cannot save anything with a 1x1 kernel")
    direct_cost = _direct_cost(geometry) * dtype.itemsize / 4
    best = None
    for choice in _choices(geometry, direction, dtype, transform, tile, limit):
        if choice.weight > WEIGHT_SPECTRA_LIMIT and algorithm == "auto":
            continue
        cost = _fft_cost(geometry, choice, direction, weight_is_transformed)
        if best is None or cost < best[0]:
            best = cost, choice
    if best is None:
        if algorithm == "fft":
            raise ValueError(
                f"the spectra of one tile{f' of {tile}' if tile else ''} for input {geometry.input_size} and weight "
                f"{geometry.weight_size} do not fit the scratch limit of {limit} bytes; "
                "see nbfftconv.scratch.set_scratch_limit"
            )
        return direct("no tile fits the limits of memory")
    cost, choice = best
    figures = f"the model expects {cost * 1e3:.3g} ms by FFT, {direct_cost * 1e3:.3g} ms direct, on one core"
    if is_free and direct_cost <= cost:
        return direct(figures)
    return ConvPlan(
        geometry,
        direction,
        dtype,
        "fft",
        choice.name,
        choice.grid,
        choice.fused,
        max(1, min(choice.grid.tiles, choice.block_units * choice.layout.lanes)),
        choice.block_units * choice.unit,
        choice.weight,
        figures if is_free else "it was asked for",
    )


def _candidates(geometry: ConvGeometry, transform: str, tile: tuple[int, int] | None) -> Iterator[tuple[str, TileGrid]]:
    """Yield the transforms and tile grids to choose from."""
    sizes = problem_sizes(geometry)
    for name in _LAYOUTS if transform == "auto" else [transform]:
        known = _SIDES.get(name)
        if tile is not None:
            if known and not set(tile) <= set(known):
                if transform == name:
                    raise ValueError(f"the {name} transform has tile sides {known}, not tile {tile}")
                continue
            sides = [(tile[0],), (tile[1],)]
        elif known:
            sides = [_sides_for(known, *size) for size in sizes]
            if transform == name and not all(sides):
                raise ValueError(f"no {name} tile of sides {known} is as large as the kernel {geometry.weight_size[2:]}")
        else:
            sides = [_tile_sides(*size) for size in sizes]
        axes = [[axis_tiles(geometry, axis, side) for side in sides[axis]] for axis in (0, 1)]
        for vertical, horizontal in itertools.product(*axes):
            yield name, TileGrid(vertical, horizontal, geometry.input_size[0])


def _sides_for(known: tuple[int, ...], outputs: int, taps: int) -> list[int]:
    """Sides, of those that a transform has, from the kernel's to the first that covers all outputs."""
    sides = [side for side in known if side >= taps]
    enough = next((i for i, side in enumerate(sides) if side >= outputs + taps - 1), len(sides))
    return sides[: enough + 1]


@dataclass(frozen=True)
class _Choice:
    """A transform, tile grid and blocking, with the memory that they take.

    Attributes
    ----------
    name : str
    grid : TileGrid
    dtype : numpy.dtype
    layout : Layout
    units : int
        Units of tiles.
    unit : int
        Bytes of the spectra of one unit, input and output.
    weight : int
        Bytes of the kernels' spectra.
    lane_filters : int
        Filters of all groups, with the lanes that have none.
    block_units : int
        Units whose spectra are in memory at once; of a thread, if fused.
    fused : bool
    shares : int
        Parts of a group's filters for each of which the input is transformed anew.
    """

    name: str
    grid: TileGrid
    dtype: np.dtype
    layout: Layout
    units: int
    unit: int
    weight: int
    lane_filters: int
    block_units: int
    fused: bool = False
    shares: int = 1

    @classmethod
    def of(cls, geometry: ConvGeometry, name: str, grid: TileGrid, direction: str, dtype: np.dtype) -> "_Choice":
        height, width = grid.vertical.tile, grid.horizontal.tile
        filters, channels = geometry.weight_size[:2]
        depth = channels * grid.channel_phases
        layout = _LAYOUTS[name](dtype.type, height, width)
        lanes = layout.lanes
        units = -(-grid.tiles // lanes)
        tile = lanes * height * layout.pitch * dtype.itemsize if direction == "grad_input" else 0
        inputs = depth * geometry.groups
        unit = layout.steps * (step_stride(inputs) + step_stride(filters)) + inputs * tile
        lane_filters = geometry.groups * -(-filters // geometry.groups // lanes) * lanes
        weight = lane_filters // lanes * layout.steps * step_stride(depth)
        return cls(name, grid, dtype, layout, units, unit, weight, lane_filters, block_units=0)

    @property
    def blocks(self) -> int:
        """Blocks of units."""
        return -(-self.units // self.block_units)

    def staged(self, limit: int) -> "_Choice":
        """Stage after stage, each over as many units as fit the limits."""
        units = max(1, min(self.units, min(limit, BLOCK_BYTES) // self.unit))
        return dataclasses.replace(self, block_units=units)

    def fuse(self, geometry: ConvGeometry, limit: int) -> "_Choice | None":
        """All stages of a block by one thread, if one fits a core's cache."""
        filters, depth = geometry.weight_size[0] // geometry.groups, geometry.weight_size[1] * self.grid.channel_phases
        share = filters_of_share(filters, depth, self.layout.lanes)
        unit = self.layout.steps * (step_stride(depth) + step_stride(min(ROWS, share)))
        tiles = 2 * self.layout.lanes * self.grid.vertical.tile * self.layout.pitch * self.dtype.itemsize
        units = min((_CORE_BYTES - tiles) // unit, self.units, 2 * COLUMNS)
        if depth > _FUSED_DEPTH or units < 1 or unit > limit:
            return None
        shares = -(-filters // share)
        return dataclasses.replace(self, unit=unit, block_units=units, fused=True, shares=shares)


def _choices(
    geometry: ConvGeometry, direction: str, dtype: np.dtype, transform: str, tile: tuple[int, int] | None, limit: int
) -> Iterator[_Choice]:
    """Yield what to choose from, as far as it fits the scratch limit."""
    for name, grid in _candidates(geometry, transform, tile):
        choice = _Choice.of(geometry, name, grid, direction, dtype)
        fused = choice.fuse(geometry, limit) if direction == "forward" else None
        if fused:
            yield fused
        if choice.unit <= limit:
            yield choice.staged(limit)


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


def _direct_cost(geometry: ConvGeometry) -> float:
    rows = geometry.multiply_adds / geometry.output_size[3]
    return _DIRECT_CALL + 2 * geometry.multiply_adds / _DIRECT_RATE + _DIRECT_ROW * rows


def _fft_cost(geometry: ConvGeometry, choice: "_Choice", direction: str, weight_is_transformed: bool) -> float:
    grid, layout = choice.grid, choice.layout
    height, width = grid.vertical.tile, grid.horizontal.tile
    itemsize = choice.dtype.itemsize
    lanes = simd.lanes(choice.dtype.type)
    slow = itemsize / 4
    filters, channels = geometry.weight_size[:2]
    depth = channels * grid.channel_phases
    operations = 2.5 * height * width * math.log2(height * width + 1)
    if choice.name == "planar":  # vectors are full of what is transformed twice: columns, then frequencies
        operations = 2.5 * layout.pitch * height * math.log2(height) + 5 * layout.steps * lanes * math.log2(width)
    transform = operations * slow / _TRANSFORM_RATES[choice.name] + _TILE_ROW * height + _TRANSFORM_CALL / layout.lanes
    tiles = choice.units * layout.lanes
    inputs = depth * geometry.groups
    transforms = tiles * (inputs * choice.shares + filters)
    if not weight_is_transformed or direction == "grad_weight":
        transforms += choice.lane_filters * depth
    spectrum = layout.steps * COMPLEX_BYTES  # of a unit
    multiply_adds = layout.steps * lanes * choice.units * filters * depth
    products = 8 * multiply_adds * slow / _PRODUCT_RATES[choice.name]
    # One unit of tiles leaves registers empty.
    products *= 1 + 0.3 / choice.block_units
    read, written = (itemsize * math.prod(size) for size in (geometry.input_size, geometry.output_size))
    through_cache = 0 if choice.fused else choice.units * spectrum * (inputs + filters)
    return (
        transforms * transform
        + products
        + (read * choice.shares) / _READ_RATE
        + written / _WRITE_RATE
        + through_cache / _SPECTRA_RATE
        + choice.weight * choice.blocks / _STREAM_RATE
        + (0 if weight_is_transformed else choice.weight / _SPECTRA_RATE)
        + _BLOCK * (1 if choice.fused else choice.blocks)
        + _FFT_CALL
    )
