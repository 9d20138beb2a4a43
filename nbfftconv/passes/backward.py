"""Both gradients of a training step: G^ is made once for both, W^ is the forward pass's, and so is X^ if it was kept.

The gradient at the bias, the sum of G over images and pixels, is in G^, for FFTs at the frequency 0, summed over the
tiles.
"""

import numpy as np

from nbfftconv import jit, simd
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes import grad_input as input_pass
from nbfftconv.passes import grad_weight as weight_pass
from nbfftconv.passes.blank_windows import BlankWindows
from nbfftconv.passes.context import Context, Spectra
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.passes.to_spectra import TransformedWeight, add_to_spectra
from nbfftconv.passes.unmet_weights import UnmetWeights
from nbfftconv.passes.views import SPECTRA
from nbfftconv.records import RecordType, fields
from nbfftconv.threads import Task

# At `sums` a float64 for each filter, to which `bins` bins of the spectra are added, times float64 `factors`; an entry
# has so many bytes.
_SUMS = RecordType(fields("sums", "lane_blocks", "factors", "bins", "lanes", "entry", spectra=SPECTRA))


def _sums(real):
    def output_to_sums(r, worker, begin, end):
        sums, factors = simd.pointer(np.float64, r.sums), simd.pointer(np.float64, r.factors)
        for k in range(begin, end):
            for lane_block in range(r.lane_blocks):
                spectrum = r.spectra.address + lane_block * r.spectra.lane_block + k * r.entry
                for index in range(r.bins):
                    real_parts = simd.pointer(real, spectrum + index * r.spectra.bin)
                    for lane in range(r.lanes):  # tiles; or, of one tile, frequencies from 0 on
                        sums[k] += factors[index] * real_parts[lane]

    return output_to_sums


_output_to_sums = jit.stage(_SUMS)(_sums)


def _add_sums(context: Context, output_spectra: Spectra, sums: np.ndarray) -> None:
    """Add the sums of the block of tiles under way."""
    spectra, factors = (output_spectra.address, output_spectra.lane_block, output_spectra.bin), context.transform.sums
    numbers = context.lane_blocks, context.address(factors), len(factors), context.lanes, context.entry
    record = _SUMS.make((context.address(sums), *numbers, spectra))
    context.add_task(Task(_output_to_sums.address(context.real), record, context.filters, context.workers))


def backward(
    plan: TiledPlan,
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
    context = Context(plan, geometry)
    output_spectra, block_spectra = context.output_spectra(), context.input_spectra()
    weight_spectra = context.weight_spectra()
    record = input_pass.begin(context, grad_input)
    sums = np.zeros(context.filters)
    for _ in context.blocks():
        add_to_spectra(context, "output", grad_output, output_spectra)
        _add_sums(context, output_spectra, sums)
        if input_spectra is None:
            add_to_spectra(context, "input", input, block_spectra)
            x = block_spectra
        else:
            x = input_spectra.from_lane_block(context.first_lane_block)
        weight_pass.add_products(context, output_spectra, x, weight_spectra)
        input_pass.add_tiles(context, record, weight.spectra, output_spectra, block_spectra)
    weight_pass.add_write(context, weight_spectra, grad_weight)
    unmet = UnmetWeights(context, geometry, input, grad_output, grad_weight)
    arrays = grad_output, grad_input, weight.array, weight.has_zeros
    blank = BlankWindows(context, geometry, *arrays, is_forward=False)
    context.run()
    unmet.clear()
    blank.fill()
    return context.met_outliers, sums
