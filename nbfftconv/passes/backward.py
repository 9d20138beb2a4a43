"""Both gradients of a training step: G^ is made once for both, W^ is the forward pass's, and so is X^ if it was kept.

The gradient at the bias, the sum of G over images and pixels, is the frequency 0 of G^, summed over the tiles.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes import grad_input as input_pass
from nbfftconv.passes import grad_weight as weight_pass
from nbfftconv.passes.blank_windows import BlankWindows
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.plan import FftPlan
from nbfftconv.passes.spectra import TransformedWeight, input_to_spectra, output_to_spectra
from nbfftconv.passes.unmet_weights import UnmetWeights
from nbfftconv.transforms import COMPLEX_BYTES


def _sums(real):
    def output_to_sums(r, slot, begin, end):
        sums = simd.pointer(np.float64, r.sums)
        for k in range(begin, end):
            for unit in range(r.units):
                real_parts = simd.pointer(real, r.output_spectra + unit * r.output_unit + k * COMPLEX_BYTES)
                for lane in range(r.lanes):  # tiles; or, of one tile, frequencies from 0 on
                    sums[k] += real_parts[lane]

    return output_to_sums


_output_to_sums = stage(_sums)


def backward(
    plan: FftPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    input_spectra: Spectra | None,
    weight: TransformedWeight,
    grad_output: np.ndarray,
    grad_input: np.ndarray,
    grad_weight: np.ndarray,
) -> tuple[bool, np.ndarray]:
    """Compute both gradients, into `grad_input` and `grad_weight`.

    Parameters are as in `nbfftconv.passes.forward.forward`, which returned `input_spectra`, if it was to.

    Returns
    -------
    bool
        Whether `grad_output`, or the input, if it was transformed here, held outliers, which were taken as zero.
    numpy.ndarray, shape (filters,)
        The gradient at the bias, in float64, without the outliers.
    """
    call = Call(plan, geometry)
    output_spectra, block_spectra = call.output_spectra(), call.input_spectra()
    weight_gradient = call.weight_spectra()
    call.point("output", grad_output)
    input_pass.begin(call, grad_input)
    sums = np.zeros(call.filters)
    call.point("sums", sums)
    for units in call.blocks():
        output_to_spectra(call, units)
        call.add(_output_to_sums, call.filters)
        if input_spectra is None:
            call.point("input", input)
            call.use_spectra("input", block_spectra)
            input_to_spectra(call, units)
            x = block_spectra
        else:
            x = input_spectra.from_unit(call.first_unit)
        weight_pass.accumulate(call, output_spectra, x, weight_gradient, units)
        input_pass.add(call, weight.spectra, output_spectra, block_spectra, units, grad_input)
    weight_pass.write(call, grad_weight)
    unmet = UnmetWeights(call, geometry, input, grad_output, grad_weight)
    arrays = grad_output, grad_input, weight.array, weight.has_zeros
    blank = BlankWindows(call, geometry, *arrays, is_forward=False)
    call.run()
    unmet.clear()
    blank.fill()
    return call.met_outliers, sums
