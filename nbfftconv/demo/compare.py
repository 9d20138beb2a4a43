"""The substitution: the same trained weights computed in two ways, compared and timed."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from nbfftconv.demo.data import Digits

BATCH_SIZE = 100
REPETITIONS = 9
Predictor = Callable[[np.ndarray], np.ndarray]


def predict(network: Predictor, images: np.ndarray) -> np.ndarray:
    """Return the logits of all images, computed in batches."""
    return np.concatenate([network(images[i : i + BATCH_SIZE]) for i in range(0, len(images), BATCH_SIZE)])


def compare(networks: dict[str, Predictor], digits: Digits) -> dict[str, int | float | bool]:
    """Predict the digits with two networks by name, the one to compare with first; return the figures of the report.

    `predictions_equal` counts the digits for which both predict the same class. The times are medians of
    interleaved repetitions after a warm-up, each over all digits and the whole network.
    """
    other, ours = networks
    logits = {name: predict(network, digits.images) for name, network in networks.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(REPETITIONS):
        for name, network in networks.items():
            start = time.perf_counter()
            predict(network, digits.images)
            seconds[name].append(time.perf_counter() - start)

    predictions = {name: values.argmax(axis=1) for name, values in logits.items()}
    equal = int(np.sum(predictions[other] == predictions[ours]))
    return {
        "test_images": len(digits.labels),
        "accuracy": float(np.mean(predictions[ours] == digits.labels)),
        f"{other}_accuracy": float(np.mean(predictions[other] == digits.labels)),
        "predictions_equal": equal,
        "all_predictions_equal": equal == len(digits.labels),
        "max_abs_logit_difference": float(np.abs(logits[other] - logits[ours]).max()),
        "max_abs_logit": float(np.abs(logits[other]).max()),
        f"{other}_seconds": statistics.median(seconds[other]),
        f"{ours}_seconds": statistics.median(seconds[ours]),
    }
