"""Emitted instructions: compiled, and as the tests' NumPy emitter computes them."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from llvmlite import ir
from numpy_emitter import NumpyEmitter

from nbfftconv import jit, simd

REALS = [np.float32, np.float64]


def test_both_emitters_have_one_interface():
    methods = {name: value for name, value in vars(simd.Emitter).items() if callable(value) and name[0] != "_"}
    assert len(methods) > 25
    for name, method in methods.items():
        other = inspect.signature(getattr(NumpyEmitter, name))
        expected = [(parameter.name, parameter.default) for parameter in inspect.signature(method).parameters.values()]
        actual = [(parameter.name, parameter.default) for parameter in other.parameters.values()]
        assert actual[: len(expected)] == expected, name


def everything(v, source, target, count, flag):
    """All instructions, on three vectors, some integers and masks; results from `target` on."""
    results = iter(range(1000))

    def put(value):
        v.store(value, target + next(results) * v.vector_bytes)

    a, b, c = (v.load(source + i * v.vector_bytes) for i in range(3))
    for value in (a + b, a - b, a * b, -a, 2.0 + a, a + 2.0, 2.0 - a, a - 2.0, 2.0 * a, a * 2.0, 1.5, v.constant(2.5)):
        put(value)
    put(v.fma(a, b, c))
    put(v.fma(a, 2.0, c))
    put(v.constant(v.fma(2.0, 3.0, 4.0)))
    put(v.relu(a))
    put(v.select(a > b, 1.0, b))
    put(v.select(v.magnitude(a) > v.magnitude(b), a, 0.0))
    put(v.broadcast(source + 2 * v.itemsize))
    put(v.reverse(a))
    put(v.even_lanes(a, b))
    rows = [v.load(source + i * v.itemsize) for i in range(v.lanes - 1)]
    for column in v.transpose([*rows, 7.0]):
        put(column)
    for mask in (
        v.lanes_between(1, count), v.lanes_between(count, 9, 2), v.lanes_between(0, 3, count - 4), v.all_lanes_if(flag),
        v.all_lanes_if(1 - flag), v.load_mask(source),
    ):  # fmt: skip
        put(v.masked_load(source, mask))
        put(v.gather(source, 2 * v.itemsize, mask))
        v.masked_store(a, target + next(results) * v.vector_bytes, mask)
    for magnitude in (
        v.maximum(v.magnitude(a), v.magnitude(b)), v.minimum(v.magnitude(a), v.magnitude(b)), v.zero_magnitude(),
        v.minimum(v.largest_magnitude(), v.magnitude(c)), v.load_magnitude(source),
    ):  # fmt: skip
        v.store_magnitude(magnitude, target + next(results) * v.vector_bytes)
    v.prefetch(source, write=True, level=2)
    stride = v.itemsize
    for integer in (
        count + 1, 1 + count, count - 1, 9 - count, count * 2, 2 * count, 2 * count // 3, count // flag, count & 3,
        v.minimum(2, count), v.minimum(count, 9), v.maximum(count, 2), v.maximum(9, count), count - flag * 2,
        v.load_integer(source + 3 * v.vector_bytes),
    ):  # fmt: skip
        put(v.load(source + integer * stride))
    for equals in range(2):
        with v.when(flag, equals), v.when(count, 5):
            put(v.constant(3.0 + equals))
    _, total, at = v.repeat(count, [source, 0.0, 0], lambda at, s, n: [at + stride, s + v.load(at), n + 1])
    put(total + v.load(source + at * stride))
    _, never = v.repeat(0, [0, 1.0], lambda n, s: [n + 1, s + 1.0])
    put(never)
    v.store_aligned(a, target + next(results) * v.vector_bytes)
    v.store_nontemporal(b, target + next(results) * v.vector_bytes)


@pytest.mark.parametrize("real", REALS)
def test_compiled_instructions_are_those_of_numpy(real, rng):
    kernel = simd.kernel(everything, "everything")

    @jit.njit()
    def run(real, source, target, count, flag):
        kernel(real, (source, target, count, flag))
        simd.fence()

    lanes = simd.lanes(real)
    memory = rng.standard_normal(64 * lanes).astype(np.float32).astype(real)  # in float64, products are exact
    memory[3 * lanes :].view(np.int64)[0] = 7
    expected = NumpyEmitter(real, simd.VECTOR_BYTES)
    source, target = expected.put(memory), expected.put(np.zeros(100 * lanes, real))
    everything(expected, source, target, 5, 1)
    aligned = np.zeros(100 * lanes + 64, real)
    aligned = aligned[-aligned.ctypes.data % 64 // aligned.itemsize :][: 100 * lanes]
    run(real, memory.ctypes.data, aligned.ctypes.data, 5, 1)
    actual = aligned.reshape(100, lanes)
    np.testing.assert_array_equal(actual, expected.get(target, 100, lanes))
    assert np.count_nonzero(actual.any(axis=1)) > 50


def test_kinds_are_not_mixed():
    function = ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "f")
    builder = ir.IRBuilder(function.append_basic_block())
    v = simd.Emitter(builder, np.float32)
    address = simd.Integer(builder, function.args[0])
    vector = v.load(address)
    with pytest.raises(TypeError, match="Integer and a Vector"):
        address + vector
    with pytest.raises(TypeError, match="Vector and a Magnitude"):
        vector - v.magnitude(vector)
