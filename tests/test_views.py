"""Views: where the samples of tiles are, against the definition of a convolution; and strides of any kind."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest
from geometries import Case, cases
from hypothesis import given
from hypothesis import strategies as st

from nbfftconv.geometry import ConvGeometry
from nbfftconv.passes import views
from nbfftconv.passes.context import Context
from nbfftconv.passes.to_spectra import add_to_spectra
from nbfftconv.passes.views import VIEW, AxisView, View
from nbfftconv.tiling import TileGrid, axis_tiles, problem_sizes

F32 = np.dtype(np.float32)


def record(view):
    return np.array(view, VIEW)[()]


def grid_of(geometry, extra):
    vertical, horizontal = (
        axis_tiles(geometry, axis, taps + more)
        for axis, ((_, taps), more) in enumerate(zip(problem_sizes(geometry), extra, strict=True))
    )
    return TileGrid(vertical, horizontal, geometry.input_size[0])


def samples(view, tile, lanes, index):
    """A tile of one channel as the numbers of the values in its array, -1 where it has none."""
    v = record(view)
    channel, phases = views.channel_of(v, index)
    found = views.tile_at(v, views.position_of(v, tile), phases)
    numbers = np.full((view.y.samples, view.x.samples), -1)
    for i in range(found.above, found.below):
        for j in range(found.begin, found.end):
            address = channel * view.channel + found.offset + i * views.row_step(v) + j * views.column_step(v)
            numbers[i, j] = address // F32.itemsize
    return numbers


def numbers_at(size, *indices):
    """The numbers of values of an array at these indices, -1 where it has none."""
    indices = np.broadcast_arrays(*indices)
    inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(indices, size, strict=True)])
    indices = [np.where(inside, i, 0) for i in indices]
    return np.where(inside, np.ravel_multi_index(indices, size), -1)


def pixels(geometry, axis, tiles, phase, channel_phase, number):
    """Pixels along an axis that a tile reads: what its outputs see under the taps of a channel phase; None where no
    output sees anything."""
    outputs, kernel = geometry.output_size[2 + axis], geometry.weight_size[2 + axis]
    found = [None] * tiles.tile
    for q, v in itertools.product(range(tiles.outputs), range(tiles.taps)):
        output = (number * tiles.outputs + q) * tiles.output_step + phase
        tap = v * tiles.tap_step + channel_phase
        if output < outputs and tap < kernel:
            pixel = output * geometry.stride[axis] + tap * geometry.dilation[axis] - geometry.padding[axis][0]
            assert found[q + v] in (None, pixel)
            found[q + v] = pixel
    return found


@given(case=cases(max_size=12, max_kernel=5, max_products=4000), data=st.data(), lanes=st.sampled_from((1, 4, 16)))
def test_tiles_are_what_a_convolution_reads_and_writes(case, data, lanes):
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    grid = grid_of(geometry, data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4))))
    y, x = grid.vertical, grid.horizontal
    input_view, output_view = (
        make(geometry, grid, lanes, F32.itemsize) for make in (views.input_view, views.output_view)
    )
    (images, channels, *_), (filters, group_channels, *_) = geometry.input_size, geometry.weight_size
    phases = [range(n) for n in (images, y.image_phases, x.image_phases, y.count, x.count)]
    tiles = list(itertools.product(*phases))
    assert input_view.tiles == output_view.tiles == len(tiles) == images * input_view.image_tiles
    tile = data.draw(st.integers(0, len(tiles) - 1))
    image, y_phase, x_phase, row, column = tiles[tile]

    index = data.draw(st.integers(0, channels * grid.channel_phases - 1))
    channel, rest = divmod(index, grid.channel_phases)
    taps = divmod(rest, x.channel_phases)
    rows = pixels(geometry, 0, y, y_phase, taps[0], row)
    columns = pixels(geometry, 1, x, x_phase, taps[1], column)
    found = samples(input_view, tile, lanes, index)
    for (i, at_row), (j, at_column) in itertools.product(enumerate(rows), enumerate(columns)):
        if at_row is not None and at_column is not None:
            assert found[i, j] == numbers_at(geometry.input_size, image, channel, at_row, at_column)

    k = data.draw(st.integers(0, filters - 1))
    rows = (row * y.outputs + np.arange(y.outputs)) * y.output_step + y_phase
    columns = (column * x.outputs + np.arange(x.outputs)) * x.output_step + x_phase
    expected = numbers_at(geometry.output_size, image, k, rows[:, None], columns)
    np.testing.assert_array_equal(samples(output_view, tile, lanes, k), expected)

    weight_view = views.weight_view(geometry, grid, lanes, F32.itemsize)
    index = data.draw(st.integers(0, group_channels * grid.channel_phases - 1))
    channel, rest = divmod(index, grid.channel_phases)
    taps = divmod(rest, x.channel_phases)
    rows, columns = (np.arange(a.taps) * a.tap_step + tap for a, tap in zip((y, x), taps, strict=True))
    expected = numbers_at(geometry.weight_size, k, channel, rows[:, None], columns)
    np.testing.assert_array_equal(samples(weight_view, k, lanes, index), expected)


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize("groups", [1, 3])
def test_lane_blocks_hold_every_tile_once_and_none_of_two_groups(groups, lanes):
    filters = 21 * groups
    geometry = ConvGeometry.from_arguments((2, groups, 9, 9), (filters, 1, 3, 3), groups=groups)
    view = views.weight_view(geometry, grid_of(geometry, (3, 3)), lanes, F32.itemsize)
    found = []
    for lane_block in range(groups * view.lane_blocks):
        first, count = views.tiles_of(record(view), lanes, lane_block)
        assert 1 <= count <= lanes and first // 21 == (first + count - 1) // 21
        found += range(first, first + count)
    assert found == list(range(filters))


AXES = st.builds(
    AxisView,
    size=st.integers(1, 9),
    stride=st.integers(-50, 50),
    origin=st.integers(-5, 5),
    phases=st.integers(1, 3),
    phase_step=st.integers(0, 4),
    channel_phases=st.integers(1, 3),
    channel_phase_step=st.integers(0, 4),
    tiles=st.integers(1, 3),
    samples=st.integers(1, 5),
    advance=st.integers(1, 4),
    sample_step=st.integers(1, 4),
)


@given(axes=st.tuples(AXES, AXES, AXES))
def test_positions_in_three_axes(axes):
    """They are numbered like nested loops, one step at a time as by divisions, and begin where the module says."""
    image_tiles = prod(axis.phases * axis.tiles for axis in axes)
    phases = prod(axis.channel_phases for axis in axes)
    view = View(0, 10_000, 1000, 2, phases, image_tiles, 2 * image_tiles, 1, 0, *axes)
    v = record(view)
    loops = itertools.product(range(2), *(range(a.phases) for a in axes), *(range(a.tiles) for a in axes))
    position = views.position_of(v, 0)
    for tile, expected in enumerate(loops):
        assert position == views.position_of(v, tile) == expected
        for index in (0, phases - 1, 2 * phases - 1):
            channel, taps = views.channel_of(v, index)
            unravelled = np.unravel_index(index, (2, *(a.channel_phases for a in axes)))
            assert (channel, *taps) == tuple(map(int, unravelled))
            first = tuple(
                a.origin + r * a.phase_step + tap * a.channel_phase_step + t * a.advance * a.sample_step
                for a, r, t, tap in zip(axes, expected[1:4], expected[4:], taps, strict=True)
            )
            assert views.first_sample(v, position, taps) == first
            found = views.tile_at(v, position, taps)
            z, y, x = axes
            rows = [
                i for i in range(y.samples) if 0 <= first[1] + i * y.sample_step < y.size and 0 <= first[0] < z.size
            ]
            assert list(range(found.above, found.below)) == rows
            columns = [j for j in range(x.samples) if 0 <= first[2] + j * x.sample_step < x.size]
            assert list(range(found.begin, found.end)) == columns
            strides = sum(at * axis.stride for at, axis in zip(first, axes, strict=True))
            assert found.offset == expected[0] * 10_000 + strides
        position = views.next_position(v, position, 1)


@pytest.mark.parametrize(("transform", "tile"), [("codelet", 12), ("four_step", 30), ("fftw", (13, 15))])
@pytest.mark.parametrize("kind", ["channels last", "reversed", "every third"])
def test_strides_are_data(kind, transform, tile, rng):
    """Spectra of an array that is not contiguous, as of a copy that is."""
    case = Case((2, 3, 20, 18), (4, 3, 5, 4), padding=2)
    plan = case.plan("grad_weight", F32, algorithm="fft", transform=transform, tile=tile)
    if kind == "channels last":
        array = rng.standard_normal((2, 20, 18, 3), F32).transpose(0, 3, 1, 2)
    elif kind == "reversed":
        array = rng.standard_normal((2, 3, 20, 18), F32)[:, ::-1, ::-1, ::-1]
    else:
        array = rng.standard_normal((2, 3, 20, 54), F32)[..., ::3]

    def spectra(array):
        context = Context(plan, plan.geometry)
        view = context.views["input"]
        image, channel, row, column = array.strides
        strided = view._replace(
            image=image, channel=channel, y=view.y._replace(stride=row), x=view.x._replace(stride=column)
        )
        context.views, context._records = {**context.views, "input": strided}, {}
        found = context.input_spectra()
        found.array[...] = 0
        for _ in context.blocks():
            add_to_spectra(context, "input", array, found)
        context.run()
        return found.array[: context.most_lane_blocks * found.lane_block].copy()  # memory that is used again is larger

    found = spectra(array)
    assert found.any()
    np.testing.assert_array_equal(found, spectra(np.ascontiguousarray(array)))
