"""What one of several processes does that start on one cache folder at the same moment: run by test_cache.py.

``python cold_worker.py REAL SIDES DELAY READY COUNT`` transforms tiles of those sides there and back, once as many
workers as COUNT have left a file in the folder READY, and prints the largest error. DELAY is the longest time in
seconds that a step of writing a file takes.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np

from nbfftconv.transforms import COMPLEX_BYTES
from nbfftconv.transforms.four_step import four_step


def slow_down(longest: float) -> None:
    """Files are written in pieces; a piece, and what puts a file in place, take their time."""
    write, replace = os.write, os.replace

    def write_slowly(descriptor, content):
        time.sleep(random.uniform(0, longest / 8))
        return write(descriptor, content[: max(1000, len(content) // 4)])

    def replace_slowly(*arguments, **keywords):
        time.sleep(random.uniform(0, longest))
        return replace(*arguments, **keywords)

    os.write, os.replace = write_slowly, replace_slowly


def there_and_back(real: type, side: int) -> float:
    """Largest error of a tile, transformed and transformed back."""
    transform = four_step(real, side, side)
    tile = np.zeros((side, transform.layout.pitch), real)
    tile[:, :side] = np.random.default_rng(side).random((side, side))
    before, work = tile.copy(), np.zeros(transform.work_items, real)
    spectrum = np.zeros(transform.layout.bins * COMPLEX_BYTES, np.uint8)
    functions = transform.input
    addresses = functions.context, tile.ctypes.data, work.ctypes.data, spectrum.ctypes.data
    for function in (functions.forward, functions.inverse):
        ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 7)(function)(*addresses, COMPLEX_BYTES, side, side)
    return float(np.abs(tile[:, :side] / side**2 - before[:, :side]).max())


if __name__ == "__main__":
    real, sides, delay = getattr(np, sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
    ready, count = Path(sys.argv[4]), int(sys.argv[5])
    if delay:
        slow_down(delay)
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < count:
        time.sleep(0.005)
    print(max(there_and_back(real, side) for side in sides))
