"""Gradient at the input: dX^[f] = W^[f]^T · G^[f] per frequency, summed over the filters of a group; overlap-add.

The adjoint of the forward pass: gradient tiles of T - taps + 1 samples, zero-padded to T, each add T samples to the
gradient. A work item is one channel, or, of few channels, some rows of its tiles; it alone writes the samples of those
rows, and transforms the tiles above that reach into them once more. So nothing races, every sample is summed tile after
tile in their order, and the sum does not depend on the threads. An image whose tiles are all one item's is summed up in
the cache, and written once.
"""

import math

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.blank_windows import BlankWindows
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.forward import STREAMED_BYTES
from nbfftconv.passes.places import (
    channel_position,
    input_position,
    next_tile_position,
    samples_inside,
    tile_position,
)
from nbfftconv.passes.plan import FftPlan
from nbfftconv.passes.spectra import TransformedWeight, output_to_spectra, spectrum_to_tiles
from nbfftconv.passes.tiles import add_tile, write_rows
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES

#: Work items, enough for many threads: fewer channels than that are cut into parts.
_ITEMS = 24
#: A work item transforms spectra of so many bytes back, at most: a call answers signals between two items.
_MOST_BYTES = 2**25
#: Values of a large gradient that are cleared at once.
_CLEARED = 2**20
#: Images of at most so many bytes a channel are summed up in the second-level cache of a core.
_PLANE_BYTES = 2**20


@njit()
def _clear_rows(real, r, plane, begin, end):
    """Set those rows of pixels to zero that there are."""
    pixels = simd.pointer(real, plane)
    for at in range(max(0, begin) * r.x_input, min(r.y_input, end) * r.x_input):
        pixels[at] = real(0)


@njit()
def _add_rows(real, itemsize, r, tile, above, below, plane, y0, x0, factors):
    """Add rows above .. below - 1 of a tile to an image, from pixel (y0, x0) on, where they are inside."""
    y_step, x_step = r.y_input_step, r.x_input_step
    above, below = samples_inside(y0, y_step, r.y_input, above, below)
    first, last = samples_inside(x0, x_step, r.x_input, 0, r.x_tile)
    source, pitch = tile + above * r.pitch * itemsize, r.pitch * itemsize
    target, row = plane + ((y0 + above * y_step) * r.x_input + x0) * itemsize, y_step * r.x_input * itemsize
    if x_step == 1:
        vectors = (r.x_tile * itemsize + VECTOR_BYTES - 1) // VECTOR_BYTES
        add_tile(real, (source, pitch, target, row, below - above, first, last, vectors, factors))
        return
    scale = simd.pointer(real, factors)
    for i in range(below - above):
        samples, pixels = simd.pointer(real, source + i * pitch), simd.pointer(real, target + i * row)
        for j in range(first, last):
            pixels[j * x_step] += samples[j] * scale[0]


def _add(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_input(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        factors = tiles + r.factors
        scale = simd.pointer(real, factors)
        scale[0] = real(1) / real(r.y_tile * r.x_tile)
        scale[2], scale[3] = real(1), real(0)  # of what is summed up
        grid_tiles = r.x_count * r.y_count
        first_tile = r.first_unit * r.lanes
        last_tile = min(first_tile + r.units * r.lanes, r.all_tiles)
        # rows of tiles, counted over all images and phases
        first_row = first_tile // r.x_count
        rows = (last_tile - 1) // r.x_count + 1 - first_row
        reach = (r.y_taps - 1 + r.y_core - 1) // r.y_core
        pixels = r.y_input * r.x_input
        for item in range(begin, end):
            index, part = item // r.parts, item % r.parts
            channel, y_tap, x_tap = channel_position(r, index)
            own = first_row + rows * part // r.parts
            own_end = first_row + rows * (part + 1) // r.parts
            grid, end_grid = own // r.y_count, own_end // r.y_count
            from_row = own if part == 0 else max(grid * r.y_count, own - reach)
            from_tile = max(first_tile, from_row * r.x_count)
            to_tile = min(last_tile, own_end * r.x_count)
            for unit in range(from_tile // r.lanes, (to_tile + r.lanes - 1) // r.lanes):
                spectrum = r.input_spectra + (unit - r.first_unit) * r.input_unit + index * COMPLEX_BYTES
                spectrum_to_tiles(itemsize, r, slot, spectrum, r.input_step_bytes, r.y_tile, r.x_tile)
                first = max(from_tile, unit * r.lanes)
                image, y_phase, x_phase, row, column = tile_position(r, first)
                for tile in range(first, min(to_tile, (unit + 1) * r.lanes)):
                    if tile > first:
                        image, y_phase, x_phase, row, column = next_tile_position(
                            r, image, y_phase, x_phase, row, column
                        )
                    result = r.input + (image * r.channels + channel) * pixels * itemsize
                    this_grid = (image * r.y_image_phases + y_phase) * r.x_image_phases + x_phase
                    first_own = max(first_tile, own * r.x_count)  # not those that only reach into this item's rows
                    is_whole = first_own <= this_grid * grid_tiles and (this_grid + 1) * grid_tiles <= to_tile
                    plane = r.planes + slot * r.plane if r.planes != 0 and is_whole else result
                    y0, x0 = input_position(r, y_tap, x_tap, y_phase, x_phase, row, column)
                    # rows of the tile that are this item's
                    above, below = 0, r.y_tile
                    if part > 0 and this_grid == grid:
                        above = max(0, (own - grid * r.y_count - row) * r.y_core)
                    if part < r.parts - 1 and this_grid == end_grid:
                        below = min(below, (own_end - end_grid * r.y_count - row) * r.y_core)
                    if r.clear != 0 and column == 0:  # a row of tiles clears what none above it reaches
                        new = above if row == 0 else max(above, r.y_tile - r.y_core)
                        _clear_rows(real, r, plane, y0 + new, y0 + below)
                    samples = tiles + (tile - unit * r.lanes) * r.tile
                    _add_rows(real, itemsize, r, samples, above, below, plane, y0, x0, factors)
                    if plane != result and tile + 1 == (this_grid + 1) * grid_tiles:
                        write_rows(real, (plane, 0, result, 0, 1, pixels, factors + 2 * itemsize, 0, r.stream))
        simd.fence()

    return spectra_to_input


_spectra_to_input = stage(_add)


def begin(call: Call, result: np.ndarray) -> None:
    """Make `result` ready for tiles to be added."""
    vertical, horizontal = call.plan.grid.vertical, call.plan.grid.horizontal
    reached = (vertical.count - 1) * vertical.core + vertical.tile - int(call.record["y_before"])
    # With gaps between samples, or rows that none reaches, nobody would clear them.
    is_covered = vertical.input_step == horizontal.input_step == 1 and reached >= result.shape[2]
    call.record["clear"] = is_covered
    plane_bytes = math.prod(result.shape[2:]) * result.itemsize
    if is_covered and plane_bytes <= _PLANE_BYTES:
        call.borrow_planes(plane_bytes)
    call.record["stream"] = result.nbytes > STREAMED_BYTES
    if not is_covered:
        values = result.reshape(-1)
        for first in range(0, values.size, _CLEARED):  # at once, it would take long, and answer no signal
            values[first : first + _CLEARED] = 0


def add(
    call: Call,
    weight_spectra: Spectra,
    output_spectra: Spectra,
    input_spectra: Spectra,
    units: int,
    result: np.ndarray,
) -> None:
    """Add a block of tiles to `result`; the spectra of its gradient are left in `input_spectra`."""
    w = call.weight_matrix(weight_spectra, filter_axis="column")
    g = call.tile_matrix(output_spectra, call.group_filters, row="unit", column="channel")
    x = call.tile_matrix(input_spectra, call.group_depth, row="channel", column="unit")
    shape = call.groups, call.group_depth, units, call.group_filters, call.steps
    call.add_task(product(w, g, x, shape, call.slots))
    call.use_spectra("input", input_spectra)
    call.point("input", result)
    rows = -(-units * call.lanes // call.plan.grid.horizontal.count)
    fewest = -(-units * call.steps * COMPLEX_BYTES // _MOST_BYTES)
    call.record["parts"] = parts = min(rows, max(fewest, -(-_ITEMS // call.depth)))
    call.add(_spectra_to_input, call.depth * parts)


def grad_input(
    plan: FftPlan,
    geometry: ConvGeometry,
    weight: TransformedWeight,
    grad_output: np.ndarray,
    result: np.ndarray,
) -> bool:
    """Compute the gradient at the input into `result`; tell whether `grad_output` held outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    call = Call(plan, geometry)
    output_spectra, input_spectra = call.output_spectra(), call.input_spectra()
    call.point("output", grad_output)
    begin(call, result)
    for units in call.blocks():
        output_to_spectra(call, units)
        add(call, weight.spectra, output_spectra, input_spectra, units, result)
    arrays = grad_output, result, weight.array, weight.has_zeros
    blank = BlankWindows(call, geometry, *arrays, is_forward=False)
    call.run()
    blank.fill()
    return call.met_outliers
