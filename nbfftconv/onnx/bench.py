"""Races a model of your own: onnxruntime alone against both engines, on random inputs.

Of every convolution it says what it takes in the network by onnxruntime and here, and who is to compute it; of the
network, what it takes before and after, how far outputs differ, and how much memory either way keeps.
"""

import argparse
import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from nbfftconv import profile, tables, threads
from nbfftconv.onnx.choice import Progress
from nbfftconv.onnx.options import ERRORS, PROVIDERS, Options
from nbfftconv.onnx.report import Report
from nbfftconv.onnx.session import InferenceSession, dtype_of

#: Seed of the inputs.
_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command line."""
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="SIZES",
        help="sizes of the first input, such as 1,3,224,224, or of one by its name, NAME=1,3,224,224; may be repeated",
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="COUNT", help="threads of both engines; more than one count: all"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the time of each convolution")
    parser.add_argument(
        "--write", action="store_true", help="race the plans of each convolution first, and keep winners in the profile"
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Race, report, draw; return the exit code. Arguments that are no good end in `parser.error`."""
    counts = args.threads or [threads.get_num_threads()]
    for count in counts:
        if count < 1:
            parser.error(f"--threads must be at least 1, got {count}")
    needed = {"rich": ("a bar", "onnx"), **({"matplotlib": ("--plot", "demo")} if args.plot else {})}
    for module, (what, extra) in needed.items():
        if importlib.util.find_spec(module) is None:
            parser.error(f'{what} needs {module}: pip install "nbfftconv[{extra}]"')
    reports = {}
    try:
        for count in counts:
            reports[count] = _race(args, count, parser.error)
    except ERRORS as error:
        print(f"nbfftconv: error: {error}", file=sys.stderr)
        return 1
    if args.plot:
        draw(reports, args.plot)
    if args.write:
        print(f"Plans are written to {profile.profile_file()}, for every process from now on.")
    return 0


def _race(args: argparse.Namespace, count: int, refuse: Callable[[str], Any]) -> Report:
    """Race with so many threads, and print what was found."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    options = Options(settings, count)
    begin = _resident()
    plain = onnxruntime.InferenceSession(args.model, options.plain(), providers=PROVIDERS)
    try:
        feeds = random_inputs(plain.get_inputs(), args.shape)
    except ValueError as error:
        refuse(str(error))
    expected = plain.run(None, feeds)
    alone = _resident() - begin
    del plain
    gc.collect()
    begin = _resident()
    session = InferenceSession(args.model, settings, measure=True, threads=count)
    with _bar() as progress:
        session._decide(feeds, progress, writes_plans=args.write)
    found = session.run(None, feeds)
    gc.collect()
    together = _resident() - begin
    report = session.report
    print(f"{args.model}, {count} thread{'s' * (count > 1)}")
    print(f"{report}\n")
    rows = [
        ("a run, ms", tables.milliseconds(report.host), tables.milliseconds(report.ours)),
        ("memory, MiB; now, with machine code", f"{alone / 2**20:.0f}", f"{together / 2**20:.0f}"),
        ("largest difference, of the largest value", "", f"{largest_difference(found, expected):.1e}"),
    ]
    print(tables.as_text(("", "onnxruntime", "now"), rows), flush=True)
    return report


def random_inputs(arguments: Any, shapes: list[str]) -> dict[str, np.ndarray]:
    """Return inputs for what onnxruntime says of them: random numbers, zeros of integers; ValueError if sizes miss."""
    names = [each.name for each in arguments]
    given: dict[str, tuple[int, ...]] = {}
    for text in shapes:
        name, _, sizes = text.rpartition("=")
        name = name or names[0]
        if name not in names:
            raise ValueError(f"--shape {text}: there is no input {name!r}, but {', '.join(names)}")
        try:
            given[name] = tuple(map(int, sizes.split(",")))
        except ValueError:
            raise ValueError(f"--shape {text}: sizes must be integers with commas between them") from None
    rng = np.random.default_rng(_SEED)
    feeds = {}
    for each in arguments:
        shape, dtype = given.get(each.name, tuple(each.shape)), dtype_of(each.type)
        if not all(isinstance(size, int) for size in shape):
            raise ValueError(f"input {each.name} is {each.shape}: give its sizes, --shape {each.name}=...")
        if dtype is None or dtype.kind not in "fiub":
            raise ValueError(f"input {each.name} is a {each.type}, for which there are no random values")
        is_real = dtype.kind == "f"
        feeds[each.name] = rng.standard_normal(shape).astype(dtype) if is_real else np.zeros(shape, dtype)
    return feeds


def largest_difference(found: list[Any], expected: list[Any]) -> float:
    """Return the largest difference of outputs, each by its largest value; NaN where one has none of the other's."""
    differences = [0.0]
    for a, b in zip(found, expected, strict=True):
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size:
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            with np.errstate(invalid="ignore"):
                difference = np.where(same, 0, np.abs(a - b)).max()
            differences.append(float(difference / np.abs(b[np.isfinite(b)]).max(initial=np.finfo(b.dtype).tiny)))
    return float(np.max(differences))


def draw(reports: dict[int, Report], path: Path) -> None:
    """Draw bars for each convolution, those of a count of threads side by side."""
    from matplotlib.figure import Figure

    most = max(len(report.choices) for report in reports.values())
    figure = Figure(figsize=(6 * len(reports) + 2, max(3.0, 0.3 * most + 1.5)), layout="constrained")
    panels = figure.subplots(1, len(reports), squeeze=False).flat
    for axes, (count, report) in zip(panels, reports.items(), strict=True):
        places = np.arange(len(report.choices))
        for shift, label, field in ((-0.2, "onnxruntime", "host"), (0.2, "nbfftconv", "ours")):
            times = [1e3 * getattr(each, field) for each in report.choices.values()]
            axes.barh(places + shift, times, 0.4, label=label)
        names = [f"{name}{' *' * each.is_replaced}" for name, each in report.choices.items()]
        axes.set_yticks(places, names, fontsize="x-small")
        axes.invert_yaxis()
        axes.set_xlabel("ms in the network; *: computed by nbfftconv")
        axes.set_title(f"{count} thread{'s' * (count > 1)}")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


@contextmanager
def _bar() -> Iterator[Progress]:
    """Show a bar on the error stream; it is gone at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda doing, part: progress.update(task, description=doing, completed=part)


def _resident() -> float:
    """Return the bytes that the process has in memory, files that it maps left out; NaN where that cannot be told."""
    try:
        text = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return float("nan")
    return (int(text[1]) - int(text[2])) * os.sysconf("SC_PAGE_SIZE")
