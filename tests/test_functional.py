"""The three passes against three oracles: float64 loops, SciPy, and PyTorch where it is installed."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compare import assert_accurate, relative_error
from geometries import (
    ALGORITHMS,
    CODELET_TILES,
    DIRECTIONS,
    FEW_TAPS,
    FOUR_STEP_TILES,
    PADDING_MODES,
    ROW_TILES,
    WAYS,
    Case,
    cases,
    codelet_tiles,
    four_step_tiles,
    generators,
    has_few_taps,
    is_of_rows,
    of_one_row,
    refused_unless,
    tiles,
    winograd_tiles,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal

import nbfftconv
from nbfftconv.transforms.codelets import SIDES
from nbfftconv.transforms.four_step import SIDES as FOUR_STEP_SIDES
from nbfftconv.transforms.row_codelets import LENGTHS as ROW_CODELET_LENGTHS
from nbfftconv.transforms.row_four_step import MATRICES

DTYPES = (np.float32, np.float64)
CHOICES = {
    "auto": {},
    "fft": {"algorithm": "fft"},
    "fftw": {"algorithm": "fft", "transform": "fftw"},
    "direct": {"algorithm": "direct"},
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("choice", CHOICES)
@given(case=cases(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry(choice, direction, case, dtype, rng):
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    plan = case.plan(direction, dtype, **CHOICES[choice]) if choice != "auto" else None
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=500)  # whatever the profile
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_500_geometries(algorithm, data, dtype, rng):
    """All passes, or all are refused."""
    case = data.draw(cases(max_size=28, max_kernel=5 if algorithm == "winograd" else 12, max_products=100_000))
    for direction in DIRECTIONS:
        a, b, expected = case.operands_and_expected(direction, dtype, rng)
        with refused_unless(algorithm != "winograd" or has_few_taps(case)):
            assert_accurate(case.run(direction, a, b, algorithm=algorithm), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_with_any_tile(direction, data, dtype, rng):
    case = data.draw(cases())
    choices = {"algorithm": "fft", "tile": data.draw(tiles(case)), "transposed": data.draw(st.booleans())}
    plan = case.plan(direction, dtype, **choices)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(data=st.data(), case=cases(max_kernel=FEW_TAPS), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_by_winograd(direction, data, case, dtype, rng):
    choices = {"algorithm": "winograd", "tile": data.draw(st.none() | winograd_tiles(case))}
    plan = case.plan(direction, dtype, **choices, transposed=data.draw(st.booleans()))
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_with_codelets(direction, data, dtype, rng):
    case = data.draw(cases())
    tile, transposed = data.draw(codelet_tiles(case)), data.draw(st.booleans())
    plan = case.plan(direction, dtype, algorithm="fft", transform="codelet", tile=tile, transposed=transposed)
    assert (plan.transform, plan.tile) == ("codelet", tile)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        *CODELET_TILES,
        *(pytest.param(side, side, marks=pytest.mark.slow) for side in SIDES if (side, side) not in CODELET_TILES),
    ],
)
def test_every_codelet(height, width, dtype, direction, transposed, rng):
    """More filters, channels and tiles than a vector has lanes, and numbers that leave a rest."""
    case = Case((3, 5, 2 * height + 1, 3 * width - 2), (19, 5, 3, 4), padding=1)
    choices = {"transform": "codelet", "tile": (height, width), "transposed": transposed}
    plan = case.plan(direction, dtype, algorithm="fft", **choices)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("transform", ROW_TILES)
@given(data=st.data(), case=cases(max_kernel=9), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_with_transforms_of_rows(transform, direction, data, case, dtype, rng):
    """Whether images are sequences or not; a kernel of more rows is refused, unless each is in a phase of its own."""
    tile = data.draw(st.sampled_from(ROW_TILES[transform]))
    choices = {"transform": transform, "tile": tile, "transposed": data.draw(st.booleans())}
    if not is_of_rows(case):
        with pytest.raises(ValueError, match=transform):
            case.plan(direction, dtype, algorithm="fft", **choices)
        case = of_one_row(case)
    plan = case.plan(direction, dtype, algorithm="fft", **choices)
    assert (plan.transform, plan.tile) == (transform, tile)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize(
    ("transform", "length"),
    [
        ("row_codelet", 96),
        ("row_codelet", 240),
        ("row_four_step", 1920),
        pytest.param("row_codelet", 640, marks=pytest.mark.slow),
        pytest.param("row_four_step", 5120, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transforms_of_rows(dtype, direction, transposed, transform, length, rng):
    """More filters, channels and tiles than a vector has lanes, and a kernel nearly as long as the tile."""
    for taps, channels, filters in ((7, 5, 19), (length - 3, 2, 3)):
        case = Case((1, channels, 2, 7 * length - 2), (filters, channels, 1, taps), padding=(0, 2))
        choices = {"transform": transform, "tile": (1, length), "transposed": transposed}
        plan = case.plan(direction, dtype, algorithm="fft", **choices)
        a, b, expected = case.operands_and_expected(direction, dtype, rng)
        assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (3, 2), "padding": ((2, 30), (0, 0)), "groups": 2},
        {"dilation": (2, 5), "padding": (40, 0), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_images_of_one_column(options, dtype, direction, rng):
    """With kernels of many rows they are sequences, and a tile that is asked for is of the image as it was given."""
    case = Case((2, 4, 150, 1), (6, 4 // options.get("groups", 1), 40, 1), **options)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b), expected, dtype)
    choices = {"algorithm": "fft", "transform": "fftw", "tile": (90, 1)}
    plan = nbfftconv.plan_conv2d(
        case.input_size, case.weight_size, **case.options, direction=direction, dtype=dtype, **choices
    )
    assert plan.tile == (1, 90)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)
    if direction == "forward":
        last = nbfftconv.conv2d(
            np.moveaxis(a, 1, -1), b, **case.options, padding_mode=case.padding_mode, channels_last=True
        )
        assert_accurate(np.moveaxis(last, -1, 1), expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "length"),
    [
        *(("row_codelet", length) for length in ROW_CODELET_LENGTHS),
        *(("row_four_step", length) for length in {n1: n1 * n2 for n1, n2 in MATRICES.values()}.values()),
        *(("row_four_step", length) for length in {n2: n1 * n2 for n1, n2 in MATRICES.values()}.values()),
    ],
)
def test_every_transform_of_rows(transform, length, rng):
    for number, direction in enumerate(DIRECTIONS):
        dtype = DTYPES[(length + number) % 2]
        case = Case((2, 1, 1, 2 * length + 1), (1, 1, 1, 20), padding=(0, 9))
        plan = case.plan(direction, dtype, algorithm="fft", transform=transform, tile=(1, length))
        a, b, expected = case.operands_and_expected(direction, dtype, rng)
        assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_with_four_step_transforms(direction, data, dtype, rng):
    case = data.draw(cases())
    tile = data.draw(four_step_tiles(case))
    choices = {"transposed": data.draw(st.booleans()), "fused": data.draw(st.booleans())}
    plan = case.plan(direction, dtype, algorithm="fft", transform="four_step", tile=tile, **choices)
    assert (plan.transform, plan.tile) == ("four_step", tile)
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.parametrize(("direction", "transposed"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("height", "width"),
    [*FOUR_STEP_TILES[:2], *(pytest.param(*tile, marks=pytest.mark.slow) for tile in FOUR_STEP_TILES[2:])],
)
def test_four_step_tiles(height, width, dtype, direction, transposed, rng):
    """More filters and channels than a fused pass takes, and a kernel nearly as large as the tile."""
    for kernel in ((3, 4), (height - 2, width - 1)):
        case = Case((2, 17, height + 5, width + 4), (18, 17, *kernel), padding=(1, 0))
        choices = {"transform": "four_step", "tile": (height, width), "transposed": transposed}
        plan = case.plan(direction, dtype, algorithm="fft", **choices)
        assert not plan.fused
        a, b, expected = case.operands_and_expected(direction, dtype, rng)
        assert_accurate(case.run(direction, a, b, plan), expected, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FOUR_STEP_SIDES)), ids=lambda number: str(FOUR_STEP_SIDES[number]))
def test_every_four_step_side(number, rng):
    """Of columns and of rows: next to the last side, since each length is compiled."""
    height, width = FOUR_STEP_SIDES[number], FOUR_STEP_SIDES[number - 1]
    direction, dtype = DIRECTIONS[number % 3], DTYPES[number % 2]
    case = Case((1, 2, height + 5, width + 3), (2, 2, 5, 4), padding=1)
    plan = case.plan(direction, dtype, algorithm="fft", transform="four_step", tile=(height, width))
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    assert_accurate(case.run(direction, a, b, plan), expected, dtype)


def test_a_tile_leaves_nothing_behind(rng):
    """A large image after another in a thread's memory: the other's result as if it were alone, bit by bit."""
    for tile in FOUR_STEP_TILES:
        case = Case((2, 1, *tile), (1, 1, 3, 3))  # one tile an image, with outputs in its last vector
        plan = case.plan("forward", np.float32, algorithm="fft", transform="four_step", tile=tile)
        x, w = case.operands("forward", np.float32, rng)
        x[1] *= np.float32(1e6)
        after = case.run("forward", x, w, plan)[0]
        x[1] = 0
        np.testing.assert_array_equal(case.run("forward", x, w, plan)[0], after)


@given(case=cases(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_bias_and_relu(case, dtype, rng):
    x, w, _ = case.operands_and_expected("forward", dtype, rng)
    bias = rng.standard_normal(case.weight_size[0]).astype(dtype) * 3
    for activation in (None, "relu"):
        extras = {"bias": bias, "activation": activation}
        four_step = {"transform": "four_step", "tile": (40, 72)}
        for choice in ({"transform": "fftw"}, {"tile": (32, 32)}, four_step, {"algorithm": "direct"}):
            plan = case.plan("forward", dtype, **choice)
            actual = case.run("forward", x, w, plan, **extras)
            # Measured against the values before relu, which may leave nothing but small ones.
            before = case.expect("forward", x, w, bias=bias)
            scale = max(np.abs(before).max(), 1.0)
            expected = case.expect("forward", x, w, **extras)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=scale * (2e-5, 1e-12)[dtype is np.float64])


@given(case=cases(max_size=40, max_kernel=9), rng=generators())
def test_geometry_may_be_given_by_position(case, rng):
    """input, weight, bias, stride, padding, dilation, groups by position."""
    x, w, expected = case.operands_and_expected("forward", np.float64, rng)
    geometry = tuple(case.options.values())
    mode = {"padding_mode": case.padding_mode}
    assert_accurate(nbfftconv.conv2d(x, w, None, *geometry, **mode), expected, np.float64)
    x, g, expected = case.operands_and_expected("grad_weight", np.float64, rng)
    assert_accurate(nbfftconv.conv2d_weight(x, w.shape, g, *geometry, **mode), expected, np.float64)
    w, g, expected = case.operands_and_expected("grad_input", np.float64, rng)
    assert_accurate(nbfftconv.conv2d_input(x.shape, w, g, *geometry, **mode), expected, np.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
@given(case=cases(), dtype=st.sampled_from(DTYPES), rng=generators())
def test_any_geometry_with_an_algorithm(direction, case, dtype, rng):
    """The bits of the plan with that algorithm; "auto" is the default."""
    a, b, expected = case.operands_and_expected(direction, dtype, rng)
    for algorithm in ("auto", "fft", "direct"):
        actual = case.run(direction, a, b, algorithm=algorithm)
        assert_accurate(actual, expected, dtype)
        planned = case.run(direction, a, b, case.plan(direction, dtype, algorithm=algorithm))
        assert actual.tobytes() == planned.tobytes()
    assert case.run(direction, a, b).tobytes() == case.run(direction, a, b, algorithm="auto").tobytes()


# SciPy -----------------------------------------------------------------------------------------------

SCIPY_SIZES = [
    ((1, 1), (1, 1)),
    ((12, 17), (3, 3)),
    ((40, 33), (5, 7)),
    ((70, 64), (31, 30)),
    ((64, 150), (64, 2)),
]


def scipy_sum(function, images, kernels, **options):
    """Apply a SciPy function of one image and one kernel to every pair, and sum over channels."""
    return np.array(
        [
            [
                sum(function(image, kernel, **options) for image, kernel in zip(sample, group, strict=True))
                for group in kernels
            ]
            for sample in images
        ]
    )


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(("size", "kernel"), SCIPY_SIZES)
@pytest.mark.parametrize("padding", ["valid", "full"])
def test_scipy_forward_and_gradients(algorithm, size, kernel, padding, rng):
    case = Case((2, 3, *size), (2, 3, *kernel), padding=padding)
    other = {"valid": "full", "full": "valid"}[padding]
    x, w = case.operands("forward", np.float64, rng)
    y = scipy_sum(signal.correlate2d, x, w, mode=padding)
    assert_accurate(case.run("forward", x, w, case.plan("forward", float, algorithm=algorithm)), y, np.float64)

    g = rng.standard_normal(y.shape)
    dx = scipy_sum(signal.convolve2d, g, w.transpose(1, 0, 2, 3), mode=other)
    plan = case.plan("grad_input", float, algorithm=algorithm)
    assert_accurate(case.run("grad_input", w, g, plan), dx, np.float64)

    padded = oracle.pad(x, oracle.resolve_padding(padding, kernel), "zeros")
    dw = scipy_sum(signal.correlate2d, g.transpose(1, 0, 2, 3), padded.transpose(1, 0, 2, 3), mode="valid")
    plan = case.plan("grad_weight", float, algorithm=algorithm)
    # SciPy swaps operands for the larger to come first, and then returns the correlation reversed.
    assert_accurate(case.run("grad_weight", x, g, plan), dw[..., ::-1, ::-1], np.float64)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_scipy_boundaries(algorithm, rng):
    """A circular boundary is SciPy's 'wrap', and 'same' with odd kernels is its 'same'."""
    for padding_mode, boundary in (("zeros", "fill"), ("circular", "wrap")):
        case = Case((1, 2, 30, 41), (3, 2, 7, 11), padding="same", padding_mode=padding_mode)
        x, w = case.operands("forward", np.float64, rng)
        expected = scipy_sum(signal.correlate2d, x, w, mode="same", boundary=boundary)
        plan = case.plan("forward", float, algorithm=algorithm)
        assert_accurate(case.run("forward", x, w, plan), expected, np.float64)


# PyTorch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def torch_passes(torch, case, x, w, g):
    """The three results of PyTorch's autograd for one case, in the precision of the operands."""
    x, w, g = (torch.tensor(array, requires_grad=index < 2) for index, array in enumerate((x, w, g)))
    (top, bottom), (left, right) = oracle.resolve_padding(case.padding, case.weight_size[2:], case.dilation)
    mode = "constant" if case.padding_mode == "zeros" else case.padding_mode
    padded = torch.nn.functional.pad(x, (left, right, top, bottom), mode=mode)
    y = torch.nn.functional.conv2d(padded, w, None, case.stride, 0, case.dilation, case.groups)
    y.backward(g)
    return {"forward": y.detach().numpy(), "grad_weight": w.grad.numpy(), "grad_input": x.grad.numpy()}


def our_passes(case, x, w, g, **choices):
    operands = {"forward": (x, w), "grad_weight": (x, g), "grad_input": (w, g)}
    return {
        direction: case.run(direction, a, b, case.plan(direction, x.dtype, **choices))
        for direction, (a, b) in operands.items()
    }


@pytest.mark.parametrize("algorithm", ["auto", "fft"])
def test_float32_error_is_within_twice_that_of_torch(torch, algorithm):
    """In the median over random geometries; both errors are against the same float64 result."""
    errors = {direction: ([], []) for direction in DIRECTIONS}

    @settings(max_examples=100)  # medians of fewer are those of which geometries were drawn
    @given(case=cases(), rng=generators())
    def measure(case, rng):
        x, w = case.operands("forward", np.float32, rng)
        g = rng.standard_normal(case.output_size).astype(np.float32)
        exact = torch_passes(torch, case, *(array.astype(np.float64) for array in (x, w, g)))
        theirs, ours = torch_passes(torch, case, x, w, g), our_passes(case, x, w, g, algorithm=algorithm)
        for direction in DIRECTIONS:
            errors[direction][0].append(relative_error(ours[direction], exact[direction]))
            errors[direction][1].append(relative_error(theirs[direction], exact[direction]))

    measure()
    for direction, (ours, theirs) in errors.items():
        assert np.median(ours) <= 2 * np.median(theirs), direction


@given(case=cases(), rng=generators())
def test_torch_float64(torch, case, rng):
    x, w, _ = case.operands_and_expected("forward", np.float64, rng)
    g = rng.uniform(0.5, 1.5, case.output_size)
    theirs = torch_passes(torch, case, x, w, g)
    for algorithm in ("auto", "fft"):
        for direction, ours in our_passes(case, x, w, g, algorithm=algorithm).items():
            scale = np.abs(theirs[direction]).max()
            np.testing.assert_allclose(
                ours, theirs[direction], rtol=0, atol=1e-11 * max(scale, 1e-3), err_msg=direction
            )


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's, on its own speed
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (4, 3), (6, 9)])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_same_padding_is_that_of_torch(torch, kernel, dilation, rng):
    x, w = rng.standard_normal((1, 2, 21, 20)), rng.standard_normal((2, 2, *kernel))
    expected = torch.nn.functional.conv2d(*map(torch.from_numpy, (x, w)), padding="same", dilation=dilation)
    assert_accurate(nbfftconv.conv2d(x, w, padding="same", dilation=dilation), expected.numpy(), np.float64)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("padding", [0, 2, (4, 1), "same"])
def test_padding_modes_are_those_of_torch(torch, padding_mode, padding, rng):
    layer = torch.nn.Conv2d(4, 6, (5, 4), padding=padding, groups=2, padding_mode=padding_mode).double()
    x = rng.standard_normal((2, 4, 9, 8))
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = layer(torch.from_numpy(x)).detach().numpy()
    actual = nbfftconv.conv2d(x, weight, bias, padding=padding, groups=2, padding_mode=padding_mode)
    assert_accurate(actual, expected, np.float64)


# Corners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["auto", "fft", "direct"])
@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1, 1), (1, 1, 1, 1)),
        Case((1, 1, 1, 70), (1, 1, 1, 31)),
        Case((2, 3, 70, 1), (4, 3, 31, 1), stride=(3, 1)),
        Case((1, 1, 31, 31), (1, 1, 31, 31)),
        Case((1, 1, 1, 1), (1, 1, 31, 31), padding=15),
        Case((1, 1, 3, 3), (1, 1, 2, 2), padding=20),
        Case((1, 2, 5, 5), (2, 2, 3, 3), stride=7, padding=1),
        Case((1, 1, 67, 67), (1, 1, 3, 3), dilation=33),
        Case((3, 5, 13, 11), (15, 1, 5, 4), groups=5, padding=((0, 3), (2, 0)), stride=(2, 3), dilation=(1, 2)),
        Case((1, 1, 8, 8), (1, 1, 2, 2), padding=8, padding_mode="circular"),
        Case((1, 1, 8, 8), (1, 1, 2, 2), padding=7, padding_mode="reflect"),
        Case((1, 1, 2, 3), (1, 1, 2, 2), padding=((9, 0), (0, 31)), padding_mode="replicate"),
        Case((2, 64, 9, 9), (48, 64, 3, 3), padding=1),
        Case((1, 17, 150, 133), (5, 17, 3, 3), padding=1),
        Case((1, 1, 300, 310), (2, 1, 41, 37), padding="full"),
    ],
    ids=repr,
)
def test_corner(algorithm, case, rng):
    for dtype in DTYPES:
        for direction in DIRECTIONS:
            a, b, expected = case.operands_and_expected(direction, dtype, rng)
            assert_accurate(
                case.run(direction, a, b, case.plan(direction, dtype, algorithm=algorithm)), expected, dtype
            )


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_empty_batch(algorithm):
    case = Case((0, 2, 9, 9), (3, 2, 3, 3), padding=1)
    x, w, g = (
        np.empty(case.input_size, np.float32),
        np.ones(case.weight_size, np.float32),
        np.empty((0, 3, 9, 9)),
    )
    y = case.run("forward", x, w, case.plan("forward", np.float32, algorithm=algorithm), bias=np.ones(3, np.float32))
    assert y.shape == (0, 3, 9, 9) and y.dtype == np.float32
    dx = case.run("grad_input", w, g, case.plan("grad_input", np.float64, algorithm=algorithm))
    assert dx.shape == case.input_size and dx.dtype == np.float64
    dw = case.run("grad_weight", x, g, case.plan("grad_weight", np.float64, algorithm=algorithm))
    assert dw.dtype == np.float64
    np.testing.assert_array_equal(dw, np.zeros(case.weight_size))


@pytest.mark.parametrize("left", DTYPES)
@pytest.mark.parametrize("right", DTYPES)
def test_mixed_dtypes_promote(left, right, rng):
    case = Case((1, 2, 30, 30), (2, 2, 9, 9))
    dtype = np.result_type(left, right)
    for direction in DIRECTIONS:
        a, b = case.operands(direction, np.float64, rng)
        a, b = a.astype(left), b.astype(right)
        assert_accurate(case.run(direction, a, b), case.expect(direction, a, b), dtype)
    y = nbfftconv.conv2d(np.ones((1, 1, 4, 4), left), np.ones((1, 1, 2, 2), left), np.ones(1, right))
    assert y.dtype == dtype


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_call_gives_the_same_bytes(direction, rng):
    case = Case((2, 3, 70, 61), (4, 3, 11, 8), padding=3, stride=(1, 2))
    a, b = case.operands(direction, np.float32, rng)
    first = case.run(direction, a, b).tobytes()
    plan = case.plan(direction, np.float32)
    assert all(case.run(direction, a, b, p).tobytes() == first for p in (None, plan, plan, None))
