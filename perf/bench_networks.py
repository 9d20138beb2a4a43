"""Whole networks in PyTorch: as they are, with channels last, and with their convolutions by this package.

Batch normalization is folded in all. Engines take turns, each in a process of its own (see `rounds`). A ratio is the
time of the faster of PyTorch's two by ours. Outputs have to agree to 1e-5 of the largest value.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rounds import hold_threads, medians, race, table

TOLERANCE = 1e-5
OURS, FIRST, LAST = "nbfftconv", "torch", "torch-nhwc"
ENGINES = OURS, FIRST, LAST


def operations(engine: str, name: str, threads: int, measure: bool) -> dict[str, Callable[[], Any]]:
    """Return what a process of one engine times."""
    import networks
    import torch
    from torch.fx.experimental.optimization import fuse

    torch.set_num_threads(threads)
    model, x = networks.make(name)
    if engine == OURS:
        import nbfftconv
        import nbfftconv.torch as nt

        nbfftconv.set_num_threads(threads)
        with torch.inference_mode():
            nt.convert(model, (x,), measure=measure)
    else:
        model = fuse(model)
    if engine == LAST:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run() -> Any:
        return model(x)

    return {"forward": run}


def compare(name: str, threads: int, rounds: int, measure: bool) -> dict[str, float]:
    """Return the median seconds of each engine; RuntimeError if their outputs differ."""
    engines = {engine: (operations, (engine, name, threads, measure)) for engine in ENGINES}
    outputs, times = race(engines, rounds)
    ours, theirs = (outputs["forward"][engine][0] for engine in (OURS, FIRST))
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not error <= TOLERANCE:
        raise RuntimeError(f"outputs of {name} differ by {error:.1e} of the largest value")
    return medians(times["forward"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--measure", action="store_true", help="convert by races, not by models of the times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every network")
    arguments = parser.parse_args()
    hold_threads(arguments.threads)
    import networks

    seconds, rows = {}, []
    for name in arguments.networks or networks.NETWORKS:
        found = seconds[name] = compare(name, arguments.threads, arguments.rounds, arguments.measure)
        ratio = min(found[FIRST], found[LAST]) / found[OURS]
        rows.append([name, *(f"{1e3 * found[engine]:.1f}" for engine in ENGINES), f"{ratio:.2f}"])
        print(f"{name}: {ratio:.2f}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(seconds, indent=1))
    ratios = [float(row[-1]) for row in rows]
    print(table(["network", *(f"{engine}, ms" for engine in ENGINES), "ratio"], rows))
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}, the worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
