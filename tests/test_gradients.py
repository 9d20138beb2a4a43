"""The gradients are the oracle's, and derivatives of the forward pass: adjointness, finite differences in float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_accurate
from geometries import (
    FEW_TAPS,
    PADDING_MODES,
    ROW_TILES,
    Case,
    cases,
    generators,
    of_one_row,
    shared_steps,
    tilings,
    winograd_tiles,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import nbfftconv
from nbfftconv.geometry import ConvGeometry
from nbfftconv.tiling import problem_sizes

CASES = [
    Case((2, 3, 9, 8), (4, 3, 3, 4)),
    Case((1, 2, 12, 11), (2, 2, 7, 5), padding="full"),
    Case((1, 4, 10, 9), (6, 2, 4, 3), stride=(2, 3), padding=((2, 1), (0, 3)), groups=2),
    Case((2, 3, 13, 12), (6, 1, 3, 3), dilation=(2, 3), padding=4, groups=3),
]


def gradients(case, x, w, g, algorithm, choices, block_tiles):
    """Both by the functions, then all three of a layer's step; direct, with what the planner chooses, or tiled."""
    directions = "grad_weight", "grad_input"
    plans = [case.plan(direction, x.dtype, transposed=False, **choices) for direction in directions]
    found = [case.run("grad_weight", x, g, plans[0]), case.run("grad_input", w, g, plans[1])]
    layer = nbfftconv.Conv2d(w, np.zeros(len(w), w.dtype), **case.options, padding_mode=case.padding_mode)
    layer.algorithm = algorithm
    with shared_steps(block_tiles, **choices) if algorithm == "fft" else nullcontext():
        layer(x)
        dx = layer.backward(g)
    return [*found, layer.weight_grad, dx, layer.bias_grad]


def drawn_choices(data, case, algorithm):
    """Of a layer's algorithm and the functions' plans: tiles of any transform are shared ones of the layer, too."""
    return data.draw(tilings(case)) if algorithm == "fft" else {"algorithm": algorithm}


def small_cases():
    return cases(max_size=28, max_kernel=9, max_products=100_000)


@settings(max_examples=500)  # whatever the profile
@given(
    data=st.data(),
    case=small_cases(),
    dtype=st.sampled_from((np.float32, np.float64)),
    algorithm=st.sampled_from(("fft",) * 7 + ("direct",) * 2 + ("auto",)),
    block_tiles=st.integers(1, 40),
    rng=generators(),
)
def test_500_geometries_against_the_oracle(data, case, dtype, algorithm, block_tiles, rng):
    x, w = case.operands("forward", dtype, rng)
    g = rng.uniform(0.5, 1.5, case.output_size).astype(dtype)
    dw, dx = case.expect("grad_weight", x, g), case.expect("grad_input", w, g)
    if min(np.count_nonzero(dw), np.count_nonzero(dx)) < 16:  # as `operands_and_expected`
        x, w = case.operands("forward", dtype, rng, positive=True)
        dw, dx = case.expect("grad_weight", x, g), case.expect("grad_input", w, g)
    expected = dw, dx, dw, dx, g.sum((0, 2, 3), np.float64)
    found = gradients(case, x, w, g, algorithm, drawn_choices(data, case, algorithm), block_tiles)
    for actual, right in zip(found, expected, strict=True):
        assert_accurate(actual, right, dtype)


@settings(max_examples=500)  # whatever the profile
@given(
    data=st.data(),
    case=cases(max_size=28, max_kernel=FEW_TAPS, max_products=100_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    shares=st.booleans(),
    block_tiles=st.integers(1, 40),
    rng=generators(),
)
def test_500_geometries_by_winograd_against_the_oracle(data, case, dtype, shares, block_tiles, rng):
    """Forced, in stages or fused, and in steps that share spectra."""
    x, w = case.operands("forward", dtype, rng, positive=True)
    g = rng.uniform(0.5, 1.5, case.output_size).astype(dtype)
    tile = data.draw(winograd_tiles(case))
    choices = {"algorithm": "winograd", "tile": tile}
    plan = case.plan("forward", dtype, **choices, fused=data.draw(st.booleans()), block_tiles=block_tiles)
    assert_accurate(case.run("forward", x, w, plan), case.expect("forward", x, w), dtype)
    dw, dx = case.expect("grad_weight", x, g), case.expect("grad_input", w, g)
    expected = dw, dx, dw, dx, g.sum((0, 2, 3), np.float64)
    if shares:
        found = gradients(case, x, w, g, "fft", {"transform": "winograd", "tile": tile}, block_tiles)
    else:
        found = gradients(case, x, w, g, "winograd", choices, None)
    for actual, right in zip(found, expected, strict=True):
        assert_accurate(actual, right, dtype)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("transform", ["fftw", "codelet", "row_codelet", "four_step", "row_four_step", "winograd"])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 40, 37), (5, 3, 5, 7), padding=3),
        Case((1, 1, 90, 80), (1, 1, 9, 9), padding=4),
        Case((3, 4, 31, 30), (6, 2, 4, 5), stride=(2, 1), dilation=(1, 3), groups=2, padding=((2, 0), (1, 4))),
        Case((2, 30, 20, 21), (30, 1, 7, 7), groups=30, padding="same"),
        Case((4, 20, 14, 15), (33, 20, 3, 3), padding=1, padding_mode="circular"),
    ],
    ids=repr,
)
def test_the_same_bits_on_any_number_of_threads(case, transform, dtype, rng):
    if transform == "winograd":
        case = replace(case, weight_size=(*case.weight_size[:2], 3, 3), padding=1)
    if transform in ROW_TILES:
        case = of_one_row(case)
    tiles = {"fftw": (14, 15), "codelet": (12, 16), "four_step": (30, 40), "winograd": None}
    tile = ROW_TILES[transform][0] if transform in ROW_TILES else tiles[transform]
    if tile is None:
        geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
        tile = tuple(taps + 3 for _, taps in problem_sizes(geometry))
    x, w = case.operands("forward", dtype, rng)
    g = rng.standard_normal(case.output_size).astype(dtype)
    for block_tiles in (5, None):
        found = []
        for threads in (1, 2, 3):
            nbfftconv.set_num_threads(threads, threads)
            arrays = gradients(case, x, w, g, "fft", {"transform": transform, "tile": tile}, block_tiles)
            found.append([array.tobytes() for array in arrays])
        assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
@given(case=cases(), rng=generators())
def test_adjointness(algorithm, case, rng):
    """<conv(x, w), g> == <x, conv_input(w, g)> == <w, conv_weight(x, g)>."""
    x, w = case.operands("forward", np.float64, rng)
    g = rng.standard_normal(case.output_size)
    plans = {
        direction: case.plan(direction, np.float64, algorithm=algorithm)
        for direction in ("forward", "grad_input", "grad_weight")
    }
    y = case.run("forward", x, w, plans["forward"])
    dx = case.run("grad_input", w, g, plans["grad_input"])
    dw = case.run("grad_weight", x, g, plans["grad_weight"])
    # A bound on the sum of the absolute products, by Cauchy and Schwarz for each tap.
    scale = np.linalg.norm(x) * np.linalg.norm(w) * np.linalg.norm(g) * max(x.size, w.size, g.size) ** 0.5
    tolerance = 1e-13 * scale
    assert abs(np.vdot(y, g) - np.vdot(x, dx)) <= tolerance
    assert abs(np.vdot(y, g) - np.vdot(w, dw)) <= tolerance


def numerical_gradient(loss, array, step=1e-5):
    """Central differences, one element at a time."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = loss()
        array[index] = kept - step
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("transform_and_tile", [("codelet", (8, 32)), ("codelet", (12, 16)), ("fftw", (21, 17))])
def test_rows_of_tiles_in_parts(transform_and_tile, batch, rng):
    """Few channels are cut into parts, which begin in the midst of an image, within reach of its first tiles."""
    case = Case((batch, 3, 31, 30), (5, 3, 8, 1))
    transform, tile = transform_and_tile
    w, g = case.operands("grad_input", np.float32, rng)
    plan = case.plan("grad_input", np.float32, algorithm="fft", transform=transform, tile=tile)
    assert_accurate(case.run("grad_input", w, g, plan), case.expect("grad_input", w, g), np.float32)


def assert_is_gradient(actual, numerical):
    np.testing.assert_allclose(actual, numerical, rtol=0, atol=1e-8 * np.abs(numerical).max())


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_functional_gradients(case, padding_mode, rng):
    if padding_mode != "zeros" and case.padding == "full":
        padding_mode = "zeros"  # its padding exceeds what reflect allows
    case = Case(case.input_size, case.weight_size, *case.options.values(), padding_mode)
    x, w = case.operands("forward", np.float64, rng)
    g = rng.standard_normal(case.output_size)

    def loss():
        return np.vdot(case.run("forward", x, w), g)

    assert_is_gradient(case.run("grad_input", w, g), numerical_gradient(loss, x))
    assert_is_gradient(case.run("grad_weight", x, g), numerical_gradient(loss, w))


SHARED = {"kept": 2**28, "made anew": 0}


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct", *SHARED])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_layer_gradients(case, activation, algorithm, rng):
    with shared_steps(3, transform="codelet", tile=(8, 8)) if algorithm in SHARED else nullcontext():
        check_layer_gradients(case, activation, algorithm, rng)


def check_layer_gradients(case, activation, algorithm, rng):
    x, w = case.operands("forward", np.float64, rng)
    bias, g = rng.standard_normal(case.weight_size[0]), rng.standard_normal(case.output_size)
    layer = nbfftconv.Conv2d(w, bias, **case.options, activation=activation)
    layer.algorithm = "fft" if algorithm in SHARED else algorithm
    layer.spectra_limit = SHARED.get(algorithm, layer.spectra_limit)
    before_relu = case.expect("forward", x, w, bias=bias)
    assert np.abs(before_relu).min() > 1e-5  # no kink within a step

    layer(x)
    dx = layer.backward(g)
    dw, db = layer.weight_grad, layer.bias_grad
    assert dx.shape == x.shape and dw.shape == w.shape and db.shape == bias.shape

    def loss():
        layer.weight, layer.bias = w, bias
        return np.vdot(layer(x), g)

    step = 1e-6
    assert_is_gradient(db, numerical_gradient(loss, bias, step))
    for gradient, array in ((dx, x), (dw, w)):
        for _ in range(5):  # along random directions
            direction = rng.standard_normal(array.shape)
            direction /= np.abs(direction).sum()
            kept = array.copy()
            array[...] = kept + step * direction
            above = loss()
            array[...] = kept - step * direction
            below = loss()
            array[...] = kept
            scale = np.abs(gradient).max()
            assert abs((above - below) / (2 * step) - np.vdot(gradient, direction)) <= 1e-7 * scale
