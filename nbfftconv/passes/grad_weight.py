"""Gradient at the kernels: dW^[f] = conj(G^[f]) · X^[f]^T per frequency, summed over all tiles of the batch.

Input tiles of T samples against gradient tiles of T - taps + 1; of the inverse transform the first taps samples are
kept.
"""

import numpy as np

from nbfftconv import split_product
from nbfftconv.accumulate import conjugate_product, panel_product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.context import Context, Spectra
from nbfftconv.passes.from_spectra import add_from_spectra
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.passes.to_spectra import add_to_spectra
from nbfftconv.passes.unmet_weights import UnmetWeights
from nbfftconv.rounding import cdiv


def add_products(context: Context, output_spectra: Spectra, input_spectra: Spectra, weight_spectra: Spectra) -> None:
    """Add the products of the block of tiles under way to the gradient's spectra, which the first block begins."""
    w = context.weight_matrix(weight_spectra, filter_axis="row")
    is_added = context.first_lane_block > 0
    column = "lane block" if context.lanes == 1 else "tile"
    g = context.tile_matrix(output_spectra, context.group_filters, row="channel", column=column)
    x = context.tile_matrix(input_spectra, context.group_depth, row="channel", column=column)
    shape = context.groups, context.group_filters, context.group_depth, context.block_tiles, context.bins
    room = context.room_for_parts(context.group_depth, cdiv(context.group_filters, context.lanes), context.block_tiles)
    if room is not None:
        context.add_task(split_product.panel_product(g, x, w, shape, room, context.workers, is_added))
    elif context.lanes == 1:
        context.add_task(conjugate_product(g, x, w, shape, context.workers, is_added))
    else:
        context.add_task(panel_product(g, x, w, shape, context.panels, context.workers, is_added))


def add_write(context: Context, weight_spectra: Spectra, result: np.ndarray) -> None:
    """Transform the gradient's spectra back."""
    if context.all_lane_blocks == 0:  # an empty batch: no block has begun them
        result[...] = 0
        return
    add_from_spectra(context, "weight", weight_spectra, result)


def grad_weight(
    plan: TiledPlan, geometry: ConvGeometry, input: np.ndarray, grad_output: np.ndarray, result: np.ndarray
) -> bool:
    """Compute the gradient with respect to the kernels into `result`; tell whether there were outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    context = Context(plan, geometry)
    output_spectra, input_spectra = context.output_spectra(), context.input_spectra()
    weight_spectra = context.weight_spectra()
    for _ in context.blocks():
        add_to_spectra(context, "input", input, input_spectra)
        add_to_spectra(context, "output", grad_output, output_spectra)
        add_products(context, output_spectra, input_spectra, weight_spectra)
    add_write(context, weight_spectra, result)
    unmet = UnmetWeights(context, geometry, input, grad_output, result)
    context.run()
    unmet.clear()
    return context.met_outliers
