"""A transform is one file: what the toy, registered here, needs is nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from compare import assert_accurate
from geometries import Case
from toy_transform import TOY

import nbfftconv
from nbfftconv.plan import DIRECTIONS
from nbfftconv.transforms import Operations, registry

# The cheapest, with vectors of any size: a call has a fixed cost, of which a row takes more away.
FREE = dataclasses.replace(TOY, operations=lambda *sizes: Operations(0 * sizes[0], 0.0, 0.0), row=-1e-6)

CASES = [
    Case((2, 2, 9, 11), (3, 2, 3, 4), padding=1),
    Case((1, 4, 7, 13), (4, 2, 2, 3), stride=(1, 2), dilation=(2, 1), groups=2),
]


@pytest.fixture
def registered():
    """Register transforms for a test."""
    names = []

    def register(transform):
        registry.register(transform)
        names.append(transform.name)

    yield register
    for name in names:
        registry.remove(name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_toy_passes_all_three_passes(registered, case, direction, dtype, rng):
    registered(TOY)
    plan = case.plan(direction, dtype, algorithm="fft", transform="toy", tile=(8, 5))
    assert (plan.transform, plan.tile) == ("toy", (8, 5))
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


def test_a_layer_trains_with_a_toy(registered, rng):
    registered(FREE)
    case = CASES[0]
    x, w = case.operands("forward", np.float32, rng)
    layer = nbfftconv.Conv2d(w, padding=1, algorithm="fft")
    y = layer(x)
    g = rng.standard_normal(y.shape).astype(np.float32)
    dx = layer.backward(g)
    assert_accurate(y, case.expect("forward", x, w), np.float32)
    assert_accurate(layer.weight_grad, case.expect("grad_weight", x, g), np.float32)
    assert_accurate(dx, case.expect("grad_input", w, g), np.float32)
    assert case.plan("forward", np.float32, algorithm="fft").transform == "toy"


def test_the_planner_asks_whether_a_transform_is_available(registered):
    case = CASES[0]
    before = case.plan("forward", np.float32, algorithm="fft")
    registered(dataclasses.replace(FREE, is_available=False))
    assert case.plan("forward", np.float32, algorithm="fft") == before
    with pytest.raises(ValueError, match="toy transform is not available"):
        case.plan("forward", np.float32, transform="toy")
    registered(dataclasses.replace(FREE, name="other"))
    assert case.plan("forward", np.float32, algorithm="fft").transform == "other"


def test_names_are_checked(registered):
    assert registry.names() == ("fftw", "codelet", "row_codelet", "four_step", "row_four_step", "winograd")
    for name in ("auto", *registry.names()):
        with pytest.raises(ValueError, match=f"{name}.*taken"):
            registry.register(dataclasses.replace(TOY, name=name))
    for ask in (registry.get, registry.candidates, registry.remove):
        with pytest.raises(ValueError, match="fftw, codelet, row_codelet, four_step.*'toy'"):
            ask("toy")
    with pytest.raises(ValueError, match="'toy'"):
        CASES[0].plan("forward", np.float32, transform="toy")


def test_a_plan_of_a_transform_that_was_removed_is_refused(rng):
    case = CASES[0]
    registry.register(TOY)
    try:
        plan = case.plan("forward", np.float32, transform="toy")
    finally:
        registry.remove("toy")
    with pytest.raises(ValueError, match="'toy'"):
        case.run("forward", *case.operands("forward", np.float32, rng), plan)
