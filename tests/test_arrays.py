"""Any array-like operand, any writable array as ``out``; what is read is never written."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from compare import assert_accurate
from geometries import DIRECTIONS, Case
from numpy.lib.stride_tricks import as_strided

import nbfftconv

CASES = {
    "fft": Case((2, 3, 40, 37), (4, 3, 9, 11), stride=(1, 2), padding=3),
    "direct": Case((2, 3, 14, 13), (4, 3, 3, 2), stride=(1, 2), padding=3),
    "circular": Case((2, 4, 20, 21), (6, 2, 5, 5), padding=4, dilation=(1, 2), groups=2, padding_mode="circular"),
}


def misaligned(array):
    buffer = bytearray(array.nbytes + 1)
    view = np.frombuffer(buffer, array.dtype, offset=1).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def read_only(array):
    view = array.copy()
    view.flags.writeable = False
    return view


def every_other(array):
    spaced = np.full([2 * size for size in array.shape], np.nan, array.dtype)
    view = spaced[::2, 1::2, ::2, 1::2]
    view[...] = array
    return view


def reversed_axes(array):
    return array[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1]


def channels_last(array):
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def one_byte_apart(array):
    """Elements of a packed record, so that strides are no multiple of the item size."""
    record = np.zeros(array.shape, [("flag", "u1"), ("value", array.dtype)])
    record["value"] = array
    return record["value"]


LAYOUTS = {
    "every_other": every_other,
    "reversed": reversed_axes,
    "fortran": np.asfortranarray,
    "channels_last": channels_last,
    "read_only": read_only,
    "misaligned": misaligned,
    "one_byte_apart": one_byte_apart,
    "big_endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
    "big_endian_misaligned_reversed": lambda array: reversed_axes(
        misaligned(array.astype(array.dtype.newbyteorder(">")))
    ),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layout(layout, case, direction, dtype, rng):
    a, b = case.operands(direction, dtype, rng)
    plain = case.run(direction, a, b)
    assert_accurate(plain, case.expect(direction, a, b), dtype)
    lay_out = LAYOUTS[layout]
    for strange_a, strange_b in ((lay_out(a), b), (a, lay_out(b)), (lay_out(a), lay_out(b))):
        bases = [
            base for base in (strange_a, strange_b, strange_a.base, strange_b.base) if isinstance(base, np.ndarray)
        ]
        before = [base.tobytes() for base in bases]
        actual = case.run(direction, strange_a, strange_b)
        assert [base.tobytes() for base in bases] == before
        assert actual.dtype == np.dtype(dtype) and actual.dtype.isnative
        np.testing.assert_array_equal(actual, plain)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_arrays_with_a_nan(layout, direction, rng):
    case = CASES["fft"]
    plan = case.plan(direction, np.float32, algorithm="fft")
    a, b = case.operands(direction, np.float32, rng)
    a[0, 1, 2, 3] = b[1, 0, 2, 1] = np.nan
    plain = case.run(direction, a, b, plan)
    assert np.isnan(plain).any()
    lay_out = LAYOUTS[layout]
    for strange_a, strange_b in ((lay_out(a), b), (a, lay_out(b)), (lay_out(a), lay_out(b))):
        np.testing.assert_array_equal(case.run(direction, strange_a, strange_b, plan), plain)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_broadcast_views(case, direction, rng):
    a, b = case.operands(direction, np.float32, rng)
    views = [np.broadcast_to(array[:1, :, :1], array.shape) for array in (a, b)]
    assert all(0 in view.strides for view in views)
    actual = case.run(direction, *views)
    np.testing.assert_array_equal(actual, case.run(direction, *(view.copy() for view in views)))
    assert_accurate(actual, case.expect(direction, *views), np.float32)


def test_overlapping_windows_of_one_signal(rng):
    """Rows that share memory with each other, as in a spectrogram made with stride tricks."""
    signal = rng.standard_normal(200)
    x = as_strided(signal, (1, 1, 30, 40), (0, 0, 5 * 8, 8), writeable=False)
    w = rng.standard_normal((1, 1, 7, 7))
    assert_accurate(nbfftconv.conv2d(x, w), oracle.conv2d(x.copy(), w), np.float64)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lists_of_floats(direction, rng):
    case = Case((1, 2, 9, 8), (2, 2, 3, 3), padding=1)
    a, b = case.operands(direction, np.float64, rng)
    np.testing.assert_array_equal(case.run(direction, a.tolist(), b.tolist()), case.run(direction, a, b))


def test_other_containers(rng, tmp_path):
    """Objects with __array__, memory maps, other subclasses; the result is a plain array."""
    x, w = rng.standard_normal((1, 1, 9, 9)), rng.standard_normal((1, 1, 3, 3))

    class Wrapped:
        def __array__(self, dtype=None, copy=None):
            return x.astype(dtype or x.dtype)

    class Subclass(np.ndarray):
        pass

    mapped = np.memmap(tmp_path / "x.bin", np.float64, "w+", shape=x.shape)
    mapped[...] = x
    expected = nbfftconv.conv2d(x, w)
    for strange in (Wrapped(), mapped, x.view(Subclass)):
        actual = nbfftconv.conv2d(strange, w)
        assert type(actual) is np.ndarray
        np.testing.assert_array_equal(actual, expected)


def test_a_strange_bias(rng):
    x, w = rng.standard_normal((1, 2, 9, 9)), rng.standard_normal((4, 2, 3, 3))
    bias = rng.standard_normal(4)
    expected = nbfftconv.conv2d(x, w, bias)
    strange = [
        bias.tolist(),
        bias.astype(">f8"),
        np.repeat(bias, 2)[::2],
        bias[::-1].copy()[::-1],
        misaligned(bias),
        read_only(bias),
    ]
    for array in strange:
        np.testing.assert_array_equal(nbfftconv.conv2d(x, w, array), expected)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("numbers", [(1, -2, 3, 0), (1.5, -2, 0.1, 7), (np.float64(0.1), 1, np.float32(3), np.int8(2))])
def test_a_bias_without_a_dtype_takes_that_of_the_others(numbers, kind, rng):
    """As Python's numbers do in NumPy; an array's dtype counts."""
    x, w = rng.standard_normal((1, 2, 9, 9)), rng.standard_normal((4, 2, 3, 3))
    for dtypes in ((np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float32)):
        operands = [array.astype(dtype) for array, dtype in zip((x, w), dtypes, strict=True)]
        actual = nbfftconv.conv2d(*operands, kind(numbers))
        expected = nbfftconv.conv2d(*operands, np.array(numbers, np.result_type(*dtypes)))
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
    single = x.astype(np.float32), w.astype(np.float32)
    assert nbfftconv.conv2d(*single, np.array(numbers, np.float64)).dtype == np.float64


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_inputs_are_never_written(direction, algorithm, padding_mode, rng):
    case = Case((2, 2, 20, 20), (4, 2, 5, 5), padding=2, padding_mode=padding_mode)
    a, b = case.operands(direction, np.float32, rng)
    a[0, 0, 0, 0] = np.nan  # also on the way that non-finite values take
    before = a.tobytes(), b.tobytes()
    extras = {"bias": np.full(4, 3, np.float32), "activation": "relu"} if direction == "forward" else {}
    case.run(direction, a, b, case.plan(direction, np.float32, algorithm=algorithm), **extras)
    assert (a.tobytes(), b.tobytes()) == before
    assert all((extra == 3).all() for extra in extras.values() if isinstance(extra, np.ndarray))


def test_the_result_shares_no_memory_with_later_calls(rng):
    x, w = rng.standard_normal((1, 2, 40, 40)), rng.standard_normal((2, 2, 9, 9))
    first = nbfftconv.conv2d(x, w)
    before = first.copy()
    second = nbfftconv.conv2d(-x, w)
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, before)
    assert first.flags.writeable


# out -------------------------------------------------------------------------------------------------


def same_case(algorithm):
    """As many outputs as inputs, so that ``out`` may be the input itself."""
    kernel = {"fft": 11, "direct": 3}[algorithm]
    return Case((2, 4, 33, 30), (4, 4, kernel, kernel), padding=kernel // 2)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize(
    "layout", ["every_other", "reversed", "fortran", "channels_last", "misaligned", "one_byte_apart"]
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_out_of_any_layout(algorithm, layout, activation, rng):
    case = same_case(algorithm)
    x, w = case.operands("forward", np.float32, rng)
    bias = rng.standard_normal(4).astype(np.float32)
    plan = case.plan("forward", np.float32, algorithm=algorithm)
    extras = {"bias": bias, "activation": activation}
    expected = case.run("forward", x, w, plan, **extras)
    out = LAYOUTS[layout](np.full(case.output_size, np.nan, np.float32))
    assert case.run("forward", x, w, plan, out=out, **extras) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_out_leaves_what_lies_between_alone(algorithm, rng):
    case = same_case(algorithm)
    x, w = case.operands("forward", np.float64, rng)
    around = np.full((2, 8, 35, 60), 7.0)
    out = around[:, ::2, 1:-1, ::-2]
    plan = case.plan("forward", np.float64, algorithm=algorithm)
    case.run("forward", x, w, plan, out=out)
    np.testing.assert_array_equal(out, case.run("forward", x, w, plan))
    out[...] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
def test_out_may_overlap_the_operands(algorithm, rng):
    case = same_case(algorithm)
    plan = case.plan("forward", np.float64, algorithm=algorithm)
    x, w = case.operands("forward", np.float64, rng)
    bias = rng.standard_normal(4)
    expected = case.run("forward", x, w, plan, bias=bias)

    itself = x.copy()
    case.run("forward", itself, w, plan, bias=bias, out=itself)
    np.testing.assert_array_equal(itself, expected)

    backwards = x.copy()
    case.run("forward", backwards, w, plan, bias=bias, out=backwards[::-1, :, ::-1, ::-1])
    np.testing.assert_array_equal(backwards[::-1, :, ::-1, ::-1], expected)

    for shift in (1, 31, 33 * 30, 4 * 33 * 30):
        memory = np.zeros(x.size + shift)
        for x_start, out_start in ((0, shift), (shift, 0)):
            shifted = memory[x_start : x_start + x.size].reshape(x.shape)
            out = memory[out_start : out_start + x.size].reshape(x.shape)
            shifted[...] = x
            case.run("forward", shifted, w, plan, bias=bias, out=out)
            np.testing.assert_array_equal(out, expected)

    for operand in (w, bias):
        memory = np.zeros(x.size)
        alias = memory[: operand.size].reshape(operand.shape)
        alias[...] = operand
        out = memory.reshape(x.shape)
        operands = (alias, bias) if operand is w else (w, alias)
        case.run("forward", x, operands[0], plan, bias=operands[1], out=out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("algorithm", ["fft", "direct"])
@pytest.mark.parametrize("is_direct", [True, False])
def test_out_of_a_subclass(algorithm, is_direct, rng, tmp_path):
    """Its memory is written, be it a file's, and none of its own ways of being written are asked."""

    class Guarded(np.ndarray):
        def __setitem__(self, key, value):
            raise AssertionError("written by its own method")

    case = same_case(algorithm)
    plan = case.plan("forward", np.float32, algorithm=algorithm)
    x, w = case.operands("forward", np.float32, rng)
    expected = case.run("forward", x, w, plan)
    mapped = np.memmap(tmp_path / "out.bin", np.float32, "w+", shape=expected.shape)
    for out in (mapped, np.zeros_like(expected).view(Guarded)):
        taken = out if is_direct else out[::-1]
        assert case.run("forward", x, w, plan, out=taken) is taken
        np.testing.assert_array_equal(np.asarray(taken), expected)
    mapped.flush()
    on_disk = np.fromfile(tmp_path / "out.bin", np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(on_disk if is_direct else on_disk[::-1], expected)


def test_out_of_an_empty_batch():
    out = np.empty((0, 1, 3, 3))
    assert nbfftconv.conv2d(np.empty((0, 1, 5, 5)), np.ones((1, 1, 3, 3)), out=out) is out
