"""Arrays to spectra: the transforms of input, kernels and gradient that the passes share.

A tile is gathered with zeros around it, freed of outliers and transformed. Outliers (see `nbfftconv.outliers`) would
spread over their whole tile; they are taken as zero here, noted, and their products are added afterwards.
"""

from dataclasses import dataclass

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.places import (
    channel_position,
    filter_of,
    filters_of,
    input_position,
    next_tile_position,
    output_position,
    place_filters,
    place_input,
    place_output,
    place_tiles,
    samples_inside,
    tile_position,
)
from nbfftconv.passes.plan import FftPlan
from nbfftconv.passes.tiles import clear_outliers, copy_tiles, find_least, gather_tile, stream_steps
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES

#: Kernels' spectra of more bytes would not be found in the caches of a core, but drive out what is there.
_STREAMED_BYTES = 4 * 2**20
#: Kernels are fetched so many bytes before they are read: a unit reads as many places as it has filters.
_FETCHED_AHEAD = 256
#: So many bytes of weights are looked at for zeros, and then transformed: a core's own cache holds them in between.
_LOOKED_AT_BYTES = 2**17


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
        gather_tile(real, (
            source, y_step * width * itemsize, tile, pitch * itemsize,
            above, inside, tile_height - above - inside, begin, end, vectors, ahead, largest,
        ))  # fmt: skip
        return
    gather_tile(real, (plane, 0, tile, pitch * itemsize, tile_height, 0, 0, 0, 0, vectors, 0, largest))
    most = simd.pointer(real, largest)
    for i in range(inside):
        pixels = simd.pointer(real, source + i * y_step * width * itemsize)
        samples = simd.pointer(real, tile + (above + i) * pitch * itemsize)
        for j in range(begin, end):
            samples[j] = value = pixels[j * x_step]
            if most[0] == most[0] and not abs(value) <= most[0]:  # a NaN comes in, and stays
                most[0] = abs(value)


@njit()
def begin_tile(real, itemsize, r, slot):
    """Return where the largest magnitudes of a tile are kept, set to zero."""
    largest = r.scratch + slot * r.slot + r.largest
    most = simd.pointer(real, largest)
    for lane in range(VECTOR_BYTES // itemsize):
        most[lane] = real(0)
    return largest


@njit()
def _met_outliers(word, limit, itemsize, r, slot):
    """Tell whether magnitudes are over the limit, and note it."""
    most = simd.pointer(word, r.scratch + slot * r.slot + r.largest)
    largest = word(0)
    for lane in range(VECTOR_BYTES // itemsize):
        largest = max(largest, most[lane])
    if largest > limit:
        simd.pointer(np.int64, r.outliers)[slot] = 1
        return True
    return False


@njit()
def transform_tile(real, word, limit, itemsize, r, slot, spectrum, stride, rows, columns):
    """Free the gathered tile of outliers, and transform it."""
    tile = r.scratch + slot * r.slot
    if _met_outliers(word, limit, itemsize, r, slot):
        clear_outliers(real, (tile, r.y_tile * r.pitch * itemsize // VECTOR_BYTES))
    simd.call(r.forward, (r.context, tile, tile + r.work, spectrum, stride, rows, columns))


@njit()
def transform_places(real, word, limit, itemsize, r, slot, base, spectrum, stride, rows, ahead):
    """Transform a unit of tiles from their places, free of outliers; tell whether the places are what they were."""
    tiles = r.scratch + slot * r.slot
    places, work, largest = tiles + r.places, tiles + r.work, tiles + r.largest
    simd.call(r.forward, (r.context, places, base, work, spectrum, stride, rows, ahead, largest))
    if not _met_outliers(word, limit, itemsize, r, slot):
        return True
    copy_tiles(real, (
        places, r.place, base, tiles, r.tile, r.pitch * itemsize, rows, r.pitch // r.lanes,
    ))  # fmt: skip
    place_tiles(itemsize, r, places, rows)
    simd.call(r.forward, (r.context, places, tiles, work, spectrum, stride, rows, 0, largest))
    return False


@njit()
def spectrum_to_tiles(itemsize, r, slot, spectrum, stride, rows, columns):
    """Transform a unit back to tiles in scratch memory, one after the other."""
    tiles = r.scratch + slot * r.slot
    if r.lanes == 1:
        simd.call(r.inverse, (r.context, tiles, tiles + r.work, spectrum, stride, rows, columns))
        return
    places = simd.pointer(np.int64, tiles + r.places)
    for lane in range(r.lanes):
        places[lane] = lane * r.tile
    pitch = r.pitch * itemsize
    simd.call(r.inverse, (r.context, tiles + r.places, tiles, pitch, tiles + r.work, spectrum, stride, rows))


@njit()
def input_unit_to_spectrum(real, word, limit, itemsize, r, slot, unit, index, spectrum, placed):
    """Transform a unit of tiles of one channel of the stride-1 problem.

    `placed` tells what the places are: what the last call returned, or -1.
    """
    tiles = r.scratch + slot * r.slot
    channel, y_tap, x_tap = channel_position(r, index)
    plane_bytes = r.y_input * r.x_input * itemsize
    base, place, ahead = (
        r.input + channel * plane_bytes,
        unit * r.channel_phases + index % r.channel_phases,
        plane_bytes,
    )
    if r.lanes == 1 or r.x_input_step > 1:
        largest = begin_tile(real, itemsize, r, slot)
        image, y_phase, x_phase, row, column = tile_position(r, unit * r.lanes)
        for lane in range(r.lanes):
            tile = unit * r.lanes + lane
            if lane > 0 and tile < r.all_tiles:
                image, y_phase, x_phase, row, column = next_tile_position(r, image, y_phase, x_phase, row, column)
            y, x = input_position(r, y_tap, x_tap, y_phase, x_phase, row, column)
            gather(
                real, itemsize, base + image * r.channels * plane_bytes, r.y_input, r.x_input,
                y, r.y_input_step, r.y_tile if tile < r.all_tiles else 0, x, r.x_input_step, r.x_tile,
                r.y_tile, r.pitch, tiles + lane * r.tile, largest,
            )  # fmt: skip
        if r.lanes == 1:
            transform_tile(real, word, limit, itemsize, r, slot, spectrum, r.input_step_bytes, r.y_tile, r.x_tile)
            return -1
        base, place, ahead = tiles, 0, 0
        if placed != place:
            place_tiles(itemsize, r, tiles + r.places, r.y_tile)
    elif placed != place:
        place_input(itemsize, r, tiles + r.places, unit, y_tap, x_tap)
    holds = transform_places(
        real, word, limit, itemsize, r, slot, base, spectrum, r.input_step_bytes, r.y_tile, ahead
    )  # fmt: skip
    return place if holds else -1


def _input(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def input_to_spectra(r, slot, begin, end):
        channels = r.channels * r.channel_phases
        placed = -1
        for item in range(begin, end):
            unit, index = item // channels, item % channels
            spectrum = r.input_spectra + unit * r.input_unit + index * COMPLEX_BYTES
            placed = input_unit_to_spectrum(
                real, word, limit, itemsize, r, slot, r.first_unit + unit, index, spectrum, placed
            )  # fmt: skip

    return input_to_spectra


def _output(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def output_to_spectra(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        plane_bytes = r.y_output * r.x_output * itemsize
        placed = -1
        for item in range(begin, end):
            unit, k = item // r.filters, item % r.filters
            spectrum, stride = r.output_spectra + unit * r.output_unit + k * COMPLEX_BYTES, r.output_step_bytes
            base, place, ahead = r.output + k * plane_bytes, unit, plane_bytes
            if r.lanes == 1 or r.x_output_step > 1:
                largest = begin_tile(real, itemsize, r, slot)
                image, y_phase, x_phase, row, column = tile_position(r, (r.first_unit + unit) * r.lanes)
                for lane in range(r.lanes):
                    tile = (r.first_unit + unit) * r.lanes + lane
                    if lane > 0 and tile < r.all_tiles:
                        image, y_phase, x_phase, row, column = next_tile_position(
                            r, image, y_phase, x_phase, row, column
                        )
                    y, x = output_position(r, y_phase, x_phase, row, column)
                    gather(
                        real, itemsize, base + image * r.filters * plane_bytes, r.y_output, r.x_output,
                        y, r.y_output_step, r.y_core if tile < r.all_tiles else 0, x, r.x_output_step, r.x_core,
                        r.y_tile, r.pitch, tiles + lane * r.tile, largest,
                    )  # fmt: skip
                if r.lanes == 1:
                    transform_tile(real, word, limit, itemsize, r, slot, spectrum, stride, r.y_core, r.x_core)
                    continue
                base, place, ahead = tiles, 0, 0
                if placed != place:
                    place_tiles(itemsize, r, tiles + r.places, r.y_core)
            elif placed != place:
                place_output(itemsize, r, tiles + r.places, r.first_unit + unit)
            holds = transform_places(
                real, word, limit, itemsize, r, slot, base, spectrum, stride, r.y_core, ahead
            )  # fmt: skip
            placed = place if holds else -1

    return output_to_spectra


@njit()
def _has_zero(real, word, itemsize, source, count, least):
    """Tell whether one of `count` values is zero; of `least`, a vector is overwritten."""
    lanes = VECTOR_BYTES // itemsize
    values, bits = simd.pointer(real, source), simd.pointer(word, least)
    found = False
    if count < lanes:
        for i in range(count):
            found |= values[i] == real(0)
        return found
    find_least(real, (source, count // lanes, source + (count - lanes) * itemsize, least))
    for lane in range(lanes):
        found |= bits[lane] == word(0)
    return found


@njit()
def _note_zeros(real, word, itemsize, r, slot, unit, first, last):
    """Note which filters of a unit have weights that are zero in channels first .. last - 1."""
    has_zeros, least = simd.pointer(np.uint8, r.has_zeros), r.scratch + slot * r.slot + r.largest
    taps, channels = r.y_kernel * r.x_kernel, r.channels // r.groups
    first_filter, count = filters_of(r, unit)
    for k in range(first_filter, first_filter + count):
        weights = r.weight + (k * channels + first) * taps * itemsize
        if _has_zero(real, word, itemsize, weights, (last - first) * taps, least):
            has_zeros[k] = 1


def _weight(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def weight_to_spectra(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        depth = r.channels // r.groups * r.channel_phases
        # channels of a unit, looked at together, that a core's cache holds until they are transformed
        run = max(1, _LOOKED_AT_BYTES // (r.lanes * r.y_kernel * r.x_kernel * itemsize)) * r.channel_phases
        placed = -1
        for item in range(begin, end):
            unit, index = item // depth, item % depth
            channel, y_tap, x_tap = channel_position(r, index)
            if item == begin or index % run == 0:
                last = min(depth, (index // run + 1) * run, index + end - item)
                _note_zeros(real, word, itemsize, r, slot, unit, channel, (last - 1) // r.channel_phases + 1)
            channel_bytes = channel * r.y_kernel * r.x_kernel * itemsize
            spectrum, stride = r.weight_spectra + unit * r.weight_unit + index * COMPLEX_BYTES, r.weight_step_bytes
            if r.finished != 0:
                spectrum, stride = r.finished + slot * r.steps * COMPLEX_BYTES, COMPLEX_BYTES
            base, place = r.weight + channel_bytes, unit * r.channel_phases + index % r.channel_phases
            if r.lanes == 1 or r.x_tap_step > 1:
                largest = begin_tile(real, itemsize, r, slot)
                for lane in range(r.lanes):
                    k, exists = filter_of(r, unit, lane)
                    gather(
                        real, itemsize, base + k * (r.channels // r.groups) * r.y_kernel * r.x_kernel * itemsize,
                        r.y_kernel, r.x_kernel, y_tap, r.y_tap_step, r.y_taps if exists else 0,
                        x_tap, r.x_tap_step, r.x_taps, r.y_tile, r.pitch, tiles + lane * r.tile, largest,
                    )  # fmt: skip
            if r.lanes == 1:
                transform_tile(real, word, limit, itemsize, r, slot, spectrum, stride, r.y_taps, r.x_taps)
            else:
                if r.x_tap_step > 1:
                    base, place = tiles, 0
                    if placed != place:
                        place_tiles(itemsize, r, tiles + r.places, r.y_taps)
                elif placed != place:
                    place_filters(itemsize, r, tiles + r.places, unit, y_tap)
                holds = transform_places(
                    real, word, limit, itemsize, r, slot, base, spectrum, stride, r.y_taps, _FETCHED_AHEAD
                )  # fmt: skip
                placed = place if holds else -1
            if r.finished != 0:
                target = r.weight_spectra + unit * r.weight_unit + index * COMPLEX_BYTES
                stream_steps(real, (spectrum, target, r.weight_step_bytes, r.steps))
        simd.fence()

    return weight_to_spectra


_input_to_spectra = stage(_input)
_output_to_spectra = stage(_output)
_weight_to_spectra = stage(_weight)


def input_to_spectra(call: Call, units: int) -> None:
    """Transform the tiles of the block from `input` to the input's spectra."""
    call.add(_input_to_spectra, units * call.depth)


def output_to_spectra(call: Call, units: int) -> None:
    """Transform the tiles of the block from `output` to the output's spectra."""
    call.add(_output_to_spectra, units * call.filters)


@dataclass(frozen=True)
class TransformedWeight:
    """Kernels with their spectra.

    Attributes
    ----------
    array : numpy.ndarray
        The kernels themselves.
    spectra : Spectra
    has_outliers : bool
        Whether outliers were taken as zero.
    has_zeros : numpy.ndarray or None
        For each filter, as uint8, whether one of its weights is zero; None if none is.
    """

    array: np.ndarray
    spectra: Spectra
    has_outliers: bool
    has_zeros: np.ndarray | None


def transform_weight(plan: FftPlan, weight: np.ndarray) -> TransformedWeight:
    """Transform kernels, C-contiguous, of the plan's dtype and size, for the tiles of `plan`."""
    call = Call(plan, plan.geometry)
    spectra = call.weight_spectra(is_kept=True)
    call.point("weight", weight)
    if spectra.array.nbytes > _STREAMED_BYTES:
        call.finish_apart()
    has_zeros = np.zeros(weight.shape[0], np.uint8)
    call.point("has_zeros", has_zeros)
    call.add(_weight_to_spectra, call.groups * call.group_units * call.group_depth)
    call.run()
    return TransformedWeight(weight, spectra, call.met_outliers, has_zeros if has_zeros.any() else None)
