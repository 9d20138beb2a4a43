"""Training: Adam over shuffled mini-batches, with a progress bar."""

from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nbfftconv.demo.data import Digits
from nbfftconv.demo.network import Network, softmax_cross_entropy

#: Takes a step at some rate on a batch of images with labels; returns the loss and the logits before it.
Learner = Callable[[np.ndarray, np.ndarray, float], tuple[float, np.ndarray]]


class Adam:
    """Adam (Kingma and Ba 2015) over the weights and biases of some layers."""

    def __init__(self, layers: list, beta1: float = 0.9, beta2: float = 0.999):
        self.layers, self.beta1, self.beta2 = layers, beta1, beta2
        self.steps = 0
        self.moments = [{"weight": (0, 0), "bias": (0, 0)} for _ in layers]

    def step(self, rate: float) -> None:
        """Move each parameter against its gradient."""
        self.steps += 1
        rate *= (1 - self.beta2**self.steps) ** 0.5 / (1 - self.beta1**self.steps)
        for layer, moments in zip(self.layers, self.moments, strict=True):
            for name, (mean, square) in moments.items():
                grad = getattr(layer, f"{name}_grad")
                mean = self.beta1 * mean + (1 - self.beta1) * grad
                square = self.beta2 * square + (1 - self.beta2) * grad**2
                moments[name] = mean, square
                # Assigning a new array is what renews a Conv2d's cached spectra.
                setattr(layer, name, getattr(layer, name) - rate * mean / (np.sqrt(square) + 1e-8))


def learner(network: Network) -> Learner:
    """Return what trains a network in place."""
    optimizer = Adam(network.weighted_layers)

    def learn(images: np.ndarray, labels: np.ndarray, rate: float) -> tuple[float, np.ndarray]:
        logits = network(images)
        loss, grad = softmax_cross_entropy(logits, labels)
        network.backward(grad)
        optimizer.step(rate)
        return loss, logits

    return learn


def random_shift(images: np.ndarray, rng: np.random.Generator, pixels: int = 2) -> np.ndarray:
    """Shift a batch by up to some pixels; what wraps around is the blank border of the digits."""
    return np.roll(images, rng.integers(-pixels, pixels, size=2, endpoint=True), axis=(2, 3))


def train(
    learn: Learner,
    digits: Digits,
    epochs: int,
    rng: np.random.Generator,
    console: Console | None = None,
    batch_size: int = 50,
    rate: float = 2e-3,
) -> list[tuple[float, float]]:
    """Train by steps on shuffled batches; the learning rate falls linearly to zero.

    Returns
    -------
    list of (float, float)
        Mean loss and accuracy of each epoch's batches, as they were before their steps.
    """
    batches = -(-len(digits.labels) // batch_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.2%}"),
        TimeElapsedColumn(),
    )
    history = []
    with Progress(*columns, console=console) as progress:
        for epoch in range(epochs):
            bar = progress.add_task(f"epoch {epoch + 1}/{epochs}", total=batches, loss=np.nan, accuracy=0)
            losses, hits = [], []
            for step, batch in enumerate(np.array_split(rng.permutation(len(digits.labels)), batches)):
                remaining = 1 - (epoch * batches + step) / (epochs * batches)
                loss, logits = learn(random_shift(digits.images[batch], rng), digits.labels[batch], rate * remaining)
                losses.append(loss)
                hits.extend(logits.argmax(axis=1) == digits.labels[batch])
                progress.update(bar, advance=1, loss=np.mean(losses), accuracy=np.mean(hits))
            history.append((float(np.mean(losses)), float(np.mean(hits))))
    return history
