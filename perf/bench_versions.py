"""Two checkouts of this package against each other on the layers in layers.py: forward pass, dW, dX and a whole step.

"inference" is the forward pass of a `Conv2d` that keeps its kernels' spectra; the others are as in `bench_training`.
The two take turns, each in a process of its own, and plan by the same figures of the machine. Where memory comes to lie
makes a process up to 4 % faster or slower as long as it lives, so there are several pairs of processes, of which the
one and the other is first. A ratio is the other checkout's median time by that of this one: more than 1 is faster than
before. Turns are short and many: a machine that others use as well is twice as slow for a tenth of a second, then not.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench_training import this_engine
from engines import this_engine as in_inference
from layers import BY_NAME, LAYERS, Layer
from rounds import Operations, difference, hold_threads, medians, race, table

TURN = 0.06  # seconds, or one call
OPERATIONS = ("inference", "forward", "dW", "dX", "step")
HERE = Path(__file__).resolve().parents[1]


def engine(layer: Layer, threads: int, checkout: str, figures: tuple[float, float]) -> Operations:
    """The operations of the package of a checkout."""
    sys.path.insert(0, checkout)
    import nbfftconv
    from nbfftconv.machine import Machine, set_machine

    if not Path(nbfftconv.__file__).is_relative_to(checkout):
        raise RuntimeError(f"nbfftconv was imported from {nbfftconv.__file__}, not from {checkout}")
    set_machine(Machine(*figures))
    operations = this_engine(layer, threads)
    x, w = layer.arrays("float32")
    operations["inference"] = in_inference(layer, x, w, threads)
    return {name: operations[name] for name in OPERATIONS}


def main() -> int:
    """Measure, report, and return 1 if results differ."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("other", type=Path, help="a checkout of another version")
    parser.add_argument("--layers", nargs="+", choices=list(BY_NAME), metavar="NAME", help="these only, of any set")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--processes", type=int, default=2, help="pairs of processes, one after the other")
    parser.add_argument("--rounds", type=int, default=20, help="interleaved rounds of each pair")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    args = parser.parse_args()

    hold_threads(args.threads)
    sys.path.insert(0, str(HERE))
    from nbfftconv.machine import get_machine

    machine = get_machine()
    figures = machine.flops, machine.bandwidth
    checkouts = {"this": str(HERE), "other": str(args.other.resolve())}
    rows, ratios, document, wrong = [], {name: [] for name in OPERATIONS}, {}, []
    for layer in [BY_NAME[name] for name in args.layers] if args.layers else LAYERS:
        engines = {name: (engine, (layer, args.threads, path, figures)) for name, path in checkouts.items()}
        outputs, times = race(engines, args.rounds, turn=TURN, processes=args.processes)
        document[layer.name] = times
        cells = []
        for operation in OPERATIONS:
            seconds = medians(times[operation])
            ratios[operation].append(seconds["other"] / seconds["this"])
            cells += [f"{1e3 * seconds['this']:.2f}", f"{ratios[operation][-1]:.3f}"]
            pairs = zip(outputs[operation]["this"], outputs[operation]["other"], strict=True)
            if max(difference(*pair) for pair in pairs) > 1e-5:
                wrong.append(f"{layer.name} {operation}")
        rows.append([layer.name, *cells])
        print(f"{layer.name}: {' '.join(cells)}", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(document) + "\n")
    header = ["layer", *(f"{text}" for operation in OPERATIONS for text in (f"{operation}, ms", "ratio"))]
    print(table(header, rows))
    for operation, values in ratios.items():
        print(f"{operation}: geometric mean {statistics.geometric_mean(values):.3f}, the worst {min(values):.3f}")
    everything = sum(ratios.values(), [])
    print(f"all: geometric mean {statistics.geometric_mean(everything):.3f}, the worst {min(everything):.3f}")
    if wrong:
        print(f"RESULTS DIFFER: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
