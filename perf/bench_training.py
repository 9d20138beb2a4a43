"""Training on the layers in layers.py: forward pass, dW, dX and a whole step, this engine against PyTorch and others.

A step is the forward pass and both gradients with new weights, by a layer here and by autograd there; the passes alone
are `conv2d`, `conv2d_weight` and `conv2d_input`, or their like of other layers, which share nothing, and autograd's
with one gradient wanted. Engines take turns, each in a process of its own (see `rounds`). A ratio is the median time of
the fastest peer by that of this engine; where others than PyTorch on arrays as ours take part, there is also that of
PyTorch. `shared` is the time of a step by that of its three passes called apart, one after the other.

Peers are torch, and with `--peers all` also torch on arrays in NHWC order; of sequences whose kernels' spectra are of a
sensible size, transforms of whole sequences by torch.fft; of one channel, SciPy. ONNX Runtime has no gradients. All
results have to agree to 1e-5, and dW of more than 100,000 products to what rounding leaves of their sums.

With the set "layers", a small CNN is trained for one epoch, too, here and in PyTorch, from the same weights on the same
batches of seeded images.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engines import OURS, REQUIRES
from layers import BY_NAME, SETS, Layer
from rounds import Operations, difference, digits, hold_threads, medians, memory, new_process, race, seconds_of, table

PEER = "torch"
PASSES = ("forward", "dW", "dX")
TOLERANCE = 1e-5  # of the difference of two results, in the 2-norm
LOSS_TOLERANCE = 1e-2  # of the difference of the losses of a batch, after up to an epoch of rounding
MOST_FREQUENCIES = 2**24  # of kernels' spectra of whole sequences: with more, torch.fft is slower than torch
STEPS = [  # layers whose steps are compared with their passes called apart
    Layer("5x5", "", 8, 64, 64, 56, 5, 2),
    Layer("3x3", "", 8, 128, 128, 56, 3, 1),
    Layer("9x9", "", 16, 64, 128, 64, 9, 4),
    Layer("7x7", "", 8, 64, 64, 64, 7, 3),
]
NAMED = BY_NAME | {layer.name: layer for layer in STEPS}
IMAGES, BATCH, RATE, CLASSES = 2000, 50, 0.01, 10  # of the small CNN


def gradient_like(size: tuple[int, ...]) -> np.ndarray:
    """Return the gradient at an output that all engines are given."""
    return np.random.default_rng(4).standard_normal(size, dtype=np.float32)


def this_engine(layer: Layer, threads: int) -> Operations:
    """The functions, and a layer in training."""
    import nbfftconv  # each engine is imported by its own process only

    nbfftconv.set_num_threads(threads)
    x, w = layer.arrays("float32")
    options = {"stride": layer.stride, "padding": layer.pads, "dilation": layer.dilation, "groups": layer.groups}
    axes = len(layer.space)
    convolution = getattr(nbfftconv, f"Conv{'Transpose' * layer.is_transposed}{axes}d")(w, **options)
    forward, convolve, at_weight, at_input = (
        functools.partial(getattr(nbfftconv, name), **options)
        for name in (layer.operator, *(f"conv{axes}d{of}" for of in ("", "_weight", "_input")))
    )
    g = gradient_like(convolution(x).shape)
    weights = itertools.cycle([w, w.copy()])

    def step() -> tuple[np.ndarray, ...]:
        convolution.weight = next(weights)
        return convolution(x), convolution.backward(g), convolution.weight_grad

    passes = {"forward": lambda: forward(x, w)}
    if layer.is_transposed:  # input and gradient have changed roles
        passes |= {"dW": lambda: at_weight(g, w.shape, x), "dX": lambda: convolve(g, w)}
    else:
        passes |= {"dW": lambda: at_weight(x, w.shape, g), "dX": lambda: at_input(x.shape, w, g)}
    return {**passes, "step": step, "apart": lambda: tuple(run() for run in passes.values())}


def pytorch(layer: Layer, threads: int, channels_last: bool = False) -> Operations:
    """Autograd; with `channels_last` all arrays are in that order."""
    import torch

    torch.set_num_threads(threads)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    order = formats[len(layer.space)] if channels_last else torch.contiguous_format
    x, w = (torch.from_numpy(each).to(memory_format=order) for each in layer.arrays("float32"))
    convolution = getattr(torch.nn.functional, layer.operator)
    options = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    around = [amount for pads in reversed(layer.pads) for amount in pads]

    def pads_first(x: Any, w: Any) -> Any:
        return convolution(torch.nn.functional.pad(x, around), w, **options)

    def pads_itself(x: Any, w: Any) -> Any:
        return convolution(x, w, padding=tuple(before for before, _ in layer.pads), **options)

    def operations(convolve: Callable[[Any, Any], Any]) -> Operations:
        renewed = w.clone().requires_grad_()
        x_wanted, w_wanted = x.clone().requires_grad_(), w.clone().requires_grad_()
        of_w, of_x = convolve(x, w_wanted), convolve(x_wanted, w)
        g = torch.from_numpy(gradient_like(tuple(of_w.shape))).to(memory_format=order)

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

    if any(before != after for before, after in layer.pads):  # it knows no other way
        return operations(pads_first)
    if len(layer.space) == 1 and layer.groups > 1:  # it is slow at padding of its own there
        ways = operations(pads_first), operations(pads_itself)
        return {name: min((way[name] for way in ways), key=fastest_of_three) for name in ways[0]}
    return operations(pads_itself)


def fastest_of_three(operation: Callable[[], Any]) -> float:
    """Return the least time of three calls."""
    return min(seconds_of(operation) for _ in range(3))


def torch_fft(layer: Layer, threads: int) -> Operations:
    """Transforms of whole sequences by PyTorch, and their products; a step makes each transform once."""
    import torch
    from scipy import fft

    torch.set_num_threads(threads)
    x, w = map(torch.from_numpy, layer.arrays("float32"))
    (length,), (taps,) = layer.space, layer.along(layer.kernel)
    (before, after), (stride,), (dilation,) = layer.pads[0], layer.along(layer.stride), layer.along(layer.dilation)
    padded, reach = length + before + after, dilation * (taps - 1)
    size, outputs = fft.next_fast_len(padded, real=True), padded - reach
    g = torch.from_numpy(gradient_like((layer.batch, layer.filters, (outputs - 1) // stride + 1)))
    is_apart = layer.groups > 1 or layer.channels == 1  # one channel for each filter

    def apart_by(values: Any, step: int) -> Any:
        if step == 1:
            return values
        result = values.new_zeros((*values.shape[:-1], (values.shape[-1] - 1) * step + 1))
        result[..., ::step] = values
        return result

    def of_input() -> Any:
        return torch.fft.rfft(torch.nn.functional.pad(x, (before, after)), size)

    def of_weight() -> Any:
        return torch.fft.rfft(apart_by(w, dilation), size)

    def of_gradient() -> Any:
        return torch.fft.rfft(apart_by(g, stride), size)

    def forward(inputs: Any, weights: Any) -> Any:
        weights = weights.conj()
        product = inputs * weights[:, 0] if is_apart else torch.einsum("ncf,kcf->nkf", inputs, weights)
        return torch.fft.irfft(product, size)[..., :outputs:stride].contiguous()

    def at_weight(inputs: Any, gradients: Any) -> Any:
        gradients = gradients.conj()
        product = (inputs * gradients).sum(0)[:, None] if is_apart else torch.einsum("ncf,nkf->kcf", inputs, gradients)
        return torch.fft.irfft(product, size)[..., : reach + 1 : dilation].contiguous()

    def at_input(weights: Any, gradients: Any) -> Any:
        if is_apart:
            product = gradients * weights[:, 0]
            product = product if layer.groups > 1 else product.sum(1, keepdim=True)
        else:
            product = torch.einsum("nkf,kcf->ncf", gradients, weights)
        return torch.fft.irfft(product, size)[..., before : before + length].contiguous()

    def step() -> tuple[Any, ...]:
        inputs, weights, gradients = of_input(), of_weight(), of_gradient()
        return forward(inputs, weights), at_input(weights, gradients), at_weight(inputs, gradients)

    operations = {
        "forward": lambda: forward(of_input(), of_weight()),
        "dW": lambda: at_weight(of_input(), of_gradient()),
        "dX": lambda: at_input(of_weight(), of_gradient()),
        "step": step,
    }
    return {name: torch.inference_mode()(run) for name, run in operations.items()}


def scipy_oaconvolve(layer: Layer, threads: int) -> Operations:
    """SciPy's overlap-add convolution, of one channel."""
    from scipy import fft, signal

    arrays, kernel = (array[:, 0] for array in layer.arrays("float32"))
    axes = tuple(range(1, kernel.ndim))
    padded = np.pad(arrays, ((0, 0), *layer.pads))
    outputs = (size - taps + 1 for size, taps in zip(padded.shape[1:], kernel.shape[1:], strict=True))
    g = gradient_like((layer.batch, 1, *outputs))[:, 0]
    reversed_kernel, reversed_g = np.flip(kernel, axes).copy(), np.flip(g, axes).copy()
    inside = (slice(None), *(slice(p, p + n) for (p, _), n in zip(layer.pads, layer.space, strict=True)))

    def convolve(a: np.ndarray, b: np.ndarray, mode: str) -> np.ndarray:
        with fft.set_workers(threads):
            return signal.oaconvolve(a, b, mode, axes)

    passes = {
        "forward": lambda: convolve(np.pad(arrays, ((0, 0), *layer.pads)), reversed_kernel, "valid")[:, None],
        "dW": lambda: convolve(padded, reversed_g, "valid").sum(0)[None, None],
        "dX": lambda: convolve(g, kernel, "full")[inside][:, None],
    }
    return {**passes, "step": lambda: (passes["forward"](), passes["dX"](), passes["dW"]())}


ENGINES = {
    OURS: this_engine,
    PEER: pytorch,
    "torch-nhwc": functools.partial(pytorch, channels_last=True),
    "torch-fft": torch_fft,
    "scipy": scipy_oaconvolve,
}


def engines_for(layer: Layer, engines: list[str]) -> list[str]:
    """Return the engines that take part on a layer."""
    axes, is_plain = len(layer.space), not layer.is_transposed
    frequencies = layer.filters * layer.channels // layer.groups * layer.space[0] // 2
    takes_part = {
        "torch-nhwc": axes > 1,
        "torch-fft": axes == 1 and is_plain and frequencies <= MOST_FREQUENCIES,
        "scipy": layer.channels == layer.filters == 1 and is_plain,
    }
    return [name for name in engines if takes_part.get(name, True)]


def operations(engine: str, layer: Layer, threads: int) -> Operations:
    """Return what a process of one engine times. This one has compiled and planned: it may take longer than a turn."""
    made = ENGINES[engine](layer, threads)
    if engine == OURS:
        for run in made.values():
            run()
    return made


def tolerance(layer: Layer, operation: str) -> float:
    """Return the largest difference of two results that is due to rounding."""
    if operation not in ("dW", "step"):
        return TOLERANCE
    products = layer.flops / 2 / math.prod(layer.weight_size)  # in the sum of one weight's gradient
    return max(TOLERANCE, float(np.finfo(np.float32).eps) / 4 * math.sqrt(products))


def compare(layer: Layer, engines: list[str], threads: int, rounds: int) -> dict[str, Any]:
    """Time the engines on a layer in interleaved rounds, and compare their results."""
    outputs, times = race({name: (operations, (name, layer, threads)) for name in engines}, rounds)
    seconds = {operation: medians(samples) for operation, samples in times.items()}
    differences = {}
    for operation, results in outputs.items():
        of_peers = {}
        for other in results.keys() - {OURS}:
            pairs = zip(results[OURS], results[other], strict=True)
            of_peers[other] = max(difference(ours, theirs) for ours, theirs in pairs)
        if of_peers:
            differences[operation] = of_peers
    return {
        "layer": layer.name,
        "threads": threads,
        "seconds": seconds,
        "samples": times,
        "differences": differences,
        "ratios": {
            name: min(seconds[name][peer] for peer in peers) / seconds[name][OURS]
            for name, peers in differences.items()
        },
        "usual_ratios": {
            name: seconds[name][PEER] / seconds[name][OURS] for name, peers in differences.items() if PEER in peers
        },
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
    before = memory("VmRSS")
    step = ENGINES[engine](layer, threads)["step"]
    for _ in range(3):
        step()
    return before, memory("VmHWM")


def pass_table(results: list[dict[str, Any]], engines: list[str]) -> str:
    """Return the table of times and ratios, a row for each operation of a layer."""
    has_others = PEER in engines and bool(set(engines) - {OURS, PEER})
    rows = []
    for row in results:
        for operation in (*PASSES, "step"):
            seconds = row["seconds"][operation]
            cells = [digits(1e3 * seconds[name], 1) if name in seconds else "-" for name in engines]
            ratios = ["ratios", *["usual_ratios"] * has_others]
            cells += [f"{row[each][operation]:.2f}" if operation in row[each] else "-" for each in ratios]
            is_first, is_step = operation == PASSES[0], operation == "step"
            named = [row["layer"], str(NAMED[row["layer"]])] if is_first else ["", ""]
            differences = row["differences"].get(operation, {}).values()
            largest = f"{max(differences):.0e}" if differences else "-"
            rows.append([*named, operation, *cells, f"{row['shared']:.2f}" if is_step else "", largest])
    header = ["layer", "batch, channels, image, kernel, padding", "pass", *(f"{name}, ms" for name in engines)]
    return table([*header, "ratio", *[f"ratio to {PEER}"] * has_others, "shared", "difference"], rows)


def mean_and_worst(results: list[dict[str, Any]], key: str, who: str) -> str:
    """Return a sentence on the ratios of a kind."""
    sentences = []
    for what, operations in (("dW and dX", ("dW", "dX")), ("a step", ("step",))):
        ratios = {
            f"{operation} of {row['layer']}": row[key][operation]
            for row in results
            for operation in operations
            if operation in row[key]
        }
        if ratios:
            worst, mean = min(ratios, key=ratios.__getitem__), statistics.geometric_mean(ratios.values())
            sentences.append(f"{what} {mean:.2f} in the mean of {len(ratios)}, the worst {ratios[worst]:.2f}, {worst}")
    return f"Against {who}: {'; '.join(sentences)}.\n" if sentences else ""


def report(document: dict[str, Any], engines: list[str]) -> str:
    """Return the tables and summaries, in Markdown."""
    of_steps = {layer.name for layer in STEPS}
    in_sets = [row for row in document["results"] if row["layer"] not in of_steps]
    who = engines[1] if len(engines) == 2 else "the fastest peer"
    parts = [pass_table(document["results"], engines), mean_and_worst(in_sets, "ratios", who)]
    if set(engines) - {OURS, PEER}:
        parts.append(mean_and_worst(in_sets, "usual_ratios", PEER))
    shared = [row["shared"] for row in document["results"] if row["layer"] in of_steps]
    if shared:
        parts.append(f"A step by its passes called apart, median of {len(shared)}: {np.median(shared):.2f}.\n")
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
    return "\n".join(filter(None, parts))


def main() -> int:
    """Measure, report, and return 1 if two engines' results differ."""
    peers = [name for name in ENGINES if name != OURS]
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--set", choices=list(SETS), default="layers", help="which layers")
    parser.add_argument("--layers", nargs="+", choices=list(NAMED), metavar="NAME", help="these only, of any set")
    parser.add_argument("--peers", nargs="+", choices=[*peers, "all"], default=[PEER], help="these peers only")
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--only-layers", action="store_true", help="neither the epoch nor the memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after every layer")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there too")
    args = parser.parse_args()

    if os.getloadavg()[0] > 0.5:
        print("OTHER PROCESSES COMPUTE: ratios at more than 1 thread will mean little", file=sys.stderr)
    hold_threads(args.threads)
    engines = [OURS, *([] if args.alone else peers if "all" in args.peers else args.peers)]
    packages = [*(REQUIRES[name][0] for name in engines[1:]), "numpy", "numba", "pyfftw"]
    versions = {name: importlib.metadata.version(name) for name in packages}
    document: dict[str, Any] = {"threads": args.threads, "versions": versions, "results": []}
    chosen = SETS[args.set] + (STEPS if args.set == "layers" else [])
    layers = [NAMED[name] for name in args.layers] if args.layers else chosen

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")

    for layer in layers:
        row = compare(layer, engines_for(layer, engines), args.threads, args.rounds)
        document["results"].append(row)
        figures = ", ".join(f"{operation} {ratio:.2f}" for operation, ratio in row["ratios"].items())
        print(f"{layer.name}: {figures}; shared {row['shared']:.2f}", file=sys.stderr)
        keep()
    if args.set == "layers" and not args.only_layers:
        trained = [name for name in engines if name in (OURS, PEER)]
        document["epoch"] = compare_epochs(trained, args.threads, args.rounds)
        document["memory"] = {}
        for name in trained:
            with new_process() as process:
                vgg = NAMED["vgg2.2"]
                document["memory"][name] = process.submit(peak_memory, name, vgg, args.threads).result()
        keep()

    text = report(document, engines)
    wrong = [
        f"{row['layer']} {operation} of {name}"
        for row in document["results"]
        for operation, of_peers in row["differences"].items()
        for name, value in of_peers.items()
        if value > tolerance(NAMED[row["layer"]], operation)
    ]
    if "epoch" in document and document["epoch"]["difference"] > LOSS_TOLERANCE:
        wrong.append("loss of the small CNN")
    print(text + (f"\nRESULTS DIFFER: {', '.join(wrong)}." if wrong else "\nAll results agree."))
    if args.markdown:
        args.markdown.write_text(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
