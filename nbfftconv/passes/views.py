"""Views: an array as a stage sees it, as tiles. Strides are data. Where the samples of a tile are is told here only.

Along an axis, sample i of tile t, in image phase r and channel phase a (see `nbfftconv.tiling`), is at

    origin + r·phase_step + a·channel_phase_step + (t·advance + i)·sample_step,

which may lie outside the array: such samples are zero. An axis that an array lacks has size 1, and one tile of one
sample. Tiles are numbered with the image slowest, then the phases of each axis, then its tiles. Of kernels, a filter is
an image of one tile.

A *lane block* is what a transform does at once: as many tiles as there are lanes. Tiles of a *run* follow each other in
lane blocks: those of all images, or the filters of one group.
"""

from typing import NamedTuple

from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.records import fields
from nbfftconv.rounding import cdiv
from nbfftconv.tiling import TileGrid

#: A longer step leaves the array at the first sample all the same.
_LONGEST_STEP = 2**33
#: Kernels are fetched so many bytes before they are read: a lane block reads in as many places as it has filters.
_FETCHED_AHEAD = 256


class AxisView(NamedTuple):
    """Tiles along one axis of an array; at first those of an axis that it lacks.

    Attributes
    ----------
    size : int
        Samples of the array.
    stride : int
        Bytes from a sample of the array to the next.
    origin : int
        The first sample, before 0 where there is padding.
    phases, phase_step : int
        Image phases, and samples of the array from one to the next.
    channel_phases, channel_phase_step : int
        The same of channel phases.
    tiles : int
        Tiles of a phase.
    samples : int
        Samples of a tile, as far as they may be other than zero.
    advance : int
        Samples of a phase from a tile to the next.
    sample_step : int
        Samples of the array from a sample of a tile to the next.
    """

    size: int = 1
    stride: int = 0
    origin: int = 0
    phases: int = 1
    phase_step: int = 0
    channel_phases: int = 1
    channel_phase_step: int = 0
    tiles: int = 1
    samples: int = 1
    advance: int = 1
    sample_step: int = 1


class View(NamedTuple):
    """An array as tiles.

    Attributes
    ----------
    address : int
        Of the array.
    image, channel : int
        Bytes from an image, or filter, and from a channel to the next.
    channels, channel_phases : int
        Channels of an image, and for each of them, channels of the stride-1 problem.
    image_tiles : int
        Tiles of an image.
    tiles, lane_blocks : int
        Tiles and lane blocks of a run.
    ahead : int
        Bytes from what is read to what is fetched for a later tile.
    z, y, x : AxisView
        Depth, height and width.
    """

    address: int
    image: int
    channel: int
    channels: int
    channel_phases: int
    image_tiles: int
    tiles: int
    lane_blocks: int
    ahead: int
    z: AxisView
    y: AxisView
    x: AxisView


_AXIS = fields(*AxisView._fields)
VIEW = fields(*View._fields[:-3], z=_AXIS, y=_AXIS, x=_AXIS)
#: Where spectra are: an address, and bytes from one lane block and from one bin to the next.
SPECTRA = fields("address", "lane_block", "bin")


class Position(NamedTuple):
    """Which tile one is: its image, image phases, and numbers along the axes."""

    image: int
    z_phase: int
    y_phase: int
    x_phase: int
    z: int
    y: int
    x: int


class Tile(NamedTuple):
    """A tile of one channel, and which of its rows and columns the array has.

    Attributes
    ----------
    offset : int
        Bytes from the channel in image 0 to the tile's first sample.
    above, below, begin, end : int
        Rows above .. below - 1 of columns begin .. end - 1.
    """

    offset: int
    above: int
    below: int
    begin: int
    end: int


#: The `Tile` of a lane that has none: all of it is zero.
NO_TILE = Tile(0, 0, 0, 0, 0)


def _view(z: AxisView, axes: list[AxisView], channels: int, tiles: int, lanes: int, itemsize: int) -> View:
    """Return the view of a C-contiguous array, given its axes without strides."""
    height, width = (axis.size for axis in axes)
    plane = height * width * itemsize
    channel = z.size * plane
    z, y, x = z._replace(stride=plane), axes[0]._replace(stride=width * itemsize), axes[1]._replace(stride=itemsize)
    return View(
        address=0,
        image=channels * channel,
        channel=channel,
        channels=channels,
        channel_phases=z.channel_phases * y.channel_phases * x.channel_phases,
        image_tiles=z.tiles * y.phases * y.tiles * x.phases * x.tiles,
        tiles=tiles,
        lane_blocks=cdiv(tiles, lanes),
        ahead=channel,
        z=z,
        y=y,
        x=x,
    )


def input_view(geometry: ConvGeometry, grid: TileGrid, lanes: int, itemsize: int) -> View:
    """Return the view of the input, or its gradient: tiles that overlap."""
    axes = []
    for index, tiles in enumerate((grid.vertical, grid.horizontal)):
        numbers = geometry.axis_numbers(index)
        axes.append(
            AxisView(
                size=numbers["input"],
                origin=-numbers["before"],
                phases=tiles.image_phases,
                phase_step=numbers["stride"],
                channel_phases=tiles.channel_phases,
                channel_phase_step=numbers["dilation"],
                tiles=tiles.count,
                samples=tiles.tile,
                advance=tiles.outputs,
                sample_step=min(tiles.input_step, _LONGEST_STEP),
            )
        )
    depth = geometry.depth  # planes are tiles of one sample, and every tap is a channel phase of its own
    z = AxisView(
        size=depth.planes,
        origin=-depth.before,
        channel_phases=depth.taps,
        channel_phase_step=depth.dilation,
        tiles=depth.outputs,
        advance=depth.stride,
    )
    return _view(z, axes, geometry.input_shape[1], grid.tiles, lanes, itemsize)


def output_view(geometry: ConvGeometry, grid: TileGrid, lanes: int, itemsize: int) -> View:
    """Return the view of the output, or its gradient: tiles side by side."""
    axes = [
        AxisView(
            size=geometry.output_size[2 + index],
            phases=tiles.image_phases,
            phase_step=1,
            tiles=tiles.count,
            samples=tiles.outputs,
            advance=tiles.outputs,
            sample_step=tiles.output_step,
        )
        for index, tiles in enumerate((grid.vertical, grid.horizontal))
    ]
    z = AxisView(size=geometry.depth.outputs, tiles=geometry.depth.outputs)
    return _view(z, axes, geometry.weight_size[0], grid.tiles, lanes, itemsize)


def weight_view(geometry: ConvGeometry, grid: TileGrid, lanes: int, itemsize: int) -> View:
    """Return the view of the kernels, or their gradient: every filter a tile."""
    axes = [
        AxisView(
            size=geometry.weight_size[2 + index],
            channel_phases=tiles.channel_phases,
            channel_phase_step=1,
            samples=tiles.taps,
            sample_step=tiles.tap_step,
        )
        for index, tiles in enumerate((grid.vertical, grid.horizontal))
    ]
    (filters, channels), taps = geometry.weight_size[:2], geometry.depth.taps
    z = AxisView(size=taps, channel_phases=taps, channel_phase_step=1)
    view = _view(z, axes, channels // taps, filters // geometry.groups, lanes, itemsize)
    return view if lanes == 1 else view._replace(ahead=_FETCHED_AHEAD)


# Of most arrays there is one run, one phase and one plane: divisions, which take longer than a row of samples, are left
# out where it is known what they give.


@njit()
def tiles_of(v, lanes, lane_block):
    """Return the first tile of a lane block, and how many lanes have one."""
    if lane_block < v.lane_blocks:
        first = lane_block * lanes
        return first, min(lanes, v.tiles - first)
    first = lane_block % v.lane_blocks * lanes
    return lane_block // v.lane_blocks * v.tiles + first, min(lanes, v.tiles - first)


@njit()
def _split(number, count):
    """Return quotient and remainder."""
    if count == 1:
        return number, 0
    return number // count, number % count


@njit()
def position_of(v, tile):
    """Return the `Position` of a tile."""
    if v.image_tiles == 1:
        return Position(tile, 0, 0, 0, 0, 0, 0)
    tile, x = _split(tile, v.x.tiles)
    tile, y = _split(tile, v.y.tiles)
    tile, z = _split(tile, v.z.tiles)
    tile, x_phase = _split(tile, v.x.phases)
    tile, y_phase = _split(tile, v.y.phases)
    image, z_phase = _split(tile, v.z.phases)
    return Position(image, z_phase, y_phase, x_phase, z, y, x)


@njit()
def next_position(v, p, count):
    """Return the `Position` of the tile `count` further on, at most the first of the next row; nothing is divided."""
    if p.x + count < v.x.tiles:
        return Position(p.image, p.z_phase, p.y_phase, p.x_phase, p.z, p.y, p.x + count)
    if p.y + 1 < v.y.tiles:
        return Position(p.image, p.z_phase, p.y_phase, p.x_phase, p.z, p.y + 1, 0)
    if p.z + 1 < v.z.tiles:
        return Position(p.image, p.z_phase, p.y_phase, p.x_phase, p.z + 1, 0, 0)
    if p.x_phase + 1 < v.x.phases:
        return Position(p.image, p.z_phase, p.y_phase, p.x_phase + 1, 0, 0, 0)
    if p.y_phase + 1 < v.y.phases:
        return Position(p.image, p.z_phase, p.y_phase + 1, 0, 0, 0, 0)
    if p.z_phase + 1 < v.z.phases:
        return Position(p.image, p.z_phase + 1, 0, 0, 0, 0, 0)
    return Position(p.image + 1, 0, 0, 0, 0, 0, 0)


@njit()
def channel_of(v, index):
    """Return the channel of a channel of the stride-1 problem, and its phases (z, y, x)."""
    if v.channel_phases == 1:
        return index, (0, 0, 0)
    phase, x = _split(index % v.channel_phases, v.x.channel_phases)
    z, y = _split(phase, v.y.channel_phases)
    return index // v.channel_phases, (z, y, x)


@njit()
def in_order_of_phases(v, channels, at):
    """Return the channel, of so many of the stride-1 problem, that comes as number `at` if a phase follows the other.

    Which samples the tiles of a lane block have is found once a phase.
    """
    if v.channel_phases == 1:
        return at
    phase, channel = _split(at, channels // v.channel_phases)
    return channel * v.channel_phases + phase


@njit()
def _first(axis, phase, channel_phase, tile):
    first = axis.origin + phase * axis.phase_step + channel_phase * axis.channel_phase_step
    return first + tile * axis.advance * axis.sample_step


@njit()
def first_sample(v, p, channel_phases):
    """Return where in its channel a tile begins, as (z, y, x); it may be outside."""
    return (
        _first(v.z, p.z_phase, channel_phases[0], p.z),
        _first(v.y, p.y_phase, channel_phases[1], p.y),
        _first(v.x, p.x_phase, channel_phases[2], p.x),
    )


@njit()
def inside(axis, start, first, last):
    """Return those of the samples first .. last - 1 of a tile that begins at `start` that the array has, as a range."""
    begin, end = -start, axis.size - start
    if axis.sample_step != 1:  # divisions take longer than a vector of samples
        begin, end = cdiv(begin, axis.sample_step), cdiv(end, axis.sample_step)
    begin = min(last, max(first, begin))
    return begin, max(begin, min(last, end))


@njit()
def row_step(v):
    """Return the bytes from a row of a tile to the next."""
    return v.y.sample_step * v.y.stride


@njit()
def column_step(v):
    """Return the bytes from a sample of a row of a tile to the next: a scalar's where rows are read as vectors."""
    return v.x.sample_step * v.x.stride


@njit()
def address_in(v, image, z, y, x):
    """Return the bytes from the address of a channel of image 0 to a sample."""
    return image * v.image + z * v.z.stride + y * v.y.stride + x * v.x.stride


@njit()
def tile_at(v, p, channel_phases):
    """Return the `Tile` at a position."""
    z, y, x = first_sample(v, p, channel_phases)
    above, below = inside(v.y, y, 0, v.y.samples)
    begin, end = inside(v.x, x, 0, v.x.samples)
    if z < 0 or z >= v.z.size:
        below = above
    return Tile(address_in(v, p.image, z, y, x), above, below, begin, end)
