"""Arrays to spectra: the transforms of input, kernels and gradient that the passes share.

A tile is gathered with zeros around it, freed of outliers and transformed. Outliers (see `nbfftconv.outliers`) would
spread over their whole tile; they are taken as zero here, noted, and their products are added afterwards.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.call import Call, stage
from nbfftconv.plan import ConvPlan


@njit()
def gather(real, plane, height, width, y0, y_step, rows, x0, x_step, columns, tile_height, tile_width, tile):
    """Fill a tile with samples (y0 + i·y_step, x0 + j·x_step), i < rows, j < columns; the rest is zero."""
    begin = min(columns, max(0, (x_step - 1 - x0) // x_step))
    end = max(begin, min(columns, (width - x0 + x_step - 1) // x_step))
    source, target = simd.pointer(real, plane), simd.pointer(real, tile)
    for i in range(tile_height):
        y = y0 + i * y_step
        at = i * tile_width
        if i >= rows or y < 0 or y >= height:
            for j in range(at, at + tile_width):
                target[j] = real(0)
            continue
        for j in range(at, at + begin):
            target[j] = real(0)
        start = y * width + x0
        if x_step == 1:
            for j in range(begin, end):
                target[at + j] = source[start + j]
        else:
            for j in range(begin, end):
                target[at + j] = source[start + j * x_step]
        for j in range(at + end, at + tile_width):
            target[j] = real(0)


@njit()
def clear_outliers(real, word, limit, tile, count):
    """Set the outliers of a tile to zero; tell whether there were any."""
    magnitude_bits = word(~word(0)) >> word(1)
    bits, values = simd.pointer(word, tile), simd.pointer(real, tile)
    largest = word(0)
    for i in range(count):
        largest = max(largest, word(bits[i] & magnitude_bits))
    if largest <= limit:
        return False
    for i in range(count):
        if bits[i] & magnitude_bits > limit:
            values[i] = real(0)
    return True


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
def channel_position(r, index):
    """Return channel, vertical and horizontal channel phase of a channel of the stride-1 problem."""
    phase = index % r.channel_phases
    return index // r.channel_phases, phase // r.x_channel_phases, phase % r.x_channel_phases


@njit()
def transform_tile(real, word, limit, r, slot, tile, spectrum):
    """Free a gathered tile of outliers, note them, and transform it."""
    if clear_outliers(real, word, limit, tile, r.y_tile * r.x_tile):
        simd.pointer(np.int64, r.outliers)[slot] = 1
    simd.call(r.forward, (r.context, tile, tile + r.work, spectrum, spectrum + r.imaginary))


def _input(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def input_to_spectra(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        channels = r.channels * r.channel_phases
        for item in range(begin, end):
            image, y_phase, x_phase, row, column = tile_position(r, r.first_tile + item // channels)
            channel, y_tap, x_tap = channel_position(r, item % channels)
            plane = r.input + (image * r.channels + channel) * r.y_input * r.x_input * itemsize
            y0 = r.y_stride * y_phase + r.y_dilation * y_tap - r.y_before + row * r.y_core * r.y_input_step
            x0 = r.x_stride * x_phase + r.x_dilation * x_tap - r.x_before + column * r.x_core * r.x_input_step
            gather(
                real, plane, r.y_input, r.x_input, y0, r.y_input_step, r.y_tile, x0, r.x_input_step, r.x_tile,
                r.y_tile, r.x_tile, tile,
            )  # fmt: skip
            transform_tile(real, word, limit, r, slot, tile, r.input_spectra + item * r.spectrum)

    return input_to_spectra


def _output(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def output_to_spectra(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        for item in range(begin, end):
            image, y_phase, x_phase, row, column = tile_position(r, r.first_tile + item // r.filters)
            plane = r.output + (image * r.filters + item % r.filters) * r.y_output * r.x_output * itemsize
            gather(
                real, plane, r.y_output, r.x_output,
                y_phase + row * r.y_core * r.y_output_step, r.y_output_step, r.y_core,
                x_phase + column * r.x_core * r.x_output_step, r.x_output_step, r.x_core,
                r.y_tile, r.x_tile, tile,
            )  # fmt: skip
            transform_tile(real, word, limit, r, slot, tile, r.output_spectra + item * r.spectrum)

    return output_to_spectra


def _weight(real):
    word, limit = WORDS[real]
    itemsize = np.dtype(real).itemsize

    def weight_to_spectra(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        for item in range(begin, end):
            # filters and the channels of a filter's group, phases last: in memory one after the other
            plane_index, y_tap, x_tap = channel_position(r, item)
            plane = r.weight + plane_index * r.y_kernel * r.x_kernel * itemsize
            gather(
                real, plane, r.y_kernel, r.x_kernel, y_tap, r.y_tap_step, r.y_taps, x_tap, r.x_tap_step, r.x_taps,
                r.y_tile, r.x_tile, tile,
            )  # fmt: skip
            transform_tile(real, word, limit, r, slot, tile, r.weight_spectra + item * r.spectrum)

    return weight_to_spectra


_input_to_spectra = stage(_input)
_output_to_spectra = stage(_output)
_weight_to_spectra = stage(_weight)


def input_to_spectra(call: Call, tiles: int) -> None:
    """Transform the tiles of the block from `input` to `input_spectra`, ``[tile, channel and phase]``."""
    call.run(_input_to_spectra, tiles * call.depth)


def output_to_spectra(call: Call, tiles: int) -> None:
    """Transform the tiles of the block from `output` to `output_spectra`, ``[tile, filter]``."""
    call.run(_output_to_spectra, tiles * call.filters)


def transform_weight(plan: ConvPlan, weight: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the spectra of the kernels for the tiles of `plan`, and whether outliers were taken as zero.

    Parameters
    ----------
    plan : ConvPlan
    weight : numpy.ndarray
        C-contiguous, of the plan's dtype and size.

    Returns
    -------
    spectra : numpy.ndarray, shape (filters, channels of a group and phases, scalars)
    met_outliers : bool
    """
    call = Call(plan, plan.geometry)
    spectra = call.empty_spectra("weight_spectra", call.filters, call.group_depth)
    call.point("weight", weight)
    call.run(_weight_to_spectra, call.filters * call.group_depth)
    return spectra, call.met_outliers
