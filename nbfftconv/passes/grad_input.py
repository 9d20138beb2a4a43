"""Gradient at the input: dX^[f] = W^[f]^T · G^[f] per frequency, summed over the filters of a group; overlap-add.

The adjoint of the forward pass: gradient tiles of T - taps + 1 samples, zero-padded to T, each add T samples to the
gradient. Every sample is summed by one thread, tile after tile in their order, so nothing races and the sum does not
depend on the threads.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.call import Call, Spectra, stage
from nbfftconv.passes.spectra import channel_position, output_to_spectra, tile_position
from nbfftconv.passes.tiles import add_row
from nbfftconv.plan import ConvPlan
from nbfftconv.simd import VECTOR_BYTES
from nbfftconv.transforms import COMPLEX_BYTES


def _tiles(real):
    def spectra_to_tiles(r, slot, begin, end):
        tiles = r.scratch + slot * r.slot
        samples = simd.pointer(real, tiles)
        scale = real(1) / real(r.y_tile * r.x_tile)
        channels = r.channels * r.channel_phases
        for item in range(begin, end):
            spectrum = r.input_spectra + item // channels * r.input_unit + item % channels * COMPLEX_BYTES
            simd.call(
                r.inverse,
                (r.context, tiles, tiles + r.work, spectrum, r.input_step_bytes, r.y_tile),
            )
            result = simd.pointer(real, r.tiles + item * r.unit_tiles)
            for i in range(r.lanes * r.y_tile * r.pitch):
                result[i] = samples[i] * scale

    return spectra_to_tiles


def _add(real):
    itemsize = np.dtype(real).itemsize

    def add_tiles_to_input(r, slot, begin, end):
        channels = r.channels * r.channel_phases
        grid = r.y_count * r.x_count  # the tiles of one phase of an image
        first_tile = r.first_unit * r.lanes
        last_tile = min(first_tile + r.units * r.lanes, r.all_tiles)
        first_grid = first_tile // grid
        for item in range(begin, end):
            # a strip: the sample rows strip * core + [0, core) of one phase of one channel
            strip = item % r.strips
            index = item // r.strips % channels
            first_of_grid = (first_grid + item // (r.strips * channels)) * grid
            image, y_phase, x_phase, _, _ = tile_position(r, first_of_grid)
            channel, y_tap, x_tap = channel_position(r, index)
            y0 = r.y_stride * y_phase + r.y_dilation * y_tap - r.y_before
            x0 = r.x_stride * x_phase + r.x_dilation * x_tap - r.x_before
            x_step = r.x_input_step
            plane = r.input + (image * r.channels + channel) * r.y_input * r.x_input * itemsize
            target = simd.pointer(real, plane)
            for i in range(r.y_core):
                sample_row = strip * r.y_core + i
                y = y0 + sample_row * r.y_input_step
                if y < 0 or y >= r.y_input:
                    continue
                for row in range(max(0, (sample_row - r.y_tile + r.y_core) // r.y_core), min(strip + 1, r.y_count)):
                    for column in range(r.x_count):
                        tile = first_of_grid + row * r.x_count + column
                        if tile < first_tile or tile >= last_tile:
                            continue
                        unit, lane = (tile - first_tile) // r.lanes, tile % r.lanes
                        tiles = r.tiles + (unit * channels + index) * r.unit_tiles + lane * r.tile
                        samples = simd.pointer(real, tiles)
                        source = (sample_row - row * r.y_core) * r.pitch
                        x_start = x0 + column * r.x_core * x_step
                        first = min(r.x_tile, max(0, (x_step - 1 - x_start) // x_step))
                        last = max(first, min(r.x_tile, (r.x_input - x_start + x_step - 1) // x_step))
                        at = y * r.x_input + x_start
                        if x_step == 1:
                            vectors = (r.x_tile * itemsize + VECTOR_BYTES - 1) // VECTOR_BYTES
                            add_row(real, (tiles + source * itemsize, plane + at * itemsize, first, last, vectors))
                        else:
                            for j in range(first, last):
                                target[at + j * x_step] += samples[source + j]

    return add_tiles_to_input


_spectra_to_tiles = stage(_tiles)
_add_tiles_to_input = stage(_add)


def grad_input(
    plan: ConvPlan,
    geometry: ConvGeometry,
    weight_spectra: Spectra,
    grad_output: np.ndarray,
    result: np.ndarray,
) -> bool:
    """Compute the gradient at the input into `result`; tell whether `grad_output` held outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    with Call(plan, geometry) as call:
        input_spectra, output_spectra = call.block_spectra()
        call.block_tiles()
        call.point("input", result)
        call.point("output", grad_output)
        result[...] = 0

        w = call.weight_matrix(weight_spectra, filter_axis="column")
        g = call.tile_matrix(output_spectra, call.group_filters, row="unit", column="channel")
        x = call.tile_matrix(input_spectra, call.group_depth, row="channel", column="unit")
        vertical, horizontal = plan.grid.vertical, plan.grid.horizontal
        grid = vertical.count * horizontal.count
        strips = vertical.count + -(-(vertical.taps - 1) // vertical.core)
        call.record["strips"] = strips
        for units in call.blocks():
            output_to_spectra(call, units)
            shape = call.groups, call.group_depth, units, call.group_filters, call.steps
            product(w, g, x, shape, call.slots)
            call.run(_spectra_to_tiles, units * call.depth)
            first = int(call.record["first_unit"]) * call.lanes
            last = min(first + units * call.lanes, plan.grid.tiles) - 1
            call.run(_add_tiles_to_input, (last // grid - first // grid + 1) * call.depth * strips, transforms=False)
        return call.met_outliers
