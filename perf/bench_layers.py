"""Forward passes of the layers in layers.py: this engine against PyTorch, ONNX Runtime, SciPy and others.

The kernels' spectra are cached, as a `Conv2d` layer keeps them. Engines take turns, each in a process of its own (see
`rounds`). A ratio is the median time of the fastest peer by that of this engine; where others than PyTorch, ONNX
Runtime and SciPy take part, there is also that of the faster of the first two. PyTorch and this engine take arrays in
both orders, NCHW and NHWC: where PyTorch is asked for in both, so is this engine, and each is compared in its faster
one; other peers are compared with this engine in NCHW. SciPy takes part on the layer with one
channel; "-" stands for an engine that does not.

Peers take part as far as their packages are installed: torch==2.13.0, onnxruntime==1.32.0 with onnx, scipy; with
`--peers all` also torch on arrays in NHWC order, openvino==2026.4.1 and MNN==3.6.1, both with onnx, and
ncnn==1.0.20261020. engines.py has their settings. Outputs have to agree to 1e-5 in float32, those of MNN, in whose
Winograd's algorithm more is lost, to 1e-3.

Then, in another process, the time of each stage of this engine. Its roofline is the larger of two times: its operations
at the rate of NumPy's matrix product, and the arrays that it reads or writes, once each, at the rate of copying, both
the best of the run; spectra of tiles count as cached. A complex multiply-add is 8 operations, a transform of N samples
2.5·N·log2(N).

Environment variables reach all engines. To hold them to AVX2: NUMBA_CPU_NAME=haswell ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2 OPENBLAS_CORETYPE=Haswell. ONNX Runtime, OpenVINO, ncnn and MNN have no such switch, or not for
all of their code: leave them out with --peers.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from engines import ENGINES, OURS, OURS_LAST, REQUIRES, Convolution, this_engine
from layers import BY_NAME, KINDS, SETS, Layer
from rounds import TURN, difference, digits, hold_threads, medians, new_process, race, seconds_of, table
from stages import clock_stages

USUAL = ("torch", "onnxruntime")
PEERS = (*USUAL, "scipy")  # if none are asked for
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}  # of the difference between two engines, in the 2-norm
LOOSE = {"mnn": 1e-3}  # tolerance of a peer that is less exact: its Winograd's algorithm on tiles of 8x8
BOTH_ORDERS = DOUBLE = ("torch", "torch-nhwc")  # peers in float64, and with arrays in two orders
#: Stages that do the same in another way.
SAME = {"split_product.split_product": "accumulate.product", "split_dense.split_dense_forward": "dense.dense_forward"}
HELD_BY = ("NUMBA_CPU_NAME", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE")


def operations(engine: str, layer: Layer, dtype: str, threads: int) -> dict[str, Convolution]:
    """Return what a process of one engine times."""
    return {"forward": ENGINES[engine](layer, *layer.arrays(dtype), threads)}


def measure_stages(layer: Layer, dtype: str, threads: int) -> dict[str, Any]:
    """Return the plan, seconds, operations and bytes of each stage of this engine, and the machine's rates now."""
    from nbfftconv import planner
    from nbfftconv.geometry import ConvGeometry, TransposedGeometry

    call_seconds = clock_stages()
    convolve = this_engine(layer, *layer.arrays(dtype), threads)
    calls = 3 + min(20, int(TURN / seconds_of(convolve)))
    samples = defaultdict(list)
    for _ in range(calls):
        call_seconds.clear()
        whole = seconds_of(convolve)
        rest = whole - sum(call_seconds.values())
        for name, seconds in {**call_seconds, "outside the stages": rest, "whole call": whole}.items():
            samples[name].append(seconds)

    sizes, axes = (layer.input_size, layer.weight_size), len(layer.space)
    numbers = {"stride": layer.stride, "padding": layer.pads, "dilation": layer.dilation, "groups": layer.groups}
    if layer.is_transposed:
        of_input = TransposedGeometry.from_arguments(*sizes, **numbers, output_padding=0, axes=axes).convolution
        direction, geometry = "grad_input", of_input.of_images
    else:
        direction, geometry = "forward", ConvGeometry.from_arguments(*sizes, **numbers, axes=axes).of_images
    plan = planner.make_plan(geometry, direction, np.dtype(dtype), weight_is_transformed=True)
    work = stage_work(plan.run_as) if plan.run_as.direction == "forward" else {}
    if work:
        work["whole call"] = tuple(map(sum, zip(*work.values(), strict=True)))
    stages = {
        name: dict(
            zip(
                ("seconds", "flops", "bytes"),
                (statistics.median(times), *work.get(SAME.get(name, name), (0, 0))),
                strict=True,
            )
        )
        for name, times in samples.items()
    }
    return {"plan": plan.summary, "stages": stages, "machine": measure_machine(dtype, threads)}


def stage_work(plan: Any) -> dict[str, tuple[float, ...]]:
    """Return operations, and bytes to or from memory, by stage of a forward pass."""
    from nbfftconv.transforms import registry

    geometry, itemsize = plan.geometry, plan.dtype.itemsize
    read, written = (itemsize * math.prod(size) for size in (geometry.input_size, geometry.output_size))
    if plan.algorithm == "direct":
        stage = "depthwise.depthwise_forward" if geometry.groups > 1 else "dense.dense_forward"
        return {stage: (2 * geometry.multiply_adds, read + plan.weight_bytes + written)}
    (height, width), tiles = plan.tile, plan.grid.tiles
    depth, filters = geometry.input_size[1] * plan.grid.channel_phases, geometry.weight_size[0]
    transform = 2.5 * height * width * math.log2(height * width) * tiles
    layout = registry.get(plan.transform).layout(plan.dtype.type, height, width)
    frequencies = layout.bins if layout.lanes > 1 else height * (width // 2 + 1)  # else vectors of them
    product = 2 * layout.vectors**2 * frequencies * tiles * filters * depth / geometry.groups
    stages = {
        "to_spectra.to_spectra": (transform * depth, read),
        "accumulate.product": (product, plan.weight_bytes),
        "from_spectra.from_spectra": (transform * filters, written),
    }
    return {"forward.input_to_output": tuple(map(sum, zip(*stages.values(), strict=True)))} if plan.fused else stages


def measure_machine(dtype: str, threads: int) -> dict[str, float]:
    """Return the rates, a second, of NumPy's matrix product and of copying large arrays."""
    side, items = 2048, 2**25
    a = np.ones((side, side), dtype)
    flops = 2 * side**3 / min(seconds_of(lambda: a @ a) for _ in range(3))
    pairs = [(np.ones(items, np.float32), np.zeros(items, np.float32)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))

        bandwidth = 8 * items * threads / min(seconds_of(copy_all) for _ in range(3))
    return {"flops": flops, "bandwidth": bandwidth}


def engines_for(layer: Layer, engines: list[str]) -> list[str]:
    """Return the engines that take part on a layer."""
    axes = len(layer.space)
    is_of_images = axes == 2 and not layer.is_transposed
    takes_part = {
        "scipy": layer.channels == layer.filters == 1 and not layer.is_transposed,
        **dict.fromkeys(("torch-nhwc", OURS_LAST), axes > 1),
        "torch-fft": axes == 1 and not layer.is_transposed,
        **dict.fromkeys(("openvino", "ncnn", "mnn"), is_of_images),
    }
    return [name for name in engines if takes_part.get(name, True)]


def compare(layer: Layer, engines: list[str], dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """Time the engines on a layer in interleaved rounds, compare their outputs, and time this engine's stages."""
    arguments = {name: (operations, (name, layer, dtype, threads)) for name in engines}
    outputs, times = (of_operation["forward"] for of_operation in race(arguments, rounds))
    with new_process() as process:
        profile = process.submit(measure_stages, layer, dtype, threads).result()
    seconds = medians(times)
    (ours,) = outputs.pop(OURS)
    differences = {name: difference(ours, output) for name, (output,) in outputs.items()}
    ratios = ratios_of(seconds)
    peer = min(ratios, key=ratios.__getitem__)
    usual = [seconds[name] for name in outputs if name in USUAL]
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "threads": threads,
        "seconds": seconds,
        "samples": times,
        "differences": differences,
        "outputs_agree": all(value <= LOOSE.get(name, TOLERANCE[dtype]) for name, value in differences.items()),
        "fastest_peer": peer,
        "ratio": ratios[peer],
        "usual_ratio": min(usual) / seconds[OURS] if usual else None,
        **profile,
    }


def ratios_of(seconds: dict[str, float]) -> dict[str, float]:
    """Return each peer's time by this engine's; of those that take arrays in two orders, the faster one's."""
    ratios = {name: time / seconds[OURS] for name, time in seconds.items() if name not in (OURS, OURS_LAST)}
    if OURS_LAST in seconds:
        theirs = min((name for name in BOTH_ORDERS if name in seconds), key=seconds.__getitem__)
        ratio = seconds[theirs] / min(seconds[OURS], seconds[OURS_LAST])
        ratios = {name: each for name, each in ratios.items() if name not in BOTH_ORDERS} | {theirs: ratio}
    return ratios


def kinds_of_ratio(engines: list[str]) -> dict[str, str]:
    """Return the keys of the ratios to show, and what to call them."""
    usual = [name for name in engines if name in USUAL]
    others = set(engines) - {OURS, OURS_LAST, *PEERS}
    return {"ratio": "ratio", **({"usual_ratio": f"ratio to {', '.join(usual)}"} if usual and others else {})}


def ratio_table(results: list[dict], engines: list[str]) -> str:
    """Return the table of times and ratios."""
    ratios = kinds_of_ratio(engines)
    header = ["layer", "batch, channels, image, kernel, padding", "GFLOP direct", *(f"{name}, ms" for name in engines)]
    rows = []
    for row in results:
        layer = BY_NAME[row["layer"]]
        times = [digits(1e3 * row["seconds"][name], 1) if name in row["seconds"] else "-" for name in engines]
        figures = [*(f"{row[key]:.2f}" for key in ratios), row["plan"], f"{max(row['differences'].values()):.0e}"]
        rows.append([layer.name, str(layer), digits(layer.flops / 1e9, 2), *times, *figures])
    return table([*header, *ratios.values(), "plan", "difference"], rows)


def mean_and_worst(results: list[dict], key: str, name: str) -> str:
    """Return a sentence on the ratios of a kind."""
    ratios = {row["layer"]: row[key] for row in results}
    worst = min(ratios, key=ratios.__getitem__)
    mean, names = statistics.geometric_mean(ratios.values()), name.replace("ratio", "ratios")
    return f"Geometric mean of the {len(ratios)} {names} {mean:.2f}; the worst {ratios[worst]:.2f}, on {worst}.\n"


def largest_differences(results: list[dict], engines: list[str]) -> str:
    """Return a sentence on how far each peer's outputs are from this engine's."""
    of_peers = {name: [row["differences"][name] for row in results if name in row["differences"]] for name in engines}
    largest = [f"{name} {max(values):.0e}" for name, values in of_peers.items() if values]
    return f"Largest differences: {', '.join(largest)}.\n"


def kind_table(results: list[dict]) -> str:
    """Return the table of mean ratios by kind of layer."""
    rows = []
    for kind, goal in KINDS.items():
        of_kind = [row for row in results if row["kind"] == kind]
        if of_kind:
            mean = statistics.geometric_mean(row["ratio"] for row in of_kind)
            names = ", ".join(row["layer"] for row in of_kind)
            rows.append([kind, names, f"{mean:.2f}", "" if goal is None else str(goal)])
    return table(["kind", "layers", "mean ratio", "aim"], rows)


def stage_table(results: list[dict], machine: dict[str, float]) -> str:
    """Return the table of stages."""
    rows = []
    for row in results:
        for name, stage in row["stages"].items():
            seconds, flops = stage["seconds"], stage["flops"]
            share = f"{seconds / row['stages']['whole call']['seconds']:.0%}"
            roofline = max(flops / machine["flops"], stage["bytes"] / machine["bandwidth"])
            rate = flops / seconds
            figures = [f"{rate / 1e9:.1f}", f"{rate / machine['flops']:.0%}", f"{roofline / seconds:.0%}"]
            rows.append([row["layer"], name, digits(1e3 * seconds, 2), share, *(figures if flops else [""] * 3)])
    return table(["layer", "stage", "ms", "of the call", "GFLOP/s", "of peak", "of roofline"], rows)


def report(document: dict[str, Any], engines: list[str]) -> str:
    """Return all tables and summaries, in Markdown."""
    parts = []
    for threads in document["threads"]:
        results = [row for row in document["results"] if row["threads"] == threads]
        machine = {name: max(row["machine"][name] for row in results) for name in ("flops", "bandwidth")}
        parts += [
            f"### {document['dtype']}, {threads} thread{'s' if threads > 1 else ''}\n",
            ratio_table(results, engines),
            *(mean_and_worst(results, *kind) for kind in kinds_of_ratio(engines).items()),
            largest_differences(results, engines),
            kind_table(results),
            f"Stages; at best a matrix product runs at {machine['flops'] / 1e9:.0f} GFLOP/s, and a copy moves "
            f"{machine['bandwidth'] / 1e9:.1f} GB/s.\n",
            stage_table(results, machine),
        ]
    return "\n".join(parts)


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw the ratios, a bar for each layer and number of threads."""
    from matplotlib.figure import Figure

    counts = document["threads"]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, threads in enumerate(counts):
        results = [row for row in document["results"] if row["threads"] == threads]
        left = np.arange(len(results)) + 0.8 * (index - (len(counts) - 1) / 2) / len(counts)
        label = f"{threads} thread{'s' if threads > 1 else ''}"
        axes.bar(left, [row["ratio"] - 1 for row in results], 0.8 / len(counts), bottom=1, label=label)
        axes.set_xticks(np.arange(len(results)), [row["layer"] for row in results], rotation=45, ha="right")
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel(f"time of the fastest peer / {OURS}'s, {document['dtype']}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measure, report, and return 1 if two engines' outputs differ."""
    peers = [name for name in ENGINES if name not in (OURS, OURS_LAST)]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--set", choices=list(SETS), default="layers", help="which layers")
    parser.add_argument("--layers", nargs="+", choices=list(BY_NAME), metavar="NAME", help="these only, of any set")
    parser.add_argument("--peers", nargs="+", choices=[*peers, "all"], default=list(PEERS), help="these peers only")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="threads of each engine")
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="float64: against torch alone")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every layer")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios")
    args = parser.parse_args()

    asked = peers if "all" in args.peers else args.peers
    candidates = [name for name in asked if args.dtype == "float32" or name in DOUBLE]
    missing = {name: [m for m in REQUIRES[name] if not importlib.util.find_spec(m)] for name in candidates}
    for name in filter(missing.get, candidates):
        print(f"WITHOUT {name}: not installed: {', '.join(missing[name])}", file=sys.stderr)
    engines = [OURS, *(name for name in candidates if not missing[name])]
    if "torch-nhwc" in engines:
        engines.insert(1, OURS_LAST)
    named = [layer for layer in BY_NAME.values() if layer.name in (args.layers or [])]
    layers = named or SETS[args.set]
    if any(len(engines_for(layer, engines)) < 2 for layer in layers):
        parser.error("a layer is left without peers")

    if os.getloadavg()[0] > 0.5:
        print("OTHER PROCESSES COMPUTE: ratios at more than 1 thread will mean little", file=sys.stderr)
    packages = [*(REQUIRES[name][0] for name in engines if name in REQUIRES), "numpy", "numba", "pyfftw"]
    document: dict[str, Any] = {
        "dtype": args.dtype,
        "rounds": args.rounds,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "environment": {name: os.environ[name] for name in HELD_BY if name in os.environ},
        "load_before": os.getloadavg()[0],
        "threads": list(dict.fromkeys(args.threads)),
        "results": [],
    }
    for threads in document["threads"]:
        hold_threads(threads)
        for layer in layers:
            row = compare(layer, engines_for(layer, engines), args.dtype, threads, args.rounds)
            document["results"].append(row)
            print(f"{threads} threads, {layer.name}: {row['ratio']:.2f}, by {row['plan']}", file=sys.stderr)
            if args.json:
                args.json.write_text(json.dumps(document, indent=1) + "\n")

    text = report(document, engines)
    wrong = [row["layer"] for row in document["results"] if not row["outputs_agree"]]
    print(text + (f"\nOUTPUTS DIFFER on {', '.join(wrong)}." if wrong else "\nAll outputs agree."))
    if args.markdown:
        args.markdown.write_text(text)
    if args.plot:
        draw(document, args.plot)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
