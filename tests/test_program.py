"""Programs: passes that are recorded once a plan, and run on the arrays of each call."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from compare import assert_accurate
from geometries import Case

from nbfftconv import scratch
from nbfftconv.implementations import registry
from nbfftconv.passes.context import Context
from nbfftconv.passes.forward import recorded_program
from nbfftconv.passes.recorder import Recorder
from nbfftconv.program import _open_words
from nbfftconv.records import RecordType, fields

CASE = Case((2, 6, 20, 33), (10, 3, 3, 3), padding=1, groups=2)
CHOICES = [
    {"transform": "winograd", "tile": 6, "fused": False},
    {"transform": "winograd", "tile": 6, "fused": True},
    {"transform": "codelet", "tile": 16, "fused": False},
    {"transform": "four_step", "tile": 30, "fused": False},
    {"transform": "fftw", "tile": 17, "fused": False},
    {"transform": "fftw", "tile": 17, "fused": True},
]
RECORD = RecordType(fields("first", "address", "last", inner=fields("address")))


def forward(plan, x, w, bias=None, relu=False, keep=False):
    implementation = registry.get(plan.algorithm)
    result = scratch.result(plan.geometry.output_size, plan.dtype)
    kernels = implementation.prepare(plan, w)
    kept = implementation.forward(plan, plan.geometry, x, kernels, bias, relu, result, keep)
    assert (kept is not None) == keep
    return result


def test_a_record_is_its_words():
    record = RECORD.make((1, 2, 3, (4,)))
    copy = record.copy()
    copy["inner.address"], copy["last"] = 9, -5
    assert list(record.words) == [1, 2, 3, 4] and list(copy.words) == [1, 2, -5, 9]
    assert (record["inner.address"], copy["last"]) == (4, -5)
    assert record.address != copy.address
    read = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int64 * 4).from_address(copy.address))
    assert read.tolist() == [1, 2, -5, 9]
    assert list(RECORD.zeros().words) == [0] * 4
    with pytest.raises(KeyError):
        record["middle"] = 1


def test_words_that_are_addresses_are_found():
    """Those of an operand, from a little before its first byte on; not those that all calls have, nor sizes."""
    plan = CASE.plan("forward", np.float32, fused=False, transform="codelet", tile=16)
    recorder = Recorder(plan, plan.geometry)
    array = np.zeros(3)
    input, output = recorder.operand("input", (2, 3), 4), recorder.operand("output", (5,), 8)
    assert (input.nbytes, output.nbytes) == (24, 40)
    record = RECORD.make((output.address - 64, recorder.address(array), -(2**40), (input.address + 2**40,)))
    opened = _open_words(record.words)
    names = recorder.names
    arrays = [recorder._kinds[operand] for _, operand, _ in opened]
    assert {kind for kind, _ in arrays} == {"array"}
    assert [(word, names[number], offset) for (word, _, offset), (_, number) in zip(opened, arrays, strict=True)] == [
        (0, "output", -64),
        (3, "input", 2**40),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_calls_of_one_program(choices, dtype, rng):
    """Each with its own arrays, with a bias or none, right and with the bits of a pass that is not recorded."""
    recorded_program.cache_clear()
    plan = CASE.plan("forward", dtype, **choices)
    alive = []
    for call in range(4):
        x, w = CASE.operands("forward", dtype, rng)
        bias = rng.standard_normal(10).astype(dtype) if call % 2 else None
        result = forward(plan, x, w, bias, call > 1)
        expected = CASE.expect("forward", x, w, bias=bias, activation="relu" if call > 1 else None)
        assert_accurate(result, expected, dtype)
        if not plan.fused:
            np.testing.assert_array_equal(forward(plan, x, w, bias, call > 1, keep=True), result)
        alive.append((x, w, bias))  # their memory is not that of the next ones
        gc.collect()
    assert recorded_program.cache_info().misses == 4
    forward(plan, *alive[0])
    assert recorded_program.cache_info().misses == 4


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_threads_share_a_program(choices, rng):
    plan = CASE.plan("forward", np.float32, **choices)
    operands = [CASE.operands("forward", np.float32, rng) for _ in range(4)]
    expected = [forward(plan, *each) for each in operands]
    results = [[] for _ in operands]

    def run(index):
        results[index] += [forward(plan, *operands[index]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(operands))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(results, expected, strict=True):
        assert len(found) == 20
        for result in found:
            np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("zeros", ["input", "weight", "both"])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_what_is_found_in_one_call_is_not_in_the_next(choices, zeros, rng):
    """Outliers and blank windows, each in a call of its own."""
    plan = CASE.plan("forward", np.float32, **choices)
    x, w = CASE.operands("forward", np.float32, rng)
    blank, infinite, few = x.copy(), x.copy(), w.copy()
    blank[1, :, :14], infinite[0, 2, 5, 6], few[3] = 0, np.inf, 0
    first = forward(plan, x, w)
    result = forward(plan, blank if zeros != "weight" else x, few if zeros != "input" else w)
    if zeros != "weight":
        assert not result[1, :, :12].any()
    if zeros != "input":
        assert not result[:, 3].any()
    assert np.isnan(forward(plan, infinite, w)).sum() == 0
    assert np.isinf(forward(plan, infinite, w)).any()
    np.testing.assert_array_equal(forward(plan, x, w), first)


def test_areas_that_are_lent_together(monkeypatch):
    sizes = [1, 64, 65, 0, 1000]
    areas = scratch.borrow_together(sizes)
    for (array, address), nbytes in zip(areas, sizes, strict=True):
        assert address % 64 == 0 and array.nbytes >= nbytes
        if nbytes:
            assert array.ctypes.data == address
    ends = [address + nbytes for (_, address), nbytes in zip(areas, sizes, strict=True)]
    assert all(end <= following.address for end, following in zip(ends, areas[1:], strict=False))
    again = scratch.borrow_together(sizes)
    assert {address for _, address in again}.isdisjoint({address for _, address in areas})


def test_a_recorder_takes_no_memory(monkeypatch):
    plan = CASE.plan("forward", np.float32, fused=False, transform="codelet", tile=16)
    monkeypatch.setattr(scratch, "borrow", None)
    recorder = Recorder(plan, plan.geometry)
    assert isinstance(recorder, Context)
    assert recorder.borrow(1000).address != recorder.borrow(1000).address
    assert recorder.borrowed == [1000, 1000]
