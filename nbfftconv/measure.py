"""Measures plans against each other, and picks the winners that a profile remembers."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from nbfftconv import engine, scratch, threads
from nbfftconv.plan import ConvPlan
from nbfftconv.profile import Problem, Winner

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 25
_SECONDS = 1.0  # that rounds beyond the least may begin in
_HOPELESS = 1.5  # times the fastest plan's time: whoever is as slow in the first round sits the others out
_NOISE = 0.97  # nobody wins over the cost model's choice by less

_Choice = tuple[str, str | None, tuple[int, int] | None]
_Times = tuple[float, float]  # of a pass with the kernels' transforms, and without


def find_winners(candidates: dict[Problem, list[ConvPlan]]) -> dict[Problem, Winner]:
    """Run all candidates on random data, in interleaved rounds, and return the fastest for each problem.

    Parameters
    ----------
    candidates : dict from Problem to list of ConvPlan
        The problems differ at most by whether the kernels' spectra are kept; the cost model's choice comes first.
    """
    plans = {_choice(plan): plan for of_problem in candidates.values() for plan in of_problem}
    times = _measure(plans)
    count = threads.get_num_threads()
    winners = {}
    for problem, of_problem in candidates.items():
        index = int(problem.weight_is_transformed)
        seconds = {choice: times[choice][index] for choice in map(_choice, of_problem)}
        model, best = _choice(of_problem[0]), min(seconds, key=seconds.__getitem__)
        if seconds[best] > _NOISE * seconds[model]:
            best = model
        winners[problem] = Winner(*best, seconds[best], seconds[model], count)
    return winners


def _choice(plan: ConvPlan) -> _Choice:
    return plan.algorithm, plan.transform, plan.tile


def _measure(plans: dict[_Choice, ConvPlan]) -> dict[_Choice, _Times]:
    """Return the medians."""
    arrays = _operands(next(iter(plans.values())))
    runs = {choice: _runner(plan, arrays) for choice, plan in plans.items()}
    for run in runs.values():
        run()  # compiles, plans FFTW's transforms, touches the memory
    start = time.perf_counter()
    samples = {choice: [run()] for choice, run in runs.items()}
    bounds = [_HOPELESS * min(times[0][index] for times in samples.values()) for index in (0, 1)]
    racing = [choice for choice, times in samples.items() if any(t <= b for t, b in zip(times[0], bounds, strict=True))]
    for number in range(1, _MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for choice in racing:
            samples[choice].append(runs[choice]())
    return {
        choice: (statistics.median(t for t, _ in times), statistics.median(t for _, t in times))
        for choice, times in samples.items()
    }


def _operands(plan: ConvPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an input, kernels and an output, all of them random: each is an operand of some pass."""
    rng = np.random.default_rng(0)
    geometry = plan.geometry
    sizes = geometry.input_size, geometry.weight_size, geometry.output_size
    return tuple(rng.random(size, dtype=plan.dtype) - plan.dtype.type(0.5) for size in sizes)


def _runner(plan: ConvPlan, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Callable[[], _Times]:
    x, w, y = arrays
    geometry = plan.geometry

    def convolve(kernels: engine.Kernels | None) -> None:
        # Results are what a caller gets.
        if plan.direction == "forward":
            engine.forward(plan, geometry, x, kernels, None, False, scratch.result(y.shape, y.dtype))
        elif plan.direction == "grad_input":
            engine.grad_input(plan, geometry, kernels, y, scratch.result(x.shape, x.dtype))
        else:
            engine.grad_weight(plan, geometry, x, y, scratch.result(w.shape, w.dtype))

    def run() -> _Times:
        start = time.perf_counter()
        kernels = None if plan.direction == "grad_weight" else engine.Kernels.of(plan, w)
        convolve(kernels)
        middle = time.perf_counter()
        if kernels is None:
            return middle - start, middle - start
        convolve(kernels)  # finds in the caches what a layer with kept spectra finds
        return middle - start, time.perf_counter() - middle

    return run
