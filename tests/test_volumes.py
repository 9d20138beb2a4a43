"""Three spatial axes: every pass and the layer against the oracle, which adds planes up."""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import ALGORITHMS, PADDING_MODES, are_few_taps, generators, refused_unless, skip_unless_possible
from hypothesis import given, settings
from hypothesis import strategies as st

import nbfftconv
from nbfftconv.geometry import FLAT, ConvGeometry

DTYPES = (np.float32, np.float64)


@st.composite
def volumes(draw, kernels=((4, 5, 5), (5, 1, 1), (1, 4, 4), (7, 2, 3))):
    """Sizes and options of a convolution of volumes, with kernels of at most one of these sizes."""
    largest = draw(st.sampled_from(kernels))
    kernel = [draw(st.integers(1, most)) for most in largest]
    dilation = [draw(st.integers(1, 3)) for _ in range(3)]
    stride = [draw(st.integers(1, 3)) for _ in range(3)]
    mode = draw(st.sampled_from(PADDING_MODES))
    pads = [(draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(3)]
    form = draw(st.sampled_from(("pairs", "one each", "one", "none", "valid", "full", "same")))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if form == "same":
        stride = [1, 1, 1]
    if form in ("valid", "full", "same"):
        padding = form
        pads = [{"valid": (0, 0), "full": (r, r), "same": (r // 2, r - r // 2)}[form] for r in reach]
    elif form == "pairs":
        padding = tuple(pads)
    elif form == "one each":
        padding = tuple(before for before, _ in pads)
        pads = [(p, p) for p in padding]
    else:
        padding = pads[0][0] if form == "one" else 0
        pads = [(padding, padding)] * 3
    size = [
        max(draw(st.integers(1, 12)), r + 1 - sum(p), 1, max(p) + 1 if mode != "zeros" else 1)
        for r, p in zip(reach, pads, strict=True)
    ]
    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 3))
    input_size = draw(st.integers(0, 2)), channels, *size
    weight_size = groups * draw(st.integers(1, 3)), channels // groups, *kernel
    options = {"stride": tuple(stride), "padding": padding, "dilation": tuple(dilation), "groups": groups}
    return input_size, weight_size, options | {"padding_mode": mode}


def volumes_for(algorithm):
    """Those of few taps across planes, and some of more, for Winograd's maps."""
    return volumes(((4, 3, 3), (3, 1, 1), (5, 1, 1), (3, 5, 4))) if algorithm == "winograd" else volumes()


def check_passes(case, dtype, algorithm, rng):
    """All passes against the oracle, or all are refused."""
    input_size, weight_size, options = case
    is_possible = algorithm != "winograd" or are_few_taps(input_size, weight_size, options)
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[0]).astype(dtype)
    expected = oracle.conv3d(x, w, bias, **options)
    with refused_unless(is_possible):
        y = nbfftconv.conv3d(x, w, bias, **options, algorithm=algorithm)
        assert_accurate(y, expected, dtype)
    g = rng.standard_normal(expected.shape).astype(dtype)
    with refused_unless(is_possible):
        dw = nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm)
        assert_accurate(dw, oracle.conv3d_weight(x, weight_size, g, **options), dtype)
    with refused_unless(is_possible):
        dx = nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm)
        assert_accurate(dx, oracle.conv3d_input(input_size, w, g, **options), dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry(algorithm, data, dtype, rng):
    check_passes(data.draw(volumes_for(algorithm)), dtype, algorithm, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=500)  # whatever the profile
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_500_geometries(algorithm, data, dtype, rng):
    check_passes(data.draw(volumes_for(algorithm)), dtype, algorithm, rng)


def check_layer(case, dtype, algorithm, activation, rng):
    """A step of a layer against the oracle, and the same in inference; or it is refused."""
    input_size, weight_size, options = case
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    bias = rng.standard_normal(weight_size[0]).astype(dtype)
    layer = nbfftconv.Conv3d(w, bias, **options, activation=activation, algorithm=algorithm)
    if algorithm == "winograd" and not are_few_taps(input_size, weight_size, options):
        for is_training in (True, False):
            with refused_unless(False):
                layer.train(is_training)(x)
        return
    y = layer(x)
    assert_accurate(y, oracle.conv3d(x, w, bias, **options, activation=activation), dtype)
    g = rng.standard_normal(y.shape).astype(dtype)
    dx, passed = layer.backward(g), np.where(y > 0, g, 0) if activation else g
    assert_accurate(dx, oracle.conv3d_input(input_size, w, passed, **options), dtype)
    assert layer.weight_grad.shape == w.shape
    assert_accurate(layer.weight_grad, oracle.conv3d_weight(x, weight_size, passed, **options), dtype)
    np.testing.assert_allclose(layer.bias_grad, passed.sum(axis=(0, 2, 3, 4)), rtol=1e-4, atol=1e-4)
    assert_accurate(layer.eval()(x), y, dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from((None, "relu")), rng=generators())
def test_a_layer_is_the_functions(algorithm, data, dtype, activation, rng):
    check_layer(data.draw(volumes_for(algorithm)), dtype, algorithm, activation, rng)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=500)  # whatever the profile
@given(data=st.data(), dtype=st.sampled_from(DTYPES), activation=st.sampled_from((None, "relu")), rng=generators())
def test_layers_of_500_geometries(algorithm, data, dtype, activation, rng):
    check_layer(data.draw(volumes_for(algorithm)), dtype, algorithm, activation, rng)


# of a size at which tiles and blocks are many: of few and of many channels, depthwise, strides, kernels of one plane,
# and of one pixel of every plane
LARGE = [
    ((2, 20, 9, 40, 30), (24, 20, 3, 3, 3), {"padding": 1}),
    ((1, 2, 12, 33, 40), (20, 2, 5, 7, 7), {"padding": (2, 3, 3)}),
    ((1, 24, 8, 30, 30), (24, 1, 3, 5, 5), {"padding": (1, 2, 2), "groups": 24}),
    ((2, 16, 9, 24, 24), (20, 16, 3, 3, 3), {"padding": 1, "stride": 2}),
    ((1, 16, 9, 24, 24), (20, 16, 3, 3, 3), {"padding": 1, "stride": (1, 2, 2)}),
    ((2, 16, 6, 28, 28), (16, 16, 1, 3, 3), {"padding": (0, 1, 1)}),
    ((1, 32, 10, 28, 28), (16, 32, 3, 1, 1), {"padding": (4, 0, 0), "dilation": (4, 1, 1)}),
    ((1, 18, 12, 20, 20), (12, 9, 4, 3, 3), {"padding": ((3, 0), (1, 1), (1, 1)), "groups": 2}),
    ((1, 3, 2, 40, 40), (40, 3, 2, 8, 8), {"stride": (2, 4, 4), "padding": (2, 2, 2)}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_large_geometries(input_size, weight_size, options, algorithm, dtype, rng):
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x, w = rng.standard_normal(input_size).astype(dtype), rng.standard_normal(weight_size).astype(dtype)
    y = nbfftconv.conv3d(x, w, **options, algorithm=algorithm)
    assert_accurate(y, oracle.conv3d(x, w, **options), dtype)
    g = rng.standard_normal(y.shape).astype(dtype)
    dw = nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm)
    assert_accurate(dw, oracle.conv3d_weight(x, weight_size, g, **options), dtype)
    dx = nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm)
    assert_accurate(dx, oracle.conv3d_input(input_size, w, g, **options), dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
@pytest.mark.usefixtures("restore_threads")
def test_threads_do_not_change_bits(input_size, weight_size, options, algorithm, rng):
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x, w = rng.standard_normal(input_size, np.float32), rng.standard_normal(weight_size, np.float32)
    g = rng.standard_normal(nbfftconv.conv3d(x, w, **options).shape, np.float32)
    results = []
    for count in (1, 2, 5):
        nbfftconv.set_num_threads(count)
        results.append(
            (
                nbfftconv.conv3d(x, w, **options, algorithm=algorithm),
                nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm),
                nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm),
            )
        )
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one.view(np.uint32), another.view(np.uint32))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e18])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_values_that_are_not_finite(input_size, weight_size, options, algorithm, value, rng):
    """They reach what their own products are in, and nothing else."""
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x = rng.uniform(0.5, 1.5, input_size).astype(np.float32)
    w = rng.uniform(0.5, 1.5, weight_size).astype(np.float32)
    g = rng.uniform(0.5, 1.5, nbfftconv.conv3d(x, w, **options).shape).astype(np.float32)
    bias = rng.uniform(0.5, 1.5, weight_size[0]).astype(np.float32)
    x[0, 1, 1, 5, 7] = g[0, 2, 0, 3, 4] = value
    y = nbfftconv.conv3d(x, w, bias, **options, algorithm=algorithm, activation="relu")
    expected = oracle.conv3d(x, w, bias, **options, activation="relu")
    assert_accurate_where_finite(y, expected, np.float32)
    dw = nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm)
    assert_accurate_where_finite(dw, oracle.conv3d_weight(x, weight_size, g, **options), np.float32)
    dx = nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm)
    assert_accurate_where_finite(dx, oracle.conv3d_input(input_size, w, g, **options), np.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), min_size=1, max_size=3, unique=True),
    rng=generators(),
)
def test_values_that_are_not_finite_in_any_geometry(algorithm, data, dtype, values, rng):
    case = data.draw(volumes_for(algorithm).filter(lambda case: algorithm != "winograd" or are_few_taps(*case)))
    input_size, weight_size, options = case
    x, w = (rng.uniform(0.5, 1.5, size).astype(dtype) for size in (input_size, weight_size))
    g = rng.uniform(0.5, 1.5, oracle.conv3d(x, w, **options).shape).astype(dtype)
    for array in (x, w, g):
        if array.size and rng.random() < 0.6:
            array.flat[rng.integers(array.size)] = rng.choice(values)
    y = nbfftconv.conv3d(x, w, **options, algorithm=algorithm)
    assert_accurate_where_finite(y, oracle.conv3d(x, w, **options), dtype)
    dw = nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm)
    assert_accurate_where_finite(dw, oracle.conv3d_weight(x, weight_size, g, **options), dtype)
    dx = nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm)
    assert_accurate_where_finite(dx, oracle.conv3d_input(input_size, w, g, **options), dtype)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("input_size", "weight_size", "options"), LARGE, ids=str)
def test_zeros_are_exact(input_size, weight_size, options, algorithm, rng):
    """Where every product is zero, results are zero, or the bias."""
    skip_unless_possible(input_size, weight_size, options, algorithm)
    x, w = rng.standard_normal(input_size, np.float32), rng.standard_normal(weight_size, np.float32)
    bias = rng.standard_normal(weight_size[0], np.float32)
    x[0, :, : input_size[2] // 2 + 1, 4:22], x[0, 0] = 0, 0
    w[1], w[2, 0], w[3, :, :, 0] = 0, 0, 0
    g = rng.standard_normal(nbfftconv.conv3d(x, w, **options).shape, np.float32)
    g[:, :, 1:, :6], g[:, 4] = 0, 0
    seen = oracle.conv3d(x != 0, w != 0, **options)
    y = nbfftconv.conv3d(x, w, bias, **options, algorithm=algorithm)
    assert (seen == 0).any() and (seen != 0).any()
    np.testing.assert_array_equal(y[seen == 0], np.broadcast_to(bias[:, None, None, None], y.shape)[seen == 0])
    dw = nbfftconv.conv3d_weight(x, weight_size, g, **options, algorithm=algorithm)
    assert not dw[oracle.conv3d_weight(x != 0, weight_size, g != 0, **options) == 0].any()
    dx = nbfftconv.conv3d_input(input_size, w, g, **options, algorithm=algorithm)
    assert not dx[oracle.conv3d_input(input_size, w != 0, g != 0, **options) == 0].any()


def test_planes_of_padding_alone(rng):
    """Outputs that see nothing of the input are the bias."""
    x, w = rng.standard_normal((2, 3, 2, 20, 20), np.float32), rng.standard_normal((4, 3, 2, 3, 3), np.float32)
    bias = rng.standard_normal(4, np.float32)
    for algorithm in ALGORITHMS:
        y = nbfftconv.conv3d(x, w, bias, padding=((5, 3), (1, 1), (1, 1)), algorithm=algorithm)
        assert_accurate(y, oracle.conv3d(x, w, bias, padding=((5, 3), (1, 1), (1, 1))), np.float32)
        for plane in (0, 3, 8):
            np.testing.assert_array_equal(y[:, :, plane], np.broadcast_to(bias[:, None, None], (2, 4, 20, 20)))


def test_what_has_no_batch_and_out(rng):
    x, w = rng.standard_normal((4, 6, 12, 14), np.float32), rng.standard_normal((6, 2, 3, 3, 3), np.float32)
    y = nbfftconv.conv3d(x, w, groups=2)
    assert y.shape == (6, 4, 10, 12)
    np.testing.assert_array_equal(y, nbfftconv.conv3d(x[None], w, groups=2)[0])
    out = np.full((6, 4, 10, 24), np.nan, np.float32)[..., ::2]
    assert nbfftconv.conv3d(x, w, groups=2, out=out) is out
    np.testing.assert_array_equal(out, y)
    out = np.full((6, 4, 10, 12), np.nan, np.float32)
    assert nbfftconv.conv3d(x, w, groups=2, out=out) is out
    np.testing.assert_array_equal(out, y)
    assert nbfftconv.conv3d_input(x.shape, w, y, groups=2).shape == x.shape
    assert nbfftconv.conv3d_weight(x, w.shape, y, groups=2).shape == w.shape


def test_arrays_that_are_not_compact(rng):
    x = rng.standard_normal((2, 7, 12, 14, 4), np.float32).transpose(0, 4, 1, 2, 3)
    w = rng.standard_normal((5, 4, 3, 3, 3), np.float32)[:, :, ::-1, :, ::-1]
    expected = nbfftconv.conv3d(x.copy(), w.copy())
    np.testing.assert_array_equal(nbfftconv.conv3d(x, w), expected)
    np.testing.assert_array_equal(nbfftconv.conv3d(x.astype(">f4"), w.astype(">f4")), expected)
    x = x.copy()
    x.flags.writeable = False
    np.testing.assert_array_equal(nbfftconv.conv3d(x, w), expected)


def test_how_volumes_are_seen():
    """Planes are images and channels; kernels of one pixel of every plane make a volume an image."""
    images = ConvGeometry.from_arguments((2, 4, 9, 7, 5), (6, 2, 3, 2, 2), 1, (1, 0, 0), groups=2, axes=3).of_images
    assert (images.input_size, images.weight_size, images.output_size) == ((18, 12, 7, 5), (6, 6, 2, 2), (18, 6, 6, 4))
    assert (images.input_shape, images.output_shape) == ((2, 4, 9, 7, 5), (2, 6, 9, 6, 4))
    back = images.transposed()
    assert (back.input_shape, back.output_shape) == (images.output_shape, images.input_shape)
    assert back.transposed() == images
    image = ConvGeometry.from_arguments((2, 4, 9, 7, 5), (6, 4, 3, 1, 1), (2, 1, 1), (1, 0, 0), axes=3).of_images
    assert (image.input_size, image.weight_size, image.stride) == ((2, 4, 9, 35), (6, 4, 3, 1), (2, 1))
    assert image.depth == FLAT
    plan = nbfftconv.plan_conv3d((2, 4, 9, 17, 15), (6, 4, 3, 2, 2), algorithm="fft", tile=16)
    assert plan.tile == (16, 16) and plan.geometry.depth.taps == 3


X, W = np.ones((2, 4, 5, 6, 7), np.float32), np.ones((6, 4, 3, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((X[0, 0], W), {}, ValueError, "input must have 5 dimensions, or 4 without a batch, got shape (5, 6, 7)"),
        ((X, W[0]), {}, ValueError, "weight must have 5 dimensions, got shape (4, 3, 3, 3)"),
        ((X, W[:, :3]), {}, ValueError, "has 4 channels, but weight (6, 3, 3, 3, 3) with groups=1 needs 3"),
        ((X, W), {"stride": (1, 2)}, ValueError, "stride must be an integer or three of them, got (1, 2)"),
        ((X, W), {"stride": (0, 1, 1)}, ValueError, "stride (0, 1, 1): in depth must be at least 1"),
        ((X, W), {"padding": ((1, 2), 0)}, ValueError, "padding must be an integer, three of them, or ((front, back)"),
        ((X, W), {"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1, got stride (2, 2, 2)"),
        ((X, W), {"dilation": (3, 1, 1)}, ValueError, "more than the padded input (5, 6, 7)"),
        ((X, W), {"padding": (5, 0, 0), "padding_mode": "reflect"}, ValueError, "too large for padding_mode 'reflect'"),
        ((X, W), {"out": np.empty((2, 6, 3, 4, 4), np.float32)}, ValueError, "(2, 6, 3, 4, 5)"),
        ((X.astype(int), W), {}, TypeError, "input must be float32 or float64"),
    ],
)
def test_bad_input(arguments, options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        nbfftconv.conv3d(*arguments, **options)
