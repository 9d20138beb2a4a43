"""The demo's network: `nbfftconv.Conv2d` for the convolutions, plain NumPy for all around them."""

import numpy as np

from nbfftconv import Conv2d

Parameters = list[tuple[np.ndarray, np.ndarray]]


class MaxPool2d:
    """2x2 max pooling with stride 2, for even heights and widths."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the largest of each 2x2 pixels."""
        rows = np.maximum(x[:, :, ::2], x[:, :, 1::2])
        self.input, self.output = x, np.maximum(rows[..., ::2], rows[..., 1::2])
        return self.output

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        """Return the gradient at the input: each output's goes to the pixel that it came from."""
        grad = np.empty_like(self.input, dtype=grad_output.dtype)
        # Of equal maxima in a window, only the first receives the gradient.
        open_windows = np.ones(self.output.shape, bool)
        for i, j in np.ndindex(2, 2):
            corner = np.s_[..., i::2, j::2]
            is_first = open_windows & (self.input[corner] == self.output)
            grad[corner] = is_first * grad_output
            open_windows &= ~is_first
        return grad


class Dense:
    """Fully connected layer on the flattened input, with the names that `Conv2d` has."""

    def __init__(self, weight: np.ndarray, bias: np.ndarray):
        self.weight, self.bias = weight, bias

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return (batch, outputs)."""
        self.input = x
        return x.reshape(len(x), -1) @ self.weight.T + self.bias

    def backward(self, grad_output: np.ndarray) -> np.ndarray:
        """Fill `weight_grad` and `bias_grad`, and return the gradient at the input."""
        self.weight_grad = grad_output.T @ self.input.reshape(len(self.input), -1)
        self.bias_grad = grad_output.sum(axis=0)
        return (grad_output @ self.weight).reshape(self.input.shape)


class Network:
    """A CNN for 28x28 images: two 5x5 convolutions, ReLU and 2x2 max pooling after each, and a dense layer.

    Parameters
    ----------
    parameters
        Weight and bias of the two convolutions and of the dense layer; they decide the dtype.
    algorithm
        How the convolutions are computed, in all three passes: "fft", "direct", or "auto".
    training
        False keeps nothing for `backward`.
    """

    def __init__(self, parameters: Parameters, algorithm: str = "fft", training: bool = True):
        conv1, conv2, dense = parameters
        self.convolutions = [Conv2d(*conv, padding="same", activation="relu") for conv in (conv1, conv2)]
        for layer in self.convolutions:
            layer.algorithm = algorithm
            layer.training = training
        self.weighted_layers: list[Conv2d | Dense] = [*self.convolutions, Dense(*dense)]
        first, second, last = self.weighted_layers
        self.layers: list[Conv2d | Dense | MaxPool2d] = [first, MaxPool2d(), second, MaxPool2d(), last]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the logits (batch, 10) of images (batch, 1, 28, 28)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, grad_logits: np.ndarray) -> np.ndarray:
        """Fill `weight_grad` and `bias_grad` of each weighted layer, and return the gradient at the input."""
        grad = grad_logits
        for layer in reversed(self.layers):
            grad = layer.backward(grad)
        return grad

    @property
    def parameters(self) -> Parameters:
        """Weight and bias of each weighted layer, as the constructor takes them."""
        return [(layer.weight, layer.bias) for layer in self.weighted_layers]  # type: ignore[misc]


def initial_parameters(rng: np.random.Generator, dtype: type = np.float32) -> Parameters:
    """Return He-initialised weights and zero biases."""
    shapes = [(16, 1, 5, 5), (32, 16, 5, 5), (10, 32 * 7 * 7)]
    weights = [rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])) for shape in shapes]
    return [(weight.astype(dtype), np.zeros(len(weight), dtype)) for weight in weights]


def softmax_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the mean loss, and its gradient at the logits."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    grad = np.exp(log_probabilities)
    grad[rows, labels] -= 1
    return -float(log_probabilities[rows, labels].mean()), grad / len(labels)
