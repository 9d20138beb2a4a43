"""Thread counts, Python threads, forks: the same bytes as one thread alone, never an abort, never a hang.

Each scenario runs in a process of its own, as a threading layer is chosen once per process.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from geometries import DIRECTIONS, Case
from processes import FEW, TIMEOUT, run_scenario

import nbfftconv
from nbfftconv import jit, scratch, simd, threads
from nbfftconv.forking import cached_property
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations.direct import DirectPlan
from nbfftconv.passes.context import Context
from nbfftconv.passes.plan import FftPlan
from nbfftconv.plan import ConvPlan
from nbfftconv.records import RecordType, fields

LAYERS = {"default": None, "workqueue": "workqueue"}
#: Results of process_worker.py by each transform and direct, fused and in stages.
SOME = tuple(
    f"{name}, float32"
    for name in ("many blocks", "codelets in stages", "row codelets", "four_step", "fused", "winograd", "direct")
)
ALL = ()
layers_and_results = pytest.mark.parametrize(
    ("layer", "prefixes"),
    [("default", SOME), *(pytest.param(layer, ALL, marks=pytest.mark.slow) for layer in LAYERS)],
    ids=["default-some", *(f"{layer}-all" for layer in LAYERS)],
)


@functools.cache
def expected(*prefixes):
    """Digests of one process with one thread."""
    return run_scenario("once", *prefixes, NUMBA_THREADING_LAYER=None, NUMBA_NUM_THREADS="1")


def assert_same(found, expected):
    """Every dictionary of digests equals the expected one; a difference is reported by name."""
    for position, digests in enumerate(found):
        differing = [name for name in expected if digests[name] != expected[name]]
        assert differing == [], f"result {position} of {len(found)}"


@layers_and_results
@pytest.mark.parametrize("workers", [None, pytest.param("4", marks=pytest.mark.slow)])
def test_any_thread_count_gives_the_same_bytes(layer, prefixes, workers):
    found = run_scenario("thread_counts", *prefixes, NUMBA_THREADING_LAYER=LAYERS[layer], NUMBA_NUM_THREADS=workers)
    assert len(found) == 5
    assert_same(found, expected(*prefixes))


@layers_and_results
def test_eight_python_threads_at_once(layer, prefixes):
    found = run_scenario("python_threads", *prefixes, NUMBA_THREADING_LAYER=LAYERS[layer])
    assert len(found) == 17
    assert_same(found, expected(*prefixes))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@layers_and_results
@pytest.mark.parametrize(
    "scenario",
    [
        "forked",
        "forked_first",
        pytest.param("forked_while_busy", marks=pytest.mark.slow),
        pytest.param("threads_in_a_child", marks=pytest.mark.slow),
        "process_pool",
    ],
)
def test_forks(scenario, layer, prefixes):
    found = run_scenario(scenario, *prefixes, NUMBA_THREADING_LAYER=LAYERS[layer])
    assert len(found) >= 3
    assert_same(found, expected(*prefixes))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_while_busy_with_nothing_compiled(tmp_path):
    """Threads compile and plan in their first calls; children forked meanwhile find no lock held."""
    environment = {"NUMBA_THREADING_LAYER": None, "NBFFTCONV_CACHE_DIR": str(tmp_path)}
    found = run_scenario("forked_while_busy", *FEW, **environment)
    # A cache of its own has wisdom of its own, and so perhaps other last bits, the same in all processes.
    assert found[0].keys() == set(FEW)
    assert_same(found, found[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_beside_threads_that_use_llvm():
    assert run_scenario("forked_beside_llvm") == [2] * 8


_RECORD = RecordType(fields("source", "target", "size"))


def _neighbours(real):
    def add_neighbours(r, worker, begin, end):
        source, target = simd.pointer(real, r.source), simd.pointer(real, r.target)
        for i in range(begin, end):
            target[i] = source[i] + source[(i + r.size // 2) % r.size]

    return add_neighbours


_add_neighbours = jit.stage(_RECORD)(_neighbours)


@pytest.mark.parametrize("workers", [(1,), (2,), (7,), (1, 3), (3, 1)])
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_a_task_finds_what_the_one_before_it_has_done(size, workers):
    """Each task reads what other threads wrote in the one before, with more workers than threads or fewer."""
    values = [np.ones(size), np.zeros(size)]
    tasks = []
    for number in range(40):
        record = _RECORD.zeros()
        record["source"], record["target"] = values[number % 2].ctypes.data, values[1 - number % 2].ctypes.data
        record["size"] = size
        tasks.append(threads.Task(_add_neighbours.address(np.float64), record, size, workers[number % len(workers)]))
    nothing = threads.Task(tasks[0].stage, tasks[0].record, 0, 2)
    threads.run(nothing, *tasks, nothing)
    assert (values[0] == 2.0**40).all()


def test_set_and_get(restore_threads):
    for count in (1, 2, 3, 64):
        nbfftconv.set_num_threads(count)
        assert nbfftconv.get_num_threads() == count


BEGIN = """
import os, pathlib
{before}
read_text = pathlib.Path.read_text

def read_no_quota(path, **keywords):
    if "cgroup" in str(path):
        raise FileNotFoundError(path)
    return read_text(path, **keywords)

pathlib.Path.read_text = read_no_quota
import nbfftconv
print(nbfftconv.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
@pytest.mark.parametrize(
    ("before", "count"),
    [
        ("os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])", 1),
        ("os.sched_getaffinity = lambda pid: set(range(7, 12))", 5),
    ],
)
def test_the_default_respects_affinity(before, count):
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", BEGIN.format(before=before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == count


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "900000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
    ids=str,
)
def test_the_default_respects_the_quota(files, count, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "_cpu_quota", functools.partial(threads._cpu_quota, tmp_path))
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.available() == count


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("3", 3), (" 2 ", 2), ("4,3", 4), ("99", 5), ("", 5), ("all", 5), ("0", 5), ("-2", 5), (",2", 5)],
)
def test_the_default_respects_the_limit_of_openmp(text, count, monkeypatch):
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 5)
    monkeypatch.setattr(threads, "_cpu_quota", lambda: np.inf)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads.available() == count


def test_the_limit_of_openmp_is_not_for_counts_that_were_set(restore_threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbfftconv.set_num_threads(2)
    assert nbfftconv.get_num_threads() == 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("choice", ["fftw", "codelet", "four_step", "direct"])
def test_there_is_scratch_memory_for_no_more_threads_than_there_are(
    choice, direction, restore_threads, monkeypatch, rng
):
    case = Case((2, 8, 40, 40), (8, 8, 5, 5))
    choices = {"algorithm": "direct"} if choice == "direct" else {"transform": choice}
    plan = case.plan(direction, np.float32, fused=False if choice != "direct" else None, **choices)
    a, b = case.operands(direction, np.float32, rng)
    taken, borrow = {}, scratch.borrow

    def noted(nbytes, *rest):
        taken[count] = taken.get(count, 0) + nbytes
        return borrow(nbytes, *rest)

    monkeypatch.setattr(scratch, "borrow", noted)
    most = threads.numba.config.NUMBA_NUM_THREADS
    results = []
    for count in (most, 1000):
        nbfftconv.set_num_threads(count)
        assert nbfftconv.get_num_threads() == count
        results.append(case.run(direction, a, b, plan))
    np.testing.assert_array_equal(*results)
    assert taken.get(most) == taken.get(1000)
    assert choice == "direct" or taken[most] > 0


@pytest.mark.parametrize(
    ("seconds", "workers"), [(math.inf, 3), (1, 3), (0, 3), (1e-6, 1), (1.1e-3, 1), (2.5e-3, 2), (3.1e-3, 3)]
)
def test_threads_are_woken_for_what_is_worth_it(seconds, workers, monkeypatch, restore_threads):
    monkeypatch.setattr(threads, "_WORTH_WAKING", 1e-3)
    monkeypatch.setattr(threads.numba.config, "NUMBA_NUM_THREADS", 4)
    nbfftconv.set_num_threads(3)
    assert threads.get_workers(seconds) == (workers, workers)


def test_nothing_of_a_plan_is_locked_while_it_is_computed():
    """functools.cached_property holds a lock before Python 3.12: a child that was forked meanwhile would hang."""
    for kind in (ConvGeometry, ConvPlan, FftPlan, DirectPlan, Context):
        found = [value for value in vars(kind).values() if isinstance(value, functools.cached_property)]
        assert all(type(value) is cached_property for value in found)
    inside, leave = threading.Event(), threading.Event()

    class Value:
        def __init__(self, waits):
            self.waits = waits

        @cached_property
        def value(self):
            inside.set()
            return not self.waits or leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: Value(True).value)
        assert inside.wait(60)
        assert Value(False).value
        leave.set()
        assert other.result()


def test_a_thread_of_its_own_count(restore_threads):
    """What one Python thread holds is no other's, and ends with the block, whatever happens in it."""
    threads.set_num_threads(3)
    seen = []
    with pytest.raises(KeyError), threads.holding(1):
        with threads.holding(2):
            assert threads.get_counts() == (2, 2)
        other = threading.Thread(target=lambda: seen.append(threads.get_num_threads()))
        other.start()
        other.join()
        assert seen == [3] and threads.get_num_threads() == 1
        raise KeyError
    assert threads.get_num_threads() == 3
