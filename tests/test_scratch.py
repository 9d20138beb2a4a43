"""Results of memory that is used again: when the last view of it is gone, and never before."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from geometries import DIRECTIONS, Case, cases, codelet_tiles, four_step_tiles, generators
from hypothesis import given, settings
from hypothesis import strategies as st
from process_worker import fork

from nbfftconv import scratch, threads

MIB = 1 << 20
SHAPE = (2, 3, 500, 700)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


@pytest.fixture(autouse=True)
def nothing_kept(restore_scratch_limit):
    scratch.set_scratch_limit(scratch.get_scratch_limit())


def address(array):
    return array.ctypes.data


def test_memory_is_used_again():
    first = scratch.result(SHAPE, F32)
    where = address(first)
    del first
    second = scratch.result(SHAPE, F32)
    assert address(second) == where
    third = scratch.result(SHAPE, F32)  # the second is alive
    assert not np.shares_memory(second, third)
    places = {address(second), address(third)}
    del second, third
    again = [scratch.result((*SHAPE[:3], SHAPE[3] // 2), F64) for _ in range(2)]  # as many bytes
    assert {address(array) for array in again} == places


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_result_is_an_ordinary_array(dtype):
    for _ in range(2):  # of fresh memory, and of used
        array = scratch.result(SHAPE, dtype)
        assert type(array) is np.ndarray
        assert (array.shape, array.dtype) == (SHAPE, dtype)
        assert type(array.base) is np.ndarray and array.base.flags.owndata and not array.flags.owndata
        assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
        assert address(array) % 64 == 0
        array[...] = 1
        array[1, 2, 499, 699] = 2
        copies = copy.copy(array), copy.deepcopy(array), array.copy(), pickle.loads(pickle.dumps(array))
        for other in copies:
            assert not np.shares_memory(array, other)
            np.testing.assert_array_equal(array, other)
            assert other.dtype == dtype and other.flags.writeable
        del array


VIEWS = {
    "slice": lambda y: y[1:, :, ::-1],
    "one element": lambda y: y[1, 2, 3, 4:5],
    "reshape": lambda y: y.reshape(-1),
    "transpose": lambda y: y.transpose(3, 1, 0, 2),
    "view of a view": lambda y: y[0].T[::2].view(),
    "other dtype": lambda y: y.view(np.uint8),
    "memoryview": memoryview,
    "slice of a memoryview": lambda y: memoryview(y)[1:],
    "array of a memoryview": lambda y: np.asarray(memoryview(y)),
    "frombuffer": lambda y: np.frombuffer(y, np.uint8),
    "broadcast": lambda y: np.broadcast_to(y, (2, *y.shape)),
    "strides": lambda y: np.lib.stride_tricks.as_strided(y, (5,), (4,)),
    "subclass": lambda y: y.view(np.recarray),
    "array interface": lambda y: np.asarray(SimpleNamespace(__array_interface__=y.__array_interface__, keep=y)),
    "dlpack": np.from_dlpack,
    "ctypes": lambda y: y.ctypes.data_as(np.ctypeslib.ctypes.c_void_p),
    "flat": lambda y: y.flat,
    "iterator": iter,
    "in a list": lambda y: [y],
}


@pytest.mark.parametrize("view", VIEWS)
def test_memory_is_not_used_again_while_there_is_a_view(view):
    array = scratch.result(SHAPE, F32)
    where, nbytes = address(array), array.nbytes
    kept = VIEWS[view](array)
    del array
    others = [scratch.result(SHAPE, F32) for _ in range(3)]
    assert all(abs(address(other) - where) >= nbytes for other in others)
    del others, kept
    again = [scratch.result(SHAPE, F32) for _ in range(4)]
    assert where in map(address, again)


def test_what_passes_borrow_is_never_a_result_that_is_alive():
    array = scratch.result(SHAPE, F32)
    memory = [scratch.borrow(array.nbytes).array for _ in range(2)]
    assert not any(np.shares_memory(*pair) for pair in itertools.combinations([array, *memory], 2))
    places = {address(other) for other in memory}
    del memory
    results = [scratch.result(SHAPE, F32) for _ in range(3)]
    assert places <= {address(other) for other in results}
    assert not any(np.shares_memory(a, b) for i, a in enumerate(results) for b in results[:i])


def test_borrowed_memory_is_large_enough_and_not_much_larger():
    for nbytes in (1, 63, 64, 100_000, 3 * MIB, 3 * MIB + 1, 2 * MIB, 50_000):
        for spare in (0.1, 1.0):
            memory = scratch.borrow(nbytes, spare).array
            assert nbytes <= memory.nbytes <= (1 + spare) * nbytes + 2**16
            assert address(memory) % 64 == 0
            memory[...] = 1


def test_small_results_are_arrays_with_memory_of_their_own():
    for shape in ((), (0, 3, 5, 5), (1, 1, 1, 1), (2, 3, 200, 100)):
        array = scratch.result(shape, F32)
        assert array.shape == shape and array.base is None and array.flags.owndata


def test_lasting_memory_begins_at_a_cache_line_and_is_used_again():
    for nbytes in (64, 3 * MIB, 300 * MIB):  # too small and too large to be kept, and kept
        memory = scratch.lasting(nbytes).array
        assert (memory.nbytes, memory.dtype, address(memory) % 64) == (nbytes, np.uint8, 0)
    first = scratch.lasting(3 * MIB).array
    where, view = address(first), first.view(F32)[1:]
    del first
    assert where not in map(address, [scratch.lasting(3 * MIB).array for _ in range(3)])
    del view
    assert where in map(address, [scratch.lasting(3 * MIB).array for _ in range(4)])


# The bound -------------------------------------------------------------------------------------------


@pytest.fixture
def traced():
    """A function that tells the bytes of all arrays since now."""
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    yield lambda: tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()


def test_kept_memory_is_bounded(traced):
    scratch.set_scratch_limit(8 * MIB)
    results = [scratch.result((3, MIB // 2), F32) for _ in range(20)]
    assert traced() > 19 * 6 * MIB
    del results
    assert 6 * MIB <= traced() <= 8.1 * MIB  # at once, not with the next call
    memory = [scratch.borrow(3 * MIB).array for _ in range(5)]
    del memory
    assert 6 * MIB <= traced() <= 8.1 * MIB


def test_results_beyond_the_bound_are_not_kept(traced):
    scratch.set_scratch_limit(8 * MIB)
    scratch.borrow(4 * MIB)
    array = scratch.result((9, MIB), F64)
    del array
    assert 4 * MIB <= traced() <= 4.1 * MIB


def test_setting_the_limit_lets_go_of_everything(traced):
    alive = scratch.result(SHAPE, F32)
    dropped = scratch.result(SHAPE, F32)
    del dropped
    scratch.borrow(10 * MIB)
    assert traced() > 2 * alive.nbytes + 10 * MIB
    alive[...] = 5
    scratch.set_scratch_limit(4 * MIB)
    assert alive.nbytes <= traced() < alive.nbytes + MIB
    assert (alive == 5).all()
    del alive  # larger than the new limit
    assert traced() < MIB


def kept():
    """Bytes that the pool refers to, whoever else does."""
    return sum(owner.nbytes for owner in scratch._pool.values())


def test_what_is_lent_counts_as_what_is_kept():
    """At every moment: nobody is told when the last reference to what is lent goes."""
    scratch.set_scratch_limit(20 * MIB)
    held = []
    for number in range(40):
        held.append(scratch.result((1 + number % 5, MIB // 4), F32))
        memory = scratch.borrow((1 + number % 3) * MIB).array
        assert max(memory.nbytes, held[-1].nbytes) <= kept() <= 20 * MIB + 64 * len(scratch._pool)
        del memory
        if number % 7 == 0:
            held.clear()


def test_no_finalizer_is_code_in_python():
    """Python drops what is raised in one, an interrupt too."""
    called = []
    array, memory, lasting = scratch.result(SHAPE, F32), scratch.borrow(3 * MIB).array, scratch.lasting(3 * MIB).array
    for each in (array, memory, lasting):
        while each is not None:
            assert type(each) is np.ndarray
            each = each.base
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del array, memory, lasting, each
    finally:
        sys.setprofile(None)
    assert called == []


def test_a_loan_that_an_exception_ends_is_free_again(rng, monkeypatch):
    case = Case((2, 4, 300, 300), (8, 4, 9, 9))
    a, b = case.operands("forward", np.float32, rng)
    for choices in ({"algorithm": "direct"}, {"transform": "codelet", "fused": False}, {"transform": "four_step"}):
        plan = case.plan("forward", np.float32, **choices)
        case.run("forward", a, b, plan)
        before = {id(owner): owner.nbytes for owner in scratch._pool.values()}
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threads.TaskTable, "run", interrupt)
            case.run("forward", a, b, plan)
        case.run("forward", a, b, plan)
        assert {id(owner): owner.nbytes for owner in scratch._pool.values()} == before


def interrupt(*tasks):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text", ["512MB", *(pytest.param(text, marks=pytest.mark.slow) for text in ("-1", "0", "1e9", "1" * 5000, "eight"))]
)
@pytest.mark.parametrize("action", ["always", "error"])
def test_a_limit_that_makes_no_sense_is_reported(text, action):
    command = [sys.executable, "-W", action, "-c", "from nbfftconv import scratch; print(scratch.get_scratch_limit())"]
    environment = os.environ | {"NBFFTCONV_SCRATCH_BYTES": text}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == 512 * MIB
    assert action == "error" or (repr(text) in done.stderr and "bytes" in done.stderr)


def test_a_limit_of_the_environment():
    command = [sys.executable, "-W", "error", "-c", "from nbfftconv import scratch; print(scratch.get_scratch_limit())"]
    for text, limit in (("1000", 1000), (" 1000 ", 1000), ("", 512 * MIB)):
        environment = os.environ | {"NBFFTCONV_SCRATCH_BYTES": text}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert (int(done.stdout), done.stderr) == (limit, "")


# Threads, garbage, forks, the end ---------------------------------------------------------------------


def test_results_of_many_threads_never_overlap():
    def work(number):
        held = []
        for i in range(150):
            array = scratch.result((1 + (i + number) % 3, MIB // 4), F32)
            array[:, ::64] = number
            held.append(array[:, ::64])
            del array
            assert all((view == number).all() for view in held)
            if len(held) > number % 3:
                held.pop(0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def cycle():
    """A result that only the garbage collector can drop; return its address."""
    node = {"array": scratch.result(SHAPE, F32)}
    node["itself"] = node
    return address(node["array"])


def test_results_in_reference_cycles():
    gc.collect()
    where = cycle()
    gc.collect()
    assert address(scratch.result(SHAPE, F32)) == where


def test_garbage_collected_in_the_midst_of_everything():
    """Memory that becomes free at any moment, and is looked for at any."""
    stop = threading.Event()

    def collect():
        while not stop.is_set():
            gc.collect()

    collector = threading.Thread(target=collect)
    thresholds = gc.get_threshold()
    gc.freeze()  # what the suite has made so far would slow down every collection
    gc.set_threshold(1)
    collector.start()
    try:
        for number in range(60):
            cycle()
            mine = scratch.result(SHAPE, F32)
            mine.reshape(-1)[::997] = number
            memory = scratch.borrow(mine.nbytes).array
            memory[...] = 255
            assert (mine.reshape(-1)[::997] == number).all()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        stop.set()
        collector.join()


@pytest.mark.skipif(sys.platform == "win32", reason="no fork here")
def test_after_a_fork():
    alive, dropped = scratch.result(SHAPE, F32), scratch.result(SHAPE, F32)
    alive[...] = 1
    where = address(dropped)
    del dropped

    def child():
        array = scratch.result(SHAPE, F32)
        found = [address(array) == where, bool((alive == 1).all())]
        array[...] = alive[...] = 2
        del array
        return [*found, address(scratch.result(SHAPE, F32)) == where]

    assert fork(child)() == [True, True, True]
    assert (alive == 1).all()
    assert address(scratch.result(SHAPE, F32)) == where


END = """
import sys, numpy, nbfftconv
from nbfftconv import scratch
def make():
    return scratch.result((2**20,), numpy.dtype(numpy.float32))
kept, sys.kept, numpy.kept, nbfftconv.kept, scratch.kept = [make() for _ in range(5)]
cycle = {"array": make()}
cycle["itself"] = cycle
"""


def test_results_alive_at_the_end_of_the_process():
    done = subprocess.run([sys.executable, "-c", END], env=None, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", ["result", "borrow", "lasting"])
def test_what_is_taken_while_memory_is_taken_is_other_memory(kind):
    """Another thread, or a handler of a signal, may ask between any two lines."""
    held, lines = [], 0

    def take(frame, event, arg):
        nonlocal lines
        if event == "call":
            return take if frame.f_code.co_filename == scratch.__file__ else None
        sys.settrace(None)
        lines += 1
        held.append(scratch.result(SHAPE, F32))
        sys.settrace(take)
        return take

    for _ in range(3):
        del held[:]  # to be found in the pool
        before = sys.gettrace()
        sys.settrace(take)
        try:
            taken = (
                scratch.result(SHAPE, F32) if kind == "result" else getattr(scratch, kind)(4 * math.prod(SHAPE)).array
            )
        finally:
            sys.settrace(before)
        assert lines > 10
        assert not any(np.shares_memory(taken, other) for other in held)
        assert not any(np.shares_memory(a, b) for i, a in enumerate(held) for b in held[:i])


# Of any content --------------------------------------------------------------------------------------


def full_of_nan(nbytes, spare=0.0, aligned=scratch.aligned):
    """Memory as it may be borrowed."""
    memory = aligned(nbytes)
    memory.array[...] = 255
    return memory


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("choice", ["fftw", "codelet", "four_step", "direct"])
@settings(max_examples=15)
@given(data=st.data(), dtype=st.sampled_from((F32, F64)), rng=generators())
def test_what_was_in_the_memory_does_not_matter(choice, direction, data, dtype, rng):
    case = data.draw(cases(max_size=48, max_kernel=15))
    tile = {"codelet": codelet_tiles, "four_step": four_step_tiles}.get(choice, lambda case: st.none())(case)
    choices = {"algorithm": "direct"} if choice == "direct" else {"transform": choice, "tile": data.draw(tile)}
    plan = case.plan(direction, dtype, fused=data.draw(st.booleans()) and choice != "direct", **choices)
    a, b = case.operands(direction, dtype, rng)
    expected = case.run(direction, a, b, plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch, "aligned", full_of_nan)
        patch.setattr(scratch, "borrow", full_of_nan)
        patch.setattr(scratch, "_SMALL_RESULT", 1)
        actual = case.run(direction, a, b, plan)
    np.testing.assert_array_equal(actual, expected)


def test_a_convolution_whose_result_takes_the_place_of_the_last_one(rng):
    case = Case((1, 2, 600, 500), (3, 2, 5, 5), padding=2)
    x, w = case.operands("forward", np.float32, rng)
    for choices in (
        {"algorithm": "direct"},
        {"transform": "fftw"},
        {"transform": "codelet"},
        {"transform": "four_step"},
    ):
        plan = case.plan("forward", np.float32, **choices)
        first = case.run("forward", x, w, plan)
        expected, where = first.copy(), address(first)
        first[...] = np.nan
        del first
        second = case.run("forward", x, w, plan)
        assert address(second) == where
        np.testing.assert_array_equal(second, expected)
        third = case.run("forward", -x, w, plan)
        assert not np.shares_memory(second, third)
        np.testing.assert_array_equal(second, expected)
