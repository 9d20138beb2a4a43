"""A soak test: random convolutions under rough treatment for minutes or hours, each checked, and the memory watched.

Every round is drawn from a seed of its own: random geometries, functions or layers, dtypes, layouts, forced algorithms
and tiles, NaN and infinities, blank regions and dead channels; alone, from several Python threads at once, in forked
children, or interrupted at random moments; with changing numbers of threads and scratch limits. Results are compared
with the float64 loops of tests/oracle.py, which share no code with the package: accurate, NaN and infinities exactly
where the loops have them, exact where every product is zero, and the same bits in every repetition.

A wrong result is printed with the seed of its round, which ``--replay`` runs again. The exit status is 1 if there was
one, or if the memory grew in the second half of a long run. Machine code counts: a function is 0.5 MiB where it is
loaded, and some MiB where it is compiled, but there are some hundred only. With an empty cache folder, compilation is
most of the first minutes.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

import nbfftconv
from nbfftconv.scratch import set_scratch_limit
from nbfftconv.transforms import codelets, fftw, four_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

BOUNDS = {np.dtype(np.float32): 1e-5, np.dtype(np.float64): 1e-12}  # of the largest sum of the products' magnitudes
PRODUCTS = 1_000_000  # of one pass, at most; for one problem in 20 as many times 20
HANG = 300  # seconds of one round, or of a forked child
GROWTH = 64.0  # MiB that memory may rise in the second half
LONG = 10  # minutes after which growth is judged: until then caches fill
PYTHON_THREADS = 4
SHOWN = 20  # wrong results that are printed
SIDES = {"codelet": codelets.SIDES, "four_step": [side for side in four_step.SIDES if side <= 100]}


@dataclass(frozen=True)
class Problem:
    """A geometry, and how it is computed."""

    input_size: tuple[int, int, int, int]
    weight_size: tuple[int, int, int, int]
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str
    dtype: str
    has_bias: bool
    activation: str | None
    algorithm: str
    transform: str
    tile: tuple[int, int] | None

    @property
    def geometry(self) -> dict[str, Any]:
        """The keywords that the package and the oracle share."""
        names = "stride", "padding", "dilation", "groups", "padding_mode"
        return {name: getattr(self, name) for name in names}

    def plan(self, direction: str) -> Any:
        """Return the plan that was drawn; None if a function is to make it."""
        if self.transform == "auto":
            return None
        geometry = {name: value for name, value in self.geometry.items() if name != "padding_mode"}
        choices = {"algorithm": "fft", "transform": self.transform, "tile": self.tile}
        return nbfftconv.plan_conv2d(
            self.input_size, self.weight_size, **geometry, direction=direction, dtype=self.dtype, **choices
        )


def one_of(rng: np.random.Generator, values: Iterable) -> Any:
    """Return one of the values, as it is."""
    values = list(values)
    return values[rng.integers(len(values))]


def draw_padding(rng: np.random.Generator, reach: tuple[int, int], stride: tuple[int, int]) -> Any:
    """Return padding in any form."""
    amount = [int(rng.integers(0, r + 3)) for r in (*reach, *reach)]
    forms = ["valid", "full", 0, min(amount), tuple(amount[:2]), ((amount[0], amount[2]), (amount[1], amount[3]))]
    return one_of(rng, forms + ["same"] * (stride == (1, 1)))


def draw_problem(rng: np.random.Generator) -> Problem:
    """Return a valid problem that the oracle can bear."""
    is_large = rng.random() < 0.05
    while True:
        kernel = tuple(int(one_of(rng, [1, 2, 3, 3, 4, 5, 7, 9, 13, *([31] * is_large)])) for _ in "hw")
        dilation = tuple(int(one_of(rng, [1, 1, 1, 2, 3])) for _ in "hw")
        stride = one_of(rng, [(1, 1), (1, 1), tuple(rng.integers(1, 5, 2).tolist())])
        size = tuple(int(one_of(rng, [1, 2, 7, 16, 31, 53, *rng.integers(1, 60 + 90 * is_large, 4)])) for _ in "hw")
        groups, in_group, multiplier = (int(n) for n in rng.integers(1, 7, 3))
        if rng.random() < 0.3:  # depthwise
            groups, in_group = int(rng.integers(2, 40)), 1
        elif rng.random() < 0.3:
            groups, in_group, multiplier = 1, int(rng.integers(1, 40)), int(rng.integers(1, 40))
        reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        padding, mode = draw_padding(rng, reach, stride), one_of(rng, ["zeros", "zeros", *oracle.NUMPY_PAD_MODES])
        input_size = (int(one_of(rng, [0, 1, 1, 2, 3, 5])), groups * in_group, *size)
        weight_size = (groups * multiplier, in_group, *kernel)
        output_size = oracle.output_size(input_size, weight_size, stride, padding, dilation)
        pads = oracle.resolve_padding(padding, kernel, dilation)
        room = {"reflect": -1, "circular": 0}.get(mode, np.inf)
        fits_mode = all(max(pad) <= s + room for pad, s in zip(pads, size, strict=True))
        products = np.prod(output_size) * np.prod(weight_size[1:])
        if min(output_size[2:]) >= 1 and fits_mode and products <= PRODUCTS * (20 if is_large else 1):
            break
    algorithms = ["auto", "auto", "fft", "direct", *(["winograd"] if max(kernel) <= 3 else [])]
    algorithm, transform, tile = one_of(rng, algorithms), "auto", None
    if rng.random() < 0.3:
        algorithm, transform = "auto", one_of(rng, ["fftw", "codelet", "four_step"])
        sides = [[side for side in SIDES.get(transform, range(k, k + 24)) if side >= k] for k in kernel]
        transform, tile = (transform, tuple(one_of(rng, s) for s in sides)) if all(sides) else ("auto", None)
    has_bias, activation = bool(rng.random() < 0.5), one_of(rng, [None, "relu"])
    if rng.random() < 0.5 and stride[0] == stride[1]:
        stride = stride[0]
    return Problem(
        input_size, weight_size, stride, padding, dilation, groups, mode, one_of(rng, ["float32", "float64"]),
        has_bias, activation, algorithm, transform, tile,
    )  # fmt: skip


def every_other(array: np.ndarray) -> np.ndarray:
    """Return the values amid others, which are NaN."""
    view = np.full([2 * size for size in array.shape], np.nan, array.dtype)[::2, 1::2, ::2, 1::2]
    view[...] = array
    return view


LAYOUTS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda array: array,
    lambda array: array,
    np.asfortranarray,
    every_other,
    lambda array: array[::-1, ::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1, ::-1],
    lambda array: array.astype(array.dtype.newbyteorder()),
    lambda array: np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
]


def draw_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, has_specials: bool) -> np.ndarray:
    """Return normal values, some of them blank, some not finite if `has_specials`, of any layout."""
    array = rng.standard_normal(shape).astype(dtype)
    if array.size and rng.random() < 0.4:
        for _ in range(int(rng.integers(1, 4))):
            kind = one_of(rng, ["region", "channel", "first", "all but a region"])
            corner = [int(rng.integers(0, n)) for n in shape[2:]]
            region = (..., slice(corner[0], None), slice(corner[1], corner[1] + 1 + shape[3] // 2))
            if kind == "region":
                array[region] = 0
            elif kind == "channel":
                array[:, rng.integers(shape[1])] = 0
            elif kind == "first":
                array[rng.integers(shape[0])] = 0
            else:
                kept = array[region].copy()
                array[...] = 0
                array[region] = kept
    if array.size and has_specials:
        share = one_of(rng, [1, 1, 3, max(1, array.size // 20)])
        positions = rng.integers(0, array.size, share)
        array.reshape(-1)[positions] = rng.choice([np.nan, np.inf, -np.inf], share)
    return one_of(rng, LAYOUTS)(array)


@dataclass
class Result:
    """One array that the package returned, and what it is to be compared with."""

    name: str
    actual: np.ndarray
    expect: Callable[..., np.ndarray]  # of operands of any magnitude
    operands: tuple[np.ndarray, ...]
    bias: np.ndarray | None = None
    relu: bool = False

    def fault(self, dtype: str) -> str | None:
        """Return what is wrong."""
        actual = self.actual
        expected = self.expect(*self.operands)
        if actual.shape != expected.shape or actual.dtype != dtype:
            return f"{self.name}: {actual.dtype} of {actual.shape} instead of {dtype} of {expected.shape}"
        magnitudes = self.expect(*(np.abs(np.where(np.isfinite(each), each, 0)) for each in self.operands))
        if self.bias is not None:
            expected = expected + self.bias.astype(float)[:, None, None]
        if self.relu:
            expected = np.where(expected <= 0, 0.0, expected)
        for kind in (np.isnan, np.isposinf, np.isneginf):
            if (differs := kind(actual) != kind(expected)).any():
                places = f"{differs.sum()} values, the first at {np.argwhere(differs)[0].tolist()}"
                return f"{self.name}: {kind.__name__} of {places} is not as expected"
        is_finite = np.isfinite(expected)
        errors = np.abs(np.where(is_finite, actual, 0).astype(float) - np.where(is_finite, expected, 0))
        scale = magnitudes.max(initial=0) + (np.abs(self.bias).max() if self.bias is not None else 0)
        if errors.max(initial=0) > BOUNDS[np.dtype(dtype)] * scale:
            at = np.unravel_index(errors.argmax(), errors.shape)
            return (
                f"{self.name}: {actual[at]} instead of {expected[at]} at {[int(i) for i in at]}, of up to {scale:.3g}"
            )
        is_blank = (magnitudes == 0) & is_finite
        if (inexact := is_blank & (errors > 0)).any():
            return f"{self.name}: {inexact.sum()} of {is_blank.sum()} sums of zeros are not exact, off by up to " + (
                f"{errors[inexact].max():.3g}"
            )
        return None


class Trial:
    """A problem and its operands; may be run any number of times, from one thread at a time."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.problem = problem = draw_problem(rng)
        has_specials = rng.random(3) < (0.25 if rng.random() < 0.4 else 0)
        output_size = oracle.output_size(
            problem.input_size, problem.weight_size, problem.stride, problem.padding, problem.dilation
        )
        shapes = problem.input_size, problem.weight_size, output_size
        self.x, self.w, self.g = (
            draw_array(rng, shape, problem.dtype, specials)
            for shape, specials in zip(shapes, has_specials, strict=True)
        )
        self.bias = rng.standard_normal(problem.weight_size[0]).astype(problem.dtype) if problem.has_bias else None
        self.way = one_of(rng, ["functions", "training", "inference"])
        self.layer: nbfftconv.Conv2d | None = None
        self.spectra_limit = one_of(rng, [0, 2**16, 2**28])
        larger = (1, problem.input_size[1], *(size + int(rng.integers(8)) for size in problem.input_size[2:]))
        self.other = draw_array(rng, larger, problem.dtype, has_specials[0])  # for a layer: images of another size

    def _forward(self, name: str, actual: np.ndarray, x: np.ndarray) -> Result:
        options = self.problem.geometry
        relu = self.problem.activation == "relu"
        return Result(name, actual, lambda x, w: oracle.conv2d(x, w, **options), (x, self.w), self.bias, relu)

    def _gradients(self, g: np.ndarray, dw: np.ndarray, dx: np.ndarray) -> list[Result]:
        problem, options = self.problem, self.problem.geometry
        sizes = problem.input_size, problem.weight_size
        return [
            Result("dW", dw, lambda x, g: oracle.conv2d_weight(x, sizes[1], g, **options), (self.x, g)),
            Result("dX", dx, lambda w, g: oracle.conv2d_input(sizes[0], w, g, **options), (self.w, g)),
        ]

    def run(self) -> list[Result]:
        """Compute with the package."""
        try:
            return self._run_functions() if self.way == "functions" else self._run_layer()
        except ValueError as error:
            if "scratch limit" not in str(error):
                raise
            return []  # a choice that was forced does not fit: no fault

    def _run_functions(self) -> list[Result]:
        problem, options = self.problem, self.problem.geometry | {"algorithm": self.problem.algorithm}
        plans = [problem.plan(direction) for direction in ("forward", "grad_weight", "grad_input")]
        y = nbfftconv.conv2d(
            self.x, self.w, self.bias, **options, activation=problem.activation, plan=plans[0]
        )  # fmt: skip
        dw = nbfftconv.conv2d_weight(self.x, problem.weight_size, self.g, **options, plan=plans[1])
        dx = nbfftconv.conv2d_input(problem.input_size, self.w, self.g, **options, plan=plans[2])
        return [self._forward("forward", y, self.x), *self._gradients(self.g, dw, dx)]

    def _run_layer(self) -> list[Result]:
        if self.layer is None:
            self.layer = nbfftconv.Conv2d(
                self.w,
                self.bias,
                **self.problem.geometry,
                activation=self.problem.activation,
                algorithm=self.problem.algorithm,
                training=self.way == "training",
                spectra_limit=self.spectra_limit,
            )
        layer = self.layer
        if not layer.training:  # after the first time with the kernels' spectra that it kept
            return [
                self._forward(f"forward, time {i}", layer(x), x) for i, x in enumerate((self.x, self.other, self.x), 1)
            ]
        layer.weight = self.w  # as in a step
        y = layer(self.x)
        dx = layer.backward(self.g)
        g = np.where(y <= 0, 0, self.g) if layer.activation == "relu" else self.g
        results = [self._forward("forward", y, self.x), *self._gradients(g, layer.weight_grad, dx)]
        if self.bias is not None:
            results.append(Result("db", layer.bias_grad, lambda g: g.astype(float).sum((0, 2, 3)), (g,)))
        return results

    def faults(self, results: list[Result]) -> list[str]:
        """Return what is wrong with what was computed."""
        with np.errstate(all="ignore"):
            found = [result.fault(self.problem.dtype) for result in results]
        return [f"{self.way}, {fault}, in {self.problem}" for fault in found if fault]


def digest(results: list[Result]) -> str:
    """Return a digest of all bits; a NaN's own do not count."""
    digests = hashlib.sha256()
    for result in results:
        digests.update(np.where(np.isnan(result.actual), np.nan, result.actual).tobytes())
    return digests.hexdigest()


# Rounds ----------------------------------------------------------------------------------------------


def checked(seed: int) -> tuple[list[str], str]:
    """Run a trial; return what is wrong, and the digest of its results."""
    trial = Trial(seed)
    results = trial.run()
    return trial.faults(results), digest(results)


def alone(rng: np.random.Generator) -> list[str]:
    """Run a trial, and again on other numbers of threads, to the same bits."""
    trial = Trial(int(rng.integers(2**63)))
    results = trial.run()
    faults, bits = trial.faults(results), digest(results)
    for threads in rng.integers(1, 5, 2).tolist():
        nbfftconv.set_num_threads(threads)
        if digest(trial.run()) != bits:
            faults.append(f"{trial.way}, other bits on {threads} threads, in {trial.problem}")
    return faults


def from_threads(rng: np.random.Generator) -> list[str]:
    """Run trials in several Python threads, while the numbers of threads change."""
    seeds = rng.integers(2**63, size=2 * PYTHON_THREADS).tolist()
    faults = []
    with ThreadPoolExecutor(PYTHON_THREADS) as pool:
        futures = [pool.submit(checked, seed) for seed in seeds]
        child = fork(seeds[0]) if rng.random() < 0.3 else None
        while not all(future.done() for future in futures):
            nbfftconv.set_num_threads(int(rng.integers(1, 5)))
            time.sleep(0.002)
        for future in futures:
            faults += future.result()[0]
    return faults + (child(futures[0].result()[1]) if child else [])


def fork(seed: int) -> Callable[[str], list[str]]:
    """Start a forked child that runs a trial; the function returned waits for it, and expects a digest."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)  # the watchdog of the parent is no thread of the child
            with os.fdopen(write, "w") as pipe:
                json.dump(checked(seed), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)

    def wait(expected: str) -> list[str]:
        with os.fdopen(read) as pipe:
            if not select.select([pipe], [], [], HANG / 2)[0]:
                os.kill(pid, signal.SIGKILL)
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        if status:
            return [f"a forked child ended with status {status}, or hung"]
        faults, bits = json.loads(text)
        return [f"in a forked child, {fault}" for fault in faults] + ["other bits in a forked child"] * (
            bits != expected
        )

    return wait


def forked(rng: np.random.Generator) -> list[str]:
    """Run a trial in two forked children and in the parent at the same time."""
    seed = int(rng.integers(2**63))
    children = [fork(seed) for _ in range(2)]
    faults, bits = checked(seed)
    for wait in children:
        faults += wait(bits)
    return faults


def interrupted(rng: np.random.Generator) -> list[str]:
    """Interrupt a trial at random moments, as Ctrl-C does; then it and another one must be as ever."""
    seeds = rng.integers(2**63, size=2).tolist()
    trial = Trial(seeds[0])
    start = time.perf_counter()
    results = trial.run()
    seconds = time.perf_counter() - start
    faults, bits = trial.faults(results), digest(results)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    for delay in rng.uniform(1e-5, 1.2 * min(seconds, 0.5), 20).tolist():
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                trial.run()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            pass
    signal.signal(signal.SIGALRM, before)
    results = trial.run()
    if digest(results) != bits:
        faults.append(f"{trial.way}, other bits after interrupts, in {trial.problem}")
    faults += [f"after interrupts, {fault}" for fault in trial.faults(results)]
    return faults + [f"the next trial after interrupts, {fault}" for fault in checked(seeds[1])[0]]


KINDS = [alone, alone, from_threads]
if hasattr(os, "fork") and hasattr(signal, "setitimer"):
    KINDS += [forked, interrupted]


def run_round(seed: int) -> tuple[str, list[str]]:
    """Run the round of a seed; return its kind, and what is wrong."""
    rng = np.random.default_rng(seed)
    kind = one_of(rng, KINDS)
    dropped = []

    def note(found: Any) -> None:
        if not isinstance(found.exc_value, KeyboardInterrupt):  # which Python's own callbacks drop
            dropped.append(f"dropped: {found.exc_value!r} in {found.object!r}")

    sys.unraisablehook = note
    set_scratch_limit(2 ** int(rng.integers(20, 27)))
    nbfftconv.set_num_threads(int(rng.integers(1, 5)))
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        faults = kind(rng)
        return kind.__name__, faults + dropped
    except Exception:
        return kind.__name__, [traceback.format_exc()]
    finally:
        faulthandler.cancel_dump_traceback_later()
        sys.unraisablehook = sys.__unraisablehook__


# The run ---------------------------------------------------------------------------------------------


@dataclass
class Record:
    """Resident memory, and rounds so far, over time."""

    minutes: list[float] = field(default_factory=list)
    mebibytes: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def sample(self, minutes: float, rounds: int) -> None:
        """Add a sample, where the system tells what is resident."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:
            return
        self.minutes.append(minutes)
        self.mebibytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.rounds.append(rounds)

    def growth(self) -> float:
        """Return by how many MiB memory rises in the second half, by a line of least squares."""
        half = len(self.minutes) // 2
        minutes, mebibytes = np.array(self.minutes[half:]), self.mebibytes[half:]
        if len(minutes) < 3:
            return 0.0
        return float(np.polyfit(minutes, mebibytes, 1)[0] * (minutes[-1] - minutes[0]))

    def plot(self, path: Path) -> None:
        """Draw both."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, memory = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        count = memory.twinx()
        (first,) = memory.plot(self.minutes, self.mebibytes, color="tab:blue", label="resident memory")
        (second,) = count.plot(self.minutes, self.rounds, color="tab:orange", label="rounds so far")
        memory.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, 1.1 * max(self.mebibytes)))
        memory.set_title("Soak test: random convolutions, threads, forks, interrupts")
        count.set(ylabel="rounds so far", ylim=(0, None))
        memory.legend(handles=[first, second], loc="lower right")
        memory.grid(alpha=0.3)
        figure.savefig(path, dpi=150)


def soak(minutes: float, seed: int) -> tuple[Counter, int, Record]:
    """Run rounds for so long; return how many of each kind, how many faults there were, and the record of memory."""
    seeds = np.random.default_rng(seed)
    kinds, faults, record, sampled = Counter(), 0, Record(), -1.0
    start = time.monotonic()
    with Progress(auto_refresh=False, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("rounds", total=minutes)
        while (elapsed := (time.monotonic() - start) / 60) < minutes:
            if elapsed - sampled > 1 / 60:
                sampled = elapsed
                record.sample(elapsed, kinds.total())
                progress.update(task, completed=elapsed, description=f"{kinds.total()} rounds, {faults} faults")
                progress.refresh()
            round_seed = int(seeds.integers(2**63))
            kind, found = run_round(round_seed)
            kinds[kind] += 1
            for fault in found:
                faults += 1
                if faults <= SHOWN:
                    progress.console.print(
                        f"WRONG: --replay {round_seed} ({kind}): {fault}", markup=False, soft_wrap=True
                    )
    record.sample(elapsed, kinds.total())
    return kinds, faults, record


def main() -> int:
    """Run, report, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="of the seeds of all rounds")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run the round of this seed only")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw memory over time (needs matplotlib)")
    args = parser.parse_args()

    fftw.set_planning_effort("estimate")  # sizes are planned once and run once
    if args.replay is not None:
        kind, faults = run_round(args.replay)
        print("\n".join([f"{kind}: {len(faults)} faults", *faults]))
        return bool(faults)
    kinds, faults, record = soak(args.minutes, args.seed)
    rounds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(kinds.items()))
    print(f"{kinds.total()} rounds ({rounds}): {faults} wrong results.")
    growth = record.growth()
    if record.mebibytes:
        print(
            f"Resident memory at the end {record.mebibytes[-1]:.0f} MiB, at most {max(record.mebibytes):.0f}. Over the "
            f"second half it rose by {growth:.1f} MiB, of which {GROWTH:.0f} are allowed after {LONG} minutes or more."
        )
    if args.plot and record.mebibytes:
        record.plot(args.plot)
    return bool(faults) or (args.minutes >= LONG and growth > GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
