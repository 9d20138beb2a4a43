"""Peak resident memory, arrays and kernels' spectra apart, is what the plan says, and that is in the limit."""

from __future__ import annotations

import sys

import pytest
from geometries import DIRECTIONS
from processes import run_scenario

MIB = 1 << 20
MARGIN = 16 * MIB  # what the interpreter, the allocator and page rounding may add


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("limit", "batch", "channels", "filters", "size", "kernel"),
    [
        pytest.param(32 * MIB, 1, 1, 1, 2048, 63, marks=pytest.mark.slow),
        pytest.param(8 * MIB, 1, 1, 1, 2048, 63, marks=pytest.mark.slow),
        (8 * MIB, 4, 8, 8, 512, 15),
        pytest.param(256 * MIB, 1, 1, 1, 8192, 127, marks=pytest.mark.slow),
    ],
)
def test_peak(direction, limit, batch, channels, filters, size, kernel):
    # A spectrum of at most (8 kernel)**2 samples for each kernel, and for each of its gradients.
    spectra = 4 * (8 * kernel) ** 2 * channels * filters
    used = run_scenario("memory", direction, limit, batch, channels, filters, size, kernel)
    assert used["scratch"] <= limit
    assert used["bytes"] <= used["scratch"] + spectra + MARGIN
