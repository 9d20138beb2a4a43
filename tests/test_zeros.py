"""Where every product is zero, results are zero, or the bias, to the last bit: by any transform, in any pass."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
from geometries import WAYS, Case, cases, generators, shared_steps, tilings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import nbfftconv
from nbfftconv import threads
from nbfftconv.passes import blank_windows, unmet_weights

DTYPES = (np.float32, np.float64)


def blank_but_a_patch(array: NDArray, rng: np.random.Generator) -> None:
    """One rectangle of each image is left, a letterbox or a pixel."""
    for image in array:
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, size + 1, 2)) for size in image.shape[1:])
        kept = image[:, y0:y1, x0:x1].copy()
        image[...] = 0
        image[:, y0:y1, x0:x1] = kept


def blank_patch(array: NDArray, rng: np.random.Generator) -> None:
    for image in array:
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, size + 1, 2)) for size in image.shape[1:])
        image[:, y0:y1, x0:x1] = 0


def blank_rows_and_columns(array: NDArray, rng: np.random.Generator) -> None:
    array[:, :, rng.random(array.shape[2]) < 0.7] = 0
    array[..., rng.random(array.shape[3]) < 0.3] = 0


def dead_channels(array: NDArray, rng: np.random.Generator) -> None:
    array[rng.random(array.shape[:2]) < 0.5] = 0


def rectified(array: NDArray, rng: np.random.Generator) -> None:
    array[array < rng.normal()] = 0


def scattered(array: NDArray, rng: np.random.Generator) -> None:
    """Few values are not zero; some zeros are negative."""
    array[rng.random(array.shape) < 0.97] = 0
    array[rng.random(array.shape) < 0.5] *= -1


def one_tap(array: NDArray, rng: np.random.Generator) -> None:
    """Of kernels, as Dirac's; of images, one pixel that is the same in all."""
    y, x = (rng.integers(size) for size in array.shape[2:])
    kept = array[..., y, x].copy()
    array[...] = 0
    array[..., y, x] = kept


def nothing(array: NDArray, rng: np.random.Generator) -> None:
    array[...] = 0


def dense(array: NDArray, rng: np.random.Generator) -> None:
    pass


ZEROS = [
    blank_but_a_patch, blank_patch, blank_rows_and_columns, dead_channels, rectified, scattered, one_tap, nothing,
    dense,
]  # fmt: skip


def check(
    result: NDArray, expected: NDArray, products: NDArray, operands: tuple[NDArray, NDArray], untouched: Any = 0
) -> None:
    """`products` counts those that are not zero; `untouched` is what is left where there are none."""
    left = np.broadcast_to(np.asarray(untouched, result.dtype), result.shape)
    np.testing.assert_array_equal(result[products == 0], left[products == 0])
    # Of sparse operands the largest result may be near zero: the error is relative to what a transform spreads.
    scale = np.linalg.norm(operands[0]) * np.linalg.norm(operands[1]) + np.abs(left).max(initial=0)
    assert np.abs(result - expected).max(initial=0) <= 16 * np.finfo(result.dtype).eps * scale


@st.composite
def problems(draw) -> tuple[Case, dict[str, Any]]:
    case = draw(cases(max_size=40, max_kernel=12, max_products=2_000_000, max_multiplier=20))
    return case, draw(tilings(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@given(
    problem=problems(), zeros=st.tuples(*[st.sampled_from(ZEROS)] * 2), fused=st.booleans(),
    blocks=st.sampled_from([None, 1, 3]), rng=generators(),
)  # fmt: skip
def test_any_pass(direction, transposed, dtype, problem, zeros, fused, blocks, rng):
    case, tiling = problem
    a, b = case.operands(direction, dtype, rng)
    for operand, blank in zip((a, b), zeros, strict=True):
        blank(operand, rng)
    plan = case.plan(
        direction, dtype, transposed=transposed, fused=fused, block_tiles=blocks, **tiling
    )  # fmt: skip
    result = case.run(direction, a, b, plan)
    check(result, case.expect(direction, a, b), case.expect(direction, a != 0, b != 0), (a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@given(problem=problems(), zeros=st.tuples(*[st.sampled_from(ZEROS)] * 3), rng=generators(), limit=st.booleans())
def test_steps_of_layers(dtype, problem, zeros, rng, limit):
    """Bias, ReLU, and both gradients of what ReLU passed; spectra are shared."""
    case, tiling = problem
    x, w = case.operands("forward", dtype, rng)
    g = rng.standard_normal(case.output_size).astype(dtype)
    bias = rng.standard_normal(case.weight_size[0]).astype(dtype)
    for operand, blank in zip((x, w, g), zeros, strict=True):
        blank(operand, rng)
    layer = nbfftconv.Conv2d(w, bias, **case.options, padding_mode=case.padding_mode, activation="relu")
    layer.algorithm, layer.spectra_limit = "fft", layer.spectra_limit * limit
    with shared_steps(block_tiles=2, **tiling):
        y = layer(x)
        dx = layer.backward(g)
    left = np.maximum(bias, 0)[:, None, None]
    expected = case.expect("forward", x, w, bias=bias, activation="relu")
    check(y, expected, case.expect("forward", x != 0, w != 0), (x, w), left)
    g = np.where(y > 0, g, 0)
    check(dx, case.expect("grad_input", w, g), case.expect("grad_input", w != 0, g != 0), (w, g))
    check(layer.weight_grad, case.expect("grad_weight", x, g), case.expect("grad_weight", x != 0, g != 0), (x, g))
    sums = g.sum(axis=(0, 2, 3), dtype=np.float64)
    check(layer.bias_grad, sums, (g != 0).sum(axis=(0, 2, 3)), (g, np.ones(g.size)))


# More channels than a set has bits, images wider than a run, several blocks of rows, and one kernel as large as each.
LARGE = [
    Case((1, 70, 9, 150), (3, 70, 3, 3), padding=1),
    Case((2, 130, 12, 12), (40, 65, 2, 3), padding=2, groups=2),
    Case((1, 1, 130, 70), (2, 1, 63, 35), padding="same"),
    Case((1, 2, 3, 400), (3, 2, 1, 200), padding=((0, 0), (199, 0))),
    Case((1, 9, 80, 41), (9, 9, 3, 3), stride=3, dilation=2, padding=4),
    Case((1, 8, 100, 100), (8, 8, 2, 2), dilation=40, padding=3),
]


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_larger_sizes(case, direction, transposed, zeros, rng):
    a, b = case.operands(direction, np.float32, rng)
    zeros(a, rng)
    blank_patch(b, rng)
    plan = case.plan(direction, np.float32, algorithm="fft", transposed=transposed, transform="fftw")
    result = case.run(direction, a, b, plan)
    check(result, case.expect(direction, a, b), case.expect(direction, a != 0, b != 0), (a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 1), (1, 7), (1, 1)])
def test_taps_that_only_padding_meets(size, dtype, rng):
    case = Case((3, 4, *size), (6, 4, 3, 3), padding=1)
    x, g = case.operands("grad_weight", dtype, rng)
    plan = case.plan("grad_weight", dtype, algorithm="fft")
    result = case.run("grad_weight", x, g, plan)
    met = case.expect("grad_weight", x != 0, g != 0) > 0
    assert not met.all()
    assert (result[~met] == 0).all() and (result[met] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", ["fftw", "codelet"])
def test_pixels_that_no_output_reads(dtype, transform, rng):
    case = Case((2, 3, 20, 23), (5, 3, 3, 3), stride=4)
    w, g = case.operands("grad_input", dtype, rng)
    result = case.run("grad_input", w, g, case.plan("grad_input", dtype, algorithm="fft", transform=transform))
    read = case.expect("grad_input", w != 0, g != 0) > 0
    assert not read.all()
    assert (result[~read] == 0).all() and (result[read] != 0).all()


@pytest.mark.parametrize(("channels", "size", "kernel", "patch"), [(64, 56, 3, 14), (16, 40, 7, 9), (3, 64, 5, 20)])
def test_relu_passes_what_direct_convolution_passes(channels, size, kernel, patch, rng):
    """A patch on blank images, without a bias: gradients were off by a factor of 3."""
    x = np.zeros((2, channels, size, size), np.float32)
    x[:, :, patch : 2 * patch, patch : 2 * patch] = rng.standard_normal((2, channels, patch, patch))
    w = rng.standard_normal((channels, channels, kernel, kernel)).astype(np.float32)
    layer = nbfftconv.Conv2d(w, np.zeros(channels, np.float32), padding="same", activation="relu")
    layer.algorithm = "fft"
    y = layer(x)
    expected = oracle.conv2d(x, w, padding="same")
    # sums that happen to be near zero may fall on either side, but not those of zeros alone
    is_near = (expected != 0) & (np.abs(expected) < 1e-5 * np.abs(expected).max())
    assert (((y > 0) == (expected > 0)) | is_near).all()
    layer.backward(np.ones_like(y))
    off = np.abs(layer.bias_grad - (expected > 0).sum(axis=(0, 2, 3)))
    assert (off <= is_near.sum(axis=(0, 2, 3))).all()
    assert is_near.mean() < 1e-3


@pytest.mark.parametrize("direction", ["forward", "grad_weight", "grad_input"])
def test_outliers_beside_blanks(direction, rng):
    """What is not finite multiplies zeros, too, and reaches what would be exactly zero."""
    case = Case((2, 3, 30, 30), (4, 3, 5, 5), padding=2)
    a, b = case.operands(direction, np.float32, rng)
    a[..., 3:, :] = 0
    a[0, 0, 0, 0], b[-1, 0, -1, -1] = np.inf, np.nan
    result = case.run(direction, a, b, case.plan(direction, np.float32, algorithm="fft"))
    expected, products = case.expect(direction, a, b), case.expect(direction, a != 0, b != 0)
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    assert (result[(products == 0) & (expected == 0)] == 0).all()


def items_of(run: Callable[[], NDArray], most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, NDArray]:
    """Work items and the result of a pass whose items look at so many pairs at most."""
    count, inner = 0, threads.TaskTable._run_rows

    def counted(table: threads.TaskTable, words: array[int], rows: range) -> None:
        nonlocal count
        count += sum(words[row + 2] for row in rows)
        inner(table, words, rows)

    caches = blank_windows._numbers, unmet_weights._numbers
    with monkeypatch.context() as patch:
        patch.setattr(threads.TaskTable, "_run_rows", counted)
        for module, cache in zip((blank_windows, unmet_weights), caches, strict=True):
            patch.setattr(module, "_MOST_PAIRS", most)
            cache.cache_clear()
        result = run()
    for cache in caches:
        cache.cache_clear()
    return count, result


@pytest.mark.parametrize("zeros", [blank_patch, scattered, blank_rows_and_columns])
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 9, 14, 15), (10, 9, 3, 2), padding=1),
        Case((2, 4, 40, 9), (6, 2, 5, 3), padding=2, groups=2),
        Case((1, 70, 9, 9), (3, 70, 3, 3), padding=2),
    ],
    ids=str,
)
def test_long_work_is_cut(case, direction, transposed, zeros, rng, monkeypatch):
    """Signals are answered between items: in as many as there can be, results are the same to the last bit."""
    a, b = case.operands(direction, np.float32, rng)
    zeros(a, rng)
    zeros(b, rng)
    a[..., (a.shape[2] + 1) // 2 :, :] = 0  # of gradients at weights, operands that hardly meet
    b[..., : b.shape[2] // 2, :] = 0
    plan = case.plan(direction, np.float32, algorithm="fft", transposed=transposed)
    few, whole = items_of(lambda: case.run(direction, a, b, plan), 2**40, monkeypatch)
    many, cut = items_of(lambda: case.run(direction, a, b, plan), 1, monkeypatch)
    np.testing.assert_array_equal(cut.view(np.uint32), whole.view(np.uint32))
    check(cut, case.expect(direction, a, b), case.expect(direction, a != 0, b != 0), (a, b))
    assert many > few


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("transform", "tile"), [("fftw", (37, 15)), ("codelet", (32, 16)), ("four_step", (40, 30))])
def test_gradients_that_are_zero_have_no_sign(transform, tile, dtype, rng):
    """A zero of a gradient is +0, as in direct convolution, wherever the inverse transform left -0."""
    case = Case((4, 5, 1, 1), (7, 5, 9, 13), padding=(13, 6), dilation=(3, 1))
    x = np.zeros(case.input_size, dtype)
    x[1, 2], x[3, 0] = 0.5, -0.25
    g = rng.standard_normal(case.output_size).astype(dtype)
    g[:, ::2] = 0
    plan = case.plan("grad_weight", dtype, algorithm="fft", transform=transform, tile=tile)
    found = case.run("grad_weight", x, g, plan)
    zeros = found == 0
    assert zeros.any() and not zeros.all()
    assert not np.signbit(found[zeros]).any()
