"""An implementation is one file: what the toy, registered here, needs is nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from compare import assert_accurate
from geometries import Case
from toy_implementation import TOY, Toy, ToyPlan

import nbfftconv
from nbfftconv import profile
from nbfftconv.implementations import registry
from nbfftconv.plan import DIRECTIONS

CASES = [
    Case((2, 2, 9, 11), (3, 2, 3, 4), padding=1),
    Case((1, 4, 13, 13), (4, 2, 2, 3), stride=(1, 2), dilation=(2, 3), padding=((1, 2), (0, 3)), groups=2),
    Case((2, 2, 9, 11), (3, 2, 3, 4), padding=2, padding_mode="reflect"),
]


@pytest.fixture
def registered():
    """Register implementations for a test."""
    before = registry.algorithms()
    yield registry.register
    for name in registry.algorithms():
        if name not in before:
            registry.remove(name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_toy_passes_all_three_passes(registered, case, direction, dtype, rng):
    registered(TOY)
    plan = case.plan(direction, dtype, algorithm="toy")
    assert isinstance(plan, ToyPlan) and plan.reason == "it was asked for"
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)
    assert_accurate(case.run(direction, a, b, algorithm="toy"), expected, dtype)


@pytest.mark.parametrize("algorithm", ["auto", "toy"])
def test_a_layer_trains_with_a_toy(registered, algorithm, rng):
    registered(Toy(rate=1e-15))
    case = CASES[0]
    x, w = case.operands("forward", np.float32, rng)
    layer = nbfftconv.Conv2d(w, padding=1, algorithm=algorithm)
    y = layer(x)
    g = rng.standard_normal(y.shape).astype(np.float32)
    dx = layer.backward(g)
    assert_accurate(y, case.expect("forward", x, w), np.float32)
    assert_accurate(layer.weight_grad, case.expect("grad_weight", x, g), np.float32)
    assert_accurate(dx, case.expect("grad_input", w, g), np.float32)
    assert {form.algorithm for form in layer._kernels.forms} == {"toy"}
    layer.training = False
    assert_accurate(layer(x[:, :, 2:]), case.expect("forward", x[:, :, 2:], w), np.float32)


def test_the_planner_compares_all(registered):
    before = [CASES[0].plan(direction, np.float32) for direction in DIRECTIONS]
    registered(Toy(rate=1e-15))
    for direction in DIRECTIONS:
        plan = CASES[0].plan(direction, np.float32)
        assert plan.algorithm == "toy"
        assert [plan.reason.count(phrase) for phrase in ("ms by FFT", "ms direct", "ms by a toy")] == [1, 1, 1]
        assert CASES[0].plan(direction, np.float32, transform="fftw").algorithm == "fft"  # which has transforms
    point = Case((1, 3, 9, 9), (2, 3, 1, 1)).plan("forward", np.float32)
    assert point.algorithm == "toy" and "ms direct, " in point.reason and "FFT" not in point.reason
    registry.remove("toy")
    registered(Toy(rate=1.0))
    assert [CASES[0].plan(direction, np.float32).summary for direction in DIRECTIONS] == [
        plan.summary for plan in before
    ]


def test_measuring_a_toy(registered, tmp_path, monkeypatch, rng):
    """It takes part in the race; a winner of an implementation that is gone is reported and ignored."""
    monkeypatch.setenv("NBFFTCONV_PROFILE", str(tmp_path / "profile.json"))
    case = Case((1, 2, 12, 12), (2, 2, 5, 5))
    registered(Toy(rate=1e-8))
    case.plan("forward", np.float32, measure=True)
    document = json.loads((tmp_path / "profile.json").read_text())
    for winner in document["winners"]:
        winner.pop("transform", None), winner.pop("tile", None)
        winner["algorithm"] = "toy"
    for name in ("known.json", "gone.json"):
        (tmp_path / name).write_text(json.dumps(document))
    monkeypatch.setenv("NBFFTCONV_PROFILE", str(tmp_path / "known.json"))
    plan = case.plan("forward", np.float32)
    assert plan.algorithm == "toy" and "it was measured" in plan.reason
    x, w, expected = case.operands_and_expected("forward", np.float32, rng)
    assert_accurate(case.run("forward", x, w), expected, np.float32)

    registry.remove("toy")
    monkeypatch.setenv("NBFFTCONV_PROFILE", str(tmp_path / "gone.json"))
    with pytest.warns(UserWarning, match=r"ignored in .*gone\.json.*'toy'"):
        assert not profile.get_profile().winners
    assert "measured" not in case.plan("forward", np.float32).reason


def test_options_that_an_implementation_has_not(registered):
    registered(TOY)
    for algorithm in ("toy", "direct"):
        with pytest.raises(ValueError, match=f"{algorithm} convolution has no tiles, got tile=8"):
            CASES[0].plan("forward", np.float32, algorithm=algorithm, tile=8)
        with pytest.raises(ValueError, match=f"{algorithm} convolution has no transforms, got transform='fftw'"):
            CASES[0].plan("forward", np.float32, algorithm=algorithm, transform="fftw")


def test_names_are_checked(registered, rng):
    assert registry.algorithms() == ("auto", "fft", "winograd", "direct")
    for name in registry.algorithms():
        other = Toy()
        other.name = name
        with pytest.raises(ValueError, match=f"{name}.*taken"):
            registry.register(other)
    for ask in (registry.get, registry.candidates, registry.remove):
        with pytest.raises(ValueError, match="fft, winograd, direct.*'toy'"):
            ask("toy")
    x, w = CASES[0].operands("forward", np.float32, rng)
    with pytest.raises(ValueError, match="algorithm must be one of auto, fft, winograd, direct, got 'toy'"):
        nbfftconv.conv2d(x, w, algorithm="toy")


def test_a_plan_of_an_implementation_that_was_removed_is_refused(rng):
    registry.register(TOY)
    try:
        plan = CASES[0].plan("forward", np.float32, algorithm="toy")
    finally:
        registry.remove("toy")
    with pytest.raises(ValueError, match="'toy'"):
        CASES[0].run("forward", *CASES[0].operands("forward", np.float32, rng), plan)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("direction", ["forward", "grad_input"])
def test_kernels_tell_what_they_hold(algorithm, direction, rng):
    """Each array once; a gradient that is run as a forward pass holds kernels of its own."""
    case = Case((2, 64, 20, 20), (64, 64, 3, 3), padding=1)
    plan = case.plan(direction, np.float32, transposed=True, algorithm=algorithm)
    weight = rng.standard_normal(case.weight_size).astype(np.float32)
    arrays = registry.get(algorithm).prepare(plan, weight).arrays()
    assert len({id(array) for array in arrays}) == len(arrays) == 2 + plan.is_transposed
    assert arrays[0] is weight
    assert arrays[-1].nbytes == plan.weight_bytes
