"""What test_interrupts.py runs in processes of their own: signal handlers that raise exceptions at any time.

``python interrupt_worker.py SCENARIO`` prints one JSON document.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from process_worker import HANG, WORK, digests

import nbfftconv
from nbfftconv import jit, scratch, simd, threads
from nbfftconv.records import RecordType, fields
from nbfftconv.scratch import set_scratch_limit

MIB = 2**20
SHAPE, F32 = (2, 3, 500, 700), np.dtype(np.float32)


class Stop(Exception):
    """What handlers raise. No KeyboardInterrupt: ``except Exception`` must not swallow this one either."""


unraisable: list[str] = []  # exceptions that were dropped
interrupts = 0


def interrupted(work: Callable[[], object], repeating: float = 0.0, longest: float = 0.02) -> object:
    """Return what the work returns in the end, ended by exceptions at random times before, later and later."""
    global interrupts
    armed = False

    def handler(*_: object) -> None:
        if armed:
            raise Stop

    signal.signal(signal.SIGALRM, handler)
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, longest), repeating)
            try:
                armed = True
                result = work()
                armed = False
                return result
            finally:
                armed = False
        except Stop:
            interrupts += 1
            longest *= 1.2 if repeating == 0 else 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def in_another_thread(work: Callable[[], object]) -> object:
    """Return what the work returns in a thread that signal handlers do not interrupt, if it ends."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(HANG)
    return results[0] if results else "it hangs"


def report(**findings: object) -> dict[str, object]:
    kept = sum(owner.nbytes for owner in scratch._pool.values())
    within = kept <= scratch.get_scratch_limit() + 64 * len(scratch._pool)
    return {"interrupts": interrupts, "unraisable": unraisable, "within the limit": within, **findings}


def all_passes(count: str, round: str, *names: str) -> object:
    """All kinds of passes, or those of some work, with many rounds a call: whatever comes to an end is right."""
    nbfftconv.set_num_threads(int(count))
    names = names or tuple(WORK)
    prefixes = [f"{name}," for name in names]
    expected = in_another_thread(lambda: digests(*prefixes))  # in one round each
    threads._ROUND = int(round)
    rounds = digests(*prefixes)
    differing = set()
    for name in names:
        want = {label: digest for label, digest in expected.items() if label.startswith(f"{name},")}
        for _ in range(3):
            found = {}
            for label in want:
                found |= interrupted(lambda label=label: digests(label), longest=0.004)
            differing |= {label for label in want if found[label] != want[label]}
    after = in_another_thread(lambda: digests(*prefixes))
    return report(plans=len(expected), rounds=rounds == expected, differing=sorted(differing), after=after == expected)


_RECORD = RecordType(fields("done"))


def _spin(real):
    def spin(r, worker, begin, end):
        done = simd.pointer(np.int64, r.done)
        for item in range(begin, end):
            until = simd.nanoseconds() + 1_000_000
            while simd.nanoseconds() < until:
                simd.pause()
            done[item] += 1

    return spin


_SPIN = jit.stage(_RECORD)(_spin)


def spinning(items: int, workers: int) -> tuple[np.ndarray, threads.Task]:
    """Counts of what was done of items that take a millisecond each, and the task."""
    record, done = _RECORD.zeros(), np.zeros(items, np.int64)
    record["done"] = done.ctypes.data
    return done, threads.Task(_SPIN.address(np.float64), record, items, workers)


def long_call(workers: str) -> object:
    """A call of some seconds that is interrupted at its beginning, and once more, by Ctrl-C."""
    done, task = spinning(4000, int(workers))
    _, short = spinning(10, int(workers))
    threads.run(short)
    found = []
    for _ in range(2):
        done[...] = 0
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with contextlib.suppress(KeyboardInterrupt):
            threads.run(task)
            found.append("not interrupted")
        first = done.copy()
        time.sleep(0.05)
        found.append([int(first.sum()) < len(done), int(first.max()), bool((first == done).all())])
    short_done, short = spinning(50, int(workers))
    threads.run(short)
    return {"found": found, "afterwards": short_done.tolist() == [1] * 50}


def storm(seconds: str) -> object:
    """A handler that raises every millisecond, whatever is under way, beside another thread that computes."""
    set_scratch_limit(40 * MIB)
    nothing = in_another_thread(lambda: digests("four_step, float32"))
    end = time.monotonic() + float(seconds)
    overlaps, wrong = [], []

    def lend() -> None:
        first = scratch.result(SHAPE, F32)
        first[0, 0] = 1
        second = scratch.borrow(first.nbytes).array
        second[...] = 255
        lasting = scratch.lasting(3 * MIB).array
        if np.shares_memory(first, second) or np.shares_memory(lasting, first) or (first[0, 0] != 1).any():
            overlaps.append("lent twice")

    def loop() -> None:
        while time.monotonic() < end:
            lend()
            threads.run(task)

    def beside() -> str:
        while time.monotonic() < end:
            if digests("four_step, float32") != nothing:
                wrong.append("beside")
        return "done"

    done, task = spinning(3, 2)
    threads.run(task)
    other = threading.Thread(target=beside, daemon=True)
    other.start()
    interrupted(loop, repeating=0.001, longest=0.001)
    other.join(HANG)
    again = in_another_thread(lambda: digests("four_step, float32")) == nothing
    return report(overlaps=overlaps, wrong=wrong, other="hangs" if other.is_alive() else "ended", again=again)


def reentered() -> object:
    """Handlers that call the package themselves, and wait for other threads that do, amid calls and loans."""
    expected = digests("fused, float32, forward", "direct, float32")
    found = []

    def handler(*_: object) -> None:
        mine = scratch.result(SHAPE, F32)
        mine[...] = 7
        found.append(digests("fused, float32, forward", "direct, float32") == expected)
        found.append(in_another_thread(lambda: scratch.result(SHAPE, F32).shape) == SHAPE)
        found.append(bool((mine == 7).all()))

    signal.signal(signal.SIGALRM, handler)
    for _ in range(100):
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-3))
        for number in range(20):
            memory = scratch.result(SHAPE, F32)
            memory[..., ::50] = number
            other = scratch.borrow(memory.nbytes).array
            other[::1000] = 255
            found.append(bool((memory[..., ::50] == number).all()))
        found.append(digests("fused, float32, forward", "direct, float32") == expected)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return report(right=all(found))


def compiling() -> object:
    """The first calls of a process with nothing compiled."""
    label = "four_step, float32, forward"
    found = interrupted(lambda: digests(label), longest=0.3)
    after = in_another_thread(lambda: digests(label, "direct, float32, forward"))
    return report(right=after[label] == found[label], after=len(after))


SCENARIOS = [all_passes, long_call, storm, reentered, compiling]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Print where it hangs; note what is dropped."""
    faulthandler.dump_traceback_later(280, exit=True)
    sys.unraisablehook = lambda found: unraisable.append(f"{found.exc_value!r} in {found.object!r}")
    yield


if __name__ == "__main__":
    random.seed(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    chosen = {scenario.__name__: scenario for scenario in SCENARIOS}[sys.argv[1]]
    with watched():
        print(json.dumps(chosen(*sys.argv[2:])))
