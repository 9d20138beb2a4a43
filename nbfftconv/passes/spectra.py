"""Arrays to spectra: the transforms of input, kernels and gradient that the passes share.

A tile is gathered with zeros around it, freed of outliers and transformed. Outliers (see `nbfftconv.outliers`) would
spread over their whole tile; they are taken as zero here, noted, and their products are added afterwards.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.tiles import gather_tiles, stream_steps
from nbfftconv.plan import ConvPlan
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES

#: Kernels' spectra of more bytes would not be found in the caches of a core, but drive out what is there.
_STREAMED_BYTES = 4 * 2**20
#: Kernels are fetched so many bytes before they are gathered: a unit reads as many places as it has filters.
_FETCHED_AHEAD = 256


@njit()
def samples_inside(start, step, size, first, last):
    """Return those of the samples first .. last - 1, at start + i·step, that are inside 0 .. size - 1, as a range."""
    begin, end = -start, size - start
    if step != 1:  # divisions take longer than a vector of samples
        begin, end = (begin + step - 1) // step, (end + step - 1) // step
    begin = min(last, max(first, begin))
    return begin, max(begin, min(last, end))


@njit()
def gather(
    real, itemsize, plane, height, width, y0, y_step, rows, x0, x_step, columns, tile_height, pitch, tile, largest
):
    """Fill a tile with samples (y0 + i·y_step, x0 + j·x_step), i < rows, j < columns; the rest is zero.

    Rows are whole vectors. The vector of `largest` magnitudes is kept up to date.
    """
    above, below = samples_inside(y0, y_step, height, 0, rows)
    inside = below - above
    begin, end = samples_inside(x0, x_step, width, 0, columns)
    vectors = pitch * itemsize // VECTOR_BYTES
    source = plane + ((y0 + above * y_step) * width + x0) * itemsize
    if x_step == 1:
        ahead = height * width * itemsize  # the same tile of the next channel comes next
        gather_tiles(real, (
            source, 0, y_step * width * itemsize, tile, 0, pitch * itemsize, 1,
            above, inside, tile_height - above - inside, begin, end, vectors, ahead, largest,
        ))  # fmt: skip
        return
    gather_tiles(real, (plane, 0, 0, tile, 0, pitch * itemsize, 1, tile_height, 0, 0, 0, 0, vectors, 0, largest))
    most = simd.pointer(real, largest)
    for i in range(inside):
        pixels = simd.pointer(real, source + i * y_step * width * itemsize)
        samples = simd.pointer(real, tile + (above + i) * pitch * itemsize)
        for j in range(begin, end):
            samples[j] = value = pixels[j * x_step]
            if most[0] == most[0] and not abs(value) <= most[0]:  # a NaN comes in, and stays
                most[0] = abs(value)


@njit()
def clear_outliers(real, word, limit, tile, count):
    """Set the outliers of a tile to zero."""
    magnitude_bits = word(~word(0)) >> word(1)
    bits, values = simd.pointer(word, tile), simd.pointer(real, tile)
    for i in range(count):
        if bits[i] & magnitude_bits > limit:
            values[i] = real(0)


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
def begin_unit(real, itemsize, r, slot):
    """Return where the largest magnitudes of a unit of tiles are kept, set to zero."""
    largest = r.scratch + slot * r.slot + r.largest
    most = simd.pointer(real, largest)
    for lane in range(VECTOR_BYTES // itemsize):
        most[lane] = real(0)
    return largest


@njit()
def transform_unit(real, word, limit, itemsize, r, slot, spectrum, stride, rows):
    """Free the gathered tiles of a unit of outliers, note them, and transform."""
    tiles = r.scratch + slot * r.slot
    most = simd.pointer(word, tiles + r.largest)
    largest = word(0)
    for lane in range(VECTOR_BYTES // itemsize):
        largest = max(largest, most[lane])
    if largest > limit:
        clear_outliers(real, word, limit, tiles, r.lanes * r.y_tile * r.pitch)
        simd.pointer(np.int64, r.outliers)[slot] = 1
    simd.call(r.forward, (r.context, tiles, tiles + r.work, spectrum, stride, rows))


@njit()
def input_unit_to_spectrum(real, word, limit, itemsize, r, slot, unit, index, spectrum):
    """Transform a unit of tiles of one channel of the stride-1 problem."""
    tiles, largest = r.scratch + slot * r.slot, begin_unit(real, itemsize, r, slot)
    channel, y_tap, x_tap = channel_position(r, index)
    image, y_phase, x_phase, row, column = tile_position(r, unit * r.lanes)
    for lane in range(r.lanes):
        tile = unit * r.lanes + lane
        if lane > 0 and tile < r.all_tiles:
            image, y_phase, x_phase, row, column = next_tile_position(r, image, y_phase, x_phase, row, column)
        plane = r.input + (image * r.channels + channel) * r.y_input * r.x_input * itemsize
        y0 = r.y_stride * y_phase + r.y_dilation * y_tap - r.y_before + row * r.y_core * r.y_input_step
        x0 = r.x_stride * x_phase + r.x_dilation * x_tap - r.x_before + column * r.x_core * r.x_input_step
        rows = r.y_tile if tile < r.all_tiles else 0
        gather(
            real, itemsize, plane, r.y_input, r.x_input, y0, r.y_input_step, rows, x0, r.x_input_step, r.x_tile,
            r.y_tile, r.pitch, tiles + lane * r.tile, largest,
        )  # fmt: skip
    transform_unit(real, word, limit, itemsize, r, slot, spectrum, r.input_step_bytes, r.y_tile)


def _input(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def input_to_spectra(r, slot, begin, end):
        channels = r.channels * r.channel_phases
        for item in range(begin, end):
            unit, index = item // channels, item % channels
            spectrum = r.input_spectra + unit * r.input_unit + index * COMPLEX_BYTES
            input_unit_to_spectrum(real, word, limit, itemsize, r, slot, r.first_unit + unit, index, spectrum)

    return input_to_spectra


def _output(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def output_to_spectra(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        for item in range(begin, end):
            unit, k = item // r.filters, item % r.filters
            largest = begin_unit(real, itemsize, r, slot)
            image, y_phase, x_phase, row, column = tile_position(r, (r.first_unit + unit) * r.lanes)
            for lane in range(r.lanes):
                tile = (r.first_unit + unit) * r.lanes + lane
                if lane > 0 and tile < r.all_tiles:
                    image, y_phase, x_phase, row, column = next_tile_position(r, image, y_phase, x_phase, row, column)
                plane = r.output + (image * r.filters + k) * r.y_output * r.x_output * itemsize
                rows = r.y_core if tile < r.all_tiles else 0
                gather(
                    real, itemsize, plane, r.y_output, r.x_output,
                    y_phase + row * r.y_core * r.y_output_step, r.y_output_step, rows,
                    x_phase + column * r.x_core * r.x_output_step, r.x_output_step, r.x_core,
                    r.y_tile, r.pitch, tiles + lane * r.tile, largest,
                )  # fmt: skip
            spectrum = r.output_spectra + unit * r.output_unit + k * COMPLEX_BYTES
            transform_unit(real, word, limit, itemsize, r, slot, spectrum, r.output_step_bytes, r.y_core)

    return output_to_spectra


@njit()
def filter_of(r, unit, lane):
    """Return the filter of a lane of a unit, and whether it exists."""
    group_filters = r.filters // r.groups
    within = unit % r.group_units * r.lanes + lane
    return unit // r.group_units * group_filters + min(within, group_filters - 1), within < group_filters


@njit()
def gather_filters(real, itemsize, r, unit, index, tiles, largest):
    """Fill the tiles of a unit with its filters' taps for one channel of the stride-1 problem."""
    c, y_tap, x_tap = channel_position(r, index)
    group_channels, group_filters = r.channels // r.groups, r.filters // r.groups
    k, _ = filter_of(r, unit, 0)
    filters = min(r.lanes, group_filters - unit % r.group_units * r.lanes)
    filter_bytes = group_channels * r.y_kernel * r.x_kernel * itemsize
    plane = r.weight + k * filter_bytes + c * r.y_kernel * r.x_kernel * itemsize
    height = r.y_taps if r.lanes > 1 else r.y_tile  # the transforms of a single tile read all rows
    if r.x_tap_step > 1:
        for lane in range(r.lanes):
            gather(
                real, itemsize, plane + min(lane, filters - 1) * filter_bytes, r.y_kernel, r.x_kernel,
                y_tap, r.y_tap_step, r.y_taps if lane < filters else 0, x_tap, r.x_tap_step, r.x_taps, height, r.pitch,
                tiles + lane * r.tile, largest,
            )  # fmt: skip
        return
    rows = min(r.y_taps, (r.y_kernel - y_tap + r.y_tap_step - 1) // r.y_tap_step)
    for count, first, inside in ((filters, 0, rows), (r.lanes - filters, filters, 0)):
        gather_tiles(real, (
            plane + y_tap * r.x_kernel * itemsize, filter_bytes, r.y_tap_step * r.x_kernel * itemsize,
            tiles + first * r.tile, r.tile, r.pitch * itemsize, count, 0, inside, height - inside, 0, r.x_taps,
            r.pitch * itemsize // VECTOR_BYTES, _FETCHED_AHEAD, largest,
        ))  # fmt: skip


def _weight(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def weight_to_spectra(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        depth = r.channels // r.groups * r.channel_phases
        for item in range(begin, end):
            unit, index = item // depth, item % depth
            gather_filters(real, itemsize, r, unit, index, tiles, begin_unit(real, itemsize, r, slot))
            spectrum, stride = r.weight_spectra + unit * r.weight_unit + index * COMPLEX_BYTES, r.weight_step_bytes
            if r.finished == 0:
                transform_unit(real, word, limit, itemsize, r, slot, spectrum, stride, r.y_taps)
            else:
                finished = r.finished + slot * r.steps * COMPLEX_BYTES
                transform_unit(real, word, limit, itemsize, r, slot, finished, COMPLEX_BYTES, r.y_taps)
                stream_steps(real, (finished, spectrum, stride, r.steps))
        simd.fence()

    return weight_to_spectra


_input_to_spectra = stage(_input)
_output_to_spectra = stage(_output)
_weight_to_spectra = stage(_weight)


def input_to_spectra(call: Call, units: int) -> None:
    """Transform the tiles of the block from `input` to the input's spectra."""
    call.run(_input_to_spectra, units * call.depth)


def output_to_spectra(call: Call, units: int) -> None:
    """Transform the tiles of the block from `output` to the output's spectra."""
    call.run(_output_to_spectra, units * call.filters)


def transform_weight(plan: ConvPlan, weight: np.ndarray) -> tuple[Spectra, bool]:
    """Return the spectra of the kernels for the tiles of `plan`, and whether outliers were taken as zero.

    `weight` is C-contiguous, of the plan's dtype and size.
    """
    with Call(plan, plan.geometry) as call:
        spectra = call.weight_spectra(is_kept=True)
        call.point("weight", weight)
        if spectra.array.nbytes > _STREAMED_BYTES:
            call.finish_apart()
        call.run(_weight_to_spectra, call.groups * call.group_units * call.group_depth)
        return spectra, call.met_outliers
