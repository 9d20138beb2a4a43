"""The demo in PyTorch: the same network trained there, and then with its convolutions by this package."""

import copy
from pathlib import Path

import numpy as np
import torch

import nbfftconv.torch as nt
from nbfftconv.demo.compare import BATCH_SIZE, Predictor
from nbfftconv.demo.data import Digits
from nbfftconv.demo.network import Parameters


class InTorch:
    """The network, what trains it, and what is compared and drawn afterwards."""

    how = "by PyTorch"
    headings = {"torch": "PyTorch", "nbfftconv": "converted"}
    caption = "converted: nbfftconv computes the convolutions that it is faster with"
    picture = "layers.png"

    def __init__(self, parameters: Parameters) -> None:
        nn = torch.nn
        self._model = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 10),
        )  # fmt: skip
        with torch.no_grad():
            arrays = (array for pair in parameters for array in pair)
            for own, array in zip(self._model.parameters(), arrays, strict=True):
                own.copy_(torch.from_numpy(array))
        self._optimizer = torch.optim.Adam(self._model.parameters())

    def learn(self, images: np.ndarray, labels: np.ndarray, rate: float) -> tuple[float, np.ndarray]:
        """Take a step; return the loss and the logits before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        logits = self._model(torch.from_numpy(images))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        loss.backward()
        self._optimizer.step()
        return float(loss.detach()), logits.detach().numpy()

    def substitute(self, digits: Digits) -> dict[str, Predictor]:
        """Return what predicts with the trained weights, in both ways, and print what became of each layer."""
        model = self._model.eval()
        batch = torch.from_numpy(digits.images[:BATCH_SIZE])
        with torch.inference_mode():
            converted = nt.convert(copy.deepcopy(model), (batch,), measure=True)
        self._report = nt.report(converted)
        print(self._report)
        return {"torch": _predictor(model), "nbfftconv": _predictor(converted)}

    def draw(self, digits: Digits, path: Path) -> None:
        """Draw the time of each layer."""
        self._report.plot(path)


def _predictor(model: torch.nn.Module) -> Predictor:
    @torch.inference_mode()
    def predict(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return predict
