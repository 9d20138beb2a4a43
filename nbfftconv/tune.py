"""How many threads pay for a user's layers: sweeps the counts of all loops, and of those of a library's transforms.

A layer is a name of the benchmarks, such as k31 or vgg2.2; a JSON file with a list of layers, each
{"input_size": [...], "weight_size": [...]} and, if need be, "name", "stride", "padding", "dilation" and "groups"; or
those sizes and options in the notation

    8x64x112x112,64x64x7x7,padding=3,stride=2x1,groups=1

(batch x channels x height x width, out channels x channels of a group x kernel height x width). Those of a library are
a count of their own only where its transforms are chosen. All is measured in one process; the counts take turns, in
rounds, so that all see the same noise.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nbfftconv import profile, threads
from nbfftconv.grad import conv2d_input, conv2d_weight
from nbfftconv.layer import Conv2d
from nbfftconv.plan import DIRECTIONS, ConvPlan
from nbfftconv.planner import plan_conv2d
from nbfftconv.rounding import cdiv

#: The layers of the benchmarks (perf/layers.py), which are no part of the package.
LAYERS = {
    "cb-L1": "16x3x128x128,96x3x11x11",
    "cb-L2": "16x64x64x64,128x64x9x9",
    "cb-L3": "16x128x32x32,128x128x9x9",
    "cb-L4": "16x128x16x16,128x128x7x7",
    "cb-L5": "16x384x13x13,384x384x3x3",
    "vgg1.2": "1x64x224x224,64x64x3x3,padding=1",
    "vgg2.2": "8x128x112x112,128x128x3x3,padding=1",
    "vgg3.2": "8x256x56x56,256x256x3x3,padding=1",
    "vgg4.2": "8x512x28x28,512x512x3x3,padding=1",
    "vgg4.2-b1": "1x512x28x28,512x512x3x3,padding=1",
    "alex2": "16x64x27x27,192x64x5x5,padding=2",
    "unet": "1x64x512x512,64x64x3x3,padding=1",
    "res7": "8x64x112x112,64x64x7x7,padding=3",
    "k15": "2x32x128x128,32x32x15x15,padding=7",
    "k31": "1x16x128x128,16x16x31x31,padding=15",
    "dw7": "8x96x56x56,96x1x7x7,padding=3,groups=96",
    "dw31": "8x128x56x56,128x1x31x31,padding=15,groups=128",
    "img63": "1x1x2048x2048,1x1x63x63,padding=31",
}
TURN = 0.05  # seconds of one pair of counts, or one call
PAYS = 1.05  # the least gain for which more threads pay
SAME = 1.03  # of total times: the smaller counts are taken
OPTIONS = ("stride", "padding", "dilation", "groups")

Counts = tuple[int, int]  # threads of the loops, of a library's transforms


@dataclass(frozen=True)
class Layer:
    """A user's layer: its name, and the arguments of `plan_conv2d`."""

    name: str
    arguments: dict[str, Any]


@dataclass
class Result:
    """Medians in seconds of one pass of a layer, by counts."""

    name: str
    plan: ConvPlan
    seconds: dict[Counts, float] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The plan in a few words."""
        return self.plan.summary

    def at(self, counts: Counts) -> float:
        """Seconds at any counts; where no library transforms anything, its count means nothing."""
        return self.seconds.get(counts) or self.seconds[counts[0], counts[0]]

    def best_at(self, count: int) -> Counts:
        """The fastest counts with `count` threads at most, `count` of them in the loops."""
        return min((c for c in self.seconds if c[0] == count >= c[1]), key=self.seconds.__getitem__)


def sizes(text: str) -> list[int]:
    """Return the numbers of ``8x64x112x112``."""
    return [int(number) for number in text.split("x")]


def parse_layers(text: str) -> list[Layer]:
    """Return the layers that an argument of the command line stands for; ValueError if there are none."""
    if text in LAYERS:
        return [replace(layer, name=text) for layer in parse_layers(LAYERS[text])]
    if text.endswith(".json"):
        entries = json.loads(Path(text).read_text())
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{text} holds no list of layers")
        return [layer_of(f"{Path(text).stem} {i + 1}", entry) for i, entry in enumerate(entries)]
    input_size, _, rest = text.partition(",")
    weight_size, *options = rest.split(",")
    entry: dict[str, Any] = {"input_size": sizes(input_size), "weight_size": sizes(weight_size)}
    for option in options:
        name, _, value = option.partition("=")
        try:
            numbers = sizes(value)
            entry[name] = numbers[0] if len(numbers) == 1 else numbers
        except ValueError:
            entry[name] = value  # "same"
    return [layer_of(text, entry)]


def layer_of(name: str, entry: dict[str, Any]) -> Layer:
    """Return the layer of an entry of a file, checked."""
    unknown = set(entry) - {"name", "input_size", "weight_size", *OPTIONS}
    if unknown:
        raise ValueError(f"unknown in a layer: {', '.join(sorted(unknown))}")
    layer = Layer(str(entry.get("name", name)), {key: value for key, value in entry.items() if key != "name"})
    plan_conv2d(**layer.arguments)
    return layer


def convolution(layer: Layer, plan: ConvPlan) -> Callable[[], Any]:
    """Return a pass as a user's program calls it: forward by a layer in inference, which keeps its kernels' spectra."""
    rng = np.random.default_rng(3)
    geometry = plan.geometry
    x, weight, g = (
        rng.random(size, dtype=plan.dtype) for size in (geometry.input_size, geometry.weight_size, geometry.output_size)
    )
    options = {name: layer.arguments[name] for name in OPTIONS if name in layer.arguments}
    if plan.direction == "grad_weight":
        return lambda: conv2d_weight(x, weight.shape, g, **options)
    if plan.direction == "grad_input":
        return lambda: conv2d_input(x.shape, weight, g, **options)
    convolve = Conv2d(weight, **options, training=False)
    return lambda: convolve(x)


def seconds_of(function: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sweep(layer: Layer, direction: str, dtype: str, counts: list[int], rounds: int, measure: bool) -> Result:
    """Time a pass of a layer at all counts."""
    kept = direction == "forward"
    plan = plan_conv2d(**layer.arguments, direction=direction, dtype=dtype, weight_is_transformed=kept, measure=measure)
    convolve = convolution(layer, plan)
    convolve()  # compiles
    pairs = itertools.product(counts, counts) if plan.uses_library else zip(counts, counts, strict=True)
    samples: dict[Counts, list[float]] = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for pair, times in samples.items():
            threads.set_num_threads(*pair)
            first = seconds_of(convolve)  # wakes the threads, and does not count
            times += [seconds_of(convolve) for _ in range(1 + min(20, int(TURN / first)))]
    name = layer.name if kept else f"{layer.name} {direction}"
    return Result(name, plan, {pair: statistics.median(times) for pair, times in samples.items()})


def table(results: list[Result]) -> str:
    """Return the table in Markdown."""
    header = ["layer", "plan", "loops", "library", "ms", "speed-up", "efficiency"]
    rows = []
    for result in results:
        for (loops, library), seconds in result.seconds.items():
            speedup = result.seconds[1, 1] / seconds
            used = str(library) if result.plan.uses_library else ""
            figures = [f"{1e3 * seconds:.2f}", f"{speedup:.2f}", f"{speedup / max(loops, library):.0%}"]
            rows.append([result.name, result.chosen, str(loops), used, *figures])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def where_it_stops(result: Result) -> str:
    """Say from where on more threads gain less than 5 %."""
    counts = sorted({loops for loops, _ in result.seconds})
    steps = {count: result.seconds[result.best_at(count)] for count in counts}
    verdict = f"more threads pay up to {counts[-1]}, the most that were measured"
    stop = counts[-1]
    for few, more in itertools.pairwise(counts):
        if steps[few] < PAYS * steps[more]:
            stop = few
            ratio = steps[few] / steps[more]
            verdict = f"more threads stop paying after {few}: {more} are {ratio:.2f} times as fast"
            break
    if result.plan.uses_library and stop > 1:
        fastest = result.seconds[result.best_at(stop)]
        enough = min(
            library for (loops, library), time in result.seconds.items() if loops == stop and time < PAYS * fastest
        )
        verdict += f"; the library needs {enough} of them" if enough < stop else "; for the library as well"
    return f"- {result.name} ({result.chosen}): {verdict}."


def recommend(results: list[Result]) -> tuple[Counts, dict[Counts, float]]:
    """Return the counts to use, and the total time of all layers at each."""
    totals = {pair: sum(result.at(pair) for result in results) for pair in all_counts(results)}
    least = min(totals.values())
    good = [pair for pair, total in totals.items() if total <= SAME * least]
    return min(good, key=lambda pair: (sum(pair), totals[pair])), totals


def all_counts(results: list[Result]) -> Iterator[Counts]:
    """Yield the counts between which there is a choice."""
    yield from max((result.seconds for result in results), key=len)


def draw(results: list[Result], path: Path) -> None:
    """Draw a panel for each result: time against the threads of the loops, a line for each count of the library's."""
    from matplotlib.figure import Figure

    columns = min(4, len(results))
    rows = cdiv(len(results), columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.6 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, result in itertools.zip_longest(panels, results):
        if result is None:
            axes.set_axis_off()
            continue
        counts = sorted({loops for loops, _ in result.seconds})
        ideal = [1e3 * result.seconds[1, 1] / count for count in counts]
        axes.plot(counts, ideal, color="grey", linestyle="--", linewidth=1, label="1 thread's time / threads")
        if result.plan.uses_library:
            for library in counts:
                times = [1e3 * result.seconds[loops, library] for loops in counts]
                axes.plot(counts, times, marker="o", label=f"library on {library}")
            axes.legend(fontsize="x-small")
        else:
            axes.plot(counts, [1e3 * result.seconds[count, count] for count in counts], marker="o", color="black")
        axes.set_title(f"{result.name}\n{result.chosen}", fontsize="small")
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
    figure.supxlabel("threads of the loops")
    figure.supylabel("ms a call")
    figure.savefig(path, dpi=110)


def default_counts(most: int) -> list[int]:
    """All counts up to 4, then two for every factor of 2, and the most."""
    some = {1, 2, 3, 4, *(factor * 2**power for factor in (2, 3) for power in range(1, most.bit_length())), most}
    return sorted(count for count in some if count <= most)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command line."""
    most = threads.available()
    parser.add_argument("layers", nargs="+", metavar="LAYER", help="a name, a JSON file, or sizes: see above")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=["forward"], help="passes to time")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--threads", nargs="+", type=int, default=default_counts(most), help="counts to measure")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--measure", action="store_true", help="measure plans first, and write the winners too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--write", action="store_true", help="write the profile that this machine's processes use")
    place.add_argument("--profile", metavar="FILE", help="write it there, for processes with NBFFTCONV_PROFILE=FILE")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Sweep, report, and write the profile; return the exit code. Arguments that are no good end in `parser.error`."""
    most = threads.available()
    for count in args.threads:
        if not 1 <= count <= most:
            parser.error(f"--threads must be from 1 to {most} here, got {count}")
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.measure and not (args.write or args.profile):
        parser.error("--measure writes winners to a profile: add --write or --profile FILE")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib: pip install "nbfftconv[demo]"')
    if args.profile:
        profile.set_profile_file(args.profile)
    layers = []
    for text in args.layers:
        try:
            layers += parse_layers(text)
        except (OSError, TypeError, ValueError) as error:
            parser.error(f"no layer: {text!r}: {error}")

    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print("OTHER PROCESSES COMPUTE: times at more than 1 thread will mean little", file=sys.stderr)
    counts = sorted({1, *args.threads})
    results = []
    for layer in layers:
        for direction in args.directions:
            threads.set_num_threads(counts[-1])
            results.append(sweep(layer, direction, args.dtype, counts, args.rounds, args.measure))
            print(f"{results[-1].name}: done", file=sys.stderr)

    (loops, library), totals = recommend(results)
    print(table(results))
    print("\n" + "\n".join(map(where_it_stops, results)))
    print(
        f"\nIn all: {loops} thread{'s' * (loops > 1)} for the loops, {library} for a library's transforms: "
        f"{1e3 * totals[loops, library]:.1f} ms for all layers, against {1e3 * totals[1, 1]:.1f} ms on one thread "
        f"and {1e3 * totals[counts[-1], counts[-1]]:.1f} ms on {counts[-1]}."
    )
    if args.plot:
        draw(results, args.plot)
    if args.write or args.profile:
        profile.remember(threads=(loops, library))
        print(f"Written to {profile.profile_file()}: the counts are those of every process from now on.")
    else:
        print(f"Not written; nbfftconv.set_num_threads({loops}, library={library}) sets them in a program.")
    return 0
