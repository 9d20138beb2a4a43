"""The figures of the machine that the cost model scales with, measured once and kept on disk."""

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbfftconv import accumulate, epoch, scratch, simd, threads
from nbfftconv.forking import fork_safe_lock
from nbfftconv.report import report
from nbfftconv.store import Document
from nbfftconv.transforms import COMPLEX_BYTES

_FORMAT = "nbfftconv machine 1"


@dataclass(frozen=True)
class Machine:
    """Rates of one core, in float32.

    Attributes
    ----------
    flops : float
        Operations a second of the complex matrix product whose lanes are tiles, within the cache.
    bandwidth : float
        Bytes read and written a second where memory is copied that is too large for a core's own caches.

    Examples
    --------
    >>> from nbfftconv.machine import Machine
    >>> Machine(flops=80e9, bandwidth=20e9)
    Machine(flops=80000000000.0, bandwidth=20000000000.0)
    """

    flops: float
    bandwidth: float

    def __post_init__(self) -> None:
        for name, rate in asdict(self).items():
            if isinstance(rate, (bool, np.bool_)) or not isinstance(rate, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} must be a number, got {rate!r}")
            if not 0 < rate < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {rate!r}")


#: A core of a 2023 server with 512-bit vectors.
DEFAULT = Machine(flops=165e9, bandwidth=25e9)
# No CPU that this package is for is further from it: what is measured beyond is noise.
_FACTOR = 4
# Figures are rounded to the default's times a power of 2^(1/4), so that noise seldom decides between two plans.
_STEPS = 4

_lock = fork_safe_lock()
_machine: Machine | None = None
_is_set = False


def get_machine() -> Machine:
    """Return this machine's figures, measured if they are not on disk.

    They are measured where they can be kept, once: a service with a read-only disk takes `DEFAULT` instead of
    measuring in every process.

    Returns
    -------
    Machine
        The figures that plans are made by, in this process.

    Examples
    --------
    >>> from nbfftconv import machine
    >>> machine.set_machine(machine.DEFAULT)
    >>> machine.get_machine() == machine.DEFAULT
    True
    """
    global _machine
    with _lock:
        if _machine is None:
            _machine = _read_or_measure()
        return _machine


def set_machine(machine: Machine | None) -> None:
    """Plan for these figures from now on, in this process.

    Parameters
    ----------
    machine : Machine or None
        The figures, say `DEFAULT` for the same plans on all machines; None for those that are on disk, or measured.

    Raises
    ------
    TypeError
        If it is neither.

    Examples
    --------
    >>> from nbfftconv import machine
    >>> machine.set_machine(machine.DEFAULT)
    """
    global _machine, _is_set
    if not (machine is None or isinstance(machine, Machine)):
        raise TypeError(f"the machine must be a Machine or None, got {machine!r}")
    with _lock:
        _machine, _is_set = machine, machine is not None
        epoch.begin()


def known_machine() -> tuple[Machine | None, str]:
    """Return the figures that are known, without measuring any, and where they come from.

    That is "set", "measured", or "default": `DEFAULT` is in force, or, with None, nothing was measured yet.
    """
    machine = _machine
    if machine is None:
        with contextlib.suppress(OSError, ValueError):  # reported when a plan needs it
            return _read(Document.of_machine("machine")), "measured"
    if machine is None or not _is_set:
        return machine, "default" if machine in (None, DEFAULT) else "measured"
    return machine, "set"


def _read_or_measure() -> Machine:
    document = Document.of_machine("machine")
    with contextlib.suppress(OSError, ValueError):
        return _read(document)
    with document.locked() as is_locked:
        if not is_locked:
            return _read_or_report(document) or DEFAULT
    _product()  # to compile it takes seconds, for which others need not wait
    with document.locked() as is_locked:  # others would measure each other's noise
        machine = _read_or_report(document)
        if machine is None and is_locked:
            machine = measure()
            with contextlib.suppress(OSError):
                document.replace_of_machine(_FORMAT, asdict(machine))
        return machine or DEFAULT


def _read_or_report(document: Document) -> Machine | None:
    try:
        return _read(document)
    except ValueError as error:
        report(f"ignored: {error}")
    except OSError:
        pass
    return None


def _read(document: Document) -> Machine:
    content = document.read_of_machine(_FORMAT)
    figures: dict[str, Any] = {name: content.get(name) for name in asdict(DEFAULT)}
    for name, figure in figures.items():
        default = getattr(DEFAULT, name)
        if not isinstance(figure, float) or not default / _FACTOR <= figure <= default * _FACTOR:
            raise ValueError(f"{os.fspath(document.path)!r} is damaged: {name} {figure!r}")
    return Machine(**figures)


def measure() -> Machine:
    """Measure the figures, whatever is on disk, and return them rounded."""
    measured = {"flops": _measure_flops(), "bandwidth": _measure_bandwidth()}
    return Machine(**{name: _rounded(figure, getattr(DEFAULT, name)) for name, figure in measured.items()})


def _rounded(figure: float, default: float) -> float:
    ratio = 2 ** (round(_STEPS * math.log2(figure / default)) / _STEPS)
    return default * min(max(ratio, 1 / _FACTOR), _FACTOR)


def _best_seconds(function: Callable[[], object], repetitions: int) -> float:
    """Time of the repetition that met the least noise; the first, which may compile or touch new pages, is left out."""
    function()
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


_PRODUCT = 32, 12, 64, 16  # rows, columns, depth, bins


def _product() -> tuple[threads.Task, list[np.ndarray]]:
    """Return the product that is timed, and the operands, which must outlive it."""
    rows, columns, depth, bins = _PRODUCT

    arrays = []

    def matrix(entries: int, row: int, **lanes: Any) -> accumulate.Matrix:
        array, address = scratch.aligned(entries * COMPLEX_BYTES)
        array.view(np.float32)[...] = 0.5  # zeros and denormal numbers may have a speed of their own
        arrays.append(array)
        # No step from frequency to frequency: they all find their operands in the cache.
        return accumulate.Matrix(np.float32, address, group=0, row=row, column=COMPLEX_BYTES, bin=0, **lanes)

    a = matrix(rows * depth, 4, lane_axis="row", vectors=depth * COMPLEX_BYTES)
    b = matrix(columns * depth, depth * COMPLEX_BYTES)
    c = matrix(rows * columns, columns * COMPLEX_BYTES)
    shape = 1, rows, columns, depth, bins
    return accumulate.conjugate_product(a, b, c, shape, 1), arrays


def _measure_flops() -> float:
    rows, columns, depth, bins = _PRODUCT
    task, _operands = _product()
    seconds = _best_seconds(lambda: threads.run(task), 60)
    return 8 * rows * columns * depth * bins * simd.lanes(np.float32) / seconds


def _measure_bandwidth() -> float:
    source = np.ones(2**22, np.float32)
    target = np.ones_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: np.copyto(target, source), 12)
