"""The substitution: the same trained weights in direct and in FFT layers, compared and timed."""

import statistics
import time

import numpy as np

from nbfftconv.demo.data import Digits
from nbfftconv.demo.network import Network, Parameters

BATCH_SIZE = 100
REPETITIONS = 9


def predict(network: Network, images: np.ndarray) -> np.ndarray:
    """Return the logits of all images, computed in batches."""
    return np.concatenate([network(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)])


def compare(parameters: Parameters, digits: Digits) -> dict[str, int | float | bool]:
    """Predict the digits with direct and with FFT layers, and return the figures of the report.

    `predictions_equal` counts the digits for which both predict the same class. The times are medians of
    interleaved repetitions after a warm-up, each over all digits and the whole network.
    """
    networks = {name: Network(parameters, algorithm=name, training=False) for name in ("direct", "fft")}
    logits = {name: predict(network, digits.images) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(REPETITIONS):
        for name, network in networks.items():
            start = time.perf_counter()
            predict(network, digits.images)
            seconds[name].append(time.perf_counter() - start)

    predictions = {name: values.argmax(axis=1) for name, values in logits.items()}
    equal = int(np.sum(predictions["direct"] == predictions["fft"]))
    return {
        "test_images": len(digits.labels),
        "accuracy": float(np.mean(predictions["fft"] == digits.labels)),
        "direct_accuracy": float(np.mean(predictions["direct"] == digits.labels)),
        "predictions_equal": equal,
        "all_predictions_equal": equal == len(digits.labels),
        "max_abs_logit_difference": float(np.abs(logits["direct"] - logits["fft"]).max()),
        "max_abs_logit": float(np.abs(logits["direct"]).max()),
        "direct_seconds": statistics.median(seconds["direct"]),
        "fft_seconds": statistics.median(seconds["fft"]),
    }
