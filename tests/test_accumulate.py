"""The products of spectra, complex and real, against NumPy in complex128."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from compare import ERROR_BOUND

from nbfftconv import simd, threads
from nbfftconv.accumulate import COMPLEX, REAL, Matrix, conjugate_product, panel_product, product
from nbfftconv.scratch import aligned
from nbfftconv.transforms import bin_stride

COLUMNS = range(1, 9)
BINS = 2


class Spectra:
    """Spectra of some units and channels; what is none of theirs is NaN, and must stay as it is."""

    def __init__(self, rng, real, blocking, units, channels):
        self.lanes = simd.lanes(real)
        self.bin = int(bin_stride(channels, blocking.entry_bytes))
        shape = units, BINS, self.bin // blocking.entry_bytes, blocking.vectors, self.lanes
        self.array = rng.standard_normal(shape).astype(real)
        self.array[:, :, channels:] = np.nan
        self.lane_block = BINS * self.bin
        assert self.array.strides[:3] == (self.lane_block, self.bin, blocking.entry_bytes)

    def values(self):
        """In complex128, as [lane block, bin, channel, lane]."""
        imaginary = self.array[..., 1, :] if self.array.shape[-2] == 2 else np.zeros_like(self.array[..., 0, :])
        return self.array[..., 0, :] + 1j * imaginary.astype(np.float64)


def tiles(rng, real, blocking, groups, units, channels, lane_block_index, channel_index):
    """Spectra of tiles: an operand, and its entries as [group, bin, lane block, channel, lane]."""
    spectra = Spectra(rng, real, blocking, units, groups * channels)
    distance = {lane_block_index: spectra.lane_block, channel_index: blocking.entry_bytes}
    matrix = Matrix(
        real,
        spectra.array.ctypes.data,
        group=channels * blocking.entry_bytes,
        row=distance["row"],
        column=distance.get("column", np.dtype(real).itemsize),
        bin=spectra.bin,
        lane_axis="column" if lane_block_index == "tile" else None,
        vectors=spectra.lane_block,
        blocking=blocking,
    )

    def entries():
        values = spectra.values()[:, :, : groups * channels]
        return values.reshape(units, BINS, groups, channels, -1).transpose(2, 1, 0, 3, 4)

    return SimpleNamespace(matrix=matrix, entries=entries, array=spectra.array)


def kernels(rng, real, blocking, groups, filters, depth, filter_index, in_lanes):
    """Spectra of kernels: an operand, and its entries as [group, bin, filter, channel, lane]."""
    lanes = simd.lanes(real) if in_lanes else 1
    units = -(-filters // lanes)
    spectra = Spectra(rng, real, blocking, groups * units, depth)
    if in_lanes and filters % lanes:
        spectra.array.reshape(groups, units, *spectra.array.shape[1:])[:, -1, ..., filters % lanes :] = np.nan
    distance = {"row": blocking.entry_bytes, "column": blocking.entry_bytes}
    distance[filter_index] = np.dtype(real).itemsize if in_lanes else spectra.lane_block
    matrix = Matrix(
        real,
        spectra.array.ctypes.data,
        group=units * spectra.lane_block,
        **distance,
        bin=spectra.bin,
        lane_axis=filter_index if in_lanes else None,
        vectors=spectra.lane_block,
        blocking=blocking,
    )

    def entries():
        values = spectra.values()[:, :, :depth].reshape(groups, units, BINS, depth, -1)
        if not in_lanes:
            return values.transpose(0, 2, 1, 3, 4)
        values = values.transpose(0, 2, 1, 4, 3).reshape(groups, BINS, units * lanes, depth, 1)
        return values[:, :, :filters]

    return SimpleNamespace(matrix=matrix, entries=entries, array=spectra.array)


def assert_equal(actual, expected, real):
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= ERROR_BOUND[np.dtype(real)] * max(1, np.abs(expected).max())


def nan_count(array):
    return np.count_nonzero(np.isnan(array))


def matmul(subscripts, a, b):
    return np.einsum(subscripts, a, b, optimize=True)


def sizes(blocking):
    """Every number of rows with every number of columns, and each number of columns with every depth."""
    depth, item_rows = blocking.depth, blocking.item_rows
    depths = (1, 15, 16, depth - 1, depth, depth + 1, 2 * depth + 1)
    many_rows = (*range(1, 41), item_rows - 1, item_rows, item_rows + 1, 2 * item_rows + 5)
    for rows, columns in itertools.product(many_rows, COLUMNS):
        if rows > 40 and columns % 3 != 1:
            continue
        depth = depths[(rows + columns) % len(depths)]
        yield 1 + (rows + columns // 2) % 2 if rows <= 40 else 1, rows, columns, depth


@pytest.mark.parametrize("real", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("blocking", "in_lanes"), [(COMPLEX, False), (COMPLEX, True), (REAL, True)], ids=["frequencies", "complex", "real"]
)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])  # threads: half of the sizes each
class TestProducts:
    def test_forward(self, real, blocking, in_lanes, workers, rng):
        """C = conj(A) · B over channels."""
        for groups, rows, columns, depth in itertools.islice(sizes(blocking), workers - 1, None, 2):
            a = kernels(rng, real, blocking, groups, rows, depth, "row", in_lanes)
            b = tiles(rng, real, blocking, groups, columns, depth, "row", "column")
            c = tiles(rng, real, blocking, groups, columns, rows, "column", "row")
            rest = nan_count(c.array)
            shape = groups, rows, columns, depth, BINS
            threads.run(conjugate_product(a.matrix, b.matrix, c.matrix, shape, workers))
            expected = matmul("gsirl,gsjrl->gsjil", a.entries().conj(), b.entries())
            assert_equal(c.entries(), expected, real)
            assert nan_count(c.array) == rest

    def test_grad_input(self, real, blocking, in_lanes, workers, rng):
        """C = A · B over filters."""
        for groups, rows, columns, depth in itertools.islice(sizes(blocking), workers - 1, None, 2):
            a = kernels(rng, real, blocking, groups, depth, rows, "column", in_lanes)
            b = tiles(rng, real, blocking, groups, columns, depth, "row", "column")
            c = tiles(rng, real, blocking, groups, columns, rows, "column", "row")
            rest = nan_count(c.array)
            shape = groups, rows, columns, depth, BINS
            threads.run(product(a.matrix, b.matrix, c.matrix, shape, workers))
            expected = matmul("gsril,gsjrl->gsjil", a.entries(), b.entries())
            assert_equal(c.entries(), expected, real)
            assert nan_count(c.array) == rest

    def test_grad_weight(self, real, blocking, in_lanes, workers, rng):
        """C = conj(A) · B over tiles, then C += conj(A) · B; of tiles in lanes, the last unit need not be full."""
        lanes = simd.lanes(real)
        panels = aligned(workers * blocking.panel_bytes)
        for groups, rows, columns, depth in itertools.islice(sizes(blocking), workers - 1, None, 2):
            c = kernels(rng, real, blocking, groups, rows, columns, "row", in_lanes)
            rest = nan_count(c.array[:, :, columns:])
            expected = 0
            for add in (False, True):
                axis, units = ("tile", -(-depth // lanes)) if in_lanes else ("column", depth)
                a = tiles(rng, real, blocking, groups, units, rows, axis, "row")
                b = tiles(rng, real, blocking, groups, units, columns, axis, "row")
                shape = groups, rows, columns, depth, BINS
                if in_lanes:
                    for operand in (a, b):
                        operand.array[-1, ..., depth - (units - 1) * lanes :] = np.nan
                    threads.run(panel_product(a.matrix, b.matrix, c.matrix, shape, panels, workers, add))
                else:
                    threads.run(conjugate_product(a.matrix, b.matrix, c.matrix, shape, workers, add))
                a, b = a.entries(), b.entries()
                if in_lanes:
                    used = np.arange(units * lanes).reshape(units, 1, lanes) < depth
                    a, b = np.where(used, a, 0), np.where(used, b, 0)
                subscripts = "gsril,gsrjl->gsij" if in_lanes else "gsril,gsrjl->gsijl"
                products = matmul(subscripts, a.conj(), b)
                expected = expected + (products[..., None] if in_lanes else products)
            assert_equal(c.entries(), expected, real)
            assert nan_count(c.array[:, :, columns:]) == rest


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [0, 1, 4])
def test_few_rows_of_b_whose_entries_are_broadcast(real, columns, rng):
    """Of tiles in lanes, of which the last lane block has few: C = A · B of those, too, with lanes of filters."""
    lanes, few = simd.lanes(real), min(3, simd.lanes(real) - 1)
    for groups, rows, depth in ((1, 5, 7), (2, 2 * lanes + 1, 70), (1, REAL.item_rows + 3, 2 * REAL.depth + 1)):
        a = kernels(rng, real, REAL, groups, rows, depth, "row", True)
        b = tiles(rng, real, REAL, groups, columns + 1, depth, "row", "column")
        c = tiles(rng, real, REAL, groups, max(1, columns), rows, "column", "row")
        vectors = -(-rows // lanes)
        found = np.full((BINS, groups, few, vectors, lanes), np.nan, real)
        last = b.matrix.address + columns * b.matrix.row
        few_b = replace(b.matrix, address=last, row=np.dtype(real).itemsize)
        few_c = Matrix(
            real, found.ctypes.data, group=found.strides[1], row=found.strides[2], column=found.strides[3],
            bin=found.strides[0], blocking=REAL,
        )  # fmt: skip
        shape = groups, rows, columns, depth, BINS
        threads.run(conjugate_product(a.matrix, b.matrix, c.matrix, shape, 2, few=(few_b, few_c, few)))
        expected = matmul("gsirl,gsjrl->gsjil", a.entries(), b.entries()).real
        if columns:
            assert_equal(c.entries().real, expected[:, :, :columns], real)
        filters = found.transpose(1, 0, 2, 3, 4).reshape(groups, BINS, few, -1)[..., :rows]
        assert_equal(filters, expected[:, :, columns, :, :few].transpose(0, 1, 3, 2), real)
