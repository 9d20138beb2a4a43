"""Whole networks in PyTorch, by PyTorch alone or with their convolutions by this package; or in ONNX.

Engines take turns, each in a process of its own (see `rounds`). In PyTorch there are two of each: of networks and
images as they are, and with channels last. A ratio is the time of the faster of PyTorch's two by the faster of ours.
Batch normalization is folded in all, and outputs have to agree to 1e-5 of the largest value. Trained networks
are on real input, and have to find the same in it: faces, pitches, classes, particles. Their packages are fetched by
pip (see `trained_networks`); a network whose package is not to be had is left out, which is said.

The memory of a process is that after its first calls. What is beyond PyTorch's, of both in the order of memory that
takes less, is to be at most 256 MiB and twice the weights of the convolutions.

With `--training`, steps of stochastic gradient descent with momentum. The losses of the first 50 have to agree to
1e-3, which they can at rates where rounding does not grow; these steps are not timed.

With `--onnx`, the models of `onnx_networks`, by onnxruntime and by this package's session. Programs that they belong to
have to read the same text with it. Some of these networks amplify rounding, so outputs may also differ as much as
onnxruntime's own do if it does not optimize the model.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rounds import Operations, Raced, hold_threads, medians, memory, new_process, race, table

TURN = 0.1  # seconds of one engine's turn, or one call
TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-3
NEAR = 0.01  # pixels by which places of what is found may differ
ROOM = 256  # MiB beyond PyTorch's memory, with twice the weights
OURS, OURS_LAST, FIRST, LAST, RUNTIME = "nbfftconv", "nbfftconv-nhwc", "torch", "torch-nhwc", "onnxruntime"
BY_US, BY_TORCH, CHANNELS_LAST = (OURS, OURS_LAST), (FIRST, LAST), (OURS_LAST, LAST)


class Options(NamedTuple):
    """How networks are computed: threads, whether to convert by races, and steps whose losses are compared."""

    threads: int
    measure: bool
    steps: int


def packaged(name: str) -> Any:
    """Return what there is to know of a network, or a model, out of a package; None of others."""
    import onnx_networks
    import trained_networks

    return (onnx_networks.MODELS | trained_networks.NETWORKS).get(name)  # an export finds nothing


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


def memory_and_weights(model: Any) -> Any:
    """Return the MiB of this process, and of the weights of a network's convolutions."""
    from torch.nn.modules.conv import _ConvNd

    weights = {layer.weight for layer in model.modules() if isinstance(layer, _ConvNd)}
    return np.array([memory("VmRSS"), sum(each.numel() * each.element_size() for each in weights)]) / 2**20


def inference(engine: str, name: str, options: Options) -> Operations:
    """Return what a process of one engine times, and what the network finds."""
    import torch

    torch.set_num_threads(options.threads)
    model, inputs, find = make(name)
    if engine in BY_TORCH:
        model = fold(model)
    if engine in CHANNELS_LAST:
        model, inputs = with_channels_last(model, inputs)
    if engine in BY_US:
        convert(model, inputs, options)

    @torch.inference_mode()
    def run() -> Any:
        return model(*inputs)

    @torch.inference_mode()
    def found() -> Any:
        return find(model)

    operations: Operations = {"forward": run, "memory": lambda: memory_and_weights(model)}
    return operations if find is None or engine in CHANNELS_LAST else operations | {"find": found}


class Compared(NamedTuple):
    """Each engine's median seconds, the difference of outputs or losses, and what else there is to say of a network."""

    seconds: dict[str, float]
    difference: float
    cells: list[str]


def compare_inference(name: str, in_turns: Callable[..., Raced], options: Options) -> Compared:
    """Compare engines; besides, say how much memory ours takes and may take, and how much was found.

    RuntimeError if outputs, or what was found, differ.
    """
    engines = {engine: (inference, (engine, name, options)) for engine in (*BY_US, *BY_TORCH)}
    outputs, times = in_turns(engines, once=("memory", "find"))
    error = max(difference(outputs["forward"][engine], outputs["forward"][FIRST]) for engine in BY_US)
    check_difference(name, error, TOLERANCE)
    ours, theirs = (min(outputs["memory"][engine][0].tolist() for engine in engines) for engines in (BY_US, BY_TORCH))
    memory_cells = [f"{ours[0] - theirs[0]:.0f}", f"{ROOM + 2 * ours[1]:.0f}"]
    return Compared(medians(times["forward"]), error, [*memory_cells, found_by_all(name, outputs.get("find"), FIRST)])


def difference(outputs: tuple[np.ndarray, ...], others: tuple[np.ndarray, ...]) -> float:
    """Return the largest difference of outputs, of the largest value."""
    pairs = zip(outputs, others, strict=True)
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)


def check_difference(name: str, error: float, tolerance: float) -> None:
    """Raise RuntimeError if outputs differ by more than is tolerated."""
    if not error <= tolerance:
        raise RuntimeError(f"outputs of {name} differ by {error:.1e} of the largest value, more than {tolerance:.1e}")


def found_by_all(name: str, found: dict[str, tuple[np.ndarray, ...]] | None, peer: str) -> str:
    """Return of what how much is found; RuntimeError if a peer finds something else."""
    if found is None:
        return ""
    for ours, theirs in zip(found[OURS], found[peer], strict=True):
        if ours.shape != theirs.shape or not np.all(np.abs(ours - theirs) <= NEAR):
            raise RuntimeError(f"{name} finds {ours.tolist()}, by {peer} {theirs.tolist()}")
    return f"{packaged(name).what}: {len(found[OURS][0])}"


def onnx_inference(engine: str, name: str, options: Options) -> Operations:
    """Return what a process of one engine times of an ONNX model, and what a program finds with it."""
    import onnx_networks
    import onnxruntime

    import nbfftconv.onnx

    model, feeds, find = onnx_networks.MODELS[name].make()
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads

    def new_session(path_or_bytes: Any) -> Any:
        if engine == OURS:
            return nbfftconv.onnx.InferenceSession(path_or_bytes, settings, measure=options.measure)
        return onnxruntime.InferenceSession(path_or_bytes, settings, providers=["CPUExecutionProvider"])

    session = new_session(model)
    session.run(None, feeds)  # which may be a race
    operations: Operations = {"forward": lambda: tuple(session.run(None, feeds))}
    if engine == RUNTIME:
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        operations["plain"] = lambda: tuple(onnxruntime.InferenceSession(model, plain).run(None, feeds))
    return operations if find is None else operations | {"find": lambda: find(new_session)}


def compare_onnx(name: str, in_turns: Callable[..., Raced], options: Options) -> Compared:
    """Compare this package's session with onnxruntime; besides, say how much was found."""
    engines = {engine: (onnx_inference, (engine, name, options)) for engine in (OURS, RUNTIME)}
    outputs, times = in_turns(engines, once=("plain", "find"))
    theirs = outputs["forward"][RUNTIME]
    error, own = (difference(each, theirs) for each in (outputs["forward"][OURS], outputs["plain"][RUNTIME]))
    check_difference(name, error, max(TOLERANCE, own))
    return Compared(medians(times["forward"]), error, [f"{own:.0e}", found_by_all(name, outputs.get("find"), RUNTIME)])


def training(engine: str, name: str, options: Options) -> Operations:
    """Return what a process of one engine times, a step, and before that the losses of some."""
    import networks
    import torch

    torch.set_num_threads(options.threads)
    model, x, loss_of, rate = networks.make_lesson(name)
    if engine in CHANNELS_LAST:
        model, (x,) = with_channels_last(model, (x,))
    if engine in BY_US:
        convert(model, (x,), options)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def step() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        return loss.detach()

    def losses() -> Any:
        return torch.stack([step() for _ in range(options.steps)])

    return {"step": step} if engine in CHANNELS_LAST else {"losses": losses, "step": step}


def compare_training(name: str, in_turns: Callable[..., Raced], options: Options) -> Compared:
    """Compare engines by steps; besides, say what the first loss and the last one were.

    RuntimeError if losses differ.
    """
    engines = {engine: (training, (engine, name, options)) for engine in (*BY_US, *BY_TORCH)}
    outputs, times = in_turns(engines, once=("losses",))
    (ours,), (theirs,) = outputs["losses"][OURS], outputs["losses"][FIRST]
    error = float((np.abs(ours - theirs) / np.abs(theirs)).max())
    if not error <= LOSS_TOLERANCE:
        raise RuntimeError(f"losses of {name} differ by {error:.1e}: {ours.tolist()}, by PyTorch {theirs.tolist()}")
    return Compared(medians(times["step"]), error, [f"{ours[0]:.3g} to {ours[-1]:.3g}"])


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
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--training", action="store_true", help="steps of training instead of inference")
    mode.add_argument("--onnx", action="store_true", help="ONNX models, against onnxruntime")
    parser.add_argument("--steps", type=int, default=50, help="steps whose losses are compared (default: 50)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default: 2)")
    parser.add_argument("--processes", type=int, default=1, help="of each engine, one after the other (default: 1)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of each process (default: 15)")
    parser.add_argument("--measure", action="store_true", help="convert by races, not by models of the times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every network")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the time of each layer, of one network only")
    arguments = parser.parse_args()
    hold_threads(arguments.threads)
    import networks
    import onnx_networks
    import trained_networks

    if arguments.training:
        known, compare, same = list(networks.LESSONS), compare_training, ["difference of losses", "loss"]
    elif arguments.onnx:
        known, compare, same = list(onnx_networks.MODELS), compare_onnx, ["difference", "its own", "finds the same"]
    else:
        known, compare = [*networks.NETWORKS, *trained_networks.NETWORKS], compare_inference
        same = ["difference", "MiB more", "allowed", "finds the same"]
    names = arguments.networks or known
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"there is no {unknown[0]}, but {'; '.join(known)}")
    if arguments.plot and (len(names) > 1 or arguments.onnx):
        parser.error("--plot is of one network of PyTorch")
    options = Options(arguments.threads, arguments.measure, arguments.steps)
    in_turns = functools.partial(race, rounds=arguments.rounds, turn=TURN, processes=arguments.processes)

    seconds, rows, ratios = {}, [], []
    for name in names:
        package = getattr(packaged(name), "package", None)
        why = trained_networks.fetch(package) if package else ""
        if why:
            print(f"{name}: left out, {why}", flush=True)
            continue
        found, error, cells = compare(name, in_turns, options)
        seconds[name] = found
        ours, theirs = (min(found[each] for each in found if (each in BY_US) == is_ours) for is_ours in (True, False))
        ratio = theirs / ours
        ratios.append(ratio)
        rows.append([name, *(f"{1e3 * time:.1f}" for time in found.values()), f"{ratio:.2f}", f"{error:.0e}", *cells])
        print(f"{name}: {ratio:.2f}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(seconds, indent=1))
        if arguments.plot:
            with new_process() as process:
                process.submit(draw, name, arguments.training, arguments.plot, options).result()
    if not rows:
        return
    print(table(["network", *(f"{engine}, ms" for engine in found), "ratio", *same], rows))
    print(f"geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}, the worst {min(ratios):.2f}")


if __name__ == "__main__":
    main()
