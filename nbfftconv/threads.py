"""Thread counts and the one parallel loop, safe from any number of Python threads and after a fork.

Every stage of every pass runs through `run`, which cuts its work items into pieces that threads take in turn: a thread
that has to wait for a CPU holds up no more than its piece. Work items are independent and do not know the piece that
they are in, so the number of threads cannot change a result.
"""

import functools
import math
import operator
import os
import threading
from pathlib import Path

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


#: Pieces that a thread's share of the work is cut into.
_PIECES = 8


@njit()
def _work(stage, record, slot, items, pieces, tickets):
    """Do pieces of the work until none is left."""
    piece = simd.take_ticket(tickets)
    while piece < pieces:
        simd.call(stage, (record, slot, items * piece // pieces, items * (piece + 1) // pieces))
        piece = simd.take_ticket(tickets)


@njit(parallel=True)
def _run_parallel(stage, record, items, slots, pieces, tickets):
    for slot in numba.prange(slots):
        _work(stage, record, slot, items, pieces, tickets)


@njit()
def _run_pieces(stage, record, items, slots, threads, pieces):
    """Run on that many of Numba's threads. Compiled, since Numba's settings cost 10 us from Python."""
    tickets = np.zeros(1, np.int64)
    mask = numba.get_num_threads()
    numba.set_num_threads(threads)
    _run_parallel(stage, record, items, slots, pieces, tickets.ctypes.data)
    numba.set_num_threads(mask)
    return tickets[0]  # which lives until here


@njit()
def _run_serial(stage, record, items):
    simd.call(stage, (record, 0, 0, items))


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


def run(stage: int, record: int, items: int, slots: int) -> None:
    """Run ``stage(record, slot, begin, end)`` over all `items`, on at most `slots` threads.

    Parameters
    ----------
    stage : int
        Address of a stage: of `nbfftconv.jit.stage`.
    record : int
        Address of the record that it reads.
    items : int
        Number of independent work items.
    slots : int
        Number of scratch areas that the record provides: the thread count when the pass began.
    """
    threads = min(slots, items)
    if threads < 1:
        return
    if threads == 1 or _pool_is_my_parents:
        _run_serial(stage, record, items)
        return
    exclusive = _threading_layer() == "workqueue"
    if exclusive and not _workqueue_lock.acquire(blocking=False):
        _run_serial(stage, record, items)
        return
    try:
        used = min(threads, numba.config.NUMBA_NUM_THREADS)
        _run_pieces(stage, record, items, threads, used, min(items, _PIECES * threads))
    finally:
        if exclusive:
            _workqueue_lock.release()
