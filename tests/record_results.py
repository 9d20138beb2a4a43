"""Bits of results on recorded geometries: what test_recorded.py compares with, and the process that it runs.

``python record_results.py results BEGIN END`` prints the plans and the bits of the geometries BEGIN <= i < END, in
JSON. ``python record_results.py record`` adds them, of all geometries, to the file, or replaces those of the same
environment; ``python record_results.py draw COMMIT`` draws the geometries anew. What is recorded are the results of the
commit that the file names: run it with that commit's package first on PYTHONPATH. Only what that one and the present
one have in common is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import llvmlite.binding
import numpy as np
import pyfftw

import nbfftconv
from nbfftconv import machine, simd
from nbfftconv.scratch import get_scratch_limit, set_scratch_limit
from nbfftconv.transforms import codelets, fftw

try:
    from nbfftconv.transforms import four_step
except ImportError:  # in the recorded commit
    from nbfftconv.transforms import planar as four_step

FILE = Path(__file__).with_name("recorded_results.json")
#: The first geometries, of sides that other tests compile anyway.
QUICK = 60
FOUR_STEP = four_step.__name__.rpartition(".")[2]
COUNT = 300
QUICK_SIDES = {"codelet": ((8, 8), (12, 16), (20, 20)), "four_step": ((30, 40), (36, 30))}
SIDES = {"codelet": codelets.SIDES, "four_step": four_step.SIDES[:13], "fftw": (*range(5, 40), 47, 64, 70)}
PASSES = tuple((dtype, way) for dtype in ("float32", "float64") for way in ("forward", "grad_weight", "grad_input"))
THREADS = 1, 3
_CPU_FEATURES = "sse2", "avx", "avx2", "fma", "avx512f", "asimd"  # that FFTW chooses its code by


def environment() -> dict[str, Any]:
    """What bits depend on: all of them, those of FFTW, and those of direct convolution, where LLVM orders sums."""
    angles = [2 * math.pi * k / n for n in range(1, 401) for k in range(n)]
    roots = [[math.cos(a) for a in angles], [math.sin(a) for a in angles], np.cos(angles), np.sin(angles)]
    features = llvmlite.binding.get_host_cpu_features()
    return {
        "all": {
            "machine": platform.machine(),
            "vector_bytes": simd.VECTOR_BYTES,
            "libm": hashlib.sha256(np.array(roots).tobytes()).hexdigest()[:16],
        },
        "fftw": {
            "version": f"pyfftw {pyfftw.__version__}, {pyfftw.fftw_version}",
            "cpu": [name for name in _CPU_FEATURES if features.get(name)],
        },
        "direct": {
            "llvmlite": llvmlite.__version__,
            "cpu": os.environ.get("NUMBA_CPU_NAME") or llvmlite.binding.get_host_cpu_name(),
        },
    }


def kind(geometry: dict[str, Any]) -> str:
    """What is to compute a geometry: a transform, or "direct"."""
    return geometry["choices"].get("transform", "direct")


def values(shape: tuple[int, ...], dtype: str, seed: int, zeros: bool = False) -> np.ndarray:
    """Values between -1 and 1, the same with any NumPy, and exact in both dtypes; or half of them zeros, and rows."""
    count = math.prod(shape)
    raw = np.random.PCG64(seed).random_raw(count)
    array = ((raw >> np.uint64(41)).astype(np.float64) * 2.0**-22 - 1).astype(dtype).reshape(shape)
    if zeros:
        array = np.maximum(array, 0)
        array[:, :: max(2, shape[1] // 2), shape[2] // 3 :] = 0
    return array


@contextmanager
def scratch_limit(nbytes: int) -> Iterator[None]:
    before = get_scratch_limit()
    set_scratch_limit(nbytes)
    try:
        yield
    finally:
        set_scratch_limit(before)


class Recorded:
    """A recorded geometry, and its results."""

    def __init__(self, geometry: dict[str, Any]) -> None:
        self.geometry = geometry
        self.sizes = tuple(geometry["input_size"]), tuple(geometry["weight_size"])
        self.options = geometry["options"]

    def plan(self, dtype: str, way: str) -> Any:
        """The automatic plan for the recorded transform, tile and scratch limit, in other blocks if they are forced."""
        limit = self.geometry.get("scratch_limit")
        with nullcontext() if limit is None else scratch_limit(limit):  # to set it frees all memory that is kept
            plan = nbfftconv.plan_conv2d(
                *self.sizes, **self.options, **known(self.geometry["choices"]), direction=way, dtype=dtype
            )
        forced = self.geometry.get("blocks")
        if forced and not is_transposed(plan):
            units = simd.lanes(np.dtype(dtype).type) if plan.transform == "codelet" else 1
            block_tiles = min(forced["units"] * units, -(-plan.grid.tiles // units) * units)
            plan = replace(plan, fused=forced["fused"] and way == "forward", block_tiles=block_tiles)
        return plan

    def operands(self, dtype: str, output_size: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """Input, weight, bias and the output's gradient."""
        seed, zeros = self.geometry["seed"], self.geometry.get("zeros", False)
        x, w, g = (values(shape, dtype, seed + i, zeros) for i, shape in enumerate((*self.sizes, output_size)))
        return x, w, values((w.shape[0],), dtype, seed + 3), g

    def run(self, way: str, plan: Any) -> np.ndarray:
        """The result of one pass."""
        padding_mode = self.geometry.get("padding_mode", "zeros")
        keywords = self.options | {"padding_mode": padding_mode, "plan": plan}
        x, w, bias, g = self.operands(plan.dtype.name, plan.geometry.output_size)
        if way == "forward":
            return nbfftconv.conv2d(x, w, bias, activation=self.geometry.get("activation"), **keywords)
        if way == "grad_weight":
            return nbfftconv.conv2d_weight(x, w.shape, g, **keywords)
        return nbfftconv.conv2d_input(x.shape, w, g, **keywords)

    def step(self, dtype: str) -> Iterator[np.ndarray]:
        """The results of a training step of a layer, and of inference after it; the layer chooses its plans."""
        layer_options = {name: self.geometry.get(name) for name in ("activation",)}
        layer_options["padding_mode"] = self.geometry.get("padding_mode", "zeros")
        plan = self.plan(dtype, "forward")
        x, w, bias, g = self.operands(dtype, plan.geometry.output_size)
        layer = nbfftconv.Conv2d(w, bias, algorithm=self.geometry["step"], **layer_options, **self.options)
        yield layer(x)
        yield layer.backward(g)
        yield layer.weight_grad
        yield layer.bias_grad
        layer.training = False
        yield layer(x)


def known(choices: dict[str, Any]) -> dict[str, Any]:
    """Choices as this package calls them."""
    return {name: FOUR_STEP if value == "four_step" else value for name, value in choices.items()}


def is_transposed(plan: Any) -> bool:
    """Whether a plan of the gradient at the input is run as a forward pass."""
    if hasattr(plan, "is_transposed"):
        return plan.is_transposed
    return plan.transposed is not None  # in the recorded commit


def describe(plan: Any) -> str:
    """What a plan is, as far as results depend on it."""
    run = "transposed " if is_transposed(plan) else ""
    if plan.algorithm == "direct":
        return f"{run}direct"
    fused = "fused " if plan.fused else ""
    transform = "four_step" if plan.transform == FOUR_STEP else plan.transform
    return f"{run}{fused}{transform} {plan.tile[0]}x{plan.tile[1]} in {plan.block_tiles}"


def bits(array: np.ndarray) -> str:
    """The first 16 digits of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]


def results(geometry: dict[str, Any]) -> dict[str, Any]:
    """Plans, and bits by each number of threads, of all passes and of the steps."""
    recorded = Recorded(geometry)
    plans = [recorded.plan(*each) for each in PASSES]
    found = {"plans": [describe(plan) for plan in plans], "bits": [], "steps": []}
    counts = nbfftconv.get_num_threads()
    for threads in THREADS:
        nbfftconv.set_num_threads(threads)
        found["bits"].append([bits(recorded.run(way, plan)) for (_, way), plan in zip(PASSES, plans, strict=True)])
        if "step" in geometry:
            steps = (recorded.step(dtype) for dtype in ("float32", "float64"))
            found["steps"].append([bits(array) for step in steps for array in step])
    nbfftconv.set_num_threads(counts)
    return found


def settled(work: Callable[[], Any]) -> Any:
    """Return the result of work by plans that depend on no measurement, neither of this machine nor FFTW's."""
    effort, wisdom = fftw.get_planning_effort(), [pyfftw.export_wisdom()]

    def set_aside(found: tuple[bytes, ...]) -> tuple[bool, ...]:
        wisdom[0] = found  # and what is saved is what was found
        return (True,) * len(found)

    machine.set_machine(machine.DEFAULT)
    fftw.set_planning_effort("estimate")
    try:
        with (
            mock.patch.object(pyfftw, "import_wisdom", set_aside),
            mock.patch.object(pyfftw, "export_wisdom", lambda: wisdom[0]),
        ):
            return work()
    finally:
        fftw.set_planning_effort(effort)


def draw(index: int, rng: random.Random) -> dict[str, Any]:
    """Arguments of a geometry; some are of none."""
    pick = rng.choice
    kernel = [pick((1, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13)) for _ in range(2)]
    if rng.random() < 0.4:
        kernel[1] = kernel[0]
    stride = pick(((1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (1, 3), (3, 2), (4, 4)))
    dilation = pick(((1, 1), (1, 1), (1, 1), (2, 2), (1, 2), (3, 1), (2, 4)))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    paddings = [0, "valid", "full", rng.randint(0, 4), [reach[0] // 2, reach[1] // 2], [[1, 0], [0, rng.randint(0, 3)]]]
    if stride == (1, 1):
        paddings += ["same", "same"]
    what = pick(("small", "small", "small", "depthwise", "deep", "wide", "groups", "many"))
    batch, groups, inside, multiplier = rng.randint(1, 4), 1, rng.randint(1, 6), rng.randint(1, 9)
    most = 64
    if what == "depthwise":
        groups, inside, multiplier = rng.randint(2, 40), 1, pick((1, 1, 1, 2, 3))
    elif what == "groups":
        groups = rng.randint(2, 5)
    elif what == "deep":
        inside, multiplier, batch, most = rng.randint(33, 150), rng.randint(4, 50), rng.randint(1, 2), 32
    elif what == "wide":
        inside, multiplier, batch, most = rng.randint(1, 3), rng.randint(1, 40), 1, 140
    elif what == "many":
        batch, inside, multiplier, most = rng.randint(8, 40), rng.randint(1, 4), rng.randint(1, 4), 24
    primes = [p for p in range(2, most) if all(p % q for q in range(2, p))]
    size = [pick((1, rng.randint(1, 8), pick(primes), rng.randint(8, most), rng.randint(8, most))) for _ in range(2)]
    transform = pick(("codelet", "codelet", "codelet", "four_step", "four_step", "fftw", "fftw", "direct"))
    choices = {"algorithm": "direct"}
    if transform != "direct":
        sides = SIDES[transform]
        tile = (pick(sides), pick(sides))
        if index < QUICK:
            tile = pick(QUICK_SIDES.get(transform, (tile,)))
        choices = {"algorithm": "fft", "transform": transform, "tile": tile}
    geometry = {
        "input_size": (batch, groups * inside, *size),
        "weight_size": (groups * multiplier, inside, *kernel),
        "options": {"stride": stride, "padding": pick(paddings), "dilation": dilation, "groups": groups},
        "choices": choices,
        "seed": 10 * index,
    }
    if rng.random() < 0.25:
        geometry["activation"] = "relu"
    if rng.random() < 0.15:
        geometry["padding_mode"] = pick(("reflect", "replicate", "circular"))
    if rng.random() < 0.25:
        geometry["zeros"] = True
    if transform != "direct" and rng.random() < 0.3:
        geometry["blocks"] = {"fused": rng.random() < 0.5, "units": rng.randint(1, 5)}
    if index % 10 == 0:
        geometry["step"] = pick(("auto", "fft", "fft"))
    return geometry


def limited(geometry: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The geometry with a scratch limit that cuts its work into several blocks, where it can."""
    plans = [Recorded(geometry).plan(*each) for each in PASSES]
    limited = geometry | {"scratch_limit": max(plan.scratch_bytes for plan in plans) // rng.randint(2, 5) + 64}
    try:
        for each in PASSES:
            Recorded(limited).plan(*each)
    except ValueError:
        return geometry
    return limited


def draw_all() -> list[dict[str, Any]]:
    """All geometries: different ones that can be, and are no great work."""
    rng = random.Random(20140424)
    geometries = []
    while len(geometries) < COUNT:
        geometry = draw(len(geometries), rng)
        try:
            plan = Recorded(geometry).plan("float64", "forward")
            output_size = plan.geometry.output_size
            products = math.prod(output_size) * math.prod(geometry["weight_size"][1:])
            if max(products / 5e8, math.prod(output_size) / 5e5, plan.weight_bytes / 5e7) > 1:
                continue
            if kind(geometry) != "direct" and "blocks" not in geometry and rng.random() < 0.4:
                geometry = limited(geometry, rng)
            results(geometry)
        except ValueError:  # it is none
            continue
        geometries.append(geometry)
    return geometries


def write(content: dict[str, Any]) -> None:
    """Write the file, a line for each geometry."""

    def lines(rows: list) -> str:
        return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"

    parts = [f'"commit": {json.dumps(content["commit"])}', f'"geometries": {lines(content["geometries"])}']
    recorded = (
        f'{{"environment": {json.dumps(each["environment"])}, "results": {lines(each["results"])}}}'
        for each in content["recorded"]
    )
    FILE.write_text("{" + ",\n".join(parts) + ',\n"recorded": [' + ",\n".join(recorded) + "]}\n")


def record(content: dict[str, Any]) -> None:
    """Record the results of all geometries in this environment."""
    found = [results(geometry) for geometry in content["geometries"]]
    for each in found:
        for name in ("bits", "steps"):
            assert all(other == each[name][0] for other in each[name][1:]), "results depend on the number of threads"
    rows = [[each["plans"], each["bits"][0], *each["steps"][:1]] for each in found]
    here = environment()
    others = [each for each in content["recorded"] if each["environment"] != here]
    content["recorded"] = [{"environment": here, "results": rows}, *others]


def main(action: str, *arguments: str) -> None:
    os.environ["NBFFTCONV_PROFILE"] = str(FILE.with_name("no-profile.json"))  # what was measured does not count
    if action == "draw":
        commit = arguments[0]
        write({"commit": commit, "geometries": settled(draw_all), "recorded": []})
        return
    content = json.loads(FILE.read_text())
    if action == "record":
        settled(lambda: record(content))
        write(content)
    else:
        begin, end = map(int, arguments)
        found = settled(lambda: [results(geometry) for geometry in content["geometries"][begin:end]])
        print(json.dumps({"environment": environment(), "results": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
