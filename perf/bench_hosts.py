"""What it costs to be called from PyTorch and from ONNX Runtime, beside what it may cost.

- A call of a small layer from PyTorch, beyond the same layer's from NumPy: at most 25 µs.
- An operator of PyTorch and a convolution of this package in turn, by the sum of both alone: at most 1.1; whichever is
  imported first, with and without a neighbour that keeps a core busy.
- A session of ONNX Runtime's in which nothing is replaced, beyond ONNX Runtime's own: at most 50 µs, or 2 %.

Each line is of a process of its own, and its calls take turns; figures are medians of rounds.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rounds import hold_threads, new_process, table

TURN = 0.05  # seconds of a turn
BUSY_CORES = 1


class Line(NamedTuple):
    """What is measured, its figure and the bound, as text; and whether the figure is within the bound."""

    what: str
    figure: str
    bound: str
    holds: bool


def seconds_in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each of several calls, which take turns."""
    counts, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):  # what is found out once is found out
            call()
        start = time.perf_counter()
        call()
        counts[name] = 1 + int(TURN / (time.perf_counter() - start))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(found) for name, found in times.items()}


def operator_call(threads: int, rounds: int) -> Line:
    """A layer of 8 channels, 1×1, from PyTorch and from NumPy."""
    import torch

    import nbfftconv
    import nbfftconv.torch as nt

    torch.set_num_threads(threads)
    nbfftconv.set_num_threads(threads)
    x, weight = torch.randn(1, 8, 8, 8), torch.randn(8, 8, 1, 1)
    here, there = nbfftconv.Conv2d(weight.numpy()), nt.Conv2d(8, 8, 1, bias=False).eval()
    there.weight.data = weight
    array = x.numpy()
    with torch.inference_mode():
        times = seconds_in_turns({"NumPy": lambda: here(array), "PyTorch": lambda: there(x)}, rounds)
    more = 1e6 * (times["PyTorch"] - times["NumPy"])
    here_too = f"{1e6 * times['PyTorch']:.0f} µs, from NumPy {1e6 * times['NumPy']:.0f}"
    return Line(f"a call from PyTorch ({here_too})", f"{more:.0f} µs", "25 µs", more <= 25)


@contextlib.contextmanager
def neighbour(is_there: bool) -> Iterator[None]:
    """Have a process that keeps a core busy, or none."""
    busy = [multiprocessing.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(BUSY_CORES)]
    for process in busy if is_there else ():
        process.start()
    try:
        yield
    finally:
        for process in busy if is_there else ():
            process.terminate()
            process.join()


def _spin() -> None:
    while True:
        pass


def in_turn(is_torch_first: bool, is_busy: bool, threads: int, rounds: int) -> Line:
    """An operator of PyTorch and one of ours, alone and in turn."""
    for name in ("torch", "nbfftconv") if is_torch_first else ("nbfftconv", "torch"):
        importlib.import_module(name)
    import torch

    import nbfftconv
    import nbfftconv.torch as nt

    torch.set_num_threads(threads)
    nbfftconv.set_num_threads(threads)
    x, weight = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
    other = torch.randn(1, 64, 512, 512)
    layer = nt.Conv2d(64, 64, 3, padding=1, bias=False).eval()
    layer.weight.data = weight

    def ours() -> None:
        layer(x)

    def theirs() -> None:
        other.add_(1.0)

    def both() -> None:
        ours()
        theirs()

    with torch.inference_mode(), neighbour(is_busy):
        times = seconds_in_turns({"ours": ours, "PyTorch's": theirs, "both": both}, rounds)
    ratio = times["both"] / (times["ours"] + times["PyTorch's"])
    first = "PyTorch" if is_torch_first else "nbfftconv"
    what = f"in turn with PyTorch's, {first} imported first{', a core busy' if is_busy else ''}"
    return Line(what, f"{ratio:.2f}", "1.10", ratio <= 1.1)


def session(threads: int, rounds: int) -> Line:
    """A model without convolutions, and a small convolution that is left to ONNX Runtime."""
    import onnx
    import onnxruntime

    import nbfftconv.onnx

    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y)
            <float[4, 4, 1, 1] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> { y = Conv (x, w) }""")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    data = model.SerializeToString()
    alone = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    ours = nbfftconv.onnx.InferenceSession(data, options)
    feeds = {"x": np.ones((1, 4, 8, 8), np.float32)}
    times = seconds_in_turns({"alone": lambda: alone.run(None, feeds), "ours": lambda: ours.run(None, feeds)}, rounds)
    more = times["ours"] - times["alone"]
    what = f"a session with nothing replaced ({1e6 * times['alone']:.0f} µs alone)"
    return Line(what, f"{1e6 * more:.0f} µs", "50 µs", more <= max(5e-5, 0.02 * times["alone"]))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default: 2)")
    parser.add_argument("--rounds", type=int, default=31, help="rounds (default: 31)")
    arguments = parser.parse_args()
    hold_threads(arguments.threads)
    measured: list[tuple[Any, tuple[Any, ...]]] = [(operator_call, ())]
    measured += [(in_turn, (is_first, is_busy)) for is_busy in (False, True) for is_first in (True, False)]
    measured.append((session, ()))
    lines = []
    for function, given in measured:
        with new_process() as process:
            lines.append(process.submit(function, *given, arguments.threads, arguments.rounds).result())
    rows = [[line.what, line.figure, line.bound, "yes" if line.holds else "no"] for line in lines]
    print(table(["what", "more, or ratio", "at most", "holds"], rows))


if __name__ == "__main__":
    main()
