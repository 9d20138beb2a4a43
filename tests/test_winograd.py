"""Winograd's maps: matrices, emitted code without compiling, stages against the matrices, and how exact they are."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from compare import ERROR_BOUND, relative_error
from geometries import Case
from llvmlite import binding
from numpy_emitter import NumpyEmitter

import nbfftconv
from nbfftconv.passes.context import Context
from nbfftconv.passes.to_spectra import add_to_spectra
from nbfftconv.transforms import winograd

SIZES = list(itertools.product(winograd.OUTPUTS, range(1, winograd.MOST_TAPS + 1)))
MAPS = ("input", "output", "weight", "to_input", "to_output", "to_weight")


@pytest.fixture(params=[64, 32, 16])
def v(request):
    return NumpyEmitter(np.float64, request.param)


@pytest.mark.parametrize(("outputs", "taps"), SIZES)
class TestMatrices:
    def test_correlation(self, outputs, taps, rng):
        a, g, b = winograd.matrices(outputs, taps)
        samples, kernel = rng.standard_normal(outputs + taps - 1), rng.standard_normal(taps)
        expected = [samples[i : i + taps] @ kernel for i in range(outputs)]
        np.testing.assert_allclose(a @ ((g @ kernel) * (b @ samples)), expected, rtol=0, atol=1e-13)

    def test_errors_grow_as_is_said(self, outputs, taps):
        """Of products whose errors are in proportion to them: the root of the mean square, by two axes."""
        a, g, b = winograd.matrices(outputs, taps)
        products = np.linalg.norm(g, axis=1) * np.linalg.norm(b, axis=1)
        growth = ((a * products) ** 2).sum(axis=1).max() / taps
        assert growth < {1: 1.01, 2: 2.01, 3: 1.7, 4: 4.3, 5: 7.2}[outputs + taps - 2 if taps > 1 else 1]

    @pytest.mark.parametrize("name", MAPS)
    def test_emitted_maps(self, v, outputs, taps, name, rng):
        a, g, b = winograd.matrices(outputs, taps)
        matrix = {"input": b, "output": a.T, "weight": g, "to_input": b.T, "to_output": a, "to_weight": g.T}[name]
        assert matrix.shape[::-1] == winograd._sizes(name, outputs, taps)
        values = rng.standard_normal((matrix.shape[1], v.lanes))
        found = winograd._apply_map(v, name, outputs, taps, [v.vector(lanes) for lanes in values])
        found = np.stack([value.lanes if hasattr(value, "lanes") else np.full(v.lanes, value) for value in found])
        np.testing.assert_allclose(found, matrix @ values, rtol=0, atol=1e-12)

    def test_sum_of_a_tile(self, outputs, taps, rng):
        a, _, _ = winograd.matrices(outputs, taps)
        tile = rng.standard_normal(outputs)
        assert abs(winograd._sum_factors(outputs, taps) @ (a.T @ tile) - tile.sum()) < 1e-13


def test_operations(rng):
    """Those of the largest tile along an axis: 12 in and 12 out."""
    for name, most in (("input", 12), ("to_output", 12)):
        v = NumpyEmitter(np.float32, 64)
        count = winograd._sizes(name, 4, 3)[0]
        for value in winograd._apply_map(v, name, 4, 3, [v.vector(rng.standard_normal(16)) for _ in range(count)]):
            v.keep(value)
        assert sum(v.counts.values()) <= most


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sequences_are_sorted_and_back(v, count, rng):
    flat = rng.standard_normal(count * v.lanes)
    vectors = [v.vector(part) for part in flat.reshape(count, -1)]
    sorted_ = winograd._deinterleave(v, vectors)
    np.testing.assert_array_equal([x.lanes for x in sorted_], flat.reshape(-1, count).T)
    np.testing.assert_array_equal(np.concatenate([x.lanes for x in winograd._interleave(v, sorted_)]), flat)


CASES = [
    Case((1, 2, 6, 70), (3, 2, 3, 3), padding=1),
    Case((2, 3, 13, 14), (5, 3, 3, 3), padding=(1, 0)),
    Case((5, 2, 7, 7), (3, 2, 3, 3), padding=1),
    Case((3, 2, 4, 3), (2, 2, 3, 1), padding=(1, 0)),
    Case((3, 2, 1, 31), (2, 2, 1, 3), padding=2),
    Case((1, 2, 11, 12), (2, 2, 2, 3), stride=(1, 2), padding=1),
    Case((1, 2, 15, 16), (2, 2, 3, 2), dilation=(2, 3), padding=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile_outputs", winograd.OUTPUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["input", "output"])
def test_spectra_of_tiles(case, tile_outputs, dtype, name, rng):
    """The stage against the matrices, tile by tile, from an array with zeros around it."""
    grid = case.plan("grad_weight", dtype, algorithm="winograd").grid
    taps = grid.vertical.taps, grid.horizontal.taps
    tile = tuple(tile_outputs + of_axis - 1 for of_axis in taps)
    plan = case.plan("grad_weight", dtype, algorithm="winograd", tile=tile)
    context = Context(plan, plan.geometry)
    view = context.views[name]
    array = rng.standard_normal(case.input_size if name == "input" else case.output_size).astype(dtype)
    spectra = getattr(context, f"{name}_spectra")()
    for _ in context.blocks():
        assert context.lane_blocks == context.all_lane_blocks
        add_to_spectra(context, name, array, spectra)
    context.run()
    channels = view.channels * view.channel_phases
    shape = context.all_lane_blocks, tile[0] * tile[1], spectra.bin // context.entry, context.lanes
    found = spectra.array[: np.prod(shape) * array.itemsize].view(dtype).reshape(shape)[:, :, :channels]
    maps = [winograd.matrices(tile_outputs, of_axis)[2 if name == "input" else 0] for of_axis in taps]
    if name == "output":
        maps = [a.T for a in maps]

    def sample(image, channel, y, x):
        inside = 0 <= y < array.shape[2] and 0 <= x < array.shape[3]
        return float(array[image, channel, y, x]) if inside else 0.0

    for tile_index in range(view.tiles):
        rest, x = divmod(tile_index, view.x.tiles)
        rest, y = divmod(rest, view.y.tiles)
        rest, x_phase = divmod(rest, view.x.phases)
        image, y_phase = divmod(rest, view.y.phases)
        for index in range(channels):
            channel, phase = divmod(index, view.channel_phases)
            y_channel, x_channel = divmod(phase, view.x.channel_phases)
            places = []
            for axis, number, phase_, channel_phase in (
                (view.y, y, y_phase, y_channel), (view.x, x, x_phase, x_channel),
            ):  # fmt: skip
                first = axis.origin + phase_ * axis.phase_step + channel_phase * axis.channel_phase_step
                places.append([first + (number * axis.advance + i) * axis.sample_step for i in range(axis.samples)])
            d = np.array([[sample(image, channel, row, column) for column in places[1]] for row in places[0]])
            expected = (maps[0] @ d @ maps[1].T).reshape(-1)
            lane_block, lane = divmod(tile_index, context.lanes)
            assert relative_error(found[lane_block, :, index, lane], expected) <= ERROR_BOUND[array.dtype]


@pytest.mark.parametrize("channels", [64, 512])
@pytest.mark.parametrize("direction", ["forward", "grad_weight", "grad_input"])
def test_error(channels, direction, rng):
    """In float32, at most 3e-6 of the largest value."""
    case = Case((1, channels, 14, 14), (channels, channels, 3, 3), padding=1)
    a, b = case.operands(direction, np.float32, rng)
    found = case.run(direction, a, b, algorithm="winograd")
    expected = case.run(direction, a.astype(np.float64), b.astype(np.float64), algorithm="direct")
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


def test_more_taps_are_refused():
    with pytest.raises(ValueError, match=r"3 taps a side at most, not \(5, 4\)"):
        nbfftconv.plan_conv2d((1, 2, 9, 9), (2, 2, 5, 4), algorithm="winograd")
    with pytest.raises(ValueError, match="tile sides"):
        nbfftconv.plan_conv2d((1, 2, 9, 9), (2, 2, 3, 3), algorithm="winograd", tile=7)


NARROW = """
import numpy as np
import nbfftconv

rng = np.random.default_rng(5)
for kernel in (2, 2), (3, 2), (3, 3):
    for dtype in np.float32, np.float64:
        x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 3, 9, 21), (5, 3, *kernel)))
        tile = tuple(taps + 3 for taps in kernel)
        plan = nbfftconv.plan_conv2d(x.shape, w.shape, dtype=dtype, algorithm="winograd", tile=tile)
        found = nbfftconv.conv2d(x, w, plan=plan)
        np.testing.assert_allclose(found, nbfftconv.conv2d(x, w, algorithm="direct"), rtol=0, atol=1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["haswell", "generic"])
def test_tiles_wider_than_a_vector(cpu):
    """A row of a tile takes more vectors than a row of its kernel."""
    if cpu == "haswell" and not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("no AVX2 here")
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu}
    run = subprocess.run([sys.executable, "-c", NARROW], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
