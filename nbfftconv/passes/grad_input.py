"""Gradient at the input: dX^[f] = W^[f]^T · G^[f] per frequency, summed over the filters of a group; overlap-add.

The adjoint of the forward pass: gradient tiles of T - taps + 1 samples, zero-padded to T, each add T samples to the
gradient. A work item is one channel, or, of few channels, some rows of its tiles; it alone writes the samples of those
rows, and transforms the tiles above that reach into them once more. So nothing races, every sample is summed tile after
tile in their order, and the sum does not depend on the threads. An image whose tiles are all one item's is summed up in
the cache, and written once.
"""

import math

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.accumulate import product
from nbfftconv.arrays import is_streamed
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.blank_windows import BlankWindows
from nbfftconv.passes.context import Context, Numbers, Spectra
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.passes.tiles import add_tile, write_rows
from nbfftconv.passes.to_spectra import TransformedWeight, add_to_spectra
from nbfftconv.passes.views import (
    SPECTRA,
    VIEW,
    channel_of,
    column_step,
    first_sample,
    inside,
    next_position,
    position_of,
    row_step,
)
from nbfftconv.passes.workspace import TRANSFORM, WORKSPACE, memory_of
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv, round_up
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.target import TARGET

#: Work items, enough for many threads: fewer channels than that are cut into parts.
_ITEMS = 24
#: A work item transforms spectra of so many bytes back, at most: a call answers signals between two items.
_MOST_BYTES = 2**25
#: Values of a large gradient that are cleared at once.
_CLEARED = 2**20
#: Images of at most so many bytes a channel are summed up in the second-level cache of a core.
_PLANE_BYTES = TARGET.l2_bytes // 2

# The block of tiles under way is `lane_blocks` from `first_lane_block` on; a channel is `parts` work items. If `clear`
# is 1, an item clears the gradient before it adds tiles. If `planes` is not 0, each worker sums up an image there,
# `plane` bytes from one worker's to the next one's, and writes it, past the caches if `stream` is 1.
_OVERLAP_ADD = RecordType(
    fields(
        "first_lane_block", "lane_blocks", "parts", "clear", "planes", "plane", "stream",
        spectra=SPECTRA, target=VIEW, transform=TRANSFORM, workspace=WORKSPACE,
    )
)  # fmt: skip


@njit()
def _clear_rows(real, v, plane, begin, end):
    """Set those rows of pixels to zero that there are; they follow each other."""
    pixels = simd.pointer(real, plane)
    for at in range(max(0, begin) * v.x.size, min(v.y.size, end) * v.x.size):
        pixels[at] = real(0)


@njit()
def _add_rows(real, itemsize, v, t, tile, above, below, plane, y, x, factors):
    """Add rows above .. below - 1 of a tile to an image, from pixel (y, x) on, where they are inside."""
    above, below = inside(v.y, y, above, below)
    first, last = inside(v.x, x, 0, v.x.samples)
    row, column = row_step(v), column_step(v)
    source, target = tile + above * t.row, plane + y * v.y.stride + above * row + x * v.x.stride
    if column == itemsize:
        vectors = cdiv(v.x.samples * itemsize, VECTOR_BYTES)
        add_tile(real, (source, t.row, target, row, below - above, first, last, vectors, factors))
        return
    scale, step = simd.pointer(real, factors), column // itemsize
    for i in range(below - above):
        samples, pixels = simd.pointer(real, source + i * t.row), simd.pointer(real, target + i * row)
        for j in range(first, last):
            pixels[j * step] += samples[j] * scale[0]


@njit()
def _lane_block_to_tiles(r, memory, spectrum):
    """Transform a lane block back to tiles in a worker's memory, one after the other."""
    v, t, w = r.target, r.transform, r.workspace
    work, stride, rows = memory + w.work, r.spectra.bin, v.y.samples
    if t.lanes == 1:
        simd.call(t.inverse, (t.context, memory, work, spectrum, stride, rows, v.x.samples))
        return
    addresses = simd.pointer(np.int64, memory + w.indirection)
    for lane in range(t.lanes):
        addresses[lane] = lane * w.tile
    simd.call(t.inverse, (t.context, memory + w.indirection, memory, t.row, work, spectrum, stride, rows))


def _stage(real):
    itemsize = np.dtype(real).itemsize

    def overlap_add(r, worker, begin, end):
        v, t, w = r.target, r.transform, r.workspace
        memory = memory_of(w, worker)
        factors = memory + w.factors
        scale = simd.pointer(real, factors)
        scale[0] = real(1) / real(t.divisor)
        scale[2], scale[3] = real(1), real(0)  # of what is summed up
        lanes, grid_rows = t.lanes, v.y.tiles
        grid_tiles = v.x.tiles * grid_rows
        first_tile = r.first_lane_block * lanes
        last_tile = min(first_tile + r.lane_blocks * lanes, v.tiles)
        # rows of tiles, counted over all images and phases
        first_row = first_tile // v.x.tiles
        rows = (last_tile - 1) // v.x.tiles + 1 - first_row
        reach = cdiv(v.y.samples - v.y.advance, v.y.advance)
        for item in range(begin, end):
            index, part = item // r.parts, item % r.parts
            channel, channel_phases = channel_of(v, index)
            own = first_row + rows * part // r.parts
            own_end = first_row + rows * (part + 1) // r.parts
            grid, end_grid = own // grid_rows, own_end // grid_rows
            from_row = own if part == 0 else max(grid * grid_rows, own - reach)
            from_tile = max(first_tile, from_row * v.x.tiles)
            to_tile = min(last_tile, own_end * v.x.tiles)
            for lane_block in range(from_tile // lanes, cdiv(to_tile, lanes)):
                spectrum = r.spectra.address + (lane_block - r.first_lane_block) * r.spectra.lane_block
                _lane_block_to_tiles(r, memory, spectrum + index * t.entry)
                first = max(from_tile, lane_block * lanes)
                p = position_of(v, first)
                for tile in range(first, min(to_tile, (lane_block + 1) * lanes)):
                    if tile > first:
                        p = next_position(v, p, 1)
                    z, y, x = first_sample(v, p, channel_phases)
                    result = v.address + p.image * v.image + channel * v.channel + z * v.z.stride
                    this_grid = tile // grid_tiles
                    first_own = max(first_tile, own * v.x.tiles)  # not those that only reach into this item's rows
                    is_whole = first_own <= this_grid * grid_tiles and (this_grid + 1) * grid_tiles <= to_tile
                    plane = r.planes + worker * r.plane if r.planes != 0 and is_whole else result
                    # rows of the tile that are this item's
                    above, below = 0, v.y.samples
                    if part > 0 and this_grid == grid:
                        above = max(0, (own - grid * grid_rows - p.y) * v.y.advance)
                    if part < r.parts - 1 and this_grid == end_grid:
                        below = min(below, (own_end - end_grid * grid_rows - p.y) * v.y.advance)
                    if r.clear != 0 and p.x == 0:  # a row of tiles clears what none above it reaches
                        new = above if p.y == 0 else max(above, v.y.samples - v.y.advance)
                        _clear_rows(real, v, plane, y + new, y + below)
                    samples = memory + (tile - lane_block * lanes) * w.tile
                    _add_rows(real, itemsize, v, t, samples, above, below, plane, y, x, factors)
                    if plane != result and tile + 1 == (this_grid + 1) * grid_tiles:
                        pixels = v.y.size * v.x.size
                        write_rows(real, (plane, 0, result, 0, 1, pixels, factors + 2 * itemsize, 0, r.stream))
        if r.stream != 0:
            simd.fence()

    return overlap_add


_overlap_add = jit.stage(_OVERLAP_ADD)(_stage)


def _overlap_add_numbers(numbers: Numbers) -> Record:
    view, memory = numbers.views["input"], (numbers.transform_numbers["input"], numbers.workspace_numbers)
    reached = (view.y.tiles - 1) * view.y.advance + view.y.samples + view.y.origin
    # With gaps between samples or rows, or rows that none reaches, nobody would clear them.
    is_dense = view.y.sample_step == view.x.sample_step == 1 and view.y.stride == view.x.size * view.x.stride
    is_covered = is_dense and reached >= view.y.size
    return _OVERLAP_ADD.make((0, 0, 0, is_covered, 0, 0, 0, (0, 0, 0), view, *memory))


def begin(context: Context, result: np.ndarray) -> Record:
    """Make `result` ready for tiles to be added; return the record of `add_tiles`."""
    record = context.record("overlap-add", _overlap_add_numbers)
    record["target.address"] = context.address(result)
    record["stream"] = is_streamed(result.nbytes)
    plane_bytes = math.prod(result.shape[2:]) * result.itemsize
    if record["clear"] and plane_bytes <= _PLANE_BYTES:
        record["plane"] = plane = round_up(plane_bytes, 64)
        record["planes"] = context.borrow(context.areas * plane).address
    if not record["clear"]:
        values = result.reshape(-1)
        for first in range(0, values.size, _CLEARED):  # at once, it would take long, and answer no signal
            values[first : first + _CLEARED] = 0
    return record


def add_tiles(
    context: Context, record: Record, weight_spectra: Spectra, output_spectra: Spectra, input_spectra: Spectra
) -> None:
    """Add the block of tiles under way to the result of `begin`; its spectra are left in `input_spectra`."""
    w = context.weight_matrix(weight_spectra, filter_axis="column")
    g = context.tile_matrix(output_spectra, context.group_filters, row="lane block", column="channel")
    x = context.tile_matrix(input_spectra, context.group_depth, row="channel", column="lane block")
    shape = context.groups, context.group_depth, context.lane_blocks, context.group_filters, context.bins
    context.add_task(product(w, g, x, shape, context.workers))
    record = record.copy()
    context.point(record, "spectra", input_spectra)
    record["first_lane_block"], record["lane_blocks"] = context.first_lane_block, context.lane_blocks
    rows = cdiv(context.lane_blocks * context.lanes, context.views["input"].x.tiles)
    fewest = cdiv(context.lane_blocks * context.bins * context.entry, _MOST_BYTES)
    record["parts"] = parts = min(rows, max(fewest, cdiv(_ITEMS, context.depth)))
    context.add(_overlap_add, record, context.depth * parts)


def grad_input(
    plan: TiledPlan,
    geometry: ConvGeometry,
    weight: TransformedWeight,
    grad_output: np.ndarray,
    result: np.ndarray,
) -> bool:
    """Compute the gradient at the input into `result`; tell whether `grad_output` held outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    context = Context(plan, geometry)
    output_spectra, input_spectra = context.output_spectra(), context.input_spectra()
    record = begin(context, result)
    for _ in context.blocks():
        add_to_spectra(context, "output", grad_output, output_spectra)
        add_tiles(context, record, weight.spectra, output_spectra, input_spectra)
    arrays = grad_output, result, weight.array, weight.has_zeros
    blank = BlankWindows(context, geometry, *arrays, is_forward=False)
    context.run()
    blank.fill()
    return context.met_outliers
