"""Cost model of transforms: the tiles and blockings that a plan can choose from, and the seconds that each takes.

TileChoices are counted in hundreds, so all of them are numbers in arrays.

In seconds of one core, whose rates are fractions of the figures of `nbfftconv.machine`:

- a transform of a T_y × T_x tile costs the operations that it says, for an FFT 2.5·T_y·T_x·log2(T_y·T_x), more where
  vectors are not full, and a fixed time for every row that is gathered or scattered;
- the products cost 8 operations, of real entries 2, for every entry of a bin, tile, filter and channel of its group, at
  the rate of the micro-kernel, and reading the kernels' spectra once a block of tiles; lanes without a tile cost the
  same, but for few tiles of real entries; the matrix unit takes a share of that;
- spectra that a stage leaves to the next one pass through the last-level cache, those of a fused pass do not;
- kernels that are transposed, for dX to be a forward pass, are read and written once;
- input and output are read and written once, the input once for every filter block if fused, and its gradient as often
  as tiles overlap;
- a call, a block of tiles, the call of a transform, a square of a panel that is transposed and, unless fused, a product
  of one of many groups at one frequency have fixed costs.

Rates are fitted by `perf/fit_costs.py` to plans that it measured, and are in `fitted_rates.py`.
"""

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nbfftconv import rates, simd, split_product
from nbfftconv.accumulate import COMPLEX, REAL
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Inapplicable
from nbfftconv.machine import Machine
from nbfftconv.passes.few_tiles import few_tiles
from nbfftconv.passes.plan import PLANS, TiledPlan, filters_of_block
from nbfftconv.rounding import cdiv
from nbfftconv.target import TARGET
from nbfftconv.tiling import AxisTiles, TileGrid, axis_tiles, problem_sizes
from nbfftconv.transforms import Transform, bin_stride

# The spectra of a block of tiles are about this large, in bytes: what one stage writes is then still in the last-level
# cache for the next. If those of the kernels, read once a block, are larger, as large, but not more than the limit.
_BLOCK_BYTES = TARGET.last_level_bytes * 3 // 4
_LARGEST_BLOCK_BYTES = 3 * TARGET.last_level_bytes
_LARGEST_SUMMED_BYTES = 5 * TARGET.last_level_bytes
#: The largest tile side that is tried, unless the kernel or the caller asks for more.
LARGEST_TILE = 512

# A fused block of tiles is at most this large: it stays in the second-level cache of its core.
_CORE_BYTES = TARGET.l2_bytes * 62 // 100
# So many times longer than of other products the matrix unit takes of panels, whose columns it transposes.
_PANELS = 1.3
# Channels of a group up to which a fused pass of complex spectra is considered; beyond, it would read those of the
# kernels too often.
_FUSED_DEPTH = 16
# Lane blocks of a fused pass of real spectra, and work items: enough for many threads; and as few as there are, by
# filter blocks, where tiles alone would be fewer.
_LANE_BLOCKS, _ITEMS, _FEWEST_ITEMS = 2, 24, 2

# So much longer take products of few tiles than by their number.
_FEW_TILES = 1.5

# Fractions of the machine's `bandwidth`: of arrays that are read, of those that are written, of kernels' spectra
# written past the caches (`kernels`) or read and written (`sums`), of kernels transposed. Seconds of a call, a block of
# tiles, a product of one of many groups, a square of a panel that is transposed, and the call of a transform.
_RATES = rates.of("fft")


#: An array, or one number for all.
Numbers = Any


class Tiles(NamedTuple):
    """Tiles of some transforms, as arrays: all that does not depend on a geometry.

    Attributes
    ----------
    transform : numpy.ndarray
        Index in the transforms that are chosen from.
    height, width : numpy.ndarray
        Sides.
    lanes, bins : numpy.ndarray
        As of their layout.
    entry : numpy.ndarray
        Bytes of an entry of a spectrum.
    nbytes : numpy.ndarray
        Bytes of a tile in memory.
    base, column, row : numpy.ndarray
        Seconds of a transform, and on top of that of every column, in whole pairs of vectors, and row that is needed.
    product : numpy.ndarray
        Seconds of a multiply-add of entries.
    spectra, stream : numpy.ndarray
        Seconds of a byte of spectra that go through the last-level cache, and of kernels' spectra that are read.
    read, write : numpy.ndarray
        Seconds of a byte of an array that is read, or written.
    gathered, kernel : numpy.ndarray
        Seconds of a sample that is gathered alone, and of a kernel's gradient that is written.
    """

    transform: Numbers
    height: Numbers
    width: Numbers
    lanes: Numbers
    bins: Numbers
    entry: Numbers
    nbytes: Numbers
    base: Numbers
    column: Numbers
    row: Numbers
    product: Numbers
    spectra: Numbers
    stream: Numbers
    read: Numbers
    write: Numbers
    gathered: Numbers
    kernel: Numbers


@functools.lru_cache(maxsize=32)
def _table(
    index: int,
    transform: Transform,
    vertical: tuple[int, ...],
    horizontal: tuple[int, ...],
    dtype: np.dtype,
    machine: Machine,
) -> np.ndarray:
    """Return the fields of `Tiles`, [field, vertical side, horizontal side], of one transform."""
    slow = dtype.itemsize / 4
    # floating-point numbers: large sizes cannot overflow, and those below 2^52 are exact
    height, width = np.meshgrid(np.array(vertical, float), np.array(horizontal, float), indexing="ij")
    layout = transform.layout(dtype.type, height, width)
    frequencies: Numbers = layout.bins * simd.lanes(dtype.type)
    operations = transform.operations(height, width, frequencies)
    base, column, row = (slow * of_tile / machine.flops for of_tile in operations)
    base = base + _RATES["transform_call"] / layout.lanes + (0 if transform.skips_rows else transform.row * height)
    tiles = Tiles(
        transform=index,
        height=height,
        width=width,
        lanes=layout.lanes,
        bins=layout.bins,
        entry=layout.vectors * simd.VECTOR_BYTES,
        nbytes=height * layout.pitch * dtype.itemsize,
        base=base,
        column=column,
        row=row + transform.row if transform.skips_rows else 0.0,
        product=2 * layout.vectors**2 * slow / (machine.flops * transform.product_rate),
        spectra=1 / (machine.bandwidth * transform.spectra_rate),
        stream=1 / (machine.bandwidth * transform.stream_rate),
        read=1 / (machine.bandwidth * (transform.read_rate or _RATES["read"])),
        write=1 / (machine.bandwidth * (transform.write_rate or _RATES["write"])),
        gathered=transform.gathered,
        kernel=transform.kernel,
    )
    return np.stack([np.broadcast_to(field, height.shape) for field in tiles])


def _tiles(
    geometry: ConvGeometry,
    dtype: np.dtype,
    transforms: tuple[Transform, ...],
    is_asked: bool,
    tile: tuple[int, int] | None,
    machine: Machine,
) -> Tiles:
    """Return the tiles to choose from; of a transform that was asked for, a choice that there is not is an error."""
    sizes, found = problem_sizes(geometry), []
    sides: list[tuple[int, ...]]
    for index, transform in enumerate(transforms):
        sides = [_sides(transform, taps, axis) for axis, (_, taps) in enumerate(sizes)]
        if tile is not None:
            wrong = [of_axis for of_axis, side in zip(sides, tile, strict=True) if side not in of_axis]
            if transform.sides and wrong:
                if is_asked or len(transforms) == 1:
                    raise Inapplicable(f"the {transform.name} transform has tile sides {wrong[0]}, not tile {tile}")
                continue
            for axis, side in enumerate(tile):
                axis_tiles(geometry, axis, side)  # raises where the kernel does not fit
            sides, ranges = [tile[:1], tile[1:]], [slice(None)] * 2
        else:
            ranges = [_sides_for(of_axis, *size) for of_axis, size in zip(sides, sizes, strict=True)]
            if is_asked and any(r.start >= len(s) for r, s in zip(ranges, sides, strict=True)):
                raise ValueError(
                    f"no {transform.name} tile, of sides {sides[0]}, holds the kernel {geometry.weight_size[2:]}"
                )
        table = _table(index, transform, *sides, dtype, machine)
        found.append(table[:, ranges[0], ranges[1]].reshape(len(table), -1))
    if not found:
        raise ValueError(f"no transform has tiles of {tile}")
    return Tiles(*np.concatenate(found, axis=1))


def _sides(transform: Transform, taps: int, axis: int) -> tuple[int, ...]:
    """Return the sides of a transform for so many taps; of one that has any, those to try."""
    return transform.sides(taps, axis) if transform.sides else _smooth_sides(taps)


def _smooth_sides(taps: int) -> tuple[int, ...]:
    """Lengths to try along an axis: products of small primes, from the last power of two that is at most `taps`."""
    return _smooth_numbers(2 ** (taps.bit_length() - 1), 2 ** (_largest_side(taps) - 1).bit_length())


def _largest_side(taps: int) -> int:
    """Past the largest tile, only as far as the tile is mostly not overlap."""
    return max(LARGEST_TILE, 4 * taps)


@functools.lru_cache(maxsize=64)
def _smooth_numbers(first: int, last: int) -> tuple[int, ...]:
    """Even products of 2, 3 and 5 (and 1)."""
    powers = itertools.product(range(1, last.bit_length()), range(3), range(2))
    numbers = {1, *(2**a * 3**b * 5**c for a, b, c in powers)}
    return tuple(sorted(number for number in numbers if first <= number <= last))


def _sides_for(sides: tuple[int, ...], outputs: int, taps: int) -> slice:
    """Of sides, those from the kernel's to the first that covers all outputs, or is as large as is tried."""
    end = min(outputs + taps - 1, _largest_side(taps))
    return slice(bisect.bisect_left(sides, taps), bisect.bisect_left(sides, end) + 1)


@dataclass(frozen=True)
class TileChoices:
    """Tiles to choose from, with the memory that their spectra take; numbers are arrays.

    Attributes
    ----------
    geometry : ConvGeometry
    dtype : numpy.dtype
    transforms : tuple of Transform
    tiles : Tiles
    grid : TileGrid
        Of arrays.
    lane_blocks : numpy.ndarray
        Lane blocks of tiles.
    lane_block : numpy.ndarray
        Bytes of the spectra of one lane_block, input and output.
    weight : numpy.ndarray
        Bytes of the kernels' spectra.
    lane_filters : numpy.ndarray
        Filters of all groups, with the lanes that have none.
    """

    geometry: ConvGeometry
    dtype: np.dtype
    transforms: tuple[Transform, ...]
    tiles: Tiles
    grid: TileGrid
    lane_blocks: np.ndarray
    lane_block: np.ndarray
    weight: np.ndarray
    lane_filters: np.ndarray

    @classmethod
    def of(
        cls, geometry: ConvGeometry, dtype: np.dtype, transforms: tuple[Transform, ...], tiles: Tiles
    ) -> "TileChoices":
        """Return the choices."""
        sizes, sides = problem_sizes(geometry), (tiles.height, tiles.width)
        vertical, horizontal = (_axis(geometry, axis, *sizes[axis], sides[axis]) for axis in (0, 1))
        grid = TileGrid(vertical, horizontal, geometry.input_size[0])
        filters, channels = geometry.weight_size[:2]
        depth = channels * grid.channel_phases
        lane_blocks = _ceil(grid.tiles, tiles.lanes)
        lane_block = tiles.bins * (bin_stride(depth * geometry.groups, tiles.entry) + bin_stride(filters, tiles.entry))
        lane_filters = geometry.groups * _ceil(filters // geometry.groups, tiles.lanes) * tiles.lanes
        weight = lane_filters / tiles.lanes * tiles.bins * bin_stride(depth, tiles.entry)
        return cls(geometry, dtype, transforms, tiles, grid, lane_blocks, lane_block, weight, lane_filters)

    @property
    def input_bytes(self) -> np.ndarray:
        """Bytes of the input's spectra, of all tiles."""
        depth = self.geometry.input_size[1] * self.grid.channel_phases
        return self.lane_blocks * self.tiles.bins * bin_stride(depth, self.tiles.entry)

    def staged(self, direction: str, limit: int) -> "BlockedChoices":
        """Stage after stage, each over as many lane_blocks as fit the limits."""
        streamed = np.minimum(self.weight, _LARGEST_BLOCK_BYTES)
        if direction == "grad_weight":  # read and written with every block
            streamed = np.minimum(4 * self.weight, _LARGEST_SUMMED_BYTES)
        size = np.minimum(limit, np.maximum(_BLOCK_BYTES, streamed))
        lane_blocks = np.maximum(1, np.minimum(self.lane_blocks, np.floor(size / self.lane_block)))
        blocks = np.maximum(1, _ceil(self.lane_blocks, lane_blocks))
        lane_blocks = np.maximum(1, _ceil(self.lane_blocks, blocks))
        return BlockedChoices(
            **vars(self), direction=direction, block_lane_blocks=lane_blocks, fits=self.lane_block <= limit
        )

    def fuse(self, limit: int) -> "BlockedChoices | None":
        """All stages of a block of a forward pass by one thread, where one fits a core's cache."""
        filters, channels = self.geometry.weight_size[0] // self.geometry.groups, self.geometry.weight_size[1]
        depth = channels * self.grid.channel_phases
        is_real = all(transform.layout(self.dtype.type, 1, 1).vectors == 1 for transform in self.transforms)
        if depth > _FUSED_DEPTH and not is_real:
            return None
        blocking = REAL if is_real else COMPLEX
        block = filters_of_block(filters, depth, self.tiles.lanes)
        of_output = bin_stride(np.minimum(blocking.fused_rows, block).astype(np.int64), blocking.entry_bytes)
        lane_block = self.tiles.bins * (bin_stride(depth, blocking.entry_bytes) + of_output)
        tiles = 2 * self.tiles.lanes * self.tiles.nbytes
        if is_real:
            # A core's cache holds the spectra of some lane blocks, while the kernels' stream past: where these come
            # from memory, for a whole block of C in registers.
            most = np.where(self.weight > TARGET.last_level_bytes, blocking.columns, _LANE_BLOCKS)
            lane_blocks = np.minimum(most, np.floor(self.lane_blocks * self.geometry.groups / _ITEMS))
            lane_blocks = np.minimum(lane_blocks, np.floor(limit / lane_block))
            fits = lane_block <= min(limit, TARGET.l2_bytes // 2)
        else:
            lane_blocks = np.floor(np.minimum(_CORE_BYTES - tiles, limit) / lane_block)
            lane_blocks = np.minimum(np.minimum(lane_blocks, self.lane_blocks), 2 * blocking.columns)
            fits = lane_blocks >= 1
        lane_blocks, filter_blocks = np.maximum(lane_blocks, 1), _ceil(filters, block)
        if is_real:
            items = self.geometry.groups * _ceil(self.lane_blocks, lane_blocks)
            parts = np.minimum(_FEWEST_ITEMS, _ceil(filters, self.tiles.lanes))
            filter_blocks = np.maximum(filter_blocks, np.where(items < _FEWEST_ITEMS, parts, 1))
        return BlockedChoices(
            **(vars(self) | {"lane_block": lane_block}),
            direction="forward",
            block_lane_blocks=lane_blocks,
            fits=fits,
            fused=True,
            filter_blocks=filter_blocks,
        )


@dataclass(frozen=True)
class BlockedChoices(TileChoices):
    """Tiles to choose from for a pass, with their blocking.

    Attributes
    ----------
    direction : str
        The pass.
    block_lane_blocks : numpy.ndarray
        Lane blocks whose spectra are in memory at once; of a thread, if fused.
    fits : numpy.ndarray
        Whether a block of at least one lane_block fits the limits.
    fused : bool
    filter_blocks : numpy.ndarray or int
        Parts of a group's filters for each of which the input is transformed anew.
    """

    direction: str
    block_lane_blocks: np.ndarray
    fits: np.ndarray
    fused: bool = False
    filter_blocks: np.ndarray | int = 1

    @property
    def blocks(self) -> np.ndarray:
        """Blocks of lane_blocks."""
        return _ceil(self.lane_blocks, self.block_lane_blocks)

    def plan(self, index: int, reason: str, seconds: float) -> TiledPlan:
        """Return the plan of one of the choices."""
        tile = int(self.tiles.height[index]), int(self.tiles.width[index])
        vertical, horizontal = (axis_tiles(self.geometry, axis, side) for axis, side in enumerate(tile))
        grid = TileGrid(vertical, horizontal, self.geometry.input_size[0])
        block_lane_blocks = int(self.block_lane_blocks[index])
        transform = self.transforms[int(self.tiles.transform[index])]
        return PLANS[transform.algorithm](
            geometry=self.geometry,
            direction=self.direction,
            dtype=self.dtype,
            scratch_bytes=block_lane_blocks * int(self.lane_block[index]),
            weight_bytes=int(self.weight[index]),
            reason=reason,
            seconds=seconds,
            transform=transform.name,
            grid=grid,
            fused=self.fused,
            block_tiles=max(1, min(grid.tiles, block_lane_blocks * int(self.tiles.lanes[index]))),
        )


def _axis(geometry: ConvGeometry, axis: int, outputs: int, taps: int, sides: np.ndarray) -> AxisTiles:
    """Cover the outputs along an axis as `axis_tiles` does, by tiles of an array of sides."""
    gained = sides - (taps - 1)
    tiles: Any = {"tile": sides, "outputs": gained, "count": _ceil(outputs, gained)}  # arrays, where a plan has numbers
    return dataclasses.replace(axis_tiles(geometry, axis, taps), **tiles)


def _ceil(count: Numbers, size: Numbers) -> Numbers:
    """`count` / `size`, rounded up; of floating-point numbers, whose remainders NumPy is slow to compute."""
    return np.ceil(count / size)


def choices_of(
    geometry: ConvGeometry,
    dtype: np.dtype,
    transforms: tuple[Transform, ...],
    known: Iterable[tuple[str, tuple[int, int]]],
    machine: Machine,
) -> TileChoices:
    """Return some tiles, by the names of their transforms, that the planner may choose for images of any size."""
    sizes, found = problem_sizes(geometry), []
    indices = {transform.name: index for index, transform in enumerate(transforms)}
    for name, tile in known:
        if name not in indices:
            continue
        transform = transforms[indices[name]]
        sides = [_sides(transform, taps, axis) for axis, (_, taps) in enumerate(sizes)]
        if tile[0] in sides[0] and tile[1] in sides[1]:
            table = _table(indices[name], transform, *sides, dtype, machine)
            found.append(table[:, sides[0].index(tile[0]), sides[1].index(tile[1])])
    tiles = Tiles(*np.array(found).reshape(-1, len(Tiles._fields)).T)
    return TileChoices.of(geometry, dtype, transforms, tiles)


@functools.lru_cache(maxsize=4)
def choices_for(
    geometry: ConvGeometry,
    dtype: np.dtype,
    transforms: tuple[Transform, ...],
    is_asked: bool,
    tile: tuple[int, int] | None,
    machine: Machine,
) -> TileChoices:
    """Return all tiles to choose from; kept for a moment, as the passes of a step come together."""
    return TileChoices.of(geometry, dtype, transforms, _tiles(geometry, dtype, transforms, is_asked, tile, machine))


def blocked(choices: TileChoices, direction: str, limit: int) -> list[BlockedChoices]:
    """Return the choices with their blocking: first fused passes, if there may be some."""
    fused = choices.fuse(limit) if direction == "forward" else None
    return [*([] if fused is None else [fused]), choices.staged(direction, limit)]


def transposition_cost(geometry: ConvGeometry, dtype: np.dtype, machine: Machine) -> float:
    """Return the seconds of transposing kernels, for their gradient at the input to be a forward pass."""
    return 2 * dtype.itemsize * math.prod(geometry.weight_size) / (machine.bandwidth * _RATES["transposed"])


def interleaving_cost(geometry: ConvGeometry, dtype: np.dtype, machine: Machine) -> float:
    """Return the seconds of interleaving the phases of a gradient at the input, as far as it has some."""
    if max(geometry.strides) == 1:
        return 0.0
    return 2 * dtype.itemsize * math.prod(geometry.input_shape) / (machine.bandwidth * _RATES["transposed"])


class TiledCost(NamedTuple):
    """Seconds of choices: the input, output and kernels to spectra or back, the products, and what is fixed."""

    input: np.ndarray
    output: np.ndarray
    weight: np.ndarray | float
    rest: np.ndarray


def _share_of_vectors(choices: BlockedChoices) -> Numbers:
    """Return what part of the time that vectors need for products the matrix unit takes, 1 where vectors do them."""
    if choices.fused or choices.direction == "grad_input":
        return 1.0
    geometry, tiles = choices.geometry, choices.tiles
    rows: Numbers = geometry.weight_size[0] // geometry.groups
    columns, depth = choices.block_lane_blocks, geometry.weight_size[1] * choices.grid.channel_phases
    if choices.direction == "grad_weight":
        most = np.maximum(1, choices.grid.tiles)  # an empty batch has none
        tiles_at_once = np.minimum(columns * tiles.lanes, most)
        rows, columns, depth = depth, cdiv(rows, tiles.lanes), tiles_at_once
    vectors = tiles.entry / simd.VECTOR_BYTES
    share = split_product.share_of_vectors(choices.dtype.type, vectors, rows, columns, depth)
    return np.minimum(1.0, _PANELS * share) if choices.direction == "grad_weight" else share


def tiled_cost(choices: BlockedChoices, weight_is_transformed: bool, machine: Machine) -> TiledCost:
    """Return the seconds of every choice."""
    geometry, direction, grid, tiles = choices.geometry, choices.direction, choices.grid, choices.tiles
    itemsize = choices.dtype.itemsize
    lanes = simd.lanes(choices.dtype.type)
    filters, channels = geometry.weight_size[:2]
    depth = channels * grid.channel_phases
    samples = tiles.height * tiles.width

    def transform(
        columns: Numbers, rows: Numbers = tiles.height
    ) -> np.ndarray:  # of a tile of which so many are needed
        return tiles.base + tiles.column * (_ceil(columns, 2 * lanes) * 2 * lanes) + tiles.row * rows

    count = choices.lane_blocks * tiles.lanes
    spectrum = tiles.bins * tiles.entry  # of a lane_block
    through_cache = 0 if choices.fused else choices.lane_blocks * spectrum * tiles.spectra

    def both_ways(
        channels: int, columns: Numbers, alone: Numbers, size: tuple[int, ...], byte: Numbers, times: Numbers = 1
    ) -> np.ndarray:
        moved = times * byte * (itemsize * math.prod(size))
        return channels * (count * (transform(columns) + alone * tiles.gathered) + through_cache) + moved

    # one lane block of complex tiles leaves registers empty
    lonely = np.where(tiles.entry > simd.VECTOR_BYTES, 0.2 / choices.block_lane_blocks, 0.0)
    busy = choices.lane_blocks
    if direction == "forward" and not choices.fused:  # few tiles of the last lane block are products of their own
        few = np.where(tiles.entry > simd.VECTOR_BYTES, 0, few_tiles(grid.tiles, tiles.lanes))
        busy = busy - (few > 0) * (1 - _FEW_TILES * few / tiles.lanes)
    multiply_adds = tiles.bins * lanes * busy * filters * depth * (1 + lonely)
    transposed: Numbers = 0.0
    if direction == "grad_weight":
        is_panel = tiles.lanes > 1  # panels, whose lanes are filters
        panels = tiles.bins * choices.lane_filters
        multiply_adds = np.where(is_panel, panels * grid.tiles * depth, multiply_adds)
        squares = panels * choices.lane_blocks / lanes * tiles.entry / (2 * simd.VECTOR_BYTES)  # of complex entries
        transposed = np.where(is_panel, squares * _RATES["square"], 0.0)
    stream = 1 / (machine.bandwidth * _RATES["sums"]) if direction == "grad_weight" else tiles.stream
    weight: Numbers = 0.0
    taps = grid.horizontal.taps
    if direction == "grad_weight":
        kernel = transform(taps) + tiles.kernel
        weight = choices.lane_filters * depth * kernel + choices.weight * tiles.spectra
    elif not weight_is_transformed:
        kernel = transform(taps, grid.vertical.taps)
        weight = choices.lane_filters * depth * kernel + choices.weight / (machine.bandwidth * _RATES["kernels"])
    products = multiply_adds * tiles.product * _share_of_vectors(choices) + transposed
    blocks = _RATES["block"] * (1 if choices.fused else choices.blocks)
    if geometry.groups > 1 and not choices.fused:
        blocks = blocks + _RATES["group_product"] * geometry.groups * tiles.bins * choices.blocks
    outputs = grid.vertical.outputs * grid.horizontal.outputs
    overlap = samples / outputs if direction == "grad_input" else 1
    x = grid.horizontal
    return TiledCost(
        choices.filter_blocks
        * both_ways(
            depth * geometry.groups,
            tiles.width,
            samples * (x.input_step != 1),
            geometry.input_size,
            tiles.read,
            overlap,
        ),
        both_ways(filters, x.outputs, outputs * (x.output_step != 1), geometry.output_size, tiles.write),
        weight,
        products + choices.weight * choices.blocks * stream + blocks + _RATES["call"],
    )
