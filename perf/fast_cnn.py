"""Fast-CNN's experiment again: a small CNN predicts 253 images one at a time, in several engines.

The network is that of https://github.com/pushkar-khetrapal/Fast-CNN: images of 225x225 with one channel;
three times a 3x3 convolution with one filter and no padding, ReLU, 2x2 max pooling; dense 640, ReLU;
dense 1, sigmoid. Images and weights come from a seeded generator. As there, the loops go over output pixels
in Python, a NumPy slice each, in pooling too; the others pool by whole slices or in PyTorch. Each engine runs
in a process of its own, in interleaved rounds; times are medians, after a warm-up. The loops run on a few
images, and their time is scaled. With --keras the network is built in Keras as well, whose predict_on_batch runs
as Keras has it and converted. Of Keras' backends JAX takes all cores, whatever --threads says.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SIZE = 225
SEED = 18  # with it, both classes are predicted, none by a margin that rounding could turn
LOOPS, PLANNED = "Python loops over NumPy slices", "nbfftconv, as planned"
Weights = list[tuple[np.ndarray, np.ndarray]]
Predictor = Callable[[np.ndarray], float]


def synthetic_image(index: int) -> np.ndarray:
    """Return an image (225, 225): random patches of 15x15 pixels under a little noise."""
    rng = np.random.default_rng([SEED, index])
    patches = rng.random((SIZE // 15, SIZE // 15), dtype=np.float32)
    return patches.repeat(15, axis=0).repeat(15, axis=1) + 0.1 * rng.random((SIZE, SIZE), dtype=np.float32)


def random_weights() -> Weights:
    """Return weights and biases of the three convolutions and the two dense layers."""
    rng = np.random.default_rng(SEED)
    flat = 26 * 26  # 225 -> 223 -> 111 -> 109 -> 54 -> 52 -> 26
    shapes = [(1, 1, 3, 3)] * 3 + [(640, flat), (1, 640)]
    weights = [rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) for shape in shapes]
    return [(weight.astype(np.float32), np.zeros(len(weight), np.float32)) for weight in weights]


def dense_head(flat: np.ndarray, weights: Weights) -> float:
    """Return the probability that the two dense layers give."""
    (w1, b1), (w2, b2) = weights[3:]
    logit = w2 @ np.maximum(w1 @ flat + b1, 0) + b2
    return float(1 / (1 + np.exp(-logit[0])))


def loops(weights: Weights) -> Predictor:
    """Python loops over the output pixels."""

    def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        y = np.empty((x.shape[0] - 2, x.shape[1] - 2), x.dtype)
        for i, j in np.ndindex(y.shape):
            y[i, j] = np.sum(np.multiply(x[i : i + 3, j : j + 3], weight)) + bias
        return y

    def pool(x: np.ndarray) -> np.ndarray:
        y = np.empty((x.shape[0] // 2, x.shape[1] // 2), x.dtype)
        for i, j in np.ndindex(y.shape):
            y[i, j] = np.max(x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2])
        return y

    def predict(image: np.ndarray) -> float:
        x = image
        for weight, bias in weights[:3]:
            x = pool(np.maximum(convolve(x, weight[0, 0], bias[0]), 0))
        return dense_head(x.ravel(), weights)

    return predict


def this_engine(weights: Weights, algorithm: str, threads: int) -> Predictor:
    """`nbfftconv.Conv2d` layers."""
    import nbfftconv  # each engine is imported by its own process only

    nbfftconv.set_num_threads(threads)
    layers = [nbfftconv.Conv2d(weight, bias, activation="relu") for weight, bias in weights[:3]]
    for layer in layers:
        layer.algorithm = algorithm
        layer.training = False

    def pool(x: np.ndarray) -> np.ndarray:
        x = x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        rows = np.maximum(x[:, :, ::2], x[:, :, 1::2])
        return np.maximum(rows[..., ::2], rows[..., 1::2])

    def predict(image: np.ndarray) -> float:
        x = image[None, None]
        for layer in layers:
            x = pool(layer(x))
        return dense_head(x.ravel(), weights)

    return predict


def pytorch(weights: Weights, threads: int) -> Predictor:
    """PyTorch, in inference mode."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(threads)
    tensors = [(torch.from_numpy(weight), torch.from_numpy(bias)) for weight, bias in weights]

    @torch.inference_mode()
    def predict(image: np.ndarray) -> float:
        x = torch.from_numpy(image)[None, None]
        for weight, bias in tensors[:3]:
            x = functional.max_pool2d(functional.relu(functional.conv2d(x, weight, bias)), 2)
        (w1, b1), (w2, b2) = tensors[3:]
        hidden = functional.relu(functional.linear(x.flatten(1), w1, b1))
        return float(torch.sigmoid(functional.linear(hidden, w2, b2)))

    return predict


def in_keras(weights: Weights, converted: bool, threads: int) -> Predictor:
    """Keras' layers, computed by its backend or by this package."""
    import keras

    import nbfftconv
    import nbfftconv.keras as nk

    nbfftconv.set_num_threads(threads)
    model = keras.Sequential([keras.Input((SIZE, SIZE, 1))])
    for _ in weights[:3]:
        model.add(keras.layers.Conv2D(1, 3, activation="relu"))
        model.add(keras.layers.MaxPooling2D())
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(640, activation="relu"))
    model.add(keras.layers.Dense(1, activation="sigmoid"))
    model.set_weights(
        [each for weight, bias in weights for each in (weight.transpose(*range(2, weight.ndim), 1, 0), bias)]
    )
    if converted:
        nk.convert(model, everything=True)

    def predict(image: np.ndarray) -> float:
        return float(np.asarray(model.predict_on_batch(image[None, ..., None]))[0, 0])

    return predict


def measure(make_predictor: Callable[[Weights], Predictor], count: int) -> tuple[float, list[float]]:
    """Return the seconds that the images take, one at a time, and their probabilities."""
    predict = make_predictor(random_weights())
    images = [synthetic_image(index) for index in range(count)]
    for image in images[:3]:
        predict(image)
    start = time.perf_counter()
    probabilities = [predict(image) for image in images]
    return time.perf_counter() - start, probabilities


def planned_algorithms() -> str:
    """Return what the planner chooses for the three convolutions."""
    from nbfftconv import plan_conv2d

    plans = [plan_conv2d((1, 1, size, size), (1, 1, 3, 3)) for size in (225, 111, 54)]
    return ", ".join(plan.algorithm for plan in plans)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for each engine."""
    print(f"{'engine':<31}{'seconds':>9}{'images/s':>10}{'x loops':>9}{'same class':>13}{'largest diff':>14}")
    for row in rows:
        print(
            f"{row['engine']:<31}{row['seconds']:>9.3f}{row['images_a_second']:>10.1f}{row['times_loops']:>9.1f}"
            f"{row['predictions_equal']:>6} of {row['images_run']:>3}{row['max_abs_difference']:>14.1e}"
        )


def main() -> int:
    """Measure, print, and return 1 if any prediction differs between two engines."""
    from nbfftconv import get_num_threads

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--images", type=int, default=253, help="images for all engines but the loops")
    parser.add_argument("--loop-images", type=int, default=8, help="images for the Python loops, scaled up")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=get_num_threads(), help="threads of each engine")
    parser.add_argument(
        "--keras",
        nargs="?",
        const=os.environ.get("KERAS_BACKEND", "torch"),
        choices=("torch", "tensorflow", "jax"),
        help="run the network in Keras, too, on that backend; without a name on that of KERAS_BACKEND, or torch",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if args.keras and not importlib.util.find_spec("keras"):
        parser.error("--keras needs Keras: pip install keras")
    loop_images = min(args.loop_images, args.images)

    engines: dict[str, tuple[Callable[[Weights], Predictor], int]] = {
        LOOPS: (loops, loop_images),
        PLANNED: (partial(this_engine, algorithm="auto", threads=args.threads), args.images),
        "nbfftconv, FFT forced": (partial(this_engine, algorithm="fft", threads=args.threads), args.images),
    }
    if importlib.util.find_spec("torch"):
        engines["PyTorch"] = (partial(pytorch, threads=args.threads), args.images)
    if args.keras:
        os.environ["KERAS_BACKEND"] = args.keras  # for the children, which import Keras
        for name, converted in ((f"Keras on {args.keras}", False), (f"Keras on {args.keras}, converted", True)):
            engines[name] = (partial(in_keras, converted=converted, threads=args.threads), args.images)

    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for NumPy's BLAS in the children
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(args.threads)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # spinning threads suffer most from whatever else the machine does
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    probabilities: dict[str, np.ndarray] = {}
    for _ in range(args.rounds):
        for name, (make_predictor, count) in engines.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                elapsed, values = process.submit(measure, make_predictor, count).result()
            seconds[name].append(elapsed * args.images / count)
            probabilities[name] = np.array(values)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = probabilities[PLANNED]
    rows: list[dict[str, Any]] = [
        {
            "engine": name,
            "images_run": len(values),
            "seconds": medians[name],
            "images_a_second": args.images / medians[name],
            "times_loops": medians[LOOPS] / medians[name],
            "predictions_equal": int(np.sum((values >= 0.5) == (ours[: len(values)] >= 0.5))),
            "max_abs_difference": float(np.abs(values - ours[: len(values)]).max()),
        }
        for name, values in probabilities.items()
    ]
    all_equal = all(row["predictions_equal"] == row["images_run"] for row in rows)

    print(f"{args.images} images, one at a time; {args.threads} threads; medians of {args.rounds} rounds")
    print_table(rows)
    print(f"The loops ran {loop_images} images and are scaled; Fast-CNN's own FFT was 4.8 times its loops.")
    print(f"Classes and probabilities are compared with '{PLANNED}' ({planned_algorithms()}).")
    positive, margin = np.sum(ours >= 0.5), np.abs(ours - 0.5).min()
    print(f"{positive} images are in class 1; the closest probability is {margin:.1e} away from 0.5.")
    print("All predictions are equal." if all_equal else "PREDICTIONS DIFFER.")
    if args.json:
        figures = {"threads": args.threads, "images": args.images, "rounds": args.rounds, "engines": rows}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all_equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
