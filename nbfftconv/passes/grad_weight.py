"""Gradient at the kernels: dW^[f] = conj(G^[f]) · X^[f]^T per frequency, summed over all tiles of the batch.

Input tiles of T samples against gradient tiles of T - taps + 1; of the inverse transform the first taps samples are
kept.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import conjugate_product, panel_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.places import channel_position, filters_of, samples_inside
from nbfftconv.passes.plan import FftPlan
from nbfftconv.passes.spectra import input_to_spectra, output_to_spectra, spectrum_to_tiles
from nbfftconv.passes.tiles import write_tile
from nbfftconv.passes.unmet_weights import UnmetWeights
from nbfftconv.transforms import COMPLEX_BYTES


def _weight(real):
    itemsize, lanes = np.dtype(real).itemsize, simd.lanes(real)

    def spectra_to_weight(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        simd.pointer(real, tiles + r.factors)[0] = scale = real(1) / real(r.y_tile * r.x_tile)
        channels = r.channels // r.groups
        depth = channels * r.channel_phases
        for item in range(begin, end):
            unit, index = item // depth, item % depth
            spectrum = r.weight_spectra + unit * r.weight_unit + index * COMPLEX_BYTES
            spectrum_to_tiles(itemsize, r, slot, spectrum, r.weight_step_bytes, r.y_taps, r.x_taps)
            c, y_tap, x_tap = channel_position(r, index)
            _, rows = samples_inside(y_tap, r.y_tap_step, r.y_kernel, 0, r.y_taps)
            _, columns = samples_inside(x_tap, r.x_tap_step, r.x_kernel, 0, r.x_taps)
            k, filters = filters_of(r, unit)
            for lane in range(filters):
                tile = tiles + lane * r.tile
                kernel = r.weight + ((k + lane) * channels + c) * r.y_kernel * r.x_kernel * itemsize
                if r.x_tap_step == 1:
                    write_tile(real, (
                        tile, r.pitch * itemsize, kernel + y_tap * r.x_kernel * itemsize,
                        r.y_tap_step * r.x_kernel * itemsize, rows, 0, columns, (columns + lanes - 1) // lanes,
                        tiles + r.factors,
                    ))  # fmt: skip
                    continue
                samples, taps = simd.pointer(real, tile), simd.pointer(real, kernel)
                for i in range(rows):
                    first = (y_tap + i * r.y_tap_step) * r.x_kernel + x_tap
                    for j in range(columns):
                        taps[first + j * r.x_tap_step] = samples[i * r.pitch + j] * scale

    return spectra_to_weight


_spectra_to_weight = stage(_weight)


def accumulate(
    call: Call, output_spectra: Spectra, input_spectra: Spectra, weight_spectra: Spectra, units: int
) -> None:
    """Add the products of a block of tiles to the gradient's spectra, which the first block begins."""
    w = call.weight_matrix(weight_spectra, filter_axis="row")
    is_added = call.first_unit > 0
    if call.lanes == 1:
        g = call.tile_matrix(output_spectra, call.group_filters, row="channel", column="unit")
        x = call.tile_matrix(input_spectra, call.group_depth, row="channel", column="unit")
        shape = call.groups, call.group_filters, call.group_depth, units, call.steps
        call.add_task(conjugate_product(g, x, w, shape, call.slots, is_added))
        return
    g = call.tile_matrix(output_spectra, call.group_filters, row="channel", column="tile")
    x = call.tile_matrix(input_spectra, call.group_depth, row="channel", column="tile")
    shape = call.groups, call.group_filters, call.group_depth, call.tiles_of(units), call.steps
    call.add_task(panel_product(g, x, w, shape, call.panels, call.slots, is_added))


def write(call: Call, result: np.ndarray) -> None:
    """Transform the gradient's spectra back."""
    if call.all_units == 0:  # an empty batch: no block has begun them
        result[...] = 0
        return
    call.point("weight", result)
    call.add(_spectra_to_weight, call.groups * call.group_units * call.group_depth)


def grad_weight(
    plan: FftPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> bool:
    """Compute the gradient with respect to the kernels into `result`; tell whether there were outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    call = Call(plan, geometry)
    spectra = call.output_spectra(), call.input_spectra(), call.weight_spectra()
    call.point("input", input)
    call.point("output", grad_output)
    for units in call.blocks():
        input_to_spectra(call, units)
        output_to_spectra(call, units)
        accumulate(call, *spectra, units)
    write(call, result)
    unmet = UnmetWeights(call, geometry, input, grad_output, result)
    call.run()
    unmet.clear()
    return call.met_outliers
