"""Rates of the cost model: `measure` times plans of the layers in layers.py, `fit` fits the rates to these times.

`measure` runs, on one thread, some of the plans that a race would run for each pass of a layer, of every transform, and
direct convolution, in interleaved rounds. A turn prepares the kernels and convolves, and convolves once more; of the
gradient at the kernels it is one pass. Of stages, the transforms of images and kernels are noted, and those back. All
goes to costs_64.json, or, with narrower vectors than these bytes, to costs_32.json.

`fit` has no formulas of its own: the model's seconds are a sum of terms, each in proportion to one rate in seconds, or
to the inverse of a fraction; what the sum grows by when one rate is changed is that rate's term. The new rates are
those of the least squares of errors, relative to the time of the pass, or for a stage of the turn. No term may fall
below a tenth of what it was, and a rate of which the data say nothing stays as it is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from layers import LAYERS, Layer
from rounds import table
from scipy.optimize import nnls
from stages import clock_stages

from nbfftconv import autotune, rates, simd, threads
from nbfftconv import fitted_rates as written
from nbfftconv.geometry import ConvGeometry
from nbfftconv.implementations import Request, direct
from nbfftconv.implementations.tiled import costed_choices
from nbfftconv.machine import Machine, set_machine
from nbfftconv.machine import measure as measure_machine
from nbfftconv.plan import DIRECTIONS, ConvPlan
from nbfftconv.planner import make_plan, promising_plans
from nbfftconv.scratch import get_scratch_limit
from nbfftconv.transforms import Transform, registry

FORMAT = "nbfftconv costs 1"
COSTS = Path(__file__).with_name(f"costs_{rates.WIDTH}.json")
RATES = Path(rates.__file__).with_name("fitted_rates.py")

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
SECONDS = 1.0  # of a problem, that rounds beyond the least may begin in
HOPELESS = 2  # times the fastest plan's time: whoever is as slow in the first round sits the others out
SLOWEST = 0.5  # seconds that direct convolution may be expected to take, to be measured where no race would run it

PRIOR = 0.3  # weight of the present rates: one whose term is 3 % of 100 passes is half old, half new
LEAST = 0.1  # of what a rate's term was
OPTIONAL = ("row", "read_rate", "write_rate", "gathered", "kernel")  # rates that some transforms have
WITHIN = 1.15  # of the fastest plan's time: the model's choice is good enough


@dataclass(frozen=True)
class Measured:
    """A plan, and its times.

    Attributes
    ----------
    layer : str
    geometry : ConvGeometry
    direction : str
    dtype : numpy.dtype
    name : str
        The transform, or "direct".
    tile : tuple of int or None
    fused, transposed : bool
        As of its plan.
    seconds : tuple of float
        Of a pass that prepares the kernels, and of one that finds them prepared; of the gradient at the kernels, once.
    stages : tuple of float or None
        Of transforms and of those back, in all these passes; None of a plan that has no such stages.
    """

    layer: str
    geometry: ConvGeometry
    direction: str
    dtype: np.dtype
    name: str
    tile: tuple[int, int] | None
    fused: bool
    transposed: bool
    seconds: tuple[float, ...]
    stages: tuple[float, float] | None

    @property
    def has_stages(self) -> bool:
        """Whether its passes are made of stages that the model tells apart."""
        return self.name != "direct" and not self.fused


# Measuring


def measure(layers: list[Layer], tiles: int) -> dict[str, Any]:
    """Return the document of costs.json: of each transform, at most so many tiles are measured."""
    stages = clock_stages()
    machine = measure_machine()  # those on disk may be of a busy hour
    set_machine(machine)
    threads.set_num_threads(1)
    problems, start = [], time.perf_counter()
    for layer in layers:
        options = {"padding": layer.padding, "groups": layer.groups}
        sizes = {"input_size": layer.input_size, "weight_size": layer.weight_size}
        geometry, dtype = ConvGeometry.from_arguments(**sizes, **options), np.dtype(np.float32)
        for direction in DIRECTIONS:
            plans = plans_of(geometry, direction, dtype, tiles)
            measured = run_in_turns(plans, stages)
            problems.append({"layer": layer.name, "direction": direction, "dtype": dtype.name, **sizes, **options})
            problems[-1]["plans"] = [as_written(plan, times) for plan, times in zip(plans, measured, strict=True)]
            took = time.perf_counter() - start
            print(f"{layer.name} {direction}: {len(plans)} plans, {took:.0f} s so far", file=sys.stderr)
    return {
        "format": FORMAT,
        "commit": commit(),
        "machine": asdict(machine),
        "vector_bytes": simd.VECTOR_BYTES,
        "problems": problems,
    }


def commit() -> str:
    """Return the commit that is measured, and whether anything was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def plans_of(geometry: ConvGeometry, direction: str, dtype: np.dtype, tiles: int) -> list[ConvPlan]:
    """Return the plans to measure: of each transform, the cheapest one and others evenly from those of a race."""
    by_name = defaultdict(list)
    for plan in promising_plans(geometry, direction, dtype, direction == "forward"):
        by_name[name_of(plan)].append(plan)
    plans = []
    for of_name in by_name.values():
        of_name.sort(key=lambda plan: plan.seconds)
        places = np.linspace(0, len(of_name) - 1, min(tiles, len(of_name)))
        plans += [of_name[round(place)] for place in places]
    if "direct" not in by_name:
        plan = make_plan(geometry, direction, dtype, "direct")
        plans += [plan] if plan.seconds < SLOWEST else []
    return plans


def name_of(plan: ConvPlan) -> str:
    """Return its transform, or "direct"."""
    return getattr(plan, "transform", plan.algorithm)


class Times(NamedTuple):
    """Seconds of one turn of a plan: of its passes, and of its transforms and those back."""

    passes: tuple[float, ...]
    stages: tuple[float, float]


def run_in_turns(plans: list[ConvPlan], stages: dict[str, float]) -> list[Times]:
    """Return the medians of each plan's turns."""
    operands = autotune.operands_of(plans[0])
    runs = [turn_of(plan, operands, stages) for plan in plans]
    for run in runs:
        run()  # compiles, plans FFTW's transforms, touches the memory
    start = time.perf_counter()
    samples = [[run()] for run in runs]
    bound = HOPELESS * min(sum(turns[0].passes) for turns in samples)
    for number in range(1, MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for run, turns in zip(runs, samples, strict=True):
            if sum(turns[0].passes) <= bound:
                turns.append(run())
    return [
        Times(*(tuple(map(statistics.median, zip(*each, strict=True))) for each in zip(*turns, strict=True)))
        for turns in samples
    ]


def turn_of(plan: ConvPlan, operands: autotune.Operands, stages: dict[str, float]) -> Callable[[], Times]:
    """Return what runs a plan once, and times it."""
    run = autotune.runner(plan, operands)
    back = "from_spectra.from_spectra", "grad_input.overlap_add"

    def turn() -> Times:
        stages.clear()
        seconds = run()
        passes = seconds[:1] if plan.direction == "grad_weight" else tuple(seconds)
        of_stages = {name: stages.get(name, 0.0) for name in ("to_spectra.to_spectra", *back)}
        return Times(passes, (of_stages["to_spectra.to_spectra"], sum(of_stages[name] for name in back)))

    return turn


def as_written(plan: ConvPlan, times: Times) -> dict[str, Any]:
    """Return a plan and its times as costs.json has them."""
    written: dict[str, Any] = {"name": name_of(plan)}
    if plan.algorithm != "direct":
        written |= {"tile": plan.tile, "fused": plan.fused}
    written |= {"transposed": plan.is_transposed, "seconds": [rounded(seconds) for seconds in times.passes]}
    if plan.algorithm != "direct" and not plan.fused:
        written["stages"] = [rounded(seconds) for seconds in times.stages]
    return written


def rounded(number: float, digits: int = 4) -> float:
    """Return a number of so many digits."""
    return float(f"{number:.{digits}g}")


def write(document: dict[str, Any], path: Path) -> None:
    """Write costs.json, with a line for each plan."""
    lines = []
    for problem in document["problems"]:
        head = json.dumps({name: value for name, value in problem.items() if name != "plans"})
        plans = ",\n  ".join(map(json.dumps, problem["plans"]))
        lines.append(f'{head[:-1]}, "plans": [\n  {plans}]}}')
    head = json.dumps({name: value for name, value in document.items() if name != "problems"})
    path.write_text(f'{head[:-1]}, "problems": [\n {(f",{chr(10)} ").join(lines)}]}}\n', encoding="utf-8")


def read(path: Path) -> tuple[list[Measured], Machine, int]:
    """Return the plans of costs.json, the machine's figures and its vector bytes; ValueError if it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}, not {FORMAT!r}")
        measured = [each for problem in document["problems"] for each in read_problem(problem)]
        return measured, Machine(**document["machine"]), int(document["vector_bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged: {error!r}") from error


def read_problem(problem: dict[str, Any]) -> Iterator[Measured]:
    """Yield the plans of one problem."""
    sizes = {name: problem[name] for name in ("input_size", "weight_size", "padding", "groups")}
    geometry = ConvGeometry.from_arguments(**sizes)
    if problem["direction"] not in DIRECTIONS:
        raise ValueError(f"there is no direction {problem['direction']!r}")
    for plan in problem["plans"]:
        measured = Measured(
            problem["layer"],
            geometry,
            problem["direction"],
            np.dtype(problem["dtype"]),
            plan["name"],
            tuple(plan["tile"]) if plan["name"] != "direct" else None,
            plan.get("fused", False),
            plan["transposed"],
            tuple(plan["seconds"]),
            tuple(plan["stages"]) if "stages" in plan else None,
        )
        wanted = 1 if measured.direction == "grad_weight" else 2
        if len(measured.seconds) != wanted or not all(0 < seconds < 1e3 for seconds in measured.seconds):
            raise ValueError(f"{wanted} positive numbers of seconds are wanted, got {plan}")
        if measured.has_stages != (measured.stages is not None):
            raise ValueError(f"stages are of FFTs that are not fused, got {plan}")
        yield measured


# The model


class Parameter(NamedTuple):
    """A rate of an implementation or a transform."""

    owner: str
    unit: str
    name: str

    def times(self, factor: float) -> float:
        """Return the rate at which its term of the model is `factor` times the present one."""
        rate = rates.RATES[self.owner][self.unit][self.name]
        return rate * factor if self.unit == "seconds" else rate / factor


def parameters() -> list[Parameter]:
    """Return all rates."""
    return [
        Parameter(owner, unit, name)
        for owner, by_unit in rates.RATES.items()
        for unit, by_name in by_unit.items()
        for name in by_name
    ]


def transform_of(name: str) -> Transform:
    """Return a transform with the rates of the moment; a new one, of which nothing is remembered."""
    of = rates.of(name)
    return replace(
        registry.get(name),
        product_rate=of["product"],
        spectra_rate=of["spectra"],
        stream_rate=of["stream"],
        **{field: of[field.removesuffix("_rate")] for field in OPTIONAL if field.removesuffix("_rate") in of},
    )


def model(measured: Measured, weight_is_transformed: bool, machine: Machine) -> np.ndarray:
    """Return the seconds of a pass by the model: of transforms, of those back, and of all else."""
    choices = () if measured.tile is None else (("tile", measured.tile),)
    transforms = () if measured.tile is None else (transform_of(measured.name),)
    problem = measured.geometry, measured.direction, measured.dtype
    request = Request(*problem, choices, transforms, weight_is_transformed, True, True, get_scratch_limit(), machine)
    if measured.name == "direct":
        return np.array([0.0, 0.0, direct.IMPLEMENTATION.candidates(request).seconds])
    run_direction = "forward" if measured.transposed else measured.direction
    _, cost, seconds = next(
        each
        for each in costed_choices(request, registry.get(measured.name).algorithm)
        if (each.choices.direction, each.choices.fused) == (run_direction, measured.fused)
    )
    cost = cost._make(float(np.ravel(of_stage)[0]) for of_stage in cost)
    images = {  # transformed, and transformed back
        "forward": (cost.input + cost.weight, cost.output),
        "grad_weight": (cost.input + cost.output, cost.weight),
        "grad_input": (cost.output + cost.weight, cost.input),
    }[run_direction]
    return np.array([*images, float(seconds[0]) - sum(images)])


def passes(measured: Measured, machine: Machine) -> np.ndarray:
    """Return the seconds of its passes by the model: those with the kernels to prepare, and prepared, by stages."""
    return np.array([model(measured, kept, machine) for kept in (False, True)[: len(measured.seconds)]])


class Design(NamedTuple):
    """What is fitted: a row for each time, of a pass or of a stage of a plan's passes.

    Attributes
    ----------
    parameters : list of Parameter
    plans : list of Measured
        That of each row.
    kept : numpy.ndarray
        Of a row of a pass, whether it finds the kernels prepared; -1 of a stage.
    terms : numpy.ndarray
        Seconds of each rate's term, [row, parameter].
    seconds, unit : numpy.ndarray
        What was measured, and what an error is relative to.
    """

    parameters: list[Parameter]
    plans: list[Measured]
    kept: np.ndarray
    terms: np.ndarray
    seconds: np.ndarray
    unit: np.ndarray

    @property
    def of_passes(self) -> np.ndarray:
        """Which rows are of passes."""
        return self.kept >= 0


def design(measured: list[Measured], machine: Machine) -> Design:
    """Return the terms of all plans, each found by a change of its rate alone."""
    all_parameters = parameters()
    before = [passes(each, machine) for each in measured]
    terms = [np.zeros((len(all_parameters), *of_plan.shape)) for of_plan in before]
    for column, parameter in enumerate(all_parameters):
        with mock.patch.dict(rates.of(parameter.owner), {parameter.name: parameter.times(2)}):
            for each, of_plan, known in zip(measured, terms, before, strict=True):
                owners = ("direct",) if each.name == "direct" else ("fft", each.name)
                if parameter.owner in owners:
                    of_plan[column] = passes(each, machine) - known
    rows: list[tuple] = []
    for each, of_plan, known in zip(measured, terms, before, strict=True):
        if not np.allclose(of_plan.sum(axis=0), known, rtol=1e-6, atol=1e-12):
            raise RuntimeError(f"the model's seconds are not the sum of its rates' terms for {each}")
        whole = sum(each.seconds)
        rows += [(each, kept, of_plan[:, kept].sum(axis=1), t, t) for kept, t in enumerate(each.seconds)]
        if each.stages is not None:
            stages = *each.stages, whole - sum(each.stages)
            rows += [(each, -1, of_plan[:, :, i].sum(axis=1), t, whole) for i, t in enumerate(stages)]
    plans, *columns = zip(*rows, strict=True)
    return Design(all_parameters, list(plans), *map(np.array, columns))


# The fit


def fit(data: Design, prior: float = PRIOR) -> np.ndarray:
    """Return what each term is to be multiplied by."""
    count = len(data.parameters)
    matrix = np.concatenate([data.terms / data.unit[:, None], prior * np.eye(count)])
    wanted = np.concatenate([data.seconds / data.unit, np.full(count, prior)])
    factors, _ = nnls(matrix, wanted - matrix @ np.full(count, LEAST), maxiter=100 * count)
    return factors + LEAST


def fitted_rates(data: Design, factors: np.ndarray) -> rates.Rates:
    """Return the table of these vectors, in three digits; a rate that hardly changes stays as it is."""
    document = json.loads(json.dumps(rates.RATES))
    for parameter, factor in zip(data.parameters, factors, strict=True):
        if abs(factor - 1) > 1e-3:
            document[parameter.owner][parameter.unit][parameter.name] = rounded(parameter.times(factor), 3)
    return document


def source_of(document: rates.Rates) -> str:
    """Return the source of fitted_rates.py, with another table of these vectors."""
    lines = ['"""Rates of the cost model, read by `rates`. Written by perf/fit_costs.py."""', "", "RATES = {"]
    for width, of_width in (written.RATES | {rates.WIDTH: document}).items():
        lines.append(f"    {width}: {{")
        for owner, by_unit in of_width.items():
            lines.append(f'        "{owner}": {{')
            for unit, by_name in by_unit.items():
                lines.append(f'            "{unit}": {{')
                lines += [f'                "{name}": {rate!r},' for name, rate in by_name.items()]
                lines.append("            },")
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def factors_of(data: Design, document: rates.Rates) -> np.ndarray:
    """Return by what the terms are multiplied with the rates of a document."""
    pairs = ((parameter, document[parameter.owner][parameter.unit][parameter.name]) for parameter in data.parameters)
    return np.array([rate / p.times(1) if p.unit == "seconds" else p.times(1) / rate for p, rate in pairs])


def errors(data: Design, factors: np.ndarray) -> np.ndarray:
    """Return the relative error of every pass."""
    return np.abs(data.terms @ factors / data.seconds - 1)[data.of_passes]


def good_choices(data: Design, factors: np.ndarray) -> tuple[int, int]:
    """Return of how many problems the model's choice is fast enough, and of how many there is a choice."""
    problems = defaultdict(list)
    for row in np.flatnonzero(data.of_passes):
        plan = data.plans[row]
        problem = plan.geometry, plan.direction, plan.dtype, data.kept[row]
        problems[problem].append((float(data.terms[row] @ factors), data.seconds[row]))
    chosen = [(min(plans)[1], min(seconds for _, seconds in plans)) for plans in problems.values() if len(plans) > 1]
    return sum(seconds <= WITHIN * least for seconds, least in chosen), len(chosen)


def report(data: Design, factors: np.ndarray) -> str:
    """Return the rates, and how good they are, in Markdown."""
    now, of_passes = np.ones_like(factors), data.of_passes
    shares = data.terms[of_passes] * factors
    shares = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    rows = []
    for parameter, factor, share in zip(data.parameters, factors, shares, strict=True):
        figures = f"{parameter.times(1):.3g}", f"{parameter.times(factor):.3g}", f"{share:.2%}"
        rows.append([f"{parameter.owner} {parameter.name}", parameter.unit, *figures])
    parts = [table(["rate", "unit", "now", "fitted", "of a pass's time"], rows)]
    at_bound = [
        f"{p.owner} {p.name}" for p, factor in zip(data.parameters, factors, strict=True) if factor < 1.01 * LEAST
    ]
    if at_bound:
        parts.append(f"As fast as a fit may make them: {', '.join(at_bound)}. The data contradict these terms.\n")

    rows = []
    kinds = np.array([f"{plan.name}, {plan.direction}" for plan in data.plans])[of_passes]
    with_now, with_fitted = errors(data, now), errors(data, factors)
    for kind in [*sorted(set(kinds)), "all"]:
        which = (kinds == kind) | (kind == "all")
        cells = [
            f"{quantile:.0%}"
            for of_rates in (with_now, with_fitted)
            for quantile in np.quantile(of_rates[which], (0.5, 0.9))
        ]
        rows.append([kind, str(which.sum()), *cells])
    header = ["error of the model", "passes", "now: median", "90 %", "fitted: median", "90 %"]
    parts.append(table(header, rows))
    (before, count), (after, _) = good_choices(data, now), good_choices(data, factors)
    parts.append(
        f"The model's choice takes at most {WITHIN} times the fastest measured plan's time in {before} of {count} "
        f"problems now, in {after} as fitted."
    )
    return "\n".join(parts)


def main(arguments: Iterable[str] | None = None) -> int:
    """Measure or fit; return 1 if there are no data to fit to."""
    names = [layer.name for layer in LAYERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    of_measure = commands.add_parser("measure", help=f"time plans, and write {COSTS.name}: 5 minutes if it is quiet")
    of_measure.add_argument(
        "--layers", nargs="+", choices=names, default=names, metavar="NAME", help="some layers only"
    )
    of_measure.add_argument("--tiles", type=int, default=3, help="tiles of each transform, for each pass (default: 3)")
    of_measure.add_argument("--costs", type=Path, default=COSTS, metavar="FILE", help=f"instead of perf/{COSTS.name}")
    of_fit = commands.add_parser("fit", help=f"fit the rates to {COSTS.name}")
    of_fit.add_argument("--costs", type=Path, default=COSTS, metavar="FILE", help=f"instead of perf/{COSTS.name}")
    of_fit.add_argument("--write", action="store_true", help="write nbfftconv/fitted_rates.py")
    args = parser.parse_args(arguments)

    if args.command == "measure":
        if args.tiles < 1:
            parser.error(f"--tiles must be at least 1, got {args.tiles}")
        if os.getloadavg()[0] > 0.5:
            print("OTHER PROCESSES COMPUTE: these times will mean little", file=sys.stderr)
        write(measure([layer for layer in LAYERS if layer.name in args.layers], args.tiles), args.costs)
        return 0
    try:
        measured, machine, vector_bytes = read(args.costs)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if vector_bytes != simd.VECTOR_BYTES:
        print(f"measured with vectors of {vector_bytes} bytes, not of {simd.VECTOR_BYTES} as here", file=sys.stderr)
        return 1
    data = design(measured, machine)
    document = fitted_rates(data, fit(data))
    print(report(data, factors_of(data, document)))
    if args.write:
        RATES.write_text(source_of(document), encoding="utf-8")
        print(f"Written to {os.fspath(RATES)}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
