"""What the tests of threads, forks, caches and memory run in processes of their own.

``python process_worker.py SCENARIO`` prints one JSON document. Wrong bytes show in its digests; an abort or a hang
shows in the exit status.
"""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import astuple, replace
from multiprocessing import get_context
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from geometries import WAYS, Case
from numba.core.event import install_recorder

import nbfftconv
from nbfftconv.machine import get_machine
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.threads import get_counts

PYTHON_THREADS = 8
HANG = 200  # seconds after which a child counts as hung

# name: case, choices of the plan, scratch limit while it is planned
WORK = {
    "many tiles": (
        Case((2, 3, 90, 85), (4, 3, 7, 5), padding=3),
        {"algorithm": "fft", "tile": (16, 12)},
        None,
    ),
    "many blocks": (Case((3, 4, 75, 70), (6, 4, 9, 9)), {"algorithm": "fft", "tile": (24, 24)}, 128 << 10),
    "codelets": (
        Case((2, 5, 75, 70), (21, 5, 5, 5), padding=2),
        {"algorithm": "fft", "transform": "codelet", "tile": (12, 16)},
        512 << 10,
    ),
    # stage after stage, which few channels are not by themselves
    "codelets in stages": (
        Case((2, 5, 75, 70), (21, 5, 5, 5), padding=2),
        {"algorithm": "fft", "transform": "codelet", "tile": (12, 16), "fused": False},
        512 << 10,
    ),
    "row codelets": (
        Case((2, 5, 9, 300), (21, 5, 1, 31), padding=(0, 15)),
        {"algorithm": "fft", "transform": "row_codelet", "tile": (1, 64)},
        512 << 10,
    ),
    "row four_step": (
        Case((2, 3, 2, 5000), (5, 3, 1, 31), padding=(0, 15)),
        {"algorithm": "fft", "transform": "row_four_step", "tile": (1, 1920), "fused": False},
        512 << 10,
    ),
    "four_step": (
        Case((1, 3, 130, 90), (5, 3, 5, 5), padding=2),
        {"algorithm": "fft", "transform": "four_step", "tile": (60, 36), "fused": False},
        512 << 10,
    ),
    "fused": (
        Case((2, 4, 130, 90), (40, 2, 7, 5), groups=2),
        {"algorithm": "fft", "transform": "four_step", "tile": (60, 36), "fused": True, "block_tiles": 5},
        None,
    ),
    "one tile": (Case((1, 24, 20, 19), (16, 24, 9, 9)), {"algorithm": "fft", "tile": (32, 32)}, None),
    "phases": (
        Case((2, 6, 50, 53), (9, 2, 6, 7), stride=(2, 1), dilation=(1, 3), groups=3, padding=4),
        {"algorithm": "fft"},
        None,
    ),
    "circular": (Case((1, 2, 64, 64), (2, 2, 21, 21), padding=10, padding_mode="circular"), {}, None),
    "winograd": (Case((2, 5, 75, 70), (21, 5, 3, 3), padding=1), {"algorithm": "winograd", "fused": True}, None),
    "winograd in stages": (
        Case((2, 5, 75, 70), (21, 5, 3, 3), padding=1),
        {"algorithm": "winograd", "fused": False},
        512 << 10,
    ),
    "direct": (Case((3, 5, 33, 31), (7, 5, 3, 3), padding=1), {"algorithm": "direct"}, None),
    "direct by phases": (Case((2, 6, 33, 45), (9, 6, 5, 3), stride=2, padding=1), {"algorithm": "direct"}, None),
    "depthwise": (Case((2, 6, 33, 45), (12, 1, 5, 3), padding=1, groups=6), {"algorithm": "direct"}, None),
}


def digests(*prefixes: str) -> dict[str, str]:
    """SHA-256 of the bytes of every result of WORK, or of those whose names begin so, computed anew."""
    found = {}
    for (name, dtype, direction, transposed), plan in PLANS.items():
        label = f"{name}, {np.dtype(dtype).name}, {direction}{', transposed' * bool(transposed)}"
        if prefixes and not label.startswith(prefixes):
            continue
        case, _, _ = WORK[name]
        a, b = case.operands(direction, dtype, np.random.default_rng(11))
        if name == "many tiles":
            a[0, 0, 3, 3] = np.inf
        found[label] = hashlib.sha256(case.run(direction, a, b, plan()).tobytes()).hexdigest()
    return found


def plan_now(case: Case, direction: str, dtype: type, limit: int | None, **choices: object) -> Callable[[], object]:
    """Return a function that returns the plan; one for another scratch limit is made at once."""
    if limit is None:
        return lambda: case.plan(direction, dtype, **choices)  # by every thread and child for itself
    before = get_scratch_limit()
    set_scratch_limit(limit)
    plan = case.plan(direction, dtype, **choices)
    set_scratch_limit(before)
    return lambda: plan


PLANS = {
    (name, dtype, direction, transposed): plan_now(case, direction, dtype, limit, transposed=transposed, **choices)
    for name, (case, choices, limit) in WORK.items()
    for dtype in (np.float32, np.float64)
    for direction, transposed in WAYS
}


def fork(work: Callable[[], object]) -> Callable[[], object]:
    """Start a forked child that does the work; the function returned waits for it and returns its result."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.register(signal.SIGALRM, chain=True)  # where it hangs
            signal.alarm(HANG)
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)

    def wait() -> object:
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        assert status == 0, f"child ended with wait status {status}"
        return json.loads(text)

    return wait


def once(*prefixes: str) -> object:
    return digests(*prefixes)


def compilations(*prefixes: str) -> object:
    """The digests, and the package's functions that Numba has compiled for them."""
    with install_recorder("numba:run_pass") as recorder:
        found = digests(*prefixes)
    passes = [event.data for _, event in recorder.buffer if event.is_start]
    names = {f"{each['module']}.{each['qualname']}" for each in passes}
    return {"digests": found, "compiled": sorted(name for name in names if name.startswith("nbfftconv."))}


def thread_counts(*prefixes: str) -> object:
    found = []
    for count in (1, 2, 4, 3, 1):
        nbfftconv.set_num_threads(count)
        found.append(digests(*prefixes))
    return found


def python_threads(*prefixes: str) -> object:
    """Eight Python threads at once, two rounds each, and the main thread alone afterwards."""
    barrier = threading.Barrier(PYTHON_THREADS)

    def work(_: int) -> list:
        barrier.wait()
        return [digests(*prefixes) for _ in range(2)]

    with ThreadPoolExecutor(PYTHON_THREADS) as pool:
        rounds = list(pool.map(work, range(PYTHON_THREADS)))
    return [digests(*prefixes), *(found for some in rounds for found in some)]


def forked(*prefixes: str) -> object:
    """Children after the parent has computed, a grandchild, and the parent once more."""
    compute = functools.partial(digests, *prefixes)
    found = [compute()]
    children = [fork(compute) for _ in range(2)]
    grandchild = fork(lambda: [compute(), fork(compute)()])
    found += [wait() for wait in children] + grandchild()
    return [*found, compute()]


def forked_first(*prefixes: str) -> object:
    """Children before the parent has computed anything."""
    compute = functools.partial(digests, *prefixes)
    children = [fork(compute) for _ in range(2)]
    return [compute(), *(wait() for wait in children)]


def forked_while_busy(*prefixes: str) -> object:
    """Children forked while other threads compute, from the first call on: compilation and planning too."""
    stop = threading.Event()

    def work(_: int) -> list:
        found = [digests(*prefixes)]
        while not stop.is_set():
            found.append(digests(*prefixes))
        return found

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(work, i) for i in range(4)]
        try:
            found = []
            for _ in range(4):
                found.append(fork(lambda: digests(*prefixes))())
        finally:
            stop.set()
        return found + [digest for future in busy for digest in future.result()]


def forked_beside_llvm() -> object:
    """Children that compile, forked while other threads of the parent are in LLVM, outside this package."""
    stop = threading.Event()

    def work(_: int) -> None:
        while not stop.is_set():
            llvmlite.binding.parse_assembly("define void @nothing() { ret void }")

    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(work, i) for i in range(3)]
        try:
            found = [fork(lambda: numba.njit(lambda x: x + 1)(1))() for _ in range(8)]
        finally:
            stop.set()
        for future in busy:
            future.result()
    return found


def threads_in_a_child(*prefixes: str) -> object:
    """A forked child that is itself many-threaded."""
    return [digests(*prefixes), *fork(lambda: python_threads(*prefixes))()]


def process_pool(*prefixes: str) -> object:
    found = [digests(*prefixes)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        futures = [pool.submit(digests, *prefixes) for _ in range(4)]
        found += [future.result(timeout=HANG) for future in futures]
    return found


def status(field: str) -> int:
    """A field of this process's status on Linux, in bytes: VmRSS, or VmHWM, its peak.

    Not ``ru_maxrss``, which starts at what the parent process had.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(direction: str, limit: str, *sizes: str) -> object:
    """Peak of resident memory during one pass, beyond what there was before and the result."""
    set_scratch_limit(int(limit))
    batch, channels, filters, size, kernel = map(int, sizes)
    rng = np.random.default_rng(1)

    def prepare(size: int, **choices: object) -> tuple:
        case = Case((batch, channels, size, size), (filters, channels, kernel, kernel), padding=kernel // 2)
        operands = [rng.random(shape, dtype=np.float32) for shape in case.shapes(direction)]
        return case, operands, case.plan(direction, np.float32, algorithm="fft", **choices)

    case, operands, plan = prepare(size)
    # Compiled code, FFTW's plans: what a process takes once.
    small, few, alike = prepare(2 * kernel, transform=plan.transform, tile=plan.tile)
    small.run(direction, *few, replace(alike, fused=plan.fused))

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    result = case.run(direction, *operands, plan)
    return {"bytes": status("VmHWM") - before - result.nbytes, "scratch": plan.scratch_bytes}


def planned(input_size: str = "[1, 1, 9, 9]", weight_size: str = "[1, 1, 3, 3]") -> object:
    """Automatic plans of test_profile.py's convolution, the counts of threads, the machine's figures."""
    sizes = json.loads(input_size), json.loads(weight_size)
    plans = [nbfftconv.plan_conv2d(*sizes, padding=2, weight_is_transformed=kept) for kept in (False, True)]
    return {
        "choices": [(plan.algorithm, getattr(plan, "transform", None), getattr(plan, "tile", None)) for plan in plans],
        "reasons": [plan.reason for plan in plans],
        "counts": get_counts(),
        "machine": astuple(get_machine()),
    }


def measured(input_size: str, weight_size: str) -> object:
    """The reason of a plan that was measured."""
    return nbfftconv.plan_conv2d(json.loads(input_size), json.loads(weight_size), measure=True).reason


SCENARIOS = [
    once,
    compilations,
    thread_counts,
    python_threads,
    forked,
    forked_first,
    forked_while_busy,
    forked_beside_llvm,
    threads_in_a_child,
    process_pool,
    memory,
    planned,
    measured,
]

if __name__ == "__main__":
    chosen = {scenario.__name__: scenario for scenario in SCENARIOS}[sys.argv[1]]
    print(json.dumps(chosen(*sys.argv[2:])))
