"""Products on the matrix unit: of spectra and of pixels, against NumPy in float64; its emitters with NumPy's arrays."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import oracle
import pytest
from compare import assert_accurate_where_finite
from guard import guarded, guarded_scratch
from hypothesis import given
from hypothesis import strategies as st
from numpy_emitter import NumpyEmitter

import nbfftconv
from nbfftconv import matrix_unit, split_product, threads
from nbfftconv.accumulate import REAL, Matrix
from nbfftconv.direct import dense, split_dense
from nbfftconv.scratch import aligned

needs_the_unit = pytest.mark.skipif(not matrix_unit.is_available(), reason="no matrix unit here")

#: Of the largest value, of which float32 has 6e-8 as the rounding of each sum.
BOUND = 1.5e-6
SIZES = {"rows": st.integers(1, 70), "columns": st.integers(1, 5), "depth": st.integers(1, 300)}


def halves(values):
    """Numbers whose upper halves are so many bits."""
    return (np.asarray(values, np.uint16).astype(np.uint32) << 16).view(np.float32)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
def test_three_parts_are_the_number(values):
    values = np.array(values, np.float32)
    values = values[(np.abs(values) < 3e38) & ((values == 0) | (np.abs(values) > 2.0**-100))]
    values = np.pad(values, (0, 16 - len(values)))
    v = NumpyEmitter(np.float32, 64)
    parts = [part.lanes for part in matrix_unit.split(v, v.vector(values))]
    assert all((part.view(np.uint32) & 0xFFFF == 0).all() for part in parts)
    np.testing.assert_array_equal(sum(part.astype(np.float64) for part in parts), values.astype(np.float64))


def test_emitters_multiply_matrices(rng):
    a, b = (rng.standard_normal((16, 64)).astype(np.float32) for _ in range(2))  # [row, r] and [column, r]
    start = rng.standard_normal((16, 16)).astype(np.float32)
    v = NumpyEmitter(np.float32, 64)
    packed_a, packed_b, c, memory = v.reserve(2, 768), v.reserve(2, 768), v.put(start), v.reserve(16)
    rows, pairs = v.put(a), v.put(b.T)
    for step in range(2):
        at = rows + 128 * step
        pack, whole = matrix_unit._packing_emitter(is_pairs=False, is_whole=True), (16, 16, 16, 16)
        pack(v, at, at + 64, 256, *whole, packed_a + 3072 * step)
        at = pairs + 64 * 32 * step
        matrix_unit._packing_emitter(is_pairs=True, is_whole=True)(v, at, at + 64, 128, *whole, packed_b + 3072 * step)
    matrix_unit._emit_begin(v, memory)
    matrix_unit._emit_multiply(v, packed_a, 0, packed_b, 0, c, 64, 0, 0, 2, 1, 64, 0, 64, 0, 1, 1)
    matrix_unit._emit_end(v)
    expected = start + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(v.get(c, 16, 16), expected, rtol=0, atol=BOUND * np.abs(expected).max())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_emitters_pack_windows_and_multiply_them(rng, step):
    """Two rows of 40 pixels, of which 3 on the left and 5 on the right are zeros of the padding."""
    channels, row = 32, 48
    v = NumpyEmitter(np.float32, 64)
    pixels = rng.standard_normal((channels, 2, 32 * step)).astype(np.float32)
    pixels[-1] = np.nan  # a channel that is not there
    images, part = v.put(pixels), 16 * 2 * row * 4 + 64
    window, plane = v.reserve(3 * part // 4), 2 * row * 4
    for pair in range(16):
        a = images + (2 * pair * 2 * 32 - 3) * step * 4
        begin, end = (3 * step, 35 * step) if step < 3 else (3, 35)
        split_dense._pack_emitter(step if step < 3 else 0)(
            v, a, a + 2 * 32 * step * 4, 32 * step * 4, step * 4, begin, end, 1, int(pair < 15), 0,
            window + pair * plane, row * 4, part, 2, 3,
        )  # fmt: skip
    w = rng.standard_normal((16, channels)).astype(np.float32)
    rows, packed, sums, table, memory = v.put(w), v.reserve(768), v.reserve(16, 32), v.reserve(4), v.reserve(16)
    pack, whole = matrix_unit._packing_emitter(is_pairs=False, is_whole=True), (16, 16, 16, 16)
    pack(v, rows, rows + 64, 128, *whole, packed)
    v.store_integer(4 * 7, table)  # under the eighth pixel of a row
    matrix_unit._emit_begin(v, memory)
    matrix_unit._emit_multiply_window(
        v, packed, 0, table, window, plane, part, sums, 128, 1, 0, 64, 1, 64, 64, 1, 2
    )  # fmt: skip
    bias, y, largest = v.put(np.full(16, 0.5, np.float32)), v.reserve(16, 40), v.put(np.zeros(16, np.float32))
    split_dense._emit_write(v, sums, 128, y, 160, 2, 13, bias, 1, 16, largest)
    taken = np.zeros((channels, 2, row))
    taken[:, :, 3:35] = pixels[:, :, ::step]
    taken[-1] = 0
    products = w.astype(np.float64) @ taken.reshape(channels, -1)[:, 7:39]
    np.testing.assert_allclose(v.get(sums, 16, 32), products, rtol=0, atol=BOUND * np.abs(products).max())
    found = v.get(y, 16, 40)
    expected = np.maximum(products + 0.5, 0)[:, 2:13]
    np.testing.assert_allclose(found[:, 2:13], expected, rtol=0, atol=BOUND * np.abs(products).max())
    assert np.isnan(found[:, :2]).all() and np.isnan(found[:, 13:]).all()
    noted = np.abs(v.get(sums, 16, 32)[:, 2:13]).max()
    assert v.get(largest, 16).max() == noted


def multiplied(rng, groups, rows, columns, depth, nested, add=False, workers=2):
    """A product of real spectra, [group, bin, lane block of columns, row, lane], and what it should be."""
    bins, vectors = 2, -(-depth // 16)
    lane_blocks = -(-rows // 16)
    if nested:  # lanes are entries of the sum: A has the columns of C
        a = rng.standard_normal((groups, bins, vectors, columns * 16, 16), dtype=np.float32)
        b = rng.standard_normal((groups, bins, vectors, rows, 16), dtype=np.float32)
        of_columns = a.transpose(0, 1, 3, 2, 4).reshape(groups, bins, columns * 16, -1)[..., :depth].astype(float)
        of_rows = b.transpose(0, 1, 3, 2, 4).reshape(groups, bins, rows, -1)[..., :depth].astype(float)
        if depth % 16:  # what is no entry of the sum
            a[:, :, -1, :, depth % 16 :] = b[:, :, -1, :, depth % 16 :] = np.nan
    else:
        a = rng.standard_normal((groups, bins, lane_blocks, depth, 16), dtype=np.float32)
        b = rng.standard_normal((groups, bins, columns, depth, 16), dtype=np.float32)
        of_rows = a.transpose(0, 1, 2, 4, 3).reshape(groups, bins, -1, depth)[:, :, :rows].astype(float)
        of_columns = b.transpose(0, 1, 2, 4, 3).reshape(groups, bins, columns * 16, depth).astype(float)
    c = np.full((groups, bins, columns, rows, 16), 0.5, np.float32)
    expected = np.einsum("gbrd,gbcd->gbcr", of_rows, of_columns).reshape(groups, bins, columns, 16, rows)
    expected = expected.transpose(0, 1, 2, 4, 3) + 0.5 * add
    memory = aligned(workers * split_product.WORKER_BYTES)

    def matrix(array, row, column, lane_axis=None, vectors=0):
        return Matrix(
            np.float32, array.ctypes.data, array.strides[0], row, column, array.strides[1], lane_axis, vectors, REAL
        )

    if nested:
        of_a, of_b = (matrix(each, 64, 4, "column", each.strides[2]) for each in (a, b))
        of_c = matrix(c, 4, 64, "row", c.strides[2])
        shape = groups, columns * 16, rows, depth, bins
        task = split_product.panel_product(of_a, of_b, of_c, shape, memory, workers, add)
    else:
        of_a = matrix(a, 4, 64, "row", a.strides[2])
        of_b, of_c = matrix(b, b.strides[2], 64), matrix(c, 64, c.strides[2])
        task = split_product.product(of_a, of_b, of_c, (groups, rows, columns, depth, bins), memory, workers)
    threads.run(task)
    return c, expected


@needs_the_unit
@pytest.mark.parametrize("nested", [False, True])
@given(groups=st.integers(1, 2), **SIZES)
def test_products_of_spectra(nested, groups, rows, columns, depth):
    rng = np.random.default_rng(rows)
    for add in (False, True) if nested else (False,):
        found, expected = multiplied(rng, groups, rows, columns, depth, nested, add)
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * max(1, np.abs(expected).max()))


@needs_the_unit
@pytest.mark.parametrize("nested", [False, True])
def test_more_rows_and_a_longer_sum_than_are_packed_at_once(rng, nested):
    rows, depth = split_product.ITEM_ROWS + 24, 2 * split_product.MOST_DEPTH + 40
    found, expected = multiplied(rng, 1, rows, 3, depth, nested, add=nested)
    np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * np.abs(expected).max())


@needs_the_unit
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("rows", [31, 32, 63, 64, 96, 128, 200])
def test_columns_are_packed_while_others_are_multiplied(rng, rows, columns):
    """As many as there are calls for, of whole blocks of the sum."""
    for depth in (32, 96, 100):
        found, expected = multiplied(rng, 1, rows, columns, depth, nested=False)
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND * np.abs(expected).max())


@pytest.fixture
def whatever_pays(monkeypatch):
    """Let the unit do direct convolution of all sizes."""
    monkeypatch.setattr(split_dense, "WORTHWHILE", np.inf)


GEOMETRIES = [
    ((2, 64, 14, 14), (96, 64, 1, 1), {}),
    ((1, 40, 13, 45), (72, 40, 3, 3), {"padding": 1}),
    ((1, 256, 9, 9), (37, 256, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 128, 7, 30), (128, 64, 1, 5), {"groups": 2, "dilation": (1, 2)}),
    ((2, 3, 30, 31), (5, 3, 3, 3), {"stride": 2, "padding": 1}),
    ((1, 90, 5, 40), (33, 90, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    ((1, 7, 1, 1), (17, 7, 1, 1), {}),
    ((5, 64, 7, 7), (48, 64, 3, 3), {"padding": 1}),  # small images together
    ((1, 520, 3, 700), (20, 520, 1, 3), {"padding": (0, 1)}),  # tiles of a row, with padding on the left or the right
    ((1, 64, 70, 41), (40, 64, 3, 3), {"stride": (3, 4), "padding": 2, "dilation": (2, 3)}),  # phases of all pixels
    ((1, 64, 70, 41), (40, 64, 3, 3), {"stride": (4, 2), "padding": 40, "dilation": (6, 4)}),  # every second pixel
    ((2, 70, 40, 33), (40, 70, 2, 2), {"stride": 5}),
    ((1, 64, 40, 40), (400, 64, 5, 5), {"padding": 2}),  # kernels beyond the second-level cache
]


@needs_the_unit
@pytest.mark.usefixtures("whatever_pays")
@pytest.mark.parametrize(("input_size", "weight_size", "options"), GEOMETRIES)
@pytest.mark.parametrize("scale", [1.0, 1e-37, 1e30])
def test_direct_convolution(rng, input_size, weight_size, options, scale):
    x = rng.standard_normal(input_size, dtype=np.float32) * np.float32(scale)
    w, bias = rng.standard_normal(weight_size, dtype=np.float32), rng.standard_normal(weight_size[0]).astype(np.float32)
    bias *= np.float32(scale)
    y = nbfftconv.conv2d(x, w, bias, **options, algorithm="direct", activation="relu")
    expected = oracle.conv2d(x, w, bias, **options, activation="relu")
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND * np.abs(expected).max())


@needs_the_unit
@pytest.mark.usefixtures("whatever_pays")
def test_direct_convolution_of_volumes(rng):
    x, w = rng.standard_normal((2, 40, 6, 9, 11), dtype=np.float32), rng.standard_normal((24, 40, 3, 3, 3), np.float32)
    y = nbfftconv.conv3d(x, w, padding=1, stride=(2, 1, 1), algorithm="direct")
    expected = oracle.conv3d(x, w, padding=1, stride=(2, 1, 1))
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND * np.abs(expected).max())


@needs_the_unit
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_direct_convolution_of_what_has_no_parts(rng, value, where):
    x, w = rng.uniform(0.5, 1.5, (1, 64, 9, 33)).astype(np.float32), rng.uniform(0.5, 1.5, (64, 64, 3, 3))
    w = (w * 1e-3).astype(np.float32)
    (x if where == "input" else w)[0, 5, 1, 1] = value
    y = nbfftconv.conv2d(x, w, padding=1, algorithm="direct")
    expected = oracle.conv2d(x, w, padding=1)
    with np.errstate(over="ignore"):
        expected[np.abs(expected) > np.finfo(np.float32).max] *= np.inf
    assert_accurate_where_finite(y, expected, np.float32)


@needs_the_unit
@pytest.mark.usefixtures("whatever_pays")
@pytest.mark.parametrize(("input_size", "weight_size", "options"), GEOMETRIES)
def test_bits_do_not_depend_on_threads(rng, input_size, weight_size, options):
    x, w = rng.standard_normal(input_size, dtype=np.float32), rng.standard_normal(weight_size, dtype=np.float32)
    before, found = nbfftconv.threads.get_counts(), []
    try:
        for count in (1, 2, 3):
            nbfftconv.set_num_threads(count)
            found.append(nbfftconv.conv2d(x, w, **options, algorithm="direct").tobytes())
    finally:
        nbfftconv.set_num_threads(*before)
    assert len(set(found)) == 1


@needs_the_unit
@pytest.mark.usefixtures("whatever_pays")
@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize(
    ("input_size", "weight_size", "options"), [each for each in GEOMETRIES if "padding_mode" not in each[2]]
)
def test_direct_convolution_touches_nothing_beyond_its_memory(rng, input_size, weight_size, options, at_end):
    x, w = rng.standard_normal(input_size, dtype=np.float32), rng.standard_normal(weight_size, dtype=np.float32)
    expected = oracle.conv2d(x, w, **options)
    x, w, y = (guarded(each, at_end) for each in (x, w, np.zeros(expected.shape, np.float32)))
    with guarded_scratch(at_end):
        nbfftconv.conv2d(x, w, **options, algorithm="direct", out=y)
    np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND * np.abs(expected).max())


def test_the_system_may_refuse_the_unit(monkeypatch):
    class Refusing:
        def __init__(self, name):
            assert name is None

        def syscall(self, *arguments):
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Refusing)
    monkeypatch.setattr(matrix_unit, "TARGET", replace(matrix_unit.TARGET, has_matrix_unit=True))
    assert not matrix_unit.is_available.__wrapped__()


def test_without_the_unit_vectors_multiply(monkeypatch):
    monkeypatch.setattr(matrix_unit, "is_available", lambda: False)
    plan = nbfftconv.plan_conv2d((1, 256, 28, 28), (256, 256, 1, 1), algorithm="direct")
    assert not split_dense.fits(plan.geometry, plan.dtype)
    assert split_product.share_of_vectors(np.float32, 1, 512, 100, 512) == 1
    assert dense.cut(plan.geometry, plan.dtype).record["filters"] == 256
