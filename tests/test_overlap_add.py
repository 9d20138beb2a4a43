"""The gradient at the input added up tile after tile: in parts, in blocks, in a buffer or in place."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_accurate
from geometries import Case, cases, generators, in_blocks, tilings
from hypothesis import given
from hypothesis import strategies as st

import nbfftconv
from nbfftconv import scratch
from nbfftconv.passes import grad_input as grad_input_pass

TILES = [("fftw", (20, 18)), ("fftw", (10, 31)), ("codelet", (12, 13)), ("four_step", (30, 40))]


@pytest.fixture(params=["buffer", "in place"])
def plane_bytes(request, monkeypatch):
    """Whether an image is summed up in a buffer, or is too large for it."""
    if request.param == "in place":
        monkeypatch.setattr(grad_input_pass, "_PLANE_BYTES", 1000)


def full_of_nan(nbytes, spare=0.0, aligned=scratch.aligned):
    """Memory as it may be borrowed: what is neither cleared nor written shows."""
    memory = aligned(nbytes)
    memory.array[...] = 255
    return memory


@pytest.mark.usefixtures("plane_bytes")
@pytest.mark.parametrize(("transform", "tile"), TILES)
@pytest.mark.parametrize("channels", [1, 5, 12, 24])
@pytest.mark.parametrize(("images", "height"), [(1, 90), (2, 50), (3, 33), (5, 24)])
def test_few_channels(images, height, channels, transform, tile, monkeypatch, rng):
    """Parts of the rows of tiles begin and end amid images."""
    case = Case((images, channels, height, 33), (2, channels, 9, 8), padding=((4, 2), (0, 5)))
    w, g, expected = case.operands_and_expected("grad_input", np.float32, rng)
    plan = case.plan("grad_input", np.float32, transposed=False, transform=transform, tile=tile)
    monkeypatch.setattr(scratch, "aligned", full_of_nan)
    monkeypatch.setattr(scratch, "borrow", full_of_nan)
    monkeypatch.setattr(scratch, "_SMALL_RESULT", 1)
    for block_tiles in (3, 16, 10**6):
        dx = case.run("grad_input", w, g, in_blocks(plan, block_tiles))
        assert_accurate(dx, expected, np.float32)


@pytest.mark.usefixtures("plane_bytes")
@pytest.mark.parametrize(("transform", "tile"), TILES)
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 3)},
        {"stride": (3, 1), "dilation": (1, 2)},
        {"dilation": 2},
        {"stride": 4, "dilation": 2, "padding": 3},
        {"stride": 9, "padding": 1},  # pixels that no tile reaches
    ],
    ids=repr,
)
def test_samples_that_are_apart(options, transform, tile, monkeypatch, rng):
    """Nothing is cleared row by row."""
    case = Case((2, 3, 50, 41), (4, 3, 5, 4), **options)
    w, g, expected = case.operands_and_expected("grad_input", np.float32, rng)
    plan = case.plan("grad_input", np.float32, transposed=False, transform=transform, tile=tile)
    monkeypatch.setattr(scratch, "aligned", full_of_nan)
    monkeypatch.setattr(scratch, "borrow", full_of_nan)
    monkeypatch.setattr(scratch, "_SMALL_RESULT", 1)
    for block_tiles in (5, 10**6):
        dx = case.run("grad_input", w, g, in_blocks(plan, block_tiles))
        assert_accurate(dx, expected, np.float32)


@given(
    data=st.data(),
    case=cases(max_size=60, max_kernel=13, max_products=300_000),
    dtype=st.sampled_from((np.float32, np.float64)),
    items=st.sampled_from((1, 7, 24, 200)),
    plane_bytes=st.sampled_from((0, 2**20)),
    block_tiles=st.integers(1, 60),
    rng=generators(),
)
def test_any_parts(data, case, dtype, items, plane_bytes, block_tiles, rng):
    w, g, expected = case.operands_and_expected("grad_input", dtype, rng)
    plan = case.plan("grad_input", dtype, transposed=False, **data.draw(tilings(case, most=8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grad_input_pass, "_ITEMS", items)
        patch.setattr(grad_input_pass, "_PLANE_BYTES", plane_bytes)
        patch.setattr(scratch, "_SMALL_RESULT", 1)
        patch.setattr(scratch, "borrow", full_of_nan)
        dx = case.run("grad_input", w, g, in_blocks(plan, block_tiles))
    assert_accurate(dx, expected, dtype)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(("transform", "tile"), TILES)
def test_neither_parts_nor_threads_nor_the_buffer_change_a_bit(transform, tile, monkeypatch, rng):
    case = Case((3, 2, 60, 50), (4, 2, 9, 8), padding=4)
    w, g = case.operands("grad_input", np.float32, rng)
    plan = case.plan("grad_input", np.float32, transposed=False, transform=transform, tile=tile)
    found = set()
    for items in (1, 5, 24):
        for plane_bytes in (0, 2**20):
            for threads in (1, 2, 3):
                monkeypatch.setattr(grad_input_pass, "_ITEMS", items)
                monkeypatch.setattr(grad_input_pass, "_PLANE_BYTES", plane_bytes)
                nbfftconv.set_num_threads(threads, threads)
                found.add(case.run("grad_input", w, g, plan).tobytes())
    assert len(found) == 1
