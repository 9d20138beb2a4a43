"""Bad input raises, before anything is allocated, an error that repeats what was given."""

from __future__ import annotations

import re
import tracemalloc

import numpy as np
import oracle
import pytest

import nbfftconv
from nbfftconv.geometry import ConvGeometry
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.threads import get_counts
from nbfftconv.transforms import fftw

HUGE = 2**62
F32 = np.float32


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def endless(*shape):
    """An array of any size that takes four bytes."""
    return np.broadcast_to(F32(0), shape)


def assert_raises(exception, fragments, function, *args, **kwargs):
    """The call raises, having allocated next to nothing; its message has every fragment as a word."""
    tracemalloc.start()
    try:
        with pytest.raises(exception) as caught:
            function(*args, **kwargs)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    for fragment in fragments if isinstance(fragments, tuple) else (fragments,):
        assert re.search(rf"(?<![\w.]){re.escape(str(fragment))}(?!\w|\.\d)", message), (fragment, message)
    assert peak < 2**20


# A good call of every public function; a row of a table below replaces some of its arguments by bad ones.
GOOD = {
    "conv2d": {"input": zeros(2, 4, 9, 8), "weight": zeros(6, 2, 3, 3), "groups": 2},
    "conv2d_weight": {
        "input": zeros(2, 4, 9, 8),
        "weight_size": (6, 2, 3, 3),
        "grad_output": zeros(2, 6, 7, 6),
        "groups": 2,
    },
    "conv2d_input": {
        "input_size": (2, 4, 9, 8),
        "weight": zeros(6, 2, 3, 3),
        "grad_output": zeros(2, 6, 7, 6),
        "groups": 2,
    },
    "plan_conv2d": {"input_size": (2, 4, 9, 8), "weight_size": (6, 2, 3, 3), "groups": 2},
    "Conv2d": {"weight": zeros(6, 2, 3, 3), "groups": 2},
}


def call(name, bad):
    return getattr(nbfftconv, name)(**(GOOD[name] | bad))


@pytest.mark.parametrize("name", GOOD)
def test_the_calls_that_are_made_bad_below_are_good(name):
    call(name, {})


# Stride, dilation, padding, groups and names: the same for every function ----------------------------

GEOMETRY = [
    *[
        ({name: value}, error, fragments)
        for name in ("stride", "dilation")
        for value, error, fragments in [
            (0, ValueError, 0),
            (-1, ValueError, -1),
            (HUGE, ValueError, HUGE),
            (10**30, ValueError, 10**30),
            (1.0, TypeError, 1.0),
            (1.5, TypeError, 1.5),
            (np.float64(2), TypeError, "2.0"),
            ("2", TypeError, "'2'"),
            (None, TypeError, None),
            ((0, 1), ValueError, 0),
            ((1, -2), ValueError, -2),
            ((1, 2.0), TypeError, 2.0),
            ((1,), ValueError, "(1,)"),
            ((1, 2, 3), ValueError, "(1, 2, 3)"),
            ((1, HUGE), ValueError, HUGE),
            (True, TypeError, True),
            ((1, np.True_), TypeError, "horizontal"),
            ((0, 1), ValueError, ("(0, 1)", "vertical")),
            ((1, -2), ValueError, ("(1, -2)", "horizontal")),
            (float("nan"), TypeError, "nan"),
            ({1, 2}, TypeError, "{1, 2}"),
            ({1: 1, 2: 2}, TypeError, "{1: 1, 2: 2}"),
            (map(int, "11"), TypeError, "map"),
            (b"ab", TypeError, "b'ab'"),
            (1 + 0j, TypeError, "(1+0j)"),
            (np.array(1.0), TypeError, "array(1.)"),
            (np.array([1.0, 2.0]), TypeError, "vertical"),
        ]
    ],
    ({"padding": float("inf")}, TypeError, "inf"),
    ({"padding": (0, float("nan"))}, TypeError, ("nan", "horizontal")),
    ({"padding": False}, TypeError, False),
    ({"padding": (0, True)}, TypeError, ("(0, True)", "horizontal")),
    ({"padding": ((0, 0), (True, 0))}, TypeError, "left"),
    ({"padding": ((0, -1), (0, 0))}, ValueError, ("((0, -1), (0, 0))", "bottom")),
    ({"padding": {0, 1}}, TypeError, "{0, 1}"),
    ({"padding": {0: 1, 1: 0}}, TypeError, "{0: 1, 1: 0}"),
    ({"padding": (n for n in (0, 1))}, TypeError, "generator"),
    ({"padding": b"ab"}, TypeError, "b'ab'"),
    ({"groups": True}, TypeError, True),
    ({"groups": np.True_}, TypeError, "np.True_" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "True"),
    ({"groups": (2,)}, TypeError, "(2,)"),
    ({"padding": -1}, ValueError, -1),
    ({"padding": (1, -2)}, ValueError, -2),
    ({"padding": ((0, 0), (0, -3))}, ValueError, -3),
    ({"padding": HUGE}, ValueError, HUGE),
    ({"padding": ((0, HUGE), (0, 0))}, ValueError, HUGE),
    ({"padding": 1.0}, TypeError, 1.0),
    ({"padding": (1, 0.5)}, TypeError, 0.5),
    ({"padding": None}, TypeError, None),
    ({"padding": (1,)}, ValueError, "(1,)"),
    ({"padding": (1, 1, 1)}, ValueError, "(1, 1, 1)"),
    ({"padding": ((1, 1), (1, 1), (1, 1))}, ValueError, "((1, 1), (1, 1), (1, 1))"),
    ({"padding": ((1, 1), (1, 1, 1))}, ValueError, "(1, 1, 1)"),
    ({"padding": "circle"}, ValueError, "'circle'"),
    ({"padding": "SAME"}, ValueError, "'SAME'"),
    ({"padding": "same", "stride": 2}, ValueError, ("same", 2)),
    ({"groups": 0}, ValueError, 0),
    ({"groups": -2}, ValueError, -2),
    ({"groups": 4}, ValueError, (4, "(6, 2, 3, 3)")),
    ({"groups": HUGE}, ValueError, HUGE),
    ({"groups": 2.0}, TypeError, 2.0),
    ({"groups": "2"}, TypeError, "'2'"),
    ({"groups": None}, TypeError, None),
]

MODES = [
    ({"padding_mode": "mirror"}, ValueError, "'mirror'"),
    ({"padding_mode": ""}, ValueError, "''"),
    ({"padding_mode": None}, ValueError, None),
    ({"padding_mode": 0}, ValueError, 0),
    ({"padding_mode": b"zeros"}, ValueError, "b'zeros'"),
    ({"padding_mode": ["zeros"]}, ValueError, "['zeros']"),
    ({"padding_mode": np.array(["zeros", "reflect"])}, ValueError, "array(['zeros', 'reflect']"),
]

# Where the size of the image is known too.
IMAGE = [
    ({"groups": 3}, ValueError, (3, "(6, 2, 3, 3)")),
    ({"dilation": 5}, ValueError, 5),
    ({"padding": 2**31 - 1}, ValueError, 2**31 - 1),
    ({"padding": 2**30}, ValueError, 2**30),
    ({"padding": 2**24}, ValueError, 2**24),
]

IMAGE_MODES = [
    ({"padding_mode": "reflect", "padding": 8}, ValueError, ("reflect", 8)),
    ({"padding_mode": "reflect", "padding": ((9, 0), (0, 0))}, ValueError, ("reflect", 9)),
    ({"padding_mode": "circular", "padding": (0, 9)}, ValueError, ("circular", 9)),
    ({"padding_mode": "reflect", "padding": "full", "dilation": 4}, ValueError, ("reflect", 8)),
]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(("bad", "exception", "fragments"), GEOMETRY)
def test_geometry(name, bad, exception, fragments):
    assert_raises(exception, fragments, call, name, bad)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_weight", "conv2d_input", "plan_conv2d"])
@pytest.mark.parametrize(("bad", "exception", "fragments"), IMAGE)
def test_geometry_of_an_image(name, bad, exception, fragments):
    assert_raises(exception, fragments, call, name, bad)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_weight", "conv2d_input", "Conv2d"])
@pytest.mark.parametrize(("bad", "exception", "fragments"), MODES)
def test_padding_mode(name, bad, exception, fragments):
    assert_raises(exception, fragments, call, name, bad)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_weight", "conv2d_input"])
@pytest.mark.parametrize(("bad", "exception", "fragments"), IMAGE_MODES)
def test_padding_mode_of_an_image(name, bad, exception, fragments):
    if name != "conv2d":
        geometry = {key: value for key, value in bad.items() if key != "padding_mode"}
        bad = bad | {"grad_output": endless(*oracle.output_size((2, 4, 9, 8), (6, 2, 3, 3), **geometry))}
    assert_raises(exception, fragments, call, name, bad)


@pytest.mark.parametrize("name", GOOD)
def test_numpy_integers_and_lists_are_good(name):
    geometry = {"stride": np.int64(1), "padding": [np.int32(0), np.uint8(0)], "dilation": np.array([1, 1])[0]}
    call(name, geometry | {"groups": np.int16(2)})


# Sizes and shapes ------------------------------------------------------------------------------------

SIZES = {
    "input": [
        ((9, 8), ValueError, "(9, 8)"),
        ((1, 2, 4, 9, 8), ValueError, "(1, 2, 4, 9, 8)"),
        ((), ValueError, "()"),
        ((2, 0, 9, 8), ValueError, ("(2, 0, 9, 8)", "channels")),
        ((2, 4, 0, 8), ValueError, ("(2, 4, 0, 8)", "height")),
        ((2, 4, 9, 0), ValueError, ("(2, 4, 9, 0)", "width")),
        ((2, 5, 9, 8), ValueError, ("(2, 5, 9, 8)", "(6, 2, 3, 3)", 2)),
        ((2, 4, 2, 8), ValueError, (2, 3)),
        ((2, 4, 2**31, 8), ValueError, 2**31),
        ((2, 4, 2**21, 2**20), ValueError, (2**21, 2**20)),
    ],
    "weight": [
        ((3, 3), ValueError, "(3, 3)"),
        ((6, 2, 3, 3, 1), ValueError, "(6, 2, 3, 3, 1)"),
        ((0, 2, 3, 3), ValueError, ("(0, 2, 3, 3)", "out channels")),
        ((6, 0, 3, 3), ValueError, ("(6, 0, 3, 3)", "channels of a group")),
        ((6, 2, 0, 3), ValueError, ("(6, 2, 0, 3)", "kernel height")),
        ((6, 2, 3, 0), ValueError, ("(6, 2, 3, 0)", "kernel width")),
        ((6, 4, 3, 3), ValueError, ("(6, 4, 3, 3)", "(2, 4, 9, 8)", 2)),
        ((5, 2, 3, 3), ValueError, ("(5, 2, 3, 3)", 2)),
        ((6, 2, 10, 3), ValueError, (10, 9)),
        ((6, 2, 3, 9), ValueError, (9, 8)),
        ((6, 2, 2**31, 3), ValueError, 2**31),
        ((2**31, 2, 3, 3), ValueError, 2**31),
    ],
    "grad_output": [
        ((6, 7, 6), ValueError, "(6, 7, 6)"),
        ((2, 6, 7, 7), ValueError, ("(2, 6, 7, 7)", "(2, 6, 7, 6)")),
        ((1, 6, 7, 6), ValueError, ("(1, 6, 7, 6)", "(2, 6, 7, 6)")),
        ((2, 5, 7, 6), ValueError, ("(2, 5, 7, 6)", "(2, 6, 7, 6)")),
        ((2, 6, 0, 6), ValueError, "(2, 6, 0, 6)"),
    ],
}

# What only a size can be, and an array cannot.
SIZES_ONLY = [
    ((2, 4, -9, 8), ValueError, "(2, 4, -9, 8)"),
    ((-2, 4, 9, 8), ValueError, "(-2, 4, 9, 8)"),
    ((2, 4, HUGE, 8), ValueError, HUGE),
    ((HUGE, HUGE, HUGE, HUGE), ValueError, HUGE),
    ((2, 4, 2**30, 2**30), ValueError, 2**30),
    ((2, 4, 9.0, 8), TypeError, 9.0),
    ((2, 4, 9.5, 8), TypeError, 9.5),
    ((2, 4, "9", 8), TypeError, "'9'"),
    ((2, 4, None, 8), TypeError, None),
    (9, TypeError, 9),
    (None, TypeError, None),
    ((2, 4, True, 8), TypeError, True),
    ({2, 4, 9, 8}, TypeError, "{8, 9, 2, 4}"),
    ({2: 0, 4: 0, 9: 0, 8: 0}, TypeError, "{2: 0, 4: 0, 9: 0, 8: 0}"),
    (map(int, "2498"), TypeError, "map"),
    (b"\x02\x04\x09\x08", TypeError, "b'\\x02\\x04\\t\\x08'"),
]

ARGUMENTS = {  # function -> (argument, what it is, whether it is an array)
    "conv2d": [("input", "input", True), ("weight", "weight", True)],
    "conv2d_weight": [
        ("input", "input", True),
        ("weight_size", "weight", False),
        ("grad_output", "grad_output", True),
    ],
    "conv2d_input": [
        ("input_size", "input", False),
        ("weight", "weight", True),
        ("grad_output", "grad_output", True),
    ],
    "plan_conv2d": [("input_size", "input", False), ("weight_size", "weight", False)],
}


def size_rows():
    for name, arguments in ARGUMENTS.items():
        for argument, kind, is_array in arguments:
            for shape, exception, fragments in SIZES[kind]:
                yield name, {argument: endless(*shape) if is_array else shape}, exception, fragments
            for size, exception, fragments in () if is_array else SIZES_ONLY:
                yield name, {argument: size}, exception, fragments


@pytest.mark.parametrize(
    ("name", "bad", "exception", "fragments"),
    [pytest.param(*row, id=f"{row[0]}-{next(iter(row[1]))}-{row[3]}") for row in size_rows()],
)
def test_sizes(name, bad, exception, fragments):
    assert_raises(exception, fragments, call, name, bad)


@pytest.mark.parametrize(
    ("weight", "fragments"),
    [
        (zeros(3, 3), "(3, 3)"),
        (zeros(1, 6, 2, 3, 3), "(1, 6, 2, 3, 3)"),
        (zeros(0, 2, 3, 3), "(0, 2, 3, 3)"),
        (zeros(5, 2, 3, 3), ("(5, 2, 3, 3)", 2)),
        (endless(2**31, 2, 3, 3), 2**31),
        (endless(2**21, 2, 2**20, 1), (2**21, 2**20)),
    ],
)
def test_weights_of_a_layer(weight, fragments):
    assert_raises(ValueError, fragments, nbfftconv.Conv2d, weight, groups=2)
    layer = call("Conv2d", {})
    assert_raises(ValueError, fragments, setattr, layer, "weight", weight)
    assert layer.weight.shape == (6, 2, 3, 3)


# dtypes ----------------------------------------------------------------------------------------------

BAD_DTYPES = ["i1", "u1", "i4", "i8", ">i2", "?", "f2", "g", "c8", "c16", "O", "M8[s]", "U3", "S3", "V4"]


OPERANDS = [
    *((name, argument) for name, rows in ARGUMENTS.items() for argument, _, is_array in rows if is_array),
    ("Conv2d", "weight"),
]


@pytest.mark.parametrize(("name", "argument"), OPERANDS)
@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_dtypes_of_operands(dtype, name, argument):
    """The message names the dtype and what to cast to."""
    bad = np.zeros(GOOD[name][argument].shape, dtype)
    assert_raises(TypeError, str(bad.dtype), call, name, {argument: bad})
    with pytest.raises(TypeError, match="float32|float64"):
        call(name, {argument: bad})


@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_dtypes_of_the_bias(dtype):
    bias = np.zeros(6, dtype)
    assert_raises(TypeError, str(bias.dtype), call, "conv2d", {"bias": bias})
    assert_raises(TypeError, str(bias.dtype), call, "Conv2d", {"bias": bias})
    assert_raises(TypeError, str(bias.dtype), setattr, call("Conv2d", {}), "bias", bias)


@pytest.mark.parametrize("dtype", ["i4", "f2", "c8", "O", "no such", np.longdouble, bool])
def test_dtypes_of_a_plan(dtype):
    assert_raises(TypeError, repr(dtype), call, "plan_conv2d", {"dtype": dtype})


@pytest.mark.parametrize(("name", "argument"), [*OPERANDS, ("conv2d", "bias"), ("Conv2d", "bias")])
@pytest.mark.parametrize("mask", [True, False, np.ma.nomask])
def test_masked_arrays(mask, name, argument):
    """With and without a masked value: what is behind a mask never counts silently."""
    values = GOOD[name].get(argument, zeros(6))
    masked = np.ma.array(values, mask=np.full(values.shape, mask) if mask is not np.ma.nomask else mask)
    assert_raises(TypeError, (argument, str(values.shape), "masked", "fill"), call, name, {argument: masked})
    if values.ndim > 1:  # else its items are numbers, which have no mask
        for bad in (list(masked), (*values[:-1], masked[-1]), [[*values[0][:-1], masked[0][-1]]]):
            assert_raises(TypeError, (argument, len(bad), "masked", "fill"), call, name, {argument: bad})
    if name == "Conv2d":
        layer = call(name, {"bias": zeros(6)})
        assert_raises(TypeError, (argument, "masked"), setattr, layer, argument, masked)


def test_a_masked_number_in_a_list():
    assert_raises(TypeError, ("bias", "masked"), call, "conv2d", {"bias": [0.0, 1.0, np.ma.masked, 3.0, 4.0, 5.0]})


@pytest.mark.parametrize(("name", "argument"), OPERANDS)
def test_complex_arrays_are_told_what_to_do(name, argument):
    with pytest.raises(TypeError, match="real and its imaginary part"):
        call(name, {argument: GOOD[name][argument].astype(complex)})


@pytest.mark.parametrize(("error", "raised"), [(RuntimeError, TypeError), (TypeError, TypeError), (ValueError,) * 2])
@pytest.mark.parametrize(("name", "argument"), [*OPERANDS, ("conv2d", "bias"), ("Conv2d", "bias")])
def test_objects_that_refuse_to_be_arrays(name, argument, error, raised):
    """As a tensor of another library that is on a GPU, or needs its gradient."""

    class Tensor:
        def __array__(self, dtype=None, copy=None):
            raise error("it requires grad")

    assert_raises(raised, (argument, "it requires grad"), call, name, {argument: Tensor()})


@pytest.mark.parametrize(("name", "argument"), OPERANDS)
def test_lists_of_lists_of_several_lengths(name, argument):
    assert_raises(ValueError, argument, call, name, {argument: [[[[1.0, 2.0], [3.0]]]]})


@pytest.mark.parametrize("bad", [None, "text", 5, 5.0, {}, set(), iter("1"), object(), [[[[1, 2], [3, 4]]]]])
def test_no_arrays(bad):
    for name, argument in OPERANDS:
        with pytest.raises((TypeError, ValueError)):
            call(name, {argument: bad})


# bias, activation, out -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (7,), (1,), (), (6, 1), (1, 6, 1, 1), (0,)])
def test_bias_shapes(shape):
    bias = zeros(*shape)
    assert_raises(ValueError, (str(shape), 6), call, "conv2d", {"bias": bias})
    assert_raises(ValueError, (str(shape), 6), call, "Conv2d", {"bias": bias})
    assert_raises(ValueError, (str(shape), 6), setattr, call("Conv2d", {}), "bias", bias)


@pytest.mark.parametrize(
    ("bias", "exception", "fragments"),
    [
        ([True] * 6, TypeError, "bool"),
        (["1"] * 6, TypeError, "(6,)"),
        ([1j] * 6, TypeError, "complex128"),
        ([None] * 6, TypeError, "object"),
        ([[0.0]] * 6, ValueError, "(6, 1)"),
        ([0.0] * 5, ValueError, "(5,)"),
        ([0, 0, 0, 0, 0, -1e39], ValueError, ("-1e+39", "float32")),
        ((1e39, 0.5, 0, 0, 0, 0), ValueError, ("1e+39", "float32")),
        (5, TypeError, "int64"),
        (5.0, ValueError, "()"),
        (dict.fromkeys(range(6), 0.0), TypeError, "object"),
    ],
)
def test_a_bias_that_is_no_array(bias, exception, fragments):
    assert_raises(exception, fragments, call, "conv2d", {"bias": bias})
    assert_raises(exception, fragments, call, "Conv2d", {"bias": bias})
    assert_raises(exception, fragments, setattr, call("Conv2d", {}), "bias", bias)


@pytest.mark.parametrize("name", ["conv2d", "Conv2d"])
@pytest.mark.parametrize("activation", ["tanh", "ReLU", "", 0, False, ["relu"], np.array(["relu", "relu"])])
def test_activations(name, activation):
    assert_raises(ValueError, repr(activation), call, name, {"activation": activation})


@pytest.mark.parametrize(
    ("out", "exception", "fragments"),
    [
        (zeros(2, 6, 7, 7), ValueError, ("(2, 6, 7, 7)", "(2, 6, 7, 6)")),
        (zeros(6, 7, 6), ValueError, ("(6, 7, 6)", "(2, 6, 7, 6)")),
        (zeros(1, 6, 7, 6), ValueError, ("(1, 6, 7, 6)", "(2, 6, 7, 6)")),
        (zeros(2, 6, 7, 6, dtype=np.float64), (TypeError, ValueError), ("float64", "float32")),
        (zeros(2, 6, 7, 6, dtype=np.float16), (TypeError, ValueError), ("float16", "float32")),
        (zeros(2, 6, 7, 6, dtype=int), (TypeError, ValueError), ("int64", "float32")),
        (endless(2, 6, 7, 6), ValueError, "read-only"),
        (zeros(2, 6, 7, 6).tolist(), TypeError, "list"),
        (np.ma.array(zeros(2, 6, 7, 6)), TypeError, "MaskedArray"),
    ],
)
def test_out(out, exception, fragments):
    assert_raises(exception, fragments, call, "conv2d", {"out": out})


def test_a_refused_out_is_not_written():
    out = np.full((2, 6, 7, 6), 7, np.float64)
    with pytest.raises((TypeError, ValueError)):
        call("conv2d", {"out": out})
    assert (out == 7).all()


# Plans -----------------------------------------------------------------------------------------------

LARGE_KERNEL = {"input_size": (2, 4, 450, 50), "weight_size": (6, 2, 401, 3)}  # than any tile of generated transforms


@pytest.mark.parametrize(
    ("bad", "exception", "fragments"),
    [
        ({"direction": "backward"}, ValueError, "'backward'"),
        ({"algorithm": "karatsuba"}, ValueError, "'karatsuba'"),
        ({"transform": "vkfft"}, ValueError, "'vkfft'"),
        ({"transform": "codelet", "tile": (8, 11)}, ValueError, "(8, 11)"),
        ({"transform": "codelet"} | LARGE_KERNEL, ValueError, ("codelet", "(401, 3)")),
        ({"transform": "four_step", "tile": (30, 31)}, ValueError, ("four_step", "(30, 31)")),
        ({"transform": "four_step", "tile": 32}, ValueError, ("four_step", "(32, 32)")),
        ({"transform": "four_step"} | LARGE_KERNEL, ValueError, ("four_step", "(401, 3)")),
        ({"transform": "four_step", "tile": 400} | LARGE_KERNEL, ValueError, (400, 401)),
        ({"tile": 0}, ValueError, 0),
        ({"tile": -8}, ValueError, -8),
        ({"tile": (8, 0)}, ValueError, 0),
        ({"tile": (8,)}, ValueError, "(8,)"),
        ({"tile": (8, 8, 8)}, ValueError, "(8, 8, 8)"),
        ({"tile": HUGE}, ValueError, HUGE),
        ({"tile": 8.0}, TypeError, 8.0),
        ({"tile": "8"}, TypeError, "'8'"),
        ({"tile": 2, "algorithm": "fft"}, ValueError, (2, 3)),
        ({"tile": (8, 2), "algorithm": "fft"}, ValueError, (2, 3)),
        ({"measure": "yes"}, TypeError, "'yes'"),
        ({"measure": 1}, TypeError, 1),
        ({"measure": True, "algorithm": "fft"}, ValueError, "'fft'"),
        ({"measure": True, "transform": "codelet"}, ValueError, "'codelet'"),
        ({"measure": True, "transform": "four_step"}, ValueError, "'four_step'"),
        ({"measure": True, "tile": 8}, ValueError, 8),
        ({"weight_is_transformed": None}, TypeError, "None"),
    ],
)
@pytest.mark.parametrize("direction", ["forward", "grad_weight", "grad_input"])
def test_plan_choices(direction, bad, exception, fragments):
    assert_raises(exception, fragments, call, "plan_conv2d", {"direction": direction} | bad)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_weight", "conv2d_input"])
@pytest.mark.parametrize("plan", ["fft", 1, {"algorithm": "fft"}, np.zeros(3), nbfftconv.plan_conv2d])
def test_no_plan(name, plan):
    assert_raises(TypeError, type(plan).__name__, call, name, {"plan": plan})


DIRECTION = {"conv2d": "forward", "conv2d_weight": "grad_weight", "conv2d_input": "grad_input"}


@pytest.mark.parametrize("name", [*DIRECTION, "Conv2d"])
@pytest.mark.parametrize("algorithm", ["karatsuba", "FFT", "", None, 0, ["fft"], np.array(["fft", "direct"])])
def test_algorithms(algorithm, name):
    assert_raises(ValueError, ("algorithm", repr(algorithm)), call, name, {"algorithm": algorithm})


@pytest.mark.parametrize("name", DIRECTION)
@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("planned", ["fft", "direct"])
def test_an_algorithm_beside_a_plan(name, planned, algorithm):
    """Even the same one: a plan is the whole choice."""
    plan = call("plan_conv2d", {"direction": DIRECTION[name], "algorithm": planned})
    bad = {"plan": plan, "algorithm": algorithm}
    assert_raises(ValueError, ("plan", repr(planned), repr(algorithm)), call, name, bad)
    call(name, {"plan": plan, "algorithm": "auto"})


@pytest.mark.parametrize("name", DIRECTION)
@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(
    "other",
    [
        {"input_size": (1, 4, 9, 8)},
        {"input_size": (2, 4, 8, 9)},
        {"weight_size": (8, 2, 3, 3)},
        {"weight_size": (6, 2, 3, 2)},
        {"padding": 1},
        {"padding": "same"},
        {"stride": 2},
        {"stride": (1, 2)},
        {"dilation": 2},
        {"input_size": (2, 2, 9, 8), "groups": 1},
        {"dtype": np.float64},
        {"direction": "other"},
    ],
    ids=str,
)
def test_a_plan_made_for_something_else(name, algorithm, other):
    direction = DIRECTION[name]
    if "direction" in other:
        other = {"direction": "grad_weight" if direction == "forward" else "forward"}
    choices = {"algorithm": algorithm, "direction": direction}
    fitting = call("plan_conv2d", choices)
    call(name, {"plan": fitting})
    plan = call("plan_conv2d", choices | other)
    with pytest.raises(ValueError) as caught:
        call(name, {"plan": plan})
    (argument, value), *_ = other.items()
    told = {"dtype": "float64", "padding": "padding"}.get(argument, str(value))
    assert told in str(caught.value)


# The layer's calls -----------------------------------------------------------------------------------


def test_calls_of_a_layer():
    layer = call("Conv2d", {})
    layer(zeros(2, 4, 9, 8))
    rows = [
        (zeros(9, 8), ValueError, "(9, 8)"),
        (zeros(2, 5, 9, 8), ValueError, ("(2, 5, 9, 8)", "(6, 2, 3, 3)")),
        (zeros(2, 4, 2, 8), ValueError, (2, 3)),
        (zeros(2, 4, 9, 8, dtype=int), TypeError, "int64"),
        (endless(2, 4, 2**21, 2**20), ValueError, 2**21),
    ]
    for bad, exception, fragments in rows:
        assert_raises(exception, fragments, layer, bad)
    rows = [
        (zeros(2, 6, 7, 7), ValueError, ("(2, 6, 7, 7)", "(2, 6, 7, 6)")),
        (zeros(6, 7, 6), ValueError, "(6, 7, 6)"),
        (zeros(2, 6, 7, 6, dtype=int), TypeError, "int64"),
    ]
    for bad, exception, fragments in rows:
        assert_raises(exception, fragments, layer.backward, bad)
    layer.backward(zeros(2, 6, 7, 6))  # still good after a refusal


LAYER_SETTINGS = [
    *GEOMETRY,
    *MODES,
    *(({"activation": value}, ValueError, repr(value)) for value in ("gelu", "ReLU", 0, ["relu"])),
    *(({"algorithm": value}, ValueError, repr(value)) for value in ("karatsuba", None, 1)),
    *(({"training": value}, TypeError, repr(value)) for value in ("no", 0, 1, None, 1.0, [], np.array([True]))),
    *(({"spectra_limit": value}, TypeError, repr(value)) for value in (True, 1.0, "1", None)),
    ({"spectra_limit": -1}, ValueError, -1),
]


def settings_of(layer):
    geometry = "stride", "padding", "dilation", "groups", "padding_mode"
    others = "weight", "bias", "activation", "algorithm", "training", "spectra_limit"
    return {name: getattr(layer, name) for name in (*geometry, *others)}


@pytest.mark.parametrize(("bad", "exception", "fragments"), LAYER_SETTINGS)
def test_settings_of_a_layer(bad, exception, fragments):
    """Refused by the constructor, and alike when they are set later; the layer is then as it was."""
    assert_raises(exception, fragments, call, "Conv2d", bad)
    *others, last = bad
    layer = call("Conv2d", {name: bad[name] for name in others})
    x, g = zeros(2, 4, 9, 8), zeros(2, 6, 7, 6)
    layer(x)
    before = settings_of(layer)
    assert_raises(exception, fragments, setattr, layer, last, bad[last])
    after = settings_of(layer)
    assert all(after[name] is value for name, value in before.items())
    if not others:
        layer.backward(g)
        layer(x)


@pytest.mark.parametrize(
    ("first", "name", "value", "fragments"),
    [
        ({"padding": "same"}, "stride", 2, ("same", "(2, 2)")),
        ({"stride": (1, 2)}, "padding", "same", ("same", "(1, 2)")),
        ({"groups": 3}, "weight", zeros(4, 2, 3, 3), ("(4, 2, 3, 3)", 3)),
        ({"groups": 1}, "groups", 4, ("(6, 2, 3, 3)", 4)),
        ({"bias": zeros(6)}, "weight", zeros(8, 2, 3, 3), ("(8, 2, 3, 3)", 6, "bias")),
        ({"bias": zeros(6)}, "weight", zeros(4, 2, 3, 3), ("(4, 2, 3, 3)", 6, "bias")),
        ({}, "bias", zeros(8), ("(8,)", 6)),
    ],
)
def test_settings_of_a_layer_that_do_not_go_together(first, name, value, fragments):
    layer = call("Conv2d", first)
    before = settings_of(layer)
    assert_raises(ValueError, fragments, setattr, layer, name, value)
    after = settings_of(layer)
    assert all(after[each] is kept for each, kept in before.items())


def test_settings_of_a_layer_cannot_be_changed_behind_its_back():
    """A list that is set is not kept: appended to later, it would pass no check."""
    stride, padding = [1, 1], [[1, 1], [0, 0]]
    layer = call("Conv2d", {"stride": stride, "padding": padding})
    stride[0] = padding[0][0] = "no number"
    assert (layer.stride, layer.padding) == ((1, 1), ((1, 1), (0, 0)))
    assert layer(zeros(2, 4, 9, 8)).shape == (2, 6, 9, 6)


def test_settings_of_a_layer_cannot_be_deleted():
    layer = call("Conv2d", {})
    before = settings_of(layer)
    for name in before:
        with pytest.raises(AttributeError):
            delattr(layer, name)
    assert settings_of(layer).keys() == before.keys()


# Settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "exception"),
    [
        (0, ValueError),
        (-3, ValueError),
        (1.0, TypeError),
        (2.5, TypeError),
        ("2", TypeError),
        (None, TypeError),
    ],
)
def test_set_num_threads(value, exception):
    before = get_counts()
    assert_raises(exception, repr(value), nbfftconv.set_num_threads, value)
    if value is not None:  # as many as for everything else
        assert_raises(exception, repr(value), nbfftconv.set_num_threads, 1, library=value)
    assert get_counts() == before


@pytest.mark.parametrize(
    ("value", "exception"), [(-1, ValueError), (1.5, TypeError), ("1 GiB", TypeError), (None, TypeError)]
)
def test_set_scratch_limit(value, exception):
    before = get_scratch_limit()
    assert_raises(exception, repr(value), set_scratch_limit, value)
    assert get_scratch_limit() == before


@pytest.mark.parametrize("effort", ["hard", "", "MEASURE"])
def test_set_planning_effort(effort):
    before = fftw.get_planning_effort()
    assert_raises(ValueError, repr(effort), fftw.set_planning_effort, effort)
    assert fftw.get_planning_effort() == before


def test_geometries_made_before_excuse_nothing():
    """What equals valid arguments, but is of other types, is validated all the same."""
    sizes = (2, 4, 9, 8), (6, 2, 3, 3)
    expected = ConvGeometry.from_arguments(*sizes, (1, 1), ((1, 1), (1, 1)), (1, 1), 2)
    for bad in ((1.0, 1.0), 1.0, (1, 1.0)):
        for name in ("stride", "padding", "dilation"):
            with pytest.raises(TypeError):
                ConvGeometry.from_arguments(*sizes, **{name: bad, "groups": 2})
    with pytest.raises(TypeError):
        ConvGeometry.from_arguments(*sizes, groups=2.0)
    for padding in ([1, 1], np.ones(2, int), [[1, 1], (1, np.int64(1))]):
        assert ConvGeometry.from_arguments([2, 4, 9, 8], sizes[1], padding=padding, groups=np.int8(2)) == expected
