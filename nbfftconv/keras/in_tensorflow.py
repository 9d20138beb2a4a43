"""Convolutions of TensorFlow's tensors: differentiable, in graphs, and outside of them on the tensors themselves.

Derivatives are of first order.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from nbfftconv.keras.passes import Convolution
from nbfftconv.threads import get_num_threads

#: Seconds that a call takes beside its passes: a callback in each, about.
CALL = 3e-4


def is_cpu() -> bool:
    """Whether tensors are on the CPU."""
    return not tf.config.get_visible_devices("GPU")


def threads() -> int:
    """Return the number of threads of the host."""
    return tf.config.threading.get_intra_op_parallelism_threads() or get_num_threads()


def tensor(value: Any) -> Any:
    """Return the value of a variable as a tensor."""
    return tf.convert_to_tensor(value)


def is_ours(x: Any, kernel: Any, bias: Any) -> bool:
    """Whether this package can compute with tensors: dense ones of float32 or float64, of a known rank."""
    if not all(isinstance(each, tf.Tensor) for each in (x, kernel)) or x.shape.rank != kernel.shape.rank:
        return False
    given = [each for each in (x, kernel, bias) if each is not None]
    return x.dtype in (tf.float32, tf.float64) and all(each.dtype == x.dtype for each in given)


def convolve(convolution: Convolution, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> Any:
    """Convolve tensors; None where the host is to do it."""
    setting, kernel_size = convolution.setting, tuple(kernel.shape)
    batch, channels, *space = setting.first(tuple(x.shape))
    if channels is None or None in kernel_size:
        return None
    if None not in space:  # else a callback says what is wrong
        try:
            setting.geometry((batch or 1, *x.shape[1:]), kernel_size)
        except (TypeError, ValueError):
            return None
    return _convolve(convolution, x, kernel, bias)


def _run(function: Callable[..., np.ndarray], shape: Any, *tensors: tf.Tensor) -> tf.Tensor:
    """Return what a function makes of NumPy arrays: a tensor of that shape, of the dtype of the first."""
    if tf.executing_eagerly():
        return tf.convert_to_tensor(function(*(each.numpy() for each in tensors)))
    result = tf.numpy_function(function, tensors, tensors[0].dtype, stateful=False)
    result.set_shape(shape)
    return result


def _convolve(convolution: Convolution, x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor | None) -> tf.Tensor:
    setting, kernel_size = convolution.setting, tuple(kernel.shape)

    def forward(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return convolution.forward(x, kernel, bias)

    def grad_input(g: np.ndarray, kernel: np.ndarray, shape: np.ndarray) -> np.ndarray:
        return convolution.grad_input(tuple(map(int, shape)), kernel, g)

    def grad_kernel(g: np.ndarray, x: np.ndarray) -> np.ndarray:
        return convolution.grad_kernel(x, kernel_size, g)

    @tf.custom_gradient
    def differentiable(x: tf.Tensor, kernel: tf.Tensor, *bias: tf.Tensor) -> Any:
        y = _run(forward, setting.output_shape(tuple(x.shape), kernel_size), x, kernel, *bias)

        def backward(g: tf.Tensor) -> tuple[tf.Tensor, ...]:
            if convolution.relu:
                g = tf.where(y > 0, g, tf.zeros_like(g))
            of_x = _run(grad_input, x.shape, g, kernel, tf.shape(x))
            of_kernel = _run(grad_kernel, kernel_size, g, x)
            channel = g.shape.rank - 1 if setting.channels_last else 1
            others = [axis for axis in range(g.shape.rank) if axis != channel]
            return (of_x, of_kernel, *(tf.reduce_sum(g, others) for _ in bias))

        return y, backward

    return differentiable(x, kernel, *([] if bias is None else [bias]))
