"""Transposed convolution against the oracle, which adds products tap by tap."""

from __future__ import annotations

import functools
import pickle
import re
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import oracle
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import ALGORITHMS, are_few_taps, generators, refused_unless
from hypothesis import given, settings
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import transposed as functions
from nbfftconv import transposed_layer
from nbfftconv.planner import make_plan

DTYPES = (np.float32, np.float64)


def transposed(axes):
    return getattr(nbfftconv, f"conv_transpose{axes}d")


@contextmanager
def planned_by(algorithm):
    """Let an algorithm compute all passes, which users cannot ask for."""
    with ExitStack() as stack:
        for module in (functions, transposed_layer):
            stack.enter_context(
                mock.patch.object(module, "make_plan", functools.partial(make_plan, algorithm=algorithm))
            )
        yield


@st.composite
def geometries(draw, axes, algorithm):
    """Sizes and options of a transposed convolution with an output; of few taps, if most others are refused."""
    most_pixels, most_taps = {1: (60, 30), 2: (14, 6), 3: (6, 3)}[axes]
    if algorithm == "winograd":
        most_taps = 4
    size = [draw(st.integers(1, most_pixels)) for _ in range(axes)]
    kernel = [draw(st.integers(1, most_taps)) for _ in range(axes)]
    stride = [draw(st.integers(1, 4)) for _ in range(axes)]
    dilation = [draw(st.just(1) | st.integers(1, 4)) for _ in range(axes)]  # phases are not of dilated kernels
    added = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    padding = []
    for n, k, s, d, more in zip(size, kernel, stride, dilation, added, strict=True):
        room = (n - 1) * s + d * (k - 1) + more
        before = draw(st.integers(0, min(room, 9)))
        padding.append((before, draw(st.integers(0, min(room - before, 9)))))
    groups = draw(st.integers(1, 3))
    input_size = draw(st.integers(0, 3)), groups * draw(st.integers(1, 4)), *size
    weight_size = input_size[1], draw(st.integers(1, 4)), *kernel
    options = {
        "stride": tuple(stride), "padding": tuple(padding), "output_padding": tuple(added), "groups": groups,
        "dilation": tuple(dilation),
    }  # fmt: skip
    return input_size, weight_size, options


def check_function(axes, case, dtype, algorithm, activation, has_bias, rng):
    """The function against the oracle, with and without `out`, or it is refused."""
    input_size, weight_size, options = case
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[1] * options["groups"]).astype(dtype) if has_bias else None
    function = transposed(axes)
    if algorithm == "winograd" and not are_few_taps(input_size, weight_size, options):
        with refused_unless(False), planned_by(algorithm):
            function(x, w, bias, **options)
        return
    before = oracle.conv_transpose(x, w, bias, **options)
    options = options | {"activation": activation}
    expected = oracle.conv_transpose(x, w, bias, **options)
    with planned_by(algorithm):
        y = function(x, w, bias, **options)
        assert y.shape == expected.shape and y.dtype == dtype
        scale = np.abs(before).max(initial=0)
        np.testing.assert_allclose(y, expected, rtol=0, atol=scale * (2e-5, 1e-12)[dtype is np.float64])
        out = np.full(y.shape, np.nan, dtype)
        assert function(x, w, bias, **options, out=out) is out
        np.testing.assert_array_equal(out, y)
        if input_size[0] == 1:
            np.testing.assert_array_equal(function(x[0], w, bias, **options), y[0])


EVERY_WAY = {
    "data": st.data(),
    "dtype": st.sampled_from(DTYPES),
    "activation": st.sampled_from((None, "relu")),
    "rng": generators(),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@given(**EVERY_WAY, has_bias=st.booleans())
def test_any_geometry(axes, algorithm, data, dtype, activation, has_bias, rng):
    check_function(axes, data.draw(geometries(axes, algorithm)), dtype, algorithm, activation, has_bias, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=500)  # whatever the profile
@given(**EVERY_WAY, has_bias=st.booleans())
def test_500_geometries(axes, algorithm, data, dtype, activation, has_bias, rng):
    check_function(axes, data.draw(geometries(axes, algorithm)), dtype, algorithm, activation, has_bias, rng)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("numbers", [(1, 5, 2, 4), (2, 5, 1, 4), (3, 4, 1, 3)], ids=str)
def test_outputs_that_no_kernel_reaches(axes, numbers, rng):
    """They are the bias, and no gradient depends on them: more output padding than the rest of the output is long."""
    stride, dilation, padding, added = numbers
    options = {"stride": stride, "padding": padding, "output_padding": added, "dilation": dilation}
    x, w = rng.standard_normal((2, 3, *[1] * axes)), rng.standard_normal((3, 4, *[1] * axes))
    bias = np.array([1.0, -2, 3, 0])
    size = (2, 4, *[1 - 2 * padding + added] * axes)
    expected = np.broadcast_to(bias.reshape(-1, *[1] * axes), size)
    np.testing.assert_array_equal(transposed(axes)(x, w, bias, **options), expected)
    layer = getattr(nbfftconv, f"ConvTranspose{axes}d")(w, bias, **options, activation="relu")
    np.testing.assert_array_equal(layer(x), np.maximum(expected, 0))
    assert not layer.backward(np.ones(size)).any() and not layer.weight_grad.any()
    np.testing.assert_array_equal(layer.bias_grad, np.prod(size) // 4 * (bias > 0))
    np.testing.assert_array_equal(oracle.conv_transpose(x, w, bias, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoders(dtype, rng):
    """Layers of decoders, of a size at which blocks and tiles are many."""
    for input_size, weight_size, options in (
        ((2, 64, 28, 28), (64, 32, 2, 2), {"stride": 2}),
        ((1, 32, 33, 40), (32, 3, 4, 4), {"stride": 2, "padding": 1}),
        ((1, 24, 40, 40), (24, 20, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
        ((2, 16, 50, 50), (16, 12, 5, 5), {"padding": 2}),
    ):
        x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
        assert_accurate(nbfftconv.conv_transpose2d(x, w, **options), oracle.conv_transpose(x, w, **options), dtype)
    x, w = rng.standard_normal((2, 1, 300)).astype(dtype), rng.standard_normal((1, 1, 512)).astype(dtype)
    expected = oracle.conv_transpose(x, w, stride=128)
    assert_accurate(nbfftconv.conv_transpose1d(x, w, stride=128), expected, dtype)


# of a size at which blocks and tiles are many: with and without strides that divide the kernel, dilated, depthwise
LARGE = [
    ((2, 4, 30, 30), (4, 3, 5, 5), {}),
    ((2, 4, 30, 30), (4, 3, 5, 5), {"stride": 2, "padding": 1}),
    ((2, 20, 28, 28), (20, 12, 2, 2), {"stride": 2}),
    ((1, 24, 33, 40), (24, 20, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ((2, 16, 30, 30), (16, 1, 3, 3), {"padding": 1, "dilation": 2, "groups": 16, "output_padding": 1}),
    ((2, 3, 700), (3, 2, 512), {"stride": 128}),
    ((2, 16, 900), (16, 20, 3), {"padding": 1}),
    ((1, 20, 8, 16, 16), (20, 12, 3, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 8, 10, 20, 20), (8, 6, 3, 3, 3), {"padding": 1}),
]


def is_possible(input_size, weight_size, options, algorithm):
    numbers = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
    return algorithm != "winograd" or are_few_taps(input_size, weight_size, numbers | options)


def all_passes(x, w, bias, g, options, algorithm):
    """Return the output of the function, and output, dX, dW and dB of a layer."""
    axes = x.ndim - 2
    with planned_by(algorithm):
        layer = getattr(nbfftconv, f"ConvTranspose{axes}d")(w, bias, **options)
        y, own = transposed(axes)(x, w, bias, **options), layer(x)
        return y, own, layer.backward(g), layer.weight_grad, layer.bias_grad


def large_operands(input_size, weight_size, options, draw):
    """Return input, kernels, bias and a gradient."""
    groups = options.get("groups", 1)
    x, w, bias = (draw(size).astype(np.float32) for size in (input_size, weight_size, weight_size[1] * groups))
    g = draw(transposed(x.ndim - 2)(x, w, bias, **options).shape).astype(np.float32)
    return x, w, bias, g


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_threads_do_not_change_bits(input_size, weight_size, options, algorithm, rng):
    if not is_possible(input_size, weight_size, options, algorithm):
        pytest.skip("Winograd's maps are for fewer taps")
    operands = large_operands(input_size, weight_size, options, rng.standard_normal)
    results = []
    for count in (1, 2, 5):
        nbfftconv.set_num_threads(count)
        results.append([each.tobytes() for each in all_passes(*operands, options, algorithm)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e18])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_a_value_that_is_not_finite(input_size, weight_size, options, algorithm, value, rng):
    """It reaches what its own products are in, and nothing else."""
    if not is_possible(input_size, weight_size, options, algorithm):
        pytest.skip("Winograd's maps are for fewer taps")
    x, w, bias, g = large_operands(input_size, weight_size, options, lambda size: rng.uniform(0.5, 1.5, size))
    x[0, 2].flat[251] = value
    expected = oracle.conv_transpose(x, w, bias, **options)
    for found in all_passes(x, w, bias, g, options, algorithm)[:2]:
        assert_accurate_where_finite(found, expected, np.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_zeros_are_exact(input_size, weight_size, options, algorithm, rng):
    """Where every product is zero, results are zero, or the bias."""
    if not is_possible(input_size, weight_size, options, algorithm):
        pytest.skip("Winograd's maps are for fewer taps")
    x, w, bias, g = large_operands(input_size, weight_size, options, rng.standard_normal)
    x[..., input_size[-1] // 2 :], x[:, 1], w[2] = 0, 0, 0
    g[..., : g.shape[-1] // 2] = 0
    y, own, dx, dw, _ = all_passes(x, w, bias, g, options, algorithm)
    untouched = oracle.conv_transpose(x != 0, w != 0, **options) == 0
    assert untouched.any() and not untouched.all()
    left = np.broadcast_to(bias.reshape(-1, *[1] * (x.ndim - 2)), y.shape)
    for found in (y, own):
        np.testing.assert_array_equal(found[untouched], left[untouched])
    assert not dx[:, 2].any() and not dw[1].any()


X, W = np.ones((2, 4, 9, 9), np.float32), np.ones((4, 3, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0, 0], W), {}, ValueError, "input must have 4 dimensions, or 3 without a batch, got shape (9, 9)"),
        ((X, W[:3]), {}, ValueError, "input (2, 4, 9, 9) has 4 channels, but weight (3, 3, 3, 3) needs 3"),
        ((X, W), {"groups": 3}, ValueError, "weight (4, 3, 3, 3) has 4 channels, not a multiple of groups=3"),
        (
            (X, W),
            {"output_padding": 1},
            ValueError,
            "output_padding (1, 1) must be smaller than stride (1, 1) or",
        ),
        ((X, W), {"padding": 6}, ValueError, "the output would be of size (2, 3, -1, -1)"),
        ((X, W), {"padding": -1}, ValueError, "padding must be at least 0 and below 2**31, got -1"),
        ((X, W), {"padding": "same"}, TypeError, "padding must be an integer, got 'same'"),
        ((X, W), {"stride": (2, 2, 2)}, ValueError, "stride must be an integer or a pair of integers, got (2, 2, 2)"),
        ((X, W, np.ones(4, np.float32)), {}, ValueError, "bias has shape (4,), but 3 out channels need (3,)"),
        ((X, W), {"activation": "tanh"}, ValueError, "activation must be one of None, relu, got 'tanh'"),
        ((X, W), {"out": np.empty((2, 3, 9, 9), np.float32)}, ValueError, "need (2, 3, 11, 11)"),
        ((X, W), {"stride": 2**30}, ValueError, "too large"),
    ],
)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        nbfftconv.conv_transpose2d(*arguments, **options)


def check_layer(axes, case, dtype, algorithm, activation, rng):
    """Its forward pass is the function's; its gradients are those of a convolution with roles exchanged."""
    input_size, weight_size, options = case
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[1] * options["groups"]).astype(dtype)
    layer = getattr(nbfftconv, f"ConvTranspose{axes}d")(w, bias, **options, activation=activation)
    if algorithm == "winograd" and not are_few_taps(input_size, weight_size, options):
        for is_training in (True, False):
            with refused_unless(False), planned_by(algorithm):
                layer.train(is_training)(x)
        return
    with planned_by(algorithm):
        y = layer(x)
        g = rng.standard_normal(y.shape).astype(dtype)
        dx = layer.backward(g)
        again = layer.eval()(x)
    function = transposed(axes)(x, w, bias, **options, activation=activation)
    np.testing.assert_allclose(y, function, rtol=0, atol=np.abs(function).max(initial=0) * 2e-5)
    g = np.where(y > 0, g, 0) if activation else g
    assert dx.shape == x.shape and layer.weight_grad.shape == w.shape and layer.bias_grad.shape == bias.shape
    # The derivative along any direction: the output is linear in input and weight.
    for gradient, direction, change in (
        (dx, rng.standard_normal(x.shape), lambda d: oracle.conv_transpose(d, w, **options)),
        (layer.weight_grad, rng.standard_normal(w.shape), lambda d: oracle.conv_transpose(x, d, **options)),
    ):
        expected, scale = np.vdot(g, change(direction)), np.abs(g).sum() * np.abs(change(direction)).max(initial=0)
        assert abs(np.vdot(gradient, direction) - expected) <= scale * (2e-5, 1e-12)[dtype is np.float64]
    axes_summed = (0, *range(2, g.ndim))
    np.testing.assert_allclose(layer.bias_grad, g.sum(axis=axes_summed, dtype=np.float64), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(again, y, rtol=0, atol=np.abs(y).max(initial=0) * 2e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@given(**EVERY_WAY)
def test_a_layer(axes, algorithm, data, dtype, activation, rng):
    check_layer(axes, data.draw(geometries(axes, algorithm)), dtype, algorithm, activation, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=500)  # whatever the profile
@given(**EVERY_WAY)
def test_layers_of_500_geometries(axes, algorithm, data, dtype, activation, rng):
    check_layer(axes, data.draw(geometries(axes, algorithm)), dtype, algorithm, activation, rng)


def test_settings_of_a_layer():
    layer = nbfftconv.ConvTranspose2d(W, [1, 2, 3], stride=2, output_padding=1)
    assert repr(layer).startswith("ConvTranspose2d(weight (4, 3, 3, 3) float32, bias yes, stride=2, padding=0, output_")
    with pytest.raises(ValueError, match=re.escape("output_padding (1, 1) must be smaller than stride (1, 1)")):
        layer.stride = 1
    with pytest.raises(ValueError, match=re.escape("groups=2 has 6 out channels, but the layer's bias has 3")):
        layer.groups = 2
    with pytest.raises(ValueError, match=re.escape("has 5 out channels, but the layer's bias has 3; set bias")):
        layer.weight = np.ones((4, 5, 3, 3), np.float32)
    with pytest.raises(ValueError, match=re.escape("input (2, 5, 9, 9) has 5 channels, but weight (4, 3, 3, 3)")):
        layer(np.ones((2, 5, 9, 9), np.float32))
    with pytest.raises(RuntimeError, match="backward needs a forward pass"):
        layer.backward(X)
    copy = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(copy(X), layer(X))
    assert layer(X[0]).shape == (3, 20, 20) and layer.backward(np.ones((3, 20, 20), np.float32)).shape == X[0].shape
    with pytest.raises(ValueError, match=re.escape("grad_output has shape (3, 19, 20)")):
        layer.backward(np.ones((3, 19, 20), np.float32))
