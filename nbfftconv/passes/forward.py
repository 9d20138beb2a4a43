"""Forward pass: Y^[f] = conj(W^[f]) · X^[f] per frequency, summed over the channels of a group; overlap-save.

Input tiles of T samples overlap by taps - 1; of each inverse transform the first T - taps + 1 samples are outputs.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import COLUMNS, KERNELS, ROWS, conjugate_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.outliers import WORDS
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.spectra import input_to_spectra, input_unit_to_spectrum, tile_position
from nbfftconv.passes.tiles import copy_tile, write_rows
from nbfftconv.plan import ConvPlan
from nbfftconv.simd import VECTOR_BYTES
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
def spectrum_to_output(real, itemsize, r, slot, unit, k, spectrum):
    """Transform a unit of tiles of one filter back, and write what is output of them."""
    tiles = r.scratch + slot * r.slot
    simd.call(r.inverse, (r.context, tiles, tiles + r.work, spectrum, r.output_step_bytes, r.y_core))
    factors = tiles + r.factors
    scale_and_bias = simd.pointer(real, factors)
    scale_and_bias[0] = real(1) / real(r.y_tile * r.x_tile)
    scale_and_bias[1] = simd.pointer(real, r.bias)[k] if r.bias != 0 else real(0)
    first_tile = unit * r.lanes
    tiles_left, lane = min(r.lanes, r.all_tiles - first_tile), 0
    while lane < tiles_left:
        samples = tiles + lane * r.tile
        image, y_phase, x_phase, row, column = tile_position(r, first_tile + lane)
        output = r.output + (image * r.filters + k) * r.y_output * r.x_output * itemsize
        y0 = y_phase + row * r.y_core * r.y_output_step
        rows = min(r.y_core, (r.y_output - y0 + r.y_output_step - 1) // r.y_output_step)
        x0 = x_phase + column * r.x_core * r.x_output_step
        columns = min(r.x_core, (r.x_output - x0 + r.x_output_step - 1) // r.x_output_step)
        target, pitch = output + (y0 * r.x_output + x0) * itemsize, r.y_output_step * r.x_output * itemsize
        if r.x_output_step > 1:
            for i in range(rows):
                source = samples + i * r.pitch * itemsize
                scatter_apart(real, source, target + i * pitch, columns, r.x_output_step, scale_and_bias, r.relu)
            lane += 1
            continue
        source, source_pitch, count = samples, r.pitch * itemsize, 1
        if r.lanes > 1:  # tiles side by side become whole rows first
            count = min(tiles_left - lane, r.x_count - column)
            last = columns = min(count * r.x_core, r.x_output - x0)
            source, source_pitch = tiles + r.strip, columns * itemsize
            for i in range(count):
                wanted = min(r.x_core, last)
                copy_tile(real, (
                    samples + i * r.tile, r.pitch * itemsize, source + i * r.x_core * itemsize, source_pitch, rows,
                    wanted, (wanted * itemsize + VECTOR_BYTES - 1) // VECTOR_BYTES,
                ))  # fmt: skip
                last -= wanted
            if source_pitch == pitch:
                rows, columns = 1, rows * columns
        write_rows(real, (source, source_pitch, target, pitch, rows, columns, factors, r.relu, r.stream))
        lane += count


def _output(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_output(r, slot, begin, end):
        for item in range(begin, end):
            unit, k = item // r.filters, item % r.filters
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
                for unit in range(units):
                    for c in range(depth):
                        spectrum = x + unit * r.input_unit + c * COMPLEX_BYTES
                        index = group * depth + c
                        input_unit_to_spectrum(real, word, limit, itemsize, r, slot, first_unit + unit, index, spectrum)
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
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    weight_spectra: Spectra,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
    keep: bool = False,
) -> tuple[bool, Spectra | None]:
    """Convolve `input` into `output`.

    Parameters
    ----------
    plan : ConvPlan
    geometry : ConvGeometry
        The plan's, or the same with the padding applied to `input` beforehand.
    input, output : numpy.ndarray
        C-contiguous, of the plan's dtype and the geometry's sizes.
    weight_spectra : Spectra
        Of `nbfftconv.passes.spectra.transform_weight`.
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
    with Call(plan, geometry) as call:
        call.point("input", input)
        call.point("output", output)
        if bias is not None:
            call.point("bias", bias)
        call.record["relu"] = relu
        call.record["stream"] = output.nbytes > STREAMED_BYTES
        if plan.fused:
            call.use_spectra("weight", weight_spectra)
            call.run(_input_to_output["filters" if call.lanes > 1 else "frequencies"], call.fused_items)
            return call.met_outliers, None

        input_spectra, output_spectra = call.input_spectra(is_kept=keep), call.output_spectra()
        w = call.weight_matrix(weight_spectra, filter_axis="row")
        y = call.tile_matrix(output_spectra, call.group_filters, row="channel", column="unit")
        for units in call.blocks():
            block = input_spectra.from_unit(call.first_unit if keep else 0)
            call.use_spectra("input", block)
            input_to_spectra(call, units)
            x = call.tile_matrix(block, call.group_depth, row="unit", column="channel")
            shape = call.groups, call.group_filters, units, call.group_depth, call.steps
            conjugate_product(w, x, y, shape, call.slots)
            call.run(_spectra_to_output, units * call.filters)
        return call.met_outliers, input_spectra if keep else None
