"""Forward pass: Y^[f] = conj(W^[f]) · X^[f] per frequency, summed over the channels of a group; overlap-save.

Input tiles of T samples overlap by taps - 1; of each inverse transform the first T - taps + 1 samples are outputs.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import Matrix, conjugate_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.call import Call, stage
from nbfftconv.passes.spectra import input_to_spectra, tile_position
from nbfftconv.plan import ConvPlan


def _output(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_output(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        samples = simd.pointer(real, tile)
        scale = real(1) / real(r.y_tile * r.x_tile)
        for item in range(begin, end):
            image, y_phase, x_phase, row, column = tile_position(r, r.first_tile + item // r.filters)
            k = item % r.filters
            spectrum = r.output_spectra + item * r.spectrum
            simd.call(r.inverse, (r.context, tile, tile + r.work, spectrum, spectrum + r.imaginary))
            bias = real(0)
            if r.bias != 0:
                bias = simd.pointer(real, r.bias)[k]
            output = simd.pointer(real, r.output + (image * r.filters + k) * r.y_output * r.x_output * itemsize)
            x0 = x_phase + column * r.x_core * r.x_output_step
            x_step = r.x_output_step
            columns = min(r.x_core, (r.x_output - x0 + x_step - 1) // x_step)
            for i in range(r.y_core):
                y = y_phase + (row * r.y_core + i) * r.y_output_step
                if y >= r.y_output:
                    break
                source, target = i * r.x_tile, y * r.x_output + x0
                if r.relu == 0:
                    for j in range(columns):
                        output[target + j * x_step] = samples[source + j] * scale + bias
                else:
                    for j in range(columns):
                        value = samples[source + j] * scale + bias
                        output[target + j * x_step] = real(0) if value < real(0) else value  # NaN passes

    return spectra_to_output


_spectra_to_output = stage(_output)


def forward(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    weight_spectra: np.ndarray,
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
    weight_spectra : numpy.ndarray
        Of `nbfftconv.passes.spectra.transform_weight`.
    bias : numpy.ndarray or None
        (out channels,), contiguous.
    relu : bool
    """
    call = Call(plan, geometry)
    input_spectra, output_spectra = call.empty_block()
    call.point("input", input)
    call.point("output", output)
    if bias is not None:
        call.point("bias", bias)
    call.record["relu"] = relu

    w = Matrix(weight_spectra, group=call.group_filters * call.group_depth, row=call.group_depth, column=1)
    x = Matrix(input_spectra, group=call.group_depth, row=call.depth, column=1)
    y = Matrix(output_spectra, group=call.group_filters, row=1, column=call.filters)
    for tiles in call.blocks():
        input_to_spectra(call, tiles)
        conjugate_product(w, x, y, (call.groups, call.group_filters, tiles, call.group_depth), call.slots)
        call.run(_spectra_to_output, tiles * call.filters)
    return call.met_outliers
