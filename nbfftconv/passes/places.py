"""Where the tiles of a unit are: the places that the transforms of many tiles at a time read from, and write to.

A place is the address of a row of a lane's samples, with the mask of those that are inside the image, or the taps of a
filter. All channels of a unit have the same ones, a plane apart.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit


@njit()
def samples_inside(start, step, size, first, last):
    """Return those of the samples first .. last - 1, at start + i·step, that are inside 0 .. size - 1, as a range."""
    begin, end = -start, size - start
    if step != 1:  # divisions take longer than a vector of samples
        begin, end = (begin + step - 1) // step, (end + step - 1) // step
    begin = min(last, max(first, begin))
    return begin, max(begin, min(last, end))


@njit()
def tile_position(r, tile):
    """Return image, vertical and horizontal image phase, row and column of a tile."""
    column = tile % r.x_count
    tile //= r.x_count
    row = tile % r.y_count
    tile //= r.y_count
    x_phase = tile % r.x_image_phases
    tile //= r.x_image_phases
    return tile // r.y_image_phases, tile % r.y_image_phases, x_phase, row, column


@njit()
def next_tile_position(r, image, y_phase, x_phase, row, column):
    """Return the position of the next tile, without the divisions of `tile_position`."""
    column += 1
    if column < r.x_count:
        return image, y_phase, x_phase, row, column
    row += 1
    if row < r.y_count:
        return image, y_phase, x_phase, row, 0
    x_phase += 1
    if x_phase < r.x_image_phases:
        return image, y_phase, x_phase, 0, 0
    y_phase += 1
    if y_phase < r.y_image_phases:
        return image, y_phase, 0, 0, 0
    return image + 1, 0, 0, 0, 0


@njit()
def channel_position(r, index):
    """Return channel, vertical and horizontal channel phase of a channel of the stride-1 problem."""
    phase = index % r.channel_phases
    return index // r.channel_phases, phase // r.x_channel_phases, phase % r.x_channel_phases


@njit()
def input_position(r, y_tap, x_tap, y_phase, x_phase, row, column):
    """Return the pixel at which a tile of the input begins, which may be outside."""
    y = r.y_stride * y_phase + r.y_dilation * y_tap - r.y_before + row * r.y_core * r.y_input_step
    x = r.x_stride * x_phase + r.x_dilation * x_tap - r.x_before + column * r.x_core * r.x_input_step
    return y, x


@njit()
def output_position(r, y_phase, x_phase, row, column):
    """Return the pixel at which a tile of the output begins."""
    return y_phase + row * r.y_core * r.y_output_step, x_phase + column * r.x_core * r.x_output_step


@njit()
def filters_of(r, unit):
    """Return the first filter of a unit, and how many lanes have one."""
    group_filters = r.filters // r.groups
    first = unit % r.group_units * r.lanes
    return unit // r.group_units * group_filters + first, min(r.lanes, group_filters - first)


@njit()
def filter_of(r, unit, lane):
    """Return the filter of a lane of a unit, and whether it exists."""
    first, count = filters_of(r, unit)
    return first + min(lane, count - 1), lane < count


@njit()
def _place_rows(r, places, lane, rows, start, row_bytes, above, below, begin, end):
    """Note where a lane's rows are; of rows above .. below - 1 the samples begin .. end - 1 count, the rest is zero."""
    for i in range(rows):
        place = places + i * r.place
        simd.pointer(np.int64, place)[lane] = start + i * row_bytes
        masks = simd.pointer(np.uint16, place + 8 * r.lanes)
        for first in range(0, r.pitch, r.lanes):
            bits = 0
            if above <= i and i < below:
                last = min(max(end - first, 0), r.lanes)
                bits = (1 << last) - (1 << min(max(begin - first, 0), last))
            masks[first + lane] = bits


@njit()
def place_input(itemsize, r, places, unit, y_tap, x_tap):
    """Note where the input's tiles of a unit are, under a tap; columns are neighbours."""
    image, y_phase, x_phase, row, column = tile_position(r, unit * r.lanes)
    for lane in range(r.lanes):
        if unit * r.lanes + lane >= r.all_tiles:
            _place_rows(r, places, lane, r.y_tile, 0, 0, 0, 0, 0, 0)
            continue
        if lane > 0:
            image, y_phase, x_phase, row, column = next_tile_position(r, image, y_phase, x_phase, row, column)
        y, x = input_position(r, y_tap, x_tap, y_phase, x_phase, row, column)
        above, below = samples_inside(y, r.y_input_step, r.y_input, 0, r.y_tile)
        begin, end = samples_inside(x, 1, r.x_input, 0, r.x_tile)
        start = ((image * r.channels * r.y_input + y) * r.x_input + x) * itemsize
        step = r.y_input_step * r.x_input * itemsize
        _place_rows(r, places, lane, r.y_tile, start, step, above, below, begin, end)


@njit()
def place_output(itemsize, r, places, unit):
    """Note where the output's tiles of a unit are; columns are neighbours."""
    image, y_phase, x_phase, row, column = tile_position(r, unit * r.lanes)
    for lane in range(r.lanes):
        if unit * r.lanes + lane >= r.all_tiles:
            _place_rows(r, places, lane, r.y_core, 0, 0, 0, 0, 0, 0)
            continue
        if lane > 0:
            image, y_phase, x_phase, row, column = next_tile_position(r, image, y_phase, x_phase, row, column)
        y, x = output_position(r, y_phase, x_phase, row, column)
        _, below = samples_inside(y, r.y_output_step, r.y_output, 0, r.y_core)
        _, end = samples_inside(x, 1, r.x_output, 0, r.x_core)
        start = ((image * r.filters * r.y_output + y) * r.x_output + x) * itemsize
        _place_rows(r, places, lane, r.y_core, start, r.y_output_step * r.x_output * itemsize, 0, below, 0, end)


@njit()
def place_filters(itemsize, r, places, unit, y_tap):
    """Note where the filters of a unit are, from a row of taps on; columns are neighbours."""
    filter_bytes = r.channels // r.groups * r.y_kernel * r.x_kernel * itemsize
    step = r.y_tap_step * r.x_kernel * itemsize
    _, rows = samples_inside(y_tap, r.y_tap_step, r.y_kernel, 0, r.y_taps)
    for lane in range(r.lanes):
        k, exists = filter_of(r, unit, lane)
        start = k * filter_bytes + y_tap * r.x_kernel * itemsize
        _place_rows(r, places, lane, r.y_taps, start, step, 0, rows if exists else 0, 0, r.x_taps)


@njit()
def place_tiles(itemsize, r, places, rows):
    """Note where the tiles of a unit are in scratch memory, one after the other."""
    for lane in range(r.lanes):
        _place_rows(r, places, lane, rows, lane * r.tile, r.pitch * itemsize, 0, rows, 0, r.pitch)


@njit()
def place_strips(itemsize, r, places, unit):
    """Note where the tiles of a unit are put side by side in scratch memory: every row of tiles in a strip."""
    strip, at = 0, 0
    last_strip = (r.lanes - 2) // r.x_count + 2
    column = unit * r.lanes % r.x_count
    for lane in range(r.lanes):
        if lane > 0:
            column += 1
            at += r.x_core * itemsize
        if column == r.x_count:
            column, strip = 0, strip + 1
            at = strip * r.strip_bytes
        exists = unit * r.lanes + lane < r.all_tiles
        simd.pointer(np.int64, places)[lane] = at if exists else last_strip * r.strip_bytes
