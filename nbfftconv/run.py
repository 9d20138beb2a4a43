"""Runs passes on arrays that were checked: padding modes, compact operands, memory for results."""

from typing import Any

import numpy as np

from nbfftconv import epoch, scratch, threads
from nbfftconv import padding as padding_modes
from nbfftconv.arrays import address_of, compact, is_usable_out
from nbfftconv.implementations import Kernels, registry
from nbfftconv.kept_kernels import Kept, tick
from nbfftconv.plan import ConvPlan


def run_forward(
    plan: ConvPlan,
    x: np.ndarray,
    kernels: Kernels,
    bias: np.ndarray | None,
    padding_mode: str,
    activation: str | None,
    out: np.ndarray | None = None,
    keep: bool = False,
) -> tuple[np.ndarray, Any]:
    """Run the forward pass on validated arguments; with `keep`, return what a backward pass needs of the input, too."""
    geometry, dtype = plan.geometry, plan.dtype
    b = None if bias is None else compact(bias, dtype)
    x = padding_modes.pad(compact(x, dtype), geometry, padding_mode)
    target = None if out is None else np.asarray(out)  # of a subclass, its memory
    if target is not None and is_usable_out(target, x, kernels.weight, b):
        result = target
    else:
        result = scratch.result(geometry.output_shape, dtype)
    kept = registry.get(plan.algorithm).forward(
        plan, padding_modes.pass_geometry(geometry, padding_mode), x, kernels, b, activation == "relu", result, keep
    )
    if out is None or target is None:
        return result, kept
    if result is not target:
        target[...] = result
    return out, kept


class ReadyPass:
    """Forward passes on arrays of one size and dtype, for which all is done that does not depend on values.

    Parameters
    ----------
    plan : ConvPlan
    kept : Kept
    has_bias, relu : bool
    size : tuple of int
        Of the output, as its user sees it.
    """

    def __init__(self, plan: ConvPlan, kept: Kept, has_bias: bool, relu: bool, size: tuple[int, ...]) -> None:
        self._kept, self._epoch, self._counts = kept, epoch.current, threads.get_counts()
        self._geometry, self._dtype, self._size = plan.geometry, plan.dtype, size
        self._bound = registry.get(plan.algorithm).bind(plan, plan.geometry, kept.kernels, has_bias, relu)

    def is_current(self) -> bool:
        """Whether plans, and this thread's number of threads, are as they were."""
        return self._epoch == epoch.current and self._counts == threads.get_counts()

    def _run(self, x: int, bias: int, y: int) -> Any:
        """Convolve by addresses; return what `_finish` needs, None if no more is to be done."""
        self._kept.used = tick()
        return self._bound.run(x, bias, y)

    def _finish(self, left: Any, x: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
        """Do what is left, on arrays as their user sees them."""
        x, y = x.reshape(self._geometry.input_shape), y.reshape(self._geometry.output_shape)
        self._bound.finish(left, x, bias, y)


class ReadyForward(ReadyPass):
    """Forward passes of a layer, with its bias.

    Parameters
    ----------
    plan, kept, relu, size
        As of `ReadyPass`.
    bias : numpy.ndarray or None
    """

    def __init__(self, plan: ConvPlan, kept: Kept, bias: np.ndarray | None, relu: bool, size: tuple[int, ...]) -> None:
        super().__init__(plan, kept, bias is not None, relu, size)
        self._bias = None if bias is None else compact(bias, plan.dtype)
        self._bias_address = address_of(self._bias)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Convolve an array that is compact, of this size and dtype."""
        result = scratch.result(self._size, self._dtype)
        left = self._run(address_of(x), self._bias_address, address_of(result))
        if left is not None:
            self._finish(left, x, self._bias, result)
        return result


def run_grad_weight(plan: ConvPlan, x: np.ndarray, g: np.ndarray, padding_mode: str) -> np.ndarray:
    """Run the pass on validated arguments."""
    geometry, dtype = plan.geometry, plan.dtype
    x = padding_modes.pad(compact(x, dtype), geometry, padding_mode)
    result = scratch.result(geometry.weight_size, dtype)
    pass_geometry = padding_modes.pass_geometry(geometry, padding_mode)
    registry.get(plan.algorithm).grad_weight(plan, pass_geometry, x, compact(g, dtype), result)
    return result


def run_grad_input(plan: ConvPlan, kernels: Kernels, g: np.ndarray, padding_mode: str) -> np.ndarray:
    """Run the pass on validated arguments."""
    geometry = padding_modes.pass_geometry(plan.geometry, padding_mode)
    result = scratch.result(geometry.input_shape, plan.dtype)
    registry.get(plan.algorithm).grad_input(plan, geometry, kernels, compact(g, plan.dtype), result)
    return padding_modes.fold(result, plan.geometry, padding_mode)


def run_conv_transpose(
    plan: ConvPlan, kernels: Kernels, x: np.ndarray, bias: np.ndarray | None, activation: str | None
) -> np.ndarray:
    """Run a transposed convolution, a gradient at the input with a bias, on validated arguments."""
    geometry, dtype = plan.geometry, plan.dtype
    result = scratch.result(geometry.input_shape, dtype)
    b, relu = None if bias is None else compact(bias, dtype), activation == "relu"
    registry.get(plan.algorithm).conv_transpose(plan, geometry, kernels, compact(x, dtype), b, relu, result)
    return result


def run_backward(
    plan: ConvPlan,
    x: np.ndarray,
    kept: Any,
    kernels: Kernels,
    g: np.ndarray,
    padding_mode: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Run both gradients of a step that shares spectra; return those of input, kernels and bias."""
    dtype, geometry = plan.dtype, padding_modes.pass_geometry(plan.geometry, padding_mode)
    x = padding_modes.pad(compact(x, dtype), plan.geometry, padding_mode)
    grad_input = scratch.result(geometry.input_shape, dtype)
    grad_weight = scratch.result(geometry.weight_size, dtype)
    implementation = registry.get(plan.algorithm)
    grad_bias = implementation.backward(plan, geometry, x, kept, kernels, g, grad_input, grad_weight)
    with np.errstate(over="ignore"):
        grad_bias = grad_bias.astype(dtype)
    return padding_modes.fold(grad_input, plan.geometry, padding_mode), grad_weight, grad_bias
