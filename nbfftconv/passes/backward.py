"""Both gradients of a training step: G^ is made once for both, W^ is the forward pass's, and so is X^ if it was kept.

The gradient at the bias, the sum of G over images and pixels, is the frequency 0 of G^, summed over the tiles.
"""

import numpy as np

from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes import grad_input as input_pass
from nbfftconv.passes import grad_weight as weight_pass
from nbfftconv.passes.call import Call, Spectra
from nbfftconv.passes.spectra import input_to_spectra, output_to_spectra
from nbfftconv.plan import ConvPlan
from nbfftconv.transforms import COMPLEX_BYTES


def _output_sums(call: Call, output_spectra: Spectra, units: int) -> np.ndarray:
    """Return the sum over all samples of a block of tiles, for each filter."""
    vectors = output_spectra.array[: units * output_spectra.unit // output_spectra.array.itemsize]
    first_step = vectors.reshape(units, call.steps, -1)[:, 0, :]
    # of each filter a vector of real parts and one of imaginary parts; lanes are tiles, or frequencies from 0 on
    channels = output_spectra.step // COMPLEX_BYTES
    real_parts = first_step.reshape(units, channels, 2, -1)[:, : call.filters, 0, : call.lanes]
    return real_parts.sum(axis=(0, 2), dtype=np.float64)


def backward(
    plan: ConvPlan,
    geometry: ConvGeometry,
    input: np.ndarray,
    input_spectra: Spectra | None,
    weight_spectra: Spectra,
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
    with Call(plan, geometry) as call:
        output_spectra, block_spectra = call.output_spectra(), call.input_spectra()
        weight_gradient = call.weight_spectra()
        call.point("output", grad_output)
        input_pass.begin(call, grad_input)
        sums = np.zeros(call.filters)
        for units in call.blocks():
            output_to_spectra(call, units)
            sums += _output_sums(call, output_spectra, units)
            if input_spectra is None:
                call.point("input", input)
                call.use_spectra("input", block_spectra)
                input_to_spectra(call, units)
                x = block_spectra
            else:
                x = input_spectra.from_unit(call.first_unit)
            weight_pass.accumulate(call, output_spectra, x, weight_gradient, units)
            input_pass.add(call, weight_spectra, output_spectra, block_spectra, units, grad_input)
        weight_pass.write(call, grad_weight)
        return call.met_outliers, sums
