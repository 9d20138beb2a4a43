"""Forward pass: Y^[f] = conj(W^[f]) · X^[f] per frequency, summed over the channels of a group; overlap-save.

Input tiles of T samples overlap by taps - 1; of each inverse transform the first T - taps + 1 samples are outputs.
A fused pass lets a worker take a block of tiles from input to output, in the cache of its core.
"""

import functools
from array import array

import numpy as np

from nbfftconv import jit, simd, split_product, threads
from nbfftconv.accumulate import COMPLEX, KERNELS, REAL, Blocking, block_depth, conjugate_product
from nbfftconv.arrays import address_of
from nbfftconv.geometry import ConvGeometry
from nbfftconv.outliers import WORDS
from nbfftconv.passes.blank_windows import BlankWindows, is_covered
from nbfftconv.passes.context import Array, Context, Numbers, Spectra
from nbfftconv.passes.few_tiles import FewTiles
from nbfftconv.passes.from_spectra import (
    FROM_SPECTRA,
    add_from_spectra,
    from_spectra_numbers,
    lane_block_from_spectrum,
    point_to_results,
    streams,
)
from nbfftconv.passes.plan import TiledPlan
from nbfftconv.passes.recorder import Recorder
from nbfftconv.passes.to_spectra import (
    TO_SPECTRA,
    TransformedWeight,
    add_to_spectra,
    lane_block_to_spectrum,
    to_spectra_numbers,
)
from nbfftconv.passes.views import SPECTRA, in_order_of_phases
from nbfftconv.passes.workspace import WORKSPACE, memory_of
from nbfftconv.program import NOTHING, Program
from nbfftconv.records import Record, RecordType, fields
from nbfftconv.rounding import cdiv
from nbfftconv.transforms import Transform, registry

# Channels, with their phases, and filters are those of a group. A work item transforms `block_lane_blocks` lane blocks,
# and convolves them with `filter_block` filters. The addresses of the spectra of input and output are counted from a
# worker's memory; of the kernels, `filter` bytes are from one filter of a lane block to the next.
_FUSED = RecordType(
    fields(
        "channels", "filters", "filter_block", "filter", "weight_lane_blocks", "lane_blocks", "block_lane_blocks",
        input=TO_SPECTRA, output=FROM_SPECTRA, weight=SPECTRA, workspace=WORKSPACE,
    )
)  # fmt: skip


def _fused(kernel, blocking: Blocking):
    most_rows, most_columns, entry, most_depth = blocking.rows, blocking.columns, blocking.entry_bytes, blocking.depth
    # Of a bin of real spectra, filters share what is in the first-level cache; complex ones go through all bins.
    together, tall_rows, is_bin_by_bin = blocking.fused_rows, blocking.tall_rows, blocking is REAL

    def factory(real):
        word, limit = WORDS[real]
        itemsize = np.dtype(real).itemsize

        def input_to_output(r, worker, begin, end):
            memory, lanes = memory_of(r.workspace, worker), r.input.transform.lanes
            xs, ys, ws = r.input.spectra, r.output.spectra, r.weight
            x, y = memory + xs.address, memory + ys.address
            blocks, depth = cdiv(r.lane_blocks, r.block_lane_blocks), block_depth(lanes, r.channels, most_depth)
            filter_blocks = cdiv(r.filters, r.filter_block)
            for item in range(begin, end):
                first = item % blocks * r.block_lane_blocks
                first_filter = item // blocks % filter_blocks * r.filter_block
                group = item // (blocks * filter_blocks)
                lane_blocks = min(r.block_lane_blocks, r.lane_blocks - first)
                pointed = -1
                for i in range(lane_blocks):
                    for at in range(r.channels):
                        c = in_order_of_phases(r.input.source, r.channels, at)
                        spectrum = x + i * xs.lane_block + c * entry
                        index = group * r.channels + c
                        pointed = lane_block_to_spectrum(
                            real, word, limit, itemsize, r.input, worker, first + i, index, spectrum, xs.bin, pointed
                        )  # fmt: skip
                if lanes > 1:
                    for i in range(lane_blocks):
                        point_to_results(itemsize, r.output, worker, first + i, 1 + i)
                bins = 1 if is_bin_by_bin else r.input.transform.bins
                last_filter = min(first_filter + r.filter_block, r.filters)
                for first_row in range(first_filter, last_filter, together):
                    last_row = min(first_row + together, last_filter)
                    for bin in range(0, r.input.transform.bins, bins):
                        k = first_row
                        while k < last_row:
                            rows = min(most_rows, last_row - k)
                            if lanes > 1:  # of one vector of filters
                                rows = min(rows, lanes - k % lanes)
                            if lane_blocks == 1 and tall_rows <= min(lanes, last_row - k):
                                rows = tall_rows
                            w = ws.address + (group * r.weight_lane_blocks + k // lanes) * ws.lane_block
                            w += k % lanes * itemsize + bin * ws.bin
                            for j in range(0, lane_blocks, most_columns):
                                for c in range(0, r.channels, depth):
                                    kernel(real, (
                                        w + c * entry, r.filter, entry, 0, ws.bin,
                                        x + j * xs.lane_block + bin * xs.bin + c * entry, xs.lane_block, entry, xs.bin,
                                        y + j * ys.lane_block + bin * ys.bin + (k - first_row) * entry,
                                        entry, ys.lane_block, ys.bin,
                                        min(depth, r.channels - c), 1, bins, c,
                                        w + ws.bin + c * entry if is_bin_by_bin else x, 0,
                                        rows, min(most_columns, lane_blocks - j),
                                    ))  # fmt: skip
                            k += rows
                    for i in range(lane_blocks):
                        for k in range(first_row, last_row):
                            spectrum = y + i * ys.lane_block + (k - first_row) * entry
                            index = group * r.filters + k
                            lane_block_from_spectrum(
                                real, itemsize, r.output, worker, first + i, index, spectrum, ys.bin, 1 + i
                            )  # fmt: skip
            if r.output.stream != 0:
                simd.fence()

        return input_to_output

    return factory


_input_to_output = {
    "filters": jit.stage(_FUSED)(_fused(KERNELS["scalar_conjugate_product"], COMPLEX)),
    "frequencies": jit.stage(_FUSED)(_fused(KERNELS["conjugate_product"], COMPLEX)),
    "points": jit.stage(_FUSED)(_fused(KERNELS["real_scalar_product"], REAL)),
}


def _fused_record(numbers: Numbers) -> Record:
    weight_lane_blocks = numbers.views["weight"].lane_blocks
    sizes = numbers.group_depth, numbers.group_filters, numbers.filter_block, 0, weight_lane_blocks
    stages = (
        to_spectra_numbers(numbers, "input", numbers.fused_spectra["input"]),
        from_spectra_numbers(numbers, "output", numbers.fused_spectra["output"]),
    )
    blocks = numbers.all_lane_blocks, numbers.most_lane_blocks
    return _FUSED.make((*sizes, *blocks, *stages, (0, 0, 0), numbers.workspace_numbers))


def _add_fused(
    context: Context,
    input: Array,
    weight: Spectra,
    bias: Array | None,
    relu: bool,
    output: Array,
) -> None:
    record = context.record("fused", _fused_record)
    record["input.source.address"] = context.address(input)
    record["input.outliers"] = context.address(context.outliers)
    record["input.workspace.address"] = record["output.workspace.address"] = context.workspace
    context.point(record, "weight", weight)
    record["filter"] = context.plan.dtype.itemsize if context.lanes > 1 else weight.lane_block
    record["output.target.address"] = context.address(output)
    if bias is not None:
        record["output.bias"] = context.address(bias)
    record["output.relu"], record["output.stream"] = relu, streams(context, "output", output)
    filter_blocks = cdiv(context.group_filters, context.filter_block)
    items = context.groups * filter_blocks * cdiv(context.all_lane_blocks, context.most_lane_blocks)
    kind = "points" if context.blocking is REAL else "filters" if context.lanes > 1 else "frequencies"
    context.add(_input_to_output[kind], record, items)


def _add_stages(
    context: Context,
    input: Array,
    weight: Spectra,
    bias: Array | None,
    relu: bool,
    output: Array,
    kept: Spectra | None,
) -> None:
    """Add the tasks of a pass; the input's spectra, of all tiles, are to be `kept`, or in scratch memory."""
    if context.plan.fused:
        _add_fused(context, input, weight, bias, relu, output)
        return
    input_spectra, output_spectra = kept or context.input_spectra(), context.output_spectra()
    w = context.weight_matrix(weight, filter_axis="row")
    y = context.tile_matrix(output_spectra, context.group_filters, row="channel", column="lane block")
    for lane_blocks in context.blocks():
        block = input_spectra.from_lane_block(context.first_lane_block if kept else 0)
        add_to_spectra(context, "input", input, block)
        x = context.tile_matrix(block, context.group_depth, row="lane block", column="channel")
        room = context.room_for_parts(context.group_filters, lane_blocks, context.group_depth)
        if room is not None:
            shape = context.groups, context.group_filters, lane_blocks, context.group_depth, context.bins
            context.add_task(split_product.product(w, x, y, shape, room, context.workers))
        else:
            few = FewTiles(context, block, output_spectra)
            full = lane_blocks - (few.tiles > 0)
            shape = context.groups, context.group_filters, full, context.group_depth, context.bins
            context.add_task(conjugate_product(w, x, y, shape, context.workers, few=few.operands))
            few.add_transposition()
        add_from_spectra(context, "output", output_spectra, output, bias, relu)


def forward(
    plan: TiledPlan,
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
    plan : TiledPlan
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
    if keep:
        context = Context(plan, geometry)
        input_spectra = context.input_spectra(is_kept=True)
        _add_stages(context, input, weight.spectra, bias, relu, output, input_spectra)
        arrays = input, output, weight.array, weight.has_zeros
        blank = BlankWindows(context, geometry, *arrays, bias, relu, is_forward=True)
        context.run()
        blank.fill()
        return context.met_outliers, input_spectra
    of_pass = Forward(plan, geometry, weight, bias is not None, relu)
    left = of_pass.run(address_of(input), address_of(bias), address_of(output))
    return left is not None and of_pass.finish(left, input, bias, output), None


class Forward:
    """A forward pass that keeps nothing, of some kernels, for calls that differ in their arrays only.

    Parameters
    ----------
    plan : TiledPlan
    geometry : ConvGeometry
        As of `forward`.
    weight : TransformedWeight
    has_bias, relu : bool
    """

    def __init__(
        self, plan: TiledPlan, geometry: ConvGeometry, weight: TransformedWeight, has_bias: bool, relu: bool
    ) -> None:
        self._plan, self._geometry, self._weight, self._relu = plan, geometry, weight, relu
        transform = registry.get(plan.transform)
        layout, workers = (weight.spectra.lane_block, weight.spectra.bin), threads.get_workers(plan.seconds)
        self._program, self._outliers = recorded_program(plan, geometry, transform, layout, has_bias, relu, workers)
        self._has_blank_windows = weight.has_zeros is not None or not is_covered(geometry)

    def run(self, input: int, bias: int, output: int) -> "array[int] | None":
        """Convolve what is at an address into what is at another one; return what `finish` needs, None if no more
        is to be done. `bias` is 0 if there is none.
        """
        words = self._program.run(input=input, output=output, spectra=self._weight.spectra.address, bias=bias)
        return words if self._has_blank_windows or any(words) else None

    def finish(self, words: "array[int]", input: np.ndarray, bias: np.ndarray | None, output: np.ndarray) -> bool:
        """Write what windows have in which nothing multiplies anything; tell whether there were outliers, taken as
        zero."""
        outliers = self._outliers
        if self._has_blank_windows or any(words[outliers:]):
            found = np.frombuffer(words, np.uint8, offset=8 * outliers)
            context, weight = Context(self._plan, self._geometry), self._weight
            arrays = input, output, weight.array, weight.has_zeros
            BlankWindows(context, self._geometry, *arrays, bias, self._relu, is_forward=True, found=found).fill()
        return any(words[:outliers])


@functools.lru_cache(maxsize=256)
def recorded_program(
    plan: TiledPlan,
    geometry: ConvGeometry,
    transform: Transform,
    layout: tuple[int, int],
    has_bias: bool,
    relu: bool,
    workers: tuple[int, int],
) -> tuple[Program, int]:
    """Return the program of a pass that keeps nothing, and how many of its words tell whether there were outliers."""
    recorder, itemsize = Recorder(plan, geometry), plan.dtype.itemsize
    input = recorder.operand("input", geometry.input_size, itemsize)
    output = recorder.operand("output", geometry.output_size, itemsize)
    bias = recorder.operand("bias", geometry.weight_size[:1], itemsize)
    spectra = Spectra(NOTHING, recorder.operand("spectra", (0,), itemsize).address, *layout)
    _add_stages(recorder, input, spectra, bias if has_bias else None, relu, output, None)
    BlankWindows(recorder, geometry, input, output, input, None, is_forward=True)
    return recorder.recorded(), recorder.areas
