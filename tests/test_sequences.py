"""One spatial axis: every pass and the layer against the oracle, which sees a sequence as an image of one row."""

from __future__ import annotations

import pickle
import re

import numpy as np
import oracle
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import ALGORITHMS, PADDING_MODES, are_few_taps, generators, refused_unless, skip_unless_possible
from hypothesis import given, settings
from hypothesis import strategies as st

import nbfftconv

DTYPES = (np.float32, np.float64)
MODES = (None, "relu")


@st.composite
def sequences(draw, most_taps=40):
    """Sizes and options of a convolution of sequences, and those of the same convolution of images of one row."""
    kernel, dilation = draw(st.integers(1, most_taps)), draw(st.integers(1, 4))
    groups, reach = draw(st.integers(1, 3)), dilation * (kernel - 1)
    mode = draw(st.sampled_from(PADDING_MODES))
    length = draw(st.integers(1, 200))
    stride = draw(st.integers(1, 5))
    pads = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    padding = draw(st.sampled_from((pads[0], pads, (pads[0],), (pads,), "valid", "full", "same")))
    if padding == "same":
        stride = 1
    _, sides = oracle.resolve_padding(padding if isinstance(padding, str) else (0, pads), (1, kernel), (1, dilation))
    if not isinstance(padding, str) and padding not in (pads, (pads,)):
        sides = pads[0], pads[0]
    length = max(length, reach + 1 - sum(sides), 1, max(sides) + 1 if mode != "zeros" else 1)
    input_size = draw(st.integers(0, 3)), groups * draw(st.integers(1, 3)), length
    weight_size = groups * draw(st.integers(1, 3)), input_size[1] // groups, kernel
    common = {"groups": groups, "padding_mode": mode}
    options = {"stride": stride, "padding": padding, "dilation": dilation} | common
    of_images = {"stride": (1, stride), "padding": ((0, 0), sides), "dilation": (1, dilation)} | common
    return input_size, weight_size, options, of_images


def row(array):
    return array[:, :, None]


def sequences_for(algorithm):
    """Those of few taps, and some of more, for Winograd's maps."""
    return sequences(6) if algorithm == "winograd" else sequences()


def check_passes(case, dtype, algorithm, rng):
    """All passes against the oracle, or all are refused."""
    input_size, weight_size, options, of_images = case
    is_possible = algorithm != "winograd" or are_few_taps(input_size, weight_size, options)
    options = options | {"algorithm": algorithm}
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[0]).astype(dtype)
    expected = oracle.conv2d(row(x), row(w), bias, **of_images)[:, :, 0]
    with refused_unless(is_possible):
        y = nbfftconv.conv1d(x, w, bias, **options)
        assert_accurate(y, expected, dtype)
    g = rng.standard_normal(expected.shape).astype(dtype)
    with refused_unless(is_possible):
        dw = nbfftconv.conv1d_weight(x, weight_size, g, **options)
        assert_accurate(dw, oracle.conv2d_weight(row(x), row(w).shape, row(g), **of_images)[:, :, 0], dtype)
    with refused_unless(is_possible):
        dx = nbfftconv.conv1d_input(input_size, w, g, **options)
        assert_accurate(dx, oracle.conv2d_input(row(x).shape, row(w), row(g), **of_images)[:, :, 0], dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry(algorithm, data, dtype, rng):
    check_passes(data.draw(sequences_for(algorithm)), dtype, algorithm, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=500)  # whatever the profile
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_500_geometries(algorithm, data, dtype, rng):
    check_passes(data.draw(sequences_for(algorithm)), dtype, algorithm, rng)


def check_layer(case, dtype, algorithm, activation, rng):
    """A step of a layer against the oracle, and the same in inference; or it is refused."""
    input_size, weight_size, options, of_images = case
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[0]).astype(dtype)
    layer = nbfftconv.Conv1d(w, bias, **options, activation=activation, algorithm=algorithm)
    if algorithm == "winograd" and not are_few_taps(input_size, weight_size, options):
        for is_training in (True, False):
            with refused_unless(False):
                layer.train(is_training)(x)
        return
    y = layer(x)
    expected = oracle.conv2d(row(x), row(w), bias, **of_images, activation=activation)[:, :, 0]
    assert_accurate(y, expected, dtype)
    g = rng.standard_normal(y.shape).astype(dtype)
    dx = layer.backward(g)
    passed = np.where(y > 0, g, 0) if activation else g
    assert_accurate(dx, oracle.conv2d_input(row(x).shape, row(w), row(passed), **of_images)[:, :, 0], dtype)
    expected = oracle.conv2d_weight(row(x), row(w).shape, row(passed), **of_images)[:, :, 0]
    assert layer.weight_grad.shape == w.shape
    assert_accurate(layer.weight_grad, expected, dtype)
    np.testing.assert_allclose(layer.bias_grad, passed.sum(axis=(0, 2)), rtol=1e-4, atol=1e-4)
    assert_accurate(layer.eval()(x), y, dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from(MODES), rng=generators())
def test_a_layer_is_the_functions(algorithm, data, dtype, activation, rng):
    check_layer(data.draw(sequences_for(algorithm)), dtype, algorithm, activation, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=500)  # whatever the profile
@given(data=st.data(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from(MODES), rng=generators())
def test_layers_of_500_geometries(algorithm, data, dtype, activation, rng):
    check_layer(data.draw(sequences_for(algorithm)), dtype, algorithm, activation, rng)


# of a length at which tiles and blocks are many: of few and of many channels, causal, depthwise, strided, dilated
LARGE = [
    ((2, 20, 900), (24, 20, 5), {"padding": 2}),
    ((1, 2, 5000), (3, 2, 400), {"padding": (399, 0)}),
    ((2, 24, 700), (24, 1, 31), {"padding": 15, "groups": 24}),
    ((2, 16, 1000), (20, 16, 3), {"padding": 1, "stride": 2}),
    ((3, 16, 800), (16, 16, 3), {"padding": 4, "dilation": 4}),
    ((2, 40, 600), (40, 40, 3), {"padding": 1}),
    ((1, 3, 6000), (16, 3, 256), {"stride": 4, "padding": 126}),
    ((2, 18, 500), (12, 9, 4), {"stride": 2, "groups": 2}),
]


def operands(input_size, weight_size, options, dtype, rng, draw=None):
    """Return input, kernels, a gradient and a bias; `draw` makes an array of a size."""
    draw = draw or rng.standard_normal
    x, w, bias = (draw(size).astype(dtype) for size in (input_size, weight_size, weight_size[:1]))
    g = draw(nbfftconv.conv1d(x, w, **options).shape).astype(dtype)
    return x, w, g, bias


def passes(x, w, g, bias, options, algorithm, activation=None):
    """Return output, dW and dX."""
    options = options | {"algorithm": algorithm}
    return (
        nbfftconv.conv1d(x, w, bias, **options, activation=activation),
        nbfftconv.conv1d_weight(x, w.shape, g, **options),
        nbfftconv.conv1d_input(x.shape, w, g, **options),
    )


def expected_passes(x, w, g, bias, options, activation=None):
    """Return the oracle's."""
    before, after = np.broadcast_to(options.get("padding", 0), 2).tolist()
    of_images = {name: (1, options.get(name, 1)) for name in ("stride", "dilation")}
    of_images |= {"padding": ((0, 0), (before, after)), "groups": options.get("groups", 1)}
    found = (
        oracle.conv2d(row(x), row(w), bias, **of_images, activation=activation),
        oracle.conv2d_weight(row(x), row(w).shape, row(g), **of_images),
        oracle.conv2d_input(row(x).shape, row(w), row(g), **of_images),
    )
    return tuple(each[:, :, 0] for each in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_large_geometries(input_size, weight_size, options, algorithm, dtype, rng):
    skip_unless_possible(input_size, weight_size, options, algorithm)
    arrays = operands(input_size, weight_size, options, dtype, rng)
    expected = expected_passes(*arrays, options)
    for actual, right in zip(passes(*arrays, options, algorithm), expected, strict=True):
        assert_accurate(actual, right, dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_threads_do_not_change_bits(input_size, weight_size, options, algorithm, rng):
    skip_unless_possible(input_size, weight_size, options, algorithm)
    arrays = operands(input_size, weight_size, options, np.float32, rng)
    results = []
    for count in (1, 2, 5):
        nbfftconv.set_num_threads(count)
        results.append([each.tobytes() for each in passes(*arrays, options, algorithm)])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e18])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_values_that_are_not_finite(input_size, weight_size, options, algorithm, value, rng):
    """They reach what their own products are in, and nothing else."""
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x, w, g, bias = operands(
        input_size, weight_size, options, np.float32, rng, lambda size: rng.uniform(0.5, 1.5, size)
    )
    x[0, 1, 251] = g[0, 2, 99] = value
    expected = expected_passes(x, w, g, bias, options, "relu")
    for actual, right in zip(passes(x, w, g, bias, options, algorithm, "relu"), expected, strict=True):
        assert_accurate_where_finite(actual, right, np.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), min_size=1, max_size=3, unique=True),
    rng=generators(),
)
def test_values_that_are_not_finite_in_any_geometry(algorithm, data, dtype, values, rng):
    case = data.draw(sequences_for(algorithm).filter(lambda case: algorithm != "winograd" or are_few_taps(*case[:3])))
    input_size, weight_size, options, of_images = case
    x, w = (rng.uniform(0.5, 1.5, size).astype(dtype) for size in (input_size, weight_size))
    g = rng.uniform(0.5, 1.5, nbfftconv.conv1d(x, w, **options).shape).astype(dtype)
    for array in (x, w, g):
        if array.size and rng.random() < 0.6:
            array.flat[rng.integers(array.size)] = rng.choice(values)
    found = passes(x, w, g, None, options, algorithm)
    expected = (
        oracle.conv2d(row(x), row(w), **of_images),
        oracle.conv2d_weight(row(x), row(w).shape, row(g), **of_images),
        oracle.conv2d_input(row(x).shape, row(w), row(g), **of_images),
    )
    for actual, right in zip(found, expected, strict=True):
        assert_accurate_where_finite(actual, right[:, :, 0], dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_zeros_are_exact(input_size, weight_size, options, algorithm, rng):
    """Where every product is zero, results are zero, or the bias."""
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x, w, g, bias = operands(input_size, weight_size, options, np.float32, rng)
    x[0, :, : input_size[2] // 2], x[0, 0] = 0, 0
    w[1], w[2, 0], w[0, :, 0] = 0, 0, 0
    g[:, :, 30:], g[:, 2] = 0, 0
    y, dw, dx = passes(x, w, g, bias, options, algorithm)
    seen, met, reached = expected_passes(x != 0, w != 0, g != 0, None, options)
    assert (seen == 0).any() and (seen != 0).any()
    np.testing.assert_array_equal(y[seen == 0], np.broadcast_to(bias[:, None], y.shape)[seen == 0])
    assert not dw[met == 0].any() and not dx[reached == 0].any()


@pytest.mark.parametrize("axes", [1, 2])
def test_what_has_no_batch(axes, rng):
    """Arrays without the first dimension, in and out, as if the batch were 1."""
    conv, conv_weight, conv_input = (getattr(nbfftconv, f"conv{axes}d{name}") for name in ("", "_weight", "_input"))
    x = rng.standard_normal((4, *[30] * axes), np.float32)
    w, b = rng.standard_normal((6, 2, *[3] * axes), np.float32), rng.standard_normal(6, np.float32)
    y = conv(x, w, b, groups=2)
    assert y.shape == (6, *[28] * axes)
    np.testing.assert_array_equal(y, conv(x[None], w, b, groups=2)[0])
    out = np.empty_like(y)
    assert conv(x, w, b, groups=2, out=out) is out
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(
        conv_weight(x, w.shape, y, groups=2), conv_weight(x[None], w.shape, y[None], groups=2)
    )
    dx = conv_input(x.shape, w, y, groups=2)
    assert dx.shape == x.shape
    np.testing.assert_array_equal(dx, conv_input((1, *x.shape), w, y[None], groups=2)[0])
    layer = getattr(nbfftconv, f"Conv{axes}d")(w, b, groups=2)
    np.testing.assert_array_equal(layer(x), y)
    assert layer.backward(y).shape == x.shape


def test_arrays_that_are_not_compact(rng):
    x = rng.standard_normal((2, 50, 4), np.float32).transpose(0, 2, 1)
    w = rng.standard_normal((5, 4, 9), np.float32)[:, :, ::-1]
    expected = nbfftconv.conv1d(x.copy(), w.copy())
    np.testing.assert_array_equal(nbfftconv.conv1d(x, w), expected)
    np.testing.assert_array_equal(nbfftconv.conv1d(x.astype(">f4"), w), expected)
    out = np.full((2, 5, 84), np.nan, np.float32)[:, :, ::2]
    assert nbfftconv.conv1d(x, w, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_a_value_that_is_not_finite(rng):
    x, w = rng.uniform(0.5, 1.5, (2, 3, 4000)).astype(np.float32), rng.uniform(0.5, 1.5, (2, 3, 300)).astype(np.float32)
    x[1, 2, 1234] = np.nan
    expected = oracle.conv2d(row(x), row(w), padding=((0, 0), (299, 0)))[:, :, 0]
    assert_accurate_where_finite(nbfftconv.conv1d(x, w, padding=(299, 0)), expected, np.float32)


def test_a_plan(rng):
    x, w = rng.standard_normal((2, 3, 500), np.float32), rng.standard_normal((4, 3, 30), np.float32)
    plan = nbfftconv.plan_conv1d(x.shape, w.shape, padding="same", algorithm="fft", transform="fftw", tile=96)
    assert plan.tile == (1, 96)
    expected = oracle.conv2d(row(x), row(w), padding="same")[:, :, 0]
    assert_accurate(nbfftconv.conv1d(x, w, padding="same", plan=plan), expected, np.float32)
    with pytest.raises(ValueError, match="the plan is for another geometry"):
        nbfftconv.conv1d(x, w, plan=plan)


X, W = np.ones((2, 4, 20), np.float32), np.ones((6, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0, 0], W), {}, ValueError, "input must have 3 dimensions, or 2 without a batch, got shape (20,)"),
        ((X[None], W), {}, ValueError, "got shape (1, 2, 4, 20)"),
        ((X, W[0]), {}, ValueError, "weight must have 3 dimensions, got shape (4, 3)"),
        ((X, W[:, :3]), {}, ValueError, "input (2, 4, 20) has 4 channels, but weight (6, 3, 3) with groups=1 needs 3"),
        ((X, W), {"stride": (1, 2)}, ValueError, "stride must be an integer or a tuple of one, got (1, 2)"),
        ((X, W), {"stride": (0,)}, ValueError, "stride (0,): horizontal must be at least 1"),
        ((X, W), {"dilation": 0}, ValueError, "dilation must be at least 1 and below 2**31, got 0"),
        ((X, W), {"padding": (1, 2, 3)}, ValueError, "padding must be an integer or (left, right), got (1, 2, 3)"),
        ((X, W), {"padding": (-1, 2)}, ValueError, "-1"),
        ((X, W), {"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1, got stride (2,)"),
        (
            (X, W),
            {"dilation": 10},
            ValueError,
            "kernel (3,) with dilation (10,) spans (21,), more than the padded input (20,)",
        ),
        ((X, W), {"padding": 20, "padding_mode": "reflect"}, ValueError, "too large for padding_mode 'reflect'"),
        ((X, W), {"out": np.empty((2, 6, 1, 18), np.float32)}, ValueError, "(2, 6, 18)"),
        ((X.astype(int), W), {}, TypeError, "input must be float32 or float64"),
    ],
)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        nbfftconv.conv1d(*arguments, **options)


def test_bad_gradients():
    with pytest.raises(ValueError, match=re.escape("grad_output has shape (2, 6, 17)")):
        nbfftconv.conv1d_weight(X, W.shape, np.ones((2, 6, 17), np.float32))
    with pytest.raises(ValueError, match=re.escape("grad_output has shape (6, 18)")):
        nbfftconv.conv1d_weight(X, W.shape, np.ones((6, 18), np.float32))
    with pytest.raises(ValueError, match=re.escape("grad_output has shape (6, 18)")):
        nbfftconv.conv1d_input(X.shape, W, np.ones((6, 18), np.float32))
    with pytest.raises(ValueError, match=re.escape("input must have 3 dimensions")):
        nbfftconv.conv1d_input((4, 20), W, np.ones((2, 6, 18), np.float32))
    layer = nbfftconv.Conv1d(W)
    layer(X)
    with pytest.raises(ValueError, match=re.escape("grad_output has shape (6, 18)")):
        layer.backward(np.ones((6, 18), np.float32))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_has_no_channels(axes, groups):
    """Results of PyTorch's shapes: without channels, too."""
    conv, conv_weight, conv_input = (getattr(nbfftconv, f"conv{axes}d{name}") for name in ("", "_weight", "_input"))
    x, w = np.zeros((2, 0, *[6] * axes), np.float32), np.zeros((4, 0, *[3] * axes))
    y = conv(x, w, np.ones(4), padding=1, groups=groups)
    assert y.shape == (2, 0, *[6] * axes) and y.dtype == np.float64
    assert conv(x[0], w, groups=groups).shape == (0, *[4] * axes)
    out = np.zeros((2, 0, *[4] * axes))
    assert conv(x, w, groups=groups, out=out) is out
    assert conv(np.moveaxis(x, 1, -1), w, groups=groups, channels_last=True).shape == (2, *[4] * axes, 0)
    for channels in (0, 4):  # of the output, or of the kernels, as in torch.nn.grad
        g = np.ones((2, channels, *[4] * axes), np.float32)
        assert conv_weight(x, w.shape, g, groups=groups).shape == w.shape
        assert conv_input(x.shape, w, g, groups=groups).shape == x.shape
    with pytest.raises(ValueError, match="channels must be at least 1"):
        conv(x, np.zeros((4, 2, *[3] * axes)))
    with pytest.raises(ValueError, match="more than the padded input"):
        conv(x[:, :, :2], w)
    with pytest.raises(ValueError, match=re.escape("grad_output has shape")):
        conv_weight(x, w.shape, g[:, :, :3])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 2, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_without_channels(axes, batch, channels_last):
    """As PyTorch's: empty arrays, and a gradient of zeros at the bias."""
    space, out, bias = [6] * axes, [2] * axes, np.ones(4)
    size, result = ((*each, 0) if channels_last else (0, *each) for each in (space, out))
    sizes = [each if batch is None else (batch, *each) for each in (size, result)]
    layer = getattr(nbfftconv, f"Conv{axes}d")(
        np.zeros((4, 0, *[3] * axes), np.float32), bias, stride=2, groups=2, activation="relu"
    )
    layer.channels_last = channels_last
    for each in (layer, pickle.loads(pickle.dumps(layer))):
        y = each(np.zeros(sizes[0], np.float32))
        assert y.shape == sizes[1] and y.dtype == np.float64
        dx = each.backward(y)
        assert dx.shape == sizes[0] and dx.dtype == np.float64
        assert each.weight_grad.shape == layer.weight.shape
        np.testing.assert_array_equal(each.bias_grad, np.zeros(4))
        assert each.eval()(np.zeros(sizes[0], np.float32)).shape == sizes[1]
    with pytest.raises(ValueError, match="grad_output has shape"):
        layer.train()(np.zeros(sizes[0], np.float32))
        layer.backward(np.ones(4))
    layer.bias = None
    layer.backward(layer(np.zeros(sizes[0], np.float32)))
    assert layer.bias_grad is None
    with pytest.raises(ValueError, match="channels"):
        layer(np.zeros([2, *space, 3] if channels_last else [2, 3, *space], np.float32))
    with pytest.raises(ValueError, match="more than the padded input"):
        layer(np.zeros([2, *[2] * axes, 0] if channels_last else [2, 0, *[2] * axes], np.float32))
    with pytest.raises(ValueError, match="not a multiple of groups=3"):
        layer.groups = 3
    layer.weight = np.ones((4, 2, *[3] * axes))
    y = layer(np.ones((2, *space, 4) if channels_last else (2, 4, *space)))
    assert layer.backward(y).shape == ((2, *space, 4) if channels_last else (2, 4, *space))


@pytest.mark.parametrize("name", [f"{kind}{axes}d" for kind in ("Conv", "ConvTranspose") for axes in (1, 2, 3)])
@pytest.mark.parametrize("activation", MODES)
def test_layers_on_an_empty_batch(name, activation):
    axes = int(name[-2])
    layer = getattr(nbfftconv, name)(np.ones((4, 4, *[3] * axes), np.float32), np.ones(4), activation=activation)
    x = np.zeros((0, 4, *[6] * axes), np.float32)
    y = layer(x)
    assert y.shape == (0, 4, *[8 if "Transpose" in name else 4] * axes) and y.dtype == np.float64
    assert layer.backward(y).shape == x.shape
    np.testing.assert_array_equal(layer.weight_grad, np.zeros(layer.weight.shape))
    np.testing.assert_array_equal(layer.bias_grad, np.zeros(4))
    assert layer.eval()(x).shape == y.shape


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_transposed_convolutions_without_channels_are_refused(axes):
    """As by PyTorch, on either side."""
    for weight_size in ((0, 4), (4, 0)):
        w = np.ones((*weight_size, *[3] * axes), np.float32)
        with pytest.raises(ValueError, match="channels.* must be at least 1"):
            getattr(nbfftconv, f"ConvTranspose{axes}d")(w)
        with pytest.raises(ValueError, match="channels.* must be at least 1"):
            getattr(nbfftconv, f"conv_transpose{axes}d")(np.ones((2, weight_size[0], *[6] * axes), np.float32), w)
