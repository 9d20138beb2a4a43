"""The bound on what is kept between calls: kernels of all layers, and free memory of results and tiles."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import oracle
import pytest
from compare import assert_accurate

import nbfftconv
from nbfftconv import config, kept_kernels, memory, scratch
from nbfftconv.geometry import ConvGeometry
from nbfftconv.planner import make_plan

MIB = 2**20


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Other tests' layers are gone, and the bound is as it was afterwards."""
    gc.collect()
    monkeypatch.setattr(memory, "_holders", {})
    scratch._pool.clear()
    monkeypatch.setattr(kept_kernels, "_RESERVE", 0)
    before = memory.given_memory_limit()
    yield
    monkeypatch.undo()
    config.set_memory_limit(before)


def layer_of(rng, channels=16, kernel=3, algorithm="winograd"):
    w = rng.standard_normal((channels, channels, kernel, kernel)).astype(np.float32)
    return nbfftconv.Conv2d(w, padding=kernel // 2, algorithm=algorithm, training=False)


def input_of(rng, channels=16, size=24, dtype=np.float32):
    return rng.standard_normal((1, channels, size, size)).astype(dtype)


@pytest.mark.parametrize(
    ("value", "exception"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("1", TypeError)]
)
def test_what_is_no_limit(value, exception):
    config.set_memory_limit(17)
    with pytest.raises(exception, match=f"memory limit.*{value}"):
        config.set_memory_limit(value)
    assert config.get_memory_limit() == 17
    assert config.settings()["memory_limit"].source == "set"


def test_at_first_it_goes_by_the_weights(rng):
    config.set_memory_limit(None)
    assert config.get_memory_limit() == 384 * MIB
    layers = [layer_of(rng) for _ in range(3)]
    assert config.get_memory_limit() == 384 * MIB + 2 * sum(layer.weight.nbytes for layer in layers)
    del layers
    assert config.get_memory_limit() == 384 * MIB


def test_layers_in_turn_do_not_drive_each_other_out(rng, monkeypatch):
    made, x = [], input_of(rng)
    layers = [layer_of(rng) for _ in range(4)]
    layers[0](x)
    one = layers[0]._kernels.nbytes
    assert one > 0
    config.set_memory_limit(2 * one + one // 2)
    prepare = kept_kernels.registry.get("winograd").prepare
    monkeypatch.setattr(
        kept_kernels.registry.get("winograd"), "prepare", lambda plan, w: made.append(plan) or prepare(plan, w)
    )
    for _ in range(3):
        for layer in layers:
            assert_accurate(layer(x), oracle.conv2d(x, layer.weight, padding=1), np.float32)
            assert sum(each._kernels.nbytes for each in layers) <= config.get_memory_limit()
    kept = [len(layer._kernels.forms) for layer in layers]
    assert sorted(kept) == [0, 0, 1, 1]
    assert len(made) == 1 + 2 * 3  # the second layer's once, those that found no room at every call


def test_kernels_that_are_not_used_any_more_go(rng):
    x, old, new = input_of(rng), layer_of(rng), layer_of(rng)
    old(x)
    config.set_memory_limit(old._kernels.nbytes)
    old(x)
    assert old._kernels.calls
    new(x)
    assert old._kernels.forms and not new._kernels.forms
    new(x)
    assert not old._kernels.forms and not old._kernels.calls and new._kernels.forms
    new(x)
    old(x)
    assert new._kernels.forms and not old._kernels.forms


def test_layers_that_are_gone_leave_room(rng):
    x, layers = input_of(rng), [layer_of(rng) for _ in range(2)]
    layers[0](x)
    config.set_memory_limit(layers[0]._kernels.nbytes)
    layers[0](x)
    del layers[0]
    layers[0](x)
    assert layers[0]._kernels.forms


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_forms_of_many_sizes_and_dtypes(algorithm, training, rng):
    config.set_memory_limit(40_000)
    layer = layer_of(rng, 8, 5, algorithm)
    layer.training, w = training, layer.weight
    for size in [(12, 12), (40, 9), (30, 30), (7, 60), (12, 12), (90, 5)]:
        for dtype in (np.float32, np.float64):
            x = rng.standard_normal((1, 8, *size)).astype(dtype)
            assert_accurate(layer(x), oracle.conv2d(x, w, padding=2), dtype)
            if training:
                g = rng.standard_normal(x.shape).astype(dtype)
                assert_accurate(layer.backward(g), oracle.conv2d_input(x.shape, w, g, padding=2), dtype)
            assert layer._kernels.nbytes <= 40_000


def test_nothing_is_kept_with_a_limit_of_0(rng):
    config.set_memory_limit(0)
    layer, x = layer_of(rng, algorithm="auto"), input_of(rng, size=400)
    for _ in range(2):
        y = layer(x)
        assert_accurate(y, oracle.conv2d(x, layer.weight, padding=1), np.float32)
        assert layer._kernels.nbytes == 0 and not layer._kernels.calls
    del y
    gc.collect()  # compiling leaves frames behind that refer to it
    scratch.trim()
    assert not scratch._pool


def test_plans_weigh_what_kernels_take(rng):
    """Smaller tiles, or none, where those of the best plan find no room."""
    bytes_of = []
    for limit in (64 * MIB, 3 * MIB, MIB):
        config.set_memory_limit(limit)
        layer, x = layer_of(rng, 128, algorithm="auto"), input_of(rng, 128, 28)
        expected = oracle.conv2d(x, layer.weight, padding=1)
        assert_accurate(layer(x), expected, np.float32)
        assert layer._kernels.nbytes <= limit
        bytes_of.append(layer._kernels.nbytes)
    assert bytes_of[0] > 2 * layer.weight.nbytes
    assert bytes_of == sorted(bytes_of, reverse=True) and len(set(bytes_of)) > 1


def test_free_memory_is_within_what_kernels_leave(rng):
    config.set_memory_limit(8 * MIB)
    results = [scratch.result((5 * MIB // 4,), np.dtype(np.float32)) for _ in range(3)]
    assert len(scratch._pool) == 3  # they are their users'
    del results
    scratch.result((MIB,), np.dtype(np.float32))  # the next call
    gc.collect()
    scratch.trim()
    assert sum(owner.nbytes for owner in scratch._pool.values()) <= 8 * MIB
    assert scratch._pool
    layer = layer_of(rng, 128)
    layer(input_of(rng, 128, 28))
    gc.collect()
    scratch.trim()
    free = sum(owner.nbytes for owner in scratch._pool.values() if scratch._is_free(owner))
    assert free + layer._kernels.nbytes <= max(8 * MIB, layer._kernels.nbytes)


@pytest.mark.parametrize("times", [2, 4])
def test_a_layer_takes_less_of_what_others_may_need(monkeypatch, times):
    """The smallest of the plans that take so many times the weight, if it is nearly as fast as the fastest."""
    w = np.zeros((16, 16, 3, 3), np.float32)
    geometry = ConvGeometry.of_unchanging((1, 16, 24, 24), w.shape, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    fastest = make_plan(geometry, "forward", w.dtype, "fft")
    seconds = {10: 1.0, times: 1.09, 0: 1.2}

    def plan(geometry, direction, dtype, algorithm, weight_limit=2**32, **options):
        most = max(n for n in seconds if n * w.nbytes <= weight_limit)
        return dataclasses.replace(fastest, weight_bytes=most * w.nbytes, seconds=seconds[most])

    monkeypatch.setattr(kept_kernels, "make_plan", plan)
    config.set_memory_limit(40 * w.nbytes)
    assert kept_kernels.KeptKernels(w).plan(geometry, w.dtype, "auto").weight_bytes == times * w.nbytes
    config.set_memory_limit(90 * w.nbytes)  # there is room for many
    assert kept_kernels.KeptKernels(w).plan(geometry, w.dtype, "auto").weight_bytes == 10 * w.nbytes
