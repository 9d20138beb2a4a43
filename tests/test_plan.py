"""What the planner decides, how it tells it, and FFTW's wisdom."""

from __future__ import annotations

import gc
import json
import math
import tracemalloc
import weakref

import numpy as np
import pyfftw
import pytest
from compare import assert_accurate, relative_error
from geometries import DIRECTIONS, WAYS, Case, cases, planned
from hypothesis import given

import nbfftconv
from nbfftconv import planner
from nbfftconv.direct import depthwise
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import tiled_costs
from nbfftconv.passes.context import _numbers
from nbfftconv.passes.forward import recorded_program
from nbfftconv.plan import ConvPlan
from nbfftconv.planner import make_plan, make_step_plan
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.transforms import fftw, registry

LARGE_KERNEL = Case((1, 3, 256, 240), (4, 3, 31, 29), padding=15)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_repr_tells_everything(direction, dtype):
    plan = LARGE_KERNEL.plan(direction, dtype, algorithm="fft", transform="fftw", tile=(64, 48))
    assert isinstance(plan, ConvPlan)
    text = repr(plan)
    parts = [
        direction,
        np.dtype(dtype).name,
        "fft",
        "fftw",
        64,
        48,
        *plan.tiles,
        plan.scratch_bytes,
        plan.reason,
    ]
    parts += [LARGE_KERNEL.input_size, LARGE_KERNEL.weight_size]
    assert [part for part in map(str, parts) if part not in text] == []
    assert "object at 0x" not in text

    direct = repr(LARGE_KERNEL.plan(direction, dtype, algorithm="direct"))
    assert "direct" in direct and direction in direct and direct != text


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
def test_attributes(direction, transposed):
    forced = {"algorithm": "fft", "transform": "fftw", "tile": (64, 48)}
    plan = LARGE_KERNEL.plan(direction, np.float32, transposed=transposed, **forced)
    assert plan.direction == direction
    assert plan.dtype == np.float32
    assert (plan.algorithm, plan.transform, plan.tile) == ("fft", "fftw", (64, 48))
    width = 240 if transposed else 242  # of what the tiles cover, the input or the output
    assert plan.tiles == (-(-256 // (64 - 30)), -(-width // (48 - 28)))
    assert 0 < plan.scratch_bytes <= get_scratch_limit()
    assert plan.reason
    assert plan.choices == (("transform", "fftw"), ("tile", (64, 48))) and plan.summary == "fftw 64×48"
    assert plan.uses_library
    assert isinstance(plan.geometry, ConvGeometry)
    assert plan.geometry.input_size == LARGE_KERNEL.input_size
    assert plan.geometry.weight_size == LARGE_KERNEL.weight_size
    assert plan.geometry.output_size == LARGE_KERNEL.output_size

    plan = LARGE_KERNEL.plan(direction, np.float64, algorithm="direct")
    assert (plan.dtype, plan.algorithm, plan.choices, plan.summary) == (np.float64, "direct", (), "direct")
    assert not {"transform", "grid", "tile", "tiles", "fused", "block_tiles"} & set(dir(plan))


def test_a_plan_cannot_be_changed():
    plan = LARGE_KERNEL.plan("forward", np.float32)
    with pytest.raises(AttributeError):
        plan.algorithm = "direct"


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize(
    "tile",
    [
        (31, 31),
        (31, 100),
        *(pytest.param(tile, marks=pytest.mark.slow) for tile in ((32, 32), (45, 45), (97, 29), (512, 31))),
    ],
)
def test_a_forced_tile_is_honoured(direction, transposed, tile, rng):
    plan = LARGE_KERNEL.plan(direction, np.float64, algorithm="fft", tile=tile, transposed=transposed)
    assert plan.tile == tile
    a, b, expected = LARGE_KERNEL.operands_and_expected(direction, np.float64, rng)
    assert_accurate(LARGE_KERNEL.run(direction, a, b, plan), expected, np.float64)


def test_a_tile_may_be_one_number():
    assert LARGE_KERNEL.plan("forward", np.float32, algorithm="fft", tile=45).tile == (45, 45)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_auto_knows_where_an_fft_is_pointless(direction):
    pointless = [
        Case((1, 64, 56, 56), (64, 64, 1, 1)),
        Case((8, 3, 1, 1), (4, 3, 1, 1)),
        Case((1, 1, 4, 4), (1, 1, 3, 3)),
        Case((1, 1, 3, 3), (1, 1, 3, 3), padding=1),
    ]
    worthwhile = [
        Case((1, 16, 128, 128), (16, 16, 31, 31), padding=15),
        Case((1, 1, 2048, 2048), (1, 1, 63, 63)),
        Case((4, 8, 64, 64), (8, 8, 21, 21), padding="full"),
    ]
    for algorithm, some in (("direct", pointless), ("fft", worthwhile)):
        for case in some:
            plan = case.plan(direction, np.float32)
            assert plan.algorithm == algorithm, plan
            assert case.plan(direction, np.float32, algorithm=algorithm).algorithm == algorithm
            assert plan.reason


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_plans_do_not_know_the_thread_count(direction, restore_threads):
    described = set()
    for count in (1, 2, 4):
        nbfftconv.set_num_threads(count)
        assert nbfftconv.get_num_threads() == count
        described.add(repr(LARGE_KERNEL.plan(direction, np.float32)))
    assert len(described) == 1


def test_one_plan_serves_every_padding_mode_and_activation(rng):
    case = Case((2, 2, 40, 40), (2, 2, 9, 9), padding=4)
    plan = case.plan("forward", np.float32, algorithm="fft")
    for padding_mode in ("zeros", "reflect", "replicate", "circular"):
        moded = Case(*[getattr(case, name) for name in list(case.__dict__)[:-1]], padding_mode)
        x, w, expected = moded.operands_and_expected("forward", np.float32, rng)
        assert_accurate(moded.run("forward", x, w, plan), expected, np.float32)
        activated = moded.run("forward", x, w, plan, activation="relu")
        assert_accurate(activated, np.maximum(expected, 0), np.float32)


# Transposed problems ---------------------------------------------------------------------------------


@given(case=cases())
def test_a_transposed_problem_goes_back(case):
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    transposed = geometry.transposed()
    numbers = list(zip(geometry.weight_size[2:], geometry.stride, geometry.dilation, strict=True))
    extent = [d * (k - 1) for k, _, d in numbers]
    fits = all(max(pads) <= e for pads, e in zip(geometry.padding, extent, strict=True))
    divides = all(s == 1 or (d == 1 and k % s == 0) for k, s, d in numbers)
    if max(geometry.stride) == 1 or not divides:
        assert (transposed is not None) == (divides and fits)
    elif fits and all(max(pads) <= k - s for pads, (k, s, _) in zip(geometry.padding, numbers, strict=True)):
        assert transposed is not None
    if transposed is None:
        return
    assert transposed.input_size == geometry.output_size
    assert geometry.with_padding_applied().transposed() is not None
    if max(geometry.stride) == 1:
        assert transposed.output_size == geometry.input_size
        assert transposed.transposed() == geometry
    else:  # every s-th pixel of the padded input, as far as it is in the input
        sides = zip(case.input_size[2:], geometry.padding, geometry.stride, strict=True)
        phases = tuple(-(-(size + pads[0] % s) // s) for size, pads, s in sides)
        assert transposed.output_size[1] == case.input_size[1] * math.prod(geometry.stride)
        assert transposed.output_size[2:] == phases


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
def test_a_gradient_tells_whether_it_is_transposed(algorithm):
    plan = LARGE_KERNEL.plan("grad_input", np.float32, algorithm=algorithm)
    inner = plan.run_as
    assert plan.is_transposed and "transposed" in repr(plan) and inner.direction == "forward"
    assert inner.geometry == plan.geometry.transposed() and not inner.is_transposed
    assert inner.as_grad_input(plan.geometry) == plan
    own = LARGE_KERNEL.plan("grad_input", np.float32, algorithm=algorithm, transposed=False)
    assert own.run_as is own and not own.is_transposed and "transposed" not in repr(own)
    for direction in ("forward", "grad_weight"):
        assert not LARGE_KERNEL.plan(direction, np.float32, algorithm=algorithm).is_transposed


def test_overlap_add_where_transposed_tiles_would_be_larger():
    sizes = (16, 128, 16, 16), (128, 128, 7, 7)
    assert not Case(*sizes).plan("grad_input", np.float32).is_transposed
    assert Case(*sizes, padding="full").plan("grad_input", np.float32).is_transposed


# Costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "case",
    [
        LARGE_KERNEL,
        Case((2, 64, 40, 33), (64, 64, 3, 3), padding=1),
        Case((1, 12, 50, 60), (12, 1, 15, 9), groups=12, padding=4),
        Case((3, 6, 61, 35), (4, 3, 5, 4), stride=(2, 1), dilation=(1, 3), groups=2),
    ],
    ids=repr,
)
def test_the_cheapest_of_all_tiles_is_chosen(case, dtype, direction):
    plan = case.plan(direction, dtype, algorithm="fft")
    geometry = plan.run_as.geometry
    seconds = {}
    transforms = [transform for transform in registry.candidates() if transform.algorithm == "fft"]
    for transform in transforms:
        for height, width in zip(*[(8, 9, 16, 24, 30, 32, 36, 40, 64, 80, 96, 128, 192)] * 2, strict=True):
            fits = height >= geometry.weight_size[2] and width >= geometry.weight_size[3]
            if fits and (
                transform.sides is None or (height in transform.sides(2, 0) and width in transform.sides(2, 1))
            ):
                one = case.plan(direction, dtype, algorithm="fft", transform=transform.name, tile=(height, width))
                seconds[transform.name, height, width] = one.seconds
    assert len(seconds) >= 8
    assert plan.seconds <= min(seconds.values())
    again = case.plan(direction, dtype, algorithm="fft", transform=plan.transform, tile=plan.tile)
    assert again.seconds == pytest.approx(plan.seconds, rel=1e-12)
    assert (again.grid, again.block_tiles, again.fused) == (plan.grid, plan.block_tiles, plan.fused)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_plan_makes_nothing_for_the_tiles_that_it_does_not_choose(direction, monkeypatch):
    calls, axis_tiles = [], tiled_costs.axis_tiles
    monkeypatch.setattr(tiled_costs, "axis_tiles", lambda *arguments: calls.append(arguments) or axis_tiles(*arguments))
    tables = depthwise._runs.cache_info().misses
    Case((1, 3, 1031, 577), (3, 1, 63, 61), groups=3).plan(direction, np.float32)
    assert len(calls) <= 8
    assert depthwise._runs.cache_info().misses == tables


def random_geometries(count, rng):
    """Of all kinds: dense, depthwise, of large kernels, with strides."""
    layers = [(64, 64, 3, 1), (16, 1, 7, 16), (8, 1, 63, 8), (1, 1, 31, 1), (256, 256, 1, 1), (12, 3, 9, 1)]
    for i in range(count):
        filters, channels, kernel, groups = layers[i % len(layers)]
        size = rng.integers(kernel, 64 + 4 * kernel, 2).tolist()
        stride = 1 + int(rng.integers(0, 8) == 0)
        yield ConvGeometry.from_arguments(
            (1 + i % 3, channels * groups, *size), (filters, channels, kernel, kernel), stride, kernel // 2, 1, groups
        )


@pytest.mark.slow
def test_what_is_kept_of_shapes_is_bounded(rng):
    """The memory of all caches of plans and their numbers, when they are full."""
    transform = fftw.fftw(np.float32, 64, 64)
    gc.collect()
    tracemalloc.start()
    try:
        for i, geometry in enumerate(random_geometries(4500, rng)):
            dtype = np.dtype((np.float32, np.float64)[i // 6 % 2])
            make_plan(geometry, DIRECTIONS[i % 3], dtype, weight_is_transformed=i % 2 == 0)
            if i % 8 == 0:
                make_step_plan(geometry, dtype, "auto", 2**28)
            if geometry.weight_size[2] > 1 and i % 4 == 0:
                plan = planned(geometry, "grad_weight", np.float32, "fft", transform="fftw", tile=(64, 64))
                _numbers(plan, geometry, transform, 1, 1)
            if geometry.groups > 1 and i % 4 == 0 and (record := depthwise._record(geometry, dtype)) is not None:
                depthwise._runs(*(int(record[name]) for name in depthwise._OF_RUNS), dtype.itemsize)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 16 * 2**20


# Scratch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("case", "least"),
    [
        (Case((1, 1, 700, 640), (1, 1, 41, 37), padding=20), 300 << 10),
        (Case((5, 6, 60, 60), (7, 6, 9, 9), padding=4), 300 << 10),
        (Case((2, 8, 80, 75), (8, 1, 12, 12), stride=2, groups=8), 450 << 10),
    ],
    ids=repr,
)
def test_a_small_scratch_limit_changes_nothing_but_memory(case, least, direction, restore_scratch_limit, rng):
    a, b = case.operands(direction, np.float32, rng)
    tile = tuple(k + 24 for k in case.weight_size[2:])
    forced = {"algorithm": "fft", "tile": tile}
    plan = case.plan(direction, np.float32, **forced)
    whole = case.run(direction, a, b, plan)
    for limit in (1 << 20, least):
        set_scratch_limit(limit)
        assert get_scratch_limit() == limit
        small = case.plan(direction, np.float32, **forced)
        assert 0 < small.scratch_bytes <= limit
        assert relative_error(case.run(direction, a, b, small), whole.astype(float)) < 2e-6
        free = case.plan(direction, np.float32, algorithm="fft")  # the tile may adapt to the limit too
        assert 0 < free.scratch_bytes <= limit
        assert relative_error(case.run(direction, a, b, free), whole.astype(float)) < 2e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_limit_below_one_tile(direction, restore_scratch_limit, rng):
    """Left to itself the planner finds a way; asked for an FFT it says why there is none."""
    case = Case((1, 2, 90, 90), (2, 2, 21, 21))
    set_scratch_limit(1000)
    a, b, expected = case.operands_and_expected(direction, np.float32, rng)
    assert_accurate(case.run(direction, a, b), expected, np.float32)
    for tile in (None, 64):
        with pytest.raises(ValueError, match="limit of 1000 bytes"):
            case.plan(direction, np.float32, algorithm="fft", tile=tile)


def test_the_default_limit(restore_scratch_limit):
    plan = nbfftconv.plan_conv2d((1, 1, 8192, 8192), (1, 1, 127, 127), padding=63)
    assert plan.algorithm == "fft"
    assert plan.scratch_bytes <= get_scratch_limit() == 512 << 20


# FFTW's plans ----------------------------------------------------------------------------------------


def test_plans_of_fftw_that_nobody_uses_are_destroyed(monkeypatch, rng):
    """Those that somebody holds are not; what was destroyed is planned anew."""
    destroyed, function = [], fftw._function
    case = Case((1, 1, 50, 50), (1, 1, 9, 9))
    x, w, expected = case.operands_and_expected("forward", np.float32, rng)
    plan = case.plan("forward", np.float32, algorithm="fft", transform="fftw", tile=(23, 29))
    monkeypatch.setattr(
        fftw, "_function", lambda real, name, *rest: destroyed.append(name) or function(real, name, *rest)
    )
    _numbers.cache_clear()
    recorded_program.cache_clear()
    held = [fftw.fftw(np.float32, 7, width) for width in range(7, 17)]
    before = case.run("forward", x, w, plan)  # held by the numbers of its plan
    for height in range(5, 25):
        for width in range(20, 31):
            fftw.fftw(np.float64, height, width)
    assert len(fftw._transforms) <= fftw._MOST_TRANSFORMS
    assert destroyed.count("destroy_plan") >= 220 - fftw._MOST_TRANSFORMS
    for width, transform in enumerate(held, 7):
        assert fftw.fftw(np.float32, 7, width) is transform
    np.testing.assert_array_equal(case.run("forward", x, w, plan), before)
    assert_accurate(before, expected, np.float32)

    _numbers.cache_clear()
    recorded_program.cache_clear()
    planned = destroyed.count("plan_guru64_split_dft_r2c")
    for width in range(20, 90):
        fftw.fftw(np.float64, 30, width)
    np.testing.assert_array_equal(case.run("forward", x, w, plan), before)
    assert destroyed.count("plan_guru64_split_dft_r2c") == planned + 71


# Wisdom ----------------------------------------------------------------------------------------------


@pytest.fixture
def measured():
    """Some wisdom, and the plans' effort restored."""
    effort = fftw.get_planning_effort()
    fftw.set_planning_effort("measure")
    case = Case((1, 1, 50, 50), (1, 1, 9, 9))
    for dtype in (np.float32, np.float64):
        x, w = case.operands("forward", dtype, np.random.default_rng(0))
        case.run("forward", x, w, case.plan("forward", dtype, algorithm="fft", tile=(36, 28)))
    yield
    fftw.set_planning_effort(effort)


def wisdom_lines():
    return [sorted(part.splitlines()) for part in pyfftw.export_wisdom()[:2]]


def test_planning_effort(measured):
    for effort in ("estimate", "measure", "patient", "exhaustive"):
        fftw.set_planning_effort(effort)
        assert fftw.get_planning_effort() == effort


def test_wisdom_goes_to_a_file_and_back(measured, tmp_path):
    path = tmp_path / "wisdom"
    path.write_text("what was there before")
    before = wisdom_lines()
    assert all(len(lines) > 2 for lines in before)
    fftw.save_wisdom(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["wisdom"]  # nothing left over
    pyfftw.forget_wisdom()
    assert wisdom_lines() != before
    fftw.load_wisdom(str(path))
    assert wisdom_lines() == before


def damage(text):
    """Ways in which a file may be broken."""
    document = json.loads(text)
    yield b""
    yield b"\x00\xff" * 100
    yield text[: len(text) // 2].encode()
    yield b"[1, 2, 3]"
    yield b"{}"
    yield json.dumps({key: None for key in document}).encode()
    yield json.dumps({key: value[: len(value) // 2] for key, value in document.items()}).encode()
    yield json.dumps({key: "(fftw-0.0 nothing)" for key in document}).encode()


def test_damaged_wisdom(measured, tmp_path, rng):
    good, bad = tmp_path / "good", tmp_path / "bad"
    fftw.save_wisdom(good)
    for content in damage(good.read_text()):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad"):
            fftw.load_wisdom(bad)
    with pytest.raises(OSError):
        fftw.load_wisdom(tmp_path / "missing")
    fftw.load_wisdom(good)
    case = Case((1, 1, 50, 50), (1, 1, 9, 9))
    x, w, expected = case.operands_and_expected("forward", np.float32, rng)
    plan = case.plan("forward", np.float32, algorithm="fft", tile=(40, 26))
    assert_accurate(case.run("forward", x, w, plan), expected, np.float32)


@pytest.mark.parametrize("size", [(1, 1, 9, 9), (6, 6, 1, 1), (6, 6, 3, 3)], ids=str)
def test_a_plan_holds_nothing_of_its_callers(size):
    """A cycle would, until Python's collector comes: results of a race took several hundred MiB."""

    def call():
        x = np.ones((1, size[1], 37, 38), np.float32)
        nbfftconv.conv2d(x, np.ones(size, np.float32))
        return weakref.ref(x)

    planner._make_plan.cache_clear()
    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()
