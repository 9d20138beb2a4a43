"""Training on the layers in layers.py: forward pass, dW, dX and a whole step, this engine against PyTorch.

A step is the forward pass and both gradients with new weights, by `Conv2d` here and by autograd there; the passes alone
are `conv2d`, `conv2d_weight` and `conv2d_input`, which share nothing, and autograd's with one gradient wanted. Engines
take turns, each in a process of its own (see `rounds`). A ratio is PyTorch's median time by that of this engine;
`shared` is the time of a step by that of its three passes called apart, one after the other.

Then a small CNN is trained for one epoch in both, from the same weights on the same batches of seeded images.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from layers import LAYERS, Layer
from rounds import Operations, difference, hold_threads, medians, new_process, race, table

OURS, PEER = "nbfftconv", "torch"
PASSES = ("forward", "dW", "dX")
TOLERANCE = 1e-5  # of the difference of two results, in the 2-norm
LOSS_TOLERANCE = 1e-2  # of the difference of the losses of a batch, after up to an epoch of rounding
STEPS = [  # layers whose steps are compared with their passes called apart
    Layer("5x5", "", 8, 64, 64, 56, 5, 2),
    Layer("3x3", "", 8, 128, 128, 56, 3, 1),
    Layer("9x9", "", 16, 64, 128, 64, 9, 4),
    Layer("7x7", "", 8, 64, 64, 64, 7, 3),
]
IMAGES, BATCH, RATE, CLASSES = 2000, 50, 0.01, 10  # of the small CNN


def gradient_like(output: np.ndarray) -> np.ndarray:
    """Return the gradient at an output that all engines are given."""
    return np.random.default_rng(4).standard_normal(output.shape, dtype=np.float32)


def this_engine(layer: Layer, threads: int) -> Operations:
    """The functions, and a `Conv2d` layer in training."""
    import nbfftconv  # each engine is imported by its own process only

    nbfftconv.set_num_threads(threads)
    x, w = layer.arrays("float32")
    options = {"padding": layer.padding, "groups": layer.groups}
    convolution = nbfftconv.Conv2d(w, **options)
    g = gradient_like(convolution(x))
    weights = itertools.cycle([w, w.copy()])

    def step() -> tuple[np.ndarray, ...]:
        convolution.weight = next(weights)
        return convolution(x), convolution.backward(g), convolution.weight_grad

    passes = {
        "forward": lambda: nbfftconv.conv2d(x, w, **options),
        "dW": lambda: nbfftconv.conv2d_weight(x, w.shape, g, **options),
        "dX": lambda: nbfftconv.conv2d_input(x.shape, w, g, **options),
    }
    return {**passes, "step": step, "apart": lambda: tuple(run() for run in passes.values())}


def pytorch(layer: Layer, threads: int) -> Operations:
    """Autograd."""
    import torch

    torch.set_num_threads(threads)
    x, w = map(torch.from_numpy, layer.arrays("float32"))
    renewed = w.clone().requires_grad_()

    def convolve(x: Any, w: Any) -> Any:
        return torch.nn.functional.conv2d(x, w, padding=layer.padding, groups=layer.groups)

    x_wanted, w_wanted = x.clone().requires_grad_(), w.clone().requires_grad_()
    of_w, of_x = convolve(x, w_wanted), convolve(x_wanted, w)
    g = torch.from_numpy(gradient_like(of_w.detach().numpy()))

    def step() -> tuple[Any, ...]:
        with torch.no_grad():
            renewed.copy_(w)
        y = convolve(x_wanted, renewed)
        return y.detach(), *torch.autograd.grad(y, (x_wanted, renewed), g)

    return {
        "forward": lambda: convolve(x, w_wanted).detach(),
        "dW": lambda: torch.autograd.grad(of_w, w_wanted, g, retain_graph=True),
        "dX": lambda: torch.autograd.grad(of_x, x_wanted, g, retain_graph=True),
        "step": step,
    }


ENGINES = {OURS: this_engine, PEER: pytorch}


def compare(layer: Layer, engines: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Time the engines on a layer in interleaved rounds, and compare their results."""
    outputs, times = race({name: (ENGINES[name], (layer, threads)) for name in engines}, rounds)
    seconds = {operation: medians(samples) for operation, samples in times.items()}
    differences = {}
    for operation, results in outputs.items():
        for other in results.keys() - {OURS}:
            pairs = zip(results[OURS], results[other], strict=True)
            differences[operation] = max(difference(ours, theirs) for ours, theirs in pairs)
    return {
        "layer": layer.name,
        "threads": threads,
        "seconds": seconds,
        "samples": times,
        "differences": differences,
        "ratios": {name: each[PEER] / each[OURS] for name, each in seconds.items() if PEER in each},
        "shared": seconds["step"][OURS] / seconds["apart"][OURS],
    }


def images() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return seeded images (n, 3, 32, 32) of coarse patterns, their classes, and the weights to begin with."""
    rng = np.random.default_rng(5)
    labels = rng.integers(CLASSES, size=IMAGES)
    patterns = rng.standard_normal((CLASSES, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    noisy = patterns[labels] + rng.standard_normal((IMAGES, 3, 32, 32))
    shapes = [(64, 3, 7, 7), (64, 64, 7, 7), (CLASSES, 64 * 8 * 8)]
    weights = [rng.standard_normal(shape) * np.sqrt(0.3 / np.prod(shape[1:])) for shape in shapes]
    return noisy.astype(np.float32), labels, [weight.astype(np.float32) for weight in weights]


def train_here(threads: int) -> Operations:
    """The CNN of `train_pytorch` with this engine's layers; the rest is the demo's plain NumPy."""
    import nbfftconv
    from nbfftconv.demo.network import Dense, MaxPool2d, softmax_cross_entropy

    nbfftconv.set_num_threads(threads)
    x, labels, (w1, w2, w3) = images()

    def epoch() -> np.ndarray:
        weighted = [
            *(nbfftconv.Conv2d(w, np.zeros(64, np.float32), padding=3, activation="relu") for w in (w1, w2)),
            Dense(w3, np.zeros(CLASSES, np.float32)),
        ]
        layers = [weighted[0], MaxPool2d(), weighted[1], MaxPool2d(), weighted[2]]
        losses = []
        for batch in np.split(np.arange(IMAGES), IMAGES // BATCH):
            values = x[batch]
            for layer in layers:
                values = layer(values)
            loss, gradient = softmax_cross_entropy(values, labels[batch])
            for layer in reversed(layers):
                gradient = layer.backward(gradient)
            for layer in weighted:
                layer.weight = layer.weight - np.float32(RATE) * layer.weight_grad
                layer.bias = layer.bias - np.float32(RATE) * layer.bias_grad
            losses.append(loss)
        return np.array(losses)

    return {"epoch": epoch}


def train_pytorch(threads: int) -> Operations:
    """Two 7×7 convolutions, ReLU and 2×2 max pooling after each, and a dense layer; gradient descent."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    x, labels, weights = images()
    x, labels = torch.from_numpy(x), torch.from_numpy(labels)

    def epoch() -> np.ndarray:
        w1, w2, w3 = (torch.tensor(weight, requires_grad=True) for weight in weights)
        b1, b2, b3 = (torch.zeros(size, requires_grad=True) for size in (64, 64, CLASSES))
        optimizer = torch.optim.SGD([w1, w2, w3, b1, b2, b3], lr=RATE)
        losses = []
        for begin in range(0, IMAGES, BATCH):
            values = x[begin : begin + BATCH]
            for w, b in ((w1, b1), (w2, b2)):
                values = F.max_pool2d(F.relu(F.conv2d(values, w, b, padding=3)), 2)
            loss = F.cross_entropy(F.linear(values.flatten(1), w3, b3), labels[begin : begin + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return np.array(losses)

    return {"epoch": epoch}


def compare_epochs(engines: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Train the small CNN in each engine."""
    makers = {OURS: train_here, PEER: train_pytorch}
    outputs, times = race({name: (makers[name], (threads,)) for name in engines}, rounds)
    losses = {name: output for name, (output,) in outputs["epoch"].items()}
    return {
        "seconds": medians(times["epoch"]),
        "losses": {name: values.tolist() for name, values in losses.items()},
        "difference": max(float(np.abs(values - losses[OURS]).max()) for values in losses.values()),
    }


def peak_memory(engine: str, layer: Layer, threads: int) -> tuple[int, int]:
    """Return the memory of this process, in bytes, before an engine is imported, and its peak in three steps."""
    before = _memory("VmRSS")
    step = ENGINES[engine](layer, threads)["step"]
    for _ in range(3):
        step()
    return before, _memory("VmHWM")


def _memory(name: str) -> int:
    """Return a figure of Linux about this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def report(document: dict[str, Any]) -> str:
    """Return the tables and summaries, in Markdown."""
    layers = {layer.name: layer for layer in [*LAYERS, *STEPS]}
    rows, shared_rows, ratios = [], [], {name: [] for name in (*PASSES, "step")}
    for row in document["results"]:
        cells = []
        for operation in ratios:
            seconds = row["seconds"][operation]
            cells += [f"{1e3 * seconds[name]:.1f}" if name in seconds else "" for name in (OURS, PEER)]
            ratio = row["ratios"].get(operation)
            cells.append("" if ratio is None else f"{ratio:.2f}")
            if ratio is not None and row["layer"] in {layer.name for layer in LAYERS}:
                ratios[operation].append(ratio)
        cells.append(f"{row['shared']:.2f}")
        rows.append([row["layer"], str(layers[row["layer"]]), *cells])
        if row["layer"] in {layer.name for layer in STEPS}:
            shared_rows.append(row["shared"])
    header = ["layer", "batch, channels, image, kernel, padding"]
    for operation in ratios:
        header += [f"{operation}, ms", "torch, ms", "ratio"]
    parts = [table([*header, "shared"], rows)]
    gradients = ratios["dW"] + ratios["dX"]
    if gradients:
        parts.append(
            f"Against {PEER}: dW and dX {statistics.geometric_mean(gradients):.2f} in the mean of {len(gradients)}, "
            f"the worst {min(gradients):.2f}; a step {statistics.geometric_mean(ratios['step']):.2f}, the worst "
            f"{min(ratios['step']):.2f}.\n"
        )
    if shared_rows:
        parts.append(
            f"A step by its passes called apart, median of {len(shared_rows)}: {np.median(shared_rows):.2f}.\n"
        )
    if "epoch" in document:
        epoch = document["epoch"]
        for name, seconds in epoch["seconds"].items():
            losses = epoch["losses"][name]
            parts.append(
                f"An epoch of the small CNN by {name}: {seconds:.2f} s, loss {losses[0]:.4f} to {losses[-1]:.4f}.\n"
            )
        parts.append(f"The losses of a batch differ by at most {epoch['difference']:.1e}.\n")
    for name, (before, peak) in document.get("memory", {}).items():
        parts.append(
            f"Steps on vgg2.2 by {name}: peak memory {peak / 2**20:.0f} MiB, {before / 2**20:.0f} MiB before.\n"
        )
    return "\n".join(parts)


def main() -> int:
    """Measure, report, and return 1 if two engines' results differ."""
    layers = {layer.name: layer for layer in [*LAYERS, *STEPS]}
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--layers", nargs="*", choices=list(layers), default=list(layers), metavar="NAME")
    parser.add_argument("--alone", action="store_true", help=f"without {PEER}")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--only-layers", action="store_true", help="neither the epoch nor the memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every layer")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args()

    if os.getloadavg()[0] > 0.5:
        print("OTHER PROCESSES COMPUTE: ratios at more than 1 thread will mean little", file=sys.stderr)
    hold_threads(args.threads)
    engines = [OURS] if args.alone else [OURS, PEER]
    versions = {name: importlib.metadata.version(name) for name in [*engines[1:], "numpy", "numba", "pyfftw"]}
    document: dict[str, Any] = {"threads": args.threads, "versions": versions, "results": []}

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")

    for name in args.layers:
        row = compare(layers[name], engines, args.threads, args.rounds)
        document["results"].append(row)
        figures = ", ".join(f"{operation} {ratio:.2f}" for operation, ratio in row["ratios"].items())
        print(f"{name}: {figures}; shared {row['shared']:.2f}", file=sys.stderr)
        keep()
    if not args.only_layers:
        document["epoch"] = compare_epochs(engines, args.threads, args.rounds)
        document["memory"] = {}
        for name in engines:
            with new_process() as process:
                vgg = layers["vgg2.2"]
                document["memory"][name] = process.submit(peak_memory, name, vgg, args.threads).result()
        keep()

    text = report(document)
    wrong = [
        f"{row['layer']} {operation}"
        for row in document["results"]
        for operation, value in row["differences"].items()
        if value > TOLERANCE
    ]
    if "epoch" in document and document["epoch"]["difference"] > LOSS_TOLERANCE:
        wrong.append("loss of the small CNN")
    print(text + (f"\nRESULTS DIFFER: {', '.join(wrong)}." if wrong else "\nAll results agree."))
    if args.markdown:
        args.markdown.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
