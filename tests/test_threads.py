"""Thread counts, Python threads, forks: the same bytes as one thread alone, never an abort, never a hang.

Each scenario runs in a process of its own, as a threading layer is chosen once per process.
"""

from __future__ import annotations

import os

import pytest
from processes import FEW, run_scenario

import nbfftconv

LAYERS = {"default": None, "workqueue": "workqueue"}


@pytest.fixture(scope="module")
def expected():
    """Digests of one process with one thread."""
    return run_scenario("once", NUMBA_THREADING_LAYER=None, NUMBA_NUM_THREADS="1")


def assert_same(found, expected):
    """Every dictionary of digests equals the expected one; a difference is reported by name."""
    for position, digests in enumerate(found):
        differing = [name for name in expected if digests[name] != expected[name]]
        assert differing == [], f"result {position} of {len(found)}"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("workers", [None, "4"])
def test_any_thread_count_gives_the_same_bytes(layer, workers, expected):
    found = run_scenario("thread_counts", NUMBA_THREADING_LAYER=LAYERS[layer], NUMBA_NUM_THREADS=workers)
    assert len(found) == 5
    assert_same(found, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_eight_python_threads_at_once(layer, expected):
    found = run_scenario("python_threads", NUMBA_THREADING_LAYER=LAYERS[layer])
    assert len(found) == 17
    assert_same(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "scenario", ["forked", "forked_first", "forked_while_busy", "threads_in_a_child", "process_pool"]
)
def test_forks(scenario, layer, expected):
    found = run_scenario(scenario, NUMBA_THREADING_LAYER=LAYERS[layer])
    assert len(found) >= 3
    assert_same(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_while_busy_with_nothing_compiled(tmp_path, expected):
    """Threads compile and plan in their first calls; children forked meanwhile find no lock held."""
    environment = {"NUMBA_THREADING_LAYER": None, "NBFFTCONV_CACHE_DIR": str(tmp_path)}
    found = run_scenario("forked_while_busy", *FEW, **environment)
    # A cache of its own has wisdom of its own, and so perhaps other last bits, the same in all processes.
    assert found[0].keys() == {name for name in expected if name.startswith(FEW)}
    assert_same(found, found[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_beside_threads_that_use_llvm():
    assert run_scenario("forked_beside_llvm") == [2] * 8


def test_set_and_get(restore_threads):
    for count in (1, 2, 3, 64):
        nbfftconv.set_num_threads(count)
        assert nbfftconv.get_num_threads() == count


def test_the_default_respects_affinity_and_quota():
    assert 1 <= nbfftconv.get_num_threads() <= (os.cpu_count() or 1)
