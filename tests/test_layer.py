"""Conv2d: what it computes, what it keeps between calls, and when it forgets it."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
from compare import assert_accurate, relative_error
from geometries import DIRECTIONS, Case, cases, generators, has_few_taps
from hypothesis import given
from hypothesis import strategies as st

from nbfftconv import Conv2d, kept_kernels, memory, planner
from nbfftconv import layer as layer_module
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Kernels, direct, fft, registry, tiled
from nbfftconv.plan import StepPlan
from nbfftconv.transpose import transpose

CASE = Case((2, 4, 25, 23), (6, 2, 7, 5), stride=(1, 2), padding=((2, 3), (1, 0)), dilation=(1, 2), groups=2)


@pytest.fixture
def operands(rng):
    x, w = CASE.operands("forward", np.float32, rng)
    bias = rng.standard_normal(6).astype(np.float32)
    g = rng.standard_normal(CASE.output_size).astype(np.float32)
    return x, w, bias, g


@given(
    case=cases(max_size=50, max_kernel=15, max_products=1_000_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    algorithm=st.sampled_from(("auto", "fft", "winograd", "direct")),
    rng=generators(),
)
def test_forward_and_backward(case, dtype, algorithm, rng):
    # The largest of few sums of normal values may happen to be close to zero, and errors are relative to it.
    few = min(map(math.prod, (case.output_size, case.input_size, case.weight_size))) < 100
    x, w = case.operands("forward", dtype, rng, positive=few)
    g = rng.uniform(0.5, 1.5, case.output_size).astype(dtype)
    expected, grad_input, grad_weight = (
        case.expect(direction, *operands)
        for direction, operands in (("forward", (x, w)), ("grad_input", (w, g)), ("grad_weight", (x, g)))
    )
    layer = Conv2d(w, **case.options, padding_mode=case.padding_mode)
    layer.algorithm = algorithm if algorithm != "winograd" or has_few_taps(case) else "auto"
    for _ in range(2):  # the second time with what the first has cached
        assert_accurate(layer(x), expected, dtype)
        assert_accurate(layer.backward(g), grad_input, dtype)
        assert_accurate(layer.weight_grad, grad_weight, dtype)
    assert layer.bias_grad is None


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_bias_activation_and_padding_mode(padding_mode, activation, algorithm, operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options, padding_mode=padding_mode, activation=activation)
    layer.algorithm = algorithm
    geometry = CASE.options | {"padding_mode": padding_mode}
    expected = oracle.conv2d(x, w, bias, **geometry, activation=activation)
    y = layer(x)
    assert_accurate(y, expected, np.float32)

    dx = layer.backward(g)
    passed = np.where(expected > 0, g, 0) if activation else g
    assert_accurate(dx, oracle.conv2d_input(x.shape, w, passed, **geometry), np.float32)
    assert_accurate(layer.weight_grad, oracle.conv2d_weight(x, w.shape, passed, **geometry), np.float32)
    assert_accurate(layer.bias_grad, passed.sum((0, 2, 3), dtype=float), np.float32)


def test_gradients_are_assigned_not_accumulated(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    assert layer.weight_grad is None and layer.bias_grad is None
    layer(x)
    layer.backward(g)
    first = layer.weight_grad.copy(), layer.bias_grad.copy()
    kept = layer.weight_grad
    layer.backward(g)
    np.testing.assert_array_equal(layer.weight_grad, first[0])
    np.testing.assert_array_equal(layer.bias_grad, first[1])
    layer.backward(2 * g)
    np.testing.assert_array_equal(layer.weight_grad, 2 * first[0])
    np.testing.assert_array_equal(layer.bias_grad, 2 * first[1])
    np.testing.assert_array_equal(kept, first[0])  # what a caller holds does not change under its hands


def test_backward_belongs_to_the_last_forward(operands, rng):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer(rng.standard_normal((1, 4, 40, 40)))
    layer(x)
    layer.backward(g)
    expected = oracle.conv2d_weight(x, w.shape, g, **CASE.options)
    assert_accurate(layer.weight_grad, expected, np.float32)


def test_the_output_belongs_to_the_caller(operands):
    """Changed in place between forward and backward, as by a residual connection, it changes no gradient."""
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options, activation="relu")
    y = layer(x)
    passed = np.where(y > 0, g, 0)
    y -= 1
    layer.backward(g)
    assert_accurate(layer.weight_grad, oracle.conv2d_weight(x, w.shape, passed, **CASE.options), np.float32)


def test_backward_before_forward_raises(operands):
    _, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    with pytest.raises(RuntimeError, match="forward"):
        layer.backward(g)


def test_training_flag(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    assert layer.training is True
    expected = oracle.conv2d(x, w, bias, **CASE.options)
    layer(x)
    layer.training = False
    assert_accurate(layer(x), expected, np.float32)
    with pytest.raises(RuntimeError, match="training|forward"):
        layer.backward(g)
    layer.training = True
    assert_accurate(layer(x), expected, np.float32)
    assert layer.backward(g).shape == x.shape


def test_train_and_eval(operands):
    """As of `torch.nn.Module`: they set the flag, and return the layer."""
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    assert layer.eval() is layer and layer.training is False
    expected = layer(x)
    with pytest.raises(RuntimeError, match="training"):
        layer.backward(g)
    assert layer.train() is layer and layer.training is True
    assert_accurate(layer(x), expected, np.float32)
    assert layer.backward(g).shape == x.shape
    assert layer.train(False) is layer and layer.training is False
    assert layer.train(np.True_).training is True


@pytest.mark.parametrize("mode", [None, 0, 1, "train", []])
def test_train_takes_a_bool(mode, operands):
    layer = Conv2d(operands[1])
    for before in (True, False):
        layer.train(before)
        with pytest.raises(TypeError, match="training must be True or False"):
            layer.train(mode)
        assert layer.training is before


# Weights and their spectra ---------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
def test_assigning_the_weight_renews_the_spectra(algorithm, operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer.algorithm = algorithm
    before = layer(x)
    dx_before = layer.backward(g)

    other = w[::-1] * 3
    layer.weight = other
    y = layer(x)
    assert_accurate(y, oracle.conv2d(x, other, bias, **CASE.options), np.float32)
    assert_accurate(layer.backward(g), oracle.conv2d_input(x.shape, other, g, **CASE.options), np.float32)

    layer.weight = w
    np.testing.assert_array_equal(layer(x), before)
    np.testing.assert_array_equal(layer.backward(g), dx_before)


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
def test_kernels_are_transposed_once(algorithm, monkeypatch, rng):
    """Forward pass and gradient at the input with the same tile, and kernels of the same shape."""
    calls = []

    def apart(geometry, dtype, algorithm, spectra_limit):
        plans = (planner.make_plan(geometry, direction, dtype, algorithm) for direction in DIRECTIONS)
        return StepPlan(*plans, seconds=0.0)

    monkeypatch.setattr(layer_module, "make_step_plan", apart)
    for module in (direct, tiled):
        monkeypatch.setattr(module, "transpose", lambda *arguments: calls.append(1) or transpose(*arguments))
    case = Case((2, 4, 24, 24), (4, 4, 5, 5), padding=2)
    x, w = case.operands("forward", np.float32, rng)
    layer = Conv2d(w, padding=2)
    layer.algorithm = algorithm
    for _ in range(2):
        y = layer(x)
        assert_accurate(y, case.expect("forward", x, w), np.float32)
        assert_accurate(layer.backward(y), case.expect("grad_input", w, y), np.float32)
    assert len(calls) == 1


def test_a_training_step(operands):
    """layer.weight -= rate * gradient, through the property."""
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer(x)
    layer.backward(g)
    new_w, new_b = w - np.float32(0.1) * layer.weight_grad, bias - np.float32(0.1) * layer.bias_grad
    layer.weight = layer.weight - np.float32(0.1) * layer.weight_grad
    layer.bias = layer.bias - np.float32(0.1) * layer.bias_grad
    np.testing.assert_array_equal(layer.weight, new_w)
    assert_accurate(layer(x), oracle.conv2d(x, new_w, new_b, **CASE.options), np.float32)


def test_a_weight_assigned_between_forward_and_backward(operands):
    """The gradient is that of the old weight or of the new one, never of a mixture."""
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer(x)
    layer.weight = 2 * w
    dx = layer.backward(g)
    old = oracle.conv2d_input(x.shape, w, g, **CASE.options)
    assert min(relative_error(dx, old), relative_error(dx, 2 * old)) < 2e-5


def test_weight_and_bias_cannot_be_changed_in_place(operands):
    """A stale spectrum is impossible: the arrays read back are read-only, and the layer holds copies."""
    x, w, bias, _ = operands
    layer = Conv2d(w, bias, **CASE.options)
    before = layer(x)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight[0, 0, 0, 0] = 7
    with pytest.raises(ValueError, match="read-only"):
        layer.bias[0] = 7
    with pytest.raises(ValueError, match="read-only"):
        layer.weight += 1
    expected = oracle.conv2d(x, w, bias, **CASE.options)
    w[...] = 0
    bias[...] = 0
    np.testing.assert_array_equal(layer(x), before)
    assert_accurate(layer(x), expected, np.float32)
    assert np.any(layer.weight) and np.any(layer.bias)


def test_bias_can_be_assigned_and_removed(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, **CASE.options)
    assert layer.bias is None
    layer.bias = bias
    assert_accurate(layer(x), oracle.conv2d(x, w, bias, **CASE.options), np.float32)
    layer.backward(g)
    assert layer.bias_grad.shape == (6,)
    layer.bias = None
    assert_accurate(layer(x), oracle.conv2d(x, w, **CASE.options), np.float32)
    layer.backward(g)
    assert layer.bias_grad is None


def test_switching_the_algorithm(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    assert layer.algorithm == "auto"
    expected = oracle.conv2d(x, w, bias, **CASE.options)
    expected_dx = oracle.conv2d_input(x.shape, w, g, **CASE.options)
    results = {}
    for algorithm in ("fft", "direct", "auto", "fft", "direct"):
        layer.algorithm = algorithm
        assert layer.algorithm == algorithm
        y = layer(x)
        assert_accurate(y, expected, np.float32)
        np.testing.assert_array_equal(results.setdefault(algorithm, y), y)
        assert_accurate(layer.backward(g), expected_dx, np.float32)
    # They are different computations; were they the same, the switch would do nothing.
    assert results["fft"].tobytes() != results["direct"].tobytes()


# Settings --------------------------------------------------------------------------------------------

OTHER = {"stride": (2, 1), "padding": "full", "dilation": 1, "groups": 1, "padding_mode": "circular"}


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
@pytest.mark.parametrize("name", [*OTHER, "activation"])
def test_settings_hold_from_the_next_forward_pass_on(name, algorithm, rng):
    """Backward belongs to the forward pass before it, whatever was set in between."""
    w, bias = rng.standard_normal(CASE.weight_size), rng.standard_normal(6)
    first = CASE.options | {"padding_mode": "reflect", "activation": None}
    other = first | {name: (OTHER | {"activation": "relu"})[name]}
    channels = {1: 2, 2: 4}  # by groups
    layer = Conv2d(w, bias, **first, algorithm=algorithm)
    for before, after in ((first, other), (other, first), (first, other)):
        x = rng.standard_normal((2, channels[before["groups"]], 25, 23))
        expected = oracle.conv2d(x, w, bias, **before)
        assert_accurate(layer(x), expected, np.float64)
        setattr(layer, name, after[name])
        g = rng.standard_normal(expected.shape)
        passed = np.where(expected > 0, g, 0) if before["activation"] else g
        geometry = {key: value for key, value in before.items() if key != "activation"}
        assert_accurate(layer.backward(g), oracle.conv2d_input(x.shape, w, passed, **geometry), np.float64)
        assert_accurate(layer.weight_grad, oracle.conv2d_weight(x, w.shape, passed, **geometry), np.float64)
        assert_accurate(layer.bias_grad, passed.sum((0, 2, 3)), np.float64)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_a_bias_that_is_set_or_removed_before_backward(algorithm, operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options, algorithm=algorithm)
    layer(x)
    layer.bias = None
    layer.backward(g)
    assert_accurate(layer.bias_grad, g.sum((0, 2, 3), dtype=float), np.float32)
    layer(x)
    layer.bias = bias
    layer.backward(g)
    assert layer.bias_grad is None


def test_settings_are_kept_as_they_were_given(operands):
    _, w, bias, _ = operands
    layer = Conv2d(w, bias)
    rows = {
        "stride": [(2, 2), ((1, 3), (1, 3)), ([2, np.int64(1)], (2, 1)), (np.array([1, 2]), (1, 2)), (1, 1)],
        "dilation": [(3, 3), (range(1, 3), (1, 2)), (np.uint8(2), 2)],
        "padding": [("same", "same"), (((1, 2), (0, 3)), ((1, 2), (0, 3))), (np.eye(2, dtype=int), ((1, 0), (0, 1)))],
        "groups": [(3, 3), (np.array(2), 2)],
        "padding_mode": [("circular", "circular")],
        "activation": [("relu", "relu"), (None, None)],
        "algorithm": [("fft", "fft")],
        "training": [(False, False), (np.True_, True)],
        "spectra_limit": [(0, 0), (np.int64(2**40), 2**40)],
    }
    for name, values in rows.items():
        for value, kept in values if name != "stride" else [(v, v) if isinstance(v, int) else v for v in values]:
            setattr(layer, name, value)
            assert getattr(layer, name) == kept and type(getattr(layer, name)) is type(kept)
            assert f"{name}={kept!r}" in repr(layer)
        if name == "stride":
            layer.stride = 1


def test_another_number_of_filters(operands, rng):
    """By way of no bias; a weight that does not fit the bias is refused (tests of bad input)."""
    x, w, bias, _ = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer(x)
    more, bias = rng.standard_normal((10, 2, 7, 5)).astype(np.float32), rng.standard_normal(10).astype(np.float32)
    layer.bias, layer.weight = None, more
    layer.bias = bias
    assert_accurate(layer(x), oracle.conv2d(x, more, bias, **CASE.options), np.float32)


def test_settings_of_the_constructor(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options, algorithm="direct", training=False, spectra_limit=0)
    assert (layer.algorithm, layer.training, layer.spectra_limit) == ("direct", False, 0)
    direct = layer(x)
    with pytest.raises(RuntimeError, match="training"):
        layer.backward(g)
    layer.algorithm = "fft"
    assert layer(x).tobytes() != direct.tobytes()


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_bias_without_a_dtype_takes_that_of_the_weight(kind, operands):
    x, w, _, _ = operands
    numbers = kind((1, -2, 3.5, 0, 1e-3, 7))
    expected = oracle.conv2d(x, w, np.array(numbers), **CASE.options)
    for layer in (Conv2d(w, numbers, **CASE.options), Conv2d(w, **CASE.options)):
        layer.bias = numbers
        assert layer.bias.dtype == np.float32
        assert_accurate(layer(x), expected, np.float32)
    layer = Conv2d(w.astype(np.float64), numbers, **CASE.options)
    assert layer.bias.dtype == np.float64


def test_gradients_and_attributes_of_others_can_be_deleted(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer.name = "conv1"
    layer(x)
    layer.backward(g)
    assert copy.deepcopy(layer).name == "conv1"
    del layer.weight_grad, layer.bias_grad, layer.name
    assert pickle.loads(pickle.dumps(layer))(x).tobytes() == layer(x).tobytes()
    layer.backward(g)
    assert layer.weight_grad.shape == w.shape


# Images, dtypes, copies, threads ---------------------------------------------------------------------


def test_one_layer_for_images_of_many_sizes(rng):
    w = rng.standard_normal((3, 2, 9, 8)).astype(np.float32)
    layer = Conv2d(w, padding="same")
    layer.algorithm = "fft"
    shapes = [(1, 2, 20, 20), (3, 2, 64, 40), (1, 2, 150, 9), (2, 2, 9, 200), (1, 2, 1, 1), (0, 2, 33, 33)]
    images = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    first = [layer(x) for x in images]
    for x, y in zip(images, first, strict=True):
        assert_accurate(y, oracle.conv2d(x, w, padding="same"), np.float32)
    for x, y in zip(reversed(images), reversed(first), strict=True):
        np.testing.assert_array_equal(layer(x), y)
        g = np.ones_like(y)
        assert_accurate(layer.backward(g), oracle.conv2d_input(x.shape, w, g, padding="same"), np.float32)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stride", "dilation", "kernel"), [(2, 1, 3), ((2, 3), (1, 2), 3), (3, 2, 4), ((3, 1), 1, 7)])
def test_strides_and_images_of_one_output(stride, dilation, kernel, training, algorithm, rng):
    """Of one output along an axis a stride does not count, so the kernels' spectra are others, of the same tile."""
    w = rng.standard_normal((4, 2, kernel, kernel))
    geometry = {"stride": stride, "dilation": dilation, "groups": 2}
    layer = Conv2d(w, **geometry, algorithm=algorithm, training=training)
    least = [d * (kernel - 1) + 1 for d in oracle.pair(dilation)]
    more = [0, 1, 3, 20]
    sizes = [(least[0] + i, least[1] + j) for i in more for j in more]
    for height, width in rng.permutation(sizes).tolist():
        x = rng.standard_normal((1, 4, height, width))
        y = layer(x)
        assert_accurate(y, oracle.conv2d(x, w, **geometry), np.float64)
        if training:
            assert_accurate(layer.backward(y), oracle.conv2d_input(x.shape, w, y, **geometry), np.float64)


def test_dtypes_promote_and_do_not_stick(operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options)
    layer.algorithm = "fft"
    single = layer(x)
    assert_accurate(layer(x.astype(np.float64)), oracle.conv2d(x, w, bias, **CASE.options), np.float64)
    dx = layer.backward(g)
    assert_accurate(dx, oracle.conv2d_input(x.shape, w, g, **CASE.options).astype(dx.dtype), dx.dtype)
    np.testing.assert_array_equal(layer(x), single)
    layer.bias = bias.astype(np.float64)
    assert layer(x).dtype == np.float64
    layer.bias, layer.weight = bias, w.astype(np.float64)
    assert_accurate(layer(x), oracle.conv2d(x, w, bias, **CASE.options), np.float64)


def test_attributes(operands):
    _, w, bias, _ = operands
    layer = Conv2d(w, bias, **CASE.options, padding_mode="zeros", activation="relu")
    np.testing.assert_array_equal(layer.weight, w)
    np.testing.assert_array_equal(layer.bias, bias)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "activation"):
        assert hasattr(layer, name)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(duplicate, operands):
    x, w, bias, g = operands
    layer = Conv2d(w, bias, **CASE.options, activation="relu")
    layer.algorithm = "fft"
    layer.training, layer.spectra_limit = True, 2**20
    before = layer(x)
    other = duplicate(layer)
    assert repr(other) == repr(layer)
    np.testing.assert_array_equal(other(x), before)
    other.backward(g)
    with pytest.raises(ValueError, match="'gelu'"):  # checked as ever
        other.activation = "gelu"
    other.groups = 1
    assert layer.groups == 2
    other.groups = 2
    assert layer.weight_grad is None
    other.weight = 2 * w
    assert_accurate(other(x), oracle.conv2d(x, 2 * w, bias, **CASE.options, activation="relu"), np.float32)
    np.testing.assert_array_equal(layer(x), before)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_one_layer_from_many_threads(algorithm, rng):
    """Eight threads, images of several sizes; the first calls race for the spectra.

    Which spectra a size shares with others depends on who came first; from then on its results have the same bits.
    """
    w, bias = rng.standard_normal((4, 3, 9, 9)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
    images = [rng.standard_normal((1 + i % 2, 3, 20 + 7 * (i % 5), 30 + i % 3)).astype(np.float32) for i in range(32)]
    serial = Conv2d(w, bias, activation="relu")
    serial.algorithm, serial.training = algorithm, False
    expected = [serial(x) for x in images]
    for _ in range(3):
        layer = Conv2d(w, bias, activation="relu")
        layer.algorithm, layer.training = algorithm, False
        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(layer, images))
            again = list(pool.map(layer, reversed(images)))
        assert [y.tobytes() for y in reversed(again)] == [y.tobytes() for y in first]
        for y, other in zip(first, expected, strict=True):
            assert_accurate(y, other.astype(np.float64), np.float32)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_training_one_layer_from_many_threads(algorithm, rng):
    """Each thread's backward belongs to its own forward."""
    w = rng.standard_normal((4, 3, 9, 9)).astype(np.float32)
    images = [rng.standard_normal((1, 3, 20 + 5 * (i % 4), 30)).astype(np.float32) for i in range(16)]
    layer = Conv2d(w, activation="relu")
    layer.algorithm = algorithm

    def step(x):
        return layer.backward(layer(x)).tobytes()

    expected = [step(x) for x in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(step, images)) == expected


def test_weights_assigned_while_others_compute(rng):
    """Every result is that of one weight or of another, never of a mixture."""
    x = rng.standard_normal((1, 2, 40, 40)).astype(np.float32)
    weights = [rng.standard_normal((2, 2, 9, 9)).astype(np.float32) for _ in range(2)]
    layer = Conv2d(weights[0])
    layer.algorithm, layer.training = "fft", False
    possible = set()
    for w in weights:
        layer.weight = w
        possible.add(layer(x).tobytes())
    assert len(possible) == 2

    def work(i):
        if i % 4 == 0:
            layer.weight = weights[i // 4 % 2]
        return layer(x).tobytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(64))) <= possible


# Images of many sizes --------------------------------------------------------------------------------


class NoWork(Kernels):
    """Kernels of the size that a plan's would have, of no memory."""

    def __init__(self, weight, plan):
        super().__init__(weight)
        object.__setattr__(self, "array", np.broadcast_to(np.uint8(0), plan.weight_bytes))

    def arrays(self):
        return self.weight, self.array


@pytest.mark.parametrize("algorithm", ["auto", "fft"])
@pytest.mark.parametrize(
    ("weight_size", "padding", "groups"),
    [((256, 256, 3, 3), 1, 1), ((64, 64, 7, 7), 3, 1), ((64, 1, 31, 31), 15, 64), ((1, 1, 63, 63), 31, 1)],
)
def test_few_forms_serve_many_sizes(weight_size, padding, groups, algorithm, monkeypatch, rng):
    for implementation in registry.candidates():
        monkeypatch.setattr(implementation, "prepare", lambda plan, weight: NoWork(weight, plan))
    monkeypatch.setattr(memory, "get_memory_limit", lambda: 2**40)  # all forms find room
    monkeypatch.setattr(memory, "_holders", {})  # what it seems to keep is too much for other tests
    kept = kept_kernels.KeptKernels(np.zeros(weight_size, np.float32))
    dtype, best_forms, forms, chosen = np.dtype(np.float32), set(), set(), {}
    for height, width in rng.integers(14, 200, (320, 2)).tolist():
        size = 1, weight_size[1] * groups, height, width
        geometry = ConvGeometry.from_arguments(size, weight_size, 1, padding, 1, groups)
        best = planner.make_plan(geometry, "forward", dtype, algorithm, weight_is_transformed=True)
        plan = chosen[geometry] = kept.plan(geometry, dtype, algorithm)
        assert plan.seconds <= 1.1 * best.seconds
        assert (plan.geometry, plan.direction) == (geometry, "forward")
        kept.of(plan)
        forms.add(plan.kernel_form)
        best_forms.add(best.kernel_form)
    assert len(forms) <= max(2, len(best_forms) // 2)  # of Winograd's, one is best nearly always
    if len(kept.forms) == len(forms):  # nothing had to go
        remembered = list(chosen.items())[-kept_kernels._CHOSEN :]
        assert all(kept.plan(geometry, dtype, algorithm) == plan for geometry, plan in remembered)


def test_sizes_share_spectra_and_results_stay(rng):
    made, prepare = [], fft.IMPLEMENTATION.prepare
    w = rng.standard_normal((3, 2, 9, 8)).astype(np.float32)
    layer = Conv2d(w, padding="same")
    layer.algorithm, layer.training = "fft", False
    images = [rng.standard_normal((1, 2, *size)).astype(np.float32) for size in rng.integers(8, 120, (60, 2)).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fft.IMPLEMENTATION, "prepare", lambda plan, w: made.append(plan.tile) or prepare(plan, w))
        first = [layer(x) for x in images]
        best = {planner.plan_conv2d(x.shape, w.shape, padding="same", algorithm="fft", weight_is_transformed=True).tile
                for x in images}  # fmt: skip
        assert len(made) == len(set(made)) < len(best) / 2
        for x, y in zip(images, first, strict=True):
            assert_accurate(y, oracle.conv2d(x, w, padding="same"), np.float32)
            np.testing.assert_array_equal(layer(x), y)
        assert len(made) == len(set(made))


@pytest.mark.parametrize("stride", [2, (3, 1)])
def test_strides_of_a_single_output_are_none(stride, rng):
    """Spectra for an image with one output are of all taps at once, those for a larger one of every second tap."""
    w = rng.standard_normal((3, 2, 6, 6)).astype(np.float32)
    layer = Conv2d(w, stride=stride)
    layer.algorithm = "fft"
    for training in (False, True):
        layer.training = training
        for size in [(6, 6), (21, 21), (6, 21), (21, 6), (20, 20)]:
            x = rng.standard_normal((1, 2, *size)).astype(np.float32)
            assert_accurate(layer(x), oracle.conv2d(x, w, stride=stride), np.float32)
