"""Gradient at the input: dX^[f] = W^[f]^T · G^[f] per frequency, summed over the filters of a group; overlap-add.

The adjoint of the forward pass: gradient tiles of T - taps + 1 samples, zero-padded to T, each add T samples to the
gradient. Every sample is summed by one thread, tile after tile in their order, so nothing races and the sum does not
depend on the threads.
"""

import numpy as np

from nbfftconv import simd
from nbfftconv.accumulate import Matrix, product
from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes.call import Call, stage
from nbfftconv.passes.spectra import channel_position, output_to_spectra, tile_position
from nbfftconv.plan import ConvPlan


def _tiles(real):
    def spectra_to_tiles(r, slot, begin, end):
        tile = r.scratch + slot * r.slot
        samples = simd.pointer(real, tile)
        scale = real(1) / real(r.y_tile * r.x_tile)
        for item in range(begin, end):
            spectrum = r.input_spectra + item * r.spectrum
            simd.call(r.inverse, (r.context, tile, tile + r.work, spectrum, spectrum + r.imaginary))
            result = simd.pointer(real, spectrum)  # a tile is smaller than its spectrum, and takes its place
            for i in range(r.y_tile * r.x_tile):
                result[i] = samples[i] * scale

    return spectra_to_tiles


def _add(real):
    itemsize = np.dtype(real).itemsize

    def add_tiles_to_input(r, slot, begin, end):
        channels = r.channels * r.channel_phases
        grid = r.y_count * r.x_count  # the tiles of one phase of an image
        first_grid = r.first_tile // grid
        last_tile = r.first_tile + r.tiles
        strips = r.y_count + (r.y_taps + r.y_core - 2) // r.y_core
        for item in range(begin, end):
            # a strip: the sample rows strip * core + [0, core) of one phase of one channel
            strip = item % strips
            index = item // strips % channels
            first_of_grid = (first_grid + item // (strips * channels)) * grid
            image, y_phase, x_phase, _, _ = tile_position(r, first_of_grid)
            channel, y_tap, x_tap = channel_position(r, index)
            y0 = r.y_stride * y_phase + r.y_dilation * y_tap - r.y_before
            x0 = r.x_stride * x_phase + r.x_dilation * x_tap - r.x_before
            x_step = r.x_input_step
            target = simd.pointer(real, r.input + (image * r.channels + channel) * r.y_input * r.x_input * itemsize)
            for i in range(r.y_core):
                sample_row = strip * r.y_core + i
                y = y0 + sample_row * r.y_input_step
                if y < 0 or y >= r.y_input:
                    continue
                for row in range(max(0, (sample_row - r.y_tile + r.y_core) // r.y_core), min(strip + 1, r.y_count)):
                    for column in range(r.x_count):
                        tile = first_of_grid + row * r.x_count + column
                        if tile < r.first_tile or tile >= last_tile:
                            continue
                        spectrum = r.input_spectra + ((tile - r.first_tile) * channels + index) * r.spectrum
                        samples = simd.pointer(real, spectrum)
                        source = (sample_row - row * r.y_core) * r.x_tile
                        x_start = x0 + column * r.x_core * x_step
                        first = min(r.x_tile, max(0, (x_step - 1 - x_start) // x_step))
                        last = max(first, min(r.x_tile, (r.x_input - x_start + x_step - 1) // x_step))
                        at = y * r.x_input + x_start
                        for j in range(first, last):
                            target[at + j * x_step] += samples[source + j]

    return add_tiles_to_input


_spectra_to_tiles = stage(_tiles)
_add_tiles_to_input = stage(_add)


def grad_input(
    plan: ConvPlan,
    geometry: ConvGeometry,
    weight_spectra: np.ndarray,
    grad_output: np.ndarray,
    result: np.ndarray,
) -> bool:
    """Compute the gradient at the input into `result`; tell whether `grad_output` held outliers, taken as zero.

    Parameters are as in `nbfftconv.passes.forward.forward`.
    """
    call = Call(plan, geometry)
    input_spectra, output_spectra = call.empty_block()
    call.point("input", result)
    call.point("output", grad_output)
    result[...] = 0

    w = Matrix(weight_spectra, group=call.group_filters * call.group_depth, row=1, column=call.group_depth)
    g = Matrix(output_spectra, group=call.group_filters, row=call.filters, column=1)
    x = Matrix(input_spectra, group=call.group_depth, row=1, column=call.depth)
    vertical, horizontal = plan.grid.vertical, plan.grid.horizontal
    grid = vertical.count * horizontal.count
    strips = vertical.count + -(-(vertical.taps - 1) // vertical.core)
    for tiles in call.blocks():
        output_to_spectra(call, tiles)
        product(w, g, x, (call.groups, call.group_depth, tiles, call.group_filters), call.slots)
        call.run(_spectra_to_tiles, tiles * call.depth)
        first = int(call.record["first_tile"])
        grids = (first + tiles - 1) // grid - first // grid + 1
        call.run(_add_tiles_to_input, grids * call.depth * strips)
    return call.met_outliers
