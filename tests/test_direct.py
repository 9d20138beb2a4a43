"""Direct convolution: its kernels, at the ends of their blocks, tiles, bands and vectors."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import oracle
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import DIRECTIONS, Case, generators, paddings
from guard import guarded, guarded_scratch
from hypothesis import assume, given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import direct, matrix_unit, scratch, simd, threads
from nbfftconv.direct import block, dense, dense_grad_weight, depthwise, gradients, last, split_dense
from nbfftconv.implementations import registry
from nbfftconv.planner import make_plan
from nbfftconv.run import run_forward
from nbfftconv.threads import get_workers

DTYPES = (np.float32, np.float64)
# pixels, taps, stride and dilation
ROWS = [(1000, 31, 1, 1), (17, 40, 1, 1), (1030, 31, 2, 1), (9000, 63, 1, 1), (2000, 20, 3, 5), (70, 3, 1, 16)]


@st.composite
def direct_cases(draw, filters: tuple[int, int], max_kernel: int, max_channels: int, max_size: int) -> Case:
    """Groups of so many filters; shrinks towards 1x1 kernels, stride 1, no padding."""
    kernel = draw(st.tuples(*[st.integers(1, max_kernel)] * 2))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(*[st.integers(1, 4)] * 2)))
    stride = draw(st.one_of(st.just((1, 1)), st.tuples(*[st.integers(1, 5)] * 2)))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding = draw(paddings(reach, stride))
    pads = oracle.resolve_padding(padding, kernel, dilation)
    size = [draw(st.integers(max(1, r + 1 - sum(p)), max(max_size, r + 1))) for r, p in zip(reach, pads, strict=True)]
    batch, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    channels = draw(st.integers(1, max_channels))
    weight_size = (groups * draw(st.integers(*filters)), channels, *kernel)
    return Case((batch, groups * channels, *size), weight_size, stride, padding, dilation, groups)


def run(case, x, w, bias=None, activation=None):
    plan = case.plan("forward", x.dtype, algorithm="direct")
    return case.run("forward", x, w, plan, bias=bias, activation=activation)


def check(case, dtype, rng):
    x, w, expected = case.operands_and_expected("forward", dtype, rng)
    assert_accurate(run(case, x, w), expected, dtype)


@given(case=direct_cases((1, 6), 9, 3, 70), dtype=st.sampled_from(DTYPES), rng=generators())
def test_few_filters(case, dtype, rng):
    check(case, dtype, rng)


@st.composite
def rows(draw) -> Case:
    """Images of one row, of few filters; taps that are a vector apart, or not."""
    kernel, stride = draw(st.integers(1, 90)), draw(st.integers(1, 4))
    dilation = draw(st.sampled_from([1, 1, 2, 3, 4, 16, 20]))
    reach, padding = dilation * (kernel - 1), draw(st.integers(0, 40))
    size = draw(st.integers(max(1, reach + 1 - 2 * padding), reach + 900))
    batch, groups, channels = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    weight_size = groups * draw(st.integers(1, 4)), channels, 1, kernel
    return Case((batch, groups * channels, 1, size), weight_size, (1, stride), (0, padding), (1, dilation), groups)


@given(case=rows(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_rows(case, dtype, rng):
    check(case, dtype, rng)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(("size", "kernel", "stride", "dilation"), ROWS)
def test_rows_touch_nothing_beyond_their_arrays(size, kernel, stride, dilation, at_end, rng):
    case = Case((1, 2, 1, size), (4, 1, 1, kernel), (1, stride), (0, kernel // 2), (1, dilation), groups=2)
    x, w = case.operands("forward", np.float32, rng)
    expected = case.expect("forward", x, w)
    out, x, w = (guarded(array, at_end) for array in (np.zeros(expected.shape, np.float32), x, w))
    plan = case.plan("forward", np.float32, algorithm="direct")
    with guarded_scratch(at_end):
        case.run("forward", x, w, plan, out=out)
    assert_accurate(out, expected, np.float32)


@given(case=direct_cases((5, 40), 4, 6, 24), dtype=st.sampled_from(DTYPES), rng=generators())
def test_many_filters(case, dtype, rng):
    check(case, dtype, rng)


@given(case=direct_cases((5, 40), 4, 3, 90), dtype=st.sampled_from(DTYPES), rng=generators())
def test_many_filters_on_wide_images(case, dtype, rng):
    check(case, dtype, rng)


@pytest.mark.skipif(not matrix_unit.is_available(), reason="no matrix unit here")
@given(case=direct_cases((5, 40), 4, 40, 40), run=st.sampled_from([1, 3, 24]), rng=generators())
def test_many_filters_on_the_matrix_unit(case, run, rng):
    """All steps of a sum at once, or in runs."""
    with mock.patch.object(split_dense, "WORTHWHILE", math.inf), mock.patch.object(split_dense, "_RUN", run):
        check(case, np.float32, rng)


@pytest.mark.skipif(not matrix_unit.is_available(), reason="no matrix unit here")
@pytest.mark.parametrize(
    "case",
    [
        Case((3, 100, 14, 14), (40, 100, 3, 3), padding=1),
        Case((2, 100, 15, 17), (33, 100, 3, 3), stride=2, padding=1),
        Case((1, 64, 20, 19), (20, 64, 5, 5)),
    ],
    ids=repr,
)
def test_runs_of_the_matrix_unit(case, rng):
    """Of more steps than one run has, of several blocks of pixels: sums are begun, and go on, to the same bits."""
    x, w = case.operands("forward", np.float32, rng)
    with mock.patch.object(split_dense, "WORTHWHILE", math.inf):
        record = split_dense.cut(
            case.plan("forward", np.float32, algorithm="direct").geometry, np.dtype(np.float32)
        ).record
        assert record["run"] < record["steps"]
        assert_accurate(found := run(case, x, w), case.expect("forward", x, w), np.float32)
        for cache in (split_dense.cut, split_dense._program):
            cache.cache_clear()
        with mock.patch.object(split_dense, "_RUN", 10**6):
            np.testing.assert_array_equal(run(case, x, w), found)
        for cache in (split_dense.cut, split_dense._program):
            cache.cache_clear()


def planned_last(case, dtype):
    """The plan that reads arrays whose channels come last, None if there is none."""
    geometry = replace(case.plan("forward", dtype, algorithm="direct").geometry, channels_last=True)
    return make_plan(geometry, "forward", np.dtype(dtype), "direct") if last.fits(geometry, np.dtype(dtype)) else None


def run_last(case, x, w, bias=None, activation=None):
    plan = planned_last(case, x.dtype)
    kernels = registry.get("direct").prepare(plan, w)
    x = scratch.result(plan.geometry.input_shape, x.dtype) if x.size == 0 else np.moveaxis(x, 1, -1).copy()
    result, _ = run_forward(plan, x, kernels, bias, "zeros", activation)
    return np.moveaxis(result, -1, 1)


@pytest.mark.parametrize("filters", ["depthwise", "many"])
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_channels_last(filters, data, dtype, rng):
    case = data.draw(direct_cases((8, 70), 4, 12, 40) if filters == "many" else direct_cases((1, 1), 9, 1, 50))
    if filters == "depthwise":
        groups = data.draw(st.integers(1, 70))
        size, kernel = case.input_size, case.weight_size[2:]
        case = Case(
            (size[0], groups, *size[2:]), (groups, 1, *kernel), case.stride, case.padding, case.dilation, groups
        )
    assume(planned_last(case, dtype) is not None)
    x, w = case.operands("forward", dtype, rng)
    bias = rng.standard_normal(case.weight_size[0]).astype(dtype)
    expected = case.expect("forward", x, w, bias=bias, activation="relu")
    assert_accurate(run_last(case, x, w, bias, "relu"), expected, dtype)


LAST = [
    Case((1, 40, 9, 11), (40, 1, 3, 3), padding=1, groups=40),
    Case((2, 20, 40, 70), (20, 1, 3, 5), padding=2, stride=(1, 2), groups=20),  # whose pixels are not copied
    Case((1, 33, 60, 9), (33, 1, 7, 7), padding=3, groups=33),
    Case((1, 20, 3, 4), (20, 1, 2, 2), stride=(1, 30), padding=(0, 8), groups=20),  # more padding than is read
    Case((1, 4, 3, 4), (20, 4, 2, 2), stride=(1, 30), padding=(0, 8)),
    Case((3, 5, 9, 7), (37, 5, 1, 1)),
    Case((1, 12, 17, 23), (90, 4, 3, 3), padding=(0, 2), dilation=(1, 2), groups=3),
    Case((1, 3, 33, 40), (32, 3, 3, 3), padding=1, stride=2),
]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("case", LAST)
def test_channels_last_touch_nothing_beyond_their_arrays(case, at_end, rng):
    x, w = case.operands("forward", np.float32, rng)
    bias = rng.standard_normal(case.weight_size[0]).astype(np.float32)
    plan = planned_last(case, np.float32)
    kernels = registry.get("direct").prepare(plan, w)
    y = guarded(np.zeros(plan.geometry.output_shape, np.float32), at_end)
    x_last, bias = guarded(np.moveaxis(x, 1, -1).copy(), at_end), guarded(bias, at_end)
    with guarded_scratch(at_end):
        registry.get("direct").forward(plan, plan.geometry, x_last, kernels, bias, False, y)
    assert_accurate(np.moveaxis(y, -1, 1), case.expect("forward", x, w, bias=bias), np.float32)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", LAST)
def test_bits_of_channels_last_do_not_depend_on_threads(case, rng):
    x, w = case.operands("forward", np.float32, rng)
    found = []
    for count in (1, 2, 3):
        nbfftconv.set_num_threads(count)
        found.append(run_last(case, x, w).tobytes())
    assert len(set(found)) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("case", LAST)
def test_channels_last_contain_what_is_not_finite(case, where, value, rng):
    x, w = case.operands("forward", np.float32, rng, positive=True)
    (x if where == "input" else w)[0, 0, 0, 0] = value
    assert_accurate_where_finite(run_last(case, x, w), case.expect("forward", x, w), np.float32)


@pytest.mark.parametrize("weight_size", [(40, 1, 3, 3), (64, 40, 3, 3), (40, 40, 1, 1)])
def test_channels_last_of_no_images(weight_size):
    case = Case((0, 40, 9, 11), weight_size, groups=40 // weight_size[1])
    x, w = np.ones(case.input_size, np.float32), np.ones(weight_size, np.float32)
    assert run_last(case, x, w).shape == case.output_size
    assert run(case, x, w).shape == case.output_size


def test_channels_last_of_far_taps_are_left_to_others():
    """They would need much memory."""
    assert planned_last(Case((1, 99, 2000, 2000), (99, 1, 3, 3), dilation=900, groups=99), np.float32) is None
    assert planned_last(Case((1, 99, 2000, 2000), (40, 99, 3, 3), dilation=900), np.float32) is None


@pytest.mark.parametrize(
    ("case", "lanes"),
    [
        (Case((2, 30, 9, 7), (20, 30, 1, 1)), "of a plane"),
        (Case((2, 30, 40, 70), (20, 15, 1, 1), groups=2), "of a plane"),
        (Case((2, 30, 9, 14), (20, 30, 1, 1), padding=1), "of a row"),
        (Case((1, 3, 20, 15), (20, 3, 3, 3), padding=1), "of a row"),
        (Case((1, 3, 31, 32), (20, 3, 3, 3), padding=1), "of a row"),
        (Case((1, 3, 60, 61), (20, 3, 4, 3), stride=(3, 2), padding=1), "of a row"),
        (Case((1, 3, 60, 61), (20, 3, 1, 1), stride=9), "of a row"),  # a window of every ninth pixel
        (Case((1, 30, 60, 61), (90, 30, 1, 1), stride=9), "gathered"),  # 7 lanes of a vector, for many filters
        (Case((1, 9, 24, 24), (90, 9, 3, 3), padding=1), "gathered"),  # half of a second vector, for many filters
        (Case((1, 9, 24, 24), (15, 9, 3, 3), padding=1), "of a row"),  # for few
        (Case((1, 64, 56, 56), (64, 64, 2, 2), stride=2), "gathered"),  # taps that share no pixels
        (Case((1, 3, 60, 400), (20, 3, 3, 3), stride=9), "gathered"),  # too large a stride
        (Case((1, 1, 2100, 900), (20, 1, 3, 3), dilation=(1040, 400)), "gathered"),  # too large a window
    ],
    ids=repr,
)
def test_what_lanes_are(case, lanes, rng):
    """In float32 with vectors of 16 lanes; other widths have the same results."""
    check(case, np.float32, rng)
    plan = case.plan("forward", np.float32, algorithm="direct")
    record = dense.cut(plan.geometry, plan.dtype).record
    kinds = {"is_flat": "of a plane", "phases": "of a row"}
    found = next((kind for field, kind in kinds.items() if record[field]), "gathered")
    if simd.lanes(np.float32) == 16:
        assert found == lanes


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("case", "is_dense"),
    [
        (Case((1, 40, 512, 256), (9, 40, 1, 1)), True),
        (Case((1, 30, 200, 512), (16, 30, 3, 3), padding=1), True),  # sums of two blocks
        (Case((1, 2, 256, 1280), (20, 2, 3, 3), stride=(1, 5), padding=1), True),  # gathered for every tap
        (Case((2, 5, 256, 512), (5, 1, 3, 3), padding=1, groups=5), False),
        (Case((1, 90, 300, 512), (8, 90, 3, 3), padding=1), False),  # the same
    ],
    ids=repr,
)
def test_large_outputs_go_past_the_caches(case, is_dense, relu, monkeypatch, rng):
    """With the same bits; only where rows begin at cache lines."""
    monkeypatch.setattr(split_dense, "WORTHWHILE", 0)
    x, w = case.operands("forward", np.float32, rng)
    geometry = case.plan("forward", np.float32, algorithm="direct").geometry
    assert depthwise.fits(geometry, x.dtype) != is_dense
    kernels = direct.pack(geometry, w)
    bias = rng.standard_normal(case.weight_size[0]).astype(np.float32)
    streamed, program_of = [], block.program_of

    def noted(stage, record, *rest):
        program = program_of(stage, record, *rest)
        streamed.append(record["stream"])
        return program

    for module in (dense, depthwise):
        monkeypatch.setattr(module, "program_of", noted)
        module._program.cache_clear()
    monkeypatch.setattr(block, "_STREAMED_BYTES", 2**22)
    size = geometry.output_size
    memory = scratch.aligned(4 * math.prod(size) + 4).array
    results = []
    for offset in (0, 4):
        y = np.ndarray(size, np.float32, memory, offset)
        y[...] = np.nan
        direct.forward(geometry, x, w, kernels, bias, relu, y)
        results.append(y.copy())
    assert streamed == [True, False]
    np.testing.assert_array_equal(*results)
    assert_accurate(
        results[0], case.expect("forward", x, w, bias=bias, activation="relu" if relu else None), np.float32
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("kernel", range(1, 13))
def test_every_length_of_a_run_of_taps(kernel, groups, dtype, rng):
    check(Case((1, groups, 21, 37), (groups, 1, kernel, kernel), padding=kernel // 2, groups=groups), dtype, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 300, 7, 7), (70, 300, 1, 1)),  # blocks along the channels
        Case((1, 50, 9, 8), (33, 50, 3, 3), padding=1),  # cut within a channel
        Case((1, 2, 20, 20), (350, 2, 15, 15)),  # cut within a kernel
        Case((1, 3, 60, 70), (200, 3, 3, 3), stride=2),  # strips of pixels, chunks of filters
        Case((1, 2, 6, 2200), (2, 1, 3, 3), padding=1, groups=2),  # tiles side by side
        Case((1, 2, 700, 40), (4, 1, 5, 5), padding=2, groups=2),  # tiles one below the other
        Case((1, 90, 90, 70), (2, 90, 3, 3), padding=1),  # channels gathered in several turns
        Case((1, 1, 300, 1), (1, 1, 9, 1), dilation=(33, 1)),  # rows of a block far apart
        Case((1, 1, 9, 900), (1, 1, 9, 9), dilation=(1, 100), padding=4),
        Case((1, 1, 1100, 300), (1, 1, 300, 200), dilation=(3, 1)),  # too large a window
        Case((2, 3, 20, 20), (3, 1, 3, 3), stride=(9, 7), groups=3, padding=1),  # too large a stride
        Case((1, 3, 64, 64), (20, 3, 16, 16), stride=16),
    ],
    ids=repr,
)
def test_blocks(case, dtype, rng):
    check(case, dtype, rng)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("filters", [2, 19])
def test_bias_and_relu_come_once(filters, activation, dtype, rng):
    """Also where sums are begun in one turn and ended in another; a NaN passes."""
    case = Case((2, 80, 20, 35), (filters, 80, 3, 3), padding=1)
    x, w = case.operands("forward", dtype, rng)
    bias = rng.standard_normal(filters).astype(dtype) * 20
    x[1, 3, 4, 5], w[-1, 70, 1, 1] = np.nan, np.inf
    expected = case.expect("forward", x, w, bias=bias, activation=activation)
    assert_accurate_where_finite(run(case, x, w, bias, activation), expected, dtype)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 6])
def test_a_padded_zero_times_an_infinite_weight(groups, stride, rng):
    case = Case((1, 6, 20, 20), (42, 6 // groups, 5, 5), stride=stride, padding=2, groups=groups)
    x, w = case.operands("forward", np.float32, rng, positive=True)
    w[::3, 0, 0, 4] = np.inf
    assert_accurate_where_finite(run(case, x, w), case.expect("forward", x, w), np.float32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("filters", [1, 25])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_nothing_beyond_the_arrays_is_touched(stride, filters, at_end, rng):
    case = Case((1, 3, 19, 21), (3 * filters, 1, 3, 5), stride=stride, padding=2, groups=3)
    x, w = case.operands("forward", np.float32, rng)
    bias = rng.standard_normal(3 * filters).astype(np.float32)
    expected = case.expect("forward", x, w, bias=bias)
    out = guarded(np.zeros(expected.shape, np.float32), at_end)
    x, w, bias = (guarded(array, at_end) for array in (x, w, bias))
    plan = case.plan("forward", np.float32, algorithm="direct")
    assert case.run("forward", x, w, plan, bias=bias, out=out) is out
    assert_accurate(out, expected, np.float32)


@pytest.mark.parametrize("filters", [1, 16])  # to a group
def test_the_plan_tells_the_memory(filters):
    """A thread needs no more, however large the image and however far the taps are apart."""
    for size, kernel, dilation in ((10**5, 3, 1), (10**5, 63, 10**3), (2000, 1500, 1)):
        case = Case((1, 4, size, size), (4 * filters, 1, kernel, kernel), dilation=dilation, groups=4)
        for dtype in DTYPES:
            plan = case.plan("forward", dtype, algorithm="direct")
            assert 0 < plan.scratch_bytes <= 2**19
            packed = direct.pack(plan.geometry, np.ones(case.weight_size, dtype)) if kernel < 100 else None
            if packed is not None:
                assert plan.weight_bytes == packed.array.nbytes
            elif depthwise.fits(plan.geometry, plan.dtype):
                assert plan.weight_bytes == 0
            assert str(plan.scratch_bytes) in repr(plan)


@pytest.mark.parametrize("filters", [4, 24])
def test_a_layer_packs_its_kernels_once(filters, monkeypatch, rng):
    packed = []
    pack = direct.pack
    monkeypatch.setattr(direct, "pack", lambda *arguments: packed.append(1) or pack(*arguments))
    case = Case((1, 4, 12, 12), (filters, 4, 3, 3), padding=1)
    x, w = case.operands("forward", np.float32, rng)
    layer = nbfftconv.Conv2d(w, padding=1)
    layer.algorithm = "direct"
    for weight in (w, w[::-1]):
        layer.weight = weight
        for _ in range(3):
            y = layer(x)
            assert_accurate(y, case.expect("forward", x, weight), np.float32)
            layer.backward(y)
    assert len(packed) == 4  # for the forward pass and, transposed, for the backward pass


# The gradient with respect to the kernels ------------------------------------------------------------


def check_grad_weight(case, dtype, rng, threads=(1,)):
    """As accurate as ever, and the same bits on any number of threads."""
    x, g, expected = case.operands_and_expected("grad_weight", dtype, rng)
    plan = case.plan("grad_weight", dtype, algorithm="direct")
    results = []
    for count in threads:
        nbfftconv.set_num_threads(count)
        results.append(case.run("grad_weight", x, g, plan))
    assert_accurate(results[0], expected, dtype)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@given(case=direct_cases((1, 6), 9, 3, 70), dtype=st.sampled_from(DTYPES), rng=generators())
def test_grad_weight_of_few_filters(case, dtype, rng):
    check_grad_weight(case, dtype, rng)


@given(case=direct_cases((5, 60), 4, 12, 24), dtype=st.sampled_from(DTYPES), rng=generators())
def test_grad_weight_of_many_filters(case, dtype, rng):
    check_grad_weight(case, dtype, rng)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case((0, 3, 8, 8), (20, 3, 3, 3)),  # no pixel
        Case((50, 70, 4, 4), (50, 70, 1, 1)),  # several images in a band
        Case((7, 3, 9, 9), (33, 3, 2, 2)),  # blocks of the last band larger than the others'
        Case((1, 150, 9, 8), (200, 150, 3, 3), padding=1),  # chunks of taps, cut within a channel, and of filters
        Case((2, 2, 20, 20), (350, 2, 15, 15)),
        Case((1, 64, 90, 40), (24, 64, 3, 3), padding=1),  # bands one below the other
        Case((1, 4, 6, 700), (34, 2, 3, 3), padding=1, groups=2),  # bands side by side
        Case((2, 6, 40, 41), (24, 6, 1, 1), stride=(3, 2)),  # only every other pixel is gathered
        Case((2, 6, 40, 41), (24, 6, 4, 3), stride=(2, 4), dilation=(4, 6)),
        Case((1, 3, 9, 3), (8, 3, 9, 3), dilation=1, padding=0),  # one pixel
        Case((1, 9, 40, 1300), (8, 9, 3, 3), dilation=(9, 600)),  # fewer taps in an item for a large window
        Case((1, 1, 2100, 900), (4, 1, 3, 3), dilation=(1040, 400)),  # too large a window
        Case((1, 1, 300, 300), (4, 1, 3, 3), padding=((140, 0), (0, 150))),  # bands of nothing but padding
    ],
    ids=repr,
)
def test_grad_weight_in_blocks(case, dtype, rng):
    check_grad_weight(case, dtype, rng, threads=(1, 2, 3))


def test_what_grad_weight_is_for():
    """The geometries above are cut as they say."""
    for case, is_dense in (
        (Case((1, 1, 300, 300), (4, 1, 3, 3), padding=((140, 0), (0, 150))), True),
        (Case((1, 9, 40, 1300), (8, 9, 3, 3), dilation=(9, 600)), True),
        (Case((1, 1, 2100, 900), (4, 1, 3, 3), dilation=(1040, 400)), False),
        (Case((1, 64, 9, 9), (64, 1, 3, 3), groups=64), False),
    ):
        plan = case.plan("grad_weight", np.float32, algorithm="direct")
        assert dense_grad_weight.fits(plan.geometry, plan.dtype) == is_dense


def test_sums_over_many_pixels_keep_their_digits(rng):
    """As many terms of one sign as would cost one chain of additions in float32 three digits."""
    case = Case((4, 1, 400, 400), (32, 1, 1, 1))
    x, g = case.operands("grad_weight", np.float32, rng, positive=True)
    actual = case.run("grad_weight", x, g, case.plan("grad_weight", np.float32, algorithm="direct"))
    np.testing.assert_allclose(actual, case.expect("grad_weight", x, g), rtol=2e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_padded_zero_times_an_infinite_gradient(groups, stride, rng):
    case = Case((2, 6, 20, 20), (42, 6 // groups, 5, 5), stride=stride, padding=2, groups=groups)
    x, g = case.operands("grad_weight", np.float32, rng, positive=True)
    g[0, ::3, 0, 0] = np.inf
    actual = case.run("grad_weight", x, g, case.plan("grad_weight", np.float32, algorithm="direct"))
    assert_accurate_where_finite(actual, case.expect("grad_weight", x, g), np.float32)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("filters", [1, 25])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_grad_weight_touches_nothing_beyond_its_arrays(stride, filters, at_end, rng):
    case = Case((2, 9, 19, 21), (3 * filters, 3, 3, 5), stride=stride, padding=2, groups=3)
    x, g, expected = case.operands_and_expected("grad_weight", np.float32, rng)
    result = guarded(np.zeros(expected.shape, np.float32), at_end)
    plan = case.plan("grad_weight", np.float32, algorithm="direct")
    direct.grad_weight(plan.geometry, guarded(x, at_end), result, guarded(g, at_end))
    assert_accurate(result, expected, np.float32)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("filters", [1, 16])  # to a group
@pytest.mark.parametrize(("size", "kernel"), [((3, 8, 30, 20), 3), ((1, 8, 300, 200), 1), ((1, 300, 9, 9), 5)])
def test_the_plan_of_grad_weight_tells_the_memory(size, kernel, filters, monkeypatch, rng):
    nbfftconv.set_num_threads(3)
    workers, _ = get_workers()
    case = Case(size, (4 * filters, size[1] // 4, kernel, kernel), groups=4)
    x, g = case.operands("grad_weight", np.float32, rng)
    plan = case.plan("grad_weight", np.float32, algorithm="direct")
    borrowed = []
    borrow = scratch.borrow
    monkeypatch.setattr(scratch, "borrow", lambda nbytes, *rest: borrowed.append(nbytes) or borrow(nbytes, *rest))
    direct.grad_weight(plan.geometry, x, np.empty(case.weight_size, np.float32), g)
    assert sum(borrowed) == workers * plan.scratch_bytes + plan.weight_bytes
    assert (plan.scratch_bytes > 0) == (filters > 1)


LONG = [
    Case((2, 6, 40, 41), (12, 6, 3, 3), padding=1),
    Case((1, 30, 9, 9), (8, 30, 5, 5)),
    Case((3, 8, 33, 30), (8, 1, 7, 7), padding=3, groups=8),
    Case((2, 9, 50, 37), (3, 9, 11, 9), padding=2, stride=2),
    Case((2, 4, 30, 31), (4, 2, 4, 3), groups=2, stride=(3, 2), dilation=(2, 1), padding=(4, 1)),
    Case((1, 2, 64, 64), (40, 2, 31, 31), padding=15),
    Case((60, 48, 12, 12), (96, 2, 3, 3), padding=1, groups=24),
    Case((60, 4, 12, 12), (16, 4, 3, 3), padding=1),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_long_work_is_cut_and_has_the_same_bits(direction, dtype, monkeypatch, rng):
    """Limits of a work item are made small; then there are more items, or turns of them."""
    modules = dense, depthwise, dense_grad_weight
    caches = dense.cut, dense._program, depthwise._record, depthwise._program, dense_grad_weight._record
    work, make = [], threads.TaskTable.__init__

    def noted(table, tasks):
        tasks = list(tasks)
        work.append(sum(task.items for task in tasks))
        make(table, tasks)

    monkeypatch.setattr(threads.TaskTable, "__init__", noted)

    def results():
        for cache in caches:
            cache.cache_clear()
        work.clear()
        found = []
        for case in LONG:
            plan = case.plan(direction, dtype, algorithm="direct", transposed=False)
            found.append(case.run(direction, *case.operands(direction, dtype, np.random.default_rng(3)), plan))
        return found, list(work)

    expected, few = results()
    try:
        with monkeypatch.context() as patch:
            for module in modules:
                patch.setattr(module, "MOST_PRODUCTS", 20_000)
            patch.setattr(gradients, "_MOST_PRODUCTS", 500)
            found, many = results()
    finally:
        for cache in caches:
            cache.cache_clear()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    more = [b > a for a, b in zip(few, many, strict=True)]
    assert more[-2:] == [True, True] if direction == "grad_weight" else sum(more) >= 4  # images in turns
