"""Forward passes fused in a core's cache: the oracle's values, and the bits of every other way to cut the work."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_accurate, assert_accurate_where_finite
from geometries import (
    FEW_TAPS,
    FOUR_STEP_TILES,
    Case,
    cases,
    codelet_tiles,
    four_step_tiles,
    generators,
    tiles,
    winograd_tiles,
)
from hypothesis import given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import simd, threads
from nbfftconv.passes.context import Context
from nbfftconv.passes.plan import filters_of_block
from nbfftconv.threads import get_counts

TRANSFORMS = {"fftw": tiles, "codelet": codelet_tiles, "four_step": four_step_tiles, "winograd": winograd_tiles}
DTYPES = (np.float32, np.float64)


def lanes_of(transform, dtype):
    return simd.lanes(dtype) if transform in ("codelet", "winograd") else 1


@st.composite
def fused(draw, transform, dtype):
    """A case with up to 6 channels and 40 filters a group, and the choices of a plan in blocks of 1 to 7 units."""
    max_kernel = FEW_TAPS if transform == "winograd" else 15
    case = draw(cases(max_size=60, max_kernel=max_kernel, max_products=3_000_000, max_multiplier=40))
    tile = draw(TRANSFORMS[transform](case))
    block_tiles = draw(st.integers(1, 7)) * lanes_of(transform, dtype)
    return case, {"transform": transform, "tile": tile, "block_tiles": block_tiles}


def with_threads(count, function):
    counts = get_counts()
    nbfftconv.set_num_threads(count)
    try:
        return function()
    finally:
        nbfftconv.set_num_threads(*counts)


def assert_same_bits(case, operands, choices, dtype, extras):
    """Return the result of a fused plan, after a comparison with other threads and blocks, and stage after stage."""
    plan = case.plan("forward", dtype, fused=True, **choices)
    assert plan.fused
    result = with_threads(1, lambda: case.run("forward", *operands, plan, **extras))
    others = [(2, plan), (3, plan)]
    others.append((2, case.plan("forward", dtype, fused=True, **choices | {"block_tiles": plan.grid.tiles})))
    others += [(count, case.plan("forward", dtype, fused=False, **choices)) for count in (1, 2)]
    for count, other in others:
        found = with_threads(count, lambda other=other: case.run("forward", *operands, other, **extras))
        np.testing.assert_array_equal(found, result, err_msg=f"{count} threads, {other}")
    return result


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry(transform, data, dtype, rng):
    case, choices = data.draw(fused(transform, dtype))
    x, w, expected = case.operands_and_expected("forward", dtype, rng)
    result = assert_same_bits(case, (x, w), choices, dtype, {})
    assert_accurate(result, expected, dtype)

    bias = rng.uniform(-1, 1, case.weight_size[0]).astype(dtype) * dtype(np.abs(expected).max())
    extras = {"bias": bias, "activation": data.draw(st.sampled_from((None, "relu")))}
    before = expected + bias.astype(np.float64)[:, None, None]
    result = assert_same_bits(case, (x, w), choices, dtype, extras)
    after = np.maximum(before, 0) if extras["activation"] else before
    np.testing.assert_allclose(result, after, rtol=0, atol=np.abs(before).max() * (2e-5, 1e-12)[dtype is np.float64])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [1, 15, 17, 39, 40])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_filter_blocks(transform, dtype, filters, depth, rng):
    """Filters in one block or several, of which the last is not full, in two groups; a rest of tiles."""
    kernel = (3, 2) if transform == "winograd" else (3, 4)
    case = Case((2, 2 * depth, 61, 70), (2 * filters, depth, *kernel), padding=1, groups=2)
    block = filters_of_block(filters, depth, lanes_of(transform, dtype))
    assert (block < filters) == (filters > 8 * max(depth, lanes_of(transform, dtype) // 8))
    x, w, expected = case.operands_and_expected("forward", dtype, rng)
    tile = {"fftw": (24, 18), "codelet": (12, 16), "four_step": FOUR_STEP_TILES[0], "winograd": (6, 3)}[transform]
    choices = {"transform": transform, "tile": tile, "block_tiles": 4 * lanes_of(transform, dtype)}
    bias = rng.standard_normal(2 * filters).astype(dtype)
    result = assert_same_bits(case, (x, w), choices, dtype, {"bias": bias})
    assert_accurate(result, expected + bias.astype(np.float64)[:, None, None], dtype)


@pytest.mark.parametrize("transform", ["codelet", "winograd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", [1, 16, 100])
def test_filters_are_shared_out_where_tiles_do_not_feed_all_threads(transform, dtype, filters, monkeypatch, rng):
    """Of one block of tiles, each work item has whole vectors of filters."""
    case, lanes = Case((1, 30, 8, 8), (filters, 30, 3, 3), padding=1), simd.lanes(dtype)
    choices = {"transform": transform, "tile": (6, 6) if transform == "winograd" else (8, 8), "fused": True}
    plan = case.plan("forward", dtype, **choices, block_tiles=lanes)
    x, w, expected = case.operands_and_expected("forward", dtype, rng)
    results = []
    for count in (1, 2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(threads, "get_workers", lambda _, count=count: (count, count))
            block = Context(plan, plan.geometry).filter_block
        assert block == filters if count == 1 else block % lanes == 0 or block == filters
        assert -(-filters // block) >= min(count, -(-filters // lanes) // 2)
    for count in (1, 2, 3):
        results.append(with_threads(count, lambda: case.run("forward", x, w, plan)))
        np.testing.assert_array_equal(results[0], results[-1])
    assert_accurate(results[0], expected, dtype)


@pytest.mark.parametrize("transform", TRANSFORMS)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    values=st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), min_size=1, max_size=3, unique=True),
    counts=st.tuples(st.integers(0, 3), st.integers(0, 2)).filter(any),
    rng=generators(),
)
def test_values_that_are_not_finite(transform, data, dtype, values, counts, rng):
    case, choices = data.draw(fused(transform, dtype))
    x, w = case.operands("forward", dtype, rng, positive=True)
    for array, count in zip((x, w), counts, strict=True):
        array.reshape(-1)[rng.choice(array.size, min(count, array.size), replace=False)] = rng.choice(values)
    activation = data.draw(st.sampled_from((None, "relu")))
    extras = {"bias": rng.uniform(0.5, 1.5, case.weight_size[0]).astype(dtype), "activation": activation}
    plan = case.plan("forward", dtype, fused=True, **choices)
    expected = case.expect("forward", x, w, **extras)
    results = [with_threads(count, lambda: case.run("forward", x, w, plan, **extras)) for count in (1, 2)]
    assert_accurate_where_finite(results[0], expected, dtype)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 24, 56, 56), (24, 1, 31, 31), padding=15, groups=24),
        Case((1, 16, 128, 128), (16, 1, 31, 31), padding=15, groups=16),
        Case((1, 3, 120, 120), (24, 3, 11, 11), padding=5),
    ],
    ids=repr,
)
def test_the_planner_fuses_depthwise_layers_and_few_channels(case, dtype, rng):
    plan = case.plan("forward", dtype)
    assert plan.algorithm == "fft" and plan.fused and plan.block_tiles >= 1
    assert "fused" in repr(plan)
    assert not case.plan("grad_weight", dtype).fused
    assert case.plan("grad_input", dtype).fused == (case.groups > 1)  # few filters, which are its channels
    deep = Case((1, 64, 56, 56), (64, 64, 7, 7), padding=3).plan("forward", dtype)
    assert not deep.fused
    x, w = case.operands("forward", dtype, rng)
    expected = case.expect("forward", x, w)
    assert_accurate(case.run("forward", x, w), expected, dtype)
    w, g, expected = case.operands_and_expected("grad_input", dtype, rng)
    assert_accurate(case.run("grad_input", w, g), expected, dtype)
    # a NaN in the middle of one image is seen by the outputs that it reaches
    x[0, 1, 50, 50] = np.nan
    assert_accurate_where_finite(case.run("forward", x, w), case.expect("forward", x, w), dtype)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("limit", [40 << 10, 200 << 10, 4 << 20])
def test_a_block_fits_the_scratch_limit(transform, limit, restore_scratch_limit):
    nbfftconv.scratch.set_scratch_limit(limit)
    case = Case((4, 2, 90, 90), (16, 2, 5, 5))
    if transform == "winograd":
        case = Case((4, 2, 90, 90), (4, 2, 3, 3))  # a block has at least as many tiles as lanes
    tile = {"fftw": (36, 24), "codelet": (8, 8), "four_step": (30, 40), "winograd": (6, 6)}[transform]
    plan = case.plan("forward", np.float32, transform=transform, tile=tile)
    assert 0 < plan.scratch_bytes <= limit, plan
