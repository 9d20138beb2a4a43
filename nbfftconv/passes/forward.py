"""Forward pass: Y^[f] = conj(W^[f]) · X^[f] per frequency, summed over the channels of a group; overlap-save.

Input tiles of T samples overlap by taps - 1; of each inverse transform the first T - taps + 1 samples are outputs.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import conjugate_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.jit import njit
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.rows import scatter_row
from nbfftconv.passes.spectra import input_to_spectra, tile_position
from nbfftconv.plan import ConvPlan
from nbfftconv.simd import VECTOR_BYTES


@njit()
def scatter_apart(real, source, target, columns, step, scale_and_bias, relu):
    """`scatter_row` to samples `step` apart."""
    samples, output = simd.pointer(real, source), simd.pointer(real, target)
    for j in range(columns):
        value = samples[j] * scale_and_bias[0] + scale_and_bias[1]
        output[j * step] = real(0) if relu != 0 and value < real(0) else value  # NaN passes


def _output(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_output(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        scale = real(1) / real(r.y_tile * r.x_tile)
        for item in range(begin, end):
            unit, k = item // r.filters, item % r.filters
            spectrum = r.output_spectra + unit * r.output_unit + k * r.output_channel
            simd.call(
                r.inverse,
                (r.context, tiles, tiles + r.work, spectrum, spectrum + r.imaginary, r.output_frequency, r.y_core),
            )
            factors = tiles + r.slot - 64
            scale_and_bias = simd.pointer(real, factors)
            scale_and_bias[0] = scale
            scale_and_bias[1] = simd.pointer(real, r.bias)[k] if r.bias != 0 else real(0)
            first_tile = (r.first_unit + unit) * r.lanes
            for lane in range(min(r.lanes, r.all_tiles - first_tile)):
                samples = tiles + lane * r.tile
                image, y_phase, x_phase, row, column = tile_position(r, first_tile + lane)
                output = r.output + (image * r.filters + k) * r.y_output * r.x_output * itemsize
                x0 = x_phase + column * r.x_core * r.x_output_step
                columns = min(r.x_core, (r.x_output - x0 + r.x_output_step - 1) // r.x_output_step)
                for i in range(r.y_core):
                    y = y_phase + (row * r.y_core + i) * r.y_output_step
                    if y >= r.y_output:
                        break
                    source, target = samples + i * r.pitch * itemsize, output + (y * r.x_output + x0) * itemsize
                    if r.x_output_step == 1:
                        vectors = (columns * itemsize + VECTOR_BYTES - 1) // VECTOR_BYTES
                        scatter_row(real, (source, target, columns, vectors, factors, r.relu))
                    else:
                        scatter_apart(real, source, target, columns, r.x_output_step, scale_and_bias, r.relu)

    return spectra_to_output


_spectra_to_output = stage(_output)


def forward(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    weight_spectra: Spectra,
    bias: np.ndarray | None,
    relu: bool,
    output: np.ndarray,
) -> bool:
    """Convolve `input` into `output`; tell whether the input held outliers, which were taken as zero.

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
    """
    with Call(plan, geometry) as call:
        input_spectra, output_spectra = call.block_spectra()
        call.point("input", input)
        call.point("output", output)
        if bias is not None:
            call.point("bias", bias)
        call.record["relu"] = relu

        w = call.weight_matrix(weight_spectra, filter_axis="row")
        x = call.tile_matrix(input_spectra, call.group_depth, row="unit", column="channel")
        y = call.tile_matrix(output_spectra, call.group_filters, row="channel", column="unit")
        for units in call.blocks():
            input_to_spectra(call, units)
            shape = call.groups, call.group_filters, units, call.group_depth, call.steps
            conjugate_product(w, x, y, shape, call.imaginary, call.slots)
            call.run(_spectra_to_output, units * call.filters)
        return call.met_outliers
