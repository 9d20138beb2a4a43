"""What computes a Keras layer here: it takes the place of the layer's `call`, of this one instance and no other.

So the layer stays what it is for all of Keras: class, configuration, weights, and what is saved, cloned or pickled.
"""

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import keras

from nbfftconv import tables
from nbfftconv.geometry import ConvGeometry
from nbfftconv.keras.passes import Convolution
from nbfftconv.keras.setting import Setting

_Layer = keras.layers.Layer

# What a layer's kernel is.
_KINDS: dict[type[Any], str] = {
    keras.layers.Conv1D: "plain",
    keras.layers.Conv2D: "plain",
    keras.layers.Conv3D: "plain",
    keras.layers.Conv1DTranspose: "transposed",
    keras.layers.Conv2DTranspose: "transposed",
    keras.layers.Conv3DTranspose: "transposed",
    keras.layers.DepthwiseConv1D: "depthwise",
    keras.layers.DepthwiseConv2D: "depthwise",
    keras.layers.SeparableConv1D: "separable",
    keras.layers.SeparableConv2D: "separable",
}
#: What this package computes in.
DTYPES = "float32", "float64"
BACKENDS = "torch", "tensorflow", "jax"


@functools.cache
def host() -> ModuleType:
    """Return the module for the backend that Keras runs on; raise ValueError if there is none."""
    backend = keras.backend.backend()
    if backend not in BACKENDS:
        raise ValueError(f"Keras' backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return importlib.import_module(f"nbfftconv.keras.in_{backend}")


def is_convolution(layer: Any) -> bool:
    """Whether a layer is one of those that this package has, or of a subclass."""
    return isinstance(layer, tuple(_KINDS))


def why_not(layer: Any) -> str:
    """Return why a layer cannot be computed here; an empty text if it can, by what is known before any input."""
    if type(layer) not in _KINDS:
        return f"it is a {type(layer).__name__}"
    if "call" in vars(layer) and not isinstance(vars(layer)["call"], Substitute):
        return "it has a call of its own"
    if getattr(layer, "quantization_mode", None) is not None:
        return "it is quantized"
    for dtype in (layer.compute_dtype, layer.variable_dtype):
        if dtype not in DTYPES:
            return f"{dtype} is Keras'"
    if not host().is_cpu():
        return "it is not on a CPU"
    return "TensorFlow shifts it" if keras.backend.backend() == "tensorflow" and _is_shifted(layer) else ""


def _is_shifted(layer: Any) -> bool:
    """Whether TensorFlow computes something else of a layer than it documents, or its gradient is of something else.

    "same" padding of its convolutions of volumes is not limited to 0: where a stride exceeds the taps' reach by two or
    more, an input may be cropped at its start (seen in TensorFlow 2.21). The gradient of a transposed one is such.
    """
    if not isinstance(layer, keras.layers.Conv3D | keras.layers.Conv3DTranspose) or layer.padding != "same":
        return False
    along = zip(layer.strides, layer.dilation_rate, layer.kernel_size, strict=True)
    return any(stride - dilation * (taps - 1) > 2 for stride, dilation, taps in along)


class Substitute:
    """What takes the place of a layer's `call`: a mark for all that do.

    Parameters
    ----------
    layer : keras.layers.Layer
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, inputs: Any) -> Any:
        """Do what the layer's class does."""
        return type(self._layer).call(self._layer, inputs)


class _Part(NamedTuple):
    """One of the convolutions of a layer: where its kernel is, and whether the bias is added to its results."""

    kernel: str
    convolution: Convolution
    has_bias: bool


class Computed(Substitute):
    """The layer, computed here; what this package does not compute, such as symbols, goes to its class.

    Parameters
    ----------
    layer : keras.layers.Layer
        For which `why_not` has no reason.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self._settings, self._parts = _settings(layer), _parts(layer)

    def __call__(self, inputs: Any) -> Any:
        """Return the layer's output."""
        layer, backend = self._layer, host()
        if self._settings != _settings(layer):
            self._settings, self._parts = _settings(layer), _parts(layer)
        result = inputs
        for part in self._parts:
            kernel = _tensor(getattr(layer, part.kernel))
            bias = _tensor(layer.bias) if part.has_bias else None
            if backend.is_ours(result, kernel, bias):
                result = backend.convolve(part.convolution, result, kernel, bias)
            else:
                result = None
            if result is None:
                return super().__call__(inputs)
        is_done = self._parts[-1].convolution.relu or layer.activation is None
        return result if is_done else layer.activation(result)


def _tensor(weight: Any) -> Any:
    """Return a weight as a tensor; of a layer with LoRA it is one already."""
    return host().tensor(weight.value if isinstance(weight, keras.Variable) else weight)


def _settings(layer: Any) -> tuple[Any, ...]:
    """Return what `_parts` depends on, which a user may set at any time."""
    numbers = layer.padding, tuple(layer.strides), tuple(layer.dilation_rate), getattr(layer, "output_padding", None)
    return *numbers, layer.data_format == "channels_last", layer.activation is keras.activations.relu, layer.use_bias


def _parts(layer: Any) -> list[_Part]:
    kind, (padding, stride, dilation, added, channels_last, relu, has_bias) = _KINDS[type(layer)], _settings(layer)
    if kind != "separable":
        setting = Setting(kind, padding, stride, dilation, added, channels_last)
        return [_Part("kernel", Convolution(setting, relu), has_bias)]
    ones = (1,) * len(stride)
    depthwise = Setting("depthwise", padding, stride, dilation, None, channels_last)
    pointwise = Setting("plain", "valid", ones, ones, None, channels_last)
    return [
        _Part("depthwise_kernel", Convolution(depthwise, False), False),
        _Part("pointwise_kernel", Convolution(pointwise, relu), has_bias),
    ]


def geometries(layer: Any, shape: tuple[int, ...]) -> list[tuple[ConvGeometry, str]]:
    """Return the convolutions of a layer that is built, for an input of that shape, and the direction of each pass."""
    found = []
    for part in _parts(layer):
        kernel_size, setting = tuple(getattr(layer, part.kernel).shape), part.convolution.setting
        direction = "grad_input" if setting.is_transposed else "forward"
        found.append((setting.geometry(shape, kernel_size), direction))
        shape = setting.output_shape(shape, kernel_size)
    return found


def text(layer: Any, shape: tuple[Any, ...]) -> str:
    """Return the geometry of a layer that is built in a few words, with sizes and kernels as Keras has them."""
    kernel = layer.depthwise_kernel if _KINDS[type(layer)] == "separable" else layer.kernel
    groups = getattr(layer, "groups", 1)
    sizes = ["?" if n is None else n for n in shape]
    return tables.geometry(sizes, tuple(kernel.shape), layer.strides, layer.dilation_rate, groups)
