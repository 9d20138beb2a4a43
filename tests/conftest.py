"""Settings of the whole suite: a cache of its own, no profile, the default machine, cheap FFT planning."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before the package is imported: what this run compiles and plans is kept in a directory of its own,
# for its subprocesses too. What was measured on this machine before does not count.
if "NBFFTCONV_CACHE_DIR" not in os.environ:
    cache_dir = tempfile.mkdtemp(prefix="nbfftconv-tests-")
    os.environ["NBFFTCONV_CACHE_DIR"] = cache_dir
    atexit.register(shutil.rmtree, cache_dir, ignore_errors=True)
os.environ["NBFFTCONV_PROFILE"] = os.path.join(os.environ["NBFFTCONV_CACHE_DIR"], "no-profile.json")

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import nbfftconv
from nbfftconv import machine, threads
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.threads import get_counts
from nbfftconv.transforms import fftw

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=20, derandomize=True, **common)
settings.register_profile("thorough", max_examples=500, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def cheap_planning():
    """Hundreds of shapes are planned once and run once here: measuring them all would not pay."""
    effort = fftw.get_planning_effort()
    fftw.set_planning_effort("estimate")
    yield
    fftw.set_planning_effort(effort)


@pytest.fixture(scope="session", autouse=True)
def default_machine():
    """Tests of plans hold on any machine."""
    machine.set_machine(machine.DEFAULT)


@pytest.fixture(scope="session", autouse=True)
def every_thread_wakes():
    """What is tested is short, and yet to be cut for all threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_WORTH_WAKING", 0)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20140424)


@pytest.fixture
def restore_threads():
    counts = get_counts()
    yield
    nbfftconv.set_num_threads(*counts)


@pytest.fixture
def restore_scratch_limit():
    limit = get_scratch_limit()
    yield
    set_scratch_limit(limit)


@pytest.fixture
def tests_dir() -> Path:
    return Path(__file__).parent
