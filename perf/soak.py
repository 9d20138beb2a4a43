"""Random work for some minutes, as a service or a training job might do it, against direct convolution in float64.

Geometries, passes, dtypes, layouts, plans, layers and steps are drawn at random, with NaN and infinities strewn in,
blank regions and dead channels, from several threads at once, in forked children, and under interrupts. A result has to
be as accurate as promised, NaN or infinite exactly where direct convolution is, and exactly zero, or the bias, where
every product is zero. What is wrong is printed with the seed that repeats it (``--replay SEED``), and the exit status
is 1.

Resident memory is sampled meanwhile, drawn with ``--plot``, and fitted by a line over the second half of the time.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import nbfftconv
from nbfftconv import scratch
from nbfftconv.transforms import fftw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle  # of the tests: loops and einsum, of which nothing is the package's

PASSES = ("forward", "grad_weight", "grad_input")
PADDING_MODES = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")
BOUNDS = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-12}  # of the error, by the norms of the operands
PRODUCTS = 3e6  # of a pass of the oracle
FLAT = 0.5  # MiB a minute that memory may grow in the second half


@dataclass(frozen=True)
class Job:
    """One geometry, and the arguments that its three passes share."""

    input_size: tuple[int, ...]
    weight_size: tuple[int, ...]
    stride: tuple[int, int]
    padding: Any
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    dtype: Any
    algorithm: str

    @property
    def options(self) -> dict[str, Any]:
        """What oracle and package take alike."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(self, name) for name in names}

    @property
    def output_size(self) -> tuple[int, ...]:
        """Shape of the output."""
        return oracle.output_size(self.input_size, self.weight_size, self.stride, self.padding, self.dilation)


def draw_job(rng: np.random.Generator) -> Job:
    """Draw a geometry that the oracle can bear; sizes of 0, 1 and primes among them."""
    while True:
        kernel = tuple(int(k) for k in rng.choice([1, 2, 3, 3, 3, 5, 7, 9, 11, 15, 31], 2))
        if rng.random() < 0.6:
            kernel = (kernel[0],) * 2
        dilation = tuple(int(d) for d in rng.choice([1, 1, 1, 1, 2, 3], 2))
        stride = tuple(int(s) for s in rng.choice([1, 1, 1, 1, 2, 3, 4], 2))
        size = tuple(int(s) for s in rng.choice([1, 2, 7, 13, 14, 17, 28, 31, 40, 53, 64, 97, 128], 2))
        batch, groups = int(rng.choice([0, 1, 1, 2, 3, 8])), int(rng.choice([1, 1, 1, 2, 3, 8]))
        channels, filters = (int(n) for n in rng.choice([1, 1, 2, 3, 4, 8, 17, 32], 2))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding: Any = tuple(int(rng.integers(0, r + 2)) for r in reach)
        choice = rng.random()
        if choice < 0.2 and stride == (1, 1):
            padding = "same"
        elif choice < 0.3:
            padding = "full"
        elif choice < 0.4:
            padding = tuple((p, int(rng.integers(0, r + 1))) for p, r in zip(padding, reach, strict=True))
        mode = str(rng.choice(PADDING_MODES))
        pads = oracle.resolve_padding(padding, kernel, dilation)
        fits = all(s + sum(p) > r for s, p, r in zip(size, pads, reach, strict=True))
        if mode == "reflect":
            fits = fits and all(max(p) < s for s, p in zip(size, pads, strict=True))
        elif mode == "circular":
            fits = fits and all(max(p) <= s for s, p in zip(size, pads, strict=True))
        weight_size = (filters * groups, channels, *kernel)
        products = float(np.prod(weight_size)) * max(1, batch) * size[0] * size[1] / (stride[0] * stride[1])
        if fits and products <= PRODUCTS * (20 if rng.random() < 0.02 else 1):
            dtype = np.dtype(rng.choice(["float32", "float32", "float64"]))
            algorithm = str(rng.choice(["auto", "auto", "fft", "fft", "direct"]))
            input_size = (batch, channels * groups, *size)
            return Job(input_size, weight_size, stride, padding, dilation, groups, mode, dtype, algorithm)


def draw_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, finite: bool) -> np.ndarray:
    """Draw values, some blank or not finite now and then, in any layout of memory."""
    array = rng.standard_normal(shape).astype(dtype)
    kind = rng.random()
    if array.size and kind < 0.4:
        if kind < 0.1:
            array[rng.random(shape[:2]) < 0.5] = 0
        elif kind < 0.2:
            np.maximum(array, 0, out=array)
        else:
            (y0, y1), (x0, x1) = (np.sort(rng.integers(0, size + 1, 2)) for size in shape[2:])
            array[:, :, y0:y1, x0:x1] = 0
            if kind < 0.3:
                array *= rng.random(shape) < 0.1
    if array.size and not finite:
        count = int(rng.choice([1, 3, max(1, array.size // 50)]))
        array.reshape(-1)[rng.integers(0, array.size, count)] = rng.choice([np.nan, np.inf, -np.inf], count)
    layout = rng.random()
    if layout < 0.1:
        array = np.asfortranarray(array)
    elif layout < 0.15:
        array = array.astype(array.dtype.newbyteorder())
    elif layout < 0.2:
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif layout < 0.25:
        array.flags.writeable = False
    return array


class Wrong(AssertionError):
    """A result is not what direct convolution gives."""


def check(
    name: str, result: np.ndarray, expected: np.ndarray, operands: tuple[np.ndarray, ...], products: Any, left: Any = 0
) -> None:
    """Raise `Wrong` if a result is not the oracle's; `products` counts those that are not zero, `left` is without."""
    if result.shape != expected.shape:
        raise Wrong(f"{name}: shape {result.shape}, not {expected.shape}")
    for kind in (np.isnan, np.isposinf, np.isneginf):
        if not np.array_equal(kind(result), kind(expected)):
            raise Wrong(f"{name}: {kind.__name__} at {np.argwhere(kind(result) != kind(expected))[:3].tolist()}")
    left = np.broadcast_to(np.asarray(left, result.dtype), result.shape)
    untouched = (products == 0) & np.isfinite(expected)
    if not np.array_equal(result[untouched], left[untouched]):
        raise Wrong(
            f"{name}: {result[untouched][result[untouched] != left[untouched]][:3]} where all products are zero"
        )
    finite = np.isfinite(expected)
    norms = [np.linalg.norm(np.where(np.isfinite(each), each, 0).astype(np.float64)) for each in operands]
    scale = np.prod(norms) + np.abs(left[np.isfinite(left)]).max(initial=0) + 1e-30
    error = np.abs(result[finite] - expected[finite]).max(initial=0) / scale
    if error > BOUNDS[result.dtype]:
        raise Wrong(f"{name}: error {error:.2e} of the norms")


def run_functions(rng: np.random.Generator, job: Job, finite: bool) -> Callable[[], None]:
    """Return one of the three functions on random operands, and its check."""
    direction = str(rng.choice(PASSES))
    x, w, g = (draw_array(rng, size, job.dtype, finite) for size in (job.input_size, job.weight_size, job.output_size))
    plan = None
    options: dict[str, Any] = {"algorithm": job.algorithm}
    if job.algorithm == "fft" and rng.random() < 0.4:
        tile = tuple(int(k + rng.integers(0, 24)) for k in job.weight_size[2:])
        geometry = {name: value for name, value in job.options.items() if name != "padding_mode"}
        plan = nbfftconv.plan_conv2d(
            job.input_size,
            job.weight_size,
            **geometry,
            direction=direction,
            dtype=job.dtype,
            transform="fftw",
            tile=tile,
        )
        options = {"plan": plan}
    if direction == "forward":
        bias = rng.standard_normal(job.weight_size[0]).astype(job.dtype) if rng.random() < 0.5 else None
        relu = "relu" if rng.random() < 0.3 else None
        expected = oracle.conv2d(x, w, bias, **job.options, activation=relu)
        products = oracle.conv2d(x != 0, w != 0, **job.options)
        left = 0 if bias is None else bias[:, None, None]
        left = np.maximum(left, 0) if relu else left

        def run() -> None:
            y = nbfftconv.conv2d(x, w, bias, **job.options, activation=relu, **options)
            check(f"conv2d {job}", y, expected, (x, w), products, left)

    elif direction == "grad_weight":
        expected = oracle.conv2d_weight(x, w.shape, g, **job.options)
        products = oracle.conv2d_weight(x != 0, w.shape, g != 0, **job.options)

        def run() -> None:
            dw = nbfftconv.conv2d_weight(x, w.shape, g, **job.options, **options)
            check(f"conv2d_weight {job}", dw, expected, (x, g), products)

    else:
        expected = oracle.conv2d_input(x.shape, w, g, **job.options)
        products = oracle.conv2d_input(x.shape, w != 0, g != 0, **job.options)

        def run() -> None:
            dx = nbfftconv.conv2d_input(x.shape, w, g, **job.options, **options)
            check(f"conv2d_input {job}", dx, expected, (w, g), products)

    return run


def run_layer(rng: np.random.Generator, job: Job, finite: bool) -> Callable[[], None]:
    """Return a layer, in training or in inference, on images of several sizes."""
    bias = rng.standard_normal(job.weight_size[0]).astype(job.dtype)
    w = draw_array(rng, job.weight_size, job.dtype, finite=True)
    relu = "relu" if rng.random() < 0.5 else None
    training = bool(rng.random() < 0.6)
    layer = nbfftconv.Conv2d(
        w, bias, **job.options, activation=relu, algorithm=job.algorithm, training=training,
        spectra_limit=int(rng.choice([0, 2**28])),
    )  # fmt: skip
    jobs = [job, *(replace(job, input_size=(each, *job.input_size[1:])) for each in (1, 2))]
    cases = []
    for each in jobs:
        x, g = (draw_array(rng, size, job.dtype, finite) for size in (each.input_size, each.output_size))
        y = oracle.conv2d(x, w, bias, **job.options, activation=relu)
        cases.append((x, g, y, oracle.conv2d(x != 0, w != 0, **job.options)))
    left = np.maximum(bias, 0) if relu else bias
    reading = threading.Lock()  # gradients are the layer's, those of the thread that came last

    def run() -> None:
        for x, g, expected, products in cases:
            y = layer(x)
            check(f"layer {job}", y, expected, (x, w), products, left[:, None, None])
            if not training:
                continue
            passed = np.where(y <= 0, 0, g).astype(job.dtype) if relu else g
            with reading:
                dx = layer.backward(g)
                dw, db = layer.weight_grad, layer.bias_grad
            of_x = oracle.conv2d_input(x.shape, w, passed, **job.options)
            check(f"dX {job}", dx, of_x, (w, passed), oracle.conv2d_input(x.shape, w != 0, passed != 0, **job.options))
            of_w = oracle.conv2d_weight(x, w.shape, passed, **job.options)
            met = oracle.conv2d_weight(x != 0, w.shape, passed != 0, **job.options)
            check(f"dW {job}", dw, of_w, (x, passed), met)
            with np.errstate(all="ignore"):
                sums = passed.sum(axis=(0, 2, 3), dtype=np.float64)
            check(f"db {job}", db, sums, (passed, np.ones(passed.size)), np.ones(sums.shape))

    return run


def in_threads(runs: list[Callable[[], None]]) -> None:
    """Run all at once, each in a thread of its own."""
    errors: list[BaseException] = []

    def guarded(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def in_a_child(run: Callable[[], None]) -> None:
    """Run in a forked child, which is ended if it hangs."""
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            run()
        except BaseException as error:
            print(f"in a forked child: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise Wrong(f"a forked child ended with status {status}")


class _Interrupt(BaseException):
    """No Exception: NumPy takes those for an answer."""


def interrupted(rng: np.random.Generator, run: Callable[[], None]) -> int:
    """Run with signals at random times, then undisturbed; return the number of calls that were interrupted."""

    def handler(*_: Any) -> None:
        raise _Interrupt

    before, count = signal.signal(signal.SIGALRM, handler), 0
    try:
        for delay in rng.exponential(0.005, 5):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay + 1e-5)
                run()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except _Interrupt:
                count += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    run()
    return count


def turn(seed: int, counts: Counter) -> None:
    """Do the work of a seed; raise `Wrong` if a result is wrong."""
    rng = np.random.default_rng(seed)
    nbfftconv.set_num_threads(int(rng.integers(1, 5)))
    if rng.random() < 0.05:
        scratch.set_scratch_limit(int(rng.choice([2**24, 2**26, 2**29])))
    finite = bool(rng.random() < 0.75)
    draw = run_layer if rng.random() < 0.4 else run_functions
    try:
        run = draw(rng, draw_job(rng), finite)
    except ValueError as error:  # one tile of what is asked for may exceed the scratch limit
        if "scratch limit" not in str(error):
            raise
        counts["refused"] += 1
        return
    kind = rng.random()
    if kind < 0.15:
        in_threads([run, run, run_functions(rng, draw_job(rng), finite)])
        counts["in threads"] += 3
    elif kind < 0.2:
        in_a_child(run)
        counts["in a child"] += 1
    elif kind < 0.35:
        counts["interrupted"] += interrupted(rng, run)
    else:
        run()
    counts["runs"] += 1
    counts["not finite"] += not finite


def resident() -> float:
    """MiB of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def plot(path: Path, minutes: np.ndarray, memory: np.ndarray, runs: np.ndarray, slope: float) -> None:
    """Draw resident memory and runs over time."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(minutes, memory, color="C0")
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, 1.2 * memory.max()))
    axes.set_title(f"Soak: {int(runs[-1]):,} runs, {slope:+.2f} MiB a minute in the second half")
    second = axes.twinx()
    second.plot(minutes, runs, color="C1", linestyle="--")
    second.set_ylabel("runs so far (dashed)")
    second.set_ylim(0, None)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Work until the time is up, or something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the first turn; the next ones count on")
    parser.add_argument("--replay", type=int, metavar="SEED", help="do the turn of one seed only")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over time")
    args = parser.parse_args()
    fftw.set_planning_effort("estimate")  # measuring every size would be most of the time
    counts: Counter = Counter()
    if args.replay is not None:
        turn(args.replay, counts)
        print("right")
        return 0
    start = time.monotonic()
    samples, wrong, seed = [], [], args.seed
    while (elapsed := (time.monotonic() - start) / 60) < args.minutes:
        try:
            turn(seed, counts)
        except Exception as error:
            wrong.append(seed)
            print(f"WRONG, seed {seed}: {error!r}", flush=True)
        seed += 1
        if not samples or elapsed - samples[-1][0] > args.minutes / 600:
            samples.append((elapsed, resident(), counts["runs"]))
    minutes, memory, runs = np.array(samples).T
    late = minutes > minutes[-1] / 2
    slope = float(np.polyfit(minutes[late], memory[late], 1)[0])
    figures = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"{minutes[-1]:.1f} minutes, {seed - args.seed:,} turns ({figures}); wrong: {len(wrong)}")
    print(
        f"resident memory: at most {memory.max():.0f} MiB, {memory[late].mean():.0f} in the second half, "
        f"where it grows by {slope:+.2f} MiB a minute (flat: less than {FLAT})"
    )
    if args.plot:
        plot(args.plot, minutes, memory, runs, slope)
    return 1 if wrong or slope > FLAT else 0


if __name__ == "__main__":
    raise SystemExit(main())
