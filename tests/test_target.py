"""All blocking follows from the target: the values on processors with vectors of 64, 32 and 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from llvmlite import binding

from nbfftconv.target import TARGET, Target, power_of_two

PRINT = """
import json
from nbfftconv import accumulate, transpose
from nbfftconv.direct import dense, dense_grad_weight, depthwise
from nbfftconv.target import TARGET
import sys
modules = sys.modules["nbfftconv.transpose"], dense, dense_grad_weight, depthwise
numbers = {
    module.__name__.rpartition(".")[2]: {name: value for name, value in vars(module).items() if type(value) is int}
    for module in modules
}
for name in ("COMPLEX", "REAL"):
    numbers[name] = vars(getattr(accumulate, name))
found = TARGET.vector_bytes, TARGET.registers, TARGET.has_masked_loads, TARGET.has_matrix_unit
print(json.dumps([found, numbers]))
"""

# Of 16 and of 32 registers.
EXPECTED = {
    "COMPLEX": {"rows": (2, 4), "columns": (2, 3), "depth": 88, "item_rows": 128, "panel_vectors": 16},
    "REAL": {"rows": (4, 8), "columns": 3, "depth": 64, "item_rows": 384, "panel_vectors": 64},
    "transpose": {"_BLOCK": 32},
    "dense": {"_ROWS": (4, 8), "_VECTORS": 3, "_DEPTH": 192, "_MOST_FILTERS": 1024},
    "dense_grad_weight": {
        "_TAPS": (4, 9), "_VECTORS": 3, "_PIXELS": 128, "_COLUMNS": 128, "_MOST_TAPS": 576, "_WINDOW_BYTES": 2**19,
        "_MOST_BYTES": 2**21,
    },
    "depthwise": {"_ROWS": 8, "_VECTORS": (1, 2), "_MOST_BYTES": 2**19, "_WINDOW_BYTES": 2**15},
}  # fmt: skip


def numbers(cpu):
    """Target, and whole numbers of each module, in a process that is held to a CPU."""
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu}
    if cpu is None:
        environment.pop("NUMBA_CPU_NAME")
    run = subprocess.run([sys.executable, "-c", PRINT], env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize(("cpu", "vector_bytes"), [(None, None), ("haswell", 32), ("generic", 16)])
def test_blocking(cpu, vector_bytes):
    features = binding.get_host_cpu_features()
    if cpu == "haswell" and not features.get("avx2"):
        pytest.skip("no AVX2 here")
    (found_bytes, registers, has_masked_loads, has_matrix_unit), found = numbers(cpu)
    assert vector_bytes in (None, found_bytes)
    if binding.get_default_triple().startswith("x86_64"):
        assert registers == (32 if found_bytes == 64 else 16)
    assert has_masked_loads is (found_bytes > 16)
    assert has_matrix_unit is (cpu is None and TARGET.has_matrix_unit)
    for module, expected in EXPECTED.items():
        for name, value in expected.items():
            value = value if isinstance(value, int) else value[registers == 32]
            assert found[module][name] == value, (module, name)


def test_the_target_of_this_process():
    assert Target.of_process() == TARGET
    assert TARGET.l1_bytes < TARGET.l2_bytes < TARGET.last_level_bytes


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 7, 8, 9)] == [1, 2, 2, 4, 4, 8, 8]
