"""Spectra of kernels, against numpy.fft, and of tiles: written past the caches or not."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_accurate
from geometries import CODELET_TILES, Case
from numpy.testing import assert_array_equal

import nbfftconv
from nbfftconv import simd
from nbfftconv.passes import to_spectra
from nbfftconv.passes.context import Context
from nbfftconv.passes.to_spectra import add_to_spectra, transform_weight

DTYPES = (np.float32, np.float64)
# filters that leave lanes of the last lane block empty, in groups, and phases of kernels
CASES = [
    Case((1, 3, 40, 40), (19, 3, 3, 5)),
    Case((1, 4, 40, 40), (34, 2, 7, 1), groups=2),
    Case((1, 3, 40, 40), (5, 3, 7, 8), stride=(2, 1)),
    Case((1, 3, 40, 40), (5, 3, 8, 7), stride=(3, 2)),
]


def values(plan, weight):
    """Kernels' spectra as [lane block, bin, channel, (re, im), lane]."""
    made = transform_weight(plan, weight).spectra
    depth = weight.shape[1] * plan.grid.channel_phases
    shape = -1, made.lane_block // made.bin, depth | 1, 2, simd.lanes(weight.dtype.type)
    return made.array.view(weight.dtype).reshape(shape)[:, :, :depth]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", CODELET_TILES)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_codelets_with_few_rows(rows, tile, dtype, rng):
    case = Case((1, 2, 40, 40), (21, 2, rows, 5))
    weight = rng.standard_normal(case.weight_size).astype(dtype)
    plan = case.plan("forward", dtype, algorithm="fft", transform="codelet", tile=tile)
    expected = np.fft.fft2(weight.astype(np.float64), tile)
    found = values(plan, weight)
    # all frequencies of a column, or half of those of the real columns 0 and width/2
    height, width = tile
    columns = [expected[:, :, : height // 2 + 1 if 2 * k % width == 0 else height, k] for k in range(width // 2 + 1)]
    expected = np.concatenate(columns, axis=2)
    found = found.transpose(0, 4, 2, 3, 1).reshape(-1, 2, 2, expected.shape[2])[: len(weight)]
    assert_accurate(found, np.stack([expected.real, expected.imag], axis=2), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("transform", "tile"), [("codelet", (12, 16)), ("four_step", (30, 36)), ("fftw", (21, 17))])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_streamed_or_not(case, transform, tile, dtype, rng, monkeypatch):
    weight = rng.standard_normal(case.weight_size).astype(dtype)
    plan = case.plan("forward", dtype, algorithm="fft", transform=transform, tile=tile)
    stored = values(plan, weight).copy()
    monkeypatch.setattr(to_spectra, "_STREAMED_BYTES", 0)
    assert_array_equal(values(plan, weight), stored)
    weight[-1, -1, -1, -1] = np.nan  # is taken as zero in its lane block
    assert np.isfinite(values(plan, weight)).all()


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["input", "output"])
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 5, 30, 33), (7, 5, 3, 3), padding=1),  # odd numbers of channels: the last line of a bin is not full
        Case((2, 6, 30, 33), (9, 2, 3, 1), groups=3),
        Case((1, 3, 40, 41), (4, 3, 4, 5), stride=2),
    ],
    ids=repr,
)
def test_tiles_streamed_or_not(case, name, dtype, rng, monkeypatch):
    """Of real spectra, whose channels share cache lines where vectors are narrow."""
    plan = case.plan("grad_weight", dtype, algorithm="winograd")
    array = rng.standard_normal(case.input_size if name == "input" else case.output_size).astype(dtype)

    def found():
        context = Context(plan, plan.geometry)
        spectra = getattr(context, f"{name}_spectra")()
        spectra.array.view(dtype)[:] = np.nan
        for _ in context.blocks():
            assert context.lane_blocks == context.all_lane_blocks
            add_to_spectra(context, name, array, spectra)
            assert len(context.tasks) == 1
        context.run()
        shape = context.all_lane_blocks, context.bins, spectra.bin // context.entry, context.lanes
        values = spectra.array[: np.prod(shape) * dtype().itemsize].view(dtype).reshape(shape)
        view = context.views[name]
        return values[:, :, : view.channels * view.channel_phases].copy()

    stored = found()
    assert np.isfinite(stored).all()
    monkeypatch.setattr(to_spectra, "_STREAMED_BYTES", 0)
    for threads in (1, 3):
        nbfftconv.set_num_threads(threads)
        assert_array_equal(found(), stored)
