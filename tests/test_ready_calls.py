"""Calls of a layer in inference that are ready: the second one of a size computes what the first one did, and no more
than that is taken to be as it was."""

from __future__ import annotations

from unittest import mock

import numpy as np
import oracle
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import cases, generators
from hypothesis import given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import config, epoch
from nbfftconv.implementations import registry
from nbfftconv.run import ReadyForward

KINDS = ("plain", "not finite", "blank")


def values(kind: str, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return numbers like those of `x`."""
    x = rng.standard_normal(x.shape).astype(x.dtype)
    if kind == "not finite":
        x.flat[rng.integers(x.size, size=2)] = np.nan, np.inf
    elif kind == "blank":
        x[..., : x.shape[-1] // 2 + 1] = 0
    return x


@given(
    case=cases(max_size=50, max_kernel=9, max_products=500_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    algorithm=st.sampled_from(("auto", "fft", "direct")),
    kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=4),
    relu=st.booleans(),
    rng=generators(),
)
def test_further_calls(case, dtype, algorithm, kinds, relu, rng):
    x, w = case.operands("forward", dtype, rng)
    bias = rng.standard_normal(case.weight_size[0]).astype(dtype)
    activation = "relu" if relu else None
    settings = case.options | {"padding_mode": case.padding_mode, "activation": activation}
    layer = nbfftconv.Conv2d(w, bias, **settings, algorithm=algorithm, training=False)
    for kind in kinds:
        each = values(kind, x, rng)
        expected = case.expect("forward", each, w, bias=bias, activation=activation)
        assert_accurate_where_finite(layer(each), expected, dtype)


@pytest.fixture
def calls(monkeypatch):
    """Count calls that were ready."""
    counted = []
    call = ReadyForward.__call__
    monkeypatch.setattr(ReadyForward, "__call__", lambda self, x: counted.append(self) or call(self, x))
    return counted


@pytest.fixture
def layer(rng):
    return nbfftconv.Conv2d(
        rng.standard_normal((8, 4, 3, 3)).astype(np.float32), np.ones(8, np.float32), padding=1, training=False
    )


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 4, 20, 24)).astype(np.float32)


def test_the_second_call_is_ready(layer, x, calls):
    first = layer(x)
    assert not calls
    second = layer(x)
    assert len(calls) == 1 and second is not first and not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(layer(x[0]), first[0])  # another size
    np.testing.assert_array_equal(layer(x[0]), first[0])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "padding", 0),
        lambda layer: setattr(layer, "activation", "relu"),
        lambda layer: setattr(layer, "bias", None),
        lambda layer: setattr(layer, "weight", 2 * layer.weight),
        lambda layer: setattr(layer, "algorithm", "fft"),
        lambda layer: setattr(layer, "padding_mode", "circular"),
        lambda layer: setattr(layer, "training", True),
    ],
)
def test_settings_that_change(change, layer, x, calls):
    layer(x)
    change(layer)
    y = layer(x)
    assert not calls
    bias, settings = layer.bias, {"padding": layer.padding, "padding_mode": layer.padding_mode}
    assert_accurate(y, oracle.conv2d(x, layer.weight, bias, **settings, activation=layer.activation), np.float32)


def test_what_is_not_as_it_was_is_looked_at(layer, x, calls):
    expected = layer(x)
    read_only, subclass = x.copy(), x.view(type("Sub", (np.ndarray,), {}))
    read_only.flags.writeable = False
    wide = np.empty((2, 4, 20, 48), np.float32)
    strided = wide[..., ::2]
    strided[...] = x
    moved = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for other in (strided, moved, x.astype(">f4"), subclass):
        assert_accurate(layer(other), expected, np.float32)
    assert not calls
    np.testing.assert_array_equal(layer(read_only), expected)
    assert len(calls) == 1
    with pytest.raises(TypeError, match="masked"):
        layer(np.ma.array(x, mask=x > 0))
    with pytest.raises(TypeError, match="float16"):
        layer(x.astype(np.float16))
    for other in (x.astype(np.float64), x.tolist()):
        assert layer(other).dtype == np.float64


def test_settings_of_the_process_that_change(layer, x, calls, monkeypatch):
    layer(x)
    before = epoch.current
    threads = nbfftconv.get_num_threads()
    try:
        nbfftconv.set_num_threads(threads + 1)
        assert epoch.current != before
        np.testing.assert_array_equal(layer(x), layer(x))
        assert len(calls) == 1
    finally:
        nbfftconv.set_num_threads(threads)
    before = epoch.current
    limit = config.get_scratch_limit()
    config.set_scratch_limit(limit)
    assert epoch.current != before


def test_backward_after_a_ready_call_raises(layer, x):
    layer.train()(x)
    layer.eval()
    layer(x)
    layer(x)
    with pytest.raises(RuntimeError, match="forward pass"):
        layer.backward(np.ones((2, 8, 20, 24), np.float32))


def test_calls_are_bounded(layer, rng):
    with mock.patch("nbfftconv.kept_kernels._CHOSEN", 3):
        for width in range(10, 17):
            layer(rng.standard_normal((1, 4, 9, width)).astype(np.float32))
            assert len(layer._kernels.calls) <= 3


def test_implementations_without_calls_of_their_own(x, rng):
    """They leave all to their forward pass."""
    w = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    implementation = registry.get("direct")
    plan = nbfftconv.plan_conv2d(x.shape, w.shape, padding=1, algorithm="direct")
    bound = super(type(implementation), implementation).bind(
        plan, plan.geometry, implementation.prepare(plan, w), False, True
    )
    y = np.empty(plan.geometry.output_size, np.float32)
    bound.finish(bound.run(0, 0, 0), x, None, y)
    assert_accurate(y, oracle.conv2d(x, w, padding=1, activation="relu"), np.float32)
