"""The figures of the machine and the profile: kept, reused, merged; never trusted blindly, never in the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from compare import assert_accurate
from geometries import DIRECTIONS, Case
from processes import run_scenario

import nbfftconv
from nbfftconv import autotune, kept_kernels, machine, planner, profile, simd, store, threads
from nbfftconv.scratch import set_scratch_limit
from nbfftconv.store import Document, fingerprint
from nbfftconv.threads import available, get_counts
from nbfftconv.transforms import COMPLEX_BYTES

CASE = Case((2, 3, 40, 44), (4, 3, 5, 5), padding=2)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where this test's profile belongs."""
    monkeypatch.setenv("NBFFTCONV_PROFILE", str(tmp_path / "profile.json"))
    return tmp_path / "profile.json"


def entry(**changes):
    """A winner of CASE that the cost model would not choose."""
    return {
        "input_size": CASE.input_size,
        "weight_size": CASE.weight_size,
        "stride": 1,
        "padding": 2,
        "dilation": 1,
        "groups": 1,
        "direction": "forward",
        "dtype": "float32",
        "weight_is_transformed": False,
        "algorithm": "fft",
        "transform": "fftw",
        "tile": [18, 14],
        "seconds": 0.00123,
        "model_seconds": 0.00234,
        "threads": 2,
    } | changes


def content(**changes):
    return {
        "format": "nbfftconv profile 1",
        "machine": fingerprint(),
        "threads": None,
        "winners": [entry()],
    } | changes


def automatic(direction="forward", dtype=np.float32, **keywords):
    return CASE.plan(direction, dtype, **keywords)


def choice(plan):
    choices = dict(plan.choices)
    return [plan.algorithm, choices.get("transform"), list(choices["tile"]) if choices else None]


@pytest.fixture(scope="module")
def by_model():
    """What the cost model chooses."""
    return choice(automatic())


# The profile in use ----------------------------------------------------------------------------------


def test_a_winner_is_used_for_its_problem_only(file, by_model, rng):
    file.write_text(json.dumps(content()))
    plan = automatic()
    assert choice(plan) == ["fft", "fftw", [18, 14]] != by_model
    assert all(figure in plan.reason for figure in ("measured", "1.23 ms", "2.34 ms", "2 threads"))
    others = [
        automatic("grad_input"),
        automatic(dtype=np.float64),
        automatic(weight_is_transformed=True),
        automatic(algorithm="fft"),
        automatic(tile=16),
    ]
    assert all("measured" not in plan.reason for plan in others)
    x, w, expected = CASE.operands_and_expected("forward", np.float32, rng)
    assert_accurate(CASE.run("forward", x, w), expected, np.float32)


def test_layers_use_winners(file, monkeypatch, rng):
    kept = entry(weight_is_transformed=True, transform="codelet", tile=[20, 12])
    grad_weight, grad_input = (
        entry(direction="grad_weight", tile=[22, 22]),
        entry(direction="grad_input", tile=[26, 26]),
    )
    file.write_text(json.dumps(content(winners=[entry(), kept, grad_weight, grad_input])))
    tiles = []
    make_plan = planner.make_plan

    def spy(*arguments, **keywords):
        plan = make_plan(*arguments, **keywords)
        tiles.append(plan.tile)
        return plan

    monkeypatch.setattr(kept_kernels, "make_plan", spy)
    monkeypatch.setattr(planner, "make_plan", spy)
    x, w = CASE.operands("forward", np.float32, rng)
    convolution = nbfftconv.Conv2d(w, padding=2)
    convolution.backward(convolution(x))
    assert tiles == 2 * [(18, 14), (22, 22), (26, 26)]  # all of a step, for either half of it
    convolution.training = False
    convolution(x)
    assert set(tiles[6:]) == {(20, 12)}


def test_direct_may_win(file):
    file.write_text(json.dumps(content(winners=[entry(algorithm="direct", transform=None, tile=None)])))
    assert choice(automatic()) == ["direct", None, None]


def test_a_winner_gives_way_to_the_limit_of_memory(file, restore_scratch_limit):
    file.write_text(json.dumps(content(winners=[entry(tile=[44, 48])])))
    assert automatic().tile == (44, 48)
    set_scratch_limit(50_000)
    with pytest.warns(UserWarning, match="limit of 50000 bytes"):
        assert automatic().scratch_bytes <= 50_000


# What is wrong is reported and ignored ---------------------------------------------------------------


GOOD = json.dumps(content())
BROKEN = {
    "empty": b"",
    "binary": b"\x00\xff" * 100,
    "truncated": GOOD[: len(GOOD) // 2].encode(),
    "deep": b"[" * 100_000,
    "list": b"[1, 2, 3]",
    "no profile": b"{}",
    "other version": json.dumps(content(format="nbfftconv profile 0")).encode(),
    "other kind": json.dumps(content(format=["nbfftconv machine 1"])).encode(),
    "other machine": json.dumps(content(machine="an abacus")).encode(),
    "no winners": json.dumps(content(winners=None)).encode(),
    "winners by name": json.dumps(content(winners={"first": entry()})).encode(),
    "threads a number": json.dumps(content(threads=2)).encode(),
    "threads a list": json.dumps(content(threads=[1, 2])).encode(),
    "threads a text": json.dumps(content(threads={"loops": "2", "library": 1})).encode(),
    "threads none": json.dumps(content(threads={"loops": 0, "library": 1})).encode(),
    "threads some": json.dumps(content(threads={"loops": 2})).encode(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file(name, file, by_model):
    file.write_bytes(BROKEN[name])
    with pytest.warns(UserWarning, match=r"ignored: .*profile\.json"):
        assert choice(automatic()) == by_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        automatic()
        profile.remember(threads=(1, 1))
    assert not caught  # once is enough
    assert profile.get_profile().threads == (1, 1)
    assert json.loads(file.read_text())["threads"] == {"loops": 1, "library": 1}
    assert (file.parent / "profile.json.ignored").read_bytes() == BROKEN[name]  # perhaps it was precious


@pytest.mark.parametrize(
    "changes",
    [
        {"tile": [4, 18]},
        {"tile": [0, 18]},
        {"tile": [18]},
        {"tile": "18"},
        {"tile": [18.0, 14]},
        {"tile": None},
        {"tile": [2**30, 2**30]},
        {"tile": [10**40, 18]},
        {"transform": "codelet", "tile": [11, 18]},
        {"transform": "auto"},
        {"transform": "winograd"},
        {"transform": 3},
        {"transform": None},
        {"algorithm": "direct"},
        {"algorithm": "auto"},
        {"algorithm": None},
        {"seconds": "fast"},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"model_seconds": float("inf")},
        {"threads": 0},
        {"threads": 1.5},
    ],
    ids=str,
)
def test_a_winner_that_makes_no_sense(changes, file, by_model):
    file.write_text(json.dumps(content(winners=[entry(**changes), entry(direction="grad_input")])))
    with pytest.warns(UserWarning, match="ignored in .*profile"):
        assert choice(automatic()) == by_model
    assert choice(automatic("grad_input")) == ["fft", "fftw", [18, 14]]


@pytest.mark.parametrize(
    "bad",
    [
        7,
        {},
        entry(input_size=[2, 3, 40]),
        entry(weight_size=[4, 3, 50, 50]),
        entry(groups=2),
        entry(stride="1"),
        entry(direction="backward"),
        entry(direction=["forward"]),
        entry(dtype="int8"),
        entry(weight_is_transformed=1),
    ],
    ids=str,
)
def test_a_problem_that_is_none(bad, file):
    file.write_text(json.dumps(content(winners=[bad, entry()])))
    with pytest.warns(UserWarning, match="ignored in .*profile"):
        assert choice(automatic()) == ["fft", "fftw", [18, 14]]


# Measuring -------------------------------------------------------------------------------------------


def test_measuring_remembers_the_winner(file):
    """For kernels' spectra kept and not; here, and in the next process."""
    plan = automatic(measure=True)
    kept = automatic(weight_is_transformed=True)
    assert "measured" in plan.reason and "measured" in kept.reason
    found = run_scenario("planned", json.dumps(CASE.input_size), json.dumps(CASE.weight_size))
    assert found["choices"] == [choice(plan), choice(kept)]
    assert found["reasons"] == [plan.reason, kept.reason]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_measuring_each_pass(direction, file, rng):
    small = Case((1, 2, 12, 12), (2, 2, 5, 5))
    plan = small.plan(direction, np.float64, measure=True)
    assert "measured" in plan.reason
    assert small.plan(direction, np.float64) == plan
    a, b, expected = small.operands_and_expected(direction, np.float64, rng)
    assert_accurate(small.run(direction, a, b), expected, np.float64)


def test_where_there_is_nothing_to_measure(file, monkeypatch):
    case = Case((1, 3, 20, 20), (2, 3, 1, 1))
    monkeypatch.setattr(autotune, "find_winners", lambda candidates: pytest.fail(f"measured {candidates}"))
    plan = case.plan("forward", np.float32, measure=True)
    assert plan.algorithm == "direct"
    assert plan == case.plan("forward", np.float32)
    assert not file.exists()


def test_measuring_an_empty_batch(file):
    case = Case((0, 3, 20, 20), (2, 3, 5, 5))
    plan = case.plan("forward", np.float32, measure=True)
    assert plan == case.plan("forward", np.float32)
    x, w = (np.zeros(shape, np.float32) for shape in case.shapes("forward"))
    assert case.run("forward", x, w, plan).shape == (0, 2, 16, 16)


def test_two_processes_at_once(file):
    sizes = [[1, 2, side, side] for side in (14, 18)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda size: run_scenario("measured", json.dumps(size), "[2, 2, 5, 5]"), sizes))
    found = sorted(winner["input_size"] for winner in json.loads(file.read_text())["winners"])
    assert found == [sizes[0], sizes[0], sizes[1], sizes[1]]
    assert {path.name for path in file.parent.iterdir()} == {"profile.json", "profile.json.lock"}


def test_nowhere_to_write(tmp_path, monkeypatch):
    """The folder is a file: the winner is known to this process only."""
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("NBFFTCONV_PROFILE", str(tmp_path / "taken" / "profile.json"))
    small = Case((1, 2, 13, 13), (2, 2, 5, 5))
    with pytest.warns(UserWarning, match=r"this process only, .*profile\.json'"):
        plan = small.plan("forward", np.float32, measure=True)
    assert "measured" in plan.reason and small.plan("forward", np.float32) == plan
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_folder_in_its_place(file, by_model):
    file.mkdir()
    with pytest.warns(UserWarning, match="ignored"):
        assert choice(automatic()) == by_model


# Threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "expected"),
    [
        (None, [available(), available()]),
        ({"loops": 1, "library": 1}, [1, 1]),
        ({"loops": available(), "library": 1}, [available(), 1]),
        ({"loops": 1, "library": 10**6}, [1, available()]),
    ],
)
def test_a_new_process_begins_with_the_profiles_counts(threads, expected, file):
    file.write_text(json.dumps(content(threads=threads)))
    assert run_scenario("planned")["counts"] == expected


def test_fftw_counts_are_set_and_change_no_result(restore_threads, rng):
    for direction in DIRECTIONS:
        plan = CASE.plan(direction, np.float32, algorithm="fft", transform="fftw", tile=12)
        a, b = CASE.operands(direction, np.float32, rng)
        a[0, 0, 1, 1] = np.nan
        results = set()
        for counts in ((1, 1), (1, 3), (3, 1), (2, 2)):
            nbfftconv.set_num_threads(counts[0], library=counts[1])
            assert get_counts() == counts
            assert nbfftconv.get_num_threads() == counts[0]
            results.add(CASE.run(direction, a, b, plan).tobytes())
        assert len(results) == 1
    nbfftconv.set_num_threads(2)
    assert get_counts() == (2, 2)


def tune(*arguments):
    command = [sys.executable, "-m", "nbfftconv", "tune", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def test_tune_threads(tmp_path, file):
    layers, plot = tmp_path / "layers.json", tmp_path / "plot.png"
    layers.write_text(json.dumps([{"name": "mine", "input_size": [1, 2, 16, 16], "weight_size": [2, 2, 5, 5]}]))
    quick = ("--rounds", 1, "--threads", 1, "--measure", "--profile", file, "--plot", plot)
    done = tune("1x2x20x20,2x1x5x5,padding=same,groups=2", layers, *quick)
    assert done.returncode == 0, done.stderr
    assert all(
        text in done.stdout for text in ("| mine ", "| 1x2x20x20,2x1x5x5,padding=same,groups=2 ", "In all: 1 thread")
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(file.read_text())
    assert written["threads"] == {"loops": 1, "library": 1}
    assert [winner["groups"] for winner in written["winners"]] == [2, 2, 1, 1]
    assert run_scenario("planned")["counts"] == [1, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-layer"],
        ["no-file.json"],
        ["1x2x9x9,2x3x5x5"],
        pytest.param(["1x2x9x9,2x2x5x5,colour=3"], marks=pytest.mark.slow),
        pytest.param(["k31", "--threads", "0"], marks=pytest.mark.slow),
        pytest.param(["k31", "--measure"], marks=pytest.mark.slow),
    ],
)
def test_tune_threads_refuses(arguments):
    done = tune(*arguments)
    assert done.returncode == 2 and "error: " in done.stderr
    assert arguments[-1] in done.stderr


# The machine -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own and no figures in this process; returns the file that keeps them."""
    monkeypatch.setenv("NBFFTCONV_CACHE_DIR", str(tmp_path / "cache"))
    machine.set_machine(None)
    yield Document.of_machine("machine").path
    machine.set_machine(machine.DEFAULT)


FAKE = machine.Machine(machine.DEFAULT.flops / 2, machine.DEFAULT.bandwidth * 2)


def test_figures_are_measured_once(cache, monkeypatch):
    measured = []
    monkeypatch.setattr(machine, "measure", lambda: measured.append(1) or FAKE)
    for _ in range(2):
        assert machine.get_machine() == FAKE
        machine.set_machine(None)  # as in the next process
    assert len(measured) == 1
    found = run_scenario("planned")  # which would find other figures
    assert found["machine"] == [FAKE.flops, FAKE.bandwidth]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("machine 1", "machine 0"),
        lambda text: text.replace(fingerprint(), "an abacus"),
        lambda text: text.replace(str(FAKE.flops), "1e30"),
        lambda text: text.replace(str(FAKE.flops), "NaN"),
        lambda text: text.replace(str(FAKE.flops), '"fast"'),
        lambda text: text.replace("flops", "flips"),
    ],
)
def test_damaged_figures(damage, cache, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda: FAKE)
    machine.get_machine()
    good = cache.read_text()
    bad = damage(good)
    assert bad != good
    cache.write_text(bad)
    machine.set_machine(None)
    with pytest.warns(UserWarning, match="ignored: .*machine-"):
        assert machine.get_machine() == FAKE
    assert cache.read_text() == good


def test_figures_that_cannot_be_kept_are_not_measured(cache, monkeypatch):
    cache.parent.write_text("a file")
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("measured"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert machine.get_machine() == machine.DEFAULT
    assert not caught


def test_figures_on_a_read_only_disk_are_used(cache, monkeypatch):
    monkeypatch.setattr(machine, "measure", lambda: FAKE)
    machine.get_machine()
    machine.set_machine(None)
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("measured"))
    monkeypatch.setattr(store.Folder, "locked", lambda folder, name: pytest.fail("locked"))  # which may take seconds
    assert machine.get_machine() == FAKE


def test_figures_are_work_by_time(monkeypatch):
    """The work is done, and divided by the time that it took."""
    done = []

    def best_seconds(function, repetitions):
        function()
        done.append(repetitions)
        return 2e-3

    monkeypatch.setattr(machine, "_best_seconds", best_seconds)
    operations = 32 * 12 * 64 * 16 * simd.lanes(np.float32) * 8  # of a complex product and sum
    assert machine._measure_flops() == operations / 2e-3
    assert machine._measure_bandwidth() == 2 * 4 * 2**22 / 2e-3  # read and written
    assert len(done) == 2 and min(done) > 1


def test_the_product_that_is_timed_is_one():
    task, (a, b, c) = machine._product()
    c[...] = 0
    threads.run(task)
    # conj(0.5 + 0.5i) · (0.5 + 0.5i), over a depth of 64
    parts = c[: 32 * 12 * 16 * COMPLEX_BYTES].view(np.float32)
    values = set(np.unique(parts).tolist())
    assert 32.0 in values and values <= {0.0, 32.0}


def test_the_best_time_is_that_without_noise(monkeypatch):
    """What is called once more, first, is not timed."""
    ticks = iter([0.0, 5.0, 10.0, 11.5, 20.0, 23.0])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert machine._best_seconds(lambda: calls.append(1), 3) == 1.5
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("figure", "rounded"),
    [
        (1.05, 1.0),
        (0.93, 1.0),
        (1.15, 2**0.25),
        (2.1, 2.0),
        (3.9, 4.0),
        (0.2, 0.25),
        (1e30, 4),
        (1e-30, 0.25),
    ],
)
def test_figures_are_rounded_and_bounded(figure, rounded, monkeypatch):
    monkeypatch.setattr(machine, "_measure_flops", lambda: figure * machine.DEFAULT.flops)
    monkeypatch.setattr(machine, "_measure_bandwidth", lambda: machine.DEFAULT.bandwidth)
    assert machine.measure().flops == pytest.approx(rounded * machine.DEFAULT.flops, rel=1e-12)
    assert machine.measure().bandwidth == machine.DEFAULT.bandwidth


@pytest.mark.parametrize("figure", ["flops", "bandwidth"])
def test_the_cost_model_follows_the_figures(figure):
    expected = []
    try:
        for factor in (4, 1, 1 / 4):
            rate = factor * getattr(machine.DEFAULT, figure)
            machine.set_machine(replace(machine.DEFAULT, **{figure: rate}))
            reason = nbfftconv.plan_conv2d((4, 64, 56, 56), (64, 64, 5, 5)).reason
            expected.append(float(re.search(r"expects (\S+) ms", reason)[1]))
    finally:
        machine.set_machine(machine.DEFAULT)
    assert expected == sorted(expected) and len(set(expected)) == 3


def test_a_winner_of_volumes(tmp_path, monkeypatch):
    """Their planes are images and channels; how is kept, too."""
    monkeypatch.setattr(profile, "_profiles", {})
    profile.set_profile_file(tmp_path / "profile.json")
    try:
        plan = nbfftconv.plan_conv3d((1, 2, 6, 20, 20), (3, 2, 3, 5, 5), padding=1, algorithm="fft")
        problem = profile.Problem.of(plan.geometry, "forward", plan.dtype, False)
        profile.remember(winners={problem: profile.Winner("fft", plan.choices, 1e-3, 1e-3, 2)})
        monkeypatch.setattr(profile, "_profiles", {})
        assert list(profile.get_profile().winners) == [problem]
        assert nbfftconv.plan_conv3d((1, 2, 6, 20, 20), (3, 2, 3, 5, 5), padding=1).algorithm == "fft"
    finally:
        profile.set_profile_file(None)
