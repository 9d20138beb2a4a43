"""Thread counts and the one parallel loop, safe from any number of Python threads and after a fork.

Every stage of every pass runs through `run`, which cuts its work items into chunks that threads take in turn, each
thread those of an area of its own before it helps others: so what it wrote in a pass is mostly what it reads in the
next one, and a thread that has to wait for a CPU holds up no more than its chunk. Before the next step of a pass, a
thread waits for chunks that others have taken, and for nothing else: whatever number of threads there really is, one
that runs can do all that is left. Work items are independent and do not know the chunk that they are in, so the number
of threads cannot change a result.

Python answers signals, such as Ctrl-C, between two instructions of its main thread. So a call of that thread that takes
long comes back to Python every `_ROUND`, with nothing running, and goes on where it was.
"""

import contextlib
import ctypes
import functools
import math
import operator
import os
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from numba import types

from nbfftconv import environment, epoch, simd
from nbfftconv import numba_internals as internals
from nbfftconv.forking import fork_safe_lock
from nbfftconv.jit import Callback, njit
from nbfftconv.records import Record
from nbfftconv.rounding import cdiv

_CGROUP = Path("/sys/fs/cgroup")


def _cpu_quota(cgroup: Path = _CGROUP) -> float | None:
    """CPUs that the container's CFS quota allows; None without one, or where it is no number."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        except (OSError, ValueError):
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ArithmeticError):  # "max", or what no kernel writes
        return None
    return share if share > 0 else None  # -1 is none


def available() -> int:
    """Return the number of CPUs that affinity, the container's quota and ``OMP_NUM_THREADS`` allow."""
    # Numba's own default respects affinity and NUMBA_NUM_THREADS, and nothing else.
    bounds = numba.config.NUMBA_NUM_THREADS, _cpu_quota(), environment.number_of_threads(environment.OPENMP_THREADS)
    return max(1, math.ceil(min(bound for bound in bounds if bound is not None)))


def _nothing_measured() -> tuple[int, int] | None:
    return None


_measured_counts = _nothing_measured


def begin_with(measured: Callable[[], tuple[int, int] | None]) -> None:
    """Take the counts of `get_counts`, until some are set, from a function; it is called once, when they are needed.

    It returns what was measured to be best, or None.
    """
    global _measured_counts
    _measured_counts = measured
    _default_counts.cache_clear()
    epoch.begin()


@functools.cache
def _default_counts() -> tuple[tuple[int, int], str]:
    """Return what was measured, within what is available, or the latter; and where it comes from."""
    most = available()
    if (measured := _measured_counts()) is not None:
        return (min(measured[0], most), min(measured[1], most)), "profile"
    variables = environment.OPENMP_THREADS, environment.NUMBA_THREADS
    is_bounded = most in map(environment.number_of_threads, variables)
    return (most, most), "environment" if is_bounded else "default"


_counts: tuple[int, int] | None = None  # as set; of the stages that run a library's transforms last


class _Own(threading.local):
    """What `holding` lets a Python thread have; None if it has what all have."""

    counts: tuple[int, int] | None = None


_own = _Own()


@contextlib.contextmanager
def holding(count: int) -> Iterator[None]:
    """Let this Python thread's calls use so many threads meanwhile, whatever is set for all."""
    before, _own.counts = _own.counts, (count, count)
    try:
        yield
    finally:
        _own.counts = before


def _count(n: int) -> int:
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"the number of threads must be an integer, got {n!r}") from None
    if not 1 <= count <= 1024:
        raise ValueError(f"the number of threads must be from 1 to 1024, got {count}")
    return count


def set_num_threads(n: int, library: int | None = None) -> None:
    """Set the number of threads of every later call, in all Python threads.

    Parameters
    ----------
    n : int
        Threads of a call, from 1 to 1024. At most ``NUMBA_NUM_THREADS`` run at once.
    library : int, optional
        Threads of the stages whose transforms are a library's; `n` if it is left out. A tile's transform itself runs on
        one.

    Raises
    ------
    TypeError
        If a number is not an integer.
    ValueError
        If a number is less than 1 or more than 1024.

    Examples
    --------
    >>> import nbfftconv
    >>> before = nbfftconv.get_num_threads()
    >>> nbfftconv.set_num_threads(1)
    >>> nbfftconv.get_num_threads()
    1
    >>> nbfftconv.set_num_threads(before)
    """
    global _counts
    loops = _count(n)
    _counts = loops, loops if library is None else _count(library)
    epoch.begin()


def get_num_threads() -> int:
    """Return the number of threads of a call.

    At first it is the profile's, if there is one with thread counts (see ``nbfftconv tune``), else the number of
    CPUs; never more than affinity, the container's quota and ``OMP_NUM_THREADS`` allow.

    Returns
    -------
    int
        Threads of a call, at least 1.

    Examples
    --------
    >>> import nbfftconv
    >>> nbfftconv.get_num_threads() >= 1
    True
    """
    return get_counts()[0]


def get_counts() -> tuple[int, int]:
    """Return the number of threads of a call, and that of its stages whose transforms are a library's.

    Returns
    -------
    tuple of int
        Both counts, as `nbfftconv.set_num_threads` takes them.

    Examples
    --------
    >>> import nbfftconv
    >>> from nbfftconv.threads import get_counts
    >>> nbfftconv.set_num_threads(*get_counts())  # changes nothing
    """
    return _own.counts or _counts or _default_counts()[0]


def counts_source() -> str:
    """Return where the counts come from: "set", "profile", "environment" or "default"."""
    return "set" if _counts else _default_counts()[1]


#: Seconds of work, on one core, that a thread is worth waking for: that takes as long.
_WORTH_WAKING = 6e-5


def get_workers(seconds: float = math.inf) -> tuple[int, int]:
    """Return the counts of `get_counts`, as far as so many threads can run, and are worth waking for so much work.

    Each worker of a task has scratch memory.
    """
    loops, library = get_counts()
    most = numba.config.NUMBA_NUM_THREADS
    if 0 < seconds < most * _WORTH_WAKING:
        most = max(1, int(seconds / _WORTH_WAKING))
    return min(loops, most), min(library, most)


#: Chunks that a thread's share of a task is cut into. With three times as many, more neighbours in memory are another
#: thread's, which cost 8 %; with fewer, threads do not end together.
_CHUNKS = 8
#: A thread that waits for the chunks of others looks so often before it offers its CPU.
_LOOKS = 200
#: Nanoseconds after which the main thread's calls come back to Python: beginning and ending cost 0.1 ms.
_ROUND = 50_000_000
#: Nanoseconds that parts of chunks take, as far as that can be foreseen, where there are rounds: threads end together,
#: and a part that takes longer than expected is late by little.
_PART = 4_000_000
_ENDLESS = 2**62  # nanoseconds of a round of other threads
#: Areas of neighbouring items, of which threads take chunks of their own before they help others.
_AREAS = 8
# What compiled code has of a task: stage, record, items, workers, chunks; and its counters of items taken and done, in
# cache lines of their own.
_NUMBERS, _TAKEN, _DONE, _ROW = struct.Struct("5q"), 16, 24, 32


class Task(NamedTuple):
    """A stage over its work items.

    Attributes
    ----------
    stage : int
        Address of ``stage(record, worker, begin, end)``: of `nbfftconv.jit.stage`.
    record : Record
        What it reads.
    items : int
        Number of independent work items.
    workers : int
        Number of threads that may do them: as many scratch areas as the record provides.
    """

    stage: int
    record: Record
    items: int
    workers: int


def in_turns(stage: int, record: Record, items: int, workers: int, turns: int) -> list[Task]:
    """Return the tasks that do all items `turns` times, each time a share of their sums, as the record tells.

    So items that cannot be cut do not hold up an answer to a signal.
    """
    turns = max(1, turns)
    records = [record, *(record.copy() for _ in range(turns - 1))]
    for turn, each in enumerate(records):
        each["turn"], each["turns"] = turn, turns
    return [Task(stage, each, items, workers) for each in records]


@njit()
def share(count: int, part: int, parts: int) -> tuple[int, int]:
    """Range of one of `parts` parts of `count`."""
    return count * part // parts, count * (part + 1) // parts


@njit()
def _work(table: int, count: int, worker: int, end: int) -> None:
    """Do chunks of one task after the other; wait for those that other threads have taken before the next task.

    Come back when the clock has reached `end`. What nobody has taken by then is left to the next round.
    """
    for index in range(count):
        row = table + index * _ROW * 8
        task, done = simd.pointer(np.int64, row), row + _DONE * 8
        stage, record, items, workers, chunks = task[0], task[1], task[2], task[3], task[4]
        begin, most = 0, items
        if end != _ENDLESS:  # how long an item takes is measured, at first that of one
            begin, most = simd.nanoseconds(), 1
        areas = min(workers, _AREAS) if worker < workers else 0
        for turn in range(areas):  # its own area first, where its caches have what it wrote before
            area = (worker + turn) % areas
            start, stop = share(items, area, areas)
            taken, size, parts = row + (_TAKEN + area) * 8, stop - start, max(1, chunks // areas)
            first = simd.finished(taken)
            while first < size:
                chunk = cdiv((first + 1) * parts, size)
                last = min(size * chunk // parts, first + most)
                found = simd.claim(taken, first, last)
                if found == first:
                    simd.call(stage, (record, worker, start + first, start + last))
                    simd.announce(done, last - first)
                    if end != _ENDLESS:
                        now = simd.nanoseconds()
                        if now >= end:
                            return
                        most = max(1, (last - first) * min(_PART, end - now) // max(1, now - begin))
                        begin = now
                    found = simd.finished(taken)
                first = found
        looks = 0
        while simd.finished(done) < items:
            looks += 1
            if looks < _LOOKS:
                simd.pause()
            else:
                simd.yield_cpu()
                if end != _ENDLESS and simd.nanoseconds() >= end:
                    return


@njit()
def _end(nanoseconds: int) -> int:
    return _ENDLESS if nanoseconds == _ENDLESS else simd.nanoseconds() + nanoseconds


@njit(parallel=True)
def _run_parallel(table: int, count: int, workers: int, end: int) -> None:
    for worker in numba.prange(workers):
        _work(table, count, worker, end)


@njit()
def _run_tasks(table: int, count: int, workers: int, threads: int, nanoseconds: int) -> None:
    """Run on that many of Numba's threads. Compiled, since Numba's settings cost 10 us from Python."""
    mask = internals.num_threads()
    internals.set_num_threads(threads)
    _run_parallel(table, count, workers, _end(nanoseconds))
    internals.set_num_threads(mask)


@njit()
def _run_serial(table: int, count: int, nanoseconds: int) -> None:
    _work(table, count, 0, _end(nanoseconds))


# Numba's workqueue layer aborts the process when two threads are in it. Who finds it held need not wait.
_workqueue_lock = threading.Lock()
# GNU OpenMP ends a forked child that uses the pool of its parent.
_pool_is_my_parents = False


def _after_fork_in_child() -> None:
    global _pool_is_my_parents
    if _host_pool is not None:
        _pool_is_my_parents = True
        return
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
    return str(numba.threading_layer())


def _start_pool() -> None:
    # GNU OpenMP reads its policy as it is loaded. Waiting threads that spin take the CPUs from other threads of the
    # process: with one busy neighbour a stage took 8 ms instead of 12 us.
    policy = "OMP_WAIT_POLICY"
    chosen = policy in os.environ or "GOMP_SPINCOUNT" in os.environ
    try:
        if not chosen:
            os.putenv(policy, "passive")  # not in `os.environ`, which other threads read
        numba.get_num_threads()
    finally:
        if not chosen:
            os.unsetenv(policy)


# What a member of a team has: the table, its rows, the nanoseconds of the round; and, so many bytes later, how many
# members have begun.
_BEGUN = 24


def _member(real: type) -> Callable:
    def work_in_team(team: int) -> None:
        numbers = simd.pointer(np.int64, team)
        worker = simd.finished(team + _BEGUN)
        found = simd.claim(team + _BEGUN, worker, worker + 1)
        while found != worker:
            worker = found
            found = simd.claim(team + _BEGUN, worker, worker + 1)
        _work(numbers[0], numbers[1], worker, _end(numbers[2]))

    return work_in_team


_work_in_team = Callback(_member, types.void(types.intp))


class HostPool:
    """The pool of an OpenMP library (GNU's) that a host has loaded, such as PyTorch: stages run there.

    With two pools in a process each would wake its threads while those of the other one still wait for work.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._run = library.GOMP_parallel
        self._run.argtypes, self._run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        self._most = library.omp_get_max_threads

    def threads(self) -> int:
        """Return how many threads the host lets the caller have."""
        return int(self._most())

    def run(self, table: int, count: int, threads: int, nanoseconds: int) -> None:
        """Run rows of a table on so many threads."""
        team = array("q", (table, count, nanoseconds, 0))
        self._run(_work_in_team.address(np.float32), team.buffer_info()[0], threads, 0)


_host_pool: HostPool | None = None


def run_in(pool: HostPool | None) -> None:
    """Run stages in a host's pool from now on, or, with None, in Numba's."""
    global _host_pool
    _host_pool = pool


class TaskTable:
    """Tasks that follow each other, laid out for threads: a row for each, and their records.

    Parameters
    ----------
    tasks : iterable of Task

    Attributes
    ----------
    words : array.array
        Of int64: the table. What is run is a copy.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        todo = [task for task in tasks if task.items > 0]
        self.words = array("q", bytes(8 * _ROW * len(todo)))
        self._rows = range(0, len(self.words), _ROW)
        self._threads = max((min(task.workers, task.items) for task in todo), default=0)
        for row, (stage, record, items, workers) in zip(self._rows, todo, strict=True):
            chunks = min(items, _CHUNKS * workers) if workers > 1 else 1
            # the record is told by its first word until it is known where the table is
            _NUMBERS.pack_into(self.words, row * 8, stage, len(self.words), items, workers, chunks)
            self.words.extend(record.words)

    def run(self, words: "array[int]") -> None:
        """Run the tasks one after the other, each over all its work items, by the same threads.

        To start threads for every task, and let them sleep in between, would cost 70 us a task.

        A signal handler that raises an exception in the main thread ends it between two rounds: no thread is at the
        tasks any more, and what they write is unfinished.

        Parameters
        ----------
        words : array.array
            A copy of the table, of this call only. Its records may have been changed.
        """
        address = words.buffer_info()[0]
        for row in self._rows:
            words[row + 1] = address + 8 * words[row + 1]
        if self._threads > 0:
            self._run_rows(words, self._rows)

    def _run_rows(self, words: "array[int]", rows: range) -> None:
        """Run the tasks of some rows."""
        threads, pool = self._threads, _host_pool
        exclusive, used = False, 1
        if threads > 1 and not _pool_is_my_parents:
            used = min(threads, numba.config.NUMBA_NUM_THREADS)
            if pool is not None:
                used = min(used, pool.threads())
            else:
                exclusive = _threading_layer() == "workqueue"
        address, count, last = words.buffer_info()[0] + 8 * rows[0], len(rows), rows[-1]
        is_main = threading.get_ident() == threading.main_thread().ident
        round = _ROUND if is_main else _ENDLESS
        while words[last + _DONE] < words[last + 2]:
            if used == 1 or (exclusive and _workqueue_lock.locked()):
                _run_serial(address, count, round)
            elif pool is not None:
                pool.run(address, count, used, round)
            elif exclusive:
                with _workqueue_lock:
                    _run_tasks(address, count, threads, used, round)
            else:
                _run_tasks(address, count, threads, used, round)


def run(*tasks: Task) -> None:
    """Run tasks one after the other, as a `TaskTable` does."""
    table = TaskTable(tasks)
    table.run(table.words)
