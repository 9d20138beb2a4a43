"""A NaN or an infinity reaches exactly the outputs that direct convolution has it reach.

An FFT alone would smear it over its tile. Values that are finite but huge must not overflow on the way either.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import oracle
import pytest
from compare import assert_accurate_where_finite
from geometries import (
    DIRECTIONS,
    FEW_TAPS,
    PADDING_MODES,
    WAYS,
    Case,
    cases,
    codelet_tiles,
    four_step_tiles,
    generators,
    tiles,
    winograd_tiles,
)
from hypothesis import given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import direct, outliers, threads

NONFINITE = (np.nan, np.inf, -np.inf)
ALGORITHMS = ["auto", "fft", "tiled", "codelets", "four_step", "winograd", "direct"]
pytestmark = pytest.mark.filterwarnings("error")  # they are values like others


def strew(rng, array, values, count):
    """Put ``count`` of the values anywhere in the array."""
    where = rng.choice(array.size, min(count, array.size), replace=False)
    array.reshape(-1)[where] = rng.choice(values, len(where))


def drawn_case(data, case, algorithm):
    """The case, or, for maps of few taps, another one."""
    return data.draw(cases(max_size=30, max_kernel=FEW_TAPS, max_products=300_000)) if algorithm == "winograd" else case


def draw_plan(data, case, direction, dtype, algorithm):
    if algorithm == "auto":
        return None
    transposed = data.draw(st.booleans())
    if algorithm == "codelets":
        choices = {"transform": "codelet", "tile": data.draw(codelet_tiles(case))}
    elif algorithm == "four_step":
        choices = {"transform": "four_step", "tile": data.draw(four_step_tiles(case))}
    elif algorithm == "winograd":
        choices = {"algorithm": "winograd", "tile": data.draw(winograd_tiles(case))}
    elif algorithm == "tiled":
        choices = {"algorithm": "fft", "tile": data.draw(tiles(case, most=16))}
    else:
        choices = {"algorithm": algorithm}
    return case.plan(direction, dtype, transposed=transposed, **choices)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(
    data=st.data(),
    case=cases(max_size=48, max_kernel=15, max_products=1_000_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    values=st.lists(st.sampled_from(NONFINITE), min_size=1, max_size=3, unique=True),
    counts=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any),
    rng=generators(),
)
def test_strewn_into_the_operands(algorithm, direction, data, case, dtype, values, counts, rng):
    case = drawn_case(data, case, algorithm)
    a, b = case.operands(direction, dtype, rng, positive=True)
    for array, count in zip((a, b), counts, strict=True):
        array *= rng.choice((-1, 1))  # one sign for all: no sum of finite values happens to be close to zero
        strew(rng, array, values, count)
    expected = case.expect(direction, a, b)
    actual = case.run(direction, a, b, draw_plan(data, case, direction, dtype, algorithm))
    assert_accurate_where_finite(actual, expected, dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(
    data=st.data(),
    case=cases(max_size=40, max_kernel=11, max_products=300_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    counts=st.tuples(*[st.integers(0, 3)] * 3).filter(any),
    rng=generators(),
)
def test_with_bias_and_relu(algorithm, data, case, dtype, counts, rng):
    case = drawn_case(data, case, algorithm)
    x, w = case.operands("forward", dtype, rng, positive=True)
    bias = rng.uniform(0.5, 1.5, case.weight_size[0]).astype(dtype)
    signs = rng.choice((-1, 1), case.weight_size[0])  # relu leaves some channels and clears the others
    w *= signs[:, None, None, None]
    bias *= signs
    for array, count in zip((x, w, bias), counts, strict=True):
        strew(rng, array, NONFINITE, count)
    plan = draw_plan(data, case, "forward", dtype, algorithm)
    for activation in (None, "relu"):
        extras = {"bias": bias, "activation": activation}
        assert_accurate_where_finite(
            case.run("forward", x, w, plan, **extras), case.expect("forward", x, w, **extras), dtype
        )


# One value, every place ------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("tile", [None, (6, 5), (16, 12)])
def test_one_infinity_at_every_place(tile, padding_mode, direction, transposed, rng):
    """Corners, edges and tile borders included; the second operand holds a zero, to which infinity is NaN."""
    case = Case((1, 1, 9, 8), (1, 1, 4, 3), padding=((2, 1), (0, 2)), padding_mode=padding_mode)
    plan = case.plan(direction, np.float32, algorithm="fft", tile=tile, transposed=transposed)
    a, b = case.operands(direction, np.float32, rng, positive=True)
    a[..., 1, 1] = b[..., -1, 0] = 0
    for array in (a, b):
        for place in np.ndindex(array.shape):
            kept, array[place] = array[place], np.inf
            assert_accurate_where_finite(case.run(direction, a, b, plan), case.expect(direction, a, b), np.float32)
            array[place] = kept


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("value", NONFINITE)
def test_only_its_image_and_its_group_are_touched(algorithm, value, rng):
    case = Case((3, 4, 20, 20), (6, 2, 5, 5), groups=2)
    x, w = case.operands("forward", np.float32, rng)
    clean = case.run("forward", x, w, case.plan("forward", np.float32, algorithm=algorithm))
    x[1, 2, 10, 10] = value
    y = case.run("forward", x, w, case.plan("forward", np.float32, algorithm=algorithm))
    changed = np.zeros(y.shape, bool)
    changed[1, 3:, 6:11, 6:11] = True
    np.testing.assert_array_equal(~np.isfinite(y), changed)
    np.testing.assert_allclose(y[~changed], clean[~changed], rtol=0, atol=1e-5 * np.abs(clean).max())


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("value", NONFINITE)
def test_nothing_but_non_finite_values(value, direction, transposed, algorithm):
    case = Case((2, 2, 12, 12), (2, 2, 5, 5), padding=2)
    a, b = case.operands(direction, np.float32, np.random.default_rng())
    plan = case.plan(direction, np.float32, algorithm=algorithm, transposed=transposed)
    for array in (a, b):
        array[...] = value
        assert_accurate_where_finite(case.run(direction, a, b, plan), case.expect(direction, a, b), np.float32)


def test_zero_padding_meets_an_infinite_weight():
    """A padded zero is a value: 0 * inf is NaN, all around the border, as in PyTorch."""
    x, w = np.ones((1, 1, 6, 6)), np.full((1, 1, 3, 3), np.inf)
    for algorithm in ("fft", "direct"):
        plan = nbfftconv.plan_conv2d(x.shape, w.shape, padding=1, dtype=float, algorithm=algorithm)
        y = nbfftconv.conv2d(x, w, padding=1, plan=plan)
        assert np.isnan(y[0, 0, [0, -1]]).all() and np.isnan(y[0, 0, :, [0, -1]]).all()
        assert np.isposinf(y[0, 0, 1:-1, 1:-1]).all()


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("groups", [1, 3])
def test_zero_padding_of_a_transposed_problem_meets_no_weight(groups, algorithm):
    """The gradient at the input has no products but those of the output's pixels."""
    case = Case((1, 3, 6, 7), (3, 3 // groups, 3, 2), groups=groups)
    plan = case.plan("grad_input", float, algorithm=algorithm, transposed=True)
    dx = case.run("grad_input", np.full(case.weight_size, np.inf), np.ones(case.output_size), plan)
    np.testing.assert_array_equal(dx, np.inf)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_layer(activation, rng):
    """Backward through relu passes the gradient where the output is not <= 0, also NaN, as in PyTorch."""
    case = Case((2, 2, 20, 20), (3, 2, 5, 5), padding=2)
    x, w = case.operands("forward", np.float32, rng)
    g = rng.standard_normal(case.output_size).astype(np.float32)
    strew(rng, x, NONFINITE, 3)
    strew(rng, g, NONFINITE, 3)
    bias = rng.standard_normal(3).astype(np.float32)
    layer = nbfftconv.Conv2d(w, bias, padding=2, activation=activation)
    expected = oracle.conv2d(x, w, bias, padding=2, activation=activation)
    for algorithm in ("fft", "direct"):
        layer.algorithm = algorithm
        y = layer(x)
        assert_accurate_where_finite(y, expected, np.float32)
        dx = layer.backward(g)
        passed = g if activation is None else np.where(y <= 0, 0, g)
        assert_accurate_where_finite(dx, case.expect("grad_input", w, passed), np.float32)
        assert_accurate_where_finite(layer.weight_grad, case.expect("grad_weight", x, passed), np.float32)
        with np.errstate(invalid="ignore"):
            assert_accurate_where_finite(layer.bias_grad, passed.sum((0, 2, 3), np.float64), np.float32)


def test_a_layer_forgets_a_weight_that_was_not_finite(rng):
    case = Case((1, 1, 30, 30), (1, 1, 9, 9))
    x, w = case.operands("forward", np.float32, rng)
    layer = nbfftconv.Conv2d(w)
    layer.algorithm = "fft"
    clean = layer(x)
    broken = w.copy()
    broken[0, 0, 4, 4] = np.nan
    layer.weight = broken
    assert np.isnan(layer(x)).all()
    layer.weight = w
    np.testing.assert_array_equal(layer(x), clean)


# Huge but finite -------------------------------------------------------------------------------------


def rounded(expected, dtype):
    """The oracle's result as the dtype can hold it: too large is infinite."""
    with np.errstate(over="ignore"):
        return expected.astype(dtype).astype(np.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(
    data=st.data(),
    case=cases(max_size=48, max_kernel=15, max_products=300_000),
    huge=st.sampled_from([(np.float32, 1e20), (np.float32, 1e30), (np.float32, 3e37), (np.float64, 1e300)]),
    counts=st.sampled_from([(1, 0), (4, 0), (0, 1), (0, 4), (1, 1), (3, 3)]),
    rng=generators(),
)
def test_huge_values_overflow_only_where_they_must(algorithm, direction, data, case, huge, counts, rng):
    """Positive operands, so that a sum overflows where the float64 sum is too large and nowhere else.

    Ordinary values are around 1e-3; a sum of products with one huge operand is well within range, one with two
    is either well within it or far beyond.
    """
    dtype, value = huge
    case = drawn_case(data, case, algorithm)
    a, b = (array * dtype(1e-3) for array in case.operands(direction, dtype, rng, positive=True))
    for array, count in zip((a, b), counts, strict=True):
        strew(rng, array, [value], count)
    expected = rounded(case.expect(direction, a, b), dtype)
    actual = case.run(direction, a, b, draw_plan(data, case, direction, dtype, algorithm))
    assert_accurate_where_finite(actual, expected, dtype)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
def test_sums_over_a_tile_may_exceed_the_range(direction, transposed, algorithm, rng):
    """Every value is so large that the sum of a tile, its spectrum at 0, overflows, and no output does."""
    case = Case((1, 1, 64, 64), (1, 1, 5, 5), padding=2)
    a, b = case.operands(direction, np.float32, rng, positive=True)
    small = {"forward": b, "grad_weight": b, "grad_input": a}[direction]
    large = a if small is b else b
    large *= np.float32(1e37)
    small *= np.float32(1e-5)
    expected = case.expect(direction, a, b)
    assert np.abs(expected).max() < 1e37
    plan = case.plan(direction, np.float32, algorithm=algorithm, transposed=transposed)
    assert_accurate_where_finite(case.run(direction, a, b, plan), expected, np.float32)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
def test_huge_times_tiny(direction, transposed, algorithm, rng):
    case = Case((2, 3, 40, 40), (2, 3, 7, 7), padding=3)
    a, b = case.operands(direction, np.float32, rng)
    a, b = a * np.float32(1e30), b * np.float32(1e-30)
    plan = case.plan(direction, np.float32, algorithm=algorithm, transposed=transposed)
    assert_accurate_where_finite(case.run(direction, a, b, plan), case.expect(direction, a, b), np.float32)


# Few or many -----------------------------------------------------------------------------------------


@contextmanager
def direct_calls():
    """Count what direct convolution computes, by any of its passes."""
    calls = []
    with ExitStack() as stack:
        for name in ("forward", "grad_input", "grad_weight"):
            original = getattr(direct, name)

            def counted(*arguments, original=original):
                calls.append(original)
                return original(*arguments)

            stack.enter_context(mock.patch.object(direct, name, counted))
        yield calls


# An outlier of the input has up to 1,176 products; direct convolution has 9 million in all.
MANY = Case((1, 24, 18, 18), (24, 24, 7, 7), padding=3)
DEPTHWISE = Case((2, 40, 30, 30), (40, 1, 9, 9), padding=4, groups=40)
STRIDED = Case((2, 24, 41, 41), (24, 24, 5, 5), stride=2, padding=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("share", [0.01, 0.5])
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("case", [MANY, DEPTHWISE, STRIDED], ids=["dense", "depthwise", "strided"])
def test_many_cost_no_more_than_direct_convolution(case, direction, transposed, share, which, dtype, rng):
    """One by one, their products would take fifty times as long."""
    operands = case.operands(direction, dtype, rng, positive=True)
    if operands[which].shape == case.weight_size and case is not MANY:
        share = 0.5
    strew(rng, operands[which], NONFINITE, int(share * operands[which].size))
    plan = case.plan(direction, dtype, algorithm="fft", transposed=transposed)
    with direct_calls() as calls:
        result = case.run(direction, *operands, plan)
    assert len(calls) == 1
    assert_accurate_where_finite(result, case.expect(direction, *operands), dtype)


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("case", [MANY, DEPTHWISE, STRIDED], ids=["dense", "depthwise", "strided"])
def test_few_are_added_to_what_the_fft_has(case, direction, transposed, rng):
    operands = case.operands(direction, np.float32, rng, positive=True)
    for operand in operands:
        strew(rng, operand, NONFINITE, 1)
    plan = case.plan(direction, np.float32, algorithm="fft", transposed=transposed)
    with direct_calls() as calls:
        result = case.run(direction, *operands, plan)
    assert not calls
    assert_accurate_where_finite(result, case.expect(direction, *operands), np.float32)


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
def test_sums_of_products_do_not_depend_on_the_threads(direction, transposed, rng, restore_threads):
    operands = MANY.operands(direction, np.float32, rng)
    for operand in operands:
        strew(rng, operand, [3e13, -2e15, 7e20], 5)
    plan = MANY.plan(direction, np.float32, algorithm="fft", transposed=transposed)
    results = []
    for count in (1, 2, 3):
        nbfftconv.set_num_threads(count)
        results.append(MANY.run(direction, *operands, plan))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("counts", [(3, 0), (0, 2), (2, 3)])
def test_products_of_many_outliers_are_added_in_turns(counts, direction, transposed, rng, monkeypatch):
    """Signals are answered between the turns: in as many as there can be, results are the same to the last bit."""
    case = Case((4, 2, 30, 31), (3, 2, 6, 5), padding=((2, 1), (0, 3)))
    a, b = case.operands(direction, np.float32, rng)
    for array, count in zip((a, b), counts, strict=True):
        strew(rng, array, (1e30, -1e25, 1e20), count)
    plan = case.plan(direction, np.float32, algorithm="fft", transposed=transposed)
    monkeypatch.setattr(outliers, "_FEW_PRODUCTS", 10**9)
    tasks, inner = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *of_run: tasks.append(len(of_run)) or inner(*of_run))
    whole = case.run(direction, a, b, plan)
    of_whole = sum(tasks)
    monkeypatch.setattr(outliers, "_MOST_PRODUCTS", 1)
    cut = case.run(direction, a, b, plan)
    np.testing.assert_array_equal(cut.view(np.uint32), whole.view(np.uint32))
    assert sum(tasks) > 2 * of_whole


@pytest.mark.parametrize("choices", [{"transform": "fftw"}, {"transform": "codelet", "tile": (8, 8)}])
def test_an_empty_batch_has_no_products_of_outliers(choices, monkeypatch):
    """A stage that raises has nobody to raise to: Python reports it, and goes on."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    case = Case((0, 3, 9, 8), (4, 3, 4, 3))
    x, w, g = (np.ones(size, np.float32) for size in (case.input_size, case.weight_size, case.output_size))
    w[1, 2, 3, 0] = np.inf
    assert case.run("forward", x, w, case.plan("forward", np.float32, **choices)).shape == case.output_size
    plan = case.plan("grad_input", np.float32, transposed=False, **choices)
    assert case.run("grad_input", w, g, plan).shape == case.input_size
    assert reported == []
