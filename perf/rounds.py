"""What the benchmarks share: engines that take turns, each in a process of its own, and tables in Markdown.

Idle threads that wait with OpenMP do not spin, so that one engine computes at a time; in rounds, all see the same
noise. That is this engine's default, not its peers', whose calls of less than a millisecond it costs up to 0.1 ms.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

TURN = 0.3  # seconds of one engine's turn, or one call, where a benchmark names no other
BUDGET = 10.0  # seconds of one engine on one operation: a slower one sits the other rounds out
Operations = dict[str, Callable[[], Any]]
Engines = dict[str, tuple[Callable[..., Operations], tuple]]  # what makes the operations of each, and its arguments
#: Outputs, and times, by operation and engine.
Raced = tuple[dict[str, dict[str, tuple[np.ndarray, ...]]], dict[str, dict[str, list[float]]]]

_operations: Operations  # what the process times
_repeats: dict[str, int]  # calls of a turn


def seconds_of(function: Callable[[], Any]) -> float:
    """Time one call, and the release of what it returns."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory(name: str) -> int:
    """Return a figure of Linux about this process's memory, such as VmRSS, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def new_process() -> ProcessPoolExecutor:
    """Return a process that imports nothing but the file of what it is given to do."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def hold_threads(threads: int) -> None:
    """Set the environment of the processes to come: so many threads, and idle ones do not spin."""
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _array(output: Any) -> np.ndarray:
    """Copy one result: an array, something that an engine has instead, or a list of these, one for each image."""
    if isinstance(output, list):
        return np.stack([_array(each) for each in output])
    read = getattr(output, "numpy", None) or getattr(output, "read", None)
    return np.array(read() if read else output)


def _arrays(output: Any) -> tuple[np.ndarray, ...]:
    return tuple(map(_array, output if isinstance(output, tuple) else (output,)))


def _prepare(
    make: Callable[..., Operations], arguments: tuple, once: Collection[str], turn: float, is_first: bool
) -> dict[str, tuple[tuple[np.ndarray, ...], float]]:
    """Make the operations of this process; return the output of each, and the time of a call as it warms up.

    Those of `once` are called in the first process of an engine only.
    """
    global _operations, _repeats
    _operations, _repeats, results = make(*arguments), {}, {}
    for name, operation in _operations.items():
        if name in once and not is_first:
            continue
        start = time.perf_counter()
        output = _arrays(operation())
        first = time.perf_counter() - start
        if first < BUDGET and name not in once:
            first = seconds_of(operation)
        _repeats[name] = 1 + int(turn / first)
        results[name] = output, first
    return results


def _take_turn(name: str) -> list[float]:
    """Return the times of some calls; the first, on cold caches, does not count unless it is the only one."""
    times = [seconds_of(_operations[name]) for _ in range(_repeats[name])]
    return times[1:] or times


def race(
    engines: Engines,
    rounds: int,
    once: Collection[str] = (),
    turn: float = TURN,
    processes: int = 1,
) -> Raced:
    """Time the operations of each engine, a function and its arguments; return outputs and times by operation.

    Those that are named in `once` are called once, for their outputs, and not timed. Of two rounds, the second goes
    through the engines from the last to the first; so does the second of two `processes` of each, one after the other.
    """
    outputs, times = _race_of_processes(engines, rounds, once, turn)
    for number in range(1, processes):
        in_order = dict(list(engines.items())[:: -1 if number % 2 else 1])
        for operation, samples in _race_of_processes(in_order, rounds, once, turn, is_first=False)[1].items():
            for name, seconds in samples.items():
                times[operation][name] += seconds
    return outputs, times


def _race_of_processes(
    engines: Engines,
    rounds: int,
    once: Collection[str],
    turn: float,
    is_first: bool = True,
) -> Raced:
    """Time the operations of each engine, as `race`, in one process of each."""
    outputs: dict[str, dict] = {}
    times: dict[str, dict] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(new_process()) for name in engines}
        for name, process in processes.items():
            prepared = process.submit(_prepare, *engines[name], once, turn, is_first).result()
            for operation, (output, first) in prepared.items():
                outputs.setdefault(operation, {})[name] = output
                if operation not in once:
                    times.setdefault(operation, {})[name] = [first] if first > BUDGET else []
        for number in range(rounds):
            for operation, samples in times.items():
                for name, process in list(processes.items())[:: -1 if number % 2 else 1]:
                    if name in samples and sum(samples[name]) < BUDGET:
                        samples[name] += process.submit(_take_turn, operation).result()
    return outputs, times


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Return each engine's median time."""
    return {name: statistics.median(values) for name, values in times.items()}


def difference(ours: np.ndarray, other: np.ndarray) -> float:
    """Return the relative difference of two results in the 2-norm."""
    return float(np.linalg.norm(other.reshape(ours.shape) - ours) / np.linalg.norm(ours))


def digits(value: float, decimals: int) -> str:
    """Return a number with so many decimals, or with three digits where these are fewer."""
    return f"{value:.{decimals}f}" if abs(value) >= 10 else f"{value:#.3g}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown that also reads well as it is; figures are in all columns but the first."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned) + "\n"
