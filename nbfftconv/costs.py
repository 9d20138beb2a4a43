"""Cost model: what an FFT plan can choose from, and the seconds that each choice and direct convolution take.

In seconds of one core, whose rates are fractions of the figures of `nbfftconv.machine`:

- a transform of a T_y × T_x tile costs 2.5·T_y·T_x·log2(T_y·T_x) operations, more where vectors are not full, and a
  fixed time for every row that is gathered or scattered;
- the products cost 8 operations for every frequency, tile, filter and channel of its group, at the rate of the
  micro-kernel, and reading the kernels' spectra once a block of tiles; lanes without a tile cost the same;
- spectra that a stage leaves to the next one pass through the last-level cache, those of a fused pass do not;
- kernels that are transposed, for dX to be a forward pass, are read and written once;
- input and output are read and written once, the input once for every share of the filters if fused, and its gradient
  as often as tiles overlap;
- direct convolution costs 2 operations a multiply-add, lanes without a pixel included, and the arrays once; for
  groups of many filters, also the pixels gathered for every tap, and packing the kernels; its gradients, a fixed time
  for every row of pixels under every tap, or, with respect to the kernels of groups of many filters, what is gathered;
- a call, a block of tiles, the call of a transform, a square of a panel that is transposed and, unless fused, a product
  of one of many groups at one frequency have fixed costs.

Rates are fitted to 780 plans of the layers of `perf/layers.py`, measured on one thread, stage by stage.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import COLUMNS, ROWS
from nbfftconv.direct import dense_grad_weight, depthwise
from nbfftconv.geometry import ConvGeometry
from nbfftconv.machine import Machine
from nbfftconv.plan import filters_of_share
from nbfftconv.tiling import TileGrid, axis_tiles, problem_sizes
from nbfftconv.transforms import COMPLEX_BYTES, Layout, codelets, fftw, planar, step_stride

#: Each transform's layout of tiles and spectra, in the order in which equal costs are decided.
LAYOUTS = {"fftw": fftw.layout, "codelet": codelets.layout, "planar": planar.layout}
_SIDES = {"codelet": codelets.SIDES, "planar": planar.SIDES}

# The spectra of a block of tiles are about this large, in bytes: what one stage writes is then still in the last-level
# cache for the next. If those of the kernels, read once a block, are larger, as large, but not more than the limit.
_BLOCK_BYTES = 24 * 2**20
_LARGEST_BLOCK_BYTES = 96 * 2**20
_LARGEST_SUMMED_BYTES = 160 * 2**20
#: The largest tile side that is tried, unless the kernel or the caller asks for more.
LARGEST_TILE = 512

# A fused block of tiles is at most this large: it stays in the second-level cache of its core.
_CORE_BYTES = 1_300_000
# Channels of a group up to which a fused pass is considered; beyond, it would read the kernels' spectra too often.
_FUSED_DEPTH = 16

# Fractions of the machine's `flops`, as measured where that is 165e9.
_FFTW_WIDTH = min(32, simd.VECTOR_BYTES) / simd.VECTOR_BYTES  # pyFFTW's FFTW has vectors of 32 bytes
_FFTW_RATE = 20 / 165 * _FFTW_WIDTH
# Of planar transforms, also of columns of more rows than that: their samples are on too many pages.
_PLANAR_RATE, _TALL_RATE = 54 / 165, 45 / 165
_TALL = 200
_CODELET_RATES = {
    8: 96 / 165, 9: 91 / 165, 10: 98 / 165, 12: 96 / 165, 13: 58 / 165, 14: 75 / 165, 15: 77 / 165, 16: 92 / 165,
    18: 60 / 165, 20: 61 / 165, 24: 60 / 165, 28: 51 / 165, 30: 47 / 165, 32: 63 / 165,
}  # fmt: skip
_PRODUCT_RATES = {"fftw": 125 / 165, "codelet": 165 / 165, "planar": 125 / 165}
_DENSE_RATE = 145 / 165
_WINDOW_RATE = 115 / 165
_GRADIENT_RATE = 9 / 165
_GRAD_WEIGHT_RATE = 152 / 165
# Scalars that direct convolution gathers or packs, as well.
_GATHER_RATE = 5 / 165
_GRAD_WEIGHT_GATHER_RATE = 3.7 / 165
_PACK_RATE = 0.7 / 165
# Fractions of its `bandwidth`, as measured where that is 25e9: of arrays read and written, of spectra that go through
# the last-level cache, of kernels' spectra written past the caches, read, and read and written, of kernels transposed.
_READ_RATE = 6 / 25
_WRITE_RATE = 10 / 25
_SPECTRA_RATES = {"fftw": 8 / 25, "codelet": 35 / 25, "planar": 8 / 25}
_KERNEL_RATE = 19 / 25
_STREAM_RATES = {"fftw": 13 / 25, "codelet": 33 / 25, "planar": 13 / 25}
_SUM_RATE = 15 / 25
_TRANSPOSE_RATE = 11 / 25
# Scalars of input and output of direct convolution.
_DENSE_MOVE_RATE = 5 / 25
_WINDOW_MOVE_RATE = 4 / 25
# Seconds.
_FFT_CALL = 150e-6
_DIRECT_CALL = 60e-6
_GRADIENT_ROW = 8e-9
_BLOCK = 30e-6
_GROUP_PRODUCT = 0.1e-6
_SQUARE = 80e-9
_TILE_ROWS = {"fftw": 3e-9, "codelet": 1.3e-9, "planar": 3e-9}
_TRANSFORM_CALL = 0.1e-6


def _candidates(geometry: ConvGeometry, transform: str, tile: tuple[int, int] | None) -> Iterator[tuple[str, TileGrid]]:
    """Yield the transforms and tile grids to choose from."""
    sizes = problem_sizes(geometry)
    for name in LAYOUTS if transform == "auto" else [transform]:
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
                raise ValueError(f"no {name} tile, of sides {known}, holds the kernel {geometry.weight_size[2:]}")
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
class Choice:
    """A transform, tile grid and blocking, with the memory that they take.

    Attributes
    ----------
    geometry : ConvGeometry
    direction : str
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

    geometry: ConvGeometry
    direction: str
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
    def of(cls, geometry: ConvGeometry, direction: str, name: str, grid: TileGrid, dtype: np.dtype) -> "Choice":
        """Return the choice with all but its blocking."""
        height, width = grid.vertical.tile, grid.horizontal.tile
        filters, channels = geometry.weight_size[:2]
        depth = channels * grid.channel_phases
        layout = LAYOUTS[name](dtype.type, height, width)
        lanes = layout.lanes
        units = -(-grid.tiles // lanes)
        unit = layout.steps * (step_stride(depth * geometry.groups) + step_stride(filters))
        lane_filters = geometry.groups * -(-filters // geometry.groups // lanes) * lanes
        weight = lane_filters // lanes * layout.steps * step_stride(depth)
        return cls(geometry, direction, name, grid, dtype, layout, units, unit, weight, lane_filters, block_units=0)

    @property
    def input_bytes(self) -> int:
        """Bytes of the input's spectra, of all tiles."""
        depth = self.geometry.input_size[1] * self.grid.channel_phases
        return self.units * self.layout.steps * step_stride(depth)

    @property
    def blocks(self) -> int:
        """Blocks of units."""
        return -(-self.units // self.block_units)

    def staged(self, limit: int) -> "Choice":
        """Stage after stage, each over as many units as fit the limits."""
        streamed = min(self.weight, _LARGEST_BLOCK_BYTES)
        if self.direction == "grad_weight":  # read and written with every block
            streamed = min(4 * self.weight, _LARGEST_SUMMED_BYTES)
        size = min(limit, max(_BLOCK_BYTES, streamed))
        units = max(1, min(self.units, size // self.unit))
        blocks = max(1, -(-self.units // units))
        units = max(1, -(-self.units // blocks))
        return dataclasses.replace(self, block_units=units)

    def fuse(self, limit: int) -> "Choice | None":
        """All stages of a block by one thread, if one fits a core's cache."""
        filters, channels = self.geometry.weight_size[0] // self.geometry.groups, self.geometry.weight_size[1]
        depth = channels * self.grid.channel_phases
        share = filters_of_share(filters, depth, self.layout.lanes)
        unit = self.layout.steps * (step_stride(depth) + step_stride(min(ROWS, share)))
        tiles = 2 * self.layout.lanes * self.grid.vertical.tile * self.layout.pitch * self.dtype.itemsize
        units = min((_CORE_BYTES - tiles) // unit, limit // unit, self.units, 2 * COLUMNS)
        if depth > _FUSED_DEPTH or units < 1:
            return None
        shares = -(-filters // share)
        return dataclasses.replace(self, unit=unit, block_units=units, fused=True, shares=shares)


def choices(
    geometry: ConvGeometry, direction: str, dtype: np.dtype, transform: str, tile: tuple[int, int] | None, limit: int
) -> Iterator[Choice]:
    """Yield what to choose from, as far as it fits the scratch limit."""
    for name, grid in _candidates(geometry, transform, tile):
        choice = Choice.of(geometry, direction, name, grid, dtype)
        fused = choice.fuse(limit) if direction == "forward" else None
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


def direct_cost(
    geometry: ConvGeometry, direction: str, dtype: np.dtype, weight_is_packed: bool, machine: Machine
) -> float:
    """Return the seconds of direct convolution."""
    flops, slow = machine.flops, dtype.itemsize / 4
    images, filters, height, width = geometry.output_size
    if direction == "grad_weight" and dense_grad_weight.fits(geometry, dtype):
        products, gathered = dense_grad_weight.work(geometry, dtype)
        return (
            _DIRECT_CALL
            + 2 * slow * products / (flops * _GRAD_WEIGHT_RATE)
            + slow * gathered / (flops * _GRAD_WEIGHT_GATHER_RATE)
            + dtype.itemsize * math.prod(geometry.weight_size) / (machine.bandwidth * _WRITE_RATE)
        )
    if direction != "forward":
        rows = geometry.multiply_adds / width
        return _DIRECT_CALL + slow * (2 * geometry.multiply_adds / (flops * _GRADIENT_RATE) + _GRADIENT_ROW * rows)
    taps = math.prod(geometry.weight_size[1:])
    lanes = simd.lanes(dtype.type)
    moved = slow * (math.prod(geometry.input_size) + math.prod(geometry.output_size))
    if depthwise.fits(geometry, dtype):
        products = 2 * slow * images * filters * taps * _whole(height, 4) * _whole(width, lanes)
        return _DIRECT_CALL + products / (flops * _WINDOW_RATE) + moved / (machine.bandwidth * _WINDOW_MOVE_RATE)
    pixels = images * _whole(height * width, lanes)
    products = 2 * slow * pixels * filters * taps
    gathered = slow * pixels * geometry.groups * taps * (1 + lanes / width)
    packed = 0 if weight_is_packed else slow * filters * taps
    return (
        _DIRECT_CALL
        + products / (flops * _DENSE_RATE)
        + gathered / (flops * _GATHER_RATE)
        + packed / (flops * _PACK_RATE)
        + moved / (machine.bandwidth * _DENSE_MOVE_RATE)
    )


def transposition_cost(geometry: ConvGeometry, dtype: np.dtype, machine: Machine) -> float:
    """Return the seconds of transposing kernels, for their gradient at the input to be a forward pass."""
    return 2 * dtype.itemsize * math.prod(geometry.weight_size) / (machine.bandwidth * _TRANSPOSE_RATE)


def _whole(count: int, block: int) -> int:
    """The multiple of `block` that is next to `count`, or `count`."""
    return -(-count // block) * block


class FftCost(NamedTuple):
    """Seconds of a choice: the input, output and kernels to spectra or back, the products, and what is fixed."""

    input: float
    output: float
    weight: float
    rest: float


def fft_cost(choice: Choice, weight_is_transformed: bool, machine: Machine) -> FftCost:
    """Return the seconds of a choice."""
    geometry, direction, grid, layout = choice.geometry, choice.direction, choice.grid, choice.layout
    height, width = grid.vertical.tile, grid.horizontal.tile
    itemsize = choice.dtype.itemsize
    lanes = simd.lanes(choice.dtype.type)
    slow = itemsize / 4
    filters, channels = geometry.weight_size[:2]
    depth = channels * grid.channel_phases
    samples = height * width

    def transform(columns: int, rows: int = height) -> float:  # of a tile of which so many are needed
        if choice.name != "codelet":
            rows = height
        if choice.name == "planar":  # vectors are full of what is transformed twice: columns, then frequencies
            rate = _TALL_RATE if height > _TALL else _PLANAR_RATE
            operations = 2.5 * _whole(columns, 2 * lanes) * height * math.log2(height) / rate
            operations += 5 * layout.steps * lanes * math.log2(width) / _PLANAR_RATE
        elif choice.name == "codelet":  # rows are transformed before the columns are
            operations = 2.5 * samples * sum(math.log2(side) / _CODELET_RATES[side] for side in (height, width))
            operations *= (1 + rows / height) / 2
        else:
            operations = 2.5 * samples * math.log2(samples + 1) / _FFTW_RATE
        return operations * slow / machine.flops + _TILE_ROWS[choice.name] * rows + _TRANSFORM_CALL / layout.lanes

    tiles = choice.units * layout.lanes
    spectrum = layout.steps * COMPLEX_BYTES  # of a unit
    spectra_rate = machine.bandwidth * _SPECTRA_RATES[choice.name]
    through_cache = 0 if choice.fused else choice.units * spectrum / spectra_rate

    def both_ways(channels: int, columns: int, size: tuple[int, ...], rate: float, times: float = 1) -> float:
        moved = times * itemsize * math.prod(size) / (machine.bandwidth * rate)
        return channels * (tiles * transform(columns) + through_cache) + moved

    transposed = 0.0
    if direction == "grad_weight" and layout.lanes > 1:  # panels, whose lanes are filters
        multiply_adds = layout.steps * grid.tiles * choice.lane_filters * depth
        transposed = layout.steps * choice.units * choice.lane_filters / lanes * _SQUARE
    else:  # one unit of tiles leaves registers empty
        multiply_adds = layout.steps * lanes * choice.units * filters * depth * (1 + 0.2 / choice.block_units)
    products = 8 * multiply_adds * slow / (machine.flops * _PRODUCT_RATES[choice.name])
    rate = _SUM_RATE if direction == "grad_weight" else _STREAM_RATES[choice.name]
    streamed = choice.weight * choice.blocks / (machine.bandwidth * rate)
    weight, taps = 0.0, grid.horizontal.taps
    if direction == "grad_weight":
        weight = choice.lane_filters * depth * transform(taps) + choice.weight / spectra_rate
    elif not weight_is_transformed:
        kernel = transform(taps, grid.vertical.taps)
        weight = choice.lane_filters * depth * kernel + choice.weight / (machine.bandwidth * _KERNEL_RATE)
    blocks = _BLOCK * (1 if choice.fused else choice.blocks)
    if geometry.groups > 1 and not choice.fused:
        blocks += _GROUP_PRODUCT * geometry.groups * layout.steps * choice.blocks
    cores = grid.vertical.core * grid.horizontal.core
    overlap = samples / cores if direction == "grad_input" else 1
    return FftCost(
        choice.shares * both_ways(depth * geometry.groups, width, geometry.input_size, _READ_RATE, overlap),
        both_ways(filters, grid.horizontal.core, geometry.output_size, _WRITE_RATE),
        weight,
        products + transposed + streamed + blocks + _FFT_CALL,
    )
