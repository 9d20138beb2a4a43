"""Signal handlers that raise, as Ctrl-C does: a call ends soon, nothing is swallowed, held or wrong afterwards."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from processes import run_scenario

from nbfftconv import jit, simd, threads
from nbfftconv.records import RecordType, fields

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that raise signals here")

WORKER = Path(__file__).with_name("interrupt_worker.py")


def run(name, *arguments, **environment):
    return run_scenario(name, *arguments, worker=WORKER, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "round"), [(1, 20_000), (2, 20_000), (2, 1), (2, 50_000_000)])
def test_all_passes_at_random_times(count, round):
    found = run("all_passes", count, round)
    assert found.pop("plans") > 50 and found.pop("interrupts") > 20
    assert found == {"rounds": True, "differing": [], "after": True, "unraisable": [], "within the limit": True}


def test_some_passes_at_random_times():
    found = run("all_passes", 2, 20_000, "fused", "direct")
    assert found.pop("plans") > 10 and found.pop("interrupts") > 3
    assert found == {"rounds": True, "differing": [], "after": True, "unraisable": [], "within the limit": True}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow), 5])
@pytest.mark.parametrize("layer", [None, pytest.param("workqueue", marks=pytest.mark.slow)])
def test_a_long_call_ends_before_its_work_is_done(workers, layer):
    """Nothing runs on afterwards, and no item was done twice."""
    found = run("long_call", workers, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="2")
    assert found == {"found": [[True, 1, True]] * 2, "afterwards": True}


@pytest.mark.slow
def test_a_storm_of_exceptions():
    found = run("storm", 6)
    assert found.pop("interrupts") > 500
    assert found == {
        "unraisable": [], "within the limit": True, "overlaps": [], "wrong": [], "other": "ended", "again": True
    }  # fmt: skip


def test_handlers_that_call_the_package():
    found = run("reentered")
    assert found == {"interrupts": 0, "unraisable": [], "within the limit": True, "right": True}


@pytest.mark.slow
def test_interrupted_compilation(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    found = run("compiling", NBFFTCONV_CACHE_DIR=str(cache))
    assert found.pop("interrupts") > 3
    assert found == {"unraisable": [], "within the limit": True, "right": True, "after": 2}


_RECORD = RecordType(fields("done"))


def _counts(real):
    def count_items(r, worker, begin, end):
        done = simd.pointer(np.int64, r.done)
        for item in range(begin, end):
            done[item] += 1

    return count_items


_count_items = jit.stage(_RECORD)(_counts)


class Stop(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, 40, 300])
def test_rounds(size, workers, monkeypatch):
    """With rounds of no time, a thread does one item a round; what is left is done in the next ones, nothing twice."""
    done = np.zeros((4, size), np.int64)
    tasks, records = [], []
    for row in done:
        record = _RECORD.zeros()
        record["done"] = row.ctypes.data
        records.append(record)
        tasks.append(threads.Task(_count_items.address(np.float64), record, size, workers))
    rounds, most = 0, None

    def counted(inner):
        def run_round(*arguments):
            nonlocal rounds
            if rounds == most:
                raise Stop
            rounds += 1
            inner(*arguments)

        return run_round

    monkeypatch.setattr(threads, "_host_pool", None)  # which PyTorch's tests have set
    monkeypatch.setattr(threads, "_ROUND", 0)
    monkeypatch.setattr(threads, "_run_tasks", counted(threads._run_tasks))
    monkeypatch.setattr(threads, "_run_serial", counted(threads._run_serial))
    threads.run(*tasks)
    assert (done == 1).all()
    assert rounds >= 4 * size // workers
    done[...] = 0
    rounds, most = 0, 3
    if 4 * size > 3 * workers:
        with pytest.raises(Stop):
            threads.run(*tasks)
        assert 3 <= done.sum() <= 3 * workers
    monkeypatch.undo()
    done[...] = 0
    threads.run(*tasks)
    assert (done == 1).all()
