"""Forward pass: Y^[f] = conj(W^[f]) · X^[f] per frequency, summed over the channels of a group; overlap-save.

Input tiles of T samples overlap by taps - 1; of each inverse transform the first T - taps + 1 samples are outputs.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import COLUMNS, KERNELS, ROWS, conjugate_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.blank_windows import BlankWindows
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.places import output_position, place_strips, tile_position
from nbfftconv.passes.plan import FftPlan
from nbfftconv.passes.spectra import TransformedWeight, input_to_spectra, input_unit_to_spectrum
from nbfftconv.passes.tiles import write_rows
from nbfftconv.transforms import COMPLEX_BYTES

#: An output larger than this would not be found in the caches of a core, but drive out what is there.
STREAMED_BYTES = 4 * 2**20


@njit()
def scatter_apart(real, source, target, columns, step, scale_and_bias, relu):
    """A row of `write_rows` to samples `step` apart."""
    samples, output = simd.pointer(real, source), simd.pointer(real, target)
    for j in range(columns):
        value = samples[j] * scale_and_bias[0] + scale_and_bias[1]
        output[j * step] = real(0) if relu != 0 and value < real(0) else value  # NaN passes


@njit()
def write_output(real, itemsize, r, source, source_pitch, k, position, count, factors):
    """Write what is output of `count` tiles of one filter that lie side by side."""
    image, y_phase, x_phase, row, column = position
    y0, x0 = output_position(r, y_phase, x_phase, row, column)
    rows = min(r.y_core, (r.y_output - y0 + r.y_output_step - 1) // r.y_output_step)
    columns = min(count * r.x_core, (r.x_output - x0 + r.x_output_step - 1) // r.x_output_step)
    plane = r.output + (image * r.filters + k) * r.y_output * r.x_output * itemsize
    target, pitch = plane + (y0 * r.x_output + x0) * itemsize, r.y_output_step * r.x_output * itemsize
    if r.x_output_step > 1:
        scale_and_bias = simd.pointer(real, factors)
        for i in range(rows):
            scatter_apart(
                real, source + i * source_pitch, target + i * pitch, columns, r.x_output_step, scale_and_bias, r.relu
            )  # fmt: skip
        return
    if source_pitch == pitch and columns * itemsize == pitch:
        rows, columns = 1, rows * columns
    write_rows(real, (source, source_pitch, target, pitch, rows, columns, factors, r.relu, r.stream))


@njit()
def spectrum_to_output(real, itemsize, r, slot, unit, k, spectrum):
    """Transform a unit of tiles of one filter back, and write what is output of them.

    If it is of many tiles, its strips have their places.
    """
    tiles = r.scratch + slot * r.slot
    factors = tiles + r.factors
    scale_and_bias = simd.pointer(real, factors)
    scale_and_bias[0] = real(1) / real(r.y_tile * r.x_tile)
    scale_and_bias[1] = simd.pointer(real, r.bias)[k] if r.bias != 0 else real(0)
    if r.lanes == 1:
        simd.call(r.inverse, (r.context, tiles, tiles + r.work, spectrum, r.output_step_bytes, r.y_core, r.x_core))
        write_output(real, itemsize, r, tiles, r.pitch * itemsize, k, tile_position(r, unit), 1, factors)
        return
    places, strips = tiles + r.places, tiles + r.strips
    work, stride = tiles + r.work, r.output_step_bytes
    simd.call(r.inverse, (r.context, places, strips, r.strip_pitch, work, spectrum, stride, r.y_core))
    tile, last_tile = unit * r.lanes, min((unit + 1) * r.lanes, r.all_tiles)
    while tile < last_tile:
        position = tile_position(r, tile)
        count = min(last_tile - tile, r.x_count - position[4])
        source = strips + simd.pointer(np.int64, places)[tile - unit * r.lanes]
        write_output(real, itemsize, r, source, r.strip_pitch, k, position, count, factors)
        tile += count


def _output(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_output(r, slot, begin, end):
        placed = -1
        for item in range(begin, end):
            unit, k = item // r.filters, item % r.filters
            if r.lanes > 1 and unit != placed:
                place_strips(itemsize, r, r.scratch + slot * r.slot + r.places, r.first_unit + unit)
                placed = unit
            spectrum = r.output_spectra + unit * r.output_unit + k * COMPLEX_BYTES
            spectrum_to_output(real, itemsize, r, slot, r.first_unit + unit, k, spectrum)
        simd.fence()

    return spectra_to_output


def _fused(kernel):
    def factory(real):
        word, limit = WORDS[real]
        itemsize = np.dtype(real).itemsize

        def input_to_output(r, slot, begin, end):
            x = r.scratch + slot * r.slot + r.slot_input
            y = r.scratch + slot * r.slot + r.slot_output
            depth, filters = r.channels // r.groups * r.channel_phases, r.filters // r.groups
            blocks = (r.units + r.block_units - 1) // r.block_units
            shares = (filters + r.share - 1) // r.share
            filter_bytes = itemsize if r.lanes > 1 else r.weight_unit
            for item in range(begin, end):
                first_unit = item % blocks * r.block_units
                first_filter = item // blocks % shares * r.share
                group = item // (blocks * shares)
                units = min(r.block_units, r.units - first_unit)
                placed = -1
                for unit in range(units):
                    for c in range(depth):
                        spectrum = x + unit * r.input_unit + c * COMPLEX_BYTES
                        placed = input_unit_to_spectrum(
                            real, word, limit, itemsize, r, slot, first_unit + unit, group * depth + c, spectrum, placed
                        )  # fmt: skip
                for i in range(first_filter, min(first_filter + r.share, filters), ROWS):
                    rows = min(ROWS, filters - i)
                    w = r.weight_spectra + (group * r.group_units + i // r.lanes) * r.weight_unit
                    w += i % r.lanes * itemsize
                    for j in range(0, units, COLUMNS):
                        kernel(real, (
                            w, filter_bytes, COMPLEX_BYTES, 0, r.weight_step_bytes,
                            x + j * r.input_unit, r.input_unit, COMPLEX_BYTES, r.input_step_bytes,
                            y + j * r.output_unit, COMPLEX_BYTES, r.output_unit, r.output_step_bytes,
                            depth, 1, r.steps, 0, x, 0, rows, min(COLUMNS, units - j),
                        ))  # fmt: skip
                    for unit in range(units):
                        if r.lanes > 1:
                            place_strips(itemsize, r, r.scratch + slot * r.slot + r.places, first_unit + unit)
                        for row in range(rows):
                            spectrum = y + unit * r.output_unit + row * COMPLEX_BYTES
                            k = group * filters + i + row
                            spectrum_to_output(real, itemsize, r, slot, first_unit + unit, k, spectrum)
            simd.fence()

        return input_to_output

    return factory


_spectra_to_output = stage(_output)
_input_to_output = {
    "filters": stage(_fused(KERNELS["scalar_conjugate_product"])),
    "frequencies": stage(_fused(KERNELS["conjugate_product"])),
}


def forward(
    plan: FftPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    weight: TransformedWeight,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
    keep: bool = False,
) -> tuple[bool, Spectra | None]:
    """Convolve `input` into `output`.

    Parameters
    ----------
    plan : FftPlan
    geometry : ConvGeometry
        The plan's, or the same with the padding applied to `input` beforehand.
    input, output : numpy.ndarray
        C-contiguous, of the plan's dtype and the geometry's sizes.
    weight : TransformedWeight
    bias : numpy.ndarray or None
        (out channels,), contiguous.
    relu : bool
    keep : bool
        Whether to return the input's spectra; not with a fused plan.

    Returns
    -------
    bool
        Whether the input held outliers, which were taken as zero.
    Spectra or None
        The input's spectra, of all tiles.
    """
    call = Call(plan, geometry)
    call.point("input", input)
    call.point("output", output)
    if bias is not None:
        call.point("bias", bias)
    call.record["relu"] = relu
    call.record["stream"] = output.nbytes > STREAMED_BYTES
    arrays = input, output, weight.array, weight.has_zeros
    if plan.fused:
        call.use_spectra("weight", weight.spectra)
        call.add(_input_to_output["filters" if call.lanes > 1 else "frequencies"], call.fused_items)
        blank = BlankWindows(call, geometry, *arrays, bias, relu, is_forward=True)
        call.run()
        blank.fill()
        return call.met_outliers, None

    input_spectra, output_spectra = call.input_spectra(is_kept=keep), call.output_spectra()
    w = call.weight_matrix(weight.spectra, filter_axis="row")
    y = call.tile_matrix(output_spectra, call.group_filters, row="channel", column="unit")
    for units in call.blocks():
        block = input_spectra.from_unit(call.first_unit if keep else 0)
        call.use_spectra("input", block)
        input_to_spectra(call, units)
        x = call.tile_matrix(block, call.group_depth, row="unit", column="channel")
        shape = call.groups, call.group_filters, units, call.group_depth, call.steps
        call.add_task(conjugate_product(w, x, y, shape, call.slots))
        call.add(_spectra_to_output, units * call.filters)
    blank = BlankWindows(call, geometry, *arrays, bias, relu, is_forward=True)
    call.run()
    blank.fill()
    return call.met_outliers, input_spectra if keep else None
