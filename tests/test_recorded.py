"""Results on recorded geometries have the bits that they had: of all passes, in both dtypes, with the same plans.

They were recorded by record_results.py, on the commit that recorded_results.json names, with vectors of 16, 32 and 64
bytes. Bits depend on the width of vectors and on libm; on FFTW and its choice of code, where that transforms; and on
LLVM, where it orders the sums of direct convolution. Elsewhere the comparison is skipped, but not that of runs and
numbers of threads with each other.

No result differs from the recorded one. A change of an algorithm that is meant to change bits records them anew. That
was done when sums of direct convolution began with the bias, and its blocks with a channel: only its results, and steps
in which the planner now takes it, had other bits; and when its gradients at the input with strides that do not divide
the kernel became convolutions of each phase: only these had.
"""

from __future__ import annotations

import functools
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import pytest
import record_results
from geometries import ROW_TILES
from processes import run_scenario
from record_results import COUNT, PASSES, QUICK, kind

from nbfftconv.transforms import registry

WORKER = Path(record_results.__file__)
CONTENT = json.loads(record_results.FILE.read_text())
GEOMETRIES = CONTENT["geometries"]
KINDS = ("fftw", "codelet", "four_step", "direct")
LABELS = [f"{way}, {dtype}" for dtype, way in PASSES]
STEP_LABELS = [
    f"{result}, {dtype}"
    for dtype in ("float32", "float64")
    for result in ("forward", "grad_input", "grad_weight", "grad_bias", "inference")
]
CPUS = {"haswell": 32, "generic": 16}  # as NUMBA_CPU_NAME, and the bytes of their vectors

parts = pytest.mark.parametrize(
    "part", [(0, QUICK), pytest.param((QUICK, COUNT), marks=pytest.mark.slow)], ids=["quick", "rest"]
)


@functools.cache
def found(part: tuple[int, int], cpu: str | None = None) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """The environment and the results, by their geometries' numbers, of a process of its own."""
    cpu_name = {} if cpu is None else {"NUMBA_CPU_NAME": cpu}
    content = run_scenario("results", *part, worker=WORKER, **cpu_name)
    return content["environment"], dict(enumerate(content["results"], part[0]))


def recorded(environment: dict[str, Any], *aspects: str) -> dict[str, Any]:
    """What was recorded in such an environment; else the test is skipped."""
    others = [each["environment"] for each in CONTENT["recorded"]]
    for aspect in aspects:
        others = [other for other in others if other[aspect] == environment[aspect]]
        if not others:
            pytest.skip(f"no results were recorded where bits of {aspect} depend on {environment[aspect]}")
    each = next(each for each in CONTENT["recorded"] if each["environment"] in others)
    return dict(enumerate(each["results"]))


def of_kind(name: str, results: dict[int, Any]) -> Iterator[tuple[int, Any]]:
    """The numbers and results of the geometries that a transform, or direct convolution, is to compute."""
    some = [(number, each) for number, each in results.items() if kind(GEOMETRIES[number]) == name]
    assert some
    yield from some


def differing(number: int, labels: list[str], one: list[str], other: list[str]) -> list[str]:
    """Say which results differ, and of what."""
    return [
        f"{number}, {label}: {a} is not {b}, of {GEOMETRIES[number]}"
        for label, a, b in zip(labels, one, other, strict=True)
        if a != b
    ]


def assert_as_recorded(name: str, results: dict[int, Any], environment: dict[str, Any]) -> None:
    expected = recorded(environment, "all", *({"fftw", "direct"} & {name}))
    differences = []
    for number, each in of_kind(name, results):
        for bits in each["bits"]:
            differences += differing(number, LABELS, bits, expected[number][1])
    assert differences == []


def assert_steps_as_recorded(results: dict[int, Any], environment: dict[str, Any]) -> None:
    expected = recorded(environment, "all", "fftw", "direct")  # the layer chooses
    numbers = [number for number in results if "step" in GEOMETRIES[number]]
    assert numbers
    differences = []
    for number in numbers:
        for bits in results[number]["steps"]:
            differences += differing(number, STEP_LABELS, bits, expected[number][2])
    assert differences == []


@parts
@pytest.mark.parametrize("name", KINDS)
def test_the_plans_are_the_recorded_ones(name, part):
    environment, results = found(part)
    expected = recorded(environment, "all")
    differences = []
    for number, each in of_kind(name, results):
        differences += differing(number, LABELS, each["plans"], expected[number][0])
    assert differences == []


@parts
@pytest.mark.parametrize("name", KINDS)
def test_results_have_the_recorded_bits(name, part):
    environment, results = found(part)
    assert_as_recorded(name, results, environment)


@parts
def test_training_steps_have_the_recorded_bits(part):
    environment, results = found(part)
    assert_steps_as_recorded(results, environment)


@parts
@pytest.mark.parametrize("name", KINDS)
def test_bits_do_not_depend_on_threads(name, part):
    _, results = found(part)
    differences = []
    for number, each in of_kind(name, results):
        first, *others = each["bits"]
        assert len(others) == len(record_results.THREADS) - 1 >= 1
        for other in others:
            differences += differing(number, LABELS, other, first)
        for other in each["steps"][1:]:
            differences += differing(number, STEP_LABELS, other, each["steps"][0])
    assert differences == []


@pytest.mark.slow
def test_two_processes_agree():
    """The second finds the code that the first has compiled, and other geometries come first."""
    _, one = found((0, QUICK))
    _, other = found.__wrapped__((QUICK // 2, QUICK))
    assert {number: one[number] for number in other} == other


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded on x86-64")
@pytest.mark.parametrize("cpu", CPUS)
def test_narrower_vectors(cpu):
    if cpu == "haswell" and not llvmlite.binding.get_host_cpu_features().get("avx2"):
        pytest.skip("a CPU without AVX2")
    environment, results = found((0, QUICK), cpu)
    assert environment["all"]["vector_bytes"] == CPUS[cpu]
    for name in KINDS:
        assert_as_recorded(name, results, environment)
    assert_steps_as_recorded(results, environment)


#: Recorded before there were others, of rows.
OF_FFTS = tuple(each.name for each in registry.candidates() if each.algorithm == "fft" and each.name not in ROW_TILES)


def test_what_is_recorded():
    """Every transform and every kind of plan, in each environment; different geometries, and of each kind some."""
    assert len({json.dumps(geometry | {"seed": 0}) for geometry in GEOMETRIES}) == len(GEOMETRIES) == COUNT
    assert {kind(geometry) for geometry in GEOMETRIES} == {*OF_FFTS, "direct"} == set(KINDS)
    assert {each["environment"]["all"]["vector_bytes"] for each in CONTENT["recorded"]} == {16, 32, 64}
    for each in CONTENT["recorded"]:
        assert len(each["results"]) == COUNT
        plans = {plan for of_passes, *_ in each["results"] for plan in of_passes}
        for name in OF_FFTS:
            some = [plan for plan in plans if name in plan.split()]
            assert any("fused" in plan.split() for plan in some), name
            assert any("fused" not in plan.split() for plan in some), name
            assert any("transposed" in plan.split() for plan in some), name
        assert {"direct", "transposed direct"} <= plans
    kernels = {tuple(geometry["weight_size"][2:]) for geometry in GEOMETRIES}
    assert {side for kernel in kernels for side in kernel} == set(range(1, 14))
    assert sum(height != width for height, width in kernels) > COUNT / 10
    counts = {
        "strided": sum(math.prod(geometry["options"]["stride"]) > 1 for geometry in GEOMETRIES),
        "dilated": sum(math.prod(geometry["options"]["dilation"]) > 1 for geometry in GEOMETRIES),
        "grouped": sum(geometry["options"]["groups"] > 1 for geometry in GEOMETRIES),
        "depthwise": sum(geometry["input_size"][1] == geometry["options"]["groups"] > 1 for geometry in GEOMETRIES),
        "of one row": sum(1 in geometry["input_size"][2:] for geometry in GEOMETRIES),
        "of many channels": sum(geometry["input_size"][1] > 32 for geometry in GEOMETRIES),
        "in bounded scratch memory": sum("scratch_limit" in geometry for geometry in GEOMETRIES),
        "in other blocks": sum("blocks" in geometry for geometry in GEOMETRIES),
        "with zeros": sum("zeros" in geometry for geometry in GEOMETRIES),
        "steps": sum("step" in geometry for geometry in GEOMETRIES),
    }
    assert min(counts.values()) >= 20, counts
