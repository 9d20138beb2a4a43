"""Rates of the cost model: their file, and that perf/fit_costs.py finds rates from times."""

from __future__ import annotations

import json
import math
import runpy
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from geometries import ROW_TILES

from nbfftconv import fitted_rates, jit, rates, threads
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import direct
from nbfftconv.implementations import registry as implementations
from nbfftconv.machine import DEFAULT, Machine
from nbfftconv.plan import DIRECTIONS
from nbfftconv.planner import make_plan
from nbfftconv.tiling import problem_sizes
from nbfftconv.transforms import registry as transforms
from nbfftconv.transforms.codelets import SIDES

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
import fit_costs
import layers

FLOAT32 = np.dtype(np.float32)
GEOMETRIES = [
    ConvGeometry.from_arguments(input_size, weight_size, padding=padding, groups=groups)
    for input_size, weight_size, padding, groups in (
        ((16, 64, 27, 27), (96, 64, 5, 5), 2, 1),
        ((1, 128, 14, 14), (128, 128, 3, 3), 1, 1),
        ((4, 3, 90, 70), (48, 3, 7, 7), 0, 1),
        ((8, 96, 56, 56), (96, 1, 7, 7), 3, 96),
        ((1, 64, 300, 33), (64, 32, 3, 5), 1, 2),
        ((2, 8, 40, 200), (8, 8, 1, 3), 0, 1),
        ((2, 16, 30, 150), (16, 1, 5, 5), 2, 16),
    )
]
GEOMETRIES += [
    ConvGeometry.from_arguments((2, 16, 40, 40), (32, 16, 3, 3), padding=2, dilation=2),
    ConvGeometry.from_arguments((2, 8, 3, 2500), (24, 8, 1, 7), padding=(0, 9), dilation=(1, 3)),
    ConvGeometry.from_arguments((4, 32, 1, 9000), (40, 32, 1, 8)),
    ConvGeometry.from_arguments((3, 2, 5, 700), (20, 2, 1, 5)),
]
TILES = {
    "codelet": [(side, side) for side in SIDES],
    "winograd": [(4, 4), (4, 6), (6, 6)],
    "four_step": [(30, 36), (64, 64), (240, 60), (60, 240)],
    "fftw": [(16, 24), (64, 48), (128, 128)],
    "row_codelet": [(1, length) for length in (64, 96, 128, 160, 240, 288, 384, 512, 1024)],
    "row_four_step": [(1, length) for length in (1920, 2304, 2560, 3840, 4096, 5120, 9216, 15360, 16384)],
}


def measured_as(plan, seconds, stages=None):
    """A plan with times."""
    tile, fused = (plan.tile, plan.fused) if plan.algorithm != "direct" else (None, False)
    kind = "test", plan.geometry, plan.direction, plan.dtype, fit_costs.name_of(plan), tile, fused, plan.is_transposed
    return fit_costs.Measured(*kind, seconds, stages)


def timed_by_the_model(measured, machine):
    """The same plan, with the times that the model expects at the rates of the moment."""
    times = fit_costs.passes(measured, machine)
    stages = tuple(times.sum(axis=0)[:2]) if measured.has_stages else None
    return replace(measured, seconds=tuple(times.sum(axis=1)), stages=stages)


@pytest.fixture(scope="module")
def plans():
    """Plans of which each rate is a part of some."""
    found = []
    for number, geometry in enumerate(GEOMETRIES):
        for direction in DIRECTIONS:
            once = (1.0,) if direction == "grad_weight" else (1.0, 1.0)
            for name, tiles in TILES.items():
                algorithm = transforms.get(name).algorithm
                if name in ROW_TILES and problem_sizes(geometry)[0][1] > 1:
                    continue
                if algorithm == "winograd" and {taps for _, taps in problem_sizes(geometry)} != {3}:
                    continue
                for tile in tiles[number % 3 :: 3]:
                    choices = ("transform", name), ("tile", tile)
                    found.append(measured_as(make_plan(geometry, direction, FLOAT32, algorithm, choices), once))
            found.append(measured_as(make_plan(geometry, direction, FLOAT32, "direct"), once))
    return found


@pytest.fixture(scope="module")
def changed():
    """Rates of which none is as it was."""
    rng = np.random.default_rng(7)
    return {parameter: parameter.times(rng.uniform(0.6, 1.7)) for parameter in fit_costs.parameters()}


@pytest.fixture(scope="module")
def design(plans, changed):
    """What is fitted, of times by the changed rates."""
    with ExitStack() as stack:
        for parameter, rate in changed.items():
            stack.enter_context(mock.patch.dict(rates.of(parameter.owner), {parameter.name: rate}))
        timed = [timed_by_the_model(plan, DEFAULT) for plan in plans]
    return fit_costs.design(timed, DEFAULT)


def test_the_fit_finds_the_rates_that_the_times_were_made_with(design, changed):
    document = fit_costs.fitted_rates(design, fit_costs.fit(design, prior=1e-7))
    for parameter, rate in changed.items():
        assert document[parameter.owner][parameter.unit][parameter.name] == pytest.approx(rate, rel=0.01), parameter
    factors = fit_costs.factors_of(design, document)
    assert fit_costs.errors(design, factors).max() < 0.01
    assert np.median(fit_costs.errors(design, np.ones_like(factors))) > 0.05
    right, count = fit_costs.good_choices(design, factors)
    assert right == count > len(GEOMETRIES) * len(DIRECTIONS)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_model_is_that_of_the_planner(direction, is_kept):
    for geometry in GEOMETRIES:
        for choices in (
            (),
            (("transform", "fftw"), ("tile", (16, 24))),
            (("transform", "codelet"), ("tile", (16, 13))),
        ):
            algorithm = "fft" if choices else "direct"
            plan = make_plan(geometry, direction, FLOAT32, algorithm, choices, weight_is_transformed=is_kept)
            seconds = fit_costs.model(measured_as(plan, (1.0, 1.0)), is_kept, DEFAULT).sum()
            assert seconds == pytest.approx(plan.seconds, rel=1e-12)


def test_every_rate_is_asked_for(design):
    """And all that are asked for are there: the model would not have run."""
    unused = [p for p, term in zip(design.parameters, design.terms.T, strict=True) if not term.any()]
    assert not unused
    of_rows = {"row_codelet", "row_four_step"}
    assert {p.owner for p in design.parameters} == {
        "fft",
        "direct",
        "fftw",
        "codelet",
        "four_step",
        "winograd",
    } | of_rows
    assert set(rates.RATES) == {*implementations.algorithms(), *transforms.names()} - {"auto"}


def test_what_the_data_do_not_say_stays(plans):
    timed = [timed_by_the_model(plan, DEFAULT) for plan in plans if plan.name == "direct"]
    slower = [replace(plan, seconds=tuple(2 * seconds for seconds in plan.seconds)) for plan in timed]
    data = fit_costs.design(slower, DEFAULT)
    document = fit_costs.fitted_rates(data, fit_costs.fit(data))
    assert {owner for owner in document if document[owner] != rates.RATES[owner]} == {"direct"}
    assert document["direct"]["flops"]["gradient"] < 0.7 * rates.of("direct")["gradient"]


def test_good_choices():
    geometry = GEOMETRIES[0]
    options = [make_plan(geometry, "grad_weight", FLOAT32, "fft", (("tile", (side, side)),)) for side in (16, 18, 20)]
    rows = [measured_as(plan, (1.0,)) for plan in options]
    terms, seconds = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]), np.array([1.2, 1.0, 1.1])
    parameters = fit_costs.parameters()[:2]
    data = fit_costs.Design(parameters, rows, np.zeros(3), terms, seconds, seconds)
    assert fit_costs.good_choices(data, np.array([2.0, 1.0])) == (0, 1)  # the first, 1.2 times the fastest
    assert fit_costs.good_choices(data, np.array([1.0, 2.0])) == (1, 1)  # the second
    assert fit_costs.errors(data, np.array([1.0, 0.0])) == pytest.approx([1 / 6, 1.0, 19 / 11])


def test_a_term_without_a_rate_is_an_error(plans, monkeypatch):
    cost = direct.cost
    monkeypatch.setattr(direct, "cost", lambda *arguments: 1e-3 + cost(*arguments))
    with pytest.raises(RuntimeError, match="not the sum"):
        fit_costs.design([next(plan for plan in plans if plan.name == "direct")], DEFAULT)


def test_plans_of_a_layer():
    geometry = GEOMETRIES[0]
    for direction in DIRECTIONS:
        plans = fit_costs.plans_of(geometry, direction, FLOAT32, tiles=2)
        by_name = {name: [plan for plan in plans if fit_costs.name_of(plan) == name] for name in (*TILES, "direct")}
        assert [len(by_name[name]) for name in ("codelet", "direct")] == [2, 1]
        assert all(len(of_name) <= 2 for of_name in by_name.values())
        best = make_plan(geometry, direction, FLOAT32, weight_is_transformed=direction == "forward")
        assert best.choices in [plan.choices for plan in plans]


def two_plans(geometry, direction, dtype, tiles):
    choices = ("transform", "codelet"), ("tile", (8, 8))
    by_fft = make_plan(geometry, direction, dtype, "fft", choices, transposes=False)
    return [by_fft, make_plan(geometry, direction, dtype, "direct")]


@pytest.fixture
def document(monkeypatch):
    """A measured layer."""
    monkeypatch.setattr(fit_costs, "plans_of", two_plans)  # others take long to compile
    monkeypatch.setattr(fit_costs, "MOST_ROUNDS", 3)
    monkeypatch.setattr(fit_costs, "measure_machine", lambda: DEFAULT)
    monkeypatch.setattr(jit.Callback, "address", jit.Callback.address)  # put back afterwards
    monkeypatch.setattr(threads.TaskTable, "_run_rows", threads.TaskTable._run_rows)
    monkeypatch.setattr(fit_costs, "commit", lambda: "none")
    counts = threads.get_counts()
    tiny = layers.Layer("tiny", "3x3 dense", 1, 32, 8, 20, 3, 1)  # of too many channels for a fused pass
    yield fit_costs.measure([tiny], tiles=1)
    threads.set_num_threads(*counts)


def test_measured_plans_are_written_and_read(document, tmp_path):
    path = tmp_path / "costs.json"
    fit_costs.write(document, path)
    measured, machine, vector_bytes = fit_costs.read(path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(document))
    assert (machine, vector_bytes) == (DEFAULT, fit_costs.simd.VECTOR_BYTES)
    assert [plan.has_stages for plan in measured] == [True, False] * 3
    for plan in measured:
        if plan.has_stages:
            assert min(plan.stages) > 0
            assert sum(plan.stages) < sum(plan.seconds)
    expected = [
        (plan.direction, fit_costs.name_of(plan), getattr(plan, "tile", None), plan.is_transposed)
        for direction in DIRECTIONS
        for plan in two_plans(measured[0].geometry, direction, FLOAT32, 1)
    ]
    assert [(plan.direction, plan.name, plan.tile, plan.transposed) for plan in measured] == expected

    rows = fit_costs.design(measured, machine)
    assert rows.of_passes.sum() == sum(len(plan.seconds) for plan in measured)


def test_rates_are_written_only_if_asked(document, tmp_path, monkeypatch, capsys):
    costs, written = tmp_path / "costs.json", tmp_path / "fitted_rates.py"
    fit_costs.write(document, costs)
    monkeypatch.setattr(fit_costs, "RATES", written)
    assert fit_costs.main(["fit", "--costs", str(costs)]) == 0
    assert not written.exists()
    assert fit_costs.main(["fit", "--costs", str(costs), "--write"]) == 0
    tables = runpy.run_path(str(written))["RATES"]
    assert {width: table for width, table in tables.items() if width != rates.WIDTH} == {
        width: table for width, table in fitted_rates.RATES.items() if width != rates.WIDTH
    }
    found = rates.checked(tables[rates.WIDTH])
    assert {owner: {unit: set(of) for unit, of in by.items()} for owner, by in found.items()} == {
        owner: {unit: set(of) for unit, of in by.items()} for owner, by in rates.RATES.items()
    }
    assert found != rates.RATES
    assert "| all " in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.pop("machine"),
        lambda document: document.update(format="another"),
        lambda document: document["problems"][0].update(direction="sideways"),
        lambda document: document["problems"][0]["plans"][0].update(seconds=[1.0]),
        lambda document: document["problems"][0]["plans"][0].update(seconds=[0.0, 1.0]),
    ],
)
def test_damaged_costs(damage, tmp_path, capsys):
    sizes = {"input_size": (1, 2, 9, 9), "weight_size": (2, 2, 3, 3), "padding": 0, "groups": 1}
    plan = {"name": "direct", "transposed": False, "seconds": [1.0, 1.0]}
    problem = {"layer": "a", "direction": "forward", "dtype": "float32", **sizes, "plans": [plan]}
    figures = {"flops": 1e11, "bandwidth": 1e10}
    document = {"format": fit_costs.FORMAT, "machine": figures, "vector_bytes": 64, "problems": [problem]}
    path = tmp_path / "costs.json"
    fit_costs.write(document, path)
    assert fit_costs.read(path)[1] == Machine(**figures)
    damage(document)
    fit_costs.write(document, path)
    with pytest.raises(ValueError, match="is damaged"):
        fit_costs.read(path)
    assert fit_costs.main(["fit", "--costs", str(path)]) == 1
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.skipif(not fit_costs.COSTS.exists(), reason="nothing is measured")
def test_the_costs_that_were_measured():
    measured, _, vector_bytes = fit_costs.read(fit_costs.COSTS)
    assert fit_costs.COSTS.stat().st_size < 300_000
    assert vector_bytes in (16, 32, 64)
    assert {(plan.layer, plan.direction) for plan in measured} == {
        (layer.name, direction) for layer in layers.LAYERS for direction in DIRECTIONS
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a dictionary"),
        ({"fft": {"miles": {}}}, "units.*miles"),
        ({"fft": {"seconds": 3}}, "must have names, got 3"),
        ({"fft": {"seconds": {"call": 0}}}, "call of fft must be positive and finite, got 0"),
        ({"fft": {"seconds": {"call": -1.5}}}, "got -1.5"),
        ({"fft": {"seconds": {"call": math.nan}}}, "got nan"),
        ({"fft": {"seconds": {"call": "1"}}}, "got '1'"),
        ({"fft": {"seconds": {"call": True}}}, "got True"),
        ({"fft": {"seconds": {"call": 1}, "flops": {"call": 1}}}, "two units"),
    ],
)
def test_bad_rates(content, message):
    with pytest.raises(ValueError, match=message):
        rates.checked(content)


def test_rates_of_nothing():
    with pytest.raises(ValueError, match="not of 'toy'"):
        rates.of("toy")
