"""What test_guard.py runs in processes of their own: passes on arrays and scratch memory next to guard pages.

``python guard_worker.py ALGORITHM CASE...`` computes by a transform, or "direct", or in layers, "layer", and prints one
JSON document; what was computed last is the last line on the standard error, for a process that ends by a fault.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from geometries import ROW_TILES, WAYS, Case, of_one_row
from guard import guarded, guarded_scratch

import nbfftconv
from nbfftconv import machine, simd
from nbfftconv.geometry import ConvGeometry
from nbfftconv.tiling import problem_sizes
from nbfftconv.transforms import fftw, registry

CASES = {
    "plain": Case((2, 3, 19, 21), (5, 3, 3, 4)),
    "one tile": Case((1, 2, 7, 5), (3, 2, 5, 4), padding=2),
    "one output": Case((3, 2, 5, 4), (17, 2, 5, 4)),
    "strided": Case((1, 3, 23, 26), (4, 3, 4, 3), stride=(2, 3), padding=((1, 0), (2, 3))),
    "phases of other lengths": Case((2, 3, 23, 21), (5, 3, 5, 3), stride=2, padding=(1, 0)),
    "dilated": Case((2, 2, 22, 25), (3, 2, 3, 3), dilation=(2, 3), padding=3),
    "both": Case((1, 2, 25, 24), (3, 2, 5, 5), stride=(3, 2), dilation=(2, 4), padding=4),
    "grouped": Case((2, 6, 17, 20), (9, 2, 3, 5), padding="same", groups=3),
    "depthwise": Case((2, 5, 18, 15), (10, 1, 5, 3), padding="full", groups=5),
    "deep": Case((1, 33, 14, 13), (35, 33, 3, 3), padding=1),
    "wide": Case((1, 1, 9, 131), (18, 1, 3, 5)),
    "long padding": Case((1, 2, 5, 3), (2, 2, 4, 5), padding=((30, 0), (2, 40))),
}
#: Sides that other tests compile anyway.
TILES = {"codelet": ((8, 8), (12, 16)), "four_step": ((30, 40), (36, 30)), "fftw": ((9, 11), (12, 16))}


def tiles_of(name: str) -> tuple[tuple[int, int], ...]:
    return TILES.get(name) or (tuple(registry.get(name).sides(1, axis)[0] for axis in (0, 1)),)


def winograd_tiles_of(case: Case) -> list[tuple[int, int]]:
    """Both that there are for the taps of a case, none if these are too many."""
    geometry = ConvGeometry.from_arguments(case.input_size, case.weight_size, **case.options)
    taps = [of_axis for _, of_axis in problem_sizes(geometry)]
    return [(taps[0] + 1, taps[1] + 3), (taps[0] + 3, taps[1] + 1)] if max(taps) <= 3 else []


def plans(case: Case, algorithm: str, direction: str, dtype: type, transposed: bool | None) -> Iterator[object]:
    """The kinds of plans of a pass: stages in blocks of several sizes, and fused."""
    if algorithm == "direct":
        yield case.plan(direction, dtype, algorithm="direct", transposed=transposed)
        return
    name, tiles = registry.get(algorithm).algorithm, tiles_of(algorithm)
    if name == "winograd":
        tiles = winograd_tiles_of(case)
    for tile in tiles:
        plan = case.plan(direction, dtype, algorithm=name, transform=algorithm, tile=tile, transposed=transposed)
        yield plan
        if not plan.is_transposed:
            units = simd.lanes(dtype) if algorithm in ("codelet", "row_codelet", "winograd") else 1
            yield replace(plan, fused=False, block_tiles=units)
            if direction == "forward":
                yield replace(plan, fused=not plan.fused, block_tiles=2 * units)


def operands(case: Case, direction: str, dtype: type) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Dense ones, and such with blank rows and filters, which are looked for."""
    rng = np.random.default_rng(5)
    a, b = case.operands(direction, dtype, rng)
    yield a, b
    a, b = a.copy(), b.copy()
    a[:, ::2, a.shape[2] // 3 :] = 0
    b[:1] = 0
    yield a, b


def compare(label: str, run: Callable[[bool | None], list[np.ndarray]], differing: list[str]) -> int:
    """Run without guard pages and with; return how many times memory was lent."""
    print(label, file=sys.stderr, flush=True)
    expected, lendings = run(None), 0
    for at_end in (False, True):
        with guarded_scratch(at_end) as lent:
            found = run(at_end)
        lendings += len(lent)
        if any(one.tobytes() != other.tobytes() for one, other in zip(found, expected, strict=True)):
            differing.append(f"{label}, {at_end=}")
    return lendings


def placed(array: np.ndarray, at_end: bool | None) -> np.ndarray:
    return array.copy() if at_end is None else guarded(array, at_end)


def passes(algorithm: str, cases: dict[str, Case]) -> dict[str, object]:
    differing, runs, lendings = [], 0, 0
    if algorithm in ROW_TILES:
        cases = {name: of_one_row(case) for name, case in cases.items()}
    for name, case in cases.items():
        for dtype in (np.float32, np.float64):
            for direction, transposed in WAYS:
                for plan in plans(case, algorithm, direction, dtype, transposed):
                    for number, (a, b) in enumerate(operands(case, direction, dtype)):
                        bias = np.linspace(-1, 1, case.weight_size[0], dtype=dtype)

                        def run(at_end, a=a, b=b, bias=bias, case=case, direction=direction, plan=plan):
                            extras = {}
                            if direction == "forward":
                                out = placed(np.full(case.output_size, np.nan, plan.dtype), at_end)
                                extras = {"bias": placed(bias, at_end), "out": out, "activation": "relu"}
                            result = case.run(direction, placed(a, at_end), placed(b, at_end), plan, **extras)
                            assert direction != "forward" or result is out
                            return [result]

                        label = f"{name}, operands {number}, {transposed=}, {plan!r}"
                        lent = compare(label, run, differing)
                        assert algorithm == "direct" or lent, label
                        lendings += lent
                        runs += 1
    return {"differing": differing, "runs": runs, "lent": lendings > 0}


def steps(cases: dict[str, Case]) -> dict[str, object]:
    """Training steps of layers, which share spectra between the passes."""
    differing, runs, lendings = [], 0, 0
    for name, case in cases.items():
        for dtype in (np.float32, np.float64):
            x, w = case.operands("forward", dtype, np.random.default_rng(5))
            g = np.random.default_rng(6).standard_normal(case.output_size).astype(dtype)
            for spectra_limit in (0, 2**28):

                def run(at_end, x=x, w=w, g=g, case=case, spectra_limit=spectra_limit):
                    layer = nbfftconv.Conv2d(w, w[:, 0, 0, 0], **case.options, activation="relu", algorithm="fft")
                    layer.spectra_limit = spectra_limit
                    y = layer(placed(x, at_end))
                    return [y, layer.backward(placed(g, at_end)), layer.weight_grad, layer.bias_grad]

                lendings += compare(f"a step, {name}, {dtype.__name__}, {spectra_limit}", run, differing)
                runs += 1
    return {"differing": differing, "runs": runs, "lent": lendings > 0}


if __name__ == "__main__":
    faulthandler.enable()
    fftw.set_planning_effort("estimate")
    machine.set_machine(machine.DEFAULT)
    algorithm, *names = sys.argv[1:]
    cases = {name: CASES[name] for name in names}
    print(json.dumps(steps(cases) if algorithm == "layer" else passes(algorithm, cases)))
