"""Nothing beyond an array is read or written, nor beyond scratch memory: neighbouring pages are out of bounds."""

from __future__ import annotations

import sys
from pathlib import Path

import guard_worker
import pytest
from guard import guarded_bytes, guarded_scratch
from processes import run_scenario

from nbfftconv import scratch
from nbfftconv.transforms import registry

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages")

WORKER = Path(guard_worker.__file__)
BEYOND = """
from guard import guarded_bytes
import ctypes
array = guarded_bytes(5000, {at_end})
print(ctypes.string_at(array.ctypes.data, 5000)[-1])
print(ctypes.string_at(array.ctypes.data + {beyond}, 1)[0])
"""


FEW = "strided", "phases of other lengths", "grouped"
REST = tuple(name for name in guard_worker.CASES if name not in FEW)


@pytest.mark.parametrize("names", [FEW, pytest.param(REST, marks=pytest.mark.slow)], ids=["few", "rest"])
@pytest.mark.parametrize("algorithm", [*registry.names(), "direct", "layer"])
def test_nothing_beyond_the_arrays_is_touched(algorithm, names):
    found = run_scenario(algorithm, *names, worker=WORKER)
    assert found.pop("runs") >= 4 * len(names)
    assert found == {"differing": [], "lent": True}


@pytest.mark.parametrize(("at_end", "beyond"), [(True, 5000), (False, -1)])
def test_beyond_is_out_of_reach(at_end, beyond, tmp_path):
    """Else the test above could not fail."""
    assert guarded_bytes(5000, at_end).tolist() == [255] * 5000
    script = tmp_path / "beyond.py"
    script.write_text(BEYOND.format(at_end=at_end, beyond=beyond))
    with pytest.raises(AssertionError, match="exit status -"):
        run_scenario("", worker=script)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("nbytes", [1, 64, 4096, 5000])
def test_scratch_memory_begins_at_a_cache_line(nbytes, at_end):
    assert guarded_bytes(nbytes, at_end).nbytes == nbytes
    with guarded_scratch(at_end) as lent:
        for lend in (scratch.borrow, scratch.lasting, scratch.aligned):
            array, address = lend(nbytes)
            assert array.nbytes == nbytes and array.ctypes.data == address and address % 64 == 0
    assert lent == [nbytes] * 3
