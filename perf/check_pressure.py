"""What tests may not assert: the times that a new size, few NaN, Ctrl-C and exact zeros take, beside their limits.

- planning: the first call for a size less its second one, median over random sizes; at most 1 ms;
- NaN: a pass with a share of NaN in its operands, of 1.5 times direct convolution plus twice the time without them;
- Ctrl-C: from the signal to its exception, the longest of several at random times of long calls; at most 0.1 s;
- exact zeros: a pass on arrays without zeros, by the same without looking for them; at most 1.03;
- memory: what a layer keeps after images of 320 sizes; at most 512 MiB.
"""

import argparse
import contextlib
import functools
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from rounds import seconds_of, table

import nbfftconv
from nbfftconv.passes import backward, forward, grad_input, grad_weight

PASSES = ("forward", "grad_weight", "grad_input")
LAYERS = {  # input, weight, padding, groups
    "7×7": ((8, 64, 112, 112), (64, 64, 7, 7), 3, 1),
    "3×3": ((1, 64, 224, 224), (64, 64, 3, 3), 1, 1),
    "31×31 depthwise": ((8, 128, 56, 56), (128, 1, 31, 31), 15, 128),
}
Rows = Iterator[tuple[str, float, float]]  # what is measured, its figure and its limit


def caller(name: str, direction: str, algorithm: str, share: float = 0) -> Callable[[], Any]:
    """Return a pass on random arrays, of which a share is NaN."""
    size, weight_size, padding, groups = LAYERS[name]
    options = {"padding": padding, "groups": groups, "algorithm": algorithm}
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape, dtype=np.float32) for shape in (size, weight_size))
    g = rng.standard_normal((size[0], weight_size[0], *size[2:]), dtype=np.float32)
    for array in (x, g) if share else ():
        array.reshape(-1)[rng.integers(0, array.size, max(1, int(share * array.size)))] = np.nan
    if direction == "forward":
        return lambda: nbfftconv.conv2d(x, w, **options)
    if direction == "grad_weight":
        return lambda: nbfftconv.conv2d_weight(x, w.shape, g, **options)
    return lambda: nbfftconv.conv2d_input(x.shape, w, g, **options)


def best(run: Callable[[], Any], times: int = 3) -> float:
    """Return the shortest time of some calls, without the first."""
    run()
    return min(seconds_of(run) for _ in range(times))


def planning() -> Rows:
    """A new size in the function, in a layer for inference, and in a step."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((16, 16, 3, 3), dtype=np.float32)
    inference, training = nbfftconv.Conv2d(w, padding=1, training=False), nbfftconv.Conv2d(w, padding=1)

    def step(x: np.ndarray) -> None:
        training.backward(training(x))

    for name, run in (
        ("conv2d", lambda x: nbfftconv.conv2d(x, w, padding=1)),
        ("a layer in inference", inference),
        ("a step", step),
    ):
        sizes = rng.permutation([(height, width) for height in range(14, 90) for width in range(14, 90)])[:300]
        differences = []
        for height, width in sizes.tolist():
            x = np.ones((1, 16, height, width), np.float32)
            first, again = (seconds_of(functools.partial(run, x)) for _ in range(2))
            differences.append(first - again)
        yield f"planning a new size, {name}, ms", 1e3 * statistics.median(differences), 1.0


def few_nan() -> Rows:
    """Any share of NaN, in all passes."""
    for name in LAYERS:
        for direction in PASSES:
            clean = best(caller(name, direction, "fft"))
            limit = 1.5 * best(caller(name, direction, "direct"), 1) + 2 * clean
            slowest = max(
                (best(caller(name, direction, "fft", share), 2), share) for share in (1e-6, 1e-4, 1e-3, 1e-2, 0.3)
            )
            yield f"NaN, {name} {direction}, share {slowest[1]:g}, ms", 1e3 * slowest[0], 1e3 * limit


def ctrl_c() -> Rows:
    """Signals at random times of calls that take long."""
    rng = np.random.default_rng(2)
    x, w = np.ones((8, 64, 256, 256), np.float32), np.ones((64, 64, 9, 9), np.float32)
    g = np.ones((8, 64, 248, 248), np.float32)
    sent = 0.0

    def send() -> None:
        nonlocal sent
        sent = time.perf_counter()
        os.kill(os.getpid(), signal.SIGINT)

    for algorithm in ("fft", "direct"):
        for name, run in (
            ("forward", lambda a=algorithm: nbfftconv.conv2d(x, w, algorithm=a)),
            ("grad_weight", lambda a=algorithm: nbfftconv.conv2d_weight(x, w.shape, g, algorithm=a)),
            ("grad_input", lambda a=algorithm: nbfftconv.conv2d_input(x.shape, w, g, algorithm=a)),
        ):
            longest = 0.0
            whole = seconds_of(run)
            for _ in range(6):
                timer = threading.Timer(rng.uniform(0.1, 0.9) * whole, send)
                try:
                    timer.start()
                    while True:
                        run()
                except KeyboardInterrupt:
                    longest = max(longest, time.perf_counter() - sent)
            yield f"Ctrl-C, {algorithm} {name} of {whole:.2f} s, ms", 1e3 * longest, 100.0


class Nothing:
    """Stands for what looks for zeros."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def fill(self) -> None:
        """Write nothing."""

    clear = fill


@contextlib.contextmanager
def not_looking() -> Iterator[None]:
    """Look for no zeros."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (forward, "BlankWindows"), (grad_input, "BlankWindows"), (backward, "BlankWindows"),
            (grad_weight, "UnmetWeights"), (backward, "UnmetWeights"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, Nothing))
        yield


def exact_zeros() -> Rows:
    """The look for zeros where there are none."""
    for name in LAYERS:
        for direction in PASSES:
            run = caller(name, direction, "fft")
            run()
            looking, blind = [], []
            for number in range(40):  # the one and the other is first
                if number % 2:
                    looking.append(seconds_of(run))
                with not_looking():
                    blind.append(seconds_of(run))
                if not number % 2:
                    looking.append(seconds_of(run))
            yield f"exact zeros, {name} {direction}", statistics.median(looking) / statistics.median(blind), 1.03


def memory() -> Rows:
    """A layer that meets images of many sizes."""
    rng = np.random.default_rng(3)
    layer = nbfftconv.Conv2d(rng.standard_normal((256, 256, 3, 3), dtype=np.float32), padding=1, training=False)
    for height, width in rng.integers(14, 200, (320, 2)).tolist():
        layer(np.ones((1, 256, height, width), np.float32))
    kept = layer._kernels
    yield f"a layer keeps after 320 sizes, {len(kept.forms)} forms of its kernels, MiB", kept.nbytes / 2**20, 512.0


CHECKS = {check.__name__: check for check in (planning, few_nan, ctrl_c, exact_zeros, memory)}


def main() -> int:
    """Measure, print the table, and return 1 if a limit is passed."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=list(CHECKS), default=list(CHECKS), metavar="CHECK")
    args = parser.parse_args()
    rows, over = [], 0
    for name in args.only:
        for what, figure, limit in CHECKS[name]():
            rows.append([what, f"{figure:.4g}", f"{limit:.4g}", "" if figure <= limit else "OVER"])
            over += figure > limit
            print(*rows[-1], file=sys.stderr, flush=True)
    print(table(["what", "measured", "limit", ""], rows))
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
