"""Thread counts and the one parallel loop, safe from any number of Python threads and after a fork.

Every stage of every pass runs through `run`, which cuts its work items into pieces that threads take in turn: a thread
that has to wait for a CPU holds up no more than its piece. Before the next step of a pass, a thread waits for pieces
that others have taken, and for nothing else: whatever number of threads there really is, one that runs can do all that
is left. Work items are independent and do not know the piece that they are in, so the number of threads cannot change a
result.
"""

import functools
import math
import operator
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from nbfftconv import simd
from nbfftconv.forking import fork_safe_lock
from nbfftconv.jit import njit
from nbfftconv.profile import get_profile


def _cpu_quota() -> float:
    """CPUs that the container's CFS quota allows, infinity without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    if quota in ("max", "-1"):
        return math.inf
    return int(quota) / int(period)


def available() -> int:
    """Return the number of CPUs that affinity and the container's quota allow."""
    # Numba's own default respects affinity and NUMBA_NUM_THREADS, not the quota.
    return max(1, math.ceil(min(numba.config.NUMBA_NUM_THREADS, _cpu_quota())))


@functools.cache
def _default_counts() -> tuple[int, int]:
    """Return the profile's counts, if it has some, within what is available."""
    loops, fftw = get_profile().threads or (available(), available())
    return min(loops, available()), min(fftw, available())


_counts: tuple[int, int] | None = None  # as set; of the stages that run FFTW's transforms last


def _count(n: int) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of threads must be an integer, got {n!r}") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"the number of threads must be from 1 to 1024, got {count}")
    return count


def set_num_threads(n: int, fftw: int | None = None) -> None:
    """Set the number of threads of every later call, in all Python threads.

    Parameters
    ----------
    n : int
        At least 1. At most ``NUMBA_NUM_THREADS`` run at once.
    fftw : int, optional
        Threads of the stages that transform tiles by FFTW; at first `n`. A tile's transform itself runs on one.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If a number is less than 1 or more than 1024.
    """
    global _counts
    loops = _count(n)
    _counts = loops, loops if fftw is None else _count(fftw)


def get_num_threads() -> int:
    """Return the number of threads of a call.

    At first it is the profile's, if there is one with thread counts (see ``perf/tune_threads.py``), else the number of
    CPUs; never more than affinity and the container's quota allow.
    """
    return get_counts()[0]


def get_counts() -> tuple[int, int]:
    """Return the number of threads of a call, and that of its stages which transform tiles by FFTW."""
    return _counts or _default_counts()


#: Pieces that a thread's share of a task is cut into. With three times as many, more neighbours in memory are another
#: thread's, which cost 8 %; with fewer, threads do not end together.
_PIECES = 8
#: A thread that waits for the pieces of others looks so often before it offers its CPU.
_LOOKS = 200
# Numbers of a task in compiled code: stage, record, items, slots, pieces; and of its counters, in cache lines of their
# own: pieces taken and done.
_TASK_NUMBERS = 5
_COUNTERS, _DONE = 16, 8


class Task(NamedTuple):
    """A stage over its work items.

    Attributes
    ----------
    stage : int
        Address of ``stage(record, slot, begin, end)``: of `nbfftconv.jit.stage`.
    record : numpy.ndarray
        The record that it reads.
    items : int
        Number of independent work items.
    slots : int
        Number of threads that may do them: as many scratch areas as the record provides.
    """

    stage: int
    record: np.ndarray
    items: int
    slots: int


@njit()
def _work(tasks, counters, count, slot):
    """Do pieces of one task after the other; wait for those that other threads have taken before the next task."""
    for index in range(count):
        task = simd.pointer(np.int64, tasks + index * _TASK_NUMBERS * 8)
        stage, record, items, slots, pieces = task[0], task[1], task[2], task[3], task[4]
        taken = counters + index * _COUNTERS * 8
        done = taken + _DONE * 8
        if slot < slots:
            piece = simd.take_ticket(taken)
            while piece < pieces:
                simd.call(stage, (record, slot, items * piece // pieces, items * (piece + 1) // pieces))
                simd.take_ticket(done)
                piece = simd.take_ticket(taken)
        looks = 0
        while simd.finished(done) < pieces:
            looks += 1
            if looks < _LOOKS:
                simd.pause()
            else:
                simd.yield_cpu()


@njit(parallel=True)
def _run_parallel(tasks, counters, count, slots):
    for slot in numba.prange(slots):
        _work(tasks, counters, count, slot)


@njit()
def _run_tasks(tasks, counters, count, slots, threads):
    """Run on that many of Numba's threads. Compiled, since Numba's settings cost 10 us from Python."""
    mask = numba.get_num_threads()
    numba.set_num_threads(threads)
    _run_parallel(tasks, counters, count, slots)
    numba.set_num_threads(mask)


@njit()
def _run_serial(tasks, count):
    for index in range(count):
        task = simd.pointer(np.int64, tasks + index * _TASK_NUMBERS * 8)
        simd.call(task[0], (task[1], 0, 0, task[2]))


# Numba's workqueue layer aborts the process when two threads are in it.
_workqueue_lock = threading.Lock()
# GNU OpenMP ends a forked child that uses the pool of its parent.
_pool_is_my_parents = False


def _after_fork_in_child() -> None:
    global _pool_is_my_parents
    try:
        numba.threading_layer()
    except ValueError:  # not started: the child may start its own
        return
    _pool_is_my_parents = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


_start_lock = fork_safe_lock()


@functools.cache
def _threading_layer() -> str:
    """Start Numba's pool, and return the name of its layer."""
    with _start_lock:
        _start_pool()
    return numba.threading_layer()


def _start_pool() -> None:
    # GNU OpenMP reads its policy as it is loaded. Waiting threads that spin take the CPUs from other threads of the
    # process: with one busy neighbour a stage took 8 ms instead of 12 us.
    policy = "OMP_WAIT_POLICY"
    chosen = policy in os.environ or "GOMP_SPINCOUNT" in os.environ
    if not chosen:
        os.environ[policy] = "passive"
    try:
        numba.get_num_threads()
    finally:
        if not chosen:
            del os.environ[policy]


def run(*tasks: Task) -> None:
    """Run tasks one after the other, each over all its work items, by the same threads.

    To start threads for every task, and let them sleep in between, would cost 70 us a task.
    """
    tasks = [task for task in tasks if task.items > 0]
    threads = max((min(task.slots, task.items) for task in tasks), default=0)
    if threads < 1:
        return
    numbers = [(each.stage, each.record.ctypes.data, each.items, each.slots) for each in tasks]
    table = np.array([(*each, min(each[2], _PIECES * each[3])) for each in numbers], np.int64)
    if threads == 1 or _pool_is_my_parents:
        _run_serial(table.ctypes.data, len(tasks))
        return
    exclusive = _threading_layer() == "workqueue"
    if exclusive and not _workqueue_lock.acquire(blocking=False):
        _run_serial(table.ctypes.data, len(tasks))
        return
    try:
        counters = np.zeros((len(tasks), _COUNTERS), np.int64)
        used = min(threads, numba.config.NUMBA_NUM_THREADS)
        _run_tasks(table.ctypes.data, counters.ctypes.data, len(tasks), threads, used)
    finally:
        if exclusive:
            _workqueue_lock.release()
