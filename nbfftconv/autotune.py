"""Autotuning: measures plans against each other, and picks the winners that a profile remembers."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from nbfftconv import scratch, threads
from nbfftconv.implementations import Kernels, registry
from nbfftconv.plan import Choices, ConvPlan
from nbfftconv.profile import Problem, Winner

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 25
_SECONDS = 1.0  # that rounds beyond the least may begin in
_HOPELESS = 1.5  # times the fastest plan's time: whoever is as slow in the first round sits the others out
_NOISE = 0.97  # nobody wins over the cost model's choice by less


class _Choice(NamedTuple):
    """What tells a plan from others of its problem."""

    algorithm: str
    choices: Choices

    @classmethod
    def of(cls, plan: ConvPlan) -> "_Choice":
        """Return that of a plan."""
        return cls(plan.algorithm, plan.choices)


class Times(NamedTuple):
    """Seconds of a pass that prepares the kernels, and of one that finds them prepared."""

    preparing: float
    prepared: float

    @classmethod
    def medians(cls, samples: Iterable["Times"]) -> "Times":
        """Return the medians."""
        return cls(*map(statistics.median, zip(*samples, strict=True)))

    def of(self, problem: Problem) -> float:
        """Return those that count for a problem."""
        return self.prepared if problem.weight_is_transformed else self.preparing


def find_winners(candidates: dict[Problem, list[ConvPlan]]) -> dict[Problem, Winner]:
    """Run all candidates on random data, in interleaved rounds, and return the fastest for each problem.

    Parameters
    ----------
    candidates : dict from Problem to list of ConvPlan
        The problems differ at most by whether the kernels' spectra are kept; the cost model's choice comes first.
    """
    times = _measure({_Choice.of(plan): plan for of_problem in candidates.values() for plan in of_problem})
    count = threads.get_num_threads()
    winners = {}
    for problem, of_problem in candidates.items():
        seconds = {choice: times[choice].of(problem) for choice in map(_Choice.of, of_problem)}
        model, best = _Choice.of(of_problem[0]), min(seconds, key=seconds.__getitem__)
        if seconds[best] > _NOISE * seconds[model]:
            best = model
        winners[problem] = Winner(best.algorithm, best.choices, seconds[best], seconds[model], count)
    return winners


def _measure(plans: dict[_Choice, ConvPlan]) -> dict[_Choice, Times]:
    """Return the medians."""
    arrays = operands_of(next(iter(plans.values())))
    runs = {choice: runner(plan, arrays) for choice, plan in plans.items()}
    for run in runs.values():
        run()  # compiles, plans a library's transforms, touches the memory
    start = time.perf_counter()
    samples = {choice: [run()] for choice, run in runs.items()}
    bounds = [_HOPELESS * min(of_plans) for of_plans in zip(*(times for (times,) in samples.values()), strict=True)]
    racing = [choice for choice, (times,) in samples.items() if any(t <= b for t, b in zip(times, bounds, strict=True))]
    for number in range(1, _MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for choice in racing:
            samples[choice].append(runs[choice]())
    return {choice: Times.medians(times) for choice, times in samples.items()}


class Operands(NamedTuple):
    """An input, kernels and an output, all of them random: each is an operand of some pass."""

    input: np.ndarray
    weight: np.ndarray
    output: np.ndarray


def operands_of(plan: ConvPlan) -> Operands:
    """Return operands of a plan's sizes."""
    rng = np.random.default_rng(0)
    geometry = plan.geometry
    sizes = geometry.input_shape, geometry.weight_size, geometry.output_shape
    return Operands(*(rng.random(size, dtype=plan.dtype) - plan.dtype.type(0.5) for size in sizes))


def runner(plan: ConvPlan, operands: Operands) -> Callable[[], Times]:
    """Return what runs a pass twice, preparing the kernels and with these; a gradient at the kernels once."""
    x, w, y = operands
    geometry, implementation = plan.geometry, registry.get(plan.algorithm)

    def convolve(kernels: Kernels) -> None:
        # Results are what a caller gets.
        if plan.direction == "forward":
            implementation.forward(plan, geometry, x, kernels, None, False, scratch.result(y.shape, y.dtype))
        else:
            implementation.grad_input(plan, geometry, kernels, y, scratch.result(x.shape, x.dtype))

    def run() -> Times:
        start = time.perf_counter()
        if plan.direction == "grad_weight":
            implementation.grad_weight(plan, geometry, x, y, scratch.result(w.shape, w.dtype))
            seconds = time.perf_counter() - start
            return Times(seconds, seconds)
        kernels = implementation.prepare(plan, w)
        convolve(kernels)
        middle = time.perf_counter()
        convolve(kernels)  # finds in the caches what a layer with kept spectra finds
        return Times(middle - start, time.perf_counter() - middle)

    return run
