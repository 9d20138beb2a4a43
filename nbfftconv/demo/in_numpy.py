"""The demo in NumPy: trained by FFT convolutions, and the same weights in direct and in FFT layers."""

from pathlib import Path

from nbfftconv.demo.compare import Predictor
from nbfftconv.demo.data import Digits
from nbfftconv.demo.network import Network, Parameters
from nbfftconv.demo.report import draw_feature_maps
from nbfftconv.demo.train import learner


class InNumPy:
    """The network, what trains it, and what is compared and drawn afterwards."""

    how = "FFT convolutions in all three passes"
    headings = {"direct": "direct", "fft": "FFT"}
    caption = "direct: this package's own direct convolution, on the same micro-kernels"
    picture = "feature_maps.png"

    def __init__(self, parameters: Parameters) -> None:
        self._network = Network(parameters, algorithm="fft")
        self.learn = learner(self._network)

    def substitute(self, digits: Digits) -> dict[str, Predictor]:
        """Return what predicts with the trained weights, in both ways."""
        return {name: Network(self._network.parameters, name, training=False) for name in self.headings}

    def draw(self, digits: Digits, path: Path) -> None:
        """Draw the first digit's feature maps."""
        draw_feature_maps(self._network.parameters, digits.images[0], path)
