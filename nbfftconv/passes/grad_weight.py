"""Gradient at the kernels: dW^[f] = conj(G^[f]) · X^[f]^T per frequency, summed over all tiles of the batch.

Input tiles of T samples against gradient tiles of T - taps + 1; of the inverse transform the first taps samples are
kept.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import Matrix, add_conjugate_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.call import Call, stage
from nbfftconv.passes.spectra import channel_position, input_to_spectra, output_to_spectra
from nbfftconv.plan import ConvPlan


def _weight(real):
    itemsize = np.dtype(real).itemsize

    def spectra_to_weight(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        samples = simd.pointer(real, tile)
        scale = real(1) / real(r.y_tile * r.x_tile)
        for item in range(begin, end):
            spectrum = r.weight_spectra + item * r.spectrum
            simd.call(r.inverse, (r.context, tile, tile + r.work, spectrum, spectrum + r.imaginary))
            plane, y_tap, x_tap = channel_position(r, item)
            target = simd.pointer(real, r.weight + plane * r.y_kernel * r.x_kernel * itemsize)
            for i in range(r.y_taps):
                y = y_tap + i * r.y_tap_step
                if y >= r.y_kernel:
                    break
                for j in range(r.x_taps):
                    x = x_tap + j * r.x_tap_step
                    if x >= r.x_kernel:
                        break
                    target[y * r.x_kernel + x] = samples[i * r.x_tile + j] * scale

    return spectra_to_weight


_spectra_to_weight = stage(_weight)


def grad_weight(
    plan: ConvPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> bool:
    """Compute the gradient with respect to the kernels into `result`; tell whether there were outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    call = Call(plan, geometry)
    input_spectra, output_spectra = call.empty_block()
    weight_spectra = call.empty_spectra("weight_spectra", call.filters, call.group_depth)
    weight_spectra[...] = 0
    call.point("input", input)
    call.point("output", grad_output)
    call.point("weight", result)

    g = Matrix(output_spectra, group=call.group_filters, row=1, column=call.filters)
    x = Matrix(input_spectra, group=call.group_depth, row=1, column=call.depth)
    w = Matrix(weight_spectra, group=call.group_filters * call.group_depth, row=call.group_depth, column=1)
    for tiles in call.blocks():
        input_to_spectra(call, tiles)
        output_to_spectra(call, tiles)
        add_conjugate_product(g, x, w, (call.groups, call.group_filters, call.group_depth, tiles), call.slots)
    call.run(_spectra_to_weight, call.filters * call.group_depth)
    return call.met_outliers
