"""Training steps that share spectra: what they compute, what a layer keeps between their passes, and for how long."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import Case, cases, generators, has_few_taps, shared_steps, tilings
from hypothesis import given
from hypothesis import strategies as st

from nbfftconv import Conv2d, planner, scratch
from nbfftconv import layer as layer_module
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Request, registry
from nbfftconv.passes import backward as backward_pass
from nbfftconv.passes.context import Context
from nbfftconv.passes.forward import recorded_program
from nbfftconv.passes.recorder import Recorder
from nbfftconv.plan import DIRECTIONS
from nbfftconv.planner import make_plan, make_step_plan

HUGE = "huge"
KEPT = 2**28  # at first a layer's limit
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
CASE = Case((2, 3, 20, 18), (4, 3, 5, 5), padding=2)
# One of the planner's own steps that share spectra; without keeping those of the input, its passes share nothing.
PLANNED = Case((2, 8, 32, 32), (8, 8, 5, 5), padding=2)
TILINGS = [
    {"transform": "fftw", "tile": (10, 9)},
    {"transform": "codelet", "tile": (12, 12)},
    {"transform": "four_step", "tile": (30, 30)},
]


def operands_of(case, dtype, rng):
    """Input, kernels, bias and gradient whose results are large enough to measure a relative error by."""
    few = min(np.prod(size) for size in (case.input_size, case.weight_size, case.output_size)) < 16
    x, w = case.operands("forward", dtype, rng, positive=few)
    bias = rng.uniform(0.5, 1.5, case.weight_size[0]).astype(dtype)
    return x, w, bias, rng.uniform(0.5, 1.5, case.output_size).astype(dtype)


def layer_of(case, w, bias=None, **keywords):
    layer = Conv2d(w, bias, **case.options, padding_mode=case.padding_mode, **keywords)
    layer.algorithm = "fft"
    return layer


def gradients(layer, g):
    """Copies of the gradients of input, kernels and bias."""
    dx = layer.backward(g)
    return [array.copy() for array in (dx, layer.weight_grad, layer.bias_grad)]


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def assert_gradients(found, case, x, w, g, dtype):
    dx, dw, db = found
    assert_accurate(dx, case.expect("grad_input", w, g), dtype)
    assert_accurate(dw, case.expect("grad_weight", x, g), dtype)
    assert_accurate(db, g.sum((0, 2, 3), np.float64), dtype)


# Against the oracle ----------------------------------------------------------------------------------


@given(
    data=st.data(),
    case=cases(max_size=40, max_kernel=11, max_products=300_000),
    dtype=st.sampled_from((F32, F64)),
    block_tiles=st.integers(1, 40),
    spectra_limit=st.sampled_from((KEPT, 0)),
    relu=st.booleans(),
    rng=generators(),
)
def test_against_the_oracle(data, case, dtype, block_tiles, spectra_limit, relu, rng):
    if data.draw(st.integers(0, 19)) == 0:
        case = replace(case, input_size=(0, *case.input_size[1:]))
    x, w, bias, g = operands_of(case, dtype, rng)
    activation = "relu" if relu else None
    layer = layer_of(case, w, bias, activation=activation)
    layer.spectra_limit = spectra_limit
    forward = data.draw(st.sampled_from([None, "direct", "fft", *(["winograd"] if has_few_taps(case) else [])]))
    with shared_steps(block_tiles, forward, **data.draw(tilings(case))):
        y = layer(x)
        assert (layer._last.forward[4] is not None) == (forward is None and spectra_limit > 0)
        found = gradients(layer, g)
    assert_accurate(y, case.expect("forward", x, w, bias=bias, activation=activation), dtype)
    assert_gradients(found, case, x, w, np.where(y > 0, g, 0) if relu else g, dtype)


def test_gradients_share_after_a_forward_pass_by_another_algorithm_where_that_is_cheaper():
    geometry = ConvGeometry.from_arguments((2, 8, 32, 32), (8, 8, 5, 5), padding=2)
    requests = [Request(*planner._fields(geometry, way, F32, (), True, False, True)) for way in DIRECTIONS]
    direct = make_plan(geometry, "forward", F32, "direct")
    for seconds, is_apart in ((0.0, True), (1e3, False)):
        step = registry.get("fft").step(requests, replace(direct, seconds=seconds), KEPT, 1e6)
        assert (step.forward.algorithm == "direct", step.keeps_input_spectra) == (is_apart, not is_apart)
        assert step.shares_spectra and step.grad_weight.grid == step.grad_input.grid
        assert ("whose gradients share spectra" in step.grad_weight.reason) == is_apart
    assert registry.get("fft").step(requests, direct, KEPT, 0.0) is None


@pytest.mark.parametrize("spectra_limit", [KEPT, 0])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 5, 23, 21), (5, 1, 5, 7), padding=3, groups=5),  # depthwise
        Case((2, 4, 23, 21), (6, 2, 5, 4), stride=(2, 3), dilation=(3, 2), padding=((2, 1), (0, 5)), groups=2),
        Case((3, 2, 17, 19), (35, 2, 3, 3), padding=1, padding_mode="reflect"),
        Case((1, 1, 60, 50), (1, 1, 8, 8), padding="full"),
        Case((0, 3, 9, 9), (2, 3, 3, 3)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("choices", TILINGS, ids=lambda choices: choices["transform"])
def test_blocks_of_every_size(choices, case, spectra_limit, rng):
    x, w, bias, g = operands_of(case, F32, rng)
    layer = layer_of(case, w, bias)
    layer.spectra_limit = spectra_limit
    for block_tiles in (1, 5, 17, 1000):
        with shared_steps(block_tiles, **choices):
            assert_accurate(layer(x), case.expect("forward", x, w, bias=bias), F32)
            assert_gradients(gradients(layer, g), case, x, w, g, F32)


# Not finite ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # they are values like others
@given(
    data=st.data(),
    case=cases(max_size=30, max_kernel=9, max_products=200_000),
    dtype=st.sampled_from((F32, F64)),
    block_tiles=st.integers(1, 20),
    spectra_limit=st.sampled_from((KEPT, 0)),
    values=st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), min_size=1, unique=True) | st.just([HUGE]),
    counts=st.tuples(*[st.integers(0, 4)] * 3).filter(any),
    rng=generators(),
)
def test_values_that_are_not_finite(data, case, dtype, block_tiles, spectra_limit, values, counts, rng):
    """They reach what direct convolution has them reach; a huge one is taken like one of them."""
    arrays = *case.operands("forward", dtype, rng, positive=True), rng.uniform(0.5, 1.5, case.output_size).astype(dtype)
    # A product of two overflows in the oracle, too.
    values = [{F32: 1e30, F64: 1e300}[dtype] if value == HUGE else value for value in values]
    for array, count in zip(arrays, counts, strict=True):
        where = rng.choice(array.size, min(count, array.size), replace=False)
        array.reshape(-1)[where] = rng.choice(values, len(where))
    x, w, g = arrays
    layer = layer_of(case, w, np.zeros(case.weight_size[0], dtype))
    layer.spectra_limit = spectra_limit
    with shared_steps(block_tiles, **data.draw(tilings(case))):
        y = layer(x)
        dx, dw, db = gradients(layer, g)
    with np.errstate(invalid="ignore", over="ignore"):
        for actual, expected in (
            (y, case.expect("forward", x, w)),
            (dx, case.expect("grad_input", w, g)),
            (dw, case.expect("grad_weight", x, g)),
            (db, g.sum((0, 2, 3), np.float64)),
        ):
            assert_accurate_where_finite(actual, expected.astype(dtype).astype(np.float64), dtype)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_infinities_of_both_signs_in_one_sum(algorithm):
    """The gradient at the bias is NaN, without a warning, whoever computes it."""
    layer = layer_of(PLANNED, np.ones(PLANNED.weight_size), np.zeros(8))
    layer.algorithm = algorithm
    g = np.ones(PLANNED.output_size)
    g[0, 3, 4, 5], g[1, 3, 9, 9] = np.inf, -np.inf
    layer(np.ones(PLANNED.input_size))
    layer.backward(g)
    np.testing.assert_array_equal(np.isnan(layer.bias_grad), np.arange(8) == 3)


# What is kept ----------------------------------------------------------------------------------------


def kept_by(layer):
    return layer._last.forward[4]


def kept_bytes(layer):
    return kept_by(layer).spectra.array.nbytes


def test_no_more_is_kept_than_the_limit(rng):
    x, w, bias, g = operands_of(PLANNED, F32, rng)
    layer = layer_of(PLANNED, w, bias)
    layer(x)
    needed = kept_bytes(layer)
    expected = gradients(layer, g)
    for limit, is_kept in ((needed, {True}), (needed - 1, {True, False}), (0, {False})):  # others may be smaller
        layer.spectra_limit = limit
        layer(x)
        assert (kept_by(layer) is not None) in is_kept
        assert kept_by(layer) is None or kept_bytes(layer) <= limit
        assert_gradients(gradients(layer, g), PLANNED, x, w, g, F32)
    layer.spectra_limit = KEPT
    layer(x)
    assert_same_bits(gradients(layer, g), expected)


def test_kept_or_made_anew_gives_the_same_bits(rng):
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    for choices in TILINGS:
        with shared_steps(5, **choices):
            found = []
            for layer.spectra_limit in (KEPT, 0):
                found.append([layer(x), *gradients(layer, g)])
        assert_same_bits(*found)


def test_the_input_is_transformed_once_if_it_is_kept(rng, monkeypatch):
    calls = []
    inner = backward_pass.add_to_spectra
    monkeypatch.setattr(
        backward_pass,
        "add_to_spectra",
        lambda context, name, *rest: calls.append(name) or inner(context, name, *rest),
    )
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    with shared_steps(**TILINGS[1]):
        for layer.spectra_limit, expected in ((KEPT, 0), (0, 1)):
            layer(x)
            layer.backward(g)
            assert calls.count("input") == expected


def test_inference_keeps_the_spectra_of_the_kernels_only(rng):
    x, w, bias, _ = operands_of(PLANNED, F32, rng)
    layer = layer_of(PLANNED, w, bias)
    layer(x)
    spectra = weakref.ref(kept_by(layer).spectra)
    layer.training = False
    layer(x)
    assert layer._last.forward is None and spectra() is None
    assert len(layer._kernels.forms) >= 1


def test_a_forward_pass_lets_go_of_the_last_ones_spectra_first(rng, monkeypatch):
    x, w, bias, _ = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    alive = []
    inner = layer_module.run_forward

    def run_forward(*arguments, **keywords):
        alive.append(spectra() is not None)
        return inner(*arguments, **keywords)

    with shared_steps(**TILINGS[0]):
        layer(x)
        spectra = weakref.ref(kept_by(layer).spectra)
        assert spectra() is not None
        monkeypatch.setattr(layer_module, "run_forward", run_forward)
        layer(x)
    assert alive == [False]


def test_a_refused_forward_pass_changes_nothing(rng):
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    with shared_steps(**TILINGS[0]):
        layer(x)
        with pytest.raises(ValueError, match="channels"):
            layer(x[:, :2])
        assert_gradients(gradients(layer, g), CASE, x, w, g, F32)


@pytest.mark.parametrize("spectra_limit", [KEPT, 0])
def test_backward_again(spectra_limit, rng):
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    layer.spectra_limit = spectra_limit
    for choices in TILINGS:
        with shared_steps(3, **choices):
            layer(x)
            first = gradients(layer, g)
            layer.backward(-3 * g)  # leaves nothing behind
            assert_same_bits(gradients(layer, g), first)


def test_kernels_assigned_before_backward(rng):
    """The gradient at the input is the old kernels', whole; the next step is the new ones'."""
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    with shared_steps(**TILINGS[1]):
        layer(x)
        layer.weight = other = w[::-1] * 2
        assert_gradients(gradients(layer, g), CASE, x, w, g, F32)
        layer(x)
        assert_gradients(gradients(layer, g), CASE, x, other, g, F32)


@pytest.mark.parametrize(("forward", "backward"), [(F32, F64), (F64, F32)])
def test_a_gradient_of_another_dtype(forward, backward, rng):
    """Results are of the larger one; spectra of the other cannot be used."""
    x, w, bias, _ = operands_of(CASE, forward, rng)
    g = rng.uniform(0.5, 1.5, CASE.output_size).astype(backward)
    layer = layer_of(CASE, w, bias)
    with shared_steps(**TILINGS[1]):
        layer(x)
        for _ in range(2):
            assert_gradients(gradients(layer, g), CASE, x, w, g, F64)
        g = g.astype(forward)
        assert_gradients(gradients(layer, g), CASE, x, w, g, forward)


@pytest.mark.parametrize("other", TILINGS, ids=lambda choices: choices["transform"])
def test_a_plan_that_changes_before_backward(other, rng):
    """With the scratch limit, say, or a profile: kept spectra are those of other tiles."""
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    with shared_steps(transform="codelet", tile=(20, 20)):
        layer(x)
    with shared_steps(2, **other):
        assert_gradients(gradients(layer, g), CASE, x, w, g, F32)


@pytest.mark.parametrize("name", ["algorithm", "spectra_limit"])
def test_a_setting_that_changes_before_backward(name, rng):
    x, w, bias, g = operands_of(PLANNED, F32, rng)
    layer = layer_of(PLANNED, w, bias)
    for value in {"algorithm": ("direct", "fft", "auto"), "spectra_limit": (0, KEPT, 1)}[name]:
        layer(x)
        setattr(layer, name, value)
        assert_gradients(gradients(layer, g), PLANNED, x, w, g, F32)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_the_limit_and_no_spectra(duplicate, rng):
    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    layer.spectra_limit = 12345
    with shared_steps(**TILINGS[0]):
        y = layer(x)
        expected = gradients(layer, g)
        other = duplicate(layer)
        assert other.spectra_limit == 12345
        with pytest.raises(RuntimeError, match="forward"):
            other.backward(g)
        other.spectra_limit = 0
        assert layer.spectra_limit == 12345
        assert_same_bits([other(x), *gradients(other, g)], [y, *expected])


def test_each_thread_has_its_own_spectra(rng):
    """All are between forward and backward at once."""
    together = threading.Barrier(4)
    _, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    inputs = [rng.standard_normal(CASE.input_size).astype(F32) for _ in range(4)]

    def work(x):
        layer(x)
        together.wait(60)
        kept = kept_by(layer)
        dx = layer.backward(g)
        together.wait(60)
        return kept, dx

    with shared_steps(4, **TILINGS[1]), ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(work, inputs))
            for i, (kept, dx) in enumerate(found):
                assert not any(np.shares_memory(kept.spectra.array, k.spectra.array) for k, _ in found[:i])
                assert_accurate(dx, CASE.expect("grad_input", w, g), F32)


def test_gradients_of_threads_are_of_their_own_inputs(rng):
    """`weight_grad` is the layer's: each thread reads its own before the next one's backward."""
    turn = threading.Lock()
    _, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    inputs = [rng.standard_normal(CASE.input_size).astype(F32) for _ in range(6)]
    together = threading.Barrier(3)

    def work(x):
        layer(x)
        together.wait(60)
        with turn:
            return gradients(layer, g)

    with shared_steps(4, **TILINGS[1]), ThreadPoolExecutor(3) as pool:
        for x, found in zip(inputs, pool.map(work, inputs), strict=True):
            assert_gradients(found, CASE, x, w, g, F32)


# The limit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False, np.True_, 1.0, 2.5e8, "100", None, (1,), np.float32(3)])
def test_the_limit_is_an_integer(value, rng):
    layer = layer_of(CASE, rng.standard_normal(CASE.weight_size))
    with pytest.raises(TypeError, match="spectra_limit"):
        layer.spectra_limit = value
    assert layer.spectra_limit == KEPT


@pytest.mark.parametrize("value", [-1, -(2**40), np.int64(-3)])
def test_the_limit_is_not_negative(value, rng):
    layer = layer_of(CASE, rng.standard_normal(CASE.weight_size))
    with pytest.raises(ValueError, match=str(value)):
        layer.spectra_limit = value
    assert layer.spectra_limit == KEPT


@pytest.mark.parametrize("value", [0, 1, 2**60, np.int32(7), np.uint8(200)])
def test_limits(value, rng):
    layer = layer_of(CASE, rng.standard_normal(CASE.weight_size))
    layer.spectra_limit = value
    assert layer.spectra_limit == value and type(layer.spectra_limit) is int


# Memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "scratch_limit", "spectra_limit"),
    [
        (PLANNED, 2**28, KEPT),
        (Case((2, 4, 60, 60), (6, 4, 9, 9)), 2**28, KEPT),
        (Case((2, 4, 60, 60), (6, 4, 9, 9)), 2**28, 0),
        (Case((2, 16, 60, 60), (24, 16, 9, 9)), 1_000_000, KEPT),  # several blocks
        (Case((4, 16, 64, 64), (16, 16, 7, 7)), 2_000_000, KEPT),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("restore_scratch_limit")
def test_plans_tell_the_memory_of_a_step(case, spectra_limit, scratch_limit, monkeypatch, rng):
    """Spectra of blocks and of kernels; what is kept of the input comes on top, within its own limit."""
    scratch.set_scratch_limit(scratch_limit)
    x, w, bias, g = operands_of(case, F32, rng)
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    step = make_step_plan(geometry, F32, "fft", spectra_limit)
    assert step.shares_spectra and step.keeps_input_spectra == (spectra_limit > 0)
    assert step.grad_weight.scratch_bytes <= scratch_limit
    borrowed = []
    recorded_program.cache_clear()
    inner = Context._spectra

    def make_room(context, lane_blocks, channels, is_kept):
        spectra = inner(context, lane_blocks, channels, is_kept)
        if not is_kept:
            assert isinstance(context, Recorder) or spectra.array.nbytes >= lane_blocks * spectra.lane_block
            caller = sys._getframe(1).f_code.co_name
            borrowed.append((caller, lane_blocks * spectra.lane_block))
        return spectra

    monkeypatch.setattr(Context, "_spectra", make_room)
    layer = layer_of(case, w, bias)
    layer.spectra_limit = spectra_limit
    layer(x)
    kept = step.keeps_input_spectra
    assert (kept_by(layer) is not None) == kept
    expected = 0 if step.forward.fused else step.forward.scratch_bytes
    total = sum(nbytes for _, nbytes in borrowed)
    expected_names = {"output_spectra"} if kept else {"input_spectra", "output_spectra"}
    assert {name for name, _ in borrowed} == (set() if step.forward.fused else expected_names)
    assert total < expected if kept else total == expected
    if kept:
        assert kept_bytes(layer) <= spectra_limit
    borrowed.clear()
    layer.backward(g)
    assert sum(n for name, n in borrowed if name != "weight_spectra") == step.grad_weight.scratch_bytes
    assert sum(n for name, n in borrowed if name == "weight_spectra") == step.grad_weight.weight_bytes
    assert len(borrowed) == 3


def test_kept_spectra_come_back_to_the_memory_that_is_used_again(rng):
    case = Case((4, 8, 60, 60), (8, 8, 5, 5), padding=2)
    x, w, bias, _ = operands_of(case, F32, rng)
    layer = layer_of(case, w, bias)
    with shared_steps(**TILINGS[1]):
        layer(x)
        place = kept_by(layer).spectra.array.ctypes.data
        assert kept_bytes(layer) > 2**20
        layer(x)
        assert kept_by(layer).spectra.array.ctypes.data == place


@pytest.mark.parametrize("spectra_limit", [KEPT, 0])
@pytest.mark.parametrize("choices", TILINGS, ids=lambda choices: choices["transform"])
def test_what_was_in_the_memory_does_not_matter(choices, spectra_limit, monkeypatch, rng):
    def full_of_nan(nbytes, spare=0.0, aligned=scratch.aligned):
        memory = aligned(nbytes)
        memory.array[...] = 255
        return memory

    x, w, bias, g = operands_of(CASE, F32, rng)
    layer = layer_of(CASE, w, bias)
    layer.spectra_limit = spectra_limit
    with shared_steps(3, **choices):
        expected = [layer(x), *gradients(layer, g)]
        monkeypatch.setattr(scratch, "aligned", full_of_nan)
        monkeypatch.setattr(scratch, "borrow", full_of_nan)
        monkeypatch.setattr(scratch, "_SMALL_RESULT", 1)
        layer.weight = w
        assert_same_bits([layer(x), *gradients(layer, g)], expected)
