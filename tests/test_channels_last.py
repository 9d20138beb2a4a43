"""Channels as the last dimension: the same results as with channels first, in that order."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
from geometries import generators
from hypothesis import given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv.channels_last import to_channels_first, to_channels_last

DTYPES = (np.float32, np.float64)


def last(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 70),
    space=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    dtype=st.sampled_from((*DTYPES, ">f4")),
    rng=generators(),
)
def test_orders_are_exchanged(batch, channels, space, dtype, rng):
    array = rng.standard_normal((batch, channels, *space)).astype(dtype)
    found = to_channels_last(array)
    np.testing.assert_array_equal(found, np.moveaxis(array, 1, -1))
    back = to_channels_first(last(array))
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    every_other = last(array)[..., ::2]
    np.testing.assert_array_equal(to_channels_first(every_other), array[:, ::2])


def test_what_is_in_order_already_is_not_copied(rng):
    array = rng.standard_normal((2, 5, 6, 7), np.float32)
    assert np.shares_memory(to_channels_first(np.moveaxis(array, 1, -1)), array)
    assert np.shares_memory(to_channels_last(np.moveaxis(array, -1, 1)), array)


@pytest.mark.parametrize("is_batch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_functions_and_layers(axes, dtype, is_batch, rng):
    space, size = (19, 12, 9)[:axes], (17, 10, 7)[:axes]
    x, w = rng.standard_normal((2, 6, *space)).astype(dtype), rng.standard_normal((8, 3, *[3] * axes)).astype(dtype)
    b, g = rng.standard_normal(8).astype(dtype), rng.standard_normal((2, 8, *size)).astype(dtype)
    xs, gs = (last(each) if is_batch else last(each)[0] for each in (x, g))
    if not is_batch:
        x, g = x[0], g[0]
    axis = 1 if is_batch else 0

    def first(array):
        return np.moveaxis(array, -1, axis)

    conv, conv_weight, conv_input = (getattr(nbfftconv, f"conv{axes}d{name}") for name in ("", "_weight", "_input"))
    options = {"groups": 2, "channels_last": True}
    expected = conv(x, w, b, groups=2, activation="relu")
    y = conv(xs, w, b, **options, activation="relu")
    nearly = {"rtol": 0, "atol": 20 * np.finfo(dtype).eps * np.abs(expected).max()}  # sums are in another order
    np.testing.assert_allclose(first(y), expected, **nearly)
    out = np.empty_like(y)
    assert conv(xs, w, b, **options, activation="relu", out=out) is out
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(conv_weight(xs, w.shape, gs, **options), conv_weight(x, w.shape, g, groups=2))
    dx = conv_input(x.shape, w, g, groups=2)
    np.testing.assert_array_equal(first(conv_input(xs.shape, w, gs, **options)), dx)

    layer = getattr(nbfftconv, f"Conv{axes}d")(w, b, groups=2, channels_last=True)
    other = getattr(nbfftconv, f"Conv{axes}d")(w, b, groups=2)
    layer = pickle.loads(pickle.dumps(layer))
    assert layer.channels_last and "channels_last=True" in repr(layer) and not other.channels_last
    np.testing.assert_array_equal(first(layer(xs)), other(x))
    np.testing.assert_array_equal(first(layer.backward(gs)), other.backward(g))
    np.testing.assert_array_equal(layer.weight_grad, other.weight_grad)
    np.testing.assert_array_equal(layer.bias_grad, other.bias_grad)
    for _ in range(2):  # the second call is ready
        np.testing.assert_allclose(first(layer.eval()(xs)), other.eval()(x), **nearly)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed(axes, rng):
    x, w = (
        rng.standard_normal((2, 6, *(9, 7, 5)[:axes]), np.float32),
        rng.standard_normal((6, 4, *[2] * axes), np.float32),
    )
    b, convolve = rng.standard_normal(4, np.float32), getattr(nbfftconv, f"conv_transpose{axes}d")
    expected = convolve(x, w, b, stride=2)
    y = convolve(last(x), w, b, stride=2, channels_last=True)
    np.testing.assert_array_equal(y, last(expected))
    out = np.empty_like(y)
    assert convolve(last(x), w, b, stride=2, channels_last=True, out=out) is out
    np.testing.assert_array_equal(out, y)
    layer = getattr(nbfftconv, f"ConvTranspose{axes}d")(w, b, stride=2, channels_last=True)
    other = getattr(nbfftconv, f"ConvTranspose{axes}d")(w, b, stride=2)
    np.testing.assert_array_equal(layer(last(x)), last(other(x)))
    np.testing.assert_array_equal(layer.backward(y), last(other.backward(expected)))
    np.testing.assert_array_equal(layer.weight_grad, other.weight_grad)
    np.testing.assert_array_equal(layer(last(x)[0]), last(other(x))[0])


X, W = np.ones((2, 8, 9, 4), np.float32), np.ones((6, 4, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nbfftconv.conv2d(X, W, channels_last=1), TypeError, "channels_last must be True or False, got 1"),
        (lambda: nbfftconv.conv2d(X, W), ValueError, "input (2, 8, 9, 4) has 8 channels"),
        (lambda: nbfftconv.conv2d(X[..., :3], W, channels_last=True), ValueError, "has 3 channels"),
        (
            lambda: nbfftconv.conv2d(X, W, channels_last=True, out=np.empty((2, 6, 6, 7), np.float32)),
            ValueError,
            "out has shape (2, 6, 6, 7), but the other arguments need (2, 6, 7, 6)",
        ),
        (
            lambda: nbfftconv.conv2d_input(X.shape, W, np.ones((2, 6, 6, 7), np.float32), channels_last=True),
            ValueError,
            "grad_output has shape (2, 6, 6, 7), but input (2, 8, 9, 4) and weight (6, 4, 3, 3) need (2, 6, 7, 6)",
        ),
        (lambda: nbfftconv.Conv2d(W, channels_last=None), TypeError, "channels_last must be True or False, got None"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()
