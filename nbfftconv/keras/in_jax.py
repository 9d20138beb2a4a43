"""Convolutions of JAX' arrays: differentiable, by callbacks under `jax.jit`, on the arrays themselves without it.

Derivatives are of first order, and in reverse.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from nbfftconv.keras.passes import Convolution
from nbfftconv.threads import get_num_threads

#: Seconds that a call takes beside its passes: a callback in each, about.
CALL = 3e-4
_DTYPES = np.dtype(np.float32), np.dtype(np.float64)


def is_cpu() -> bool:
    """Whether arrays are on the CPU."""
    return jax.default_backend() == "cpu"


def threads() -> int:
    """Return the number of threads of the host."""
    return get_num_threads()


def tensor(value: Any) -> Any:
    """Return the value of a variable as a tensor."""
    return value


def is_ours(x: Any, kernel: Any, bias: Any) -> bool:
    """Whether this package can compute with arrays: of float32 or float64, of known sizes."""
    if not all(isinstance(each, jax.Array) for each in (x, kernel)):
        return False
    sizes = (*x.shape, *kernel.shape)
    given = [each for each in (x, kernel, bias) if each is not None]
    return x.dtype in _DTYPES and all(each.dtype == x.dtype for each in given) and all(type(n) is int for n in sizes)


def convolve(convolution: Convolution, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> Any:
    """Convolve arrays; None where the host is to do it."""
    try:
        convolution.setting.geometry(x.shape, kernel.shape)
    except (TypeError, ValueError):
        return None
    return _convolve(convolution, x, kernel, bias)


def _run(function: Callable[..., np.ndarray], shape: tuple[int, ...], *arrays: jax.Array | None) -> jax.Array:
    """Return what a function makes of NumPy arrays: an array of that shape, of the dtype of the first."""
    first: Any = arrays[0]

    def compute(*given: Any) -> np.ndarray:
        return function(*(None if each is None else np.asarray(each) for each in given))

    if not any(isinstance(each, jax.core.Tracer) for each in arrays):
        return jax.numpy.asarray(compute(*arrays))
    result = jax.ShapeDtypeStruct(shape, first.dtype)
    return jax.pure_callback(compute, result, *arrays, vmap_method="sequential")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(convolution: Convolution, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    shape = convolution.setting.output_shape(x.shape, kernel.shape)
    return _run(convolution.forward, shape, x, kernel, bias)


def _forward(convolution: Convolution, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[Any, Any]:
    shape = convolution.setting.output_shape(x.shape, kernel.shape)
    y = _run(convolution.forward_once, shape, x, kernel, bias)
    return y, (x, kernel, bias is not None, y if convolution.relu else None)


def _backward(convolution: Convolution, kept: Any, g: jax.Array) -> tuple[Any, Any, Any]:
    x, kernel, has_bias, y = kept
    if y is not None:
        g = jax.numpy.where(y > 0, g, 0)
    x_shape, kernel_size = x.shape, kernel.shape
    of_x = _run(lambda g, kernel: convolution.grad_input(x_shape, kernel, g), x_shape, g, kernel)
    of_kernel = _run(lambda g, x: convolution.grad_kernel(x, kernel_size, g), kernel_size, g, x)
    channel = g.ndim - 1 if convolution.setting.channels_last else 1
    others = tuple(axis for axis in range(g.ndim) if axis != channel)
    return of_x, of_kernel, g.sum(others) if has_bias else None


_convolve.defvjp(_forward, _backward)
